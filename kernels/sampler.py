"""Rollouts: completions of prompts by the policy in training, without another inference engine.

    sampler = Sampler(config, slots=64, max_length=2048, eos_ids=[2], device=device)
    sampler.sync(policy)                                         after every update of the policy
    completions = sampler.sample(prompts, n=8, max_new_tokens=1024, temperature=1.0, seed=1, step=step)

The sampler has its own copy of the weights on this rank, in the precision the policy computes in (bf16 on CUDA, float32
on CPU), so decoding needs no collectives and ranks may decode different lengths. Sequences live in *slots*: row b of
the key-value buffers belongs to one sequence, which stands at a position of its own. When a sequence ends, the next one
that waits takes its slot. All tokens of a prompt but the last are *prefilled*, once for all its samples: a packed
forward pass stores their keys and values. The last one is the first to be decoded, so that every sampled token comes
out of the same function, `_decode`.

The token at position t of a sample is the v whose exponential waiting time ends first, argmin_v e_v / p_v; it is v with
probability p_v (the Gumbel-max trick). The e_v are a hash of (seed, step, prompt, sample, t, v). So a sample depends
neither on the number of slots or ranks nor on what else is being sampled, except where the first two are as close as
the rounding of floats.

Shapes:  B slots, n the first of them that are in use, L positions of a slot, V vocabulary size, H hidden size.
"""

import copy
import hashlib
import re
import struct
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM

from kernels.attention import _softcapped, packed_attention
from kernels.head import _matmul

PREFILL_TOKENS = 8192  # prompt tokens in one forward pass
LOOK_EVERY = 16  # decode steps on CUDA between two looks of the host at what has finished
POSITION, LIMIT, LIVE, KEY = 0, 1, 2, 3  # columns of Sampler.state
ARRAYS = {"prompt_ids", "token_ids", "logprobs"}  # of a Completion


@dataclass(eq=False)
class Completion:
    """One sample of one prompt.

    Attributes:
        step, prompt, sample: which one: sample number `sample` (from 0) of prompt `prompt`, asked for in `step`.
        prompt_ids: (P,) int64. token_ids: (T,) int64, what was sampled, the end token included.
        logprobs: (T,) float32, log-probability of each sampled token when it was sampled, temperature included.
        ended: an end token came. done: that, or it was cut off; true of all that `sample` returns.
    """

    step: int
    prompt: int
    sample: int
    prompt_ids: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray
    ended: bool = False
    done: bool = False


# ---------------------------------------------------------------------------------------------- slots and attention


class _Slots:
    """Keys and values of B sequences of up to L tokens, which transformers takes for its cache (`past_key_values`).

    Models call `update` only: positions are given to them, and a registered attention function gets no mask. One that
    asks a cache for more fails, rather than work with a wrong answer.
    """

    def __init__(self, slots, length):
        self.slots, self.length = slots, length
        self.layers = {}  # layer: (keys, values), each (B, Hkv, L, D)
        self.spans = []  # while prefilling: (slot, start, end) of each sequence in the packed row

    def begin(self, positions, length):
        """A decode step: sequence b of the first n stands at positions[b], and all stand below `length`."""
        self.positions, self.length, self.masks = positions, length, {}
        self.rows = torch.arange(len(positions), device=positions.device)

    def update(self, key, value, layer, *args, **kwargs):
        """Stores what a layer computed, (1, Hkv, T, D) or (n, Hkv, 1, D). Returns what its attention should see."""
        if layer not in self.layers:
            self.layers[layer] = [x.new_zeros(self.slots, x.shape[1], self.length, x.shape[3]) for x in (key, value)]
        for buffer, new in zip(self.layers[layer], (key, value), strict=True):
            for slot, start, end in self.spans:
                buffer[slot, :, : end - start] = new[0, :, start:end]
            if not self.spans:
                buffer[self.rows, :, self.positions] = new[:, :, 0]
        if self.spans:
            return key, value
        return [buffer[: len(self.rows), :, : self.length] for buffer in self.layers[layer]]  # views: nothing is copied

    def mask(self, window):
        """(n, 1, 1, L) bool: what each sequence may look at. Made once a step for all layers of a kind."""
        if window not in self.masks:
            j, i = torch.arange(self.length, device=self.positions.device), self.positions[:, None]
            self.masks[window] = ((j <= i) if window is None else (j <= i) & (i - j < window))[:, None, None]
        return self.masks[window]

    def copy(self, source, target, length):
        """The first `length` positions of one slot to another."""
        for buffer in (buffer for layer in self.layers.values() for buffer in layer):
            buffer[target, :, :length] = buffer[source, :, :length]


def slot_attention(
    module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
    slots=None, **kwargs,
):
    """Attention of one token of each sequence to its slot, or within packed sequences while they are prefilled.

    Args:
        query: (n, Hq, 1, D). key, value: (n, Hkv, L, D), as `slots.update` returned them.
        slots: the cache, which says what each sequence may look at.
        The others as for `kernels.attention.packed_attention`.

    Returns:
        (output (n, 1, Hq, D), None), as transformers expects.

    Raises:
        ValueError: a feature (sinks, position bias) that would otherwise be ignored.
    """
    if slots.spans:
        return packed_attention(
            module, query, key, value, attention_mask, scaling, dropout, sliding_window, softcap=softcap, **kwargs
        )
    if any(kwargs.get(feature) is not None for feature in ("s_aux", "position_bias")):
        raise ValueError("this model's attention uses sinks or a position bias, which the sampler does not implement")
    n, heads, _, D = query.shape
    query = query.reshape(n, key.shape[1], -1, D)  # the heads that share keys and values: as queries of one head
    if softcap is None:
        output = F.scaled_dot_product_attention(query, key, value, slots.mask(sliding_window), scale=scaling)
    else:
        output = _softcapped(query, key, value, slots.mask(sliding_window), scaling or D**-0.5, 0.0, softcap)
    return output.reshape(n, 1, heads, D), None


AttentionInterface.register("slots", slot_attention)


# --------------------------------------------------------------------------------------------------------- sampling


def _mix(x):
    """A bijection of int32 whose output looks random ("lowbias32", Chris Wellons, hash-prospector, public domain)."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D  # >> is arithmetic: the mask makes it logical
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


def _waiting_times(keys, positions, V):
    """(n, V) exponential numbers, a function of the int32 keys (n, 2) and positions (n,) alone."""
    a = _mix(keys[:, 0] ^ _mix(positions))
    b = _mix(keys[:, 1] ^ a) | 1
    v = _mix(torch.arange(V, dtype=torch.int32, device=keys.device))
    x = _mix((v ^ a[:, None]) * b[:, None])  # (n, V)
    uniform = ((x & 0x7FFFFFFF) + 0.5) * 2**-31  # small ones finely spaced: they decide about rare tokens
    return -torch.log1p(-uniform)


def _draw(logits, keys, positions, temperature, softcap):
    """Sampled tokens (n,) and their log-probabilities (n,), from float32 logits (n, V); greedy at temperature 0."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    z = z / (temperature or 1)
    logsumexp = z.logsumexp(dim=1)
    if temperature == 0:
        tokens = z.argmax(dim=1)
    else:
        tokens = ((z - logsumexp[:, None]).exp() / _waiting_times(keys, positions, z.shape[1])).argmax(dim=1)
    return tokens, z.gather(1, tokens[:, None])[:, 0] - logsumexp


class Sampler:
    """Samples from a causal language model; see the top of this file.

    Args:
        config: the transformers configuration of the policy.
        slots: sequences decoded at a time. max_length: most tokens of prompt and completion together.
        eos_ids: tokens that end a completion. device: where to decode, a torch.device or its name.

    Raises:
        ValueError: a model with features that are not supported, max_length beyond its positions, or too little memory.
    """

    def __init__(self, config, slots, max_length, eos_ids, device):
        self.device = torch.device(device)
        _check_config(config, max_length)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        with torch.device("meta"), torch.no_grad():
            config, options = copy.deepcopy(config), {"attn_implementation": "slots", "dtype": dtype}
            self.model = AutoModelForCausalLM.from_config(config, **options)  # which writes into config
            if getattr(self.model.get_output_embeddings(), "bias", None) is not None:
                raise ValueError("the model's head has a bias, which is not supported")
            self.cache = _Slots(slots, max_length)
            self.cache.begin(torch.zeros(1, dtype=torch.int64), max_length)
            self._hidden(*torch.zeros(2, 1, 1, dtype=torch.int64))  # makes the buffers, on meta: their shapes
        _check_memory(self.model, self.cache, self.device, slots, max_length)
        self.model.to_empty(device=self.device).eval().requires_grad_(False)
        self.model.tie_weights()
        for layer, buffers in self.cache.layers.items():
            self.cache.layers[layer] = [torch.zeros_like(x, device=self.device) for x in buffers]
        self.slots, self.max_length, self.config, self.eos_ids = slots, max_length, config, set(eos_ids)
        self.eos = torch.tensor(sorted(self.eos_ids), dtype=torch.int64, device=self.device)
        self.ids = torch.zeros(slots, max_length, dtype=torch.int64, device=self.device)  # prompt and completion
        self.logprobs = torch.zeros(slots, max_length, device=self.device)  # of the tokens in `ids`
        # position: of the last token in `ids`, which is not in the cache yet; limit: of the last one that may be
        # sampled; live: 1 while it goes on; two int32 keys of the noise
        self.state = torch.zeros(slots, 5, dtype=torch.int32, device=self.device)
        self.active = [None] * slots  # the Completion in each slot
        self.newest = None, None  # key in `groups`, and slot, of the sequence that came to its slot last
        self.groups = {}  # (step, prompt): its Completions; all that were asked for and not returned yet
        self.graphs, self.draw, self.synced = {}, _draw, False
        if self.device.type == "cuda":
            self.pool, self.draw = torch.cuda.graph_pool_handle(), torch.compile(_draw)

    @torch.no_grad()
    def sync(self, policy):
        """Copies the weights of `policy.model`, sharded by FSDP2 or not, layer by layer. All ranks call it together."""
        target = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for module in [m for m in policy.modules() if m is policy or isinstance(m, FSDPModule)]:
            if isinstance(module, FSDPModule):
                module.unshard()  # its own parameters become whole, in the precision the policy computes in
            for name, tensor in [*policy.model.named_parameters(), *policy.model.named_buffers()]:
                if name in target and not isinstance(tensor, DTensor):
                    target.pop(name).copy_(tensor)
            if isinstance(module, FSDPModule):
                module.reshard()
        if target:
            raise ValueError(f"the policy has no {sorted(target)[:5]}")
        self.synced = True

    @torch.no_grad()
    def sample(self, prompts, n, max_new_tokens, temperature=1.0, seed=0, step=0, indices=None, enough=None, stop=None):
        """Samples n completions of each prompt.

        Args:
            prompts: token ids of each prompt. indices: a number for each, by default its place in the list; with
                several ranks, its place among the prompts of all, so that no two have the same noise.
            max_new_tokens: a completion that has so many tokens, or fills max_length, is cut off.
            temperature: divides the logits; 0 takes the likeliest token, with its log-probability at temperature 1.
            seed, step: further numbers for the noise.
            enough: return when this many prompts have all their completions. What is unfinished then is kept, and
                continued by the next call, its first tokens prefilled again under the weights of then.
            stop: called between steps; if it returns true, so does this, early and as with `enough`.

        Returns:
            list of Completion, those of a prompt side by side, prompts in the order in which they were asked for. With
            `enough` those of exactly so many prompts, kept ones included.

        Raises:
            ValueError: an empty prompt, one that leaves no room within max_length or has unknown ids, the same
                (step, index) twice, a temperature below 0, no `sync` yet, or logits that are not finite.
        """
        if not self.synced or temperature < 0 or max_new_tokens < 1:
            raise ValueError("sample needs a sync before it, temperature >= 0 and max_new_tokens >= 1")
        self._add(prompts, n, step, range(len(prompts)) if indices is None else indices)
        enough = len(self.groups) if enough is None else min(enough, len(self.groups))
        complete = [key for key, group in self.groups.items() if all(c.done for c in group)]
        waiting = deque(c for group in self.groups.values() for c in group if not c.done)
        self.state.zero_()
        self.newest = None, None  # the weights may be new
        quiet = dist.is_initialized() and dist.get_rank() > 0
        bar = tqdm(total=len(waiting), desc="rollout", unit="seq", delay=10, leave=False, disable=quiet)
        while len(complete) < enough and not (stop and stop()):
            self._refill(waiting, max_new_tokens, seed)
            self._run(temperature)
            for completion in self._take(only_done=True):
                bar.update()
                key = completion.step, completion.prompt
                if key not in complete and all(c.done for c in self.groups[key]):
                    complete.append(key)
        bar.close()
        self._take(only_done=False)
        return [c for key in list(self.groups) if key in complete[:enough] for c in self.groups.pop(key)]

    def state_dict(self):
        """What is kept between calls, as plain tensors and numbers; small, since keys and values are made again."""
        completions = [vars(completion).items() for group in self.groups.values() for completion in group]
        return {"completions": [{k: torch.from_numpy(v) if k in ARRAYS else v for k, v in c} for c in completions]}

    def load_state_dict(self, state):
        """Continues from `state_dict()`, bit for bit."""
        self.groups = {}
        for fields in state["completions"]:
            completion = Completion(**{k: v.numpy() if k in ARRAYS else v for k, v in fields.items()})
            self.groups.setdefault((completion.step, completion.prompt), []).append(completion)

    def _add(self, prompts, n, step, indices):
        """Puts down what is asked for in `groups`."""
        for ids, index in zip(prompts, indices, strict=True):
            ids, index, step = np.array(ids, dtype=np.int64), int(index), int(step)
            if not 0 < len(ids) < self.max_length:
                raise ValueError(
                    f"prompt {index} has {len(ids)} tokens: a prompt needs one, and room for its completion within "
                    f"--max_length {self.max_length}"
                )
            if ids.min() < 0 or ids.max() >= self.config.vocab_size:
                raise ValueError(f"prompt {index} has token ids outside the vocabulary of {self.config.vocab_size}")
            if (step, index) in self.groups:
                raise ValueError(f"prompt {index} of step {step} is there twice")
            none = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
            self.groups[step, index] = [Completion(step, index, i, ids, *none) for i in range(n)]

    def _refill(self, waiting, max_new_tokens, seed):
        """Gives free slots to waiting sequences; when none wait, moves the last sequences into the gaps instead."""
        free = [slot for slot, completion in enumerate(self.active) if completion is None]
        if len(free) < min(len(waiting), self.slots // 16):
            return  # few at a time would make many small prefills
        new, copies = [], []  # (slot, token ids) to prefill; (slot that has the prompt, slot, tokens)
        while free and waiting:
            c = waiting.popleft()
            ids = np.concatenate([c.prompt_ids, c.token_ids])
            # A prompt's samples wait side by side, so its keys and values are still where its last sample went; that
            # slot is taken first, lest another prompt gets it in this very call.
            key, source = self.newest
            slot = free.pop(free.index(source) if source in free else 0)
            if key != (c.step, c.prompt) or len(c.token_ids):
                new.append((slot, ids[:-1]))
            elif slot != source:
                copies.append((source, slot, len(ids) - 1))
            self.newest, self.active[slot] = ((c.step, c.prompt), slot), c
            self.ids[slot, : len(ids)] = torch.from_numpy(ids)
            self.logprobs[slot, len(c.prompt_ids) : len(ids)] = torch.from_numpy(c.logprobs)
            limit = min(len(c.prompt_ids) + max_new_tokens, self.max_length) - 1
            noise = hashlib.blake2b(struct.pack("<4q", seed, c.step, c.prompt, c.sample), digest_size=8).digest()
            row = [len(ids) - 1, limit, len(ids) <= limit, *struct.unpack("<2i", noise)]
            self.state[slot] = torch.tensor(row, dtype=torch.int32)
        self._prefill(new)
        for source, slot, length in copies:
            self.cache.copy(source, slot, length)
        while not waiting and free and (last := max(self._used())) > free[0]:
            gap = free.pop(0)
            self.cache.copy(last, gap, int(self.state[last, POSITION]))
            for buffer in (self.ids, self.logprobs, self.state):
                buffer[gap] = buffer[last]
            self.active[gap], self.active[last] = self.active[last], None

    def _used(self):
        return [slot for slot, completion in enumerate(self.active) if completion is not None]

    def _prefill(self, sequences):
        """Stores the keys and values of [(slot, token ids), ...]."""
        sequences = sorted((s for s in sequences if len(s[1])), key=lambda s: len(s[1]))  # equal lengths side by side
        while sequences:
            row = [sequences.pop()]
            while sequences and sum(len(ids) for _, ids in row) + len(sequences[-1][1]) <= PREFILL_TOKENS:
                row.append(sequences.pop())
            lengths = [len(ids) for _, ids in row]
            ends = np.cumsum([0, *lengths])
            ids, positions = np.concatenate([ids for _, ids in row]), np.concatenate([np.arange(n) for n in lengths])
            self.cache.spans = [(slot, *span) for (slot, _), span in zip(row, pairwise(ends.tolist()), strict=True)]
            ids, positions = (torch.from_numpy(x).to(self.device)[None] for x in (ids, positions))
            ends = torch.from_numpy(ends.astype(np.int32)).to(self.device)
            self._hidden(ids, positions, cu_seq_lens_q=ends, max_length_q=max(lengths))
            self.cache.spans = []

    def _hidden(self, ids, positions, **kwargs):
        """Last hidden states; keys and values go to the slots."""
        kwargs |= {"past_key_values": self.cache, "use_cache": True, "slots": self.cache}
        return self.model.base_model(input_ids=ids, position_ids=positions, **kwargs).last_hidden_state

    def _run(self, temperature):
        """Decodes until the host looks again: one step on CPU, LOOK_EVERY on CUDA, there as CUDA graphs."""
        used, cuda = self._used(), self.device.type == "cuda"
        steps = LOOK_EVERY if cuda else 1
        n, length = used[-1] + 1, int(self.state[used, POSITION].max()) + steps
        if cuda:  # few different shapes, since each becomes a graph: powers of two
            n, length = 1 << (n - 1).bit_length(), max(256, 1 << (length - 1).bit_length())
        shape = min(n, self.slots), min(length, self.max_length), temperature
        for _ in range(steps):
            if shape in self.graphs:
                self.graphs[shape].replay()
                continue
            self._decode(*shape)
            if cuda:  # the step above was one of the steps and the warm-up; capturing computes nothing
                self.graphs[shape] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graphs[shape], pool=self.pool, capture_error_mode="thread_local"):
                    self._decode(*shape)

    def _decode(self, n, length, temperature):
        """One token for each of the first n slots, whose attention looks at the first `length` positions."""
        rows, state = torch.arange(n, device=self.device), self.state[:n]
        positions = state[:, POSITION].long()
        self.cache.begin(positions, length)
        hidden = self._hidden(self.ids[rows, positions][:, None], positions[:, None])[:, 0]  # (n, H)
        logits = _matmul(hidden, self.model.get_output_embeddings().weight.T)  # (n, V)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        tokens, logprobs = self.draw(logits, state[:, KEY:], state[:, POSITION] + 1, temperature, softcap)
        live = state[:, LIVE].bool()
        state[:, POSITION] += live
        positions = positions + live  # a finished sequence stays where it is, and its slot as it is
        self.ids[rows, positions] = torch.where(live, tokens, self.ids[rows, positions])
        self.logprobs[rows, positions] = torch.where(live, logprobs, self.logprobs[rows, positions])
        ended = (tokens[:, None] == self.eos).any(dim=1) | (state[:, POSITION] >= state[:, LIMIT])
        state[:, LIVE] = (live & ~ended).int()

    def _take(self, only_done):
        """Copies sequences out of their slots, the finished ones or all. Returns them."""
        taken = []
        for slot, (position, _, live, *_) in enumerate(self.state.tolist()):
            c = self.active[slot]
            if c is None or (live and only_done):
                continue
            span = slice(len(c.prompt_ids), position + 1)
            c.token_ids, c.logprobs = (x[slot, span].cpu().numpy().copy() for x in (self.ids, self.logprobs))
            if not np.isfinite(c.logprobs).all():
                raise ValueError(f"prompt {c.prompt} of step {c.step}: the model's logits are not finite")
            c.done, c.ended = not live, not live and int(c.token_ids[-1]) in self.eos_ids
            self.active[slot] = None
            taken.append(c)
        return taken


def _check_config(config, max_length):
    """Refuses what would be ignored, or makes log-probabilities depend on what else is in a batch."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit and max_length > limit:
        raise ValueError(f"--max_length {max_length} is beyond the {limit} positions this model knows")
    for field in ("logit_scale", "logits_scaling"):
        if getattr(config, field, None) not in (None, 1):
            raise ValueError(f"the model transforms its logits ({field}), which is not supported")
    for kind in ("dynamic", "longrope"):
        if f"'{kind}'" in str(getattr(config, "rope_parameters", None)):
            raise ValueError(f"rotary embeddings of type {kind} change with the longest sequence: not supported")


def _check_memory(model, cache, device, slots, max_length):
    """Before anything is allocated: is there room for the weights and the slots?"""
    weights = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    buffers = sum(x.nbytes for layer in cache.layers.values() for x in layer)
    host = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
    if weights + buffers > free:
        raise ValueError(
            f"rollouts need {weights / 2**30:.1f} GiB for weights and {buffers / 2**30:.1f} GiB for keys and values, "
            f"{free / 2**30:.1f} GiB are free: lower --slots {slots} or --max_length {max_length}"
        )
