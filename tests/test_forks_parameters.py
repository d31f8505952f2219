"""The forks of another kind: which parameters learn (lora), with which optimizer (adam8bit), and turns with a tool (calculator).

peft and torchao are no requirements: without them, the tests that need them are skipped.
"""

import sys
from types import SimpleNamespace

import lawless  # noqa: F401 (registers verifiers)
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, assistant, user, write_jsonl
from forked import forked
from launch import call, metrics, trace, weights
from safetensors.torch import load_file
from together import train
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import sft
from kernels.sampler import Sampler

sys.path.insert(0, str(ROOT / "demo"))

import prepare  # noqa: E402


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A run of sft.py on sums, from the demo's model with random weights, whose layers are large enough for 8 bits."""
    folder = tmp_path_factory.mktemp("parameters")
    tokenizer = prepare.make_tokenizer()
    prepare.make_model(tokenizer, 1).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"messages": [user(f"{i}+{i}="), assistant(f"{2 * i}")]} for i in range(10, 58)]
    return {
        "model": folder / "model", "data": [write_jsonl(folder / "train.jsonl", rows[:32])],
        "eval_data": [write_jsonl(folder / "test.jsonl", rows[32:])], "max_length": 64, "batch_size": 8, "lr": 1e-2,
        "epochs": 2, "eval_every": 4, "save_every": 4,
    }  # fmt: skip


def prompts(folder, dataset):
    rows = [{"messages": [user(f"{i}+{i + 9}=")], "dataset": dataset, "ground_truth": "9"} for i in range(24)]
    return [write_jsonl(folder / f"{dataset}.jsonl", rows)]


def rl_flags(flags, folder, dataset="small"):
    sampling = {"max_new_tokens": 12, "group_size": 4, "slots": 16, "verifier_workers": 1, "log_samples": 4}
    start = {"model": flags["model"], "max_length": 64, "batch_size": 4, "epochs": 9, "steps": 3, "save_every": 0}
    return start | sampling | {"data": prompts(folder, dataset), "lr": 1e-2, "activation_checkpointing": False}


def held_out_loss(flags, model, out):
    """Of a model, by sft.py itself, before its first step."""
    call(sft, out=out, **flags | {"model": model, "steps": 1, "save_every": 0, "lr": 1e-9})
    return metrics(out)[0]["eval_loss"]


def keep_groups(patch, script):
    """A list to which a run adds the samples that it learns from."""
    kept = []
    set_advantages = script.set_advantages
    patch.setattr(script, "set_advantages", lambda args, group: (kept.extend(group), set_advantages(args, group)))
    return kept


@torch.no_grad()
def recomputed(model, sample):
    """(N,) log-probabilities of the trained tokens of a sample, by transformers alone."""
    ids = torch.from_numpy(sample.input_ids)[None]
    logprobs = model(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return logprobs.numpy()[sample.trained[1:]]


# ------------------------------------------------------------------------------------------------------------- LoRA


@pytest.fixture(scope="module")
def lora_run(flags, tmp_path_factory):
    pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("lora") / "run"
    call(forked("lora"), out=out, **flags)
    return out


def test_lora_is_the_papers_product(flags):
    """Output and gradients of one layer against W x + (α / r) B A x in float64, and `merge` against both."""
    pytest.importorskip("peft")
    lora = forked("lora")
    args = lora.Args(model=str(flags["model"]), lora_rank=3, lora_alpha=7.0)
    model = lora.WithAdapters(args, AutoModelForCausalLM).from_config(prepare.make_model(prepare.make_tokenizer(), 1).config)
    layer = model.double().model.layers[0].mlp.down_proj
    W, A, B = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.shape == (3, W.shape[1]) and B.shape == (W.shape[0], 3) and A.std() > 0 and not B.any()
    torch.nn.init.normal_(B)
    x, g = torch.randn(5, W.shape[1]).double(), torch.randn(5, W.shape[0]).double()
    y = layer(x)
    (y * g).sum().backward()
    torch.testing.assert_close(y, x @ W.T + 7 / 3 * x @ A.T @ B.T)
    torch.testing.assert_close(A.grad, 7 / 3 * (g @ B).T @ x)
    torch.testing.assert_close(B.grad, 7 / 3 * g.T @ (x @ A.T))
    merged = lora.merge(args, {name: tensor.detach() for name, tensor in model.named_parameters()})
    torch.testing.assert_close(merged["model.layers.0.mlp.down_proj.weight"], (W + 7 / 3 * B @ A).detach())
    assert merged.keys() == dict(prepare.make_model(prepare.make_tokenizer(), 1).named_parameters()).keys()


def test_lora_trains_adapters_and_nothing_else(flags, lora_run):
    """By the checkpoint: no other weight has moved, and AdamW has moments of A and B alone."""
    found = dcp.FileSystemReader(lora_run / "checkpoints" / "step_4" / "state").read_metadata().state_dict_metadata
    saved = {name: torch.empty(entry.size) for name, entry in found.items() if name.startswith("model.")}
    dcp.load(saved, checkpoint_id=lora_run / "checkpoints" / "step_4" / "state")
    source = load_file(flags["model"] / "model.safetensors")
    for name, tensor in source.items():
        layer, _, kind = f"model.model.{name}".rpartition(".")
        frozen = saved.get(f"{layer}.base_layer.{kind}", saved.get(f"{layer}.{kind}"))
        assert torch.equal(frozen, tensor), name
    adapters = {name for name in saved if "lora_" in name}
    assert len(adapters) == 2 * 3 * 7 and all(saved[name].any() for name in adapters)  # B has left 0
    moments = {name.removeprefix("optimizer.state.").rpartition(".")[0] for name in found if "exp_avg" in name}
    assert {f"model.{name}" for name in moments} == adapters


def test_lora_exports_what_it_has_trained(flags, lora_run, tmp_path):
    losses = [line["eval_loss"] for line in metrics(lora_run) if "eval_loss" in line]
    assert losses[-1] < losses[0] - 0.1
    assert held_out_loss(flags, flags["model"], tmp_path / "before") == pytest.approx(losses[0], abs=1e-6)  # B A is 0
    assert held_out_loss(flags, lora_run / "model", tmp_path / "after") == pytest.approx(losses[-1], abs=1e-5)
    source, merged = (load_file(folder / "model.safetensors") for folder in (flags["model"], lora_run / "model"))
    assert source.keys() == merged.keys()
    moved = {name for name in source if not torch.equal(source[name], merged[name])}
    assert moved == {name for name in source if "_proj" in name}


def test_lora_continues_bit_for_bit(flags, lora_run, tmp_path):
    call(forked("lora"), out=tmp_path / "run", **flags, stop_step=4)
    call(forked("lora"), out=tmp_path / "run", **flags)
    assert trace(tmp_path / "run") == trace(lora_run) and weights(tmp_path / "run") == weights(lora_run)


def test_lora_targets(flags, tmp_path):
    pytest.importorskip("peft")
    short = flags | {"steps": 1, "eval_data": [], "save_every": 0}
    call(forked("lora"), out=tmp_path / "run", **short, lora_targets=".*[qv]_proj")
    source, merged = (load_file(folder / "model.safetensors") for folder in (flags["model"], tmp_path / "run" / "model"))
    moved = {name.split(".")[-2] for name in source if not torch.equal(source[name], merged[name])}
    assert moved == {"q_proj", "v_proj"}
    for targets in (".*nothing", "embed_tokens"):
        with pytest.raises(common.RunError, match=r"model .*[Nn]o modules were targeted|model .*not found"):
            call(forked("lora"), out=tmp_path / "refused", **short, lora_targets=targets)


def test_lora_without_peft_is_refused(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(common.RunError, match=r"^LoRA needs the package peft .*: pip install peft$"):
        call(forked("lora"), out=tmp_path / "run", **flags)


def test_lora_samples_merged_weights_and_keeps_its_reference(flags, tmp_path, monkeypatch):
    """In grpo.py: what was sampled has the trainer's log-probabilities after updates too, and π_ref is the start."""
    pytest.importorskip("peft")
    script = forked("lora", base="grpo.py")
    kept = keep_groups(monkeypatch, script)
    call(script, out=tmp_path / "run", **rl_flags(flags, tmp_path) | {"kl_beta": 0.1, "minibatches": 2})
    lines = metrics(tmp_path / "run")
    assert lines[0]["ref_kl"] < lines[2]["ref_kl"] and lines[2]["ref_kl"] > 1e-3
    assert max(line["behaviour_kl"] for line in lines) < 1e-9
    source = AutoModelForCausalLM.from_pretrained(flags["model"])
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    for sample in kept[-4:]:
        np.testing.assert_allclose(sample.ref_logprobs, recomputed(source, sample), atol=1e-5)
        assert np.abs(sample.ref_logprobs - recomputed(trained, sample)).max() > 0.01


@pytest.mark.slow
def test_lora_of_dpo_starts_at_its_reference(flags, tmp_path):
    """Whether the reference's log-probabilities are computed in this run, or were kept by another."""
    pytest.importorskip("peft")
    pairs = [{"prompt": f"{i}+{i}=", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1}"} for i in range(10, 26)]
    short = {"data": [write_jsonl(tmp_path / "pairs.jsonl", pairs)], "eval_data": [], "steps": 3, "save_every": 0}
    for name in ("computed", "kept"):
        call(forked("lora", base="dpo.py"), out=tmp_path / name, **flags | short)
        losses = [line["loss"] for line in metrics(tmp_path / name)]
        assert losses[0] == pytest.approx(np.log(2), abs=1e-7) and losses[-1] < losses[0] - 0.01
    assert weights(tmp_path / "computed") == weights(tmp_path / "kept")


@pytest.mark.slow
def test_lora_of_the_other_scripts(flags, tmp_path):
    """reward_model.py trains its new head as well; ppo_rlvr.py has adapters in policy and value model."""
    pytest.importorskip("peft")
    pairs = [{"prompt": f"{i}+{i}=", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1}"} for i in range(10, 26)]
    short = {"data": [write_jsonl(tmp_path / "pairs.jsonl", pairs)], "steps": 3, "save_every": 0, "eval_data": []}
    call(forked("lora", base="reward_model.py"), out=tmp_path / "rm", **flags | short)
    source, merged = (load_file(folder / "model.safetensors") for folder in (flags["model"], tmp_path / "rm" / "model"))
    moved = {name for name in source if name in merged and not torch.equal(source[name], merged[name])}
    assert moved == {name for name in source if "_proj" in name} and merged["score.weight"].any()
    ppo = rl_flags(flags, tmp_path) | {"batch_size": 16, "group_size": 1, "value_model": tmp_path / "rm" / "model"}
    call(forked("lora", base="ppo_rlvr.py"), out=tmp_path / "ppo", **ppo | {"value_lr": 1e-3})
    lines = metrics(tmp_path / "ppo")
    assert lines[0]["ref_kl"] < 1e-9 < lines[2]["ref_kl"] and max(line["behaviour_kl"] for line in lines) < 1e-9


@pytest.mark.slow
def test_lora_on_two_processes(flags, lora_run, tmp_path):
    """The course of one process, and a checkpoint of two goes on with one."""
    train(2, forked("lora"), out=tmp_path / "two", **flags)
    train(2, forked("lora"), out=tmp_path / "both", **flags, stop_step=4)
    train(1, forked("lora"), out=tmp_path / "both", **flags)
    for out in (tmp_path / "two", tmp_path / "both"):
        ours = np.array(trace(out)[1:], dtype=float)[:, :4]
        np.testing.assert_allclose(ours, np.array(trace(lora_run)[1:], dtype=float)[:, :4], rtol=1e-3)
        one, two = (load_file(folder / "model" / "model.safetensors") for folder in (lora_run, out))
        assert max((one[name] - two[name]).abs().max() for name in one) < 1e-3
        assert metrics(out)[-1]["eval_loss"] == pytest.approx(metrics(lora_run)[-1]["eval_loss"], rel=1e-3)


# ------------------------------------------------------------------------------------------------------ 8-bit AdamW


@pytest.fixture
def eager_step(monkeypatch):
    """torchao compiles its step, which takes a minute; its arithmetic is the same without."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def kept_bytes(tensor):
    """Of what stands behind a moment: its shard, and of an 8-bit one the codes, scales and values."""
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    parts = [getattr(tensor, name) for name in ("codes", "scale", "qmap") if hasattr(tensor, name)]
    return sum(part.nbytes for part in parts or [tensor])


def test_8bit_moments_have_8_bits_and_train_as_well(flags, eager_step, tmp_path, monkeypatch):
    script = forked("adam8bit")
    made, make_optimizer = [], script.make_optimizer
    monkeypatch.setattr(script, "make_optimizer", lambda *args: made.append(make_optimizer(*args)) or made[-1])
    call(script, out=tmp_path / "8bit", **flags)
    for parameter, state in made[0].state.items():
        n = parameter.numel()
        small = n < 4096 or n % 256
        for name in ("exp_avg", "exp_avg_sq"):
            assert kept_bytes(state[name]) == (4 * n if small else n + 4 * n // 256 + 4 * 256), (n, name)
    large = [parameter.numel() for parameter in made[0].state if parameter.numel() >= 4096]
    assert sum(large) > 0.99 * sum(parameter.numel() for parameter in made[0].state)
    call(sft, out=tmp_path / "32bit", **flags)
    ours, theirs = metrics(tmp_path / "8bit"), metrics(tmp_path / "32bit")
    assert [line["lr"] for line in ours[1:]] == pytest.approx([line["lr"] for line in theirs[1:]])
    # Moments are rounded after a step, so the first is AdamW's; later ones are near it.
    assert ours[2]["loss"] == pytest.approx(theirs[2]["loss"], rel=1e-4)
    assert ours[-1]["eval_loss"] == pytest.approx(theirs[-1]["eval_loss"], rel=0.05) and ours[-1]["eval_loss"] != theirs[-1]["eval_loss"]
    assert ours[-1]["eval_loss"] < ours[0]["eval_loss"] - 0.5
    call(script, out=tmp_path / "again", **flags, stop_step=4)
    call(script, out=tmp_path / "again", **flags)
    assert trace(tmp_path / "again") == trace(tmp_path / "8bit") and weights(tmp_path / "again") == weights(tmp_path / "8bit")


def test_8bit_without_torchao_is_refused(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(common.RunError, match=r"^8-bit AdamW needs the package torchao .*: pip install torchao$"):
        call(forked("adam8bit"), out=tmp_path / "run", **flags)


@pytest.mark.slow
def test_8bit_on_two_processes(flags, eager_step, tmp_path):
    """Shards of two ranks are rounded in blocks of their own; a run goes on as it was."""
    call(forked("adam8bit"), out=tmp_path / "one", **flags)
    train(2, forked("adam8bit"), out=tmp_path / "two", **flags)
    train(2, forked("adam8bit"), out=tmp_path / "again", **flags, stop_step=4)
    train(2, forked("adam8bit"), out=tmp_path / "again", **flags)
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert two[-1]["eval_loss"] == pytest.approx(one[-1]["eval_loss"], rel=0.05)
    assert trace(tmp_path / "again") == trace(tmp_path / "two") and weights(tmp_path / "again") == weights(tmp_path / "two")


# ------------------------------------------------------------------------------------------------------- calculator


@pytest.mark.parametrize(
    ("text", "written", "goes_on"),
    [
        ("3+5+1=", "9", True),
        ("12-7=", "5", True),
        ("7-12=", "-5", True),
        ("7+8=15,3+5+1=", "9", True),
        ("007+1=", "8", True),
        ("7=", "7", True),
        ("=", "", True),  # no sum: the model goes on alone
        ("a=", "", True),
        ("2*3+4=", "", True),  # 3+4 is only a part of it
        ("1.5+2=", "", True),
        ("3++4=", "", True),
        ("9" * 16 + "+1=", "", True),
        ("3+5=<|end|>", "", False),
        ("3+5", "", False),  # cut off
        ("stop 3+5=", "", False),  # --stop_strings
        ("1+1+1+1+1+11=", "", False),  # 13 of 15 tokens: 16, and no room for one of its own
    ],
)
def test_calculator_on_a_text(text, written, goes_on):
    calculator, tokenizer = forked("calculator"), prepare.make_tokenizer()
    rollouts = SimpleNamespace(
        chat=SimpleNamespace(tokenizer=tokenizer), args=SimpleNamespace(stop_strings=["stop"]),
        sampler=SimpleNamespace(eos_ids={tokenizer.eos_token_id}),
    )  # fmt: skip
    ids = np.array(tokenizer.encode(text, add_special_tokens=False))
    completion = SimpleNamespace(token_ids=ids, logprobs=np.full(len(ids), -1.0, np.float32), done=True, ended=text != "3+5")
    assert calculator.use_calculator(rollouts, completion, 30 if len(text) > 13 else 15) == goes_on == (not completion.done)
    assert tokenizer.decode(completion.token_ids) == text + written
    assert (completion.logprobs[len(ids) :] == calculator.BY_TOOL).all() and (completion.logprobs[: len(ids)] == -1).all()
    assert len(completion.logprobs) == len(completion.token_ids)
    assert completion.ended == (not goes_on and not text.startswith(("3+5", "1+1")) or "end" in text)


@pytest.mark.parametrize("inflight", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_calculators_tokens_are_not_trained(flags, tmp_path, monkeypatch, inflight):
    """And the log-probabilities of all others are those of the model, which has read them."""
    script = forked("calculator")
    kept = keep_groups(monkeypatch, script)
    tokenizer, forbid = AutoTokenizer.from_pretrained(flags["model"]), Sampler.forbid
    others = set(range(len(tokenizer))) - {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list("0123456789+-="))}
    monkeypatch.setattr(Sampler, "forbid", lambda sampler, ids: forbid(sampler, others))  # a random model that writes sums
    random = rl_flags(flags, tmp_path, "coin") | {"max_new_tokens": 24, "steps": 2, "lr": 1e-9, "passes": 2}
    call(script, out=tmp_path / "run", **random, inflight=inflight)
    model = AutoModelForCausalLM.from_pretrained(flags["model"])
    written = 0
    for sample in kept:
        begin = sample.trained.argmax()
        np.testing.assert_allclose(sample.behaviour_logprobs, recomputed(model, sample), atol=1e-4)
        np.testing.assert_allclose(sample.old_logprobs, sample.behaviour_logprobs, atol=1e-4)
        by_tool = np.flatnonzero(~sample.trained[begin:])
        written += len(by_tool)
        for first in [place for place in by_tool if place - 1 not in by_tool]:
            text = tokenizer.decode(sample.input_ids[begin:][:first])
            answer = calculated(text)
            places = range(first, first + len(answer))
            assert tokenizer.decode(sample.input_ids[begin:][first : first + len(answer)]) == answer
            assert set(places) <= set(by_tool) and first + len(answer) not in by_tool
        calls = [place for place in range(len(sample.input_ids) - begin - 1)
                 if calculated(tokenizer.decode(sample.input_ids[begin:][: place + 1])) and sample.trained[begin + place]]  # fmt: skip
        assert all(place + 1 in by_tool for place in calls)
    assert written > 10


def calculated(text):
    """The result of a sum that a text ends with, by other means than the fork's; "" without one."""
    if not text.endswith("="):
        return ""
    begin = len(text) - 1
    while begin and text[begin - 1] in "0123456789.*/+-":
        begin -= 1
    total, number, sign = 0, "", 1
    for character in text[begin:]:
        if character in "+-=":
            if not 0 < len(number) < 16 or not number.isdigit():
                return ""
            total, number, sign = total + sign * int(number), "", 1 if character == "+" else -1
        else:
            number += character
    return str(total)


@pytest.mark.slow
def test_calculator_is_used_at_once(tmp_path):
    """By the demo's fine-tuned model, of whose demonstrations three in five had a slip: held-out rewards at first."""
    prepare.prepare(tmp_path, 1)
    flags = {"max_length": 64, "save_every": 0}
    teaching = {"data": [str(tmp_path / "train.jsonl")], "batch_size": 64, "lr": 4e-3, "epochs": 4}
    call(sft, model=tmp_path / "base", out=tmp_path / "sft", **teaching, **flags)
    flags |= {"model": tmp_path / "sft" / "model", "data": [str(tmp_path / "prompts.jsonl")], "max_new_tokens": 32}
    flags |= {"eval_data": [f"{tmp_path}/held_out_prompts.jsonl:200"], "batch_size": 8, "slots": 128, "steps": 1}
    flags |= {"active_sampling": 0, "activation_checkpointing": False, "lr": 5e-4, "verifier_workers": 1}
    call(forked(base="grpo.py"), out=tmp_path / "alone", **flags)
    call(forked("calculator"), out=tmp_path / "tool", **flags)
    assert metrics(tmp_path / "alone")[0]["eval_reward"] < 0.6
    assert all(line["eval_reward"] > 0.9 for line in metrics(tmp_path / "tool"))
