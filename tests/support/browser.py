"""A headless Chromium for the tests of the page, and what they ask it; one list of the tests that need it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

NEEDS_BROWSER = (  # skipped by name where there is no Chromium; in CI nothing of it may be skipped
    "test_page_opens_without_errors_and_asks_for_nothing",
    "test_markup_in_names_and_errors_does_nothing",
    "test_hover_says_the_value_and_the_cursor_goes_through_all_panels",
    "test_a_heat_map_says_its_cell_and_zooms_with_the_others",
    "test_dragging_zooms_every_panel_to_the_same_steps_and_back",
    "test_linear_steps_are_evenly_spaced_and_come_back_to_the_drawing",
    "test_switches_hide_and_show_their_series",
    "test_keys_read_values_zoom_and_turn",
    "test_any_series_can_be_chosen_and_follows_the_zoom",
    "test_a_comparison_of_runs_has_its_events_and_zooms",
    "test_the_numbers_are_saved_as_csv",
    "test_light_dark_and_print",
    "test_a_live_page_keeps_the_zoom_when_it_loads_itself_again",
    "test_a_link_marks_its_step_and_opens_what_it_leads_to",
    "test_figures_are_hidden_moved_and_pinned",
    "test_the_first_screen_holds_every_answer",
    "test_a_page_of_500_series_by_2000_steps_responds",
)
SWITCHES = (
    "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1200,900",
)  # fmt: skip


def programs() -> tuple[str, str] | None:
    """Where Chromium and its driver are, by their names in Debian's packages chromium and chromium-driver."""
    found = shutil.which("chromium"), shutil.which("chromedriver")
    return None if None in found else found  # type: ignore[return-value]


def settle(items: list[pytest.Item]) -> None:
    """Skip the tests of the list where there is no browser; refuse that in CI, and tests that are not in the list."""
    asking = [item for item in items if "browser" in getattr(item, "fixturenames", ())]
    unknown = {getattr(item, "originalname", item.name) for item in asking} - set(NEEDS_BROWSER)
    if unknown:
        raise pytest.UsageError(
            f"these tests need a browser and are not in tests/browser.py: {', '.join(sorted(unknown))}"
        )
    if programs() is None and asking:
        if os.environ.get("CI"):
            raise pytest.UsageError("CI has no chromium and chromedriver (Debian: chromium, chromium-driver)")
        for item in asking:
            item.add_marker(pytest.mark.skip(reason="no chromium and chromedriver on this machine"))


class Browser:
    """One window: opens pages from disk and says what they logged and asked for."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        chromium, chromedriver = programs() or ("", "")
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for switch in (*SWITCHES, f"user-data-dir={profile}"):
            options.add_argument(f"--{switch}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(chromedriver))

    def open(self, path: Path, hash: str = "", *, unfolded: bool = True) -> None:
        """A page, with its folded parts opened unless told otherwise."""
        self.driver.get("about:blank")
        self.driver.get(path.as_uri() + hash)
        if unfolded:
            self.run("document.querySelectorAll('details.part').forEach((part) => { part.open = true; })")
        self.run("scrollTo(0, 0)")

    def run(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def logged(self) -> list[dict[str, Any]]:
        return self.driver.get_log("browser")

    def requests(self) -> list[str]:
        """Addresses asked for since the last call, but for the page itself."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith(("data:", "chrome:")) and url != self.driver.current_url]

    def pointer(self, figure: str, *places: tuple[float, float], drag: bool = False) -> None:
        """Move over these places of a figure, given in the coordinates of its SVG; with `drag` the button is held."""
        from selenium.webdriver import ActionChains

        svg = self.find(f"{figure} svg")
        to_the_middle = "const m = arguments[0].getScreenCTM(); scrollBy(0, m.d * arguments[1] + m.f - innerHeight / 2)"
        self.run(to_the_middle, svg, places[0][1])
        on_screen = (
            "const m = arguments[0].getScreenCTM(); return arguments[1].map(([x, y]) => [m.a * x + m.e, m.d * y + m.f])"
        )
        where = self.run(on_screen, svg, places)
        chain = ActionChains(self.driver, duration=0)
        for i, (x, y) in enumerate(where):
            chain.w3c_actions.pointer_action.move_to_location(round(x), round(y))
            if drag and i == 0:
                chain.w3c_actions.pointer_action.click_and_hold()
        if drag:
            chain.w3c_actions.pointer_action.release()
        chain.perform()

    def keys(self, selector: str, *keys: str) -> None:
        self.find(selector).send_keys(*keys)

    def media(self, **features: str) -> None:
        """Emulate `print="print"` or prefers_color_scheme="dark"; nothing for the default."""
        named = [
            {"name": name.replace("_", "-"), "value": value} for name, value in features.items() if name != "print"
        ]
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"media": features.get("print", ""), "features": named}
        )


OVERVIEW = 'figure[data-name="overview"]'
PANELS = """
const group = (panel) => document.getElementById(panel.group);
const figures = JSON.parse(document.getElementById('numbers').textContent).figures;
"""


def panels(browser: Browser, figure: str) -> list[dict[str, Any]]:
    """What the page knows of the axes of a figure."""
    return browser.run(f"{PANELS} return figures[arguments[0]].panels", figure)


def marks(browser: Browser, panel: dict[str, Any]) -> list[float]:
    """The x of the points on the line of a panel, in their order."""
    script = (
        "return [...document.getElementById(arguments[0]).querySelectorAll('[clip-path] > use')]"
        ".map((node) => Number(node.getAttribute('x')))"
    )
    return [x for x in browser.run(script, panel["group"]) if x]


def cursors(browser: Browser, figure: str) -> list[float | None]:
    """The x of the cursor in each panel of a figure, None where it is hidden."""
    script = f"""{PANELS} return figures[arguments[0]].panels.map((panel) => {{
        const line = group(panel).querySelector('.cursor');
        return getComputedStyle(line).visibility === 'visible' ? Number(line.getAttribute('x1')) : null; }})"""
    return browser.run(script, figure)


def inside(panel: dict[str, Any], x: float) -> float:
    """Where x is in the panel: 0 at its left side, 1 at its right."""
    return (x - panel["box"][0]) / (panel["box"][2] - panel["box"][0])


def drawing(browser: Browser) -> list[str]:
    """Where everything of each figure lies, to tell whether it moved."""
    return browser.run(
        "return [...document.querySelectorAll('figure svg')].map((svg) => [...svg.querySelectorAll('[x], path')]"
        ".filter((node) => !node.closest('#any'))"
        ".map((node) => (node.getAttribute('x') ?? '') + (node.getAttribute('d') ?? '')).join())"
    )
