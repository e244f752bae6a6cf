"""The README's examples run as they stand, each by itself, and what it shows and links to is there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=["lstm", "attention", "hessian"])
def test_example_runs(code: str) -> None:
    exec(compile(code, str(README), "exec"), {})


def test_its_pictures_and_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
