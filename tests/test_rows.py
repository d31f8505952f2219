"""Rows as they are published: what is read as it is, what is converted, and what is left out with which words.

Published shapes are test data (../shared/data/rows); each is tried as JSON lines and as Parquet, under a template of the
family that it is for (../shared/data/chat_templates).
"""

import inspect
import json
import re

import datasets
import numpy as np
import pytest
from conftest import assistant, shared, tokenizer_folder, user, write_jsonl
from test_templates import chat_of

import common
from common import (
    ChatFormat,
    DataError,
    PairEncoder,
    PromptEncoder,
    RunError,
    SftEncoder,
    load_rows,
    load_tokenizer,
)
from pipeline import convert
from rewards.pool import Pool

ENCODERS = {"sft": SftEncoder, "dpo": PairEncoder, "grpo": PromptEncoder}
# shape: (script, family of template, what is trained, or for prompts how many rows). None: converted first.
SHAPES = {
    "IF_multi_constraints": ("grpo", "tulu-3", 1), "RLVR-MATH": ("grpo", "tulu-3", 1),
    "alpaca-dpo": ("dpo", "tulu-3", None), "alpaca": ("sft", "tulu-3", None),
    "axolotl_train_flag": ("sft", "tulu-3", ["It is 5.<|end_of_text|>"]), "big-math": ("grpo", "qwen2.5", None),
    "conversations_with_role_content__open-r1__LIMO__": ("sft", "tulu-3", ["It is 5.<|end_of_text|>"]),
    "deepscaler": ("grpo", "qwen2.5", None),
    "dolci-instruct-dpo": ("dpo", "olmo-3-instruct", ["It is 5.<|im_end|>", "6<|im_end|>"]),
    "dolci-instruct-rl__prompt__no_messages_": ("grpo", "olmo-3-no-think-7b", 1),
    "dolci-instruct-sft-functions": ("sft", "olmo-3-instruct", [
        '<function_calls>get_weather(city="Rome")</function_calls><|im_end|>It is 21 C.<|im_end|>']),
    "dolci-instruct-sft-nofunctions": ("sft", "olmo-3-instruct", ["It is 5.<|im_end|>"]),
    "dolci-rl-messages": ("grpo", "olmo-3-no-think-7b", 1),
    "dolci-think-sft": ("sft", "olmo-3-sft-tok", ["<think>\nTwo and three.\n</think>\n\nIt is 5.<|im_end|>"]),
    "dpo__chosen_of_several_messages": ("dpo", "qwen3", "differ before their last turn"),
    "dpo_multi-turn__differs_earlier": ("dpo", "tulu-3", "differ before their last turn"),
    "dpo_with_tools": ("dpo", "qwen3", [
        '<think>\n\n</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nI do not know.<|im_end|>"]),
    "glaive-function-calling-v2": ("sft", "tulu-3", None), "gsm8k": ("grpo", "qwen2.5", None),
    "helpsteer2": ("dpo", "tulu-3", None), "helpsteer3-preference": ("dpo", "tulu-3", None),
    "hermes_calls_in_content__as_messages": ("sft", "qwen3", [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
        "<think>\n\n</think>\n\n21 C<|im_end|>"]),
    "hh-rlhf": ("dpo", "tulu-3", None), "images_column": ("sft", "tulu-3", "images is not empty"),
    "kto__TRL_": ("dpo", "tulu-3", None), "numinamath": ("sft", "tulu-3", ["It is 5.<|end_of_text|>"]),
    "oasst_multi-turn__null_fields": ("sft", "tulu-3", ["It is 5.<|end_of_text|>"] * 2),
    "openai_function_call__legacy_": ("sft", "qwen3", [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
        "<think>\n\n</think>\n\nIt is 21 C.<|im_end|>"]),
    "openai_image_part": ("sft", "qwen3-vl", r"messages\[0\].content\[1\] is of type 'image_url'"),
    "openai_name": ("sft", "tulu-3", ["It is 5.<|end_of_text|>"]),
    "openai_parts": ("sft", "tulu-3", ["It is 5.<|end_of_text|>"]),
    "openai_refusal_audio_fields": ("sft", "tulu-3", ["It is 5.<|end_of_text|>"]),
    "openai_tools": ("sft", "qwen3", [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
        "<think>\n\n</think>\n\nIt is 21 C.<|im_end|>"]),
    "openai_tools__content_null": ("sft", "gpt-oss", [
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'
        "<|channel|>final<|message|>It is 21 C.<|return|>"]),
    "openai_weight": ("sft", "tulu-3", ["It is 5.<|end_of_text|>"]),
    "openthoughts3__system____think__": ("sft", "olmo-3-sft-tok", ["<think>\nx\n</think>\n\n5<|im_end|>"]),
    "orca_dpo_pairs": ("dpo", "tulu-3", None),
    "prompt_completion_messages__TRL_": ("sft", "tulu-3", ["It is 5.<|end_of_text|>"]),
    "reasoning_content_field": ("sft", "qwen3", ["<think>\nTwo and three.\n</think>\n\nIt is 5.<|im_end|>"]),
    "rlvr-code": ("grpo", "tulu-3", 1), "rlvr_numeric_ground_truth": ("grpo", "tulu-3", 1),
    "rlvr_with_system": ("grpo", "tulu-3", 1),
    "rm_eval__RewardBench_": ("dpo", "tulu-3", ["It is 5.<|end_of_text|>", "6<|end_of_text|>"]),
    "sharegpt_assistant_first": ("sft", "qwen2.5", ["Hello!<|im_end|>It is 5.<|im_end|>"]),
    "sharegpt_conversations": ("sft", "tulu-3", ["It is 5.<|end_of_text|>"]),
    "sharegpt_ends_with_user": ("sft", "tulu-3", ["It is 5.<|end_of_text|>"]),
    "sharegpt_under_messages": ("sft", "tulu-3", ["It is 5.<|end_of_text|>"]),
    "skywork-reward-preference": ("dpo", "tulu-3", ["It is 5.<|end_of_text|>", "6<|end_of_text|>"]),
    "smoltalk2__chat_template_kwargs_": ("sft", "smollm3", ["It is 5.<|im_end|>"]),
    "tools_a_single_object": ("sft", "qwen3", ["<think>\n\n</think>\n\nFine.<|im_end|>"]),
    "tools_names_only__OLMo_RL_": ("grpo", "qwen3", "tools holds a string, expected a list of JSON schemas"),
    "tools_with_mixed_schemas_in_parquet": ("sft", "qwen3", [
        '<think>\n\n</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
        '<think>\n\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>']),
    "toucan_tools_string": ("sft", "qwen3", ["<think>\n\n</think>\n\nFine.<|im_end|>"]),
    "trl-conversational-preference": ("dpo", "tulu-3", ["It is 5.<|end_of_text|>", "6<|end_of_text|>"]),
    "trl-standard-preference": ("dpo", "tulu-3", ["It is 5.<|end_of_text|>", "6<|end_of_text|>"]),
    "trl_grpo__prompt_messages_": ("grpo", "qwen2.5", None), "trl_grpo__prompt_string_": ("grpo", "qwen2.5", None),
    "tulu-3-sft-mixture": ("sft", "tulu-3", ["It is 5.<|end_of_text|>", "It is 5.<|end_of_text|>8.<|end_of_text|>"]),
    "ultrafeedback_binarized": ("dpo", "zephyr", ["It is 5.</s>", "6</s>"]),
}  # fmt: skip


def trained_texts(chat, rows):
    """What is trained in each sequence."""
    sequences = rows.sequences(range(len(rows)))
    return [chat.tokenizer.decode(np.array(ids)[mask].tolist()) for ids, mask in sequences]


def load(source, script, chat):
    return load_rows([str(source)], ENCODERS[script](chat, 10**6, 512, "truncate"))


def test_every_published_shape_is_in_the_table():
    """54 of the 59 shapes load, 41 as they are; the others say in one line why not."""
    files = {path.stem for path in shared("data", "rows").glob("*.jsonl")}
    assert files == set(SHAPES)
    refused = [shape for shape, (_, _, expected) in SHAPES.items() if isinstance(expected, str)]
    converted = [shape for shape, (_, _, expected) in SHAPES.items() if expected is None]
    assert (len(files), len(refused), len(converted)) == (59, 5, 13)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_published_shape(shape, tmp_path):
    """As JSON lines and as Parquet: the same tokens; or one line that names file, row, field and what to do."""
    script, family, expected = SHAPES[shape]
    chat = chat_of(family)
    path = shared("data", "rows", f"{shape}.jsonl")
    sources = [path]
    if shape != "openai_image_part":  # its `content` is text in one message and parts in another, which no column holds
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        sources.append(tmp_path / f"{shape}.parquet")
        datasets.Dataset.from_list(rows).to_parquet(str(sources[1]))
    for source in sources:
        if expected is None or isinstance(expected, str):
            with pytest.raises(DataError) as caught:
                load(source, script, chat)
            text = str(caught.value)
            assert text.startswith(f"{source}, row 1: ") and "\n" not in text
            assert expected is not None or "python -m pipeline.convert" in text
            assert expected is None or re.search(expected, text)
        else:
            found = load(source, script, chat)
            assert len(found) == expected if script == "grpo" else trained_texts(chat, found) == expected
    if expected is None:
        to = {"sft": "messages", "dpo": "pairs", "grpo": "prompts"}[script]
        source = path if shape not in PARTNERS else write_jsonl(tmp_path / "two.jsonl", PARTNERS[shape])
        convert.main(convert.Args([str(source)], str(tmp_path / "rows.jsonl"), to=to))
        assert len(load(tmp_path / "rows.jsonl", script, chat)) == 1


def test_the_ground_truths_of_published_prompts_are_usable():
    """Lists and constraints as text, names in any case: the verifiers that the rows name take them."""
    jobs = []
    for shape, (script, family, expected) in SHAPES.items():
        if script == "grpo" and isinstance(expected, int):
            rows = load(shared("data", "rows", f"{shape}.jsonl"), script, chat_of(family))
            for job in rows.table["job"]:
                verifier, ground_truth, weights = json.loads(job)
                jobs.append((verifier, None, ground_truth, weights))
    with Pool(1) as pool:
        assert len(jobs) == 7 and pool.check(jobs) == {}


# A row of these shapes is half a pair: it needs another of the same prompt.
QUESTION = [user("What is 2 + 3?")]
PARTNERS = {
    "helpsteer2": [
        {"prompt": "What is 2 + 3?", "response": text, "helpfulness": score, "correctness": 4, "coherence": 4,
         "complexity": 1, "verbosity": 1} for text, score in (("It is 5.", 4), ("6", 1))],
    "kto__TRL_": [{"prompt": QUESTION, "completion": [assistant(text)], "label": label}
                  for text, label in (("It is 5.", True), ("6", False))],
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- messages


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(load_tokenizer(tokenizer_folder("byte_level"), "chatml"))


def with_template(text, content_tokens=(), day=None, **templates):
    """A ChatFormat of the tests' byte-level tokenizer with this template (and a `tool_use` one, say)."""
    tokenizer = load_tokenizer(tokenizer_folder("byte_level"), "chatml")
    tokenizer.chat_template = {"default": text, **templates} if templates else text
    return ChatFormat(tokenizer, content_tokens, day)


def decoded(chat, ids):
    return chat.tokenizer.decode(ids)


TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
NAMED = "{% for m in messages %}{% if m.role in ['developer', 'environment', 'function'] %}{% endif %}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TALK = [user("Hi"), assistant("Ho")]


def test_roles_become_those_that_the_template_knows(chat):
    """`developer` is a system message, `environment` and `function` are tools, unless the template names them."""
    for role, known in (("developer", "system"), ("environment", "tool"), ("function", "tool")):
        message = {"role": role, "content": "x"}
        place = 0 if known == "system" else 1
        messages, expected = TALK.copy(), TALK.copy()
        messages.insert(place, message)
        expected.insert(place, {**message, "role": known})
        assert chat.encode(messages)[0] == chat.encode(expected)[0]
        named = with_template(NAMED + TURN + PROMPT)
        assert f"<|im_start|>{role}\n" in decoded(named, named.encode(messages)[0])
    only = with_template("{% if messages[0]['role'] == 'environment' %}{% endif %}" + TURN + PROMPT)
    ids, _ = only.encode([user("Hi"), {"role": "tool", "content": "x"}, assistant("Ho")])
    assert "<|im_start|>environment\n" in decoded(only, ids)


def test_functions_and_calls_as_text_become_tools_and_calls(chat):
    """OLMo 3's fields, under a template that does not know them; under its own they are shown as they are."""
    schema = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
    messages = [
        {"role": "system", "content": "Be brief.", "functions": json.dumps([schema])},
        user("Weather?"),
        {"role": "assistant", "content": None, "function_calls": 'get_weather(city="Rome", days=[1, 2])\nget_time()'},
        {"role": "environment", "content": "21 C"},
        assistant("21 C."),
    ]
    calls = [("get_weather", {"city": "Rome", "days": [1, 2]}), ("get_time", {})]
    expected = [
        {"role": "system", "content": "Be brief."},
        user("Weather?"),
        assistant("", tool_calls=[{"function": {"name": name, "arguments": given}} for name, given in calls]),
        {"role": "tool", "content": "21 C"},
        assistant("21 C."),
    ]
    assert chat.encode(messages)[0] == chat.encode(expected, [schema])[0]
    for text in ("get_weather('Rome')", "x = 1", "f(**d)", "((("):
        messages[2]["function_calls"] = text
        with pytest.raises(ValueError, match="function_calls is not lines of calls with named arguments"):
            chat.encode(messages)


def test_arguments_as_text_are_read_once(chat):
    """The same tokens as for the object; text for a template that adds it to text; what is no JSON is left out."""
    wants_text = with_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + c.function.arguments }}{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT
    )
    for given in ({"city": "Rome"}, '{"city": "Rome"}', '{"city":"Rome"}'):
        messages = [user("a"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": given}}])]
        for each in (chat, wants_text):
            text = decoded(each, each.encode(messages)[0])
            assert '{"city": "Rome"}' in text
    messages[1]["tool_calls"][0]["function"]["arguments"] = "{city}"
    with pytest.raises(ValueError, match="tool_calls: arguments, column 2: not valid JSON"):
        chat.encode(messages)


def test_weight_and_train_take_a_turn_out(chat):
    """The turn is shown and not trained on; the account says how many rows have one; other values are refused."""
    for switch in ({"weight": 0}, {"train": False}, {"weight": 0.0}):
        messages = [user("a"), assistant("wrong", **switch), user("b"), assistant("right", weight=1, train=True)]
        ids, trained, notes = chat.encode_and_note(messages)
        assert decoded(chat, ids) == decoded(chat, chat.encode([user("a"), assistant("wrong"), *messages[2:]])[0])
        assert decoded(chat, np.array(ids)[trained].tolist()) == "right<|im_end|>"
        assert notes == ["with answers that are shown and not trained on (`weight` 0, `train` false, in a `prompt`)"]
    for switch in ({"weight": 0.5}, {"weight": "0"}, {"train": "no"}, {"train": 2}):
        with pytest.raises(ValueError, match=rf"messages\[1\].{next(iter(switch))} is .*expected 0 or 1"):
            common.check_messages([user("a"), assistant("b", **switch)])


def test_train_turns_last(chat):
    """Only the last turn of a conversation is trained on."""
    row = {"messages": [user("a"), assistant("one"), user("b"), assistant("two")]}
    for turns, expected in (("all", "one<|im_end|>two<|im_end|>"), ("last", "two<|im_end|>")):
        encoded = SftEncoder(chat, 10**6, 100, "truncate", turns)(row)
        assert decoded(chat, np.array(encoded["input_ids"])[encoded["trained"]].tolist()) == expected


def test_a_rows_own_variables_reach_the_template():
    """`chat_template_kwargs`, as an object or JSON; what the template does not read is noted, what is ours refused."""
    chat = with_template("{{ style | default('plain') }}" + TURN + PROMPT)
    encode = SftEncoder(chat, 10**6, 100, "truncate")
    for options in ({"style": "fancy", "unknown": 1, "nothing": None}, '{"style": "fancy", "unknown": 1}'):
        encoded = encode({"messages": TALK, "chat_template_kwargs": options})
        assert decoded(chat, encoded["input_ids"]).startswith("fancy<|im_start|>")
        assert encoded["notes"] == ["with chat_template_kwargs that the template does not read: unknown"]
    for options, message in (({"messages": []}, "is not for a row to set"), ([1], "is a list"), ("{", "column 2")):
        with pytest.raises(ValueError, match=message):
            encode({"messages": TALK, "chat_template_kwargs": options})


def test_options_that_change_the_prompt_change_where_the_answer_begins():
    """An empty thought that the prompt holds under an option is not the model's to write."""
    chat = chat_of("qwen3")
    messages = [user("Hi"), assistant("Ho")]
    for options, expected in ((None, "<think>\n\n</think>\n\nHo<|im_end|>"), ({"enable_thinking": False}, "Ho<|im_end|>")):
        ids, trained = chat.encode(messages, options=options)
        assert decoded(chat, np.array(ids)[trained].tolist()) == expected
        prompt = chat.prompt(messages[:1], options=options)
        assert ids[: len(prompt)] == prompt and trained[len(prompt) :].sum() == trained.sum()


def test_a_template_for_tools_is_taken_when_there_are_tools():
    """As transformers does with `tool_use` beside `default`."""
    plain, tools = "PLAIN" + TURN + PROMPT, "TOOLS{% for t in tools %}{{ t | tojson }}{% endfor %}" + TURN + PROMPT
    chat = with_template(plain, tool_use=tools)
    schema = [{"type": "function", "function": {"name": "f", "description": "d"}}]
    assert decoded(chat, chat.encode(TALK)[0]).startswith("PLAIN")
    assert decoded(chat, chat.encode(TALK, schema)[0]).startswith("TOOLS{")
    assert decoded(chat, chat.prompt(TALK[:1], schema)).startswith("TOOLS{")


def test_thoughts_that_a_template_leaves_out_are_no_silence(chat):
    """In a field of their own, text beside calls, content that is cut: refused by field, with what to do."""
    cuts = with_template(TURN.replace("{{ m.content }}", "{{ m.content.split('THOUGHT')[-1] }}") + PROMPT)
    for each, message, field in (
        (chat, assistant("x", reasoning_content="because"), "reasoning_content"),
        (chat, assistant("x", thinking="because"), "thinking"),
        (cuts, assistant("Let me see. THOUGHT x"), "content"),
    ):
        with pytest.raises(ValueError, match=rf"leaves out messages\[1\].{field}: .*choose a --chat_template"):
            each.encode([user("a"), message])


def test_earlier_turns_may_be_shortened_and_it_is_said():
    """Thoughts of earlier turns dropped: the rest is trained on, and noted; --train_turns last trains the whole one."""
    chat = chat_of("olmo-3-remove-thinking")
    messages = [user("a"), assistant("<think>one</think>\n\nA"), user("b"), assistant("<think>two</think>\n\nB")]
    ids, trained, notes = chat.encode_and_note(messages)
    texts = decoded(chat, np.array(ids)[trained].tolist())
    assert texts == "A<|im_end|>two</think>\n\nB<|im_end|>" and "earlier turns shortened" in " ".join(notes)
    ids, trained, notes = chat.encode_and_note(messages, last_turn_only=True)
    assert decoded(chat, np.array(ids)[trained].tolist()) == "two</think>\n\nB<|im_end|>"
    prompt = chat.prompt(messages[:-1])
    assert ids[: len(prompt)] == prompt and not notes


def test_think_in_content_names_the_flag():
    """`<think>` that stays text where it is a token: the note says which flag makes it one, and the flag does."""
    messages = [user("a"), assistant("<think>\nhm\n</think>\n\nx")]
    notes = chat_of("qwen3").encode_and_note(messages)[2]
    assert any("--content_tokens </think> <think> makes them tokens" in note for note in notes)
    flagged = ChatFormat(chat_of("qwen3").tokenizer, ("<think>", "</think>"))
    ids, trained, notes = flagged.encode_and_note(messages)
    assert notes == [] and ids == flagged.tokenizer.apply_chat_template(messages, return_dict=False)


def test_the_day_in_a_template_is_that_of_the_run(tmp_path):
    """Fixed at the start and kept in OUT/config.json; the key of the cache knows it if the template prints it."""
    dated = "{{ strftime_now('%d %B %Y') }}" + TURN + PROMPT
    first, again, later = (with_template(dated, day=day) for day in ("2026-01-31", "2026-01-31", "2026-02-01"))
    assert decoded(first, first.encode(TALK)[0]).startswith("31 January 2026<|im_start|>")
    assert decoded(later, later.encode(TALK)[0]).startswith("01 February 2026")
    assert decoded(first, first.encode(TALK)[0]).startswith("31 January")  # whichever was used last
    assert first.key == again.key != later.key
    undated = [with_template(TURN + PROMPT, day=day).key for day in ("2026-01-31", "2026-02-01")]
    assert undated[0] == undated[1]
    assert common.start_date(tmp_path) == with_template(dated).date  # today
    config = {"script": "sft.py", "data": ["0", None], "args": {}, "steps": 1, "date": "2025-12-24"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert common.start_date(tmp_path) == "2025-12-24"
    for broken in ("[broken", "[]", "{}", "5"):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(RunError, match=f"^{tmp_path}/config.json is damaged"):
            common.start_date(tmp_path)


def test_all_end_tokens_of_a_template_stop_generation():
    """Those of the last answer, of an earlier one and of a call, and the tokenizer's EOS."""
    for family, expected in (
        ("phi-3.5", ["<|end|>", "<|endoftext|>"]),
        ("gpt-oss", ["<|return|>", "<|end|>", "<|call|>"]),
        ("qwen3", ["<|im_end|>"]),
        ("command-r7b", ["<|END_OF_TURN_TOKEN|>"]),
        ("olmo-3-rlzero", ["<|im_end|>"]),
    ):
        chat = chat_of(family)
        assert chat.tokenizer.convert_ids_to_tokens(chat.stop_ids) == expected, family
    assert chat.end_of_turn is None and chat.untrainable


def test_prompts_need_no_mask():
    """RL takes a template without an end of turn; the other encoders say at the start why they cannot."""
    chat = chat_of("olmo-3-rlzero")
    row = {"messages": [user("2 + 3?")], "dataset": "MATH", "ground_truth": "5"}
    encoded = PromptEncoder(chat, 10**6, 512, "drop")(row)
    assert json.loads(encoded["job"]) == ["MATH", "5", None]
    assert decoded(chat, encoded["input_ids"]).endswith('Remember to put your answer on its own line after "Answer:"')
    for encoder in (SftEncoder, PairEncoder):
        with pytest.raises(common.RunError, match="without an end-of-turn token"):
            encoder(chat, 10**6, 512, "drop")


# ------------------------------------------------------------------------------------------------------- the account


def test_an_example_of_each_source_without_colours_in_a_log(chat, tmp_path, capsys):
    """Two sources, two examples; marks in place of colours where the output is no terminal."""
    one = write_jsonl(tmp_path / "one.jsonl", [{"messages": [user("a"), assistant("from one")]}] * 3)
    two = write_jsonl(tmp_path / "two.jsonl", [{"messages": [user("a"), assistant("from two")]}])

    class Args:
        data, eval_data, seed, max_skip_frac, batch_size, best = [one, two], [], 0, 0.01, 1, None

    common.load_data(Args, SftEncoder(chat, 10**6, 100, "truncate"), 1)
    out = capsys.readouterr().out
    assert out.count("⟦from one<|im_end|>⟧") == out.count("⟦from two<|im_end|>⟧") == 1 and "\033" not in out


def test_many_reasons_are_counted_and_ten_are_named(chat, tmp_path):
    """12 bad rows of a thousand with 12 reasons: the run goes on, none is silent."""
    good = {"messages": TALK}
    bad = [{"messages": [user("a"), {"role": f"nobody{i}", "content": "x"}]} for i in range(12)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*[good] * 1000, *bad])
    rows = load_rows([path], SftEncoder(chat, 10**6, 100, "truncate"), max_skip_frac=0.02)
    assert len(rows) == 1000 and rows.report[0] == f"{path}: 1012 rows read, 1000 kept"
    assert rows.report[1].strip().startswith("1 skipped: messages[1].role is 'nobody0', expected one of")
    assert rows.report[1].endswith("(first: row 1001)")
    assert rows.report[-1].strip() == "2 skipped for 2 other reasons"


class Forked(SftEncoder):
    """An encoder of a module of its own, as a fork has it."""


def test_the_cache_knows_the_source_of_the_encoders_own_module(chat, tmp_path, monkeypatch):
    """An edited encoder does not find the old tokens."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": TALK}])
    source = tmp_path / "fork.py"
    source.write_text("one = 1")
    monkeypatch.setattr(common.inspect, "getsourcefile", lambda kind: str(source) if kind is Forked else inspect.getfile(kind))
    encoded = []
    monkeypatch.setattr(Forked, "__call__", lambda self, row: encoded.append(row) or SftEncoder.__call__(self, row))
    for text, expected in (("one = 1", 1), ("one = 1", 1), ("two = 2", 2), ("one = 1", 2)):
        source.write_text(text)
        load_rows([path], Forked(chat, 10**6, 100, "truncate"))
        assert len(encoded) == expected


# ------------------------------------------------------- what was lost in silence once, found by trying to make it so


def call(name, given, i=1):
    return {"id": f"call{i:05d}", "type": "function", "function": {"name": name, "arguments": given}}


def schema(*names):
    properties = {name: {"type": "string", "description": "x"} for name in names}
    parameters = {"type": "object", "properties": properties}
    return [{"type": "function", "function": {"name": "f", "description": "A function.", "parameters": parameters}}]


CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
CALLING = TURN.replace("{{ m.content }}", "{{ m.content or '' }}" + CALLS)


def test_shielding_changes_no_order():
    """Gemma 4 sorts its parameters; `n` is a part of its control strings. Where names are compared, it is refused."""
    chat = chat_of("gemma-4")
    for names in (("n", "z"), ("to", "id", "a"), ("s", "turn", "tool")):
        ids = chat.prompt([user("q")], schema(*names))
        kwargs = {"tools": schema(*names), "add_generation_prompt": True, "return_dict": False}
        assert ids == chat.tokenizer.apply_chat_template([user("q")], **kwargs)
    compares = with_template(CALLING.replace("{{ c.function.name }}", "{{ 'X' if c.function.name == 'im' else 'Y' }}im") + PROMPT)
    with pytest.raises(ValueError, match="sorts or compares text"):
        compares.encode([user("q"), assistant("", tool_calls=[call("im", {"city": "Rome"})])])


def test_each_call_of_a_turn_has_to_be_shown():
    """Of several calls, beside text, in a later turn: a call that the template leaves out is an error."""
    two = assistant("", tool_calls=[call("f", {"city": "Oslo"}), call("f", {"city": "Rome"}, 2)])
    beside = assistant("Let me look.", tool_calls=[call("f", {"city": "Oslo"})])
    first = with_template(CALLING.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]") + PROMPT)
    either = with_template(TURN.replace("{{ m.content }}", "{% if m.content %}{{ m.content }}{% else %}" + CALLS + "{% endif %}") + PROMPT)
    oss, r1 = chat_of("gpt-oss"), chat_of("deepseek-r1")
    for chat, message, tools in ((first, two, None), (either, beside, None), (oss, two, schema("city")), (r1, beside, None)):
        with pytest.raises(ValueError, match=r"leaves out a call of messages\[1\]"):
            chat.encode([user("Weather?"), message], tools)
    everything = with_template(CALLING + PROMPT)
    odd = {"city": 'O"slo\nR\u00f6me', "n": 3, "list": [{"x": "y z"}]}
    ids, trained = everything.encode([user("Weather?"), assistant("", tool_calls=[call("f", odd)])])
    assert "O\\\"slo\\nR\u00f6me" in decoded(everything, np.array(ids)[trained].tolist())


def test_a_thought_is_not_taken_for_a_part_of_the_answer(chat):
    """The thought "5" stands in "It is 5." and is lost all the same."""
    with pytest.raises(ValueError, match=r"leaves out messages\[1\].reasoning_content"):
        chat.encode([user("2 + 3?"), assistant("It is 5.", reasoning_content="5")])


def test_a_prompt_that_depends_on_what_is_said():
    """SmolLM3's prompt holds an empty thought after /no_think: it is not the model's to write."""
    chat = chat_of("smollm3")
    messages = [{"role": "system", "content": "/no_think"}, user("What is 2 + 3?"), assistant("It is five.")]
    ids, trained, notes = chat.encode_and_note(messages)
    prompt = chat.prompt(messages[:2])
    assert ids[: len(prompt)] == prompt and not notes
    assert decoded(chat, np.array(ids)[trained].tolist()) == "It is five.<|im_end|>"


def test_a_thought_that_ends_with_the_answer():
    """In messages of their own, both with an end token, as Harmony has them: both are trained, in every turn."""
    message = "{{ '<|im_start|>assistant:' + kind + '\\n' + text + '<|im_end|>' }}"
    chat = with_template(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking %}"
        + message.replace("kind", "'think'").replace("text", "m.thinking") + "{% endif %}"
        + message.replace("kind", "'say'").replace("text", "m.content")
        + "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )  # fmt: skip
    turn = assistant("It is 5.", thinking="Two and three. So: It is 5.")
    ids, trained, notes = chat.encode_and_note([user("a"), turn, user("b"), assistant("No.")])
    both = "think\nTwo and three. So: It is 5.<|im_end|><|im_start|>assistant:say\nIt is 5.<|im_end|>"
    assert decoded(chat, np.array(ids)[trained].tolist()) == both + "say\nNo.<|im_end|>" and not notes


def test_functions_reach_a_template_that_only_prints_the_word(chat):
    """gpt-oss has "functions" as text in its template, not as a field: they are tools there. Calls may be a list."""
    oss, tools = chat_of("gpt-oss"), schema("city")
    messages = [{"role": "system", "content": "Be brief.", "functions": json.dumps(tools)}, user("Weather?")]
    assert oss.prompt(messages) == oss.prompt([{"role": "system", "content": "Be brief."}, user("Weather?")], tools)
    calls = [call("f", {"city": "Rome"})]
    expected = chat.encode([user("a"), assistant("", tool_calls=calls)])[0]
    assert chat.encode([user("a"), {"role": "assistant", "content": None, "function_calls": calls}])[0] == expected
    with pytest.raises(ValueError, match="function_calls is not lines of calls"):
        chat.encode([user("a"), assistant("x", function_calls={"f": 1})])


def test_arguments_that_a_template_prints_are_json():
    """Not Python's own form of a dict, which nobody meant."""
    chat = with_template(CALLING.replace("c.function.arguments | tojson", "c.function.arguments") + PROMPT)
    messages = [user("a"), assistant("", tool_calls=[call("f", '{"city": "Rome"}')])]
    assert chat.encode(messages)[0] == chat.tokenizer.apply_chat_template(messages, return_dict=False)


def test_tools_are_looked_for_with_and_without_a_system_message():
    """A template that shows them in one of the two places is trusted there, and only there."""
    system = {"role": "system", "content": "Be brief."}
    for condition, shown, lost in (("!=", TALK, [system, *TALK]), ("==", [system, *TALK], TALK)):
        chat = with_template("{% if messages[0].role " + condition + " 'system' and tools %}{{ tools | tojson }}{% endif %}" + TURN + PROMPT)
        tools = [{"type": "function", "function": {"name": "f", "description": "A function."}}]
        assert "A function." in decoded(chat, chat.encode(shown, tools)[0])
        with pytest.raises(ValueError, match="leaves out tools"):
            chat.encode(lost, tools)


def test_a_rows_variables_are_content(chat):
    """Control strings in them stay text; names that are transformers' own are refused."""
    custom = with_template("{{ custom }}" + TURN + PROMPT)
    ids, _, notes = custom.encode_and_note(TALK, options={"custom": "say <|im_end|> now"})
    plain = custom.encode(TALK, options={"custom": "say nothing now"})[0]
    end = custom.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == plain.count(end) and "with control strings in content, kept as text" in notes
    for name in ("continue_final_message", "bos_token", "return_assistant_tokens_mask", "tools"):
        with pytest.raises(ValueError, match=f"chat_template_kwargs.{name} is not for a row to set"):
            common.read_options({"chat_template_kwargs": {name: 1}})


def test_other_forms_of_rows(chat):
    """Answers in a `prompt` are not trained on; a `system` column; conversations as JSON text wherever they may be."""
    encode = SftEncoder(chat, 10**6, 200, "truncate")
    row = encode({"prompt": [user("a"), assistant("earlier"), user("b")], "completion": [assistant("later")]})
    assert decoded(chat, np.array(row["input_ids"])[row["trained"]].tolist()) == "later<|im_end|>"
    row = encode({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "role": None}], "system": "Be brief."})
    expected = encode({"messages": [{"role": "system", "content": "Be brief."}, user("a"), assistant("b")]})
    assert row["input_ids"] == expected["input_ids"]
    pairs = PairEncoder(chat, 10**6, 200, "truncate")
    good, bad = [assistant("good")], [assistant("bad")]
    given = pairs({"prompt": json.dumps([user("a")]), "chosen": json.dumps(good), "rejected": json.dumps(bad)})
    assert given["input_ids"] == pairs({"prompt": "a", "chosen": "good", "rejected": "bad"})["input_ids"]
    literal = pairs({"prompt": '[{"a": 1}]', "chosen": "x", "rejected": "y"})  # a question about JSON
    assert '[{"a": 1}]' in decoded(chat, literal["input_ids"])


def test_no_bad_row_ends_a_run(chat, tmp_path):
    """Whatever is wrong with it: left out and counted, with the field."""
    bad = {
        "reasoning is an object": {"messages": [user("a"), assistant("b", reasoning={"effort": "high"})]},
        "thinking is a boolean": {"messages": [user("a"), assistant("b", thinking=True)]},
        "images is not empty": {"messages": [{**user("a"), "images": ["x.png"]}, assistant("b")]},
        r"role is \['gpt'\]": {"conversations": [{"from": "human", "value": "a"}, {"from": ["gpt"], "value": "b"}]},
        "takes all out": {"messages": [user("a"), assistant("b", weight=0)]},
        "functions is a number": {"messages": TALK, "functions": 5},
    }
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": TALK, "functions": "[]"}, *bad.values()])
    rows = load_rows([path], SftEncoder(chat, 10**6, 100, "truncate"), max_skip_frac=1.0)
    assert len(rows) == 1
    for i, message in enumerate(bad, start=2):
        assert any(re.search(f"1 skipped: .*{message}.*row {i}", line) for line in rows.report), message
    with pytest.raises(ValueError, match="images is not empty"):
        PromptEncoder(chat, 10**6, 100, "drop")({"prompt": "a", "dataset": "exact", "ground_truth": "x", "images": ["x.png"]})
    table = datasets.Dataset.from_list([{"prompt": "a", "dataset": "exact", "ground_truth": b"x"}])
    table.to_parquet(str(tmp_path / "bytes.parquet"))
    with pytest.raises(DataError, match="row 1: dataset, ground_truth or weights: .*bytes"):
        load_rows([str(tmp_path / "bytes.parquet")], PromptEncoder(chat, 10**6, 100, "drop"))


def test_a_block_that_marks_less_than_the_turn_is_noted():
    """`{% generation %}` around the last answer only, and around all but the thoughts."""
    marks = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    turn = TURN.replace("{{ m.content }}<|im_end|>", "{% if m.role == 'assistant' %}{{ m.thinking or '' }}" + marks
                        + "{% else %}{{ m.content }}<|im_end|>{% endif %}")  # fmt: skip
    chat = with_template(turn + PROMPT)
    assert chat.encode_and_note(TALK)[2] == []
    ids, trained, notes = chat.encode_and_note([user("a"), assistant("b", thinking="because\n")])
    assert decoded(chat, np.array(ids)[trained].tolist()) == "b<|im_end|>"
    assert notes == ["with parts of answers that the template's {% generation %} leaves out"]


def test_tools_that_move_to_the_last_question():
    """Mistral's templates show tools before the last question only, and write no header: each answer is found."""
    chat, messages = chat_of("mistral-v3"), [user("q"), assistant("Hi."), user("w"), assistant("Sunny.")]
    ids, trained, notes = chat.encode_and_note(messages, schema("city"))
    assert decoded(chat, np.array(ids)[trained].tolist()) == "Hi.</s>Sunny.</s>"
    assert notes == ["with a prompt that is rendered differently once the answer follows"]
