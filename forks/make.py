"""Makes a script from one of ours and a fork, or several: writes it to the standard output.

    python forks/make.py gspo > my_grpo.py
    python forks/make.py gspo sequence_mean > my_grpo.py            both
    python forks/make.py sequence_mean --base ppo_rlvr.py > my_ppo.py

A fork is a file in this folder with what it changes and nothing else: functions and classes that take the place of
those of the same name (new ones are put before `main`), and a class Args with the fields that are new or have another
default. BASE is the script that it changes. There are no line numbers and no context in a fork, so it survives
whatever happens around its functions; and it is refused when nothing calls what it brings.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

FORKS = Path(__file__).parent


class ForkError(Exception):
    """A fork that does not fit its script."""


def make(forks, base=None):
    """The text of a script with some forks applied, in the order given.

    Args:
        forks: names of files in this folder. base: script to change; by default the first fork's BASE.

    Raises:
        ForkError: no such fork or script, or one that brings a function or a flag that nothing uses.
    """
    texts = {name: _read(FORKS / f"{name}.py") for name in forks}
    base = base or re.search(r'^BASE = "(.*)"', texts[forks[0]], re.MULTILINE)[1]
    script = _read(FORKS.parent / base)
    for name, text in texts.items():
        script = _apply(name, text, script)
    if unused(script):
        raise ForkError(f"nothing in the result calls {', '.join(unused(script))}: does this fork fit {base}?")
    docstrings = [ast.get_docstring(ast.parse(text)) for text in texts.values()]
    heading = "\n\n".join(docstrings) + f"\n\nMade from {base} by forks/make.py {' '.join(forks)}. That is:\n\n"
    script = script.replace('"""', '"""' + heading, 1)
    return script.replace(f'out: str = "runs/{Path(base).stem}"', f'out: str = "runs/{"_".join(forks)}"')


def _read(path):
    if not path.is_file():
        raise ForkError(f"{path}: no such file")
    return path.read_text(encoding="utf-8")


def _apply(name, fork, script):
    for node in ast.parse(fork).body:
        source = _source(fork, node)
        if isinstance(node, ast.Import | ast.ImportFrom):
            if source not in script:
                script = script.replace("\nimport numpy as np\n", f"\nimport numpy as np\n{source}\n", 1)
        elif isinstance(node, ast.ClassDef) and node.name == "Args":
            script = _apply_fields(name, fork, node, script)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            script = _apply_definition(node.name, source, script)
    return script


def _apply_definition(defined, source, script):
    """Replaces a function or class, or puts a new one before `main`."""
    for node in ast.parse(script).body:
        if getattr(node, "name", None) == defined:
            return script.replace(_source(script, node), source, 1)
    return script.replace("\ndef main(args):", f"\n{source}\n\n\ndef main(args):", 1)


def _apply_fields(name, fork, args, script):
    """Sets fields of the script's Args: in their place, or at the head of the algorithm's."""
    for field in args.body:
        if isinstance(field, ast.AnnAssign):
            line = fork.splitlines()[field.lineno - 1]
            known = re.search(rf"^    {field.target.id}: .*$", script, re.MULTILINE)
            if known:
                script = script.replace(known[0], line, 1)
            else:
                script = script.replace("    # the algorithm\n", f"    # the algorithm\n{line}\n", 1)
            if f"args.{field.target.id}" not in script + fork:
                raise ForkError(f"forks/{name}.py: nothing reads args.{field.target.id}")
    return script


def _source(text, node):
    """The text of a definition with its decorators."""
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno])


def unused(script):
    """Functions and classes of a script that nothing in it names."""
    tree = ast.parse(script)
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return [name for name in defined if name not in used]


def main():
    """The command line. Raises ForkError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forks", nargs="+", metavar="FORK", help=", ".join(names()))
    parser.add_argument("--base", help="the script to change, by default the one that the fork is made for")
    args = parser.parse_args()
    print(make(args.forks, args.base), end="")


def names():
    """All forks."""
    return sorted(path.stem for path in FORKS.glob("*.py") if path.stem != "make")


if __name__ == "__main__":
    try:
        main()
    except ForkError as error:
        sys.exit(f"error: {error}")
