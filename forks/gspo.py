"""Group sequence policy optimisation (Zheng et al., arXiv 2507.18071): one ratio for a whole completion.

    ρ_i = (π(y_i | x) / π_old(y_i | x)) ^ (1 / |y_i|)                               equation (7) of the paper, for (2)

The geometric mean over its tokens stands in the place of each token's own ratio, so a completion is clipped as a
whole, and within much narrower bounds. The paper averages over completions (forks/sequence_mean.py) and makes four
updates of a batch (section 5.1).

    python forks/make.py gspo sequence_mean > my_grpo.py
"""

import math
from dataclasses import dataclass

import torch

import common

BASE = "grpo.py"


@dataclass
class Args:
    clip_low: float = 3e-4  # ε_low of equation (4); section 5.1 of the GSPO paper
    clip_high: float = 4e-4  # ε_high of equation (4)
    minibatches: int = 4  # optimizer steps in one pass over a batch


def completion_means(values, trained, cu_seqlens):
    """(T,) values replaced by their mean over the trained tokens of their sequence."""
    sequence = torch.repeat_interleave(cu_seqlens.diff())  # (T,) number of the sequence
    zeros = torch.zeros(len(cu_seqlens) - 1, dtype=values.dtype, device=values.device)  # (S,)
    sums = zeros.index_add(0, sequence, values * trained)  # (S,)
    counts = zeros.index_add(0, sequence, trained.to(values.dtype))  # (S,)
    return (sums / counts.clamp(min=1))[sequence]


def policy_loss(args, logprobs, microbatch):
    """Equations (2) to (5) for T tokens, before the sum; (2) is GSPO's.

    Args:
        logprobs: (T,) log π(y_t | x, y_<t), with gradient.
        microbatch: its extras hold the other numbers, (T,) each, 0 where nothing is trained.

    Returns:
        losses (T,), and {metric: (T,)}; both 0 where nothing is trained.
    """
    trained = microbatch.targets != common.IGNORE  # (T,)
    advantages = microbatch.extras["advantages"]  # (T,)
    if "old_logprobs" in microbatch.extras:
        old_logprobs = microbatch.extras["old_logprobs"]  # (T,)
    else:
        old_logprobs = logprobs.detach()  # (T,) the only update of a batch: π is π_old
    logratio = completion_means(logprobs - old_logprobs, trained, microbatch.cu_seqlens)  # (T,)
    ratio = logratio.exp()  # (T,)                                                                               (2)
    behaviour_ratio = (old_logprobs - microbatch.extras["behaviour_logprobs"]).exp()  # (T,)
    w = behaviour_ratio.clamp(max=args.tis_cap) if args.tis_cap else 1.0  # (T,)                                 (3)
    clipped_ratio = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)  # (T,)
    losses = -w * torch.min(ratio * advantages, clipped_ratio * advantages)  # (T,)                              (4)
    # Where the clip acts, and the term of (4) has no gradient.
    too_high = (advantages > 0) & (ratio > 1 + args.clip_high)  # (T,)
    too_low = (advantages < 0) & (ratio < 1 - args.clip_low)  # (T,)
    metrics = {
        "ratio": ratio,
        "clipfrac": too_high | too_low,
        "approx_kl": ratio - 1 - logratio,  # KL(π_old || π), by k3 as in (5)
        "behaviour_kl": behaviour_ratio - 1 - behaviour_ratio.log(),
        "tis_capped": behaviour_ratio > (args.tis_cap or math.inf),
    }
    if "ref_logprobs" in microbatch.extras:
        log_ref_ratio = microbatch.extras["ref_logprobs"] - logprobs  # (T,) log(π_ref / π)
        kl = log_ref_ratio.exp() - log_ref_ratio - 1  # (T,) ≥ 0; its mean over samples of π is KL(π || π_ref)   (5)
        losses = losses + args.kl_beta * kl  # (T,)                                                              (4)
        metrics["ref_kl"] = kl
    return losses * trained, {name: (values * trained).detach() for name, values in metrics.items()}
