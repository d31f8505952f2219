"""DUMP (arXiv 2504.09710): a curriculum over sources of data, more of where there is most to learn.

    score_k = mean of |A| over the last 300 completions of source k  +  √(2 ln(n + 1) / (n_k + 1))
    P(source of the next prompt is k) = softmax(score / τ)_k

n_k counts the completions of source k, and n all. |A| is large where the completions of a prompt differ: the source is
neither solved nor hopeless. The root explores: it is large for a source that was seldom drawn. A source is one of
--data; its rows come in a shuffled stream of its own. All groups that were sampled count, also those that teach
nothing. The equations, the window and τ are those of the authors' code (ZhentingWang/DUMP, curriculum_learning.py).

    python forks/make.py dump > my_grpo.py
    python my_grpo.py --data easy.jsonl hard.jsonl
"""

import copy
from dataclasses import dataclass

import numpy as np

import common
from rewards.environment import Rollouts, judged_only

BASE = "grpo.py"
# ruff: noqa: F821 (what is not defined here, the script defines)

LINES = {
    "rollouts = Rollouts(": "rollouts = CurriculumRollouts(",
    "samples = flatten(groups)": "rollouts.watch(sampled)\nsamples = flatten(groups)",
}


@dataclass
class Args:
    curriculum_window: int = 300  # completions of a source whose mean |A| counts
    curriculum_temperature: float = 0.1  # τ: the smaller, the more the best source is preferred


class CurriculumRollouts(Rollouts):
    """Rollouts of prompts from K sources. Position p of the stream is place p // K in the stream of source p % K."""

    def __init__(self, args, *others):
        super().__init__(args, *others)
        if args.reward_model:
            raise common.RunError("--reward_model: the curriculum knows the verifiers' rewards alone")
        self.source = np.array(self.rows.table["source"][:])  # (N,) of each row
        self.members = [np.flatnonzero(self.source == k) for k in range(len(self.rows.sources))]
        self.drawn = [0 for _ in self.members]  # prompts
        self.seen = [0 for _ in self.members]  # n_k
        self.windows = [[] for _ in self.members]  # the last |A|

    def probabilities(self):
        """(K,) of the sources; 0 for those whose rows are all solved."""
        means = np.array([np.mean(window) if window else 0.0 for window in self.windows])
        scores = means + np.sqrt(2 * np.log(sum(self.seen) + 1) / (np.array(self.seen) + 1))
        weights = np.exp((scores - scores.max()) / self.args.curriculum_temperature)
        weights *= [not self.solved.issuperset(rows.tolist()) for rows in self.members]
        return weights / max(weights.sum(), 1e-300)  # if all are solved, all are 0

    def watch(self, sampled):
        """Takes note of the advantages of all groups that a step has sampled."""
        for group in judged_only(sampled):
            set_advantages(self.args, group)
            k = self.source[group[0].row]
            self.seen[k] += len(group)
            window = self.windows[k] + [abs(float(sample.advantages)) for sample in group]
            self.windows[k] = window[-self.args.curriculum_window :]

    def counts(self):
        shares = {f"source_{k}": float(share) for k, share in enumerate(self.probabilities())}  # of the next prompts
        return super().counts() | shares

    def state_dict(self):
        return super().state_dict() | {"curriculum": copy.deepcopy([self.drawn, self.seen, self.windows])}

    def load_state_dicts(self, states):
        super().load_state_dicts(states)
        if states:
            self.drawn, self.seen, self.windows = states[0]["curriculum"]  # the same on all ranks

    def _draw(self, count):
        positions = []
        probabilities = self.probabilities()
        while len(positions) < count and len(self.solved) < len(self.rows):
            rng = np.random.default_rng([self.args.seed, sum(self.drawn)])
            k = int(rng.choice(len(self.members), p=probabilities))
            position = self.drawn[k] * len(self.members) + k
            self.drawn[k] += 1
            if self._row(position) not in self.solved:
                positions.append(position)
        return positions

    def _row(self, position):
        n, k = divmod(position, len(self.members))
        rows = self.members[k]
        return int(rows[common.stream(len(rows), self.args.seed, [n])[0]])
