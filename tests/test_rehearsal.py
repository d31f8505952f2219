"""What runs on CUDA only, rehearsed on a CPU as far as that goes.

Training: `varlen_attn` with PyTorch's flash attention emulated below it, so that everything above (arguments, windows,
grouped heads, the operator's shape functions, torch.compile) is the real thing. The kernel itself is `make test-cuda`'s.
Benchmarks: benchmarks/gpu.py with tiny sizes walks through every part.
"""

import copy
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_kernels import tiny_config
from transformers import AttentionInterface, AutoModelForCausalLM

import common
import kernels.attention
from kernels.attention import Options

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


@pytest.mark.slow  # 45 s
def test_the_gpu_benchmark_walks_through(tmp_path):
    """Everything that can run on a CPU is measured; what cannot says why; losses of contestants agree."""
    command = [sys.executable, "benchmarks/gpu.py", "--dry", "--steps", "3", "--warmup", "1", "--out", str(tmp_path / "x.json")]
    parts = ["head", "sft", "dpo", "sampler", "grpo"]
    done = subprocess.run([*command, "--parts", *parts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    results = json.loads((tmp_path / "x.json").read_text())["results"]
    reasons = {r["not_run"] for r in results if "not_run" in r}
    assert reasons <= {"not in a dry run", "trl is not installed", "liger-kernel is not installed", "Liger's kernels need CUDA"}
    measured = {(r["part"], r["name"]) for r in results if "not_run" not in r}
    assert {("sft", "ours"), ("dpo", "ours"), ("sampler", "ours"), ("sampler", "generate"), ("grpo", "ours")} <= measured
    assert {r["part"] for r in results} == {"card", "prepare", *parts}
