"""A ladder of nbeta against exact draws of laws whose λ, offset and multiplicity are known."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from devmon.analysis import ladder, plots
from devmon.errors import DataError
from devmon.testing import exact

CHAINS, DRAWS = 8, 400
RUNGS = [1000.0, 500.0, 250.0, 125.0, 62.5]


def traces(
    rungs: list[float], gamma: float, draws: list[tuple[np.ndarray, ...]], reach: tuple[float, float]
) -> xr.Dataset:
    """Stored traces, burn-in excluded, from (loss − L(w*), ∇L·δ, ‖δ‖², parameters) of each rung."""

    def variables(prefix: str, dims: tuple[str, ...], take: object) -> dict[str, object]:
        loss, slope, square, _ = (np.array(column) for column in zip(*draws, strict=True))
        named = {"loss": 3 + loss, "baseline": 3 + 0 * loss, "slope": slope, "distance": np.sqrt(square)}
        return {prefix + name: (dims, values[take]) for name, values in named.items()}  # type: ignore[index]

    data = variables("", ("chain", "draw"), 0) | variables("ladder_", ("rung", "chain", "draw"), slice(1, None))
    data |= {"ladder_reach": ((), reach[0]), "ladder_reach_beyond": ((), reach[1])}
    attrs = {"nbeta": rungs[0], "gamma": gamma, "burn_in": 0, "parameters": int(draws[0][3]), "n": 1000, "kind": "llc"}
    return xr.Dataset(data, {"rung": rungs[1:]}, attrs)  # type: ignore[arg-type]


def quadratic(h: np.ndarray, gamma: float, rungs: list[float], away: float = 0.0, paired: bool = True) -> xr.Dataset:
    """L = ½ Σ hᵢ (wᵢ − awayᵢ)² around w* = 0, where the first coordinate of the minimum lies `away`; exact draws."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((CHAINS, DRAWS, len(h)))
    bottom = np.zeros(len(h))
    bottom[0] = away
    draws = []
    for nbeta in rungs:
        noise = noise if paired else rng.standard_normal(noise.shape)
        precision = nbeta * h + gamma
        w = nbeta * h * bottom / precision + noise / np.sqrt(precision)
        loss = 0.5 * (h * ((w - bottom) ** 2 - bottom**2)).sum(-1)
        draws.append((loss, (h * (w - bottom) * w).sum(-1), (w**2).sum(-1), len(h)))
    return traces(rungs, gamma, draws, (0.5 * h.sum() / gamma, 0.0))


def crossing(gamma: float, rungs: list[float], chains: int, sweeps: int = 100, keep: int = 500) -> xr.Dataset:
    """K = (w1 w2)²: each weight is Gaussian given the other, so that Gibbs sweeps draw the law itself."""
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((2, sweeps + keep, chains))
    draws = []
    for nbeta in rungs:
        a, b, rows = np.zeros(chains), np.zeros(chains), []
        for step in range(sweeps + keep):
            a = noise[0, step] / np.sqrt(gamma + 2 * nbeta * b**2)
            b = noise[1, step] / np.sqrt(gamma + 2 * nbeta * a**2)
            rows.append((a, b))
        a, b = np.array(rows[sweeps:]).transpose(1, 2, 0)
        draws.append(((a * b) ** 2, 4 * (a * b) ** 2, a**2 + b**2, 2))
    return traces(rungs, gamma, draws, (1 / gamma**2, 1 / gamma**2))


def test_a_regular_minimum_is_at_its_limit() -> None:
    found = ladder(quadratic(np.array([1.0, 2.0, 4.0]), 1e-4, RUNGS))
    assert found["limit"].item() == "at its limit"
    assert found["wbic_slope"].item() == pytest.approx(1.5, abs=3 * found["wbic_slope_se"].item())
    assert found["wbic_slope_se"].item() < 0.05
    assert found["multiplicity"].item() == 1
    np.testing.assert_array_equal(found["nbeta"], RUNGS[::-1])
    # common noise: λ̂ is known to ±.03, its change over a sixteenfold nbeta to a thousandth of that
    assert found["trend_se"].item() < 1e-4 < found["se"].values.min() / 100


@pytest.mark.parametrize("away", [0.03, -0.1])
def test_the_slope_needs_no_loss_at_the_minimum(away: float) -> None:
    """λ̂ = λ − ½ nbeta h away² at each nbeta; the slope has neither w* nor its loss in it."""
    h = np.array([2.0, 1.0, 1.0])
    found = ladder(quadratic(h, 1e-4, RUNGS[1:], away))
    expected = 1.5 - 0.5 * np.array(RUNGS[:0:-1]) * h[0] * away**2
    np.testing.assert_allclose(found["llc"], expected, atol=0.1)
    used = found["verdict"].values != "negative"
    assert used.sum() >= 2
    assert found["wbic_slope"].item() == pytest.approx(1.5, abs=3 * found["wbic_slope_se"].item())
    assert found["offset"].item() == pytest.approx(-0.5 * h[0] * away**2, abs=3 * found["offset_se"].item() + 1e-7)
    assert found["limit"].item() == "falling"
    assert np.isnan(found["multiplicity"].item())


def test_directions_that_gamma_holds_back_make_it_rise_without_a_multiplicity() -> None:
    h = np.array([1.0, 0.01, 0.01, 0.003])
    found = ladder(quadratic(h, 1.0, RUNGS))
    expected = [exact.gibbs_quadratic(h, nbeta, 1.0) for nbeta in found["nbeta"].values]
    assert np.all(np.abs(found["llc"].values - expected) < 3 * found["se"].values)
    assert found["limit"].item() == "rising"
    assert np.isnan(found["multiplicity"].item())


def test_a_rise_of_the_right_size_in_a_quadratic_loss_is_no_multiplicity() -> None:
    """The reach is chosen so that what gamma holds back rises just as θ = 2 would: the growth of the loss says no."""
    h, ratio = np.array([1.0, 1.8e-4]), np.log(16)
    rise = exact.gibbs_quadratic(h, RUNGS[0], 1.0) - exact.gibbs_quadratic(h, RUNGS[-1], 1.0)
    log = (np.sqrt(ratio**2 + 4 * ratio / rise) - ratio) / 2
    assert log > 4
    data = quadratic(h, 1.0, RUNGS)
    for name in ("ladder_reach", "ladder_reach_beyond"):
        data[name] = np.exp(log - 2.195) / RUNGS[-1]
    assert np.isnan(ladder(data)["multiplicity"].item())


@pytest.mark.parametrize("paired", [True, False])
def test_errors_of_the_slope_hold_without_common_noise_too(paired: bool) -> None:
    found = ladder(quadratic(np.ones(6), 1e-4, RUNGS, paired=paired))
    assert found["wbic_slope"].item() == pytest.approx(3, abs=3 * found["wbic_slope_se"].item())
    assert abs(found["trend"].item()) < 3 * found["trend_se"].item() + 1e-4


@pytest.mark.parametrize("gamma, top", [(1.0, 1e5), (0.1, 1e4)])
def test_a_crossing_has_multiplicity_two_where_enough_is_known(gamma: float, top: float) -> None:
    rungs = [top / 2**k for k in range(5)]
    found = ladder(crossing(gamma, rungs, 400))
    expected = [exact.gibbs_two(lambda a, b: (a * b) ** 2, nbeta, gamma, 1001) for nbeta in found["nbeta"].values]
    assert np.all(np.abs(found["llc"].values - expected) < 3 * found["se"].values + 0.002)
    assert found["multiplicity"].item() == 2
    few = ladder(crossing(gamma, rungs, 400).isel(chain=slice(4), draw=slice(200)))  # the same rise behind its error
    assert np.isnan(few["multiplicity"].item())


def test_a_quartic_valley_has_no_multiplicity() -> None:
    """One weight in a quartic valley: λ = ¼ is approached by a power of nbeta, which must not read as a logarithm."""
    rng, draws, rungs = np.random.default_rng(2), [], [1e5, 1e4, 1e3]
    uniform = rng.random((CHAINS, DRAWS * 5))
    for nbeta in rungs:
        grid = np.linspace(-1, 1, 20001) * 8 / np.sqrt(1 + nbeta**0.5)
        density = np.exp(-nbeta * grid**4 - 0.5 * grid**2)
        w = np.interp(uniform, np.cumsum(density) / density.sum(), grid)
        draws.append((w**4, 4 * w**4, w**2, 1))
    found = ladder(traces(rungs, 1.0, draws, (3.0, 3.0)))
    assert found["wbic_slope"].item() == pytest.approx(0.25, abs=0.01)
    assert found["multiplicity"].item() != 2


def test_rejected_rungs_are_left_out_of_the_fits() -> None:
    data = quadratic(np.ones(4), 1e-4, RUNGS)
    data["ladder_loss"][-1] = np.nan
    found = ladder(data)
    assert found["verdict"].values.tolist() == ["non-finite", "ok", "ok", "ok", "ok"]
    assert found["wbic_slope"].item() == pytest.approx(2, abs=3 * found["wbic_slope_se"].item())
    data["ladder_loss"][:] = np.nan
    alone = ladder(data)
    assert np.isnan(alone["wbic_slope"].item())
    assert alone["limit"].item() == "not told"


def test_every_step_has_its_ladder() -> None:
    steps = [quadratic(np.ones(k), 1e-4, RUNGS) for k in (2, 4)]
    run = xr.concat(steps, "step", coords="minimal", compat="override", combine_attrs="override")
    found = ladder(run.assign_coords(step=[10, 20]))
    assert found["llc"].dims == ("step", "nbeta")
    np.testing.assert_allclose(found["wbic_slope"], [1, 2], atol=0.1)
    assert found["limit"].values.tolist() == ["at its limit"] * 2


def test_traces_of_one_nbeta_are_refused() -> None:
    with pytest.raises(DataError, match="nbeta="):
        ladder(quadratic(np.ones(2), 1.0, RUNGS).drop_dims("rung"))


def test_the_figure_shows_rungs_slope_and_what_was_rejected() -> None:
    data = quadratic(np.ones(4), 1e-4, RUNGS)
    data["ladder_loss"][-1] -= 1.0
    _, ax = plots.plot_ladder(ladder(data))
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert any("slope in 1 / nbeta: 1.98 ± 0.0" in label for label in labels), labels
    assert any("negative" in label for label in labels)
    assert ax.get_xscale() == "log"
