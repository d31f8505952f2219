"""Draws the diagrams of the lessons: docs/images/learn_*.svg.

    python docs/figures.py

Whatever number stands in them comes from the project's own functions: tokens and masks from common.py, losses and
advantages from the scripts and forks. Rewards, values and ratios that go in are made up, and the pages say so. The same
versions of matplotlib and its fonts give the same bytes; tests/test_learn.py compares what is drawn.
"""

import math
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import matplotlib

matplotlib.use("Agg")  # writes files, needs no screen
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo"), str(ROOT / "forks")]

import make  # noqa: E402

import common  # noqa: E402
import dpo  # noqa: E402
import grpo  # noqa: E402
import ppo_rlvr  # noqa: E402
import prepare  # noqa: E402
import reward_model  # noqa: E402
import task  # noqa: E402

IMAGES = ROOT / "docs" / "images"
DARK, LIGHT, RED, PINK, GREY, WHITE = "#08519c", "#c6dbef", "#a50f15", "#fcbba1", "#e8e8e8", "#ffffff"
STYLE = {"svg.hashsalt": "postcard", "font.size": 10, "font.family": "DejaVu Sans", "svg.fonttype": "path"}
PROBLEM = "37+58="


# ---------------------------------------------------------------------------------------------------------- drawing


def canvas(width, height):
    """A figure whose one axes has the units of `width` by `height` inches, without frame."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, height, text, color=LIGHT, **style):
    """A rectangle whose lower left corner is (x, y), with text in its middle."""
    axes.add_patch(plt.Rectangle((x, y), width, height, facecolor=color, edgecolor="0.35", linewidth=0.8))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", **style)


def label(axes, x, y, text, **style):
    axes.text(x, y, text, **{"ha": "left", "va": "center"} | style)


def arrow(axes, start, end):
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.3", "linewidth": 1.2})


def save(figure, name):
    figure.savefig(IMAGES / f"learn_{name}.svg", facecolor="white", metadata={"Date": None, "Creator": None})
    plt.close(figure)


def demo_chat():
    """The demo's tokenizer, one token a character, and its chat format."""
    tokenizer = prepare.make_tokenizer()
    return tokenizer, common.ChatFormat(tokenizer)


# ---------------------------------------------------------------------------------------------- the five algorithms


def sft():
    """One conversation, as tokens: what position t reads, what it has to predict, and what counts."""
    tokenizer, chat = demo_chat()
    encode = common.SftEncoder(chat, len(tokenizer), 64, "truncate", "all")
    messages = [{"role": "user", "content": "2+3="}, {"role": "assistant", "content": "5"}]
    row = encode({"messages": messages})
    microbatch = common.pack([(np.array(row["input_ids"]), np.array(row["trained"]))], "cpu")
    ids = microbatch.input_ids.tolist()
    targets = microbatch.targets.tolist()
    figure, axes = canvas(9.6, 3.5)
    for t in range(len(ids)):
        x = 1.75 + 0.78 * t
        trained = targets[t] != common.IGNORE
        axes.text(x + 0.36, 3.25, f"t={t}", ha="center", va="center", color="0.4", fontsize=9)
        box(axes, x, 2.6, 0.72, 0.45, tokenizer.decode(ids[t]).strip("<|>"), WHITE, fontsize=8)
        shown = tokenizer.decode(targets[t]).strip("<|>") if trained else "–"
        box(axes, x, 1.95, 0.72, 0.45, shown, LIGHT if trained else GREY, fontsize=8)
        box(axes, x, 1.3, 0.72, 0.45, "1" if trained else "0", LIGHT if trained else GREY, fontsize=9)
        if trained:
            arrow(axes, (x + 0.36, 1.28), (x + 0.36, 0.78))
    label(axes, 0.1, 2.82, "input_ids (T,)")
    label(axes, 0.1, 2.17, "targets (T,)")
    label(axes, 0.1, 1.52, "mask m (T,)")
    first = 1.75 + 0.78 * targets.index(next(y for y in targets if y != common.IGNORE))
    box(axes, first - 0.15, 0.3, 1.85, 0.45, r"$-\log\,\pi(y_t\,|\,y_{<t})$", LIGHT)
    label(axes, 0.1, 0.52, "loss = their sum over the whole batch ÷ number of ones in m", color=DARK)
    save(figure, "sft")


def reward():
    """A pair becomes two scores, and the loss sees their difference."""
    figure, axes = canvas(9.6, 3.1)
    for y, name, color in ((2.1, "chosen", LIGHT), (0.7, "rejected", PINK)):
        box(axes, 0.1, y, 1.3, 0.5, "prompt x", GREY)
        box(axes, 1.4, y, 1.5, 0.5, f"{name} answer", color)
        box(axes, 2.9, y, 0.35, 0.5, "end", color, fontsize=8)
        arrow(axes, (3.3, y + 0.25), (3.8, y + 0.25))
        box(axes, 3.85, y, 1.35, 0.5, "state (H,)\nof last token", WHITE, fontsize=8.5)
        arrow(axes, (5.25, y + 0.25), (5.65, y + 0.25))
        box(axes, 5.7, y, 0.6, 0.5, "r", color)
    label(axes, 0.1, 1.65, "one model, one packed microbatch of T tokens:\n2B sequences → scores (2B,)", fontsize=9)
    axes.text(6.0, 1.65, "difference", ha="center", va="center", fontsize=9)
    right = figure.add_axes((0.735, 0.2, 0.25, 0.68))
    differences = torch.linspace(-4, 4, 81)
    scores = torch.stack([differences, torch.zeros(81)], dim=1).flatten()
    losses, _ = reward_model.ranking_loss(reward_model.Args(), scores, torch.zeros(81))
    right.plot(differences, losses, color=DARK)
    right.plot([0], [math.log(2)], "o", color=RED)
    right.annotate("cannot tell:\nlog 2 = 0.693", (0, math.log(2)), (0.3, 2.2), fontsize=9)
    right.set_xlabel("r(chosen) − r(rejected)", fontsize=9)
    right.set_title("loss of the pair", fontsize=10)
    right.spines[["top", "right"]].set_visible(False)
    save(figure, "reward_model")


def preference():
    """What four log-probabilities become, and how the pull on a pair falls with its margin."""
    figure, axes = canvas(9.6, 3.5)
    for y, name, color in ((2.35, "chosen", LIGHT), (0.75, "rejected", PINK)):
        box(axes, 0.1, y, 1.0, 0.5, "prompt x", GREY)
        box(axes, 1.1, y, 1.1, 0.5, f"{name} y", color)
        arrow(axes, (2.25, y + 0.25), (2.7, y + 0.55))
        arrow(axes, (2.25, y + 0.25), (2.7, y - 0.05))
        box(axes, 2.75, y + 0.33, 1.75, 0.42, r"$\log\,\pi(y|x)$", WHITE)
        box(axes, 2.75, y - 0.25, 1.75, 0.42, r"$\log\,\pi_{ref}(y|x)$, from disk", GREY, fontsize=9)
        arrow(axes, (4.55, y + 0.25), (4.95, y + 0.25))
        box(axes, 5.0, y, 1.2, 0.5, r"r = β × difference", color, fontsize=8)
    label(axes, 2.75, 1.82, "sums over tokens, (2B,)", fontsize=9)
    label(axes, 5.0, 1.82, "m = difference of r, (B,)", fontsize=9)
    right = figure.add_axes((0.73, 0.2, 0.255, 0.66))
    margins = torch.linspace(-4, 4, 81, dtype=torch.float64)
    logprobs = torch.stack([margins, torch.zeros(81)], dim=1).flatten().double().requires_grad_()
    args = dpo.Args(beta=1.0)
    losses, _ = dpo.preference_loss(args, logprobs, torch.ones(162), torch.zeros(81, 2, dtype=torch.float64))
    pull = -torch.autograd.grad(losses.sum(), logprobs)[0][0::2]
    right.plot(margins, losses.detach(), color=DARK)
    right.plot(margins, pull, color=RED)
    right.text(-3.9, 0.35, "pull, β σ(−m)", color=RED, fontsize=9)
    right.text(-2.2, 3.0, "loss", color=DARK, fontsize=9)
    right.set_xlabel("margin m", fontsize=9)
    right.spines[["top", "right"]].set_visible(False)
    save(figure, "dpo")


def group():
    """Prompt → completions → rewards → advantages → loss, with the numbers of one group."""
    rng = random.Random(4)
    answers = [task.demonstrate(PROBLEM, rng, slip) for slip in (False, True, True, False)]
    samples = [SimpleNamespace(reward=float(task.is_right(PROBLEM, text)), ended=True) for text in answers]
    grpo.set_advantages(grpo.Args(), samples)
    figure, axes = canvas(9.6, 3.6)
    for x, head, shape in (
        (0.1, "prompt", "P of them"),
        (1.5, "completions, sampled", "G for each, N tokens"),
        (5.05, "reward r", "(G,)"),
        (6.35, "advantage A", "(G,)"),
    ):
        label(axes, x, 3.38, head, weight="bold")
        label(axes, x, 3.13, shape, color="0.4", fontsize=9)
    label(axes, 7.8, 3.38, "every token's term", weight="bold")
    label(axes, 7.8, 3.13, "(T,), packed", color="0.4", fontsize=9)
    box(axes, 0.1, 1.55, 0.9, 0.5, PROBLEM, GREY)
    for i, (text, sample) in enumerate(zip(answers, samples, strict=True)):
        y = 2.45 - 0.63 * i
        color = LIGHT if sample.advantages > 0 else PINK
        arrow(axes, (1.02, 1.8), (1.45, y + 0.21))
        box(axes, 1.5, y, 3.1, 0.42, text, color, family="DejaVu Sans Mono", fontsize=9)
        arrow(axes, (4.65, y + 0.21), (5.0, y + 0.21))
        box(axes, 5.05, y, 0.6, 0.42, f"{sample.reward:g}", color)
        arrow(axes, (5.7, y + 0.21), (6.3, y + 0.21))
        box(axes, 6.35, y, 0.85, 0.42, f"{sample.advantages:+.2f}", color)
        arrow(axes, (7.25, y + 0.21), (7.75, y + 0.21))
        box(axes, 7.8, y, 1.7, 0.42, "likelier" if sample.advantages > 0 else "less likely", color, fontsize=9)
    mean = np.mean([sample.reward for sample in samples])
    label(axes, 1.5, 0.2, f"the mean of the group, {mean:.2f}, is what was to be expected: no value model", fontsize=9)
    label(axes, 7.0, 0.2, "loss = sum ÷ number of tokens", color=DARK, fontsize=9)
    save(figure, "grpo")


def values():
    """One completion under PPO: what V expects before each token, and the advantages that follow. V is made up."""
    text = "7+8=12,3+5+1=9#92"
    expected = [6.0, 6.0, 6.0, 6.0, 6.1, 6.0, 1.0, 0.8, 0.9, 0.8, 0.9, 0.8, 0.8, 0.9, 0.8, 0.6, 0.4, 0.3]
    args = ppo_rlvr.Args(no_eos_score=None)
    tokens = [*text, "end"]
    zeros = np.zeros(len(tokens))
    sample = SimpleNamespace(reward=0.0, ended=True, old_logprobs=zeros, ref_logprobs=zeros, values=np.array(expected))
    ppo_rlvr.set_rewards(args, sample)
    ppo_rlvr.set_advantages(args, [sample])
    raw = ppo_rlvr.gae(sample.rewards, sample.values, args.gamma, args.gae_lambda)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9.6, 4.4), sharex=True, layout="constrained")
    places = np.arange(len(tokens))
    top.plot(places, expected, "o-", color=DARK, markersize=4)
    top.axhline(0, color="0.6", linewidth=0.8)
    top.set_ylabel("V$_t$: the return\nexpected before token t")
    point = {"arrowprops": {"arrowstyle": "->"}}
    top.annotate("the slip, 7+8 = 12, is read:\nV falls, and 2 gets most of the blame", (6, 1.0), (7.0, 3.8), **point)
    top.annotate("score of the\nwrong answer: 0", (17.2, 0.0), (14.8, 2.6), **point)
    bottom.bar(places, raw, color=[DARK if a > 0 else RED for a in raw])
    bottom.axhline(0, color="0.6", linewidth=0.8)
    bottom.set_ylabel("A$_t$ of equation (1),\nbefore whitening")
    bottom.set_xticks(places, tokens, family="DejaVu Sans Mono")
    bottom.set_xlabel("token t of the completion (N,)")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, "ppo")


# ------------------------------------------------------------------------------------------- estimators, side by side

# One made-up group: reward and tokens of each completion, and where the policy has moved since it was sampled.
GROUP = ((1.0, 6), (1.0, 16), (0.0, 10), (0.0, 20), (0.0, 14), (0.0, 20))
MOVED = {1: 1.5, 3: 0.6}  # ρ of these tokens, counted from 0, in each completion; of all others 1
LONGEST = 20  # --max_new_tokens
KNOWN_AT = 4  # from this token on the value model of PPO's panel, made up, expects what will come

# name: (forks of grpo.py, flags), as docs/grpo.md has them.
PLAIN = {"tis_cap": 0.0, "clip_high": 0.2}
ESTIMATORS = {
    "GRPO, as published": (["sequence_mean"], PLAIN | {"normalize_std": True}),
    "Dr. GRPO": (["dr_grpo"], PLAIN),
    "DAPO's loss": ([], PLAIN | {"normalize_std": True, "clip_high": 0.28}),
    "grpo.py's defaults (OLMo 3)": ([], {}),
    "GSPO": (["gspo", "sequence_mean"], {"normalize_std": True, "tis_cap": 0.0}),
    "CISPO": (["cispo"], {"normalize_std": True, "tis_cap": 0.0}),
    "RLOO": (["rloo", "dr_grpo"], PLAIN),
    "REINFORCE++ with baseline": (["reinforce_pp"], PLAIN),
    "PPO": (None, {"reward_scale": 1.0}),
}


def script_of(forks):
    """The module that `python forks/make.py FORKS` makes; grpo.py without forks, ppo_rlvr.py for None."""
    if not forks:
        return ppo_rlvr if forks is None else grpo
    module = sys.modules["made_for_figures"] = ModuleType("made_for_figures")
    exec(compile(make.make(forks), "made_for_figures", "exec"), module.__dict__)
    return module


def set_numbers(script, args, samples):
    """Advantages and loss weights, as `main` of the script sets them. samples: one group, which is the whole batch."""
    if script is ppo_rlvr:
        for sample in samples:
            known = np.arange(len(sample.old_logprobs)) >= KNOWN_AT
            sample.values = np.where(known, 0.8 * sample.reward + 0.1, 1 / 3)
            sample.ref_logprobs = sample.old_logprobs
            script.set_rewards(args, sample)
    script.set_advantages(args, samples)
    if hasattr(script, "whiten"):  # forks/reinforce_pp.py
        script.whiten(samples)
    script.set_loss_weights(args, samples)


def pulls(forks, flags):
    """How much each token of GROUP is pulled up by an estimator: minus the gradient of its loss by the token's log π.

    Returns [(N,), ...], one array for each completion.
    """
    script = script_of(forks)
    args = script.Args(max_new_tokens=LONGEST, **flags)
    samples = []
    for reward, length in GROUP:
        ids = np.arange(1 + length)  # one token of prompt
        numbers = {"behaviour_logprobs": np.zeros(length), "old_logprobs": np.zeros(length)}
        about = {"position": 0, "row": 0, "begun": 0, "ended": True, "text": "", "reward": reward, "verdict": None}
        samples.append(script.Sample(input_ids=ids, trained=ids > 0, **numbers, **about))
    set_numbers(script, args, samples)
    names = ["behaviour_logprobs", "advantages", "loss_weight", "old_logprobs"]
    microbatch = common.pack([sample.columns(*names) for sample in samples], "cpu", *names)
    moved = [math.log(MOVED.get(t, 1.0)) for _, length in GROUP for t in range(length)]
    logprobs = torch.zeros(len(microbatch.targets))
    logprobs[microbatch.trained] = torch.tensor(moved)
    logprobs.requires_grad_()
    losses, _ = script.policy_loss(args, logprobs, microbatch)
    (losses * microbatch.extras["loss_weight"]).sum().backward()
    pulled = -logprobs.grad[microbatch.trained].numpy()
    return np.split(pulled, np.cumsum([length for _, length in GROUP])[:-1])


def estimators():
    """Every estimator on the same group, as the pull on each token."""
    figure, grid = plt.subplots(3, 3, figsize=(11.5, 6.6), layout="constrained", sharex=True, sharey=True)
    for axes, (name, (forks, flags)) in zip(grid.flat, ESTIMATORS.items(), strict=True):
        cells = np.full((len(GROUP), LONGEST), np.nan)
        for i, pull in enumerate(pulls(forks, flags)):
            cells[i, : len(pull)] = 1000 * pull
        most = np.nanmax(np.abs(cells))
        axes.imshow(cells, cmap="RdBu", vmin=-1.3 * most, vmax=1.3 * most, aspect="auto")  # 1.3: no cell too dark
        for i, (_, length) in enumerate(GROUP):
            for t in sorted({*MOVED, length - 1}):
                axes.text(t, i, f"{cells[i, t] + 0.0:.0f}".replace("-0", "0"), ha="center", va="center", fontsize=8)
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_yticks(range(len(GROUP)), [f"r = {reward:g}" for reward, _ in GROUP], fontsize=9)
        axes.set_xticks([1, 3, 10, 19], ["1", "3", "10", "19"], fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("token of the completion", fontsize=9)
    save(figure, "estimators")


# ---------------------------------------------------------------------------------------------------------- kernels


def head():
    """The logits of a microbatch, to scale: all of them, a chunk of tokens, a piece of the vocabulary."""
    figure, axes = canvas(9.6, 3.3)
    width, height = 2.3, 2.0
    titles = ("all the logits", "forward: a chunk of tokens", "second backward: a piece of V")
    parts = ((0, 0, 1, 1), (0, 0.75, 1, 0.25), (0, 0, 0.25, 1))
    for x, title, (left, low, wide, high) in zip((0.7, 3.9, 7.1), titles, parts, strict=True):
        box(axes, x, 0.55, width, height, "", WHITE)
        box(axes, x + left * width, 0.55 + low * height, wide * width, high * height, "", LIGHT)
        axes.text(x + width / 2, 2.85, title, ha="center", va="center")
        axes.text(x + width / 2, 0.3, "V = 128,256", ha="center", va="center", fontsize=9)
        axes.text(x - 0.18, 0.55 + height / 2, "N = 16,384", ha="center", va="center", fontsize=9, rotation=90)
    gigabytes = 16_384 * 128_256 * 4 / 1e9
    axes.text(0.7 + width / 2, 1.55, f"{gigabytes:.1f} GB", ha="center", va="center")
    axes.text(3.9 + width / 2, 2.3, f"{gigabytes / 4:.1f} GB, then the next", ha="center", va="center", fontsize=9)
    axes.text(7.1 + width / 8, 1.55, f"{gigabytes / 4:.1f} GB,\nthen\nthe\nnext", ha="center", va="center", fontsize=9)
    save(figure, "head")


FIGURES = (sft, reward, preference, group, values, estimators, head)


def main():
    """Writes all of them."""
    with matplotlib.rc_context(STYLE):
        for figure in FIGURES:
            figure()


if __name__ == "__main__":
    main()
