"""Verifiers of programs: the published forms of tests, what judges accept, and which block is the program."""

import json

import pytest
from conftest import seconds_of

from rewards import judge, sandbox
from rewards.equality import same_output
from rewards.program_tests import parse_tests
from rewards.programs import code_blocks, program_in

MISSING = sandbox.missing_layers()
pytestmark = pytest.mark.skipif(bool(set(MISSING) & set(sandbox.REQUIRED)), reason=f"this kernel lacks {MISSING}")

ADD = "def add(a, b):\n    return a + b"
SUBTRACT = "def add(a, b):\n    return a - b"
METHOD = "class Solution:\n    def add(self, a, b):\n        return a + b"
STDIN = "a, b = map(int, input().split())\nprint(a + b)"


def block(source, language="python"):
    return f"```{language}\n{source}\n```\n"


def reward(source, ground_truth, name="code"):
    return judge(name, block(source), ground_truth)


# ------------------------------------------------------------------------------------------------------- forms of tests

FORMS = {  # published form: (tests, a right program, a wrong one)
    "MBPP": (["assert add(1, 2) == 3", "assert add(2, 2) == 4"], ADD, SUBTRACT),
    "a bare string": ("assert add(1, 2) == 3\nassert add(2, 2) == 4", ADD, SUBTRACT),
    "a string that begins with a bracket": ("[add(1, 2)] == [3]", ADD, SUBTRACT),
    "a list as Python prints it": ("['assert add(1, 2) == 3']", ADD, SUBTRACT),
    "MBPP's row": ({"test_imports": ["import math"], "test_list": ["assert math.isclose(add(1, 2), 3)"]}, ADD, SUBTRACT),
    "HumanEval's row": ({"test": "def check(candidate):\n    assert candidate(1, 2) == 3\n", "entry_point": "add"}, ADD, SUBTRACT),
    "HumanEval, called": (["def check(candidate):\n    assert candidate(1, 2) == 3", "check(add)"], ADD, SUBTRACT),
    "LeetCode": ({"test": "def check(candidate):\n    assert candidate(a=1, b=2) == 3", "entry_point": "Solution().add"}, METHOD, "class Solution:\n    def add(self, a, b): return 0"),
    "candidate": ({"tests": ["assert candidate(1, 2) == 3"], "entry_point": "add"}, ADD, SUBTRACT),
    "KodCode": ("from solution import add\n\ndef test_add():\n    assert add(1, 2) == 3\n\ndef test_zero():\n    assert add(0, 0) == 0", ADD, SUBTRACT),
    "KodCode, all names": ("from solution import *\ndef test_add():\n    x = add(1, 2)\n    assert x == 3", ADD, SUBTRACT),
    "KodCode, the module": ("import solution\ndef test_add():\n    assert solution.add(1, 2) == 3", ADD, SUBTRACT),
    "pytest class": ("class TestAdd:\n    def setup_method(self):\n        self.x = 3\n    def test_add(self):\n        assert add(1, 2) == self.x", ADD, SUBTRACT),
    "pytest parametrize": ("import pytest\n@pytest.mark.parametrize('a, b, c', [(1, 2, 3), (2, 2, 4)])\ndef test_add(a, b, c):\n    assert add(a, b) == c", ADD, SUBTRACT),
    "pytest param": ("import pytest\n@pytest.mark.parametrize('a', [1, pytest.param(2, id='two')])\ndef test_add(a):\n    assert add(a, 1) == a + 1", ADD, SUBTRACT),
    "pytest fixture": ("import pytest\n@pytest.fixture\ndef two():\n    yield 2\n@pytest.fixture\ndef three(two):\n    return two + 1\ndef test_add(two, three):\n    assert add(1, two) == three", ADD, SUBTRACT),
    "pytest run as a script": ("import pytest\ndef test_add():\n    assert add(1, 2) == 3\nif __name__ == '__main__':\n    pytest.main([__file__])", ADD, SUBTRACT),
    "script": ("def run_tests():\n    assert add(1, 2) == 3\nif __name__ == \"__main__\":\n    run_tests()", ADD, SUBTRACT),
    "unittest": ("import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(add(1, 2), 3)", ADD, SUBTRACT),
    "unittest with main": ("from unittest import TestCase, main\nimport unittest\nclass T(TestCase):\n    def setUp(self):\n        self.x = 3\n    def test(self):\n        self.assertEqual(add(1, 2), self.x)\nif __name__ == '__main__':\n    unittest.main()", ADD, SUBTRACT),
    "unittest that looks at nothing": ("import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(add(1, 2), 3)\nunittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T))", ADD, SUBTRACT),
    "question without assert": ("import numpy as np\nnp.allclose(add(1, 2), 3)\nisinstance(add(1, 2), int)\nall([add(1, 2) == 3])", ADD, SUBTRACT),
    "comparison without assert": (["add(1, 2) == 3", "not add(0, 0)", "add(1, 1) == 2 and add(2, 2) == 4"], ADD, SUBTRACT),
    "stdin": ([{"input": "1 2\n", "output": "3\n"}, {"input": "2 2\n", "output": "4\n"}], STDIN, "print(3)"),
    "one case": ({"input": "1 2\n", "output": "3\n"}, STDIN, "print(4)"),
    "APPS": ({"inputs": ["1 2\n", "2 2\n"], "outputs": ["3\n", "4\n"]}, STDIN, "print(3)"),
    "APPS, lines": ({"inputs": [["1 2", "x"]], "outputs": [["3"]]}, STDIN, "print(4)"),
    "TACO, in JSON twice": ({"input_output": '{"inputs": ["1 2\\n"], "outputs": ["3\\n"]}'}, STDIN, "print(4)"),
    "PRIME": ({"test_cases": [{"type": "stdin_stdout", "input": "1 2\n", "output": "3\n"}]}, STDIN, "print(4)"),
    "PRIME, calls": ({"test_cases": [{"type": "function_call", "fn_name": "add", "input": [1, 2], "output": 3}]}, ADD, SUBTRACT),
    "APPS, calls": ({"fn_name": "add", "inputs": [[1, 2], [2, 2]], "outputs": [[3], 4]}, ADD, SUBTRACT),
    "APPS, calls of a method": ({"fn_name": "add", "inputs": [[1, 2], [2, 2]], "outputs": [3, 4]}, METHOD, METHOD.replace("+", "-")),
    "DeepCoder, calls in JSON": ({"fn_name": "add", "inputs": ["1\n2", "2\n2"], "outputs": ["3", "4"]}, ADD, SUBTRACT),
    "LiveCodeBench stdin": ([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}], STDIN, "print(4)"),
    "LiveCodeBench functional": ([{"input": "1\n2", "output": "3", "testtype": "functional", "metadata": {"func_name": "add"}}], METHOD, METHOD.replace("+", "-")),
    "LiveCodeBench, metadata in JSON": ({"tests": [{"input": "1\n2", "output": "3", "testtype": "functional", "metadata": "{\"func_name\": \"add\"}"}]}, METHOD, METHOD.replace("+", "-")),
    "LiveCodeBench, no name": ([{"input": "1\n2", "output": "3", "testtype": "functional"}], METHOD + "\n    def _other(self): pass", METHOD.replace("+", "-")),
    "LiveCodeBench, no name, a helper": ([{"input": "1\n2", "output": "3", "testtype": "functional"}], "def helper(x): return x\ndef solve(a, b): return helper(a) + b", "def helper(x): return x\ndef solve(a, b): return helper(a) - b"),
    "LiveCodeBench, texts": ([{"input": '"ab"\n["c", true, null]', "output": '[["ab", "c", true, null]]', "testtype": "functional"}], "def f(a, b): return [(a, *b)]", "def f(a, b): return [[a]]"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_published_forms(form):
    tests, right, wrong = FORMS[form]
    for ground_truth in (tests, json.dumps(tests)):
        assert reward(right, ground_truth).reason == "right", reward(right, ground_truth)
        assert reward(wrong, ground_truth).reason == "wrong", reward(wrong, ground_truth)


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("def check(candidate):\n    assert candidate(1) == 2", "nothing calls `check`.*entry_point"),
        ("def verify():\n    assert add(1, 2) == 3", "nothing calls `verify`"),
        ("class Checks:\n    def run(self):\n        assert add(1, 2) == 3", "nothing calls `Checks`"),
        ("async def test_add():\n    assert add(1, 2) == 3", "no asyncio"),
        ("def test_add(capsys):\n    assert add(1, 2) == 3", "`test_add` wants the fixture `capsys`, which there is not"),
        ("from my_module import add\nassert add(1, 2) == 3", "`my_module`, which is not installed; the program's module is `solution`"),
        ("import asyncio\nassert asyncio.run(add(1, 2)) == 3", "`asyncio`, which the sandbox does not let run"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": "1", "outputs": "2"}, "no tests; expected one of `tests`"),
        ({"questions": 1}, "no tests; expected one of `tests`"),
        ({"fn_name": "f", "inputs": ["x"], "outputs": ["1"]}, "test 1 is a call, but not in JSON"),
        ({"fn_name": "f", "inputs": [{"a": 1}], "outputs": [1]}, "test 1 needs `input`"),
        ([{"input": "1", "output": "1", "testtype": "interactive"}], "type 'interactive'; there are stdin"),
        ([{"input": "1", "output": "1", "testtype": "stdin"}, {"input": "1", "output": "1", "testtype": "functional"}], "several types"),
        ([{"input": "1", "output": "1", "fn_name": "f"}, {"input": "1", "output": "1", "fn_name": "g"}], "several functions: f, g"),
        ([{"input": [1], "output": 2}], "test 1 needs the strings `input` and `output` .a call of a function, `fn_name`"),
        ("eJxrYFacwgABEDAeAAyzAjY=", "compressed tests"),
        ('["assert f(1)', "neither JSON nor Python: "),
        ({"tests": ["assert f(1) == 1"], "score": "half"}, "`score` is 'half'; there are"),
        ({"tests": ["assert f(1) == 1"], "threshold": 2}, "`threshold` is 2, expected a share"),
        ({"tests": ["assert f(1) == 1"], "threshold": True}, "`threshold` is True"),
        ("", "no tests"),
        (None, "no tests"),
        (5, "no tests"),
        ({"tests": []}, "no tests"),
    ],
)  # fmt: skip
def test_forms_that_are_refused_by_name(tests, message):
    with pytest.raises(ValueError, match=message):
        parse_tests(tests)


@pytest.mark.parametrize(
    ("source", "tests", "expected"),
    [
        ("class Solution:\n    def f(self, x: List[int]) -> Optional[int]: return math.gcd(*x) + Counter(x)[9]", {"fn_name": "f", "inputs": [[[4, 6]]], "outputs": [2]}, 1),
        ("class Solution:\n    def f(self, x: List[int]): return inf if x else max(x)", {"tests": "assert Solution().f([1]) == float('inf')"}, 1),
        ("def f(x: List[int]) -> Dict[int, Any]: return {1: x}", ["assert f([1]) == {1: [1]}"], 1),
        ("def f(x): return math.floor(x)", ["import math", "assert f(1.5) == math.floor(1.5)"], 0),
        ("def f(x): return Counter(x)", ["assert f('a') == {'a': 1}"], 0),
        ("from __future__ import annotations\ndef f(x: List[int]): return x", ["assert f(1) == 1"], 1),
        ("List = 3\ndef f(x): return List", ["assert f(1) == 3"], 1),
        ("def f(pow): return pow(2)", {"fn_name": "f", "inputs": [[1]], "outputs": [2]}, 0),
        ("print(math.floor(1.5))", [{"input": "", "output": "1"}], 0),
    ],
)  # fmt: skip
def test_imports_are_as_in_the_authors_harness(source, tests, expected):
    assert reward(source, tests).reward == expected, reward(source, tests)


def test_a_state_is_not_shared_between_calls_of_a_solution():
    """As on LeetCode: each test has an instance of its own."""
    tests = {"fn_name": "f", "inputs": [[1], [1]], "outputs": [1, 1]}
    assert reward("class Solution:\n    n = 0\n    def f(self, x):\n        self.n += x\n        return self.n", tests).reward == 1


# -------------------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize(
    ("expected", "right", "wrong"),
    [
        ("3\n", ["3", "3\n\n", "\n3", " 3 ", "3.0", "03", "+3"], ["4", "3 3", "3\n3", "", "3.0000001", "2.9999999", "three", "3,0"]),
        ("1\n2\n", ["1\n\n2", "1 \n 2\n\n\n", "1\r\n2\r\n"], ["1 2", "2\n1", "12", "1\n2\n3"]),
        ("0.333333", ["0.3333333333", "0.3333333", "3.33333e-1", ".333333"], ["0.33", "0.33334", "1/3", "0.333333 0.333333"]),
        ("2.50000", ["2.5", "2.5000001", "25e-1"], ["2.50001", "2", "3", "2.5f"]),
        ("1000000.5", ["1000000.6", "1000000.5"], ["1000002.5", "1000000"[:-1]]),
        ("0.0", ["0", "1e-7", "-0.0", "0.0000009"], ["0.00001", "", "-"]),
        ("0", ["0", "0.0", "-0"], ["1e-7", "0.0000001", "1"]),
        ("10000000000000001", ["10000000000000001", "+10000000000000001"], ["1e16", "10000000000000000", "1.0000000000000001e16", "10000000000000001.0"]),
        ("10000000000000000", ["10000000000000000"], ["1e16", "1e+16", "10000000000000000.0"]),
        ("123456789", ["123456789"], ["123456788", "123456789.5", "1.23456789e9"]),
        ("YES", ["YES", "YES\n"], ["Yes", "yes", "NO", "YES."]),
        ("nan", ["nan"], ["0", "NaN", "inf"]),
        ("inf", ["inf"], ["1e999", "1e309", "nan"]),
        ("1e309", ["1e309"], ["inf", "1e308", "1"]),
        ("a 1.5 b", ["a 1.5000001 b", "a  1.5\tb"], ["a 1.6 b", "1.5 a b", "a 1.5"]),
        ("1.2.3", ["1.2.3"], ["1.2", "1.2.30"]),
        ("1_000", ["1_000"], ["1000"]),
        ("٣", ["٣"], ["3"]),
        ("", ["", "\n", "  "], ["0"]),
    ],
)  # fmt: skip
def test_output_is_compared_as_judges_do(expected, right, wrong):
    assert [same_output(printed, expected) for printed in right + wrong] == [True] * len(right) + [False] * len(wrong)


@pytest.mark.parametrize(
    ("result", "right", "wrong"),
    [
        (0.1, ["0.1 + 1e-9", "0.1", "1 / 10"], ["0.11", "'0.1'", "None", "[0.1]", "0", "float('nan')"]),
        (3, ["3", "3.0"], ["3.0000001", "'3'", "4", "[3]"]),
        ([1, [2.5, "a"]], ["(1, [2.5, 'a'])", "[1, (2.5000001, 'a')]"], ["[1, [2.5]]", "[1, [2.5, 'b']]", "[[2.5, 'a'], 1]", "{1, 2}"]),
        ({"1": [True]}, ["{1: [True]}", "{'1': [True]}"], ["{1: [False]}", "{1: [True], 2: 0}", "[1]", "{}"]),
        (None, ["None"], ["0", "''", "[]"]),
        ("ab", ["'ab'"], ["'AB'", "'ab '", "['a', 'b']"]),
    ],
)
def test_results_of_calls_are_compared_as_json(result, right, wrong):
    tests = {"fn_name": "f", "inputs": [[]], "outputs": [result]}
    for source in right + wrong:
        verdict = reward(f"def f(): return {source}", tests)
        assert verdict.reason == ("right" if source in right else "wrong"), source


# --------------------------------------------------------------------------------------------------------- partial credit


HALF = "def f(x): return abs(x)"
CALLS = [f"assert f({x}) == {x}" for x in (1, 2, -3, 4, -5, -6)]
CASES = [{"input": str(x), "output": str(x)} for x in (1, 2, -3, 4, -5, -6)]


@pytest.mark.parametrize(
    ("source", "tests"),
    [
        (HALF, CALLS),
        (HALF, "\n".join(CALLS)),
        (HALF, ["import math", "y = 0", *CALLS]),
        (HALF, "import unittest\n" + "\n".join(f"def test_{n}():\n    {test}" for n, test in enumerate(CALLS))),
        (HALF, {"fn_name": "f", "inputs": [[int(case["input"])] for case in CASES], "outputs": [int(case["output"]) for case in CASES]}),
        ("print(abs(int(input())))", CASES),
        ("print(abs(int(input())))", {"inputs": [c["input"] for c in CASES], "outputs": [c["output"] for c in CASES]}),
        ("def f(x):\n    if x < 0: raise ValueError\n    return x", CALLS),
        ("import os\ndef f(x):\n    if x < 0: os._exit(0)\n    return x", CALLS),
        ("import sys\ndef f(x):\n    if x < 0: sys.exit(0)\n    return x", CALLS),
        ("import os\nx = int(input())\nif x < 0: os._exit(0)\nprint(x)", CASES),
    ],
)  # fmt: skip
def test_the_share_of_tests_or_a_threshold(source, tests):
    """Three of six pass. All are run, also those behind a test in which the program ended."""
    for name, ground_truth, expected in (
        ("code", tests, 0.0),
        ("code", {"tests": tests, "score": "share"}, 0.5),
        ("code_share", tests, 0.5),
        ("code", {"tests": tests, "threshold": 0.5}, 1.0),
        ("code", {"tests": tests, "threshold": 0.51}, 0.0),
        ("code", {"tests": tests, "score": "share", "threshold": 0.5}, 0.5),
        ("code", {"tests": tests, "score": "share", "threshold": 0.6}, 0.0),
    ):
        verdict = reward(source, ground_truth, name)
        assert verdict.reward == expected, (ground_truth, verdict)
        assert verdict.reason == ("right" if expected == 1 else "wrong")


def test_no_share_for_what_prepares_the_tests():
    tests = {"tests": ["x = [1]", "x.append(2)", "f(x)", "assert x == [1, 2, 3]", "assert f([]) is None"], "score": "share"}
    assert reward("def f(x): x.append(3)", tests).reward == 1
    assert reward("def f(x): pass", tests).reward == 0.5
    assert reward("def f(x): raise ValueError", tests).reward == 0
    assert reward("def g(x): pass", tests).reward == 0


# ---------------------------------------------------------------------------------------------- which block is the program


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (block("A = 1\ndef f(x): return x") + block("print(f(1))"), "A = 1"),
        (block("def f(x): return x") + block("def test_f():\n    assert f(1) == 1\ntest_f()"), "def f"),
        (block("def f(x): return x") + block("from solution import f\nprint(f(1))"), "def f"),
        (block("def f(x): return x") + block("class TestF:\n    def test(self):\n        x = f(1)"), "def f"),
        (block("def f(x): return 1") + "Better:\n" + block("def f(x): return 2"), "def f(x): return 2"),
        (block("def f(x): return 1") + "Better:\n" + block("def f(x) return 2"), "def f(x) return 2"),
        (block("f = lambda x: x") + block("print(f)"), "f = lambda"),
        (block("f: object = lambda x: x") + block("print(f)"), "f: object"),
        (block("try:\n    import numpy\n    def f(x): return x\nexcept ImportError:\n    pass") + block("f(1)"), "try:"),
        (block("async def f(x): return x") + block("y = f(1)"), "async def f"),
        (block("def f(x): return x") + block("f(1)", "bash") + block(">>> f(1)\n1", "pycon") + block("1", ""), "def f"),
        (block("def f(x): return x", "") + block("print(f(1))"), "def f"),
        (block("int f(int x) { return x; }", "cpp") + block("def f(x): return x"), "def f"),
        (block("def f(x): return x") + block("int f(int x) { return x; }", "cpp"), "def f"),
        ("Program: ```python\ndef f(x): return x\n```", "def f"),
        ("1. ```python\n   def f(x): return x\n   ```", "def f"),
        ("```python\ndef f(x):\n    return x```", "def f(x):\n    return x\n"),
        ("```python\ndef f(x):\n    return x```\nand\n```python\nprint(f(1))\n```", "def f(x):\n    return x\n"),
        ('```python\ndef f(x):\n    """Like ```f```"""\n    return x\n```', 'def f(x):\n    """'),
        ("```python\ndef f(x):\n    # ends with ```\n    return x\n```", "def f(x):\n    #"),
        ("```python\ndef f(x):\n    s = '''\n    ```\n    '''\n    return x\n```", None),
        ("````python\ndef f(x):\n    s = '''\n```\n'''\n    return x\n````", "def f(x):"),
        ("```{.python}\ndef f(x): return x\n```", "def f"),
        ("The call ```f(1)``` works.\n```python\ndef f(x): return x\n```", "def f"),
        ("```python def f(x): return x```", "def f"),
        ("```python\ndef f(x): return x", None),
        ("```python\ndef f(x): return 1\n```\nBetter:\n```python\ndef f(x): return", "def f(x): return 1"),
        ("def f(x): return x", None),
        ("```text\ndef f(x): return x\n```", None),
    ],
)  # fmt: skip
def test_the_program_is_the_solution_not_the_demonstration(completion, expected):
    program = program_in(completion, parse_tests(["assert f(1) == 1"]))
    if expected is None:
        assert program is None or not program.startswith("def f(x):\n    return"), program
    else:
        assert program is not None and program.startswith(expected), program


@pytest.mark.parametrize(
    ("blocks", "chosen"),
    [
        ([STDIN, 'print("1 2 gives 3")'], 0),
        ([STDIN, "def test():\n    assert add(1, 2) == 3"], 0),
        ([STDIN, "import io, sys\nsys.stdin = io.StringIO('1 2')\nprint(input())"], 0),
        ([STDIN, "import sys\ninput = sys.stdin.readline"], 0),
        (["import sys\nprint(sum(map(int, sys.stdin.read().split())))", "print(3)"], 0),
        (["import sys\ndata = open(0).read()\nsys.stdout.write(data)", "print(3)"], 0),
        (["def main():\n    n = int(input())\n    print(n)\nif __name__ == '__main__':\n    main()", "main()"], 0),
        (["print(input())", "Better\nprint(input()"], 0),
        (["print(input())", "print(input() + '!')"], 1),
        (["print(1)", "print(2)"], 1),
        (["x = 1", "print(2"], 1),
    ],
)
def test_a_program_that_reads_input_is_preferred(blocks, chosen):
    completion = "\n".join(block(source) for source in blocks)
    assert program_in(completion, parse_tests(CASES)).strip() == blocks[chosen].strip()


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (["def g(x): return x", "def f(x): return g(x)"], 1),
        (["def g(x): return 0", "def f(x): return g(x)"], 0),
        (["def g(x): return 0", "def g(x): return x", "def f(x): return g(x)"], 1),
        (["def g(x): return x", "def g(x): return 0", "def f(x): return g(x)"], 0),
        (["import math", "def f(x): return math.floor(x)"], 1),
        (["K = 0", "def g(x): return x + K", "def f(x): return g(x)"], 1),
        (["class Node:\n    def __init__(self, v): self.v = v", "print(Node(2).v)", "def f(x): return Node(x).v"], 1),
        (["def f(x): return x", "def f(x): return g(x)"], 0),
        (["def g(x) return x", "def f(x): return g(x)"], 0),
        (["f = max", "def f(x): return x"], 1),
    ],
)
def test_what_a_program_uses_may_stand_in_a_block_before_it(blocks, expected):
    completion = "\nThen:\n".join(block(source) for source in blocks)
    assert judge("code", completion, ["assert f(1) == 1", "assert f(3) == 3"]).reward == expected


READERS = {  # programs read their input in all these ways
    "input": "a, b = map(int, input().split())",
    "read": "import sys\na, b = map(int, sys.stdin.read().split())",
    "lines": "import sys\nfor line in sys.stdin:\n    a, b = map(int, line.split())",
    "alias": "import sys\ninput = sys.stdin.readline\na, b = map(int, input().split())",
    "bytes": "import sys\na, b = map(int, sys.stdin.buffer.readline().split())",
    "fileinput": "import fileinput\nfor line in fileinput.input():\n    a, b = map(int, line.split())",
    "open(0)": "a, b = map(int, open(0).read().split())",
    "fdopen": "import os\na, b = map(int, os.fdopen(0).read().split())",
    "/dev/stdin": "with open('/dev/stdin') as file:\n    a, b = map(int, file.read().split())",
    "/dev/fd/0": "a, b = map(int, open('/dev/fd/0').read().split())",
    "pathlib": "from pathlib import Path\na, b = map(int, Path('/dev/stdin').read_text().split())",
    "io.open": "import io\na, b = map(int, io.open('/dev/stdin', 'rb').read().split())",
    "numpy": "import sys\nimport numpy as np\na, b = np.loadtxt(sys.stdin, dtype=int)",
    "until the end": "while True:\n    try:\n        a, b = map(int, input().split())\n    except EOFError:\n        break",
    "byte by byte": "import os\ntext = b''\nwhile byte := os.read(0, 1):\n    text += byte\na, b = map(int, text.split())",
    "StringIO": "import io, sys\nsys.stdin = io.StringIO(sys.stdin.read())\na, b = map(int, input().split())",
}


@pytest.mark.parametrize("way", READERS)
def test_every_way_to_read_input(way):
    tests = [{"input": "1 2\n", "output": "3\n"}, {"input": "10 20\n", "output": "30\n"}]
    assert reward(READERS[way] + "\nprint(a + b)", tests).reward == 1
    assert reward(READERS[way] + "\nprint(a - b)", tests).reason == "wrong"


def test_a_program_that_is_cut_off_earns_nothing():
    """Not even where what there is of it would pass."""
    for end in ("", "\n", "\n#", "\n``"):
        assert judge("code", f"```python\n{ADD}{end}", ["assert add(1, 2) == 3"]).reason == "unparsed"


HOSTILE = {  # completions of any length that a regular expression may take long for
    "blank lines": lambda n: f"```python\n{chr(10) * n}def g(x) return\n```",
    "lines of blanks": lambda n: "```python\n" + " " * n + "\n" + "x" * n + "\n```",
    "blanks everywhere": lambda n: " \n" * n + "```python\ndef g(x) return\n```",
    "fences": lambda n: "```\n" * n,
    "open fences": lambda n: "```python\n" * n,
    "ends of lines": lambda n: "```python\n" + "x = 1 +```\n" * n + "```",
    "backticks": lambda n: "`" * n + "\n" + "~" * n,
    "tildes and words": lambda n: "~~~ x" * n,
    "words": lambda n: "async " * n + "```python\n" + "async " * n + "\n```",
    "names": lambda n: "```python\n" + "f " * n + "\ndef f(\n```",
    "one-line blocks": lambda n: "```python f``` \n" * n,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_completion_takes_more_than_its_length(name):
    """Four times the length takes about four times as long: less than sixteen, which a quadratic rule would take."""
    tests = parse_tests(["assert f(1) == 1"])

    def seconds(n):
        completion = HOSTILE[name](n)
        return seconds_of(lambda: program_in(completion, tests))

    short, long = seconds(5000), seconds(20000)
    assert long < 0.05 or long < 10 * short, (short, long)


@pytest.mark.parametrize("make", [lambda n: "9" * n, lambda n: "." * n, lambda n: "1" + "e" * n, lambda n: "1." + "0" * n + "x", lambda n: "\n" * n, lambda n: " " * n, lambda n: "1 " * n])  # fmt: skip
def test_no_output_takes_more_than_its_length(make):
    def seconds(n):
        text = make(n)
        return seconds_of(lambda: (same_output(text, text + "x"), same_output(text, "1.5 " + text)))

    short, long = seconds(20000), seconds(80000)
    assert long < 0.05 or long < 10 * short, (short, long)


def test_code_blocks_have_a_language():
    assert code_blocks("```Python3 title=x\na\n```\n~~~c++\nb\n~~~\n```\nc\n```") == [("python3", "a\n"), ("c++", "b\n"), ("", "c\n")]


# ------------------------------------------------------------------------------- what crosses between tests and program

VECTOR = """
class Vector:
    def __init__(self, *x): self.x = list(x)
    def __add__(self, other): return Vector(*(a + b for a, b in zip(self.x, other.x)))
    def __mul__(self, k): return Vector(*(a * k for a in self.x))
    __rmul__ = __mul__
    def __neg__(self): return self * -1
    def __eq__(self, other): return isinstance(other, Vector) and self.x == other.x
    def __hash__(self): return hash(tuple(self.x))
    def __lt__(self, other): return sum(self.x) < sum(other.x)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i]
    def __setitem__(self, i, value): self.x[i] = value
    def __delitem__(self, i): del self.x[i]
    def __contains__(self, value): return value in self.x
    def __str__(self): return f"<{', '.join(map(str, self.x))}>"
    def __repr__(self): return f"Vector{tuple(self.x)}"
    def __abs__(self): return sum(a * a for a in self.x) ** 0.5
    def __bool__(self): return any(self.x)
    def __call__(self, k): return self.x[0] + k
    def __enter__(self): return self
    def __exit__(self, *error): self.closed = error[0] is None; return True
"""
ERRORS = """
class Base(Exception): pass
class Bad(Base, ValueError):
    def __init__(self, message, code):
        super().__init__(message)
        self.code = code
    def __str__(self): return f"[{self.code}] {self.args[0]}"
def f(n):
    if n < 0: raise Bad("negative", 7)
    return {0: 1 / 1}[n]
"""
RIGHT = [  # (a right program, tests)
    (VECTOR, ["assert Vector(1, 2) + Vector(3, 4) == Vector(4, 6)", "assert Vector(1) != Vector(2) and not Vector(1) == 1"]),
    (VECTOR, ["assert (Vector(1, 2) * 3).x == [3, 6]", "assert (2 * Vector(1)).x == [2]", "assert -Vector(1) == Vector(-1)"]),
    (VECTOR, ["assert len({Vector(1), Vector(1), Vector(2)}) == 2", "assert hash(Vector(1)) == hash(Vector(1))"]),
    (VECTOR, ["assert sorted([Vector(2), Vector(1)])[0].x == [1]", "assert min(Vector(3), Vector(2)) == Vector(2)", "assert Vector(1) < Vector(2) and not Vector(3) < Vector(2)"]),
    (VECTOR, ["v = Vector(1, 2, 3)", "v[0] = 5", "del v[1]", "assert v.x == [5, 3] and v[1] == 3 and len(v) == 2 and v[0:1] == [5]"]),
    (VECTOR, ["assert 1 in Vector(1, 2)", "assert 3 not in Vector(1, 2)"]),
    (VECTOR, ["assert str(Vector(1, 2)) == '<1, 2>'", "assert repr(Vector(1, 2)) == 'Vector(1, 2)'", "assert f'{Vector(1)}' == '<1>'"]),
    (VECTOR, ["assert abs(Vector(3, 4)) == 5.0", "assert not Vector(0) and Vector(1)", "assert Vector(3)(4) == 7"]),
    (VECTOR, ["with Vector(1) as v:\n    assert v.x == [1]", "assert v.closed", "with Vector(1) as v:\n    1 / 0", "assert not v.closed"]),
    (VECTOR, ["v = Vector(1)", "import copy", "w = copy.deepcopy(v)", "w.x = [2]", "assert v.x == [1]"]),
    (VECTOR, ["assert isinstance(Vector(1), Vector) and not isinstance(1, Vector)", "v = Vector(1)", "v += Vector(2)", "assert v.x == [3]"]),
    ("class A: pass\nclass B(A): pass", ["assert issubclass(B, A) and not issubclass(A, B)", "assert isinstance(B(), A) and not isinstance(A(), B)", "assert hasattr(A, 'x') is False"]),
    ("import numpy as np\ndef f(): return np.arange(6).reshape(2, 3), np.ones((2, 0)), np.array([True]), np.array([1j]), np.array(['a'])", ["a, b, c, d, e = f()", "assert a.shape == (2, 3) and a.sum() == 15 and a.tolist() == [[0, 1, 2], [3, 4, 5]] and a.T[2, 1] == 5", "assert b.shape == (2, 0) and c.dtype == bool and d[0] == 1j and list(e) == ['a']"]),
    ("def f(a):\n    a.sort()\n    a += 1\n    return a", ["import numpy as np", "a = np.array([[3, 1], [0, 2]])", "b = f(a)", "assert b is a and a.tolist() == [[2, 4], [1, 3]]", "np.testing.assert_array_equal(f(np.array([2.5, 1.5])), [2.5, 3.5])"]),
    ("import numpy as np\ndef f(x): return {'mean': np.mean(x), 'all': (np.array(x), 1)}", ["r = f([1, 2])", "assert r['mean'] == 1.5 and (r['all'][0] == [1, 2]).all() and r['all'][1] == 1"]),
    (ERRORS, ["try:\n    f(-1)\n    assert False\nexcept Bad as error:\n    assert str(error) == '[7] negative' and error.code == 7 and error.args == ('negative',)"]),
    (ERRORS, ["import pytest\nwith pytest.raises(Base):\n    f(-1)\nwith pytest.raises(ValueError, match='negative'):\n    f(-2)\nwith pytest.raises(KeyError):\n    f(5)"]),
    (ERRORS, ["assert issubclass(Bad, ValueError) and issubclass(Bad, Base) and not issubclass(Base, ValueError)", "assert f(0) == 1"]),
    (ERRORS, ["import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertRaises(Bad, f, -1)\n        with self.assertRaises(KeyError):\n            f(3)"]),
    ("def f(k): return {}[k]", ["try:\n    f('a')\n    assert False\nexcept KeyError as error:\n    assert str(error) == \"'a'\" and error.args == ('a',)"]),
    ("import json\ndef f(s): return json.loads(s)", ["import json\ntry:\n    f('{')\n    assert False\nexcept json.JSONDecodeError as error:\n    assert error.pos == 1"]),
    ("import sys\ndef f(): sys.exit(3)", ["try:\n    f()\n    assert False\nexcept SystemExit as error:\n    assert error.code == 3"]),
    ("def f():\n    n = 0\n    while True:\n        yield n\n        n += 1", ["g = f()", "assert [next(g) for _ in range(3)] == [0, 1, 2]", "assert next(g) == 3", "from itertools import islice", "assert list(islice(f(), 100)) == list(range(100))", "for x in f():\n    if x > 10: break", "assert x == 11"]),
    ("def f(n):\n    for i in range(n): yield i", ["g = f(2)", "assert iter(g) is g", "assert list(g) == [0, 1]", "assert next(g, None) is None", "try:\n    next(g)\n    assert False\nexcept StopIteration:\n    pass", "assert sum(f(5000)) == 12497500"]),
    ("def f():\n    yield 1\n    raise ValueError('end')", ["g = f()", "assert next(g) == 1", "try:\n    next(g)\n    assert False\nexcept ValueError as error:\n    assert str(error) == 'end'"]),
    ("class R:\n    def __init__(self, n): self.n = n\n    def __iter__(self): return iter(range(self.n))\n    def __reversed__(self): return reversed(range(self.n))", ["r = R(3)", "assert list(r) == [0, 1, 2] and list(r) == [0, 1, 2] and list(reversed(r)) == [2, 1, 0]", "a, b, c = r", "assert (a, b, c) == (0, 1, 2) and max(r) == 2 and 2 in r and 5 not in r"]),
    ("class It:\n    def __init__(self): self.n = 0\n    def __iter__(self): return self\n    def __next__(self):\n        self.n += 1\n        if self.n > 2: raise StopIteration\n        return self.n", ["assert list(It()) == [1, 2]", "i = It()", "assert next(i) == 1"]),
    ("def f(function, items): return [function(item) for item in items]", ["assert f(lambda x: x + 1, [1, 2]) == [2, 3]", "assert f(str, [1]) == ['1'] and f(len, ['ab']) == [2]", "def double(x): return 2 * x", "assert f(double, (1, 2)) == [2, 4]"]),
    ("def f(function):\n    try: return function(1)\n    except ValueError as error: return str(error)", ["def g(x): raise ValueError('no')", "assert f(g) == 'no'"]),
    ("import functools\ndef f(function):\n    calls = {}\n    @functools.wraps(function)\n    def inner(*given):\n        if given not in calls: calls[given] = function(*given)\n        return calls[given]\n    return inner", ["seen = []\n@f\ndef square(x):\n    seen.append(x)\n    return x * x", "assert square(3) == 9 and square(3) == 9 and seen == [3] and square.__name__ == 'square'"]),
    ("def f(n): return lambda g: g(n) if n else f(1)(g)", ["assert f(0)(lambda x: f(x)(lambda y: y + 1)) == 2"]),
    ("def f(g): return g", ["def h(): pass", "assert f(h) is h and f(int) is int"]),
    ("def f(items): return next(items), next(items)", ["import itertools", "assert f(itertools.count(3)) == (3, 4)", "assert f(x for x in 'ab') == ('a', 'b')", "i = iter([1, 2, 3])", "f(i)", "assert next(i) == 3"]),
    ("def f(x):\n    x.append(1)\n    return x", ["a = []", "assert f(a) is a and f(x=a) is a and a == [1, 1]"]),
    ("def f(x): x.sort()", ["a = [3, 1]", "f(x=a)", "assert a == [1, 3]"]),
    ("def f(x): x.add(4)", ["a = {1}", "b = a", "f(a)", "assert b == {1, 4}"]),
    ("def f(x): x[0] = 65", ["a = bytearray(b'xy')", "f(a)", "assert a == b'Ay' and isinstance(a, bytearray)"]),
    ("def f(x): x[0][0] = 9; x[1]['a'].add(2)", ["inner = [1]", "a = [inner, {'a': {1}}]", "s = a[1]['a']", "f(a)", "assert inner == [9] and s == {1, 2} and a == [[9], {'a': {1, 2}}]"]),
    ("def f(x): x.appendleft(0)", ["from collections import deque", "d = deque([1])", "f(d)", "assert d == deque([0, 1])"]),
    ("def f(x):\n    del x['a']\n    x['b'] = 2", ["a = {'a': 1, 'c': 3}", "f(a)", "assert a == {'c': 3, 'b': 2}"]),
    ("import datetime\ndef f(): return datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1, 2, 3, tzinfo=datetime.timezone.utc), datetime.timedelta(1)", ["import datetime", "assert f() == (datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1, 2, 3, tzinfo=datetime.timezone.utc), datetime.timedelta(1))"]),
    ("from decimal import Decimal\nfrom fractions import Fraction\ndef f(x): return x + Decimal('0.1'), Fraction(1, 3)", ["from decimal import Decimal", "from fractions import Fraction", "assert f(Decimal('0.2')) == (Decimal('0.3'), Fraction(1, 3))"]),
    ("from collections import *\ndef f(): return Counter('aab'), OrderedDict(a=1), deque([1], maxlen=2), defaultdict(int, a=1)", ["from collections import *", "c, o, d, e = f()", "assert c == Counter('aab') and c.most_common(1) == [('a', 2)] and o == OrderedDict(a=1) and d == deque([1]) and d.maxlen == 2 and e == {'a': 1}"]),
    ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, y=2)", ["p = f()", "assert p == (1, 2) and p.x == 1 and p._asdict() == {'x': 1, 'y': 2} and P(3, 4).y == 4"]),
    ("from enum import Enum, IntEnum\nclass C(Enum):\n    RED = 1\n    BLUE = 2\nclass N(IntEnum):\n    ONE = 1\ndef f(): return C.RED", ["assert f() == C.RED and f() is C.RED and f() != C.BLUE and C.RED.value == 1 and C['RED'].name == 'RED' and len(C) == 2 and C(2) is C.BLUE", "assert N.ONE == 1 and N.ONE < 2 and N(1).name == 'ONE'"]),
    ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    y: int = 2", ["assert P(1) == P(1, 2) and P(1).y == 2 and str(P(1)) == 'P(x=1, y=2)' and P(1) != P(2)"]),
    ("class Stack(list):\n    def push(self, x):\n        self.append(x)\n        return self", ["s = Stack().push(1).push(2)", "assert s == [1, 2] and [1, 2] == s and len(s) == 2 and s[0] == 1 and s[-1] == 2 and s != [1] and list(s) == [1, 2]"]),
    ("class S:\n    one = None\n    def __new__(cls):\n        cls.one = cls.one or object.__new__(cls)\n        return cls.one", ["assert S() is S()", "a = S()", "a.x = 1", "assert S().x == 1"]),
    ("class Node:\n    def __init__(self, v, next=None): self.v, self.next = v, next\ndef f(n):\n    n.next.next = n\n    return n.next", ["a = Node(1, Node(2))", "b = f(a)", "assert b.next is a and a.next is b and b.v == 2"]),
    ("class C:\n    def __init__(self): self.items = []\n    @property\n    def size(self): return len(self.items)\n    @staticmethod\n    def make(): return C()\n    @classmethod\n    def of(cls, *x):\n        c = cls()\n        c.items += x\n        return c", ["assert C.make().size == 0 and C.of(1, 2).size == 2 and C.of(1).items == [1]", "try:\n    C().size = 3\n    assert False\nexcept AttributeError:\n    pass"]),
    ("def f(): return range(3), {'a': 1}.keys(), {'a': 1}.values(), {'a': 1}.items()", ["r, k, v, i = f()", "assert r == range(3) and k == {'a'} and list(v) == [1] and i == {('a', 1)} and sorted(v) == [1] and len(k) == 1"]),
    ("def f(n):\n    for i in range(n): print(i)", ["import io\nfrom contextlib import redirect_stdout\nout = io.StringIO()\nwith redirect_stdout(out):\n    f(3)\nassert out.getvalue() == '0\\n1\\n2\\n'"]),
    ("print('demo')\nimport sys\nsys.stdout.buffer.write(b'x')\ndef f(x): return x\nprint(f(int(input())))", ["assert f(1) == 1"]),
    ("def f(x): return x\nassert f(1) == 2", ["assert f(1) == 1"]),
    ("from typing import List\nclass Solution:\n    def f(self, x: List[int]) -> int: return sum(x)", ["assert Solution().f([1, 2]) == 3"]),
    ("from threading import Thread\ndef f(x):\n    out = []\n    t = Thread(target=out.append, args=(x,))\n    t.start(); t.join()\n    return out", ["assert f(1) == [1]"]),
]  # fmt: skip


@pytest.mark.parametrize(("source", "tests"), RIGHT)
def test_right_programs_pass_whatever_they_return(source, tests):
    parsed = parse_tests(tests)
    result = sandbox.test(source, parsed.pieces, parsed.names)
    assert result.error is None
    plain = {"__name__": "solution"}  # and they are right in one process too
    exec(compile(source.replace("input()", "'1'"), "program.py", "exec"), plain) if "assert f(1) == 2" not in source else None


POINT = """
class Point:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x == other.x
    def __hash__(self): return hash(self.x)
    def __add__(self, other): return Point(self.x + other.x)
"""


@pytest.mark.parametrize(
    "test",
    ["Point(1) == Point(1)", "not Point(1) == Point(2)", "Point(1) != Point(2)", "len({Point(1), Point(1)}) == 1", "Point(1) in [Point(2), Point(1)]", "[Point(1)] == [Point(1)]", "Point(1) + Point(2) == Point(3)", "[Point(2), Point(1)].index(Point(1)) == 1"],
)  # fmt: skip
def test_one_comparison_of_objects_is_a_test(test):
    """It fails for a class that does not say what is equal, but for `!=`, and for one that says that all are."""
    assert reward(POINT, f"assert {test}").reason == "right"
    without = POINT.replace("__eq__", "equals")
    everything = POINT.replace("return self.x == other.x", "return True").replace("hash(self.x)", "1")
    is_negative = "not" in test or "!" in test
    assert reward(everything if is_negative else without, f"assert {test}").reward != 1


EVIL = """
class E:
    def __call__(self, *given, **named): return self
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
    def __add__(self, other): return self
    __sub__ = __mul__ = __mod__ = __truediv__ = __floordiv__ = __pow__ = __and__ = __or__ = __xor__ = __add__
    __radd__ = __rsub__ = __rmul__ = __rmod__ = __rtruediv__ = __rpow__ = __rand__ = __ror__ = __rxor__ = __add__
    def __abs__(self): return 0.0
    def __float__(self): return 0.0
    __int__ = __index__ = __len__ = lambda self: 0
    def __round__(self, *n): return 0
    def __neg__(self): return self
    def __hash__(self): return hash(2)
    def __bool__(self): return self.truth
    truth = True
"""
FORGERS = [
    EVIL + "def f(x): return E()",
    EVIL.replace("truth = True", "truth = False") + "def f(x): return E()",
    EVIL + "def f(x): return [E()]",
    EVIL + "f = E()",
    EVIL.replace("class E", "class f").replace("truth = True", "truth = True\n    def __init__(self, x): pass"),
    EVIL.replace("truth = True", "truth = True\n    def __getattr__(self, name): return self") + "def f(x): return E()",
    EVIL.replace("class E", "class E(list)").replace("    truth", "    def more(self): pass\n    truth") + "def f(x): return E()",
    EVIL.replace("class E", "class E(int)").replace("    truth", "    def more(self): pass\n    truth") + "def f(x): return E()",
    EVIL.replace("class E", "class E(str)") + "def f(x): return E('2 3')",
    "import os\ndef f(x): os._exit(0)",
    "def f(x): raise AssertionError",
    "def f(x): raise SystemExit(0)",
    "import unittest\ndef f(x): raise unittest.SkipTest('x')",
    "def f(x): raise KeyboardInterrupt",
    "def f(x): raise StopIteration",
    "class AssertionError(Exception): pass\ndef f(x): raise AssertionError",
    "import remote\nfor n in dir(remote):\n    if callable(getattr(remote, n)) and n[0] != '_': setattr(remote, n, lambda *a, **k: 2)\ndef f(x): return 0",
    "import remote\nremote.End.encode = lambda self, value: {'builtin': 'object'}\ndef f(x): return 0",
    "import remote\nremote.End.encode = lambda self, value: {'yours': 0}\ndef f(x): return 0",
    "import remote\nremote.End.encode = lambda self, value: {'argument': 0}\ndef f(x): return 0",
    "import remote\nremote.End.encode = lambda self, value: {'exception': ['f', 'solution', [{'builtin': 'int'}], 5]}\ndef f(x): return 0",
    "import remote\nremote.End.encode = lambda self, value: {'value': ['os', '_exit', [0]]}\ndef f(x): return 0",
    "import remote\nremote.End.encode = lambda self, value: {'error': [{'builtin': 'SystemExit'}, [0], '', {}]}\ndef f(x): return 0",
    "import json, os\nfor fd in range(3, 12):\n    try: os.write(fd, b'[\"raise\", {\"error\": [{\"builtin\": \"SystemExit\"}, [0], \"\", {}]}, [], \"\"]\\n' * 9)\n    except OSError: pass\ndef f(x): return 0",
    "import os\nfor fd in range(0, 12):\n    try: os.write(fd, b'null\\n' * 50)\n    except OSError: pass\ndef f(x): return 0",
    "def f(x): return '\\nnull\\nnull\\n'",
    "import numpy as np\nclass A(np.ndarray):\n    def __eq__(self, other): return True\ndef f(x): return np.zeros(1).view(A)",
    "import remote\nremote.End.encode = lambda self, value: {'array': ['O', [1], {'list': [{'mine': [0, 'x', False]}]}]}\ndef f(x): return 0",
    "import remote\nremote.End.encode = lambda self, value: {'array': ['<i8', [0], {'list': []}]}\ndef f(x): return 0",
    "class A:\n    def tolist(self): return 2 if self else 3\n    def __eq__(self, other): return True\nA.__name__, A.__module__ = 'ndarray', 'numpy'\ndef f(x): return [A()]",
    "from unittest.mock import ANY\ndef f(x): return ANY",
    "import pytest\ndef f(x): return pytest.approx(0, abs=1e9)",
    "import pytest\ndef f(x): pytest.skip('x')",
    "from decimal import Decimal\nclass D(Decimal):\n    def __eq__(self, other): return True\ndef f(x): return D(9)",
    "class f(int):\n    @property\n    def __class__(self): return int\n    def __eq__(self, other): return True\n    def more(self): pass",
    "import builtins, math\nbuiltins.abs = math.isclose = builtins.sorted = builtins.max = lambda *a, **k: 0\ndef f(x): return 9",
    "abs = isclose = round = sorted = sum = max = lambda *a, **k: 0\ndef f(x): return 9",
]  # fmt: skip
JUDGES = [
    "assert f(1) == 2", "assert 2 == f(1)", "assert f(1) in (2, 3)", "assert 2 in [f(1)]", "assert {2: 1}[f(1)]", "assert len({f(1), 2}) == 1",
    "assert abs(f(1) - 2) < 1e-6", "assert not f(1) - 2", "assert round(f(1) - 2.0, 5) == 0", "assert f(1) - 2 == 0", "assert not f(1) % 2 and f(1) > 1",
    "assert 1 < f(1) < 3", "assert f(1) >= 2 and f(1) <= 2", "assert sorted([f(1), 1, 3]) == [1, 2, 3]", "assert str(f(1)) == '2'",
    "import math\nassert math.isclose(f(1), 2)", "import numpy as np\nassert np.isclose(f(1), 2)", "import numpy as np\nassert np.array_equal(np.array(f(1)), 2)",
    "import pytest\nassert f(1) == pytest.approx(2)", "assert [f(1)] == [2]", "assert (f(1),) == (2,)",
    "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(1), 2)", "def test_f():\n    assert f(1) == 2",
    "try:\n    assert f(1) == 2\nexcept ZeroDivisionError:\n    pass", "assert max(f(1), 1) == 2", "assert sum([f(1), 1]) == 3", "assert f(1) ^ 2 == 0",
    "assert f(1) is not None and f(1) * 1.0 == 2.0", "assert {'a': f(1)} == {'a': 2}", "assert bin(f(1)) == '0b10'", "assert 'abc'[f(1)] == 'c'",
]  # fmt: skip


def test_no_program_forges_a_result():
    """Each is wrong for each test: equal to everything, less and more, zero after subtraction, ...; and 2 is right."""
    for test in JUDGES:
        parsed = parse_tests([test])
        assert sandbox.test("def f(x): return 2", parsed.pieces, parsed.names).error is None, test
    for source in FORGERS:
        pieces = [parse_tests([test]).pieces for test in JUDGES]
        places = [len(sum(pieces[: place + 1], [])) - 1 for place in range(len(pieces))]
        result = sandbox.test(source, sum(pieces, []), ["f"], stops=False)
        passed = [JUDGES[number] for number, place in enumerate(places) if result.outcomes[place:] and not result.outcomes[place]]
        assert not passed, (source, passed)


@pytest.mark.parametrize("expected", ["Exception", "ValueError", "SystemExit"])
def test_a_program_that_ends_has_not_raised(expected):
    """Its end is an exception for the tests' process, which a test may expect."""
    test = f"try:\n    f(1)\n    assert False\nexcept {expected}:\n    pass"
    assert reward("import os\ndef f(x): os._exit(0)", [test]).reward == 0


def test_a_test_cannot_be_skipped_by_the_program():
    test = "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        f(1)\n        self.assertEqual(f(1), 2)"
    for source in ("import unittest\ndef f(x): raise unittest.SkipTest('x')", "class SkipTest(Exception): pass\ndef f(x): raise SkipTest"):
        assert reward(source, test).reason == "wrong"


def test_only_an_object_of_a_class_that_the_tests_make_is_asked_what_it_contains():
    everything = "class All:\n    def __contains__(self, x): return True\ndef f(x): return All()"
    assert reward(everything, ["assert 2 in f(1)"]).reward == 0
    assert reward(everything, ["assert 2 in All() and f(1) is not None and f(1) != 2 and 3 in All()"]).reward == 1
    assert reward("def f(x): return [x + 1]", ["assert 2 in f(1)"]).reward == 1
