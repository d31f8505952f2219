"""Run by test_sft.py on two processes: every architecture is loaded in shards, stepped, exported and opened again.

Also the head's log-probabilities on a sharded model: their gradient, and how often weights are gathered for it.

    torchrun --nproc_per_node 2 tests/roundtrip.py FOLDER
"""

import sys
from pathlib import Path

import conftest  # noqa: F401  (paths)
import numpy as np
import torch
import torch.distributed as dist
from test_kernels import tiny_config
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import common
import sft
from kernels.head import linear_logprobs


class Logprobs(torch.nn.Module):
    """What the other scripts' Policy is: log-probabilities, whose backward needs the head's weight again."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, microbatch):
        hidden = self.model.base_model(**microbatch.model_inputs()).last_hidden_state[0]
        weight, softcap = self.model.get_output_embeddings().weight, getattr(self.model.config, "final_logit_softcapping", 0)
        return linear_logprobs(hidden, weight, microbatch.targets, 0.8, softcap or None)


class Gathers(TorchDispatchMode):
    """Counts the collectives that gather weights."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name().startswith("c10d::_allgather_base_")
        return function(*args, **(kwargs or {}))


def check_logprobs(family, config, plain):
    """Gradient of Σ (logprob + entropy / 10) equals plain transformers'; all weights gathered once in each direction
    (the layers; the head, in the group that stays gathered, once in all), whatever the head does."""
    policy = sft.load_model(args, config, AutoModelForCausalLM, Logprobs, device, mesh)
    head = policy.model.get_output_embeddings().weight
    try:
        linear_logprobs(torch.zeros(1, head.shape[1]), head, torch.zeros(1, dtype=torch.int64))
        raise AssertionError("a sharded weight was taken")
    except ValueError as error:
        assert "sharded" in str(error)
    with Gathers() as gathers:
        logprobs, entropy = policy(common.pack([sequence], device))
        (logprobs + entropy / 10).sum().backward()
    assert gathers.count == 2 * config.num_hidden_layers + 1, gathers.count
    logp = (plain(torch.tensor(ids)[None]).logits[0] / 0.8).log_softmax(-1)[:-1][torch.from_numpy(trained[1:])]
    targets = torch.tensor(ids)[1:][torch.from_numpy(trained[1:])]
    plain.zero_grad()
    (logp.gather(1, targets[:, None]).sum() - (logp.exp() * logp).sum() / 10).backward()
    for (name, a), b in zip(policy.model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad.full_tensor(), b.grad, rtol=1e-3, atol=1e-4 * b.grad.abs().max()), (family, name)
    plain.zero_grad()


folder = Path(sys.argv[1])
args = sft.Args(model="", data=[], out="", max_length=64, batch_size=2, lr=1e-2)
device, mesh = sft.setup_distributed(args)
chat = common.ChatFormat(common.load_tokenizer(folder / "tokenizer", "tulu"))
ids, trained = chat.encode([conftest.user("What is 2 + 3? " * 3), conftest.assistant("It is 5. " * 5)])
sequence = (np.array(ids), trained)

for family in ("llama", "qwen3", "olmo3", "gemma2", "gemma3"):
    for tied in (True, False):
        args.model = str(folder / f"{family}_{tied}")

        def make(path=args.model, family=family, tied=tied):
            torch.manual_seed(0)
            config = tiny_config(family, len(chat.tokenizer), tied)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)

        sft.on_rank0(make)
        policy = sft.load_model(args, common.load_config(args), AutoModelForCausalLM, sft.Policy, device, mesh)
        optimizer = sft.make_optimizer(args, policy)
        plain = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="eager")
        check_logprobs(family, common.load_config(args), plain)
        reference = torch.optim.AdamW(plain.parameters(), lr=args.lr, betas=args.adam_betas, weight_decay=0.0)
        for _ in range(3):
            loss = policy(common.pack([sequence], device)) / trained.sum()  # the same on both ranks
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            logp = plain(torch.tensor(ids)[None]).logits[0].log_softmax(-1)
            mask = torch.from_numpy(trained[1:])
            truth = -logp[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0][mask].mean()
            truth.backward()
            reference.step()
            reference.zero_grad()
            assert torch.isclose(loss, truth, rtol=1e-4), (family, tied, loss, truth)
        path = folder / f"{family}_{tied}_trained"
        sft.export_model(args, policy.model, chat, path)
        opened, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(info.values()), info
        assert (opened.get_output_embeddings().weight is opened.get_input_embeddings().weight) == tied
        weights = dict(opened.named_parameters())
        for name, tensor in policy.model.named_parameters():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(whole, weights.pop(name)), (family, tied, name)
        assert not weights
        if dist.get_rank() == 0:
            print(f"{family}, {'tied' if tied else 'untied'}: loss and weights agree")
dist.destroy_process_group()
