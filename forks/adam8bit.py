"""AdamW with moments of 8 bits (Dettmers et al., arXiv 2110.02861): two bytes a parameter in the place of eight.

    scale_b = max |m| over block b          code_i = argmin_j |q_j - m_i / scale_b|          m_i ≈ q_code · scale_b

for both moments of AdamW. A block is 256 numbers of a shard in torchao's implementation, and the 256 values q_j between
-1 and 1, or 0 and 1, lie close together near 0. A step computes in float32 and rounds what it keeps. Moments of shards
that are small (below 4,096 numbers) or no whole number of blocks stay float32. So the course of a run depends, by that
rounding, on the number of processes: continue a run with as many as it began with.

    pip install torchao
    python forks/make.py adam8bit > my_sft.py                               and --base of every other script
"""

import torch

import common

BASE = "sft.py"


def make_optimizer(args, module):
    """AdamW whose moments have 8 bits, with weight decay on matrices only."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise common.RunError(f"8-bit AdamW needs the package torchao ({error}): pip install torchao") from None
    matrices = [parameter for parameter in module.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in module.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = AdamW8bit(groups, lr=args.lr, betas=args.adam_betas, eps=args.adam_eps)
    optimizer.register_step_pre_hook(make_lr_a_tensor)
    return optimizer


def make_lr_a_tensor(optimizer, *_):
    """Called before each step: torchao wants a tensor, for one compiled step of all values; the loop sets a number."""
    for group in optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"])
