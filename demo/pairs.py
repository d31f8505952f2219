"""Makes preference pairs from a model's own samples: a right completion, and a wrong one to the same problem.

    python demo/pairs.py --model runs/demo/sft/model --out runs/demo

    runs/demo/pairs.jsonl             rows {"prompt", "chosen", "rejected"} of the training problems
    runs/demo/held_out_pairs.jsonl    the same for problems that no training file contains

The model is asked each problem several times at temperature 1, and task.is_right judges. Nothing but the model's own
words is in the pairs, so what it prefers can change and what it knows need not.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import task
from evaluate import complete

logging.disable_progress_bar()  # a tiny model is read at once

BATCH = 2000  # completions in one call of generate(): more save no time and take memory


def sample(model, tokenizer, problems, samples):
    """[(problem, its right completions, its wrong completions), ...], `samples` completions a problem."""
    asked = [problem for problem in problems for _ in range(samples)]
    answers = {problem: ([], []) for problem in problems}
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        for problem, text in zip(batch, complete(model, tokenizer, batch, greedy=False), strict=True):
            right, wrong = answers[problem]
            (right if task.is_right(problem, text) else wrong).append(text)
    return [(problem, right, wrong) for problem, (right, wrong) in answers.items()]


def make_pairs(answers, noise, rng):
    """Rows {"prompt", "chosen", "rejected"}. A completion is in one pair at most; some are left over.

    Args:
        answers: what `sample` returns. noise: share of pairs that get the wrong completion as the chosen one.
    """
    rows = []
    for problem, rights, wrongs in answers:
        for pair in zip(rights, wrongs, strict=False):  # as many pairs as there are of the fewer
            chosen, rejected = reversed(pair) if rng.random() < noise else pair
            rows.append({"prompt": problem, "chosen": chosen, "rejected": rejected})
    return rows


def write_pairs(model, out, samples=4, noise=0.0, seed=1):
    """Writes pairs.jsonl and held_out_pairs.jsonl (which has no noise) to folder `out`. Returns their numbers of rows.

    Args:
        model: folder of the model to sample from. samples: completions a problem.
        noise: share of the training pairs whose labels are swapped; 0.5 leaves nothing to learn.
    """
    Path(out).mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    model = AutoModelForCausalLM.from_pretrained(model).eval()
    torch.manual_seed(seed)
    rng, counts = random.Random(seed), []
    train, held_out = task.problems()
    for name, problems, share in (("pairs", train, noise), ("held_out_pairs", held_out, 0.0)):
        rows = make_pairs(sample(model, tokenizer, problems, samples), share, rng)
        Path(out, f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        counts.append(len(rows))
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model to sample from")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--samples", type=int, default=4, help="completions a problem")
    parser.add_argument("--noise", type=float, default=0.0, help="share of training pairs with swapped labels")
    parser.add_argument("--seed", type=int, default=1, help="seed of the sampling and of the swaps")
    args = parser.parse_args()
    started = time.perf_counter()
    train, held_out = write_pairs(args.model, args.out, args.samples, args.noise, args.seed)
    print(f"{args.out}: {train} pairs, {held_out} held-out pairs, {time.perf_counter() - started:.0f} s")
