"""Draws the losses of a run.

    python demo/plot.py --run runs/demo/sft --out runs/demo/loss.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files, needs no screen
import matplotlib.pyplot as plt  # noqa: E402


def plot(run, out, title="Supervised fine-tuning", floor=None):
    """Writes a PNG of the training and held-out loss in `run`/metrics.jsonl, with a line at `floor` if given."""
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(*zip(*train, strict=True), color="#9ecae1", linewidth=1, label="training, each batch")
    axes.plot(*zip(*held_out, strict=True), color="#08519c", linestyle="none", marker="o", markersize=5,
              label="held-out")  # fmt: skip
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
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.legend(frameon=False)
    figure.savefig(out, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of the run, with metrics.jsonl")
    parser.add_argument("--out", required=True, help="PNG to write")
    args = parser.parse_args()
    plot(args.run, args.out)
