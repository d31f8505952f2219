"""What a demo has done so far, so that the same command goes on: OUT/demo.json."""

import hashlib
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import common

ROOT = Path(__file__).resolve().parent.parent
CODE = (  # what decides the results
    "common.py", "sft.py", "reward_model.py", "dpo.py", "grpo.py", "ppo_rlvr.py", "kernels/*.py", "rewards/*.py",
    "pipeline/**/*.py", "demo/prepare.py", "demo/run.py", "demo/task.py",
)  # fmt: skip

# What a demo makes in its folder. Nothing else there is ever deleted.
MADE = (
    "base", "clean", "sft", "rm", "dpo", "grpo", "ppo", "eval", "kl", "train.jsonl", "held_out.jsonl", "prompts.jsonl",
    "held_out_prompts.jsonl", "samples.jsonl", "pairs.jsonl", "held_out_samples.jsonl", "held_out_pairs.jsonl",
    "results.json", "REPORT.md", "report.html", "ppo_tokens.html", "*.png", ".*.unfinished*",
)  # fmt: skip


class Record:
    """The finished stages of the demo in a folder, and what they took.

    An earlier demo there goes on if it had the same seed and the same code. Otherwise, or with `anew`, what it has made
    is deleted first. A folder that holds something and no demo.json is refused: SystemExit.
    """

    def __init__(self, out, seed, anew=False):
        self.path, self.lock = Path(out, "demo.json"), threading.Lock()
        self.started, self.cpu_at_start = time.perf_counter(), cpu_seconds()
        stamp = {"seed": seed, "code": code_hash()}
        found = json.loads(self.path.read_text()) if self.path.exists() else None
        if found is None and self.path.parent.exists() and any(self.path.parent.iterdir()):
            sys.exit(f"error: {out} holds files, but no demo.json of an earlier demo: choose another --out")
        if found and not anew and {name: found.get(name) for name in stamp} == stamp:
            self.data, self.before, self.finished = found, found["total"], found["finished"]
            if not self.finished:
                self.before["calls"] += 1
                self.save()
            return
        if found:
            why = "--anew" if anew else f"seed {found['seed']}" if found["seed"] != seed else "other code"
            print(f"{out}: the demo that is there is deleted ({why})", flush=True)
            delete(self.path.parent)
        self.before = {"seconds": 0.0, "cpu_seconds": 0.0, "calls": 1}
        self.data, self.finished = stamp | {"total": self.before, "stages": {}, "finished": False}, False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.save()

    def has(self, stage):
        return stage in self.data["stages"]

    def add(self, stage, seconds):
        """A stage is finished. Two threads may call this."""
        with self.lock:
            self.data["stages"][stage] = round(seconds, 1)
            self.data["total"] = {
                "seconds": round(self.before["seconds"] + time.perf_counter() - self.started, 1),
                "cpu_seconds": round(self.before["cpu_seconds"] + cpu_seconds() - self.cpu_at_start, 1),
                "calls": self.before["calls"],
            }
            self.save()

    def finish(self):
        self.data["finished"] = True
        self.save()

    def save(self):
        common.replace_text(self.path, json.dumps(self.data, indent=1) + "\n")


def cpu_seconds():
    """What this process and its finished children have computed so far."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def code_hash():
    """Of all code that decides a demo's results."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in CODE for path in ROOT.glob(pattern)}):
        found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def delete(folder):
    """Deletes what a demo has made in its folder."""
    for path in [path for pattern in MADE for path in folder.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
