"""generate: a kill or another number of processes changes nothing, and scores are the sampler's."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import rl
import torch
from conftest import assistant, shared, tokenizer_folder, user, write_jsonl
from launch import ROOT, quick, run
from safetensors.torch import load_file, save_file
from together import together
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

import common
from pipeline import generate
from pipeline.generator import Generator

PATH = {"PYTHONPATH": str(ROOT)}
LETTERS = [{"letter": letter, "let_frequency": 1, "let_relation": "at least"} for letter in "ae"]
TRUTH = {"instruction_id_list": ["keywords:letter_frequency"] * 2, "kwargs": LETTERS}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(folder with two random models and prompts, flags)."""
    folder = tmp_path_factory.mktemp("generate")
    flags, config, tokenizer = rl.small_run(folder)
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "other")
    rows = [{"messages": [user(f"{i}?")], "dataset": "ifeval", "ground_truth": TRUTH, "subset": str(i % 2)} for i in range(20)]
    data = write_jsonl(folder / "prompts.jsonl", rows)
    return folder, {"model": [str(folder / "model")], "data": [str(data)], "n": 3, "max_length": 64, "max_new_tokens": 10,
                    "slots": 8, "verifier_workers": 1}  # fmt: skip


def written(out, **flags):
    """The rows that generate writes."""
    generate.main(generate.Args(out=str(out), **flags))
    return read(out)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_rounding(row):
    """A row as it has to be with any number of processes and slots, and its log-probabilities."""
    names = ("logprobs", "scored_by")
    return {name: value for name, value in row.items() if name not in names}, np.array(row["logprobs"])


def test_rows_are_the_prompts_with_judged_completions(start, tmp_path):
    folder, flags = start
    rows = written(tmp_path / "out.jsonl", **flags)
    assert [row["messages"] for row in rows] == [[user(f"{i}?")] for i in range(20)]
    tokenizer = common.load_tokenizer(folder / "model")
    for row in rows:
        for k, text in enumerate(row["completions"]):
            assert row["tokens"][k] == len(row["token_ids"][k]) <= 10
            assert tokenizer.decode(row["token_ids"][k], skip_special_tokens=True) == text
            assert row["ended"][k] == (row["token_ids"][k][-1] == tokenizer.eos_token_id) or row["tokens"][k] == 10
            assert row["rewards"][k] == ((text.lower().count("a") > 0) + (text.lower().count("e") > 0)) / 2
        assert (row["model"], row["temperature"], row["seed"]) == (str(folder / "model"), 1.0, 1)
    rewards = {reward for row in rows for reward in row["rewards"]}
    assert rewards > {0.0} and any(any(row["ended"]) for row in rows) and len({str(row["completions"]) for row in rows}) == 20
    assert os.listdir(tmp_path) == ["out.jsonl"]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_and_slots_change_nothing(start, tmp_path, world):
    _, flags = start
    alone = written(tmp_path / "alone.jsonl", **flags)
    together(world, lambda: generate.main(generate.Args(out=str(tmp_path / "ranks.jsonl"), **flags)))
    shared_copy = {**flags, "sample_tp": 2}
    together(world, lambda: generate.main(generate.Args(out=str(tmp_path / "tp.jsonl"), **shared_copy)))
    slots = written(tmp_path / "slots.jsonl", **flags | {"slots": 3})
    for other in (read(tmp_path / "ranks.jsonl"), read(tmp_path / "tp.jsonl"), slots):
        for one, two in zip(alone, other, strict=True):
            assert without_rounding(one)[0] == without_rounding(two)[0]
            assert np.abs(without_rounding(one)[1] - without_rounding(two)[1]).max() < 1e-4


def test_killed_and_repeated_the_same_bytes(start, tmp_path):
    _, flags = start
    written(tmp_path / "whole.jsonl", **flags)
    out = tmp_path / "killed.jsonl"
    answer = Generator.answer
    for kill_after in (1, 2):
        calls = []

        def killed(self, rows, numbers, calls=calls, kill_after=kill_after):
            calls.append(len(numbers))
            if len(calls) > kill_after:
                raise KeyboardInterrupt
            return answer(self, rows, numbers)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("pipeline.generator.ROUNDS", 1)  # two prompts at a time
            patch.setattr(Generator, "answer", killed)
            written(out, **flags)
        [part] = tmp_path.glob(".killed.jsonl.*")
        assert not out.exists()
        with open(part, "a") as file:
            file.write('{"messages": [')  # half a line
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.generator.ROUNDS", 1)
        calls = []
        patch.setattr(Generator, "answer", lambda self, rows, numbers: calls.extend(numbers) or answer(self, rows, numbers))
        written(out, **flags)
    assert calls == list(range(6, 20))  # three calls of two rows had been written
    same = [without_rounding(row)[0] for row in read(tmp_path / "whole.jsonl")]
    assert same == [without_rounding(row)[0] for row in read(out)]
    assert sorted(os.listdir(tmp_path)) == ["killed.jsonl", "whole.jsonl"]


@pytest.mark.slow
def test_a_kill_9_at_any_moment(start, tmp_path):
    folder, flags = start
    flags = {**flags, "data": f"{folder}/prompts.jsonl:6.0", "model": folder / "model", "slots": 4}
    whole, out = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert quick("pipeline/generate.py", out=whole, **flags)[0] == 0
    parts = lambda: sum(file.stat().st_size for file in tmp_path.glob(".killed.jsonl.*"))  # noqa: E731
    code, _, _ = quick("pipeline/generate.py", out=out, kill_when=lambda: parts() > 30_000, **flags)
    assert code == -signal.SIGKILL and parts() and not out.exists()
    assert quick("pipeline/generate.py", out=out, **flags)[0] == 0
    assert out.read_bytes() == whole.read_bytes()


def test_what_another_call_has_begun_is_not_continued(start, tmp_path):
    folder, flags = start
    data = [str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Why?"}, {"prompt": "How?"}]))]
    names = []
    changes = ({}, {"seed": 2}, {"temperature": 0.5}, {"n": 2}, {"max_new_tokens": 9}, {"data": [data[0] + ":1"]}, {"model": "other"})
    for changed in changes:
        args = generate.Args(out="x", **flags | {"data": data} | changed)
        generator = Generator(args, str(folder / changed.get("model", "model")))
        names.append(generator.write_part(generator.load(args.data), tmp_path / "part").name)
    assert len(set(names)) == len(changes)


def test_score_only_returns_the_samplers_logprobs(start, tmp_path):
    folder, flags = start
    flags = flags | {"temperature": 0.7}
    samples = written(tmp_path / "a.jsonl", per_token=True, **flags)
    scored = written(tmp_path / "b.jsonl", per_token=True, score_only=True, **flags | {"data": [str(tmp_path / "a.jsonl")]})
    sums = written(tmp_path / "c.jsonl", score_only=True, **flags | {"data": [str(tmp_path / "a.jsonl")]})
    for one, two, three in zip(samples, scored, sums, strict=True):
        assert without_rounding({**one, "logprobs": [0]})[0] == without_rounding({**two, "logprobs": [0]})[0]
        for k in range(3):
            assert np.abs(np.array(one["logprobs"][k]) - two["logprobs"][k]).max() < 1e-3
            assert abs(sum(one["logprobs"][k]) - three["logprobs"][k]) < 1e-3
    other = written(tmp_path / "d.jsonl", score_only=True, **flags | {"data": [str(tmp_path / "a.jsonl")], "model": [f"{folder}/other"]})
    model = AutoModelForCausalLM.from_pretrained(folder / "other")
    chat = common.ChatFormat(common.load_tokenizer(folder / "other"))
    for row in other[:5]:
        prompt = chat.prompt(row["messages"])
        for ids, logprob in zip(row["token_ids"], row["logprobs"], strict=True):
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double() / 0.7
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().detach()
            assert abs(float(expected) - logprob) < 1e-3


def test_score_only_reads_texts_and_last_answers(start, tmp_path):
    folder, flags = start
    answer = {"role": "assistant", "content": "An area."}
    rows = [{"messages": [user("1?"), answer], "dataset": "ifeval", "ground_truth": TRUTH},
            {"messages": [user("1?")], "completions": ["An area.", "No"], "ended": [True, False]}]  # fmt: skip
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    first, second = written(tmp_path / "out.jsonl", score_only=True, **flags | {"data": [str(data)]})
    assert (first["completions"], first["rewards"], first["reference"]) == (["An area."], [1.0], "An area.")
    assert first["logprobs"][0] == pytest.approx(second["logprobs"][0], abs=1e-4)
    assert (second["rewards"], second["reasons"]) == ([None, None], ["none", "none"])
    tokenizer = common.load_tokenizer(folder / "model")
    assert first["token_ids"][0] == [*tokenizer.encode("An area.", add_special_tokens=False), tokenizer.eos_token_id]
    assert second["token_ids"][1] == tokenizer.encode("No", add_special_tokens=False)  # it had not ended


def test_a_reward_model_scores_as_its_trainer_does(start, tmp_path):
    folder, flags = start
    tokenizer = common.load_tokenizer(tokenizer_folder("byte_level"), "chatml")  # another template than the policy's
    config = LlamaConfig(**AutoModelForCausalLM.from_pretrained(folder / "model").config.to_dict() | {"num_labels": 1, "pad_token_id": 0})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    rows = written(tmp_path / "out.jsonl", reward_model=str(tmp_path / "rm"), **flags)
    chat = common.ChatFormat(tokenizer)
    for row in rows[:5]:
        for text, reward in zip(row["completions"], row["rewards"], strict=True):
            ids, _ = chat.encode([*row["messages"], {"role": "assistant", "content": text}])
            hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
            assert reward == pytest.approx(float((hidden @ model.score.weight[0]).detach()), abs=1e-4)
    assert {reason for row in rows for reason in row["reasons"]} == {"score"}
    with pytest.raises(common.RunError, match="is no reward model"):
        written(tmp_path / "no.jsonl", reward_model=str(folder / "model"), **flags)


@pytest.mark.slow
def test_several_models_answer_one_after_the_other(start, tmp_path):
    folder, flags = start
    both = written(tmp_path / "both.jsonl", **flags | {"model": [f"{folder}/model", f"{folder}/other"]})
    alone = written(tmp_path / "one.jsonl", **flags)
    assert both[:20] == alone
    assert {row["model"] for row in both[20:]} == {f"{folder}/other"} and len(both) == 40
    with pytest.raises(common.RunError, match="twice"):
        written(tmp_path / "no.jsonl", **flags | {"model": [f"{folder}/model"] * 2})


@pytest.mark.parametrize("template", ["tulu", "chatml"])
def test_prompts_that_a_model_invents(start, tmp_path, template):
    """A model that says one sentence by heart, and then the end of a user's turn."""
    _, flags = start
    flags = flags | {"data": [], "max_new_tokens": 40, "chat_template": template, "temperature": 0.0}
    chat = common.ChatFormat(common.load_tokenizer(flags["model"][0], template))
    whole = chat.prompt([user("Why is it so?")])
    header = chat.controls.encode([chat.tokenizer.decode(whole).partition("Why")[0]])[0]
    drawn = []

    def recite(logits, state, ids, logprobs, rules):
        position = state[: len(logits), 0].long()
        wanted = torch.tensor([whole[min(int(p) + 1, len(whole) - 1)] for p in position])
        drawn.append(wanted)
        advance(torch.nn.functional.one_hot(wanted, logits.shape[1]) * 100.0, state, ids, logprobs, rules)

    from kernels import sampler as kernels_sampler

    advance = kernels_sampler._advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels_sampler, "_advance", recite)
        rows = written(tmp_path / "out.jsonl", from_header=3, **flags)
    assert [row["messages"] for row in rows] == [[user("Why is it so?")]] * 3
    assert all(row["ended"] == [True] for row in rows) and drawn and len(header) < len(whole)


def test_rows_nobody_judges_and_rows_that_cannot_be_used(start, tmp_path):
    _, flags = start
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Why?"}, {"messages": [user("How?")]}])
    rows = written(tmp_path / "out.jsonl", **flags | {"data": [str(data)]})
    assert [row["rewards"] for row in rows] == [[None] * 3] * 2 and rows[0]["messages"] == [user("Why?")]
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "Why?"}, {"prompt": "Why?", "dataset": "gsm8k", "ground_truth": {}}])
    with pytest.raises(common.RunError, match=r"bad.jsonl, row 2: "):
        written(tmp_path / "no.jsonl", **flags | {"data": [str(bad)]})
    with pytest.raises(common.RunError, match="is there already"):
        written(tmp_path / "out.jsonl", **flags)
    for wrong, message in (({"from_header": 3}, "give --data"), ({"data": []}, "give --data"), ({"n": 0}, "--n 0"),
                           ({"top_p": 0.0}, "--top_p"), ({"max_new_tokens": 64}, "leaves no room"),
                           ({"sample_tp": 2}, "--sample_tp 2 does not divide")):  # fmt: skip
        with pytest.raises(common.RunError, match=message):
            written(tmp_path / "no.jsonl", **flags | wrong)
    for row, message in (({"messages": [user("How?")]}, "no `completions`"), ({"prompt": "Why?", "completions": ["a" * 90]}, "64")):
        data = write_jsonl(tmp_path / "given.jsonl", [row])
        with pytest.raises(common.RunError, match=message):
            written(tmp_path / "no.jsonl", score_only=True, **flags | {"data": [str(data)]})
    assert not list(tmp_path.glob("no*"))


@pytest.mark.slow
def test_as_a_user_starts_it(start, tmp_path):
    folder, flags = start
    flags = flags | {"model": folder / "model"}
    run("pipeline/generate.py", env=PATH, out=tmp_path / "one.jsonl", **flags)
    short = {name: value for name, value in flags.items() if name != "n"}
    run("pipeline/generate.py", env=PATH, processes=2, out=tmp_path / "two.jsonl", group_size=3, **short)
    one, two = read(tmp_path / "one.jsonl"), read(tmp_path / "two.jsonl")
    assert [without_rounding(row)[0] for row in one] == [without_rounding(row)[0] for row in two]
    bad = [{"prompt": "1?", "completions": ["five"]}, {"prompt": "1?", "completions": ["a" * 90]}]  # rank 0 waits
    given = short | {"data": write_jsonl(tmp_path / "bad.jsonl", bad), "score_only": True}
    _, stderr = run("pipeline/generate.py", env=PATH, processes=2, expect=1, out=tmp_path / "no.jsonl", **given)
    assert stderr.count("error: ") == 1 and "bad.jsonl, row 2: --score_only: prompt and answer are longer" in stderr
    _, stderr = run("pipeline/generate.py", env=PATH, expect=1, out=tmp_path / "one.jsonl", **flags)
    assert stderr == f"error: --out {tmp_path}/one.jsonl is there already: delete it, or choose another\n"


@pytest.mark.slow
def test_a_real_model(tmp_path):
    model = shared("models/stories260k")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Once upon a time"}])
    flags = {"model": [str(model)], "chat_template": "tulu", "n": 4, "max_length": 256, "max_new_tokens": 64, "per_token": True}
    [row] = written(tmp_path / "a.jsonl", data=[str(data)], **flags)
    [scored] = written(tmp_path / "b.jsonl", data=[str(tmp_path / "a.jsonl")], score_only=True, **flags)
    for one, two in zip(row["logprobs"], scored["logprobs"], strict=True):
        assert np.abs(np.array(one) - two).max() < 1e-3


def test_two_calls_do_not_write_one_file(start, tmp_path):
    _, flags = start
    flags = flags | {"data": [str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Why?"}]))]}
    first, second = (Generator(generate.Args(out="x", **flags), flags["model"][0]) for _ in range(2))
    part = first.write_part(first.load(flags["data"]), tmp_path / "out.jsonl")
    first._open(part, 1, 1)
    with pytest.raises(common.RunError, match=f"another process is writing {part}"):
        second.write_part(second.load(flags["data"]), tmp_path / "out.jsonl")
    first.file.close()
    assert second.write_part(second.load(flags["data"]), tmp_path / "out.jsonl") == part


# ------------------------------------------------------------------------------------------- rows of every shape

CONVERSATIONS = [  # one prompt and one answer, in all columns that a row may have them in
    {"messages": [user("1?"), assistant("five")]},
    {"messages": json.dumps([user("1?"), assistant("five")])},
    {"conversations": [{"from": "human", "value": "1?"}, {"from": "gpt", "value": "five"}]},
    {"prompt": [user("1?"), assistant("five")]},
    {"prompt": "1?", "completion": "five"},
]


@pytest.mark.parametrize("row", CONVERSATIONS, ids=str)
def test_a_prompt_and_its_answer_in_any_column(start, tmp_path, row):
    _, flags = start
    data = {"data": [str(write_jsonl(tmp_path / "rows.jsonl", [row]))]}
    [sampled] = written(tmp_path / "a.jsonl", per_token=True, **flags | data)
    assert (sampled["messages"], sampled["reference"]) == ([user("1?")], "five")
    assert not {"conversations", "prompt", "completion"} & sampled.keys()
    [scored] = written(tmp_path / "b.jsonl", per_token=True, score_only=True, **flags | {"data": [str(tmp_path / "a.jsonl")]})
    assert np.abs(np.concatenate(sampled["logprobs"]) - np.concatenate(scored["logprobs"])).max() < 1e-3
    assert (scored["token_ids"], scored["reference"]) == (sampled["token_ids"], "five")
    [given] = written(tmp_path / "c.jsonl", score_only=True, **flags | data)
    assert (given["completions"], given["ended"], given["model"]) == (["five"], [True], None)


def test_columns_of_the_data_are_kept_and_those_of_an_earlier_call_replaced(start, tmp_path):
    folder, flags = start
    own = {"messages": [user("1?")], "model": "GPT", "seed": 7, "reference": "a rubric", "subset": "x"}
    thought = {"messages": [user("1?"), {**assistant("five"), "reasoning_content": "so"}]}
    data = [str(write_jsonl(tmp_path / "rows.jsonl", [own, thought]))]
    row, other = written(tmp_path / "a.jsonl", **flags | {"data": data})
    assert {name: row[name] for name in ("row_model", "row_seed", "row_reference", "subset")} == {
        "row_model": "GPT", "row_seed": 7, "row_reference": "a rubric", "subset": "x"}  # fmt: skip
    assert "reference" not in row and row["seed"] == 1
    assert other["reference"] == thought["messages"][1]  # with its thoughts
    again, _ = written(tmp_path / "b.jsonl", **flags | {"data": [str(tmp_path / "a.jsonl")], "seed": 2})
    assert again.keys() == row.keys() and again["seed"] == 2 and again["completions"] != row["completions"]
    scored, _ = written(tmp_path / "c.jsonl", score_only=True,
                        **flags | {"data": [str(tmp_path / "a.jsonl")], "model": [f"{folder}/other"], "seed": 3})  # fmt: skip
    assert (scored["model"], scored["seed"], scored["scored_by"]) == (row["model"], 1, f"{folder}/other")


def test_rows_for_a_verifier_that_is_not_there_can_be_scored_by_a_model(start, tmp_path):
    folder, flags = start
    config = LlamaConfig(**AutoModelForCausalLM.from_pretrained(folder / "model").config.to_dict() | {"num_labels": 1, "pad_token_id": 0})
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "rm")
    common.load_tokenizer(folder / "model", "tulu").save_pretrained(tmp_path / "rm")
    rows = [{"prompt": "Why?", "dataset": "oasst"}, {"prompt": "w" * 100, "dataset": "oasst"}]
    flags = flags | {"data": [str(write_jsonl(tmp_path / "rows.jsonl", rows))], "max_length": 128}
    short, long = written(tmp_path / "a.jsonl", reward_model=str(tmp_path / "rm"), **flags)
    assert short["reasons"] == ["score"] * 3 and None not in short["rewards"]
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    (tmp_path / "rm" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 60}))
    short, long = written(tmp_path / "b.jsonl", reward_model=str(tmp_path / "rm"), **flags)
    assert (long["reasons"], long["rewards"]) == (["too_long"] * 3, [None] * 3) and short["reasons"] == ["score"] * 3


def test_what_cannot_be_scored_is_named(start, tmp_path):
    _, flags = start
    fine = {"messages": [user("1?")], "completions": ["five"]}
    for bad, message in (
        ({"completions": "abc"}, "no list of texts"), ({"completions": [5]}, "no list of texts"),
        ({"completions": ["a"], "token_ids": [[2**70]]}, "too large|too big"), ({"completions": ["a" * 90]}, "--max_length 64"),
        ({"completions": ["a", "b"], "ended": [True]}, "zip"), ({}, "no `completions`"),
    ):  # fmt: skip
        data = write_jsonl(tmp_path / "rows.jsonl", [fine, {"messages": [user("1?")], **bad}])
        with pytest.raises(common.DataError, match=f"rows.jsonl, row 2: --score_only: .*({message})"):
            written(tmp_path / "no.jsonl", score_only=True, **flags | {"data": [str(data)]})
    empty = {"messages": [user("1?")], "completions": ["", ""], "ended": [True, False]}
    data = write_jsonl(tmp_path / "rows.jsonl", [empty])
    [row] = written(tmp_path / "out.jsonl", score_only=True, **flags | {"data": [str(data)]})
    assert row["tokens"] == [1, 0] and row["logprobs"][0] < -1 and row["logprobs"][1] == 0


def test_a_judge_that_has_changed_is_another_call(start, tmp_path):
    _, flags = start
    source = tmp_path / "mine.py"
    names = []
    for reward in ("0.5", "0.25"):
        source.write_text(f"from rewards import verifier\n\n\n@verifier('half')\ndef half(completion, truth):\n    return {reward}\n")
        generator = Generator(generate.Args(out="x", rewards=[str(source)], **flags), flags["model"][0])
        data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Why?", "dataset": None}])
        names.append(generator._call(generator.load([str(data)], judged=False)))
    assert names[0] != names[1]


def test_models_that_are_damaged(start, tmp_path):
    folder, flags = start
    flags = flags | {"data": [str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Why?", "completions": ["So"]}]))]}
    for damage, message in ((b"", "Error"), (None, "not finite")):
        shutil.copytree(folder / "model", tmp_path / "bad", dirs_exist_ok=True)
        file = tmp_path / "bad" / "model.safetensors"
        if damage is None:
            weights = load_file(folder / "model" / "model.safetensors")
            weights["model.norm.weight"][0] = torch.nan
            save_file(weights, file, {"format": "pt"})
        else:
            file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(common.RunError, match=message):
            written(tmp_path / "no.jsonl", **flags | {"model": [str(tmp_path / "bad")]})


@pytest.mark.slow
def test_from_header_with_every_template(start, tmp_path):
    _, flags = start
    paths = sorted(shared("data/chat_templates/templates").rglob("*.jinja"))
    refused = []
    for path in paths:
        arguments = flags | {"data": [], "chat_template": str(path), "max_new_tokens": 4, "max_length": 128, "from_header": 2}
        try:
            rows = written(tmp_path / f"{path.stem}.jsonl", **arguments)
            assert all(row["messages"][0]["role"] == "user" for row in rows)
        except common.RunError as error:
            refused.append(f"{path.stem}: {error}")
    assert len(paths) > 50 and len(refused) < len(paths) / 5, refused
