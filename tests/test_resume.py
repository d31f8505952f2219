"""kill -9 at any moment, SIGTERM, another number of processes: the same command gives the same run."""

import random
import resource
import shutil
import signal
import time

import pytest
from conftest import assistant, user, write_jsonl
from launch import children, kill, metrics, run, start, trace, weights
from test_sft import assert_same_trajectory
from transformers import AutoConfig

SAVE_EVERY = 2


@pytest.fixture(scope="module")
def flags(tiny_model, tmp_path_factory):
    """A run of 30 steps (2.5 epochs, the last batch partial) that draws dropout and saves every second step."""
    folder = tmp_path_factory.mktemp("resume")
    rows = [{"messages": [user(f"What is {i} + {i}?" * (1 + i % 5)), assistant(f"It is {2 * i}.")]} for i in range(47)]
    model = folder / "model"
    shutil.copytree(tiny_model, model)
    config = AutoConfig.from_pretrained(model)
    config.attention_dropout = 0.1  # makes the result depend on the random state
    config.save_pretrained(model)
    data = write_jsonl(folder / "rows.jsonl", rows)
    return {
        "model": model, "data": data, "eval_data": data, "max_length": 128, "batch_size": 4, "epochs": 2.5,
        "tokens_per_microbatch": 128, "lr": 1e-3, "save_every": SAVE_EVERY, "eval_every": 7, "answers": 0,
    }  # fmt: skip


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def uninterrupted(request, flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    run("sft.py", request.param, out=out, **flags)
    assert metrics(out)[-1]["step"] == 30
    return request.param, out


def kill_at_a_random_moment(process, out, rng, inside_a_save):
    """Waits until the run has moved on by some steps (or is writing a checkpoint), then a little longer, then kills."""
    wanted = len(metrics(out)) if (out / "metrics.jsonl").exists() else 0
    wanted += rng.randint(2, 6)
    while process.poll() is None:
        saving = any(out.glob("checkpoints/*.tmp"))
        moved = (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_bytes().splitlines()) >= wanted
        if moved and (saving or not inside_a_save):
            break
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.03 if inside_a_save else 0.2))
    saving = any(out.glob("checkpoints/*.tmp"))
    kill(process)
    return saving


def check_kills(uninterrupted, flags, out, kills, seed):
    processes, reference = uninterrupted
    rng, killed, in_save = random.Random(seed), 0, 0
    for attempt in range(100):
        process = start("sft.py", processes, out=out, **flags)
        if killed < kills:
            saving = kill_at_a_random_moment(process, out, rng, inside_a_save=attempt % 2 == 0)
            if (out / "model").exists():  # it finished first: once more, from nothing
                shutil.rmtree(out)
                continue
            killed, in_save = killed + 1, in_save + saving
        else:
            stdout, stderr = process.communicate(timeout=300)
            assert process.returncode == 0, f"the same command did not continue:\n{stdout}\n{stderr}"
            break
    assert trace(out) == trace(reference)
    assert weights(out) == weights(reference)
    print(f"{killed} kills, {in_save} inside a save: bit-identical")
    assert killed == kills and in_save


def test_killed_twice(uninterrupted, flags, tmp_path):
    """The loss trace and the weights are bit for bit those of the run nobody killed."""
    check_kills(uninterrupted, flags, tmp_path / "run", kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_killed_many_times(uninterrupted, flags, tmp_path, seed):
    check_kills(uninterrupted, flags, tmp_path / "run", kills=4, seed=seed)


def test_sigterm_finishes_the_step_saves_and_continues(uninterrupted, flags, tmp_path):
    """Exit code 143, a checkpoint of the last logged step, and the same run in the end."""
    processes, reference = uninterrupted
    out = tmp_path / "run"
    process = start("sft.py", processes, out=out, **flags | {"save_every": 0})
    while not ((out / "metrics.jsonl").exists() and len(metrics(out)) > 9):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == (143 if processes == 1 else 1)  # torchrun has one code for every failure
    step = metrics(out)[-1]["step"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step_{step}"] and step < 30
    run("sft.py", processes, out=out, **flags)
    assert trace(out) == trace(reference) and weights(out) == weights(reference)


@pytest.mark.parametrize("processes", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_saved_on_two_processes_continued_on_one_and_four(tiny_model, flags, tmp_path, processes):
    """Without dropout a run continues on another number of processes with the losses it would have had (1e-6)."""
    flags = flags | {"model": tiny_model}
    run("sft.py", out=tmp_path / "whole", **flags)
    out = tmp_path / "two"
    process = start("sft.py", 2, out=out, **flags)
    while not any(out.glob("checkpoints/step_1*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert 10 <= metrics(out)[-1]["step"] < 30
    stdout, _ = run("sft.py", processes, out=out, **flags)
    assert "number of processes has changed" in stdout
    assert_same_trajectory(trace(out), trace(tmp_path / "whole"), 1e-6)


def test_only_the_newest_checkpoints_stay_and_debris_goes(uninterrupted, flags, tmp_path):
    """--keep 2; what a kill left half written or half deleted is cleared by the next start."""
    _, reference = uninterrupted
    kept = sorted(path.name for path in (reference / "checkpoints").iterdir())
    assert kept == ["step_26", "step_28"]
    assert (reference / "checkpoints" / "step_28" / "model" / "model.safetensors").exists()


def test_a_checkpoint_of_somebody_else_is_not_loaded(uninterrupted, flags, tmp_path):
    """torch's checkpoint reader unpickles: a world-writable folder is refused."""
    processes, reference = uninterrupted
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    shutil.rmtree(out / "model")
    (out / "checkpoints" / "step_28").chmod(0o777)
    _, stderr = run("sft.py", processes, expect=1, out=out, **flags)
    assert "world-writable" in stderr


def test_a_full_disk_loses_nothing(uninterrupted, flags, tmp_path):
    """A save that cannot write names the path and the free space; the checkpoint before it still continues the run."""
    processes, reference = uninterrupted
    out = tmp_path / "run"
    process = start("sft.py", processes, out=out, **flags)
    while not any(out.glob("checkpoints/step_*[0-9]")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    for pid in [process.pid, *children(process.pid)]:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, 20_000))  # files beyond 20 kB cannot be written
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1 and "failed" in stderr and "bytes free" in stderr, stderr
    run("sft.py", processes, out=out, **flags)
    assert trace(out) == trace(reference) and weights(out) == weights(reference)
