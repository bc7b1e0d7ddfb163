"""The detector's model, likelihood, shapes and nulls: exact algebra against slow references."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from devmon.analysis.detection.curve import Curve, vertex
from devmon.analysis.detection.jumps import is_event, joined, locate
from devmon.analysis.detection.null_model import Grid, Whitened, matern, shares
from devmon.analysis.detection.scan import Path, Scan, tail_p
from devmon.analysis.detection.shapes import (
    LOG,
    PULSE,
    STEP,
    Jump,
    Shapes,
    candidates,
    columns_of,
    odds_against,
    shapes_of,
)
from devmon.analysis.detection.spikes import isolated
from devmon.analysis.detection.turns import most_prominent, summit
from devmon.analysis.series import Array
from tests.detection.test_detect import NOTHING, SIXTY, X, ar1, logistic, rng


@pytest.fixture(scope="module")
def small() -> Grid:
    return Grid(np.array([0.0, 1, 2, 4, 7, 11, 20, 40, 60, 90, 140]), np.linspace(0.5, 2, 11))


def covariance(grid: Grid, k: int) -> Array:
    """Entry by entry from the definitions."""
    t, n = grid.thetas[k], len(grid.steps)
    x = [np.log10(step + 1) for step in grid.steps]
    se = np.linspace(0.5, 2, 11)
    way = {"growing": 1, "shrinking": -1}.get(t.shape, 0)
    ramp = [10 ** (way * ((here - x[0]) / (x[-1] - x[0]) - 0.5)) for here in x]
    sd = se / np.sqrt(np.mean(se**2)) if t.shape == "se" else ramp
    result = np.empty((n, n))
    for i, j in itertools.product(range(n), repeat=2):
        r = np.sqrt(5) * abs(x[i] - x[j]) / t.length
        noise = (1 - t.white) * t.rho ** abs(i - j) + t.white * (i == j)
        result[i, j] = t.amplitude**2 * (1 + r + r * r / 3) * np.exp(-r) + sd[i] * sd[j] * noise
    return result


def freedom(grid: Grid, k: int) -> float:
    """Share of the points that the smooth part takes: by how much the fit at each moves with the value there."""
    t, x = grid.thetas[k], np.log10(grid.steps + 1)
    smoother = t.amplitude**2 * matern(x, x, t.length) @ np.linalg.inv(covariance(grid, k))
    return float(np.trace(smoother)) / len(x)


def test_restricted_likelihood_is_that_of_contrasts(small: Grid) -> None:
    y, drift = rng(1).standard_normal(11), small.drift
    null = Whitened(small, drift)
    contrast = np.linalg.svd(drift)[0][:, 2:]
    logs = null.loglik(null.rss(y))
    expected = []
    for k in range(len(small.thetas)):
        v = contrast.T @ covariance(small, k) @ contrast
        z = contrast.T @ y
        one = small.thetas[k]
        odds = -1.0 * (one.amplitude > 0) - 2.0 * (one.white > 0) - 1.0 * (one.shape in ("growing", "shrinking"))
        odds -= 6.0 * (freedom(small, k) > 0.6)
        expected.append(-4.5 * np.log(z @ np.linalg.solve(v, z)) - 0.5 * np.linalg.slogdet(v)[1] + odds)
    # the likelihood of contrasts differs by ½ log|XᵀX|, the same for every theta
    np.testing.assert_allclose(logs - logs[0], np.array(expected) - expected[0], atol=1e-7)


def test_no_smooth_part_that_goes_through_the_points(small: Grid) -> None:
    assert max(freedom(small, k) for k in range(len(small.thetas))) <= 0.9
    assert {t.amplitude for t in small.thetas} >= {0.0, 1.0, 2.5, 6.0}


def test_innovations_of_the_noise(small: Grid) -> None:
    """Of AR(1) noise: the first point has its whole sd, each later one what rho leaves of it."""
    for k, t in enumerate(small.thetas):
        if t.shape == "flat" and t.white == 0:
            assert small.innovation[k] == pytest.approx((1 - t.rho**2) ** (10 / 22))


def test_smoother_is_the_conditional_mean(small: Grid) -> None:
    k = next(k for k, t in enumerate(small.thetas) if t.amplitude == 1 and t.rho == 0.7 and t.shape == "se")
    t = small.thetas[k]
    at = np.array([0.1, 0.77, 1.9])
    y = rng(2).standard_normal(11)
    smoother, cov = Whitened(small, small.drift).smoother(k, at, columns_of(small, NOTHING, at)[0])
    flat_prior = 1e7
    x = np.log10(small.steps + 1)
    phi, phi_at = small.drift, np.stack([np.ones(3), at - x.mean()], 1)
    total = covariance(small, k) + flat_prior * phi @ phi.T
    cross = t.amplitude**2 * matern(at, x, t.length) + flat_prior * phi_at @ phi.T
    own = t.amplitude**2 * matern(at, at, t.length) + flat_prior * phi_at @ phi_at.T
    np.testing.assert_allclose(smoother @ y, cross @ np.linalg.solve(total, y), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cov, own - cross @ np.linalg.solve(total, cross.T), rtol=1e-3, atol=1e-4)


def test_a_spike_left_out_is_a_point_that_was_never_there(small: Grid) -> None:
    y = rng(3).standard_normal(11)
    y[4] = 1e4
    without = Grid(np.delete(small.steps, 4), np.delete(np.linspace(0.5, 2, 11), 4))
    white = [t for t in small.thetas if t.rho == 0 and t.shape == "flat" and t in without.thetas]
    assert len(white) > 2
    with_spike, deleted = Whitened(small, small.drift, (4,)), Whitened(without, without.drift)
    here, there = ([grid.thetas.index(t) for t in white] for grid in (small, without))
    np.testing.assert_allclose(with_spike.rss(y)[here], deleted.rss(np.delete(y, 4))[there], rtol=1e-5)
    a, b = (with_spike.penalty + small.prior)[here], (deleted.penalty + without.prior)[there]
    np.testing.assert_allclose(a - a[0], b - b[0], atol=1e-6)
    assert isolated(Whitened(small, small.drift), y)[0] == (4,)


def test_averaging_many_checkpoints_keeps_their_covariance() -> None:
    steps = np.arange(1.0, 401)
    grid = Grid(steps)
    k = next(k for k, t in enumerate(grid.thetas) if t.amplitude == 0 and t.rho == 0.7 and t.shape == "flat")
    assert len(grid.x) <= 128
    draws = np.array([grid.average(ar1(rng(i), 400, 0.7)) for i in range(1500)])
    np.testing.assert_allclose(draws.var(0), np.diag(grid.noise[k]), rtol=0.2)
    np.testing.assert_allclose(grid.average(np.ones(400)), 1)


def test_the_gain_ignores_scale_and_drift_and_sees_shapes_added_one_by_one() -> None:
    grid = Grid(SIXTY[::2])
    scan = Scan(grid, 3, 0)
    y = 3 * logistic(grid.x, 1, 0.2) + 3 * logistic(grid.x, 2.3, 0.2) + 3 * logistic(grid.x, 3.5, 0.1)
    y += 0.3 * rng(4).standard_normal(len(grid.x))
    path = scan.path(np.stack([y, 50 * y + 7 + 2 * grid.x], 1))
    gains, picks = path.gains, path.picks
    np.testing.assert_allclose(gains[0], gains[1], rtol=1e-3)
    # from scratch: the best shape beside those before it, over all covariances
    null = scan.null
    base = null.loglik(null.rss(y)).max()
    for n in (1, 2):
        before = picks[0, :n]
        best = -np.inf
        for i in np.flatnonzero(scan._free[:, before].all(1)):
            more = Whitened(grid, np.column_stack([grid.drift, scan.raw[:, [*before, i]]]))
            odds = scan.against[[*before, i]].sum()
            best = max(best, float((-null.df / 2 * np.log(more.rss(y)) - null.penalty).max() - odds))
        assert gains[0, n] == pytest.approx(best - base, abs=1e-2)


def test_places_do_not_outvote_widths() -> None:
    shapes = candidates(Grid(SIXTY))
    prior = np.exp(-odds_against(shapes))
    total: dict[tuple[int, float], float] = {}
    for form, width, p in zip(shapes.form, shapes.width, prior, strict=True):
        total[form, width] = total.get((form, width), 0.0) + p
    rises = [p for (form, _), p in total.items() if form != PULSE]
    pulses = [p for (form, _), p in total.items() if form == PULSE]
    np.testing.assert_allclose(rises, rises[0])
    np.testing.assert_allclose(pulses, rises[0] / np.e)
    assert sum(rises) + np.e * sum(pulses) == pytest.approx(len(prior))


def test_nulls_come_from_every_likely_covariance() -> None:
    """A gain that is rare in one kind of noise and usual in another lies between where half the nulls come from each."""
    scan = Scan(Grid(SIXTY[::2]), 1, 0)
    white, walk = (
        next(k for k, t in enumerate(scan.grid.thetas) if t.amplitude == 0 and t.shape == "flat" and t.rho == rho)
        for rho in (0.0, 0.99)
    )
    value = float(np.quantile(scan.nulls(walk, 199), 0.9))

    def p(weights: dict[int, float]) -> float:
        each = np.zeros((len(scan.grid.thetas), 1))
        each[list(weights), 0] = list(weights.values())
        return scan.test(Path(np.array([[value]]), np.array([[0]]), each, each), 199)[0]

    alone = p({white: 1.0}), p({walk: 1.0})
    both = [*scan.nulls(white, 100)[:, 0], *scan.nulls(walk, 99)[:, 0]]
    usual = np.quantile(both, 0.9)
    assert p({white: 0.5, walk: 0.5}) == pytest.approx(tail_p(value - usual, np.array(both) - usual))
    assert min(alone) < p({white: 0.5, walk: 0.5}) < max(alone)


def test_nulls_of_noise_shaped_like_the_errors_are_those_of_constant_noise() -> None:
    """Also where the smooth part beside constant noise would go through the points, and is not in the grid."""
    steps = np.array([32.0, 53, 109, 139, 177, 226, 288, 367, 759])
    se = np.array([0.31, 0.99, 0.57, 0.84, 0.96, 0.94, 0.82, 1.8, 1.09])
    flat = Scan(Grid(steps), 2, 0)
    own = Scan(Grid(steps, se, flat=False), 2, 0, flat)
    missing = 0
    for k, theta in enumerate(own.grid.thetas):
        alike = theta if theta in flat.grid.thetas else replace(theta, shape="flat")
        nulls = own.nulls(k, 16)
        if alike in flat.grid.thetas:
            np.testing.assert_array_equal(nulls, flat.nulls(flat.grid.thetas.index(alike), 16))
        else:
            missing += 1
            assert nulls.shape == (16, 2)
    assert missing


def test_shapes() -> None:
    x = np.array([1.9, 2.0, 2.1])
    shapes = Shapes(np.array([2.0, 2.0, 2.0]), np.array([0.2, 0.2, 0.2]), np.array([LOG, STEP, PULSE]))
    height = shapes.at(x)[0]
    np.testing.assert_allclose(height[0], [0.1, 0.5, 0.9])
    np.testing.assert_allclose(height[2], [0.36, 1.0, 0.36])
    # a logistic in step: t10 and t90 lie evenly around the centre in step, and are 0.2 decades apart
    t90 = 100 * 2 * 10**0.2 / (1 + 10**0.2)
    ends = shapes.at(np.log10(np.array([200 - t90, t90])))[0][1]
    np.testing.assert_allclose(ends, [0.1, 0.9])
    assert np.log10(t90 / (200 - t90)) == pytest.approx(0.2)


def test_prominence() -> None:
    curve = np.array([0.0, 3, 1, 5, 4, 4.5, -1])
    assert most_prominent(curve) == 5  # the top at 5 rises 5 above the start
    assert most_prominent(np.arange(5.0)) == 0
    place, size = summit(curve[None], 2, 3, 4, 6)
    assert (place[0], size[0]) == (3, 4.0)


def test_draws_of_a_jump_have_one_sign_and_a_jump_of_uncertain_sign_is_none() -> None:
    scan = Scan(Grid(SIXTY), 1, 0)
    y = 2.0 * logistic(X, 2.2, 0.5) + rng(21).standard_normal(len(X))
    jump = locate(scan, scan.null, NOTHING, y, 0.01)
    assert 0.5 < jump.sure < 1
    assert np.all(jump.size > 0)
    y = 20.0 * logistic(X, 2.2, 0.2) + rng(22).standard_normal(len(X))
    jump = locate(scan, scan.null, NOTHING, y, 0.01)
    assert jump.sure == 1
    beside = Whitened(scan.grid, columns_of(scan.grid, shapes_of([jump]), scan.grid.x)[0])
    assert [is_event(beside, y, [replace(jump, sure=sure)], 0) for sure in (0.89, 0.91)] == [False, True]


def test_touching_jumps_of_one_sign_are_one() -> None:
    def jump(c: float, size: float, form: int = LOG, width: float = 0.1) -> Jump:
        return Jump(np.full(5, c), np.full(5, width), np.full(5, size), form, 0.01)

    (one,) = joined([jump(2.11, 1.0), jump(2.0, 3.0)])
    assert one.middle == (pytest.approx(2.0275), pytest.approx(0.21))
    assert one.size[0] == 4
    (one,) = joined([jump(2.0, 0.1), jump(2.09, 9.9, width=0.02)])  # 0.03 between them, the slow start of a steep fall
    assert one.middle == (pytest.approx(2.0891), pytest.approx(0.15))
    assert len(joined([jump(2.0, 3.0), jump(2.11, -1.0)])) == 2
    assert len(joined([jump(2.0, 3.0), jump(2.3, 1.0), jump(2.6, 1.0, PULSE)])) == 2


def test_the_tail_beyond_the_nulls() -> None:
    nulls = -np.log(1 - (np.arange(200) + 0.5) / 200)  # the quantiles of an exponential
    assert tail_p(1.0, nulls) == pytest.approx((1 + np.sum(nulls >= 1)) / 201)
    for value in (5.5, 7.0):  # expected e^-value; the fit errs upwards
        assert np.exp(-value) < tail_p(value, nulls) < 3 * np.exp(-value)
    assert tail_p(5.5, 40 - 30 * nulls) == pytest.approx((1 + np.sum(40 - 30 * nulls >= 5.5)) / 201)
    assert tail_p(1e9, nulls) == 1e-4
    assert tail_p(9.0, nulls[:20]) == 1 / 21  # too few for a tail


def test_the_vertex_of_a_parabola_between_uneven_places() -> None:
    at = np.array([0, 1, 1.5, 3, 4.0])
    parabola = -3 * (at - 1.4) ** 2 + 2
    np.testing.assert_allclose(vertex(at, np.stack([parabola, parabola - 7]), np.array([2, 2])), 1.4)
    np.testing.assert_allclose(vertex(at, parabola[None, ::-1], np.array([0])), 0)  # no neighbour on one side


def test_shares_add_up_and_follow_the_weights() -> None:
    np.testing.assert_array_equal(shares(np.array([0.5, 0.3, 0.2]), 9), [4, 3, 2])


def test_twiced_draws_have_the_residuals_smoothed_once_more(small: Grid) -> None:
    y = 5 * np.sin(3 * small.x) + rng(48).standard_normal(len(small.x))
    null = Whitened(small, small.drift, (3,))  # a free value smooths to itself
    curve = Curve(null, [], y, 0)
    at = np.searchsorted(curve.at, small.x)
    smooth = curve.smoother(curve.best)[0]
    again = smooth @ (2 * y - smooth[at] @ y)
    np.testing.assert_allclose(
        curve.twiced - curve.draws, np.tile(again - curve.smoothed, (len(curve.draws), 1)), atol=1e-9
    )


def test_the_profile_of_the_noise_keeps_the_shape_of_the_errors_where_the_grid_is_a_part() -> None:
    """Residuals that follow neither: the profile is theirs, whichever covariances are left."""
    se = np.geomspace(1, 8, len(X))
    noise = se[::-1]
    y = rng(23).standard_normal(len(X)) * noise
    whole = Grid(SIXTY, se)
    part = whole.only(np.flatnonzero([theta.shape == "se" for theta in whole.thetas]))
    profiles = [Curve(Whitened(grid, grid.drift), [], y, 0).noise_profile() for grid in (whole, part)]
    slopes = [np.polyfit(np.log(noise), np.log(profile), 1)[0] for profile in profiles if profile is not None]
    assert len(slopes) == 2
    assert slopes[1] == pytest.approx(slopes[0], abs=0.3)  # with the shape of the errors forgotten, 1 more


def test_a_curve_that_the_smoother_follows_closely_has_no_less_noise_there() -> None:
    """Flat on sparse steps, then wild on dense ones: where the smoother goes nearly through the points, it leaves less of
    the noise, which is of one size. Squared residuals alone say fourfold more of it at the end."""
    steps = np.unique(np.round(np.append(np.linspace(0, 500_000, 51), np.geomspace(1, 500_000, 50))))
    x = np.log10(steps + 1)
    wild = 170 * logistic(x, 3.6, 1.5) - 50 * logistic(x, 5.3, 0.4) + 4 * logistic(x, 5.6, 0.2)
    grid = Grid(steps)
    null = Whitened(grid, grid.drift)
    told = 0
    for run in range(12):
        curve = Curve(null, [], grid.average(wild + 0.1 * ar1(rng(31, run), len(steps), 0.8)), 0)
        assert grid.freedom[curve.best] > 0.4
        told += curve.noise_profile() is not None
    assert told <= 3
