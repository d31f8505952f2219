"""pipeline.report: the page holds what the runs have written, loads nothing, and is the same when made again."""

import json
import re
import subprocess
import sys

import browser
import numpy as np
import pytest
from conftest import ROOT

from common import RunError
from pipeline import report


def make_run(folder, script="grpo.py", steps=300, args=(), evil="2+2=5"):
    """A folder as a script leaves it: a held-out reward with its interval every 100 steps, and answers to two prompts."""
    folder.mkdir(parents=True)
    flags = {"model": "m", "batch_size": 4, "group_size": 8, "lr": 1e-3, "data": ["a.jsonl"], "out": str(folder)} | dict(args)
    config = {"script": script, "data": [None, None], "args": flags, "steps": steps, "date": "2026-01-01", "commit": "c0ffee00aa"}
    (folder / "config.json").write_text(json.dumps(config | {"data_report": ["a.jsonl: 7 rows read, 7 kept"]}))
    entries, samples = [], []
    for step in range(steps + 1):
        entry = {"step": step}
        if step:
            entry |= {"loss": 1 / step, "lr": 0.1, "seconds": 2.0, "tokens": 50, "peak_memory_gib": 3.5, "reward": step / steps}
        if step % 100 == 0:
            entry |= {"eval_reward": step / steps, "eval_reward_low": step / steps - 0.1, "eval_reward_high": step / steps + 0.1}
            entry |= {"eval_subsets": {"a": [0, 1]}}
            for row in ("x, row 1", "x, row 2"):
                line = {"step": step, "row": row, "prompt": f"<|user|>{row}", "completion": f"{evil} at {step}", "reward": 0.5}
                samples.append(line | {"held_out": True, "ended": step > 0, "reason": "wrong"})
        entries.append(entry)
    for name, lines in (("metrics", entries), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def make(*runs, out, **flags):
    report.main(report.Args(runs=list(runs), out=str(out), **flags))
    return out.read_text()


def test_a_page_of_two_runs(tmp_path):
    runs = make_run(tmp_path / "a"), make_run(tmp_path / "b", args={"lr": 2e-3}, evil="<script>alert(1)</script>")
    text = make(*runs, out=tmp_path / "page.html")
    assert text == make(*runs, out=tmp_path / "page.html")  # a report may be made anew
    for shown in ("300 of 300", "0:10:00", "c0ffee00", "3.5 GiB", "a.jsonl: 7 rows read, 7 kept", "2+2=5 at 200"):
        assert shown in text
    assert re.findall(r"<h2>(.*)</h2>", text)[:5] == ["Flags that differ", "Held-out data", "Rewards", "Training", "Speed and memory"]
    assert re.search(r"<td>--lr</td><td>0.001</td><td>0.002</td>", text) and "<td>--batch_size</td>" not in text
    assert text.count("<svg") == len(["eval_reward", "reward", "loss", "lr", "seconds", "tokens", "peak_memory_gib"])
    assert "<script>" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; at 0" in text
    assert "&lt;|user|&gt;x, row 1" in text  # control tokens are seen
    assert not re.search(r'(src|href)="(?!#)', text)  # nothing is loaded
    assert text.count("cut off") == 4


def test_which_answers(tmp_path):
    lines = [{"step": step, "row": row, "prompt": row, "held_out": True} for step in (0, 5, 10, 15, 20) for row in "ab"]
    lines += [{"step": 5, "row": "c", "prompt": "c", "held_out": False}]
    found = report.answers(lines, 1)
    assert [(prompt, [line["step"] for line in each]) for prompt, each in found] == [("a", [0, 10, 20])]
    assert report.answers([], 3) == [] and report.answers(lines, 0) == []
    [(heading, each)] = report.answers([line | {"held_out": False} for line in lines], 2)
    assert heading == "training prompts" and [(line["step"], line["row"]) for line in each] == [
        (0, "a"), (0, "b"), (10, "a"), (10, "b"), (20, "a"), (20, "b")]  # fmt: skip


@pytest.mark.parametrize("x, last", [("step", 1000), ("samples", 32000), ("tokens", 50000), ("hours", 2000 / 3600)])
def test_long_lines_are_means_of_parts(tmp_path, x, last):
    folder = report.read(make_run(tmp_path / "run", steps=1000))
    places, values = report.points(folder, "reward", x)
    assert len(places) == len(values) == report.POINTS
    assert places[-1] <= last < places[-1] + 3 * (places[-1] - places[-2])
    np.testing.assert_allclose(values, places / last, atol=1e-9)  # means of both: a straight line stays one
    assert len(report.points(folder, "eval_reward", x)[0]) == 11 and report.points(folder, "none", x).size == 0


def test_smoothing_has_no_bias_to_zero():
    np.testing.assert_allclose(report.smooth([3.0] * 20), 3.0)
    assert 0 < report.smooth([0.0] * 10 + [1.0])[-1] < 0.2


def test_only_some_metrics(tmp_path):
    text = make(make_run(tmp_path / "a"), out=tmp_path / "page.html", metrics=["loss", "eval_"])
    assert text.count("<svg") == 2


def test_refusals(tmp_path):
    (tmp_path / "mine.html").write_text("my own page")
    with pytest.raises(RunError, match="mine.html is there already and is no report"):
        make(make_run(tmp_path / "a"), out=tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "my own page"
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="empty is no folder of a run"):
        make(str(tmp_path / "empty"), out=tmp_path / "page.html")
    make_run(tmp_path / "b")
    (tmp_path / "b" / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match="has no step yet"):
        make(str(tmp_path / "b"), out=tmp_path / "page.html")
    with pytest.raises(RunError, match="at least one"):
        make(out=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "pipeline.report", make_run(tmp_path / "a"), "--out", str(tmp_path / "page.html")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/page.html: 1 run\n"), done.stderr
    done = subprocess.run([*command[:3], str(tmp_path / "none"), *command[4:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.skipif(browser.find() is None, reason="there is no Chromium")
def test_in_a_browser(tmp_path):
    make(make_run(tmp_path / "a"), make_run(tmp_path / "b", evil="x" * 300), out=tmp_path / "page.html")
    with browser.browser(tmp_path / "profile") as page:
        for width in (1280, 400):
            page.open(tmp_path / "page.html", width)
            assert page.value("document.documentElement.scrollWidth") <= width
            assert page.console == [] and page.requests == [(tmp_path / "page.html").as_uri()]
