"""Every example runs, and what it writes has the rows of the committed results."""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).parent.parent
# These train for long as they stand; without the slow tests they run for less, further down.
LONG = ("answer_matching", "char_language_model", "gate_initialisation")
OWN_TESTS = ("fourteen_matrices", "hessian_spectrum")
EXAMPLES = [path.stem for path in sorted(ROOT.glob("examples/*.py")) if path.stem not in OWN_TESTS]


def run(example: str, *options: str | Path) -> str:
    """What it prints. It runs in this process: another one would import torch anew, for seconds."""
    command = [str(ROOT / "examples" / f"{example}.py"), *map(str, options)]
    printed, threads = io.StringIO(), torch.get_num_threads()
    with mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(printed):
        runpy.run_path(command[0], run_name="__main__")
    torch.set_num_threads(threads)
    return printed.getvalue()


@pytest.mark.parametrize(
    "example", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in EXAMPLES]
)
def test_example_runs(example: str) -> None:
    run(example)


def test_a_plain_interpreter_runs_one_and_prints_what_its_page_quotes() -> None:
    command = [sys.executable, "-I", ROOT / "examples" / "fourteen_matrices.py"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "examples" / "fourteen-matrices.md").read_text()
    (quoted,) = re.findall(r"^```text\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert set(quoted.splitlines()) <= set(printed.splitlines())


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


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        ("char_language_model", "--load nope.pt", "--load: there is no file nope.pt"),
        ("char_language_model", "--load tiny.txt", "--load: tiny.txt is not what --save writes"),
        (
            "char_language_model",
            "--text tiny.txt",
            "--text: tiny.txt has 11 characters, too few for --batch 8 ",
        ),
        ("char_language_model", "--text empty.txt", "--text: empty.txt has 0 characters, too few"),
        ("char_language_model", "--text .", "--text: . cannot be read: Is a directory"),
        ("char_language_model", "--text binary", "--text: binary is no text in UTF-8"),
        ("char_language_model", "--batch 1000000", "--text: the help has "),
        ("char_language_model", "--rate nan", "--temperature and --rate be positive"),
        ("char_language_model", "--temperature inf", "--temperature and --rate be positive"),
        ("char_language_model", "--seed -1", "--seed: must be 0 or more"),
        ("char_language_model", "--save .", "--save and --json must be files; . is a folder"),
        ("char_language_model", "--json .", "--save and --json must be files; . is a folder"),
        ("answer_matching", "--data nope.tsv", "--data: nope.tsv cannot be read: No such file"),
        ("answer_matching", "--data binary", "--data: binary is no text in UTF-8"),
        ("answer_matching", "--json .", "--json must be a file; . is a folder"),
        ("gate_initialisation", "--json .", "--json must be a file; . is a folder"),
        ("hessian_spectrum", "--json .", "--json must be a file; . is a folder"),
        ("hessian_spectrum", "--seed -1", "--seed: must be 0 or more"),
        ("hessian_spectrum", "--plot nowhere/x.svg", "--plot must be an .svg file in a folder that exists"),
        ("hessian_spectrum", "--plot x.txt", "--plot must be an .svg file in a folder that exists"),
    ],
)
def test_a_wrong_option_is_named(
    example: str, options: str, message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    for name, content in {"tiny.txt": b"hello world", "empty.txt": b"", "binary": b"\xff\xfe"}.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        run(example, *options.split())
    assert exit.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


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
    """With the default sizes, for which the program compares both of its ways."""
    pytest.importorskip("matplotlib")
    results, picture = tmp_path / "results.json", tmp_path / "spectrum.svg"
    run("hessian_spectrum", "--json", results, "--plot", picture)
    wrote(results, "example-hessian-spectrum")
    assert picture.read_text().rstrip().endswith("</svg>")
