"""The rows that a source stands for, and the texts of a row of any shape: for programs that only look into rows."""

import numpy as np

from common import DataError, choose, read_conversation, read_messages, read_rows, split_amount

COLUMNS = "question problem instruction+input instruction text Body+Question Question turns input"  # the first there is
ROLES = {"prompt": ["user"], "answer": ["assistant"], "both": ["user", "assistant"]}


def rows(sources, number, seed):
    """Yields (row number, row) of what SOURCE[:AMOUNT] number `number` takes: what the scripts take, each row once.

    Raises:
        DataError: it cannot be read, or has no rows.
    """
    name, amount = split_amount(sources[number])
    places = None
    if amount is not None:
        count = sum(1 for _ in read_rows(name))
        places = set(choose(count, amount, np.random.default_rng([seed, number]), sources[number]).tolist())
    place = -1
    for place, row in enumerate(read_rows(name)):
        if places is None or place in places:
            yield row
    if place < 0:
        raise DataError(name, None, "the data set is empty")


def turns(row, which="prompt"):
    """Texts of a row, a list: turns, of the forms that the scripts read; of others one of COLUMNS, as its prompt.

    Args:
        which: "prompt", the user's turns; "answer", the assistant's, of pairs all of them; or "both".

    Raises:
        ValueError: there are none, or the row is malformed.
    """
    messages = []
    if row.get("chosen") is not None:
        for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
            messages += read_messages(row[name], name, role) if row.get(name) is not None else []
    elif any(row.get(name) is not None for name in ("messages", "conversations", "prompt")):
        messages = read_conversation(row, needs_answer=row.get("completion") is not None)
    elif which == "prompt":
        for names in COLUMNS.split():
            if all(row.get(name) is not None for name in names.split("+")):
                return [column(row, names)]
    texts = [message["content"] for message in messages if message["role"] in ROLES[which] and message.get("content")]
    if not texts:
        raise ValueError(f"no {which} in the columns {', '.join(row)} (python -m pipeline.convert knows other shapes)")
    return list(dict.fromkeys(texts))  # a pair's two conversations begin alike


def column(row, names):
    """The text of a column, or of A+B; lists of strings (MT-Bench's turns) are joined. Raises ValueError."""
    parts = []
    for name in names.split("+"):
        value = row.get(name)
        parts += value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"column {names} holds no text; the columns are {', '.join(row)}")
    return "\n".join(parts)


def has(row, path):
    """Whether row has path, like "reward_model.ground_truth", and it is not null; of lists the first element counts."""
    for key in path.split("."):
        while isinstance(row, list):
            row = row[0] if row else None
        row = row.get(key) if isinstance(row, dict) else None
    return row is not None
