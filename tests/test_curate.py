"""pipeline.curate: rules against all pairs, what is never used, controls of the same size, rows that the scripts read."""

import json
import random
import re
import runpy
import subprocess
import sys

import pytest
import tyro
from conftest import ROOT, assistant, tokenizer_folder, user, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from common import ChatFormat, DataError, RunError, load_rows, load_tokenizer
from pipeline import curate
from pipeline.curate import Pairs, Prompts, Sft
from pipeline.shapes import samples


def sampled(rewards, prompt="What is 2 + 3?", model="A", **columns):
    """A row of pipeline.generate. Of a completion it says its reward, whether it ended ("…": it did not), tokens."""
    texts = [f"{model}: {i}, {reward}" for i, reward in enumerate(rewards)]
    count = len(rewards)
    row = {
        "messages": [user(prompt)], "dataset": "gsm8k", "ground_truth": "5", "completions": texts, "rewards": rewards,
        "reasons": ["timeout" if reward is None else "score" for reward in rewards], "answers": [""] * count,
        "ended": [True] * count, "tokens": [7] * count, "token_ids": [[1]] * count, "logprobs": [-1.0] * count,
        "model": model, "temperature": 1.0, "top_p": 1.0, "seed": 1,
    }  # fmt: skip
    return row | columns


def many(count=30, n=6, model="A", levels=(0, 0.5, 1, None), seed=0, **columns):
    """Rows of different prompts, with random rewards."""
    draw = random.Random(f"{seed} {model}")
    return [sampled(draw.choices(levels, k=n), f"Question {i}?", model, **columns) for i in range(count)]


@pytest.fixture
def run(tmp_path, capsys):
    """Curates rows (or files of rows). Returns the rows of --out; `run.control`, `run.printed` are left behind."""

    def run(kind, *files, seed=1, **flags):
        for old in ("out.jsonl", "control.jsonl"):
            (tmp_path / old).unlink(missing_ok=True)
        paths = [write_jsonl(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate(files)]
        out, control = str(tmp_path / "out.jsonl"), str(tmp_path / "control.jsonl")
        curate.main(kind(data=paths, out=out, control=control, seed=seed, **flags))
        run.control, run.printed = read(control), capsys.readouterr().out
        return read(out)

    return run


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def reward_of(message):
    """A completion says its reward."""
    said = message["content"].split(", ")[1]
    return None if said == "None" else float(said)


def by_question(rows):
    """{question: pairs of (chosen reward, rejected reward)}, and checks that rows are whole."""
    found = {}
    for row in rows:
        *prompt, chosen = row["chosen"]
        assert row["rejected"][:-1] == prompt and chosen != row["rejected"][-1]
        rewards = reward_of(chosen), reward_of(row["rejected"][-1])
        assert rewards == (row["chosen_reward"], row["rejected_reward"])
        found.setdefault(prompt[0]["content"], []).append(rewards)
    return found


# ---------------------------------------------------------------------------------------------------------------- pairs


def allowed(rule, rewards):
    """All (chosen, rejected) rewards that a rule may pair, of judged ones, by its definition."""
    judged = [reward for reward in rewards if reward is not None]
    lower = [(a, b) for a in judged for b in judged if a > b]
    if rule == "right_wrong":
        return {(a, b) for a, b in lower if a >= 1 > b}
    if rule == "tulu":
        return {(a, b) for a, b in lower if a == max(judged)}
    return {(a, b) for a, b in lower if a == max(judged) and b == min(judged)}


@pytest.mark.parametrize("rule", ["best_worst", "right_wrong", "tulu"])
def test_rules(run, rule):
    """Against the definition; and all that it allows comes up with one seed or another."""
    rows = many(60, 5)
    wanted = {row["messages"][0]["content"]: allowed(rule, row["rewards"]) for row in rows}
    wanted = {question: pairs for question, pairs in wanted.items() if pairs}
    assert 30 < len(wanted) < 60
    seen = {question: set() for question in wanted}
    for seed in range(12):
        found = by_question(run(Pairs, rows, rule=rule, seed=seed))
        assert found.keys() == wanted.keys()
        for question, pairs in found.items():
            assert len(pairs) == 1 and set(pairs) <= wanted[question]
            seen[question] |= set(pairs)
    assert seen == wanted


def test_equal_rewards_are_chosen_from_by_the_seed(run):
    rows = [sampled([1, 1, 1, 0, 0])]
    pairs = [run(Pairs, rows, rule="best_worst", seed=seed)[0] for seed in range(25)]
    assert {pair["chosen"][-1]["content"] for pair in pairs} == {"A: 0, 1", "A: 1, 1", "A: 2, 1"}
    assert {pair["rejected"][-1]["content"] for pair in pairs} == {"A: 3, 0", "A: 4, 0"}


def test_several_pairs_of_a_prompt(run):
    rows = many(40, 8, levels=(0, 1))
    for limit in (0, 2):
        found = run(Pairs, rows, rule="right_wrong", per_prompt=limit)
        pairs = by_question(found)
        for row in rows:
            fewer = min(row["rewards"].count(0), row["rewards"].count(1))
            assert len(pairs.get(row["messages"][0]["content"], [])) == min(fewer, limit or fewer)
        used = [(row["chosen"][0]["content"], row[side][-1]["content"]) for row in found for side in ("chosen", "rejected")]
        assert len(set(used)) == len(used)
        assert len(run.control) == len(found)
    pairs = by_question(run(Pairs, [sampled([0.5, 0, 1, 0.2])], rule="best_worst", per_prompt=0))
    assert pairs["What is 2 + 3?"] == [(1, 0), (0.5, 0.2)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0, 0.25, 0.5, 1, None]), max_size=7), st.sampled_from(["best_worst", "right_wrong", "tulu"]),
       st.sampled_from([0.0, 0.3, 0.5]), st.integers(0, 3))  # fmt: skip
def test_pairs_are_disjoint_and_lower(rewards, rule, min_margin, per_prompt):
    row = sampled(rewards)
    group = samples.Group("key", row["messages"], [(1, json.dumps({"messages": row["messages"]}))], [])
    group.samples.extend(
        curate.Sample(reward, text, "", True, 7, "A", i) for i, (reward, text) in enumerate(zip(rewards, row["completions"], strict=True))
    )
    args = Pairs(data=[], out="", rule=rule, min_margin=min_margin, per_prompt=per_prompt)
    judged = [reward for reward in rewards if reward is not None]
    is_there = any(a > b and a - b >= min_margin and (rule != "right_wrong" or a >= 1 > b) for a in judged for b in judged)
    try:
        rows, control = curate.choose_pairs(group, args, curate.Counter())
    except common.Skip:
        assert not is_there
        return
    assert is_there and len(control) == len(rows) <= (per_prompt or 7)
    for found in (rows, control):
        texts = [row[side][-1]["content"] for row in found for side in ("chosen", "rejected")]
        assert len(set(texts)) == len(texts) and not any("None" in text for text in texts)
    assert all(row["chosen_reward"] - row["rejected_reward"] >= max(min_margin, 1e-6) for row in rows)


def test_right_against_wrong(run):
    """Not right against less right."""
    rows = [sampled([2, 1.5], "right"), sampled([0.5, 0], "wrong"), sampled([1.5, 1, 0.5], "both")]
    for seed in range(8):
        [[(better, worse)]] = by_question(run(Pairs, rows, rule="right_wrong", seed=seed)).values()
        assert better >= 1 and worse == 0.5


def test_rewards_that_differ_by_rounding_are_equal(run):
    third = sampled([0.1 + 0.2, 0.3, 0.3 - 1e-9])
    with pytest.raises(RunError, match="nothing is left"):
        run(Pairs, [third], rule="best_worst")
    with pytest.raises(RunError, match="nothing is left"):
        run(Sft, [third], min_reward=0.3)
    assert len(run(Sft, [third], min_reward=0.1 + 0.2, choose="right", keep_alike=True)) == 3


def test_min_margin(run):
    rows = [sampled([1, 0.9, 0.4], "a"), sampled([1, 0.7], "b"), sampled([0.9, 0.6], "c")]
    assert by_question(run(Pairs, rows, rule="tulu", min_margin=0.5)) == {"a": [(1, 0.4)]}
    assert by_question(run(Pairs, rows, rule="tulu", min_margin=0.3)).keys() == {"a", "b", "c"}


def test_length_gap(run):
    rows = [sampled([1, 0], "near", tokens=[10, 15]), sampled([1, 0], "far", tokens=[10, 16])]
    assert list(by_question(run(Pairs, rows, rule="best_worst", length_gap=5))) == ["near"]
    assert "1 pairs left out: lengths over --length_gap apart" in run.printed
    assert [row["chosen"][0]["content"] for row in run.control] == ["near"]


def test_control_of_pairs(run):
    """Any candidates that could be a pair by their texts and lengths; where they give too few, other labels."""
    rows = [sampled([1, 0.5, 0], f"{i}", tokens=[10, 12, 9]) for i in range(40)]
    run(Pairs, rows, rule="best_worst")
    assert {row["chosen_reward"] for row in run.control} == {row["rejected_reward"] for row in run.control} == {0, 0.5, 1}
    rows = [sampled([1, 0, 0.5, 0.5], f"{i}", tokens=[10, 12, 90, 50], completions=["five", "six", "6", "6"]) for i in range(40)]
    run(Pairs, rows, rule="best_worst", length_gap=5)
    assert {frozenset(row[side][-1]["content"] for side in ("chosen", "rejected")) for row in run.control} == {
        frozenset(["five", "six"])
    }
    alike = [sampled([0] * 20 + [1] * 20, f"{i}", completions=["6"] * 20 + list("abcdefghijklmnopqrst")) for i in range(20)]
    assert len(run(Pairs, alike, rule="right_wrong", per_prompt=0)) == len(run.control) == 400
    assert 0.4 < sum(row["chosen_reward"] for row in run.control) / 400 < 0.6


def test_the_same_text_is_no_pair(run):
    with pytest.raises(RunError, match="nothing is left"):
        run(Pairs, [sampled([1, 0], completions=["5", "5"])], rule="best_worst")


def test_delta(run):
    strong, weak = many(20, 2, "big"), many(20, 3, "small")
    strong[3]["ended"] = [False, False]
    del weak[4]["ground_truth"]  # nobody has to judge
    rows = run(Pairs, strong, weak, many(20, 2, "other"), rule="delta", strong="big", weak="small", per_prompt=0)
    assert [row["chosen"][0]["content"] for row in rows] == [f"Question {i}?" for i in range(20) if i != 3 for _ in range(2)]
    for row in rows:
        assert (row["chosen_model"], row["rejected_model"]) == ("big", "small")
        assert row["chosen"][-1]["content"].startswith("big") and row["rejected"][-1]["content"].startswith("small")
    assert any(row["chosen_reward"] is None for row in rows)
    assert any(None not in (row["chosen_reward"], row["rejected_reward"]) and row["reward_gap"] < 0 for row in rows)
    assert {row["chosen_model"] for row in run.control} == {"big", "small"}
    assert "40 completions left out: neither of --strong nor of --weak" in run.printed
    with pytest.raises(RunError, match="nothing is left"):
        run(Pairs, strong, weak, rule="delta", strong="big", weak="tiny")
    run(Pairs, strong, weak, rule="delta", strong="big", weak="small")
    assert "20 prompts, completions: 40 of big, 60 of small" in run.printed


def test_noise_swaps_labels_and_nothing_else(run):
    rows = many(400, 4)
    straight = run(Pairs, rows, rule="tulu")
    noisy = run(Pairs, rows, rule="tulu", noise=0.25)
    assert len(noisy) == len(straight) > 200
    swapped = 0
    for a, b in zip(straight, noisy, strict=True):
        if a != b:
            swapped += 1
            assert (a["chosen"], a["rejected"], a["chosen_reward"]) == (b["rejected"], b["chosen"], b["rejected_reward"])
            assert b["reward_gap"] == -a["reward_gap"] < 0
    assert 0.15 < swapped / len(noisy) < 0.35
    with_margin = run(Pairs, rows, rule="tulu", noise=0.25, margin=True)
    assert [row["margin"] for row in with_margin] == [abs(row["reward_gap"]) for row in noisy]


# ------------------------------------------------------------------------------------------------------------------ sft


def test_best_and_right(run):
    rows = many(60, 5)
    rewards = {row["messages"][0]["content"]: [r for r in row["rewards"] if r is not None] for row in rows}
    mixed = {question: values for question, values in rewards.items() if len(set(values)) > 1}
    assert len(mixed) < len(rewards)
    for choose, least, limit in [("best", 0.5, 1), ("best", 1, 2), ("random_right", 0.5, 2), ("right", 0.5, 1)]:
        found = {}
        for row in run(Sft, rows, choose=choose, min_reward=least, per_prompt=limit):
            assert row["reward"] == reward_of(row["messages"][-1]) and row["model"] == "A"
            found.setdefault(row["messages"][0]["content"], []).append(row["reward"])
        wanted = {}
        for question, values in mixed.items():
            right = sorted((value for value in values if value >= least), reverse=True)
            count = len(right) if choose == "right" else min(limit, len(right))
            wanted |= {question: (right, count)} if right else {}
        assert found.keys() == wanted.keys()
        for question, (right, count) in wanted.items():
            assert len(found[question]) == count and set(found[question]) <= set(right)
            assert choose != "best" or found[question] == right[:count]


def test_random_right_is_random(run):
    chosen = [run(Sft, [sampled([1, 0.5, 0])], choose="random_right", min_reward=0.5, seed=seed)[0]["reward"] for seed in range(20)]
    assert 3 < chosen.count(1) < 17 and chosen.count(1) + chosen.count(0.5) == 20


def test_alike(run):
    rows = [sampled([1, 1], "solved"), sampled([1, 0], "mixed"), sampled([0, 0], "never")]
    assert [row["messages"][0]["content"] for row in run(Sft, rows)] == ["mixed"]
    assert "1 prompts left out: all candidates have the same reward" in run.printed
    assert "1 prompts left out: no candidate is right" in run.printed
    assert [row["messages"][0]["content"] for row in run(Sft, rows, keep_alike=True)] == ["solved", "mixed"]


def test_a_text_is_taken_once(run):
    row = sampled([1, 1, 1, 0], completions=["5", "5", "five", "6"])
    assert sorted(row["messages"][-1]["content"] for row in run(Sft, [row], choose="right")) == ["5", "five"]
    assert len(run.control) == 2


def test_reference(run):
    rows = [sampled([1, 0], "a", reference="It is 5."), sampled([0, 0], "b", reference="It is 6."), sampled([None], "c", reference="7")]
    found = run(Sft, rows, with_reference=True)
    assert [(row["messages"][-1]["content"], row["model"]) for row in found] == [
        ("A: 0, 1", "A"), ("It is 6.", "reference"), ("7", "reference"),
    ]  # fmt: skip
    assert [row["reward"] for row in found] == [1, None, None] and not any("reference" in row for row in found)
    assert [row["model"] for row in run.control] == ["A", "A", "reference"]
    assert len(run(Sft, rows)) == 1


WHOLE = {"role": "assistant", "content": "5", "reasoning_content": "2 and 3 make 5."}


def test_a_reference_may_be_a_whole_message(run):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    for message in (WHOLE, call):
        row = sampled([0, 0], reference=message)
        [answer] = run(Sft, [row], with_reference=True)
        assert answer["messages"] == [*row["messages"], message] and answer["model"] == "reference"
        [prompt] = run(Prompts, [row], above=-1)
        assert prompt["messages"] == [*row["messages"], message] and "reference" not in prompt
        [pair] = run(Pairs, [{**row, "rewards": [1, 0]}], rule="tulu")
        assert "reference" not in pair


@pytest.mark.parametrize("own", [["a rubric"], {"criteria": "brief"}, 5, None])
def test_a_reference_that_is_no_answer_is_a_column(run, own):
    row = sampled([1, 0], reference=own)
    for kind, flags in ((Prompts, {}), (Sft, {"with_reference": True}), (Pairs, {"rule": "tulu"})):
        [found] = run(kind, [row], **flags)
        assert found["reference"] == own
    [prompt] = run(Prompts, [row])
    assert prompt["messages"] == row["messages"]
    with pytest.raises(RunError, match="nothing is left"):
        run(Sft, [{**row, "rewards": [0, 0]}], with_reference=True)


def test_rows_of_score_only(run):
    """May have been given without a model, and say who has read them."""
    rows = [sampled([1, 0], model=None, scored_by="B"), sampled([1, 1], "Q", "A", scored_by="B")]
    found = run(Prompts, rows, at_most=1)
    assert len(found) == 2 and not any("scored_by" in row for row in found)
    assert "completions: 2 of A, 2 of unknown" in run.printed
    assert run(Sft, rows)[0]["model"] is None


# -------------------------------------------------------------------------------------------------------------- prompts


def test_pass_rates(run):
    rows = [sampled([1] * k + [0] * (8 - k), f"{k}/8", subset="x") for k in range(9)]
    rows[3]["ended"] = [False] * 8  # judged all the same
    rows.append(sampled([1, None, 0, None], "1/2"))
    rows.append(sampled([None, None], "unjudged"))
    kept = run(Prompts, rows)
    assert [row["messages"][0]["content"] for row in kept] == ["1/8", "2/8", "3/8", "4/8", "5/8", "1/2"]
    assert [row["pass_rate"] for row in kept] == [1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 1 / 2]
    assert kept[0] == {"messages": [user("1/8")], "dataset": "gsm8k", "ground_truth": "5", "subset": "x", "pass_rate": 1 / 8}
    assert "1 prompts left out: no completion is judged" in run.printed
    bars = re.findall(r"pass rate (?:from )?(\S+) +(\d+) prompts +(\d+) kept", run.printed)
    assert bars == [
        ("0", "1", "0"), ("0.125", "1", "1"), ("0.25", "1", "1"), ("0.375", "1", "1"), ("0.5", "2", "2"),
        ("0.625", "1", "1"), ("0.75", "1", "0"), ("0.875", "1", "0"), ("1", "1", "0"),
    ]  # fmt: skip
    names = lambda **flags: [row["messages"][0]["content"] for row in run(Prompts, rows, **flags)]  # noqa: E731
    assert names(drop_solved=True) == [f"{k}/8" for k in range(8)] + ["1/2"]
    assert names(above=0.25, at_most=0.75) == ["3/8", "4/8", "5/8", "6/8", "1/2"]
    assert names(above=-1, at_most=0) == ["0/8"]
    assert names(above=0.5, at_most=1) == ["5/8", "6/8", "7/8", "8/8"]


def test_prompts_go_on_as_they_came(run):
    """With the answer that generate has taken out, in any shape of prompt."""
    row = {"messages": [user("2 + 3?"), assistant("5")], "dataset": "math", "ground_truth": "5", "tools": None}
    written = sampled([1, 0]) | {**row, "messages": row["messages"][:1], "reference": "5"}
    text = {key: value for key, value in (sampled([1, 0]) | {"prompt": "4 + 5?"}).items() if key != "messages"}
    found = run(Prompts, [written, text])
    assert found == [row | {"pass_rate": 0.5}, {"prompt": "4 + 5?", "dataset": "gsm8k", "ground_truth": "5", "pass_rate": 0.5}]


# ---------------------------------------------------------------------------------------------------------- all of them

EVERY = [(Sft, {}), (Sft, {"choose": "right"}), (Prompts, {"at_most": 0.5}), (Pairs, {"rule": "delta", "strong": "A", "weak": "B"}),
         *((Pairs, {"rule": rule}) for rule in ("best_worst", "right_wrong", "tulu"))]  # fmt: skip


@pytest.mark.parametrize("kind, flags", EVERY, ids=lambda value: str(value))
def test_order_of_files_and_seed(run, tmp_path, kind, flags):
    a, b = many(30, 4, "A", subset="a"), many(40, 4, "B", subset="b")[::-1]
    first = run(kind, a, b, **flags), run.control
    assert {row["subset"] for row in first[0]} == {"a", "b"}
    assert first == (run(kind, b, a, **flags), run.control)
    written = (tmp_path / "out.jsonl").read_bytes()
    run(kind, a, b, **flags)
    assert (tmp_path / "out.jsonl").read_bytes() == written
    run(kind, a, b, seed=2, **flags)
    assert run.control != first[1]
    fewer = run(kind, a[:15], b[25:], **flags)  # other prompts do not matter
    without = [[{**row, "subset": ""} for row in rows] for rows in (fewer, first[0])]
    assert len(fewer) > 2 and all(row in without[1] for row in without[0])


@pytest.mark.parametrize("kind, flags", EVERY, ids=lambda value: str(value))
def test_controls(run, kind, flags):
    """As many rows, of the same prompts, and no better than chance."""
    rows = many(300, 6, "A", levels=(0, 1, None)), many(300, 6, "B", levels=(0, 1, None))
    found = run(kind, *rows, **flags)
    assert len(run.control) == len(found) > 100
    if kind is Prompts:
        assert len({json.dumps(row) for row in run.control}) == len(found)
        assert any(row["pass_rate"] > 0.5 for row in run.control)
        return
    side = "chosen" if kind is Pairs else "messages"
    assert [row[side][:-1] for row in run.control] == [row[side][:-1] for row in found]
    if kind is Sft:
        rewards = [row["reward"] for row in run.control]
        assert None not in rewards and 0.35 < sum(rewards) / len(rewards) < 0.65 and all(row["reward"] == 1 for row in found)
        return
    keys = ("chosen_reward", "rejected_reward") if flags["rule"] != "delta" else ("chosen_model", "rejected_model")
    mean = [sum(row[key] in (1, "A") for row in run.control) / len(run.control) for key in keys]
    assert all(0.35 < value < 0.65 for value in mean)
    if flags["rule"] != "delta":
        assert not any(row[key] is None for row in run.control for key in keys)


@pytest.mark.parametrize("kind, flags", [case for case in EVERY if case[1].get("rule") != "delta"], ids=lambda value: str(value))
def test_what_is_not_judged_or_cut_off_is_never_used(run, kind, flags):
    draw = random.Random(3)
    rows = many(80, 6)
    for row in rows:
        row["ended"] = [draw.random() < 0.6 for _ in row["ended"]]
        row["completions"] = [
            f"{text}, {'ended' if ended else 'cut'}" for text, ended in zip(row["completions"], row["ended"], strict=True)
        ]
        row["completions"][2], row["rewards"][2] = "  \n", 1
    if kind is Prompts:
        rates = {row["messages"][0]["content"]: row["pass_rate"] for row in run(kind, rows, above=-1, at_most=1)}
        judged = [[reward for reward in row["rewards"] if reward is not None] for row in rows]
        assert list(rates.values()) == [rewards.count(1) / len(rewards) for rewards in judged]
        return
    texts = {}
    for name, found in (("out", run(kind, rows, **flags)), ("control", run.control)):
        sides = ("chosen", "rejected") if kind is Pairs else ("messages",)
        texts[name] = [row[side][-1]["content"] for row in found for side in sides]
    assert len(texts["out"]) > 30
    for text in texts["out"] + texts["control"]:
        assert text.endswith(", ended") and "None" not in text
    cut = sum(not ended and reward is not None for row in rows for ended, reward in zip(row["ended"], row["rewards"], strict=True))
    assert f"{cut} completions left out: cut off before their end" in run.printed
    unjudged = sum(reward is None for row in rows for reward in row["rewards"])
    assert f"{unjudged} completions left out: not judged (timeout)" in run.printed


def test_what_belongs_together(run):
    """Rows with one prompt, in any shape; not those with other tools, or another truth."""
    a, b = sampled([1], "Q"), sampled([0], "Q", "B")
    text = {key: value for key, value in b.items() if key != "messages"} | {"prompt": "Q"}
    [pair] = run(Pairs, [a], [text], rule="best_worst")
    assert pair["chosen"][:-1] == [user("Q")] and (pair["chosen_model"], pair["rejected_model"]) == ("A", "B")
    assert "prompt" not in pair
    for other in ({"tools": [{"type": "function"}]}, {"ground_truth": "6"}):
        with pytest.raises(RunError, match="nothing is left"):
            run(Pairs, [a], [b | other], rule="best_worst")


def test_columns(run):
    """The others are kept; those of another answer are not, and a margin that is not asked for is not there."""
    old = {"margin": 3.0, "prompt": "x", "chosen": [assistant("x")], "rejected": [assistant("y")], "chosen_model": "gpt"}
    messages = [{"role": "system", "content": "Be brief."}, user("Hi."), assistant("Hello."), user("2 + 3?")]
    row = sampled([1, 0], messages=messages, subset="chat", tools=[{"type": "function"}], **old)
    [pair] = run(Pairs, [row], rule="best_worst")
    assert pair == {
        "dataset": "gsm8k", "ground_truth": "5", "subset": "chat", "tools": [{"type": "function"}],
        "chosen": [*messages, assistant("A: 0, 1")], "rejected": [*messages, assistant("A: 1, 0")],
        "chosen_model": "A", "rejected_model": "A", "chosen_reward": 1, "rejected_reward": 0, "reward_gap": 1,
    }  # fmt: skip
    assert run(Pairs, [row], rule="best_worst", margin=True) == [pair | {"margin": 1}]
    [answer] = run(Sft, [row])
    assert answer == {
        "messages": [*messages, assistant("A: 0, 1")], "model": "A", "reward": 1, "dataset": "gsm8k", "ground_truth": "5",
        "subset": "chat", "tools": [{"type": "function"}], "chosen_model": "gpt",
    }  # fmt: skip


@pytest.mark.parametrize("template", ["chatml", "tulu"])
def test_the_scripts_read_it(run, tmp_path, template):
    chat = ChatFormat(load_tokenizer(tokenizer_folder("byte_level"), template))
    rows = many(20, 6) + [sampled([1, 0], messages=[user("Hi."), assistant("Hello."), user("2 + 3?")])]
    size = len(chat.tokenizer)
    encoders = {
        Sft: common.SftEncoder(chat, size, 512, "drop"),
        Pairs: common.PairEncoder(chat, size, 512, "drop"),
        Prompts: common.PromptEncoder(chat, size, 512, "drop"),
    }
    for kind, flags in EVERY:
        if flags.get("rule") == "delta":
            continue
        found = run(kind, rows, **flags)
        for name in ("out.jsonl", "control.jsonl"):
            encoded = load_rows([str(tmp_path / name)], encoders[kind], 1, 0)
            assert len(encoded) == len(found) > 5
    run(Pairs, rows, rule="tulu", margin=True)
    margins = load_rows([str(tmp_path / "out.jsonl")], encoders[Pairs], 1, 0).table["margin"][:]
    assert set(margins) == {0.5, 1.0}


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda row: row.pop("completions"), "no field 'completions'"),
        (lambda row: row.pop("rewards"), "no field 'rewards'"),
        (lambda row: row.pop("model"), "no field 'model'"),
        (lambda row: row.pop("messages"), "no field 'messages'"),
        (lambda row: row["ended"].pop(), "as many of each expected: 1 completions, .*0 ended"),
        (lambda row: row.update(rewards=["good"]), "rewards: expected a number or null, found 'good'"),
        (lambda row: row.update(rewards=[True]), "rewards: expected a number or null, found True"),
        (lambda row: row.update(rewards=1.0), "rewards: expected a list, found 1.0"),
        (lambda row: row.update(completions=[None]), "completions: expected a text, found None"),
        (lambda row: row.update(model=["A"]), r"model: expected a text or null, found \['A'\]"),
        (lambda row: row.update(tokens=["7"]), "tokens: expected a whole number from 1 on, found '7'"),
        (lambda row: row.update(ended=["no"]), "ended: expected true or false, found 'no'"),
        (lambda row: row.update(reasons=[["right"]]), r"reasons: expected a text, found \['right'\]"),
    ],
)
def test_other_rows(run, change, message):
    row = sampled([1])
    change(row)
    with pytest.raises(DataError, match=rf"0.jsonl, row 2: not usable as a row of generate: {message}"):
        run(Sft, [sampled([1, 0]), row])


@pytest.mark.parametrize(
    "kind, flags, message",
    [
        (Pairs, {"rule": "delta"}, "needs two models"),
        (Pairs, {"rule": "delta", "strong": "A"}, "needs two models"),
        (Pairs, {"rule": "delta", "strong": "A", "weak": "A"}, "needs two models"),
        (Pairs, {"rule": "tulu", "strong": "A", "weak": "B"}, "needs two models"),
        (Pairs, {"rule": "delta", "strong": "A", "weak": "B", "margin": True}, "looks at none"),
        (Pairs, {"rule": "delta", "strong": "A", "weak": "B", "min_margin": 0.5}, "looks at none"),
        (Pairs, {"rule": "tulu", "noise": 1.5}, "--noise 1.5 is out of range"),
        (Pairs, {"rule": "tulu", "per_prompt": -1}, "--per_prompt -1 is out of range"),
        (Sft, {"choose": "right", "per_prompt": 2}, "takes all right answers"),
        (Prompts, {"drop_solved": True, "at_most": 0.5}, "in place of --above"),
        (Prompts, {"at_most": 0.0}, "nothing is left to write"),
        (Sft, {"min_reward": 2.0}, "nothing is left to write"),
    ],
)
def test_flags(run, tmp_path, kind, flags, message):
    with pytest.raises(RunError, match=message):
        run(kind, many(5), **flags)
    assert {path.name for path in tmp_path.iterdir()} == {"0.jsonl"}


def test_files(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", many(9))
    out = str(tmp_path / "new" / "out.jsonl")
    with pytest.raises(RunError, match="a file twice"):
        curate.main(Sft(data=[source, f"{tmp_path}/../{tmp_path.name}/a.jsonl"], out=out))
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for control in (out, f"{tmp_path}/new/./out.jsonl", f"{tmp_path}/link/out.jsonl"):
        with pytest.raises(RunError, match="given twice"):
            curate.main(Sft(data=[source], out=out, control=control))
    with pytest.raises(RunError, match="--control .* is there already"):
        curate.main(Sft(data=[source], out=out, control=source))
    with pytest.raises(RunError, match="--out .* is there already"):
        curate.main(Sft(data=[source], out=source))
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(RunError, match="nothing is left"):
        curate.main(Sft(data=[empty], out=out))

    def full(descriptor):
        raise OSError(28, "No space left on device", "disk")

    monkeypatch.setattr(curate.os, "fsync", full)
    with pytest.raises(RunError, match="disk cannot be written: .*No space left"):
        curate.main(Sft(data=[source], out=out))
    assert not list((tmp_path / "new").iterdir())


def test_commands_of_the_docstring():
    found = [line.split("    ")[1] for line in curate.__doc__.splitlines() if line.startswith("    python")]
    assert len(found) == 4
    for line in found:
        args = tyro.cli(Sft | Pairs | Prompts, args=line.split()[3:], use_underscores=True)
        assert args.data and args.out


@pytest.mark.filterwarnings('ignore:.*found in sys.modules')
def test_command_line(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", many(9))
    command = [sys.executable, "-m", "pipeline.curate", "pairs", "--data", source, "--rule", "tulu", "--out"]
    done = subprocess.run([*command, tmp_path / "out.jsonl"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"out.jsonl: {len(read(tmp_path / 'out.jsonl'))} rows written" in done.stdout
    monkeypatch.setattr(sys, "argv", [*command[2:], str(tmp_path / "out.jsonl")])
    with pytest.raises(SystemExit, match="^error: --out .*out.jsonl is there already, or .*$"):  # exit code 1, one line
        runpy.run_module("pipeline.curate", run_name="__main__")
