"""pipeline.decontaminate finds what the rule says, on real leaks and planted ones, and takes out no more and no less."""

import json
import random
import runpy
import shutil
import subprocess
import sys
import time

import datasets
import pytest
from conftest import ROOT, assistant, shared, user, write_jsonl

from common import DataError, RunError, load_rows
from pipeline import convert, decontaminate
from pipeline.decontaminate import Args, Index, read_test
from pipeline.shapes import texts

STORY = (
    "On Monday morning the baker of our village carried forty loaves across the bridge while her brother counted "
    "every coin that the nine travellers had left beside the old mill under a heavy stone before sunrise"
)  # 36 words


def changed(text, share):
    """The text with other words in place of its last ones."""
    words = text.split()
    keep = round(len(words) * (1 - share))
    return " ".join(words[:keep] + [f"other{i}" for i in range(keep, len(words))])


def questions(path, *prompts):
    return write_jsonl(path, [{"question": prompt} for prompt in prompts])


def told(*prompts):
    """Rows with one question each."""
    return [{"messages": [user(prompt), assistant("Yes.")]} for prompt in prompts]


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def read(path):
    return [json.loads(line) for line in lines(path)]


def matched(out):
    """{(test, test row, train row): (share, longest run)}, of one source."""
    cells = [line.split("\t") for line in lines(out / "matches.tsv")[1:]]
    return {(test, int(row), int(at)): (float(share), int(run)) for test, row, _, at, share, run in cells}


def run(folder, tests, train, out="out", **flags):
    """Calls it with {name: prompts} and rows. Returns the matches."""
    specs = [f"{name}={questions(folder / f'{name}.jsonl', *prompts)}" for name, prompts in tests.items()]
    rows = train if isinstance(train, list) and train and isinstance(train[0], str) else [write_jsonl(folder / "train.jsonl", train)]
    decontaminate.main(Args(specs, rows, str(folder / out), **flags))
    return matched(folder / out)


# ----------------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize("rule", ["olmo3", "tulu3"])
def test_planted_copies(tmp_path, rule):
    """With none and 30 % of the words changed it is found, with 60 % it is not."""
    rows = told("What is the weather?", changed(STORY, 0), f"Please: {changed(STORY, 0.3)}", changed(STORY, 0.6))
    found = run(tmp_path, {"story": [STORY]}, rows, rule=rule)
    assert found == {("story", 1, 2): (1, 36), ("story", 1, 3): (round(25 / 36, 3), 25)}
    assert read(tmp_path / "out/clean/train.jsonl") == [rows[0], rows[3]]


def test_words(tmp_path):
    """Case, punctuation and white space do not matter; other words do. An n-gram has to be there in its order."""
    shouted = STORY.upper().replace(" ", "\t...\n", 5).replace("E ", "E-", 3).replace("BRIDGE", "\\(BRIDGE)")
    backwards = " ".join(reversed(STORY.split()))
    scattered = " ".join(f"other{i}" if i % 7 == 3 else word for i, word in enumerate(STORY.split()))  # no 8 in a row
    found = run(tmp_path, {"story": [STORY]}, told(shouted, backwards, scattered))
    assert found == {("story", 1, 1): (1, 36)}


def test_more_than_half_by_one_row(tmp_path):
    words = STORY.split()  # 36: half of them is 18
    rows = [*told(" ".join(words[:18]), " ".join(words[:19])), *told(" ".join(words[18:]))]
    assert run(tmp_path, {"story": [STORY]}, rows) == {("story", 1, 2): (0.528, 19)}
    assert run(tmp_path, {"story": [STORY]}, rows, out="all", threshold=0.49).keys() == {("story", 1, n) for n in (1, 2, 3)}
    assert not run(tmp_path, {"story": [STORY]}, rows, out="20", ngram=20)


def test_turns(tmp_path):
    """The user's turns of a row count together, but no n-gram goes from one into the next."""
    words = STORY.split()
    thirds = [" ".join(words[i : i + 12]) for i in (0, 12, 24)]
    sevenths = [" ".join(words[i : i + 7]) for i in range(0, 36, 7)]
    rows = [
        {"messages": [user(thirds[0]), assistant("And?"), user(thirds[2]), assistant("Yes.")]},  # 24 words
        {"messages": [user(part) for part in sevenths]},
        {"messages": [user("Tell me a story."), assistant(STORY)]},
    ]
    assert run(tmp_path, {"story": [STORY]}, rows) == {("story", 1, 1): (0.667, 12)}
    assert run(tmp_path, {"story": [STORY]}, rows[2:], out="answers", text="answer") == {("story", 1, 1): (1, 36)}
    assert run(tmp_path, {"story": [STORY]}, rows, out="both", text="both").keys() == {("story", 1, 1), ("story", 1, 3)}


def by_definition(prompt, turns, n):
    """The share of a prompt's words that turns match, word by word."""
    held = set()
    for turn in turns:
        held |= {tuple(turn[i : i + n]) for i in range(len(turn) - n + 1)}
    starts = [i for i in range(len(prompt) - n + 1) if tuple(prompt[i : i + n]) in held]
    return sum(any(i <= word < i + n for i in starts) for word in range(len(prompt))) / len(prompt)


def test_by_definition(tmp_path):
    """Against the definition, on texts of few words, where n-grams come again and again."""
    draw = random.Random(1)
    texts_of = lambda: [draw.choices(["red", "green", "blue"], k=draw.randint(5, 30)) for _ in range(draw.randint(1, 3))]  # noqa: E731
    prompts = [words for _ in range(30) for words in texts_of()]
    path = questions(tmp_path / "t.jsonl", *(" ".join(words) for words in prompts))
    index = Index(dict([read_test(f"t={path}")]), Args([], [], "", ngram=5, rule="tulu3"))
    hits = 0
    for _ in range(100):
        turns = texts_of()
        found = {prompt.row - 1: share for prompt, share, _ in index.search([" ".join(turn) for turn in turns])}
        shares = {number: by_definition(prompt, turns, 5) for number, prompt in enumerate(prompts)}
        assert found == {number: share for number, share in shares.items() if share > 0.5}
        hits += len(found)
    assert hits > 100


# ------------------------------------------------------------------------------------ what OLMo 3's rule does besides

FORM = [
    f"Write a python function to find the exact {word} of all the given numbers"
    for word in ("sum", "maximum", "length", "median", "mean", "product")
]


def test_form(tmp_path):
    """A row with a benchmark's form alone hits nothing; an ignore list takes the place of what is counted."""
    tests = {"prompts": [*FORM, STORY]}
    rows = told("Write a python function to find the exact roots of a polynomial", STORY, FORM[2])
    copies = {("prompts", 7, 2), ("prompts", 3, 3)}  # are found, whatever does not count
    assert run(tmp_path, tests, rows).keys() == copies
    report = lines(tmp_path / "out/report.md")
    assert "- form, in 6 prompts: write a python function" in report
    (tmp_path / "none.txt").write_text("")
    (tmp_path / "some.txt").write_text("\nWrite a python function, to find...\n")
    without = run(tmp_path, tests, rows, out="none", ignore=str(tmp_path / "none.txt"))
    listed = run(tmp_path, tests, rows, out="some", ignore=str(tmp_path / "some.txt"))
    assert {test for _, test, row in without if row == 1} == {1, 2, 3, 4, 5, 6}
    assert run(tmp_path, tests, rows, out="tulu", rule="tulu3") == without
    assert "form" not in (tmp_path / "tulu/report.md").read_text().partition("## ")[2].partition("## ")[0]
    assert listed.keys() == copies


def test_few_prompts_have_no_form(tmp_path):
    """Neither 3 that are alike, nor 5 of 105: the row hits them all."""
    alike = [f"{STORY} {word}" for word in ("today", "again", "at last", "and left", "once more")]
    others = [f"Prompt{i} has{i} words{i} that{i} are{i} its{i} own{i} alone{i} here{i}" for i in range(100)]
    row = told(changed(STORY, 0.3))
    assert len(run(tmp_path, {"few": alike[:3]}, row, out="few")) == 3
    assert len(run(tmp_path, {"many": alike + others}, row, out="many")) == 5
    assert len(run(tmp_path, {"less": alike + others[:94]}, row, out="less")) == 0  # 5 of 99


def test_single_characters(tmp_path):
    """Formulas that many rows share do not count, words do."""
    formula = "Find x if a + b = c and d + e = f and x = a b c d e"
    row = told("Draw a + b = c and d + e = f and x = a b c d e")
    assert run(tmp_path, {"math": [formula]}, row, rule="tulu3").keys() == {("math", 1, 1)}
    assert not run(tmp_path, {"math": [formula]}, row, out="olmo3")
    assert run(tmp_path, {"math": [formula]}, told(f"{formula} now"), out="copy") == {("math", 1, 1): (1, 22)}


def test_short_prompts(tmp_path):
    """Compared whole, as words in a row; under three words with a whole turn."""
    tests = {"short": ["Compute $\\dbinom{5}{3}$.", "What is the capital of Peru?", "Why me?", "3+4=", "!?"]}
    rows = told("First compute $\\dbinom{5}{3}$ please", "What is the capital of Peru", "what is the capital city of peru",
                "Why me?", "why me now?", "why", "3+4=", "3+4= 7", "")  # fmt: skip
    hits = {("short", 1, 1): (1, 3), ("short", 2, 2): (1, 6), ("short", 3, 4): (1, 2), ("short", 4, 7): (1, 1)}
    assert run(tmp_path, tests, rows, max_skip_frac=0.5) == hits
    report = lines(tmp_path / "out/report.md")
    assert "- 4 prompts are compared whole" in report and "- 1 prompts are too short to be found" in report
    assert not run(tmp_path, tests, rows, out="tulu", rule="tulu3", max_skip_frac=0.5)
    assert "- 5 prompts are too short to be found" in lines(tmp_path / "tulu/report.md")


# -------------------------------------------------------------------------------------------------- rows and columns

PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
TALK = [user("Q"), assistant("A")]


@pytest.mark.parametrize(
    "row, which, expected",
    [
        ({"messages": [*TALK, user("R")]}, "prompt", ["Q", "R"]),
        ({"messages": [{"role": "system", "content": "S"}, *TALK]}, "both", ["Q", "A"]),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "answer", ["A"]),
        ({"prompt": "Q", "completion": "A"}, "prompt", ["Q"]),
        ({"prompt": "Q", "completion": "A"}, "answer", ["A"]),
        ({"prompt": [user("Q")], "dataset": "math", "ground_truth": "1"}, "prompt", ["Q"]),
        (PAIR, "prompt", ["Q"]),
        (PAIR, "answer", ["good", "bad"]),
        ({"chosen": TALK, "rejected": [user("Q"), assistant("B")]}, "both", ["Q", "A", "B"]),
        ({"question": "Q", "answer": "A"}, "prompt", ["Q"]),
        ({"problem": "Q", "solution": "A"}, "prompt", ["Q"]),
        ({"text": "Q", "code": "A"}, "prompt", ["Q"]),
        ({"Body": "B", "Question": "Q"}, "prompt", ["B\nQ"]),
        ({"instruction": "Q", "input": "I", "output": "A"}, "prompt", ["Q\nI"]),
        ({"instruction": "Q", "instances": []}, "prompt", ["Q"]),
        ({"turns": ["Q", "R"]}, "prompt", ["Q\nR"]),
    ],
)  # fmt: skip
def test_texts(row, which, expected):
    assert texts.turns(row, which) == expected


def test_columns_of_tests(tmp_path):
    words = STORY.split()
    half, rest = " ".join(words[:18]), " ".join(words[18:])
    path = write_jsonl(tmp_path / "t.jsonl", [{"question": "Which?", "passage": half, "hint": rest, "n": 3}])
    train = write_jsonl(tmp_path / "train.jsonl", told(half, STORY))
    for column, hits in (("", set()), (":passage", {1, 2}), (":passage+hint", {2})):
        out = tmp_path / f"out{column.replace(':', '_')}"
        decontaminate.main(Args([f"t={path}{column}"], [train], str(out)))
        assert {row for _, _, row in matched(out)} == hits
    for column, message in (("n", "column n holds no text"), ("no", "column no holds no text")):
        with pytest.raises(DataError, match=f"t.jsonl, row 1: {message}.* --test t=.*:COLUMN names a column"):
            decontaminate.main(Args([f"t={path}:{column}"], [train], str(tmp_path / "never")))


class Numbers:
    """An encoder that keeps nothing of a row; its number is added by `load_rows`."""

    key = "numbers"
    features = {"input_ids": datasets.List(datasets.Value("int32")), "trained": datasets.List(datasets.Value("bool"))}

    def __call__(self, row):
        return {"input_ids": [1, 2], "trained": [True, True], "notes": []}


@pytest.mark.parametrize("amount", ["", ":7", ":0.5", ":2.0", ":1.3"])
def test_amounts(tmp_path, amount):
    """The rows that the scripts take of a source in this place."""
    first = write_jsonl(tmp_path / "first.jsonl", told("a"))
    second = write_jsonl(tmp_path / "second.jsonl", told(*(f"Question {i}?" for i in range(20))))
    sources = [first, f"{second}{amount}"]
    rows = load_rows(sources, Numbers(), seed=3)
    theirs = {entry["row"] for entry in rows.table if entry["source"] == 1}
    assert [number for number, _ in texts.rows(sources, 1, seed=3)] == sorted(theirs)


# -------------------------------------------------------------------------------------------------- what is written


@pytest.fixture
def leaky(tmp_path):
    """A benchmark of two prompts, and two sources that are called alike; the first has 3 rows of 40 that hit."""
    (tmp_path / "other").mkdir()
    rows = told(*(f"Question number {i}?" for i in range(37)), STORY, STORY.upper(), changed(STORY, 0.3))
    random.Random(1).shuffle(rows)
    test = questions(tmp_path / "story.jsonl", STORY, "What is the name of the largest river that flows through the town of Cologne?")
    trains = [write_jsonl(tmp_path / "train.jsonl", rows), write_jsonl(tmp_path / "other/train.jsonl", told("Hello?"))]
    return tmp_path, [f"story={test}"], trains, rows


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files(leaky, capsys):
    folder, tests, trains, rows = leaky
    decontaminate.main(Args(tests, trains, str(folder / "out")))
    out = folder / "out"
    assert set(files(out)) == {"report.md", "matches.tsv"} | {
        f"{kind}/{name}.jsonl" for kind in ("clean", "random") for name in ("train", "train_2")
    }
    hit = {row for _, _, row in matched(out)}
    clean, control = read(out / "clean/train.jsonl"), read(out / "random/train.jsonl")
    assert clean == [row for number, row in enumerate(rows, 1) if number not in hit]
    assert len(hit) == 3 and len(control) == len(clean) == 37 and control != clean
    places = [rows.index(row) for row in control]
    assert places == sorted(set(places))  # rows of the source, in its order
    assert read(out / "clean/train_2.jsonl") == read(out / "random/train_2.jsonl") == told("Hello?")
    report = (out / "report.md").read_text()
    assert capsys.readouterr().out.strip() == report.strip()
    assert f"| story | 2 | {trains[0]} | 40 | 1 | 50.0% | 3 | contaminated |\n| story | 2 | {trains[1]} | 1 | 0 | 0.0% | 0 | clean |" in report
    assert report.count("share 1.00, 36 words: on monday morning") == 2 and report.count("share 0.69, 25 words") == 1


def test_verdicts_and_examples(tmp_path):
    """2 % of a benchmark is the limit; five matches are shown, with the largest share and the smallest."""
    prompts = [STORY, *(f"Prompt{i} has{i} words{i} that{i} are{i} its{i} own{i} alone{i} here{i}" for i in range(49))]
    rows = told(*(changed(STORY, share / 100) for share in range(0, 44, 4)))
    run(tmp_path, {"fifty": prompts}, rows)
    report = (tmp_path / "out/report.md").read_text()
    assert "| 1 | 2.0% | 11 | below the limit |" in report
    assert report.count("- fifty row 1, row ") == 5
    assert 0 < report.find("row 1: share 1.00") < report.find("row 11: share 0.61")
    run(tmp_path, {"fifty": prompts}, rows, out="strict", contaminated=0.019)
    assert "| 1 | 2.0% | 11 | contaminated |" in (tmp_path / "strict/report.md").read_text()


def test_same_bytes(leaky):
    folder, tests, trains, _ = leaky
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        decontaminate.main(Args(tests, trains, str(folder / name), seed=seed))
    a, b, c = (files(folder / name) for name in "abc")
    assert a == b
    assert {name for name in a if a[name] != c[name]} == {"random/train.jsonl"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, DataError("x", 1, "y")])
def test_interrupted(leaky, monkeypatch, error):
    """Nothing is there until all is; what a kill has left does no harm."""
    folder, tests, trains, _ = leaky
    decontaminate.main(Args(tests, trains, str(folder / "whole")))
    before = {path.name for path in folder.iterdir()}
    report = decontaminate.report_lines
    monkeypatch.setattr(decontaminate, "report_lines", lambda *args: (_ for _ in ()).throw(error))
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        decontaminate.main(Args(tests, trains, str(folder / "out")))
    assert {path.name for path in folder.iterdir()} == before
    monkeypatch.setattr(decontaminate, "report_lines", report)
    (folder / ".out.unfinished/clean").mkdir(parents=True)
    (folder / ".out.unfinished/clean/train.jsonl").write_text('{"half')
    decontaminate.main(Args(tests, trains, str(folder / "out")))
    assert files(folder / "out") == files(folder / "whole")
    assert {path.name for path in folder.iterdir()} == before | {"out"}


def test_rows_without_text(tmp_path):
    """Counted and left out of both; more than --max_skip_frac of them end it."""
    rows = [*told(STORY, "Hello?"), {"messages": [user(" ")]}, {"score": 1}]
    run(tmp_path, {"story": [STORY]}, rows, max_skip_frac=0.5)
    assert read(tmp_path / "out/clean/train.jsonl") == told("Hello?")
    assert len(read(tmp_path / "out/random/train.jsonl")) == 1
    report = lines(tmp_path / "out/report.md")
    assert "2 rows searched, 1 taken out." in report
    assert "- 1 left out: messages[0].content is empty: a prompt needs text" in report
    assert any(line.startswith("- 1 left out: no prompt in the columns score") for line in report)
    message = r"train.jsonl, row 3: messages\[0\].content is empty.*; 2 of 4 rows .* --max_skip_frac"
    with pytest.raises(DataError, match=message):
        run(tmp_path, {"story": [STORY]}, rows, out="never")
    assert not (tmp_path / "never").exists()


def test_refused(leaky, monkeypatch):
    folder, tests, trains, _ = leaky
    (folder / "full").mkdir()
    (folder / "full/mine.txt").write_text("keep")
    empty = write_jsonl(folder / "empty.jsonl", [])
    out = str(folder / "out")
    for args, message in (
        (Args(tests, trains, str(folder / "full")), "full is there already: delete it"),
        (Args(["story"], trains, out), "expected NAME=SOURCE"),
        (Args(tests * 2, trains, out), "two benchmarks have one name"),
        (Args([f"e={empty}"], trains, out), "empty.jsonl: the data set is empty"),
        (Args(tests, [empty], out), "empty.jsonl: the data set is empty"),
        (Args(tests, trains, out, ignore=str(folder / "no.txt")), "no.txt cannot be read: .*No such file"),
        (Args(tests, trains, out, ignore=empty, rule="tulu3"), "tulu3 ignores nothing"),
        (Args(tests, trains, out, ngram=1), "--ngram 1 is out of range"),
        (Args(tests, trains, out, threshold=1), "--threshold 1 is out of range"),
    ):
        with pytest.raises(RunError, match=message):
            decontaminate.main(args)
    assert (folder / "full/mine.txt").read_text() == "keep" and not (folder / "out").exists()
    monkeypatch.setattr(sys, "argv", ["decontaminate", "--test", "story", "--train", *trains, "--out", out])
    monkeypatch.delitem(sys.modules, "pipeline.decontaminate")
    with pytest.raises(SystemExit, match="^error: --test story: expected NAME=SOURCE"):
        runpy.run_module("pipeline.decontaminate", run_name="__main__")


# ------------------------------------------------------------------------------------------------------- real leaks


def mbpp(folder):
    """MBPP's test rows (task 11 to 510), and its others."""
    parts = {True: [], False: []}
    for row in read(shared("data/code/mbpp.jsonl")):
        parts[11 <= row["task_id"] <= 510].append(row)
    return write_jsonl(folder / "mbpp_test.jsonl", parts[True]), write_jsonl(folder / "mbpp_rest.jsonl", parts[False])


def benchmarks(folder):
    files = {
        "gsm8k": "gsm8k/test.jsonl", "math500": "math/math500.jsonl", "humaneval": "code/humaneval.jsonl",
        "ifeval": "ifeval/input_data.jsonl", "aime24": "math/aime24.jsonl",
    }  # fmt: skip
    return [f"{name}={shared('data', file)}" for name, file in files.items()] + [f"mbpp={mbpp(folder)[0]}"]


def counts(out):
    """{(test, source's file): (prompts hit, rows hit)} of the pairs with hits."""
    hits = {}
    rows = {tuple(line.split("\t")[:4]) for line in lines(out / "matches.tsv")[1:]}
    pairs = {(test, train) for test, _, train, _ in rows}
    for test, train in pairs:
        of_pair = [row for row in rows if (row[0], row[2]) == (test, train)]
        hits[test, train.rpartition("/")[2]] = (len({row[1] for row in of_pair}), len({row[3] for row in of_pair}))
    return hits


# Counted with open-instruct's words and no refinement, and with ours.
TULU3 = {
    ("gsm8k", "train.jsonl"): (2, 3),
    ("gsm8k", "mt_bench_questions.jsonl"): (1, 1),
    ("math500", "math_test_minus500.jsonl"): (52, 98),
    ("mbpp", "mbpp_rest.jsonl"): (139, 158),
    ("mbpp", "mbpp_sanitized.jsonl"): (253, 251),
    ("mbpp", "gpteacher_codegen_2000.jsonl"): (3, 4),
    ("mbpp", "mt_bench_questions.jsonl"): (1, 1),
}
OLMO3 = TULU3 | {
    ("math500", "math_test_minus500.jsonl"): (49, 91),
    ("mbpp", "mbpp_rest.jsonl"): (76, 85),
    ("mbpp", "mbpp_sanitized.jsonl"): (200, 205),
}


@pytest.mark.parametrize("rule, expected", [("tulu3", TULU3), pytest.param("olmo3", OLMO3, marks=pytest.mark.slow)])
def test_real_leaks(tmp_path, rule, expected):
    names = """gsm8k/train chat/mt_bench_questions math/math_test_minus500 code/mbpp_sanitized math/svamp
        instruct/gpteacher_codegen_2000 chat/oasst_en_threads instruct/self_instruct_seed_tasks
        instruct/self_instruct_user_oriented"""
    sources = [str(shared("data", f"{name}.jsonl")) for name in names.split()] + [mbpp(tmp_path)[1]]
    if rule == "olmo3":
        hh = [str(shared("data/preference", f"hh_helpful_base.{part}.jsonl")) for part in ("train", "test")]
        convert.main(convert.Args(hh, str(tmp_path / "hh.jsonl")))
        sources.append(str(tmp_path / "hh.jsonl"))
    decontaminate.main(Args(benchmarks(tmp_path), sources, str(tmp_path / "out"), rule=rule))
    assert counts(tmp_path / "out") == expected
    found = {tuple(line.split("\t")[:5]) for line in lines(tmp_path / "out/matches.tsv")}
    for test, train, share in (  # rows are counted from 1
        (603, (0, 1315), "0.760"), (603, (0, 5163), "0.760"), (633, (0, 21), "0.625"), (327, (1, 35), "0.947"),
    ):  # fmt: skip
        assert ("gsm8k", str(test), sources[train[0]], str(train[1]), share) in found


def test_prompts_of_benchmarks(tmp_path):
    """Under eight words are 21 prompts of MATH-500 and 5 of MBPP; OLMo 3's rule finds a copy of each prompt."""
    tests = dict(map(read_test, benchmarks(tmp_path)))
    short = {"math500": 21, "mbpp": 5}
    assert Index(tests, Args([], [], "", rule="tulu3")).counts == {
        (name, "too short to be found"): count for name, count in short.items()
    }
    index = Index(tests, Args([], [], ""))
    assert all(index.counts[name, "compared whole"] >= count for name, count in short.items())
    assert {what for _, what in index.counts} == {"compared whole"}
    for prompt in index.prompts[::7] + [prompt for prompt in index.prompts if len(prompt.words) < 12]:
        hit = [other for other, _, _ in index.search([f"Solve this: {prompt.text} Think first."])]
        assert prompt in hit


@pytest.mark.slow
def test_killed(tmp_path):
    """Killed at any time, --out is whole or not there, and the same command ends with the same bytes."""
    test, train = shared("data/gsm8k/test.jsonl"), shared("data/gsm8k/train.jsonl")
    command = [sys.executable, "-m", "pipeline.decontaminate", "--test", f"gsm8k={test}", "--train", str(train), "--out"]
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL}
    started = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, **quiet)
    seconds = time.monotonic() - started
    killed = 0
    for share in (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 1):
        process = subprocess.Popen([*command, str(tmp_path / "out")], **quiet)
        try:
            process.wait(share * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
        if (tmp_path / "out").exists():
            assert files(tmp_path / "out") == files(tmp_path / "whole")
            shutil.rmtree(tmp_path / "out")
    assert killed
    subprocess.run([*command, str(tmp_path / "out")], check=True, **quiet)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
