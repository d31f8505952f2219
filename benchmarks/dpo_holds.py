"""Which settings of DPO hold? The demo's additions, five demo seeds, the pairs of each in four orders.

    python benchmarks/dpo_holds.py --out runs/dpo_holds

A demo seed decides the model, its fine-tuning and the pairs; the orders of these same pairs (dpo.py's --seed, from the
demo seed up) differ in nothing else. One epoch, β 0.5, batch 64, as in `make demo`; what differs is in SETTINGS. A run
counts as collapsed if fewer than 0.6 of 1,000 held-out problems are answered right when sampled.

Writes benchmarks/results/dpo_holds.json and docs/images/dpo_holds.png, and prints the table of docs/dpo.md. 100 runs of
half a minute on a core of their own; one that is finished is not made again.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import run as demo  # noqa: E402  (sets the number of threads, so it is first)
from sft_vs_trl import environment  # noqa: E402

import plot  # noqa: E402
import prepare  # noqa: E402

SETTINGS = {  # α is --nll_coef
    "lr 3e-4": {"lr": 3e-4, "nll_coef": 0.0},
    "lr 3e-4, α 0.2": {"lr": 3e-4, "nll_coef": 0.2},
    "lr 3e-4, α 0.5": {"lr": 3e-4, "nll_coef": 0.5},
    "lr 1e-4": {"lr": 1e-4, "nll_coef": 0.0},
    "lr 1e-4, α 0.5": {"lr": 1e-4, "nll_coef": 0.5},
}
SEEDS, ORDERS = 5, 4
COLLAPSED = 0.6  # sampled accuracy below which a run counts as collapsed; fine-tuning alone gives 0.38 to 0.46
LAST = 20  # steps over which the end of a run is averaged


def prepare_seed(out, seed):
    """The fine-tuned model of a demo seed and its pairs, as `make demo` makes them."""
    if not Path(out, "held_out_pairs.jsonl").exists():
        prepare.prepare(out, seed)
        demo.clean(out)
        demo.sft(out, seed)
        demo.pairs(out, seed)


def measure(out, setting, order):
    """Trains with a setting and an order of the pairs, and measures; what was measured before is read from disk."""
    flags = SETTINGS[setting]
    run = Path(out, f"dpo_lr{flags['lr']:g}_nll{flags['nll_coef']:g}_order{order}")
    path = run / "measured.json"
    if path.exists():
        return json.loads(path.read_text())
    flags = flags | {"eval_data": f"{out}/held_out_pairs.jsonl", "eval_every": 10**6, "save_every": 0}
    demo.dpo(out, order, name=run.name, **flags)
    rows = [row for row in plot.read(run) if row["step"]]
    accuracy = demo.evaluate(f"{run}/model", out)
    result = {name: accuracy[name]["mean"] for name in ("sampled", "greedy")}
    [moved] = demo.kl(out, [f"{run}/model"], f"{run}/kl")
    result["kl"] = float(moved["kl"])
    result["clipped"] = statistics.mean(row["grad_norm"] > 1 for row in rows)
    result["grad_norm"] = statistics.median(row["grad_norm"] for row in rows)
    for name in ("chosen_logprob", "rejected_logprob", "accuracy", "margin"):
        result[name] = statistics.mean(row[name] for row in rows[-LAST:])
        result[f"eval_{name}"] = rows[-1][f"eval_{name}"]  # over all held-out pairs, after the last step
    result["curve"] = [round(row["chosen_logprob"], 3) for row in rows]
    path.write_text(json.dumps(result))
    return result


def draw(results, path, before, after):
    """log π(chosen) of all runs of two settings, the collapsed ones in red; and sampled accuracy of every run."""
    figure, axes = plot.plt.subplots(1, 3, figsize=(13, 4.2), width_ratios=(1, 1, 1.1), layout="constrained")
    for setting, ax in zip((before, after), axes, strict=False):
        for measured in results[setting].values():
            colour = plot.RED if measured["sampled"] < COLLAPSED else plot.DARK
            ax.plot(plot.smooth(measured["curve"], 3), color=colour, linewidth=1, alpha=0.6)
        ax.set_title(f"{setting}: {len(results[setting])} runs", loc="left")
        ax.set_xlabel("optimizer step")
        ax.sharey(axes[0])
    axes[0].set_ylabel("log π(chosen), mean of 7 steps")
    for place, measured in enumerate(results.values()):
        for shift, one in enumerate(measured.values()):
            colour = plot.RED if one["sampled"] < COLLAPSED else plot.DARK
            x = place + (shift - len(measured) / 2) / 50
            axes[2].plot(x, one["sampled"], marker="o", markersize=4, color=colour, alpha=0.7)
    axes[2].set_xticks(range(len(results)), [name.replace(", ", "\n") for name in results])
    axes[2].set_ylim(0, 1)
    axes[2].set_title("right answers, sampled; red: collapsed", loc="left")
    plot.save(figure, path)


def spread(measured, name, digits=3):
    """'mean (lowest to highest)' of a number over runs."""
    numbers = [one[name] for one in measured]
    return f"{statistics.mean(numbers):.{digits}f} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


def table(results):
    """Lines of a Markdown table: a setting each."""
    yield "| setting | runs | sampled | greedy | collapsed | clipped | log π(chosen) | `accuracy` | `margin` | KL |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for setting, by_run in results.items():
        measured = list(by_run.values())
        collapsed = sum(one["sampled"] < COLLAPSED for one in measured)
        cells = [setting, len(measured), spread(measured, "sampled"), spread(measured, "greedy"), collapsed]
        cells += [spread(measured, "clipped", 2), spread(measured, "eval_chosen_logprob", 2)]
        cells += [spread(measured, "eval_accuracy"), spread(measured, "eval_margin", 1), spread(measured, "kl", 1)]
        yield f"| {' | '.join(map(str, cells))} |"


def report(results):
    """Writes the JSON and the figure, and prints the table."""
    packages = ("torch", "transformers", "datasets")
    facts = environment("dpo_holds.py", "dpo.py", "common.py", "kernels", packages=packages)
    facts |= {"settings": SETTINGS, "collapsed_below": COLLAPSED, "results": results}
    text = json.dumps(facts, ensure_ascii=False)
    (ROOT / "benchmarks" / "results" / "dpo_holds.json").write_text(text + "\n")
    draw(results, ROOT / "docs" / "images" / "dpo_holds.png", "lr 3e-4", "lr 3e-4, α 0.5")
    print("\n".join(table(results)))


def main(out):
    results = {setting: {} for setting in SETTINGS}
    for shift in range(ORDERS):
        for seed in range(1, SEEDS + 1):
            prepare_seed(f"{out}/{seed}", seed)
            for setting in SETTINGS:
                measured = measure(f"{out}/{seed}", setting, seed + shift)
                results[setting][f"seed {seed}, order {seed + shift}"] = measured
    report(results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/dpo_holds", help="folder of the runs")
    main(parser.parse_args().out)
