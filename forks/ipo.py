"""Identity preference optimisation (IPO, arXiv 2310.12036): the margin is drawn to a target, not pushed for ever.

    L = mean over pairs of (log [π(y_c | x) / π_ref(y_c | x)] - log [π(y_r | x) / π_ref(y_r | x)] - 1 / 2τ)²
      = mean over pairs of ((m - 1/2) / τ)²                      with DPO's margin m for β = τ          in place of (3)

DPO's loss falls as long as the margin grows. Here it is lowest at m = 1/2. --beta is τ: the smaller, the further the
two log-ratios are drawn apart. Ratios are of whole answers; with --length_normalize they are means over their tokens.
The equation was read in other people's code (ContextualAI/HALOs, train/trainers.py), not in the paper.

    python forks/make.py ipo > my_dpo.py
"""

from dataclasses import dataclass

import common

BASE = "dpo.py"


@dataclass
class Args:
    beta: float = 0.1  # τ: the loss is lowest where the log-ratios of chosen and rejected answers are 1 / 2τ apart


def preference_loss(args, answer_logprobs, answer_lengths, ref_logprobs):
    """IPO's loss of each of B pairs, and (4).

    Args:
        answer_logprobs: (2B,) log π(y | x) of chosen, rejected, chosen, …
        answer_lengths: (2B,) |y| of these.
        ref_logprobs: (B, 2) log π_ref(y | x): chosen, rejected.

    Returns:
        losses (B,), and {metric: (B,)}.
    """
    num_answers = ref_logprobs.numel()  # 2B; a microbatch without pairs has a token that stands for nothing
    logprobs = answer_logprobs[:num_answers]  # (2B,)
    logratios = logprobs - ref_logprobs.flatten()  # (2B,) log [π(y | x) / π_ref(y | x)]
    if args.length_normalize:
        logratios = logratios / answer_lengths[:num_answers]  # (2B,)
    rewards = args.beta * logratios  # (2B,)                                                                     (1)
    margin = rewards[0::2] - rewards[1::2]  # (B,) chosen minus rejected                                         (2)
    losses = ((margin - 0.5) / args.beta) ** 2  # (B,)                                                           (3)
    chosen_nll = -logprobs[0::2] / answer_lengths[:num_answers:2]  # (B,) n, nats per token
    losses = losses + args.nll_coef * chosen_nll  # (B,)                                                         (4)
    metrics = {
        "loss": losses,
        "accuracy": margin > 0,
        "margin": margin,
        "chosen_reward": rewards[0::2],
        "rejected_reward": rewards[1::2],
        "chosen_logprob": logprobs[0::2],
        "rejected_logprob": logprobs[1::2],
        "chosen_nll": chosen_nll,
    }
    return losses, metrics


def check_flags(args):
    """Raises RunError for flags with which the loss would not be IPO's."""
    if args.beta <= 0:
        raise common.RunError(f"--beta {args.beta} has to be above 0: it is τ, and 1 / 2τ the target")
    if args.nll_coef < 0:
        raise common.RunError(f"--nll_coef {args.nll_coef} has to be at least 0: below, chosen answers are unlearned")
