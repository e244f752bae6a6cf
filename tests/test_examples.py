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


def results(name: str) -> dict[str, dict]:
    rows = json.loads((ROOT / "bench" / "results" / "cpu" / f"{name}.json").read_text())["rows"]
    return {row["case"].removeprefix("example/"): row for row in rows}


def prose(page: str) -> str:
    return " ".join((ROOT / "docs" / f"{page}.md").read_text().split())


def test_what_the_page_says_of_initialisations() -> None:
    rows, page = results("example-gate-initialisation"), prose("examples/gate-initialisation")
    solved = {name: int(row["solved"].removesuffix(" of 5")) for name, row in rows.items()}
    reach = {name: row["gradient, first step over last"] for name, row in rows.items()}
    W_hf, W_hg = ({name: row[f"gradient of W_h{gate}"] for name, row in rows.items()} for gate in "fg")
    default, zero, one, three, five = ("torch", *(f"torch, forget bias {bias}" for bias in (0, 1, 3, 5)))
    assert "torch's default learns nothing here**, nor does a forget gate bias of 0" in page
    assert all(rows[name]["accuracy"] < 0.13 and 1e-8 < reach[name] < 3e-8 for name in (default, zero))
    assert "with torch's other weights or as Keras does it, no seed" in page
    assert "as TensorFlow 1 does it, one of five" in page
    assert (solved[one], solved["keras"], solved["tf1"]) == (0, 0, 1)
    assert "A bias of 3 or 5 is**, for nearly all seeds" in page and solved[three] + solved[five] == 9
    assert "As much gradient then arrives" in page and min(reach[three], reach[five]) > 1
    assert "three seeds of five solve the task instead of none" in page
    assert solved["keras, recurrent matrices by gate"] == 3
    assert "All seeds solve it, although less gradient" in page
    assert solved["chrono"] == 5 and reach["chrono"] < reach[three]
    assert "W_hf gets a quarter of the gradient" in page and 0.2 < W_hf[five] / W_hf[three] < 0.3
    assert "while that of W_hg still grows" in page and W_hg[five] > W_hg[three]


def test_what_the_page_says_of_spectra() -> None:
    rows, page = results("example-hessian-spectrum"), prose("examples/hessian-spectrum")
    before, after = rows["before training"], rows["after training"]
    matcher = max(
        row.get("parameters", 0)
        for row in json.loads((ROOT / "bench" / "results" / "cpu" / "hessian.json").read_text())["rows"]
        if "matcher" in row["case"]
    )
    assert f"a model of {before['parameters']} parameters" in page
    assert f"a model of {matcher:,} parameters" in page
    assert "Here λ grows with training" in page
    assert after["largest eigenvalue"] > before["largest eigenvalue"]
    assert "they become fewer and smaller here, but do not vanish" in page
    assert before["exact share"] > after["exact share"] > 0 > after["smallest"] > before["smallest"]
    for row in rows.values():
        own = {gate: row[f"norm of W_h{gate}"] for gate in "ifgo"}
        assert "the cell gate g has the largest block" in page and max(own, key=own.get) == "g"


def test_what_the_page_says_of_matching() -> None:
    rows, page = results("example-answer-matching"), prose("examples/answer-matching")
    assert f"A random order has an MRR of {rows['random order']['MRR']}." in page
    gain = rows["model, trained"]["MRR"] - rows["words in common"]["MRR"]
    assert "nearly as large as what training gains" in page
    assert 0.7 < rows["model, trained"]["standard error"] / gain < 1
    assert abs(rows["model, untrained"]["MRR"] - rows["words in common"]["MRR"]) < 0.01
