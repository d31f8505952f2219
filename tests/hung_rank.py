"""Run by test_grpo.py on two processes: rank 1 does not come to a meeting of all ranks, and rank 0 says who is missing.

    torchrun --nproc_per_node 2 tests/hung_rank.py
"""

import os
import time
from datetime import timedelta

import conftest  # noqa: F401  (paths)
import torch.distributed as dist

from common import RunError
from rewards import environment

environment.PATIENCE = timedelta(seconds=3)
dist.init_process_group("gloo")
rollouts = environment.Rollouts.__new__(environment.Rollouts)
rollouts.gloo = dist.new_group(backend="gloo")
assert rollouts._gather([dist.get_rank()]) == [0, 1]
if dist.get_rank() == 1:
    time.sleep(20)
try:
    rollouts._gather([])
except RunError as error:
    print(error, flush=True)
os._exit(0)
