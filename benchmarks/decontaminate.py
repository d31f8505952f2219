"""Seconds and peak memory of pipeline.decontaminate: many training rows against the six benchmarks of ../shared.

    python benchmarks/decontaminate.py [--rows 100000]

The rows are conversations of OpenAssistant and questions of GSM8K's training split (../shared), in turn, repeated with
a number in front of the first turn, so that no two are the same. What is measured is the command, in a process of its
own: its seconds on the clock and of CPU time, and its peak of resident memory, which counts the pages of the file that
`datasets` maps; in the first call on a file, which fills the cache of `datasets`, and in the next. A call with a
hundredth of the rows shows what the start costs. Results go to results/decontaminate.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared/data"
TESTS = {
    "gsm8k": "gsm8k/test.jsonl",
    "math500": "math/math500.jsonl",
    "mbpp": "code/mbpp.jsonl",
    "humaneval": "code/humaneval.jsonl",
    "ifeval": "ifeval/input_data.jsonl",
    "aime24": "math/aime24.jsonl",
}


def rows_of(name):
    return [json.loads(line) for line in open(DATA / name, encoding="utf-8")]


def write_rows(path, count):
    """Writes so many rows. Returns the number of words that the users say in them."""
    chats = [row["messages"] for row in rows_of("chat/oasst_en_threads.jsonl")]
    questions = [row["question"] for row in rows_of("gsm8k/train.jsonl")]
    words = 0
    with open(path, "w") as file:
        for i in range(count):
            messages = [dict(message) for message in chats[i // 2 % len(chats)]]
            if i % 2:
                messages = [{"role": "user", "content": questions[i // 2 % len(questions)]}]
            messages[0]["content"] = f"({i}) {messages[0]['content']}"
            words += sum(len(message["content"].split()) for message in messages if message["role"] == "user")
            file.write(json.dumps({"messages": messages}) + "\n")
    return words


def measure(folder, source, name):
    """Seconds, CPU seconds and peak memory (MiB) of one call, and what it found."""
    tests = [f"{test}={DATA / file}" for test, file in TESTS.items()]
    command = [sys.executable, "-m", "pipeline.decontaminate", "--test", *tests, "--train", str(source)]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--out", str(folder / name)], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit("the command failed")
    matches = len((folder / name / "matches.tsv").read_text().splitlines()) - 1
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_mib": round(usage.ru_maxrss / 1024),
        "matches": matches,
    }


def main(args):
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        for count in (args.rows // 100, args.rows):
            source = folder / f"{count}.jsonl"
            words = write_rows(source, count)
            size = {"words_of_users": words, "file_mib": round(source.stat().st_size / 2**20, 1)}
            first, again = (measure(folder, source, f"{name}_{count}") for name in ("first", "again"))
            results[f"{count} rows"] = {**size, "first": first, "again": again}
            print(results[f"{count} rows"])
    prompts = sum(len(rows_of(file)) for file in TESTS.values())
    results["benchmarks"] = {"count": len(TESTS), "prompts": prompts}
    (ROOT / "benchmarks/results/decontaminate.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    main(parser.parse_args())
