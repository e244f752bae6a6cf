"""The README's examples run as they stand; its numbers and all tables are those of the committed results."""

import json
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
RESULTS = README.parent / "bench" / "results" / "cpu"


def test_it_has_an_example_of_each_part():
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("code", BLOCKS, ids=["lstm", "attention", "hessian"])
def test_example_runs(code):
    exec(compile(code, str(README), "exec"), {})


def test_its_pictures_and_links_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (README.parent / target).exists(), target


def test_tables_are_those_of_the_committed_results():
    pytest.importorskip("rich")
    from gatematch.bench.markdown import markdown

    drawn = set()
    for page in [README, *README.parent.glob("docs/**/*.md")]:
        tables = re.findall(r"<!-- table (.+?) -->\n(.*?)\n<!-- end -->", page.read_text(), re.DOTALL)
        assert len(tables) == page.read_text().count("<!-- table "), page
        for paths, table in tables:
            files = [README.parent / path for path in paths.split()]
            assert table == markdown(*files), f"{page}, run: gatematch-bench table {paths}"
            drawn.update(path.name for path in files)
    every = {path.name for path in README.parent.glob("bench/results/*/*.json")}
    assert drawn == every - {"check.json", "answers-seed1.json", "answers-seed2.json"}


def test_its_numbers_are_those_of_the_performance_page():
    """tests/test_performance.py compares those with the results."""
    page = " ".join((README.parent / "docs" / "performance.md").read_text().split())
    measured = " ".join(TEXT.split("## Measured")[1].split("\n## ")[0].split())
    *bullets, matcher = [bullet.strip() for bullet in measured.split("- **")[1:]]
    assert len(bullets) == 4
    for bullet in bullets:
        assert bullet in page, bullet
    for claim in ("7% slower an epoch", "448 questions to train on"):
        assert claim in matcher and claim in page


def test_its_other_numbers_are_those_of_the_committed_results():
    speed, hessian = (
        json.loads((RESULTS / f"{name}.json").read_text())["rows"] for name in ("speed", "hessian")
    )
    text = [row["time_to_random"] for row in speed if row["data"] == "text"]
    shape = next(row["shape"] for row in speed if row["case"] == "pairwise/sentences-300")
    (lstm,) = (row["parameters"] for row in hessian if row["case"] == "hessian/lstm")
    prose = " ".join(TEXT.split())
    for claim in (
        f"{min(text):.1f} to {max(text):.1f} times, since equal words",
        f"the Hessian of an LSTM with {lstm} parameters",
        f"{shape['B']} pairs of {shape['Q']}-word sentences with {shape['D']} features",
    ):
        assert claim in prose, claim
