"""GRPO: its loss against the equations, and runs: what changes nothing, what is learned, what is refused."""

import dataclasses
import json
import math
import shutil
import sys
import time
from datetime import timedelta
from itertools import pairwise
from types import SimpleNamespace

import datasets
import lawless  # noqa: F401 (registers verifiers)
import numpy as np
import pytest
import rl
import torch
import torch.distributed as dist
from conftest import EOS, ROOT, TOKENIZERS, user, write_jsonl
from datasets.arrow_dataset import Column
from forked import forked
from launch import call, metrics, run
from together import together, train
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import common
import grpo
import rewards
import sft
from common import RunError
from kernels.sampler import Completion, Sampler
from rewards.environment import (
    Rollouts,
    StopStrings,
    _plain,
    flatten,
    held_out_metrics,
    highest_reward,
    rollout_metrics,
)

sys.path.insert(0, str(ROOT / "benchmarks"))
import active_sampling as simulation  # noqa: E402

ARGS = grpo.Args(model="", data=[], out="", max_new_tokens=16)


# ------------------------------------------------------------------------------------------------------------ the loss


def batch(seed, sizes=((3, 2), (5, 4), (2, 6), (4, 1)), ref=False, old=True):
    """A packed microbatch with random numbers, in float64. sizes: (prompt, completion) tokens of each sequence."""
    rng = np.random.default_rng(seed)
    names = ["behaviour_logprobs", "advantages", "loss_weight"] + ["old_logprobs"] * old + ["ref_logprobs"] * ref
    sequences = []
    for prompt, completion in sizes:
        trained = np.arange(prompt + completion) >= prompt
        arrays = [np.where(trained, -rng.exponential(1.0, len(trained)), 0) for _ in names]
        arrays[1] = np.full(len(trained), rng.normal())  # one advantage for all tokens of a completion
        sequences.append((rng.integers(0, 9, len(trained)), trained, *arrays))
    microbatch = common.pack(sequences, "cpu", *names)
    microbatch.extras = {name: values.double() for name, values in microbatch.extras.items()}
    near = microbatch.extras["behaviour_logprobs"] + torch.from_numpy(rng.normal(0, 0.3, len(microbatch.targets)))
    trained = microbatch.targets != common.IGNORE
    microbatch.extras |= dict.fromkeys(names[3:], (near * trained + 0.1) * trained)
    logprobs = ((near + torch.from_numpy(rng.normal(0, 0.3, len(near)))) * trained).requires_grad_()
    return microbatch, logprobs


def oracle(args, microbatch, logprobs, of_sequence=False):
    """Equations (2) to (5), or with (2) as GSPO's, in plain Python, token by token: (sum of weighted losses, its gradient)."""
    x = {name: values.tolist() for name, values in microbatch.extras.items()}
    trained = (microbatch.targets != common.IGNORE).tolist()
    logp = [value.detach().clone().requires_grad_() for value in logprobs]
    total = 0.0
    for start, end in zip(microbatch.cu_seqlens.tolist(), microbatch.cu_seqlens.tolist()[1:], strict=False):
        tokens = [t for t in range(start, end) if trained[t]]
        old = {t: x["old_logprobs"][t] if "old_logprobs" in x else logp[t].item() for t in tokens}
        mean = sum(logp[t] - old[t] for t in tokens) / len(tokens)
        for t in tokens:
            rho = torch.exp(mean if of_sequence else logp[t] - old[t])
            a = x["advantages"][t]
            clipped = min(max(rho.item(), 1 - args.clip_low), 1 + args.clip_high)
            objective = rho * a if rho.item() * a <= clipped * a else torch.tensor(clipped * a, dtype=torch.float64)
            w = min(math.exp(old[t] - x["behaviour_logprobs"][t]), args.tis_cap) if args.tis_cap else 1.0
            loss = -w * objective
            if "ref_logprobs" in x:
                difference = x["ref_logprobs"][t] - logp[t]
                loss = loss + args.kl_beta * (torch.exp(difference) - difference - 1)
            total = total + loss * x["loss_weight"][t]
    total.backward()
    return total.item(), [0.0 if value.grad is None else value.grad.item() for value in logp]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    "flags",
    [{}, {"fork": "gspo"}, {"tis_cap": 0.0}, {"tis_cap": 0.9}, {"kl_beta": 0.1}, {"clip_low": 0.05, "clip_high": 0.01},
     {"fork": "gspo", "kl_beta": 0.1, "tis_cap": 0.9}],
    ids=str,
)  # fmt: skip
def test_loss_and_gradient_are_those_of_the_equations(flags, old, seed):
    flags = dict(flags)
    fork = flags.pop("fork", None)
    args = dataclasses.replace(ARGS, **flags)
    microbatch, logprobs = batch(seed, ref=bool(args.kl_beta), old=old)
    script = forked(fork) if fork else grpo
    losses, _ = script.policy_loss(args, logprobs, microbatch)
    loss = (losses * microbatch.extras["loss_weight"]).sum()
    loss.backward()
    expected, gradient = oracle(args, microbatch, logprobs, of_sequence=fork == "gspo")
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(logprobs.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-11, atol=1e-14)


def test_metrics_of_the_loss():
    microbatch, logprobs = batch(7)
    trained = microbatch.targets != common.IGNORE
    _, values = grpo.policy_loss(ARGS, logprobs, microbatch)
    ratio = (logprobs - microbatch.extras["old_logprobs"]).exp().detach()
    a = microbatch.extras["advantages"]
    bound = ((a > 0) & (ratio > 1.272)) | ((a < 0) & (ratio < 0.8))
    assert values["clipfrac"].sum() == (bound & trained).sum() > 0
    assert values["ratio"].sum() == pytest.approx(ratio[trained].sum().item())
    assert values["approx_kl"][trained].min() >= 0 and values["behaviour_kl"][trained].min() >= 0
    assert all(not value[~trained].any() for value in values.values())


def samples(rewards, lengths, position=0):
    return [
        grpo.Sample(
            position=position, row=0, begun=0, input_ids=np.zeros(n + 2, dtype=np.int64), trained=np.arange(n + 2) >= 2,
            behaviour_logprobs=np.zeros(n), ended=True, text="", reward=r, verdict=None,
        )
        for r, n in zip(rewards, lengths, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("normalize_std", [False, True])
def test_advantages(normalize_std):
    args = dataclasses.replace(ARGS, normalize_std=normalize_std)
    group = samples([1.0, 0.0, 0.0, 0.5], [1, 1, 1, 1])
    grpo.set_advantages(args, group)
    std = np.sqrt(sum((r - 0.375) ** 2 for r in (1, 0, 0, 0.5)) / 3) + 1e-4
    expected = [(r - 0.375) / (std if normalize_std else 1) for r in (1, 0, 0, 0.5)]
    assert [sample.advantages for sample in group] == pytest.approx(expected, abs=1e-12)
    equal = samples([0.7] * 3, [1, 2, 3])
    grpo.set_advantages(args, equal)
    assert [sample.advantages for sample in equal] == [0.0] * 3  # exactly


@pytest.mark.parametrize(("no_eos_score", "scores"), [(None, [1, 1, 1, 1]), (0.0, [1, 0, 1, 0]), (-1.0, [1, -1, 1, -1])])
def test_completions_without_an_end(no_eos_score, scores):
    """They are judged right like the others, so the group is one to leave out; kept, what they get instead counts."""
    args = dataclasses.replace(ARGS, no_eos_score=no_eos_score)
    group = samples([1.0] * 4, [1, 1, 1, 1])
    group[1].ended = group[3].ended = False
    grpo.set_advantages(args, group)
    assert [sample.advantages for sample in group] == pytest.approx([score - sum(scores) / 4 for score in scores])
    assert not grpo.rewards_differ(group)
    assert [sample.reward for sample in group] == [1.0] * 4  # what is logged


@pytest.mark.parametrize(
    ("numbers", "differ"),
    [([0.1 + 0.2, 0.3, 0.3, 0.3], False), ([1.0, 1.0 - 1e-9], False), ([0.0] * 3, False), ([1.0, 0.999], True), ([0.0, 1e-4], True)],
)
def test_rewards_that_differ_by_rounding_are_equal(numbers, differ):
    group = samples(numbers, [1] * len(numbers))
    assert grpo.rewards_differ(group) == differ
    for normalize_std in (False, True):
        grpo.set_advantages(dataclasses.replace(ARGS, normalize_std=normalize_std), group)
        assert any(sample.advantages != 0 for sample in group) == differ  # 0 exactly
    for sample in group:
        sample.verdict = rewards.Verdict(0.0, "wrong")
    assert rollout_metrics([], [group], 0)["zero_std_groups"] == (not differ)


@pytest.mark.parametrize(
    ("fork", "expected"),
    [(None, [1 / 10] * 4), ("sequence_mean", [1 / 4, 1 / 8, 1 / 12, 1 / 16]), ("dr_grpo", [1 / 64] * 4)],
)
def test_weights(fork, expected):
    script = forked(fork) if fork else grpo
    minibatch = samples([0, 1], [1, 2]) + samples([0, 1], [3, 4])
    script.set_loss_weights(ARGS, minibatch)
    weights = {int(sample.trained.sum()): sample.loss_weight for sample in minibatch}
    assert [weights[n] for n in (1, 2, 3, 4)] == pytest.approx(expected)


def test_overlong_penalty():
    """Of 16 tokens the last 4 cost: none at 12, a quarter each, 1 at 16. It makes no group one to keep: DAPO's (11)."""
    script = forked("overlong_penalty")
    args = script.Args(max_new_tokens=16, overlong_buffer=4)
    group = samples([1.0] * 5, [3, 12, 13, 14, 16])
    assert [script.completion_reward(args, sample) for sample in group] == [1.0, 1.0, 0.75, 0.5, 0.0]
    assert not script.rewards_differ(group)
    script.set_advantages(args, group)
    assert [sample.advantages for sample in group] == pytest.approx([0.35, 0.35, 0.1, -0.15, -0.65])


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    flags, _, _ = rl.small_run(tmp_path_factory.mktemp("grpo"))
    return flags | {"batch_size": 4, "group_size": 4}


LOSSES = ("loss", "grad_norm", "reward", "entropy", "completion_tokens")


def trajectory(out, *names):
    return [[line.get(name) for name in names or LOSSES] for line in metrics(out) if line["step"]]


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "run"
    call(grpo, out=out, eval_data=[start["data"][0].replace("train", "test")], eval_samples=2, eval_every=3, **start)
    return out


def test_a_run_writes_what_it_promises(reference):
    lines = metrics(reference)
    assert [line["step"] for line in lines] == list(range(7))
    wanted = {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds", "reward", "reward_std", "zero_std_groups",
              "completion_tokens", "eos_rate", "entropy", "ratio", "clipfrac", "approx_kl", "behaviour_kl", "unparsed_rate",
              "timeout_rate", "crash_rate", "staleness", "groups", "rollout_seconds", "tis_capped", "sampled_tokens"}  # fmt: skip
    assert all(wanted <= set(line) for line in lines[1:])
    assert [line["step"] for line in lines if "eval_reward" in line] == [0, 3, 6]
    assert {"eval_reward_low", "eval_reward_high", "eval_pass_at_1", "eval_pass_at_2"} <= set(lines[0])
    assert all(line["behaviour_kl"] < 1e-9 and line["ratio"] == 1 for line in lines[1:])  # one precision, one update
    shown = [json.loads(line) for line in open(reference / "samples.jsonl")]
    assert len(shown) == 6 * 4 + 3 * 4
    assert {"prompt", "completion", "reward", "reason", "answer", "row", "step", "ended", "advantage", "held_out"} == set(shown[0])
    AutoModelForCausalLM.from_pretrained(reference / "model")


@pytest.mark.parametrize(
    "flags",
    [
        {"tokens_per_microbatch": 1}, pytest.param({"tokens_per_microbatch": 100}, marks=pytest.mark.slow), {"slots": 3},
        {"activation_checkpointing": False},
    ],
    ids=str,
)  # fmt: skip
def test_how_it_is_computed_changes_nothing(start, reference, tmp_path, flags):
    call(grpo, out=tmp_path / "run", **start | flags)
    np.testing.assert_allclose(trajectory(tmp_path / "run"), trajectory(reference), rtol=2e-4, atol=1e-7)


def test_several_updates(start, reference, tmp_path):
    """π_old is kept while the policy moves; the first update of a batch is on-policy, so its mean ratio is near 1."""
    call(grpo, out=tmp_path / "run", **start | {"minibatches": 2, "passes": 2, "steps": 2})
    for line in metrics(tmp_path / "run"):
        assert line["ratio"] != 1 and abs(line["ratio"] - 1) < 0.1
        assert line["approx_kl"] > 0


@pytest.mark.parametrize(
    "flags",
    [
        {"kl_beta": 0.1, "normalize_std": True, "active_sampling": 0},
        {"forks": ("gspo", "sequence_mean"), "minibatches": 2},
        {"forks": ("dr_grpo", "overlong_penalty"), "overlong_buffer": 4, "tis_cap": 0.0},
        {"temperature": 0.7},
        {"inflight": 4, "max_staleness": 2},
    ],
    ids=str,
)
def test_flags_train(start, tmp_path, flags):
    flags = dict(flags)
    call(forked(*flags.pop("forks", ())), out=tmp_path / "run", **start | {"steps": 3} | flags)
    lines = metrics(tmp_path / "run")
    assert len(lines) == 3 and all(math.isfinite(line["loss"]) for line in lines)
    assert ("ref_kl" in lines[0]) == ("kl_beta" in flags)
    if "kl_beta" in flags:
        assert lines[0]["ref_kl"] < 1e-9 < lines[2]["ref_kl"]  # the reference is the start
        assert lines[0]["groups"] == 4 >= lines[0]["groups"] * lines[0]["zero_std_groups"]
    if "inflight" in flags:
        assert max(line["staleness"] for line in lines) > 0


def test_interrupted_runs_continue_bit_for_bit(start, reference, tmp_path):
    """Stopped by an exception behind a checkpoint; and by SIGTERM in the middle of a rollout. The same numbers come out."""
    out, flags = tmp_path / "run", start | {"save_every": 2}
    rl.stop_twice(grpo, out, flags, decode_calls=12)
    call(grpo, out=out, **flags)
    assert trajectory(out) == trajectory(reference)
    texts = [[json.loads(line)["completion"] for line in open(path / "samples.jsonl") if not json.loads(line)["held_out"]] for path in (out, reference)]
    assert texts[0] == texts[1]


def test_in_flight_runs_continue_bit_for_bit(start, tmp_path, monkeypatch):
    flags = start | {"save_every": 1, "inflight": 6, "keep": 0, "slots": 8}
    call(grpo, out=tmp_path / "whole", **flags)
    with monkeypatch.context() as patch:
        patch.setattr(grpo.Run, "finish", lambda *_: None)
        call(grpo, out=tmp_path / "run", **flags | {"steps": 6})
    for step in (4, 5):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step}")
    call(grpo, out=tmp_path / "run", **flags)
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "whole")


def test_staleness_is_the_age_of_the_weights_not_of_the_request(start, tmp_path):
    """Room for one prompt at a time, two batches in the queue: what waits there is sampled by the weights of its turn."""
    flags = start | {"inflight": 8, "slots": 4, "max_staleness": 1, "active_sampling": 0}
    call(grpo, out=tmp_path / "run", **flags)
    staleness = [line["staleness"] for line in metrics(tmp_path / "run")]
    assert staleness[0] == 0 and max(staleness) <= 0.25, staleness  # of four prompts the first may have been begun before


def test_no_table_is_copied_for_a_completion(start, tmp_path, monkeypatch):
    """A completion looks up one row. `select` and a column would copy all that a table knows of itself: 2 ms each."""
    copies, sample = [], Rollouts.sample

    def counted(function):
        return lambda *args, **kwargs: copies.append(function) or function(*args, **kwargs)

    def watched(self, *args):
        with pytest.MonkeyPatch.context() as patch:
            for kind, name in ((datasets.Dataset, "select"), (datasets.Dataset, "with_format"), (Column, "__init__")):
                patch.setattr(kind, name, counted(getattr(kind, name)))
            return sample(self, *args)

    monkeypatch.setattr(Rollouts, "sample", watched)
    found = []
    for size in (2, 8):
        call(grpo, out=tmp_path / str(size), **start | {"steps": 2, "active_sampling": 0, "group_size": size})
        found.append(len(copies))
        copies.clear()
    assert found[0] == found[1] < 10, found


def test_ids_trained_are_ids_sampled(start, tmp_path, monkeypatch):
    """What the sampler returned, and what the loss is computed on, are the same tokens with the same log-probabilities."""
    sampled, packed = [], []
    sample, pack = Sampler.sample, common.pack

    def watched(self, *args, **kwargs):
        done = sample(self, *args, **kwargs)
        sampled.extend((*c.prompt_ids.tolist(), *c.token_ids.tolist()) for c in done)
        return done

    def seen(sequences, device, *extras):
        packed.extend(tuple(ids.tolist()) for ids, *_ in sequences if extras)
        return pack(sequences, device, *extras)

    monkeypatch.setattr(Sampler, "sample", watched)
    monkeypatch.setattr(common, "pack", seen)
    call(grpo, out=tmp_path / "run", **start | {"steps": 2, "active_sampling": 0, "batch_size": 16, "group_size": 32})
    assert len(sampled) == 2 * 16 * 32
    assert sorted(packed) == sorted(sampled)


def test_rewards_teach(start, tmp_path):
    """Rewarded for small letters, the reward rises beyond the intervals."""
    flags = start | {"steps": 15, "batch_size": 8, "group_size": 8, "lr": 5e-3, "eval_data": start["data"], "eval_samples": 4, "eval_every": 100, "epochs": 99}
    call(grpo, out=tmp_path / "small", **flags)
    first, *_, last = metrics(tmp_path / "small")
    assert last["eval_reward_low"] > first["eval_reward_high"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_rewards_teach_nothing(start, tmp_path, seed):
    """Negative control: trained on a hash of the text, measured by small letters."""
    flags = start | {"steps": 25, "batch_size": 8, "group_size": 8, "lr": 3e-3, "eval_data": start["data"], "eval_samples": 8, "eval_every": 100, "epochs": 99}
    call(grpo, out=tmp_path / "coin", **flags | {"data": rl.rewarded_at_random(tmp_path), "seed": seed})
    first, *_, last = metrics(tmp_path / "coin")
    assert last["eval_reward_low"] < first["eval_reward_high"]


@pytest.mark.parametrize(
    ("flags", "rows", "message"),
    [
        ({}, [{"messages": [user("?")], "dataset": "gsm8k", "ground_truth": "five"}], r"row 2: ground_truth of 'gsm8k': no number in 'five'"),
        ({}, [{"messages": [user("?")], "dataset": "nonsense", "ground_truth": "5"}], r"row 2: no verifier is named 'nonsense'"),
        ({}, [{"messages": [user("?")], "dataset": "gsm8k"}], r"row 2: no field 'ground_truth'"),
        ({}, [{"messages": [{"role": "system", "content": "x"}], "dataset": "gsm8k", "ground_truth": "5"}], r"row 2: messages has no question"),
        ({"stop_strings": ["a", ""]}, [], "--stop_strings has an empty string"),
        ({"max_length": 129}, [], "--max_length 129 is beyond"),
        ({"batch_size": 2}, [], "--data has 1 usable rows, fewer than --batch_size 2"),
        ({"max_logprob_gap": 1e-12}, [], "sampled and recomputed log-probabilities differ"),
        ({}, [{"messages": [user("?")], "dataset": "raises", "ground_truth": "5"}] * 40, "completions could not be judged"),
    ],
)  # fmt: skip
def test_errors_name_their_cause(start, tmp_path, flags, rows, message):
    good = {"messages": [user("1?")], "dataset": "small", "ground_truth": "5"}
    data = write_jsonl(tmp_path / "rows.jsonl", [good, *rows])
    with pytest.raises(RunError, match=message):
        call(grpo, out=tmp_path / "run", **start | {"data": [data], "batch_size": 1 + len(rows) // 2} | flags)


OUT_OF_RANGE = {
    "group_size": (1, 0, -3), "temperature": (0.0, -1.0), "active_sampling": (-1,), "clip_low": (0.0, -0.1, 1.5),
    "clip_high": (0.0, -0.2), "tis_cap": (-1.0,), "kl_beta": (-0.1,), "minibatches": (0, -1, 5), "passes": (0, -1),
    "max_new_tokens": (0, -1, 64, 99), "solved": (0.0, -0.5, 1.5), "slots": (0, -1), "sample_tp": (0, -1), "inflight": (-1,), "max_staleness": (0, -1),
    "max_logprob_gap": (0.0, -1.0), "verifier_workers": (0, -1), "eval_samples": (0, -1), "eval_temperature": (-0.1,), "log_samples": (-1,),
    "pass_threshold": (0.0, -0.5, 1.5), "reward_model_coef": (-0.1,),
}  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in OUT_OF_RANGE.items() for value in values])
def test_flags_out_of_range_are_named(start, flag, value):
    args = grpo.Args(**{**start, "model": "", "out": "", flag: value})
    with pytest.raises(RunError, match=rf"^--{flag} {value} is out of range: (at least|above|at most) \d+$"):
        grpo.check_flags(args)


def test_flags_at_the_edge_of_their_range_are_right(start):
    edges = {"group_size": 2, "active_sampling": 0, "clip_low": 1.0, "tis_cap": 0.0, "kl_beta": 0.0, "minibatches": 4, "max_new_tokens": 63,
             "solved": 1.0, "slots": 1, "inflight": 0, "max_staleness": 1, "verifier_workers": 1, "eval_temperature": 0.0, "log_samples": 0}  # fmt: skip
    grpo.check_flags(grpo.Args(**{**start, "model": "", "out": "", **edges}))


def test_every_flag_of_reinforcement_learning_has_a_range():
    """But for those that every script has, which are checked for all, and those without a range."""
    shared = {field.name for field in dataclasses.fields(sft.Args)}
    own = {field.name for field in dataclasses.fields(grpo.Args)} - shared
    without = {"no_eos_score", "normalize_std", "stop_strings", "sandbox", "rewards", "verifier", "audit", "reward_model"}
    assert own - OUT_OF_RANGE.keys() == without


def impossible(folder):
    """Training data that no answer is right for."""
    rows = [{"messages": [user(f"{i}?")], "dataset": "exact", "ground_truth": "impossible"} for i in range(4)]
    return [write_jsonl(folder / "impossible.jsonl", rows)]


def test_no_differing_rewards_is_a_step_without_update(start, tmp_path, capfd):
    """A task that is too hard: nothing is learned, the weights stay, the metrics say why, and one line what to do."""
    call(grpo, out=tmp_path / "run", **start | {"data": impossible(tmp_path), "steps": 3, "active_sampling": 2})
    assert [(line["groups"], line["zero_std_groups"], line["loss"]) for line in metrics(tmp_path / "run")] == [(0, 1.0, 0.0)] * 3
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (start["model"], tmp_path / "run" / "model"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    said = [line for line in "".join(capfd.readouterr()).splitlines() if "nothing to learn from" in line]
    assert len(said) == 1, said
    assert "step 1: nothing to learn from: in each of 20 groups all rewards are the same (0 in the mean)" in said[0]
    assert f"Read {tmp_path / 'run'}/samples.jsonl" in said[0]


@pytest.mark.parametrize("stops", [pytest.param((), marks=pytest.mark.slow), (2, 5)])
def test_nothing_to_learn_from_ends_a_run(start, tmp_path, monkeypatch, capfd, stops):
    """In the fourth step in a row, also when the run is stopped and goes on in between; then it is said once, too."""
    monkeypatch.setattr("rewards.environment.MOST_EMPTY_STEPS", 4)
    flags = start | {"data": impossible(tmp_path), "steps": 9, "active_sampling": 1}
    with pytest.raises(RunError, match=r"step 4: nothing to learn from: .*; so were the 3 steps before$"):
        for stop in (*stops, None):
            call(grpo, out=tmp_path / "run", **flags | {"stop_step": stop})
    assert len(metrics(tmp_path / "run")) == 3
    assert "".join(capfd.readouterr()).count("nothing to learn from") == 1
    call(grpo, out=tmp_path / "kept", **flags | {"active_sampling": 0, "kl_beta": 0.1, "steps": 5})  # there is the KL
    assert "".join(capfd.readouterr()).count("nothing to learn from") == 1


# ---------------------------------------------------------------------------------------------------- active sampling


@pytest.mark.parametrize("without_signal", [0.0, 0.3, 0.5, 0.7, 0.9])
def test_active_sampling_asks_for_what_should_suffice(without_signal):
    """Batches are full, in far fewer rounds than one for one takes, at no more prompts; what is left over is bounded."""
    one_for_one, by_share = (
        simulation.summary(play(np.random.default_rng(1), without_signal)) for play in (simulation.one_for_one, simulation.by_share)
    )
    assert by_share["short"] == 0 and by_share["groups"] == 64
    assert by_share["rounds"] < {0.0: 1.01, 0.9: 3.3}.get(without_signal, 1.3)
    assert by_share["prompts"] < 1.02 * 64 / (1 - without_signal)  # none is thrown away: surplus begins the next batch
    assert by_share["surplus_most"] < 64
    if without_signal:
        assert one_for_one["rounds"] > 2.5 * by_share["rounds"]


def test_surplus_is_bounded_whatever_happens():
    """No signal for ten steps, then all of them: what is left over is less than what one round may ask for."""
    rollouts = simulation.Coins(np.random.default_rng(1), 1.0)
    for step in range(10):
        groups, sampled = rollouts.sample_batch(step, simulation.has_signal, 8)
        assert not groups and len(sampled) <= 8 * 4 * 64
    rollouts.without_signal = 0.0
    left = []
    for step in range(12):
        groups, sampled = rollouts.sample_batch(step, simulation.has_signal, 8)
        assert len(groups) == 64
        left.append(len(rollouts.surplus))
    assert left[0] == max(left) == 3 * 64 and left[-1] < 16


def test_surplus_is_the_next_batchs_first(start, tmp_path):
    """No step has more than a batch, no group is learned from twice or lost; and a stop anywhere changes nothing."""
    flags = start | {"log_samples": 10**6, "steps": 7, "max_new_tokens": 2}  # short answers: many groups without signal
    used, found = [], []
    set_advantages, sample = grpo.set_advantages, Rollouts.sample

    def watched(self, step, missing):
        groups = sample(self, step, missing)
        found.extend((group[0].position, [s.reward for s in group]) for group in groups)
        return groups

    def use(args, group):
        used.append(group[0].position)
        set_advantages(args, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollouts, "sample", watched)
        patch.setattr(grpo, "set_advantages", use)
        call(grpo, out=tmp_path / "whole", **flags)
    lines = metrics(tmp_path / "whole")
    left = [line["surplus_groups"] for line in lines]
    assert [line["groups"] for line in lines] == [4] * 7 and max(left) > 0, left
    assert max(line["staleness"] for line in lines) > 0 and lines[0]["staleness"] == 0
    assert [position for position, _ in found] == list(range(len(found)))
    kept = [position for position, numbers in found if max(numbers) - min(numbers) > 1e-6]
    assert used == kept[: len(used)] and len(kept) == len(used) + left[-1]
    stops = [step + 1 for step in range(6) if left[step]][:3]
    for stop in (*stops, None):
        call(grpo, out=tmp_path / "run", **flags | {"stop_step": stop})
    names = (*LOSSES, "surplus_groups", "sampling_rounds", "staleness", "groups")
    assert trajectory(tmp_path / "run", *names) == trajectory(tmp_path / "whole", *names)
    assert rows_in_order(tmp_path / "run") == rows_in_order(tmp_path / "whole")


def test_a_small_batch_makes_a_small_step(start, tmp_path, capfd):
    """Some prompts have a signal, and one round does not fill the batch: the learning rate is the batch's share."""
    rows = [{"messages": [user(f"{i}?")], "dataset": "small" if i % 4 == 0 else "hangs", "ground_truth": "5"} for i in range(16)]
    flags = start | {"data": [write_jsonl(tmp_path / "rows.jsonl", rows)], "active_sampling": 1, "batch_size": 8, "steps": 2}
    call(grpo, out=tmp_path / "run", **flags)
    first, second = metrics(tmp_path / "run")
    assert first["groups"] + second["groups"] == 4 and first["sampling_rounds"] == 1
    assert [line["lr"] for line in (first, second)] == [flags["lr"] * line["groups"] / 8 for line in (first, second)]
    said = "".join(capfd.readouterr())
    for step, line in enumerate((first, second), 1):
        share = f"its learning rate is {line['groups'] / 8:.3g} of what it would be"
        assert f"step {step}: {line['groups']} of 8 groups to learn from after 1 round of sampling; {share}" in said


# ------------------------------------------------------------------------------------------- processes of their own


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """(flags of a run that a process of its own can make, its folder)."""
    folder = tmp_path_factory.mktemp("alone")
    flags = rl.rewarded_by_a_built_in(folder, start)
    run("grpo.py", out=folder / "run", **flags)
    return flags, folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_the_number_of_processes_changes_nothing(alone, tmp_path, processes):
    """Ranks sample, judge and train other shares, and the batch is the same, up to rounding (which grows with the steps)."""
    flags, reference = alone
    run("grpo.py", processes, out=tmp_path / "run", **flags)
    np.testing.assert_allclose(trajectory(tmp_path / "run"), trajectory(reference), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_processes_change_neither_what_is_solved_nor_where_completions_stop(alone, tmp_path):
    flags, _ = alone
    flags = flags | {"solved": 0.25, "stop_strings": ["e", "a"], "steps": 3}
    for processes in (1, 2):
        run("grpo.py", processes, out=tmp_path / str(processes), **flags)
    names = (*LOSSES, "solved_prompts", "eos_rate")
    np.testing.assert_allclose(*(trajectory(tmp_path / name, *names) for name in "12"), rtol=1e-3, atol=1e-6)
    solved = [line["solved_prompts"] for line in metrics(tmp_path / "1")]
    assert 0 < solved[0] < solved[-1] < 32, solved


@pytest.mark.slow
def test_surplus_is_the_same_on_any_number_of_processes(alone, tmp_path):
    """What is asked for and what is left over; also when another number of processes goes on with it."""
    letter = {"instruction_id_list": ["keywords:letter_frequency"], "kwargs": [{"letter": "a", "let_frequency": 1, "let_relation": "at least"}]}
    rows = [{"messages": [user(f"{i}?")], "dataset": "ifeval", "ground_truth": letter} for i in range(32)]
    flags = alone[0] | {"data": [write_jsonl(tmp_path / "letter.jsonl", rows)], "max_new_tokens": 3, "steps": 6}
    names = ("loss", "groups", "surplus_groups", "sampling_rounds", "sampled_tokens")  # those of steps that sample nothing
    for processes in (1, 2):
        run("grpo.py", processes, out=tmp_path / str(processes), **flags)
    left = [line["surplus_groups"] for line in metrics(tmp_path / "1")]
    assert max(left[:-1]) > 0, left
    stop = 1 + next(step for step, count in enumerate(left) if count)
    run("grpo.py", 2, out=tmp_path / "mixed", **flags | {"stop_step": stop})
    run("grpo.py", 1, out=tmp_path / "mixed", **flags)
    for name in ("2", "mixed"):
        np.testing.assert_allclose(trajectory(tmp_path / name, *names), trajectory(tmp_path / "1", *names), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_runs_continue_bit_for_bit(alone, tmp_path, processes):
    """kill -9 five times, at any moment; with the samples in flight too."""
    flags, _ = alone
    flags = flags | {"inflight": 4}
    run("grpo.py", processes, out=tmp_path / "whole", **flags)
    rl.kill_five_times("grpo.py", processes, tmp_path / "run", flags)
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "whole")


def test_a_thought_that_the_prompt_opens_is_told_to_the_verifier(start):
    """The same completion, after a prompt that ends in <think> and after one that does not."""
    tokenizer, judged = common.load_tokenizer(start["model"]), []
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in ("5?<think>", "5?")]
    answer = np.array(tokenizer.encode("5 it is", add_special_tokens=False))
    completions = [SimpleNamespace(index=i, step=0, sample=0, prompt_ids=np.array(ids), token_ids=answer, logprobs=np.zeros(len(answer)), ended=False, begun=0) for i, ids in enumerate(prompts)]
    table = datasets.Dataset.from_dict({"job": ['["gsm8k", "5", null]'] * 2, "input_ids": prompts, "trained": [[False] * len(ids) for ids in prompts]})
    rows = common.Rows(table, ["rows"], None, None, [], "")
    args = dataclasses.replace(ARGS, verifier_workers=1)
    rollouts = Rollouts(args, SimpleNamespace(tokenizer=tokenizer), rows)
    rollouts.close()
    rollouts.pool = SimpleNamespace(
        submit=lambda job: judged.append(job) or len(judged) - 1, work=lambda: None,
        collect=lambda tickets: [rewards.judge(*judged[ticket][:3]) for ticket in tickets],
    )  # fmt: skip
    rollouts.sampler = SimpleNamespace(sample=lambda *_, **__: completions, state_dict=dict, load_state_dict=lambda _: None)
    found = flatten(rollouts.sample_all(rows))
    assert [job[1] for job in judged] == ["<think>5 it is", "5 it is"]
    assert [(sample.reward, sample.text) for sample in found] == [(0.0, "5 it is"), (1.0, "5 it is")]


# ------------------------------------------------------------------------------------------------------ solved prompts


def rows_in_order(out):
    """The row of every group that was sampled, in the order of the stream. All samples have to be logged."""
    lines = [json.loads(line) for line in open(out / "samples.jsonl")]
    return [int(line["row"].split("row ")[1]) - 1 for line in lines][::4]


def test_solved_prompts_are_not_drawn_again(start, tmp_path):
    """Half of the prompts are always answered rightly: each comes once, the others once in each epoch of the stream."""
    rows = [{"messages": [user(f"{i}?")], "dataset": "small" if i % 2 else "hangs", "ground_truth": "5"} for i in range(16)]
    data = [write_jsonl(tmp_path / "rows.jsonl", rows)]
    call(grpo, out=tmp_path / "run", **start | {"data": data, "solved": 0.875, "log_samples": 10**6, "steps": 9})
    found = rows_in_order(tmp_path / "run")
    expected, solved = [], set()
    for row in common.stream(16, 1, range(999)).tolist():
        if row not in solved and len(expected) < len(found):
            expected.append(row)
            solved |= {row} if row % 2 == 0 else set()
    assert found == expected and len(found) > 8 + 3 * 8
    assert metrics(tmp_path / "run")[-1]["solved_prompts"] == 8
    call(grpo, out=tmp_path / "off", **start | {"data": data, "log_samples": 10**6, "steps": 5})
    found = rows_in_order(tmp_path / "off")
    assert found == common.stream(16, 1, range(len(found))).tolist()
    assert metrics(tmp_path / "off")[-1]["solved_prompts"] == 0


def test_when_all_prompts_are_solved_the_run_is_finished(start, tmp_path, capfd):
    rows = [{"messages": [user(f"{i}?")], "dataset": "hangs", "ground_truth": "5"} for i in range(10)]
    flags = start | {"data": [write_jsonl(tmp_path / "rows.jsonl", rows)], "solved": 1.0, "active_sampling": 0}
    for _ in range(2):
        call(grpo, out=tmp_path / "run", **flags)
        lines = metrics(tmp_path / "run")
        assert [(line["groups"], line["solved_prompts"]) for line in lines] == [(4, 4), (4, 8), (4, 10)]
    assert capfd.readouterr().out.count("all 10 prompts are solved, by --solved 1.0: the run ends here") == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    call(grpo, out=tmp_path / "active", **flags | {"active_sampling": 8})  # all within the first step, none to learn from
    assert [(line["groups"], line["solved_prompts"]) for line in metrics(tmp_path / "active")] == [(0, 10)]


@pytest.mark.parametrize("flags", [pytest.param({}, marks=pytest.mark.slow), {"inflight": 6, "slots": 8}], ids=str)
def test_what_is_solved_survives_a_stop(start, tmp_path, flags):
    """Stopped at two steps, where some prompts are solved and others are not: the numbers are those of one run."""
    flags = start | {"solved": 0.5, "steps": 8, "log_samples": 10**6} | flags
    call(grpo, out=tmp_path / "whole", **flags)
    for stop in (3, 6, None):
        call(grpo, out=tmp_path / "run", **flags | {"stop_step": stop})
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "whole")
    assert rows_in_order(tmp_path / "run") == rows_in_order(tmp_path / "whole")
    solved = [line["solved_prompts"] for line in metrics(tmp_path / "whole")]
    assert solved == [line["solved_prompts"] for line in metrics(tmp_path / "run")]
    assert 0 < solved[2] < solved[5] < solved[-1] < 32, solved


@pytest.mark.parametrize(
    ("weights", "rewards", "solved"),
    [
        ([1.0], [1.0] * 7 + [0.0], True),
        ([1.0], [1.0] * 6 + [0.5, 0.0], False),
        ([2.0], [2.0] * 7 + [0.0], True),
        ([2.0], [1.0] * 8, False),
        ([2.0, 1.0], [3.0] * 7 + [0.0], True),
        ([2.0, 1.0], [2.0] * 8, False),
        ([2.0, -1.0], [1.0] * 8, False),
        ([2.0, "gate"], [2.0] * 7 + [0.0], True),
        ([2.0, "gate"], [2.0] * 6 + [0.0] * 2, False),
    ],
)
def test_solved_is_a_share_of_the_highest_reward(weights, rewards, solved):
    rollouts = Rollouts.__new__(Rollouts)
    rollouts.args = dataclasses.replace(ARGS, solved=0.875)
    group = samples(rewards, [1] * 8)
    for sample in group:
        sample.highest = highest_reward(weights)
    assert rollouts._is_solved(group) == solved
    rollouts.args = ARGS
    assert not rollouts._is_solved(group)


# -------------------------------------------------------------------------------------------------------- stop strings


def shortest_with(tokenizer, ids, strings):
    """The definition: how many tokens have a text with one of the strings."""
    for length in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:length], clean_up_tokenization_spaces=False)
        if any(string in text for string in strings):
            return length
    return None


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_stop_strings_are_found_in_the_text_of_all_tokens(kind):
    """Whatever was looked at before: in sentences, with characters of several tokens, and in random tokens."""
    tokenizer, rng, found = TOKENIZERS[kind](), np.random.default_rng(0), 0
    texts = ("It is <b>48</b>.</answer> So", "</think>a\n\nb 😀\nUser: 好", "你好，世界 😀\n### She sold </b>clips in May", "no end")
    cases = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    words = [i for i in range(len(tokenizer)) if not tokenizer.convert_ids_to_tokens(i).startswith("<0x")]
    cases += [rng.choice(words, 80).tolist() for _ in range(20)]
    few = [i for i in words if tokenizer.convert_ids_to_tokens(i) in ("▁", "Ġ", "a", "b")]  # a space as a token of its own
    cases += [rng.choice(few, 20).tolist() for _ in range(5) if few]
    for strings in (["</answer>"], ["\nUser:", "###"], ["\n\n", "好"], [" sold </b>", "界 😀"], ["</think>", "e"], [" a"]):
        for ids in cases:
            expected = shortest_with(tokenizer, ids, strings)
            find_end = StopStrings(tokenizer, strings)
            assert find_end(np.array(ids), 0) == expected, (strings, tokenizer.decode(ids))
            found += expected is not None
            cuts = sorted({0, len(ids), *rng.integers(0, len(ids) + 1, 3).tolist()})
            looks = [find_end(np.array(ids[:cut]), seen) for seen, cut in pairwise(cuts)]
            assert next((end for end in looks if end is not None), None) == expected
    assert found > 20


def test_a_stop_string_ends_a_completion(start, tmp_path, monkeypatch):
    """Another look interval, other slots: the same run. Completions end with the token that has "e", and count as ended;
    the verifier sees them whole, and --no_eos_score has nothing against them."""
    flags = start | {"stop_strings": ["e", "zz"], "no_eos_score": 0.0, "active_sampling": 0, "log_samples": 99, "steps": 2}
    call(grpo, out=tmp_path / "run", **flags)
    run = Sampler._run
    monkeypatch.setattr(Sampler, "_run", lambda self, params: [run(self, params) for _ in range(5)])
    call(grpo, out=tmp_path / "other", **flags | {"slots": 5})
    np.testing.assert_allclose(trajectory(tmp_path / "other"), trajectory(tmp_path / "run"), rtol=2e-4, atol=1e-7)
    lines = [[json.loads(line) for line in open(tmp_path / name / "samples.jsonl")] for name in ("run", "other")]
    assert [line["completion"] for line in lines[0]] == [line["completion"] for line in lines[1]]
    stopped = [line for line in lines[0] if "e" in line["completion"]]
    assert len(stopped) > 5 and all(line["ended"] for line in stopped)
    assert any(not line["ended"] for line in lines[0])
    for line in stopped:
        text = line["completion"]
        assert "e" not in text[:-8] and line["reward"] == sum(map(str.islower, text)) / len(text)


# ---------------------------------------------------------------------------------------------- another number of ranks


def in_flight(states):
    """{(step, index): [token ids, ...]} of the completions that the ranks of a checkpoint had begun."""
    kept = {}
    for completion in flatten(state["sampler"]["completions"] for state in states):
        kept.setdefault((completion["step"], completion["index"]), []).append(completion["token_ids"].tolist())
    return kept


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_states_are_dealt_to_any_number_of_ranks(ranks, monkeypatch):
    """Each group is on one rank, whole; on as many ranks as before each has its own."""
    def completion(index, sample):
        return {"step": 3, "index": index, "sample": sample, "token_ids": np.array([index, sample])}

    def state(*indices):
        extra = [[_plain(sample) for sample in group] for group in surplus if 12 in indices]  # on rank 0
        return {"cursor": 20, "solved": [3], "recent": [9.0, 4.5], "empty_steps": 2, "surplus": extra, "sampler": {"completions": [completion(i, sample) for i in indices for sample in range(4)]}}

    surplus = [samples([0.0, 1.0], [2, 3], position=6), samples([1.0, 0.0], [1, 5], position=4)]  # 6 has come first
    for sample in flatten(surplus):
        sample.verdict = rewards.Verdict(sample.reward, "right", "5")
    states = [state(12, 15, 17), state(13)]
    shares = []
    for rank in range(ranks):
        rollouts = Rollouts.__new__(Rollouts)
        rollouts.sample_class = grpo.Sample
        rollouts.tp, rollouts.copies = 1, ranks
        rollouts.sampler = SimpleNamespace(load_state_dict=shares.append)
        monkeypatch.setattr("rewards.environment._rank", lambda: rank)
        monkeypatch.setattr("rewards.environment._world", lambda: ranks)
        rollouts.load_state_dicts(states)
        assert rollouts.cursor == 20 and rollouts.solved == {3} and rollouts.recent == [9.0, 4.5] and rollouts.empty_steps == 2
        assert [[s.position for s in group] for group in rollouts.surplus] == [[6, 6], [4, 4]]
        for ours, theirs in zip(flatten(rollouts.surplus), flatten(surplus), strict=True):
            np.testing.assert_equal(vars(ours), vars(theirs))
    dealt = [in_flight([{"sampler": share}]) for share in shares]
    assert sum(map(len, dealt)) == 4 and {**dealt[0], **dict(flatten(d.items() for d in dealt))} == in_flight(states)
    assert all(len(group) == 4 for d in dealt for group in d.values())
    if ranks == 2:
        assert shares == [state["sampler"] for state in states]


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_completions_in_flight_survive_another_number_of_processes(start, tmp_path, capfd, before, after):
    """Stopped with completions in flight: resumed, every one of them goes on from the tokens it has, and is judged."""
    out, flags = tmp_path / "run", rl.rewarded_by_a_built_in(tmp_path, start)
    flags |= {"inflight": 8, "slots": 6, "max_new_tokens": 24, "active_sampling": 0, "max_staleness": 2, "log_samples": 10**6, "keep": 0, "steps": 7}
    train(before, grpo, out=out, **flags | {"stop_step": 4})
    pending = in_flight(torch.load(out / "checkpoints" / "step_4" / "states.pt", weights_only=True))
    assert sum(len(ids) > 0 for group in pending.values() for ids in group) > 0  # some have tokens already
    capfd.readouterr()
    train(after, grpo, out=out, **flags)
    assert "number of processes has changed" in capfd.readouterr().out
    tokenizer = common.load_tokenizer(start["model"])
    lines = [json.loads(line) for line in open(out / "samples.jsonl")]
    for (_, position), group in pending.items():
        row = f"row {1 + common.stream(32, 1, [position])[0]}"
        answers = [line["completion"] for line in lines if line["step"] > 4 and line["row"].endswith(row)]
        for ids in group:
            begun = tokenizer.decode(ids[:-1], skip_special_tokens=True)  # the last may be half a character, or the end
            assert any(answer.startswith(begun) for answer in answers), (position, begun, answers)


@pytest.mark.parametrize("template", ["tulu", "chatml"])
def test_sampling_stops_on_all_stop_ids(start, template):
    """The end of a turn and the tokenizer's; a completion that ended on either is finished, and judged without it."""
    args = grpo.Args(**{**start, "model": str(start["model"]), "out": ""})
    chat = common.ChatFormat(common.load_tokenizer(args.model, template))
    encode = common.PromptEncoder(chat, len(chat.tokenizer), args.max_length - args.max_new_tokens, "drop")
    rollouts = Rollouts(args, chat, common.load_rows([start["data"][0].replace("train", "test")], encode))
    config = AutoConfig.from_pretrained(args.model)
    rollouts.make_sampler(config, torch.device("cpu"))
    names = {"tulu": [EOS], "chatml": ["<|im_end|>", EOS]}[template]
    ids = chat.tokenizer.convert_tokens_to_ids(names)
    assert rollouts.sampler.eos_ids == set(ids)
    answer = chat.tokenizer.encode("5 it is", add_special_tokens=False)

    def completion(index, end):
        token_ids = np.array([*answer, *end])
        return Completion(0, index, 0, np.array([1, 34]), token_ids, np.zeros(len(token_ids)), bool(end), True, 0)

    rollouts.sampler.sample = lambda *_, **__: [completion(0, []), *(completion(1 + i, [end]) for i, end in enumerate(ids))]
    found = flatten(rollouts.sample_all(rollouts.rows))
    rollouts.close()
    assert [(sample.text, sample.ended) for sample in found] == [("5 it is", False)] + [("5 it is", True)] * len(ids)


def test_the_environment_without_a_policy_in_training(start, reference):
    """A model's folder, judged: the numbers are those of the evaluation before the first step of a run from it."""
    rows_file = start["data"][0].replace("train", "test")
    args = grpo.Args(**{**start, "model": str(start["model"]), "out": "", "eval_samples": 2})
    chat = common.ChatFormat(common.load_tokenizer(args.model))
    encode = common.PromptEncoder(chat, len(chat.tokenizer), args.max_length - args.max_new_tokens, "drop")
    rollouts = Rollouts(args, chat, common.load_rows([rows_file], encode))
    rollouts.sampler = Sampler.from_pretrained(args.model, slots=4, max_length=args.max_length)
    found = held_out_metrics(rollouts.sample_all(rollouts.rows))
    rollouts.close()
    assert found == {name: value for name, value in metrics(reference)[0].items() if name != "step"}


def hangs():
    """Rank 1 does not come to a meeting of all ranks. What rank 0 says."""
    rewards.environment.PATIENCE = timedelta(seconds=2)
    rollouts = Rollouts.__new__(Rollouts)
    rollouts.gloo = dist.new_group(backend="gloo")
    assert rollouts._gather([dist.get_rank()]) == [0, 1]
    if dist.get_rank() == 1:
        time.sleep(4)
        return None
    with pytest.raises(RunError) as error:
        rollouts._gather([])
    return str(error.value)


def test_a_process_that_hangs_is_named():
    said, _ = together(2, hangs)
    assert "a process hangs" in said and "Ranks 1 failed to pass" in said


def test_ids_without_a_token_are_never_sampled(tiny_model, tmp_path):
    """A vocabulary that is padded beyond the tokenizer: such ids decode to nothing, and no verifier would see them."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    size = len(AutoTokenizer.from_pretrained(tiny_model))
    model.resize_token_embeddings(size + 300, mean_resizing=False)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.02)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    rows = [{"messages": [user(f"{i}?")], "dataset": "exact", "ground_truth": "a"} for i in range(8)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = {"model": tmp_path / "model", "data": [data], "max_length": 64, "max_new_tokens": 32, "batch_size": 4}
    sampled = []
    with pytest.MonkeyPatch.context() as patch:
        judge = Rollouts._judge
        patch.setattr(Rollouts, "_judge", lambda self, rows, completions, numbers: (
            sampled.extend(completions) or judge(self, rows, completions, numbers)
        ))
        call(grpo, out=tmp_path / "run", **flags, steps=1, active_sampling=0, eval_data=[data], eval_temperature=0.0)
    ids = np.concatenate([completion.token_ids for completion in sampled])
    assert len(ids) > 500 and ids.max() < size  # without the rule, more than a third of them would be beyond
