"""The studies: their statistics, and that every command they give is one."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from conftest import ROOT, user

sys.path.insert(0, str(ROOT / "studies"))
import arithmetic  # noqa: E402
import budget  # noqa: E402
import equal_samples  # noqa: E402
import instruct  # noqa: E402


def test_a_power_law_is_found():
    points = [(B, 0.9 - 3 * B**-0.4) for B in (100, 200, 400, 800, 1600, 3200)]
    fitted = budget.fit(points)
    assert fitted["a"] == pytest.approx(0.9, abs=0.02) and fitted["c"] == pytest.approx(0.4, abs=0.05)
    assert np.abs(fitted["residuals"]).max() < 0.01


def test_intervals_over_seeds_hold_the_mean_nineteen_times_of_twenty():
    random = np.random.default_rng(0)
    for seeds in (2, 5):
        found = 0
        for _ in range(4000):
            mean, half = arithmetic.interval(random.normal(3, 2, seeds))
            found += abs(mean - 3) < half
        assert abs(found / 4000 - 0.95) < 0.012
    assert arithmetic.interval([0.5]) == (0.5, None)


def test_the_form_of_an_answer():
    def row(text, ended=True, reward=0.0):
        return {"completions": [text], "ended": [ended], "rewards": [reward]}

    assert arithmetic.has_form(row("7+8=15,3+5+1=9#95")) and arithmetic.has_form(row("7+8=1,3+5+1=99#951"))
    assert not arithmetic.has_form(row("7+8=15,3+5+1=9")) and not arithmetic.has_form(row("7+8=15,3+5+1=9#95", ended=False))
    assert arithmetic.has_form(row("#95", reward=1.0))


@pytest.fixture
def commands(monkeypatch):
    """Commands are parsed and not run: [(name, Args), ...]."""
    found = []

    def parse(module, words):
        kind = module.Args if hasattr(module, "Args") else module.Sft | module.Pairs | module.Prompts
        try:
            found.append((module.__name__, tyro.cli(kind, args=words, use_underscores=True)))
        except SystemExit:
            pytest.fail(f"{module.__name__} {' '.join(words)}")

    def script(name, **flags):
        parse(importlib.import_module(name.removesuffix(".py")), arithmetic.demo.command_line(flags))

    def pipeline(name, *words, **flags):
        parse(importlib.import_module(f"pipeline.{name}"), [*words, *arithmetic.demo.command_line(flags)])

    monkeypatch.setattr(arithmetic.demo, "run_script", script)
    monkeypatch.setattr(arithmetic.demo, "run_pipeline", pipeline)
    return found


def test_equal_samples_are_equal(commands, tmp_path):
    equal_samples.train(str(tmp_path), 1)
    of = {f"{name} {Path(args.out).name}": args for name, args in commands}
    assert of["pipeline.generate samples.jsonl"].data[0].endswith(":4096") and of["pipeline.generate samples.jsonl"].n == 4
    grpo, ppo = of["grpo grpo"], of["ppo_rlvr ppo"]
    assert grpo.steps * grpo.batch_size * grpo.group_size == ppo.steps * ppo.batch_size * ppo.group_size == 4 * 4096
    assert grpo.active_sampling == 0  # no group is replaced
    assert {args.model for args in (grpo, ppo, of["dpo dpo"], of["sft sft_best"], of["sft sft_random"])} == {f"{tmp_path}/sft/model"}
    assert (of["sft sft_best"].lr, of["sft sft_best"].epochs) == (of["sft sft_random"].lr, of["sft sft_random"].epochs)


def test_a_budget_is_divided(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "measure", lambda out, model: {"sampled": 0.5})
    for share, expected in ((0.0, ["sft"]), (0.25, ["sft", "pipeline.generate", "dpo"]), (1.0, ["dpo"])):
        commands.clear()
        out = tmp_path / str(share)
        out.mkdir()
        pair = {"prompt": [user("1+1=")], "chosen": "2", "rejected": "3"}
        (out / "all_pairs.jsonl").write_text((json.dumps(pair) + "\n") * 1000)
        result = budget.train(str(out), 800, share, 1)
        assert [name for name, _ in commands] == expected
        assert (result["demonstrations"], result["pairs"]) == (800 - 800 * share, 800 * share)
        if share < 1:
            assert len((out / "train.jsonl").read_text().splitlines()) == 800 - 800 * share


def test_the_commands_of_the_study_on_a_real_model(commands, tmp_path):
    instruct.train("M", tmp_path, 1, instruct.METHODS)
    instruct.measure("M", tmp_path, tmp_path, instruct.METHODS, ifeval="input_data.jsonl")
    rl = [args for name, args in commands if name in ("grpo", "ppo_rlvr")]
    assert {args.steps * args.batch_size * args.group_size for args in rl} == {8 * instruct.PROMPTS}
    assert len([name for name, _ in commands if name == "pipeline.kl"]) == 2 * len(instruct.METHODS)
    assert len([name for name, _ in commands if name == "pipeline.evaluate"]) == len(instruct.METHODS)
