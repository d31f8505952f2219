"""Are the tests of a code row worth a reward? Looked at once, before training.

    problems = audit(pool, [("code", reference(row), row["ground_truth"]), ...])    # {index of a job: reason}

A policy learns whatever passes, so tests that pass for a program that does nothing teach it to do nothing. Such rows are
many: a test function that nobody calls, a comparison without `assert`, an `except: pass`. Every code row has to fail
for stubs, programs that raise, or return or print the same constant whatever they are given. Where the row has a
reference solution, that has to pass. Rows that do neither are named, so that the caller can leave them out.

Rows of other verifiers pass the audit unseen. A job of several verifiers is audited in its code parts.
"""

import ast
import json

from rewards import programs
from rewards.jobs import split_job
from rewards.verifiers import VERIFIERS, Verdict, verifier

REFERENCES = ("solution", "canonical_solution", "reference_solution", "code", "solutions")  # columns of published rows


def audit(pool, jobs: list[tuple]) -> dict[int, str]:
    """The code rows whose tests are worth no reward: {index: reason}, in order.

    Args:
        pool: a Pool. Its workers run the programs; a row takes about 50 ms of one core, and as much again for a reference.
        jobs: (verifier, reference, ground_truth[, weights]) as for `Pool.score`, with the source of the row's reference
            solution, or None, in the place of the completion.

    Raises:
        RunError: it is not a job, or the sandbox or the workers do not start.
    """
    return {}


def reference(row: dict) -> str | None:
    """The source of a row's reference solution, from the columns REFERENCES; None if there is none in Python 3."""
    return None


def report(problems: dict[int, str], numbers: list[int], total: int) -> str:
    """One line on the rows that fail the audit: how many of `total`, `numbers[index]` of the first, their reasons."""
    return ""
