"""The four decisions of a calibration, on trials whose λ̂ is a formula of their point."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from devmon.errors import InstrumentError
from devmon.sampling import Settings
from devmon.sampling.constants import RATIO
from devmon.sampling.decisions import length, localisation, measured_noise_bias, noise, step_size
from devmon.sampling.trials import Point, Trial


class Formula:
    """Stands for `Trials`: λ̂ of a point is `value(point)`, its error `se`; every trial is recorded in `asked`."""

    def __init__(self, value, *, se=0.001, n=10_000, tolerance=0.02, max_steps=3000, **result):
        self.value, self.se, self.result = value, se, result
        self.start, self.settings = Settings(batch_size=64), Settings(draws=100, burn_in=100, nbeta=1.0)
        self.examples = SimpleNamespace(n=n)
        self.tolerance, self.max_steps, self.most_steps_per_draw = tolerance, max_steps, 10
        self.asked = []

    def at(self, point):
        self.asked.append(point)
        llc = self.value(point)
        healthy = {"temperature": 1.0, "anharmonicity": 1.0, "verdict": "ok"}
        values = {name: v(point) if callable(v) else v for name, v in (healthy | self.result).items()}
        excess = llc + self.se * np.random.default_rng(0).standard_normal((4, 200))
        traces = xr.Dataset({"loss": (("chain", "draw"), excess), "baseline": (("chain", "draw"), 0 * excess)})
        traces["linear"], traces["distance"] = 0 * traces["loss"], 1 + 0 * traces["loss"]
        attrs = {"nbeta": 1.0, "burn_in": 100, "shared_batches": 0, "kernel": "baoab", "parameters": 8}
        traces = traces.assign_attrs(attrs, lr=point.lr, gamma=point.gamma)
        return [Trial(traces, xr.Dataset({"llc": llc, "se": self.se * abs(llc)} | values))]


def test_the_step_size_is_the_largest_whose_bias_is_within_the_tolerance():
    """λ̂ = 4 (1 + 3 lr / top): of the steps √10 apart the first whose bias less the next one's is below 2%."""
    curvature = 100.0
    top = 1 / (1.1 * curvature)
    choice, reason = step_size(Formula(lambda p: 4 * (1 + 3 * p.lr / top)), curvature)
    moves = [3 * (RATIO**-k - RATIO ** -(k + 1)) / (1 + 3 * RATIO ** -(k + 1)) for k in range(6)]
    expected = next(k for k, move in enumerate(moves) if move <= 0.02)
    assert expected == 5
    assert choice.at.lr == pytest.approx(top * RATIO**-expected)
    assert choice.flat
    assert "gives the λ̂ of a step three times smaller" in reason


def test_a_step_size_that_nothing_repeats_is_said_and_one_that_never_runs_is_an_error():
    choice, reason = step_size(Formula(lambda p: p.lr**0.5), 100.0)
    assert not choice.flat
    assert choice.at.lr == pytest.approx(1 / 110 / 1e3)
    assert "no two step sizes agreed" in reason
    with pytest.raises(InstrumentError, match=r"down to 9.1e-06 ran healthily \(diverged\).*later checkpoint"):
        step_size(Formula(lambda p: 4.0, verdict="diverged"), 100.0)


def test_gamma_lies_on_the_plateau_where_there_is_one():
    """λ̂ = 4 / (1 + gamma / 100): with curvature 100 the moves are 20%, 9%, 3%, 1%: the fourth is the plateau."""
    choice, reason = localisation(Formula(lambda p: 4 / (1 + p.gamma / 100)), Point(1e-3, 10.0, 1), 100.0)
    values = [1 / (1 + RATIO**-k) for k in range(1, 8)]
    moves = [abs(a - b) / b for a, b in zip(values, values[1:], strict=False)]
    first = next(k for k, move in enumerate(moves) if move <= 0.02)
    assert choice.at.gamma == pytest.approx(100 * RATIO ** -(first + 2))
    assert choice.flat
    assert choice.error == pytest.approx(moves[first] / (RATIO - 1), rel=1e-6)
    assert "lies on a plateau" in reason


def test_where_the_estimate_moves_with_every_gamma_the_least_move_is_taken_and_no_plateau_claimed():
    formula = Formula(lambda p: 4 * p.gamma**-0.2, anharmonicity=lambda p: 1.0 if p.gamma > 0.9 else 0.5)
    choice, reason = localisation(formula, Point(1e-3, 10.0, 1), 100.0)
    assert not choice.flat
    assert choice.error == pytest.approx((1 - RATIO**-0.2) / (RATIO - 1), rel=1e-6)
    assert "no plateau" in reason
    assert min(point.gamma for point in formula.asked) > 0.3  # where the chains leave the basin the search ends


def test_noise_that_inflates_the_temperature_lowers_lr_and_the_last_gamma_follows():
    """The temperature rises with lr once gamma is small; λ̂ with it."""

    def inflated(p):
        return p.lr / 1e-3 if p.gamma < 20 else 0.0

    formula = Formula(lambda p: 4 + 2 * inflated(p), temperature=lambda p: 1 + 0.1 * inflated(p))
    choice, reason = localisation(formula, Point(1e-3, 10.0, 1), 100.0)
    assert choice.at.lr < 1e-3
    assert f"lr is reduced to {choice.at.lr:.3g}, for the bias of minibatch noise" in reason
    lowered = {point.lr for point in formula.asked if point.gamma == pytest.approx(100 / RATIO)}
    assert choice.at.lr in lowered


def test_the_bias_of_minibatch_noise_is_read_off_two_batch_sizes():
    """λ̂ = 4 (1 + 0.3 (1/B − 1/n)/(1/64 − 1/n)): the bias at B = 64 is 0.3, whatever the larger batch is."""
    for n in (100, 10_000):
        formula = Formula(lambda p, n=n: 4 + 1.2 * (1 / (p.batch_size or 64) - 1 / n) / (1 / 64 - 1 / n), n=n)
        larger = formula.value(Point(1e-3, 1.0, 1, batch_size=min(128, n)))
        assert measured_noise_bias(formula, Point(1e-3, 1.0, 1)) == pytest.approx(1.2 / larger)
    assert measured_noise_bias(Formula(lambda p: 4.0, n=64), Point(1e-3, 1.0, 1)) == 0.0


def test_lr_is_lowered_until_the_noise_bias_is_half_the_tolerance_and_not_where_there_is_none():
    """A bias proportional to lr and to 1 / B, 20% at B = 64: half of 2% is a twentieth of the step."""
    formula = Formula(lambda p: 4 * (1 + 0.2 * p.lr / 1e-3 * 64 / (p.batch_size or 64)), se=1e-5, n=10**9)
    choice, reason = noise(formula, Point(1e-3, 1.0, 1))
    bias = 2 * 0.1 / 1.1  # measured against the larger batch
    assert choice.at.lr == pytest.approx(1e-3 * 0.01 / bias, rel=1e-4)
    assert choice.error == pytest.approx(0.01, rel=1e-4)
    assert "is lowered to" in reason
    assert "do not pay" in reason
    still, reason = noise(Formula(lambda p: 4.0), Point(1e-3, 1.0, 1))
    assert (still.at.lr, still.error, still.at.control_variate) == (1e-3, 0.0, False)
    assert "lowered" not in reason


@pytest.mark.parametrize("se, steps", [(0.04, 2), (0.4, 10), (0.001, 1), (math.nan, 10)])
def test_the_length_brings_the_error_to_the_tolerance_within_the_steps_allowed(se, steps):
    """From 4 · 100 draws with error se to 4 · 200 draws of k steps with se √(400 / 800 k): 2% from 4% at k = 2."""
    formula = Formula(lambda p: 4.0, se=se)
    assert length(formula, Point(1e-3, 1.0, 1))[0] == steps
    assert "did not settle" not in length(formula, Point(1e-3, 1.0, 1))[1]
    assert "did not settle" in length(Formula(lambda p: 4.0, temperature=0.5), Point(1e-3, 1.0, 1))[1]
