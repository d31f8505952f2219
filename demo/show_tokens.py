"""One HTML page that shows what a value model thinks of each token, from the samples.jsonl of a ppo_rlvr.py run.

    python demo/show_tokens.py --run runs/demo/ppo --out runs/demo/ppo_tokens.html

Tokens are coloured by value, advantage, reward or KL; below them is the curve of the value. One file is all there is.
It opens at the last step that has more than one wrong answer.
"""

import argparse
import itertools
import json
from pathlib import Path

import jinja2
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,  # a place that nothing fills is an error
    autoescape=jinja2.select_autoescape(["html"]),
    trim_blocks=True,
)


def texts(tokenizer, ids):
    """The text that each token adds; "" for one that only begins a character."""
    stream = DecodeStream(skip_special_tokens=False)
    for i in ids:
        try:
            yield stream.step(tokenizer, i) or ""
        except Exception:  # tokenizers raises no other class, where bytes are no UTF-8: begin anew
            stream = DecodeStream(skip_special_tokens=False)
            yield stream.step(tokenizer, i) or ""


def read(run, steps=12, slip=None):
    """The samples of at most `steps` steps of a run that have values, evenly spaced, the last among them.

    slip: function of (prompt, completion) that returns the index of the first wrong character, or None. In a sample it
    is that of the token. SystemExit if the run has no values.
    """
    lines = [json.loads(line) for line in Path(run, "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "values" in line]  # held-out completions are not valued
    every = sorted({line["step"] for line in lines})
    if not every:
        raise SystemExit(f"error: {run}/samples.jsonl holds no values: not of ppo_rlvr.py, or --log_samples 0")
    count = min(steps, len(every))
    chosen = {every[round((i + 1) / count * len(every)) - 1] for i in range(count)}
    lines = [line for line in lines if line["step"] in chosen]
    model = json.loads(Path(run, "config.json").read_text(encoding="utf-8"))["args"]["model"]
    tokenizer = AutoTokenizer.from_pretrained(model).backend_tokenizer
    for line in lines:
        line["tokens"] = list(texts(tokenizer, line["token_ids"]))
        character = slip(line["prompt"].strip(), line["completion"]) if slip else None
        line["slip"] = None if character is None else token_at(line["tokens"], character)
    return lines


def token_at(tokens, character):
    """The index of the token in which the character with this index stands; the last if it is beyond them."""
    ends = itertools.accumulate(map(len, tokens))
    return next((i for i, end in enumerate(ends) if character < end), len(tokens) - 1)


def as_script(samples):
    """JSON of samples that ends no <script>."""
    return json.dumps(samples).replace("<", "\\u003c")


def show(run, out, steps=12, slip=None):
    """Writes the page of `read`'s samples. Returns the numbers of their steps."""
    samples = read(run, steps, slip)
    page = TEMPLATES.get_template("show_tokens.html")
    Path(out).write_text(page.render(samples=as_script(samples), has_slips=slip is not None), encoding="utf-8")
    return sorted({sample["step"] for sample in samples})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of a ppo_rlvr.py run")
    parser.add_argument("--out", required=True, help="HTML file to write")
    parser.add_argument("--steps", type=int, default=12, help="steps shown, evenly spaced")
    args = parser.parse_args()
    print(f"{args.out}: steps {', '.join(map(str, show(args.run, args.out, args.steps)))}")
