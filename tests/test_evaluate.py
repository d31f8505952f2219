"""evaluate: the statistics are what they say, files of samples give the published numbers, and a kill changes nothing."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rl
from conftest import ROOT, assistant, shared, user, write_jsonl
from launch import run
from test_generate import TRUTH
from together import together

from common import DataError, RunError
from pipeline import estimates, evaluate, generate
from pipeline.evaluate import Args, settings
from pipeline.generator import Generator
from pipeline.scores import boxed, boxed_or_marked
from pipeline.shapes.benchmarks import Benchmark, read_shots
from rewards.jobs import combine, split_job
from rewards.verifiers import judge


class Here:
    """A Pool that judges in this process, at once: starting one takes a second."""

    def __init__(self, *_):
        self.collect = list

    def submit(self, job):
        parts, weights = split_job(*job)
        return combine([judge(*part) for part in parts], weights)

    def score(self, jobs):
        return list(map(self.submit, jobs))

    def check(self, _):
        return {}

    def work(self):
        pass



@pytest.fixture(autouse=True)
def here(monkeypatch, request):
    """No test waits for processes that judge, but those with the fixture `processes`."""
    if "processes" not in request.fixturenames:
        monkeypatch.setattr("pipeline.generator.judges", Here)
        monkeypatch.setattr("pipeline.scores.judges", Here)


@pytest.fixture
def processes():
    """Verifiers run in processes of their own, as they do outside of tests."""


# ------------------------------------------------------------------------------------------------------- statistics


def test_pass_at_k_is_the_share_of_subsets_with_a_pass():
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert estimates.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)
    for n, c, k in ((4, 2, 5), (4, 5, 1), (4, 2, 0)):
        with pytest.raises(ValueError, match=f"pass@{k} of {n}"):
            estimates.pass_at_k(n, c, k)


def bootstrap(scores, clusters, times=2000):
    """The standard deviation of the mean, over clusters drawn with replacement."""
    members = [np.flatnonzero(np.array(clusters) == name) for name in dict.fromkeys(clusters)]
    sums = np.array([scores[each].sum() for each in members])
    sizes = np.array([len(each) for each in members])
    drawn = np.random.default_rng(2).integers(len(members), size=(times, len(members)))
    return (sums[drawn].sum(1) / sizes[drawn].sum(1)).std()


def scores_in_clusters(seed, count=300, size=4):
    """(scores of 8 completions each, cluster labels); prompts of a cluster are about equally hard."""
    rng = np.random.default_rng(seed)
    clusters = rng.integers(count // size, size=count)
    hardness = rng.normal(size=count // size)[clusters] + 0.5 * rng.normal(size=count)
    return rng.binomial(8, 1 / (1 + np.exp(-hardness))) / 8, clusters.tolist()


def test_standard_errors_are_those_of_bootstraps():
    scores, clusters = scores_in_clusters(1)
    alone, together_ = estimates.standard_error(scores), estimates.standard_error(scores, clusters)
    assert together_ > 1.4 * alone
    assert alone == pytest.approx(bootstrap(scores, range(len(scores))), rel=0.05)
    assert together_ == pytest.approx(bootstrap(scores, clusters), rel=0.07)


def test_clusters_of_one_are_no_clusters():
    scores, _ = scores_in_clusters(2)
    usual = scores.std(ddof=1) / math.sqrt(len(scores))
    assert estimates.standard_error(scores) == pytest.approx(usual, rel=1e-12)
    assert estimates.standard_error(scores, list(map(str, range(len(scores))))) == pytest.approx(usual, rel=1e-12)
    assert estimates.standard_error(scores[:1]) is None
    assert estimates.standard_error(scores[:5], list("aaaaa")) is None
    assert estimates.estimate(scores[:1]) == {"mean": scores[0], "se": None, "low": None, "high": None}


def test_wilson_solves_its_equation():
    for right, total in ((0, 5), (1, 7), (3, 3), (286, 1319)):
        share = right / total
        for bound, sign in zip(estimates.wilson(right, total), (-1, 1), strict=True):
            assert bound == pytest.approx(share + sign * 1.959964 * math.sqrt(bound * (1 - bound) / total), abs=1e-8)
    assert estimates.share([0, 1, 1])["low"] == estimates.wilson(2, 3)[0]
    mean = estimates.share([0, 0.5, 1, 1])
    assert mean["high"] == 1.0 and mean["low"] == pytest.approx(0.625 - 1.959964 * mean["se"])
    in_clusters = estimates.share([0, 1, 1, 1], list("aabb"))  # not Wilson's
    assert in_clusters["low"] == pytest.approx(0.75 - 1.959964 * in_clusters["se"]) and in_clusters["se"] == 0.25


def test_macro_gives_each_subset_the_same_weight():
    scores, names = [1, 1, 0, 1, 0.5, 0], list("aaaabb")
    macro = estimates.macro(scores, names)
    assert (macro["mean"], macro["subsets"]["a"]["mean"], macro["subsets"]["b"]["prompts"]) == (0.5, 0.75, 2)
    errors = [estimates.standard_error(scores[:4]), estimates.standard_error(scores[4:])]
    assert macro["se"] == pytest.approx(math.hypot(*errors) / 2)


def test_macro_has_the_errors_of_bootstraps():
    """Also in clusters, within subsets or across them."""
    scores, clusters = scores_in_clusters(8)
    for names in (np.where(np.arange(300) < 90, "a", "b"), np.where(np.array(clusters) < 30, "a", "b")):
        for labels in (None, clusters):
            members = [np.flatnonzero(np.array(labels or range(300)) == name) for name in dict.fromkeys(labels or range(300))]
            rng, means = np.random.default_rng(9), []
            for _ in range(2000):
                drawn = np.concatenate([members[k] for k in rng.integers(len(members), size=len(members))])
                means.append(np.mean([scores[drawn][names[drawn] == name].mean() for name in "ab"]))
            assert estimates.macro(scores, names.tolist(), labels)["se"] == pytest.approx(np.std(means), rel=0.08)


def test_macro_with_subsets_of_one():
    scores = [0.4, 0.9, 0.6, 0.1]
    alone = estimates.macro(scores, list("abcd"))  # each prompt is a subset
    assert alone["se"] == pytest.approx(estimates.standard_error(scores) * math.sqrt(4 / 3)) and alone["subsets"]["a"]["low"] is None
    rng, squares, means = np.random.default_rng(10), [], []
    for _ in range(3000):  # a mean of three subsets, two of them with one prompt
        scores = np.clip(rng.normal(0.5, 0.1, size=12), 0, 1)
        macro = estimates.macro(scores, list("aaaaaaaaaabc"))
        squares.append(macro["se"] ** 2)
        means.append(macro["mean"])
    assert 1 < np.mean(squares) / np.var(means) < 1.4  # too much rather than too little
    assert estimates.macro([1, 0], list("aa"), list("xx"))["se"] is None
    assert estimates.macro([1, 0], list("ab"), list("xx"))["se"] is None


def test_intervals_of_shares_stay_between_0_and_1():
    macro = estimates.macro([1, 1, 0, 1, 1, 1], list("aaabbb"))
    assert macro["mean"] + 1.96 * macro["se"] > 1 == macro["high"] and macro["low"] > 0
    macro = estimates.macro([0, 0, 1, 0, 0, 0], list("aaabbb"))
    assert macro["low"] == 0 < macro["high"] < 1


def test_equal_scores_are_no_certainty():
    for result in (
        estimates.share([1, 1, 1, 1], list("aabb")), estimates.share([0.5, 0.5]), estimates.macro([0.1] * 6, list("aaabbb")),
        estimates.bounded(estimates.estimate([0.1, 0.1, 0.1])),
    ):  # fmt: skip
        assert (result["se"], result["low"], result["high"]) == (0, None, None)
    assert estimates.share([1, 1, 1])["low"] == estimates.wilson(3, 3)[0]


def test_variance_of_sampling_is_that_of_repeats():
    rng = np.random.default_rng(3)
    p = rng.uniform(size=150)
    repeats = rng.binomial(1, p[:, None], size=(3000, 150, 4))
    found = [estimates.variance_of_sampling(list(passes)) for passes in repeats[:50]]
    within = np.mean([each["within_prompt_variance"] for each in found])
    assert within == pytest.approx((p * (1 - p)).mean(), rel=0.02)
    deviation = np.mean([each["deviation_of_sampling"] for each in found])
    assert deviation == pytest.approx(repeats.mean((1, 2)).std(), rel=0.05)
    assert estimates.variance_of_sampling([[True], [False]]) == {}
    assert estimates.spread([0.2, 0.4]) == {"mean": pytest.approx(0.3), "low": 0.2, "high": 0.4,
                                             "deviation": pytest.approx(math.sqrt(0.02))}  # fmt: skip


def test_a_model_is_not_better_than_itself():
    scores, clusters = scores_in_clusters(4)
    same = estimates.compare(scores, scores, clusters)
    assert (same["mean"], same["se"], same["p"], same["detectable"]) == (0, 0, 1, 0)
    assert same["correlation"] == pytest.approx(1) and not estimates.is_difference(same)


def test_differences_that_are_all_the_same_do_not_say_how_sure_they_are():
    for a, b in (([1, 1, 1], [0, 0, 0]), ([1, 0.6], [0.9, 0.5]), ([1, 0.5], [0.5, 0])):
        result = estimates.compare(a, b)
        assert result["mean"] > 0 == result["se"] and not estimates.is_difference(result)
        assert {result[key] for key in ("low", "high", "p", "detectable")} == {None}
    cancelling = estimates.compare([1, 0, 1, 0], [0, 1, 0, 1], list("aabb"))  # within each cluster
    assert (cancelling["mean"], cancelling["se"], cancelling["p"]) == (0, 0, None)
    assert estimates.compare([1], [1])["p"] is None


def test_a_comparison_is_paired():
    rng = np.random.default_rng(5)
    hardness = rng.uniform(size=400)
    a, b = (np.clip(hardness + 0.1 * rng.normal(size=400) + shift, 0, 1) for shift in (0.03, 0))
    result = estimates.compare(a, b)
    assert result["se"] == pytest.approx((a - b).std(ddof=1) / 20)
    unpaired = math.hypot(estimates.standard_error(a), estimates.standard_error(b))
    assert result["se"] < unpaired / 2 and estimates.is_difference(result) and result["p"] < 0.01
    assert result["low"] == pytest.approx(result["mean"] - 1.959964 * result["se"])
    assert result["correlation"] == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_p_is_uniform_without_and_power_is_80_percent_with_the_detectable_difference():
    rng = np.random.default_rng(6)
    p, found = [], []
    for _ in range(1000):
        a, b = rng.normal(size=(2, 100))
        p.append(estimates.compare(a, b)["p"])
        found.append(estimates.compare(a + 2.8 * math.sqrt(2 / 100), b)["p"] < 0.05)
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.02)
    assert np.mean(np.array(p) < 0.5) == pytest.approx(0.5, abs=0.04)
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)
    assert estimates.compare(a, b)["detectable"] == pytest.approx(2.8 * (a - b).std(ddof=1) / 10)


# -------------------------------------------------------------------------------------------------- files of samples


def sampled(question, *rewards, reasons=None, texts=None, model="m", seed=1, **columns):
    """A row as generate writes it; a completion has ended unless its reward is None."""
    n = len(rewards)
    return {
        "messages": [user(question)], "dataset": "gsm8k", "ground_truth": "5", **columns,
        "completions": texts or ["5"] * n, "rewards": list(rewards),
        "reasons": reasons or ["timeout" if reward is None else "right" if reward == 1 else "wrong" for reward in rewards],
        "answers": [str(reward) for reward in rewards], "ended": [reward is not None for reward in rewards],
        "tokens": [4] * n, "token_ids": [[1] * 4] * n, "logprobs": [-2.0] * n,
        "model": model, "temperature": 1.0, "top_p": 1.0, "seed": seed,
    }  # fmt: skip


def results(tmp_path, *files, **flags):
    """What results.json has of files of rows, each {name: rows}."""
    specs = [f"{name}={write_jsonl(tmp_path / f'{i}.jsonl', rows)}" for i, (name, rows) in enumerate(files)]
    out = tmp_path / f"out_{len(list(tmp_path.iterdir()))}"
    evaluate.main(Args(results=specs, out=str(out), verifier_workers=1, **flags))
    return json.loads((out / "results.json").read_text())


PUBLISHED = {"6b_finetuning": 286, "6b_verification": 515, "175b_finetuning": 458, "175b_verification": 742}  # of 1,319


def test_published_verdicts_on_gsm8k_give_the_published_accuracies(tmp_path, capsys):
    published = [json.loads(line) for line in shared("data/gsm8k/model_solutions.jsonl").open()]
    for model, right in PUBLISHED.items():
        rows = []
        for row in published:
            verdict = judge("gsm8k", row[model]["solution"], row["ground_truth"])
            rows.append(sampled(row["question"], verdict.reward, texts=[row[model]["solution"]], model=model))
        assert sum(row[model]["is_correct"] for row in published) == right
        write_jsonl(tmp_path / f"gsm8k.{model}.jsonl", rows)
    specs = {model: f"gsm8k={tmp_path}/gsm8k.{model}.jsonl" for model in PUBLISHED}
    evaluate.main(Args(results=list(specs.values()), out=str(tmp_path / "out")))
    found = json.loads((tmp_path / "out/results.json").read_text())
    for result in found["results"]:
        right = PUBLISHED[result["model"]]
        assert (result["prompts"], result["pass@1"]["mean"]) == (1319, pytest.approx(right / 1319))
        assert (result["pass@1"]["low"], result["pass@1"]["high"]) == estimates.wilson(right, 1319)
        assert result["strict"]["mean"] == 0  # they end in "A: 18"
    assert found["over_models"]["gsm8k"]["low"] == 286 / 1319 and found["over_models"]["gsm8k"]["models"] == 4
    capsys.readouterr()
    evaluate.main(Args(compare=(specs["6b_verification"], specs["175b_finetuning"])))
    assert "| gsm8k | passes | 1319 | 0 | 0.390 | 0.347 | 0.043 [0.015, 0.071] * | 0.00262 |" in capsys.readouterr().out


def test_what_is_not_judged_is_in_no_mean_and_counted(tmp_path):
    rows = [sampled("a", 1.0, None, 0.0), sampled("b", 1.0, 1.0, 1.0), sampled("c", None, None, None)]
    rows[1]["answers"][0] = ""  # which is no answer
    [result] = results(tmp_path, ("x", rows), k=[2, 3])["results"]
    assert (result["prompts"], result["prompts_not_judged"], result["completions"], result["not_judged"]) == (2, 1, 9, 4)
    assert result["pass@1"]["mean"] == result["reward"]["mean"] == 0.75
    assert (result["pass@2"]["mean"], result["pass@2"]["prompts"]) == (1.0, 2)
    assert (result["pass@3"]["mean"], result["pass@3"]["prompts"]) == (1.0, 1)  # a has two that are judged
    assert (result["timeout"], result["ended"], result["unparsed"]) == (4 / 9, 5 / 9, 0)
    assert (result["tokens"], result["logprob_per_token"], result["distinct_answers"]) == (4, -0.5, 1.5)
    with pytest.raises(RunError, match=r"y: none of 2 completions was judged \(2 timeout\)"):
        results(tmp_path, ("y", [sampled("a", None, None)]))
    for k in (0, -1):
        with pytest.raises(RunError, match=f"--k 1 {k}: give numbers from 1 on"):
            results(tmp_path, ("x", rows), k=[1, k])
    with pytest.raises(RunError, match="--k 4, but there are prompts with 3 completions"):
        results(tmp_path, ("x", rows), k=[4])


def test_a_second_reading(tmp_path):
    texts = [r"so \boxed{5}", "#### 5", "The answer is 5.", r"\boxed{5} or rather \boxed{6}", "#### 5\nthat is, 6", "<think>5"]
    rewards = [judge("gsm8k", text, "5") for text in texts]
    row = sampled("q", *[verdict.reward for verdict in rewards], texts=texts, reasons=[verdict.reason for verdict in rewards])
    assert row["rewards"] == [1, 1, 1, 0, 1, 0] and row["reasons"][-1] == "unparsed"
    row["completions"][-1] = r"\boxed{5}"  # within a thought that the prompt has begun and that does not end
    [result] = results(tmp_path, ("x", [row]))["results"]
    assert (result["pass@1"]["mean"], result["strict"]["mean"]) == (4 / 6, 3 / 6)
    assert "loose" not in result
    row = sampled("q", 1.0, 0.0, dataset="math", texts=["The answer is $5$.", r"not $4$, $\boxed{5}$"])
    assert results(tmp_path, ("x", [row]))["results"][0]["strict"]["mean"] == 0.5
    row = sampled("q", 1.0, 1.0, 1.0, dataset="math", texts=["#### $5$", r"so \boxed{5}", "\\boxed{5}\n#### 6"])  # the box alone
    assert results(tmp_path, ("x", [row]))["results"][0]["strict"]["mean"] == 2 / 3
    truth = json.dumps({"instruction_id_list": ["startend:quotation"], "kwargs": [{}]})
    row = sampled("q", 0.0, 0.0, dataset="ifeval", ground_truth=truth, texts=['Sure:\n"Yes."', "No."])
    [result] = results(tmp_path, ("x", [row]))["results"]
    assert (result["pass@1"]["mean"], result["loose"]["mean"]) == (0, 0.5) and "strict" not in result
    row = sampled("q", None, 1.0, texts=["#### 5", "#### 5"])
    assert results(tmp_path, ("x", [row]))["results"][0]["strict"]["mean"] == 1
    row = sampled("q", 1.5, dataset=["gsm8k", "gsm8k"], ground_truth=["5", "5"], weights=[1.0, 0.5])
    assert "strict" not in results(tmp_path, ("x", [row]))["results"][0]


def test_boxed_or_marked():
    assert boxed_or_marked("<think>\\boxed{1}</think> #### 2\n####3 \nso 4") == "####3 "
    assert boxed_or_marked(r"#### 2 but \boxed{\frac{1}{2}}") == r"\boxed{\frac{1}{2}}"
    assert boxed_or_marked("It is 2 #### 3") == boxed("#### 3") == boxed("<think>\\boxed{1}</think> 3") == ""


def test_a_pass_is_a_share_of_the_highest_reward(tmp_path):
    weighted = {"dataset": ["gsm8k", "format", "exact"], "ground_truth": ["5", "", "5"], "weights": [2.0, "gate", 0.5]}
    rows = [sampled("a", 2.5, 2.0, **weighted), sampled("b", 0.1 + 0.2, 0.3, dataset="exact", ground_truth="x")]
    [result] = results(tmp_path, ("x", rows))["results"]
    assert (result["pass@1"]["mean"], result["reward"]["mean"]) == (0.25, pytest.approx((2.25 + 0.3) / 2))
    third = {"dataset": ["gsm8k", "exact"], "ground_truth": ["5", "5"], "weights": [0.1, 0.2]}
    assert sum(third["weights"]) > 0.3  # by rounding
    assert results(tmp_path, ("x", [sampled("a", 0.3, **third)]))["results"][0]["pass@1"]["mean"] == 1
    assert results(tmp_path, ("x", rows), pass_threshold=0.8)["results"][0]["pass@1"]["mean"] == 0.5
    assert results(tmp_path, ("x", rows), pass_threshold=0.3)["results"][0]["pass@1"]["mean"] == 1
    scores = sampled("a", -3.5, 1.5, reasons=["score", "score"])  # of a reward model
    [result] = results(tmp_path, ("x", [scores]))["results"]
    assert result["reward"]["mean"] == -1 and "pass@1" not in result and "strict" not in result


def test_seeds_are_repeats_and_models_are_not(tmp_path, capsys):
    first = [sampled("a", 1.0, 0.0), sampled("b", 0.0, 0.0)]
    second = [sampled("a", 1.0, 1.0, seed=2), sampled("b", 0.0, 1.0, seed=2)]
    second[0]["messages"].append(assistant("5"))  # no part of the prompt
    tools = sampled("a", 1.0, 1.0, tools=[{"name": "f"}])
    assert results(tmp_path, ("x", [*first, tools]))["results"][0]["prompts"] == 3
    other = [sampled("a", 0.0, 0.0, model="n"), sampled("b", 0.0, 0.0, model="n")]
    found = results(tmp_path, ("x", first), ("x", second), ("x", other), k=[2])
    seeds, alone = found["results"]
    assert (seeds["prompts"], seeds["completions"], seeds["pass@1"]["mean"], seeds["pass@2"]["mean"]) == (2, 8, 0.5, 0.75)
    assert seeds["pass@1"]["se"] == estimates.standard_error([0.75, 0.25])
    assert seeds["runs"] == {"mean": 0.5, "low": 0.25, "high": 0.75, "deviation": pytest.approx(0.5 / math.sqrt(2)), "seeds": [1, 2]}
    assert seeds["within_prompt_variance"] == 0.25 and "pass@2" in alone and "runs" not in alone
    spread = found["over_models"]["x"]
    assert (spread["mean"], spread["low"], spread["high"], spread["models"]) == (0.25, 0, 0.5, 2)
    out = capsys.readouterr().out
    assert "x: mean 0.500, from 0.250 to 0.750, deviation 0.3536 over 2 seeds" in out and "over 2 models" in out
    with pytest.raises(RunError, match=r"1.jsonl, row 1: .*the seed, the model and the prompt are those of .*0.jsonl, row 1"):
        results(tmp_path, ("x", first), ("x", first))
    third = [{**row, "seed": 3} for row in second]
    with pytest.raises(RunError, match=r"2.jsonl, row 1: .*the seed, the model and the prompt are those of .*1.jsonl, row 1"):
        results(tmp_path, ("x", first), ("x", second), ("x", second), ("x", third))
    warmer = [{**row, "temperature": 0.5} for row in second]
    with pytest.raises(RunError, match="row 1: .*not the temperature and top_p"):
        results(tmp_path, ("x", first), ("x", warmer))


def test_no_file_counts_twice(tmp_path):
    file = write_jsonl(tmp_path / "x.jsonl", [sampled("a", 1.0, 0.0)])
    (tmp_path / "link.jsonl").symlink_to(file)
    (tmp_path / "folder").mkdir()
    for other in (f"x={file}", f"{tmp_path}/folder/../x.jsonl", f"x={tmp_path}/link.jsonl", str(tmp_path)):
        with pytest.raises(RunError, match=r"\.jsonl is there twice for x: its completions would count twice"):
            evaluate.main(Args(results=[f"x={file}", other]))
    (tmp_path / "folder/x.seed_1.jsonl").symlink_to(file)
    (tmp_path / "folder/x.seed_2.jsonl").symlink_to(file)
    with pytest.raises(RunError, match="twice"):
        evaluate.main(Args(compare=(f"x={file}", str(tmp_path / "folder"))))
    evaluate.main(Args(compare=(f"x={file}", f"x={file}")))  # of itself


def test_clusters_and_subsets(tmp_path):
    rows = []
    for i, right in enumerate((True, True, False, False, True, False)):
        texts = ["#### 5" if right else "#### 6"] * 2
        rows.append(sampled(f"q{i}", *[float(right)] * 2, texts=texts, text=i // 2, level="easy" if i < 2 else "hard"))
    [result] = results(tmp_path, ("x", rows), cluster="text", subset="level", k=[2])["results"]
    se = estimates.standard_error([1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 2, 2])
    assert se != pytest.approx(estimates.standard_error([1, 1, 0, 0, 1, 0]))
    for key in ("pass@1", "pass@2", "strict", "reward"):
        assert (result[key]["mean"], result[key]["se"]) == (0.5, pytest.approx(se))
    assert result["pass@1"]["low"] == pytest.approx(max(0, 0.5 - 1.959964 * se))  # not Wilson's
    assert result["macro"]["mean"] == (1 + 1 / 4) / 2 and result["macro"]["subsets"]["hard"]["prompts"] == 4
    expected = estimates.macro([1, 1, 0, 0, 1, 0], ["easy"] * 2 + ["hard"] * 4, [0, 0, 1, 1, 2, 2])
    assert result["macro"]["se"] == pytest.approx(expected["se"]) and expected["se"] > 0
    assert "macro" not in results(tmp_path, ("x", rows))["results"][0]
    with pytest.raises(RunError, match="--subset levl: no data set has this column in all rows"):
        results(tmp_path, ("x", rows), subset="levl")
    others = [sampled("r", 1.0), sampled("s", 0.0)]
    found = results(tmp_path, ("x", rows), ("y", others), subset="level")["results"]
    assert ["macro" in result for result in found] == [True, False]
    del rows[3]["text"]
    with pytest.raises(RunError, match="0.jsonl, row 4: no 'text', which --cluster asks for"):
        results(tmp_path, ("x", rows), cluster="text")


def compared(tmp_path, a, b, **flags):
    """What --compare finds in two files, or lists of files, of rows."""
    sides = []
    for side, files in (("a", a), ("b", b)):
        (tmp_path / side).mkdir(exist_ok=True)
        for name, rows in files.items():
            write_jsonl(tmp_path / side / f"{name}.jsonl", rows)
        sides.append(str(tmp_path / side))
    evaluate.main(Args(compare=tuple(sides), out=str(tmp_path / "out"), **flags))
    return json.loads((tmp_path / "out/results.json").read_text())["differences"]


def test_compare(tmp_path, capsys):
    rng = np.random.default_rng(7)
    a = [sampled(f"q{i}", float(rng.random() < 0.8), group=i % 25) for i in range(100)]
    b = [sampled(f"q{i}", *map(float, rng.random(4) < 0.5), model="n") for i in range(100)]
    b[7] = sampled("q7", None, model="n")
    [result] = compared(tmp_path, {"x": a}, {"x": b[::-1]}, cluster="group")
    means = np.array([[row["rewards"][0], np.mean(other["rewards"])] for row, other in zip(a, b, strict=True) if row is not a[7]])
    groups = [i % 25 for i in range(100) if i != 7]
    expected = estimates.compare(*means.T, groups)
    assert expected["se"] == estimates.standard_error(means[:, 0] - means[:, 1], groups)
    assert expected["se"] != pytest.approx(estimates.standard_error(means[:, 0] - means[:, 1]))
    assert {key: result[key] for key in expected} == pytest.approx(expected)
    assert (result["prompts"], result["left_out"], result["a"]["model"], result["b"]["model"]) == (99, 1, "m", "n")
    assert "] * |" in capsys.readouterr().out


def test_a_difference_that_may_be_none_has_no_star(tmp_path, capsys):
    a = [sampled(f"q{i}", float(i % 2)) for i in range(40)]
    b = [sampled(f"q{i}", float(i % 2 or i == 0)) for i in range(40)]
    [result] = compared(tmp_path, {"x": a}, {"x": [{**row, "temperature": 0.5} for row in b]})
    assert result["low"] < 0 < result["high"] and result["mean"] == -1 / 40
    out = capsys.readouterr().out
    assert "*" not in out and "WARNING x: sampled with temperature 1 and 0.5" in out


def test_a_difference_without_an_error_has_no_star(tmp_path, capsys):
    a, b = ([sampled(question, reward) for question in "qrs"] for reward in (1.0, 0.0))
    [result] = compared(tmp_path, {"x": a}, {"x": b})
    assert (result["mean"], result["p"], result["detectable"]) == (1, None, None)
    assert "| x | passes | 3 | 0 | 1.000 | 0.000 | 1.000 | - | - | - |" in capsys.readouterr().out
    with pytest.raises(RunError, match="a/x.jsonl, row 1: no 'text', which --cluster asks for"):
        evaluate.main(Args(compare=(str(tmp_path / "a"), str(tmp_path / "b")), cluster="text"))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({"x": [sampled("q", 1.0)]}, {"x": [sampled("q", 1.0), sampled("r", 1.0)]}, "x: the other .* prompt and .* of .*b/x.jsonl, row 2"),
        ({"x": [sampled("q", 1.0), sampled("r", 1.0)]}, {"x": [sampled("q", 1.0)]}, "x: the other .* prompt and .* of .*a/x.jsonl, row 2"),
        ({"x": [sampled("q", 1.0)]}, {"x": [sampled("q", 1.0, ground_truth="6")]}, "the prompt and ground truth of .*a/x.jsonl, row 1"),
        ({"x": [sampled("q", 1.0)]}, {"x": [sampled("q", 1.0)], "y": [sampled("q", 1.0)]}, "one side has x, the other x, y: NAMEs have to be the same"),
        ({"x": [sampled("q", 1.0), sampled("r", 1.0, model="n")]}, {"x": [sampled("q", 1.0)]}, "a side has several models"),
        ({"x": [sampled("q", 1.0)]}, {"x": [sampled("q", None)]}, "x: no prompt is judged on both sides"),
    ],
)  # fmt: skip
def test_what_is_not_compared(tmp_path, a, b, message):
    with pytest.raises(RunError, match=message):
        compared(tmp_path, a, b)
    assert not (tmp_path / "out").exists()


def test_rows_that_are_none_of_generate(tmp_path):
    good = sampled("q", 1.0)
    for bad, message in (
        ({"messages": [user("q")]}, "row 2: .*: no field 'completions'"),
        ([good], "row 2: .*: expected an object, found a list"),
        (good | {"rewards": [1.0, 0.0]}, "row 2: .*: as many of each expected: 1 completions, 2 rewards, 1 reasons"),
        (good | {"completions": "5"}, "row 2: .*: completions: expected a list, found '5'"),
        (good | {"completions": [5]}, "row 2: .*: completions: expected a text, found 5"),
        (good | {"rewards": ["1"]}, "row 2: .*: rewards: expected a number or null, found '1'"),
        (good | {"rewards": [float("nan")]}, "row 2: .*: rewards: expected a number or null, found nan"),
        (good | {"reasons": [None]}, "row 2: .*: reasons: expected a text, found None"),
        (good | {"answers": [["5"]]}, r"row 2: .*: answers: expected a text, found \['5'\]"),
        (good | {"ended": ["yes"]}, "row 2: .*: ended: expected true or false, found 'yes'"),
        (good | {"tokens": [0]}, "row 2: .*: tokens: expected a whole number from 1 on, found 0"),
        (good | {"tokens": ["4"]}, "row 2: .*: tokens: expected a whole number from 1 on, found '4'"),
        (good | {"logprobs": ["-1"]}, "row 2: .*: logprobs: expected a number or several, found '-1'"),
        (good | {"logprobs": [["-1"]]}, r"row 2: .*: logprobs: expected a number or several, found \['-1'\]"),
        (good | {"model": ["m"]}, r"row 2: .*: model: expected a text or null, found \['m'\]"),
        (good | {"temperature": None}, "row 2: .*: temperature: expected a number, found None"),
        (good | {"seed": "1"}, "row 2: .*: seed: expected a number, found '1'"),
        (good | {"dataset": "mine"}, "row 2: .*no verifier is named 'mine'"),
        (good | {"messages": "q"}, "row 2: .*messages"),
        ("{", "row 2: .*property name"),
    ):
        with pytest.raises(RunError, match=message):
            results(tmp_path, ("x", [good, bad]))
    rows = [good | {"logprobs": [[-1.0, float("-inf")]], "model": None}]  # of tokens each; of --score_only
    assert results(tmp_path, ("x", rows))["results"][0]["model"] == "unknown"
    rejected = sampled("q", None, 1.5, reasons=["rejected", "rejected"])  # by a reward model's template
    assert "pass@1" not in results(tmp_path, ("x", [rejected]))["results"][0]
    with pytest.raises(RunError, match="no rows in"):
        results(tmp_path, ("x", []))
    with pytest.raises(RunError, match="Is a directory"):
        evaluate.main(Args(results=[f"x={tmp_path}"]))
    with pytest.raises(RunError, match="missing.jsonl: No such file"):
        evaluate.main(Args(results=[str(tmp_path / "missing.jsonl")]))


# ----------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(folder with a random model and rows for two data sets, flags)."""
    folder = tmp_path_factory.mktemp("evaluate")
    rl.small_run(folder)
    for name, count in (("even", 12), ("odd", 7)):
        rows = [{"messages": [user(f"{name} {i}?")], "dataset": "ifeval", "ground_truth": TRUTH, "subset": str(i % 2)} for i in range(count)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder, {"model": str(folder / "model"), "data": [f"{name}={folder}/{name}.jsonl" for name in ("even", "odd")],
                    "n": 2, "temperature": 1.0, "max_length": 128, "max_new_tokens": 10, "slots": 8, "verifier_workers": 1}  # fmt: skip


def files(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_model_is_asked_judged_and_measured(start, tmp_path, capsys, processes):
    _, flags = start
    evaluate.main(Args(out=str(tmp_path / "out"), k=[2], **flags))
    found = files(tmp_path / "out")
    assert set(found) == {"even.jsonl", "odd.jsonl", "results.json"} and os.listdir(tmp_path) == ["out"]
    for result in json.loads(found["results.json"])["results"]:
        rewards = np.array([row["rewards"] for row in rows_of(tmp_path / "out" / f"{result['data']}.jsonl")])
        assert result["reward"]["mean"] == pytest.approx(rewards.mean()) and 0 < rewards.mean() < 1
        assert result["pass@1"]["mean"] == pytest.approx((rewards == 1).mean())
        assert result["pass@2"]["mean"] == pytest.approx((rewards == 1).any(1).mean())
        assert result["macro"]["mean"] == pytest.approx(((rewards[::2] == 1).mean() + (rewards[1::2] == 1).mean()) / 2)
    table = capsys.readouterr().out
    assert "| even | 12 | 2 | " in table and "pass@2" in table and "loose" in table


def test_the_files_are_those_of_generate(start, tmp_path):
    folder, flags = start
    evaluate.main(Args(out=str(tmp_path / "out"), k=[2], **flags))
    sampling = {name: value for name, value in flags.items() if name not in ("model", "data")}
    generate.main(generate.Args(model=[flags["model"]], data=[f"{folder}/odd.jsonl"], out=str(tmp_path / "odd.jsonl"), **sampling))
    assert rows_of(tmp_path / "odd.jsonl") == rows_of(tmp_path / "out/odd.jsonl")
    evaluate.main(Args(results=[str(tmp_path / "out")], k=[2], out=str(tmp_path / "again")))
    assert results_of(tmp_path / "again") == results_of(tmp_path / "out")
    evaluate.main(Args(results=[str(tmp_path / "odd.jsonl")], k=[2], out=str(tmp_path / "odd")))
    assert results_of(tmp_path / "odd") == results_of(tmp_path / "out")[1:]


def results_of(folder):
    return json.loads(files(folder)["results.json"])["results"]


def test_seeds(start, tmp_path):
    _, flags = start
    flags = flags | {"data": flags["data"][1:], "n": 1}
    evaluate.main(Args(out=str(tmp_path / "out"), seeds=[3, 4], **flags))
    evaluate.main(Args(out=str(tmp_path / "four"), seed=4, **flags))
    found = files(tmp_path / "out")
    assert set(found) == {"odd.seed_3.jsonl", "odd.seed_4.jsonl", "results.json"}
    assert rows_of(tmp_path / "out/odd.seed_4.jsonl") == rows_of(tmp_path / "four/odd.jsonl")
    assert found["odd.seed_3.jsonl"] != found["odd.seed_4.jsonl"]
    [result] = json.loads(found["results.json"])["results"]
    assert (result["completions"], result["runs"]["seeds"]) == (14, [3, 4])
    evaluate.main(Args(results=[str(tmp_path / "out")], out=str(tmp_path / "again")))
    assert results_of(tmp_path / "again") == [result]


def test_killed_and_repeated_the_same_bytes(start, tmp_path):
    _, flags = start
    flags = flags | {"out": str(tmp_path / "out")}
    evaluate.main(Args(**flags))
    whole = files(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "whole")
    write_part = Generator.write_part
    for stage in (evaluate, Generator):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if stage is evaluate:  # after all sampling, in another call that is not gone on with
                patch.setattr(evaluate, "read", killed)
                evaluate.main(Args(**flags | {"seed": 2}))
            patch.setattr(Generator, "write_part", lambda *args: killed() if "odd" in str(args[2]) else write_part(*args))
            evaluate.main(Args(**flags))
        assert not (tmp_path / "out").exists()
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        answer = Generator.answer
        patch.setattr(Generator, "answer", lambda self, rows, numbers: asked.extend(numbers) or answer(self, rows, numbers))
        evaluate.main(Args(**flags))
    assert asked == list(range(7))  # those of `odd`
    assert files(tmp_path / "out") == whole and sorted(os.listdir(tmp_path)) == ["out", "whole"]


@pytest.mark.parametrize("moment", ["copyfile", "rename", "rmtree"])
def test_killed_at_the_end_nothing_is_sampled_again(start, tmp_path, monkeypatch, moment):
    _, flags = start
    flags = flags | {"out": str(tmp_path / "out")}
    calls = []

    def second_call(*args, **kwargs):
        calls.append(args)
        if args[0] == tmp_path / ".out.unfinished" or len(calls) == 2 or moment == "rename":
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    owner = Path if moment == "rename" else evaluate.shutil
    original = getattr(owner, moment)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, moment, second_call)
        evaluate.main(Args(**flags))
    assert calls
    monkeypatch.setattr(Generator, "answer", killed)
    if moment == "rmtree":  # all is there
        assert set(os.listdir(tmp_path / "out")) == {"even.jsonl", "odd.jsonl", "results.json"}
        return
    assert not (tmp_path / "out").exists()
    evaluate.main(Args(**flags))
    assert set(os.listdir(tmp_path / "out")) == {"even.jsonl", "odd.jsonl", "results.json"} and os.listdir(tmp_path) == ["out"]


def test_a_column_that_is_not_there_is_found_before_sampling(start, tmp_path, monkeypatch):
    folder, flags = start
    monkeypatch.setattr(Generator, "write_part", killed)
    with pytest.raises(RunError, match=f"^{folder}/even.jsonl, row 1: no 'text', which --cluster asks for"):
        evaluate.main(Args(out=str(tmp_path / "out"), cluster="text", **flags))
    with pytest.raises(RunError, match="--subset levl: no data set has this column in all rows"):
        evaluate.main(Args(out=str(tmp_path / "out"), subset="levl", **flags))


def killed(*_):
    raise KeyboardInterrupt


def test_two_processes_write_what_one_does(start, tmp_path):
    _, flags = start
    evaluate.main(Args(out=str(tmp_path / "one"), **flags))
    together(2, lambda: evaluate.main(Args(out=str(tmp_path / "two"), **flags)))
    for a, b in zip(results_of(tmp_path / "one"), results_of(tmp_path / "two"), strict=True):
        assert a.pop("logprob_per_token") == pytest.approx(b.pop("logprob_per_token"), abs=1e-4)
        assert a == b
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_shots_are_turns_before_the_question(start, tmp_path):
    folder, flags = start
    shots = write_jsonl(tmp_path / "shots.jsonl", [{"messages": [user(f"{i}?"), assistant(f"{i}!")]} for i in range(3)])
    rows = rows_of(folder / "odd.jsonl")
    rows[0]["messages"].insert(0, {"role": "system", "content": "Be good."})
    data = [f"odd={write_jsonl(tmp_path / 'odd.jsonl', rows)}"]
    flags = flags | {"data": data, "n": 1, "temperature": 0.0}
    evaluate.main(Args(out=str(tmp_path / "out"), shots=[f"odd={shots}"], num_shots=2, **flags))
    turns = [user("0?"), assistant("0!"), user("1?"), assistant("1!")]
    for row in rows:
        row["messages"] = row["messages"][:-1] + turns + row["messages"][-1:]
    by_hand = [f"odd={write_jsonl(tmp_path / 'by_hand.jsonl', rows)}"]
    evaluate.main(Args(out=str(tmp_path / "by_hand"), **flags | {"data": by_hand}))
    assert rows_of(tmp_path / "out/odd.jsonl") == rows_of(tmp_path / "by_hand/odd.jsonl")
    assert rows_of(tmp_path / "out/odd.jsonl")[3]["messages"] == [*turns, user("odd 3?")]
    evaluate.main(Args(out=str(tmp_path / "none"), **flags))
    assert rows_of(tmp_path / "out/odd.jsonl")[1]["logprobs"] != rows_of(tmp_path / "none/odd.jsonl")[1]["logprobs"]
    copy = write_jsonl(tmp_path / "copy.jsonl", [{"messages": [user("odd 3?"), assistant("3!")]}])
    with pytest.raises(DataError, match="odd.jsonl, row 4: .*one of --shots"):
        evaluate.main(Args(out=str(tmp_path / "x"), shots=[f"odd={copy}"], num_shots=1, **flags))
    prepare = Benchmark([[user("2+2?"), assistant("4")]], True)
    made = prepare({"messages": [user("1+3?"), assistant("4")]})  # the same answer is no leak
    assert made["messages"] == [user("2+2?"), assistant("4"), user("1+3?"), assistant("4")]
    prepare({"messages": [user("Ask me."), assistant("2+2?"), user("5")]})
    for messages in ([user("2+2? ")], [user("Hi."), assistant("Hello."), user("2+2?")], [{**user("2+2?"), "name": "x"}]):
        with pytest.raises(ValueError, match="one of --shots"):
            prepare({"messages": messages})
    with pytest.raises(DataError, match="shots.jsonl: 3 rows, fewer than --num_shots 8"):
        evaluate.main(Args(out=str(tmp_path / "x"), shots=[f"odd={shots}"], **flags))
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}])
    with pytest.raises(DataError, match="bad.jsonl, row 1: messages: a shot is one question"):
        read_shots(bad, 1)


def test_benchmarks_are_read_as_they_are_published(tmp_path):
    expected = {
        "gsm8k/test": ("gsm8k", 1319), "math/math500": ("math", 500), "math/math_test_minus500": ("math", 4500), "math/aime24": ("math", 30),
        "ifeval/input_data": ("ifeval", 541), "code/humaneval": ("code", 164), "code/mbpp": ("code", 974), "code/mbpp_sanitized": ("code", 427),
    }  # fmt: skip
    prepare = Benchmark([], False)
    for file, (verifier, count) in expected.items():
        made = [prepare(json.loads(line)) for line in shared("data", f"{file}.jsonl").open()]
        assert {row["dataset"] for row in made} == {verifier} and len(made) == count
        assert len({row["messages"][0]["content"] for row in made}) > 0.98 * count
        assert file != "math/math500" or len({row["subject"] for row in made}) == 7  # for --subset
    shots = read_shots(str(shared("data/gsm8k/train.jsonl")), 8)
    assert len(shots) == 8 and "####" in shots[7][1]["content"]
    assert len(Benchmark(shots, False)(made[0])["messages"]) == 17
    with pytest.raises(ValueError, match="rows of the shape Alpaca become messages, and no prompts"):
        Benchmark([], False)({"instruction": "Say 5.", "output": "5"})
    with pytest.raises(DataError, match="humaneval.jsonl, row 1: rows of the shape HumanEval become prompts, and no messages"):
        read_shots(str(shared("data/code/humaneval.jsonl")), 1)
    with pytest.raises(ValueError, match="no known shape has the columns text"):
        Benchmark([], False)({"text": "x"})
    with pytest.raises(ValueError, match="no field 'ground_truth'"):
        Benchmark([], False)({"prompt": "x", "dataset": "exact"})
    assert Benchmark([], True)({"messages": [user("x")]}) == {"messages": [user("x")]}


def test_presets_are_defaults():
    chosen = settings(Args(preset="olmo3"), "AIME24")
    assert (chosen["n"], chosen["temperature"], chosen["top_p"], chosen["max_new_tokens"]) == (32, 0.6, 0.95, 32768)
    assert chosen["seeds"] == [1, 2, 3] and settings(Args(preset="olmo3", n=4), "math")["n"] == 4
    chosen = settings(Args(preset="tulu3"), "humaneval")
    assert (chosen["n"], chosen["temperature"], chosen["top_p"], chosen["k"], chosen["seeds"]) == (20, 0.8, 0.95, [1, 10], [1])
    assert settings(Args(preset="tulu3"), "math500")["num_shots"] == 4
    assert settings(Args(preset="tulu3", temperature=0.3, seed=5), "humaneval")["temperature"] == 0.3
    assert settings(Args(seed=5), "gsm8k") == {
        "n": 1, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 2048, "max_length": 4096, "k": [1], "num_shots": 8, "seeds": [5],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 0.0}, "even: at temperature 0 the 2 completions of a prompt are all the same"),
        ({"k": [3]}, "even: --k 3 needs as many completions; --n and --seeds make 2"),
        ({"k": [0]}, "--k 0: give numbers from 1 on"),
        ({"k": []}, "--k : give numbers from 1 on"),
        ({"n": 0}, "--n 0 is out of range"),
        ({"slots": 0}, "--slots 0 is out of range"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0 is out of range"),
        ({"shots": ["even=x"], "num_shots": -1}, "--num_shots -1 is out of range"),
        ({"seeds": []}, "--seeds : give each once"),
        ({"seeds": [10**30]}, "--seeds 1000.*: give each once, and none below 0 or above 1e18"),
        ({"seeds": [1, 1]}, "--seeds 1 1: give each once"),
        ({"data": ["even.jsonl"]}, "--data even.jsonl: expected NAME=FILE"),
        ({"shots": ["other=x.jsonl"]}, "a NAME of --shots has to be one of them"),
        ({"out": None}, "--model needs --out"),
        ({"model": None}, "give --model and --data, or --results, or --compare"),
        ({"results": ["x"]}, "give --model and --data, or --results, or --compare"),
        ({"max_new_tokens": 122}, "even.jsonl: 12 skipped|longer than --max_length"),
        ({"num_shots": 4}, "--num_shots needs --shots"),
        ({"seeds": [-1]}, "--seeds -1: .* none below 0"),
        ({"model": None, "data": [], "n": None, "max_length": None, "max_new_tokens": None, "results": ["x"]}, "--temperature is for --model"),
        ({"pass_threshold": 0.0}, "--pass_threshold 0.0 is out of range"),
    ],
)
def test_flags_that_do_not_fit(start, tmp_path, changed, message):
    _, flags = start
    with pytest.raises(RunError, match=message):
        evaluate.main(Args(**{"out": str(tmp_path / "out"), **flags, **changed}))
    assert os.listdir(tmp_path) == []


def test_a_prompt_that_is_too_long_is_no_smaller_benchmark(start, tmp_path):
    folder, flags = start
    rows = rows_of(folder / "odd.jsonl")
    rows[2]["messages"] = [user("x " * 200)]
    data = {"data": [f"odd={write_jsonl(tmp_path / 'odd.jsonl', rows)}"]}
    with pytest.raises(RunError, match=r"odd.jsonl: 1 skipped: longer than --max_length \(first: row 3\): raise"):
        evaluate.main(Args(out=str(tmp_path / "out"), **flags | data))
    rows[2] = {"messages": [user("x")]}
    write_jsonl(tmp_path / "odd.jsonl", rows)
    with pytest.raises(DataError, match="odd.jsonl, row 3: .*no field 'dataset'"):
        evaluate.main(Args(out=str(tmp_path / "out"), **flags | data))


def test_an_out_that_exists_is_refused(start, tmp_path):
    _, flags = start
    with pytest.raises(RunError, match="is there already"):
        evaluate.main(Args(out=str(tmp_path), **flags))


# --------------------------------------------------------------------------------------------------- other harnesses

TASK = """
task: gsm8k_local
dataset_path: json
dataset_kwargs: {{data_files: {{train: "{train}", test: "{test}"}}}}
fewshot_split: train
test_split: test
num_fewshot: 1
fewshot_config: {{sampler: first_n}}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
output_type: generate_until
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: 32}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.mark.slow
@pytest.mark.parametrize("begins", ["{{ bos }}", ""])
def test_lm_evaluation_harness_gets_the_same_answers(tmp_path, begins):
    """The command of docs/pipeline.md, on a model that sft.py has written: same prompts, with a shot, same answers.

    Also with a template that begins without BOS, where the harness would put one.
    """
    pytest.importorskip("lm_eval")
    rows = {part: rows_of(shared(f"data/gsm8k/{part}.jsonl")) for part in ("train", "test")}
    short = {part: [row for row in rows[part] if len(row["question"]) < 120][:8] for part in rows}
    train, test = (write_jsonl(tmp_path / f"{part}.jsonl", short[part]) for part in ("train", "test"))
    sft_rows = write_jsonl(tmp_path / "sft.jsonl", [{"messages": turns} for turns in read_shots(train, 8)])
    template = (ROOT / "chat_templates/tulu.jinja").read_text()
    assert "{{ bos }}\n" in template
    (tmp_path / "template.jinja").write_text(template.replace("{{ bos }}\n", begins))
    run("sft.py", model=shared("models/stories260k"), chat_template=tmp_path / "template.jinja", data=sft_rows, max_length=512, batch_size=4,
        steps=2, lr=1e-3, out=tmp_path / "run")  # fmt: skip
    model = str(tmp_path / "run/model")
    evaluate.main(Args(model=model, data=[f"gsm8k={test}"], shots=[f"gsm8k={train}"], num_shots=1, max_length=512,
                       max_new_tokens=32, out=str(tmp_path / "ours")))  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/gsm8k_local.yaml").write_text(TASK.format(train=train, test=test))
    command = f"""-m lm_eval run --model hf --model_args pretrained={model},dtype=float32,add_bos_token=False --tasks gsm8k_local
        --include_path {tmp_path}/tasks --apply_chat_template --fewshot_as_multiturn true --device cpu
        --output_path {tmp_path}/theirs --log_samples"""
    env = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command.split()], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [theirs] = (tmp_path / "theirs").rglob("samples_gsm8k_local_*.jsonl")
    theirs = sorted(rows_of(theirs), key=lambda row: row["doc_id"])
    ours = rows_of(tmp_path / "ours/gsm8k.jsonl")
    assert [row["resps"][0][0] for row in theirs] == [row["completions"][0] for row in ours]
    assert len({row["completions"][0] for row in ours}) > 4 and len(ours) == 8
    assert all(row["arguments"]["gen_args_0"]["arg_0"].count("<|assistant|>") == 2 for row in theirs)


def test_shots_that_are_not_given_are_none(start, tmp_path, capsys):
    folder, flags = start
    evaluate.main(Args(out=str(tmp_path / "out"), preset="tulu3", **flags | {"data": [f"gsm8k={folder}/odd.jsonl"], "n": 1, "temperature": 0.0}))
    assert json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["gsm8k"]["num_shots"] == 0
    assert "WARNING gsm8k: tulu3 has 8 shots for it" in capsys.readouterr().out
