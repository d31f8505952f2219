"""Rows of published shapes as prompts for RL, one function a shape: messages, verifier, ground truth."""

import ast
import builtins
import json
import re

from common import Skip
from pipeline.shapes.messages import as_messages
from rewards import VERIFIERS, judge


def judged(prompt, verifier, ground_truth):
    """A row of RL."""
    return {"messages": as_messages(prompt), "dataset": verifier, "ground_truth": ground_truth}


def problem(row):
    """Why the row's verifier cannot use its ground truth, or None. Verifiers of a file for --rewards are not asked."""
    verdict = judge(row["dataset"], None, row["ground_truth"]) if row["dataset"] in VERIFIERS else None
    if verdict and not verdict.is_judged:
        return f"verifier {row['dataset']} cannot use its ground truth: {verdict.answer} (--verifier chooses another)"
    return None


def gsm8k(row):
    return judged(row["question"], "gsm8k", row["answer"].split("####")[-1].strip())


def math(row):
    """The answer where it stands alone, else the solution, whose box holds it."""
    answer = row.get("answer")
    return judged(row.get("problem") or row["prompt"], "math", row["solution"] if answer in (None, "") else answer)


def svamp(row):
    return judged(f"{row['Body'].rstrip('. ')}. {row['Question']}", "gsm8k", row["Answer"])


def verl(row):
    """The verifier by `data_source`; None where none is known: --verifier has to name it."""
    source = row["data_source"].lower()
    verifier = "gsm8k" if "gsm8k" in source else None
    if re.search("math|aime|amc|numina|deepscaler|olympiad|orz", source):
        verifier = "math"
    truth = row["reward_model"]["ground_truth"]
    if isinstance(truth, list):  # a list would be one ground truth each for several verifiers
        if len(truth) != 1:
            raise Skip(f"{len(truth)} ground truths")
        truth = truth[0]
    return judged(row["prompt"], verifier, truth)


def orz(row):
    """A list of two turns (columns "0" and "1"): the question, and the ground truth of the answer."""
    return judged(row["0"]["value"], "math", row["1"]["ground_truth"]["value"])


def ifeval(row):
    return judged(row["prompt"], "ifeval", json.dumps({key: row[key] for key in ("instruction_id_list", "kwargs")}))


def mbpp(row):
    """The tests are in the prompt, as in the paper (arXiv 2108.07732): they say what the function is called."""
    task = row.get("text") or row["prompt"]
    shown = "\n".join(row["test_list"])
    tests = [*row.get("test_imports", []), *row["test_list"]]
    hiding = [name for name in re.findall(r"^def (\w+)", row.get("code", ""), re.MULTILINE) if hasattr(builtins, name)]
    if hiding:  # the tests' `sum` is the program's, not Python's
        tests = {"tests": tests, "entry_point": hiding}
    return judged(f"{task}\n\nYour code should pass these tests:\n\n{shown}", "code", tests)


def humaneval(row):
    """Other functions that the prompt defines belong to the tests: the answer need not repeat them."""
    given = ast.parse(row["prompt"] + "    pass")
    given.body = [node for node in given.body if getattr(node, "name", None) != row["entry_point"]]
    tests = [ast.unparse(given), row["test"], f"check({row['entry_point']})"]
    prompt = f"Complete this function:\n\n```python\n{row['prompt'].rstrip()}\n```"
    return judged(prompt, "code", {"tests": tests, "entry_point": row["entry_point"]})
