"""The head and packed attention against float64 definitions."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assistant, shared, user
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Olmo3Config, Qwen3Config

import common
import kernels.attention
import kernels.head
import sft
from kernels.head import linear_cross_entropy, linear_logprobs


def definition(hidden, weight, targets, temperature=1.0):
    """log-probabilities and entropy from all the logits, in float64; 0 where the target is -100."""
    logp = (hidden.double() @ weight.double().T / temperature).log_softmax(dim=1)
    trained = targets != -100
    logprobs = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return logprobs * trained, -(logp.exp() * logp).sum(dim=1) * trained


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def example(T, H, V, share_trained, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(T, H, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (T,), generator=generator)
    targets[torch.rand(T, generator=generator) >= share_trained] = -100
    return hidden, weight, targets


@settings(deadline=None, max_examples=60)
@given(
    T=st.integers(0, 40), H=st.integers(1, 24), V=st.integers(1, 70), share=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([1.0, 0.6, 2.5]), chunk=st.sampled_from([1, 7, 4096]), seed=st.integers(0, 99),
)  # fmt: skip
def test_values_and_gradients_equal_the_definition(T, H, V, share, temperature, chunk, seed):
    """Any shape, any chunk size, any share of trained tokens, zero included."""
    hidden, weight, targets = example(T, H, V, share, seed=seed)
    coefficients = torch.randn(2, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.head, "CHUNK", chunk)
        ours = linear_logprobs(hidden, weight, targets, temperature)
        ours_grad = torch.autograd.grad((torch.stack(ours).double() * coefficients).sum(), (hidden, weight))
        loss = linear_cross_entropy(hidden, weight, targets)
        loss_grad = torch.autograd.grad(loss * 0.5, (hidden, weight))
    truth = definition(hidden, weight, targets, temperature)
    truth_grad = torch.autograd.grad((torch.stack(truth) * coefficients).sum(), (hidden, weight))
    torch.testing.assert_close(torch.stack(ours).double(), torch.stack(truth), rtol=1e-4, atol=1e-4)
    true_loss = -definition(hidden, weight, targets)[0].sum()
    true_loss_grad = torch.autograd.grad(true_loss * 0.5, (hidden, weight))
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-4)
    for a, b in zip(ours_grad + loss_grad, truth_grad + true_loss_grad, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_gradcheck_in_float64():
    hidden, weight, targets = example(9, 5, 11, 0.7, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets), (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: linear_logprobs(h, w, targets, 0.7), (hidden, weight))


def test_extreme_logits_stay_finite():
    """Logits of ±1e4: the loss is exact and no gradient is NaN."""
    hidden, weight, targets = example(50, 16, 33, 1.0, scale=2500.0)
    logprobs, entropy = linear_logprobs(hidden, weight, targets)
    (linear_cross_entropy(hidden, weight, targets) + logprobs.sum() + entropy.sum()).backward()
    assert (hidden @ weight.T).abs().max() > 1e4
    torch.testing.assert_close(logprobs.double(), definition(hidden, weight, targets)[0], rtol=1e-5, atol=1e-2)
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_bfloat16_operands_keep_float32_logits():
    """From the same bf16 operands, log-probabilities are float32-exact (bf16 logits would be off by about 1e-2)."""
    hidden, weight, targets = example(64, 32, 1000, 1.0, torch.bfloat16, scale=0.5)
    logprobs, _ = linear_logprobs(hidden, weight, targets)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), definition(hidden, weight, targets)[0], rtol=1e-5, atol=1e-4)
    linear_cross_entropy(hidden, weight, targets).backward()
    assert weight.grad.dtype == torch.bfloat16
    true = torch.autograd.grad(-definition(hidden, weight, targets)[0].sum(), (hidden, weight))
    assert relative_error(hidden.grad, true[0]) < 1e-2 and relative_error(weight.grad, true[1]) < 1e-2


def test_untrained_tokens_cost_nothing(monkeypatch):
    """The logits of a chunk are made for trained tokens only."""
    rows = []
    matmul = kernels.head._matmul
    monkeypatch.setattr(kernels.head, "_matmul", lambda a, b: rows.append(a.shape) or matmul(a, b))
    hidden, weight, targets = example(100, 4, 8, 1.0)
    targets[10:] = -100
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, targets)
        linear_logprobs(hidden, weight, targets)
    assert rows == [(10, 4), (10, 4)]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, w, t: (h[:, 1:], w, t), "expected hidden"),
        (lambda h, w, t: (h, w, t[1:]), "targets"),
        (lambda h, w, t: (h, w, t.int()), "targets"),
        (lambda h, w, t: (h.bfloat16(), w, t), "share a dtype"),
        (lambda h, w, t: (h, w, t + 50), "outside the vocabulary"),
    ],
)
def test_head_refuses_what_does_not_fit(change, message):
    for function in (linear_cross_entropy, linear_logprobs):
        with pytest.raises(ValueError, match=message):
            function(*change(*example(6, 4, 9, 1.0)))
    with pytest.raises(ValueError, match="temperature"):
        linear_logprobs(*example(6, 4, 9, 1.0), temperature=0)


# --------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("lengths", [[1], [5, 1, 9], [3] * 4, [20, 2, 33]])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_packed_attention_equals_the_masked_softmax(lengths, window, kv_heads):
    torch.manual_seed(0)
    T, heads, D = sum(lengths), 4, 8
    query = torch.randn(1, heads, T, D, dtype=torch.float64)
    key, value = torch.randn(2, 1, kv_heads, T, D, dtype=torch.float64)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    i, j = torch.arange(T)[:, None], torch.arange(T)
    allowed = (sequence[:, None] == sequence) & (j <= i) & (i - j < (window or T))
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    scores = (query @ k.transpose(2, 3) * 0.3).masked_fill(~allowed, -math.inf)
    expected = (scores.softmax(dim=-1) @ v).transpose(1, 2)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    for function in (kernels.attention.packed_attention, kernels.attention.packed_attention_loop):
        output, _ = function(
            None, query, key, value, None, scaling=0.3, sliding_window=window, cu_seq_lens_q=cu_seqlens,
            max_length_q=max(lengths),
        )  # fmt: skip
        torch.testing.assert_close(output, expected)


def test_packed_attention_refuses_what_it_would_ignore():
    q = torch.randn(1, 2, 4, 8)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    attention = kernels.attention.packed_attention
    for arguments, message in [
        ({}, "boundaries"),
        ({"cu_seq_lens_q": cu, "softcap": 30.0}, "softcap"),
        ({"cu_seq_lens_q": cu, "s_aux": torch.zeros(2)}, "s_aux"),
        ({"cu_seq_lens_q": cu, "attention_mask": torch.ones(1)}, "no mask"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention(None, q, q, q, **arguments)


SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.2,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny_config(family, vocab_size, tied):
    """A small configuration of each architecture, with sliding windows where it has them."""
    shared = SMALL | {"vocab_size": vocab_size, "tie_word_embeddings": tied}
    layers = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    return {
        "llama": lambda: LlamaConfig(**shared),
        "qwen3": lambda: Qwen3Config(**shared),
        "olmo3": lambda: Olmo3Config(**shared, **layers),
        "gemma3": lambda: Gemma3TextConfig(**shared, **layers, query_pre_attn_scalar=8),
    }[family]()


@pytest.fixture(scope="module")
def gsm8k_sequences():
    """Six real question–answer rows as (input_ids, trained)."""
    chat = common.ChatFormat(common.load_tokenizer(shared("models", "stories260k"), "tulu"))
    with open(shared("data", "gsm8k", "train.jsonl")) as file:
        rows = [json.loads(next(file)) for _ in range(6)]
    encoded = [chat.encode([user(row["question"]), assistant(row["answer"])]) for row in rows]
    return [(np.array(ids), trained) for ids, trained in encoded]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo3", "gemma3"])
def test_loss_and_gradient_equal_transformers_one_sequence_at_a_time(family, tied, gsm8k_sequences, monkeypatch):
    """Packed float32 against eager float64 with all the logits, on real rows: ≤ 1e-5 relative."""
    calls = []
    loop = kernels.attention._loop
    monkeypatch.setattr(kernels.attention, "_loop", lambda *a: calls.append(1) or loop(*a))
    config = tiny_config(family, 512, tied)
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").double()
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="packed")
    model.load_state_dict(eager.state_dict())
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied

    microbatch = common.pack(gsm8k_sequences, "cpu")
    num_trained = int((microbatch.targets != -100).sum())
    loss = sft.Policy(model)(microbatch) / num_trained
    loss.backward()
    assert len(calls) == config.num_hidden_layers  # the packed function, not some other, was used

    truth = 0.0
    for ids, trained in gsm8k_sequences:
        logits = eager(torch.tensor(ids)[None].long()).logits[0]
        mask = torch.tensor(trained[1:])
        truth += F.cross_entropy(logits[:-1][mask], torch.tensor(ids[1:]).long()[mask], reduction="sum") / num_trained
    truth.backward()
    assert abs(loss.item() - truth.item()) <= 1e-5 * truth.item()
    for (name, a), (_, b) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
        assert relative_error(a.grad, b.grad) <= 1e-5, name
