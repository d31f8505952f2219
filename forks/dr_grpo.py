"""GRPO done right (Dr. GRPO, arXiv 2503.20783, section 3.1): the sum over tokens, divided by a constant.

    L = 1/(S M) Σ_i Σ_t [ ... ]                                                                          in place of (4)

for the S completions of a minibatch, and M = --max_new_tokens. Neither the length of a completion nor those of the
others change what a token counts. The paper's other change, no division by the standard deviation, is the default of
grpo.py already.

    python forks/make.py dr_grpo > my_grpo.py
"""

BASE = "grpo.py"


def set_loss_weights(args, minibatch):
    """The constant denominator."""
    for sample in minibatch:
        sample.loss_weight = 1 / (len(minibatch) * args.max_new_tokens)  # 1 / (S M)                                 (4)
