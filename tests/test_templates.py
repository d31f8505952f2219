"""The chat templates of 75 model families, with 21 conversations each: what is trained, and what is refused and why.

The templates, tokenizers and conversations are test data (../shared/data/chat_templates). `docs/templates.md` is the
table: `python tests/test_templates.py` writes it, and a slow test finds it unchanged. A few families are run in CI.
"""

import importlib.util
import itertools
import json
import random
import re
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from conftest import SHARED, shared, tokenizer_folder  # noqa: E402

import common  # noqa: E402

ROOT = Path(__file__).parents[1]
FOLDER = SHARED / "data" / "chat_templates"
TABLE = ROOT / "docs" / "templates.md"
# Each has something of its own: a thought opened by the prompt, thoughts in a field, several end tokens, marks, two
# templates' worth of BOS, no control string in the header, white space eaten by control strings, tools only, no mask.
SAMPLE = ["qwen3", "qwen3.5-4b", "gpt-oss", "phi-3.5", "gemma-4", "deepseek-v3", "llama-2", "mistral-v3", "tulu-3",
          "olmo-3-thinker-eos", "olmo-3-rlzero", "glm-4.5", "hermes-2-pro-tool", "trl-train:glm4moe", "chatml-smollm2"]  # fmt: skip


def load(name):
    shared("data", "chat_templates")
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lru_cache
def chat_of(name):
    """The ChatFormat of a family."""
    folder = load("build").build(name, tempfile.mkdtemp())
    return common.ChatFormat(common.load_tokenizer(folder))


def squeeze(text):
    return "".join(text.split())


def spans_of(ids, trained):
    """[(start, end), …] of the runs of trained tokens."""
    edges = np.flatnonzero(np.diff([0, *trained.astype(int), 0]))
    return list(zip(edges[::2], edges[1::2], strict=True))


def reference_ids(chat, name, conversations):
    """What transformers makes of it. Arguments that are JSON text are meant as the object that they are."""
    messages, tools = conversations[name]
    if name == "tools_str" and not chat.template.wants_text:
        messages, tools = conversations["tools"]
    return chat.tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)


def check(chat, name, conversations):
    """Encodes one conversation and checks everything that can be said of it. Returns the cell of the table."""
    messages, tools = conversations[name]
    try:
        ids, trained, notes = chat.encode_and_note(messages, tools)
    except ValueError as error:
        assert "\n" not in str(error)
        return reason(str(error))

    def decode(part):
        return squeeze(chat.tokenizer.decode(part))

    answers = [message for message in messages if message["role"] == "assistant"]
    spans = spans_of(ids, trained)
    if name == "two_assistants" and len(spans) == 1:  # nothing between them
        first = next(i for i in range(*spans[0]) if ids[i] in chat.stop_ids) + 1
        spans = [(spans[0][0], first), (first, spans[0][1])]
    assert len(spans) == len(answers)
    shortened = any("shortened" in note for note in notes)
    for k, ((start, end), message) in enumerate(zip(spans, answers, strict=True)):
        said = decode(ids[start:end])
        assert ids[end - 1] in chat.stop_ids  # it ends with an end token, and nothing comes behind it
        assert not any(i in chat.stop_ids for i in ids[start : end - 1]) or "gpt" in chat.tokenizer.name_or_path
        if k == len(spans) - 1 or not shortened:
            opening = squeeze(chat.template.opening)
            for text in (message.get("content"), message.get("reasoning_content"), message.get("thinking")):
                assert squeeze(text or "").removeprefix(opening) in said or squeeze(text) in said
        for call in message.get("tool_calls", []):
            function = call["function"]
            cities = re.findall("Rome|Oslo", json.dumps(function["arguments"]))
            assert function["name"] in said and all(city in said for city in cities)
        for other in messages:  # and nobody else's text
            if other["role"] in ("user", "system"):
                assert squeeze(other["content"]) not in said
    rest = decode([i for i, is_trained in zip(ids, trained, strict=True) if not is_trained])
    for message in answers:
        assert len(message.get("content") or "") < 5 or squeeze(message["content"]) not in rest
    if name != "control" and not any("kept as text" in note for note in notes):
        try:
            assert ids == reference_ids(chat, name, conversations)
        except Exception as error:  # arguments as text, calls without content: transformers lets the template fail
            assert not isinstance(error, AssertionError)
    check_prompt(chat, messages, tools, ids, spans, notes)
    return "ok" if not notes else "noted"


def check_prompt(chat, messages, tools, ids, spans, notes):
    """The last answer's prompt is what stands before it; or the account says so."""
    if messages[-1]["role"] != "assistant" or messages[-2]["role"] == "assistant":
        return
    prompt = chat.prompt(messages[:-1], tools)
    if any(word in note for note in notes for word in ("crosses", "go on as", "differently", "shortened")):
        return
    assert ids[: len(prompt)] == prompt and spans[-1][0] == len(prompt)


def reason(error):
    """A refusal, short enough for a table."""
    for words in ("leaves out", "rejects", "differently once the answer", "differently once another", "without an end"):
        if words in error:
            return {"leaves out": "drops", "rejects": "rejects", "without an end": "no end"}.get(words, "differs")
    raise AssertionError(f"a refusal without one of the known reasons: {error}")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_family_with_all_conversations(name):
    """A sample in CI: spans, ids, prompts and reasons as `check` wants them, and the line of the table."""
    assert line(name) in TABLE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_all_families():
    """The whole table is as committed; at least 70 of 75 can be trained with, and all but none asked in RL."""
    assert table() == TABLE.read_text(encoding="utf-8")
    names = json.loads((FOLDER / "specs.json").read_text())
    assert sum(not chat_of(name).untrainable for name in names) >= 70


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in (
    json.loads((FOLDER / "specs.json").read_text()) if FOLDER.exists() else SAMPLE)])  # fmt: skip
def test_no_control_token_comes_from_content(name):
    """Control strings in questions and answers stay text: the control ids are those of a harmless conversation."""
    chat = chat_of(name)
    tools = chat.template.plain[1]
    controls = set(map(chat.tokenizer.convert_tokens_to_ids, chat.controls.all))
    found = []
    for text in (" ".join(sorted(chat.controls.all)), "harmless"):
        messages = [{"role": "user", "content": f"a {text} b"}, {"role": "assistant", "content": f"c {text} d"}]
        ids = chat.prompt(messages[:1], tools) if chat.untrainable else chat.encode(messages, tools)[0]
        found.append([i for i in ids if i in controls])
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------------- against an oracle

HEADERS = {  # how a turn of the assistant is written, marked: what is between the marks is what the model has to write
    "chatml": "<|im_start|>assistant\n«THOUGHT{{ m.content }}CALLS<|im_end|>»\n",
    "plain header": "<|assistant|>\n«THOUGHT{{ m.content }}CALLS</s>»\n",
    "no control string but the end": "### Response:\n«THOUGHT{{ m.content }}CALLS</s>»\n\n",
    "trimmed": "ASSISTANT:« THOUGHT{{ m.content | trim }}CALLS</s>»",
    "no header": "«THOUGHT{{ m.content }}CALLS</s>»",
}
OTHERS = {
    "chatml": "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
    "plain header": "<|{{ m.role }}|>\n{{ m.content }}</s>\n",
    "no control string but the end": "### {{ m.role }}:\n{{ m.content }}\n\n",
    "trimmed": "{{ m.role | upper }}: {{ m.content | trim }} ",
    "no header": "[INST]{{ m.content }}[/INST]",
}
THOUGHT = {
    "always": "{% if m.thinking %}T: {{ m.thinking }}\n{% endif %}",
    "only in the last turn": "{% if m.thinking and loop.last %}T: {{ m.thinking }}\n{% endif %}",
}
CALLS = "{% for c in m.tool_calls or [] %}CALL {{ c.function | tojson }}{% endfor %}"
# Texts that look like pieces of these templates, of each other, and of control strings.
ATOMS = ["a", "b", "aa", "ab", "<", ">", "a\n", "\na", " a ", "### Response:\n", "<|assistant|>\n", "<|assistant|>\na",
         "ASSISTANT:", "ASSISTANT: a", "T: a", "T: ", "a</s>", "</s>", "<|im_start|>assistant\n", "[/INST]", "[INST]a", "CALL",
         "é", "😀", "5", " </think>", "<think>a", "{", "a.", "\n\n", "<|im_end|>", "assistant", "im_end"]  # fmt: skip


def hostile_conversation(rng):
    """Several turns of such texts, with thoughts and calls."""

    def text():
        said = "".join(rng.choice(ATOMS) for _ in range(rng.choice([1, 1, 1, 2, 3])))
        return said if said.strip() else "a"

    messages = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": text()})
    if rng.random() < 0.15:
        messages.append({"role": "assistant", "content": text()})
    for _ in range(rng.randrange(1, 4)):
        messages.append({"role": "user", "content": text()})
        answer = {"role": "assistant", "content": text()}
        if rng.random() < 0.4:
            answer["thinking"] = text()
        if rng.random() < 0.3:
            answer["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {"x": text()}}}]
            messages += [answer, {"role": "tool", "content": text()}]
            answer = {"role": "assistant", "content": text()}
        messages.append(answer)
    return messages


def make(name, thought, marked, kind):
    """The ChatFormat of such a template, with `{% generation %}` in place of the marks or without."""
    turn = HEADERS[name].replace("THOUGHT", THOUGHT[thought]).replace("CALLS", CALLS)
    header = turn[: turn.index("«")]
    turn = turn.replace("«", "{% generation %}" if marked else "").replace("»", "{% endgeneration %}" if marked else "")
    text = "{% for m in messages %}{% if m.role == 'assistant' %}" + turn + "{% else %}" + OTHERS[name] + "{% endif %}{% endfor %}"
    tokenizer = common.load_tokenizer(tokenizer_folder(kind), "chatml")
    # A line break behind a block would go with it: Jinja's trim_blocks.
    tokenizer.chat_template = text.replace("%}\n", "%}{{ '\n' }}") + "{% if add_generation_prompt %}" + header + "{{ '' }}{% endif %}"
    return common.ChatFormat(tokenizer)


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "unigram"])
@pytest.mark.parametrize("thought", THOUGHT)
@pytest.mark.parametrize("name", HEADERS)
def test_hostile_conversations_under_a_template_and_its_marked_twin(name, thought, kind, count):
    """Without marks, the same ids and the same mask as the marks of the twin give; or the conversation is refused."""
    plain, marked = make(name, thought, False, kind), make(name, thought, True, kind)
    refused = 0
    for seed in range(count):
        messages = hostile_conversation(random.Random(seed))
        try:
            ids, trained = plain.encode(messages)
        except ValueError as error:
            assert reason(str(error)) in ("differs", "drops"), (seed, error)
            refused += 1
            continue
        text, marks = marked.template.render(marked.template.view(messages))
        cuts = [0, *(cut for span in marks for cut in span), len(text)]
        expected, firsts, _ = marked.controls.encode([text[a:b] for a, b in itertools.pairwise(cuts)])
        mask = np.zeros(len(expected), dtype=bool)
        for start, end in zip(firsts[::2], firsts[1::2], strict=True):
            mask[start:end] = True
        assert ids == expected and trained.tolist() == mask.tolist(), seed
    assert refused <= 0.2 * count


def line(name):
    """The line of a family in the table."""
    chat = chat_of(name)
    conversations = load("conversations").CONV
    if chat.untrainable:
        question = [message for message in conversations["single"][0] if message["role"] == "user"]
        assert chat.prompt(question, chat.template.plain[1])
        return f"| {name} | prompts only: {reason(chat.untrainable)} |" + " |" * len(conversations)
    cells = [check(chat, conversation, conversations) for conversation in conversations]
    return f"| {name} | trains | {' | '.join(cells)} |"


def table():
    conversations = load("conversations").CONV
    names = json.loads((FOLDER / "specs.json").read_text())
    lines = [
        "# Chat templates that were tried",
        "",
        "Written by `python tests/test_templates.py`, from templates and conversations that are not part of this project.",
        "*ok*: trained are exactly the assistant's turns and their end tokens, the ids are those of `apply_chat_template`,",
        "and the prompt is what stands before the last answer. *noted*: also, but the account at the start has something",
        "to say (a prompt that is no prefix, a shortened turn, control strings kept as text). Otherwise the row is left",
        "out, with a reason: *rejects* (the template raises), *drops* (it leaves a message, a thought or a tool out),",
        "*differs* (turns cannot be told apart), *no end* (the turn has no end token). *prompts only*: for GRPO and PPO.",
        "",
        f"| template | start | {' | '.join(conversations)} |",
        "|---" * (len(conversations) + 2) + "|",
    ]
    return "\n".join([*lines, *map(line, names)]) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
