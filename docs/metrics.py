"""Values that metrics have in the demo: measures them in runs, and writes them into the tables of the lessons.

    python docs/metrics.py runs/demo1 runs/demo2 runs/demo3        measures: docs/demo_metrics.json, then the tables
    python docs/metrics.py                                         the tables only, from that file

A folder is what `python demo/run.py --seed 1 --out runs/demo1` makes. A value is the mean over the first eighth of a
run's steps and the mean over its last eighth, each then averaged over the runs; of what is measured now and then
(eval_reward), an eighth of the measurements, at least one.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VALUES = ROOT / "docs" / "demo_metrics.json"
FOLDERS = {"sft": "sft", "reward_model": "rm", "dpo": "dpo", "grpo": "grpo", "ppo_rlvr": "ppo"}  # of a demo
COLUMN = "in the demo"
MACHINE = ("seconds", "tokens_per_second", "rollout_seconds", "tokens_per_gpu_second")  # depend on what it ran on


def measure(folders):
    """{script: {metric: [first, last]}} over the demos in some folders."""
    values = {}
    for script, name in FOLDERS.items():
        runs = [read(Path(folder, name, "metrics.jsonl")) for folder in folders]
        keys = [key for key in dict.fromkeys(key for rows in runs for row in rows for key in row) if key != "step"]
        for key in keys:
            ends = [first_and_last([row[key] for row in rows if key in row]) for rows in runs]
            if key not in MACHINE and None not in ends:
                means = [sum(end) / len(end) for end in zip(*ends, strict=True)]
                values.setdefault(script, {})[key] = [float(f"{mean:.4g}") for mean in means]
    return values


def read(path):
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def first_and_last(numbers):
    """Means of the first and of the last eighth; None for what is no number."""
    if not numbers or not isinstance(numbers[0], int | float):
        return None
    size = max(1, len(numbers) // 8)
    return sum(numbers[:size]) / size, sum(numbers[-size:]) / size


def shown(ends):
    """'0.42 → 0.95', or one number where both are the same."""
    first, last = map(number, ends)
    return first if first == last else f"{first} → {last}"


def number(value):
    """With two digits that count, or without a fraction; never with an exponent that a reader has to decode."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.0e}".replace("e-0", "e-")
    digits = f"{value:.2g}"
    return digits if "e" not in digits else f"{value:.0f}"


def filled(script, text, values):
    """The text of a lesson with the column `in the demo` of its table of metrics filled in."""
    lines = text.splitlines()
    column = None
    for place, line in enumerate(lines):
        cells = re.split(r"(?<!\\)\|", line)
        if not line.startswith("|"):
            column = None
        elif column is None:
            column = next((i for i, cell in enumerate(cells) if cell.strip() == COLUMN), -1)
        elif column > 0 and "---" not in line:
            known = [values[script][key] for key in re.findall(r"`(\w+)`", cells[1]) if key in values[script]]
            cells[column] = f" {'; '.join(map(shown, known)) or '–'} "
            lines[place] = "|".join(cells)
    return "\n".join(lines) + "\n"


def main(folders):
    """The command line."""
    if folders:
        runs = [Path(folder, name) for folder in folders for name in FOLDERS.values()]
        configs = [json.loads((run / "config.json").read_text()) for run in runs]
        about = {"command": "python demo/run.py --seed N --out runs/demoN", "seeds": len(folders)}
        about["commits"] = sorted({config["commit"] for config in configs if config["commit"]})
        about["versions"] = configs[0]["versions"]
        VALUES.write_text(json.dumps(about | {"values": measure(folders)}, indent=1) + "\n")
    values = json.loads(VALUES.read_text())["values"]
    for script in FOLDERS:
        page = ROOT / "docs" / f"{script}.md"
        text = page.read_text(encoding="utf-8")
        page.write_text(filled(script, text, values), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
