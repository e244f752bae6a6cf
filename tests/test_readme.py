"""The README's examples run as they stand; its tables, and the documents', are the committed results."""

import json
import pathlib
import re
from itertools import chain

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_it_has_an_example_of_each_part():
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("code", BLOCKS, ids=["lstm", "attention", "hessian"])
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

    documents = [README, *README.parent.glob("docs/*.md")]
    found = [
        re.findall(r"<!-- table (.+?) -->\n(.*?)\n<!-- end -->", d.read_text(), re.DOTALL) for d in documents
    ]
    assert sorted(map(len, found)) == [0, 0, 1, 1, 1, 2]
    for paths, table in chain(*found):
        files = [README.parent / path for path in paths.split()]
        assert table == markdown(*files), f"run: gatematch-bench table {paths}"


def test_its_other_numbers_are_those_of_the_committed_results():
    results = README.parent / "bench" / "results" / "cpu"
    answers, speed = (
        json.loads((results / f"{name}.json").read_text())["rows"] for name in ("answers", "speed")
    )
    (slower,) = (row["ratio"] for row in answers if row["case"] == "answers/time")
    cdist = [(row, row["peers"]["cdist, fast mode"]) for row in speed if "cdist, fast mode" in row["peers"]]
    memory = [peer["peak_bytes"] / row["ours"]["peak_bytes"] for row, peer in cdist if "ratio" in peer]
    wrong = max(peer["error"] for row, peer in cdist if row["data"] == "text")
    text = [row["time_to_random"] for row in speed if row["data"] == "text"]
    compiled = [row["peers"]["compiled expansion"] for row, _ in cdist]
    ratios = [peer["ratio"] for peer in compiled if "ratio" in peer]
    prose = " ".join(README.read_text().split())
    for claim in (
        f"{100 * (slower - 1):.0f}% slower an epoch",
        f"{min(memory):.1f} to {max(memory):.0f} times less memory",
        f"misses by up to {wrong:.2f}",
        f"{min(text):.1f}x to {max(text):.1f}x in the table",
        f"takes {min(ratios):.2f} to {max(ratios):.2f} of our time",
    ):
        assert claim in prose, claim
    (data,) = (row for row in answers if row["case"] == "answers/data")
    assert f"With {data['train']} questions to train on" in prose
    for name in ("answers", "answers-bcnn", "answers-abcnn1", "answers-abcnn2", "answers-abcnn3"):
        rows = {row["case"]: row for row in json.loads((results / f"{name}.json").read_text())["rows"]}
        model, bm25 = rows["answers/model"], rows["answers/bm25"]
        assert abs(model["map"] - bm25["map"]) < model["map_error"], "within one standard error of BM25"
    for seed in (1, 2):
        rows = json.loads((results / f"answers-seed{seed}.json").read_text())["rows"]
        scores = {row["case"]: row["map"] for row in rows if "map" in row}
        assert scores["answers/model+overlap"] > scores["answers/bm25"]
