"""REINFORCE++ with baseline (arXiv 2501.03262): the group's mean as baseline, the whole batch's standard deviation.

    A_i = r_i - mean_j r_j      then      A_i ← (A_i - μ) / √(σ² + 1e-8)                                in place of (1)

μ and σ² are the mean and the variance of A over all completion tokens of the batch: of all groups, ranks and
minibatches. --normalize_std divides by the deviation of a group, which is small where nearly all completions are right,
or nearly all wrong: such prompts get larger advantages. Here all groups are divided by the same number. The equation is
that of the authors' code (OpenRLHF, experience_maker.py, reinforce_baseline).

    python forks/make.py reinforce_pp > my_grpo.py
    python my_grpo.py --active_sampling 0 --tis_cap 0                                            as the authors' code
"""

import numpy as np

BASE = "grpo.py"
# ruff: noqa: F821 (what is not defined here, the script defines)

LINES = {
    "minibatches = [flatten(part)": "whiten(samples)\nminibatches = [flatten(part)",
}


def set_advantages(args, group):
    """Equation (1) for the G samples of a prompt, before the batch's deviation."""
    rewards = np.array([completion_reward(args, sample) for sample in group])  # (G,)
    advantages = rewards - rewards.mean()  # (G,)                                                                (1)
    if not differ(rewards):
        advantages[:] = 0  # exactly: equal numbers, and their mean, may be off by a rounding
    for sample, advantage in zip(group, advantages, strict=True):
        sample.advantages = advantage


def whiten(samples):
    """Advantages of mean 0 and variance 1 over all tokens of a batch. samples: those of all groups and ranks."""
    if not samples:
        return
    advantages = np.array([sample.advantages for sample in samples])  # (S,)
    lengths = np.array([sample.trained.sum() for sample in samples])  # (S,) tokens, each of which has the advantage
    mean = np.average(advantages, weights=lengths)
    variance = np.average((advantages - mean) ** 2, weights=lengths)
    for sample in samples:
        sample.advantages = (sample.advantages - mean) / np.sqrt(variance + 1e-8)
