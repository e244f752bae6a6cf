"""The documents' code runs as it stands, a page from its first block to its last, and prints what they say.

A fenced block of `text` right behind one of `python` is what that prints; GATEMATCH_WRITE_DOCS=1 writes it.
"""

import contextlib
import inspect
import io
import os
import re
from pathlib import Path
from types import ModuleType

import pytest
import scipy.sparse.linalg
import torch
import typer

import gatematch.attention
import gatematch.curvature
import gatematch.lstm
from gatematch.bench.__main__ import app

PACKAGES = [gatematch.lstm, gatematch.attention, gatematch.curvature]
ROOT = Path(__file__).parents[1]
PAGES = [page for page in sorted(ROOT.glob("docs/**/*.md")) if "```python" in page.read_text()]
WRITING = os.environ.get("GATEMATCH_WRITE_DOCS") == "1"
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n*```text\n(?P<prints>.*?)^```\n)?", re.DOTALL | re.MULTILINE
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_code_runs_and_prints_what_it_says(page: Path) -> None:
    text = page.read_text()
    names = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for block in BLOCK.finditer(text):
            if block["code"].startswith('--8<-- "examples/'):
                continue  # tests/test_examples.py runs it
            printed = io.StringIO()
            above = text[: block.start("code")].count("\n")  # so that a traceback names the page's own line
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * above + block["code"], str(page), "exec"), names)
            if block["prints"] is None:
                continue
            if WRITING:
                place = block.start("prints") - block.start()
                written = block[0][:place] + printed.getvalue() + block[0][place + len(block["prints"]) :]
                page.write_text(page.read_text().replace(block[0], written, 1))
            else:
                assert printed.getvalue() == block["prints"], f"{page}, block at line {above}"


def test_blocks_of_other_languages_are_few() -> None:
    """A block that is not run must not look like code."""
    for page in ROOT.glob("docs/**/*.md"):
        languages = re.findall(r"^ *```(.+)$", page.read_text(), re.MULTILINE)
        assert set(languages) <= {"python", "text", "sh"}, page


def test_the_references_code_runs() -> None:
    """That of docstrings: each block by itself, after the imports that its names need."""
    found = 0
    for package in PACKAGES:
        for name in package.__all__:
            for code in re.findall(
                r"^```python\n(.*?)^```", inspect.getdoc(getattr(package, name)) or "", re.S | re.M
            ):
                exec(code, vars(package) | {"torch": torch, "nn": torch.nn, "scipy": scipy})
                found += 1
    assert found == 3


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_the_reference_has_all_that_is_public(package: ModuleType) -> None:
    page = (ROOT / "docs" / "api" / f"{package.__name__.split('.')[1]}.md").read_text()
    shown = re.findall(rf"^::: {package.__name__}\.(\w+)$", page, re.MULTILINE)
    assert sorted(set(shown) - {"layouts"}) == sorted(package.__all__)


def test_the_reference_has_all_commands() -> None:
    commands = typer.main.get_command(app).commands
    page = (ROOT / "docs" / "api" / "bench.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(commands)
