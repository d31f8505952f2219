"""Processes that judge completions, and that can be killed.

    with Pool() as pool:
        pool.score([("gsm8k", "... so she pays $18.", "18")])      # [Verdict(reward=1.0, reason='right', answer='18')]

A job is (verifier, completion, ground_truth), the first and the last as in the columns `dataset` and `ground_truth` of
the published RLVR data; both may be lists, with a list of weights as a fourth entry, and the reward is then the
weighted sum.

sympy can be made to compute for ever in one call that no signal interrupts, or to ask for all memory, by a completion
of ten characters. So nothing is judged in the caller, and no thread or handler is relied on: a worker over its limit is
killed and replaced, its job gets the reason `timeout`, and the next job does not notice. The limit is processor time
(`Verifier.seconds`; five times that on the clock), so that a busy machine fails nobody, and `MEMORY`. A verdict is a
function of the completion and the ground truth, except at the edge of these limits.

The caller never forks (it may hold CUDA), starts no thread, and reads 64 KiB of a reply at most.
"""

import json
import logging
import math
import os
import resource
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from contextlib import suppress
from multiprocessing.connection import Connection, wait

import rewards
import sandbox
from rewards import REASONS, VERIFIERS, Verdict
from sandbox import SIGKILL, die_with

MEMORY = 2**30  # bytes of address space of a worker
RECYCLED = 2**29  # a worker that has ever been this large is replaced


# ---------------------------------------------------------------- the caller's side


def stop(message: str):
    """Raises RunError, which a script prints as one line."""
    from common import RunError  # not at the top: workers import this file, and common.py imports transformers

    raise RunError(message)


def rates(verdicts: list[Verdict]) -> dict[str, float]:
    """The shares of completions that were not judged, as metrics."""
    counts = Counter(verdict.reason for verdict in verdicts)
    return {f"{reason}_rate": counts[reason] / max(len(verdicts), 1) for reason in ("unparsed", "timeout", "crash")}


def split_job(verifiers, completion, ground_truths, weights=None) -> list[tuple]:
    """[(verifier, completion, ground truth, weight), ...]; RunError if it is not a job."""
    if isinstance(verifiers, str):
        verifiers, ground_truths, weights = [verifiers], [ground_truths], weights and [weights]
    weights = [1.0] * len(verifiers) if weights is None else weights
    if not isinstance(ground_truths, list) or not len(verifiers) == len(ground_truths) == len(weights):
        stop(f"{len(verifiers)} verifiers need lists of as many ground truths and weights")
    if not all(isinstance(weight, (int, float)) and math.isfinite(weight) for weight in weights):
        stop(f"weights are {weights}, expected finite numbers")
    for name in verifiers:
        if name not in VERIFIERS:
            stop(f"no verifier is named {name!r}; there are {', '.join(VERIFIERS)}")
    triples = zip(verifiers, ground_truths, weights, strict=True)
    return [(name, completion, ground_truth, weight) for name, ground_truth, weight in triples]


def combine(verdicts: list[Verdict], weights: list[float]) -> Verdict:
    """The weighted sum; the most serious reason; every answer."""
    reward = sum(weight * verdict.reward for weight, verdict in zip(weights, verdicts, strict=True))
    reason = max((verdict.reason for verdict in verdicts), key=REASONS.index)
    return Verdict(reward, reason, " | ".join(verdict.answer for verdict in verdicts))


class Pool:
    """Worker processes that judge. Close it, or use it in a `with`; a caller that dies takes the workers with it.

    Args:
        workers: processes; by default the processor cores that are this rank's share of the machine.
        sandbox: what model-written code is run in, "full" or "weak"; see sandbox.py. Checked when first needed.
        max_failed: the share of completions that may end as `timeout`, `crash` or `bad_ground_truth` in one call of
            `score` (of 32 or more). Above it the verifier is broken, which would otherwise look like a weak model.
    """

    def __init__(self, workers: int | None = None, sandbox: str = "full", max_failed: float = 0.2):
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        modules = sorted({verifier.judge.__module__ for verifier in VERIFIERS.values()})
        if "__main__" in modules:
            stop("a verifier is defined in the script itself, which workers do not import: give it a module of its own")
        self.sandbox, self.max_failed, self.sandbox_checked = sandbox, max_failed, False
        self.workers = [Worker(modules, sandbox) for _ in range(workers or max(1, cores))]

    def score(self, jobs: list[tuple]) -> list[Verdict]:
        """One verdict for each (verifier, completion, ground_truth[, weight]). Raises RunError when too many fail."""
        split = [split_job(*job) for job in jobs]
        verdicts = self._run([part[:3] for parts in split for part in parts])
        failed = [verdict for verdict in verdicts if verdict.reason in ("timeout", "crash", "bad_ground_truth")]
        if len(failed) > self.max_failed * max(len(verdicts), 32):
            reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(v.reason for v in failed).items())
            example = next((verdict.answer for verdict in failed if verdict.answer), "")
            stop(f"{len(failed)} of {len(verdicts)} completions could not be judged ({reasons}) {example}".strip())
        remaining = iter(verdicts)
        return [combine([next(remaining) for _ in parts], [part[3] for part in parts]) for parts in split]

    def check(self, jobs: list[tuple]) -> dict[int, str]:
        """What is wrong with jobs: {index: message}, in order. Their completions are not looked at."""
        from common import RunError

        problems, split = {}, []
        for index, job in enumerate(jobs):
            try:
                split += [(index, part) for part in split_job(*job)]
            except RunError as error:
                problems[index] = str(error)
        verdicts = self._run([(name, None, gold) for _, (name, _, gold, _) in split])
        for (index, (name, *_)), verdict in zip(split, verdicts, strict=True):
            if verdict.reason != "right":
                problems[index] = f"ground_truth of {name!r}: {verdict.answer or verdict.reason}"
        return dict(sorted(problems.items()))

    def _run(self, jobs: list[tuple]) -> list[Verdict]:
        if not self.sandbox_checked and any(name.startswith("code") for name, *_ in jobs):
            self._check_sandbox()
        verdicts = [None] * len(jobs)
        waiting, crashed = deque(range(len(jobs))), set()  # every job waits, or is one worker's, or has its verdict
        try:
            self._judge(jobs, verdicts, waiting, crashed)
        except BaseException:
            for worker in self.workers:
                worker.kill()  # no verdict of these jobs may be taken for one of the next
            raise
        return verdicts

    def _judge(self, jobs, verdicts, waiting, crashed):
        left = len(jobs)
        while left:
            for worker in self.workers:
                if waiting and worker.is_idle() and worker.give(waiting[0], jobs[waiting[0]]):
                    waiting.popleft()
            active = [worker for worker in self.workers if not worker.is_idle()]
            ready = wait([worker.source() for worker in active], min(worker.patience() for worker in active))
            for worker in active:
                index = worker.job
                if worker.source() in ready:
                    verdict = worker.receive()
                elif worker.patience() == 0:
                    verdict = worker.kill()
                else:
                    continue
                if index is None:
                    continue  # there is news of a child, not of a job
                if verdict is None and index not in crashed:  # the kernel may have killed it for others' memory: again
                    crashed.add(index)
                    waiting.appendleft(index)
                else:
                    verdicts[index] = verdict or Verdict(0.0, "crash", "the process that judged it died")
                    left -= 1

    def _check_sandbox(self):
        try:
            missing = sandbox.require(self.sandbox)
        except sandbox.SandboxError as error:
            stop(str(error))
        if missing:
            print(f"sandbox: {self.sandbox}, without {', '.join(missing)}")
        self.sandbox_checked = True

    def close(self):
        for worker in self.workers:
            worker.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


class Worker:
    """A supervisor process and the child that it has forked to judge.

    The supervisor has everything imported, so a killed child is replaced in milliseconds; a killed supervisor is
    started again. Each child comes with a socket of its own, which ends when the child does. So a worker is

        starting   connection None: `source` is the supervisor, which will send the next child's socket
        idle       connection, no job
        busy       connection and job: `source` is the child, which will send a verdict or end
    """

    def __init__(self, modules: list[str], sandbox: str):
        self.arguments = json.dumps([sys.path, modules, sandbox])
        self.failed_starts = 0
        self.start()

    def start(self):
        self.control, theirs = socket.socketpair()
        code = "import json, sys; sys.path = json.loads(sys.argv[1])[0]; import pool; pool.supervise(*sys.argv[1:])"
        keep = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, self.arguments, str(theirs.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=keep | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},  # no keys; the same order of sets every time
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self.connection = self.job = None

    def is_idle(self) -> bool:
        return self.connection is not None and self.job is None

    def source(self):
        """What has something to read next: the supervisor's news of a child, or the child's verdict."""
        return self.connection or self.control

    def give(self, index: int, job: tuple) -> bool:
        """Sends a job; False if the child has died meanwhile."""
        try:
            self.clock = ~self.pid << 3 | 2  # the clock of a process's processor time: clock_getcpuclockid(3)
            self.cpu, self.wall = time.clock_gettime(self.clock), time.monotonic()
            self.seconds = VERIFIERS[job[0]].seconds
            self.connection.send_bytes(json.dumps(job).encode())
            self.job = index
            return True
        except OSError:
            self.disconnect()
            return False

    def patience(self) -> float:
        """Seconds until it has to be looked at again. 0: over the limit."""
        if self.job is None:
            return 60.0
        try:
            used = time.clock_gettime(self.clock) - self.cpu
        except OSError:  # it has just died
            used = 0.0
        left = min(self.seconds - used, 5 * self.seconds - (time.monotonic() - self.wall))
        return max(0.0, left)

    def receive(self) -> Verdict | None:
        """Reads from `source`: a verdict, or None for a new child or for the end of one."""
        if self.connection is None:
            return self.connect()
        try:
            is_last, *reply = json.loads(self.connection.recv_bytes(65536))
        except (EOFError, OSError):
            return self.disconnect()
        self.job = None
        if is_last:
            self.disconnect()
        return Verdict(*reply)

    def connect(self):
        message, fds, *_ = socket.recv_fds(self.control, 32, 1, socket.MSG_CMSG_CLOEXEC)
        if fds:
            self.pid, self.connection, self.failed_starts = int(message), Connection(fds[0]), 0
            return
        self.failed_starts += 1
        if self.failed_starts == 3:
            stop("the processes that judge do not start; what they printed is above")
        self.close()
        self.start()

    def disconnect(self):
        self.connection.close()
        self.connection = self.job = None

    def kill(self) -> Verdict:
        if self.connection is not None:
            with suppress(ProcessLookupError):  # it may just have died
                os.kill(self.pid, SIGKILL)
            self.disconnect()
        return Verdict(0.0, "timeout")

    def close(self):
        if self.connection is not None:
            self.disconnect()
        self.control.close()
        self.process.kill()  # and the kernel its child
        self.process.wait()


# ---------------------------------------------------------------- the worker's side

WARM_UP = [  # what else a first verdict would load
    ("math", r"\boxed{\frac12}", "0.5"),
    ("ifeval", "A sentence.", {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "en"}]}),
]


def supervise(arguments: str, control: str, caller: str):
    """The main program of a supervisor: keep one child alive, and tell the caller of each."""
    _, modules, rewards.SANDBOX = json.loads(arguments)
    die_with(int(caller))
    logging.disable()  # hostile formulas cause many warnings
    for module in modules:
        __import__(module)
    for job in WARM_UP:
        rewards.judge(*job)
    control = socket.socket(fileno=int(control))
    while True:
        ours, theirs = socket.socketpair()
        supervisor = os.getpid()
        pid = os.fork()
        if pid == 0:
            control.close(), theirs.close()
            die_with(supervisor)
            serve(Connection(ours.detach()))
            os._exit(0)
        try:
            ours.close()
            socket.send_fds(control, [str(pid).encode()], [theirs.fileno()])
            theirs.close()
            os.waitpid(pid, 0)
        except OSError:
            return  # the caller has closed


def serve(connection: Connection):
    """The main program of a child: judge until the caller is gone."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)  # and so does sympy
    sys.set_int_max_str_digits(0)
    is_last = False
    while not is_last:
        try:
            job = json.loads(connection.recv_bytes())
        except EOFError:
            return
        verdict = rewards.judge(*job)
        is_last = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > RECYCLED
        connection.send_bytes(json.dumps([is_last, *verdict]).encode())
