"""The whole pipeline on a tiny model and a tiny task, on a laptop CPU: what `make demo` runs.

    python demo/run.py --out runs/demo

Makes a model that knows nothing (prepare.py) and prompts into which somebody has put test problems, which decontaminate
takes out. sft.py teaches two-digit addition from demonstrations of which three in five are wrong. Then it answers the
prompts (generate), and a right and a wrong answer of its own are a pair (curate): pairs teach a model of its size to
tell them apart (reward_model.py), and the model itself to give the right ones (dpo.py). Or, from the same fine-tuned
model, it tries answers and is told which sums are right: eight answers to a problem, which are compared (grpo.py), or
one, which is compared with what a value model expected (ppo_rlvr.py). Measures it before and after on problems it has
not seen (evaluate), and what was gained for how much of a change (kl). Ends with one page of it all (report.py).

Two stages run at a time where neither needs the other. Interrupted, the same command goes on; a finished demo is only
reported again, unless --anew is given or the code has changed.
"""

import argparse
import contextlib
import importlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# One thread: with two, on two cores that another program used too, a step took three to eight times as long, because
# threads wait for each other busily. Read when torch is first imported, so it stands before the imports.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tyro  # noqa: E402

import prepare  # noqa: E402
import report  # noqa: E402
from common import RunError  # noqa: E402
from record import Record  # noqa: E402

LENGTHS = {"max_length": 64, "max_new_tokens": 32}
BESIDE = []  # the process that runs beside the main one, if any


def command_line(flags):
    """["--name", "value", ...]; True is a flag without a value, and a list several values."""
    words = []
    for name, value in flags.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def run_script(name, **flags):
    """Runs one of the project's scripts as a user would, showing the command. Stops the demo if it fails."""
    run_command(name, [str(ROOT / name)], command_line(flags))


def run_pipeline(name, *words, **flags):
    """Likewise one of pipeline/. words: the first, before flags. What is there at `out` is whole, and is left.

    In this process, which saves its imports; beside another stage in one of its own, or both would share one core.
    """
    words = [*words, *command_line(flags)]
    if Path(flags["out"]).exists():
        print(f"\n{flags['out']} is there already", flush=True)
    elif threading.current_thread() is not threading.main_thread():
        run_command(f"-m pipeline.{name}", ["-m", f"pipeline.{name}"], words)
    else:
        print(f"\n$ python -m pipeline.{name} {shlex.join(words)}", flush=True)
        module = importlib.import_module(f"pipeline.{name}")
        kind = module.Sft | module.Pairs | module.Prompts if name == "curate" else module.Args
        try:
            module.main(tyro.cli(kind, args=words, use_underscores=True))
        except RunError as error:
            sys.exit(f"error: {error}")


def run_command(name, program, words):
    """Runs a Python program and shows its command; beside another stage, its name stands before each of its lines."""
    shown = f"$ python {name} {shlex.join(words)}"
    command = [sys.executable, *program, *words]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # python -m looks here, from any folder
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    if threading.current_thread() is threading.main_thread():
        print(f"\n{shown}", flush=True)
        code = subprocess.run(command, env=environment).returncode
    else:
        margin = f"{name.removeprefix('-m pipeline.')} | "
        print(f"\n{margin}{shown}", flush=True)
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            BESIDE.append(process)
            for line in process.stdout:
                _, _, last = line.decode(errors="replace").rstrip().rpartition("\r")  # of a progress bar its last state
                print("\r\033[K" * sys.stdout.isatty() + margin + last, flush=True)
        BESIDE.remove(process)
        code = process.returncode
    if code:
        sys.exit(f"error: {name} failed with exit code {code}")


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
    run_script("grpo.py", **grpo_flags(out, seed), **{"save_every": 8, "keep": 0} | flags)


def grpo_flags(out, seed):
    return dict(
        model=f"{out}/sft/model", data=f"{out}/clean/clean/prompts.jsonl",
        eval_data=f"{out}/held_out_prompts.jsonl:500", out=f"{out}/grpo", batch_size=64, group_size=8, slots=256,
        minibatches=4, normalize_std=True, lr=5e-4, lr_schedule="linear", steps=32, eval_every=8, seed=seed,
        no_activation_checkpointing=True, **LENGTHS,
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
    name = Path(model).relative_to(out).parts[0]
    for kind, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        run_pipeline(
            "evaluate", model=model, data=f"additions={out}/held_out_prompts.jsonl", temperature=temperature, slots=256,
            out=f"{out}/eval/{name}_{kind}", seed=seed, **LENGTHS,
        )  # fmt: skip
    return report.accuracy(out, name)


def kl(out, models, folder, **flags):
    """The rows of kl.tsv as {column: text}: how far models have moved from the fine-tuned one, on 100 problems."""
    run_pipeline(
        "kl", ref=f"{out}/sft/model", model=models, data=f"{out}/held_out_prompts.jsonl:100", n=4, slots=256,
        out=folder, **LENGTHS, **flags,
    )  # fmt: skip
    return table_of(f"{folder}/kl.tsv")


def table_of(path):
    """The rows of a file of tab-separated values, as {column: text}."""
    head, *lines = (line.split("\t") for line in Path(path).read_text().splitlines())
    return [dict(zip(head, line, strict=True)) for line in lines]


def interval(share):
    """'0.412 [0.382, 0.443]'"""
    return f"{share['mean']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"


def next_commands(out, seed):
    """{name: command}: what one might do with a finished demo."""
    out = str(Path(out))
    demo, fork, other = (shlex.quote(out + end) for end in ("", "_fork", f"_{seed + 1}"))
    flags = grpo_flags(out, seed) | {"out": f"{out}_fork"}
    lengths = shlex.join(command_line(LENGTHS))
    return {
        "chat": f"python -m pipeline.chat --model {demo}/grpo/model --max_new_tokens 32",
        "compare": f"python -m pipeline.evaluate --compare {demo}/eval/grpo_sampled {demo}/eval/dpo_sampled",
        "seed": f"python demo/run.py --seed {seed + 1} --out {other}",
        "make_fork": "python forks/make.py gspo > my_grpo.py",
        "diff": "diff grpo.py my_grpo.py",
        "run_fork": f"python my_grpo.py {shlex.join(command_line(flags))}",
        "evaluate": f"python -m pipeline.evaluate --model {fork}/model --data additions={demo}/held_out_prompts.jsonl "
        f"--temperature 1 {lengths} --out {fork}_eval",
    }


@contextlib.contextmanager
def second_lane():
    """Yields start(function, *args), which runs functions one after another beside the main thread: a Future each.

    If the main thread stops, what runs beside it is told to stop, too.
    """
    pool = ThreadPoolExecutor(1)
    try:
        yield pool.submit
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(BESIDE):
            process.terminate()


def main(out, seed, anew):
    record = Record(out, seed, anew)

    def stage(name, function, *args, **flags):
        if not record.has(name):
            started = time.perf_counter()
            function(*args, **flags)
            record.add(name, time.perf_counter() - started)

    if record.finished:
        print(f"{out}: this demo is finished, and is only reported again (--anew would make a new one)", flush=True)
    with second_lane() as start:
        stage("prepare", prepare.prepare, out, seed)
        tuned = start(stage, "sft", sft, out, seed)
        stage("clean", clean, out)
        stage("evaluate base", evaluate, f"{out}/base", out)
        tuned.result()
        beside = [start(stage, "grpo", grpo, out, seed)]
        stage("pairs", pairs, out, seed)
        beside.append(start(stage, "dpo", dpo, out, seed))
        for name in ("sft", "grpo", "dpo"):
            beside.append(start(stage, f"evaluate {name}", evaluate, f"{out}/{name}/model", out))
        stage("rm", reward_model, out, seed)
        stage("ppo", ppo, out, seed)
        beside.append(start(stage, "evaluate ppo", evaluate, f"{out}/ppo/model", out))
        for each in beside[:2]:  # GRPO and DPO
            each.result()
        stage("kl", kl, out, [f"{out}/{name}" for name in ("dpo", "grpo", "ppo")], f"{out}/kl", best_of=32)
        for each in beside:
            each.result()
    record.finish()
    results = report.write(out, next_commands(out, seed))

    print(f"\nShare of {results['problems']:,} held-out additions that is right, with 95 % intervals\n")
    print(f"{'':20}{'sampled':24}{'greedy':24}")
    for name, shares in results["accuracy"].items():
        print(f"{name:20}{interval(shares['sampled']):24}{interval(shares['greedy']):24}")
    ranked = results["reward_model"]
    print(f"\nShare of {ranked['total']} held-out pairs that reward_model.py ranks right: {interval(ranked)}")
    print(f"\n{results['seconds']:.0f} s. Open {out}/report.html: what was learned, how, and what to do next.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/demo", help="folder to write to")
    parser.add_argument("--seed", type=int, default=1, help="decides the weights, the demonstrations and their order")
    parser.add_argument("--anew", action="store_true", help="delete the demo that is there, and begin again")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what runs beside is ended, too
    try:
        main(args.out, args.seed, args.anew)
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command goes on")
