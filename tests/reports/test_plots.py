"""Figures show the numbers they were given: bands, marks, rows and intervals are read back from the axes."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from typing import Any

import matplotlib
import numpy as np
import pytest
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from devmon.analysis import plots
from devmon.analysis.derive.llc import llc
from devmon.analysis.detection.events import Event
from devmon.analysis.series import Series
from tests.support.reports import jump
from tests.support.synthetic import STEPS, induction_run, watch


def event(kind: str = "jump", step: float = 640.0, series: str = "a/b", q: float | None = 0.01) -> Event:
    return Event(
        kind, step, (step - 20, step + 30), 1.0, (0.9, 1.1), 0.1, (step - 50, step + 50), 0.005, q, True, "", series
    )


def series(name: str = "a/b", rejected: np.ndarray | None = None, se: float | None = 0.1) -> Series:
    values = np.linspace(1, 2, len(STEPS))
    return Series(name, STEPS, values, None if se is None else np.full(len(STEPS), se), "nats", rejected)


def texts(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def svg(fig: Figure) -> str:
    buffer = io.StringIO()
    with plots.style():
        fig.savefig(buffer, format="svg")
    return buffer.getvalue()


@pytest.mark.parametrize("missing", [True, False])
def test_an_overview_on_the_panels_of_another_is_as_drawn_afresh(missing: bool) -> None:
    refused = np.arange(len(STEPS)) % 7 == 3
    values = np.full(len(STEPS), np.nan) if missing else 1e4 * np.sin(STEPS)
    before = [Series("e/f", STEPS, values, units="nats"), series("g/h", rejected=refused)]
    after = [series("a/b", se=None), series("c/d", rejected=refused)]
    marked = [event(series="c/d"), event("turn", series="e/f"), event("plateau", step=90.0, series="a/b")]
    drawn = plots.plot_overview(before, marked, titles={"e/f": "first"})
    svg(drawn[0])
    again = plots.plot_overview(after, marked, titles={"a/b": "second"}, again=drawn)
    times = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
    assert times.sub("", svg(again[0])) == times.sub(
        "", svg(plots.plot_overview(after, marked, titles={"a/b": "second"})[0])
    )


def test_drawing_changes_no_global_setting() -> None:
    before = dict(matplotlib.rcParams)
    plots.plot_series(series(), [event()])
    assert dict(matplotlib.rcParams) == before
    code = "import sys, devmon.analysis.plots; print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["False", "False"]


def test_band_is_1_645_standard_errors_and_step_0_has_its_place() -> None:
    _, ax = plots.plot_series(series(), [event()])
    band = next(c for c in ax.collections if isinstance(c, PolyCollection))
    corners = np.asarray(band.get_paths()[0].vertices)
    at_start = corners[corners[:, 0] == 0][:, 1]
    assert at_start.min() == pytest.approx(1 - 0.1645)
    assert at_start.max() == pytest.approx(1 + 0.1645)
    x = ax.transData.transform([(0, 1), (1, 1), (10, 1), (100, 1), (1000, 1)])[:, 0]
    assert np.isfinite(x).all()
    assert x[0] < x[1]
    assert np.diff(x)[1:] == pytest.approx(np.diff(x)[1], rel=1e-6)  # decades are equally wide
    assert ax.get_xlim()[0] <= 0
    assert ax.get_xlim()[1] >= 2000
    assert ax.get_ylabel() == "nats"


@pytest.mark.parametrize(
    ("steps", "scale"),
    [(range(0, 100, 10), "symlog"), (range(10, 5000, 70), "log"), (range(1000, 4000, 50), "linear")],
)
def test_axis_of_steps_fits_the_steps(steps: range, scale: str) -> None:
    array = np.array(steps)
    _, ax = plots.plot_series(Series("a/b", array, np.ones(len(array))))
    assert ax.get_xscale() == scale


def test_event_is_shaded_over_its_interval_with_a_line_at_its_step() -> None:
    _, ax = plots.plot_series(series(se=None), [event()])
    strip = next(patch for patch in ax.patches)
    assert (strip.get_extents().x0, strip.get_extents().x1) == pytest.approx(
        ax.transData.transform([(620, 0), (670, 0)])[:, 0]
    )
    assert 640.0 in [line.get_xdata()[0] for line in ax.lines]
    assert any("90% interval" in text for text in texts(ax))


def test_rejected_points_are_hollow_off_the_line_and_off_the_scale() -> None:
    derived = llc(induction_run()["llc"])
    bad = derived["verdict"].values != "ok"
    assert 0 < bad.sum() < len(bad)
    _, ax = plots.plot_llc(derived)
    line, marks = ax.lines[0], ax.lines[1]
    assert len(line.get_xdata()) == (~bad).sum()
    assert set(marks.get_xdata()) == set(derived["step"].values[bad])
    assert marks.get_markerfacecolor() == "white"
    low, high = ax.get_ylim()
    assert 0 < low < 24 < 140 < high  # not stretched to the −400 of step 0
    assert np.all((np.asarray(marks.get_ydata()) >= low) & (np.asarray(marks.get_ydata()) <= high))
    label = next(text for text in texts(ax) if "negative" in text)
    assert f"{bad.sum()}" in label
    assert "−39" in label or "−40" in label


def test_all_rejected_is_said_in_the_title() -> None:
    derived = llc(induction_run()["llc"].isel(step=slice(0, 8)))
    _, ax = plots.plot_llc(derived)
    assert "every estimate is rejected" in ax.get_title(loc="left")


def test_heads_have_their_own_rows() -> None:
    values = np.arange(3 * 2 * 4, dtype=float).reshape(3, 2, 4)
    values[1, 1, 2] = np.nan
    data = watch(np.array([0, 1, 10]), {"score": (("step", "layer", "head"), values)}, ["score"], "Heads")
    _, ax = plots.plot_heads(data.transpose("head", "step", "layer"), "score")
    shown = ax.images[0].get_array()
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows == [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
    assert shown is not None
    assert np.asarray(shown[rows.index("L0H3")]).tolist() == values[:, 0, 3].tolist()
    assert bool(np.ma.getmaskarray(shown)[rows.index("L1H2"), 1])


def test_heat_map_is_thinned_to_100_columns_with_both_ends() -> None:
    steps = np.arange(0, 5000, 10)
    data = watch(steps, {"score": (("step", "layer", "head"), np.zeros((500, 1, 2)))}, ["score"], "Heads")
    _, ax = plots.plot_heads(data, "score")
    assert ax.images[0].get_array().shape == (2, 100)  # type: ignore[union-attr]
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert (labels[0], labels[-1]) == ("0", "4.99k")


def test_layers_come_with_control_and_majority() -> None:
    data = induction_run()["probe"]
    _, ax = plots.plot_layers(data, "accuracy")
    solid = [line for line in ax.lines if line.get_linestyle() == "-"]
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert (len(solid), len(dashed)) == (3, 3)
    np.testing.assert_array_equal(solid[2].get_ydata(), data["accuracy"].values[:, 2])
    np.testing.assert_array_equal(dashed[1].get_ydata(), data["control_accuracy"].values[:, 1])
    assert {"layer 0", "layer 2", "control task (dashed)", "majority class"} <= set(texts(ax))
    assert "majority class" not in texts(plots.plot_layers(data, "selectivity")[1])


def test_position_loss_has_first_and_last_checkpoint() -> None:
    data = induction_run()["loss"]
    _, ax = plots.plot_position_loss(data)
    assert len(ax.lines) <= 6
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), data["loss_by_position"].values[0])
    np.testing.assert_array_equal(ax.lines[-1].get_ydata(), data["loss_by_position"].values[-1])
    assert ax.lines[0].get_xdata()[0] == 1


def test_overview_shades_own_events_and_marks_those_of_others() -> None:
    one, other = series("a/b"), series("c/d")
    fig, axes = plots.plot_overview([one, other], [event(series="c/d"), event(series="not/shown", step=50.0)])
    assert len(axes) == 2
    assert [len(ax.patches) for ax in axes] == [0, 1]
    for ax in axes:
        upright = [line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1]
        assert 640.0 in upright
        assert 50.0 not in upright
    assert fig.legends


def test_forest_is_in_order_of_steps_and_hollow_where_not_sure() -> None:
    rows = [event(step=900.0, series="late"), event(step=300.0, series="early", q=0.4)]
    _, ax = plots.plot_events(rows)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["early (rise)", "late (rise)"]
    bars = [line for line in ax.lines if line.get_linewidth() == 3.5]
    assert tuple(bars[0].get_xdata()) == (280.0, 330.0)
    spans = [line for line in ax.lines if line.get_linewidth() == 1]
    assert tuple(spans[1].get_xdata()) == (850.0, 950.0)
    marks = [line for line in ax.lines if len(line.get_xdata()) == 1]
    assert [mark.get_markerfacecolor() == "white" for mark in marks] == [True, False]


def test_what_stands_above_the_forest_does_not_overlap_where_names_are_long() -> None:
    rows = [event(kind, series="a watch with a long name/its value") for kind in ("jump", "turn", "bump", "plateau")]
    fig, ax = plots.plot_events(rows)
    fig.canvas.draw()
    above = [text for text in (ax.title, *(getattr(ax, f"_{side}_title") for side in ("left", "right")), *ax.texts)
             if text.get_text() and not text.get_text().startswith("q = ")]  # fmt: skip
    boxes = [text.get_window_extent() for text in above]
    assert len(boxes) == 2
    assert not boxes[0].overlaps(boxes[1]), boxes


def test_the_order_within_a_transition_goes_by_half_way_on_the_scale_of_its_width() -> None:
    rows = [("late", jump("a/x", 640, span=80)), ("early", jump("b/x", 600, span=20, resolved=False))]
    _, ax = plots.plot_order(rows, (560.0, 720.0))
    marks = [line for line in ax.lines if line.get_marker() == "o"]
    assert [float(mark.get_xdata()[0]) for mark in marks] == [600.0, 640.0]
    assert [mark.get_markerfacecolor() == "white" for mark in marks] == [True, False]
    ends = [float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() == "|"]
    assert ends == [580.0, 620.0, 560.0, 720.0]
    low, high = ax.get_xlim()
    assert 550 < low < 560
    assert 720 < high < 730


def test_stages_are_named_where_there_is_room_and_the_transition_is_shaded() -> None:
    rows = [("loss", series("a/b")), ("other", series("b/c"))]
    parts = [("stage 1", 0, 500, False), ("learns induction", 500, 700, True), ("s" * 90, 700, 2000, False)]
    _, axes = plots.plot_stages(rows, parts, (620.0, (600.0, 640.0)))
    assert [text.get_text() for text in axes[0].texts] == ["stage 1", "learns induction"]
    for ax in axes:
        spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]
        assert (500, 700) in spans
        assert any(np.allclose(span, (600, 640)) for span in spans)
    assert [ax.get_title(loc="left") for ax in axes] == ["loss", "other"]


CASES: list[tuple[Any, tuple[Any, ...]]] = [
    (plots.plot_series, (series(),)),
    (plots.plot_heads, (induction_run()["induction"], "prefix_matching")),
    (plots.plot_layers, (induction_run()["probe"], "accuracy")),
    (plots.plot_position_loss, (induction_run()["loss"],)),
    (plots.plot_events, ([event()],)),
    (plots.plot_order, ([("a", jump("a/x", 640))],)),
    (plots.plot_stages, ([("a", Series("a/x", STEPS, np.log1p(STEPS)))],)),
]


@pytest.mark.parametrize(("draw", "data"), CASES)
def test_axes_that_are_given_are_drawn_on(draw: Any, data: tuple[Any, ...]) -> None:
    fig = Figure()
    ax = fig.subplots()
    several = draw is plots.plot_stages
    assert draw(*data, ax=[ax] if several else ax) == (fig, [ax] if several else ax)
    assert ax.has_data()


def test_names_are_text_and_no_formulas() -> None:
    values = {"$\\frac$": ("step", np.arange(12.0)), "a<b>&$x$": ("step", np.arange(12.0))}
    data = xr.Dataset(values, {"step": np.arange(12)})
    for name in map(str, data.data_vars):
        fig, _ = plots.plot_series(Series(name, data["step"].values, data[name].values))
        text = svg(fig)
        assert "<b>" not in text
        assert "$" in text


@pytest.mark.parametrize("values", [[np.nan] * 10, [3.0] * 10, [np.inf, *[1.0] * 9], [1e300, *[-1e300] * 9]])
def test_any_values_are_drawn(values: list[float]) -> None:
    array = np.array(values)
    fig, ax = plots.plot_series(Series("a/b", np.arange(10), array, rejected=np.isinf(array)))
    assert "svg" in svg(fig)
    assert np.isfinite(ax.get_ylim()).all()
