"""Writes the line numbers of the pages' links to code, so that an edit of the code cannot make them wrong.

    python docs/links.py

A link shows the code that it leads to, and only the number behind #L is written anew:

    [`policy_loss`](../grpo.py#L246)                                   the definition, or the flag, of that name
    [`tokens = sampler.sample(`](../kernels/sampler.py#L1)             the one line that has this text
    [`policy_loss`: `ratio = logratio.exp()`](../grpo.py#L270)         the one line in that definition that has it

tests/test_docs.py fails when a number is old, or when the code that a link shows is no longer there.
"""

import ast
import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[`(?P<first>[^`]+)`(?:: `(?P<second>[^`]+)`)?\]\((?P<path>[\w./-]+)#L(?P<line>\d+)\)")


class LinkError(Exception):
    """The code that a link shows is not there, or stands in several lines."""


@cache
def definitions(path):
    """{name: (first line, last line)} of the functions, classes, their methods and fields, and constants of a file."""
    found = {}

    def add(nodes, prefix=""):
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.setdefault(prefix + node.name, (node.lineno, node.end_lineno))
                add(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.AnnAssign):
                name = f"--{node.target.id}" if prefix == "Args." else prefix + node.target.id
                found.setdefault(name, (node.lineno, node.end_lineno))
            elif isinstance(node, ast.Assign) and not prefix:
                found.setdefault(ast.unparse(node.targets[0]), (node.lineno, node.end_lineno))
            elif isinstance(node, ast.If):
                add(node.body, prefix)

    if path.suffix == ".py":
        add(ast.parse(path.read_text(encoding="utf-8")).body)
    return found


def line_of(path, first, second=None):
    """The line of a file where what a link shows stands. Raises LinkError."""
    if not path.is_file():
        raise LinkError(f"there is no {path.name}")
    first, second = (text and text.replace(r"\|", "|") for text in (first, second))  # a table's way to write it
    known = definitions(path)
    if second is None and first in known:
        return known[first][0]
    if second is not None and first not in known:
        raise LinkError(f"{path.name} does not define {first}")
    lines = path.read_text(encoding="utf-8").splitlines()
    start, end = known[first] if second else (1, len(lines))
    text = second or first
    places = [number for number in range(start, end + 1) if text in lines[number - 1]]
    if len(places) != 1:
        where = f"{first} of {path.name}" if second else path.name
        raise LinkError(f"{text!r} stands in {len(places)} lines of {where}; it has to be one")
    return places[0]


def renewed(page, text):
    """The text of a page with the line numbers of now. Raises LinkError, which names every link whose code is gone."""
    problems = []

    def link(match):
        try:
            line = line_of((page.parent / match["path"]).resolve(), match["first"], match["second"])
        except LinkError as error:
            problems.append(f"{page.name}: {error}")
            line = match["line"]
        return f"{match[0].rpartition('#L')[0]}#L{line})"

    text = LINK.sub(link, text)
    if problems:
        raise LinkError("\n".join(problems))
    return text


def main():
    """Rewrites the pages whose numbers are old. Raises LinkError, and writes nothing, if code is gone."""
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    new = {page: renewed(page, text) for page, text in texts.items()}
    for page in PAGES:
        if new[page] != texts[page]:
            page.write_text(new[page], encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: renewed")


if __name__ == "__main__":
    try:
        main()
    except LinkError as error:
        sys.exit(f"error: {error}")
