"""What verdicts cost: `python benchmarks/verifiers.py [FOLDER]`, which writes benchmarks/results/verifiers.json.

Ordinary answers: the reference solutions of MATH-500, if FOLDER has math500.jsonl, each against its own answer and
against the next problem's; otherwise as many fractions. Rates are verdicts per second of processor time, which other
work on the machine does not change much, and on the clock with all workers. Hostile answers: the corpus of the tests,
one at a time, so that the time on the clock of each is known (with all cores busy it grows: the limit is processor
time). Programs: 50 executions of each kind, on the clock.
"""

import json
import logging
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import hostile  # noqa: E402
from sft_vs_trl import environment  # noqa: E402

from rewards import Pool, judge, sandbox  # noqa: E402

SOURCES = ("rewards", "benchmarks/verifiers.py")


def problems(folder):
    file = Path(folder, "math500.jsonl")
    if not file.is_file():
        return [(rf"\boxed{{\frac{{{i}}}{{{i + 7}}}}}", rf"\frac{{{i}}}{{{i + 7}}}") for i in range(1, 501)]
    return [(row["solution"], row["answer"]) for row in map(json.loads, file.open())]


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def ordinary(pairs):
    """In this process, for the time of each; then by a pool, for false timeouts and the rate."""
    logging.disable()  # math-verify warns that nobody times it
    judge("math", r"\boxed{1}", "1")
    times = {}
    for name, shift in (("right", 0), ("wrong", 1)):
        times[name] = []
        for (solution, _), (_, answer) in zip(pairs, pairs[shift:] + pairs[:shift], strict=True):
            start = time.process_time()
            judge("math", solution, answer)
            times[name].append(time.process_time() - start)
    with Pool() as pool:
        jobs = [("math", solution, answer) for solution, answer in pairs]
        pool.score(jobs[:20])
        start = time.perf_counter()
        reasons = [verdict.reason for verdict in pool.score(jobs + jobs)]
        rate = len(reasons) / (time.perf_counter() - start)
        workers = len(pool.workers)
    quantiles = {name: statistics.quantiles(values, n=100) for name, values in times.items()}
    return {
        "verdicts per second and core, right": len(pairs) / sum(times["right"]),
        "verdicts per second and core, wrong": len(pairs) / sum(times["wrong"]),
        "milliseconds, median": {name: 1000 * q[49] for name, q in quantiles.items()},
        "milliseconds, 99 %": {name: 1000 * q[98] for name, q in quantiles.items()},
        f"verdicts per second by {workers} workers, right": rate,
        "false timeouts": reasons.count("timeout"),
    }


def hostile_texts():
    with Pool(1, max_failed=1.0) as pool:
        pool.score([("math", r"\boxed{1}", "1")])
        before, times, reasons = resident(), [], []
        for text in hostile.completions():
            start = time.perf_counter()
            reasons += [verdict.reason for verdict in pool.score([("math", text, "5")])]
            times.append(time.perf_counter() - start)
        right = pool.score([("math", rf"\boxed{{{i}}}", str(i)) for i in range(100)])
        return {
            "texts": len(times),
            "killed": reasons.count("timeout"),
            "crashed": reasons.count("crash"),
            "seconds, worst": max(times),
            "seconds, all": sum(times),
            "growth of the caller, MiB": resident() - before,
            "right of 100 right answers afterwards": sum(verdict.reward for verdict in right),
        }


def programs():
    run = [seconds(sandbox.run, "print(int(input()) + 1)", "1\n") for _ in range(50)]
    test = [seconds(sandbox.test, "def f(x): return x + 1", ["assert f(1) == 2"], ["f"]) for _ in range(50)]
    median = statistics.median
    return {"milliseconds, script": 1000 * median(run), "milliseconds, functions": 1000 * median(test)}


def main():
    results = {
        "ordinary answers": ordinary(problems(sys.argv[1] if len(sys.argv) > 1 else ".")),
        "hostile answers": hostile_texts(),
        "programs": programs(),
        "missing layers of the sandbox": sandbox.missing_layers(),
        "environment": environment("verifiers.py", *SOURCES, packages=("math-verify", "sympy")),
    }
    print(json.dumps(results, indent=2))
    out = ROOT / "benchmarks" / "results" / "verifiers.json"
    out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
