"""The language-model head alone: ours against the other ways to get a loss from hidden states without the logits.

    pip install -r requirements-bench.txt
    python benchmarks/head.py                        table, and benchmarks/results/head_DEVICE.json

Inputs are N hidden states (N, H) and a head (V, H) of random numbers, scaled so that logits have a standard deviation
of 3. The loss is the summed cross-entropy, except in the rows marked `logprobs`, whose functions return one number for
each token (and, ours and TRL's, the entropy) and are summed outside. On CUDA operands are bf16, on CPU float32.

Of each contestant: time of the forward without gradient and of forward and backward (the contestants take turns, the
median of --rounds counts); the largest amount of memory allocated beyond the inputs; the error of the loss (or the
largest of a log-probability), and of both gradients as |a - b| / |b|, against plain PyTorch in float64 from the same
operands. `floor` is the time of the bare matrix products, measured in the same rounds: N·H·V multiply-adds each, one in
the forward, three or four in all. The last column is floor / time.

A contestant whose package is missing or that cannot run on the device is listed with the reason.
"""

import datetime
import gc
import importlib.metadata
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kernels.head  # noqa: E402
from kernels.head import linear_cross_entropy, linear_logprobs, linear_token_loss  # noqa: E402

# The last two: Llama 3 with Tülu 3's tokens, and OLMo 3, whose vocabularies are no multiple of 64, or even of 4.
CUDA_SHAPES = ["8192,2048,128256", "16384,2560,151936", "16384,4096,128264", "16384,4096,100278"]
CPU_SHAPES = ["1024,256,8192"]


@dataclass
class Args:
    shapes: list[str] = field(default_factory=lambda: CUDA_SHAPES if torch.cuda.is_available() else CPU_SHAPES)
    """N,H,V of each table"""
    rounds: int = 15
    """timed runs of each contestant"""
    trained: float = 1.0
    """share of the tokens that are trained on"""
    threads: int = 1
    """PyTorch threads on CPU"""
    out: str | None = None
    """result file; by default benchmarks/results/head_cpu.json or head_cuda.json"""


# ---------------------------------------------------------------------------------------------------- contestants


def naive(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def torch_linear_cross_entropy(hidden, weight, targets):
    options = torch.nn.LinearCrossEntropyOptions()  # without options it is the naive one
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def liger(hidden, weight, targets):
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)


def cce(hidden, weight, targets):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, reduction="sum", impl="cce")


def cce_exact(hidden, weight, targets):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, reduction="sum", filter_eps=None, impl="cce")


def trl_logprobs(hidden, weight, targets):
    from trl.kernels import ChunkedLogProbFunction

    mask = targets != -100
    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden[mask], weight, None, targets[mask], 1.0, 32768, None, 1.0, ("entropy",)
    )
    return logprobs.new_zeros(len(targets)).masked_scatter(mask, logprobs)


def ours_not_padded(hidden, weight, targets):
    pad, kernels.head._pad = kernels.head._pad, lambda weight: weight
    try:
        return linear_cross_entropy(hidden, weight, targets)  # its gradient is made in the forward
    finally:
        kernels.head._pad = pad


def ours_logprobs(hidden, weight, targets):
    return linear_logprobs(hidden, weight, targets)[0]


def ours_token_loss(hidden, weight, targets):
    return linear_token_loss(hidden, weight, targets, lambda logprobs, entropy, tokens: -logprobs)[0]


# name: (function, matrix products in all, package)
CONTESTANTS = {
    "ours": (linear_cross_entropy, 3, None),
    "ours, token loss": (ours_token_loss, 3, None),
    "ours, head not padded": (ours_not_padded, 3, None),
    "naive": (naive, 3, None),
    "torch linear_cross_entropy": (torch_linear_cross_entropy, 3, None),
    "Liger": (liger, 3, "liger-kernel"),
    "Apple CCE": (cce, 3, "cut-cross-entropy"),
    "Apple CCE, all gradients": (cce_exact, 3, "cut-cross-entropy"),
    "ours, logprobs": (ours_logprobs, 4, None),
    "TRL, logprobs": (trl_logprobs, 4, "trl"),
}
NEED_CUDA = ("ours, head not padded", "Liger", "Apple CCE", "Apple CCE, all gradients")


def why_not(name, device):
    """The reason why a contestant cannot run here, or None."""
    package = CONTESTANTS[name][2]
    try:
        version = importlib.metadata.version(package) if package else None
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed"
    if name in NEED_CUDA and device == "cpu":
        return f"{package} {version} needs CUDA" if package else "it is padded on CUDA only"
    if name.startswith("torch") and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} does not have it"
    return None


# ---------------------------------------------------------------------------------------------------- measurements


def peak_bytes(function):
    """Largest amount of memory that PyTorch had allocated during the call beyond what it had before, in bytes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):  # each allocation, and each release (negative)
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def seconds(function):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def truth(hidden, weight, targets):
    """Log-probabilities, and the gradients of their negative sum, in float64, 1024 tokens at a time."""
    weight = weight.detach().double().requires_grad_()
    logprobs, d_hidden = torch.zeros(len(targets), dtype=torch.float64, device=targets.device), []
    for h, y, out in zip(hidden.detach().split(1024), targets.split(1024), logprobs.split(1024), strict=True):
        h = h.double().requires_grad_()
        nll = F.cross_entropy(h @ weight.T, y, reduction="none")
        nll.sum().backward()  # adds to weight.grad
        out.copy_(-nll.detach())
        d_hidden.append(h.grad)
    return logprobs, torch.cat(d_hidden), weight.grad


def errors(function, inputs, exact):
    """Relative errors of the loss and both gradients; of log-probabilities the largest absolute error."""
    hidden, weight, targets = inputs
    logprobs, *exact_gradients = exact
    value = function(*inputs)
    gradients = torch.autograd.grad(value if value.dim() == 0 else -value.sum(), (hidden, weight))
    if value.dim():
        error = {"logprob_error": (value.detach() - logprobs).abs().max().item()}
    else:
        error = {"loss_error": abs(value.item() / -logprobs.sum().item() - 1)}
    for name, a, b in zip(("d_hidden_error", "d_weight_error"), gradients, exact_gradients, strict=True):
        error[name] = ((a.double() - b).norm() / b.norm()).item()
    return error


def products(hidden, weight):
    """The bare matrix products: s = h W^T, d_h = d_s W, d_W = d_s^T h."""
    d_logits = hidden @ weight.T
    return {1: lambda: hidden @ weight.T, 2: lambda: d_logits @ weight, 3: lambda: d_logits.T @ hidden}


def measure(args, N, H, V, device):
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    hidden = (torch.randn(N, H, generator=generator, device=device) * 3).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=generator, device=device) / H**0.5).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator, device=device)
    targets[torch.rand(N, generator=generator, device=device) >= args.trained] = -100
    inputs, exact = (hidden, weight, targets), truth(hidden, weight, targets)
    results, runs = {}, {}
    for name, (function, _, _) in CONTESTANTS.items():
        if reason := why_not(name, device):
            results[name] = {"not_run": reason}
            continue

        def forward(function=function):
            with torch.no_grad():
                function(*inputs)

        def both(function=function):
            value = function(*inputs)
            torch.autograd.grad(value if value.dim() == 0 else -value.sum(), (hidden, weight))

        try:
            results[name] = errors(function, inputs, exact)  # first: what is wrong need not be fast
            forward()
            results[name] |= {"forward_bytes": peak_bytes(forward), "both_bytes": peak_bytes(both)}
            runs |= {(name, "forward"): forward, (name, "both"): both}
        except Exception as error:  # out of memory, or no kernel for this device
            results[name] = {"not_run": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        gc.collect()
    del exact
    bare = products(hidden[targets != -100].detach(), weight.detach())
    runs |= {("product", i): run for i, run in bare.items()}
    times = {key: [] for key in runs}
    for _ in range(args.rounds):
        for key, run in runs.items():
            times[key].append(seconds(run))
    median = {key: statistics.median(values) for key, values in times.items()}
    floor = {1: median["product", 1], 3: sum(median["product", i] for i in bare)}
    floor[4] = floor[3] + floor[1]
    for name, result in results.items():
        if "not_run" not in result:
            count, both = CONTESTANTS[name][1], median[name, "both"]
            result |= {"products": count, "forward_seconds": median[name, "forward"], "both_seconds": both}
            result |= {"floor_over_time": floor[count] / both, "both_seconds_of_rounds": times[name, "both"]}
    flops = 2 * int((targets != -100).sum()) * H * V
    return {"shape": [N, H, V], "dtype": str(dtype), "floor_seconds": floor, "flops_per_second": 3 * flops / floor[3],
            "contestants": results}  # fmt: skip


def table(result):
    N, H, V = result["shape"]
    floor = result["floor_seconds"]
    lines = [
        f"N {N}, H {H}, V {V}, {result['dtype']}. Bare products: "
        + ", ".join(f"{seconds * 1e3:.1f} ms ({count})" for count, seconds in floor.items())
        + f"; {result['flops_per_second'] / 1e12:.3g} TFLOP/s",
        "",
        "| | forward, ms | both, ms | forward, MiB | both, MiB | error of loss or logprob | d_hidden | d_weight "
        "| floor / time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in result["contestants"].items():
        if "not_run" in r:
            lines.append(f"| {name} | not run: {r['not_run']} | | | | | | | |")
            continue
        lines.append(
            f"| {name} | {r['forward_seconds'] * 1e3:.1f} | {r['both_seconds'] * 1e3:.1f} | "
            f"{r['forward_bytes'] / 2**20:.0f} | {r['both_bytes'] / 2**20:.0f} | "
            f"{r.get('loss_error', r.get('logprob_error')):.1e} | {r['d_hidden_error']:.1e} | "
            f"{r['d_weight_error']:.1e} | {r['floor_over_time']:.2f} ({r['products']}) |"
        )
    return "\n".join(lines)


def cpu_name():
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(args):
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tables = []
    for shape in args.shapes:
        tables.append(measure(args, *map(int, shape.split(",")), device))
        print(table(tables[-1]), end="\n\n", flush=True)
    packages = ["torch", "triton", "trl", "liger-kernel", "cut-cross-entropy"]
    installed = {d.metadata["Name"].replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
    result = {
        "command": shlex.join(["python", *sys.argv]), "date": datetime.date.today().isoformat(),
        "commit": git.stdout.strip(), "versions": {p: installed.get(p) for p in packages},
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {args.threads} thread(s)",
        "tables": tables,
    }  # fmt: skip
    path = Path(args.out or ROOT / "benchmarks" / "results" / f"head_{device}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args, description=__doc__, use_underscores=True))
