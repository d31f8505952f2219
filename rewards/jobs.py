"""Jobs: what is asked of verifiers, and what becomes of the verdicts of one that asks several.

A job is (verifier, completion, ground_truth), the first and the last as in the columns `dataset` and `ground_truth` of
the published RLVR data; both may be lists, with a list of weights as a fourth entry, and the reward is then the
weighted sum. The weight "gate" adds nothing: unless that verifier gives 1, the reward is 0. A fifth entry is the
context, {"prompt": messages, "row": other columns}, where a verifier wants it.
"""

import math
from collections import Counter

from rewards.verifiers import REASONS, VERIFIERS, Verdict, registered_name

GATE = "gate"  # in place of a weight


def failure_rates(verdicts: list[Verdict]) -> dict[str, float]:
    """Shares of completions, as metrics: no answer; over a limit of time (a verifier or a program); a verifier died."""
    counts = Counter(verdict.reason for verdict in verdicts)
    total = max(len(verdicts), 1)
    return {f"{reason}_rate": counts[reason] / total for reason in ("unparsed", "timeout", "crash")}


def split_job(verifiers, completion, ground_truths, weights=None, context=None) -> tuple[list[tuple], list]:
    """The parts of a job, and their weights: [(verifier, completion, ground truth, what it wants besides), ...].

    Raises RunError if it is not a job, or if its context lacks what a verifier wants.
    """
    if isinstance(verifiers, str):
        verifiers = [verifiers]
        ground_truths = [ground_truths]
        if weights is not None:
            weights = [weights]
    if not isinstance(verifiers, list) or not verifiers:
        fail(f"the verifier is {verifiers!r}, expected a name or a list of names")
    if weights is None:
        weights = [1.0] * len(verifiers)
    if not isinstance(ground_truths, list) or not len(verifiers) == len(ground_truths) == len(weights):
        fail(f"{len(verifiers)} verifiers need lists of as many ground truths and weights")
    given = weights
    weights = [read_weight(weight) for weight in given]
    if None in weights:
        fail(f"weights are {given}, expected finite numbers or {GATE!r}")
    if weights and set(weights) == {GATE}:
        fail("every weight is a gate, so that no verifier gives a reward")
    names = [registered_name(verifier) for verifier in verifiers]
    for verifier, name in zip(verifiers, names, strict=True):
        if name is None:
            fail(f"no verifier is named {verifier!r}; there are {', '.join(VERIFIERS)}")
    parts = []
    for name, ground_truth in zip(names, ground_truths, strict=True):
        wants = VERIFIERS[name].wants if completion is not None else ()
        missing = [want for want in wants if want not in (context or {})]
        if missing:
            fail(f"the verifier {name!r} wants the {missing[0]}, which this job does not have")
        parts.append((name, completion, ground_truth, {want: context[want] for want in wants}))
    return parts, weights


def read_weight(weight) -> float | str | None:
    """A weight of a row as a number, or `GATE`; None if it is neither.

    A number may be a string: a Parquet file has one type for a gate and the weights beside it.
    """
    if weight == GATE:
        return GATE
    try:
        number = float(weight)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def combine(verdicts: list[Verdict], weights: list[float | str]) -> Verdict:
    """The weighted sum, the most serious reason, every answer.

    If a gate gives less than 1 the reward is 0, whatever the others say, and even if they could not judge.
    """
    pairs = list(zip(weights, verdicts, strict=True))
    answer = " | ".join(verdict.answer for verdict in verdicts)
    closed = [verdict.reason for weight, verdict in pairs if weight == GATE and verdict.reward < 1]
    if closed:
        return Verdict(0.0, max(closed, key=REASONS.index), answer)
    rewards = [verdict.reward * (0.0 if weight == GATE else weight) for weight, verdict in pairs]
    reason = max((verdict.reason for verdict in verdicts), key=REASONS.index)
    return Verdict(sum(rewards), reason, answer)


def fail(message: str):
    """Raises RunError, which a script prints as one line."""
    from common import RunError  # not at the top: workers import this file, and common.py imports transformers

    raise RunError(message)
