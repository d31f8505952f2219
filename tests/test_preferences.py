"""reward_model.py and dpo.py: the pairs they read, their losses against float64, and runs as users start them."""

import copy
import json
import math
import os
import random
import shutil
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assistant, shared, tokenizer_folder, user, write_jsonl
from launch import MEASURED, call, metrics, run, start, trace
from safetensors.torch import load_file, save_file
from test_kernels import relative_error, tiny_config
from test_sft import assert_same_trajectory
from together import train
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common
import dpo
import kernels.head
import reward_model
from common import ChatFormat, PairEncoder, Skip, load_rows, load_tokenizer
from pipeline import convert


def hh_pairs(folder, count):
    """`count` real pairs, made by the converter of the README."""
    source = shared("data", "preference", "hh_helpful_base.train.jsonl")
    convert.main(convert.Args([str(source)], str(folder / "pairs.jsonl")))
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    return write_jsonl(folder / "hh.jsonl", [json.loads(line) for line in lines if len(line) < 700][:count])


# -------------------------------------------------------------------------------------------------------------- rows


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(load_tokenizer(tokenizer_folder("byte_level"), "tulu"))


def encoder(chat, max_length=200, overlong="truncate"):
    return PairEncoder(chat, len(chat.tokenizer), max_length, overlong)


def test_published_forms_of_a_pair_are_the_same_pair(chat):
    """Whole conversations (with a prompt beside them or not), answers in lists, and strings."""
    question, good, bad = [user("What is 2 + 3?")], assistant("It is 5."), assistant("Six")
    rows = [
        {"chosen": [*question, good], "rejected": [*question, bad]},
        {"chosen": [*question, good], "rejected": [*question, bad], "prompt": "What is 2 + 3?"},
        {"prompt": question, "chosen": [good], "rejected": [bad]},
        {"prompt": "What is 2 + 3?", "chosen": "It is 5.", "rejected": "Six", "margin": 0, "subset": ""},
    ]
    encoded = [encoder(chat)(row) for row in rows]
    assert all(e == encoded[0] for e in encoded)
    n = encoded[0]["chosen_length"]
    for ids, trained, answer in (
        (encoded[0]["input_ids"][:n], encoded[0]["trained"][:n], "It is 5."),
        (encoded[0]["input_ids"][n:], encoded[0]["trained"][n:], "Six"),
    ):
        assert chat.tokenizer.decode([i for i, t in zip(ids, trained, strict=True) if t]) == answer + "</s>"


def test_only_the_last_answer_is_trained(chat):
    before = [user("a"), assistant("first"), user("b")]
    encoded = encoder(chat)({"chosen": [*before, assistant("x")], "rejected": [*before, assistant("y")]})
    ids, trained = np.array(encoded["input_ids"]), np.array(encoded["trained"])
    assert chat.tokenizer.decode(ids[trained]) == "x</s>y</s>"


QUESTION = [user("What?")]
A, B = [*QUESTION, assistant("yes")], [*QUESTION, assistant("no")]


@pytest.mark.parametrize(
    "row, error, message",
    [
        ({"rejected": B}, ValueError, "chosen is missing or null"),
        ({"chosen": A, "rejected": None}, ValueError, "rejected is missing or null"),
        ({"chosen": "yes", "rejected": "no"}, ValueError, "needs a field 'prompt'"),
        ({"chosen": [assistant("yes")], "rejected": [assistant("no")]}, ValueError, "needs a field 'prompt'"),
        ({"chosen": QUESTION, "rejected": B}, ValueError, "chosen ends with a user message"),
        ({"chosen": 3, "rejected": B}, ValueError, "chosen is a number"),
        ({"chosen": [{"role": "bot", "content": "x"}], "rejected": B}, ValueError, r"chosen\[0\].role is 'bot'"),
        ({"prompt": " ", "chosen": "yes", "rejected": "no"}, ValueError, "a prompt needs text"),
        ({"prompt": {}, "chosen": "yes", "rejected": "no"}, ValueError, "prompt is an object"),
        ({"chosen": A, "rejected": B, "margin": math.nan}, ValueError, "margin is nan"),
        ({"chosen": A, "rejected": B, "margin": "2"}, ValueError, "margin is '2'"),
        ({"chosen": A, "rejected": B, "subset": 1}, ValueError, "subset is a number"),
        ({"chosen": A, "rejected": A}, Skip, "chosen and rejected are the same$"),
        ({"prompt": "What?", "chosen": "yes", "rejected": ""}, Skip, "an assistant turn is empty"),
        ({"chosen": A, "rejected": [user("Why?"), assistant("no")]}, Skip, "differ before their last turn"),
    ],
)
def test_pairs_that_cannot_be_used(chat, row, error, message):
    """An error for what is wrong, a counted skip for what merely teaches nothing."""
    with pytest.raises(error, match=message):
        encoder(chat)(row)


def test_long_pairs(chat):
    long = "one two three four five six seven eight nine ten " * 9
    row = {"prompt": "What?", "chosen": long + "yes", "rejected": long + "no"}
    with pytest.raises(Skip, match="the same within --max_length"):
        encoder(chat, 60)(row)
    with pytest.raises(Skip, match="longer than --max_length"):
        encoder(chat, 60, "drop")(row)
    encoded = encoder(chat, 60)(row | {"rejected": "no"})
    assert encoded["chosen_length"] == 60 and encoded["notes"] == ["truncated to --max_length"]


def test_rows_give_chosen_then_rejected(chat, tmp_path):
    """`sequences` is what `pack` takes; skips are counted; margin and subset are kept, and part of the fingerprint."""
    rows = [{"chosen": A, "rejected": B, "margin": 0.5, "subset": "s"}, {"chosen": A, "rejected": A}]
    rows += [{"chosen": B, "rejected": A, "margin": 1.0}] * 150
    loaded = load_rows([str(write_jsonl(tmp_path / "a.jsonl", rows))], encoder(chat))
    assert len(loaded) == 151 and "1 skipped: chosen and rejected are the same (first: row 2)" in loaded.report[1]
    texts = [chat.tokenizer.decode(ids[trained]) for ids, trained in loaded.sequences([0, 150])]
    assert texts == ["yes</s>", "no</s>", "no</s>", "yes</s>"]
    assert loaded.table[0]["margin"] == 0.5 and loaded.table[0]["subset"] == "s" and loaded.where(1) .endswith("row 3")
    rows[0]["margin"] = 0.25
    again = load_rows([str(write_jsonl(tmp_path / "a.jsonl", rows))], encoder(chat))
    assert again.fingerprint != loaded.fingerprint


# ------------------------------------------------------------------------------------------------------------- losses


@pytest.fixture(scope="module")
def hh_sequences(tmp_path_factory):
    """Six real pairs as twelve (input_ids, trained): chosen, rejected, chosen, …"""
    chat = ChatFormat(load_tokenizer(shared("models", "stories260k"), "tulu"))
    path = hh_pairs(tmp_path_factory.mktemp("hh"), 6)
    return load_rows([str(path)], PairEncoder(chat, 512, 300, "truncate")).sequences(range(6))


@pytest.mark.parametrize(
    "length_normalize, label_smoothing, nll_coef",
    [(False, 0.0, 0.0), (True, 0.0, 0.0), (False, 0.1, 0.0), (False, 0.0, 0.5), (True, 0.1, 0.2)],
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_dpo_loss_and_gradient_equal_the_equations(family, length_normalize, label_smoothing, nll_coef, hh_sequences):
    """Packed float32 against float64 from all the logits, one sequence at a time, written from the paper: ≤ 1e-5."""
    torch.manual_seed(0)
    config = tiny_config(family, 512, tied=True)
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").double()
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="packed")
    model.load_state_dict(eager.state_dict())
    reference = copy.deepcopy(eager)
    for parameter in reference.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)

    def answer(model, ids, trained):
        """log π(y | x), and the number of tokens of y."""
        ids, mask = torch.tensor(ids).long(), torch.tensor(trained)[1:]
        logp = model(ids[None]).logits[0].log_softmax(-1)[:-1]
        return logp[mask].gather(1, ids[1:][mask][:, None]).sum(), mask.sum()

    args = dpo.Args(
        beta=0.3, length_normalize=length_normalize, label_smoothing=label_smoothing, nll_coef=nll_coef
    )  # fmt: skip
    with torch.no_grad():
        ref = torch.stack([answer(reference, *sequence)[0] for sequence in hh_sequences]).view(-1, 2)
    logprobs, lengths = dpo.Policy(model)(common.pack(hh_sequences, "cpu"))
    losses, values = dpo.preference_loss(args, logprobs, lengths, ref)
    losses.mean().backward()

    truth = 0.0
    for i in range(6):
        h = 0.0
        for side, sign in ((0, 1), (1, -1)):
            logprob, length = answer(eager, *hh_sequences[2 * i + side])
            ratio = logprob - ref[i, side]
            h = h + sign * args.beta * (ratio / length if length_normalize else ratio)
            assert lengths[2 * i + side] == length
            if side == 0:
                nll = -logprob / length  # of this pair's own answer, whatever the others' lengths are
        truth = truth + (-(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)) / 6
        truth = truth + nll_coef * nll / 6
        assert abs(values["chosen_nll"][i].item() - nll.item()) <= 1e-5 * nll.item()
        assert abs(values["margin"][i].item() - h.item()) <= 1e-5 * max(1, abs(h.item()))
    truth.backward()
    assert abs(losses.mean().item() - truth.item()) <= 1e-5 * truth.item()
    for (name, a), (_, b) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
        assert relative_error(a.grad, b.grad) <= 1e-5, name


@pytest.mark.parametrize("centering, margins", [(0.0, [0.0] * 6), (0.01, [0.5, 1.0, 0.0, 2.0, 0.0, 0.1])])
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo3", "gemma2", "gemma3"])
def test_reward_loss_and_gradient_equal_the_equations(family, centering, margins, hh_sequences, tmp_path):
    """Packed float32 against transformers' own sequence classification in float64, one sequence at a time: ≤ 1e-5."""
    config = tiny_config(family, 512, tied=False)
    AutoModelForCausalLM.from_config(copy.deepcopy(config)).save_pretrained(tmp_path)
    torch.manual_seed(3)
    source, info = reward_model.ScoreModel.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()) and source.config.num_labels == 1
    eager = AutoModelForSequenceClassification.from_config(source.config, attn_implementation="eager").double()
    eager.load_state_dict(source.state_dict())
    config = copy.deepcopy(source.config)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="packed", dtype=torch.float32)
    model.load_state_dict(source.state_dict())

    args, margins = SimpleNamespace(centering=centering), torch.tensor(margins)
    scores = reward_model.RewardModel(model)(common.pack(hh_sequences, "cpu"))
    losses, values = reward_model.ranking_loss(args, scores, margins)
    losses.mean().backward()
    truth = 0.0
    for i in range(6):
        r_c, r_r = (eager(torch.tensor(ids)[None].long()).logits[0, 0] for ids, _ in hh_sequences[2 * i : 2 * i + 2])
        truth = truth + (-F.logsigmoid(r_c - r_r - margins[i].double()) + centering * (r_c + r_r) ** 2) / 6
        assert (values["accuracy"][i] == (r_c > r_r)).item()
        torch.testing.assert_close(values["chosen_score"][i].double(), r_c, rtol=1e-5, atol=1e-5)
    truth.backward()
    assert abs(losses.mean().item() - truth.item()) <= 1e-5 * truth.item()
    for (name, a), (_, b) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
        assert relative_error(a.grad, b.grad) <= 1e-5, name


def test_a_new_score_head_is_drawn_from_the_seed(tmp_path):
    """N(0, 1/(H+1)); the same for the same seed; one that is there already is kept."""
    config = tiny_config("llama", 512, tied=False)
    config.hidden_size, config.intermediate_size = 4096, 8
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "language_model")

    def head(path, seed):
        torch.manual_seed(seed)
        model, _ = reward_model.ScoreModel.from_pretrained(path, output_loading_info=True)
        return model, model.score.weight.detach()

    model, first = head(tmp_path / "language_model", 1)
    assert torch.equal(head(tmp_path / "language_model", 1)[1], first)
    assert not torch.equal(head(tmp_path / "language_model", 2)[1], first)
    assert first.shape == (1, 4096) and abs(first.var().item() * 4097 - 1) < 0.1 and abs(first.mean().item()) < 1e-3
    model.save_pretrained(tmp_path / "reward_model")
    assert torch.equal(head(tmp_path / "reward_model", 2)[1], first)


def test_wilson_interval():
    """Against the roots of (p - share)² = z² p (1 - p) / n, the definition."""
    for right, total in ((0, 10), (3, 10), (10, 10), (412, 1000)):
        interval = reward_model.wilson_interval(right, total)
        for p in (interval["low"], interval["high"]):
            assert math.isclose((p - right / total) ** 2, 1.96**2 * p * (1 - p) / total, abs_tol=1e-12)


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def hh(tmp_path_factory):
    """A real model and 48 real pairs, and the flags of a run of 12 steps on them."""
    folder = tmp_path_factory.mktemp("hh_runs")
    lines = open(hh_pairs(folder, 48)).readlines()
    (folder / "train.jsonl").write_text("".join(lines[:40]))
    (folder / "test.jsonl").write_text("".join(lines[40:]))
    return {
        "model": shared("models", "stories260k"), "chat_template": "tulu", "max_length": 400, "max_skip_frac": 0.5,
        "overlong": "drop", "data": folder / "train.jsonl", "eval_data": folder / "test.jsonl", "batch_size": 4, "lr": 1e-5, "steps": 12, "epochs": 2,
        "save_every": 0, "eval_every": 6,
    }  # fmt: skip


@pytest.fixture(scope="module", params=["dpo.py", "reward_model.py"])
def reference(request, hh, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "run"
    stdout, _ = run(request.param, out=out, **hh)
    return request.param, out, stdout


KEYS = {
    "dpo.py": {"chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob", "chosen_nll"},
    "reward_model.py": {"chosen_score", "rejected_score"},
}


def test_learns_and_reports(reference):
    """Every promised metric; the first DPO loss is log 2."""
    script, out, stdout = reference
    entries = metrics(out)
    assert [entry["step"] for entry in entries] == list(range(13))
    keys = {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds", "accuracy", "margin"} | KEYS[script]
    assert all(keys <= entry.keys() for entry in entries[1:])
    assert {"eval_loss", "eval_accuracy"} <= entries[0].keys() & entries[-1].keys()
    assert "40 rows read" in stdout and stdout.count("⟦") == 2  # the audit, and the pair, its trained tokens in brackets
    if script == "dpo.py":
        for loss in (entries[0]["eval_loss"], entries[1]["loss"]):
            assert math.isclose(loss, math.log(2), rel_tol=1e-6)


@pytest.mark.parametrize(
    "processes, flags",
    [
        (1, {"tokens_per_microbatch": 1}),  # one pair at a time
        pytest.param(2, {"tokens_per_microbatch": 1000, "activation_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param(4, {"shard": "hybrid"}, marks=pytest.mark.slow),
    ],
)
def test_how_a_batch_is_cut_and_dealt_does_not_change_the_loss(hh, reference, tmp_path, processes, flags):
    """Any microbatch size, on 1, 2 and 4 processes: equal to 1e-6; DPO's loss to 1e-5, because it is made of
    differences of sums of some hundred nats, whose float32 rounding (6e-8 of 500, times β) alone is 3e-6 of it."""
    script, out, _ = reference
    run(script, processes=processes, out=tmp_path / "run", **hh, **flags)
    assert_same_trajectory(trace(tmp_path / "run"), trace(out), 1e-5 if script == "dpo.py" else 1e-6)


def test_nll_does_not_depend_on_how_a_batch_is_cut(hh, tmp_path, monkeypatch):
    """--nll_coef is a mean over pairs, whatever their lengths: one at a time, or on two processes, the same to 1e-5."""
    # Another test's reference may have been computed with other instructions: the first margins would not be 0.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    flags = hh | {"nll_coef": 0.5, "steps": 10, "data": [str(hh["data"])], "eval_data": [str(hh["eval_data"])]}
    call(dpo, out=tmp_path / "one", **flags)
    call(dpo, out=tmp_path / "each", tokens_per_microbatch=1, **flags)
    train(2, dpo, out=tmp_path / "two", tokens_per_microbatch=1000, **flags)
    for name in ("each", "two"):
        assert_same_trajectory(trace(tmp_path / name), trace(tmp_path / "one"), 1e-5)
        for step, other in zip(trace(tmp_path / name)[1:], trace(tmp_path / "one")[1:], strict=True):
            assert math.isclose(step[3], other[3], rel_tol=1e-4)  # the gradient's norm: Adam and the clip hide a factor
    first = metrics(tmp_path / "one")[0]
    assert first["eval_chosen_nll"] > 1
    assert math.isclose(first["eval_loss"] - 0.5 * first["eval_chosen_nll"], math.log(2), rel_tol=1e-6)


@pytest.mark.parametrize(
    "flag, value",
    [("beta", 0.0), ("beta", -0.1), ("label_smoothing", -0.1), ("label_smoothing", 0.5), ("nll_coef", -0.2)],
)
def test_flags_that_make_no_sense_are_refused_at_the_start(flag, value, tmp_path):
    """One line that names the flag and its value, before a model or data are looked for."""
    with pytest.raises(common.RunError, match=rf"^--{flag} {value} has to be [^\n]*$"):
        call(dpo, model=tmp_path / "none", data=[str(tmp_path / "none.jsonl")], out=tmp_path / "run", **{flag: value})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # the plumbing is sft.py's, whose kills are in CI
@pytest.mark.parametrize("signals", [(9, 15), (9, 9, 9, 15, 9)])
@pytest.mark.parametrize("script", ["dpo.py", pytest.param("reward_model.py", marks=pytest.mark.slow)])
def test_killed_terminated_continued_finished(script, signals, tiny_model, tmp_path, capfd):
    """kill -9 (also inside a save) and SIGTERM: the same command gives bit for bit the same run; then it does nothing."""
    rows = [{"prompt": f"What is {i} + {i}?" * (1 + i % 3), "chosen": f"{2 * i}.", "rejected": "No."} for i in range(33)]
    flags = {
        "model": tiny_model, "data": write_jsonl(tmp_path / "rows.jsonl", rows), "max_length": 128, "batch_size": 4,
        "epochs": 2.4, "tokens_per_microbatch": 128, "lr": 1e-3, "save_every": 2,
    }  # fmt: skip
    run(script, out=tmp_path / "whole", **flags)
    out, rng = tmp_path / "run", random.Random(0)
    for number in signals:
        started, process = time.time(), start(script, out=out, **flags)
        before = len(list(out.glob("checkpoints/step_*")))
        while process.poll() is None:
            log = out / "metrics.jsonl"  # written by this process: before, SIGTERM would find it importing
            steps = log.read_bytes().count(b"\n") if log.exists() and log.stat().st_mtime > started else 0
            saving = any(out.glob("checkpoints/*.tmp"))
            if steps >= rng.randint(3, 4) + 2 * before and (saving or number == 15):
                break
        process.send_signal(number)
        process.communicate()
        assert process.returncode in (-9, 143), "it finished before it could be stopped"
    run(script, out=out, **flags)
    weights = (out / "model" / "model.safetensors").read_bytes()
    assert trace(out) == trace(tmp_path / "whole") and len(trace(out)) == 20
    assert weights == (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    call({"dpo.py": dpo, "reward_model.py": reward_model}[script], out=out, **flags | {"data": [flags["data"]]})
    assert "is finished" in capfd.readouterr().out and weights == (out / "model" / "model.safetensors").read_bytes()


def test_reward_model_opens_elsewhere(hh, reference):
    """AutoModelForSequenceClassification gives the scores behind the reported accuracy."""
    script, out, _ = reference
    if script != "reward_model.py":
        model = AutoModelForCausalLM.from_pretrained(out / "model")
        assert model.config.architectures == ["LlamaForCausalLM"]
        return
    model, info = AutoModelForSequenceClassification.from_pretrained(out / "model", output_loading_info=True)
    assert not any(info.values()) and model.config.num_labels == 1
    tokenizer, right, losses = AutoTokenizer.from_pretrained(out / "model"), [], []
    for row in map(json.loads, open(hh["eval_data"])):
        ids = [tokenizer.apply_chat_template(row[side], return_dict=False) for side in ("chosen", "rejected")]
        if max(map(len, ids)) <= 400 and ids[0] != ids[1] and row["chosen"][:-1] == row["rejected"][:-1]:
            with torch.no_grad():
                chosen, rejected = (model(torch.tensor([x])).logits[0, 0] for x in ids)
            right.append((chosen > rejected).item())
            losses.append(-F.logsigmoid(chosen - rejected).item())
    last = metrics(out)[-1]
    assert math.isclose(np.mean(right), last["eval_accuracy"])
    assert math.isclose(np.mean(losses), last["eval_loss"], rel_tol=1e-4)


@pytest.mark.parametrize("module", [dpo, reward_model])
def test_stop_step_stops_and_the_rest_is_the_same(module, hh, tmp_path):
    """Stopped twice: learning rates and losses are those of one run."""
    flags = {**hh, "data": [str(hh["data"])], "eval_data": [], "steps": 6}
    call(module, out=tmp_path / "whole", **flags)
    for stop in (2, 5, None):
        call(module, out=tmp_path / "run", **flags, stop_step=stop)
        assert metrics(tmp_path / "run")[-1]["step"] == (stop or 6)
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")


@pytest.mark.parametrize("template", ["tulu", "chatml"])
def test_no_end_of_an_answer_is_padding(template, tiny_model, tmp_path):
    """transformers scores the last token that is not padding: that has to be no end of a turn and no end token."""
    config = AutoConfig.from_pretrained(tiny_model)
    config.pad_token_id = config.eos_token_id
    shutil.copytree(tiny_model, tmp_path / "model")
    config.save_pretrained(tmp_path / "model")
    pairs = [{"prompt": f"{i}?", "chosen": "It is 5.", "rejected": "No."} for i in range(4)]
    flags = {"data": [write_jsonl(tmp_path / "pairs.jsonl", pairs)], "max_length": 64, "batch_size": 4, "epochs": 1}
    call(reward_model, model=tmp_path / "model", chat_template=template, out=tmp_path / "run", **flags)
    assert AutoConfig.from_pretrained(tmp_path / "run" / "model").pad_token_id is None


def easy_pairs(path, shuffled, seed, count=192):
    """The polite answer is preferred; `shuffled` chooses by a coin."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        sides = [f"Yes please, {i % 7} of them.", f"No way, {i % 7} of them."]
        if shuffled and rng.random() < 0.5:
            sides.reverse()
        rows.append({"prompt": f"Do you want {rng.randint(1, 99)} apples?", "chosen": sides[0], "rejected": sides[1]})
    return write_jsonl(path, rows)


@pytest.mark.parametrize("module", [dpo, reward_model])
def test_learns_what_labels_say_and_nothing_from_shuffled_ones(module, tiny_model, tmp_path):
    """Held-out accuracy 1 with labels; with labels drawn by a coin, 0.5 within the 99.9 % interval, and no better loss."""
    test = easy_pairs(tmp_path / "test.jsonl", shuffled=True, seed=9)
    for shuffled in (False, True):
        train = easy_pairs(tmp_path / f"train_{shuffled}.jsonl", shuffled, seed=1)
        out = tmp_path / str(shuffled)
        held_out = test if shuffled else easy_pairs(tmp_path / "clean.jsonl", shuffled=False, seed=9)
        call(module, model=tiny_model, data=[train], eval_data=[held_out], out=out, max_length=128, batch_size=16,
             lr=3e-3, epochs=2, save_every=0)  # fmt: skip
        accuracy = metrics(out)[-1]["eval_accuracy"]
        if not shuffled:
            assert accuracy == 1.0
        else:
            interval = reward_model.wilson_interval(accuracy * 192, 192, z=3.3)
            assert interval["low"] <= 0.5 <= interval["high"], interval
            assert metrics(out)[-1]["eval_loss"] > math.log(2) - 0.02


def test_accuracy_by_subset(tiny_model, tmp_path):
    """--eval_data with subsets: accuracy of each with its interval, and their mean."""
    rows = [json.loads(line) for line in open(easy_pairs(tmp_path / "a.jsonl", shuffled=False, seed=1, count=32))]
    test = [row | {"subset": "easy"} for row in rows[:20]]
    test += [{"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"], "subset": "trap"} for r in rows[:8]]
    call(
        reward_model, model=tiny_model, data=[write_jsonl(tmp_path / "train.jsonl", rows)], out=tmp_path / "run",
        eval_data=[write_jsonl(tmp_path / "test.jsonl", test)], max_length=128, batch_size=8, lr=3e-3, epochs=4,
    )  # fmt: skip
    last = metrics(tmp_path / "run")[-1]
    assert last["eval_subsets"]["easy"]["share"] == 1 and last["eval_subsets"]["easy"]["total"] == 20
    assert last["eval_subsets"]["trap"] == reward_model.wilson_interval(0, 8)
    assert last["eval_subsets_mean"] == 0.5 and math.isclose(last["eval_accuracy"], 20 / 28)


# -------------------------------------------------------------------------------------------------- the reference's file


@pytest.fixture
def cached(tiny_model, tmp_path, monkeypatch, capfd):
    """(flags of a short DPO run with its own cache folder, function that runs it and returns its trace)."""
    rows = [{"prompt": f"What is {i} + {i}?", "chosen": f"It is {2 * i}.", "rejected": "No."} for i in range(24)]
    data, cache = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "cache"
    flags = {"model": tiny_model, "data": [data], "max_length": 64, "batch_size": 2, "lr": 1e-3, "save_every": 0}
    cache.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))

    def go(name, **more):
        call(dpo, out=tmp_path / name, **flags | more)
        stdout, stderr = capfd.readouterr()
        return trace(tmp_path / name), stdout, "log π_ref of" in stdout

    return cache, go, tmp_path


def test_the_cache_changes_nothing_and_serves_other_betas(cached):
    cache, go, _ = cached
    first, _, computed = go("first")
    assert computed and len(list(cache.glob("reference_*.safetensors"))) == 1 and not list(cache.glob("*.tmp"))
    again, _, computed = go("again")
    assert not computed and again == first
    other, _, computed = go("other", beta=0.7)
    assert not computed and other != first


def stored(cache):
    """(N, 2) numbers of the cache's one file."""
    (path,) = cache.glob("reference_*.safetensors")
    return load_file(path)["logprobs"]


@pytest.fixture
def computed_pairs(monkeypatch):
    """A list to which every pass of a reference adds how many pairs it held."""
    counts, forward = [], dpo.Policy.forward

    def count(self, microbatch):
        if not self.training:
            counts.append((len(microbatch.cu_seqlens) - 1) // 2)
        return forward(self, microbatch)

    monkeypatch.setattr(dpo.Policy, "forward", count)
    return counts


def test_only_pairs_that_the_run_sees_are_computed(cached, computed_pairs):
    """Three steps of two pairs need six of 24. Another seed adds those it lacks, and no number in the file changes."""
    cache, go, _ = cached
    few, _, _ = go("few", steps=3)
    seen = set(common.stream(24, 1, range(6)))
    first = stored(cache)
    assert sum(computed_pairs) == 6 and set(np.flatnonzero(~first.isnan().any(1))) == seen
    computed_pairs.clear()
    go("other", steps=4, seed=2)
    other = set(common.stream(24, 2, range(8)))
    assert 0 < len(seen & other) < 8, "the two have some pairs in common"
    assert sum(computed_pairs) == len(other - seen) and set(np.flatnonzero(~stored(cache).isnan().any(1))) == seen | other
    assert torch.equal(stored(cache)[list(seen)], first[list(seen)])
    computed_pairs.clear()
    assert go("few again", steps=3)[0] == few and not computed_pairs
    go("all", epochs=2)
    assert sum(computed_pairs) == 24 - len(seen | other) and not stored(cache).isnan().any()
    first = stored(cache)
    computed_pairs.clear()
    go("still all", epochs=3, seed=5)
    assert not computed_pairs and torch.equal(stored(cache), first)


def test_stop_step_computes_what_the_whole_run_needs(cached, computed_pairs):
    """So that what comes after the stop is, to the bit, what it would have been without one."""
    cache, go, _ = cached
    go("stopped", steps=8, stop_step=2)
    assert sum(computed_pairs) == 16
    rest, _, computed = go("stopped", steps=8)
    assert not computed
    for path in cache.glob("reference_*"):
        path.unlink()
    assert go("whole", steps=8)[0] == rest


def test_another_run_came_first(cached, monkeypatch):
    """What a second run has written while this one computed is what both use, so that this one's rest will find it."""
    cache, go, _ = cached
    add = dpo.add_to_reference

    def add_after_another(path, key, values):
        other = values + 0.5  # far from rounding, so that it shows whose numbers are used
        other[12:] = math.nan
        add(path, key, other)
        return add(path, key, values)

    monkeypatch.setattr(dpo, "add_to_reference", add_after_another)
    first, _, _ = go("first")
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    again, _, computed = go("again")
    assert not computed and again == first
    plain = stored(cache)
    for path in cache.glob("reference_*"):
        path.unlink()
    go("alone")
    difference = plain - stored(cache)
    torch.testing.assert_close(difference[:12], torch.full_like(difference[:12], 0.5))
    assert torch.equal(plain[12:], stored(cache)[12:])


def test_killed_while_it_writes_the_reference(cached, monkeypatch):
    """Half a file under its temporary name: the next run is what it would have been, and leaves a whole file."""
    cache, go, _ = cached
    whole, _, _ = go("whole")
    for path in cache.glob("reference_*"):
        path.unlink()

    def half(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        path.write_bytes(path.read_bytes()[:-20])
        raise KeyboardInterrupt

    monkeypatch.setattr(dpo, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        go("run")
    assert len(list(cache.glob("reference_*.tmp"))) == 1
    monkeypatch.setattr(dpo, "save_file", save_file)
    assert go("run")[0] == whole and not list(cache.glob("reference_*.tmp")) and not go("again")[2]


def test_other_content_is_another_file(cached, tiny_model):
    """Other weights or tokens never meet an old file, even where the model's folder has the same name."""
    cache, go, folder = cached
    model = folder / "model"
    shutil.copytree(tiny_model, model)
    go("first", model=model)
    weights = AutoModelForCausalLM.from_pretrained(model)
    weights.model.embed_tokens.weight.data[5] += 0.1
    weights.save_pretrained(model)
    assert go("other_weights", model=model)[2]
    assert go("other_template", model=model, chat_template="chatml")[2]
    assert len(list(cache.glob("reference_*.safetensors"))) == 3


@pytest.fixture
def hash_of(monkeypatch):
    """Function that says the hash of a reference, as one of several ranks computes it together with the others."""

    def hash_of(model, ranks=1, device="cpu"):
        shares = {}
        for rank in [*range(ranks), 0]:  # rank 0 comes again when all shares are there
            alone = SimpleNamespace(
                get_rank=lambda rank=rank: rank, get_world_size=lambda: ranks, broadcast_object_list=lambda box: None,
                all_gather_object=lambda box, share, rank=rank: shares.__setitem__(rank, share)
                or box.__setitem__(slice(None), [shares.get(i, []) for i in range(ranks)]),
            )  # fmt: skip
            monkeypatch.setattr(dpo, "dist", alone)
            monkeypatch.setattr(dpo, "on_rank0", lambda function: function())
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(min(ranks, 2)))
            args = dpo.Args(model=str(model), max_length=64)
            digest = dpo.hash_reference(args, common.load_config(args), torch.device(device))
        return digest, shares

    return hash_of


def test_the_reference_is_known_by_the_bytes_of_its_files(tiny_model, tmp_path, hash_of, monkeypatch):
    """Weights, configuration, code and kind of device make the hash; where the folder is does not, nor who reads what."""
    monkeypatch.setattr(common, "read_weights", lambda *args: pytest.fail("no tensor is read"))
    for name in ("same", "weights", "config"):
        shutil.copytree(tiny_model, tmp_path / name)
    with open(tmp_path / "weights" / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read()[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    config = json.loads((tmp_path / "config" / "config.json").read_text())
    (tmp_path / "config" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    digest, _ = hash_of(tiny_model)
    assert hash_of(tmp_path / "same")[0] == digest
    others = [hash_of(tmp_path / name)[0] for name in ("weights", "config")] + [hash_of(tiny_model, device="meta")[0]]
    text = (code := Path(kernels.head.__file__)).read_text()
    monkeypatch.setattr(Path, "read_text", lambda path, read=Path.read_text, **kwargs: read(path, **kwargs) + "#" * (path == code))
    assert text != code.read_text()
    others.append(hash_of(tiny_model)[0])
    assert len({digest, *others}) == 5


def test_ranks_share_the_files_of_a_reference(tiny_model, tmp_path, hash_of):
    """Each file is read once, on the node of rank 0, and every file counts; PyTorch's own format is taken, too."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(tmp_path / "parts", max_shard_size="20kB")
    digest, shares = hash_of(tmp_path / "parts", ranks=4)
    names = sorted(path.name for path in (tmp_path / "parts").glob("model*"))
    assert len(names) > 4 and sorted(name for share in shares.values() for name, _ in share) == names
    assert shares[2] == shares[3] == [] and abs(len(shares[0]) - len(shares[1])) <= 1
    assert hash_of(tmp_path / "parts")[0] == digest
    part = tmp_path / "parts" / names[-2]
    part.write_bytes(part.read_bytes() + b" ")
    assert hash_of(tmp_path / "parts")[0] != digest
    model.config.save_pretrained(tmp_path / "bin")
    with pytest.raises(common.RunError, match="it has no model.safetensors"):
        hash_of(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert [name for name, _ in hash_of(tmp_path / "bin")[1][0]] == ["pytorch_model.bin"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "stale", "empty"])
def test_a_damaged_cache_is_noticed_and_made_anew(cached, damage):
    cache, go, _ = cached
    first, _, _ = go("first")
    (path,) = cache.glob("reference_*.safetensors")
    content = path.read_bytes()
    flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    stale = content.replace(b'"key":"', b'"key":"0')
    stale = (int.from_bytes(stale[:8], "little") + 1).to_bytes(8, "little") + stale[8:]
    bad = {"truncated": content[:-9], "flipped": flipped, "stale": stale, "empty": b""}[damage]
    path.write_bytes(bad)
    again, stdout, computed = go("again")
    assert computed and "is damaged" in stdout and again == first
    assert not go("once more")[2]


@pytest.mark.slow
def test_two_runs_share_a_cache(cached, tiny_model, tmp_path):
    """Started together: both finish, with the same result, and the file they leave is whole; also with other pairs."""
    cache, _, folder = cached
    environment = {"HF_DATASETS_CACHE": str(cache)}
    flags = {"model": tiny_model, "data": folder / "rows.jsonl", "max_length": 64, "batch_size": 2, "lr": 1e-3}
    runs = [start("dpo.py", env=environment, out=folder / name, save_every=0, **flags) for name in ("a", "b")]
    for process in runs:
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, f"{stdout}\n{stderr}"
    assert trace(folder / "a") == trace(folder / "b")
    stdout, _ = run("dpo.py", env=environment, out=folder / "c", save_every=0, **flags)
    assert trace(folder / "c") == trace(folder / "a") and "log π_ref of" not in stdout
    for path in cache.glob("reference_*"):
        path.unlink()
    runs = [start("dpo.py", env=environment, out=folder / f"seed{seed}", save_every=0, steps=4, seed=seed, **flags)
            for seed in (1, 2)]  # fmt: skip
    for process in runs:
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, f"{stdout}\n{stderr}"
    wanted = {pair for seed in (1, 2) for pair in common.stream(24, seed, range(8))}
    assert set(np.flatnonzero(~stored(cache).isnan().any(1))) == wanted


def test_another_reference(tiny_model, tmp_path):
    """--ref_model: its own log-probabilities, so the first loss is not log 2; another vocabulary is an error."""
    rows = [{"prompt": "What?", "chosen": f"Yes, {i}.", "rejected": "No."} for i in range(12)]
    flags = {"data": [write_jsonl(tmp_path / "rows.jsonl", rows)], "max_length": 64, "batch_size": 4}
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    other.model.norm.weight.data *= 0.5
    other.save_pretrained(tmp_path / "other")
    call(dpo, model=tiny_model, ref_model=tmp_path / "other", out=tmp_path / "run", **flags)
    assert abs(metrics(tmp_path / "run")[0]["loss"] - math.log(2)) > 1e-5
    other.resize_token_embeddings(other.config.vocab_size + 8)
    other.save_pretrained(tmp_path / "larger")
    size = other.config.vocab_size
    with pytest.raises(common.RunError, match=f"--ref_model has a vocabulary of {size}, --model one of {size - 8}"):
        call(dpo, model=tiny_model, ref_model=tmp_path / "larger", out=tmp_path / "no", **flags)


def test_the_reference_does_not_stay_in_memory(tiny_model, tmp_path, monkeypatch):
    """Two references (for training and held-out pairs) and the policy are loaded, each after the one before has gone."""
    loaded, load_model = [], dpo.load_model

    def load(*arguments):
        loaded.append(weakref.ref(module := load_model(*arguments)))
        assert not any(earlier() for earlier in loaded[:-1])
        return module

    monkeypatch.setattr(dpo, "load_model", load)
    rows = [{"prompt": "What?", "chosen": f"Yes, {i}.", "rejected": "No."} for i in range(8)]
    data, held_out = (write_jsonl(tmp_path / f"{n}.jsonl", rows[:n]) for n in (8, 4))
    call(dpo, model=tiny_model, data=[data], eval_data=[held_out], out=tmp_path / "run", max_length=64, batch_size=4)
    assert len(loaded) == 3


FEWER = [("dpo.py", 2), *(pytest.param(script, 4, marks=pytest.mark.slow) for script in ("dpo.py", "reward_model.py"))]


@pytest.mark.parametrize(("script", "processes"), FEWER)
def test_fewer_pairs_than_processes(script, processes, tiny_model, tmp_path):
    """A last batch of one pair, and half as many held-out pairs as processes: ranks without pairs take part and add nothing."""
    rows = [{"prompt": "What?", "chosen": f"Yes, {i}.", "rejected": "No."} for i in range(5)]
    flags = {
        "model": tiny_model, "data": write_jsonl(tmp_path / "rows.jsonl", rows), "max_length": 64, "batch_size": 4,
        "eval_data": write_jsonl(tmp_path / "held_out.jsonl", rows[: processes // 2]), "lr": 1e-4, "save_every": 0, "epochs": 1,
    }  # fmt: skip
    run(script, processes, out=tmp_path / "several", **flags)
    call({"dpo.py": dpo, "reward_model.py": reward_model}[script], out=tmp_path / "one",
         **flags | {"data": [flags["data"]], "eval_data": [flags["eval_data"]]})  # fmt: skip
    for several, one in zip(metrics(tmp_path / "several"), metrics(tmp_path / "one"), strict=True):
        uncertain = MEASURED | {"accuracy", "eval_accuracy"}  # DPO's first margins are rounding
        for key in one.keys() - uncertain:
            assert math.isclose(several[key], one[key], rel_tol=1e-4, abs_tol=1e-6), (key, several, one)


@pytest.mark.parametrize("module", [dpo, reward_model])
def test_what_is_not_finite_stops_the_run(module, tiny_model, tmp_path):
    """Before the update, naming the step and the rows; weights that are not numbers stop it at the start."""
    rows = [{"prompt": "What?", "chosen": f"Yes, {i}.", "rejected": "No."} for i in range(8)]
    flags = {"data": [write_jsonl(tmp_path / "rows.jsonl", rows)], "max_length": 64, "batch_size": 4, "max_grad_norm": 0.0}
    with pytest.raises(common.RunError, match=r"step 2: loss .*stopped before the update.*rows.jsonl, row \d"):
        call(module, model=tiny_model, out=tmp_path / "run", lr=1e38, lr_schedule="constant", epochs=4, **flags)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.norm.weight.data[3] = math.nan
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "nan")
    with pytest.raises(common.RunError, match="model.norm.weight holds values that are not finite"):
        call(module, model=tmp_path / "nan", out=tmp_path / "no", **flags)
