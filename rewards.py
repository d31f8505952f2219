r"""Verifiers: what turns a completion into a reward. The environment of reinforcement learning with verifiable rewards.

    gsm8k              the last number
    math               the last \boxed{}, else "the answer is ...", else the last formula; math-verify compares
    ifeval             the share of IFEval's instructions followed (ifeval_loose: its loose reading); see ifeval.py
    code, code_stdio   the last ```python block passes all tests, in a sandbox; see sandbox.py
    exact, contains    normalised strings

A verifier is named in a row's column `dataset`, as in the published RLVR data. A new one is a function with a
decorator, here or in a module that the script imports:

    @verifier("polite")
    def polite(completion, ground_truth):
        return "please" in completion

It sees what follows </think>, and is a pure function: the same completion gets the same verdict. Completions come from
a policy that is rewarded for whatever passes, so they are judged in processes that can be killed: see pool.py.

    python rewards.py train.jsonl samples.jsonl     # checks ground truths; scores rows that have a `completion`
"""

import json
import math
import re
import sys
import textwrap
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from typing import NamedTuple

import ifeval
import sandbox

REASONS = ("right", "wrong", "unparsed", "timeout", "crash", "bad_ground_truth")
MATH_TAIL = 4096  # characters at the end of a completion in which a number or a formula is looked for


class Verdict(NamedTuple):
    """`reward`: 0 … 1, times the weights. `reason`: one of REASONS. `answer`: what was judged, or what went wrong."""

    reward: float
    reason: str
    answer: str = ""


class Verifier(NamedTuple):
    """How one name is judged."""

    judge: Callable  # (completion, gold) -> bool or number in 0 … 1, (that, answer), or Verdict
    gold: Callable  # ground truth as in the row -> as `judge` gets it; ValueError if it cannot be one
    seconds: float  # of processor time


VERIFIERS = {}


def verifier(*names: str, gold: Callable = lambda ground_truth: ground_truth, seconds: float = 1.0):
    """Registers a function under these names. An answer of None means that the completion has none: `unparsed`."""

    def register(function):
        VERIFIERS.update({name: Verifier(function, gold, seconds) for name in names})
        return function

    return register


# ---------------------------------------------------------------- the verifiers


def as_text(ground_truth) -> str:
    """A string or number as a string. Raises ValueError for anything else, and for a blank."""
    if isinstance(ground_truth, bool) or not isinstance(ground_truth, (str, int, float)):
        raise ValueError(f"expected a string, found {type(ground_truth).__name__}")
    if not str(ground_truth).strip():
        raise ValueError("empty")
    return str(ground_truth)


NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


def last_number(text: str) -> Decimal | None:
    """The last number, without thousands' commas and currency; units follow it and do not matter."""
    text = text[-MATH_TAIL:].replace("\u2212", "-").replace("{,}", ",").replace(r"\,", "")
    text = re.sub(r"(?<=[a-zA-Z])\^\{?[0-9]\}?", "", text)  # cm^2
    numbers = NUMBER.findall(text)
    return Decimal(re.sub(r"[,$]", "", numbers[-1])) if numbers else None


def gold_number(ground_truth) -> Decimal:
    """The last number of a ground truth, so that whole solutions will do. Raises ValueError if there is none."""
    number = last_number(as_text(ground_truth))
    if number is None:
        raise ValueError(f"no number in {ground_truth!r}")
    return number


@verifier("gsm8k", gold=gold_number)
def gsm8k(completion, gold):
    """Cobbe et al. 2021 (arXiv 2110.14168), as Tülu 3 extracts it: the last number of the completion; if it has a box,
    the last in that."""
    box = last_box(completion[-MATH_TAIL:])
    answer = last_number(box or completion)
    return answer == gold, answer


def last_formula(text: str) -> str | None:
    r"""The final answer, without dollars: of the last \boxed{} if there is one, else after the last "answer is", else
    the last $...$, \(...\) or \[...\]. One answer, so that listing several earns nothing."""
    text = text[-MATH_TAIL:].replace(r"\fbox", r"\boxed")
    if r"\boxed" in text:
        return last_box(text)
    text = re.sub(r"\\[()\[\]]|\$\$", "$", text.replace(r"\$", "\0"))  # one kind of formula; \$ is money
    _, *statements = re.split(r"answer\b[*\s]*(?:is\b(?: therefore| thus)?|:|\n)[:*\s]*", text, flags=re.IGNORECASE)
    if statements:
        formula = re.match(r"\$([^$]+)\$", statements[-1])
        line = re.split(r"\.\s|\.?$", statements[-1], maxsplit=1, flags=re.MULTILINE)[0]
        formula = formula or re.search(r"\$([^$]+)\$", line)
        answer = formula[1] if formula else line.strip().strip("*.")
    else:
        pieces = text.split("$")
        answer = pieces[-2 if len(pieces) % 2 else -3] if len(pieces) > 2 else ""  # whether the last $ opens or closes
        answer = answer.rpartition("=")[2] if answer.count("=") > 1 else answer  # the end of a derivation
    return answer.replace("\0", r"\$").strip() or None


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{...} that is in no other, or the word after a \boxed without braces."""
    content, end = None, 0
    while (start := text.find(r"\boxed", end)) >= 0:
        content, end = argument(text, start + len(r"\boxed"))
    return content


def argument(text: str, start: int) -> tuple[str | None, int]:
    """What a LaTeX command at `start` is applied to, and where that ends. None if there is nothing, or no end of it."""
    opening = re.compile(r"\s*([^\s{}$]*)").match(text, start)
    if opening[1] or not text.startswith("{", opening.end()):
        return opening[1].rstrip(".,") or None, opening.end()
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening.end()):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[opening.end() + 1 : match.start()].strip() or None, match.end()
    return None, len(text)


@lru_cache(256)
def parse_formula(latex: str) -> list:
    """What math-verify compares: an expression of sympy, then the text. Empty if it cannot be read."""
    import math_verify  # half a second; only workers need it

    # What it cannot read: line ends, a full stop, 5,\!525, \$5 and \frac \pi 4 (TeX takes one command for an argument).
    latex = re.sub(r",?\\!|\\\$", "", " ".join(latex.split()).rstrip(". "))
    latex = re.sub(r"\\frac\s*(\\[a-zA-Z]+)", r"\\frac{\1}", latex)
    latex = re.sub(r"√(\w+)", r"\\sqrt{\1}", latex).replace("°", r"^\circ").replace(r"\,", "")
    # As LaTeX only: its other reader would take a number out of the middle of what is no formula. Timed from outside.
    parsed = math_verify.parse(f"${latex}$", [math_verify.LatexExtractionConfig()], parsing_timeout=None)
    return parsed if len(parsed) > 1 else []


def gold_formula(ground_truth) -> list:
    """A ground truth as math-verify has it: a formula, in dollars or not, or a solution. Raises ValueError."""
    text = as_text(ground_truth)
    if re.search(r"\\boxed|(?<!\\)\$", text):  # a solution, or a formula in dollars
        text = last_formula(text) or ""
    formula = parse_formula(text.strip()) if text.strip() else []
    if not formula:
        raise ValueError(f"math-verify cannot read {ground_truth!r}")
    return formula


UNEVALUATED = re.compile(
    r"\\(?:sum|int|prod|lim|max|min|gcd|lcm|det|d?binom|[bp]mod)(?![a-zA-Z])|vmatrix|frac\{d\}\{d[a-z]\}|(?<!\\)!|"
    r"operatorname\{(?:lcm|gcd|max|min)\}"
)
NUMERIC = re.compile(r"-?[0-9.,\s]+")
ARITHMETIC = re.compile(r"[0-9)}]\s*(?:[+*-]|\\cdot|\\times|\\div)\s*[0-9({\\]")
VARIABLE = re.compile(r"\W*\\?[a-zA-Z]\w*(?:\([a-zA-Z]\))?\W*")  # x, \theta, f(x)
WORDS = re.compile(r"\\text\w*\{[^}]*(?:[0-9=,]|\b(?:or|not|and)\b)")


def is_no_answer(answer: str, gold: str) -> bool:
    """What math-verify would take for an answer: several answers, of which it takes one, or the question, which it
    works out. Each only where the gold formula is not of that kind itself."""
    parts = re.split(r"[,;]|\\text|\\quad|\band\b|\bor\b", answer)
    if r"\boxed" in answer or ("=" not in gold and any(part.count("=") > 1 for part in parts)):
        return True  # a box in a box, a chain
    relation = re.match(r"(.*?)(?:=|\\equiv|\\approx|\\ne)", answer)
    if relation and "=" not in gold and not VARIABLE.fullmatch(relation[1]):
        return True  # 5=7
    if WORDS.search(answer) and not re.search(r",|\\cup|\band\b|\bor\b|\\pm|\\text", gold):
        return True  # 5\text{ or 7}
    if re.search(r"_\{?(?!10\b)[0-9]", answer) and not re.search("_|[a-zA-Z]", gold):
        return True  # 5_7
    if UNEVALUATED.search(answer) and not UNEVALUATED.search(gold):
        return True  # \sum_{k=1}^{10} k
    return bool(NUMERIC.fullmatch(gold) and ARITHMETIC.search(answer))  # 123\cdot 456


@verifier("math", gold=gold_formula)
def equal_formulas(completion, gold):
    """Hendrycks et al. 2021 (arXiv 2103.03874): the answer is equal to the gold formula in the eyes of math-verify."""
    import math_verify

    answer = last_formula(completion)
    if answer is None:
        return Verdict(0.0, "unparsed")
    wrapped = r"boxed|text" if NUMERIC.fullmatch(gold[-1]) else "boxed"
    answer = re.sub(rf"^\\(?:{wrapped})\{{([^{{}}]*)\}}$|^\\approx", r"\1", answer).strip()
    if is_no_answer(answer, gold[-1]):
        return False, answer
    formula = parse_formula(answer)
    if not formula:
        return Verdict(0.0, "unparsed", answer)
    return math_verify.verify(gold, formula, timeout_seconds=None), answer


@verifier("ifeval", gold=ifeval.parse)
def follows_instructions(completion, instructions, loose=False):
    """Zhou et al. 2023 (arXiv 2311.07911): the share of instructions followed, as OLMo 3 rewards it."""
    if not any(map(str.isalnum, completion)):
        return Verdict(0.0, "unparsed")  # an invisible character would follow every "do not"
    followed = ifeval.check(completion, instructions, loose)
    missed = [name for (name, _), right in zip(instructions, followed, strict=True) if not right]
    return sum(followed) / len(followed), f"not followed: {', '.join(missed)}" if missed else "all followed"


@verifier("ifeval_loose", gold=ifeval.parse)
def loosely_follows_instructions(completion, instructions):
    """The same by IFEval's loose reading: a first or last line, or asterisks, may be left out."""
    return follows_instructions(completion, instructions, loose=True)


def normalised(text) -> str:
    """Case, spacing and width of characters do not matter, nor quotes and punctuation at the ends."""
    text = unicodedata.normalize("NFKC", as_text(text)).casefold()
    return re.sub(r"^(?:[ ,;:!?'\"`*“”‘’]|\.(?![0-9]))+", "", " ".join(text.split())).rstrip(" .,;:!?'\"`*“”‘’")


def gold_string(ground_truth) -> str:
    """A ground truth, normalised. Raises ValueError if nothing is left of it."""
    if not normalised(ground_truth):
        raise ValueError(f"nothing to compare with in {ground_truth!r}")
    return normalised(ground_truth)


@verifier("exact", gold=gold_string)
def exact(completion, gold):
    """The whole completion, normalised, is the ground truth, normalised."""
    return bool(completion.strip()) and normalised(completion) == gold, completion.strip()[:200] or None


def words(text: str) -> str:
    """Words, numbers and signs with spaces between, so that a search finds whole ones only."""
    number = r"(?:(?<![\w)])-)?(?:[0-9]+(?:[.,/][0-9]+)*|\.[0-9]+)"
    return " " + " ".join(re.findall(rf"{number}|[^\W0-9]+|[^\w\s]", text)) + " "


@verifier("contains", gold=lambda given: [gold_string(one) for one in (given if isinstance(given, list) else [given])])
def contains(completion, gold):
    """Every one of the given strings is in the completion, as whole words and numbers (5 is not in 15)."""
    text = words(normalised(completion)) if completion.strip() else ""
    missing = [one for one in gold if words(one) not in text]
    return not missing, f"missing: {', '.join(missing)}" if missing else "all there"


class Tests(NamedTuple):
    """Of a program: `cases` of (stdin, stdout), or `pieces` of Python that use `names` of the program."""

    cases: list
    pieces: list
    names: list


def parse_tests(ground_truth) -> Tests:
    """Published forms: a list of asserts (or longer pieces of Python), or of {"input", "output"}; or, to name what the
    program has to define, {"tests": ..., "entry_point": ...}. Each may be a JSON string. Raises ValueError."""
    given = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    entry_points = []
    if isinstance(given, dict):
        entry_points = given.get("entry_point") or []
        entry_points = [entry_points] if isinstance(entry_points, str) else entry_points
        given = given.get("tests")
    tests = [given] if isinstance(given, str) else given
    if not tests or not isinstance(tests, list):
        raise ValueError("no tests; expected a list of Python strings, or of {input, output}")
    if all(isinstance(test, dict) for test in tests):
        for number, test in enumerate(tests, 1):
            if not isinstance(test.get("input"), str) or not isinstance(test.get("output"), str):
                raise ValueError(f"test {number} needs the strings `input` and `output`")
        return Tests([(test["input"], test["output"]) for test in tests], [], [])
    if not all(isinstance(test, str) for test in tests):
        raise ValueError("tests of several kinds; expected Python strings, or {input, output}")
    try:
        names, imports = sandbox.free_names(tests, entry_points)
    except SyntaxError as error:
        raise ValueError(f"a test is not Python: {error}") from None
    if not names:
        raise ValueError("the tests use no name that a program could define (`entry_point` gives a built-in one)")
    return Tests([], imports + tests, names)


def code_blocks(completion: str) -> list[tuple[str, str]]:
    """[(language, code), ...] of the closed blocks between fences of ``` or ~~~ that begin a line."""
    blocks, fence, language, lines = [], None, "", []
    for line in completion.splitlines(keepends=True):
        marks = re.match(r"\s*(`{3,}|~{3,})[ \t]*([\w.+-]*)", line)
        if fence is None and marks:
            fence, language, lines = marks[1], marks[2].lower(), []
        elif fence is not None and marks and marks[1].startswith(fence) and not marks[2]:
            blocks.append((language, textwrap.dedent("".join(lines))))
            fence = None
        elif fence is not None:
            lines.append(line)
    return blocks


def last_program(completion: str, names: list[str]) -> str | None:
    """The last ```python block, of those that define one of the names if there are such; else the last without a
    language."""
    blocks = code_blocks(completion)
    labelled = [code for language, code in blocks if language.startswith("py")]
    defining = [code for code in labelled if any(re.search(rf"\b{re.escape(name)}\b", code) for name in names)]
    defining = [code for code in defining if re.search(r"^\s*(?:async )?(?:def|class)\b|^\w+ *=", code, re.MULTILINE)]
    return (defining or labelled or [code for language, code in blocks if not language] or [None])[-1]


def same_output(printed: str, expected: str) -> bool:
    """Line by line, whatever the spacing."""
    return [line.split() for line in printed.strip().splitlines()] == [
        line.split() for line in expected.strip().splitlines()
    ]


SANDBOX = "full"  # the level; a pool sets it in its workers
CODE_SECONDS = 20  # on the clock, for all tests of a program that reads stdin; a first failure ends them


@verifier("code", "code_stdio", gold=parse_tests, seconds=15)
def passes_tests(completion, tests):
    """1 if the program passes all tests, else 0: what a program does wrong, too slowly or fatally is wrong."""
    program = last_program(completion, tests.names)
    if program is None:
        return Verdict(0.0, "unparsed")
    if tests.pieces:
        error = sandbox.test(program, tests.pieces, tests.names, SANDBOX)
        return error is None, error or "all tests passed"
    start = time.monotonic()
    for number, (stdin, expected) in enumerate(tests.cases, 1):
        # Output longer than the right one is wrong without reading on.
        printed, error = sandbox.run(program, stdin, len(expected.encode()) + 4096, SANDBOX)
        if error is None and not same_output(printed, expected):
            error = f"printed {printed.strip()[:100]!r}"
        if error is None and time.monotonic() - start > CODE_SECONDS:
            error = f"more than {CODE_SECONDS} s for all tests"
        if error:
            return False, f"test {number} of {len(tests.cases)}: {error}"
    return True, "all tests passed"


# ---------------------------------------------------------------- one verdict


def after_thinking(completion: str) -> str:
    """What follows the last </think>. A thought that never ends has no answer."""
    thought, end, answer = completion.rpartition("</think>")
    return answer.lstrip() if end else "" if completion.lstrip().startswith("<think>") else completion


def judge(name: str, completion: str | None, ground_truth) -> Verdict:
    """One verdict, in this process and without limits: for text that you trust. None judges the ground truth alone.

    Nothing is raised: an exception of the verifier's is the reason `crash`.
    """
    verifier = VERIFIERS[name]
    try:
        gold = verifier.gold(ground_truth)
    except Exception as error:
        return Verdict(0.0, "bad_ground_truth", str(error)[:200])
    if completion is None:
        return Verdict(0.0, "right")
    try:
        verdict = verifier.judge(after_thinking(completion), gold)
        reward, answer = verdict if isinstance(verdict, tuple) and len(verdict) == 2 else (verdict, "")
        if answer is None:
            verdict = Verdict(0.0, "unparsed")
        elif not isinstance(reward, Verdict):
            verdict = Verdict(float(reward), "right" if reward == 1 else "wrong", str(answer))
        if not 0 <= verdict.reward <= 1 or verdict.reason not in REASONS:
            raise ValueError(f"a verdict of {verdict.reward!r}, {verdict.reason!r}")
        shown = "".join(c if c.isprintable() else " " for c in verdict.answer[:200])  # terminals obey some characters
        return verdict._replace(answer=shown)
    except Exception as error:  # MemoryError and RecursionError too
        return Verdict(0.0, "crash", f"{type(error).__name__}: {error}"[:200])


def read_jobs(path: str, pool) -> list[tuple]:
    """The jobs that the rows of a file are, checked; some without a completion. Raises DataError."""
    from common import DataError, read_rows  # not at the top: workers import this file

    numbers, jobs = [], []
    for number, row in read_rows(path):
        try:
            jobs.append((row["dataset"], row.get("completion"), row["ground_truth"], row.get("weights")))
        except KeyError as missing:
            raise DataError(path, number, f"no field {missing}") from None
        numbers.append(number)
    for index, message in pool.check(jobs).items():
        raise DataError(path, numbers[index], message)
    return jobs


def summary(verdicts: list[Verdict]) -> str:
    """One line."""
    counts = Counter(verdict.reason for verdict in verdicts)
    mean = math.fsum(verdict.reward for verdict in verdicts) / len(verdicts)
    reasons = ", ".join(f"{counts[reason]} {reason}" for reason in REASONS if counts[reason])
    return f"{len(verdicts)} completions, mean reward {mean:.4f}: {reasons}"


def main(paths: list[str]):
    """Checks the ground truths of files, and scores their completions. Raises RunError for bad input."""
    from pool import Pool

    with Pool() as pool:
        for path in paths:
            jobs = read_jobs(path, pool)
            print(f"{path}: {len(jobs)} ground truths")
            if completed := [job for job in jobs if job[1] is not None]:
                print(f"  {summary(pool.score(completed))}")


if __name__ == "__main__":
    import rewards  # so that the verifiers belong to a module that workers can import
    from common import RunError

    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python rewards.py FILE...  Rows: `dataset`, `ground_truth`, perhaps `completion`")
    try:
        rewards.main(sys.argv[1:])
    except RunError as error:
        sys.exit(f"error: {error}")
