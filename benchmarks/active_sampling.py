"""Active sampling: rounds a batch takes, and how often it stays short, by the share of groups without a signal.

    python benchmarks/active_sampling.py

Groups are coin flips here, nothing is sampled; what is counted is how `Rollouts.sample_batch` asks for them. "one for
one" asks for as many prompts as groups are missing, again and again, and drops what is left over at the end (nothing).
Each round waits for its own longest completion, so rounds are what a step's time is made of.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rewards.environment import Rollouts  # noqa: E402

BATCH, ROUNDS, STEPS = 64, 8, 2000


class Coin(NamedTuple):
    """What stands for a group's completions."""

    has_signal: bool
    is_judged: bool = True


def has_signal(group):
    return group[0].has_signal


class Coins(Rollouts):
    """Rollouts whose groups have a signal, or none, by chance."""

    def __init__(self, rng, without_signal):
        self.args = SimpleNamespace(batch_size=BATCH, out="")
        self.signals = []
        self.surplus = []
        self.recent = [0.0, 0.0]
        self.empty_steps = 0
        self.rng = rng
        self.without_signal = without_signal
        self.sampler = SimpleNamespace(release=lambda: None)

    def sample(self, step, missing):
        return [[Coin(flip)] for flip in self.rng.random(missing) >= self.without_signal]

    def _say_what_is_missing(self, *_):
        pass


def one_for_one(rng, without_signal):
    """(groups, prompts, rounds) of each step."""
    steps = []
    for _ in range(STEPS):
        groups = prompts = rounds = 0
        while groups < BATCH and rounds < ROUNDS:
            prompts += BATCH - groups
            groups += int((rng.random(BATCH - groups) >= without_signal).sum())
            rounds += 1
        steps.append((groups, prompts, rounds, 0))
    return np.array(steps)


def by_share(rng, without_signal):
    """(groups, prompts, rounds, groups left over) of each step, by Rollouts.sample_batch."""
    rollouts = Coins(rng, without_signal)
    steps = []
    for step in range(STEPS):
        groups, sampled = rollouts.sample_batch(step, has_signal, ROUNDS)
        steps.append((len(groups), len(sampled), rollouts.rounds, len(rollouts.surplus)))
    return np.array(steps)


def summary(steps):
    """{what: number} over all steps."""
    groups, prompts, rounds, surplus = steps.T
    return {
        "rounds": rounds.mean(),
        "rounds_most": int(rounds.max()),
        "short": (groups < BATCH).mean(),
        "groups": groups.mean(),
        "prompts": prompts.mean(),
        "surplus": surplus.mean(),
        "surplus_most": int(surplus.max()),
    }


def main():
    print(f"batch of {BATCH} groups, at most {ROUNDS} rounds, {STEPS} steps")
    print(f"{'no signal':10}{'':13}{'rounds (most)':16}{'short':>8}{'groups':>8}{'prompts':>9}{'left over (most)':>19}")
    for without_signal in (0.0, 0.3, 0.5, 0.7, 0.9):
        for name, play in (("one for one", one_for_one), ("by the share", by_share)):
            s = summary(play(np.random.default_rng(1), without_signal))
            print(
                f"{without_signal:<10}{name:13}{s['rounds']:6.2f} ({s['rounds_most']})      {s['short']:8.1%}"
                f"{s['groups']:8.1f}{s['prompts']:9.1f}{s['surplus']:12.1f} ({s['surplus_most']})"
            )


if __name__ == "__main__":
    main()
