"""The whole pipeline on a tiny model and a tiny task, on a laptop CPU: what `make demo` runs.

    python demo/run.py --out runs/demo

Makes a model that knows nothing (prepare.py), teaches it two-digit addition from demonstrations of which three in
five are wrong (sft.py), measures it before and after on problems it has not seen (evaluate.py), and draws the loss
(plot.py).
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

STARTED = time.perf_counter()  # importing torch is a fair part of the wait

# One thread: with two, on two cores that another program used too, a step took three to eight times as long, because
# threads wait for each other busily. Read when torch is first imported, so it stands before the imports.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import evaluate  # noqa: E402
import plot  # noqa: E402
import prepare  # noqa: E402
import task  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def run_script(name, **flags):
    """Runs one of the project's scripts as a user would, showing the command. Stops the demo if it fails."""
    flags = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    print(f"\n$ python {name} {shlex.join(flags)}", flush=True)
    code = subprocess.run([sys.executable, ROOT / name, *flags]).returncode
    if code:
        sys.exit(f"error: {name} failed with exit code {code}")


def main(out, seed):
    if Path(out, "sft").exists():
        # an unfinished run would be continued and a finished one left as it is, but the demo always begins anew
        if not Path(out, "base", "config.json").exists():
            sys.exit(f"error: {out}/sft exists and is not from an earlier demo: choose another --out")
        shutil.rmtree(Path(out, "sft"))
    parameters = prepare.prepare(out, seed)
    before = evaluate.evaluate(f"{out}/base")
    evaluate.show(before)

    run_script(
        "sft.py", model=f"{out}/base", data=f"{out}/train.jsonl", eval_data=f"{out}/held_out.jsonl", out=f"{out}/sft",
        max_length=64, batch_size=64, lr=4e-3, epochs=4, eval_every=50, save_every=0, seed=seed,
    )  # fmt: skip

    after = evaluate.evaluate(f"{out}/sft/model")
    evaluate.show(after)
    lowest = task.lowest_loss(f"{out}/train.jsonl")
    plot.plot(f"{out}/sft", f"{out}/loss.png", "Supervised fine-tuning on sloppy additions", lowest)
    Path(out, "results.json").write_text(json.dumps({"before": before, "after": after}, indent=2))

    total = before["sampled"]["total"]
    print(f"\nShare of {total} held-out additions that is right, with 95 % intervals ({parameters:,} parameters)\n")
    print(f"{'':20}{'sampled':24}{'greedy':24}")
    for name, result in (("random weights", before), ("after sft.py", after)):
        print(f"{name:20}{evaluate.interval(result['sampled']):24}{evaluate.interval(result['greedy']):24}")
    print(f"\n{time.perf_counter() - STARTED:.0f} s. Model: {out}/sft/model   losses: {out}/loss.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/demo", help="folder to write to; an earlier demo there is replaced")
    parser.add_argument("--seed", type=int, default=1, help="decides the weights, the demonstrations and their order")
    args = parser.parse_args()
    main(args.out, args.seed)
