"""Rows of published shapes → the rows that the scripts read.

    python -m pipeline.convert gsm8k/train.jsonl --to messages --out gsm8k_train.jsonl       for sft.py
    python -m pipeline.convert hh_helpful_base.train.jsonl --out hh_train.jsonl              for reward_model.py, dpo.py
    python -m pipeline.convert gsm8k/train.jsonl --to prompts --out gsm8k_prompts.jsonl      for grpo.py, ppo_rlvr.py
    python -m pipeline.convert mine.csv --to messages --out train.jsonl --hold_out test.jsonl    a table of your own

A source is what --data of a script takes: a file, a folder, or a Hub id (docs/data.md). The *shape* of a
row is the first in SHAPES whose columns it has; what its values mean is one function a shape, in `pipeline/shapes/`.
--to has to be given where a shape can become several things. A row that becomes nothing is counted, with its reason.
Who is held out depends on the question alone: the same questions in messages, pairs and prompts, and in every call.
"""

import contextlib
import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from common import DataError, RunError, Skip
from pipeline.shapes import messages, pairs, prompts
from pipeline.shapes.files import rows_of, writing
from pipeline.shapes.texts import has, turns
from rewards import VERIFIERS


@dataclass
class Shape:
    """How rows are known, and what they become.

    Attributes:
        columns: all of these; a|b is one of two, a.b the column b of an object (or of the first object in a list).
        seen_in: who publishes such rows.
        messages, pairs, prompts: functions row → row or rows, or None where a row cannot become that.
        together: a pair is made of several rows, those that are equal in this column; the function gets a list.
        as_they_are: nothing is to be done, they already are this: "messages", "pairs" or "prompts".
    """

    columns: str
    seen_in: str = ""
    messages: Callable | None = None
    pairs: Callable | None = None
    prompts: Callable | None = None
    together: str = ""
    as_they_are: str = ""


READERS = {"messages": "sft.py", "pairs": "reward_model.py and dpo.py", "prompts": "grpo.py and ppo_rlvr.py"}
SHAPES = {  # the first that fits
    "RL": Shape("messages|prompt dataset ground_truth", as_they_are="prompts"),
    "pair of conversations": Shape("chosen.role rejected.role", as_they_are="pairs"),
    "ShareGPT DPO": Shape("conversations.from chosen.value rejected.value", "LLaMA-Factory", pairs=pairs.sharegpt),
    "Alpaca DPO": Shape("instruction chosen rejected", "*LLMs from scratch*", pairs=pairs.alpaca),
    "Orca DPO": Shape("question chosen rejected", "Intel/orca_dpo_pairs", pairs=pairs.orca),
    "pair of answers": Shape("prompt chosen rejected", as_they_are="pairs"),
    "HH-RLHF": Shape("chosen rejected", "Anthropic/hh-rlhf", pairs=pairs.hh),
    "HelpSteer3": Shape("context response1 response2 overall_preference", "nvidia/HelpSteer3", pairs=pairs.helpsteer3),
    "HelpSteer2": Shape("prompt response helpfulness", "nvidia/HelpSteer2", pairs=pairs.helpsteer2, together="prompt"),
    "Nectar": Shape("prompt answers.rank", "berkeley-nest/Nectar", pairs=pairs.nectar),
    "KTO": Shape("prompt completion label", "TRL's KTO", messages=messages.kto, pairs=pairs.kto, together="prompt"),
    "LLMBar": Shape("input output_1 output_2 label", "princeton-nlp/LLMBar", pairs=pairs.llmbar),
    "glaive": Shape("system chat", "glaiveai/glaive-function-calling-v2", messages=messages.glaive),
    "xLAM": Shape("query tools answers", "Salesforce/xlam-function-calling-60k", messages=messages.xlam),
    "ShareGPT": Shape("conversations.from|messages.from", "FastChat, LLaMA-Factory", messages=messages.sharegpt),
    "typed parts": Shape("messages.content.value", "LLaMA-Factory's reason_tool_use", messages=messages.typed_parts),
    "messages": Shape("messages|conversations", as_they_are="messages"),
    "prompt and completion": Shape("prompt completion", as_they_are="messages"),
    "verl": Shape("data_source prompt reward_model.ground_truth", "verl, DAPO", prompts=prompts.verl),
    "ORZ": Shape("0.value 1.ground_truth.value", "Open-Reasoner-Zero", prompts=prompts.orz),
    "problem with solution": Shape("problem solution", "MATH, DeepScaleR", messages.solved, prompts=prompts.math),
    "problem with answer": Shape("problem answer", "Big-Math", prompts=prompts.math),
    "GSM8K": Shape("question answer", "openai/gsm8k", messages=messages.gsm8k, prompts=prompts.gsm8k),
    "TRL's GRPO": Shape("prompt solution", "TRL", prompts=prompts.math),
    "SVAMP": Shape("Body Question Answer", "SVAMP", prompts=prompts.svamp),
    "IFEval": Shape("prompt instruction_id_list kwargs", "google/IFEval", prompts=prompts.ifeval),
    "MBPP": Shape("text|prompt test_list", "MBPP and its sanitized form", prompts=prompts.mbpp),
    "HumanEval": Shape("prompt entry_point test", "openai/openai_humaneval", prompts=prompts.humaneval),
    "Alpaca": Shape("instruction output|response", "Alpaca, Dolly, GPTeacher", messages=messages.alpaca),
    "self-instruct": Shape("instruction instances.output", "self-instruct's seeds", messages=messages.self_instruct),
}
FORM = {"dataset": ["contains", "contains"], "ground_truth": ["####", "<<"], "weights": [0.5, 0.5]}


@dataclass
class Args:
    rows: tyro.conf.Positional[list[str]]  # what to read: files, folders or Hub ids
    out: str  # JSON lines to write, in the order of the rows; under a temporary name until all are there
    to: Literal["messages", "pairs", "prompts"] | None = None  # what to make, where a shape leaves a choice
    hold_out: str | None = None  # JSON lines to write besides: rows that are not to be trained on
    hold_out_share: float = 0.1  # of the questions; all rows with one question are on one side
    verifier: str | None = None  # judges all prompts, instead of the shape's own verifier
    format: bool = False
    """GSM8K's prompts: half of the reward for the line of the answer, "####", half for a calculator's mark, "<<" """


def main(args):
    """Converts all sources into --out. Raises RunError."""
    paths = [Path(path).resolve() for path in (args.out, args.hold_out, *args.rows) if path]
    if len(set(paths)) < len(paths):
        raise RunError("--out, --hold_out and the sources have to be different files")
    if args.format and args.verifier:
        raise RunError("--format chooses the verifiers itself: leave out --verifier")
    target = args.to or only_target(args.rows[0])
    if (args.format or args.verifier) and target != "prompts":
        raise RunError("--format and --verifier are for --to prompts")
    if args.verifier and args.verifier.lower() not in map(str.lower, VERIFIERS):
        print(f"WARNING: no verifier {args.verifier} is known here: training needs its --rewards FILE")
    counts = Counter()  # is held out → rows
    held_out = writing(args.hold_out) if args.hold_out else contextlib.nullcontext()
    with writing(args.out) as file, held_out as other_file:
        for row in itertools.chain.from_iterable(convert(source, target, args) for source in args.rows):
            is_held_out = args.hold_out is not None and lot(row) < args.hold_out_share
            counts[is_held_out] += 1
            (other_file if is_held_out else file).write(json.dumps(row) + "\n")
        if args.hold_out:
            if len(counts) < 2:
                raise RunError(f"--hold_out_share {args.hold_out_share:g} puts all {counts.total()} rows on one side")
            print(f"{counts[True]} of {counts.total()} rows are held out: no question is on both sides")


def lot(row):
    """A number from 0 to 1 that its question draws for a row, the same everywhere."""
    return int(hashlib.sha256("\n".join(turns(row)).encode()).hexdigest()[:13], 16) / 16**13


def only_target(source):
    """What the first row of a source becomes, if that is one thing. Raises DataError."""
    for number, row in read(source):
        name, targets = shape_of(source, number, row, None)
        if len(targets) > 1:
            raise DataError(source, number, f"{name} rows become {' or '.join(targets)}: choose with --to")
        return targets[0]
    raise DataError(source, None, "no rows")


def convert(source, target, args):
    """Yields the rows that those of a source become, and prints an account of it. Raises DataError."""
    read_of = Counter()  # shape → rows
    dropped = Counter()  # (shape, reason) → rows
    first = {}  # the row in which a reason comes first
    written = 0
    for name, numbers, content in groups(source, target):
        read_of[name] += len(numbers)
        made = attempt(name, target, content, args)
        lost = len(numbers)
        if not isinstance(made, Skip):
            yield from made
            written += len(made)
            lost -= 2 * len(made) if isinstance(content, list) else 1  # a pair takes two rows of a group
            made = "one answer more than the pairs of its prompt take"
        if lost:
            dropped[name, str(made)] += lost
            first.setdefault((name, str(made)), numbers[0])
    shapes = ", ".join(f"{count} of {name}" for name, count in read_of.items())
    print(f"{source}: {read_of.total()} rows read ({shapes}), {written} {target} written")
    for (name, reason), count in dropped.most_common():
        print(f"  {count} dropped: {reason} (first: row {first[name, reason]})")
    if not written:
        raise DataError(source, None, "no row could be converted")


def groups(source, target):
    """Yields (shape's name, row numbers, row), or a list of rows where a pair is made of several. Raises DataError."""
    gathered = {}  # in the order of each group's first row
    for number, row in read(source):
        name, targets = shape_of(source, number, row, target)
        if target not in targets:
            raise DataError(source, number, f"{name} rows become {' or '.join(targets)}, not {target}")
        if target == "pairs" and SHAPES[name].together:
            key = json.dumps([name, row[SHAPES[name].together]])
            numbers, rows = gathered.setdefault(key, ([], []))
            numbers.append(number)
            rows.append(row)
        else:
            yield name, [number], row
    for key, (numbers, rows) in gathered.items():
        yield json.loads(key)[0], numbers, rows


def attempt(name, target, content, args):
    """The new rows, a list; or the Skip that says why there are none."""
    try:
        made = getattr(SHAPES[name], target)(content)
    except Skip as reason:
        return reason
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        return Skip(f"values that {name} rows do not have ({type(error).__name__}: {error})")
    made = made if isinstance(made, list) else [made]
    for row in made if target == "prompts" else []:
        if args.format:
            if name != "GSM8K":
                raise RunError(f"--format is for GSM8K's rows, and there are rows of {name}")
            row.update(FORM)
        row["dataset"] = args.verifier or row["dataset"]
        if row["dataset"] is None:
            return Skip(f"no verifier known for data_source {content['data_source']!r}: name it with --verifier")
        if not args.format and (problem := prompts.problem(row)):
            return Skip(problem)
    return made


def read(source):
    """files.rows_of, with the names of columns in small letters where a shape has them only then: Question, Answer."""
    for number, row in rows_of(source):
        if not any(fitting(row)):
            small = {name.strip().lower(): value for name, value in row.items()}
            row = small if any(fitting(small)) else row
        yield number, row


def shape_of(source, number, row, target):
    """(name, targets) of a row's shape. Raises DataError if there is none, or no need of one."""
    reader = None  # of the row as it is
    for name in fitting(row):
        shape = SHAPES[name]
        targets = [each for each in READERS if getattr(shape, each)]
        if shape.as_they_are:
            reader = reader or READERS[shape.as_they_are]
            if target in (None, shape.as_they_are):
                raise DataError(source, number, f"nothing to convert: such rows are read as they are, by {reader}")
        elif not reader or target in targets:
            return name, targets
    if reader:
        raise DataError(source, number, f"such rows are read as they are, by {reader}; no {target} are made of them")
    known = "; ".join(f"{name} ({shape.columns})" for name, shape in SHAPES.items() if not shape.as_they_are)
    what = f"no known shape has the columns {', '.join(row)}. A table of your own has question and answer"
    raise DataError(source, number, f"{what}. Known are: {known}")


def fitting(row):
    """Yields the names of the shapes whose columns a row has."""
    for name, shape in SHAPES.items():
        if all(any(has(row, path) for path in column.split("|")) for column in shape.columns.split()):
            yield name


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, use_underscores=True, prog="python -m pipeline.convert"))
    except RunError as error:
        sys.exit(f"error: {error}")
