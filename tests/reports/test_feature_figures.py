"""Figures of features: the drawing of a circuit, and the way of a concept's direction, from what instruments store."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.patches import FancyArrowPatch

from devmon.analysis import plots
from devmon.analysis.reports.drawing import Page
from devmon.analysis.reports.watches import _derived, topic_of
from devmon.errors import DataError
from devmon.instruments import ConceptDirection
from devmon.snapshot import Snapshot
from tests.instruments import test_concept_direction as concept
from tests.instruments import test_feature_circuit as circuit
from tests.instruments import test_steering as steering


def stored(rows: list[xr.Dataset], kind: str) -> xr.Dataset:
    """The rows as a trajectory's watch gives them."""
    steps = [0, 10, 100][: len(rows)]
    whole = xr.concat([row.expand_dims(step=[at]) for at, row in zip(steps, rows, strict=True)], "step")
    about: dict[str, Any] = {"instrument": f"devmon.instruments.{kind}.{kind}"}
    return whole.assign_attrs(rows[0].attrs | about)


def drawn() -> xr.Dataset:
    of = circuit.model(5, 0.15)
    pairs = circuit.telling(of)
    sites = {("attn_out", 0): circuit.dictionary(20), ("resid_post", 1): circuit.dictionary(26)}
    found = circuit.circuit(of, pairs=pairs, dictionaries=sites, top=30)
    return stored([found, found], "FeatureCircuit")


def test_a_circuit_of_thirty_nodes_can_be_read() -> None:
    data = drawn()
    last = data.isel(step=-1)
    fig, ax = plots.plot_feature_circuit(data, names={("attn_out 0", int(last["node_latent"][1])): "commas"})

    # every node has a place of its own, sites one above the other, the answer on top
    dots = np.concatenate([np.asarray(each.get_offsets()) for each in ax.collections])
    assert len(dots) == 31
    apart = np.abs(dots[:, None] - dots[None]) + 9 * np.eye(31)[..., None]
    assert np.hypot(apart[..., 0], apart[..., 1]).min() > 0.3
    site = last["node_site"].values
    assert dots[:30][site == 0, 1].max() < dots[:30][site == 1, 1].min() < dots[30, 1]

    # no two names overlap, and lines are the edges above the threshold
    fig.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    crossing = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert not crossing, f"{len(crossing)} names overlap"
    edges = last["edge"].values
    assert sum(isinstance(patch, FancyArrowPatch) for patch in ax.patches) == int(
        (np.abs(edges) >= 0.03 * np.nanmax(np.abs(edges))).sum()
    )
    names = [text.get_text() for text in ax.texts]
    assert any(name.startswith("error @") for name in names)
    assert {"attn_out 0", "resid_post 1"} <= set(names)


def test_what_is_no_circuit_is_refused() -> None:
    with pytest.raises(DataError, match="step 7 was not measured"):
        plots.plot_feature_circuit(drawn(), 7)
    with pytest.raises(DataError, match="FeatureCircuit stores"):
        plots.plot_feature_circuit(xr.Dataset())
    nothing = drawn()
    nothing["node_site"][:] = -1
    assert len(plots.plot_feature_circuit(nothing)[1].collections) == 1  # the answer alone


def test_a_report_draws_the_circuit_and_the_way_of_a_direction() -> None:
    data = drawn()
    assert topic_of(data) == "features"
    (figure,) = _derived(Page(None), "features", data)
    assert "Faithfulness: 1 nodes" in figure.caption
    assert len(figure.data.rows) == 30

    probe = ConceptDirection(concept.POSITIVE, concept.NEGATIVE, shuffles=2)
    rows = [probe(Snapshot(0, concept.model(size, seed=2))) for size in (0.0, 0.5, 4.0)]
    (figure,) = _derived(Page(None), "concept", stored(rows, "ConceptDirection"))
    assert "cosine of the direction of each step to that of the last" in figure.caption
    assert [row.cells[0] for row in figure.data.rows] == ["0", "10", "100"]
    assert figure.data.rows[-1].cells[1] == "1"


def test_steering_over_steps_stands_out_of_random_directions() -> None:
    rows = [steering.steer(steering.linear(seed), random=4, strengths=(1.0,)) for seed in (0, 1, 2)]
    data = stored(rows, "Steering")
    _, (left, right) = plots.plot_steering(data, direction=1)
    np.testing.assert_allclose(left.lines[0].get_ydata(), data["slope"][:, 1, 0])
    np.testing.assert_allclose(right.lines[-1].get_ydata(), data["kl_random"][:, -1])
    band = left.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(1.645 * float(data["slope_random_sd"].max()))
    (figure,) = _derived(Page(None), "steering", data)
    assert [row.cells[0] for row in figure.data.rows] == ["0", "1"]
    with pytest.raises(DataError, match="direction 5 was not measured"):
        plots.plot_steering(data, direction=5)
    with pytest.raises(DataError, match="as a Steering stores"):
        plots.plot_steering(rows[0])
