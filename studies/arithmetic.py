"""What the studies on the demo's additions share: measuring a model, intervals over seeds, and their files."""

import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "demo"), str(ROOT / "benchmarks")) if path not in sys.path]

import numpy as np  # noqa: E402
import run as demo  # noqa: E402  (sets the number of threads, so it is first)
from sft_vs_trl import environment  # noqa: E402

RESULTS, IMAGES = ROOT / "studies" / "results", ROOT / "docs" / "images"
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # seeds: Student's t of a 95 % interval


def measure(out, name):
    """{sampled, greedy: accuracy on 1,000 held-out problems; format_errors, wrong_sums: shares when sampled}.

    out: folder of a demo. name: of the run in it. What was measured before is read.
    """
    path = Path(out, "eval", f"{name}.json")
    if not path.exists():
        accuracy = demo.evaluate(f"{out}/{name}" if name == "base" else f"{out}/{name}/model", out)
        numbers = {kind: accuracy[kind]["mean"] for kind in ("sampled", "greedy")}
        rows = [json.loads(line) for line in Path(out, "eval", f"{name}_sampled", "additions.jsonl").open()]
        numbers["format_errors"] = float(np.mean([not has_form(row) for row in rows]))
        numbers["wrong_sums"] = 1 - numbers["sampled"] - numbers["format_errors"]
        path.write_text(json.dumps(numbers))
    return json.loads(path.read_text())


def has_form(row):
    """Whether an answer is of the demonstrations' form: digits, two sums, # and the result; or is right anyway."""
    [text], [ended], [reward] = row["completions"], row["ended"], row["rewards"]
    return reward == 1 or (ended and re.fullmatch(r"\d\+\d=\d+,\d\+\d\+\d=\d+#\d+", text) is not None)


def interval(numbers):
    """(mean, half of the 95 % interval over seeds) by Student's t; the half is None for a single one."""
    numbers = np.array(numbers, dtype=float)
    if len(numbers) < 2:
        return float(numbers.mean()), None
    return float(numbers.mean()), float(T[len(numbers)] * numbers.std(ddof=1) / math.sqrt(len(numbers)))


def shown(numbers, digits=3):
    """'0.891 ± 0.012'"""
    mean, half = interval(numbers)
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def spread(numbers, digits=3):
    """'0.891 (0.880 to 0.902)': the mean, the lowest and the highest; of two seeds an interval would say nothing."""
    return f"{np.mean(numbers):.{digits}f} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


def write(name, results):
    """Writes studies/results/NAME.json, with what it was measured with."""
    RESULTS.mkdir(exist_ok=True)
    about = environment("", "studies", "demo", "pipeline", packages=("torch", "transformers", "datasets"))
    about["command"] = f"python studies/{name}.py --seeds {' '.join(map(str, results['seeds']))}"
    (RESULTS / f"{name}.json").write_text(json.dumps(about | results, indent=1) + "\n")
