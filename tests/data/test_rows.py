"""The builder of datasets: what stands where, and what is left out."""

from __future__ import annotations

import numpy as np
import xarray as xr

from devmon.data.rows import Rows


def test_a_variable_is_followed_by_its_error_under_the_same_units() -> None:
    result = Rows(headline=["a"], error="standard error over prompts", kind="test")
    result.put(
        "a", ("layer",), np.array([1.0, 2.0]), np.array([0.1, 0.2]), "a thing", units="nats", smallest_change=0.0
    )
    result.put("b", (), 3, None, "another", units="1", nan="there is none")
    result.put("c", (), 4.0, 0.5, "a third", units="share", error="jackknife")
    result.attrs["below_floor"] = "no signal"
    expected = xr.Dataset(
        {
            "a": ("layer", [1.0, 2.0], {"long_name": "a thing", "units": "nats", "smallest_change": 0.0}),
            "a_se": ("layer", [0.1, 0.2], {"long_name": "standard error over prompts", "units": "nats"}),
            "b": ((), 3, {"long_name": "another", "units": "1", "nan": "there is none"}),
            "c": ((), 4.0, {"long_name": "a third", "units": "share"}),
            "c_se": ((), 0.5, {"long_name": "jackknife", "units": "share"}),
        },
        coords={"layer": [0, 1]},
        attrs={"headline": ["a"], "kind": "test", "below_floor": "no signal"},
    )
    made = result.dataset(layer=[0, 1])
    xr.testing.assert_identical(made, expected)
    assert list(made.data_vars) == list(expected.data_vars)
    assert made["b"].dtype == np.int64  # a whole number stays one


def test_one_result_shares_nothing_with_the_next() -> None:
    first, second = Rows(headline=["a"]), Rows(headline=["a"])
    first.put("a", (), 1.0, None, "a", units="1")
    first.attrs["headline"].append("b")  # type: ignore[attr-defined]
    assert not second.dataset().data_vars
    assert second.dataset().attrs == {"headline": ["a"]}
