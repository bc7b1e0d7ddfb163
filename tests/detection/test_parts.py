"""The parts of the search against closed forms and slow references: noise, windows, splines, abruptness."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from devmon.analysis.detection.abrupt import abruptness, largest_surprise, surprise
from devmon.analysis.detection.axis import averaged, bins, counts
from devmon.analysis.detection.constants import GRID, PHIS, POWERS
from devmon.analysis.detection.detector import Detector, chi2_quantile
from devmon.analysis.detection.measure import between
from devmon.analysis.detection.noise import NoiseModel, correlation, covariance, of_replicates, spikes, without_rises
from devmon.analysis.detection.spline import Spline, _kernel, summit
from devmon.analysis.detection.windows import Order, Windows, p_value
from devmon.analysis.series import Array

X = np.log10(np.unique(np.round(np.geomspace(1, 20_000, 66))))
ONES = np.ones(len(X))


def ar1(rng: np.random.Generator, shape: tuple[int, ...], phi: float) -> Array:
    noise = rng.standard_normal(shape)
    for i in range(1, shape[0]):
        noise[i] = phi * noise[i - 1] + np.sqrt(1 - phi**2) * noise[i]
    return noise


# places


def test_bins_keep_early_points_and_do_not_move_when_rows_are_added() -> None:
    short, long = np.arange(1.0, 4001), np.arange(1.0, 20_001)
    a, b = bins(short), bins(long)
    assert a[:20].tolist() == list(range(20)) == b[:20].tolist()
    assert len(a) <= 400 >= len(b)
    assert b[: len(a) - 1].tolist() == a[:-1].tolist()  # all but the last, which fills up
    np.testing.assert_allclose(averaged(long, b)[-1], long[b[-1] :].mean())
    assert counts(b, len(long)).sum() == len(long)


# noise


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_covariance_of_block_means_is_that_of_the_points(phi: float) -> None:
    sizes = np.array([1.0, 3, 1, 5, 2])
    lag = np.abs(np.subtract.outer(np.arange(12), np.arange(12)))
    mean = np.zeros((5, 12))
    for i, (start, size) in enumerate(zip(np.cumsum(sizes) - sizes, sizes, strict=True)):
        mean[i, int(start) : int(start + size)] = 1 / size
    np.testing.assert_allclose(covariance(sizes, phi), mean @ (phi**lag) @ mean.T, atol=1e-12)


@pytest.mark.parametrize("phi, low, high", [(0.0, 0.0, 0.3), (0.5, 0.3, 0.7), (0.8, 0.5, 0.95)])
def test_noise_is_told_from_a_smooth_curve_beside_it(phi: float, low: float, high: float) -> None:
    rng, model = np.random.default_rng(3), NoiseModel(X, ONES)
    curve = 40 * np.exp(-0.8 * X) + 10 * np.exp(-((X - 2.5) ** 2))
    loglik, sd = model.fit(curve[:, None] + 2 * ar1(rng, (len(X), 24), phi))
    found = [correlation(one) for one in loglik.T]
    assert low <= np.median([PHIS[k] for k in found]) <= high, found
    size = [np.mean(sd[k, :, i]) for i, k in enumerate(found)]
    assert 1.4 < np.median(size) < 3.2, size


def test_noise_follows_its_size_over_training_and_ignores_a_step() -> None:
    rng = np.random.default_rng(4)
    size = np.geomspace(1, 10, len(X))
    y = size[:, None] * rng.standard_normal((len(X), 40)) + 100.0 * (np.arange(len(X)) >= 30)[:, None]
    _, sd = NoiseModel(X, ONES).fit(y, 0.0)
    typical = np.median(sd[0], axis=1)
    assert typical[-1] / typical[0] > 3, typical
    assert typical.max() < 15, typical  # the step of 100 is none of it


def test_replicates_give_the_error_of_their_mean_whatever_their_levels() -> None:
    rng = np.random.default_rng(5)
    noise = ar1(rng, (len(X), 12), 0.5).T * 3
    k, sd = of_replicates(NoiseModel(X, ONES), noise + 50 * np.sin(X) + 100 * rng.standard_normal((12, 1)))
    assert 0.3 <= PHIS[k] <= 0.7
    np.testing.assert_allclose(np.median(sd), 3 / np.sqrt(12), rtol=0.25)


@pytest.mark.parametrize(
    "values, found",
    [
        ([10.83, *np.linspace(10.8, 4, 20)], []),
        ([0.0] * 11 + [0.091, 0.306, 0.446, 0.475, 0.487, 0.512, 0.519, 0.542, 0.545], []),
        ([0.0] * 4 + [1.0] * 4, []),
        ([0.0, 0.1] * 5 + [3.0] + [0.1, 0.0] * 5, [10]),
        ([0.0, 0.1] * 5 + [3.0, 3.0] + [0.1, 0.0] * 5, []),
    ],
)
def test_only_a_single_point_that_leaves_and_comes_back_is_a_spike(values: list[float], found: list[int]) -> None:
    assert np.flatnonzero(spikes(np.array(values))).tolist() == found
    assert np.flatnonzero(spikes(-np.array(values))).tolist() == found


def test_rises_between_rests_are_taken_out_and_what_is_none_stays() -> None:
    wiggle = 0.1 * np.random.default_rng(11).standard_normal(24)
    x, place = np.arange(24.0), np.arange(24)
    stair = wiggle + 5.0 * (place >= 8) + 5.0 * (place >= 9) - 7.0 * (place >= 16)  # two gaps up, one down
    left, gaps = without_rises(x, stair)
    assert gaps == 3
    assert np.ptp(left) < 1
    assert without_rises(x, wiggle)[1] == 0
    assert without_rises(x, wiggle + 5.0 * (place == 12))[1] == 0  # comes back at once
    assert without_rises(x, wiggle + 5.0 * np.clip(place - 8, 0, 4))[1] == 0  # too slow to be sharp
    close = np.where(place <= 8, x, x + 10)
    close[9:] -= 9.9  # the checkpoints before the rise lie close together
    close[:8] = close[7] - 0.01 * (7 - place[:8])
    assert without_rises(close, wiggle + 5.0 * (place >= 8))[1] == 0


# windows


def test_contrasts_are_slopes_and_changes_of_slope() -> None:
    windows = Windows(X, ONES)
    bent = np.where(X[30] > X, 2 * (X - X[30]), 5 * (X - X[30]))
    found = windows.rows @ bent
    left, right = windows.last <= 30, windows.first >= 30
    np.testing.assert_allclose(found[(windows.order == Order.SLOPE) & left], 2, atol=1e-9)
    np.testing.assert_allclose(found[(windows.order == Order.SLOPE) & right], 5, atol=1e-9)
    at = (windows.order == Order.CHANGE) & (windows.split == 30)
    assert at.sum() > 5
    np.testing.assert_allclose(found[at], 3, atol=1e-9)
    np.testing.assert_allclose(found[(windows.order == Order.CHANGE) & (left | right)], 0, atol=1e-9)


@pytest.mark.parametrize("phi", [0.0, 0.8])
def test_statistics_have_unit_variance_under_their_noise(phi: float) -> None:
    windows = Windows(X, ONES)
    size = np.geomspace(1, 3, len(X))[:, None]
    noise = size * ar1(np.random.default_rng(1), (len(X), 4000), phi)
    spread = windows.statistics(noise, np.repeat(size, 4000, axis=1), phi).std(1)
    short = windows.lengths <= 12
    assert np.all(np.abs(spread[short] - 1) < 0.12), (spread[short].min(), spread[short].max())


def test_the_largest_statistic_is_at_its_threshold_as_often_as_alpha() -> None:
    windows = Windows(X, ONES)
    noise = np.random.default_rng(2).standard_normal((len(X), 400))
    null = windows.null(0.0, "measured", 299)
    largest = (windows.statistics(noise, np.ones_like(noise), 0.0) - windows.penalty[:, None]).max(0)
    assert 0.02 <= np.mean(largest > np.quantile(null, 0.95)) <= 0.09
    assert abs(np.mean([p_value(one, null) for one in largest]) - 0.5) < 0.06


def test_extrema_lie_between_windows_of_opposite_sign() -> None:
    windows = Windows(X, ONES)
    curve = -np.abs(X - X[40]) * 30
    found = windows.extrema(windows.statistics(curve[:, None], 0.5 * ONES[:, None], 0.0)[:, 0], Order.SLOPE, 2.0)
    (top,) = found
    assert (top.sign, top.order) == (1, Order.SLOPE)
    assert top.left <= 40 <= top.right
    assert windows.extrema(windows.statistics(X[:, None] * 99, ONES[:, None], 0.0)[:, 0], Order.SLOPE, 2.0) == []
    step = np.where(np.arange(len(X)) >= 40, 8.0, 0.0)
    (steep,) = windows.extrema(windows.statistics(step[:, None], ONES[:, None], 0.0)[:, 0], Order.CHANGE, 2.0)
    assert steep.sign == 1
    assert steep.left <= 39 < 40 <= steep.right


def test_p_values_are_shares_and_then_a_tail() -> None:
    null = np.sort(np.random.default_rng(0).exponential(size=600))
    assert p_value(np.median(null), null) == pytest.approx(0.5, abs=0.002)
    assert p_value(null[-1] + 2, null) == pytest.approx(np.exp(-null[-1] - 2), rel=1.5)
    values = [p_value(x, null) for x in np.linspace(0, 12, 50)]
    assert all(a >= b for a, b in zip(values, values[1:], strict=False))


# splines


def test_a_parabola_is_free_and_the_kernel_is_that_of_its_integral() -> None:
    curve = Spline(X[:30], 3 - X[:30] + 2 * X[:30] ** 2, 0.01 * np.eye(30))
    np.testing.assert_allclose(curve.mean, 3 - curve.x + 2 * curve.x**2, atol=1e-3)
    t = np.linspace(0, 0.7, 20_001)
    slow = np.trapezoid((0.7 - t) ** 2 * (0.9 - t) ** 2 / 4, t)
    assert _kernel(np.array([0.7]), np.array([0.9]))[0, 0] == pytest.approx(slow, rel=1e-6)


def test_draws_spread_as_the_curve_does_over_new_noise() -> None:
    rng, x = np.random.default_rng(6), np.linspace(0, 1, 40)
    truth = np.sin(4 * x)
    curves = [Spline(x, truth + 0.1 * rng.standard_normal(40), 0.01 * np.eye(40)) for _ in range(60)]
    middle = slice(20, 76)
    between = np.std([curve.mean for curve in curves], axis=0)[middle].mean()
    within = np.mean([curve.draws().std(1) for curve in curves], axis=0)[middle].mean()
    assert within == pytest.approx(between, rel=0.2)


@pytest.mark.parametrize(("n", "sd", "phi"), [(24, 0.1, 0.0), (40, 0.01, 0.8), (110, 0.3, 0.95), (110, 1e-7, 0.0)])
def test_a_spline_is_that_of_the_likeliest_of_dense_restricted_likelihoods(n: int, sd: float, phi: float) -> None:
    """Every power by itself, of contrasts that no parabola has, and the curve by its covariances."""
    rng, x = np.random.default_rng(n), np.sort(np.random.default_rng(7).uniform(0, 3, n))
    noise = sd**2 * phi ** np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    values = np.sin(4 * x) + sd * ar1(rng, (n,), phi)
    curve = Spline(x, values, noise)
    places, z = curve.places, (values - curve.middle) / curve.scale
    noise = noise / curve.scale**2 + 1e-8 * np.eye(n)
    u = (x - x[0]) / np.ptp(x)
    rest = np.linalg.qr(np.vander(u, 3), mode="complete")[0][:, 3:]
    loglik = []
    for power in POWERS:
        cov = rest.T @ (power * _kernel(u, u) + noise) @ rest
        loglik.append(-0.5 * (np.linalg.slogdet(cov)[1] + (rest.T @ z) @ np.linalg.solve(cov, rest.T @ z)))
    assert curve.power == POWERS[int(np.argmax(loglik))], loglik
    if sd < 1e-6:
        return  # nearly singular: both are the data, to a thousandth
    whole = np.linalg.solve(curve.power * places.kernel + places.free + noise, np.eye(n))
    mean = (curve.power * places.kernel_at + places.free_at) @ whole @ z
    np.testing.assert_allclose(curve.mean, curve.middle + curve.scale * mean, atol=1e-6)


def test_above_the_level_of_both_signs_there_is_no_extremum() -> None:
    windows, rng = Windows(X, ONES), np.random.default_rng(8)
    for _ in range(20):
        found = windows.statistics(rng.standard_normal((len(X), 1)).cumsum(0), np.ones((len(X), 1)), 0.0)[:, 0]
        for order in Order:
            level = windows.both_signs(found, order)
            assert not windows.extrema(found, order, level)
            beyond = np.abs(found) - windows.penalty >= level
            assert {-1, 1} == set(np.sign(found[beyond & (windows.order == order)])), "it is the least such level"


def test_draws_at_some_places_are_those_of_the_whole_curve() -> None:
    x = np.linspace(0, 1, 30)
    curve = Spline(x, np.sin(4 * x), 0.01 * np.eye(30))
    for part in (slice(0, 4), slice(20, 21), slice(90, GRID)):
        np.testing.assert_allclose(curve.draws(part.start, part.stop), curve.draws()[part], rtol=1e-8)
        slopes = np.gradient(curve.draws(), curve.x, axis=0)
        np.testing.assert_allclose(curve.slopes(part.start, part.stop), slopes[part], rtol=1e-6, atol=1e-6)


def test_powers_beyond_what_floats_hold_are_left_out() -> None:
    """A loss that falls by itself to nothing: at the largest power rounding leaves the kernel indefinite."""
    path = Path(__file__).parents[2] / "benchmarks" / "curves" / "grokking-train-loss.csv"
    steps, loss = np.loadtxt(path, delimiter=",", skiprows=1, unpack=True)
    (event, *_) = Detector().fit(steps, loss).events()
    assert event.step == pytest.approx(143.975, rel=1e-4)


def test_a_summit_lies_between_the_places_at_which_a_curve_is_drawn() -> None:
    x, at = np.linspace(0, 1, 21), np.array([0.413, 0.5, 0.01])
    curves = 3 - (x[:, None] - at) ** 2
    np.testing.assert_allclose(summit(x, curves, curves.argmax(0)), at, atol=1e-9)
    np.testing.assert_allclose(summit(x, -curves, curves.argmax(0)), at, atol=1e-9)


def test_chi_squared_without_scipy_stats_is_that_of_scipy_stats() -> None:
    for free in (1, 7, 14):
        for share in (0.01, 0.5):
            assert chi2_quantile(share, free) == pytest.approx(stats.chi2.ppf(share, free), rel=1e-13)


# abruptness


@pytest.mark.parametrize("n", [8, 9, 30, 61])
def test_the_largest_surprise_is_that_of_all_changes(n: int) -> None:
    values = np.random.default_rng(n).standard_normal((50, n)).cumsum(1)
    for lag in (1, 2, n // 3):
        np.testing.assert_array_equal(largest_surprise(values, lag), surprise(values, lag).max(-1))


def test_quantiles_of_sorted_draws_are_those_of_numpy() -> None:
    draws, shares = np.sort(np.random.default_rng(9).standard_normal(200)), (0.05, 0.5, 0.95, 1.0)
    np.testing.assert_allclose(between(draws, shares), np.quantile(draws, shares), rtol=1e-13)


def test_surprise_compares_a_change_with_those_that_do_not_touch_it() -> None:
    values = np.random.default_rng(8).standard_normal(30)
    for lag in (1, 4):
        square = (values[lag:] - values[:-lag]) ** 2
        for i in (0, 11, 29 - lag):
            others = [square[j] for j in range(len(square)) if abs(j - i) >= lag]
            t = np.sqrt(square[i] / np.mean(others))
            expected = -stats.t.logsf(t, max(len(others) / lag, 1))
            assert surprise(values, lag)[i] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("phi", [0.0, 0.95, 1.0])
def test_drift_is_rarely_abrupt_anywhere(phi: float) -> None:
    rng = np.random.default_rng(9)
    alarms = 0
    for _ in range(60):
        walk = rng.standard_normal(60)
        for i in range(1, 60):
            walk[i] += phi * walk[i - 1]
        alarms += abruptness(walk, 0, 59) <= 0.05
    assert alarms <= 7, alarms  # 5% of 60: more than 7 has probability .02


def test_a_step_in_noise_is_abrupt_and_a_ramp_is_not() -> None:
    noise = 0.1 * np.random.default_rng(10).standard_normal(60)
    step = np.where(np.arange(60) > 30, 1.0, 0.0)
    assert abruptness(step + noise, 30, 31) < 0.01
    assert abruptness(np.linspace(0, 1, 60) + noise, 20, 40) > 0.2
