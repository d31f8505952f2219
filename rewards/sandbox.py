"""Run Python that a model wrote so that it can compute and print, and nothing else.

    run(source, stdin)            a program: what it printed, for the caller to compare
    test(source, tests, names)    a program's functions, called by the tests of a data set

Both return a Result(printed, error, seconds, is_late). What a right answer looks like never enters the program's
process: `test` uses two processes, one with the tests and one with the program. In the first, the names of the
program's functions are proxies; arguments and results cross as plain data (JSON). So there is no result to forge, no
`__eq__` to override and no grader in reach of the program's frames.

Layers, applied by the new process to itself before it runs a line of either text:

    rlimits      1 GiB of memory, 10 s of processor time, 16 MiB of output, 32 open files, no core dump
    landlock     reads only the interpreter, its libraries and site-packages                (Linux 5.13)
    seccomp      a list of permitted system calls, on x86-64 and ARM64: no process, socket, signal, write-open, ...
    namespaces   own user, network and IPC namespaces, where the kernel allows that
    mounts       a root folder of its own with nothing in it but what Landlock lets it read, likewise
    (and it gives up all capabilities)

`full` (the default) refuses to run anything unless Landlock and seccomp are in force. `weak` takes what there is.
A pid namespace would hold nothing: seccomp lets a program neither start a process nor signal one. A program has no
writable folder, and no sockets at all, so asyncio does not work either.

What a program can see: its own text, standard input and arguments of calls; the interpreter and its libraries; the
paths of these; the clock; the machine's memory, load and number of processes (sysinfo); its parent's process id. All
limits are the same for all programs and tests. Where the kernel grants no namespaces it can also ask for any path
whether there is such a file, how large and how old, since Landlock does not cover stat(); never what is in it.

Processor time ends what computes, and sleep what sleeps, but no clock: on a busy machine a program waits for its turn,
and its verdict is the same. See `Watch`.

This is a fence around a policy that looks for shortcuts, not around an attacker with a kernel exploit.

All of it is Linux's. Elsewhere no program is run, at no level: without these layers it could read, change and send
whatever its user can. What the pool needs besides, there `ps` says, and not /proc: see `listing`.
"""

# The fenced-in process imports this file too, and for tests of functions remote.py and harness.py, but not the package:
# that takes 40 ms more. For the same reason what only one side needs is imported where it is used.
import ctypes
import os
import select
import sys
import time

CPU_SECONDS = 10  # of processor time, for each process
SLEEP_SECONDS = 3  # that processes may sleep longer than they have computed
LOOK = 0.25  # seconds from one look at them to the next
MEMORY = 2**30  # bytes of address space
OUTPUT = 2**24  # bytes printed; never a function of what a right program prints, which would tell how much that is
SIGKILL = 9
REQUIRED = ("landlock", "seccomp")
LEVELS = ("full", "weak")
ON_LINUX = sys.platform == "linux"
ELSEWHERE = (
    f"model-written programs are run on Linux only, whose kernel can fence them in. On {sys.platform} they could do "
    "whatever you can, so --sandbox weak does not run them either. Use a Linux machine or container (Docker), or data "
    "without rows of `code`"
)
CONFINED = "confined"  # the report of a process that has fenced itself in
DESCRIPTORS = ("stdin", "stdout", "stderr", "text", "report")  # what the files 0 to 4 of the new process are


class SandboxError(RuntimeError):
    """The layers that are required are not available here, or no process could be started."""


# ---------------------------------------------------------------- the caller's side


class Result:
    """What has become of a program. (No NamedTuple: the import of `typing` would cost a third of a program's start.)

    Attributes:
        printed: its standard output (of `run`).
        error: one line that says what went wrong; None if it ended by itself with status 0.
        seconds: of processor time that its processes used, and of sleep.
        is_late: it was stopped, at the limit of one of the two.
        outcomes: (of `test`) for each test that has run, None or one line that says what went wrong.
    """

    def __init__(self, printed: str, error: str | None, seconds: float, is_late: bool):
        self.printed = printed
        self.error = error
        self.seconds = seconds
        self.is_late = is_late
        self.outcomes = []


def run(source: str, stdin: str, level: str = "full") -> Result:
    """Run `source` as a script. More than OUTPUT bytes of output are an error in the program."""
    with Files(text=source, stdin=stdin, stdout="") as files:
        result = finish([start("script", level, files)], files)
        result.printed = read(files["stdout"], OUTPUT)
        return result


def test(source: str, tests: list[str], names: list[str], level: str = "full", stops: bool = True) -> Result:
    """Run `tests` (pieces of Python, in order, in one namespace) with `names` standing for the program's functions.

    The error is None when all pass, otherwise it says which did not and why. The first failure ends them, if `stops`;
    the end of the program does in any case.
    """
    import json

    to_program, from_tests = map(out_of_the_way, os.pipe())  # what the tests ask for
    to_tests, from_program = map(out_of_the_way, os.pipe())  # and the answers
    with Files(text=source) as program, Files(text=json.dumps([names, tests, stops])) as tester:
        processes = [
            start("tests", level, tester | {"stdin": to_tests, "stdout": from_tests}),
            start("functions", level, program | {"stdin": to_program, "stdout": from_program}),
        ]
        for fd in (to_program, from_tests, to_tests, from_program):
            os.close(fd)  # so that each side sees the end of the other
        result = finish(processes, tester)
        result.outcomes = read_lines(tester["stderr"])
    failed = [number for number, line in enumerate(result.outcomes) if line is not None]
    if failed and not result.is_late:
        result.error = f"test {failed[0] + 1} of {len(tests)}: {result.outcomes[failed[0]]}"
    elif len(result.outcomes) < len(tests) and not result.error:
        result.error = f"test {len(result.outcomes) + 1} of {len(tests)} has ended the tests"
    return result


def stubs(tests: list[str], names: list[str], which: list[str], level: str = "full") -> list[str]:
    """Those of the programs `which`, of harness.STUBS, that pass the tests: programs that do nothing."""
    import json

    with Files(text=json.dumps([names, tests, which]), stdin="", stdout="") as files:
        finish([start("stubs", level, files)], files)
        return read_lines(files["stderr"])


def read_lines(fd: int) -> list:
    """The lines of JSON in a file, but for one that is not whole."""
    import json

    return [json.loads(line) for line in read(fd, OUTPUT).splitlines(keepends=True) if line.endswith("\n")]


def missing_layers() -> list[str]:
    """The layers that this machine cannot provide, found by trying. Raises SandboxError if nothing starts."""
    with Files(text="", stdin="", stdout="") as files:
        result = finish([start("layers", "weak", files)], files)
        if result.error:
            raise SandboxError(f"the sandbox does not start: {result.error}")
        return read(files["stdout"]).split()


def refuse_elsewhere():
    """Raises SandboxError where there is nothing to fence a program in with."""
    if not ON_LINUX:
        raise SandboxError(ELSEWHERE)


def require(level: str) -> list[str]:
    """The layers missing here. Raises SandboxError when `level` cannot do without one of them."""
    if level not in LEVELS:
        raise SandboxError(f"unknown level of the sandbox: {level!r}; there are {', '.join(LEVELS)}")
    refuse_elsewhere()
    missing = missing_layers()
    if level == "full" and set(missing) & set(REQUIRED):
        raise SandboxError(
            f"this machine cannot fence in model-written code: {', '.join(missing)} missing. Run on a kernel that "
            "has it, or accept less with the level 'weak': programs may then read your files"
        )
    return missing


class Files(dict):
    """Named texts in anonymous memory: name → file descriptor. Nothing touches a disk, nothing is left behind.

    For the DESCRIPTORS of a process. Its `stderr` and `report` are always there, and empty.
    """

    def __init__(self, **texts: str):
        super().__init__()
        refuse_elsewhere()  # before anything is started, since no program starts without these
        for name, text in {"stderr": "", "report": "", **texts}.items():
            fd = out_of_the_way(os.memfd_create(name))
            self[name] = fd
            with open(fd, "wb", closefd=False) as file:
                file.write(text.encode("utf-8", "surrogatepass"))
            os.lseek(fd, 0, os.SEEK_SET)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for fd in self.values():
            os.close(fd)


def out_of_the_way(fd: int) -> int:
    """The same file under a number that is none of the new process's own, 0 to 4."""
    import fcntl

    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return moved


def read(fd: int, limit: int = 65536) -> str:
    """The beginning of a file, as text."""
    return os.pread(fd, limit, 0).decode("utf-8", "replace")


def start(mode: str, level: str, files: dict[str, int]) -> int:
    """A fresh interpreter that fences itself in, says so in files["report"], and handles files["text"].

    Args:
        mode: what the text is: "script", "functions", "tests", "stubs", or "layers" to print those that are missing.
        level: one of LEVELS.
        files: name → file descriptor, for all of DESCRIPTORS.

    Returns:
        Its process id.
    """
    import sysconfig

    refuse_elsewhere()
    here = os.path.dirname(os.path.abspath(__file__))
    packages = sysconfig.get_path("purelib")
    code = "import sys; sys.path.insert(0, sys.argv.pop()); import sandbox; sandbox.inside(*sys.argv[1:])"
    arguments = [mode, level, str(os.getpid()), packages, here]
    environment = {  # and nothing of the caller's: no keys, no proxies
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",  # the order of a set is the same every time: a verdict is a function of the text
        "PYTHONIOENCODING": "utf-8:surrogatepass",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-s", "-S", "-P", "-c", code, *arguments],
        environment,
        file_actions=[(os.POSIX_SPAWN_DUP2, files[name], number) for number, name in enumerate(DESCRIPTORS)],
        setsid=True,
    )


def finish(pids: list[int], files: Files) -> Result:
    """Wait for the first process, whose `files` are given, end them all, and say what has become of them.

    Raises SandboxError if it could not fence itself in.
    """
    watch = Watch()
    overslept = not ends_in_time(pids, watch)
    # Who has ended by itself: the kernel sends SIGKILL at the limit of processor time, and so do we, but below.
    ended = [os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids]
    for pid in pids:
        os.kill(pid, SIGKILL)  # it could not start another process
    statuses = []
    seconds = watch.slept
    for pid in pids:
        _, status, usage = os.wait4(pid, 0)
        statuses.append(os.waitstatus_to_exitcode(status))
        seconds += usage.ru_utime + usage.ru_stime

    lines = read(files["stderr"]).strip().splitlines()
    last_line = lines[-1] if lines else f"exit status {statuses[0]}"
    report = read(files["report"])
    if report != CONFINED:
        raise SandboxError(report or f"a process of the sandbox did not start: {last_line}")
    # None is for a process that had not ended.
    used_up = any(end and end.si_status == SIGKILL and end.si_code == os.CLD_KILLED for end in ended)
    error = None
    if overslept:
        error = f"slept for {SLEEP_SECONDS} s more than it computed"
    elif statuses[0] != 0:
        error = f"more than {CPU_SECONDS} s of processor time" if used_up else last_line[:200]
    return Result("", error, seconds, error is not None and (overslept or used_up))


def ends_in_time(pids: list[int], watch) -> bool:
    """Waits for the first process; False once all of them have slept too long."""
    fd = os.pidfd_open(pids[0])
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while not (has_ended := poll.poll(1000 * LOOK)):
        watch.look(pids)
        if watch.slept > SLEEP_SECONDS + watch.used:
            break
    os.close(fd)
    return bool(has_ended)


class Watch:
    """What some processes do with their time: seconds of processor time `used`, and `slept`, since the first look.

    A process that waits for a processor core does not sleep, nor does one that waits for a disk: the kernel's letter
    for it is R or D then. So a busy machine makes nobody a sleeper. That letter is true for one moment only; the
    processor time used since the last look speaks for the time between.
    """

    def __init__(self):
        self.used = 0.0
        self.slept = 0.0
        self.looked = time.monotonic()
        self.before = None  # processor time at the first look

    def is_due(self) -> bool:
        """Whether a look would count."""
        return time.monotonic() - self.looked >= LOOK

    def look(self, pids: list[int]):
        """Adds LOOK to `slept` if all of them sleep and have done so for most of the time since the last look."""
        passed = time.monotonic() - self.looked
        if passed < LOOK:
            return
        total = 0.0
        letters = set()
        for pid in pids:
            try:
                total += processor_time(pid)
                letters.update(states(pid))
            except OSError:  # it has just ended
                letters.add("R")
        if self.before is None:
            self.before = total
        elif total - self.before - self.used < passed / 5 and not letters & {"R", "D", "U"}:  # U: D, but on a Mac
            self.slept += LOOK
        self.used = max(self.used, total - self.before)
        self.looked += passed


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    pids = [pid]
    for parent in pids:  # which grows meanwhile
        try:
            pids += children(parent)
        except OSError:  # it has just ended
            pass
    return pids


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    if not ON_LINUX:
        return [child for child, (parent, *_) in listing().items() if parent == pid]
    started = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/children") as file:
            started += [int(child) for child in file.read().split()]
    return started


def memory(pids: list[int]) -> int:
    """Bytes of memory that processes hold, where there is no /proc."""
    found = listing()
    return sum(found[pid][3] for pid in pids if pid in found)


def states(pid: int) -> list[str]:
    """The letter of each of its threads: R runs or waits for a core, D waits for a disk, S sleeps, T is stopped."""
    if not ON_LINUX:
        return [listed(pid)[2]]  # one for all threads
    letters = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/stat") as file:
            letters.append(file.read().rpartition(") ")[2][0])
    return letters


def processor_time(pid: int) -> float:
    """Seconds that a process has used, on Linux with those of children that it has waited for."""
    if not ON_LINUX:
        return listed(pid)[1]
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(") ")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # utime, stime, cutime, cstime


def listed(pid: int) -> tuple[int, float, str, int]:
    """What `listing` says of a process. Raises ProcessLookupError, an OSError, if it has ended."""
    if pid not in (found := listing()):
        raise ProcessLookupError(f"no process {pid}")
    return found[pid]


_listing = -LOOK, {}  # when `ps` was last asked, and what `listing` returned


def listing() -> dict[int, tuple[int, float, str, int]]:
    """Where there is no /proc, what `ps` says: {process: (parent, seconds of processor time, letter, bytes in memory)}.

    `ps` is asked again when that is half a LOOK old.
    """
    global _listing
    import subprocess

    if time.monotonic() - _listing[0] < LOOK / 2:
        return _listing[1]
    columns = "pid ppid time stat rss".split()
    command = ["ps", "-A", *(f"-o{name}=" for name in columns)]
    lines = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout
    found = {}
    for pid, parent, used, state, kibibytes in map(str.split, lines.splitlines()):
        days, _, clock = used.rpartition("-")  # [days-][hours:]minutes:seconds
        seconds = 86400.0 * int(days or 0)
        for power, part in enumerate(reversed(clock.split(":"))):
            seconds += float(part) * 60**power
        found[int(pid)] = int(parent), seconds, state[0], 1024 * int(kibibytes)
    _listing = time.monotonic(), found
    return found


# ---------------------------------------------------------------- the new process


def inside(mode: str, level: str, parent: str, packages: str):
    """What `start` starts. All arguments are text, from a command line; `packages` is the folder site-packages."""
    os.chdir("/")
    os.closerange(5, 2**31 - 1)
    with open(3, encoding="utf-8", errors="surrogatepass") as file:
        source = file.read()
    if mode in ("functions", "tests", "stubs"):
        import remote  # while this folder can be read
    if mode in ("tests", "stubs"):
        import harness
    sys.path[0] = packages  # in place of ours; site-packages can be imported
    if mode in ("functions", "tests", "stubs"):
        channel = remote.Channel(os.dup(0), os.dup(1))
        outcomes = os.dup(2) if mode != "functions" else None
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)

    missing = confine(int(parent))
    if level == "full" and set(missing) & set(REQUIRED):
        os.write(4, f"the sandbox lacks {', '.join(missing)}".encode())
        os._exit(1)
    os.write(4, CONFINED.encode())
    os.close(4)  # nothing that a program does can be taken for a report

    prepare_interpreter(source)
    if mode == "layers":
        print(*missing)
    elif mode == "script":
        exec(compile(source, "program.py", "exec"), new_module("__main__"))
    elif mode == "functions":
        remote.serve(source, channel)
    elif mode == "tests":
        harness.run_tests(source, channel, outcomes)
    else:
        harness.run_stubs(source, outcomes)
    # An exception ends in the interpreter's own traceback, whose last line is what `finish` returns.


def prepare_interpreter(source: str):
    """What programs find in an interpreter that they expect to be an ordinary one."""
    import builtins
    import io

    builtins.exit = builtins.quit = sys.exit  # `site` would define them
    sys.argv = ["program.py"]  # `fileinput` would read the files that are named behind it
    open_file = builtins.open
    stdin = ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")  # which are not in the root folder of its own

    def open_or_stdin(file, *args, **kwargs):
        return open_file(0 if str(file) in stdin else file, *args, **kwargs)

    io.open = builtins.open = open_or_stdin  # pathlib calls the former
    if "random" in source:
        import random

        random.seed(0)  # for the same reason as PYTHONHASHSEED


def new_module(name: str) -> dict:
    """The namespace of an empty module that can be imported."""
    module = sys.modules[name] = type(sys)(name)
    return module.__dict__


# ---------------------------------------------------------------- the layers


def confine(parent: int) -> list[str]:
    """Fence this process in, for good. Returns the layers that could not be had."""
    import resource

    limits = {"AS": MEMORY, "CPU": CPU_SECONDS, "FSIZE": OUTPUT, "NOFILE": 32, "CORE": 0}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    sys.set_int_max_str_digits(0)
    die_with(parent)
    libc = ctypes.CDLL(None, use_errno=True)
    PR_SET_NO_NEW_PRIVS = 38
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    layers = {"namespaces": namespaces, "mounts": mounts, "landlock": landlock, "seccomp": seccomp}
    missing = []
    for name, apply in layers.items():
        if name == "landlock":
            drop_capabilities(libc)  # which only `mounts` needs
        if not apply(libc):
            missing.append(name)
    return missing


def die_with(parent: int):
    """The kernel kills this process when its parent ends, however it ends. Without Linux a thread kills its group."""
    if not ON_LINUX:
        import threading

        threading.Thread(target=end_group_with, args=(parent,), daemon=True).start()
        return
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # before that call
        os._exit(1)


def end_group_with(parent: int):
    """Kills this process and its group when the process `parent`, which started it, has ended."""
    while os.getppid() == parent:
        time.sleep(LOOK)
    os.killpg(0, SIGKILL)


def drop_capabilities(libc):
    """Those of root, and those that come with a user namespace."""
    VERSION = 0x20080522
    libc.capset((ctypes.c_uint32 * 2)(VERSION, 0), (ctypes.c_uint32 * 6)())


def namespaces(libc) -> bool:
    """No network interface, no user, no shared memory but its own. False where containers forbid that."""
    CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
    ids = {"uid_map": f"65534 {os.getuid()} 1", "gid_map": f"65534 {os.getgid()} 1"}  # 65534 is "nobody"
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC):
        return False
    try:
        for name, text in {"setgroups": "deny", **ids}.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        pass  # it has no id at all then, and `mounts` fails
    return True


def readable() -> list[str]:
    """The folders and files that a program may read, parents first.

    Not all of /usr: images keep projects, and so ground truths, in /usr/src.
    """
    system = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache")
    devices = ("/dev/null", "/dev/urandom")
    python = (f"{sys.base_prefix}/lib", os.path.dirname(os.__file__), sys.path[0])  # the last is site-packages
    return [path for path in sorted({*system, *devices, *python}) if os.path.exists(path)]


def mounts(libc) -> bool:
    """A root folder with nothing in it but what is readable: for all other files even stat() finds nothing.

    Returns False, and raises no error, where the kernel does not grant that.
    """
    CLONE_NEWNS = 0x20000
    MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 0x1000, 0x4000, 0x40000, 2
    NEW = "/proc"  # a folder that there is everywhere, and that is not needed any more

    def call(function, *arguments):
        if function(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    try:
        call(libc.unshare, CLONE_NEWNS)
        call(libc.mount, None, b"/", None, MS_REC | MS_PRIVATE, None)
        call(libc.mount, b"tmpfs", NEW.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"size=64k,mode=755")
        bound = []
        for path in readable():
            if any(path.startswith(f"{parent}/") for parent in bound):
                continue  # it is there already
            place = NEW + path
            if os.path.isdir(path):
                os.makedirs(place, exist_ok=True)
            else:
                os.makedirs(os.path.dirname(place), exist_ok=True)
                os.mknod(place)
            call(libc.mount, os.fsencode(path), os.fsencode(place), None, MS_BIND | MS_REC, None)
            bound.append(path)
        os.chdir(NEW)
        call(libc.pivot_root, b".", b".")
        call(libc.umount2, b".", MNT_DETACH)  # the old root, which lies on the new one until then
        os.chdir("/")
    except OSError:
        return False
    return True


def landlock(libc) -> bool:
    """Reading what is readable, and nothing else of what the first version of Landlock can forbid."""
    CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the numbers of all architectures
    READ_FILE, READ_DIR = 1 << 2, 1 << 3
    ALL = 0x1FFF  # rights of the first version
    BENEATH = 1  # the type of a rule
    handled = ctypes.c_uint64(ALL)
    ruleset = libc.syscall(CREATE_RULESET, ctypes.byref(handled), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return False
    for path in readable():
        fd = os.open(path, os.O_PATH)
        rights = READ_FILE
        if os.path.isdir(path):
            rights |= READ_DIR
        rule = rights.to_bytes(8, sys.byteorder) + fd.to_bytes(4, sys.byteorder)  # struct landlock_path_beneath_attr
        if libc.syscall(ADD_RULE, ruleset, BENEATH, rule, 0):
            return False
        os.close(fd)
    enforced = libc.syscall(RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return enforced


# Permitted system calls: name, number on x86-64, number on ARM64 (- where it does not exist).
CALLS = """
    read 0 63, write 1 64, close 3 57, fstat 5 80, lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214,
    rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, ioctl 16 29, pread64 17 67, readv 19 65,
    writev 20 66, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, sched_yield 24 124, mremap 25 216,
    madvise 28 233, dup 32 23, dup2 33 -, dup3 292 24, nanosleep 35 101, getitimer 36 102, setitimer 38 103,
    getpid 39 172, clone 56 220, exit 60 93, exit_group 231 94, uname 63 160, fcntl 72 25, getcwd 79 17, readlink 89 -,
    readlinkat 267 78, stat 4 -, lstat 6 -, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48,
    faccessat2 439 439, getdents64 217 61, prlimit64 302 261, getrusage 98 165, sysinfo 99 179, times 100 153,
    getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getppid 110 173, sigaltstack 131 132,
    gettid 186 178, futex 202 98, sched_getaffinity 204 123, set_tid_address 218 96, set_robust_list 273 99,
    clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, gettimeofday 96 169, time 201 -,
    openat 257 56, getrandom 318 278, rseq 334 293, membarrier 324 283, tgkill 234 131, restart_syscall 219 128,
    fadvise64 221 223, arch_prctl 158 -
"""


def conditions() -> dict[str, tuple[int, int, list[int]]]:
    """The calls that are permitted with some arguments only.

    {call: (number of the argument, mask, values of (argument & mask) that are permitted)}
    """
    CLONE_THREAD = 0x10000
    CREATES = os.O_CREAT | os.O_TRUNC | (os.O_TMPFILE & ~os.O_DIRECTORY)
    WRITES = os.O_WRONLY | os.O_RDWR | CREATES
    ALL = 0xFFFFFFFF
    return {
        "clone": (0, CLONE_THREAD, [CLONE_THREAD]),  # threads, no processes
        "openat": (2, WRITES, [0]),
        "tgkill": (0, ALL, [os.getpid()]),  # abort(), and nobody else
        "sched_getaffinity": (0, ALL, [0, os.getpid()]),  # not to find out which processes there are
        "prlimit64": (0, ALL, [0]),  # its own limits
        "fcntl": (1, ALL, [0, 1, 2, 3, 1030]),  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
        "ioctl": (1, ALL, [0x5401, 0x5413, 0x5450, 0x5451]),  # TCGETS, TIOCGWINSZ, FIONCLEX, FIOCLEX
    }


def filter_program(architecture: int, numbers: dict[str, int]) -> list[tuple[int, int, int, int]]:
    """Instructions of classic BPF on struct seccomp_data {nr, arch, ip, args[6]}: which calls the kernel lets through.

    Each is (operation, instructions to skip if true, to skip if false, operand).
    """
    LOAD, AND, EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06  # operations
    KILL, ALLOW, EPERM, ENOSYS = 0x80000000, 0x7FFF0000, 0x00050001, 0x00050026  # what is returned
    NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # places in seccomp_data
    LOW_HALF = 0 if sys.byteorder == "little" else 4  # of an argument, which has 8 bytes
    program = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    limited = conditions()
    for name, number in numbers.items():
        answer = []
        if name in limited:
            argument, mask, values = limited[name]
            answer.append((LOAD, 0, 0, ARGUMENTS + 8 * argument + LOW_HALF))
            answer.append((AND, 0, 0, mask))
            for value in values:
                answer.append((EQUAL, 0, 1, value))
                answer.append((RETURN, 0, 0, ALLOW))
            answer.append((RETURN, 0, 0, EPERM))
        else:
            answer.append((RETURN, 0, 0, ALLOW))
        program.append((EQUAL, 0, len(answer), number))
        program += answer
    program.append((RETURN, 0, 0, ENOSYS))
    return program


class Instruction(ctypes.Structure):
    """struct sock_filter"""

    _fields_ = [
        ("code", ctypes.c_uint16),
        ("jump_if_true", ctypes.c_uint8),
        ("jump_if_false", ctypes.c_uint8),
        ("operand", ctypes.c_uint32),
    ]


class Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = [
        ("length", ctypes.c_uint16),
        ("instructions", ctypes.POINTER(Instruction)),
    ]


def seccomp(libc) -> bool:
    """Permit CALLS, some only with harmless arguments; all others fail with ENOSYS, as on a kernel without them."""
    architectures = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}  # number, column of CALLS
    machine = os.uname().machine
    if machine not in architectures:
        return False
    architecture, column = architectures[machine]
    numbers = {}
    for call in CALLS.split(","):
        row = call.split()
        if row[column] != "-":
            numbers[row[0]] = int(row[column])
    program = filter_program(architecture, numbers)
    instructions = (Instruction * len(program))(*program)
    whole = Program(len(program), instructions)
    PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
    return libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(whole), 0, 0) == 0
