"""How should a budget of examples be divided between demonstrations and preference pairs?

    python studies/budget.py --out runs/budget --seeds 1 2

The demo's additions. Somebody pays for B examples: a demonstration by the sloppy teacher (three in five have a slip) is
one, a judgement which of two answers is right is one. A share of the budget goes to pairs: SFT on the demonstrations,
then the model's own answers to other problems, of which so many right–wrong pairs are judged, then DPO. With a share of
1 there are no demonstrations: no right answer comes from random weights, so the pairs are the teacher's, a right
demonstration against one with a slip (the cold start). SFT has 400 steps of 64 and DPO 132, whatever the budget: more
passes over fewer examples. All else is as in `make demo`.

Of SFT alone, the accuracy of each budget is fitted by a - b B^-c: least squares over all seeds, a on a grid, the rest
by a line on logarithms. The question is that of arXiv 2502.11284 (there GSM8K and others, to which the answer was: SFT
alone below about a thousand examples, then more and more pairs).
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from arithmetic import IMAGES, demo, interval, measure, spread, write

import plot
import prepare
import task

BUDGETS = (800, 1600, 3200, 6400)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
ALONE = (400, 12800)  # more budgets of SFT alone, for the fit
STEPS = {"sft": 400, "dpo": 132}
BATCH = 64


def train(out, budget, share, seed):
    """The models of one division of a budget, and what they are worth. out: folder of it."""
    path = Path(out, "measured.json")
    if path.exists():
        return json.loads(path.read_text())
    demonstrations, judged = round((1 - share) * budget), round(share * budget)
    if not Path(out, "base").exists():
        prepare.prepare(out, seed, count=max(demonstrations, 1))
    model = "base"
    if demonstrations:
        demo.run_script(
            "sft.py", model=f"{out}/base", data=f"{out}/train.jsonl", out=f"{out}/sft", max_length=64, batch_size=BATCH,
            lr=4e-3, epochs=1000, steps=STEPS["sft"], save_every=0, seed=seed,
        )  # fmt: skip
        model = "sft"
    pairs = 0
    if judged:
        pairs = own_pairs(out, judged, seed) if demonstrations else teachers_pairs(out, judged, seed)
    if pairs >= BATCH:
        demo.run_script(
            "dpo.py", model=f"{out}/base" if model == "base" else f"{out}/sft/model", data=f"{out}/pairs.jsonl",
            out=f"{out}/dpo", max_length=64, batch_size=BATCH, beta=0.5, lr=3e-4, nll_coef=0.5, epochs=1000,
            steps=STEPS["dpo"], save_every=0, seed=seed,
        )  # fmt: skip
        model = "dpo"
    result = {"demonstrations": demonstrations, "pairs": pairs, "model": model, **measure(out, model)}
    path.write_text(json.dumps(result))
    return result


def own_pairs(out, count, seed):
    """Writes up to so many pairs of the fine-tuned model's own answers, one a problem. Returns how many there are."""
    samples = Path(out, "samples.jsonl")
    if not samples.exists():
        problems = task.problems()[0]
        demonstrated = min(len(problems), len(Path(out, "train.jsonl").read_text().splitlines()))  # the first
        others_first = problems[demonstrated:] + problems[:demonstrated]
        task.write_prompts(f"{out}/asked.jsonl", others_first[: 2 * count])
        demo.run_pipeline(
            "generate", model=f"{out}/sft/model", data=f"{out}/asked.jsonl", n=4, slots=256, out=samples, seed=seed,
            **demo.LENGTHS,
        )  # fmt: skip
    if not Path(out, "all_pairs.jsonl").exists():
        flags = {"rule": "right_wrong", "per_prompt": 0, "out": f"{out}/all_pairs.jsonl", "seed": seed}
        try:
            demo.run_pipeline("curate", "pairs", data=samples, **flags)
        except SystemExit:  # there is no pair
            return 0
    lines = Path(out, "all_pairs.jsonl").read_text().splitlines(keepends=True)
    random.Random(seed).shuffle(lines)
    Path(out, "pairs.jsonl").write_text("".join(lines[:count]))
    return len(lines[:count])


def teachers_pairs(out, count, seed):
    """Writes so many pairs of a right demonstration and one with a slip, and returns their number."""
    rng = random.Random(seed)
    problems = task.problems()[0]
    with open(f"{out}/pairs.jsonl", "w") as file:
        for i in range(count):
            prompt = problems[i % len(problems)]
            chosen, rejected = (task.demonstrate(prompt, rng, slip) for slip in (False, True))
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    return count


def fit(points):
    """{a, b, c, residuals} of accuracy = a - b B^-c. points: [(B, accuracy), ...]."""
    B, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    best = None
    for a in np.linspace(y.max() + 1e-3, 1.0, 400):
        slope, intercept = np.polyfit(np.log(B), np.log(a - y), 1)
        residuals = y - (a - np.exp(intercept + slope * np.log(B)))
        if best is None or (residuals**2).sum() < best[0]:
            best = (residuals**2).sum(), a, np.exp(intercept), -slope, residuals
    _, a, b, c, residuals = best
    return {"a": float(a), "b": float(b), "c": float(c), "residuals": residuals.round(4).tolist()}


def draw(results, fitted, path):
    """Accuracy against the budget, a line for each share; and the residuals of the fit."""
    figure, axes = plot.plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for kind, ax in zip(("sampled", "greedy"), axes, strict=False):
        for share, colour in zip(SHARES, ("#08519c", "#4292c6", "#9ecae1", "#fc9272", "#cb181d"), strict=True):
            rows = [row for row in results if row["share"] == share]
            budgets = sorted({row["budget"] for row in rows})
            means = [interval([row[kind] for row in rows if row["budget"] == B])[0] for B in budgets]
            ax.plot(budgets, means, color=colour, linewidth=1.5, label=f"{share:.0%} pairs")
            ax.plot([row["budget"] for row in rows], [row[kind] for row in rows], "o", markersize=3, color=colour)
        ax.set_xscale("log")
        ax.set_xlabel("examples")
        ax.set_title(f"right answers, {kind}", loc="left")
        ax.set_ylim(0, 1)
    axes[0].legend(frameon=False, loc="upper left")
    alone = [row for row in results if row["share"] == 0]
    axes[2].plot([row["budget"] for row in alone], fitted["residuals"], "o", color=plot.DARK)
    axes[2].axhline(0, color="0.6", linewidth=1)
    axes[2].set_xscale("log")
    axes[2].set_xlabel("examples")
    axes[2].set_title(f"SFT alone: residuals of {fitted['a']:.2f} - {fitted['b']:.3g} B^-{fitted['c']:.2f}", loc="left")
    plot.save(figure, path)


def table(results, key):
    """Lines of a Markdown table: a budget each, a column for each share."""
    digits = 0 if key == "pairs" else 3
    yield "| examples | " + " | ".join(f"{share:.0%} pairs" for share in SHARES) + " |"
    yield "|---" * (1 + len(SHARES)) + "|"
    for budget in sorted({row["budget"] for row in results}):
        cells = []
        for share in SHARES:
            numbers = [row[key] for row in results if (row["budget"], row["share"]) == (budget, share)]
            cells.append(spread(numbers, digits) if numbers else "")
        yield f"| {budget:,} | {' | '.join(cells)} |"


def main(out, seeds):
    divisions = [(budget, share) for budget in BUDGETS for share in SHARES] + [(budget, 0.0) for budget in ALONE]
    results = []
    for seed in seeds:
        for budget, share in divisions:
            folder = f"{out}/{budget}_{share:g}_{seed}"
            Path(folder).mkdir(parents=True, exist_ok=True)
            results.append({"budget": budget, "share": share, "seed": seed, **train(folder, budget, share, seed)})
    alone = [row for row in results if row["share"] == 0]
    fitted = {kind: fit([(row["budget"], row[kind]) for row in alone]) for kind in ("sampled", "greedy")}
    write("budget", {"seeds": seeds, "steps": STEPS, "fit": fitted, "results": results})
    draw(results, fitted["sampled"], IMAGES / "study_budget.png")
    for key in ("sampled", "greedy", "format_errors", "wrong_sums", "pairs"):
        print(f"\n{key}\n", *table(results, key), sep="\n")
    print(f"\nSFT alone: {fitted}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/budget", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    main(args.out, args.seeds)
