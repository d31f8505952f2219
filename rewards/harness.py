"""How the tests of a data set are run: the tests' process of sandbox.py, and what it brings for the kinds of tests.

Imported by that process, together with remote.py. `programs.py` writes calls of the functions below into the tests.
"""

import json
import os
import signal
import sys
from functools import partial
from types import GeneratorType

from equality import is_same
from remote import Channel, End, Remote, name_class, operate_for_program, remote_object


def run_tests(source: str, channel: Channel, report: int):
    """Runs the tests and ends the process, with status 1 if one fails.

    Args:
        source: JSON of the names of the program that the tests use, the tests, and whether the first failure ends them.
        channel: to the program's process.
        report: a file that gets a line of JSON for each test: null, or what went wrong. The tests behind one in which
            the program ends have none.
    """
    names, tests, stops = json.loads(source)
    program = End(channel, operate_for_program, remote_object).stand_in(0, "solution")
    sys.modules["solution"] = program
    namespace = {"__name__": "tests"}
    problem = None
    try:
        for name in names:
            namespace[name] = getattr(program, name)
            if isinstance(namespace[name], Remote) and name[0].isupper():
                name_class(namespace[name])
    except (Exception, SystemExit) as error:
        problem = error
    has_failed = False
    for test in tests:
        line = run_test(test, namespace, problem)
        if channel.has_ended:
            line = "the program has ended"  # whatever the test has made of that
        os.write(report, json.dumps(line).encode() + b"\n")
        has_failed = has_failed or line is not None
        if has_failed and (stops or channel.has_ended):
            break
    os._exit(has_failed)


def run_test(test: str, namespace: dict, problem=None) -> str | None:
    """What goes wrong in a piece of Python, in one line; None if nothing does.

    Args:
        problem: an exception that came up before, and that the piece is taken to raise.
    """
    try:
        if problem:
            raise problem
        exec(compile(test, "test.py", "exec"), namespace)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None


# ---------------------------------------------------------------- as pytest and unittest run tests


def run_function(function, namespace: dict):
    """Calls a test as pytest does: with its fixtures, and once for each set of parameters. Raises what it raises."""
    for parameters in parameter_sets(function):
        for definition in namespace.values():
            if is_fixture(definition) and definition._fixture_function_marker.autouse:
                fixture(definition, namespace)
        given = dict(parameters)
        for name in parameter_names(function):
            if name not in given and name in namespace:
                given[name] = fixture(namespace[name], namespace)
        function(**given)


def parameter_sets(function) -> list[dict]:
    """What `pytest.mark.parametrize` asks for; [{}] without."""
    sets = [{}]
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = [*mark.args, *mark.kwargs.values()][:2]
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
            rows = [getattr(value, "values", value) if hasattr(value, "marks") else value for value in values]
            if len(names) == 1:
                rows = [row if hasattr(value, "marks") else [row] for row, value in zip(rows, values, strict=True)]
            sets = [known | dict(zip(names, row, strict=True)) for known in sets for row in rows]
    return sets


def parameter_names(function) -> list[str]:
    """The names of a function's parameters without a default, but for `self`."""
    code = getattr(function, "__func__", function).__code__
    names = code.co_varnames[: code.co_argcount - len(function.__defaults__ or ())]
    return [name for name in names if name != "self"]


def is_fixture(definition) -> bool:
    """Whether something in the tests is a fixture of pytest's."""
    return type(definition).__name__ == "FixtureFunctionDefinition"


def fixture(definition, namespace: dict):
    """The value of a fixture of pytest's. What follows its `yield` is not run."""
    function = definition._get_wrapped_function() if is_fixture(definition) else definition
    value = function(**{name: fixture(namespace[name], namespace) for name in parameter_names(function)})
    return next(value) if isinstance(value, GeneratorType) else value


def run_class(kind: type, namespace: dict):
    """Runs the test methods of a class, as pytest does: each on an instance of its own. Raises what one raises."""
    for name in [name for name in dir(kind) if name.startswith("test")]:
        instance = kind()
        for prepare in ("setup_class", "setup_method", "setUp"):
            if hasattr(instance, prepare):
                function = getattr(instance, prepare)
                function(*[None] * len(parameter_names(function)))
        fixtures = {name: getattr(instance, name) for name in dir(kind) if is_fixture(getattr(kind, name))}
        run_function(getattr(instance, name), namespace | fixtures)


class NothingTested(AssertionError):
    """All tests of a class were skipped, or there are none."""


def run_unittest(kind: type):
    """Runs a unittest.TestCase. Raises AssertionError for the first test that fails; NothingTested."""
    import unittest

    result = unittest.TestResult()
    result.failfast = True
    unittest.defaultTestLoader.loadTestsFromTestCase(kind).run(result)
    for problem in (*result.failures, *result.errors):
        lines = problem[1].strip().splitlines()
        raise AssertionError(f"{problem[0].id()}: {lines[-1]}")
    if result.unexpectedSuccesses:
        raise AssertionError(f"{result.unexpectedSuccesses[0].id()} was to fail")
    if len(result.skipped) == result.testsRun:
        raise NothingTested(f"no test of {kind.__name__} was run")


def check_call(name: str, given: list, results: list):
    """Raises AssertionError unless a function of the program, or a method of its Solution, returns a right result."""
    solution = sys.modules["solution"]
    try:
        function = getattr(solution, name)
    except AttributeError:
        function = getattr(solution.Solution(), name)
    returned = function(*given)
    if not any(is_same(returned, result) for result in results):
        raise AssertionError(f"returned {returned!r}"[:100])


# ---------------------------------------------------------------- programs that do nothing


class Anything:
    """An object that can be called and has every attribute, and that is equal to nothing else.

    Whether two of them are equal it does not say: `Point(1) == Point(1)` and `Point(1) != Point(2)` test something.
    """

    def __init__(self, attribute=None):
        self._attribute = attribute or self

    def __call__(self, *given, **named):
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._attribute

    def __eq__(self, other):
        if isinstance(other, Anything) and other is not self:
            raise NotWritten
        return self is other

    __hash__ = object.__hash__


class NotWritten(Exception):
    """What a stub raises: no test can expect it."""


def raises(*given, **named):
    """A stub. Raises NotWritten."""
    raise NotWritten


def returning(value):
    """A stub that returns a value, whatever it is given; a new one each time, if it can be changed."""
    return lambda *given, **named: [] if value == [] else value


STUBS = {
    "raises an exception": raises,
    "returns an object of no use": returning(Anything()),
    "returns None": returning(None),
    "returns 0": returning(0),
    "returns ''": returning(""),
    "returns []": returning([]),
    "returns True": returning(True),
}
STUB_SECONDS = 1  # of processor time, for all tests of one stub: `while f(x)` may not end


def stand_in(name: str, stub: str):
    """A stub in the place of a name of the program; for a name like a class's, what makes objects of such methods."""
    if stub == "raises an exception" or not name[:1].isupper():
        return STUBS[stub]
    method = None if stub == "returns an object of no use" else STUBS[stub]
    return lambda *given, **named: Anything(method)


def run_stubs(source: str, report: int):
    """Runs tests on stubs, in this process, and ends it. The name of each stub that passes is a line of `report`.

    Args:
        source: JSON of the names of the program that the tests use, the tests, and some of the names in STUBS.
    """
    names, tests, which = json.loads(source)
    signal.signal(signal.SIGVTALRM, raises)
    for stub in which:
        solution = sys.modules["solution"] = type(sys)("solution")
        solution.__getattr__ = partial(stand_in, stub=stub)
        namespace = {"__name__": "tests"} | {name: stand_in(name, stub) for name in names}
        signal.setitimer(signal.ITIMER_VIRTUAL, STUB_SECONDS)
        problems = (run_test(test, namespace) for test in tests)
        if all(problem is None or problem.startswith("NothingTested") for problem in problems):
            os.write(report, json.dumps(stub).encode() + b"\n")
    os._exit(0)
