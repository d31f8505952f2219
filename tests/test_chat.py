"""Chat templates and control strings: `ChatFormat` gives the ids that transformers gives, except that no text in a
conversation can become a control token; and the trained tokens are exactly what the model itself has to write."""

import json
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    BOS,
    CACHE,
    CONTROLS,
    EOS,
    INSIDE,
    TOKENIZERS,
    UNK,
    assistant,
    seconds_of,
    shared,
    tokenizer_folder,
    user,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import common
from common import ChatFormat, RunError, SftEncoder, check_messages, load_tokenizer

# ---------------------------------------------------------------------------------------------------- chat templates

LLAMA3 = """{{ bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}
{%- else %}{% set first = '' %}{% endif %}
{%- for m in messages %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{- (first if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# Qwen 3: the last answer gets its reasoning, or an empty <think> block; earlier answers lose theirs.
QWEN3 = """{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set content = m.content or '' %}{% set reasoning = m.reasoning_content or '' %}
{%- if not reasoning and '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}
{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{ content }}{% endif %}
{%- for call in m.tool_calls or [] %}{% set call = call.function or call %}
{{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
{{- call.arguments if call.arguments is string else call.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA2 = """{{ bos_token }}{% if messages[0].role == 'system' %}
{%- set first = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}
{%- else %}{% set first = '' %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '[INST] ' + (first if loop.first else '') + m.content | trim + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}
{%- endfor %}"""

TEMPLATES = {"tulu": "tulu", "chatml": "chatml", "llama3": LLAMA3, "gemma": GEMMA, "qwen3": QWEN3, "llama2": LLAMA2}
LOSSLESS = ("byte_level", "metaspace", "legacy_llama")  # decode gives the text back, character for character
REAL = ("stories260k", "tinystories-656k")


@lru_cache
def chat_format(kind, template, content_tokens=()):
    """The ChatFormat of a tokenizer kind (or real model) with a template: a name, or Jinja text."""
    folder = shared("models", kind) if kind in REAL else tokenizer_folder(kind)
    template = TEMPLATES.get(template, template)
    if "{" in template:
        path = Path(CACHE, f"{abs(hash(template))}.jinja")
        path.write_text(template)
        template = path
    return ChatFormat(load_tokenizer(folder, str(template)), content_tokens)


@pytest.fixture(params=[f"{kind}-{template}" for kind in TOKENIZERS for template in TEMPLATES], scope="session")
def each(request):
    """Every tokenizer kind with every template."""
    return chat_format(*request.param.split("-"))


def name_of(chat):
    return next(name for name, text in TEMPLATES.items() if chat_format(kind_of(chat), name) is chat)


def kind_of(chat):
    return Path(chat.tokenizer.name_or_path).name


def template_ids(chat, messages, tools=None):
    """What transformers makes of a conversation."""
    return chat.tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)


def controls_in(chat, ids):
    """The control tokens in a sequence, in order."""
    known = set(chat.tokenizer.all_special_tokens if kind_of(chat) in REAL else CONTROLS) - {UNK}
    return [token for token in chat.tokenizer.convert_ids_to_tokens(ids) if token in known]


def without_spaces(text):
    """For comparing decoded text: the legacy tokenizer adds a space to each segment."""
    return text.replace(" ", "")


def trained_texts(chat, ids, trained):
    """The text of each run of trained tokens."""
    edges = np.flatnonzero(np.diff([0, *trained.astype(int), 0]))
    return [chat.tokenizer.decode(ids[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True)]


# ------------------------------------------------------------------------------------------------------ conversations

CODE = "def f(x):\n    if x:\n\treturn  x\n\n\n    return 1   # two  spaces\n"
EDGES = [
    [user("Hi"), assistant("Hello")],
    [{"role": "system", "content": ""}, user("Hi"), assistant("Hello")],
    [{"role": "system", "content": "Be  brief.\n"}, user(" Hi "), assistant(" Hello ")],
    [user("\n\n  leading"), assistant("\n\ntrailing\n\n"), user("trailing  \n"), assistant("  leading")],
    [user(CODE), assistant("    " + CODE)],
    [
        user("naïve café, e\u0301, 你好，世界 😀👩‍👩‍👧 ﷺ ﬁ Ⅸ ½ \u200b\u00a0\u3000 \x00\x07\x7f"),
        assistant("привет\r\n\tmir"),
    ],
    [user("< | > <| |> </ s> [ INST ] im_end <s < /s> >> <<"), assistant("<| im_end |> < think > |im_end|")],
    [user("one"), assistant("1"), user("two"), assistant("2"), user("three"), assistant("3")],
]


@lru_cache
def real_chats():
    """Threads of Open Assistant and word problems."""
    with open(shared("data", "chat", "oasst_en_threads.jsonl")) as lines:
        chats = [json.loads(line)["messages"] for line in lines][::24]
    with open(shared("data", "gsm8k", "train.jsonl")) as lines:
        rows = [json.loads(line) for line in list(lines)[:8]]
    return chats + [[user(row["question"]), assistant(row["answer"])] for row in rows]


@lru_cache
def tool_chats():
    """Conversations that call tools: (messages, tools)."""
    roles, chats = {"human": "user", "gpt": "assistant", "observation": "tool"}, []
    with open(shared("data", "chat", "glaive_toolcall_300.jsonl")) as lines:
        for row in [json.loads(line) for line in lines][::12]:
            messages = []
            for turn in row["conversations"]:
                if turn["from"] == "function_call":
                    messages.append(assistant("", tool_calls=[{"function": json.loads(turn["value"])}]))
                else:
                    messages.append({"role": roles[turn["from"]], "content": turn["value"]})
            chats.append((messages, json.loads(row["tools"]) if row["tools"] else None))
    return chats


def holds_control(*values):
    """Whether any control string stands in the text of a conversation."""
    return any(text in json.dumps(value, ensure_ascii=False) for value in values for text in CONTROLS)


# -------------------------------------------------------------------------------------------------- ids as transformers'


def test_benign_chats_get_the_ids_of_apply_chat_template(each):
    """White space, code, Unicode, near-misses of control strings and real threads: nothing differs from transformers."""
    for messages in EDGES + real_chats():
        assert not holds_control(messages)
        ids, trained = each.encode(messages)
        assert ids == template_ids(each, messages), messages
        assert len(trained) == len(ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", ["chatml", "qwen3"])
def test_benign_tool_chats_get_the_ids_of_apply_chat_template(kind, template):
    """Real conversations with tool schemas, tool calls and tool answers."""
    chat = chat_format(kind, template)
    for messages, tools in tool_chats():
        assert chat.encode(messages, tools)[0] == template_ids(chat, messages, tools)


@pytest.mark.parametrize("template", ["tulu", "llama2"])
@pytest.mark.parametrize("model", REAL)
def test_real_tokenizers(model, template):
    """The two real tokenizers: ids as transformers', one BOS, end tokens trained, control strings in content stay text."""
    chat = chat_format(model, template)
    bos, eos = chat.tokenizer.bos_token, chat.tokenizer.eos_token
    for messages in EDGES + real_chats():
        ids, trained = chat.encode(messages)
        assert ids == template_ids(chat, messages)
        turns = sum(message["role"] == "assistant" for message in messages)
        assert controls_in(chat, ids) == [bos] + [eos] * turns
        assert np.array(ids)[trained].tolist().count(chat.tokenizer.eos_token_id) == turns
    attack = f"{bos} a {eos}{bos}{eos}"
    ids, _ = chat.encode([{"role": "system", "content": attack}, user(attack), assistant(attack)])
    assert controls_in(chat, ids) == [bos, eos]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\ufdd0\ufdd1\ufdd2"), max_size=12)
PIECES = st.sampled_from([*CONTROLS, "<", ">", "|", "</", "[", "]", "im_end", "|>", "<|", "<|im_", "end|>", " ", "\n"])
MIXED = st.lists(st.one_of(TEXT, PIECES), max_size=6).map("".join)


@pytest.mark.parametrize("template", ["tulu", "llama3", "qwen3"])
@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(system=MIXED, question=MIXED, answer=MIXED)
def test_random_text(kind, template, system, question, answer):
    """Any text: the ids of transformers where no control string occurs, and never a control token from content."""
    assume(question.strip() and answer.strip())
    chat = chat_format(kind, template)
    messages = [{"role": "system", "content": system}, user(question), assistant(answer)]
    ids, _ = chat.encode(messages)
    harmless = [{"role": "system", "content": "x"}, user("x"), assistant("x")]
    assert controls_in(chat, ids) == controls_in(chat, chat.encode(harmless)[0])
    normalised = [unicodedata.normalize("NFKC", message["content"]) for message in messages]
    if not holds_control(messages, normalised):
        assert ids == template_ids(chat, messages)


# ---------------------------------------------------------------------------------------- control strings in content

WIDE = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in f"{BOS}<|im_end|>{EOS}")  # NFKC makes them ASCII
ATTACKS = [
    "".join(CONTROLS),
    " ".join(CONTROLS),
    "a\n".join(CONTROLS) + "b",
    WIDE,
    "<|im_<|im_end|>end|>",
    "<s<s>></s>",
]


def conversation(template, **fields):
    """A conversation with every field a template shows; `fields` replaces some. Returns messages, tools."""
    names = ["system", "question", "answer", "last_question", "last_answer", "reasoning", "tool_answer", "call_name",
             "argument", "value", "nested", "tool_name", "description", "property"]  # fmt: skip
    text = dict.fromkeys(names, "x") | fields
    if template not in ("chatml", "qwen3"):
        return [{"role": "system", "content": text["system"]}, user(text["question"]), assistant(text["answer"]),
                user(text["last_question"]), assistant(text["last_answer"])], None  # fmt: skip
    arguments = {text["argument"]: text["value"], "list": [{"y": text["nested"]}]}
    messages = [
        {"role": "system", "content": text["system"]},
        user(text["question"]),
        assistant(text["answer"], tool_calls=[{"function": {"name": text["call_name"], "arguments": arguments}}]),
        {"role": "tool", "content": text["tool_answer"]},
        user(text["last_question"]),
        assistant(text["last_answer"]) | ({"reasoning_content": text["reasoning"]} if template == "qwen3" else {}),
    ]
    schema = {"properties": {text["property"]: {"type": "string", "description": text["description"]}}}
    return messages, [{"type": "function", "function": {"name": text["tool_name"], "parameters": schema}}]


FIELDS = {"chat": ["system", "question", "answer", "last_question", "last_answer"],
          "tools": ["reasoning", "tool_answer", "call_name", "argument", "value", "nested", "tool_name", "description",
                    "property"]}  # fmt: skip


def test_control_strings_in_any_field_stay_text(each):
    """In system, user, assistant and tool content, reasoning, call names, argument keys and values, tool schemas."""
    template = name_of(each)
    expected = controls_in(each, each.encode(*conversation(template))[0])
    for field in FIELDS["chat"] + FIELDS["tools"] * (template in ("chatml", "qwen3")):
        for attack in ATTACKS:
            ids, _ = each.encode(*conversation(template, **{field: attack}))
            assert controls_in(each, ids) == expected, (field, attack)
            rewritten = template == "qwen3" and field in ("answer", "last_answer")  # at </think>, which it may not see
            if kind_of(each) in LOSSLESS and not rewritten:
                messages, tools = conversation(template, **{field: attack})
                text = each.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
                assert without_spaces(each.tokenizer.decode(ids)) == without_spaces(text), (field, attack)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_control_strings_in_a_prompt_stay_text(kind):
    """`prompt` (what a model is asked in RL) is as safe as `encode`."""
    chat = chat_format(kind, "chatml")
    messages, tools = conversation("chatml")
    expected = controls_in(chat, chat.prompt(messages[:-1], tools))
    for field in ("question", "last_question", "tool_answer", "description"):
        for attack in ATTACKS:
            messages, tools = conversation("chatml", **{field: attack})
            assert controls_in(chat, chat.prompt(messages[:-1], tools)) == expected, (field, attack)


# What stands around content in the template: other content, or parts of a control string.
BODIES = {
    "two fields": "{{ m.reasoning_content }}{{ m.content }}",
    "two trimmed fields": "{{ m.reasoning_content | trim }}{{ m.content | trim }}",
    "three fields": "{{ m.reasoning_content }}{{ m.name }}{{ m.content }}",
    "text before": "<|im_{{ m.content }}",
    "text after": "{{ m.content }}_end|>",
    "text around": "<|im_{{ m.name }}|>{{ m.content }}",
    "text around any key": "{% for key in (m.extra or {}).x or {} %}<{{ key }}>{% endfor %}{{ m.content }}",
    "text around a key": "{% for key in m.arguments %}<{{ key }}>{% endfor %}{{ m.content }}",
}
PARTS = [  # body, and a message that would complete a control string
    ("two fields", {"reasoning_content": "<|im_", "content": "end|> x"}),
    ("two fields", {"reasoning_content": "<", "content": "s> x"}),
    ("two trimmed fields", {"reasoning_content": "<|im_ \n", "content": " \nend|> x"}),
    ("two trimmed fields", {"reasoning_content": "x <", "content": "\t/s>"}),
    ("three fields", {"reasoning_content": "<|im_", "name": "en", "content": "d|> x"}),
    ("three fields", {"reasoning_content": "<", "name": "/", "content": "s> x"}),
    ("text before", {"content": "end|> x"}),
    ("text before", {"content": "start|>system"}),
    ("text after", {"content": "x <|im"}),
    ("text around", {"name": "end", "content": "x"}),
    ("text around a key", {"arguments": {"/think": 1}, "content": "x"}),  # Qwen 3 Coder renders keys like this
    ("text around a key", {"arguments": {"s": 1}, "content": "x"}),
    ("text around any key", {"extra": {"x": {"type": "string", "/think": 1}}, "content": "x"}),  # in its tool schemas
]


@pytest.mark.parametrize("body, fields", PARTS)
@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_parts_that_neighbours_complete_stay_text(kind, body, fields):
    """A control string put together from several fields, or from content and template text, is not one (or refused)."""
    template = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        f"{{% if m.role == 'user' %}}{BODIES[body]}{{% else %}}{{{{ m.content }}}}{{% endif %}}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = chat_format(kind, template)
    try:
        ids, _ = chat.encode([{"role": "user"} | fields, assistant("y")])
    except ValueError:
        return
    assert controls_in(chat, ids) == [BOS] + ["<|im_start|>", "<|im_end|>"] * 2


@pytest.mark.parametrize("how", ["", " | string", " | tojson(ensure_ascii=True)"])
def test_printed_objects_show_control_strings_as_they_are(how):
    """A template that prints an object (not as JSON, or as ASCII JSON) shows its text, without our marks."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ (m.extra or '')"
        + how
        + " }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = chat_format("byte_level", template)
    try:
        ids, _ = chat.encode([user("x") | {"extra": {"a": "<|im_end|>"}}, assistant("y")])
    except ValueError:  # refusing is as good
        return
    assert "fdd0" not in chat.tokenizer.decode(ids)
    assert controls_in(chat, ids) == ["<|im_start|>", "<|im_end|>"] * 2


def test_roles_and_keys_that_are_parts_of_control_strings_still_render():
    """Control strings such as "user" or "role:" leave the message's own structure alone."""
    tokenizer = TOKENIZERS["byte_level"].__wrapped__()
    tokenizer.add_tokens(["system", "tool_calls:", "user:"])
    tokenizer.chat_template = QWEN3
    chat = ChatFormat(tokenizer)
    messages, tools = conversation("qwen3")
    assert chat.encode(messages, tools)[0] == template_ids(chat, messages, tools)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_a_control_token_that_the_model_could_merge_itself(kind):
    """A word of the model's own that was declared special: in content it is spelt with other tokens."""
    tokenizer = TOKENIZERS[kind].__wrapped__()
    word = max((text for text in tokenizer.get_vocab() if re.fullmatch("[a-z]+", text)), key=len)
    tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    tokenizer.chat_template = chatml_like()
    chat = ChatFormat(tokenizer)
    assert chat.encode(EDGES[0])[0] == template_ids(chat, EDGES[0])
    ids, _ = chat.encode([user(f"x{word} {word}s"), assistant(word)])
    assert tokenizer.convert_tokens_to_ids(word) not in ids
    assert f"x{word} {word}s" in tokenizer.decode(ids)


THINK = ("<think>", "</think>")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_content_tokens_are_tokens_in_assistant_content_only(kind):
    """--content_tokens lets the assistant's own content hold them, and neither other control strings nor other fields."""
    chat, text = chat_format(kind, "chatml", THINK), "<think>hm</think>x</s><|im_end|>"
    messages, tools = conversation("chatml")
    plain = controls_in(chat, chat.encode(messages, tools)[0])
    for field in FIELDS["chat"] + FIELDS["tools"][1:]:
        ids, _ = chat.encode(*conversation("chatml", **{field: text}))
        extra = len(controls_in(chat, ids)) - len(plain)
        assert extra == (2 if "answer" in field and field != "tool_answer" else 0), field
    messages, tools = conversation("chatml")
    tools[0]["role"] = messages[1]["extra"] = {"role": "assistant", "text": text}  # looks like a turn, is none
    assert controls_in(chat, chat.encode(messages, tools)[0]) == plain


def test_content_tokens_reach_the_template():
    """Qwen 3's template strips the reasoning of earlier turns once it may see <think>."""
    answer = "<think>\nhm\n</think>\n\nx"
    messages = [user("a"), assistant(answer), user("b"), assistant(answer)]
    chat = chat_format("byte_level", "qwen3", THINK)
    ids, trained = chat.encode(messages)
    assert ids == template_ids(chat, messages)
    assert trained_texts(chat, ids, trained) == ["x<|im_end|>", answer + "<|im_end|>"]


def test_escapes_of_the_marks_are_ordinary_text():
    """Source code that spells the marks as backslash escapes (a regular expression, say) is read like any other."""
    chat = chat_format("byte_level", "tulu")
    messages = [user(r"What does [\ufdd0-\ufdef] match?"), assistant(r"\ufdd0, \ufdd1, \ufdd2 and so on.")]
    assert chat.encode(messages)[0] == template_ids(chat, messages)


def test_content_tokens_must_exist():
    """A misspelt content token is refused, not ignored."""
    with pytest.raises(RunError, match="--content_tokens.*<thinking>"):
        chat_format("byte_level", "chatml", ("<thinking>",))


def test_a_noncharacter_in_content_is_refused():
    """The marks that separate content from template cannot be smuggled in."""
    for mark in "\ufdd0\ufdd1\ufdd2":
        with pytest.raises(ValueError, match="noncharacter"):
            chat_format("byte_level", "chatml").encode([user(f"x{mark}"), assistant("y")])


# ------------------------------------------------------------------------------------------------ what is trained on


def answer_text(template, content, last):
    """What the model itself has to write for an answer, in a template."""
    think = "<think>\n\n</think>\n\n" if template == "qwen3" and last else ""
    space = " " if template == "llama2" else ""
    return think + space + content + space + ENDS[template]


ENDS = {"tulu": EOS, "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "qwen3": "<|im_end|>",
        "llama2": EOS}  # fmt: skip
ANSWERS = ["It is 5.", "  4\n2 = 2", "naïve: 你好\n\n    return x"]


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", LOSSLESS)
def test_trained_tokens_are_the_answers_and_their_ends(kind, template, turns):
    """Each run of trained tokens decodes to one answer and its end-of-turn token, of every turn or the last only."""
    answers = [answer.strip() for answer in ANSWERS[:turns]]
    messages = [message for answer in answers for message in (user("And\n"), assistant(answer))]
    chat = chat_format(kind, template)
    ids, trained = chat.encode(messages)
    expected = [answer_text(template, answer, answer is answers[-1]) for answer in answers]
    space = without_spaces if kind == "legacy_llama" else str
    assert [space(text) for text in trained_texts(chat, ids, trained)] == [space(text) for text in expected]
    assert chat.tokenizer.decode(chat.end_of_turn) == ENDS[template]
    only, last = chat.encode(messages, last_turn_only=True)
    assert only == ids
    assert [space(text) for text in trained_texts(chat, ids, last)] == [space(expected[-1])]
    assert not (last & ~trained).any()


def test_every_turn_is_trained_on_with_its_end(each):
    """In every tokenizer and template each answer is one trained run that ends in the end-of-turn token."""
    messages = EDGES[-1]
    ids, trained = each.encode(messages)
    edges = np.flatnonzero(np.diff([0, *trained.astype(int), 0]))
    assert len(edges) == 6
    assert [ids[end - 1] for end in edges[1::2]] == [each.end_of_turn] * 3
    assert each.tokenizer.convert_ids_to_tokens(each.end_of_turn) == ENDS[name_of(each)]


def test_prompt_and_completion_make_up_the_sequence(each):
    """The ids of a prompt are the untrained beginning of the whole: what is sampled and what is trained on agree."""
    if (kind_of(each), name_of(each)) == ("byte_level_spaces", "qwen3"):
        pytest.skip("here <think> swallows the line break before it, which ends the prompt: no prompt is a prefix")
    for messages in EDGES:
        ids, trained = each.encode(messages, last_turn_only=True)
        prompt = each.prompt(messages[:-1])
        assert ids[: len(prompt)] == prompt
        assert trained.tolist()[: len(prompt)] == [False] * len(prompt) and trained[len(prompt)]


def without_generation(template):
    """The same template without {% generation %}; white space control stays."""
    template = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", r"{%\1 endif \2%}", template)


@pytest.mark.parametrize("template", ["tulu", "chatml", "llama3"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_masks_with_and_without_generation_markers_are_the_same(kind, template):
    """Prefix rendering finds the same trained tokens as the template's {% generation %}."""
    marked = chat_format(kind, template)
    unmarked = chat_format(kind, without_generation(marked.template.source))
    assert "endgeneration" in marked.template.source and "endgeneration" not in unmarked.template.source
    chats = [(messages, None) for messages in EDGES + real_chats()] + tool_chats() * (template == "chatml")
    for messages, tools in chats:
        for last_turn_only in (False, True):
            ids, trained = marked.encode(messages, tools, last_turn_only)
            same_ids, same_trained = unmarked.encode(messages, tools, last_turn_only)
            assert ids == same_ids
            assert trained.tolist() == same_trained.tolist()


CALL = {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}
SCHEMA = {"type": "function", "function": {"name": "get_weather", "description": "Weather of a city."}}
TOOL_CHAT = [
    {"role": "system", "content": "Be brief."},
    user("Weather in Paris?"),
    assistant("", tool_calls=[{"type": "function", "function": CALL}]),
    {"role": "tool", "content": '{"sky": "clear"}'},
    assistant("It is clear."),
]


def test_chatml_renders_and_trains_tool_calls():
    """Tools stand in the system turn, calls are trained on as JSON, answers of tools are not trained on."""
    chat = chat_format("byte_level", "chatml")
    ids, trained = chat.encode(TOOL_CHAT, [SCHEMA])
    text = chat.tokenizer.decode(ids)
    assert text.count("<|im_start|>system\n") == 1 and "Be brief." in text
    assert json.dumps(SCHEMA) in text
    assert "<tool_response>\n" + TOOL_CHAT[3]["content"] + "\n</tool_response><|im_end|>\n" in text
    call, answer = trained_texts(chat, ids, trained)
    assert call.strip() == "<tool_call>\n" + json.dumps(CALL) + "\n</tool_call><|im_end|>"
    assert answer == "It is clear.<|im_end|>"


def test_chatml_takes_arguments_as_object_or_json_string():
    """OpenAI's format has `arguments` as a JSON string: the same tokens as for the object, not JSON inside JSON."""
    chat = chat_format("byte_level", "chatml")
    as_string = json.loads(json.dumps(TOOL_CHAT))
    as_string[2]["tool_calls"][0]["function"]["arguments"] = json.dumps(CALL["arguments"])
    assert chat.encode(as_string, [SCHEMA])[0] == chat.encode(TOOL_CHAT, [SCHEMA])[0]


# ------------------------------------------------------------------------------------------------ refused at start


def test_exactly_one_bos(each):
    """One BOS where the template writes it (qwen3 writes none), also when the text begins with its spelling."""
    for text in ("Hi", BOS + "Hi", f"{BOS}{BOS} Hi"):
        ids, _ = each.encode([user(text), assistant(text)])
        assert ids.count(each.tokenizer.bos_token_id) == (name_of(each) != "qwen3")


def test_builtin_templates_begin_with_bos_if_the_tokenizer_does(tmp_path):
    """tulu and chatml add no BOS for a tokenizer that adds none to plain text."""
    tokenizer = TOKENIZERS["byte_level"].__wrapped__()
    settings = json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": None}
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    for template in ("tulu", "chatml"):
        ids, _ = ChatFormat(load_tokenizer(tmp_path, template)).encode(EDGES[0])
        assert tokenizer.bos_token_id not in ids


def chatml_like(turn="{{ m.content }}<|im_end|>\n", start="{{ bos_token }}", end=""):
    """A template with {{ turn }} after each role header."""
    return (
        start + "{% for m in messages %}<|im_start|>{{ m.role }}\n" + turn + "{% endfor %}" + end
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )  # fmt: skip


MARKED = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
BAD_TEMPLATES = {
    "doubled BOS": (chatml_like(start="{{ bos_token }}<s>"), "two <s>"),
    "no end of turn": (chatml_like("{{ m.content }}\n"), "without an end-of-turn token"),
    "end of turn not trained": (chatml_like(MARKED + "<|im_end|>\n"), "without an end-of-turn token"),
    "end of turn is plain text": (chatml_like("{{ m.content }}<|done|>\n"), "without an end-of-turn token"),
    "drops the question": (
        chatml_like("{% if m.role != 'user' %}{{ m.content }}{% endif %}<|im_end|>\n"),
        "leaves out",
    ),
    "raises": (chatml_like("{{ raise_exception('never') }}"), "never"),
    "undefined": (chatml_like("{{ m.content.no.such }}"), "no such|undefined|no attribute"),
    "type error": (chatml_like("{{ m.content + 1 }}"), "str"),
    "division by zero": (chatml_like("{{ 1 // (m.content | length - m.content | length) }}"), "zero"),
    "bad format": (chatml_like("{{ '{} {}'.format(m.content) }}"), "."),
    "syntax error": ("{% for m in messages %}{{ m.content }", "."),
    "empty": ("{# nothing #}", "."),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_bad_templates_are_refused_at_start(name):
    """Before any data is read: one clear line that says what is wrong with the template."""
    template, message = BAD_TEMPLATES[name]
    with pytest.raises(RunError, match=f"(?s){message}") as caught:
        chat = chat_format("byte_level", template)
        assert chat.prompt(EDGES[0][:1])  # for reinforcement learning it will do
        SftEncoder(chat, 10**6, 100, "truncate")
    assert "\n" not in str(caught.value)


NO_SYSTEM = "{% if m.role != 'system' %}{{ m.content }}{% endif %}<|im_end|>\n"
BAD_CHATS = {
    "system dropped": (chatml_like(NO_SYSTEM), [{"role": "system", "content": "Be brief."}, *EDGES[0]], "leaves out"),
    "system dropped, text elsewhere": (
        chatml_like(NO_SYSTEM),
        [{"role": "system", "content": "Hi"}, user("Hi there"), assistant("Hi")],
        "leaves out",
    ),
    "later system dropped": (  # as templates do that take the first message apart and then know user and assistant
        chatml_like("{% if m.role != 'system' or loop.first %}{{ m.content }}{% endif %}<|im_end|>\n"),
        [user("Hi"), assistant("Ho"), {"role": "system", "content": "Now be brief."}, user("Why?"), assistant("So")],
        "leaves out",
    ),
    "later questions dropped": (
        chatml_like("{% if m.role != 'user' or loop.index < 3 %}{{ m.content }}{% endif %}<|im_end|>\n"),
        EDGES[-1],
        "leaves out",
    ),
    "system refused": (
        chatml_like("{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ m.content }}</s>"),
        [{"role": "system", "content": "Be brief."}, *EDGES[0]],
        "no system role",
    ),
    "division by zero": (
        chatml_like("{{ m.content }}{% if m.content == 'Hi' %}{{ 1 // 0 }}{% endif %}</s>"), EDGES[0], "zero"
    ),
    "only the last turn ends": (chatml_like("{{ m.content }}", end="{{ eos_token }}"), EDGES[-1], "turn|differently"),
    "answers rewritten later": (
        chatml_like("{{ m.content | upper if m.role == 'assistant' and not loop.last else m.content }}<|im_end|>"),
        EDGES[3], "differently once another",
    ),
    "prompt rewritten later": (
        chatml_like("{{ loop.length }} {{ m.content }}<|im_end|>"), EDGES[0], "differently once the answer follows"
    ),
    "tool calls dropped": ("tulu", [user("a"), assistant("", tool_calls=[{"function": CALL}])], "tool"),
    "tool answers dropped": (
        chatml_like("{% if m.role != 'tool' %}{{ m.content or '' }}{% endif %}<|im_end|>\n"), TOOL_CHAT[:2] + TOOL_CHAT[3:],
        "leaves out",
    ),
    "tool role unknown": ("tulu", TOOL_CHAT[:2] + TOOL_CHAT[3:], "no role tool"),
    "call without a name": ("chatml", [user("a"), assistant("", tool_calls=[{"function": {}}])], "."),
    "call is text": ("chatml", [user("a"), assistant("", tool_calls="get_weather")], "."),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CHATS)
def test_conversations_the_template_cannot_show_are_refused(name):
    """A message that would be lost, or a turn that cannot be told apart, is a ValueError: never a silent difference."""
    template, messages, message = BAD_CHATS[name]
    try:
        chat = chat_format("byte_level", template)
    except RunError as error:  # seen at start already
        assert re.search(message, str(error))
        return
    with pytest.raises(ValueError, match=message):
        chat.encode(messages)


def test_tools_need_a_template_that_shows_them():
    """A row with tool schemas and a template without is refused."""
    with pytest.raises(ValueError, match="leaves out tools"):
        chat_format("byte_level", "tulu").encode(EDGES[0], [SCHEMA])


@pytest.mark.parametrize("role", ["", "User", "ipython", "assistant|>x<|user", "<|im_start|>", None, 3, ["user"], {}])
def test_unknown_roles_are_refused(role):
    """Roles are written into the template's markers: only the known ones pass."""
    with pytest.raises(ValueError, match=r"messages\[1\].role"):
        check_messages([user("a"), {"role": role, "content": "b"}])


def test_a_tokenizer_without_end_token_works():
    """No eos_token at all: the template's own end-of-turn token is enough, and its absence is still refused."""
    tokenizer = TOKENIZERS["byte_level"].__wrapped__()
    tokenizer.eos_token = None
    tokenizer.chat_template = chatml_like()
    ids, trained = ChatFormat(tokenizer).encode(EDGES[0])
    assert trained_texts(ChatFormat(tokenizer), ids, trained) == ["Hello<|im_end|>"]
    tokenizer.chat_template = chatml_like("{{ m.content }}\n")
    with pytest.raises(RunError, match="without an end-of-turn token.*no eos_token"):
        ChatFormat(tokenizer)


def test_of_several_chat_templates_the_default_is_taken(tmp_path):
    """Some tokenizers have templates for several uses; without one for chat a flag is asked for."""
    tokenizer = TOKENIZERS["byte_level"].__wrapped__()
    tokenizer.chat_template = {"default": chatml_like(), "rag": "{{ documents }}"}
    tokenizer.save_pretrained(tmp_path / "two")
    assert load_tokenizer(tmp_path / "two").chat_template == chatml_like()
    tokenizer.chat_template = {"rag": "{{ documents }}"}
    tokenizer.save_pretrained(tmp_path / "one")
    with pytest.raises(RunError, match="--chat_template"):
        load_tokenizer(tmp_path / "one")


class HubError(Exception):
    """As the HTTP client's are: neither an OSError nor a ValueError."""


@pytest.mark.parametrize(
    "error", [None, HubError("timed out\nat last"), HubError(), KeyError("model"), OSError("No:\nwhy")]
)
def test_a_tokenizer_that_neither_hub_nor_cache_has_is_refused(error, monkeypatch):
    """Without network (None: the real error, HF_HUB_OFFLINE is set), and whatever the libraries below make of it."""
    if error:

        def from_pretrained(path):
            raise error

        monkeypatch.setattr("common.AutoTokenizer.from_pretrained", from_pretrained)
    with pytest.raises(RunError) as caught:
        load_tokenizer("no-such-owner/no-such-model", "tulu")
    text, wrong = str(caught.value), "no such folder, and neither the Hub nor its cache gave this tokenizer: "
    assert text.startswith(f"model no-such-owner/no-such-model: {wrong}") and not text.endswith(": "), text
    assert "\n" not in text and len(text) < 500, text


@pytest.mark.parametrize("case", ["no such file", "a folder", "Latin-1", "no template", "no such model", "broken"])
def test_load_tokenizer_errors_are_clear(case, tmp_path):
    """Every way to get a tokenizer or template wrong is a RunError that names the flag."""
    folder, template = tokenizer_folder("byte_level"), str(tmp_path / "template.jinja")
    if case == "a folder":
        template = str(tmp_path)
    elif case == "Latin-1":
        Path(template).write_bytes(b"caf\xe9 {{ messages }}")
    elif case == "no template":
        template = None
    elif case == "no such model":
        folder, template = tmp_path / "missing", "tulu"
    elif case == "broken":
        folder, template = tmp_path, "tulu"
        (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(RunError, match="--chat_template|model ") as caught:
        load_tokenizer(folder, template)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_model_is_refused_without_the_hub(tmp_path, monkeypatch):
    """At once, in one line, with the names that are there; a Hub id, and a folder of a model, are let through."""
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("common.find_hub", lambda: asked.append(1))
    for name in ("base", "rm", "sft"):
        (tmp_path / "runs" / "demo" / name / "model").mkdir(parents=True)
    for name in ("rm/model/config.json", "sft/metrics.jsonl", "sft/config.json"):
        (tmp_path / "runs" / "demo" / name).write_text("{}")
    refused = {
        "runs/demo/bas": "no such file or folder; runs/demo has base, ",
        "./runs/demo/bas": "no such file or folder; runs/demo has base, ",
        f"{tmp_path}/runs/demo/bas": f"no such file or folder; {tmp_path}/runs/demo has base, ",
        "runs/dem": r"no such file or folder \(the Hub is not asked: a folder runs is here\); runs has demo$",
        "rnus/demo/base/model": "no such file or folder; . has runs$",
        "../nothing": "no such file or folder; .. has ",
        "model.safetensors": "no such file or folder; . has runs$",
        "runs/demo/rm/model/config.json": "a file, and a model is a folder$",
        "runs/demo/base": "the folder has no config.json$",
        "runs/demo/sft": "the folder of a run; its model is runs/demo/sft/model$",
    }
    for path, message in refused.items():
        with pytest.raises(RunError, match=f"^model {re.escape(path)}: {message}"):
            common.check_model_path(path)
        if path != "runs/demo/base":  # pipeline.look needs a tokenizer only
            with pytest.raises(RunError, match=f"^model {re.escape(path)}: {message}"):
                load_tokenizer(path, "tulu")
    assert not asked
    common.check_model_path("runs/demo/rm/model")
    common.check_model_path(tmp_path / "runs" / "demo" / "rm" / "model")
    assert not asked
    for path in ("owner/name", "gpt2", "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-0.5B", "owner/data-v1.5"):
        common.check_model_path(path)
    assert len(asked) == 5


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gpt2", "olmo", "olmo2", "phi3", "gemma", None])
@pytest.mark.parametrize("saved_as", ["PreTrainedTokenizerFast", None, "Qwen2Tokenizer", "GPT2Tokenizer"])
def test_a_byte_level_tokenizer_is_the_one_that_was_published(model_type, saved_as, tmp_path):
    """AutoTokenizer gives some model types a pre-tokenizer of its own, without a word, and other ids with it."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\n+| ?[^\n\p{N} ]+| +"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=INSIDE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["it's 123 456\n\nand 123 456\n\n\nit's\n\n"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token=UNK)
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = saved_as
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 400}))
    text = "it's 123456\n\nand\n\n\n123"
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    loaded = load_tokenizer(tmp_path, "chatml")
    assert loaded(text, add_special_tokens=False).input_ids == ids
    assert loaded.eos_token == EOS and loaded.bos_token == BOS and loaded.chat_template
    assert ChatFormat(loaded).untrainable is None
    if (model_type, saved_as) in (("qwen2", "PreTrainedTokenizerFast"), ("gpt2", None), ("olmo", "GPT2Tokenizer")):
        assert AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False).input_ids != ids  # or no test
    loaded.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again", "chatml")(text, add_special_tokens=False).input_ids == ids


def test_a_tokenizer_without_its_file_is_transformers(tmp_path, monkeypatch):
    """Some models have other files only, of which transformers makes one."""
    folder = tokenizer_folder("byte_level")

    def cached_file(path, name):
        raise OSError("no such file")

    monkeypatch.setattr("common.cached_file", cached_file)
    assert load_tokenizer(folder, "tulu")("a b").input_ids == TOKENIZERS["byte_level"]()("a b").input_ids


def test_added_tokens_that_are_normalized_are_named():
    """`add_tokens(["<thoughts>"])` where the normalizer writes ▁ before each text: it is not found in a text then."""
    tokenizer = TOKENIZERS["legacy_llama"].__wrapped__()
    turn = "<|im_start|>assistant\n"
    thoughts = chatml_like().replace(turn, turn + "<thoughts>\n")
    tokenizer.chat_template = thoughts
    tokenizer.add_tokens(["<thoughts>"])
    remedy = r"add them to the tokenizer as AddedToken\(…, normalized=False\)"
    with pytest.raises(RunError, match=f"normalizes text before it looks for <thoughts>: {remedy}"):
        ChatFormat(tokenizer)
    tokenizer = TOKENIZERS["legacy_llama"].__wrapped__()
    tokenizer.chat_template = thoughts
    tokenizer.add_tokens([AddedToken("<thoughts>", normalized=False)])
    assert ChatFormat(tokenizer).untrainable is None


def test_an_end_that_is_no_token_is_named():
    """A template of another tokenizer: its end of turn is text here."""
    tokenizer = TOKENIZERS["byte_level"].__wrapped__()
    tokenizer.chat_template = chatml_like("{{ m.content }}<|im_done|>\n")
    assert re.search(r"without an end-of-turn token: '<\|im_done\|>' is no token of this tokenizer; add it to the tokenizer",
                     ChatFormat(tokenizer).untrainable)  # fmt: skip
    tokenizer.chat_template = chatml_like("{{ m.content }}\n")
    assert "(it ends with 'ertainly 5.\\n')" in ChatFormat(tokenizer).untrainable


def test_time_grows_with_the_text_not_with_the_turns():
    """600 kB of text cost about the same in 2 turns and in 3,000 (CPU time, so that other programs do not matter)."""
    chat, seconds = chat_format("byte_level", "tulu"), []
    for turns in (1, 1500):
        words = "word " * (60_000 // turns)
        messages = [user(words), assistant(words)] * turns
        seconds.append(seconds_of(lambda messages=messages: chat.encode(messages), enough=0.5))
        ids, trained = chat.encode(messages)
        assert len(ids) == len(trained) and trained.any()
    assert seconds[1] < 4 * seconds[0] + 1, seconds
