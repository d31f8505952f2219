"""Attention of sequences that are being decoded: keys and values in slots, one row of a buffer for each sequence.

A slot holds the keys and values of one sequence of up to L tokens; the sequence stands at a position of its own. A
decode step brings one new token for each of the first n slots, stores its key and value, and attends to all tokens up
to it. A layer with a sliding window W looks at W tokens only, so its slot is a ring of R = min(L, W) places: position j
has place j mod R, and takes it from j - R. Other layers have R = L. For the query q of the token at position i, and the
keys k_j and values v_j of its slot,

    score_j = scaling q · k_j                                                                                    (1)
    score_j ← c tanh(score_j / c)                            only in models with a soft-cap c (Gemma 2)          (2)
    j is looked at when j ≤ i and, in a layer with a sliding window W, i - j < W                                 (3)
    output = Σ_j softmax_j(score_j) v_j                      over the j that are looked at                       (4)

On CUDA a Triton kernel reads each slot up to its own position and no further; elsewhere scaled_dot_product_attention
with a mask reads all slots up to the longest sequence.

Few sequences with few heads would leave most of a GPU idle; so the kernel cuts what a sequence looks at into K parts,
which are computed side by side and put together afterwards ("flash decoding", Dao et al. 2023). Part a has

    output_a = Σ_{j in a} e^(score_j - logsumexp_a) v_j      logsumexp_a = log Σ_{j in a} e^score_j              (5)

and its share of the whole softmax is e^logsumexp_a over the sum of these, so that

    output = Σ_a softmax_a(logsumexp_a) output_a                                                                 (6)

Models of transformers are used as they are. They get `Slots` for their cache and call its `update`, which leaves keys
and values alone; the attention function registered under the name `slots` stores them in buffers that belong to the
calling layer (so a compiled layer needs to know nothing of its number, and is compiled once for all layers).

Shapes:  B slots, n the first of them that are in use, L tokens of a sequence at most, R places of a layer's slot,
D head size, T tokens in one call, Hq and Hkv heads of queries and of keys and values, G = Hq / Hkv, K parts of a
sequence.
"""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from kernels.attention import Options, _softcapped, packed_attention

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without Triton
    triton = None

BLOCK = 64  # positions that a program looks at in one go
PROGRAMS = 512  # what a GPU of some 130 multiprocessors needs at a time to be kept busy
MAX_PARTS = 32  # of one sequence


class Slots:
    """Passes for a transformers cache (`past_key_values`), and tells the attention function what it should do.

    Models call `update` only: positions are given to them, and a registered attention function gets no mask. One that
    asks a cache for more fails, rather than work with a wrong answer.
    """

    def __init__(self, count, length):
        self.count = count  # B
        self.length = length  # L
        self.layers = []  # attention modules; each has its `slot_keys` and `slot_values`, (B, Hkv, R, D)

    def begin(self, rows, positions, reach=None, last=None, followers=None):
        """Before each forward pass.

        Args:
            rows: (T,) slot of each token. positions: (T,) where in its sequence it stands.
            reach: no sequence goes beyond so many positions; None while packed sequences are prefilled.
            last: (T,) the last position that each token looks at, if that is not its own.
            followers: while they are, (T,) how many tokens of its sequence come after each; an array of the host.
        """
        self.rows = rows
        self.positions = positions
        self.reach = reach
        self.last = positions if last is None else last
        self.followers = followers
        self.masks = {}  # R: mask
        self.stored = {}  # R: the tokens that are stored, while prefilling

    def update(self, key, value, layer, *args, **kwargs):
        """What transformers calls; keys and values are stored by `slot_attention`, which knows the calling module."""
        return key, value

    def store(self, module, key, value, window=None):
        """Keeps what a layer computed, (1, Hkv, T, D) or (T, Hkv, 1, D). Returns its buffers."""
        if not hasattr(module, "slot_keys"):
            shape = self.count, key.shape[1], min(self.length, window or self.length), key.shape[3]
            module.slot_keys = key.new_zeros(shape)
            module.slot_values = value.new_zeros(shape)
            self.layers.append(module)
        R = module.slot_keys.shape[2]
        keys = key.transpose(1, 2).flatten(0, 1)  # (T, Hkv, D)
        values = value.transpose(1, 2).flatten(0, 1)
        rows, places = self.rows, self.positions
        if R < self.length:
            if self.reach is None:
                tokens = self._tokens_that_stay(R)
                rows, places, keys, values = rows[tokens], places[tokens], keys[tokens], values[tokens]
            places = places % R
        module.slot_keys[rows, :, places] = keys
        module.slot_values[rows, :, places] = values
        return module.slot_keys, module.slot_values

    def _tokens_that_stay(self, R):
        """The last R tokens of each sequence that is prefilled: the others' places are taken by them."""
        if R not in self.stored:
            self.stored[R] = torch.from_numpy(np.flatnonzero(self.followers < R)).to(self.rows.device)
        return self.stored[R]

    def mask(self, R):
        """(n, 1, 1, at most R) bool, equation (3) for each place. Made once a step for all layers of a kind."""
        if R not in self.masks:
            place = torch.arange(min(self.reach, R), device=self.positions.device)
            i = self.last[:, None]
            j = i - (i - place) % R  # (n, places) the last position up to i that belongs there; below 0 there is none
            self.masks[R] = (j >= 0)[:, None, None]
        return self.masks[R]

    def keeps(self, length):
        """Whether the first token of a sequence is still there when the sequence has so many."""
        return all(module.slot_keys.shape[2] >= min(length, self.length) for module in self.layers)

    def allocate(self, device):
        """Buffers on a device, instead of wherever the first forward pass has made them; `clear` has to follow."""
        for module in self.layers:
            module.slot_keys = torch.empty_like(module.slot_keys, device=device)
            module.slot_values = torch.empty_like(module.slot_values, device=device)

    def clear(self):
        """Zeros: what is masked must at least be a number."""
        for buffer in self.buffers():
            buffer.zero_()

    def buffers(self):
        """Keys and values of all layers, in one list."""
        found = []
        for module in self.layers:
            found.append(module.slot_keys)
            found.append(module.slot_values)
        return found

    def copy(self, sources, targets, length):
        """What sequences of at most `length` tokens have in some slots to other slots, all at once."""
        for buffer in self.buffers():
            buffer[targets, :, :length] = buffer[sources, :, :length]


def slot_attention(
    module,
    query,
    key,
    value,
    attention_mask=None,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    softcap=None,
    slots=None,
    **kwargs,
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
    for feature in ("s_aux", "position_bias"):
        if kwargs.get(feature) is not None:
            raise ValueError(
                "this model's attention uses sinks or a position bias, which the sampler does not implement"
            )
    keys, values = slots.store(module, key, value, sliding_window)
    if slots.reach is None:
        return packed_attention(
            module, query, key, value, attention_mask, scaling, dropout, sliding_window, softcap=softcap, **kwargs
        )
    if scaling is None:
        scaling = query.shape[3] ** -0.5
    options = Options(scaling=scaling, window=sliding_window, softcap=softcap)
    if use_triton(query):
        output = triton_attention(query[:, :, 0], keys, values, slots.last, options)  # (n, Hq, D)
        return output[:, None], None
    return _masked_attention(query, keys, values, slots, options), None


def _masked_attention(query, keys, values, slots, options):
    """(n, 1, Hq, D): equations (1) to (4) with a mask, over all slots up to the longest sequence."""
    n, heads, _, D = query.shape
    query = query.reshape(n, keys.shape[1], -1, D)  # the heads that share keys and values: as queries of one head
    mask = slots.mask(keys.shape[2])
    keys = keys[:n, :, : mask.shape[3]]
    values = values[:n, :, : mask.shape[3]]
    if options.softcap is None:
        output = F.scaled_dot_product_attention(query, keys, values, mask, scale=options.scaling)
    else:
        output = _softcapped(query, keys, values, mask, options)
    return output.reshape(n, 1, heads, D)


AttentionInterface.register("slots", slot_attention)


# ---------------------------------------------------------------------------------------------------------- Triton


def use_triton(query):
    """Whether the kernel takes this; masked attention in PyTorch takes all else."""
    return triton is not None and query.is_cuda


def triton_attention(query, keys, values, positions, options):
    """The kernel below, and equation (6) over its parts.

    Args:
        query: (n, Hq, D). keys, values: (B, Hkv, R, D). positions: (n,) int64, last position that is looked at.
        options: the Options of the layer; its scaling is a number, its dropout is not looked at.

    Returns:
        (n, Hq, D).
    """
    window = options.window or 0
    softcap = options.softcap or 0.0
    partial, logsumexp = _partial_attention(query, [keys, values], positions, options.scaling, window, softcap)
    weights = logsumexp.softmax(dim=2)[..., None]  # (n, Hq, K, 1)
    return (partial * weights).sum(dim=2).to(query.dtype)  # (6)


def _empty_outputs(query, keys):
    """What the operator below fills; here it is decided into how many parts K a sequence is cut."""
    n, Hq, D = query.shape
    programs_of_a_part = n * keys.shape[1]
    K = max(1, min(MAX_PARTS, PROGRAMS // programs_of_a_part))
    options = {"dtype": torch.float32, "device": query.device}
    partial = torch.empty(n, Hq, K, D, **options)
    logsumexp = torch.empty(n, Hq, K, **options)
    return partial, logsumexp


# An operator of its own, which torch.compile takes as it is. Its arguments have to be plain: no NamedTuple.
@torch.library.custom_op("postcard::partial_attention", mutates_args=())
def _partial_attention(
    query: torch.Tensor,
    buffers: list[torch.Tensor],
    positions: torch.Tensor,
    scaling: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation (5): outputs of the parts (n, Hq, K, D), and logsumexp of their scores (n, Hq, K).

    Args: as for `triton_attention`. buffers: [keys, values]. window, softcap: 0 for none.
    """
    keys, values = buffers
    query = query.contiguous()
    partial, logsumexp = _empty_outputs(query, keys)
    n, Hq, K, D = partial.shape
    Hkv = keys.shape[1]
    G = Hq // Hkv
    _attention_kernel[n, Hkv, K](
        query,
        keys,
        values,
        positions,
        partial,
        logsumexp,
        keys.stride(0),
        keys.stride(1),
        scaling,
        window,
        softcap,
        G,
        D,
        K,
        keys.shape[2],
        HAS_WINDOW=window > 0,
        HAS_SOFTCAP=softcap > 0,
        BLOCK_G=max(16, triton.next_power_of_2(G)),  # tensor cores take 16 rows at least
        BLOCK_D=max(16, triton.next_power_of_2(D)),
        BLOCK=BLOCK,
        EXACT=query.dtype == torch.float32,
        num_warps=4,
        num_stages=3,
    )
    return partial, logsumexp


@_partial_attention.register_fake
def _(query, buffers, positions, scaling, window, softcap):
    return _empty_outputs(query, buffers[0])


if triton is not None:

    @triton.jit
    def _span(position, window, part, K, HAS_WINDOW: tl.constexpr, BLOCK: tl.constexpr):
        """[begin, end) of one part of the positions that a sequence looks at; a part is a number of whole blocks."""
        end = position + 1
        begin = 0
        if HAS_WINDOW:
            begin = tl.maximum(end - window, 0)  # (3)
        size = tl.cdiv(tl.cdiv(end - begin, K), BLOCK) * BLOCK
        begin += part * size
        end = tl.minimum(begin + size, end)
        return begin, end

    @triton.jit
    def _scores(q, k, scaling, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
        """(G, BLOCK) scores of queries q (G, D) and keys k (BLOCK, D)."""
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling  # (1)
        if HAS_SOFTCAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # (2)
        return scores

    @triton.jit
    def _attention_kernel(
        query, keys, values, positions, partial, logsumexp,
        slot_stride, head_stride, scaling, window, softcap, G, D, K, R,
        HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        # One program: one sequence, one head of keys and values with its G queries, one part of the positions.
        slot = tl.program_id(0)
        head = tl.program_id(1)
        part = tl.program_id(2)
        precision: tl.constexpr = "ieee" if EXACT else "tf32"  # of float32 products
        begin, end = _span(tl.load(positions + slot).to(tl.int32), window, part, K, HAS_WINDOW, BLOCK)

        # The G queries, as the rows of one matrix: their keys and values are read once for all of them.
        g = tl.arange(0, BLOCK_G)
        d = tl.arange(0, BLOCK_D)
        row = (slot * tl.num_programs(1) + head) * G
        q_mask = (g[:, None] < G) & (d[None, :] < D)
        q = tl.load(query + (row + g[:, None]) * D + d[None, :], q_mask, other=0.0)  # (G, D)

        # Block by block with a running maximum: when a block raises m to new_m, the sums shrink by e^(m - new_m).
        base = slot.to(tl.int64) * slot_stride + head * head_stride
        m = tl.full([BLOCK_G], -1e38, tl.float32)  # largest score so far
        s = tl.zeros([BLOCK_G], tl.float32)  # Σ e^(score - m)
        out = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)  # Σ e^(score - m) value
        for start in range(begin, end, BLOCK):
            t = start + tl.arange(0, BLOCK)
            place = t % R if HAS_WINDOW else t
            offsets = base + place[:, None] * D + d[None, :]
            inside = (t[:, None] < end) & (d[None, :] < D)
            k = tl.load(keys + offsets, inside, other=0.0)  # (BLOCK, D)
            scores = _scores(q, k, scaling, softcap, HAS_SOFTCAP, precision)  # (G, BLOCK)
            scores = tl.where(t[None, :] < end, scores, -1e38)
            new_m = tl.maximum(m, tl.max(scores, axis=1))
            p = tl.exp(scores - new_m[:, None])  # 0 beyond the end
            shrink = tl.exp(m - new_m)
            v = tl.load(values + offsets, inside, other=0.0)
            out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=precision)
            s = s * shrink + tl.sum(p, axis=1)
            m = new_m

        # A part may be empty: then m is -1e38, and its share in (6) is 0.
        s = tl.maximum(s, 1e-37)
        place = (row + g) * K + part
        tl.store(logsumexp + place, m + tl.log(s), g < G)  # (5)
        tl.store(partial + place[:, None] * D + d[None, :], out / s[:, None], q_mask)  # (5)
