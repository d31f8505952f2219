"""Flags: each number has a range, and a run that starts does what its flags say."""

import importlib
import math
import random
import re
import shutil
import typing
from collections import Counter

import pytest
from launch import call, metrics, quick
from test_kills import SCRIPTS, small_runs
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import common

# Flags where any finite number is meant, and those where 0 is: all others have to refuse what is below, and 0.
ANY_NUMBER = {"no_eos_score"}
ZERO_TOO = {
    "lr", "warmup_ratio", "adam_betas", "weight_decay", "max_grad_norm", "max_skip_frac", "seed", "eval_every", "save_every",
    "keep", "answers", "label_smoothing", "nll_coef", "centering", "active_sampling", "tis_cap", "kl_beta", "inflight",
    "eval_temperature", "log_samples", "value_clip", "value_coef", "value_lr", "value_warmup_steps", "gamma", "gae_lambda",
    "reward_model_coef",
}  # fmt: skip


def numbers(script):
    """{flag: whether it takes a list} of the numeric flags of a script."""
    fields = typing.get_type_hints(importlib.import_module(script[:-3]).Args)
    kinds = {name: {kind, *typing.get_args(kind)} for name, kind in fields.items()}
    return {name: tuple[float, float] in kind or float in kind and len(typing.get_args(fields[name])) == 2 and type(None) not in kind
            for name, kind in kinds.items() if {int, float} & kind}  # fmt: skip


def refusal(script, folder, **flags):
    """What a run with these flags and a model that does not exist says: flags are looked at first."""
    with pytest.raises(common.RunError) as error:
        call(importlib.import_module(script[:-3]), model=folder / "none", out=folder / "run", **flags)
    return str(error.value)


BAD = [math.nan, math.inf, -math.inf, 1e40, -1e40, -1, -1e-9]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_a_range(script, tmp_path):
    """A new flag without a check fails here. One line that names the flag and its value, before anything is read."""
    wrong, flags = [], numbers(script)
    assert len(flags) >= 16
    for flag, is_pair in flags.items():
        bad = [value for value in BAD if flag not in ANY_NUMBER or not abs(value) < 1e38]
        bad += [0] if flag not in ZERO_TOO | ANY_NUMBER else []
        for value in bad:
            for given in [(0.9, value), (value, 0.9)] if is_pair else [value]:
                said = refusal(script, tmp_path, **{flag: given})
                if not re.match(rf"--{flag} .*{re.escape(str(value))}", said) or "\n" in said:
                    wrong.append(f"--{flag} {given}: {said}")
        if flag in ZERO_TOO | ANY_NUMBER:
            said = refusal(script, tmp_path, **{flag: (0.0, 0.0) if is_pair else 0})
            if f"--{flag}" in said:
                wrong.append(f"--{flag} 0: {said}")
    assert not wrong, f"{len(wrong)}\n" + "\n".join(wrong)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """Small runs of 3 steps."""
    folder = tmp_path_factory.mktemp("flags")
    runs = small_runs(folder, tiny_model)
    for flags in runs.values():
        flags |= {"steps": 3, "save_every": 0, "eval_every": 0}
    return runs


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"lr": "nan"}, "--lr nan"),
        ({"lr": -1}, "--lr -1"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"adam_betas": (1, 0.9)}, "--adam_betas 1"),
        ({"learning_rate": 1e-3}, "--learning_rate is called --lr here"),
        ({"out": ""}, "--out"),
        ({"data": ""}, "an empty data source"),
        ({"eval_data": ""}, "an empty data source"),
        ({"model": ""}, "model"),
        ({"chat_template": ""}, "--chat_template"),
        ({"max_length": 10**6}, "--max_length 1000000"),
    ],
)
def test_one_line_on_the_command_line(runs, tmp_path, flags, words):
    code, stdout, stderr = quick("sft.py", **runs["sft.py"] | {"out": tmp_path / "run"} | flags)
    assert code == 1 and stderr.startswith("error: ") and stderr.count("\n") == 1 and words in stderr, (code, stderr)


@pytest.mark.parametrize("flags", [{"lr": "x"}, {"steps": 1.5}, {"steps": "nan"}, {"lr_schedule": "x"}, {"new": 1}, {"keep": ""}])
def test_tyro_names_the_flag_of_a_value_of_another_type(runs, tmp_path, flags):
    code, stdout, stderr = quick("sft.py", **runs["sft.py"] | {"out": tmp_path / "run"} | flags)
    assert code == 2 and f"--{next(iter(flags))}" in stderr and "Traceback" not in stderr, stderr
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------- combinations that are drawn

# Of each flag, ordinary values, and those at or beyond a limit.
POOLS = {
    "lr": ([1e-3, 1e-2], [0, 1e-30, 1e4, 1e37, "nan", "inf", -1]),
    "lr_schedule": (["linear", "cosine", "constant"], ["step"]),
    "warmup_ratio": ([0, 0.1, 0.5], [1, 1.5, -0.1]),
    "adam_betas": ([(0.9, 0.999), (0.9, 0.95)], [(0, 0), (0.5, 0.99999), (1, 1), (0.9, -1), (0.9,)]),
    "adam_eps": ([1e-8, 1e-5], [1e-30, 1, 0, 10]),
    "weight_decay": ([0, 0.1], [1e6, 1e38, -1, "nan"]),
    "max_grad_norm": ([0, 1], [1e-12, 1e30, -1]),
    "batch_size": ([1, 2, 4, 8], [22, 23, 24, 1000, 0, -4]),
    "epochs": ([0.5, 1, 1.7, 3], [0.01, 1e-6, 1e5, 1e7, 0, -1, "nan"]),
    "steps": ([1, 2, 4, 5], [0, -1, 2.5, 10**40]),
    "stop_step": ([1, 2, 3, 100], [0, -1]),
    "max_length": ([64, 128, 512], [1, 2, 16, 40, 513, 0]),
    "overlong": (["truncate", "drop"], ["keep"]),
    "eval_every": ([0, 1, 2, 3, 4], [1000, -1]),
    "save_every": ([0, 1, 2, 3], [1000, -1]),
    "keep": ([0, 1, 2, 5], [-1, 10**9]),
    "seed": ([0, 1, 7], [2**31, 2**32, 2**63, 10**18, 10**19, -1]),
    "tokens_per_microbatch": ([32, 128, 8192], [1, 10**9, 0]),
    "max_skip_frac": ([0.01, 0.5], [0, 1, 2, -0.5]),
    "activation_checkpointing": ([True, False], [True, False]),
    "attn": (["packed", "packed_loop"], ["eager", "packed_fa"]),
    "shard": (["full", "hybrid"], ["none"]),
    "chat_template": (["tulu", "chatml"], ["tests", "no_such_template"]),
    "content_tokens": (["<think>", ("<think>", "</think>")], ["no_such_token", ""]),
}
OF_RL = {
    "group_size": ([2, 4], [1, 0]),
    "temperature": ([0.7, 1], [0.01, 1e-30, 100, 1e30, 0, "nan"]),
    "clip_low": ([0.2, 0.1], [1, 1e-9, 2, 0]),
    "clip_high": ([0.2, 0.272], [1e-9, 100, 0]),
    "tis_cap": ([0, 2], [1e-6, 1e30, -1]),
    "kl_beta": ([0, 0.1], [1e6, -1]),
    "minibatches": ([1, 2, 4], [3, 5, 0]),
    "passes": ([1, 2], [5, 0]),
    "max_new_tokens": ([8, 12], [1, 40, 63, 64, 10**6, 0]),
    "stop_strings": ([("a", "e"), "5"], ["", "no such string"]),
    "solved": ([0.5, 1], [0.1, 1e-9, 2, 0]),
    "slots": ([3, 16], [1, 1000, 0]),
    "inflight": ([0, 1, 4], [50, 1000, -1]),
    "max_staleness": ([1, 4], [1000, 0]),
    "max_logprob_gap": ([1e-3, 1], [1e-12, 0]),
    "verifier_workers": ([1, 2], [0]),
    "no_eos_score": ([-10, 0], [1e3, 1e30, "nan"]),
    "eval_samples": ([1, 3], [0]),
    "eval_temperature": ([0, 0.5, 1], [1e-30, -1]),
    "log_samples": ([0, 1, 4], [1000, -1]),
    "pass_threshold": ([0.5, 1], [1e-9, 0, 2]),
    "audit": ([True, False], [True, False]),
    "verifier": (["exact:0.5", ("exact", "contains:2")], ["none", "exact:none"]),
    "sandbox": (["full", "weak"], ["none"]),
}
OWN = {
    "sft.py": {"batch_tokens": ([100, 200, 400], [10**6, 10, 0, -5]), "train_turns": (["all", "last"], ["first"])},
    "reward_model.py": {"centering": ([0, 0.01], [1e6, 1e38, -1])},
    "dpo.py": {
        "beta": ([0.1, 5], [1e-9, 1e6, 0, -1]),
        "length_normalize": ([True, False], [True, False]),
        "label_smoothing": ([0, 0.1], [0.49, 0.5, -1]),
        "nll_coef": ([0, 0.2], [1e6, 1e38, -1]),
    },
    "grpo.py": OF_RL | {"normalize_std": ([True, False], [True, False]), "active_sampling": ([0, 1, 8], [100, -1])},
    "ppo_rlvr.py": OF_RL | {
        "zero_value_head": ([True, False], [True, False]),
        "value_clip": ([0, 0.2], [1e-9, -1]),
        "value_coef": ([0.1, 1], [0, 1e6, 1e38, -1]),
        "value_lr": ([1e-3, 1e-2], [0, 1e37, -1]),
        "value_warmup_steps": ([0, 1], [100, -1]),
        "gamma": ([0.9, 1], [0, 1.1]),
        "gae_lambda": ([0.95, 1], [0, 1.1]),
        "reward_scale": ([1, 10], [1e-9, 1e30, 0]),
        "reward_model_coef": ([0, 0.1], [1e6, 1e38, -1]),
    },
}


def draw(script, seed):
    """3 to 7 flags with values, six of seven of them ordinary."""
    rng = random.Random(f"{script} {seed}")
    pools = POOLS | OWN[script]
    names = rng.sample(sorted(POOLS), rng.randint(1, 3)) + rng.sample(sorted(OWN[script]), min(rng.randint(1, 3), len(OWN[script])))
    names += rng.sample(["eval_every", "save_every", "keep", "stop_step", "steps"], rng.randint(1, 2))
    return {name: rng.choice(pools[name][rng.random() > 0.85]) for name in names}


def expected_steps(flags, kept, config_steps):
    """Number of steps that epochs, steps, batch and rows say. --batch_tokens: that of config.json."""
    if flags.get("batch_tokens"):
        return config_steps
    return min(math.ceil(math.ceil(flags["epochs"] * kept) / flags["batch_size"]), flags["steps"])


def what_is_wrong(script, out, given, flags, code, stdout, stderr):
    """None if a run did what its flags say, or refused in one line; else what it did."""
    if "Traceback" in stdout + stderr:
        return "traceback"
    if code:
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        if code == 1 and (len(errors) != 1 or stderr.splitlines()[-1:] != errors):
            return "not one line of error"
        if code == 2 and not any(f"--{name}" in stderr for name in given):
            return "no flag is named"
        if code not in (1, 2):
            return f"exit code {code}"
        return f"exit code {code}, but there is a model" if (out / "model").exists() else None
    kept = int(re.search(r"rows read, (\d+) kept", stdout)[1])
    config = common.read_run_config(out)
    steps = expected_steps(flags, kept, config["steps"])
    end = min(steps, flags.get("stop_step") or steps)
    lines = metrics(out)
    logged = [line["step"] for line in lines]
    evaluated = [line["step"] for line in lines if any(name.startswith("eval_") for name in line)]
    ends_early = flags.get("solved") and logged[-1] < end  # nothing is left to learn from
    reached = logged[-1] if ends_early else end
    every = flags["eval_every"]
    wanted = [step for step in range(reached + 1) if every and (step % every == 0 or step == steps)]
    if [step for step in logged if step] != list(range(1, reached + 1)) or (0 in logged) != (0 in wanted):
        return f"logged {logged}, expected the steps to {reached}"
    if evaluated != wanted:
        return f"evaluated after {evaluated}, not {wanted}"
    if not all(math.isfinite(value) for line in lines for value in line.values()):
        return "metrics are not finite"
    save = flags["save_every"]
    saved = [s for s in range(1, reached + 1) if s < steps and ((save and s % save == 0) or (s == end and s < steps))]
    left = sorted(int(path.name.removeprefix("step_")) for path in out.glob("checkpoints/*"))
    if left != saved[-flags["keep"] :]:
        return f"left checkpoints {left}, not {saved[-flags['keep']:]}"
    if (out / "model").exists() != (end == steps):
        return f"model: {(out / 'model').exists()}, after {end} of {steps} steps"
    for folder in [out / "model"] if end == steps else [out / f"checkpoints/step_{end}/model"]:
        kind = AutoModelForSequenceClassification if script == "reward_model.py" else AutoModelForCausalLM
        model, info = kind.from_pretrained(folder, output_loading_info=True)
        if any(info.values()) or not all(weight.isfinite().all() for weight in model.state_dict().values()):
            return f"{folder.name} does not open whole, or its weights are not finite"
    return None


def check(runs, draws, folder):
    outcomes, wrong = Counter(), []
    for script, seed in draws:
        given = draw(script, seed)
        out = folder / "run"
        flags = runs[script] | {"steps": 3} | given
        try:
            code, stdout, stderr = quick(script, out=out, timeout=150, **flags)
            problem = what_is_wrong(script, out, given, flags, code, stdout, stderr)
        except AssertionError as error:
            code, stdout, stderr, problem = None, "", "", str(error)
        outcomes["WRONG" if problem else f"exit {code}"] += 1
        if problem:
            words = " ".join(f"--{name} {value}" for name, value in given.items())
            wrong.append(f"{script} {words} (seed {seed}): {problem}\n{stdout[-300:]}\n{stderr[-600:]}")
        shutil.rmtree(out, ignore_errors=True)
    print(f"{len(draws)} draws of flags:", dict(outcomes), flush=True)
    assert not wrong, f"{len(wrong)} of {len(draws)}\n" + "\n\n".join(wrong)


def test_drawn_flags(runs, tmp_path):
    """Exit 1 or 2 with one line, or a run that does what it says."""
    check(runs, [(script, seed) for seed in range(2) for script in SCRIPTS], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_hundred_drawn_combinations(runs, tmp_path, script):
    check(runs, [(script, seed) for seed in range(100, 140)], tmp_path)
