"""Two passes over rows of logits: the statistics of the softmax, and the gradient, written over the logits.

For one token with raw logits s (V,), target y, temperature τ and soft-cap c

    z = c tanh(s / c) / τ   (without a soft-cap z = s / τ)        logsumexp = log Σ_v exp z_v
    logprob = z_y - logsumexp       p = exp(z - logsumexp)        entropy = -Σ_v p_v log p_v

and, for a loss L with g = dL / d logprob and e = dL / d entropy,

    dL/dz_v = g (1[v = y] - p_v) - e p_v (log p_v + entropy)      dL/ds_v = dL/dz_v (1 - tanh²(s_v / c)) / τ

`statistics` and `gradient_` are these lines in PyTorch. On a GPU PyTorch would read and write all the logits once per
operation, so there two Triton kernels take over, which read them once. They are written like PyTorch on a block of one
row: a *program* is one run of the function, all rows' programs run side by side, `tl.program_id(0)` says which row this
one has, and `tl.load(pointer + v, mask)` reads the elements v of the row into registers.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without Triton
    triton = None

BLOCK = 4096  # logits of one row that a program holds in registers


def statistics(logits, targets, temperature=1.0, softcap=None, with_entropy=True):
    """Log-probability of the target, log-sum-exp and entropy of every row.

    Args:
        logits: (C, V) raw logits. targets: (C,) int64 in [0, V).
        temperature: > 0. softcap: > 0 or None.
        with_entropy: False saves two passes over the logits where PyTorch computes it.

    Returns:
        logprobs, logsumexp, entropy: (C,) each, in nats, in the dtype of the logits (entropy None without entropy).
    """
    if use_triton(logits):
        return _triton_statistics(logits, targets, temperature, softcap)
    z = _transform(logits, temperature, softcap)
    logsumexp = z.logsumexp(dim=1)
    logprobs = z.gather(1, targets[:, None])[:, 0] - logsumexp
    if not with_entropy:
        return logprobs, logsumexp, None
    logp = z - logsumexp[:, None]
    return logprobs, logsumexp, -logp.exp().mul_(logp).sum(dim=1)


def gradient_(logits, targets, logsumexp, entropy, d_logprobs, d_entropy, temperature=1.0, softcap=None, dtype=None):
    """dL/d logits, in the memory of the logits, which are lost.

    Args:
        logits: (C, V) raw logits, contiguous: the whole vocabulary or a piece of it.
        targets: (C,) int64, counted from the first logit given; outside [0, V) for a target in another piece.
        logsumexp: (C,), over the whole vocabulary. entropy: (C,), or None if d_entropy is None.
        d_logprobs: (C,) dL/d logprob. d_entropy: (C,) dL/d entropy, or None for 0.
        temperature, softcap: as for `statistics`.
        dtype: of the result; default that of the logits.

    Returns:
        (C, V) gradient. With a smaller dtype than the logits' its rows are V apart in bytes of theirs, not contiguous.
    """
    dtype = dtype or logits.dtype
    if use_triton(logits):
        return _triton_gradient_(
            logits, targets, logsumexp, entropy, d_logprobs, d_entropy, temperature, softcap, dtype
        )
    z = _transform(logits, temperature, softcap)
    slope = 1 if softcap is None else 1 - (z * (temperature / softcap)) ** 2
    logp = z.sub_(logsumexp[:, None])
    if d_entropy is None:
        d_z = logp.exp_().mul_(-d_logprobs[:, None])
    else:
        factor = (logp + entropy[:, None]).mul_(d_entropy[:, None]).add_(d_logprobs[:, None])
        d_z = logp.exp_().mul_(factor.neg_())
    row = ((targets >= 0) & (targets < logits.shape[1])).nonzero()[:, 0]
    d_z[row, targets[row]] += d_logprobs[row]
    return d_z.mul_(slope / temperature).to(dtype)


def _transform(logits, temperature, softcap):
    """z of the module's docstring; the logits themselves where there is nothing to do."""
    z = logits if softcap is None else torch.tanh(logits / softcap).mul_(softcap)
    return z if temperature == 1 else z / temperature


def use_triton(logits):
    """Whether the Triton kernels take these logits; PyTorch takes all others (CPU, float64, no Triton)."""
    return triton is not None and logits.is_cuda and logits.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- Triton


def _triton_statistics(logits, targets, temperature, softcap):
    C, V = logits.shape
    logprobs, logsumexp, entropy = torch.empty(3, C, dtype=logits.dtype, device=logits.device)
    _statistics_kernel[(C,)](
        logits, logits.stride(0), targets, logprobs, logsumexp, entropy, V, temperature, softcap or 0.0,
        HAS_SOFTCAP=softcap is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return logprobs, logsumexp, entropy


def _triton_gradient_(logits, targets, logsumexp, entropy, d_logprobs, d_entropy, temperature, softcap, dtype):
    C, V = logits.shape
    gradient = logits.view(dtype)[:, :V]  # in 16 bits: the first half of each row's bytes
    zeros = torch.zeros_like(logsumexp) if d_entropy is None else None
    _gradient_kernel[(C,)](
        logits, logits.stride(0), gradient, gradient.stride(0), targets, logsumexp,
        zeros if d_entropy is None else entropy, d_logprobs, zeros if d_entropy is None else d_entropy, V,
        temperature, softcap or 0.0, HAS_SOFTCAP=softcap is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return gradient


if triton is not None:

    @triton.jit
    def _load_z(pointer, mask, temperature, softcap, HAS_SOFTCAP: tl.constexpr):
        """z, and tanh(s / c) (0 without a soft-cap), of the raw logits at `pointer`."""
        z = tl.load(pointer, mask, other=0.0)
        tanh = tl.zeros_like(z)
        if HAS_SOFTCAP:
            tanh = 2 * tl.sigmoid(2 * z / softcap) - 1
            z = softcap * tanh
        return z / temperature, tanh

    @triton.jit
    def _statistics_kernel(
        logits, stride, targets, logprobs, logsumexp, entropy, V, temperature, softcap,
        HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # A row does not fit into registers. Go through it once, keeping the largest z so far, m, and two sums
        # relative to it; when a block raises m to m', the terms of s shrink by e^(m - m') and those of a follow.
        row = tl.program_id(0).to(tl.int64)  # int64: row * stride passes 2^31
        m = -1e38  # not -inf, whose difference from itself is not a number
        s = 0.0  # Σ e^(z - m)
        a = 0.0  # Σ e^(z - m) (z - m)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z, _ = _load_z(logits + row * stride + v, v < V, temperature, softcap, HAS_SOFTCAP)
            new_m = tl.maximum(m, tl.max(tl.where(v < V, z, -1e38), axis=0))
            shrink = tl.exp(m - new_m)
            terms = tl.where(v < V, tl.exp(z - new_m), 0.0)
            a = shrink * (a + s * (m - new_m)) + tl.sum(terms * (z - new_m), axis=0)
            s = shrink * s + tl.sum(terms, axis=0)
            m = new_m
        target_z, _ = _load_z(logits + row * stride + tl.load(targets + row), True, temperature, softcap, HAS_SOFTCAP)
        tl.store(logsumexp + row, m + tl.log(s))
        tl.store(logprobs + row, target_z - m - tl.log(s))
        tl.store(entropy + row, tl.log(s) - a / s)  # -Σ p log p with log p = z - m - log s

    @triton.jit
    def _gradient_kernel(
        logits, stride, gradient, gradient_stride, targets, logsumexp, entropy, d_logprobs, d_entropy, V,
        temperature, softcap, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # Gradients are stored where the row's logits lay. In 16 bits, block k of the gradients covers logits of blocks
        # 0 to k only, which have been read: the program goes through its row from left to right.
        row = tl.program_id(0).to(tl.int64)
        y = tl.load(targets + row)
        lse = tl.load(logsumexp + row)
        ent = tl.load(entropy + row)
        g = tl.load(d_logprobs + row)
        e = tl.load(d_entropy + row)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z, tanh = _load_z(logits + row * stride + v, v < V, temperature, softcap, HAS_SOFTCAP)
            tl.debug_barrier()  # all threads have read block k
            logp = z - lse
            d_z = tl.where(v == y, g, 0.0) - tl.exp(logp) * (g + e * (logp + ent))
            d_s = d_z * (1 - tanh * tanh) / temperature
            tl.store(gradient + row * gradient_stride + v, d_s.to(gradient.dtype.element_ty), v < V)
