"""Scripts made by forks/make.py, as modules."""

import importlib.util
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from conftest import CACHE, ROOT

sys.path.insert(0, str(ROOT / "forks"))

import make as forks  # noqa: E402


def base_of(name):
    """The script that a fork is made for: "grpo.py"."""
    return forks._constant((ROOT / "forks" / f"{name}.py").read_text(encoding="utf-8"), "BASE")


@lru_cache
def forked(*names, base=None):
    """The module that `python forks/make.py NAMES` makes; without names, the script itself."""
    base = base or (base_of(names[0]) if names else "grpo.py")
    stem = Path(base).stem
    if not names:
        return importlib.import_module(stem)
    path = Path(tempfile.mkdtemp(dir=CACHE), f"{stem}_{'_'.join(names)}.py")
    path.write_text(forks.make(list(names), base), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses and tyro look for it
    spec.loader.exec_module(module)
    return module
