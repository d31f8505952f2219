"""Bad data gets one clear error that names file, row and field, or is left out and counted; good data is read as it is;
and how sequences are mixed, dealt and packed loses nothing. Numbers in ids are rows of the table of bad inputs that
docs/design.md refers to (30 inputs, with what other libraries do on each)."""

import bz2
import gzip
import json
import lzma
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pytest
import tyro
from conftest import ROOT, SHARED, assistant, chat, seconds_of, tokenizer_folder, user, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import Fork, children

import common
from common import DataError, RunError, batch_indices, deal, load_rows, pack
from pipeline import look

VOCAB = 620


def encoder(template="tulu", max_length=200, overlong="truncate", vocab_size=VOCAB):
    tokenizer = common.load_tokenizer(tokenizer_folder("byte_level"), template)
    return common.SftEncoder(common.ChatFormat(tokenizer), vocab_size, max_length, overlong)


@pytest.fixture(scope="module")
def encode():
    return encoder()


class Letters:
    """A small encoder: `text` → one token a character, all trained on. Counts its calls; remembers nothing else."""

    features = {
        "input_ids": datasets.List(datasets.Value("int32")),
        "trained": datasets.List(datasets.Value("bool")),
    }
    key, calls = "letters", 0

    def __call__(self, row):
        self.calls += 1
        if row["letters"] == "bad":
            raise ValueError("letters is bad")
        if row["letters"] == "skip":
            raise common.Skip("told to")
        ids = [ord(letter) for letter in row["letters"]]
        return {"input_ids": ids, "trained": [True] * len(ids), "notes": []}


def letters(path, texts):
    return write_jsonl(path, [{"letters": text} for text in texts])


def texts_of(rows):
    return ["".join(map(chr, ids)) for ids, _ in rows.sequences(range(len(rows)))]


def refused(path, row, message, load):
    """`load()` has to raise a DataError of one line that names `path`, `row` and matches `message`."""
    with pytest.raises(DataError) as caught:
        load()
    text = str(caught.value)
    assert text.startswith(f"{path}, row {row}: " if row else f"{path}: "), text
    assert re.search(message, text), text
    assert "\n" not in text and len(text) < 500, text


# --------------------------------------------------------------------------------------------------------- bad rows

GOOD = chat()
SURROGATE = '{"messages": [{"role": "user", "content": "a\\ud800b"}, {"role": "assistant", "content": "c"}]}'
TOOLS = {"tools": [{"type": "function", "function": {"name": "f"}}]}
BAD_ROWS = {
    "1 column missing": ({"text": "a", "label": 1}, "no field 'messages'; the row has 'text', 'label'"),
    "2 key missing": (TOOLS, "no field 'messages'; the row has 'tools'"),
    "2 no keys": ({}, "no field 'messages'; the row has no fields"),
    "3 no messages": ({"messages": []}, "messages is empty"),
    "3 messages null": ({"messages": None}, "messages is null, expected a list"),
    "4 answer null": ({"messages": [user("a"), assistant(None)]}, r"messages\[1\].content is null"),
    "4 question null": ({"messages": [user(None), assistant("a")]}, r"messages\[0\].content is null"),
    "4 content missing": ({"messages": [{"role": "user"}, assistant("a")]}, r"messages\[0\].content is missing"),
    "8 no assistant turn": ({"messages": [user("a")]}, "messages has no assistant turn"),
    "9 unknown role": ({"messages": [{"role": "bot", "content": "a"}, assistant("b")]}, r"messages\[0\].role is 'bot'"),
    "9 no role": ({"messages": [{"content": "a"}, assistant("b")]}, r"messages\[0\].role is None"),
    "15 lone surrogate": (SURROGATE, r"surrogate '\\ud800'"),
    "17 malformed": ("{'messages': []}", "column 2: not valid JSON"),
    "17 truncated": (json.dumps(GOOD)[:40], "column 41|column .*: not valid JSON"),
    "17 two objects in a line": (json.dumps(GOOD) * 2, "column .*: not valid JSON"),
    "17 endless nesting": ("[" * 100_000, "."),
    "17 endless number": ('{"messages": ' + "9" * 5000 + "}", "."),
    "18 messages a string": ({"messages": "Hi"}, "messages is a string, expected a list"),
    "18 messages an object": ({"messages": user("a")}, "messages is an object, expected a list"),
    "18 message a string": ({"messages": ["Hi", "Ho"]}, r"messages\[0\] is a string"),
    "18 message null": ({"messages": [user("a"), None]}, r"messages\[1\] is null"),
    "18 a part not of text": (
        {"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}]), assistant("b")]},
        r"messages\[0\].content\[0\] is of type 'image_url'",
    ),
    "18 a part that is weighted": (
        {"messages": [user("a"), assistant([{"type": "text", "text": "a", "weight": 0}])]}, r"messages\[1\].content\[0\]",
    ),
    "18 content a number": ({"messages": [user("a"), assistant(5)]}, r"messages\[1\].content is a number"),
    "18 content a boolean": ({"messages": [user("a"), assistant(True)]}, r"messages\[1\].content is a boolean"),
    "18 row a list": ([GOOD], "expected an object, found a list"),
    "18 row a string": ('"Hi"', "expected an object, found a string"),
    "18 row null": ("null", "expected an object, found null"),
    "18 tools a string": (GOOD | {"tools": "[{"}, "tools, column 3: not valid JSON"),
    "18 tools a number": (GOOD | {"tools": 3}, "tools is a number, expected a list"),
    "18 tools of strings": (GOOD | {"tools": ["f"]}, "tools .*expected a list of JSON schemas"),
    "30 empty prompt": (chat(question=""), r"messages\[0\].content is empty"),
    "30 blank prompt": (chat(question=" \n\t"), r"messages\[0\].content is empty"),
    "30 noncharacter": (chat(question="a\ufdd0b"), "noncharacter"),
    "30 tools nobody renders": (GOOD | TOOLS, "tools"),
    "30 role nobody renders": ({"messages": [user("a"), {"role": "tool", "content": "b"}, assistant("c")]}, "role tool"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_by_file_row_and_field(name, encode, tmp_path):
    """One bad row after a good one and a blank line: the error has the row's number and says what is wrong with it."""
    bad, message = BAD_ROWS[name]
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, "", bad, GOOD])
    refused(path, 3, message, lambda: load_rows([path], encode))


def test_bytes_that_are_not_text_are_refused_by_row(encode, tmp_path):
    """17: invalid UTF-8 names row and column, in .jsonl and .json."""
    good = json.dumps(GOOD).encode()
    for name, content in (("a.jsonl", good + b"\n\xff" + good), ("a.json", b"[" + good + b",\n\xff" + good + b"]")):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, 2, "column 1: not valid UTF-8", lambda: load_rows([str(tmp_path / name)], encode))


@pytest.mark.parametrize("content", ["", "\n \n\n", "[]"])
def test_19_empty_data_is_refused(content, encode, tmp_path):
    """No rows at all, or blank lines only."""
    path = tmp_path / ("rows.json" if content == "[]" else "rows.jsonl")
    path.write_text(content)
    refused(path, None, "the data set is empty", lambda: load_rows([str(path)], encode))


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "missing.json", "missing.parquet", "folder.jsonl", "nonsense.parquet"]
)
def test_unreadable_files_are_refused(name, encode, tmp_path):
    """A file that is not there, is a folder, or is not what its name says."""
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "nonsense.parquet").write_text("PAR1 not really")
    refused(tmp_path / name, None, "no such file" if "missing" in name else ".",
            lambda: load_rows([str(tmp_path / name)], encode))  # fmt: skip


def test_5_empty_answers_are_skipped_and_counted(encode, tmp_path):
    """An empty answer is left out: counted with its reason and first row; too many stop the run; all of them too."""
    empty = chat(answer=" \n")
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, empty, *[GOOD] * 7, empty])
    rows = load_rows([path], encode, max_skip_frac=0.2)
    assert len(rows) == 8
    assert rows.report[0] == f"{path}: 10 rows read, 8 kept"
    assert rows.report[1].strip() == "2 skipped: an assistant turn is empty (first: row 2)"
    refused(path, 2, "turn is empty; 2 of 10 rows skipped, more than --max_skip_frac", lambda: load_rows([path], encode))
    path = write_jsonl(tmp_path / "all.jsonl", [empty, empty])
    refused(path, 1, "an assistant turn is empty; 0 of 2 rows usable", lambda: load_rows([path], encode, 0, 1.0))


def test_6_nothing_left_after_truncation_is_refused(encode, tmp_path):
    """Every answer lies beyond --max_length."""
    path = write_jsonl(tmp_path / "rows.jsonl", [chat(question="why " * 300)] * 3)
    refused(path, 1, "no trained token within --max_length; 0 of 3 rows usable .*3 ",
            lambda: load_rows([path], encode, max_skip_frac=1.0))  # fmt: skip


def test_7_a_row_without_trained_tokens_is_skipped_and_counted(encode, tmp_path):
    """One answer lies beyond --max_length: that row is left out and counted."""
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD] * 7 + [chat(question="why " * 300)])
    rows = load_rows([path], encode, max_skip_frac=0.2)
    assert len(rows) == 7
    assert any("1 skipped: no trained token within --max_length (first: row 8)" in line for line in rows.report)


def test_16_two_megabytes_in_a_row_are_cut_and_counted_in_seconds(encode, tmp_path):
    """A huge row is cut to --max_length, and counted."""
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, chat(answer="It is <5|>. " * 170_000)])
    started = time.perf_counter()
    rows = load_rows([path], encode)
    assert time.perf_counter() - started < 60
    assert rows.lengths.tolist()[1] == 200 and rows.trained.tolist()[1] > 150
    assert any("1 truncated to --max_length (first: row 2)" in line for line in rows.report)


def test_16_long_rows_can_be_dropped(tmp_path):
    """--overlong drop leaves long rows out, counts them, and does not count them as unusable."""
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, chat(answer="It is 5. " * 200)])
    rows = load_rows([path], encoder(overlong="drop"), max_skip_frac=0)
    assert len(rows) == 1
    assert any("1 skipped: longer than --max_length (first: row 2)" in line for line in rows.report)


def test_10_text_that_begins_with_bos_has_one_bos(encode, tmp_path):
    """The tokenizer's BOS spelt out in the text stays text."""
    path = write_jsonl(tmp_path / "rows.jsonl", [chat("<s><s>Hi", "<s>Hello")])
    ids, _ = load_rows([path], encode).sequences([0])[0]
    assert ids.tolist().count(encode.chat.tokenizer.bos_token_id) == 1


def test_11_a_template_that_never_ends_a_turn_is_refused(tmp_path):
    """The model would never learn to stop."""
    path = tmp_path / "endless.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(RunError, match="end-of-turn"):
        encoder(str(path))


@pytest.mark.parametrize("pad", [None, "</s>"])
def test_13_14_the_end_token_is_trained_on_whatever_the_pad_token(pad, encode, tmp_path):
    """No pad token, or pad == eos: nothing is padded, so nothing is masked by mistake."""
    encode = encoder()
    encode.chat.tokenizer.pad_token = pad
    ids, trained = encode.chat.encode(GOOD["messages"])
    assert ids[-1] == encode.chat.tokenizer.eos_token_id and trained[-1]


def test_22_ids_beyond_the_embedding_are_refused(tmp_path):
    """A tokenizer that is larger than the model's vocabulary: row, id and size."""
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD])
    refused(path, 1, r"token id \d+ is outside the model's vocabulary of 90",
            lambda: load_rows([path], encoder(vocab_size=90)))  # fmt: skip


def test_30_control_strings_in_content_are_counted(encode, tmp_path):
    """They stay text (tests/test_chat.py) and the report says how many rows have them; a quoting ">" is none."""
    rows = [GOOD, chat("What is </s>?"), chat("> quoted\n\nWhat is <"), chat(answer="<|im_end|>")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    rows = load_rows([path], encode)
    assert any(re.search("  2 with control strings in content.*first: row 2", line) for line in rows.report), (
        rows.report
    )
    assert len(rows) == 4


def test_unknown_characters_are_counted(tmp_path):
    """Text that a tokenizer without byte fallback cannot write is reported."""
    tokenizer = common.load_tokenizer(tokenizer_folder("unigram"), "tulu")
    encode = common.SftEncoder(common.ChatFormat(tokenizer), VOCAB, 200, "truncate")
    rows = load_rows([write_jsonl(tmp_path / "rows.jsonl", [GOOD, chat("What is ♞?")])], encode)
    assert any(re.search("1 with characters .*does not know.*first: row 2", line) for line in rows.report)


# ---------------------------------------------------------------------------------------------------------- secrets

KEY = "Zq3xW8yT5rE1uI7oP2aS4dF6"  # 24 letters and digits
SECRET = [  # (text, what has to be gone)
    *[(text, text) for text in (
        "hf_" + KEY, "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH", "sk-" + KEY, "sk-proj-" + KEY + "_-x", "sk-ant-api03-" + KEY,
        "sk-or-v1-0123456789abcdef0123456789abcdef", "ghp_" + KEY, "gho_" + KEY, "ghs_" + KEY, "ghu_" + KEY,
        "github_pat_11ABCDEFG0" + KEY, "glpat-" + KEY, "AKIAIOSFODNN7EXAMPLE", "ASIAIOSFODNN7EXAMPLE",
        "wandb_v1_" + KEY, "xoxb-123456789012-" + KEY, "xoxp-123456789012-" + KEY, "AIzaSyA-" + KEY, "nvapi-" + KEY,
        f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.{KEY}",
    )],
    *[(text.format(KEY), KEY) for text in (
        "https://x.org/d.jsonl?key={}", "https://x.org/d?a=1&api_key={}&b=2", "?token={}", "?access_token={}", "?sig={}",
        "https://s3.amazonaws.com/b/k?X-Amz-Signature={}&X-Amz-Expires=3", "X-Amz-Security-Token={}",
        "X-Amz-Credential={}%2F20260101%2Fus-east-1", "password={}", "PASSWD={}", "client_secret={}", "HF_TOKEN={}",
        "AWS_SECRET_ACCESS_KEY={}", "AccountName=a;AccountKey={}==;EndpointSuffix=core", "SharedAccessSignature=sv=1&sig={}",
        "Authorization: Bearer {}", "authorization: Basic {}==", "curl -H 'bearer {}'", "https://{}@github.com/o/r",
        "https://user:{}@host/x", "postgres://user:{}@h:5432/db", "mysql://u:p@{}@host", "redis://:{}@host",
        "x-access-token:x https://x-access-token:{}@github.com", "https%3A%2F%2Fuser:{}%40host", "url%3Ftoken%3D{}",
    )],
]  # fmt: skip
ORDINARY = [
    "runs/task-risk-100", "disk-cache", "sk-learn-data", "scikit-learn/sk-digits", "monkey=banana", "max_tokens=2048",
    "<think>", "</think>", "owner/name@train[:10%]", "allenai/tulu-3-sft-mixture", "meta-llama/Llama-3.1-8B-Instruct",
    "2fb8e80c1d2e3f4a5b6c7d8e9f0a1b2c3d4e5f60", r"C:\Users\me\data.jsonl", "hf_cache", "hf_datasets/train.jsonl",
    "hf://datasets/owner/name@main/x.parquet", "runs/ask-1234567890123456789012345", "tokenizer=llama", "--content_tokens",
    "https://huggingface.co/datasets/o/n@main", "rows.jsonl:0.5", "me@example.org", "https://x.org/a?mail=me@example.org",
    "gs://bucket/data", "s3://bucket/a/b", "keyboard", "secretary: hired", "the bearer of news", "password", "design=5",
    "tokens per second=5", "key", "eos_token_id 5", "signature(f)", "sk-", "AKIA", "eyJ", "a:b@c", "10.0.0.1:8080",
]  # fmt: skip


@pytest.mark.parametrize("text, secret", SECRET)
def test_secrets_are_taken_out(text, secret):
    """As a value, a key, in lists and in the middle of a text; in errors, which land in logs; twice changes nothing."""
    clean = common.redact({"flag": [text, ("a " + text + " b", {text: 5})], "other": None, "number": 5.5})
    assert secret not in json.dumps(clean) and "[redacted]" in clean["flag"][0]
    assert clean["other"] is None and clean["number"] == 5.5 and common.redact(clean) == clean
    for error in (RunError(f"model {text}: no"), DataError(text, 5, "no"), DataError("rows.jsonl", None, text)):
        assert secret not in str(error) and "no" in str(error).replace("rows", "no")


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays(text):
    assert common.redact([text, f"a {text} b", {text: text}]) == [text, f"a {text} b", {text: text}]


def test_what_is_no_secret_in_a_url_stays():
    url = "https://user:pw12@host.org/data.jsonl?version=2&token=abc&page=3"
    assert common.redact(url) == "https://[redacted]@host.org/data.jsonl?version=2&token=[redacted]&page=3"


@pytest.mark.parametrize("part", ["a", "eyJ-", "eyJa.b", "sk-", "sk-a", "key=", "%3A%2F%2F", "a://", "bearer ", "x://a@", "hf_",
                                  "authorization: ", "apikey", "a@", " "])  # fmt: skip
def test_long_text_is_searched_in_time_that_grows_with_its_length(part):
    """No pattern is quadratic in any of its own beginnings (CPU time, so that other programs do not matter)."""
    text = "https://" + part * (200_000 // len(part))
    assert seconds_of(lambda: common.redact(text), enough=5) < 5  # a megabyte took 0.1 to 2.7 s


# --------------------------------------------------------------------------------------------------------- warnings


def test_mostly_cut_rows_are_a_warning_behind_the_report(tmp_path, capsys):
    """More than half of a source's rows: one line, after all counts, that says what to do; not at a half or less."""
    long, short = chat(answer="5 " * 300), GOOD
    paths = [write_jsonl(tmp_path / name, rows) for name, rows in (("a.jsonl", [long] * 3 + [short] * 2),
                                                                   ("b.jsonl", [long, short]), ("c.jsonl", [long]))]  # fmt: skip
    args = SimpleNamespace(data=paths[:2], eval_data=paths[2:], seed=0, max_skip_frac=0, batch_size=1, best=None)
    common.load_data(args, encoder(), at_least=1)
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if line.startswith("WARNING")]
    remedy = "rows are cut at --max_length: raise it, or leave them out with --overlong drop"
    assert warnings == [f"WARNING {paths[0]}: 3 of 5 {remedy}", f"WARNING {paths[2]}: 1 of 1 {remedy}"]
    assert lines[-2:] == warnings  # behind the examples, which may be long
    look.print_account(load_rows(paths, encoder()))
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")] == warnings


def test_held_out_data_without_a_usable_row_is_refused_by_name(tmp_path):
    """Nothing would be measured."""
    paths = [write_jsonl(tmp_path / "a.jsonl", [GOOD]), write_jsonl(tmp_path / "b.jsonl", [chat(answer="5 " * 300)])]
    args = SimpleNamespace(data=paths[:1], eval_data=paths[1:], seed=0, max_skip_frac=1.0, batch_size=1, best=None)
    load = lambda: common.load_data(args, encoder(overlong="drop"), at_least=1)  # noqa: E731
    refused(paths[1], 1, "longer than --max_length; 0 of 1 rows usable", load)


# ------------------------------------------------------------------------------------------------ the script's errors


def run_sft(*flags, **environment):
    return Fork(["sft.py", *map(str, flags)], environment)


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """Runs of sft.py with one thing wrong each, all started at once: {name: process}."""
    tmp_path = tmp_path_factory.mktemp("runs")
    no_template = tmp_path / "no_template"
    shutil.copytree(tiny_model, no_template)
    (no_template / "chat_template.jinja").unlink()
    good = write_jsonl(tmp_path / "good.jsonl", [GOOD] * 3)
    bad = write_jsonl(tmp_path / "rows.jsonl", [GOOD, '{"messages"', GOOD])
    flags = ["--max_length", 100, "--out", tmp_path / "out", "--model"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        world = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    odd = [*flags, tiny_model, "--data", "missing.jsonl", "--batch_size", 3]
    processes = {
        "12 no chat template": run_sft(*flags, no_template, "--data", good),
        "17 malformed": run_sft(*flags, tiny_model, "--data", bad),
        "20 fewer rows than a batch": run_sft(*flags, tiny_model, "--data", good, "--batch_size", 4),
        "21 batch and processes, rank 0": run_sft(*odd, RANK="0", **world),
        "21 batch and processes, rank 1": run_sft(*odd, RANK="1", **world),
        "wrong flag": run_sft(*flags, tiny_model, "--data", good, "--warmup", 1),
        "other libraries' flag": run_sft(*flags, tiny_model, "--data", good, "--learning_rate", 1),
    }
    yield processes
    for process in processes.values():
        process.send_signal(signal.SIGKILL)


SCRIPT_ERRORS = {
    "12 no chat template": "no chat template.*--chat_template",
    "17 malformed": r"rows.jsonl, row 2: column \d+: not valid JSON",
    "20 fewer rows than a batch": "3 usable rows, fewer than --batch_size 4",
    "21 batch and processes, rank 0": "--batch_size 3 is not divisible by the 2 processes",
    "21 batch and processes, rank 1": None,  # rank 0 has said it
    "other libraries' flag": "--learning_rate is called --lr here",
}


@pytest.mark.parametrize("name", SCRIPT_ERRORS)
def test_script_errors_are_one_line(name, runs):
    """sft.py prints one line that begins with `error:`, no traceback, and exits with 1."""
    _, stderr = runs[name].communicate(timeout=180)
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert runs[name].returncode == 1, stderr
    if SCRIPT_ERRORS[name] is None:  # rank 0 may be gone before it has joined it, of which gloo says much
        assert errors == []
        return
    assert len(errors) == 1 and "Traceback" not in stderr, stderr
    assert re.search(SCRIPT_ERRORS[name], errors[0]), errors[0]


def test_a_wrong_flag_exits_with_2(runs):
    """The script's exit code tells a usage error from an error of the run."""
    _, stderr = runs["wrong flag"].communicate(timeout=180)
    assert runs["wrong flag"].returncode == 2 and "--warmup" in stderr and "Traceback" not in stderr, stderr


@pytest.mark.parametrize("flags", [["--overlong", "cut"], ["--batch_size", "1.5"], ["--lr"], ["--no_such_flag", "1"]])
def test_wrong_flags_are_refused(flags, capsys):
    """Wrong choice, wrong type, missing value, unknown flag."""
    sft = pytest.importorskip("sft")
    good = ["--model", "m", "--data", "d", "--out", "o"]
    assert tyro.cli(sft.Args, args=good, use_underscores=True).data == ["d"]
    with pytest.raises(SystemExit) as caught:
        tyro.cli(sft.Args, args=good + flags, use_underscores=True)
    assert caught.value.code == 2


# ---------------------------------------------------------------------------------------------- sources and amounts

TEN = [f"row {i}" for i in range(1, 11)]


@pytest.mark.parametrize("amount, count", [("", 10), (":0.5", 5), (":.3", 3), (":1.", 10), (":2.0", 20), (":1.5", 15),
                                           (":1", 1), (":7", 7), (":10", 10), (":23", 23)])  # fmt: skip
def test_amounts(amount, count, tmp_path):
    """A fraction has a point, a count has none; no row is taken once more before every row was; numbers stay true."""
    path = letters(tmp_path / "ten.jsonl", TEN)
    rows = load_rows([path + amount], Letters(), seed=3)
    taken = texts_of(rows)
    times = [taken.count(text) for text in TEN]
    assert len(taken) == count and max(times) - min(times) <= 1
    assert [f"row {entry['row']}" for entry in rows.table] == taken
    assert [rows.where(i) for i in range(len(rows))] == [f"{path}, {text}" for text in taken]
    if count == 10:
        assert taken == TEN  # all of them, once: in file order


def test_row_numbers_of_errors_and_skips_hold_with_an_amount(tmp_path):
    """Which row is bad does not depend on which rows are taken."""
    for bad in (1, 4, 10):
        texts = [*TEN[: bad - 1], "bad", *TEN[bad:]]
        path = letters(tmp_path / f"bad{bad}.jsonl", texts)
        refused(path, bad, "letters is bad", lambda: load_rows([path + ":25"], Letters()))
        path = letters(tmp_path / f"skip{bad}.jsonl", [*TEN[: bad - 1], "skip", *TEN[bad:]])
        rows = load_rows([path + ":2.0"], Letters(), max_skip_frac=0.1)
        assert any(f"1 skipped: told to (first: row {bad})" in line for line in rows.report), rows.report
        assert sorted(texts_of(rows)) == sorted(2 * [text for text in TEN if text != f"row {bad}"])


def test_amounts_depend_on_the_seed_alone(tmp_path):
    """The same seed takes the same rows, another seed others; a second source does not change the first."""
    a, b = letters(tmp_path / "a.jsonl", TEN), letters(tmp_path / "b.jsonl", [text.upper() for text in TEN])
    first = load_rows([a + ":5", b + ":0.5"], Letters(), seed=1)
    again = load_rows([a + ":5", b + ":0.5"], Letters(), seed=1)
    assert texts_of(first) == texts_of(again) and first.fingerprint == again.fingerprint
    assert {entry["source"] for entry in first.table} == {0, 1} and first.sources == [a, b]
    assert texts_of(load_rows([a + ":5"], Letters(), seed=1)) == texts_of(first)[:5]
    other = load_rows([a + ":5", b + ":0.5"], Letters(), seed=2)
    assert texts_of(other) != texts_of(first) and other.fingerprint != first.fingerprint


def test_the_same_rows_from_two_sources_are_chosen_apart(tmp_path):
    """Two sources of equal size do not both give their first, say, rows 2 and 7."""
    a, b = letters(tmp_path / "a.jsonl", TEN), letters(tmp_path / "b.jsonl", TEN)
    chosen = texts_of(load_rows([a + ":5", b + ":5"], Letters()))
    assert chosen[:5] != chosen[5:]


@pytest.mark.parametrize("amount", ["0", "0.0", "0.01"])
def test_amounts_of_nothing_are_refused(amount, tmp_path):
    """An amount that selects no row."""
    path = letters(tmp_path / "ten.jsonl", TEN)
    refused(f"{path}:{amount}", None, "selects none of the 10 rows", lambda: load_rows([f"{path}:{amount}"], Letters()))


@pytest.mark.parametrize("spec", ["", "rows.jsonl:half", "rows.jsonl:-1", "rows.jsonl:1e3", "rows.jsonl:", ":3"])
def test_specs_that_cannot_be_read_are_refused(spec, tmp_path, monkeypatch):
    """A misspelt amount is named in the error, not silently taken for all rows."""
    monkeypatch.chdir(tmp_path)
    letters("rows.jsonl", TEN)
    with pytest.raises(DataError, match=re.escape(spec) or "empty") as caught:
        load_rows([spec], Letters())
    assert "\n" not in str(caught.value)


def test_an_amount_counts_rows_not_blank_lines(tmp_path):
    """ROWS:10 of a file with ten rows between blank lines is all ten."""
    path = write_jsonl(tmp_path / "rows.jsonl", [line for text in TEN for line in ({"letters": text}, "")])
    assert sorted(texts_of(load_rows([path + ":10"], Letters()))) == sorted(TEN)
    assert len(load_rows([path + ":0.5"], Letters())) == 5


# --------------------------------------------------------------------------------------------------------- formats

MANY = [
    {"messages": [{"role": "system", "content": ""}, user("a\u2028b\x85c\x0b\x1cd"), assistant("naïve 你好\r\n😀")]},
    {"messages": [user("a"), assistant("b"), user("c"), assistant("d")], "source": "x", "score": 0.5},
    {"messages": [user(" ### "), assistant("\tcode  \n\n")], "tools": None},
]
CALL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"city": {"type": "string"}}}}}
CALLS = [
    {"messages": [user("a"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": {"city": "Paris"}}}])],
     "tools": [CALL]},
    {"messages": [user("a"), assistant("", tool_calls=[{"function": {"name": "g", "arguments": {"days": 3}}}])],
     "tools": [{"type": "function", "function": {"name": "g", "description": "Counts."}}]},
]  # fmt: skip


def encoded(path, encode):
    rows = load_rows([str(path)], encode)
    return [(ids.tolist(), trained.tolist()) for ids, trained in rows.sequences(range(len(rows)))]


def expected(rows, encode):
    return [(out["input_ids"], out["trained"]) for out in map(encode, rows)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "windows.jsonl", "blank.jsonl", "a [1]*.jsonl",
                                  "ASCII.jsonl", "no_end.jsonl"])  # fmt: skip
def test_every_format_holds_the_same_rows(name, encode, tmp_path):
    """JSON Lines (also with Windows line ends, blank lines, escapes, no last line end), a JSON list, Parquet."""
    path, lines = tmp_path / name, [json.dumps(row, ensure_ascii=name == "ASCII.jsonl") for row in MANY]
    if name == "rows.parquet":
        datasets.Dataset.from_list(MANY).to_parquet(path)
    elif name == "rows.json":
        path.write_text(json.dumps(MANY, indent=1))
    else:
        end = {"windows.jsonl": "\r\n", "blank.jsonl": "\n \n\t\n"}.get(name, "\n")
        path.write_bytes((end.join(lines) + end * (name != "no_end.jsonl")).encode())
    assert encoded(path, encode) == expected(MANY, encode)


def test_parquet_adds_nothing_to_tool_calls(tmp_path):
    """A column has one type: arguments that other rows have come back as null, and must not be rendered."""
    encode = encoder("chatml", max_length=1000)
    datasets.Dataset.from_list(CALLS).to_parquet(tmp_path / "rows.parquet")
    assert encoded(write_jsonl(tmp_path / "rows.jsonl", CALLS), encode) == expected(CALLS, encode)
    assert encoded(tmp_path / "rows.parquet", encode) == expected(CALLS, encode)


def test_an_explicit_null_argument_stays(tmp_path):
    """In JSON a null that was written is a value."""
    row = {"messages": [user("a"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": {"x": None}}}])]}
    rows = load_rows([write_jsonl(tmp_path / "rows.jsonl", [row])], encode := encoder("chatml"))
    assert '{"x": null}' in encode.chat.tokenizer.decode(rows.sequences([0])[0][0])


def test_parquet_columns_that_json_cannot_hold(encode, tmp_path):
    """Dates and bytes beside role and content (WildChat has them) do no harm."""
    stamp = {"timestamp": np.datetime64("2024-01-01", "ms").item(), "hash": b"\xff"}
    rows = [{"messages": [message | stamp for message in GOOD["messages"]]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert encoded(tmp_path / "rows.parquet", encode) == expected([GOOD], encode)


@pytest.mark.parametrize("column", [["plain text"], [json.dumps(GOOD)], [3], [None]])
def test_1_parquet_with_a_text_column_only(column, encode, tmp_path):
    """A column named `text` is a column like any other: `messages` is missing."""
    datasets.Dataset.from_dict({"text": column}).to_parquet(tmp_path / "rows.parquet")
    path = str(tmp_path / "rows.parquet")
    refused(path, 1, "no field 'messages'", lambda: load_rows([path], encode))


def test_bad_json_files_are_refused(encode, tmp_path):
    """Not a list, not JSON (with line and column), or a bad row in the list."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": [GOOD]}))
    refused(path, None, "expected a JSON list of rows, found an object", lambda: load_rows([str(path)], encode))
    path.write_text(f"[{json.dumps(GOOD)},\n {json.dumps(GOOD)}\n {json.dumps(GOOD)}]")
    refused(path, 3, "column 2: not valid JSON", lambda: load_rows([str(path)], encode))
    path.write_text("[" * 100_000)
    refused(path, None, ".", lambda: load_rows([str(path)], encode))
    path.write_text(json.dumps([GOOD, {"messages": []}]))
    refused(path, 2, "messages is empty", lambda: load_rows([str(path)], encode))
    path.write_text(f"[{json.dumps(GOOD)}, {SURROGATE}]")
    refused(path, 2, "surrogate", lambda: load_rows([str(path)], encode))


@pytest.mark.parametrize(
    "source, expected",
    [
        ("name", ("name", None, "train")),
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name@test", ("owner/name", None, "test")),
        ("owner/name/config@test[:10%]", ("owner/name", "config", "test[:10%]")),
        ("owner/name@train:0.5", ("owner/name", None, "train")),
        ("owner/name:3", ("owner/name", None, "train")),
    ],
)
def test_hub_ids(source, expected, monkeypatch):
    """name, owner/name, @split, /config, with or without an amount."""
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"letters": TEN})

    monkeypatch.setattr(common.datasets, "load_dataset", load_dataset)
    rows = load_rows([source], Letters())
    assert asked == [expected]
    assert len(rows) == {"0.5": 5, "3": 3}.get(source.partition(":")[2], 10)
    assert rows.where(0).startswith(expected[0])


@pytest.mark.parametrize("opener", [gzip.open, bz2.open, lzma.open], ids=["gz", "bz2", "xz"])
def test_compressed_lines_are_read_with_their_numbers(opener, tmp_path):
    """As `datasets` unpacks them; after an edit that keeps the file's time, anew."""
    path = tmp_path / f"rows.jsonl.{ {gzip.open: 'gz', bz2.open: 'bz2', lzma.open: 'xz'}[opener] }"
    for last in ("bad", "new"):
        with opener(path, "wt") as file:
            file.write(f'{{"letters": "a"}}\n\n{{"letters": "{last}"}}\n')
        os.utime(path, (1, 1))
        rows = load_rows([str(path)], Letters(), max_skip_frac=1)
        if last == "bad":
            assert rows.report[1].strip() == "1 skipped: letters is bad (first: row 3)"
    assert texts_of(rows) == ["a", "new"]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_byte_order_mark_is_read(kind, tmp_path):
    """Windows programs put one at the beginning; where such files were joined, there is one in the middle."""
    rows = ['{"letters": "a"}', '\ufeff{"letters": "b"}']
    text = "\n".join(rows) if kind == "jsonl" else f"[{rows[0]}]"
    (tmp_path / f"rows.{kind}").write_text("\ufeff" + text, encoding="utf-8")
    assert texts_of(load_rows([str(tmp_path / f"rows.{kind}")], Letters())) == ["a", "b"][: 1 + (kind == "jsonl")]


CARD = """---
configs:
- config_name: main
  data_files: [{split: train, path: data/train-*}, {split: test, path: data/test-*}]
  default: true
- config_name: other
  data_files: [{split: train, path: data/other-*}]
---
"""


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """A folder as `hf download --repo-type dataset --local-dir` makes it, three levels below the current one."""
    folder = tmp_path / "absdata" / "x" / "a y@2"
    (folder / "data").mkdir(parents=True)
    for split in ("train", "test", "other"):
        datasets.Dataset.from_dict({"letters": [split]}).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(CARD)
    lines = tmp_path / "absdata" / "lines"
    lines.mkdir()
    letters(lines / "train.jsonl", ["lines"])
    (tmp_path / "old").mkdir()  # with a loading script, of before datasets 4
    (tmp_path / "old" / "old.py").write_text("import datasets\n")
    (tmp_path / "json").mkdir()  # as a builder of `datasets` is called
    letters(tmp_path / "json" / "rows.jsonl", ["json"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "find_hub", lambda: pytest.fail("asks the Hub"))
    return folder


@pytest.mark.parametrize("source, text", [
    ("absdata/x/a y@2", "train"), ("absdata/x/a y@2@test", "test"), ("absdata/x/a y@2/other", "other"),
    ("absdata/x/a y@2/other@train", "other"), ("absdata/x/a y@2/", "train"),
    ("absdata/x/a y@2/data", "train"), ("absdata/lines", "lines"), ("absdata/lines@train", "lines"), ("json", "json"),
    ("absdata/lines:1", "lines"),
])  # fmt: skip
def test_folders_are_read_like_data_sets_of_the_hub(source, text, downloaded):
    """By a relative or an absolute path of any depth, with or without a split and a configuration of their card."""
    for path in (source, f"./{source}", f"../{Path.cwd().name}/{source}", f"{Path.cwd()}/{source}"):
        assert texts_of(load_rows([path], Letters())) == [text]


@pytest.mark.parametrize("source, message", [
    ("absdata/x/a y@2@dev", "cannot be read: Unknown split"),
    ("old", "cannot be read: Dataset scripts are no longer supported, but found old.py"),
    ("absdata/liness", "no such file or folder .the Hub is not asked: a folder absdata is here.; absdata has lines, x$"),
    ("absdata/x/y/z/rows", "no such file or folder .*; absdata/x has a "),
    ("rows.csv", "no such file or folder; . has "), ("absdata/lines/trian.jsonl", "; absdata/lines has train.jsonl$"),
    ("../y", "no such file or folder; .. has "), ("~/rows", "no such file or folder"), ("/no/such", "no such file or folder"),
    ("rows.jsonl@train", "no such file or folder"), ("rows.jsonl.gz", "no such file or folder"),
    ("s3://bucket/rows.jsonl", "no such file or folder"),
])  # fmt: skip
def test_what_looks_like_a_path_is_not_asked_of_the_hub(source, message, downloaded):
    """It names what the folder has by the names that are nearest."""
    refused(source, None, message, lambda: load_rows([source], Letters()))


@pytest.mark.parametrize("ending, mark", [("csv", ","), ("tsv", "\t")])
def test_tables_are_rows_of_text(encode, tmp_path, ending, mark):
    """Nothing is guessed: 007, NA and 1e3 are what was written; quotes hold commas, quotes and line breaks."""
    values = [("007", "NA"), ("a, \"b\"\tc", "two\nlines"), ("1e3", "True"), ("-", "é")]
    lines = ["prompt" + mark + "completion"] + [mark.join('"' + v.replace('"', '""') + '"' for v in row) for row in values]
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [row for _, row in common.read_rows(str(path))] == [{"prompt": a, "completion": b} for a, b in values]
    same = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": a, "completion": b} for a, b in values])
    ours, theirs = load_rows([str(path)], encode), load_rows([str(same)], encode)
    assert ours.fingerprint == theirs.fingerprint


@pytest.mark.parametrize("text, message", [
    ("a,b\n1,2\n1,2,3\n", "rows.csv, row 2: more values than the 2 columns: a value with a comma"),
    ("a,b\n1\n", "rows.csv, row 1: fewer values than the 2 columns"),
    ('a,b\n1,"2" 3\n', "rows.csv: line 2: .* a value with a quote has it twice"),
    ('a,b\n1,"2\n', "rows.csv: line 2: unexpected end of data"),
    ("a;b\n1;2\n", "rows.csv: one column, 'a;b': a comma has to stand between values"),
    ("", "rows.csv: the data set is empty"), ("a,b\n", "rows.csv: the data set is empty"),
])  # fmt: skip
def test_tables_that_are_none(encode, tmp_path, text, message):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_rows([str(path)], encode)


@pytest.mark.parametrize("name", ["rows.xlsx", "rows.json.gz", "rows.txt", "rows", "rows.arrow"])
def test_files_of_other_kinds_say_what_is_wanted(name, downloaded):
    """A file that is there never goes to the Hub."""
    Path(name).write_text("letters\na\n")
    refused(name, None, r"not a file of rows: \.jsonl.* \.json, \.parquet, \.csv or \.tsv", lambda: load_rows([name], Letters()))


def test_a_hub_that_cannot_be_reached_costs_seconds_and_two_lines(tmp_path):
    """Its client tries each file six times in half a minute, and says so in eleven lines (here: nothing listens)."""
    program = "import common, sys\ntry: common.load_rows(['owner/name'], None)\nexcept common.RunError as e: sys.exit(str(e))"
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    (warning,), (error,) = process.stdout.splitlines(), process.stderr.splitlines()
    assert warning.startswith("WARNING the Hub cannot be reached, only its cache is used: ")
    assert error.startswith("owner/name: neither the Hub nor its cache gave this data set: ")


@pytest.mark.parametrize("source", ["no-such-owner/no-such-data", "nothing", "a/b/c/d@e", "a b"])
def test_a_hub_data_set_that_cannot_be_had_is_refused(source, encode):
    """Without network (HF_HUB_OFFLINE is set), or with a name that cannot be one."""
    message = "neither the Hub nor its cache gave this data set: ."
    refused(source, None, message, lambda: load_rows([source], encode))
    refused(source, None, message, lambda: next(common.read_rows(source)))


class HubError(Exception):
    """As the HTTP client's are: neither an OSError nor a ValueError."""


@pytest.mark.parametrize(
    "error", [HubError("timed out\nat last"), HubError(), KeyError("train"), json.JSONDecodeError("x", "", 0)]
)
def test_whatever_the_hubs_libraries_raise_is_one_line(error, encode, monkeypatch):
    """The first line of the error, or its name where it says nothing."""

    def load_dataset(name, config, split):
        raise error

    monkeypatch.setattr(common.datasets, "load_dataset", load_dataset)
    why = re.escape(str(error).splitlines()[0] if str(error) else "HubError")
    refused("owner/name", None, f"gave this data set: {why}$", lambda: load_rows(["owner/name"], encode))


# ---------------------------------------------------------------------------------------------------------- the cache


@contextmanager
def another_user():
    """As somebody who is not root, whom no mode of a file stops."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def no_large_files():
    """Writing more than 1 kB fails with EFBIG, as on a full disk with ENOSPC."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def cache(monkeypatch):
    """An empty cache that everybody may reach, and a file of rows beside it."""
    folder = Path(tempfile.mkdtemp(prefix="postcard-cache-"))
    folder.chmod(0o755)
    (folder / "cache").mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    letters(folder / "rows.jsonl", [str(i) for i in range(3000)])
    yield folder / "cache"
    shutil.rmtree(folder)


def blamed(cache, load):
    """`load()` has to raise a RunError of one line that blames the cache, not the data, and says what to do."""
    with pytest.raises(RunError) as caught:
        load()
    text = str(caught.value)
    free = r"cannot be written, [\d,]+ bytes free: .+; HF_DATASETS_CACHE=DIR chooses another"
    assert re.fullmatch(f"cache folder {re.escape(str(cache))} {free}", text), text


def test_a_full_cache_is_not_the_datas_fault(cache):
    """Full while rows are read, and full while they are encoded."""
    load = lambda: load_rows([str(cache.parent / "rows.jsonl")], Letters())  # noqa: E731
    with no_large_files():
        blamed(cache, load)
    list(common.read_rows(str(cache.parent / "rows.jsonl")))  # now they are read
    with no_large_files():
        blamed(cache, load)
    assert len(load()) == 3000


def test_a_full_cache_is_named_by_a_worker_process(cache):
    """Rows that several processes encode."""
    path = letters(cache.parent / "many.jsonl", [str(i) for i in range(10_001)])
    list(common.read_rows(path))
    with no_large_files():
        blamed(cache, lambda: load_rows([path], Letters()))


def test_a_cache_of_somebody_elses_is_not_the_datas_fault(cache):
    """Read-only as a whole; and with a lock that another user has left."""
    load = lambda: load_rows([str(cache.parent / "rows.jsonl")], Letters())  # noqa: E731
    cache.chmod(0o555)
    with another_user():
        blamed(cache, load)
    cache.chmod(0o777)
    load()
    for lock in cache.glob("*.lock"):
        lock.chmod(0o000 if os.geteuid() else 0o600)
    with another_user():
        blamed(cache, load)


def test_a_cache_that_cannot_be_made(cache, monkeypatch):
    """Its place is a file."""
    (cache.parent / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache.parent / "file" / "cache")
    blamed(cache.parent / "file" / "cache", lambda: load_rows([str(cache.parent / "rows.jsonl")], Letters()))


def test_a_full_disk_while_a_data_set_is_downloaded(monkeypatch):
    """Files of the Hub have a cache of their own."""

    def load_dataset(name, config, split):
        full = OSError(28, "No space left on device", f"{huggingface_hub.constants.HF_HUB_CACHE}/x")
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from full

    monkeypatch.setattr(common.datasets, "load_dataset", load_dataset)
    with pytest.raises(RunError, match="^cache folder .* cannot be written, .*No space left.*; HF_HUB_CACHE=DIR"):
        load_rows(["owner/name"], Letters())


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), OSError("odd"), PermissionError(13, "no", "/x/y")])
def test_other_system_errors_while_encoding_name_the_source(error, tmp_path, monkeypatch):
    """An NFS server that is gone, no memory for another process."""
    path = letters(tmp_path / "ten.jsonl", TEN)
    monkeypatch.setattr(datasets.Dataset, "map", lambda *args, **settings: (_ for _ in ()).throw(error))
    refused(path, None, "cannot be encoded: ", lambda: load_rows([path], Letters()))


SLOW = """
import os, sys, time
sys.path[:0] = [{tests!r}, {root!r}]
import common, datasets
class Slow:
    features = {{"input_ids": datasets.List(datasets.Value("int32")), "trained": datasets.List(datasets.Value("bool"))}}
    key = "slow"
    def __call__(self, row):
        time.sleep(60)
if __name__ == "__main__":
    datasets.config.HF_DATASETS_CACHE = {cache!r}
    common.load_rows([{path!r}], Slow())
"""


def start_time(pid):
    """When a process began, for numbers of processes are used again; None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # no such file, or gone while it is read
        return None
    return None if fields[0] == "Z" else fields[19]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_that_encode_end_with_the_run(number, cache):
    """Else they wait for ever with the lock of the cache, on which the same command then waits, too."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one processor encodes alone")
    path = letters(cache.parent / "many.jsonl", [str(i) for i in range(20_000)])
    names = {"tests": str(ROOT / "tests"), "root": str(ROOT), "cache": str(cache), "path": path}
    (cache.parent / "slow.py").write_text(SLOW.format(**names))
    process = subprocess.Popen([sys.executable, cache.parent / "slow.py"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(children(process.pid)) < 3 and time.monotonic() < deadline:  # a manager and two workers
        time.sleep(0.1)
    time.sleep(1)
    found = {pid: started for pid in children(process.pid) if (started := start_time(pid))}
    process.send_signal(number)
    assert process.wait(timeout=60) == -number and len(found) >= 3
    deadline = time.monotonic() + 5
    while (left := [pid for pid, started in found.items() if start_time(pid) == started]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_encoded_rows_are_cached_until_something_changes(kind, tmp_path):
    """A second load (as on another rank) encodes nothing; other settings, or an edited file, are encoded anew."""
    path, encode = str(tmp_path / f"ten.{kind}"), Letters()

    def write(texts):
        data = datasets.Dataset.from_dict({"letters": texts})
        data.to_parquet(path) if kind == "parquet" else data.to_json(path, lines=kind == "jsonl")

    write(TEN)
    first = load_rows([path], encode)
    assert encode.calls == 10
    assert load_rows([path], encode).fingerprint == first.fingerprint
    assert encode.calls == 10
    encode.key = "other settings"
    load_rows([path], encode)
    assert encode.calls == 20
    write(TEN[:9] + ["new"])
    assert texts_of(load_rows([path], encode))[-1] == "new"


def test_an_edit_that_keeps_the_files_time_is_seen(tmp_path):
    """Restored backups, coarse clocks: the cache is keyed on what is in the file."""
    path = letters(tmp_path / "ten.jsonl", TEN)
    load_rows([path], Letters())
    before = os.stat(path)
    letters(path, TEN[:9] + ["row XX"])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert texts_of(load_rows([path], Letters()))[-1] == "row XX"


def test_max_length_and_template_encode_anew(tmp_path):
    """The cache knows the settings that decide about ids."""
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, chat(answer="It is 5. " * 50)])
    lengths = [load_rows([path], encoder(max_length=n)).lengths.tolist() for n in (60, 100, 60)]
    assert [max(row) for row in lengths] == [60, 100, 60]
    tulu, chatml = (load_rows([path], encoder(name)) for name in ("tulu", "chatml"))
    assert tulu.fingerprint != chatml.fingerprint
    assert load_rows([path], encoder("tulu")).fingerprint == tulu.fingerprint


def test_many_rows_are_encoded_by_several_processes(tmp_path):
    """10,001 rows: in order, and what a worker process finds wrong with a row arrives whole."""
    texts = [str(i) for i in range(1, 10_002)]
    assert texts_of(load_rows([letters(tmp_path / "many.jsonl", texts)], Letters())) == texts
    path = letters(tmp_path / "bad.jsonl", [*texts[:-1], "bad"])
    refused(path, 10_001, "letters is bad", lambda: load_rows([path], Letters(), max_skip_frac=0))
    rows = load_rows([path], Letters())  # one bad row in ten thousand ends nothing: it is left out and counted
    assert texts_of(rows) == texts[:-1]
    assert rows.report[1].strip() == "1 skipped: letters is bad (first: row 10001)"


def test_counts_are_those_of_the_packed_targets(encode, tmp_path):
    """`rows.trained` is the loss's denominator: exactly as many targets as `pack` makes."""
    rows = load_rows([write_jsonl(tmp_path / "rows.jsonl", [*MANY, GOOD, chat(answer="5 " * 300)])], encode)
    packed = pack(rows.sequences(range(len(rows))), "cpu")
    assert int((packed.targets != common.IGNORE).sum()) == rows.trained.sum()
    assert packed.cu_seqlens.diff().tolist() == rows.lengths.tolist()


# ---------------------------------------------------------------------------------------------------------------- fuzz


def fuzz_rows():
    """Real word problems as conversations (made-up ones where the data is missing), and one row with everything."""
    path = SHARED / "data" / "gsm8k" / "train.jsonl"
    if path.exists():
        with open(path) as lines:
            rows = [json.loads(next(lines)) for _ in range(20)]
    else:
        rows = [{"question": f"What is {i} + {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(20)]
    call = assistant("", tool_calls=[{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}])
    full = {"messages": [{"role": "system", "content": "é"}, user("x"), call, {"role": "tool", "content": "2"},
                         assistant("y", reasoning_content="z")], "tools": [CALL]}  # fmt: skip
    return [chat(row["question"], row["answer"]) for row in rows], full


VALUES = [None, True, 0, -1, 1e400, 10**30, "", "x", "assistant", [], {}, [None], ["x"], [[]], {"x": None}, "\ud800", "</s>",
          {"role": "user", "content": "x"}, [{"role": "assistant", "content": "x"}], "\ufdd0", "{", "[1]"]  # fmt: skip


def swap(value, rng):
    """`value` with one node, anywhere in it, replaced by something of another type, or with a key renamed or removed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        other = {k: v for k, v in value.items() if k != key}
        return rng.choice([other, other | {key + "s": value[key]}] + [value | {key: swap(value[key], rng)}] * 6)
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [*value[:at], *rng.choice([[], [value[at]] * 2] + [[swap(value[at], rng)]] * 6), *value[at + 1 :]]
    return rng.choice(VALUES)


def mutate(rows, rng):
    """The bytes of a file in which something went wrong."""
    if rng.random() < 0.5:
        at = rng.randrange(len(rows))
        rows = [*rows[:at], swap(rows[at], rng), *rows[at + 1 :]]
    content = bytearray("".join(json.dumps(row, ensure_ascii=rng.random() < 0.5 or "\\ud800" in json.dumps(row)) + "\n"
                                for row in rows).encode())  # fmt: skip
    for _ in range(rng.choice([0, 1, 1, 4])):
        start = rng.randrange(len(content) + 1)
        chunk = content[start : start + rng.randrange(1, 60)]
        kind = rng.choice(["flip", "delete", "duplicate", "cut", "insert"])
        if kind == "flip" and start < len(content):
            content[start] ^= 1 << rng.randrange(8)
        elif kind == "delete":
            del content[start : start + len(chunk)]
        elif kind == "duplicate":
            content[start:start] = chunk
        elif kind == "cut" and rng.random() < 0.3:
            del content[start:]
        elif kind == "insert":
            content[start:start] = rng.choice(
                [b"\0", b"\xff", b"\n", b"\r", b"\xef\xbb\xbf", b"\\", b'"', b"</s>", b"\xed\xa0\x80"]
            )
    return bytes(content)


@pytest.mark.parametrize("files", [250, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_files_raise_data_error_or_load(files, tmp_path):
    """Flipped bits, lost and repeated chunks, wrong types: a DataError of one line, or rows; never anything else."""
    rng, (plain, full) = random.Random(0), fuzz_rows()
    encoders = [encoder(name, max_length=150) for name in ("tulu", "chatml")]
    path, outcomes, started = tmp_path / "rows.jsonl", {"loaded": 0, "refused": 0}, time.perf_counter()
    for number in range(files):
        content = mutate(rng.sample(plain, 3) + [full] * (number % 2), rng)
        path.write_bytes(content)
        os.utime(path, ns=(0, number * 10**9))
        try:
            rows = load_rows([str(path)], encoders[number % 2], max_skip_frac=1.0)
            assert len(rows) and (rows.trained > 0).all() and (rows.lengths <= 150).all()
            outcomes["loaded"] += 1
        except DataError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error), (number, str(error))
            outcomes["refused"] += 1
        except Exception as error:
            pytest.fail(f"file {number}: {type(error).__name__}: {error}\n{content!r}")
    print(outcomes, f"{time.perf_counter() - started:.0f} s")
    assert min(outcomes.values()) > files / 10  # both kinds of outcome are common


# ------------------------------------------------------------------------------------------------- batches, packing

LENGTHS = st.lists(st.integers(1, 300), max_size=60)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(lengths=LENGTHS, budget=st.integers(1, 400), world=st.integers(1, 9))
def test_deal(lengths, budget, world):
    """Every sequence once, the same number of microbatches on each rank, within the budget, balanced."""
    ranks = deal(lengths, budget, world)
    assert len(ranks) == world and len({len(rank) for rank in ranks}) == 1 and len(ranks[0]) >= 1
    microbatches = [microbatch for rank in ranks for microbatch in rank]
    assert sorted(i for microbatch in microbatches for i in microbatch) == list(range(len(lengths)))
    tokens = [sum(lengths[i] for i in microbatch) for microbatch in microbatches]
    for microbatch, total in zip(microbatches, tokens, strict=True):
        assert total <= budget or len(microbatch) == 1
    assert max(tokens) - min(tokens) <= max(lengths, default=0)  # moving one sequence could not help
    assert deal(lengths, budget, world) == ranks


@settings(deadline=None, derandomize=True, max_examples=100)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60), world=st.integers(1, 4))
def test_deal_does_not_waste_microbatches(lengths, world):
    """No more than twice the microbatches that the tokens need, and one a sequence at most."""
    microbatches = len(deal(lengths, 200, world)[0])
    assert microbatches <= max(1, 2 * -(-sum(lengths) // (200 * world)))
    assert len(deal(lengths, 1, world)[0]) == -(-len(lengths) // world)


def test_ranks_get_about_as_many_tokens_each():
    """A batch of 128 sequences as long as Tülu's on 8 ranks: the busiest has at most 5 % more than the mean."""
    rng = np.random.default_rng(0)
    worst = 0
    for _ in range(20):
        lengths = np.clip(rng.lognormal(6, 0.8, 128).astype(int), 20, 4096)
        tokens = [sum(lengths[sum(rank, [])]) for rank in deal(lengths, 8192, 8)]
        worst = max(worst, max(tokens) / np.mean(tokens))
    print(f"tokens: max/mean over ranks {worst:.3f}")
    assert worst < 1.05


def seconds_to_deal(lengths):
    started = time.perf_counter()
    ranks = deal(lengths, 8192, 8)
    seconds = time.perf_counter() - started
    print(f"{len(lengths)} sequences: {seconds:.1f} s, {len(ranks[0])} microbatches on each of 8 ranks")
    assert sum(len(microbatch) for rank in ranks for microbatch in rank) == len(lengths)
    return seconds


def test_a_million_sequences_are_dealt_in_seconds():
    """All of a large data set at once, as for a held-out loss; the bound is there to notice a hang."""
    lengths = np.random.default_rng(0).lognormal(6, 1, 1_000_000).astype(int)
    assert seconds_to_deal(np.clip(lengths, 1, 8192)) < 60


@pytest.mark.parametrize("length", [4097, 2731])
def test_lengths_that_fit_badly_are_dealt_in_seconds(length):
    """Just over a half, or a third, of the budget: many more microbatches than tokens divided by the budget."""
    assert seconds_to_deal(np.full(50_000, length)) < 8


@settings(deadline=None, derandomize=True, max_examples=100)
@given(rows=st.integers(1, 50), batch=st.integers(1, 20), epochs=st.integers(1, 4), seed=st.integers(0, 9))
def test_batches_are_epochs_of_permutations(rows, batch, epochs, seed):
    """The batches of a run, end to end, are one permutation of the rows after another; the last is what remains."""
    total = epochs * rows
    steps = [batch_indices(rows, batch, seed, step, total) for step in range(-(-total // batch))]
    assert [len(step) for step in steps[:-1]] == [batch] * (len(steps) - 1)
    assert len(steps[-1]) == (total - 1) % batch + 1
    stream = np.concatenate(steps).reshape(epochs, rows)
    assert (np.sort(stream, axis=1) == np.arange(rows)).all()
    again = [batch_indices(rows, batch, seed, step, total) for step in reversed(range(len(steps)))]
    assert all((a == b).all() for a, b in zip(steps, reversed(again), strict=True))  # whatever was asked before


def test_batches_depend_on_seed_and_epoch():
    """Another seed is another order, and so is another epoch; a part of an epoch is its beginning."""
    order = [batch_indices(100, 100, seed, step, 250).tolist() for seed in (0, 1) for step in range(3)]
    assert len({tuple(batch) for batch in order}) == 6
    assert order[2] == batch_indices(100, 100, 0, 2, 300).tolist()[:50]


def test_pack_shifts_within_sequences_only():
    """targets[t] is the next token where that is trained on; the end of one sequence never predicts the next one."""
    sequences = [
        (np.array([1, 2, 3, 4], np.int32), np.array([False, False, True, True])),
        (np.array([5], np.int32), np.array([True])),  # no state precedes it
        (np.array([6, 7, 8], np.int32), np.array([True, True, False])),
    ]
    packed = pack(sequences, "cpu")
    assert packed.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert packed.targets.tolist() == [-100, 3, 4, -100, -100, 7, -100, -100]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 0, 0, 1, 2]
    assert packed.cu_seqlens.tolist() == [0, 4, 5, 8] and packed.max_length == 4
    assert str(packed.input_ids.dtype) == str(packed.targets.dtype) == "torch.int64"
    assert str(packed.cu_seqlens.dtype) == "torch.int32"


def test_pack_of_nothing_trains_nothing():
    """A rank without sequences still runs the model: on one token, without a target."""
    packed = pack([], "cpu")
    assert packed.input_ids.shape == (1,) and packed.targets.tolist() == [-100] and packed.cu_seqlens.tolist() == [0, 1]
