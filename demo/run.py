"""The whole pipeline on a tiny model and a tiny task, on a laptop CPU: what `make demo` runs.

    python demo/run.py --out runs/demo

Makes a model that knows nothing (prepare.py) and prompts into which somebody has put test problems, which decontaminate
takes out. sft.py teaches two-digit addition from demonstrations of which three in five are wrong. Then it answers the
prompts (generate), and a right and a wrong answer of its own are a pair (curate): pairs teach a model of its size to
tell them apart (reward_model.py), and the model itself to give the right ones (dpo.py). Or, from the same fine-tuned
model, it tries answers and is told which sums are right: eight answers to a problem, which are compared (grpo.py), or
one, which is compared with what a value model expected (ppo_rlvr.py). Measures it before and after on problems it has
not seen (evaluate), and what was gained for how much of a change (kl). Draws the curves (plot.py), and shows what the
value model thinks of each token (show_tokens.py).
"""

import argparse
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

STARTED = time.perf_counter()  # importing torch is a fair part of the wait

# One thread: with two, on two cores that another program used too, a step took three to eight times as long, because
# threads wait for each other busily. Read when torch is first imported, so it stands before the imports.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tyro  # noqa: E402

import plot  # noqa: E402
import prepare  # noqa: E402
import show_tokens  # noqa: E402
import task  # noqa: E402
from common import RunError  # noqa: E402
from pipeline.estimates import wilson  # noqa: E402

LENGTHS = {"max_length": 64, "max_new_tokens": 32}
FOLDERS = ("base", "clean", "sft", "rm", "dpo", "grpo", "ppo", "eval", "kl")  # that a demo makes, beside files
FILES = ("samples", "pairs", "held_out_samples", "held_out_pairs")  # .jsonl, which would not be written again


def command_line(flags):
    """["--name", "value", ...]; True is a flag without a value, and a list several values."""
    words = []
    for name, value in flags.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def run_script(name, **flags):
    """Runs one of the project's scripts as a user would, showing the command. Stops the demo if it fails."""
    words = command_line(flags)
    print(f"\n$ python {name} {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, ROOT / name, *words]).returncode
    if code:
        sys.exit(f"error: {name} failed with exit code {code}")


def run_pipeline(name, *words, **flags):
    """Likewise one of pipeline/, in this process, which saves its imports. words: the first, before flags."""
    module = importlib.import_module(f"pipeline.{name}")
    words = [*words, *command_line(flags)]
    print(f"\n$ python -m pipeline.{name} {shlex.join(words)}", flush=True)
    kind = module.Sft | module.Pairs | module.Prompts if name == "curate" else module.Args
    try:
        module.main(tyro.cli(kind, args=words, use_underscores=True))
    except RunError as error:
        sys.exit(f"error: {error}")


def clean(out):
    """OUT/clean/clean/prompts.jsonl: the prompts without held-out problems."""
    run_pipeline(
        "decontaminate", test=f"held_out={out}/held_out_prompts.jsonl", out=f"{out}/clean",
        train=[f"{out}/prompts.jsonl", f"{out}/train.jsonl"],
    )  # fmt: skip


def sft(out, seed):
    run_script(
        "sft.py", model=f"{out}/base", data=f"{out}/train.jsonl", eval_data=f"{out}/held_out.jsonl", out=f"{out}/sft",
        max_length=64, batch_size=64, lr=4e-3, epochs=4, eval_every=50, save_every=0, seed=seed,
    )  # fmt: skip


def pairs(out, seed, name="pairs", noise=0.0):
    """Pairs of a right and a wrong answer of the fine-tuned model: OUT/pairs.jsonl and OUT/held_out_pairs.jsonl.

    noise: share of the training pairs whose labels are swapped; 0.5 leaves nothing to learn.
    """
    for kind, prompts in ((name, "clean/clean/prompts.jsonl"), (f"held_out_{name}", "held_out_prompts.jsonl")):
        samples = f"{out}/{kind.replace('pairs', 'samples')}.jsonl"
        run_pipeline(
            "generate", model=f"{out}/sft/model", data=f"{out}/{prompts}", n=4, slots=256, out=samples, seed=seed,
            **LENGTHS,
        )  # fmt: skip
        run_pipeline(
            "curate", "pairs", data=samples, rule="right_wrong", per_prompt=0, out=f"{out}/{kind}.jsonl", seed=seed,
            noise=noise * (kind == name),
        )  # fmt: skip


def reward_model(out, seed):
    run_script(
        "reward_model.py", model=f"{out}/sft/model", data=f"{out}/pairs.jsonl", eval_data=f"{out}/held_out_pairs.jsonl",
        out=f"{out}/rm", max_length=64, overlong="drop", batch_size=64, lr=1e-3, epochs=2, warmup_ratio=0.1,
        eval_every=75, save_every=0, seed=seed,
    )  # fmt: skip


def dpo(out, seed, name="dpo", **flags):
    # overlong: none is, but as the reward model says it too, the encoded pairs are found in the cache
    # nll_coef: without it some runs collapse (benchmarks/dpo_holds.py)
    flags = {"lr": 3e-4, "nll_coef": 0.5, "save_every": 32, "keep": 0} | flags
    run_script(
        "dpo.py", model=f"{out}/sft/model", data=f"{out}/pairs.jsonl", out=f"{out}/{name}", max_length=64,
        overlong="drop", batch_size=64, beta=0.5, seed=seed, **flags,
    )  # fmt: skip


def grpo(out, seed, **flags):
    flags = {"save_every": 8, "keep": 0} | flags
    run_script(
        "grpo.py", model=f"{out}/sft/model", data=f"{out}/clean/clean/prompts.jsonl",
        eval_data=f"{out}/held_out_prompts.jsonl:500", out=f"{out}/grpo", batch_size=64, group_size=8, slots=256,
        minibatches=4, normalize_std=True, lr=5e-4, lr_schedule="linear", steps=32, eval_every=8, seed=seed,
        no_activation_checkpointing=True, **LENGTHS, **flags,
    )  # fmt: skip


def ppo(out, seed, name="ppo", **flags):
    flags = {"value_model": f"{out}/rm/model", "steps": 56, "save_every": 8, "keep": 0} | flags
    run_script(
        "ppo_rlvr.py", model=f"{out}/sft/model", data=f"{out}/clean/clean/prompts.jsonl",
        eval_data=f"{out}/held_out_prompts.jsonl:500", out=f"{out}/{name}", batch_size=256, slots=256, minibatches=8,
        lr=3e-4, value_lr=5e-4, value_clip=0, value_warmup_steps=24, epochs=3, eval_every=8, seed=seed,
        no_activation_checkpointing=True, **LENGTHS, **flags,
    )  # fmt: skip


def evaluate(model, out, seed=1):
    """Accuracy on the held-out problems, {"sampled": {mean, low, high, ...}, "greedy": ...}, by pipeline.evaluate.

    model: folder below `out`, the demo's; its numbers go to OUT/eval.
    """
    found = {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        folder = Path(out, "eval", f"{Path(model).relative_to(out).parts[0]}_{name}")
        run_pipeline(
            "evaluate", model=model, data=f"additions={out}/held_out_prompts.jsonl", temperature=temperature, slots=256,
            out=folder, seed=seed, **LENGTHS,
        )  # fmt: skip
        [result] = json.loads(Path(folder, "results.json").read_text())["results"]
        found[name] = result["pass@1"]
    return found


def kl(out, models, folder, **flags):
    """The rows of kl.tsv as {column: text}: how far models have moved from the fine-tuned one, on 100 problems."""
    run_pipeline(
        "kl", ref=f"{out}/sft/model", model=models, data=f"{out}/held_out_prompts.jsonl:100", n=4, slots=256,
        out=folder, **LENGTHS, **flags,
    )  # fmt: skip
    head, *lines = Path(folder, "kl.tsv").read_text().splitlines()
    return [dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in lines]


def interval(share):
    """'0.412 [0.382, 0.443]'"""
    return f"{share['mean']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"


def main(out, seed):
    for folder in (Path(out, name) for name in FOLDERS[::-1]):
        if folder.exists():
            # an unfinished run would be continued and a finished one left as it is, but the demo always begins anew
            if not Path(out, "base", "config.json").exists():
                sys.exit(f"error: {folder} exists and is not from an earlier demo: choose another --out")
            shutil.rmtree(folder)
    for name in FILES:
        Path(out, f"{name}.jsonl").unlink(missing_ok=True)
    parameters = prepare.prepare(out, seed)
    clean(out)
    accuracy = {"random weights": evaluate(f"{out}/base", out)}
    sft(out, seed)
    accuracy["after sft.py"] = evaluate(f"{out}/sft/model", out)
    pairs(out, seed)
    reward_model(out, seed)
    for name, stage in (("and dpo.py", dpo), ("or grpo.py", grpo), ("or ppo_rlvr.py", ppo)):
        stage(out, seed)
        accuracy[f"… {name}"] = evaluate(f"{out}/{stage.__name__}/model", out)
    kl(out, [f"{out}/{stage}" for stage in ("dpo", "grpo", "ppo")], f"{out}/kl", best_of=32)

    lowest = task.lowest_loss(f"{out}/train.jsonl")
    plot.plot(f"{out}/sft", f"{out}/loss.png", "Supervised fine-tuning on sloppy additions", lowest)
    plot.plot_accuracy(f"{out}/rm", f"{out}/reward_model.png")
    plot.plot_logprobs([f"{out}/dpo"], f"{out}/dpo.png")
    plot.plot_reward(f"{out}/grpo", f"{out}/grpo.png", "GRPO: rewards")
    plot.plot_reward(f"{out}/ppo", f"{out}/ppo.png", "PPO: rewards")
    show_tokens.show(f"{out}/ppo", f"{out}/ppo_tokens.html")
    share = plot.read(f"{out}/rm")[-1]["eval_accuracy"]
    held_out = len(Path(out, "held_out_pairs.jsonl").read_text().splitlines())
    low, high = wilson(share * held_out, held_out)
    ranked = {"mean": share, "low": low, "high": high, "total": held_out}
    Path(out, "results.json").write_text(json.dumps(accuracy | {"reward_model.py": ranked}, indent=2))

    print(f"\nShare of {task.HELD_OUT} held-out additions that is right, 95 % intervals ({parameters:,} parameters)\n")
    print(f"{'':20}{'sampled':24}{'greedy':24}")
    for name, result in accuracy.items():
        print(f"{name:20}{interval(result['sampled']):24}{interval(result['greedy']):24}")
    print(f"\nShare of {held_out} held-out pairs that reward_model.py ranks right: {interval(ranked)}")
    print(
        f"\n{time.perf_counter() - STARTED:.0f} s. Models: {out}/*/model   curves: {out}/*.png   "
        f"accuracy against KL: {out}/kl/kl.png   {out}/ppo_tokens.html"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/demo", help="folder to write to; an earlier demo there is replaced")
    parser.add_argument("--seed", type=int, default=1, help="decides the weights, the demonstrations and their order")
    args = parser.parse_args()
    main(args.out, args.seed)
