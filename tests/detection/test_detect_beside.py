"""Events beside each other: which of two accounts of the same stretch of a series is reported."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from detection_families import POSITIVES, STAGES, at_rest, grid, staged

from devmon.analysis.detection.curve import Curve
from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.plateaus import _stretches, prominence
from devmon.analysis.detection.turns import Turn
from devmon.analysis.series import Array

STEPS = grid("log", 60)


def kinds_of(family: str, variant: str, *seed: int) -> list[str]:
    y, _ = POSITIVES[family][variant](np.random.default_rng(seed), STEPS)
    return [event.kind for event in Detector().fit(STEPS, y).events()]


@pytest.mark.parametrize("run", [12, 13, 14, 16])
def test_two_checkpoints_at_the_top_of_a_bump_are_no_spike(run: int) -> None:
    """Less than two checkpoints' distance within the half height, but those beside them lie on its flanks."""
    assert kinds_of("bump", "width 0.2, SNR 10", 44, run) == ["bump"]


@pytest.mark.parametrize("run", [2, 14, 15, 19, 25])
def test_the_flank_of_a_maximum_is_no_jump_of_its_own(run: int) -> None:
    assert kinds_of("turn", "sd 0.5, SNR 3", 45, run) == ["turn"]


def test_a_steep_fall_beside_a_maximum_stays_a_jump() -> None:
    x = np.log10(STEPS + 1)
    for run in range(4):
        y = (
            12 * np.exp(-0.5 * ((x - 1.5) / 0.4) ** 2)
            - 10 * (x > 3)
            + np.random.default_rng([46, run]).standard_normal(len(x))
        )
        kinds = [event.kind for event in Detector().fit(STEPS, y).events()]
        assert kinds in (["turn", "jump"], ["turn", "plateau", "jump"])


@pytest.mark.parametrize("seed", [(200, 16), (201, 20)])
def test_between_a_minimum_and_a_maximum_a_falling_curve_does_not_rest(seed: tuple[int, int]) -> None:
    """The rise of a bump on a falling loss, by itself, is also where the fall stops for a while."""
    assert kinds_of("bump", "width 0.4, SNR 10", *seed) == ["turn", "turn"]


def test_a_wiggle_of_a_plateau_does_not_end_the_stretch_in_which_it_is_sought() -> None:
    """Where this curve rests its slope is by chance surely negative, a turn of p = 1: only turns that are told part a curve."""
    steps = np.unique(np.round(np.geomspace(100, 500_000, 200)))
    y, truth = staged("in-context regression", steps, np.random.default_rng([0, 2]), "smooth")
    fit = Detector().fit(steps, y)
    assert [event.kind for event in fit.events()] == ["plateau", "turn", "plateau", "turn"]
    assert [event.step for event in fit.events()] == pytest.approx(truth, rel=0.1)
    assert max(fit.p_values["turn"]) == 1


def test_between_two_maxima_the_curve_falls_and_rises() -> None:
    x = np.linspace(0, 4, 41)
    curve = SimpleNamespace(at=x, mean=np.cos(2 * np.pi * (x - 1) / 2))  # highest at 1 and 3
    tops = [Turn(np.full(3, place), np.full(3, 0.5), 0.01, 1.0) for place in (1.0, 3.0)]
    assert _stretches(cast(Curve, curve), tops) == [(0, 10, 1), (10, 20, -1), (20, 30, 1), (30, 40, -1)]
    assert _stretches(cast(Curve, curve), tops[:1]) == [(0, 10, 1), (10, 40, -1)]
    assert _stretches(cast(Curve, curve), []) == [(0, 40, -1)]


@pytest.mark.parametrize("sd,off", [(0.1, 0.1), (0.5, 0.3)])
def test_the_size_of_a_plateau_is_its_prominence(sd: float, off: float) -> None:
    """Of the first boundary of in-context regression: a rise of 22, then one of 149. Tilted, the curve is highest at its start."""
    steps = np.unique(np.round(np.append(np.linspace(0, 500_000, 51), np.geomspace(1, 500_000, 50))))
    boundaries, values = STAGES["in-context regression"]
    x = np.linspace(0, np.log10(40_000), 800)
    curve: Array = at_rest(np.log10(boundaries), np.asarray(values), True)(np.clip(x, 2, None))
    truth, size = float(prominence(curve[None], x)[0][0]), []
    for run in range(3):
        y, _ = staged("in-context regression", steps, np.random.default_rng([0, run]), "smooth", sd)
        size += [
            event.size for event in Detector().fit(steps, y).events() if event.kind == "plateau" and event.step < 2000
        ]
    assert size == pytest.approx([truth] * 3, rel=off), truth


def test_a_plateau_between_unequal_slopes_is_not_moved_far_to_the_gentler() -> None:
    """A fall of 25 a decade, then one of 109: without twicing the place is 9% too early."""
    steps = np.unique(np.round(np.geomspace(100, 500_000, 60)))
    for run in range(3):
        y, truth = staged("in-context regression", steps, np.random.default_rng([0, run]))
        (step,) = [e.step for e in Detector().fit(steps, y).events() if e.kind == "plateau" and e.step > 50_000]
        assert step == pytest.approx(truth[2], rel=0.078)
