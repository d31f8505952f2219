"""Rows of other shapes → preference pairs: python demo/to_pairs.py rows.jsonl > pairs.jsonl

Reads HH-RLHF rows (dialogues as one string), instruction rows with two outputs, and LLMBar rows.
"""

import json
import re
import sys

ROLES = {"Human": "user", "Assistant": "assistant"}


def dialogue(text):
    """HH's "\\n\\nHuman: …\\n\\nAssistant: …" as messages."""
    _, *parts = re.split(r"\n\n(Human|Assistant): ?", text)
    return [{"role": ROLES[who], "content": said} for who, said in zip(parts[::2], parts[1::2], strict=True)]


for line in open(sys.argv[1], encoding="utf-8"):
    row = json.loads(line)
    if "label" in row:  # LLMBar: which of two outputs is better
        chosen, rejected = (row[f"output_{i}"] for i in (row["label"], 3 - row["label"]))
        pair = {"prompt": row["input"], "chosen": chosen, "rejected": rejected, "subset": row["subset"]}
    elif "instruction" in row:
        prompt = "\n\n".join(filter(None, [row["instruction"], row["input"]]))
        pair = {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}
    else:
        pair = {side: dialogue(row[side]) for side in ("chosen", "rejected")}
    print(json.dumps(pair))
