"""Files of rows, for all of pipeline/: read, and written whole or not at all."""

import contextlib
import json
import os
import re
from pathlib import Path

import common


def lines_of(path):
    """Yields (number, row) of a file of JSON lines, without `datasets`' cache: samples are large. Raises DataError."""
    number = 0
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield number, json.loads(line)
    except OSError as error:
        raise common.DataError(path, None, error.strerror) from None
    except ValueError as error:
        raise common.DataError(path, number, common.first_line(error)) from None


def rows_of(source):
    """As common.read_rows; a row that is a list becomes an object with columns "0", "1", …, as `datasets` reads it."""
    if not holds_lists(Path(source)):
        yield from common.read_rows(source)
        return
    try:
        text = Path(source).read_text(encoding="utf-8")
        if source.endswith(".json"):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        objects = [{str(i): part for i, part in enumerate(row)} for row in rows]
    except (TypeError, ValueError) as error:
        raise common.DataError(source, None, f"begins with a row that is a list, but: {error}") from None
    yield from enumerate(objects, 1)


def holds_lists(path):
    """Whether the first row of a JSON file is a list."""
    begins = {".json": r"\s*\[\s*\[", ".jsonl": r"\s*\["}.get(path.suffix)
    if begins is None or not path.is_file():
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        return re.match(begins, file.read(1000)) is not None


@contextlib.contextmanager
def writing(path):
    """Yields a file, open for text, that becomes `path` once all is on disk; after an error nothing of it stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
