"""Runs of what forks make: they train, go on after a stop, and do not depend on how a batch is cut."""

import numpy as np
import pytest
import rl
from conftest import assistant, chat, user, write_jsonl
from forked import base_of, forked
from launch import call, metrics
from together import train

LOSSES = ("loss", "grad_norm", "reward", "entropy", "accuracy", "kl", "source_0")
PAIRS = {"lr": 1e-2, "steps": 4, "batch_size": 8, "epochs": 9, "save_every": 0, "warmup_ratio": 0.0, "lr_schedule": "constant"}


def trajectory(out):
    """What a run computed: a list of numbers for each step."""
    return [[line[name] for name in LOSSES if name in line] for line in metrics(out) if line["step"]]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Flags of a run of grpo.py or a fork of it, on two sources that have demonstrations."""
    folder = tmp_path_factory.mktemp("prompts")
    flags, _, _ = rl.small_run(folder)
    rows = [
        {"messages": [user(f"{i}?")], "dataset": "small", "ground_truth": "5", "demonstration": f"{i} it is"}
        for i in range(32)
    ]
    data = [write_jsonl(folder / "first.jsonl", rows[:20]), write_jsonl(folder / "second.jsonl", rows[20:])]
    return flags | {"data": data, "batch_size": 4, "group_size": 4, "steps": 4}


@pytest.fixture
def start(tmp_path, tiny_model, prompts):
    """fork → flags of a run of it."""
    answers = [(f"What is {i} + 1?", f"It is {i + 1}.", "I do not know.") for i in range(24)]
    pairs = [{"prompt": question, "chosen": good, "rejected": bad} for question, good, bad in answers]
    unpaired = [
        {"messages": [user(row["prompt"])], "completion": row[kind], "label": kind == "chosen"}
        for row in pairs
        for kind in ("chosen", "rejected")
    ]
    plain = [chat(question, good) for question, good, _ in answers]

    def flags(fork):
        if base_of(fork) == "grpo.py":
            return prompts
        data = {"dft": plain, "kto": unpaired}.get(fork, pairs)
        path = write_jsonl(tmp_path / f"{fork}.jsonl", data)
        return PAIRS | {"model": tiny_model, "data": [path], "eval_data": [path], "eval_every": 4, "max_length": 128}

    return flags


@pytest.mark.parametrize("fork", [pytest.param(fork, marks=pytest.mark.slow) for fork in ("dft", "ipo", "simpo")] + ["kto"])
def test_it_learns(start, tmp_path, fork):
    """The loss of the held-out rows, which are those it learns from, falls; that of dft is sft.py's own."""
    call(forked(fork), out=tmp_path / "run", **start(fork) | {"steps": 8})
    before, after = (metrics(tmp_path / "run")[i]["eval_loss"] for i in (0, -1))
    assert after < 0.9 * before
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fork", "flags"),
    [("cispo", {"passes": 2}), ("rloo", {}), ("reinforce_pp", {"minibatches": 2}), ("hpt", {"gate": 1}), ("dump", {})],
)
def test_it_trains(prompts, tmp_path, fork, flags):
    call(forked(fork), out=tmp_path / "run", **prompts | flags)
    lines = metrics(tmp_path / "run")
    assert len(lines) == 4 and all(line["grad_norm"] > 0 for line in lines)
    if fork == "hpt":  # no completion earns the most that it could: each prompt is learned from its demonstration
        assert lines[-1]["loss"] < lines[0]["loss"] - 0.1


def test_simpo_has_no_reference(start, tmp_path, monkeypatch):
    """No model but the policy is loaded, and no file is written."""
    script, loaded = forked("simpo"), []
    load = script.load_model
    monkeypatch.setattr(script, "load_model", lambda *args: loaded.append(1) or load(*args))
    monkeypatch.setattr(script.datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    call(script, out=tmp_path / "run", **start("simpo") | {"steps": 1})
    assert len(loaded) == 1 and not list((tmp_path / "cache").glob("reference*"))


@pytest.mark.slow
@pytest.mark.parametrize(("fork", "more"), [("kto", {}), ("reinforce_pp", {"minibatches": 2}), ("dump", {})])
def test_how_a_batch_is_cut_changes_nothing(start, tmp_path, fork, more):
    """A loss that sums over the batch: one sequence at a time, and on two processes."""
    flags = start(fork) | more
    call(forked(fork), out=tmp_path / "whole", **flags)
    call(forked(fork), out=tmp_path / "pieces", tokens_per_microbatch=1, **flags)
    train(2, forked(fork), out=tmp_path / "two", **flags)
    whole = trajectory(tmp_path / "whole")
    assert len(whole[0]) >= 4
    for name in ("pieces", "two"):
        np.testing.assert_allclose(trajectory(tmp_path / name), whole, rtol=2e-3, atol=1e-6)


@pytest.mark.slow
def test_kto_moves_its_reference_point(start, tmp_path):
    """z is 0 at first, where the policy is the reference, and above 0 once answers of other prompts got likelier, too."""
    call(forked("kto"), out=tmp_path / "run", **start("kto") | {"steps": 12, "eval_every": 12, "epochs": 20})
    lines = [line for line in metrics(tmp_path / "run") if line["step"]]
    assert lines[0]["kl"] < 1e-6 and max(line["kl"] for line in lines) > 0.01
    assert "eval_kl" in metrics(tmp_path / "run")[-1]


@pytest.mark.slow
def test_a_curriculum_goes_on_bit_for_bit(prompts, tmp_path):
    """Stopped by an exception and in the middle of a rollout: counts and windows are those of the run that was not."""
    flags = prompts | {"steps": 6, "save_every": 2}
    call(forked("dump"), out=tmp_path / "whole", **flags | {"save_every": 0})
    rl.stop_twice(forked("dump"), tmp_path / "run", flags, decode_calls=12)
    call(forked("dump"), out=tmp_path / "run", **flags)
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "whole")


@pytest.mark.slow
def test_rows_without_a_demonstration_are_refused(prompts, tmp_path):
    row = {"messages": [user("1?"), assistant("x")], "dataset": "small", "ground_truth": "5"}
    script = forked("hpt")
    with pytest.raises(script.common.RunError, match="row 1: demonstration is None, expected a string"):
        call(script, out=tmp_path / "run", **prompts | {"data": [write_jsonl(tmp_path / "rows.jsonl", [row] * 8)]})
