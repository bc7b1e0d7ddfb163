"""The series of a run: names, maxima with their errors, what is rejected, what is followed."""

from __future__ import annotations

import numpy as np
import xarray as xr

from devmon.analysis.derive.llc import llc
from devmon.analysis.derive.verdicts import accepted
from devmon.analysis.derive.watch_series import series_of, series_of_watch
from tests.support.reports import TEN
from tests.support.synthetic import Run, induction_run, watch


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
    np.testing.assert_array_equal(one.rejected, ~accepted(derived["verdict"].values))
    np.testing.assert_array_equal(one.se, derived["se"].values)
    assert one.units == ""  # "1" is not a unit to print


def test_infinite_values_are_rejected_and_not_an_error() -> None:
    values = np.where(TEN == 30, np.inf, 1.0)
    (one,) = series_of(Run({"w": watch(TEN, {"x": values}, None, "Mine")}))
    assert one.rejected is not None
    assert np.flatnonzero(one.rejected).tolist() == [3]


def test_a_scalar_has_its_errors_groups_and_refusals_as_an_array_of_one_has() -> None:
    rng = np.random.default_rng(0)
    parts = {"v": rng.standard_normal(9), "v_se": rng.random(9), "accepted": (np.arange(9) % 3 > 0).astype(float)}
    groups = rng.standard_normal((9, 4))
    scalar = xr.Dataset({name: ("step", values) for name, values in parts.items()}, {"step": np.arange(9)})
    scalar["v_replicates"] = ("step", "replicate"), groups
    scalar.attrs["headline"] = ["v", "absent"]
    array = scalar.copy()
    for name in ("v", "v_se", "v_replicates"):
        array[name] = scalar[name].expand_dims(head=1, axis=1)
    (one,), (_, other) = series_of_watch("w", scalar), series_of_watch("w", array)
    for name in ("steps", "values", "se", "rejected", "replicates"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.rejected is not None
    assert one.rejected.sum() == 3
    # what has other dimensions stands beside nothing; one flag is that of all steps
    scalar["v_se"] = "other", np.ones(3)
    scalar["accepted"] = (), 0.0
    (bare,) = series_of_watch("w", scalar)
    assert bare.se is None
    assert bare.rejected is not None
    assert bare.rejected.all()
