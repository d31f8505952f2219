"""sft.py as users run it: what may change the loss, what may not, and what it leaves behind."""

import datetime
import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import EOS, assistant, chat, shared, tokenizer_folder, user, write_jsonl
from launch import ROOT, call, metrics, run, start, trace
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import common
import sft
from common import RunError

GOLDEN = ROOT / "tests" / "golden_sft.json"


def in_process(flags):
    """Flags of a command as the fields of Args: lists of data."""
    return {name: [value] if name in ("data", "eval_data") else value for name, value in flags.items()}


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory):
    """A real model and 200 real rows, and the flags of a run of 20 steps on them."""
    with open(shared("data", "gsm8k", "train.jsonl")) as file:
        rows = [json.loads(next(file)) for _ in range(140)]
    folder = tmp_path_factory.mktemp("gsm8k")
    messages = [[user(row["question"]), assistant(row["answer"])] for row in rows]
    flags = {
        "model": shared("models", "stories260k"), "chat_template": "tulu", "max_length": 256, "max_skip_frac": 0.3,
        "data": write_jsonl(folder / "train.jsonl", [{"messages": m} for m in messages[:100]]),
        "eval_data": write_jsonl(folder / "test.jsonl", [{"messages": m} for m in messages[100:]]),
        "batch_size": 8, "lr": 1e-3, "steps": 20, "save_every": 0, "eval_every": 10, "answers": 0,
    }  # fmt: skip
    return flags


@pytest.fixture(scope="module")
def reference(gsm8k, tmp_path_factory):
    """One process, everything packed, in the lowest common instruction set: the same bits on every x86-64 machine."""
    out = tmp_path_factory.mktemp("reference") / "run"
    portable = {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    stdout, _ = run("sft.py", out=out, env=portable, **gsm8k)
    return out, stdout


def assert_same_trajectory(a, b, tolerance):
    assert len(a) == len(b) and len(a) > 10
    for x, y in zip(a, b, strict=True):
        assert x[0] == y[0]
        for value, other in ((x[1], y[1]), (x[4], y[4])):  # loss, held-out loss
            assert (value is None) == (other is None)
            assert value is None or math.isclose(value, other, rel_tol=tolerance), (x, y)
        # The gradient's norm: Adam and the clip hide a constant factor of the loss from all that follows.
        assert x[3] is None or math.isclose(x[3], y[3], rel_tol=1e-2), (x, y)


def test_golden_trajectory(reference):
    """Bit for bit the losses committed to the repository (to 1e-6 under versions other than those they came from)."""
    out, _ = reference
    versions = json.loads((out / "config.json").read_text())["versions"]
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps({"versions": versions, "trace": trace(out)}, indent=1))
        pytest.fail(f"{GOLDEN} was missing and has been written: look at it and commit it")
    golden = json.loads(GOLDEN.read_text())
    if versions == golden["versions"]:
        assert trace(out) == [tuple(entry) for entry in golden["trace"]]
    assert_same_trajectory(trace(out), golden["trace"], 1e-6)


def test_the_optimizer_is_adamw():
    """Three steps in plain Python, written once more from AdamW's paper (arXiv 1711.05101), with an ε that matters."""
    args = sft.Args(lr=0.1, adam_betas=(0.8, 0.9), adam_eps=0.5, weight_decay=0.25)
    module = torch.nn.Linear(1, 1).double()
    weights = {name: parameter.item() for name, parameter in module.named_parameters()}  # a matrix and a vector
    optimizer = sft.make_optimizer(args, module)
    mean, square = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)
    for step, gradient in enumerate((0.3, -2.0, 0.7), start=1):
        for name, parameter in module.named_parameters():
            parameter.grad = torch.full_like(parameter, gradient)
            mean[name] = 0.8 * mean[name] + 0.2 * gradient
            square[name] = 0.9 * square[name] + 0.1 * gradient**2
            update = mean[name] / (1 - 0.8**step) / (math.sqrt(square[name] / (1 - 0.9**step)) + 0.5)
            decay = 0.25 * weights[name] if name == "weight" else 0.0
            weights[name] -= 0.1 * (update + decay)
        optimizer.step()
    assert {name: p.item() for name, p in module.named_parameters()} == pytest.approx(weights, rel=1e-12)


@pytest.mark.parametrize(
    "processes, flags",
    [
        (1, {"tokens_per_microbatch": 1, "stop_step": 10}),  # one sequence at a time; 10 steps suffice
        (1, {"tokens_per_microbatch": 700, "attn": "packed_loop", "stop_step": 10}),
        (2, {"tokens_per_microbatch": 1000, "activation_checkpointing": True, "stop_step": 10}),
        pytest.param(4, {"shard": "hybrid"}, marks=pytest.mark.slow),  # two machines, below, are of four processes too
        pytest.param(1, {"compile": True}, marks=pytest.mark.slow),
        pytest.param(2, {"compile": True, "activation_checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_how_a_batch_is_cut_and_dealt_does_not_change_the_loss(gsm8k, reference, tmp_path, processes, flags):
    """Any microbatch size, packed or not, on 1, 2 and 4 processes: 10 or 20 steps equal to 1e-6."""
    if processes == 1 and "compile" not in flags:
        call(sft, out=tmp_path / "run", **in_process(gsm8k | flags))
    else:
        run("sft.py", processes=processes, out=tmp_path / "run", **gsm8k, **flags)
    assert_same_trajectory(trace(tmp_path / "run"), trace(reference[0])[: flags.get("stop_step", 20) + 1], 1e-6)


def test_learns_and_reports(reference):
    """The loss falls; every promised metric is there; held-out loss stands before the first and after the last step."""
    out, stdout = reference
    entries = metrics(out)
    assert [entry["step"] for entry in entries] == list(range(21))
    assert entries[-1]["eval_loss"] < entries[0]["eval_loss"] - 0.5
    keys = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds", "trained_tokens"}
    assert all(keys <= entry.keys() for entry in entries[1:])
    assert "100 rows read" in stdout and "⟦" in stdout  # the audit, and the example, its trained tokens in brackets


def test_exported_model_opens_elsewhere(reference, gsm8k):
    """from_pretrained opens it with tokenizer and template; the weights are the trained ones; checksums hold."""
    out, _ = reference
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied once, and again
    assert set(model.generation_config.eos_token_id) == {1, tokenizer.eos_token_id}  # 1: the source's own, stories260k's
    losses = []
    for row in map(json.loads, open(gsm8k["eval_data"])):
        encoded = tokenizer.apply_chat_template(
            row["messages"], return_assistant_tokens_mask=True, return_dict=True, tokenize=True
        )
        ids, mask = torch.tensor(encoded["input_ids"])[:256], torch.tensor(encoded["assistant_masks"])[:256].bool()
        with torch.no_grad():
            logp = model(ids[None]).logits[0].log_softmax(-1)
        losses.append(-logp[:-1].gather(1, ids[1:, None])[:, 0][mask[1:]])
    assert math.isclose(torch.cat(losses).mean().item(), metrics(out)[-1]["eval_loss"], rel_tol=1e-5)
    sums = (out / "model" / "SHA256SUMS").read_text().splitlines()
    assert sums
    for line in sums:
        digest, name = line.split("  ")
        assert hashlib.sha256((out / "model" / name).read_bytes()).hexdigest() == digest


def test_a_finished_run_run_again_does_nothing(reference, gsm8k, capfd):
    out, _ = reference
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}
    call(sft, out=out, **in_process(gsm8k))
    assert "is finished" in capfd.readouterr().out
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", [{"lr": 2e-3}, {"data": "first half"}])
def test_a_folder_with_another_run_is_refused(reference, gsm8k, tmp_path, change):
    """Other flags or other data in the same folder: an error that names them, and nothing in the folder is touched."""
    out, _ = reference
    if "data" in change:
        lines = open(gsm8k["data"]).read().splitlines()[:50]
        change = {"data": write_jsonl(tmp_path / "train.jsonl", lines)}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(RunError, match=f"holds another run.*{next(iter(change))}"):
        call(sft, out=out, **in_process(gsm8k | change))
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


# ------------------------------------------------------------------------------------------- batches of so many tokens


@pytest.mark.parametrize("budget", [20, 50, 1000, 10**6])
def test_batches_of_tokens(budget):
    """Row by row: a batch ends with the row that brings the tokens of all batches to the next multiple of the budget."""
    lengths = np.random.default_rng(budget).integers(1, 21, 130)
    rows = common.Rows([None] * 130, [], lengths, lengths, [], "")
    args = sft.Args(batch_tokens=budget, seed=3)
    edges = sft.batch_edges(args, rows, total_rows=300)
    batches, total = [[]], 0
    for row in common.stream(130, 3, range(300)).tolist():
        if total >= budget * len(batches):
            batches.append([])
        batches[-1].append(row)
        total += lengths[row]
    assert [len(batch) for batch in batches] == np.diff(edges).tolist() and edges[0] == 0
    tokens = [sum(lengths[batch]) for batch in batches]
    assert all(abs(count - budget) < 20 for count in tokens[:-1]) and tokens[-1] < budget + 20


def test_batches_of_rows_are_those_of_the_other_scripts():
    rows = common.Rows([None] * 10, [], None, None, [], "")
    edges = sft.batch_edges(sft.Args(batch_size=4), rows, total_rows=27)
    for step in range(len(edges) - 1):
        batch = common.stream(10, 1, range(edges[step], edges[step + 1]))
        assert batch.tolist() == common.batch_indices(10, 4, 1, step, total_rows=27).tolist()
    assert edges[-1] == 27


@pytest.fixture(scope="module")
def by_tokens(gsm8k, tmp_path_factory):
    """(flags, folder) of a run whose steps have about 700 tokens. 5 rows could not be divided among 2 processes."""
    flags = gsm8k | {"batch_tokens": 700, "batch_size": 5, "epochs": 1.0, "steps": 1000, "eval_every": 5}
    out = tmp_path_factory.mktemp("by_tokens") / "run"
    run("sft.py", out=out, **flags)
    return flags, out


def test_the_schedule_follows_from_the_tokens(by_tokens):
    flags, out = by_tokens
    steps = [entry for entry in metrics(out) if entry["step"]]
    assert sum(entry["tokens"] for entry in steps[:-1]) == pytest.approx(700 * (len(steps) - 1), abs=256)
    assert len({entry["tokens"] for entry in steps}) > 5 and all(abs(entry["tokens"] - 700) < 256 for entry in steps[:-1])
    args = sft.Args(lr=flags["lr"])
    assert [entry["lr"] for entry in steps] == [sft.learning_rate(args, step, len(steps)) for step in range(len(steps))]


@pytest.mark.slow
def test_processes_do_not_change_batches_of_tokens(by_tokens, tmp_path):
    flags, out = by_tokens
    run("sft.py", 2, out=tmp_path / "run", **flags | {"tokens_per_microbatch": 300})
    assert_same_trajectory(trace(tmp_path / "run"), trace(out), 1e-6)


def test_no_batch_can_be_empty(by_tokens, tmp_path):
    with pytest.raises(RunError, match="--batch_tokens 100 is less than the longest row has"):
        call(sft, out=tmp_path / "run", **in_process(by_tokens[0] | {"batch_tokens": 100}))


# ------------------------------------------------------------------------------------- a run that is shorter than its schedule


def test_stop_step_stops_and_the_rest_is_the_same(gsm8k, tmp_path, capfd):
    """Stopped twice, and told to stop where it has stopped already: learning rates and losses are those of one run."""
    flags = in_process(gsm8k | {"batch_tokens": 900, "steps": 12, "eval_every": 4})
    call(sft, out=tmp_path / "whole", **flags)
    out = tmp_path / "run"
    for stop, folders in ((5, {"step_5"}), (5, {"step_5"}), (8, {"step_5", "step_8"})):
        call(sft, out=out, **flags | {"stop_step": stop})
        assert f"stopped at --stop_step {stop}: the same command without it goes on" in capfd.readouterr().out
        assert trace(out) == trace(tmp_path / "whole")[: stop + 1]  # and the evaluation before the first step
        assert {path.name for path in (out / "checkpoints").iterdir()} == folders and not (out / "model").exists()
    call(sft, out=out, **flags | {"stop_step": 99})
    assert trace(out) == trace(tmp_path / "whole")
    models = [(path / "model" / "model.safetensors").read_bytes() for path in (out, tmp_path / "whole")]
    assert models[0] == models[1]


DATED = """{{ bos_token }}{{ strftime_now("%d %B %Y") }}
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == "assistant" %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # fmt: skip


def test_a_run_goes_on_with_the_day_of_its_start(tiny_model, tmp_path, monkeypatch):
    """A template that prints the day, and a run that is stopped and continued the day after."""
    (tmp_path / "dated.jinja").write_text(DATED)
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat(f"What is {i} + 3?", f"It is {i + 3}.") for i in range(32)])
    flags = {"model": tiny_model, "data": [rows], "chat_template": str(tmp_path / "dated.jinja"), "max_length": 128, "batch_size": 4}

    def on_day(text, **more):
        class Day(datetime.date):
            @classmethod
            def today(cls):
                return cls.fromisoformat(text)

        monkeypatch.setattr(common, "date", Day)
        call(sft, **flags | more)
        return json.loads((more["out"] / "config.json").read_text())["date"]

    assert on_day("2026-01-31", out=tmp_path / "whole") == "2026-01-31"
    assert on_day("2026-01-31", out=tmp_path / "run", stop_step=3) == "2026-01-31"
    assert on_day("2026-02-01", out=tmp_path / "run") == "2026-01-31"
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")
    assert on_day("2026-02-01", out=tmp_path / "next") == "2026-02-01"
    assert trace(tmp_path / "next") != trace(tmp_path / "whole")  # the day is among the tokens


@pytest.mark.parametrize(("template", "ends"), [("tulu", [EOS]), ("chatml", ["<|im_end|>", EOS])])
def test_exported_models_stop_where_the_template_ends_a_turn(tiny_model, tmp_path, template, ends):
    """generate reads one id, or several: the end of a turn first."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat()] * 4)
    call(sft, model=tiny_model, chat_template=template, data=[rows], out=tmp_path / "run", max_length=64, batch_size=4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    ids = tokenizer.convert_tokens_to_ids(ends)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").generation_config
    assert config.eos_token_id == (ids if len(ids) > 1 else ids[0])


def test_train_turns(tiny_model, tmp_path):
    """The last answer alone, or all three."""
    turns = [user("a"), assistant("It is 5."), user("b"), assistant("It is 48."), user("c"), assistant("She sold clips.")]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}] * 4)
    flags = {"model": tiny_model, "data": [rows], "max_length": 128, "batch_size": 4, "epochs": 1}
    answers = AutoTokenizer.from_pretrained(tiny_model)([turn["content"] for turn in turns[1::2]], add_special_tokens=False)
    lengths = [len(ids) + 1 for ids in answers.input_ids]  # and the end of the turn
    for choice, expected in (("all", sum(lengths)), ("last", lengths[2])):
        call(sft, **flags, out=tmp_path / choice, train_turns=choice)
        assert metrics(tmp_path / choice)[0]["trained_tokens"] == 4 * expected


def test_errors_are_one_line(tiny_model, tmp_path):
    """Bad flags and data end with one line and exit code 1; unknown flags with exit code 2."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [user("a"), assistant("b")]}] * 4)
    good = {"model": tiny_model, "data": rows, "out": tmp_path / "run", "max_length": 64, "batch_size": 4}
    for change, message in [
        ({"model": tmp_path / "nothing"}, "model .*nothing: "),
        ({"batch_size": 8}, "4 usable rows, fewer than --batch_size 8"),
        ({"max_length": 4096}, "--max_length 4096 is beyond the 512 positions"),
        ({"chat_template": "none.jinja"}, "--chat_template"),
    ]:
        with pytest.raises(RunError, match=message):
            call(sft, **in_process(good | change))
    _, stderr = run("sft.py", expect=1, **good | {"batch_size": 8})
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: --data has 4 usable rows, fewer than --batch_size 8"] and "Traceback" not in stderr
    run("sft.py", expect=2, **good, no_such_flag=1)


def test_weights_that_do_not_fit_or_are_not_finite_are_fatal(tiny_model, tmp_path):
    """A missing weight (transformers only warns), a surplus one, a NaN and a wrong shape are named before training starts."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [user("a"), assistant("b")]}] * 4)
    for number, (name, damage) in enumerate([
        ("model.layers.1.self_attn.q_proj.weight", lambda w, n: w.pop(n)),
        ("model.surplus.weight", lambda w, n: w.update({n: torch.zeros(2)})),
        ("model.norm.weight", lambda w, n: w[n].fill_(float("nan"))),
        ("model.layers.0.input_layernorm.weight", lambda w, n: w.update({n: torch.zeros(7)})),
    ]):  # fmt: skip
        folder = tmp_path / f"model_{number}"
        shutil.copytree(tiny_model, folder)
        weights = load_file(folder / "model.safetensors")
        damage(weights, name)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        out = tmp_path / "run"  # the same each time: a start that failed leaves nothing that is in the way
        with pytest.raises(RunError, match=f"model {folder}: ") as error:
            call(sft, model=folder, data=[rows], out=out, max_length=64, batch_size=4)
        assert name in str(error.value)


def test_a_loss_that_is_not_finite_stops_before_the_update(tiny_model, tmp_path):
    """An absurd learning rate: the step and the rows are named, and the last checkpoint is still good."""
    rows = [{"messages": [user(f"question {i}"), assistant(f"answer {i}")]} for i in range(64)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = {"model": tiny_model, "data": data, "max_length": 64, "batch_size": 4, "out": tmp_path / "run"}
    flags |= {"lr": 1e30, "lr_schedule": "constant", "max_grad_norm": 0, "save_every": 1, "warmup_ratio": 0}
    with pytest.raises(RunError, match="stopped before the update.*rows.jsonl, row") as stopped:
        call(sft, **in_process(flags))
    error = str(stopped.value)
    step = metrics(tmp_path / "run")[-1]["step"]
    assert f"step {step + 1}:" in error
    assert (tmp_path / "run" / "checkpoints" / f"step_{step}").is_dir()


def test_tracking_works_offline_and_keeps_secrets(tiny_model, tmp_path):
    """--track without a login writes locally; a credential in a flag reaches neither W&B's files nor config.json."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [user("a"), assistant("b")]}] * 8)
    secret = "hf_canarycanarycanary"
    (tmp_path / secret).symlink_to(tiny_model)
    flags = {"data": rows, "out": tmp_path / "run", "max_length": 64, "batch_size": 4, "track": True}
    run("sft.py", model=tmp_path / secret, **flags, env={"HOME": str(tmp_path), "WANDB_API_KEY": ""})
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    leaks = [path for path in files if secret.encode() in path.read_bytes()]
    assert not leaks


def test_help_reads(tmp_path):
    stdout, _ = run("sft.py", **{"help": True})
    for flag in ("--tokens_per_microbatch", "--eval_data", "--activation_checkpointing"):
        assert flag in stdout
    assert "rows (conversations, pairs" in stdout


def test_missing_rank_makes_every_process_exit(tiny_model, tmp_path):
    """On two processes bad data ends the whole job, and the message says what is wrong."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [user("a"), assistant("b")]}] * 5 + [{"messages": 3}])
    process = start("sft.py", 2, model=tiny_model, data=rows, out=tmp_path / "run", max_length=64, batch_size=4)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1 and "rows.jsonl, row 6: messages is a number" in stderr


@pytest.mark.slow
def test_every_architecture_survives_sharding_and_export(tmp_path):
    """Llama, Qwen 3, OLMo 3, Gemma 2 and Gemma 3, tied and untied, on two processes: three steps and the gradient of
    log-probabilities equal plain transformers', and the exported weights are the trained ones, bit for bit."""
    shutil.copytree(tokenizer_folder("byte_level"), tmp_path / "tokenizer")
    stdout, _ = run("tests/roundtrip.py", 2, positional=[tmp_path])
    assert stdout.count("agree") == 10


def test_a_tied_head_is_exported_once(tmp_path):
    """A bf16 model with tied embeddings is exported with the names and precision of its source, no more."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder("byte_level"))
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **size)
    source = tmp_path / "source"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(source)
    tokenizer.save_pretrained(source)
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat(f"What is {i} + 3?", f"It is {i + 3}.") for i in range(4)])
    call(sft, model=source, chat_template="tulu", data=[rows], out=tmp_path / "run", max_length=64, batch_size=4)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "run" / "model"))
    assert "lm_head.weight" not in before
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {name: (t.shape, t.dtype) for name, t in before.items()}
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])  # it was trained


@pytest.mark.slow  # four processes; tests/test_scale.py has a fast one
def test_two_machines_of_two_processes(gsm8k, reference, tmp_path):
    """--shard hybrid with two nodes (two torchrun agents here): parameters sharded within a node, replicated between."""
    agents = [
        start("sft.py", 2, nodes=2, node=node, out=tmp_path / "run", shard="hybrid", **gsm8k) for node in (0, 1)
    ]
    for agent in agents:
        stdout, stderr = agent.communicate(timeout=500)
        assert agent.returncode == 0, f"{stdout}\n{stderr}"
    assert_same_trajectory(trace(tmp_path / "run"), trace(reference[0]), 1e-6)
