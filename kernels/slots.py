"""Attention of sequences that are being decoded: keys and values in slots, one row of a buffer for each sequence.

A slot holds the keys and values of one sequence of up to L tokens; the sequence stands at a position of its own. A
decode step brings one new token for each of the first n slots, stores its key and value, and attends to all tokens up
to it (with a sliding window W, to the last W). On CUDA a Triton kernel reads each slot up to its own position and no
further; elsewhere scaled_dot_product_attention with a mask reads all slots up to the longest sequence.

Models of transformers are used as they are. They get `Slots` for their cache and call its `update`, which leaves keys
and values alone; the attention function registered under the name `slots` stores them in buffers that belong to the
calling layer (so a compiled layer needs to know nothing of its number, and is compiled once for all layers).

Shapes:  B slots, n the first of them that are in use, L positions of a slot, D head size, T tokens in one call,
Hq and Hkv heads of queries and of keys and values, G = Hq / Hkv, K parts of a sequence.
"""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from kernels.attention import _softcapped, packed_attention

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without Triton
    triton = None

BLOCK = 64  # positions that a program looks at in one go
PROGRAMS = 512  # what a GPU of some 130 multiprocessors needs at a time to be kept busy


class Slots:
    """Passes for a transformers cache (`past_key_values`), and tells the attention function what it should do.

    Models call `update` only: positions are given to them, and a registered attention function gets no mask. One that
    asks a cache for more fails, rather than work with a wrong answer.
    """

    def __init__(self, count, length):
        self.count, self.length = count, length
        self.layers = []  # attention modules; each has its `slot_keys` and `slot_values`, (B, Hkv, L, D)

    def begin(self, rows, positions, reach=None):
        """Before each forward pass.

        Args:
            rows: (T,) slot of each token. positions: (T,) where it stands there.
            reach: no sequence goes beyond so many positions; None while packed sequences are prefilled.
        """
        self.rows, self.positions, self.reach, self.masks = rows, positions, reach, {}

    def update(self, key, value, layer, *args, **kwargs):
        """What transformers calls; keys and values are stored by `slot_attention`, which knows the calling module."""
        return key, value

    def store(self, module, key, value):
        """Keeps what a layer computed, (1, Hkv, T, D) or (T, Hkv, 1, D). Returns its buffers."""
        if not hasattr(module, "slot_keys"):
            shape = self.count, key.shape[1], self.length, key.shape[3]
            module.slot_keys, module.slot_values = key.new_zeros(shape), value.new_zeros(shape)
            self.layers.append(module)
        for buffer, new in ((module.slot_keys, key), (module.slot_values, value)):
            buffer[self.rows, :, self.positions] = new.transpose(1, 2).flatten(0, 1)
        return module.slot_keys, module.slot_values

    def mask(self, window):
        """(n, 1, 1, reach) bool: what each sequence may look at. Made once a step for all layers of a kind."""
        if window not in self.masks:
            j, i = torch.arange(self.reach, device=self.positions.device), self.positions[:, None]
            self.masks[window] = ((j <= i) if window is None else (j <= i) & (i - j < window))[:, None, None]
        return self.masks[window]

    def allocate(self, device):
        """Puts the buffers on a device, instead of wherever the first forward pass has made them."""
        for module in self.layers:
            module.slot_keys, module.slot_values = (
                torch.zeros_like(x, device=device) for x in (module.slot_keys, module.slot_values)
            )

    def buffers(self):
        return [buffer for module in self.layers for buffer in (module.slot_keys, module.slot_values)]

    def copy(self, sources, targets, length):
        """The first `length` positions of some slots to others, all at once."""
        for buffer in self.buffers():
            buffer[targets, :, :length] = buffer[sources, :, :length]


def slot_attention(
    module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
    slots=None, **kwargs,
):
    """Attention of one token of each sequence to its slot, or within packed sequences while they are prefilled.

    Args:
        query: (n, Hq, 1, D). key, value: (n, Hkv, 1, D), of the same tokens; while prefilling (1, heads, T, D).
        slots: the `Slots`.
        The others as for `kernels.attention.packed_attention`.

    Returns:
        (output (n, 1, Hq, D), None), as transformers expects.

    Raises:
        ValueError: a feature (sinks, position bias) that would otherwise be ignored.
    """
    if any(kwargs.get(feature) is not None for feature in ("s_aux", "position_bias")):
        raise ValueError("this model's attention uses sinks or a position bias, which the sampler does not implement")
    keys, values = slots.store(module, key, value)
    if slots.reach is None:
        return packed_attention(
            module, query, key, value, attention_mask, scaling, dropout, sliding_window, softcap=softcap, **kwargs
        )
    n, heads, _, D = query.shape
    scaling = D**-0.5 if scaling is None else scaling
    if use_triton(query):
        output = triton_attention(query[:, :, 0], keys, values, slots.positions, scaling, sliding_window, softcap)
        return output[:, None], None
    query = query.reshape(n, key.shape[1], -1, D)  # the heads that share keys and values: as queries of one head
    keys, values, mask = keys[:n, :, : slots.reach], values[:n, :, : slots.reach], slots.mask(sliding_window)
    if softcap is None:
        output = F.scaled_dot_product_attention(query, keys, values, mask, scale=scaling)
    else:
        output = _softcapped(query, keys, values, mask, scaling, 0.0, softcap)
    return output.reshape(n, 1, heads, D), None


AttentionInterface.register("slots", slot_attention)


# ---------------------------------------------------------------------------------------------------------- Triton


def use_triton(query):
    """Whether the kernel takes this; masked attention in PyTorch takes all else."""
    return triton is not None and query.is_cuda


def triton_attention(query, keys, values, positions, scaling, window=None, softcap=None):
    """The kernel below, and the sum over parts.

    Args:
        query: (n, Hq, D). keys, values: (B, Hkv, L, D). positions: (n,) int64, last position that is looked at.

    Returns:
        (n, Hq, D).
    """
    partial, logsumexp = _partial_attention(
        query, keys, values, positions, scaling, window or keys.shape[2], softcap or 0.0
    )
    weights = logsumexp.softmax(dim=2)[..., None]  # (n, Hq, K, 1)
    return (partial * weights).sum(dim=2).to(query.dtype)


def _empty_outputs(query, keys):
    """What the operator below fills; here it is decided into how many parts K a sequence is cut."""
    n, Hq, D = query.shape
    K = max(1, min(32, PROGRAMS // (n * keys.shape[1])))
    options = {"dtype": torch.float32, "device": query.device}
    return torch.empty(n, Hq, K, D, **options), torch.empty(n, Hq, K, **options)


@torch.library.custom_op("postcard::partial_attention", mutates_args=())
def _partial_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, scaling: float, window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention to each of K parts of what a sequence looks at: outputs (n, Hq, K, D), logsumexp of scores (n, Hq, K).

    Few sequences with few heads would leave most of a GPU idle; so a sequence is cut into parts, which are weighted
    afterwards by their share of the softmax ("flash decoding", Dao et al. 2023).
    """
    partial, logsumexp = _empty_outputs(query, keys)
    n, Hq, K, D = partial.shape
    Hkv, query = keys.shape[1], query.contiguous()
    _attention_kernel[n, Hkv, K](
        query, keys, values, positions, partial, logsumexp, keys.stride(0), keys.stride(1), scaling, window, softcap,
        Hq // Hkv, D, K, HAS_SOFTCAP=softcap > 0, BLOCK_G=max(16, triton.next_power_of_2(Hq // Hkv)),
        BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK=BLOCK, EXACT=query.dtype == torch.float32, num_warps=4,
        num_stages=3,
    )  # fmt: skip
    return partial, logsumexp


@_partial_attention.register_fake
def _(query, keys, values, positions, scaling, window, softcap):
    return _empty_outputs(query, keys)


if triton is not None:

    @triton.jit
    def _attention_kernel(
        query, keys, values, positions, partial, logsumexp, slot_stride, head_stride, scaling, window, softcap, G, D, K,
        HAS_SOFTCAP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
        EXACT: tl.constexpr,
    ):  # fmt: skip
        # One program: one sequence, one head of keys and values with its G queries, one part of the positions.
        slot, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        precision: tl.constexpr = "ieee" if EXACT else "tf32"  # of float32 products
        end = tl.load(positions + slot).to(tl.int32) + 1
        begin = tl.maximum(end - window, 0)
        size = tl.cdiv(tl.cdiv(end - begin, K), BLOCK) * BLOCK  # of a part
        begin += part * size
        end = tl.minimum(begin + size, end)
        g, d, row = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), (slot * tl.num_programs(1) + head) * G
        q_mask = (g[:, None] < G) & (d[None, :] < D)
        q = tl.load(query + (row + g[:, None]) * D + d[None, :], q_mask, other=0.0)  # (G, D)
        base = slot.to(tl.int64) * slot_stride + head * head_stride
        m = tl.full([BLOCK_G], -1e38, tl.float32)  # largest score so far
        s = tl.zeros([BLOCK_G], tl.float32)  # Σ e^(score - m)
        out = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)  # Σ e^(score - m) value
        for start in range(begin, end, BLOCK):
            t = start + tl.arange(0, BLOCK)
            offsets, inside = base + t[:, None] * D + d[None, :], (t[:, None] < end) & (d[None, :] < D)
            k = tl.load(keys + offsets, inside, other=0.0)  # (BLOCK, D)
            scores = tl.dot(q, tl.trans(k), input_precision=precision) * scaling  # (G, BLOCK)
            if HAS_SOFTCAP:
                scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
            scores = tl.where(t[None, :] < end, scores, -1e38)
            new_m = tl.maximum(m, tl.max(scores, axis=1))
            p = tl.exp(scores - new_m[:, None])  # 0 beyond the end
            shrink = tl.exp(m - new_m)
            v = tl.load(values + offsets, inside, other=0.0)
            out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=precision)
            s = s * shrink + tl.sum(p, axis=1)
            m = new_m
        place, s = (row + g) * K + part, tl.maximum(s, 1e-37)  # a part may be empty: then m is -1e38, and its share 0
        tl.store(logsumexp + place, m + tl.log(s), g < G)
        tl.store(partial + place[:, None] * D + d[None, :], out / s[:, None], q_mask)
