"""`exact`, `contains`, `string_f1` and `format`: texts in every script, and for each that is right some that are not."""

import json
import random
import re
import string
from collections import Counter

import pytest
from conftest import SHARED, seconds_of

from common import RunError
from rewards import Pool, Verdict, judge
from rewards.jobs import combine, split_job
from rewards.strings import normalised, words
from rewards.verifiers import not_judged

CASES = SHARED / "data/verdicts/cases.jsonl"


def is_right(name, completion, gold):
    verdict = judge(name, completion, gold)
    assert verdict.reason in ("right", "wrong", "unparsed"), verdict
    return verdict.reward == 1


# (ground truth, right completions, wrong completions)
EXACT = [
    ("東京", ["東京。", "「東京」", "『東京』。", "東京！", "《東京》", "【東京】", "（東京）"], ["京都", "東京都", "東京、大阪", "東 京"]),
    ("Madrid", ["¡Madrid!", "¿Madrid?", "«Madrid»", "“Madrid”", "‹Madrid›", "„Madrid“", "Mad\u00adrid", "\u200bMadrid\ufeff", "Ｍａｄｒｉｄ", "𝐌𝐚𝐝𝐫𝐢𝐝", "- Madrid"], ["Madrid</s>", "<Madrid>", "Madríd", "Mad rid", "#Madrid", "Madrid (Spain)"]),
    ("Zürich", ["Zu\u0308rich", "ZÜRICH"], ["Zurich", "Zuerich"]),
    ("Straße", ["STRASSE", "strasse", "STRAẞE"], ["strase", "Strabe"]),
    ("θεός", ["ΘΕΌΣ", "Θεόσ"], ["θεοί"]),
    ("İstanbul", ["istanbul", "İSTANBUL", "Istanbul", "i\u0307stanbul"], ["stanbul", "ıstanbul"]),
    ("Isparta", ["ISPARTA", "isparta", "ısparta"], ["İsparta ili"]),
    ("Diyarbakır", ["DİYARBAKIR", "diyarbakır"], ["Diyarbakir"]),
    ("kır", ["KIR", "Kır"], ["kir", "KİR"]),
    ("IT", ["it", "It"], ["İ T", "lt"]),
    ("القاهرة", ["القاهرة؟", "القاهرة،", "القـاهرة", "القَاهِرَة", "\u200fالقاهرة"], ["القاهر", "قاهرة"]),
    ("שלום", ["שָׁלוֹם", "שלום!"], ["שלומי"]),
    ("दिल्ली", ["दिल्ली।", "दिल्ली॥"], ["दिल्", "दल्ली"]),
    ("5", ["٥", "५", "５", "(5)", "5)", "5.", "**5**", "`5`"], ["-5", "−5", "5%", "$5", ".5", "0.5", "[5]", "{5}", "⁵", "५५", "(5, 6)", "5)6"]),
    ("-5", ["−5", "–5", "‒5", "－5", "(-5)"], ["5", "--5", "- 5"]),
    (".5", ["(.5)", "“.5”", "...5"], ["5", ". 5"]),
    ("3.14", ["٣٫١٤", "3.14."], ["314", "3,14"]),
    ("x²", ["x^2", "X²"], ["x2", "2x"]),
    ("102", ["102"], ["10²", "10^2"]),
    ("10⁻³", ["10^-3", "10^−3"], ["10-3", "10^3"]),
    ("2½", ["2 1/2", "2 ½"], ["21/2"]),
    ("H₂O", ["H2O"], ["H²O"]),
    ("1990–1995", ["1990-1995", "1990‐1995", "1990—1995"], ["19901995", "1990 1995"]),
    ("don't", ["don’t", "don`t", "donʼt"], ["dont", "don t"]),
    ("wait…", ["wait..."], ["wait, what"]),
    ("New York", ["new\u00a0york", "NEW\nYORK", "New\u2009York", "(New York)"], ["NewYork", "York New", "New York, USA"]),
    ("A", ["(A)", "A)", "A.", "(a).", "**(A)**", "（A）", "A:"], ["(B)", "A) Paris", "(A", "AA", "A or B", "-A", "((A))B"]),
    ("B", ["[B]", "_B_", "(_B_)"], ["[A]", "[B", "[BB]", "_B", "__B__"]),
    ("my_func", ["my_func", "`my_func`"], ["myfunc", "my func"]),
    ("(1, 2)", ["(1, 2)", "(1,  2)."], ["[1, 2]", "1, 2", "(1, 2]"]),
    ("f(x)", ["f(x)", "F(X)."], ["f x", "(f(x"]),
    ("ﬁnal", ["final"], ["fnal"]),
    ("नमस्ते", ["नमस्‍ते"], ["नमसते"]),  # a zero-width joiner
    ("❤️", ["❤"], ["💙"]),
]  # fmt: skip

CONTAINS = [
    ("北京", ["答案是北京市。", "北京", "在北京", "「北京」"], ["京北", "答案是南京"]),
    ("北京大学", ["我在北京大学读书"], ["我在北京读大学"]),
    ("東京", ["首都は東京です。", "東京タワー"], ["首都は京都です"]),
    ("パリ", ["首都はパリです", "ﾊﾟﾘ", "「パリ」"], ["パリティ", "スパリ"]),
    ("ありがとう", ["どうもありがとうございます"], ["ありがた迷惑"]),
    ("กรุงเทพ", ["เมืองหลวงคือกรุงเทพครับ", "กรุง\u200bเทพ"], ["เมืองหลวงคือเชียงใหม่", "กรงเทพ"]),
    ("ป", ["ก ป ข"], ["ปี"]),  # a letter is not apart from its marks
    ("ភ្នំពេញ", ["រាជធានីគឺភ្នំពេញ។"], ["ភ្នំ"]),
    ("ວຽງຈັນ", ["ນະຄອນຫຼວງແມ່ນວຽງຈັນ"], ["ຈັນ"]),
    ("서울", ["수도는 서울입니다.", "서울은 크다", "답:서울", "\u1109\u1165\u110b\u116e\u11af"], ["울산", "남서울", "수도는 부산입니다"]),
    ("दिल्ली", ["राजधानी दिल्ली है", "दिल्ली।", "दिल्ली-मुंबई"], ["दिल्लीवासी"]),
    ("पहल", ["यह पहल है"], ["वह पहली बार है"]),
    ("Paris", ["答案是Paris。", "Paris's river", "(Paris)", "l’Paris", "Paris—the capital", "Paris…"], ["Parisian", "답Parísé"]),
    ("don't", ["I don’t know", "DON'T"], ["I do not", "dont"]),
    ("can", ["Can I?", "I can"], ["I can't", "I can’t"]),
    ("eau", ["de l'eau", "l’eau"], ["beau"]),
    ("it", ["It's", "it’s"], ["its"]),
    ("C", ["Use C.", "C, C++"], ["Use C++.", "C#"]),
    ("C++", ["Use C++.", "(c++)"], ["Use C.", "C+"]),
    ("5", ["答案是5。", "٥", "第5章", "5개", "x=5", "5%", "5th", "5, 6"], ["-5", "答案是-5", "답은 -5", "答えは−5", "(−5)", "5⁶", "10⁵", "2^5", "5.5", "5e3", "1.5e5", "½5/6", "15", "５５"]),
    ("-5", ["it is −5", "(–5)", "是-5"], ["it is 5", "10-5", "x-5"]),
    ("1/2", ["about ½ of it", "1⁄2"], ["1½", "1 1/2", "11/2"]),
    ("五", ["五个苹果", "五"], ["十五个", "五百"]),
    ("十五", ["三月十五日"], ["二十五", "十五万"]),
    ("3.14", ["π≈3.14"], ["pi is 3.14159", "13.14"]),
    ("my_func", ["call my_func(x)"], ["my_func_b", "func"]),
    ("Oslo", ["_Oslo_ is", "in _Oslo_."], ["_Os_lo", "my_Oslo_b"]),
    ("__init__", ["call __init__()"], ["_init_", "init"]),
    ("🎉", ["I love it 🎉🎉"], ["🎊"]),
    ("İzmir", ["izmir güzel", "İZMİR'de", "in Izmir"], ["ızmir", "zmir"]),
    ("ılık", ["su ILIK", "Ilık"], ["ilik", "İLİK"]),
    ("Straße", ["die STRASSE"], ["Straßenbahn"]),
    ("café", ["cafe\u0301 noir", "CAFÉ"], ["cafés", "cafe", "cafe\u0300"]),
    (["Paris", "柏林"], ["Paris和柏林", "柏林, Paris"], ["Paris", "柏林"]),
]  # fmt: skip

FLAT = [("exact", *case) for case in EXACT] + [("contains", *case) for case in CONTAINS]


@pytest.mark.parametrize("name, gold, right, wrong", FLAT, ids=lambda value: value if isinstance(value, str) else "")
def test_texts_in_every_script(name, gold, right, wrong):
    assert [text for text in right if not is_right(name, text, gold)] == []
    assert [text for text in wrong if is_right(name, text, gold)] == []


def test_what_is_normalised_stays_so():
    for _, gold, right, wrong in FLAT:
        for text in [*(gold if isinstance(gold, list) else [gold]), *right, *wrong]:
            assert normalised(normalised(text)) == normalised(text), text


def test_searched_text_loses_nothing_but_spaces():
    rng = random.Random(0)
    letters = "aé_5.-/^'n t北ひカー서กี्दिⅣ²★€\u0301 "
    for _ in range(500):
        text = "".join(rng.choices(letters, k=20))
        assert re.sub(r"[\s\0]", "", words(text)) == re.sub(r"\s", "", text)


@pytest.mark.skipif(not CASES.exists(), reason=f"{CASES} is not here")
@pytest.mark.parametrize("name, count", [("exact", 16), ("contains", 16)])
def test_shared_cases(name, count):
    cases = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    cases = [case for case in cases if case["verifier"] == name]
    assert len(cases) >= count
    wrong = []
    for case in cases:
        verdict = judge(name, case["completion"], case["ground_truth"])
        if (verdict.reward == 1) != case["right"]:
            wrong.append((case["kind"], verdict))
    assert wrong == []


@pytest.mark.parametrize("gold", ["", " ", "\u200b", "。", "«»", "¿?", "***", [], None, True, ["a", "!"]])
def test_nothing_to_compare_with(gold):
    for name in ("exact", "contains", "string_f1"):
        assert judge(name, None, gold).reason == "bad_ground_truth"


# ---------------------------------------------------------------- string_f1


def squad(prediction, gold):
    """F1 as the SQuAD paper's script has it, for ASCII."""

    def tokens(text):
        text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    predicted, wanted = tokens(prediction), tokens(gold)
    same = sum((Counter(predicted) & Counter(wanted)).values())
    if not same:
        return 0.0
    precision, recall = same / len(predicted), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def test_f1_is_that_of_squad():
    rng = random.Random(1)
    pieces = ["the", "The", "an", "cat", "Cats", "dog's", "a-b", "...", "5", "5.5", "(x)", "$", "-", "'", "b"]
    for _ in range(3000):
        prediction = "x " + " ".join(rng.choices(pieces, k=rng.randint(1, 8)))  # some word that is no article
        gold = "b " + " ".join(rng.choices(pieces, k=rng.randint(1, 8)))
        assert judge("string_f1", prediction, gold).reward == pytest.approx(squad(prediction, gold), abs=1e-12)


@pytest.mark.parametrize(
    "completion, gold, reward",
    [
        ("The cat sat.", "cat sat", 1.0),
        ("cat", "cat sat", 2 / 3),
        ("dog", "cat", 0.0),
        ("cat cat cat", "cat", 0.5),  # repetition does not pay
        ("cat", ["dog", "the cat"], 1.0),
        ("cat", ["dog runs", "cat sat"], 2 / 3),
        ("<think>dog</think> <answer>cat</answer>", "cat", 1.0),
        ("<think>cat", "cat", 0.0),  # a thought that never ends
        ("A", "A", 1.0),
        ("B", "A", 0.0),
        ("12", 12, 1.0),
        ("北京市", "北京", 0.8),
        ("«Cafe\u0301»", "café", 1.0),
        ("", "cat", 0.0),
    ],
)
def test_f1(completion, gold, reward):
    verdict = judge("string_f1", completion, gold)
    assert verdict.reward == pytest.approx(reward)
    assert (verdict.reason == "right") == (reward == 1)


# ---------------------------------------------------------------- format

GOOD = [
    "<think>a</think><answer>b</answer>",
    "<think>\na b\n</think>\n\n<answer>\nb\n</answer>\n",
    "a</think> <answer>∅</answer>",
    " <think>if x < 5 then <b></think><answer>1 < 2</answer>",
]
BAD = [
    "",
    "b",
    "<answer>b</answer>",
    "<think>a</think>b",
    "<think>a</think><answer>b",
    "<think>a</think><answer>b</answer> c",
    "<think>a</think> so <answer>b</answer>",
    "hello <think>a</think><answer>b</answer>",
    "<think></think><answer>b</answer>",
    "<think> \u200b</think><answer>b</answer>",
    "<think>a</think><answer>\n</answer>",
    "<think>a</think><think>a</think><answer>b</answer>",
    "<think>a<think>a</think><answer>b</answer>",
    "<think>a</think><answer>b</answer><answer>b</answer>",
    "<think>a<answer></think>b</answer>",
    "<answer>b</answer><think>a</think>",
    "<think>a</think><answer>b</think></answer>",
    "<THINK>a</THINK><ANSWER>b</ANSWER>",
    "</think><answer>b</answer>",
]


def test_format():
    for gold in (None, "", "answer"):
        assert [text for text in GOOD if judge("format", text, gold).reward != 1] == []
        assert [text for text in BAD if judge("format", text, gold) != (0.0, "wrong", "", ())] == []


def test_format_of_a_thought_alone():
    assert all(is_right("format", text, "think") for text in ("<think>a</think>b", "a</think>\nb", "<think>a</think>b > c"))
    bad = ["", "b", "<think>a", "<think>a</think>", "<think></think>b", "<think>a</think>b</think>", GOOD[0], "b<think>a</think>b"]
    assert not any(is_right("format", text, "think") for text in bad)


@pytest.mark.parametrize("gold", ["thought", 5, ["answer"], {}])
def test_a_format_there_is_not(gold):
    verdict = judge("format", None, gold)
    assert verdict.reason == "bad_ground_truth" and "a format is one of ['answer', 'think']" in verdict.answer


# ---------------------------------------------------------------- gates

R, W, U = Verdict(1.0, "right", "a"), Verdict(0.0, "wrong", "b"), Verdict(0.0, "unparsed")
T, HALF = not_judged("timeout"), Verdict(0.5, "wrong", "c")


@pytest.mark.parametrize(
    "verdicts, weights, reward, reason",
    [
        ([R, R], [2.0, "gate"], 2.0, "right"),
        ([R, W], [2.0, "gate"], 0.0, "wrong"),
        ([R, HALF], [2.0, "gate"], 0.0, "wrong"),  # less than 1 is closed
        ([HALF, R], [2.0, "gate"], 1.0, "wrong"),
        ([W, R], [2.0, "gate"], 0.0, "wrong"),
        ([R, R], ["gate", -3.0], -3.0, "right"),
        ([W, R], ["gate", -3.0], 0.0, "wrong"),
        ([R, R, U], [1.0, "gate", "gate"], 0.0, "unparsed"),
        ([R, HALF, R], [1.0, 2.0, "gate"], 2.0, "wrong"),
        ([T, R], [1.0, "gate"], None, "timeout"),
        ([R, T], [1.0, "gate"], None, "timeout"),  # nobody knows whether it is open
        ([T, W], [1.0, "gate"], 0.0, "wrong"),  # it is closed, whatever the other had said
        ([T, W, R], ["gate", "gate", 1.0], 0.0, "wrong"),
    ],
)
def test_gate(verdicts, weights, reward, reason):
    verdict = combine(verdicts, weights)
    assert verdict.reason == reason and verdict.is_judged == (reward is not None)
    assert verdict.reward == reward or reward is None
    assert verdict.answer == " | ".join(verdict.answer for verdict in verdicts)


def test_a_gate_in_a_row():
    good, wrong, bare = "<think>1+1</think><answer>2</answer>", "<think>1+1</think><answer>3</answer>", "2"
    jobs = [(["gsm8k", "format"], text, ["2", ""], [1.0, "gate"]) for text in (good, wrong, bare)]
    jobs += [(["format", "gsm8k"], bare, [None, "2"], ["gate", "1.0"]), (["gsm8k", "format"], bare, ["2", ""])]
    with Pool(workers=1) as pool:
        assert [verdict.reward for verdict in pool.score(jobs)] == [1.0, 0.0, 0.0, 0.0, 1.0]
        assert pool.check(jobs) == {}


@pytest.mark.parametrize("weights", [[1.0, "Gate"], [1.0, "x"], [1.0, None], [1.0, float("inf")], ["nan", "gate"], [1.0, []], "gate"])
def test_weights_that_are_none(weights):
    with pytest.raises(RunError, match="weights are .* finite numbers or 'gate'|2 verifiers need lists"):
        split_job(["gsm8k", "format"], "5", ["5", ""], weights)


@pytest.mark.parametrize("job", [("format", "5", "", "gate"), (["format", "exact"], "5", ["", "5"], ["gate", "gate"])])
def test_gates_alone_give_no_reward(job):
    with pytest.raises(RunError, match="every weight is a gate"):
        split_job(*job)


# ---------------------------------------------------------------- hostile texts

HOSTILE = [*"a. (-1,/^'*<>", "٣ ", "北", "서울 ", "ア", "กู", "ı", "İ", "1½", "¹", "⁻", "1^", "1e", "n't", "\u0301", "\u200b", "\0", "\ud800", "«", "</think>", "<answer>", "the "]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE, ids=ascii)
def test_hostile_text_is_judged_in_linear_time(piece):
    """A quadratic rule would take minutes on these."""
    text = piece * (100_000 // len(piece))
    for name, gold in (("exact", "5"), ("contains", ["5", "ı"]), ("string_f1", "b"), ("format", None)):
        for completion in (text, text + "a", "x" + text + " x"):
            verdicts = []
            assert seconds_of(lambda: verdicts.append(judge(name, completion, gold)), enough=0.5) < 0.5
            assert verdicts[0].reason != "crash"
