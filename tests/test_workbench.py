"""`python -m rewards`: checks of data, scores, and two verifiers side by side."""

import json
import os
import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT, user, write_jsonl
from test_judges import endpoint, own_verifiers  # noqa: F401 (fixtures)

from common import DataError, RunError
from rewards.__main__ import Args, agreement, differ, main, summary
from rewards.verifiers import Verdict, not_judged

MINE = """
from rewards import verifier

@verifier("short")
def short(completion, ground_truth):
    return len(completion) < 20

@verifier("half")
def half(completion, ground_truth):
    return 0.5

@verifier("as_asked")
def as_asked(completion, ground_truth, prompt, row):
    return completion == prompt[-1]["content"] + row["mark"]

@verifier("fails")
def fails(completion, ground_truth):
    raise ValueError("no idea")
"""
MATH = [
    {"dataset": "math", "ground_truth": "18", "completion": r"So it is $\boxed{18}$."},  # both
    {"dataset": "math", "ground_truth": "18", "completion": "It is $18$." + " x" * 200 + " for 19 of them\x1b[2J."},  # math
    {"dataset": "math", "ground_truth": "18", "completion": "It is $19$, no, 18."},  # gsm8k
    {"dataset": ["math"], "ground_truth": ["18"], "completion": r"$\boxed{19}$, not $18$"},  # neither
    {"dataset": "math", "ground_truth": "x+y", "completion": r"$\boxed{y+x}$"},  # no number: gsm8k cannot judge it
    {"dataset": "math", "ground_truth": "5"},  # nothing to judge
]


@pytest.fixture
def mine(tmp_path, own_verifiers):  # noqa: F811
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return str(path)


def call(path, **flags):
    main([path], Args([path], **flags))


# ------------------------------------------------------------------------------------------------------------- checks


def test_rows_that_fail_the_audit_are_listed_and_are_no_error(tmp_path, capsys):
    good, bad = ["assert f(1) == 2", "assert f(5) == 6"], ["assert callable(f)"]
    rows = [
        {"dataset": "code", "ground_truth": good},
        {"dataset": "CODE", "ground_truth": bad},
        {"dataset": "exact", "ground_truth": "a"},
        {"dataset": "code", "ground_truth": good, "solution": "def f(x):\n    return x - 1"},
        {"dataset": ["exact", "code"], "ground_truth": ["a", json.dumps(bad)], "weights": [1, 2]},
    ]
    path = write_jsonl(tmp_path / "code.jsonl", rows)
    call(path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{path}: 5 ground truths", "  audit: the tests of 3 of 4 code rows are worth no reward"]
    assert [line.split(":")[0] for line in lines[2:]] == ["    row 2", "    row 4", "    row 5"]
    assert "the tests pass for a program that" in lines[2] and "own solution fails" in lines[3]
    call(path, audit=False)
    assert capsys.readouterr().out == f"{path}: 5 ground truths\n"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"dataset": "gsm8k", "ground_truth": "5", "completion": 5}, "row 2: `completion` is of type int, expected a string"),
        ({"dataset": "gsm8k", "ground_truth": "5", "completion": ["5"]}, "row 2: `completion` is of type list"),
        ({"dataset": ["gsm8k"], "ground_truth": "5", "completion": "5"}, "row 2: 1 verifiers need lists"),
        ({"dataset": "gsm8k", "ground_truth": "5", "weights": "much"}, "row 2: weights are"),
        ({"dataset": 5, "ground_truth": "5"}, "row 2: the verifier is 5, expected"),
        ({"dataset": {"a": 1}, "ground_truth": "5"}, "row 2: the verifier is {'a': 1}, expected"),
        ({"dataset": [], "ground_truth": []}, r"row 2: the verifier is \[\], expected"),
        ({"dataset": [["gsm8k"]], "ground_truth": ["5"]}, "row 2: no verifier is named"),
        ({"dataset": "general-quality", "ground_truth": ""}, "row 2: no field 'messages'"),
        ({"completion": "5", "row": "gone.jsonl, row 3"}, "gone.jsonl"),
        ({"completion": "5", "row": "{path}, row 9"}, "row 2: it is of .*, row 9, which is not there"),
        ("[]", "row 2"),
        ('"text"', "row 2"),
        ("null", "row 2"),
    ],
)
@pytest.mark.parametrize("flags", [{}, {"against": "exact"}])
def test_bad_rows_are_one_clear_error(tmp_path, row, message, flags):
    path = tmp_path / "bad.jsonl"
    text = row if isinstance(row, str) else json.dumps(row).replace("{path}", str(path))
    path.write_text('{"dataset": "exact", "ground_truth": "a", "completion": "b"}\n' + text + "\n")
    with pytest.raises(RunError, match=message) as error:
        call(str(path), **flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "rows.jsonl"], "error: --out rows.jsonl is one of the files that are read"),
        (["--out", "./linked.jsonl"], "error: --out ./linked.jsonl is one of the files that are read"),
        (["--out", "no/such/out.jsonl"], "error: --out no/such/out.jsonl cannot be written: No such file or directory"),
        (["--out", "."], "error: --out . cannot be written: Is a directory"),
        (["--rewards", "none.py"], "error: --rewards none.py: there is no such file"),
        (["--rewards", "broken.py"], "error: --rewards broken.py, line 2 cannot be imported: ZeroDivisionError: division by zero"),
        (["--rewards", "empty.py"], "error: --rewards empty.py defines no verifier: a function with the decorator @verifier(NAME)"),
        (["--verifier", "no_such"], "error: --verifier no_such: no verifier has this name; there are "),
        (["--against", "no_such"], "error: --against no_such: no verifier has this name; there are "),
        (["--verifier", "general-quality"], "error: judges need JUDGE_URL, JUDGE_MODEL, in the environment or in JUDGE_FILE"),
    ],
)  # fmt: skip
def test_the_command_fails_with_one_line(tmp_path, monkeypatch, flags, message):
    """As `python -m rewards`, but in this process. A text as the exit's code goes to stderr, and the status is 1."""
    for name in ("JUDGE_URL", "JUDGE_MODEL", "JUDGE_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [{"dataset": "exact", "ground_truth": "a", "completion": "b", "prompt": "c"}])
    os.link(tmp_path / "rows.jsonl", tmp_path / "linked.jsonl")
    (tmp_path / "broken.py").write_text("\n1 / 0\n")
    (tmp_path / "empty.py").write_text("")
    before = (tmp_path / "rows.jsonl").read_text()
    monkeypatch.setattr(sys, "argv", ["rewards", "rows.jsonl", *flags])
    monkeypatch.delitem(sys.modules, "rewards.__main__")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("rewards", run_name="__main__")
    assert end.value.code.startswith(message) and "\n" not in end.value.code
    assert (tmp_path / "rows.jsonl").read_text() == before


def test_the_command_itself(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", MATH)
    command = [sys.executable, "-m", "rewards", path, "--against", "gsm8k"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "TQDM_DISABLE": "1"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "only gsm8k" in done.stdout


# ---------------------------------------------------------------------------------------------------------- verifiers


def test_verifiers_of_ones_own_judge_rows_that_name_none(tmp_path, mine, capsys):
    rows = [{"completion": "a" * n, "prompt": "a" * 18, "mark": "a"} for n in (1, 19, 20, 300)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    call(path, rewards=[mine], verifier=["short"])
    assert "4 completions, mean reward 0.5000: 2 right, 2 wrong" in capsys.readouterr().out
    call(path, rewards=[mine], verifier=["as_asked:4"])  # the row with prompt and mark is the second
    assert "4 completions, mean reward 1.0000: 1 right, 3 wrong" in capsys.readouterr().out
    call(path, rewards=[mine], verifier=["fails"])
    assert "4 completions, none could be judged: 4 crash" in capsys.readouterr().out


def test_another_verifier_than_the_rows(tmp_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"dataset": ["exact"], "ground_truth": ["5"], "completion": "It is 5."}])
    call(path)
    assert "mean reward 0.0000: 1 wrong" in capsys.readouterr().out
    call(path, verifier=["gsm8k"])  # gets "5", not ["5"]
    assert "mean reward 1.0000: 1 right" in capsys.readouterr().out
    with pytest.raises(DataError, match="row 1: ground_truth of 'ifeval'"):
        call(path, verifier=["ifeval"])


def test_a_judge_is_asked(tmp_path, endpoint, capsys):  # noqa: F811
    endpoint(lambda question, _: '{"SCORE": 8}' if "Paris" in question else 400)
    rows = [{"dataset": "general-quality", "ground_truth": "", "messages": [user("Capital?")], "completion": text} for text in ("Paris", "Rome")]  # fmt: skip
    call(write_jsonl(tmp_path / "rows.jsonl", rows), against="exact", verifier=["general-quality"])
    out = capsys.readouterr().out
    assert "2 completions, mean reward 0.8000 of the 1 that were judged: 1 wrong, 1 unjudged" in out


def test_samples_of_a_run_are_judged_by_the_rows_they_are_of(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": [user(f"{i}?")], "dataset": "gsm8k", "ground_truth": str(i)} for i in range(5)]
    write_jsonl(tmp_path / "a, row 1.jsonl", rows)
    samples = [{"row": f"a, row 1.jsonl, row {i + 1}", "prompt": f"<user>{i}?", "completion": "2", "reward": 0} for i in (2, 3, 2)]
    call(write_jsonl(tmp_path / "samples.jsonl", samples))
    assert "3 completions, mean reward 0.6667: 2 right, 1 wrong" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- two of them


def test_two_verifiers_side_by_side(tmp_path, capsys):
    path, out = write_jsonl(tmp_path / "rows.jsonl", MATH), str(tmp_path / "out.jsonl")
    call(path, against="gsm8k", out=out)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    lines = printed.splitlines()
    assert lines[0] == f"{path}: 6 ground truths"
    rows = [line.rsplit(None, 1) for line in lines if re.match(r"    (both|only|neither|not)\b", line)]
    table = {name.strip(): int(count) for name, count in rows}
    with open(out) as file:
        written = [json.loads(line) for line in file]
    rewards = [(line["verdicts"]["math"]["reward"], line["verdicts"]["gsm8k"]["reward"]) for line in written]
    assert [line["row"] for line in written] == [1, 2, 3, 4, 5] and {line["file"] for line in written} == {path}
    assert rewards == [(1, 1), (1, 0), (0, 1), (0, 0), (1, None)]
    assert written[4]["verdicts"]["gsm8k"]["reason"] == "bad_ground_truth"
    assert table == {"both right": 1, "only math": 1, "only gsm8k": 1, "neither": 1, "not judged": 1}
    assert "  disagreements: 3" in lines
    shown = [line for line in lines if line.startswith("    row ")]
    assert [line.split(",")[0] for line in shown] == ["    row 2", "    row 3", "    row 5"]
    assert all(len(line) < 200 for line in lines)


def test_only_the_first_disagreements_are_shown(tmp_path, mine, capsys):
    rows = [{"dataset": "half", "ground_truth": "", "completion": f"{i}", "weights": 3} for i in range(25)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    call(path, rewards=[mine], against="short")
    printed = capsys.readouterr().out
    assert "disagreements: 25" in printed and printed.count("\n    row ") == 10 and "and 15 more" in printed
    assert "half: reward 1.5, wrong" in printed and "short: reward 3, right" in printed
    call(path, rewards=[mine], against="half")  # the same verdicts, though the rows' weight is 3
    printed = capsys.readouterr().out
    assert "half again" in printed and "disagreements: 0" in printed


@pytest.mark.parametrize("flags", [{"against": "exact"}, {"out": "out.jsonl"}])
def test_nothing_to_compare(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="no row has a `completion`"):
        call(write_jsonl(tmp_path / "rows.jsonl", [{"dataset": "exact", "ground_truth": "a"}]), **flags)


def test_what_agrees():
    right, wrong, half, none = Verdict(1.0, "right"), Verdict(0.0, "wrong"), Verdict(0.5, "wrong"), not_judged("timeout")
    assert [agreement(*pair) for pair in [(right, right), (right, half), (wrong, right), (half, wrong), (none, right)]] == [
        "both", "first", "second", "neither", "not judged"
    ]  # fmt: skip
    assert not differ(half, half) and not differ(none, none) and not differ(half, Verdict(0.5 + 1e-9, "wrong"))
    assert differ(half, wrong) and differ(none, wrong) and differ(right, none)


def test_a_mean_holds_no_reward_that_is_not_there():
    assert summary([Verdict(1.0, "right"), not_judged("crash")]) == (
        "2 completions, mean reward 1.0000 of the 1 that were judged: 1 right, 1 crash"
    )
