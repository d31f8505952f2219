"""What runs on CUDA only, rehearsed on a CPU as far as that goes.

Training: `varlen_attn` with PyTorch's flash attention emulated below it, so that everything above (arguments, windows,
grouped heads, the operator's shape functions, torch.compile) is the real thing. The kernel itself is `make test-cuda`'s.
Benchmarks: benchmarks/gpu.py with tiny sizes walks through every part, on one process and on two; the lengths that its
random model is set to; the count of a rollout's schedule.
"""

import copy
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_kernels import tiny_config
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

import common
import kernels.attention
from kernels.attention import Options
from kernels.sampler import Sampler, SamplingParams

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import grpo_vs_trl  # noqa: E402
import schedule  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses CUDA paths on a CPU: make test-cuda has them")


def emulated(query, key, value, starts, scale, left):
    """aten's flash attention for packed sequences, as its documentation has it; left: tokens seen before one's own."""
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    options = Options(scaling=scale, window=None if left in (None, -1) else left + 1)
    return kernels.attention._loop(query, key, value, starts, options)[0]


def forward(query, key, value, starts, _, longest, *__, scale=None, window_size_left=None, window_size_right=None, **___):
    assert longest == starts.diff().max() and window_size_right == 0 and starts[-1] == len(query)
    with torch.no_grad():
        output = torch.empty_like(query).copy_(emulated(query, key, value, starts, scale, window_size_left))
    seed = torch.zeros(2, dtype=torch.uint64)
    return output, torch.zeros(query.shape[1], len(query)), seed, torch.zeros((), dtype=torch.uint64), torch.empty(0)


def backward(d_output, query, key, value, output, logsumexp, starts, *_, scale=None, window_size_left=None, **__):
    def differentiate():
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (query, key, value)]
            return torch.autograd.grad(emulated(*inputs, starts, scale, window_size_left), inputs, d_output)

    with ThreadPoolExecutor(1) as another_thread:  # in this one autograd is switched off
        gradients = another_thread.submit(differentiate).result()
    return tuple(torch.empty_like(x).copy_(d) for x, d in zip((query, key, value), gradients, strict=True))


@pytest.fixture
def flash_attention():
    """Registers a model's attention `packed_as_on_cuda`, and what it calls in the end."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")

    def attention(
        module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, sliding_window=None,
        cu_seq_lens_q=None, max_length_q=None, **kwargs,
    ):  # fmt: skip
        kernels.attention._check("packed", query, attention_mask, cu_seq_lens_q, kwargs)
        options = Options(scaling, dropout, sliding_window)
        return kernels.attention._varlen(query, key, value, cu_seq_lens_q, max_length_q, options), None

    AttentionInterface.register("packed_as_on_cuda", attention)
    yield
    library._destroy()


def compare(family, prepare):
    """Hidden states and gradients over five microbatches, against the definition; relative to 1e-5."""
    torch.manual_seed(0)
    config, models = tiny_config(family, 128, True), []
    for name in ("packed_loop", "packed_as_on_cuda"):
        models.append(AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=name).train())
    models[1].load_state_dict(models[0].state_dict())
    prepare(models[1])
    for lengths in ([40, 7, 23], [50, 20], [33, 9, 9, 10], [64], [12, 3, 40]):
        inputs = common.pack([(np.arange(n) % 128, np.ones(n, dtype=bool)) for n in lengths], "cpu").model_inputs()
        results = []
        for model in models:
            model.zero_grad()
            hidden = model.base_model(**inputs).last_hidden_state
            (hidden * torch.linspace(-1, 1, hidden.shape[2])).sum().backward()
            results.append([hidden.detach(), *(p.grad.clone() for p in model.base_model.layers.parameters())])
        for a, b in zip(*results, strict=True):
            assert (a - b).norm() <= 1e-5 * a.norm()


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo3", "gemma3"])
def test_training_calls_varlen_attention_rightly(flash_attention, family):
    """Grouped queries without copies of keys, windows off by none, odd lengths."""
    compare(family, lambda model: None)


@pytest.mark.slow  # torch.compile on a CPU: up to a minute each
@pytest.mark.parametrize(("family", "kinds", "checkpointing"), [("llama", 1, False), ("llama", 1, True), ("gemma3", 2, False)])
def test_compiled_layers_have_no_break_and_few_shapes(flash_attention, family, kinds, checkpointing):
    """Five microbatches of other lengths and numbers of sequences: at most three graphs for each kind of layer (the first
    shape, any shape, one sequence), so torch.compile does not give up after its eight."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()

    def prepare(model):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.base_model.layers:
            layer.compile()

    compare(family, prepare)
    assert not counters["graph_break"] and 0 < counters["stats"]["unique_graphs"] <= 3 * kinds


@pytest.mark.slow  # a minute
def test_the_gpu_benchmark_walks_through(tmp_path):
    """Everything that can run on a CPU is measured; what cannot says why; losses of contestants agree."""
    parts = ["head", "sft", "dpo", "sampler", "grpo"]
    results = rehearse(tmp_path / "x.json", parts)
    reasons = {r["not_run"] for r in results if "not_run" in r}
    assert reasons <= {"not in a dry run", "trl is not installed", "liger-kernel is not installed", "Liger's kernels need CUDA"}
    measured = {(r["part"], r["name"]) for r in results if "not_run" not in r}
    assert {("sft", "ours"), ("dpo", "ours"), ("sampler", "ours"), ("sampler", "generate"), ("grpo", "ours")} <= measured
    assert {r["part"] for r in results} == {"card", "kernels", "prepare", *parts}


@pytest.mark.slow  # a minute
def test_the_gpu_benchmark_walks_through_on_two_processes(tmp_path):
    """By torchrun: both parts, their collectives and a checkpoint; completions of the set length in every step."""
    results = rehearse(tmp_path / "x.json", ["sft", "grpo"], "--gpus", "2")
    measured = {(r["part"], r["name"]): r for r in results if "not_run" not in r}
    assert {r["not_run"] for r in results if "not_run" in r} == {"not in a dry run"}
    assert measured["network", ""]["nodes"] == 1 and measured["network", ""]["all_gather_bytes_per_second"] > 0
    assert measured["sft", "ours_saving"]["checkpoint_seconds"] > 0 < measured["sft", "ours_saving"]["checkpoint_bytes"]
    assert measured["sft", "ours_checkpointing"]["tokens_per_second"] > 0
    grpo = measured["grpo", "ours"]
    assert not any(grpo_vs_trl.wrong_length(length, 8.0, 16) for length in grpo["mean_lengths"])
    assert grpo["gap_max"] < 1e-4 and 0 < grpo["sync_seconds"] < grpo["rollout_seconds"] < grpo["seconds_per_step"]


def rehearse(out, parts, *flags):
    """Results of a dry run, which must not fail."""
    command = [sys.executable, "benchmarks/gpu.py", "--dry", "--steps", "3", "--warmup", "1", "--out", str(out), *flags]
    done = subprocess.run([*command, "--parts", *parts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return json.loads(out.read_text())["results"]


def test_contestants_that_did_other_work_are_an_error(capsys):
    """Other losses, another first gradient, completions of another length. DPO's losses after an update are bf16's noise."""
    shared = {"size": "1.5b", "tokens_per_second": 2.0, "seconds_per_step": 1.0, "first_step_seconds": 1.0}
    parts = {"rollout_seconds": 0.5, "sync_seconds": 0.1, "generate_seconds": 0.2, "update_seconds": 0.5, "mean_length": 8.1}
    results = [shared | {"part": part, "name": name, "losses": losses, "grad_norms": norms} | extra for part, name, losses, norms, extra in [
        ("sft", "ours", [2.0, 1.9], [5.0, 4.0], {}),
        ("sft", "ours_checkpointing", [2.0, 1.9], [5.05, 4.0], {}),
        ("sft", "ours_compiled_16k", [2.0, 1.85], [5.0, 4.0], {}),
        ("sft", "trl", [1.9, 2.1], [6.0, 4.0], {}),
        ("dpo", "ours", [0.6931, 0.680], [30.0, 20.0], {}),
        ("dpo", "trl", [0.6931, 0.699], [30.2, 25.0], {}),
        ("dpo", "trl_checkpointing", [0.6931, 0.680], [31.0, 20.0], {}),
        ("grpo", "ours", [0.1], [1.0], parts | {"error": "completions have 8.1 tokens"}),
    ]]  # fmt: skip
    facts = {"card": {"name": "a card", "flops_per_second": 1.0, "bytes_per_second": 1.0}, "settings": {"gpus": 1}}
    facts["results"] = results
    gpu.report(facts)
    errors = sorted(error.rpartition(" ")[0] for error in facts["errors"])
    assert errors == [
        "dpo 1.5b trl_checkpointing: gradients differ by", "grpo 1.5b ours: completions have 8.1",
        "sft 1.5b ours_compiled_16k: losses differ by",
    ]  # fmt: skip
    assert "1 x a card, 1 node(s)" in capsys.readouterr().out


@pytest.mark.slow
def test_what_bf16_rounds_off_of_a_pairs_loss():
    """DPO's log π - log π_ref of a sequence is as far from float32's with logits in float32 (ours) as in bf16 (TRL's).

    So two implementations in bf16 differ by the rounding of hidden states, whatever their heads do. -s prints how much.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384, hidden_size=384, intermediate_size=1152, num_hidden_layers=10, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=False,
    )  # fmt: skip
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).float()  # as loaded: weights fit bf16
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in policy.parameters():  # some steps of AdamW at a learning rate of 1e-6
            parameter += 5e-6 * torch.randn_like(parameter).sign()
    ids = torch.randint(3, 4096, (16, 512))

    def logprobs(model, dtype, head_dtype):
        model = copy.deepcopy(model).to(dtype)
        rows = []
        for row in ids:
            with torch.no_grad():
                hidden = model.base_model(row[None, :-1]).last_hidden_state[0]
                logits = hidden.float() @ model.lm_head.weight.float().T
            rows.append(logits.to(head_dtype).float().log_softmax(-1).gather(1, row[1:, None]).double().sum())
        return torch.stack(rows)

    errors, exact = {}, None
    for name, dtypes in {"exact": [torch.float32] * 2, "ours": [torch.bfloat16, torch.float32], "bf16": [torch.bfloat16] * 2}.items():
        ratio = logprobs(policy, *dtypes) - logprobs(reference, *dtypes)
        exact = ratio if exact is None else exact
        errors[name] = (ratio - exact).square().mean().sqrt().item()
    size = exact.square().mean().sqrt().item()
    print(f"\nlog π - log π_ref of a sequence: {size:.3f}; off by {errors['ours']:.3f} with float32 logits, {errors['bf16']:.3f} with bf16")
    assert errors["exact"] == 0 < size < errors["ours"] and 0.5 < errors["ours"] / errors['bf16'] < 2


class Tokenizer:
    """What set_ending asks of one: 100 tokens, of which number 1 ends a completion and number 2 is `the`."""

    eos_token_id = 1

    def encode(self, text, add_special_tokens):
        return [2]

    def get_vocab(self):
        return {str(i): i for i in range(100)}


def test_completions_of_the_random_model_have_the_set_length():
    """Also with a padded vocabulary, whose other ids grpo.py never draws: nothing is left for the end token to inherit."""
    torch.manual_seed(0)
    config = tiny_config("llama", 5000, False)
    config.initializer_range = 0.02
    model = AutoModelForCausalLM.from_config(config)
    grpo_vs_trl.set_ending(model, Tokenizer(), 8.0)
    for never in ((), range(100, 5000)):
        sampler = Sampler(config, 128, 64, [1], "cpu")
        sampler.forbid(never)
        policy = torch.nn.Module()
        policy.model = model
        sampler.sync(policy)
        completions = sampler.sample([[5, 6, 7]] * 64, SamplingParams(n=8, max_new_tokens=16))
        length = np.mean([len(completion.token_ids) for completion in completions])
        assert grpo_vs_trl.wrong_length(length, 8.0, 16) is None
    assert "have 3.5 tokens on average, they are set to 7.1" in grpo_vs_trl.wrong_length(3.5, 8.0, 16)
    assert grpo_vs_trl.wrong_length(16.0, None, 16) is None and grpo_vs_trl.wrong_length(12.0, None, 16)


def test_the_counted_schedule_is_the_samplers(monkeypatch):
    """Two completions of 10 and 40 tokens, of a prompt of 5: looks at 16 and 48 steps, keys as counted by hand."""
    sampler = schedule.Scheduled(schedule.Args(prompt_length=5), 2, 0.0, 64, 0)
    monkeypatch.setattr(sampler, "_end", lambda completion: 4 + [10, 40][completion.sample])
    sampler.sample([[0] * 5], SamplingParams(n=2, max_new_tokens=64))
    first, second = sampler.costs
    assert (first["steps"], second["steps"]) == (16, 32) and (first["done"], second["done"]) == (1, 1)
    assert (first["prefills"], first["prefilled"], first["copies"], second["copies"]) == (1, 4, 1, 1)
    assert (first["tokens"], second["tokens"]) == (10 + 16, 24)
    assert first["keys_live"] == sum(range(5, 15)) + sum(range(5, 21)) and second["keys_live"] == sum(range(21, 45))
    # If what has ended were read as well: up to the look and, in a slot among those decoded, beyond it.
    assert first["keys_all"] == first["keys_live"] + 6 * 15
    assert second["keys_all"] == second["keys_live"] + 8 * 45 + 32 * 21  # its slot holds what was moved away


def test_the_schedule_is_counted_and_written(tmp_path, capsys):
    """A small rollout of two ranks: more in flight fills the slots better; the fitted costs are those measured."""
    args = schedule.Args(lengths=("60,200",), slots=(16, 64), inflight=(0, 32), ranks=(2,), prompts=8, steps=3, seeds=2)
    args.out = str(tmp_path / "x.json")
    schedule.main(args)
    facts = json.loads((tmp_path / "x.json").read_text())
    assert facts["fitted"]["error"] < 0.02 and "gain" in capsys.readouterr().out
    rows = {(r["model"], r["slots"], r["inflight"], r["variant"]): r for r in facts["results"]}
    assert len(rows) == 2 * 2 * 2 * 3 and all(r["seconds"] > 0 and 0 <= r["tail"] <= 1 for r in rows.values())
    assert rows["8B", 64, 32, "quarters"]["live_share"] > rows["8B", 64, 0, "quarters"]["live_share"]
    assert rows["8B", 64, 0, "quarters"]["seconds"] < rows["8B", 64, 0, "all keys"]["seconds"]
    assert math.isclose(*(rows["8B", 64, 0, variant]["live_share"] for variant in ("halves", "quarters")))
