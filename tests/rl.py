"""What the tests of grpo.py and ppo_rlvr.py share: a small policy and its prompts, and ways to stop a run."""

import os
import signal
import time

import launch
import lawless  # noqa: F401 (registers verifiers)
import numpy as np
import pytest
import torch
from conftest import tokenizer_folder, user, write_jsonl
from transformers import AutoModelForCausalLM, LlamaConfig

import common
from kernels.sampler import Sampler


def small_run(folder):
    """(flags, configuration, tokenizer): a random model with a vocabulary of digits, asked for small letters."""
    tokenizer = common.load_tokenizer(tokenizer_folder("byte_level"), "tulu")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"messages": [user(f"{i}?")], "dataset": "small", "ground_truth": "5"} for i in range(40)]
    write_jsonl(folder / "train.jsonl", rows[:32])
    write_jsonl(folder / "test.jsonl", rows[32:])
    flags = {
        "model": folder / "model", "data": [str(folder / "train.jsonl")], "max_length": 64, "max_new_tokens": 8, "lr": 1e-3,
        "steps": 6, "epochs": 9, "save_every": 0, "slots": 16, "verifier_workers": 1, "log_samples": 4,
    }  # fmt: skip
    return flags, config, tokenizer


def rewarded_by_a_built_in(folder, start):
    """The flags of a run that a process of its own can make, which knows no verifier of the tests."""
    letters = [{"letter": letter, "let_frequency": 1, "let_relation": "at least"} for letter in "ae,"]
    truth = {"instruction_id_list": ["keywords:letter_frequency"] * 3, "kwargs": letters}
    rows = [{"messages": [user(f"{i}?")], "dataset": "ifeval", "ground_truth": truth} for i in range(32)]
    return start | {"data": [write_jsonl(folder / "train.jsonl", rows)], "max_new_tokens": 12, "steps": 8, "save_every": 1}


def rewarded_at_random(folder):
    """Training data for a negative control: the reward is a hash of the text."""
    rows = [{"messages": [user(f"{i}?")], "dataset": "coin", "ground_truth": "x"} for i in range(32)]
    return [write_jsonl(folder / "coin.jsonl", rows)]


def stop_twice(script, out, flags, decode_calls):
    """Stops a run at the start of step 4 by an exception, and its continuation in a rollout by SIGTERM."""
    sync, decode, syncs, calls = Sampler.sync, Sampler._run, [], []

    def breaks(self, policy):
        syncs.append(1)
        if len(syncs) == 4:
            raise KeyboardInterrupt
        return sync(self, policy)

    def terminated(self, params):
        calls.append(1)
        if len(calls) == decode_calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(self, params)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Sampler, "sync", breaks)
        launch.call(script, out=out, **flags)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(Sampler, "_run", terminated)
        launch.call(script, out=out, **flags)
    assert stopped.value.code == 143 and len(calls) == decode_calls


def kill_five_times(script, processes, out, flags):
    """kill -9 of all processes at any moment of a run, then the same command to its end."""
    rng = np.random.default_rng(processes)
    for _ in range(5):
        process = launch.start(script, processes, out=out, **flags)
        while not (out / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 4))
        launch.kill(process)
    launch.run(script, processes, out=out, **flags)
