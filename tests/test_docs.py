"""What the pages promise: commands parse, links lead to what they show, and what docs/grpo.md says of k3 is so."""

import importlib
import itertools
import re
import shlex
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import tyro
from conftest import ROOT

import grpo

sys.path[:0] = [str(ROOT / "forks"), str(ROOT / "docs")]
import links  # noqa: E402
import make  # noqa: E402

SCRIPTS = ("sft", "reward_model", "dpo", "grpo", "ppo_rlvr")
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page):
    """The commands in the blocks of a page: a list of words each."""
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        if kind not in ("", "bash"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(("python ", "torchrun ")):
                yield shlex.split(line, comments=True)


def fork(words):
    """The module that `python forks/make.py ... > FILE` makes."""
    base = words[words.index("--base") + 1] if "--base" in words else None
    names = [word for word in words[2 : words.index(">")] if word not in ("--base", base)]
    module = sys.modules["made_for_docs"] = ModuleType("made_for_docs")
    exec(compile(make.make(names, base), words[-1], "exec"), module.__dict__)
    return module


def parse(page, words, module, name):
    """Fails unless a module's flags are those behind its name; "…" stands for more."""
    flags = list(itertools.takewhile(lambda word: word not in "<>", words[words.index(name) + 1 :]))
    kind = module.Args if hasattr(module, "Args") else module.Sft | module.Pairs | module.Prompts
    try:
        if "…" not in flags:
            tyro.cli(kind, args=flags, use_underscores=True)
    except SystemExit:
        pytest.fail(f"{page.name}: {shlex.join(words)}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}_{page.stem}")
def test_commands_parse(page):
    modules = {f"{name}.py": importlib.import_module(name) for name in SCRIPTS}
    for words in commands(page):
        script = next((word for word in words if word.endswith(".py")), None)
        if part := next((word for word in words if word.startswith("pipeline.")), None):
            parse(page, words, importlib.import_module(part), part)
            continue
        if script == "forks/make.py" and ">" in words:
            modules[words[-1]] = fork(words)
        elif script in modules and "--help" not in words:
            parse(page, words, modules[script], script)
        else:
            assert script is None or "/" in script or "--help" in words, f"{page.name}: no {script}"


def test_commands_are_found():
    found = {page.stem: len(list(commands(page))) for page in PAGES if page.parent.name != "recipes"}
    assert all(found[name] for name in (*SCRIPTS, "README")), found


@pytest.mark.parametrize("page", links.PAGES, ids=lambda page: page.stem)
def test_links_to_lines(page):
    """Each shows the code of its line. If only a number is old: python docs/links.py"""
    text = page.read_text(encoding="utf-8")
    found = [match["line"] for match in links.LINK.finditer(text)]
    written = re.findall(r"\]\((?!https?:)[^)]*#L\d+\)", text)
    assert len(found) == len(written), f"{page.name}: a link to a line that does not show its code"
    new = [match["line"] for match in links.LINK.finditer(links.renewed(page, text))]
    assert new == found, f"{page.name} has old line numbers: run python docs/links.py"


def test_a_link_whose_code_is_gone_is_named(tmp_path):
    (tmp_path / "code.py").write_text("A = 1\n\n\ndef f():\n    a = b\n\n\ndef g():\n    a = b\n    return a | b\n")
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()

    def renewed(code):
        return links.renewed(page, f"| [{code}](../code.py#L1) |")

    assert renewed("`f`").endswith("#L4) |") and renewed("`A`").endswith("#L1) |")
    assert renewed("`g`: `a = b`").endswith("#L9) |") and renewed(r"`return a \| b`").endswith("#L10) |")
    for code, message in {
        "`a = b`": "stands in 2 lines of code.py", "`g`: `b = a`": "stands in 0 lines of g", "`h`: `a = b`": "does not define h",
    }.items():  # fmt: skip
        with pytest.raises(links.LinkError, match=message):
            renewed(code)


def anchors(page):
    """The names by which GitHub links to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head).lower() for head in heads]
    return {re.sub(r"[^\w\- ]", "", head).replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}_{page.stem}")
def test_links_between_pages(page):
    """The file is there, and so is the heading."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not heading or not file.suffix == ".md" or heading in anchors(file), f"{page.name}: {target}"


def test_gradient_of_k3():
    """Equations (6) to (9) of docs/grpo.md and the repairs it names, in one state, by grpo.py's policy_loss."""
    torch.manual_seed(0)
    logits = torch.randn(50, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(50, dtype=torch.float64).log_softmax(0)
    old = torch.randn(50, dtype=torch.float64).softmax(0)
    log_pi = logits.log_softmax(0)
    pi = log_pi.exp()

    def gradient(loss):
        return torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]

    numbers = {"advantages": torch.zeros(50), "behaviour_logprobs": log_pi.detach(), "ref_logprobs": ref}
    tokens = SimpleNamespace(targets=torch.arange(50), extras=numbers)  # each token of the vocabulary once
    k3, metrics = grpo.policy_loss(grpo.Args(kl_beta=1.0), log_pi, tokens)

    forward = gradient(ref.exp() * (ref - log_pi))  # ∇ KL(π_ref || π)
    reverse = gradient(pi * (log_pi - ref))  # ∇ KL(π || π_ref)
    rho = pi / old
    torch.testing.assert_close((pi * metrics["ref_kl"]).sum(), (pi * (log_pi - ref)).sum())  # the value is unbiased
    torch.testing.assert_close(gradient(pi.detach() * k3), forward)  # (7)
    torch.testing.assert_close(forward, pi.detach() - ref.exp())
    torch.testing.assert_close(gradient(pi.detach() * k3.detach() * log_pi), reverse - forward)  # (9)
    torch.testing.assert_close(gradient(old * rho.detach() * k3), forward)
    torch.testing.assert_close(gradient(old * rho * k3), reverse)
    torch.testing.assert_close(gradient(old * rho.detach() * (ref - log_pi) ** 2 / 2), reverse)
    off_policy = gradient(old * k3)
    assert min((off_policy - known).norm() / known.norm() for known in (forward, reverse)) > 0.1
