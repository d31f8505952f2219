"""One page about runs: their curves, answers to the same prompts over time, and what differs between them.

    python -m pipeline.report runs/sft --out report.html
    python -m pipeline.report runs/grpo runs/grpo_slow --x samples --out report.html

Reads what the scripts write, config.json, metrics.jsonl and samples.jsonl, also of a run that is not finished. The page
is one file that loads nothing; called again, the command makes it anew. Lines of more than 400 points are means of as
many parts; behind a thick line, which is smoothed, the thin one is what was measured. A band is an interval of 95 %.
"""

import io
import re
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

import jinja2
import matplotlib
import numpy as np
import tyro

import common
from pipeline.ranks import run
from pipeline.shapes.files import lines_of

matplotlib.use("Agg")  # writes files, needs no screen
import matplotlib.pyplot as plt  # noqa: E402

TEMPLATE = Path(__file__).with_suffix(".html")
MARK = '<meta name="generator" content="postcard pipeline.report">'  # of pages that may be overwritten
TITLES = {
    "eval": "Held-out data",
    "reward": "Rewards",
    "train": "Training",
    "rollout": "Rollouts",
    "speed": "Speed and memory",
}
POINTS = 400  # of a line
SHOWN = ("eval_loss", "eval_accuracy", "eval_reward", "loss", "reward")  # in the table of runs, the last values


@dataclass(kw_only=True)
class Args:
    runs: tyro.conf.Positional[list[str]]  # folders of runs: --out of a script
    out: str = "report.html"
    x: Literal["step", "samples", "tokens", "hours"] = "step"  # below the curves; samples: rows or completions seen
    metrics: list[str] = field(default_factory=list)  # only those whose names begin so: "loss" "eval_"; all by default
    prompts: int = 4  # whose answers are shown, of each run


@dataclass
class Folder:
    """A run as it is on disk: config.json, the entries of metrics.jsonl, the lines of samples.jsonl."""

    name: str
    config: dict
    entries: list
    samples: list


def main(args):
    """Writes --out. Raises RunError."""
    common.check_ranges(args, {"prompts": (0, 1000)})
    out = Path(args.out)
    if out.exists() and MARK not in out.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise common.RunError(f"--out {out} is there already and is no report: choose another name")
    if not args.runs:
        raise common.RunError("name at least one folder of a run")
    folders = [read(path) for path in dict.fromkeys(args.runs)]
    common.replace_text(out, page(folders, args))
    print(f"{out}: {len(folders)} run{'s' * (len(folders) > 1)}")


def read(path):
    """The Folder of a run. Raises RunError if it is none, or has no step yet."""
    config = common.read_run_config(path)
    if not config:
        raise common.RunError(f"{path} is no folder of a run: it has no config.json")
    metrics = Path(path, "metrics.jsonl")
    entries = [entry for _, entry in lines_of(metrics)] if metrics.exists() else []
    if not entries:
        raise common.RunError(f"{path}/metrics.jsonl has no step yet")
    samples = Path(path, "samples.jsonl")
    return Folder(str(path), config, entries, [line for _, line in lines_of(samples)] if samples.exists() else [])


def page(folders, args):
    """The page as text."""
    names = dict.fromkeys(name for folder in folders for entry in folder.entries for name in entry)
    bounds = {name + end for name in names for end in ("_low", "_high")}  # drawn with what they are bounds of
    names = [name for name in names if name not in {"step", *bounds} and is_wanted(name, folders, args.metrics)]
    sections = {title: [name for name in names if common.grouped(name).startswith(f"{group}/")]
                for group, title in TITLES.items()}  # fmt: skip
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = template.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        mark=MARK,
        title=" · ".join(Path(folder.name).name for folder in folders),
        runs=[summary(folder) for folder in folders],
        flags=differences(folders),
        curves={title: [draw(name, folders, args.x) for name in each] for title, each in sections.items() if each},
        answers={folder.name: answers(folder.samples, args.prompts) for folder in folders},
        notes={folder.name: folder.config.get("data_report", []) for folder in folders},
    )


def is_wanted(name, folders, beginnings):
    """Whether a metric is a number, and one of those that were asked for."""
    values = [entry[name] for folder in folders for entry in folder.entries if name in entry]
    return all(isinstance(value, int | float) for value in values) and name.startswith(tuple(beginnings) or "")


def summary(folder):
    """{column: text} of a run."""
    last = {name: value for entry in folder.entries for name, value in entry.items()}
    seconds = sum(entry.get("seconds", 0) for entry in folder.entries)
    columns = {"run": folder.name, "script": folder.config["script"], "model": folder.config["args"].get("model", "")}
    columns["steps"] = f"{last['step']:,} of {folder.config['steps']:,}"
    columns["time in steps"] = str(timedelta(seconds=round(seconds)))
    columns |= {name: f"{last[name]:.4g}" for name in SHOWN if name in last}
    memory = max((entry.get("peak_memory_gib", 0) for entry in folder.entries), default=0)
    columns["memory"] = f"{memory:.1f} GiB" if memory else ""
    columns["commit"] = (folder.config.get("commit") or "")[:8]
    return columns


def differences(folders):
    """{flag: [its value in each run]} of the flags that are not the same in all."""
    every = dict.fromkeys(name for folder in folders for name in folder.config["args"])
    values = {name: [folder.config["args"].get(name, "") for folder in folders] for name in every}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


# ---------------------------------------------------------------- curves


def draw(name, folders, x):
    """A metric over the course of all runs, as an SVG."""
    figure, axes = plt.subplots(figsize=(4.6, 2.7), layout="constrained")
    for number, folder in enumerate(folders):
        places, values = points(folder, name, x)
        low, high = (points(folder, name + end, x)[1] for end in ("_low", "_high"))
        color, few = f"C{number % 10}", len(values) < 60
        label = Path(folder.name).name
        axes.plot(places, values, color=color, linewidth=1, alpha=1 if few else 0.3, marker="." if few else "")
        if not few:
            axes.plot(places, smooth(values), color=color, linewidth=1.8)
        if len(low) == len(high) == len(values):
            axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot([], [], color=color, label=label)
    axes.set_title(name, loc="left", fontsize=10)
    axes.set_xlabel(x, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    if len(folders) > 1:
        axes.legend(frameon=False, fontsize=7)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return re.sub(r' (width|height)="[\d.]+pt"', "", text.getvalue()[text.getvalue().index("<svg") :], count=2)


def points(folder, name, x):
    """(places, values), at most POINTS of each: means of equal parts where there are more steps."""
    flags = folder.config["args"]
    per_step = flags.get("batch_size", 1) * flags.get("group_size", 1)
    tokens = np.cumsum([entry.get("tokens", 0) for entry in folder.entries])
    hours = np.cumsum([entry.get("seconds", 0) for entry in folder.entries]) / 3600
    steps = np.array([entry["step"] for entry in folder.entries])
    places = {"step": steps, "samples": steps * per_step, "tokens": tokens, "hours": hours}[x]
    has = [i for i, entry in enumerate(folder.entries) if name in entry]
    values = np.array([folder.entries[i][name] for i in has], dtype=float)
    parts = np.array_split(np.arange(len(has)), min(POINTS, max(1, len(has))))
    pairs = [(places[has][part].mean(), values[part].mean()) for part in parts if len(part)]
    return np.array(pairs).reshape(-1, 2).T


def smooth(values):
    """The mean of what came before, of which each is worth a tenth less than the next, without a bias to 0."""
    total, weight, means = 0.0, 0.0, []
    for value in values:
        total, weight = 0.9 * total + value, 0.9 * weight + 1
        means.append(total / weight)
    return means


# ---------------------------------------------------------------- answers


def answers(samples, count):
    """[(prompt, [line of samples.jsonl, ...]), ...]: held-out prompts at the first, a middle and the last evaluation.

    Where nothing was held out, the first lines of the first, a middle and the last step, under one heading.
    """
    held_out = [line for line in samples if line.get("held_out")]
    if not held_out:
        return [("training prompts", chosen) for chosen in [some(samples, count)] if chosen and count]
    rows = list(dict.fromkeys(line["row"] for line in held_out))[:count]
    of_rows = [[line for line in held_out if line["row"] == row] for row in rows]
    return [(lines[0]["prompt"], some(lines, 1)) for lines in of_rows]


def some(lines, count):
    """The first `count` lines of the first, of a middle and of the last step."""
    steps = sorted({line["step"] for line in lines})
    chosen = dict.fromkeys(steps[i] for i in (0, len(steps) // 2, -1)) if steps else []
    return [line for step in chosen for line in [each for each in lines if each["step"] == step][:count]]


if __name__ == "__main__":
    run(main, Args, __doc__)
