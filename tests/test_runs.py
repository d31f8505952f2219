"""A run owns its folder: nobody else's files are touched, no two runs share one, signals and errors lose nothing.

Damaged checkpoints are in test_damage.py, flags in test_flags.py, kills in test_resume.py and test_kills.py.
"""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
from conftest import assistant, user, write_jsonl
from launch import ROOT, call, command, kill, metrics, run, start, trace, weights
from transformers import AutoModelForCausalLM

import common
import dpo
import sft
from common import RunError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [{"messages": [user(f"What is {i} + {i}?"), assistant(f"It is {2 * i}.")]} for i in range(40)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture
def flags(tiny_model, data):
    return {
        "model": tiny_model, "data": [data], "max_length": 64, "batch_size": 4, "lr": 1e-3, "lr_schedule": "constant",
        "warmup_ratio": 0.0, "steps": 6, "save_every": 2,
    }  # fmt: skip


def wait_for(condition, process, seconds=120):
    """Until the condition holds. Fails if the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def one_error(stderr):
    """The error, which is all there is on stderr."""
    lines = [line for line in stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    return lines[0]


# ------------------------------------------------------------------------------------------------- whose folder it is


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OTHERS = {
    "somebody's notes": {"notes.md": "mine"},
    "a model": {"model/config.json": "{}"},
    "checkpoints": {"checkpoints/step_5/x": ""},
    "another tool's run": {"config.json": '{"lr": 1}', "metrics.jsonl": "", "checkpoints/other_tool.tmp/x": "1",
                           "checkpoints/old.trash/x": "1", "model.tmp/x": "1"},
    "a list": {"config.json": "[]"},
    "no object": {"config.json": "3"},
    "no JSON": {"config.json": '{"script": "sft.py", '},
    "no text": {"config.json": b"\xff\xfe"},
    "a run without its configuration": {"metrics.jsonl": '{"step": 1}\n', "checkpoints/step_2/sums.json": "{}"},
}  # fmt: skip


@pytest.mark.parametrize("files", OTHERS.values(), ids=OTHERS)
def test_a_folder_that_is_not_ours_is_refused_and_left_as_it_is(flags, tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match="choose another --out") as error:
        call(sft, out=tmp_path, **flags)
    assert str(tmp_path) in str(error.value)
    before.pop(tmp_path / "lock", None)
    after = snapshot(tmp_path)
    after.pop(tmp_path / "lock", None)
    assert after == before


def test_logs_may_lie_in_a_new_folder(flags, tmp_path):
    """A shell's or SLURM's output is there before the run."""
    (tmp_path / "slurm-7.out").write_text("…")
    call(sft, out=tmp_path, **flags | {"steps": 1})
    assert (tmp_path / "model").exists() and (tmp_path / "slurm-7.out").exists()


def test_the_model_one_starts_from_is_not_a_finished_run(flags, tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "run" / "model")
    with pytest.raises(RunError, match="no config.json of a run"):
        call(sft, out=tmp_path / "run", **flags | {"model": tmp_path / "run" / "model"})


def test_no_folder_is_an_error(flags):
    with pytest.raises(RunError, match="--out"):
        call(sft, out="", **flags)


def test_only_our_own_debris_is_deleted(flags, tmp_path):
    """What lies beside checkpoints stays, and stops nothing."""
    out = tmp_path / "run"
    call(sft, out=out, **flags | {"stop_step": 4})
    theirs = ["other_tool.tmp", "old.trash", "step_22_backup", "step_20.bak", "step_007", "step_4.damaged.old", "notes"]
    for name in theirs + ["step_6.tmp", "step_2.trash"]:
        (out / "checkpoints" / name).mkdir()
        (out / "checkpoints" / name / "file").write_text(name)
    (out / "model.tmp").mkdir()
    call(sft, out=out, **flags)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == sorted([*theirs, "step_2", "step_4"])
    assert not (out / "model.tmp").exists() and metrics(out)[-1]["step"] == 6


def test_two_runs_in_one_folder(flags, tmp_path):
    """The second is told which process has it, and changes nothing; the lock dies with the first, however it ends."""
    out = tmp_path / "run"
    first = start("sft.py", out=out, **flags | {"steps": 10_000, "epochs": 10_000, "save_every": 0})
    wait_for(lambda: (out / "metrics.jsonl").exists() and metrics(out), first)
    config = (out / "config.json").read_bytes()
    with pytest.raises(RunError, match=f"in use by process {first.pid} on "):
        call(sft, out=out, **flags | {"lr": 2e-3})
    assert (out / "config.json").read_bytes() == config and first.poll() is None
    kill(first)
    call(sft, out=out, **flags)
    assert metrics(out)[-1]["step"] == 6 and [entry["step"] for entry in metrics(out)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_several_tasks_without_torchrun_are_refused(flags, tmp_path, monkeypatch, variable):
    """Each would be a run of its own, in one folder."""
    monkeypatch.setenv(variable, "2")
    with pytest.raises(RunError, match="2 tasks.*torchrun"):
        call(sft, out=tmp_path / "run", **flags)
    monkeypatch.setenv(variable, "1")
    call(sft, out=tmp_path / "run", **flags | {"steps": 1})


def test_checkpoints_are_private_and_models_follow_the_umask(flags, tmp_path):
    before = os.umask(0)
    try:
        call(sft, out=tmp_path / "open", **flags | {"stop_step": 2})
        call(sft, out=tmp_path / "open", **flags)
        os.umask(0o027)
        call(sft, out=tmp_path / "group", **flags)
    finally:
        os.umask(before)
    for out in (tmp_path / "open", tmp_path / "group"):
        assert stat.S_IMODE((out / "checkpoints").stat().st_mode) == 0o700
        assert all(not path.stat().st_mode & 0o077 for path in (out / "checkpoints").rglob("*"))
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o666 for path in (tmp_path / "open" / "model").iterdir())
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o640 for path in (tmp_path / "group" / "model").iterdir())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", [".", "states.pt", "state/.metadata", "state/__0_0.distcp"])
def test_files_of_others_in_a_checkpoint_are_not_unpickled(flags, tmp_path, name):
    out = tmp_path / "run"
    call(sft, out=out, **flags | {"stop_step": 2})
    os.chown(out / "checkpoints" / "step_2" / name, 1, -1)
    with pytest.raises(RunError, match=re.escape(str(out / "checkpoints" / "step_2" / name)) + " belongs to somebody"):
        call(sft, out=out, **flags)
    os.chown(out / "checkpoints" / "step_2" / name, 0, -1)
    call(sft, out=out, **flags)
    assert metrics(out)[-1]["step"] == 6


def test_damaged_weights_of_a_model_are_noticed(flags, tmp_path):
    """SHA256SUMS in the folder of a model is read by the next script."""
    call(sft, out=tmp_path / "run", **flags | {"steps": 1})
    file = tmp_path / "run" / "model" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RunError, match="SHA256SUMS does not fit model.safetensors"):
        call(sft, out=tmp_path / "next", **flags | {"model": tmp_path / "run" / "model"})
    (file.parent / "SHA256SUMS").unlink()  # as the message says, for who has changed them on purpose
    call(sft, out=tmp_path / "next", **flags | {"model": file.parent, "steps": 1})


# ----------------------------------------------------------------------------------------------- continued on purpose


def test_more_steps_under_a_constant_schedule(flags, tmp_path):
    """A run that is longer than planned is the run that was planned as long; the shorter one's model stays."""
    call(sft, out=tmp_path / "whole", **flags | {"steps": 9})
    out = tmp_path / "run"
    call(sft, out=out, **flags | {"steps": 5})
    first = weights(out)
    call(sft, out=out, **flags | {"steps": 9})
    assert trace(out) == trace(tmp_path / "whole") and weights(out) == weights(tmp_path / "whole")
    assert (out / "model_of_5_steps" / "model.safetensors").read_bytes() == first
    with pytest.raises(RunError, match="steps: 9 → 5"):  # there is no way back
        call(sft, out=out, **flags | {"steps": 5})


def test_more_epochs_under_a_constant_schedule(flags, tmp_path, data):
    flags = flags | {"steps": None, "batch_size": 12}  # 40 rows: the last batch of the shorter run has 4
    call(sft, out=tmp_path / "whole", **flags | {"epochs": 2.0})
    call(sft, out=tmp_path / "run", **flags | {"epochs": 1.0})
    assert len(metrics(tmp_path / "run")) == 4
    call(sft, out=tmp_path / "run", **flags | {"epochs": 2.0})
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.parametrize("schedule", [{"lr_schedule": "linear"}, {"warmup_ratio": 0.5}])
def test_more_steps_under_another_schedule_are_refused(flags, tmp_path, schedule):
    """The learning rates of the steps that were made would have been others."""
    call(sft, out=tmp_path / "run", **flags | schedule)
    with pytest.raises(RunError, match="steps: 6 → 9"):
        call(sft, out=tmp_path / "run", **flags | schedule | {"steps": 9})


def test_other_held_out_data_continue_a_run(flags, tmp_path, data):
    call(sft, out=tmp_path / "whole", **flags)
    call(sft, out=tmp_path / "run", **flags | {"stop_step": 2})
    call(sft, out=tmp_path / "run", **flags | {"eval_data": [data], "eval_every": 2})
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert ["eval_loss" in entry for entry in metrics(tmp_path / "run")] == [False, False, False, True, False, True]


# ---------------------------------------------------------------------------------------------------------- messages


def test_what_a_run_says(flags, tmp_path, data):
    """Without a terminal no bar is drawn; at the end stand the model, what was achieved and what comes next."""
    stdout, stderr = run("sft.py", out=tmp_path / "run", **flags | {"data": data, "eval_data": data})
    assert stderr == "" and "\r" not in stdout
    first, last = (metrics(tmp_path / "run")[i]["eval_loss"] for i in (0, -1))
    assert f"finished, eval_loss {first:.4g} → {last:.4g}. Its model: {tmp_path}/run/model" in stdout
    assert "step 6 of 6: loss " in stdout


def test_a_mistake_is_one_line(flags, tmp_path):
    """Once for all ranks, and torchrun's summary has it, too."""
    _, stderr = run("sft.py", expect=1, out=tmp_path / "run", **flags | {"data": tmp_path / "rows.jsonl"})
    assert "no such file" in one_error(stderr)
    _, stderr = run("sft.py", 2, expect=1, out=tmp_path / "run", **flags | {"data": tmp_path / "rows.jsonl"})
    assert sum(line.startswith("error: ") for line in stderr.splitlines()) == 1
    assert "no such file" in stderr.partition("Root Cause")[2]


def test_an_error_does_not_cling_to_the_progress_bar(flags, tmp_path):
    """On a terminal, where there is a bar."""
    ours, theirs = pty.openpty()
    arguments = command("sft.py", 1, flags | {"data": flags["data"][0], "out": tmp_path / "run", "lr": 1e30})
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=theirs, cwd=ROOT)
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 1000):
            text += part
    assert process.wait() == 1 and b"it" in text  # the bar's unit
    assert [line for line in re.split(r"[\r\n]", text.decode()) if "error: " in line][0].startswith("error: ")


def test_a_wrong_flag_is_explained_once(tmp_path):
    process = subprocess.run(
        command("sft.py", 2, {"learing_rate": 1}), capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert process.returncode == 1 and process.stderr.count("╭") == 1  # tyro's box


def test_errors_of_the_disk_name_the_file(flags, tmp_path, monkeypatch):
    """Logs and the final model, as well as checkpoints (test_resume.py)."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"run/metrics.jsonl failed, [\d,]+ bytes free: .*No space"):
        patch.setattr(sft, "open", full, raising=False)
        call(sft, out=tmp_path / "run", **flags)
    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"run/model.tmp failed, [\d,]+ bytes free: .*No space"):
        patch.setattr(common, "write_model", full)
        call(sft, out=tmp_path / "run", **flags | {"save_every": 0})
    call(sft, out=tmp_path / "run", **flags)  # nothing is lost
    assert metrics(tmp_path / "run")[-1]["step"] == 6


def test_a_gradient_of_zero_is_said(flags, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sft, "clip_gradient", lambda args, module: 0.0)
    call(sft, out=tmp_path / "run", **flags | {"steps": 1})
    assert "step 1: the gradient is exactly 0" in capfd.readouterr().out


def test_an_evaluation_that_is_not_finite_stops_the_run(flags, tmp_path, monkeypatch, data):
    monkeypatch.setattr(sft, "evaluate", lambda *args: {"eval_loss": float("nan")})
    with pytest.raises(RunError, match="step 0: eval_loss is nan"):
        call(sft, out=tmp_path / "run", **flags | {"eval_data": [data]})


def test_reward_models_are_loaded_without_a_fright(tiny_model, tmp_path):
    """transformers reports the missing score head, at length."""
    pairs = [{"prompt": f"{i} + {i}?", "chosen": f"{2 * i}", "rejected": f"{3 * i + 1}"} for i in range(8)]
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    flags = {"model": tiny_model, "data": data, "max_length": 64, "batch_size": 4, "steps": 1}
    stdout, stderr = run("reward_model.py", out=tmp_path / "run", **flags)
    assert "MISSING" not in stdout + stderr and stderr == ""


# ----------------------------------------------------------------------------------------------------------- signals


SLOW_START = """
import sys, time
sys.argv = sys.argv[1:]
import common
def wait(*args, **kwargs):
    print("waiting", flush=True)
    {wait}
{patch}
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PYTHON_LOOP = "while True: pass"
PRODUCT = "import torch\n    while True: torch.randn(1000, 1000) @ torch.randn(1000, 1000)"
STARTS = {
    "while tokenizers are read": ("sft.py", "common.load_tokenizer = wait", "time.sleep(100)"),
    "while data are read": ("sft.py", "common.load_data = wait", "time.sleep(100)"),
    "while data are encoded": ("sft.py", "common.SftEncoder.__call__ = wait", PYTHON_LOOP),
    "while a model is read": ("sft.py", "common.read_weights = wait", PRODUCT),
}


LAST = "while a model is read"
SIGNALS = [pytest.param(name, signal.SIGTERM, marks=pytest.mark.slow) for name in STARTS if name != LAST]
SIGNALS += [(LAST, signal.SIGTERM)]
SIGNALS += [("while a model is read", number) for number in (signal.SIGUSR1, signal.SIGINT)]  # one place is enough


@pytest.mark.parametrize(("place", "number"), SIGNALS)
def test_a_signal_before_training_ends_it_at_once(flags, tmp_path, place, number):
    """With 143 (130 by Ctrl-C) within seconds: there is nothing to save."""
    script, patch, waiting = STARTS[place]
    code = SLOW_START.format(patch=patch, wait=waiting)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [user("new"), assistant("not cached")]}] * 8)
    arguments = command(script, 1, flags | {"data": data, "out": tmp_path / "run"})
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    while "waiting" not in process.stdout.readline():
        assert process.poll() is None, process.communicate()
    sent = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else 143) and time.monotonic() - sent < 5
    assert stderr.strip() == ("interrupted: the same command goes on from the last checkpoint" if number == signal.SIGINT else "")


def test_a_signal_during_the_reference_pass_ends_it_at_once(tiny_model, tmp_path, monkeypatch):
    pairs = [{"prompt": f"{i} + {i}?", "chosen": f"{2 * i}", "rejected": f"{3 * i + 1}"} for i in range(8)]
    flags = {"model": tiny_model, "data": write_jsonl(tmp_path / "pairs.jsonl", pairs), "max_length": 64, "batch_size": 4}
    code = SLOW_START.format(patch="import dpo, kernels.head\nkernels.head.linear_logprobs = wait", wait=PRODUCT)
    arguments = command("dpo.py", 1, flags | {"out": tmp_path / "run"})
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    while "waiting" not in process.stdout.readline():
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert dpo  # the module whose pass it was


@pytest.mark.parametrize("number, code", [(signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_signals_in_training(flags, tmp_path, number, code):
    """SIGUSR1 saves, as SIGTERM does; Ctrl-C is one line; both continue to the same weights."""
    out = tmp_path / "run"
    long = flags | {"steps": 400, "epochs": 400, "save_every": 0}
    process = start("sft.py", out=out, **long)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 3, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    if number == signal.SIGINT:
        assert stderr.strip() == "interrupted: the same command goes on from the last checkpoint"
    else:
        assert stderr == "" and list(common.checkpoints(out)) == [metrics(out)[-1]["step"]]


def test_torchrun_passes_sigusr1_on_and_waits(flags, tmp_path):
    """As docs/runs.md has it for SLURM: --signals-to-handle and --shutdown-timeout."""
    out = tmp_path / "run"
    arguments = command("sft.py", 2, flags | {"out": out, "steps": 10_000, "epochs": 10_000, "save_every": 0})
    place = arguments.index("--nproc_per_node")
    arguments[place:place] = ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout", "540"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    wait_for(lambda: (out / "metrics.jsonl").exists() and metrics(out), process)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=120)
    assert process.returncode == 1 and list(common.checkpoints(out)) == [metrics(out)[-1]["step"]]


def test_workers_die_with_torchrun(flags, tmp_path):
    """kill -9 of torchrun alone, in training: no worker is left."""
    out = tmp_path / "run"
    process = start("sft.py", 2, out=out, **flags | {"steps": 10_000, "epochs": 10_000, "save_every": 0})
    wait_for(lambda: (out / "metrics.jsonl").exists() and metrics(out), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    end = time.monotonic() + 5
    while mine := [pid for pid in os.listdir("/proc") if pid.isdigit() and str(out) in command_line(pid)]:
        assert time.monotonic() < end, mine
        time.sleep(0.05)


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except OSError:  # it has ended
        return ""


def test_the_exported_model_opens(flags, tmp_path):
    call(sft, out=tmp_path / "run", **flags | {"steps": 1})
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not any(info.values()), json.dumps(info, default=str)
