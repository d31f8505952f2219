"""Runs a function on several ranks: forks of this process, joined by gloo. A second, where torchrun takes ten."""

import os
import pickle
import signal
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist


def together(world, function, *args, seconds=120):
    """[function(*args), called on rank 0; on rank 1; ...]. Fails with the first rank's traceback if one raises."""
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                _rank(Path(folder), rank, world, function, args)
            pids.append(pid)
        end = time.monotonic() + seconds
        waiting = set(pids)
        while waiting and time.monotonic() < end and not any(Path(folder).glob("*.error")):
            waiting -= {pid for pid in waiting if os.waitpid(pid, os.WNOHANG)[0]}
            time.sleep(0.01)
        for pid in waiting:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not errors, errors[0]
        assert not waiting, f"not finished after {seconds} s"
        return [pickle.loads(Path(folder, f"{rank}.result").read_bytes()) for rank in range(world)]


def _rank(folder, rank, world, function, args):
    """What a fork does. Does not return."""
    try:
        if dist.is_initialized():
            dist.destroy_process_group()
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        result = pickle.dumps(function(*args))
        dist.barrier()
        (folder / f"{rank}.result").write_bytes(result)
    except BaseException:
        (folder / f"{rank}.partial").write_text(traceback.format_exc())
        (folder / f"{rank}.partial").rename(folder / f"{rank}.error")
    os._exit(0)
