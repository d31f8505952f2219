"""What is a sampled completion worth? SFT on the best, DPO, GRPO and PPO from one start, with as many completions each.

    python studies/equal_samples.py --out runs/equal_samples --seeds 1 2 3 4 5

The demo's additions. For each seed, the fine-tuned model that imitates its sloppy teacher may have 16,384 completions
of training problems sampled and judged; what is made of them differs:

    sft_best       4 of each of 4,096 problems; a right answer of each, to imitate: rejection sampling, once
    sft_random     its control: as many answers of the same problems, taken at random
    dpo            the same completions; all pairs of a right and a wrong one
    grpo           32 steps of 64 problems, 8 of each
    ppo            64 steps of 256 problems, one of each; the value model begins as the start, and learns alone for 24

Settings are those of `make demo`, and for SFT those of its first fine-tuning at a quarter of the rate. Measured are
accuracy on 1,000 held-out problems, what kind of errors are left, and the KL to the start. Each seed has its own start,
so methods are compared seed by seed. A call goes on where an earlier one was stopped.
"""

import argparse
from pathlib import Path

from arithmetic import IMAGES, demo, interval, measure, shown, write

import plot
import prepare

METHODS = ("sft_best", "sft_random", "dpo", "grpo", "ppo")
TITLES = {"sft": "the start", "sft_best": "SFT on right samples", "sft_random": "SFT on random samples", "dpo": "DPO",
          "grpo": "GRPO", "ppo": "PPO"}  # fmt: skip


def train(out, seed):
    """All models of a seed, of which those that are there are left."""
    if not Path(out, "sft", "model").exists():
        prepare.prepare(out, seed)
        if not Path(out, "clean").exists():
            demo.clean(out)
        demo.sft(out, seed)
    if not Path(out, "samples.jsonl").exists():
        demo.run_pipeline(
            "generate", model=f"{out}/sft/model", data=f"{out}/clean/clean/prompts.jsonl:4096", n=4, slots=256,
            out=f"{out}/samples.jsonl", seed=seed, **demo.LENGTHS,
        )  # fmt: skip
    shared = {"data": f"{out}/samples.jsonl", "seed": seed}
    if not Path(out, "best.jsonl").exists():
        demo.run_pipeline("curate", "sft", out=f"{out}/best.jsonl", control=f"{out}/random.jsonl", **shared)
    if not Path(out, "pairs.jsonl").exists():
        demo.run_pipeline("curate", "pairs", rule="right_wrong", per_prompt=0, out=f"{out}/pairs.jsonl", **shared)
    for kind in ("best", "random"):
        demo.run_script(
            "sft.py", model=f"{out}/sft/model", data=f"{out}/{kind}.jsonl", out=f"{out}/sft_{kind}", max_length=64,
            batch_size=64, lr=1e-3, epochs=4, save_every=0, seed=seed,
        )  # fmt: skip
    demo.dpo(out, seed, save_every=0)
    demo.grpo(out, seed, active_sampling=0, save_every=0)  # no group is replaced: 512 completions a step
    demo.ppo(out, seed, value_model=f"{out}/sft/model", steps=64, save_every=0)


def collect(out):
    """{method: numbers} of a seed."""
    results = {name: measure(out, name) for name in ("sft", *METHODS)}
    if not Path(out, "kl").exists():
        demo.kl(out, [f"{out}/{name}" for name in METHODS], f"{out}/kl", best_of=32)
    for numbers in demo.table_of(f"{out}/kl/kl.tsv"):
        results[numbers["name"]] |= {name: float(numbers[name]) for name in ("kl", "k3", "reward")}
    best_of = demo.table_of(f"{out}/kl/best_of.tsv")
    results["best_of"] = [[float(number) for number in row.values()] for row in best_of]
    return results


def draw(results, path):
    """Accuracy when sampled against KL: a point for each seed and method, and the mean line of the best of n."""
    figure, axes = plot.plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, marker in zip(("sft", *METHODS), "osvD^P", strict=True):
        points = [(result[name].get("kl", 0.0), result[name]["sampled"]) for result in results.values()]
        axes.plot(*zip(*points, strict=True), marker=marker, linestyle="none", alpha=0.8, label=TITLES[name])
    lines = [result["best_of"] for result in results.values()]
    bounds = [point[1] for point in lines[0]]
    means = [sum(line[i][2] for line in lines) / len(lines) for i in range(len(bounds))]
    axes.plot(bounds, means, color="0.5", linestyle="--", label="best of 1 to 32")
    axes.set_xlabel("KL to the start (nats an answer)")
    axes.set_ylabel("right, sampled at temperature 1")
    axes.legend(frameon=False, loc="lower right")
    plot.save(figure, path)


def table(results):
    """Lines of a Markdown table: means over seeds, ± 95 %, and the difference to GRPO seed by seed."""
    yield "| | sampled | greedy | not of the form | wrong sum | KL | sampled, less GRPO's |"
    yield "|---|---|---|---|---|---|---|"
    for name in ("sft", *METHODS):
        columns = [[result[name].get(key, 0.0) for result in results.values()] for key in
                   ("sampled", "greedy", "format_errors", "wrong_sums", "kl")]  # fmt: skip
        cells = [shown(numbers) for numbers in columns]
        differences = [result[name]["sampled"] - result["grpo"]["sampled"] for result in results.values()]
        cells.append("" if name == "grpo" else shown(differences))
        yield f"| {TITLES[name]} | {' | '.join(cells)} |"


def main(out, seeds):
    results = {}
    for seed in seeds:
        train(f"{out}/{seed}", seed)
        results[seed] = collect(f"{out}/{seed}")
    summary = {name: interval([result[name]["sampled"] for result in results.values()]) for name in ("sft", *METHODS)}
    write("equal_samples", {"seeds": seeds, "sampled": summary, "results": results})
    draw(results, IMAGES / "study_equal_samples.png")
    print(*table(results), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/equal_samples", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    args = parser.parse_args()
    main(args.out, args.seeds)
