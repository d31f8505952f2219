"""kernels/parallel.py: ranks that share one copy of a model sample what one rank with a whole copy samples."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_kernels import tiny_config
from test_sampler import Policy, V, make, make_prompts, recompute, tokens
from together import together
from transformers import GPTNeoXConfig, Phi3Config, Qwen2Config

import kernels.sampler
from kernels.parallel import divide
from kernels.sampler import POSITION, Sampler, SamplingParams, footprint

FAMILIES = ["llama", "llama with biases", "qwen2", "qwen3", "olmo3", "gemma2", "gemma3"]
PROMPTS = make_prompts([1, 40, 5, 17, 33])
PARAMS = SamplingParams(n=3, max_new_tokens=40, temperature=0.8, seed=5)
ENDS = range(2, 6)


def config_of(family):
    if family == "qwen2":
        config = Qwen2Config(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    else:
        config = tiny_config(family.split()[0], V, True)
        config.attention_bias = family.endswith("biases")  # of o_proj, too
    config.num_attention_heads, config.num_key_value_heads, config.intermediate_size = 8, 4, 48
    return config


def model_of(family):
    model = make(config_of(family))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)  # biases, and norms that differ from head to head
    return model


def sample(model, slots, group=None):
    sampler = Sampler(model.config, slots, 96, ENDS, "cpu", group=group)
    sampler.sync(Policy(model))
    return sampler.sample(PROMPTS, PARAMS)


def on_each_rank(family, slots):
    """Samples of this rank, and the number of weights in its copy."""
    model = model_of(family)
    sampler = Sampler(model.config, slots, 96, ENDS, "cpu", group=dist.group.WORLD)
    weights = sum(parameter.numel() for parameter in sampler.model.base_model.layers.parameters())
    return sample(model, slots, dist.group.WORLD), weights


def is_near_tie(model, a, b):
    """Whether where two samples part, the draw was within rounding of choosing the other token."""
    t = int(np.nonzero(a.token_ids[: len(b.token_ids)] != b.token_ids[: len(a.token_ids)])[0][0])
    ids = torch.from_numpy(np.concatenate([a.prompt_ids, a.token_ids[:t]]))
    p = (model(ids[None]).logits[0, -1] / PARAMS.temperature).softmax(-1)
    keys = torch.tensor([kernels.sampler._keys(PARAMS.seed, a)], dtype=torch.int32)
    e = kernels.sampler._waiting_times(keys, torch.tensor([len(ids)], dtype=torch.int32), V)[0]
    first, second = (p / e)[[int(a.token_ids[t]), int(b.token_ids[t])]].tolist()
    print(f"samples part at token {t}: {first} and {second}")
    return abs(first / second - 1) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("t", [2, pytest.param(4, marks=pytest.mark.slow)])  # six seconds on two cores
def test_samples_are_those_of_one_copy(family, t):
    """The same tokens on every rank, log-probabilities to 2e-5 of the whole model's for the same tokens, and the tokens
    of a sampler with its own copy, unless they part at a near tie. More prompts than slots, and sliding windows."""
    model = model_of(family)
    ranks = together(t, on_each_rank, family, 4)
    shared = ranks[0][0]
    for completions, _ in ranks[1:]:
        assert tokens(completions) == tokens(shared)
    for completion in shared:
        expected = recompute(model, completion, PARAMS.temperature)
        torch.testing.assert_close(torch.from_numpy(completion.logprobs), expected, rtol=0, atol=2e-5)
    for a, b in zip(shared, sample(model, 4), strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() or is_near_tie(model, a, b)
    assert {completion.ended for completion in shared} == {True, False}
    weights = sum(parameter.numel() for parameter in model.base_model.layers.parameters())
    assert ranks[0][1] < 1.1 * weights / t  # norms and biases are whole


def on_two_that_disagree():
    """Rank 1's logits are off, so that it would draw other tokens."""
    model = model_of("llama")
    draw = kernels.sampler._draw
    shift = torch.randn(V, generator=torch.Generator().manual_seed(dist.get_rank()))
    kernels.sampler._draw = lambda logits, *rest: draw(logits + dist.get_rank() * shift, *rest)
    return sample(model, 4, dist.group.WORLD)


def test_ranks_draw_the_same_token_whatever_they_compute():
    ranks = together(2, on_two_that_disagree)
    assert tokens(ranks[0]) == tokens(ranks[1])


def on_one_that_stops():
    """Rank 1 is told to stop at the third look."""
    model = model_of("llama")
    sampler = Sampler(model.config, 4, 96, [], "cpu", group=dist.group.WORLD)
    sampler.sync(Policy(model))
    looks = []
    sampler.sample(PROMPTS, PARAMS, stop=lambda: looks.append(1) or (dist.get_rank() == 1 and len(looks) == 3))
    return len(looks), sampler.state[:, POSITION].tolist()


def test_ranks_stop_together():
    first, second = together(2, on_one_that_stops)
    assert first == second and first[0] == 3


def test_what_cannot_be_divided_is_refused():
    """Numbers of heads, fused or unknown projections, and models whose attention would not be divided."""
    with pytest.raises(ValueError, match="--sample_tp 4 does not divide the model's num_key_value_heads, 2"):
        divide(tiny_config("llama", V, True), 4)
    small = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    for config, message in [
        (Phi3Config(**small, num_key_value_heads=4, pad_token_id=None), "cannot divide this model's model.layers.0"),
        (GPTNeoXConfig(**small), "num_key_value_heads, None"),
    ]:
        assert all(message in said for said in together(2, refusal, config))


def refusal(config):
    """What a Sampler on several ranks says of a model."""
    with pytest.raises(ValueError) as error:
        Sampler(config, 2, 32, [2], "cpu", group=dist.group.WORLD)
    return str(error.value)


def test_footprint_is_what_a_sampler_allocates():
    """Rings of sliding windows included."""
    for family in ("llama", "gemma3"):
        sampler = Sampler(config_of(family), 3, 96, [2], "cpu")
        assert footprint(config_of(family), 96, torch.float32) == (
            sum(x.nbytes for x in [*sampler.model.parameters(), *sampler.model.buffers()]),
            sum(x.nbytes for x in sampler.cache.buffers()) // 3,
        )
        whole, half = (footprint(config_of(family), 96, torch.float32, tp) for tp in (1, 2))
        assert half[1] == whole[1] / 2 and half[0] < whole[0]
