"""Curves of which anyone sees what they have: events are those that a reader names, and no more."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.interpolate import PchipInterpolator
from scipy.special import erf

from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.events import Event
from devmon.analysis.series import Array

DETECTOR = Detector()
LOG = np.unique(np.append(0, np.round(np.geomspace(1, 20_000, 80))))
EVEN = np.arange(100.0, 5001, 100)
ACCURACY = np.array([
    0.0119, 0.0070, 0.0078, 0.0090, 0.0222, 0.0681, 0.1793, 0.2790, 0.3726, 0.4817, 0.6451, 0.8174, 0.9192, 0.9705,
    0.9897, 0.9967, 0.9992, 0.9787, *[1.0] * 32,
])  # fmt: skip
CHECKPOINTS = np.array([0, *2 ** np.arange(10), 1000, 3000, *range(13_000, 144_000, 10_000)], dtype=float)
RISE_FROM_ZERO = np.array([0.0] * 11 + [
    0.091, 0.306, 0.446, 0.475, 0.487, 0.512, 0.519, 0.542, 0.545, 0.544, 0.549, 0.555, 0.562, 0.569, 0.574, 0.562,
])  # fmt: skip


def noise(seed: int, n: int, sd: float) -> Array:
    return sd * np.random.default_rng([21, seed]).standard_normal(n)


def events_of(steps: Array, values: Array, **given: Array) -> list[Event]:
    return DETECTOR.fit(steps, values, **given).events()


def told(events: list[Event]) -> str:
    return "; ".join(f"{e.word} {e.step:.0f} {e.interval} size {e.size:.3g} p {e.p_value:.2g}" for e in events)


@pytest.mark.parametrize("sd", [0.0, 0.003, 0.01, 0.02])
def test_an_accuracy_that_rises_to_one_is_one_abrupt_rise(sd: float) -> None:
    events = events_of(EVEN, ACCURACY + noise(1, 50, sd))
    assert [event.kind for event in events] == ["jump"], told(events)
    assert 900 <= events[0].step <= 1200, told(events)
    assert events[0].abrupt
    assert events[0].word == "jump"
    assert events[0].size == pytest.approx(0.99, abs=0.06)


@pytest.mark.parametrize("steps", [EVEN, np.arange(0.0, 5001, 50), np.unique(np.round(np.geomspace(10, 20_000, 60)))])
@pytest.mark.parametrize("sd", [0.0, 0.001, 0.02])
def test_a_ramp_between_two_levels_is_one_rise(steps: Array, sd: float) -> None:
    events = events_of(steps, np.clip((steps - 500) / 1000, 0, 1) + noise(2, len(steps), sd))
    assert [event.kind for event in events] == ["jump"], told(events)
    assert 700 <= events[0].step <= 1500, told(events)


SATURATING = {
    "exponential": 1 - np.exp(-LOG / 300),
    "exponential after a delay": 1 - np.exp(-np.maximum(LOG - 300, 0) / 300),
    "tanh": np.tanh(LOG / 500),
    "Hill 2": LOG**2 / (LOG**2 + 500.0**2),
    "Hill 4": LOG**4 / (LOG**4 + 500.0**4),
    "erf": (1 + erf((np.log10(LOG + 1) - 2.7) / 0.3)) / 2,
    "Gompertz": np.exp(-np.exp(-(LOG - 500) / 150)),
}


@pytest.mark.parametrize("name", SATURATING)
@pytest.mark.parametrize("sd", [0.0, 0.01])
def test_a_saturating_rise_of_any_shape_is_one_rise(name: str, sd: float) -> None:
    for sign in (1, -1):
        events = events_of(LOG, sign * SATURATING[name] + noise(3, len(LOG), sd))
        assert [(event.kind, np.sign(event.size)) for event in events] == [("jump", sign)], told(events)


@pytest.mark.parametrize("seed", range(3))
def test_a_stair_of_few_points_is_its_rises(seed: int) -> None:
    level = np.repeat([8.0, 11.0, 12.0, 16.0, 20.0], [9, 1, 4, 4, 4])
    steps = np.round(np.geomspace(10, 2000, 22))
    events = events_of(steps, level + noise(seed, 22, 0.1))
    assert [event.kind for event in events if event.kind == "jump"] == ["jump"] * 3, told(events)
    assert {event.kind for event in events} <= {"jump", "plateau"}, told(events)


@pytest.mark.parametrize("seed", range(4))
def test_a_power_law_of_thousands_of_steps_has_no_event(seed: int) -> None:
    steps = np.arange(1.0, 4579)
    events = events_of(steps, 3.2 + 8 / np.sqrt(steps) + noise(seed, len(steps), 0.1))
    assert events == [], told(events)


def test_single_spikes_of_a_training_log_are_named_at_their_steps() -> None:
    steps = np.arange(1.0, 4579)
    values = 3.2 + 8 / np.sqrt(steps) + noise(9, len(steps), 0.1)
    values[[918, 946]] = 5.2
    fit = DETECTOR.fit(steps, values)
    assert fit.events() == []
    assert "left out as isolated spikes: steps 919, 947" in fit.notes, fit.notes


@pytest.mark.parametrize("centre", [6, 30])
def test_what_early_rows_show_later_rows_do_not_undo(centre: int) -> None:
    steps = np.arange(1.0, 20_001)
    values = 1 / (1 + np.exp(-(steps - centre) / (0.1 * centre))) + noise(4, len(steps), 0.01)
    for rows in (200, 2000, 20_000):
        rises = [event for event in events_of(steps[:rows], values[:rows]) if event.kind == "jump"]
        assert len(rises) == 1, (rows, told(rises))
        assert 0.85 * centre <= rises[0].step <= 1.15 * centre, (rows, told(rises))


def test_a_rise_out_of_zeros_is_a_rise_and_no_spike() -> None:
    fit = DETECTOR.fit(CHECKPOINTS, RISE_FROM_ZERO)
    assert [event.kind for event in fit.events()] == ["jump"], told(fit.events())
    assert 700 <= fit.events()[0].step <= 3500
    assert not any("spike" in note for note in fit.notes)


def test_the_first_value_of_a_falling_loss_is_no_spike() -> None:
    steps = np.append(0, 2.0 ** np.arange(15))
    fit = DETECTOR.fit(steps, [10.83, 10.82, 10.8, 10.6, 10.2, 9.6, 8.8, 7.5, 6.4, 5.6, 4.9, 4.3, 3.9, 3.6, 3.45, 3.35])
    assert not any("spike" in note for note in fit.notes), fit.notes
    assert {event.word for event in fit.events()} <= {"fall"}


@pytest.mark.parametrize("steps", [np.arange(1.0, 9), 2.0 ** np.arange(8)])
def test_eight_points_of_two_levels_are_one_unresolved_rise(steps: Array) -> None:
    (event,) = events_of(steps, np.repeat([0.0, 1.0], 4))
    assert (event.kind, event.resolved) == ("jump", False)
    assert steps[3] <= event.interval[0] <= event.interval[1] <= steps[4], event


@pytest.mark.parametrize("sd", [0.001, 0.01, 0.05])
@pytest.mark.parametrize("points", [27, 80])
def test_the_band_holds_the_points_and_ends_with_the_data(sd: float, points: int) -> None:
    steps = np.unique(np.round(np.geomspace(1, 20_000, points)))
    values = 1 / (1 + np.exp(-(np.log10(steps) - 2) * 6)) + noise(5, len(steps), sd)
    trend = DETECTOR.fit(steps, values).trend
    assert trend is not None
    held = np.mean((values >= trend.low) & (values <= trend.high))
    assert held >= 0.8, held
    assert (trend.steps[0], trend.steps[-1]) == (pytest.approx(steps[0]), pytest.approx(steps[-1]))
    assert trend.mean[-1] == pytest.approx(1, abs=0.01 + 2 * sd)


def test_a_late_decline_makes_a_maximum() -> None:
    values = np.array([
        0.178, 0.247, 0.261, 0.245, 0.257, 0.246, 0.242, 0.257, 0.207, 0.230, 0.195, 0.190, 0.185, 0.160, 0.192,
    ])  # fmt: skip
    events = events_of(3000 + 10_000 * np.arange(15.0), values, se=np.full(15, 0.006))
    (top,) = [event for event in events if event.kind == "turn" and event.size > 0]
    assert 13_000 <= top.step <= 73_000, told(events)


@pytest.mark.parametrize("given", ["se", "replicates"])
def test_a_point_many_errors_above_its_neighbours_is_an_unresolved_event_where_errors_are_measured(given: str) -> None:
    steps = np.array([10, 20, 41, 80, 133, 200, 330, 595, 759, 967, 1300, 1800, 2500, 4000.0])
    values = np.array([20, 22, 25, 30, 38, 45, 55, 61, 94, 61, 60, 61, 60, 62.0])
    if given == "se":
        fit = DETECTOR.fit(steps, values, se=np.full(14, 3.0))
    else:
        rng = np.random.default_rng(6)
        spread = 9 * rng.standard_normal((8, 14)) + 40 * rng.standard_normal((8, 1))
        fit = DETECTOR.fit(steps, values, replicates=values + spread - spread.mean(0))
        assert fit.noise is not None
        assert fit.noise.source == "replicates"
    assert not any("spike" in note for note in fit.notes)
    (top,) = [event for event in fit.events() if event.kind in ("turn", "bump") and event.size > 0]
    assert 595 <= top.interval[0] <= 759 <= top.interval[1] <= 967, told(fit.events())
    assert not top.resolved


def test_levels_common_to_all_steps_of_a_replicate_do_not_hide_a_rise() -> None:
    rng = np.random.default_rng(7)
    curve = 1 / (1 + np.exp(-(np.log10(LOG + 1) - 2) * 8))
    groups = curve + 5 * rng.standard_normal((8, 1)) + 0.1 * rng.standard_normal((8, len(LOG)))
    (event,) = events_of(LOG, groups.mean(0), replicates=groups)
    assert event.kind == "jump"
    assert event.interval[0] <= 99 <= event.interval[1]


CLOSED = {  # what a reader names, in order, with the true steps
    "straight": (lambda x: 3 * x - 7, []),
    "power law": (lambda x: (1 + 10**x / 10) ** -0.5, []),
    "parabola": (lambda x: -((x - 2) ** 2), [("maximum", 99)]),
    "valley": (lambda x: (x - 2) ** 2, [("minimum", 99)]),
    "logistic": (lambda x: 1 / (1 + np.exp(-(x - 2) * 8)), [("rise", 99)]),
    "two rises": (
        lambda x: 1 / (1 + np.exp(-(x - 1.2) * 15)) + 1 / (1 + np.exp(-(x - 3) * 15)),
        [("rise", 10**1.2 - 1), ("plateau", 10**2.1 - 1), ("rise", 999)],
    ),
    "a shoulder": (lambda x: (x - 2) ** 3 + 0.3 * (x - 2), [("plateau", 99)]),
}


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_have_the_events_that_a_reader_names(name: str) -> None:
    form, expected = CLOSED[name]
    events = events_of(LOG, form(np.log10(LOG + 1)))
    words = ["rise" if event.kind == "jump" and event.size > 0 else event.word for event in events]
    assert words == [word for word, _ in expected], told(events)
    for event, (_, step) in zip(events, expected, strict=True):
        assert abs(np.log10((event.step + 1) / (step + 1))) < 0.1, told(events)


def steps_every(gap: float, last: float) -> Array:
    return np.arange(0.0, last + 1, gap)


@pytest.mark.parametrize("seed", range(3))
def test_a_saturated_accuracy_tells_nothing_of_the_correlation_of_its_noise(seed: int) -> None:
    # sparse parity: at chance with its noise, two steps, then exactly 1 for most of the run
    steps = steps_every(50, 12_000)
    values = np.select([steps < 1000, steps < 1050, steps < 1350], [0.5, 0.7, 0.875], 1.0)
    events = events_of(steps, np.where(values < 1, values + noise(seed, len(steps), 0.005), 1.0))
    assert [event.kind for event in events] == ["jump", "plateau", "jump"], told(events)
    assert 950 <= events[0].step <= 1100, told(events)
    assert 1300 <= events[2].step <= 1400, told(events)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_fall_is_no_flank_of_the_last_wiggle_before_it(sign: int) -> None:
    # in-context regression: no learning, up by 3% and most of it down, then all at once an exponential fall
    steps = np.unique(np.append(0, np.round(np.geomspace(1, 9000, 120))))
    drift = np.interp(np.log10(steps + 1), [0, 2.72, 2.84, 4], [1, 1.03, 1.01, 1])
    fall = np.exp(-np.maximum(steps - 700, 0) / 700)
    events = events_of(steps, sign * drift * fall + noise(4, len(steps), 0.001))
    assert [event.kind for event in events] == ["turn", "jump"], told(events)
    assert 700 <= events[1].step <= 1000, told(events)
    assert sign * events[1].size == pytest.approx(-1.02, abs=0.03), told(events)


def test_the_lowest_place_of_a_curve_is_no_foot_of_the_bump_before_it() -> None:
    # a weight norm: a bump of 2, beyond it down by 1.5 more to the minimum of all, and up by 8
    x = np.array([0.0, 0.8, 1.0, 1.25, 2.3])
    y = np.array([5.0, 5.0, 7.0, 3.5, 11.5])
    fine = np.linspace(0, 2.3, 116)
    events = events_of(np.round(100 * 10**fine), PchipInterpolator(x, y)(fine))
    assert [event.kind for event in events if event.kind == "bump"] == ["bump"], told(events)
    lows = [event.step for event in events if event.word == "minimum"]
    assert lows == [pytest.approx(100 * 10**1.25, rel=0.05)], told(events)


@pytest.mark.parametrize("where", [510.0, 1010.0, 1950.0])
def test_late_checkpoints_of_even_step_place_a_fall_between_them(where: float) -> None:
    # a task forgotten within two checkpoints, at a step where these are closer in log step than the grid of the curve
    steps = steps_every(20, 4000)
    values = np.interp(steps, [where - 10, where + 10, where + 30], [0.95, 0.72, 0.0]) + 0.01 * np.sin(steps)
    events = [event for event in events_of(steps, values) if event.kind == "jump"]
    assert len(events) == 1, told(events)
    assert where - 10 <= events[0].step <= where + 30, told(events)
    assert events[0].interval[0] >= where - 15, told(events)
    assert events[0].interval[1] <= where + 35, told(events)
