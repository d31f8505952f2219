"""Rows of benchmarks as evaluate asks them: of RL's shape, behind the turns of some examples (shots)."""

import inspect
import json

import common
from pipeline import convert
from pipeline.shapes import prompts


def read_shots(path, count):
    """The turns of the first rows of a file, [user, assistant] each; rows of published shapes are converted."""
    shots = []
    for number, row in common.read_rows(path):
        if len(shots) == count:
            break
        try:
            turns = common.read_conversation(row if row.get("messages") else as_shape(row, "messages"))
        except (ValueError, common.Skip) as error:
            raise common.DataError(path, number, str(error)) from None
        if [turn["role"] for turn in turns] != ["user", "assistant"]:
            raise common.DataError(path, number, "messages: a shot is one question of the user and its answer")
        shots.append(turns)
    if len(shots) < count:
        raise common.DataError(path, None, f"{len(shots)} rows, fewer than --num_shots {count}")
    return shots


def as_shape(row, target):
    """What pipeline.convert makes of a row. Raises ValueError, Skip."""
    try:
        name, targets = convert.shape_of("", None, row, target)
    except common.DataError as error:
        raise ValueError(error.args[2]) from None
    if target not in targets:
        raise ValueError(f"rows of the shape {name} become {' or '.join(targets)}, and no {target}")
    made = convert.attempt(name, target, row, convert.Args([], ""))
    if isinstance(made, common.Skip):
        raise made
    return made[0]


class Benchmark:
    """Row of a benchmark → the row of RL that is sampled, with shots before its question.

    Args:
        shots: [[user's turn, assistant's], ...]. has_judge: whether the flags say who judges, so that rows need not.
    """

    def __init__(self, shots, has_judge):
        self.shots, self.has_judge = shots, has_judge
        self.questions = [question["content"].strip() for question, _ in shots]
        sources = [inspect.getsource(part) for part in (Benchmark, as_shape, convert.attempt, prompts)]
        self.key = json.dumps([shots, has_judge, sources])

    def __call__(self, row):
        """Raises ValueError, Skip."""
        if not any(row.get(column) for column in ("messages", "conversations", "dataset")):
            row = {**row, **as_shape(row, "prompts")}
        if not self.has_judge:
            common.row_job(row)
        messages = common.read_conversation(row, needs_answer=False)
        asked = [message["content"].strip() for message in messages if message["role"] == "user"]
        if set(asked) & set(self.questions):
            raise ValueError("messages: this question is one of --shots")
        begin = messages[0]["role"] in ("system", "developer")
        return {**row, "messages": messages[:begin] + sum(self.shots, []) + messages[begin:]} if self.shots else row
