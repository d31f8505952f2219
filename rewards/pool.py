"""Processes that judge completions, and that can be killed.

    with Pool() as pool:
        pool.score([("gsm8k", "... so she pays $18.", "18")])      # [Verdict(reward=1.0, reason='right', answer='18')]

While completions are still being sampled, those that are there can be judged:

    ticket = pool.submit(("gsm8k", "... so she pays $18.", "18"))
    pool.work()                      # now and then; it does not wait
    verdicts = pool.collect([ticket])

A job is (verifier, completion, ground_truth), the first and the last as in the columns `dataset` and `ground_truth` of
the published RLVR data; both may be lists, with a list of weights as a fourth entry, and the reward is then the
weighted sum.

sympy can be made to compute for ever in one call that no signal interrupts, or to ask for all memory, by a completion
of ten characters. So nothing is judged in the caller, and no thread or handler is relied on: a worker over its limit is
killed and replaced, its job gets the reason `timeout`, and the next job does not notice. The limits are processor time
(`Verifier.seconds`; five times that with its children's), sleep (as much again, but at least SLEEP_SECONDS) and
`MEMORY`. No clock is among them, so that a busy machine fails nobody. A verdict is a function of the completion and the
ground truth, except at the edge of these limits.

The caller never forks (it may hold CUDA), starts no thread but that of judges, and reads 64 KiB of a reply at most.

Where there is no Linux (on a Mac) no programs are judged, and a worker is one process, which takes seconds to replace.
`ps` tells what it uses, and memory over the limit is a `timeout`. There no signal comes when the caller ends: a thread
looks for that, and kills the worker's process group. It cannot while a verifier is in one call of C; then the kernel
ends the worker at its limit of processor time.
"""

import ctypes
import json
import logging
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from itertools import count
from multiprocessing.connection import wait

from rewards import sandbox, verifiers
from rewards.jobs import combine, fail, split_job
from rewards.judges import Judges
from rewards.sandbox import ON_LINUX, SIGKILL, die_with
from rewards.verifiers import VERIFIERS, Verdict, as_verdict, judge, not_judged

MEMORY = 2**30  # bytes of address space of a worker; without Linux, of memory, with its children's
RECYCLED = 2**29  # a worker that has ever been this large is replaced
REPLY = 65536  # bytes of a verdict, at most
MAX_UNJUDGED = 0.5  # as `max_failed` of Pool, of verdicts that are `unjudged`


# ---------------------------------------------------------------- jobs and verdicts


def score(jobs: list[tuple]) -> list[Verdict]:
    """Judges in processes that are started for this call, which takes a second. See `Pool.score`."""
    with Pool() as pool:
        return pool.score(jobs)


# ---------------------------------------------------------------- the caller's side


class Pool:
    """Worker processes that judge. Close it, or use it in a `with`; a caller that dies takes the workers with it.

    Args:
        workers: processes; by default the processor cores that are this rank's share of the machine.
        sandbox: what model-written code is run in, "full" or "weak"; see sandbox.py. Checked when first needed.
        max_failed: the share of completions that may end without a judgement in one call of `score` or `collect` (of
            32 or more). Above it the verifier is broken, which would otherwise look like a weak model.

    Raises:
        RunError: a verifier is defined in the script itself.
    """

    def __init__(self, workers: int | None = None, sandbox: str = "full", max_failed: float = 0.2):
        modules = sorted({verifier.judge.__module__ for verifier in VERIFIERS.values()})
        if "__main__" in modules:
            fail("a verifier is defined in the script itself, which workers do not import: give it a module of its own")
        if not workers:
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            cores = len(os.sched_getaffinity(0)) if ON_LINUX else os.cpu_count() or 1
            workers = max(1, cores // ranks)
        self.sandbox = sandbox
        self.sandbox_checked = False
        self.max_failed = max_failed
        self.workers = [Worker(modules, sandbox) for _ in range(workers)]
        self.numbers = count()  # of tickets and parts
        self.tickets = {}  # ticket → (numbers of its parts, their weights)
        self.parts = {}  # number → (verifier, completion, ground truth, context), until there is a verdict
        self.waiting = deque()  # numbers of the parts that no worker has
        self.has_crashed = set()  # numbers of parts
        self.verdicts = {}  # number → Verdict, until it is collected
        self.judges = None  # until a verifier asks a model
        self.asked = {}  # number of a part that is theirs → Future of its Verdict

    def score(self, jobs: list[tuple]) -> list[Verdict]:
        """Judges completions, and waits for the verdicts.

        Args:
            jobs: (verifier, completion, ground_truth[, weight[, context]]); all but the completion and the context may
                be lists. See jobs.py.

        Returns:
            One Verdict for each job, in order.

        Raises:
            RunError: it is not a job, too many could not be judged, or the sandbox or the workers do not start.
        """
        tickets = []
        try:
            for job in jobs:
                tickets.append(self.submit(job))
            return self.collect(tickets)
        finally:
            self.forget(tickets)

    def submit(self, job: tuple) -> int:
        """Queues one job of those that `score` takes, and returns the ticket that `collect` wants for its verdict.

        Nothing is judged before `work` or `collect` is called. Raises RunError if it is not a job, or if it needs the
        sandbox and that does not start.
        """
        parts, weights = split_job(*job)
        ticket = next(self.numbers)
        self.tickets[ticket] = [self._queue(part) for part in parts], weights, [name for name, *_ in parts]
        return ticket

    def work(self):
        """Hands parts to idle workers and takes the verdicts that are there, without waiting for any.

        Raises RunError if the workers do not start.
        """
        self._step(patience=0)

    def collect(self, tickets: list[int]) -> list[Verdict]:
        """Waits for the verdicts on some tickets, returns them in that order, and forgets the tickets.

        Raises RunError if too many of these could not be judged, or the workers do not start; a KeyError if a ticket
        was collected before.
        """
        try:
            owned = [self.tickets[ticket] for ticket in tickets]
            self._wait_for([number for numbers, *_ in owned for number in numbers])
            split = [([self.verdicts[number] for number in numbers], *rest) for numbers, *rest in owned]
        finally:
            self.forget(tickets)
        self._fail_if_broken([verdict for verdicts, *_ in split for verdict in verdicts])
        combined = []
        for verdicts, weights, names in split:
            verdict = combine(verdicts, weights)
            if len(verdicts) > 1:
                own = zip(names, verdicts, strict=True)
                verdict = verdict._replace(parts=tuple((name, part.reward) for name, part in own))
            combined.append(verdict)
        return combined

    def forget(self, tickets: list[int]):
        """Drops tickets that nobody will collect, and what is left of their work."""
        for ticket in tickets:
            numbers, *_ = self.tickets.pop(ticket, ([],))
            for number in numbers:
                self._drop(number)

    def check(self, jobs: list[tuple]) -> dict[int, str]:
        """What is wrong with jobs: {index: message}, in order. Their completions are not looked at.

        Raises RunError if the sandbox or the workers do not start.
        """
        from common import RunError

        problems = {}
        questions = {}  # number of a part → (index of its job, verifier)
        try:
            for index, job in enumerate(jobs):
                try:
                    parts, _ = split_job(*job)
                except RunError as error:
                    problems[index] = str(error)
                    continue
                for name, _, ground_truth, _ in parts:
                    questions[self._queue((name, None, ground_truth, {}))] = index, name
            self._wait_for(questions)
            for number, (index, name) in questions.items():
                verdict = self.verdicts[number]
                if verdict.reason != "right":
                    problems[index] = f"ground_truth of {name!r}: {verdict.answer or verdict.reason}"
        finally:
            for number in questions:
                self._drop(number)
        return dict(sorted(problems.items()))

    def close(self):
        """Ends the processes."""
        for worker in self.workers:
            worker.close()
        if self.judges:
            self.judges.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _fail_if_broken(self, verdicts):
        failed = [verdict for verdict in verdicts if not verdict.is_judged]
        unjudged = sum(verdict.reason == "unjudged" for verdict in failed)  # an endpoint has its bad days
        limit = max(len(verdicts), 32)
        if len(failed) - unjudged > self.max_failed * limit or unjudged > MAX_UNJUDGED * limit:
            counts = Counter(verdict.reason for verdict in failed)
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
            example = next((verdict.answer for verdict in failed if verdict.answer), "")
            fail(f"{len(failed)} of {len(verdicts)} completions could not be judged ({reasons}) {example}".strip())

    def _check_sandbox(self):
        try:
            missing = sandbox.require(self.sandbox)
        except sandbox.SandboxError as error:
            fail(str(error))
        if missing:
            print(f"sandbox: {self.sandbox}, without {', '.join(missing)}")
        self.sandbox_checked = True

    def _queue(self, part: tuple) -> int:
        """The number of a new part, (verifier, completion, ground truth, context)."""
        if not self.sandbox_checked and part[0].startswith("code"):
            self._check_sandbox()
        number = next(self.numbers)
        if VERIFIERS[part[0]].asks:
            self.judges = self.judges or Judges()
            if part[1] is not None:  # otherwise a worker looks at the ground truth
                self.asked[number] = self.judges.submit(*part)
                return number
        self.parts[number] = part
        self.waiting.append(number)
        return number

    def _drop(self, number: int):
        """Forgets a part. A worker that is at it ends it for nothing."""
        self.parts.pop(number, None)
        self.verdicts.pop(number, None)
        if number in self.asked:
            self.asked.pop(number).cancel()
        self.has_crashed.discard(number)

    def _wait_for(self, numbers):
        for number in sorted(numbers, key=self.asked.__contains__):  # judges answer meanwhile
            while number not in self.verdicts and number not in self.asked:
                self._step()
            if number in self.asked:
                self.verdicts[number] = self.asked.pop(number).result()

    def _step(self, patience: float | None = None):
        """Hands out parts, and takes the news of workers; waits for the first, `patience` seconds at most."""
        try:
            self._give_out()
            for number, verdict in self._news(patience):
                self._settle(number, verdict)
            self._give_out()
        except BaseException:  # perhaps in the middle of a reply
            for worker in self.workers:
                worker.kill()
            self.waiting = deque(self.parts)
            raise

    def _settle(self, number: int, verdict: Verdict | None):
        """What has become of a part: its verdict, or None if the process that was to judge has died."""
        if number not in self.parts:
            return  # forgotten meanwhile
        if verdict is None and number not in self.has_crashed:
            # The kernel may have killed the process for the memory of others: once more.
            self.has_crashed.add(number)
            self.waiting.appendleft(number)
            return
        self.verdicts[number] = verdict or not_judged("crash", "the process that judged it died")
        del self.parts[number]

    def _give_out(self):
        """To each idle worker a part of those that wait."""
        for worker in self.workers:
            while self.waiting and self.waiting[0] not in self.parts:
                self.waiting.popleft()  # forgotten
            if self.waiting and worker.is_idle():
                number = self.waiting[0]
                if worker.give(number, self.parts[number]):
                    self.waiting.popleft()

    def _news(self, patience: float | None) -> list[tuple[int, Verdict | None]]:
        """Waits for workers, and returns what has become of parts, if anything: (part, its verdict), ...

        The verdict is None if the process that was to judge has died.
        """
        active = [worker for worker in self.workers if not worker.is_idle()]
        if not active:
            return []
        if patience is None:
            patience = min(worker.patience() for worker in active)
        ready = wait([worker.source() for worker in active], patience)
        news = []
        for worker in active:
            number = worker.job
            if worker.source() in ready:
                verdict = worker.receive()
            elif worker.is_over_a_limit():
                worker.kill()
                verdict = not_judged("timeout")
            else:
                continue
            if number is not None:  # otherwise there was news of a child, not of a part
                news.append((number, verdict))
        return news


class Worker:
    """A supervisor process and the child that it has forked to judge; without Linux, one process that is both.

    The supervisor has everything imported, so a killed child is replaced in milliseconds; a killed supervisor is
    started again. Each child comes with a socket of its own, which ends when the child does. So a worker is

        starting   connection None: the supervisor will send the next child
        idle       connection, no job
        busy       connection and job: the child will send a verdict or end

    `job` is the number that `give` was called with; the reply repeats it. A child that says anything else, or something
    without a job, is killed: what it says next might be taken for another job's verdict. `pid` is the child's.
    """

    def __init__(self, modules: list[str], level: str):
        self.arguments = json.dumps([sys.path, modules, level])
        self.failed_starts = 0
        self.start()

    def start(self):
        """Starts a supervisor, without waiting for it."""
        self.connection = self.job = None
        self.control, theirs = socket.socketpair(type=SOCKET)
        code = (
            "import json, sys; sys.path = json.loads(sys.argv[1])[0]; "
            "from rewards import pool; pool.supervise(*sys.argv[1:])"
        )
        environment = {  # no keys
            "PYTHONHASHSEED": "0",  # the same order of sets every time
            "OMP_NUM_THREADS": "1",
        }
        for name in ("PATH", "HOME", "LD_LIBRARY_PATH"):
            if name in os.environ:
                environment[name] = os.environ[name]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, self.arguments, str(theirs.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
            pass_fds=[theirs.fileno()],
            process_group=0,  # one of its own: Ctrl-C is for the caller, whose end ends it
        )
        theirs.close()

    def is_idle(self) -> bool:
        """Whether it can be given a job."""
        return self.connection is not None and self.job is None

    def source(self) -> socket.socket:
        """What becomes readable when there is news: of the next child, or from the child."""
        return self.connection or self.control

    def give(self, number: int, part: tuple) -> bool:
        """Sends (verifier, completion, ground truth, context); False if the child cannot be relied on any more."""
        name, *_ = part
        self.part = anonymous_file()  # of any length: sending it does not wait for the child to read
        try:
            with suppress(BlockingIOError):  # it is silent
                self.connection.recv(1, socket.MSG_DONTWAIT)
                raise OSError("it has ended, or says something unasked")
            self.part.write(json.dumps(part).encode())
            self.part.flush()
            self.seconds = VERIFIERS[name].seconds
            if ON_LINUX:
                self.clock = ~self.pid << 3 | 2  # the clock of a process's processor time: clock_getcpuclockid(3)
                self.start_time = time.clock_gettime(self.clock)
            self.watch = sandbox.Watch()
            socket.send_fds(self.connection, [str(number).encode()], [self.part.fileno()])
        except OSError:
            self.kill()
            return False
        self.job = number
        return True

    def patience(self) -> float:
        """Seconds until it has to be looked at again."""
        if self.job is None:
            return 60.0
        return min(sandbox.LOOK, max(0.0, self.seconds - self.used()))

    def is_over_a_limit(self) -> bool:
        """Whether the job has taken too long: of processor time, of its children's too, or of sleep."""
        if self.job is None:
            return False
        if self.watch.is_due():
            family = sandbox.family(self.pid)
            self.watch.look(family)
            if not ON_LINUX and sandbox.memory(family) > MEMORY:
                return True
        return (
            self.used() >= self.seconds
            or self.watch.used >= 5 * self.seconds
            or self.watch.slept > max(self.seconds, sandbox.SLEEP_SECONDS) + self.watch.used
        )

    def used(self) -> float:
        """Seconds of processor time that the child has spent on the job; without Linux, with its children's."""
        if not ON_LINUX:
            return self.watch.used
        try:
            return time.clock_gettime(self.clock) - self.start_time
        except OSError:  # it has just died
            return 0.0

    def receive(self) -> Verdict | None:
        """Takes the news: a verdict, or None for a new child or for the end of one."""
        if self.connection is None:
            self.connect()
            return None
        try:
            number, is_last, *reply = json.loads(self.read_reply())
            verdict = as_verdict(Verdict(*reply))
        except (OSError, ValueError, TypeError, RecursionError):  # it has died, or talks nonsense
            number = verdict = None
        if number != self.job or verdict is None:
            self.kill()
            return None
        self.job = None
        if is_last:
            self.kill()
        return verdict

    def read_reply(self) -> bytes:
        """What the child says. Raises OSError if that cannot be read."""
        reply = self.connection.recv(REPLY, socket.MSG_DONTWAIT)
        if not ON_LINUX:  # a line may come in pieces
            self.connection.settimeout(1.0)
            while reply[-1:] not in (b"", b"\n") and len(reply) < REPLY:
                reply += self.connection.recv(REPLY - len(reply)) or b"\n"  # or it has died
            self.connection.settimeout(None)
        return reply

    def connect(self):
        """Reads from the supervisor: the next child, or the end of it, and then starts another."""
        flags = socket.MSG_CMSG_CLOEXEC if ON_LINUX else 0
        message, fds, *_ = socket.recv_fds(self.control, 32, 1, flags)
        if fds or (message and not ON_LINUX):
            self.pid = int(message)
            self.connection = socket.socket(fileno=fds[0]) if fds else self.control.dup()
            self.failed_starts = 0
            return
        self.failed_starts += 1
        if self.failed_starts == 3:
            fail("the processes that judge do not start; what they printed is above")
        self.close()
        self.start()

    def kill(self):
        """Kills the child, if there is one. The supervisor will send another."""
        if self.connection is None:
            return
        with suppress(ProcessLookupError, PermissionError):  # it may just have died: a Mac's error is the latter
            (os.kill if ON_LINUX else os.killpg)(self.pid, SIGKILL)
        self.connection.close()
        self.connection = self.job = None

    def close(self):
        """Ends both processes, and what a verifier has left behind."""
        has_child = self.connection is not None
        self.control.close()
        self.kill()
        if has_child:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1)  # it ends the children's children, and itself
        self.process.kill()  # and the kernel its child
        self.process.wait()


# SOCK_SEQPACKET keeps messages apart. A Mac lacks it: there a number is alone on its way, and a reply is a line.
SOCKET = socket.SOCK_SEQPACKET if ON_LINUX else socket.SOCK_STREAM


def anonymous_file():
    """A file without a name, which ends when nobody has it open."""
    if ON_LINUX:
        return os.fdopen(os.memfd_create("part"), "wb")
    import tempfile

    return tempfile.TemporaryFile()


# ---------------------------------------------------------------- the worker's side

WARM_UP = [  # what else a first verdict would load
    ("math", r"\boxed{\frac12}", "0.5"),
    ("ifeval", "A sentence.", {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "en"}]}),
]


def supervise(arguments: str, control: str, caller: str):
    """The main program of a supervisor: keep one child alive, and tell the caller of each.

    Args:
        arguments: JSON of the caller's sys.path, the modules that define verifiers, the level of the sandbox.
        control: number of a socket to the caller.
        caller: process id of the caller.
    """
    die_with(int(caller))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # also if it is sent to every process
    _, modules, level = json.loads(arguments)
    verifiers.SANDBOX = level
    logging.disable()  # hostile formulas cause many warnings
    for module in modules:
        verifiers.load(module)
    for part in WARM_UP:
        judge(*part)
    control = socket.socket(fileno=int(control))
    if not ON_LINUX:
        with suppress(OSError):  # the caller has closed
            control.send(str(os.getpid()).encode())
            serve(control)
        os.killpg(0, SIGKILL)  # with what verifiers have left behind
    libc = ctypes.CDLL(None)
    PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # no program of the same user can look into what judges it
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # for `end_orphans`
    supervisor = os.getpid()
    while True:
        ours, theirs = socket.socketpair(type=SOCKET)
        pid = os.fork()
        if pid == 0:
            control.close()
            theirs.close()
            die_with(supervisor)
            serve(ours)
            os._exit(0)
        ours.close()
        try:
            socket.send_fds(control, [str(pid).encode()], [theirs.fileno()])
        except OSError:
            return  # the caller has closed
        theirs.close()
        os.waitpid(pid, 0)
        end_orphans()


def end_orphans():
    """Ends what a child's verifiers have started and left behind, children of this process now.

    They may hold the child's socket, and the caller sees the child's end when nobody does.
    """
    with suppress(OSError):
        while orphans := sandbox.family(os.getpid())[1:]:
            for pid in orphans:
                os.kill(pid, SIGKILL)
            os.waitpid(-1, 0)


def serve(connection: socket.socket):
    """The main program of a child: judge until the caller is gone."""
    if ON_LINUX:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.register_at_fork(after_in_child=lambda: die_with(os.getppid()))  # what a verifier forks ends with it
    sys.set_int_max_str_digits(0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)  # hostile formulas make sympy print warnings too, past `logging`
    own_pid = os.getpid()
    is_last = False
    while not is_last:
        number, fds, *_ = socket.recv_fds(connection, 32, 1)
        if not fds:
            return
        with open(fds[0], "rb") as file:
            file.seek(0)
            part = json.load(file)
        if not ON_LINUX:
            limit_processor_time(VERIFIERS[part[0]].seconds)
        verdict = judge(*part)
        if os.getpid() != own_pid:
            os._exit(0)  # the verifier has forked, and this is the copy
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        is_last = largest > RECYCLED or has_company()
        connection.sendall(json.dumps([int(number), is_last, *verdict]).encode() + b"\n")


def limit_processor_time(seconds: float):
    """The kernel kills this process when it has used that much more, and some: the caller is first, if it lives."""
    limit = math.ceil(time.process_time() + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def has_company() -> bool:
    """Whether a verifier has left a process or a thread behind, which would live on the next one's time."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass  # one that had ended
    except ChildProcessError:
        if not ON_LINUX:
            return threading.active_count() > 2  # the main thread, and that of `die_with`
        return len(os.listdir("/proc/self/task")) > 1
    return True
