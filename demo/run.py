"""The whole pipeline on a tiny model and a tiny task, on a laptop CPU: what `make demo` runs.

    python demo/run.py --out runs/demo

Makes a model that knows nothing (prepare.py) and teaches it two-digit addition from demonstrations of which three in
five are wrong (sft.py). Then pairs of a right and a wrong answer of its own (pairs.py) teach a model of its size to
tell them apart (reward_model.py), and teach the model itself to give the right ones (dpo.py). Or, from the same
fine-tuned model, it tries answers and is told which sums are right: eight answers to a problem, which are compared
(grpo.py), or one, which is compared with what a value model expected (ppo_rlvr.py). Measures it before and after on
problems it has not seen (evaluate.py), draws the curves (plot.py), and shows what the value model thinks of each token
(show_tokens.py).
"""

import argparse
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

import evaluate  # noqa: E402
import pairs  # noqa: E402
import plot  # noqa: E402
import prepare  # noqa: E402
import show_tokens  # noqa: E402
import task  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def run_script(name, **flags):
    """Runs one of the project's scripts as a user would, showing the command. Stops the demo if it fails."""
    flags = [text for flag, value in flags.items() for text in (f"--{flag}", *([] if value is True else [str(value)]))]
    print(f"\n$ python {name} {shlex.join(flags)}", flush=True)
    code = subprocess.run([sys.executable, ROOT / name, *flags]).returncode
    if code:
        sys.exit(f"error: {name} failed with exit code {code}")


def sft(out, seed):
    run_script(
        "sft.py", model=f"{out}/base", data=f"{out}/train.jsonl", eval_data=f"{out}/held_out.jsonl", out=f"{out}/sft",
        max_length=64, batch_size=64, lr=4e-3, epochs=4, eval_every=50, save_every=0, seed=seed,
    )  # fmt: skip


def reward_model(out, seed):
    run_script(
        "reward_model.py", model=f"{out}/sft/model", data=f"{out}/pairs.jsonl", eval_data=f"{out}/held_out_pairs.jsonl",
        out=f"{out}/rm", max_length=64, overlong="drop", batch_size=64, lr=1e-3, epochs=2, warmup_ratio=0.1,
        eval_every=75, save_every=0, seed=seed,
    )  # fmt: skip


def dpo(out, seed, name="dpo", **flags):
    # overlong: none is, but as the reward model says it too, the encoded pairs are found in the cache
    flags = {"lr": 3e-4, "nll_coef": 0.5} | flags  # without --nll_coef some runs collapse: benchmarks/dpo_holds.py
    run_script(
        "dpo.py", model=f"{out}/sft/model", data=f"{out}/pairs.jsonl", out=f"{out}/{name}", max_length=64,
        overlong="drop", batch_size=64, beta=0.5, save_every=0, seed=seed, **flags,
    )  # fmt: skip


def grpo(out, seed):
    run_script(
        "grpo.py", model=f"{out}/sft/model", data=f"{out}/prompts.jsonl", eval_data=f"{out}/held_out_prompts.jsonl:500",
        out=f"{out}/grpo", max_length=64, max_new_tokens=32, batch_size=64, group_size=8, slots=256, minibatches=4,
        normalize_std=True, lr=5e-4, lr_schedule="linear", steps=32, eval_every=8, save_every=0, seed=seed,
        no_activation_checkpointing=True,
    )  # fmt: skip


def ppo(out, seed, name="ppo", **flags):
    flags = {"value_model": f"{out}/rm/model"} | flags
    run_script(
        "ppo_rlvr.py", model=f"{out}/sft/model", data=f"{out}/prompts.jsonl",
        eval_data=f"{out}/held_out_prompts.jsonl:500", out=f"{out}/{name}", max_length=64, max_new_tokens=32,
        batch_size=256, slots=256, minibatches=8, lr=3e-4, value_lr=5e-4, value_clip=0, value_warmup_steps=24, steps=56,
        epochs=3, eval_every=8, save_every=0, seed=seed, no_activation_checkpointing=True, **flags,
    )  # fmt: skip


def main(out, seed):
    for folder in (Path(out, name) for name in ("sft", "rm", "dpo", "grpo", "ppo")):
        if folder.exists():
            # an unfinished run would be continued and a finished one left as it is, but the demo always begins anew
            if not Path(out, "base", "config.json").exists():
                sys.exit(f"error: {folder} exists and is not from an earlier demo: choose another --out")
            shutil.rmtree(folder)
    parameters = prepare.prepare(out, seed)
    accuracy = {"random weights": evaluate.evaluate(f"{out}/base")}
    evaluate.show(accuracy["random weights"])
    sft(out, seed)
    accuracy["after sft.py"] = evaluate.evaluate(f"{out}/sft/model")
    evaluate.show(accuracy["after sft.py"])
    count, held_out = pairs.write_pairs(f"{out}/sft/model", out, seed=seed)
    print(f"\n{out}/pairs.jsonl: {count} pairs of the model's own answers, {held_out} held-out ones")
    reward_model(out, seed)
    for name, stage in (("and dpo.py", dpo), ("or grpo.py", grpo), ("or ppo_rlvr.py", ppo)):
        stage(out, seed)
        accuracy[f"… {name}"] = evaluate.evaluate(f"{out}/{stage.__name__}/model")
        evaluate.show(accuracy[f"… {name}"])

    lowest = task.lowest_loss(f"{out}/train.jsonl")
    plot.plot(f"{out}/sft", f"{out}/loss.png", "Supervised fine-tuning on sloppy additions", lowest)
    plot.plot_accuracy(f"{out}/rm", f"{out}/reward_model.png")
    plot.plot_logprobs([f"{out}/dpo"], f"{out}/dpo.png")
    plot.plot_reward(f"{out}/grpo", f"{out}/grpo.png", "GRPO: rewards")
    plot.plot_reward(f"{out}/ppo", f"{out}/ppo.png", "PPO: rewards")
    show_tokens.show(f"{out}/ppo", f"{out}/ppo_tokens.html")
    share = plot.read(f"{out}/rm")[-1]["eval_accuracy"]
    low, high = evaluate.wilson(share * held_out, held_out)
    ranked = {"accuracy": share, "low": low, "high": high, "right": round(share * held_out), "total": held_out}
    Path(out, "results.json").write_text(json.dumps(accuracy | {"reward_model.py": ranked}, indent=2))

    total = accuracy["random weights"]["sampled"]["total"]
    print(f"\nShare of {total} held-out additions that is right, with 95 % intervals ({parameters:,} parameters)\n")
    print(f"{'':20}{'sampled':24}{'greedy':24}")
    for name, result in accuracy.items():
        print(f"{name:20}{evaluate.interval(result['sampled']):24}{evaluate.interval(result['greedy']):24}")
    print(f"\nShare of {held_out} held-out pairs that reward_model.py ranks right: {evaluate.interval(ranked)}")
    print(
        f"\n{time.perf_counter() - STARTED:.0f} s. Models: {out}/*/model   curves: {out}/*.png   {out}/ppo_tokens.html"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/demo", help="folder to write to; an earlier demo there is replaced")
    parser.add_argument("--seed", type=int, default=1, help="decides the weights, the demonstrations and their order")
    args = parser.parse_args()
    main(args.out, args.seed)
