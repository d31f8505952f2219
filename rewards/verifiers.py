r"""Verifiers: is a completion right? Each is a pure function: the same completion gets the same verdict.

    gsm8k              the last number
    math               the last \boxed{}, else "the answer is ...", else the last formula; math-verify compares
    ifeval             the share of IFEval's instructions followed (ifeval_loose: its loose reading); see ifeval.py
    code, code_stdio   the last ```python block passes all tests, in a sandbox; see sandbox.py
    exact, contains    normalised strings

A verifier is named in a row's column `dataset`, as in the published RLVR data. A new one is a function with a
decorator, here or in a module that the script imports:

    from rewards import verifier

    @verifier("polite")
    def polite(completion, ground_truth):
        return "please" in completion

It sees what follows </think>. Completions come from a policy that is rewarded for whatever passes, so they are judged
in processes that can be killed: see pool.py.
"""

import json
import re
import textwrap
import time
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from typing import NamedTuple

from rewards import ifeval, sandbox

REASONS = ("right", "wrong", "unparsed", "timeout", "crash", "bad_ground_truth")  # the most serious last
MATH_TAIL = 4096  # characters at the end of a completion in which a number or a formula is looked for
CODE_SECONDS = 20  # on the clock, for all tests of a program that reads stdin; a first failure ends them
SANDBOX = "full"  # the level that programs run at; a pool sets it in its workers


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
    """Decorator that registers a function as a verifier.

    Args:
        names: that rows have in the column `dataset`.
        gold: makes of a row's ground truth what the function gets. A ValueError says that the ground truth is bad.
        seconds: of processor time that one verdict may take.

    Returns:
        The decorator. It returns the function (completion, gold) as it is. That one may return a bool, a number from 0
        to 1, a pair of either and the answer (None: the completion has no answer, `unparsed`), or a Verdict.
    """

    def register(function):
        for name in names:
            VERIFIERS[name] = Verifier(function, gold, seconds)
        return function

    return register


def registered_name(name: str) -> str | None:
    """The verifier that a row names, whatever the case ("MATH" in Tülu 3's rows); None if there is none."""
    return next((known for known in VERIFIERS if known.lower() == str(name).lower()), None)


# ---------------------------------------------------------------- one verdict


def judge(name: str, completion: str | None, ground_truth) -> Verdict:
    """One verdict, in this process and without limits: for text that you trust.

    Args:
        name: of a verifier. A KeyError if there is none.
        completion: the policy's text; None to look at the ground truth alone.
        ground_truth: as in the row.

    Returns:
        A Verdict. Nothing else is raised: an exception of the verifier's is the reason `crash`.
    """
    entry = VERIFIERS[registered_name(name)]
    try:
        gold = entry.gold(ground_truth)
    except Exception as error:
        return Verdict(0.0, "bad_ground_truth", str(error)[:200])
    if completion is None:
        return Verdict(0.0, "right")
    try:
        verdict = as_verdict(entry.judge(after_thinking(completion), gold))
        return verdict._replace(answer=printable(verdict.answer[:200]))
    except Exception as error:  # MemoryError and RecursionError too
        return Verdict(0.0, "crash", f"{type(error).__name__}: {error}"[:200])


def as_verdict(returned) -> Verdict:
    """What a verifier's function has returned, as a Verdict. Raises ValueError or TypeError if it cannot be one."""
    if isinstance(returned, Verdict):
        verdict = returned
    else:
        is_pair = isinstance(returned, tuple) and len(returned) == 2
        reward, answer = returned if is_pair else (returned, "")
        if answer is None:
            return Verdict(0.0, "unparsed")
        reason = "right" if reward == 1 else "wrong"
        verdict = Verdict(float(reward), reason, str(answer))
    if not 0 <= verdict.reward <= 1 or verdict.reason not in REASONS:
        raise ValueError(f"a verdict of {verdict.reward!r}, {verdict.reason!r}")
    return verdict


def after_thinking(completion: str) -> str:
    """What follows the last </think>. A thought that never ends has no answer."""
    _, end, answer = completion.rpartition("</think>")
    if end:
        return answer.lstrip()
    if completion.lstrip().startswith("<think>"):
        return ""
    return completion


def printable(text: str) -> str:
    """Spaces for the characters that cannot be printed: terminals obey some of them."""
    return "".join(character if character.isprintable() else " " for character in text)


# ---------------------------------------------------------------- gsm8k: numbers


def as_text(ground_truth) -> str:
    """A string or number as a string. Raises ValueError for anything else, and for a blank."""
    if isinstance(ground_truth, bool) or not isinstance(ground_truth, (str, int, float)):
        raise ValueError(f"expected a string, found {type(ground_truth).__name__}")
    text = str(ground_truth)
    if not text.strip():
        raise ValueError("empty")
    return text


NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


def last_number(text: str) -> Decimal | None:
    """The last number, without thousands' commas and currency; units follow it and do not matter."""
    text = text[-MATH_TAIL:]
    text = text.replace("\u2212", "-")  # the minus sign
    text = text.replace("{,}", ",").replace(r"\,", "")  # thousands in LaTeX
    text = re.sub(r"(?<=[a-zA-Z])\^\{?[0-9]\}?", "", text)  # cm^2
    numbers = NUMBER.findall(text)
    if not numbers:
        return None
    return Decimal(re.sub(r"[,$]", "", numbers[-1]))


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


# ---------------------------------------------------------------- math: formulas


def last_formula(text: str) -> str | None:
    r"""The final answer, without dollars: of the last \boxed{} if there is one, else after the last "answer is", else
    the last $...$, \(...\) or \[...\]. One answer, so that listing several earns nothing."""
    text = text[-MATH_TAIL:].replace(r"\fbox", r"\boxed")
    if r"\boxed" in text:
        return last_box(text)
    text = text.replace(r"\$", "\0")  # money, which opens no formula
    text = re.sub(r"\\[()\[\]]|\$\$", "$", text)  # one kind of formula
    _, *statements = re.split(r"answer\b[*\s]*(?:is\b(?: therefore| thus)?|:|\n)[:*\s]*", text, flags=re.IGNORECASE)
    answer = stated_answer(statements[-1]) if statements else last_in_dollars(text)
    return answer.replace("\0", r"\$").strip() or None


def stated_answer(text: str) -> str:
    """Of what follows "the answer is": the formula it begins with, else the first in its line, else that line."""
    formula = re.match(r"\$([^$]+)\$", text)
    if formula:
        return formula[1]
    line = re.split(r"\.\s|\.?$", text, maxsplit=1, flags=re.MULTILINE)[0]
    formula = re.search(r"\$([^$]+)\$", line)
    if formula:
        return formula[1]
    return line.strip().strip("*.")


def last_in_dollars(text: str) -> str:
    """The last $...$, or the end of it if it is a derivation; empty if there is none."""
    pieces = text.split("$")
    if len(pieces) < 3:
        return ""
    last_is_closed = len(pieces) % 2 == 1
    answer = pieces[-2] if last_is_closed else pieces[-3]
    if answer.count("=") > 1:
        return answer.rpartition("=")[2]
    return answer


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{...} that is in no other, or the word after a \boxed without braces."""
    content = None
    start = text.find(r"\boxed")
    while start >= 0:
        content, end = argument(text, start + len(r"\boxed"))
        start = text.find(r"\boxed", end)
    return content


def argument(text: str, start: int) -> tuple[str | None, int]:
    """What a LaTeX command at `start` is applied to, and where that ends. None if there is nothing, or no end of it."""
    word = re.compile(r"\s*([^\s{}$]*)").match(text, start)
    if word[1] or not text.startswith("{", word.end()):
        return word[1].rstrip(".,") or None, word.end()
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, word.end()):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
        if depth == 0:
            content = text[word.end() + 1 : match.start()].strip()
            return content or None, match.end()
    return None, len(text)


@lru_cache(256)
def parse_formula(latex: str) -> list:
    """What math-verify compares: an expression of sympy, then the text. Empty if it cannot be read."""
    import math_verify  # half a second; only workers need it

    # What it cannot read: line ends, a full stop, 5,\!525, \$5 and \frac \pi 4 (TeX takes one command for an argument).
    latex = " ".join(latex.split()).rstrip(". ")
    latex = re.sub(r",?\\!|\\\$", "", latex)
    latex = re.sub(r"\\frac\s*(\\[a-zA-Z]+)", r"\\frac{\1}", latex)
    latex = re.sub(r"√(\w+)", r"\\sqrt{\1}", latex)
    latex = latex.replace("°", r"^\circ").replace(r"\,", "")
    # As LaTeX only: its other reader would take a number out of the middle of what is no formula. Timed from outside.
    parsed = math_verify.parse(f"${latex}$", [math_verify.LatexExtractionConfig()], parsing_timeout=None)
    return parsed if len(parsed) > 1 else []


def gold_formula(ground_truth) -> list:
    """A ground truth as math-verify has it: a formula, in dollars or not, or a solution. Raises ValueError."""
    text = as_text(ground_truth)
    if re.search(r"\\boxed|(?<!\\)\$", text):  # a solution, or a formula in dollars
        text = last_formula(text) or ""
    text = text.strip()
    formula = parse_formula(text) if text else []
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
    if r"\boxed" in answer:
        return True  # a box in a box
    if "=" not in gold:
        parts = re.split(r"[,;]|\\text|\\quad|\band\b|\bor\b", answer)
        if any(part.count("=") > 1 for part in parts):
            return True  # a chain: x=4=5
        relation = re.match(r"(.*?)(?:=|\\equiv|\\approx|\\ne)", answer)
        if relation and not VARIABLE.fullmatch(relation[1]):
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


# ---------------------------------------------------------------- ifeval: instructions


@verifier("ifeval", gold=ifeval.parse)
def follows_instructions(completion, instructions, loose=False):
    """Zhou et al. 2023 (arXiv 2311.07911): the share of instructions followed, as OLMo 3 rewards it."""
    if not any(map(str.isalnum, completion)):
        return Verdict(0.0, "unparsed")  # an invisible character would follow every "do not"
    followed = ifeval.check(completion, instructions, loose)
    missed = [name for (name, _), right in zip(instructions, followed, strict=True) if not right]
    share = sum(followed) / len(followed)
    if missed:
        return share, f"not followed: {', '.join(missed)}"
    return share, "all followed"


@verifier("ifeval_loose", gold=ifeval.parse)
def loosely_follows_instructions(completion, instructions):
    """The same by IFEval's loose reading: a first or last line, or asterisks, may be left out."""
    return follows_instructions(completion, instructions, loose=True)


# ---------------------------------------------------------------- exact, contains: strings


def normalised(text) -> str:
    """Case, spacing and width of characters do not matter, nor quotes and punctuation at the ends."""
    text = unicodedata.normalize("NFKC", as_text(text)).casefold()
    text = " ".join(text.split())
    text = re.sub(r"^(?:[ ,;:!?'\"`*“”‘’]|\.(?![0-9]))+", "", text)  # but not the full stop of .5
    return text.rstrip(" .,;:!?'\"`*“”‘’")


def gold_string(ground_truth) -> str:
    """A ground truth, normalised. Raises ValueError if nothing is left of it."""
    text = normalised(ground_truth)
    if not text:
        raise ValueError(f"nothing to compare with in {ground_truth!r}")
    return text


def gold_strings(ground_truth) -> list[str]:
    """A string or a list of strings, normalised. Raises ValueError if nothing is left of one."""
    given = ground_truth if isinstance(ground_truth, list) else [ground_truth]
    return [gold_string(one) for one in given]


@verifier("exact", gold=gold_string)
def exact(completion, gold):
    """The whole completion, normalised, is the ground truth, normalised."""
    answer = completion.strip()
    if not answer:
        return False, None
    return normalised(completion) == gold, answer[:200]


def words(text: str) -> str:
    """Words, numbers and signs with spaces between, so that a search finds whole ones only."""
    number = r"(?:(?<![\w)])-)?(?:[0-9]+(?:[.,/][0-9]+)*|\.[0-9]+)"
    found = re.findall(rf"{number}|[^\W0-9]+|[^\w\s]", text)
    return " " + " ".join(found) + " "


@verifier("contains", gold=gold_strings)
def contains(completion, gold):
    """Every one of the given strings is in the completion, as whole words and numbers (5 is not in 15)."""
    text = words(normalised(completion)) if completion.strip() else ""
    missing = [one for one in gold if words(one) not in text]
    if missing:
        return False, f"missing: {', '.join(missing)}"
    return True, "all there"


# ---------------------------------------------------------------- code: programs


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
        error = sandbox.test(program, tests.pieces, tests.names, SANDBOX)
    else:
        error = first_failure(program, tests.cases)
    return error is None, error or "all tests passed"


def first_failure(program: str, cases: list[tuple[str, str]]) -> str | None:
    """What a program that reads stdin gets wrong in the first of the cases that it fails; None if it passes all."""
    start = time.monotonic()
    for number, (stdin, expected) in enumerate(cases, 1):
        max_output = len(expected.encode()) + 4096  # output longer than the right one is wrong without reading on
        printed, error = sandbox.run(program, stdin, max_output, SANDBOX)
        if error is None and not same_output(printed, expected):
            error = f"printed {printed.strip()[:100]!r}"
        if error is None and time.monotonic() - start > CODE_SECONDS:
            error = f"more than {CODE_SECONDS} s for all tests"
        if error:
            return f"test {number} of {len(cases)}: {error}"
    return None


def same_output(printed: str, expected: str) -> bool:
    """Line by line, whatever the spacing."""
    printed_lines = [line.split() for line in printed.strip().splitlines()]
    expected_lines = [line.split() for line in expected.strip().splitlines()]
    return printed_lines == expected_lines
