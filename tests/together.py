"""Runs a function on several ranks: forks of this process, joined by gloo. A second, where torchrun takes ten."""

import faulthandler
import gc
import os
import pickle
import signal
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from launch import call, free_port


def together(world, function, *args, seconds=120, nodes=1, joins=False):
    """[function(*args), called on rank 0; on rank 1; ...]. Fails with the first rank's traceback if one raises.

    Args:
        nodes: machines that the ranks seem to be on. joins: the function itself joins the ranks, as scripts do.
    """
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                local = {"LOCAL_WORLD_SIZE": str(world // nodes), "LOCAL_RANK": str(rank % (world // nodes))}
                os.environ |= address | local | {"RANK": str(rank), "WORLD_SIZE": str(world)}
                _rank(Path(folder), rank, world, function, args, joins)
            pids.append(pid)
        end = time.monotonic() + seconds
        waiting = set(pids)
        while waiting and time.monotonic() < end and not any(Path(folder).glob("*.error")):
            waiting -= {pid for pid in waiting if os.waitpid(pid, os.WNOHANG)[0]}
            time.sleep(0.01)
        for pid in waiting:
            os.kill(pid, signal.SIGUSR2)  # it prints where it hangs
        time.sleep(0.5 * bool(waiting))
        for pid in waiting:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not errors, errors[0]
        assert not waiting, f"not finished after {seconds} s"
        return [pickle.loads(Path(folder, f"{rank}.result").read_bytes()) for rank in range(world)]


def train(world, script, nodes=1, **flags):
    """A whole run of a script, which is a module, on so many ranks."""
    together(world, lambda: call(script, **flags), nodes=nodes, joins=True)


def _rank(folder, rank, world, function, args, joins):
    """What a fork does. Does not return."""
    try:
        gc.freeze()  # a process group that a test has left in a cycle: its end would wait for threads that are not here
        faulthandler.register(signal.SIGUSR2)
        if dist.is_initialized():
            dist.destroy_process_group()
        if not joins:
            dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        result = pickle.dumps(function(*args))
        (folder / f"{rank}.partial").write_bytes(result)
        (folder / f"{rank}.partial").rename(folder / f"{rank}.result")
        while len(list(folder.glob("*.result"))) < world:  # rank 0 has the store by which the others find each other
            time.sleep(0.01)
    except BaseException:
        (folder / f"{rank}.partial").write_text(traceback.format_exc())
        (folder / f"{rank}.partial").rename(folder / f"{rank}.error")
    os._exit(0)
