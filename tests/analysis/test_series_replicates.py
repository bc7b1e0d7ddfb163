"""The values by group of items, on their way from a run's rows to the series that are searched."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from devmon.analysis.derive.llc import llc
from devmon.analysis.derive.watch_series import series_of
from devmon.analysis.series import Series, checked_replicates

STEPS = np.arange(5)
DRAWN = np.random.default_rng(0)


class Run:
    """A run of one watch."""

    def __init__(self, dataset: xr.Dataset) -> None:
        self.dataset, self.attrs = dataset.assign_coords(step=STEPS), dict[str, Any]()

    def names(self) -> list[str]:
        return ["w"]

    def __getitem__(self, name: str) -> xr.Dataset:
        return self.dataset


def series(dataset: xr.Dataset) -> dict[str, Series]:
    return {each.name: each for each in series_of(Run(dataset))}  # type: ignore[arg-type]


def rows(order: tuple[str, ...]) -> tuple[xr.Dataset, np.ndarray]:
    """Rows of a headline over (layer, head), with replicates stored in this order, and these (R, n, layer, head)."""
    groups = DRAWN.normal(size=(8, 5, 2, 3)).astype(np.float32)
    by_group = xr.DataArray(groups, dims=("replicate", "step", "layer", "head"))
    dataset = xr.Dataset({"a": by_group.mean("replicate"), "a_replicates": by_group.transpose(*order)})
    dataset["a_se"] = by_group.std("replicate")
    return dataset.assign_attrs(headline=["a"]), groups


def test_a_scalar_hands_its_groups_on() -> None:
    groups = DRAWN.normal(size=(5, 8)).astype(np.float32)
    groups[2] = np.nan  # no number at that step, by any group
    dataset = xr.Dataset({"a": ("step", groups.mean(1)), "a_replicates": (("step", "replicate"), groups)})
    of = series(dataset.assign_attrs(headline=["a"]))
    assert list(of) == ["w/a"]  # replicates are no series of their own
    np.testing.assert_array_equal(of["w/a"].replicates, groups.T)
    assert checked_replicates(of["w/a"], STEPS[[0, 1, 3, 4]], []) is not None


def test_groups_that_tell_no_error_are_left_out() -> None:
    """The search refuses replicates that are not finite where the value is, and single ones."""
    groups = np.ones((5, 8))
    groups[2, 3] = np.inf
    for bad in (groups, np.ones((5, 1))):
        dataset = xr.Dataset({"a": ("step", np.ones(5)), "a_replicates": (("step", "replicate"), bad)})
        assert series(dataset.assign_attrs(headline=["a"]))["w/a"].replicates is None


def test_a_scalar_is_followed_where_no_headline_is_named() -> None:
    dataset = xr.Dataset({"a": ("step", np.zeros(5)), "a_replicates": (("step", "replicate"), np.zeros((5, 8)))})
    assert list(series(dataset)) == ["w/a"]


def test_elements_have_their_own_and_the_maximum_those_of_the_largest() -> None:
    for order in (("step", "replicate", "layer", "head"), ("replicate", "head", "step", "layer")):
        dataset, groups = rows(order)
        of = series(dataset)
        for layer, head in np.ndindex(2, 3):
            element = of[f"w/a[layer={layer}, head={head}]"]
            np.testing.assert_array_equal(element.replicates, groups[:, :, layer, head])
        best = groups.mean(0).reshape(5, 6).argmax(1)
        assert len(set(best.tolist())) > 1  # another head leads at another step
        expected = groups.reshape(8, 5, 6)[:, STEPS, best]
        np.testing.assert_array_equal(of["w/a max"].replicates, expected)
        np.testing.assert_allclose(of["w/a max"].replicates.mean(0), of["w/a max"].values, rtol=1e-5)  # type: ignore[union-attr]


def test_rows_without_groups_or_with_others_have_none() -> None:
    dataset, _ = rows(("step", "replicate", "layer", "head"))
    for bare in (dataset.drop_vars("a_replicates"), dataset.assign(a_replicates=dataset["a_replicates"].isel(head=0))):
        assert all(each.replicates is None for each in series(bare).values())


def test_some_points_of_a_series_keep_their_groups() -> None:
    dataset, groups = rows(("step", "replicate", "layer", "head"))
    some = series(dataset)["w/a[layer=1, head=2]"].where(STEPS % 2 == 0)
    np.testing.assert_array_equal(some.replicates, groups[:, ::2, 1, 2])


def test_those_of_an_llc_are_its_batches_of_draws() -> None:
    losses = 2 + DRAWN.normal(size=(5, 3, 40))
    traces = xr.Dataset(
        {"loss": (("step", "chain", "draw"), losses), "baseline": ("step", np.ones(5))},
        attrs={"kind": "llc", "nbeta": 10.0},
    )
    of = series(traces)["w/llc"]
    np.testing.assert_array_equal(of.replicates, llc(traces.assign_coords(step=STEPS))["llc_replicates"])
    np.testing.assert_allclose(of.replicates.mean(0), of.values)  # type: ignore[union-attr]
