"""kernels/memory.py counts what a simulation of the scripts finds, and what is said to fit on 80 GB cards does.

Slow tests simulate models of 1.5 to 70 billion parameters on 8 to 64 ranks: half a minute each.
"""

import copy
import functools
import sys

import pytest
import torch
from conftest import ROOT
from simulate import simulate
from transformers import Gemma3TextConfig, LlamaConfig

from kernels.memory import LiveBytes, _count_kept, count_model, free_bytes, training_bytes

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory  # noqa: E402

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
GIB = 2**30
LIMIT = 74 * GIB

SMALL = LlamaConfig(
    vocab_size=1000, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
GEMMA3_1B = Gemma3TextConfig(
    vocab_size=262_144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
    num_key_value_heads=1, head_dim=256,
)  # fmt: skip


def three_layers(config):
    """A model as wide, but not as deep: tensors without content cost no more when they are large."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = 3
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-3:]
    return config


def assert_agree(script, config, ranks, tokens, activation_checkpointing=False, compiled=False):
    """Counted and simulated. Returns what was simulated, the models of a script one after the other."""
    flags = {"activation_checkpointing": activation_checkpointing, "compile": compiled}
    simulated = simulate(script, config, ranks, tokens, **flags)
    for head, found in zip(memory.HEADS[script], simulated, strict=True):
        counted = training_bytes(count_model(config, head, compiled), tokens, ranks, activation_checkpointing)
        assert counted.parameters == pytest.approx(found.parameters, rel=0.01)
        assert counted.gradients == pytest.approx(found.gradients, rel=0.01)
        assert counted.moments == pytest.approx(found.moments, rel=0.01)
        assert counted.sum == pytest.approx(found.sum, rel=0.01), (script, head)
    return simulated


@pytest.mark.parametrize(
    "script, name, ranks, tokens, flags",
    [  # with the moment of the peak, as numbered in kernels/memory.py
        ("sft", "8B", 8, 8192, {}),  # (1)
        slow("sft", "OLMo-3-7B", 8, 8192, {}),  # (1) with a padded head
        slow("sft", "OLMo-3-7B", 8, 8192, {"compiled": True}),  # (1)
        slow("dpo", "OLMo-3-7B", 8, 8192, {}),  # (2) with a padded head
        slow("ppo_rlvr", "8B", 8, 8192, {}),  # (2) and, of the value model, (3)
        slow("reward_model", "8B", 8, 8192, {"activation_checkpointing": True}),  # (3) in the last layer but one
        slow("reward_model", "Gemma-3-1B", 2, 1000, {}),
        slow("grpo", "1.5B", 8, 512, {"activation_checkpointing": True}),  # (4) of a head that is the embedding
        slow("dpo", "8B", 8, 512, {"activation_checkpointing": True}),  # (4)
        slow("sft", "8B", 1, 512, {"activation_checkpointing": True}),  # (4) of one rank alone
    ],
)
def test_counted_as_simulated(script, name, ranks, tokens, flags):
    config = (memory.MODELS | {"Gemma-3-1B": GEMMA3_1B})[name]
    assert_agree(script, three_layers(config), ranks, tokens, **flags)


# GiB on each rank that the review of this project for CUDA simulated and computed beforehand, at 8,192 tokens.
REVIEWED = [("1.5B", 8, False, 28.7), ("8B", 8, True, 23.6), ("8B", 8, False, 70.7), ("70B", 64, True, 43.0)]


@pytest.mark.slow
@pytest.mark.parametrize("name, ranks, activation_checkpointing, expected", REVIEWED)
def test_large_models_as_simulated(name, ranks, activation_checkpointing, expected):
    [found] = assert_agree("sft", memory.MODELS[name], ranks, 8192, activation_checkpointing)
    assert found.sum / GIB == pytest.approx(expected, rel=0.03)


# What is said to fit: model, GPUs, script, flags beside the defaults.
FITTING = [
    ("8B", 8, "dpo", {}),  # torchrun --nproc_per_node 8 dpo.py --beta 0.1
    ("8B", 8, "grpo", {}),
    ("8B", 8, "grpo", {"activation_checkpointing": False, "compile": True}),
    ("8B", 8, "ppo_rlvr", {}),
    ("32B", 16, "grpo", {"sample_tp": 2}),
    ("70B", 64, "sft", {"activation_checkpointing": True}),
    ("70B", 64, "dpo", {"activation_checkpointing": True}),
    ("70B", 64, "grpo", {"sample_tp": 8}),
    ("OLMo-3-7B", 8, "grpo", {"max_length": 34_816}),
]
ENOUGH = {"OLMo-3-7B": 8}  # sequences at a time on a rank, or a group of ranks; of all others at least memory.FEW


def needed(model, gpus, script, flags):
    """(the script's Args, Need) by benchmarks/memory.py."""
    args = memory.Args(model=model, gpus=gpus, script=script)
    flags = memory.script_args(args)(**flags)
    return flags, memory.need(args, flags)


@pytest.mark.parametrize("model, gpus, script, flags", FITTING)
def test_it_fits(model, gpus, script, flags):
    _, need = needed(model, gpus, script, flags)
    assert need.training <= LIMIT
    if need.slot:
        assert need.rollout <= LIMIT
        assert need.fitting >= ENOUGH.get(model, memory.FEW)


@pytest.mark.slow
@pytest.mark.parametrize("model, gpus, script, flags", FITTING)
def test_it_fits_simulated(model, gpus, script, flags):
    args, need = needed(model, gpus, script, flags)
    tokens = max(args.tokens_per_microbatch, args.max_length)
    chosen = {"activation_checkpointing": args.activation_checkpointing, "compile": args.compile}
    models = simulate(script, memory.MODELS[model], gpus, tokens, **chosen)
    states = [found.parameters + found.gradients + found.moments for found in models]
    work = max(found.sum - of_it for found, of_it in zip(models, states, strict=True))
    assert sum(states) + work <= LIMIT
    assert sum(states) + work == pytest.approx(need.training, rel=0.03)
    if need.slot:
        kept = sum(found.parameters + found.moments for found in models)
        assert kept + need.copy + max(need.gathered, need.slots * need.slot) <= LIMIT


def test_states():
    """16 bytes of each parameter, divided among the ranks, whatever the microbatch."""
    model = count_model(SMALL, "logprobs")
    P = 2 * 1000 * 128 + 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 512 + 2 * 128) + 128
    assert model.parameters == P
    for tokens in (100, 10_000):
        training = training_bytes(model, tokens, 8, False)
        assert training[:3] == (4 * P // 8, 4 * P // 8, 2 * (4 * P // 8))
        assert training.sum == sum(training)


def test_float32_takes_twice_as_much():
    """On a CPU; the embedding's and the head's part of that is in the work, in either precision."""
    kept = [_count_kept(count_model(SMALL, "logprobs", dtype=dtype), 500) for dtype in (torch.bfloat16, torch.float32)]
    assert 1.3 < kept[1].layers / kept[0].layers < 2  # norms keep float32 in both


def test_compiled_layers():
    """Least that autograd keeps of a Llama layer: of each product its inputs, or what they are made of without one."""
    config, tokens = SMALL, 512
    H, D = config.hidden_size, config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads + config.num_key_value_heads
    least = 2 * (4 * H + 2 * heads * D + 2 * config.intermediate_size) * tokens
    eager, compiled = (_count_kept(count_model(config, "logprobs", compiled), tokens) for compiled in (False, True))
    assert 2 * least <= compiled.layers < 0.8 * eager.layers
    assert compiled.backward == eager.backward


def test_live_bytes():
    a = torch.zeros(1000, device="meta")
    with LiveBytes() as live:
        b = a + 1  # 4,000 bytes
        b = b * 2  # 4,000 more, then the first are free
        b[:10].add_(1)  # none
        del b
        assert live.now == 0
    assert live.peak == 8000


def test_free_bytes(monkeypatch):
    assert 2**26 < free_bytes(torch.device("cpu")) < 2**50
    answers = {"mem_get_info": (1000, 5000), "memory_reserved": 700, "memory_allocated": 300}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert free_bytes(torch.device("cuda")) == 1400  # what PyTorch has cached can be allocated


def test_flags_of_the_benchmark():
    _, whole = needed("1.5B", 16, "dpo", {})
    _, hybrid = needed("1.5B", 16, "dpo", {"shard": "hybrid"})
    assert hybrid.parameters == pytest.approx(2 * whole.parameters, abs=2)  # over the 8 GPUs of a node
    _, long = needed("1.5B", 16, "dpo", {"max_length": 8192})  # a pair is two such sequences
    assert long.work > 1.8 * whole.work
    _, grpo = needed("1.5B", 16, "grpo", {})
    _, ppo = needed("1.5B", 16, "ppo_rlvr", {})
    assert ppo.parameters == pytest.approx(2 * grpo.parameters, rel=1e-4)  # the head is the embedding in either
    assert ppo.work == grpo.work and ppo.copy == grpo.copy
    _, few = needed("1.5B", 16, "grpo", {"slots": 5})
    assert few.slots == 5
    assert few.rollout == few.parameters + few.moments + few.copy + max(5 * few.slot, few.gathered) < grpo.rollout
    with pytest.raises(ValueError, match="num_key_value_heads, 2"):
        needed("1.5B", 16, "grpo", {"sample_tp": 4})


def test_tables_of_the_benchmark(tmp_path, capsys):
    SMALL.save_pretrained(tmp_path)
    words = f"--model {tmp_path} --max_length 256 --script".split()
    memory.main([*words, "grpo", "--tokens_per_microbatch", "256", "--activation_checkpointing"])
    text = capsys.readouterr().out
    assert f"{tmp_path} on 8 GPUs: grpo.py --tokens_per_microbatch 256 --max_length 256 --activation_checkpointing" in text
    assert "It fits: 0.0 GiB of 74.0" in text
    assert len([line for line in text.splitlines() if line.startswith(tuple(f"| {gpus} |" for gpus in memory.GPUS))]) == 4
    memory.main([*words, "sft", "--tokens_per_microbatch", "256", "--limit_gib", "0.0001"])
    assert "It does not fit" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--sample_tp 4"):
        memory.main([*words, "grpo", "--sample_tp", "4"])
    with pytest.raises(SystemExit, match="error: --model nowhere: .*by name there are 1.5B, 8B"):
        memory.main("--model nowhere --script sft".split())
