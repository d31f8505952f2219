r"""Verifiers of numbers and formulas.

    gsm8k    the last number
    math     the last \boxed{}, else "the answer is ...", else the last formula; math-verify compares
"""

import re
from decimal import Decimal
from functools import lru_cache

from rewards.verifiers import Verdict, as_text, verifier

TAIL = 4096  # characters at the end of a completion in which a number or a formula is looked for


# ---------------------------------------------------------------- gsm8k: numbers


NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


def last_number(text: str) -> Decimal | None:
    """The last number, without thousands' commas and currency; units follow it and do not matter."""
    text = text[-TAIL:]
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
    box = last_box(completion[-TAIL:])
    answer = last_number(box or completion)
    return answer == gold, answer


# ---------------------------------------------------------------- math: formulas


def last_formula(text: str) -> str | None:
    r"""The final answer, without dollars: of the last \boxed{} if there is one, else after the last "answer is", else
    the last $...$, \(...\) or \[...\]. One answer, so that listing several earns nothing."""
    text = text[-TAIL:].replace(r"\fbox", r"\boxed")
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
