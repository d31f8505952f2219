"""On one GPU: correctness, then speed against TRL, `generate` and the limits of the card. Random weights, no downloads.

    pip install -r requirements-bench.txt
    python benchmarks/gpu.py                         nine minutes at most; tables, and benchmarks/results/gpu.json
    python benchmarks/gpu.py --dry --out dry.json    the same code with tiny sizes on a CPU: proves nothing about speed

Each contestant is a process of its own and runs the real thing: `main` of sft.py, dpo.py or grpo.py, or `train()` of
TRL's trainer, with the clocks of sft_vs_trl.py, preference_vs_trl.py and grpo_vs_trl.py. They run one after another on
the same model and rows; a step's time is the median over the steps after the warm-up, on the wall, with the device
synchronised at both ends. The result file is written after every contestant, so an interruption loses only the current
one. A contestant that cannot run, or for which no time is left, is listed with the reason.

    card      products of 8192 x 8192 x 8192 in bf16, a copy of 2 GB: the rates that all others are measured by
    check     varlen attention, attention over slots, the head: against float64. A failure ends the benchmark
    head      benchmarks/head.py at its four shapes
    sft       a Llama of 1.5B parameters in its layers' matrices and head, packed 8k tokens, bf16 with float32 masters;
              compiled or not, activation checkpointing or not, 16k tokens; TRL with packing and Liger. And 4B, where
              the card's memory is enough
    dpo       the same model, pairs of about 1,000 tokens a side; TRL with its reference precomputed
    sampler   decode steps, 64 and 256 sequences at a context of 512 and 2048, against the floor (weights, keys and
              values read once at the copy's rate) and against a step of `generate` with its dynamic cache; the largest
              and the mean gap between sampled and recomputed log-probabilities
    grpo      whole steps, completions of 200 tokens on average and 512 at most; TRL with transformers' generation

MFU counts what the model needs, not what is recomputed: 6 N per token for the layers' matrices (N parameters) and the
head (trained tokens only), and 6 Hq D L^2 per layer for a sequence of L tokens (causal: half the square; forward once,
backward twice), over the measured rate of products.

Losses of contestants on the same batches are compared (bf16: 2 %); TRL's packing makes other batches, so there the mean
over all steps is (10 %). TRL attends with flash-attn if installed, otherwise with its default, masked attention, which
is no fair contest on packed rows; the table says which. In TRL 1.16 Liger stands for its layers' kernels, the fused
head is TRL's own. TRL is not compiled: `ours` and `ours_compiled` are both in the table. What matters most comes first;
--parts divides the work over several calls.
"""

import contextlib
import gc
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sft_vs_trl import ROOT, environment

MODELS = {  # hidden, intermediate, layers, heads, key/value heads: Qwen 2.5 1.5B's and Qwen 3 4B's
    "1.5b": (1536, 8960, 28, 12, 2),
    "4b": (2560, 9728, 36, 32, 8),
    "dry": (64, 128, 2, 4, 2),
}
DECODE = {False: [(64, 512), (256, 512), (64, 2048), (256, 2048)], True: [(4, 32)]}  # sequences, context
NEEDED = {"trl_liger": ("trl", "liger-kernel"), "trl": ("trl",), "trl_checkpointing": ("trl",)}  # packages


@dataclass
class Args:
    parts: tuple[str, ...] = ("check", "head", "sft", "dpo", "sampler", "grpo")
    """what to measure; the card's rates always are"""
    seconds: float = 540.0
    """no contestant is started when less than 20 of so many seconds are left; one that exceeds them is ended"""
    steps: int = 7
    """optimizer steps of each training run"""
    warmup: int = 3
    """first steps, whose time does not count (compiling)"""
    head_rounds: int = 5
    """timed runs of each head"""
    dry: bool = False
    """tiny sizes, on whatever device there is"""
    out: str = "benchmarks/results/gpu.json"
    """result file"""


class Settings:
    """What the children of the other benchmarks call their args."""

    lr, seed, beta = 1e-6, 1, 0.1

    def __init__(self, args, part):
        self.steps = min(3, args.steps) if part == "grpo" else args.steps
        small = {"sft": (4, 256), "dpo": (2, 128), "grpo": (2, 256)}
        large = {"sft": (32, 4096), "dpo": (16, 2048), "grpo": (16, 1024)}
        self.batch_size, self.max_length = (small if args.dry else large)[part]
        self.group_size, self.max_prompt = (2, 64) if args.dry else (8, 256)
        self.max_new_tokens, self.mean_length = (16, 8.0) if args.dry else (512, 200.0)


# ------------------------------------------------------------------------------------------------ in child processes


def device():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def text(random, words):
    """So many words out of 5,000 that are made of syllables."""
    syllables = "ba do ki lu me no ra si ta ve zu pe go hi fa wo cu jy".split()
    return " ".join("".join(syllables[w // 18**i % 18] for i in range(3)) for w in random.integers(0, 5000, words))


def prepare(args, size, work):
    """Writes work/SIZE, a model with random weights that ends completions at random, and the rows of every part."""
    import numpy as np
    import torch
    from grpo_vs_trl import ANSWER, set_ending
    from sft_vs_trl import train_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    import common

    random = np.random.default_rng(0)
    train_tokenizer([text(random, 200) + f" {ANSWER} " * 9 for _ in range(200)]).save_pretrained(work / "tokenizer")
    tokenizer = common.load_tokenizer(work / "tokenizer", "tulu")
    hidden, intermediate, layers, heads, kv_heads = MODELS["dry" if args.dry else size]
    torch.manual_seed(0)
    with torch.device(device()):
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=4096 if args.dry else 151936, hidden_size=hidden, intermediate_size=intermediate,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            head_dim=16 if args.dry else 128, max_position_embeddings=16384, tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
        ))  # fmt: skip
    set_ending(model, tokenizer, Settings(args, "grpo").mean_length)
    model.to(torch.bfloat16).save_pretrained(work / size)
    tokenizer.save_pretrained(work / size)

    chat = common.ChatFormat(tokenizer)

    def conversation(words):
        return [{"role": "user", "content": text(random, 16)}, {"role": "assistant", "content": text(random, words)}]

    def lengths(part):  # of answers, exponential, in words; a word is about 1.25 tokens here
        settings, mean = Settings(args, part), 12 if args.dry else 800
        longest, number = int(settings.max_length / 1.5), settings.batch_size * settings.steps
        return np.ceil(random.exponential(mean, number)).clip(4, longest - 50).astype(int)

    rows = [{"messages": conversation(n)} for n in lengths("sft")]
    encoded = [chat.encode(row["messages"])[:2] for row in rows]
    counts, trained = [len(ids) for ids, _ in encoded], sum(sum(mask) for _, mask in encoded)
    pairs = [{"prompt": conversation(1)[:1], "chosen": text(random, n), "rejected": text(random, max(4, n - 3))}
             for n in lengths("dpo")]  # fmt: skip
    questions = [{"messages": conversation(1)[:1], "dataset": "contains", "ground_truth": ANSWER} for _ in range(200)]
    for name, lines in (("rows", rows), ("pairs", pairs), ("prompts", questions)):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    matrices = sum(p.numel() for p in model.base_model.layers.parameters() if p.ndim == 2)
    squares = sum(count**2 for count in counts) / sum(counts)
    flops = 6 * (matrices + model.lm_head.weight.numel() * trained / sum(counts))
    flops += 6 * heads * model.config.head_dim * layers * squares
    return {"parameters": sum(p.numel() for p in model.parameters()), "layer_matrices": matrices,
            "sft_flops_per_token": flops, "sft_mean_length": sum(counts) / len(counts)}  # fmt: skip


def card(args, work):
    import torch

    n = 512 if args.dry else 8192
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    a, b = torch.randn(2, n, n, device=device(), dtype=dtype)
    source, target = torch.empty(2, n**2 * 32, dtype=torch.uint8, device=device()).random_().unbind()
    products, copies = (median_seconds(f, 20) for f in (lambda: a @ b, lambda: target.copy_(source)))
    name = torch.cuda.get_device_name() if device() == "cuda" else "CPU"
    memory = torch.cuda.get_device_properties(0).total_memory if device() == "cuda" else 0
    return {"name": name, "memory": memory, "flops_per_second": 2 * n**3 / products,
            "bytes_per_second": 2 * source.nbytes / copies}  # fmt: skip


def median_seconds(function, rounds, warmup=3):
    from head import seconds

    return statistics.median([seconds(function) for _ in range(warmup + rounds)][warmup:])


def check(args, work):
    """The tests of what has another implementation on CUDA. Raises if one fails."""
    tests = ["tests/test_cuda.py", "tests/test_slots.py", "-k", "varlen or head or graphs or slots"]
    env = os.environ | {"CUDA_TESTS": "dry" if device() == "cpu" else "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stdout[-3000:] + run.stderr[-1000:])
    return {"passed": int(re.search(r"(\d+) passed", run.stdout)[1])}


def head(args, work, shape):
    import head

    table = head.measure(head.Args(rounds=args.head_rounds), *map(int, shape.split(",")), device())
    return table | {"markdown": head.table(table)}


class Enough(Exception):
    pass


def stop_after(script, steps):
    """A run ends after so many steps, before the export, which would take longer than they."""
    log = script.Run.log

    def limited_log(self, entry):
        log(self, entry)
        if entry["step"] >= steps:
            raise Enough

    script.Run.log = limited_log


OURS = {
    "ours": {}, "ours_compiled": {"compile": True}, "ours_checkpointing": {"activation_checkpointing": True},
    "ours_compiled_checkpointing": {"compile": True, "activation_checkpointing": True},
    "ours_compiled_16k": {"compile": True, "tokens_per_microbatch": 16384},
}  # fmt: skip


def train(args, part, name, size, work, out):
    """Runs one contestant of sft, dpo or grpo. Returns its timed steps and peak memory."""
    import torch

    settings = Settings(args, part)
    os.symlink(work / size, out / "model")
    os.symlink(work / ("prompts.jsonl" if part == "grpo" else "rows.jsonl"), out / "rows.jsonl")
    os.symlink(work / "pairs.jsonl", out / "pairs.jsonl")
    clock_out = out / "run"
    clock_out.mkdir()
    cuda = device() == "cuda"
    benchmark, script, ours, theirs = {
        "sft": ("sft_vs_trl", "sft", [None], ["packing"]),
        "dpo": ("preference_vs_trl", "dpo", ["dpo", "", None], ["dpo", "cached", 2 if cuda else 1]),
        "grpo": ("grpo_vs_trl", "grpo", ["model", 8 if args.dry else 128], ["model", 8 if cuda else 2, False]),
    }[part]
    benchmark = importlib.import_module(benchmark)
    attention = "flash_attention_2" if importlib.util.find_spec("flash_attn") else None  # None: transformers' default
    if name.startswith("ours"):
        stop_after(importlib.import_module(script), settings.steps)
        with contextlib.suppress(Enough):
            benchmark.run_postcard(settings, out, *ours, clock_out, **OURS[name])
    else:
        options = {"bf16": cuda, "use_cpu": not cuda, "dataloader_pin_memory": cuda}
        options |= {"gradient_checkpointing": "checkpointing" in name}
        options |= {"model_init_kwargs": {"dtype": "float32", "attn_implementation": attention}}
        options |= {"use_liger_kernel": True} if "liger" in name else {}
        if part == "sft":
            settings.max_length = 256 if args.dry else 8192  # of a packed block
        benchmark.run_trl(settings, out, *theirs, clock_out, **options)
    steps = [json.loads(line) for line in open(clock_out / "steps.log")]
    timed = steps[min(args.warmup, (len(steps) + 1) // 2) :]  # of GRPO's three, the last
    rates = [step["tokens"] / step["seconds"] for step in timed]
    result = {"seconds_per_step": statistics.median(step["seconds"] for step in timed), "steps": len(timed),
              "tokens_per_second": statistics.median(rates), "tokens_per_second_of_steps": rates,
              "tokens_per_step": statistics.mean(step["tokens"] for step in timed),
              "losses": [step["loss"] for step in steps], "first_step_seconds": steps[0]["seconds"]}  # fmt: skip
    if name.startswith("trl"):
        result["attention"] = attention or "transformers' default"
    if part == "grpo":
        for key in ("generate_seconds", "rollout_seconds"):
            result[key] = statistics.median(step[key] for step in timed)
        result["mean_length"] = statistics.mean(step["mean_length"] for step in timed)
    if cuda:
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def load_policy(work, size, attention):
    """The model in the precision that the sampler computes in, and what a script calls a policy."""
    import torch
    from transformers import AutoModelForCausalLM

    import grpo

    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(work / size, dtype=dtype, attn_implementation=attention)
    return grpo.Policy(model.to(device()).eval())


def sampler(args, work, size):
    """Decode steps against their floor; and what was sampled, recomputed by the training path."""
    import numpy as np
    import torch

    import common
    from kernels.sampler import LIMIT, LIVE, LOOK_EVERY, POSITION, Sampler, SamplingParams

    torch._dynamo.config.recompile_limit = 64  # every shape here is another graph
    policy, results = load_policy(work, size, "packed"), []
    config, steps = policy.model.config, LOOK_EVERY if device() == "cuda" else 1
    for batch, context in DECODE[args.dry]:
        engine = Sampler(config, batch, context + 64, [], device())
        engine.sync(policy)
        with torch.no_grad():
            for buffer in engine.cache.buffers():
                buffer.normal_()
            engine.active, start = [object()] * batch, context - steps // 2

            def run(engine=engine, start=start, context=context):
                engine.state[:, POSITION], engine.state[:, LIMIT], engine.state[:, LIVE] = start, context + 63, 1
                engine._run(1.0)

            started = time.perf_counter()
            run()  # compiles and captures
            first, step = time.perf_counter() - started, median_seconds(run, 20) / steps
        weights = sum(p.nbytes for p in engine.model.base_model.layers.parameters())
        weights += engine.model.get_output_embeddings().weight.nbytes
        cache = sum(buffer[:, :, :context].nbytes for buffer in engine.cache.buffers())
        results.append({"batch": batch, "context": context, "step_seconds": step, "tokens_per_second": batch / step,
                        "floor_bytes": weights + cache, "first_seconds": first})  # fmt: skip
        del engine, run
        gc.collect()  # compiled layers make cycles
    engine = Sampler(config, 64, 1024 if not args.dry else 64, [], device())
    engine.sync(policy)
    prompts = np.random.default_rng(0).integers(3, 4000, (16, 20)).tolist()
    length, gaps = (400 if not args.dry else 20), []
    with torch.no_grad():
        for c in engine.sample(prompts, SamplingParams(n=2, max_new_tokens=length, seed=1)):
            ids = np.concatenate([c.prompt_ids, c.token_ids])
            batch = common.pack([(ids, np.arange(len(ids)) >= len(c.prompt_ids))], device())
            logprobs = policy(batch, 1.0)[0][batch.targets != common.IGNORE]
            gaps.append(np.abs(logprobs.float().cpu().numpy() - c.logprobs))
    gaps = np.concatenate(gaps)
    return {"decode": results, "gap_max": float(gaps.max()), "gap_mean": float(gaps.mean()), "gap_tokens": len(gaps)}


def generate(args, work, size):
    """A step of `generate` at the same sizes: the difference between 48 and 16 new tokens, by 32."""
    import torch

    model, results = load_policy(work, size, "sdpa").model, []
    for batch, context in DECODE[args.dry]:
        ids = torch.randint(3, 4000, (batch, context - 16), device=device())
        times = {}
        for new in (16, 48):
            options = {"do_sample": True, "top_k": 0, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
            run = lambda options=options, ids=ids: model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # noqa: E731
            times[new] = median_seconds(run, 1, warmup=1)
        step = (times[48] - times[16]) / 32
        results.append({"batch": batch, "context": context, "step_seconds": step, "tokens_per_second": batch / step})
    return {"decode": results}


def child(args, part, name, size, work, out):
    if part == "prepare":
        return prepare(args, size, work)
    if part in ("card", "check"):
        return {"card": card, "check": check}[part](args, work)
    if part == "head":
        return head(args, work, name)
    if part == "sampler":
        return {"ours": sampler, "generate": generate}[name](args, work, size)
    return train(args, part, name, size, work, out)


# ------------------------------------------------------------------------------------- in the parent, without torch


def plan(args, memory):
    """[(part, contestant, model size)], what decides first; and {the same: reason} of what cannot run."""
    shapes = ["16384,4096,100278", "16384,4096,128264", "8192,2048,128256", "16384,2560,151936"]
    if args.dry:
        shapes = ["64,32,128"]
    everything = [("head", shape, "1.5b") for shape in shapes]
    everything += [("sft", name, "1.5b") for name in ("ours_compiled", "trl_liger")]
    everything += [("sampler", name, "1.5b") for name in ("ours", "generate")]
    everything += [("grpo", name, "1.5b") for name in ("ours_compiled", "trl")]
    everything += [("dpo", name, "1.5b") for name in ("ours_compiled", "trl")]
    everything += [("sft", name, "1.5b") for name in ("ours", "ours_compiled_16k", "ours_compiled_checkpointing")]
    everything += [("sft", "trl_checkpointing", "1.5b")]
    everything += [("sft", name, "4b") for name in ("ours_compiled", "trl_liger")]
    missing = {}
    for entry in everything:
        part, name, size = entry
        absent = [p for p in NEEDED.get(name, ()) if importlib.util.find_spec(p.replace("-", "_")) is None]
        if absent:
            missing[entry] = f"{absent[0]} is not installed"
        elif "liger" in name and not memory:
            missing[entry] = "Liger's kernels need CUDA"
        elif size == "4b" and not args.dry and memory < 100e9:
            missing[entry] = f"4B parameters need 16 bytes each and activations; the card has {memory / 1e9:.0f} GB"
        elif args.dry and ("compiled" in name or size == "4b"):
            missing[entry] = "not in a dry run"
    if args.dry:  # so that every path is walked
        everything += [(part, "ours", "1.5b") for part in ("dpo", "grpo")] + [("sft", "ours_checkpointing", "1.5b")]
    return [entry for entry in everything if entry[0] in args.parts], missing


def outcome(command, out, left):
    """What a child measured within `left` seconds, or {"not_run": why not}."""
    if left < 20:
        return {"not_run": "no time was left"}
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out.parent / "cache")}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    env |= {"TOKENIZERS_PARALLELISM": "false", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    try:
        run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return {"not_run": "was not ready when the time was up"}
    if (out / "result.json").exists():
        return json.loads((out / "result.json").read_text())
    output = (run.stdout + run.stderr).strip().splitlines()
    print("\n".join(output[-25:]), file=sys.stderr)
    return {"not_run": f"failed with {run.returncode}: {' / '.join(output[-3:])[-600:]}"}


def main(args):
    started = time.time()
    packages = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "flash-attn")
    facts = environment("gpu.py", "sft.py", "dpo.py", "grpo.py", "common.py", "kernels", "rewards", packages=packages)
    facts |= {"settings": asdict(args), "results": []}

    with tempfile.TemporaryDirectory() as work:

        def measure(part, name="", size="1.5b"):
            entry, left = {"part": part, "name": name, "size": size}, args.seconds - (time.time() - started)
            out = Path(work, f"{part} {name} {size}")
            out.mkdir()
            command = [sys.executable, __file__, "--child", json.dumps(asdict(args)), part, name, size, work, str(out)]
            began = time.time()
            entry |= outcome(command, out, left)
            entry["child_seconds"] = time.time() - began
            facts["results"].append(entry)
            facts["minutes"] = (time.time() - started) / 60
            Path(args.out).write_text(json.dumps(facts, indent=1) + "\n")
            done = entry.get("not_run", "measured")
            print(f"{time.time() - started:5.0f} s  {part} {name} {size}: {done}", flush=True)
            return entry

        facts["card"] = measure("card")
        if "not_run" in facts["card"]:
            sys.exit("error: the card's rates could not be measured")
        if "check" in args.parts and "not_run" in (result := measure("check")):
            sys.exit(f"error: the checks failed, nothing was measured: {result['not_run']}")
        entries, missing = plan(args, facts["card"].get("memory", 0))
        prepared = {}
        for part, name, size in entries:
            reason = missing.get((part, name, size))
            if not reason and part != "head":
                if size not in prepared:
                    prepared[size] = measure("prepare", size=size)
                reason = "not_run" in prepared[size] and "its model could not be made"
            if reason:
                facts["results"].append({"part": part, "name": name, "size": size, "not_run": reason})
            else:
                measure(part, name, size)
    report(facts)
    Path(args.out).write_text(json.dumps(facts, indent=1) + "\n")
    print(f"written to {args.out}")
    sys.exit("\n".join(f"error: {message}" for message in facts["differences"]) or None)


def report(facts):
    """Adds ratios and shares of the limits to the results, and prints the tables."""
    rate, bandwidth = facts["card"]["flops_per_second"], facts["card"]["bytes_per_second"]
    results = {(r["part"], r["name"], r["size"]): r for r in facts["results"]}
    flops = {size: r.get("sft_flops_per_token") for (part, _, size), r in results.items() if part == "prepare"}
    print(f"\n{facts['card']['name']}: products {rate / 1e12:.0f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s")
    facts["differences"] = []
    for r in facts["results"]:
        if "markdown" in r:
            print(f"\n{r.pop('markdown')}")
    print("\n| | tokens/s | ours / it | MFU | s/step | peak GiB | first step, s |\n|---|---|---|---|---|---|---|")
    for (part, name, size), r in results.items():
        if part not in ("sft", "dpo", "grpo"):
            continue
        if "not_run" in r:
            print(f"| {part} {size} {name} | not run: {r['not_run'][:160]} | | | | | |")
            continue
        measured = [results.get((part, n, size), {}) for n in ("ours_compiled", "ours")]
        ours = next((m for m in measured if "tokens_per_second" in m), {})
        r["ours_over_it"] = ours.get("tokens_per_second", math.nan) / r["tokens_per_second"]
        if part == "sft" and flops.get(size):
            r["mfu"] = flops[size] * r["tokens_per_second"] / rate
        title = f"{part} {size} {name}" + (f", attention: {r['attention']}" if "attention" in r else "")
        cells = [title, f"{r['tokens_per_second']:,.0f}", f"{r['ours_over_it']:.2f}"]
        cells += [f"{r['mfu']:.3f}" if "mfu" in r else "", f"{r['seconds_per_step']:.3f}"]
        cells += [f"{r.get('peak_bytes', 0) / 2**30:.1f}", f"{r['first_step_seconds']:.1f}"]
        print(f"| {' | '.join(cells)} |")
        if part != "grpo" and ours:  # GRPO's samples differ
            same_batches = name.startswith("ours") or part == "dpo"
            pairs = list(zip(r["losses"], ours["losses"], strict=False)) if same_batches else [
                [statistics.mean(each["losses"]) for each in (r, ours)]]  # fmt: skip
            r["loss_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
            if r["loss_difference"] > (0.02 if same_batches else 0.1):
                facts["differences"].append(f"{part} {size} {name}: losses differ by {r['loss_difference']:.2g}")
    print("\n| sequences | context | tokens/s | share of the floor | ours / generate |\n|---|---|---|---|---|")
    ours, theirs = (results.get(("sampler", name, "1.5b"), {}).get("decode", []) for name in ("ours", "generate"))
    for i, r in enumerate(ours):
        r["floor_over_time"] = r["floor_bytes"] / bandwidth / r["step_seconds"]
        if i < len(theirs):
            r["ours_over_generate"] = r["tokens_per_second"] / theirs[i]["tokens_per_second"]
        print(f"| {r['batch']} | {r['context']} | {r['tokens_per_second']:,.0f} | {r['floor_over_time']:.2f} | "
              f"{r.get('ours_over_generate', math.nan):.2f} |")  # fmt: skip
    gaps = results.get(("sampler", "ours", "1.5b"), {})
    largest, mean = gaps.get("gap_max"), gaps.get("gap_mean")
    print(f"sampled and recomputed log-probabilities: {largest} apart at most, {mean} on average")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        fields, (part, name, size, work, out) = json.loads(sys.argv[2]), sys.argv[3:8]
        result = child(Args(**fields), part, name, size, Path(work), Path(out))
        Path(out, "result.json").write_text(json.dumps(result))
    else:
        import tyro

        main(tyro.cli(Args, description=__doc__, use_underscores=True))
