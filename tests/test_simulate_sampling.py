"""What sampling takes of a GPU's memory, simulated for many ranks: the weights, the slots, and little else; then nothing."""

import copy
import sys

import pytest
import torch
from conftest import ROOT
from simulate_sampling import simulate_sampling

from kernels.sampler import footprint

sys.path.insert(0, str(ROOT / "benchmarks"))

from memory import MODELS  # noqa: E402

GIB, MIB = 2**30, 2**20


def check(config, ranks, slots, max_length, sample_tp):
    """Parameters and AdamW's moments, and sampling at its peak, in GiB."""
    found = simulate_sampling(config, ranks, slots, max_length, sample_tp)
    weights, slot = footprint(config, max_length, torch.bfloat16, sample_tp)
    assert weights + slots * slot <= found.sampled < weights + slots * slot + 2 * GIB  # tensors that do not stay
    root = 2 * config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    gathered = 2 * 1.1 * root  # embedding and head, with the buffer that they are gathered in, and a layer
    assert found.synced <= max(weights + slots * slot, weights + gathered) + MIB  # a few numbers for each slot
    assert found.released < MIB
    return (3 * found.parameters + max(found.sampled, found.synced)) / GIB


@pytest.mark.parametrize("sample_tp", [1, 4])
def test_sampling_has_weights_and_slots_and_then_nothing(sample_tp):
    config = copy.deepcopy(MODELS["OLMo-3-7B"])
    config.num_hidden_layers = 4
    check(config, 8, 32, 8192, sample_tp)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks", "slots", "max_length", "sample_tp"), [
    ("8B", 8, 64, 4096, 1), ("32B", 16, 96, 4096, 4), ("70B", 64, 64, 4096, 8), ("OLMo-3-7B", 8, 6, 34_816, 1),
    ("OLMo-3-7B", 8, 64, 34_816, 8), ("OLMo-3-32B", 16, 32, 34_816, 8),
])  # fmt: skip
def test_it_fits_on_cards_of_80_gb(name, ranks, slots, max_length, sample_tp):
    """Whole models; the rest of a card, to 79.6 GiB, is for CUDA, NCCL and what lies in pieces."""
    gib = check(copy.deepcopy(MODELS[name]), ranks, slots, max_length, sample_tp)
    print(f"{name} on {ranks} ranks, {slots} slots of {max_length}, --sample_tp {sample_tp}: {gib:.1f} GiB at the peak")
    assert gib <= 74
