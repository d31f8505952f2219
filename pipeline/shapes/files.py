"""Files of JSON lines, for all of pipeline/: read, and written whole or not at all."""

import contextlib
import json
import os
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
