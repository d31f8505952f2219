"""kernels/joined.py: the sampler's linear layers of one input as one product."""

import copy

import pytest
import torch
from conftest import ROOT  # noqa: F401 (the scripts' folder is on the path)
from test_kernels import tiny_config
from transformers import AutoModelForCausalLM, Qwen2Config

from kernels.joined import Part, join_products

FAMILIES = ["llama", "qwen2", "qwen3", "olmo3", "gemma2", "gemma3"]  # Qwen 2 has biases


def model_of(family):
    config = tiny_config(family, 128, True) if family != "qwen2" else Qwen2Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.2)  # biases are not 0
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_function_with_the_same_parameters(family):
    model = model_of(family)
    joined = copy.deepcopy(model)
    join_products(joined)
    ids = torch.randint(128, (2, 9))
    torch.testing.assert_close(joined(ids).logits, model(ids).logits, rtol=1e-9, atol=1e-9)
    assert sum(isinstance(module, Part) for module in joined.modules()) == 5 * model.config.num_hidden_layers
    named = [{name: value.shape for name, value in m.named_parameters()} for m in (model, joined)]
    assert named[0] == named[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_copied_into_the_parameters_counts(family):
    """As `sync` does it."""
    joined, other = model_of(family), model_of(family)
    join_products(joined)
    torch.manual_seed(1)
    for name, parameter in other.named_parameters():
        parameter.normal_(std=0.2)
        joined.get_parameter(name).copy_(parameter)
    ids = torch.randint(128, (2, 9))
    torch.testing.assert_close(joined(ids).logits, other(ids).logits, rtol=1e-9, atol=1e-9)


def test_products_are_fewer_and_nothing_is_held():
    """Four products of a layer instead of seven; no result outlives the pass, and no weight is in memory twice."""
    model = model_of("llama")
    before = sum(tensor.untyped_storage().nbytes() for tensor in model.state_dict().values())
    join_products(model)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in model.state_dict().values()}
    assert sum(storages.values()) <= before
    with torch.profiler.profile() as profiled:
        model.base_model(torch.randint(128, (1, 9)))
    counts = {event.key: event.count for event in profiled.key_averages()}
    assert counts["aten::linear"] == 4 * model.config.num_hidden_layers
    assert not any(module.product.results for module in model.modules() if isinstance(module, Part))
