"""Verifiers of programs: the published forms of tests, what judges accept, and which block is the program."""

import json
import time

import pytest

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
        ("from solution import *\nassert add(1, 2) == 3", "one by one"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": "1", "outputs": "2"}, "no tests; expected one of `tests`"),
        ({"questions": 1}, "no tests; expected one of `tests`"),
        ({"fn_name": "f", "inputs": ["x"], "outputs": ["1"]}, "test 1 is a call, but not in JSON"),
        ({"fn_name": "f", "inputs": [{"a": 1}], "outputs": [1]}, "test 1 needs `input`"),
        ([{"input": "1", "output": "1", "testtype": "interactive"}], "type 'interactive'; there are stdin"),
        ([{"input": "1", "output": "1", "testtype": "stdin"}, {"input": "1", "output": "1", "testtype": "functional"}], "several types"),
        ([{"input": "1", "output": "1", "fn_name": "f"}, {"input": "1", "output": "1", "fn_name": "g"}], "several functions: f, g"),
        ([{"input": [1], "output": 2}], "test 1 needs the strings `input` and `output` .a call of a function, `fn_name`"),
        ("eJxrYFacwgABEDAeAAyzAjY=", "no name that a program could define|not Python"),
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
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            program_in(completion, tests)
            best = min(best, time.process_time() - start)
        return best

    short, long = seconds(5000), seconds(20000)
    assert long < 0.05 or long < 10 * short, (short, long)


@pytest.mark.parametrize("make", [lambda n: "9" * n, lambda n: "." * n, lambda n: "1" + "e" * n, lambda n: "1." + "0" * n + "x", lambda n: "\n" * n, lambda n: " " * n, lambda n: "1 " * n])  # fmt: skip
def test_no_output_takes_more_than_its_length(make):
    def seconds(n):
        text = make(n)
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            same_output(text, text + "x")
            same_output(text, "1.5 " + text)
            best = min(best, time.process_time() - start)
        return best

    short, long = seconds(20000), seconds(80000)
    assert long < 0.05 or long < 10 * short, (short, long)


def test_code_blocks_have_a_language():
    assert code_blocks("```Python3 title=x\na\n```\n~~~c++\nb\n~~~\n```\nc\n```") == [("python3", "a\n"), ("c++", "b\n"), ("", "c\n")]
