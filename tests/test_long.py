"""Long sequences: a training step on 32,768 tokens, and a prompt with room for 32,768 more. Slow; peak memory is printed."""

import os
import time

import pytest
import torch
from conftest import assistant, tokenizer_folder, user, write_jsonl
from launch import metrics, start
from transformers import AutoModelForCausalLM, LlamaConfig

import common

pytestmark = pytest.mark.slow


@pytest.fixture
def model(tmp_path):
    """Folder of a random two-layer Llama that knows 65,536 positions."""
    tokenizer = common.load_tokenizer(tokenizer_folder("byte_level"), "tulu")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=65_536, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def timed(script, **flags):
    """Runs a script to its end; prints seconds and the peak of its memory."""
    begun = time.perf_counter()
    process = start(script, **flags)
    stdout, stderr = process.stdout, process.stderr
    text = stdout.read() + stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, text
    print(f"{script}: {time.perf_counter() - begun:.0f} s, at most {usage.ru_maxrss / 1024:.0f} MiB")


def test_an_sft_step_on_32768_tokens(model, tmp_path):
    """One row, cut to 32,768 tokens, more than --tokens_per_microbatch: alone in its microbatch, whole in the loss."""
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [user("Go on."), assistant("5 + 7 = 12. " * 8000)]}])
    timed("sft.py", model=model, data=data, max_length=32_768, batch_size=1, steps=1, epochs=1, save_every=0, out=tmp_path / "o")
    entry = metrics(tmp_path / "o")[-1]
    assert entry["tokens"] == 32_768 and 6 < entry["loss"] < 8  # ln of the vocabulary is 6.9


def test_a_grpo_step_with_room_for_32768_new_tokens(model, tmp_path):
    """A prompt of some 2,000 tokens; the slots are as long as prompt and answer may be."""
    rows = [{"messages": [user("5 + 7 = 12. " * 180)], "dataset": "contains", "ground_truth": "a"}] * 2
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = {"group_size": 2, "batch_size": 2, "slots": 4, "active_sampling": 0, "max_length": 36_864, "max_new_tokens": 32_768}
    timed("grpo.py", model=model, data=data, steps=1, epochs=1, save_every=0, out=tmp_path / "o", **flags)
    entry = metrics(tmp_path / "o")[-1]
    assert entry["tokens"] > 4 * 1000
