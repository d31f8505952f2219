"""Each of IFEval's instructions follows its rule, each published form of ground truth is read, and no text is too hostile."""

import inspect
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ifevalg import CASES as OLMO_CASES

from rewards import ifeval, judge
from rewards.ifeval import FOLLOWS, TULU, check, parse

ROWS = Path(__file__).parents[2] / "shared/data/ifeval/input_data.jsonl"
ENGLISH = "the quick brown fox jumps over the lazy dog because it wants to see what is on the other side of the road"
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund, weil er sehen will, was auf der anderen Seite ist."

# id: [(arguments, texts that follow, texts that do not)]
CASES = {
    "keywords:existence": [
        ({"keywords": ["fox", "Dog"]}, ["A FOX and a dog.", "foxes, dogs"], ["a fox", ""]),
        ({"keywords": ["北京", "café"]}, ["北京的CAFE\u0301s"], ["北京的cafe"]),
        ({"keywords": ["a.c"]}, ["a.c"], ["abc"]),  # not a pattern
        ({"keywords": ["(("]}, ["(("], ["("]),
    ],
    "keywords:frequency": [
        ({"keyword": "cat", "frequency": 2, "relation": "at least"}, ["cat Cat", "cats, category"], ["cat", "dog"]),
        ({"keyword": " cat ", "frequency": 2, "relation": "less than"}, ["cat", "dog"], ["cat cat", "cat cat cat"]),
        ({"keyword": "aa", "frequency": 2, "relation": "exactly"}, ["aaaa", "aaaaa"], ["aaa"]),
        ({"keyword": "cat", "frequency": 1, "relation": "exactly", "whole_words": True}, ["cats, a Cat."], ["cats", "cat cat"]),
    ],
    "keywords:forbidden_words": [
        ({"forbidden_words": ["cat", "dog"]}, ["category dogma", "bird"], ["A Cat.", "hot-dog", "dog"]),
        ({"forbidden_words": ["北京", "กรุงเทพ", "Python"]}, ["南京", "我用Pythonic"], ["我在北京。", "คือกรุงเทพครับ", "我用Python编程", "PYTHON"]),
        ({"forbidden_words": ["पहल", "café"]}, ["पहली", "cafés", "cafe\u0301s"], ["यह पहल है", "un cafe\u0301", "CAFÉ!"]),
        ({"forbidden_words": ["C++"]}, ["C", "C+", "xC++"], ["c++", "use C++, now", "C++"]),
        ({"forbidden_words": ["cat"], "whole_words": False}, ["bird"], ["category"]),
    ],
    "keywords:letter_frequency": [
        ({"letter": "Q", "let_frequency": 2, "let_relation": "at least"}, ["qQ", "quiz queue"], ["q", "none"]),
        ({"letter": "!", "let_frequency": 2, "let_relation": "less than"}, ["a!", "a"], ["a!!"]),
        ({"letter": "q", "let_frequency": 1, "let_relation": "exactly", "case_sensitive": True}, ["qQ"], ["QQ", "qq"]),
    ],
    "language:response_language": [
        ({"language": "de"}, [GERMAN], [ENGLISH, "12345"]),
        ({"language": "en"}, [ENGLISH], [GERMAN, "это русский текст"]),
    ],
    "length_constraints:number_sentences": [
        ({"num_sentences": 3, "relation": "at least"}, ["One. Two! Three?", "One. two. three", "“One.” (Two.) Three."], ["One. Two."]),
        ({"num_sentences": 2, "relation": "less than"}, ["Mr. Smith met Dr. J. R. Jones.", "Mt. Everest is high", "It cost 3.50 at 1. street", "See (e.g. U.S. law", "wait... what", "word", "No end\nhere", "rice, etc. and more"], ["One. Two", "Really?! Yes", "Wait... What", "It cost 5. He paid", "Rice, etc. More"]),
        ({"num_sentences": 2, "relation": "exactly"}, ["1. Wash it. 2. Dry it.", "1. Wash it.\n2. Dry it.", "Steps:\n1. Wash it.\n2. Dry it.", "a. Wash it.\nb. Dry it.", "**1.** Wash it! **2.** Dry it!", "He was born in 1990. The war began.", "It ends at 5. The bus left."], ["1. Wash it. And dry it. 2. Iron it.", "1. Wash it"]),
        ({"num_sentences": 2, "relation": "exactly"}, ["He lives in the U.S. It is large.", "She has a Ph.D. She works.", "Come at 5 p.m. We eat.", "This is plan B. The rest is clear.", "\"I live in the U.S.\" He left.", "wait… What", "It was on Jan. 5. It rained."], ["He lives in the U.S. and likes it.", "The U.S. Army won.", "J. R. R. Tolkien wrote", "See e.g. The Hobbit", "wait… what"]),
        ({"num_sentences": 3, "relation": "exactly"}, ["我来了。我看见了。我赢了。", "やった！すごい？「はい。」", "他说：“好。”我走了！你呢？", "मैं आया। मैंने देखा। मैं जीता।", "هل أنت هنا؟ نعم۔ حسنا!", "すごい！！本当？？はい。", "ԵՍ եկա։ Տեսա։ Հաղթեցի։", "¿Qué? ¡Sí! Bueno."], ["我来了，我看见了，我赢了。", "π是3.14。对。", "我来了。", "「はい。」。。"]),
        ({"num_sentences": 3, "relation": "around"}, ["Go on. Stop.", "Go on. Stop. Go on. Stop."], ["Go on.", "Yes. " * 5]),
        ({"num_sentences": 30, "relation": "around"}, ["Hi you. " * 31], ["Hi you. " * 32]),
    ],
    "length_constraints:number_paragraphs": [
        ({"num_paragraphs": 2}, ["a***b", "a\n\n***\n\nb", "***\na\n***\nb\n***"], ["a", "a\n\nb", "a***b***c", "a***\n***b", "a * * * b"]),
        ({"num_paragraphs": 2, "divider": "* * *"}, ["a\n* * *\nb"], ["a\n***\nb"]),
    ],
    "length_constraints:number_words": [
        ({"num_words": 3, "relation": "at least"}, ["a b c", "don't go", "one-two-three"], ["a b", "...!"]),
        ({"num_words": 3, "relation": "less than"}, ["a b"], ["a b c"]),
        ({"num_words": 3, "relation": "at most"}, ["a b c"], ["a b c d"]),
        ({"num_words": 3, "relation": "at least", "by_spaces": True}, ["a b c"], ["don't go"]),
        ({"num_words": 3, "relation": "around"}, ["a b", "a b c d"], ["a", "a b c d e"]),
        ({"num_words": 20, "relation": "around"}, ["w " * 18, "w " * 22], ["w " * 17, "w " * 23]),
    ],
    "length_constraints:nth_paragraph_first_word": [
        (
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Hello"},
            ["a\n\nhello there", "a\n\n'\"HELLO, you", "a\n\n  Hello. b\n\n", "a\n\nhello's"],
            ["a\nhello", "a\n\nhelloo", "a\n\n(hello", "hello\n\nb", "a\n\nhello\n\nc", "a\n\n\n\nhello"],
        ),
        ({"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "I'm", "as_prefix": True}, ["I'm here"], ["i'm here", "Yes, I'm"]),
        ({"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "x"}, ["x"], ["\n\nx"]),  # the first piece is blank
    ],
    "detectable_content:number_placeholders": [
        ({"num_placeholders": 2}, ["[a] [b]", "[a][]", "[[a] b]]c[d]"], ["[a]", "[a\nb] [c]", "]a[ ]b["]),
    ],
    "detectable_content:postscript": [
        ({"postscript_marker": "P.S."}, ["Bye.\nP.S. Call", "Bye. p.s. x", "P. S. x", "P.S."], ["PS: x", "P.S x", "P.P.S x"]),
        ({"postscript_marker": "P.P.S"}, ["P.P.S x", "p.p.s. x", "P. P. S x"], ["P.S. x", "PPS"]),
        ({"postscript_marker": "N.B."}, ["n.b. x"], ["nxbx"]),
    ],
    "detectable_format:number_bullet_lists": [
        ({"num_bullets": 2}, ["* a\n* b", "- a\n  *b\ntext", "- a\n---\n- b", "* a\n***\n* b", "*Note* this.\n* a\n* b", "* a\n* *b* c", "- a\n*b c", "- a\n- - -\n* * *\n- b\n- - - "], ["* a", "*a*b\n*c", "* a\n**b**", "* a\n* b\n* c", "text", "a * b\na - b", "* a\n\n---", "* a\n*Note*", "*Note* a\n*Note* b"]),
    ],
    "detectable_format:constrained_response": [
        ({}, ["My answer is yes.", "Well. My answer is no. Bye", "My answer is maybe."], ["yes", "my answer is yes.", "My answer is yes"]),
        ({"options": ["red", "blue"]}, ["It is red."], ["green", "My answer is yes."]),
    ],
    "detectable_format:number_highlighted_sections": [
        ({"num_highlights": 2}, ["*a* **b**", "*a* and *b*", "**a** **b c**", "*a*b*c*"], ["*a*", "** ** * *", "*a\nb* *c*", "****", "none"]),
    ],
    "detectable_format:multiple_sections": [
        ({"section_spliter": "Section", "num_sections": 2}, ["Section 1 a\nSection 2 b", "Section1Section 22", "Section\n1 Section 2 Section 3"], ["Section 1", "SECTION 1 SECTION 2", "Section A Section B"]),
        ({"section_spliter": " S. ", "num_sections": 1}, ["S. 1"], ["Sx 1"]),
    ],
    "detectable_format:json_format": [
        ({}, ['{"a": [1, null]}', '```json\n{"a": 1}\n```', '```\n[]\n```', "```JSON\n1```", ' "x" '], ["{a: 1}", '{"a": 1} {"b": 2}', '```json\n{"a": 1}\n```\nDone.', 'Here:\n{"a": 1}', '```json\n{}\n```\n```json\n{}\n```', "text"]),
    ],
    "detectable_format:title": [
        ({}, ["<<a>>", "x <<poem of joy>> y", "a\n<<<b>>>", "<<a>> <<b>>"], ["<a>", "<<>>", "<< >>", "<<a\nb>>", ">>a<<", "<<<>>>"]),
    ],
    "combination:two_responses": [
        ({}, ["a******b", "a\n******\nb\n******", "******\na ****** b"], ["a******a", "a****** a ", "a", "a******b******c", "a************b", "a***b"]),
    ],
    "combination:repeat_prompt": [
        ({"prompt_to_repeat": "Write a poem. "}, ["Write a poem. Roses", "  write A POEM.\nRoses"], ["Roses. Write a poem.", '"Write a poem."', "Write a poe"]),
    ],
    "startend:end_checker": [
        ({"end_phrase": "Any questions? "}, ["Text. Any questions?", 'x "any QUESTIONS?" ', "Any questions?\n"], ["Any questions? No.", "Any questions", "Any questions?**"]),
    ],
    "startend:quotation": [
        ({}, ['"a"', ' "a" and "b"\n', '""'], ['"', '"a', "'a'", "“a”", '"a".']),
    ],
    "change_case:capital_word_frequency": [
        ({"capital_frequency": 2, "capital_relation": "at least"}, ["NASA AND esa", "I'm A", "DON'T", "COVID-19 U.S.", "**HELLO, WORLD**", "ÉTÉ (À)"], ["NASA's", "One Two", "AND/OR", "WELL-KNOWN", "12 3.5"]),
        ({"capital_frequency": 2, "capital_relation": "less than"}, ["One", "WELL-KNOWN thing"], ["A B"]),
    ],
    "change_case:english_capital": [
        ({}, [ENGLISH.upper(), "THE 3 THINGS THAT THEY WANT."], [ENGLISH, ENGLISH.upper() + "a", "123", "ЭТО РУССКИЙ ТЕКСТ"]),
        ({"any_language": True}, ["ЭТО"], ["Это", "12"]),
    ],
    "change_case:english_lowercase": [
        ({}, [ENGLISH, ENGLISH + " 123!"], [ENGLISH.capitalize(), GERMAN.lower(), "123"]),
        ({"any_language": True}, ["это"], ["Это", "12"]),
    ],
    "punctuation:no_comma": [({}, ["a; b", "a،b", "a，b"], ["a, b", "1,000"])],
}  # fmt: skip
FLAT = [(name, *case) for name, cases in CASES.items() for case in cases]


def ground_truth(*pairs):
    return {"instruction_id_list": [name for name, _ in pairs], "kwargs": [arguments for _, arguments in pairs]}


def follows(row, text, loose=False):
    (verdict,) = check(text, parse(row), loose)
    assert type(verdict) is bool
    return verdict


def test_every_instruction_has_cases():
    assert len(CASES) == 25 and CASES.keys() == FOLLOWS.keys() - OLMO_CASES.keys()


@pytest.mark.parametrize("name, arguments, good, bad", FLAT, ids=lambda value: value if isinstance(value, str) else "")
def test_rule(name, arguments, good, bad):
    row = ground_truth((name, arguments))
    assert [text for text in good if not follows(row, text)] == []
    assert [text for text in bad if follows(row, text)] == []


@pytest.mark.parametrize("name", CASES)
def test_blank_text_follows_nothing(name):
    row = ground_truth((name, CASES[name][0][0]))
    assert not any(follows(row, text, loose) for text in ("", " \n\t") for loose in (False, True))


@pytest.mark.parametrize(
    "name, arguments, text",
    [
        ("detectable_format:json_format", {}, 'Here it is:\n{"a": 1}'),  # without the first line
        ("startend:end_checker", {"end_phrase": "Bye."}, "Text. Bye.\nHope that helps"),  # without the last
        ("startend:quotation", {}, 'Sure!\n"a"\nDone'),  # without both
        ("startend:end_checker", {"end_phrase": "the end"}, "This is **the end**"),  # without asterisks
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi"}, "Sure:\n**Say hi**\nhi"),  # both
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "a"},
            "x\n\n\n*a* b",
        ),
    ],
)
def test_loose_forgives_a_preamble_an_ending_and_asterisks(name, arguments, text):
    row = ground_truth((name, arguments))
    assert not follows(row, text) and follows(row, text, loose=True)


def test_rewards_of_several_instructions():
    row = ground_truth(("punctuation:no_comma", {}), ("startend:quotation", {}), ("detectable_format:title", {}))
    rewards = {"a, b": (0, 0, 0), "a b": (1 / 3, 0, 1 / 3), '"a b"': (2 / 3, 0, 2 / 3), '"<<a b>>"': (1, 1, 1), 'Sure, yes:\n"<<a>>"': (1 / 3, 0, 1)}
    for text, expected in rewards.items():
        verdicts = [judge(name, text, row) for name in ("ifeval", "ifeval_strict", "ifeval_loose")]
        assert [verdict.reward for verdict in verdicts] == pytest.approx(expected), text
        assert verdicts[0].answer == verdicts[1].answer
        assert [verdict.reason == "right" for verdict in verdicts] == [reward == 1 for reward in expected]
    for name in ("ifeval", "ifeval_strict", "ifeval_loose"):
        assert judge(name, "\u200b.", row).reason == "unparsed"
        assert judge(name, "<think>so\n", row).reason == "unparsed"


def test_loose_does_not_forgive_more():
    assert not follows(ground_truth(("punctuation:no_comma", {})), "a\nb, c\nd", loose=True)
    assert not follows(ground_truth(("detectable_format:json_format", {})), 'a\nb\n{"a": 1}', loose=True)
    assert not follows(ground_truth(("punctuation:no_comma", {})), "a,\rb", loose=True)  # one line, as in the reference
    # what is left after the first line is blank, which follows nothing
    assert not follows(ground_truth(("punctuation:no_comma", {})), "a, b\n ", loose=True)


def test_one_verdict_per_instruction_in_order():
    row = ground_truth(("punctuation:no_comma", {}), ("detectable_format:title", {}), ("startend:quotation", {}))
    assert check("<<a, b>>", parse(row)) == [False, True, False]


def tulu(function, **arguments):
    """A row's ground truth as published: JSON in which every argument that is not used is null."""
    names = "N quantifier end_phrase keyword_list word forbidden_words letter i first_word postscript_marker options section_splitter original_prompt"
    return json.dumps({"func_name": function, **dict.fromkeys(names.split()), **arguments})


TULU_CASES = [
    (tulu("verify_keywords", keyword_list=["fox", "dog"]), "Foxes and dogs", "fox"),
    (tulu("verify_keyword_frequency", word="cat", N=2), "cat, Cat; cats", "cat cat cat"),
    (tulu("validate_forbidden_words", forbidden_words=["cat"]), "dog", "category"),
    (tulu("verify_letter_frequency", letter="q", N=1), "q Q", "qq"),
    (tulu("validate_response_language", language="de"), GERMAN, ENGLISH),
    (tulu("verify_sentence_constraint", N=3, quantifier="around"), "Go on. Stop.", "Go on."),
    (tulu("verify_paragraph_count", N=2), "a\n* * *\nb", "a\n***\nb"),
    (tulu("validate_word_constraint", N=3, quantifier="at most"), "don't you go", "a b c d"),
    (tulu("validate_paragraphs", N=2, i=2, first_word="It's"), "a\n\nIt's so", "a\n\nit's so"),
    (tulu("verify_postscript", postscript_marker="P.S."), "Bye. P.S. x", "Bye."),
    (tulu("validate_placeholders", N=2), "[a] [b]", "[a]"),
    (tulu("verify_bullet_points", N=2), "* a\n- b", "* a"),
    (tulu("validate_title"), "<<a>>", "a"),
    (tulu("validate_choice", options=["yes", "no"]), "I say yes", "perhaps"),
    (tulu("validate_highlighted_sections", N=1), "*a*", "a"),
    (tulu("validate_sections", N=2, section_splitter="Part"), "Part 1 a Part 2 b", "Part 1 a"),
    (tulu("validate_json_format"), "{}", "{"),
    (tulu("validate_repeat_prompt", original_prompt="Say hi"), "Say hi. hi", "hi"),
    (tulu("validate_two_responses"), "a******b", "a"),
    (tulu("validate_uppercase"), "ZZZZ QQQQ", "Zz"),
    (tulu("validate_lowercase"), "zzzz qqqq", "Zz"),
    (tulu("validate_frequency_capital_words", N=2, quantifier="at most"), "A B c", "A B C"),
    (tulu("validate_end", end_phrase="the end"), "this is the end", "the end is near"),
    (tulu("validate_quotation"), '"a"', "a"),
    (tulu("validate_no_commas"), "a", "a,"),
]


@pytest.mark.parametrize("row, good, bad", TULU_CASES, ids=[json.loads(row)["func_name"] for row, _, _ in TULU_CASES])
def test_tulu_function(row, good, bad):
    assert parse(row) == parse(json.loads(row))
    assert follows(row, good) and not follows(row, bad)


def test_tulu_has_a_function_for_each_instruction():
    assert {json.loads(row)["func_name"] for row, _, _ in TULU_CASES} == TULU.keys()
    assert {name for name, _, _ in TULU.values()} == CASES.keys()
    for name, theirs, fixed in TULU.values():
        assert {*theirs, *fixed} <= inspect.signature(FOLLOWS[name]).parameters.keys()


def test_ifeval_form_with_nulls_and_other_columns():
    row = {
        "key": 1,
        "prompt": "p",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{"num_words": None, "relation": None}, {"num_words": 2, "relation": "at least", "letter": None}],
    }
    expected = [
        ("punctuation:no_comma", {}),
        ("length_constraints:number_words", {"num_words": 2, "relation": "at least"}),
    ]
    assert parse(row) == parse(json.dumps(row)) == expected


def test_olmo_form_as_object_json_and_python_literal():
    row = [
        {
            "instruction_id": ["punctuation:no_comma", "keywords:existence"],
            "kwargs": [None, {"keywords": ["it's"], "N": None}],
        }
    ]
    expected = [("punctuation:no_comma", {}), ("keywords:existence", {"keywords": ["it's"]})]
    assert parse(row) == parse(repr(row)) == parse(json.dumps(row)) == parse([json.dumps(row[0])]) == expected


NTH = "length_constraints:nth_paragraph_first_word"
BAD = {
    "unknown instruction 'keywords:existance'; near: keywords:existence": ground_truth(("keywords:existance", {})),
    "unknown instruction 'count:word_count_range'": [{"instruction_id": ["count:word_count_range"], "kwargs": [{"min": 1}]}],
    "unknown function 'validate_titel'; near: validate_title": {"func_name": "validate_titel"},
    "unknown function 'None'": {"func_name": None},
    r"verify_keywords \(keywords:existence\): argument 'keyword_list' is missing: a list of texts": tulu("verify_keywords"),
    "number_words: argument 'relation' is missing: one of": ground_truth(("length_constraints:number_words", {"num_words": 1})),
    "'relation' has to be one of .*'less than'.*, not 'more than'": ground_truth(("length_constraints:number_words", {"num_words": 1, "relation": "more than"})),
    "'quantifier' has to be one of .*, not 'about'": tulu("validate_word_constraint", N=1, quantifier="about"),
    "'num_bullets' has to be a whole number from 0 to 999999, not '3'": ground_truth(("detectable_format:number_bullet_lists", {"num_bullets": "3"})),
    "'num_bullets' has to be a whole number .*, not True": ground_truth(("detectable_format:number_bullet_lists", {"num_bullets": True})),
    "'num_bullets' has to be a whole number .*, not -1": ground_truth(("detectable_format:number_bullet_lists", {"num_bullets": -1})),
    "'num_bullets' has to be a whole number .*, not 2.5": ground_truth(("detectable_format:number_bullet_lists", {"num_bullets": 2.5})),
    "'keywords' has to be a list of texts that are not blank, not 'fox'": ground_truth(("keywords:existence", {"keywords": "fox"})),
    r"'keywords' has to be a list .*, not \[\]": ground_truth(("keywords:existence", {"keywords": []})),
    r"'keywords' has to be a list .*, not \['a', 3\]": ground_truth(("keywords:existence", {"keywords": ["a", 3]})),
    "'end_phrase' has to be a text that is not blank, not ' '": ground_truth(("startend:end_checker", {"end_phrase": " "})),
    "'letter' has to be a single character, not 'ab'": ground_truth(("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": "at least"})),
    "'language' has to be one of langdetect's codes .*'zh-cn'.*, not 'zh'": ground_truth(("language:response_language", {"language": "zh"})),
    "no_comma: takes no argument 'num_words'": ground_truth(("punctuation:no_comma", {"num_words": 3})),
    r"validate_title \(detectable_format:title\): takes no argument 'N'": tulu("validate_title", N=3),
    "there is no paragraph 3 of 2": ground_truth((NTH, {"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"})),
    "there is no paragraph 0 of 2": tulu("validate_paragraphs", N=2, i=0, first_word="a"),
    "no_comma: arguments have to be an object, not 'x'": ground_truth(("punctuation:no_comma", "x")),
    "2 instructions and 1 kwargs": {"instruction_id_list": ["punctuation:no_comma"] * 2, "kwargs": [{}]},
    "neither `func_name` nor lists": {"instruction_id_list": [], "kwargs": []},
    "neither `func_name` nor lists .*": {"prompt": "p"},
    r"an object, or a list of one: \[{}, {}\]": [{}, {}],
    "an object, or a list of one: 3": 3,
    "neither JSON nor a Python literal: 'verify": "verify_keywords(x)",
    "neither JSON nor a Python literal: ''": "",
    r"neither JSON nor a Python literal: '\[": "[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_ground_truth_is_one_clear_error(message):
    with pytest.raises(ValueError, match=message) as error:
        parse(BAD[message])
    assert "\n" not in str(error.value)


ONE_EACH = [(name, cases[0][0]) for name, cases in CASES.items()]


def test_every_row_of_the_benchmark():
    if not ROWS.exists():
        pytest.skip(f"{ROWS} is not here: google-research/instruction_following_eval has it")
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    parsed = [parse(row) for row in rows]
    assert len(rows) == 541 and {name for row in parsed for name, _ in row} == CASES.keys()
    for row, instructions in zip(rows, parsed, strict=True):
        assert [name for name, _ in instructions] == row["instruction_id_list"]
        for text in (row["prompt"], "Hi. P.S. *a* [b]", ""):
            assert len(check(text, instructions)) == len(instructions)


MARKS = st.sampled_from(
    [*"*-[]<>\"'.,!? \n{}", "******", "<<", ">>", "```json\n", "P.S.", "Section 1", "a", "A", "ß", "\ud800", "\0"]
)


@settings(max_examples=25, deadline=None)
@given(st.one_of(st.text(), st.lists(MARKS).map("".join)))
def test_any_text_gets_the_same_verdict_twice_and_strict_implies_loose(text):
    instructions = parse(ground_truth(*ONE_EACH))
    strict, loose = check(text, instructions), check(text, instructions, loose=True)
    assert strict == check(text, instructions)
    assert all(b for a, b in zip(strict, loose, strict=True) if a)
    assert text.strip() or not any(loose)


HOSTILE = {c: c * 1_000_000 for c in ("a", "\n", "*", "[", "<", ".", '"')} | {
    "no postscript": "p." + " " * 1_000_000,
    "open placeholders": "[a\n" * 100_000 + "[" * 700_000,
    "nested brackets": "[" * 100_000 + "]" * 100_000,
    "nested objects": '{"a":' * 100_000,
    "digits": "1" * 100_000,
    "address": "a@" * 500_000,
    "lone surrogates": "\ud800 \udfff" * 1000,
    "NUL": "\0" * 1000 + "a\0b",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_judged(name):
    """A rule in quadratic time would take hours on these."""
    instructions = parse(ground_truth(*ONE_EACH))
    assert len(check(HOSTILE[name], instructions)) == 25


def test_language_verdicts_do_not_depend_on_what_came_before():
    texts = [ENGLISH, GERMAN, "no", "ok la", "taxi hotel", "sí"]
    first = [ifeval.detect(text) for text in texts]
    assert first == [ifeval.detect(text) for text in texts] and first[::-1] == [
        ifeval.detect(text) for text in texts[::-1]
    ]
