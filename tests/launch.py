"""Runs a script as users do, in processes of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[1]

# The lowest common instruction set and one thread: the same bits on every x86-64 machine.
PORTABLE = {
    "OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


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
    """Popen of `python script --name value ...`, by torchrun for more than one process."""
    environment = os.environ | PORTABLE | (env or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(script, processes, flags, nodes, node, positional), env=environment, cwd=ROOT, **pipes)


def run(script, processes=1, expect=0, env=None, **options):
    """Runs to the end; returns (stdout, stderr). Fails with the script's own output unless it exits with `expect`."""
    process = start(script, processes, env, **options)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == expect, f"exit code {process.returncode}, expected {expect}\n{stdout}\n{stderr}"
    return stdout, stderr


def metrics(out):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def trace(out):
    """What a run computed, without what it measured: (step, loss, lr, gradient norm, held-out loss) of every step."""
    return [tuple(e.get(k) for k in ("step", "loss", "lr", "grad_norm", "eval_loss")) for e in metrics(out)]


def call(module, **flags):
    """A whole run in this process, which saves the imports."""
    try:
        module.main(module.Args(**{name: str(v) if isinstance(v, Path) else v for name, v in flags.items()}))
    finally:
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
