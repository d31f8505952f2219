"""REINFORCE leave-one-out (RLOO, arXiv 2402.14740): a completion is compared with the others, not also with itself.

    A_i = r_i - 1/(G - 1) Σ_{j≠i} r_j  =  G/(G - 1) (r_i - mean_j r_j)                                  in place of (1)

The baseline does not contain r_i, so the gradient is unbiased. For groups of one size that is one factor for all, which
AdamW divides out again. The rest is grpo.py's: the clip, which never acts with one update of a batch, and the mean over
tokens. To sum over the tokens of a completion and take the mean over completions, as REINFORCE does, add the fork
dr_grpo: its constant differs from that by the factor --max_new_tokens. The equation was read in other people's code
(OpenRLHF, experience_maker.py, rloo) and in documentation, not in the paper.

    python forks/make.py rloo > my_grpo.py
    python forks/make.py rloo dr_grpo > my_grpo.py
"""

import numpy as np

BASE = "grpo.py"
# ruff: noqa: F821 (what is not defined here, the script defines)


def set_advantages(args, group):
    """RLOO's (1) for the G samples of a prompt."""
    rewards = np.array([completion_reward(args, sample) for sample in group])  # (G,)
    if differ(rewards):
        others = (rewards.sum() - rewards) / (len(rewards) - 1)  # (G,) the mean of the others
    else:
        others = rewards  # all equal, or a group of one
    for sample, advantage in zip(group, rewards - others, strict=True):
        sample.advantages = advantage  #                                                                         (1)
