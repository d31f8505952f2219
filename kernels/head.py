"""The language-model head without its logits: cross-entropy and log-probabilities straight from hidden states.

For a trained token t with hidden state h (H,), head W (V, H), target y, temperature τ and soft-cap c (mostly τ = 1 and
no soft-cap)

    s = W h                                 the raw logits                                                       (1)
    z = c tanh(s / c) / τ                   without a soft-cap z = s / τ                                         (2)
    logsumexp = log Σ_v exp z_v                                                                                  (3)
    logprob = z_y - logsumexp                                                                                    (4)
    entropy = -Σ_v p_v log p_v              with p = exp(z - logsumexp)                                          (5)

and backwards, for a loss L,

    dL/dz and dL/ds                         from dL/d logprob and dL/d entropy: `kernels/rows.py`           (6), (7)
    dL/dh = Wᵀ dL/ds                                                                                             (8)
    dL/dW = Σ_t (dL/ds)_t h_tᵀ                                                                                   (9)

(1), (8) and (9) are matrix products of N·V·H multiplications for N trained tokens, and take nearly all the time. What
happens to the logits between them goes row by row, two passes, and is in `kernels/rows.py`.

Why in pieces. s has N·V numbers, 8 GB in float32 for 16,384 tokens and a vocabulary of 128k: more than all else in a
training step of a small model. But no token's logits need another token's. So CHUNK tokens are taken at a time, and
their logits thrown away before the next are made.

Why the gradient is made in the forward. (6) needs the logits again, but when the backward comes they are gone, and
making them again is a fourth product. If L is a sum over tokens of a function of (logprob, entropy), there is no need
to wait: as soon as a chunk's log-probabilities are known, so are dL/d logprob and dL/d entropy, and (6) to (9) follow
at once, while the logits are there. The backward only multiplies by the number that comes in.

Why the other backward cuts along the vocabulary. Where L is something else (a sequence's sum inside a sigmoid), the
backward has to make the logits again. By then logsumexp is known, the one thing in (2) to (7) that needs a whole row.
So a piece may be some of the vocabulary for all tokens, instead of some tokens for all of the vocabulary. Then (9) is
whole at once for these rows of W, written once by one product. Only (8) is summed over the pieces; the other way it
would be (9), mostly much larger, in float32.

    linear_cross_entropy     gradient in the forward: three matrix products in all
    linear_token_loss        likewise, for any loss that is a sum over tokens of a function of (logprob, entropy)
    linear_logprobs          for everything else: the backward makes the logits again, four matrix products

Why the head is padded. Tensor cores take a vocabulary that is a multiple of 8; at OLMo 3's 100,278 the products took
three times as long on an H200, and the row kernels read one number at a time. So on CUDA rows of zeros make it a
multiple of 64; their logits do not count.

Tokens with target -100 are taken out before the first product. Logits are float32 whatever the operands are: rounding
them to bf16 moves the probability ratios of RL by more than 1 %. Sums over pieces are float32 too.

Shapes:  T tokens, N of them trained, C in a chunk; V vocabulary, U in a piece, W and X with padding; H hidden size.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from kernels import rows
from kernels.rows import Softmax, Transform, Upstream

CHUNK = 4096  # tokens whose logits over the whole vocabulary exist at one time
IGNORE = -100  # target of a token that is not trained on


def linear_cross_entropy(hidden, weight, targets, softcap=None, trained=None):
    """Summed cross-entropy of `targets` under softmax(hidden @ weight.T).

    Args:
        hidden: (T, H) states; position t predicts targets[t].
        weight: (V, H) output head, same dtype and device.
        targets: (T,) int64 token ids, or -100 where nothing is predicted (contributes 0 and costs nothing).
        softcap: c > 0 if the model caps its logits (Gemma 2's final_logit_softcapping).
        trained: (N,) int64, the positions t whose target is not -100, where the caller knows them. Otherwise they are
            looked for, and the host waits for the GPU.

    Returns:
        () loss, summed (not averaged) over the trained tokens, in float32 (float64 for float64 operands).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, weight is a shard, a target is outside [0, V), or
            softcap <= 0. On CUDA such a target ends the process, at the next time that the host waits for the GPU.
    """
    transform = Transform(temperature=1.0, softcap=softcap)
    _check(hidden, weight, targets, transform)
    trained = _trained_positions(targets) if trained is None else trained
    loss, _, _ = _apply_token_loss(hidden, weight, targets, trained, _minus_logprob, transform)
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
    _check(hidden, weight, targets, Transform(temperature, softcap))
    transform = Transform(float(temperature), softcap)
    return _apply_token_loss(hidden, weight, targets, _trained_positions(targets), token_loss, transform)


def linear_logprobs(hidden, weight, targets, temperature=1.0, softcap=None, trained=None):
    """Log-probability of `targets`, and the entropy, under softmax(hidden @ weight.T / temperature).

    Args:
        hidden, weight, targets, softcap, trained: as for `linear_cross_entropy`. temperature: > 0, divides the logits.

    Returns:
        logprobs (T,) and entropy (T,) in nats, float32 (float64 for float64 operands), 0 where nothing is predicted.
        Both are differentiable.

    Raises:
        ValueError: as `linear_cross_entropy`; or temperature <= 0.
    """
    _check(hidden, weight, targets, Transform(temperature, softcap))
    trained = _trained_positions(targets) if trained is None else trained
    return _LinearLogprobs.apply(hidden, weight, targets, trained, Transform(float(temperature), softcap))


def _minus_logprob(logprobs, entropy, tokens):
    """The token loss of cross-entropy."""
    return -logprobs


def _trained_positions(targets):
    """(N,) where there is a target."""
    return (targets != IGNORE).nonzero()[:, 0]


def _apply_token_loss(hidden, weight, targets, trained, token_loss, transform):
    if not torch.is_grad_enabled():  # an autograd.Function does not see no_grad, and would make the gradient
        hidden = hidden.detach()
        weight = weight.detach()
    return _LinearTokenLoss.apply(hidden, weight, targets, trained, token_loss, transform)


class _LinearTokenLoss(torch.autograd.Function):
    """The gradient is made in the forward: CHUNK tokens' logits, their losses, and at once what follows from them."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, trained, token_loss, transform):
        with_entropy = token_loss is not _minus_logprob
        exact = {"dtype": _at_least_float32(hidden), "device": hidden.device}
        loss = torch.zeros((), **exact)
        logprobs, entropy = torch.zeros(2, len(hidden), **exact)  # (T,) each
        transform = transform._replace(V=len(weight))
        d_hidden = None
        if ctx.needs_input_grad[0]:
            d_hidden = torch.zeros_like(hidden)  # (T, H)
        d_weight = None
        padded = _pad(weight)  # (W, H)
        if ctx.needs_input_grad[1]:
            d_weight = torch.empty(padded.shape, **exact)  # (W, H)
        for number, chunk in enumerate(trained.split(CHUNK)):
            h = hidden[chunk]  # (C, H)
            y = targets[chunk]  # (C,)
            logits = _matmul(h, padded.T)  # (C, W) (1)
            chunk_logprobs, softmax = rows.statistics(logits, y, transform, with_entropy)  # (2) to (5)
            chunk_loss, upstream = _differentiate(token_loss, chunk_logprobs, softmax.entropy, chunk)
            loss += chunk_loss
            logprobs[chunk] = chunk_logprobs
            if with_entropy:
                entropy[chunk] = softmax.entropy
            if any(ctx.needs_input_grad):
                d_logits = rows.gradient_(logits, y, softmax, upstream, transform, h.dtype)  # (C, W) (6), (7)
            if d_hidden is not None:
                d_hidden[chunk] = d_logits @ padded  # (8)
            if d_weight is not None:
                _add_matmul(d_weight, d_logits.T, h, first=number == 0)  # (9)
            logits = d_logits = None  # before the next chunk's are made
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight[: len(weight)])
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(logprobs, entropy)
        return loss, logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        d_hidden, d_weight = ctx.saved_tensors
        # Into new tensors: what was saved stays as it is, for a second backward.
        if d_hidden is not None:
            d_hidden = torch.mul(d_hidden, d_loss, out=torch.empty_like(d_hidden))
        if d_weight is not None:
            d_weight = torch.mul(d_weight, d_loss, out=torch.empty_like(d_weight, dtype=ctx.weight_dtype))
        return d_hidden, d_weight, None, None, None, None


def _differentiate(token_loss, logprobs, entropy, tokens):
    """Sum of token_loss over a chunk, and the Upstream gradient: by logprobs (C,), and by entropy (C,) if there is one.

    This is all that autograd sees of the loss: a few numbers for each token.
    """
    logprobs = logprobs.detach().requires_grad_()
    inputs = [logprobs]
    if entropy is not None:
        entropy = entropy.detach().requires_grad_()
        inputs.append(entropy)
    with torch.enable_grad():
        losses = token_loss(logprobs, entropy, tokens)
        if losses.shape != tokens.shape:
            raise ValueError(f"token_loss returned {tuple(losses.shape)} for {tuple(tokens.shape)} tokens")
        total = losses.sum()
        gradients = torch.autograd.grad(total, inputs, allow_unused=True)  # None for an input that was not used
    if entropy is None:
        return total.detach(), Upstream(gradients[0], None)
    return total.detach(), Upstream(*gradients)


class _LinearLogprobs(torch.autograd.Function):
    """The gradient that comes in is known only in the backward, which makes the logits again, cut along the vocabulary.

    See the top of this file for why.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, trained, transform):
        ctx.set_materialize_grads(False)  # no gradient for an output that nobody used
        exact = {"dtype": _at_least_float32(hidden), "device": hidden.device}
        logprobs, entropy, logsumexp = torch.zeros(3, len(hidden), **exact)  # (T,) each
        padded = _pad(weight)  # (W, H)
        transform = transform._replace(V=len(weight))
        for chunk in trained.split(CHUNK):
            logits = _matmul(hidden[chunk], padded.T)  # (C, W) (1)
            chunk_logprobs, softmax = rows.statistics(logits, targets[chunk], transform)  # (2) to (5)
            logprobs[chunk] = chunk_logprobs
            logsumexp[chunk] = softmax.logsumexp
            entropy[chunk] = softmax.entropy
            logits = None  # before the next chunk's are made
        ctx.save_for_backward(hidden, weight, targets, trained, logsumexp, entropy)
        ctx.transform = transform
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprobs, d_entropy):
        hidden, weight, targets, trained, logsumexp, entropy = ctx.saved_tensors
        h = hidden[trained]  # (N, H)
        y = targets[trained]  # (N,)
        softmax = Softmax(logsumexp[trained], entropy[trained])  # (N,) each
        upstream = _upstream(d_logprobs, d_entropy, softmax.logsumexp, trained)
        d_h = torch.zeros_like(h, dtype=logsumexp.dtype)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.empty_like(weight)
        size = _piece_size(len(h), len(weight))
        for start in range(0, len(weight), size):
            piece = slice(start, min(start + size, len(weight)))
            U = piece.stop - start
            transform = ctx.transform._replace(V=U)
            w = _pad(weight[piece])  # (X, H)
            logits = _matmul(h, w.T)  # (N, X) (1)
            d_logits = rows.gradient_(logits, y - start, softmax, upstream, transform, h.dtype)  # (N, X) (6), (7)
            if ctx.needs_input_grad[0]:
                _add_matmul(d_h, d_logits, w, first=start == 0)  # (8)
            if d_weight is not None:
                d_weight[piece] = (d_logits.T @ h)[:U]  # (9)
            logits = d_logits = None  # before the next piece's are made
        d_hidden = None
        if ctx.needs_input_grad[0]:
            d_hidden = torch.zeros_like(hidden)
            d_hidden.index_copy_(0, trained, d_h.to(hidden.dtype))
        return d_hidden, d_weight, None, None, None


def _upstream(d_logprobs, d_entropy, like, trained):
    """The gradients that came in, of trained tokens only; None came in for an output that nobody used."""
    if d_logprobs is None:
        d_logprobs = torch.zeros_like(like)
    else:
        d_logprobs = d_logprobs[trained]
    if d_entropy is not None:
        d_entropy = d_entropy[trained]
    return Upstream(d_logprobs, d_entropy)


def _piece_size(num_tokens, vocabulary):
    """Rows of the head in a piece, so that all tokens' logits for it take the memory of a chunk's in the forward."""
    pieces = max(1, math.ceil(num_tokens / CHUNK))
    return math.ceil(vocabulary / pieces / 128) * 128  # whole tiles for tensor cores


def _pad(weight):
    """The head (V, H) with rows of zeros up to a multiple of 64 on CUDA: (W, H). See the top of this file for why."""
    if not weight.is_cuda or len(weight) % 64 == 0:
        return weight
    return F.pad(weight, (0, 0, 0, -len(weight) % 64))


def _at_least_float32(x):
    """The dtype of logits and sums: float32, or float64 where the operands are."""
    return torch.promote_types(x.dtype, torch.float32)


def _matmul(a, b):
    """a @ b with at least float32 accuracy in the result; 16-bit operands stay 16-bit on CUDA."""
    dtype = _at_least_float32(a)
    if a.dtype != dtype and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _add_matmul(total, a, b, first):
    """total += a @ b, or total = a @ b if it is the first; in float32 (or float64), the dtype of `total`."""
    beta = 0 if first else 1  # 0: what `total` held is not read
    if a.dtype != total.dtype and a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


def _check(hidden, weight, targets, transform):
    """Raises ValueError if operands do not fit together, or a temperature, soft-cap or target is impossible."""
    if isinstance(weight, DTensor):
        raise ValueError("weight is sharded: call this in the forward of a module under fully_shard, which gathers it")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden (T, H), weight (V, H), got {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"expected int64 targets ({len(hidden)},), got {targets.dtype} {tuple(targets.shape)}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight must share a floating dtype, got {hidden.dtype} and {weight.dtype}")
    devices = {str(x.device) for x in (hidden, weight, targets)}
    if len(devices) > 1:
        raise ValueError(f"hidden, weight and targets must share a device, got {', '.join(sorted(devices))}")
    for name, value in transform._asdict().items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    possible = (targets == IGNORE) | (targets >= 0) & (targets < len(weight))
    if targets.is_cuda:  # the host does not wait for the answer
        torch._assert_async(possible.all(), f"a target is outside the vocabulary of {len(weight)}")
    elif not possible.all():
        raise ValueError(f"target {targets[~possible][0].item()} is outside the vocabulary of {len(weight)}")
