"""Rows of published shapes as preference pairs, one function a shape; `rows` are several of one prompt."""

import re

from common import Skip
from pipeline.shapes.messages import assistant, instruction, turn, user, with_tools


def dialogue(text):
    r"""A string "\n\nHuman: …\n\nAssistant: …" as messages."""
    _, *parts = re.split(r"\n\n(Human|Assistant): ?", text)
    if not parts:
        raise Skip("no dialogue of Human: and Assistant:")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def hh(row):
    return {side: dialogue(row[side]) for side in ("chosen", "rejected")}


def alpaca(row):
    return {"prompt": instruction(row), "chosen": row["chosen"], "rejected": row["rejected"]}


def llmbar(row):
    """`label` says which of two outputs is better."""
    chosen, rejected = (row[f"output_{i}"] for i in (row["label"], 3 - row["label"]))
    pair = {"prompt": row["input"], "chosen": chosen, "rejected": rejected}
    return pair | ({"subset": row["subset"]} if "subset" in row else {})


def orca(row):
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    pair = {"prompt": [*system, user(row["question"])]}
    return pair | {side: [assistant(row[side])] for side in ("chosen", "rejected")}


def sharegpt(row):
    pair = {side: [turn(row[side])] for side in ("chosen", "rejected")}
    prompt = with_tools([turn(said) for said in row["conversations"]], row.get("tools"))
    return {"prompt": prompt.pop("messages"), **pair, **prompt}


def helpsteer3(row):
    """`overall_preference` is negative where the first response is better; its size is the margin."""
    preference = row["overall_preference"]
    if preference == 0:
        raise Skip("neither response is preferred")
    answers = [[assistant(row["response1"])], [assistant(row["response2"])]]
    chosen, rejected = answers if preference < 0 else reversed(answers)
    return {"prompt": row["context"], "chosen": chosen, "rejected": rejected, "margin": abs(preference)}


def helpsteer2(rows):
    """Of the responses to one prompt the most helpful and the least; the difference is the margin."""
    if len(rows) == 1:
        raise Skip("the only answer to its prompt")
    worst, *_, best = sorted(rows, key=lambda row: row["helpfulness"])
    margin = best["helpfulness"] - worst["helpfulness"]
    if margin == 0:
        raise Skip("equally helpful")
    first, *turns = re.split(r"\n?<extra_id_1>(User|Assistant)\n", best["prompt"])
    messages = [user(first)]
    for who, said in zip(turns[::2], turns[1::2], strict=True):
        messages.append({"role": who.lower(), "content": said})
    answers = {"chosen": [assistant(best["response"])], "rejected": [assistant(worst["response"])]}
    return {"prompt": messages, **answers, "margin": margin}


def nectar(row):
    """Of seven ranked answers the best and the worst: the surest pair, and one a prompt."""
    best, *_, worst = sorted(row["answers"], key=lambda answer: answer["rank"])
    if best["rank"] == worst["rank"]:
        raise Skip("all answers have one rank")
    prompt = dialogue(row["prompt"])
    if prompt[-1] == assistant(""):  # "Assistant: ", where the answer begins
        del prompt[-1]
    return {"prompt": prompt, "chosen": [assistant(best["answer"])], "rejected": [assistant(worst["answer"])]}


def kto(rows):
    """The first good answer to a prompt with the first bad one, the second with the second, and so on."""
    good = [row["completion"] for row in rows if row["label"]]
    bad = [row["completion"] for row in rows if not row["label"]]
    if not good or not bad:
        raise Skip(f"a prompt with no {'bad' if good else 'good'} answer")
    pairs = zip(good, bad, strict=False)
    return [{"prompt": rows[0]["prompt"], "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
