"""The environment of reinforcement learning with verifiable rewards: it turns completions into rewards.

    from rewards import score

    score([("gsm8k", "... so she pays $18.", "18")])    # [Verdict(reward=1.0, reason='right', answer='18')]

    verifiers.py    what a verifier is; mathematics.py, programs.py, ifeval.py and strings.py have those there are
    jobs.py         what is asked: one verifier or several, with weights
    pool.py         who judges: processes that can be killed, because completions are hostile
    judges.py       rewards that ask a model
    audit.py        which rows have tests that test nothing
    sandbox.py      where programs that a model wrote run; remote.py and harness.py: what their tests see of them

    python -m rewards train.jsonl samples.jsonl     # checks ground truths; scores rows that have a `completion`

The processes that judge import this package, so nothing here may load torch or transformers.
"""

from rewards import audit, ifeval, ifevalg, mathematics, programs, strings  # noqa: F401 (they register verifiers)
from rewards.jobs import failure_rates
from rewards.pool import Pool, score
from rewards.verifiers import REASONS, VERIFIERS, Verdict, Verifier, judge, verifier

__all__ = [
    "REASONS",
    "VERIFIERS",
    "Pool",
    "Verdict",
    "Verifier",
    "failure_rates",
    "judge",
    "score",
    "verifier",
]
