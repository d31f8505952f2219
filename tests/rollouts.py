"""Run by test_sampler.py on two processes: the sampler's copy of sharded weights, and decoding beside training.

    torchrun --nproc_per_node 2 tests/rollouts.py FOLDER
"""

import sys
from pathlib import Path

import conftest  # noqa: F401  (paths)
import torch
import torch.distributed as dist
from test_kernels import tiny_config
from test_sampler import make_prompts, sequence, tokens
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import common
import sft
from kernels.sampler import Sampler, SamplingParams

EOS = range(2, 8)


def check_copy(sampler, policy):
    """Every weight and buffer of the copy equals the whole one of the policy, bit for bit."""
    copies = dict(sampler.model.named_parameters()) | dict(sampler.model.named_buffers())
    for name, tensor in [*policy.model.named_parameters(), *policy.model.named_buffers()]:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(whole, copies.pop(name)), name
    assert not copies


folder = Path(sys.argv[1])
args = sft.Args(model="", data=[], out="", max_length=64, batch_size=2, lr=1e-2)
device, mesh = sft.setup_distributed(args)
rank = dist.get_rank()
prompts = make_prompts([5, 30, 1, 12, 12, 40, 2])
params = SamplingParams(n=2, max_new_tokens=20, seed=3)

for family, tied in (("llama", True), ("gemma3", False)):
    args.model = str(folder / family)

    def make(path=args.model, family=family, tied=tied):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(tiny_config(family, 128, tied)).save_pretrained(path)

    sft.on_rank0(make)
    config = common.load_config(args)
    policy = sft.load_model(args, config, AutoModelForCausalLM, sft.Policy, device, mesh)
    optimizer = sft.make_optimizer(args, policy)
    sampler = Sampler(config, 3, 64, EOS, device)
    addresses = [x.data_ptr() for x in sampler.model.parameters()]
    losses = []
    for step in range(3):
        sampler.sync(policy)
        check_copy(sampler, policy)
        assert all(isinstance(p, DTensor) for p in policy.parameters())  # sharded again
        # Rank 0 decodes all prompts, rank 1 two of them: a collective in between would hang, or mix up with these.
        mine = range(len(prompts)) if rank == 0 else range(4, 6)
        completions = sampler.sample([prompts[i] for i in mine], params, step=step, indices=mine)
        box = [tokens(completions)]
        dist.broadcast_object_list(box)
        assert tokens(completions).items() <= box[0].items()  # rank 1 sampled what rank 0 did
        batch = [sequence(c) for c in completions if c.index in (4, 5)]
        loss = policy(common.pack(batch, device)) / sum(trained.sum() for _, trained in batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        with torch.no_grad():  # as an evaluation: leaves the outermost module's weights gathered
            policy(common.pack(batch, device))
    assert addresses == [x.data_ptr() for x in sampler.model.parameters()] and all(map(torch.isfinite, map(torch.tensor, losses)))
    if rank == 0:
        print(f"{family}, {'tied' if tied else 'untied'}: copies and samples agree")
dist.destroy_process_group()
