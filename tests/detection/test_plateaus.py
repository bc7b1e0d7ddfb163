"""Plateaus and bumps: exact curves first, then their nulls, then what the detector makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.interpolate import PchipInterpolator

from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.plateaus import prominence, unimodal
from devmon.analysis.series import Array

DETECTOR = Detector()
STEPS = np.unique(np.round(np.geomspace(100, 500_000, 100)))
X = np.log10(STEPS)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([17, *seed])


def staged(boundaries: list[float], values: list[float], x: Array) -> Array:
    """A curve that comes to rest at each boundary: cubic in log step between them."""
    ends, level = np.log10(boundaries), np.asarray(values, dtype=float)
    i = np.clip(np.searchsorted(ends, x, side="right") - 1, 0, len(ends) - 2)
    u = np.clip((x - ends[i]) / (ends[i + 1] - ends[i]), 0, 1)
    return level[i] + (level[i + 1] - level[i]) * u * u * (3 - 2 * u)


def test_prominence_of_a_piecewise_line() -> None:
    # slopes 2, 0, 3 over lengths 1, 1, 1: tilted by c the rises are 2 - c and 3 - c, the fall c, so t = 1 at c = 1
    at = np.linspace(0, 3, 301)
    y = np.interp(at, [0, 1, 2, 3], [0, 2, 2, 5])
    height, tilt, i, j = prominence(y[None], at)
    assert height[0] == pytest.approx(1, rel=0.15)  # tilts lie on a grid
    assert 0.7 < tilt[0] < 1.4
    assert (at[i[0]], at[j[0]]) == (pytest.approx(1, abs=0.05), pytest.approx(2, abs=0.05))


def test_a_fall_on_the_way_up_counts_in_full() -> None:
    # up 2, down 1, up 2: already without a tilt the fall is 1; tilted by c the fall is 1 + c and the rises 2 - c
    at = np.linspace(0, 3, 301)
    height = prominence(np.interp(at, [0, 1, 2, 3], [0, 2, 1, 3])[None], at)[0]
    assert height[0] == pytest.approx(1.5, rel=0.1)


def test_a_slope_with_one_peak_has_no_plateau() -> None:
    at = np.linspace(0, 4, 200)
    curves = np.stack([1 / (1 + np.exp(-3 * (at - 2))), np.sqrt(at + 0.1), at**2, at])
    assert np.all(prominence(curves, at)[0] < 0.01 * np.ptp(curves, axis=1)), prominence(curves, at)[0]


def test_unimodal_against_all_peaks() -> None:
    values, weights = rng(1).standard_normal(12), rng(2).uniform(0.5, 2, 12)
    fit = unimodal(values, weights)
    peak = int(np.argmax(fit))
    assert np.all(np.diff(fit[: peak + 1]) >= -1e-12)
    assert np.all(np.diff(fit[peak:]) <= 1e-12)
    # pool adjacent violators by hand, for every peak
    best = np.inf
    for p in range(13):
        parts = []
        for part, w, sign in ((values[:p], weights[:p], 1), (values[p:], weights[p:], -1)):
            blocks: list[list[float]] = []
            for v, ww in zip(sign * part, w, strict=True):
                blocks.append([v * ww, ww, 1])
                while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
                    last = blocks.pop()
                    blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
            parts += [sign * total / size for total, size, count in blocks for _ in range(int(count))]
        best = min(best, float(np.sum(weights * np.square(np.array(parts) - values))))
    assert np.sum(weights * np.square(fit - values)) == pytest.approx(best)


@pytest.mark.parametrize(("rho", "points"), [(0.0, 100), (0.8, 100), (0.8, 60)])
def test_stages_that_end_at_rest(rho: float, points: int) -> None:
    """Shapes like the published learning coefficients of in-context regression, with noise shared by neighbours. On 60
    points only a curve that all but goes through them has a noise as small as theirs."""
    steps = np.unique(np.round(np.geomspace(100, 500_000, points)))
    y = staged(
        [100, 1000, 40_000, 126_000, 320_000, 500_000], [-0.7, 20.7, 169.3, 156.9, 112.8, 116.3], np.log10(steps)
    )
    noise = rng(3).standard_normal(points)
    for i in range(1, points):
        noise[i] = rho * noise[i - 1] + np.sqrt(1 - rho**2) * noise[i]
    events = DETECTOR.fit(steps, y + 0.1 * noise).events()
    assert [event.kind for event in events] == ["plateau", "turn", "plateau", "turn"], events
    for event, boundary in zip(events, (1000, 40_000, 126_000, 320_000), strict=True):
        assert abs(np.log(event.step / boundary)) < np.log(1.12), event
    rise, fall = events[0], events[2]
    assert rise.size > 0 > fall.size, "signed like the trend"
    assert rise.span is not None
    assert rise.span[0] < 1000 < rise.span[1]


def test_the_place_and_size_of_a_plateau() -> None:
    """Slope 20 a decade but for a dip to 0 of sd 0.3 decades; its prominence by brute force over tilts."""
    fine = np.linspace(X[0], X[-1], 4000)
    covered = hits = 0
    for run in range(8):
        centre = rng(run, 4).uniform(3.4, 4.4)
        slope = 20 * (1 - np.exp(-0.5 * ((fine - centre) / 0.3) ** 2))
        curve = np.concatenate([[0], np.cumsum((slope[1:] + slope[:-1]) / 2 * np.diff(fine))])
        y = np.interp(X, fine, curve) + 0.3 * rng(run, 5).standard_normal(len(X))
        plateaus = [event for event in DETECTOR.fit(STEPS, y).events() if event.kind == "plateau"]
        hits += len(plateaus) == 1
        covered += any(e.interval[0] <= 10**centre <= e.interval[1] for e in plateaus)
        best = 0.0
        for tilt in np.linspace(0.5, 19, 60):
            tilted = curve - tilt * fine
            inside = np.flatnonzero(slope < tilt)
            i, j = inside[0], inside[-1]
            best = max(best, min(tilted[i] - tilted[0], tilted[i] - tilted[j], tilted[-1] - tilted[j]))
        for event in plateaus:
            assert event.size == pytest.approx(best, rel=0.25), (event, best)
    assert hits >= 7, hits
    assert covered >= 5, covered  # 90% intervals: fewer than 5 of 8 has probability .005


def test_no_plateau_where_the_slope_has_one_peak() -> None:
    alarms = 0
    for run in range(12):
        draws = rng(run, 6)
        wide = 30 / (1 + np.exp(-(X - draws.uniform(2.5, 5)) * 2 * np.log(9) / 2.5))
        kinked = 20 * (X - X[0]) + draws.uniform(-15, 15) * np.maximum(X - 3.8, 0)
        y = (wide if run % 2 else kinked) + draws.standard_normal(len(X))
        alarms += any(event.kind == "plateau" for event in DETECTOR.fit(STEPS, y).events())
    assert alarms <= 2, alarms  # at most 5% each: more than 2 of 12 has probability .02


def test_what_lies_between_two_jumps_is_no_plateau_of_its_own() -> None:
    y = sum(20 / (1 + np.exp(-(X - c) * 2 * np.log(9) / 0.1)) for c in (3.0, 4.5)) + rng(7).standard_normal(len(X))
    assert [event.kind for event in DETECTOR.fit(STEPS, y).events()] == ["jump", "jump"]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_rise_and_fall_of_the_loss_is_a_bump(sign: int) -> None:
    loss = PchipInterpolator([2, 4, 5.7], [9.0, 4.0, 3.0])(X)
    bump = 2 * np.exp(-0.5 * ((X - 4.2) / 0.08) ** 2)
    y = sign * (loss + bump) + 0.05 * rng(8).standard_normal(len(X))
    (event,) = DETECTOR.fit(STEPS, y).events()
    assert event.kind == "bump"
    assert event.interval[0] <= 10**4.2 <= event.interval[1]
    assert event.size == pytest.approx(2 * sign, rel=0.15)
    assert event.width == pytest.approx(2 * 0.08 * np.sqrt(2 * np.log(2)), rel=0.25)  # full width at half maximum
    assert Detector(kinds=("jump", "turn", "plateau")).fit(STEPS, y).outcome in ("NO EVENT", "EVENTS")
    assert "bump" not in {e.kind for e in Detector(kinds=("jump",)).fit(STEPS, y).events()}


def test_an_isolated_spike_is_no_bump() -> None:
    y = rng(9).standard_normal(len(X))
    y[[30, 31, 70]] += 30
    assert DETECTOR.fit(STEPS, y).outcome == "NO EVENT"
