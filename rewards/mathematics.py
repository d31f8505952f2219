r"""Verifiers of numbers and formulas.

    gsm8k    the number in the last \boxed{}, else behind the last "####" or "the answer is", else the last number
    math     the last \boxed{}, else "the answer is ...", else the last formula; math-verify compares

math-verify reads LaTeX and decides whether two formulas are equal. What is not part of the value is taken off before
(a name and "=", a unit, the letter of a choice, the base of a number): math-verify drops some of it unseen and reads
the rest as variables. And an answer that only repeats the task is refused, since math-verify would work it out.
"""

import re
import unicodedata
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from rewards.verifiers import Verdict, as_text, verifier

TAIL = 4096  # characters at the end of a completion in which a number or a formula is looked for


# ---------------------------------------------------------------- characters


SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "’": "'", "°": r"^\circ ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ",
    "±": r"\pm ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "≡": r"\equiv ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "∠": r"\angle ",
    "→": r"\to ", "⇒": r"\implies ", "∧": r"\land ", "∨": r"\lor ", "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "γ": r"\gamma ", "λ": r"\lambda ", "φ": r"\phi ", "ω": r"\omega ", "√": r"\sqrt ",
})  # fmt: skip


def as_latex(text: str) -> str:
    """Unicode's mathematical characters as LaTeX; full-width digits, and those of other scripts, as 0 … 9."""
    if text.isascii():
        return text
    text = re.sub("[\u00b2\u00b3\u00b9\u2070-\u207f]+", lambda match: f"^{{{plain(match[0])}}}", text)  # x²
    text = re.sub("[\u2080-\u208e]+", lambda match: f"_{{{plain(match[0])}}}", text)  # x₂
    text = re.sub(r"√(\w+)", r"\\sqrt{\1}", text)
    text = re.sub("[\u00bc-\u00be\u2150-\u215e]", lambda match: f" {plain(match[0])}", text)  # 2½ is not 21/2
    return plain(re.sub("(?<![0-9])([0-9]+)\u2044([0-9]+)", r"\\frac{\1}{\2}", text.translate(SYMBOLS)))


def plain(text: str) -> str:
    """The same characters without their width and height."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-")
    return "".join(str(unicodedata.decimal(character, character)) for character in text)


# ---------------------------------------------------------------- gsm8k: numbers


INTEGER = (
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])"  # 12,345
    r"|[1-9][0-9]{0,2}(?:[ '][0-9]{3})+(?![0-9])"  # 12 345 and 12'345
    r"|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?![0-9])"  # 1,23,456 in India
    r"|[0-9]+)"
)
NUMBER = re.compile(
    r"(?P<minus>(?:(?<![\w)])-)?)\$?(?:"
    r"(?:(?P<whole>[0-9]+)(?: and)? +)?(?P<numerator>[0-9]+)/(?P<denominator>[1-9][0-9]*)(?![0-9/])"  # 1/2 and 2 1/2
    r"|(?P<comma>(?<![0-9],)(?:[0-9]{1,3}(?:\.[0-9]{3})+|[0-9]+),[0-9]{1,2})(?![0-9,])"  # 12,5 and 1.234,50
    rf"|(?P<decimal>{INTEGER}(?:\.[0-9]+)?|\.[0-9]+))"
    r"(?:(?:[eE]|\s*(?:[x*]|\\times|\\cdot)\s*10\^)\{?(?P<exponent>[+-]?[0-9]{1,2})(?![0-9])\}?)?"  # e3, x 10^3
    r"(?:\s*(?P<scale>thousand|million|billion|trillion)\b)?"
)
SCALES = {None: 1, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
ANSWER_IS = (
    r"(?:\b(?:answer|antwort|respuesta|resposta|réponse|risposta|ответ)\b|答案|答え|답)[*\s]*"
    r"(?:is\b(?: therefore| thus| about| approximately)?|(?:ist|es|est|è|é)\b|[是は은는:=]|\n)"
)
OR = r"\b(?:or|oder|ou|o|или)\b|或|または|또는"
STATEMENT = re.compile(
    rf"(?:^####|^A:|{ANSWER_IS})"
    r"[\s:*~]*(?:\\?[(\[])?(?:\$?[a-zA-Z]\w{0,20} ?= ?)?",
    re.IGNORECASE | re.MULTILINE,
)
REASON = re.compile(r"\b(?:because|since|as|so|which|where|when|after)\b| \((?!or\b)(?=[a-z]{2})")  # a new clause
LABEL = re.compile(r"\b(?:step|part|equation|line|note|example|question|problem|not)s? \(?[0-9]+", re.IGNORECASE)


def value(number: re.Match) -> Fraction:
    """The value of a match of NUMBER."""
    if number["denominator"]:
        amount = int(number["whole"] or 0) + Fraction(int(number["numerator"]), int(number["denominator"]))
    elif number["comma"]:
        amount = Fraction(number["comma"].replace(".", "").replace(",", "."))
    else:
        amount = Fraction(re.sub(r"[, ']", "", number["decimal"]))
    amount *= SCALES[number["scale"]] * Fraction(10) ** int(number["exponent"] or 0)
    return -amount if number["minus"] else amount


def final_numbers(text: str) -> list[Fraction]:
    """The number a text ends with, without thousands' separators, currency and units. Several if it leaves open which;
    none if there is none."""
    text = as_latex(text[-TAIL:])
    box = last_box(text)
    text = readable_numbers(box or text)
    if box:
        return [value(number) for number in NUMBER.finditer(text.rpartition("=")[2])]
    for statement in reversed(list(STATEMENT.finditer(text))):
        number = NUMBER.match(text, statement.end())
        is_first = text.endswith(("\n", "# "), 0, statement.end())
        if number and not (is_first and re.match(r"[.)] +[a-zA-Z]", text[number.end() :])):  # 1. First we
            return stated_numbers(text, number)
    numbers = list(NUMBER.finditer(LABEL.sub(" ", text))) or list(NUMBER.finditer(text))
    values = [value(number) for number in numbers[-2:]]
    if len(values) == 2:
        between = text_between(*numbers[-2:])
        is_range = re.fullmatch(" *- *", between) and values[0] < values[1]  # 17-18; but 10-5 ends with 5
        if is_range or re.fullmatch(rf" *(?:{OR}) *", between):  # 17 or 18
            return values
    return values[-1:]


def text_between(first: re.Match, second: re.Match) -> str:
    """What stands between two matches in one text."""
    return first.string[first.end() : second.start()]


def stated_numbers(text: str, number: re.Match) -> list[Fraction]:
    """The number behind "the answer is": that one, unless it begins a calculation or a list."""
    sentence = re.split(r"\n|\.\s|。", text[number.end() :], maxsplit=1)[0]
    sentence = re.split(rf"{REASON.pattern}|\((?!or\b)", sentence, maxsplit=1)[0]
    others = [value(other) for other in NUMBER.finditer(sentence.rpartition("=")[2])]
    if "=" in sentence:  # 3 * 6 = 18
        return others[:1]
    if re.match(r"\s*(?:[-+*/^x]|\\times|\\cdot|\\div|times|plus|minus)\s*[$(]*[0-9.]", sentence):
        return []  # 3 * 6
    if re.search(OR, sentence) or re.fullmatch(r"[\s,;&0-9.$]*(?:and)?[\s0-9.$]*", sentence):
        return [value(number), *others]
    return [value(number)]


def readable_numbers(text: str) -> str:
    """Without what looks like a number and is none: the exponents of units, minutes. Fractions of LaTeX as 1/2."""
    text = text.replace("{,}", ",")
    text = re.sub(r"(?<![0-9])([0-9]{1,2}):00(?![0-9])", r"\1", text)  # 5:00 p.m.
    text = re.sub(r"(?<![0-9:])[0-9]{1,2}:[0-5][0-9](?![0-9:])", "", text)
    text = re.sub(r"(?<![0-9)] )\b(?:minus|negative) (?=\$?[0-9])", "-", text)
    if "\\" in text:
        text = text.replace(r"\,", "").replace(r"\!", "").replace(r"\$", "$")
        text = re.sub(r"\\[dt]?frac\s*(?:\{(-?[0-9]+)\}|([0-9]))\s*(?:\{([0-9]+)\}|([0-9]))", r" \1\2/\3\4", text)
    if "^" in text:
        text = re.sub(r"(?<=[a-zA-Z])(\}?)\^\{?[0-9]\}?", r"\1", text)  # cm^2, \text{ cm}^2
    return re.sub(r"([0-9] ?(?:[kcmd]?m|ft|in|yd|mi))[23](?!\.?[0-9])", r"\1", text)  # 18 m2


def gold_number(ground_truth) -> Fraction:
    """The number a ground truth ends with, so that whole solutions will do. Raises ValueError if there is none."""
    numbers = final_numbers(as_text(ground_truth))
    if len(numbers) != 1:
        raise ValueError(f"no number in {ground_truth!r}" if not numbers else f"several numbers in {ground_truth!r}")
    return numbers[0]


@verifier("gsm8k", gold=gold_number)
def gsm8k(completion, gold):
    """Cobbe et al. 2021 (arXiv 2110.14168): the number in the last box; else the one stated behind the data set's
    "####" or "the answer is"; else, as Tülu 3 has it, the last number."""
    numbers = final_numbers(completion)
    answer = ", ".join(map(str, numbers)) or None
    return numbers == [gold], answer


# ---------------------------------------------------------------- math: formulas


def last_formula(text: str) -> str | None:
    r"""The final answer, without dollars: of the last \boxed{} if there is one, else after the last "answer is", else
    the last $...$, \(...\) or \[...\]. One answer, so that listing several earns nothing."""
    text = re.sub(r"\\f(?:rame)?box(?![a-zA-Z])", r"\\boxed", text[-TAIL:])
    if r"\boxed" in text:
        return last_box(text)
    text = text.replace(r"\$", "\0")  # money, which opens no formula
    text = re.sub(r"\\[()\[\]]|\$\$", "$", text)  # one kind of formula
    _, *statements = re.split(rf"(?:{ANSWER_IS}|<answer>)[:*\s]*", text, flags=re.IGNORECASE)
    answer = stated_answer(statements[-1]) if statements else last_in_dollars(text)
    return answer.replace("\0", r"\$").strip() or None


# Or what follows the formula in Chinese, Japanese and Korean, where no space does.
LINE_END = re.compile(rf"\.\s|\.?$|(?!{OR})[\u3000-\u9fff\uac00-\ud7a3]|</answer>", re.MULTILINE)


def stated_answer(text: str) -> str:
    """Of what follows "the answer is": the formula it begins with, else the first in its line, else that line."""
    formula = re.match(r"\$([^$]+)\$", text)
    if formula:
        return formula[1]
    line = LINE_END.split(text, maxsplit=1)[0]
    line = REASON.split(line, maxsplit=1)[0].rstrip(" ,") or line
    formula = re.search(r"\$([^$]+)\$", line)
    if formula:
        return formula[1]
    return line.strip().strip("*.`\"'")


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


# ---------------------------------------------------------------- math: one way to write it


def as_fraction(number: Fraction) -> str:
    """LaTeX of it."""
    return str(number) if number.denominator == 1 else rf"\frac{{{number.numerator}}}{{{number.denominator}}}"


def mixed_number(match: re.Match) -> str:
    r"""LaTeX of 2 1/2 and 2\frac{1}{2}."""
    whole, numerator, denominator = (int(digits) for digits in match.groups() if digits)
    return as_fraction(whole + Fraction(numerator, denominator)) if denominator else match[0]


def power_of_ten(match: re.Match) -> str:
    r"""LaTeX of 1.5\times 10^3."""
    return as_fraction(Fraction(match[1]) * Fraction(10) ** int(match[2]))


def scaled(match: re.Match) -> str:
    """LaTeX of 1.5 million."""
    return as_fraction(Fraction(match[1]) * SCALES[match[3]]) + (match[2] or "")


TIDY = [
    (r"\s+|~|(?<!\\)\\[;: ]", " "),
    (r"(?:, ?)?(?<!\\)\\! ?|(?<!\\)\\,", ""),
    (r"^(-?)\\\$ ?(-?[0-9.,]+)$", r"\1\2\\text{ dollars}"),
    (r"\\?[$€£¥¢₹]|(?<!\\)\\[()\[\]]|\\displaystyle(?![a-zA-Z])|\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])", ""),
    (
        r"\\(?:text(?:bf|it|rm|normal)|mbox|math(?:rm|bf|it|sf)|boldsymbol|bm|emph|underline)(?![a-zA-Z])\s*|\\text\s+",
        r"\\text",
    ),
    (r"\{\\rm ([^{}]*)\}", r"\\text{\1}"),
    (r"\\(?:text)?color *\{[^{}]*\}|\\(?:bf|it|rm|small|large|Large|LARGE|huge|Huge)(?![a-zA-Z]) *", ""),
    (r"^\{([^{}]*)\}$", r"\1"),
    (r"(?i)^\\text\{ *(?:(?:the )?(?:final |correct )?answer(?: is|:)|option|choice) +(?=[^ }])", r"\\text{"),
    (r"^\\text\{ *([a-zA-Z][^{}=]*)=([^{}]*)\}", r"\\text{\1}=\2"),  # \text{Area = 12 cm}^2
    (r"^\\text\{[^{}0-9]*\bis (?=[-(.0-9])([^{}]*)\}", r"\1"),  # \text{The area is 12}
    (r"^\\text\{ *(?:Rs|USD|EUR|GBP|INR)\.? *\}", ""),
    (r"\\text\{ *\(?(?:in )?base *\}? *(\w+)\)? *\}", r"_{\1}"),
    (r"_\{?_\{(\w+)\}\}? *|_\{\((\w+)\)\}", r"_{\1\2}"),  # 110_{\text{base }2}, 110_{(2)}
    (r"\\log_(?:e(?![a-zA-Z])|\{e\})", r"\\ln "),
    (r"\\vee(?![a-zA-Z])", r"\\lor "),
    (r"\\wedge(?![a-zA-Z])", r"\\land "),
    (r"\\backslash(?![a-zA-Z])", r"\\setminus "),
    (r"^([0-9]+) *(?:\\colon(?![a-zA-Z])|\\text\{ *to *\}) *([0-9]+)$", r"\1:\2"),
    (r"([\[(][^\[\](),;]+);([^\[\](),;]+[\])])", r"\1,\2"),  # [2;5]
    (r"(^|\\(?:cup|in) *)\]([^\[\](),]+,[^\[\](),]+[\[\]])", r"\1(\2"),  # ]2,5[ is the open interval in France
    (r"([\[(][^\[\](),]+,[^\[\](),]+)\[", r"\1)"),
    (r"\\text\{([eid])\}", r"\1"),  # the number e
    (r"\\q?quad(?![a-zA-Z])", ","),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac *(\\[a-zA-Z]+)", r"\\frac{\1}"),  # TeX takes one command for an argument
    (r"\\frac *([0-9]) *([0-9])", r"\\frac{\1}{\2}"),
    (r"\\sqrt *\(([^()]*)\)", r"\\sqrt{\1}"),  # math-verify's normalize_latex makes \\sqrt of it
    (r"\^ *\{? *\\circ *\}?|\\degrees?(?![a-zA-Z])", r"^\\circ "),
    (r"(?<![a-zA-Z\\])(sin|cos|tan|log|ln|sqrt)(?![a-zA-Z])", r"\\\1"),
    (r"(?<=\^\\circ ) *([CF])$", r"\\text{\1}"),
    (r"\\varnothing(?![a-zA-Z])|\\\{ *\\\}", r"\\emptyset"),  # a variable for latex2sympy
    (r"^\\text\{ *no (?:real )?solutions? *\}$", r"\\emptyset"),
    (r"^\\text\{ *all real(?: number)?s *\}$", r"\\mathbb{R}"),
    (r"^\\text\{[^{}]*(?::|=|\bis) *\}", ""),  # \text{Area: }
    (r"(?<![\w.,])([0-9]{1,3}(?: [0-9]{3})+)(?![\w.,/])", lambda match: match[1].replace(" ", "")),  # 1 234
    (r"\\[lr]angle(?![a-zA-Z])", lambda match: "()"[match[0] == r"\rangle"]),
    (r"<=|\\leq(?:slant)?(?![a-zA-Z])", r"\\le "),
    (r">=|\\geq(?:slant)?(?![a-zA-Z])", r"\\ge "),
    (r"\\neq(?![a-zA-Z])", r"\\ne "),
    # latex2sympy reads 11 5/6 as (11 + 5)/6
    (r"(?<![\w^_.}])([0-9]+)(?: +([0-9]+)/([0-9]+)| *\\frac\{([0-9]+)\}\{([0-9]+)\})", mixed_number),
    (
        r"(?<![\w.])([0-9]+(?:\.[0-9]+)?)(?: *(?:\\times|\\cdot|[*x]) *10 *\^ *|[eE](?=[-+]?[0-9]))"
        r"\{?([-+]?[0-9]{1,2})(?![0-9])\}?",
        power_of_ten,
    ),
    (r"^\\\{ *[a-zA-Z] *(?:\\in *\\mathbb\{R\} *)?(?:\\mid(?![a-zA-Z])|[|:])(.*)\\\}$", r"\1"),  # { x | x < 3 }
    (r"\\text\{ *(?:percent(?:age)?|pct) *\}|\b(?:percent|pct)\b|(?<!\\)%", r"\\%"),
    (r"^[a-zA-Z] *\\in(?![a-zA-Z])", ""),  # x \in [1, 2]
    (r"\\p?mod *(?:\{[^{}]*\}|[0-9]+)$|\((?:\\bmod|(?:\\text\{)? *mod)[^()]*\)$", ""),
    (r"^\\boxed\{([^{}]*)\}$", r"\1"),
    (r"(^|= *)\\text\{ *([-(.0-9\\](?:[^{}]|\{[^{}]*\})*)\}", r"\1\2"),  # \text{5 cm}, \mathbf{\frac{1}{2}}
    (r"(?<![\w.,])([0-9]+(?:\.[0-9]+)?) *(\\text\{)? *(thousand|million|billion|trillion)\b", scaled),
    (r"\\text\{ *\}$", ""),
]
TIDY = [(re.compile(pattern), replacement) for pattern, replacement in TIDY]


def tidy(latex: str) -> str:
    """Of several ways to write the same the one that latex2sympy reads."""
    latex = latex.rstrip(".,; \\")
    for pattern, replacement in TIDY:
        latex = pattern.sub(replacement, latex)
    return latex.strip().rstrip(".,;")


# ---------------------------------------------------------------- math: what is not part of the value


MEASURES = {  # the short name of each unit, and its others without the s of the plural
    "m": "metre meter", "cm": "centimetre centimeter", "mm": "millimetre millimeter", "km": "kilometre kilometer",
    "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "l": "litre liter",
    "ml": "millilitre milliliter",
    "g": "gram gm", "kg": "kilogram", "mg": "milligram", "lb": "pound", "oz": "ounce", "s": "second sec",
    "min": "minute", "h": "hour hr", "day": "", "week": "", "month": "", "year": "yr", "degree": "deg circ",
    "radian": "rad", "celsius": "c", "fahrenheit": "f", "dollar": "usd", "cent": "", "euro": "",
}  # fmt: skip
MEASURES = {name: short for short, names in MEASURES.items() for name in (short, *names.split())}
POWERS = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cubed": "3", "2": "2", "3": "3"}
NO_UNIT = {  # 5 of these is not 5, or it is no answer
    "or", "and", "not", "mod", "pi", "sqrt", "times", "plus", "minus", "choose", "factorial", "over", "to", "base",
    "hundred", "thousand", "million", "billion", "dozen", "half", "if", "for",
    "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "through",
}  # fmt: skip
BRACED_UNITS = re.compile(r"(?:(?:[ /]|\\cdot)*\\text\{(?:[^{}0-9=,]|(?<=[a-zA-Z^])[23])*\}(?: *\^ *\{?-?[0-9]\}?)?)+")
PLAIN_UNIT = re.compile(r"[a-zA-Z][ a-zA-Z./]*(?:\^ *\{?[0-9]\}?)?")
LETTER = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]")
VARIABLE = re.compile(  # not e and i alone
    r"(?<![\\a-zA-Z])(?:[a-df-hj-zA-Z]|[a-zA-Z]{2})|\\(?!frac|sqrt|pi|cdot|times|div|circ|pm|infty|approx)[a-zA-Z]"
)


def without_unit(latex: str, may_be_letter: bool) -> tuple[str, str]:
    """The value and its unit, which is empty if there is none. A letter alone is a unit only where it may be one."""
    start = latex.find(r"\text{")
    letter = LETTER.search(latex)
    if start > 0 and latex[start - 1] not in "_{^+-=(" and BRACED_UNITS.fullmatch(latex, start):
        pass
    elif letter and letter.start() > 0 and PLAIN_UNIT.fullmatch(latex, letter.start()):
        start = letter.start()
        first, *others = re.findall("[a-zA-Z]+", latex[start:])
        if any(len(word) == 1 and word not in "mgshlL" for word in (first, *others)):
            return latex, ""
        if len(first) == 1 and not may_be_letter or latex[start - 1] != " " and not measure(first):
            return latex, ""
    elif latex.endswith(r"^\circ") and not FUNCTIONS["trigonometry"].search(latex):
        start = len(latex) - len(r"^\circ")
    else:
        return latex, ""
    unit = latex[start:].replace(r"\text", "")
    words = re.findall("[a-z]+", unit.lower())
    if NO_UNIT & set(words) or words[:1] in (["squared"], ["cubed"]):
        return latex, ""
    value = latex[:start].rstrip(r" \/")
    return value.removesuffix(r"^\circ"), unit + " circ" * value.endswith(r"^\circ")


def measure(word: str) -> str | None:
    """The short name of a unit, if it is one that we know."""
    word = word.lower()
    return MEASURES.get(word) or MEASURES.get(word.removesuffix("s"))


def measures(unit: str) -> set[str]:
    """The units in a text that we know, as {"m", "/s2"}."""
    found, slash, power = [], "", ""
    unit = re.sub(r"\bmph\b", "mi/h", re.sub(r"\bkm?ph\b", "km/h", unit.lower()))
    for word in re.findall("/|[a-z]+|[0-9]", unit):
        if word in ("/", "per"):
            slash = "/"
        elif word in POWERS and found and (word.isdigit() or word.endswith("ed")):
            found[-1] += POWERS[word]
        elif word in POWERS:
            power = POWERS[word]
        elif measure(word):
            found.append(slash + measure(word) + power)
            power = ""
    return set(found)


def other_unit(unit: str, gold: str) -> bool:
    """Whether both are units that we know, and others. 25 degrees may be degrees Celsius."""
    ours, theirs = measures(unit), measures(gold)
    if not ours or not theirs:
        return False
    rates = [{name for name in names if name.startswith("/")} for names in (ours, theirs)]
    return rates[0] != rates[1] or not (ours <= theirs or theirs <= ours)


CLOCK = re.compile(r"([0-9]{1,2})(?::([0-9]{2}))?(?:([ap])\.?m\.?)?")


def clock(latex: str) -> tuple[int, int, str] | None:
    """A time as (hour below 12, minute, "a" or "p" or "")."""
    time = CLOCK.fullmatch(re.sub(r"\\text|[{} ]", "", latex).lower())
    if not time or not (time[2] or time[3]):
        return None
    hour, half = int(time[1]), time[3] or ""
    if not half and hour > 12:
        half = "p"
    return hour % 12, int(time[2] or 0), half


CHOICE = re.compile(r"(?!\\text\{[A-Z]\}\()(?:\\text\{ *)?(?:\(([A-Z])\)|([A-Z])(?=[).:}]|$))[).:]?\}?[ .:,]*(.*)")


def without_choice(latex: str) -> tuple[str, str]:
    """What stands behind the letter of a choice, and that letter, which is empty if there is none."""
    choice = CHOICE.fullmatch(latex)
    return (choice[3], choice[1] or choice[2]) if choice else (latex, "")


DIGITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
BASED = re.compile(
    r"(-?\(?(?=[A-F.]*[0-9]|[A-F]{2,}_\{1[1-6])[0-9A-F., ]+\)?)"
    r"_(?:\{(?:\\text\{)? *([0-9]+|[a-z]+) *\}+|([0-9]+))"
)


def without_base(latex: str) -> tuple[str, str]:
    """The digits of a number and its base, which is empty if there is none."""
    based = BASED.fullmatch(latex)
    if not based:
        return latex, ""
    base = based[2] or based[3]
    return re.sub("[(), ]", "", based[1]), str(DIGITS.index(base)) if base in DIGITS else base


def split(latex: str, separator: str) -> list[str]:
    """The parts between separators that are in no brackets."""
    parts, start, depth = [], 0, 0
    for match in re.finditer(rf"[({{\[]|[)}}\]]|{separator}", latex):
        if match[0] in "({[":
            depth += 1
        elif match[0] in ")}]":
            depth -= 1
        elif depth <= 0:
            parts.append(latex[start : match.start()].strip())
            start = match.end()
    return [*parts, latex[start:].strip()]


EQUALS = r"=|\\equiv(?![a-zA-Z])"
RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|lt|gt)(?![a-zA-Z])")
APPROXIMATELY = r"\\approx(?![a-zA-Z])"
LIST = r"[,;]|\\text\{ *(?:or|and) *\}|\bor\b|\band\b|\\l(?:or|and)(?![a-zA-Z])"
SYMBOL = re.compile(r"[a-zA-Z]\w*")
NAME = re.compile(  # what can be nothing but a name
    r"\\text\{[^{}]*\}|m?\\angle.*|\\overline\{[A-Z]*\}|\([a-z, ]*\)|[a-zA-Z]_(?:\{[^{}]*\}|\w)|[a-zA-Z]\([^()]*\)"
)


def is_name(side: str) -> bool:
    """Whether a left side says what the value is of: x, f(2), x+y, \\angle ABC, \\text{Area}. Not 5, e^2, nor x^2-2x-3,
    which is the left side of an equation to be solved."""
    side, _ = without_unit(side, may_be_letter=False)
    if any(re.fullmatch("[0-9.]+", term) for term in split(side, "[+-]")):
        return False
    return bool(SYMBOL.fullmatch(side) or VARIABLE.search(side))


def values(latex: str) -> list[str]:
    """The sides of a chain of equations, without the name before or behind it."""
    sides = split(latex, EQUALS)
    while len(sides) > 1 and is_name(sides[0]):
        sides.pop(0)
    if len(sides) > 1 and (SYMBOL.fullmatch(sides[-1]) or NAME.fullmatch(sides[-1])):
        sides.pop()  # 5 = x
    return sides


# ---------------------------------------------------------------- math: the task is no answer


FUNCTIONS = {
    "root": r"\\sqrt|\^\{?\(?-?[0-9]+/|\^\{?-?\\frac",
    "trigonometry": r"(?<![a-zA-Z])(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?(?![a-z])",
    "logarithm": r"(?<![a-zA-Z])(?:log|ln|lg)(?![a-z])",
    "rounding": r"\\lfloor|\\lceil|floor|ceil",
    "absolute value": r"\||\\l?vert",
    "calculus": r"\\(?:int|sum|prod|lim)(?![a-zA-Z])|\\frac\{(?:d|\\partial)\}\{(?:d|\\partial)",
    "counting": r"\\[dt]?binom|(?<!\\)!|choose|\}_",
    "integers": r"(?<![a-zA-Z])(?:gcd|lcm|max|min|[bp]?mod|det)(?![a-z])",
    "matrices": r"vmatrix|(?<![{0-9])[0-9]+ *\\begin|\\end\{[a-z]*\} *(?:\\begin|[\^+*-]|\\cdot|\\times)",
    "complex numbers": r"(?<![a-zA-Z])i *\^",
    "sets": r"\\cap(?![a-zA-Z])|\\\} *\\(?:cup|setminus) *\\\{",
    "repeating decimal": r"\\(?:overline|bar) *\{[0-9]",
    "and so on": r"\\[lc]?dots|\.\.\.",
}
FUNCTIONS = {name: re.compile(pattern) for name, pattern in FUNCTIONS.items()}
PRODUCT_OF_SUMS = re.compile(r"\)\s*(?:\(|[0-9])")
NUMERIC = re.compile(r"-?(?:[0-9.,\s]+|\\frac\{-?[0-9]+\}\{[0-9]+\}|[0-9]+/[0-9]+)(?:\\%)?")
ARITHMETIC = re.compile(r"[0-9)}]\s*(?:[+*-]|\\cdot|\\times|\\div)\s*[0-9({\\]|\)\s*\^|-\s*\(?-|\\exp|\\frac.*\\frac")
WORDS = re.compile(r"\\text\{[^{}]*(?:[0-9=,]|\b(?:or|not|and)\b)")
NEGATION = re.compile(r"\\(?:ne|not|lnot|neg)(?![a-zA-Z])|!=")


def is_task(answer: str, gold: str) -> bool:
    """What math-verify would take for an answer although it is the task, which it works out, or leaves something open.
    Each only where the gold formula is not of that kind itself."""
    for name, function in FUNCTIONS.items():
        if len(function.findall(answer)) > 2 * len(function.findall(gold)):  # \cos x/\sin x may be \cot x
            if name != "root" or not FUNCTIONS["trigonometry"].search(gold):  # \cos 15^\circ has roots
                return True  # \sum_{k=1}^{10} k
    if WORDS.search(answer) and not re.search(r",|\\cup|\band\b|\bor\b|\\pm|\\text", gold):
        return True  # 5\text{ or 7}
    if NEGATION.search(answer) and not NEGATION.search(gold):
        return True
    if re.search(r"_\{?(?!10\b)[0-9]", answer) and not re.search("_|[a-zA-Z]", gold):
        return True  # 5_7
    if PRODUCT_OF_SUMS.search(answer) and not PRODUCT_OF_SUMS.search(gold) and not VARIABLE.search(gold):
        return True  # (1+2i)(3-i)
    if NUMERIC.fullmatch(gold):
        return bool(ARITHMETIC.search(answer) or LETTER.search(answer))  # 123\cdot 456, (1+i)^4
    return False


def kinds_of_undone(formula) -> set[str]:
    """What was left to be put together: like terms (2x+1+3x), like factors or two numbers (x\\cdot x^2, 5\\cdot 77), or
    a fraction to be cancelled, if another formula has no denominator with a variable. math-verify evaluates nothing."""
    import sympy

    kinds = set()
    for part in sympy.preorder_traversal(formula):
        if isinstance(part, sympy.Add) and has_duplicates(terms(part)):
            kinds.add("terms")
        elif isinstance(part, sympy.Mul) and has_duplicates(factors(part)):
            kinds.add("factors")
        elif isinstance(part, sympy.Pow) and part.args[1].is_negative:
            if part.args[0].free_symbols and part.args[0].is_polynomial():
                kinds.add("fraction")
    return kinds


def has_duplicates(things) -> bool:
    """Whether two of them are equal."""
    things = list(things)
    return len(set(things)) < len(things)


def terms(formula):
    """What the rational numbers are multiplied with in each term of a sum: nothing for the number 2, x for 3x."""
    if formula.is_Add:
        for term in formula.args:
            yield from terms(term)
        return
    others = [factor for factor in (formula.args if formula.is_Mul else [formula]) if not is_rational(factor)]
    others = [factor.doit().as_coeff_Mul()[1] if is_root(factor) else factor for factor in others]  # \sqrt8 = 2\sqrt2
    if len(others) == 1 and others[0].is_Add:
        yield from terms(others[0])
    else:
        yield frozenset(Counter(others).items())


def factors(formula, exponent=1):
    """The bases of a product; of numbers, other than 1 and -1, only whether they multiply or divide."""
    if formula.is_Mul:
        for factor in formula.args:
            yield from factors(factor, exponent)
    elif formula.is_Pow and formula.args[1].is_Integer:
        yield from factors(formula.args[0], exponent * (1 if formula.args[1] > 0 else -1))
    elif formula.is_Rational:
        if abs(formula.p) != 1:
            yield exponent
        if formula.q != 1:
            yield -exponent
    elif formula.is_Symbol:
        yield formula


def is_root(formula) -> bool:
    """Whether it is a root of a whole number."""
    return formula.is_Pow and formula.args[0].is_Integer and formula.args[1].is_Rational


def is_rational(formula) -> bool:
    """Whether it is a rational number, or a whole power of one."""
    return formula.is_Rational or (formula.is_Pow and formula.args[0].is_Rational and formula.args[1].is_Integer)


# ---------------------------------------------------------------- math: equality


def repeating(decimal: re.Match) -> str:
    r"""LaTeX of 0.1\overline{6}, as a fraction, which math-verify can read."""
    whole, start, period = decimal.groups(default="")
    digits = int(whole + start + period) - int(whole + start or 0)
    return as_fraction(Fraction(digits, (10 ** len(period) - 1) * 10 ** len(start)))


@lru_cache(256)
def parse_formula(latex: str) -> list:
    """What math-verify compares: an expression of sympy, then the text. Empty if it cannot be read."""
    import math_verify  # half a second; only workers need it
    from latex2sympy2_extended import NormalizationConfig

    if FUNCTIONS["trigonometry"].search(latex):
        latex = re.sub(r"([0-9.]+)\^\\circ", r"(\1\\cdot\\frac{\\pi}{180})", latex)  # which latex2sympy drops
    latex = re.sub(r"([0-9]*)\.([0-9]*)\\(?:overline|bar) *\{([0-9]+)\}", repeating, latex)
    # normalize_latex takes the letters m, s, t, d, ab and others at the end for units: 4ab would be 4
    normalization = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    # As LaTeX only: its other reader would take a number out of the middle of what is no formula. Timed from outside.
    config = math_verify.LatexExtractionConfig(normalization_config=normalization)
    parsed = math_verify.parse(f"${latex}$", [config], parsing_timeout=None)
    return parsed if len(parsed) > 1 else []


class Gold(NamedTuple):
    """A ground truth taken apart."""

    latex: str  # all of it
    value: str  # without what follows
    formula: list  # the value as math-verify has it
    unit: str
    base: str
    choice: str


def gold_formula(ground_truth) -> Gold:
    """A ground truth, which is a formula, in dollars or not, or a solution. Raises ValueError if it cannot be read."""
    text = as_latex(as_text(ground_truth))
    if re.search(r"\\boxed|(?<!\\)\$", text):  # a solution, or a formula in dollars
        text = last_formula(text) or ""
    latex = tidy(text)
    value, choice = without_choice(latex)
    sides = split(value, EQUALS)
    if len(sides) == 2 and NAME.fullmatch(sides[0]):  # no variable alone: y = 2x + 3 is an equation
        value = sides[1]
    value, base = without_base(value or latex)
    value, unit = without_unit(value, may_be_letter=False)
    formula = parse_formula(value)
    if not formula and clock(latex):
        formula = [latex]  # compared as a time
    if not formula:
        raise ValueError(f"math-verify cannot read {ground_truth!r}")
    return Gold(latex, value, formula, unit, base, choice)


@verifier("math", gold=gold_formula)
def equal_formulas(completion, gold):
    """Hendrycks et al. 2021 (arXiv 2103.03874): the answer is equal to the gold formula in the eyes of math-verify."""
    answer = last_formula(as_latex(completion[-TAIL:]))
    if answer is None:
        return Verdict(0.0, "unparsed")
    right = is_right(tidy(answer), gold)
    return Verdict(0.0, "unparsed", answer) if right is None else (right, answer)


MATRIX = r"\{(?:[pb]?matrix|array)\}"
COLUMN = re.compile(rf"(^|= *)[(\[]?\\begin{MATRIX}(?:\{{c\}})?((?:(?!\\end)[^&])*)\\end{MATRIX}[)\]]?$")
ROW = re.compile(r"(^|= *)\(([^()]+,[^()]+)\)$")


def written_alike(latex: str, gold: str) -> str:
    """A column as (1,2) where the gold formula is one, and the other way round."""
    form = COLUMN if ROW.search(gold) else ROW if COLUMN.search(gold) else None
    vector = form and form.search(latex)
    if not vector:
        return latex
    entries = [entry for entry in re.split(r"\\\\|,", vector[2]) if entry.strip()]
    as_column = r"\begin{pmatrix}" + r"\\".join(entries) + r"\end{pmatrix}"
    return latex[: vector.start()] + vector[1] + (as_column if form is ROW else f"({','.join(entries)})")


def is_right(latex: str, gold: Gold) -> bool | None:
    """Whether an answer, as LaTeX, is equal to the gold formula. None if it cannot be read."""
    if r"\boxed" in latex:
        return False  # a box in a box
    latex = written_alike(latex, gold.value)
    if latex == gold.latex or gold.latex.startswith(r"\text") and spelled(latex) == spelled(gold.latex):
        return True
    if clock(gold.latex):
        if clock(latex):
            pairs = zip(clock(latex), clock(gold.latex), strict=True)
            return all(ours == theirs or "" in (ours, theirs) for ours, theirs in pairs)
        if clock(gold.latex)[2]:
            return False
    value, choice = without_choice(latex)
    if choice and re.search(r"\b(?:[A-Z]|or|and|not)\b", value):
        return None  # (A) or (C)
    if choice and gold.choice and (choice != gold.choice or not value or gold.value == gold.latex):
        return choice == gold.choice
    if not value or re.search("[A-Z]", gold.value):
        value = latex  # the letter is the value
    return has_value(value, gold)


def spelled(latex: str) -> str:
    """The letters and digits, whatever spacing, case and article."""
    latex = re.sub(r"(?i)\b(?:an?|the) +(?=[a-z]{2})", "", latex)
    return re.sub(r"\\text|[{}() ]", "", latex).rstrip(".").casefold()


def has_value(latex: str, gold: Gold) -> bool | None:
    """Whether an answer is equal to the gold value: each side of it, if it is a chain of equations."""
    if is_continuous(gold.formula[0]) and RELATION.search(latex):
        return is_solution_set(latex, gold)
    parts = [part for part in split(latex, LIST) if part]
    name, *others = split(gold.value, EQUALS)
    if others:
        is_other_equation = latex.count("=") == 1 and split(latex, EQUALS)[0] != name
        if len(parts) > 1 or not SYMBOL.fullmatch(name) or is_other_equation:
            return not is_task(latex, gold.value) and is_equal(latex, gold)
        gold = gold._replace(value=others[-1], formula=parse_formula(others[-1]))  # x = 2 + 3 = 5
    if len(parts) > 1:
        sides = [values(part) for part in parts]
        items = ",".join(without_unit(part[0], may_be_letter=False)[0] for part in sides)
        return all(len(part) == 1 for part in sides) and has_measure(items, gold)
    exact, *rounded = split(latex, APPROXIMATELY)
    *others, side = values(exact)
    if not rounded:
        return all(is_equal(other, gold) for other in others) and has_measure(side, gold)
    if not side or is_name(side):
        return len(rounded) == 1 and has_measure(rounded[0], gold)
    agree = len(rounded) == 1 and not others and rounds_to(side, rounded[0])  # \sqrt{2} \approx 1.414
    return agree and bool(has_measure(side, gold) or has_measure(rounded[0], gold))


def has_measure(latex: str, gold: Gold) -> bool | None:
    """Whether the value of an answer is equal, and its base and unit are none but the gold's."""
    value, base = without_base(latex)
    if base and base != (gold.base or "10"):
        return False
    if gold.base:
        return re.sub("[, ]", "", value) == gold.value
    value, unit = without_unit(value, may_be_letter=not LETTER.search(gold.value))
    if NUMERIC.fullmatch(gold.value) and "," not in gold.value:
        value = re.sub("^(-?[0-9]+),([0-9]{1,2}|[0-9]{4,})$", r"\1.\2", value)  # 3,14
        if re.fullmatch("-?[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}", value):
            value = value.replace(",", "")  # 1,00,000 in India
    if other_unit(unit, gold.unit) or is_task(value, gold.value):
        return False
    right = is_equal(value, gold)
    if not right and value.endswith(r"\%") and NUMERIC.fullmatch(gold.value) and not abs(gold.formula[0]) < 1:
        value = value.removesuffix(r"\%").rstrip()  # 12.5 %, but 0.5 % is not the probability 0.5
        right = is_equal(value, gold)
    if right and value != gold.value:
        ours, theirs = kinds_of_undone(parse_formula(value)[0]), kinds_of_undone(gold.formula[0])
        return ours <= theirs
    return right


def is_equal(latex: str, gold: Gold) -> bool | None:
    """Whether a formula is equal to the gold value. None if it cannot be read."""
    import math_verify

    formula = parse_formula(latex)
    if not formula:
        return None
    if not math_verify.verify(gold.formula, formula, timeout_seconds=None):
        return False
    return "%" in latex + gold.value or not differs(formula[0], gold.formula[0])  # 75 may be 75 %


def differs(one, other) -> bool:
    """Whether two numbers differ by more than a part in a million: verify rounds to six decimals, which makes 0 of
    0.0000001, and its evalf(chop=True) does the same with what is smaller yet."""
    if not (getattr(one, "is_number", False) and getattr(other, "is_number", False)):
        return False
    try:
        one, other = complex(one), complex(other)
        return abs(one - other) > 2e-6 * abs(other)
    except (TypeError, ValueError, OverflowError):
        return False


def rounds_to(exact: str, rounded: str) -> bool:
    """Whether a number is what another one is rounded to."""
    formula = parse_formula(exact)
    digits = re.fullmatch(r"-?[0-9]+(?:\.([0-9]+))?", rounded)
    try:
        return bool(digits) and abs(float(formula[0]) - float(rounded)) <= 0.500001 * 10 ** -len(digits[1] or "")
    except (IndexError, TypeError, ValueError, OverflowError):
        return False


def is_continuous(formula) -> bool:
    """Whether it is an interval, or a set made of intervals."""
    import sympy

    return isinstance(formula, sympy.Set) and not isinstance(formula, sympy.FiniteSet)


def is_solution_set(latex: str, gold: Gold) -> bool | None:
    """Whether inequalities, joined by "or" and "and", say the same as the gold set."""
    import math_verify
    import sympy
    from math_verify.grader import unwrap_fcs

    alternatives = []
    for alternative in split(latex, r"\\text\{ *or *\}|\bor\b|\\lor(?![a-zA-Z])|\\cup(?![a-zA-Z])"):
        conditions = [parse_formula(one) for one in split(alternative, r"\\text\{ *and *\}|\band\b|\\land(?![a-zA-Z])")]
        if not all(conditions):
            return None
        try:
            if not all(is_solved(condition[0]) for condition in conditions):
                return False
            alternatives.append(sympy.Intersection(*[unwrap_fcs(condition[0]).as_set() for condition in conditions]))
        except (AttributeError, NotImplementedError, TypeError, ValueError):
            return False
    return math_verify.verify(gold.formula, [sympy.Union(*alternatives)], timeout_seconds=None)


def is_solved(relation) -> bool:
    """Whether it is an inequality with a variable alone on a side, and none on the others."""
    from latex2sympy2_extended.logic import And

    if isinstance(relation, And):
        return all(is_solved(part) for part in relation.args)
    variables = [side for side in relation.args if side.free_symbols]
    return relation.is_Relational and len(variables) == 1 and variables[0].is_Symbol
