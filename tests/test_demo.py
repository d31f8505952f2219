"""The demo: what its page says and shows, and that it goes on where it was interrupted."""

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import browser
import pytest
import tyro
from conftest import ROOT, user

sys.path.insert(0, str(ROOT / "demo"))
import run as demo  # noqa: E402

import plot  # noqa: E402
import prepare  # noqa: E402
import record  # noqa: E402
import report  # noqa: E402
import task  # noqa: E402

# ------------------------------------------------------------------------------------------------------------- slips


@pytest.mark.parametrize(
    ("completion", "slip"),
    [
        ("7+8=15,3+5+1=9#95", None),
        ("7+8=12,3+5+1=9#92", 5),  # the second digit of the ones
        ("7+8=5,3+5+0=8#85", 4),
        ("7+8=15,3+5+1=8#85", 13),
        ("7+8=15,3+5+1=9#96", 16),
        ("7+8=15,3+5+0=8#85", 11),  # the carry
        ("7+8=15,3+5", 10),  # ends too early
        ("7+8=15,3+5+1=9#950", 17),  # too late
        ("", 0),
        ("qwerty", 0),
    ],
)
def test_a_slip_is_the_first_wrong_character(completion, slip):
    assert task.slip("37+58=", completion) == slip


def test_a_demonstration_is_right_up_to_its_slip_and_wrong_there():
    rng = random.Random(0)
    for problem in task.problems()[0][:300]:
        working = task.demonstrate(problem, rng, slip=False)
        assert task.slip(problem, working) is None and task.is_right(problem, working)
        sloppy = task.demonstrate(problem, rng, slip=True)
        at = task.slip(problem, sloppy)
        assert sloppy[:at] == working[:at] and sloppy[at:][:1] != working[at:][:1]


def test_the_slip_is_marked_and_text_is_no_html():
    assert report.marked({"text": "7+8=12", "slip": 5}) == "7+8=1<mark>2</mark>"
    assert report.marked({"text": "7+8=15", "slip": None}) == "7+8=15"
    assert report.marked({"text": "7+8", "slip": 3}) == "7+8<mark>(ends here)</mark>"
    assert report.marked({"text": "<b>\n &", "slip": 1}) == "&lt;<mark>b</mark>&gt;⏎␣&amp;"


def test_the_problem_is_the_first_that_sft_gets_wrong_and_most_later_stages_right():
    sft = {"1+1=": "#2", "2+2=": "#5", "3+3=": "#7", "4+4=": "#9"}
    good = {"1+1=": "#2", "2+2=": "#4", "3+3=": "#6", "4+4=": "#8"}
    assert report.choose(sft, [good, good]) == "2+2="
    assert report.choose(sft, [good | {"2+2=": "#5"}, good]) == "3+3="
    assert report.choose(sft, [sft, sft]) == "2+2="
    assert report.choose(good, [good, good]) == "1+1="


# ---------------------------------------------------------------------------------------------------------- the page


def write_rows(path, rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(out, name, script, rows, **args):
    """The files of a run that the report reads."""
    write_rows(out / name / "metrics.jsonl", rows)
    args = {"model": f"{out}/base"} | args
    versions = {"torch": "2.0", "transformers": "5.0"}
    config = {"script": script, "commit": "abc123", "date": "2026-01-02", "versions": versions, "args": args}
    (out / name / "config.json").write_text(json.dumps(config))


def evaluated(share):
    return {"mean": share, "low": max(0.0, share - 0.02), "high": min(1.0, share + 0.02)}


def held_out_reward(step, share):
    return {"step": step, "eval_reward": share, "eval_reward_low": share - 0.04, "eval_reward_high": share + 0.04}


SHARES = {"base": (0.0, 0.001), "sft": (0.411, 0.99), "dpo": (0.888, 0.991), "grpo": (0.921, 0.996), "ppo": (0.91, 0.992)}
WRONG, RIGHT = "9+0=4,2+6+0=8#84", "9+0=9,2+6+0=8#89"
ANSWERS = {"base": "</script>|`<b>", "sft": WRONG, "dpo": RIGHT, "grpo": RIGHT, "ppo": RIGHT}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The folder of a made-up demo with its page, and its results."""
    out = tmp_path_factory.mktemp("demo") / "a demo"
    prepare.prepare(out, count=20)
    taken = {"seconds": 301.4, "cpu_seconds": 402.6, "calls": 1}
    stages = {"prepare": 1.2, "sft": 30.3, "pairs": 40.4, "ppo": 90.9}
    (out / "demo.json").write_text(json.dumps({"seed": 1, "code": "c", "total": taken, "stages": stages, "finished": True}))
    steps = range(1, 5)
    logged = [{"step": step, "loss": 3 / step, "accuracy": 0.5, "seconds": 0.5} for step in steps]
    write_run(out, "sft", "sft.py", [{"step": 0, "eval_loss": 4}, *logged, {"step": 4, "eval_loss": 0.5}])
    last = {"step": 4, "eval_accuracy": 0.9}
    write_run(out, "rm", "reward_model.py", [{"step": 0, "eval_accuracy": 0.5}, *logged, last])
    logprobs = [row | {"chosen_logprob": -1 / row["step"], "rejected_logprob": -5.0} for row in logged]
    write_run(out, "dpo", "dpo.py", logprobs, beta=0.5, lr=3e-4, nll_coef=0.5, length_normalize=False)
    sampled = [row | {"reward": 0.5, "sampled_tokens": 40 * row["step"], "completion_tokens": 4.0} for row in logged]
    rl = [held_out_reward(0, 0.4), *sampled, held_out_reward(4, 0.9)]
    write_run(out, "grpo", "grpo.py", rl)
    write_run(out, "ppo", "ppo_rlvr.py", rl, value_warmup_steps=2)
    tokenizer = prepare.make_tokenizer()
    samples = []
    for step in steps:
        for reward, text in ((1.0, RIGHT), (0.0 if step < 4 else 1.0, WRONG), (0.0 if step < 3 else 1.0, WRONG)):
            ids = tokenizer(text + "<|end|>", add_special_tokens=False).input_ids
            numbers = {name: [float(i) for i in range(len(ids))] for name in ("values", "advantages", "returns", "rewards", "kls")}
            about = {"step": step, "row": "prompts.jsonl, row 1", "prompt": "29+60=", "completion": text, "reward": reward}
            samples.append(about | {"reason": "right" if reward else "wrong", "ended": True, "token_ids": ids} | numbers)
    write_rows(out / "ppo" / "samples.jsonl", samples)
    for name, shares in SHARES.items():
        for kind, share in zip(("sampled", "greedy"), shares, strict=True):
            answers = [{"messages": [user("29+60=")], "completions": [RIGHT if kind == "greedy" else ANSWERS[name]]}]
            write_rows(out / "eval" / f"{name}_{kind}" / "additions.jsonl", answers)
            (out / "eval" / f"{name}_{kind}" / "results.json").write_text(json.dumps({"results": [{"pass@1": evaluated(share)}]}))
    for name in ("pairs", "held_out_pairs"):
        write_rows(out / f"{name}.jsonl", [{}] * 50)
    for name in ("samples", "held_out_samples"):
        write_rows(out / f"{name}.jsonl", [{"completions": ["a", "b"]}] * 30)
    plot.plot_stages({"a": {"sampled": evaluated(0.5), "greedy": evaluated(0.9)}}, out / "any.png")
    (out / "kl").mkdir()
    (out / "any.png").rename(out / "kl" / "kl.png")
    return out, report.write(out, demo.next_commands(out, 1))


class Loads(HTMLParser):
    """What a page loads, the text of its cells, and of its <mark>s."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.texts, self.open = [], {"td": [], "mark": []}, set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "srcset", "data", "poster", "xlink:href") or (name == "href" and tag != "a"):
                self.loads.append(value)
        if tag in self.texts:
            self.texts[tag].append("")
            self.open.add(tag)

    def handle_data(self, data):
        for tag in self.open:
            self.texts[tag][-1] += data

    def handle_endtag(self, tag):
        self.open.discard(tag)


@pytest.mark.parametrize("name", ["report.html", "ppo_tokens.html"])
def test_the_page_loads_nothing_and_is_whole(page, name):
    out, _ = page
    text = (out / name).read_text()
    loads = Loads(text).loads
    assert loads and all(value.startswith("data:") for value in loads)
    assert loads.count("data:,") == 1  # the icon that a browser would ask for
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|\{[{%]|[%}]\}", re.sub(r"base64,\S+", "", text))
    assert text.count("</script>") == 1  # a completion that says it ends none


def test_the_page_shows_the_numbers_and_the_slip(page):
    out, results = page
    texts = Loads((out / "report.html").read_text()).texts
    for name, shares in results["accuracy"].items():
        at = texts["td"].index(name)
        assert texts["td"][at + 1 : at + 3] == [demo.interval(shares[kind]) for kind in ("sampled", "greedy")]
    assert texts["mark"] == ["red", "<", "4"] and results["example"]["answers"][1]["slip"] == 4
    assert {"301 s; computed: 403 s of processor\ntime", "abc123", "after sft.py, greedy", WRONG} <= set(texts["td"])
    of = {row["stage"]: row for row in results["costs"]}
    assert of["grpo.py"]["samples"] == 10 + 20 + 30 + 40 and of["generate, curate"]["samples"] == 120
    assert of["sft.py"]["seconds"] == 2.0 and of["dpo.py"]["steps"] == 4


def test_the_markdown_says_what_the_results_are(page):
    out, results = page
    assert results == json.loads((out / "results.json").read_text())
    text = (out / "REPORT.md").read_text()
    rows = {line.split(" | ")[0].strip("| `"): line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")}
    for name, shares in results["accuracy"].items():
        assert rows[name][1:] == [demo.interval(shares[kind]) for kind in ("sampled", "greedy")]
    for cost in results["costs"]:
        shown = [f"{cost['samples']:,}" if cost["samples"] else "none", str(cost["steps"] or "none"), f"{cost['seconds']:.0f}"]
        assert rows[cost["stage"]][1:] == [cost["told"], *shown]
    assert rows["after sft.py, sampled"][1:] == ["<code>9+0=<b>[4]</b>,2+6+0=8#84</code>", "wrong"]
    assert rows["random weights, sampled"][1] == "<code><b>[&lt;]</b>/script&gt;&#124;`&lt;b&gt;</code>"
    images = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(images) == 6 and all((out / name).exists() for name in images)
    assert "{{" not in text and "{%" not in text


def test_every_command_of_the_page_is_one(page, tmp_path):
    out, _ = page
    commands = demo.next_commands(out, 1)
    (tmp_path / "my_grpo.py").write_text(subprocess.check_output(
        [sys.executable, *commands["make_fork"].partition(" > ")[0].split()[1:]], cwd=ROOT, text=True))  # fmt: skip
    spec = importlib.util.spec_from_file_location("my_grpo", tmp_path / "my_grpo.py")
    fork = importlib.util.module_from_spec(spec)
    sys.modules["my_grpo"] = fork
    spec.loader.exec_module(fork)
    seen = 0
    for command in commands.values():
        program, *words = demo.shlex.split(command)[1:]
        if program == "-m":
            module = importlib.import_module(words[0])
            args = tyro.cli(module.Args, args=words[1:], use_underscores=True)
            assert not getattr(args, "compare", None) or all(Path(side).exists() for side in args.compare)
            seen += 1
    args = tyro.cli(fork.Args, args=demo.shlex.split(commands["run_fork"])[2:], use_underscores=True)
    assert args.out == f"{out}_fork" and seen == 3
    words = commands["evaluate"].split()
    assert Path(demo.shlex.split(commands["evaluate"])[words.index("--model") + 1]).parent == Path(args.out)


@pytest.mark.skipif(browser.find() is None, reason="no Chromium here (CHROMIUM names one)")
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["report.html", "ppo_tokens.html"])
def test_the_page_in_a_browser(page, tmp_path, name, width):
    out, _ = page
    with browser.browser(tmp_path / "profile") as seen:
        seen.open(out / name, width)
        assert seen.console == []
        assert [url for url in seen.requests if not url.startswith("data:")] == [(out / name).resolve().as_uri()]
        assert seen.value("innerWidth") == width
        assert seen.value("document.documentElement.scrollWidth <= innerWidth")
        assert seen.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        # Of the steps 1 to 4, the first two have two wrong answers each: there it opens, and those are first.
        heads = "[...document.querySelectorAll('#answers .head b')].map(e => e.textContent).join()"
        assert (seen.value("number.textContent"), seen.value(heads)) == ("2", "wrong,wrong,right")
        slips = "[...document.querySelectorAll('#answers .slip')].map(e => e.textContent).join()"
        assert seen.value(slips) == "4,4"
        seen.press("ArrowRight")
        assert (seen.value("number.textContent"), seen.value(heads)) == ("3", "wrong,right,right")
        for _ in range(3):
            seen.press("ArrowLeft")
        assert seen.value("number.textContent") == "1"


# ------------------------------------------------------------------------------------------------------- interrupted


def test_only_an_earlier_demo_is_ever_deleted(tmp_path, monkeypatch):
    theirs = tmp_path / "theirs"
    (theirs / "sft").mkdir(parents=True)
    (theirs / "sft" / "precious").write_text("x")
    with pytest.raises(SystemExit, match="theirs holds files, but no demo.json"):
        record.Record(theirs, seed=1)
    assert (theirs / "sft" / "precious").exists()

    out = tmp_path / "demo"
    first = record.Record(out, seed=1)
    first.add("sft", 3.14)
    for name in ("sft", "sft/model", "mine", ".kl.unfinished"):
        (out / name).mkdir()
    (out / "mine" / "notes").write_text("x")
    (out / "pairs.jsonl").write_text("")
    again = record.Record(out, seed=1)
    assert again.has("sft") and not again.has("dpo") and not again.finished and (out / "sft" / "model").exists()
    again.add("dpo", 1)
    assert again.data["total"]["calls"] == 2

    for change in ("seed", "code", "anew"):
        made = {"seed": 2 if change == "seed" else 1, "anew": change == "anew"}
        if change == "code":
            monkeypatch.setattr(record, "code_hash", lambda: "another")
        record.Record(out, seed=1).add("sft", 1)
        (out / "sft").mkdir(exist_ok=True)
        if change == "code":
            monkeypatch.setattr(record, "code_hash", lambda: "a third")
        new = record.Record(out, **made)
        assert not new.has("sft") and not (out / "sft").exists() and not (out / ".kl.unfinished").exists()
        assert (out / "mine" / "notes").exists()


def test_the_code_of_a_demo_is_what_decides_its_results(tmp_path, monkeypatch):
    for name in ("grpo.py", "my_grpo.py", "demo/run.py", "demo/report.py", "kernels/head.py", "pipeline/shapes/files.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    before = record.code_hash()
    for name, changes in (("my_grpo.py", False), ("demo/report.py", False), ("grpo.py", True), ("demo/run.py", True),
                          ("kernels/head.py", True), ("pipeline/shapes/files.py", True)):  # fmt: skip
        (tmp_path / name).write_text("2")
        assert (record.code_hash() != before) == changes, name
        (tmp_path / name).write_text("1")
    for name in record.CODE:  # every entry names something
        assert list(ROOT.glob(name)), name


@pytest.fixture
def commands(tmp_path, monkeypatch, page):
    """(folder, list): a demo whose commands only note themselves, and make their --out."""
    done = []

    def note(name, *words, **flags):
        if not Path(flags["out"]).exists():
            Path(flags["out"]).mkdir(parents=True)
            done.append(f"{name} {Path(flags['out']).name}")

    monkeypatch.setattr(demo, "run_script", note)
    monkeypatch.setattr(demo, "run_pipeline", note)
    monkeypatch.setattr(demo, "kl", lambda out, models, folder, **flags: note("kl", out=folder))
    monkeypatch.setattr(demo.prepare, "prepare", lambda out, seed: done.append("prepare"))
    monkeypatch.setattr(report, "accuracy", lambda out, name: None)
    monkeypatch.setattr(report, "write", lambda out, commands: page[1])
    return str(tmp_path / "demo"), done


def test_what_is_finished_is_left(commands, capsys, monkeypatch):
    out, done = commands
    demo.main(out, 1, anew=False)
    every = list(done)
    assert len(every) == len(set(every)) == 22
    for one, other in (("sft.py sft", "grpo.py grpo"), ("curate pairs.jsonl", "dpo.py dpo"), ("reward_model.py rm", "ppo_rlvr.py ppo")):
        assert every.index(one) < every.index(other)
    assert every.index("kl kl") > max(every.index(name) for name in ("dpo.py dpo", "grpo.py grpo", "ppo_rlvr.py ppo"))
    done.clear()
    demo.main(out, 1, anew=False)
    assert done == [] and "is finished" in capsys.readouterr().out
    demo.main(out, 1, anew=True)
    assert sorted(done) == sorted(every)

    data = json.loads(Path(out, "demo.json").read_text())
    del data["stages"]["pairs"]  # killed between two commands of a stage: the first is there, the others are not
    Path(out, "demo.json").write_text(json.dumps(data | {"finished": False}))
    for name in ("pairs.jsonl", "held_out_samples.jsonl", "held_out_pairs.jsonl"):
        Path(out, name).rmdir()
    done.clear()
    demo.main(out, 1, anew=False)
    assert done == ["curate pairs.jsonl", "generate held_out_samples.jsonl", "curate held_out_pairs.jsonl"]


def test_a_stage_that_fails_beside_another_stops_the_demo(commands, monkeypatch, tmp_path):
    out, done = commands
    program = tmp_path / "fails.py"
    program.write_text("print('one line'); raise SystemExit('error: no room')")
    monkeypatch.setattr(demo, "grpo", lambda out, seed: demo.run_command("grpo.py", [str(program)], []))
    with pytest.raises(SystemExit, match=r"error: grpo.py failed with exit code 1"):
        demo.main(out, 1, anew=False)
    stages = json.loads(Path(out, "demo.json").read_text())["stages"]
    assert "grpo" not in stages and "kl" not in stages and "ppo" in stages and not demo.BESIDE


def test_what_runs_beside_bears_its_name_and_ends_with_the_demo(capfd, tmp_path):
    (tmp_path / "says.py").write_text("import sys; print('10%\\r20%\\rhello', flush=True); print('careful', file=sys.stderr)")
    with demo.second_lane() as start:
        start(demo.run_command, "says.py", [str(tmp_path / "says.py")], ["--n", "1"]).result()
    assert capfd.readouterr().out.split("\n")[1:-1] == ["says.py | $ python says.py --n 1", "says.py | hello", "says.py | careful"]
    (tmp_path / "waits.py").write_text("import time; time.sleep(600)")
    with pytest.raises(KeyError), demo.second_lane() as start:
        waits = start(demo.run_command, "waits.py", [str(tmp_path / "waits.py")], [])
        while not demo.BESIDE:
            time.sleep(0.01)
        raise KeyError("the main lane fails")
    with pytest.raises(SystemExit, match="exit code -15"):
        waits.result(timeout=20)


SHORT = """
import sys
sys.path[:0] = [{root!r}, {demo!r}]
import run

script, pipeline = run.run_script, run.run_pipeline

def fewer_steps(name, **flags):  # SFT learns enough that a few answers are right
    few = {{"sft.py": {{"epochs": 1}}}}.get(name, {{"steps": 6, "batch_size": 8}})
    if name in ("grpo.py", "ppo_rlvr.py"):
        held_out = flags["eval_data"].replace(":500", ":50")
        few |= {{"save_every": 2, "eval_every": 2, "eval_data": held_out, "batch_size": 32}}
    if name == "grpo.py":
        few["active_sampling"] = 0
    script(name, **flags | few)

def fewer_prompts(name, *words, **flags):
    if name in ("generate", "evaluate", "kl"):
        flags["data"] = flags["data"].replace(":100", "") + {{"generate": ":600", "evaluate": ":50", "kl": ":10"}}[name]
    pipeline(name, *words, **flags)

run.run_script, run.run_pipeline = fewer_steps, fewer_prompts
run.main({out!r}, 1, False)
"""


@pytest.mark.slow
def test_killed_the_same_command_goes_on(tmp_path):
    """SIGKILL, to all processes of a short demo, once while GRPO trains and once later; then it comes to its page."""
    out = tmp_path / "demo"
    program = tmp_path / "short.py"
    program.write_text(SHORT.format(root=str(ROOT), demo=str(ROOT / "demo"), out=str(out)))

    def trained(name):
        path = out / name / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    kept = {}
    for reached in (lambda: trained("grpo") >= 4, lambda: trained("ppo") >= 4):
        process = subprocess.Popen([sys.executable, program], start_new_session=True)
        while not reached():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        stages = json.loads((out / "demo.json").read_text())["stages"]
        assert "sft" in stages and "kl" not in stages
        assert stages.items() >= kept.items()  # no stage was done again
        kept = stages
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    assert "held-out additions" in done.stdout and "reward_model.py" in done.stdout
    data = json.loads((out / "demo.json").read_text())
    assert data["finished"] and data["stages"].items() >= kept.items() and data["total"]["calls"] == 3
    assert [row["step"] for row in plot.read(out / "grpo") if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert "in 3 calls" in (out / "REPORT.md").read_text() and (out / "report.html").exists()
    shutil.rmtree(out)
