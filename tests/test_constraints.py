"""studies/constraints.py: rows that the verifiers take, other topics held out, the same questions with a floor."""

import json
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT, shared

import common
from common import RunError
from pipeline import decontaminate
from rewards.__main__ import main as check_rows
from rewards.ifeval import check, parse
from studies import constraints
from studies.constraints import FORMS, KINDS, PLAIN, TOPICS, WORDS, Args, make_files, split

# For each kind an answer that follows it, made from its arguments. NOTHING follows none of them.
FOLLOWING = {
    "change_case:english_lowercase": lambda: "the sun is very large, and it gives us light and warmth every day.",
    "punctuation:no_comma": lambda: "No.",
    "detectable_content:number_placeholders": lambda num_placeholders: "Well, " + "[a] " * num_placeholders,
    "detectable_format:title": lambda: "<<My, my>>",
    "startend:end_checker": lambda end_phrase: f"Well, {end_phrase}",
    "detectable_content:postscript": lambda postscript_marker: f"Yes, it is.\n{postscript_marker} Really.",
    "change_case:capital_word_frequency": lambda capital_frequency, **_: "Well, " + "NO " * capital_frequency,
    WORDS: lambda num_words, **_: "Well, " + "no " * (num_words - 1),
    "length_constraints:number_sentences": lambda num_sentences, **_: "Yes, it is. " * num_sentences,
    "keywords:existence": lambda keywords: f"Well, {' and '.join(keywords)}",
    "keywords:frequency": lambda keyword, frequency, **_: f"Well, {keyword} " * frequency,
    "detectable_format:number_bullet_lists": lambda num_bullets: "- Yes, it is.\n" * num_bullets,
}
NOTHING = "Well, it is"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompt(row):
    [message] = row["messages"]
    assert message["role"] == "user"
    return message["content"]


@pytest.fixture(scope="module")
def files():
    return make_files(seed=1)


@pytest.fixture(scope="module")
def with_floor():
    return make_files(seed=1, floor=30)


# ------------------------------------------------------------------------------------------------------ the rows


@pytest.mark.parametrize("name, topics", [("train.jsonl", split(TOPICS, ",")[:80]), ("held_out.jsonl", split(TOPICS, ",")[80:])])
def test_every_topic_in_every_form_with_every_kind(files, name, topics):
    rows = files[name]
    assert len(topics) == {"train.jsonl": 80, "held_out.jsonl": 20}[name] and len(split(FORMS, "|")) == 8 and len(KINDS) == 12
    assert Counter((row["topic"], row["subset"]) for row in rows) == dict.fromkeys(((t, k) for t in topics for k in KINDS), 8)
    starts = Counter()
    for row in rows:
        [start] = [form for form in split(FORMS, "|") if prompt(row).startswith(form.format(row["topic"]) + " ")]
        starts[start, row["topic"], row["subset"]] += 1
        [(kind, kwargs)] = parse(row["ground_truth"])
        assert kind == row["subset"] and row["dataset"] == "ifeval"
        assert prompt(row)[len(start.format(row["topic"])) + 1 :] in [wording.format(**kwargs) for wording in KINDS[kind][1:]]
    assert set(starts.values()) == {1}
    assert {row["topic"] for row in rows[: len(rows) // 4]} == set(topics)  # they are shuffled


def test_held_out_topics_are_others():
    topics = split(TOPICS, ",")
    assert len(topics) == len({topic.lower() for topic in topics}) == 100
    words = [set(topic.lower().split()) - {"the", "city", "of", "planet"} for topic in topics]
    assert not set().union(*words[:80]) & set().union(*words[80:])


def test_plain_questions(files):
    questions = [prompt(row) for row in files["plain.jsonl"]]
    assert len(questions) == len(set(questions)) == 100 and questions == split(PLAIN, "|")
    assert {row["subset"] for row in files["plain.jsonl"]} == {"plain"} and max(map(len, questions)) < 100


def test_an_answer_can_follow_and_can_fail(files, with_floor):
    constraints = {}  # each once, alone and with a floor
    for name in ("train.jsonl", "held_out.jsonl"):
        for row, other in zip(files[name], with_floor[name], strict=True):
            constraints[row["ground_truth"]] = other["ground_truth"]
    assert len(constraints) == sum(len(constraints_of(kind)) for kind in KINDS)  # every value is drawn
    for alone, both in constraints.items():
        [(kind, kwargs)] = parse(alone)
        answer = FOLLOWING[kind](**kwargs)
        assert check(answer, parse(alone)) == [True] and check(NOTHING, parse(alone)) == [False], alone
        assert check(answer, parse(both)) == ([True] if kind == WORDS else [True, False])  # not by a short answer


def constraints_of(kind):
    choices, *_ = KINDS[kind]
    drawn = [{}]
    for name, values in choices.items():
        drawn = [{**kwargs, name: value} for kwargs in drawn for value in values]
    return drawn


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_says_what_is_asked(kind):
    _, *wordings = KINDS[kind]
    for kwargs in constraints_of(kind):
        for text in (wording.format(**kwargs) for wording in wordings):
            for name, value in kwargs.items():
                if name.endswith("relation"):
                    assert value == "at least" and ("at least" in text or "or more" in text)
                else:
                    assert (value[0] if isinstance(value, list) else str(value)) in text
            assert len(text) < 130


def test_a_second_instruction(files, with_floor):
    for name in ("train.jsonl", "held_out.jsonl"):
        for row, other in zip(files[name], with_floor[name], strict=True):
            alone, both = json.loads(row["ground_truth"]), json.loads(other["ground_truth"])
            if row["subset"] == WORDS:  # has one of its own
                assert other == row
                continue
            assert prompt(other) == prompt(row) + " Answer with at least 30 words."
            assert both["instruction_id_list"] == [*alone["instruction_id_list"], WORDS]
            assert both["kwargs"] == [*alone["kwargs"], {"relation": "at least", "num_words": 30}]
            assert all(other[field] == row[field] for field in ("dataset", "subset", "topic"))
    assert with_floor["plain.jsonl"] == files["plain.jsonl"]


# ------------------------------------------------------------------------------------------------------ what is written


def test_the_same_bytes_again(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        constraints.main(Args(str(tmp_path / name), seed=seed))
    for name in ("train.jsonl", "held_out.jsonl", "plain.jsonl"):
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b and (a != c or name == "plain.jsonl")
    topics = [{row["topic"] for row in read(tmp_path / folder / "held_out.jsonl")} for folder in "ac"]
    assert topics[0] == topics[1]  # whatever the seed is


def test_the_scripts_take_them(tmp_path, tiny_model, capsys):
    constraints.main(Args(str(tmp_path / "out"), floor=30))
    path = str(tmp_path / "out" / "held_out.jsonl")
    check_rows([path])
    assert f"{path}: 1920 ground truths\n" in capsys.readouterr().out
    chat = common.ChatFormat(common.load_tokenizer(tiny_model))
    encode = common.PromptEncoder(chat, len(chat.tokenizer), 512, "drop")
    assert len(common.load_rows([f"{path}:100"], encode, max_skip_frac=0)) == 100


def test_no_prompt_of_ifeval_is_among_them(files, tmp_path):
    test = f"ifeval={shared('data', 'ifeval', 'input_data.jsonl')}"
    constraints.main(Args(str(tmp_path / "out")))
    rows = read(tmp_path / "out" / "train.jsonl")[:2000] + read(tmp_path / "out" / "plain.jsonl")
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    decontaminate.main(decontaminate.Args([test], [str(tmp_path / "some.jsonl")], str(tmp_path / "found")))
    assert len((tmp_path / "found" / "matches.tsv").read_text().splitlines()) == 1  # the head


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / ".out.unfinished").mkdir()  # by a kill
    (tmp_path / ".out.unfinished" / "half").write_text("")
    constraints.main(Args(str(tmp_path / "out")))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train.jsonl", "held_out.jsonl", "plain.jsonl"}
    with pytest.raises(RunError, match="out exists: choose a new folder, or delete it"):
        constraints.main(Args(str(tmp_path / "out")))
    shutil.rmtree(tmp_path / "out")

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(constraints, "sync_to_disk", full)
    with pytest.raises(RunError, match="out cannot be written: .*No space left on device"):
        constraints.main(Args(str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())


def test_flags_that_do_not_fit(tmp_path):
    with pytest.raises(RunError, match="--floor -1 is out of range: at least 0"):
        constraints.main(Args(str(tmp_path / "out"), floor=-1))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [sys.executable, "-m", "studies.constraints", "--out", str(tmp_path / "out"), "--floor", "-1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: --floor -1 is out of range: at least 0\n"
    assert not list(tmp_path.iterdir())
