"""Attention over slots: the Triton kernel against a float64 definition, and the sampler with it, eager and compiled.

The kernel is compiled where there is CUDA, elsewhere run by Triton's interpreter on CPU tensors, slowly: few programs here.
"""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from test_kernels import tiny_config
from test_sampler import Policy, make, make_prompts, tokens
from together import together

import kernels.slots
from kernels.attention import Options
from kernels.sampler import Sampler, SamplingParams
from kernels.slots import triton_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter multiplies the bit patterns of bf16
pytestmark = pytest.mark.skipif(kernels.slots.triton is None, reason="Triton is not installed")


def definition(query, keys, values, positions, scaling, window, softcap):
    """One sequence and head at a time, in float64."""
    output = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    for b, position in enumerate(positions.tolist()):
        start = 0 if window is None else max(0, position + 1 - window)
        for h in range(query.shape[1]):
            k, v = (x[b, h // group, start : position + 1].double() for x in (keys, values))
            scores = k @ query[b, h].double() * scaling
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            output[b, h] = scores.softmax(0) @ v
    return output


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 2.0), (23, 2.0)])
@pytest.mark.parametrize(("Hq", "Hkv", "D", "programs"), [(4, 2, 8, 1), (6, 1, 24, 12), (2, 2, 16, 64)])
def test_kernel_equals_the_definition(dtype, window, softcap, Hq, Hkv, D, programs, monkeypatch):
    """Grouped queries, odd head sizes, one and many splits, windows, soft-caps; what is not looked at is not a number.
    Where there is a window, also with a ring of just so many places."""
    monkeypatch.setattr(kernels.slots, "BLOCK", 16)
    monkeypatch.setattr(kernels.slots, "PROGRAMS", programs)
    generator = torch.Generator().manual_seed(D)
    positions = torch.tensor([0, 40, 16, 7])  # one token; several blocks; one more than a block; more slots than sequences
    query = torch.randn(4, Hq, D, generator=generator).to(dtype)
    keys, values = torch.randn(2, 5, Hkv, 41, D, generator=generator).to(dtype)
    expected = definition(query, keys, values, positions, 0.3, window, softcap)
    for buffer in (keys, values):
        for b, position in enumerate([*positions.tolist(), -1]):
            buffer[b, :, position + 1 :] = torch.nan
            buffer[b, :, : max(0, position + 1 - (window or 99))] = torch.nan
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2  # weights of the softmax and the result are rounded
    for buffers in [(keys, values), *([ring(x, positions, window) for x in (keys, values)] for _ in range(bool(window)))]:
        inputs = (x.to(DEVICE) for x in (query, *buffers, positions))
        output = triton_attention(*inputs, Options(scaling=0.3, window=window, softcap=softcap)).cpu()
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


def ring(buffer, positions, R):
    """The last R positions of each slot of a buffer, position j in place j mod R."""
    places = torch.full((*buffer.shape[:2], R, buffer.shape[3]), torch.nan, dtype=buffer.dtype)
    for b, position in enumerate(positions.tolist()):
        for j in range(max(0, position + 1 - R), position + 1):
            places[b, :, j % R] = buffer[b, :, j]
    return places


def definition_as_kernel(query, buffers, positions, scaling, window, softcap):
    """What the custom operator returns, in PyTorch: all in the first of K parts, the others empty."""
    n, Hq, D = query.shape
    keys, values = buffers
    partial, logsumexp = kernels.slots._empty_outputs(query, keys)
    partial.zero_(), logsumexp.fill_(-1e38)
    place, q = torch.arange(keys.shape[2]), query.reshape(n, keys.shape[1], -1, D)
    behind = (positions[:, None] - place) % keys.shape[2]  # how far position i is from the last that has this place
    scores = q @ keys[:n].transpose(2, 3) * scaling
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    seen = (behind <= positions[:, None]) & (behind < (window or keys.shape[2]))
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    partial[:, :, 0] = (scores.softmax(-1) @ values[:n]).reshape(n, Hq, D)
    logsumexp[:, :, 0] = scores.logsumexp(-1).reshape(n, Hq)
    return partial, logsumexp


def sample(config, monkeypatch, sizes=None, compiled=False, group=None):
    """Completions with the kernel in place; `sizes`: decode so many slots at a time, as on CUDA. Compiled, twice: after
    the memory was released once."""
    model = make(config)
    # Many tokens end a completion, so that slots fall free and both sizes are decoded.
    plain, sampler = (Sampler(model.config, 8, 64, range(2, 10), DEVICE, group=group) for _ in range(2))
    params = SamplingParams(n=2, max_new_tokens=6 if sizes is None else 24, seed=1)
    prompts = make_prompts([5, 30, 1])
    for each in (plain, sampler):
        each.sync(Policy(model))
    expected = plain.sample(prompts, params)
    monkeypatch.setattr(kernels.slots, "use_triton", lambda query: True)
    monkeypatch.setattr(kernels.slots, "PROGRAMS", 16)
    if compiled:
        sampler._compile()
    if sizes:
        size = lambda: next(n for n in sizes if n > sampler._used()[-1])  # noqa: E731
        monkeypatch.setattr(sampler, "_run", lambda params: sampler._decode(size(), 64, params.temperature))
    completions = sampler.sample(prompts, params)
    if compiled:
        sampler.release()
        sampler.sync(Policy(model))
        assert tokens(sampler.sample(prompts, params)) == tokens(completions)
    return expected, completions


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.skipif(DEVICE == "cuda", reason="there the sampler always uses the kernel")
def test_sampler_with_the_kernel(family, monkeypatch):
    """The same tokens as with masked attention, and log-probabilities to 1e-5."""
    expected, completions = sample(tiny_config(family, 128, True), monkeypatch)
    assert tokens(completions) == tokens(expected)
    for a, b in zip(completions, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(a.logprobs), torch.from_numpy(b.logprobs), rtol=0, atol=1e-5)


@pytest.mark.slow  # a minute for each: torch.compile on a CPU
@pytest.mark.parametrize(("family", "kinds"), [("llama", 1), ("olmo3", 2), ("gemma3", 2)])
@pytest.mark.skipif(DEVICE == "cuda", reason="there the sampler is always compiled")
def test_layers_are_compiled_once_for_all(family, kinds, monkeypatch):
    """One graph for each kind of layer and number of slots, and one for the draw; none breaks; the same tokens. The memory
    is released once in between, and nothing is compiled again."""
    with kernel_on_cpu():
        assert compiled_graphs(family, monkeypatch) == 2 * (kinds + 1)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kinds"), [("llama", 1), ("olmo3", 2)])
@pytest.mark.skipif(DEVICE == "cuda", reason="needs as many cards as ranks")
def test_layers_of_a_shared_copy_are_compiled_once_for_all(family, kinds):
    """Sums over the ranks, and what OLMo's norms gather, are parts of the graphs."""
    assert together(2, graphs_of_a_shared_copy, family, seconds=500) == [2 * (kinds + 1)] * 2


def graphs_of_a_shared_copy(family):
    torch._inductor.config.compile_threads = 1  # workers would be forks of forks
    with kernel_on_cpu(), pytest.MonkeyPatch.context() as patch:
        return compiled_graphs(family, patch, dist.group.WORLD)


@contextlib.contextmanager
def kernel_on_cpu():
    """Inside, the custom operator is its definition."""
    kernels.slots._partial_attention.register_kernel("cpu")(definition_as_kernel)
    try:
        yield
    finally:
        kernels.slots._partial_attention.register_kernel("cpu")(kernels.slots._partial_attention._init_fn)


def compiled_graphs(family, monkeypatch, group=None):
    """How many graphs sampling compiles, without a break, for the tokens that it samples without them."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    config = tiny_config(family, 128, True)
    expected, completions = sample(config, monkeypatch, sizes=(4, 8), compiled=True, group=group)
    assert tokens(completions) == tokens(expected)
    assert not counters["graph_break"], counters["graph_break"]
    return counters["stats"]["unique_graphs"]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.slots import BLOCK, _attention_kernel as kernel
pointers = {"query": "*bf16", "keys": "*bf16", "values": "*bf16", "positions": "*i64", "partial": "*fp32", "logsumexp": "*fp32"}
floats = {"scaling": "fp32", "softcap": "fp32"}
for D in (64, 128, 256):
    for has in (False, True):
        constants = {"HAS_SOFTCAP": has, "HAS_WINDOW": has, "BLOCK_G": 16, "BLOCK_D": D, "BLOCK": BLOCK, "EXACT": False}
        signature = {n: "constexpr" if n in constants else pointers.get(n, floats.get(n, "i32")) for n in kernel.arg_names}
        source = ASTSource(kernel, signature, constants)
        binary = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 4, "num_stages": 3})
        assert "mma.sync" in binary.asm["ptx"] and ".local" not in binary.asm["ptx"]  # tensor cores, no arrays in local memory
        assert binary.metadata.shared <= 227 * 1024, binary.metadata.shared
"""


@pytest.mark.slow  # eight seconds
def test_kernel_compiles_for_hopper():
    """To a binary for sm_90 that uses tensor cores and fits into its shared memory; needs no GPU."""
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
