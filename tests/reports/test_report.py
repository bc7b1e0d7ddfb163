"""Derived series, stages, the story in words, and the page: one file, offline, escaped, the same bytes each time."""

from __future__ import annotations

import html.parser
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from devmon.analysis import report as write_report
from devmon.analysis.derive.llc import llc
from devmon.analysis.derive.watch_series import series_of
from devmon.analysis.detection.events import Event, Fit
from devmon.analysis.detection.results import Detection
from devmon.analysis.reports.report import key_series
from devmon.analysis.reports.story import tell
from devmon.analysis.reports.tables import run_table
from devmon.analysis.series import Series
from devmon.analysis.transitions.order import lags, main_event
from devmon.analysis.transitions.stages import stages, transitions
from devmon.analysis.wording import number
from devmon.errors import StoreError
from devmon.store.trajectory import Trajectory
from tests.support.synthetic import STEPS, Run, induction_run, rise, traces, watch

TEN = np.arange(0, 100, 10)


def jump(series: str, step: float, *, half: float = 5.0, span: float = 50.0, q: float = 0.01, **more: Any) -> Event:
    found = Event("jump", step, (step - half, step + half), 1.0, (0.9, 1.1), 0.1, (step - span, step + span), 0.005, q,
                  True, "", series)  # fmt: skip
    return replace(found, **more)


def detection(*events: Event, outcomes: dict[str, str] | None = None) -> Detection:
    fits: dict[str, Fit] = {}
    for event in events:
        draws = np.linspace(*event.interval, 50)
        known = fits.get(event.series, Fit("EVENTS", series=event.series))
        locations = (*known.locations, (event, draws))
        fits[event.series] = replace(known, found=(*known.found, event), locations=locations)
    fits |= {name: Fit(outcome, series=name) for name, outcome in (outcomes or {}).items()}
    return Detection(fits, events, 40, {"n_null": 199, "level": 0.9})


# ---- derived series ----


def test_the_largest_element_comes_with_its_own_error() -> None:
    values = np.array([[[0.1, 0.9]], [[0.8, 0.2]], [[np.nan, 0.3]], [[np.nan, np.nan]]])
    errors = np.array([[[5.0, 0.01]], [[0.02, 5.0]], [[5.0, 0.03]], [[5.0, 5.0]]])
    dims = ("step", "layer", "head")
    data = watch(np.arange(4), {"s": (dims, values), "s_se": (dims, errors)}, ["s"], "Heads")
    largest, first, second = series_of(Run({"w": data}))
    assert [one.name for one in (largest, first, second)] == ["w/s max", "w/s[layer=0, head=0]", "w/s[layer=0, head=1]"]
    np.testing.assert_array_equal(largest.values, [0.9, 0.8, 0.3, np.nan])
    assert largest.se is not None
    np.testing.assert_array_equal(largest.se[:3], [0.01, 0.02, 0.03])
    np.testing.assert_array_equal(second.values, values[:, 0, 1])
    np.testing.assert_array_equal(first.se, errors[:, 0, 0])


def test_without_a_headline_every_float_scalar_is_followed_but_no_error_and_no_reference() -> None:
    names = ["x", "x_se", "uniform", "majority", "control_x", "x_reference"]
    data = watch(
        TEN, {name: np.ones(10) for name in names} | {"label": np.array(["a"] * 10, dtype=object)}, None, "Mine"
    )
    assert [one.name for one in series_of(Run({"w": data}))] == ["w/x"]


def test_a_large_array_is_followed_by_its_maximum_alone() -> None:
    data = watch(TEN, {"v": (("step", "feature"), np.random.default_rng(0).random((10, 65)))}, ["v"], "Features")
    (only,) = series_of(Run({"w": data}))
    np.testing.assert_array_equal(only.values, data["v"].values.max(1))


def test_llc_points_are_rejected_by_their_verdict() -> None:
    run = induction_run()
    derived = llc(run["llc"])
    one = next(one for one in series_of(run) if one.name == "llc/llc")
    assert one.rejected is not None
    np.testing.assert_array_equal(one.rejected, derived["verdict"].values != "ok")
    np.testing.assert_array_equal(one.se, derived["se"].values)
    assert one.units == ""  # "1" is not a unit to print


def test_infinite_values_are_rejected_and_not_an_error() -> None:
    values = np.where(TEN == 30, np.inf, 1.0)
    (one,) = series_of(Run({"w": watch(TEN, {"x": values}, None, "Mine")}))
    assert one.rejected is not None
    assert np.flatnonzero(one.rejected).tolist() == [3]


# ---- stages ----


def test_jumps_that_go_on_together_are_one_transition_and_a_wide_one_is_its_own() -> None:
    sharp, near = jump("a/x", 640), jump("b/x", 600)
    wide = jump("c/x", 160, half=20, span=150)  # reaches 310, where none of the others is
    (early, late) = transitions([sharp, wide, near])
    assert [event.series for event in early.events] == ["c/x"]
    assert {event.series for event in late.events} == {"a/x", "b/x"}
    assert (late.step, late.interval, late.span) == (620, (595, 645), (550, 690))


def test_a_wide_jump_does_not_chain_two_sharp_ones() -> None:
    ends = [jump("a/x", 200, span=10), jump("b/x", 800, span=10)]
    bridge = jump("c/x", 500, half=30, span=400)
    assert len(transitions([*ends, bridge])) == 3


def test_a_badly_placed_jump_does_not_place_a_transition() -> None:
    vague = jump("c/x", 640, half=300)  # 340 to 940, more than a factor of 2
    for events, expected in (([jump("a/x", 620), vague], (620, (615, 625))), ([vague], (640, (340, 940)))):
        (one,) = transitions(events)
        assert len(one.events) == len(events)
        assert (one.step, one.interval) == expected
    _, happened, _ = told(jump("a/x", 620), vague)
    assert "90% intervals of its jumps but for 1 wide one within 615–625" in happened
    assert "90% intervals of its jumps within 340–940" in told(vague)[1]


def test_no_transition_from_a_weak_jump_a_turn_or_a_single_head() -> None:
    events = [jump("a/x", 640, q=0.06), replace(jump("b/x", 640), kind="turn"), jump("c/x[layer=0]", 640)]
    assert transitions(events) == []


def test_changes_of_the_stages_add_up() -> None:
    steps = np.arange(0, 1001, 50)
    one = Series("a/x", steps, steps * 2.0, np.full(21, 0.3))
    refused = Series("llc/llc", steps, np.where(steps < 100, -400.0, 5.0), None, "", steps < 100)
    parts = stages([one, refused], detection(jump("a/x", 510, span=35)))
    assert [(part.kind, part.start, part.end) for part in parts] == [
        ("stage", 0, 450), ("transition", 450, 550), ("stage", 550, 1000)]  # fmt: skip
    changes = [part.changes["a/x"] for part in parts]
    assert sum(change.value for change in changes) == 2000
    assert changes[0].se == pytest.approx(0.3 * 2**0.5)
    first = parts[0].changes["llc/llc"]
    assert (first.value, first.steps) == (0, (100, 450))  # the rejected −400 is not used


def test_transitions_that_overlap_meet_and_stages_stay_in_order() -> None:
    steps = np.arange(0, 1001, 10)
    parts = stages(
        [Series("a/x", steps, steps * 1.0)], detection(jump("a/x", 400, span=100), jump("b/x", 520, span=100))
    )
    ends = [(part.start, part.end) for part in parts]
    assert [part.kind for part in parts] == ["stage", "transition", "transition", "stage"]
    assert all(a[1] == b[0] for a, b in zip(ends, ends[1:], strict=False))
    assert sum(part.changes["a/x"].value for part in parts) == 1000


def test_no_event_is_one_stage() -> None:
    (only,) = stages([Series("a/x", TEN, TEN * 1.0)], detection())
    assert (only.kind, only.start, only.end) == ("stage", 0, 90)


def test_the_main_event_is_prefix_matching_else_the_clearest() -> None:
    clear, vague = jump("a/x", 100), replace(jump("b/x", 50), size_interval=(0.1, 1.9))
    induction = replace(jump("induction/prefix_matching max", 640), p_value=0.02)
    assert main_event([vague, clear]) is clear
    assert main_event([vague, clear, induction]) is induction
    assert main_event([replace(clear, q_value=0.2)]) is None


# ---- the story ----


def told(
    *events: Event, outcomes: dict[str, str] | None = None, verdicts: Any = None, **more: Any
) -> tuple[str, str, str]:
    names = {event.series for event in events} | set(outcomes or {})
    series = [Series(name, np.arange(0, 1000, 10), np.arange(100.0)) for name in sorted(names)]
    story = tell(series, detection(*events, outcomes=outcomes), verdicts or {}, control=more.get("control", False))
    return story.outcome, " ".join(story.happened), " ".join(story.against)


def test_what_came_first_is_said_the_right_way_round() -> None:
    main = jump("induction/prefix_matching max", 640, span=150)
    early, late = jump("prev/x", 560, span=150), jump("gain/x", 700, span=150)
    head, happened, _ = told(main, early, late)
    assert head == "EVENTS"
    assert "1 transition." in happened
    assert re.search(r"the jump of prev/x came 80 steps before it \[7\d, 8\d\] \(probability > 0\.99\)", happened)
    assert re.search(r"the jump of gain/x came 60 steps after it", happened)
    rows = {row.event.series: row for row in lags(detection(main, early, late))}
    assert (rows["prev/x"].steps, rows["gain/x"].steps) == pytest.approx((-80, 60))
    assert rows["prev/x"].first > 0.99
    assert rows["gain/x"].first < 0.01


def test_order_is_open_where_intervals_meet_or_an_event_is_not_resolved() -> None:
    main, same = jump("a/prefix_matching max", 640), jump("b/x", 642)
    coarse = replace(jump("c/x", 560), resolved=False, note="abruptness unresolved: measure steps 555, 560, 565")
    _, happened, against = told(main, same, coarse)
    assert "the order is not settled for c/x (jump), b/x (jump)" in happened.replace(" and ", ", ")
    assert "before it" not in happened
    assert "measure steps 555, 560, 565" in against


def test_no_event_is_stated_as_a_result_and_weak_events_argue_nothing() -> None:
    head, happened, against = told(jump("a/x", 300, q=0.3), outcomes={"b/x": "NO EVENT"}, control=True)
    assert head == "NO EVENT"
    assert "control" in happened
    assert "NO EVENT: in 2 series and 40 tests" in happened
    assert "1 event found in a single series does not stand among 40 series" in against


def test_rejection_and_lack_of_data_have_their_own_names() -> None:
    verdicts = {"llc": np.array(["negative"] * 3 + ["diverged"])}
    head, happened, _ = told(outcomes={"llc/llc": "SAMPLER REJECTED"}, verdicts=verdicts)
    assert head == "SAMPLER REJECTED"
    assert "all 4 LLC estimates are rejected (negative 3, diverged 1)" in happened
    partly = {"llc": np.array(["negative", "ok", "ok", "ok"])}
    assert "1 of 4 LLC estimates are rejected" in told(outcomes={"llc/llc": "NO EVENT"}, verdicts=partly)[2]
    assert told(outcomes={"a/x": "UNRESOLVED"})[0] == "UNRESOLVED"


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (-1234.5, "−1234"), (0.00012345, "0.000123"), (1.5e-7, "1.5e−7"), (None, "–"), (float("nan"), "–"), (float("-inf"), "−∞"), (12345678.0, "12345678")])  # fmt: skip
def test_numbers_for_readers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_key_series_are_loss_llc_and_one_of_each_watch() -> None:
    names = ["p/a", "p/b", "llc/llc", "loss/loss", "loss/icl", "h/s max", "h/s[layer=0]", "q/c", "r/d"]
    chosen = key_series([Series(name, TEN, TEN * 1.0) for name in names], [jump("q/c", 50)])
    assert [one.name for one in chosen] == ["loss/loss", "llc/llc", "q/c", "p/a", "h/s max", "r/d"]


# ---- the page ----


class Reader(html.parser.HTMLParser):
    """Collects what a browser would load, all ids, and the balance of tags."""

    VOID = ("meta", "img", "br", "link", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def small_run(**more: Any) -> Run:
    """The induction run with the watches that matter, few enough to be searched in seconds."""
    run = induction_run(**more)
    keep = {"loss": run["loss"].assign_attrs(headline=["loss"]), "llc": run["llc"]}
    return Run(keep | {"induction": run["induction"].isel(layer=[1], head=[0, 2])}, run.attrs)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("report")
    path = write_report(small_run(), folder / "report.html", figures=folder / "figures")
    return folder, path.read_text(encoding="utf-8")


def test_page_is_one_offline_file(made: tuple[Path, str]) -> None:
    _, text = made
    page = Reader(text)
    assert page.open == []
    assert len(text.encode()) < 1_500_000
    assert text.lstrip().startswith("<!doctype html>")
    assert page.all("meta")[0] == {"charset": "utf-8"}
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert page.all("script") == [{"type": "application/json", "id": "numbers"}, {}]  # the page's own, none loaded
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in page.all("meta"))
    for tag, attrs in page.tags:
        for key in ("src", "href", "xlink:href", "data", "action"):
            value = attrs.get(key)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), (tag, key, value)
    assert not re.search(r"url\((?!#)|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_page_is_accessible_and_its_ids_are_unique(made: tuple[Path, str]) -> None:
    page = Reader(made[1])
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:  # every inner reference points at something
        link = attrs.get("href") or attrs.get("xlink:href") or ""
        assert not link.startswith("#") or link[1:] in ids
    assert len(page.all("h1")) == 1
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in page.all("svg"))
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    headings = [attrs["id"] for attrs in page.all("section")]
    assert headings == ["story", "overview", "stages", "events", "order", "llc", "watches", "provenance", "reading"]


def test_page_tells_the_transition_that_was_put_in(made: tuple[Path, str]) -> None:
    _, text = made
    match = re.search(r"induction/prefix_matching max rises abruptly by (0\.\d+) at step (\d+) \[(\d+), (\d+)\]", text)
    assert match is not None
    size, _, low, high = (float(group) for group in match.groups())
    assert low <= 640 <= high
    assert size == pytest.approx(0.72, abs=0.05)
    assert "10 of 59 LLC estimates are rejected (negative 10)" in text
    assert text.count('<tr class="weak">') >= 10  # each rejected estimate is marked in the table
    assert "transition 1" in text
    assert "0123456789abcdef" in text
    assert "InductionHeads, in one sentence." in text
    assert "arXiv:2209.11895" in text


def test_figures_are_written_as_png_too(made: tuple[Path, str]) -> None:
    folder, text = made
    shown = re.findall(r'<figure id="figure-([^"]+)"', text)
    files = {path.stem: path.read_bytes() for path in (folder / "figures").iterdir()}
    assert sorted(files) == sorted(shown)
    assert all(data.startswith(b"\x89PNG") for data in files.values())


def test_same_trajectory_gives_same_bytes_stored_or_not(tmp_path: Path) -> None:
    run = Run({"mine": watch(TEN, {"x": np.sin(TEN)}, None, "Mine")}, {"title": "T"})
    first = write_report(run, tmp_path / "a.html").read_bytes()
    assert write_report(run, tmp_path / "b.html").read_bytes() == first


def test_a_stored_trajectory_gives_the_same_series_as_the_data_in_memory(tmp_path: Path) -> None:
    memory = Run({name: induction_run()[name] for name in ("llc", "repeat_gain")})
    store = Trajectory(tmp_path / "run.zarr", seed=0, title="T")
    for name in memory.names():
        attrs = {key: memory[name].attrs[key] for key in ("instrument", "fields", "fingerprint", "doc")}
        store.declare(name, attrs)
        for i, step in enumerate(STEPS[:12]):
            row = memory[name].isel(step=i, drop=True)
            store.append(name, int(step), row, weights=f"{step:016x}", seconds=0.25)
    store.fold()
    short = Run({name: memory[name].isel(step=slice(0, 12)) for name in memory.names()})
    for one, two in zip(series_of(store), series_of(short), strict=True):
        assert one.name == two.name
        np.testing.assert_array_equal(one.values, two.values)
    text = write_report(store, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<h1>T</h1>" in text
    assert "12 checkpoints from step 0 to 12" in text


def test_names_and_attributes_cannot_inject_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    data = watch(TEN, {f"x{evil}$\\frac": np.sin(TEN)}, None, f"{evil}")
    data.attrs |= {"doc": f"{evil} doc", "fields": {evil: evil}}
    run = Run({"w": data}, {"title": f"{evil}&co", "model": evil, "note": {"deep": [evil]}})
    text = write_report(run, tmp_path / "r.html").read_text(encoding="utf-8")
    assert text.count("<script") == 2
    assert text.count("&lt;script&gt;") >= 8
    assert text.count("\\u003cscript\\u003e") >= 2  # and in the numbers for the page's own script
    assert Reader(text).open == []


def test_a_failure_leaves_the_old_report_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(StoreError, match="disk full"):
        write_report(Run({}), path)
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    assert path.read_text() == "old"


RUNS: dict[str, tuple[Run, str]] = {
    "a scalar series of one's own": (
        Run({"mine": xr.Dataset({"x": ("step", rise(np.arange(0, 400, 10), 200, 0.03))}, {"step": np.arange(0, 400, 10)})}),
        "EVENTS",
    ),
    "a sampler that was always rejected": (
        Run({"llc": traces(STEPS[:20], np.full(20, -300.0), np.random.default_rng(0))}),
        "SAMPLER REJECTED",
    ),
    "noise": (Run({"w": watch(STEPS, {"x": np.random.default_rng(3).standard_normal(len(STEPS))}, None, "X")}), "NO EVENT"),
    "one checkpoint": (Run({"w": watch(np.array([7]), {"x": np.ones(1)}, None, "X")}), "UNRESOLVED"),
    "a watch without rows": (Run({"w": xr.Dataset(coords={"step": np.array([], dtype=np.int64)})}), "UNRESOLVED"),
    "nothing at all": (Run({}), "UNRESOLVED"),
    "text, infinity and NaN": (
        Run({"w": watch(TEN, {"t": np.array(["a"] * 10, dtype=object), "i": np.where(TEN == 0, np.inf, 1.0),
                              "n": np.full(10, np.nan), "h": (("step", "layer", "head"), np.full((10, 1, 2), np.nan))},
                        ["t", "i", "n", "h"], "X")}),
        "NO EVENT",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_any_trajectory_gives_a_report(name: str, tmp_path: Path) -> None:
    run, outcome = RUNS[name]
    text = write_report(run, tmp_path / "r.html").read_text(encoding="utf-8")
    page = Reader(text)
    assert page.open == []
    assert f'<span class="outcome">{outcome}</span>' in text


# ---- the package ----


def test_each_plan_of_a_run_that_was_measured_twice_is_told() -> None:
    plans = [{"steps": "all"}, {"steps": "log:20", "watch": ["llc"]}]
    rows = [row.cells for row in run_table({"seed": 1, "measured": plans}).rows]
    assert rows == [["seed", "1"], ["measured 1 of 2", "steps all"], ["measured 2 of 2", "steps log:20, watch llc"]]
    assert [row.cells for row in run_table({"measured": plans[:1]}).rows] == [["measured", "steps all"]]


def test_importing_the_package_is_light_and_names_stay_functions() -> None:
    code = (
        "import sys, devmon.analysis as a\n"
        "heavy = {'torch', 'matplotlib', 'scipy', 'pandas', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import devmon.analysis.reports.report, devmon.analysis.detection.search, devmon.analysis.transitions.stages\n"
        "assert a.report.__name__ == 'report' and callable(a.report) and callable(a.detect) and callable(a.stages)\n"
        "from devmon.analysis import Event, Detector, report, plots, llc, series_of, Series, lead_lag, Fit, Detection\n"
        "assert callable(report) and plots.plot_series\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(dir(a)) >= {'report', 'detect', 'plots'}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_folder_is_not_imported_by_its_own_name() -> None:
    code = "import sys; sys.path.insert(0, '.'); import analysis"
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert "ImportError: import devmon.analysis, not analysis" in ran.stderr
