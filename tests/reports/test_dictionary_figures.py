"""Figures of dictionaries: densities, births and lengths show what is in the data, and a report holds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from devmon.analysis import feature_births, plots
from devmon.analysis import report as write_report
from devmon.analysis.reports.content import Figure, Paragraph
from devmon.analysis.reports.drawing import Page
from devmon.analysis.reports.feature_figures import births_blocks, densities_figure
from tests.features.test_over_time import STEPS, rising, watch
from tests.support.synthetic import induction_run
from tests.support.synthetic import watch as stored


def densities() -> xr.Dataset:
    columns = [rising(at) for at in (50, 200, 900)] + [np.full(len(STEPS), 0.03)] * 3 + [np.zeros(len(STEPS))]
    return watch(np.array(columns).T)


def test_a_histogram_counts_latents_that_never_fire_apart() -> None:
    _, ax = plots.plot_densities(densities())
    counts = np.ma.filled(np.ma.asarray(ax.collections[0].get_array()), 0).reshape(-1, len(STEPS))
    np.testing.assert_allclose(counts.sum(0), 1)
    assert counts[0, -1] == 1 / 7
    assert counts[0, 0] == 4 / 7  # three are not born yet
    assert ax.get_yticklabels()[0].get_text() == "never"


def test_a_raster_has_a_row_a_latent_by_its_birth() -> None:
    births = feature_births(densities())
    _, ax = plots.plot_births(births)
    shown = np.asarray(ax.images[0].get_array())
    assert shown.shape == (6, len(STEPS))
    assert (shown[:3] > 0.8).all()  # there all along, above
    first = (shown[3:] > 0.5).argmax(1)
    assert (np.diff(first) > 0).all()
    assert len(ax.lines) == 3
    assert ax.get_title(loc="left") == "Features: 3 there, 3 born, 1 silent"


def test_lengths_of_a_crosscoder_are_rows_by_their_first_snapshot() -> None:
    relative = np.array([[1, 0.02, 1, np.nan], [1, 1, 0.03, np.nan]])
    table = xr.Dataset(
        {
            "relative": (("step", "latent"), relative),
            "born": ("latent", [0.0, 100, 0, np.nan]),
            "died": ("latent", [100.0, 100, 0, np.nan]),
        },
        coords={"step": [0, 100], "latent": np.arange(4)},
    )
    _, ax = plots.plot_crosscoder(table)
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array()), [[1, 1], [1, 0.03], [0.02, 1]])


def test_the_table_of_births_is_in_their_order() -> None:
    words, figure = births_blocks(Page(None), "f", densities())
    assert words.text.startswith("Of 7 latents 3 are there at all steps, 3 are born and 0 die; 0 come or go")
    assert isinstance(words, Paragraph)
    assert isinstance(figure, Figure)
    assert figure.data is not None
    assert [row.cells[0] for row in figure.data.rows] == ["0", "1", "2"]
    table = densities_figure(Page(None), "f", densities()).data
    assert table is not None
    assert table.rows[-1].cells[1] == "0.14"


def test_a_report_has_a_section_of_features(tmp_path: Path) -> None:
    run = induction_run()
    found = densities()
    variables = {name: (found[name].dims, found[name].values) for name in ("density", "density_se")}
    run.data["features"] = stored(STEPS, variables, [], "DictionaryQuality").assign_coords(latent=np.arange(7))
    page = write_report(run, tmp_path / "report.html").read_text()
    assert "3 are born and 0 die" in page
    assert "one row a latent by its birth" in page
    anew = {"moved": (("step", "latent"), np.full((len(STEPS), 7), np.nan))}
    run.data["features"] = run.data["features"].assign(anew)
    assert "one row a latent by its birth" not in write_report(run, tmp_path / "again.html").read_text()
