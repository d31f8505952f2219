"""The 29 instruction types that OLMo 3 (arXiv 2512.13961) adds to the 25 of IFEval: IFEvalG of open-instruct.

As in ifeval.py there is one plain function per instruction, pure, for hostile texts, in near-linear time. Importing
this file adds them to that one's tables. The rules are those of the Apache-2.0 reference, open_instruct/IFEvalG, with
these departures, which all make a verdict follow the words of the instruction:

- A word is what stands between spaces, in any case, without punctuation at its ends; signs alone are none. To the
  reference "Yes," is not the word yes, and in four of its rules a comma is a word: it repeats in `count_unique`, it is
  counted in `counting_composition` and `keyword_specific_position`, and it begins and ends a text in `start_end`.
- Sentences are those of ifeval.py. The reference has rules of its own here, where it has punkt for number_sentences.
- Keywords are plain text; the reference reads them as regular expressions.
- An argument that is missing or wrong is an error. The reference draws a random one, for 0 too.
- Instructions that ask for something are not followed by nothing: the reference finds its palindrome in "a", and every
  bigram wrapped in a text of one word.

The docstrings name what else departs.
"""

import operator
import re
import unicodedata
from itertools import pairwise
from typing import NewType

import regex

from rewards.ifeval import (
    ARGUMENTS,
    FOLLOWS,
    IMPOSSIBLE,
    ITEM,
    Relation,
    compare,
    divided,
    frequency,
    letter_frequency,
    occurrences,
    sentences,
)

Words = NewType("Words", str)
Position = NewType("Position", int)

WORD = regex.compile(r"(?s)[\p{L}\p{N}](?:.*[\p{L}\p{M}\p{N}])?")  # from the first letter or digit to the last


def words(text):
    """The words of a text, in small letters."""
    found = [WORD.search(piece) for piece in text.replace("’", "'").replace("—", " ").split()]
    return [word[0].casefold() for word in found if word]


def words_of_sentences(text):
    """The words of each sentence that has some. The number of a list's item is no word."""
    found = []
    for sentence in sentences(text):
        first, _, rest = sentence.partition(" ")
        found.append(words(rest if rest and ITEM.fullmatch(first) else sentence))
    return [sentence for sentence in found if sentence]


def word_list(given):
    """The words of an argument that may be a text, or a list whose first entry counts."""
    return words(given if isinstance(given, str) else given[0])


def repeat_phrase(text, phrase: str, small_n: int):
    """The phrase is there so many times, each time with one word in its middle replaced, and never unchanged."""
    wanted = words(phrase)
    found = words(text)
    changes = []
    for start in range(len(found) - len(wanted) + 1):
        candidate = found[start : start + len(wanted)]
        if candidate[0] == wanted[0] and candidate[-1] == wanted[-1]:
            changes.append(sum(map(operator.ne, candidate, wanted)))
    return changes == [1] * small_n


def copy(text, prompt_to_repeat: str):
    """The text is the prompt, in any case."""
    return text.strip().lower() == prompt_to_repeat.strip().lower()


def copy_span_idx(text, prompt_to_repeat: str, n_start: int, n_end: int):
    """The text is the prompt from one character to another, in any case.

    The instruction includes the last of them, the reference does not: both are taken.
    """
    return any(copy(text, prompt_to_repeat[n_start:end]) for end in (n_end, n_end + 1))


def sentence_hyphens(text):
    """Sentences have a hyphen between them and no space, and stand on one line. One sentence follows that, too.

    The reference takes every hyphen for one between sentences, also that of well-known.
    """
    if regex.search(r"\s-|-\s|\n", text.strip()):
        return False
    joined = regex.sub(r"\p{Sentence_Terminal}+[\p{Pe}\p{Pf}\"']*-", "-", text)
    joined = regex.sub(r"(?<=\w\w[.!?])(?=\p{Lu})", " ", joined)  # neither hyphen nor space
    return len(sentences(joined)) == 1


def no_adjacent_consecutive(text):
    """No word begins with the letter that follows, in the alphabet, the first letter of the word before it.

    Letters of alphabets with capitals count, without accents. The reference also takes 1 and 2 for consecutive.
    """
    letters = [unicodedata.normalize("NFD", word[0])[0] for word in words(text)]
    cased = [letter.lower() != letter.upper() for letter in letters]
    pairs = zip(pairwise(letters), pairwise(cased), strict=True)
    return not any(all(both) and ord(second) - ord(first) == 1 for (first, second), both in pairs)


def square_brackets(text):
    """Every word is in [square] [brackets] of its own. Punctuation may stand outside."""
    outside, brackets = re.subn(r"\[[^\s\[\]]+\]", "", text)
    return brackets > 0 and not words(outside)


def word_once(text, keyword: str):
    """The keyword is in the text once, in any case, be it inside a word."""
    return occurrences(text, keyword.strip(), False) == 1


def exclude_word_harder(text, keyword: str, instruction: str = ""):
    """The keyword is not in the text, in any case, as a whole word. The second argument says nothing.

    The reference sees a keyword only with a space on both sides.
    """
    return occurrences(text, keyword.strip(), True) == 0


def paragraphs(text):
    """Two paragraphs with *** between them."""
    return len(divided(text, "***")) == 2


def paragraphs2(text):
    """Two paragraphs with two line breaks between them."""
    return len(divided(text, "\n\n")) == 2


def first_word_sent(text, first_word: Words):
    """Every sentence begins with the word."""
    wanted = word_list(first_word)
    found = words_of_sentences(text)
    return bool(found) and all(sentence[: len(wanted)] == wanted for sentence in found)


def first_word_answer(text, first_word: Words):
    """The text begins with the word."""
    wanted = word_list(first_word)
    return words(text)[: len(wanted)] == wanted


def last_word_sent(text, last_word: Words):
    """Every sentence ends with the word, punctuation aside."""
    wanted = word_list(last_word)
    found = words_of_sentences(text)
    return bool(found) and all(sentence[-len(wanted) :] == wanted for sentence in found)


def last_word_answer(text, last_word: Words):
    """The text ends with the word, punctuation aside."""
    wanted = word_list(last_word)
    return words(text)[-len(wanted) :] == wanted


def bigram_wrapping(text):
    """Words are <<wrapped in>> <<double angular>> <<brackets by>> <<twos.>> Of an odd number the last is free."""
    pieces = text.split()
    pairs = [f"{first} {second}" for first, second in zip(pieces[::2], pieces[1::2], strict=False)]
    return bool(pairs) and all(re.fullmatch(r"<<[^<>]+ [^<>]+>>[.,;:!?]?", pair) for pair in pairs)


def copying_multiple(text, prompt_to_repeat: str, N: int):
    """The text is the prompt N times, in any case, with ****** between."""
    copies = text.split("******")
    return len(copies) == N and all(copy(one, prompt_to_repeat) for one in copies)


def punctuation_dot(text):
    """There is no full stop."""
    return "." not in text


def punctuation_exclamation(text):
    """There is no exclamation mark."""
    return "!" not in text


def lowercase_counting(text, N: int):
    """At most N words are in small letters. The reference counts those of the letters a to z."""
    found = [word for word in re.findall(r"\w+", text) if word.isalpha() and word.islower()]
    return len(found) <= N


def letter_counting(text, N: int, relation: Relation):
    """At least, less than, ... N letters, of any alphabet. The reference counts those from a to z."""
    return compare(sum(map(str.isalpha, text)), relation, N)


def counting_composition(text, n_sent: int, n_words: int):
    """Three paragraphs with * * * between them, of so many sentences each, of so many words each.

    The reference asks for * * * and finds ***: both are taken.
    """
    found = [words_of_sentences(part) for part in divided(text.replace("* * *", "***"), "***")]
    lengths = [[len(sentence) for sentence in paragraph] for paragraph in found]
    return lengths == [[n_words] * n_sent] * 3


def count_unique(text):
    """No word is there twice."""
    found = words(text)
    return len(found) == len(set(found))


def count_increment_word(text, keyword1: str, keyword2: str):
    """The first keyword is in the text once and the second twice, in any case, be it inside a word."""
    return word_once(text, keyword1) and occurrences(text, keyword2.strip(), False) == 2


def palindrome(text):
    """A word, a sentence, a line, or what stands in quotes is the same backwards: three letters or digits at least."""
    pieces = [*text.split(), *sentences(text), *re.split("[:\n]", text), *re.split('["“”«»*]', text)]
    for piece in pieces:
        letters = [letter for letter in piece.casefold() if letter.isalnum()]
        if len(letters) >= 3 and letters == letters[::-1]:
            return True
    return False


def keyword_specific_position(text, keyword: Words, n: Position, m: Position):
    """The keyword is the m-th word of the n-th sentence."""
    wanted = word_list(keyword)
    found = words_of_sentences(text)
    return n <= len(found) and found[n - 1][m - 1 : m - 1 + len(wanted)] == wanted


def start_end(text):
    """The first word is also the last, and nothing stands after it."""
    found = words(text)
    return len(found) > 1 and found[0] == found[-1] and bool(WORD.fullmatch(text.split()[-1]))


FOLLOWS |= {
    "copy:repeat_phrase": repeat_phrase,
    "copy:copy": copy,
    "copy:copying_simple": copy,
    "copy:copying_multiple": copying_multiple,
    "new:copy_span_idx": copy_span_idx,
    "detectable_format:sentence_hyphens": sentence_hyphens,
    "detectable_format:square_brackets": square_brackets,
    "detectable_format:bigram_wrapping": bigram_wrapping,
    "keywords:no_adjacent_consecutive": no_adjacent_consecutive,
    "keywords:word_once": word_once,
    "keywords:word_count_different_numbers": frequency,
    "keywords:exclude_word_harder": exclude_word_harder,
    "keywords:palindrome": palindrome,
    "keywords:keyword_specific_position": keyword_specific_position,
    "keywords:start_end": start_end,
    "paragraphs:paragraphs": paragraphs,
    "paragraphs:paragraphs2": paragraphs2,
    "first_word:first_word_sent": first_word_sent,
    "first_word:first_word_answer": first_word_answer,
    "last_word:last_word_sent": last_word_sent,
    "last_word:last_word_answer": last_word_answer,
    "punctuation:punctuation_dot": punctuation_dot,
    "punctuation:punctuation_exclamation": punctuation_exclamation,
    "count:lowercase_counting": lowercase_counting,
    "count:counting_composition": counting_composition,
    "count:count_unique": count_unique,
    "count:count_increment_word": count_increment_word,
    "letters:letter_counting": letter_counting,
    "letters:letter_counting2": letter_frequency,
}


def are_words(value):
    """A text with words, or a list that begins with one."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, str) and bool(words(first))


ARGUMENTS |= {
    Words: ("a text with words, or a list of one", are_words),
    Position: ("a whole number from 1 to 999999", lambda value: type(value) is int and 1 <= value < 1_000_000),
}
IMPOSSIBLE |= {
    "copy:repeat_phrase": lambda phrase, small_n: (
        f"{phrase!r:.80} has no word in its middle" if len(words(phrase)) < 3 else ""
    ),
    "new:copy_span_idx": lambda prompt_to_repeat, n_start, n_end: (
        "" if prompt_to_repeat[n_start:n_end].strip() else f"nothing stands from character {n_start} to {n_end}"
    ),
}
