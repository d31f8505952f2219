"""Jobs: what is asked of verifiers, and what becomes of the verdicts of one that asks several.

A job is (verifier, completion, ground_truth), the first and the last as in the columns `dataset` and `ground_truth` of
the published RLVR data; both may be lists, with a list of weights as a fourth entry, and the reward is then the
weighted sum. A fifth entry is the context, {"prompt": messages, "row": other columns}, where a verifier wants it.
"""

import math
from collections import Counter

from rewards.verifiers import REASONS, VERIFIERS, Verdict, registered_name


def failure_rates(verdicts: list[Verdict]) -> dict[str, float]:
    """The shares of completions that were not judged, as metrics."""
    counts = Counter(verdict.reason for verdict in verdicts)
    total = max(len(verdicts), 1)
    return {f"{reason}_rate": counts[reason] / total for reason in ("unparsed", "timeout", "crash")}


def split_job(verifiers, completion, ground_truths, weights=None, context=None) -> tuple[list[tuple], list[float]]:
    """The parts of a job, and their weights: [(verifier, completion, ground truth, what it wants besides), ...].

    Raises RunError if it is not a job, or if its context lacks what a verifier wants.
    """
    if isinstance(verifiers, str):
        verifiers = [verifiers]
        ground_truths = [ground_truths]
        if weights is not None:
            weights = [weights]
    if weights is None:
        weights = [1.0] * len(verifiers)
    if not isinstance(ground_truths, list) or not len(verifiers) == len(ground_truths) == len(weights):
        fail(f"{len(verifiers)} verifiers need lists of as many ground truths and weights")
    if not all(isinstance(weight, (int, float)) and math.isfinite(weight) for weight in weights):
        fail(f"weights are {weights}, expected finite numbers")
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


def combine(verdicts: list[Verdict], weights: list[float]) -> Verdict:
    """The weighted sum; the most serious reason; every answer."""
    reward = sum(weight * verdict.reward for weight, verdict in zip(weights, verdicts, strict=True))
    reason = max((verdict.reason for verdict in verdicts), key=REASONS.index)
    answer = " | ".join(verdict.answer for verdict in verdicts)
    return Verdict(reward, reason, answer)


def fail(message: str):
    """Raises RunError, which a script prints as one line."""
    from common import RunError  # not at the top: workers import this file, and common.py imports transformers

    raise RunError(message)
