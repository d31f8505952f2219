"""DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): long completions lose reward before their end.

    r_i - max(0, |y_i| - (M - B)) / B                                                           in place of r_i in (1)

with M = --max_new_tokens and B = --overlong_buffer: from 0 at M - B tokens to 1 at M. The logged reward is without it.

    python forks/make.py overlong_penalty > my_grpo.py
"""

from dataclasses import dataclass

BASE = "grpo.py"


@dataclass
class Args:
    overlong_buffer: int = 512  # B: the reward falls by up to 1 over the last so many tokens below --max_new_tokens


def completion_reward(args, sample):
    """r_i less the penalty for its length."""
    over = sample.trained.sum() - (args.max_new_tokens - args.overlong_buffer)  # tokens beyond M - B
    reward = sample.reward - max(0, over) / args.overlong_buffer
    if args.reward_model_coef:
        reward += args.reward_model_coef * sample.rm_scores[-1]
    return reward
