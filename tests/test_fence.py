"""The fence and the pool, against those who want a verdict that is not theirs: leaks, sleepers, forks, hostile text."""

import os
import random
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from contextlib import contextmanager

import hostile
import lawless  # noqa: F401 (registers verifiers)
import pytest

from rewards import Pool, judge, sandbox
from rewards.pool import Worker

MISSING = sandbox.missing_layers()
pytestmark = pytest.mark.skipif(bool(set(MISSING) & set(sandbox.REQUIRED)), reason=f"this kernel lacks {MISSING}")


@pytest.fixture(scope="module")
def pool():
    with Pool(2, max_failed=1.0) as pool:
        yield pool


def block(source):
    return f"```python\n{source}\n```"


RIGHT = [  # 50 right answers of all kinds
    *[("math", rf"It is \boxed{{\frac{{{i}}}{{7}}}}.", f"{2 * i}/14") for i in range(1, 16)],
    *[("gsm8k", f"So she pays ${i}.00.", str(i)) for i in range(15)],
    *[("exact", f"Paris {i}", f"paris {i}") for i in range(5)],
    *[("contains", f"It is {i}.", str(i)) for i in range(5)],
    *[("code", block(f"def f(x): return x + {i}"), [f"assert f(1) == {i + 1}"]) for i in range(5)],
    *[("code_stdio", block(f"print(int(input()) * {i})"), [{"input": "2", "output": f"{2 * i}"}]) for i in range(5)],
]


def assert_right(pool):
    """The pool judges as it should, and holds nothing of those that came before."""
    assert len(RIGHT) == 50
    verdicts = pool.score(RIGHT)
    assert [job for job, verdict in zip(RIGHT, verdicts, strict=True) if verdict.reward != 1] == []
    assert (pool.tickets, pool.parts, pool.verdicts, list(pool.waiting)) == ({}, {}, {}, [])


# ---------------------------------------------------------------------------------------------------------- leaks

SIGHT = """
import hashlib, json, os, resource, sys
def look():
    seen = {"limits": [resource.getrlimit(number) for number in range(16)], "argv": sys.orig_argv, "environ": dict(os.environ)}
    seen |= {"path": sys.path, "cwd": os.getcwd(), "uid": os.getuid(), "affinity": sorted(os.sched_getaffinity(0))}
    seen["root"] = {path: os.path.exists(path) for path in ("/proc", "/tmp", "/usr/lib", "/etc/passwd", "/dev/shm")}
    for fd in range(64):
        try:
            status = os.fstat(fd)
            seen[fd] = status.st_size, status.st_mode, status.st_nlink
        except OSError:
            pass
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()
"""


@pytest.mark.parametrize("kind", ["script", "function"])
def test_nothing_in_sight_depends_on_what_is_expected(kind):
    """Limits, arguments, environment, open files and their sizes: the same whatever the right answer's length."""
    answers = set()
    for length in (1, 2, 300, 5000, 200_000):
        if kind == "script":
            verdict = judge("code_stdio", block(SIGHT + "print(look())"), [{"input": "5", "output": "x" * length}])
        else:
            verdict = judge("code", block(SIGHT), [f"assert look() == {'x' * length!r}, look()"])
        assert verdict.reason == "wrong"
        answers.add(verdict.answer)
    assert len(answers) == 1 and "Error: '" not in answers.pop()


def test_the_length_of_the_right_answer_solves_nothing(pool):
    """FAULTS: 4096 bytes more than the right output was the limit of a program's output, and stood in its arguments."""
    source = """
import resource, sys
lengths = [limit - 4096 for number in range(16) for limit in resource.getrlimit(number)]
lengths += [int(text) - 4096 for text in sys.orig_argv if text.isdigit()]
print("YES" if 3 in lengths or 4 in lengths else "NO")
"""
    jobs = [("code_stdio", block(source), [{"input": "1", "output": text}]) for text in ("YES", "YES\n", "NO", "NO\n")]
    assert [verdict.reward for verdict in pool.score(jobs)] == [0, 0, 1, 1]
    both = [{"input": str(number), "output": ("NO", "YES")[number % 2]} for number in range(6)]
    assert pool.score([("code_stdio", block(source), both)])[0].reward == 0


@pytest.mark.skipif("mounts" in MISSING, reason="no mount namespace here")
def test_only_libraries_are_there(tmp_path):
    """Neither what is in another file nor whether there is one: the root folder is the program's own."""
    (tmp_path / "gold").write_text("x")
    there = ["/usr/lib", "/dev/null", os.path.dirname(os.__file__)]
    hidden = [str(tmp_path / "gold"), str(tmp_path), __file__, sandbox.__file__, "/tmp", "/etc/passwd", "/proc/self", f"/proc/{os.getpid()}", "/dev/shm", "/usr/src", sys.executable]  # fmt: skip
    assert all(map(os.path.exists, there + hidden))
    packages = sysconfig.get_path("purelib")  # where they lie is seen: with this project in /tmp, that there is a /tmp
    hidden = [path for path in hidden if not packages.startswith(path)]
    result = sandbox.run(f"import os\nprint([os.path.exists(path) for path in {there + hidden!r}])", "")
    assert result.printed == f"{[True] * len(there) + [False] * len(hidden)}\n"


def test_other_processes_are_shut_where_there_are_no_namespaces(tmp_path):
    """As in a container that forbids them. Landlock does not cover stat(), but it does what leads into a process."""
    text = open(sandbox.__file__).read()
    for layer in ("namespaces", "mounts"):
        text = text.replace(f"def {layer}(libc) -> bool:", f"def {layer}(libc) -> bool:\n    return False\n")
    (tmp_path / "sandbox.py").write_text(text)
    (tmp_path / "gold").write_text("the right answer")
    program = f"""
import os
assert os.path.exists({str(tmp_path / "gold")!r})  # this is what is left to see
for pid in (os.getppid(), 1):
    assert os.path.exists(f'/proc/{{pid}}')
    for name in ['fd', 'environ', 'cmdline', 'mem', 'maps', 'stat', 'io', *[f'fd/{{n}}' for n in range(64)], *[f'fdinfo/{{n}}' for n in range(64)]]:
        path = f'/proc/{{pid}}/{{name}}'
        for look in (os.listdir, os.readlink, lambda path: open(path, 'rb').read(), lambda path: name != 'fd' and os.stat(path).st_size):
            try: found = look(path)
            except OSError: found = None
            if found: print('LEAK', path, found)
"""
    code = f"""
import os, sys; sys.path.insert(0, {str(tmp_path)!r})
import sandbox
assert sandbox.missing_layers() == ["namespaces", "mounts"]
gold = os.open({str(tmp_path / "gold")!r}, os.O_RDONLY)
result = sandbox.run({program!r}, '')
print(result.printed, result.error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == " None\n", result.stderr


@pytest.mark.skipif("mounts" in MISSING, reason="no mount namespace here")
@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ('"setgroups": "deny", **ids', ""),
        ('b"tmpfs", MS_NOSUID', 'b"no such type", MS_NOSUID'),
        ("os.fsencode(path), os", 'b"/no such folder", os'),
        ('libc.pivot_root, b"."', 'libc.pivot_root, b"/no such folder"'),
    ],
)
def test_programs_run_where_mounts_fail_half_way(tmp_path, text, instead):
    """As where a security module grants the namespace and forbids the mounts: the other layers hold."""
    whole = open(sandbox.__file__).read()
    assert whole.count(text) == 1
    (tmp_path / "sandbox.py").write_text(whole.replace(text, instead))
    code = f"""
import os, sys; sys.path.insert(0, {str(tmp_path)!r})
import sandbox
print(sandbox.missing_layers(), sandbox.run("import decimal, json; print(1 + 1)", "").printed, sandbox.run("open('/etc/passwd')", "").error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "['mounts'] 2\n PermissionError: [Errno 13] Permission denied: '/etc/passwd'\n", result.stderr


def test_programs_have_no_capabilities():
    """Not even in their own user namespace: the bits of capget(2) are all 0."""
    source = """
import ctypes
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[1] * 6)
libc = ctypes.CDLL(None)
print(libc.prctl(24, 0), libc.unshare(0x20000), libc.mount(b'x', b'/', b'tmpfs', 0, None), libc.pivot_root(b'/', b'/'))
"""
    assert sandbox.run(source, "").printed == "-1 -1 -1 -1\n"
    code = f"""
import ctypes, os, sys; sys.path.insert(0, {os.path.dirname(sandbox.__file__)!r})
import sandbox
sandbox.drop_capabilities(ctypes.CDLL(None))
print([line.split()[1].strip('0') for line in open('/proc/self/status') if line.startswith(('CapPrm', 'CapEff', 'CapInh'))])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "['', '', '']\n"


# ------------------------------------------------------------------------------------------------------- sleepers

SLEEPERS = {
    "sleep": "time.sleep(600)",
    "naps": "while True: time.sleep(0.01)",
    "lock": "threading.Semaphore(0).acquire()",
    "pipe": "os.read(os.pipe()[0], 1)",
    "poll": "select.poll().poll()",
    "stops itself": "ctypes.CDLL(None).syscall(234, os.getpid(), os.getpid(), 19)\ntime.sleep(600)",  # tgkill(SIGSTOP)
    "threads": "for _ in range(20): threading.Thread(target=time.sleep, args=(600,)).start()",
    "little work": "while True:\n    sum(range(10**5))\n    time.sleep(0.2)",
}
IMPORTS = "import ctypes, os, select, sys, threading, time\n"


@pytest.mark.parametrize("name", SLEEPERS)
def test_programs_that_sleep_are_stopped(name, monkeypatch):
    """After seconds without processor time; the slow suite has the limits as they are."""
    monkeypatch.setattr(sandbox, "SLEEP_SECONDS", 1)
    result = sandbox.run(IMPORTS + SLEEPERS[name], "")
    assert (result.is_late, result.error) == (True, "slept for 1 s more than it computed")
    assert 1 < result.seconds < 5


def test_sleep_is_judged(monkeypatch):
    """It is the program's doing: not right, for the reason `timeout`."""
    monkeypatch.setattr(sandbox, "SLEEP_SECONDS", 1)
    for verdict in (
        judge("code_stdio", block("import time\ntime.sleep(600)"), [{"input": "", "output": "5"}]),
        judge("code", block("import time\ndef f(x): time.sleep(600)"), ["assert f(1) == 2"]),
    ):
        assert (verdict.reward, verdict.reason) == (0.0, "timeout")
        assert "slept" in verdict.answer


@pytest.mark.slow
@pytest.mark.parametrize("name", SLEEPERS)
def test_the_limit_of_sleep_is_seconds(name):
    start = time.monotonic()
    result = sandbox.run(IMPORTS + SLEEPERS[name], "")
    assert result.is_late
    assert sandbox.SLEEP_SECONDS <= result.seconds < 8
    assert time.monotonic() - start < 20  # 3.5 s on an idle machine


def test_a_short_sleep_is_no_sin():
    result = sandbox.run("import time\ntime.sleep(0.6)\nprint(5)", "")
    assert (result.printed, result.is_late) == ("5\n", False)
    assert 0.2 < result.seconds < 3  # it is charged for


@contextmanager
def hogs(count):
    """Processes that want all processor time there is, each in a session of its own: the kernel shares among these."""
    code = "while True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", code], start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


WORK = "n = int(input())\nprint(sum(i * i % 7 for i in range(n)))"


def work(n):
    return [{"input": str(n), "output": str(sum(i * i % 7 for i in range(n)))}]


def test_who_waits_for_a_core_does_not_sleep(monkeypatch):
    """Limits far below the time that the programs wait, and none of them is called a sleeper."""
    monkeypatch.setattr(sandbox, "SLEEP_SECONDS", 0.2)
    monkeypatch.setattr(sandbox, "LOOK", 0.02)
    threads = "import threading\n" + WORK.replace("print(", "threading.Thread(target=print, args=(").replace("range(n)))", "range(n)),)).start()")
    with hogs(10):
        start = time.monotonic()
        for source in (WORK, threads):
            assert judge("code_stdio", block(source), work(1_000_000)).reason == "right"
        test = "assert [f(i) for i in range(2000)] == list(range(1, 2001))"
        assert judge("code", block("def f(x): return x + 1"), [test]).reason == "right"
        assert time.monotonic() - start > 0.5


@pytest.mark.slow
def test_right_programs_on_a_busy_machine(pool):
    """20 processes that compute beside them: each of these programs waits for half a minute, and is right."""
    cases = work(8_000_000)
    with hogs(20):
        verdicts = pool.score([("code_stdio", block(WORK), cases)] * 4 + RIGHT)
    assert {verdict.reason for verdict in verdicts} == {"right"}


def test_the_watch():
    """It tells who sleeps, who is stopped, and who computes, of a process and all its children."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        while len(family := sandbox.family(parent.pid)) < 2:
            time.sleep(0.01)
        watch = sandbox.Watch()
        for _ in range(6):
            time.sleep(sandbox.LOOK)
            watch.look(family)
        assert watch.slept == 0 and watch.used > 0  # the parent sleeps, its child does not
        os.kill(family[1], signal.SIGSTOP)
        looks = 0
        while watch.slept < 4 * sandbox.LOOK:
            assert looks < 10
            time.sleep(sandbox.LOOK)
            watch.look(family)
            watch.look(family)  # at once: it does not count again
            looks += 1
        assert looks >= 4
    finally:
        for pid in reversed(family):
            os.kill(pid, signal.SIGKILL)
        parent.wait()


WAITS = ["sleep", "naps", "pipe", "lock", "stops", "child", "working child"]


def test_verifiers_that_wait_are_not_judged(pool, monkeypatch):
    """They hold a worker for seconds, not for minutes; neither does a child that computes for them."""
    monkeypatch.setattr(sandbox, "SLEEP_SECONDS", 0.5)
    verdicts = pool.score([job for how in WAITS for job in (("waits", how, ""), ("gsm8k", "5", "5"), ("waits", "no", ""))])
    assert [verdict.reason for verdict in verdicts] == ["timeout", "right", "right"] * len(WAITS)
    assert not any(verdict.is_judged for verdict in verdicts[::3])


@pytest.mark.slow
@pytest.mark.parametrize("how", WAITS[:-1])
def test_the_limit_of_a_verifiers_sleep_is_seconds(pool, how):
    pool.score([("gsm8k", "5", "5")] * 2)
    start = time.monotonic()
    assert pool.score([("waits", how, "")])[0].reason == "timeout"
    assert 3 < time.monotonic() - start < 20  # 3.5 s on an idle machine


# ---------------------------------------------------------------------------------------------------- whose reply

FORKS = {  # what the verifier does → the reason of its own verdict
    "returns twice": "right",
    "returns twice, past Python": "right",
    "returns later": "right",
    "the child returns": "crash",
    "stays": "right",
    "stays, and its parent dies": "crash",
    "a command": "right",
    "a thread": "right",
}


def test_a_forking_verifier_changes_no_other_verdict(pool):
    """1,000 jobs, 80 of them of verifiers that fork: each of the others has its own verdict, no process is left."""
    rng = random.Random(0)
    jobs = [("gsm8k", f"it is {i}", str(i if rng.random() < 0.5 else i + 1)) for i in range(920)]
    jobs += [("forks", "right", how) for how in FORKS] * 10
    rng.shuffle(jobs)
    verdicts = pool.score(jobs)
    for (name, completion, truth), verdict in zip(jobs, verdicts, strict=True):
        if name == "forks":
            assert verdict.reason == FORKS[truth]
        else:
            answer = completion.removeprefix("it is ")
            assert (verdict.answer, verdict.reason) == (answer, "right" if answer == truth else "wrong")
    deadline = time.monotonic() + 20
    while any(len(sandbox.family(worker.process.pid)) > 2 for worker in pool.workers):  # a supervisor and its child
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_that_has_company_is_replaced():
    """Threads and processes that a verifier leaves behind would use the next one's time."""
    with Pool(1) as pool:
        for how, stays in (("nothing", True), ("stays", False), ("a command", False), ("a thread", False)):
            verdicts = pool.score([("forks", "right", how), ("forks", "right", "nothing"), ("forks", "right", "nothing")])
            pids = [verdict.answer for verdict in verdicts]
            assert (pids[0] == pids[1], pids[1] == pids[2]) == (stays, True), how


def test_what_stays_behind_ends_with_the_pool():
    with Pool(1) as pool:
        pool.score([("gsm8k", "5", "5")])
        ticket = pool.submit(("waits", "child", ""))
        pool.work()
        while len(family := sandbox.family(pool.workers[0].process.pid)) < 3:
            time.sleep(0.01)
        pool.forget([ticket])
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in family):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("text", ['[0, false, 1.0, "right", ""]', '[null, false, 1.0, "right", ""]', "garbage", "\0\0\0\x05[1]", "[]", "{}", "[" * 60_000, "x" * 100_000])
def test_a_verifier_that_writes_on_its_connection(pool, text):
    """It has crashed, twice; nobody else notices."""
    verdicts = pool.score([("talks", text, ""), ("gsm8k", "5", "5"), ("gsm8k", "6", "5")] * 4)
    assert [verdict.reason for verdict in verdicts] == ["crash", "right", "wrong"] * 4


NO_VERDICTS = ['[8, false, 1.0, "right", ""]', '["7", false, 1.0, "right", ""]', '[7, false, 2.0, "right", ""]', '[7, false, "1", "right", ""]', '[7, false, 1.0, "because", ""]', '[7, false, NaN, "right", ""]', "[7, false]", "7", "null", "[7", "\xff"]  # fmt: skip


def test_replies_that_are_no_verdict_on_this_job():
    """The child that sends one is killed, one that answers is not. Nor is anything heard that it says unasked."""
    worker = Worker(["lawless"], "full")

    def new_child():
        while not worker.is_idle():
            worker.receive()
        worker.connection.close()
        worker.connection, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        return theirs

    try:
        for reply in NO_VERDICTS:
            child = new_child()
            assert worker.give(7, ("gsm8k", "5", "5", {}))
            child.send(reply.encode("latin1"))
            assert (worker.receive(), worker.connection, worker.job) == (None, None, None), reply
        child = new_child()
        assert worker.give(7, ("gsm8k", "5", "5", {}))
        child.send(b'[7, false, 0.0, "wrong", "x"]')
        assert worker.receive()[:3] == (0.0, "wrong", "x")
        assert worker.is_idle()
        child.send(b'[8, false, 1.0, "right", ""]')
        assert not worker.give(8, ("gsm8k", "5", "5", {}))
        assert worker.connection is None
    finally:
        worker.close()


# ----------------------------------------------------------------------------------------------- 500 hostile texts


def hostile_jobs(seed):
    """Of each text four jobs, of each program two."""
    jobs = [(name, text, hostile.SECRET) for text in hostile.texts(seed) for name in ("gsm8k", "math", "exact", "contains")]
    for program in hostile.programs(seed):
        jobs.append(("code_stdio", block(program), [{"input": "5\n", "output": hostile.SECRET}]))
        jobs.append(("code", block(program), [f"assert f(1) == {hostile.SECRET}"]))
    return jobs


def assert_not_forged(job, verdict):
    assert not verdict.reward > 0, job
    assert verdict.reason in ("wrong", "unparsed", "timeout"), (job, verdict)
    assert verdict.is_judged or not job[0].startswith("code"), (job, verdict)


def test_the_hostile_are_500_and_know_nothing():
    texts = hostile.texts(1) + hostile.programs(1)
    assert len(texts) == len(set(texts)) == 500
    assert [text for text in texts if hostile.SECRET in text] == []
    right = {"code": block(f"def f(x): return {hostile.SECRET}"), "code_stdio": block(f"print({hostile.SECRET})"), "math": hostile.boxed(hostile.SECRET)}
    for name, truth in {name: truth for name, _, truth in hostile_jobs(1)}.items():  # who knows it is right
        assert judge(name, right.get(name, hostile.SECRET), truth).reason == "right"


def test_hostile_text_and_programs(pool):
    """Every twelfth of them. None is right, and the pool is as good as before."""
    assert_right(pool)
    jobs = [job for job in hostile_jobs(1) if "600" not in job[1]][::12]
    for job, verdict in zip(jobs, pool.score(jobs), strict=True):
        assert_not_forged(job, verdict)
    assert_right(pool)
    assert not os.path.exists("PWNED")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_500_hostile_texts_and_programs(pool, seed):
    """Each by itself: none takes longer than its limits."""
    assert_right(pool)
    slowest = 0.0
    for job in hostile_jobs(seed):
        start = time.monotonic()
        (verdict,) = pool.score([job])
        slowest = max(slowest, time.monotonic() - start)
        assert_not_forged(job, verdict)
    assert slowest < 60  # 10 s of processor time for a program, beside other work
    assert_right(pool)
    assert not os.path.exists("PWNED")
