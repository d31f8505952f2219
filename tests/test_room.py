"""How an RL run on a GPU finds out, before its first rollout, what has room: slots for sampling, a microbatch for training.

There is no GPU here: the functions are told how much is free, and count for models that exist on meta only.
"""

from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, Qwen3Config

import common
import grpo
import rewards.environment
from rewards.environment import Rollouts

GIB = 2**30
B8 = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=131_072,
)  # fmt: skip
B32 = Qwen3Config(
    vocab_size=151_936, hidden_size=5120, intermediate_size=25_600, num_hidden_layers=64, num_attention_heads=64,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=131_072,
)  # fmt: skip


def rollouts(world=8, **flags):
    """Rollouts of a run with these flags on `world` GPUs."""
    made = Rollouts.__new__(Rollouts)
    made.args = grpo.Args(**flags)
    made.tp = made.args.sample_tp
    made.copies = world // made.tp
    return made


def trained(config, parameters, world=8):
    """A model in training of so many billion parameters, of which this rank has a shard."""
    shard = SimpleNamespace(numel=lambda: round(parameters * 1e9 / world))
    parameter = SimpleNamespace(to_local=lambda: shard, device_mesh=SimpleNamespace(size=lambda dim: world))
    return SimpleNamespace(model=SimpleNamespace(config=config), parameters=lambda: iter([parameter]))


def test_slots_are_as_many_as_there_are_and_fit(capsys):
    """8B on eight cards of 80 GB: all 64 sequences of a rank's share; at 32k tokens those that fit."""
    policy = trained(B8, 8.03)
    assert rollouts()._choose_slots(B8, 75 * GIB, [policy]) == 64
    said = capsys.readouterr().out
    assert "14.96 GiB for weights and 0.50 GiB for each sequence of 4096 tokens, 67.52 GiB are free" in said, said
    long = rollouts(max_length=32_768)._choose_slots(B8, 75 * GIB, [policy])
    assert long == int((0.93 * (75 - 8 * 8.03e9 / 8 / GIB) - 14.96) // 4) == 11
    assert rollouts(slots=16)._choose_slots(B8, 75 * GIB, [policy]) == 16
    few = rollouts(batch_size=8, group_size=4)._choose_slots(B8, 75 * GIB, [policy])
    assert few == 4  # a share has no more
    large = rollouts(batch_size=1024)._choose_slots(B8, 2000 * GIB, [policy])
    assert large == rewards.environment.MOST_SLOTS


def test_slots_that_do_not_fit_are_refused():
    for config, parameters, world, flags, message in [
        (B8, 8.03, 8, {"slots": 96}, r"so that 95 sequences fit: lower --slots or --max_length, raise --sample_tp \(it is 1\)"),
        (B32, 32.8, 16, {}, r"61.02 GiB for weights .* so that 0 sequences fit"),
    ]:
        free = (75 if world == 8 else 68) * GIB
        with pytest.raises(common.RunError, match=message):
            rollouts(world, **flags)._choose_slots(config, free, [trained(config, parameters, world)])
    shared = rollouts(16, sample_tp=4)
    assert shared._choose_slots(B32, 68 * GIB, [trained(B32, 32.8, 16)]) == 126  # a fourth of a batch is 128


def test_a_first_backward_without_room_is_refused():
    """Before anything is sampled. With checkpointing there is room."""
    policy = trained(B8, 8.03)
    for flags, message in [
        ({"activation_checkpointing": False, "tokens_per_microbatch": 16_384}, "a microbatch of 16384 tokens"),
        ({"activation_checkpointing": False, "max_length": 16_384}, "a microbatch of 16384 tokens.*take more GPUs"),
    ]:
        with pytest.raises(common.RunError, match=message):
            rollouts(**flags)._check_training(75 * GIB, [policy])
    for flags in ({}, {"max_length": 32_768}, {"activation_checkpointing": False, "tokens_per_microbatch": 4096}):
        rollouts(**flags)._check_training(75 * GIB, [policy])
    value_model = trained(B8, 7.5)
    rollouts()._check_training(70 * GIB, [policy, value_model])
    with pytest.raises(common.RunError, match="gradients and AdamW"):
        rollouts()._check_training(24 * GIB, [policy, value_model])
