"""Two passes over rows of logits: the statistics of the softmax, and the gradient, written over the logits.

For one token with raw logits s (V,), target y, temperature τ and soft-cap c, numbered as in `kernels/head.py`,

    z = c tanh(s / c) / τ                   without a soft-cap z = s / τ                                         (2)
    logsumexp = log Σ_v exp z_v                                                                                  (3)
    logprob = z_y - logsumexp                                                                                    (4)
    entropy = -Σ_v p_v log p_v              with p = exp(z - logsumexp), so log p = z - logsumexp                (5)

and backwards, for a loss L with g = dL / d logprob and e = dL / d entropy,

    dL/dz_v = g (1[v = y] - p_v) - e p_v (log p_v + entropy)                                                     (6)
    dL/ds_v = dL/dz_v (1 - tanh²(s_v / c)) / τ                                                                   (7)

`statistics` and `gradient_` are these lines in PyTorch. On a GPU PyTorch would read and write all the logits once per
operation, so there two Triton kernels take over, which read them once. They are written like PyTorch on a block of one
row: a *program* is one run of the function, all rows' programs run side by side, `tl.program_id(0)` says which row this
one has, and `tl.load(pointer + v, mask)` reads the elements v of the row into registers.

Shapes:  C rows (tokens), V logits of each: the whole vocabulary, or for the gradient a piece of it. Rows may be wider,
W columns: tensor cores and 16-byte loads want multiples, and a vocabulary need not be one. What stands in the columns
beyond V does not count, and its gradient is 0.
"""

from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without Triton
    triton = None

BLOCK = 4096  # logits of one row that a program holds in registers


class Transform(NamedTuple):
    """How raw logits s become z, equation (2)."""

    temperature: float = 1.0  # τ > 0
    softcap: float | None = None  # c > 0, or None for no soft-cap
    V: int | None = None  # how many columns of a row count; None for all


class Softmax(NamedTuple):
    """The two numbers of each row that its gradient needs beside the logits."""

    logsumexp: torch.Tensor  # (C,) equation (3), over the whole vocabulary
    entropy: torch.Tensor | None  # (C,) equation (5), or None where nobody asks for it


class Upstream(NamedTuple):
    """The gradient that comes in: of the loss by the two results of each row."""

    d_logprobs: torch.Tensor  # (C,) g
    d_entropy: torch.Tensor | None  # (C,) e, or None for 0


def statistics(logits, targets, transform, with_entropy=True):
    """Log-probability of the target, log-sum-exp and entropy of every row.

    Args:
        logits: (C, W) raw logits. targets: (C,) int64 in [0, V).
        transform: the Transform.
        with_entropy: False saves two passes over the logits where PyTorch computes it.

    Returns:
        logprobs (C,) in nats, in the dtype of the logits; and their Softmax.
    """
    if use_triton(logits):
        return _triton_statistics(logits, targets, transform)
    z = _transform(logits[:, : transform.V], transform)  # (2)
    logsumexp = z.logsumexp(dim=1)  # (3)
    target_z = z.gather(1, targets[:, None])[:, 0]
    logprobs = target_z - logsumexp  # (4)
    if not with_entropy:
        return logprobs, Softmax(logsumexp, None)
    log_p = z - logsumexp[:, None]
    terms = log_p.exp().mul_(log_p)
    entropy = -terms.sum(dim=1)  # (5)
    return logprobs, Softmax(logsumexp, entropy)


def gradient_(logits, targets, softmax, upstream, transform, dtype=None):
    """dL/d logits, in the memory of the logits, which are lost.

    Args:
        logits: (C, W) raw logits, contiguous: the whole vocabulary or a piece of it.
        targets: (C,) int64, counted from the first logit given; outside [0, V) for a target in another piece.
        softmax: the Softmax of the whole rows; its entropy may be None if upstream.d_entropy is.
        upstream: the Upstream.
        transform: the Transform, as for `statistics`.
        dtype: of the result; default that of the logits.

    Returns:
        (C, W) gradient. By Triton in 16 bits a row begins where the row of logits began: its stride is 2 W elements.
    """
    dtype = dtype or logits.dtype
    V = transform.V or logits.shape[1]
    if use_triton(logits):
        return _triton_gradient_(logits, targets, softmax, upstream, transform, dtype)
    z = _transform(logits, transform)  # (2)
    slope = _slope(z, transform)  # before z is written over
    d_z = _gradient_by_z_(z, softmax, upstream)
    # The 1[v = y] of (6), where the target is in this piece.
    inside = (targets >= 0) & (targets < V)
    row = inside.nonzero()[:, 0]
    d_z[row, targets[row]] += upstream.d_logprobs[row]
    d_s = d_z.mul_(slope)  # (7)
    d_s[:, V:] = 0
    return d_s.to(dtype)


def _slope(z, transform):
    """The factor (1 - tanh²(s / c)) / τ of equation (7): (C, V), or without a soft-cap a number."""
    if transform.softcap is None:
        return 1 / transform.temperature
    tanh = z * (transform.temperature / transform.softcap)
    square = tanh.square_()
    slope = square.neg_().add_(1)
    return slope.div_(transform.temperature)


def _gradient_by_z_(z, softmax, upstream):
    """Equation (6) as if no element were the target: -p (g + e (log p + entropy)), in the memory of z."""
    g = upstream.d_logprobs[:, None]
    log_p = z.sub_(softmax.logsumexp[:, None])
    if upstream.d_entropy is None:
        p = log_p.exp_()
        return p.mul_(-g)
    e = upstream.d_entropy[:, None]
    factor = log_p + softmax.entropy[:, None]
    factor.mul_(e)
    factor.add_(g)
    factor.neg_()
    p = log_p.exp_()
    return p.mul_(factor)


def _transform(logits, transform):
    """z by equation (2); the logits themselves where there is nothing to do."""
    z = logits
    if transform.softcap is not None:
        z = torch.tanh(logits / transform.softcap)
        z.mul_(transform.softcap)
    if transform.temperature != 1:
        z = z / transform.temperature
    return z


def use_triton(logits):
    """Whether the Triton kernels take these logits; PyTorch takes all others (CPU, float64, no Triton)."""
    return triton is not None and logits.is_cuda and logits.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- Triton


def _triton_statistics(logits, targets, transform):
    """`statistics` by one program for each row."""
    C, W = logits.shape
    logprobs, logsumexp, entropy = torch.empty(3, C, dtype=logits.dtype, device=logits.device)
    _statistics_kernel[(C,)](
        logits,
        logits.stride(0),
        targets,
        logprobs,
        logsumexp,
        entropy,
        transform.V or W,
        W,
        transform.temperature,
        transform.softcap or 0.0,
        HAS_SOFTCAP=transform.softcap is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return logprobs, Softmax(logsumexp, entropy)


def _triton_gradient_(logits, targets, softmax, upstream, transform, dtype):
    """`gradient_` by one program for each row."""
    C, W = logits.shape
    gradient = logits.view(dtype)[:, :W]  # in 16 bits: the first half of each row's bytes
    entropy = softmax.entropy
    d_entropy = upstream.d_entropy
    if d_entropy is None:  # with e = 0 equation (6) has no second term
        d_entropy = torch.zeros_like(softmax.logsumexp)
        entropy = d_entropy
    _gradient_kernel[(C,)](
        logits,
        logits.stride(0),
        gradient,
        gradient.stride(0),
        targets,
        softmax.logsumexp,
        entropy,
        upstream.d_logprobs,
        d_entropy,
        transform.V or W,
        W,
        transform.temperature,
        transform.softcap or 0.0,
        HAS_SOFTCAP=transform.softcap is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return gradient


if triton is not None:

    @triton.jit
    def _load_z(pointer, mask, temperature, softcap, HAS_SOFTCAP: tl.constexpr):
        """z by equation (2), and tanh(s / c) (0 without a soft-cap), of the raw logits at `pointer`."""
        z = tl.load(pointer, mask, other=0.0)
        tanh = tl.zeros_like(z)
        if HAS_SOFTCAP:
            tanh = 2 * tl.sigmoid(2 * z / softcap) - 1
            z = softcap * tanh
        return z / temperature, tanh

    @triton.jit
    def _statistics_kernel(
        logits, stride, targets, logprobs, logsumexp, entropy, V, W, temperature, softcap,
        HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # A row does not fit into registers. Go through it once, keeping the largest z so far, m, and two sums
        # relative to it; when a block raises m to m', the terms of s shrink by e^(m - m') and those of a follow.
        row = tl.program_id(0).to(tl.int64)  # int64: row * stride passes 2^31
        row_logits = logits + row * stride
        m = -1e38  # not -inf, whose difference from itself is not a number
        s = 0.0  # Σ e^(z - m)
        a = 0.0  # Σ e^(z - m) (z - m)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z, _ = _load_z(row_logits + v, v < W, temperature, softcap, HAS_SOFTCAP)  # (2)
            z = tl.where(v < V, z, -1e38)
            new_m = tl.maximum(m, tl.max(z, axis=0))
            shrink = tl.exp(m - new_m)
            terms = tl.exp(z - new_m)
            a = shrink * (a + s * (m - new_m)) + tl.sum(terms * (z - new_m), axis=0)
            s = shrink * s + tl.sum(terms, axis=0)
            m = new_m
        y = tl.load(targets + row)
        target_z, _ = _load_z(row_logits + y, True, temperature, softcap, HAS_SOFTCAP)
        tl.store(logsumexp + row, m + tl.log(s))  # (3)
        tl.store(logprobs + row, target_z - m - tl.log(s))  # (4)
        tl.store(entropy + row, tl.log(s) - a / s)  # (5), because log p = z - m - log s

    @triton.jit
    def _gradient_kernel(
        logits, stride, gradient, gradient_stride, targets, logsumexp, entropy, d_logprobs, d_entropy, V, W,
        temperature, softcap, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # Gradients are stored where the row's logits lay. In 16 bits, block k of the gradients covers logits of blocks
        # 0 to k only, which have been read: the program goes through its row from left to right.
        row = tl.program_id(0).to(tl.int64)
        row_logits = logits + row * stride
        row_gradient = gradient + row * gradient_stride
        y = tl.load(targets + row)
        lse = tl.load(logsumexp + row)
        ent = tl.load(entropy + row)
        g = tl.load(d_logprobs + row)
        e = tl.load(d_entropy + row)
        for start in range(0, W, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z, tanh = _load_z(row_logits + v, v < W, temperature, softcap, HAS_SOFTCAP)  # (2)
            tl.debug_barrier()  # all threads have read block k
            log_p = z - lse
            target_term = tl.where(v == y, g, 0.0)
            d_z = target_term - tl.exp(log_p) * (g + e * (log_p + ent))  # (6)
            d_s = d_z * (1 - tanh * tanh) / temperature  # (7)
            d_s = tl.where(v < V, d_s, 0.0)
            tl.store(row_gradient + v, d_s.to(gradient.dtype.element_ty), v < W)
