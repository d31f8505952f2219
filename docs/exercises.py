"""Checks the exercises of docs/learn.md: whether what came out is what the lesson says.

    python docs/exercises.py 1 runs/ex1
    python docs/exercises.py 2 runs/ex2_small runs/ex2_large
    python docs/exercises.py 3 runs/ex3 runs/ex3_eval
    python docs/exercises.py 4 my_grpo.py

Prints what it finds, and ends with an error if that is not what is to be expected.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class NotYet(Exception):
    """What was found is not what the exercise is about."""


def metrics(run):
    """The rows of a run's metrics.jsonl."""
    path = Path(run, "metrics.jsonl")
    if not path.is_file():
        raise NotYet(f"there is no {path}: run the exercise's command first")
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_and_read(run):
    """1: the held-out reward has risen by more than its intervals, though the loss says nothing."""
    rows = metrics(run)
    held_out = [row for row in rows if "eval_reward" in row]
    before, after = held_out[0], held_out[-1]
    for row in (before, after):
        low, high = row["eval_reward_low"], row["eval_reward_high"]
        print(f"step {row['step']}: held-out reward {row['eval_reward']:.3f} [{low:.3f}, {high:.3f}]")
    losses = [row["loss"] for row in rows if "loss" in row]
    print(f"losses from {min(losses):.4f} to {max(losses):.4f}")
    if after["eval_reward_low"] <= before["eval_reward_high"]:
        raise NotYet("the intervals overlap: has the run finished?")


def dead_groups(small, large):
    """2: with two completions of a prompt far more groups are all equal than with sixteen."""
    dead = []
    for run in (small, large):
        row = metrics(run)[-1]
        size = json.loads(Path(run, "config.json").read_text())["args"]["group_size"]
        p = row["reward"]
        if_alike = p**size + (1 - p) ** size  # if every prompt were as hard as the others
        dead.append(row["zero_std_groups"])
        print(f"groups of {size}: {dead[-1]:.3f} equal; {if_alike:.3f} if all prompts were right {p:.2f} of the time")
    if dead[0] < dead[1] + 0.2:
        raise NotYet("the first run should have at least 0.2 more: is it that of the smaller groups?")


def fooled_reward(run, evaluation):
    """3: the reward that was asked for rises, and answers are no longer right."""
    rewards = [row["reward"] for row in metrics(run) if "reward" in row]
    [result] = json.loads(Path(evaluation, "results.json").read_text())["results"]
    right = result["pass@1"]["mean"]
    print(f"reward {rewards[0]:.3f} → {rewards[-1]:.3f}; right answers {right:.3f}")
    if rewards[-1] < rewards[0] + 0.1:
        raise NotYet("the reward has not risen by 0.1: train longer")
    if right > 0.2:
        raise NotYet("more than a fifth of the answers is right: it has not been fooled yet, train longer")


def leave_one_out(path):
    """4: set_advantages compares each completion with the mean of the others."""
    script = load(path)
    rng = np.random.default_rng(0)
    for size in (2, 4, 8):
        rewards = rng.random(size)
        group = [SimpleNamespace(reward=reward, ended=True) for reward in rewards]
        script.set_advantages(script.Args(), group)
        found = np.array([sample.advantages for sample in group])
        wanted = rewards - (rewards.sum() - rewards) / (size - 1)
        print(f"G = {size}: {np.abs(found - wanted).max():.1e} from r_i less the mean of the others")
        if not np.allclose(found, wanted, rtol=1e-9):
            raise NotYet(f"expected {wanted.round(3)}, found {found.round(3)}")


def load(path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or not Path(path).is_file():
        raise NotYet(f"there is no script {path}")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


CHECKS = {"1": run_and_read, "2": dead_groups, "3": fooled_reward, "4": leave_one_out}


def main(words):
    """The command line. Raises NotYet."""
    if not words or words[0] not in CHECKS:
        raise NotYet("say which exercise, 1 to 4, and what to check, as in docs/learn.md")
    CHECKS[words[0]](*words[1:])
    print("as expected")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except NotYet as error:
        sys.exit(f"error: {error}")
