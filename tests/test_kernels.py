"""Packed attention, and whole models with it and the head, against float64 definitions."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assistant, shared, user
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, LlamaConfig, Olmo3Config, Qwen3Config

import common
import kernels.attention
import sft


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("lengths", [[1], [5, 1, 9], [3] * 4, [20, 2, 33]])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("kv_heads, softcap", [(1, None), (2, None), (4, None), (2, 1.5)])
def test_packed_attention_equals_the_masked_softmax(lengths, window, kv_heads, softcap):
    torch.manual_seed(0)
    T, heads, D = sum(lengths), 4, 8
    query = torch.randn(1, heads, T, D, dtype=torch.float64)
    key, value = torch.randn(2, 1, kv_heads, T, D, dtype=torch.float64)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    i, j = torch.arange(T)[:, None], torch.arange(T)
    allowed = (sequence[:, None] == sequence) & (j <= i) & (i - j < (window or T))
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    scores = query @ k.transpose(2, 3) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    expected = (scores.masked_fill(~allowed, -math.inf).softmax(dim=-1) @ v).transpose(1, 2)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    for function in (kernels.attention.packed_attention, kernels.attention.packed_attention_loop):
        output, _ = function(
            None, query, key, value, None, scaling=0.3, sliding_window=window, cu_seq_lens_q=cu_seqlens,
            max_length_q=max(lengths), softcap=softcap,
        )  # fmt: skip
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    "dtype, head_size, softcap, is_flash",
    [
        (torch.bfloat16, 64, None, True), (torch.float16, 8, None, True), (torch.bfloat16, 256, None, True),
        (torch.bfloat16, 20, None, False), (torch.bfloat16, 264, None, False), (torch.bfloat16, 64, 50.0, False),
        (torch.float32, 64, None, False), (torch.float64, 64, None, False),
    ],
)  # fmt: skip
def test_flash_attention_gets_what_it_can_do(dtype, head_size, softcap, is_flash, monkeypatch):
    """On CUDA, for which `meta` stands here: its kernels want 16 bits and a head size of 8, 16, ... 256. Else the loop."""
    taken = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.is_meta))
    monkeypatch.setattr(kernels.attention, "_varlen", lambda *args: taken.append(True))
    monkeypatch.setattr(kernels.attention, "_loop", lambda *args: taken.append(False))
    for device in ("meta", "cpu"):
        q = torch.empty(1, 2, 4, head_size, dtype=dtype, device=device)
        boundaries = torch.tensor([0, 4], dtype=torch.int32)
        kernels.attention.packed_attention(None, q, q, q, cu_seq_lens_q=boundaries, max_length_q=4, softcap=softcap)
    assert taken == [is_flash, False]


def test_packed_attention_refuses_what_it_would_ignore():
    q = torch.randn(1, 2, 4, 8)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    attention = kernels.attention.packed_attention
    for arguments, message in [
        ({}, "boundaries"),
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
        "gemma2": lambda: Gemma2Config(
            **shared, **layers, query_pre_attn_scalar=8, final_logit_softcapping=2.0, attn_logit_softcapping=1.0
        ),
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
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo3", "gemma2", "gemma3"])
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
