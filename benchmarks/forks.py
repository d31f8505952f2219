"""What do the forks give? Each on the demo's task, beside the script that it changes, over several seeds.

    python benchmarks/forks.py --seeds 1 2 3
    python benchmarks/forks.py --seeds 1 --only grpo.py my_fork     two rows, printed; nothing is written

A fork makes the stage of demo/run.py that its script has, with the data, steps and settings of that stage; FORKS says
what is set otherwise. A seed decides the start model, its fine-tuning, its pairs and the order of all data. Right
answers are counted on 1,000 held-out problems, sampled and greedy; KL is to the fine-tuned model, from which all but
sft.py and its forks begin, in nats for an answer.

A run that is finished is not made again. After every run benchmarks/results/forks.json and the table of docs/forking.md
are written anew, of this call's seeds; at the end the table is printed. 19 runs for a seed, of one to two minutes on a
core of their own.
"""

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo"), str(ROOT / "forks")]

import dpo_holds  # noqa: E402
import make  # noqa: E402
import run as demo  # noqa: E402  (sets the number of threads, so it is before what imports torch)
from sft_vs_trl import environment  # noqa: E402

import task  # noqa: E402

STAGES = {"sft.py": demo.sft, "dpo.py": demo.dpo, "grpo.py": demo.grpo}
SHORTER = {"eval_data": None, "eval_every": None, "save_every": 0, "keep": None}  # nothing that is learned from
NO_STD = {"normalize_std": None}  # the stage divides by the group's deviation; these forks have their own way
AGAIN = {"model": "{out}/sft/model", "lr": 1e-3}  # sft.py a second time, from what it has made

# {row of the table: (forks, script, what is set otherwise than in the stage)}; None: without this flag
FORKS = {
    "sft.py": ([], "sft.py", {}),
    "dpo.py": ([], "dpo.py", {}),
    "grpo.py": ([], "grpo.py", {}),
    "kto": (["kto"], "dpo.py", {"data": "{out}/unpaired.jsonl", "batch_size": 128, "nll_coef": None}),
    "simpo": (["simpo"], "dpo.py", {"beta": 2.0}),
    "ipo": (["ipo"], "dpo.py", {"beta": 0.1}),
    "dft": (["dft"], "sft.py", {}),
    "sft.py, again": ([], "sft.py", AGAIN),
    "dft, again": (["dft"], "sft.py", AGAIN),
    "rloo": (["rloo"], "grpo.py", NO_STD),
    "reinforce_pp": (["reinforce_pp"], "grpo.py", NO_STD),
    "cispo": (["cispo"], "grpo.py", {}),
    "gspo sequence_mean": (["gspo", "sequence_mean"], "grpo.py", {}),
    "gspo sequence_mean, wider": (["gspo", "sequence_mean"], "grpo.py", {"clip_low": 0.03, "clip_high": 0.04}),
    "hpt": (["hpt"], "grpo.py", {"data": "{out}/demonstrated.jsonl", "gate": 2}),
    "dump": (["dump"], "grpo.py", {"data": ["{out}/no_carry.jsonl", "{out}/carry.jsonl"]}),
    "dr_grpo": (["dr_grpo"], "grpo.py", NO_STD),
    "sequence_mean": (["sequence_mean"], "grpo.py", {}),
    "overlong_penalty": (["overlong_penalty"], "grpo.py", {"overlong_buffer": 8}),
}


def prepare_seed(out, seed):
    """The fine-tuned model of a seed and its pairs, as `make demo` makes them, and data in the forms of the forks."""
    dpo_holds.prepare_seed(out, seed)
    if not Path(out, "unpaired.jsonl").exists():
        prompts = read(f"{out}/clean/clean/prompts.jsonl")
        rng = random.Random(seed)
        for row in prompts:
            row["demonstration"] = task.demonstrate(row["messages"][0]["content"], rng, slip=False)
        write(f"{out}/demonstrated.jsonl", prompts)
        write(f"{out}/no_carry.jsonl", [row for row in prompts if not has_carry(row)])
        write(f"{out}/carry.jsonl", [row for row in prompts if has_carry(row)])
        write(f"{out}/unpaired.jsonl", [answer for pair in read(f"{out}/pairs.jsonl") for answer in unpaired(pair)])


def has_carry(row):
    """Whether the ones of a problem add up to ten or more."""
    a, b = row["messages"][0]["content"].rstrip("=").split("+")
    return int(a[-1]) + int(b[-1]) >= 10


def unpaired(pair):
    """The two answers of a pair as rows of their own, for kto."""
    for kind, label in (("chosen", True), ("rejected", False)):
        yield {"messages": pair[kind], "label": label}


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def folder(name):
    return name.removesuffix(".py").replace(", ", "_").replace(" ", "_")


def train(out, seed, name):
    """Runs the stage of a row's script, with the script that its forks make and what is set otherwise."""
    forks, script, changes = FORKS[name]
    path = ROOT / script
    if forks:
        path = Path(out, f"{folder(name)}.py").absolute()
        path.write_text(make.make(forks, script), encoding="utf-8")

    def run_script(script, **flags):
        flags = flags | SHORTER | changes | {"out": f"{out}/{folder(name)}"}
        words = [word.format(out=out) for word in demo.command_line({k: v for k, v in flags.items() if v is not None})]
        print(f"\n$ python {path} {shlex.join(words)}", flush=True)
        subprocess.run([sys.executable, path, *words], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})

    demo.run_script = run_script  # in place of the one that takes our own scripts alone
    STAGES[script](out, seed)


def measure(out, seed, name):
    """{sampled, greedy, kl} of a row's run, which is made if it is not there; what was measured is read from disk."""
    run = Path(out, folder(name))
    path = run / "measured.json"
    if not path.exists():
        if not Path(run, "model").exists():
            train(out, seed, name)
        result = {kind: share["mean"] for kind, share in demo.evaluate(f"{run}/model", out).items()}
        if parent(name) != "sft.py":  # which begins with random weights
            [moved] = demo.kl(out, [f"{run}/model"], f"{run}/kl")
            result["kl"] = float(moved["kl"])
        path.write_text(json.dumps(result))
    return json.loads(path.read_text())


def parent(name):
    """The row to compare with: the script itself, from the same start."""
    _, script, changes = FORKS[name]
    return f"{script}, again" if changes is AGAIN else script


def table(results):
    """Lines of the Markdown table: a row each, of the seeds that are there."""
    yield "| fork | of | seeds | sampled | against its script, seed by seed | greedy | KL |"
    yield "|---|---|---|---|---|---|---|"
    for name, by_seed in results.items():
        cells = [f"`{name}`", f"`{parent(name)}`", len(by_seed), mean(by_seed, "sampled")]
        cells += ["" if name == parent(name) else differences(by_seed, results.get(parent(name), {}))]
        cells += [mean(by_seed, "greedy"), mean(by_seed, "kl")]
        yield f"| {' | '.join(map(str, cells))} |"


def mean(by_seed, kind):
    """A mean over seeds, with three digits; "" where it was not measured."""
    numbers = [measured[kind] for measured in by_seed.values() if kind in measured]
    return f"{statistics.mean(numbers):.3f}" if numbers else ""


def differences(by_seed, parents):
    """Sampled accuracy less that of the script of the same seed, for each seed that has both."""
    both = [seed for seed in by_seed if seed in parents]
    return ", ".join(f"{by_seed[seed]['sampled'] - parents[seed]['sampled']:+.3f}" for seed in both)


def report(results):
    """Writes the JSON of all finished runs, and the table of docs/forking.md."""
    packages = ("torch", "transformers", "datasets")
    facts = environment("forks.py", "forks", "sft.py", "dpo.py", "grpo.py", packages=packages)
    facts |= {"settings": {name: changes for name, (_, _, changes) in FORKS.items()}, "results": results}
    path = ROOT / "benchmarks" / "results" / "forks.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    page = ROOT / "docs" / "forking.md"
    before, _, rest = page.read_text(encoding="utf-8").partition("<!-- forks -->\n")
    after = rest.partition("<!-- /forks -->")[2]
    lines = "".join(line + "\n" for line in table(results))
    page.write_text(f"{before}<!-- forks -->\n{lines}<!-- /forks -->{after}", encoding="utf-8")


def main(out, seeds, only):
    results = {}
    for seed in seeds:
        prepare_seed(f"{out}/{seed}", seed)
        for name in only or FORKS:
            results.setdefault(name, {})[str(seed)] = measure(f"{out}/{seed}", seed, name)
            if not only:
                report(results)
    print("\n".join(table(results)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/forks", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=FORKS, help="rows of FORKS, printed; no file is written")
    args = parser.parse_args()
    main(args.out, args.seeds, args.only)
