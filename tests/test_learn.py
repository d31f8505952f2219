"""The lessons in docs/: equations, maps, metrics, figures and exercises are those of the code."""

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import launch
import matplotlib
import numpy as np
import pytest
from conftest import ROOT
from forked import forked
from test_docs import commands

import grpo

sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "demo"), str(ROOT / "benchmarks")]
import exercises  # noqa: E402
import figures  # noqa: E402
import head_steps  # noqa: E402
import metrics  # noqa: E402

SCRIPTS = ("sft", "reward_model", "dpo", "grpo", "ppo_rlvr")
LESSONS = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in (*SCRIPTS, "kernels", "learn")}
GREEK = {"rho": "ρ", "alpha": "α", "pi": "π"}


def section(page, head):
    """The text below a heading that begins so."""
    return re.search(rf"^## {head}[^\n]*\n(.*?)(?=^## |\Z)", LESSONS[page], re.DOTALL | re.MULTILINE)[1]


def first_table(text):
    """The cells of the rows of the first table, without its head."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def docstring_equations(name):
    """{number: what it defines} of the equations in a script's docstring."""
    text = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")))
    found = {}
    for line in text.splitlines():
        if match := re.match(r"(\S.*?)\s+=.*\((\d)\)$", line.strip()):
            found[int(match[2])] = match[1].replace("[", "").strip()
    return found


def page_equations(name):
    """The same of the LaTeX below a page's heading; what follows from them elsewhere is not the script's."""
    found = {}
    for latex, number in re.findall(r"^```math\n(.*?)\\tag\{(\d)\}\n```", section(name, "The equation"), re.DOTALL | re.MULTILINE):
        left = re.sub(r"\\([a-zA-Z]+)", lambda word: GREEK.get(word[1], ""), latex.partition("=")[0])
        found[int(number)] = re.sub(r"[{}\s]", "", left)
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_equations_are_those_of_the_script(name):
    written = docstring_equations(name)
    assert sorted(written) == list(range(1, len(written) + 1)) and page_equations(name) == written


def test_equations_of_the_kernels():
    text = (ROOT / "kernels" / "head.py").read_text(encoding="utf-8") + (ROOT / "kernels" / "rows.py").read_text(encoding="utf-8")
    numbers = {int(number) for docstring in text.split('"""')[1::2] for number in re.findall(r" \((\d)\)", docstring)}
    assert set(page_equations("kernels")) == numbers == set(range(1, 10))


@pytest.mark.parametrize("name", [*SCRIPTS, "kernels"])
def test_every_equation_has_its_lines(name):
    """In the map of terms, with a link in each row that has a number."""
    rows = first_table(section(name, "Where each"))
    mapped = {int(number) for row in rows for number in re.findall(r"\((\d)\)", row[0])}
    assert mapped == set(page_equations(name))
    assert all("#L" in "".join(row) for row in rows)


# ---------------------------------------------------------------------------------------------------------- metrics


def table_of_metrics(name):
    """[(keys, cells), ...] of a page."""
    rows = first_table(section(name, "Metrics"))
    return [(re.findall(r"`([\w/…]+)`", row[0]), row) for row in rows]


def names_in(path):
    """Every string and every keyword in a file."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    constants = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return constants | {node.arg for node in nodes if isinstance(node, ast.keyword)}


def is_logged(key, names):
    """Whether code with these names logs a metric; SOURCE, NAME and K stand for others."""
    key = re.sub("(?:/[A-Z]+|K|…)$", "", key)
    return key == "eval_" or any(name in names for name in (key, key.removeprefix("eval_"), key.removesuffix("_rate")))


@pytest.mark.parametrize("name", SCRIPTS)
def test_metrics_are_logged(name):
    names = names_in(ROOT / f"{name}.py") | names_in(ROOT / "common.py")
    if name in ("grpo", "ppo_rlvr"):
        names = names.union(*(names_in(ROOT / "rewards" / file) for file in ("environment.py", "jobs.py")))
    for keys, cells in table_of_metrics(name):
        assert keys and len(cells) == 5, cells
        unknown = [key for key in keys if not is_logged(key, names)]
        assert not unknown, f"{name}.py logs no {unknown}"
    assert not is_logged("zero_std_group", names) and not is_logged("reward_model_accuracy", names)


@pytest.mark.parametrize("name", SCRIPTS)
def test_all_metrics_of_the_demo_are_explained(name):
    tables = [name, "grpo"] if name == "ppo_rlvr" else [name]
    explained = {key for table in tables for keys, _ in table_of_metrics(table) for key in keys}
    logged = set(json.loads(metrics.VALUES.read_text())["values"][name]) - {"eval_pass_at_1"}
    assert len(logged) > 5 and not logged - explained


def test_values_of_the_demo_are_in_the_tables():
    values = json.loads(metrics.VALUES.read_text())["values"]
    for name in SCRIPTS:
        assert metrics.filled(name, LESSONS[name], values) == LESSONS[name], f"{name}.md is old: run python docs/metrics.py"
    changed = {name: {key: [1.5, 2.5] for key in keys} for name, keys in values.items()}
    assert "| 1.5 → 2.5 |" in metrics.filled("grpo", LESSONS["grpo"], changed)


def test_first_and_last():
    assert metrics.first_and_last([1, 3] + [9] * 12 + [5, 7]) == (2, 6) and metrics.first_and_last([{"share": 1}]) is None
    assert metrics.first_and_last([4, 5]) == (4, 5)
    shown = [metrics.shown(ends) for ends in ([0.4226, 0.95], [0.0, 0.0], [12345.6, 0.00002], [40.4, 1.0])]
    assert shown == ["0.42 → 0.95", "0", "12,346 → 2e-5", "40 → 1"]


def test_flags_that_the_lessons_name():
    modules = [importlib.import_module(name) for name in SCRIPTS]
    modules += [importlib.import_module(f"pipeline.{name}") for name in ("generate", "evaluate", "kl")]
    modules += [importlib.import_module("memory"), *(forked(name) for name in ("overlong_penalty", "gspo"))]
    known = {name for module in modules for name in module.Args.__dataclass_fields__}
    known |= {"run", "out", "what", "seed", "base"}  # of demo/ and forks/make.py
    known |= {"noise", "per_prompt", "rule", "nproc_per_node", "nnodes", "to", "format", "gpus", "parts", "kl_estimator"}
    for page, text in LESSONS.items():
        named = {name.removeprefix("no_") for name in re.findall(r"(?<![\w-])--([a-z_]+)", text)} - {"eos_score"}
        assert not named - known, f"{page}.md: {named - known}"


# ------------------------------------------------------------------------------------------------- numbers in the text


def test_what_grpo_says_of_groups():
    """Advantages of 1 and 4 right of 8, with and without the standard deviation; live groups of a hard prompt."""
    found = {}
    for right in (1, 4):
        for normalize in (False, True):
            group = [SimpleNamespace(reward=float(i < right), ended=True) for i in range(8)]
            grpo.set_advantages(grpo.Args(normalize_std=normalize), group)
            found[right, normalize] = group[0].advantages
    assert found[1, False] == 0.875 and found[4, False] == 0.5
    assert f"{found[1, True]:.2f}" == "2.47" and f"{found[4, True]:.2f}" == "0.94"
    live = [f"{1 - 0.1**size - 0.9**size:.2f}" for size in (2, 8, 16)]
    for number in ("2.47 instead of 0.875", "0.94 instead of 0.5", f"{live[0]} of the groups at G = 2, {live[1]} at 8, {live[2]} at 16"):
        assert number in " ".join(LESSONS["grpo"].split())


def test_steps_of_the_head():
    """The table of docs/kernels.md: products exactly, memory nearly (PyTorch's own intermediate results)."""
    rows = first_table(section("kernels", "From the naive head"))
    assert [re.search(r"`(\w+)`", row[0])[1] for row in rows] == [step.__name__ for step in head_steps.STEPS]
    wanted = head_steps.all_at_once(*head_steps.inputs())
    for step, (_, products, memory) in zip(head_steps.STEPS, rows, strict=True):
        for ours, theirs in zip(step(*head_steps.inputs()), wanted, strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=2e-4)
        counted, size = head_steps.measure(step)
        assert counted == float(products)
        assert size / (4 * head_steps.N * head_steps.V) == pytest.approx(float(memory), abs=0.06)


# ---------------------------------------------------------------------------------------------------------- figures


def numbers_and_rest(path):
    """The numbers of an SVG, and all else but names that are hashes of numbers, and pixels."""
    text = re.sub(r'(id|href|clip-path)="[^"]*"', "", path.read_text())
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)], re.sub(r"-?\d+\.\d+", "0", text)


def test_figures_are_what_the_code_draws(tmp_path, monkeypatch):
    pinned = re.search(r"matplotlib==(\S+)", (ROOT / "requirements.lock").read_text())[1]
    if pinned != matplotlib.__version__:
        pytest.skip(f"the figures are drawn by matplotlib {pinned}")
    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    figures.main()
    made = sorted(tmp_path.iterdir())
    assert [path.name for path in made] == sorted(path.name for path in (ROOT / "docs/images").glob("learn_*.svg"))
    for path in made:
        ours, rest = numbers_and_rest(path)
        theirs, their_rest = numbers_and_rest(ROOT / "docs" / "images" / path.name)
        assert rest == their_rest, f"{path.name} is old: run python docs/figures.py"
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_every_figure_is_shown():
    shown = {name for text in LESSONS.values() for name in re.findall(r"images/(learn_\w+\.svg)", text)}
    assert shown == {path.name for path in (ROOT / "docs" / "images").glob("learn_*")}


def test_pulls_of_the_estimators():
    """What docs/grpo.md says of the figure: who counts more, and what a clip stops."""
    found = {name: figures.pulls(*rest) for name, rest in figures.ESTIMATORS.items()}
    published, constant = found["GRPO, as published"], found["Dr. GRPO"]
    assert published[0][-1] > 2 * published[1][-1] > 0  # of 6 tokens and of 16
    for name in ("Dr. GRPO", "DAPO's loss", "grpo.py's defaults (OLMo 3)", "RLOO"):
        right, wrong = found[name][:2], found[name][2:]
        assert np.ptp([pull[-1] for pull in right]) < 1e-9 and np.ptp([pull[-1] for pull in wrong]) < 1e-9
        assert found[name][0][1] == 0 and found[name][2][3] == 0  # stopped: up enough, down enough
        np.testing.assert_allclose(found[name][0][-1] / found[name][2][-1], constant[0][-1] / constant[2][-1], rtol=0.01)
    whitened = found["REINFORCE++ with baseline"]
    assert whitened[0][-1] / whitened[2][-1] < -2.5  # of the others -2: the mean over tokens is taken off, too
    assert all(np.abs(pull).max() == 0 for pull in found["GSPO"][2:]) and all(pull.min() > 0 for pull in found["GSPO"][:2])
    assert found["CISPO"][0][1] > found["CISPO"][0][-1] > found["CISPO"][0][3] > 0
    assert found["PPO"][0][2] > 2 * found["PPO"][0][-1] > 0 > found["PPO"][2][-1] > found["PPO"][2][2]


# -------------------------------------------------------------------------------------------------------- exercises


def fake_run(folder, rows, **args):
    """A run that has logged these rows."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"args": args}))
    return str(folder)


def held_out(step, mean):
    return {"step": step, "loss": 0.01, "eval_reward": mean, "eval_reward_low": mean - 0.05, "eval_reward_high": mean + 0.05}


def test_checks_of_runs(tmp_path, capsys):
    risen = fake_run(tmp_path / "risen", [held_out(0, 0.4), held_out(8, 0.8)])
    exercises.main(["1", risen])
    assert "as expected" in capsys.readouterr().out
    small = fake_run(tmp_path / "small", [{"reward": 0.4, "zero_std_groups": 0.5}], group_size=2)
    large = fake_run(tmp_path / "large", [{"reward": 0.4, "zero_std_groups": 0.01}], group_size=16)
    exercises.main(["2", small, large])
    fooled = fake_run(tmp_path / "fooled", [{"reward": 0.5}, {"reward": 0.9}])
    for name, right in (("lost", 0.05), ("kept", 0.6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"results": [{"pass@1": {"mean": right}}]}))
    exercises.main(["3", fooled, str(tmp_path / "lost")])
    flat = fake_run(tmp_path / "flat", [held_out(0, 0.4), held_out(8, 0.45)])
    same = fake_run(tmp_path / "same", [{"reward": 0.5}, {"reward": 0.52}])
    for words, message in (
        (["1", flat], "overlap"), (["1", str(tmp_path / "nothing")], "run the exercise"), (["2", large, small], "smaller groups"),
        (["3", fooled, str(tmp_path / "kept")], "not been fooled"), (["3", same, str(tmp_path / "lost")], "not risen"), ([], "which exercise"),
    ):  # fmt: skip
        with pytest.raises(exercises.NotYet, match=message):
            exercises.main(words)


def test_check_of_the_equation(tmp_path, monkeypatch):
    """grpo.py itself is not RLOO, and the fork is."""
    monkeypatch.syspath_prepend(str(ROOT))
    shutil.copy(ROOT / "grpo.py", tmp_path / "unchanged.py")
    with pytest.raises(exercises.NotYet, match="expected"):
        exercises.main(["4", str(tmp_path / "unchanged.py")])
    made = subprocess.run([sys.executable, ROOT / "forks/make.py", "rloo"], capture_output=True, text=True, check=True).stdout
    (tmp_path / "changed.py").write_text(made)
    exercises.main(["4", str(tmp_path / "changed.py")])
    done = subprocess.run([sys.executable, ROOT / "docs/exercises.py", "4", "nothing.py"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: there is no script nothing.py\n"


@pytest.mark.slow
def test_exercises_as_written(tmp_path):
    """The commands of docs/learn.md, from a model that the demo's own commands have made (but for fewer steps)."""
    import prepare

    demo = tmp_path / "runs" / "demo"
    prepare.prepare(demo, seed=1)
    launch.run(
        "sft.py", model=demo / "base", data=demo / "train.jsonl", out=demo / "sft", max_length=64, batch_size=64, lr=4e-3,
        epochs=4, save_every=0,
    )  # fmt: skip
    (demo / "clean" / "clean").mkdir(parents=True)
    shutil.copy(demo / "prompts.jsonl", demo / "clean" / "clean")
    source = re.search(r"^```python\n(.*?)^```", LESSONS["learn"], re.DOTALL | re.MULTILINE)[1]
    (tmp_path / "large.py").write_text(source)
    done = 0
    for words in commands(ROOT / "docs" / "learn.md"):
        if "my_grpo.py" in words or words[1] not in ("grpo.py", "-m", "docs/exercises.py"):
            continue
        place = [word.replace("runs/", f"{tmp_path}/runs/").replace("large.py", f"{tmp_path}/large.py") for word in words[1:]]
        place[0] = str(ROOT / place[0]) if place[0].endswith(".py") else place[0]
        run = subprocess.run([sys.executable, *place], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, f"{shlex.join(words)}\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
        done += 1
    assert done == 8
