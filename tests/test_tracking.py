"""What a run shows of itself: metrics of each source, answers to look at, the best model, W&B, memory and MFU."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assistant, user, write_jsonl
from launch import call, metrics, run
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

import common
import dpo
import grpo
import reward_model
import sft


def sums(folder, name, seed, count):
    rng = np.random.default_rng(seed)
    pairs = rng.integers(10, 99, (count, 2)).tolist()
    rows = [{"messages": [user(f"{a}+{b}="), assistant("yes" if a % 3 else "no")]} for a, b in pairs]
    return Path(write_jsonl(folder / f"{name}.jsonl", rows))


@pytest.fixture(scope="module")
def flags(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sums")
    files = {"data": [sums(folder, "train", 0, 32)], "eval_data": [sums(folder, "a", 1, 12), sums(folder, "b", 2, 5)]}
    return {**files, "model": tiny_model, "max_length": 128, "batch_size": 8, "lr": 3e-2, "eval_every": 2, "save_every": 0}


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    call(sft, out=out, **as_text(flags), best="eval_loss", epochs=8.0)
    return out


def as_text(flags):
    return {name: [str(each) for each in value] if isinstance(value, list) else value for name, value in flags.items()}


# ---------------------------------------------------------------- by source


def test_losses_of_sources_are_those_of_each_alone(flags, finished, tmp_path):
    together = metrics(finished)[0]
    alone = {}
    for path in flags["eval_data"]:
        call(sft, out=tmp_path / path.stem, **as_text(flags | {"eval_data": [path]}), steps=1)
        first = metrics(tmp_path / path.stem)[0]
        assert [name for name in first if "/" in name] == []  # of one source there is one loss
        alone[path.stem] = first["eval_loss"]
    assert {name: together[f"eval_loss/{name}"] for name in "ab"} == pytest.approx(alone, rel=1e-6)
    rows = [common.load_rows([str(path)], encoder(flags)) for path in flags["eval_data"]]
    tokens = [int(each.trained.sum()) for each in rows]
    assert together["eval_loss"] == pytest.approx(np.average([alone["a"], alone["b"]], weights=tokens), rel=1e-6)


def encoder(flags):
    tokenizer = common.load_tokenizer(str(flags["model"]))
    return common.SftEncoder(common.ChatFormat(tokenizer), 10**6, 128, "truncate")


def test_names_of_sources(flags, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    paths = [str(sums(tmp_path / "x", "test", 1, 3)), str(sums(tmp_path / "y", "test", 2, 4)), str(flags["eval_data"][0])]
    rows = common.load_rows([*paths, f"{paths[2]}:5"], encoder(flags))
    found = rows.by_source()
    assert {name: len(members) for name, members in found.items()} == {paths[0]: 3, paths[1]: 4, "a": 17}
    assert sorted(np.concatenate([*found.values()])) == list(range(len(rows)))  # a source that is there twice counts twice


@pytest.mark.parametrize("module", [dpo, reward_model])
def test_pairs_by_source(module, tiny_model, tmp_path):
    pairs = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i)} for i in range(24)]
    files = [str(write_jsonl(tmp_path / f"{name}.jsonl", pairs[i::2])) for i, name in enumerate("ab")]
    shared = {"model": tiny_model, "data": files, "eval_data": files, "max_length": 64, "batch_size": 8, "steps": 1}
    call(module, out=tmp_path / "run", **shared, lr=1e-2)
    entry = metrics(tmp_path / "run")[-1]
    for name in ("loss", "accuracy"):
        parts = [entry[f"eval_{name}/{source}"] for source in "ab"]
        assert entry[f"eval_{name}"] == pytest.approx(np.mean(parts), rel=1e-6)
    assert entry["eval_loss/a"] != entry["eval_loss/b"]


def test_rewards_by_source(tiny_model, tmp_path):
    def prompts(name, count, truth):
        rows = [{"messages": [user(f"{i}")], "dataset": "contains", "ground_truth": truth} for i in range(count)]
        return str(write_jsonl(tmp_path / f"{name}.jsonl", rows))

    (tmp_path / "always.py").write_text(
        "from rewards import verifier\n@verifier('always')\ndef always(completion, ground_truth):\n"
        "    return float(ground_truth)\n"
    )
    shared = {"model": tiny_model, "max_length": 64, "max_new_tokens": 4, "batch_size": 4, "group_size": 2, "steps": 1}
    shared |= {"data": [prompts("train", 4, "1")], "eval_data": [prompts("always", 6, "1"), prompts("b", 2, "0")]}
    shared |= {"rewards": [str(tmp_path / "always.py")], "verifier": ["always"], "active_sampling": 0}
    call(grpo, out=tmp_path / "run", **shared)
    entry = metrics(tmp_path / "run")[0]
    assert (entry["eval_reward/always (source)"], entry["eval_reward/b"], entry["eval_reward"]) == (1, 0, 0.75)
    assert entry["eval_reward/always"] == 0.75  # the verifier's


# ---------------------------------------------------------------- answers


def test_answers_are_the_likeliest_tokens(flags, finished):
    """transformers' greedy generation of the final model, whose answers were logged last; of rows evenly spaced."""
    last = [line for line in common.read_samples(finished) if line["step"] == 32]
    assert [line["row"].rpartition(" ")[2] for line in last] == ["1", "9", "5"]
    model = AutoModelForCausalLM.from_pretrained(finished / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    rows = common.load_rows([str(path) for path in flags["eval_data"]], encoder(flags))
    prompts = common.some_prompts(rows, 3)
    for (_, ids), line in zip(prompts, last, strict=True):
        prompt = torch.tensor(ids[None].astype(np.int64))
        output = model.generate(prompt, do_sample=False, max_new_tokens=64, pad_token_id=0)[0, len(ids) :]
        assert tokenizer.decode(output) == line["completion"] and line["held_out"]
        assert line["prompt"].endswith("<|assistant|>\n") and line["ended"] == line["completion"].endswith("</s>")
    assert any(line["ended"] for line in last), "too little was learned"
    steps = [line["step"] for line in common.read_samples(finished)]
    assert steps == sorted([*range(0, 33, 2)] * 3)


def test_no_answers_and_those_that_have_no_room(flags, tmp_path):
    call(sft, out=tmp_path / "none", **as_text(flags), steps=1, answers=0)
    assert common.read_samples(tmp_path / "none") == []
    config = json.loads((flags["model"] / "config.json").read_text())
    short = tmp_path / "short"
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config | {"max_position_embeddings": 60}))
    model.save_pretrained(short)
    AutoTokenizer.from_pretrained(flags["model"]).save_pretrained(short)
    call(sft, out=tmp_path / "run", **as_text(flags | {"model": short, "max_length": 60, "lr": 0.0}), steps=1)
    lines = common.read_samples(tmp_path / "run")
    assert len(lines) == 6 and not any(line["ended"] for line in lines)


@pytest.mark.slow
def test_answers_and_best_model_of_two_processes(flags, finished, tmp_path):
    run("sft.py", 2, out=tmp_path / "run", **as_text(flags), best="eval_loss", epochs=8.0)
    [best], [expected] = ([path.name for path in (out / "best").iterdir()] for out in (tmp_path / "run", finished))
    assert best == expected and (tmp_path / "run" / "best" / best / "model.safetensors").stat().st_size > 1000
    assert [line["completion"] for line in common.read_samples(tmp_path / "run")][:3] == [
        line["completion"] for line in common.read_samples(finished)
    ][:3]


# ---------------------------------------------------------------- the best model


def test_the_best_model_is_kept(flags, tmp_path, monkeypatch):
    """Evaluations that are worse from the fourth on: the best is neither the first nor the last, and is what it was."""
    out, evaluate, calls = tmp_path / "run", sft.evaluate, []

    def worse_later(*args):
        calls.append(args)
        return {name: loss + 100 * (len(calls) > 3) for name, loss in evaluate(*args).items()}

    with monkeypatch.context() as patch:
        patch.setattr(sft, "evaluate", worse_later)
        call(sft, out=out, **as_text(flags | {"lr_schedule": "constant", "eval_every": 1}), best="eval_loss/b", epochs=2.0)
    losses = {entry["step"]: entry["eval_loss/b"] for entry in metrics(out) if "eval_loss/b" in entry}
    best = min(losses, key=losses.get)
    assert best not in (0, max(losses)), "nothing is learned in two steps"
    assert [path.name for path in (out / "best").iterdir()] == [f"step_{best}"]
    folder = out / "best" / f"step_{best}"
    assert json.loads((folder / "best.json").read_text()) == {"step": best, "eval_loss/b": losses[best]}
    call(sft, out=tmp_path / "again", **as_text(flags | {"model": folder}), steps=1)
    assert metrics(tmp_path / "again")[0]["eval_loss/b"] == pytest.approx(losses[best], rel=1e-6)


def test_the_best_of_accuracies_is_the_highest(tmp_path):
    for step, value in enumerate((0.5, 0.7, 0.7, 0.6)):
        entry = {"step": step, "eval_accuracy": value}
        if common.is_best(tmp_path, "eval_accuracy", entry):
            (tmp_path / "best.tmp").mkdir()
            common.publish_best(tmp_path / "best.tmp", "eval_accuracy", entry)
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["step_1"]
    entry = {"step": 1, "eval_accuracy": 0.8}  # the step was made again, from the checkpoint before it
    (tmp_path / "best.tmp").mkdir()
    common.publish_best(tmp_path / "best.tmp", "eval_accuracy", entry)
    assert json.loads((tmp_path / "best" / "step_1" / "best.json").read_text()) == entry


def test_best_needs_a_metric_that_is_there(flags, tmp_path):
    with pytest.raises(common.RunError, match="--best eval_los: no metric .* there are eval_loss, eval_loss/a, eval_loss/b"):
        call(sft, out=tmp_path / "run", **as_text(flags), best="eval_los")
    with pytest.raises(common.RunError, match="--best eval_loss is a metric of held-out data: give --eval_data"):
        call(sft, out=tmp_path / "run", **as_text(flags | {"eval_data": []}), best="eval_loss")


# ---------------------------------------------------------------- W&B


class FakeWandb:
    """Remembers what it is given."""

    def __init__(self):
        self.logged, self.settings = [], None

    def login(self, prompt):
        return False

    def Settings(self, **settings):
        return settings

    def Table(self, columns, data):
        return {"columns": list(columns), "data": data}

    def init(self, **settings):
        self.settings = settings
        return SimpleNamespace(log=lambda numbers, step: self.logged.append((step, numbers)), finish=lambda: None)


def test_wandb_gets_groups_tables_and_the_whole_config(flags, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    call(sft, out=tmp_path / "run", **as_text(flags), steps=2, track=True)
    assert (fake.settings["project"], fake.settings["job_type"], fake.settings["name"]) == ("mine", "sft.py", "run")
    config = fake.settings["config"]
    assert config["script"] == "sft.py" and config["lr"] == flags["lr"] and config["versions"]["torch"] == torch.__version__
    assert any("32 rows" in line for line in config["data_report"]) and {"commit", "world_size"} <= config.keys()
    assert [step for step, _ in fake.logged] == [0, 1, 2]
    assert {"train/loss", "train/lr", "speed/tokens_per_second", "speed/peak_memory_gib"} <= fake.logged[1][1].keys()
    assert {"eval/loss", "eval/loss/a", "samples"} <= fake.logged[2][1].keys() and "samples" not in fake.logged[1][1]
    table = fake.logged[2][1]["samples"]
    assert table["columns"] == ["step", "held_out", "row", "prompt", "completion", "ended"] and len(table["data"]) == 3
    assert "eval_loss/a" in metrics(tmp_path / "run")[-1]  # flat in the file


@pytest.mark.parametrize("name, group", [
    ("loss", "train/loss"), ("policy_loss", "train/policy_loss"), ("entropy", "train/entropy"), ("ratio", "train/ratio"),
    ("chosen_reward", "train/chosen_reward"), ("accuracy", "train/accuracy"), ("explained_variance", "train/explained_variance"),
    ("reward", "reward/reward"), ("reward/gsm8k", "reward/reward/gsm8k"), ("reward_std", "reward/reward_std"),
    ("zero_std_groups", "reward/zero_std_groups"), ("completion_tokens", "rollout/completion_tokens"),
    ("eos_rate", "rollout/eos_rate"), ("crash_rate", "rollout/crash_rate"), ("staleness", "rollout/staleness"),
    ("sampled_tokens", "rollout/sampled_tokens"), ("tokens", "speed/tokens"), ("rollout_seconds", "speed/rollout_seconds"),
    ("eval_reward/gsm8k", "eval/reward/gsm8k"), ("eval_loss", "eval/loss"), ("peak_memory_gib", "speed/peak_memory_gib"),
])  # fmt: skip
def test_groups(name, group):
    assert common.grouped(name) == group


# ---------------------------------------------------------------- memory and MFU


def test_operations_of_a_token():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    for tied in (True, False):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, tie_word_embeddings=tied))
        layers = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32  # matrices and norms
        assert common.flops_per_token(model) == 6 * (layers + 100 * 32)
    assert common.flops_per_token(AutoModelForCausalLM.from_config(MixtralConfig(**sizes, num_local_experts=2))) is None


def test_memory_and_mfu(monkeypatch):
    model = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=100, num_attention_heads=4))
    assert 0.1 < common.hardware_metrics(model, 1000.0)["peak_memory_gib"] < 64
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("Some other card", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        found = common.hardware_metrics(model, 1000.0)
        assert found.pop("peak_memory_gib") == 3
        assert found == ({} if peak is None else {"mfu": pytest.approx(common.flops_per_token(model) * 1000 / peak)})
