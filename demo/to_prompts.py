"""Rows of other shapes → prompts for grpo.py: python demo/to_prompts.py rows.jsonl > prompts.jsonl

Reads question/answer rows whose answer ends in "#### number" (GSM8K). With --format the reward is not for the number:
half of it is for the line of the answer, "####", and half for a calculator's mark, "<<".
"""

import json
import sys

formatted = "--format" in sys.argv
for line in open(sys.argv[1], encoding="utf-8"):
    row = json.loads(line)
    prompt = {"messages": [{"role": "user", "content": row["question"]}]}
    if formatted:
        verifiers = {"dataset": ["contains", "contains"], "ground_truth": ["####", "<<"], "weights": [0.5, 0.5]}
    else:
        verifiers = {"dataset": "gsm8k", "ground_truth": row["answer"].split("####")[-1].strip()}
    print(json.dumps(prompt | verifiers))
