"""What is imported can be installed: requirements*.txt name it, and requirements.lock pins a version of each."""

import ast
import re
import sys
from functools import lru_cache
from importlib.metadata import distribution, packages_distributions

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SCRIPTS = ["common.py", "sft.py", "reward_model.py", "dpo.py", "grpo.py", "ppo_rlvr.py"]
PRODUCT = ["kernels", "rewards", "pipeline", "demo", "forks"]  # folders of what a trainer uses
OURS = {*PRODUCT, "studies", "benchmarks", "docs"}
TRITON = "triton"  # what the kernels do without where it is missing; PyTorch for CUDA brings it
OPTIONAL = {"flash_attn", "peft", "torchao"}  # see "Optional" in docs/install.md


def requirements(name):
    """{name of a package: Requirement} of a file, and of those that it includes."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("-r "):
            found |= requirements(text.removeprefix("-r ").strip())
        elif text:
            requirement = Requirement(text)
            assert canonicalize_name(requirement.name) not in found, f"{name}: {requirement.name} twice"
            found[canonicalize_name(requirement.name)] = requirement
    return found


def locked():
    """{name of a package: its version in the lock file}."""
    found = {}
    for name, requirement in requirements("requirements.lock").items():
        (only,) = requirement.specifier
        assert only.operator == "==", requirement
        found[name] = only.version
    return found


def imports(path):
    """The modules that a file imports, at its top or within functions, without their submodules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def files(*parts):
    """The Python files that are parts of the project, or lie in its folders."""
    return [path for part in parts for path in ([ROOT / part] if part.endswith(".py") else (ROOT / part).rglob("*.py"))]


def foreign(*parts):
    """{module: a file that imports it}, of what is neither Python's nor the project's. parts: files and folders."""
    own = {path.stem for path in files(*SCRIPTS, *OURS, "tests")} | OURS
    found = {}
    for path in files(*parts):
        for module in imports(path) - own - sys.stdlib_module_names:
            found[module] = path.relative_to(ROOT)
    return found


def package(module):
    """The package that brings a module, by its name in requirements files."""
    return canonicalize_name(brought_by().get(module, [module])[0])


@lru_cache
def brought_by():
    """{module: the packages that bring it}, of what is installed."""
    return packages_distributions()


def test_every_import_of_the_product_is_required():
    needed = requirements("requirements.txt")
    modules = foreign(*SCRIPTS, *PRODUCT)
    assert {"torch", "filelock", "math_verify", "matplotlib", *OPTIONAL} <= set(modules)  # it looks at all of them
    missing = {m: str(path) for m, path in modules.items() if package(m) not in needed and m not in OPTIONAL | {TRITON}}
    assert missing == {}
    text = (ROOT / "requirements.txt").read_text() + (ROOT / "docs" / "install.md").read_text()
    for name in OPTIONAL:
        assert len(re.findall(rf"\b{name.replace('_', '.')}\b", text)) >= 2  # by name in both
    unused = set(needed) - {package(module) for module in modules}
    assert unused == set()


def test_tests_need_no_more_than_their_requirements():
    needed = requirements("requirements-test.txt")
    extra = {"lm_eval", "trl", "nltk", "immutabledict", "absl"} | OPTIONAL  # tests that want these are skipped without
    missing = {m: str(path) for m, path in foreign("tests").items() if package(m) not in needed and m not in extra}
    brought = {"packaging"}  # by pytest
    assert set(missing) - brought == set()


def test_the_lock_satisfies_the_ranges_and_holds_all():
    versions = locked()
    for name, requirement in requirements("requirements-test.txt").items():
        assert name in versions, f"{name} is not in requirements.lock: make lock"
        assert requirement.specifier.contains(versions[name]), f"{requirement}, but the lock has {versions[name]}"
    for name in requirements("requirements.txt"):  # with what these need in turn, here
        for text in distribution(name).requires or []:
            needed = Requirement(text)
            is_cuda = needed.name.startswith(("nvidia-", "cuda-"))  # each build of PyTorch pins its own
            if not is_cuda and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
                assert canonicalize_name(needed.name) in versions, f"{name} needs {needed}"


def test_a_lock_names_no_place():
    """Packages are pinned by version alone: no folder or server of whoever wrote it, and no local build."""
    text = (ROOT / "requirements.lock").read_text()
    assert re.findall(r"//|@|\+|file:|--", text) == []
    assert text.startswith("# This file was autogenerated by uv via the following command:\n#    make lock\n")


@pytest.mark.parametrize(
    "target, sources",
    [
        ("installed", {"requirements.txt", "requirements.lock"}),
        ("tests-installed", {".venv/installed", "requirements-test.txt"}),
    ],
)
def test_make_installs_again_when_files_change(target, sources):
    makefile = (ROOT / "Makefile").read_text()
    rule = re.search(rf"^\.venv/{target}: (.*)\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert set(rule[1].split()) == sources
    assert "$(INSTALL) --requirement" in rule[2] and "--constraint requirements.lock" in makefile


def test_benchmarks_pin_what_they_compare_with():
    needed = requirements("requirements-bench.txt")
    assert all(str(needed[name].specifier).startswith("==") for name in ("trl", "liger-kernel", "cut-cross-entropy"))
    assert set(requirements("requirements.txt")) < set(needed)
