"""Runs a script as users do: one process as a fork of the test, several by torchrun."""

import contextlib
import gc
import json
import logging
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch.distributed as dist

import common

ROOT = Path(__file__).parents[1]

# What a run logs of its machine, not of what it computed.
MEASURED = {"seconds", "tokens_per_second", "rollout_seconds", "peak_memory_gib", "mfu"}


def command(script, processes, flags, nodes=1, node=0, positional=()):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launcher += ["--standalone"] if nodes == 1 else [f"--nnodes={nodes}", f"--node_rank={node}", "--master_port=29555"]
    flags = [part for name, value in flags.items() for part in _flag(name, value)]
    return [sys.executable, *(launcher if processes > 1 else ()), str(ROOT / script), *map(str, positional), *flags]


def _flag(name, value):
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]


def start(script, processes=1, env=None, nodes=1, node=0, positional=(), **flags):
    """`python script --name value ...`, a Popen; a Fork for one process in this environment."""
    words = command(script, processes, flags, nodes, node, positional)
    if processes == 1 and env is None:  # libraries read the environment as they are imported
        return Fork(words[1:])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=os.environ | (env or {}), cwd=ROOT, **pipes)


def run(script, processes=1, expect=0, env=None, **options):
    """Runs to the end; returns (stdout, stderr). Fails with the script's own output unless it exits with `expect`."""
    process = start(script, processes, env, **options)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == expect, f"exit code {process.returncode}, expected {expect}\n{stdout}\n{stderr}"
    return stdout, stderr


def quick(script, timeout=120, env=None, kill_when=lambda: False, **flags):
    """A run in a fork.

    Args:
        env: for the script, not for libraries, which are imported.
        kill_when: kill -9 as soon as this function of no arguments returns True.

    Returns:
        (exit code, negative where a signal ended it; stdout; stderr).
    """
    process = Fork(command(script, 1, flags)[1:], env)
    end = time.monotonic() + timeout
    while process.poll() is None:
        late = time.monotonic() > end
        if late or kill_when():
            process.send_signal(signal.SIGKILL)
            texts = process.communicate()
            assert not late, f"not finished after {timeout} s\n{texts[0]}\n{texts[1]}"
        time.sleep(0.002)
    return process.returncode, *process.communicate()


class Fork:
    """`python argv ...` in a fork of this process, which has imported what scripts import: six seconds less than a Popen,
    whose methods it has."""

    def __init__(self, argv, env=None):
        import ppo_rlvr  # noqa: F401 (what scripts import: once for all forks, and only for tests that fork)

        self.returncode = None
        self.outputs = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self.pid = os.fork()
        if self.pid == 0:
            _become(argv, env or {}, *self.outputs)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=None):
        end = time.monotonic() + (timeout or math.inf)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.002)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return tuple((file.seek(0), file.read().decode())[1] for file in self.outputs)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


def _become(argv, env, stdout, stderr):
    """Turns this process, a fork, into `python argv ...`. Does not return."""
    code = 1
    try:
        gc.freeze()  # a process group that a test has left in a cycle: its end would wait for threads that are not here
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)
        logging.getLogger().handlers.clear()  # pytest's
        for handler in filter(None, (reference() for reference in logging._handlerList)):
            if type(handler) is logging.StreamHandler:  # of libraries that found the test's stderr
                handler.setStream(sys.stderr)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        os.environ.update(env)
        os.chdir(ROOT)
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def metrics(out):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def trace(out):
    """What a run computed, without what it measured: (step, loss, lr, gradient norm, held-out loss) of every step."""
    return [tuple(e.get(k) for k in ("step", "loss", "lr", "grad_norm", "eval_loss")) for e in metrics(out)]


def weights(out):
    """The bytes of the final model's weights."""
    return (out / "model" / "model.safetensors").read_bytes()


def call(module, **flags):
    """A whole run in this process, which saves the imports."""
    locks = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with pytest.MonkeyPatch.context() as patch:
        lock_run = common.lock_run
        patch.setattr(common, "lock_run", lambda out: locks.append(lock_run(out)) or locks[-1])
        try:
            module.main(module.Args(**{name: str(v) if isinstance(v, Path) else v for name, v in flags.items()}))
        finally:  # what else ends with the process
            for lock, _ in locks:
                lock.release()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if dist.is_initialized():  # it stopped with an error
                dist.destroy_process_group()


def children(pid):
    """The processes that a process has started and that have not ended."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def kill(process):
    """kill -9 of a run, the workers of torchrun first: they would outlive it for a step, and save."""
    for pid in [*children(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
