"""README and the tables of docs/: what they show of code is in the code, what they show of results is in the results, and
what they tell a user to type runs."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, assistant, user, write_jsonl

sys.path.insert(0, str(ROOT / "docs"))
import tables  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_heart_of_grpo_is_that_of_grpo():
    """Every line of README's excerpt stands in grpo.py, in this order."""
    [block] = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for line in block.splitlines() if line != "..."]
    assert len(lines) == 9
    script = [" ".join(line.split()) for line in (ROOT / "grpo.py").read_text(encoding="utf-8").splitlines()]
    places = [script.index(" ".join(line.split())) for line in lines]
    assert places == sorted(places)


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.stem)
def test_tables_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert tables.renewed(text) == text, f"{page.name}: run python docs/tables.py"
    assert text.count("<!-- table ") == len(tables.TABLE.findall(text))


def test_the_time_of_the_demo_is_that_of_the_results():
    assert f"[{tables.results('demo')['seconds']:.0f} s](benchmarks/results/demo.json) on two cores" in README
    assert tables.results("demo")["cores"] == 2 and tables.results("demo")["calls"] == 1


def test_every_table_is_shown():
    shown = {name for page in tables.PAGES for name in tables.TABLE.findall(page.read_text(encoding="utf-8"))}
    assert shown == tables.TABLES.keys()


def test_an_edited_table_is_put_right():
    page = "a\n<!-- table cards -->\n| 1 |\n<!-- end -->\nb\n"
    text = tables.renewed(page)
    assert text.startswith("a\n<!-- table cards -->\n| model |") and text.endswith("<!-- end -->\nb\n") and "| 1 |" not in text
    with pytest.raises(KeyError):
        tables.renewed(page.replace("cards", "none"))


# ---------------------------------------------------------------- README's commands, shrunk

SMALL = {"max_length": 96, "max_new_tokens": 8}
ALL = {"max_length": 96, "batch_size": 4, "steps": 2, "save_every": 0, "max_skip_frac": 1.0}  # of training
SHRUNK = {  # flags behind those that README has
    "sft.py": ALL | {"steps": 8, "lr": 1e-2},  # until it has learned what the prompts ask for now and then
    "reward_model.py": ALL,
    "dpo.py": ALL,
    "grpo.py": ALL | {"max_new_tokens": 8, "group_size": 2, "active_sampling": 0},
    "ppo_rlvr.py": ALL | {"max_new_tokens": 8},
    "pipeline.generate": SMALL,
    "pipeline.evaluate": SMALL,
    "pipeline.kl": SMALL | {"max_skip_frac": 1.0},
    "pipeline.chat": {"max_new_tokens": 8},
    "pipeline.look": {"max_length": 96, "max_skip_frac": 1.0},
}
ELSEWHERE = ("--nnodes", "from_gguf", "sft.py --help")  # need a second machine, a package index, or nothing


def commands():
    """The commands of README's blocks and text, in its order, that need nothing of the Hub: lists of words."""
    code = re.findall(r"^```bash\n(.*?)^```|`(python [^`]+)`", README, re.DOTALL | re.MULTILINE)
    for text in ("".join(part).replace("\\\n", " ") for part in code):
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            script = next((word for word in words if word in SHRUNK and word.endswith(".py")), None)
            from_hub = script and not {"--model", "MODEL"} & set(words)
            if words[:1] in (["python"], ["torchrun"]) and not from_hub and not any(part in line for part in ELSEWHERE):
                yield words


def files(folder, tiny_model):
    """What README's commands find in their folder."""
    numbers = range(1, 25)
    chats = [{"messages": [user(f"{i}+1="), assistant(str(i + 1))]} for i in numbers]
    pairs = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i)} for i in numbers]
    prompts = [{"messages": [user(f"{i}+2=")], "dataset": "contains", "ground_truth": "1"} for i in range(120)]
    (folder / "gsm8k").mkdir()
    for name, rows in {
        "train": chats, "test": chats, "test_pairs": pairs, "pairs": pairs, "test_prompts": prompts[:4], "prompts": prompts, "judged": prompts,
        "gsm8k/test": [{"question": f"How much is {i} and {i}?", "answer": f"#### {2 * i}"} for i in numbers],
    }.items():  # fmt: skip
        write_jsonl(folder / f"{name}.jsonl", rows)
    (folder / "mine.csv").write_text("question,answer\n1+1=,2\n2+1=,3\n")
    (folder / "MODEL").symlink_to(tiny_model)
    for name in ("forks", "benchmarks", "pipeline", "rewards", "kernels", "chat_templates", "common.py", "grpo.py", "ppo_rlvr.py", "sft.py", "dpo.py",
                 "reward_model.py"):  # fmt: skip
        (folder / name).symlink_to(ROOT / name)


def shrunk(words):
    """The same command on one process, with SHRUNK's flags, and the file that its script reads."""
    words = [sys.executable, *words[1:]] if words[0] == "python" else [sys.executable, *words[3:]]
    program = next((word for word in words if word in SHRUNK), None)
    other = {"reward_model.py": "test_pairs.jsonl", "grpo.py": "test_prompts.jsonl"}.get(program)
    words = [other if other and word == "test.jsonl" else word for word in words]
    if "rewards" in words:
        words = ["judged.jsonl" if word == "train.jsonl" else word for word in words]
    if "--compare" in words:
        return words
    words += ["1+1="] * (program == "pipeline.chat")
    return words + [part for name, value in SHRUNK.get(program, {}).items() for part in (f"--{name}", str(value))]


def test_commands_are_found():
    found = [" ".join(words) for words in commands()]
    for name in (*SHRUNK, "pipeline.merge", "pipeline.report", "pipeline.convert", "forks/make.py", "-m rewards", "memory.py"):
        assert any(name in line for line in found), name


@pytest.mark.slow
def test_what_readme_tells_to_type_runs(tiny_model, tmp_path):
    """In README's order, each with what the ones before have left."""
    files(tmp_path, tiny_model)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for words in commands():
        out = words[words.index("--out") + 1] if "--out" in words else ""
        if (tmp_path / out / "model").exists() or (out.endswith(("_eval", "kl")) and (tmp_path / out).exists()):
            continue  # README has the command twice
        if out.endswith(".jsonl"):
            (tmp_path / out).unlink(missing_ok=True)
        if "runs/dpo_2/model" in words:
            (tmp_path / "runs" / "dpo_2").symlink_to(tmp_path / "runs" / "dpo")
        line = shrunk(words)
        if ">" in line:
            line, target = line[: line.index(">")], line[line.index(">") + 1]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)}\n{shlex.join(line)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        if ">" in words:
            (tmp_path / target).write_text(done.stdout)
    assert json.loads((tmp_path / "dpo_eval" / "results.json").read_text())["results"]
