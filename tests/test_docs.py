"""The documents' code runs as it stands, a page from its first block to its last, and prints what they say.

A fenced block of `text` right behind one of `python` is what that prints; GATEMATCH_WRITE_DOCS=1 writes it.
"""

import contextlib
import functools
import inspect
import io
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

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
MARKDOWN = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = [page for page in MARKDOWN[1:] if "```python" in page.read_text()]
MAKE = set(re.findall(r"^([\w-]+)(?::| \?=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXAMPLES = {str(path.relative_to(ROOT)) for path in ROOT.glob("examples/*.py")}
COMMANDS = typer.main.get_command(app).commands
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
            if re.fullmatch(r'--8<-- "examples/\w+\.py"\n', block["code"]):
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


def stray(text: str) -> list[str]:
    """Lines that look like code but begin no block that is run, or refused by its language, nor end one."""
    found, inside, above = [], False, ""
    for line in text.splitlines():
        indented = re.match(r"[>*+-]?( {4}|\t)\s*\S", line)
        if re.match(r"[\s>*+-]*(```|~~~)", line):
            if line not in (["```"] if inside else ["```python", "```text", "```sh"]):
                found.append(line)
            inside = not inside
        elif indented and not inside and not above.startswith(":::"):  # which has options
            found.append(line)
        above = above if indented else line
    return found


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_code_escapes(page: Path) -> None:
    """A block that is not run must not look like code."""
    text = page.read_text()
    assert not stray(text)
    assert text.count("```python") == len(BLOCK.findall(text))


@pytest.mark.parametrize(
    "block",
    [
        "- In a list:\n\n  ```python\n  x = 1\n  ```\n",
        "- ```python\n  x = 1\n  ```\n",
        "> ```python\n> x = 1\n> ```\n",
        "~~~python\nx = 1\n~~~\n",
        "```\nx = 1\n```\n",
        "```py\nx = 1\n```\n",
        "```python \nx = 1\n```\n",
        '```python title="x"\nx = 1\n```\n',
        "````python\nx = 1\n````\n",
        "```python\nx = 1\n ```\n",
        "Prose:\n\n    x = 1\n",
        "# Title\n\tx = 1\n",
        ">     x = 1\n",
    ],
)
def test_code_that_would_escape_is_seen(block: str) -> None:
    assert stray(block)
    assert not stray("Prose:\n\n```python\nif x:\n    y = 1\n```\n\n```text\n1\n```\n\n- a\n  b\n")


@functools.cache
def options_of(example: str) -> set[str]:
    shown = io.StringIO()
    asked = mock.patch.object(sys, "argv", [example, "--help"])
    with asked, contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / example), run_name="__main__")
    return set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", shown.getvalue(), re.MULTILINE))


def unknown(line: str) -> set[str]:
    """What a line of shell asks for that is not there."""
    words = shlex.split(line, comments=True)
    options = {word.partition("=")[0] for word in words if word.startswith("-")}
    match words:
        case [] | ["pip", "install", *_] | ["git", *_]:
            return set()
        case ["python", example, *_] if example in EXAMPLES:
            return options and options - options_of(example)
        case ["gatematch-bench", name, *_]:
            if (command := COMMANDS.get(name)) is None:
                return {name}
            known = (option for each in command.params for option in (*each.opts, *each.secondary_opts))
            return options - {"--help", *known}
        case ["make", *targets]:
            return {target.partition("=")[0] for target in targets} - MAKE
    return {line}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_the_shell_is_told_exists(page: Path) -> None:
    for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            assert not unknown(line)


@pytest.mark.parametrize(
    "line",
    [
        "python examples/none.py",
        "python examples/swap_lstm.py --json x",
        "python -m gatematch.bench",
        "gatematch-bench none",
        "gatematch-bench speed --none=1",
        "make none",
        "make speed NONE=1",
        "pip download torch",
        "rm -r out",
    ],
)
def test_what_is_not_there_is_seen(line: str) -> None:
    assert unknown(line)


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
    page = (ROOT / "docs" / "api" / "bench.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(COMMANDS)
