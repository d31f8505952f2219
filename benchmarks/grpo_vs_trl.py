"""GRPO on CPU: a whole step of grpo.py against TRL's GRPOTrainer. Same model, prompts, group size, cap and rewards.

    pip install -r requirements-bench.txt
    python benchmarks/grpo_vs_trl.py                 20 minutes; tables, and results/grpo_vs_trl_cpu.json

As in sft_vs_trl.py, each run is a process of its own (`main` of grpo.py, or `GRPOTrainer(...).train()`), contestants
take turns over several rounds, and a step lasts from the end of the last step's logging to the end of its optimizer
update. Of each step the median over rounds counts. Beside the time on the wall stands the CPU time of the process: on a
shared machine only it says something. (Our judges are processes of their own, which it leaves out; TRL calls the same
verifier in its own. The rewards of a batch take some milliseconds.) A step has two parts:

    rollout     sampling, with the copy of the weights before it, decoding, rewards and advantages; `generate`: what of
                that is the sampler's, or `model.generate` and the padding around it
    update      the rest: forward, loss, backward, clipping, optimizer

The model is a Llama with random weights and two endings. Ragged: every token ends a completion with probability
1 / --mean_length, whatever came before; no length is forced upon anybody, and the two sample different completions of
the same distribution: not the same number of tokens, so tokens per second are compared, and a step's time beside them.
Fixed: it never ends, and all complete --max_new_tokens. Then all contestants train on equally many tokens.

Both use temperature 1, one update per batch, the mean over tokens (TRL's `dapo`), no KL term, every group (also if its
rewards are equal; for ours --active_sampling 0), float32 and AdamW. A completion is right if it contains `the`, one of
the model's tokens in fifty. TRL generates by its default path, all completions in one batch; it runs without activation
checkpointing, which would be its default and is slower. Contestants:

    postcard, postcard_N    grpo.py with its defaults, or with N slots (by default 64)
    trl_N                   N completions in each forward pass, gradients accumulated; 8 is TRL's default. N hardly
                            matters for padding: TRL pads all to the longest prompt and completion of the whole batch
    trl                     the whole batch in one forward pass
    trl_continuous_N        generates by transformers' continuous batching

Useful tokens are those of completions, the end token included. The ratio does not carry over to a GPU.
"""

import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sft_vs_trl import ON_CPU, Clock, environment, run, summarise, time_steps, train_tokenizer, wait_for_gpu

IMPORTS = {"postcard": "import grpo", "trl": "import common; from trl import GRPOConfig, GRPOTrainer"}
PARTS = ("rollout", "generate")
ANSWER = "the"


@dataclass
class Args:
    data: str = "../shared/data/gsm8k/train.jsonl"
    """JSONL whose `question`s are the prompts"""
    contestants: tuple[str, ...] = ("postcard", "trl_8")
    """the first is what the others are compared with"""
    settings: tuple[str, ...] = ("ragged", "fixed")
    """how completions end"""
    batch_size: int = 12
    """prompts per step"""
    group_size: int = 8
    """completions of each"""
    max_prompt: int = 96
    """longer prompts are left out"""
    max_new_tokens: int = 128
    """longest completion"""
    mean_length: float = 52.0
    """1 / probability that a token is the last, in the ragged setting"""
    hidden: int = 256
    """model's hidden size"""
    layers: int = 4
    """its layers"""
    steps: int = 2
    """optimizer steps in each run"""
    warmup: int = 1
    """first steps of each run, whose time does not count"""
    rounds: int = 3
    """runs of each contestant in each setting"""
    lr: float = 1e-6
    """constant learning rate"""
    seed: int = 1
    """weights of the random model, choice and order of prompts, samples"""
    threads: int = 1
    """PyTorch threads of each run; with fewer than there are cores, other work on the machine disturbs less"""
    out: str = "benchmarks/results/grpo_vs_trl_cpu.json"
    """result file"""


# ------------------------------------------------------------------------------- in child processes, with torch


def prepare(args, work):
    """Writes work/ragged and work/fixed, models that differ in their end token's logit, and work/rows.jsonl."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import common

    questions = [json.loads(line)["question"] for line in open(args.data, encoding="utf-8")]
    train_tokenizer(questions).save_pretrained(work / "tokenizer")
    tokenizer = common.load_tokenizer(work / "tokenizer", "tulu")
    torch.manual_seed(args.seed)
    heads = max(1, args.hidden // 64)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=args.hidden, intermediate_size=3 * args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=4096, max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, tie_word_embeddings=False,
    )).float()  # fmt: skip
    for setting, mean_length in (("ragged", args.mean_length), ("fixed", None)):
        set_ending(model, tokenizer, mean_length)
        model.save_pretrained(work / setting)
        tokenizer.save_pretrained(work / setting)

    chat, needed, chosen = common.ChatFormat(tokenizer), args.batch_size * args.steps, []
    for i in np.random.default_rng(args.seed).permutation(len(questions)):
        messages = [{"role": "user", "content": questions[i]}]
        if len(chosen) < needed and len(chat.prompt(messages)) <= args.max_prompt:
            chosen.append(json.dumps({"messages": messages, "dataset": "contains", "ground_truth": ANSWER}) + "\n")
    if len(chosen) < needed:
        sys.exit(f"error: {args.data} has {len(chosen)} prompts of up to {args.max_prompt} tokens, {needed} needed")
    (work / "rows.jsonl").write_text("".join(chosen), encoding="utf-8")


def set_ending(model, tokenizer, mean_length):
    """Every token ends a completion with probability 1 / mean_length (None: never) and is ANSWER in one of fifty.

    Ids of the head that have no token, where a vocabulary is padded, get no probability. grpo.py never draws them: what
    they had would go to the end token too, and completions would be shorter than set.
    """
    import torch

    (the,) = tokenizer.encode(f" {ANSWER}", add_special_tokens=False)
    with torch.no_grad():  # feature 0 of the residual stream is 1 everywhere, and only the logits set here see it
        model.get_input_embeddings().weight[:, 0] = 1.0
        for layer in model.base_model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        head = model.get_output_embeddings().weight
        head[:, 0] = head[tokenizer.eos_token_id] = head[the] = 0.0
        named = torch.zeros(len(head), dtype=torch.bool)
        named[list(tokenizer.get_vocab().values())] = True
        named = named.to(head.device)
        ids = torch.randint(4096, (16, 64), generator=torch.Generator().manual_seed(0))
        hidden = model.base_model(ids.to(model.device)).last_hidden_state
        others, feature = (hidden @ head[named].T).logsumexp(-1).mean().item(), hidden[..., 0].mean().item()
        head[~named, 0] = (others - 50.0) / feature
        head[the, 0] = (others + math.log(0.02)) / feature
        ending = math.log(1.02 / (mean_length - 1)) if mean_length else -50.0
        head[tokenizer.eos_token_id, 0] = (others + ending) / feature


def wrong_length(mean_length, set_mean, max_new_tokens):
    """What is wrong with the mean length of completions, if it is off by more than 20 %; else None.

    set_mean: that of set_ending. Of lengths that end with probability 1 / set_mean at each token and are cut off at
    max_new_tokens, the mean is (1 - (1 - 1 / set_mean)^max_new_tokens) set_mean.
    """
    expected = set_mean * (1 - (1 - 1 / set_mean) ** max_new_tokens) if set_mean else max_new_tokens
    if abs(mean_length / expected - 1) > 0.2:
        return f"completions have {mean_length:.1f} tokens on average, they are set to {expected:.1f}"


class PartClock(Clock):
    """A clock that also adds up the time within some functions."""

    def start(self):
        super().start()
        names = [f"{part}_{unit}" for part in (*PARTS, "sync") for unit in ("seconds", "cpu_seconds")]
        self.parts = dict.fromkeys(names, 0.0)

    def stop(self):
        super().stop()
        self.seconds |= self.parts

    def watch(self, owner, name, part):
        """Counts calls of owner.name as `part`."""
        function = getattr(owner, name)

        def watched(*arguments, **options):
            wait_for_gpu()
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                wait_for_gpu()
                self.parts[f"{part}_seconds"] += time.perf_counter() - wall
                self.parts[f"{part}_cpu_seconds"] += time.process_time() - cpu

        setattr(owner, name, watched)


def run_postcard(args, work, setting, slots, out, **flags):
    """Runs grpo.py's main, with a clock around its logging. flags: further ones of grpo.py."""
    import grpo
    from kernels.sampler import Sampler

    clock = PartClock(out)
    clock.watch(grpo.Rollouts, "sample", "rollout")
    clock.watch(grpo.Rollouts, "sync", "rollout")
    clock.watch(grpo, "set_advantages", "rollout")
    clock.watch(Sampler, "sample", "generate")
    clock.watch(Sampler, "sync", "sync")

    def described(entry):
        tokens = {"tokens": entry["sampled_tokens"], "mean_length": entry["completion_tokens"]}
        return {key: entry[key] for key in ("loss", "grad_norm", "reward", "entropy")} | tokens

    time_steps(grpo, clock, described)
    flags = {"activation_checkpointing": False} | flags
    grpo.main(grpo.Args(
        model=str(work / setting), data=[str(work / "rows.jsonl")], out=str(out), active_sampling=0,
        max_length=args.max_prompt + args.max_new_tokens, max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size, group_size=args.group_size, lr=args.lr, lr_schedule="constant", seed=args.seed,
        save_every=0, verifier_workers=1, **({"slots": slots} if slots else {}), **flags,
    ))  # fmt: skip


def run_trl(args, work, setting, size, continuous, out, **options):
    """Trains with GRPOTrainer on grpo.py's prompts in their order. options: of GRPOConfig, over those below."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import common
    from rewards import judge

    rows = [json.loads(line) for line in open(work / "rows.jsonl", encoding="utf-8")]
    prompts = [rows[i]["messages"] for i in common.stream(len(rows), args.seed, range(len(rows)))]
    clock, samples = PartClock(out), args.batch_size * args.group_size

    def contains(completions, **_):
        return [judge("contains", completion[0]["content"], ANSWER).reward for completion in completions]

    class Log(TrainerCallback):
        def on_train_begin(self, *_, **__):
            clock.start()

        def on_step_end(self, *_, **__):
            clock.stop()

        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs:  # the last call is a summary
                length = logs["completions/mean_length"]
                tokens = {"tokens": round(length * samples), "mean_length": length}
                clock.write({key: logs[key] for key in ("loss", "grad_norm", "reward", "entropy")} | tokens)
            clock.start()

    size = size or samples
    options = ON_CPU | options
    config = GRPOConfig(
        output_dir=str(out), max_steps=args.steps, seed=args.seed, shuffle_dataset=False,
        per_device_train_batch_size=size, gradient_accumulation_steps=samples // size,
        num_generations=args.group_size, max_completion_length=args.max_new_tokens, loss_type="dapo",
        scale_rewards="none", beta=0.0, epsilon=0.2, epsilon_high=0.272,
        use_transformers_continuous_batching=continuous,
        learning_rate=args.lr, lr_scheduler_type="constant", max_grad_norm=1.0,
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
        **options,
    )  # fmt: skip
    dataset = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    trainer = GRPOTrainer(str(work / setting), contains, args=config, train_dataset=dataset, callbacks=[Log()])
    chat = common.ChatFormat(common.load_tokenizer(work / setting))
    assert trainer._tokenize_prompts(prompts)[0] == [list(map(int, chat.prompt(prompt))) for prompt in prompts]
    clock.watch(trainer, "_generate_and_score_completions", "rollout")
    clock.watch(trainer, "_generate_single_turn", "generate")
    trainer.train()


# ------------------------------------------------------------------------------------- in the parent, without it


def main(args):
    if not Path(args.data).is_file():
        sys.exit(f"error: --data {args.data}: no such file; give GSM8K's train.jsonl")
    args.data, started = str(Path(args.data).resolve()), time.time()
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        child = [sys.executable, __file__, "--child", json.dumps(asdict(args)), str(work)]
        run(args, [*child, "prepare", "", str(work)], work)
        baseline = {side: run(args, [sys.executable, "-c", code], work) for side, code in IMPORTS.items()}
        runs, memory = {}, {}
        for number in range(args.rounds):
            for setting in args.settings:
                for name in args.contestants:
                    out = work / f"{setting} {name} {number}"
                    out.mkdir()
                    memory.setdefault((setting, name), []).append(run(args, [*child, name, setting, str(out)], work))
                    steps = [json.loads(line) for line in open(out / "steps.log")]
                    runs.setdefault((setting, name), []).append(steps)
                    keys = ("seconds", "cpu_seconds", "rollout_seconds")
                    wall, cpu, rollout = (statistics.mean(s[key] for s in steps[args.warmup :]) for key in keys)
                    print(f"round {number + 1}  {setting:7} {name:18} {wall:6.2f} s/step, rollout {rollout:6.2f};"
                          f" {cpu:6.2f} s of CPU time", flush=True)  # fmt: skip
            report(args, runs, memory, baseline, started)


def report(args, runs, memory, baseline, started):
    """Prints tables of the rounds until now, writes the result file, and fails if contestants did different work."""
    results, strange = {}, []
    for setting in args.settings:
        results[setting] = table = {}
        for name in args.contestants:
            same = runs[setting, name]
            table[name] = r = summarise(same, memory[setting, name], baseline[name.split("_")[0]], args)
            for part in (*PARTS, "update"):
                for unit in ("seconds", "cpu_seconds"):
                    steps = [[seconds_of(step, part, unit) for step in run[args.warmup :]] for run in same]
                    medians = [statistics.median(each) for each in zip(*steps, strict=True)]
                    r[f"{part}_{unit}_per_step"] = statistics.mean(medians)
            for key in ("mean_length", "reward", "entropy"):
                r[key] = statistics.mean(step[key] for step in same[0][args.warmup :])
            first = table[args.contestants[0]]
            for key in ("tokens_per_second", "cpu_tokens_per_second"):
                r[f"speed_of_{args.contestants[0]}_{key}"] = first[key] / r[key]
            for part in (*PARTS, "update"):  # per token, since there are not equally many
                times = [x[f"{part}_cpu_seconds_per_step"] / x["tokens_per_step"] for x in (r, first)]
                r[f"speed_of_{args.contestants[0]}_{part}_cpu"] = times[0] / times[1]
            if abs(r["mean_length"] / first["mean_length"] - 1) > (0.0 if setting == "fixed" else 0.15):
                strange.append(f"{setting} {name}: {r['mean_length']:.1f} tokens, not {first['mean_length']:.1f}")
            set_mean = args.mean_length if setting == "ragged" else None
            if wrong := wrong_length(r["mean_length"], set_mean, args.max_new_tokens):
                strange.append(f"{setting} {name}: {wrong}")
        print(f"\n{setting:18} tokens/s  ours/it  s/step | by CPU time: ours/it  s/step  generate  rollout   update |"
              " ours/it: generate  rollout   update | length  reward  growth MB")  # fmt: skip
        for name, r in table.items():
            ours = f"speed_of_{args.contestants[0]}_"
            parts = [r[f"{part}_cpu_seconds_per_step"] for part in ("generate", "rollout", "update")]
            ratios = [r[f"{ours}{part}_cpu"] for part in ("generate", "rollout", "update")]
            print(f"{name:18} {r['tokens_per_second']:8.0f} {r[ours + 'tokens_per_second']:8.2f}"
                  f" {r['milliseconds_per_step'] / 1000:7.2f} | {r[ours + 'cpu_tokens_per_second']:20.2f}"
                  f" {r['cpu_milliseconds_per_step'] / 1000:7.2f} {parts[0]:9.2f} {parts[1]:8.2f} {parts[2]:8.2f} |"
                  f" {ratios[0]:17.2f} {ratios[1]:8.2f} {ratios[2]:8.2f} |"
                  f" {r['mean_length']:6.1f} {r['reward']:7.2f} {r['growth_mb']:10.0f}")  # fmt: skip
    facts = environment("grpo_vs_trl.py", "grpo.py", "common.py", "kernels", "rewards")
    facts |= {"minutes": (time.time() - started) / 60, "settings": asdict(args) | {"data": Path(args.data).name}}
    facts |= {"rounds": len(runs[args.settings[0], args.contestants[0]])}
    Path(args.out).write_text(json.dumps(facts | {"import_peak_mb": baseline, "results": results}, indent=1) + "\n")
    if strange:
        sys.exit("error: completions of another length: " + "; ".join(strange))


def seconds_of(step, part, unit):
    """Seconds of a part of a step; the update is what is no rollout."""
    return step[unit] - step[f"rollout_{unit}"] if part == "update" else step[f"{part}_{unit}"]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        args, work, out = Args(**json.loads(sys.argv[2])), Path(sys.argv[3]), Path(sys.argv[6])
        side, *variant = sys.argv[4].split("_")
        number = int(variant.pop()) if variant and variant[-1].isdigit() else None
        if side == "prepare":
            prepare(args, work)
        elif side == "postcard":
            run_postcard(args, work, sys.argv[5], number, out)
        else:
            run_trl(args, work, sys.argv[5], number, variant == ["continuous"], out)
    else:
        import tyro

        main(tyro.cli(Args, description=__doc__, use_underscores=True))
