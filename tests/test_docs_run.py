"""What README and docs/ tell a user to type runs: every command, in the order of its page, made small.

A model or a file that no command before has made is put there, small and of the same kind; the flags that cost time are
given a second time. What is left out, and why, is in ELSEWHERE.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, assistant, user, write_jsonl
from test_docs import PAGES, commands

ELSEWHERE = {  # parts of a command, and where it is tried
    "…": "no whole command",
    "...": "no whole command",
    "pipeline.from_gguf": "tests/test_from_gguf.py: needs a package index or a file of llama.cpp",
    "benchmarks/gpu.py": "tests/test_rehearsal.py: needs a GPU",
    "benchmarks/forks.py": "tests/test_forks_runs.py: an hour",
    "studies/": "tests/test_studies.py: an hour and more",
    "docs/exercises.py": "tests/test_learn.py: needs make demo",
    "runs/demo/": "tests/test_learn.py: needs make demo",
}
TRAINING = {"max_length": 96, "batch_size": 4, "steps": 2, "save_every": 0, "max_skip_frac": 1}
RL = TRAINING | {"max_length": 500, "max_new_tokens": 8, "tokens_per_microbatch": 500, "slots": 8}
SAMPLING = {"max_length": 96, "max_new_tokens": 8, "max_skip_frac": 1}
SMALL = {
    "sft.py": TRAINING | {"lr": 1e-2, "steps": 8},  # until it answers right now and then, as pairs have to be made of it
    "reward_model.py": TRAINING,
    "dpo.py": TRAINING,
    "grpo.py": RL | {"group_size": 2, "active_sampling": 0},
    "ppo_rlvr.py": RL,
    "pipeline.generate": SAMPLING,
    "pipeline.evaluate": SAMPLING,
    "pipeline.kl": SAMPLING,
    "pipeline.chat": {"max_new_tokens": 8},
    "pipeline.look": {"max_length": 96, "max_skip_frac": 1},
}
WHERE_GIVEN = {"batch_tokens": 200, "sample_tp": 1, "stop_step": 2, "from_header": 4, "best_of": 4, "epochs": 1}
MODELS = ("--model", "--models", "--ref", "--ref_model", "--reward_model", "--value_model", "--base")
FILES = ("--data", "--eval_data", "--train", "--test", "--results")
WRITTEN = ("docs", "benchmarks")  # folders into which commands write: copied
SCRIPTS = ("sft.py", "reward_model.py", "dpo.py", "grpo.py", "ppo_rlvr.py")
KINDS = {"sft.py": "chats", "reward_model.py": "pairs", "dpo.py": "pairs", "pipeline.look": "chats",
         "pipeline.decontaminate": "chats", "pipeline.evaluate": "judged", "rewards": "judged"}  # fmt: skip


def typed(page):
    """The commands of a page's blocks and, in README, of its text: lists of words."""
    yield from commands(page)
    if page == PAGES[0]:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        yield from map(shlex.split, re.findall(r"`(python [^`]+)`", text))


def program_of(words):
    """sft.py, pipeline.kl, benchmarks/count.py, …: what a command runs."""
    if "-m" in words:
        return words[words.index("-m") + 1]
    return next((word for word in words if word.endswith(".py")), words[1])


def small_files(folder):
    """What the commands find in their folder: one file of each kind, and the names that stand on several pages."""
    numbers = range(1, 25)
    kinds = {
        "chats": [{"messages": [user(f"{i}+1="), assistant(str(i + 1))]} for i in numbers],
        "pairs": [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i)} for i in numbers],
        "prompts": [{"messages": [user(f"{i}+2=")], "dataset": "contains", "ground_truth": "1"} for i in range(120)],
    }
    judged = {
        "completions": ["1", "no"], "rewards": [1.0, 0.0], "reasons": ["right", "wrong"], "answers": ["1", ""],
        "ended": [True, True], "tokens": [2, 3], "token_ids": [[5, 2], [6, 7, 2]], "logprobs": [-1.0, -2.0],
        "model": "BIG", "temperature": 1.0, "top_p": 1.0, "seed": 1,
    }  # fmt: skip
    kinds["judged"] = [row | judged for row in kinds["prompts"]]
    questions = [{"question": f"How much is {i} and {i}?", "answer": f"#### {2 * i}"} for i in numbers]
    hh = [{name: f"\n\nHuman: {i}+1=\n\nAssistant: {i + (name == 'chosen')}" for name in ("chosen", "rejected")} for i in numbers]
    small = [row | {"model": "SMALL", "completions": ["no", "no!"], "rewards": [0.0, 0.0]} for row in kinds["judged"]]
    files = {f"small/{kind}": rows for kind, rows in kinds.items()}
    files |= {"gsm8k/test": questions, "gsm8k/train": questions, "preference/hh_helpful_base.train": hh}
    files |= {"math500": [{"problem": f"${i}+1$", "answer": str(i + 1), "solution": f"\\boxed{{{i + 1}}}"} for i in numbers]}
    files |= {"aime24": [{"problem": f"${i}+1$", "answer": str(i + 1)} for i in numbers][:3], "big": kinds["judged"], "small": small}
    files |= {f"seed_{seed}": [row | {"seed": seed} for row in kinds["judged"]] for seed in (1, 2)}
    for name, rows in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_jsonl(folder / f"{name}.jsonl", rows)
    (folder / "mine.csv").write_text("question,answer\n" + "".join(f"{i}+1=,{i + 1}\n" for i in range(60)))
    (folder / "question.txt").write_text("1+1=")
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("runs", "gsm8k", *WRITTEN):
            (folder / path.name).symlink_to(path)
    for name in WRITTEN:
        shutil.copytree(ROOT / name, folder / name)


def provide(flag, value, program, folder):
    """Puts the model or the file there that a flag names, unless it is: [NAME=]PATH[@SPLIT][:AMOUNT]."""
    path, split = re.fullmatch(r"(?:\w+=)?(.*?)(?:@(\w+))?(?::[\w.]+)?", value).groups()
    if flag not in (*MODELS, *FILES, "--run") or (folder / path).exists():
        return
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    if flag == "--run":
        (folder / path).symlink_to(next(folder.glob("runs/*/metrics.jsonl")).parent)
        return
    if flag in MODELS:
        small = folder / "small" / ("rm" if flag in ("--value_model", "--reward_model") else "model")
        (folder / path).symlink_to(small.resolve())
        return
    if not path.endswith(".jsonl"):  # on the Hub: a folder, as it is downloaded
        path = f"{path}/data/{split or 'train'}-00000-of-00001.jsonl"
        (folder / path).parent.mkdir(parents=True)
    shutil.copy(folder / "small" / f"{KINDS.get(program, 'prompts')}.jsonl", folder / path)


def made_small(words, folder):
    """The same command on one process; what it reads is there."""
    named = program_of(words)
    program = "grpo.py" if named.endswith(".py") and "/" not in named and named not in SMALL else named  # a fork of it
    words = words[words.index("-m") if "-m" in words else words.index(named) :]
    if program in SCRIPTS and "--help" not in words:  # what is on the Hub by default
        needed = {"--model": "hub/model", "--data": f"hub/{KINDS.get(program, 'prompts')}"}
        needed |= {"--value_model": "hub/rm"} if program == "ppo_rlvr.py" else {}
        words += [part for flag, value in needed.items() if flag not in words for part in (flag, value)]
    if not named.startswith("benchmarks/"):  # which know models by name
        flag = "--data" if named == "rewards" else ""
        for word in words[words.index(named) + 1 :]:
            flag = word if word.startswith("--") else flag
            if word != flag:
                provide(flag, word, program, folder)
    words = [re.sub(r"layers\.\d+", "layers.1", word.removeprefix("/")) for word in words]
    if program in SMALL and not {"--help", "--compare", "--results"} & set(words):
        given = {name: value for name, value in WHERE_GIVEN.items() if f"--{name}" in words}
        words += [part for name, value in (SMALL[program] | given).items() for part in (f"--{name}", str(value))]
    if program == "pipeline.chat" and not {"<", "What is 2 + 3?"} & set(words):
        words.append("1+1=")  # once, as nobody is at the keyboard
    return [sys.executable, *words]


def execute(words, folder):
    """Runs a command, with < FILE and > FILE as a shell has them. Fails with what it printed unless it exits with 0."""
    target, source = (words[words.index(sign) + 1] if sign in words else None for sign in "><")
    line = words[: min(words.index(sign) if sign in words else len(words) for sign in "><")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    typed_in = (folder / source).read_text() if source else ""
    done = subprocess.run(line, cwd=folder, env=environment, input=typed_in, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    if target:
        (folder / target).write_text(done.stdout)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_model):
    """A folder to copy: small files, a small model that ends its answers now and then, and a reward model of it."""
    folder = tmp_path_factory.mktemp("files")
    small_files(folder)
    (folder / "tiny").symlink_to(tiny_model)
    for script, model, name in (("sft.py", "tiny", "model"), ("reward_model.py", "small/model", "rm")):
        words = f"python {script} --model {model} --data small/{KINDS[script]}.jsonl --out made".split()
        execute(made_small(words, folder), folder)
        (folder / "made" / "model").rename(folder / "small" / name)
        shutil.rmtree(folder / "made")
    return folder


def wanted(page):
    return [words for words in typed(page) if not any(part in shlex.join(words) for part in ELSEWHERE)]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if wanted(page)], ids=lambda page: f"{page.parent.name}_{page.stem}")
def test_what_a_page_tells_to_type_runs(page, files, tmp_path):
    """Each with what the ones before it have left."""
    folder = tmp_path / "here"
    shutil.copytree(files, folder, symlinks=True)
    for words in wanted(page):
        out = words[words.index("--out") + 1].removeprefix("/") if "--out" in words else ""
        if out and (folder / out).exists():  # a stand-in, or of the same command in other words
            (folder / out).unlink() if (folder / out).is_file() else shutil.rmtree(folder / out)
        execute(made_small(words, folder), folder)
        assert not out or (folder / out).exists(), shlex.join(words)
    if page == PAGES[0]:
        assert json.loads((folder / "dpo_eval" / "results.json").read_text())["results"]


def test_most_commands_are_run():
    """Of all that the pages show, and every program of the pipeline is among them."""
    run = [words for page in PAGES for words in wanted(page)]
    programs = {program_of(words) for words in run}
    assert len(run) > 90 and set(SMALL) <= programs, (len(run), programs)
    assert {"pipeline.merge", "pipeline.report", "pipeline.convert", "pipeline.curate", "rewards", "forks/make.py"} <= programs


@pytest.mark.parametrize("part", [part for part in ELSEWHERE if len(part) > 3])
def test_what_is_left_out_is_somewhere(part):
    assert any(part in shlex.join(words) for page in PAGES for words in typed(page)), f"no page has {part}"
    [test] = re.findall(r"^tests/\w+\.py", ELSEWHERE[part])
    assert (ROOT / test).is_file() and Path(part).stem in (ROOT / test).read_text(encoding="utf-8"), (part, test)
