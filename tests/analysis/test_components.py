"""λ̂ by component from traces whose law is known: values, paired differences, and groups that were planted."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from devmon.analysis import component_llc, llc
from devmon.analysis.derive.components import groups_of
from devmon.errors import DataError

STEPS, CHAINS, DRAWS, NBETA = 12, 4, 100, 50.0
TIME = np.linspace(0, 1, STEPS)
# λ by component and step: two that rise early, two that fall, one that stays, and a random mask
TRUE = np.array([5 + 4 * (TIME > 0.3), 9 + 2 * (TIME > 0.3), 8 - 3 * TIME, 20 - 9 * TIME, 6 + 0 * TIME, 4 + 0 * TIME])
NAMES = ["early", "early too", "falls", "falls too", "stays", "random"]


def traces(common: float = 0.0, seed: int = 0) -> xr.Dataset:
    """Draws of a law with λ `TRUE`, of which the noise `common` to all components is that share."""
    generator = np.random.default_rng(seed)
    dims = ("step", "component", "chain", "draw")
    shape = (STEPS, len(TRUE), CHAINS, DRAWS)
    own, shared = generator.standard_normal(shape), generator.standard_normal((STEPS, 1, CHAINS, DRAWS))
    excess = (TRUE.T[:, :, None, None] + np.sqrt(1 - common) * own + np.sqrt(common) * shared) / NBETA
    parameters = np.full(len(TRUE), 100)
    spread = np.full(shape, 0.1)
    slope = (parameters[:, None, None] - 10 * spread**2) / NBETA
    null = np.array([5] * 5 + [-1])
    return xr.Dataset(
        {
            "excess": (dims, excess.astype(np.float32)),
            "baseline": (("step", "chain", "draw"), np.full((STEPS, CHAINS, DRAWS), 3.0, np.float32)),
            "distance": (dims, spread),
            "slope": (dims, slope),
            "parameters": (("step", "component"), np.tile(parameters, (STEPS, 1))),
            "layer": (("step", "component"), np.zeros((STEPS, len(TRUE)), int)),
            "null": (("step", "component"), np.tile(null, (STEPS, 1))),
        },
        {"step": np.arange(STEPS), "component": np.array(NAMES, dtype=object)},
        {"nbeta": NBETA, "gamma": 10.0, "n": 1000, "burn_in": 10, "kind": "llc by component"},
    )


def test_each_component_is_an_llc_of_its_own_traces() -> None:
    derived = component_llc(traces())
    assert set(derived["verdict"].values.flat) == {"ok"}
    away = (derived["llc"].transpose("component", "step") - TRUE) / derived["se"].transpose("component", "step")
    assert np.abs(away).max() < 4
    one = traces().isel(component=2)
    at_center = one["baseline"].astype(float)
    alone = llc(xr.Dataset({"loss": at_center + one["excess"], "baseline": at_center}, attrs=one.attrs))
    np.testing.assert_allclose(derived["llc"].isel(component=2), alone["llc"], rtol=1e-6)
    np.testing.assert_allclose(derived["se"].isel(component=2), alone["se"], rtol=1e-6)


def test_the_difference_from_a_random_mask_has_the_error_of_a_difference() -> None:
    """Noise that both share cancels: at 90% in common the error is a third of that of two independent estimates."""
    derived = component_llc(traces(common=0.9))
    expected = TRUE[:5] - TRUE[5]
    got, se = (derived[n].transpose("component", "step").values for n in ("above_null", "above_null_se"))
    assert np.isnan(got[5]).all()
    away = (got[:5] - expected) / se[:5]
    assert np.abs(away).max() < 4
    assert 0.7 < away.std() < 1.3
    independent = np.hypot(*(derived["se"].isel(component=i).values for i in (0, 5)))
    np.testing.assert_allclose(se[0] / independent, np.sqrt(0.1), rtol=0.25)


def test_planted_groups_are_found_and_what_stays_is_in_none() -> None:
    assert groups_of(component_llc(traces())) == {-1: ["stays"], 0: ["early", "early too"], 1: ["falls", "falls too"]}


def test_what_stays_is_seldom_said_to_vary() -> None:
    p = np.array([float(component_llc(traces(seed=s))["varies_p"].sel(component="stays")) for s in range(1, 13)])
    assert (p < 0.01).sum() <= 1
    assert p.max() > 0.3


def test_a_rejected_step_says_nothing_of_a_group() -> None:
    data = traces()
    data["excess"][6, 0] = np.nan
    derived = component_llc(data)
    assert derived["verdict"].values[6, 0] == "non-finite"
    assert groups_of(derived)[0] == ["early", "early too"]


def test_one_row_and_other_data() -> None:
    one = component_llc(traces().isel(step=3))
    assert one["llc"].dims == ("component",)
    assert "group" not in one
    assert float(one["above_null_se"][0]) > 0
    with pytest.raises(DataError, match="RestrictedLLC"):
        component_llc(traces().drop_vars("excess"))
