"""kl: 0 of a model with itself, the sum over all strings of a tiny model, and what is written."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import rl
import torch
from conftest import user, write_jsonl
from test_generate import TRUTH, read
from test_kernels import tiny_config
from test_sampler import make, make_sampler
from together import together
from transformers import AutoModelForCausalLM

import common
from kernels.sampler import SamplingParams
from pipeline import kl


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(folder with a start, a model near it, a run of two checkpoints; flags)."""
    folder = tmp_path_factory.mktemp("kl")
    _, config, tokenizer = rl.small_run(folder)
    for number, name in enumerate(("near", "run/checkpoints/step_2/model", "run/checkpoints/step_4/model", "run/model")):
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.005 * (number + 1))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    config = {"script": "grpo.py", "data": [None, None], "args": {}, "steps": 6, "date": "2026-01-31"}
    (folder / "run" / "config.json").write_text(json.dumps(config))
    rows = [{"messages": [user(f"{i}?")], "dataset": "ifeval", "ground_truth": TRUTH} for i in range(12)]
    data = write_jsonl(folder / "prompts.jsonl", rows)
    return folder, {"ref": str(folder / "model"), "data": [str(data)], "max_length": 64, "max_new_tokens": 10, "slots": 8,
                    "verifier_workers": 1}  # fmt: skip


def table(out, **flags):
    """The rows of kl.tsv as dicts, numbers as numbers."""
    kl.main(kl.Args(out=str(out), **flags))
    head, *lines = (line.split("\t") for line in (out / "kl.tsv").read_text().splitlines())
    return [dict(zip(head, [line[0], *map(float, line[1:])], strict=True)) for line in lines]


def test_a_model_and_itself_are_exactly_0_apart(start, tmp_path):
    folder, flags = start
    shutil.copytree(folder / "model", tmp_path / "copy")
    for number, n in enumerate((1, 3)):
        [row] = table(tmp_path / f"out{number}", model=[str(tmp_path / "copy")], n=n, **flags)
        assert (row["name"], row["prompts"]) == ("copy", 12)
        assert all(row[name] == 0 for name in ("kl", "kl_low", "kl_high", "k3", "k3_high", "kl_per_token"))


def test_against_the_sum_over_all_strings():
    """A vocabulary of 8, completions of 3 tokens, of which none ends early."""
    prompt = [3, 5]
    near, start = (make(tiny_config("llama", 8, tied=False), seed=seed) for seed in (1, 1))
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    samplers = [make_sampler(model, slots=64, max_length=8, eos_ids=()) for model in (near, start)]
    strings = [list(string) for string in itertools.product(range(8), repeat=3)]
    whole = [[scores[1:].astype(float) for scores in each.score([prompt + s for s in strings])] for each in samplers]
    p = np.exp([scores.sum() for scores in whole[0]])
    exact = (p * [(a - b).sum() for a, b in zip(*whole, strict=True)]).sum()
    params = SamplingParams(n=6000, max_new_tokens=3)
    ids = [prompt + c.token_ids.tolist() for c in samplers[0].sample([prompt], params)]
    fields = {"tokens": [3], "ended": [False], "rewards": [None]}
    rows = [
        [{"logprobs": [scores[1:]], "messages": number, **fields} for number, scores in enumerate(sampler.score(ids))]
        for sampler in samplers
    ]
    numbers = kl.measure(*rows)
    assert abs(p.sum() - 1) < 1e-5 and exact > 0.01
    for name in ("kl", "k3"):
        assert abs(numbers[name] - exact) < 2 * (numbers[f"{name}_high"] - numbers[f"{name}_low"]) / 2
        assert numbers[f"{name}_high"] - numbers[f"{name}_low"] < 0.3 * exact
    assert numbers["kl_per_token"] == numbers["kl"] / 3 and "reward" not in numbers


def test_a_run_is_all_its_checkpoints(start, tmp_path):
    folder, flags = start
    models = [str(folder / "run"), str(folder / "near"), str(folder / "run" / "model")]
    with pytest.raises(common.RunError, match="3 are called run"):
        kl.main(kl.Args(out=str(tmp_path / "no"), model=[*models, str(folder / "run")], **flags))
    rows = table(tmp_path / "out", model=models[:2], best_of=4, **flags)
    assert [(row["name"], row["step"]) for row in rows] == [("run", 2), ("run", 4), ("run", 6), ("near", 0)]
    assert 0 < rows[3]["k3"] < rows[0]["k3"] < rows[2]["k3"]  # further and further from the start
    files = {"kl.tsv", "kl.png", "best_of.tsv", "best_of.jsonl", "near.step_0.jsonl", *(f"run.step_{step}.jsonl" for step in (2, 4, 6))}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    samples = read(tmp_path / "out" / "near.step_0.jsonl")
    assert np.mean([row["rewards"] for row in samples]) == pytest.approx(rows[3]["reward"])
    assert [len(each) for each in samples[0]["logprobs"]] == samples[0]["tokens"]
    together(2, lambda: kl.main(kl.Args(out=str(tmp_path / "two"), model=models[1:2], **flags)))
    two = (tmp_path / "two" / "kl.tsv").read_text().splitlines()[1].split("\t")
    assert float(two[3]) == pytest.approx(rows[3]["kl"], abs=1e-4)
    with pytest.raises(common.RunError, match="is there already"):
        table(tmp_path / "out", model=models[:1], **flags)


def test_best_of_n_by_brute_force():
    random = np.random.default_rng(0)
    rows = [{"rewards": [*random.random(8).round(1), None]} for _ in range(3)]
    for n, bound, mean in kl.best_of(rows):
        of_each = []
        for row in rows:
            draws = itertools.combinations([reward for reward in row["rewards"] if reward is not None], n)
            of_each.append(np.mean([max(draw) for draw in draws]))
        assert mean == pytest.approx(np.mean(of_each))
        assert bound == pytest.approx(math.log(n) - (n - 1) / n)
    assert [n for n, *_ in kl.best_of(rows)] == [1, 2, 4, 8]
    assert kl.best_of([{"rewards": [None]}]) == []


def test_the_reference_reads_what_the_model_has_read(start, tmp_path):
    """Whatever template its own folder has; another vocabulary has no KL."""
    folder, flags = start
    shutil.copytree(folder / "model", tmp_path / "chatml")
    tokenizer = common.load_tokenizer(folder / "model", "chatml")
    tokenizer.save_pretrained(tmp_path / "chatml")
    [row] = table(tmp_path / "out", model=[str(folder / "model")], **flags | {"ref": str(tmp_path / "chatml")})
    assert row["kl"] == row["k3"] == 0
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "chatml")
    with pytest.raises(common.RunError, match="has another vocabulary than --ref"):
        table(tmp_path / "no", model=[str(folder / "model")], **flags | {"ref": str(tmp_path / "chatml")})


def test_a_prompt_that_is_there_twice_is_one_prompt(start, tmp_path):
    folder, flags = start
    once, thrice = (
        table(tmp_path / str(n), model=[str(folder / "near")], n=1, **flags | {"data": [f"{flags['data'][0]}:{n}.0"]})[0]
        for n in (1, 3)
    )
    assert once["prompts"] == thrice["prompts"] == 12
    assert thrice["kl_high"] - thrice["kl_low"] > 0.3 * (once["kl_high"] - once["kl_low"])


def test_other_distributions_are_refused(start, tmp_path):
    folder, flags = start
    for wrong, message in (({"temperature": 0.0}, "--temperature 0.0"), ({"top_p": 0.5}, "--top_p below 1")):
        with pytest.raises(common.RunError, match=message):
            table(tmp_path / "no", model=[str(folder / "near")], **flags | wrong)


def test_what_a_killed_call_has_left_is_not_published(start, tmp_path):
    folder, flags = start
    publish = Path.rename

    def killed(self, target):
        if Path(target).name == "out":
            raise KeyboardInterrupt
        return publish(self, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        table(tmp_path / "out", model=[str(folder / "run")], **flags)
    [row] = table(tmp_path / "out", model=[str(folder / "near")], **flags)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"kl.tsv", "kl.png", "near.step_0.jsonl"}
