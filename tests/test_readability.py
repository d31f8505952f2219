"""The rules that keep the scripts readable hold, and each rule notices when it is broken."""

import pytest
from conftest import ROOT
from readability import PLUMBING, RULES, sources


def rule_named(name):
    return next(rule for rule in RULES if rule.__name__ == name)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    assert not rule(sources())


def append(text):
    return lambda source: source + text


def replace(old, new):
    def change(source):
        assert old in source
        return source.replace(old, new, 1)

    return change


def on_first_page(line):
    """A line put before the training loop."""
    return replace("    for step in range(", f"    {line}\n    for step in range(")


def main_last(source):
    """`main` behind the plumbing."""
    begin, end = source.index("def main(args)"), source.index("# ----", source.index("def main(args)"))
    return source[:begin] + source[end:] + source[begin:end]


@pytest.mark.parametrize(
    "rule, change, complaint",
    [
        ("newspaper_order", main_last, "dpo.py: the plumbing is not last"),
        ("newspaper_order", lambda source: source.replace("(1)", "(0)"), "dpo.py does not begin with its equations"),
        ("newspaper_order", replace("def evaluate(", "class Args:\n    pass\n\n\ndef evaluate("), "dpo.py: its first page is"),
        ("plumbing", replace("math.ceil(args.warmup_ratio", "math.floor(args.warmup_ratio"), "the end of dpo.py differs"),
        ("plumbing", append("\n# one more"), "the end of dpo.py differs"),
        ("same_name_same_source", replace("math.ceil(args.warmup_ratio", "math.floor(args.warmup_ratio"), "learning_rate"),
        ("same_flag_same_meaning", replace("seed: int = 1", "seed: int = 2"), "--seed"),
        ("same_flag_same_meaning", replace("# peak learning rate", "# rate"), "--lr"),
        ("same_flag_same_meaning", replace("seed: int = 1", "seed: int"), "--seed has no default"),
        ("same_flag_same_meaning", replace("  # peak learning rate", ""), "--lr has no help"),
        ("no_dead_flag", replace("    seed: int = 1", "    unused: int = 1\n    seed: int = 1"), "--unused is never read"),
        ("no_dead_flag", append("\n    args.lr = 1\n"), "args.lr is overwritten"),
        ("plain_first_page", on_first_page("if x := 1: pass"), "x := 1"),
        ("plain_first_page", on_first_page("a, b = 1, 'x'"), "a, b = (1, 'x')"),
        ("plain_first_page", on_first_page("a |= {}"), "a |= {}"),
        ("plain_first_page", on_first_page("a = 'x' * True"), "'x' * True"),
        ("plain_first_page", on_first_page("step += 1"), "step += 1"),
        ("sizes", append("\n# " + "x" * 119 + "\n"), "121 characters"),
        ("sizes", append("\ndef f():\n    if 1:\n     if 1:\n      if 1:\n       if 1:\n        pass\n"), "nests 4 deep"),
        ("sizes", append("\ndef f(a, b, c, d, e, f, g):\n    pass\n"), "f has 7 parameters"),
        ("differences", replace("@dataclass", "x = 1\n" * 201 + "@dataclass"), "the first pages of sft.py and dpo.py: 201 lines"),
        ("amount", replace("@dataclass", "# more\n" * 30 + "x = 1\n" * 500 + "@dataclass"), "dpo.py: the loop begins at line"),
        ("amount", replace("@dataclass", "x = 1\n" * 500 + "@dataclass"), "dpo.py: tokens of the first page:"),
        ("imports", append("\nimport sft\n"), "dpo.py imports sft"),
        ("banned", append("\nimport pickle\n"), "pickle"),
        ("banned", append("\ntorch.load('x')\n"), "torch.load"),
    ],
)  # fmt: skip
def test_rule_notices(rule, change, complaint):
    """In a dpo.py that is sft.py after `change`."""
    files = sources()
    files["dpo.py"] = change(files["sft.py"])
    assert files["dpo.py"] != files["sft.py"]
    found = rule_named(rule)(files)
    assert any(complaint in each for each in found), found


def test_long_plumbing_is_noticed():
    files = {name: text.replace(PLUMBING, PLUMBING + "\n#" * 400) if PLUMBING in text else text for name, text in sources().items()}
    assert any("lines of plumbing, limit 400" in complaint for complaint in rule_named("plumbing")(files))


def test_dense_code_is_noticed():
    files = {**sources(), "kernels/dense.py": "x = [" + "1, " * 10 + "]\n"}
    assert rule_named("amount")(files) == ["kernels/dense.py: 24.0 tokens a code line, limit 10.5"]


def test_a_circle_of_imports_is_noticed():
    files = sources()
    files["rewards/verifiers.py"] += "\nfrom rewards.jobs import combine\n"
    found = rule_named("imports")(files)
    assert {f"rewards/{name}.py is in a circle of imports" for name in ("verifiers", "jobs")} == set(found)


def test_a_file_beside_the_scripts_is_noticed():
    assert rule_named("top_level")({**sources(), "helpers.py": ""}) == ["helpers.py stands beside the scripts"]


def test_docstring_rule_notices():
    files = {**sources(), "common.py": 'def f():\n    pass\n\ndef g():\n    """Does it."""\n    raise ValueError\n'}
    assert len(rule_named("public_docstrings")(files)) == 2


def test_a_file_of_the_pipeline_is_read_in_one_sitting():
    limits = {path.name: 100 if path.stem == "chat" else 250 for path in (ROOT / "pipeline").glob("*.py")}
    lines = {name: len((ROOT / "pipeline" / name).read_text(encoding="utf-8").splitlines()) for name in limits}
    assert len(limits) > 10 and not {name: count for name, count in lines.items() if count > limits[name]}
