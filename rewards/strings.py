"""Verifiers of plain text: `exact` and `contains`, on normalised strings."""

import re
import unicodedata

from rewards.verifiers import as_text, verifier


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
