"""Preferences on CPU: dpo.py and reward_model.py against TRL. Same model, same pairs in the same batches, same losses.

    pip install -r requirements-bench.txt
    python benchmarks/preference_vs_trl.py          minutes; a table, and results/preference_vs_trl.json

As in sft_vs_trl.py, each run is a process of its own (`main` of our script, or `Trainer(...).train()`), contestants
take turns over several rounds, and a step lasts from the end of the last step's logging to the end of its optimizer
update, in both: fetching the batch, packing or padding it, forward, backward, clipping, update. Of each step the median
over rounds counts. Beside the time on the wall stands the CPU time of the process: on a shared machine only it says
something. Memory is the peak resident set of the whole process, as the kernel reports it at its end; `growth` is what
it has above a process that only imports the same libraries.

The model is a random Llama, its tokenizer made from the data; the pairs are HH dialogues, converted by
pipeline.convert. TRL is handed our token ids and masks, so that both train on exactly the same; it runs in float32
without activation checkpointing (its defaults, bf16 and checkpointing, are slower on a CPU), with its fused AdamW and
head. The head of the reward model starts from the same weights, saved before. Contestants, SIDE_TASK[_VARIANT][_N]:

    postcard_dpo             dpo.py; the reference's log-probabilities lie on disk before it starts
    postcard_dpo_cold        the run that put them there: it computes them before its first step (always run, once)
    postcard_reward          reward_model.py
    postcard_sft             sft.py on the same conversations in the same batches, for its memory: DPO should need as
                             much. It trains every assistant turn, DPO the last: its head has more to do. Run once
    postcard_sft_last        sft.py made to train the last turns alone: the same tokens as DPO. Run once
    trl_dpo_live             DPOTrainer as its flags suggest: the reference model is run in every step
    trl_dpo_cached           with precompute_ref_log_probs, done before its clock starts
    trl_reward               RewardTrainer

N at the end is, for ours, tokens per microbatch (else the script's default, 8192). For TRL it is pairs per forward
pass, gradients accumulated (else the whole batch); the pairs of a batch then come sorted by length, so that there is
little padding: help from outside, TRL would sort across batches. DPOTrainer's padding_free cannot be compared: in TRL
1.16 it is disabled and falls back to padding with a warning.

The ratio does not carry over to a GPU, where TRL's head is a Triton kernel and skips untrained tokens, as ours does.
"""

import functools
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sft_vs_trl import (
    ON_CPU,
    Clock,
    environment,
    largest_difference,
    run,
    summarise,
    time_steps,
    train_tokenizer,
)

SCRIPTS = {"dpo": "dpo", "reward": "reward_model", "sft": "sft"}
TRAINERS = {"dpo": "DPOConfig, DPOTrainer", "reward": "RewardConfig, RewardTrainer"}


@dataclass
class Args:
    data: str = "../shared/data/preference/hh_helpful_base.train.jsonl"
    """rows that pipeline.convert reads: HH's `chosen` and `rejected` dialogues, or one of its other shapes"""
    contestants: tuple[str, ...] = (
        "postcard_dpo", "trl_dpo_live", "trl_dpo_live_2", "trl_dpo_cached", "trl_dpo_cached_2", "trl_dpo_cached_1",
        "postcard_reward", "trl_reward", "trl_reward_2", "trl_reward_1",
        "postcard_sft", "postcard_sft_last", "postcard_dpo_2048", "postcard_sft_2048", "postcard_sft_last_2048",
    )  # fmt: skip
    """the first of a task is what the others of that task are compared with"""
    batch_size: int = 8
    """pairs per optimizer step"""
    steps: int = 5
    """optimizer steps in each run"""
    warmup: int = 1
    """first steps of each run, whose time does not count"""
    rounds: int = 2
    """runs of each contestant"""
    max_length: int = 1024
    """pairs with a longer sequence are left out"""
    lr: float = 1e-4
    """constant learning rate"""
    beta: float = 0.1
    """DPO's β"""
    seed: int = 1
    """weights of the random model, choice and order of pairs"""
    threads: int = 1
    """PyTorch threads of each run; with fewer than there are cores, other work on the machine disturbs less"""
    out: str = "benchmarks/results/preference_vs_trl.json"
    """result file"""


def parse(name):
    """'trl_dpo_cached_4' → ('trl', 'dpo', 'cached', 4); the number is None where there is none."""
    side, task, *rest = name.split("_")
    number = int(rest.pop()) if rest and rest[-1].isdigit() else None
    return side, task, "_".join(rest), number


# ------------------------------------------------------------------------------- in child processes, with torch


def prepare(args, work):
    """Writes what all read: work/model, work/reward_model, work/pairs.jsonl and, for sft.py, work/rows.jsonl."""
    import numpy as np
    import torch
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

    import common
    from pipeline import convert

    convert.main(convert.Args([args.data], str(work / "all_pairs.jsonl"), "pairs"))
    pairs = [json.loads(line) for line in (work / "all_pairs.jsonl").read_text().splitlines()]
    texts = [json.dumps(pair, ensure_ascii=False) if "prompt" in pair else "\n".join(
             m["content"] for side in ("chosen", "rejected") for m in pair[side]) for pair in pairs]  # fmt: skip
    tokenizer = train_tokenizer(texts)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})  # not the end: TRL scores the last token that is no padding
    tokenizer.save_pretrained(work / "tokenizer")
    tokenizer = common.load_tokenizer(work / "tokenizer", "tulu")
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=4112, max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    model.float().save_pretrained(work / "model")
    model = AutoModelForSequenceClassification.from_pretrained(work / "model", num_labels=1, dtype="float32")
    torch.nn.init.normal_(model.score.weight, std=(model.config.hidden_size + 1) ** -0.5)
    model.save_pretrained(work / "reward_model")
    for name in ("model", "reward_model"):
        tokenizer.save_pretrained(work / name)

    encode = common.PairEncoder(common.ChatFormat(tokenizer), 4112, args.max_length, "drop")
    chosen, needed = [], args.batch_size * args.steps
    for i in np.random.default_rng(args.seed).permutation(len(pairs)):
        try:
            if len(chosen) < needed and split(encode(pairs[i])):
                chosen.append(pairs[i])
        except common.Skip:
            pass
    if len(chosen) < needed:
        sys.exit(f"error: {args.data} has {len(chosen)} pairs of up to {args.max_length} tokens, {needed} needed")
    (work / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in chosen), encoding="utf-8")

    # sft.py shuffles rows of its own: they are laid so that it finds in each step the conversations dpo.py has there.
    rows = [None] * (2 * needed)
    for step in range(args.steps):
        places = common.batch_indices(len(rows), 2 * args.batch_size, args.seed, step, len(rows)).tolist()
        for i in common.batch_indices(needed, args.batch_size, args.seed, step, needed):
            for side in ("chosen", "rejected"):
                rows[places.pop()] = {"messages": encode._conversation(chosen[i], side)}
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def split(encoded):
    """{prompt_ids, chosen_ids, rejected_ids} of what PairEncoder returns; None if TRL could not express its masks."""
    n, ids, trained = encoded["chosen_length"], encoded["input_ids"], encoded["trained"]
    start = trained.index(True)
    prompt, chosen, rejected = ids[:start], ids[start:n], ids[n + start :]
    masks = [[False] * start + [True] * len(answer) for answer in (chosen, rejected)]
    if ids[n : n + start] != prompt or trained != masks[0] + masks[1]:
        return None
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def run_postcard(args, work, task, variant, tokens_per_microbatch, out, **flags):
    """Runs our script's main, with a clock around its logging. flags: further ones of the script."""
    script = __import__(SCRIPTS[task])
    time_steps(script, Clock(out), lambda entry: {key: entry[key] for key in ("loss", "grad_norm", "tokens")})
    settings = flags | ({"tokens_per_microbatch": tokens_per_microbatch} if tokens_per_microbatch else {})
    if task == "dpo":
        settings["beta"] = args.beta
    if variant == "last":
        train_last_turn_only(script.common)
    script.main(script.Args(
        model=str(work / ("reward_model" if task == "reward" else "model")), out=str(out), max_length=args.max_length,
        data=[str(work / ("rows.jsonl" if task == "sft" else "pairs.jsonl"))],
        batch_size=args.batch_size * (2 if task == "sft" else 1), epochs=1, lr=args.lr, lr_schedule="constant",
        warmup_ratio=0, seed=args.seed, save_every=0, **settings,
    ))  # fmt: skip


def train_last_turn_only(common):
    """Makes SftEncoder train on the last turn alone, as of pairs."""

    class LastTurnEncoder(common.SftEncoder):  # its name is in the key of the cache of encoded rows
        pass

    common.SftEncoder = LastTurnEncoder
    common.encode_conversation = functools.partial(common.encode_conversation, last_turn_only=True)


def run_trl(args, work, task, variant, size, out, **options):
    """Trains with TRL on the batches of our script. options: of its configuration, over those below."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    import common

    pairs = [json.loads(line) for line in open(work / "pairs.jsonl", encoding="utf-8")]
    encode = common.PairEncoder(common.ChatFormat(common.load_tokenizer(work / "model")), 4112, args.max_length, "drop")
    encoded, ordered = [split(encode(pair)) for pair in pairs], []
    for step in range(args.steps):
        batch = [encoded[i] for i in common.batch_indices(len(pairs), args.batch_size, args.seed, step, len(pairs))]
        if size:
            longest = {id(x): len(x["prompt_ids"]) + max(len(x["chosen_ids"]), len(x["rejected_ids"])) for x in batch}
            batch.sort(key=lambda row: longest[id(row)])
        ordered += batch
    if task == "reward":  # whole sequences
        ordered = [{s: row["prompt_ids"] + row[s] for s in ("chosen_ids", "rejected_ids")} for row in ordered]

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

    class EncodedDPOTrainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # it would encode again; RewardTrainer sees that there are ids

    size = size or args.batch_size
    special = {"beta": args.beta, "precompute_ref_log_probs": variant == "cached"} if task == "dpo" else {}
    options = ON_CPU | options
    config = (trl.DPOConfig if task == "dpo" else trl.RewardConfig)(
        output_dir=str(out), max_steps=args.steps, seed=args.seed, max_length=None,
        per_device_train_batch_size=size, gradient_accumulation_steps=args.batch_size // size,
        train_sampling_strategy="sequential",
        learning_rate=args.lr, lr_scheduler_type="constant", max_grad_norm=1.0,
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
        **special, **options,
    )  # fmt: skip
    model, trainer = ("model", EncodedDPOTrainer) if task == "dpo" else ("reward_model", trl.RewardTrainer)
    trainer(str(work / model), args=config, train_dataset=Dataset.from_list(ordered), callbacks=[Log()]).train()


# ------------------------------------------------------------------------------------- in the parent, without it


def main(args):
    if not Path(args.data).is_file():
        sys.exit(f"error: --data {args.data}: no such file; give a JSONL of HH dialogues")
    args.data, started = str(Path(args.data).resolve()), time.time()
    sides = sorted({parse(name)[:2] for name in args.contestants})
    imports = {"postcard": "import {}".format, "trl": "import common; from trl import {}".format}
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        child = [sys.executable, __file__, "--child", json.dumps(asdict(args)), str(work)]
        run(args, [*child, "prepare", str(work)], work)
        baseline = {}
        for side, task in sides:
            code = imports[side]({"postcard": SCRIPTS, "trl": TRAINERS}[side][task])
            baseline[f"{side}_{task}"] = run(args, [sys.executable, "-c", code], work)
        runs, memory = {}, {}

        def measure(name):
            out = work / f"{name} {len(runs.setdefault(name, []))}"
            out.mkdir()
            memory.setdefault(name, []).append(run(args, [*child, name, str(out)], work))
            runs[name].append([json.loads(line) for line in open(out / "steps.log")])
            steps = runs[name][-1][args.warmup :]
            seconds, cpu = (sum(step[key] for step in steps) / len(steps) for key in ("seconds", "cpu_seconds"))
            print(f"{len(runs[name])}  {name:22} {seconds:6.3f} s/step, {cpu:6.3f} s of CPU time,"
                  f" {memory[name][-1]:6.0f} MB", flush=True)  # fmt: skip

        if any(parse(name)[:2] == ("postcard", "dpo") for name in args.contestants):
            measure("postcard_dpo_cold")
        for number in range(args.rounds):
            for name in args.contestants:
                if number == 0 or parse(name)[1] != "sft":
                    measure(name)
    report(args, runs, memory, baseline, started)


def report(args, runs, memory, baseline, started):
    """Prints the table, writes the result file, and fails if the losses differ."""
    results, first = {}, {}
    for name in [*args.contestants, *(runs.keys() - args.contestants)]:
        task = parse(name)[1]
        first.setdefault(task, name)
        results[name] = r = summarise(runs[name], memory[name], baseline["_".join(parse(name)[:2])], args)
        pairs = [(ours, theirs) for ours in runs[first[task]] for theirs in runs[name]]
        r["same_tokens"] = all([a["tokens"] for a in x] == [b["tokens"] for b in y] for x, y in pairs)
        for key in ("loss", "grad_norm"):
            r[f"{key}_difference"] = max(largest_difference(*pair, key) for pair in pairs)
        for prefix in ("", "cpu_"):
            key = f"{prefix}tokens_per_second"
            r[f"{prefix}speed_of_{first[task]}"] = results[first[task]][key] / r[key]
    print(f"\n{'':22} tokens/s  ours/it  ms/step | by CPU time: ours/it  ms/step | peak MB  growth | loss difference")
    for name, r in results.items():
        wall, cpu = (r[f"{prefix}speed_of_{first[parse(name)[1]]}"] for prefix in ("", "cpu_"))
        print(f"{name:22} {r['tokens_per_second']:8.0f} {wall:8.2f} {r['milliseconds_per_step']:8.1f} |"
              f" {cpu:20.2f} {r['cpu_milliseconds_per_step']:8.1f} | {r['peak_mb']:7.0f} {r['growth_mb']:7.0f} |"
              f" {r['loss_difference']:.1e}")  # fmt: skip
    ratios = {}
    for name in results:
        side, task, variant, number = parse(name)
        for other in results:
            if (side, task) == ("postcard", "dpo") and (parse(other)[1], parse(other)[3]) == ("sft", number):
                ratio = {key: results[name][key] / results[other][key] for key in ("peak_mb", "growth_mb")}
                ratios[f"{name} / {other}"] = ratio
                print(f"memory of {name} / {other}: peak {ratio['peak_mb']:.2f}, growth {ratio['growth_mb']:.2f}")
    settings = asdict(args) | {"data": Path(args.data).name}
    facts = environment("preference_vs_trl.py", "dpo.py", "reward_model.py", "sft.py", "common.py", "kernels")
    facts |= {"minutes": (time.time() - started) / 60, "settings": settings, "import_peak_mb": baseline}
    facts |= {"memory_over_sft": ratios, "results": results}
    Path(args.out).write_text(json.dumps(facts, indent=1) + "\n")
    for name, r in results.items():
        same_loss = r["loss_difference"] <= 1e-4 or "_sft_last" in name  # whose loss is of other tokens
        if not (same_loss and r["same_tokens"]):
            sys.exit(f"error: {name} trained on other tokens or had other losses than {first[parse(name)[1]]}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        args, work, out = Args(**json.loads(sys.argv[2])), Path(sys.argv[3]), Path(sys.argv[5])
        if sys.argv[4] == "prepare":
            prepare(args, work)
        else:
            side, *which = parse(sys.argv[4])
            {"postcard": run_postcard, "trl": run_trl}[side](args, work, *which, out)
    else:
        import tyro

        main(tyro.cli(Args, description=__doc__, use_underscores=True))
