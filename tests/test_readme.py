"""README and the tables of docs/: what they show of code is in the code, what they show of results is in the results."""

import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import tables  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_heart_of_grpo_is_that_of_grpo():
    """Every line of README's excerpt stands in grpo.py, in this order."""
    [block] = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for line in block.splitlines() if line != "..."]
    assert len(lines) == 9
    script = [" ".join(line.split()) for line in (ROOT / "grpo.py").read_text(encoding="utf-8").splitlines()]
    places = [script.index(" ".join(line.split())) for line in lines]
    assert places == sorted(places)


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.stem)
def test_tables_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert tables.renewed(text) == text, f"{page.name}: run python docs/tables.py"
    assert text.count("<!-- table ") == len(tables.TABLE.findall(text))


def test_the_time_of_the_demo_is_that_of_the_results():
    assert f"[{tables.results('demo')['seconds']:.0f} s](benchmarks/results/demo.json) on two cores" in README
    assert tables.results("demo")["cores"] == 2 and tables.results("demo")["calls"] == 1


def test_every_table_is_shown():
    shown = {name for page in tables.PAGES for name in tables.TABLE.findall(page.read_text(encoding="utf-8"))}
    assert shown == tables.TABLES.keys()


def test_an_edited_table_is_put_right():
    page = "a\n<!-- table cards -->\n| 1 |\n<!-- end -->\nb\n"
    text = tables.renewed(page)
    assert text.startswith("a\n<!-- table cards -->\n| model |") and text.endswith("<!-- end -->\nb\n") and "| 1 |" not in text
    with pytest.raises(KeyError):
        tables.renewed(page.replace("cards", "none"))
