"""Rows → chat template → token sequences → microbatches. What every script shares, and nothing else. From the top:

    batches         batch_indices: which rows make up a step → deal: who gets which → Rows.sequences → pack: tensors
    chat templates  encoders: a row → a token sequence, checked; ChatFormat: messages → ids and mask, in one function
    reading rows    load_rows: files and Hub data sets → `Rows`, checked row by row; what is left out is counted

A row comes the other way: it is read at the bottom, encoded in the middle, and packed at the top.

A *sequence* is token ids and, for each, whether it is trained on. A *microbatch* is T tokens that hold S sequences end
to end. Nothing is padded.
"""

import glob
import hashlib
import heapq
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import torch
from filelock import FileLock
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging
from transformers.utils.chat_template_utils import render_jinja_template

datasets.disable_progress_bars()  # leave the terminal to the training bar
transformers_logging.disable_progress_bar()

IGNORE = -100  # target of a token that is not trained on
ROLES = ("system", "user", "assistant", "tool")


class RunError(Exception):
    """Something the user has to mend. Scripts print it as one line and exit with code 1."""


class DataError(RunError):
    """Bad input data.

    Args:
        path: the file or data set. row: 1-based line or row number, or None. message: what is wrong, naming the field.
    """

    def __init__(self, path, row, message):
        super().__init__(path, row, message)  # the plain arguments, so that it survives a worker process

    def __str__(self):
        path, row, message = self.args
        if row is None:
            return f"{path}: {message}"
        return f"{path}, row {row}: {message}"


class Skip(Exception):
    """Raised by an encoder for a row that is left out, with the reason; counted and printed, never silent."""


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
        return torch.from_numpy(np.concatenate(arrays).astype(dtype)).to(device)

    shifted = {}
    for name, arrays in zip(extras, numbers, strict=True):
        shifted[name] = tensor(_shift(arrays, masks, fill=0), np.float32)
    return Microbatch(
        input_ids=tensor(ids, np.int64),
        position_ids=tensor([np.arange(length) for length in lengths], np.int64),
        cu_seqlens=tensor([[0], np.cumsum(lengths)], np.int32),
        max_length=max(lengths),
        targets=tensor(_shift(ids, masks, fill=IGNORE), np.int64),
        extras=shifted,
    )


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
        extras: {name: (T,) float32}, other numbers of the tokens, where their targets are.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int
    targets: torch.Tensor
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


class Encoder:
    """What encoders (row → token sequences, for `load_rows`) share: their settings.

    Args:
        chat: the ChatFormat. vocab_size: rows of the model's embedding, which every id must be below.
        max_length: longest sequence, in tokens. overlong: "truncate" longer ones (counted) or "drop" them (counted).
    """

    features = {
        "input_ids": datasets.List(datasets.Value("int32")),
        "trained": datasets.List(datasets.Value("bool")),
    }

    def __init__(self, chat, vocab_size, max_length, overlong):
        self.chat = chat
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.overlong = overlong
        self.key = json.dumps([type(self).__name__, chat.key, vocab_size, max_length, overlong])


class SftEncoder(Encoder):
    """Row {messages, tools?} → one sequence, in which every assistant turn is trained on."""

    def __call__(self, row):
        """Raises ValueError and Skip."""
        _check_fields(row, "messages")
        messages = row["messages"]
        check_messages(messages)
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError("messages has no assistant turn: there is nothing to train on")
        ids, trained, notes = encode_conversation(self, messages, parse_tools(row))
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
        tools = parse_tools(row)
        margin = row.get("margin", 0.0)
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
            raise ValueError(f"margin is {margin!r}, expected a finite number")
        subset = row.get("subset", "")
        if not isinstance(subset, str):
            raise ValueError(f"subset is {_kind(subset)}, expected a string")
        ids, trained, notes = encode_conversation(self, chosen, tools, last_turn_only=True)
        rejected_ids, rejected_trained, rejected_notes = encode_conversation(self, rejected, tools, last_turn_only=True)
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
        answer = row.get(field)
        prompt = row.get("prompt")
        if answer is None:
            raise ValueError(f"{field} is missing or null; the row has {_fields_of(row)}")
        if isinstance(answer, str):
            if prompt is None:
                raise ValueError(f"{field} is a string, so the row needs a field 'prompt'")
            answer = [{"role": "assistant", "content": answer}]
        check_messages(answer, field)
        first = answer[0]["role"]
        last = answer[-1]["role"]
        if last != "assistant":
            raise ValueError(f"{field} ends with a {last} message, expected the assistant's answer")
        if first in ("system", "user"):
            return answer  # a whole conversation already; a prompt beside it is a copy
        if prompt is None:
            raise ValueError(f"{field} begins with a {first} message, so the row needs a field 'prompt'")
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        check_messages(prompt, "prompt")
        return [*prompt, *answer]


class PromptEncoder(Encoder):
    """Row {messages, dataset, ground_truth, weights?, tools?} → the prompt, and as JSON what an answer is judged by.

    A last assistant turn is left out of the prompt. `max_length` is that of prompts, and longer ones are dropped: a
    truncated question is another one. `overlong` is not used.
    """

    features = {**Encoder.features, "job": datasets.Value("string")}

    def __call__(self, row):
        """Raises ValueError and Skip."""
        _check_fields(row, "messages", "dataset", "ground_truth")
        messages = row["messages"]
        tools = parse_tools(row)
        check_messages(messages)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            raise ValueError("messages has no question: a prompt ends with a user's or a tool's message")
        ids = self.chat.prompt(messages, tools)
        if max(ids) >= self.vocab_size:
            raise ValueError(f"token id {max(ids)} is outside the model's vocabulary of {self.vocab_size}")
        if len(ids) > self.max_length:
            raise Skip(TOO_LONG)
        job = json.dumps([row["dataset"], row["ground_truth"], row.get("weights")])
        return {"input_ids": ids, "trained": [False] * len(ids), "job": job, "notes": []}


def _check_fields(row, *fields):
    for field in fields:
        if field not in row:
            raise ValueError(f"no field {field!r}; the row has {_fields_of(row)}")


def _fields_of(row):
    return ", ".join(repr(field) for field in row) or "no fields"


def check_messages(messages, field="messages"):
    """Checks one conversation. Returns None.

    Raises:
        ValueError: naming the field: not a list, empty, unknown role, content that is not text, empty prompt, no user.
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
        if content is None and not (role == "assistant" and message.get("tool_calls")):
            raise ValueError(f"{at}.content is {'null' if 'content' in message else 'missing'}")
        if content is not None and not isinstance(content, str):
            raise ValueError(f"{at}.content is {_kind(content)}, expected a string")
        if role == "user" and not content.strip():
            raise ValueError(f"{at}.content is empty: a prompt needs text")


def parse_tools(row):
    """The `tools` of a row, a list of JSON schemas (or a JSON string of one) or None. Raises ValueError if neither."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"tools, column {error.colno}: not valid JSON: {error.msg}") from None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"tools is {_kind(tools)}, expected a list of JSON schemas")
    return tools or None


def _kind(value):
    names = {type(None): "null", str: "a string", list: "a list", dict: "an object", bool: "a boolean"}
    return names.get(type(value), "a number")


# Unicode noncharacters: they mark positions in rendered text and can occur in no real text.
BREAK, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"


def encode_conversation(encoder, messages, tools, last_turn_only=False):
    """(input_ids, trained, notes), three lists, of one checked conversation, by the settings of an Encoder.

    Raises ValueError and Skip.
    """
    for message in messages:
        is_blank = not (message.get("content") or "").strip()
        if message["role"] == "assistant" and is_blank and not message.get("tool_calls"):
            raise Skip("an assistant turn is empty")
    ids, mask = encoder.chat.encode(messages, tools, last_turn_only)
    if max(ids) >= encoder.vocab_size:
        raise ValueError(f"token id {max(ids)} is outside the model's vocabulary of {encoder.vocab_size}")
    notes = []
    if len(ids) > encoder.max_length:
        if encoder.overlong == "drop":
            raise Skip(TOO_LONG)
        ids = ids[: encoder.max_length]
        mask = mask[: encoder.max_length]
        notes.append("truncated to --max_length")
    if not mask[1:].any():  # the first token has no state before it to predict it from
        raise Skip("no trained token within --max_length")
    if encoder.chat.has_control_text(messages, tools):
        notes.append("with control strings in content, kept as text")
    tokenizer = encoder.chat.tokenizer
    if tokenizer.unk_token_id in ids:
        notes.append(f"with characters the tokenizer does not know (they become {tokenizer.unk_token})")
    return ids, mask.tolist(), notes


class ChatFormat:
    """Messages → token ids and trained-token mask, by the tokenizer's chat template.

    Ids equal `tokenizer.apply_chat_template`'s, except that control strings inside content stay text. A *control
    string* is an added token that is special, or part of the template, or not in the tokenizer's own vocabulary
    (`<|im_end|>`, `<think>`; not runs of spaces or the HTML tags that some tokenizers hold as ordinary entries).

    The idea:
        1. Shield the content: a BREAK goes into every control string, and wherever a neighbour could complete one.
        2. Render it. Every control string that is whole now is the template's own.
        3. Put those between OPEN and CLOSE, and take the BREAKs out again.
        4. Encode the text in one go, with a copy of the tokenizer that knows control strings only between brackets.
        5. A token is trained on if its first character lies in an assistant turn of the rendered text.

    Args:
        tokenizer: fast tokenizer with a chat template (`load_tokenizer`).
        content_tokens: control strings that assistant content may contain as tokens (e.g. "<think>", "</think>").

    Raises:
        RunError: the template fails on a plain conversation, begins with two BOS, or ends no assistant turn with an
            end-of-turn token; an unknown content token.
    """

    def __init__(self, tokenizer, content_tokens=()):
        self.tokenizer = tokenizer
        self.template = tokenizer.chat_template
        self.content_tokens = tuple(content_tokens)
        self.marks_generation = bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.template))
        settings = json.loads(tokenizer.backend_tokenizer.to_str())
        added = {entry["content"]: entry for entry in settings["added_tokens"]}
        controls = self._find_controls(settings, added)
        unknown = [token for token in self.content_tokens if token not in controls]
        if unknown:
            raise RunError(f"--content_tokens: not control tokens of this tokenizer: {' '.join(unknown)}")
        self.end_tokens = tuple(text for text in controls if added[text]["special"] or text == tokenizer.eos_token)
        self._prepare_search(controls)
        self._bracket_controls(settings, added, controls)
        self.key = json.dumps([settings, self.template, tokenizer.special_tokens_map, self.content_tokens])
        self._check_template()

    def _find_controls(self, settings, added):
        """Set of control strings."""
        vocabulary = settings["model"]["vocab"]
        if isinstance(vocabulary, dict):
            words = set(vocabulary)
        else:  # [word, score] each
            words = {entry[0] for entry in vocabulary}
        controls = set()
        for text, entry in added.items():
            if text.strip() and (entry["special"] or text in self.template or text not in words):
                controls.add(text)
        return controls

    def _prepare_search(self, controls):
        """What finds control strings in text, whole ones and their parts."""
        longest_first = sorted(controls, key=len, reverse=True)
        alternatives = "|".join(re.escape(text) for text in longest_first) or "(?!)"  # (?!) matches nothing
        self.control = re.compile(alternatives)
        self.inside = re.compile(f"(?=({alternatives}))(.)", re.DOTALL)  # overlapping ones too, by first character
        self.longest = max(map(len, controls), default=0)
        self.heads = {text[:i] for text in controls for i in range(1, len(text))}
        self.tails = {text[i:] for text in controls for i in range(1, len(text))}
        self.parts = {text[i:j] for text in controls for j in range(1, len(text) + 1) for i in range(j)}

    def _bracket_controls(self, settings, added, controls):
        """Builds `self.encoder`, which knows a control string only in brackets, and `self.ids`, back to real ids."""
        rename = {text: OPEN + text + CLOSE if text in controls else text for text in added}
        model = dict(settings["model"])  # the model's own vocabulary may hold control strings too
        if isinstance(model["vocab"], dict):
            model["vocab"] = {rename.get(text, text): i for text, i in model["vocab"].items()}
        else:
            model["vocab"] = [[rename.get(text, text), score] for text, score in model["vocab"]]
        if "merges" in model:  # none may make a control string out of its parts
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            model["merges"] = [[a, b] for a, b in pairs if controls.isdisjoint((a, b, a + b))]
        if model.get("unk_token"):
            model["unk_token"] = rename.get(model["unk_token"], model["unk_token"])
        entries = [{**entry, "content": rename[entry["content"]]} for entry in added.values()]
        plain = {"post_processor": None, "truncation": None, "padding": None}
        self.encoder = Tokenizer.from_str(json.dumps({**settings, **plain, "model": model, "added_tokens": entries}))
        self.ids = {self.encoder.token_to_id(rename[text]): entry["id"] for text, entry in added.items()}

    def encode(self, messages, tools=None, last_turn_only=False):
        """Token ids and mask of a conversation.

        Args:
            messages: list of {"role", "content"}, checked by `check_messages`. tools: list of JSON schemas, or None.
            last_turn_only: train on the last assistant turn only (preference data), not on all.

        Returns:
            (input_ids (L,) list of int, trained (L,) bool array). Trained are the tokens of assistant turns, the
            end-of-turn token included: what the model itself has to produce.

        Raises:
            ValueError: the template rejects or drops a message, cannot say where turns begin, or a turn has no end.
        """
        shown, tools = self._shield_messages(messages), self._shield(tools)
        text, spans = self._render(shown, tools)
        self._check_shown(text, shown, tools)
        if not self.marks_generation:
            spans = [self._turn_span(text, shown, tools, i) for i, m in enumerate(shown) if m["role"] == "assistant"]
        for start, end in spans:
            if not text[start:end].endswith(self.end_tokens):
                raise ValueError(
                    "the chat template ends a trained assistant turn without an end-of-turn token "
                    f"(it ends with {text[max(start, end - 12) : end]!r}): the model would never learn to stop"
                )
        return self._tokenize(text, spans[-1:] if last_turn_only else spans)

    def prompt(self, messages, tools=None):
        """Token ids (list of int) of a conversation up to where the assistant's next turn begins. Raises ValueError."""
        shown, tools = self._shield_messages(messages), self._shield(tools)
        text, _ = self._render(shown, tools, add_generation_prompt=True)
        self._check_shown(text, shown, tools)
        return self._tokenize(text, [])[0]

    def has_control_text(self, messages, tools=None):
        """Whether content holds a control string, which will stay text."""
        shown = [self._shield_messages(messages, edges=False), self._shield(tools, edges=False)]
        return BREAK in json.dumps(shown, ensure_ascii=False, default=str)

    def _shield_messages(self, messages, edges=True):
        """Messages with BREAKs; --content_tokens stay whole in the content of assistant turns."""
        shown = []
        for message in messages:
            allowed = {"content": self.content_tokens} if message["role"] == "assistant" else {}
            fields = {k: self._shield(v, k, allowed.get(k, ()), edges) for k, v in message.items()}
            shown.append({**fields, "role": message["role"]})
        return shown

    def _shield(self, value, key="", allowed=(), edges=True):
        """`value` (JSON-like) with a BREAK in every control string and, at its edges, where one could be completed."""
        if isinstance(value, dict):  # names that templates look up keep their edges; those of arguments they print
            printed = {k: edges and (key in ("arguments", "properties") or not k.isidentifier()) for k in value}
            return {self._shield(k, edges=printed[k]): self._shield(v, k, allowed, edges) for k, v in value.items()}
        if isinstance(value, list):
            return [self._shield(v, key, allowed, edges) for v in value]
        if not isinstance(value, str):
            return value
        if any(mark in value for mark in (BREAK, OPEN, CLOSE)):
            raise ValueError("the text contains a Unicode noncharacter (U+FDD0 … U+FDD2)")
        text = self.inside.sub(lambda match: match[2] if match[1] in allowed else match[2] + BREAK, value)
        core, lengths = text.strip(), range(1, min(self.longest, len(text) + 1))  # templates trim
        if not core or not edges or key == "type":
            return text
        before, after = text[: text.index(core)], text[text.index(core) + len(core) :]
        begin = BREAK if core in self.parts or any(core[:n] in self.tails for n in lengths) else ""
        end = BREAK if any(core[-n:] in self.heads for n in lengths) else ""
        return before + begin + core + end + after

    def _render(self, messages, tools, add_generation_prompt=False):
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=self.marks_generation,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # a template is a program of somebody else's
            raise ValueError(f"the chat template rejects this conversation: {error}") from None
        escape = ascii(BREAK)[1:-1]  # how a printed object would show it
        if escape in texts[0] and escape not in json.dumps([messages, tools], ensure_ascii=False, default=str):
            raise ValueError("the chat template escapes text that holds a control string, which then cannot stay text")
        return texts[0], spans[0] if spans else []

    def _check_shown(self, text, messages, tools):
        kinds = {"system": "system messages", "user": "user messages", "tool": "tool answers"}
        kinds = {kinds.get(message["role"]) for message in messages}
        kinds |= {"tool calls"} if any(message.get("tool_calls") for message in messages) else set()
        dropped = self.dropped & (kinds | ({"tools"} if tools else set()))
        for i, message in enumerate(messages):  # a template may know a kind, but not in this place
            if message["role"] in ("system", "user") and message["content"].strip() not in text:
                dropped |= {f"messages[{i}] ({message['role']})"}
        if dropped:
            raise ValueError(f"the chat template leaves out {' and '.join(sorted(dropped))}")

    def _find_dropped(self):
        """Kinds of content that the template leaves out without a word, found by rendering a probe of each."""
        probe = "Probe 7319"
        function = {"name": "probe", "description": probe, "parameters": {"type": "object", "properties": {}}}
        user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
        call = {"id": "probe0001", "type": "function", "function": {"name": "probe", "arguments": {"text": probe}}}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        silent = {**calling, "tool_calls": [{**call, "function": {"name": "probe", "arguments": {}}}]}
        tool = {"role": "tool", "name": "probe", "tool_call_id": "probe0001", "content": probe}
        probes = {
            "user messages": ([{"role": "user", "content": probe}, answer], None),
            "system messages": ([{"role": "system", "content": probe}, user, answer], None),
            "tool calls": ([user, calling], None),
            "tool answers": ([user, silent, tool, answer], None),
            "tools": ([user, answer], [{"type": "function", "function": function}]),
        }
        dropped = set()
        for kind, (messages, tools) in probes.items():
            try:
                if probe not in self._render(messages, tools)[0]:
                    dropped.add(kind)
            except ValueError:  # it says so itself, when a row has this kind
                pass
        return dropped

    def _turn_span(self, text, messages, tools, i):
        """Where assistant turn i stands in the rendered text: found by rendering prefixes, checked to be prefixes."""
        prefix, _ = self._render(messages[:i], tools, add_generation_prompt=True)
        if not text.startswith(prefix):
            raise ValueError(
                f"the chat template renders the prompt of messages[{i}] differently once the answer follows, so the "
                "trained tokens cannot be told apart: use a template with {% generation %}, or --chat_template"
            )
        turn, _ = self._render(messages[: i + 1], tools)
        ends = [match.end() for match in self.control.finditer(turn, len(prefix))]
        turn = turn[: ends[-1]] if ends else turn  # up to its end-of-turn token: "\n" after it is the template's
        if text.startswith(turn):
            return len(prefix), len(turn)
        # A template may render the last turn with more than earlier ones (an empty <think> block): the shorter text
        # has to be the end of the longer one.
        stop = list(self.control.finditer(turn))[-1][0] if ends else ""
        end = text.find(stop, len(prefix)) + len(stop)
        if not stop or not turn.endswith(text[len(prefix) : end]):
            raise ValueError(
                f"the chat template renders messages[{i}] differently once another follows, so the trained tokens "
                "cannot be told apart: use a template with {% generation %}, or --chat_template"
            )
        return len(prefix), end

    def _tokenize(self, text, spans):
        cuts = [0, *(cut for span in spans for cut in span), len(text)]  # outside a trained turn, inside, outside, …
        pieces = [self.control.sub(rf"{OPEN}\g<0>{CLOSE}", text[a:b]).replace(BREAK, "") for a, b in pairwise(cuts)]
        encoding = self.encoder.encode("".join(pieces), add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        ends = np.cumsum([len(piece) for piece in pieces])
        trained = np.searchsorted(ends, starts, side="right") % 2 == 1  # a token is where its first character is
        return [self.ids.get(i, i) for i in encoding.ids], trained

    def _check_template(self):
        """Start-up check on a plain conversation, against transformers' own encoding."""
        messages = [{"role": "user", "content": "What is 2 + 3?\n\n(Briefly.)"}, {"role": "assistant", "content": "5."}]
        self.dropped = self._find_dropped()
        try:
            ids, trained = self.encode(messages)
        except ValueError as error:
            raise RunError(f"the chat template fails on a plain conversation: {error}") from None
        expected = self.tokenizer(self._render(messages, None)[0], add_special_tokens=False).input_ids
        if ids != expected:
            raise RunError("internal error: this tokenizer's ids differ from apply_chat_template's; please report it")
        if ids[:2] == [self.tokenizer.bos_token_id] * 2:
            raise RunError(f"the chat template begins with two {self.tokenizer.bos_token}")
        self.end_of_turn = ids[int(np.flatnonzero(trained)[-1])]  # the id on which generation has to stop


TEMPLATES = Path(__file__).parent / "chat_templates"


def load_tokenizer(path, chat_template=None):
    """The tokenizer of a model, with its chat template settled.

    Args:
        path: model folder or Hub id.
        chat_template: "tulu", "chatml", a Jinja file, or None for the tokenizer's own.

    Raises:
        RunError: no such tokenizer, file or template, a Hub that cannot be reached, or a tokenizer without a fast
            (Rust) implementation.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # of transformers, tokenizers, the Hub's client or its HTTP client: no common class
        if Path(path).is_dir():
            wrong = "no tokenizer could be loaded"
        else:
            wrong = "no such folder, and neither the Hub nor its cache gave this tokenizer"
        raise RunError(f"model {path}: {wrong}: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise RunError(f"model {path}: its tokenizer has no fast implementation, which character offsets need")
    if isinstance(tokenizer.chat_template, dict):  # several named templates: the one for chat
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template, tokenizer)
    if not tokenizer.chat_template:
        raise RunError(f"model {path}: its tokenizer has no chat template; choose one with --chat_template")
    return tokenizer


def _read_template(name, tokenizer):
    """The Jinja text of one of ours, or of a file. Ours begin with BOS where the tokenizer puts one before text."""
    candidates = [TEMPLATES / f"{name}.jinja", Path(name)]
    files = [file for file in candidates if file.is_file()]
    if not files:
        builtin = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.jinja")))
        raise RunError(f"--chat_template {name}: neither a file nor one of {builtin}")
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


def show_example(tokenizer, input_ids, trained):
    """One sequence as text for the terminal, trained tokens green and the rest grey."""
    changes = np.flatnonzero(np.diff(trained)) + 1
    edges = [0, *changes, len(input_ids)]
    parts = []
    for start, end in pairwise(edges):
        colour = "\033[32m" if trained[start] else "\033[90m"
        parts.append(f"{colour}{tokenizer.decode(input_ids[start:end])}\033[0m")
    return "".join(parts)


# ------------------------------------------------------------------------------------------------------ reading rows

JSON = "\ufdd0 JSON"  # a column that no data set has


def load_data(args, encode, at_least):
    """The rows of --data, and of --eval_data (None without). Rank 0 prints an account of them, and shows the first.

    Args:
        args: has data, eval_data, seed, max_skip_frac and batch_size.
        encode: as for `load_rows`.
        at_least: how many rows there have to be: mostly --batch_size.

    Raises:
        DataError: as `load_rows`. RunError: fewer rows.
    """
    rows = load_rows(args.data, encode, args.seed, args.max_skip_frac)
    if len(rows) < at_least:
        raise RunError(f"--data has {len(rows)} usable rows, fewer than --batch_size {args.batch_size}")
    report = rows.report
    eval_rows = None
    if args.eval_data:
        eval_rows = load_rows(args.eval_data, encode, args.seed, args.max_skip_frac)
        report = rows.report + eval_rows.report
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(report))
        for input_ids, trained in rows.sequences([0]):
            print(show_example(encode.chat.tokenizer, input_ids, trained))
    return rows, eval_rows


def load_rows(sources, encode, seed=0, max_skip_frac=0.01):
    """Reads, encodes and mixes data sources.

    The encoded rows are cached on disk by `datasets`, under a hash of the file, the encoder's settings and this file's
    source. One process a node encodes (with many workers when there is much to do), the others read its cache.

    Args:
        sources: list of "SOURCE" or "SOURCE:AMOUNT". SOURCE is a .jsonl, .json or .parquet file or a Hub id (`name`,
            `name@split`, `name/config@split`). AMOUNT is a fraction of the rows with a point in it ("0.5"; "2.0" takes
            each twice) or a count ("1000"); which rows depends on the seed.
        encode: picklable callable with a `key` (str) that changes with its settings, and `features`, the columns it
            makes. Takes a row (dict), returns a dict with at least `input_ids`, `trained` (lists of one length) and
            `notes` (list of str, counted in the report). Raises Skip to leave the row out and ValueError to reject
            the data.
        max_skip_frac: largest accepted share of skipped rows.

    Returns:
        Rows, in the order of the sources.

    Raises:
        DataError: unreadable source, a rejected row, nothing left, or too many rows skipped.
    """
    tables = []
    names = []
    report = []
    for number, spec in enumerate(sources):
        name, amount = _split_amount(spec)
        raw, row_numbers = _read(name)
        if not len(raw):
            raise DataError(name, None, "the data set is empty")
        # Rows are counted in three ways: in `raw`, the source as it was read; in `encoded`, E rows, which has each one
        # that is needed once, in the order of the source; in the mixture, M rows, which may take one several times.
        mixture = _choose(len(raw), amount, np.random.default_rng([seed, number]), spec)  # (M,) indices in raw
        needed = np.unique(mixture)  # (E,) indices in raw, ascending
        encoded = _encode_cached(raw.select(needed), row_numbers[needed], name, encode)
        encoded = encoded.add_column("source", [number] * len(encoded))
        report += _account(name, encoded, max_skip_frac)
        is_kept = np.array(encoded["skip"][:]) == ""  # (E,)
        places = np.searchsorted(needed, mixture)  # (M,) indices in encoded
        tables.append(encoded.select(places[is_kept[places]]))
        names.append(name)
    table = datasets.concatenate_datasets(tables)
    lengths, trained, fingerprint = _measure(table, list(encode.features))
    return Rows(table, names, lengths, trained, report, fingerprint)


def _split_amount(spec):
    match = re.fullmatch(r"(.+?)(?::(\d+|\d*\.\d+|\d+\.))?", spec, re.DOTALL)
    if not match:
        raise DataError(repr(spec), None, "an empty data source")
    return match.groups()


def read_rows(source):
    """Yields (row number, row) of one SOURCE, unencoded. Raises DataError."""
    raw, row_numbers = _read(source)
    for number, row in zip(row_numbers, raw, strict=True):
        yield int(number), _decode_row(row, source, int(number))


def _read(name):
    """The raw rows of one source, and their numbers in it. Rows of JSON files have one column, JSON: their text."""
    path = Path(name)
    try:
        if path.suffix == ".jsonl" and path.is_file() and path.stat().st_size:
            return _read_lines(path)
        if path.suffix in (".json", ".jsonl"):  # an empty file is an empty list
            raw = _read_json(name)
        elif path.suffix == ".parquet":
            raw = datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
        else:
            raw = _read_hub(name)
    except json.JSONDecodeError as error:
        raise DataError(name, error.lineno, f"column {error.colno}: not valid JSON: {error.msg}") from None
    except (OSError, ValueError, RecursionError, datasets.exceptions.DatasetsError) as error:
        raise DataError(name, *_why_unreadable(path, error)) from None
    return raw, np.arange(1, len(raw) + 1)


def _read_lines(path):
    """As lines of text, so that line numbers hold and no value is coerced to its column's type."""
    with open(path, "rb") as file:
        version = hashlib.file_digest(file, "sha256").hexdigest()[:16]  # an edit shows, whatever its time
    lines = datasets.load_dataset("text", name=version, data_files=glob.escape(str(path)), split="train")
    filled = np.array([i for i, line in enumerate(lines["text"]) if line.strip()], dtype=np.int64)
    return lines.select(filled).rename_column("text", JSON), filled + 1


def _read_json(name):
    text = Path(name).read_text(encoding="utf-8")
    rows = json.loads(text) if text else []
    if not isinstance(rows, list):
        raise DataError(name, None, f"expected a JSON list of rows, found {_kind(rows)}; one object a line?")
    return datasets.Dataset.from_dict({JSON: [json.dumps(row) for row in rows]})


def _read_hub(name):
    """A data set of the Hub: `name`, `owner/name` or `owner/name/config`, with or without `@split`."""
    repository, _, split = name.partition("@")
    parts = repository.split("/")
    config = "/".join(parts[2:])
    try:
        return datasets.load_dataset("/".join(parts[:2]), config or None, split=split or "train")
    except Exception as error:  # of datasets, pyarrow, the Hub's client or its HTTP client: no common class
        why = first_line(error.__cause__ or error)
        raise DataError(name, None, f"neither the Hub nor its cache gave this data set: {why}") from None


def _why_unreadable(path, error):
    """(row or None, message) for a file."""
    if not path.is_file() and path.suffix in (".jsonl", ".json", ".parquet"):
        return None, "no such file"
    if path.is_file() and path.suffix in (".jsonl", ".json"):
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as bad:
                return number, f"column {bad.start + 1}: not valid UTF-8"
    return None, f"cannot be read: {first_line(error.__cause__ or error)}"


def _choose(count, amount, rng, spec):
    """Row numbers (from 0) that SOURCE:AMOUNT stands for, in file order where every row is taken once."""
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
    source_code = Path(__file__).read_text(encoding="utf-8")
    key = json.dumps([raw._fingerprint, encode.key, name, source_code])
    key = hashlib.sha256(key.encode()).hexdigest()[:32]
    columns = {
        **encode.features,
        "notes": datasets.List(datasets.Value("string")),
        "skip": datasets.Value("string"),
        "row": datasets.Value("int64"),
    }
    workers = min(os.cpu_count() or 1, len(raw) // 5000)
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{key}.lock"):  # the first process on the node encodes, the others find its cache
        return raw.map(
            _encode_row,
            with_indices=True,
            cache_file_name=str(cache / f"{key}.arrow"),
            fn_kwargs={"row_numbers": row_numbers, "name": name, "encode": encode},
            remove_columns=raw.column_names,
            features=datasets.Features(columns),
            num_proc=workers if workers > 1 else None,
            new_fingerprint=key,
        )


def _encode_row(raw, index, row_numbers, name, encode):
    number = int(row_numbers[index])
    nothing = {**dict.fromkeys(encode.features), "notes": [], "row": number}
    row = _decode_row(raw, name, number)
    try:
        return {**nothing, **encode(row), "skip": ""}
    except Skip as reason:
        return {**nothing, "skip": str(reason)}
    except (ValueError, RecursionError) as error:
        raise DataError(name, number, str(error)) from None


def _decode_row(raw, name, number):
    try:
        row = _without_nulls(dict(raw))
        if JSON in row:
            row = json.loads(row[JSON])
            json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate ends here
        if not isinstance(row, dict):
            raise ValueError(f"expected an object, found {_kind(row)}")
        return row
    except json.JSONDecodeError as error:
        raise DataError(name, number, f"column {error.colno}: not valid JSON: {error.msg}") from None
    except UnicodeEncodeError as error:
        raise DataError(name, number, f"lone surrogate {error.object[error.start]!a} is not text") from None
    except (ValueError, RecursionError) as error:
        raise DataError(name, number, str(error)) from None


def _without_nulls(value):
    """Columns of one type fill what a row does not have with null: tool calls would get everybody's arguments."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


def _account(name, table, max_skip_frac):
    """Report lines for one source; raises if nothing, or too little, is left."""
    skips = Counter()
    notes = Counter()
    first = {}  # the row in which a reason or note comes first
    for entry in table.select_columns(["skip", "notes", "row"]):
        reason = entry["skip"]
        if reason:
            skips[reason] += 1
            first.setdefault(reason, entry["row"])
        for note in entry["notes"]:
            notes[note] += 1
            first.setdefault(note, entry["row"])
    read = len(table)
    skipped = skips.total()
    lines = [f"{name}: {read} rows read, {read - skipped} kept"]
    reasons = []
    for reason, count in skips.most_common():
        lines.append(f"  {count} skipped: {reason} (first: row {first[reason]})")
        reasons.append(f"{count} × {reason}, first at row {first[reason]}")
    for note, count in notes.most_common():
        lines.append(f"  {count} {note} (first: row {first[note]})")
    why = "; ".join(reasons)
    if read == skipped:
        raise DataError(name, None, f"0 of {read} rows usable ({why})")
    limited = skipped - skips[TOO_LONG]  # dropping long rows was asked for
    if limited > max_skip_frac * read:
        raise DataError(name, None, f"{limited} of {read} rows skipped, more than --max_skip_frac allows ({why})")
    return lines


def _measure(table, columns):
    """Tokens and trained tokens of each row, (N,) each, and a hash of all that was encoded."""
    others = [column for column in columns if column not in ("input_ids", "trained")]
    digest = hashlib.sha256()
    lengths = []
    trained = []
    for batch in table.select_columns(columns).with_format("numpy").iter(1000):
        numbers = [batch[column] for column in others]
        for ids, mask, *rest in zip(batch["input_ids"], batch["trained"], *numbers, strict=True):
            text = "".join(map(str, rest))
            digest.update(ids.tobytes() + mask.tobytes() + text.encode())
            lengths.append(len(ids))
            trained.append(int(mask[1:].sum()))  # no state precedes the first token
    return np.array(lengths), np.array(trained), digest.hexdigest()[:16]
