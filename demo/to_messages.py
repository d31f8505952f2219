"""Rows of other shapes → `messages` rows: python demo/to_messages.py rows.jsonl > messages.jsonl

Reads question/answer rows (GSM8K) and instruction/input/output rows (Alpaca and its kin).
"""

import json
import sys

for line in open(sys.argv[1], encoding="utf-8"):
    row = json.loads(line)
    prompt = row["question"] if "question" in row else "\n\n".join(filter(None, [row["instruction"], row["input"]]))
    answer = row["answer"] if "answer" in row else row["output"]
    print(json.dumps({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}))
