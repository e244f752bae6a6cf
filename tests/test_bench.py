"""The benchmark's own machinery: cases, errors, timing, results files and the commands."""

import copy
import json
import os
import re
import runpy
import select
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from gatematch.attention import pairwise_sums
from gatematch.bench import cases, check, pairwise_problems, plots, problems, progress, speed
from gatematch.bench.__main__ import app
from gatematch.bench.markdown import markdown
from gatematch.bench.overview import overview
from gatematch.bench.plots import draw
from gatematch.bench.problems import Case
from gatematch.bench.results import describe_machine, read_results, write_results
from gatematch.bench.timing import measure, peak_bytes

CPU = torch.device("cpu")
SMALL = [
    Case("pairwise/tiny", {"B": 2, "Q": 5, "A": 6, "D": 8}),
    Case("pairwise/tiny", {"B": 2, "Q": 40, "A": 40, "D": 50}, "text"),
    Case("pairwise/tiny", {"B": 2, "Q": 9, "A": 7, "D": 8}, "offset"),
    Case("lstm/tiny", {"T": 3, "B": 2, "I": 4, "H": 5}, options={"compiled": True}),
    Case("lstm/lengths", {"T": 9, "B": 4, "I": 4, "H": 5}, options={"lengths": True, "batch_first": True}),
    Case("lstm/cell", {"T": 1, "B": 2, "I": 4, "H": 5}, options={"cell": True}),
]


@pytest.fixture(scope="module")
def measured():
    return speed.run_speed(SMALL, CPU, seconds=0.0, compiled=False)


@pytest.fixture
def rows(measured):
    return copy.deepcopy(measured)


def test_speed_rows_hold_times_errors_and_ratios(rows, tmp_path):
    assert len(rows) == 2 * len(SMALL)
    for row in rows:
        assert row["ours"]["status"] == "timed" and row["ours"]["median"] > 0, row
        assert row["ours"]["error"] <= row["bound"]
        assert (row["ours"]["gradient_error"] is None) == (row["mode"] == "forward")
        if row["mode"] != "forward":
            assert row["ours"]["gradient_error"] < 1e-4
        assert ("time_to_random" in row) == (row["data"] != "random")
        for peer in row["peers"].values():
            assert peer["status"].startswith("skipped") or peer["status"] == "wrong" or peer["ratio"] > 0
    # The expansion is wrong for equal words, which is marked and not timed.
    assert rows[2]["peers"]["cdist, fast mode"]["status"] == "wrong"
    path = tmp_path / "deep" / "speed.json"
    write_results(path, describe_machine(CPU), rows)
    table = markdown(path).splitlines()
    assert len([line for line in table if line.startswith(("| pairwise/", "| lstm/"))]) == len(SMALL)
    assert "| wrong by " in next(line for line in table if "tiny, text" in line)
    assert not any(line.startswith("- ") for line in table), "on a CPU what is slower is in the table"


def test_a_wrong_result_of_ours_is_marked_not_timed(monkeypatch):
    monkeypatch.setattr(
        pairwise_problems, "pairwise_attention", lambda q, a, impl: pairwise_problems.cdist_exact(q, a) + 1e-3
    )
    monkeypatch.setattr(cases, "CASES", SMALL)
    result = CliRunner().invoke(
        app, ["speed", "--filter", "tiny random", "--seconds", "0.01", "--no-compiled"]
    )
    assert result.exit_code == 1 and "- WRONG: pairwise/tiny random float32 forward\n" in result.output
    line = next(line for line in result.output.splitlines() if line.startswith("| pairwise/tiny |"))
    assert line.split(" | ")[3] == "–", "no time"


def test_wrong_gradients_of_ours_are_marked_not_timed(monkeypatch):

    def scaled(q, a, impl):
        S = pairwise_problems.cdist_exact(q, a)
        return S.detach() + 2 * (S - S.detach())

    monkeypatch.setattr(pairwise_problems, "pairwise_attention", scaled)
    forward, both = speed.run_speed(SMALL[:1], CPU, seconds=0.0, compiled=False)
    assert forward["ours"]["status"] == "timed" and both["ours"]["status"] == "wrong"


def test_a_slower_peer_has_a_ratio_above_one(monkeypatch):
    def slow(q, a):
        time.sleep(0.002)
        return pairwise_problems.cdist_exact(q, a)

    monkeypatch.setattr(pairwise_problems, "broadcast", slow)
    row, _ = speed.run_speed(SMALL[:1], CPU, seconds=0.0, compiled=False)
    assert row["peers"]["broadcast"]["ratio"] > 2 and row["peers"]["broadcast"]["median"] > 2  # ms


def test_data_of_the_cases():
    q, a = pairwise_problems.rows(SMALL[2], CPU, "offset")
    assert 8 < q.mean() < 12 and 8 < a.mean() < 12
    q, a = pairwise_problems.rows(SMALL[1], CPU, "text")
    equal = (q[:, :, None] == a[:, None]).all(-1).float().mean()
    assert 0.002 < equal < 0.06  # about 1.6% of pairs in text of this vocabulary


def test_bounds_are_those_of_the_contract():
    assert check.SCORE[torch.float32] == 1e-6 and cases.build(SMALL[0], CPU, False).bound == 1e-6
    assert check.SCORE[torch.bfloat16] < 2.1e-3 and check.SCORE[torch.float16] < 2.6e-4
    assert check.RELATIVE[torch.float32] <= 1e-5 and check.RECURRENT[torch.float32] <= 1e-5
    assert cases.build(SMALL[3], CPU, False).bound <= 1e-5


def test_check_sees_a_nan_in_the_last_gradient(monkeypatch):
    monkeypatch.setattr(check, "DTYPES", (torch.float32,))

    def poisoned(q, a, **lengths):
        a = a.clone()
        if a.requires_grad:
            a.register_hook(lambda grad: grad * float("nan"))
        return pairwise_sums(q, a, **lengths)

    monkeypatch.setattr(check, "pairwise_sums", poisoned)
    bad = check.failed(check.run_check(CPU))
    assert [row["case"] for row in bad] == ["pairwise/sums"] * 2


def test_compiled_peers_say_why_they_are_missing(monkeypatch):
    monkeypatch.setattr(problems.shutil, "which", lambda name: None)
    for case in (SMALL[0], SMALL[3]):
        skipped = cases.build(case, CPU).skipped
        assert "torch.compile needs a C++ compiler" in skipped.values()


@pytest.mark.slow
@pytest.mark.skipif(not problems.has_compiler(), reason="torch.compile needs a C++ compiler")
def test_compiled_peers_are_timed():
    rows = speed.run_speed([SMALL[0], SMALL[3]], CPU, seconds=0.0)
    assert rows[0]["peers"]["compiled expansion"]["status"] == "timed"
    assert rows[2]["peers"]["compiled loop"]["status"] == "timed"


def test_check_fails_past_a_bound(monkeypatch, tmp_path):
    monkeypatch.setattr(check, "DTYPES", (torch.float32,))
    path = tmp_path / "check.json"
    assert run("check", "--json", path)[0] == 0
    rows = read_results(path)["rows"]
    assert len(rows) == 29 and not check.failed(rows)
    assert {row["case"].split("/")[1] for row in rows} == {
        "attention", "PairwiseAttention", "attend", "sums", "AttentionFeatures", "LSTM", "LSTMCell",
    }  # fmt: skip
    monkeypatch.setattr(check, "pairwise_sums", lambda q, a, **lengths: (q.sum(2), a.sum(2)))
    code, output = run("check")
    assert code == 1 and "past its bound: pairwise/sums float32\n" in output
    assert output.endswith("2 of 29 are past their bound\n")


def test_measure_and_peak_bytes():
    times = measure({"a": lambda: None, "b": lambda: torch.ones(1000).sum()}, 0.01, CPU)
    assert len(times["a"]) == len(times["b"]) >= 7 and (times["b"] > 0).all()
    megabytes = peak_bytes(lambda: [torch.empty(1 << 18) for _ in range(3)], CPU)
    assert 3 << 20 <= megabytes < 4 << 20


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_results(path, {"device": "cpu"}, [{"case": "x"}])
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_results(path, {}, [{"case": CPU}])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", mock.Mock(side_effect=KeyboardInterrupt))
        write_results(path, {}, [{"case": "y"}])
    assert read_results(path)["rows"] == [{"case": "x"}]
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    write_results(
        path, {}, [{"case": "x", "error": float("nan"), "all": [1.5, float("-inf")], "of": {"n": 2}}]
    )
    assert read_results(path)["rows"] == [{"case": "x", "error": None, "all": [1.5, None], "of": {"n": 2}}]
    meta = describe_machine(CPU)
    assert {"device", "cpu", "python", "torch", "commit", "date", "command"} <= meta.keys()
    assert json.dumps(meta)


COMMITTED = Path(__file__).parents[1] / "bench" / "results" / "cpu"
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"


def texts(picture: Path) -> list[str]:
    """All that an SVG says: its bytes depend on the version of matplotlib."""
    return re.findall(r"<text[^>]*>([^<]+)</text>", picture.read_text())


@pytest.mark.parametrize("name", ["answers", "speed", "hessian"])
def test_committed_pictures_are_those_of_the_committed_results(name, tmp_path):
    drawn = [path for path in draw(COMMITTED / f"{name}.json", tmp_path) if path.suffix == ".svg"]
    assert drawn
    for path in drawn:
        assert texts(path) == texts(PICTURES / path.name), (
            f"gatematch-bench plot {name}.json --out docs/pictures"
        )


def test_the_overview_is_that_of_the_committed_results(tmp_path):
    code, output = run("overview", COMMITTED, "--out", tmp_path)
    assert code == 0 and [Path(line).name for line in output.split()] == ["overview.svg", "overview.png"]
    said = texts(tmp_path / "overview.svg")
    assert said == texts(PICTURES / "overview.svg"), (
        "gatematch-bench overview bench/results/cpu --out docs/pictures"
    )
    (attention,) = (
        row for row in read_results(COMMITTED / "answers.json")["rows"] if row["case"] == "answers/attention"
    )
    equal = [a == b for a in attention["question"] for b in attention["answer"]]
    assert [score == 1 for scores in attention["S"] for score in scores] == equal, (
        "equal words score exactly 1"
    )
    assert overview(COMMITTED)["overview"].axes[0].images[0].get_array().tolist() == attention["S"]


def test_the_overview_needs_a_peer_that_is_right(tmp_path):
    for name in ("answers", "speed", "hessian"):
        results = read_results(COMMITTED / f"{name}.json")
        for row in results["rows"]:
            for peer in row.get("peers", {}).values():
                peer.pop("ratio", None)
        write_results(tmp_path / f"{name}.json", results["meta"], results["rows"])
    code, output = run("overview", tmp_path)
    assert code == 2 and "the picture needs a peer that is as exact as ours" in output


def test_committed_drawings_are_those_of_their_program(tmp_path):
    runpy.run_path(str(PICTURES / "draw.py"))["draw"](tmp_path)
    drawn = sorted(tmp_path.iterdir())
    assert [path.name for path in drawn] == ["outer-product.svg", "transpose.svg"]
    for path in drawn:
        assert texts(path) == texts(PICTURES / path.name), "python docs/pictures/draw.py"


def test_tables_of_examples_have_equally_many_decimals_where_these_are_a_choice(tmp_path):
    columns = {
        "share": [0.383, 0.38, 0.0],
        "large": [103.0, 2.56, 16.4],
        "small": [2e-8, 0.1, 1.0],
        "n": [3, 111, 2.5],
    }
    rows = [
        {"case": f"example/{name}"} | dict(zip(columns, values, strict=True))
        for name, *values in zip("abc", *columns.values(), strict=True)
    ]
    write_results(tmp_path / "example.json", describe_machine(CPU), rows)
    assert markdown(tmp_path / "example.json").splitlines()[2:5] == [
        "| a | 0.383 | 103.0 | 2e-08 | 3 |",
        "| b | 0.380 | 2.56 | 0.1 | 111 |",
        "| c | 0.000 | 16.4 | 1.0 | 2.5 |",
    ]


def test_every_peer_has_a_color(rows, tmp_path):
    names = [f"peer {n}" for n in range(8)]
    for k, row in enumerate(rows):
        row["peers"] = {name: {"status": "timed", "ratio": 1.5 + k} for name in names[:7]}
    dots = plots._speed(rows)["speed"].axes[0].collections
    assert [dot.get_offsets().tolist() for dot in dots] == [[[1.5 + k, k] for k in range(len(rows))]] * 7
    write_results(tmp_path / "speed.json", {}, rows)
    assert [path.name for path in draw(tmp_path / "speed.json", tmp_path)] == ["speed.svg", "speed.png"]
    assert set(names[:7]) < set(texts(tmp_path / "speed.svg"))
    rows[0]["peers"][names[7]] = {"status": "timed", "ratio": 1.5}
    write_results(tmp_path / "speed.json", {}, rows)
    with pytest.raises(ValueError, match=r"room for 7 peers; got .*peer 7"):
        draw(tmp_path / "speed.json", tmp_path)


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_commands_answer_wrong_options_in_a_sentence(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    no_rows = tmp_path / "list.json"
    no_rows.write_text("[]")
    wrong_rows = tmp_path / "rows.json"
    wrong_rows.write_text('{"meta": {}, "rows": [1]}')
    no_peers = tmp_path / "check.json"
    no_peers.write_text('{"meta": {}, "rows": [{"case": "lstm/LSTM"}]}')
    empty = tmp_path / "empty.json"
    empty.write_text('{"meta": {}, "rows": []}')
    half = tmp_path / "half.json"
    half.write_text('{"meta": {}, "rows": [{"case": "answers/data"}]}')
    no_scores = tmp_path / "scores.json"
    whole = Path(__file__).parent.parent / "bench" / "results" / "cpu" / "answers.json"
    no_scores.write_text(whole.read_text().replace('"mrr"', '"other"', 2))
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    binary = tmp_path / "binary.md"
    binary.write_bytes(b"page \xff")
    page = tmp_path / "page.md"
    page.write_text(f"<!-- sample {no_peers} -->\n```text\n```\n")
    no_ours = tmp_path / "speed.json"
    no_ours.write_text(
        '{"meta": {}, "rows": [{"case": "lstm/x", "peers": {}}, {"case": "lstm/x", "peers": {}}]}'
    )
    for arguments, words in (
        (("speed", "--filter", "nothing-like-it"), "--filter must match a case"),
        (("speed", "--filter", "("), "--filter must be a regular expression"),
        (("check", "--device", "warp"), "device must be one that torch can use here"),
        (("plot", tmp_path / "none.json"), "does not exist"),
        (("plot", broken), "is not JSON"),
        (("plot", no_rows), "must hold"),
        (("plot", wrong_rows), "must hold"),
        (("plot", no_peers), "must come from answers, speed, hessian"),
        (("plot", no_ours), "lacks what a picture needs"),
        (("overview", tmp_path), f"results file {tmp_path / 'answers.json'} does not exist"),
        (("table", no_peers), "must come from answers, speed, check, kernels, hessian, gpu, barrier"),
        (("table", whole, no_peers), f"results file {no_peers} must come from answers"),
        (("table", no_ours, whole), f"results file {no_ours} must come from answers"),
        (("table", whole, half), f"results file {half} lacks what a table needs"),
        (("table", whole, no_scores), f"results file {no_scores} lacks what a table needs: 'mrr'"),
        (("table", empty), f"results file {empty} must hold"),
        (("plot", empty), f"results file {empty} must hold"),
        (("table", tmp_path), f"results file {tmp_path} cannot be read: Is a directory"),
        (("table", no_ours), "lacks what a table needs"),
        (("table", deep), "is not JSON"),
        (("table", binary), f"results file {binary} must be UTF-8 text; byte 5 is not"),
        (("pages", tmp_path), f"page {tmp_path} cannot be read: Is a directory"),
        (("pages", tmp_path / "none.md"), f"page {tmp_path / 'none.md'} does not exist"),
        (("pages", binary), f"page {binary} must be UTF-8 text; byte 5 is not"),
        (("pages", page), f"results file {no_peers} must come from an example that writes a text"),
        (("plot", COMMITTED / "speed.json", "--out", broken), f"{broken} cannot be used: File exists"),
        (("overview", COMMITTED, "--out", broken), f"{broken} cannot be used: File exists"),
        (("speed", "--seconds", "inf"), "'--seconds'"),
        (("kernels", "--jobs", "1000000"), "'--jobs'"),
        (("answers", "--threads", "1000000"), "'--threads'"),
        (("check", "--device", "meta"), "only cpu and cuda"),
        (("check", "--json", tmp_path), "--json must be a file; got the folder"),
        (("speed", "--json", broken / "x.json"), "--json must be a file that can be written"),
    ):
        code, output = run(*arguments)
        assert code == 2 and words in output.replace("\n", " "), output
        assert "Traceback" not in output
        assert output.count("\n") == 1 or output.startswith("Usage: "), output


def test_how_far_a_long_command_is_stands_on_stderr(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    assert list(progress.track([4, 5], "speed")) == [4, 5]
    assert list(progress.track(iter([4]), "check")) == [4]
    assert list(progress.track(iter([4]), "kernels", 3)) == [4]
    out, err = capsys.readouterr()
    assert (out, err) == ("", "speed: 1 of 2\nspeed: 2 of 2\ncheck: 1\nkernels: 1 of 3\n")
    monkeypatch.setattr(progress, "PAUSE", 10.0)
    assert list(progress.track(range(9), "speed")) == list(range(9))
    assert capsys.readouterr().err == ""


def test_each_line_of_a_command_is_in_its_log_at_once():
    """Of a process whose output is no terminal, and which then waits for what may take minutes."""
    program = """
import sys
from gatematch.bench.console import app

@app.command()
def long():
    print("a line")
    sys.stdin.readline()

app(["long"])
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        readable, _, _ = select.select([child.stdout], [], [], 60)
        line = child.stdout.readline() if readable else "nothing"
        child.communicate("\n")
    assert (line, child.returncode) == ("a line\n", 0)
