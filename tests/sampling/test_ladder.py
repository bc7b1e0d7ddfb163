"""Sampling at several nbeta: common noise, step sizes in proportion, and λ̂ of the first as without a ladder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from devmon.analysis import ladder, llc
from devmon.errors import InstrumentError
from devmon.instruments import LLC
from devmon.sampling import BAOAB, Settings, estimate_llc, regression_loss, sample
from devmon.snapshot import Snapshot

RUNGS = (400.0, 200.0, 100.0)


def problem(n: int = 200, d: int = 4, away: float = 0.0) -> tuple[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """A linear regression without label noise, whose features are orthonormal: the Hessian is the identity."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(n, d, generator=generator, dtype=torch.float64))[0] * n**0.5
    model = torch.nn.Linear(d, 1, bias=False).double()
    y = x @ torch.ones(d, 1, dtype=torch.float64)
    model.weight.data = torch.ones(1, d, dtype=torch.float64)
    model.weight.data[0, 0] += away
    return model, (x, y)


@pytest.mark.parametrize("sampler", ["sgld", "baoab"])
def test_without_localisation_every_rung_is_the_same_run_in_its_own_units(sampler: str) -> None:
    """lr ∝ 1 / nbeta and common noise: displacements scale as 1 / √nbeta, so λ̂ agrees draw by draw to rounding."""
    model, data = problem()
    settings = Settings(
        nbeta=RUNGS, lr=1e-3, gamma=1e-9, chains=2, draws=50, burn_in=0, batch_size=200, sampler=sampler, float64=True
    )
    traces = sample(model, regression_loss, data, settings)
    np.testing.assert_allclose(traces["ladder_lr"], [2e-3, 4e-3])
    np.testing.assert_array_equal(traces["rung"], RUNGS[1:])
    first = RUNGS[0] * (traces["loss"] - traces["baseline"])
    for rung in range(2):
        other = RUNGS[rung + 1] * (traces["ladder_loss"] - traces["ladder_baseline"])[rung]
        np.testing.assert_allclose(first, other, rtol=1e-6, atol=1e-12)
    alone = sample(model, regression_loss, data, Settings(**{**vars(settings), "nbeta": RUNGS[0]}))
    xr.testing.assert_identical(alone, traces.drop_dims("rung").drop_vars(["ladder_reach", "ladder_reach_beyond"]))


def test_the_step_size_of_a_lower_rung_stays_below_what_gamma_allows() -> None:
    model, data = problem()
    settings = Settings(nbeta=(400.0, 4.0), lr=1e-3, gamma=50.0, chains=1, draws=2, burn_in=0, batch_size=200)
    assert float(sample(model, regression_loss, data, settings)["ladder_lr"][0]) == pytest.approx(1 / 50)


def test_a_displaced_minimum_is_seen_by_its_offset() -> None:
    model, data = problem(away=0.05)
    settings = Settings(
        nbeta=RUNGS,
        lr=2e-3,
        gamma=0.01,
        chains=8,
        draws=300,
        burn_in=100,
        batch_size=200,
        sampler="baoab",
        float64=True,
    )
    found = ladder(sample(model, regression_loss, data, settings))
    assert found["wbic_slope"].item() == pytest.approx(2.0, abs=3 * found["wbic_slope_se"].item())
    assert found["offset"].item() == pytest.approx(-0.5 * 0.05**2, abs=3 * found["offset_se"].item() + 2e-6)
    assert found["llc"].values[-1] == pytest.approx(2 - 400 * 0.5 * 0.05**2, abs=0.15)


def test_reach_is_the_loss_of_the_localising_gaussian() -> None:
    """½ tr H / gamma for a quadratic, with nothing beyond; for w⁴ all of it is beyond, 3 / gamma²."""

    class Point(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(4000, dtype=torch.float64))

    def quartic(model: Point, batch: torch.Tensor) -> torch.Tensor:
        return (model.w**4).mean().expand(len(batch))

    settings = Settings(nbeta=RUNGS, lr=1e-6, gamma=2.0, chains=1, draws=1, burn_in=0, batch_size=1, float64=True)
    traces = sample(Point(), quartic, torch.zeros(1, 1), settings)
    assert float(traces["ladder_reach"]) == pytest.approx(3 / 4, rel=0.1)
    assert float(traces["ladder_reach_beyond"]) == pytest.approx(float(traces["ladder_reach"]), rel=1e-6)
    model, data = problem()
    traces = sample(model, regression_loss, data, Settings(**{**vars(settings), "batch_size": 200}))
    assert 0.3 < float(traces["ladder_reach"]) < 3
    assert float(traces["ladder_reach_beyond"]) == pytest.approx(0, abs=1e-9)


def test_ranks_share_a_ladder() -> None:
    model, data = problem()
    instrument = LLC(
        data, regression_loss, nbeta=RUNGS, gamma=1.0, lr=1e-3, chains=3, draws=4, burn_in=2, batch_size=20
    )
    snapshot = Snapshot(0, model)
    shares = [instrument.share(rank, 2) for rank in range(2)]
    joined = instrument.join([share(snapshot) for share in shares if share is not None])
    whole = instrument(snapshot)
    assert set(joined) == set(whole)
    for name in whole:
        np.testing.assert_allclose(joined[name].transpose(*whole[name].dims), whole[name], rtol=1e-5)
    alone = LLC(data, regression_loss, nbeta=400.0, gamma=1.0, lr=1e-3, chains=3, draws=4, burn_in=2, batch_size=20)
    at_center = alone.of_gradient(len(data[0]))  # which the rungs share
    assert instrument.cost().backwards == 3 * (alone.cost().backwards - at_center) + at_center


def test_an_estimate_is_that_of_the_first_rung_and_its_result_holds_the_ladder() -> None:
    model, data = problem()
    how = {"gamma": 0.1, "lr": 1e-3, "draws": 60, "batch_size": 200, "sampler": "baoab", "acceptance": True}
    result = estimate_llc(model, regression_loss, data, nbeta=RUNGS, **how)
    alone = estimate_llc(model, regression_loss, data, nbeta=RUNGS[0], **how)
    assert result["llc"].item() == alone["llc"].item()
    assert llc(result)["llc"].item() == alone["llc"].item()
    assert ladder(result)["nbeta"].values.tolist() == sorted(RUNGS)


@pytest.mark.parametrize("rungs", [[100.0], [100.0, 100.0], [100.0, -1.0], [100.0, float("nan")]])
def test_what_is_no_ladder_is_refused(rungs: list[float]) -> None:
    model, data = problem()
    with pytest.raises(InstrumentError, match="at least two different positive"):
        sample(model, regression_loss, data, Settings(nbeta=rungs))


def test_a_kernel_with_its_own_nbeta_has_no_ladder() -> None:
    model, data = problem()
    with pytest.raises(InstrumentError, match="brings its own"):
        sample(model, regression_loss, data, Settings(nbeta=RUNGS, sampler=BAOAB(1e-3, 100.0, 1.0)))
