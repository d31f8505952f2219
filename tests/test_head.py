"""The head and its row kernels against float64 definitions from all the logits.

Every check runs on two paths: `torch` (PyTorch, what a CPU uses) and `triton` (the kernels; compiled where there is
CUDA, elsewhere run by Triton's interpreter on CPU tensors).
"""

import math
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.head
from benchmarks.head import peak_bytes
from kernels import rows
from kernels.head import linear_cross_entropy, linear_logprobs, linear_token_loss

CUDA = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(rows.triton is None, reason="Triton is not installed")
PATHS = ["torch", pytest.param("triton", marks=needs_triton)]


@contextmanager
def using(path, chunk=4096, block=64, padded=False):
    """Runs the head on a path, with this many tokens in a chunk and logits in a Triton block, and padded as on CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        if padded:
            patch.setattr(kernels.head, "_pad", lambda weight: F.pad(weight, (0, 0, 0, -len(weight) % 64)))
        patch.setattr(kernels.head, "CHUNK", chunk)
        patch.setattr(rows, "BLOCK", block)
        patch.setattr(rows, "use_triton", lambda logits: path == "triton" and logits.dtype == torch.float32)
        yield "cuda" if CUDA and path == "triton" else "cpu"


def definition(hidden, weight, targets, temperature=1.0, softcap=None):
    """log-probabilities and entropy from all the logits, in float64; 0 where the target is -100."""
    return from_logits(hidden.double() @ weight.double().T, targets, temperature, softcap)


def from_logits(logits, targets, temperature, softcap):
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logp = (logits / temperature).log_softmax(dim=1)
    trained = targets != -100
    logprobs = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return logprobs * trained, -(logp.exp() * logp).sum(dim=1) * trained


def example(T, H, V, share_trained, dtype=torch.float32, scale=1.0, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, H, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64) / H**0.5
    targets = torch.randint(0, V, (T,), generator=generator)
    targets[torch.rand(T, generator=generator) >= share_trained] = -100
    hidden, weight = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, targets.to(device)


def clipped_loss(advantages, old_logprobs, bonus=0.1):
    """PPO's clipped objective with an entropy bonus, as a per-token loss."""

    def token_loss(logprobs, entropy, tokens):
        ratio = torch.exp(logprobs - old_logprobs[tokens])
        a = advantages[tokens]
        return torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)) - bonus * entropy

    return token_loss


SHAPES = {
    "T": st.integers(0, 12), "H": st.integers(1, 24), "V": st.integers(1, 70) | st.just(300), "share": st.sampled_from([0.0, 0.5, 1.0]),
    "temperature": st.sampled_from([1.0, 0.6, 2.5]), "softcap": st.sampled_from([None, 2.0]),
    "chunk": st.sampled_from([1, 5, 4096]), "seed": st.integers(0, 99), "padded": st.booleans(),
}  # fmt: skip


def check(path, dtype, T, H, V, share, temperature, softcap, chunk, seed, padded):
    """Values and gradients of the three functions."""
    with using(path, chunk, padded=padded) as device:
        hidden, weight, targets = example(T, H, V, share, dtype, scale=3.0, seed=seed, device=device)
        generator = torch.Generator().manual_seed(seed)
        coefficients = torch.randn(2, T, generator=generator, dtype=torch.float64).to(device)
        logprobs, entropy = linear_logprobs(hidden, weight, targets, temperature, softcap)
        token_loss = clipped_loss(coefficients[1].float(), logprobs.detach() + 0.3 * coefficients[0].float())
        clipped, *metrics = linear_token_loss(hidden, weight, targets, token_loss, temperature, softcap)
        ours = {
            "logprobs": (torch.stack([logprobs, entropy]) * coefficients).sum(),
            "cross-entropy": linear_cross_entropy(hidden, weight, targets, softcap) * 0.5,
            "token loss": clipped,
        }
        gradients = {name: torch.autograd.grad(value, (hidden, weight)) for name, value in ours.items()}
    assert torch.equal(logprobs, metrics[0]) and torch.equal(entropy, metrics[1])
    assert not any(metric.requires_grad for metric in metrics)

    h, w = hidden.detach().double(), weight.detach().double()
    logits, trained = (h @ w.T).requires_grad_(), targets != -100
    true = from_logits(logits, targets, temperature, softcap)
    torch.testing.assert_close(torch.stack([logprobs, entropy]).double(), torch.stack(true), rtol=1e-5, atol=2e-5)
    truth = {
        "logprobs": (torch.stack(true) * coefficients).sum(),
        "cross-entropy": -from_logits(logits, targets, 1.0, softcap)[0].sum() * 0.5,
        "token loss": token_loss(*true, torch.arange(T, device=trained.device))[trained].sum(),
    }
    for name, value in truth.items():
        assert (ours[name] - value).abs() <= 1e-4 * (1 + value.abs()), name
        (d,) = torch.autograd.grad(value, logits, retain_graph=True)
        # Rounding each d_logit by a relative amount moves a gradient by at most that share of the sum of its terms'
        # sizes. bf16 has 8 bits: 2^-8 for the result and for d_logits, where Triton's interpreter truncates, 2^-7.
        unit, floor = (1e-4, 1e-5) if dtype == torch.float32 else (2**-7 + 2**-8, 1e-4)
        for a, b, size in zip(gradients[name], (d @ w, d.T @ h), (d.abs() @ w.abs(), d.abs().T @ h.abs()), strict=True):
            assert a.dtype == dtype and ((a - b).abs() <= unit * size + floor).all(), name


@settings(deadline=None, max_examples=60)
@given(**SHAPES)
def test_torch_equals_the_definition(**shape):
    """Any shape, piece size, share of trained tokens (none included), temperature, soft-cap."""
    check("torch", torch.float32, **shape)


@needs_triton
@settings(deadline=None, max_examples=20, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking is slow here
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16]), **SHAPES)
def test_triton_equals_the_definition(dtype, **shape):
    """Likewise, over blocks that the vocabulary does not fill, with operands and gradients in 32 and 16 bits."""
    check("triton", dtype, **shape)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("V", "W"), [(1, 64), (63, 64), (64, 64), (65, 128), (130, 192)])
def test_columns_beyond_the_vocabulary_do_not_count(path, dtype, V, W):
    """Whatever stands there: NaN changes no number and gets a gradient of 0."""
    torch.manual_seed(0)
    transform, y = rows.Transform(0.7, 5.0), torch.randint(V, (6,))
    with using(path) as device:
        logits = torch.full((6, W), torch.nan, device=device)
        logits[:, :V] = torch.randn(6, V)
        narrow, y = logits[:, :V].clone(), y.to(device)
        logprobs, softmax = rows.statistics(logits, y, transform._replace(V=V))
        expected, narrow_softmax = rows.statistics(narrow, y, transform)
        for a, b in zip((logprobs, *softmax), (expected, *narrow_softmax), strict=True):
            assert torch.equal(a, b)
        upstream = rows.Upstream(torch.randn(6, device=device), torch.randn(6, device=device))
        gradient = rows.gradient_(logits, y, softmax, upstream, transform._replace(V=V), dtype)
        assert gradient.shape == (6, W) and not gradient[:, V:].any()
        assert torch.equal(gradient[:, :V], rows.gradient_(narrow, y, softmax, upstream, transform, dtype))


def test_gradcheck_in_float64():
    hidden, weight, targets = example(9, 5, 11, 0.7, torch.float64)
    old = torch.linspace(-4, -1, 9, dtype=torch.float64)
    token_loss = clipped_loss(torch.linspace(-1, 1, 9, dtype=torch.float64), old)
    for function in (
        lambda h, w: linear_cross_entropy(h, w, targets),
        lambda h, w: linear_cross_entropy(h, w, targets, softcap=1.5),
        lambda h, w: linear_logprobs(h, w, targets, 0.7),
        lambda h, w: linear_logprobs(h, w, targets, 0.7, softcap=1.5),
        lambda h, w: linear_token_loss(h, w, targets, token_loss, 0.7, softcap=1.5)[0],
    ):
        assert torch.autograd.gradcheck(function, (hidden, weight))


@pytest.mark.parametrize("path", PATHS)
def test_extreme_logits(path):
    """Logits of ±1e4: log-probabilities are exact to float32's rounding of the logits, and no gradient is NaN."""
    with using(path) as device:
        hidden, weight, targets = example(30, 16, 33, 1.0, scale=6000.0, device=device)
        logprobs, entropy = linear_logprobs(hidden, weight, targets)
        (linear_cross_entropy(hidden, weight, targets) + logprobs.sum() + entropy.sum()).backward()
    assert (hidden @ weight.T).abs().max() > 1e4
    truth = definition(hidden, weight, targets)
    torch.testing.assert_close(logprobs.double(), truth[0], rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(entropy.double(), truth[1], rtol=0, atol=1e-2)
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_operands_keep_float32_logits(path):
    """From the same bf16 operands log-probabilities are off by 1e-5 at most (with bf16 logits by about 1e-2)."""
    with using(path, block=1024) as device:
        hidden, weight, targets = example(64, 32, 3000, 1.0, torch.bfloat16, scale=2.0, device=device)
        logprobs, entropy = linear_logprobs(hidden, weight, targets)
    truth = definition(hidden, weight, targets)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert (logprobs - truth[0]).abs().max() <= 1e-5 and (entropy - truth[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_views_equal_copies(path):
    """Operands and targets that are not contiguous, and an expanded gradient."""
    with using(path, chunk=3) as device:
        hidden, weight, targets = example(7, 6, 40, 0.8, device=device)
        views = (
            hidden.detach().T.contiguous().T.requires_grad_(),
            torch.stack([weight.detach(), weight.detach()], dim=2)[:, :, 0].requires_grad_(),
            torch.stack([targets, targets], dim=1)[:, 0],
        )
        assert not any(view.is_contiguous() for view in views)
        for h, w, y in ((hidden, weight, targets), views):
            logprobs, entropy = linear_logprobs(h, w, y)
            (logprobs.sum() + entropy.sum() + linear_cross_entropy(h, w, y)).backward()
    torch.testing.assert_close(views[0].grad, hidden.grad)
    torch.testing.assert_close(views[1].grad, weight.grad)


@pytest.mark.parametrize("path", PATHS)
def test_only_one_operand_trained(path):
    """Frozen head or frozen body: the other gradient is the same, and the frozen one is not made."""
    with using(path, chunk=4) as device:
        hidden, weight, targets = example(9, 5, 20, 0.7, device=device)
        for function in (linear_cross_entropy, lambda *a: linear_logprobs(*a)[0].sum()):
            both = torch.autograd.grad(function(hidden, weight, targets), (hidden, weight))
            (alone,) = torch.autograd.grad(function(hidden, weight.detach(), targets), (hidden,))
            assert torch.equal(alone, both[0])
            (alone,) = torch.autograd.grad(function(hidden.detach(), weight, targets), (weight,))
            assert torch.equal(alone, both[1])


@pytest.mark.parametrize("path", PATHS)
def test_no_memory_is_read_before_it_is_written(path):
    """With every new tensor poisoned (NaN), results are the same; also with nothing to train on."""
    results = []
    for poison in (False, True):
        torch.use_deterministic_algorithms(poison, warn_only=True)  # fills what torch.empty returns
        try:
            with using(path, chunk=4) as device:
                for share in (0.0, 0.6):
                    hidden, weight, targets = example(9, 5, 20, share, device=device)
                    logprobs, entropy = linear_logprobs(hidden, weight, targets)
                    loss = linear_cross_entropy(hidden, weight, targets)
                    (logprobs.sum() + entropy.sum() + loss).backward()
                    results.append([logprobs, entropy, loss, hidden.grad, weight.grad])
        finally:
            torch.use_deterministic_algorithms(False)
    for plain, poisoned in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))
    assert not any(x.any() for x in results[0])  # nothing trained: zeros


# -------------------------------------------------------------------------------------------------- work and memory


class Products(TorchDispatchMode):
    """Multiply-adds of the matrix products that are executed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        else:
            assert name not in ("bmm", "matmul", "baddbmm", "einsum", "linear"), name
        return function(*args, **(kwargs or {}))


def test_number_of_matrix_products():
    """Three products of N·H·V for a loss whose gradient is made in the forward, four otherwise, one without gradient;
    N is the number of trained tokens alone."""
    hidden, weight, targets = example(100, 4, 300, 1.0)
    targets[60:] = -100

    def nll(logprobs, entropy, tokens):
        return -logprobs

    def products(function, backward=True):
        with using("torch", chunk=16), Products() as counted:
            loss = function()
            if backward:
                loss.backward()
        return counted.count / (60 * 4 * 300)

    assert products(lambda: linear_cross_entropy(hidden, weight, targets)) == 3
    assert products(lambda: linear_token_loss(hidden, weight, targets, nll)[0]) == 3
    assert products(lambda: linear_logprobs(hidden, weight, targets)[0].sum()) == 4
    with torch.no_grad():
        for function in (linear_cross_entropy, linear_logprobs, lambda *a: linear_token_loss(*a, nll)):
            assert products(lambda f=function: f(hidden, weight, targets), backward=False) == 1


def assert_memory_is_bounded(T, H, V, chunk):
    """Peak allocation of forward and backward is a few chunks of logits, and what is of the size of the operands."""
    hidden, weight, targets = example(T, H, V, 1.0)
    with using("torch", chunk=chunk):
        for function, limit in ((linear_cross_entropy, 2), (lambda *a: torch.stack(linear_logprobs(*a)).sum(), 2.5)):
            used = peak_bytes(lambda f=function: torch.autograd.grad(f(hidden, weight, targets), (hidden, weight)))
            chunks = (used - 4 * 3 * (T + V) * H) / (4 * chunk * V)
            print(f"peak {used / 2**20:.0f} MiB: {chunks:.2f} chunks beside the gradients; all logits {T / chunk:.0f}")
            assert chunks <= limit < T / chunk  # logits, and PyTorch's intermediate results


def test_memory_is_bounded_by_the_chunk():
    assert_memory_is_bounded(T=2048, H=16, V=2048, chunk=128)


@pytest.mark.slow
def test_memory_at_a_real_shape():
    assert_memory_is_bounded(T=16384, H=1024, V=32768, chunk=kernels.head.CHUNK)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_gradients_take_the_memory_of_the_logits(dtype):
    with using("triton") as device:
        logits = torch.randn(3, 50, device=device)
        ones, y = torch.ones(3, device=device), torch.tensor([0, 9, 49], device=device)
        softmax, upstream = rows.Softmax(logits.logsumexp(1), None), rows.Upstream(ones, None)
        gradient = rows.gradient_(logits, y, softmax, upstream, rows.Transform(), dtype)
    assert gradient.dtype == dtype and gradient.shape == logits.shape
    assert gradient.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import rows
from kernels.rows import BLOCK
pointers = {"targets": "*i64", "gradient": "*bf16", "logits": "*fp32"}
for kernel in (rows._statistics_kernel, rows._gradient_kernel):
    for softcap in (False, True):
        signature = {name: pointers.get(name, "*fp32") for name in kernel.arg_names}
        signature |= {"stride": "i32", "gradient_stride": "i32", "V": "i32", "W": "i32", "temperature": "fp32", "softcap": "fp32"}
        constants = {"HAS_SOFTCAP": softcap, "BLOCK": rows.BLOCK}
        signature = {n: "constexpr" if n in constants else signature[n] for n in kernel.arg_names}
        # What Triton knows at a launch: where tensors begin, and that rows are padded; of V it knows nothing.
        padded = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names)
                  if signature[n].startswith("*") or n in ("stride", "gradient_stride", "W")}
        source = ASTSource(kernel, signature, constants, padded)
        binary = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 8})
        assert len(binary.asm["cubin"]) > 1000
        ptx = binary.asm["ptx"]
        loads = [line for line in ptx.splitlines() if "ld.global" in line]
        assert sum(".v4.b32" in line for line in loads) >= BLOCK // 256 // 4, loads  # 16 bytes at a time, 256 threads
        assert "gradient" not in kernel.arg_names or "st.global.v4.b32" in ptx  # eight numbers of 16 bits
"""


@needs_triton
def test_kernels_compile_for_hopper():
    """To a binary for sm_90, which needs no GPU (Triton brings NVIDIA's assembler)."""
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, w, t: (h[:, 1:], w, t), "expected hidden"),
        (lambda h, w, t: (h[None], w, t), "expected hidden"),
        (lambda h, w, t: (h, w, t[1:]), "targets"),
        (lambda h, w, t: (h, w, t.int()), "targets"),
        (lambda h, w, t: (h.bfloat16(), w, t), "share a floating dtype"),
        (lambda h, w, t: (h.int(), w.int(), t), "share a floating dtype"),
        (lambda h, w, t: (h.to("meta"), w, t), "share a device, got cpu, meta"),
        (lambda h, w, t: (h, w, t + 50), "outside the vocabulary"),
        (lambda h, w, t: (h, w, t - 60), "outside the vocabulary"),
    ],
)
def test_head_refuses_what_does_not_fit(change, message):
    for function in (linear_cross_entropy, linear_logprobs, lambda *a: linear_token_loss(*a, clipped_loss)):
        with pytest.raises(ValueError, match=message):
            function(*change(*example(6, 4, 9, 1.0)))


def test_head_refuses_wrong_settings():
    operands = example(6, 4, 9, 1.0)
    for temperature in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive"):
            linear_logprobs(*operands, temperature)
        with pytest.raises(ValueError, match="temperature must be positive"):
            linear_token_loss(*operands, lambda lp, e, t: -lp, temperature)
    for function in (linear_cross_entropy, linear_logprobs):
        with pytest.raises(ValueError, match="softcap must be positive"):
            function(*operands, softcap=0.0)
    with pytest.raises(ValueError, match=r"token_loss returned \(\) for \(6,\) tokens"):
        linear_token_loss(*operands, lambda logprobs, entropy, tokens: -logprobs.mean())


def test_trained_positions_may_be_given():
    """By who knows them, as `common.pack` does: then nothing looks for them, and the results are the same."""
    hidden, weight, targets = example(40, 6, 30, 0.5)
    trained = (targets != -100).nonzero()[:, 0]
    given = [linear_cross_entropy(hidden, weight, targets, None, trained), *linear_logprobs(hidden, weight, targets, trained=trained)]
    found = [linear_cross_entropy(hidden, weight, targets), *linear_logprobs(hidden, weight, targets)]
    for a, b in zip(given, found, strict=True):
        assert torch.equal(a, b)
        gradients = (torch.autograd.grad(x.sum(), (hidden, weight), retain_graph=True) for x in (a, b))
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    few = linear_cross_entropy(hidden, weight, targets, None, trained[:3])
    assert torch.equal(few, -found[1][trained[:3]].sum()), "what is given is taken"
