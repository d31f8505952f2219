"""Did a response follow its instructions? The 25 instruction types of IFEval (arXiv 2311.07911), strict and loose.

    parse   a row's ground truth, in any of three published forms → a checked list of (instruction id, arguments)
    check   a response and that list → one bool per instruction

There is one plain function per instruction, listed by id in `FOLLOWS`. The rules are those of the Apache-2.0 reference,
google-research/instruction_following_eval, with these departures:

- `sentences` and `capital_word_frequency` split the text by a few rules of their own, where the reference uses nltk's
  punkt (a model that has to be downloaded) and word_tokenize. Their docstrings say how they differ.
- Keywords and markers are plain text; the reference reads them as regular expressions.
- An argument that is missing or wrong is an error. The reference draws a random one, for the letters # and ! too.
- Text without letters is in no language. The reference says that it is in whichever was asked for.

Responses are hostile: no function raises, every one is pure, and each takes near-linear time. That is why some count
pieces of a split where the reference has a regular expression that is quadratic on a megabyte of brackets.

Tülu 3's functions ask for the same things by other rules. Arguments with a default value are those differences: the
default is IFEval's rule, and `TULU` sets Tülu's.
"""

import ast
import difflib
import inspect
import json
import operator
import os
import re
from typing import NewType

from langdetect import DetectorFactory, LangDetectException, detect
from langdetect.detector_factory import PROFILES_DIRECTORY

DetectorFactory.seed = 0  # langdetect samples; the same text shall get the same language every time

LANGUAGES = sorted(os.listdir(PROFILES_DIRECTORY))
OPTIONS = ["My answer is yes.", "My answer is no.", "My answer is maybe."]
COMPARE = {"less than": operator.lt, "at least": operator.ge, "at most": operator.le, "exactly": operator.eq}
RELATIONS = [*COMPARE, "around"]
# Abbreviations that never end a sentence, and those that end one unless a small letter follows.
TITLES = set("mr mrs ms dr prof st rev hon gen col capt lt sgt rep sen gov vs approx dept est fig vol ave ph.d".split())
ENDINGS = set("etc inc ltd co corp jr sr al jan feb mar apr jun jul aug sep sept oct nov dec".split())

Relation = NewType("Relation", str)
Language = NewType("Language", str)
Letter = NewType("Letter", str)


def compare(count, relation, n, tolerance=None):
    """`count` stands in `relation` to `n`; "around" is within `tolerance`, by default a tenth of n, or 1."""
    if relation == "around":
        return abs(count - n) <= (tolerance or max(round(n * 0.1), 1))
    return COMPARE[relation](count, n)


def occurrences(text, keyword, whole_words):
    """How often `keyword` is in the text in any case, as plain text and, if asked, not as a part of longer words."""
    if not whole_words:
        return text.lower().count(keyword.lower())
    # Not \b as in the reference: after C++ that would ask for a word character.
    return len(re.findall(rf"(?<!\w){re.escape(keyword)}(?!\w)", text, re.IGNORECASE))


def sentences(text):
    """The number of sentences.

    A sentence ends with a word that ends in . ! or ?, closing quotes and brackets aside. It does not if the word is a
    title (from a fixed list) or letters with full stops (e.g. or U.S.), or if it is a number, an ellipsis or another
    abbreviation (from a list) and a small letter follows. Punkt knows more abbreviations and weighs their context.
    """

    def ends(word, following):
        word = word.strip("\"'”’)]}*_(“‘[")
        if not word.endswith("."):
            return word.endswith(("!", "?"))
        stem = word[:-1].lower()
        if stem in TITLES or re.fullmatch(r"([^\W\d_]\.)+", word):
            return False
        return not (following[0].islower() and (stem in ENDINGS or stem.endswith(tuple(".0123456789"))))

    words = text.split()
    return sum(map(ends, words, words[1:])) + bool(words)


def divided(text, divider):
    """The texts between dividers, blanks at both ends left out; [] if there is nothing between two dividers."""
    pieces = [piece.strip() for piece in text.split(divider)]
    return [piece for piece in pieces if piece] if all(pieces[1:-1]) else []


def in_language(text, language):
    """langdetect takes the text for this language. Text without letters is in none: no reward for "123"."""
    try:
        return detect(text[:100_000]) == language  # it looks at 10,000 characters, after it has taken out addresses
    except LangDetectException:
        return False


def existence(text, keywords: list):
    """Every keyword is in the text, in any case, be it inside a word."""
    return all(occurrences(text, keyword, False) for keyword in keywords)


def frequency(text, keyword: str, frequency: int, relation: Relation, whole_words: bool = False):
    """The keyword is in the text at least, less than, ... `frequency` times."""
    return compare(occurrences(text, keyword.strip(), whole_words), relation, frequency)


def forbidden_words(text, forbidden_words: list, whole_words: bool = True):
    """None of the words is in the text."""
    return not any(occurrences(text, word, whole_words) for word in forbidden_words)


def letter_frequency(text, letter: Letter, let_frequency: int, let_relation: Relation, case_sensitive: bool = False):
    """The letter, or other character, is in the text at least, less than, ... `let_frequency` times."""
    count = text.count(letter) if case_sensitive else text.lower().count(letter.lower())
    return compare(count, let_relation, let_frequency)


def response_language(text, language: Language):
    """The text is in this language."""
    return in_language(text, language)


def number_sentences(text, num_sentences: int, relation: Relation):
    """At least, less than, ... this many sentences; "around" is one more or less."""
    return compare(sentences(text), relation, num_sentences, tolerance=1)


def number_paragraphs(text, num_paragraphs: int, divider: str = "***"):
    """Exactly this many paragraphs, with dividers between them."""
    return len(divided(text, divider)) == num_paragraphs


def number_words(text, num_words: int, relation: Relation, by_spaces: bool = False):
    r"""At least, less than, ... this many words: runs of \w, so that "don't" is two, or what stands between spaces."""
    return compare(len(text.split() if by_spaces else re.findall(r"\w+", text)), relation, num_words)


def nth_paragraph_first_word(text, num_paragraphs: int, nth_paragraph: int, first_word: str, as_prefix: bool = False):
    """This many paragraphs with blank lines between; the nth begins with the word, in any case unless `as_prefix`."""
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    if sum(map(bool, paragraphs)) != num_paragraphs or not paragraphs[nth_paragraph - 1]:
        return False
    if as_prefix:
        return paragraphs[nth_paragraph - 1].startswith(first_word)
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split("[.,?!'\"]", word)[0].lower() == first_word.lower()


def number_placeholders(text, num_placeholders: int):
    """At least this many [placeholders], each on one line."""
    return sum("[" in part for line in text.split("\n") for part in line.split("]")[:-1]) >= num_placeholders


def postscript(text, postscript_marker: str):
    """The marker is somewhere in the text, in any case; P.S. and P.P.S may have a space after each full stop."""
    marker = postscript_marker.strip()
    pattern = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(marker, re.escape(marker.lower()))
    return re.search(pattern, text.lower()) is not None


def number_bullet_lists(text, num_bullets: int):
    """Exactly this many lines begin with - or with a single *."""
    return len([line for line in text.split("\n") if re.match(r"-|\*(?!\*)", line.lstrip())]) == num_bullets


def constrained_response(text, options: list = OPTIONS):
    """One of the options is in the text."""
    return any(option in text for option in options)


def number_highlighted_sections(text, num_highlights: int):
    """At least this many *highlights* or **highlights** with something in them, each on one line."""
    highlights = re.findall(r"\*[^\n*]*\*", text) + re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(bool(highlight.strip("*").strip()) for highlight in highlights) >= num_highlights


def multiple_sections(text, section_spliter: str, num_sections: int):
    """At least this many section heads: the splitter and a number."""
    return len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d+", text)) >= num_sections


def json_format(text):
    """The whole text is JSON, in a ``` fence or not."""
    text = re.sub("^```(json|Json|JSON)?", "", text.strip()).removesuffix("```")
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def title(text):
    """There is a <<title>> on one line."""
    spans = ((line, line.find("<<"), line.rfind(">>")) for line in text.split("\n"))
    return any(0 <= start < end and line[start:end].lstrip("<").rstrip(">").strip() for line, start, end in spans)


def two_responses(text):
    """Two responses that differ, with ****** between them."""
    responses = divided(text, "******")
    return len(responses) == 2 and responses[0] != responses[1]


def repeat_prompt(text, prompt_to_repeat: str):
    """The text begins with the prompt, in any case."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text, end_phrase: str):
    """The text ends with the phrase, in any case, double quotes after it aside."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def capital_word_frequency(text, capital_frequency: int, capital_relation: Relation):
    """At least, less than, ... this many words in capitals; a word is a run of letters, digits and . / - characters.

    So U.S. and AND/OR are one, I'm has one and DON'T two, as in the reference. That takes A=B and A*B for one as well.
    """
    return compare(sum(map(str.isupper, re.findall(r"[\w./-]+", text))), capital_relation, capital_frequency)


def english_capital(text, any_language: bool = False):
    """English, and no letter is small."""
    return text.isupper() and (any_language or in_language(text, "en"))


def english_lowercase(text, any_language: bool = False):
    """English, and no letter is a capital."""
    return text.islower() and (any_language or in_language(text, "en"))


def no_comma(text):
    """There is no comma."""
    return "," not in text


def quotation(text):
    """The text is wrapped in double quotation marks."""
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


FOLLOWS = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}

# Tülu 3's functions: the instruction, its arguments in terms of Tülu's, and what Tülu's rule adds.
TULU = {
    "verify_keywords": ("keywords:existence", {"keywords": "keyword_list"}, {}),
    "verify_keyword_frequency": (
        "keywords:frequency", {"keyword": "word", "frequency": "N"}, {"relation": "exactly", "whole_words": True},
    ),
    "validate_forbidden_words": (
        "keywords:forbidden_words", {"forbidden_words": "forbidden_words"}, {"whole_words": False},
    ),
    "verify_letter_frequency": (
        "keywords:letter_frequency", {"letter": "letter", "let_frequency": "N"},
        {"let_relation": "exactly", "case_sensitive": True},
    ),
    "validate_response_language": ("language:response_language", {"language": "language"}, {}),
    "verify_sentence_constraint": (
        "length_constraints:number_sentences", {"num_sentences": "N", "relation": "quantifier"}, {},
    ),
    "verify_paragraph_count": ("length_constraints:number_paragraphs", {"num_paragraphs": "N"}, {"divider": "* * *"}),
    "validate_word_constraint": (
        "length_constraints:number_words", {"num_words": "N", "relation": "quantifier"}, {"by_spaces": True},
    ),
    "validate_paragraphs": (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": "N", "nth_paragraph": "i", "first_word": "first_word"}, {"as_prefix": True},
    ),
    "validate_placeholders": ("detectable_content:number_placeholders", {"num_placeholders": "N"}, {}),
    "verify_postscript": ("detectable_content:postscript", {"postscript_marker": "postscript_marker"}, {}),
    "verify_bullet_points": ("detectable_format:number_bullet_lists", {"num_bullets": "N"}, {}),
    "validate_choice": ("detectable_format:constrained_response", {"options": "options"}, {}),
    "validate_highlighted_sections": ("detectable_format:number_highlighted_sections", {"num_highlights": "N"}, {}),
    "validate_sections": (
        "detectable_format:multiple_sections", {"section_spliter": "section_splitter", "num_sections": "N"}, {},
    ),
    "validate_json_format": ("detectable_format:json_format", {}, {}),
    "validate_title": ("detectable_format:title", {}, {}),
    "validate_two_responses": ("combination:two_responses", {}, {}),
    "validate_repeat_prompt": ("combination:repeat_prompt", {"prompt_to_repeat": "original_prompt"}, {}),
    "validate_end": ("startend:end_checker", {"end_phrase": "end_phrase"}, {}),
    "validate_quotation": ("startend:quotation", {}, {}),
    "validate_frequency_capital_words": (
        "change_case:capital_word_frequency", {"capital_frequency": "N", "capital_relation": "quantifier"}, {},
    ),
    "validate_uppercase": ("change_case:english_capital", {}, {"any_language": True}),
    "validate_lowercase": ("change_case:english_lowercase", {}, {"any_language": True}),
    "validate_no_commas": ("punctuation:no_comma", {}, {}),
}  # fmt: skip


def is_text(value):
    """A string that is not blank."""
    return isinstance(value, str) and bool(value.strip())


# For each type of argument: what it has to be, and a test.
ARGUMENTS = {
    int: ("a whole number from 0 to 999999", lambda v: type(v) is int and 0 <= v < 1_000_000),
    str: ("a text that is not blank", is_text),
    list: ("a list of texts that are not blank", lambda v: isinstance(v, list) and v and all(map(is_text, v))),
    bool: ("true or false", lambda v: isinstance(v, bool)),
    Relation: (f"one of {RELATIONS}", lambda v: v in RELATIONS),
    Language: (f"one of langdetect's codes {LANGUAGES}", lambda v: v in LANGUAGES),
    Letter: ("a single character", lambda v: isinstance(v, str) and len(v) == 1),
}


def decode(text):
    """What a JSON string or, as OLMo 3's rows are published, a Python literal stands for. Raises ValueError."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise ValueError(f"ground truth is neither JSON nor a Python literal: {text[:80]!r}")


def known(name, table, what):
    """`table[name]`. Raises ValueError, which lists names that are near, if there is none."""
    if isinstance(name, str) and name in table:
        return table[name]
    near = difflib.get_close_matches(str(name)[:100], table, n=3, cutoff=0.4)
    raise ValueError(f"unknown {what} {str(name)[:100]!r}" + (f"; near: {', '.join(near)}" if near else ""))


def checked(instruction, arguments, theirs, where):
    """`arguments` without nulls, if they suit the instruction. Raises ValueError with the names that the row has."""
    if not isinstance(arguments, dict | None):
        raise ValueError(f"{where}: arguments have to be an object, not {arguments!r:.80}")
    arguments = {name: value for name, value in (arguments or {}).items() if value is not None}
    _, *parameters = inspect.signature(known(instruction, FOLLOWS, "instruction")).parameters.values()
    surplus = sorted(arguments.keys() - {parameter.name for parameter in parameters}, key=str)
    if surplus:
        raise ValueError(f"{where}: takes no argument {surplus[0]!r}")
    for parameter in parameters:
        name, (wanted, suits) = parameter.name, ARGUMENTS[parameter.annotation]
        shown = theirs.get(name, name)
        if name not in arguments and parameter.default is parameter.empty:
            raise ValueError(f"{where}: argument {shown!r} is missing: {wanted}")
        if name in arguments and not suits(arguments[name]):
            raise ValueError(f"{where}: {shown!r} has to be {wanted}, not {arguments[name]!r:.80}")
    nth, last = arguments.get("nth_paragraph", 1), arguments.get("num_paragraphs", 1)
    if instruction == "length_constraints:nth_paragraph_first_word" and not 1 <= nth <= last:
        raise ValueError(f"{where}: there is no paragraph {nth} of {last}")
    return arguments


def parse(ground_truth):
    """A row's ground truth → [(instruction id, arguments)], checked.

    Args:
        ground_truth: an object, or a string with its JSON or Python literal, in one of these forms; nulls are left out.
            IFEval's rows, with whatever other columns: {"instruction_id_list": [...], "kwargs": [{...}, ...]}.
            OLMo 3's IF_multi_constraints_upto5: [{"instruction_id": [...], "kwargs": [{...} or null, ...]}]. Of its 54
            instructions the 25 of IFEval are here; another is an unknown one.
            Tülu 3's RLVR-IFeval: {"func_name": "verify_keywords", "keyword_list": [...], "N": null, ...}.

    Raises:
        ValueError: one line that names the instruction or function, the argument, and what it has to be.
    """
    row = decode(ground_truth) if isinstance(ground_truth, str) else ground_truth
    if isinstance(row, list) and len(row) == 1:
        row = decode(row[0]) if isinstance(row[0], str) else row[0]
    if not isinstance(row, dict):
        raise ValueError(f"ground truth has to be an object, or a list of one: {row!r:.80}")
    if "func_name" in row:
        function = row["func_name"]
        instruction, theirs, fixed = known(function, TULU, "function")
        given = {name: value for name, value in row.items() if name != "func_name"}
        ours = {name: given.pop(their) for name, their in theirs.items() if their in given}
        return [(instruction, checked(instruction, given | ours | fixed, theirs, f"{function} ({instruction})"))]
    ids = row.get("instruction_id_list", row.get("instruction_id"))
    arguments = row.get("kwargs")
    if not isinstance(ids, list) or not isinstance(arguments, list) or not ids:
        raise ValueError("ground truth has neither `func_name` nor lists `instruction_id_list` and `kwargs`")
    if len(ids) != len(arguments):
        raise ValueError(f"ground truth has {len(ids)} instructions and {len(arguments)} kwargs")
    return [(name, checked(name, kwargs, {}, name)) for name, kwargs in zip(ids, arguments, strict=True)]


def check(completion, instructions, loose=False):
    """Whether the completion follows each of parse's instructions.

    Args:
        completion: the response; a blank one follows nothing.
        instructions: what `parse` returned.
        loose: also try it without its first line, without its last, without both, and each of the four without any *,
            and count an instruction as followed if any of the eight follows it.

    Returns:
        One bool per instruction.
    """
    texts = [completion]
    if loose:
        lines = completion.split("\n")
        texts += ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
        texts += [text.replace("*", "") for text in texts]
    texts = [text for text in dict.fromkeys(texts) if text.strip()]
    return [any(FOLLOWS[name](text, **arguments) for text in texts) for name, arguments in instructions]
