"""The memory of one rank of many, without them: a script's own model, forward and backward, on tensors without numbers.

PyTorch's fake tensors have a shape and no content, and its fake process group answers at once. So a model of any size,
sharded over any number of ranks, takes the steps that it would take there: the script's load_model with FSDP2, its
Policy, its optimizer. PyTorch's FSDPMemTracker counts what is alive at each moment.

There is no CUDA here. What the code does there and not on a CPU is put in its place by `as_on_cuda`: bf16 compute,
variable-length attention, and the allocations of the head. Of torch.compile it has what decides what is kept for the
backward. The allocator's rounding, NCCL's buffers and CUDA's own memory are not simulated.
"""

import contextlib
import dataclasses
import gc
import importlib
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

import common
import kernels.attention
from kernels import head, rows

MODELS = {  # that a script trains: (class that makes the model, module that computes with it)
    "sft": [("AutoModelForCausalLM", "Policy")],
    "reward_model": [("ScoreModel", "RewardModel")],
    "dpo": [("AutoModelForCausalLM", "Policy")],
    "grpo": [("AutoModelForCausalLM", "Policy")],
    "ppo_rlvr": [("AutoModelForCausalLM", "Policy"), ("ScoreModel", "TokenScores")],
}


class Simulated(NamedTuple):
    """Bytes on one rank."""

    parameters: int
    gradients: int
    moments: int
    sum: int  # of these, and what the work on a microbatch needs on top, at its peak


def simulate(script, config, ranks, tokens, **flags):
    """A Simulated of each model that a script trains on microbatches of so many tokens. flags: the script's."""
    module_of = importlib.import_module(script)
    args = module_of.Args(**flags)
    results = []
    with pytest.MonkeyPatch.context() as patch, fake_ranks(ranks) as (mesh, mode):
        as_on_cuda(patch, module_of)
        for model_class, module_class in MODELS[script]:
            classes = getattr(module_of, model_class), getattr(module_of, module_class)
            module = module_of.load_model(args, config, *classes, torch.device("cpu"), mesh)
            optimizer = module_of.make_optimizer(args, module)
            takes_temperature = script in ("grpo", "ppo_rlvr") and module_class == "Policy"
            inputs = [make_microbatch(tokens, mode), *([1.0] if takes_temperature else [])]
            results.append(measure(module, optimizer, inputs))
    return results


def measure(module, optimizer, inputs):
    """A microbatch that is not the first of its step, and an update."""
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)  # of the microbatches before
    tracker = FSDPMemTracker(module, optimizer)
    tracker.track_inputs(tuple(x for x in vars(inputs[0]).values() if torch.is_tensor(x)))
    with tracker:
        outputs = module(*inputs)
        loss = outputs if torch.is_tensor(outputs) else outputs[0]
        loss.sum().backward()
    [peak] = tracker.get_tracker_snapshot("peak").values()  # of the one device
    optimizer.step()
    state = [x for state in optimizer.state.values() for x in state.values()]
    return Simulated(
        parameters=local_bytes(module.parameters()),
        gradients=local_bytes(parameter.grad for parameter in module.parameters()),
        moments=local_bytes(state),
        sum=peak["Total"] + local_bytes(state),
    )


def local_bytes(tensors):
    """This rank's bytes of sharded tensors."""
    return sum(x.to_local().nbytes for x in tensors if hasattr(x, "to_local"))


@contextlib.contextmanager
def fake_ranks(ranks):
    """Inside, this process is rank 0 of so many, and tensors are fake. Yields the device mesh and the mode."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mesh, mode
    finally:
        dist.destroy_process_group()
        gc.collect()


def as_on_cuda(patch, script):
    """Replaces what differs on CUDA, and the loading. patch: a pytest.MonkeyPatch. script: the module of a script."""

    def varlen(query, key, value, cu_seqlens, options):
        return kernels.attention._varlen(query, key, value, cu_seqlens, query.shape[2], options)

    def statistics(logits, targets, transform, with_entropy=True):
        logprobs, logsumexp, entropy = torch.empty(3, len(logits))
        return logprobs, rows.Softmax(logsumexp, entropy if with_entropy else None)

    def gradient_(logits, targets, softmax, upstream, transform, dtype):
        return logits.view(dtype)[:, : logits.shape[1]]  # over the logits

    def pad(weight):
        return weight if len(weight) % 64 == 0 else F.pad(weight, (0, 0, 0, -len(weight) % 64))

    patch.setattr(kernels.attention, "_loop", varlen)
    patch.setattr(head, "_check", lambda *args: None)
    patch.setattr(head, "_pad", pad)
    patch.setattr(head, "_matmul", lambda a, b: torch.empty(len(a), b.shape[1], dtype=torch.float32))
    patch.setattr(head, "_add_matmul", lambda total, a, b, first: None)
    patch.setattr(rows, "statistics", statistics)
    patch.setattr(rows, "gradient_", gradient_)

    # torch.compile up to the decision what the backward makes again. Under a mode that watches it would do nothing.
    compile_layer = torch.nn.Module.compile
    options = {"backend": "aot_eager_decomp_partition", "dynamic": False}
    patch.setattr(torch.nn.Module, "compile", lambda self: compile_layer(self, **options))
    for mode in (FSDPMemTracker, FakeTensorMode):
        patch.setattr(mode, "ignore_compile_internals", classmethod(lambda cls: True), raising=False)

    patch.setattr(common, "read_weights", fake_buffers)
    patch.setattr(script.dcp_state, "set_model_state_dict", lambda *args, **options: None)  # nothing to load
    patch.setattr(script, "on_rank0", lambda function: function())
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    patch.setattr(script, "MixedPrecisionPolicy", lambda *args, **options: bf16)


def fake_buffers(path, config, model_class):
    """In place of common.read_weights: what load_model takes itself; parameters stay as they are."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: torch.empty_like(buffer, device="cpu") for name, buffer in model.named_buffers()}


def make_microbatch(tokens, mode):
    """So many tokens in eight sequences, all trained; fake."""
    lengths = [len(part) for part in np.array_split(np.arange(tokens), 8)]
    with unset_fake_temporarily():
        microbatch = common.pack([(np.zeros(n), np.ones(n, dtype=bool)) for n in lengths], "cpu")
    tensors = {name: mode.from_tensor(x) for name, x in vars(microbatch).items() if torch.is_tensor(x)}
    return dataclasses.replace(microbatch, **tensors)
