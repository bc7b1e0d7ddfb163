"""How a reader finds their way on the page in a real browser: the first screen, links to steps, their own order."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest

from tests.reports import test_browser
from tests.support.browser import NEEDS_BROWSER, Browser, cursors, marks, panels
from tests.support.synthetic import STEPS

browser, pages = test_browser.browser, test_browser.pages


def test_a_link_marks_its_step_and_opens_what_it_leads_to(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["events"], "#step=650", unfolded=False)
    folded = "return [...document.querySelectorAll('details.part')].filter((part) => part.open).length"
    assert browser.run(folded) == 0
    at = int(np.flatnonzero(STEPS == 650)[0])
    first = panels(browser, "stages")[0]
    assert cursors(browser, "stages")[0] == pytest.approx(marks(browser, first)[at], abs=0.05)
    # another click marks another step, and the address says which
    place = (marks(browser, first)[at + 2], first["box"][3] - 5)
    browser.pointer('figure[data-name="stages"]', place, place, drag=True)
    assert browser.run("return location.hash") == f"#step={STEPS[at + 2]}"
    browser.open(pages["events"], "#llc", unfolded=False)
    assert browser.run("return document.querySelector('#llc > details').open")
    assert browser.run(folded) == 1


def test_figures_are_hidden_moved_and_pinned(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["events"])
    figure = 'figure[data-name="llc-llc"]'
    button = "document.querySelectorAll(arguments[0] + ' > .arrange button')[arguments[1]].click()"
    parent = "return document.querySelector(arguments[0]).parentElement.id"
    browser.run(button, figure, 2)
    assert browser.run(parent, figure) == "pinned"
    browser.run(button, figure, 2)
    assert browser.run(parent, figure) != "pinned"
    shown = "return getComputedStyle(document.querySelector(arguments[0] + ' svg')).display !== 'none'"
    for state in (False, True):
        browser.run(button, figure, 0)
        assert browser.run(shown, figure) is state
    order = "return [...document.querySelectorAll('#overview figure')].map((one) => one.dataset.name)"
    before = browser.run(order)
    browser.run(button, f'figure[data-name="{before[1]}"]', 1)
    assert browser.run(order) == [before[1], before[0], *before[2:]]


def test_the_first_screen_holds_every_answer(browser: Browser, pages: dict[str, Path]) -> None:
    sizes = {}
    for width in (1280, 390):
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.open(pages["events"], unfolded=False)
        bottom = "return document.querySelector(arguments[0]).getBoundingClientRect().bottom"
        sizes[width] = [browser.run(bottom, selector) for selector in ("dl.answers", "#story figure svg")]
        assert browser.run("return document.documentElement.scrollWidth") <= width  # the page never scrolls sideways
        if width == 1280:
            assert browser.run("return document.documentElement.scrollHeight") <= 6 * 800
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert max(sizes[1280]) <= 800


def test_the_list_of_what_needs_a_browser_is_these_files() -> None:
    here = {
        name
        for name, one in (vars(test_browser) | globals()).items()
        if name.startswith("test_") and callable(one) and "browser" in inspect.signature(one).parameters
    }
    assert here == set(NEEDS_BROWSER)
