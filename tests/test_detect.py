"""The detector: exact algebra first, then false alarms, recall and coverage on simulated series with known truth."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from devmon.analysis.curve import Curve, vertex
from devmon.analysis.detect import Detector, Event, Series, benjamini_hochberg, detect, lead_lag
from devmon.analysis.detector import _shared
from devmon.analysis.jumps import Jump, is_event, isolated, joined, locate, shapes_of
from devmon.analysis.scan import Path, Scan, tail_p
from devmon.analysis.shapes import LOG, PULSE, STEP, Shapes, candidates, columns_of, odds_against
from devmon.analysis.smooth import Array, Grid, Whitened, matern, shares
from devmon.analysis.turns import monotone_nulls, most_prominent, summit
from devmon.errors import DataError
from devmon.watch import log_spaced

DETECTOR = Detector()
QUICK = Detector(n_null=99)
STEPS = np.array([step for step in range(2001) if step in log_spaced(100, 2000)], dtype=float)
SIXTY = np.unique(np.append(0, np.round(np.geomspace(1, 20_000, 66))))
X = np.log10(SIXTY + 1)
EVEN = np.round(np.linspace(0, 20_000, 100))
NOTHING = shapes_of([])


def logistic(x: Array, centre: float, width: float) -> Array:
    return 1 / (1 + np.exp(-np.clip((x - centre) * 2 * np.log(9) / width, -500, 500)))


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([7, *seed])


def ar1(generator: np.random.Generator, n: int, rho: float) -> Array:
    noise = generator.standard_normal(n)
    for i in range(1, n):
        noise[i] = rho * noise[i - 1] + np.sqrt(1 - rho**2) * noise[i]
    return noise


def steps_of(events: list[Event]) -> str:
    return "; ".join(f"{e.kind} {e.step:.0f} {e.interval} p={e.p_value}" for e in events)


# the model, against slow references


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
        expected.append(-4.5 * np.log(z @ np.linalg.solve(v, z)) - 0.5 * np.linalg.slogdet(v)[1] + odds)
    # the likelihood of contrasts differs by ½ log|XᵀX|, the same for every theta
    np.testing.assert_allclose(logs - logs[0], np.array(expected) - expected[0], atol=1e-7)


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
    white = [k for k, t in enumerate(small.thetas) if t.rho == 0 and t.shape == "flat"]
    with_spike, deleted = Whitened(small, small.drift, (4,)), Whitened(without, without.drift)
    a, b = with_spike.rss(y)[white], deleted.rss(np.delete(y, 4))[white]
    np.testing.assert_allclose(a, b, rtol=1e-5)
    a, b = with_spike.penalty[white], deleted.penalty[white]
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
    """A gain that white noise hardly ever has and a smooth curve with noise often: half of each lies between."""
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


# known curves


@pytest.mark.parametrize("noise", ["even", "uneven, known"])
def test_a_score_that_rises_like_induction_is_one_jump(noise: str) -> None:
    # steepest at 650, ten to ninety per cent between 500 and 800
    rise = 1 / (1 + np.exp(-(STEPS - 650) * 2 * np.log(9) / 300))
    sd = np.full(len(STEPS), 0.01) if noise == "even" else np.where(rise < 0.5, 0.002, 0.03)
    y = 0.02 + 0.74 * rise + sd * rng(5).standard_normal(len(STEPS))
    events = DETECTOR.fit(STEPS, y, sd if "known" in noise else None).events()
    assert [event.kind for event in events] == ["jump"], steps_of(events)
    (event,) = events
    assert event.interval[0] <= 650 <= event.interval[1], event
    assert event.interval[1] - event.interval[0] < 60
    assert event.size_interval[0] <= 0.74 <= event.size_interval[1], event
    assert event.width == pytest.approx(np.log10(800 / 500), rel=0.15)
    assert event.span == (pytest.approx(500, rel=0.05), pytest.approx(800, rel=0.05))
    assert event.resolved
    assert event.note == ""
    assert event.p_value < 1 / 200


def test_noise_that_grows_fifteenfold_within_the_jump_hides_no_jump_and_makes_few() -> None:
    rise = 1 / (1 + np.exp(-(STEPS - 650) * 2 * np.log(9) / 300))
    sd, more = np.where(rise < 0.5, 0.002, 0.03), 0
    for run in range(10):
        events = DETECTOR.fit(STEPS, 0.02 + 0.74 * rise + sd * rng(5, run).standard_normal(len(STEPS))).events()
        assert [e.kind for e in events if e.interval[0] <= 650 <= e.interval[1]] == ["jump"], steps_of(events)
        more += len(events) - 1
    assert more <= 2  # a tenth in 90 runs


@pytest.mark.parametrize("steps,noise", [(STEPS[STEPS >= 50], 1.0), (np.arange(25.0, 2001, 25), 4.0)])
def test_a_rise_and_fall_is_a_turn(steps: Array, noise: float) -> None:
    y = np.interp(steps, [50, 200, 500, 600, 650, 700, 800, 900], [24, 57, 72, 95, 130, 96, 90, 85])
    y = y + noise * rng(6).standard_normal(len(steps))
    assert summits(y, steps, 1) == 1
    assert summits(-y, steps, -1) == 1


def summits(y: Array, steps: Array, way: int) -> int:
    """How many maxima (minima) are found, all near 650: a narrow one that returns is a bump, another a turn."""
    found = [e for e in DETECTOR.fit(steps, y).events() if e.kind in ("turn", "bump") and way * e.size > 0]
    assert all(600 <= event.step <= 700 for event in found), steps_of(found)
    return len(found)


def test_a_smooth_maximum_is_located() -> None:
    hits = 0
    for run in range(8):
        centre = rng(run, 1).uniform(1.5, 2.8)
        y = 20 * np.exp(-0.5 * ((X - centre) / 0.5) ** 2) + rng(run, 2).standard_normal(len(X))
        (event,) = [event for event in QUICK.fit(SIXTY, y).events() if event.kind == "turn" and event.size > 0]
        hits += event.interval[0] <= 10**centre - 1 <= event.interval[1]
    assert hits >= 5, hits  # 90% intervals: fewer than 5 of 8 has probability .005


def test_a_staircase_is_not_taken_for_a_random_walk() -> None:
    y = sum(10 * logistic(X, c, 0.1) for c in (1.2, 2.2, 3.2)) + rng(8).standard_normal(len(X))
    events = DETECTOR.fit(SIXTY, y).events()
    assert [event.kind for event in events] == ["jump"] * 3, steps_of(events)
    for event, centre in zip(events, (1.2, 2.2, 3.2), strict=True):
        assert abs(np.log10(event.step + 1) - centre) < 0.06, event


def exact_curves() -> dict[str, Array]:
    return {
        "constant": np.full(len(X), 0.3),
        "straight": 3 * X - 7,
        "power law": (1 + SIXTY / 10) ** -0.5,
        "steep power law": (1 + SIXTY / 10) ** -1.0,
        "wide sigmoid": logistic(X, 2.0, 2.5),
        "flat score": 0.02 + 0.003 * rng(9).standard_normal(len(X)),
        "one spike": np.where(np.arange(len(X)) == 33, 40, 0) + rng(10).standard_normal(len(X)),
        "spike near the end": np.where(np.arange(len(X)) == len(X) - 3, 40, 0) + rng(11).standard_normal(len(X)),
        "double spike": np.where(np.isin(np.arange(len(X)), (20, 21)), 40, 0) + rng(12).standard_normal(len(X)),
    }


def test_p_values_of_a_random_walk_are_not_small_too_often() -> None:
    grid = Grid(SIXTY)
    scan = Scan(grid, 2, 0)
    small = 0
    for run in range(50):
        y = np.cumsum(rng(run, 21).standard_normal(len(X)))
        small += scan.test(scan.path(y[:, None]), 99)[0] <= 0.05
    assert small <= 7, small  # more than 7 of 50 has probability .003


def test_turns_of_a_monotone_curve_are_as_prominent_as_those_of_its_nulls() -> None:
    grid = Grid(SIXTY)
    null = Whitened(grid, grid.drift)
    p_values = []
    for run in range(20):
        y = 6 * X + ar1(rng(run, 22), len(X), 0.7) * 2
        curve = Curve(null, [], y, 0)
        own = most_prominent(curve.smoothed) / curve.noise_sd
        p_values.append(np.mean(monotone_nulls(curve, 49) >= own))
    assert np.sum(np.array(p_values) <= 0.1) <= 5, p_values  # more than 5 of 20 has probability .011
    assert np.mean(p_values) > 0.3, p_values


def test_no_jump_in_an_exact_power_law_at_even_steps() -> None:
    events = Detector(kinds=("jump",), n_null=99).fit(EVEN, (1 + EVEN / EVEN[1] / 10) ** -0.114).events()
    assert not events, steps_of(events)


@pytest.mark.parametrize("name", exact_curves())
def test_no_event_in(name: str) -> None:
    fit = DETECTOR.fit(SIXTY, exact_curves()[name])
    assert fit.outcome == "NO EVENT", steps_of(fit.events())
    assert fit.trend is not None
    assert np.all(np.isfinite(fit.trend.mean))


def test_a_spike_beside_a_jump_leaves_the_jump() -> None:
    y = 20 * logistic(X, 2.5, 0.1) + rng(13).standard_normal(len(X))
    y[[12, 50]] += (30, -25)
    fit = DETECTOR.fit(SIXTY, y)
    assert [event.kind for event in fit.events()] == ["jump"], steps_of(fit.events())
    assert any(f"{SIXTY[12]:g}, {SIXTY[50]:g}" in note for note in fit.notes), fit.notes


def test_two_checkpoints_are_a_spike_and_five_a_bump() -> None:
    steps = EVEN[:60]
    for run in (2, 7, 9, 10):
        y = rng(14, run).standard_normal(60)
        y[[37, 38]] += 6.2
        fit = DETECTOR.fit(steps, y)
        assert not fit.events(), steps_of(fit.events())
        assert any(f"{steps[37]:g}, {steps[38]:g}" in note for note in fit.notes), fit.notes
        y[[12, 13]] += 6.2
        fit = DETECTOR.fit(steps, y)
        assert not fit.events(), steps_of(fit.events())
    y[[39, 40, 41]] += 6.2
    (bump,) = DETECTOR.fit(steps, y).events()
    assert bump.kind == "bump"
    assert bump.interval[0] <= steps[39] <= bump.interval[1]


def test_p_values_cost_less_where_the_noise_is_white() -> None:
    """The least p-value that a test can show, times the price: 2.5 for correlated or few points, 1 for white noise."""
    generator, up = rng(15), 15.0 * (SIXTY > 300)
    white, walk = generator.standard_normal(len(X)), np.cumsum(generator.standard_normal(len(X)))
    series = (SIXTY, up + white), (SIXTY, 3 * up + walk), (SIXTY[::2], (2 * up + white)[::2])
    jumps = [DETECTOR.fit(steps, y).events()[0] for steps, y in series]
    assert [jump.kind for jump in jumps] == ["jump"] * 3
    assert [jump.p_value for jump in jumps] == pytest.approx([1e-4, 2.5e-4, 2.5e-4])


def test_standard_errors_that_do_not_tell_the_size_of_the_noise_are_found_out() -> None:
    said = "the noise changes size over training"
    ramp = np.geomspace(1, 30, len(X))
    y = rng(16).standard_normal(len(X)) * ramp
    for se, told in ((ramp, False), (ramp[::-1].copy(), True)):
        fit = DETECTOR.fit(SIXTY, y, se)
        assert any(said in note for note in fit.notes) == told, fit.notes


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


# rates; `benchmarks/detection.py` measures them at length


@pytest.mark.parametrize("null", ["power law", "AR .8", "random walk", "growing noise"])
def test_false_alarms(null: str) -> None:
    alarms = 0
    for run in range(10):
        generator = rng(run, 20)
        y = {
            "power law": lambda g: 30 * (1 + SIXTY / 10) ** -g.uniform(0.1, 1) + g.standard_normal(len(X)),
            "AR .8": lambda g: ar1(g, len(X), 0.8),
            "random walk": lambda g: np.cumsum(g.standard_normal(len(X))),
            "growing noise": lambda g: g.standard_normal(len(X)) * np.geomspace(1, 10, len(X)),
        }[null](generator)
        alarms += QUICK.fit(SIXTY, y).outcome == "EVENTS"
    assert alarms <= 2, alarms  # 5% over all kinds: more than 2 of 10 has probability .012


@pytest.mark.parametrize("width,snr", [(0.2, 10), (0.5, 100)])
def test_recall_and_coverage(width: float, snr: float) -> None:
    found = covered = sized = 0
    for run in range(8):
        centre = rng(run, 30).uniform(1.0, 3.3)
        y = snr * logistic(X, centre, width) + rng(run, 31).standard_normal(len(X))
        jumps = [event for event in QUICK.fit(SIXTY, y).events() if event.kind == "jump"]
        if len(jumps) == 1:
            found += 1
            covered += jumps[0].interval[0] <= 10**centre - 1 <= jumps[0].interval[1]
            sized += jumps[0].size_interval[0] <= snr <= jumps[0].size_interval[1]
    assert found >= 7, found
    assert covered >= 5, covered  # 90% intervals: fewer than 5 of 8 has probability .005
    assert sized >= 5, sized


# relations


def example(seed: int = 0) -> Array:
    return 10 * logistic(X, 2.4, 0.1) + rng(40, seed).standard_normal(len(X))


def test_units_do_not_matter() -> None:
    (a,), (b,) = DETECTOR.fit(SIXTY, example()).events(), DETECTOR.fit(SIXTY, 5e4 - 1000 * example()).events()
    assert a.p_value == b.p_value
    np.testing.assert_allclose(b.interval, a.interval, rtol=1e-6)
    assert b.size == pytest.approx(-1000 * a.size, rel=0.05)


def test_missing_points_are_dropped() -> None:
    y = example()
    y[[3, 30]] = np.nan
    kept = np.isfinite(y)
    assert DETECTOR.fit(SIXTY, y).events() == DETECTOR.fit(SIXTY[kept], y[kept]).events()


def test_alone_and_together_give_the_same_events() -> None:
    series = [Series(str(i), SIXTY, example(i) if i % 2 else rng(41, i).standard_normal(len(X))) for i in range(4)]
    together = detect(series)
    for one in series[::-1]:
        _shared.cache_clear()
        alone = detect(one)
        assert alone.fits[one.name].p_values == together.fits[one.name].p_values
        assert [replace(event, q_value=None) for event in alone.events] == [
            replace(event, q_value=None) for event in together.events if event.series == one.name
        ]
    assert {event.series for event in together.events} == {"1", "3"}
    assert together.family == 4  # one smallest p-value a series


def test_q_values_are_benjamini_hochberg() -> None:
    p = np.array([0.005, 0.005, 0.02, 0.3, 0.7, 1.0, 1.0])
    expected = stats.false_discovery_control(p)
    np.testing.assert_allclose([benjamini_hochberg(value, p) for value in p], expected)
    assert benjamini_hochberg(0.01, p) == pytest.approx(min(0.01 * 7 / 2, expected[2]))  # none of the family's
    assert benjamini_hochberg(0.002, np.array([0.001])) == pytest.approx(0.002)


def test_one_jump_stands_out_of_a_large_family() -> None:
    flat = [Series(f"flat {i}", SIXTY, np.full(len(X), 0.5)) for i in range(3)]
    noise = [Series(f"noise {i}", SIXTY, rng(42, i).standard_normal(len(X))) for i in range(6)]
    detection = detect([*flat, *noise, Series("rise", SIXTY, example())], Detector(n_null=59))
    (event,) = [event for event in detection.events if event.series == "rise"]
    assert event.q_value is not None
    assert event.q_value <= 0.02  # the tail of 59 nulls; their number alone allows no p below 1 / 60
    frame = detection.to_frame()
    assert set(frame["series"]) == {series.name for series in [*flat, *noise]} | {"rise"}
    stored = json.loads(detection.to_json())
    assert stored["family"] == detection.family
    assert stored["series"]["flat 0"]["outcome"] == "NO EVENT"
    assert stored["events"] == json.loads(json.dumps([e.to_dict() for e in detection.events]))


def test_posterior_agrees_with_the_interval() -> None:
    fit = DETECTOR.fit(SIXTY, example())
    (event,) = fit.events()
    steps, weights = fit.posterior(event)
    assert np.all(np.diff(steps) > 0)
    cumulative = np.cumsum(weights)
    assert cumulative[-1] == pytest.approx(1)
    inside = weights[(steps >= event.interval[0]) & (steps <= event.interval[1])].sum()
    assert inside == pytest.approx(0.9, abs=0.01)
    with pytest.raises(DataError, match="no jump at step 1"):
        fit.posterior(replace(event, step=1.0))


def test_lead_and_lag_of_two_normals() -> None:
    grid = np.linspace(-6, 6, 301)
    weights = np.exp(-(grid**2) / 2)
    a, b = (100 + 3 * grid, weights), (110 + 4 * grid, weights)
    lag = lead_lag(a, b)
    assert lag.lag == pytest.approx(10, abs=0.1)
    np.testing.assert_allclose(lag.interval, (10 - 1.645 * 5, 10 + 1.645 * 5), atol=0.2)
    assert lag.first == pytest.approx(stats.norm.cdf(2), abs=0.005)
    back = lead_lag(b, a)
    assert back.first == pytest.approx(1 - lag.first, abs=1e-6)
    assert lead_lag(a, a).first == pytest.approx(0.5)


def test_lead_and_lag_of_events() -> None:
    early = DETECTOR.fit(SIXTY, 30 * logistic(X, 2.0, 0.1) + rng(50).standard_normal(len(X)))
    late = DETECTOR.fit(SIXTY, 30 * logistic(X, 2.3, 0.1) + rng(51).standard_normal(len(X)))
    (a,), (b,) = early.events(), late.events()
    by_events, by_posteriors = lead_lag(a, b), lead_lag(early.posterior(a), late.posterior(b))
    assert by_events.first > 0.99
    assert by_events.interval[0] <= 10**2.3 - 10**2.0 <= by_events.interval[1]
    assert by_events.lag == pytest.approx(by_posteriors.lag, rel=0.03)


# input and outcomes


def test_an_unresolved_jump_names_the_steps_to_add() -> None:
    steps = np.arange(0.0, 2000, 100)
    (event,) = DETECTOR.fit(steps, np.where(steps > 950, 1, 0) + 0.01 * rng(60).standard_normal(20)).events()
    assert not event.resolved
    assert 900 <= event.interval[0] < event.interval[1] <= 1000
    added = [int(word) for word in event.note.split("steps ")[1].split(", ")]
    assert len(added) == 3
    assert all(900 < step < 1000 for step in added), event.note


def test_too_few_points_are_unresolved() -> None:
    fit = DETECTOR.fit(SIXTY, np.where(np.arange(len(X)) < 7, 1.0, np.nan))
    assert fit.outcome == "UNRESOLVED"
    assert "at least 8" in fit.notes[0]
    assert DETECTOR.fit([], []).outcome == "UNRESOLVED"


def test_all_rejected() -> None:
    assert DETECTOR.fit(SIXTY, np.full(len(X), np.nan)).outcome == "SAMPLER REJECTED"
    detection = detect(Series("llc", SIXTY, example(), rejected=np.full(len(X), True)))
    assert detection.fits["llc"].outcome == "SAMPLER REJECTED"
    assert detection.to_frame()["outcome"].tolist() == ["SAMPLER REJECTED"]


def test_rejected_points_are_not_used() -> None:
    y, bad = example(), np.isin(np.arange(len(X)), (5, 6, 7, 8))
    broken = np.where(bad, 1e6, y)
    (event,) = detect(Series("llc", SIXTY, broken, rejected=bad)).events
    assert event == replace(DETECTOR.fit(SIXTY[~bad], y[~bad], name="llc").events()[0], q_value=event.q_value)


def test_standard_errors_of_zero_are_raised() -> None:
    se = np.ones(len(X))
    se[10] = 0
    fit = DETECTOR.fit(SIXTY, example(), se)
    assert [event.kind for event in fit.events()] == ["jump"]
    assert any("1 standard errors raised to 0.1" in note for note in fit.notes), fit.notes
    assert any("every se is 0" in note for note in DETECTOR.fit(SIXTY, example(), 0 * se).notes)


def changed(array: Array, at: int, value: float) -> Array:
    result = array.copy()
    result[at] = value
    return result


@pytest.mark.parametrize(
    "steps,values,se,match",
    [
        (changed(SIXTY, 5, 0.5), X, None, "sorted"),
        (changed(SIXTY, 5, SIXTY[4]), X, None, "distinct"),
        (changed(SIXTY, 0, -1), X, None, "count from 0, got -1"),
        (SIXTY, changed(X, 3, np.inf), None, f"infinity at step {SIXTY[3]:g}"),
        (SIXTY, X[:-1], None, f"got {len(X)} and {len(X) - 1}"),
        (SIXTY, X, np.ones(3), f"got {len(X)} and 3"),
        (SIXTY, X, changed(np.ones(len(X)), 2, -0.1), f"at step {SIXTY[2]:g}"),
        (SIXTY, X[None], None, "one dimension"),
        (SIXTY, ["a"] * len(X), None, "must be numbers"),
    ],
)
def test_bad_input(steps: Any, values: Any, se: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        DETECTOR.fit(steps, values, se, name="score")


def test_bad_settings() -> None:
    for settings in ({"kinds": ("stage",)}, {"alpha": 0.0}, {"level": 1.5}, {"n_null": 9}):
        with pytest.raises(DataError):
            Detector(**settings)
    with pytest.raises(DataError, match="two series are named"):
        detect([Series("a", SIXTY, X), Series("a", SIXTY, X)])


def test_a_change_below_the_smallest_of_interest_is_noted_and_not_reported() -> None:
    steps = np.unique(np.geomspace(1, 2000, 60).astype(int))
    noise = 0.002 * np.random.default_rng(0).standard_normal(len(steps))
    values = 0.04 - 0.02 / (1 + np.exp(-(steps - 80) / 5)) + noise
    counted = detect(Series("score", steps, values, smallest=0.01))
    assert [round(event.size, 2) for event in counted.events] == [-0.02]
    left = detect(Series("score", steps, values, smallest=0.05))
    assert left.events == ()
    assert left.fits["score"].outcome == "NO EVENT"
    assert "smallest change of interest (0.05)" in left.fits["score"].notes[-1]
    assert left.family == counted.family  # the test was made, so it still counts among the others
