"""The numbers in the prose of docs/performance.md are those of the committed results."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu"
PAGE = " ".join((ROOT / "docs" / "performance.md").read_text().split())
PEERS = ("cdist, fast mode", "cdist, exact mode", "broadcast", "compiled expansion", "torch.nn.LSTM")


def rows(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def meta(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())["meta"]


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
    from gatematch.bench import lstm_problems, speed
    from gatematch.bench.pairwise_problems import rows
    from gatematch.bench.problems import Case
    from gatematch.bench.timing import measure

    def short(bound: float) -> str:
        return f"{bound:.0e}".replace("e-0", "e-")

    def made(data: str, **shape: int) -> torch.Tensor:
        torch.manual_seed(0)
        return rows(Case("pairwise/made", shape, data), cpu, data)[0].detach()

    cpu = torch.device("cpu")
    text = next(case for case in program.CASES if case.data == "text")
    problem = program.build(text, cpu, compiled=False)
    lstm, lstm_16 = (
        lstm_problems._bounds(Case("lstm/made", {}, dtype=dtype))["bound"]
        for dtype in (torch.float32, torch.bfloat16)
    )
    words = made("text", B=1, Q=2_000_000, A=1, D=2).view(torch.int64).unique().numel()
    offset = made("offset", B=1, Q=9, A=1, D=9) - made("random", B=1, Q=9, A=1, D=9)
    rounds = len(measure({"nothing": lambda: None}, 0.0, cpu)["nothing"])
    seconds = meta("speed")["command"].split("--seconds ")[1].split()[0]
    threads = [meta(name)["threads"] for name in ("speed", "answers")]
    assert not missing(
        f'"Wrong" means off by more than {short(problem.peer_bound)} in S',
        f"by more than {short(speed.GRADIENT * problem.peer_bound)} of the largest in a gradient",
        f"Ours may be off by {short(problem.bound)} in S",
        f"by {short(lstm)} of the largest output of the LSTM ({short(lstm_16)} in bfloat16)",
        f"in gradients by { {10: 'ten'}[speed.GRADIENT] } times that, of the largest",
        f"at least {rounds} rounds and {seconds} seconds of them",
        f"draws words from {words:,} Gaussian vectors",
        f"`offset` adds {offset.mean():.0f} to every feature",
        f"rows that are close ({4 * SCRATCH / 2**20:.0f} MiB in float32)",
        f"Up to {DIRECT} features there is neither product nor search",
        f"One CPU, with {threads[0]} threads for the speed and {threads[1]} for training",
        "All rows but one are float32",
    )
    assert len({row["case"] for row in SPEED if row["dtype"] != "float32"}) == 1
    assert min(row["ours"]["samples"] for row in SPEED) >= rounds
    # A float32 difference of every pair of rows takes 4 bytes a feature: 512 MiB for 128 features, here.
    limits = [
        "broadcast" in program.build(program._pairwise("wide", 1, 1024, 1024, D), cpu, compiled=False).peers
        for D in (128, 129)
    ]
    assert limits == [True, False] and not missing("by broadcasting where they take at most 512 MiB")


def test_when_cdist_takes_its_fast_mode() -> None:
    x = torch.randn(26, 300, generator=torch.Generator().manual_seed(0))
    modes = ("donot_use_mm_for_euclid_dist", "use_mm_for_euclid_dist")
    default = {
        n: [
            torch.equal(torch.cdist(x[:2], x[:n]), torch.cdist(x[:2], x[:n], compute_mode=mode))
            for mode in modes
        ]
        for n in (25, 26)
    }
    assert default == {25: [True, False], 26: [False, True]}
    assert not missing("takes by default when either side has more than 25 rows")


def test_training() -> None:
    answers = cases("answers")
    data, time, curves = (answers[f"answers/{name}"] for name in ("data", "time", "curves"))
    ours, peer = time["ours"], time["peer"]
    seeds = [cases(f"answers-seed{seed}")["answers/model"]["map"] for seed in (1, 2)]
    assert not missing(
        f"that find the right answer among {1 / answers['answers/random']['accuracy']:.0f}",
        f"the {data['test']} test questions",
        "Its loss differs by less than 1e-7 in every epoch",
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
    cdist, compiler, guide, abcnn = (
        " ".join((ROOT / "docs" / f"{page}.md").read_text().split())
        for page in ("questions/cdist-equal-vectors", "questions/compile", "pairwise", "abcnn")
    )
    (loop,) = (
        entry["ratio"]
        for row, entry in timed("compiled loop", "forward+backward")
        if row["case"] == "lstm/short"
    )
    assert f"took {loop:.1f} times as long as the fused op, forward and backward (`lstm/short`" in compiler
    # test_training has it from the results.
    within = "questions to train on, every model alone is within one standard error of BM25"
    assert f"{cases('answers')['answers/data']['train']} {within}" in abcnn and within in PAGE
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


H200 = ROOT / "bench" / "results" / "h200"
FORMATS = {"bfloat16": "bfloat16", "tf32": "TF32", "float32": "float32", "float16": "float16"}


def on_h200(name: str) -> list[dict]:
    return json.loads((H200 / f"{name}.json").read_text())["rows"]


def claim_of_the_lstm() -> str:
    """Of each number format the geometric mean over the sizes of one layer, and the least."""
    from gatematch.bench.speed_report import classes

    of = {members.words: members.against("torch.nn.LSTM") for members in classes(on_h200("speed-lstm"))}
    parts = []
    for dtype, name in FORMATS.items():
        both = [of.get(("lstm/single", dtype, mode, "warm")) for mode in ("forward", "forward+backward")]
        if None not in both:
            means, least = (" and ".join(f"{found[n]:.2f}" for found in both) for n in (0, 1))
            parts.append(f"{means} in {name} (at least {least})")
    return ", ".join(parts)


@pytest.mark.skipif(not H200.exists(), reason="nothing measured on an H200 is in this checkout")
def test_what_is_said_of_an_h200() -> None:
    pytest.importorskip("rich")
    passed = next(row for row in on_h200("gpu") if row["stage"] == "tests")
    assert not missing(
        claim_of_the_lstm(),
        "takes half a microsecond a step, where ours takes two",
        f"{passed['passed']} tests passed, and {passed['failed']} failed",
    )
    small = [
        row
        for row in on_h200("speed-lstm")
        if (row["case"], row["dtype"], row["mode"]) == ("lstm/single", "tf32", "forward")
        and row["shape"]["H"] == 64
    ]
    for row in small:
        step = {name: of["median"] * 1e3 / row["shape"]["T"] for name, of in row["peers"].items()}
        assert 0.35 < step["torch.nn.LSTM"] < 0.75 and 1.5 < row["us_per_step"] < 2.5
    assert len(small) == 5
    found = [json.loads(path.read_text())["meta"] for path in H200.glob("*.json")]
    assert len({(meta["device"], meta["driver"], meta["torch"], meta["triton"]) for meta in found}) == 1
