"""The processes that torchrun has started, for programs that only read models; one process is a world of one."""

import contextlib
import functools
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

import common
from rewards.pool import Pool
from rewards.verifiers import VERIFIERS


def run(main, args_class, doc):
    """Calls main(args) with the flags of the command line, and ends the process. What a user can mend is one line."""
    code = 0
    try:
        with contextlib.redirect_stdout(None) if rank() else contextlib.nullcontext():
            program = f"python -m pipeline.{Path(sys.argv[0]).stem}"
            args = tyro.cli(args_class, description=doc, use_underscores=True, prog=program)
            join()
            main(args)
    except SystemExit as end:
        code = end.code or 0
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        say("interrupted: the same command goes on")
    except (common.RunError, OSError) as failure:
        code = 1
        if rank():
            time.sleep(2)  # of an error of all ranks rank 0 tells, and torchrun ends the others
        tqdm.write(f"error: {failure}", file=sys.stderr)
    sys.stdout.flush()
    if code and "RANK" in os.environ:
        time.sleep(1)
    os._exit(code)  # at once: while Python takes itself down, a thread of the process group now and then aborts it


def join():
    """Joins the other processes."""
    if own_device().type == "cuda":
        torch.cuda.set_device(own_device())
    if "RANK" in os.environ:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))


def own_device():
    """The torch.device of this process."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def rank():
    """Number of this process."""
    return int(os.environ.get("RANK", 0))


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(items):
    """The lists of all ranks, one behind the other. All ranks call it together."""
    if not dist.is_initialized():
        return items
    lists = [None] * world()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def in_turn(function):
    """Calls `function` on the ranks of a machine one after the other: its host has one model in memory at a time."""
    for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", 1))):
        if turn == int(os.environ.get("LOCAL_RANK", 0)):
            result = function()
        gather([])
    return result


def on_rank0(function):
    """Calls `function` on rank 0 alone. Every rank gets its result, or raises its RunError."""
    box = [None, None]  # result, error
    if rank() == 0:
        try:
            box[0] = function()
        except (common.RunError, OSError) as error:
            box[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    if box[1] is not None:
        raise common.RunError(box[1])
    return box[0]


def judges(workers, sandbox):
    """The processes that judge, one rewards.pool.Pool for all models: starting them takes a second."""
    modules = {verifier.judge.__module__ for verifier in VERIFIERS.values()}
    return _judges(workers, sandbox, tuple(sorted(modules)), os.getpid())


@functools.cache
def _judges(workers, sandbox, modules, process):  # a fork may not use its parent's
    return Pool(workers, sandbox)


@functools.cache
def say(text):
    """Prints it on rank 0, above a progress bar; the same text once."""
    if rank() == 0:
        tqdm.write(text)
