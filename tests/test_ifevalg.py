"""Each of OLMo 3's instructions follows its rule, its rows are read, and no text is too hostile."""

import inspect
import json
import random
from functools import partial

import pytest
from conftest import seconds_of
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import judge
from rewards.ifeval import FOLLOWS, check, parse

PHRASE = "Dance like nobody is watching you"

# id: [(arguments, texts that follow, texts that do not)]
CASES = {
    "copy:repeat_phrase": [
        (
            {"phrase": PHRASE, "small_n": 2},
            ["Dance like everybody is watching you. Dance like nobody was watching you!", "“Dance like NO is watching you,”\nshe said: dance like nobody is hearing you"],
            ["Dance like everybody is watching you.", f"Dance like everybody is watching you. {PHRASE}", "Dance like all is watching you. Dance like some is hearing you.", "Dance like all is watching you. " * 3, "Dance like all is watching you. Dance like nobody watching you.", f"Dance like all is watching you. Dance like some is watching you. {PHRASE}", "Dance"],
        ),
        ({"phrase": "a b c", "small_n": 1}, ["a x c", "a a x c"], ["a b c", "a x c a y c", "x b c"]),
    ],
    "copy:copy": [({"prompt_to_repeat": " Write a poem. "}, ["write A poem.\n"], ["Write a poem. Roses", "Write a poem"])],
    "copy:copying_simple": [({"prompt_to_repeat": "Write a poem."}, ["  WRITE a poem."], ["Sure: Write a poem.", "Roses"])],
    "copy:copying_multiple": [
        ({"prompt_to_repeat": "Hi.", "N": 2}, ["Hi.******hi.", "Hi.\n******\nHi.\n"], ["Hi.", "Hi.***Hi.", "Hi.******Hi.******Hi.", "Hi.******Ho.", "Hi.******", "Hi.************Hi."]),
    ],
    "new:copy_span_idx": [
        ({"prompt_to_repeat": "Write a poem.", "n_start": 0, "n_end": 5}, ["Write", " WRITE\n"], ["Writ", "Write a", "a"]),
        ({"prompt_to_repeat": "Write a poem.", "n_start": 8, "n_end": 10}, ["po", "poe"], ["poem", "p", "oe"]),  # 10 in, or out
    ],
    "detectable_format:sentence_hyphens": [
        ({}, ["It is so.-Is it?-Yes!", "A well-known man.-He left.", "One sentence", "3.14 is pi.-Yes.", "Mr. Smith came.-He left.", "我来了。-我看见了。", "“Yes.”-He left.", "It is so.-Is it?-"], ["It is so. Is it?", "It is so. -Is it?", "It is so.- Is it?", "It is so.\nIs it?", "It is so\nit is", "It is so.Is it?", "It is so - is it?", "It is so.-Is it? Yes!", "我来了。我看见了。", "- It is so."]),
    ],
    "detectable_format:square_brackets": [
        ({}, ["[It] [is] [so].", "[It] [is], [so]!", "[It][is]\n[3.5]", "[[It]] [is]", "[It] — [is]", "“[It] [is]”"], ["[It] is [so]", "[It is so]", "It is so", "[] [It] so", "[It]is[so]", "[It is]", "[", "[It] [is", "(It) (is)"]),
    ],
    "detectable_format:bigram_wrapping": [
        ({}, ["<<I am>> <<at home>>", "<<I am>> <<at home>> <<now>>", "<<I am>> <<at home>> now.", "<<I am>>, <<at\nhome>>."], ["I am at home", "<<I am>> at home", "<<I>> <<am>>", "<<I am at home>>", "<I am> <at home>", "yes", "<<yes>>", "<<I am>><<at home>>", "<<I>> am>>"]),
    ],
    "keywords:no_adjacent_consecutive": [
        ({}, ["Apples can grow", "banana apple", "a a a", "1 2 3", "it is (so)", "Zebras are", "est être"], ["an (big) cat", "Apples “Bananas”", "go home", "dé été", "Ça dit", "а б", "up - very", "one pear"]),
    ],
    "keywords:word_once": [
        ({"keyword": " cat "}, ["A Cat.", "category"], ["dog", "cat cat", "cat, category"]),
        ({"keyword": "c.t"}, ["c.t cat"], ["cat"]),
        ({"keyword": "C++"}, ["I use c++"], ["C", "C++ C++"]),
    ],
    "keywords:word_count_different_numbers": [
        ({"keyword": "cat", "frequency": 2, "relation": "at least"}, ["cat Cats", "cat cat cat"], ["cat", "dog"]),
        ({"keyword": "cat", "frequency": 2, "relation": "less than"}, ["cat", "dog"], ["cat cat"]),
    ],
    "keywords:exclude_word_harder": [
        ({"keyword": "cat"}, ["category", "dog"], ["a cat is", "cat, dog", "Cat", "the cat."]),
        ({"keyword": "cat", "instruction": "The cat."}, ["dog"], ["cat"]),
    ],
    "keywords:palindrome": [
        ({}, ["It is a level.", "Wow!", "Anna came", "“A man, a plan, a canal: Panama” is one", "Never odd or even. Yes.", "Say: was it a car or a cat I saw?\nYes", "in 1991", "été"], ["A dog is here, I say.", "I", "aa bb", "... --- ...", "ab bc", "level-headed"]),
    ],
    "keywords:keyword_specific_position": [
        ({"keyword": "cat", "n": 2, "m": 3}, ["Yes. It, the Cat, sleeps.", "Yes. It the cat.", "Yes! 1. It the cat sleeps", "Yes. “The black cat” sleeps."], ["Yes. The cat sleeps.", "It the cat sleeps.", "Yes. It the cats sleep.", "Yes. It the.", "It the cat. It is."]),
        ({"keyword": ["New York"], "n": 1, "m": 2}, ["In New York it rains."], ["In York it rains.", "New York", "In New"]),
    ],
    "keywords:start_end": [
        ({}, ["Yes it is yes", "yes, it is Yes", "“Yes” she said yes", "don’t say don't", "Yes yes"], ["Yes it is yes.", "Yes it is yes!", "Yes", "Yes it is", ", so ,", "Yes it is “yes”"]),
    ],
    "paragraphs:paragraphs": [({}, ["a***b", "a\n***\nb\n***", "***\na\n***\nb"], ["a", "a\n\nb", "a***b***c", "a******b", "a * * * b"])],
    "paragraphs:paragraphs2": [({}, ["a\n\nb", "a\nb\n\nc\n\n", "\n\na\n\nb"], ["a", "a\nb", "a\n\nb\n\nc", "a\n\n\n\nb", "a***b"])],
    "first_word:first_word_sent": [
        ({"first_word": "yes"}, ["Yes it is. Yes, I know!", "“Yes,” he said. YES", "1. Yes it is.\n2. Yes I know.", "Yes"], ["Yes it is. I know.", "Yesterday it was.", "It is. Yes.", "..."]),
        ({"first_word": ["New York"]}, ["New York is big."], ["New is big.", "York", "New"]),
    ],
    "first_word:first_word_answer": [
        ({"first_word": "yes"}, ["Yes, it is. No.", "**YES**", "- yes", "“Yes”"], ["It is, yes", "Yesterday", "Oh yes", "..."]),
    ],
    "last_word:last_word_sent": [
        ({"last_word": "yes"}, ["I say yes. Is it yes?", "I say “yes.”", "Yes! I say **yes**", "YES."], ["I say yes. I say no.", "I say yes. No", "I saw eyes.", "yes no", "..."]),
        ({"last_word": ["of course"]}, ["I do, of course. Of course!"], ["Course.", "of course not"]),
        ({"last_word": "don't"}, ["I don’t."], ["I dont"]),
    ],
    "last_word:last_word_answer": [({"last_word": "yes"}, ["It is. Yes!", "“Yes.”", "no yes\n"], ["Yes it is", "eyes", "yes no", "yes ..."][:3] + ["..."])],
    "punctuation:punctuation_dot": [({}, ["Yes!", "a。"], ["Yes.", "3.5", "..."])],
    "punctuation:punctuation_exclamation": [({}, ["Yes.", "a！"], ["Yes!", "!"])],
    "count:lowercase_counting": [({"N": 2}, ["it IS so", "IT IS", "It Is so", "no1 here it", "3 a b"], ["it is so", "été était là", "a b c"])],
    "count:counting_composition": [
        (
            {"n_sent": 2, "n_words": 3},
            ["It is, so. Is it so?\n***\nIt was so. I saw it.\n* * *\nI go now! You go now.", "It is so. So it is. * * * It is so. So it is. * * * It is so. So it is"],
            ["It is so. Is it so?", "It is so. So it is.***It is so. So it is.***It is so.", "It is so. So it is.***It is so. So it is.***It is so. So it is now.", "It is so. So it is.***It is so. So it is.", "It is so. So it is.***It is so. So it is.***It is so. So it is.***It is so. So it is.", "It is so.\n\nSo it is."],
        ),
        ({"n_sent": 1, "n_words": 1}, ["A***b***c", "***A***b***c***"], ["A***b", "A***b***..."]),
    ],
    "count:count_unique": [({}, ["Yes, no, maybe.", "can can't", "Word"], ["The cat, the dog", "no, no", "No and “no”", "don't don’t"])],
    "count:count_increment_word": [
        ({"keyword1": "cat", "keyword2": "dog"}, ["A cat, a dog and a Dog", "category dogdog"], ["cat dog", "cat cat dog dog", "dog dog", "cat dog dog dog", "cat"]),
    ],
    "letters:letter_counting": [
        ({"N": 3, "relation": "less than"}, ["a1 2!", "ab", "12345"], ["abc", "éàü", "我来了"]),
        ({"N": 3, "relation": "at least"}, ["abc", "a b c", "我来了"], ["ab", "1234", "a.b"]),
    ],
    "letters:letter_counting2": [
        ({"letter": "Q", "let_frequency": 2, "let_relation": "at least"}, ["q Q", "qqq"], ["q", "none"]),
        ({"letter": "q", "let_frequency": 2, "let_relation": "less than"}, ["q", "none"], ["qq"]),
    ],
}  # fmt: skip
FLAT = [(name, *case) for name, cases in CASES.items() for case in cases]


def row(*pairs):
    return [{"instruction_id": [name for name, _ in pairs], "kwargs": [arguments for _, arguments in pairs]}]


def follows(text, *pairs, loose=False):
    return all(check(text, parse(row(*pairs)), loose))


def test_every_instruction_has_cases():
    assert len(CASES) == 29 and len(FOLLOWS) == 54 and CASES.keys() < FOLLOWS.keys()
    for name, arguments, _, _ in FLAT:
        assert arguments.keys() <= inspect.signature(FOLLOWS[name]).parameters.keys()


@pytest.mark.parametrize("name, arguments, good, bad", FLAT, ids=lambda value: value if isinstance(value, str) else "")
def test_rule(name, arguments, good, bad):
    assert [text for text in good if not follows(text, (name, arguments))] == []
    assert [text for text in bad if follows(text, (name, arguments))] == []


ONE_EACH = [(name, cases[0][0]) for name, cases in CASES.items()]


@pytest.mark.parametrize("name, arguments", ONE_EACH)
def test_blank_text_follows_nothing(name, arguments):
    assert not any(follows(text, (name, arguments), loose=loose) for text in ("", " \n") for loose in (False, True))


@pytest.mark.parametrize("name, arguments", ONE_EACH)
def test_asking_for_something_is_not_followed_by_signs(name, arguments):
    forbid = ("punctuation:", "count:lowercase", "count:count_unique", "keywords:exclude", "keywords:no_adj", "detectable_format:sentence", "letters:letter_counting")  # fmt: skip
    if not name.startswith(forbid):
        assert not any(follows(text, (name, arguments)) for text in (",", "!!!", "...", "***", "[]", "<<>>", "<< >>"))


def test_rows_of_olmo():
    """A list of one in Python's or JSON's notation, with one row of kwargs per instruction or null."""
    names = ["count:lowercase_counting", "paragraphs:paragraphs", "first_word:first_word_sent", "keywords:palindrome"]
    kwargs = [{"N": 5, "relation": None}, None, {"first_word": ["it's"]}, {}]
    given = [{"instruction_id": names, "kwargs": kwargs}]
    expected = [(names[0], {"N": 5}), (names[1], {}), (names[2], {"first_word": ["it's"]}), (names[3], {})]
    forms = [given, repr(given), json.dumps(given), [json.dumps(given[0])], repr([json.dumps(given[0])])]
    assert [parse(form) for form in forms] == [expected] * 5
    verdict = judge("ifeval", "<think>a, b, c, d, e, f</think>It's WOW.\n***\nIt's so.", repr(given))
    assert verdict == (1.0, "right", "all followed", ())
    verdict = judge("ifeval", "It's so.\n***\nOh, noon.", repr(given))
    assert verdict == (0.75, "wrong", "not followed: first_word:first_word_sent", ())
    assert judge("ifeval_strict", "It's so.\n***\nOh, noon.", repr(given))[:2] == (0.0, "wrong")


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("keywords:keyword_specific_position", {"keyword": "a", "n": 0, "m": 1}, "'n' has to be a whole number from 1 to 999999, not 0"),
        ("keywords:keyword_specific_position", {"keyword": [], "n": 1, "m": 1}, "'keyword' has to be a text with words, or a list of one"),
        ("keywords:keyword_specific_position", {"keyword": "a", "n": 1}, "argument 'm' is missing"),
        ("first_word:first_word_sent", {"first_word": "!"}, "'first_word' has to be a text with words"),
        ("first_word:first_word_sent", {}, "argument 'first_word' is missing"),
        ("last_word:last_word_answer", {"last_word": [3]}, "'last_word' has to be a text with words"),
        ("copy:repeat_phrase", {"phrase": "a b", "small_n": 2}, "'a b' has no word in its middle"),
        ("new:copy_span_idx", {"prompt_to_repeat": "ab", "n_start": 2, "n_end": 9}, "nothing stands from character 2 to 9"),
        ("new:copy_span_idx", {"prompt_to_repeat": "ab", "n_start": 1, "n_end": 0}, "nothing stands from character 1 to 0"),
        ("count:lowercase_counting", {"N": -1}, "'N' has to be a whole number from 0"),
        ("count:lowercase_counting", {"n": 1}, "takes no argument 'n'"),
        ("letters:letter_counting", {"N": 3, "relation": "more than"}, "'relation' has to be one of"),
        ("letters:letter_counting2", {"letter": "ab", "let_frequency": 1, "let_relation": "at least"}, "'letter' has to be a single character"),
        ("paragraphs:paragraphs3", {}, "unknown instruction 'paragraphs:paragraphs3'; near: paragraphs:paragraphs"),
    ],
)  # fmt: skip
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(row((name, arguments)))
    assert "\n" not in str(error.value)


MARKS = st.sampled_from([*"*-[]<>\"'.,!? \n", "******", "<<", ">>", "* * *", "a", "A", "ß", "İ", "。", "1.", "\u0301", "\ud800", "\0", "yes"])  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.one_of(st.text(), st.lists(MARKS).map("".join)))
def test_any_text_gets_the_same_verdict_twice_and_strict_implies_loose(text):
    instructions = parse(row(*ONE_EACH))
    strict, loose = check(text, instructions), check(text, instructions, loose=True)
    assert all(type(verdict) is bool for verdict in strict)
    assert strict == check(text, instructions)
    assert all(b for a, b in zip(strict, loose, strict=True) if a)


PIECES = ["a", "A ", "\n", "*", "[", "[a ", "]", "<<", "<<a ", "<<a b>> ", ".", "!", "。", "-", " - ", ".-", "!a", "a! ", "1. ", "dance ", "dance like nobody was watching you ", "you ", "yes. ", "***", "\n\n", "“", "\u0301", "\ud800", "\0", "北", "U.S. ", "(" , "a@"]  # fmt: skip


@pytest.mark.parametrize("piece", PIECES, ids=ascii)
def test_hostile_text_is_judged_in_linear_time(piece):
    """A quadratic rule would take minutes on these."""
    for text in (piece * (100_000 // len(piece)), "x" + piece * (100_000 // len(piece)) + "x"):
        for pair in ONE_EACH:
            instruction = parse(row(pair))
            assert seconds_of(partial(check, text, instruction), enough=0.5) < 0.5, pair


def test_verdicts_of_random_texts_do_not_depend_on_what_came_before():
    rng = random.Random(0)
    words = "yes Yes, no. the Level *** a. <<is so>> [it] - 1. U.S. \n\n dance you cat! 我来了。".split(" ")
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 30))) for _ in range(100)]
    instructions = parse(row(*ONE_EACH))
    first = [check(text, instructions) for text in texts]
    assert first == [check(text, instructions) for text in reversed(texts)][::-1]
    assert 0 < sum(map(sum, first)) < len(texts) * len(ONE_EACH)
