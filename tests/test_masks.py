"""Loss and gradient of a first step against plain transformers in float64: its own assistant mask, and its own model."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import shared, write_jsonl
from launch import call, metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo
import sft
from common import ChatFormat, load_tokenizer
from pipeline import convert

# The prompt ends in a space, which the first token of most answers takes in: "Answer: " + "▁The".
ANSWER = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ 'Question: ' + m.content + '\\nAnswer: ' }}"
    "{% else %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{{ '\\n' }}{% endif %}{% endfor %}"
)
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}"
    "{% if m.role == 'user' %}{{ m.content + '\\n' }}"
    "{% else %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
CASES = [(model, template) for model in ("stories260k", "tinystories-656k") for template in (ANSWER, CHATML)]
IDS = [f"{model}-{name}" for model in ("stories260k", "tinystories-656k") for name in ("answer", "header")]


def rows_of(tmp_path, source, tokenizer, count, to=None):
    """`count` short rows of a published file, with questions of characters that the tokenizer knows.

    Behind one that it loses, transformers' mask leaves out the first tokens of the answer: with tinystories-656k in 42
    of the first 300 GSM8K rows.
    """
    convert.main(convert.Args([str(shared("data", *source))], str(tmp_path / "all.jsonl"), to=to))
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    known = set("".join(tokenizer.get_vocab())) | {" "}
    is_lossless = "<0x25>" in tokenizer.get_vocab()  # it has bytes for what it does not know
    usable = []
    for row in rows:
        question = row["messages"][0]["content"] if "messages" in row else row["prompt"]
        if len(json.dumps(row)) < 500 and (is_lossless or known.issuperset(question)):
            usable.append(row)
    return usable[:count]


def reference(model, tokenizer, messages):
    """Sum of −log p over the tokens that transformers' mask names, and their number, in float64."""
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids = torch.tensor([encoded["input_ids"]])
    mask = torch.tensor(encoded["assistant_masks"], dtype=torch.float64)[1:]
    losses = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    return (losses * mask).sum(), mask.sum()


def gradient_norm(model, loss):
    loss.backward()
    return math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None))


def load(name, template, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(template)
    folder = shared("models", name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return folder, path, tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


@pytest.mark.parametrize(("name", "template"), CASES, ids=IDS)
def test_sft_loss_and_gradient_are_those_of_transformers(name, template, tmp_path):
    """16 GSM8K rows in one step."""
    folder, path, tokenizer, model = load(name, template, tmp_path)
    rows = rows_of(tmp_path, ("gsm8k", "train.jsonl"), tokenizer, 16, to="messages")
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = {"model": str(folder), "chat_template": str(path), "data": [data], "batch_size": len(rows), "max_length": 512}
    call(sft, **flags, steps=1, lr=1e-3, save_every=0, out=tmp_path / "run", overlong="drop")
    entry = metrics(tmp_path / "run")[-1]
    sums = [reference(model, tokenizer, row["messages"]) for row in rows]
    loss = sum(total for total, _ in sums) / sum(count for _, count in sums)
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert entry["grad_norm"] == pytest.approx(gradient_norm(model, loss), rel=1e-4)


@pytest.mark.parametrize(("name", "template"), CASES, ids=IDS)
def test_dpo_loss_and_gradient_are_those_of_transformers(name, template, tmp_path):
    """16 politeness pairs; the reference is another state of the model, or every margin would be 0."""
    folder, path, tokenizer, model = load(name, template, tmp_path)
    pairs = rows_of(tmp_path, ("preference", "llms_from_scratch_politeness.jsonl"), tokenizer, 16)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_((parameter + 0.01 * torch.randn_like(parameter)).float())
    other.float().save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    other = other.double()
    data = write_jsonl(tmp_path / "rows.jsonl", pairs)
    flags = {"model": str(folder), "ref_model": str(tmp_path / "other"), "chat_template": str(path), "data": [data]}
    call(dpo, **flags, batch_size=len(pairs), max_length=512, steps=1, lr=1e-3, beta=0.1, save_every=0, out=tmp_path / "run")
    entry = metrics(tmp_path / "run")[-1]
    losses = []
    for pair in pairs:
        conversations = [
            [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[side]}]
            for side in ("chosen", "rejected")
        ]
        policy = [-reference(model, tokenizer, messages)[0] for messages in conversations]
        with torch.no_grad():
            ref = [-reference(other, tokenizer, messages)[0] for messages in conversations]
        losses.append(-F.logsigmoid(0.1 * ((policy[0] - ref[0]) - (policy[1] - ref[1]))))
    loss = torch.stack(losses).mean()
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert entry["grad_norm"] == pytest.approx(gradient_norm(model, loss), rel=1e-4)


@pytest.mark.parametrize("template", [ANSWER, CHATML], ids=["answer", "header"])
@pytest.mark.parametrize("text", ["It is 20°C.", "°°°", "a€ é 你好 b", "plain"])
def test_a_character_that_the_tokenizer_loses_costs_no_token_its_training(text, template, tmp_path):
    """Its own offsets are wrong behind it; the trained tokens are the whole answer and its end, in every turn."""
    folder, path, _, _ = load("tinystories-656k", template, tmp_path)
    chat = ChatFormat(load_tokenizer(folder, str(path)))
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "One day."}]
    ids, trained = chat.encode(turns * 3)
    said = chat.tokenizer.decode(np.array(ids)[trained].tolist())
    assert said.replace(" ", "") == "Oneday.<|end_story|>" * 3
    prompt = chat.prompt(turns[:1])
    assert ids[: len(prompt) - 1] == prompt[:-1]  # the last may be joined with the first of the answer
    assert trained[: len(prompt) + 1].sum() in (1, 2) and trained[len(prompt)]
