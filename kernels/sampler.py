"""Rollouts: completions of prompts by the policy in training, without another inference engine.

    sampler = Sampler(config, slots=64, max_length=2048, eos_ids=[2], device=device)
    sampler.sync(policy)                                         after every update of the policy
    params = SamplingParams(n=8, max_new_tokens=1024, seed=1)
    completions = sampler.sample(prompts, params, step=step)
    sampler.release()                                            gives its memory to training, until the next sync

or, of a model that is not in training, `Sampler.from_pretrained(folder)`, and no `sync`.

The sampler has its own copy of the weights on this rank, in the precision the policy computes in (bf16 on CUDA, float32
on CPU), so decoding needs no collectives and ranks may decode different lengths. (Of a model that is too large for this
a group of ranks shares one copy, and samples the same prompts in lockstep: `kernels/parallel.py`.) Between `release`
and the next `sync` it has no memory: training needs it then.

Sequences live in *slots*: row b of the key-value buffers belongs to one sequence, which stands at a position of its
own. When a sequence ends, the next one that waits takes its slot. All tokens of a prompt but the last are *prefilled*,
once for all its samples: a packed forward pass stores their keys and values. The last one is the first to be decoded,
so that every sampled token comes out of the same function, `_decode`.

From the raw logits s (V,) at the position before t, token y_t of a sample is drawn by

    z_v = c tanh(s_v / c) / τ             temperature τ; soft-cap c, without one z = s / τ                       (1)
    log p_v = z_v - log Σ_u e^(z_u)       what is returned as the log-probability of the token v                 (2)
    e_v = -log(1 - u_v)                   u_v in (0, 1) is a hash of (seed, step, index, sample, t, v)           (3)
    y_t = argmin_v e_v / p_v              at temperature 0: argmax_v z_v                                         (4)

With top_p below 1, (4) chooses among the fewest tokens whose p_v, the largest first, reach it (nucleus sampling, arXiv
1904.09751). That is for evaluation: (2) stays what it is, so training on such samples would need another (2).

The e_v are exponential waiting times, and in (4) the token v comes first with probability p_v (the Gumbel-max trick).
So a sample depends neither on the number of slots or ranks nor on what else is being sampled, except where the first
two are as close as the rounding of floats.

Shapes:  B slots, n the first of them that are in use, L positions of a slot, V vocabulary size, H hidden size,
P tokens of a prompt, T of its completion, E end tokens.
"""

import copy
import hashlib
import os
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from kernels.head import _matmul, linear_logprobs
from kernels.joined import join_products
from kernels.memory import free_bytes
from kernels.parallel import agree, any_of, connect, divide, divided_modules, own_part
from kernels.slots import Slots

PREFILL_TOKENS = 8192  # prompt tokens in one forward pass
LOOK_EVERY = 16  # decode steps on CUDA between two looks of the host at what has finished
LONGEST_WAIT = 18.3  # instead of an infinite one; see _exponential

# Columns of Sampler.state, which has one row of int32 for each slot.
POSITION = 0  # of the last token in `ids`: the one that is decoded next, and is not in the cache yet
LIMIT = 1  # position of the last token that may be sampled
LIVE = 2  # 1 while the sequence goes on, 0 when it has ended or was cut off
KEY = 3  # and 4: two keys of the noise, a hash of (seed, step, index, sample)
COLUMNS = 5


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What to sample of each prompt, and how.

    Attributes:
        n: completions of each prompt.
        max_new_tokens: a completion that has so many tokens, or fills the sampler's max_length, is cut off.
        temperature: divides the logits; 0 takes the likeliest token, with its log-probability at temperature 1.
        top_p: what the likeliest tokens, among which one is drawn, have to reach together; 1: all are.
        seed: another seed is another noise.
        find_end: ends a completion by more than its last token. Called at each look of the host with what was sampled
            so far, (T,) ids, and how many of these it had been called with before; returns after how many of them the
            completion ends, or None. It has to find the same end however often it is called.
        on_end: called with each Completion that has ended or was cut off, while others are still being sampled.
        max_staleness: with `enough` of Sampler.sample: a prompt that was begun so many steps ago is waited for.

    Raises:
        ValueError: a temperature below 0, a top_p outside (0, 1], or no tokens to sample.
    """

    n: int = 1
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    find_end: Callable | None = None
    on_end: Callable | None = None
    max_staleness: int | None = None

    def __post_init__(self):
        if self.temperature < 0 or self.max_new_tokens < 1:
            raise ValueError("sample needs temperature >= 0 and max_new_tokens >= 1")
        if not 0 < self.top_p <= 1:
            raise ValueError("sample needs 0 < top_p <= 1")


@dataclass(eq=False)
class Completion:
    """One sample of one prompt.

    Attributes:
        step, index, sample: which one: sample number `sample` (from 0) of the prompt with the number `index` that the
            caller gave, asked for in `step`.
        begun: the step in which its first token was sampled, and so the one whose weights are the oldest that any of
            its tokens was sampled from; None before that.
        prompt_ids: (P,) int64. token_ids: (T,) int64, what was sampled, the end token included.
        logprobs: (T,) float32, log-probability of each sampled token when it was sampled, temperature included.
        ended: its last token is an end token, or the one after which find_end has found an end.
        done: no more is sampled, because it ended or because it was cut off. All that `sample` returns are done; those
            it keeps in Sampler.groups may not be.
    """

    step: int
    index: int
    sample: int
    prompt_ids: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray
    ended: bool = False
    done: bool = False
    begun: int | None = None


ARRAYS = ("prompt_ids", "token_ids", "logprobs")  # of a Completion


class Sampler:
    """Samples from a causal language model; see the top of this file.

    `groups`, {(step, index): [Completion, ...]}, is what was asked for and not returned yet.

    Args:
        config: the transformers configuration of the policy.
        slots: sequences decoded at a time. max_length: most tokens of prompt and completion together.
        eos_ids: tokens that end a completion. device: where to decode, a torch.device or its name.
        group: the process group of the ranks that share a copy; None: this rank has its own.

    Raises:
        ValueError: a model with features that are not supported, max_length beyond its positions, too little memory, or
            a group that cannot divide the model.
    """

    def __init__(self, config, slots, max_length, eos_ids, device, group=None):
        self.device = torch.device(device)
        self.config = config
        self.slots = slots
        self.max_length = max_length
        self.eos_ids = set(eos_ids)
        self.group = group

        # On meta, where nothing has memory; the first `sync` gives it some.
        t = 1 if group is None else dist.get_world_size(group)
        self.model, self.cache = _build(config, slots, max_length, _precision(self.device), t, group)
        weights, cache = _bytes(self.model, self.cache)
        _check_memory(weights, cache, self.device, slots, max_length)
        self.weight_storages = []  # [(storage, bytes), ...] of what `release` gives back
        self.slot_storages = []
        self.synced = False

        # On the device, for each slot: its sequence (prompt and completion), the log-probabilities of its tokens, and
        # the numbers that the columns above name.
        self.ids = torch.zeros(slots, max_length, dtype=torch.int64, device=self.device)
        self.logprobs = torch.zeros(slots, max_length, device=self.device)
        self.state = torch.zeros(slots, COLUMNS, dtype=torch.int32, device=self.device)
        self.eos = torch.tensor(sorted(self.eos_ids), dtype=torch.int64, device=self.device)
        self.forbid([])

        # On the host.
        self.groups = {}
        self.active = [None] * slots  # the Completion in each slot
        self.newest = None, None  # key in `groups` of the prompt that was prefilled last, and the slot that has it
        self.advance = _advance
        self.graphs = {}  # (slots decoded, reach, temperature, top_p): CUDA graph
        # All slots are decoded, a quarter, a sixteenth ...: each size is compiled and captured, so there are few.
        self.sizes = [slots]
        while self.sizes[0] >= 64:
            self.sizes.insert(0, self.sizes[0] // 4)

    @classmethod
    def from_pretrained(cls, folder, slots=64, max_length=None, device=None, group=None):
        """A sampler of the model in a folder, ready to sample: no policy, no `sync`.

        While it is made, the weights are in memory twice: once on the host, and once on the device.

        Args:
            folder: what AutoModelForCausalLM opens, a folder or a Hub id. Its end tokens are those of its generation
                config and of its tokenizer, if it has one.
            slots, group: as for Sampler. max_length: likewise; by default all positions that the model knows.
            device: by default CUDA where there is one.

        Raises:
            OSError, ValueError: the folder cannot be opened, lacks weights, or holds a model that Sampler refuses.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = _precision(torch.device(device))
        source, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        if report["missing_keys"]:  # transformers has made them up
            raise ValueError(f"{folder} lacks the weights {sorted(report['missing_keys'])[:5]}")
        if max_length is None:
            max_length = getattr(source.config, "max_position_embeddings", None)
            if max_length is None:
                raise ValueError(f"{folder} does not say how many positions its model knows: give max_length")
        sampler = cls(source.config, slots, max_length, _end_tokens(source, folder), device, group)
        policy = torch.nn.Module()  # as `sync` takes it: with its model as .model
        policy.model = source
        sampler.sync(policy)
        return sampler

    def forbid(self, ids):
        """Of ids that are never drawn, although the model gives them a probability; and their share stays in (2)."""
        self.never = torch.tensor(sorted(ids), dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def sync(self, policy):
        """Copies the weights of `policy.model`, sharded by FSDP2 or not, layer by layer. All ranks call it together.

        Raises:
            ValueError: the policy lacks a weight.
        """
        self._allocate_weights()
        missing = dict(self.model.named_parameters())
        missing.update(self.model.named_buffers())
        for name, module in list(policy.named_modules()):
            if isinstance(module, FSDPModule):
                module.unshard()  # its own parameters become whole, in the precision the policy computes in
                self._copy_whole(name, module, missing)
                module.reshard()
            elif module is policy:
                self._copy_whole(name, module, missing)
        if missing:
            raise ValueError(f"the policy has no {sorted(missing)[:5]}")
        self._allocate_slots()  # last, for until now the policy's modules have been gathered one by one
        self.synced = True

    def _copy_whole(self, prefix, module, missing):
        """Copies into the tensors of `missing`, {name: tensor}, what a module of the policy holds whole of them."""
        for tensors in (module.named_parameters, module.named_buffers):
            for name, tensor in tensors(prefix):
                name = name.removeprefix("model.")  # the policy's model
                if name in missing and not isinstance(tensor, DTensor):
                    target = missing.pop(name)
                    target.copy_(own_part(tensor, target.shape, self.group))

    def _allocate_weights(self):
        """Memory for the weights: for the first time, or again."""
        if not self.weight_storages:
            self.model.to_empty(device=self.device)
            self.model.eval().requires_grad_(False)
            self.model.tie_weights()
            if self.device.type == "cuda":
                self._compile()
            self.weight_storages = _storages([*self.model.parameters(), *self.model.buffers()])
        _resize(self.weight_storages)

    def _allocate_slots(self):
        """Memory for keys and values, likewise."""
        if not self.slot_storages:
            self.cache.allocate(self.device)
            self.slot_storages = _storages(self.cache.buffers())
        _resize(self.slot_storages)
        self.cache.clear()

    def release(self):
        """Gives the memory of weights, slots and graphs back, until the next `sync`. What is in `groups` stays.

        The tensors stay as well, without memory. So does all that torch.compile has made for them: graphs are captured
        again, but nothing is compiled again.
        """
        self.graphs.clear()
        for storage, _ in self.weight_storages + self.slot_storages:
            storage.resize_(0)
        self.synced = False
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # gives the graphs' pool back too; NCCL allocates outside of PyTorch
            self.pool = torch.cuda.graph_pool_handle()  # a pool takes no new graphs once all of its graphs are gone

    @torch.no_grad()
    def sample(self, prompts, params, step=0, indices=None, enough=None, stop=None):
        """Samples params.n completions of each prompt.

        Args:
            prompts: token ids of each prompt. params: the SamplingParams.
            step: a number for the noise of these prompts; of an RL run, the optimizer step that asks.
            indices: a number for each prompt, by default its place in the list; with several ranks, its place among
                the prompts of all, so that no two have the same noise.
            enough: return when this many prompts have all their completions, and those too that params.max_staleness
                waits for. What is unfinished then is kept, and continued by the next call, its first tokens prefilled
                again under the weights of then.
            stop: called between steps; if it returns true, on any rank of the group, `sample` returns early, as with
                `enough`.

        Returns:
            list of Completion, those of a prompt side by side, prompts in the order in which they were asked for. With
            `enough` those of exactly so many prompts, kept ones included: of the finished ones those that were asked
            for first. The other finished ones are kept too.

        Raises:
            ValueError: an empty prompt, one that leaves no room within max_length or has unknown ids, the same
                (step, index) twice, no `sync` yet, or logits that are not finite.
        """
        if not self.synced:
            raise ValueError("sample needs a sync before it")
        if indices is None:
            indices = range(len(prompts))
        self._add(prompts, params.n, step, indices)
        if enough is None or enough > len(self.groups):
            enough = len(self.groups)

        # What is to be done, in the order in which it was asked for, beginning with what is kept from earlier calls.
        self.step = int(step)
        unfinished = {}  # key: how many completions are not done
        waiting = deque()  # Completions without a slot
        late = set()  # keys of the prompts to wait for
        for key, group in self.groups.items():
            rest = [completion for completion in group if not completion.done]
            waiting.extend(rest)
            unfinished[key] = len(rest)
            if rest and self._is_late(group, params):
                late.add(key)
        complete = {key for key, count in unfinished.items() if count == 0}
        self.state.zero_()
        self.newest = None, None  # the slots may hold keys and values of other weights

        is_seen = os.isatty(2) and (not dist.is_initialized() or dist.get_rank() == 0)
        bar = tqdm(total=len(waiting), desc="rollout", unit="seq", delay=10, leave=False, disable=not is_seen)
        while len(complete) < enough or late:
            if stop is not None and self._any(stop()):
                break
            self._refill(waiting, params)
            self._run(params)
            if params.find_end is not None:
                self._cut(params.find_end)
            for completion in self._collect(only_done=True):
                bar.update()
                if params.on_end is not None:
                    params.on_end(completion)
                key = completion.step, completion.index
                unfinished[key] -= 1
                if unfinished[key] == 0:
                    complete.add(key)
                    late.discard(key)
        bar.close()
        self._collect(only_done=False)  # what is unfinished leaves its slot, and is kept in its group

        returned = [key for key in self.groups if key in complete][:enough]  # more may be complete
        completions = []
        for key in returned:
            completions += self.groups.pop(key)
        return completions

    @torch.no_grad()
    def score(self, sequences, temperature=1.0):
        """Log-probabilities of given tokens by (2), without sampling. Ranks that share a copy call it together.

        Args:
            sequences: token ids (L,) of each, of at least two tokens.

        Returns:
            [(L - 1,) float32 for each: of its second token given the first, of its third given both, ...].

        Raises:
            ValueError: no `sync` yet, a sequence that is too short, longer than max_length, or has unknown ids, or
                logits that are not finite.
        """
        if not self.synced:
            raise ValueError("score needs a sync before it")
        for number, ids in enumerate(sequences):
            if not 1 < len(ids) <= self.max_length:
                raise ValueError(f"sequence {number} has {len(ids)} tokens, not 2 to --max_length {self.max_length}")
            if min(ids) < 0 or max(ids) >= self.config.vocab_size:
                raise ValueError(f"sequence {number} has ids outside the vocabulary of {self.config.vocab_size}")
        head = self.model.get_output_embeddings().weight
        softcap = getattr(self.config, "final_logit_softcapping", None)
        scores = [None] * len(sequences)
        for first in range(0, len(sequences), self.slots):  # each has a slot of its own
            numbered = [(slot, np.asarray(ids[:-1])) for slot, ids in enumerate(sequences[first : first + self.slots])]
            for row in _pack(numbered):
                targets = np.concatenate([sequences[first + slot][1:] for slot, _ in row])
                targets = torch.from_numpy(targets.astype(np.int64)).to(self.device)
                logprobs, _ = linear_logprobs(self._read(row), head, targets, temperature or 1, softcap)
                if not logprobs.isfinite().all():
                    raise ValueError("the model's logits are not finite")
                ends = np.cumsum([len(ids) for _, ids in row])
                for (slot, _), part in zip(row, np.split(logprobs.cpu().numpy(), ends[:-1]), strict=True):
                    scores[first + slot] = part
        return scores

    def state_dict(self):
        """What is kept between calls, as plain tensors and numbers; small, since keys and values are made again.

        Returns {"completions": [{field: value}, ...]}, the fields of Completion, those of a (step, index) side by side.
        """
        completions = []
        for group in self.groups.values():
            for completion in group:
                fields = dict(vars(completion))
                for name in ARRAYS:
                    fields[name] = torch.from_numpy(fields[name])
                completions.append(fields)
        return {"completions": completions}

    def load_state_dict(self, state):
        """Continues from `state_dict()`; on a CPU bit for bit."""
        self.groups = {}
        for fields in state["completions"]:
            fields = dict(fields)
            for name in ARRAYS:
                fields[name] = fields[name].numpy()
            completion = Completion(**fields)
            self.groups.setdefault((completion.step, completion.index), []).append(completion)

    def _any(self, flag):
        """Whether the flag is set on any rank that shares this copy: they have to stop together."""
        return flag if self.group is None else any_of(flag, self.group)

    # ------------------------------------------------------------------------------------ from prompts to slots

    def _add(self, prompts, n, step, indices):
        """Puts down what is asked for in `groups`."""
        step = int(step)
        for ids, index in zip(prompts, indices, strict=True):
            ids = np.array(ids, dtype=np.int64)
            index = int(index)
            if not 0 < len(ids) < self.max_length:
                raise ValueError(
                    f"prompt {index} has {len(ids)} tokens: a prompt needs one, and room for its completion within "
                    f"--max_length {self.max_length}"
                )
            if ids.min() < 0 or ids.max() >= self.config.vocab_size:
                raise ValueError(f"prompt {index} has token ids outside the vocabulary of {self.config.vocab_size}")
            if (step, index) in self.groups:
                raise ValueError(f"prompt {index} of step {step} is there twice")
            no_ids = np.zeros(0, dtype=np.int64)
            no_logprobs = np.zeros(0, dtype=np.float32)
            self.groups[step, index] = [Completion(step, index, i, ids, no_ids, no_logprobs) for i in range(n)]

    def _is_late(self, group, params):
        """Whether a prompt was begun at least max_staleness steps ago."""
        begun = [completion.begun for completion in group if completion.begun is not None]
        return params.max_staleness is not None and self.step - min(begun, default=self.step) >= params.max_staleness

    def _refill(self, waiting, params):
        """Gives free slots to sequences that wait; when none wait any more, closes the gaps instead."""
        free = [slot for slot, completion in enumerate(self.active) if completion is None]
        if len(free) < min(len(waiting), self.slots // 16):
            return  # few at a time would make many small prefills
        self._fill(free, waiting, params)
        if not waiting:
            self._close_gaps(free)

    def _fill(self, free, waiting, params):
        """Moves sequences from `waiting` to slots in `free`, as far as either lasts, and prefills them."""
        key, slot = self.newest
        if key and not self.cache.keeps(len(self.groups[key][0].prompt_ids) + params.max_new_tokens):
            self.newest = None, None  # in a ring, the prompt's keys may have been overwritten since
        entering = []  # (slot, Completion)
        to_prefill = []  # (slot, token ids)
        sources = []  # slots that hold the keys and values which those in `targets` need
        targets = []
        while free and waiting:
            completion = waiting.popleft()
            key = completion.step, completion.index
            # A prompt's samples wait side by side, so its keys and values are still in the slot that it was prefilled
            # to; that one is taken first when it is free, lest another prompt gets it in this very call.
            newest, source = self.newest
            slot = _take(free, source)
            if key != newest or len(completion.token_ids):  # another prompt; or, of a kept one, tokens of its own
                ids = np.concatenate([completion.prompt_ids, completion.token_ids])
                to_prefill.append((slot, ids[:-1]))
                has_prompt = not len(completion.token_ids) or self.cache.keeps(len(ids))
                self.newest = (key, slot) if has_prompt else (None, None)
            elif slot != source:
                sources.append(source)
                targets.append(slot)
            if completion.begun is None:
                completion.begun = self.step
            self.active[slot] = completion
            entering.append((slot, completion))
        self._write(entering, params)
        self._prefill(to_prefill)
        self._copy(sources, targets)

    def _write(self, entering, params):
        """Writes [(slot, Completion), ...] to the device, in one go: tokens, log-probabilities and state."""
        if not entering:
            return
        slots = [slot for slot, _ in entering]
        width = max(len(c.prompt_ids) + len(c.token_ids) for _, c in entering)
        ids = np.zeros((len(slots), width), dtype=np.int64)
        logprobs = np.zeros((len(slots), width), dtype=np.float32)
        state = np.zeros((len(slots), COLUMNS), dtype=np.int32)
        for row, (_, completion) in enumerate(entering):
            start = len(completion.prompt_ids)
            end = start + len(completion.token_ids)
            ids[row, :start] = completion.prompt_ids
            ids[row, start:end] = completion.token_ids
            logprobs[row, start:end] = completion.logprobs
            limit = min(start + params.max_new_tokens, self.max_length) - 1
            state[row, POSITION] = end - 1
            state[row, LIMIT] = limit
            state[row, LIVE] = end - 1 < limit
            state[row, KEY:] = _keys(params.seed, completion)
        self.ids[slots, :width] = torch.from_numpy(ids).to(self.device)
        self.logprobs[slots, :width] = torch.from_numpy(logprobs).to(self.device)
        self.state[slots] = torch.from_numpy(state).to(self.device)

    def _prefill(self, sequences):
        """Stores the keys and values of [(slot, token ids), ...]."""
        for row in _pack(sequences):
            self._read(row)

    def _read(self, row):
        """Hidden states (T, H) of [(slot, token ids), ...], T tokens in all; their keys and values go to the slots."""
        lengths = [len(ids) for _, ids in row]
        ids = np.concatenate([ids for _, ids in row])
        slots = np.repeat([slot for slot, _ in row], lengths)
        positions = np.concatenate([np.arange(length) for length in lengths])
        followers = np.repeat(lengths, lengths) - positions - 1
        starts = np.cumsum([0, *lengths])
        ids, slots, positions, starts = (torch.from_numpy(x).to(self.device) for x in (ids, slots, positions, starts))
        self.cache.begin(slots, positions, followers=followers)
        with torch.compiler.set_stance("force_eager"):  # every row is of another length
            packed = {"cu_seq_lens_q": starts.int(), "max_length_q": max(lengths)}
            return _hidden(self.model, self.cache, ids[None], positions[None], **packed)[0]

    def _close_gaps(self, free):
        """Moves the last sequences to the first free slots, so that a shorter batch is decoded."""
        sources = []
        targets = []
        used = self._used()
        while used and free and used[-1] > free[0]:
            source = used.pop()
            target = free.pop(0)
            self.active[target] = self.active[source]
            self.active[source] = None
            sources.append(source)
            targets.append(target)
        if not sources:
            return
        self._copy(sources, targets)
        for buffer in (self.ids, self.logprobs, self.state):
            buffer[targets] = buffer[sources]

    def _copy(self, sources, targets):
        """Keys and values from slot to slot."""
        if sources:
            longest = int(self.state[sources, POSITION].max())
            self.cache.copy(sources, targets, longest)

    def _used(self):
        """Slots that hold a sequence, in order."""
        return [slot for slot, completion in enumerate(self.active) if completion is not None]

    # ----------------------------------------------------------------------------------------------- decoding

    def _run(self, params):
        """Decodes until the host looks again: one step on CPU, LOOK_EVERY on CUDA, there as replays of a CUDA graph."""
        used = self._used()
        if self.device.type != "cuda":
            reach = int(self.state[used, POSITION].max()) + 1
            self._decode(used[-1] + 1, reach, params.temperature, params.top_p)
            return
        n = next(size for size in self.sizes if size > used[-1])
        shape = n, self.max_length, params.temperature, params.top_p
        for _ in range(LOOK_EVERY):
            if shape in self.graphs:
                self.graphs[shape].replay()
            else:
                self._decode(*shape)  # this is one of the steps, and the warm-up; capturing computes nothing
                self.graphs[shape] = self._capture(shape)

    def _capture(self, shape):
        """The CUDA graph of `_decode(*shape)`."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self._decode(*shape)
        return graph

    def _decode(self, n, reach, temperature, top_p=1.0):
        """One token for each of the first n slots, of which none has gone beyond `reach` positions."""
        rows = torch.arange(n, device=self.device)
        positions = self.state[:n, POSITION].long()
        last = torch.where(self.state[:n, LIVE].bool(), positions, 0)  # of what has ended nothing more is read
        self.cache.begin(rows, positions, reach, last)
        ids = self.ids[rows, positions]
        hidden = _hidden(self.model, self.cache, ids[:, None], positions[:, None])[:, 0]  # (n, H)
        logits = _matmul(hidden, self.model.get_output_embeddings().weight.T)  # (n, V)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        rules = Rules(temperature, softcap, self.eos, self.never, self.group, top_p)
        self.advance(logits, self.state, self.ids, self.logprobs, rules)

    def _cut(self, find_end):
        """Ends each sequence in a slot where `find_end` finds an end, and drops what was sampled behind it."""
        state = self.state.cpu().numpy()
        used = self._used()
        ids = self.ids[used].cpu().numpy()
        slots = []
        ends = []  # position of the last token that stays
        for row, slot in enumerate(used):
            completion = self.active[slot]
            start = len(completion.prompt_ids)
            seen = len(completion.token_ids)
            completion.token_ids = ids[row, start : state[slot, POSITION] + 1].copy()
            length = find_end(completion.token_ids, seen)
            if length is not None:
                completion.ended = True
                slots.append(slot)
                ends.append(start + length - 1)
        if slots:
            self.state[slots, POSITION] = torch.tensor(ends, dtype=torch.int32, device=self.device)
            self.state[slots, LIVE] = 0

    def _collect(self, only_done):
        """Takes sequences out of their slots, the finished ones or all, and reads what was sampled from the device.

        Returns their Completions.
        """
        state = self.state.cpu().numpy()
        slots = [slot for slot in self._used() if not only_done or not state[slot, LIVE]]
        if not slots:
            return []
        width = state[slots, POSITION].max() + 1
        ids = self.ids[slots, :width].cpu().numpy()
        logprobs = self.logprobs[slots, :width].cpu().numpy()
        completions = []
        for row, slot in enumerate(slots):
            completion = self.active[slot]
            self.active[slot] = None
            start = len(completion.prompt_ids)
            end = state[slot, POSITION] + 1
            completion.token_ids = ids[row, start:end].copy()
            completion.logprobs = logprobs[row, start:end].copy()
            if not np.isfinite(completion.logprobs).all():
                where = f"prompt {completion.index} of step {completion.step}"
                raise ValueError(f"{where}: the model's logits are not finite")
            completion.done = not state[slot, LIVE]
            if completion.done and int(completion.token_ids[-1]) in self.eos_ids:
                completion.ended = True
            completions.append(completion)
        return completions

    def _compile(self):
        """Compiles what a decode step does: each decoder layer, and the draw; at the first step of each size."""
        join_products(self.model)
        for layer in self.model.base_model.layers:
            layer.compile(dynamic=False)
        self.advance = torch.compile(_advance, dynamic=False)
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None


# --------------------------------------------------------------------------------------------------------- sampling


class Rules(NamedTuple):
    """How the next token is drawn: the same for all slots."""

    temperature: float  # τ of (1); 0: greedy
    softcap: float | None  # c of (1)
    eos: torch.Tensor  # (E,) tokens that end a completion
    never: torch.Tensor  # (K,) tokens that are not drawn
    group: dist.ProcessGroup | None = None  # of the ranks that draw together
    top_p: float = 1.0  # 1: all tokens


def _advance(logits, state, ids, logprobs, rules):
    """Draws the next token of each of the first n slots, and writes down what follows, in place.

    Args:
        logits: (n, V). state: (B, COLUMNS). ids, logprobs: (B, L), see Sampler. rules: the Rules.
    """
    n = len(logits)
    rows = torch.arange(n, device=logits.device)
    state = state[:n]
    keys = state[:, KEY:]
    positions = state[:, POSITION] + 1
    tokens, token_logprobs = _draw(logits, keys, positions, rules)
    # A finished sequence stays where it is, and its slot as it is.
    live = state[:, LIVE].bool()
    positions = (state[:, POSITION] + live).long()
    ids[rows, positions] = torch.where(live, tokens, ids[rows, positions])
    logprobs[rows, positions] = torch.where(live, token_logprobs, logprobs[rows, positions])
    has_ended = (tokens[:, None] == rules.eos).any(dim=1)
    is_cut_off = positions >= state[:, LIMIT]
    state[:, POSITION] = positions.int()
    state[:, LIVE] = (live & ~(has_ended | is_cut_off)).int()


def _draw(logits, keys, positions, rules):
    """Sampled tokens (n,) and their log-probabilities (n,), from float32 logits (n, V); greedy at temperature 0."""
    z = logits
    if rules.softcap is not None:
        z = rules.softcap * torch.tanh(logits / rules.softcap)
    z = z / (rules.temperature or 1)  # (1)
    logsumexp = z.logsumexp(dim=1)
    choices = z.index_fill(1, rules.never, -torch.inf) if len(rules.never) else z
    if rules.temperature == 0:
        tokens = choices.argmax(dim=1)
    else:
        p = (choices - logsumexp[:, None]).exp()
        if rules.top_p < 1:
            p = _nucleus(p, rules.top_p)
        e = _waiting_times(keys, positions, z.shape[1])
        tokens = (p / e).argmax(dim=1)  # (4)
    if rules.group is not None:
        agree(tokens, rules.group)
    token_z = z.gather(1, tokens[:, None])[:, 0]
    return tokens, token_z - logsumexp  # (2)


def _nucleus(p, top_p):
    """p (n, V) with 0 for all but the fewest tokens, the likeliest first, that reach top_p together.

    Tokens as likely as the last of them stay, too.
    """
    largest = p.sort(dim=1, descending=True).values
    before = largest.cumsum(dim=1) - largest  # what likelier tokens have together
    last = torch.where(before < top_p, largest, torch.inf).amin(dim=1)
    return torch.where(p < last[:, None], 0, p)


def _waiting_times(keys, positions, V):
    """(n, V) exponential numbers by (3), a function of the int32 keys (n, 2) and positions (n,) alone."""
    a = _mix(keys[:, 0] ^ _mix(positions))
    b = _mix(keys[:, 1] ^ a) | 1
    v = _mix(torch.arange(V, dtype=torch.int32, device=keys.device))
    return _exponential(_mix((v ^ a[:, None]) * b[:, None]))


def _exponential(x):
    """Exponential numbers e of (3) from int32 hashes x, of which 31 bits count.

    Small u are finely spaced, since they decide about rare tokens. Large ones are not: where 1 - u is below 2^-25, 3 in
    10^8, u is 1 in float32 and e would be infinite, so that a token of probability 1 lost to any other. The numbers
    beyond 25 log 2 = 17.3 that e stands for there have the mean 18.3.
    """
    u = ((x & 0x7FFFFFFF) + 0.5) * 2**-31
    return (-torch.log1p(-u)).clamp(max=LONGEST_WAIT)


def _mix(x):
    """A bijection of int32 whose output looks random ("lowbias32", Chris Wellons, hash-prospector, public domain)."""
    # >> is arithmetic: the masks make it logical. The second factor is 0x846CA68B as an int32.
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


def _keys(seed, completion):
    """The two int32 keys of a completion's noise."""
    numbers = struct.pack("<4q", seed, completion.step, completion.index, completion.sample)
    return struct.unpack("<2i", hashlib.blake2b(numbers, digest_size=8).digest())


# ------------------------------------------------------------------------------------------------------- the model


def footprint(config, max_length, dtype, tp=1):
    """(bytes of the weights, bytes of one slot) on each of `tp` ranks that share a copy. ValueError as Sampler."""
    return _bytes(*_build(config, 1, max_length, dtype, tp))


def _build(config, slots, max_length, dtype, t, group=None):
    """(model, Slots) of one of t ranks, on meta, where nothing has memory. Without a group they are not connected."""
    _check_config(config, max_length)
    with torch.device("meta"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(divide(config, t), attn_implementation="slots", dtype=dtype)
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            raise ValueError("the model's head has a bias, which is not supported")
        if t > 1:
            whole = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
            divided_modules(model, whole)  # raises ValueError for what cannot be divided
        cache = Slots(slots, max_length)
        zeros = torch.zeros(1, dtype=torch.int64)
        cache.begin(zeros, zeros, max_length)
        try:
            _hidden(model, cache, zeros[None], zeros[None])  # makes the buffers: their shapes
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(f"the sampler does not support {config.model_type}: {error}") from None
        if len(cache.layers) != config.num_hidden_layers:
            raise ValueError(f"the sampler does not support {config.model_type}: not every layer keeps keys and values")
        if group is not None:
            connect(model, whole, group)
    return model, cache


def _hidden(model, cache, ids, positions, **kwargs):
    """Last hidden states; keys and values go to the slots."""
    output = model.base_model(
        input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, slots=cache, **kwargs
    )
    return output.last_hidden_state


def _bytes(model, cache):
    """(of weights, of keys and values)."""
    weights = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    return weights, sum(x.nbytes for x in cache.buffers())


# ---------------------------------------------------------------------------------------------------------- helpers


def _storages(tensors):
    """[(storage, bytes), ...] behind these tensors, some of which may share one."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return [(storage, storage.nbytes()) for storage in storages.values()]


def _resize(storages):
    """Gives every storage its size, if it has another one."""
    for storage, size in storages:
        if storage.nbytes() != size:
            storage.resize_(size)


def _take(free, preferred):
    """Takes a slot out of the list of free ones, and returns it: `preferred` if that is free, otherwise the first."""
    slot = preferred if preferred in free else free[0]
    free.remove(slot)
    return slot


def _pack(sequences):
    """Divides [(slot, token ids), ...] into rows of at most PREFILL_TOKENS tokens (or one sequence), longest first.

    Sequences of equal length stand side by side; those without a token are left out.
    """
    sequences = [sequence for sequence in sequences if len(sequence[1])]
    sequences.sort(key=lambda sequence: len(sequence[1]))
    while sequences:
        row = [sequences.pop()]
        tokens = len(row[0][1])
        while sequences and tokens + len(sequences[-1][1]) <= PREFILL_TOKENS:
            row.append(sequences.pop())
            tokens += len(row[-1][1])
        yield row


def _precision(device):
    """What the policy computes in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _end_tokens(model, folder):
    """Ids of the tokens that end a completion: the generation config's, and the tokenizer's if there is one."""
    eos_ids = model.generation_config.eos_token_id
    if eos_ids is None:
        eos_ids = []
    elif isinstance(eos_ids, int):
        eos_ids = [eos_ids]
    eos_ids = set(eos_ids)
    try:
        cached_file(folder, "tokenizer_config.json")
    except OSError:  # no tokenizer: AutoTokenizer might make up an empty one, with an end token of its own
        return eos_ids
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is not None:
        eos_ids.add(tokenizer.eos_token_id)
    return eos_ids


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


def _check_memory(weights, cache, device, slots, max_length):
    """Before anything is allocated: is there room for so many bytes of weights, and of keys and values?"""
    free = free_bytes(device)
    if weights + cache > free:
        raise ValueError(
            f"rollouts need {weights / 2**30:.1f} GiB for weights and {cache / 2**30:.1f} GiB for keys and values, "
            f"{free / 2**30:.1f} GiB are free: lower --slots {slots} or --max_length {max_length}"
        )
