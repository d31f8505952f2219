"""Without Linux, as on a Mac's CPU: verdicts, workers that end, every script. What only Linux has is hidden from Python.

The kernel stays Linux's, so this shows that nothing asks for what is hidden, not that a Mac behaves so.
"""

import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from conftest import ROOT
from test_rewards import wait_for_end

from rewards import judge, sandbox

REFUSAL = "model-written programs are run on Linux only"


def hide():
    """Hides from Python what a Mac does not have: the `sitecustomize` of every process of these tests."""
    import builtins
    import ctypes
    import errno
    import io
    import os
    import resource
    import signal
    import socket
    import sys
    import sysconfig
    import time
    import types

    sysconfig.get_config_vars()  # reads a file that is named after the platform
    sys.platform = "darwin"
    sys.executable = os.environ["ELSEWHERE"]  # workers get no PYTHONPATH
    sys.modules["triton"] = None
    scproxy = sys.modules["_scproxy"] = types.ModuleType("_scproxy")  # a Mac's, which urllib imports there
    scproxy._get_proxy_settings = scproxy._get_proxies = dict

    names = {
        os: "sched_getaffinity sched_setaffinity pidfd_open memfd_create waitid pipe2 eventfd O_PATH O_TMPFILE",
        socket: "MSG_CMSG_CLOEXEC SOCK_CLOEXEC SOCK_NONBLOCK",
        signal: "sigtimedwait sigwaitinfo",
        time: "pthread_getcpuclockid",
        resource: "prlimit",
    }
    for module, hidden in names.items():
        for name in hidden.split():
            delattr(module, name)

    def without(function, is_hidden, error):
        """The function, which raises the error if is_hidden(first argument, ...)."""

        def limited(*args, **kwargs):
            if is_hidden(*args, **kwargs):
                raise error
            return function(*args, **kwargs)

        return limited

    def is_in_proc(path, *args, **kwargs):
        return isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith("/proc")

    missing = FileNotFoundError(errno.ENOENT, "hidden")
    for name in ("open", "listdir", "scandir", "stat", "lstat", "readlink"):
        setattr(os, name, without(getattr(os, name), is_in_proc, missing))
    builtins.open = io.open = without(open, is_in_proc, missing)

    calls = "prctl unshare capset mount pivot_root"
    look_up = without(ctypes.CDLL.__getattr__, lambda _, name: name in calls.split(), AttributeError("hidden"))
    ctypes.CDLL.__getattr__ = lambda library, name: look_up(library, name)  # a function becomes a method
    resource.setrlimit = without(
        resource.setrlimit, lambda limit, _: limit == resource.RLIMIT_AS, ValueError("hidden")
    )
    socket.socketpair = without(
        socket.socketpair, lambda type=None: type == socket.SOCK_SEQPACKET, OSError(errno.EPROTONOSUPPORT, "hidden")
    )
    time.clock_gettime = without(time.clock_gettime, lambda clock: clock < 0, OSError(errno.EINVAL, "hidden"))
    os.sysconf = without(os.sysconf, lambda name: name == "SC_AVPHYS_PAGES", ValueError("hidden"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function: starts Python with a text as its program, without Linux."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "sitecustomize.py").write_text(f"{inspect.getsource(hide)}\n\nhide()\n")
    python = folder / "python"
    paths = os.pathsep.join(map(str, [folder, ROOT, ROOT / "tests"]))
    python.write_text(f'#!/bin/sh\nPYTHONPATH={paths} ELSEWHERE={python} exec {sys.executable} "$@"\n')
    python.chmod(0o755)

    def start(text):
        command = [str(python), "-c", textwrap.dedent(text)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)

    return start


def finish(process, timeout=600):
    """What a process has printed, after it has ended well."""
    stdout, stderr = process.communicate(timeout=timeout)
    assert process.returncode == 0, f"{stdout}\n{stderr}"
    return stdout


def test_programs_are_refused(start):
    """In one line, at both levels, by the pool and whoever else wants to run one. Nothing is started for them."""
    text = """
        import json, subprocess, sys
        from pathlib import Path
        import torch
        from common import RunError
        from kernels.memory import free_bytes
        from rewards import Pool, judge, pool, sandbox

        started = []
        sandbox.os.posix_spawn = lambda *args, **kwargs: started.append(args)
        said = {"platform": sys.platform, "proc": Path("/proc/meminfo").exists(), "memory": free_bytes(torch.device("cpu"))}
        calls = {
            "require": lambda: sandbox.require("weak"),
            "run": lambda: sandbox.run("print(1)", "", "weak"),
            "test": lambda: sandbox.test("f = 1", ["assert f"], ["f"], "weak"),
            "stubs": lambda: sandbox.stubs(["assert f()"], ["f"], ["None"], "weak"),
            "start": lambda: sandbox.start("script", "weak", {}),
            "layers": sandbox.missing_layers,
        }
        for name, call in calls.items():
            try:
                said[name] = repr(call())
            except sandbox.SandboxError as error:
                said[name] = str(error)
        pool.Worker.start = lambda self: setattr(self, "connection", None)
        pool.Worker.close = lambda self: None
        for level in ("full", "weak"):
            try:
                said[level] = repr(Pool(1, level).check([("code", None, ["assert f() == 1"])]))
            except RunError as error:
                said[level] = str(error)
        block = chr(96) * 3
        said["judge"] = judge("code", f"{block}python\\nx = 1\\n{block}", ["assert x == 1"]).answer
        said["started"] = len(started)
        print(json.dumps(said))
    """
    said = json.loads(finish(start(text)).splitlines()[-1])
    assert (said.pop("platform"), said.pop("proc"), said.pop("started")) == ("darwin", False, 0)
    assert 2**26 < said.pop("memory") < 2**50
    assert set(said) == {"require", "run", "test", "stubs", "start", "layers", "full", "weak", "judge"}
    for line in said.values():
        assert REFUSAL in line and "\n" not in line
    assert "--sandbox weak does not run them either" in said["weak"] and "container" in said["full"]


JOBS = [
    ("gsm8k", "It is 5.", "5"), ("gsm8k", "It is 6.", "5"), ("math", r"So \boxed{\frac12}.", "0.5"), ("math", "none", "1"),
    ("exact", "a" * 20_000, "a" * 20_000), ("says", "verdict", ""), ("says", "half", ""), ("polite", "pleäse", None),
]  # fmt: skip


def test_verdicts_are_the_same_and_a_verifier_that_hangs_is_killed(start):
    text = f"""
        import json
        import lawless
        from rewards import Pool
        with Pool(1) as pool:
            before = pool.score({JOBS!r})
            pid = pool.score([("forks", "right", "")])[0].answer
            late = pool.score([("hangs", "hang", "")])
            after = pool.score({JOBS[:2]!r})
            other = pool.score([("forks", "right", "")])[0].answer
        print(json.dumps([before, late[0].reason, after, pid != other]))
    """
    process = start(text)
    import lawless  # noqa: F401 (registers verifiers here, too)

    expected = [list(judge(*job)) for job in JOBS]
    before, reason, after, is_new = json.loads(finish(process))
    assert before == json.loads(json.dumps(expected))
    assert (reason, after, is_new) == ("timeout", json.loads(json.dumps(expected[:2])), True)


def test_workers_end_with_their_caller(start):
    """SIGKILL of the caller while verifiers do nothing, so that no limit of processor time ends them; one waits for a
    process that it has started."""
    text = """
        import lawless
        from rewards import Pool
        pool = Pool(2)
        for _ in range(2):
            pool.score([("hangs", "", "")] * 2)
        print(*[worker.pid for worker in pool.workers if worker.connection], flush=True)
        pool.score([("waits", "child", "")] + [("waits", "sleep", "")] * 9)
    """
    caller = start(text)
    pids = [int(pid) for pid in caller.stdout.readline().split()]
    assert pids
    while not (children := [child for pid in pids for child in sandbox.children(pid)]):
        assert caller.poll() is None
    caller.kill()
    caller.communicate()
    wait_for_end(pids + children, 60)


def test_what_ps_says(monkeypatch):
    """A Mac's times have hundredths, Linux's days: both are read."""
    lines = """
        1     0    0:12.50 Ss   1024
      501     1    2:03.25 U+     10
      502   501 01:00:00   R       4
      503   502 2-01:00:10 Z       0
    """
    monkeypatch.setattr(sandbox, "ON_LINUX", False)
    monkeypatch.setattr(sandbox, "_listing", (-1e9, {}))
    asked = []
    answer = subprocess.CompletedProcess([], 0, textwrap.dedent(lines).strip())
    monkeypatch.setattr(subprocess, "run", lambda command, **_: asked.append(command) or answer)
    assert sandbox.family(501) == [501, 502, 503]
    assert [sandbox.processor_time(pid) for pid in (1, 501, 502, 503)] == [12.5, 123.25, 3600.0, 2 * 86400 + 3610.0]
    assert [sandbox.states(pid) for pid in (1, 501, 502, 503)] == [["S"], ["U"], ["R"], ["Z"]]
    assert sandbox.memory([1, 501, 999]) == 1034 * 1024
    with pytest.raises(ProcessLookupError):
        sandbox.processor_time(999)
    assert len(asked) == 1  # for all of these: it is not asked again at once


# ------------------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
def test_every_way_to_misbehave(start):
    """What test_rewards.py does on Linux: each ends, nothing is left, and the next verdicts are right."""
    ways = [("waits", how, "") for how in ("sleep", "pipe", "lock", "stops", "child", "working child")]
    ways += [("forks", "right", how) for how in ("returns twice", "stays", "a command", "a thread", "stays, and its parent dies")]
    ways += [("dies", "die", ""), ("raises", "x", ""), ("talks", "[0, 1]\n", "")]
    text = f"""
        import json, subprocess
        import lawless
        from rewards import Pool
        with Pool(2, max_failed=1) as pool:
            verdicts = [pool.score([job, ("gsm8k", "5", "5")]) for job in {ways!r}]
            groups = [worker.process.pid for worker in pool.workers]
        lines = subprocess.run(["ps", "-A", "-opid=", "-opgid=", "-ostat="], capture_output=True, text=True).stdout
        left = [line for line in lines.splitlines() if int(line.split()[1]) in groups and "Z" not in line.split()[2]]
        print(json.dumps([[[verdict.reason for verdict in pair] for pair in verdicts], left]))
    """
    verdicts, left = json.loads(finish(start(text)))
    assert [second for _, second in verdicts] == ["right"] * len(verdicts)
    firsts = [first for first, _ in verdicts]
    assert firsts[:6] == ["timeout"] * 6
    assert firsts[6:10] == ["right"] * 4
    assert firsts[10] in ("timeout", "crash")  # it has died, and a copy holds its connection
    assert firsts[11:] == ["crash"] * 3
    assert left == []


STUCK = """
from rewards import verifier


@verifier("stuck", seconds=1)
def stuck(completion, gold):
    return sum(range(10**12)) == 0


@verifier("fills", seconds=10_000)
def fills(completion, gold):
    text = b"x" * 2**30
    while text:
        pass
"""


@pytest.mark.slow
def test_memory_has_a_limit(start, tmp_path):
    """`ps` says how much there is; the verifier's own limit is hours away."""
    (tmp_path / "stuck.py").write_text(STUCK)
    text = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import stuck
        from rewards import Pool
        with Pool(1, max_failed=1) as pool:
            print(*[verdict.reason for verdict in pool.score([("fills", "", ""), ("gsm8k", "5", "5")])])
    """
    assert finish(start(text)).split() == ["timeout", "right"]


@pytest.mark.slow
def test_a_call_of_c_ends_at_its_limit_without_a_caller(start, tmp_path):
    """No thread runs meanwhile that could look for the caller: the kernel's limit is what is left."""
    (tmp_path / "stuck.py").write_text(STUCK)
    text = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import stuck
        from rewards import Pool
        pool = Pool(1)
        pool.score([("gsm8k", "5", "5")])
        print(pool.workers[0].pid, flush=True)
        pool.score([("stuck", "", "")] * 9)
    """
    caller = start(text)
    pid = int(caller.stdout.readline())
    before = sandbox.processor_time(pid)
    while sandbox.processor_time(pid) < before + 0.3:
        time.sleep(0.01)
    os.kill(caller.pid, signal.SIGKILL)
    caller.communicate()
    wait_for_end([pid], 120)


@pytest.mark.slow
def test_every_script_runs(start, tmp_path):
    """A short run of each script, samples and an evaluation; code rows are refused before anything is trained."""
    text = f"""
        import sys
        from pathlib import Path

        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification

        import launch, rl
        import dpo, grpo, ppo_rlvr, reward_model, sft
        from common import RunError
        from conftest import chat, user, write_jsonl
        from pipeline import evaluate, generate

        folder = Path({str(tmp_path)!r})
        flags, config, tokenizer = rl.small_run(folder)
        model = str(folder / "model")
        common = {{"max_length": 64, "lr": 1e-3, "steps": 2, "batch_size": 4}}
        demonstrations = write_jsonl(folder / "sft.jsonl", [chat(f"What is {{i}}?", f"It is {{i}}.") for i in range(16)])
        pairs = [{{"prompt": f"{{i}}?", "chosen": f"{{i}}", "rejected": "no"}} for i in range(16)]
        pairs = write_jsonl(folder / "pairs.jsonl", pairs)
        launch.call(sft, model=model, data=[demonstrations], eval_data=[demonstrations], out=folder / "sft", **common)
        launch.call(reward_model, model=model, data=[pairs], out=folder / "rm", **common)
        launch.call(dpo, model=model, data=[pairs], out=folder / "dpo", **common)
        rollouts = flags | common | {{"model": str(folder / "sft" / "model"), "group_size": 2}}
        launch.call(grpo, out=folder / "grpo", **rollouts)
        rollouts.pop("group_size")
        launch.call(ppo_rlvr, value_model=str(folder / "rm" / "model"), out=folder / "ppo", **rollouts)
        few = {{"max_length": 64, "max_new_tokens": 8, "slots": 8, "verifier_workers": 1}}
        generate.main(generate.Args(model=[model], data=flags["data"], out=str(folder / "samples.jsonl"), n=2, **few))
        test = [f"letters={{folder}}/test.jsonl"]
        evaluate.main(evaluate.Args(model=model, data=test, out=str(folder / "eval"), **few))
        code = [{{"messages": [user("a program")], "dataset": "code", "ground_truth": ["assert f() == 1"]}}] * 8
        code = [write_jsonl(folder / "code.jsonl", code)]
        for level in ("full", "weak"):
            try:
                launch.call(grpo, out=folder / "code", **(rollouts | {{"data": code, "sandbox": level, "group_size": 2}}))
            except RunError as error:
                print(level, error)
    """
    lines = finish(start(text)).splitlines()
    for script in ("sft", "rm", "dpo", "grpo", "ppo"):
        assert (tmp_path / script / "model" / "model.safetensors").exists()
        assert len((tmp_path / script / "metrics.jsonl").read_text().splitlines()) >= 2
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 32
    assert (tmp_path / "eval").exists()
    refusals = [line for line in lines if REFUSAL in line]
    assert [line.split()[0] for line in refusals] == ["full", "weak"]
    assert not (tmp_path / "code" / "metrics.jsonl").exists()
