"""The rules that keep the scripts readable hold, and each rule notices when it is broken."""

import pytest
from readability import RULES, sources


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    assert not rule(sources())


def sibling(change):
    """sources() with a dpo.py that is sft.py after `change`."""
    files = sources()
    files["dpo.py"] = change(files["sft.py"])
    assert files["dpo.py"] != files["sft.py"]
    return files


def append(text):
    return lambda source: source + text


def replace(old, new):
    return lambda source: source.replace(old, new, 1)


@pytest.mark.parametrize(
    "rule, change, complaint",
    [
        ("same_name_same_source", replace("math.ceil(args.warmup_ratio", "math.floor(args.warmup_ratio"), "learning_rate"),
        ("same_flag_same_meaning", replace("seed: int = 1", "seed: int = 2"), "--seed"),
        ("same_flag_same_meaning", replace('"""peak learning rate"""', '"""rate"""'), "--lr"),
        ("no_dead_flag", replace("    seed: int = 1", "    unused: int = 1\n    seed: int = 1"), "--unused is never read"),
        ("no_dead_flag", append("\n    args.lr = 1\n"), "args.lr is overwritten"),
        ("sizes", append("\ndef f():\n" + "    x = 1\n" * 41), "f has 42 code lines"),
        ("sizes", append("\n# " + "x" * 119 + "\n"), "121 characters"),
        ("sizes", append("\ndef f():\n    if 1:\n     if 1:\n      if 1:\n       if 1:\n        pass\n"), "nests 4 deep"),
        ("differences", append("\nx = 1" * 201), "diff sft.py dpo.py: 202 lines"),
        ("imports", append("\nimport sft\n"), "dpo.py imports sft"),
        ("banned", append("\nimport pickle\n"), "pickle"),
        ("banned", append("\ntorch.load('x')\n"), "torch.load"),
    ],
)
def test_rule_notices(rule, change, complaint):
    rule = next(r for r in RULES if r.__name__ == rule)
    assert any(complaint in found for found in rule(sibling(change)))


def test_docstring_rule_notices():
    rule = next(r for r in RULES if r.__name__ == "public_docstrings")
    files = sources() | {"common.py": 'def f():\n    pass\n\ndef g():\n    """Does it."""\n    raise ValueError\n'}
    assert len(rule(files)) == 2
