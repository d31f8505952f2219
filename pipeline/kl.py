"""How far has training moved a model, and what was that worth? KL to where it began, on fixed prompts.

    python -m pipeline.kl --ref runs/sft/model --model runs/grpo runs/dpo --data prompts.jsonl:100 --out runs/kl
    torchrun --nproc_per_node 8 -m pipeline.kl …

Each model π answers each prompt x by n completions y, at --temperature: the same prompts and seeds for all. Then π and
π_ref both read them, and with d_t = log π(y_t | x, y_<t) - log π_ref(y_t | x, y_<t)

    KL = mean over completions of Σ_t d_t                          k1 of Schulman (2020): unbiased               (1)
    KL = mean over completions of Σ_t (e^(-d_t) + d_t - 1)         k3: each term ≥ 0, a smaller variance         (2)

in nats a completion, and by the mean number of tokens in nats a token: one definition for what SFT, DPO, PPO and GRPO
have made. (`ref_kl` and `approx_kl` in metrics.jsonl are others. What is cut off counts up to where it is cut.) Where π
can say what π_ref hardly ever does, a few completions make up the mean: then the interval is wide, and says so.

A run stands for all its checkpoints (--keep 0 keeps them) and its final model. With --best_of N the plot has a line to
compare with: the mean reward of the best of n out of N completions of π_ref, against log n - (n - 1) / n, which its KL
is at most (arXiv 2401.01879). OUT gets kl.tsv, kl.png, and all completions.
"""

import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro

import common
from pipeline.estimates import estimate
from pipeline.generate import RANGES, Scorer
from pipeline.generator import Generator, Sampling
from pipeline.models import RewardModel
from pipeline.ranks import on_rank0, run
from pipeline.shapes.files import lines_of

matplotlib.use("Agg")  # writes files, needs no screen
import matplotlib.pyplot as plt  # noqa: E402


@dataclass(kw_only=True)
class Args(Sampling):
    ref: str  # π_ref: folder or Hub id
    model: list[str]  # runs (--out of a script), or models
    data: list[str]  # prompts: SOURCE[:AMOUNT] ...; about a hundred
    out: str  # new folder
    n: Annotated[int, tyro.conf.arg(aliases=["-n", "--group_size"])] = 1  # completions of each prompt
    reward_model: str | None = None  # folder or Hub id of a reward model, whose scores are the rewards
    best_of: int = 0  # completions of π_ref of each prompt for the line of the best of n; 0: no line


def main(args):
    """Writes --out and prints its table. Raises RunError."""
    common.check_ranges(args, common.RANGES | RANGES | {"best_of": (0, 1e6)}, above_zero=("temperature",))
    if args.top_p < 1:
        raise common.RunError("--top_p below 1 samples another distribution than π, whose KL this is")
    args.per_token = True  # for Scorer
    out = Path(args.out)
    if out.exists():
        raise common.RunError(f"--out {out} is there already: delete it, or choose another")
    folder = out.with_name(f".{out.name}.unfinished")
    runs = [models_of(path) for path in args.model]
    for name, count in Counter(models[0][0] for models in runs).items():
        if count > 1:
            raise common.RunError(f"--model: {count} are called {name}")
    vocabulary = common.load_tokenizer(args.ref, "chatml").get_vocab()  # its own template plays no part
    scorer = RewardModel(args.reward_model, args.content_tokens) if args.reward_model else None
    samples, own, chats = {}, {}, {}  # (name, step): file, file, common.ChatFormat
    for name, step, path in itertools.chain(*runs):
        key, file = (name, step), f"{name}.step_{step}.jsonl"
        generator = Generator(args, path, scorer)
        if generator.chat.tokenizer.get_vocab() != vocabulary:
            raise common.RunError(f"{name} has another vocabulary than --ref: there is no KL between them")
        samples[key] = generator.write_part(generator.load(args.data), folder / file)
        own[key] = read_with(Scorer(args, path, sampler=generator.sampler), samples[key], folder / f"own.{file}")
        chats[key] = generator.chat
        generator.close()
    line = None
    if args.best_of:
        generator = Generator(replace(args, n=args.best_of), args.ref, scorer)
        line = generator.write_part(generator.load(args.data), folder / "best_of.jsonl")
        generator.close()
    reference = Scorer(args, args.ref)
    by_ref = {}
    for key, file in samples.items():
        reference.chat = chats[key]  # π_ref reads the tokens that π has read, whatever its own template is
        by_ref[key] = read_with(reference, file, folder / f"ref.{key[0]}.step_{key[1]}.jsonl")
    reference.close()
    on_rank0(lambda: report(args, folder, {key: (own[key], by_ref[key]) for key in samples}, line))


def models_of(path):
    """[(name, step, folder), ...] of a run, or of one model. Raises RunError."""
    run = Path(path)
    found = {step: folder / "model" for step, folder in common.checkpoints(run).items()}
    if (run / "model" / "config.json").exists():
        found[common.read_run_config(run).get("steps", 0)] = run / "model"
    whole = run.resolve() if run.exists() else run
    if found or whole.name != "model":
        return [(whole.name, step, str(folder)) for step, folder in found.items()] or [(whole.name, 0, path)]
    is_run = (whole.parent / "metrics.jsonl").exists()  # the final model of a run, which is called as the run
    return [(whole.parent.name, common.read_run_config(whole.parent)["steps"] if is_run else 0, path)]


def read_with(scorer, samples, path):
    """The file of a Scorer's log-probabilities of given samples."""
    return scorer.write_part(scorer.load([str(samples)], judged=False), path)


# ---------------------------------------------------------------- numbers


def measure(own, by_ref):
    """{column: number} of one model, from its rows with the log-probabilities of each token, its own and π_ref's."""
    k1, k3, ref, rewards, tokens, ended = [], [], [], [], [], []  # of each prompt the mean over its completions
    prompts = [json.dumps(row["messages"]) for row in own]  # one that is there twice is one prompt
    for row, ref_row in zip(own, by_ref, strict=True):
        pairs = zip(row["logprobs"], ref_row["logprobs"], strict=True)
        d = [np.array(logprobs) - np.array(ref_logprobs) for logprobs, ref_logprobs in pairs]  # (T,) each
        k1.append(np.mean([each.sum() for each in d]))
        k3.append(np.mean([(np.exp(-each) + each - 1).sum() for each in d]))
        ref.append(np.mean([np.sum(logprobs) for logprobs in ref_row["logprobs"]]))
        tokens.append(np.mean(row["tokens"]))
        ended.append(np.mean(row["ended"]))
        judged = [reward for reward in row["rewards"] if reward is not None]
        rewards.append(np.mean(judged) if judged else np.nan)
    numbers, is_judged = {"prompts": len(set(prompts))}, np.isfinite(rewards)
    columns = {"kl": (k1, prompts), "k3": (k3, prompts)}
    if is_judged.any():
        columns["reward"] = np.array(rewards)[is_judged], np.array(prompts)[is_judged]
    for name, (values, clusters) in columns.items():
        result = estimate(values, clusters)
        numbers |= {name: result["mean"], f"{name}_low": result["low"], f"{name}_high": result["high"]}
    per_token = {"kl_per_token": np.mean(k1) / np.mean(tokens), "ref_logprob_per_token": np.mean(ref) / np.mean(tokens)}
    rest = per_token | {"tokens": np.mean(tokens), "ended": np.mean(ended)}
    return numbers | {name: float(number) for name, number in rest.items()}


def best_of(rows):
    """[(n, most KL of the best of n, its mean reward), ...] for n = 1, 2, 4, ... up to the completions of each prompt.

    Of N rewards, ascending, the i-th (from 1) is the best of n drawn from them with probability C(i-1, n-1) / C(N, n).
    """
    rewards = [sorted(reward for reward in row["rewards"] if reward is not None) for row in rows]
    rewards = [each for each in rewards if each]
    points, n = [], 1
    while rewards and n <= min(map(len, rewards)):
        means = [
            sum(math.comb(i, n - 1) * reward for i, reward in enumerate(each)) / math.comb(len(each), n)
            for each in rewards
        ]
        points.append((n, math.log(n) - (n - 1) / n, float(np.mean(means))))
        n *= 2
    return points


# ---------------------------------------------------------------- files


def report(args, folder, files, line):
    """Writes kl.tsv and kl.png, gives the samples their names, publishes the folder and prints the table."""
    points = []
    for (name, step), (own, by_ref) in files.items():
        rows, ref_rows = ([row for _, row in lines_of(file)] for file in (own, by_ref))
        points.append({"name": name, "step": step, **measure(rows, ref_rows)})
    columns = max(points, key=len).keys()
    for point in points:  # None: too few prompts
        point.update({column: "" for column in columns if point.get(column) is None})
    best = best_of([row for _, row in lines_of(line)]) if line else []
    text = "\t".join(columns) + "\n"
    text += "".join("\t".join(shown(point[column]) for column in columns) + "\n" for point in points)
    common.replace_text(folder / "kl.tsv", text)
    if best:
        lines = [f"{n}\t{kl:.6g}\t{reward:.6g}\n" for n, kl, reward in best]
        common.replace_text(folder / "best_of.tsv", "n\tkl\treward\n" + "".join(lines))
    if "reward" in columns:
        plot(points, best, folder / "kl.png")
    wanted = {own: f"{name}.step_{step}.jsonl" for (name, step), (own, _) in files.items()}
    wanted |= {line: "best_of.jsonl"} if line else {}
    for path in set(folder.iterdir()) - {*wanted, *(folder / name for name in ("kl.tsv", "kl.png", "best_of.tsv"))}:
        path.unlink()  # of a call that was killed
    for path, name in wanted.items():
        path.rename(folder / name)
    common.sync_to_disk(folder)
    folder.rename(args.out)
    print(f"{text}{args.out}: kl.tsv, kl.png and all completions are there")


def shown(value):
    """A number or a name as text."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def plot(points, best, path):
    """Draws reward against KL (1): a line for each run, through its steps, and that of the best of n."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name in dict.fromkeys(point["name"] for point in points):
        run = [point for point in points if point["name"] == name and point["reward"] != ""]
        errors = []
        for key in ("kl", "reward"):
            low, high = ([point[f"{key}_{side}"] or point[key] for point in run] for side in ("low", "high"))
            middle = [point[key] for point in run]
            errors.append([np.subtract(middle, low), np.subtract(high, middle)])
        x, y = ([point[key] for point in run] for key in ("kl", "reward"))
        axes.errorbar(x, y, errors[1], errors[0], marker="o", markersize=4, linewidth=1.2, elinewidth=0.6, label=name)
    if best:
        _, kl, rewards = zip(*best, strict=True)
        axes.plot(kl, rewards, color="0.4", linestyle="--", label=f"best of 1 to {best[-1][0]}")
    axes.set_xlabel("KL to the start (nats a completion)")
    axes.set_ylabel("mean reward")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run(main, Args, __doc__)
