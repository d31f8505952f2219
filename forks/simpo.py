"""Simple preference optimisation (SimPO, arXiv 2405.14734): DPO without a reference.

    r(y) = (β / |y|) log π(y | x)                                                                       in place of (1)
    L    = mean over pairs of  -log σ(r(y_c) - r(y_r) - γ)                                              in place of (3)

The reward is the answer's mean log-probability per token. γ is the margin that a pair has to reach. No reference is
computed, kept in memory or on disk; nothing but a small learning rate holds the policy near where it began (the authors
search 3e-7 to 1e-6). The equations are those of the authors' code (princeton-nlp/SimPO, scripts/simpo_trainer.py), the
defaults those of their Llama 3 base model. They report that an SFT term can help: it is (4), --nll_coef.

    python forks/make.py simpo > my_dpo.py
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common

BASE = "dpo.py"


@dataclass
class Args:
    beta: float = 2.0  # β: scale of the mean log-probabilities; much larger than DPO's
    gamma_beta_ratio: float = 0.5  # γ / β: how much likelier per token, in nats, a chosen answer has to become
    lr: float = 6e-7  # peak learning rate


def preference_loss(args, answer_logprobs, answer_lengths, ref_logprobs):
    """SimPO's loss of each of B pairs, and (4).

    Args:
        answer_logprobs: (2B,) log π(y | x) of chosen, rejected, chosen, …
        answer_lengths: (2B,) |y| of these.
        ref_logprobs: (B, 2) zeros: only their number counts.

    Returns:
        losses (B,), and {metric: (B,)}.
    """
    num_answers = ref_logprobs.numel()  # 2B; a microbatch without pairs has a token that stands for nothing
    logprobs = answer_logprobs[:num_answers]  # (2B,)
    means = logprobs / answer_lengths[:num_answers]  # (2B,) per token
    rewards = args.beta * means  # (2B,)                                                                         (1)
    margin = rewards[0::2] - rewards[1::2]  # (B,) chosen minus rejected                                         (2)
    gamma = args.gamma_beta_ratio * args.beta
    losses = -F.logsigmoid(margin - gamma)  # (B,)                                                               (3)
    losses = losses - args.nll_coef * means[0::2]  # (B,)                                                        (4)
    metrics = {
        "loss": losses,
        "accuracy": margin > 0,
        "margin": margin,
        "chosen_reward": rewards[0::2],
        "rejected_reward": rewards[1::2],
        "chosen_logprob": logprobs[0::2],
        "rejected_logprob": logprobs[1::2],
        "chosen_nll": -means[0::2],
    }
    return losses, metrics


def reference_logprobs(args, ref_hash, rows, wanted, device, mesh):
    """There is no reference: zeros, (N, 2)."""
    return torch.zeros(len(rows), 2, dtype=torch.float64)


def hash_reference(args, policy_config, device):
    """There is no reference: nothing to hash."""


def check_flags(args):
    """Raises RunError for flags with which the loss would not be SimPO's."""
    if args.beta <= 0:
        raise common.RunError(f"--beta {args.beta} has to be above 0: at 0 nothing is learned, below the reverse")
    if args.ref_model:
        raise common.RunError("--ref_model: SimPO has no reference")
    if args.nll_coef < 0:
        raise common.RunError(f"--nll_coef {args.nll_coef} has to be at least 0: below, chosen answers are unlearned")
