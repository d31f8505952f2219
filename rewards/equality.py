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
    if len(printed) != len(expected):
        return False
    for words_printed, words_expected in zip(printed, expected, strict=True):
        if len(words_printed) != len(words_expected):
            return False
        if not all(map(same_word, words_printed, words_expected)):
            return False
    return True


def same_word(printed: str, expected: str) -> bool:
    """Whether two words are the same, or numbers that are."""
    if printed == expected:
        return True
    if not NUMBER.fullmatch(expected) or not NUMBER.fullmatch(printed):
        return False
    if not WHOLE.fullmatch(expected):
        return is_close(float(printed), float(expected))
    if not WHOLE.fullmatch(printed) and abs(Decimal(expected)) >= EXACT:
        return False
    return Decimal(printed) == Decimal(expected)


def is_close(number: float, expected: float) -> bool:
    """Whether a number is near enough to one that is not whole."""
    if number == expected:
        return True
    largest = TOLERANCE * max(1.0, abs(expected))
    return abs(number - expected) <= largest < float("inf")


def is_same(value, expected) -> bool:
    """Whether a value is the expected one as JSON can say it: tuples are lists, keys are text, floats are near."""
    if type(value).__name__ == "ndarray":
        value = value.tolist()
    if isinstance(expected, list):
        if not isinstance(value, (list, tuple)) or len(value) != len(expected):
            return False
        return all(map(is_same, value, expected))
    if isinstance(expected, dict) and isinstance(value, dict):
        value = {key if isinstance(key, str) else str(key): item for key, item in value.items()}
        if value.keys() != expected.keys():
            return False
        return all(is_same(value[key], expected[key]) for key in expected)
    if isinstance(expected, float) and isinstance(value, (int, float)):
        return is_close(value, expected)
    return value == expected
