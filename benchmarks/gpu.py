"""On one GPU: correctness, then speed against TRL, `generate` and the limits of the card. Random weights, no downloads.

    pip install -r requirements-bench.txt
    python benchmarks/gpu.py                         nine minutes at most; tables, and benchmarks/results/gpu.json
    python benchmarks/gpu.py --parts check           correctness at length, some minutes of compiling; no time limit
    python benchmarks/gpu.py --parts sft --only 4b   of a part, what has this in "PART SIZE NAME"
    python benchmarks/gpu.py --gpus 8 --seconds 1800 our scripts at 8B, by torchrun on eight cards of this machine
    python benchmarks/gpu.py --dry --out dry.json    the same code with tiny sizes on a CPU: proves nothing about speed

Each contestant is a process of its own and runs the real thing: `main` of sft.py, dpo.py or grpo.py, or `train()` of
TRL's trainer, with the clocks of sft_vs_trl.py, preference_vs_trl.py and grpo_vs_trl.py. They run one after another on
the same model and rows; a step's time is the median over the steps after the warm-up, on the wall, with the device
synchronised at both ends. The result file is written after every contestant, so an interruption loses only the current
one. A contestant that cannot run, or for which no time is left, is listed with the reason.

    card      products of 8192 x 8192 x 8192 in bf16, a copy of 2 GB: the rates that all others are measured by
    kernels   varlen attention, attention over slots, the head: against float64. A failure ends the benchmark
    check     only if named: also whole models, and what the sampler's graphs sample, in five families
    network   on several cards: rates of NCCL's all-gather and reduce-scatter of about a layer of 8B
    head      benchmarks/head.py at its four shapes
    sft       a Llama of 1.5B parameters in its layers' matrices and head, packed 8k tokens, bf16 with float32 masters;
              compiled or not, activation checkpointing or not, 16k tokens; TRL with packing and Liger. And 4B, where
              the card's memory is enough
    dpo       the same model, pairs of about 1,000 tokens a side; TRL with its reference precomputed
    sampler   decode steps, 64 and 256 sequences at a context of 512 and 2048, against the floor (weights, keys and
              values read once at the copy's rate) and against a step of `generate` with its dynamic cache; seconds to
              release the memory, to copy the weights again and to capture again (with the first 16 steps); the largest
              and the mean gap between sampled and recomputed log-probabilities
    grpo      whole steps, completions of 200 tokens on average and 512 at most; TRL with transformers' generation.
              Their mean length is checked: an error if it is off by more than 20 %

On several cards there are no contestants but ours, at the sizes of Llama 3.1 8B with Tülu 3's vocabulary; completions
have 600 tokens on average and 2,048 at most. The table has tokens per second of each GPU, the largest peak of any, and
the seconds of the rollout, of Sampler.sync, of the update and of one checkpoint, and the gap.

MFU counts what the model needs, not what is recomputed: 6 N per token for the layers' matrices (N parameters) and the
head (trained tokens only), and 6 Hq D L^2 per layer for a sequence of L tokens (causal: half the square; forward once,
backward twice), over the measured rate of products.

Losses of contestants on the same batches are compared (bf16: 2 %); TRL's packing makes other batches, so there the mean
over all steps is (10 %). DPO's are ln 2 before the first update, and what bf16 rounds off decides about them after it
(5 %): there the norm of the first gradient is compared as well (2 %). TRL attends with flash-attn if installed,
otherwise with its default, masked attention, which is no fair contest on packed rows; the table says which. In TRL 1.16
Liger stands for its layers' kernels, the fused head is TRL's own. TRL is not compiled: `ours` and `ours_compiled` are
both in the table. What matters most comes first; --parts and --only divide the work over several calls.
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

# Hidden, intermediate, layers, heads, key/value heads, vocabulary: those of Qwen 2.5 1.5B, Qwen 3 4B and Tülu 3 8B. The
# tokenizer of the benchmark has 4,096 entries, so the vocabularies are padded, as Qwen's is.
MODELS = {
    "1.5b": (1536, 8960, 28, 12, 2, 151_936),
    "4b": (2560, 9728, 36, 32, 8, 151_936),
    "8b": (4096, 14336, 32, 32, 8, 128_264),
    "dry": (64, 128, 2, 4, 2, 8192),
}
DECODE = {False: [(64, 512), (256, 512), (64, 2048), (256, 2048)], True: [(4, 32)]}  # sequences, context
CHECKS = {  # of tests/test_cuda.py and test_slots.py, by pytest's -k
    "kernels": "varlen or head or real_shapes",
    "check": "varlen or head or graphs or slots or whole_models",
}
NEEDED = {"trl_liger": ("trl", "liger-kernel"), "trl": ("trl",), "trl_checkpointing": ("trl",)}  # packages


@dataclass
class Args:
    parts: tuple[str, ...] = ("head", "sft", "dpo", "sampler", "grpo")
    """what to measure, beside the card's rates and the quick checks; the long `check` runs only if it is named here"""
    only: tuple[str, ...] = ()
    """of the parts, only what has one of these in "PART SIZE NAME": "4b", "16k", "sft 1.5b trl" """
    gpus: int = 1
    """cards of this machine for each contestant; above 1, torchrun starts it, ours only, at 8B"""
    seconds: float = 540.0
    """no contestant is started when less than 20 of so many seconds are left; one that exceeds them is ended. The time
    of `check` does not count"""
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
        several = args.gpus > 1
        small = {"sft": (4, 256), "dpo": (2, 128), "grpo": (16, 256)}
        large = {"sft": (32, 4096), "dpo": (16, 2048), "grpo": (8 if several else 32, 1024)}
        self.batch_size, self.max_length = (small if args.dry else large)[part]
        self.batch_size *= args.gpus
        self.group_size, self.max_prompt = 8, 64 if args.dry else 256
        self.max_new_tokens, self.mean_length = (2048, 600.0) if several else (512, 200.0)
        if args.dry:
            self.max_new_tokens, self.mean_length = 16, 8.0


# ------------------------------------------------------------------------------------------------ in child processes


def device():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def over_ranks(number):
    """The largest of the numbers of all ranks."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return number
    numbers = [None] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return max(numbers)


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
    hidden, intermediate, layers, heads, kv_heads, vocabulary = MODELS["dry" if args.dry else size]
    torch.manual_seed(0)
    with torch.device(device()):
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
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
    questions = [{"messages": conversation(1)[:1], "dataset": "contains", "ground_truth": ANSWER}
                 for _ in lengths("grpo")]  # fmt: skip
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


def check(args, work, chosen):
    """The tests of what has another implementation on CUDA, chosen by pytest's -k. Raises if one fails."""
    tests = ["tests/test_cuda.py", "tests/test_slots.py", "-k", chosen]
    env = os.environ | {"CUDA_TESTS": "dry" if device() == "cpu" else "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stdout[-3000:] + run.stderr[-1000:])
    return {"passed": int(re.search(r"(\d+) passed", run.stdout)[1])}


def network(args, work):
    """Bytes that each card receives per second, gathering a layer in bf16 and scattering its float32 gradient."""
    import torch
    import torch.distributed as dist

    import sft

    place, _ = sft.setup_distributed(sft.Args(batch_size=args.gpus))
    n = (2**14 if args.dry else 27 * 2**20) * args.gpus
    result = {"nodes": args.gpus // int(os.environ["LOCAL_WORLD_SIZE"])}
    collectives = {"all_gather": (dist.all_gather_into_tensor, torch.bfloat16),
                   "reduce_scatter": (dist.reduce_scatter_tensor, torch.float32)}  # fmt: skip
    for name, (collective, dtype) in collectives.items():
        whole = torch.zeros(n, dtype=dtype, device=place)
        part = torch.zeros(n // args.gpus, dtype=dtype, device=place)
        target, source = (whole, part) if name == "all_gather" else (part, whole)
        seconds = median_seconds(lambda c=collective, t=target, x=source: c(t, x), 20)  # noqa: B023
        result[f"{name}_bytes_per_second"] = (whole.nbytes - part.nbytes) / seconds
    return result


def head(args, work, shape):
    import head

    table = head.measure(head.Args(rounds=args.head_rounds), *map(int, shape.split(",")), device())
    return table | {"markdown": head.table(table)}


class Enough(Exception):
    pass


def time_checkpoint(script):
    """A run ends after its first checkpoint. Returns a list, where the seconds that it took will be."""
    from sft_vs_trl import wait_for_gpu

    save, times = script.Run.save, []

    def timed_save(self, *arguments):
        wait_for_gpu()
        started = time.perf_counter()
        save(self, *arguments)  # its last act is a barrier
        times.append(time.perf_counter() - started)
        raise Enough

    script.Run.save = timed_save
    return times


def watch_gaps(script, gaps):
    """Writes the gap between sampled and recomputed log-probabilities of the first step into a dictionary."""
    import numpy as np

    check_gap = script.Rollouts.check_gap

    def watched(self, samples, *rest):
        gap = np.concatenate([np.abs(s.old_logprobs - s.behaviour_logprobs) for s in samples])
        gaps.update(gap_mean=float(gap.mean()), gap_max=float(gap.max()), gap_tokens=len(gap))
        return check_gap(self, samples, *rest)

    script.Rollouts.check_gap = watched


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
    "ours_compiled_16k": {"compile": True, "tokens_per_microbatch": 16384}, "ours_saving": {"save_every": 1},
}  # fmt: skip


def train(args, part, name, size, work, out):
    """Runs one contestant of sft, dpo or grpo. Returns its timed steps and peak memory."""
    import torch
    from grpo_vs_trl import wrong_length

    settings, gaps = Settings(args, part), {}
    clock_out, cuda, several = out / "run", device() == "cuda", args.gpus > 1
    slots = 8 if args.dry else 64 if several else 128
    benchmark, script, ours, theirs = {
        "sft": ("sft_vs_trl", "sft", [None], ["packing"]),
        "dpo": ("preference_vs_trl", "dpo", ["dpo", "", None], ["dpo", "cached", 2 if cuda else 1]),
        "grpo": ("grpo_vs_trl", "grpo", ["model", slots], ["model", 8 if cuda else 2, False]),
    }[part]
    benchmark = importlib.import_module(benchmark)
    attention = "flash_attention_2" if importlib.util.find_spec("flash_attn") else None  # None: transformers' default
    if name.startswith("ours"):
        script = importlib.import_module(script)
        stop_after(script, settings.steps)
        saving = time_checkpoint(script) if name == "ours_saving" else []
        if part == "grpo":
            watch_gaps(script, gaps)
        with contextlib.suppress(Enough):
            benchmark.run_postcard(settings, out, *ours, clock_out, **OURS[name])
        if saving:
            size = sum(file.stat().st_size for file in clock_out.glob("checkpoints/**/*") if file.is_file())
            return {"checkpoint_seconds": over_ranks(saving[0]), "checkpoint_bytes": size}
    else:
        options = {"bf16": cuda, "use_cpu": not cuda, "dataloader_pin_memory": cuda}
        options |= {"gradient_checkpointing": "checkpointing" in name}
        options |= {"model_init_kwargs": {"dtype": "float32", "attn_implementation": attention}}
        options |= {"use_liger_kernel": True} if "liger" in name else {}
        if part == "sft":
            settings.max_length = 256 if args.dry else 8192  # of a packed block
        benchmark.run_trl(settings, out, *theirs, clock_out, **options)
    peak = over_ranks(torch.cuda.max_memory_allocated() if cuda else 0)
    if os.environ.get("RANK", "0") != "0":
        return None
    steps = [json.loads(line) for line in open(clock_out / "steps.log")]
    timed = steps[min(args.warmup, (len(steps) + 1) // 2) :]  # of GRPO's three, the last
    rates = [step["tokens"] / step["seconds"] / args.gpus for step in timed]
    result = {"seconds_per_step": statistics.median(step["seconds"] for step in timed), "steps": len(timed),
              "tokens_per_second": statistics.median(rates), "tokens_per_second_of_steps": rates,  # of each GPU
              "tokens_per_step": statistics.mean(step["tokens"] for step in timed),
              "losses": [step["loss"] for step in steps], "grad_norms": [step["grad_norm"] for step in steps],
              "first_step_seconds": steps[0]["seconds"]}  # fmt: skip
    if name.startswith("trl"):
        result["attention"] = attention or "transformers' default"
    if part == "grpo":
        for step in timed:
            step["update_seconds"] = step["seconds"] - step["rollout_seconds"]
        for key in ("generate_seconds", "sync_seconds", "rollout_seconds", "update_seconds"):
            result[key] = statistics.median(step[key] for step in timed)
        result["mean_lengths"] = [step["mean_length"] for step in steps]
        result["mean_length"] = statistics.mean(step["mean_length"] for step in timed)
        if wrong := wrong_length(result["mean_length"], settings.mean_length, settings.max_new_tokens):
            result["error"] = wrong
    if cuda:
        result["peak_bytes"] = peak
    return result | gaps


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
        again = {}  # what a released sampler costs in each step of RL
        for key, action in (("release", engine.release), ("sync", lambda e=engine: e.sync(policy)), ("recapture", run)):
            with torch.no_grad():
                again[f"{key}_seconds"] = median_seconds(action, 1, warmup=0)
        weights = sum(p.nbytes for p in engine.model.base_model.layers.parameters())
        weights += engine.model.get_output_embeddings().weight.nbytes
        cache = sum(buffer[:, :, :context].nbytes for buffer in engine.cache.buffers())
        results.append({"batch": batch, "context": context, "step_seconds": step, "tokens_per_second": batch / step,
                        "floor_bytes": weights + cache, "first_seconds": first} | again)  # fmt: skip
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
    if part in ("card", "network"):
        return {"card": card, "network": network}[part](args, work)
    if part in CHECKS:
        return check(args, work, CHECKS[part])
    if part == "head":
        return head(args, work, name)
    if part == "sampler":
        return {"ours": sampler, "generate": generate}[name](args, work, size)
    return train(args, part, name, size, work, out)


# ------------------------------------------------------------------------------------- in the parent, without torch


def plan(args, memory):
    """[(part, contestant, model size)], what decides first; and {the same: reason} of what cannot run."""
    if args.gpus > 1:
        everything = [("network", "", "")]
        everything += [("sft", name, "8b") for name in ("ours_compiled_checkpointing", "ours_compiled")]
        everything += [("grpo", name, "8b") for name in ("ours_compiled_checkpointing", "ours_compiled")]
        everything += [("sft", "ours_saving", "8b"), ("dpo", "ours_compiled_checkpointing", "8b")]
    else:
        shapes = ["16384,4096,100278", "16384,4096,128264", "8192,2048,128256", "16384,2560,151936"]
        everything = [("head", shape, "1.5b") for shape in (["64,32,128"] if args.dry else shapes)]
        everything += [("sft", name, "1.5b") for name in ("ours_compiled", "trl_liger")]
        everything += [("sampler", name, "1.5b") for name in ("ours", "generate")]
        everything += [("grpo", name, "1.5b") for name in ("ours_compiled", "trl")]
        everything += [("dpo", name, "1.5b") for name in ("ours_compiled", "trl")]
        everything += [("sft", name, "1.5b") for name in ("ours", "ours_compiled_16k", "ours_compiled_checkpointing")]
        everything += [("sft", "trl_checkpointing", "1.5b")]
        everything += [("sft", name, "4b") for name in ("ours_compiled", "ours_compiled_checkpointing", "trl_liger")]
    missing = {}
    for entry in everything:
        part, name, size = entry
        absent = [p for p in NEEDED.get(name, ()) if importlib.util.find_spec(p.replace("-", "_")) is None]
        if absent:
            missing[entry] = f"{absent[0]} is not installed"
        elif "liger" in name and not memory:
            missing[entry] = "Liger's kernels need CUDA"
        elif size == "4b" and not args.dry and memory < 100e9 and "checkpointing" not in name:
            missing[entry] = f"4B parameters need 16 bytes each and activations; the card has {memory / 1e9:.0f} GB"
        elif args.dry and ("compiled" in name or size == "4b"):
            missing[entry] = "not in a dry run"
    if args.dry:  # so that every path is walked
        size = "1.5b" if args.gpus == 1 else "8b"
        everything += [(part, "ours", size) for part in ("dpo", "grpo")] + [("sft", "ours_checkpointing", size)]
    parts = ("network", *args.parts)
    chosen = [entry for entry in everything if entry[0] in parts]
    if args.only:
        chosen = [(part, name, size) for part, name, size in chosen
                  if any(words in f"{part} {size} {name}" for words in args.only)]  # fmt: skip
    return chosen, missing


def outcome(command, out, left):
    """What a child measured within `left` seconds (None: however long), or {"not_run": why not}."""
    if left is not None and left < 20:
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
            nonlocal started
            entry, left = {"part": part, "name": name, "size": size}, args.seconds - (time.time() - started)
            out = Path(work, f"{part} {name} {size}")
            (out / "run").mkdir(parents=True)
            rows = {"sft": "rows", "dpo": "rows", "grpo": "prompts"}
            if part in rows:
                links = {"model": size, "rows.jsonl": f"{rows[part]}.jsonl", "pairs.jsonl": "pairs.jsonl"}
                for link, target in links.items():
                    os.symlink(Path(work, target), out / link)
            python = [sys.executable]
            if args.gpus > 1 and (part in rows or part == "network"):
                python += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.gpus)]
            command = [*python, __file__, "--child", json.dumps(asdict(args)), part, name, size, work, str(out)]
            began = time.time()
            entry |= outcome(command, out, None if part == "check" else left)
            entry["child_seconds"] = time.time() - began
            if part == "check":
                started += entry["child_seconds"]
            facts["results"].append(entry)
            facts["minutes"] = (time.time() - started) / 60
            Path(args.out).write_text(json.dumps(facts, indent=1) + "\n")
            done = entry.get("not_run", "measured")
            print(f"{time.time() - started:5.0f} s  {part} {name} {size}: {done}", flush=True)
            return entry

        facts["card"] = measure("card")
        if "not_run" in facts["card"]:
            sys.exit("error: the card's rates could not be measured")
        checked = measure("check" if "check" in args.parts else "kernels")
        if "not_run" in checked:
            sys.exit(f"error: the checks failed, nothing was measured: {checked['not_run']}")
        entries, missing = plan(args, facts["card"].get("memory", 0))
        prepared = {}
        for part, name, size in entries:
            reason = missing.get((part, name, size))
            if not reason and part not in ("head", "network"):
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
    sys.exit("\n".join(f"error: {message}" for message in facts["errors"]) or None)


def report(facts):
    """Adds ratios and shares of the limits to the results, and prints the tables."""
    rate, bandwidth = facts["card"]["flops_per_second"], facts["card"]["bytes_per_second"]
    results = {(r["part"], r["name"], r["size"]): r for r in facts["results"]}
    flops = {size: r.get("sft_flops_per_token") for (part, _, size), r in results.items() if part == "prepare"}
    network = results.get(("network", "", ""), {})
    facts |= {"card_name": facts["card"]["name"], "gpus": facts["settings"]["gpus"], "nodes": network.get("nodes", 1)}
    print(f"\n{facts['gpus']} x {facts['card_name']}, {facts['nodes']} node(s): products {rate / 1e12:.0f} TFLOP/s,"
          f" copy {bandwidth / 1e12:.2f} TB/s")  # fmt: skip
    for name in ("all_gather", "reduce_scatter"):
        if f"{name}_bytes_per_second" in network:
            print(f"{name}: {network[f'{name}_bytes_per_second'] / 1e9:.1f} GB/s into each card")
    facts["errors"] = [f"{r['part']} {r['size']} {r['name']}: {r['error']}" for r in results.values() if "error" in r]
    for r in facts["results"]:
        if "markdown" in r:
            print(f"\n{r.pop('markdown')}")
    print("\n| | tokens/s of each GPU | ours / it | MFU | s/step | peak GiB | first step, s |")
    print("|---|---|---|---|---|---|---|")
    for (part, name, size), r in results.items():
        if part not in ("sft", "dpo", "grpo"):
            continue
        if "not_run" in r:
            print(f"| {part} {size} {name} | not run: {r['not_run'][:160]} | | | | | |")
            continue
        if "checkpoint_seconds" in r:
            print(f"| {part} {size}, a checkpoint of {r['checkpoint_bytes'] / 1e9:.1f} GB | | | |"
                  f" {r['checkpoint_seconds']:.3f} | | |")  # fmt: skip
            continue
        measured = [results.get((part, n, size), {}) for n in ("ours_compiled", "ours", "ours_compiled_checkpointing")]
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
            same_batches, allowed = name.startswith("ours") or part == "dpo", {"sft": 0.02, "dpo": 0.05}[part]
            pairs = list(zip(r["losses"], ours["losses"], strict=False)) if same_batches else [
                [statistics.mean(each["losses"]) for each in (r, ours)]]  # fmt: skip
            r["loss_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
            if r["loss_difference"] > (allowed if same_batches else 0.1):
                facts["errors"].append(f"{part} {size} {name}: losses differ by {r['loss_difference']:.2g}")
            r["gradient_difference"] = abs(r["grad_norms"][0] / ours["grad_norms"][0] - 1)
            if same_batches and r["gradient_difference"] > 0.02:
                facts["errors"].append(f"{part} {size} {name}: gradients differ by {r['gradient_difference']:.2g}")
    print("\n| seconds | rollout | of it sync | of it decoding | update | gap, mean | gap, most | tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for (part, name, size), r in results.items():
        if part == "grpo" and "rollout_seconds" in r:
            cells = [f"{r[f'{key}_seconds']:.3f}" for key in ("rollout", "sync", "generate", "update")]
            cells += [f"{r.get(key, math.nan):.4f}" for key in ("gap_mean", "gap_max")] + [f"{r['mean_length']:.1f}"]
            print(f"| {size} {name} | {' | '.join(cells)} |")
    names = "sequences, context, tokens/s, share of the floor, ours / generate, s: release, sync, capture".split(", ")
    print(f"\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
    ours, theirs = (results.get(("sampler", name, "1.5b"), {}).get("decode", []) for name in ("ours", "generate"))
    for i, r in enumerate(ours):
        r["floor_over_time"] = r["floor_bytes"] / bandwidth / r["step_seconds"]
        if i < len(theirs):
            r["ours_over_generate"] = r["tokens_per_second"] / theirs[i]["tokens_per_second"]
        print(f"| {r['batch']} | {r['context']} | {r['tokens_per_second']:,.0f} | {r['floor_over_time']:.2f} | "
              f"{r.get('ours_over_generate', math.nan):.2f} | {r['release_seconds']:.3f} | {r['sync_seconds']:.3f} | "
              f"{r['recapture_seconds']:.3f} |")  # fmt: skip
    gaps = results.get(("sampler", "ours", "1.5b"), {})
    largest, mean = gaps.get("gap_max"), gaps.get("gap_mean")
    print(f"sampled and recomputed log-probabilities: {largest} apart at most, {mean} on average")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        fields, (part, name, size, work, out) = json.loads(sys.argv[2]), sys.argv[3:8]
        result = child(Args(**fields), part, name, size, Path(work), Path(out))
        if os.environ.get("RANK", "0") == "0":
            Path(out, "result.json").write_text(json.dumps(result))
        if "RANK" in os.environ:
            os._exit(0)  # as the scripts: while Python takes itself down, a process group now and then aborts it
    else:
        import tyro

        main(tyro.cli(Args, description=__doc__, use_underscores=True))
