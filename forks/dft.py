"""Dynamic fine-tuning (DFT, arXiv 2508.05629): a token counts by the probability that the model already gives it.

    L = - Σ_t m_t sg(p_t) log p_t  /  Σ_t m_t,      p_t = π(y_t | y_<t)                                  in place of (1)

sg: no gradient flows through it. The gradient of -log p is -∇p / p: a token that the model thinks unlikely pulls
hardest. Times p it is -∇p, whatever p is. So DFT sharpens what the model half knows, and hardly learns what it does not
know at all: there p is near 0, and so is ∇p. The held-out loss remains (1), to be compared with that of sft.py. The
equation is that of the authors' code (yongliang-wu/DFT, fsdp_dft_trainer.py).

    python forks/make.py dft > my_sft.py
"""

import torch

from kernels.head import linear_token_loss

BASE = "sft.py"
# ruff: noqa: F821 (what is not defined here, the script defines)


class Policy(torch.nn.Module):
    """A causal language model that maps a packed microbatch straight to its summed loss, without logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, microbatch):
        hidden = self.model.base_model(**microbatch.model_inputs()).last_hidden_state[0]  # (T, H)
        head = self.model.get_output_embeddings().weight  # (V, H)
        softcap = getattr(self.model.config, "final_logit_softcapping", None)  # Gemma 2 has one
        if not self.training:
            return linear_cross_entropy(hidden, head, microbatch.targets, softcap, microbatch.trained)  # ()
        loss, _, _ = linear_token_loss(hidden, head, microbatch.targets, dft_loss, softcap=softcap)
        return loss  # ()                                                                                        (1)


def dft_loss(logprobs, entropy, tokens):
    """-sg(p) log p of C tokens, from their log p (C,)."""
    return -logprobs.detach().exp() * logprobs  # (C,)                                                           (1)
