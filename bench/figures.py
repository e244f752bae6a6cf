"""Single figures in the prose of Markdown pages, from the committed results.

In a page one stands as ``<!-- name -->7%<!-- / -->`` or ``<!-- name argument -->7%<!-- / -->``. Its name is
that of a public method of `Figures`. The method raises ValueError when the results no longer say what the
sentence around the figure says.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from gatematch.attention.near import SCRATCH
from gatematch.attention.operands import CENTRED

from .pairwise_problems import pairwise_problem
from .problems import Case
from .results import read_results
from .speed import GRADIENT

_FIGURE = re.compile(r"(<!-- (\w+)(?: ([^<>]+))? -->)[^<>\n]*<!-- / -->")


def redrawn(page: str, root: Path) -> str:
    """A Markdown page with its figures written again, from the results below `root`, a checkout.

    Raises:
        ValueError: a figure is unknown, or the results do not have it, or Markdown would not show its line.
    """
    figures = Figures(root)

    def figure(found: re.Match[str]) -> str:
        mark, name, argument = found.groups()
        if name not in FIGURES:
            raise ValueError(f"figure must be one of {', '.join(FIGURES)}; got {name!r}")
        if re.fullmatch(r"[\s>*+\d.)-]*", page[: found.start()].rpartition("\n")[2]):
            raise ValueError(f"figure {name!r} must not begin a line: Markdown takes that for HTML")
        try:
            text = getattr(figures, name)(*filter(None, [argument]))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"figure {name} {argument or ''}: {error}") from None
        return f"{mark}{text}<!-- / -->"

    page_again, number = _FIGURE.subn(figure, page)
    if number != page.count("<!-- / -->"):
        raise ValueError("every <!-- / --> must end a figure, <!-- name -->...<!-- / --> in one line")
    return page_again


def sample(path: Path) -> str:
    """The generated text of a results file, its long lines broken."""
    meta = read_results(path).get("meta")
    if not isinstance(meta, dict) or not isinstance(meta.get("sample"), str):
        raise ValueError(f"results file {path} must come from an example that writes a text")
    return "".join(textwrap.fill(line, 80) + "\n" for line in meta["sample"].split("\n"))


def _between(values: Iterable[float], form: str = ".2g") -> str:
    values = list(values)
    return f"{min(values):{form}} to {max(values):{form}}"


def _power(bound: float) -> str:
    return f"{bound:.0e}".replace("e-0", "e-")


def _at_most(value: float) -> float:
    """Rounded up to one digit."""
    unit = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / unit - 1e-9) * unit


def _hold(claim: bool, words: str) -> None:
    if not claim:
        raise ValueError(f"the results no longer say that {words}")


class Figures:
    """Every public method is a figure. A peer's ratio is its time over ours, of rows in which it is right."""

    def __init__(self, root: Path) -> None:
        self._root = root / "bench" / "results"

    def _rows(self, name: str, **wanted: str) -> list[dict[str, Any]]:
        """Of a results file the rows that hold what is wanted."""
        rows = read_results(self._root / f"{name}.json")["rows"]
        return [row for row in rows if all(row[key] == value for key, value in wanted.items())]

    def _row(self, name: str, **wanted: str) -> dict[str, Any]:
        (row,) = self._rows(name, **wanted)
        return row

    def _timed(self, peer: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The rows of a CPU in which a peer was timed, each with the peer's entry."""
        rows = [(row, row["peers"].get(peer, {})) for row in self._rows("cpu/speed")]
        return [(row, entry) for row, entry in rows if "ratio" in entry]

    def _wrong(self, peer: str, error: str) -> float:
        """The largest error of a peer on text, where it is wrong."""
        entries = [row["peers"][peer] for row in self._rows("cpu/speed", data="text")]
        _hold(all(entry["status"] == "wrong" for entry in entries), f"{peer} is wrong on text")
        return max(entry[error] for entry in entries if entry[error] is not None)

    def ratios(self, peer: str) -> str:
        return _between(entry["ratio"] for _, entry in self._timed(peer))

    def lstm(self, which: str) -> str:
        """The ratios of torch's LSTM over many steps."""
        lengths = {"with lengths": True, "without lengths": False}[which]
        chosen = [
            row["peers"]["torch.nn.LSTM"]
            for row in self._rows("cpu/speed")
            if row["shape"].get("T", 1) > 1 and ("lengths" in row["options"]) == lengths
        ]
        _hold(all(entry["status"] == "timed" for entry in chosen), "torch's LSTM is within its bounds")
        return _between((entry["ratio"] for entry in chosen), ".2f")

    def faster_than_cdist(self) -> str:
        timed = self._timed("cdist, fast mode")
        slower = [row for row, entry in timed if entry["ratio"] <= 1]
        pair = "pairwise/one-pair-of-sentences", "forward+backward"
        expected = [row["shape"]["D"] <= 16 or (row["case"], row["mode"]) == pair for row in slower]
        _hold(all(expected), "only few features, and the gradient of one pair of sentences, are slower")
        return f"{len(timed) - len(slower)} of {len(timed)}"

    def expansion_faster(self) -> str:
        ratios = [entry["ratio"] for _, entry in self._timed("compiled expansion")]
        return f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}"

    def memory(self, peer: str) -> str:
        """A peer's peak over ours."""
        timed = self._timed(peer)
        return _between((entry["peak_bytes"] / row["ours"]["peak_bytes"] for row, entry in timed), ".3g")

    def error(self, peer: str) -> str:
        return f"{_at_most(self._wrong(peer, 'error')):.1g}"

    def gradient_error(self, peer: str) -> str:
        return f"{_at_most(self._wrong(peer, 'gradient_error')):.0%}"

    def to_random(self, data: str) -> str:
        """Our time over that of random rows."""
        return _between((row["time_to_random"] for row in self._rows("cpu/speed", data=data)), ".2f")

    def nanoseconds(self, case: str) -> str:
        """Of a pair of random rows, forward."""
        row = self._row("cpu/speed", case=case, data="random", mode="forward")
        pairs = math.prod(row["shape"][letter] for letter in "BQA")
        return f"{1e6 * row['ours']['median'] / pairs:.1f} ns"

    def spread(self) -> str:
        """The largest interquartile range of ours, as a share of its median."""
        ours = [row["ours"] for row in self._rows("cpu/speed")]
        return f"{max(entry['spread'] / entry['median'] for entry in ours):.0%}"

    def bound(self, case: str) -> str:
        (bound,) = {row["bound"] for row in self._rows("cpu/speed", case=case)}
        return _power(bound)

    def peer_bound(self) -> str:
        one_pair = Case("pairwise/one", dict.fromkeys("BQAD", 1))
        return _power(pairwise_problem(one_pair, torch.device("cpu"), compiled=False).peer_bound)

    def gradient_bound(self) -> str:
        return f"{GRADIENT} times"

    def room(self, dtype: str) -> str:
        """What each thread keeps for near rows and for centred ones."""
        return f"{(SCRATCH + CENTRED) * getattr(torch, dtype).itemsize >> 20} MiB"

    def h200_step(self, whose: str) -> str:
        """Microseconds a step of an LSTM with 64 hidden units in TF32."""
        single = self._rows("h200/speed-lstm", case="lstm/single", dtype="tf32", mode="forward")
        steps = [
            1e3 * (row["ours"] if whose == "ours" else row["peers"][whose])["median"] / row["shape"]["T"]
            for row in single
            if row["shape"]["H"] == 64
        ]
        return _between(steps)

    def checked(self) -> str:
        rows = self._rows("cpu/check")
        right = [r["error"] <= r["bound"] and r["gradient_error"] <= r["gradient_bound"] for r in rows]
        _hold(all(right), "all are within their bounds")
        return f"all {len(rows)}"

    def candidates(self) -> str:
        return f"{1 / self._row('cpu/answers', case='answers/random')['accuracy']:.0f}"

    def questions(self) -> str:
        """To train on, so few that no model stands out."""
        bcnn, *others = (
            self._row(f"cpu/answers{kind}", case="answers/model")
            for kind in ("-bcnn", "", "-abcnn1", "-abcnn2", "-abcnn3")
        )
        bm25 = self._row("cpu/answers", case="answers/bm25")["map"]
        within = [abs(row["map"] - bm25) < row["map_error"] for row in (bcnn, *others)]
        _hold(all(within), "every model is within one standard error of BM25")
        noise = [abs(row["map"] - bcnn["map"]) < row["map_error"] for row in others[1:]]
        _hold(all(noise), "attention brings no more than noise")
        return f"{self._row('cpu/answers', case='answers/data')['train']}"

    def other_seeds(self) -> str:
        maps = [self._row(f"cpu/answers-seed{n}", case="answers/model")["map"] for n in (1, 2)]
        return " and ".join(f"{score:.3f}" for score in maps)

    def epoch_slower(self) -> str:
        time = self._row("cpu/answers", case="answers/time")
        ours, peer = time["ours"], time["peer"]
        _hold(peer["min"] < ours["max"] and ours["min"] < peer["max"], "the ranges overlap")
        _hold(time["ratio"] > 1, "the matcher from torch's parts is slower")
        return f"{time['ratio'] - 1:.0%}"

    def losses_differ(self) -> str:
        curves = self._row("cpu/answers", case="answers/curves")
        ours, peer = curves["ours"], curves["peer"]
        _hold(ours["dev_map"] == peer["dev_map"], "the MAP on the dev questions differs in no epoch")
        return _power(_at_most(max(abs(x - y) for x, y in zip(ours["loss"], peer["loss"], strict=True))))


FIGURES = [name for name in vars(Figures) if not name.startswith("_")]
