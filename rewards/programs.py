"""Verifiers of programs: `code` (also called `code_stdio`) and `code_share`.

A program is right if it passes the tests of the row (see program_tests.py) in a sandbox (sandbox.py). Of several blocks
of code in a completion `program_in` says which is the program.
"""

import ast
import builtins
import json
import re
import textwrap
import warnings
from functools import lru_cache

from rewards import sandbox, verifiers
from rewards.equality import same_output
from rewards.program_tests import LIBRARIES, Tests, bound_names, library_names, parse_tests
from rewards.verifiers import Verdict, not_judged, verifier

SECONDS = 20  # of processor time and sleep, for all tests of a program; tests that are left then have failed
ENOUGH = SECONDS + 25  # for a verdict: the last test may take 10 s in each of two processes, and the pool waits for it


# ---------------------------------------------------------------- the verdict


@verifier("code", "code_stdio", gold=parse_tests, seconds=ENOUGH)
def passes_tests(completion, tests):
    """1 if the program passes all tests, or what the row asks for. What it does too slowly or fatally is wrong."""
    program = program_in(completion, tests)
    if program is None:
        return Verdict(0.0, "unparsed")
    stops = not tests.share and tests.threshold == 1
    failures, is_late = run(program, tests, stops)
    passed = failures.count(None)
    first = next((f"test {number} of {len(failures)}: {line}" for number, line in enumerate(failures, 1) if line), "")
    answer = first if stops else f"{passed} of {len(failures)} tests passed{first and '; '}{first}"
    reward = share = passed / len(failures)
    if not tests.share or share < tests.threshold:
        reward = float(share >= tests.threshold)
    if reward and (stub := vacuous(tests)):
        return not_judged("bad_ground_truth", f"the tests pass for a program that {stub}")
    if reward == 1:
        return Verdict(1.0, "right", answer or "all tests passed")
    return Verdict(reward, "timeout" if is_late else "wrong", answer)  # a judgement: the program is to blame


def parse_for_share(ground_truth) -> Tests:
    """`parse_tests`, with the share of tests passed as the reward."""
    return parse_tests(ground_truth)._replace(share=True, threshold=0.0)


@verifier("code_share", gold=parse_for_share, seconds=ENOUGH)
def share_of_tests(completion, tests):
    """The share of the tests that the program passes."""
    return passes_tests(completion, tests)


def run(program: str, tests: Tests, stops: bool) -> tuple[list[str | None], bool]:
    """For each test None or what went wrong, and whether the program was too slow for one, or slept.

    The first failure ends them if it `stops`; the tests behind it have failed too.
    """
    if tests.cases:
        failures, is_late = run_cases(program, tests.cases, stops)
        total = len(tests.cases)
    elif tests.calls:
        pieces = call_pieces(tests.function or only_function(program), tests.calls)
        total = len(pieces)
        failures, is_late = run_pieces(with_imports(program), Tests(pieces=pieces, is_test=[True] * total), stops)
    else:
        failures, is_late = run_pieces(with_imports(program, tests.names), tests, stops)
        total = sum(tests.is_test)
    return failures + ["not run"] * (total - len(failures)), is_late


def run_cases(program: str, cases: list[tuple[str, str]], stops: bool) -> tuple[list[str | None], bool]:
    """`run` for a program that reads stdin: in a new process for each case."""
    failures = []
    seconds = 0.0
    is_late = False
    for stdin, expected in cases:
        result = sandbox.run(program, stdin, verifiers.SANDBOX)
        seconds += result.seconds
        error = result.error
        if error is None and not same_output(result.printed, expected):
            error = f"printed {result.printed.strip()[:100]!r}"
        is_late = is_late or result.is_late
        failures.append(error)
        if seconds > SECONDS and len(failures) < len(cases):
            failures.append(f"more than {SECONDS} s for all tests")
            return failures, True
        if error and stops:
            break
    return failures, is_late


def run_pieces(program: str, tests: Tests, stops: bool) -> tuple[list[str | None], bool]:
    """`run` for tests in Python: in one process, and in another for the tests behind one in which the program ended."""
    failures = []
    seconds = 0.0
    is_late = False
    left = list(range(len(tests.pieces)))
    while any(tests.is_test[place] for place in left) and seconds <= SECONDS:
        pieces = [tests.pieces[place] for place in left]
        result = sandbox.test(program, pieces, tests.names, verifiers.SANDBOX, stops)
        seconds += result.seconds
        is_late = is_late or result.is_late
        outcomes = result.outcomes
        if len(outcomes) < len(left) and not any(outcomes[-1:]):
            outcomes.append(result.error or "the tests have ended")  # the process was stopped in that test
        last = left[len(outcomes) - 1]
        for place, outcome in zip(left, outcomes, strict=False):
            if tests.is_test[place]:
                failures.append(outcome)
            elif outcome:  # what prepares the tests behind it
                return [*failures, outcome], is_late
        if stops:
            break
        left = [place for place in left if place > last or not tests.is_test[place]]
    return failures, is_late


def call_pieces(function: str, calls: list[tuple[list, list]]) -> list[str]:
    """Tests in Python of calls: (arguments, results that are right)."""
    pieces = []
    for call in calls:
        arguments = f"{function!r}, *json.loads({json.dumps(call)!r})"
        pieces.append(f"import harness, json\nharness.check_call({arguments})")
    return pieces


def with_imports(program: str, names=("Solution",)) -> str:
    """A program with the imports that its authors' harness has for it.

    LeetCode's and LiveCodeBench's have those of many libraries, for a class Solution and for calls. HumanEval's has the
    prompt's, which are names of `typing`. A script has to have its own.
    """
    tree = parse_python(program)
    missing = missing_names(tree)
    lines = []
    for name in sorted(missing & library_names().keys()):
        line = library_names()[name]
        if "Solution" in names or line.startswith("from typing"):
            lines.append(line)
    if "Solution" in names:
        lines += [f"import {name}" for name in sorted(missing & set(LIBRARIES))]
    if not lines or "__future__" in program:
        return program
    return "; ".join(lines) + "\n" + program


def missing_names(tree: ast.Module) -> set[str]:
    """The names that a program reads and does not bind."""
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return loaded - dir_of(tree)


def dir_of(tree: ast.Module) -> set[str]:
    """All names that a program binds anywhere, and the built-in ones."""
    return bound_names(ast.walk(tree)) | set(dir(builtins))


def only_function(program: str) -> str:
    """The function that a program is called by, where the row names none: the only one that nothing in it uses.

    Of a class Solution, if there is one. "" if there are several, or none.
    """
    body = bound_by(program)
    if "Solution" in body and isinstance(body["Solution"], ast.ClassDef):
        body = {node.name: node for node in body["Solution"].body if isinstance(node, ast.FunctionDef)}
    functions = [name for name, node in body.items() if isinstance(node, ast.FunctionDef) and name[0] != "_"]
    used = {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(parse_python(program))}
    unused = [name for name in functions if name not in used] if len(functions) > 1 else functions
    return unused[0] if len(unused) == 1 else ""


# ---------------------------------------------------------------- tests that test nothing


def vacuous(tests: Tests) -> str | None:
    """What a program does that does nothing and passes all tests: it raises, or returns an object of no use."""
    if tests.cases:
        return "prints nothing" if all(not expected.strip() for _, expected in tests.cases) else None
    if tests.calls or any(is_plain_assertion(piece, tuple(tests.names)) for piece in tests.pieces):
        return None
    stubs = ("raises an exception", "returns an object of no use")
    passing = passing_stubs(tuple(tests.pieces), tuple(tests.names), stubs)
    return passing[0] if passing else None


@lru_cache(maxsize=1000)
def passing_stubs(pieces: tuple, names: tuple, which: tuple) -> list[str]:
    """The stubs (harness.STUBS) that pass tests in Python."""
    return sandbox.stubs(list(pieces), list(names), list(which), verifiers.SANDBOX)


@lru_cache(maxsize=1000)
def is_plain_assertion(piece: str, names: tuple[str, ...]) -> bool:
    """Whether Python is `assert f(...) == ...`, with a literal on the right: nothing that raises or is equal to nothing
    passes that."""
    match ast.parse(piece).body:
        case [ast.Assert(test=ast.Compare(left=ast.Call(func=ast.Name(id=name)), ops=[ast.Eq()], comparators=[right]))]:
            try:
                ast.literal_eval(right)
            except (ValueError, TypeError, MemoryError, RecursionError):
                return False
            return name in names
    return False


# ---------------------------------------------------------------- the program in a completion


def program_in(completion: str, tests: Tests) -> str | None:
    """The program: of the closed ```python blocks, else of those without a language, the last that is what tests need.

    That is a block which defines what they call (all of it, if there is such a block), or one that reads input and
    prints, where the tests have input. Examples of use, tests and output may follow it, in blocks of their own. If no
    block is that, the last one. A block that is not closed was cut off, and is no program.
    """
    blocks = code_blocks(completion)
    python = [code for language, code in blocks if is_python(language)]
    unlabelled = [code for language, code in blocks if not language]
    for group in (python, unlabelled):
        for is_needed in needs(tests):
            fitting = [place for place, code in enumerate(group) if is_needed(code)]
            if fitting:
                return with_helpers(group[fitting[-1]], group[: fitting[-1]])
    return next((group[-1] for group in (python, unlabelled) if group), None)


def with_helpers(program: str, earlier: list[str]) -> str:
    """A program behind those of the earlier blocks that define what it uses and does not define."""
    parts = [program]
    missing = missing_names(parse_python(program))
    for code in reversed(earlier):
        if not missing:
            break
        tree = parse_python(code)
        if defined := missing & dir_of(tree):
            parts.insert(0, code)
            missing = (missing - defined) | missing_names(tree)
    return "\n".join(parts)


def needs(tests: Tests) -> list:
    """What makes a block the program, the surest sign first: functions of its code."""
    if tests.cases:
        if not any(stdin.strip() for stdin, _ in tests.cases):
            return []
        return [lambda code: reads(code) and prints(code), reads]
    names = set(tests.names) or {tests.function}
    if names == {""}:
        return [only_function]
    if tests.calls:
        return [lambda code: bool(names & defined_in(code, names)) or f"def {tests.function}(" in code]
    return [lambda code: names <= defined_in(code, names), lambda code: bool(names & defined_in(code, names))]


def is_python(language: str) -> bool:
    """Whether the word behind a fence says Python. `pycon` is a dialogue with it."""
    is_dialogue = any(word in language for word in ("repl", "console", "traceback"))
    return language in ("py", "py3", "pypy", "pypy3") or (language.startswith("python") and not is_dialogue)


FENCE = re.compile(r"(`{3,}|~{3,})[ \t]*\{?\.?([\w+-]*)")
GUESSES = 20  # of places where a block may end behind code; each costs the parsing of the block


def code_blocks(completion: str) -> list[tuple[str, str]]:
    """[(language, code), ...] of the closed blocks between fences of ``` or ~~~.

    A fence begins a line. A block may also begin at the end of a line of text, and end at the end of a line of code.
    A fence that is indented by four blanks more than that of the block is a line of code, as in CommonMark: perhaps of
    a docstring, so it ends the block only if that is whole.
    """
    blocks = []
    fence = None  # of the block that is open
    guesses = 0
    for line in completion.splitlines(keepends=True):
        text = line.strip()
        depth = len(line) - len(line.lstrip())
        marks = FENCE.match(text)
        if fence is None:
            if marks and is_python(marks[2].lower()) and text.endswith(marks[1]):  # all of it in one line
                blocks.append(("python", text[marks.end() : -len(marks[1])].strip() + "\n"))
                continue
            if not marks and text.count("```") == 1:
                marks = FENCE.fullmatch(text, text.find("```"))
            if marks:
                fence = marks[1]
                language = marks[2].lower()
                deepest = depth + 3
                lines = []
        elif marks and marks[1].startswith(fence) and not marks[2] and depth <= deepest:
            blocks.append((language, textwrap.dedent("".join(lines))))
            fence = None
        else:
            lines.append(line)
            if text.endswith(fence) and guesses < GUESSES:
                guesses += 1
                code = textwrap.dedent("".join(lines)).rstrip()[: -len(fence)] + "\n"
                if not is_python(language) or parse_python(code).body:
                    blocks.append((language, code))
                    fence = None
    return blocks


def parse_python(code: str) -> ast.Module:
    """The tree of a program; an empty one if it is not Python."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes that are none, "\d"
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def bound_by(code: str) -> dict[str, ast.stmt]:
    """What a program defines or assigns at its top level, also within `if` and `try`: {name: statement}."""
    found = {}
    waiting = parse_python(code).body[::-1]
    while waiting:
        node = waiting.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found[node.name] = node
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)]
                found |= dict.fromkeys(names, node)
            case ast.If() | ast.Try() | ast.With() | ast.For() | ast.While():
                parts = [node.body, getattr(node, "orelse", []), getattr(node, "finalbody", [])]
                parts += [handler.body for handler in getattr(node, "handlers", [])]
                waiting += [inner for part in parts for inner in part][::-1]
    return found


def defined_in(code: str, names: set[str]) -> set[str]:
    """Those of the names that a program defines. It need not be valid Python: then a line has to look like it."""
    if found := bound_by(code):
        return names & found.keys()
    pattern = r"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+{0}\b|^{0}[ \t]*="
    return {name for name in names if re.search(pattern.format(re.escape(name)), code, re.MULTILINE)}


def reads(code: str) -> bool:
    """Whether a program reads its standard input, and does not replace it, as an example of use may."""
    tree = parse_python(code)
    if not tree.body:
        return "input(" in code or "stdin" in code
    is_read = False
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr="stdin", ctx=ast.Store()):
                return False
            case ast.Attribute(attr="stdin") | ast.alias(name="stdin" | "fileinput"):
                is_read = True
            case ast.Name(id="input", ctx=ast.Load()):
                is_read = True
            case ast.Call(func=ast.Name(id="open"), args=[ast.Constant(value=0 | "/dev/stdin"), *_]):
                is_read = True
            case ast.Call(func=ast.Attribute(attr="read" | "fdopen"), args=[ast.Constant(value=0), *_]):
                is_read = True
    return is_read


def prints(code: str) -> bool:
    """Whether a program writes something."""
    names = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(parse_python(code))}
    return bool(names & {"print", "write", "writelines", "stdout"})
