"""The page in a browser: it draws, moves, saves, and lets no string from outside do anything."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from adalora.report.page import write_report
from adalora.report.run import read_run

from .runs import BERT, stack, write_run

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright, which drives the browser")
CHROMIUM = os.environ.get("ADALORA_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium (ADALORA_CHROMIUM names one)")

ALERT = "<script>alert(1)</script>"
IMAGE = "<img src=x onerror=alert(2)>"
MODULES = [ALERT, IMAGE, "a\"b'c", "</script><b>bold</b>", "🦊 fox", "שלום.עולם", "=1+1", "%{x}"]
MAP = '[data-figure="ranks"]'


class Opened(NamedTuple):
    """A page in the browser, and what it did that it should not."""

    page: Any
    faults: list[str]

    def figure(self, key: str) -> Any:
        return self.page.locator(f'[data-figure="{key}"]').first

    def draw(self, key: str) -> Any:
        """Scroll to a figure, and wait until it is drawn."""
        figure = self.figure(key)
        figure.scroll_into_view_if_needed()
        self.page.wait_for_selector(f'[data-figure="{key}"][data-drawn] .main-svg')
        return figure

    @property
    def slider(self) -> Any:
        return self.page.get_by_role("slider").first

    def cells(self) -> list[list[float | None]]:
        """What the map of ranks shows now."""
        found: list[list[float | None]] = self.page.locator(f"{MAP} .plot").first.evaluate("plot => plot.data[0].z")
        return found

    def numbers(self) -> list[str]:
        """What is written in its cells."""
        found: list[str] = self.page.locator(f"{MAP} .scatterlayer text").all_text_contents()
        return found

    def download(self, figure: Any, button: str) -> str:
        with self.page.expect_download() as saved:
            figure.locator(f"button.{button}").click()
        return Path(saved.value.path()).read_bytes().decode("utf-8-sig")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        rights = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=rights)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def open_page(browser: Any) -> Iterator[Callable[..., Opened]]:
    """Opens a file in a window of its own."""
    contexts = []

    def open_(path: Path, scheme: str = "light") -> Opened:
        contexts.append(browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme=scheme))
        page, faults = contexts[-1].new_page(), []
        page.set_default_timeout(8000)
        page.on("console", lambda message: faults.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: faults.append(f"request: {request.url}") if is_foreign(request) else None)
        page.goto(path.as_uri())
        return Opened(page, faults)

    def is_foreign(request: Any) -> bool:
        return not request.url.startswith(("data:", "blob:")) and not request.is_navigation_request()

    yield open_
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = read_run(write_run(tmp_path_factory.mktemp("page") / "bert", stack(4)))
    return write_report(run.folder.path / "report.html", [run])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [f"layers.{layer}.{module}" for layer in range(2) for module in MODULES]
    data = {"train": "=cmd|' /C calc'!A0", "text": ALERT, "label": "</script>", "label_names": [ALERT, "🦊", "שלום"]}
    folder = write_run(tmp_path_factory.mktemp("page") / "<b>'run", names, model=IMAGE, data=data, metric=ALERT)
    return write_report(folder / "report.html", [read_run(folder)])


@pytest.fixture(scope="module")
def page_of_a_run(report: Path, open_page: Callable[..., Opened]) -> Opened:
    return open_page(report)


@pytest.fixture(scope="module")
def page_of_a_hostile_run(hostile: Path, open_page: Callable[..., Opened]) -> Opened:
    return open_page(hostile)


@pytest.fixture
def opened(page_of_a_run: Opened) -> Iterator[Opened]:
    """The page of a run, as wide as a desk, with the slider at the end."""
    page_of_a_run.page.set_viewport_size({"width": 1200, "height": 900})
    page_of_a_run.slider.fill("36")
    yield page_of_a_run
    assert page_of_a_run.faults == []


def test_every_figure_is_drawn(opened: Opened) -> None:
    for figure in opened.page.locator("figure").all():
        opened.draw(figure.get_attribute("data-figure"))
        assert figure.locator(".main-svg").count() > 0
    assert opened.page.locator("figure[data-drawn]").count() == 10


def test_the_slider_moves_the_picture(report: Path, opened: Opened) -> None:
    opened.draw("ranks")
    trace = read_run(report.parent).trace
    assert trace is not None
    said, slider = opened.page.locator("output").first, opened.slider
    last = trace.allocations[-1]
    assert said.text_content() == f"Step {last.step}: budget {last.budget} triplets, {sum(last.ranks)} live"
    assert opened.numbers() == [str(last.ranks[layer * 6 + kind]) for kind in range(6) for layer in range(4)]
    slider.focus()
    opened.page.keyboard.press("Home")
    assert said.text_content() == "Step 0: budget 144 triplets, 144 live" == slider.get_attribute("aria-valuetext")
    assert opened.cells() == [[6] * 4] * 6 and opened.numbers() == ["6"] * 24
    opened.page.keyboard.press("ArrowRight")
    first = trace.allocations[0]
    assert said.text_content() == f"Step {first.step}: budget {first.budget} triplets, {first.budget} live"
    assert sum(map(sum, opened.cells())) == first.budget  # type: ignore[arg-type]
    slider.fill("20")  # as by a pointer
    assert opened.cells()[1][3] == trace.allocations[19].ranks[3 * len(BERT) + 1]


def test_the_play_button_plays_from_the_start_to_the_end(opened: Opened) -> None:
    opened.draw("ranks")
    said, button = opened.page.locator("output").first, opened.page.locator(".player button").first
    assert said.get_attribute("aria-live") == "polite"
    button.click()
    assert button.text_content() == "Pause" and said.get_attribute("aria-live") == "off"
    playwright.expect(said).to_have_text(re.compile(r"Step 2\d:"))  # the first rankings have gone by
    button.click()
    held = said.text_content()
    assert button.text_content() == "Play" and not held.startswith(("Step 0:", "Step 84:"))
    opened.slider.fill("35")
    button.click()
    playwright.expect(button).to_have_text("Play")
    assert said.text_content().startswith("Step 84:") and said.get_attribute("aria-live") == "polite"


def test_data_is_saved_as_csv_and_pictures_as_svg(report: Path, opened: Opened) -> None:
    trace, log = read_run(report.parent).trace, read_run(report.parent).log
    assert trace is not None
    ranks = list(csv.reader(io.StringIO(opened.download(opened.draw("ranks"), "csv"))))
    assert ranks[0] == ["step", "budget", *trace.names] and len(ranks) == 2 + len(trace.allocations)
    assert ranks[-1] == ["84", "96", *map(str, trace.allocations[-1].ranks)]
    losses = list(csv.DictReader(io.StringIO(opened.download(opened.figure("loss"), "csv"))))
    assert [float(row["loss"]) for row in losses] == [entry["loss"] for entry in log]
    scores = list(csv.DictReader(io.StringIO(opened.download(opened.figure("scores"), "csv"))))
    assert len(scores) == 144 and sum(row["kept"] == "yes" for row in scores) == 96
    sheet = opened.page.locator(".sheet", has_text="Held-out metrics")
    assert opened.download(sheet, "csv").splitlines()[1].startswith("accuracy,0.84")
    picture = opened.download(opened.draw("budget"), "svg")
    assert picture.startswith("<svg") and "live triplets" in picture


def test_the_table_follows_the_slider(opened: Opened) -> None:
    figure = opened.figure("ranks")
    opened.slider.fill("0")
    figure.locator("summary").click()
    table = figure.locator("details table")
    table.wait_for()
    assert table.locator("caption").text_content() == "Learned ranks, step 0"
    assert table.locator("tbody tr").first.locator("td").all_text_contents() == ["6"] * 4
    assert table.locator("tbody th[scope=row]").all_text_contents() == BERT


def test_hostile_names_are_text(page_of_a_hostile_run: Opened) -> None:
    opened, page = page_of_a_hostile_run, page_of_a_hostile_run.page
    assert IMAGE in page.locator("h1").text_content()
    opened.draw("ranks")
    labels = page.locator(f"{MAP} .ytick text").all_text_contents()
    assert [label.strip("\u2068\u2069") for label in labels] == MODULES
    assert page.locator("main bdi", has_text=ALERT).count() > 2 and page.locator("main b, main img").count() == 0
    opened.draw("metrics")
    assert ALERT in page.locator('[data-figure="metrics"] .legendtext').first.text_content()
    figure = opened.draw("scores")
    figure.locator("summary").click()
    figure.locator("details table").wait_for()
    assert figure.locator("details tbody tr").count() == 96 and figure.locator("details script").count() == 0
    page.locator('[data-figure="scores"] .plot').hover(position={"x": 120, "y": 60})
    rows = list(csv.reader(io.StringIO(opened.download(page.locator(".sheet", has_text="label_names"), "csv"))))
    assert ["train", "'=cmd|' /C calc'!A0"] in rows, "a spreadsheet would run it otherwise"
    modules = {row["module"] for row in csv.DictReader(io.StringIO(opened.download(figure, "csv")))}
    assert modules == {f"layers.{layer}.{module}" for layer in range(2) for module in MODULES}
    assert opened.faults == []


def test_csv_cells_that_look_like_formulas_are_defused(opened: Opened) -> None:
    cells = ["=1+1", "+1a", "-x", "@a", "-0.5", -0.5, 'a"b', "a,b", "a\nb", None, "\t=1"]
    found = opened.page.evaluate("cells => cells.map(csvCell)", cells)
    assert found == ["'=1+1", "'+1a", "'-x", "'@a", "-0.5", "-0.5", '"a""b"', '"a,b"', '"a\nb"', "", "'\t=1"]


def test_paper_is_as_the_system_says_until_the_reader_chooses(report: Path, open_page: Callable[..., Opened]) -> None:
    opened = open_page(report, scheme="dark")
    opened.draw("ranks")
    body, label = opened.page.locator("body"), opened.page.locator(f"{MAP} .ytick text").first

    def expect_dark(dark: bool) -> None:
        paper, ink = ("rgb(20, 23, 27)", "rgb(232, 234, 237)") if dark else ("rgb(255, 255, 255)", "rgb(26, 30, 36)")
        playwright.expect(body).to_have_css("background-color", paper)
        playwright.expect(label).to_have_css("fill", ink)

    expect_dark(True)
    opened.page.emulate_media(color_scheme="light")
    expect_dark(False)
    opened.page.locator("#theme").click()
    expect_dark(True)
    assert opened.page.locator("#theme").get_attribute("aria-pressed") == "true"
    opened.page.emulate_media(color_scheme="dark")
    opened.page.emulate_media(color_scheme="light")
    opened.page.wait_for_timeout(200)
    expect_dark(True)  # chosen
    # what is printed is light, and whole
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.page.locator("figure[data-drawn=light]").count() == 10
    widest = "Math.max(...[...document.querySelectorAll('.main-svg')].map(e => e.getBoundingClientRect().right))"
    assert opened.page.evaluate(f"{widest} - document.querySelector('main').getBoundingClientRect().left") <= 660
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.page.locator("figure[data-drawn=dark]").count() == 10
    playwright.expect(opened.figure("budget").locator(".main-svg").first).to_have_js_property("clientWidth", 1080)
    assert opened.faults == []


@pytest.mark.parametrize("name", ["page_of_a_run", "page_of_a_hostile_run"])
def test_on_a_phone_nothing_is_wider_than_the_page(name: str, request: pytest.FixtureRequest) -> None:
    opened: Opened = request.getfixturevalue(name)
    opened.page.set_viewport_size({"width": 390, "height": 844})
    for key in ("ranks", "scores", "kinds", "orthogonality"):
        opened.draw(key)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 390
    outside = """[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && !e.closest('.unseen')
        && e.getBoundingClientRect().right > 390.5).map(e => e.outerHTML.slice(0, 80))"""
    assert opened.page.evaluate(outside) == []
    assert opened.faults == []


def test_tabs_work_by_keyboard(report: Path, tmp_path: Path, open_page: Callable[..., Opened]) -> None:
    first = read_run(report.parent)
    second = read_run(write_run(tmp_path / "other", stack(2), finished=False))
    opened = open_page(write_report(tmp_path / "both.html", [first, second]))
    page = opened.page
    page.get_by_role("tab", name="bert").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", name="other").get_attribute("aria-selected") == "true"
    assert page.locator("#panel-0").is_hidden() and page.locator("#panel-1").is_visible()
    page.wait_for_selector('#panel-1 [data-figure="ranks"][data-drawn]')
    for key, shown in (("ArrowRight", 0), ("ArrowLeft", 1), ("Home", 0), ("End", 1)):
        page.keyboard.press(key)
        assert page.locator(f"#panel-{shown}").is_visible() and page.locator(f"#panel-{1 - shown}").is_hidden()
    assert opened.faults == []
