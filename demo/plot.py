"""Draws what runs have logged: the losses of one, what a preference stage did, or rewards.

    python demo/plot.py --run runs/demo/sft --out runs/demo/loss.png
    python demo/plot.py --what accuracy --run runs/demo/rm --out runs/demo/reward_model.png
    python demo/plot.py --what logprobs --run runs/demo/dpo runs/demo/another --out runs/demo/dpo.png
    python demo/plot.py --what reward --run runs/demo/grpo runs/demo/ppo --ceiling 0.99 --out runs/demo/rewards.png
"""

import argparse
import itertools
import json
import string
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")  # writes files, needs no screen
import matplotlib.pyplot as plt  # noqa: E402

from pipeline.estimates import wilson  # noqa: E402

SIZE = (5, 3.4)  # inches: on a phone's screen letters are still legible
NAMES = {"sft.py": "SFT", "reward_model.py": "reward model", "dpo.py": "DPO", "grpo.py": "GRPO", "ppo_rlvr.py": "PPO"}
DARK, LIGHT, RED = "#08519c", "#9ecae1", "#cb181d"


def read(run):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def flags(run):
    """{flag: value} of a run, and its script's name for a reader."""
    config = json.loads(Path(run, "config.json").read_text())
    return config["args"], NAMES.get(config["script"], config["script"])


def series(rows, key):
    """(steps, values) of the rows that have `key`."""
    return zip(*((row["step"], row[key]) for row in rows if key in row), strict=True)


def save(figure, out):
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
    figure.savefig(out, dpi=200)
    plt.close(figure)


def plot(run, out, title="Supervised fine-tuning", floor=None):
    """Writes a PNG of the training and held-out loss in `run`/metrics.jsonl, with a line at `floor` if given."""
    rows = read(run)
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
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


def plot_accuracy(run, out, title="Reward model: pairs ranked right", pairs=None):
    """Writes a PNG of the share of pairs that the reward model of `run` ranks right.

    pairs: how many held-out ones there are, for their 95 % intervals.
    """
    rows = read(run)
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    axes.plot(*series(rows, "accuracy"), color=LIGHT, linewidth=1, label="training, each batch")
    steps, shares = series(rows, "eval_accuracy")
    bounds = [wilson(share * pairs, pairs) for share in shares] if pairs else [(share, share) for share in shares]
    errors = [[share - low for share, (low, _) in zip(shares, bounds, strict=True)]]
    errors += [[high - share for share, (_, high) in zip(shares, bounds, strict=True)]]
    label = "held-out, 95 %" if pairs else "held-out"
    axes.errorbar(steps, shares, errors, color=DARK, marker="o", markersize=5, capsize=3, label=label)
    axes.axhline(0.5, color="0.4", linewidth=1, linestyle="--", label="chance")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("share of pairs ranked right")
    axes.set_title(title, loc="left")
    axes.legend(frameon=False, loc="lower right")
    save(figure, out)


def plot_logprobs(runs, out):
    """Writes a PNG with a column for each DPO run: log-probabilities of chosen and rejected answers, pairs told apart.

    The letters (a), (b), … are those of the runs; of a single run, those of its rows.
    """
    alone = len(runs) == 1
    grid_of = {"figsize": (SIZE[0], 5.6) if alone else (2 + 2.2 * len(runs), 6), "layout": "constrained"}
    figure, grid = plt.subplots(3, len(runs), sharex="col", sharey="row", squeeze=False, **grid_of)
    kinds = (("chosen_logprob", DARK, "log π(chosen)"), ("rejected_logprob", RED, "log π(rejected)"),
             ("accuracy", "0.3", "pairs told apart"))  # fmt: skip
    for run, column, letter in zip(runs, grid.T, string.ascii_lowercase, strict=False):
        for (key, color, _), axes in zip(kinds, column, strict=True):
            steps, values = series(read(run), key)
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
            axes.plot(steps, smooth(values), color=color, linewidth=1.8)
        args, _ = flags(run)
        settings = f"β {args['beta']:g}, lr {args['lr']:g}"
        settings += f", NLL {args['nll_coef']:g}" if args.get("nll_coef") else ""
        loss = "length-normalised" if args["length_normalize"] else "plain"
        if not alone:
            column[0].set_title(f"({letter}) {loss}\n{settings}", loc="left", fontsize=10)
        column[2].set_xlabel("optimizer step")
    for axes, (_, _, name), letter in zip(grid[:, 0], kinds, "abc", strict=True):
        axes.set_ylabel(f"({letter}) {name}" if alone else name)
    title = "Direct preference optimisation (DPO)"
    figure.suptitle(f"{title}\n{loss}, {settings}" if alone else title, x=0.02, ha="left", fontsize=11)
    save(figure, out)


def samples_seen(rows):
    """{step: how many completions were sampled up to it} of an RL run."""
    steps = [row for row in rows if "sampled_tokens" in row]
    counts = [round(row["sampled_tokens"] / row["completion_tokens"]) for row in steps]
    return {0: 0} | dict(zip((row["step"] for row in steps), itertools.accumulate(counts), strict=True))


def plot_reward(runs, out, title=None, ceiling=None):
    """Writes a PNG of mean rewards against samples seen: of training samples, and of held-out prompts with intervals.

    PPO's value warm-up is shaded. runs: one or two. ceiling: greedy accuracy of the model they began with.
    """
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    names = []
    for run, dark, pale in zip(runs, (DARK, RED), (LIGHT, "#fcbba1"), strict=False):
        rows, (args, name) = read(run), flags(run)
        seen = samples_seen(rows)
        names.append(name)
        steps, rewards = series(rows, "reward")
        axes.plot([seen[step] for step in steps], rewards, color=pale, linewidth=1, label=f"{name}, training samples")
        steps, means = series(rows, "eval_reward")
        _, highs = series(rows, "eval_reward_high")
        halves = [high - mean for high, mean in zip(highs, means, strict=True)]
        style = {"color": dark, "marker": "o", "markersize": 4, "capsize": 3, "label": f"{name}, held-out, 95 %"}
        axes.errorbar([seen[step] for step in steps], means, halves, **style)
        if warmup := args.get("value_warmup_steps"):
            end = seen[min(warmup, max(seen))]
            axes.axvspan(0, end, color="0.92", zorder=0)
            text = f"{name}'s value\nwarm-up: its\npolicy stands\nstill"
            axes.text(end / 2, 0.03, text, ha="center", fontsize=8, color="0.3")
    if ceiling is not None:
        axes.axhline(ceiling, color="0.4", linewidth=1, linestyle="--", label=f"greedy before RL: {ceiling:.3f}")
    axes.set_ylim(0, 1.04)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("samples seen")
    axes.set_ylabel("mean reward (share that is right)")
    axes.set_title(title or " and ".join(names), loc="left")
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    save(figure, out)


def plot_stages(accuracy, out, problems=1000):
    """Writes a PNG of how many of `problems` each stage answers right, sampled and greedy, with 95 % intervals.

    accuracy: {stage: {"sampled": {mean, low, high}, "greedy": likewise}}, the first on top.
    """
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    for kind, color, shift in (("sampled", DARK, 0.15), ("greedy", RED, -0.15)):
        shares = [each[kind] for each in accuracy.values()]
        places = [shift - i for i in range(len(shares))]
        means = [problems * share["mean"] for share in shares]
        errors = [[problems * abs(share[side] - share["mean"]) for share in shares] for side in ("low", "high")]
        label = "sampled at temperature 1" if kind == "sampled" else "greedy: the likeliest token each time"
        fill = color if kind == "sampled" else "white"
        axes.errorbar(
            means, places, xerr=errors, color=color, marker="o", markersize=6, markerfacecolor=fill, linestyle="none",
            capsize=3, label=label,
        )  # fmt: skip
        for mean, place in zip(means, places, strict=True):
            axes.annotate(f"{mean:.0f}", (mean, place), (14, 0), textcoords="offset points", va="center", color=color)
    axes.set_yticks([-i for i in range(len(accuracy))], accuracy)
    axes.set_xlim(-0.03 * problems, 1.16 * problems)
    axes.set_xticks([problems * i // 5 for i in range(6)])
    axes.set_ylim(0.6 - len(accuracy), 0.6)
    axes.set_xlabel(f"right answers of {problems:,}, with 95 % intervals")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", frameon=False, fontsize=9)
    save(figure, out)


def smooth(values, reach=5):
    """Means of each value and its `reach` neighbours on either side: batches differ in how likely their answers are."""
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("loss", "accuracy", "logprobs", "reward"), default="loss")
    parser.add_argument("--run", required=True, nargs="+", help="folders of runs: one for loss and accuracy")
    parser.add_argument("--ceiling", type=float, help="for reward: a dashed line at the greedy accuracy before RL")
    parser.add_argument("--out", required=True, help="PNG to write")
    args = parser.parse_args()
    if args.what == "logprobs":
        plot_logprobs(args.run, args.out)
    elif args.what == "reward":
        plot_reward(args.run, args.out, ceiling=args.ceiling)
    else:
        {"loss": plot, "accuracy": plot_accuracy}[args.what](args.run[0], args.out)
