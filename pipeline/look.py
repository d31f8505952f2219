"""What a script would train on, before a GPU is rented: the account of the data, lengths, and rows token by token.

    python -m pipeline.look --model DIR --data rows.jsonl more.jsonl --max_length 2048       for sft.py
    python -m pipeline.look --model DIR --data pairs.jsonl --chat_template tulu              for reward_model.py, dpo.py
    python -m pipeline.look --model DIR --data prompts.jsonl --for prompts                   for grpo.py, ppo_rlvr.py

It reads and encodes with the scripts' own functions, so what it shows is what they get. Of the model it needs the
tokenizer, and config.json if there is one; no weights, no GPU. In a terminal trained tokens are green and others grey;
elsewhere trained ones stand ⟦in brackets⟧.
"""

import json
import re
import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import tyro
from tokenizers.decoders import DecodeStream
from transformers import AutoConfig

import common

MAX_LENGTH = {"sft": 4096, "pairs": 2048, "prompts": 4096}  # the scripts' defaults
ENCODERS = {"sft": common.SftEncoder, "pairs": common.PairEncoder, "prompts": common.PromptEncoder}
UNLIMITED = 2**30  # longer than any row


@dataclass
class Args:
    model: str  # model folder or Hub id, of which the tokenizer is used
    data: list[str]  # SOURCE[:AMOUNT] ..., as for the scripts
    kind: Annotated[Literal["sft", "pairs", "prompts"] | None, tyro.conf.arg(name="for")] = None
    """whose rows these are; by default as the columns of the first row say"""
    chat_template: str | None = None  # tulu, chatml or a Jinja file; by default the tokenizer's own
    content_tokens: list[str] = field(default_factory=list)  # control tokens that stay so in assistant content
    max_length: int | None = None  # longest sequence, in tokens; by default the script's: 4096, for pairs 2048
    max_new_tokens: int = 2048  # prompts: room that they have to leave in --max_length
    overlong: Literal["truncate", "drop"] = "truncate"
    """what happens to longer sequences; reward_model.py drops them by default, and longer prompts are always dropped"""
    max_skip_frac: float = 0.01  # share of a source's rows above which a script refuses to start
    train_turns: Literal["all", "last"] = "all"  # sft.py's: which of the assistant's turns are trained on
    seed: int = 1  # decides which rows an AMOUNT takes
    rows: int = 3  # rows shown of each source, evenly spaced
    borders: bool = False  # show where each token ends, by two shades, or by │ where there are no colours


def main(args):
    """Prints it all. Raises RunError."""
    kind = args.kind or guess_kind(args.data[0])
    chat = common.ChatFormat(common.load_tokenizer(args.model, args.chat_template), args.content_tokens)
    limit = args.max_length or MAX_LENGTH[kind]
    if kind == "prompts":
        limit -= args.max_new_tokens
        if limit <= 0:
            what = f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in --max_length"
            raise common.RunError(f"{what}: give a smaller --max_new_tokens")
    size = vocabulary(args.model, chat.tokenizer)
    turns = [args.train_turns] if kind == "sft" else []
    rows = load(args, ENCODERS[kind](chat, size, limit, args.overlong, *turns))
    whole = rows
    if any("--max_length" in line for line in rows.report):  # some are cut or dropped: how long are they?
        whole = load(args, ENCODERS[kind](chat, size, UNLIMITED, args.overlong, *turns))
    for number, name in enumerate(rows.sources):
        print()
        print_sizes(name, rows, source_rows(rows, number))
        print_histogram(sequence_lengths(whole, source_rows(whole, number)), limit)
        for index in evenly(source_rows(rows, number), args.rows):
            print_row(chat.tokenizer, rows, index, args.borders)


def guess_kind(spec):
    """What the first row of a source is for, by its columns. Raises DataError."""
    source = re.sub(r":[\d.]+$", "", spec)  # without the AMOUNT
    for _, row in common.read_rows(source):
        if "chosen" in row:
            return "pairs"
        return "prompts" if "ground_truth" in row else "sft"
    raise common.DataError(source, None, "the data set is empty")


def vocabulary(model, tokenizer):
    """Rows of the model's embedding; the tokenizer's size where the folder holds no model."""
    try:
        return AutoConfig.from_pretrained(model).get_text_config().vocab_size
    except Exception:  # of transformers, the Hub's client or its HTTP client: no common class
        print(f"{model} has no config.json that names a vocabulary: taking the tokenizer's {len(tokenizer)} tokens")
        return len(tokenizer)


def load(args, encode):
    """The encoded rows; prints the account of them that a script prints, and why it would refuse. Raises DataError."""
    quiet = encode.max_length == UNLIMITED
    try:
        rows = common.load_rows(args.data, encode, args.seed, args.max_skip_frac)
    except common.DataError as error:
        rows = common.load_rows(args.data, encode, args.seed, max_skip_frac=1.0)  # or the same error again
        if not quiet:
            print(f"A script would refuse to start: {error}")
    if not quiet:
        print_account(rows)
    return rows


def print_account(rows):
    """The report of load_rows, and the beginning of the first row of each kind that is left out."""
    source = None
    for line in rows.report:
        print(line)
        if not line.startswith((" ", "WARNING")):
            source = next(name for name in rows.sources if line.startswith(f"{name}: "))
        skipped = re.match(r"  \d+ skipped: .* \(first: row (\d+)\)$", line)
        if skipped:
            number = int(skipped[1])
            row = next(row for at, row in common.read_rows(source) if at == number)
            text = json.dumps(row, ensure_ascii=False)
            print(f"      {text[:200]}{'…' if len(text) > 200 else ''}")


def source_rows(rows, number):
    """Positions in `rows` of one source's rows."""
    return np.flatnonzero(np.array(rows.table["source"][:]) == number)


def evenly(positions, count):
    """At most `count` of them, from the first to the last."""
    places = np.linspace(0, len(positions) - 1, min(count, len(positions)))
    return positions[np.round(places).astype(int)]


def sequence_lengths(rows, positions):
    """Tokens of each sequence; a pair has two."""
    lengths = np.asarray(rows.lengths)[positions]
    if "chosen_length" not in rows.table.column_names:
        return lengths
    chosen = np.array(rows.table["chosen_length"][:])[positions]
    return np.concatenate([chosen, lengths - chosen])


def print_sizes(name, rows, positions):
    tokens = int(np.asarray(rows.lengths)[positions].sum())
    trained = int(np.asarray(rows.trained)[positions].sum())
    share = f", {trained} of them trained ({trained / tokens:.1%})" if trained else ""
    print(f"{name}: {len(positions)} rows, {tokens} tokens{share}")


def print_histogram(lengths, limit, width=40):
    """How many sequences have how many tokens, in steps of two; those over the limit apart, with what it takes away."""
    if not len(lengths):
        return
    edges = {2**k for k in range(int(lengths.max()).bit_length() + 1)} | {limit}
    edges = sorted(edge for edge in edges if edge // 2 < lengths.max() and edge >= lengths.min())
    edges = edges or [int(lengths.max())]
    counts = []
    below = 0
    for edge in edges:
        up_to = int((lengths <= edge).sum())
        counts.append(up_to - below)
        below = up_to
    for edge, count in zip(edges, counts, strict=True):
        bar = "#" * -(-count * width // max(counts))  # at least one where there is a sequence
        cut = "  over the limit" if edge > limit and count else ""
        print(f"  up to {edge:>7} tokens: {count:>7} {bar}{cut}")
    over = lengths[lengths > limit]
    lost = int((over - limit).sum()) / int(lengths.sum())
    print(f"  longest {lengths.max()}; over {limit} are {len(over)} of {len(lengths)}, by {lost:.1%} of all tokens")


def print_row(tokenizer, rows, index, borders):
    """One row; of a pair both sequences, of a prompt also what an answer is judged by."""
    sequences = rows.sequences([index])
    titles = ["chosen", "rejected"] if len(sequences) == 2 else [""]
    for title, (input_ids, trained) in zip(titles, sequences, strict=True):
        print(f"--- {rows.where(index)} {title}".rstrip())
        print(show(tokenizer, input_ids, trained, borders, sys.stdout.isatty()))
    if "job" in rows.table.column_names:
        verifier, ground_truth, weights = json.loads(rows.table[int(index)]["job"])
        print(f"--- judged by {verifier}, ground truth {ground_truth!r}" + (f", weights {weights}" if weights else ""))


def show(tokenizer, input_ids, trained, borders, colour):
    """A sequence as text, by common.show_example; with borders token by token."""
    if not borders:
        return common.show_example(tokenizer, input_ids, trained, colour=colour)
    shades = {True: ("\033[32m", "\033[92m"), False: ("\033[90m", "\033[37m")}  # two greens, two greys
    parts = []
    for i, text in enumerate(token_texts(tokenizer, input_ids)):
        if colour:
            parts.append(f"{shades[bool(trained[i])][i % 2]}{text}\033[0m")
        else:
            parts.append(f"⟦{text}⟧" if trained[i] else f"{text}│")
    return "".join(parts)


def token_texts(tokenizer, input_ids):
    """The text that each token adds; "" for one that only begins a character."""
    stream = DecodeStream(skip_special_tokens=False)
    for i in input_ids:
        try:
            yield stream.step(tokenizer.backend_tokenizer, int(i)) or ""
        except Exception:  # tokenizers raises no other class, where bytes are no UTF-8: begin anew
            stream = DecodeStream(skip_special_tokens=False)
            yield stream.step(tokenizer.backend_tokenizer, int(i)) or ""


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, use_underscores=True, prog="python -m pipeline.look"))
    except common.RunError as error:
        sys.exit(f"error: {error}")
