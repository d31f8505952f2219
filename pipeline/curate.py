"""Samples of pipeline.generate → what to train on: answers to imitate, pairs of answers, prompts that are worth trying.

    python -m pipeline.curate sft --data samples.jsonl --out sft.jsonl                            for sft.py
    python -m pipeline.curate pairs --data samples.jsonl --rule best_worst --out pairs.jsonl      for dpo.py
    python -m pipeline.curate pairs --data big.jsonl small.jsonl --rule delta --strong BIG --weak SMALL --out both.jsonl
    python -m pipeline.curate prompts --data samples.jsonl --out prompts.jsonl                    for grpo.py

Rows of all files with one prompt are a group, whichever models answered. Its *candidates* are completions that have
ended and are judged: a reward of null is no reward of 0. What is chosen of a group depends on it and the seed, not on
other prompts or the order of files. The rules of `pairs`:

    best_worst    the highest reward against the lowest, as OLMo 3's judged pairs (arXiv 2512.13961)
    right_wrong   a reward of --min_reward or more against a lower one
    tulu          the highest against a random lower one (Tülu 3, arXiv 2411.15124, section 5.2)
    delta         the strong model's against the weak one's, judged or not (delta learning, arXiv 2507.06187)
"""

import contextlib
import json
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import tyro

import common
from pipeline.shapes.files import writing
from pipeline.shapes.samples import (
    Sample,
    answered,
    candidates,
    gap,
    is_delta,
    is_right,
    match,
    other_columns,
    pass_rate,
    print_histogram,
    read_groups,
    split,
)  # fmt: skip


@dataclass(kw_only=True)
class Shared:
    data: list[str]  # files of pipeline.generate, of one model or several
    out: str  # JSON lines to write
    control: str | None = None  # a second file to write: as many rows, taken at random
    min_reward: float = 1.0  # reward from which a completion is right
    seed: int = 1  # decides between equals, and what is random


@dataclass(kw_only=True)
class Sft(Shared):
    """Answers to imitate: {"messages", "model", "reward"}."""

    choose: Literal["best", "right", "random_right"] = "best"  # of those that are right: the best, all, or any
    per_prompt: int = 1  # answers of a prompt, at most, each text once; 0: no limit
    keep_alike: bool = False  # keep prompts whose candidates all have the same reward
    with_reference: bool = False  # where no candidate is right, take the answer that the data had


@dataclass(kw_only=True)
class Pairs(Shared):
    """Pairs of answers: {"chosen", "rejected"}, with the models and rewards of both."""

    rule: Literal["best_worst", "right_wrong", "tulu", "delta"]  # which answer is chosen, and which rejected
    per_prompt: int = 1  # pairs of a prompt, at most, a completion in one of them; 0: no limit
    min_margin: float = 0.0  # rewards that differ by less are taken for equal
    length_gap: int | None = None  # drop pairs whose answers differ by more tokens
    strong: str | None = None  # rule delta: the model, as the rows name it, whose answers are chosen
    weak: str | None = None  # rule delta: the model whose answers are rejected
    noise: float = 0.0  # share of pairs that are written the wrong way round, for experiments
    margin: bool = False  # write how far the rewards differ as `margin`, which reward_model.py's loss subtracts


@dataclass(kw_only=True)
class Prompts(Shared):
    """Prompts as they were, and "pass_rate", the share of judged completions that is right, cut off or not."""

    above: float = 0.0  # keep prompts with a pass rate above this (-1: also those that are never solved)
    at_most: float = 0.625  # and no higher than this, OLMo 3's limit
    drop_solved: bool = False  # instead: keep all but those that are always solved


def main(args):
    """Writes --out and --control, and prints an account. Raises RunError, and DataError for a malformed row."""
    check(args)
    groups = read_groups(args)
    choose = {Sft: choose_answers, Pairs: choose_pairs, Prompts: choose_prompt}[type(args)]
    rows, control, kept, left_out = [], [], [], Counter()
    for group in groups:
        try:
            chosen, at_random = choose(group, args, left_out)
        except common.Skip as reason:
            left_out["prompts", str(reason)] += 1
            continue
        kept.append(group)
        rows += chosen
        control += at_random
    judged = [group for group in groups if pass_rate(group, args) is not None]
    if isinstance(args, Prompts):
        control = [prompt_row(group, args) for group in random.Random(args.seed).sample(judged, len(rows))]
    for (what, why), count in left_out.most_common():
        print(f"  {count} {what} left out: {why}")
    print_histogram([pass_rate(group, args) for group in judged], [pass_rate(group, args) for group in kept])
    if not rows:
        raise common.RunError(f"{args.out}: nothing is left to write; the account above says why")
    write({args.out: rows, args.control: control} if args.control else {args.out: rows})


def check(args):
    """Raises RunError for flags that do not go together, and for files that are there already."""
    ranges = dict.fromkeys(("per_prompt", "length_gap", "min_margin"), (0, 1e9))
    common.check_ranges(args, common.RANGES | ranges | {"above": (-1, 1), "at_most": (0, 1), "noise": (0, 1)})
    if len({os.path.realpath(path) for path in args.data}) < len(args.data):
        raise common.RunError("--data has a file twice: its completions would count twice")
    outs = {flag: getattr(args, flag) for flag in ("out", "control") if getattr(args, flag)}
    for flag, path in outs.items():
        if os.path.exists(path) or len({*map(os.path.realpath, outs.values())}) < len(outs):
            raise common.RunError(f"--{flag} {path} is there already, or given twice: delete it, or choose another")
    if isinstance(args, Sft) and args.choose == "right" and args.per_prompt != 1:
        raise common.RunError("--choose right takes all right answers: random_right takes --per_prompt of them")
    if isinstance(args, Prompts) and args.drop_solved and (args.above, args.at_most) != (0, 0.625):
        raise common.RunError("--drop_solved stands in place of --above and --at_most")
    if isinstance(args, Pairs):
        if (args.strong != args.weak) != is_delta(args) or (args.strong is None) != (args.weak is None):
            raise common.RunError("--rule delta needs two models, --strong and --weak; other rules need neither")
        if is_delta(args) and (args.min_margin or args.margin):
            raise common.RunError("--min_margin and --margin are about rewards, and --rule delta looks at none")


def choose_answers(group, args, left_out):
    """(rows of `sft`, as many of random candidates). Raises Skip."""
    found = candidates(group, args, left_out)
    texts = list({sample.text: sample for sample in found}.values())  # each once
    right = [sample for sample in texts if is_right(sample, args)]
    _, reference = split(group)
    if not right and reference and args.with_reference:
        right = [Sample(None, reference, "", True, 0, "reference", -1)]
        texts = texts or right
    elif not right:
        raise common.Skip("no candidate is right")
    elif len({sample.reward for sample in found}) == 1 and not args.keep_alike:
        raise common.Skip("all candidates have the same reward")
    elif args.choose == "best":
        right.sort(key=lambda sample: -sample.reward)  # equal ones stay in random order
    if args.choose != "right" and args.per_prompt:
        right = right[: args.per_prompt]
    rows, control = ([answer_row(group, sample) for sample in found] for found in (right, texts[: len(right)]))
    return rows, control


def choose_pairs(group, args, left_out):
    """(rows of `pairs`, as many of random candidates with random labels). Raises Skip."""
    found = candidates(group, args, left_out)

    def may(a, b):  # be chosen and rejected, by the rule
        if is_delta(args):
            return (a.model, b.model) == (args.strong, args.weak)
        is_lower = gap(a, b) >= max(args.min_margin, 1e-6)
        return is_lower and (args.rule != "right_wrong" or is_right(a, args) > is_right(b, args))

    def objection(a, b):
        is_far = args.length_gap is not None and abs(a.tokens - b.tokens) > args.length_gap
        return "the same text twice" if a.text == b.text else "lengths over --length_gap apart" if is_far else ""

    chosen = rejected = found
    if args.rule in ("best_worst", "tulu"):
        chosen = sorted(found, key=lambda sample: -sample.reward)  # equal ones stay in random order
    if args.rule == "best_worst":
        rejected = chosen[::-1]
    pairs = match(chosen, rejected, may)[: args.per_prompt or None]
    if not pairs:
        raise common.Skip("no two candidates that the rule pairs")
    left_out.update(("pairs", objection(*pair)) for pair in pairs if objection(*pair))
    pairs = [pair for pair in pairs if not objection(*pair)]
    if not pairs:
        raise common.Skip("no pair is left")
    at_random = match(found, found, lambda a, b: not objection(a, b))[: len(pairs)]
    if len(at_random) < len(pairs):
        at_random = pairs  # only their labels are random then
    labels = random.Random(f"labels {args.seed} {group.key}")
    rows = [pair_row(group, pair, args, labels.random() < args.noise) for pair in pairs]
    return rows, [pair_row(group, pair, args, labels.random() < 0.5) for pair in at_random]


def choose_prompt(group, args, left_out):
    """([the row of `prompts`], []). Raises Skip."""
    rate = pass_rate(group, args)
    if rate is None:
        raise common.Skip("no completion is judged")
    if not (rate < 1 if args.drop_solved else args.above < rate <= args.at_most):
        raise common.Skip("always solved" if args.drop_solved else "pass rate not above --above, or over --at_most")
    return [prompt_row(group, args)], []


def answer_row(group, sample):
    answer = {"messages": answered(group, sample.text), "model": sample.model, "reward": sample.reward}
    return other_columns(group) | answer


def pair_row(group, pair, args, is_swapped):
    row = other_columns(group)
    a, b = reversed(pair) if is_swapped else pair
    for name, sample in (("chosen", a), ("rejected", b)):
        row |= {name: answered(group, sample.text), f"{name}_model": sample.model, f"{name}_reward": sample.reward}
    row["reward_gap"] = None if None in (a.reward, b.reward) else gap(a, b)
    return row | ({"margin": abs(row["reward_gap"])} if args.margin else {})


def prompt_row(group, args):
    """The row as it came, with its last answer and its pass rate."""
    row, reference = split(group)
    if reference is not None:
        row["messages"] = answered(group, reference)
    return row | {"pass_rate": pass_rate(group, args)}


def write(files):
    """Writes {path: rows} as JSON lines; none until all are whole. RunError if a disk does not take them."""
    try:
        with contextlib.ExitStack() as stack:
            for path, rows in files.items():
                file = stack.enter_context(writing(path))
                file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise common.RunError(f"{error.filename} cannot be written: {common.first_line(error)}") from None
    for path, rows in files.items():
        print(f"{path}: {len(rows)} rows written")


if __name__ == "__main__":
    try:
        kinds = Sft | Pairs | Prompts
        main(tyro.cli(kinds, description=__doc__, use_underscores=True, prog="python -m pipeline.curate"))
    except common.RunError as error:
        sys.exit(f"error: {error}")
