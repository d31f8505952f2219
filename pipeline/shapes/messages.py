"""Rows of published shapes as `messages` rows, one function a shape; and what they share with pairs and prompts."""

import json
import re

from common import SHAREGPT, Skip

ROLES = {
    **SHAREGPT,
    "system": "system",
    "user": "user",
    "prompter": "user",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "function_response": "tool",
    "tool": "tool",
}
SCHEMA_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "dict": "object",
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def as_messages(prompt):
    """A prompt that is a string or already messages."""
    return [user(prompt)] if isinstance(prompt, str) else prompt


def instruction(row):
    """Alpaca's prompt: the instruction and, where there is one, its input."""
    return "\n\n".join(filter(None, [row["instruction"], row.get("input") or row.get("context")]))


def gsm8k(row):
    return {"messages": [user(row["question"]), assistant(row["answer"])]}


def alpaca(row):
    answer = row["response"] if row.get("output") is None else row["output"]
    return {"messages": [user(instruction(row)), assistant(answer)]}


def self_instruct(row):
    """One row for each instance of the instruction."""
    return [alpaca({"instruction": row["instruction"], **instance}) for instance in row["instances"]]


def solved(row):
    return {"messages": [user(row["problem"]), assistant(row["solution"])]}


def kto(row):
    """What was labelled good."""
    if not row["label"]:
        raise Skip("labelled bad: not for supervised fine-tuning")
    answer = row["completion"]
    return {"messages": as_messages(row["prompt"]) + ([assistant(answer)] if isinstance(answer, str) else answer)}


def sharegpt(row):
    """Turns {from, value}; a function_call is JSON; `tools` a list of functions, often as JSON."""
    messages = [turn(said) for said in row.get("conversations") or row["messages"]]
    return with_tools(messages, row.get("tools"))


def turn(said):
    """{from, value} as a message."""
    who = said["from"]
    if who not in ROLES:
        raise Skip(f"a turn is from {who!r}")
    if who in ("function_call", "tool_call"):
        return assistant("") | {"tool_calls": tool_calls(said["value"])}
    return {"role": ROLES[who], "content": said["value"]}


def typed_parts(row):
    """Contents that are parts {type, value}: text, reasoning, tool_call."""
    messages = []
    for message in row["messages"]:
        told = {"text": [], "reasoning": [], "tool_call": []}
        for part in message["content"]:
            if part["type"] not in told:
                raise Skip(f"a part of the type {part['type']!r}")
            told[part["type"]].append(part["value"])
        new = {"role": ROLES[message["role"]], "content": "\n\n".join(told["text"])}
        if told["reasoning"]:
            new["reasoning_content"] = "\n\n".join(told["reasoning"])
        if told["tool_call"]:
            new["tool_calls"] = [call for value in told["tool_call"] for call in tool_calls(value)]
        messages.append(new)
    return with_tools(messages, row.get("tools"))


def xlam(row):
    """A question, functions it may need, and the calls that answer it; the last two are JSON."""
    calls = tool_calls(row["answers"])
    if not calls:
        raise Skip("no call answers the question")
    return with_tools([user(row["query"]), assistant("") | {"tool_calls": calls}], row["tools"])


def glaive(row):
    """`system` holds the functions, one JSON object behind the other; `chat` the turns, each behind its name."""
    _, *parts = re.split(r"(?:\A|\n\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):", row["chat"])
    messages = []
    for who, said in zip(parts[::2], parts[1::2], strict=True):
        said = said.replace("<|endoftext|>", "").strip()
        if who == "USER":
            messages.append(user(said))
        elif who == "ASSISTANT":
            text, _, call = said.partition("<functioncall>")
            messages.append(assistant(text.strip()) | ({"tool_calls": [glaive_call(call)]} if call else {}))
        else:
            messages.append({"role": "tool", "content": said})
    if not messages:
        raise Skip("chat has no USER: and ASSISTANT:")
    told = re.sub(r"\ASYSTEM:\s*", "", row["system"])
    tools = []
    start = told.find("{")
    while start >= 0:
        tool, end = json.JSONDecoder().raw_decode(told, start)
        tools.append(tool)
        start = told.find("{", end)
    if not tools and told.strip():  # with tools it only announces them, which the chat template does
        messages.insert(0, {"role": "system", "content": told.strip()})
    return with_tools(messages, tools)


def glaive_call(text):
    """{"name": …, "arguments": '{…}'}: JSON, but for the single quotes around the arguments."""
    unquoted = re.sub(r"""("arguments":\s*)'(.*)'(\s*\}\s*)\Z""", r"\1\2\3", text.strip(), flags=re.DOTALL)
    return tool_calls(unquoted.replace("\\'", "'"))[0]


# -------------------------------------------------------------------------------------------------------------- tools


def decoded(value):
    """What a JSON string says; other values as they are."""
    return json.loads(value or "[]") if isinstance(value, str) else value


def tool_calls(value):
    """The call or calls {name, arguments} in `value`, perhaps as JSON, as `tool_calls` of a message."""
    try:
        calls = decoded(value)
        calls = calls if isinstance(calls, list) else [calls]
        functions = [{"name": call["name"], "arguments": decoded(call.get("arguments") or {})} for call in calls]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise Skip("a tool call is not JSON with a name") from None
    return [{"id": "", "type": "function", "function": function} for function in functions]


def with_tools(messages, tools):
    """A row of messages, whose calls get ids of nine characters (some templates want that), and of tools, if any."""
    waiting = []
    count = 0
    for message in messages:
        for call in message.get("tool_calls", []):
            count += 1
            call["id"] = f"call{count:05d}"
            waiting.append(call["id"])
        if message["role"] == "tool" and waiting:
            message["tool_call_id"] = waiting.pop(0)
    row = {"messages": messages}
    schemas = [schema(tool) for tool in decoded(tools) or []]
    return row | ({"tools": schemas} if schemas else {})


def schema(tool):
    """A tool as OpenAI writes it. xLAM has bare parameters, with Python's names of types."""
    if "function" in tool:
        return tool
    parameters = tool.get("parameters") or {}
    if parameters and "properties" not in parameters and all(isinstance(value, dict) for value in parameters.values()):
        properties = {name: plain_type(value) for name, value in parameters.items()}
        needed = [name for name, value in parameters.items() if not is_optional(value)]
        parameters = {"type": "object", "properties": properties, "required": needed}
    return {"type": "function", "function": {**tool, "parameters": parameters}}


def plain_type(parameter):
    kind = re.match(r"\w*", str(parameter.get("type", "")))[0]  # of "str, optional" and of "List[int]"
    return parameter | {"type": SCHEMA_TYPES.get(kind.lower(), kind)}


def is_optional(parameter):
    return "default" in parameter or "optional" in str(parameter.get("type", ""))
