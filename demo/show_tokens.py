"""One HTML page that shows what a value model thinks of each token, from the samples.jsonl of a ppo_rlvr.py run.

    python demo/show_tokens.py --run runs/demo/ppo --out runs/demo/ppo_tokens.html

Tokens are coloured by value, advantage, reward or KL; below them is the curve of the value. One file is all there is.
"""

import argparse
import json
from pathlib import Path

from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

PAGE = Path(__file__).with_suffix(".html")  # with a place for the samples


def texts(tokenizer, ids):
    """The text that each token adds; "" for one that only begins a character."""
    stream = DecodeStream(skip_special_tokens=False)
    for i in ids:
        try:
            yield stream.step(tokenizer, i) or ""
        except Exception:  # tokenizers raises no other class, where bytes are no UTF-8: begin anew
            stream = DecodeStream(skip_special_tokens=False)
            yield stream.step(tokenizer, i) or ""


def show(run, out, steps=12):
    """Writes the page for at most `steps` steps of a run, evenly spaced, the last among them. Returns their numbers."""
    lines = [json.loads(line) for line in Path(run, "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "values" in line]  # held-out completions are not valued
    every = sorted({line["step"] for line in lines})
    if not every:
        raise SystemExit(f"error: {run}/samples.jsonl holds no values: not of ppo_rlvr.py, or --log_samples 0")
    chosen = sorted({every[round((i + 1) / steps * len(every)) - 1] for i in range(min(steps, len(every)))})
    lines = [line for line in lines if line["step"] in chosen]
    model = json.loads(Path(run, "config.json").read_text(encoding="utf-8"))["args"]["model"]
    tokenizer = AutoTokenizer.from_pretrained(model).backend_tokenizer
    for line in lines:
        line["tokens"] = list(texts(tokenizer, line["token_ids"]))
    samples = json.dumps(lines).replace("</", "<\\/")  # ends no <script>
    page = PAGE.read_text(encoding="utf-8").replace("/* samples */", samples)
    Path(out).write_text(page, encoding="utf-8")
    return chosen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of a ppo_rlvr.py run")
    parser.add_argument("--out", required=True, help="HTML file to write")
    parser.add_argument("--steps", type=int, default=12, help="steps shown, evenly spaced")
    args = parser.parse_args()
    print(f"{args.out}: steps {', '.join(map(str, show(args.run, args.out, args.steps)))}")
