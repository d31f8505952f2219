"""The memory of one rank that samples, of many ranks that are not there: as in simulate.py, for the sampler.

The script's own policy, sharded, and the real Sampler: its sync, a prefill and a decode step with all slots, and its
release. A group that shares a copy is a fake one, too.
"""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from simulate import as_on_cuda, fake_ranks
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoModelForCausalLM

import grpo
import kernels.sampler
import kernels.slots
from kernels.memory import LiveBytes
from kernels.sampler import PREFILL_TOKENS, Sampler


class Sampling(NamedTuple):
    """Bytes on one rank."""

    parameters: int  # of the policy, in float32
    synced: int  # at the peak of `sync`; like the next beside the parameters
    sampled: int  # at the peak of a prefill and a decode step
    released: int  # what is left after `release`


def simulate_sampling(config, ranks, slots, max_length, sample_tp=1):
    """A Sampling, on CUDA's dtypes."""
    args = grpo.Args()
    with pytest.MonkeyPatch.context() as patch, fake_ranks(ranks) as (mesh, _):
        as_on_cuda(patch, grpo)
        patch.setattr(kernels.sampler, "_precision", lambda device: torch.bfloat16)
        patch.setattr(kernels.sampler, "_check_memory", lambda *args: None)
        patch.setattr(kernels.sampler, "_matmul", lambda a, b: torch.empty(len(a), b.shape[1], dtype=torch.float32))
        patch.setattr(kernels.slots, "use_triton", lambda query: True)
        policy = grpo.load_model(args, config, AutoModelForCausalLM, grpo.Policy, torch.device("cpu"), mesh)
        group = dist.new_subgroups(sample_tp)[0] if sample_tp > 1 else None
        with unset_fake_temporarily():  # on meta
            sampler = Sampler(config, slots, max_length, [2], "cpu", group)
        with torch.no_grad(), Bytes(patch) as counted:
            sampler.sync(policy)
            synced = counted.peak
            counted.peak = counted.now
            length = min(PREFILL_TOKENS, max_length) // 2
            sampler._prefill([(slot, range(length)) for slot in range(min(slots, PREFILL_TOKENS // length))])
            sampler._decode(slots, max_length, 1.0)
            sampled = counted.peak
            sampler.release()
            released = counted.now
        parameters = sum(parameter.to_local().nbytes for parameter in policy.parameters())
        return Sampling(parameters, synced, sampled, released)


class Bytes(LiveBytes):
    """Likewise of what storages are resized to."""

    def __init__(self, patch):
        super().__init__()
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage, size):
            self.add(size - storage.nbytes())
            resize(storage, size)

        patch.setattr(torch.UntypedStorage, "resize_", resize_and_count)
