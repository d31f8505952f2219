"""Verifiers: is a completion right? Each is a pure function: the same completion gets the same verdict.

    mathematics.py     gsm8k, math
    programs.py        code, code_stdio
    ifeval.py          ifeval, ifeval_loose
    strings.py         exact, contains

A verifier is named in a row's column `dataset`, as in the published RLVR data. A new one is a function with a
decorator, in a module that the script imports:

    from rewards import verifier

    @verifier("polite")
    def polite(completion, ground_truth):
        return "please" in completion

It sees what follows </think>. Completions come from a policy that is rewarded for whatever passes, so they are judged
in processes that can be killed: see pool.py.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

REASONS = ("right", "wrong", "unparsed", "timeout", "unjudged", "crash", "bad_ground_truth")  # the most serious last
NOT_JUDGED = ("timeout", "unjudged", "crash", "bad_ground_truth")  # what a reward of NaN may have as its reason
SANDBOX = "full"  # the level that programs run at; a pool sets it in its workers


class Verdict(NamedTuple):
    """`reward`: 0 … 1, times the weights. `reason`: one of REASONS. `answer`: what was judged, or what went wrong.

    A reward that is not a number (NaN) says that there is no judgement: the verifier was over its limit, it crashed, a
    judge did not answer. Nobody knows whether that completion is right, so it is neither rewarded nor taught as wrong.
    """

    reward: float
    reason: str
    answer: str = ""

    @property
    def is_judged(self) -> bool:
        """Whether the reward is a number."""
        return not math.isnan(self.reward)


def not_judged(reason: str, answer: str = "") -> Verdict:
    """The verdict where there is no judgement, for one of the reasons timeout, unjudged, crash, bad_ground_truth."""
    return Verdict(math.nan, reason, answer)


class Verifier(NamedTuple):
    """How one name is judged."""

    judge: Callable  # (completion, gold) -> bool or number in 0 … 1, (that, answer), or Verdict
    gold: Callable  # ground truth as in the row -> as `judge` gets it; ValueError if it cannot be one
    seconds: float  # of processor time


VERIFIERS = {}


def verifier(*names: str, gold: Callable = lambda ground_truth: ground_truth, seconds: float = 1.0):
    """Decorator that registers a function as a verifier.

    Args:
        names: that rows have in the column `dataset`.
        gold: makes of a row's ground truth what the function gets. A ValueError says that the ground truth is bad.
        seconds: of processor time that one verdict may take.

    Returns:
        The decorator. It returns the function (completion, gold) as it is. That one may return a bool, a number from 0
        to 1, a pair of either and the answer (None: the completion has no answer, `unparsed`), or a Verdict.
    """

    def register(function):
        for name in names:
            VERIFIERS[name] = Verifier(function, gold, seconds)
        return function

    return register


def registered_name(name: str) -> str | None:
    """The verifier that a row names, whatever the case ("MATH" in Tülu 3's rows); None if there is none."""
    return next((known for known in VERIFIERS if known.lower() == str(name).lower()), None)


# ---------------------------------------------------------------- one verdict


def judge(name: str, completion: str | None, ground_truth) -> Verdict:
    """One verdict, in this process and without limits: for text that you trust.

    Args:
        name: of a verifier. A KeyError if there is none.
        completion: the policy's text; None to look at the ground truth alone.
        ground_truth: as in the row.

    Returns:
        A Verdict. Nothing else is raised: an exception of the verifier's is the reason `crash`.
    """
    entry = VERIFIERS[registered_name(name)]
    try:
        gold = entry.gold(ground_truth)
    except Exception as error:
        return not_judged("bad_ground_truth", str(error)[:200])
    if completion is None:
        return Verdict(0.0, "right")
    try:
        verdict = as_verdict(entry.judge(after_thinking(completion), gold))
        return verdict._replace(answer=printable(verdict.answer[:200]))
    except Exception as error:  # MemoryError and RecursionError too
        return not_judged("crash", f"{type(error).__name__}: {error}"[:200])


def as_verdict(returned) -> Verdict:
    """What a verifier's function has returned, as a Verdict. Raises ValueError or TypeError if it cannot be one."""
    if isinstance(returned, Verdict):
        verdict = returned
    else:
        is_pair = isinstance(returned, tuple) and len(returned) == 2
        reward, answer = returned if is_pair else (returned, "")
        if answer is None:
            return Verdict(0.0, "unparsed")
        if isinstance(reward, (str, bytes)):  # float("1") is 1
            raise TypeError(f"a reward that is no number: {reward!r}")
        reason = "right" if reward == 1 else "wrong"
        verdict = Verdict(float(reward), reason, str(answer))
    in_range = 0 <= verdict.reward <= 1 if verdict.is_judged else verdict.reason in NOT_JUDGED
    if not in_range or verdict.reason not in REASONS:
        raise ValueError(f"a verdict of {verdict.reward!r}, {verdict.reason!r}")
    return verdict


def after_thinking(completion: str) -> str:
    """What follows the last </think>. A thought that never ends has no answer."""
    _, end, answer = completion.rpartition("</think>")
    if end:
        return answer.lstrip()
    if completion.lstrip().startswith("<think>"):
        return ""
    return completion


def printable(text: str) -> str:
    """Spaces for the characters that cannot be printed: terminals obey some of them."""
    return "".join(character if character.isprintable() else " " for character in text)


def as_text(ground_truth) -> str:
    """A string or number as a string. Raises ValueError for anything else, and for a blank."""
    if isinstance(ground_truth, bool) or not isinstance(ground_truth, (str, int, float)):
        raise ValueError(f"expected a string, found {type(ground_truth).__name__}")
    text = str(ground_truth)
    if not text.strip():
        raise ValueError("empty")
    return text
