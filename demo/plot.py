"""Draws what runs have logged: the losses of one, what a preference stage did, or rewards.

    python demo/plot.py --run runs/demo/sft --out runs/demo/loss.png
    python demo/plot.py --what accuracy --run runs/demo/rm --out runs/demo/reward_model.png
    python demo/plot.py --what logprobs --run runs/demo/dpo runs/demo/another --out runs/demo/dpo.png
    python demo/plot.py --what reward --run runs/demo/grpo --out runs/demo/grpo.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files, needs no screen
import matplotlib.pyplot as plt  # noqa: E402

DARK, LIGHT, RED = "#08519c", "#9ecae1", "#cb181d"


def read(run):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def series(rows, key):
    """(steps, values) of the rows that have `key`."""
    return zip(*((row["step"], row[key]) for row in rows if key in row), strict=True)


def save(figure, out):
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
    figure.savefig(out, dpi=150)
    plt.close(figure)


def plot(run, out, title="Supervised fine-tuning", floor=None):
    """Writes a PNG of the training and held-out loss in `run`/metrics.jsonl, with a line at `floor` if given."""
    rows = read(run)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(*series(rows, "loss"), color=LIGHT, linewidth=1, label="training, each batch")
    axes.plot(*series(rows, "eval_loss"), color=DARK, linestyle="none", marker="o", markersize=5, label="held-out")
    if floor is not None:
        axes.axhline(floor, color="0.4", linewidth=1, linestyle="--", label="lowest possible: the slips are random")
    axes.set_yscale("log")  # the last steps, from 0.2 to 0.15, are what brings the demo's accuracy
    low, high = axes.get_ylim()
    ticks = [tick for tick in (0.1, 0.2, 0.3, 0.5, 1, 2, 3, 4, 5, 7) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per trained token)")
    axes.set_title(title, loc="left")
    axes.legend(frameon=False)
    save(figure, out)


def plot_accuracy(run, out, title="Reward model: pairs ranked right"):
    """Writes a PNG of the share of pairs that the reward model of `run` ranks right."""
    rows = read(run)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(*series(rows, "accuracy"), color=LIGHT, linewidth=1, label="training, each batch")
    axes.plot(*series(rows, "eval_accuracy"), color=DARK, marker="o", markersize=5, label="held-out")
    axes.axhline(0.5, color="0.4", linewidth=1, linestyle="--", label="chance")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("share of pairs with the chosen one above")
    axes.set_title(title, loc="left")
    axes.legend(frameon=False, loc="lower right")
    save(figure, out)


def plot_logprobs(runs, out):
    """Writes a PNG with a column for each DPO run: log-probability of chosen and of rejected answers over the steps."""
    size = {"figsize": (2 + 2.2 * len(runs), 4.4), "layout": "constrained", "squeeze": False}
    figure, grid = plt.subplots(2, len(runs), sharex="col", sharey="row", **size)
    for run, column in zip(runs, grid.T, strict=True):
        rows = read(run)
        for kind, color, axes, first in zip(("chosen", "rejected"), (DARK, RED), column, grid[:, 0], strict=True):
            steps, values = series(rows, f"{kind}_logprob")
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
            axes.plot(steps, smooth(values), color=color, linewidth=1.8)
            first.set_ylabel(f"log π({kind})")
        flags = json.loads(Path(run, "config.json").read_text())["args"]
        loss = "length-normalised" if flags["length_normalize"] else "plain"
        column[0].set_title(f"{loss}\nβ {flags['beta']:g}, lr {flags['lr']:g}", loc="left", fontsize=10)
        column[1].set_xlabel("optimizer step")
    save(figure, out)


def plot_reward(run, out, title="Rewards"):
    """Writes a PNG of the mean reward of each step's samples, and of the held-out prompts with their intervals."""
    rows = read(run)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(*series(rows, "reward"), color=LIGHT, linewidth=1, label="training, all that was sampled for a step")
    steps, means = series(rows, "eval_reward")
    _, highs = series(rows, "eval_reward_high")
    halves = [high - mean for high, mean in zip(highs, means, strict=True)]
    axes.errorbar(steps, means, halves, color=DARK, marker="o", markersize=5, capsize=3, label="held-out, 95 %")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward")
    axes.set_title(title, loc="left")
    axes.legend(frameon=False, loc="lower right")
    save(figure, out)


def smooth(values, reach=5):
    """Means of each value and its `reach` neighbours on either side: batches differ in how likely their answers are."""
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("loss", "accuracy", "logprobs", "reward"), default="loss")
    parser.add_argument("--run", required=True, nargs="+", help="folder of the run; of several runs for logprobs")
    parser.add_argument("--out", required=True, help="PNG to write")
    args = parser.parse_args()
    if args.what == "logprobs":
        plot_logprobs(args.run, args.out)
    else:
        {"loss": plot, "accuracy": plot_accuracy, "reward": plot_reward}[args.what](args.run[0], args.out)
