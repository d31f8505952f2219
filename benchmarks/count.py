"""Floors of a training microbatch and of a decode step, by counting. Predictions for a GPU, not measurements of one.

    python benchmarks/count.py                       tables, and benchmarks/results/count.json; seconds, on any CPU

Unmodified transformers models with bf16 parameters run forward and backward on meta tensors, and every operation that
PyTorch dispatches is counted: its arithmetic and its memory traffic. An operation takes

    max(operations / rate of a large product, (bytes read + bytes written) / rate of a large copy)

and nothing else: no latency, no gaps, every product as fast as the largest. So the seconds are floors, and what a GPU
reaches can only be less. Views and allocations are free; an input that is broadcast counts once.

    products        2 m n k; they must be 6 times (matrices' elements) times tokens, forward and backward, or it stops
    attention       4 Hq D Σ L²/2 forward, 2.5 times that backward; traffic: its arguments and results, once
    elementwise     all else in the model: norms, rotary embedding, activation, residuals, sums of gradients, embedding
    head            kernels/head.py by formula: per chunk three products; float32 logits written by the first, read by
                    the statistics, read and half written by the gradient, read twice as bf16; float32 d_weight
    FSDP2           of one process: bytes per parameter of the casts and copies around each microbatch (gather in
                    forward and backward, gradient copied in and out, and added from the second microbatch of a step on)
    optimizer       clipping and fused AdamW, a --microbatches-th of a step

eager: each operation by itself. compiled: what `--compile` could do at best, under one assumption. Within one decoder
layer's forward or backward, all products and attention calls run whose operands are there, then all elementwise
operations that the next of them need, as one kernel, and so on. It reads once what it did not make itself and writes
once what a later operation of the same pass reads. What only the backward would read is not kept but made again there
from the kernel's own inputs, at no cost but reading them. Outside of the layers nothing is fused.

Kept for backward: distinct memory that eager autograd saves, without parameters, by saved-tensor hooks. Checkpointing
runs the layers' forward once more. `host` is all launches times an assumed cost each: where it exceeds the sum, the
processor that launches is the limit, not the GPU. MFU counts products, attention and head once, over --tflops.
"""

import json
import sys
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import torch
from sft_vs_trl import environment
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo3Config, Qwen3Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kernels.memory  # noqa: E402, F401  (registers packed_meta: `packed` as on CUDA)
from kernels.head import CHUNK  # noqa: E402


@dataclass
class Args:
    tflops: float = 780.0
    """rate of a large bf16 product, 1e12 operations per second"""
    terabytes: float = 4.3
    """rate of a large copy, 1e12 bytes read or written per second"""
    launch_microseconds: float = 6.0
    """assumed time for Python and PyTorch to start one eager operation; only for the column `host`"""
    sequences: int = 8
    """sequences in the microbatch"""
    length: int = 1024
    """tokens in each, all trained"""
    microbatches: int = 4
    """microbatches in an optimizer step, over which the optimizer's time is spread"""
    out: str | None = None
    """result file; by default benchmarks/results/count.json"""


MODELS = {
    "1.5B": LlamaConfig(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=4096, tie_word_embeddings=True,
    ),
    "4B": Qwen3Config(
        vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=4096, tie_word_embeddings=True,
    ),
    "Tülu 3 8B": LlamaConfig(
        vocab_size=128_264, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=4096, tie_word_embeddings=False,
    ),
    "OLMo 3 7B": Olmo3Config(
        vocab_size=100_278, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, sliding_window=4096, tie_word_embeddings=False,
    ),
}  # fmt: skip

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
OVERWRITES = {"copy_", "fill_", "zero_"}  # what their first argument held is not read
# Zeros and a copy; zeros for a random state that is not used; the kernels before and after the main one.
LAUNCHES = {"slice_backward": 2, "select_backward": 2, "_varlen_attn": 2, "_varlen_attn_backward": 3}


@dataclass
class Op:
    """One operation: tensors read and written as {(storage, offset, elements): bytes}."""

    name: str
    kind: str
    phase: str
    layer: int | None
    flops: float
    launches: int
    reads: dict
    writes: dict
    again: float = 0.0  # bytes beyond reads and writes

    def bytes(self):
        return sum(self.reads.values()) + sum(self.writes.values()) + self.again


class Counter(TorchDispatchMode):
    """Records operations. `phase` and `layer` say where they belong; hooks on the model set them."""

    def __init__(self, sequences, length):
        super().__init__()
        self.ops, self.alive, self.phase, self.layer = [], [], "forward", None
        self.sizes = {}  # storage: bytes
        self.squares = sequences * length**2

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.alive += [inputs, outputs]  # so that no storage's address is used twice; on meta it costs nothing
        inside = {x.untyped_storage()._cdata for x in inputs}
        is_view = all(x.untyped_storage()._cdata in inside for x in outputs) and not func._schema.is_mutable
        self.sizes |= {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in inputs + outputs}
        if name in ALLOCATIONS or is_view:
            return result
        kind, flops = "elementwise", 0.0
        if name in PRODUCTS:
            a, b = inputs[-2:]
            kind, flops = "products", 2.0 * a.numel() * b.shape[-1]
        elif name.startswith("_varlen_attn"):
            query = args[1] if name.endswith("backward") else args[0]
            flops = 2.0 * query.shape[1] * query.shape[2] * self.squares * (2.5 if name.endswith("backward") else 1)
            kind = "attention"
        op = Op(name, kind, self.phase, self.layer, flops, LAUNCHES.get(name, 1), extents(inputs), extents(outputs))
        if name == "embedding":  # reads as many rows as it writes, not the whole table
            op.reads = extents([args[1]])
            op.again = sum(op.writes.values())
        if name in OVERWRITES:
            op.reads = extents(inputs[1:])
        if name in ("slice_backward", "select_backward"):  # zeros, then the slice over them
            op.again = sum(op.reads.values())
        self.ops.append(op)
        return result


def extents(tensors):
    """{(storage, offset, elements): bytes}, what is expanded counted once."""
    result = {}
    for x in tensors:
        elements = 1
        for size, stride in zip(x.shape, x.stride(), strict=True):
            elements *= size if stride or not size else 1
        result[x.untyped_storage()._cdata, x.storage_offset(), elements] = elements * x.element_size()
    return result


def merge(parts, sizes):
    """Several extents of the same storages as one for each: the sum of its different parts, at most all of it."""
    total = {}
    for (storage, _, _), size in parts.items():
        total[storage] = min(sizes[storage], total.get(storage, 0) + size)
    return {(storage, 0, 0): size for storage, size in total.items()}


def make_model(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="packed_meta", dtype=torch.bfloat16)
    model.tie_weights()
    return model.train()


def forward(model, args):
    T = args.sequences * args.length
    row = torch.zeros(1, T, dtype=torch.int64, device="meta")
    cu_seqlens = torch.zeros(args.sequences + 1, dtype=torch.int32, device="meta")
    return model.base_model(
        input_ids=row, position_ids=row, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=args.length,
        max_length_k=args.length, use_cache=False,
    ).last_hidden_state  # fmt: skip


def record(model, args):
    """Operations of the body's forward and backward, in order."""
    counter = Counter(args.sequences, args.length)

    def enter(i):  # in the backward, the gradient of layer i's output is ready: what follows is layer i's
        def hook(_):
            counter.layer = i
        return hook

    def before(layer, inputs, i):
        if i == 0:
            inputs[0].register_hook(enter(None))
        counter.layer = i

    def after(layer, inputs, output, i):
        output.register_hook(enter(i))
        counter.layer = None

    handles = []
    for i, layer in enumerate(model.base_model.layers):
        handles.append(layer.register_forward_pre_hook(lambda *a, i=i: before(*a, i)))
        handles.append(layer.register_forward_hook(lambda *a, i=i: after(*a, i)))
    with counter:
        hidden = forward(model, args)
        counter.phase = "backward"
        hidden.backward(torch.empty_like(hidden))
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return counter.ops, counter.sizes


def reorder(ops):
    """Within a layer, all products that can run, then all elementwise operations that the next products need, etc."""
    result = []
    for (layer, _), section in groupby(ops, lambda op: (op.layer, op.phase)):
        if layer is None:
            result += section
            continue
        rest, batches = list(section), []  # batches: products, elementwise, products, ...
        used = {storage for op in rest for storage, _, _ in op.reads}
        while rest:
            products, left, read, written = len(batches) % 2 == 0, [], set(), set()
            batches.append([])
            for op in rest:
                reads, writes = ({storage for storage, _, _ in x} for x in (op.reads, op.writes))
                if (op.kind == "elementwise") == products or written & (reads | writes) or read & writes:
                    left.append(op)
                    read, written = read | reads, written | writes
                else:
                    batches[-1].append(op)
            rest = left
        batches += [[], []]
        for k in range(1, len(batches) - 2, 2):
            needs, now, later = {storage for op in batches[k + 1] for storage, _, _ in op.reads}, [], []
            needs |= {storage for op in batches[k] for storage, _, _ in op.writes} - used  # parameters' gradients
            for op in reversed(batches[k]):
                if needed := needs & {storage for storage, _, _ in op.writes}:
                    needs |= {storage for storage, _, _ in op.reads}
                (now if needed else later).insert(0, op)
            batches[k], batches[k + 2] = now, later + batches[k + 2]
        result += [op for batch in batches for op in batch]
    return result


def fuse(ops, sizes):
    """The compiled form: runs of elementwise operations of one layer become one operation each."""
    groups = []
    for op in ops:
        last = groups[-1] if groups else None
        joins = last and op.kind == last[-1].kind == "elementwise" and op.layer is not None
        if joins and (op.layer, op.phase) == (last[-1].layer, last[-1].phase):
            last.append(op)
        else:
            groups.append([op])
    readers = {}  # storage: {(group, phase)} that read it
    for g, group in enumerate(groups):
        for op in group:
            for storage, _, _ in op.reads:
                readers.setdefault(storage, set()).add((g, op.phase))
    fused, remade = [], {}  # remade: storage that is not kept → what it is made of
    for g, group in enumerate(groups):
        first = group[0]
        if first.kind != "elementwise" or first.layer is None:
            fused += group
            continue
        reads, writes, made = {}, {}, set()
        for op in group:
            for key, size in op.reads.items():
                if key[0] not in made:
                    reads |= remade.get(key[0], {key: size})
            writes |= op.writes
            made |= {storage for storage, _, _ in op.writes}
        live = {s for s in made if any(r > g and phase == first.phase for r, phase in readers.get(s, ()))}
        if first.phase == "backward":  # gradients of parameters, which nobody reads here
            live |= {s for s in made if s not in readers}
        for storage in made - live:
            remade[storage] = dict(reads)
        writes = merge({key: size for key, size in writes.items() if key[0] in live}, sizes)
        fused.append(Op("fused", "elementwise", first.phase, first.layer, 0.0, 1, merge(reads, sizes), writes))
    return fused


def head(config, tokens):
    """Operations of linear_cross_entropy on `tokens` trained tokens: [(phase, kind, flops, bytes, launches)]."""
    H, V, rows = config.hidden_size, config.vocab_size, []
    for start in range(0, tokens, CHUNK):
        C = min(CHUNK, tokens - start)
        product, weight, states = 2.0 * C * H * V, 2 * V * H, 2 * C * H
        rows += [
            ("forward", "head products", product, states + weight + 4 * C * V, 1),
            ("forward", "head products", product, 2 * C * V + weight + states, 1),
            ("forward", "head products", product, 2 * C * V + states + 4 * V * H * (2 if start else 1), 1),
            ("forward", "head passes", 0, 4 * C * V, 1),  # statistics
            ("forward", "head passes", 0, 4 * C * V + 2 * C * V, 1),  # gradient over the logits
            ("forward", "head passes", 0, 4 * states, 2),  # tokens' states taken out, and their gradients put back
        ]
    rows.append(("forward", "head passes", 0, 2 * tokens * H, 1))  # zeros
    rows.append(("backward", "head passes", 0, (2 + 2) * tokens * H + (4 + 2) * V * H, 2))
    return rows


def around(config, parameters, microbatches):
    """FSDP2's traffic of one process for one microbatch, and its share of the optimizer, in the form of `head`."""
    gather, groups = (4 + 2) + (2 + 2), config.num_hidden_layers + 1
    reduce = (2 + 4) + (4 + 4) + (4 + 4 + 4) * (microbatches - 1) / microbatches
    return [
        ("forward", "FSDP2", 0, gather * parameters, 2 * groups),
        ("backward", "FSDP2", 0, (gather + reduce) * parameters, 5 * groups),
        ("step", "optimizer", 0, (28 + 12) * parameters / microbatches, 0),
    ]


def tabulate(rows, args):
    """{phase: {kind: {seconds, launches, teraflops, gigabytes}}} of rows (phase, kind, flops, bytes, launches)."""
    table = {}
    for phase, kind, flops, size, launches in rows:
        entry = table.setdefault(phase, {}).setdefault(
            kind, {"seconds": 0.0, "launches": 0, "teraflops": 0.0, "gigabytes": 0.0}
        )
        entry["seconds"] += max(flops / args.tflops, size / args.terabytes) / 1e12
        entry["launches"] += launches
        entry["teraflops"] += flops / 1e12
        entry["gigabytes"] += size / 1e9
    return table


def saved_bytes(model, args):
    """Bytes that autograd keeps between forward and backward of the body, distinct storages without parameters."""
    parameters, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(x):
        if x.untyped_storage()._cdata not in parameters:
            kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = forward(model, args)
    del hidden
    return sum(storage.nbytes() for storage in kept.values())


def memory(name, args):
    """Gigabytes at the two moments that may be the peak: in the head, and at the start of the backward."""
    config, T, result = MODELS[name], args.sequences * args.length, {}
    model = make_model(config)
    P, V, H = sum(p.numel() for p in model.parameters()), config.vocab_size, config.hidden_size
    layer = sum(p.numel() for p in model.base_model.layers[0].parameters())
    whole = saved_bytes(model, args)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = saved_bytes(model, args)
    one_layer = (whole - checkpointed) / config.num_hidden_layers
    states = 16 * P  # float32 parameters, gradients, and AdamW's two
    gathered = 2 * (V * H + 2 * layer)  # bf16: the root group, a layer and the next one
    in_head = 2 * T * H + 4 * V * H + 4 * min(T, CHUNK) * V  # d_hidden, d_weight, a chunk's logits
    in_backward = 2 * T * H + 4 * V * H + 2 * V * H  # d_hidden, d_weight, and d_weight in bf16
    for key, kept, extra in (("whole", whole, 0), ("checkpointed", checkpointed, one_layer)):
        peak = states + gathered + kept + max(in_head, in_backward + extra)
        result[key] = {"saved_bytes_per_token": kept / T, "saved_gigabytes": kept / 1e9, "peak_gigabytes": peak / 1e9}
        result[key] |= {f"fits_{size}": peak < size * 1e9 for size in (80, 141)}
    return result | {
        "states_gigabytes": states / 1e9, "gathered_gigabytes": gathered / 1e9, "head_gigabytes": in_head / 1e9,
        "one_layer_bytes_per_token": one_layer / T,
    }  # fmt: skip


def decode(args, batch, context):
    """A decode step of the 1.5B model: weights and keys and values read once each."""
    config = MODELS["1.5B"]
    parameters = sum(p.numel() for p in make_model(config).parameters())
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * batch * context
    floor, products = (2 * parameters + cache) / args.terabytes / 1e12, 2 * parameters * batch / args.tflops / 1e12
    return {
        "batch": batch, "context": context, "weights_gigabytes": 2 * parameters / 1e9, "cache_gigabytes": cache / 1e9,
        "floor_ms": 1e3 * floor, "tokens_per_second": batch / floor, "products_ms": 1e3 * products,
    }  # fmt: skip


def count(name, args):
    config, T = MODELS[name], args.sequences * args.length
    model = make_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.base_model.layers.parameters() if p.ndim == 2)
    ops, sizes = record(model, args)
    for phase, factor in (("forward", 2), ("backward", 4)):
        counted = sum(op.flops for op in ops if op.kind == "products" and op.phase == phase)
        assert counted == factor * matrices * T, (name, phase, counted / (matrices * T))
    others = head(config, T) + around(config, parameters, args.microbatches)
    result = {"parameters": parameters, "matrices_of_layers": matrices}
    for form, counted in (("eager", ops), ("compiled", fuse(reorder(ops), sizes))):
        rows = [(op.phase, op.kind, op.flops, op.bytes(), op.launches) for op in counted] + others
        table = tabulate(rows, args)
        entries = [entry for kinds in table.values() for entry in kinds.values()]
        total, flops = (sum(entry[key] for entry in entries) for key in ("seconds", "teraflops"))
        launches = sum(entry["launches"] for entry in entries)
        again = [(op.phase, op.kind, op.flops, op.bytes(), op.launches) for op in counted
                 if op.phase == "forward" and op.layer is not None]  # fmt: skip
        again = sum(entry["seconds"] for entry in tabulate(again, args)["forward"].values())
        result[form] = {
            "seconds": total, "tokens_per_second": T / total, "mfu": flops / args.tflops / total,
            "recompute_seconds": again, "launches": launches,
            "host_seconds": launches * args.launch_microseconds / 1e6, "table": table,
        }  # fmt: skip
    kinds = {}
    for op in ops:
        if op.kind == "elementwise":
            entry = kinds.setdefault(f"{op.phase} {op.name}", [0, 0.0])
            entry[0] += op.launches
            entry[1] += op.bytes() / 1e9
    result["elementwise_gigabytes"] = dict(sorted(kinds.items(), key=lambda item: -item[1][1])[:16])
    return result


def show(name, result):
    print(f"\n{name}: {result['parameters'] / 1e9:.3f}e9 parameters")
    for form in ("eager", "compiled"):
        r = result[form]
        print(f"  {form:24} {'ms':>8} {'share':>6} {'launches':>9} {'Tflop':>7} {'GB':>7}")
        for phase, kinds in r["table"].items():
            for kind, e in kinds.items():
                print(f"    {phase:8} {kind:13} {1e3 * e['seconds']:8.2f} {e['seconds'] / r['seconds']:6.1%}"
                      f" {e['launches']:9} {e['teraflops']:7.1f} {e['gigabytes']:7.1f}")  # fmt: skip
        print(f"    {'sum':22} {1e3 * r['seconds']:8.2f}        {r['launches']:9}"
              f"   {r['tokens_per_second']:.0f} tokens/s, MFU {r['mfu']:.1%}, host {1e3 * r['host_seconds']:.0f} ms")
        print(f"    {'with checkpointing':22} {1e3 * (r['seconds'] + r['recompute_seconds']):8.2f}")
    m = result["memory"]
    print(f"  memory, GB: states {m['states_gigabytes']:.1f}, gathered {m['gathered_gigabytes']:.1f}, in the head"
          f" {m['head_gigabytes']:.1f}")  # fmt: skip
    for key in ("whole", "checkpointed"):
        print(f"    {key:13} kept {m[key]['saved_bytes_per_token'] / 1e3:.1f} kB per token,"
              f" {m[key]['saved_gigabytes']:.1f}; peak {m[key]['peak_gigabytes']:.1f}; fits 80 GB: {m[key]['fits_80']},"
              f" 141 GB: {m[key]['fits_141']}")  # fmt: skip


def main(args):
    facts = {"predictions": {}}
    for name in MODELS:
        result = count(name, args) | {"memory": memory(name, args)}
        show(name, result)
        facts["predictions"][name] = result
    print(f"\ndecode, 1.5B: {'batch':>5} {'context':>8} {'weights GB':>11} {'cache GB':>9} {'floor ms':>9}"
          f" {'tokens/s':>9} {'products ms':>12}")  # fmt: skip
    facts["decode"] = [decode(args, batch, context) for context in (512, 2048) for batch in (64, 256)]
    for d in facts["decode"]:
        print(f"{'':13} {d['batch']:5} {d['context']:8} {d['weights_gigabytes']:11.2f} {d['cache_gigabytes']:9.2f}"
              f" {d['floor_ms']:9.2f} {d['tokens_per_second']:9.0f} {d['products_ms']:12.2f}")  # fmt: skip
    packages = ("torch", "transformers")
    facts = environment("count.py", "kernels", packages=packages) | {"settings": asdict(args)} | facts
    path = Path(args.out or ROOT / "benchmarks" / "results" / "count.json")
    path.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args, description=__doc__, use_underscores=True))
