"""`python -m rewards FILE...`: is every ground truth usable, and which rewards do the completions get?

A row has `dataset` and `ground_truth`, perhaps `weights`, as the published RLVR data; rows that have a `completion`, as
samples.jsonl of a run, are scored too.
"""

import math
import sys
from collections import Counter

from common import DataError, RunError, read_rows
from rewards.pool import Pool
from rewards.verifiers import REASONS, Verdict


def main(paths: list[str]):
    """Checks the ground truths of files, and scores their completions. Raises RunError for bad input."""
    with Pool() as pool:
        for path in paths:
            jobs = read_jobs(path, pool)
            print(f"{path}: {len(jobs)} ground truths")
            completed = [job for job in jobs if job[1] is not None]
            if completed:
                print(f"  {summary(pool.score(completed))}")


def read_jobs(path: str, pool: Pool) -> list[tuple]:
    """The jobs that the rows of a file are, checked; some without a completion. Raises DataError."""
    numbers = []
    jobs = []
    for number, row in read_rows(path):
        try:
            job = (row["dataset"], row.get("completion"), row["ground_truth"], row.get("weights"))
        except KeyError as missing:
            raise DataError(path, number, f"no field {missing}") from None
        numbers.append(number)
        jobs.append(job)
    for index, message in pool.check(jobs).items():
        raise DataError(path, numbers[index], message)
    return jobs


def summary(verdicts: list[Verdict]) -> str:
    """One line."""
    counts = Counter(verdict.reason for verdict in verdicts)
    mean = math.fsum(verdict.reward for verdict in verdicts) / len(verdicts)
    reasons = ", ".join(f"{counts[reason]} {reason}" for reason in REASONS if counts[reason])
    return f"{len(verdicts)} completions, mean reward {mean:.4f}: {reasons}"


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m rewards FILE...  Rows: `dataset`, `ground_truth`, perhaps `completion`")
    try:
        main(sys.argv[1:])
    except RunError as error:
        sys.exit(f"error: {error}")
