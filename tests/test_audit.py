"""The audit of code rows: tests that test nothing are found, tests that test something are kept."""

import json

import pytest
from conftest import shared
from test_sandbox import humaneval, mbpp

from rewards import Pool, judge, sandbox
from rewards.audit import audit, reference, report

MISSING = sandbox.missing_layers()
pytestmark = pytest.mark.skipif(bool(set(MISSING) & set(sandbox.REQUIRED)), reason=f"this kernel lacks {MISSING}")


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=2) as pool:
        yield pool


def block(source):
    return f"```python\n{source}\n```"


NOTHING = {  # tests that pass for every program, or for one that does next to nothing
    "assert f": "assert f",
    "assert callable": "assert callable(f)",
    "assert hasattr": "import solution\nassert hasattr(solution, 'f')",
    "a call": "f(1)",
    "a call that is printed": "print(f(1), 2)",
    "an assignment": "x = f(1)\ny = 2",
    "not None": "assert f(1) is not None",
    "except pass": "try:\n    assert f(1) == 2\nexcept Exception:\n    pass",
    "bare except": "try:\n    assert f(1) == 2\nexcept:\n    print('failed')",
    "suppress": "from contextlib import suppress\nwith suppress(Exception):\n    assert f(1) == 2",
    "a tuple": "assert (f(1) == 2, 'wrong')",
    "an f-string": "assert f'{f(1) == 2}'",
    "a lambda": "assert lambda: f(1) == 2",
    "a generator": "assert (f(x) == x + 1 for x in [1, 2])",
    "a generator that nobody runs": "checks = (f(x) == x + 1 for x in [1, 2])\nassert checks",
    "a function's name": "def test():\n    return f(1) == 2\nassert test",
    "an empty loop": "for x in []:\n    assert f(x) == 2",
    "a loop over nothing": "for x in range(0):\n    assert f(x) == x",
    "all of nothing": "assert all(f(x) == x + 1 for x in [])",
    "if False": "if False:\n    assert f(1) == 2",
    "the guard of another module": "if __name__ == 'tests_of_f':\n    assert f(1) == 2",
    "return first": "def test_f():\n    return\n    assert f(1) == 2",
    "return the comparison": "def test_f():\n    return f(1) == 2",
    "a comparison in a function": "def test_f():\n    f(1) == 2",
    "or True": "assert f(1) == 2 or True",
    "isinstance of object": "assert isinstance(f(1), object)",
    "compared with itself": "x = f(1)\nassert x == x",
    "zip that truncates": "assert all(a == b for a, b in zip(f(1), [1, 2]))",
    "allclose of an empty list": "import numpy as np\nassert np.allclose(f(1), [])",
    "allclose that broadcasts": "import numpy as np\nassert np.allclose(f(1), [0, 0])",
    "assert_allclose with []": "import numpy as np\nnp.testing.assert_allclose(f(1), [])",
    "only the type": "assert isinstance(f(1), str)",
    "only the length": "assert len(f(1)) == 0",
    "raises Exception": "import pytest\nwith pytest.raises(Exception):\n    f(1)",
    "assertRaises(Exception)": "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertRaises(Exception, f, 1)",
    "fails, expected": "try:\n    assert f(1) == 2\n    raise ValueError\nexcept (AssertionError, ValueError, Exception):\n    pass",
    "a mock": "from unittest.mock import Mock\nf = Mock(return_value=2)\nimport solution\nsolution.f\nassert f(1) == 2",
    "patched": "from unittest.mock import patch\nimport solution\nwith patch('solution.f', return_value=2):\n    assert solution.f(1) == 2",
    "skipped": "import unittest\nclass T(unittest.TestCase):\n    @unittest.skip('later')\n    def test(self):\n        self.assertEqual(f(1), 2)",
    "expected failure": "import unittest\nclass T(unittest.TestCase):\n    @unittest.expectedFailure\n    def test(self):\n        self.assertEqual(f(1), 2)",
    "no test in the class": "import unittest\nclass T(unittest.TestCase):\n    def check(self):\n        self.assertEqual(f(1), 2)",
    "a subtest that is caught": "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        try:\n            self.assertEqual(f(1), 2)\n        except AssertionError:\n            pass",
    "parameters of none": "import pytest\n@pytest.mark.parametrize('x', [])\ndef test_f(x):\n    assert f(x) == 2",
    "a fixture that nobody looks at": "import pytest\n@pytest.fixture\ndef result():\n    return f(1)\ndef test_f(result):\n    pass",
    "pytest.raises(AssertionError)": "import pytest\nwith pytest.raises(AssertionError):\n    assert f(1) == 2",
    "a generator that tests": "def test_f():\n    yield f(1)\n    assert f(1) == 2",
    "return in finally": "def test_f():\n    try:\n        assert f(1) == 2\n    finally:\n        return",
    "a thread": "import threading\nt = threading.Thread(target=lambda: 1 / (f(1) == 2))\nt.start()\nt.join()",
    "assertTrue of a tuple": "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertTrue((f(1) == 2, 'wrong'))",
    "skipTest": "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.skipTest('later')\n        self.assertEqual(f(1), 2)",
    "a docstring": "def test_f():\n    \"\"\"\n    >>> f(1)\n    2\n    \"\"\"\n    f",
    "break first": "for x in [1]:\n    break\n    assert f(x) == 2",
    "eq or ne": "assert f(1) == 2 or f(1) != 2",
    "any of tuples": "assert any([(f(1) == 2, 'wrong')])",
    "case _": "match f(1):\n    case _:\n        assert True",
    "a count that nobody compares": "passed = 0\nif f(1) == 2:\n    passed += 1\nassert passed >= 0",
    "not unequal to something": "assert f(1) != 'error'",
    "a text of it": "assert len(str(f(1))) > 0",
    "an object": "from solution import F\nf = F(1)\nf.run()\nassert f",
    "the function of the tests": "def check(candidate):\n    assert callable(candidate)\ncheck(f)",
    "a check that returns": "def check(candidate):\n    return candidate(1) == 2\ncheck(f)",
    "a result that nobody looks at": "results = [f(x) == x + 1 for x in [1, 2]]\nprint(all(results))",
    "assert on another thing": "f(1)\nassert 1 + 1 == 2",
    "None for everything": "assert f(1) is None and f(2) is None",
    "True for everything": ["assert f(1) is True", "assert f(2)"],
    "0 for everything": ["assert f(0) == 0", "assert f(5) == 0"],
    "[] for everything": ["assert f(0) == []", "assert list(f(5)) == []"],
    "falsy": "assert not f(1)",
    "assertions are off": "import ast\nexec(compile('assert f(1) == 2', 'x', 'exec', optimize=1))",
    "a method that returns nothing": "assert Solution().f(1) is None",
    "methods, always 0": ["assert Solution().f(1) == 0", "s = Solution()\nassert s.f(5) == 0"],
    "calls, all the same": {"fn_name": "f", "inputs": [[1], [2]], "outputs": [7, 7]},
    "calls, None": {"fn_name": "f", "inputs": [[1]], "outputs": [None]},
    "nothing to print": [{"input": "1", "output": ""}, {"input": "2", "output": " \n"}],
    "always YES": [{"input": "1", "output": "YES"}],
    "always 0": {"inputs": ["1", "2"], "outputs": ["0", "0.0"]},
    "always the same": {"inputs": ["1", "2"], "outputs": ["hello", "hello\n"]},
}  # fmt: skip


@pytest.mark.parametrize("end", ["import os\nos._exit(0)", "import sys\nsys.exit(0)", "raise SystemExit", "exit()", "quit(0)"])
def test_tests_that_end_themselves_are_passed_by_nobody(end):
    assert judge("code", block("def f(x): return x + 1"), f"{end}\nassert f(1) == 2").reward == 0
    assert judge("code", block("def f(x): return x + 1"), f"assert f(1) == 2\n{end}").reward == 0


def test_tests_that_test_nothing_do_not_pass(pool):
    jobs = [("code", None, tests) for tests in NOTHING.values()]
    problems = audit(pool, jobs)
    passed = [name for index, name in enumerate(NOTHING) if index not in problems]
    assert not passed


@pytest.mark.parametrize("name", list(NOTHING)[: list(NOTHING).index("only the type")])
def test_what_passes_for_every_program_is_no_judgement(name):
    """Also where there was no audit: no program is rewarded by tests that pass for one that raises, or returns rubbish."""
    for source in ("def f(x): return 'nonsense'", "def f(x): return []", "def f(x): raise ValueError"):
        verdict = judge("code", block(source), NOTHING[name])
        is_nothing_to_them = name in ("zip that truncates", "allclose of an empty list", "allclose that broadcasts", "assert_allclose with []")
        assert verdict.reward != 1 or is_nothing_to_them, (name, verdict)


SOUND = {  # and rows like these that do test something
    "an assertion": "assert f(1) == 2",
    "not None, and more": ["assert f(1) is not None", "assert f(1) == 2"],
    "an exception": "import pytest\nwith pytest.raises(ValueError):\n    f(-1)",
    "an exception, caught": "try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass",
    "None and not None": ["assert f(-2) is None", "assert f(1) == 2"],
    "isclose": "import math\nassert math.isclose(f(1), 2)",
    "allclose": "import numpy as np\nassert np.allclose([f(1), f(2)], [2, 3])",
    "zip of equal lengths": "assert all(a == b for a, b in zip([f(1), f(2)], [2, 3], strict=True))",
    "callable, too": ["assert callable(f)", "assert f(1) == 2"],
    "a test class": "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(1), 2)",
    "KodCode": "from solution import f\ndef test_f():\n    assert f(1) == 2",
    "calls": {"fn_name": "f", "inputs": [[1]], "outputs": [2]},
    "calls with the same answer": {"fn_name": "f", "inputs": [[1], [1]], "outputs": [2, 2]},
    "a loop that does not end with a constant": "n = 0\nwhile f(n) != 3:\n    n += 1\nassert n == 2",
}  # fmt: skip


def test_tests_that_test_something_pass_with_their_solution(pool):
    solution = "def f(x):\n    if x == -1: raise ValueError\n    return None if x < 0 else x + 1"
    assert audit(pool, [("code", solution, tests) for tests in SOUND.values()]) == {}
    ending = list(SOUND.values())[:-1]
    assert audit(pool, [("code_share", None, tests) for tests in ending]) == {}
    wrong = audit(pool, [("code", "def f(x): return 7", tests) for tests in ending])
    assert len(wrong) == len(ending) and all("own solution fails" in reason for reason in wrong.values())


def test_programs_that_read_input(pool):
    cases = [{"input": "1", "output": "2"}, {"input": "2", "output": "3"}]
    jobs = [
        ("code", "print(int(input()) + 1)", cases),
        ("code_stdio", "print(int(input()) + 2)", cases),
        ("code", None, cases),
        ("code", None, cases[:1]),
        (["code", "exact"], None, [cases, "x"], [1, 2]),
        ("exact", None, "x"),
        ("code", None, [{"input": 1}]),
        (["exact", "code"], None, ["x", [{"input": "1", "output": "0"}]]),
    ]
    problems = audit(pool, jobs)
    assert list(problems) == [1, 6, 7]
    assert problems[1] == "the row's own solution fails: printed '3'"
    assert problems[6].startswith("test 1 needs the strings")
    assert problems[7] == "the tests pass for a program that prints '0' whatever it reads"


def test_the_same_row_is_looked_at_once(pool, monkeypatch):
    asked = []
    monkeypatch.setattr(pool, "score", lambda jobs: asked.extend(jobs) or Pool.score(pool, jobs))
    problems = audit(pool, [("code", None, "assert f"), ("exact", None, "x"), ("code", None, "assert f"), ("code", None, "assert f(1) == 2")])
    assert len(asked) == 2 and list(problems) == [0, 2]


@pytest.mark.parametrize(
    ("row", "source"),
    [
        ({"canonical_solution": "    return 1\n", "prompt": "def f():\n"}, "def f():\n    return 1\n"),
        ({"code": "def f(): pass", "prompt": "Write f."}, "def f(): pass"),
        ({"solution": "Text.\n```python\ndef f(): pass\n```\n"}, "def f(): pass\n"),
        ({"solutions": json.dumps(["print 1", "print(1)"])}, "print(1)"),
        ({"solutions": ["int main() {}", "x = 1"]}, "x = 1"),
        ({"solution": "print 1"}, None),
        ({"solution": "42"}, None),
        ({"solution": "No"}, None),
        ({"solution": None, "prompt": [{"role": "user", "content": "x"}]}, None),
        ({"solutions": "broken ["}, None),
        ({}, None),
    ],
)
def test_the_reference_solution_of_a_row(row, source):
    assert reference(row) == source


def test_the_report_is_one_line():
    assert report({}, [1, 2], 2) == "audit: the tests of all 2 code rows fail for programs that do nothing"
    assert report({1: "bad"}, [4, 7, 9], 3) == "audit: 1 of 3 code rows left out, their tests are worth no reward: row 7 (bad)"
    line = report(dict.fromkeys(range(30), "bad"), list(range(100, 130)), 30)
    assert line.startswith("audit: 30 of 30") and "row 102 (bad); and rows 103, 104," in line and line.endswith("119, ...")


def published():
    for _, ground_truth, source in [*humaneval(), *mbpp()]:
        yield "code", source, ground_truth


def test_a_tenth_of_the_published_rows_passes(pool):
    assert audit(pool, list(published())[::10]) == {}


@pytest.mark.slow
def test_all_published_rows_pass(pool):
    jobs = list(published())
    assert len(jobs) == 164 + 427
    assert audit(pool, jobs) == {}


def test_published_rows_have_their_reference():
    rows = [json.loads(line) for name in ("humaneval", "mbpp_sanitized") for line in shared(f"data/code/{name}.jsonl").open()]
    assert sum(reference(row) is None for row in rows) == 0
