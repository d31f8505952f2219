"""SFT on CPU: sft.py against TRL's SFTTrainer. Same model, same rows in the same batches, same losses: who is faster?

    pip install -r requirements-bench.txt
    python benchmarks/sft_vs_trl.py                  an hour on a busy machine; table, and results/sft_vs_trl.json

Each run is a process of its own: `main` of sft.py, or `SFTTrainer(...).train()`. The contestants take turns, several
rounds. A step lasts from the end of the last step's logging to the end of its optimizer update, in both: fetching the
batch, packing or padding it, forward, backward, clipping, update. Of each step the median over rounds counts; tokens
per second = real tokens (no padding) of all steps after the warm-up / sum of those medians. Beside the time on the wall
stands the CPU time of the process. With one thread the two agree on an idle machine; on a shared one only CPU time says
something. Memory is the peak resident set of the whole process, as the kernel reports it at its end; `growth` is what
it has above a process that only imports the same libraries.

TRL runs in float32 without activation checkpointing (its defaults, bf16 and checkpointing, are slower on a CPU), with
assistant_only_loss and its fused AdamW and head. Its variants differ in how a batch is cut:

    trl_padded           the whole batch in one forward pass, padded to its longest row: what the flags suggest
    trl_padded_N         N rows in each forward pass, gradients accumulated. The rows of a batch come sorted by length,
                         so that there is little padding: help from outside, TRL would sort across batches
    trl_padding_free_N   N rows end to end in each forward pass, attention masked between them
    trl_packing          bfd packing into blocks of --max_length. It decides which rows make a batch, so its losses
                         cannot be compared; its tokens per second can

The ratio does not carry over to a GPU, where TRL's head is a Triton kernel and skips untrained tokens, as ours does.
"""

import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ON_CPU = {  # TRL's options on a CPU; benchmarks/gpu.py has others
    "bf16": False, "gradient_checkpointing": False, "use_cpu": True, "dataloader_pin_memory": False,
    "model_init_kwargs": {"dtype": "float32"},
}  # fmt: skip
IMPORTS = {"postcard": "import sft", "trl": "import common; from trl import SFTConfig, SFTTrainer"}


@dataclass
class Args:
    data: str = "../shared/data/gsm8k/train.jsonl"
    """JSONL of `messages` rows, or of GSM8K's `question` and `answer`"""
    model: str | None = None
    """model folder; else a random Llama (hidden 128, 4 layers, vocabulary 4096), a tokenizer made from --data"""
    contestants: tuple[str, ...] = (
        "postcard", "postcard_2048", "trl_padded", "trl_padded_4", "trl_padded_2", "trl_padded_1",
        "trl_padding_free_16", "trl_padding_free_4", "trl_packing",
    )  # fmt: skip
    """the first is the reference: `postcard`, `postcard_N` (N tokens per microbatch), `trl_VARIANT`"""
    batch_size: int = 16
    """sequences per optimizer step"""
    steps: int = 20
    """optimizer steps in each run"""
    warmup: int = 4
    """first steps of each run, whose time does not count"""
    rounds: int = 5
    """runs of each contestant"""
    max_length: int = 1024
    """rows with more tokens are left out"""
    lr: float = 1e-3
    """constant learning rate"""
    seed: int = 1
    """weights of the random model, choice and order of rows"""
    threads: int = 1
    """PyTorch threads of each run; with fewer than there are cores, other work on the machine disturbs less"""
    out: str = "benchmarks/results/sft_vs_trl.json"
    """result file"""


# ------------------------------------------------------------------------------- in child processes, with torch


def prepare(args, work, *_):
    """Writes what both sides read: work/model, and work/rows.jsonl with batch_size · steps conversations."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    import common

    rows = [json.loads(line) for line in open(args.data, encoding="utf-8")]
    rows = [row["messages"] if "messages" in row else [{"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]}] for row in rows]  # fmt: skip
    if args.model:
        tokenizer, model = common.load_tokenizer(args.model, "tulu"), AutoModelForCausalLM.from_pretrained(args.model)
    else:
        train_tokenizer([message["content"] for row in rows for message in row]).save_pretrained(work / "tokenizer")
        tokenizer = common.load_tokenizer(work / "tokenizer", "tulu")
        torch.manual_seed(args.seed)
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
            vocab_size=4096, max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        ))  # fmt: skip
    model.float().save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    chat, needed, chosen = common.ChatFormat(tokenizer), args.batch_size * args.steps, []
    for i in np.random.default_rng(args.seed).permutation(len(rows)):
        if len(chosen) < needed and len(chat.encode(rows[i])[0]) <= args.max_length:
            chosen.append(json.dumps({"messages": rows[i]}) + "\n")
    if len(chosen) < needed:
        sys.exit(f"error: --data {args.data} has {len(chosen)} rows of up to {args.max_length} tokens, {needed} needed")
    (work / "rows.jsonl").write_text("".join(chosen), encoding="utf-8")


def train_tokenizer(texts):
    """A byte-level BPE tokenizer with 4096 entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


class Clock:
    """Times steps; rank 0 writes them, one JSON object a line, to steps.log. Waits for the GPU where there is one."""

    def __init__(self, out):
        self.file = open(out / "steps.log" if os.environ.get("RANK", "0") == "0" else os.devnull, "w")
        self.start()

    def start(self):
        wait_for_gpu()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self):
        wait_for_gpu()
        self.seconds = {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}

    def write(self, entry):
        self.file.write(json.dumps(entry | self.seconds) + "\n")
        self.file.flush()


def wait_for_gpu():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_steps(script, clock, described):
    """Puts a clock around every step of a script: from where it is resumed, or has logged a step, to its next log.

    described: entry of the log → what is written of it.
    """
    resume, log = script.Run.resume, script.Run.log

    def timed_resume(self, *arguments):
        states = resume(self, *arguments)
        clock.start()
        return states

    def timed_log(self, entry):
        clock.stop()
        clock.write(described(entry))
        log(self, entry)
        clock.start()

    script.Run.resume, script.Run.log = timed_resume, timed_log


def run_postcard(args, work, tokens_per_microbatch, out, **flags):
    """Runs sft.py's main, with a clock around its logging. flags: further ones of sft.py."""
    import sft

    time_steps(sft, Clock(out), lambda entry: {key: entry[key] for key in ("loss", "grad_norm", "tokens")})
    budget = {"tokens_per_microbatch": int(tokens_per_microbatch)} if tokens_per_microbatch else {}
    sft.main(sft.Args(
        model=str(work / "model"), data=[str(work / "rows.jsonl")], out=str(out), max_length=args.max_length,
        batch_size=args.batch_size, epochs=1, lr=args.lr, lr_schedule="constant", warmup_ratio=0, seed=args.seed,
        **budget, **({"save_every": 0} | flags),
    ))  # fmt: skip


def run_trl(args, work, variant, out, **options):
    """Trains with SFTTrainer on sft.py's batches. options: of SFTConfig, over those below."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    import common

    kind, _, size = variant.rpartition("_") if variant[-1].isdigit() else (variant, "", args.batch_size)
    rows = [json.loads(line) for line in open(work / "rows.jsonl", encoding="utf-8")]
    chat = common.ChatFormat(common.load_tokenizer(work / "model"))
    ordered, tokens = [], 0
    for step in range(args.steps):
        batch = [rows[i] for i in common.batch_indices(len(rows), args.batch_size, args.seed, step, len(rows))]
        lengths = {id(row): len(chat.encode(row["messages"])[0]) for row in batch}
        if int(size) < args.batch_size:
            batch.sort(key=lambda row: lengths[id(row)])
        ordered, tokens = ordered + batch, tokens + sum(lengths.values())

    class Log(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.clock, self.tokens = Clock(out), 0

        def on_step_end(self, *_, **__):
            self.clock.stop()

        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs:  # the last call is a summary
                tokens = int(logs["num_tokens"]) - self.tokens
                self.tokens += tokens
                self.clock.write({"loss": logs["loss"], "grad_norm": logs["grad_norm"], "tokens": tokens})
            self.clock.start()

    packing, blocks = kind == "packing", max(1, round(tokens / args.steps / args.max_length))
    options = ON_CPU | options
    config = SFTConfig(
        output_dir=str(out), max_steps=-1 if packing else args.steps, num_train_epochs=1, seed=args.seed,
        per_device_train_batch_size=1 if packing else int(size),
        gradient_accumulation_steps=blocks if packing else args.batch_size // int(size),
        packing=packing, padding_free=kind == "padding_free",
        max_length=args.max_length if packing else None,
        train_sampling_strategy="sequential", assistant_only_loss=True,
        learning_rate=args.lr, lr_scheduler_type="constant", max_grad_norm=1.0,
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
        **options,
    )  # fmt: skip
    SFTTrainer(str(work / "model"), args=config, train_dataset=Dataset.from_list(ordered), callbacks=[Log()]).train()


# ------------------------------------------------------------------------------------- in the parent, without it


def run(args, command, work):
    """Runs a process to its end. Returns its peak resident set in MB; stops with its output if it fails."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache"), "PYTHONPATH": str(ROOT)}
    env["OMP_NUM_THREADS"] = str(args.threads)
    with open(work / "output.txt", "w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            sys.exit(f"{output.read()}\nerror: failed with {process.returncode}: {shlex.join(map(str, command))}")
    return usage.ru_maxrss / 1024


def summarise(runs, memory, baseline, args):
    """One line of the table from the runs (lists of steps) of one contestant."""
    steps = [run[args.warmup :] for run in runs]
    tokens = sum(step["tokens"] for step in steps[0])
    result = {"tokens_per_step": tokens / len(steps[0]), "steps_timed": len(steps[0])}
    for key, prefix in (("seconds", ""), ("cpu_seconds", "cpu_")):
        medians = [statistics.median(step[key] for step in same) for same in zip(*steps, strict=True)]  # over rounds
        result[f"{prefix}tokens_per_second"] = tokens / sum(medians)
        result[f"{prefix}milliseconds_per_step"] = 1000 * statistics.median(medians)
        result[f"{prefix}tokens_per_second_of_rounds"] = [tokens / sum(step[key] for step in run) for run in steps]
    result |= {"peak_mb": statistics.median(memory), "growth_mb": statistics.median(memory) - baseline}
    return result | {"losses": [step["loss"] for step in runs[0]]}


def largest_difference(ours, theirs, key):
    """Largest relative difference of a metric over all steps."""
    return max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(ours, theirs, strict=True))


def environment(benchmark, *sources, packages=("torch", "transformers", "datasets", "trl", "accelerate")):
    """Date, command, versions and machine, for a result file; `sources` are the files and folders it measures."""
    from importlib.metadata import distributions

    def git(*words):
        try:
            return subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT).stdout.strip()
        except OSError:  # not installed
            return None

    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    installed = {d.metadata["Name"]: d.version for d in distributions()}
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{benchmark}", *sys.argv[1:]]),
        "commit": git("rev-parse", "--verify", "--quiet", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", *sources)),
        "versions": {name: installed.get(name) for name in packages},
        "python": platform.python_version(),
        "cpu": f"{cpu[0]}, {len(cpu)} cores",
        "load_average": os.getloadavg()[1],  # over 5 minutes, our own process included
    }


def main(args):
    if not Path(args.data).is_file():
        sys.exit(f"error: --data {args.data}: no such file; give a JSONL of messages, or GSM8K's train.jsonl")
    args.data, started = str(Path(args.data).resolve()), time.time()
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        child = [sys.executable, __file__, "--child", json.dumps(asdict(args)), str(work)]
        run(args, [*child, "prepare", str(work)], work)
        baseline = {side: run(args, [sys.executable, "-c", code], work) for side, code in IMPORTS.items()}
        runs, memory = {name: [] for name in args.contestants}, {name: [] for name in args.contestants}
        for number in range(args.rounds):
            for name in args.contestants:
                out = work / f"{name} {number}"
                out.mkdir()
                memory[name].append(run(args, [*child, name, str(out)], work))
                runs[name].append([json.loads(line) for line in open(out / "steps.log")])
                steps = runs[name][-1][args.warmup :]
                seconds, cpu = (sum(step[key] for step in steps) / len(steps) for key in ("seconds", "cpu_seconds"))
                print(f"round {number + 1}  {name:20} {seconds:6.3f} s/step, {cpu:6.3f} s of CPU time", flush=True)
    report(args, runs, memory, baseline, started)


def report(args, runs, memory, baseline, started):
    """Prints the table, writes the result file, and fails if the losses differ."""
    results = {}
    for name in args.contestants:
        results[name] = summarise(runs[name], memory[name], baseline[name.split("_")[0]], args)
        if name != "trl_packing":
            pairs = [(ours, theirs) for ours in runs[args.contestants[0]] for theirs in runs[name]]
            results[name]["same_tokens"] = all([a["tokens"] for a in x] == [b["tokens"] for b in y] for x, y in pairs)
            for key in ("loss", "grad_norm"):
                results[name][f"{key}_difference"] = max(largest_difference(*pair, key) for pair in pairs)
    first = results[args.contestants[0]]
    print(f"\n{'':20} tokens/s  ours/it  ms/step | by CPU time: ours/it  ms/step | peak MB  growth | loss difference")
    for name, r in results.items():
        difference = f"{r['loss_difference']:.1e}" if "loss_difference" in r else "other batches"
        wall, cpu = (first[key] / r[key] for key in ("tokens_per_second", "cpu_tokens_per_second"))
        print(f"{name:20} {r['tokens_per_second']:8.0f} {wall:8.2f} {r['milliseconds_per_step']:8.1f} |"
              f" {cpu:20.2f} {r['cpu_milliseconds_per_step']:8.1f} |"
              f" {r['peak_mb']:7.0f} {r['growth_mb']:7.0f} | {difference}")  # fmt: skip
    settings = asdict(args) | {"data": Path(args.data).name, "model": Path(args.model).name if args.model else "random"}
    facts = environment("sft_vs_trl.py", "sft.py", "common.py", "kernels")
    facts |= {"minutes": (time.time() - started) / 60, "settings": settings, "import_peak_mb": baseline}
    Path(args.out).write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")
    for name, r in results.items():
        if r.get("loss_difference", 0) > 1e-4 or not r.get("same_tokens", True):
            sys.exit(f"error: {name} trained on other tokens or had other losses than {args.contestants[0]}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        args, work, out = Args(**json.loads(sys.argv[2])), Path(sys.argv[3]), Path(sys.argv[5])
        what, _, variant = sys.argv[4].partition("_")
        {"prepare": prepare, "postcard": run_postcard, "trl": run_trl}[what](args, work, variant, out)
    else:
        import tyro

        main(tyro.cli(Args, description=__doc__, use_underscores=True))
