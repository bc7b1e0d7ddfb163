"""Figures of one watch: pairs of steps, the path of outputs, pairs of heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from devmon.analysis import circuit_overlap, essential_dynamics, plots, susceptibility_components
from devmon.analysis import report as write_report
from devmon.analysis.derive.representation import similarity
from devmon.analysis.reports.drawing import Page
from devmon.analysis.reports.watch_figures import layers_figure
from devmon.analysis.reports.watches import _susceptibilities
from tests.support.reports import LONG, circuits, sketches
from tests.support.synthetic import induction_run, susceptibilities, watch


def test_similarity_has_blocks_and_its_last_row_on_top() -> None:
    found = similarity(sketches())
    _, ax = plots.plot_similarity(found.isel(layer=0))
    shown = np.asarray(ax.images[0].get_array())
    early, late = LONG < 100, LONG >= 100
    assert shown[np.ix_(early, early)].min() > 0.9
    assert shown[np.ix_(early, late)].max() < 0.5
    assert ax.images[0].origin == "lower"
    assert ax.images[0].get_clim() == (0, 1)
    assert np.asarray(plots.plot_similarity(found.isel(layer=1))[1].images[0].get_array()).min() > 0.9
    _, ax = plots.plot_similarity(circuit_overlap(circuits()), "jaccard")
    assert ax.get_title(loc="right").startswith("by chance: 0.023")


def test_layers_say_where_their_score_lies() -> None:
    score = np.array([[0.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 3]])
    data = xr.Dataset({"score": (("step", "layer"), score, {"units": "share"})}, attrs={"headline": ["score"]})
    figure = layers_figure(Page(None), "probe", data.assign_coords(step=[0, 10, 200], layer=range(4)), "score", [])
    assert "Centre of gravity: layer 1.5 at step 10, 2.8 at step 200; 1.5 if even." in figure.caption


def test_path_goes_from_ring_to_square_and_marks_cusps() -> None:
    found = essential_dynamics(sketches()["outputs"], walks=50)
    found["cusp"][:] = found["step"].values == found["step"].values[12]
    _, ax = plots.plot_essential(found)
    marks = {line.get_marker(): line for line in ax.lines if line.get_marker() in "os*"}
    path = found["pc"].values
    for marker, at in (("o", 0), ("s", -1), ("*", 12)):
        np.testing.assert_allclose(np.column_stack(marks[marker].get_data())[0], path[at, :2])
    assert f"({float(found['explained'][0]):.0%} of the variance)" in ax.get_xlabel()
    found["cusp"][:] = False
    assert "no turn sharper" in plots.plot_essential(found)[1].get_title(loc="right")


def test_pairs_that_rise_highest_come_first_above_their_null() -> None:
    values = np.full((4, 3, 2, 2, 2, 2), np.nan)
    values[:, :, 1, :, 0, :] = 0.1
    values[:, 1, 1, 0, 0, 1] = [0.1, 0.2, 0.9, 0.5]
    values[:, 2, 1, 1, 0, 0] = 0.8
    dims = ("step", "kind", "layer", "head", "layer_from", "head_from")
    null = np.tile([0.1, 0.1, 0.75], (4, 1))
    data = watch(
        np.array([0, 1, 10, 100]), {"composition": (dims, values), "null": (("step", "kind"), null)}, [], "Composition"
    )
    data = data.assign_coords(kind=np.array(["Q", "K", "V"], dtype=object))
    _, ax = plots.plot_pairs(data, most=3)
    assert [label.get_text() for label in ax.get_yticklabels()][:2] == ["K L1H0 from L0H1", "V L1H1 from L0H0"]
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array())[0], [0.0, 0.1, 0.8, 0.4], atol=1e-12)


def test_a_ladder_of_nbeta_is_drawn_with_its_word(tmp_path: Path) -> None:
    """Each further rung has the loss of the first, at half its nbeta: λ̂ is proportional to nbeta, so it rises."""
    run = induction_run()
    traces = run.data["llc"].isel(step=slice(-8, None))
    run.data.clear()
    half = float(traces.attrs["nbeta"]) / 2
    rungs = {f"ladder_{name}": traces[name].expand_dims(rung=[half]) for name in ("loss", "baseline")}
    reach = {"ladder_reach": ("step", np.ones(len(traces["step"]))), "ladder_reach_beyond": traces["step"] * 0.0}
    run.data["llc"] = traces.assign(rungs | reach)
    page = write_report(run, tmp_path / "report.html").read_text()
    assert "λ̂ by nbeta at step" in page
    assert "rising" in page
    assert "multiplicity" in page


def test_tokens_lie_in_their_common_components() -> None:
    found = susceptibility_components(susceptibilities())
    _, (left, right) = plots.plot_susceptibilities(found)
    dots = [line for line in left.lines if line.get_marker() == "."]
    assert [line.get_label() for line in dots] == ["code", "prose"]
    last = found["score"].isel(step=-1).values[:, :2]
    np.testing.assert_allclose(np.column_stack(dots[0].get_data()), last[::2])
    named = [text.get_text() for text in left.texts]
    furthest = int(np.linalg.norm(last, axis=1).argmax())
    assert named[0] == f"the cat ▸ sat{furthest}"
    np.testing.assert_allclose(right.lines[0].get_ydata(), found["spread"].values[:, 0])
    found["noise"][:3] = 0.9
    assert "3 of 6 steps are mostly noise" in plots.plot_susceptibilities(found)[1][1].get_title(loc="right")


def test_a_report_tells_signs_and_top_tokens() -> None:
    blocks = _susceptibilities(Page(None), "s", susceptibilities(steps=9))
    assert "layer 0 head 0 to code turns positive between steps" in blocks[0].text
    table = blocks[1].data
    assert [row.cells[0] for row in table.rows[:5]] == ["layer 0 head 0"] * 4 + ["layer 0 head 1"]
    assert "noise makes" in blocks[1].caption
    quiet = susceptibilities()
    quiet["mean"] = quiet["mean"] * 0 + 1
    assert "No susceptibility" in _susceptibilities(Page(None), "s", quiet)[0].text
