"""Attention over packed sequences, registered with transformers.

A microbatch is one row of T tokens that holds S sequences end to end; `cu_seqlens` (S+1,) holds where each begins, and
T. For the query q_i, keys k_j and values v_j of one head of size D

    score_ij = scaling q_i · k_j                             scaling is D^-½ unless the model says otherwise     (1)
    score_ij ← c tanh(score_ij / c)                          only in models with a soft-cap c (Gemma 2)          (2)
    i may look at j when both are in the same sequence, j ≤ i and, in a layer with a sliding window W, i - j < W (3)
    output_i = Σ_j softmax_j(score_ij) v_j                   over the j that i may look at                       (4)

There is no padding and no mask tensor from outside. Importing this module registers, for any unmodified transformers
model (`attn_implementation=...`, the scripts' `--attn`):

    packed         variable-length flash attention inside PyTorch on CUDA where it can, otherwise `packed_loop`
    packed_fa      the flash-attn package, when installed; the only fast one for models with a score soft-cap (Gemma 2)
    packed_loop    scaled_dot_product_attention on each sequence: the definition, on any device in any precision

transformers hands a registered function no mask; `cu_seq_lens_q` and `max_length_q` reach it because the scripts pass
them to the model's forward.

Shapes:  T tokens, S sequences, Hq and Hkv heads of queries and of keys and values, D head size; in `packed_loop`
n neighbouring sequences of one length L.
"""

import inspect
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

# Fewer heads of keys and values than of queries: the kernel always could, torch 2.11 has no flag that it asks for.
HAS_GQA_FLAG = "enable_gqa" in inspect.signature(varlen_attn).parameters
GQA = {"enable_gqa": True} if HAS_GQA_FLAG else {}


class Options(NamedTuple):
    """What a layer says about its attention, beside its queries, keys and values."""

    scaling: float | None = None  # factor of (1); None means D ** -0.5
    dropout: float = 0.0  # probability of dropping an attention weight of (4)
    window: int | None = None  # W of (3), or None for full causal attention
    softcap: float | None = None  # c of (2), or None


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask=None,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    cu_seq_lens_q=None,
    max_length_q=None,
    softcap=None,
    **kwargs,
):
    """Causal attention within each packed sequence; the fastest exact implementation for the tensors given.

    Args:
        module: the calling attention layer (unused; part of the transformers interface).
        query: (1, Hq, T, D). key, value: (1, Hkv, T, D), with Hq a multiple of Hkv (grouped queries).
        attention_mask: must be None.
        scaling: factor on the scores; None means D ** -0.5.
        dropout: probability of dropping an attention weight; `packed` on CUDA supports 0 only.
        sliding_window: W, or None for full causal attention.
        cu_seq_lens_q: (S+1,) int32, first token of each sequence and T. max_length_q: longest sequence, in tokens.
        softcap: c, to make scores c tanh(score / c), or None.

    Returns:
        (output (1, T, Hq, D), None), as transformers expects.

    Raises:
        ValueError: sequence boundaries missing, a mask given, or a feature (sinks, position bias, on CUDA dropout)
            that would otherwise be ignored.
    """
    _check("packed", query, attention_mask, cu_seq_lens_q, kwargs)
    options = Options(scaling, dropout, sliding_window, softcap)
    if query.is_cuda and _flash_takes(query.dtype, query.shape[3], softcap):
        output = _varlen(query, key, value, cu_seq_lens_q, max_length_q, options)
    else:
        output = _loop(query, key, value, cu_seq_lens_q, options)
    return output, None


def packed_attention_loop(
    module,
    query,
    key,
    value,
    attention_mask=None,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    cu_seq_lens_q=None,
    max_length_q=None,
    softcap=None,
    **kwargs,
):
    """`packed_attention` by its definition, one sequence at a time. Same arguments, result and errors."""
    _check("packed_loop", query, attention_mask, cu_seq_lens_q, kwargs)
    options = Options(scaling, dropout, sliding_window, softcap)
    return _loop(query, key, value, cu_seq_lens_q, options), None


def packed_attention_fa(
    module,
    query,
    key,
    value,
    attention_mask=None,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    cu_seq_lens_q=None,
    max_length_q=None,
    softcap=None,
    **kwargs,
):
    """`packed_attention` by the flash-attn package. Same arguments, result and errors.

    Raises:
        ImportError: flash-attn is not installed.
    """
    from flash_attn import flash_attn_varlen_func

    _check("packed_fa", query, attention_mask, cu_seq_lens_q, kwargs)
    window = (-1, -1)  # tokens seen before and after one's own; -1: all
    if sliding_window is not None:
        window = (sliding_window - 1, 0)
    output = flash_attn_varlen_func(
        _tokens_first(query),
        _tokens_first(key),
        _tokens_first(value),
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=window,
        softcap=softcap or 0.0,
    )
    return output[None], None  # (1, T, Hq, D)


def _check(name, query, attention_mask, cu_seqlens, kwargs):
    """Raises ValueError for what attention over packed sequences cannot do, or would silently do without."""
    if cu_seqlens is None:
        raise ValueError("packed attention needs the sequence boundaries: pass cu_seq_lens_q to the model's forward")
    if attention_mask is not None or query.shape[0] != 1:
        raise ValueError(f"packed attention takes one packed row and no mask, got {query.shape[0]} rows")
    for feature in ("s_aux", "position_bias"):
        if kwargs.get(feature) is not None:
            raise ValueError(f"this model's attention uses {feature}, which {name} does not implement")


def _flash_takes(dtype, head_size, softcap):
    """Whether PyTorch's flash attention computes this: in 16 bits, without a soft-cap, and it has a kernel for D."""
    return dtype in (torch.bfloat16, torch.float16) and head_size % 8 == 0 and head_size <= 256 and softcap is None


def _tokens_first(x):
    """(1, heads, T, D) → (T, heads, D), a view."""
    return x.squeeze(0).transpose(0, 1)


def _varlen(query, key, value, cu_seqlens, max_length, options):
    """PyTorch's own flash attention for packed sequences: (1) to (4) in one kernel."""
    if options.dropout:
        raise ValueError("--attn packed has no attention dropout on CUDA: use --attn packed_fa, or attention_dropout 0")
    window = (-1, 0)  # tokens seen before and after one's own; -1: all
    if options.window is not None:
        window = (options.window - 1, 0)
    output = varlen_attn(
        _tokens_first(query),
        _tokens_first(key),
        _tokens_first(value),
        cu_seqlens,
        cu_seqlens,
        max_length,
        max_length,
        scale=options.scaling,
        window_size=window,
        **GQA,
    )
    return output[None]  # (1, T, Hq, D)


@torch.compiler.disable  # the boundaries become Python integers
def _loop(query, key, value, cu_seqlens, options):
    """The definition, on any device: each sequence by itself, like its neighbours of the same length."""
    # Neighbours of one length go together: many short sequences cost few calls (`common.deal` sorts by length).
    lengths = cu_seqlens.diff().tolist()
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    sizes = [length * n for length, n in runs]  # tokens of each run
    queries = query[0].split(sizes, dim=1)  # each (Hq, n·L, D)
    keys = key[0].split(sizes, dim=1)  # each (Hkv, n·L, D)
    values = value[0].split(sizes, dim=1)
    outputs = []
    for (length, n), q, k, v in zip(runs, queries, keys, values, strict=True):
        q, k, v = (x.unflatten(1, (n, length)).transpose(0, 1) for x in (q, k, v))  # (n, heads, L, D)
        mask = _mask(length, options, q.device)
        if options.softcap is None:
            output = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=options.scaling,
                dropout_p=options.dropout,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        else:
            output = _softcapped(q, k, v, mask, options)
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # (n·L, Hq, D)
    return torch.cat(outputs)[None]  # (1, T, Hq, D)


def _mask(length, options, device):
    """(L, L) bool, equation (3) within one sequence; None where scaled_dot_product_attention can be told: causal."""
    window = length  # of a shorter sequence every token is within the window
    if options.window is not None and length > options.window:
        window = options.window
    elif options.softcap is None:
        return None
    j = torch.arange(length, device=device)
    i = j[:, None]
    return (i >= j) & (i - j < window)


def _softcapped(q, k, v, mask, options):
    """scaled_dot_product_attention has no soft-cap: by hand, with all the scores in memory."""
    scaling = options.scaling or q.shape[3] ** -0.5
    group = q.shape[1] // k.shape[1]  # heads of queries for each head of keys and values
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(2, 3) * scaling  # (n, Hq, L, L) (1)
    scores = options.softcap * torch.tanh(scores / options.softcap)  # (2)
    scores = scores.masked_fill(~mask, -torch.inf)  # (3)
    weights = scores.softmax(dim=3, dtype=torch.promote_types(q.dtype, torch.float32))
    return F.dropout(weights.to(q.dtype), options.dropout) @ v  # (4)


AttentionInterface.register("packed", packed_attention)
AttentionInterface.register("packed_loop", packed_attention_loop)
AttentionInterface.register("packed_fa", packed_attention_fa)
