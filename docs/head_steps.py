"""From the head that one writes first to that of kernels/head.py, one step at a time, each of a few lines of PyTorch.

    python docs/head_steps.py              the table of docs/kernels.md: matrix products and memory of each step

All steps compute the same: the summed cross-entropy of N trained tokens of T, and its gradients by `hidden` (T, H) and
`weight` (V, H). A product is N·H·V multiply-adds; memory is the most that PyTorch had allocated beyond the inputs.
Gradients of the inputs' sizes are in it, and have to be.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kernels.head  # noqa: E402
from benchmarks.head import peak_bytes  # noqa: E402

T, N, H, V = 1024, 512, 32, 4096
CHUNK = 64


def all_at_once(hidden, weight, targets):
    """What one writes first: logits of all T positions."""
    loss = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")
    return torch.autograd.grad(loss, (hidden, weight))


def trained_only(hidden, weight, targets):
    """Positions that predict nothing are left out before the product."""
    trained = (targets != -100).nonzero()[:, 0]  # (N,)
    loss = F.cross_entropy(hidden[trained] @ weight.T, targets[trained], reduction="sum")
    return torch.autograd.grad(loss, (hidden, weight))


def chunk_loss(h, weight, y):
    return F.cross_entropy(h @ weight.T, y, reduction="sum")


def in_chunks(hidden, weight, targets):
    """A loop over chunks of tokens. But autograd keeps the log-softmax of every chunk for the backward."""
    trained = (targets != -100).nonzero()[:, 0]
    loss = sum(chunk_loss(hidden[chunk], weight, targets[chunk]) for chunk in trained.split(CHUNK))
    return torch.autograd.grad(loss, (hidden, weight))


def chunks_recomputed(hidden, weight, targets):
    """Autograd keeps nothing of a chunk, and makes its logits again in the backward: a fourth product."""
    trained = (targets != -100).nonzero()[:, 0]
    losses = []
    for chunk in trained.split(CHUNK):
        losses.append(checkpoint(chunk_loss, hidden[chunk], weight, targets[chunk], use_reentrant=False))
    return torch.autograd.grad(sum(losses), (hidden, weight))


def gradient_in_the_forward(hidden, weight, targets):
    """A chunk's gradient is made while its logits are there, in their place: softmax minus one at the target."""
    trained = (targets != -100).nonzero()[:, 0]
    d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    with torch.no_grad():
        for chunk in trained.split(CHUNK):
            h, y = hidden[chunk], targets[chunk]
            logits = h @ weight.T  # (C, V)
            d_logits = logits.sub_(logits.logsumexp(dim=1, keepdim=True)).exp_()
            d_logits[torch.arange(len(y)), y] -= 1
            d_hidden[chunk] = d_logits @ weight
            d_weight.addmm_(d_logits.T, h)
            del logits, d_logits
    return d_hidden, d_weight


def kernel(hidden, weight, targets):
    """kernels/head.py: the step before, with soft-cap, temperature, entropy, bf16 and Triton."""
    return torch.autograd.grad(kernels.head.linear_cross_entropy(hidden, weight, targets), (hidden, weight))


def kernel_logprobs(hidden, weight, targets):
    """kernels/head.py for losses that are no sum over tokens: the logits are made again, along the vocabulary."""
    logprobs, _ = kernels.head.linear_logprobs(hidden, weight, targets)
    return torch.autograd.grad(-logprobs.sum(), (hidden, weight))


STEPS = (all_at_once, trained_only, in_chunks, chunks_recomputed, gradient_in_the_forward, kernel, kernel_logprobs)


class Products(TorchDispatchMode):
    """Multiply-adds of the matrix products that run inside."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


def inputs():
    """hidden (T, H) and weight (V, H), random, and targets (T,), half of which are -100."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator).requires_grad_()
    weight = torch.randn(V, H, generator=generator).requires_grad_()
    targets = torch.randint(V, (T,), generator=generator)
    targets[torch.randperm(T, generator=generator)[N:]] = -100
    return hidden, weight, targets


def measure(step):
    """(products, bytes) of a step."""
    values = inputs()
    kernels.head.CHUNK, before = CHUNK, kernels.head.CHUNK
    try:
        with Products() as products:
            step(*values)
        return products.count / (N * H * V), peak_bytes(lambda: step(*values))
    finally:
        kernels.head.CHUNK = before


def table():
    """The table of docs/kernels.md."""
    lines = ["| step | products | memory, of all the logits |", "|---|---|---|"]
    for step in STEPS:
        products, size = measure(step)
        lines.append(f"| [`{step.__name__}`](head_steps.py#L1) | {products:g} | {size / (4 * N * V):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
