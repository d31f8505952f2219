"""Verifiers: right verdicts on real solutions; and the pool, which no completion can stall, crash or poison."""

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time

import hostile
import lawless  # noqa: F401 (registers verifiers)
import pytest
from conftest import ROOT, seconds_of, shared, write_jsonl

import rewards
from common import RunError
from rewards import Pool, Verdict, failure_rates, judge
from rewards.__main__ import main
from rewards.jobs import combine
from rewards.mathematics import last_formula

IFEVAL = {  # the types with the most work for each character
    "instruction_id_list": ["language:response_language", "length_constraints:number_sentences", "keywords:frequency", "change_case:capital_word_frequency"],
    "kwargs": [{"language": "en"}, {"relation": "at least", "num_sentences": 3}, {"keyword": "a", "relation": "at least", "frequency": 2}, {"capital_relation": "at least", "capital_frequency": 1}],
}  # fmt: skip
GOLD = {"gsm8k": "5", "math": "5", "ifeval": IFEVAL, "ifeval_loose": IFEVAL, "code": ["assert f(1) == 2"], "code_stdio": [{"input": "", "output": "5\n"}], "exact": "5", "contains": "5"}  # fmt: skip
ALL = ["gsm8k", "math", "ifeval", "code", "exact", "contains"]  # the other two names are the same functions


@pytest.fixture(scope="module")
def pool():
    with Pool(2, max_failed=1.0) as pool:
        yield pool


def jsonl(*parts):
    return map(json.loads, shared(*parts).open())


# ------------------------------------------------------------------------------------------------------- verifiers


def test_every_verdict_on_published_gsm8k_solutions_agrees():
    verdicts = [
        (judge("gsm8k", row[model]["solution"], row["ground_truth"]).reward == 1, row[model]["is_correct"])
        for row in jsonl("data/gsm8k/model_solutions.jsonl")
        for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    ]
    assert (len(verdicts), sum(ours == theirs for ours, theirs in verdicts)) == (5276, 5276)
    assert 1000 < sum(theirs for _, theirs in verdicts) < 4000


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("A: 18", "18"), ("#### 1,234,567", "1234567"), ("It costs $3.50.", "3.50"), ("-$5", "-5"), ("$-5", "-5"), ("\u22127", "-7"),
        ("10-5", "5"), ("so 3 apples and 4.", "4"), ("50%", "50"), (".5", "0.5"), ("5.", "5"), ("1,2,3", "3"), ("1,2345", "2345"),
        ("18 dollars", "18"), ("007", "7"), ("5.0", "5"), ("x = 12km", "12"), ("(3)", "3"), ("1234,567", "567"),
        ("18 cm^2", "18"), (r"$\boxed{18}$ cm^2, 3 parts", "18"), ("1{,}800", "1800"), (r"1\,800", "1800"),
    ],
)  # fmt: skip
def test_last_number(text, number):
    assert judge("gsm8k", text, number).reason == "right"
    assert judge("gsm8k", text, number + "1").reason == "wrong"


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        (r"so \boxed{5}.", "5"), (r"\boxed{1} and \boxed{2}", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed 7$", "7"),
        (r"\fbox{3}", "3"), (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{4\boxed{5}}", r"4\boxed{5}"), (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{5", None), (r"\boxed{}", None), (r"\boxed", None), ("nothing", None), ("", None), ("$5", None),
        ("The answer is 12.", "12"), ("The answer is: $x+1$.", "x+1"), ("the Answer is **7**", "7"), ("**Answer**: 5", "5"), ("ANSWER: 5", "5"), ("### Answer\n5\nok", "5"), ("### Final Answer\n\n**5**", "5"),
        ("The answer is **5**.", "5"), ("The answer is therefore 5.", "5"), ("The final answer is:\n\\[\n5\n\\]", "5"), ("So $x = 2+3 = 5$.", "5"), ("Answer: 3\nmore", "3"),
        ("The answer is 3.5.", "3.5"), (r"Final Answer: The final answer is $\frac{2}{3}$. I hope it is correct.", r"\frac{2}{3}"),
        ("the answer is 3, no, the answer is 4.", "4"), ("so $a$, then $b$", "b"), (r"so \(a\) and \[c\]", "c"), ("$$x=2$$", "x=2"),
        (r"costs \$5, so $x=5$ and", "x=5"), (r"The answer is \$5.", r"\$5"),
    ],
)  # fmt: skip
def test_last_formula(text, formula):
    assert last_formula(text) == formula


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (r"\frac12", [r"\frac{1}{2}", "0.5", "1/2", r"\dfrac{2}{4}", ".5", r"50\%"], ["2", "0.51", r"-\frac12", "5"]),
        ("385", ["385", "x=385"], [r"\sum_{k=1}^{10}k^2", r"\int_0^{385} dx", r"\max(385, 1)", r"5 \cdot 77", "384+1", "384 + 1", r"\lim_{x\to 385} x", r"\gcd(385,770)", "400-15", r"\binom{385}{1}"]),
        ("7", [r"\boxed{7}", "7_{10}", r"\approx 7", "f(5)=7"], ["5=7", r"5\equiv 7", r"5\approx 7", r"7\text{ or 5}", r"7\text{, not 5}", "7_8", r"5 \ne 7", r"7 \text{ and } 5"]),
        (r"\binom{10}{3}", [r"\binom{10}{3}", "120"], ["121"]),
        ("1234", [r"1\,234", "1,234"], ["234"]),
        (r"3\sqrt2", ["3√2", r"\sqrt{18}"], ["3"]),
        ("5", ["5.0", "x=5", r"5\text{ cm}", "(5)", r"\text{5}", "10/2"], ["4", "x=4=5", r"4\boxed{5}", "5,6", r"5 \text{ or } 6", r"\pm 5", "", "5!", "4<x<6"]),
        ("x^2+1", ["1+x^2", "(x+1)^2-2x"], ["x^2-1", "x^2", "y^2+1"]),
        ("(3,4)", ["(3, 4)", r"\left(3,4\right)"], ["(4,3)", "[3,4]", "3"]),
        ("1,2", ["2,1", r"\{1,2\}", r"1 \text{ and } 2"], ["1", "1,2,3"]),
        (r"\text{Evelyn}", ["Evelyn", r"\text{Evelyn}", r"\textbf{Evelyn}"], ["Carla", "E"]),
        (r"\text{(B)}", ["B", r"\text{B}", "(B)"], ["A"]),
        (r"\$32,\!348", ["32348", r"\$32,348", "32,348"], ["32", "348"]),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"], [r"\begin{pmatrix}2\\1\end{pmatrix}", "1"]),
        ("90^\\circ", ["90", r"90^{\circ}", r"90\text{ degrees}"], ["89"]),
        ("y=2x+3", ["2x+3", "y = 3+2x"], ["2x-3"]),
        (r"\sqrt{2}", [r"2^{1/2}", r"\frac{2}{\sqrt2}"], ["2", "1.4"]),
        (r"\boxed{7}", ["7"], ["8"]),
        ("$7$", ["7"], ["8"]),
        (7, ["7"], ["8"]),
    ],
)  # fmt: skip
def test_equal_formulas(pool, gold, right, wrong):
    verdicts = pool.score([("math", rf"The answer is \boxed{{{answer}}}.", gold) for answer in right + wrong])
    assert [verdict.reward for verdict in verdicts] == [1.0] * len(right) + [0.0] * len(wrong), verdicts


def math_problems(file):
    return [(row["solution"], row.get("answer") or last_formula(row["solution"])) for row in jsonl("data/math", file)]


def check_math_problems(pool, problems):
    """Reference solutions against their own answers, and against the next problem's."""
    assert pool.check([("math", "", answer) for _, answer in problems]) == {}
    own = pool.score([("math", solution, answer) for solution, answer in problems])
    assert {verdict.reason for verdict in own} == {"right"}, [v for v in own if v.reason != "right"]
    shifted = [(solution, answer, own) for (solution, own), (_, answer) in zip(problems, problems[1:] + problems[:1], strict=True)]
    other = pool.score([("math", solution, answer) for solution, answer, _ in shifted])
    assert {verdict.reason for verdict in other} <= {"right", "wrong", "unparsed"}
    return [(own, answer) for (_, answer, own), verdict in zip(shifted, other, strict=True) if verdict.reward and own != answer]


def test_math500(pool):
    assert check_math_problems(pool, math_problems("math500.jsonl")) == [("5", "x=5")]  # equal


@pytest.mark.slow
def test_the_other_4500_math_problems(pool):
    equal = check_math_problems(pool, math_problems("math_test_minus500.jsonl"))
    assert set(equal) == {(r"\frac{3}{4}", r"\frac34"), (r"120^\circ", "120"), ("-1", "x = -1")}


@pytest.mark.parametrize(
    ("name", "gold", "right", "wrong"),
    [
        ("exact", "Paris", ["Paris", " paris. ", '"PARIS"', "\uff30aris", "Paris\n"], ["Paris, France", "", "Pari", "London"]),
        ("exact", "3.5", ["3.5", "3.5."], ["35", "-3.5", "3,5"]),
        ("exact", "5", ["5", "(5)"[1:2]], [".5", "-5", "5/6"]),
        ("exact", 12, ["12"], ["012", "1 2"]),
        ("contains", "5", ["It is 5.", "5", "(5)"], ["15", "5.5", "five", "", "55", "-5", ".5", "5/6"]),
        ("contains", ["red", "blue sky"], ["Blue sky, red sea", "RED and blue  sky"], ["red and blue", "reddish blue sky"]),
        ("gsm8k", "#### 18", ["<think>19</think> 18"], ["<think> 18", "18 <think>no, 18</think> 19", "</think>"]),
    ],
)  # fmt: skip
def test_strings_and_thoughts(name, gold, right, wrong):
    verdicts = [judge(name, completion, gold).reward for completion in right + wrong]
    assert verdicts == [1.0] * len(right) + [0.0] * len(wrong)


CODE = "Here it is:\n```python\nx = int(input())\nprint(x + 1)\n```\nDone."


@pytest.mark.parametrize(
    ("completion", "gold", "reason"),
    [
        (CODE, [{"input": "1", "output": "2"}, {"input": "5\n", "output": " 6 \n\n"}], "right"),
        (CODE, json.dumps([{"input": "1", "output": "2"}]), "right"),
        (CODE, [{"input": "1", "output": "2"}, {"input": "5", "output": "7"}], "wrong"),
        (CODE, [{"input": "x", "output": "2"}], "wrong"),
        ("print(2)", [{"input": "1", "output": "2"}], "unparsed"),
        ("```python\nprint(2)", [{"input": "1", "output": "2"}], "unparsed"),
        ("```sh\necho 2\n```", [{"input": "1", "output": "2"}], "unparsed"),
        ("```\nprint(2)\n```", [{"input": "1", "output": "2"}], "right"),
        ("```python\nprint(1)\n```\nNo:\n```py\nprint(2)\n```", [{"input": "1", "output": "2"}], "right"),
        ("```python\nprint(2)\n```\nOutput:\n```\n2\n```", [{"input": "1", "output": "2"}], "right"),
        ("- Code:\n  ```python3\n  print(2)\n  ```", [{"input": "1", "output": "2"}], "right"),
        ('```python\ndef f(x):\n    """```"""\n    return x\n```', ["assert f(1) == 1"], "right"),
        ("```python\ndef f(x): return x\n```\nExample:\n```python\nprint(f(1))\n```", ["assert f(1) == 1"], "right"),
        ("~~~py\nprint(2)\nexit()\n~~~", [{"input": "1", "output": "2"}], "right"),
        ("```python\nprint('2' * 10**6)\n```", [{"input": "", "output": "2"}], "wrong"),
        ("```python\ndef f(x): return x\n```", '["assert f(1) == 1", "assert f(\'a\') == \'a\'"]', "right"),
        ("```python\ndef f(x): return x\n```", ["assert f(1) == 1", "assert f(2) == 1"], "wrong"),
        ("```python\ndef f(x) return x\n```", ["assert f(1) == 1"], "wrong"),
        ("```python\ndef sum(a, b): return a + b\n```", {"tests": ["assert sum(1, 2) == 3"], "entry_point": "sum"}, "right"),
    ],
)  # fmt: skip
def test_code(completion, gold, reason):
    assert judge("code", completion, gold).reason == reason


def test_ifeval_rewards_the_share_of_instructions():
    row = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
    assert judge("ifeval", "\u200b.", row).reason == "unparsed"
    assert judge("ifeval", '"yes"', row) == Verdict(1.0, "right", "all followed")
    assert judge("ifeval", "yes", row) == Verdict(0.5, "wrong", "not followed: startend:quotation")
    assert judge("ifeval", 'Sure:\n"yes"', row).reward == 0.5
    assert judge("ifeval_loose", 'Sure:\n"yes"', row).reward == 1.0


# ------------------------------------------------------------------------------------------------------------ the pool


def test_names_have_no_case(pool):
    """Tülu 3's published rows say MATH."""
    assert [verdict.reward for verdict in pool.score([("MATH", "\\boxed{5}", "5"), (["Gsm8K"], "5", ["5"])])] == [1, 1]
    assert judge("MATH", "\\boxed{5}", "5").reward == 1


def test_several_verifiers_and_weights(pool):
    jobs = [
        (["gsm8k", "contains"], "so 5 it is", ["5", "so"], [0.5, 2]),
        (["gsm8k", "contains"], "so 5 it is", ["5", "now"]),
        (["gsm8k", "contains"], "nothing", ["5", "nothing"]),
        ("gsm8k", "5", "5", 10.0),
        (["code"], CODE, [[{"input": "1", "output": "2"}]]),
    ]
    assert [(v.reward, v.reason) for v in pool.score(jobs)] == [(2.5, "right"), (1.0, "wrong"), (1.0, "unparsed"), (10.0, "right"), (1.0, "right")]
    assert combine([Verdict(1.0, "right", "a"), Verdict(0.0, "timeout"), Verdict(0.0, "wrong", "b")], [1, 1, 1]) == Verdict(1.0, "timeout", "a |  | b")


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (("nonsense", "5", "5"), "no verifier is named 'nonsense'; there are .*gsm8k, math"),
        ((["gsm8k"], "5", "5"), "1 verifiers need lists"),
        ((["gsm8k", "exact"], "5", ["5"]), "2 verifiers need lists"),
        ((["gsm8k"], "5", ["5"], [1, 2]), "1 verifiers need lists"),
        (("gsm8k", "5", "5", float("nan")), "weights are .nan., expected finite"),
    ],
)
def test_bad_jobs(pool, job, message):
    with pytest.raises(RunError, match=message):
        pool.score([job])


@pytest.mark.parametrize(
    ("name", "gold", "message"),
    [
        ("gsm8k", "eighteen", "no number in 'eighteen'"),
        ("gsm8k", "", "empty"),
        ("gsm8k", None, "expected a string, found NoneType"),
        ("gsm8k", True, "expected a string, found bool"),
        ("math", r"\frac{", "math-verify cannot read"),
        ("math", r"\boxed{5", "math-verify cannot read"),
        ("math", "  ", "empty"),
        ("math", ["5"], "expected a string, found list"),
        ("math", "9^{9^{9^{9}}}!", "timeout|cannot read"),
        ("exact", " . ", "nothing to compare with"),
        ("contains", ["a", ""], "empty"),
        ("ifeval", {"instruction_id_list": ["no:such"], "kwargs": [{}]}, "no:such"),
        ("ifeval", "not json", "neither JSON"),
        ("code", [], "no tests"),
        ("code", "[1", "Expecting"),
        ("code", ["assert f(1 == 2"], "a test is not Python"),
        ("code", ["assert 1 == 1"], "no name that a program could define"),
        ("code", [{"input": "1"}], "test 1 needs the strings"),
        ("code", ["assert f()", {"input": "", "output": ""}], "tests of several kinds"),
        ("code", [{"input": "1", "output": 2}], "test 1 needs the strings"),
    ],
)
def test_bad_ground_truths_are_found_at_the_start(pool, name, gold, message):
    import re

    problems = pool.check([("gsm8k", "", "5"), (name, "", gold)])
    if name == "math" and "9^{9" in str(gold):
        assert set(problems) <= {1}  # sympy leaves some towers alone
        return
    assert list(problems) == [1]
    assert re.search(message, problems[1]), problems
    assert judge(name, "5", gold).reason == "bad_ground_truth"


def test_the_command_checks_files(tmp_path, capsys):
    good = write_jsonl(tmp_path / "good.jsonl", [{"dataset": "gsm8k", "ground_truth": "5", "completion": "6, no: 5"}, {"dataset": "math", "ground_truth": "5", "completion": "?"}, {"dataset": ["exact"], "ground_truth": ["a"], "weights": [2]}])  # fmt: skip
    main([good])
    assert capsys.readouterr().out == f"{good}: 3 ground truths\n  2 completions, mean reward 0.5000: 1 right, 1 unparsed\n"
    for row, message in [
        ({"dataset": "gsm8k", "ground_truth": "five"}, "row 2: ground_truth of 'gsm8k': no number in 'five'"),
        ({"dataset": "gsm9k", "ground_truth": "5"}, "row 2: no verifier is named 'gsm9k'"),
        ({"dataset": "gsm8k"}, "row 2: no field 'ground_truth'"),
        ("{", "row 2: column"),
    ]:
        bad = write_jsonl(tmp_path / "bad.jsonl", [{"dataset": "gsm8k", "ground_truth": "5"}, row])
        with pytest.raises(RunError, match=message):
            main([bad])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (None, "usage: python -m rewards FILE...  Rows: `dataset`, `ground_truth`, perhaps `completion`"),
        ("--help", "usage: python -m rewards FILE...  Rows: `dataset`, `ground_truth`, perhaps `completion`"),
        ("bad.jsonl", "error: bad.jsonl, row 1: no field 'dataset'"),
    ],
)
def test_the_command_ends_with_one_line(tmp_path, monkeypatch, flag, message):
    """As `python -m rewards`, but in this process. A text as the exit's code goes to stderr, and the status is 1."""
    write_jsonl(tmp_path / "bad.jsonl", [{"ground_truth": "5"}])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rewards", flag] if flag else ["rewards"])
    monkeypatch.delitem(sys.modules, "rewards.__main__")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("rewards", run_name="__main__")
    assert end.value.code == message


def test_workers_load_no_torch():
    """Nor transformers: each start of a worker would take seconds."""
    code = "import sys; import rewards; print(*{'torch', 'transformers', 'datasets', 'common'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("\n", "")


def test_score_has_a_pool_of_its_own():
    assert rewards.score([("gsm8k", "5", "5"), ("gsm8k", "5", "6", 2.0)]) == [Verdict(1.0, "right", "5"), Verdict(0.0, "wrong", "5")]


def test_a_weight_of_zero(pool):
    assert pool.score([("gsm8k", "5", "5", 0)]) == [Verdict(0.0, "right", "5")]


def test_a_new_verifier_is_three_lines(pool):
    assert [v.reason for v in pool.score([("polite", "please", None), ("polite", "now", None)])] == ["right", "wrong"]


def test_a_verifier_of_the_script_itself_is_refused(monkeypatch):
    monkeypatch.setitem(rewards.VERIFIERS, "mine", rewards.Verifier(test_a_new_verifier_is_three_lines, None, 1.0))
    monkeypatch.setattr(test_a_new_verifier_is_three_lines, "__module__", "__main__")
    with pytest.raises(RunError, match="module of its own"):
        Pool(1)


def test_lawless_verifiers_fail_alone(pool, tmp_path):
    """Whatever a verifier does, it gets its own verdict, and its neighbours theirs."""
    ordinary = ("gsm8k", "it is 5", "5")
    cases = [
        (("hangs", "hang", ""), "timeout"), (("hangs", "no", ""), "right"), (("sleeps", "", ""), "timeout"), (("dies", "die", ""), "crash"),
        (("dies", "no", ""), "right"), (("dies_once", "", str(tmp_path / "died")), "right"), (("grows", "", ""), "crash"), (("raises", "", ""), "crash"),
        (("says", "nan", ""), "crash"), (("says", "two", ""), "crash"), (("says", "text", ""), "crash"), (("says", "none", ""), "crash"),
        (("says", "lie", ""), "crash"), (("says", "reason", ""), "crash"), (("says", "number", ""), "crash"), (("says", "unjudged", ""), "unjudged"),
        (("says", "half", ""), "wrong"), (("says", "verdict", ""), "right"), (("floods", "", ""), "right"),
    ]  # fmt: skip
    jobs = [job for case, _ in cases for job in (case, ordinary, ordinary)]
    verdicts = pool.score(jobs)
    assert [verdict.reason for verdict in verdicts[::3]] == [reason for _, reason in cases]
    assert set(verdicts[1::3] + verdicts[2::3]) == {Verdict(1.0, "right", "5")}
    assert max(len(verdict.answer) for verdict in verdicts) == 200
    assert failure_rates(verdicts) == {"unparsed_rate": 0.0, "timeout_rate": 2 / 57, "crash_rate": 10 / 57}


def test_a_large_worker_is_replaced(pool):
    verdicts = pool.score([("grows_and_stays", "", ""), ("gsm8k", "5", "5")] * 4)
    assert {verdict.reason for verdict in verdicts} == {"right"}
    assert len({verdict.answer for verdict in verdicts[::2]}) == 4


def test_an_interrupted_batch_leaves_nothing_behind(monkeypatch):
    """Ctrl-C in the middle of a batch: the next one gets its own verdicts."""
    from rewards import pool as module

    with Pool(1) as pool:
        processes(pool)
        wait = module.wait

        def interrupted(*_):
            monkeypatch.setattr(module, "wait", wait)
            time.sleep(0.2)  # the verdict is there, unread
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.score([("gsm8k", "I got 5", "5")])
        assert pool.score([("gsm8k", "I got 6", "5")] * 3) == [Verdict(0.0, "wrong", "6")] * 3


def test_jobs_one_by_one(pool):
    """Tickets are collected in any order, beside other calls, and each gets its own verdict."""
    jobs = [("gsm8k", f"it is {i}", str(i % 7)) for i in range(20)]
    tickets = [pool.submit(job) for job in jobs]
    assert len(set(tickets)) == 20
    several = pool.submit((["gsm8k", "exact"], "5", ["5", "6"], [1, 3]))
    assert pool.score([("gsm8k", "I got 6", "5")] * 3) == [Verdict(0.0, "wrong", "6")] * 3
    assert pool.check([("gsm8k", "", "five")]) == {0: "ground_truth of 'gsm8k': no number in 'five'"}
    assert pool.collect(tickets[::-1]) == pool.score(jobs[::-1])
    assert pool.collect([several])[0][:2] == (1.0, "wrong")
    with pytest.raises(KeyError):
        pool.collect([several])
    assert pool.collect([]) == []
    assert (pool.tickets, pool.parts, pool.verdicts, list(pool.waiting)) == ({}, {}, {}, [])


def test_work_does_not_wait(pool):
    """While a verdict takes long, `work` returns at once; in the end the verdicts are there without a `collect`."""
    tickets = [pool.submit(("sleeps", "", "")) for _ in range(4)] + [pool.submit(("gsm8k", "5", "5"))]
    pool.work()
    assert not pool.verdicts.keys() >= {number for ticket in tickets for number in pool.tickets[ticket][0]}
    deadline = time.monotonic() + 60
    while len(pool.verdicts) < 5:
        assert seconds_of(pool.work, enough=0.5) < 0.5 and time.monotonic() < deadline
        time.sleep(0.01)
    assert [verdict.reason for verdict in pool.collect(tickets)] == ["timeout"] * 4 + ["right"]
    pool.work()  # nothing to do


def test_forgotten_tickets_cost_nothing(pool):
    """Neither those that wait, nor those that are being judged, nor those that are done."""
    done = pool.submit(("gsm8k", "5", "5"))
    pool.score([("gsm8k", "5", "5")])
    tickets = [pool.submit(("grows_and_stays", "", "")) for _ in range(50)]
    pool.work()
    pool.forget([done, *tickets])
    assert pool.score([("gsm8k", "I got 6", "5")] * 3) == [Verdict(0.0, "wrong", "6")] * 3
    assert (pool.tickets, pool.parts, pool.verdicts, list(pool.waiting)) == ({}, {}, {}, [])


def test_a_bad_job_takes_the_others_of_its_call_along(pool):
    with pytest.raises(RunError, match="no verifier is named"):
        pool.score([("gsm8k", "5", "5")] * 5 + [("nonsense", "5", "5")])
    assert (pool.tickets, pool.parts) == ({}, {})


def test_an_interrupted_call_leaves_other_tickets_alone(monkeypatch):
    from rewards import pool as module

    with Pool(1) as pool:
        tickets = [pool.submit(("gsm8k", f"{i}", "3")) for i in range(5)]
        processes(pool)
        wait = module.wait

        def interrupted(*_):
            monkeypatch.setattr(module, "wait", wait)
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.score([("gsm8k", "I got 5", "5")])
        assert [verdict.answer for verdict in pool.collect(tickets)] == list("01234")


def test_too_many_failures_stop_the_run():
    with Pool(2) as pool:
        with pytest.raises(RunError, match=r"7 of 10 completions could not be judged \(7 crash\) KeyError"):
            pool.score([("raises", "", "")] * 7 + [("gsm8k", "5", "5")] * 3)
        verdicts = pool.score([("raises", "", "")] * 6 + [("gsm8k", "5", "5")] * 30)
        assert [verdict.reason for verdict in verdicts] == ["crash"] * 6 + ["right"] * 30
        with pytest.raises(RunError, match=r"bad_ground_truth"):
            pool.score([("gsm8k", "5", "five")] * 7)


def test_killed_workers_cost_nothing():
    """SIGKILL of every process of the pool, then 100 right answers: 100 right."""
    jobs = [("math", rf"\boxed{{{i}}}", str(i)) for i in range(100)]
    with Pool(2) as pool:
        for round in ("children", "both"):
            for child, supervisor in processes(pool):
                for pid in {"children": [child], "both": [child, supervisor]}[round]:
                    os.kill(pid, 9)
            assert sum(verdict.reward for verdict in pool.score(jobs)) == 100


def test_a_pool_that_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Pool(1) as pool, pytest.raises(RunError, match="do not start"):
        pool.score([("gsm8k", "5", "5")])


def test_nothing_is_left_of_a_pool_or_its_caller(tmp_path):
    """Neither after close nor after SIGKILL of the caller in the middle of a verdict."""
    with Pool(2) as pool:
        pids = sum(processes(pool), [])
    wait_for_end(pids)
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
import lawless; from rewards import Pool
pool = Pool(1); pool.score([("hangs", "", "")])
print(pool.workers[0].pid, pool.workers[0].process.pid, flush=True)
pool.score([("hangs", "hang", "")] * 100)
"""
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in caller.stdout.readline().split()]
    caller.kill()
    caller.wait()
    wait_for_end(pids)


@pytest.mark.parametrize("moment", ["starting", "judging"])
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_caller_and_print_nothing(end, moment):
    """Ctrl-C is for the caller's process group, SIGKILL for the caller: nobody is left, and all that is said is the
    caller's own traceback. SIGINT for each worker by itself does nothing."""
    code = f"""
import signal, sys; sys.path[:0] = {sys.path!r}
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has it ignored
import lawless; from rewards import Pool
pool = Pool(2)
print(*[worker.process.pid for worker in pool.workers], flush=True)
if {moment == "judging"}:
    pool.score([("hangs", "", "")] * 4)
    print(*[worker.pid for worker in pool.workers if worker.connection], flush=True)
    pool.score([("hangs", "hang", "")] * 100)
sys.stdin.read()
"""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    caller = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **options)
    supervisors = [int(pid) for pid in caller.stdout.readline().split()]
    children = []
    if moment == "starting":
        time.sleep(0.15)  # they import
    if moment == "judging":
        children = [int(pid) for pid in caller.stdout.readline().split()]
        assert children
        for pid in supervisors + children:
            os.kill(pid, signal.SIGINT)
        time.sleep(0.3)
        assert all(map(alive, supervisors))  # a child may have come to its deadline
    (os.killpg if end == signal.SIGINT else os.kill)(caller.pid, end)
    caller.wait(10)
    wait_for_end(supervisors + children, 3 if moment == "judging" else 20)  # those that start look when they have
    stderr = caller.communicate()[1]
    tracebacks = 1 if end == signal.SIGINT else 0
    assert (stderr.count("Traceback"), stderr.count("KeyboardInterrupt")) == (tracebacks, tracebacks), stderr
    assert "supervise" not in stderr and "rewards import pool" not in stderr


def processes(pool):
    """[child, supervisor] of each worker, when it has started."""
    for worker in pool.workers:
        while not worker.is_idle():
            worker.receive()
    return [[worker.pid, worker.process.pid] for worker in pool.workers]


def wait_for_end(pids, seconds=20):
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.01)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"  # a zombie waits for whoever adopts it here
    except OSError:
        return False


def resident():
    """MiB of memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def judge_hostile(pool, completions, names):
    """Verdicts on hostile text with ground truth 5; asserts what holds for all of them."""
    before, jobs = resident(), [(name, completion, GOLD[name]) for name in names for completion in completions]
    random.Random(0).shuffle(jobs)  # the slow ones of math between the others'
    verdicts = pool.score(jobs)
    assert resident() - before < 200
    assert not os.path.exists("PWNED")
    assert {verdict.reason for verdict in verdicts} <= {"right", "wrong", "unparsed", "timeout"}
    assert pool.score([("math", r"\boxed{5}", "5"), ("math", r"\boxed{6}", "5")]) == [Verdict(1.0, "right", "5"), Verdict(0.0, "wrong", "6")]
    return {job[:2]: verdict for job, verdict in zip(jobs, verdicts, strict=True)}


def test_hostile_completions(pool):
    """All of the corpus but most of the slow formulas, which have the slow suite."""
    assert len(hostile.completions()) >= 100
    completions = hostile.completions()[len(hostile.SLOW_FORMULAS) :] + [hostile.boxed(f) for f in hostile.SLOW_FORMULAS[:3]]
    verdicts = judge_hostile(pool, completions, ALL)
    assert [text for text in hostile.HEDGES if verdicts["math", text].reward > 0] == []
    assert [text for name, text in verdicts if name == "math" and verdicts[name, text].reward > 0] == []


@pytest.mark.slow
def test_all_hostile_formulas(pool):
    verdicts = judge_hostile(pool, hostile.completions(), ["math"])
    assert sum(verdict.reason == "timeout" for verdict in verdicts.values()) > 5
    assert [text for _, text in verdicts if verdicts["math", text].reward > 0] == []


@pytest.mark.parametrize("name", ALL)
def test_fuzzed_completions(pool, name):
    judge_hostile(pool, hostile.fuzzed(1000, seed=1), [name])


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLD)
def test_more_fuzzed_completions(pool, name):
    judge_hostile(pool, hostile.fuzzed(10_000, seed=2), [name])


def test_a_verdict_depends_on_nothing_else(pool):
    """Same completion, same verdict: in any order, batch and process, before and after hostile ones, and in this one."""
    rng = random.Random(3)
    texts = hostile.fuzzed(30, seed=4) + [CODE, "```python\ndef f(x): return len({'a', 'b', str(x)}) - 1\n```", "It is 5.", r"\boxed{5}"]
    texts += ["```python\nimport random\nprint(random.random(), list({'a', 'b', 'c'}), 5)\n```"]
    jobs = [(name, text, GOLD[name]) for name in GOLD for text in texts]
    first = dict(zip(map(repr, jobs), pool.score(jobs), strict=True))
    assert {"right", "wrong", "unparsed"} <= {verdict.reason for verdict in first.values()}
    for _ in range(2):
        shuffled = rng.sample(jobs, len(jobs))
        shuffled[7:7] = [("math", hostile.boxed(hostile.SLOW_FORMULAS[0]), "5"), ("grows", "", "")]
        verdicts = pool.score(shuffled)
        assert [verdict for job, verdict in zip(shuffled, verdicts, strict=True) if first.get(repr(job), verdict) != verdict] == []
    assert [judge(*job) for job in jobs] == [first[repr(job)] for job in jobs]
