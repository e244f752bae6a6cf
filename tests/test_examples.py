"""Every example runs as a user would run it: a plain interpreter, outside pytest."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What a page's results file holds of generated text, and the page's quotation of it.
SAMPLE = re.compile(r"(<!-- sample (?P<path>.+?) -->\n```text\n)(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = [page for page in sorted(ROOT.glob("docs/**/*.md")) if "<!-- sample " in page.read_text()]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path) -> None:
    done = subprocess.run([sys.executable, "-I", str(example)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_a_quoted_sample_is_that_of_the_results_file(page: Path) -> None:
    """Its long lines are broken on the page. GATEMATCH_WRITE_DOCS=1 writes it there."""
    quoted = list(SAMPLE.finditer(page.read_text()))
    assert len(quoted) == page.read_text().count("<!-- sample ")
    for block in quoted:
        sample = json.loads((ROOT / block["path"]).read_text())["meta"]["sample"]
        text = "".join(textwrap.fill(line, 80) + "\n" for line in sample.split("\n"))
        assert "```" not in text, "it would end the block"
        if os.environ.get("GATEMATCH_WRITE_DOCS") == "1":
            page.write_text(page.read_text().replace(block[0], f"{block[1]}{text}```"))
        else:
            assert block["text"] == text
