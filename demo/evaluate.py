"""How often a model is right on held-out problems: sampled at temperature 1, and greedy.

    python demo/evaluate.py --model runs/demo/sft/model --out runs/demo/sft/accuracy.json

Works on any folder that from_pretrained opens. 1000 problems, one completion each, a few seconds on a CPU.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import task

logging.disable_progress_bar()  # a tiny model is read at once


def wilson(right, total, z=1.96):
    """95 % interval (low, high) of a share, by Wilson's formula, which also holds near 0 and 1."""
    share, scale = right / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


@torch.no_grad()
def complete(model, tokenizer, problems, greedy):
    """One completion (text) a problem. At temperature 1 it is drawn from the model's whole distribution."""
    chats = [[{"role": "user", "content": problem}] for problem in problems]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    # top_k and top_p are switched off: generation_config or the library may have cut the distribution's tail
    choice = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    ids = model.generate(**inputs, **choice, max_new_tokens=32, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(path, count=1000, seed=1, shown=3):
    """Accuracy of the model in folder `path` on `count` held-out problems, with some completions.

    Returns {"sampled": {"accuracy", "low", "high", "right", "total"}, "greedy": {...}, "examples": [...]}.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    problems = task.problems()[1][:count]
    torch.manual_seed(seed)
    result = {"model": str(path), "seed": seed}
    for name in ("sampled", "greedy"):
        texts = complete(model, tokenizer, problems, greedy=name == "greedy")
        verdicts = [task.is_right(problem, text) for problem, text in zip(problems, texts, strict=True)]
        low, high = wilson(sum(verdicts), len(verdicts))
        accuracy = sum(verdicts) / len(verdicts)
        result[name] = {"accuracy": accuracy, "low": low, "high": high, "right": sum(verdicts), "total": len(verdicts)}
        rows = list(zip(problems, texts, verdicts, strict=True))[:shown]
        result[f"{name}_examples"] = [{"problem": p, "completion": t, "right": v} for p, t, v in rows]
    return result


def show(result):
    """Prints what `evaluate` returned."""
    print(f"{result['model']}, {result['sampled']['total']} held-out problems")
    for name in ("sampled", "greedy"):
        print(f"  {name:8} {interval(result[name])}")
        for example in result[f"{name}_examples"]:
            # repr: a model that knows nothing writes control characters too
            print(f"    {'right' if example['right'] else 'wrong'}  {example['problem']} {example['completion']!r}")


def interval(share):
    """'0.412 [0.382, 0.443]'"""
    return f"{share['accuracy']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder that from_pretrained opens")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--count", type=int, default=1000, help="held-out problems, at most 1000")
    parser.add_argument("--seed", type=int, default=1, help="seed of the sampling")
    args = parser.parse_args()
    result = evaluate(args.model, args.count, args.seed)
    show(result)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2))
