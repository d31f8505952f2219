"""DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): long completions lose reward before their end.

    r_i - max(0, |y_i| - (M - B)) / B                                                           in place of r_i in (1)

with M = --max_new_tokens and B = --overlong_buffer: from 0 at M - B tokens to 1 at M. The logged reward is without it.

    python forks/make.py overlong_penalty > my_grpo.py
"""

from dataclasses import dataclass

import numpy as np

BASE = "grpo.py"


@dataclass
class Args:
    overlong_buffer: int = 512  # B: the reward falls by up to 1 over the last so many tokens below --max_new_tokens


def shaped_reward(args, sample):
    """r_i less the penalty for its length."""
    over = sample.trained.sum() - (args.max_new_tokens - args.overlong_buffer)  # tokens beyond M - B
    return sample.reward - max(0, over) / args.overlong_buffer


def is_kept(args, group):
    """With active sampling, whether the shaped rewards of a group differ."""
    return not args.active_sampling or len({shaped_reward(args, sample) for sample in group}) > 1


def set_advantages(args, group):
    """Equation (1) for the G samples of a prompt, of their shaped rewards."""
    rewards = np.array([shaped_reward(args, sample) for sample in group])  # (G,)
    advantages = rewards - rewards.mean()  # (G,)                                                                (1)
    if rewards.min() == rewards.max():
        advantages[:] = 0  # exactly: the mean of equal numbers may be off by a rounding
    if args.normalize_std:
        advantages /= rewards.std(ddof=1) + 1e-4
    for sample, advantage in zip(group, advantages, strict=True):
        sample.advantages = advantage
