"""Where should a value model start from? PPO on the demo's additions with four answers, several seeds.

    python benchmarks/value_init.py --out runs/value_init

    reward model    what reward_model.py has made of the policy's own right and wrong answers, with its head (Tülu 3)
    … zero head     the same with a head of zeros (--zero_value_head)
    policy          the policy itself with a new head, N(0, 1/(H+1)), as without --value_model; or with one of zeros

The settings are the demo's: in the first 24 steps the policy stands still and only the value model learns. Writes
benchmarks/results/value_init.json and docs/images/value_init.png. A run that is finished is not made again.
"""

import argparse
import json
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import run as demo  # noqa: E402  (sets the number of threads, so it is first)

import plot  # noqa: E402
import prepare  # noqa: E402

KINDS = {
    "reward model": {},
    "reward model, zero head": {"zero_value_head": True},
    "policy, new head": {"value_model": "{out}/sft/model"},
    "policy, zero head": {"value_model": "{out}/sft/model", "zero_value_head": True},
}
CURVES = ("explained_variance", "explained_variance_mc", "reward", "value_loss")
COLOURS = (plot.DARK, plot.LIGHT, plot.RED, "#fcae91")


def folder(kind):
    return "ppo_" + kind.replace(", ", "_").replace(" ", "_")


def train(out, seed):
    """The stages that PPO needs, and PPO with each kind of value model."""
    if not Path(out, "rm", "model").exists():
        prepare.prepare(out, seed)
        demo.clean(out)
        demo.sft(out, seed)
        demo.pairs(out, seed)
        demo.reward_model(out, seed)
    for kind, flags in KINDS.items():
        flags = {name: value.format(out=out) if isinstance(value, str) else value for name, value in flags.items()}
        if not Path(out, folder(kind), "model").exists():
            demo.ppo(out, seed, name=folder(kind), **flags)


def collect(out, kind):
    """Curves and accuracy of a run."""
    run = Path(out, folder(kind))
    rows = plot.read(run)
    accuracy = demo.evaluate(f"{run}/model", out)
    result = {name: [round(row[name], 4) for row in rows if row["step"]] for name in CURVES}
    result["eval_reward"] = [(row["step"], round(row["eval_reward"], 4)) for row in rows if "eval_reward" in row]
    return result | {name: accuracy[name] for name in ("sampled", "greedy")}


def draw(results, path):
    """Explained variance and reward, means of 5 steps: a thin line for each seed, a thick one for their mean."""
    figure, axes = plot.plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    titles = {"explained_variance_mc": "explained variance of the outcome", "reward": "share of right answers, sampled"}
    for (name, title), ax in zip(titles.items(), axes, strict=True):
        for (kind, seeds), colour in zip(results.items(), COLOURS, strict=True):
            curves = [plot.smooth(result[name], 2) for result in seeds.values()]
            steps = range(1, len(curves[0]) + 1)
            for curve in curves:
                ax.plot(steps, curve, color=colour, linewidth=0.7, alpha=0.5)
            mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
            ax.plot(steps, mean, color=colour, linewidth=2.2, label=kind)
        ax.axvline(24.5, color="0.6", linewidth=1, linestyle="--")
        ax.set_title(title, loc="left")
        ax.set_xlabel("step (up to the dashed line only the value model learns)")
    axes[0].set_ylim(-0.2, 0.45)
    axes[1].set_ylim(0.3, 1.0)
    axes[0].legend(frameon=False, loc="upper left", title="value model starts as")
    plot.save(figure, path)


def main(out, seeds):
    results = {kind: {} for kind in KINDS}
    for seed in seeds:
        train(f"{out}/{seed}", seed)
        for kind in KINDS:
            results[kind][seed] = collect(f"{out}/{seed}", kind)
    config = json.loads(Path(out, str(seeds[0]), folder("reward model"), "config.json").read_text())
    about = {"date": date.today().isoformat(), "commit": config["commit"], "versions": config["versions"]}
    path = ROOT / "benchmarks" / "results" / "value_init.json"
    path.write_text(json.dumps(about | {"seeds": seeds, "results": results}) + "\n")
    draw(results, ROOT / "docs" / "images" / "value_init.png")
    for kind, by_seed in results.items():
        for seed, result in by_seed.items():
            still, last = (sum(result["explained_variance_mc"][part]) for part in (slice(16, 24), slice(-8, None)))
            print(f"{kind}, seed {seed}: explained {still / 8:.3f} in steps 17 to 24, {last / 8:.3f} in the last 8")
            print(f"    sampled {demo.interval(result['sampled'])}, greedy {demo.interval(result['greedy'])}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/value_init", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    main(args.out, args.seeds)
