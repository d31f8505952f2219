"""The sandbox: what a program may do, what it may not, and that it cannot forge a verdict."""

import ast
import json
import os
import subprocess
import sys
import time

import pytest
from conftest import shared
from launch import children

import rewards
from rewards import programs, sandbox

MISSING = sandbox.missing_layers()
pytestmark = pytest.mark.skipif(bool(set(MISSING) & set(sandbox.REQUIRED)), reason=f"this kernel lacks {MISSING}")


@pytest.mark.parametrize(
    ("source", "stdin", "printed"),
    [
        ("print(int(input()) + 1)", "41\n", "42\n"),
        ("import sys\nfor line in sys.stdin: print(line.strip()[::-1])", "ab\ncd\n", "ba\ndc\n"),
        ("if __name__ == '__main__': print('main')", "", "main\n"),
        ("import math, re, heapq, decimal, datetime, itertools, functools, random, time, threading\nprint(math.pi)", "", "3.141592653589793\n"),
        ("import threading\nt = threading.Thread(target=print, args=('thread',)); t.start(); t.join()", "", "thread\n"),
        ("import numpy as np\nprint(np.arange(5).sum())", "", "10\n"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nprint(P(3))", "", "P(x=3)\n"),
        ("import sys\nsys.setrecursionlimit(20000)\nf = lambda n: 0 if n == 0 else 1 + f(n - 1)\nprint(f(15000))", "", "15000\n"),
        ("print(input())", "Straße 😀", "Straße 😀\n"),
        ("import sys\nprint(1)\nsys.exit(0)", "", "1\n"),
        ("print(1)\nexit()\nprint(2)", "", "1\n"),
        ("print(open(0).read(), end='')", "x\n", "x\n"),
    ],
)
def test_ordinary_programs_run(source, stdin, printed):
    result = sandbox.run(source, stdin)
    assert (result.printed, result.error, result.is_late) == (printed, None, False)
    assert 0 < result.seconds < 3


PROBES = {  # each would end without an error, or print LEAK, if it could do what it tries
    "tcp": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)",
    "udp": "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.sendto(b'x', ('127.0.0.1', PORT))",
    "unix socket": "import socket\nsocket.socketpair()",
    "read a file": "print('LEAK', open('FILE').read())",
    "read /etc/passwd": "print('LEAK', open('/etc/passwd').read())",
    "list /usr": "import os\nprint('LEAK', os.listdir('/usr/src'))",
    "list a folder": "import os\nprint('LEAK', os.listdir('FOLDER'))",
    "through a link": "import os\nos.symlink('FILE', '/tmp/link')\nprint('LEAK', open('/tmp/link').read())",
    "write": "open('FOLDER/new', 'w').write('x')",
    "append": "open('FILE', 'a').write('x')",
    "write in tmp": "import tempfile\ntempfile.TemporaryFile().write(b'x')",
    "delete": "import os\nos.unlink('FILE')",
    "rename": "import os\nos.rename('FILE', 'FILE2')",
    "chmod": "import os\nos.chmod('FILE', 0)",
    "truncate": "import os\nos.truncate('FILE', 0)",
    "mkdir": "import os\nos.mkdir('FOLDER/new')",
    "environment": "import os\nassert 'SECRET' in os.environ",
    "environment of the parent": "import os\nprint('LEAK', open(f'/proc/{os.getppid()}/environ').read())",
    "memory of the parent": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "its own memory": "open('/proc/self/mem', 'r+b')",
    "signal the parent": "import os\nos.kill(os.getppid(), 0)",
    "signal everybody": "import os\nos.kill(-1, 15)",
    "signal a thread of the parent": "import ctypes, os\nassert ctypes.CDLL(None).syscall(234, os.getppid(), os.getppid(), 0) == 0",
    "signal through fcntl": "import fcntl, os\nfcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "limits of the parent": "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))",
    "fork": "import os\nos.fork()",
    "orphan": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "shell": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'], check=True)",
    "exec": "import os\nos.execv('/bin/true', ['true'])",
    "multiprocessing": "import multiprocessing\np = multiprocessing.Process(target=print); p.start(); p.join(); assert p.exitcode == 0",
    "shared memory": "import os\nos.memfd_create('x')",
    "ptrace": "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "more memory": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    "memory": "x = 'x' * 2**31",
    "memory by and by": "x = []\nwhile True: x.append(bytearray(2**20))",
    "open files": "import os\nfor _ in range(100): os.open('/dev/null', os.O_RDONLY)",
    "output": "while True: print('x' * 1000)",
    "output on stderr": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
}


@pytest.mark.parametrize("name", PROBES)
def test_probes_are_blocked(name, tmp_path, monkeypatch):
    """Every probe fails in the sandbox; the same text outside shows that most would succeed."""
    file = tmp_path / "file"
    file.write_text("LEAK")
    monkeypatch.setenv("SECRET", "1")
    source = PROBES[name].replace("FILE", str(file)).replace("FOLDER", str(tmp_path)).replace("PORT", "9")
    result = sandbox.run(source, "")
    assert result.error is not None
    assert "LEAK" not in result.printed
    assert file.read_text() == "LEAK"
    assert sorted(os.listdir(tmp_path)) == ["file"]
    assert file.stat().st_mode & 0o777 != 0


@pytest.mark.parametrize("name", ["read a file", "write", "environment", "fork", "udp", "chmod", "shell", "unix socket"])
def test_the_probes_succeed_outside(name, tmp_path):
    (tmp_path / "file").write_text("LEAK")
    source = PROBES[name].replace("FILE", str(tmp_path / "file")).replace("FOLDER", str(tmp_path)).replace("PORT", "9")
    assert subprocess.run([sys.executable, "-c", source], env={"SECRET": "1"}, capture_output=True).returncode == 0


@pytest.mark.slow  # ten seconds each
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("while True: pass", "10 s of processor time"),
        ("9 ** 9 ** 9", "10 s of processor time"),
        ("import signal\nfor s in range(1, 32):\n    if s not in (9, 19): signal.signal(s, signal.SIG_IGN)\nwhile True: pass", "10 s of processor time"),
    ],
)  # fmt: skip
def test_programs_that_do_not_end(source, message):
    result = sandbox.run(source, "")
    assert message in result.error
    assert result.is_late and result.seconds > 9


def test_output_is_capped_and_nothing_is_left_behind():
    before = set(os.listdir("/proc/self/fd"))
    result = sandbox.run("while True: print('x' * 1000)", "")
    assert (len(result.printed), "File too large" in result.error, result.is_late) == (sandbox.OUTPUT, True, False)
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # no child, no zombie


def test_the_program_does_not_see_the_files_of_the_caller():
    """File descriptors of the caller are closed: a program cannot read on from what a trainer has open."""
    import fcntl

    fd = fcntl.fcntl(os.open("/dev/zero", os.O_RDONLY), fcntl.F_DUPFD, 5000)  # inheritable
    result = sandbox.run("import os\nfor fd in range(3, 6000):\n    try: os.fstat(fd); print('LEAK', fd)\n    except OSError: pass", "")
    os.close(fd)
    assert result.printed == ""


def test_the_new_process_imports_one_file():
    """Not the package around it: what judges is in no program's reach, and programs start in 30 ms."""
    result = sandbox.run("import sys; print(*(name for name in ('sandbox', 'rewards', 'typing') if name in sys.modules))", "")
    assert result.printed == "sandbox\n"


def test_a_program_dies_with_the_one_who_waits_for_it(tmp_path):
    """SIGKILL of the worker: no program runs on."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; from rewards import sandbox; print('go', flush=True); sandbox.run('while True: pass', '')"
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    worker.stdout.readline()
    deadline = time.monotonic() + 20
    while not (pids := children(worker.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker.kill()
    worker.wait()
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


FORGES = {  # programs that are wrong and want to be right; f(1) has to be 2
    "exit status": "import sys\nsys.exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "exit in the call": "import os\ndef f(x): os._exit(0)",
    "SystemExit in the call": "def f(x): raise SystemExit(0)",
    "equal to everything": "class E:\n    def __eq__(s, o): return True\n    __ne__ = __lt__ = lambda s, o: False\ndef f(x): return E()",
    "equal int": "class E(int):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\ndef f(x): return E(7)",
    "equal str": "class E(str):\n    def __eq__(s, o): return True\n    __hash__ = str.__hash__\ndef f(x): return E('7')",
    "equal list": "class E(list):\n    def __eq__(s, o): return True\ndef f(x): return E([7])",
    "true for everything": "class E:\n    def __bool__(s): return True\n    def __getattr__(s, n): return lambda *a: True\ndef f(x): return E()",
    "walks frames": "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        frame.f_locals.update(tests=[], error=None); frame.f_globals.update(tests=[])\n        frame = frame.f_back\n    return 0",
    "patches the sandbox": "import sys\nfor m in list(sys.modules.values()):\n    for n in ('run_tests', 'encode', 'decode', 'finish', 'confine'):\n        if hasattr(m, n): setattr(m, n, lambda *a, **k: {'int': '0x2'})\ndef f(x): return 0",
    "patches builtins": "import builtins\nbuiltins.AssertionError = None\nbuiltins.all = builtins.any = lambda *a: True\nbuiltins.int.__eq__ = lambda *a: True\ndef f(x): return 0",
    "patches json": "import json\njson.dumps = lambda *a: '[\"result\", true, []]'\ndef f(x): return 0",
    "reads all memory it can": "import gc\ndef f(x): return next((o for o in gc.get_objects() if isinstance(o, str) and 'assert' in o), 0)",
    "floods the answers": "import os\nfor fd in range(3, 16):\n    try: os.write(fd, b'[\"result\", {\"int\": \"0x7\"}, []]\\n' * 50)\n    except OSError: pass\ndef f(x): return 0",
    "sends garbage": "import os\nfor fd in range(3, 16):\n    try: os.write(fd, b'\\xff{{[[\\n')\n    except OSError: pass\ndef f(x): return 0",
    "deep result": "def f(x):\n    r = []\n    for _ in range(10**5): r = [r]\n    return r",
    "an endless iterator": "import itertools\ndef f(x): return itertools.count()",
    "a name it does not have": "def g(x): return 2",
    "closes everything": "import os\nos.closerange(0, 64)\ndef f(x): return 2",
    "kills the tests": "import os\nfor p in range(2, 40000):\n    try: os.kill(p, 9)\n    except OSError: pass\ndef f(x): return 0",
    "raises what tests expect": "def f(x): raise AssertionError('all tests passed')",
    "ends the tests' loop": "def f(x): raise StopIteration",
    "an array of the tests' memory": "class A:\n    __array_interface__ = {'shape': (1,), 'typestr': '<i8', 'data': bytes(600), 'version': 3, 'offset': -4096}\ndef f(x): return A()",
    "exits as the sandbox would": "import os\nos._exit(99)",
    "redefines a library's name": "def f(x): return 0\nCounter = isclose = lambda *a, **k: True\nclass np:\n    allclose = array_equal = asarray = lambda *a, **k: True",
    "redefines a built-in name": "def f(x): return 0\ndef sorted(x): return True\ndef set(x): return 1",
}  # fmt: skip


JUDGES = [
    "assert f(1) == 2", "assert sorted([f(1)]) == [2]", "assert all(map(lambda a: f(a) == 2, [1]))", "assert Counter([f(1)]) == Counter([2])",
    "assert isclose(f(1), 2)", "assert np.asarray(f(1)).tolist() == 2",
]  # fmt: skip


def test_a_right_program_passes_all_of_them():
    for test in JUDGES:
        parsed = programs.parse_tests([test])
        assert parsed.names == ["f"]
        assert sandbox.test("def f(x): return 2", parsed.pieces, parsed.names).error is None


@pytest.mark.parametrize("name", FORGES)
def test_forged_verdicts_are_wrong(name):
    for test in JUDGES[: 1 if name == "an endless iterator" else None]:
        parsed = programs.parse_tests([test])
        assert sandbox.test(FORGES[name], parsed.pieces, parsed.names).error is not None, test


def test_the_expected_value_is_not_in_the_programs_process():
    """Not in its memory, arguments, files: the program looks everywhere it can for a number that only the test has."""
    source = (
        "import gc, sys\n"
        "def f(x):\n"
        "    seen = [repr(o)[:10**5] for o in gc.get_objects()] + [repr(sys.argv)]\n"
        "    frame = sys._getframe()\n"
        "    while frame: seen += [repr(frame.f_locals), repr(frame.f_globals)]; frame = frame.f_back\n"
        "    return any('8675309' in s.replace(repr(f.__code__), '') for s in seen if 'seen' not in s)\n"
    )
    assert sandbox.test(source, ["assert f(1) is not True, f(1)", "x = 8675309"], ["f"]).error is None


@pytest.mark.parametrize(
    ("source", "tests"),
    [
        ("def f(x): return x", ["assert f([1, (2, 3), {4}, {'a': 5}, None, True, 1.5, 'é', b'x', 2j, 10**5000]) == [1, (2, 3), {4}, {'a': 5}, None, True, 1.5, 'é', b'x', 2j, 10**5000]"]),
        ("def f(x): return x", ["import math", "assert math.isnan(f(float('nan'))) and f(-math.inf) == -math.inf"]),
        ("def f(x): x.sort()", ["a = [3, 1, 2]", "f(a)", "assert a == [1, 2, 3]"]),
        ("def f(x): x['b'] = 2", ["a = {}", "f(a)", "assert a == {'b': 2}"]),
        ("def f(n):\n    for i in range(n): yield i", ["assert list(f(3)) == [0, 1, 2]"]),
        ("from collections import Counter, namedtuple\nP = namedtuple('P', 'x')\ndef f(): return Counter('aab'), P(3)", ["assert f() == ({'a': 2, 'b': 1}, (3,))"]),
        ("class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x); return self", ["s = Stack()", "assert s.push(1).push(2).items == [1, 2]"]),
        ("def adder(n): return lambda x: x + n", ["assert adder(2)(3) == 5"]),
        ("class N:\n    def __init__(self, v, n=None): self.v, self.n = v, n\n    def __len__(self): return 1 + (len(self.n) if self.n else 0)\ndef total(n): return n.v + (total(n.n) if n.n else 0)", ["assert total(N(1, N(2))) == 3 and len(N(1, N(2))) == 2"]),
        ("class A:\n    def __init__(self): self.x = 1\n    def double(self): return 2 * self.x", ["a = A()", "a.x = 4", "assert a.double() == 8"]),
        ("import re\ndef f(s): return re.match('a', s)", ["assert f('ab')", "assert not f('b')"]),
        ("class G:\n    def __getitem__(self, i): return i * i\n    def __iter__(self): return iter([1, 2])\ndef g(): return G()", ["assert g()[3] == 9 and list(g()) == [1, 2]"]),
        ("def gcd(a, b): return a if b == 0 else gcd(b, a % b)", ["assert gcd(12, 18) == 6"]),
        ("def f(x): raise ValueError('neg')", ["try: f(1)\nexcept ValueError as error: assert str(error) == 'neg'"]),
        ("def f(x):\n    if x < 0: raise ValueError('negative')", ["try:\n    f(-1)\n    raise SystemExit\nexcept ValueError as error:\n    assert 'negative' in str(error)"]),
        ("def f(a, b=2, *, c=3): return a + b + c", ["assert f(1) == 6 and f(1, c=0) == 3"]),
        ("print('noise')\ndef f(x):\n    print('more'); return x", ["assert f(1) == 1"]),
        ("import numpy as np\ndef f(n): return np.arange(n)", ["assert f(3) == [0, 1, 2]"]),
        ("def f(x): return math.floor(x)\nimport math", ["assert math.isclose(f(2.5), 2)"]),
    ],
)  # fmt: skip
def test_right_functions_pass(source, tests):
    parsed = programs.parse_tests(tests)
    assert sandbox.test(source, parsed.pieces, parsed.names).error is None


def test_failures_are_explained():
    assert sandbox.test("def f(x): return 3", ["assert f(1) == 3", "assert f(1) == 2, f(1)"], ["f"]).error == "test 2 of 2: AssertionError: 3"
    assert "SyntaxError" in sandbox.test("def f(x) return 3", ["assert f(1) == 3"], ["f"]).error
    assert "NameError" in sandbox.run("undefined", "").error


def test_missing_layers_are_refused_by_name(monkeypatch):
    """Without Landlock nothing is run, in the caller's check and in the process itself."""
    monkeypatch.setattr(sandbox, "missing_layers", lambda: ["landlock"])
    with pytest.raises(sandbox.SandboxError, match="landlock missing.*weak"):
        sandbox.require("full")
    assert sandbox.require("weak") == ["landlock"]
    with pytest.raises(sandbox.SandboxError, match="unknown level"):
        sandbox.require("none")


@pytest.mark.parametrize("layer", ["landlock", "seccomp"])
def test_the_process_itself_refuses(layer, tmp_path, monkeypatch):
    """A copy of the file whose layer fails: the new process runs nothing at the level "full", and the rest at "weak"."""
    text = open(sandbox.__file__).read().replace(f"def {layer}(libc) -> bool:", f"def {layer}(libc) -> bool:\n    return False\n")
    (tmp_path / "sandbox.py").write_text(text)
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import sandbox
assert sandbox.missing_layers() == [{layer!r}] + {MISSING!r}
print(sandbox.run('print(1)', '', level='weak').printed)
try: sandbox.run('print(1)', '')
except sandbox.SandboxError as error: print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == f"1\n\nthe sandbox lacks {layer}\n", result.stderr


# ------------------------------------------------------------------------------------------- published problems


def humaneval():
    """(task, ground truth, reference program). The prompt's other functions belong to the tests."""
    for row in map(json.loads, shared("data/code/humaneval.jsonl").open()):
        given = ast.parse(row["prompt"] + "    pass")
        given.body = [node for node in given.body if getattr(node, "name", None) != row["entry_point"]]
        tests = [ast.unparse(given), row["test"], f"check({row['entry_point']})"]
        yield row["task_id"], {"tests": tests, "entry_point": row["entry_point"]}, row["prompt"] + row["canonical_solution"]


def mbpp():
    for row in map(json.loads, shared("data/code/mbpp_sanitized.jsonl").open()):
        # Task 126 asks for a function `sum`, which a list of asserts alone would take for the built-in one.
        entry_point = {"entry_point": "sum"} if row["task_id"] == 126 else {}
        yield f"MBPP/{row['task_id']}", {"tests": row["test_imports"] + row["test_list"]} | entry_point, row["code"]


def mutated(source, names):
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.body = ast.parse("return 'mutated'").body
    return ast.unparse(tree)


def judge_all(problems):
    for task, ground_truth, source in problems:
        names = programs.parse_tests(ground_truth).names
        right = rewards.judge("code", f"```python\n{source}\n```", ground_truth)
        assert right.reason == "right", (task, right)
        wrong = rewards.judge("code", f"```python\n{mutated(source, names)}\n```", ground_truth)
        assert wrong.reason == "wrong", (task, wrong)
        yield task


def test_reference_solutions_pass_and_mutated_ones_fail():
    """A tenth; the slow suite has all."""
    assert len(list(judge_all([*list(humaneval())[::10], *list(mbpp())[5::20]]))) == 17 + 22


@pytest.mark.slow
def test_all_reference_solutions_pass_and_mutated_ones_fail():
    assert len(list(judge_all(humaneval()))) == 164
    assert len(list(judge_all(mbpp()))) == 427
