"""The detector on series of known truth: known curves, false alarms, recall and coverage, relations, input."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.events import Event
from devmon.analysis.detection.search import benjamini_hochberg, detect
from devmon.analysis.detection.windows import windows_of
from devmon.analysis.series import Array, Series
from devmon.analysis.transitions.order import lead_lag
from devmon.errors import DataError
from devmon.watch import log_spaced

DETECTOR = Detector()
QUICK = Detector(n_null=99)
STEPS = np.array([step for step in range(2001) if step in log_spaced(100, 2000)], dtype=float)
SIXTY = np.unique(np.append(0, np.round(np.geomspace(1, 20_000, 66))))
X = np.log10(SIXTY + 1)
EVEN = np.round(np.linspace(0, 20_000, 100))


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


# known curves


@pytest.mark.parametrize("noise", ["even", "uneven, known"])
def test_a_score_that_rises_like_induction_is_one_jump(noise: str) -> None:
    # half way at 650, ten to ninety per cent between 500 and 800; in log step it is steepest a little later
    rise = 1 / (1 + np.exp(-(STEPS - 650) * 2 * np.log(9) / 300))
    sd = np.full(len(STEPS), 0.01) if noise == "even" else np.where(rise < 0.5, 0.002, 0.03)
    y = 0.02 + 0.74 * rise + sd * rng(6).standard_normal(len(STEPS))
    events = DETECTOR.fit(STEPS, y, sd if "known" in noise else None).events()
    assert [event.kind for event in events] == ["jump"], steps_of(events)
    (event,) = events
    every = np.arange(1.0, 2001)
    fine = 1 / (1 + np.exp(-(every - 650) * 2 * np.log(9) / 300))
    steepest = every[np.argmax(np.gradient(fine, np.log(every)))]
    assert event.interval[0] <= steepest, event
    assert event.interval[1] >= 650, event
    assert abs(event.step - steepest) < 15, event
    assert event.interval[1] - event.interval[0] < 60
    assert event.size_interval[0] <= 0.74 <= event.size_interval[1], event
    assert event.width == pytest.approx(np.log10(800 / 500), rel=0.25)
    assert event.span == (pytest.approx(500, rel=0.1), pytest.approx(800, rel=0.1))
    assert event.resolved
    assert event.note == ""
    assert event.p_value < 1 / 200


def test_a_smooth_maximum_is_located() -> None:
    hits = 0
    for run in range(8):
        centre = rng(run, 1).uniform(1.5, 2.8)
        y = 20 * np.exp(-0.5 * ((X - centre) / 0.5) ** 2) + rng(run, 2).standard_normal(len(X))
        (event,) = [event for event in QUICK.fit(SIXTY, y).events() if event.kind == "turn" and event.size > 0]
        hits += event.interval[0] <= 10**centre - 1 <= event.interval[1]
    assert hits >= 5, hits  # 90% intervals: fewer than 5 of 8 has probability .005


def test_a_staircase_is_three_rises_and_the_rests_between_them() -> None:
    y = sum(20 * logistic(X, c, 0.3) for c in (1.2, 2.2, 3.2)) + rng(8).standard_normal(len(X))
    events = DETECTOR.fit(SIXTY, y).events()
    assert [event.kind for event in events] == ["jump", "plateau"] * 2 + ["jump"], steps_of(events)
    for event, centre in zip(events, (1.2, 1.7, 2.2, 2.7, 3.2), strict=True):
        if event.kind == "jump":
            assert abs(np.log10(event.step + 1) - centre) < 0.06, event
        else:  # it rests for half a decade
            assert abs(np.log10(event.step + 1) - centre) < 0.3, event


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
    }


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


# rates; `benchmarks/detection.py` measures them at length


@pytest.mark.parametrize("null", ["power law", "AR .5", "random walk", "growing noise"])
def test_false_alarms(null: str) -> None:
    alarms = 0
    for run in range(10):
        generator = rng(run, 20)
        y = {
            "power law": lambda g: 30 * (1 + SIXTY / 10) ** -g.uniform(0.1, 1) + g.standard_normal(len(X)),
            "AR .5": lambda g: ar1(g, len(X), 0.5),
            "random walk": lambda g: np.cumsum(g.standard_normal(len(X))),
            "growing noise": lambda g: g.standard_normal(len(X)) * np.geomspace(1, 10, len(X)),
        }[null](generator)
        found = QUICK.fit(SIXTY, y).events()
        alarms += any(event.abrupt for event in found) if null == "random walk" else bool(found)
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
    (a,), (b,) = DETECTOR.fit(SIXTY, example()).events(), DETECTOR.fit(SIXTY, 5e4 + 1000 * example()).events()
    assert b.p_value == pytest.approx(a.p_value)
    np.testing.assert_allclose(b.interval, a.interval, rtol=1e-6)
    assert b.size == pytest.approx(1000 * a.size)
    (c,) = DETECTOR.fit(SIXTY, -example()).events()  # its draws are others
    np.testing.assert_allclose(c.interval, a.interval, rtol=0.05)
    assert c.size == pytest.approx(-a.size)


def test_missing_points_are_dropped() -> None:
    y = example()
    y[[3, 30]] = np.nan
    kept = np.isfinite(y)
    assert DETECTOR.fit(SIXTY, y).events() == DETECTOR.fit(SIXTY[kept], y[kept]).events()


def test_alone_and_together_give_the_same_events() -> None:
    series = [Series(str(i), SIXTY, example(i) if i % 2 else rng(41, i).standard_normal(len(X))) for i in range(4)]
    together = detect(series)
    for one in series[::-1]:
        windows_of.cache_clear()
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


def test_a_change_below_the_smallest_of_interest_is_not_reported() -> None:
    steps = np.unique(np.geomspace(1, 2000, 60).astype(int))
    noise = 0.002 * np.random.default_rng(0).standard_normal(len(steps))
    values = 0.04 - 0.02 / (1 + np.exp(-(steps - 80) / 5)) + noise
    counted = detect(Series("score", steps, values, smallest=0.01))
    assert [round(event.size, 2) for event in counted.events] == [-0.02]
    left = detect(Series("score", steps, values, smallest=0.05))
    assert left.events == ()
    assert left.fits["score"].outcome == "NO EVENT"
    assert left.fits["score"].smallest == 0.05
    assert left.family == counted.family  # the test was made, so it still counts among the others
    assert counted.fits["score"].smallest == 0.01
