"""Verifiers of programs: `code`, `code_stdio`. The last ```python block passes all tests, in a sandbox (sandbox.py)."""

import json
import re
import textwrap
from typing import NamedTuple

from rewards import sandbox, verifiers
from rewards.verifiers import Verdict, verifier

SECONDS = 20  # of processor time and sleep, for all tests of a program that reads stdin; a first failure ends them


class Tests(NamedTuple):
    """Of a program: `cases` of (stdin, stdout), or `pieces` of Python that use `names` of the program."""

    cases: list
    pieces: list
    names: list


def parse_tests(ground_truth) -> Tests:
    """The tests of a program. Raises ValueError.

    Published forms: a list of asserts (or longer pieces of Python), or of {"input", "output"}; or, to name what the
    program has to define, {"tests": ..., "entry_point": ...}. Each may be a JSON string.
    """
    given = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    entry_points = []
    if isinstance(given, dict):
        entry_points = given.get("entry_point") or []
        if isinstance(entry_points, str):
            entry_points = [entry_points]
        given = given.get("tests")
    tests = [given] if isinstance(given, str) else given
    if not tests or not isinstance(tests, list):
        raise ValueError("no tests; expected a list of Python strings, or of {input, output}")
    if all(isinstance(test, dict) for test in tests):
        return Tests(parse_cases(tests), [], [])
    if not all(isinstance(test, str) for test in tests):
        raise ValueError("tests of several kinds; expected Python strings, or {input, output}")
    try:
        names, imports = sandbox.free_names(tests, entry_points)
    except SyntaxError as error:
        raise ValueError(f"a test is not Python: {error}") from None
    if not names:
        raise ValueError("the tests use no name that a program could define (`entry_point` gives a built-in one)")
    return Tests([], imports + tests, names)


def parse_cases(tests: list[dict]) -> list[tuple[str, str]]:
    """[(stdin, stdout), ...]. Raises ValueError if one of them is not a string."""
    cases = []
    for number, test in enumerate(tests, 1):
        case = (test.get("input"), test.get("output"))
        if not all(isinstance(text, str) for text in case):
            raise ValueError(f"test {number} needs the strings `input` and `output`")
        cases.append(case)
    return cases


def code_blocks(completion: str) -> list[tuple[str, str]]:
    """[(language, code), ...] of the closed blocks between fences of ``` or ~~~ that begin a line."""
    blocks = []
    fence = None  # of the block that is open
    for line in completion.splitlines(keepends=True):
        marks = re.match(r"\s*(`{3,}|~{3,})[ \t]*([\w.+-]*)", line)
        if fence is None:
            if marks:
                fence = marks[1]
                language = marks[2].lower()
                lines = []
        elif marks and marks[1].startswith(fence) and not marks[2]:
            blocks.append((language, textwrap.dedent("".join(lines))))
            fence = None
        else:
            lines.append(line)
    return blocks


def last_program(completion: str, names: list[str]) -> str | None:
    """The last ```python block, of those that define one of the names if there are such; else the last without a
    language."""
    blocks = code_blocks(completion)
    python = [code for language, code in blocks if language.startswith("py")]
    defining = [code for code in python if defines(code, names)]
    unlabelled = [code for language, code in blocks if not language]
    candidates = defining or python or unlabelled
    return candidates[-1] if candidates else None


def defines(code: str, names: list[str]) -> bool:
    """Whether code has one of the names in it, and a definition or an assignment. It need not be valid Python."""
    has_name = any(re.search(rf"\b{re.escape(name)}\b", code) for name in names)
    return has_name and bool(re.search(r"^\s*(?:async )?(?:def|class)\b|^\w+ *=", code, re.MULTILINE))


@verifier("code", "code_stdio", gold=parse_tests, seconds=15)
def passes_tests(completion, tests):
    """1 if the program passes all tests, else 0: what a program does wrong, too slowly or fatally is wrong."""
    program = last_program(completion, tests.names)
    if program is None:
        return Verdict(0.0, "unparsed")
    if tests.pieces:
        result = sandbox.test(program, tests.pieces, tests.names, verifiers.SANDBOX)
        error, is_late = result.error, result.is_late
    else:
        error, is_late = first_failure(program, tests.cases)
    if is_late:
        return Verdict(0.0, "timeout", error)  # a judgement: the program is to blame
    return error is None, error or "all tests passed"


def first_failure(program: str, cases: list[tuple[str, str]]) -> tuple[str | None, bool]:
    """What a program that reads stdin gets wrong in the first of the cases that it fails, and whether it was too late.

    (None, False) if it passes all.
    """
    seconds = 0.0
    for number, (stdin, expected) in enumerate(cases, 1):
        result = sandbox.run(program, stdin, verifiers.SANDBOX)
        seconds += result.seconds
        error, is_late = result.error, result.is_late
        if error is None and not same_output(result.printed, expected):
            error = f"printed {result.printed.strip()[:100]!r}"
        if error is None and seconds > SECONDS:
            error, is_late = f"more than {SECONDS} s for all tests", True
        if error:
            return f"test {number} of {len(cases)}: {error}", is_late
    return None, False


def same_output(printed: str, expected: str) -> bool:
    """Line by line, whatever the spacing."""
    printed_lines = [line.split() for line in printed.strip().splitlines()]
    expected_lines = [line.split() for line in expected.strip().splitlines()]
    return printed_lines == expected_lines
