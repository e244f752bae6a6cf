"""README and documents say what the committed results hold: `gatematch-bench pages` writes it there."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")

from gatematch.bench.figures import FIGURES
from gatematch.bench.markdown import redrawn
from gatematch.bench.results import describe_machine, write_results

ROOT = Path(__file__).parents[1]
PAGES = [page for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")] if "<!-- " in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_says_what_the_results_hold(page: Path) -> None:
    assert redrawn(page.read_text(), ROOT) == page.read_text(), f"run: gatematch-bench pages {page}"


def test_every_figure_is_on_a_page() -> None:
    pages = "".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"<!-- (\w+)[^<>]* -->[^<>]*<!-- / -->", pages)) == set(FIGURES)


def test_a_figure_follows_the_results(tmp_path: Path) -> None:
    row = {"case": "x", "error": 1.0, "bound": 2.0, "gradient_error": 1.0, "gradient_bound": 1.0}
    page = "| <!-- checked -->all 7<!-- / --> | **<!-- room float64 --><!-- / -->** |\n"
    results, machine = tmp_path / "bench/results/cpu/check.json", describe_machine(torch.device("cpu"))
    write_results(results, machine, [row])
    drawn = "| <!-- checked -->all 1<!-- / --> | **<!-- room float64 -->18 MiB<!-- / -->** |\n"
    assert redrawn(page, tmp_path) == drawn
    write_results(results, machine, [row | {"error": 3.0}])
    with pytest.raises(ValueError, match="the results no longer say that all are within their bounds"):
        redrawn(page, tmp_path)


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("It is <!-- none -->1<!-- / -->.", "must be one of ratios, .*; got 'none'"),
        ("It is <!-- redrawn -->1<!-- / -->.", "must be one of"),
        ("It is <!-- memory -->1<!-- / -->.", "figure memory : .* argument"),
        ("It is <!-- bound lstm/none -->1<!-- / -->.", "figure bound lstm/none: "),
        ("They are\n- <!-- candidates -->20<!-- / -->.", "must not begin a line"),
        ("It is <!-- candidates -->20\n<!-- / -->.", "in one line"),
        ("<!-- table x.json -->\n| a |\n", "must be followed by what it names"),
    ],
)
def test_what_cannot_be_written_raises(page: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        redrawn(page, ROOT)
