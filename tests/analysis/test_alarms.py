"""Alarms while a run is measured, and the band of an event over variants of its analysis."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

import devmon.analysis.transitions.alarms as alarms_module
from devmon.analysis import Detector, Event, Looks, Series, detect, provisional, robustness, series_of
from devmon.analysis.transitions.alarms import Alarm, Provisional, _looked, _settled
from devmon.analysis.transitions.robustness import bandwidth, local_regression
from devmon.errors import DataError
from tests.support.synthetic import Run, rise, watch

STEPS = np.unique(np.geomspace(1, 20_000, 80).astype(int))
QUICK = Detector(kinds=("jump", "bump"), n_null=99)


def jump(seed: int = 0, at: float = 1000.0, name: str = "score", noise: float = 0.01) -> Series:
    values = rise(STEPS, at, 0.04) + noise * np.random.default_rng(seed).standard_normal(len(STEPS))
    return Series(name, STEPS, values)


def event(kind: str, step: float, low: float, high: float, p: float = 0.001) -> Event:
    return Event(kind, step, (low, high), 1.0, (0.9, 1.1), None, None, p, None, True, "", "score")


def test_docstrings() -> None:
    assert doctest.testmod(alarms_module).failed == 0


def test_the_alarm_of_a_jump_rises_once_it_is_there_and_settles_and_looking_on_is_looking_from_the_start() -> None:
    series = [jump()]
    whole = provisional(series, QUICK)
    (alarm,) = whole.alarms
    assert alarm.status == "settled", alarm
    assert abs(np.log10(alarm.step / 1000)) < 0.03, alarm
    assert 1000 <= alarm.raised_at <= 2000, alarm
    assert alarm.ended_at == STEPS[2 * alarm.high < STEPS][0]
    assert alarm.p_value <= 0.05 / Looks().count
    known, up = Provisional(), []
    for n in range(40, len(STEPS) + 1, 3):
        known = provisional([one.where(np.arange(len(STEPS)) < n) for one in series], QUICK, before=known)
        up += [STEPS[n - 1]] if known.up else []
    assert known == whole
    assert up
    assert alarm.raised_at <= up[0]
    assert up[-1] < alarm.ended_at


def test_an_alarm_that_the_next_look_does_not_find_is_withdrawn_and_one_that_is_found_is_the_same() -> None:
    (raised,) = _looked([], [event("jump", 100, 90, 110)], 150)
    assert raised == Alarm("score", "jump", 100, 90, 110, 0.001, 150)
    (moved,) = _looked([raised], [event("bump", 108, 105, 120, 0.0001)], 170)
    assert (moved.kind, moved.step, moved.p_value, moved.raised_at, moved.status) == ("bump", 108, 0.001, 150, "up")
    (gone,) = _looked([raised], [], 170)
    assert (gone.status, gone.ended_at) == ("withdrawn", 170)
    again = _looked([gone], [event("jump", 100, 90, 110)], 190)
    assert [one.status for one in again] == ["withdrawn", "up"]
    assert _looked([], [event("jump", 100, 90, 110)], 221) == [], "an event that is over raises no alarm"
    (settled,) = _settled([raised], np.array([150, 220, 221, 240]))
    assert (settled.status, settled.ended_at) == ("settled", 221)
    assert _looked([settled], [event("jump", 112, 100, 130)], 240) == [settled]


def test_a_run_without_events_has_an_alarm_no_more_often_than_alpha() -> None:
    """Three series a run: white noise, AR(1) and a random walk; the share of runs is compared, not that of looks."""
    alpha, runs, looks, steps = 0.2, 16, Looks(12, 1.35, 5), STEPS[:45]

    def null(seed: int) -> list[Series]:
        e = np.random.default_rng([11, seed]).standard_normal((3, len(steps)))
        for i in range(1, len(steps)):
            e[1, i] += 0.6 * e[1, i - 1]
        return [Series(str(i), steps, values) for i, values in enumerate((e[0], e[1], np.cumsum(e[2])))]

    known, nulls = [Provisional()] * runs, [null(seed) for seed in range(runs)]
    for size in looks.sizes:  # all runs at one size after another: what they share is done once
        cut = [[one.where(np.arange(len(steps)) < size) for one in series] for series in nulls]
        known = [provisional(one, QUICK, looks, alpha=alpha, before=k) for one, k in zip(cut, known, strict=True)]
    assert all(set(k.seen.values()) == {looks.sizes[-1]} for k in known)
    alarmed = sum(bool(k.alarms) for k in known)
    assert alarmed / runs <= alpha + 2.33 * np.sqrt(alpha * (1 - alpha) / runs), alarmed


def test_points_that_an_alarm_added_are_not_looked_at() -> None:
    x = np.arange(40.0)
    both = {name: watch(STEPS[:40], {"x": x}, None, "ProbeLoss") for name in ("a", "b")}
    run = Run(both,
              {"densified": {"a": STEPS[20:23].tolist()}})  # fmt: skip
    a, b = series_of(run, scheduled_only=True)
    assert a.steps.tolist() == [*STEPS[:20], *STEPS[23:40]]
    assert a.values.tolist() == [*x[:20], *x[23:]]
    assert b.steps.tolist() == STEPS[:40].tolist()
    assert len(series_of(run)[0].steps) == 40
    assert dict(provisional(run, QUICK, Looks(12, 1.5, 5)).seen) == {"a/x": 27, "b/x": 40 if len(x) == 41 else 27}


def test_what_cannot_be_followed_is_told() -> None:
    many = [jump(name=f"s{i}") for i in range(40)]
    with pytest.raises(DataError, match=r"40 series is 1e-07 a test.*follow at most 4 series"):
        provisional(many, alpha=1e-4)
    with pytest.raises(DataError, match="no series 'loss'; it has score"):
        provisional([jump()], series=["loss"])
    rejected = Series("score", STEPS, jump().values, rejected=np.ones(len(STEPS), dtype=bool))
    assert provisional([rejected, jump(name="score[head=1]")]) == Provisional()


def test_the_band_of_a_jump_has_every_variant_and_only_those_that_found_it() -> None:
    series = jump()
    (found,) = detect(series).events
    others = [
        jump(1, 1150.0, "nbeta=10"),
        Series("gamma=1", STEPS, np.random.default_rng(5).standard_normal(len(STEPS))),
    ]
    result = robustness(series, found, others, Detector(n_null=99))
    assert set(result.steps) == {"even", "odd", "local regression", "nbeta=10", "gamma=1"}
    assert result.steps["gamma=1"] is None
    assert result.found == 4, result.steps
    for name, at in {"even": 1000, "odd": 1000, "local regression": 1000, "nbeta=10": 1150}.items():
        step = result.steps[name]
        assert step is not None
        assert abs(np.log10(step / at)) < 0.02, (name, step)
    assert result.band == (min(filter(None, [found.step, *result.steps.values()])), result.steps["nbeta=10"])
    with pytest.raises(DataError, match="two variants are named 'score'"):
        robustness(series, found, [jump()])


@pytest.mark.parametrize("kind, sign", [("turn", 1), ("turn", -1), ("bump", 1), ("plateau", 1)])
def test_the_other_smoother_finds_each_kind_at_its_place(kind: str, sign: int) -> None:
    x = np.log10(STEPS / 1000)
    curve = {"turn": -(x**2), "bump": np.exp(-((x / 0.1) ** 2)) + 0.8 * x, "plateau": x**3}[kind]
    series = Series("score", STEPS, sign * curve)
    steps = robustness(
        series, Event(kind, 1000, (900, 1100), sign, (sign, sign), None, None, 0.01, None, True, "")
    ).steps
    assert steps["local regression"] is not None
    assert abs(np.log10(steps["local regression"] / 1000)) < 0.02, steps
    flipped = Series("score", STEPS, -sign * curve)
    other = robustness(
        flipped, Event("turn", 1000, (900, 1100), sign, (sign, sign), None, None, 0.01, None, True, "")
    ).steps
    assert other["local regression"] is None or kind in ("bump", "plateau")


def test_local_regression_is_exact_on_a_parabola_and_its_width_follows_the_noise() -> None:
    x = np.sort(np.random.default_rng(0).uniform(0, 4, 80))
    at = np.linspace(0.5, 3.5, 7)
    value, slope = local_regression(x, 3 - 2 * x + 0.5 * x**2, at, 0.2)
    np.testing.assert_allclose(value, 3 - 2 * at + 0.5 * at**2, atol=1e-9)
    np.testing.assert_allclose(slope, at - 2, atol=1e-8)
    steep = 1 / (1 + np.exp(-(x - 2) / 0.03))
    noise = np.random.default_rng(1).standard_normal(80)
    assert bandwidth(x, noise) > bandwidth(x, steep + 0.001 * noise)
