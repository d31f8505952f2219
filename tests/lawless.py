"""Verifiers that hang, crash, eat memory and lie, as a forker's module: workers import it by name."""

import ctypes
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress

from rewards import Verdict, verifier


@verifier("hangs")
def hangs(completion, ground_truth):
    while "hang" in completion:
        pass
    return True


@verifier("sleeps", seconds=0.2)
def sleeps(completion, ground_truth):
    time.sleep(60)


@verifier("dies")
def dies(completion, ground_truth):
    if "die" in completion:
        os._exit(0)
    return True


@verifier("dies_once")
def dies_once(completion, ground_truth):
    """`ground_truth` is a file that says whether it has died."""
    if not os.path.exists(ground_truth):
        open(ground_truth, "w").close()
        os._exit(1)
    return True


@verifier("grows")
def grows(completion, ground_truth):
    return len(bytearray(2**31)) > 0


@verifier("grows_and_stays", seconds=20)  # touching that much memory takes a busy machine more than a second
def grows_and_stays(completion, ground_truth):
    kept.append(bytearray(700 * 2**20))
    return True, os.getpid()


kept = []


@verifier("raises")
def raises(completion, ground_truth):
    return {}[completion]


@verifier("says")
def says(completion, ground_truth):
    return {"nan": float("nan"), "two": 2, "half": 0.5, "text": "yes", "number": "1", "none": None, "unjudged": Verdict(float("nan"), "unjudged"), "verdict": Verdict(1.0, "right", "x" * 10**6), "lie": Verdict(float("nan"), "right"), "reason": Verdict(1.0, "because")}[completion]


@verifier("floods")
def floods(completion, ground_truth):
    print("to stdout" * 10**5)
    os.write(2, b"to stderr" * 10**5)
    return True


@verifier("polite")
def polite(completion, ground_truth):
    return "please" in completion


@verifier("small")
def small(completion, ground_truth):
    """The share of characters that are small letters."""
    return sum(map(str.islower, completion)) / max(len(completion), 1)


@verifier("coin")
def coin(completion, ground_truth):
    import hashlib

    return hashlib.sha256(completion.encode("utf-8", "surrogatepass")).digest()[0] % 2 == 0


@verifier("forks", seconds=20)
def forks(completion, ground_truth):
    """Starts a process in one of several ways, and so returns twice, or leaves it behind. Right if it says "right"."""
    how = ground_truth
    if how == "returns twice":
        os.fork()
    if how == "returns twice, past Python":
        ctypes.CDLL(None).fork()
    if how == "returns later":
        if os.fork() == 0:
            time.sleep(0.05)
    if how == "the child returns":
        if os.fork():
            os._exit(0)
    if how == "stays" and os.fork() == 0:
        time.sleep(600)
    if how == "stays, and its parent dies" and ctypes.CDLL(None).fork():
        os._exit(0)
    if how == "a command":
        subprocess.Popen(["sleep", "600"])
    if how == "a thread":
        threading.Thread(target=spin, daemon=True).start()
    return "right" in completion, str(os.getpid())


@verifier("talks")
def talks(completion, ground_truth):
    """Writes into every file it has, among them the connection to the caller."""
    for fd in range(3, 64):
        with suppress(OSError):
            for _ in range(3):
                os.write(fd, completion.encode())
    return False


@verifier("waits", seconds=0.2)
def waits(completion, ground_truth):
    """Does nothing, in one of several ways."""
    if completion == "sleep":
        time.sleep(600)
    if completion == "naps":
        while True:
            time.sleep(0.01)
    if completion == "pipe":
        os.read(os.pipe()[0], 1)
    if completion == "lock":
        threading.Semaphore(0).acquire()
    if completion == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    if completion == "child":
        subprocess.run(["sleep", "600"])
    if completion == "working child":
        if os.fork() == 0:
            spin()
        os.wait()
    return True


def spin():
    while True:
        pass
