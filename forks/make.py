"""Makes a script from one of ours and a fork, or several: writes it to the standard output.

    python forks/make.py gspo > my_grpo.py
    python forks/make.py gspo sequence_mean > my_grpo.py            both
    python forks/make.py sequence_mean --base ppo_rlvr.py > my_ppo.py

A fork is a file in this folder with what it changes and nothing else:

    functions, classes, constants    take the place of those of the same name; new ones are put before `main`
    class Args                       the fields that are new, or have another default
    LINES = {"old": "new"}           where a line of `main` has to change: the new text takes the place of the old one,
                                     and its further lines are indented as the line in which the old one stood
    BASE                             the script that it changes

There are no line numbers and no context in a fork, so it survives whatever happens around its functions. Flags and
functions that the script used and the result does not are taken out of it.

A fork is refused if it does not fit: if nothing uses what it brings, if a text of LINES does not stand in the script
exactly once, or if another fork changes the same thing.
tests/test_forks.py has the equation of each, and compares gradients: a new fork needs a case there.
"""

import argparse
import ast
import re
import sys
from functools import cache
from pathlib import Path

FORKS = Path(__file__).parent


class ForkError(Exception):
    """Forks that do not fit their script, or each other."""


def make(forks, base=None):
    """The text of a script with some forks applied.

    Args:
        forks: names of files in this folder. base: script to change; by default the first fork's BASE.

    Raises:
        ForkError: no such fork or script; two forks that change the same; or one that brings what nothing uses.
    """
    texts = {name: _read_fork(name) for name in forks}
    _check_apart(forks, texts)
    base = base or _constant(texts[forks[0]], "BASE")
    path = FORKS.parent / str(base)
    if not path.is_file():
        raise ForkError(f"{path}: no such script")
    original = path.read_text(encoding="utf-8")
    script = original
    for name, text in texts.items():
        script = _apply(text, _change_lines(name, text, script))
    script = _without_dead_functions(original, script)
    script = _without_dead_flags(original, script)
    elsewhere = {field for field in _fields(original) if not _reads(original, field)}  # common.py or rewards/ reads it
    for name, text in texts.items():
        unread = [field for field in _fields(text) if field not in elsewhere and not _reads(script, field)]
        if unread:
            raise ForkError(f"forks/{name}.py: nothing in {base} reads args.{unread[0]}")
    if unused(script):
        raise ForkError(f"nothing in the result calls {', '.join(unused(script))}: does this fork fit {base}?")
    papers = "\n\n".join(ast.get_docstring(_parse(text), clean=False).strip() for text in texts.values())
    made = f"Made by forks/make.py {' '.join(forks)}. Everything else is as in {base}:"
    script = script.replace('"""', f'"""{papers}\n\n{made}\n\n', 1)
    return script.replace(f'out: str = "runs/{path.stem}"', f'out: str = "runs/{"_".join(forks)}"')


def names():
    """All forks."""
    return sorted(path.stem for path in FORKS.glob("*.py") if path.stem != "make")


def unused(script):
    """Functions and classes of a script that nothing in it names."""
    tree = _parse(script)
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return [name for name in defined if name not in used]


@cache
def _parse(text):
    return ast.parse(text)


def _read_fork(name):
    if name not in names():
        raise ForkError(f"no fork is named {name}; there are {', '.join(names())}")
    return (FORKS / f"{name}.py").read_text(encoding="utf-8")


def _check_apart(forks, texts):
    """Raises ForkError if two forks change the same: one of them would be lost."""
    owner = {}
    for name in forks:
        flags = [f"--{field}" for field in _fields(texts[name])]
        lines = [repr(old) for old in _constant(texts[name], "LINES") or {}]
        for changed in [*_definitions(texts[name]), *flags, *lines]:
            if changed in owner:
                raise ForkError(f"{owner[changed]} and {name} both change {changed}: they cannot be combined")
            owner[changed] = name


def _apply(fork, script):
    for node in _parse(fork).body:
        if isinstance(node, ast.Import | ast.ImportFrom) and _source(fork, node) not in script:
            script = script.replace("\nimport numpy as np\n", f"\nimport numpy as np\n{_source(fork, node)}\n", 1)
    known = _fields(script)
    new = []
    for field, source in _fields(fork).items():
        if field in known:
            script = script.replace(known[field], source, 1)
        else:
            new.append(source)
    if new:
        script = script.replace("    # the algorithm\n", "    # the algorithm\n" + "\n".join(new) + "\n", 1)
    for name, source in _definitions(fork).items():
        known = _definitions(script)
        if name in known:
            script = script.replace(known[name], source, 1)
        else:
            script = script.replace("\ndef main(args):", f"\n{source}\n\n\ndef main(args):", 1)
    return script


def _change_lines(name, fork, script):
    """The script with what the fork's LINES change. Raises ForkError if one of the old texts is not there once."""
    for old, new in (_constant(fork, "LINES") or {}).items():
        if script.count(old) != 1:
            raise ForkError(f"forks/{name}.py: the script has {old!r} {script.count(old)} times, expected once")
        line = script[: script.index(old)].rpartition("\n")[2]  # what stands before the old text
        indent = line[: len(line) - len(line.lstrip())]
        script = script.replace(old, new.replace("\n", "\n" + indent))
    return script


def _without_dead_functions(original, script):
    """Takes out the functions that the original used and the script does not; and those that only these used."""
    used_then = set(_definitions(original)) - set(unused(original))
    while dead := used_then & set(unused(script)):
        for name in dead:
            script = script.replace("\n\n\n" + _definitions(script)[name], "", 1)
    return script


def _without_dead_flags(original, script):
    """Takes out the fields of Args that the original read and the script does not."""
    for field, source in _fields(script).items():
        if _reads(original, field) and not _reads(script, field):
            script = script.replace(source + "\n", "", 1)
    return script


def _reads(script, field):
    return re.search(rf"args\.{field}\b", script) is not None


def _definitions(text):
    """{name: source} of the functions, classes and constants of a file, but for Args, BASE and LINES."""
    found = {}
    for node in _parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = _source(text, node)
        if isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = _source(text, node)
    return {name: source for name, source in found.items() if name not in ("Args", "BASE", "LINES")}


def _fields(text):
    """{field: source} of a file's Args, the help behind or below it included; {} without Args."""
    classes = [node for node in _parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    statements = classes[0].body if classes else []
    fields = {}
    for node in statements:
        if isinstance(node, ast.AnnAssign):
            last = node.target.id
            fields[last] = _source(text, node)
        elif isinstance(node, ast.Expr):  # a string below the field
            fields[last] += "\n" + _source(text, node)
    return fields


def _constant(text, name):
    """The value of a constant of a file; None if it has none."""
    for node in _parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    return None


def _source(text, node):
    """The lines of a statement, with its decorators and the comment behind it."""
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno])


def main():
    """The command line. Raises ForkError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forks", nargs="+", metavar="FORK", help=", ".join(names()))
    parser.add_argument("--base", help="the script to change, by default the one that the fork is made for")
    args = parser.parse_args()
    print(make(args.forks, args.base), end="")


if __name__ == "__main__":
    try:
        main()
    except ForkError as error:
        sys.exit(f"error: {error}")
