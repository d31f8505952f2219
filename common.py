"""Rows → chat template → token sequences → microbatches. What every script shares, and nothing else.

    load_rows      a file or Hub data set, checked row by row            `Rows`: token ids, masks, what was left out
    ChatFormat     messages → token ids and the mask of trained tokens, in one function
    batch_indices  which rows make up a step: a pure function of (rows, seed, step)
    deal           rows → microbatches → ranks; balanced; never changes the loss
    pack           the sequences of a microbatch → tensors, with the only shift between states and targets

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
        return f"{path}: {message}" if row is None else f"{path}, row {row}: {message}"


class Skip(Exception):
    """Raised by an encoder for a row that is left out, with the reason; counted and printed, never silent."""


# ------------------------------------------------------------------------------------------------------------- rows


@dataclass
class Rows:
    """Encoded rows of all sources, mixed, with an account of what was left out.

    Attributes:
        table: the encoder's columns, plus `source` and `row` (where each came from). One entry a kept row.
        sources: names of the sources. lengths: (N,) tokens in each row; trained: (N,) trained tokens in each row.
        report: lines that say what was read, kept, skipped and noted. fingerprint: hash of all that was encoded.
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
        """[(input_ids (L,), trained (L,)), ...] of the rows at `indices`. A pair is two: chosen, then rejected."""
        columns = {"input_ids", "trained", "chosen_length"} & set(self.table.column_names)
        batch = self.table.with_format("numpy", columns=sorted(columns))[list(indices)]
        whole = list(zip(batch["input_ids"], batch["trained"], strict=True))
        if "chosen_length" not in batch:
            return whole
        pairs = zip(whole, batch["chosen_length"], strict=True)
        return [part for (ids, mask), n in pairs for part in ((ids[:n], mask[:n]), (ids[n:], mask[n:]))]


def load_rows(sources, encode, seed=0, max_skip_frac=0.01):
    """Reads, encodes and mixes data sources.

    The encoded rows are cached on disk by `datasets`, under a hash of the file, the encoder's settings and this file's
    source. One process a node encodes (with many workers when there is much to do), the others read its cache.

    Args:
        sources: list of "SOURCE" or "SOURCE:AMOUNT". SOURCE is a .jsonl, .json or .parquet file or a Hub id (`name`,
            `name@split`, `name/config@split`). AMOUNT is a fraction of the rows with a point in it ("0.5"; "2.0" takes
            each twice) or a count ("1000"); which rows depends on the seed.
        encode: picklable callable with a `key` (str) that changes with its settings. Takes a row (dict), returns
            a dict with at least `input_ids`, `trained` (lists of one length) and `notes` (list of str, counted in
            the report). Raises Skip to leave the row out and ValueError to reject the data.
        max_skip_frac: largest accepted share of skipped rows.

    Raises:
        DataError: unreadable source, a rejected row, nothing left, or too many rows skipped.
    """
    tables, names, report = [], [], []
    for number, spec in enumerate(sources):
        name, amount = _split_amount(spec)
        raw, numbers = _read(name)
        if not len(raw):
            raise DataError(name, None, "the data set is empty")
        order = _choose(len(raw), amount, np.random.default_rng([seed, number]), spec)
        chosen = np.unique(order)
        table = _encode_cached(raw.select(chosen), numbers[chosen], name, encode)
        table = table.add_column("source", [number] * len(table))
        report += _account(name, table, max_skip_frac)
        kept = np.array(table["skip"][:]) == ""
        mixed = np.searchsorted(chosen, order)  # rows of the source → rows of `table`
        tables.append(table.select(mixed[kept[mixed]]))
        names.append(name)
    table = datasets.concatenate_datasets(tables)
    digest = hashlib.sha256()
    lengths, trained = [], []
    others = [column for column in encode.features if column not in ("input_ids", "trained")]
    for batch in table.select_columns(list(encode.features)).with_format("numpy").iter(1000):
        for ids, mask, *rest in zip(batch["input_ids"], batch["trained"], *(batch[c] for c in others), strict=True):
            digest.update(ids.tobytes() + mask.tobytes() + "".join(map(str, rest)).encode())
            lengths.append(len(ids))
            trained.append(int(mask[1:].sum()))  # no state precedes the first token
    return Rows(table, names, np.array(lengths), np.array(trained), report, digest.hexdigest()[:16])


def _split_amount(spec):
    match = re.fullmatch(r"(.+?)(?::(\d+|\d*\.\d+|\d+\.))?", spec, re.DOTALL)
    if not match:
        raise DataError(repr(spec), None, "an empty data source")
    return match.groups()


def _choose(count, amount, rng, spec):
    """Row numbers (from 0) that SOURCE:AMOUNT stands for, in file order where every row is taken once."""
    total = count if amount is None else round(float(amount) * count) if "." in amount else int(amount)
    if total == 0:
        raise DataError(spec, None, f"this amount selects none of the {count} rows")
    if total == count:
        return np.arange(count)
    repeats = [rng.permutation(count) for _ in range(-(-total // count))]
    return np.concatenate(repeats)[:total]


def read_rows(source):
    """Yields (row number, row) of one SOURCE, unencoded. Raises DataError."""
    raw, numbers = _read(source)
    for number, row in zip(numbers, raw, strict=True):
        yield int(number), _decode_row(row, source, int(number))


def _read(name):
    """The raw rows of one source, and their numbers in it. Rows of JSON files have one column, JSON: their text."""
    path = Path(name)
    try:
        if path.suffix == ".jsonl" and path.is_file() and path.stat().st_size:
            # As lines of text, so that line numbers hold and no value is coerced to its column's type.
            with open(path, "rb") as file:
                version = hashlib.file_digest(file, "sha256").hexdigest()[:16]  # an edit shows, whatever its time
            raw = datasets.load_dataset("text", name=version, data_files=glob.escape(str(path)), split="train")
            numbers = np.array([i for i, line in enumerate(raw["text"]) if line.strip()], dtype=np.int64)
            return raw.select(numbers).rename_column("text", JSON), numbers + 1
        if path.suffix in (".json", ".jsonl"):
            content = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size else []
            if not isinstance(content, list):
                raise DataError(name, None, f"expected a JSON list of rows, found {_kind(content)}; one object a line?")
            raw = datasets.Dataset.from_dict({JSON: [json.dumps(row) for row in content]})
        elif path.suffix == ".parquet":
            raw = datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
        else:
            repository, _, split = name.partition("@")
            owner_and_name, config = repository.split("/")[:2], "/".join(repository.split("/")[2:])
            raw = datasets.load_dataset("/".join(owner_and_name), config or None, split=split or "train")
        return raw, np.arange(1, len(raw) + 1)
    except json.JSONDecodeError as error:
        raise DataError(name, error.lineno, f"column {error.colno}: not valid JSON: {error.msg}") from None
    except (OSError, ValueError, RecursionError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(name, *_why_unreadable(path, error)) from None


def _why_unreadable(path, error):
    if path.suffix and not path.is_file() and path.suffix in (".jsonl", ".json", ".parquet"):
        return None, "no such file"
    if path.is_file() and path.suffix in (".jsonl", ".json"):
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as bad:
                return number, f"column {bad.start + 1}: not valid UTF-8"
    return None, f"cannot be read: {(str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]}"


def _encode_cached(raw, numbers, name, encode):
    """Maps `encode` over raw rows; a skipped row keeps its place, with the reason in the column `skip`."""
    key = json.dumps([raw._fingerprint, encode.key, name, Path(__file__).read_text(encoding="utf-8")])
    key = hashlib.sha256(key.encode()).hexdigest()[:32]
    workers = min(os.cpu_count() or 1, len(raw) // 5000)
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{key}.lock"):  # the first process on the node encodes, the others find its cache
        return raw.map(
            _encode_row,
            with_indices=True,
            cache_file_name=str(cache / f"{key}.arrow"),
            fn_kwargs={"numbers": numbers, "name": name, "encode": encode},
            remove_columns=raw.column_names,
            features=datasets.Features(encode.features | _ROW_FEATURES),
            num_proc=workers if workers > 1 else None,
            new_fingerprint=key,
        )


JSON = "\ufdd0 JSON"  # a column that no data set has
_ROW_FEATURES = {
    "notes": datasets.List(datasets.Value("string")),
    "skip": datasets.Value("string"),
    "row": datasets.Value("int64"),
}


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


def _encode_row(raw, index, numbers, name, encode):
    number = int(numbers[index])
    empty = dict.fromkeys(encode.features) | {"notes": [], "row": number}
    row = _decode_row(raw, name, number)
    try:
        return empty | encode(row) | {"skip": ""}
    except Skip as reason:
        return empty | {"skip": str(reason)}
    except (ValueError, RecursionError) as error:
        raise DataError(name, number, str(error)) from None


def _without_nulls(value):
    """Columns of one type fill what a row does not have with null: tool calls would get everybody's arguments."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _account(name, table, max_skip_frac):
    """Report lines for one source; raises if nothing, or too little, is left."""
    skips, notes, first = Counter(), Counter(), {}
    for entry in table.select_columns(["skip", "notes", "row"]):
        for counter, texts in ((skips, [entry["skip"]] if entry["skip"] else []), (notes, entry["notes"])):
            counter.update(texts)
            for text in texts:
                first.setdefault(text, entry["row"])
    read, skipped = len(table), sum(skips.values())
    lines = [f"{name}: {read} rows read, {read - skipped} kept"]
    lines += [f"  {count} skipped: {text} (first: row {first[text]})" for text, count in skips.most_common()]
    lines += [f"  {count} {text} (first: row {first[text]})" for text, count in notes.most_common()]
    reasons = "; ".join(f"{count} × {text}, first at row {first[text]}" for text, count in skips.most_common())
    if read == skipped:
        raise DataError(name, None, f"0 of {read} rows usable ({reasons})")
    limited = skipped - skips[TOO_LONG]  # dropping long rows was asked for
    if limited > max_skip_frac * read:
        raise DataError(name, None, f"{limited} of {read} rows skipped, more than --max_skip_frac allows ({reasons})")
    return lines


def _kind(value):
    names = {type(None): "null", str: "a string", list: "a list", dict: "an object", bool: "a boolean"}
    return names.get(type(value), "a number")


# --------------------------------------------------------------------------------------------------- chat templates

TOO_LONG = "longer than --max_length"

TEMPLATES = Path(__file__).parent / "chat_templates"

# Unicode noncharacters: they mark positions in rendered text and can occur in no real text.
BREAK, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"


def load_tokenizer(path, chat_template=None):
    """The tokenizer of a model, with its chat template settled.

    Args:
        path: model folder or Hub id.
        chat_template: "tulu", "chatml", a Jinja file, or None for the tokenizer's own.

    Raises:
        RunError: no such tokenizer, file or template, or a tokenizer without a fast (Rust) implementation.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise RunError(f"model {path}: no tokenizer could be loaded: {str(error).splitlines()[0]}") from None
    if not tokenizer.is_fast:
        raise RunError(f"model {path}: its tokenizer has no fast implementation, which character offsets need")
    if chat_template is not None:
        file = next((f for f in (TEMPLATES / f"{chat_template}.jinja", Path(chat_template)) if f.is_file()), None)
        if not file:
            builtin = ", ".join(sorted(f.stem for f in TEMPLATES.glob("*.jinja")))
            raise RunError(f"--chat_template {chat_template}: neither a file nor one of {builtin}")
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        try:
            template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"--chat_template {chat_template}: {error}") from None
        tokenizer.chat_template = template.replace("{{ bos }}", "{{ bos_token }}" * adds_bos)
    if isinstance(tokenizer.chat_template, dict):  # several named templates: the one for chat
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not tokenizer.chat_template:
        raise RunError(f"model {path}: its tokenizer has no chat template; choose one with --chat_template")
    return tokenizer


class ChatFormat:
    """Messages → token ids and trained-token mask, by the tokenizer's chat template.

    Ids equal `tokenizer.apply_chat_template`'s, except that control strings inside content stay text. A *control
    string* is an added token that is special, or part of the template, or not in the tokenizer's own vocabulary
    (`<|im_end|>`, `<think>`; not runs of spaces or the HTML tags that some tokenizers hold as ordinary entries).
    How: content is shielded, with a BREAK in every control string and wherever a neighbour could complete one, and
    rendered; every control string left whole is the template's, and is bracketed by OPEN and CLOSE; the breaks are
    taken out; and a copy of the tokenizer that knows the control strings only in brackets encodes the text in one go.

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
        vocabulary = settings["model"]["vocab"]
        vocabulary = set(vocabulary) if isinstance(vocabulary, dict) else {entry[0] for entry in vocabulary}
        added = {entry["content"]: entry for entry in settings["added_tokens"]}
        controls = {
            text
            for text, entry in added.items()
            if text.strip() and (entry["special"] or text in self.template or text not in vocabulary)
        }
        if unknown := [token for token in self.content_tokens if token not in controls]:
            raise RunError(f"--content_tokens: not control tokens of this tokenizer: {' '.join(unknown)}")
        self.end_tokens = tuple(text for text in controls if added[text]["special"] or text == tokenizer.eos_token)
        alternatives = "|".join(re.escape(text) for text in sorted(controls, key=len, reverse=True)) or "(?!)"
        self.control = re.compile(alternatives)
        self.inside = re.compile(f"(?=({alternatives}))(.)", re.DOTALL)
        self.heads = {text[:i] for text in controls for i in range(1, len(text))}
        self.tails = {text[i:] for text in controls for i in range(1, len(text))}
        self.parts = {text[i:j] for text in controls for j in range(1, len(text) + 1) for i in range(j)}
        self.longest = max(map(len, controls), default=0)
        self._bracket_controls(settings, added, controls)
        self.key = json.dumps([settings, self.template, tokenizer.special_tokens_map, self.content_tokens])
        self._check_template()

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
        entries = [entry | {"content": rename[entry["content"]]} for entry in added.values()]
        plain = {"post_processor": None, "truncation": None, "padding": None}
        self.encoder = Tokenizer.from_str(json.dumps(settings | plain | {"model": model, "added_tokens": entries}))
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
            shown.append(fields | {"role": message["role"]})
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
        role, content = message.get("role"), message.get("content")
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


class Encoder:
    """What encoders (row → token sequences, for `load_rows`) share: their settings, and the checks on a conversation.

    Args:
        chat: the ChatFormat. vocab_size: rows of the model's embedding, which every id must be below.
        max_length: longest sequence, in tokens. overlong: "truncate" longer ones (counted) or "drop" them (counted).
    """

    features = {
        "input_ids": datasets.List(datasets.Value("int32")),
        "trained": datasets.List(datasets.Value("bool")),
    }

    def __init__(self, chat, vocab_size, max_length, overlong):
        self.chat, self.vocab_size, self.max_length, self.overlong = chat, vocab_size, max_length, overlong
        self.key = json.dumps([type(self).__name__, chat.key, vocab_size, max_length, overlong])

    def encode(self, messages, tools, last_turn_only=False):
        """(input_ids, trained, notes) of one checked conversation. Raises ValueError and Skip."""
        turns = [message for message in messages if message["role"] == "assistant"]
        if any(not (turn.get("content") or "").strip() and not turn.get("tool_calls") for turn in turns):
            raise Skip("an assistant turn is empty")
        ids, trained = self.chat.encode(messages, tools, last_turn_only)
        notes = []
        if max(ids) >= self.vocab_size:
            raise ValueError(f"token id {max(ids)} is outside the model's vocabulary of {self.vocab_size}")
        if len(ids) > self.max_length:
            if self.overlong == "drop":
                raise Skip(TOO_LONG)
            ids, trained = ids[: self.max_length], trained[: self.max_length]
            notes.append("truncated to --max_length")
        if not trained[1:].any():  # the first token has no state before it to predict it from
            raise Skip("no trained token within --max_length")
        if self.chat.has_control_text(messages, tools):
            notes.append("with control strings in content, kept as text")
        if self.chat.tokenizer.unk_token_id in ids:
            notes.append(f"with characters the tokenizer does not know (they become {self.chat.tokenizer.unk_token})")
        return ids, trained.tolist(), notes


class SftEncoder(Encoder):
    """Row {messages, tools?} → one sequence, in which every assistant turn is trained on."""

    def __call__(self, row):
        if "messages" not in row:
            raise ValueError(f"no field 'messages'; the row has {', '.join(map(repr, row)) or 'no fields'}")
        messages = row["messages"]
        check_messages(messages)
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError("messages has no assistant turn: there is nothing to train on")
        ids, trained, notes = self.encode(messages, parse_tools(row))
        return {"input_ids": ids, "trained": trained, "notes": notes}


class PairEncoder(Encoder):
    """Row {chosen, rejected, prompt?, tools?, margin?, subset?} → two sequences end to end, last answers trained.

    `chosen` and `rejected` are whole conversations that differ in the last assistant turn, or, with a `prompt`
    (messages, or a string: one user message), just answers (an assistant message in a list, or a string).
    """

    features = Encoder.features | {
        "chosen_length": datasets.Value("int32"),
        "margin": datasets.Value("float32"),
        "subset": datasets.Value("string"),
    }

    def __call__(self, row):
        chosen, rejected = (self._conversation(row, field) for field in ("chosen", "rejected"))
        if chosen[:-1] != rejected[:-1]:
            raise Skip("chosen and rejected differ before their last turn")
        tools = parse_tools(row)
        margin, subset = row.get("margin", 0.0), row.get("subset", "")
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
            raise ValueError(f"margin is {margin!r}, expected a finite number")
        if not isinstance(subset, str):
            raise ValueError(f"subset is {_kind(subset)}, expected a string")
        ids, trained, notes = self.encode(chosen, tools, last_turn_only=True)
        rejected_ids, rejected_trained, rejected_notes = self.encode(rejected, tools, last_turn_only=True)
        if ids == rejected_ids:
            raise Skip("chosen and rejected are the same" + " within --max_length" * (chosen != rejected))
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
        answer, prompt = row.get(field), row.get("prompt")
        if answer is None:
            raise ValueError(f"{field} is missing or null; the row has {', '.join(map(repr, row)) or 'no fields'}")
        if isinstance(answer, str):
            if prompt is None:
                raise ValueError(f"{field} is a string, so the row needs a field 'prompt'")
            answer = [{"role": "assistant", "content": answer}]
        check_messages(answer, field)
        if answer[-1]["role"] != "assistant":
            raise ValueError(f"{field} ends with a {answer[-1]['role']} message, expected the assistant's answer")
        if answer[0]["role"] in ("system", "user"):
            return answer  # a whole conversation already; a prompt beside it is a copy
        if prompt is None:
            raise ValueError(f"{field} begins with a {answer[0]['role']} message, so the row needs a field 'prompt'")
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        check_messages(prompt, "prompt")
        return [*prompt, *answer]


class PromptEncoder(Encoder):
    """Row {messages, dataset, ground_truth, weights?, tools?} → the prompt, and as JSON what an answer is judged by.

    A last assistant turn is left out of the prompt. `max_length` is that of prompts, and longer ones are dropped: a
    truncated question is another one. `overlong` is not used.
    """

    features = Encoder.features | {"job": datasets.Value("string")}

    def __call__(self, row):
        """Raises ValueError and Skip."""
        for field in ("messages", "dataset", "ground_truth"):
            if field not in row:
                raise ValueError(f"no field {field!r}; the row has {', '.join(map(repr, row)) or 'no fields'}")
        messages, tools = row["messages"], parse_tools(row)
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


def show_example(tokenizer, input_ids, trained):
    """One sequence as text for the terminal, trained tokens green and the rest grey."""
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1), len(input_ids)]
    parts = []
    for start, end in pairwise(edges):
        colour = "\033[32m" if trained[start] else "\033[90m"
        parts.append(f"{colour}{tokenizer.decode(input_ids[start:end])}\033[0m")
    return "".join(parts)


# ------------------------------------------------------------------------------------------------------ microbatches


@lru_cache(maxsize=2)
def _permutation(num_rows, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def batch_indices(num_rows, batch_size, seed, step, total_rows):
    """Rows of one optimizer step (numbered from 0), in the endless stream of epochs, each shuffled by (seed, epoch).

    The stream is cut at `total_rows` rows, so the last batch of a run may be smaller. Returns (B,) int array.
    """
    return stream(num_rows, seed, range(step * batch_size, min((step + 1) * batch_size, total_rows)))


def stream(num_rows, seed, positions):
    """The rows at some positions of that stream, (B,) int array."""
    return np.array([_permutation(num_rows, seed, p // num_rows)[p % num_rows] for p in positions], dtype=np.int64)


def deal(lengths, tokens_per_microbatch, world_size=1):
    """Packs sequences into microbatches and deals them to ranks, the same number to each.

    Longest first, each sequence goes to the microbatch with the fewest tokens; the number of microbatches grows until
    all fit. A sequence longer than the budget gets a microbatch of its own. How sequences are grouped cannot change the
    loss, which is divided by counts over the whole batch.

    Args:
        lengths: (N,) tokens in each sequence. tokens_per_microbatch: the budget; 1 means one sequence each.

    Returns:
        per rank a list of microbatches, each a list of positions in `lengths`; the same length for every rank. A
        microbatch may be empty when there are fewer sequences than places. In each, the longest come first.
    """
    lengths, budget = np.asarray(lengths), tokens_per_microbatch
    order = np.argsort(-lengths, kind="stable").tolist()
    sizes = lengths.tolist()
    # At least: by tokens; and because at most k sequences longer than budget / (k + 1) share a microbatch.
    least = [np.minimum(lengths, budget).sum() / budget, *(np.sum(lengths * (k + 1) > budget) / k for k in range(1, 9))]
    per_rank = max(1, math.ceil(max(least) / world_size))
    while True:
        bins = [[] for _ in range(per_rank * world_size)]
        heap = [(0, b) for b in range(len(bins))]  # (tokens, microbatch)
        for i in order:
            tokens, b = heap[0]
            if tokens and tokens + sizes[i] > budget:
                break  # not even the emptiest has room
            bins[b].append(i)
            heapq.heapreplace(heap, (tokens + sizes[i], b))
        else:
            return [bins[rank::world_size] for rank in range(world_size)]
        per_rank += max(1, per_rank // 100)


@dataclass
class Microbatch:
    """T tokens that hold S sequences end to end; position t holds the state that predicts targets[t].

    Attributes:
        input_ids: (T,) int64. position_ids: (T,) int64, from 0 in each sequence. cu_seqlens: (S+1,) int32, where each
        sequence begins, and T. max_length: longest sequence, in tokens. targets: (T,) int64, the next token where it is
        trained on, otherwise -100. extras: {name: (T,) float32}, other numbers of the tokens, where their targets are.
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


def pack(sequences, device, *extras):
    """Makes a microbatch of [(input_ids (L,), trained (L,)), ...]; of no sequences, one token that trains nothing.

    This is the only place where states and targets are shifted: targets[t] = input_ids[t+1]. Numbers of a token that
    are needed where it is predicted, (L,) arrays behind `trained` in each sequence, named by `extras`, shift with it;
    they are 0 where nothing is trained.
    """
    sequences = sequences or [(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=bool), *[np.zeros(1)] * len(extras))]
    lengths = [len(ids) for ids, *_ in sequences]

    def shifted(column, fill, dtype):
        values = [np.append(np.where(s[1][1:], s[column][1:], fill), fill) for s in sequences]
        return torch.from_numpy(np.concatenate(values).astype(dtype)).to(device)

    return Microbatch(
        input_ids=torch.from_numpy(np.concatenate([ids for ids, *_ in sequences]).astype(np.int64)).to(device),
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(device),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)).to(device),
        max_length=max(lengths),
        targets=shifted(0, IGNORE, np.int64),
        extras={name: shifted(column, 0, np.float32) for column, name in enumerate(extras, 2)},
    )
