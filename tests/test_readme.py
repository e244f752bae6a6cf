"""The README's examples run as they stand."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_it_has_an_example_of_each_half():
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("code", BLOCKS, ids=["lstm", "attention"])
def test_example_runs(code):
    exec(compile(code, str(README), "exec"), {})


def test_its_pictures_and_links_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"^[A-Z]{4,}$", README.read_text(), re.MULTILINE)


def test_its_tables_are_those_of_the_committed_results():
    pytest.importorskip("rich")
    from gatematch.bench.markdown import markdown

    tables = re.findall(r"<!-- table (\S+) -->\n(.*?)\n<!-- end -->", README.read_text(), re.DOTALL)
    assert len(tables) == 2
    for path, table in tables:
        assert table == markdown(README.parent / path), f"run: gatematch-bench table {path}"
