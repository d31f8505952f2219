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
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from kernels.head import _matmul
from kernels.slots import Slots

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


def _advance(logits, state, ids, logprobs, eos, temperature, softcap):
    """Draws the next token of each of the first n slots, and writes down what follows, in place.

    Args:
        logits: (n, V). state: (B, 5), see Sampler. ids, logprobs: (B, L). eos: (E,) tokens that end a completion.
    """
    rows, state = torch.arange(len(logits), device=logits.device), state[: len(logits)]
    tokens, token_logprobs = _draw(logits, state[:, KEY:], state[:, POSITION] + 1, temperature, softcap)
    live = state[:, LIVE].bool()
    positions = (state[:, POSITION] + live).long()  # a finished sequence stays where it is, and its slot as it is
    ids[rows, positions] = torch.where(live, tokens, ids[rows, positions])
    logprobs[rows, positions] = torch.where(live, token_logprobs, logprobs[rows, positions])
    ended = (tokens[:, None] == eos).any(dim=1) | (positions >= state[:, LIMIT])
    state[:, POSITION] = positions.int()
    state[:, LIVE] = (live & ~ended).int()


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
            self.cache, zeros = Slots(slots, max_length), torch.zeros(1, dtype=torch.int64)
            self.cache.begin(zeros, zeros, max_length)
            self._hidden(zeros[None], zeros[None])  # makes the buffers, on meta: their shapes
        _check_memory(self.model, self.cache, self.device, slots, max_length)
        self.model.to_empty(device=self.device).eval().requires_grad_(False)
        self.model.tie_weights()
        self.cache.allocate(self.device)
        self.slots, self.max_length, self.config, self.eos_ids = slots, max_length, config, set(eos_ids)
        self.eos = torch.tensor(sorted(self.eos_ids), dtype=torch.int64, device=self.device)
        self.ids = torch.zeros(slots, max_length, dtype=torch.int64, device=self.device)  # prompt and completion
        self.logprobs = torch.zeros(slots, max_length, device=self.device)  # of the tokens in `ids`
        # position: of the last token in `ids`, which is not in the cache yet; limit: of the last one that may be
        # sampled; live: 1 while it goes on; two int32 keys of the noise
        self.state = torch.zeros(slots, 5, dtype=torch.int32, device=self.device)
        self.active = [None] * slots  # the Completion in each slot
        self.newest = None, None  # key in `groups` of the sequence that came last, and a slot that holds its prompt
        self.groups = {}  # (step, prompt): its Completions; all that were asked for and not returned yet
        self.advance, self.synced = _advance, False
        if self.device.type == "cuda":
            self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()
            self.sizes = [slots]  # numbers of slots that are decoded together; few, since each is compiled and captured
            while self.sizes[0] >= 64:
                self.sizes.insert(0, self.sizes[0] // 4)
            self._compile()

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
        new, copies, rows = [], [], []  # (slot, ids) to prefill; (slot that has the prompt, slot); what to write down
        while free and waiting:
            c = waiting.popleft()
            ids = np.concatenate([c.prompt_ids, c.token_ids])
            # A prompt's samples wait side by side, so its keys and values are still in the slot that it was prefilled
            # to; that one is taken first when it is free, lest another prompt gets it in this very call.
            key, source = self.newest
            slot = free.pop(free.index(source) if source in free else 0)
            if key != (c.step, c.prompt) or len(c.token_ids):
                new.append((slot, ids[:-1]))
                self.newest = (c.step, c.prompt), slot
            elif slot != source:
                copies.append((source, slot))
            self.active[slot] = c
            limit = min(len(c.prompt_ids) + max_new_tokens, self.max_length) - 1
            noise = hashlib.blake2b(struct.pack("<4q", seed, c.step, c.prompt, c.sample), digest_size=8).digest()
            state = [len(ids) - 1, limit, len(ids) <= limit, *struct.unpack("<2i", noise)]
            rows.append((slot, ids, np.concatenate([np.zeros(len(c.prompt_ids)), c.logprobs]), state))
        self._write(rows)
        self._prefill(new)
        self._copy(copies)
        moves = []
        while not waiting and free and (last := max(self._used())) > free[0]:
            moves.append((last, free.pop(0)))
            self.active[moves[-1][1]], self.active[last] = self.active[last], None
        self._copy(moves)
        for buffer in (self.ids, self.logprobs, self.state) if moves else ():
            buffer[[target for _, target in moves]] = buffer[[source for source, _ in moves]]

    def _write(self, rows):
        """Writes [(slot, ids (T,), logprobs (T,), numbers of `state`), ...] to the device, in one go."""
        if rows:
            slots, ids, logprobs, state = zip(*rows, strict=True)
            width = max(map(len, ids))
            for buffer, values in ((self.ids, ids), (self.logprobs, logprobs)):
                padded = torch.tensor(np.array([np.pad(x, (0, width - len(x))) for x in values]), dtype=buffer.dtype)
                buffer[list(slots), :width] = padded.to(self.device)
            self.state[list(slots)] = torch.tensor(state, dtype=torch.int32).to(self.device)

    def _copy(self, pairs):
        """Keys and values from slot to slot: [(source, target), ...]."""
        if pairs:
            sources, targets = map(list, zip(*pairs, strict=True))
            self.cache.copy(sources, targets, int(self.state[sources, POSITION].max()))

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
            columns = np.repeat([slot for slot, _ in row], lengths), np.concatenate([np.arange(n) for n in lengths])
            columns += np.concatenate([ids for _, ids in row]), np.cumsum([0, *lengths])
            slots, positions, ids, ends = (torch.from_numpy(x).to(self.device) for x in columns)
            self.cache.begin(slots, positions)
            with torch.compiler.set_stance("force_eager"):  # every row is of another length
                self._hidden(ids[None], positions[None], cu_seq_lens_q=ends.int(), max_length_q=max(lengths))

    def _hidden(self, ids, positions, **kwargs):
        """Last hidden states; keys and values go to the slots."""
        kwargs |= {"past_key_values": self.cache, "use_cache": True, "slots": self.cache}
        return self.model.base_model(input_ids=ids, position_ids=positions, **kwargs).last_hidden_state

    def _compile(self):
        """Compiles what a decode step does: each decoder layer, and the draw; at the first step of each size."""
        for layer in self.model.base_model.layers:
            layer.compile(dynamic=False)
        self.advance = torch.compile(_advance, dynamic=False)

    def _run(self, temperature):
        """Decodes until the host looks again: one step on CPU, LOOK_EVERY on CUDA, there as replays of a CUDA graph."""
        used = self._used()
        if self.device.type != "cuda":
            return self._decode(used[-1] + 1, int(self.state[used, POSITION].max()) + 1, temperature)
        shape = next(n for n in self.sizes if n > used[-1]), self.max_length, temperature
        for _ in range(LOOK_EVERY):
            if shape in self.graphs:
                self.graphs[shape].replay()
                continue
            self._decode(*shape)  # this is one of the steps, and the warm-up; capturing computes nothing
            self.graphs[shape] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[shape], pool=self.pool, capture_error_mode="thread_local"):
                self._decode(*shape)

    def _decode(self, n, reach, temperature):
        """One token for each of the first n slots, of which none has gone beyond `reach` positions."""
        rows, positions = torch.arange(n, device=self.device), self.state[:n, POSITION].long()
        self.cache.begin(rows, positions, reach)
        hidden = self._hidden(self.ids[rows, positions][:, None], positions[:, None])[:, 0]  # (n, H)
        logits = _matmul(hidden, self.model.get_output_embeddings().weight.T)  # (n, V)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        self.advance(logits, self.state, self.ids, self.logprobs, self.eos, temperature, softcap)

    def _take(self, only_done):
        """Copies sequences out of their slots, the finished ones or all. Returns them."""
        state, taken = self.state.cpu().numpy(), []
        slots = [slot for slot in self._used() if not (only_done and state[slot, LIVE])]
        if slots:
            width = state[slots, POSITION].max() + 1
            ids, logprobs = (x[slots, :width].cpu().numpy() for x in (self.ids, self.logprobs))
        for i, slot in enumerate(slots):
            c, self.active[slot] = self.active[slot], None
            span = slice(len(c.prompt_ids), state[slot, POSITION] + 1)
            c.token_ids, c.logprobs = ids[i, span].copy(), logprobs[i, span].copy()
            if not np.isfinite(c.logprobs).all():
                raise ValueError(f"prompt {c.prompt} of step {c.step}: the model's logits are not finite")
            c.done = not state[slot, LIVE]
            c.ended = c.done and int(c.token_ids[-1]) in self.eos_ids
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
    buffers = sum(x.nbytes for x in cache.buffers())
    host = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
    if weights + buffers > free:
        raise ValueError(
            f"rollouts need {weights / 2**30:.1f} GiB for weights and {buffers / 2**30:.1f} GiB for keys and values, "
            f"{free / 2**30:.1f} GiB are free: lower --slots {slots} or --max_length {max_length}"
        )
