"""The workbench of verifiers: checks data, scores completions, and shows where two verifiers disagree.

    python -m rewards train.jsonl                                         are its ground truths usable?
    python -m rewards OUT/samples.jsonl                                   which rewards do the completions get?
    python -m rewards samples.jsonl --verifier exact                      which do they get from another verifier?
    python -m rewards samples.jsonl --rewards mine.py --against mine      where does a new verifier disagree?

A row has `dataset` and `ground_truth`, perhaps `weights`, as the published RLVR data. Rows that have a `completion` are
scored. A line of a run's samples.jsonl names the row of the data that it is of, which is looked up there.

A ground truth that cannot be used is an error: training would refuse it, too. Code rows are audited (see audit.py);
those whose tests are worth no reward are listed, and that is no error, since training leaves them out.
"""

import json
import math
import os
import re
import sys
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import tyro

from common import DataError, RunError, read_conversation, read_rows
from rewards.audit import audit, code_job
from rewards.environment import RowJobs, highest_reward
from rewards.jobs import split_job
from rewards.pool import Pool
from rewards.verifiers import REASONS, VERIFIERS, Verdict, printable, registered_name

USAGE = "usage: python -m rewards FILE...  Rows: `dataset`, `ground_truth`, perhaps `completion`"
SHOWN = 10  # disagreements
WIDTH = 100  # characters of a text that is shown


@dataclass
class Args:
    """The flags."""

    files: tyro.conf.Positional[list[str]]  # of rows, or a run's samples.jsonl
    rewards: list[str] = field(default_factory=list)  # files or modules of yours that define verifiers: my_rewards.py
    verifier: list[str] = field(default_factory=list)
    """NAME, NAME:WEIGHT or NAME:gate of who judges, in place of the verifiers that rows name"""
    against: str | None = None  # a verifier to compare with: it judges every completion, too
    audit: bool = True  # run code rows, to see what their tests are worth: 0.1 s of processor time each
    sandbox: Literal["full", "weak"] = "full"  # weak runs programs with the layers that this machine has
    out: str | None = None  # JSON lines to write: of each completion the verdicts


class Row(NamedTuple):
    """A row as it is judged; the jobs are (verifiers, ground truths, weights[, context])."""

    number: int
    completion: str | None
    job: list
    other_job: list | None  # of --against

    def for_pool(self) -> tuple:
        """The job as `Pool.score` takes it."""
        verifiers, *rest = self.job
        return verifiers, self.completion, *rest

    def other_for_pool(self) -> tuple:
        """The job of --against likewise, with the weight that makes the highest rewards of both jobs equal."""
        _, weights = split_job(*self.for_pool())
        verifiers, ground_truths, _, *context = self.other_job
        return verifiers, self.completion, ground_truths, [highest_reward(weights)], *context


def main(files: list[str], args: Args | None = None):
    """Checks the ground truths of files, and scores their completions. Raises RunError for bad input."""
    args = args or Args(files)
    reader = Reader(args)
    out = open_out(args.out, files)
    completions = 0
    with Pool(sandbox=args.sandbox, max_failed=1.0) as pool:  # it is here that one wants to see what fails
        for path in files:
            lines = look_at(pool, path, reader.read(path), args)
            completions += len(lines)
            if out:
                out.writelines(json.dumps(line) + "\n" for line in lines)
    if out:
        out.close()
    if not completions and (args.against or args.out):
        raise RunError(f"no row has a `completion`, which {'--against' if args.against else '--out'} is for")


def look_at(pool: Pool, path: str, rows: list[Row], args: Args) -> list[dict]:
    """Checks the rows of one file, scores those with a completion, and prints what it finds.

    Returns what --out has of each completion. Raises DataError if a ground truth cannot be used.
    """
    for index, message in pool.check([row.for_pool() for row in rows]).items():
        raise DataError(path, rows[index].number, message)
    print(f"{path}: {len(rows)} ground truths")
    if args.audit:
        print_audit(pool, rows)
    rows = [row for row in rows if row.completion is not None]
    if not rows:
        return []
    verdicts = judge(pool, rows, args)
    for name, judged in verdicts.items():
        print(f"  {name + ': ' if len(verdicts) > 1 else ''}{summary(judged)}")
    if args.against:
        print_comparison(rows, verdicts)
    lines = []
    for row, *both in zip(rows, *verdicts.values(), strict=True):
        lines.append({"file": path, **to_line(row, dict(zip(verdicts, both, strict=True)))})
    return lines


def open_out(path: str | None, files: list[str]):
    """The file of --out, or None. Raises RunError if it cannot be written, or is one of those to be read."""
    if path is None:
        return None
    if any(os.path.exists(path) and os.path.exists(file) and os.path.samefile(path, file) for file in files):
        raise RunError(f"--out {path} is one of the files that are read")
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise RunError(f"--out {path} cannot be written: {error.strerror}") from None


# ---------------------------------------------------------------- rows


class Reader:
    """Reads files of rows, and says who judges each row. Raises RunError if a verifier does not exist."""

    def __init__(self, args: Args):
        self.make_job = RowJobs(args.rewards, args.verifier, args.audit)
        self.make_other_job = None
        if args.against:
            if registered_name(args.against) is None:
                known = ", ".join(VERIFIERS)
                raise RunError(f"--against {args.against}: no verifier has this name; there are {known}")
            self.make_other_job = RowJobs((), [args.against])
        self.data = {}  # source → {number: row}, where samples come from

    def read(self, path: str) -> list[Row]:
        """The rows of a file. Raises DataError."""
        rows = []
        for number, row in read_rows(path):
            try:
                rows.append(self.read_row(number, self.with_origin(row)))
            except ValueError as error:
                message, *_ = str(error).split(";")  # without the names of all columns
                raise DataError(path, number, message.removesuffix(" and no --verifier")) from None
        return rows

    def read_row(self, number: int, row: dict) -> Row:
        """Raises ValueError if nobody can judge the row."""
        completion = row.get("completion")
        if completion is not None and not isinstance(completion, str):
            raise ValueError(f"`completion` is of type {type(completion).__name__}, expected a string")
        job = self.job(self.make_job, row)
        other = None
        if self.make_other_job:
            other = self.job(self.make_other_job, row)
        return Row(number, completion, job, other)

    def job(self, make_job: RowJobs, row: dict) -> list:
        """(verifiers, ground truths, weights[, context]). Raises ValueError."""
        job = make_job(row, None)
        if len(job) == 4 and "prompt" in job[3]:
            messages = read_conversation(row, needs_answer=False)
            job[3]["prompt"] = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        try:
            json.dumps(job)
        except TypeError as error:  # columns of dates and bytes
            raise ValueError(f"dataset, ground_truth or weights: {error}") from None
        return job

    def with_origin(self, row: dict) -> dict:
        """A line of samples.jsonl with the columns of the row that it is of; other rows as they are."""
        origin = row.get("row")
        match = re.fullmatch(r"(.+), row (\d+)", origin, re.DOTALL) if isinstance(origin, str) else None
        if not match or "ground_truth" in row:
            return row
        source, number = match[1], int(match[2])
        if source not in self.data:
            self.data[source] = dict(read_rows(source))
        if number not in self.data[source]:
            raise ValueError(f"it is of {origin}, which is not there")
        return {**self.data[source][number], "completion": row.get("completion")}


def print_audit(pool: Pool, rows: list[Row]):
    """Lists the code rows whose tests are worth no reward."""
    code, jobs = [], []
    for row in rows:
        if job := code_job(*row.job):
            code.append(row)
            jobs.append(job)
    if not code:
        return
    problems = audit(pool, jobs)
    print(f"  audit: the tests of {len(problems)} of {len(code)} code rows are worth no reward")
    for index, reason in problems.items():
        print(f"    row {code[index].number}: {shorten(reason)}")


# ---------------------------------------------------------------- verdicts


def judge(pool: Pool, rows: list[Row], args: Args) -> dict[str, list[Verdict]]:
    """{name: verdicts on the rows}: of one who judges, and with --against of another."""
    named = {", ".join(name for name, *_ in split_job(*row.for_pool())[0]) for row in rows}
    own = named.pop() if len(named) == 1 else "the rows' own"
    verdicts = {own: pool.score([row.for_pool() for row in rows])}
    if args.against:
        name = args.against if args.against != own else f"{own} again"
        verdicts[name] = pool.score([row.other_for_pool() for row in rows])
    return verdicts


def to_line(row: Row, verdicts: dict[str, Verdict]) -> dict:
    """What --out has of a completion. A reward that is not there is null."""
    judged = {}
    for name, verdict in verdicts.items():
        reward = verdict.reward if verdict.is_judged else None
        judged[name] = {"reward": reward, "reason": verdict.reason, "answer": verdict.answer}
    return {"row": row.number, "completion": row.completion, "verdicts": judged}


def summary(verdicts: list[Verdict]) -> str:
    """One line."""
    rewards = [verdict.reward for verdict in verdicts if verdict.is_judged]
    counts = Counter(verdict.reason for verdict in verdicts)
    reasons = ", ".join(f"{counts[reason]} {reason}" for reason in REASONS if counts[reason])
    if not rewards:
        return f"{len(verdicts)} completions, none could be judged: {reasons}"
    of = f" of the {len(rewards)} that were judged" if len(rewards) < len(verdicts) else ""
    return f"{len(verdicts)} completions, mean reward {math.fsum(rewards) / len(rewards):.4f}{of}: {reasons}"


def print_comparison(rows: list[Row], verdicts: dict[str, list[Verdict]]):
    """How often two verifiers agree, and the first rows about which they do not."""
    first, second = verdicts
    pairs = list(zip(*verdicts.values(), strict=True))
    counts = Counter(agreement(*pair) for pair in pairs)
    names = {"both": "both right", "first": f"only {first}", "second": f"only {second}"}
    names |= {"neither": "neither", "not judged": "not judged"}
    width = max(map(len, names.values()))
    for key, name in names.items():
        print(f"    {name:{width}} {counts[key]:7}")
    different = [index for index, pair in enumerate(pairs) if differ(*pair)]
    print(f"  disagreements: {len(different)}")
    for index in different[:SHOWN]:
        row = rows[index]
        print(f"    row {row.number}, ground truth {shorten(plain(row.job[1]))}")
        print(f"      completion: {shorten(row.completion, end=True)}")
        for name, verdict in zip(verdicts, pairs[index], strict=True):
            reward = f"{verdict.reward:g}" if verdict.is_judged else "none"
            print(f"      {name}: reward {reward}, {verdict.reason}, answer {shorten(verdict.answer)!r}")
    if len(different) > SHOWN:
        print(f"    ... and {len(different) - SHOWN} more, which --out has")


def agreement(first: Verdict, second: Verdict) -> str:
    """Who says that a completion is right: both, first, second or neither; or "not judged", by at least one of them."""
    if not first.is_judged or not second.is_judged:
        return "not judged"
    right = first.reason == "right", second.reason == "right"
    return {(True, True): "both", (True, False): "first", (False, True): "second", (False, False): "neither"}[right]


def differ(first: Verdict, second: Verdict) -> bool:
    """Whether rewards are not the same, or one of the two is not there."""
    if not first.is_judged or not second.is_judged:
        return first.is_judged != second.is_judged
    return not math.isclose(first.reward, second.reward, abs_tol=1e-6)


def plain(ground_truth) -> str:
    """A ground truth as in the file."""
    return ground_truth if isinstance(ground_truth, str) else json.dumps(ground_truth, ensure_ascii=False)


def shorten(text: str, end: bool = False) -> str:
    """The beginning of a text, or its end, in one line that can be printed."""
    text = " ".join(printable(text).split())
    if len(text) <= WIDTH:
        return text
    return f"...{text[-WIDTH:]}" if end else f"{text[:WIDTH]}..."


if __name__ == "__main__":
    try:
        args = Args([])
        with suppress(SystemExit) if sys.argv[1:] == ["--help"] else nullcontext():  # its last line is below
            args = tyro.cli(Args, prog="python -m rewards", description=__doc__, use_underscores=True)
        if not args.files:
            sys.exit(USAGE)
        main(args.files, args)
    except RunError as error:
        sys.exit(f"error: {error}")
