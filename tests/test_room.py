"""How an RL run on a GPU finds out, before its first rollout, what has room: slots for sampling, a microbatch for training.

There is no GPU here: the functions are told how much is free, and count for models that exist on meta only.
"""

import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

import common
import grpo
import rewards.environment
from rewards.environment import Rollouts

sys.path.insert(0, str(ROOT / "benchmarks"))

from memory import MODELS  # noqa: E402

GIB = 2**30
OWN = 8.03e9 / 8  # parameters of an 8B that one of eight ranks has
B8, B32 = MODELS["8B"], MODELS["32B"]


def rollouts(world=8, **flags):
    """Rollouts of a run with these flags on `world` GPUs."""
    made = Rollouts.__new__(Rollouts)
    made.args = grpo.Args(**flags)
    made.tp = made.args.sample_tp
    made.copies = world // made.tp
    return made


def trained(config, world=8):
    """A model in training, as far as it is looked at."""
    parameter = SimpleNamespace(device_mesh=SimpleNamespace(size=lambda dim: world))
    return SimpleNamespace(model=SimpleNamespace(config=config), parameters=lambda: iter([parameter]))


def test_slots_are_as_many_as_there_are_and_fit(capsys):
    """8B on eight cards of 80 GB: all 64 sequences of a rank's share; at 32k tokens those that fit."""
    assert rollouts()._choose_slots(B8, 75 * GIB - 8 * OWN) == 64
    said = capsys.readouterr().out
    assert "14.96 GiB for weights and 0.50 GiB for each sequence of 4096 tokens, 67.52 GiB are free" in said, said
    long = rollouts(max_length=32_768)._choose_slots(B8, 75 * GIB - 8 * OWN)
    assert long == int((0.93 * (75 - 8 * 8.03e9 / 8 / GIB) - 14.96) // 4) == 11
    assert rollouts(slots=16)._choose_slots(B8, 75 * GIB - 8 * OWN) == 16
    few = rollouts(batch_size=8, group_size=4)._choose_slots(B8, 75 * GIB - 8 * OWN)
    assert few == 4  # a share has no more
    large = rollouts(batch_size=1024)._choose_slots(B8, 2000 * GIB - 8 * OWN)
    assert large == rewards.environment.MOST_SLOTS


def test_slots_that_do_not_fit_are_refused():
    for config, parameters, world, flags, message in [
        (B8, 8.03, 8, {"slots": 96}, r"so that 95 sequences fit: lower --slots or --max_length, raise --sample_tp \(it is 1\)"),
        (B32, 32.8, 16, {}, r"61.02 GiB for weights .* so that 0 sequences fit"),
    ]:
        free = (75 if world == 8 else 68) * GIB
        with pytest.raises(common.RunError, match=message):
            rollouts(world, **flags)._choose_slots(config, free - 8 * parameters * 1e9 / world)
    shared = rollouts(16, sample_tp=4)
    assert shared._choose_slots(B32, 68 * GIB - 8 * 32.8e9 / 16) == 126  # a fourth of a batch is 128


def test_a_first_backward_without_room_is_refused():
    """Before anything is sampled. With checkpointing there is room."""
    policy = trained(B8)
    for flags, message in [
        ({"activation_checkpointing": False, "tokens_per_microbatch": 16_384}, "a microbatch of 16384 tokens"),
        ({"activation_checkpointing": False, "max_length": 16_384}, "a microbatch of 16384 tokens.*take more GPUs"),
    ]:
        with pytest.raises(common.RunError, match=message):
            rollouts(**flags)._check_training(75 * GIB, OWN, [policy])
    for flags in ({}, {"max_length": 32_768}, {"activation_checkpointing": False, "tokens_per_microbatch": 4096}):
        rollouts(**flags)._check_training(75 * GIB, OWN, [policy])
    value_model = trained(B8)
    rollouts()._check_training(70 * GIB, 2 * OWN, [policy, value_model])
    with pytest.raises(common.RunError, match="gradients and AdamW"):
        rollouts()._check_training(24 * GIB, 2 * OWN, [policy, value_model])


def test_all_ranks_decide_by_the_same_numbers(monkeypatch):
    """Shards are uneven where the number of ranks does not divide a matrix, and another process may share a card."""
    made = rollouts(sample_tp=1)
    seen = []
    made.chat = SimpleNamespace(stop_ids=[2], tokenizer=SimpleNamespace(get_vocab=lambda: {"a": 0}))
    monkeypatch.setattr(rewards.environment, "free_bytes", lambda device: 50)
    monkeypatch.setattr(rewards.environment, "_own_parameters", lambda modules: 3)
    monkeypatch.setattr(rewards.environment, "Sampler", lambda config, slots, *rest: SimpleNamespace(slots=slots, forbid=seen.append))
    made._gather = lambda items: [*items, 40 if items == [50] else 4]  # the other rank's
    made._check_training = lambda free, own, trained: seen.append((free, own))
    made._choose_slots = lambda config, free: seen.append(free) or 7
    made.make_sampler(SimpleNamespace(vocab_size=3), SimpleNamespace(type="cuda"))
    assert seen == [(40, 4), 40 - 8 * 4, {1, 2}] and made.sampler.slots == 7
