"""321 triples of verifier, completion and ground truth, made from public complaints about verifiers, with the right verdict.

They are read from the folder `shared` beside the project, where each names the report that it comes from.
"""

import json
from collections import Counter

import pytest
from conftest import shared

from rewards import Pool

DISPUTED = {}  # (verifier, completion, ground truth as JSON): why another verdict is right. At most five.


@pytest.fixture(scope="module")
def cases():
    return [json.loads(line) for line in open(shared("data/verdicts/cases.jsonl"), encoding="utf-8")]


def test_the_verdict_on_every_triple(cases):
    with Pool(workers=2, max_failed=1.0) as pool:
        verdicts = pool.score([(case["verifier"], case["completion"], case["ground_truth"]) for case in cases])
    wrong = []
    for case, verdict in zip(cases, verdicts, strict=True):
        key = case["verifier"], case["completion"], json.dumps(case["ground_truth"])
        if (verdict.reward == 1) != case["right"] and key not in DISPUTED:
            wrong.append((case["kind"], case["verifier"], case["completion"][-80:], case["ground_truth"], verdict))
    assert not wrong, f"{len(wrong)} of {len(cases)}: " + "\n".join(map(str, wrong))
    assert len(DISPUTED) <= 5


def test_the_triples_are_of_both_kinds(cases):
    """A verifier that always says yes, or no, would get some of each verifier's wrong."""
    counts = Counter((case["verifier"], case["right"]) for case in cases)
    assert all(counts[name, right] >= 2 for name, _ in counts for right in (True, False))
