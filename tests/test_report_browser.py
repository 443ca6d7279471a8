"""The report in a browser: Chromium, headless, from disk."""

import os
import shutil

import pytest
import small_runs

from mmpre.report.page import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; Debian has it: apt-get install chromium")
ARGUMENTS = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--no-first-run"]  # fmt: skip
SIZES = [(390, 844), (1280, 900)]
SCHEMES = ["light", "dark"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports of words with regions, of pictures, and of two runs together."""
    folder = tmp_path_factory.mktemp("pairs")
    data, runs = small_runs.pairs(folder), tmp_path_factory.mktemp("runs")
    pairs = small_runs.uniter(folder, runs / "pairs", **data)
    pictures = small_runs.mae(runs / "pictures", **data)
    return {"pairs": report([pairs]), "pictures": report([pictures]),
            "both": report([pairs, pictures], runs / "both.html")}  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser; it is in the extra `test`")
    sandbox = [] if os.getuid() else ["--no-sandbox"]  # root has none
    with api.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS + sandbox)
        yield launched
        launched.close()


def opened(browser, path, size, scheme):
    """A page, and what it said, asked for and failed at."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    said = []
    page.on("console", lambda message: said.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda one: said.append(one.url) if not one.url.startswith(("file:", "data:")) else None)
    page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.goto(path.as_uri())
    return page, said


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["pairs", "pictures", "both"])
def test_it_opens_in_silence_with_its_pictures_and_fits(name, size, scheme, pages, browser, tmp_path):
    page, said = opened(browser, pages[name], size, scheme)
    try:
        shown = page.evaluate("[...document.images].map((i) => i.complete && i.naturalWidth > 0)")
        assert len(shown) > 5 and all(shown)
        over = page.evaluate("[...document.querySelectorAll('svg image')].map((i) => i.getBBox().width)")
        assert over and all(width > 0 for width in over)
        charts = page.evaluate("[...document.querySelectorAll('.chart')].map((c) => c.getBoundingClientRect().height)")
        assert len(charts) > 5 and min(charts) > 100
        assert page.evaluate("document.documentElement.scrollWidth") == size[0]  # nothing sticks out
        light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
        assert (light > 200) == (scheme == "light")
        pixels = page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert len(pixels) > 50_000
        assert said == []
    finally:
        page.close()


def test_a_pointer_shows_values_and_a_switch_the_other_scale(pages, browser):
    page, said = opened(browser, pages["pairs"], SIZES[1], "light")
    try:
        chart = page.locator(".chart", has_text="gradient norm").first
        assert chart.locator("svg.log").is_visible() and not chart.locator("svg.linear").is_visible()
        chart.locator("label", has_text="linear").click()
        assert chart.locator("svg.linear").is_visible() and not chart.locator("svg.log").is_visible()
        chart.locator("svg.linear").hover()
        tip = chart.locator(".tip")
        assert tip.is_visible() and tip.inner_text().startswith("step ") and "training" in tip.inner_text()
        page.mouse.move(0, 0)
        assert not tip.is_visible()
        assert said == []
    finally:
        page.close()


def test_a_word_that_is_pointed_at_shows_where_it_goes(pages, browser):
    page, said = opened(browser, pages["pairs"], SIZES[0], "dark")
    try:
        card = page.locator(".moved").first
        row = card.locator("tr[data-shares]").last
        row.click()
        shares = row.evaluate("(row) => JSON.parse(row.dataset.shares)")
        marked = card.evaluate("(card) => [...card.querySelectorAll('rect')].map((r) => Number(r.style.opacity))")
        assert marked == pytest.approx([share * 0.75 for share in shares], abs=1e-6)
        assert row.evaluate("(row) => row.classList.contains('on')") and said == []
    finally:
        page.close()


def test_keys_are_read_and_not_run(pages, browser):
    page, said = opened(browser, pages["pairs"], SIZES[1], "light")
    try:
        assert small_runs.EVIL in page.inner_text("body") and said == []
    finally:
        page.close()
