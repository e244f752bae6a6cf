"""The numbers in the prose of docs/performance.md are those of the committed results."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu"
PAGE = " ".join((ROOT / "docs" / "performance.md").read_text().split())
PEERS = ("cdist, fast mode", "cdist, exact mode", "broadcast", "compiled expansion", "torch.nn.LSTM")


def rows(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def cases(name: str) -> dict[str, dict]:
    return {row["case"]: row for row in rows(name)}


SPEED = rows("speed")


def timed(peer: str, mode: str = "") -> list[tuple[dict, dict]]:
    """The rows in which a peer was timed, each with the peer's entry."""
    entries = [(row, row["peers"].get(peer, {})) for row in SPEED if row["mode"] == (mode or row["mode"])]
    return [(row, entry) for row, entry in entries if "ratio" in entry]


def ratios(peer: str) -> list[float]:
    return [entry["ratio"] for _, entry in timed(peer)]


def between(values: list[float], form: str, joined: str = " to ") -> str:
    return f"{min(values):{form}}{joined}{max(values):{form}}"


def missing(*claims: str) -> list[str]:
    return [claim for claim in claims if claim not in PAGE]


def test_the_lstm() -> None:
    beside = timed("torch.nn.LSTM")
    lengths = [entry["ratio"] for row, entry in beside if "lengths" in row["options"]]
    same_op = [e["ratio"] for row, e in beside if "lengths" not in row["options"] and row["shape"]["T"] > 1]
    assert (len(lengths), len(same_op)) == (4, 14)
    assert not missing(
        f"without lengths take torch {between(same_op, '.2f')} of our time",
        f"their ratios are {between(same_op, '.2f')}.",
        f"packing and unpacking included, it takes {between(lengths, '.2f')}.",
        f"a loop over a compiled step, which takes {between(ratios('compiled loop'), '.1f')} of our time",
    )
    assert len({row["case"] for row, _ in timed("compiled loop")}) == 1, "in one row"
    lstm = [peer for row in SPEED if row["case"].startswith("lstm/") for peer in row["peers"].values()]
    assert {peer["status"] for peer in lstm} == {"timed"}, "all are within their bounds"
    assert {row["dtype"] for row in SPEED if row["case"] != "lstm/bfloat16"} == {"float32"}


def test_pairwise_attention_beside_cdist() -> None:
    exact, fast = ratios("cdist, exact mode"), ratios("cdist, fast mode")
    shapes = [row["shape"] for row in SPEED if row["case"].startswith("pairwise/")]
    assert min(min(shape["Q"], shape["A"]) for shape in shapes) > 25
    assert min(exact) > 1 and len(exact) == len(shapes)
    assert not missing(
        f"{min(exact):.1f} to {max(exact):.0f} times faster than `torch.cdist` in its exact mode",
        f"faster in {sum(ratio > 1 for ratio in fast)} of {len(fast)} rows",
        f"({between(fast, '.2f', 'x to ')}x)",
    )
    slower = {(row["case"], row["mode"]) for row, entry in timed("cdist, fast mode") if entry["ratio"] <= 1}
    few = {
        (f"pairwise/{name}", mode)
        for name in ("narrow", "points")
        for mode in ("forward", "forward+backward")
    }
    assert slower == few | {("pairwise/one-pair-of-sentences", "forward+backward")}
    for row in SPEED:
        if row["data"] == "text":
            statuses = {name: peer["status"] for name, peer in row["peers"].items()}
            assert [name for name, status in statuses.items() if status == "wrong"] == [PEERS[0], PEERS[3]]


def test_the_compiled_expansion() -> None:
    compiled = ratios("compiled expansion")
    entries = [row["peers"]["compiled expansion"] for row in SPEED if row["data"] == "text"]
    gradient = max(entry["gradient_error"] or 0 for entry in entries)
    mean = np.exp(np.mean(np.log(compiled)))
    assert not missing(
        f"faster than ours in {sum(ratio < 1 for ratio in compiled)} of {len(compiled)} rows",
        f"On text it is off by up to {max(entry['error'] for entry in entries):.2f}",
        f"It takes {between(compiled, '.2f')} of our time",
        f"{mean:.2f} in the geometric mean",
        f"off by up to {100 * gradient:.0f}% of the largest",
    )


def test_memory() -> None:
    def short(ratio: float, tenths: bool) -> str:
        return f"{ratio:.{0 if ratio >= 10 else 1 if tenths or ratio >= 1.5 else 2}f}"

    for peer in PEERS:
        peaks = [entry["peak_bytes"] / row["ours"]["peak_bytes"] for row, entry in timed(peer)]
        low, high = (short(ratio, min(peaks) > 1) for ratio in (min(peaks), max(peaks)))
        assert not missing(f"| {peer} | {low} | {high} |")
        if peer == "cdist, fast mode":
            assert not missing(f"{low} to {high} times less at the peak")


def test_where_the_time_goes() -> None:
    def nanoseconds(name: str) -> float:
        (row,) = (
            row
            for row in SPEED
            if (row["case"], row["data"], row["mode"]) == (f"pairwise/{name}", "random", "forward")
        )
        return 1e6 * row["ours"]["median"] / (row["shape"]["B"] * row["shape"]["Q"] * row["shape"]["A"])

    text, offset = (
        [row["time_to_random"] for row in SPEED if row["data"] == data] for data in ("text", "offset")
    )
    spread = [row["ours"]["spread"] / row["ours"]["median"] for row in SPEED]
    assert not missing(
        f"of `documents` (128 features) takes {nanoseconds('documents'):.1f} ns forward",
        f"of `documents-300` {nanoseconds('documents-300'):.1f} ns",
        f"of `narrow` (16 features) {nanoseconds('narrow'):.1f} ns",
        f"of `points` (3 features) {nanoseconds('points'):.1f} ns",
        f"Text costs {between(text, '.1f')} times random rows",
        f"it is {100 * statistics.median(spread):.0f}% of the median in the middle row",
        f"in the middle row, and {100 * max(spread):.0f}% in the worst",
    )
    assert {f"{ratio:.1f}" for ratio in offset} == {"1.1"} and not missing("it costs 1.1 times")


def test_the_bounds_and_the_data_are_those_of_the_program() -> None:
    pytest.importorskip("rich")
    from gatematch.attention.near import SCRATCH
    from gatematch.attention.operands import DIRECT
    from gatematch.bench import cases as program
    from gatematch.bench import speed

    text = next(case for case in program.CASES if case.data == "text")
    problem = program.build(text, program.torch.device("cpu"), compiled=False)
    assert (problem.bound, problem.peer_bound, speed.GRADIENT) == (1e-6, 1e-4, 10)
    bounds = program._lstm_bounds(program.torch.float32), program._lstm_bounds(program.torch.bfloat16)
    assert [bound["bound"] for bound in bounds] == [1e-5, 2e-2]
    assert 4 * SCRATCH == 1 << 20
    assert not missing(f"Up to {DIRECT} features there is neither product nor search")
    assert min(row["ours"]["samples"] for row in SPEED) >= 7


def test_training() -> None:
    answers = cases("answers")
    data, time, curves = (answers[f"answers/{name}"] for name in ("data", "time", "curves"))
    ours, peer = time["ours"], time["peer"]
    seeds = [cases(f"answers-seed{seed}")["answers/model"]["map"] for seed in (1, 2)]
    assert not missing(
        f"the {data['test']} test questions",
        f"With {data['train']} questions to train on",
        f"a MAP of {seeds[0]:.3f} and {seeds[1]:.3f}",
        f"{100 * (time['ratio'] - 1):.0f}% slower an epoch",
        f"{peer['median']:.2f} s beside {ours['median']:.2f} s",
        f"in the median of {len(curves['ours']['loss'])} epochs",
        f"{peer['min']:.2f} to {peer['max']:.2f} s and {ours['min']:.2f} to {ours['max']:.2f} s",
    )
    assert peer["min"] < ours["max"], "the ranges overlap"
    losses = np.subtract(curves["ours"]["loss"], curves["peer"]["loss"])
    assert np.abs(losses).max() < 1e-7 and curves["ours"]["dev_map"] == curves["peer"]["dev_map"]
    models = {
        name: cases(f"answers{name}")["answers/model"]
        for name in ("", "-bcnn", "-abcnn1", "-abcnn2", "-abcnn3")
    }
    for row in models.values():
        assert abs(row["map"] - answers["answers/bm25"]["map"]) < row["map_error"]
    for name in ("-abcnn1", "-abcnn2", "-abcnn3"):
        assert abs(models[name]["map"] - models["-bcnn"]["map"]) < models[name]["map_error"], (
            "no more than noise"
        )


def test_what_check_found() -> None:
    found = rows("check")
    assert (
        not missing(f"all {len(found)} rows are within their bounds")
        and len({row["dtype"] for row in found}) == 4
    )
    for row in found:
        assert row["error"] <= row["bound"] and row["gradient_error"] <= row["gradient_bound"]


def test_what_other_pages_quote() -> None:
    cdist = " ".join((ROOT / "docs" / "questions" / "cdist-equal-vectors.md").read_text().split())
    guide = " ".join((ROOT / "docs" / "pairwise.md").read_text().split())
    text = [row["time_to_random"] for row in SPEED if row["data"] == "text"]
    assert f"text took {between(text, '.1f')} times" in cdist
    assert f"one by one: {between(text, '.1f')} times as much" in guide
    wrong = next(
        row["peers"]["cdist, fast mode"]
        for row in SPEED
        if (row["case"], row["data"], row["mode"]) == ("pairwise/sentences-300", "text", "forward+backward")
    )
    assert (f"{wrong['error']:.0e}", f"{wrong['gradient_error']:.0e}") == ("2e-02", "6e-02")
    assert "scores off by 2e-2 and its gradient by 6e-2" in cdist
    many, few = (
        [
            [entry["ratio"] for row, entry in timed(peer, "forward") if (row["shape"]["D"] >= 50) == wide]
            for peer in ("cdist, exact mode", "cdist, fast mode")
        ]
        for wide in (True, False)
    )
    assert f"takes {min(many[0]):.1f} to {max(many[0]):.0f} times as long" in cdist
    assert f"by matrix product {between(many[1], '.1f')} times" in cdist
    assert f"matrix product takes {between(few[1], '.2f')} times as long" in cdist
