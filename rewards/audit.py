"""Are the tests of a code row worth a reward? Looked at once, before training.

    problems = audit(pool, [("code", reference(row), row["ground_truth"]), ...])    # {index of a job: reason}

A policy learns whatever passes, so tests that pass for a program that does nothing teach it to do nothing. They are
found in every data set: a test that catches its own failure, `assert f`, the same answer to every question. So every
code row has to fail for stubs: programs that raise, that return, or print, the same whatever they are given. And where
the row has a reference solution, that has to pass. Rows that fail this audit are named, for the caller to leave out.

Rows of other verifiers pass unseen; of a job of several verifiers, the parts that are code are audited.
"""

import ast
import hashlib
import json

from rewards import programs
from rewards.equality import is_same, same_output
from rewards.jobs import split_job
from rewards.program_tests import Tests
from rewards.verifiers import VERIFIERS, registered_name, verifier

CODE = ("code", "code_stdio", "code_share")
REFERENCES = ("canonical_solution", "reference_solution", "solution", "code", "solutions")  # columns of published rows
PRINTED = ("", "0", "1", "-1", "YES", "NO", "Yes", "No", "True", "False")  # by programs that do not look at their input
RETURNED = (None, 0, "", [], True)  # likewise
STUBS = ("raises an exception", "returns an object of no use", *(f"returns {value!r}" for value in RETURNED))


def audit(pool, jobs: list[tuple]) -> dict[int, str]:
    """The code rows whose tests are worth no reward: {index: reason}, in order.

    Args:
        pool: a Pool, in whose workers programs run. A row takes about 0.1 s of a core, twice that with a reference
            solution. Rows with the same ground truth and reference are looked at once.
        jobs: (verifier, reference, ground_truth[, weights]) as for `Pool.score`, with the source of the row's reference
            solution, or None, in the place of the completion.

    Raises:
        RunError: it is not a job, or the sandbox or the workers do not start.
    """
    questions = {}  # digest of (reference, ground truth) → (the job for the pool, indices of rows)
    for index, (names, reference, *rest) in enumerate(jobs):
        parts, _ = split_job(names, reference or "", *rest)
        for name, _, ground_truth, *_ in parts:
            if name in CODE:
                job = ("code_audit", json.dumps([name, reference]), ground_truth)
                digest = hashlib.sha256(json.dumps(job).encode()).digest()
                questions.setdefault(digest, (job, []))[1].append(index)
    verdicts = pool.score([job for job, _ in questions.values()])
    problems = {}
    for (_, indices), verdict in zip(questions.values(), verdicts, strict=True):
        if verdict.reward != 1:
            problems |= dict.fromkeys(indices, verdict.answer or verdict.reason)
    return dict(sorted(problems.items()))


def code_job(verifiers, ground_truths, weights=None, context=None) -> tuple | None:
    """The job of `audit` for a row's job (see jobs.py), whose context has the reference; None if no part is code."""
    names = verifiers if isinstance(verifiers, list) else [verifiers]
    if not any(registered_name(name) in CODE for name in names):
        return None
    return verifiers, (context or {}).get("reference"), ground_truths, weights


@verifier("code_audit", seconds=programs.ENOUGH)
def looks_at_row(question, ground_truth):
    """1 if a row passes the audit; `question` is JSON of the row's verifier and its reference solution."""
    name, reference = json.loads(question)
    try:
        tests = VERIFIERS[name].gold(ground_truth)
    except ValueError as error:
        return 0.0, str(error)
    stub = passing_stub(tests)
    if stub:
        return 0.0, f"the tests pass for a program that {stub}"
    if reference is not None:
        failures, _ = programs.run(reference, tests, stops=True)
        problem = next((line for line in failures if line), None)
        if problem:
            return 0.0, f"the row's own solution fails: {problem}"
    return 1.0, "it fails for programs that do nothing"


def passing_stub(tests: Tests) -> str | None:
    """What a program does that does not look at what it is given and passes all tests; None if there is no such one."""
    if tests.cases:
        outputs = [expected for _, expected in tests.cases]
        for printed in [*PRINTED, *outputs[: len(set(tests.cases)) > 1]]:
            if all(same_output(printed, expected) for expected in outputs):
                return f"prints {printed.strip()[:20]!r} whatever it reads" if printed.strip() else "prints nothing"
    if tests.calls:
        expected = [results for _, results in tests.calls]
        differ = any(given != tests.calls[0][0] for given, _ in tests.calls)
        for value in [*RETURNED, *expected[0][:differ]]:
            if all(any(is_same(value, result) for result in results) for results in expected):
                return f"returns {str(value)[:20]!r} whatever it is given"
    if tests.pieces:
        passing = programs.passing_stubs(tuple(tests.pieces), tuple(tests.names), STUBS)
        return passing[0] if passing else None
    return None


def reference(row: dict) -> str | None:
    """The source of a row's reference solution, from the columns REFERENCES; None if there is none in Python 3.

    Of a list of them it is the first that is Python. HumanEval's begins with the prompt.
    """
    prompt = row.get("prompt")
    for text in reference_texts(row):
        blocks = [code for language, code in programs.code_blocks(text) if programs.is_python(language)]
        for source in (*blocks, text, f"{prompt}{text}" if isinstance(prompt, str) else ""):
            if is_program(source):
                return source
    return None


def reference_texts(row: dict) -> list[str]:
    """The texts in the columns REFERENCES. Some data sets have a list of them as JSON."""
    texts = []
    for column in REFERENCES:
        value = row.get(column)
        if column == "solutions" and isinstance(value, str) and value.startswith("["):
            value = json.loads(value)
        texts += value if isinstance(value, list) else [value]
    return [text for text in texts if isinstance(text, str)]


def is_program(text: str) -> bool:
    """Whether a text is Python that does or defines something: prose of one word is Python, too."""
    tree = programs.parse_python(text)
    return any(not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call) for node in tree.body)


def report(problems: dict[int, str], numbers: list[int], total: int) -> str:
    """One line on the rows that fail the audit.

    Args:
        problems: of `audit`.
        numbers: of the rows, in the order of the jobs.
        total: code rows that were audited.
    """
    if not problems:
        return f"audit: the tests of all {total} code rows fail for programs that do nothing"
    named = [f"row {numbers[index]} ({reason})" for index, reason in list(problems.items())[:3]]
    others = [str(numbers[index]) for index in list(problems)[3:20]]
    more = f"; and rows {', '.join(others)}" if others else ""
    dots = ", ..." if len(problems) > 20 else ""
    start = f"audit: {len(problems)} of {total} code rows left out, their tests are worth no reward"
    return f"{start}: {', '.join(named)}{more}{dots}"
