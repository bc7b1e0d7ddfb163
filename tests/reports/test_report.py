"""The page: one file, offline, escaped, the same bytes each time, from any trajectory."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from devmon.analysis import report as write_report
from devmon.analysis.derive.watch_series import series_of
from devmon.analysis.reports import writers
from devmon.analysis.reports.content import Paragraph, curve_numbers
from devmon.analysis.reports.figures import key_series
from devmon.analysis.reports.tables import run_table
from devmon.analysis.reports.writers import as_html
from devmon.analysis.series import Series
from devmon.errors import StoreError
from devmon.store.trajectory import Trajectory
from tests.support.reports import LONG, TEN, Reader, circuits, content, figures, jump, sketches, small_run
from tests.support.synthetic import STEPS, Run, induction_run, rise, traces, watch


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
    assert headings == [
        "story", "minor", "order", "against", "overview", "stages", "events", "llc", "watches", "provenance", "reading",
    ]  # fmt: skip


def test_page_tells_the_transition_that_was_put_in(made: tuple[Path, str]) -> None:
    _, text = made
    match = re.search(
        r"At step (\d+) \[(\d+), (\d+)\] the model learns induction: "
        r"induction \(best head\) rises by (0\.\d+) of its attention",
        text,
    )
    assert match is not None
    _, low, high, size = (float(group) for group in match.groups())
    assert low <= 640 <= high
    assert size == pytest.approx(0.72, abs=0.05)
    assert "10 of 59 estimates of λ̂ are rejected (negative 10)" in text
    assert text.count('<tr class="weak">') >= 10  # each rejected estimate is marked in the table
    assert "transition 1" in text
    assert "induction: head 0.1 (+0.6" in text
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


FINE = np.arange(0, 400, 10)
RUNS: dict[str, tuple[Run, str]] = {
    "a scalar series of one's own": (
        Run({"mine": xr.Dataset({"x": ("step", rise(FINE, 200, 0.03))}, {"step": FINE})}),
        "EVENTS",
    ),
    "a sampler that was always rejected": (
        Run({"llc": traces(STEPS[:20], np.full(20, -300.0), np.random.default_rng(0))}),
        "SAMPLER REJECTED",
    ),
    "noise": (
        Run({"w": watch(STEPS, {"x": np.random.default_rng(3).standard_normal(len(STEPS))}, None, "X")}),
        "NO EVENT",
    ),
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


def test_each_plan_of_a_run_that_was_measured_twice_is_told() -> None:
    plans = [{"steps": "all"}, {"steps": "log:20", "watch": ["llc"]}]
    rows = [row.cells for row in run_table({"seed": 1, "measured": plans}).rows]
    assert rows == [["seed", "1"], ["measured 1 of 2", "steps all"], ["measured 2 of 2", "steps log:20, watch llc"]]
    assert [row.cells for row in run_table({"measured": plans[:1]}).rows] == [["measured", "steps all"]]


def test_key_series_are_loss_llc_and_one_of_each_watch() -> None:
    names = ["p/a", "p/b", "llc/llc", "loss/loss", "loss/icl", "h/s max", "h/s[layer=0]", "q/c", "r/d"]
    chosen = key_series([Series(name, TEN, TEN * 1.0) for name in names], [jump("q/c", 50)])
    assert [one.name for one in chosen] == ["loss/loss", "llc/llc", "q/c", "p/a", "h/s max", "r/d"]


def test_sections_are_those_of_what_the_run_holds() -> None:
    keys = [section.key for section in content(Run({"sketch": sketches(), "circuit": circuits()})).sections]
    assert keys == [
        "story", "against", "overview", "stages", "events", "representation", "circuits", "provenance", "reading",
    ]  # fmt: skip
    plain = content(Run({"w": watch(TEN, {"x": np.sin(TEN)}, None, "Mine")}))
    assert [s.key for s in plain.sections] == [
        "story",
        "against",
        "overview",
        "stages",
        "events",
        "watches",
        "provenance",
        "reading",
    ]


def test_too_short_a_path_is_told_and_not_drawn() -> None:
    made = content(Run({"sketch": sketches(LONG[:5])}))
    section = next(one for one in made.sections if one.key == "representation")
    notes = [block.text for block in section.blocks if isinstance(block, Paragraph) and block.look == "note"]
    assert any("needs 8 values" in note for note in notes), notes
    assert any(name.startswith("sketch-similarity") for name in figures(made))


def test_144_heads_at_150_checkpoints_are_a_page_of_at_most_one_and_a_half_megabytes() -> None:
    steps = np.unique(np.geomspace(1, 1e5, 190).astype(int))[-150:]
    rng = np.random.default_rng(0)
    scores = 0.5 + 0.1 * rng.standard_normal((150, 12, 12)).cumsum(0)
    errors = 0.01 + 0.001 * rng.random((150, 12, 12))
    dims = ("step", "layer", "head")
    data = watch(steps, {"score": (dims, scores), "score_se": (dims, errors)}, ["score"], "InductionHeads")
    said = content(Run({"heads": data}))
    (rows,) = {len(panel.rows) for figure in figures(said).values() for panel in figure.panels if panel.values}
    assert rows == 144
    page = as_html(said)
    assert len(page.encode()) <= 1_500_000
    held = json.loads(re.findall(r'id="numbers">(.*?)</script>', page, re.DOTALL)[0])
    assert "note" not in held
    assert all(len(one["values"]) == 150 for one in held["series"])


def test_a_page_of_too_many_numbers_keeps_steps_of_each_series_evenly_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writers, "PAGE_NUMBERS", 300)
    steps = np.arange(100)
    rejected = np.isin(steps, [0, 50, 99])
    long = Series("a/long", steps, steps**2.0, 1.0 + steps, rejected=rejected)
    short = Series("b/short", steps[:20], steps[:20] * 1.0)
    said = replace(content(small_run()), series=[curve_numbers(long), curve_numbers(short), curve_numbers(long)])
    held = writers._numbers(said)
    assert held["note"].startswith("Of series of more than 70 steps this page holds 70, evenly spaced")
    first, other, _ = held["series"]
    grid = held["grids"][first["steps"]]
    assert (len(grid), grid[0], grid[-1]) == (70, 0, 99)
    assert first["values"] == [float(step**2) for step in grid]
    assert first["se"] == [1.0 + step for step in grid]
    assert [grid[i] for i in first["rejected"]] == [step for step in grid if step in (0, 50, 99)]
    assert held["grids"][other["steps"]] == list(range(20))
