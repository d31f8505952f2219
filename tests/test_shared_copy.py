"""Runs in which ranks share one copy of the policy to sample from: --sample_tp."""

import json
import os
import signal

import numpy as np
import pytest
import rl
from launch import call, metrics
from together import together

import grpo
import ppo_rlvr
from kernels.sampler import Sampler

EXACT = ("reward", "groups", "sampled_tokens", "eos_rate", "completion_tokens", "eval_reward")
CLOSE = ("loss", "grad_norm", "entropy")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    flags, _, _ = rl.small_run(folder)
    held_out = {"eval_data": [str(folder / "test.jsonl")], "eval_every": 2}
    return flags | held_out | {"batch_size": 4, "group_size": 4, "steps": 3}


def train(script, flags):
    """On each rank of `together`. The exit code."""
    try:
        call(script, **flags)
    except SystemExit as end:
        return end.code
    return 0


def run(world, out, script=grpo, nodes=1, **flags):
    return together(world, train, script, flags | {"out": out}, nodes=nodes, joins=True)


def completions(out):
    """What was sampled and how it was judged."""
    lines = [json.loads(line) for line in open(out / "samples.jsonl")]
    return [(line["step"], line["row"], line["completion"], line["reward"]) for line in lines]


def assert_same_course(a, b):
    """The same completions and rewards; losses but for rounding."""
    assert completions(a) == completions(b)
    a, b = metrics(a), metrics(b)
    assert len(a) == len(b) > 3
    for x, y in zip(a, b, strict=True):
        assert [x.get(name) for name in EXACT] == [y.get(name) for name in EXACT]
        np.testing.assert_allclose([x.get(n, 0) for n in CLOSE], [y.get(n, 0) for n in CLOSE], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("script", [grpo, pytest.param(ppo_rlvr, marks=pytest.mark.slow)], ids=lambda script: script.__name__)
def test_a_shared_copy_changes_no_sample(start, tmp_path, script):
    """Two ranks with one copy, and two with a copy each: the same completions and evaluations, the same course."""
    flags = start | {"log_samples": 99}
    if script is ppo_rlvr:
        flags |= {"value_model": flags["model"]}
    run(2, tmp_path / "own", script, **flags)
    run(2, tmp_path / "shared", script, **flags | {"sample_tp": 2})
    assert_same_course(tmp_path / "own", tmp_path / "shared")


@pytest.mark.slow
def test_two_copies_on_two_machines_in_flight(start, tmp_path):
    """Four ranks, two of them on each of two machines with --shard hybrid, prompts in flight. Stopped and continued, the
    run is the same to the bit; continued with a copy for each rank, it goes on."""
    flags = start | {"sample_tp": 2, "shard": "hybrid", "inflight": 8, "steps": 4, "save_every": 1, "keep": 0}
    run(4, tmp_path / "whole", nodes=2, **flags)
    for out, change in ((tmp_path / "same", {}), (tmp_path / "other", {"sample_tp": 1})):
        run(4, out, nodes=2, **flags | {"stop_step": 2})
        assert len(metrics(out)) < len(metrics(tmp_path / "whole"))
        run(4, out, nodes=2, **flags | change)
    assert completions(tmp_path / "same") == completions(tmp_path / "whole")
    for x, y in zip(metrics(tmp_path / "same"), metrics(tmp_path / "whole"), strict=True):
        assert [x.get(name) for name in EXACT + CLOSE] == [y.get(name) for name in EXACT + CLOSE]
    lines = metrics(tmp_path / "other")
    assert lines[-1]["step"] == 4 and all(line["groups"] == 4 for line in lines if line["step"])


def stopped_in_a_rollout(flags):
    """SIGTERM to rank 1 alone, while both sample."""
    decode, calls = Sampler._run, []

    def watched(self, temperature):
        calls.append(1)
        if len(calls) == 12 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(self, temperature)

    Sampler._run = watched
    return train(grpo, flags), len(calls)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_those_that_sample_with_it(start, tmp_path):
    """At the same decode step, so that none waits for another. The same command goes on."""
    flags = start | {"sample_tp": 2, "out": tmp_path / "run"}
    ranks = together(2, stopped_in_a_rollout, flags, joins=True)
    assert ranks == [(143, 12)] * 2
    assert run(2, **flags) == [0, 0]
    assert metrics(tmp_path / "run")[-1]["step"] == 3


@pytest.mark.parametrize(("flags", "message"), [
    ({"sample_tp": 2}, "--sample_tp 2 does not divide the 1 processes"),
    ({"sample_tp": 0}, "--sample_tp"),
])  # fmt: skip
def test_impossible_numbers_are_refused(start, tmp_path, flags, message):
    with pytest.raises(Exception, match=message):
        call(grpo, **start | flags | {"out": tmp_path / "run"})


def refused(flags):
    with pytest.raises(Exception, match="--sample_tp 4 does not divide the model's num_key_value_heads, 2"):
        call(grpo, **flags)


@pytest.mark.slow
def test_a_model_that_cannot_be_divided_is_refused(start, tmp_path):
    together(4, refused, start | {"sample_tp": 4, "out": tmp_path / "run"}, joins=True)
