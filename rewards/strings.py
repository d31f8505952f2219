"""Verifiers of plain text: `exact`, `contains`, `string_f1`, and `format`, which can be the gate of others.

Which texts are the same is said in one place, by `normalised`.
"""

import unicodedata
from collections import Counter

import regex

from rewards.verifiers import as_text, verifier

# Scripts that put no spaces between words: Han, Hiragana, and those of South East Asia (Thai, Lao, Khmer, Burmese ...).
SPACELESS = r"[\p{Han}\p{Hiragana}\p{Line_Break=Complex_Context}]"
# Signs that are the same, but not for NFKC.
SIGNS = str.maketrans(dict.fromkeys("‘’‚‛′ʼ`´", "'") | dict.fromkeys("“”„‟″", '"') | {"\u2044": "/", "\u066b": "."})
# What Unicode says is not visible (zero-width spaces, soft hyphens, marks of direction, variation selectors), the
# stroke that lengthens Arabic words, and the signs for vowels, which Arabic and Hebrew write or leave out.
UNSEEN = r"[\p{Default_Ignorable_Code_Point}\u0640\u064b-\u0652\u0670\u0591-\u05bd\u05bf\u05c1\u05c2]"
# Sentence punctuation, quotation marks, markdown's asterisks, and all brackets but those of formulas and programs.
ENDS = r"[[\s\p{Terminal_Punctuation}\p{Quotation_Mark}¡¿*\p{Ps}\p{Pe}\p{Pi}\p{Pf}]--[\(\)\[\]\{\}]]"
ENDS = "".join(regex.findall(rf"(?V1){ENDS}", "".join(map(chr, range(0x10000)))))


def normalised(text, turkish: bool = False) -> str:
    """A text without what makes no difference. Two texts are the same if this makes the same of both.

    Neither differ in case, in spacing, in forms that Unicode has for compatibility (full width, ligatures; but a power
    stays a power), in the kinds of quotes and dashes, in whose digits they use, or in what nobody sees; nor at the ends
    in punctuation, quotes, and round brackets: (A), A) and, for a letter alone, [A] are A; _A_ is emphasis.

    Args:
        text: a string or number. Raises ValueError for anything else, and for a blank.
        turkish: i is the small letter of İ, and ı of I.
    """
    text = regex.sub(UNSEEN, "", as_text(text))
    text = regex.sub(r"[⁺⁻]?[⁰¹²³⁴-⁹]+", r"^\g<0>", text)
    text = regex.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)  # 2½ is not 21/2
    text = unicodedata.normalize("NFKC", text.translate(SIGNS)).translate(SIGNS)
    text = regex.sub(r"\p{Dash}", "-", text)
    digits = set(regex.findall(r"(?![0-9])\p{Nd}", text))
    text = text.translate({ord(digit): str(unicodedata.decimal(digit)) for digit in digits})
    if turkish:
        text = text.replace("İ", "i").replace("I", "ı")
    text = regex.sub(r"(?<!\w)_([^_\s](?:[^_]*[^_\s])?)_(?!\w)", r"\1", text)  # markdown's emphasis
    text = text.casefold().replace("i\u0307", "i")  # the second is what casefold makes of İ
    text = unicodedata.normalize("NFC", text)
    return without_ends(" ".join(text.split()))


def without_ends(text: str) -> str:
    """Without punctuation at the ends, and without round brackets there that no other text needs."""
    text = stripped(text.removeprefix("- "))
    in_brackets = regex.fullmatch(r"\(([^(),;]+)\)|(\w+)\)|\[([a-z])\]", text)
    if in_brackets:
        text = stripped(in_brackets[1] or in_brackets[2] or in_brackets[3])
    return text


def stripped(text: str) -> str:
    """Without `ENDS`, but with the full stop of .5."""
    right = text.rstrip(ENDS)
    bare = right.lstrip(ENDS)
    cut = right[: len(right) - len(bare)]
    return "." + bare if cut.endswith(".") and bare[:1].isdecimal() else bare


def gold_text(ground_truth) -> str:
    """A ground truth as a string. Raises ValueError if nothing of it is left by `normalised`."""
    if not normalised(ground_truth):
        raise ValueError(f"nothing to compare with in {ground_truth!r}")
    return str(ground_truth)


def gold_texts(ground_truth) -> list[str]:
    """A string or a list of strings as a list. Raises ValueError for none, or if nothing is left of one."""
    given = ground_truth if isinstance(ground_truth, list) else [ground_truth]
    if not given:
        raise ValueError("an empty list")
    return [gold_text(one) for one in given]


def case_rules(*texts: str) -> tuple[bool, ...]:
    """The values of `turkish` to try. In any language but Turkish and Azerbaijani the first decides."""
    return (False, True) if any(letter in text for text in texts for letter in "ıİ") else (False,)


@verifier("exact", gold=gold_text)
def exact(completion, gold):
    """The whole completion, normalised, is the ground truth, normalised."""
    answer = completion.strip()
    if not answer:
        return False, None
    rules = case_rules(completion, gold)
    return any(normalised(completion, rule) == normalised(gold, rule) for rule in rules), answer[:200]


# What a text is searched by. A sign that no other line takes stands alone.
WORDS = rf"""(?xV1)
    (?: (?<! [[\p{{L}}\p{{N}}_)]--{SPACELESS}] ) - )?              # a minus is part of its number, so are
    (?: [0-9]+ (?: [.,/][0-9]+ )* | \.[0-9]+ )                     # decimals, fractions and dates,
    (?: [ ][0-9]+/[0-9]+ )?                                        # mixed numbers,
    (?: e[-+]?[0-9]+ )? (?: \^-?[0-9]+ )?                          # and powers
    | [〇零一二三四五六七八九十百千万萬亿億]+                      # a number as well
    | [\p{{Katakana}}ー]+                                          # words of other languages in Japanese
    | {SPACELESS} \p{{M}}*                                         # where words have no spaces, every letter
    | \p{{Hangul}}                                                 # likewise, from the beginning of a word on
    | [[\p{{L}}\p{{M}}_]--[{SPACELESS}\p{{Hangul}}\p{{Katakana}}]]+ (?: (?<=n)'t\b | \+\+ | \# )?
    | \S
"""


def words(text: str) -> str:
    """Words, numbers and signs, each on a line of its own, so that a search finds whole ones only.

    Chinese, Japanese and Thai words cannot be told apart without a dictionary, so any of their letters may begin and
    end one. A Korean word may go on, since its endings and particles are written with it, but it has to begin there.
    """
    text = regex.sub(r"(?<!\p{Hangul})(?=\p{Hangul})", "\0", text)  # a sign that stands for the beginning
    return "\n" + "\n".join(regex.findall(WORDS, text)) + "\n"


@verifier("contains", gold=gold_texts)
def contains(completion, gold):
    """Every one of the given strings is in the completion, as whole words and numbers (5 is not in 15)."""
    if not completion.strip():
        return False, f"missing: {', '.join(gold)}"
    missing = set(gold)
    for rule in case_rules(completion, *gold):
        text = words(normalised(completion, rule))
        missing = {one for one in missing if words(normalised(one, rule)) not in text}
    if missing:
        return False, f"missing: {', '.join(one for one in gold if one in missing)}"
    return True, "all there"


def f1_words(text: str) -> Counter:
    """How often each word is in a text, by SQuAD's rules: without case, punctuation and a, an, the.

    Where a script has no spaces every letter is a word. A text of articles alone, as the choice A, keeps them.
    """
    text = regex.sub(r"[\p{P}$+<=>^`|~]", "", normalised(text))
    text = regex.sub(SPACELESS, r" \g<0> ", text)
    found = text.split()
    return Counter(word for word in found if word not in ("a", "an", "the")) or Counter(found)


def gold_words(ground_truth) -> list[Counter]:
    """`f1_words` of a string, or of each of a list. Raises ValueError if one has no words."""
    golds = [f1_words(one) for one in gold_texts(ground_truth)]
    if not all(golds):
        raise ValueError(f"no words in {ground_truth!r}")
    return golds


@verifier("string_f1", gold=gold_words)
def string_f1(completion, golds):
    """SQuAD's F1 (Rajpurkar et al. 2016, arXiv 1606.05250): of the words shared with the ground truth, 0 … 1.

    With several ground truths the best counts. The tags <answer> and </answer> are left out, as open-instruct does.
    """
    answer = completion.replace("<answer>", "").replace("</answer>", "").strip()
    if not answer:
        return 0.0, None
    found = f1_words(answer)
    return max(f1(found, gold) for gold in golds), answer[:200]


def f1(found: Counter, gold: Counter) -> float:
    """The harmonic mean of precision and recall, which is twice what is shared over the sum of both lengths."""
    return 2 * (found & gold).total() / (found.total() + gold.total())


TAGS = ("<think>", "</think>", "<answer>", "</answer>")
FORMATS = {
    "answer": r"(?s)<think>(.*)</think>\s*<answer>(.*)</answer>",
    "think": r"(?s)<think>(.*)</think>(.*)",
}


def gold_format(ground_truth) -> str:
    """The name of a format; null and "" stand for "answer". Raises ValueError if there is none of that name."""
    name = "answer" if ground_truth in (None, "") else ground_truth
    if name not in list(FORMATS):
        raise ValueError(f"a format is one of {list(FORMATS)}, not {ground_truth!r:.80}")
    return name


@verifier("format", gold=gold_format, whole=True)
def has_format(completion, name):
    """The format of DeepSeek-R1-Zero (arXiv 2501.12948): <think> thought </think> <answer> answer </answer>.

    Every tag is there once, nothing stands beside the tags, and neither thought nor answer is blank. The first <think>
    may be missing: chat templates write it at the end of the prompt. The format "think" has no tags around the answer.
    """
    text = completion.strip()
    if not text.startswith("<think>"):
        text = "<think>" + text
    if any(text.count(tag) != (tag in FORMATS[name]) for tag in TAGS):
        return False
    parts = regex.fullmatch(FORMATS[name], text)
    return bool(parts) and all(regex.search(r"[^\s\p{Default_Ignorable_Code_Point}]", part) for part in parts.groups())
