"""The tests of a code row, read from the forms that data sets publish them in, or refused by name.

    "assert add(1, 2) == 3", ["assert add(1, 2) == 3", ...]             Python: MBPP, AceCoder, KodCode, HumanEval
    [{"input": "1 2\\n", "output": "3\\n"}, ...]                          programs that read stdin
    {"inputs": ["1 2\\n", ...], "outputs": ["3\\n", ...]}                 the same: APPS, TACO, DeepCoder, PRIME
    {"fn_name": "add", "inputs": [[1, 2], ...], "outputs": [3, ...]}    calls: APPS, TACO
    [{"input": "1\\n2", "output": "3", "testtype": "functional"}, ...]    calls: LiveCodeBench, JSON line by line

Each may be a JSON string, and each may stand under "tests" in an object with more to say:

    {"tests": ..., "entry_point": "add"}     what the program has to define, where the tests do not say it
    {"tests": ..., "score": "share"}         the reward is the share of tests passed (the pass rate); all are run
    {"tests": ..., "threshold": 0.99}        passed is a share of at least so much; with "score" too, less gives 0

Python tests are run as their authors' harness does: functions named test_... and classes named Test... are called as
pytest calls them, subclasses of unittest.TestCase by unittest, and HumanEval's `check` with the entry point.
"""

import ast
import builtins
import json
import sys
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from textwrap import dedent
from typing import NamedTuple


class Tests(NamedTuple):
    """What a program is to pass. One of `cases`, `calls` and `pieces` has entries.

    cases: (stdin, stdout) of a program that is run as a script.
    calls: (arguments, results that are right) of `function`; "" is the only function that the program has.
    pieces: Python, in order; `is_test` says which of them are tests, the others prepare what follows.
    names: of the program, that `pieces` use.
    """

    cases: list = []
    calls: list = []
    pieces: list = []
    is_test: list = []
    names: list = []
    function: str = ""
    share: bool = False
    threshold: float = 1.0


TESTS = ("tests", "test", "test_list", "test_cases", "input_output")  # fields that the tests stand in
SETUP = ("test_imports", "test_setup_code")  # MBPP's, Python that comes before
FUNCTION = ("fn_name", "func_name")  # of calls
STDIN = ("stdin", "stdin_stdout")
CALL = ("functional", "function_call")
SOLUTION = "solution"  # the module that KodCode's tests import the program from


def parse_tests(ground_truth) -> Tests:
    """The tests of a row. Raises ValueError, which says what is wrong and what helps."""
    return parse(json.dumps(ground_truth))


@lru_cache(maxsize=64)  # the completions of a group come one after another
def parse(ground_truth: str) -> Tests:
    """`parse_tests` of JSON."""
    given = read(json.loads(ground_truth))
    share = False
    threshold = None
    entry_points = []
    setup = []
    while isinstance(given, dict) and (field := next((name for name in TESTS if name in given), None)):
        share = share or parse_score(given.get("score", "all"))
        threshold = parse_threshold(given["threshold"]) if "threshold" in given else threshold
        entry_points = entry_points or as_list(given.get("entry_point"))
        setup += [line for name in SETUP for line in as_list(given.get(name))]
        given = read(given[field])
    if isinstance(given, dict):
        tests = parse_cases(as_cases(given), function_of(given))
    elif isinstance(given, list) and given and all(isinstance(test, dict) for test in given):
        tests = parse_cases(given, entry_points[0] if entry_points else "")
    else:
        tests = parse_python(given, setup, entry_points)
    if threshold is None:
        threshold = 0.0 if share else 1.0
    return tests._replace(share=share, threshold=threshold)


def read(given):
    """What JSON says, if it is a string that begins like an object, a list or a string of JSON; else what it is.

    Raises ValueError if such a string is neither JSON nor Python.
    """
    if not isinstance(given, str) or not given.lstrip().startswith(("{", "[", '"')):
        return given
    try:
        return read(json.loads(given))
    except json.JSONDecodeError as error:
        message = str(error)
    try:
        return ast.literal_eval(given)  # a list as Python prints it
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    try:
        ast.parse(given)  # an assertion may begin with a bracket too
        return given
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"neither JSON nor Python: {message}") from None


def as_list(value) -> list:
    """A value that may be missing, or one string, as a list."""
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]


def parse_score(score) -> bool:
    """Whether the reward is the share of tests passed. Raises ValueError."""
    if score not in ("all", "share"):
        raise ValueError(f'`score` is {score!r}; there are "all" and "share"')
    return score == "share"


def parse_threshold(threshold) -> float:
    """The share of tests from which on a program has passed. Raises ValueError."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold <= 1:
        raise ValueError(f"`threshold` is {threshold!r}, expected a share above 0, at most 1")
    return float(threshold)


# ---------------------------------------------------------------- cases and calls


def as_cases(given: dict) -> list[dict]:
    """[{"input": ..., "output": ...}] of {"inputs": [...], "outputs": [...]}, or of one case. Raises ValueError."""
    if "input" in given and "output" in given:
        return [given]
    inputs = given.get("inputs")
    outputs = given.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        known = ", ".join(f"`{name}`" for name in TESTS)
        raise ValueError(f"no tests; expected one of {known}, or lists `inputs` and `outputs`")
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
    pairs = zip(inputs, outputs, strict=True)
    return [{"input": stdin, "output": stdout, "type": given.get("type")} for stdin, stdout in pairs]


def function_of(given: dict) -> str:
    """The function that cases are calls of, as a row or a case names it, perhaps in its metadata; "" if it does not."""
    metadata = given.get("metadata")
    if isinstance(metadata, str):
        metadata = read(metadata)
    for source in (given, metadata if isinstance(metadata, dict) else {}):
        for field in FUNCTION:
            if source.get(field):
                return str(source[field])
    return ""


def parse_cases(cases: list[dict], function: str = "") -> Tests:
    """The tests in [{"input": ..., "output": ...}, ...]. Raises ValueError."""
    if not cases:
        raise ValueError("no tests")
    functions = {name for case in cases if (name := function_of(case) or function)}
    if len(functions) > 1:
        raise ValueError(f"tests of several functions: {', '.join(sorted(functions))}")
    kinds = {case.get("testtype") or case.get("type") or (CALL if functions else STDIN)[0] for case in cases}
    if unknown := kinds - {*STDIN, *CALL}:
        raise ValueError(f"tests of the type {sorted(unknown)[0]!r}; there are {', '.join(STDIN + CALL)}")
    if kinds <= set(STDIN):
        return Tests(cases=[parse_case(number, case) for number, case in enumerate(cases, 1)])
    if kinds <= set(CALL):
        calls = [parse_call(number, case) for number, case in enumerate(cases, 1)]
        return Tests(calls=calls, function=functions.pop() if functions else "")
    raise ValueError(f"tests of several types: {', '.join(sorted(kinds))}")


def parse_case(number: int, case: dict) -> tuple[str, str]:
    """(stdin, stdout). APPS also has lists of lines. Raises ValueError."""
    texts = []
    for name in ("input", "output"):
        text = case.get(name)
        if isinstance(text, list) and all(isinstance(line, str) for line in text):
            text = "\n".join(text)
        if not isinstance(text, str):
            raise ValueError(f"test {number} needs the strings `input` and `output` (a call of a function, `fn_name`)")
        texts.append(text)
    return tuple(texts)


def parse_call(number: int, case: dict) -> tuple[list, list]:
    """(arguments, results that are right).

    Strings hold JSON, one argument a line. Lists hold the arguments themselves, and most of APPS' results are lists of
    one, but not all. Raises ValueError.
    """
    given = case.get("input")
    result = case.get("output")
    if isinstance(given, list):
        results = [result, result[0]] if isinstance(result, list) and len(result) == 1 else [result]
        return given, results
    if not isinstance(given, str) or not isinstance(result, str):
        raise ValueError(f"test {number} needs `input`: a list of arguments, or JSON lines and JSON as `output`")
    try:
        return [json.loads(line) for line in given.split("\n") if line.strip()], [json.loads(result)]
    except ValueError as error:
        raise ValueError(f"test {number} is a call, but not in JSON: {error}") from None


# ---------------------------------------------------------------- tests in Python


def parse_python(given, setup: list, entry_points: list) -> Tests:
    """The tests in Python, as one string or a list of pieces. Raises ValueError."""
    pieces = [given] if isinstance(given, str) else given
    if not pieces or not isinstance(pieces, list) or pieces == [""]:
        raise ValueError("no tests; expected a list of Python strings, or of {input, output}")
    if isinstance(given, str) and given.startswith("eJ"):
        raise ValueError("compressed tests, as LiveCodeBench's private ones: give them as JSON")
    if not all(isinstance(piece, str) for piece in [*setup, *pieces, *entry_points]):
        raise ValueError("tests of several kinds; expected Python strings, or {input, output}")
    try:
        trees = [ast.parse(dedent(piece)) for piece in [*setup, *pieces]]
        targets = [ast.parse(entry_point, mode="eval") for entry_point in entry_points]
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"a test is not Python: {error}") from None
    bodies = [[kept for node in tree.body for kept in as_run(node)] for tree in trees]
    sources = [*setup, *pieces]
    for place, (tree, body) in enumerate(zip(trees, bodies, strict=True)):
        if body != tree.body or sources[place][:1].isspace():
            sources[place] = ast.unparse(body)
    if isinstance(given, str):  # so that the share of tests passed has more than one
        bodies = [[node] for body in bodies for node in body]
        sources = [ast.unparse(body) for body in bodies]
    calls = calls_of_tests([node for body in bodies for node in body], entry_points)
    entry_names = [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    names, imports = free_names(bodies, entry_names)
    if not names:
        raise ValueError("the tests use no name that a program could define (`entry_point` gives a built-in one)")
    used, bound, *_ = names_in([node for body in bodies for node in body])
    if entry_points and "candidate" in used - bound - set(names):
        imports.append(f"candidate = {entry_points[0]}")
    asserting = asserting_definitions([node for body in bodies for node in body])
    is_test = [any(asserts(node, asserting) for node in body if not isinstance(node, DEFINITION)) for body in bodies]
    is_test += [True] * len(calls)
    if not any(is_test):
        is_test = [True] * len(is_test)
    return Tests(pieces=imports + sources + calls, is_test=[False] * len(imports) + is_test, names=names)


FUNCTION_DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITION = (*FUNCTION_DEFINITION, ast.ClassDef)
RUNNERS = ("unittest.main", "pytest.main", "doctest.testmod")


def as_run(node: ast.stmt) -> list[ast.stmt]:
    """A statement as it is run here: what authors run as a script, without the calls of test runners.

    A bare comparison is asserted: by itself it tests nothing, whatever the program does. So is `np.allclose(...)`.
    """
    if isinstance(node, ast.If) and ast.unparse(node.test).replace('"', "'") == "__name__ == '__main__'":
        return [kept for inner in node.body for kept in as_run(inner)]
    if isinstance(node, ast.ImportFrom) and node.module == SOLUTION and node.names[0].name == "*":
        return []  # all names that tests do not define are the program's
    if isinstance(node, ast.Expr):
        if any(f"{runner}(" in ast.unparse(node) for runner in RUNNERS):
            return []
        if is_comparison(node.value):
            return [ast.copy_location(ast.Assert(node.value, None), node)]
    return [node]


QUESTIONS = ("all", "any", "bool", "isinstance", "isclose", "allclose", "array_equal")  # functions that only say so


def is_comparison(node: ast.expr) -> bool:
    """Whether an expression says what is true, and does nothing."""
    match node:
        case ast.Compare() | ast.UnaryOp(op=ast.Not()):
            return True
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name in QUESTIONS
        case ast.BoolOp(values=values):
            return all(map(is_comparison, values))
    return False


def calls_of_tests(nodes: list[ast.stmt], entry_points: list[str]) -> list[str]:
    """Source of the calls that a test runner would make.

    Args:
        nodes: the tests, all at the top level.

    Raises:
        ValueError: nothing would call a function with assertions.
    """
    top_level = [node for node in nodes if not isinstance(node, DEFINITION)]
    statements = [node.value for node in top_level if isinstance(node, ast.Expr)]
    called = {ast.unparse(value.func) for value in statements if isinstance(value, ast.Call)}
    defined = {node.name: node for node in nodes if isinstance(node, DEFINITION)}
    fixtures = {name for name, node in defined.items() if is_fixture(node)}
    calls = []
    for name, node in defined.items():
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("TestCase") for base in node.bases):
            calls.append(f"import harness\nharness.run_unittest({name})")
        elif isinstance(node, ast.ClassDef) and name.startswith("Test") and name not in called:
            calls.append(f"import harness\nharness.run_class({name}, globals())")
        elif isinstance(node, FUNCTION_DEFINITION) and name.startswith("test") and name not in called | fixtures:
            check_function(node, defined)
            calls.append(f"import harness\nharness.run_function({name}, globals())")
    if "check" in defined and "check" not in called and entry_points:
        calls.append(f"check({entry_points[0]})")
    reached = reachable(defined, [*top_level, *(ast.parse(call) for call in calls)])
    for name, node in defined.items():
        if name not in reached and asserts(node, set()):
            remedy = "; name the program's function as `entry_point`" if name == "check" else ""
            raise ValueError(f"nothing calls `{name}`, so the tests may test nothing: call it in a test{remedy}")
    return calls


def check_function(node: ast.stmt, defined: dict[str, ast.stmt]):
    """Raises ValueError if a test function cannot be called here as pytest would."""
    if isinstance(node, ast.AsyncFunctionDef):
        raise ValueError(f"the tests have `async def {node.name}`: there is no asyncio in the sandbox")
    decorators = " ".join(map(ast.unparse, node.decorator_list))
    required = node.args.args[: len(node.args.args) - len(node.args.defaults)]
    for parameter in (argument.arg for argument in required):
        if parameter not in defined and parameter not in decorators:
            raise ValueError(f"`{node.name}` wants the fixture `{parameter}`, which there is not")


def is_fixture(node: ast.stmt) -> bool:
    """Whether a function is a fixture of pytest: harness.py calls it for the tests that have it as a parameter."""
    return any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list)


def reachable(defined: dict[str, ast.stmt], start: list) -> set[str]:
    """The names of those definitions that code uses, directly or through others."""
    found = set()
    waiting = list(start)
    while waiting:
        tree = waiting.pop()
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in defined and node.id not in found:
                found.add(node.id)
                waiting.append(defined[node.id])
    return found


def asserts(node: ast.AST, asserting: set[str]) -> bool:
    """Whether code can fail by itself: an assertion, `raise`, a call of `assertEqual`, `pytest.raises`, `fail`, ..."""
    for inner in ast.walk(node):
        if isinstance(inner, (ast.Assert, ast.Raise)):
            return True
        name = getattr(inner, "attr", getattr(inner, "id", ""))
        if name in asserting or str(name).startswith(("assert", "raises", "fail")):
            return True
    return False


def asserting_definitions(nodes: list[ast.stmt]) -> set[str]:
    """The names of the functions and classes with assertions."""
    return {node.name for node in nodes if isinstance(node, DEFINITION) and asserts(node, set())}


# What tests forget to import.
LIBRARIES = ("math", "collections", "itertools", "functools", "heapq", "typing", "string")


def free_names(bodies: list[list[ast.stmt]], entry_points: list[str]) -> tuple[list[str], list[str]]:
    """The names that tests use and do not define: (those of the program, imports of the others as source).

    Those of the program are `entry_points`, or else what is left when the others are known. A program may not replace
    what judges it. So built-in names are not its own, nor is `math` in `math.isclose(...)`; nor `Counter`, `isclose`,
    `np`, unless there is no other name that it can define. Raises ValueError.
    """
    used, bound, modules, imported = names_in([node for body in bodies for node in body])
    bound.update(dir(builtins))
    names = used - bound - modules
    imports = [f"import {module}" for module in sorted(modules - bound)]

    known = library_names()
    if entry_points or imported or not names <= known.keys():
        forgotten = names & known.keys() - set(entry_points)
        imports += [known[name] for name in sorted(forgotten)]
        names -= known.keys()
    return sorted(entry_points or names | imported), imports


@lru_cache
def library_names() -> dict[str, str]:
    """Names that are often used without an import, and the import."""
    known = {}
    for module in LIBRARIES:
        library = import_module(module)
        for name in getattr(library, "__all__", dir(library)):
            known.setdefault(name, f"from {module} import {name}")  # `Counter` is that of collections, not of typing
    return known | {"np": "import numpy as np", "numpy": "import numpy"}


def names_in(nodes: list[ast.stmt]) -> tuple[set, set, set, set]:
    """Names in Python: (read, bound, modules of the standard library with a dot behind, imported from the program).

    Raises ValueError if it imports what is not there.
    """
    used = set()
    modules = set()
    imported = set()
    solutions = set()  # what the module of the program is called
    inner = [node for tree in nodes for node in ast.walk(tree)]
    for node in inner:
        match node:
            case ast.Attribute(value=ast.Name(id=name)) if name in sys.stdlib_module_names:
                modules.add(name)
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.ImportFrom(module=module, names=aliases):
                if module == SOLUTION:
                    imported.update(alias.name for alias in aliases)
                else:
                    check_module(module)
            case ast.Import(names=aliases):
                for alias in aliases:
                    if alias.name == SOLUTION:
                        solutions.add(alias.asname or SOLUTION)
                    else:
                        check_module(alias.name)
    for node in inner:
        match node:
            case ast.Attribute(value=ast.Name(id=name)) if name in solutions:
                imported.add(node.attr)
    return used, bound_names(inner), modules, imported


def bound_names(nodes) -> set[str]:
    """The names that nodes of Python bind, each by itself."""
    names = set()
    for node in nodes:
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()) | ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.alias(name=name, asname=asname):
                names.add(asname or name.split(".")[0])
    return names


def check_module(name: str | None):
    """Raises ValueError if tests cannot import a module."""
    top = (name or "").split(".")[0]
    try:
        is_there = top in sys.stdlib_module_names or find_spec(top) is not None
    except (ImportError, ValueError):
        is_there = False
    if not is_there:
        raise ValueError(f"the tests import `{name}`, which is not installed; the program's module is `{SOLUTION}`")
    if top == "asyncio":
        raise ValueError("the tests import `asyncio`, which the sandbox does not let run")
