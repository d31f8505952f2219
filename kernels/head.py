"""The language-model head without its logits: cross-entropy and log-probabilities from hidden states.

For a trained token t with hidden state h (H,), head W (V, H), target y and temperature τ (1 for cross-entropy)

    z = W h / τ            logsumexp = log Σ_v exp z_v            logprob = z_y - logsumexp
    p = exp(z - logsumexp)                                        entropy = logsumexp - Σ_v p_v z_v

    d logprob / d z = onehot(y) - p                               d entropy / d z_v = -p_v (z_v - Σ_u p_u z_u)

z has T·V numbers, 8 GB in float32 for 16,384 tokens and a vocabulary of 128k, so it is made CHUNK tokens at a time and
thrown away. `linear_cross_entropy` makes its gradient in the same pass (three matrix products in all);
`linear_logprobs`, whose incoming gradient is not known yet, makes z again in the backward (four). Tokens with target
-100 are taken out before the first product. Logits are float32 whatever the operands are: rounding them to bf16 moves
the probability ratios of RL by more than 1 %.
"""

import torch

CHUNK = 4096  # tokens whose logits exist at one time
IGNORE = -100  # target of a token that is not trained on


def linear_cross_entropy(hidden, weight, targets):
    """Summed cross-entropy of `targets` under softmax(hidden @ weight.T).

    Args:
        hidden: (T, H) states; position t predicts targets[t].
        weight: (V, H) output head, same dtype and device.
        targets: (T,) int64 token ids, or -100 where nothing is predicted (contributes 0 and costs nothing).

    Returns:
        () loss, summed (not averaged) over the trained tokens, in float32 (float64 for float64 operands).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or a target is outside [0, V).
    """
    _check(hidden, weight, targets)
    if not torch.is_grad_enabled():  # an autograd.Function does not see no_grad, and would make the gradient
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets)


def linear_logprobs(hidden, weight, targets, temperature=1.0):
    """Log-probability of `targets`, and the entropy, under softmax(hidden @ weight.T / temperature).

    Args:
        hidden: (T, H) states; position t predicts targets[t].
        weight: (V, H) output head, same dtype and device.
        targets: (T,) int64 token ids, or -100 where nothing is predicted (returns 0 there and costs nothing).
        temperature: > 0, divides the logits.

    Returns:
        logprobs (T,) and entropy (T,) in nats, float32 (float64 for float64 operands). Both are differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, a target is outside [0, V), or temperature <= 0.
    """
    _check(hidden, weight, targets)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return _LinearLogprobs.apply(hidden, weight, targets, float(temperature))


def _check(hidden, weight, targets):
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden (T, H), weight (V, H), got {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"expected int64 targets ({len(hidden)},), got {targets.dtype} {tuple(targets.shape)}")
    if hidden.dtype != weight.dtype or len({x.device for x in (hidden, weight, targets)}) > 1:
        raise ValueError("hidden and weight must share a dtype, and all three a device")
    if not targets.is_cuda:  # on CUDA the check would wait for the device at every call
        bad = targets[(targets != IGNORE) & ((targets < 0) | (targets >= len(weight)))]
        if bad.numel():
            raise ValueError(f"target {bad[0].item()} is outside the vocabulary of {len(weight)}")


def _matmul(a, b):
    """a @ b with at least float32 accuracy in the result; 16-bit operands stay 16-bit on CUDA."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    if a.dtype != dtype and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        rows = (targets != IGNORE).nonzero()[:, 0]  # the N trained tokens
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=accumulate, device=hidden.device)
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None  # (T, H)
        d_weight = torch.zeros_like(weight, dtype=accumulate) if ctx.needs_input_grad[1] else None  # (V, H)
        for chunk in rows.split(CHUNK):
            h, y = hidden[chunk], targets[chunk]  # (C, H), (C,)
            logits = _matmul(h, weight.T)  # (C, V)
            logsumexp = logits.logsumexp(dim=1)
            loss += (logsumexp - logits.gather(1, y[:, None])[:, 0]).sum()
            if not any(ctx.needs_input_grad):
                continue
            d_logits = logits.sub_(logsumexp[:, None]).exp_()  # p, then p - onehot(y), in the memory of the logits
            d_logits[torch.arange(len(y), device=y.device), y] -= 1
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[chunk] = d_logits @ weight
            if d_weight is not None:
                d_weight += _matmul(d_logits.T, h)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.saved_tensors
        d_hidden = None if d_hidden is None else d_hidden * d_loss.to(d_hidden.dtype)
        d_weight = None if d_weight is None else (d_weight * d_loss).to(ctx.weight_dtype)
        return d_hidden, d_weight, None


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        rows = (targets != IGNORE).nonzero()[:, 0]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, logsumexps = (torch.zeros(len(hidden), dtype=dtype, device=hidden.device) for _ in range(3))
        for chunk in rows.split(CHUNK):
            logits = _matmul(hidden[chunk], weight.T).div_(temperature)  # (C, V)
            logsumexp = logits.logsumexp(dim=1)
            logprobs[chunk] = logits.gather(1, targets[chunk, None])[:, 0] - logsumexp
            entropy[chunk] = logsumexp - ((logits - logsumexp[:, None]).exp_() * logits).sum(dim=1)
            logsumexps[chunk] = logsumexp
        ctx.save_for_backward(hidden, weight, targets, rows, logsumexps, entropy)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    def backward(ctx, d_logprobs, d_entropy):
        hidden, weight, targets, rows, logsumexps, entropy = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=entropy.dtype) if ctx.needs_input_grad[1] else None
        for chunk in rows.split(CHUNK):
            h, y, logsumexp = hidden[chunk], targets[chunk], logsumexps[chunk, None]
            logp = _matmul(h, weight.T).div_(ctx.temperature).sub_(logsumexp)  # (C, V) log p
            # Σ p z = logsumexp - entropy, so -p (z - Σ p z) = -p (log p + entropy)
            d_logits = -logp.exp() * (d_logprobs[chunk, None] + d_entropy[chunk, None] * (logp + entropy[chunk, None]))
            d_logits[torch.arange(len(y), device=y.device), y] += d_logprobs[chunk]
            d_logits = d_logits.div_(ctx.temperature).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[chunk] = d_logits @ weight
            if d_weight is not None:
                d_weight += _matmul(d_logits.T, h)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None
