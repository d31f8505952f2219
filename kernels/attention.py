"""Attention over packed sequences, registered with transformers.

A microbatch is one row of T tokens that holds S sequences end to end; `cu_seqlens` (S+1,) holds where each begins.
Token i may look at token j when both are in the same sequence, j <= i and, in a layer with a sliding window W,
i - j < W. There is no padding and no mask tensor. Importing this module registers, for any unmodified transformers
model (`attn_implementation=...`, the scripts' `--attn`):

    packed         variable-length flash attention inside PyTorch on CUDA in 16 bits, otherwise `packed_loop`
    packed_fa      the flash-attn package, when installed; the only fast one for models with a score soft-cap (Gemma 2)
    packed_loop    scaled_dot_product_attention on each sequence: the definition, on any device in any precision

transformers hands a registered function no mask; `cu_seq_lens_q` and `max_length_q` reach it because the scripts pass
them to the model's forward.
"""

import inspect
from itertools import groupby

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

# Fewer heads of keys and values than of queries: the kernel always could, torch 2.11 has no flag that it asks for.
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def packed_attention(
    module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, sliding_window=None,
    cu_seq_lens_q=None, max_length_q=None, softcap=None, **kwargs,
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
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and softcap is None:
        return _varlen(query, key, value, scaling, dropout, sliding_window, cu_seq_lens_q, max_length_q), None
    return _loop(query, key, value, scaling, dropout, sliding_window, cu_seq_lens_q, softcap), None


def packed_attention_loop(
    module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, sliding_window=None,
    cu_seq_lens_q=None, max_length_q=None, softcap=None, **kwargs,
):
    """`packed_attention` by its definition, one sequence at a time. Same arguments, result and errors."""
    _check("packed_loop", query, attention_mask, cu_seq_lens_q, kwargs)
    return _loop(query, key, value, scaling, dropout, sliding_window, cu_seq_lens_q, softcap), None


def packed_attention_fa(
    module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, sliding_window=None,
    cu_seq_lens_q=None, max_length_q=None, softcap=None, **kwargs,
):
    """`packed_attention` by the flash-attn package. Same arguments, result and errors.

    Raises:
        ImportError: flash-attn is not installed.
    """
    from flash_attn import flash_attn_varlen_func

    _check("packed_fa", query, attention_mask, cu_seq_lens_q, kwargs)
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
    output = flash_attn_varlen_func(
        query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, dropout_p=dropout,
        softmax_scale=scaling, causal=True, window_size=window, softcap=softcap or 0.0,
    )
    return output[None], None


def _check(name, query, attention_mask, cu_seqlens, kwargs):
    if cu_seqlens is None:
        raise ValueError("packed attention needs the sequence boundaries: pass cu_seq_lens_q to the model's forward")
    if attention_mask is not None or query.shape[0] != 1:
        raise ValueError(f"packed attention takes one packed row and no mask, got {query.shape[0]} rows")
    for feature in ("s_aux", "position_bias"):
        if kwargs.get(feature) is not None:
            raise ValueError(f"this model's attention uses {feature}, which {name} does not implement")


@torch.compiler.disable  # the boundaries become Python integers
def _loop(query, key, value, scaling, dropout, sliding_window, cu_seqlens, softcap):
    # Neighbours of one length go together: many short sequences cost few calls (`common.deal` sorts by length).
    runs = [(length, len(list(run))) for length, run in groupby(cu_seqlens.diff().tolist())]
    parts = zip(*(x[0].split([length * n for length, n in runs], dim=1) for x in (query, key, value)), strict=True)
    outputs = []
    for (length, n), tensors in zip(runs, parts, strict=True):
        q, k, v = (x.unflatten(1, (n, length)).transpose(0, 1) for x in tensors)  # (n, heads, L, D)
        windowed, mask = sliding_window is not None and length > sliding_window, None
        if windowed or softcap is not None:
            i = torch.arange(length, device=q.device)
            mask = (i[:, None] >= i) & (i[:, None] - i < (sliding_window if windowed else length))  # (L, L)
        if softcap is None:
            output = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, dropout_p=dropout,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        else:
            output = _softcapped(q, k, v, mask, scaling or q.shape[3] ** -0.5, dropout, softcap)
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # (n·L, Hq, D)
    return torch.cat(outputs)[None]  # (1, T, Hq, D)


def _softcapped(q, k, v, mask, scaling, dropout, softcap):
    """scaled_dot_product_attention has no soft-cap: by hand, with all the scores in memory."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scaling / softcap)  # (n, Hq, L, L)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=3, dtype=torch.promote_types(q.dtype, torch.float32))
    return F.dropout(weights.to(q.dtype), dropout) @ v


def _varlen(query, key, value, scaling, dropout, sliding_window, cu_seqlens, max_length):
    if dropout:
        raise ValueError("--attn packed has no attention dropout on CUDA: use --attn packed_fa, or attention_dropout 0")
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    output = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, max_length, max_length, scale=scaling, window_size=window, **GQA
    )
    return output[None]  # (1, T, Hq, D)


AttentionInterface.register("packed", packed_attention)
AttentionInterface.register("packed_loop", packed_attention_loop)
AttentionInterface.register("packed_fa", packed_attention_fa)
