"""kill -9 in every phase of every script: no process is left, and the same command gives bit for bit the same run."""

import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest
import rl
from conftest import assistant, user, write_jsonl
from launch import MEASURED, ROOT, children, command, free_port, metrics, quick
from transformers import AutoConfig

import common

SCRIPTS = ("sft.py", "reward_model.py", "dpo.py", "grpo.py", "ppo_rlvr.py")


def small_runs(folder, tiny_model):
    """{script: flags} of runs of 12 steps (RL: 8) whose result depends on all that a run draws: dropout or samples."""
    dropout = Path(folder, "dropout")
    shutil.copytree(tiny_model, dropout)
    config = AutoConfig.from_pretrained(dropout)
    config.attention_dropout = 0.1
    config.save_pretrained(dropout)
    questions = [f"What is {i} + {i}?" * (1 + i % 5) for i in range(23)]
    chats = [{"messages": [user(text), assistant(f"It is {2 * i}.")]} for i, text in enumerate(questions)]
    pairs = [{"prompt": text, "chosen": f"It is {2 * i}.", "rejected": "No."} for i, text in enumerate(questions)]
    flags = {
        "max_length": 128, "batch_size": 4, "epochs": 2, "tokens_per_microbatch": 128, "lr": 1e-3, "save_every": 2,
        "eval_every": 3, "keep": 3,
    }  # fmt: skip
    chats, pairs = write_jsonl(folder / "chats.jsonl", chats), write_jsonl(folder / "pairs.jsonl", pairs)
    of_pairs = flags | {"data": pairs, "eval_data": pairs}
    prompts, _, _ = rl.small_run(folder)
    of_prompts = rl.rewarded_by_a_built_in(folder, prompts) | {
        "batch_size": 4, "group_size": 4, "inflight": 4, "steps": 8, "save_every": 2, "eval_every": 3, "keep": 3,
    }  # fmt: skip
    of_prompts["eval_data"] = of_prompts["data"]
    return {
        "sft.py": flags | {"model": dropout, "data": chats, "eval_data": chats},
        "reward_model.py": of_pairs | {"model": dropout},
        "dpo.py": of_pairs | {"model": tiny_model},
        "grpo.py": of_prompts,
        "ppo_rlvr.py": of_prompts | {"value_model": of_prompts["model"], "value_lr": 1e-3, "passes": 2, "no_eos_score": None},
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    return small_runs(tmp_path_factory.mktemp("runs"), tiny_model)


def course(out):
    """All that a run logged, without what it measured of the machine."""
    lines = [{name: value for name, value in line.items() if name not in MEASURED} for line in metrics(out)]
    samples = out / "samples.jsonl"
    return lines, samples.read_text() if samples.exists() else None


def weights(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.safetensors")}


def assert_same(out, reference):
    lines, samples = course(out)
    wanted, wanted_samples = course(reference)
    assert lines == wanted
    assert samples == wanted_samples
    assert weights(out / "model") == weights(reference / "model") != {}


# -------------------------------------------------------------------------------------------------------- the kills


def marked(mark):
    """{process id: command line} of the processes that have this mark in their environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"POSTCARD_TEST={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
        except OSError:  # it has just ended
            pass
    return found


def newest(out):
    """Step of the newest checkpoint that is whole, or 0."""
    return max(common.checkpoints(out), default=0)


def reached(phase, out, rng, begun=lambda: True):
    """Function that tells when a run, started now, is in this phase: in the loop and later, after another checkpoint.

    begun: whether the processes are there that start-up is of; torchrun alone is not worth a kill.
    """
    started, before, since = time.time(), newest(out), []
    delay = rng.uniform(0.2, 6)  # seconds; of it the phases that are shorter take a part
    config, log = out / "config.json", out / "metrics.jsonl"
    signs = {
        "start-up": (begun, 1),
        # After the folder was opened, before the first line.
        "reference": (lambda: config.exists() and config.stat().st_mtime > started and not log.exists(), 1 / 10),
        "loop": (lambda: newest(out) > before, 1 / 50),
        # Evaluation comes before each line, and here it is longer than a step.
        "evaluation": (lambda: newest(out) > before and log.stat().st_mtime > time.time() - 0.1, 1 / 50),
        "save": (lambda: newest(out) > before and any(out.glob("checkpoints/*.tmp")), 1 / 200),
        "export": ((out / "model.tmp").exists, 1 / 200),
    }
    is_there, share = signs[phase]

    def is_in_phase():
        if not is_there():
            if phase != "evaluation":
                since.clear()
        elif not since:
            since.append(time.time())
        return bool(since) and time.time() >= since[0] + delay * share

    return is_in_phase


def begin(script, processes, out, mark, cache, flags, log):
    """A run in a session of its own, so that a test can kill its process group."""
    return spawn(command(script, processes, flags | {"out": out}), mark, cache, log)


def spawn(words, mark, cache, log):
    """A command in a session of its own, with a mark in its environment."""
    environment = os.environ | {"POSTCARD_TEST": mark, "HF_DATASETS_CACHE": str(cache)}
    with open(log, "ab") as file:
        return subprocess.Popen(words, env=environment, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)


def kill_one(process, target):
    workers = children(process.pid)
    if target == "rank" and workers:
        os.kill(workers[-1], signal.SIGKILL)
    elif target == "group":
        os.killpg(process.pid, signal.SIGKILL)
    else:  # torchrun alone, or the only process
        process.kill()


def survivors(process, mark, patience):
    """How long processes of a run lived after a kill, in seconds, and the command lines of those that still do."""
    killed = time.time()
    while (left := marked(mark)) and time.time() < killed + patience:
        process.poll()  # reaps it
        time.sleep(0.02)
    return time.time() - killed, left


def phases_of(script):
    return ["start-up", "reference" if script == "dpo.py" else "start-up", "loop", "save", "evaluation", "export"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_in_every_phase(runs, tmp_path, script, processes):
    """Six kills: one process, or of two a rank, torchrun or its group. What torchrun leaves while a worker imports ends
    once that has imported."""
    flags = runs[script] | {"eval_every": 1, "save_every": 1}
    rng = random.Random(f"{script} {processes}")
    whole, out, log, cache = tmp_path / "whole", tmp_path / "run", tmp_path / "log", tmp_path / "cache"
    process = begin(script, processes, whole, "whole", tmp_path / "whole_cache", flags, log)
    assert process.wait(timeout=400) == 0, log.read_text()
    targets = ["torchrun", "rank", "group", "torchrun", "group", "rank"] if processes > 1 else ["process"] * 6
    continued = 0
    for phase, target in zip(phases_of(script), targets, strict=True):
        for _ in range(8):
            mark = uuid.uuid4().hex
            is_in_phase = reached(phase, out, rng, lambda: len(marked(mark)) >= (processes + 1 if processes > 1 else 1))
            resumes = newest(out) > 0
            process = begin(script, processes, out, mark, cache, flags, log)
            while not (is_there := is_in_phase()) and process.poll() is None:
                time.sleep(0.001)
            if is_there and process.poll() is None:
                break
            assert process.wait() == 0, log.read_text()[-3000:]  # it has finished before it could be killed: once more
            shutil.rmtree(out)
            shutil.rmtree(cache)
        else:
            pytest.fail(f"never seen in the phase {phase}")
        kill_one(process, target)
        continued += resumes
        importing = processes > 1 and phase == "start-up"
        seconds, left = survivors(process, mark, patience=90 if importing else 5)
        print(f"{script} on {processes}, {phase}: {target} killed, all ended {seconds:.1f} s later", flush=True)
        assert not left, f"{phase}, {target} killed, {seconds:.0f} s later: {left}\n{log.read_text()[-3000:]}"
    assert continued >= 2, "of the runs that were killed, too few had gone on from a checkpoint"
    process = begin(script, processes, out, "last", cache, flags, log)
    assert process.wait(timeout=400) == 0, log.read_text()[-3000:]
    assert_same(out, whole)


@pytest.mark.parametrize("script", ["sft.py", "grpo.py"])
def test_killed_once(runs, tmp_path, script):
    """The same in forks, which is faster: killed in the loop or inside a save."""
    mark, out, rng = uuid.uuid4().hex, tmp_path / "run", random.Random(script)
    assert quick(script, out=tmp_path / "whole", **runs[script])[0] == 0
    phase = reached(rng.choice(["loop", "save"]), out, rng)
    code, *texts = quick(script, out=out, kill_when=phase, env={"POSTCARD_TEST": mark}, **runs[script])
    assert code == -9 and newest(out) > 0, texts
    end = time.time() + 5
    while left := marked(mark):  # verifier workers
        assert time.time() < end, left
    code, *texts = quick(script, out=out, **runs[script])
    assert code == 0, texts
    assert_same(out, tmp_path / "whole")


# ------------------------------------------------------------------------------------------------------ two machines


def machine(script, port, out, mark, flags, log):
    """One of two machines with two processes each, which find each other by a rendezvous on this one."""
    words = command(script, 2, flags | {"out": out})
    rendezvous = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=run", "--local_addr=localhost"]
    words[words.index("--standalone") : words.index("--standalone") + 1] = rendezvous
    return spawn(words, mark, str(out) + "_cache", log)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("script", ["sft.py", "grpo.py"])
def test_one_of_two_machines_dies(runs, tmp_path, script, killed):
    """Sharded within a machine, replicated on the other; in grpo.py the ranks of a machine share a copy to sample from.
    The other machine's processes end by themselves. The same commands give bit for bit the same run."""
    flags = runs[script] | {"shard": "hybrid", "save_every": 1, "batch_size": 4}
    if script == "grpo.py":
        flags["sample_tp"] = 2
    log, rng = tmp_path / "log", random.Random(f"{script} {killed}")

    def begin_both(out, mark):
        port = free_port()
        return [machine(script, port, out, mark, flags, log) for _ in range(2)]

    assert [process.wait(timeout=400) for process in begin_both(tmp_path / "whole", "whole")] == [0, 0], log.read_text()
    out, mark = tmp_path / "run", uuid.uuid4().hex
    for _ in range(2):
        is_in_phase = reached("loop", out, rng)
        machines = begin_both(out, mark)
        while not is_in_phase():
            assert machines[0].poll() is None, log.read_text()[-3000:]
            time.sleep(0.001)
        os.killpg(machines[killed].pid, signal.SIGKILL)
        for process in machines:
            process.wait(timeout=120)
        assert not survivors(process, mark, patience=30)[1]
    assert newest(out) >= 2
    assert [process.wait(timeout=400) for process in begin_both(out, mark)] == [0, 0], log.read_text()[-3000:]
    assert_same(out, tmp_path / "whole")
