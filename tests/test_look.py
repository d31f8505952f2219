"""pipeline.look shows what the scripts would train on: the same rows, the same account, the same tokens."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, chat, shared, tokenizer_folder, user, write_jsonl

import dpo
import grpo
import ppo_rlvr
import reward_model
import sft
from common import ChatFormat, RunError, SftEncoder, load_rows, load_tokenizer
from pipeline import look
from pipeline.look import Args


def folder():
    return str(tokenizer_folder("byte_level"))


def looked(capsys, data, **flags):
    look.main(Args(folder(), data, chat_template="tulu", **flags))
    return capsys.readouterr().out


@pytest.fixture
def mixed(tmp_path):
    """Two sources: one with a row that is empty and one that is long; one with three rows."""
    rows = [chat(), chat(answer=""), chat(answer="word " * 60), chat("And 1 + 1?", "Two.")]
    return [
        write_jsonl(tmp_path / "a.jsonl", rows),
        write_jsonl(tmp_path / "b.jsonl", [chat(f"Q{i}", "A") for i in range(3)]),
    ]


def test_conversations(capsys, mixed):
    out = looked(capsys, mixed, max_length=64, rows=2, max_skip_frac=0.5)
    a, b = mixed
    encode = SftEncoder(
        ChatFormat(load_tokenizer(folder(), "tulu")), len(load_tokenizer(folder(), "tulu")), 64, "truncate"
    )
    rows = load_rows(mixed, encode, max_skip_frac=0.5)
    for line in rows.report:
        assert f"\n{line}\n" in "\n" + out
    assert (
        '      {"messages": [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": ""}]}\n'
        in out
    )
    whole = load_rows(mixed, SftEncoder(encode.chat, encode.vocab_size, 10_000, "truncate"), max_skip_frac=0.5)
    of_a = whole.lengths[:3]
    share = (of_a.max() - 64) / of_a.sum()
    assert f"  longest {of_a.max()}; over 64 are 1 of 3, by {share:.1%} of all tokens" in out
    tokens, trained = rows.lengths[:3].sum(), rows.trained[:3].sum()
    assert f"{a}: 3 rows, {tokens} tokens, {trained} of them trained ({trained / tokens:.1%})" in out
    assert out.count(f"--- {a}, row ") == 2 and f"--- {a}, row 1\n" in out and f"--- {a}, row 4\n" in out
    assert f"--- {b}, row 1\n" in out and f"--- {b}, row 3\n" in out and f"--- {b}, row 2\n" not in out
    assert "⟦Two.</s>⟧" in out and "\033" not in out  # no terminal
    assert "refuse" not in out


def test_the_last_turn_alone(capsys, tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("A", "one")["messages"] + chat("B", "two")["messages"]}])
    assert "⟦one</s>⟧" in looked(capsys, [data]) and "⟦two</s>⟧" in looked(capsys, [data])
    last = looked(capsys, [data], train_turns="last")
    assert "⟦one" not in last and "⟦two</s>⟧" in last


def test_a_refusal_is_foretold(capsys, tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [chat(answer="")] * 3 + [chat()])
    out = looked(capsys, [data])
    assert out.count(f"A script would refuse to start: {data}, row 1: an assistant turn is empty; 3 of 4 rows skipped") == 1
    assert f"{data}: 4 rows read, 1 kept" in out and f"--- {data}, row 4\n" in out
    with pytest.raises(RunError, match="nowhere.jsonl"):
        looked(capsys, ["nowhere.jsonl"])


def test_amounts_are_those_of_the_script(capsys, mixed):
    out = looked(capsys, [f"{mixed[1]}:2"], seed=3)
    encode = SftEncoder(
        ChatFormat(load_tokenizer(folder(), "tulu")), len(load_tokenizer(folder(), "tulu")), 4096, "truncate"
    )
    rows = load_rows([f"{mixed[1]}:2"], encode, seed=3)
    assert [rows.where(i) in out for i in range(2)] == [True, True] and out.count("--- ") == 2


def test_pairs(capsys, tmp_path):
    data = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "What?", "chosen": "yes " * 3, "rejected": "no"}])
    out = looked(capsys, [data], max_length=64)
    assert f"--- {data}, row 1 chosen\n" in out and f"--- {data}, row 1 rejected\n" in out and "⟦no</s>⟧" in out
    assert "over 64 are 0 of 2" in out  # the two sequences of a pair count apart


def test_prompts(capsys, tmp_path):
    rows = [{"messages": [user("2 + 3?")], "dataset": "gsm8k", "ground_truth": "5"},
            {"messages": [user("word " * 100)], "dataset": ["exact", "contains"], "ground_truth": ["a", "b"], "weights": [1, 2]}]  # fmt: skip
    data = write_jsonl(tmp_path / "p.jsonl", rows)
    out = looked(capsys, [data], max_length=64, max_new_tokens=40)
    assert "1 skipped: longer than --max_length (first: row 2)" in out and "over 24 are 1 of 2" in out
    assert "--- judged by gsm8k, ground truth '5'\n" in out and "⟦" not in out
    assert "judged by ['exact', 'contains'], ground truth ['a', 'b'], weights [1, 2]" in looked(capsys, [data])
    with pytest.raises(RunError, match="--max_new_tokens 64 leaves no room"):
        looked(capsys, [data], max_length=64, max_new_tokens=64)


def test_columns_name_the_script_and_the_flag_overrules(capsys, tmp_path):
    both = {"prompt": "a", "chosen": "b", "rejected": "c", **chat("Q", "A")}
    data = write_jsonl(tmp_path / "both.jsonl", [both])
    assert "row 1 chosen" in looked(capsys, [data]) and "⟦A</s>⟧" in looked(capsys, [data], kind="sft")


def test_borders():
    tokenizer = load_tokenizer(folder(), "tulu")
    ids = tokenizer("Café, naïve 😀 and 2 + 3").input_ids
    trained = np.arange(len(ids)) >= 5
    texts = list(look.token_texts(tokenizer, ids))
    assert "".join(texts) == tokenizer.decode(ids) and len(texts) == len(ids)
    plain = look.show(tokenizer, ids, trained, borders=True, colour=False)
    assert plain == "".join(f"{text}│" for text in texts[:5]) + "".join(f"⟦{text}⟧" for text in texts[5:])
    coloured = look.show(tokenizer, ids, trained, borders=True, colour=True)
    shades = ["\033[90m", "\033[37m"] * 2 + ["\033[90m"] + ["\033[92m", "\033[32m"] * len(ids)
    assert coloured == "".join(f"{shade}{text}\033[0m" for shade, text in zip(shades, texts, strict=False))
    assert look.show(tokenizer, ids, trained, borders=False, colour=True).count("\033[32m") == 1


@pytest.mark.parametrize(
    "lengths, limit, bars",
    [
        ([3, 5, 6, 9, 40], 16, {"4": 1, "8": 2, "16": 1, "64": 1}),
        ([20], 16, {"32": 1}),
        ([16, 17], 16, {"16": 1, "32": 1}),
        ([7] * 9, 4096, {"8": 9}),
        ([1, 2, 100], 50, {"1": 1, "2": 1, "128": 1}),
    ],
)
def test_histogram(capsys, lengths, limit, bars):
    look.print_histogram(np.array(lengths), limit)
    out = capsys.readouterr().out.splitlines()
    shown = {line.split()[2]: int(line.split()[4]) for line in out[:-1]}
    assert {edge: count for edge, count in shown.items() if count} == bars and sum(shown.values()) == len(lengths)
    for line in out[:-1]:
        edge, count = int(line.split()[2]), int(line.split()[4])
        assert ("over the limit" in line) == (edge > limit and count > 0)
        assert 0 < line.count("#") <= 40 if count else line.count("#") == 0


def test_defaults_are_the_scripts():
    for kind, scripts in {"sft": [sft], "pairs": [reward_model, dpo], "prompts": [grpo, ppo_rlvr]}.items():
        for script in scripts:
            assert script.Args.max_length == look.MAX_LENGTH[kind]
            assert kind == "prompts" or script.Args.overlong == ("drop" if script is reward_model else Args.overlong)
            assert kind != "sft" or script.Args.train_turns == Args.train_turns
            same = ["seed", "max_skip_frac"] + (["max_new_tokens"] if kind == "prompts" else [])
            assert [getattr(script.Args, name) for name in same] == [getattr(Args, name) for name in same]


@pytest.mark.slow
def test_a_real_model_needs_no_weights(tmp_path):
    """The whole command, on the tokenizer and config of a pretrained model, offline."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (model / name).write_bytes(shared("models", "stories260k", name).read_bytes())
    data = [str(shared("data", "rows", f"{name}.jsonl")) for name in ("tulu-3-sft-mixture", "openai_name")]
    command = [sys.executable, "-m", "pipeline.look", "--model", model, "--chat_template", "tulu", "--data", *data]
    done = subprocess.run(
        [*command, "--max_length", "512", "--for", "sft", "--borders"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert (
        f"{data[0]}: 2 rows read, 2 kept" in done.stdout
        and f"{data[1]}: 1 rows, " in done.stdout
        and "⟦8⟧" in done.stdout
    )
    (model / "config.json").unlink()
    done = subprocess.run([*command, "--rows", "1"], capture_output=True, text=True, cwd=ROOT)
    assert (
        done.returncode == 0
        and "has no config.json that names a vocabulary: taking the tokenizer's 512 tokens" in done.stdout
    )
    assert "⟦It is 5.</s>⟧" in done.stdout.replace("⟦ ", "⟦")
    done = subprocess.run([*command, "--max_length", "3"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
