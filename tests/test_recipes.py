"""recipes/: every command parses, has the published numbers, and sources beside them; the templates render as OLMo's."""

import dataclasses
import importlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tyro
from conftest import ROOT, assistant, shared, tokenizer_folder, user, write_jsonl
from transformers import Olmo2Config

import common
from pipeline import curate

RECIPES = ROOT / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.sh") if path.stem not in ("run", "slurm"))
STUB = """#!/bin/sh
{ printf '%s\\037' "$(basename "$0")" "$@"; echo; } >> "$CALLS"
"""
OLMO2_1B = Olmo2Config(
    vocab_size=100_352, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=16,
    num_key_value_heads=16, max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip
NEEDED = {
    "PROMPTS": "prompts.jsonl",
    "OTHERS": "m1 m2 m3",
    "MODELS": "m1 m2 m3 m4",
    "KL_PROMPTS": "kl.jsonl:100",
}  # by stages that are optional


@pytest.fixture
def recipe(tmp_path):
    """Runs a script of recipes/, with stubs for what it calls; returns what was called, a list of words each."""
    bench, stubs = tmp_path / "bench", tmp_path / "stubs"
    (bench / "shots").mkdir(parents=True)
    stubs.mkdir()
    for name in ("gsm8k", "math", "shots/gsm8k", "shots/math"):
        write_jsonl(bench / f"{name}.jsonl", [])
    for name in ("torchrun", "python", "srun", "sbatch"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)

    def run(*words, code=0, stub=None, **env):
        if stub:
            (stubs / stub[0]).write_text(stub[1])
            (stubs / stub[0]).chmod(0o755)
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        own = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        path = f"{stubs}:{os.environ['PATH']}"
        env = own | {"PATH": path, "CALLS": str(calls), "BENCH": str(bench), "RUNS": str(tmp_path / "runs")} | env
        done = subprocess.run(["bash", *words], cwd=ROOT, env=env, capture_output=True, text=True)
        run.said = done.stdout + done.stderr
        assert done.returncode == code, run.said
        return [line.split("\037")[:-1] for line in calls.read_text().splitlines()] if calls.exists() else []

    return run


def stages(name, kind="STAGES"):
    found = re.search(rf"^{kind}=\((.*)\)$", (RECIPES / f"{name}.sh").read_text(), re.MULTILINE)
    return found[1].split() if found else []


def parsed(words):
    """(script, its Args, or of curate one of its three) of a command's words. Whatever does not parse ends the test."""
    if "-m" in words:
        name, flags = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
        module = importlib.import_module(name)
        kind = curate.Sft | curate.Pairs | curate.Prompts if module is curate else module.Args
    else:
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        name, flags = words[place].removesuffix(".py"), words[place + 1 :]
        module = importlib.import_module(name)
        kind = module.Args
    try:
        args = tyro.cli(kind, args=flags, use_underscores=True)
    except SystemExit:
        pytest.fail(shlex.join(words))
    if hasattr(module, "check_flags"):  # --sample_tp has to divide the number of processes, of which there is one here
        module.check_flags(dataclasses.replace(args, sample_tp=1) if hasattr(args, "sample_tp") else args)
    return name.removeprefix("pipeline."), args


def run_of(calls):
    """{folder or file that it writes: (script, Args)} of all commands."""
    return {args.out.split("/runs/")[-1]: (name, args) for name, args in map(parsed, calls)}


@pytest.fixture
def all_of(recipe):
    """All commands of a recipe, also of its optional stages."""
    return lambda name: run_of(recipe(f"recipes/{name}.sh", *stages(name), *stages(name, "OPTIONAL"), **NEEDED))


# ------------------------------------------------------------------------------------------------- numbers

SFT = {"lr_schedule": "linear", "warmup_ratio": 0.03, "weight_decay": 0, "epochs": 2}
TULU_SFT = SFT | {"max_length": 4096, "batch_size": 128, "adam_betas": (0.9, 0.999)}
SUMMED = {"max_grad_norm": 0.1, "adam_eps": 1e-9}  # a summed loss, or rewards to 10
OLMO_SFT = SFT | {"max_length": 32768, "adam_betas": (0.9, 0.95), "max_grad_norm": 1}
DPO = {"beta": 5, "length_normalize": True, "batch_size": 128, "lr_schedule": "linear", "warmup_ratio": 0.1,
       "weight_decay": 0, "epochs": 1, "max_grad_norm": 1, "label_smoothing": 0, "nll_coef": 0}  # fmt: skip
PPO = {"group_size": 1, "passes": 4, "minibatches": 1, "gamma": 1, "gae_lambda": 0.95, "clip_low": 0.2, "clip_high": 0.2,
       "value_clip": 0.2, "value_coef": 0.1, "reward_scale": 10, "no_eos_score": -10, "tis_cap": 0, "temperature": 1,
       "lr_schedule": "linear", "max_new_tokens": 2048, "max_length": 4096, "weight_decay": 0.01, "max_grad_norm": 1}  # fmt: skip
TULU_GRPO = {"batch_size": 48, "group_size": 16, "minibatches": 2, "passes": 1, "lr": 5e-7, "lr_schedule": "constant",
             "warmup_ratio": 0, "kl_beta": 0.01, "clip_low": 0.2, "clip_high": 0.2, "normalize_std": True, "active_sampling": 0,
             "tis_cap": 0, "no_eos_score": 0, "temperature": 1, "max_length": 4096, "max_new_tokens": 2048, "seed": 1,
             "weight_decay": 0.01, "max_grad_norm": 1}  # fmt: skip
OLMO_GRPO = SUMMED | {"group_size": 8, "passes": 1, "lr_schedule": "constant", "warmup_ratio": 0, "kl_beta": 0, "clip_low": 0.2,
                      "clip_high": 0.272, "normalize_std": False, "temperature": 1, "no_eos_score": None, "seed": 1}  # fmt: skip
ZERO = OLMO_GRPO | {"lr": 1e-6, "batch_size": 32, "minibatches": 1, "tis_cap": 2, "max_length": 18432,
                    "max_new_tokens": 16384, "steps": 2000}  # fmt: skip
MIX = "allenai/RLVR-GSM-MATH-IF-Mixed-Constraints"

# {recipe: {output: (script, rows that go in, what else is published)}}, typed from the papers and the authors' scripts.
PUBLISHED = {
    "tulu3_8b": {
        "sft": ("sft", "allenai/tulu-3-sft-mixture", TULU_SFT | SUMMED | {"lr": 5e-6, "seed": 123, "model": "meta-llama/Llama-3.1-8B"}),
        "dpo": ("dpo", "allenai/llama-3.1-tulu-3-8b-preference-mixture", DPO | {"lr": 5e-7, "max_length": 2048}),
        "reward_model": ("reward_model", "allenai/llama-3.1-tulu-3-8b-preference-mixture", {
            "lr": 3e-6, "lr_schedule": "linear", "warmup_ratio": 0, "batch_size": 256, "epochs": 1, "max_length": 2048,
            "adam_eps": 1e-5, "weight_decay": 0.01, "max_grad_norm": 1, "eval_data": ["allenai/ultrafeedback_binarized_cleaned@test_prefs"]}),
        "rlvr": ("ppo_rlvr", MIX, PPO | {"lr": 3e-7, "value_lr": 3e-7, "warmup_ratio": 0, "kl_beta": 0.05, "batch_size": 224, "seed": 3,
                                         "epochs": 334, "stop_step": 447, "save_every": 100, "keep": 0}),
    },
    "tulu3_70b": {
        "sft": ("sft", "allenai/tulu-3-sft-mixture", TULU_SFT | SUMMED | {"lr": 2e-6, "seed": 456, "model": "meta-llama/Llama-3.1-70B"}),
        "dpo": ("dpo", "allenai/llama-3.1-tulu-3-70b-preference-mixture", DPO | {"lr": 2e-7, "max_length": 2048}),
        "rlvr": ("ppo_rlvr", MIX, PPO | {"lr": 1e-7, "value_lr": 1e-7, "warmup_ratio": 0.1, "kl_beta": 0.07, "batch_size": 640, "seed": 8,
                                         "save_every": 40, "value_model": "allenai/Llama-3.1-Tulu-3-8B-RM"}),
    },
    "tulu31_8b": {
        "rlvr": ("grpo", MIX, TULU_GRPO | {"steps": 1920, "stop_strings": [], "model": "allenai/Llama-3.1-Tulu-3-8B-DPO"}),
    },
    "olmo2_1b": {
        "sft": ("sft", "allenai/tulu-3-sft-olmo-2-mixture-0225", TULU_SFT | {"lr": 3e-5, "max_grad_norm": 1, "seed": 1, "model": "allenai/OLMo-2-0425-1B"}),
        "dpo": ("dpo", "allenai/olmo-2-0425-1b-preference-mix", DPO | {"lr": 2.5e-6, "max_length": 2048, "seed": 111}),
        "rlvr": ("grpo", MIX, TULU_GRPO | {"stop_strings": ["</answer>"], "steps": 2_000_000 // (48 * 16)}),
        "rlvr_math": ("grpo", "allenai/RLVR-MATH", TULU_GRPO | {"stop_strings": ["</answer>"], "steps": 2_000_000 // (48 * 16)}),
    },
    "olmo3_7b_think": {
        "sft": ("sft", "allenai/Dolci-Think-SFT-7B", OLMO_SFT | {"lr": 5e-5, "batch_tokens": 2**20, "seed": 33333, "model": "allenai/Olmo-3-1025-7B"}),
        "dpo": ("dpo", "allenai/Dolci-Think-DPO-7B:150000", DPO | {"lr": 8e-8, "max_length": 16384}),
        "tries.jsonl": ("generate", "allenai/Dolci-Think-RL-7B", {"n": 8, "temperature": 1, "top_p": 1, "max_new_tokens": 32768}),
        "prompts.jsonl": ("curate", "tries.jsonl", {"at_most": 0.625, "above": -1, "min_reward": 1, "drop_solved": False}),
        "rl": ("grpo", "prompts.jsonl", OLMO_GRPO | {"lr": 1e-6, "batch_size": 64, "minibatches": 1, "tis_cap": 0, "active_sampling": 1, "solved": None,
                                                    "max_length": 32768 + 2048, "max_new_tokens": 32768, "steps": 1400, "stop_strings": []}),
    },
    "olmo3_7b_instruct": {
        "sft": ("sft", "allenai/Dolci-Instruct-SFT", OLMO_SFT | {"lr": 8e-5, "batch_tokens": 2**20, "seed": 543210}),
        "dpo": ("dpo", "allenai/Dolci-Instruct-DPO", DPO | {"lr": 1e-6, "max_length": 16384}),
        "rl": ("grpo", "allenai/Dolci-Instruct-RL", OLMO_GRPO | {
            "lr": 1e-6, "batch_size": 64, "minibatches": 4, "tis_cap": 0, "active_sampling": 8, "solved": 0.875, "stop_strings": ["</answer>"],
            "max_length": 8192 + 2048, "max_new_tokens": 8192, "steps": 450}),
    },
    "olmo3_7b_rlzero": {
        "tries.jsonl": ("generate", "allenai/Dolci-RLZero-Math-7B", {"n": 8, "temperature": 1, "top_p": 1, "max_new_tokens": 16384}),
        "prompts.jsonl": ("curate", "tries.jsonl", {"drop_solved": True}),
        "mathematics": ("grpo", "prompts.jsonl", ZERO | {"solved": 0.875, "active_sampling": 8, "model": "allenai/Olmo-3-1025-7B"}),
        "code": ("grpo", "allenai/Dolci-RLZero-Code-7B", ZERO | {"verifier": ["code_share"]}),
        "instructions": ("grpo", "allenai/Dolci-RLZero-IF-7B", ZERO | {"verifier": []}),
        "general": ("grpo", "allenai/Dolci-RLZero-General-7B", ZERO | {"stop_strings": ["</answer>"]}),
    },
    "olmo3_32b_think": {
        "sft_1e-4": ("sft", "allenai/Dolci-Think-SFT-32B", OLMO_SFT | {"lr": 1e-4, "batch_tokens": 2**22, "seed": 33333, "model": "allenai/Olmo-3-1125-32B"}),
        "sft_5e-5": ("sft", "allenai/Dolci-Think-SFT-32B", OLMO_SFT | {"lr": 5e-5, "batch_tokens": 2**22, "seed": 33333, "model": "allenai/Olmo-3-1125-32B"}),
        "sft": ("merge", None, {"weights": [], "no_normalize": False, "restore": []}),
        "dpo": ("dpo", "allenai/Dolci-Think-DPO-32B:200000", DPO | {"lr": 7e-8, "max_length": 8192, "seed": 42}),
        "rl": ("grpo", "allenai/Dolci-Think-RL-32B", OLMO_GRPO | {
            "lr": 2e-6, "batch_size": 128, "minibatches": 1, "tis_cap": 2, "active_sampling": 8, "solved": None, "stop_strings": [],
            "max_length": 32768 + 2048, "max_new_tokens": 32768, "steps": 750}),
    },
    "olmo3_32b_instruct": {
        "sft": ("sft", "allenai/Dolci-Instruct-SFT", OLMO_SFT | {"lr": 8e-5, "batch_tokens": 2**22, "seed": 33333}),
        "dpo": ("dpo", "allenai/Dolci-Instruct-DPO", DPO | {"lr": 1e-6, "max_length": 8192}),
        "rl": ("grpo", "allenai/Dolci-Instruct-RL", OLMO_GRPO | {
            "lr": 2e-6, "batch_size": 64, "minibatches": 1, "tis_cap": 2, "active_sampling": 8, "stop_strings": [],
            "max_length": 16384 + 2048, "max_new_tokens": 16384, "seed": 543210}),
    },
}  # fmt: skip


def test_recipes_are_those():
    assert set(NAMES) == set(PUBLISHED)


@pytest.mark.parametrize("name", NAMES)
def test_numbers(all_of, name):
    """Every command parses, what is published is what it says, and each stage begins with what another has left."""
    commands = all_of(name)
    cleaned = {}
    for source in commands["clean"][1].train if "clean" in commands else ():
        cleaned[f"clean/clean/{source.rsplit('/')[-1]}.jsonl"] = source
    for out, (script, source, numbers) in PUBLISHED[name].items():
        assert commands[out][0] == script
        args = commands[out][1]
        for flag, value in numbers.items():
            assert getattr(args, flag) == value, (out, flag)
        if source:
            (data,) = args.data
            path, amount = re.fullmatch(r"(.*?)(:\d+)?", data.split("/runs/")[-1]).groups("")
            assert cleaned.get(path, path) + amount == source
    extra = {"clean", "kl", "candidates.jsonl", "pairs.jsonl", "answers.jsonl", "judged.jsonl"}
    assert {out for out in commands if not out.startswith("evaluation/")} - extra == set(PUBLISHED[name])


@pytest.mark.parametrize("name", NAMES)
def test_one_stage_after_the_other(all_of, name):
    """What a stage reads from the folder of the recipe, an earlier one has written; every trained policy is measured."""
    written, measured, trained = set(), set(), set()
    for out, (script, args) in all_of(name).items():
        words = [getattr(args, flag, None) for flag in ("model", "value_model", "ref", "models", "data", "eval_data")]
        for word in filter(None, sum([word if isinstance(word, list) else [word] for word in words], [])):
            if "/runs/" in word:
                inner = word.split("/runs/")[-1]
                assert any(inner == path or inner.startswith(f"{path}/") for path in written), (out, word)
        if script == "evaluate":
            measured.add(args.model.split("/runs/")[-1].split("/")[0])
        elif script in ("sft", "dpo", "grpo", "ppo_rlvr", "merge"):
            trained.add(out)
        written.add(out)
    assert measured == trained


def test_what_starts_where(all_of):
    think, instruct = all_of("olmo3_7b_think"), all_of("olmo3_7b_instruct")
    assert think["dpo"][1].model.endswith("/runs/sft/model") and think["rl"][1].model.endswith("/runs/dpo/model")
    assert instruct["sft"][1].model == "runs/olmo3_7b_think/sft/model"
    tulu = all_of("tulu3_8b")
    assert tulu["reward_model"][1].model == tulu["dpo"][1].model
    assert tulu["rlvr"][1].value_model.endswith("/runs/reward_model/model")
    large = all_of("olmo3_32b_think")
    assert [model.split("/runs/")[-1] for model in large["sft"][1].models] == ["sft_1e-4/model", "sft_5e-5/model"]
    assert large["dpo"][1].model.endswith("/runs/sft")


@pytest.mark.parametrize("name", NAMES)
def test_measuring(all_of, name):
    preset = "olmo3" if name.startswith("olmo3") else "tulu3"
    evaluations = [args for script, args in all_of(name).values() if script == "evaluate"]
    assert evaluations
    for args in evaluations:
        assert args.preset == preset and [spec.split("=")[0] for spec in args.data] == ["gsm8k", "math"]
        assert len(args.shots) == (2 if preset == "tulu3" else 0)
        assert args.temperature == (1 if name == "olmo3_7b_rlzero" else None)
    clean = all_of(name)["clean"][1]
    assert clean.rule == preset and clean.test == evaluations[0].data
    assert (clean.ngram, clean.threshold, clean.contaminated) == (8, 0.5, 0.02)


def test_own_pairs(all_of):
    think = all_of("olmo3_7b_think")
    (_, answers), (_, pairs) = think["answers.jsonl"], think["pairs.jsonl"]
    assert answers.model == ["Qwen/Qwen3-32B", "Qwen/Qwen3-0.6B"] == [pairs.strong, pairs.weak]
    assert pairs.rule == "delta" and pairs.length_gap is None and pairs.data == [answers.out]
    instruct = all_of("olmo3_7b_instruct")
    assert instruct["pairs.jsonl"][1].length_gap == instruct["judged.jsonl"][1].length_gap == 100
    assert instruct["judged.jsonl"][1].rule == "best_worst" and len(instruct["candidates.jsonl"][1].model) == 4
    tulu = all_of("tulu3_8b")
    assert tulu["pairs.jsonl"][1].rule == "tulu" and tulu["candidates.jsonl"][1].model[0].endswith("/runs/sft/model")
    assert tulu["candidates.jsonl"][1].verifier == ["general-quality"]


@pytest.mark.parametrize("name", NAMES)
def test_sources(name):
    """Every line with a number says where that is from."""
    lines = (RECIPES / f"{name}.sh").read_text().splitlines()
    numbers = [line for line in lines if re.match(r"\s+--\w+ -?[\d.]", line)]
    numbers += [
        line for line in lines if re.match(r"\s+--(stop_strings|length_normalize|normalize_std|drop_solved|rule)", line)
    ]
    numbers += [line for line in lines if re.match(r"\w+_DATA=", line)]
    assert len(numbers) > 15
    for line in numbers:
        assert re.search(r"\S +# \S", line), line
    assert all(len(line) <= 120 for line in lines)


# ------------------------------------------------------------------------------------------------- the page

PAGE = (RECIPES / "README.md").read_text(encoding="utf-8")


def test_stages_on_the_page():
    for name in NAMES:
        (row,) = re.findall(rf"^\| \[`{name}.sh`\]\({name}.sh\) \| (.*?) \| (.*?) \|", PAGE, re.MULTILINE)
        main, also = (re.findall(r"[a-z_]+[\w-]*", re.sub(r"\(.*?\)", "", cell)) for cell in row)
        assert main == stages(name) and also == stages(name, "OPTIONAL")


def cards():
    """[(recipe, stages, cards, GiB, words of the command), …] of the page."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (\d+) \| ([\d.]+) \| `(.*?)` \|$", PAGE, re.MULTILINE)
    return [(name, names.split(", "), int(gpus), size, words.split()) for name, names, gpus, size, words in rows]


@pytest.mark.slow
def test_cards_on_the_page(all_of, monkeypatch):
    """Each figure is what memory.py counts, for the page's words and for the recipe's own flags; fewer cards are too few."""
    sys.path.append(str(ROOT / "benchmarks"))
    import memory

    monkeypatch.setitem(memory.MODELS, "allenai/OLMo-2-0425-1B", OLMO2_1B)  # which is on the Hub
    seen = set()
    for name, names, gpus, size, words in cards():
        args, rest = tyro.cli(memory.Args, args=words, use_underscores=True, return_unknown_args=True)
        assert args.gpus == gpus
        of_page = tyro.cli(memory.script_args(args), args=rest, use_underscores=True)
        commands = all_of(name)
        for stage in names:
            script, flags = commands[stage]
            assert script == args.script
            for one in (flags, of_page):
                need = memory.need(args, one)
                assert memory.gib(max(need.training, need.rollout or 0)) == size and need.fits(
                    args.limit_gib * memory.GIB
                )
            fewer = dataclasses.replace(args, gpus=gpus // 2)
            assert gpus == 8 or not memory.need(fewer, flags).fits(args.limit_gib * memory.GIB)
            seen.add((name, stage))
    trainers = ("sft", "dpo", "reward_model", "grpo", "ppo_rlvr")
    assert seen == {(name, out) for name in NAMES for out, (script, _) in all_of(name).items() if script in trainers}


# ------------------------------------------------------------------------------------------------- how they run


def test_a_plain_call_runs_all_stages(recipe):
    calls = recipe("recipes/tulu3_8b.sh")
    assert [call[:3] for call in calls if "pipeline.evaluate" not in call] == [
        ["python", "-m", "pipeline.decontaminate"],
        *(["torchrun", "--nproc_per_node", "8"] for _ in range(4)),
    ]
    assert [line for line in recipe.said.splitlines() if line.startswith("==")] == [
        f"== recipes/tulu3_8b.sh {stage}" for stage in stages("tulu3_8b")
    ]


def test_chosen_stages_launcher_and_more_flags(recipe, tmp_path):
    env = {
        "LAUNCH": "srun torchrun --nnodes 2",
        "EXTRA_dpo": "--steps 3 --data mine.jsonl",
        "BENCH": "none",
        "PAIRS": "own.jsonl",
    }
    (call,) = recipe("recipes/tulu3_8b.sh", "dpo", **env)
    assert call[:4] == ["srun", "torchrun", "--nnodes", "2"] and call[-4:] == ["--steps", "3", "--data", "mine.jsonl"]
    args = parsed(call)[1]
    assert args.steps == 3 and args.data == ["mine.jsonl"] and args.model == str(tmp_path / "runs/sft/model")
    assert parsed(recipe("recipes/tulu3_8b.sh", "dpo", BENCH="none", PAIRS="own.jsonl")[0])[1].data == ["own.jsonl"]


def test_without_benchmarks(recipe):
    calls = recipe("recipes/olmo3_7b_think.sh", BENCH="none")
    assert not any("pipeline.evaluate" in call or "pipeline.decontaminate" in call for call in calls)
    assert parsed(calls[0])[1].data == ["allenai/Dolci-Think-SFT-7B"]


def test_what_is_there_is_not_made_again(recipe, tmp_path):
    (tmp_path / "runs/evaluation/dpo").mkdir(parents=True)
    (tmp_path / "runs/tries.jsonl").touch()
    calls = recipe("recipes/olmo3_7b_think.sh", "dpo", "tries", "filter")
    assert [call[3] if call[0] == "torchrun" else call[2] for call in calls] == ["dpo.py", "pipeline.curate"]
    assert f"{tmp_path}/runs/tries.jsonl is there already" in recipe.said


def test_a_command_that_fails_ends_it(recipe):
    calls = recipe("recipes/tulu3_8b.sh", code=3, stub=("torchrun", STUB + "exit 3\n"))
    assert [call[0] for call in calls] == ["python", "torchrun"]


def test_errors(recipe, tmp_path):
    assert not recipe("recipes/tulu3_8b.sh", "sft", "rm", code=1)
    assert "error: there is no stage rm: clean sft dpo reward_model rlvr kl candidates pairs" in recipe.said
    assert not recipe("recipes/tulu3_8b.sh", BENCH="", code=1)
    assert "error: BENCH has to be a folder with a file NAME.jsonl for each benchmark, or none" in recipe.said
    (tmp_path / "empty").mkdir()
    assert not recipe("recipes/tulu3_8b.sh", BENCH=str(tmp_path / "empty"), code=1)
    assert f"error: BENCH={tmp_path}/empty holds no .jsonl file" in recipe.said
    assert not recipe("recipes/tulu3_8b.sh", "candidates", code=1)
    assert "OTHERS: are three other models" in recipe.said


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
HOSTS = ("scontrol", "#!/bin/sh\nprintf 'n1\\nn2\\n'\n")


def test_slurm(recipe):
    first, *rest = recipe("recipes/slurm.sh", "recipes/tulu3_8b.sh", "sft", stub=HOSTS, **JOB)
    assert first[:14] == [
        *("srun", "torchrun", "--nnodes", "2", "--nproc_per_node", "4", "--rdzv_backend", "c10d"),
        *("--rdzv_endpoint", "n1:29500", "--rdzv_id", "7", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"),
    ]
    assert parsed(first)[0] == "sft" and parsed(rest[0])[0] == "evaluate" and rest[0][0] == "srun" and len(rest) == 1
    assert not recipe("recipes/slurm.sh", code=1, **JOB) and "usage: sbatch" in recipe.said
    assert not recipe("recipes/slurm.sh", "recipes/tulu3_8b.sh", code=1) and "usage: sbatch" in recipe.said


def test_shell():
    names = sorted(path.name for path in RECIPES.glob("*.sh"))
    for name in names:
        subprocess.run(["bash", "-n", name], cwd=RECIPES, check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", "-x", *names], cwd=RECIPES, check=True)


def test_slurm_goes_on_in_another_job(recipe):
    recipe("recipes/tulu3_8b.sh", "sft", stub=HOSTS)
    fails = ("srun", STUB + "exit 1\n")
    calls = recipe("recipes/slurm.sh", "recipes/tulu3_8b.sh", "sft", "dpo", code=1, stub=fails, **JOB)
    assert [call[0] for call in calls] == ["srun"]
    calls = recipe("recipes/slurm.sh", "recipes/tulu3_8b.sh", "sft", "dpo", code=1, RESTART_AFTER="0", **JOB)
    assert [call[0] for call in calls] == ["srun", "sbatch"]
    assert calls[1] == ["sbatch", "--nodes", "2", "recipes/slurm.sh", "recipes/tulu3_8b.sh", "sft", "dpo"]
    stub = ("srun", STUB)
    assert "sbatch" not in [
        call[0]
        for call in recipe("recipes/slurm.sh", "recipes/tulu3_8b.sh", "sft", stub=stub, RESTART_AFTER="0", **JOB)
    ]


# ------------------------------------------------------------------------------------------------- templates

TEMPLATES = RECIPES / "chat_templates"
THEIRS = {
    "olmo3_instruct": "olmo",
    "olmo3_think": "olmo_thinker",
    "olmo3_think_sft": "olmo_thinker_no_think_sft_tokenization",
    "olmo3_rlzero": "olmo_thinker_rlzero",
}
IDENTITY = (  # of the template as registered; the tokenizer that was used has none (open-instruct, docs/olmo3.md)
    "You are OLMo, a helpful function-calling AI assistant built by Ai2. Your date cutoff is November 2024, and your model "
    "weights are available at https://huggingface.co/allenai."
)
THINKS = "<think>\nTwo and three.\n</think>\n\nIt is five."


def tokenizer_with(template, eos="</s>"):
    tokenizer = common.load_tokenizer(tokenizer_folder("byte_level"), template)
    tokenizer.eos_token = eos
    return tokenizer


def ours(name, eos="</s>"):
    return tokenizer_with(str(TEMPLATES / f"{name}.jinja"), eos)


def conversation(rng):
    """Any roles in any order, with tools as the Dolci rows have them."""
    messages = []
    for _ in range(rng.randrange(1, 7)):
        role = rng.choice(["system", "user", "user", "assistant", "assistant", "environment"])
        message = {
            "role": role,
            "content": rng.choice(["", "Hello", " two\nlines \n", "{{ x }} {% y %}", THINKS, "</s> <|im_end|>"]),
        }
        if role in ("system", "user") and rng.random() < 0.4:
            message["functions"] = rng.choice(["", '[{"name": "f"}]'])
        if role == "assistant" and rng.random() < 0.4:
            message["function_calls"] = 'f(x="1")\ng()'
            message |= {"content": None} if rng.random() < 0.5 else {}
        messages.append(message)
    return messages


@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])
@pytest.mark.parametrize("name", THEIRS)
def test_renderings_are_the_same(name, eos):
    path = shared("data", "chat_templates", "templates", "openinstruct", f"{THEIRS[name]}.jinja")
    mine, theirs = ours(name, eos), tokenizer_with(str(path), eos)
    for seed in range(300):
        messages = conversation(random.Random(seed))
        if name == "olmo3_rlzero":
            messages = [message | {"content": message["content"] or ""} for message in messages]
        for prompt in (False, True):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            expected = expected.replace(IDENTITY, "You are a helpful function-calling AI assistant.")
            found = mine.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert found == expected, (seed, prompt)


def test_olmo2_is_tulu_behind_a_bos():
    messages = [{"role": "system", "content": "S"}, user("a"), assistant("b"), user("c"), assistant("d")]
    tulu = tokenizer_with("tulu").apply_chat_template(messages, tokenize=False)
    assert ours("olmo2").apply_chat_template(messages, tokenize=False) == "<s>" + tulu.removeprefix("<s>")
    chat = common.ChatFormat(ours("olmo2"))
    ids, trained = chat.encode([user("a"), assistant("b")])
    assert ids[0] == chat.tokenizer.bos_token_id and ids.count(ids[0]) == 1
    assert chat.tokenizer.decode([i for i, t in zip(ids, trained, strict=True) if t]) == "b</s>"


def trained_text(chat, messages):
    ids, trained = chat.encode(messages)
    edges = np.flatnonzero(np.diff([0, *trained.astype(int), 0]))
    return [chat.tokenizer.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("name", ["olmo3_instruct", "olmo3_think_sft"])
def test_sft_trains_on_the_thought_from_its_first_token(name):
    chat = common.ChatFormat(ours(name), content_tokens=("<think>", "</think>"))
    assert trained_text(chat, [user("a"), assistant(THINKS)]) == [f"{THINKS}</s>"]
    two = [user("a"), assistant(THINKS), user("b"), assistant("Six.")]
    assert trained_text(chat, two) == [f"{THINKS}<|im_end|>", "Six.</s>"]
    assert chat.tokenizer.decode(chat.prompt([user("a")])).endswith("a<|im_end|>\n<|im_start|>assistant\n")
    calls = [
        user("a"),
        assistant(None, function_calls="f()"),
        {"role": "environment", "content": "5"},
        assistant("Five."),
    ]
    assert trained_text(chat, calls) == ["<function_calls>f()</function_calls><|im_end|>", "Five.</s>"]


def test_the_prompt_of_rl_opens_the_thought():
    chat = common.ChatFormat(ours("olmo3_think"), content_tokens=("<think>", "</think>"))
    assert chat.tokenizer.decode(chat.prompt([user("a")])).endswith("a<|im_end|>\n<|im_start|>assistant\n<think>")
    assert trained_text(chat, [user("a"), assistant(THINKS)]) == [f"{THINKS.removeprefix('<think>')}</s>"]
    encode = common.PairEncoder(chat, len(chat.tokenizer), 512, "drop")
    pair = encode({"prompt": "a", "chosen": THINKS, "rejected": THINKS.replace("five", "six")})
    assert not pair["notes"]


def test_both_ends_stop_the_sampler():
    for name in ("olmo3_instruct", "olmo3_think", "olmo3_think_sft"):
        chat = common.ChatFormat(ours(name))
        assert {"</s>", "<|im_end|>"} == set(chat.tokenizer.convert_ids_to_tokens(chat.stop_ids))


def test_prompts_of_rl_zero():
    chat = common.ChatFormat(ours("olmo3_rlzero"))
    assert chat.tokenizer.decode(chat.prompt([user("What is 2 + 3?")])) == (
        "Solve the following problem step by step. The last line of your response should be the answer to the problem in "
        "form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is 2 + 3?\n\nRemember to "
        'put your answer on its own line after "Answer:"'
    )
    chat = common.ChatFormat(ours("olmo3_rlzero_code"))
    assert chat.tokenizer.decode(chat.prompt([user("Add two numbers.")])) == (
        "Solve the following code problem step by step. The last part of your response should be the solution to the problem "
        "in form ```\npython\nCODE\n``` where CODE is the solution for the problem.\n\nAdd two numbers.\nRemember to put your "
        "solution inside the ```\npython\nCODE\n``` tags"
    )
    assert chat.tokenizer.convert_ids_to_tokens(chat.stop_ids) == ["</s>"]


# ------------------------------------------------------------------------------------------------- tried small

COIN = """import hashlib

from rewards import verifier


@verifier("coin")
def coin(completion, ground_truth):
    return hashlib.md5(completion.encode()).digest()[0] < 100
"""


def small(folder, model, names):
    """What a recipe needs for a run of minutes: the environment, with data by the names of the published ones."""
    (folder / "bench").mkdir()
    tasks = [
        {"messages": [user(f"What is {i} + 1?")], "dataset": "gsm8k", "ground_truth": f"{i + 1}"} for i in range(24)
    ]
    pairs = [
        {"prompt": f"What is {i} + 1?", "chosen": f"It is {i + 1}.", "rejected": "I do not know."} for i in range(24)
    ]
    chats = [{"messages": [user(pair["prompt"]), assistant(pair["chosen"])]} for pair in pairs]
    leaked = "Natalia sold clips to many of her friends in April, and then she sold half as many clips in May."
    write_jsonl(folder / "bench/gsm8k.jsonl", [tasks[0] | {"messages": [user(leaked)]}, *tasks[1:3]])
    chats[5]["messages"][0]["content"] = leaked
    files = [
        write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in zip(names, (chats, pairs, tasks), strict=True)
    ]
    (folder / "coin.py").write_text(COIN)
    judge = f"--rewards {folder}/coin.py --verifier coin --verifier_workers 1"
    train = "--steps 2 --max_length 128 --batch_size 4 --save_every 1 --max_skip_frac 1"
    sample = f"--max_length 256 --max_new_tokens 8 --slots 8 --max_skip_frac 1 {judge}"
    names = {
        "LAUNCH": sys.executable, "PYTHON": sys.executable, "BASE": str(model), "BENCH": str(folder / "bench"),
        "RUNS": str(folder / "runs"), "EXTRA_decontaminate": f"--train {' '.join(files)}",
        "EXTRA_sft": f"{train} --batch_tokens 200" if "Dolci" in files[0] else train,
        "EXTRA_dpo": train, "EXTRA_reward_model": f"{train} --eval_data {files[1]}:4",
        "EXTRA_generate": f"--n 8 {sample}", "EXTRA_evaluate": f"{sample} --n 1 --k 1 --seeds 1",
        "EXTRA_ppo_rlvr": f"{sample} --stop_step 2 --batch_size 4", "RLVR_STEP": "2",
        "EXTRA_grpo": f"{sample} --steps 2 --batch_size 4 --group_size 4 --active_sampling 0",
    }  # fmt: skip
    return {**os.environ, **names}


def try_recipe(name, env, *stages):
    done = subprocess.run(["bash", f"recipes/{name}.sh", *stages], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_tulu3_small(tiny_model, tmp_path):
    """From data to a measured model, twice: what is finished is not done again."""
    env = small(
        tmp_path,
        tiny_model,
        ["tulu-3-sft-mixture", "llama-3.1-tulu-3-8b-preference-mixture", "RLVR-GSM-MATH-IF-Mixed-Constraints"],
    )
    try_recipe("tulu3_8b", env)
    runs = tmp_path / "runs"
    assert len((runs / "clean/clean/tulu-3-sft-mixture.jsonl").read_text().splitlines()) == 23
    for name in ("sft", "dpo", "rlvr"):
        assert json.loads((runs / f"evaluation/{name}/results.json").read_text())["results"]
    assert (runs / "rlvr/checkpoints/step_2/model/config.json").is_file() and not (runs / "rlvr/model").exists()
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("model/*.safetensors")}
    assert "evaluation/rlvr is there already" in try_recipe("tulu3_8b", env)
    assert before == {path: path.stat().st_mtime_ns for path in runs.rglob("model/*.safetensors")}

    env |= {
        "KL_PROMPTS": f"{tmp_path}/RLVR-GSM-MATH-IF-Mixed-Constraints.jsonl:4",
        "EXTRA_kl": "--max_length 256 --max_new_tokens 8 --slots 8",
    }
    try_recipe("tulu3_8b", env, "kl")
    assert len((runs / "kl/kl.tsv").read_text().splitlines()) > 2


@pytest.mark.slow
def test_olmo3_think_small(tiny_model, tmp_path):
    env = small(tmp_path, tiny_model, ["Dolci-Think-SFT-7B", "Dolci-Think-DPO-7B", "Dolci-Think-RL-7B"])
    try_recipe("olmo3_7b_think", env)
    runs = tmp_path / "runs"
    rates = [json.loads(line)["pass_rate"] for line in (runs / "prompts.jsonl").read_text().splitlines()]
    assert 0 < len(rates) <= 24 and max(rates) <= 0.625
    steps = [json.loads(line)["step"] for line in (runs / "rl/metrics.jsonl").read_text().splitlines()]
    assert steps[-2:] == [1, 2] and (runs / "rl/model/config.json").is_file()
    assert (runs / "rl/model/chat_template.jinja").read_text() == (TEMPLATES / "olmo3_think.jinja").read_text()
    assert json.loads((runs / "evaluation/rl/results.json").read_text())["results"]
