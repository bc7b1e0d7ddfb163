"""The page in a real browser, opened from disk: what a reader sees, moves, presses and types."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from devmon.analysis.derive.watch_series import series_of
from tests.support.browser import OVERVIEW, PANELS, Browser, cursors, drawing, inside, marks, panels
from tests.support.pages import CASES, EVIL, write_pages
from tests.support.reports import TEN
from tests.support.synthetic import STEPS


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_pages(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.driver.quit()


@pytest.mark.parametrize("name", [*CASES, "live", "compared"])
def test_page_opens_without_errors_and_asks_for_nothing(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.requests()
    browser.open(pages[name])
    assert browser.run("return document.querySelectorAll('#tools button').length") >= 3  # the script came to its end
    assert browser.run("return document.querySelectorAll('figure svg').length") > 0
    bare = (
        "return [...document.querySelectorAll('figure:not(:has(table))')].map((one) => one.parentElement.id + one.id)"
    )
    assert set(browser.run(bare)) <= {
        "any",
        "matchedfigure-matched",
    }  # whose numbers are the figures', or the table beside
    assert browser.logged() == []
    assert browser.requests() == []


def test_markup_in_names_and_errors_does_nothing(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["markup"])
    assert browser.driver.title == EVIL
    assert browser.run("return document.querySelectorAll('img').length") == 0
    assert browser.run("return document.querySelectorAll('script').length") == 2
    (panel,) = panels(browser, "overview")[:1]
    browser.pointer(OVERVIEW, (sum(panel["box"][::2]) / 2, sum(panel["box"][1::2]) / 2))
    assert EVIL in browser.find("#tip").text
    assert browser.run("return document.querySelectorAll('#any option').length") == 2
    assert browser.driver.title == EVIL
    assert browser.logged() == []


def test_hover_says_the_value_and_the_cursor_goes_through_all_panels(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["events"])
    run = CASES["events"][0]
    at = int(np.flatnonzero(STEPS == 650)[0])
    all_panels = panels(browser, "overview")
    x = marks(browser, all_panels[0])[at]
    browser.pointer(OVERVIEW, (x, all_panels[0]["box"][3] - 5))
    tip = browser.find("#tip").text
    assert tip.startswith("step 650\nloss/loss: ")
    value = float(tip.split("loss/loss: ")[1].split()[0])
    assert value == pytest.approx(float(run["loss"]["loss"].values[at]), rel=1e-3)
    assert "± 0.00987" in tip  # 1.645 of its standard error 0.006
    seen = cursors(browser, "overview")
    assert len(seen) == 3
    assert seen == pytest.approx([x] * 3, abs=0.05)
    llc = panels(browser, "llc-llc")[0]
    (other,) = cursors(browser, "llc-llc")
    assert other is not None
    assert np.abs(np.array(marks(browser, llc)) - other).min() < 0.05  # on the mark of step 650 of another figure
    browser.pointer(OVERVIEW, (x, all_panels[0]["box"][3] - 5), (2.0, 2.0))
    assert cursors(browser, "overview") == [None] * 3
    assert not browser.find("#tip").is_displayed()


def test_a_heat_map_says_its_cell_and_zooms_with_the_others(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["heads"])
    figure = 'figure[data-name="induction-prefix-matching"]'
    (panel,) = panels(browser, "induction-prefix-matching")
    left, top, right, bottom = panel["box"]
    assert panel["rows"] == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0", "L1H1", "L1H2", "L1H3"]
    row, column = 6, int(np.flatnonzero(STEPS == 900)[0])
    place = (left + (column + 0.5) / len(STEPS) * (right - left), top + (row + 0.5) / 8 * (bottom - top))
    browser.pointer(figure, place)
    step, cell = browser.find("#tip").text.splitlines()
    assert (step, cell.partition(": ")[0]) == ("step 900", "L1H2")
    true = float(CASES["heads"][0]["induction"]["prefix_matching"].values[column, 1, 2])
    assert float(cell.partition(": ")[2]) == pytest.approx(true, abs=0.0006)
    overview = panels(browser, "overview")[0]
    places = dict(zip(STEPS.tolist(), marks(browser, overview), strict=True))
    browser.pointer(OVERVIEW, (places[550], overview["box"][1] + 9), (places[900], overview["box"][1] + 9), drag=True)
    shown = [s for s in STEPS.tolist() if 550 <= s <= 900]
    script = (
        "const image = document.querySelector(arguments[0] + ' image'); "
        "return [Number(image.getAttribute('x')), Number(image.getAttribute('width'))]"
    )
    image = browser.run(script, figure)
    column = (right - left) / len(shown)
    assert image[1] == pytest.approx(column * len(STEPS), rel=0.01)
    assert image[0] == pytest.approx(left - column * STEPS.tolist().index(shown[0]), abs=2)
    browser.pointer(figure, (right - column / 2, place[1]))
    assert browser.find("#tip").text.startswith(f"step {shown[-1]}\nL1H2: ")


def test_dragging_zooms_every_panel_to_the_same_steps_and_back(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["events"])
    before = drawing(browser)
    overview, llc = panels(browser, "overview"), panels(browser, "llc-llc")[0]
    places = dict(zip(STEPS.tolist(), marks(browser, overview[0]), strict=True))
    y = overview[0]["box"][1] + 10
    browser.pointer(OVERVIEW, (places[550], y), (places[700], y), (places[900], y), drag=True)
    for panel in (overview[0], overview[2], llc):
        xs = marks(browser, panel)
        steps = STEPS[-len(xs) :]  # the LLC has no mark where it is rejected, at the start
        shown = {int(s): inside(panel, x) for s, x in zip(steps, xs, strict=True)}
        low, high = shown[550], shown[900]
        assert abs(low) < 0.02
        assert abs(high - 1) < 0.02
        for s in (600, 700, 800):  # still a log axis
            assert shown[s] == pytest.approx(low + (high - low) * math.log(s / 550) / math.log(900 / 550), abs=2e-3), (
                panel["lines"],
                s,
            )
    ticks = browser.run(
        f"{PANELS} return [...group(figures['llc-llc'].panels[0]).querySelectorAll('.ticks text')]"
        ".map((text) => text.textContent)"
    )
    assert {"600", "700", "800"} <= set(ticks)
    assert "steps 5" in browser.run("return document.getElementById('said').textContent")
    browser.find("#tools button:nth-child(2)").click()
    assert drawing(browser) == before
    browser.pointer(
        "figure#figure-llc-llc",
        (llc["box"][0] + 100, llc["box"][1] + 9),
        (llc["box"][0] + 300, llc["box"][1] + 9),
        drag=True,
    )
    assert drawing(browser) != before
    browser.run("document.querySelector('#figure-overview svg').dispatchEvent(new MouseEvent('dblclick'))")
    assert drawing(browser) == before


def test_linear_steps_are_evenly_spaced_and_come_back_to_the_drawing(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["events"])
    before = drawing(browser)
    browser.find("#tools button").click()
    panel = panels(browser, "overview")[0]
    slope = np.polyfit(STEPS, marks(browser, panel), 1)
    np.testing.assert_allclose(
        np.polyval(slope, STEPS), marks(browser, panel), atol=0.6
    )  # the first lies in the old margin
    assert "(linear)" in browser.find(f"{OVERVIEW} svg").get_attribute("textContent")
    assert browser.find("#tools button").text == "Steps: linear"
    browser.find("#tools button").click()
    assert drawing(browser) == before


def test_switches_hide_and_show_their_series(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["events"])
    switch = browser.find(f"{OVERVIEW} .tools:not(.arrange) button:nth-child(2)")
    assert switch.text == "λ̂"
    group = panels(browser, "overview")[1]["group"]
    shown = "return getComputedStyle(document.getElementById(arguments[0])).display !== 'none'"
    for state in (False, True):
        switch.click()
        assert browser.run(shown, group) is state
        assert switch.get_attribute("aria-pressed") == str(state).lower()


def test_keys_read_values_zoom_and_turn(browser: Browser, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(pages["events"])
    before, svg = drawing(browser), f"{OVERVIEW} svg"

    def said() -> str:
        return browser.run("return document.getElementById('said').textContent")

    browser.keys(svg, Keys.END)
    assert said().startswith("step 2000\nloss/loss: ")
    assert "induction/prefix_matching max: " in said()  # all panels of the figure are read
    browser.keys(svg, Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert said().startswith(f"step {STEPS[2]}\n")
    browser.keys(svg, Keys.END, "+")
    xs = marks(browser, panels(browser, "overview")[0])
    assert inside(panels(browser, "overview")[0], xs[0]) < -0.2  # step 0 went out to the left
    assert drawing(browser) != before
    browser.keys(svg, "0", Keys.ESCAPE)
    assert drawing(browser) == before
    assert not browser.find("#tip").is_displayed()
    browser.keys("body", "l")
    assert browser.find("#tools button").text == "Steps: linear"
    assert browser.run("return document.querySelector('#figure-overview svg').tabIndex") == 0
    described = (
        "return document.getElementById(document.querySelector('#figure-overview svg')"
        ".getAttribute('aria-describedby')).textContent"
    )
    assert browser.run(described).startswith("In a figure")


def test_any_series_can_be_chosen_and_follows_the_zoom(browser: Browser, pages: dict[str, Path]) -> None:
    from selenium.webdriver.support.ui import Select

    browser.open(pages["events"])
    choice = Select(browser.find("#any select"))
    assert [one.text for one in choice.options] == [one.name for one in series_of(CASES["events"][0])]
    choice.select_by_visible_text("llc/llc")
    assert browser.run("return document.querySelectorAll('#any .bad').length") == 10
    assert browser.run("return document.querySelectorAll('#any .dot').length") == len(STEPS) - 10
    assert browser.run("return document.querySelectorAll('#any line.event.bump, #any line.event.turn').length") == 2
    assert "Hollow: 10 rejected" in browser.find("#any figcaption").text
    dots = "return [...document.querySelectorAll('#any .dot')].map((dot) => Number(dot.getAttribute('cx')))"
    before = browser.run(dots)
    browser.pointer("#any", (300, 50), (500, 50), drag=True)
    after = browser.run(dots)
    assert after[-1] > 620 > before[-1]
    assert marks(browser, panels(browser, "overview")[0])[0] < 0  # and the other figures with it


def test_a_comparison_of_runs_has_its_events_and_zooms(browser: Browser, pages: dict[str, Path]) -> None:
    from selenium.webdriver.support.ui import Select

    browser.open(pages["compared"])
    Select(browser.find("#any select")).select_by_visible_text("r3: w/x")
    assert browser.run("return document.querySelectorAll('#any line.event.jump').length") == 1
    before = drawing(browser)
    box = panels(browser, "runs")[0]["box"]
    browser.pointer('figure[data-name="runs"]', (box[0] + 300, box[1] + 20), (box[2] - 20, box[1] + 20), drag=True)
    assert drawing(browser) != before


def test_the_numbers_are_saved_as_csv(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["markup"])
    browser.run("URL.createObjectURL = (blob) => { blob.text().then((text) => { window.saved = text; }); return '#'; }")
    browser.find("#tools button:nth-child(3)").click()
    lines = browser.run("return new Promise((done) => setTimeout(() => done(window.saved), 50))").split("\n")
    assert lines[0] == "series,units,step,value,se,rejected"
    assert len(lines) == 1 + 2 * len(TEN)
    assert lines[11].endswith(",,0,,,0")  # no value is an empty cell
    assert lines[-1].endswith(f",,90,{float(f'{math.cos(90):.5g}')},,0")


def test_light_dark_and_print(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["events"])
    look = ("return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color, "
            "getComputedStyle(document.querySelector('figure svg')).filter]")  # fmt: skip
    seen = {}
    for scheme in ("light", "dark"):
        browser.media(prefers_color_scheme=scheme)
        seen[scheme] = browser.run(look)
        page, text = ([int(v) for v in colour[4:-1].split(",")] for colour in seen[scheme][:2])
        assert abs(sum(page) - sum(text)) > 450, (scheme, page, text)  # readable
    assert seen["light"][2] == "none" != seen["dark"][2]
    browser.media(print="print")
    assert not browser.find("#tools").is_displayed()
    assert browser.run(look)[2] == "none"
    browser.media()
    printed = base64.b64decode(browser.driver.print_page())
    assert printed.startswith(b"%PDF")
    assert len(printed) > 50_000


def test_a_live_page_keeps_the_zoom_when_it_loads_itself_again(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["live"])
    browser.keys(f"{OVERVIEW} svg", "+")
    browser.keys("body", "l")
    zoomed = drawing(browser)
    browser.driver.refresh()
    assert drawing(browser) == zoomed
    browser.keys("body", "l")
    browser.keys(f"{OVERVIEW} svg", "0")
    browser.driver.refresh()
    assert drawing(browser) != zoomed


def test_a_page_of_500_series_by_2000_steps_responds(browser: Browser, pages: dict[str, Path]) -> None:
    from selenium.webdriver.support.ui import Select

    browser.open(pages["large"])
    assert browser.run("return document.querySelectorAll('*').length") < 40_000  # far fewer than its million values
    assert "are not drawn here: choose them under Any series" in browser.find("#watches").text
    panel = panels(browser, "overview")[0]
    browser.pointer(OVERVIEW, (300, panel["box"][1] + 20))
    assert browser.find("#tip").text.startswith("step ")
    browser.pointer(OVERVIEW, (300, panel["box"][1] + 20), (400, panel["box"][1] + 20), drag=True)
    assert browser.run("return document.querySelectorAll('.ticks').length") > 50
    choice = Select(browser.find("#any select"))
    assert len(choice.options) == 500
    choice.select_by_visible_text("w3/v30")
    assert browser.run("return document.querySelector('#any .line').getAttribute('d').split('L').length") == 800
    assert "this page holds 800, evenly spaced; report.json has all" in browser.find("#any").text
    assert pages["large"].stat().st_size < 5_000_000
    assert browser.run("return document.querySelectorAll('#any line.event.jump').length") == 1
    assert browser.logged() == []
