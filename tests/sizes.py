"""Counts what a reader has to read: code lines, without blanks, comments and docstrings."""

import ast
import io
import tokenize
from pathlib import Path


def code_lines(path):
    """Set of line numbers of `path` that hold code."""
    source = Path(path).read_text(encoding="utf-8")
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))  # docstrings, and the strings after fields
    return lines


if __name__ == "__main__":
    for path in sorted([*Path(".").glob("*.py"), *Path("kernels").glob("*.py")]):
        print(f"{len(code_lines(path)):5d}  {path}")
