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
# These train for long as they stand; without the slow tests they run for less, further down.
LONG = ("answer_matching", "char_language_model", "gate_initialisation")
# What a page's results file holds of generated text, and the page's quotation of it.
SAMPLE = re.compile(r"(<!-- sample (?P<path>.+?) -->\n```text\n)(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = [page for page in sorted(ROOT.glob("docs/**/*.md")) if "<!-- sample " in page.read_text()]


def run(example: str, *options: str | Path) -> str:
    """What it prints."""
    command = [sys.executable, "-I", ROOT / "examples" / f"{example}.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "example",
    [pytest.param(path.stem, marks=[pytest.mark.slow] * (path.stem in LONG)) for path in EXAMPLES],
)
def test_example_runs(example: str) -> None:
    run(example)


def wrote(path: Path, name: str) -> dict:
    """The meta data of a results file with the rows and columns of the committed one."""
    written, committed = (
        json.loads(file.read_text()) for file in (path, ROOT / "bench" / "results" / "cpu" / f"{name}.json")
    )
    columns = [[(row["case"], *row) for row in results["rows"]] for results in (written, committed)]
    assert columns[0] == columns[1]
    return written["meta"]


def test_a_language_model_of_a_text_is_saved_and_loaded(tmp_path: Path) -> None:
    text, model, results = (tmp_path / name for name in ("mine.txt", "model.pt", "results.json"))
    text.write_text("The naïve λ, the Λ. " * 50, encoding="utf-8")
    small = ("--steps", "2", "--hidden-size", "8", "--batch", "2", "--window", "8")
    trained = run(
        "char_language_model", "--text", text, *small, "--length", "20", "--save", model, "--json", results
    )
    sample = wrote(results, "example-char-language-model")["sample"]
    assert sample.startswith("The ") and len(sample) == 24 and set(sample) <= set(text.read_text("utf-8"))
    assert trained.endswith(f"\n{sample}\n")
    assert run("char_language_model", "--load", model, "--length", "20") == f"\n{sample}\n"


def test_matching_of_pairs_of_a_file_answers_a_question(tmp_path: Path) -> None:
    pairs, results = tmp_path / "pairs.tsv", tmp_path / "results.json"
    pairs.write_text(
        "".join(f"what is number {n}\tit is called name{n}\n" for n in range(160)), encoding="utf-8"
    )
    printed = run(
        "answer_matching", "--data", pairs, "--epochs", "1", "--ask", "What is number 7?", "--json", results
    )
    wrote(results, "example-answer-matching")
    assert "120 questions to train on, 40 held out, 20 answers each" in printed
    assert re.search(r"^Q: What is number 7\?\nA: it is called name\d+$", printed, re.MULTILINE)


def test_initialisations_are_written(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    small = ("--steps", "5", "--hidden", "4", "--updates", "2", "--seeds", "1")
    run("gate_initialisation", *small, "--json", results)
    wrote(results, "example-gate-initialisation")


def test_spectra_are_written_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results, picture = tmp_path / "results.json", tmp_path / "spectrum.svg"
    run("hessian_spectrum", "--steps", "2", "--hidden", "2", "--json", results, "--plot", picture)
    wrote(results, "example-hessian-spectrum")
    assert picture.read_text().rstrip().endswith("</svg>")


def test_what_the_page_quotes_of_the_fourteen_arrays() -> None:
    page = (ROOT / "docs" / "examples" / "fourteen-matrices.md").read_text()
    (quoted,) = re.findall(r"^```text\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    printed = run("fourteen_matrices").split("\n\n")[0].splitlines()
    assert set(quoted.splitlines()) <= set(printed)
    assert f"It prints the place of each array, {len(printed)} lines of this kind" in page


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
    reach = {name: row["first / last"] for name, row in rows.items()}
    W_hf, W_hg = ({name: row[f"W_h{gate}"] for name, row in rows.items()} for gate in "fg")
    default, zero, one, three, five = ("torch", *(f"torch, forget bias {bias}" for bias in (0, 1, 3, 5)))
    assert "torch's default learns nothing here**, nor does a forget gate bias of 0" in page
    assert all(rows[name]["accuracy"] < 0.13 and 1e-8 < reach[name] < 3e-8 for name in (default, zero))
    assert "with torch's other weights or as Keras does it, no seed" in page
    assert "as TensorFlow 1 does it, one of five" in page
    assert (solved[one], solved["keras"], solved["tf1"]) == (0, 0, 1)
    assert "A bias of 3 or 5 is**, for nearly all seeds" in page and solved[three] + solved[five] == 9
    assert "At least as much gradient then arrives" in page and min(reach[three], reach[five]) > 1
    assert "three seeds of five solve the task instead of none" in page
    assert solved["keras, recurrent matrices by gate"] == 3
    assert "All seeds solve it, although less gradient" in page
    assert solved["chrono"] == 5 and reach["chrono"] < reach[three]
    assert "W_hf gets a quarter of the gradient" in page and 0.2 < W_hf[five] / W_hf[three] < 0.3
    assert "while that of W_hg still grows" in page and W_hg[five] > W_hg[three]


def test_what_the_page_says_of_spectra() -> None:
    rows, page = results("example-hessian-spectrum"), prose("examples/hessian-spectrum")
    before, after = (
        {name: row[f"{when} training"] for name, row in rows.items()} for when in ("before", "after")
    )
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
    share, smallest = "share below -0.01, exact", "smallest eigenvalue"
    assert before[share] > after[share] > 0 > after[smallest] > before[smallest]
    assert "the cell gate g has the largest block, before and after" in page
    for when in (before, after):
        assert max("ifgo", key=lambda gate: when[f"norm of W_h{gate}"]) == "g"


def test_what_the_page_says_of_matching() -> None:
    rows, page = results("example-answer-matching"), prose("examples/answer-matching")
    assert f"A random order has an MRR of {rows['random order']['MRR']}." in page
    gain = rows["trained - untrained"]
    assert "training gains more than two standard errors in MRR, and nothing in accuracy at 1" in page
    assert gain["MRR"] > 2 * gain["standard error"] and gain["accuracy at 1"] <= 0
    means = rows["model, trained"]["MRR"], rows["model, untrained"]["MRR"]
    assert abs(means[0] - means[1] - gain["MRR"]) < 0.0016, "each is rounded to a thousandth"
