"""The mean of GRPO's paper (arXiv 2402.03300, equation 3): over the tokens of a completion, then over completions.

    L = 1/S Σ_i 1/|y_i| Σ_t [ ... ]                                                                      in place of (4)

for the S completions of a minibatch. A token of a short completion then counts more than one of a long completion.

    python forks/make.py sequence_mean > my_grpo.py
"""

BASE = "grpo.py"


def set_loss_weights(args, minibatch):
    """The denominators of the mean over completions of the mean over tokens."""
    for sample in minibatch:
        sample.loss_weight = 1 / (len(minibatch) * sample.trained.sum())  # 1 / (S |y_i|)                            (4)
