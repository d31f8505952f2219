"""Verifiers: is a completion right? Each is a pure function: the same completion gets the same verdict.

    mathematics.py     gsm8k, math
    programs.py        code, code_stdio
    ifeval.py          ifeval, ifeval_strict, ifeval_loose; ifevalg.py has the instructions of OLMo 3
    strings.py         exact, contains, string_f1, format

A verifier is named in a row's column `dataset`, as in the published RLVR data. A new one is a function with a
decorator, in a file of yours, for `--rewards FILE` of the scripts:

    from rewards import verifier

    @verifier("polite")
    def polite(completion, ground_truth):
        return "please" in completion

A function with a parameter `prompt` also gets the messages before the completion, and one with a parameter `row` the
other columns of the row, {name: value}.

It sees what follows </think>. Completions come from a policy that is rewarded for whatever passes, so they are judged
in processes that can be killed: see pool.py.
"""

import inspect
import math
import sys
from collections.abc import Callable
from importlib import import_module, util
from pathlib import Path
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
    parts: tuple = ()  # where several have judged: (verifier, its own reward, without weight), ...

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
    wants: tuple = ()  # of "prompt" and "row": what `judge` takes besides, by keyword
    asks: bool = False  # a judge: `judge` returns the question for a model; see judges.py
    whole: bool = False  # gets the thought, too


VERIFIERS = {}


def verifier(
    *names: str,
    gold: Callable = lambda ground_truth: ground_truth,
    seconds: float = 1.0,
    asks: bool = False,
    whole: bool = False,
):
    """Decorator that registers a function as a verifier.

    Args:
        names: that rows have in the column `dataset`.
        gold: makes of a row's ground truth what the function gets. A ValueError says that the ground truth is bad.
        seconds: of processor time that one verdict may take.
        asks: the function does not judge: it returns the text that a model is asked for a score (see judges.py).
        whole: the function gets the completion as it is, not what follows </think>.

    Returns:
        The decorator. It returns the function (completion, gold) as it is. That one may return a bool, a number from 0
        to 1, a pair of either and the answer (None: the completion has no answer, `unparsed`), or a Verdict. It may
        have two parameters more: `prompt`, the messages before the completion, [{"role": ..., "content": ...}, ...],
        and `row`, the other columns of the row, {name: value}.

    Raises:
        TypeError: the function has other parameters.
    """

    def register(function):
        signature = inspect.signature(function)
        wants = tuple(name for name in list(signature.parameters)[2:] if name in ("prompt", "row"))
        try:
            signature.bind("completion", "ground_truth", **dict.fromkeys(wants))
        except TypeError as error:
            of = "(completion, ground_truth), or also of prompt and row"
            raise TypeError(f"verifier {names[0]!r} is no function of {of}: {signature}, {error}") from None
        for name in names:
            VERIFIERS[name] = Verifier(function, gold, seconds, wants, asks, whole)
        return function

    return register


def registered_name(name: str) -> str | None:
    """The verifier that a row names, whatever the case ("MATH" in Tülu 3's rows); None if there is none."""
    return next((known for known in VERIFIERS if known.lower() == str(name).lower()), None)


def load(source: str) -> list[str]:
    """Imports what defines verifiers, and returns their names.

    Args:
        source: a module's name, or the path of a .py file, which is then a module whose name is that path; what stands
            beside the file can be imported in it.

    Raises:
        Exception: whatever the import raises.
    """
    if source.endswith(".py"):
        source = str(Path(source).resolve())
        spec = util.spec_from_file_location(source, source)
        module = sys.modules[source] = util.module_from_spec(spec)
        if str(Path(source).parent) not in sys.path:
            sys.path.append(str(Path(source).parent))
        spec.loader.exec_module(module)
    else:
        import_module(source)
    return [name for name, entry in VERIFIERS.items() if entry.judge.__module__ == source]


# ---------------------------------------------------------------- one verdict


def judge(name: str, completion: str | None, ground_truth, context: dict | None = None) -> Verdict:
    """One verdict, in this process and without limits: for text that you trust.

    Args:
        name: of a verifier. A KeyError if there is none.
        completion: the policy's text; None to look at the ground truth alone.
        ground_truth: as in the row.
        context: what the verifier wants besides: {"prompt": messages, "row": {column: value}}, or one of them.

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
        text = completion if entry.whole else after_thinking(completion)
        verdict = as_verdict(entry.judge(text, gold, **(context or {})))
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
        hint = ": the row needs a column ground_truth" if ground_truth is None else ""  # None: a row for sft.py, say
        raise ValueError(f"expected a string, found {type(ground_truth).__name__}{hint}")
    text = str(ground_truth)
    if not text.strip():
        raise ValueError("empty")
    return text
