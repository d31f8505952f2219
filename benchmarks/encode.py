"""Rows a CPU second: `load_rows` with its checks, against `map` with `apply_chat_template(…assistant mask…)` alone.

    python benchmarks/encode.py [--rows 20000] [--rounds 3]

Conversations of OpenAssistant (../shared), repeated with a number in front, so that no two are the same. For each
template, both ways take turns in one process; the medians and the medians of the ratios go to results/encode.json. CPU
time of one process, since `map` divides among processes alike. A last line has 128k entries and 1,000 special tokens.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import datasets

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import TOKENIZERS  # noqa: E402
from test_chat import LLAMA3, QWEN3  # noqa: E402

import common  # noqa: E402

TEMPLATES = {"tulu": "tulu", "chatml": "chatml", "llama3": LLAMA3, "qwen3": QWEN3}


def make_tokenizer(folder, template, large):
    """The tests' byte-level tokenizer; `large`: with 128k entries and 1,000 reserved special tokens."""
    tokenizer = TOKENIZERS["byte_level"].__wrapped__()
    if large:
        settings = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary = settings["model"]["vocab"]
        first = max([*vocabulary.values(), *(entry["id"] for entry in settings["added_tokens"])]) + 1
        vocabulary |= {f"ĠÃ{i}": first + i for i in range(128_000 - first)}
        tokenizer.save_pretrained(folder)
        Path(folder, "tokenizer.json").write_text(json.dumps(settings))
        tokenizer = common.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([f"<|reserved_special_token_{i}|>" for i in range(1000)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    if "{" in template:
        Path(folder, "template.jinja").write_text(template)
        template = str(Path(folder, "template.jinja"))
    return common.load_tokenizer(folder, template)


def ours(path, chat):
    return len(common.load_rows([path], common.SftEncoder(chat, 10**6, 10**6, "drop")))


def plain(path, tokenizer):
    """What a script would write that checks nothing and keeps no account."""
    rows = datasets.load_dataset("json", data_files=path, split="train")

    def encode(row):
        encoded = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": encoded["input_ids"], "mask": encoded["assistant_masks"]}

    return len(rows.map(encode, remove_columns=rows.column_names))


def timed(function, *args):
    """Rows a second of CPU time, with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        started = time.process_time()
        rows = function(*args)
        return rows / (time.process_time() - started)


def main(args):
    common.os.cpu_count = lambda: 1  # one process
    threads = [json.loads(line) for line in open(ROOT.parent / "shared/data/chat/oasst_en_threads.jsonl")]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "rows.jsonl"))
        with open(path, "w") as file:
            for i in range(args.rows):
                messages = [dict(message) for message in threads[i % len(threads)]["messages"]]
                messages[0]["content"] = f"({i}) {messages[0]['content']}"
                file.write(json.dumps({"messages": messages}) + "\n")
        cases = [(name, text, False) for name, text in TEMPLATES.items()] + [("llama3 128k", LLAMA3, True)]
        for name, template, large in cases:
            tokenizer = make_tokenizer(Path(folder, name), template, large)
            started = time.process_time()
            chat = common.ChatFormat(tokenizer)
            start = time.process_time() - started
            pairs = [(timed(ours, path, chat), timed(plain, path, tokenizer)) for _ in range(args.rounds)]
            mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            results[name] = {"rows_per_cpu_second": mine, "plain": theirs, "ratio": ratio, "rounds": pairs}
            results[name]["start_seconds"] = start
            print(f"{name:12s} {mine:6.0f} {theirs:6.0f} ratio {ratio:.2f}  start {start:.1f} s")
    results["rows"] = args.rows
    (ROOT / "benchmarks/results/encode.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    main(parser.parse_args())
