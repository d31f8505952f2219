"""Clipped importance-sampling-weight policy optimisation (CISPO, MiniMax-M1, arXiv 2506.13585, equations 4 and 5).

    L = Σ_t [ -w_t sg(min(ρ_t, 1 + ε_high)) A_t log π(y_t | x, y_<t)  +  β KL_t ]  /  Σ_t 1             in place of (4)

sg: no gradient flows through it. GRPO's clip takes the gradient of a token away once its ratio has left the bounds in
the direction of the advantage. Here the weight is cut, and every token keeps a gradient: also the rare ones whose ratio
grows fastest. There is no lower bound, as in the paper's experiments. So nothing stops a token of a wrong answer from
being made unlikelier, other than that its weight ρ falls. With one update of a batch ρ is 1, and the gradient that of
GRPO.

The paper tunes ε_high and does not name it; the default is that of TRL's settings for ScaleRL, weights up to 5.

    python forks/make.py cispo > my_grpo.py
    python my_grpo.py --normalize_std --minibatches 16 --tis_cap 0                               the paper's objective
"""

import math
from dataclasses import dataclass

import common

BASE = "grpo.py"


@dataclass
class Args:
    clip_high: float = 4.0  # ε_high: a token's weight is at most 1 + ε_high


def policy_loss(args, logprobs, microbatch):
    """Equations (2) to (5) for T tokens, before the sum; (4) is CISPO's.

    Args:
        logprobs: (T,) log π(y_t | x, y_<t), with gradient.
        microbatch: its extras hold the other numbers, (T,) each, 0 where nothing is trained.

    Returns:
        losses (T,), and {metric: (T,)}; both 0 where nothing is trained.
    """
    trained = microbatch.targets != common.IGNORE  # (T,)
    advantages = microbatch.extras["advantages"]  # (T,)
    old_logprobs = microbatch.extras.get("old_logprobs", logprobs.detach())  # (T,) without several updates, π itself
    logratio = logprobs - old_logprobs  # (T,)
    ratio = logratio.exp()  # (T,)                                                                               (2)
    behaviour_ratio = (old_logprobs - microbatch.extras["behaviour_logprobs"]).exp()  # (T,)
    w = behaviour_ratio.clamp(max=args.tis_cap) if args.tis_cap else 1.0  # (T,)                                 (3)
    weight = ratio.clamp(max=1 + args.clip_high).detach()  # (T,) a constant
    losses = -w * weight * advantages * logprobs  # (T,)                                                         (4)
    metrics = {
        "ratio": ratio,
        "clipfrac": ratio > 1 + args.clip_high,  # where the weight is cut; the gradient is not 0 there
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
