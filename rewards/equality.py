"""When is an answer of a program the expected one? As judges of programming contests have it.

White space: lines are compared word by word, and blank lines do not count. Text has to be the same, and the same case:
`Yes` is not `YES`. Numbers as they are written in the expected answer:

    whole       has to be that number, `3` or `3.0` (as LiveCodeBench compares, by Decimal). A float cannot hold every
                whole number from 2**53 on, so there only digits count: `1e16` is wrong
    not whole   an error of 1e-6, absolute or relative, as Codeforces' checkers allow (`doubleCompare` in testlib.h);
                problems of this kind ask for six digits, and published answers are often cut after six

So `1e-7` is right for `0.0` and wrong for `0`.
"""

import re
from decimal import Decimal

TOLERANCE = 1e-6
EXACT = 2**53  # from here on there are whole numbers that no float holds
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
WHOLE = re.compile(r"[+-]?[0-9]+")


def same_output(printed: str, expected: str) -> bool:
    """Whether what was printed is what should have been."""
    return same_words(words(printed), words(expected))


def words(text: str) -> list[list[str]]:
    """The words of each line that is not blank."""
    return [line.split() for line in text.split("\n") if line.strip()]


def same_words(printed: list[list[str]], expected: list[list[str]]) -> bool:
    """Whether lines of words say the same."""
    if [len(line) for line in printed] != [len(line) for line in expected]:
        return False
    pairs = zip(printed, expected, strict=True)
    return all(same_word(*pair) for lines in pairs for pair in zip(*lines, strict=True))


def same_word(printed: str, expected: str) -> bool:
    """Whether two words are the same, or numbers that are."""
    if printed == expected:
        return True
    if not NUMBER.fullmatch(expected) or not NUMBER.fullmatch(printed):
        return False
    if not WHOLE.fullmatch(expected):
        return is_close(float(printed), float(expected))
    return Decimal(printed) == Decimal(expected) and (
        WHOLE.fullmatch(printed) is not None or abs(Decimal(expected)) < EXACT
    )


def is_close(number: float, expected: float) -> bool:
    """Whether a number is near enough to one that is not whole."""
    return number == expected or abs(number - expected) <= TOLERANCE * max(1.0, abs(expected)) < float("inf")


def is_same(value, expected) -> bool:
    """Whether a value is the expected one as JSON can say it: tuples are lists, keys are text, floats are near."""
    if isinstance(expected, list):
        is_list = isinstance(value, (list, tuple)) and len(value) == len(expected)
        return is_list and all(map(is_same, value, expected))
    if isinstance(expected, dict) and isinstance(value, dict):
        value = {key if isinstance(key, str) else str(key): item for key, item in value.items()}
        return value.keys() == expected.keys() and all(is_same(value[key], expected[key]) for key in expected)
    if isinstance(expected, float) and isinstance(value, (int, float)):
        return is_close(value, expected)
    return value == expected
