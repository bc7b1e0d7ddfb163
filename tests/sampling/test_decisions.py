"""The decisions of a calibration, on trials whose λ̂ is a formula of their point."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from devmon.errors import InstrumentError
from devmon.sampling import Settings
from devmon.sampling.choosing.decisions import length, localisation, measured_noise_bias, noise, step_size, variates
from devmon.sampling.choosing.plan import Plan
from devmon.sampling.choosing.spectrum import Spectrum
from devmon.sampling.choosing.trials import Point, Trial
from devmon.sampling.constants import FIRST_GAMMA, RATIO


class Formula:
    """Stands for `Trials`: λ̂ of a point is `value(point)`, its error `se`; every trial is recorded in `asked`."""

    def __init__(self, value, *, se=0.001, n=10_000, tolerance=0.02, longest=10, afford=10**9, paid=0.0, **result):
        self.value, self.se, self.result = value, se, result
        self.start, self.settings = Settings(batch_size=64, nbeta=1.0), Settings(draws=100, burn_in=100, nbeta=1.0)
        self.examples, self.models = SimpleNamespace(n=n), [None]
        self.tolerance, self.longest, self.most_steps_per_draw = tolerance, longest, longest
        self.afford, self.asked = afford, []
        self.paid = lambda control_variate: paid

    def affordable(self, *points, share=1.0):
        return share * self.afford > len(self.asked)

    def at(self, point):
        if point not in self.asked:
            self.asked.append(point)
        llc = self.value(point)
        healthy = {"temperature": 1.0, "temperature_se": 0.01, "anharmonicity": 1.0, "verdict": "ok"}
        values = {name: v(point) if callable(v) else v for name, v in (healthy | self.result).items()}
        excess = llc + self.se * np.random.default_rng(0).standard_normal((4, 200))
        traces = xr.Dataset({"loss": (("chain", "draw"), excess), "baseline": (("chain", "draw"), 0 * excess)})
        traces["linear"], traces["distance"] = 0 * traces["loss"], 1 + 0 * traces["loss"]
        traces["slope"] = 2 * values["anharmonicity"] * traces["loss"]
        attrs = {"nbeta": 1.0, "burn_in": 100, "shared_batches": 0, "kernel": "baoab", "parameters": 8}
        traces = traces.assign_attrs(attrs, lr=point.lr, gamma=point.gamma, steps_per_draw=1)
        return [Trial(traces, xr.Dataset({"llc": llc, "se": self.se * abs(llc)} | values))]


def world(curvatures, flat=0, **more):
    """Trials of a quadratic loss with these curvatures, and the plan that its spectrum makes."""
    scales = np.array([*curvatures, *[0.0] * flat], dtype=float)
    found = Spectrum(scales, np.ones(len(scales)), max(curvatures))
    trials = Formula(**({"value": lambda p: found.llc(p.gamma)} | more))
    return trials, Plan(trials, [found])


def test_points_that_rounding_tells_apart_are_one():
    assert Point(1e-3, 0.1, 1) == Point(1e-3, 0.3 / RATIO / RATIO / 0.3, 1)
    assert Point(1e-3, 0.1, 1) != Point(1e-3, 0.101, 1)


def test_the_step_size_is_the_largest_whose_bias_is_within_the_tolerance():
    """λ̂ = 4 (1 + 3 lr / top): of the steps √10 apart the first whose bias less the next one's is below 2%."""
    top = 1 / ((1 + FIRST_GAMMA) * 100)
    trials, plan = world([100.0], value=lambda p: 4 * (1 + 3 * p.lr / top), longest=1000)
    at, steady, reason = step_size(trials, plan, True)
    moves = [3 * (RATIO**-k - RATIO ** -(k + 1)) / (1 + 3 * RATIO ** -(k + 1)) for k in range(6)]
    expected = next(k for k, move in enumerate(moves) if move <= 0.02)
    assert expected == 5
    assert at.lr == pytest.approx(top * RATIO**-expected, rel=1e-5)
    assert steady
    assert "gives the λ̂ of a step three times smaller" in reason


def test_a_step_size_that_nothing_repeats_is_said_and_one_that_never_runs_is_an_error():
    trials, plan = world([100.0], value=lambda p: p.lr**0.5, longest=1000)
    at, steady, reason = step_size(trials, plan, True)
    assert not steady
    assert at.lr == pytest.approx(1 / (1 + FIRST_GAMMA) / 1e5, rel=1e-5)
    assert "no two step sizes agreed" in reason
    trials, plan = world([100.0], value=lambda p: p.lr**0.5, longest=1)
    assert step_size(trials, plan, True)[0].lr == pytest.approx(plan.top_lr, rel=1e-5)
    with pytest.raises(InstrumentError, match=r"down to 7.6e-06 ran healthily.*later checkpoint"):
        step_size(*world([100.0], verdict="diverged"), True)


def test_gamma_goes_where_the_spectrum_says_that_the_estimate_is_flat():
    """Ten directions of curvature 1 beside one of 100: two scales, which no comparison of neighbours survives."""
    trials, plan = world([100.0] + [1.0] * 10, flat=5, longest=100)
    lr, gamma = plan.best(0.01, 0.0)
    found = plan.spectra[0]
    assert found.llc(gamma) > 0.97 * found.llc() > found.llc(gamma * 3)
    local, reason = localisation(trials, plan, Point(lr, 10.0, 1), gamma)
    assert local.at.gamma == pytest.approx(gamma, rel=1e-5)
    assert local.flat
    assert local.missing < 0.03
    assert local.fits[0].limit == pytest.approx(found.llc(), rel=0.01)
    assert "λ̂ is flat there" in reason
    moves = [a.gamma / b.gamma for a, b in zip(trials.asked, trials.asked[1:], strict=False)]
    assert max(moves) <= 10.001


def test_curvatures_that_no_allowed_chain_follows_make_the_estimate_a_lower_bound():
    """A false plateau: from 1e8 · .1 down, five decades of gamma show λ̂ = ½, and the spectrum has nine more."""
    trials, plan = world([1e8] + [1.0] * 9, longest=10)
    lr, gamma = plan.best(plan.top_lr, 0.0)
    local, reason = localisation(trials, plan, Point(lr, 1e7, 1), gamma)
    assert not local.flat
    assert local.missing > 0.5
    assert "lower bound" in reason


def test_growth_that_the_hessian_does_not_know_is_followed_and_then_is_no_plateau():
    """λ̂ ∝ gamma^−.2 where the spectrum says flat: the search goes on until the chains leave the basin."""
    trials, plan = world(
        [100.0], value=lambda p: 4 * p.gamma**-0.2, anharmonicity=lambda p: 1.0 if p.gamma > 0.09 else 0.5, longest=1000
    )
    local, reason = localisation(trials, plan, Point(0.01, 10.0, 1), 1.0)
    assert local.moving
    assert not local.flat
    assert 0.09 < local.at.gamma < 0.3
    assert "leave the basin" in reason
    assert local.fits[0].slope == pytest.approx(-0.2, abs=0.1)


@pytest.mark.parametrize("error, least, most", [(0.01, 9.0, 15.0), (0.35, 0.99, 1.01)])
def test_a_temperature_counts_within_its_error(error, least, most):
    """.7 ± .01 has not filled the flat directions; .7 ± .35 may have."""
    trials, plan = world([100.0], temperature=lambda p: 1.0 if p.gamma > 9 else 0.7, temperature_se=error, longest=1000)
    local, _ = localisation(trials, plan, Point(0.01, 10.0, 1), 1.0)
    assert least < local.at.gamma < most


def test_chains_that_leave_at_the_first_gamma_are_held_nearer_and_it_is_said():
    trials, plan = world([100.0], anharmonicity=0.2)
    local, reason = localisation(trials, plan, Point(0.01, 10.0, 1), 1.0)
    assert (local.at.gamma, local.flat, local.fits) == (100.0, False, ())
    assert "holds the chains near" in reason


def test_trials_end_with_the_budget():
    trials, plan = world([100.0] + [1.0] * 10, longest=100, afford=1)
    local, reason = localisation(trials, plan, Point(0.01, 10.0, 1), 0.01)
    assert len(trials.asked) == 1
    assert "budget ends" in reason
    assert not local.flat
    assert local.at.gamma == pytest.approx(FIRST_GAMMA * 100, rel=1e-5)


def test_the_bias_of_minibatch_noise_is_read_off_two_batch_sizes():
    """λ̂ = 4 (1 + 0.3 (1/B − 1/n)/(1/64 − 1/n)): the bias at B = 64 is 0.3, whatever the larger batch is."""
    for n in (100, 10_000):
        formula = Formula(lambda p, n=n: 4 + 1.2 * (1 / (p.batch_size or 64) - 1 / n) / (1 / 64 - 1 / n), n=n)
        larger = formula.value(Point(1e-3, 1.0, 1, batch_size=min(128, n)))
        assert measured_noise_bias(formula, Point(1e-3, 1.0, 1)) == pytest.approx(1.2 / larger)
    assert measured_noise_bias(Formula(lambda p: 4.0, n=64), Point(1e-3, 1.0, 1)) == 0.0


def test_lr_is_lowered_for_the_noise_bias_but_not_so_far_that_more_is_lost_to_slow_directions():
    """A bias proportional to lr and to 1 / B, 20% at B = 64 and the first lr."""

    def noisy(p):
        return 4 * (1 + 0.2 * p.lr / 1e-2 * 64 / (p.batch_size or 64))

    trials, plan = world([100.0] * 8, value=noisy, se=1e-5, n=10**9, longest=100)
    at, _, bias, reason = noise(trials, plan, Point(1e-2, 10.0, 1))
    assert bias <= 0.02
    assert at.lr == pytest.approx(1e-2 * bias / (2 * 0.1 / 1.1), rel=1e-4)
    assert f"at the lowered lr {at.lr:.3g}" in reason
    trials, plan = world([100.0] * 4 + [0.03] * 4, value=noisy, se=1e-5, n=10**9, longest=100)
    slow, _, more, _ = noise(trials, plan, Point(1e-2, 10.0, 1))
    assert slow.lr > 2 * at.lr
    assert more > 2 * bias
    trials, plan = world([100.0] * 8, se=1e-6)
    still, _, none, reason = noise(trials, plan, Point(plan.top_lr, 10.0, 1))
    assert still.lr == pytest.approx(plan.top_lr, rel=1e-5)
    assert none < 1e-3
    assert "lowered" not in reason


def test_without_room_for_larger_batches_the_bias_is_what_the_temperature_exceeds_one_by():
    assert measured_noise_bias(Formula(lambda p: 4.0, afford=0, temperature=1.3), Point(1e-3, 1.0, 1)) == pytest.approx(
        0.3
    )
    assert measured_noise_bias(Formula(lambda p: 4.0, afford=0), Point(1e-3, 1.0, 1)) == pytest.approx(0.005)


def test_control_variates_pay_where_label_noise_would_bias_or_drown():
    """Ten directions of curvature 100, so λ̂ is near 5: a trace of 8 lr · bias, or a score as noisy as λ̂'s own draws."""
    trials, plan = world([100.0] * 10, longest=100)
    bias = 0.01 * 5 * 8 / (2 * plan.pace * plan.top_lr)
    for share, pays in ((0.5, False), (2.0, True)):
        assert variates(trials, plan, [share * bias])[0] == pays
    # Flat directions reach 1 / gamma each: the bias is small there, but the score is drowned.
    trials, plan = world([100.0] * 10, flat=990, longest=100, tolerance=10.0)
    _, gamma = plan.best(plan.top_lr, 0.0)
    for share, pays in ((0.5, False), (2.0, True)):
        assert variates(trials, plan, [share * 5 * gamma])[0] == pays
    assert "do not pay" in variates(trials, plan, [0.0])[1]


@pytest.mark.parametrize(
    "se, paid, steps", [(0.04, 0, 2), (0.4, 0, 10), (0.001, 0, 1), (math.nan, 0, 10), (0.001, 6.5, 7)]
)
def test_the_length_brings_the_error_to_the_tolerance_within_the_steps_allowed(se, paid, steps):
    """From 4 · 100 draws with error se to 4 · 200 draws of k steps with se √(400 / 800 k): 2% from 4% at k = 2; and no
    shorter than a third of what the calibration cost."""
    formula = Formula(lambda p: 4.0, se=se, paid=paid)
    assert length(formula, Point(1e-3, 1.0, 1))[0] == steps
    if math.isfinite(se):
        assert "did not settle" not in length(formula, Point(1e-3, 1.0, 1))[1]
    assert "did not settle" in length(Formula(lambda p: 4.0, temperature=0.5), Point(1e-3, 1.0, 1))[1]
