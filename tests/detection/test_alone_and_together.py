"""Series that are searched together have the fits, to the last bit, that each has alone."""

from __future__ import annotations

import numpy as np
import pytest

from devmon.analysis.detection import constants, spline
from devmon.analysis.detection.abrupt import surprise
from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.noise import NoiseModel, without_rises
from devmon.analysis.detection.windows import windows_of
from devmon.analysis.series import Series
from devmon.analysis.transitions.order import lead_lag

STEPS = np.unique(np.geomspace(1, 20_000, 60).astype(int)).astype(float)
OTHERS = np.arange(0.0, 4500, 100)


def many() -> list[Series]:
    """Walks, stairs, curves with errors and with replicates, on two sets of steps."""
    rng, made = np.random.default_rng(0), []
    for steps in (STEPS, OTHERS):
        n = len(steps)
        for k in range(3):
            walk = rng.standard_normal(n).cumsum()
            # rests, with one sharp rise
            stairs = np.where(np.arange(n) < n // 2, 0.0, 30.0) + 0.1 * rng.standard_normal(n)
            replicates = np.tanh((np.arange(n) - 20) / 4) + 0.1 * rng.standard_normal((6, n))
            made += [
                Series(f"walk{k}/{n}", steps, walk),
                Series(f"errors{k}/{n}", steps, walk, np.full(n, 0.5)),
                Series(f"stairs{k}/{n}", steps, stairs),
                Series(f"replicates{k}/{n}", steps, replicates.mean(0), replicates=replicates),
            ]
    return made


@pytest.mark.parametrize("at_once", [64, 2])
def test_fits_of_many_are_those_of_each(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devmon.analysis.detection.noise.AT_ONCE", at_once)
    series, detector = many(), Detector(n_null=39)
    stairs = next(one for one in series if one.name.startswith("stairs"))
    assert without_rises(np.log10(STEPS), np.asarray(stairs.values))[1] > 0, "its rise is taken out"
    together = detector.fit_all(series)
    assert {fit.outcome for fit in together} >= {"EVENTS"}
    for one, fit in zip(series, together, strict=True):
        spline.places_of.cache_clear()
        alone = detector.fit(one.steps, one.values, one.se, one.replicates, name=one.name)
        assert repr((fit.found, fit.noise, fit.p_values, fit.notes)) == repr(
            (alone.found, alone.noise, alone.p_values, alone.notes)
        )
        for part in ("mean", "low", "high"):
            np.testing.assert_array_equal(getattr(fit.trend, part), getattr(alone.trend, part))


def test_noise_of_series_one_by_one_is_that_of_a_product_of_all() -> None:
    model = NoiseModel(np.log10(STEPS), np.ones(len(STEPS)))
    values = np.random.default_rng(1).standard_normal((len(STEPS), constants.AT_ONCE + 3)).cumsum(0)
    for found, expected in zip(model.fit(values, alone=True), model.fit(values), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    windows_of.cache_clear()


def test_splines_on_the_same_places_share_no_values() -> None:
    rng, x = np.random.default_rng(2), np.linspace(0, 1, 20)
    noise = 0.01 * np.eye(20)
    first, second = (spline.Spline(x, rng.standard_normal(20), noise) for _ in range(2))
    assert first.places is second.places
    assert np.abs(first.mean - second.mean).max() > 0.1
    np.testing.assert_array_equal(first.slope, np.gradient(first.mean, first.x))


def test_surprise_of_a_part_is_a_part_of_the_surprise() -> None:
    values = np.random.default_rng(3).standard_normal((2, 30)).cumsum(1)
    for lag in (1, 4):
        np.testing.assert_array_equal(surprise(values, lag, slice(3, 9)), surprise(values, lag)[:, 3:9])


def test_equal_lags_are_taken_in_one_order() -> None:
    """Ties of unequal weights: what precedes is summed in the order of the pairs, whatever sorts them."""
    rng = np.random.default_rng(4)
    steps, weights = np.arange(1.0, 90), rng.random(89)
    found = lead_lag((steps, weights), (steps, weights[::-1]))
    lags = np.subtract.outer(steps, steps).ravel()
    pairs = np.multiply.outer(weights[::-1] / weights.sum(), weights / weights.sum()).ravel()
    order = sorted(range(len(lags)), key=lambda k: (lags[k], k))
    before = np.cumsum(pairs[order])
    assert found.lag == lags[order][np.searchsorted(before, 0.5)]
    assert found.first == np.clip(np.sum(pairs[order] * ((lags[order] > 0) + 0.5 * (lags[order] == 0))), 0, 1)
