"""Rows → chat template → token sequences → microbatches. What every script shares, and nothing else. From the top:

    batches         batch_indices: which rows make up a step → deal: who gets which → Rows.sequences → pack: tensors
    chat templates  encoders: a row → a token sequence, checked; ChatFormat: messages → ids and mask, in one function
    reading rows    load_rows: files and Hub data sets → `Rows`, checked row by row; what is left out is counted
    folders         of models: load_config, read_weights, write_model; of runs: lock_run, prepare_run, what is damaged

A row comes the other way: it is read at the bottom, encoded in the middle, and packed at the top.

A *sequence* is token ids and, for each, whether it is trained on. A *microbatch* is T tokens that hold S sequences end
to end. Nothing is padded.
"""

import ast
import copy
import csv
import ctypes
import dataclasses
import difflib
import errno
import glob
import hashlib
import heapq
import inspect
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import stat
import sys
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import datasets
import huggingface_hub
import jinja2
import multiprocess.util
import numpy as np
import pyarrow.compute as pc
import tokenizers
import torch
import torch.distributed as dist
import transformers
from filelock import FileLock, Timeout
from jinja2 import nodes
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template
from transformers.utils.hub import get_checkpoint_shard_files

datasets.disable_progress_bars()  # leave the terminal to the training bar
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()  # read_weights checks what is missing; its report of that frightens

IGNORE = -100  # target of a token that is not trained on
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "environment")


class RunError(Exception):
    """Something the user has to mend. Scripts print it as one line, without secrets, and exit with code 1."""

    def __str__(self):
        return redact(super().__str__())


class DataError(RunError):
    """Bad input data.

    Args:
        path: the file or data set. row: 1-based line or row number, or None. message: what is wrong, naming the field.
    """

    def __init__(self, path, row, message):
        super().__init__(path, row, message)  # the plain arguments, so that it survives a worker process

    def __str__(self):
        path, row, message = self.args
        return redact(f"{path}: {message}" if row is None else f"{path}, row {row}: {message}")


class Skip(Exception):
    """Raised by an encoder for a row that is left out, with the reason; counted and printed, never silent."""


# What looks like a secret; the group is what stays of it. No pattern takes more than linear time.
SECRETS = [re.compile(pattern) for pattern in (
    # Keys that are known by how they begin: of Hugging Face, GitHub, GitLab, W&B, Slack, Google, NVIDIA, Groq, AWS,
    r"()(?<![A-Za-z0-9])(?:gh[oprsu]_|github_pat_|glpat-|wandb_v1_|xox[a-z]-|AIza|nvapi-|gsk_)[\w-]{10,}",
    r"()(?<![A-Za-z0-9])hf_[A-Za-z0-9]{10,}",
    r"()(?<![A-Za-z0-9])A[KS]IA[A-Z0-9]{12,}",
    r"()(?<![A-Za-z0-9])sk-(?=[\w-]{0,64}\d)[\w-]{20,}",  # OpenAI, Anthropic; names that begin so are shorter
    r"()(?<![\w-])eyJ[\w-]+\.[\w-]+\.[\w-]*",  # and JSON web tokens.
    # NAME=VALUE, also with %3D: api_key, HF_TOKEN, X-Amz-Signature; AccountKey; not monkey, not tokens
    r"""((?i:(?:(?<![a-z])|(?<=%3F))(?:api|auth|access)?(?:key|token|sig|signature|passw(?:or)?d|pwd|secret|"""
    r"""credential)(?:=|%3D)))[^&;\s"'<>]+""",
    r"""((?<=[a-z])(?:Key|Token|Signature|Password|Secret|Credential)(?:=|%3D))[^&;\s"'<>]+""",
    r"((?i:authorization: ?\w{1,20} |bearer ))[\w.~+/=-]{16,}",
    # scheme://USER:PASSWORD@host, https://TOKEN@host
    r"""((?i:[a-z]://|%3A%2F%2F))[^/?#\s"'<>]{1,500}(?=@|%40)""",
)]  # fmt: skip


def redact(value):
    """`value` (JSON-like; keys too) with "[redacted]" for whatever looks like a secret: for files and messages."""
    if isinstance(value, dict):
        return {redact(key): redact(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redact(entry) for entry in value]
    if isinstance(value, str):
        for pattern in SECRETS:
            value = pattern.sub(r"\1[redacted]", value)
    return value


LARGEST = 1e38  # that a flag may be, about float32's
RANGES = {  # of the flags that all scripts have
    "lr": (0, LARGEST), "warmup_ratio": (0, 1), "adam_betas": (0, 0.999999), "adam_eps": (1e-30, 1), "seed": (0, 1e18),
    "weight_decay": (0, LARGEST), "max_grad_norm": (0, LARGEST), "max_skip_frac": (0, 1), "epochs": (1e-9, 1e6),
    **dict.fromkeys("batch_size batch_tokens steps stop_step max_length tokens_per_microbatch".split(), (1, 1e9)),
    **dict.fromkeys(("eval_every", "save_every", "keep", "answers"), (0, 1e9)),
}  # fmt: skip


def check_ranges(args, ranges, above_zero=()):
    """Raises RunError for a flag whose number is not in its range, or NaN or infinite.

    Args:
        args: a script's Args. Of a tuple each number counts; what is no number is left.
        ranges: {flag: (lowest, highest)}; by default -LARGEST to LARGEST. above_zero: flags that may not be 0 either.
    """
    for flag, values in vars(args).items():
        lowest, highest = ranges.get(flag, (-LARGEST, LARGEST))
        for value in values if isinstance(values, tuple) else [values]:
            if not isinstance(value, int | float):
                continue
            bound = None
            if flag in above_zero and not value > 0:
                bound = "above 0"
            elif not value >= lowest:
                bound = f"at least {lowest}"
            elif not value <= highest:
                bound = f"at most {highest}"
            if bound:
                raise RunError(f"--{flag} {value} is out of range: {bound}")


def make_deterministic():
    """PyTorch's deterministic algorithms in this process; an operation that has none raises RuntimeError."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it is for debugging, and takes time


# ---------------------------------------------------------------------------------------------------------- batches


def batch_indices(num_rows, batch_size, seed, step, total_rows):
    """Rows of one optimizer step (numbered from 0), in the endless stream of epochs, each shuffled by (seed, epoch).

    The stream is cut at `total_rows` rows, so the last batch of a run may be smaller. Returns (B,) int array.
    """
    start = step * batch_size
    end = min(start + batch_size, total_rows)
    return stream(num_rows, seed, range(start, end))


def stream(num_rows, seed, positions):
    """The rows at some positions of that stream, (B,) int array."""
    rows = []
    for position in positions:
        epoch, place = divmod(position, num_rows)
        rows.append(_permutation(num_rows, seed, epoch)[place])
    return np.array(rows, dtype=np.int64)


@lru_cache(maxsize=2)  # a batch may lie in two epochs
def _permutation(num_rows, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def deal(lengths, tokens_per_microbatch, world_size=1):
    """Packs sequences into microbatches and deals them to ranks, the same number to each.

    Longest first, each sequence goes to the microbatch with the fewest tokens; the number of microbatches grows until
    all fit. A sequence longer than the budget gets a microbatch of its own. How sequences are grouped cannot change the
    loss, which is divided by counts over the whole batch.

    Args:
        lengths: (N,) tokens in each sequence.
        tokens_per_microbatch: the budget; 1 means one sequence each.
        world_size: number of ranks.

    Returns:
        per rank a list of microbatches, each a list of positions in `lengths`; the same length for every rank. A
        microbatch may be empty when there are fewer sequences than places. In each, the longest come first.
    """
    lengths = np.asarray(lengths)
    longest_first = np.argsort(-lengths, kind="stable").tolist()
    sizes = lengths.tolist()
    fewest = _fewest_microbatches(lengths, tokens_per_microbatch)
    per_rank = max(1, math.ceil(fewest / world_size))
    while True:
        microbatches = _fill(sizes, longest_first, per_rank * world_size, tokens_per_microbatch)
        if microbatches is not None:
            return [microbatches[rank::world_size] for rank in range(world_size)]
        per_rank += max(1, per_rank // 100)  # a hundredth more, so that a million sequences take few attempts


def deal_by_source(rows, tokens_per_microbatch):
    """This rank's share of all `rows` as [(source, indices of its rows), ...]: microbatches, none of two sources."""
    dealt = []
    for source, members in rows.by_source().items():
        microbatches = deal(rows.lengths[members], tokens_per_microbatch, dist.get_world_size())[dist.get_rank()]
        dealt += [(source, members[places]) for places in microbatches]
    return dealt


def means_by_source(sums, rows, weights):
    """{"eval_METRIC": mean over all rows}, and where they have several sources, "eval_METRIC/SOURCE" of each.

    Args:
        sums: {"METRIC/SOURCE": the sum over a source's rows}. weights: (N,) what each row adds to the denominators.
    """
    totals = {source: float(weights[members].sum()) for source, members in rows.by_source().items()}
    means, of_sources = {}, {}
    for name, value in sums.items():
        metric, _, source = name.partition("/")
        means[f"eval_{metric}"] = means.get(f"eval_{metric}", 0.0) + value / sum(totals.values())
        if len(totals) > 1:
            of_sources[f"eval_{name}"] = value / totals[source]
    return means | of_sources


def _fewest_microbatches(lengths, budget):
    """A lower bound on the number of microbatches: where `deal` begins, to save attempts."""
    fewest = np.minimum(lengths, budget).sum() / budget
    for k in range(1, 9):  # at most k sequences longer than budget / (k + 1) share a microbatch
        long = np.sum(lengths * (k + 1) > budget)
        fewest = max(fewest, long / k)
    return fewest


def _fill(sizes, longest_first, count, budget):
    """`count` microbatches, lists of positions in `sizes`; None if that is too few."""
    microbatches = [[] for _ in range(count)]
    heap = [(0, m) for m in range(count)]  # (tokens, microbatch), the emptiest on top
    for i in longest_first:
        tokens, m = heap[0]
        if tokens and tokens + sizes[i] > budget:
            return None  # not even the emptiest has room
        microbatches[m].append(i)
        heapq.heapreplace(heap, (tokens + sizes[i], m))
    return microbatches


@dataclass
class Rows:
    """Encoded rows of all sources, mixed, with an account of what was left out. Made by `load_rows`.

    Attributes:
        table: the encoder's columns, plus `source` and `row` (where each came from). One entry a kept row.
        sources: names of the sources.
        lengths: (N,) int, tokens in each row (of a pair: in both sequences).
        trained: (N,) int, *how many* tokens of each row have a target; the mask itself is in `sequences`.
        report: lines that say what was read, kept, skipped and noted.
        fingerprint: hash of all that was encoded.
    """

    table: datasets.Dataset
    sources: list
    lengths: np.ndarray
    trained: np.ndarray
    report: list
    fingerprint: str

    def __len__(self):
        return len(self.table)

    def where(self, i):
        """'file.jsonl, row 17' for row i."""
        entry = self.table[int(i)]
        return f"{self.sources[entry['source']]}, row {entry['row']}"

    def by_source(self):
        """{NAME: (n,) the rows of a source}. NAME: its last part without ending; all of it if others end so, too."""
        of_row = self.table.with_format("numpy")["source"][:]  # (N,)
        numbers = {}  # {source: its numbers}; one that is given twice is one
        for number in np.unique(of_row):
            numbers.setdefault(self.sources[number], []).append(number)
        short = {source: Path(source).name.partition(".")[0] for source in numbers}
        names = {source: name if [*short.values()].count(name) == 1 else source for source, name in short.items()}
        return {names[source]: np.flatnonzero(np.isin(of_row, numbers[source])) for source in numbers}

    def keep(self, indices):
        """Leaves out all rows but those at `indices`, in place. The fingerprint stays that of all."""
        self.table = self.table.select(indices)
        self.lengths = self.lengths[indices]
        self.trained = self.trained[indices]

    def sequences(self, indices):
        """[(input_ids (L,), trained (L,) bool), ...] of the rows at `indices`. A pair is two: chosen, then rejected."""
        columns = ["input_ids", "trained"]
        if "chosen_length" in self.table.column_names:
            columns.append("chosen_length")
        batch = self.table.with_format("numpy", columns=columns)[list(indices)]
        if "chosen_length" not in columns:
            return list(zip(batch["input_ids"], batch["trained"], strict=True))
        sequences = []
        for ids, mask, cut in zip(batch["input_ids"], batch["trained"], batch["chosen_length"], strict=True):
            sequences.append((ids[:cut], mask[:cut]))
            sequences.append((ids[cut:], mask[cut:]))
        return sequences


def pack(sequences, device, *extras):
    """Makes a microbatch of [(input_ids (L,), trained (L,)), ...]; of no sequences, one token that trains nothing.

    This is the only place where states and targets are shifted: targets[t] = input_ids[t+1]. Numbers of a token that
    are needed where it is predicted, (L,) arrays behind `trained` in each sequence, named by `extras`, shift with it;
    they are 0 where nothing is trained.

    Raises:
        ValueError: a sequence has more or fewer arrays than `extras` has names.
    """
    if not sequences:
        no_numbers = [np.zeros(1) for _ in extras]
        sequences = [(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=bool), *no_numbers)]
    ids, masks, *numbers = zip(*sequences, strict=True)  # each over all sequences; of `numbers` one for each extra
    lengths = [len(array) for array in ids]

    def tensor(arrays, dtype):
        return to_device(torch.from_numpy(np.concatenate(arrays).astype(dtype)), device)

    shifted = {}
    for name, arrays in zip(extras, numbers, strict=True):
        shifted[name] = tensor(_shift(arrays, masks, fill=0), np.float32)
    targets = _shift(ids, masks, fill=IGNORE)
    return Microbatch(
        input_ids=tensor(ids, np.int64),
        position_ids=tensor([np.arange(length) for length in lengths], np.int64),
        cu_seqlens=tensor([[0], np.cumsum(lengths)], np.int32),
        max_length=max(lengths),
        targets=tensor(targets, np.int64),
        trained=tensor(np.nonzero(np.concatenate(targets) != IGNORE), np.int64),
        extras=shifted,
    )


def to_device(tensor, device):
    """A tensor of the host on another device. The host does not wait until a GPU has done what it was given before."""
    if torch.device(device).type != "cpu":
        tensor = tensor.pin_memory()  # only from such memory does the GPU copy by itself
    return tensor.to(device, non_blocking=True)


def _shift(arrays, masks, fill):
    """What stands at a trained token moves to the state before it, which predicts it; `fill` everywhere else."""
    shifted = []
    for array, mask in zip(arrays, masks, strict=True):
        behind = np.where(mask[1:], array[1:], fill)
        shifted.append(np.append(behind, fill))  # nothing follows the last state
    return shifted


@dataclass
class Microbatch:
    """T tokens that hold S sequences end to end; position t holds the state that predicts targets[t].

    Attributes:
        input_ids: (T,) int64.
        position_ids: (T,) int64, from 0 in each sequence.
        cu_seqlens: (S+1,) int32, where each sequence begins, and T.
        max_length: longest sequence, in tokens.
        targets: (T,) int64, the next token where it is trained on, otherwise -100.
        trained: (N,) int64, the positions t where that is. To find them on a GPU, the host would have to wait for it.
        extras: {name: (T,) float32}, other numbers of the tokens, where their targets are.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int
    targets: torch.Tensor
    trained: torch.Tensor
    extras: dict

    def model_inputs(self):
        """Keyword arguments for a transformers model with packed attention."""
        return {
            "input_ids": self.input_ids[None],
            "position_ids": self.position_ids[None],
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.max_length,
            "max_length_k": self.max_length,
            "use_cache": False,
        }


# --------------------------------------------------------------------------------------------------- chat templates

TOO_LONG = "longer than --max_length"
TRUNCATED = "truncated to --max_length"


class Encoder:
    """What encoders (row → token sequences, for `load_rows`) share: their settings.

    Args:
        chat: the ChatFormat. vocab_size: rows of the model's embedding, which every id must be below.
        max_length: longest sequence, in tokens. overlong: "truncate" longer ones (counted) or "drop" them (counted).
        train_turns: which assistant turns of a conversation are trained on, "all" or the "last".

    Raises:
        RunError: the chat template cannot say which tokens are the assistant's.
    """

    features = {
        "input_ids": datasets.List(datasets.Value("int32")),
        "trained": datasets.List(datasets.Value("bool")),
    }
    needs_mask = True

    def __init__(self, chat, vocab_size, max_length, overlong, train_turns="all"):
        if self.needs_mask and chat.untrainable:
            raise RunError(chat.untrainable)
        self.chat = chat
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.overlong = overlong
        self.train_turns = train_turns
        self.key = json.dumps([type(self).__name__, chat.key, vocab_size, max_length, overlong, train_turns])

    def check_ids(self, ids):
        """Raises ValueError if the model's embedding has no row for one of the token ids."""
        if max(ids) >= self.vocab_size:
            raise ValueError(f"token id {max(ids)} is outside the model's vocabulary of {self.vocab_size}")


class SftEncoder(Encoder):
    """Row {messages, tools?, chat_template_kwargs?} → one sequence, with the assistant's turns trained on.

    In place of `messages`: `conversations` (role/content or from/value), or `prompt` and `completion`.
    """

    def __call__(self, row):
        """Raises ValueError and Skip."""
        messages = read_conversation(row)
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError("messages has no assistant turn: there is nothing to train on")
        ids, trained, notes = encode_conversation(self, messages, row, self.train_turns == "last")
        return {"input_ids": ids, "trained": trained, "notes": notes}


class PairEncoder(Encoder):
    """Row {chosen, rejected, prompt?, tools?, margin?, subset?} → two sequences end to end, last answers trained.

    `chosen` and `rejected` are whole conversations that differ in the last assistant turn, or, with a `prompt`
    (messages, or a string: one user message), just answers (an assistant message in a list, or a string).
    """

    features = {
        **Encoder.features,
        "chosen_length": datasets.Value("int32"),
        "margin": datasets.Value("float32"),
        "subset": datasets.Value("string"),
    }

    def __call__(self, row):
        """Raises ValueError and Skip."""
        chosen = self._conversation(row, "chosen")
        rejected = self._conversation(row, "rejected")
        if chosen[:-1] != rejected[:-1]:
            raise Skip("chosen and rejected differ before their last turn")
        margin = row.get("margin")
        margin = 0.0 if margin is None else margin
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
            raise ValueError(f"margin is {margin!r}, expected a finite number")
        subset = row.get("subset") or ""
        if not isinstance(subset, str):
            raise ValueError(f"subset is {_kind(subset)}, expected a string")
        ids, trained, notes = encode_conversation(self, chosen, row, last_turn_only=True)
        rejected_ids, rejected_trained, rejected_notes = encode_conversation(self, rejected, row, last_turn_only=True)
        if ids == rejected_ids:
            if chosen == rejected:
                raise Skip("chosen and rejected are the same")
            raise Skip("chosen and rejected are the same within --max_length")
        return {
            "input_ids": ids + rejected_ids,
            "trained": trained + rejected_trained,
            "chosen_length": len(ids),
            "margin": margin,
            "subset": subset,
            "notes": sorted({*notes, *rejected_notes}),
        }

    @staticmethod
    def _conversation(row, field):
        """The whole conversation with `field`'s answer."""
        prompt = row.get("prompt")
        if row.get(field) is None:
            raise ValueError(f"{field} is missing or null; {_columns(row)}")
        if isinstance(row[field], str) and prompt is None:
            raise ValueError(f"{field} is a string, so the row needs a field 'prompt'; {_columns(row)}")
        answer = read_messages(row[field], field, "assistant")
        first = answer[0]["role"]
        last = answer[-1]["role"]
        if last != "assistant":
            raise ValueError(f"{field} ends with a {last} message, expected the assistant's answer")
        if first != "assistant":
            return answer  # a whole conversation already; a prompt beside it is a copy
        if prompt is None:
            raise ValueError(f"{field} begins with a {first} message, so the row needs a field 'prompt'")
        return [*read_messages(prompt, "prompt", "user"), *answer]


class PromptEncoder(Encoder):
    """Row {messages or prompt, dataset, ground_truth, weights?, tools?} → the prompt, and as JSON what judges answers.

    A last assistant turn is left out of the prompt. `max_length` is that of prompts, and longer ones are dropped: a
    truncated question is another one. `overlong` is not used. Any template that renders a prompt will do.

    Args:
        make_job: (row, messages of the prompt) → a JSON-able list, what judges answers; picklable, with a `key`. By
            default `row_job`. rewards.environment.RowJobs is one that also reads flags.
    """

    features = {**Encoder.features, "job": datasets.Value("string")}
    needs_mask = False

    def __init__(self, chat, vocab_size, max_length, overlong, make_job=None):
        super().__init__(chat, vocab_size, max_length, overlong)
        self.make_job = make_job or row_job
        self.key = json.dumps([self.key, getattr(make_job, "key", None)])

    def __call__(self, row):
        """Raises ValueError and Skip."""
        refuse_media(row)
        messages = read_conversation(row, needs_answer=False)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages or messages[-1]["role"] in ("system", "developer", "assistant"):
            raise ValueError("messages has no question: a prompt ends with a user's or a tool's message")
        ids = self.chat.prompt(messages, parse_tools(row), read_options(row))
        self.check_ids(ids)
        if len(ids) > self.max_length:
            raise Skip(TOO_LONG)
        try:
            job = json.dumps(self.make_job(row, messages))
        except TypeError as error:  # columns of dates and bytes
            raise ValueError(f"dataset, ground_truth or weights: {error}") from None
        return {"input_ids": ids, "trained": [False] * len(ids), "job": job, "notes": []}


def row_job(row, messages=None):
    """[dataset, ground_truth, weights or None] of a row. Raises ValueError if one of the first two is missing."""
    for field in ("dataset", "ground_truth"):
        if row.get(field) is None:
            flag = " and no --verifier" if field == "dataset" else ""
            raise ValueError(f"no field {field!r}{flag}; {_columns(row)}")
    return [row["dataset"], row["ground_truth"], row.get("weights")]


def encode_conversation(encoder, messages, row, last_turn_only=False):
    """(input_ids, trained, notes), three lists, of a row's checked conversation, by the settings of an Encoder.

    Raises ValueError and Skip.
    """
    refuse_media(row)
    for message in messages:
        is_blank = not (message.get("content") or "").strip()
        if message["role"] == "assistant" and is_blank and not _calls_of(message):
            raise Skip("an assistant turn is empty")
    ids, mask, notes = encoder.chat.encode_and_note(messages, parse_tools(row), last_turn_only, read_options(row))
    encoder.check_ids(ids)
    if not mask.any():
        raise Skip("no answer is trained on: `weight` or `train` takes all out")
    if len(ids) > encoder.max_length:
        if encoder.overlong == "drop":
            raise Skip(TOO_LONG)
        ids = ids[: encoder.max_length]
        mask = mask[: encoder.max_length]
        notes.append(TRUNCATED)
    if not mask[1:].any():  # the first token has no state before it to predict it from
        raise Skip("no trained token within --max_length")
    tokenizer = encoder.chat.tokenizer
    if tokenizer.unk_token_id in ids:
        notes.append(f"with characters the tokenizer does not know (they become {tokenizer.unk_token})")
    return ids, mask.tolist(), notes


SPACE = re.compile(r"\s*")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # transformers shows a template each as the others
NO_END = "the chat template ends a trained assistant turn without an end-of-turn token"
WHY_END = "the model would never learn to stop"
LAST = ", or --train_turns last"
SHORTENED = "with earlier turns shortened by the template: --train_turns last trains the one it shows whole"


class ChatFormat:
    """Messages → token ids and trained-token mask, by the tokenizer's chat template.

    Ids equal `tokenizer.apply_chat_template`'s, except that control strings inside content stay text (ControlStrings),
    and that an assistant message may have `weight` 0 or `train` false: shown, but not trained on.

    Where an assistant's turn stands in the rendered text is found by the template's own marks and by rendering:
        begin   behind the *header*: the end of the generation prompt, without the *opening* (`<think>`) that it may
                have and an answer may lack; behind the opening where the answer has it.
        end     behind the first *end token* that follows the turn's text. End tokens are what ends a plain answer or a
                tool call in this template, by rendering one at the start.
    A template that renders a turn with less once another follows (the thoughts of earlier turns) is taken by its word:
    the mask covers what it renders, and a note counts the rows. A `{% generation %}` block can only narrow a turn.

    Args:
        tokenizer: fast tokenizer with a chat template (`load_tokenizer`).
        content_tokens: control strings that assistant content may contain as tokens (e.g. "<think>", "</think>").
        day: what templates may print as today, ISO ("2026-01-31"); default today.

    Attributes:
        end_of_turn: id of the token that ends an answer, or None. stop_ids: ids on which generation has to stop.
        untrainable: why `encode` cannot work with this template, or None; `prompt` can.

    Raises:
        RunError: the template renders no plain prompt, begins with two BOS or drops text, nothing ends an answer; an
            unknown content token.
    """

    def __init__(self, tokenizer, content_tokens=(), day=None):
        self.tokenizer = tokenizer
        self.date = day or date.today().isoformat()
        self.template = ChatTemplate(tokenizer, tuple(content_tokens), self.date)
        self.controls = self.template.controls
        printed = self.date if "strftime_now" in self.template.source else ""
        settings = [self.controls.settings, tokenizer.special_tokens_map, self.template.source]
        self.key = json.dumps([*settings, self.template.content_tokens, printed])
        self.untrainable = None
        try:
            self.encode(*self.template.plain)
        except ValueError as error:
            self.untrainable = f"the chat template fails on a plain conversation: {error}"
        names = dict.fromkeys([*self.template.stops, tokenizer.eos_token])
        self.stop_ids = tokenizer.convert_tokens_to_ids([name for name in names if name])
        self.end_of_turn = self.stop_ids[0] if self.template.ends else None
        if not self.stop_ids:
            raise RunError(f"{self.untrainable}; and the tokenizer has no eos_token")

    def encode(self, messages, tools=None, last_turn_only=False, options=None):
        """Token ids and mask of a conversation.

        Args:
            messages: list of {"role", "content", ...}, checked by `check_messages`. tools: JSON schemas, or None.
            last_turn_only: train on the last assistant turn only, not on all.
            options: variables for the template (a row's `chat_template_kwargs`).

        Returns:
            (input_ids (L,) list of int, trained (L,) bool array). Trained are the tokens of assistant turns, the
            end-of-turn token included: what the model itself has to produce. A token that crosses the end of the
            prompt is trained.

        Raises:
            ValueError: the template rejects or drops a message, cannot say where turns begin, or a turn has no end.
        """
        return self.encode_and_note(messages, tools, last_turn_only, options)[:2]

    def encode_and_note(self, messages, tools=None, last_turn_only=False, options=None):
        """As `encode`, and a list of notes: what the account of a data set has to say of this conversation."""
        if self.untrainable:
            raise ValueError(self.untrainable)
        view = self.template.view(messages, tools, options)
        text, marks = self.template.render(view)
        self.template.check(text, view)
        turns = [i for i, message in enumerate(view.messages) if message["role"] == "assistant"]
        spans, notes, place, heads = [], set(), 0, self._heads(text)
        for k, i in enumerate(turns):
            message = view.messages[i]
            is_trained = message.get("weight", 1) and message.get("train", True)
            is_wanted = i == turns[-1] or not last_turn_only
            try:
                begin, difference = self._begin(text, heads, place, view, turns[: k + 1])
                place, shortened = self._end(text, begin, view, turns[: k + 1])
            except ValueError:
                if is_trained and is_wanted:
                    raise
                place = None
            if not is_trained:
                notes.add("with answers that are shown and not trained on (`weight` 0, `train` false, in a `prompt`)")
            elif is_wanted:
                parts = self._narrow(text, begin, place, marks)
                spans += parts
                if marks and sum(len(text[a:b].strip()) for a, b in parts) < len(text[begin:place].strip()):
                    notes.add("with parts of answers that the template's {% generation %} leaves out")
                notes |= {difference, shortened} - {None}
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *(cut for span in spans for cut in span), len(text)])]
        ids, firsts, crossings = self.controls.encode(pieces)
        trained = np.zeros(len(ids), dtype=bool)
        for begin, end in zip(firsts[::2], firsts[1::2], strict=True):
            trained[begin:end] = True
        if any(crossings[::2]):
            notes.add("with a token that crosses the end of the prompt (it is trained)")
        return ids, trained, sorted(notes | self._notes(view))

    def prompt(self, messages, tools=None, options=None):
        """Token ids (list of int) of a conversation up to where the assistant's next turn begins. Raises ValueError."""
        view = self.template.view(messages, tools, options)
        text, _ = self.template.render(view, add_generation_prompt=True)
        self.template.check(text, view, add_generation_prompt=True)
        return self.controls.encode([text])[0]

    def _heads(self, text):
        """Where each header in the text ends."""
        header = self.template.header
        return [match.end() for match in re.finditer(re.escape(header), text)] if header else []

    def _begin(self, text, heads, place, view, turns):
        """Where the last of these turns begins in the text, and a note if its prompt is no prefix of the text.

        It begins where its prompt ends. The prompt of a plain turn need not be rendered where headers are unmistakable:
        where there are as many as turns. Where a prompt is rendered differently later, the turn begins behind the first
        header after `place`, the end of the turn before, if the header holds a control string: no content can. Without
        a header, what stands behind the question is one.
        """
        i = turns[-1]
        begin, difference, header = None, None, self.template.header
        if len(heads) == sum(message["role"] == "assistant" for message in view.messages):
            begin = heads[len(turns) - 1]
        is_known = False
        if begin is not None and view.is_plain and view.messages[i - 1]["role"] == "user":
            said = begin + len(self.template.opening) * text.startswith(self.template.opening, begin)
            is_known = self._behind_content(text, said, view.messages[i]) is not None
        if i > 0 and not is_known:
            prompt, _ = self.template.render(view.until(i), add_generation_prompt=True)
            if text.startswith(prompt):
                return len(prompt), None
            if text.startswith(prompt.removesuffix(self.template.opening)):
                begin = len(prompt.removesuffix(self.template.opening))
            else:
                difference = "with a prompt that is rendered differently once the answer follows"
                question = (view.messages[i - 1].get("content") or "").strip()
                if header == "":
                    header = prompt[max(0, prompt.rfind(question)) :]
        is_safe = header and place is not None and self.controls.pattern.search(header)
        if begin is None and is_safe and header in text[place:]:
            begin = text.index(header, place) + len(header)
        if begin is None:
            is_last = not any(message["role"] == "assistant" for message in view.messages[i + 1 :])
            raise ValueError(
                f"the chat template renders the prompt of messages[{i}] differently once the answer follows, so the "
                f"trained tokens cannot be told apart: choose a --chat_template{'' if is_last else LAST}"
            )
        if text.startswith(self.template.opening, begin):
            return begin + len(self.template.opening), difference
        start = self.template.opening.rstrip()
        begin += len(start) * text.startswith(start, begin)
        return begin, f"which do not go on as the prompt ends: {self.template.opening!r}"

    def _behind_content(self, text, begin, message):
        """Where the message's content ends, if the text goes on with it here, white space aside; or None."""
        content = (message.get("content") or "").strip()
        place = SPACE.match(text, begin).end()
        return place + len(content) if text.startswith(content, place) else None

    def _end(self, text, begin, view, turns):
        """Where the last of these turns ends in the text, and a note if it is shown with less than as the last."""
        i = turns[-1]
        message = view.messages[i]
        place = self._behind_content(text, begin, message)
        is_all = message.get("content") and not any(message.get(field) for field in ("tool_calls", *THOUGHTS))
        end = self.template.end_token(text, place) if is_all and place is not None else None
        if end:
            return end, None
        whole, start = text, begin  # the turn as the last one
        if i < len(view.messages) - 1:
            whole, _ = self.template.render(view.until(i + 1))
            start, _ = self._begin(whole, self._heads(whole), None, view.until(i + 1), turns)
        body = self.template.without_tail(whole[start:])
        self._check_turn(whole[start - len(self.template.opening) : start] + body, message, i)
        last_part = self.controls.pattern.split(body)[-1]  # behind its last control string
        ends = []  # (what is said before, where it ends) of all end tokens
        for match in self.controls.pattern.finditer(text, begin):
            end = self.template.end_token(text, match.start())
            if end:
                ends.append((text[begin : match.start()].rstrip(), end))
        for said, end in ends:
            if said == body:
                return end, None
        for said, end in ends:
            if whole is not text and _is_shortened(said, body, last_part):
                return end, SHORTENED
        if whole is text:
            tail = text.replace(BREAK, "")
            unknown = re.search(r"(<[^<>\s]+>|\[/?\w+\])\s*$", tail)
            if unknown and unknown[1] not in self.controls.all:
                remedy = "add it to the tokenizer, or choose a --chat_template"
                raise ValueError(f"{NO_END}: {unknown[1]!r} is no token of this tokenizer; {remedy}")
            raise ValueError(f"{NO_END} (it ends with {tail[-12:]!r}): {WHY_END}")
        raise ValueError(
            f"the chat template renders messages[{i}] differently once another follows, so the trained tokens cannot "
            f"be told apart: choose a --chat_template{LAST}"
        )

    def _check_turn(self, shown, message, i):
        """Raises ValueError if a turn that is shown as the last one lacks some of what the message has."""
        rest = _squeeze(shown)
        content = _squeeze(message.get("content") or "")
        if content not in rest:
            raise ValueError(f"the chat template leaves out messages[{i}].content: choose a --chat_template")
        if content:
            before, _, after = rest.rpartition(content)
            rest = before + after
        for field in THOUGHTS:
            if _squeeze(message.get(field) or "") not in rest:
                hint = "put thoughts into the content, or choose a --chat_template"
                raise ValueError(f"the chat template leaves out messages[{i}].{field}: {hint}")
        shown = shown.replace(BREAK, "")
        words = re.findall(r"[A-Za-z0-9]+", " ".join(_leaves(message.get("tool_calls"))).replace(BREAK, ""))
        if not all(word in shown for word in words):
            raise ValueError(f"the chat template leaves out a call of messages[{i}]: choose a --chat_template")

    def _narrow(self, text, begin, end, marks):
        """The parts of a turn that the template marks, if it marks any turns; the last has to have the end token."""
        if marks is None:
            return [(begin, end)]
        parts = [(max(begin, a), min(end, b)) for a, b in marks if a < end and b > begin]
        if parts and parts[-1][1] < end:
            marked = text[begin : parts[-1][1]].replace(BREAK, "")
            raise ValueError(f"{NO_END} (it marks {marked[-12:]!r}): {WHY_END}")
        return parts

    def _notes(self, view):
        """What the account of a data set has to say of a conversation, beside its mask."""
        notes = set()
        if view.met["content"] | view.met["answers"]:
            notes.add("with control strings in content, kept as text")
        if view.met["answers"] - self.controls.special:
            some = " ".join(sorted(view.met["answers"] - self.controls.special)[:4])
            notes.add(f"with {some} in answers, kept as text: --content_tokens {some} makes them tokens")
        speakers = [message for message in view.messages if message["role"] not in ("tool", "function", "environment")]
        if "names" in self.template.dropped and any(message.get("name") for message in speakers):
            notes.add("with names of speakers, which the template does not show")
        unknown = [option for option in view.options if option not in self.template.fields]
        if unknown:
            notes.add(f"with chat_template_kwargs that the template does not read: {', '.join(unknown)}")
        return notes


def _leaves(value):
    """Names and arguments in tool calls: the texts that a turn with the calls has to show."""
    if isinstance(value, dict):
        return [text for key, part in value.items() if key not in ("id", "type") for text in _leaves(part)]
    if isinstance(value, list):
        return [text for part in value for text in _leaves(part)]
    return [value] if isinstance(value, str) else []


def _squeeze(text):
    """Text without white space, for comparisons: templates trim."""
    return "".join(text.split())


def _is_shortened(text, whole, last_part):
    """Whether `text` is the end of `whole`, or `whole` without one piece that is not of its `last_part`."""
    text, whole = text.lstrip(), whole.lstrip()
    kept = len(os.path.commonprefix([text[::-1], whole[::-1]]))
    if kept == len(text):
        return kept > 0
    return kept >= len(last_part) and whole.startswith(text[: len(text) - kept])


GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
CHANGING = {"tool_calls", "function_calls", *THOUGHTS}
KINDS = {"system": "system messages", "user": "user messages", "tool": "tool answers", "environment": "tool answers"}
CANONICAL = ("system", "tool")
ALIASES = (("developer", "system"), ("function", "tool"), ("environment", "tool"), ("tool", "environment"))
PROBE = "Probe 7319"  # what the template does with each kind of content
PROBE_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "probe0001", "type": "function", "function": {"name": "probe", "arguments": {"text": PROBE}}},
    ],
}
PROBE_RESULT = {"role": "tool", "name": "probe", "tool_call_id": "probe0001", "content": PROBE}
PROBE_TOOL = {
    "type": "function",
    "function": {"name": "probe", "description": PROBE, "parameters": {"type": "object", "properties": {}}},
}


@dataclass
class View:
    """A conversation as a chat template gets to see it.

    Attributes:
        messages, tools: with shielded text. options: variables for the template.
        is_plain: without thoughts, tools and options, which change how a template renders other messages.
        met: {"answers": set, "content": set}, the control strings that stay text, in answers and elsewhere.
        raw: the same before it was shielded, or None if shielding has changed nothing.
    """

    messages: list
    tools: list | None
    options: dict
    is_plain: bool
    met: dict
    raw: "View | None" = None

    def until(self, i):
        """The first i messages of it."""
        return dataclasses.replace(self, messages=self.messages[:i])


class ChatTemplate:
    """The chat template of a tokenizer: what it renders, and what it does, found by rendering small conversations.

    Args:
        tokenizer, content_tokens, day: as for ChatFormat.

    Attributes:
        source: its text; of several templates, all.
        controls: the ControlStrings.
        dropped: kinds of content that it leaves out without a word.
        wants_text, wants_content: whether arguments of tool calls have to be JSON text; whether calls need `content`.
        header: what it writes before each answer, at the end of the generation prompt: "" if nothing, None if an answer
            does not begin as the prompt ends.
        opening: what it writes behind the header in the generation prompt, but not always in an answer (`<think>`).
        ends: the end tokens, which end an answer or a call; that of a last answer first.
        stops: these, and other special tokens behind a last answer.

    Raises:
        RunError: the template renders no plain prompt, drops its text or begins with two BOS; an unknown content token.
    """

    def __init__(self, tokenizer, content_tokens, day):
        self.tokenizer = tokenizer
        self.content_tokens = content_tokens
        self.day = day
        templates = tokenizer.chat_template
        self.templates = templates if isinstance(templates, dict) else {"default": templates}
        self.source = "\n".join(self.templates.values())
        self.controls = ControlStrings(tokenizer, self.source)
        unknown = [token for token in content_tokens if token not in self.controls.all]
        if unknown:
            raise RunError(f"--content_tokens: not control tokens of this tokenizer: {' '.join(unknown)}")
        self.roles, self.fields = self._read_source()
        self._probe()

    def _read_source(self):
        """(what the template compares a role with, the names and keys that it looks up), sets of str."""
        roles, fields = set(), set()
        for text in self.templates.values():
            try:
                tree = _compile_jinja_template(text).environment.parse(text)
            except jinja2.TemplateError:  # rendering it will say so
                continue
            fields |= _words(tree)[0] | _keys(tree)
            for node in tree.find_all((nodes.Compare, nodes.Filter, nodes.Test)):
                names, texts = _words(node)
                roles |= texts if "role" in names | texts else set()
        return roles, fields

    def view(self, messages, tools=None, options=None):
        """The conversation as the template gets to see it: in its own terms, text shielded."""
        messages = [self._adapt(message) for message in messages]
        if not tools and "functions" not in self.fields:
            tools = [tool for message in messages for tool in parse_tools(message, "functions") or []]
        met = {"answers": set(), "content": set()}  # control strings that stay text
        shown = []
        for message in messages:
            fields = {"role": message["role"]}
            for name, value in message.items():
                is_text = message["role"] == "assistant" and name == "content"
                self.controls.seen = met["answers" if is_text else "content"]
                if name != "role":
                    fields[name] = self.controls.shield(value, name, self.content_tokens if is_text else ())
            shown.append(fields)
        is_plain = not options and not tools and all(CHANGING.isdisjoint(message) for message in messages)
        raw = View(messages, tools or None, options or {}, is_plain, met)
        self.controls.seen = met["content"]
        view = View(shown, self.controls.shield(raw.tools), self.controls.shield(raw.options), is_plain, met)
        return view if view == raw else dataclasses.replace(view, raw=raw)

    def _adapt(self, message):
        """A message without nulls, with roles and fields that the template knows, and arguments as it wants them."""
        message = {name: value for name, value in message.items() if value is not None}
        for one, other in ALIASES:
            if message["role"] == one and one not in self.roles and (other in CANONICAL or other in self.roles):
                message["role"] = other
        if "function_calls" in message and "function_calls" not in self.fields:
            message["tool_calls"] = parse_calls(message.pop("function_calls"))
        if self.wants_content:
            message.setdefault("content", "")
        if isinstance(message.get("tool_calls"), list):
            message["tool_calls"] = [_with_arguments(call, self.wants_text) for call in message["tool_calls"]]
        return message

    def render(self, view, add_generation_prompt=False):
        """(text, [(start, end), …] of the template's {% generation %} blocks, or None if it has none)."""
        template = self.templates["default"]
        if view.tools and "tool_use" in self.templates:
            template = self.templates["tool_use"]
        has_marks = GENERATION.search(template) is not None
        try:
            if "strftime_now" in template:
                _compile_jinja_template(template).globals["strftime_now"] = date.fromisoformat(self.day).strftime
            texts, marks = render_jinja_template(
                conversations=[view.messages],
                tools=view.tools,
                chat_template=template,
                return_assistant_tokens_mask=has_marks,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
                **view.options,
            )
        except Exception as error:  # a template is a program of somebody else's
            raise ValueError(f"the chat template rejects this conversation: {first_line(error)}") from None
        escape = ascii(BREAK)[1:-1]  # how a printed object would show it
        shown = [view.messages, view.tools]
        if escape in texts[0] and escape not in json.dumps(shown, ensure_ascii=False, default=str):
            raise ValueError("the chat template escapes text that holds a control string, which then cannot stay text")
        return texts[0], marks[0] if has_marks else None

    def check(self, text, view, add_generation_prompt=False):
        """Raises ValueError if the rendered text leaves a message out, or differs because its content is shielded."""
        roles = {message["role"] for message in view.messages}
        kinds = {kind for role, kind in KINDS.items() if role in roles}
        kinds |= {"tool calls"} if any(message.get("tool_calls") for message in view.messages) else set()
        if view.tools:
            kinds.add("tools beside a system message" if "system" in roles else "tools")
        dropped = self.dropped & kinds
        for i, message in enumerate(view.messages):  # a template may know a kind, but not in this place
            if message["role"] in ("system", "developer", "user") and message["content"].strip() not in text:
                dropped |= {f"messages[{i}] ({message['role']})"}
        if dropped:
            raise ValueError(f"the chat template leaves out {' and '.join(sorted(dropped))}: choose a --chat_template")
        if view.raw and not any(view.met.values()):  # at edges only: nothing else may change by it
            if self.render(view.raw, add_generation_prompt)[0] != text.replace(BREAK, ""):
                raise ValueError("the chat template sorts or compares text that is a part of a control string")

    def end_token(self, text, place):
        """Where the first end token ends, if nothing but control strings and white space comes before it; or None."""
        for match in self.controls.pattern.finditer(text, place):
            if text[place : match.start()].strip():
                return None
            if match[0] in self.ends:
                return match.end()
            place = match.end()
        return None

    def without_tail(self, text):
        """Text without the control strings and white space that it ends with."""
        stop = len(text)
        for match in reversed(list(self.controls.pattern.finditer(text))):
            if text[match.end() : stop].strip():
                break
            stop = match.start()
        return text[:stop].rstrip()

    def _probe(self):
        """Finds out what the template does, by rendering small conversations."""
        self.wants_text, self.wants_content, self.dropped = False, False, set()
        self.header, self.opening, self.ends = None, "", []
        question = {"role": "user", "content": "What is 2 + 3?\n\n(Briefly.)"}
        answer = {"role": "assistant", "content": "Certainly 5."}
        tools = None
        if not self._try([question], None, True):  # some templates are for tools only
            tools = [{**PROBE_TOOL, "function": {**PROBE_TOOL["function"], "description": "A tool"}}]
        as_object = self._try([question, PROBE_CALL], tools)
        self.wants_text = True
        as_text = self._try([question, PROBE_CALL], tools)
        self.wants_text = bool(as_text) and (not as_object or ("{'text'" in as_object and '{"text"' in as_text))
        bare = {name: PROBE_CALL[name] for name in ("role", "tool_calls")}
        for rest in ([], [PROBE_RESULT, answer]):
            takes_calls = self._try([question, PROBE_CALL, *rest], tools)
            self.wants_content |= bool(takes_calls) and not self._try([question, bare, *rest], tools)
        self.dropped = self._find_dropped(tools)
        try:
            view = self.view([question], tools)
            prompt, _ = self.render(view, add_generation_prompt=True)
            self.check(prompt, view, add_generation_prompt=True)
        except ValueError as error:
            raise RunError(f"the chat template fails on a plain conversation: {error}") from None
        if self.controls.encode([prompt])[0] != self.tokenizer(prompt, add_special_tokens=False).input_ids:
            added = {entry["content"] for entry in self.controls.settings["added_tokens"] if entry["normalized"]}
            lost = sorted(text for text in self.controls.all & added if text in prompt)
            if lost:
                remedy = "add them to the tokenizer as AddedToken(…, normalized=False)"
                raise RunError(f"the tokenizer normalizes text before it looks for {' '.join(lost)}: {remedy}")
            raise RunError("internal error: this tokenizer's ids differ from apply_chat_template's; please report it")
        self._find_turns(prompt, question, answer, tools)
        bos = self.tokenizer.bos_token
        if bos and prompt.startswith(bos + bos) and bos not in (self.header or ""):  # there it begins messages, too
            raise RunError(f"the chat template begins with two {bos}")
        self.plain = [question, answer], tools

    def _try(self, messages, tools, add_generation_prompt=False):
        """The rendered text, or "" where the template rejects it."""
        try:
            return self.render(self.view(messages, tools), add_generation_prompt)[0]
        except ValueError:
            return ""

    def _find_dropped(self, tools):
        """Kinds of content that the template leaves out without a word, found by rendering a probe of each."""
        user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
        call = PROBE_CALL["tool_calls"][0]
        silent = {**PROBE_CALL, "tool_calls": [{**call, "function": {"name": "probe", "arguments": {}}}]}
        probes = {
            "user messages": [{"role": "user", "content": PROBE}, answer],
            "system messages": [{"role": "system", "content": PROBE}, user, answer],
            "tool calls": [user, PROBE_CALL],
            "tool answers": [user, silent, PROBE_RESULT, answer],
            "names": [{**user, "name": PROBE}, answer],
        }
        shown = {kind: self._try(messages, tools) for kind, messages in probes.items()}
        shown["tools"] = self._try([user, answer], [PROBE_TOOL])
        system = {"role": "system", "content": "Be brief."}
        shown["tools beside a system message"] = self._try([system, user, answer], [PROBE_TOOL])
        return {kind for kind, text in shown.items() if text and PROBE not in text}  # what it rejects, it says itself

    def _find_turns(self, prompt, question, answer, tools):
        """Finds header, opening, ends and stops."""
        again, other = {"role": "user", "content": "And 4?"}, {"role": "assistant", "content": "It is 7."}
        plain = self._try([question, answer], tools)
        several = self._try([question, answer, again, other], tools)
        texts = [text for text in (plain, self._try([question, other], tools), several) if text]
        common = min(len(os.path.commonprefix([prompt, text])) for text in [prompt, *texts])
        start = len(os.path.commonprefix([prompt, self._try([question], tools)]))
        for match in self.controls.pattern.finditer(prompt):  # a border lies between control strings, not in one
            start = match.start() if match.start() < start < match.end() else start
            common = match.start() if match.start() < common < match.end() else common
        if start < common or common == len(prompt):
            self.header, self.opening = prompt[start:common], prompt[common:]
        at_end = self._specials_at_end(plain)
        self.ends = at_end[:1]
        behind = [several[several.find(end) + len(end) :].lstrip() for end in ("(Briefly.)", "Certainly 5.")]
        first = [self.controls.pattern.match(text) for text in behind]
        if several and all(first):  # an earlier answer may have another end: one that ends questions, too
            end = first[0][0]
            if end == first[1][0] and end in self.controls.special - {*self.ends} and end not in (self.header or ""):
                self.ends.append(end)
        of_calls = self._specials_at_end(self._try([question, PROBE_CALL], tools))
        if of_calls and not set(of_calls) & set(self.ends):
            self.ends.append(of_calls[-1])
        self.stops = list(dict.fromkeys([*self.ends, *at_end]))

    def _specials_at_end(self, text):
        """The special tokens after the last text, without those that another follows directly: they end nothing."""
        tail = text[len(self.without_tail(text)) :].strip()
        found = list(self.controls.pattern.finditer(tail))
        found = [match[0] for match in found if not self.controls.pattern.match(tail, match.end())]
        return [text for text in found if text in self.controls.special]


def _words(node):
    """Names and attributes, and text constants, in a piece of a parsed template."""
    names = {part.name for part in node.find_all(nodes.Name)} | {part.attr for part in node.find_all(nodes.Getattr)}
    return names, {part.value for part in node.find_all(nodes.Const) if isinstance(part.value, str)}


def _keys(tree):
    """What a parsed template looks up by name: x["…"], x.get("…"), "…" in x."""
    found = [node.arg for node in tree.find_all(nodes.Getitem)] + [node.expr for node in tree.find_all(nodes.Compare)]
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr == "get":
            found += call.args[:1]
    return {node.value for node in found if isinstance(node, nodes.Const) and isinstance(node.value, str)}


def _with_arguments(call, as_text):
    """A tool call whose arguments are an object, or JSON text for templates that want text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str | dict):
        return call
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"tool_calls: arguments, column {error.colno}: not valid JSON: {error.msg}") from None
    function = {**function, "arguments": json.dumps(arguments, ensure_ascii=False) if as_text else arguments}
    return {**call, "function": function} if "function" in call else function


def parse_calls(text):
    """Tool calls as lines of Python, `get_weather(city="Rome")`, or a list, as a list of calls. Raises ValueError."""
    if isinstance(text, list):
        return text
    calls = []
    try:
        for statement in ast.parse(text).body:
            arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in statement.value.keywords}
            if statement.value.args or None in arguments:
                raise ValueError("arguments without names")
            function = {"name": ast.unparse(statement.value.func), "arguments": arguments}
            calls.append({"type": "function", "function": function})
    except (SyntaxError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"function_calls is not lines of calls with named arguments: {first_line(error)}") from None
    return calls


# Unicode noncharacters: they mark positions in rendered text and can occur in no real text.
BREAK, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
MARKS = re.compile(f"[{BREAK}{OPEN}{CLOSE}]")
RARE = "°你\u200b\U0001f9ff\ue000"  # some tokenizers know no such characters, and have no token for the unknown


class ControlStrings:
    """The control strings of a tokenizer, kept apart from the same characters in content.

    A *control string* is an added token that is special, or part of the chat template, or not in the tokenizer's own
    vocabulary (`<|im_end|>`, `<think>`; not runs of spaces or the HTML tags that some tokenizers hold as ordinary
    entries).

    The idea:
        1. Shield the content: a BREAK goes into every control string, and wherever a neighbour could complete one.
        2. Render it. Every control string that is whole now is the template's own.
        3. Put those between OPEN and CLOSE, and take the BREAKs out again.
        4. Encode the text in one go, with a copy of the tokenizer that knows control strings only between brackets.

    Args:
        tokenizer: fast tokenizer. templates: text of its chat templates.
    """

    def __init__(self, tokenizer, templates):
        self.settings = json.loads(tokenizer.backend_tokenizer.to_str())
        added = {entry["content"]: entry for entry in self.settings["added_tokens"]}
        controls = self._find(added, templates)
        self.all = controls
        self.special = {text for text in controls if added[text]["special"] or text == tokenizer.eos_token}
        longest_first = sorted(controls, key=len, reverse=True)
        alternatives = "|".join(re.escape(text) for text in longest_first) or "(?!)"  # (?!) matches nothing
        self.pattern = re.compile(alternatives)
        self.inside = re.compile(f"(?=({alternatives}))(.)", re.DOTALL)  # overlapping ones too, by first character
        self.heads = {text[:i] for text in controls for i in range(1, len(text))}
        self.tails = {text[i:] for text in controls for i in range(1, len(text))}
        self.head_lengths, self.tail_lengths = {}, {}  # of the heads that end with a character, of tails that begin so
        for head in self.heads:
            self.head_lengths.setdefault(head[-1], set()).add(len(head))
        for tail in self.tails:
            self.tail_lengths.setdefault(tail[0], set()).add(len(tail))
        self.parts = {text[i:j] for text in controls for j in range(1, len(text) + 1) for i in range(j)}
        self.seen = set()  # those that were met in content and stayed text
        self._make_encoder(added)

    def _find(self, added, templates):
        vocabulary = self.settings["model"]["vocab"]
        if isinstance(vocabulary, dict):
            words = set(vocabulary)
        else:  # [word, score] each
            words = {entry[0] for entry in vocabulary}
        controls = set()
        for text, entry in added.items():
            if text.strip() and (entry["special"] or text in templates or text not in words):
                controls.add(text)
        return controls

    def _make_encoder(self, added):
        """Builds `self.encoder`, which knows a control string only in brackets, and `self.ids`, back to real ids."""
        rename = {text: OPEN + text + CLOSE if text in self.all else text for text in added}
        model = dict(self.settings["model"])  # the model's own vocabulary may hold control strings too
        if isinstance(model["vocab"], dict):
            model["vocab"] = {rename.get(text, text): i for text, i in model["vocab"].items()}
        else:
            model["vocab"] = [[rename.get(text, text), score] for text, score in model["vocab"]]
        if "merges" in model:  # none may make a control string out of its parts
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            model["merges"] = [[a, b] for a, b in pairs if self.all.isdisjoint((a, b, a + b))]
        if model.get("unk_token"):
            model["unk_token"] = rename.get(model["unk_token"], model["unk_token"])
        entries = [{**entry, "content": rename[entry["content"]]} for entry in added.values()]
        settings = {**self.settings, "post_processor": None, "truncation": None, "padding": None}
        self.encoder = Tokenizer.from_str(json.dumps({**settings, "model": model, "added_tokens": entries}))
        ids = {self.encoder.token_to_id(rename[text]): entry["id"] for text, entry in added.items()}
        places = [self.encoder.encode(f"a{rare}b", add_special_tokens=False).offsets for rare in RARE]
        self.loses_characters = any(not place or place[-1][1] != 3 for place in places)
        self.control_ids = {self.encoder.token_to_id(rename[text]) for text in self.all}
        self.ids = {i: real for i, real in ids.items() if i != real}

    def shield(self, value, key="", allowed=(), edges=True):
        """`value` (JSON-like) with a BREAK in every control string and, at its edges, where one could be completed."""
        if isinstance(value, dict):  # names that templates look up keep their edges; those of arguments they print
            printed = {k: edges and (key in ("arguments", "properties") or not k.isidentifier()) for k in value}
            return {self.shield(k, edges=printed[k]): self.shield(v, k, allowed, edges) for k, v in value.items()}
        if isinstance(value, list):
            return [self.shield(v, key, allowed, edges) for v in value]
        if not isinstance(value, str):
            return value
        if MARKS.search(value):
            raise ValueError("the text contains a Unicode noncharacter (U+FDD0 … U+FDD2)")
        text = value
        if self.pattern.search(value):
            text = self.inside.sub(lambda match: match[2] if match[1] in allowed else match[2] + BREAK, value)
            self.seen.update(match[1] for match in self.inside.finditer(value) if match[1] not in allowed)
        core = text.strip()  # templates trim
        if not core or not edges or key == "type":
            return text
        before, after = text[: text.index(core)], text[text.index(core) + len(core) :]
        joins_before = any(core[:n] in self.tails for n in self.tail_lengths.get(core[0], ()))
        joins_behind = any(core[-n:] in self.heads for n in self.head_lengths.get(core[-1], ()))
        begin = BREAK if joins_before else ""
        end = BREAK if joins_behind or core in self.parts else ""
        return before + begin + core + end + after

    def encode(self, pieces):
        """Encodes rendered text, given in pieces. Returns (ids, firsts, crossings).

        ids: list. firsts: for each piece but the first, the index of the first token that reaches into it: a token that
        crosses a border belongs to the piece behind it, but a control string, which may swallow white space, to that
        in which it stands. crossings: for each border, whether a token crosses it.
        """
        texts = [self.pattern.sub(_bracket, piece).replace(BREAK, "") for piece in pieces]
        encoding = self.encoder.encode("".join(texts), add_special_tokens=False)
        ids = encoding.ids
        *cuts, total = itertools.accumulate(map(len, texts))
        if not self.loses_characters:
            borders = [self._border(encoding, ids, cut, total) for cut in cuts]
        else:  # and its places are wrong behind one: count tokens
            begins = ["".join(texts[:i]) for i in range(1, len(texts))]
            parts = [self.encoder.encode(text, add_special_tokens=False).ids for text in begins]
            same = [len(os.path.commonprefix([part, ids])) for part in parts]
            borders = [(first, first < len(part)) for first, part in zip(same, parts, strict=True)]
        ids = [self.ids.get(i, i) for i in ids] if self.ids else ids
        return ids, [first for first, _ in borders], [crosses for _, crosses in borders]

    def _border(self, encoding, ids, cut, total):
        """(the first token that reaches beyond the character at `cut`, whether it begins before)."""
        for place in range(cut, total):  # some tokenizers have no token for white space
            token = encoding.char_to_token(place)
            if token is not None:
                crosses = encoding.token_to_chars(token)[0] < cut
                is_control = ids[token] in self.control_ids
                return token + (crosses and is_control), crosses and not is_control
        return len(ids), False


def _bracket(match):
    return OPEN + match[0] + CLOSE


# How a row holds a conversation. Whatever is read here is in the form of OpenAI's and transformers' messages then.


def read_conversation(row, needs_answer=True):
    """The messages of a row, checked, from `messages`, `conversations` or `prompt` and (if needed) `completion`.

    Raises:
        ValueError: naming the field, and what to do with rows of other shapes.
    """
    for field in ("messages", "conversations"):
        if row.get(field) is not None:
            return _with_system(row, read_messages(row[field], field))
    if row.get("prompt") is not None and not needs_answer:
        return _with_system(row, read_messages(row["prompt"], "prompt", "user"))
    if row.get("prompt") is not None and row.get("completion") is not None:
        prompt = [{**message, "train": False} for message in read_messages(row["prompt"], "prompt", "user")]
        return [*_with_system(row, prompt), *read_messages(row["completion"], "completion", "assistant")]
    missing = "messages is null, expected a list" if "messages" in row else "no field 'messages'"
    raise ValueError(f"{missing}; {_columns(row)}")


def _with_system(row, messages):
    """Messages, begun with the row's `system` if that is text and they have no system message."""
    text = row.get("system")
    if not isinstance(text, str) or not text.strip() or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": text}, *messages]


def _columns(row):
    names = ", ".join(repr(field) for field in row) or "no fields"
    return f"the row has {names} (python -m pipeline.convert knows other shapes)"


def read_messages(value, field="messages", role=None):
    """Messages as they are published, as {role, content, tool_calls?, ...}: a list of dicts.

    Args:
        value: a list of messages (`role` and `content`, or ShareGPT's `from` and `value`), that list as JSON text, or,
            with `role`, a string: one message of that role. Text in parts is joined.

    Raises:
        ValueError: as `check_messages`, and for parts that are not text.
    """
    if isinstance(value, str) and (role is None or "role" in value) and value.lstrip().startswith("[{"):
        value = _parse_json(value, field)
    if isinstance(value, str) and role is not None:
        value = [{"role": role, "content": value}]
    if isinstance(value, list):
        value = [_read_message(message, f"{field}[{i}]") for i, message in enumerate(value)]
    check_messages(value, field)
    return value



def refuse_media(fields, at=""):
    """Raises ValueError if a row or a message has more than text."""
    for name in ("images", "image", "videos", "audio", "audios"):
        if fields.get(name):
            raise ValueError(f"{at}{name} is not empty, and only text can be trained on")


SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}


def _read_message(message, at):
    if not isinstance(message, dict):
        return message  # check_messages says so
    refuse_media(message, f"{at}.")
    if "from" in message and "value" in message and message.get("role") is None:
        named = {"role": SHAREGPT.get(str(message["from"]), message["from"]), "content": message["value"]}
        message = named | {name: message[name] for name in message if name not in ("from", "value", "role")}
    if isinstance(message.get("content"), list):
        texts = [_text_of(part, f"{at}.content[{i}]") for i, part in enumerate(message["content"])]
        message = {**message, "content": "".join(texts)}
    if isinstance(message.get("function_call"), dict):  # OpenAI's older form
        message = {**message, "tool_calls": [{"type": "function", "function": message["function_call"]}]}
        del message["function_call"]
    return message


def _text_of(part, at):
    if isinstance(part, dict) and {*part} <= {"type", "text"} and isinstance(part.get("text"), str):
        return part["text"]
    kind = f"of type {part.get('type')!r}" if isinstance(part, dict) else _kind(part)
    raise ValueError(f"{at} is {kind}: of parts, only {{type: text, text}} can be trained on")


def check_messages(messages, field="messages"):
    """Checks one conversation. Returns None.

    Raises:
        ValueError: naming the field: not a list, empty, unknown role, content that is not text, empty prompt, a
            `weight` or `train` that is not yes or no.
    """
    if not isinstance(messages, list):
        raise ValueError(f"{field} is {_kind(messages)}, expected a list of {{role, content}}")
    if not messages:
        raise ValueError(f"{field} is empty")
    for i, message in enumerate(messages):
        at = f"{field}[{i}]"
        if not isinstance(message, dict):
            raise ValueError(f"{at} is {_kind(message)}, expected an object with role and content")
        role = message.get("role")
        content = message.get("content")
        if role not in ROLES:
            raise ValueError(f"{at}.role is {role!r}, expected one of {', '.join(ROLES)}")
        if content is None and not (role == "assistant" and _calls_of(message)):
            raise ValueError(f"{at}.content is {'null' if 'content' in message else 'missing'}")
        if content is not None and not isinstance(content, str):
            raise ValueError(f"{at}.content is {_kind(content)}, expected a string")
        if role == "user" and not content.strip():
            raise ValueError(f"{at}.content is empty: a prompt needs text")
        for thought in THOUGHTS:
            if not isinstance(message.get(thought), str | None):
                raise ValueError(f"{at}.{thought} is {_kind(message[thought])}, expected a string")
        for switch in ("weight", "train"):
            if message.get(switch) not in (None, 0, 1):
                raise ValueError(f"{at}.{switch} is {message[switch]!r}, expected 0 or 1")


def _calls_of(message):
    return message.get("tool_calls") or message.get("function_calls")


def parse_tools(row, field="tools"):
    """The `tools` of a row: a list of JSON schemas, one schema, either as JSON text, or None. Raises ValueError.

    Without `tools`, a row's `functions` (OpenAI's older form) are read.
    """
    tools = row.get(field)
    if isinstance(tools, str) and tools.strip():
        tools = _parse_json(tools, field)
    if isinstance(tools, dict):
        tools = [tools]
    if tools and not isinstance(tools, list):
        raise ValueError(f"{field} is {_kind(tools)}, expected a list of JSON schemas")
    strange = [_kind(tool) for tool in tools or [] if not isinstance(tool, dict)]
    if strange:
        raise ValueError(f"{field} holds {strange[0]}, expected a list of JSON schemas")
    if not tools and field == "tools" and row.get("functions"):
        functions = parse_tools(row, "functions") or []
        return [tool if "function" in tool else {"type": "function", "function": tool} for tool in functions] or None
    return tools or None


RESERVED = ("messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
            "continue_final_message", "return_assistant_tokens_mask")  # fmt: skip


def read_options(row):
    """A row's `chat_template_kwargs`, variables for its template: a dict, from an object or JSON. Raises ValueError."""
    options = row.get("chat_template_kwargs") or {}
    if isinstance(options, str):
        options = _parse_json(options, "chat_template_kwargs")
    if not isinstance(options, dict):
        raise ValueError(f"chat_template_kwargs is {_kind(options)}, expected an object")
    for name in options:
        if name in RESERVED or name.endswith(("_token", "_tokens")):
            raise ValueError(f"chat_template_kwargs.{name} is not for a row to set")
    return {name: value for name, value in options.items() if value is not None}


def _parse_json(text, field):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{field}, column {error.colno}: not valid JSON: {error.msg}") from None


def _kind(value):
    names = {type(None): "null", str: "a string", list: "a list", dict: "an object", bool: "a boolean"}
    return names.get(type(value), "a number")


FILE = re.compile(r"\.(jsonl?|parquet|csv|tsv|txt|arrow|gz|zst|xz|bz2|zip|tar|pt|bin|safetensors|gguf)$")


def missing(name, max_parts):
    """How to say that a data source or model is missing if its name, which does not exist, looks like a path; or None.

    A Hub id has at most `max_parts` parts, ends as no file does, and its first part is no folder here.
    """
    first, *others = name.split("/")
    is_path = name.startswith(("/", ".", "~")) or FILE.search(name) or len(others) >= max_parts
    why = "no such file or folder"
    if not is_path:
        if not others or not os.path.isdir(first):
            return None
        why += f" (the Hub is not asked: a folder {first} is here)"
    path = Path(name)
    while not os.path.isdir(path.parent):
        path = path.parent
    names = os.listdir(path.parent)[:1000] if os.access(path.parent, os.R_OK) else []
    nearest = difflib.get_close_matches(path.name, names, n=3, cutoff=0)
    has = f"; {path.parent} has {', '.join(nearest)}" if nearest else ""
    return why + has


def check_model_path(path, file="config.json"):
    """Raises RunError for a model that is no folder with `file` and looks like a path: at once, without the Hub."""
    if os.path.isdir(path):
        model = os.path.join(path, "model")
        if os.path.isfile(os.path.join(path, "metrics.jsonl")) and os.path.isdir(model):
            raise RunError(f"model {path}: the folder of a run; its model is {model}")
        if file and not os.path.isfile(os.path.join(path, file)):
            raise RunError(f"model {path}: the folder has no {file}")
        return
    why = "a file, and a model is a folder" if os.path.exists(path) else missing(str(path), max_parts=2)
    if why:
        raise RunError(f"model {path}: {why}")
    find_hub()


@lru_cache(maxsize=1)
def find_hub():
    """Goes offline, to the cache, where the Hub cannot be reached: its client tries each file for half a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception as error:  # of its HTTP client
        _print_on_rank0(f"WARNING the Hub cannot be reached, only its cache is used: {first_line(error)}")
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


TEMPLATES = Path(__file__).parent / "chat_templates"
# What tokenizers treat in their own ways: line ends, digits, spaces, apostrophes, scripts, accents, tabs.
TEXT = " a\n\nb\n\n\nc 1234567 it's I'LL 你好世界 😀👍🏽 café cafe\u0301 ﬁ\t\tx  y   z\r\n \n end. "


def load_tokenizer(path, chat_template=None):
    """The tokenizer of a model, with its chat template settled.

    Args:
        path: model folder or Hub id.
        chat_template: "tulu", "chatml", a Jinja file, or None for the tokenizer's own.

    Raises:
        RunError: no such tokenizer, file or template, a Hub that cannot be reached, or a tokenizer without a fast
            (Rust) implementation.
    """
    check_model_path(path, file=None)
    try:
        tokenizer = _as_published(AutoTokenizer.from_pretrained(path), path)
    except Exception as error:  # of transformers, tokenizers, the Hub's client or its HTTP client: no common class
        if Path(path).is_dir():
            wrong = "no tokenizer could be loaded"
        else:
            wrong = "no such folder, and neither the Hub nor its cache gave this tokenizer"
        raise RunError(f"model {path}: {wrong}: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise RunError(f"model {path}: its tokenizer has no fast implementation, which character offsets need")
    if isinstance(tokenizer.chat_template, dict):  # several named templates: the one for chat, and for chats with tools
        templates = {name: tokenizer.chat_template.get(name) for name in ("default", "tool_use")}
        tokenizer.chat_template = templates if templates["tool_use"] and templates["default"] else templates["default"]
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template, tokenizer)
    if not tokenizer.chat_template:
        why = "its tokenizer has no chat template; choose one with --chat_template"
        raise RunError(f"model {path}: {why}: {_names_of_templates()} or a Jinja file")
    return tokenizer


def _as_published(tokenizer, path):
    """A byte-level tokenizer as tokenizer.json has it: transformers may put another pre-tokenizer in its place.

    Others are left: what is done at their spaces is for transformers to say (`legacy`). Raises ValueError.
    """
    try:
        original = Tokenizer.from_file(cached_file(path, "tokenizer.json"))
    except OSError:  # there is none: transformers has made one from other files
        return tokenizer
    ids = original.encode(TEXT, add_special_tokens=False).ids
    if "ByteLevel" in str(original.pre_tokenizer) and tokenizer(TEXT, add_special_tokens=False).input_ids != ids:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        if tokenizer(TEXT, add_special_tokens=False).input_ids != ids:
            raise ValueError("transformers makes other ids than its tokenizer.json")
        _print_on_rank0(f"model {path}: its tokenizer.json is used as it is; transformers would load another tokenizer")
    return tokenizer


def _print_on_rank0(text):
    if os.environ.get("RANK", "0") == "0":
        print(redact(text))


def _names_of_templates():
    return ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.jinja")))


def _read_template(name, tokenizer):
    """The Jinja text of one of ours, or of a file. Ours begin with BOS where the tokenizer puts one before text."""
    candidates = [TEMPLATES / f"{name}.jinja", Path(name)]
    files = [file for file in candidates if file.is_file()]
    if not files:
        raise RunError(f"--chat_template {name}: neither a file nor one of {_names_of_templates()}")
    try:
        template = files[0].read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"--chat_template {name}: {error}") from None
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a").input_ids[0] == bos:
        return template.replace("{{ bos }}", "{{ bos_token }}")
    return template.replace("{{ bos }}", "")


def first_line(error):
    """What an exception says, in one line: its first, and the next where that only announces it with a colon."""
    lines = str(error).replace(":\n", ": ").splitlines()
    if not lines:
        return type(error).__name__
    return lines[0]


def show_example(tokenizer, input_ids, trained, colour=True):
    """One sequence as text: in colour, for a terminal, trained tokens green and the rest grey; otherwise ⟦trained⟧."""
    changes = np.flatnonzero(np.diff(trained)) + 1
    edges = [0, *changes, len(input_ids)]
    marks = {True: ("\033[32m", "\033[0m"), False: ("\033[90m", "\033[0m")}
    if not colour:
        marks = {True: ("⟦", "⟧"), False: ("", "")}
    parts = []
    for start, end in itertools.pairwise(edges):
        before, after = marks[bool(trained[start])]
        parts.append(f"{before}{tokenizer.decode(input_ids[start:end])}{after}")
    return "".join(parts)


# ------------------------------------------------------------------------------------------------------ reading rows

JSON = "\ufdd0 JSON"  # a column that no data set has


def load_data(args, encode, at_least):
    """The rows of --data, and of --eval_data (None without). Rank 0 prints an account, and shows a row of each source.

    Args:
        args: has data, eval_data, seed, max_skip_frac, batch_size and best.
        encode: as for `load_rows`.
        at_least: how many rows there have to be: mostly --batch_size.

    Raises:
        DataError: as `load_rows`. RunError: fewer rows; --best without held-out data.
    """
    if args.best and not args.eval_data:
        raise RunError(f"--best {args.best} is a metric of held-out data: give --eval_data")
    rows = load_rows(args.data, encode, args.seed, args.max_skip_frac)
    if len(rows) < at_least:
        raise RunError(f"--data has {len(rows)} usable rows, fewer than --batch_size {args.batch_size}")
    report = rows.report
    eval_rows = None
    if args.eval_data:
        eval_rows = load_rows(args.eval_data, encode, args.seed, args.max_skip_frac)
        report = rows.report + eval_rows.report
    if os.environ.get("RANK", "0") == "0":
        warnings = [line for line in report if line.startswith("WARNING")]
        print(redact("\n".join(line for line in report if line not in warnings)))
        _, firsts = np.unique(rows.table.with_format("numpy")["source"][:], return_index=True)  # a row of each source
        for input_ids, trained in rows.sequences(firsts):
            print(show_example(encode.chat.tokenizer, input_ids, trained, colour=sys.stdout.isatty()))
        print(*map(redact, warnings), sep="\n", end="\n" if warnings else "")  # last, where they are seen
    return rows, eval_rows


def load_rows(sources, encode, seed=0, max_skip_frac=0.01):
    """Reads, encodes and mixes data sources.

    The encoded rows are cached on disk by `datasets`, under a hash of the file, the encoder's settings and this file's
    source. One process a node encodes (with many workers when there is much to do), the others read its cache.

    Args:
        sources: list of "SOURCE" or "SOURCE:AMOUNT". SOURCE is a .jsonl (also .jsonl.gz, …), .json, .parquet or .csv
            file, a folder of such files, or a Hub id (`name`, `name@split`, `name/config@split`; these also of a
            folder). AMOUNT is a fraction of the rows with a point in it ("0.5"; "2.0" takes each twice) or a count
            ("1000"); which rows depends on the seed.
        encode: picklable callable with a `key` (str) that changes with its settings, and `features`, the columns it
            makes. Takes a row (dict), returns a dict with at least `input_ids`, `trained` (lists of one length) and
            `notes` (list of str, counted in the report). Raises Skip to leave the row out and ValueError to reject
            the row: it is left out too, with file, row and field.
        max_skip_frac: largest accepted share of rows left out.

    Returns:
        Rows, in the order of the sources.

    Raises:
        DataError: unreadable source, a rejected row, nothing left, or too many rows skipped. RunError: the cache
            cannot be written.
    """
    tables = []
    names = []
    report = []
    for number, spec in enumerate(sources):
        name, amount = split_amount(spec)
        raw, row_numbers = _read(name)
        if not len(raw):
            raise DataError(name, None, "the data set is empty")
        # Rows are counted in three ways: in `raw`, the source as it was read; in `encoded`, E rows, which has each one
        # that is needed once, in the order of the source; in the mixture, M rows, which may take one several times.
        mixture = choose(len(raw), amount, np.random.default_rng([seed, number]), spec)  # (M,) indices in raw
        needed = np.unique(mixture)  # (E,) indices in raw, ascending
        encoded = _encode_cached(raw.select(needed), row_numbers[needed], name, encode)
        lines, is_kept = _account(name, encoded, max_skip_frac)  # (E,)
        report += lines
        encoded = encoded.add_column("source", np.full(len(encoded), number))
        places = np.searchsorted(needed, mixture)  # (M,) indices in encoded
        tables.append(encoded.select(places[is_kept[places]]))
        names.append(name)
    table = datasets.concatenate_datasets(tables)
    measures = table.select_columns(["length", "targets", "digest"]).with_format("numpy")[:]
    fingerprint = hashlib.sha256(measures["digest"].tobytes()).hexdigest()[:16]
    return Rows(table, names, measures["length"], measures["targets"], report, fingerprint)


def split_amount(spec):
    """(SOURCE, AMOUNT or None) of SOURCE[:AMOUNT], as text. Raises DataError."""
    match = re.fullmatch(r"(.+?)(?::(\d+|\d*\.\d+|\d+\.))?", spec, re.DOTALL)
    if not match:
        raise DataError(repr(spec), None, "an empty data source")
    return match.groups()


def read_rows(source):
    """Yields (row number, row) of one SOURCE, unencoded. Raises DataError."""
    raw, row_numbers = _read(source)
    for number, row in zip(row_numbers, raw, strict=True):
        try:
            yield int(number), _decode_row(row)
        except ValueError as error:
            raise DataError(source, int(number), str(error)) from None


LINES = (".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".jsonl.zst")


def _read(name):
    """The raw rows of one source, and their numbers in it. Rows of JSON files have one column, JSON: their text."""
    try:
        if name.endswith(LINES) and os.path.isfile(name) and os.path.getsize(name):
            return _read_lines(name)
        raw = _read_file(name) if os.path.isfile(name) else _read_data_set(name)
    except json.JSONDecodeError as error:
        raise DataError(name, error.lineno, f"column {error.colno}: not valid JSON: {error.msg}") from None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _whose_fault(name, error) from None
    return raw, np.arange(1, len(raw) + 1)


def _read_lines(name):
    """As lines of text, so that line numbers hold and no value is coerced to its column's type."""
    with open(name, "rb") as file:
        version = hashlib.file_digest(file, "sha256").hexdigest()[:16]  # an edit shows, whatever its time
    lines = datasets.load_dataset("text", name=version, data_files=glob.escape(name), split="train")
    filled = np.flatnonzero(pc.match_substring_regex(lines.data.column("text"), r"\S"))
    return lines.select(filled).rename_column("text", JSON), filled + 1


def _read_file(name):
    if name.endswith(".parquet"):
        return datasets.load_dataset("parquet", data_files=glob.escape(name), split="train")
    if name.endswith((".csv", ".tsv")):
        return datasets.Dataset.from_dict({JSON: [json.dumps(row) for row in _read_table(name)]})
    if not name.endswith((".json", ".jsonl")):
        raise DataError(name, None, f"not a file of rows: {', '.join(LINES)}, .json, .parquet, .csv or .tsv wanted")
    text = Path(name).read_text(encoding="utf-8-sig")
    rows = json.loads(text) if text else []  # an empty .jsonl is an empty list, too
    if not isinstance(rows, list):
        raise DataError(name, None, f"expected a JSON list of rows, found {_kind(rows)}; one object a line?")
    return datasets.Dataset.from_dict({JSON: [json.dumps(row) for row in rows]})


def _read_table(name):
    """The rows of a .csv or .tsv file, whose first line names the columns. Values stay text: 007 is not 7."""
    csv.field_size_limit(2**31 - 1)
    with open(name, encoding="utf-8-sig", newline="") as file:
        mark = "\t" if name.endswith(".tsv") else ","
        reader = csv.DictReader(file, delimiter=mark, strict=True)
        try:
            rows = list(reader)
        except csv.Error as error:
            text = f"line {reader.line_num + 1}: {error}: a value with a quote has it twice"
            raise DataError(name, None, text) from None
        columns = reader.fieldnames or []
    if len(columns) == 1 and re.search(r"[;\t,]", columns[0]):
        what = "a comma" if mark == "," else "a tab"
        raise DataError(name, None, f"one column, {columns[0]!r}: {what} has to stand between values")
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            more = "more" if None in row else "fewer"
            text = f"{more} values than the {len(columns)} columns: a value with a comma or a line break"
            raise DataError(name, number, f"{text} has to stand in double quotes")
    return rows


def _read_data_set(name):
    """A folder, as the Hub's client downloads it, or a data set of the Hub; with or without `/config` and `@split`."""
    path, split = name, None
    if not os.path.isdir(name):
        path, split = re.fullmatch(r"(.+?)(?:@([^/@]*))?", name, re.DOTALL).groups()
    folder, config = Path(path), None
    card = folder.parent / "README.md"
    if "/" in path and not os.path.isdir(path) and os.path.isfile(card):
        if f"config_name: {folder.name}\n" in card.read_text(encoding="utf-8"):
            folder, config = folder.parent, folder.name
    if os.path.isdir(folder):
        return datasets.load_dataset(os.path.abspath(folder), config, split=split or "train")
    why = missing(path, max_parts=math.inf)
    if why:
        raise DataError(name, None, why)
    find_hub()
    parts = path.split("/")
    try:
        return datasets.load_dataset("/".join(parts[:2]), "/".join(parts[2:]) or None, split=split or "train")
    except Exception as error:  # of datasets, pyarrow, the Hub's client or its HTTP client: no common class
        raise _whose_fault(name, error, "neither the Hub nor its cache gave this data set") from None


def _whose_fault(name, error, wrong="cannot be read"):
    """The RunError for what reading or encoding a source has raised: the cache's, the disk's or the source's fault."""
    while error.__cause__ and not getattr(error, "errno", None):
        error = error.__cause__
    file = str(getattr(error, "filename", None) or "")
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    for variable, settings in (("HF_DATASETS_CACHE", datasets.config), ("HF_HUB_CACHE", huggingface_hub.constants)):
        folder = os.path.abspath(getattr(settings, variable))
        if file.startswith(folder) or (is_full and not file):
            free = shutil.disk_usage(folder).free if os.path.isdir(folder) else 0
            why = f"cannot be written, {free:,} bytes free: {first_line(error)}"
            return RunError(f"cache folder {folder} {why}; {variable}=DIR chooses another")
    if name.endswith((".jsonl", ".json")) and os.path.isfile(name):
        for number, line in enumerate(Path(name).read_bytes().split(b"\n"), 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as bad:
                return DataError(name, number, f"column {bad.start + 1}: not valid UTF-8")
    return DataError(name, None, f"{wrong}: {first_line(error)}")


def choose(count, amount, rng, spec):
    """Row numbers (from 0) that SOURCE:AMOUNT stands for, in file order where each is taken once. Raises DataError."""
    if amount is None:
        total = count
    elif "." in amount:
        total = round(float(amount) * count)
    else:
        total = int(amount)
    if total == 0:
        raise DataError(spec, None, f"this amount selects none of the {count} rows")
    if total == count:
        return np.arange(count)
    repeats = math.ceil(total / count)  # no row comes once more before all have come
    return np.concatenate([rng.permutation(count) for _ in range(repeats)])[:total]


def _encode_cached(raw, row_numbers, name, encode):
    """Maps `encode` over raw rows; a skipped row keeps its place, with the reason in the column `skip`."""
    files = {__file__, *(inspect.getsourcefile(kind) for kind in type(encode).__mro__[:-1])}  # a fork's encoder, too
    sources = [Path(file).read_text(encoding="utf-8") for file in sorted(files)]
    versions = [module.__version__ for module in (transformers, tokenizers, jinja2)]
    key = json.dumps([raw._fingerprint, encode.key, name, sources, versions])
    key = hashlib.sha256(key.encode()).hexdigest()[:32]
    columns = {
        **encode.features,
        "length": datasets.Value("int64"),  # tokens
        "targets": datasets.Value("int64"),  # tokens that are trained on
        "digest": datasets.Value("int64"),  # of all of the encoder's columns
        "notes": datasets.List(datasets.Value("string")),
        "skip": datasets.Value("string"),
        "row": datasets.Value("int64"),
    }
    workers = min(os.cpu_count() or 1, len(raw) // 5000) if sys.platform == "linux" else 1  # elsewhere forks are unsafe
    settings = {"row_numbers": row_numbers, "encode": encode}
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{key}.lock"):  # the first process on the node encodes, the others find its cache
            return raw.map(
                _encode_row,
                with_indices=True,
                cache_file_name=str(cache / f"{key}.arrow"),
                fn_kwargs=settings,
                remove_columns=raw.column_names,
                features=datasets.Features(columns),
                num_proc=workers if workers > 1 else None,
                new_fingerprint=key,
            )
    except OSError as error:
        raise _whose_fault(name, error, "cannot be encoded") from None


def _die_with_parent(_):
    """In a process that `datasets` has forked: the kernel kills it when the one that forked it ends, in any way."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != multiprocess.parent_process().pid:  # before that call
        os._exit(1)


if sys.platform == "linux":  # elsewhere nothing is forked
    multiprocess.util.register_after_fork(datasets, _die_with_parent)  # else it waits for ever, holding the lock


def _encode_row(raw, index, row_numbers, encode):
    columns = dict.fromkeys(encode.features)
    notes, skip = [], ""
    try:
        columns |= encode(_decode_row(raw))
        notes = columns.pop("notes")
    except (Skip, ValueError, RecursionError) as reason:
        skip = str(reason)
    ids = np.array(columns["input_ids"] or [], dtype=np.int32)
    mask = np.array(columns["trained"] or [], dtype=bool)
    rest = [value for name, value in columns.items() if name not in ("input_ids", "trained")]
    digest = hashlib.blake2b(ids.tobytes() + mask.tobytes() + json.dumps(rest).encode(), digest_size=8).digest()
    measures = {"length": len(ids), "targets": int(mask[1:].sum()), "digest": int.from_bytes(digest, signed=True)}
    arrays = {"input_ids": ids, "trained": mask}  # written faster than lists
    return {**columns, **arrays, **measures, "notes": notes, "skip": skip, "row": int(row_numbers[index])}


def _decode_row(raw):
    """A row as a dict. Raises ValueError, also for text that cannot be written as UTF-8."""
    row = _without_nulls(dict(raw))
    if JSON in row:
        try:
            row = json.loads(row[JSON].removeprefix("\ufeff"))  # a byte-order mark
            json.dumps(row, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            raise ValueError(f"column {error.colno}: not valid JSON: {error.msg}") from None
        except UnicodeEncodeError as error:
            raise ValueError(f"lone surrogate {error.object[error.start]!a} is not text") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {_kind(row)}")
    return row


def _without_nulls(value):
    """Columns of one type fill what a row does not have with null: tool calls would get everybody's arguments."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


def _account(name, encoded, max_skip_frac):
    """(report lines, (E,) bool which rows are kept) for one source. Raises if nothing, or too little, is left."""
    table = encoded.select_columns(["skip", "notes", "row"]).with_format("arrow")[:]
    rows = table["row"].to_numpy()
    is_kept = pc.equal(table["skip"], "").to_numpy()
    notes = table["notes"].combine_chunks()
    skips = _tally(table["skip"].filter(~is_kept).combine_chunks(), rows[~is_kept])
    read = len(table)
    skipped = read - int(is_kept.sum())
    lines = [f"{name}: {read} rows read, {read - skipped} kept"]
    lines += [f"  {count} skipped: {reason} (first: row {row})" for reason, count, row in skips[:REASONS]]
    if len(skips) > REASONS:
        others = sum(count for _, count, _ in skips[REASONS:])
        lines.append(f"  {others} skipped for {len(skips) - REASONS} other reasons")
    for note, count, row in _tally(pc.list_flatten(notes), rows[pc.list_parent_indices(notes).to_numpy()]):
        lines.append(f"  {count} {note} (first: row {row})")
        if note == TRUNCATED and count > read / 2:
            remedy = "raise it, or leave them out with --overlong drop"
            lines.append(f"WARNING {name}: {count} of {read} rows are cut at --max_length: {remedy}")
    if skips:
        limited = sum(count for reason, count, _ in skips if reason != TOO_LONG)  # dropping long rows was asked for
        reason, count, row = next(filter(lambda entry: entry[0] != TOO_LONG, skips), skips[0])
        if read == skipped:
            raise DataError(name, row, f"{reason}; 0 of {read} rows usable ({count} × this reason)")
        if limited > max_skip_frac * read:
            why = f"{limited} of {read} rows skipped, more than --max_skip_frac allows ({count} × this reason)"
            raise DataError(name, row, f"{reason}; {why}")
    return lines, is_kept


REASONS = 10  # so many are printed


def _tally(texts, rows):
    """[(text, how often, the first row with it), …] of a pyarrow array of strings, the most frequent first."""
    codes = texts.dictionary_encode()
    _, first, counts = np.unique(codes.indices.to_numpy(), return_index=True, return_counts=True)
    entries = zip(codes.dictionary.to_pylist(), counts.tolist(), rows[first].tolist(), strict=True)
    return sorted(entries, key=lambda entry: (-entry[1], entry[2]))


# --------------------------------------------------------------------------------- folders of models, folders of runs


SOURCES = {}  # model: (configuration, generation settings). Exports need them when the model itself may be gone


def read_source(model):
    """The configuration of a model, and its settings for generation as a dict. Raises RunError."""
    check_model_path(model)
    try:
        config = AutoConfig.from_pretrained(model)
        try:
            generation = GenerationConfig.from_pretrained(model)
        except OSError:  # it has none
            names = ("bos_token_id", "eos_token_id", "pad_token_id")
            generation = GenerationConfig(**{name: getattr(config, name) for name in names})
    except Exception as error:  # transformers and the Hub's client have many
        raise RunError(f"model {model}: {first_line(error)}") from None
    SOURCES[model] = config, generation.to_diff_dict()
    return SOURCES[model]


def load_config(args):
    """The configuration of --model, checked against the flags before anything large is loaded. Raises RunError."""
    config = copy.deepcopy(read_source(args.model)[0])
    config.dtype = config.dtype or torch.float32
    if vars(args).get("attn") == "packed_fa" and not (torch.cuda.is_available() and find_spec("flash_attn")):
        raise RunError("--attn packed_fa needs the package flash-attn and a CUDA device: --attn packed needs neither")
    limit = getattr(config, "max_position_embeddings", None)
    if limit and args.max_length > limit:
        what = f"--max_length {args.max_length} is beyond the {limit} positions this model knows"
        raise RunError(f"{what}: give --max_length {limit} or less")
    for name in ("logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1):
            raise RunError(f"model {args.model} transforms its logits ({name}), which is not supported")
    return config


def weight_files(model):
    """Paths (list of str) of the files with a model's weights: those that from_pretrained takes. Raises RunError."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    try:
        found = (cached_file(model, name, _raise_exceptions_for_missing_entries=False) for name in names)
        path = next(filter(None, found), None)  # the first that is there; the others are not asked for
        if path and path.endswith(".index.json"):  # which lists the others
            return [path, *get_checkpoint_shard_files(model, path)[0]]
    except Exception as error:  # of the Hub's client; or a list that is damaged
        raise RunError(f"model {model}: {first_line(error)}") from None
    if path is None:
        raise RunError(f"model {model}: it has no {names[0]}, whole or in parts")
    return [path]


def read_weights(path, config, model_class):
    """{name: tensor} of every parameter and buffer of a model.

    Raises:
        RunError: unless all are there, expected and finite, and as SHA256SUMS says if the folder has one.
    """
    sums = Path(path, "SHA256SUMS")
    for line in sums.read_text().splitlines() if sums.is_file() else ():
        digest, _, name = line.partition("  ")
        if name.endswith(".safetensors") and hash_file(sums.with_name(name)) != digest:
            raise RunError(f"{sums} does not fit {name}: it is damaged, or if changed on purpose, delete SHA256SUMS")
    try:
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are in info, and wrong
        source, info = model_class.from_pretrained(path, dtype=config.dtype, **options)
    except Exception as error:  # likewise, and safetensors
        raise RunError(f"model {path}: {first_line(error)}") from None
    if not hasattr(source.base_model, "layers"):
        raise RunError(f"model {path}: {type(source).__name__} is not built of decoder layers (.layers)")
    wrong = {kind: sorted(keys)[:5] for kind, keys in info.items() if keys}
    if wrong:
        raise RunError(f"model {path}: weights do not fit the architecture: {wrong}")
    weights = source.state_dict() | dict(source.named_non_persistent_buffers())  # rotary frequencies are of the latter
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise RunError(f"model {path}: {name} holds values that are not finite")
    return weights


def lock_run(out):
    """Locks the folder of a run until this process ends, however it ends.

    Returns:
        the lock, and the config.json of the run that is there, {} for a new one.

    Raises:
        RunError: if another process has it, or if it holds files that no run of ours has written.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = {path.name for path in out.iterdir() if path.suffix not in (".log", ".txt", ".out", ".err")}
    if "config.json" not in found and found - {"lock", "config.tmp"}:
        raise RunError(f"{out} has {min(found)} but no config.json of a run: choose another --out")
    lock = FileLock(out / "lock")  # where the file system has no locks: a file that names host and process
    try:
        lock.acquire(timeout=0)
    except Timeout:
        process = read_run_config(out).get("process", "another process")
        raise RunError(f"{out} is in use by {process}: wait for it, or choose another --out") from None
    return lock, read_run_config(out)


def read_run_config(out):
    """config.json in the folder of a run, or {}. Raises RunError if it is damaged, or of another program."""
    path = Path(out, "config.json")
    if not _is_there(path):
        return {}
    try:
        config = redact(json.loads(path.read_text()))  # as a newer pattern has it
        kinds = {"script": str, "data": list, "args": dict, "steps": int, "date": str}
        wrong = [name for name, kind in kinds.items() if not isinstance(config[name], kind)]
        wrong += [] if len(config["data"]) == 2 else ["data"]
        why = f"{wrong[0]} is of the wrong kind" if wrong else None
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        why = repr(error)
    if why:
        raise RunError(f"{path} is damaged, or of another program ({why}): restore it, or choose another --out")
    return config


def _is_there(path):
    """Whether there is such a file. Raises RunError for what is none: a pipe would be waited for."""
    if not path.is_file() and (path.exists() or path.is_symlink()):
        raise RunError(f"{path} is no file: move it away, or choose another --out")
    return path.is_file()


def start_date(out):
    """The date that the run in a folder began with, for templates that print one; for a new one that of today."""
    return read_run_config(out).get("date") or date.today().isoformat()


def checkpoints(out):
    """{step: folder} of the checkpoints of a run, oldest first. Other names beside them are ignored."""
    names = [path.name for path in out.glob("checkpoints/step_*")]
    steps = sorted(int(name.removeprefix("step_")) for name in names if re.fullmatch("step_[1-9][0-9]*", name))
    return {step: out / "checkpoints" / f"step_{step}" for step in steps}


def hash_file(path):
    """SHA-256 of a file; or why it cannot be read, which is no file's."""
    if not path.is_file():
        return "no file"
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return str(error)


def files_in(folder):
    """Names of all files below a folder, relative to it, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def files_of_rank(folder, rank):
    """Those that a rank has written into a checkpoint: its shards; rank 0 also all that are nobody's shards."""
    shards = {name: re.fullmatch(r"state/__(\d+)_\d+\.distcp", name) for name in files_in(folder)}
    return [name for name, shard in shards.items() if rank == (int(shard[1]) if shard else 0)]


def set_aside_if_damaged(folder, hashes):
    """Whether a checkpoint is not as it was written, by its sums.json. Then says so and renames it to step_N.damaged.

    Args:
        hashes: {name: SHA-256} of the files that are there.

    Raises:
        RunError: if somebody else could have written in it: torch unpickles a checkpoint's metadata.
    """
    for name in [".", *hashes]:
        state = (folder / name).lstat()
        if state.st_uid != os.getuid() or (state.st_mode & 0o022 and not stat.S_ISLNK(state.st_mode)):
            whose = "belongs to somebody else, or is group- or world-writable"
            raise RunError(f"{folder / name} {whose}: it will not be loaded. If you trust it, chown and chmod go-w it")
    wrong = []
    try:
        text = (folder / "sums.json").read_text() if (folder / "sums.json").is_file() else ""
        sums = json.loads(text)
        then = sums["files"] | {"sums.json": hashes["sums.json"]}
        wrong += [f"{name} is missing" for name in then.keys() - hashes.keys()]
        wrong += [f"{name} is new" for name in hashes.keys() - then.keys()]
        wrong += [f"{name} has changed" for name in then.keys() & hashes.keys() if then[name] != hashes[name]]
        if sums["checkpoint"] != folder.name or json.dumps(sums) != text:
            wrong.append("sums.json is another checkpoint's, or has changed")
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        wrong.append(f"sums.json is damaged or missing ({first_line(error)})")
    if wrong:
        aside = folder.with_suffix(".damaged")
        _remove(aside)
        folder.rename(aside)
        print(f"WARNING {folder} is damaged, it is now {aside.name}: {'; '.join(sorted(wrong)[:3])}")
    return bool(wrong)


def prepare_run(out, config, first_step):
    """Writes config.json, clears what a kill left half written or half deleted and what was logged after first_step."""
    replace_text(out / "config.json", json.dumps(config, indent=2))
    (out / "checkpoints").mkdir(exist_ok=True)
    (out / "checkpoints").chmod(0o700)  # because of set_aside_if_damaged
    for path in [*(out / "checkpoints").iterdir(), out / "model.tmp", out / "best.tmp"]:
        if re.fullmatch(r"step_[0-9]+\.(tmp|trash)|(model|best)\.tmp", path.name):
            _remove(path)
    cut_log(out / "samples.jsonl", first_step)
    had_steps = (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").stat().st_size > 0
    steps = cut_log(out / "metrics.jsonl", first_step)
    if had_steps and not first_step:
        print(f"{out} has no checkpoint: the run begins anew")
    if first_step and steps not in (list(range(1, first_step + 1)), list(range(first_step + 1))):
        print(f"WARNING {out}/metrics.jsonl does not have each step up to {first_step} once, in order: it was changed")


def _remove(path):
    """Deletes what is there, if anything: a folder, a file, a link (not what it leads to)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def cut_log(path, last_step):
    """Takes the lines after a step out of a .jsonl file. Returns the steps that stay.

    Raises:
        RunError: a damaged line among those that stay. (After them there may be half a line.)
    """
    if not _is_there(path):
        return []
    kept, steps = [], []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if last_step else (), 1):
        try:
            step = json.loads(line)["step"] if line.endswith(b"\n") else math.inf
            if step <= last_step:
                kept.append(line)
                steps.append(step)
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            if last_step in steps:
                break
            raise RunError(f"{path}, row {number}: damaged ({error!r}): mend or delete the file") from None
    replace_text(path, b"".join(kept).decode())
    return steps


# ------------------------------------------------------------------------------------------- what a run shows of itself

# Groups of metrics, for W&B and reports: the first whose pattern a name begins with. In metrics.jsonl names have none.
METRIC_GROUPS = {
    "eval": "eval_",
    "reward": "reward|rm_score|zero_std_groups",
    "rollout": r"groups|sampl|completion_|solved_|surplus_|judge_|staleness|behaviour_kl|tis_capped|eos_rate|\w+_rate$",
    "speed": r"\w*tokens$|tokens_per_second|\w*seconds|peak_memory|mfu",
    "train": "",
}


def grouped(name):
    """'eval/loss' for the metric eval_loss, 'reward/reward_std', 'train/lr', ..."""
    group = next(group for group, pattern in METRIC_GROUPS.items() if re.match(pattern, name))
    return f"{group}/{name.removeprefix('eval_')}"


def start_wandb(out, config):
    """A run of Weights & Biases, which goes on when the run does; offline unless somebody is logged in.

    W&B reads its own variables: WANDB_PROJECT (by default postcard), WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_TAGS, ...
    """
    import wandb  # only here: it takes a second

    mode = os.environ.get("WANDB_MODE", "online" if wandb.login(prompt=False) else "offline")
    settings = wandb.Settings(x_disable_meta=True, console="off")  # command line and output may hold secrets
    project, name = os.environ.get("WANDB_PROJECT", "postcard"), os.environ.get("WANDB_NAME", out.name)
    same = {"id": hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16], "resume": "allow", "dir": out}
    config = config | config["args"]
    return wandb.init(
        project=project, name=name, job_type=config["script"], config=config, mode=mode, settings=settings, **same
    )


def log_to_wandb(run, entry, out):
    """Logs an entry of metrics.jsonl under grouped names; with an evaluation, and every 25 steps, also completions.

    These are the lines of OUT/samples.jsonl that are of this step, as a table.
    """
    import wandb

    step = entry["step"]
    numbers = {grouped(name): value for name, value in entry.items() if name != "step"}
    if any(name.startswith("eval_") for name in entry) or step % 25 == 0:
        lines = [line for line in read_samples(out) if line["step"] == step]
        columns = [name for name in SAMPLE_COLUMNS if any(name in line for line in lines)]
        if lines:
            numbers["samples"] = wandb.Table(columns, [[line.get(name) for name in columns] for line in lines])
    run.log(numbers, step=step)


SAMPLE_COLUMNS = ("step", "held_out", "row", "prompt", "completion", "reward", "advantage", "reason", "answer", "ended")


def read_samples(out):
    """The lines of OUT/samples.jsonl, as dicts; [] if there is none."""
    path = Path(out, "samples.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if _is_there(path) else []


def some_prompts(rows, amount):
    """[(i, ids of the prompt), ...] of so many rows, evenly spaced: what stands before the first trained token."""
    chosen = np.linspace(0, len(rows) - 1, min(amount, len(rows))).astype(int).tolist()
    sequences = rows.sequences(chosen)
    firsts = sequences[:: max(1, len(sequences) // max(1, len(chosen)))]  # of a pair the chosen answer's
    return [(i, ids[: np.argmax(trained)]) for i, (ids, trained) in zip(chosen, firsts, strict=True)]


def write_answers(out, step, rows, prompts, answers, chat):
    """Appends answers to held-out prompts to OUT/samples.jsonl, control tokens and all. Returns the lines, as dicts.

    Args:
        prompts: of `some_prompts`. answers: a list of token ids for each.

    Raises:
        RunError: as `append_samples`.
    """
    lines = []
    for (i, prompt), ids in zip(prompts, answers, strict=True):
        texts = {"prompt": chat.tokenizer.decode(prompt), "completion": chat.tokenizer.decode(ids)}
        ended = ids[-1:] != [] and ids[-1] in chat.stop_ids
        lines.append({"step": step, "row": rows.where(i), **texts, "ended": ended, "held_out": True})
    append_samples(out, lines)
    return lines


def append_samples(out, lines):
    """Appends dicts to OUT/samples.jsonl. Raises RunError if that fails: the disk is full, say."""
    path = Path(out, "samples.jsonl")
    try:
        with open(path, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as error:
        raise RunError(f"writing {path} failed: {error}") from None


def describe_data(rows, eval_rows):
    """For config.json: fingerprints of the rows of --data and --eval_data (or None), and what was said about them."""
    both = [each for each in (rows, eval_rows) if each]
    fingerprints = [each and each.fingerprint for each in (rows, eval_rows)]
    return {"data": fingerprints, "data_report": redact([line for each in both for line in each.report])}


def check_entry(entry):
    """Raises RunError if a number of an entry of metrics.jsonl is not finite."""
    for name, value in entry.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise RunError(f"step {entry['step']}: {name} is {value}")


PEAK_FLOPS = {  # of products of bf16 matrices a second, without sparsity: NVIDIA's data sheets
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "GH200": 989e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def flops_per_token(model):
    """Operations of a forward and a backward pass that a token's products with weights take: 6 for each weight.

    Attention's products, and what activation checkpointing recomputes, do not count; the embedding counts if it is also
    the head. None for a mixture of experts, of which a token meets a part.
    """
    if any("experts" in name for name, _ in model.named_parameters()):
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_looked_up = head is None or head.weight is not embedding.weight
    return 6 * (sum(weight.numel() for weight in model.parameters()) - is_looked_up * embedding.weight.numel())


def hardware_metrics(model, tokens_per_second):
    """{"peak_memory_gib": the most that this process has held}, and on a known GPU "mfu".

    On CUDA memory is what PyTorch's tensors took, elsewhere what was resident. mfu, model FLOPs utilisation (PaLM,
    arXiv 2204.02311, appendix B), is `flops_per_token` times the tokens a second of each GPU, as a share of its peak.
    """
    if not torch.cuda.is_available():
        unit = 2**30 if sys.platform == "darwin" else 2**20  # there bytes, on Linux KiB
        return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    metrics = {"peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30}
    peaks = [peak for name, peak in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()]
    flops = flops_per_token(model)
    if peaks and flops:
        metrics["mfu"] = flops * tokens_per_second / peaks[0]
    return metrics


def progress_text(entry):
    """What the bar and the lines of a run show of an entry of metrics.jsonl."""
    names = "loss eval_loss accuracy reward eval_reward tokens_per_second mfu peak_memory_gib".split()
    shown = [(name, entry[name]) for name in names if name in entry]
    return ", ".join(f"{name} {value:,.0f}" if value > 999 else f"{name} {value:.4g}" for name, value in shown)


def is_best(out, metric, entry):
    """Whether an entry's held-out METRIC is better than that of the model in OUT/best: lower, if it is a loss.

    Raises:
        RunError: the entry has none of this name.
    """
    if metric not in entry:
        known = ", ".join(sorted(name for name in entry if name.startswith("eval_")))
        raise RunError(f"--best {metric}: no metric of the evaluation has this name; there are {known}")
    old = [json.loads(path.read_text()) for path in out.glob("best/step_*/best.json")]
    sign = -1 if re.search("loss|nll", metric) else 1
    return all(sign * entry[metric] > sign * model[metric] for model in old if metric in model)


def publish_best(partial, metric, entry):
    """A whole exported model becomes OUT/best/step_N, in place of the one before."""
    folder = partial.with_name("best")
    folder.mkdir(exist_ok=True)
    _write_json(partial / "best.json", {"step": entry["step"], metric: entry[metric]})
    sync_to_disk(partial)
    old = [path.rename(path.with_suffix(".trash")) for path in folder.glob(f"step_{entry['step']}")]
    old += [path for path in folder.iterdir() if path not in old]
    partial.rename(folder / f"step_{entry['step']}")
    for path in old:
        _remove(path)


def summary(out):
    """What a finished run says at its end: where its model is, its first and last held-out metric (or loss)."""
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    change = ""
    for name in ("loss", "reward", "eval_loss", "eval_accuracy", "eval_reward"):  # the last that there is
        values = [entry[name] for entry in entries if isinstance(entry.get(name), int | float)]
        if len(values) > 1:
            change = f", {name} {values[0]:.4g} → {values[-1]:.4g}"
    change += "".join(f"; the best is in {path.parent}" for path in sorted(out.glob("best/step_*/best.json")))
    return f"finished{change}. Its model: {out}/model. Next: --model {out}/model of another script, or from_pretrained"


def replace_text(path, text):
    """Writes a file: whole or not at all."""
    path.with_suffix(".tmp").unlink(missing_ok=True)
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").replace(path)


def sync_to_disk(folder, deep=True):
    """fsync of a folder and, if deep, of everything in it."""
    for path in [*folder.rglob("*"), folder] if deep else [folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write_model(path, source, model, weights, chat):
    """Writes a folder that transformers 5 and 4.57 open alike, weights in the source model's precision.

    Args:
        source: the model that training began with; load_config has read it, and it may be gone by now.
        model: one of the architecture to write. weights: {name: tensor}. chat: a ChatFormat.
    """
    source_config, generation = copy.deepcopy(SOURCES.get(source) or read_source(source))
    source_config.dtype = source_config.dtype or torch.float32
    own = {name: getattr(model.config, name) for name in ("num_labels", "pad_token_id")}  # a reward model has its own
    source_config.update(own)
    with torch.device("meta"):
        skeleton = type(model)(source_config).to(source_config.dtype)
    weights = {name: tensor.to(source_config.dtype) for name, tensor in weights.items()}
    skeleton.save_pretrained(path, state_dict=weights)
    if (path / "generation_config.json").exists():  # a reward model has none
        _write_generation(path / "generation_config.json", generation, chat.stop_ids)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    _write_json(path / "config.json", config | _old_rope(config))
    _write_tokenizer(path, chat.tokenizer)
    files = sorted(path.glob("*.safetensors"))
    for file in files:
        shutil.copymode(path / "config.json", file)  # by the umask; safetensors makes it private
    (path / "SHA256SUMS").write_text("".join(f"{hash_file(file)}  {file.name}\n" for file in files))


def _write_generation(path, settings, stop_ids):
    """The source model's settings, valid or not (save_pretrained would refuse), with its end tokens and ours."""
    settings.pop("_from_model_config", None)  # 4.57 might make the settings from the model's configuration then
    theirs = settings.get("eos_token_id")
    ends = dict.fromkeys([*stop_ids, *(theirs if isinstance(theirs, list) else [theirs])])  # each once, in this order
    ends.pop(None, None)
    settings["eos_token_id"] = list(ends) if len(ends) > 1 else next(iter(ends))
    _write_json(path, settings)


def _write_tokenizer(path, tokenizer):
    """With its chat template. Readers are told to take tokenizer.json as it is.

    A tokenizer class of its own might put its own pre-tokenizer, or rule for BOS, in the place of the file's.
    """
    tokenizer.save_pretrained(path)
    settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only", "backend"):  # how it was loaded here
        settings.pop(name, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):  # 4.57 wants no list by this name
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    for name in ("model_input_names", "padding_side"):  # which the class knew
        settings[name] = getattr(tokenizer, name)
    pre_tokenizer = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    if "add_prefix_space" in pre_tokenizer:  # 4.57 sets it to what is said here, or to False
        settings["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    _write_json(path / "tokenizer_config.json", settings)


def _old_rope(config):
    """The entries of a config.json where transformers 4.57 looks for what 5 keeps in `rope_parameters`."""
    rope, old = config.get("rope_parameters") or {}, {}
    if config["model_type"] in ("gemma3_text", "gemma3n_text", "olmo3"):  # which have two
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if "rope_theta" not in rope:  # none, or for kinds of layers that 4.57 does not know
        return {}
    old |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if rope["rope_type"] != "default":  # 5 believes rope_scaling before rope_parameters: nothing may be lost
        scaling = {name: value for name, value in rope.items() if name not in old and name != "rope_type"}
        key = "type" if config["model_type"] in ("olmo", "olmo2", "phi3") else "rope_type"  # these refuse the other
        if "original_max_position_embeddings" in config:  # Phi 3 has it there, and refuses it here
            scaling.pop("original_max_position_embeddings", None)
        old["rope_scaling"] = scaling | {key: rope["rope_type"]}
    return old


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
