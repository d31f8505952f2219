"""Did a response follow its instructions? The 25 instruction types of IFEval (arXiv 2311.07911), strict and loose.

    parse   a row's ground truth, in any of three published forms → a checked list of (instruction id, arguments)
    check   a response and that list → one bool per instruction

There is one plain function per instruction, listed by id in `FOLLOWS`; ifevalg.py adds those of OLMo 3. The rules are
those of the Apache-2.0 reference, google-research/instruction_following_eval, with these departures:

- `sentences` and `capital_word_frequency` split the text by a few rules of their own, where the reference uses nltk's
  punkt (a model that has to be downloaded) and word_tokenize. Their docstrings say how they differ.
- A rule is no bullet, nor is a line that begins with *emphasis*.
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
import unicodedata
from itertools import pairwise
from typing import NamedTuple, NewType

import regex
from langdetect import DetectorFactory, LangDetectException, detect
from langdetect.detector_factory import PROFILES_DIRECTORY

from rewards.strings import SPACELESS
from rewards.verifiers import Verdict, verifier

DetectorFactory.seed = 0  # langdetect samples; the same text shall get the same language every time

LANGUAGES = sorted(os.listdir(PROFILES_DIRECTORY))
OPTIONS = ["My answer is yes.", "My answer is no.", "My answer is maybe."]
COMPARE = {
    "less than": operator.lt,
    "at least": operator.ge,
    "at most": operator.le,
    "exactly": operator.eq,
}
RELATIONS = [*COMPARE, "around"]
# The full stops of other scripts, closing quotes and brackets with them; the number or letter of a list's item.
OTHER_FULL_STOPS = regex.compile(r"(?V1)[\p{Sentence_Terminal}--[.!?]]+[\p{Pe}\p{Pf}\"']*")
ITEM = re.compile(r"[(*]*([0-9]{1,2}|[A-Za-z])[.)]\**")
# Abbreviations that never end a sentence, and those that end one unless a small letter follows.
TITLES = set(
    "mr mrs ms dr prof st mt rev hon gen col capt lt sgt rep sen gov vs approx dept est fig vol ave i.e e.g cf".split()
)
ENDINGS = set("etc inc ltd co corp jr sr al jan feb mar apr jun jul aug sep sept oct nov dec".split())
# Words that, with a capital, begin a sentence after U.S. and other letters with full stops.
STARTERS = set(
    "The A An This That These Those It He She We They I You There Here His Her Its Our Their My Your But And So Or If "
    "In On At For As When While After Before However Then What Who Why How Yes No Not".split()
)

Relation = NewType("Relation", str)
Language = NewType("Language", str)
Letter = NewType("Letter", str)


def compare(count, relation, n, tolerance=None):
    """`count` stands in `relation` to `n`; "around" is within `tolerance`, by default a tenth of n, or 1."""
    if relation == "around":
        if tolerance is None:
            tolerance = max(round(n * 0.1), 1)
        return abs(count - n) <= tolerance
    return COMPARE[relation](count, n)


def occurrences(text, keyword, whole_words):
    """How often `keyword` is in the text in any case, as plain text and, if asked, not as a part of longer words."""
    text = unicodedata.normalize("NFC", text)
    keyword = unicodedata.normalize("NFC", keyword)
    if not whole_words:
        return text.lower().count(keyword.lower())
    # Not \b as in the reference: after C++ that would ask for a word character. And some scripts have no spaces.
    letter = rf"[[\w\p{{M}}]--{SPACELESS}]"
    before = "" if regex.match(SPACELESS, keyword[0]) else f"(?<!{letter})"
    after = "" if regex.match(SPACELESS, keyword[-1]) else f"(?!{letter})"
    return len(regex.findall(f"(?V1i){before}{regex.escape(keyword)}{after}", text))


def sentences(text):
    """The sentences of a text, in order.

    A sentence ends with a word that ends in . ! or ?, closing quotes and brackets aside, or with the full stop of
    another script (。 । ؟), where no space has to follow. It does not if the word is a title (from a fixed list) or
    the number of a list's item (1. or a.); if it is a number, an ellipsis or another abbreviation (from a list) and a
    small letter follows; or if it is letters with full stops (e.g. or U.S.) and no word follows that often begins
    sentences (from a list, such as The). Punkt knows more abbreviations and weighs their context.
    """
    found = []
    sentence = []
    lines = [OTHER_FULL_STOPS.sub(r"\g<0> ", line).split() for line in text.split("\n")]
    words = [(word, position == 0) for line in lines for position, word in enumerate(line)]
    words.append(("", False))
    for (word, begins_line), (following, _) in pairwise(words):
        is_number = (begins_line or not sentence) and ITEM.fullmatch(word)
        sentence.append(word)
        if not is_number and ends_sentence(word, following):
            found.append(" ".join(sentence))
            sentence = []
    return [*found, " ".join(sentence)] if sentence else found


def ends_sentence(word, following):
    """Whether a sentence ends between these two words, by the rules of `sentences`."""
    word = word.strip("\"'”’)]}*_(“‘[").replace("…", "...")
    if not word.endswith("."):
        return word.endswith(("!", "?")) or bool(OTHER_FULL_STOPS.search(word))
    stem = word[:-1].lower()
    if stem in TITLES:
        return False
    if re.fullmatch(r"([^\W\d_]\.)+|Ph\.D\.", word):
        return following.lstrip("\"'“‘([*_") in STARTERS
    if stem in ENDINGS and following[:1].isdecimal():
        return False  # Jan. 5
    may_go_on = stem in ENDINGS or stem.endswith(tuple(".0123456789"))
    return not (may_go_on and following[:1].islower())


def divided(text, divider):
    """The texts between dividers, blanks at both ends left out; [] if there is nothing between two dividers."""
    pieces = [piece.strip() for piece in text.split(divider)]
    if not all(pieces[1:-1]):
        return []
    return [piece for piece in pieces if piece]


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
    if not case_sensitive:
        text = text.lower()
        letter = letter.lower()
    return compare(text.count(letter), let_relation, let_frequency)


def response_language(text, language: Language):
    """The text is in this language."""
    return in_language(text, language)


def number_sentences(text, num_sentences: int, relation: Relation):
    """At least, less than, ... this many sentences; "around" is one more or less."""
    return compare(len(sentences(text)), relation, num_sentences, tolerance=1)


def number_paragraphs(text, num_paragraphs: int, divider: str = "***"):
    """Exactly this many paragraphs, with dividers between them."""
    return len(divided(text, divider)) == num_paragraphs


def number_words(text, num_words: int, relation: Relation, by_spaces: bool = False):
    r"""At least, less than, ... this many words: runs of \w, so that "don't" is two, or what stands between spaces."""
    words = text.split() if by_spaces else re.findall(r"\w+", text)
    return compare(len(words), relation, num_words)


def nth_paragraph_first_word(text, num_paragraphs: int, nth_paragraph: int, first_word: str, as_prefix: bool = False):
    """This many paragraphs with blank lines between; the nth begins with the word, in any case unless `as_prefix`."""
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    if sum(map(bool, paragraphs)) != num_paragraphs:
        return False
    paragraph = paragraphs[nth_paragraph - 1]
    if not paragraph:
        return False
    if as_prefix:
        return paragraph.startswith(first_word)
    word = paragraph.split()[0].lstrip("'").lstrip('"')
    word = re.split("[.,?!'\"]", word)[0]
    return word.lower() == first_word.lower()


def number_placeholders(text, num_placeholders: int):
    """At least this many [placeholders], each on one line."""
    count = 0
    for line in text.split("\n"):
        *before_brackets, _ = line.split("]")
        count += sum("[" in piece for piece in before_brackets)
    return count >= num_placeholders


def postscript(text, postscript_marker: str):
    """The marker is somewhere in the text, in any case; P.S. and P.P.S may have a space after each full stop."""
    marker = postscript_marker.strip()
    if marker == "P.P.S":
        pattern = r"p\.\s?p\.\s?s"
    elif marker == "P.S.":
        pattern = r"p\.\s?s\."
    else:
        pattern = re.escape(marker.lower())
    return re.search(pattern, text.lower()) is not None


# A rule; words in single asterisks.
NO_BULLET = r"([-*])(\s*\1){2,}$|\*[^\s*]([^*]*[^\s*])?\*(?!\*)"


def number_bullet_lists(text, num_bullets: int):
    """Exactly this many lines begin with - or with a single *.

    A rule (---, * * *) is no bullet, nor is *emphasis* at the beginning of a line; the reference counts both.
    """
    lines = [line.strip() for line in text.split("\n")]
    bullets = [line for line in lines if re.match(r"-|\*(?!\*)", line) and not re.match(NO_BULLET, line)]
    return len(bullets) == num_bullets


def constrained_response(text, options: list = OPTIONS):
    """One of the options is in the text."""
    return any(option in text for option in options)


def number_highlighted_sections(text, num_highlights: int):
    """At least this many *highlights* or **highlights** with something in them, each on one line."""
    highlights = re.findall(r"\*[^\n*]*\*", text) + re.findall(r"\*\*[^\n*]*\*\*", text)
    filled = [highlight for highlight in highlights if highlight.strip("*").strip()]
    return len(filled) >= num_highlights


def multiple_sections(text, section_spliter: str, num_sections: int):
    """At least this many section heads: the splitter and a number."""
    splitter = re.escape(section_spliter.strip())
    heads = re.findall(splitter + r"\s?\d+", text)
    return len(heads) >= num_sections


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
    for line in text.split("\n"):
        start = line.find("<<")
        end = line.rfind(">>")
        if 0 <= start < end:
            content = line[start:end].lstrip("<").rstrip(">").strip()
            if content:
                return True
    return False


def two_responses(text):
    """Two responses that differ, with ****** between them."""
    responses = divided(text, "******")
    return len(responses) == 2 and responses[0] != responses[1]


def repeat_prompt(text, prompt_to_repeat: str):
    """The text begins with the prompt, in any case."""
    prompt = prompt_to_repeat.strip().lower()
    return text.strip().lower().startswith(prompt)


def end_checker(text, end_phrase: str):
    """The text ends with the phrase, in any case, double quotes after it aside."""
    phrase = end_phrase.strip().lower()
    return text.strip().strip('"').lower().endswith(phrase)


def capital_word_frequency(text, capital_frequency: int, capital_relation: Relation):
    """At least, less than, ... this many words in capitals; a word is a run of letters, digits and . / - characters.

    So U.S. and AND/OR are one, I'm has one and DON'T two, as in the reference. That takes A=B and A*B for one as well.
    """
    words = re.findall(r"[\w./-]+", text)
    count = sum(word.isupper() for word in words)
    return compare(count, capital_relation, capital_frequency)


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


class TuluFunction(NamedTuple):
    """What a function of Tülu 3 asks for, as one of our instructions."""

    instruction: str
    names: dict = {}  # of its arguments: ours → Tülu's
    fixed: dict = {}  # arguments that Tülu's rule adds


TULU = {
    "verify_keywords": TuluFunction("keywords:existence", names={"keywords": "keyword_list"}),
    "verify_keyword_frequency": TuluFunction(
        "keywords:frequency",
        names={"keyword": "word", "frequency": "N"},
        fixed={"relation": "exactly", "whole_words": True},
    ),
    "validate_forbidden_words": TuluFunction(
        "keywords:forbidden_words",
        names={"forbidden_words": "forbidden_words"},
        fixed={"whole_words": False},
    ),
    "verify_letter_frequency": TuluFunction(
        "keywords:letter_frequency",
        names={"letter": "letter", "let_frequency": "N"},
        fixed={"let_relation": "exactly", "case_sensitive": True},
    ),
    "validate_response_language": TuluFunction("language:response_language", names={"language": "language"}),
    "verify_sentence_constraint": TuluFunction(
        "length_constraints:number_sentences",
        names={"num_sentences": "N", "relation": "quantifier"},
    ),
    "verify_paragraph_count": TuluFunction(
        "length_constraints:number_paragraphs",
        names={"num_paragraphs": "N"},
        fixed={"divider": "* * *"},
    ),
    "validate_word_constraint": TuluFunction(
        "length_constraints:number_words",
        names={"num_words": "N", "relation": "quantifier"},
        fixed={"by_spaces": True},
    ),
    "validate_paragraphs": TuluFunction(
        "length_constraints:nth_paragraph_first_word",
        names={"num_paragraphs": "N", "nth_paragraph": "i", "first_word": "first_word"},
        fixed={"as_prefix": True},
    ),
    "validate_placeholders": TuluFunction("detectable_content:number_placeholders", names={"num_placeholders": "N"}),
    "verify_postscript": TuluFunction(
        "detectable_content:postscript",
        names={"postscript_marker": "postscript_marker"},
    ),
    "verify_bullet_points": TuluFunction("detectable_format:number_bullet_lists", names={"num_bullets": "N"}),
    "validate_choice": TuluFunction("detectable_format:constrained_response", names={"options": "options"}),
    "validate_highlighted_sections": TuluFunction(
        "detectable_format:number_highlighted_sections",
        names={"num_highlights": "N"},
    ),
    "validate_sections": TuluFunction(
        "detectable_format:multiple_sections",
        names={"section_spliter": "section_splitter", "num_sections": "N"},
    ),
    "validate_json_format": TuluFunction("detectable_format:json_format"),
    "validate_title": TuluFunction("detectable_format:title"),
    "validate_two_responses": TuluFunction("combination:two_responses"),
    "validate_repeat_prompt": TuluFunction("combination:repeat_prompt", names={"prompt_to_repeat": "original_prompt"}),
    "validate_end": TuluFunction("startend:end_checker", names={"end_phrase": "end_phrase"}),
    "validate_quotation": TuluFunction("startend:quotation"),
    "validate_frequency_capital_words": TuluFunction(
        "change_case:capital_word_frequency",
        names={"capital_frequency": "N", "capital_relation": "quantifier"},
    ),
    "validate_uppercase": TuluFunction("change_case:english_capital", fixed={"any_language": True}),
    "validate_lowercase": TuluFunction("change_case:english_lowercase", fixed={"any_language": True}),
    "validate_no_commas": TuluFunction("punctuation:no_comma"),
}


def is_text(value):
    """A string that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def is_texts(value):
    """A list of such strings, with one at least."""
    return isinstance(value, list) and bool(value) and all(map(is_text, value))


def is_count(value):
    """A whole number in a range that makes sense. True and 5.0 are none."""
    return type(value) is int and 0 <= value < 1_000_000


# For each type of argument: what it has to be, and a test.
ARGUMENTS = {
    int: ("a whole number from 0 to 999999", is_count),
    str: ("a text that is not blank", is_text),
    list: ("a list of texts that are not blank", is_texts),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    Relation: (f"one of {RELATIONS}", lambda value: value in RELATIONS),
    Language: (f"one of langdetect's codes {LANGUAGES}", lambda value: value in LANGUAGES),
    Letter: ("a single character", lambda value: isinstance(value, str) and len(value) == 1),
}

# For instructions whose arguments suit, but perhaps not each other: what is wrong with them, or "".
IMPOSSIBLE = {
    "length_constraints:nth_paragraph_first_word": lambda num_paragraphs, nth_paragraph, **_: (
        "" if 1 <= nth_paragraph <= num_paragraphs else f"there is no paragraph {nth_paragraph} of {num_paragraphs}"
    ),
}


def decoded(given):
    """What a JSON string or, as OLMo 3's rows are published, a Python literal stands for; anything else as it is.

    Raises ValueError.
    """
    if not isinstance(given, str):
        return given
    for read in (json.loads, ast.literal_eval):
        try:
            return read(given)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise ValueError(f"ground truth is neither JSON nor a Python literal: {given[:80]!r}")


def known(name, table, what):
    """`table[name]`. Raises ValueError, which lists names that are near, if there is none."""
    if isinstance(name, str) and name in table:
        return table[name]
    given = str(name)[:100]
    message = f"unknown {what} {given!r}"
    near = difflib.get_close_matches(given, table, n=3, cutoff=0.4)
    if near:
        message += f"; near: {', '.join(near)}"
    raise ValueError(message)


def checked(instruction, arguments, theirs, where):
    """Arguments of an instruction, without nulls, if they suit it.

    Args:
        instruction: its id.
        arguments: {name: value}, or None for none.
        theirs: {our name: the row's}, for messages; names that are not in it are the same.
        where: what messages begin with.

    Raises:
        ValueError: with the names that the row has.
    """
    if not isinstance(arguments, dict | None):
        raise ValueError(f"{where}: arguments have to be an object, not {arguments!r:.80}")
    given = {name: value for name, value in (arguments or {}).items() if value is not None}
    _, *parameters = inspect.signature(known(instruction, FOLLOWS, "instruction")).parameters.values()
    surplus = given.keys() - {parameter.name for parameter in parameters}
    if surplus:
        first = min(surplus, key=str)
        raise ValueError(f"{where}: takes no argument {first!r}")
    for parameter in parameters:
        name = parameter.name
        shown = theirs.get(name, name)
        wanted, suits = ARGUMENTS[parameter.annotation]
        if name not in given and parameter.default is parameter.empty:
            raise ValueError(f"{where}: argument {shown!r} is missing: {wanted}")
        if name in given and not suits(given[name]):
            raise ValueError(f"{where}: {shown!r} has to be {wanted}, not {given[name]!r:.80}")
    problem = IMPOSSIBLE[instruction](**given) if instruction in IMPOSSIBLE else ""
    if problem:
        raise ValueError(f"{where}: {problem}")
    return given


def parse(ground_truth):
    """A row's ground truth → [(instruction id, arguments)], checked.

    Args:
        ground_truth: an object, or a string with its JSON or Python literal, in one of these forms; nulls are left out.
            IFEval's rows, with whatever other columns: {"instruction_id_list": [...], "kwargs": [{...}, ...]}.
            OLMo 3's IF_multi_constraints_upto5: [{"instruction_id": [...], "kwargs": [{...} or null, ...]}].
            Tülu 3's RLVR-IFeval: {"func_name": "verify_keywords", "keyword_list": [...], "N": null, ...}.

    Raises:
        ValueError: one line that names the instruction or function, the argument, and what it has to be.
    """
    row = decoded(ground_truth)
    if isinstance(row, list) and len(row) == 1:
        row = decoded(row[0])
    if not isinstance(row, dict):
        raise ValueError(f"ground truth has to be an object, or a list of one: {row!r:.80}")
    if "func_name" in row:
        return [parse_tulu(row)]
    ids = row.get("instruction_id_list", row.get("instruction_id"))
    arguments = row.get("kwargs")
    if not isinstance(ids, list) or not isinstance(arguments, list) or not ids:
        raise ValueError("ground truth has neither `func_name` nor lists `instruction_id_list` and `kwargs`")
    if len(ids) != len(arguments):
        raise ValueError(f"ground truth has {len(ids)} instructions and {len(arguments)} kwargs")
    instructions = []
    for instruction, given in zip(ids, arguments, strict=True):
        instructions.append((instruction, checked(instruction, given, {}, instruction)))
    return instructions


def parse_tulu(row):
    """(instruction id, arguments) of a row of Tülu 3's RLVR-IFeval. Raises ValueError, as `parse` does."""
    function = row["func_name"]
    instruction, names, fixed = known(function, TULU, "function")
    given = {name: value for name, value in row.items() if name != "func_name"}
    arguments = {}
    for ours, theirs in names.items():
        if theirs in given:
            arguments[ours] = given.pop(theirs)
    arguments = given | arguments | fixed  # what is left in `given` is an error, unless it is null
    return instruction, checked(instruction, arguments, names, f"{function} ({instruction})")


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
        for part in (lines[1:], lines[:-1], lines[1:-1]):
            texts.append("\n".join(part).strip())
        texts += [text.replace("*", "") for text in texts]
    texts = [text for text in dict.fromkeys(texts) if text.strip()]  # each once
    followed = []
    for name, arguments in instructions:
        follows = FOLLOWS[name]
        followed.append(any(follows(text, **arguments) for text in texts))
    return followed


@verifier("ifeval", gold=parse)
def follows_instructions(completion, instructions, loose=False):
    """Zhou et al. 2023 (arXiv 2311.07911): the share of instructions followed.

    That is the reward in OLMo 3's code; its text asks for all of them, which is `ifeval_strict`.
    """
    if not any(map(str.isalnum, completion)):
        return Verdict(0.0, "unparsed")  # an invisible character would follow every "do not"
    followed = check(completion, instructions, loose)
    missed = [name for (name, _), right in zip(instructions, followed, strict=True) if not right]
    share = sum(followed) / len(followed)
    if missed:
        return share, f"not followed: {', '.join(missed)}"
    return share, "all followed"


@verifier("ifeval_strict", gold=parse)
def follows_every_instruction(completion, instructions):
    """1 if all instructions are followed, else 0: the reward as OLMo 3's text has it (arXiv 2512.13961).

    Strict is this "all or nothing"; the reading of the text is that of `ifeval`, which IFEval calls strict.
    """
    verdict = follows_instructions(completion, instructions)
    return verdict if isinstance(verdict, Verdict) else (verdict[0] == 1, verdict[1])


@verifier("ifeval_loose", gold=parse)
def loosely_follows_instructions(completion, instructions):
    """The share by IFEval's loose reading: a first or last line, or asterisks, may be left out."""
    return follows_instructions(completion, instructions, loose=True)
