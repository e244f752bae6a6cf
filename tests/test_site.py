"""The documentation as a reader meets it: every page in a browser, at a desk's width and at a phone's."""

import http.server
import os
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

pytestmark = pytest.mark.site
playwright = pytest.importorskip("playwright.sync_api")

SITE = Path(os.environ.get("SITE", "out/site"))
PAGES = sorted(str(page.relative_to(SITE)) for page in SITE.rglob("*.html") if page.name != "404.html")
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
# Texts below 13.6 px; code may have a size of its own, the theme's boxes of details, as "Call:", have 12.8.
SMALL = """code => [...document.querySelectorAll("article :is(p, li, td, pre code)")].filter(it => {
    const least = it.closest("details") ? 12.8 : it.matches("pre code") ? code : 13.6
    return it.checkVisibility() && it.textContent.trim() && parseFloat(getComputedStyle(it).fontSize) < least
}).map(it => it.textContent)"""
# Of a browser that starts in a container and asks nothing of a network.
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-sync",
]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def home() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.BrowserContext"]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert program, "Chromium is not installed: apt-get install chromium"
    with (
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=program, args=OPTIONS) as it,
    ):
        yield it.new_context(viewport=DESK)


@pytest.fixture
def tab(browser: "playwright.BrowserContext", home: str) -> Iterator["playwright.Page"]:
    """A tab of which nothing may go wrong: no failed request, none to elsewhere, no error of a script."""
    wrong: list[str] = []
    tab = browser.new_page()
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("requestfailed", lambda asked: wrong.append(f"failed: {asked.url}"))
    tab.on("response", lambda got: got.status < 400 or wrong.append(f"{got.status}: {got.url}"))
    tab.on(
        "request", lambda asked: asked.url.startswith((home, "data:")) or wrong.append(f"asked {asked.url}")
    )
    yield tab
    tab.close()
    assert not wrong


def test_there_are_pages() -> None:
    assert len(PAGES) > 30, f"{SITE} holds {len(PAGES)} pages; run: make docs"


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, tab: "playwright.Page", home: str) -> None:
    tab.goto(home + page, wait_until="load")
    assert tab.locator("article h1").count() == 1
    broken = tab.evaluate("[...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)")
    assert not broken
    # What is wider than the screen scrolls within itself, not the page, and letters stay large enough.
    for size, code in ((DESK, 12.4), (PHONE, 13.6)):
        tab.set_viewport_size(size)
        assert tab.evaluate("document.documentElement.scrollWidth") <= size["width"]
        assert not tab.evaluate(SMALL, code)
    for link in tab.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)"):
        if not link.startswith(home):
            assert link.startswith("https://"), link
            continue
        address, anchor = urldefrag(urljoin(home, link))
        file = SITE / unquote(address.removeprefix(home) or "index.html")
        assert file.is_file(), f"{page} links to {link}"
        assert not anchor or f'id="{unquote(anchor)}"' in file.read_text(), f"{page} links to {link}"


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("forget gate bias", "questions/initialise-gates.html"),
        ("outer product", "questions/star-mm-matmul.html"),
        ("hessian matrix list of tensors", "questions/hessian-one-matrix.html"),
    ],
)
def test_search_finds(words: str, page: str, size: dict[str, int], tab: "playwright.Page", home: str) -> None:
    tab.set_viewport_size(size)
    tab.goto(home, wait_until="load")
    if size is PHONE:
        tab.locator("label[for=__search]").first.click()
    tab.locator("input.md-search__input").click()
    tab.locator("input.md-search__input").press_sequentially(words)
    # Results of the first letters may come before those of all, whose links name all words that were found.
    first = tab.locator("a.md-search-result__link").first
    all_words = re.compile(rf"{re.escape(page)}\?h=.*\b{words.split()[-1]}\b")
    playwright.expect(first).to_have_attribute("href", all_words)
