"""The language-model head without its logits: cross-entropy and log-probabilities from hidden states.

For a trained token t with hidden state h (H,), head W (V, H), target y, temperature τ and soft-cap c (mostly τ = 1 and
no soft-cap)

    s = W h                 z = c tanh(s / c) / τ                 logsumexp = log Σ_v exp z_v
    logprob = z_y - logsumexp       p = exp(z - logsumexp)        entropy = -Σ_v p_v log p_v

s has T·V numbers, 8 GB in float32 for 16,384 tokens and a vocabulary of 128k, so it is made in pieces and thrown away.
The functions differ in when the gradient is made:

    linear_cross_entropy     in the forward, while the logits are there: three matrix products in all
    linear_token_loss        likewise, for any loss that is a sum over tokens of a function of (logprob, entropy)
    linear_logprobs          for everything else: the backward makes the logits again, four matrix products

Tokens with target -100 are taken out before the first product. Logits are float32 whatever the operands are: rounding
them to bf16 moves the probability ratios of RL by more than 1 %. Sums over pieces are float32 too. What happens to the
logits between the products is in `kernels/rows.py`.
"""

import math

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from kernels import rows

CHUNK = 4096  # tokens whose logits over the whole vocabulary exist at one time
IGNORE = -100  # target of a token that is not trained on


def linear_cross_entropy(hidden, weight, targets, softcap=None):
    """Summed cross-entropy of `targets` under softmax(hidden @ weight.T).

    Args:
        hidden: (T, H) states; position t predicts targets[t].
        weight: (V, H) output head, same dtype and device.
        targets: (T,) int64 token ids, or -100 where nothing is predicted (contributes 0 and costs nothing).
        softcap: c > 0 if the model caps its logits (Gemma 2's final_logit_softcapping).

    Returns:
        () loss, summed (not averaged) over the trained tokens, in float32 (float64 for float64 operands).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, weight is a shard, a target is outside [0, V), or
            softcap <= 0.
    """
    loss, _, _ = _apply_token_loss(hidden, weight, targets, lambda logprobs, *_: -logprobs, False, 1.0, softcap)
    return loss


def linear_token_loss(hidden, weight, targets, token_loss, temperature=1.0, softcap=None):
    """Σ_t token_loss(logprob_t, entropy_t, t) under softmax(hidden @ weight.T / temperature), in three products.

    For losses whose term for a token needs of other tokens only what is known beforehand, as PPO's and GRPO's clipped
    objectives. Against `linear_logprobs` followed by the loss it saves a quarter of the head's arithmetic.

    Args:
        hidden, weight, targets, softcap: as for `linear_cross_entropy`. temperature: > 0, divides the logits.
        token_loss: called with logprobs (C,), entropy (C,) and positions (C,) in [0, T) of a piece's trained tokens;
            returns their losses (C,), differentiable in the first two (to other tensors no gradient flows).

    Returns:
        () summed loss; and for metrics, as constants, logprobs (T,) and entropy (T,), 0 where nothing is predicted.

    Raises:
        ValueError: as `linear_cross_entropy`; or temperature <= 0, or token_loss returned another shape.
    """
    return _apply_token_loss(hidden, weight, targets, token_loss, True, temperature, softcap)


def linear_logprobs(hidden, weight, targets, temperature=1.0, softcap=None):
    """Log-probability of `targets`, and the entropy, under softmax(hidden @ weight.T / temperature).

    Args:
        hidden, weight, targets, softcap: as for `linear_cross_entropy`. temperature: > 0, divides the logits.

    Returns:
        logprobs (T,) and entropy (T,) in nats, float32 (float64 for float64 operands), 0 where nothing is predicted.
        Both are differentiable.

    Raises:
        ValueError: as `linear_cross_entropy`; or temperature <= 0.
    """
    _check(hidden, weight, targets, temperature, softcap)
    return _LinearLogprobs.apply(hidden, weight, targets, float(temperature), softcap)


def _apply_token_loss(hidden, weight, targets, token_loss, with_entropy, temperature, softcap):
    _check(hidden, weight, targets, temperature, softcap)
    if not torch.is_grad_enabled():  # an autograd.Function does not see no_grad, and would make the gradient
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearTokenLoss.apply(hidden, weight, targets, token_loss, with_entropy, float(temperature), softcap)


def _check(hidden, weight, targets, temperature, softcap):
    if isinstance(weight, DTensor):
        raise ValueError("weight is sharded: call this in the forward of a module under fully_shard, which gathers it")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden (T, H), weight (V, H), got {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"expected int64 targets ({len(hidden)},), got {targets.dtype} {tuple(targets.shape)}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight must share a floating dtype, got {hidden.dtype} and {weight.dtype}")
    if len(devices := {str(x.device) for x in (hidden, weight, targets)}) > 1:
        raise ValueError(f"hidden, weight and targets must share a device, got {', '.join(sorted(devices))}")
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    bad = targets[(targets != IGNORE) & ((targets < 0) | (targets >= len(weight)))]
    if bad.numel():
        raise ValueError(f"target {bad[0].item()} is outside the vocabulary of {len(weight)}")


def _matmul(a, b):
    """a @ b with at least float32 accuracy in the result; 16-bit operands stay 16-bit on CUDA."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    if a.dtype != dtype and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _add_matmul(total, a, b, first):
    """total += a @ b, or total = a @ b if it is the first; in float32 (or float64), the dtype of `total`."""
    if a.dtype != total.dtype and a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=0 if first else 1)


class _LinearTokenLoss(torch.autograd.Function):
    """The gradient is made in the forward: CHUNK tokens' logits, their losses, and at once what follows from them."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, token_loss, with_entropy, temperature, softcap):
        trained = (targets != IGNORE).nonzero()[:, 0]  # (N,)
        exact = {"dtype": torch.promote_types(hidden.dtype, torch.float32), "device": hidden.device}
        loss, logprobs, entropy = torch.zeros((), **exact), *torch.zeros(2, len(hidden), **exact)
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None  # (T, H)
        d_weight = torch.empty(weight.shape, **exact) if ctx.needs_input_grad[1] else None  # (V, H)
        for i, chunk in enumerate(trained.split(CHUNK)):
            h, y = hidden[chunk], targets[chunk]  # (C, H), (C,)
            logits = _matmul(h, weight.T)  # (C, V)
            logp, logsumexp, ent = rows.statistics(logits, y, temperature, softcap, with_entropy)
            chunk_loss, d_logp, d_ent = _differentiate(token_loss, logp, ent, chunk)
            loss += chunk_loss
            logprobs[chunk] = logp
            if with_entropy:
                entropy[chunk] = ent
            if any(ctx.needs_input_grad):
                d_logits = rows.gradient_(logits, y, logsumexp, ent, d_logp, d_ent, temperature, softcap, h.dtype)
            if d_hidden is not None:
                d_hidden[chunk] = d_logits @ weight
            if d_weight is not None:
                _add_matmul(d_weight, d_logits.T, h, first=i == 0)
            logits = d_logits = None  # before the next chunk's are made
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(logprobs, entropy)
        return loss, logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = torch.mul(d_hidden, d_loss, out=torch.empty_like(d_hidden))
        if d_weight is not None:
            d_weight = torch.mul(d_weight, d_loss, out=torch.empty_like(d_weight, dtype=ctx.weight_dtype))
        return d_hidden, d_weight, None, None, None, None, None


def _differentiate(token_loss, logprobs, entropy, tokens):
    """Sum of token_loss over a chunk, and its gradient by logprobs (C,) and entropy (C,), None where it has none."""
    inputs = [logprobs.detach().requires_grad_(), None if entropy is None else entropy.detach().requires_grad_()]
    with torch.enable_grad():
        losses = token_loss(*inputs, tokens)
        if losses.shape != tokens.shape:
            raise ValueError(f"token_loss returned {tuple(losses.shape)} for {tuple(tokens.shape)} tokens")
        total = losses.sum()
        gradient = torch.autograd.grad(total, [x for x in inputs if x is not None], allow_unused=True)
    return total.detach(), *gradient, *[None] * (2 - len(gradient))


class _LinearLogprobs(torch.autograd.Function):
    """The gradient that comes in is known only in the backward, which makes the logits again.

    The log-sum-exp is known by then, so the logits can be cut along the vocabulary: each piece of d_weight is then one
    product, and what is summed over pieces is only d_hidden.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, softcap):
        ctx.set_materialize_grads(False)  # no gradient for an output that nobody used
        trained = (targets != IGNORE).nonzero()[:, 0]  # (N,)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, logsumexp = torch.zeros(3, len(hidden), dtype=dtype, device=hidden.device)
        for chunk in trained.split(CHUNK):
            logits = _matmul(hidden[chunk], weight.T)  # (C, V)
            statistics = rows.statistics(logits, targets[chunk], temperature, softcap)
            logprobs[chunk], logsumexp[chunk], entropy[chunk] = statistics
            logits = None  # before the next chunk's are made
        ctx.save_for_backward(hidden, weight, targets, trained, logsumexp, entropy)
        ctx.temperature, ctx.softcap = temperature, softcap
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprobs, d_entropy):
        hidden, weight, targets, trained, logsumexp, entropy = ctx.saved_tensors
        h, y = hidden[trained], targets[trained]  # (N, H), (N,)
        logsumexp, entropy = logsumexp[trained], entropy[trained]
        d_logprobs = torch.zeros_like(logsumexp) if d_logprobs is None else d_logprobs[trained]
        d_entropy = None if d_entropy is None else d_entropy[trained]
        d_h = torch.zeros_like(h, dtype=logsumexp.dtype)
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        pieces = math.ceil(len(h) / CHUNK) or 1  # of the size of a chunk's logits in the forward
        size = math.ceil(len(weight) / pieces / 128) * 128  # whole tiles for tensor cores
        for start in range(0, len(weight), size):
            w = weight[start : start + size]  # (U, H)
            logits = _matmul(h, w.T)  # (N, U)
            d_logits = rows.gradient_(
                logits, y - start, logsumexp, entropy, d_logprobs, d_entropy, ctx.temperature, ctx.softcap, h.dtype
            )
            if ctx.needs_input_grad[0]:
                _add_matmul(d_h, d_logits, w, first=start == 0)
            if d_weight is not None:
                d_weight[start : start + size] = d_logits.T @ h
            logits = d_logits = None  # before the next piece's are made
        d_hidden = torch.zeros_like(hidden).index_copy_(0, trained, d_h.to(hidden.dtype))
        return d_hidden if ctx.needs_input_grad[0] else None, d_weight, None, None, None
