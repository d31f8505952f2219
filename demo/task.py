"""The demo's task: two-digit additions, worked digit by digit by a teacher who makes a slip in three of five.

    37+58=   →   7+8=15,3+5+1=9#95          ones, tens with the carry, then the result after the marker #
                 7+8=12,3+5+1=9#92          a slip in the ones: everything after it follows from it

Three in five demonstrations have a slip, and a model trained on them imitates that too: sampled at temperature 1, it is
right less than half of the time. Yet at each step the right digit is likelier than any one wrong digit, so its greedy
answers are nearly all right. It knows more than it shows, and a stage that rewards right answers can bring that out.
"""

import json
import math
import random
from pathlib import Path

HELD_OUT = 1000  # problems that no training file contains, of 8100
SLIPS = 0.6  # share of demonstrations with a slip


def problems():
    """(training, held-out) problems, two lists of strings like "37+58=". The split is always the same."""
    every = [f"{a}+{b}=" for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(every)
    return every[HELD_OUT:], every[:HELD_OUT]


def demonstrate(problem, rng, slip):
    """The worked solution of a problem, with a slip in the ones or in the tens if `slip`."""
    a, b = map(int, problem.rstrip("=").split("+"))
    slip = rng.choice(("ones", "tens")) if slip else None
    ones = a % 10 + b % 10
    if slip == "ones":
        ones = rng.choice([n for n in range(19) if n != ones])
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    if slip == "tens":
        tens = rng.choice([n for n in range(2, 20) if n != tens])
    return f"{a % 10}+{b % 10}={ones},{a // 10}+{b // 10}+{carry}={tens}#{10 * tens + ones % 10}"


def write_demonstrations(path, problems, count, seed):
    """Writes `count` rows {"messages": [user, assistant]} as JSON lines, going round and round the problems."""
    rng = random.Random(seed)
    with open(path, "w") as file:
        for i in range(count):
            problem = problems[i % len(problems)]
            answer = demonstrate(problem, rng, slip=rng.random() < SLIPS)
            messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def write_prompts(path, problems):
    """Writes rows {"messages": [user], "dataset", "ground_truth"} for grpo.py. gsm8k: the last number has to be it."""
    with open(path, "w") as file:
        for problem in problems:
            a, b = map(int, problem.rstrip("=").split("+"))
            messages = [{"role": "user", "content": problem}]
            file.write(json.dumps({"messages": messages, "dataset": "gsm8k", "ground_truth": str(a + b)}) + "\n")


def lowest_loss(path):
    """Nats per trained token of a model that knows every sum and how often slips come, but not when: the best there is.

    Where slips are, 18 ones and 17 tens other than the right ones are equally likely.
    """
    entropy = -(1 - SLIPS) * math.log(1 - SLIPS) + SLIPS / 2 * sum(math.log(n / (SLIPS / 2)) for n in (18, 17))
    rows = [json.loads(line)["messages"] for line in Path(path).read_text().splitlines()]
    return entropy / (sum(len(answer["content"]) + 1 for _, answer in rows) / len(rows))  # + 1: the end token


def slip(problem, completion):
    """Where a completion first leaves the right working: the index of a character, or None if it nowhere does.

    The index is len(completion) where the completion ends too early.
    """
    working = demonstrate(problem, rng=None, slip=False)
    for i, (found, expected) in enumerate(zip(completion, working, strict=False)):
        if found != expected:
            return i
    return None if completion == working else min(len(completion), len(working))


def is_right(problem, completion):
    """Whether what follows the completion's last # is the sum. The working is not looked at."""
    a, b = map(int, problem.rstrip("=").split("+"))
    _, marker, answer = completion.rpartition("#")
    return marker == "#" and answer.strip() == str(a + b)
