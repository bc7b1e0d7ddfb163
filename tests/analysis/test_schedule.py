"""Kinks of known schedules, the chance of a coincidence in closed form, and the mirage guard."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from devmon.analysis.derive.watch_series import series_of
from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.events import Event, Fit
from devmon.analysis.detection.results import Detection
from devmon.analysis.detection.search import detect
from devmon.analysis.series import Series
from devmon.analysis.transitions.mirage import mirage_guard, twins_of
from devmon.analysis.transitions.schedule import (
    Coincidence,
    Kink,
    _as_many,
    _slope,
    chance_of,
    kinks_of,
    schedule_check,
)
from devmon.errors import DataError
from tests.support.synthetic import Run, watch

LAST = 50_000
LOG = np.unique(np.append(0, np.round(np.geomspace(1, LAST, 70))))
EVEN = np.round(np.linspace(0, LAST, 101))
Curve = Callable[[np.ndarray], np.ndarray]


def event(
    step: float, low: float, high: float, *, series: str = "a", kind: str = "jump", size: float = 1.0,
    span: tuple[float, float] | None = None, p: float = 0.005,
) -> Event:  # fmt: skip
    return Event(kind, step, (low, high), size, (size, size), None, span, p, p, True, "", series)


def cosine(t: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.cos(np.pi * t / LAST))


SMOOTH: dict[str, Curve] = {
    "constant": lambda t: 0 * t + 1e-3,
    "cosine to zero": cosine,
    "cosine to a floor": lambda t: 0.1 + cosine(t),
    "exponential": lambda t: 0.9998**t,
    "linear to zero": lambda t: 1 - t / LAST,
    "polynomial": lambda t: (1 - t / LAST) ** 2,
    "zero": lambda t: 0 * t,
}
BENT: dict[str, tuple[Curve, float, str]] = {
    "warm-up, then constant": (lambda t: np.minimum(1, (t + 1) / 2000), 2000, "kink"),
    "warm-up, then cosine": (lambda t: np.where(t < 2000, t / 2000, cosine(t - 2000)), 2000, "kink"),
    "one cycle": (lambda t: np.minimum(t, LAST - t), LAST / 2, "kink"),
    "warm-up, then root": (lambda t: np.minimum((t + 1) * 4000**-1.5, (t + 1) ** -0.5), 4000, "kink"),
    "drop": (lambda t: np.where(t < 20_000, 1e-3, 1e-4), 20_000, "reset"),
}


@pytest.mark.parametrize("name,steps", list(product(SMOOTH, ("log", "even"))))
def test_a_smooth_schedule_has_no_kink(name: str, steps: str) -> None:
    grid = LOG if steps == "log" else EVEN
    assert kinks_of(Series("lr", grid, SMOOTH[name](grid))) == ()


@pytest.mark.parametrize("name,steps", list(product(BENT, ("log", "even"))))
def test_a_bent_schedule_has_its_kink(name: str, steps: str) -> None:
    grid = LOG if steps == "log" else EVEN
    curve, where, kind = BENT[name]
    (kink,) = kinks_of(Series("lr", grid, curve(grid)))
    assert kink.kind == kind
    assert kink.low <= where <= kink.high, kink
    # the unit of the learning rate does not matter
    assert kinks_of(Series("lr", grid, 1e-6 * curve(grid))) == (kink,)


def test_restarts_are_resets() -> None:
    found = kinks_of(Series("lr", EVEN, 1.001 + np.cos(np.pi * (EVEN % 20_000) / 20_000)))
    assert [(kink.step, kink.kind) for kink in found] == [(20_000, "reset"), (40_000, "reset")]


def test_one_sided_slopes_are_exact_on_parabolas() -> None:
    x = np.array([0.0, 1, 3, 4, 7, 9, 10])
    for way in (-1, 1):
        np.testing.assert_allclose(_slope(x, 3 * x**2 - 5 * x + 2, way)[2:-2], 6 * x[2:-2] - 5)


def test_chance_in_closed_form() -> None:
    def at(decades: float) -> float:
        return 10**decades - 1

    middle = [Kink(at(2), at(2), at(2), "kink")]
    own = at(1.0), at(1.5)  # half a decade of four: low ends from 0 to 3.5, of which 1.5 to 2 meet the kink
    assert chance_of(own, middle, 0, at(4)) == pytest.approx(0.5 / 3.5)
    near = [Kink(at(0.2), at(0.2), at(0.2), "kink")]  # only low ends from 0 to .2
    assert chance_of(own, near, 0, at(4)) == pytest.approx(0.2 / 3.5)
    two = [*middle, Kink(at(2.3), at(2.2), at(2.4), "kink")]  # 1.5 to 2 and 1.7 to 2.4 overlap
    assert chance_of(own, two, 0, at(4)) == pytest.approx(0.9 / 3.5)
    assert chance_of(own, [], 0, at(4)) == 0
    assert chance_of((0, at(4)), middle, 0, at(4)) == 1
    rng = np.random.default_rng(1)
    low = rng.uniform(0, 3.5, 100_000)
    hit = ((low <= 2) & (low + 0.5 >= 2)) | ((low <= 2.4) & (low + 0.5 >= 2.2))
    assert chance_of(own, two, 0, at(4)) == pytest.approx(hit.mean(), abs=0.005)


def test_the_chance_of_as_many_is_enumerated() -> None:
    chances, hits = (0.1, 0.4, 0.7), (True, False, True)
    kink = (Kink(1, 1, 1, "kink"),)
    rows = [Coincidence(event(1, 1, 1), kink if hit else (), p) for p, hit in zip(chances, hits, strict=True)]
    expected = 0.0
    for outcome in product((0, 1), repeat=3):
        if sum(outcome) >= 2:
            expected += float(np.prod([p if o else 1 - p for p, o in zip(chances, outcome, strict=True)]))
    assert _as_many(rows) == pytest.approx(expected)
    assert _as_many([]) == 1


def test_an_event_at_a_kink_is_noted() -> None:
    at_kink = event(2200, 2150, 2250, span=(1900, 2500))  # it sets in at the kink
    elsewhere = event(300, 280, 320)
    schedule = Series("lr", EVEN, np.minimum(1, (EVEN + 1) / 2000))
    check = schedule_check([at_kink, elsewhere], schedule, 0, LAST)
    assert [len(row.kinks) for row in check.rows] == [1, 0]
    assert check.rows[0].note.startswith("may come from the learning-rate schedule: kink at step 2000 (by chance")
    assert check.rows[1].note == ""
    assert check.p_value == pytest.approx(1 - np.prod([1 - row.chance for row in check.rows]))
    given = schedule_check([at_kink, elsewhere], [2000.0, 99_999.0], 0, LAST)
    assert len(given.kinks) == 1
    assert given.rows[0].kinks == given.kinks  # the interval begins later, the change does not
    assert given.rows[0].chance < check.rows[0].chance  # an exact step meets fewer intervals than a bracket
    assert schedule_check([], schedule, 0, LAST).p_value == 1


@pytest.mark.parametrize(
    "schedule,first,match",
    [
        (Series("lr", EVEN, -EVEN), 0, "'lr': learning rates are at least 0, got -50000"),
        (Series("lr", EVEN[:5], EVEN[:5]), 0, "at least 6 points, got 5"),
        ([-1.0], 0, "steps of at least 0"),
        ([1.0], 60_000, "got 60000 to 50000"),
    ],
)
def test_bad_schedules(schedule: Series | list[float], first: float, match: str) -> None:
    with pytest.raises(DataError, match=match):
        schedule_check([], schedule, first, LAST)


# the mirage guard


def detection(**found: list[Event] | str) -> Detection:
    fits, events = {}, []
    for name, content in found.items():
        mine = [] if isinstance(content, str) else content
        outcome = content if isinstance(content, str) else "EVENTS" if content else "NO EVENT"
        fits[name] = Fit(outcome, tuple(mine), series=name)
        events += mine
    return Detection(fits, tuple(events), 10, {})


def test_an_event_survives_only_beside_one_of_its_kind_in_the_twin() -> None:
    leap = event(500, 480, 520, series="accuracy")
    pairs = {"accuracy": "logit"}

    def verdict(twin: list[Event] | str) -> str:
        (row,) = mirage_guard(detection(accuracy=[leap], logit=twin), pairs)
        return row.verdict

    assert verdict([event(510, 515, 560, series="logit", size=-1)]) == "survives"
    assert verdict([event(600, 590, 610, series="logit", span=(510, 800))]) == "survives"
    assert verdict([event(900, 880, 920, series="logit")]) == "only in a thresholded score"
    assert verdict([event(500, 480, 520, series="logit", kind="turn")]) == "only in a thresholded score"
    assert verdict([]) == "only in a thresholded score"
    assert verdict("UNRESOLVED") == verdict("SAMPLER REJECTED") == "not checked"
    (row,) = mirage_guard(detection(accuracy=[leap]), pairs)
    assert (row.verdict, row.note) == ("not checked", "logit was not searched: detect it together with accuracy")
    (row,) = mirage_guard(detection(accuracy=[leap], logit=[event(900, 880, 920, series="logit")]), pairs)
    assert row.note == "logit has no jump there, only at step 900"
    assert mirage_guard(detection(logit=[leap]), {}) == []
    with pytest.raises(DataError, match="twins are given for accuracy, which was not searched; the series are logit"):
        mirage_guard(detection(logit=[]), pairs)


def thresholded(*, real: bool) -> Run:
    """A share of hits that leaps, over a margin that drifts or leaps with it (for one of two layers)."""
    steps = np.unique(np.append(0, np.round(np.geomspace(1, 5000, 50)))).astype(int)
    x, rng = np.log10(steps + 1), np.random.default_rng(4)
    rise = 1 / (1 + np.exp(-(x - 2) / 0.02))
    margin = 10 * rise if real else 2 * (x - 2)
    hits = 1 / (1 + np.exp(-np.clip((x - 2) / 0.02, -60, 60)))
    hits = np.stack([hits, 0 * hits], 1) + 0.01 * rng.standard_normal((len(steps), 2))
    data = watch(steps, {
        "hits": (("step", "layer"), hits), "margin": margin + 0.1 * rng.standard_normal(len(steps)),
    }, ["hits", "margin"], "Probe")  # fmt: skip
    data["hits"].attrs["continuous_twin"] = "margin"
    return Run({"task": data})


@pytest.mark.parametrize("real", [True, False])
def test_a_leap_over_a_smooth_margin_is_a_mirage(real: bool) -> None:
    run = thresholded(real=real)
    pairs = twins_of(run)
    assert pairs == dict.fromkeys(("task/hits max", "task/hits[layer=0]", "task/hits[layer=1]"), "task/margin")
    searched = [s for s in series_of(run) if s.name != "task/hits[layer=1]"]
    found = detect(searched, Detector(n_null=99, kinds=("jump",)))
    rows = mirage_guard(found, twins_of(run, found.fits))
    assert {row.event.series for row in rows} == {"task/hits max", "task/hits[layer=0]"}
    assert {row.verdict for row in rows} == {"survives" if real else "only in a thresholded score"}
    assert all((row.beside is not None) == real for row in rows)


def test_twins_in_another_watch_and_of_the_same_shape() -> None:
    run = thresholded(real=True)
    run.data["task"]["hits"].attrs["continuous_twin"] = "other/logit"
    assert twins_of(run)["task/hits[layer=1]"] == "other/logit[layer=1]"
    steps = run.data["task"]["step"].values
    run.data["other"] = watch(steps, {"logit": np.ones(len(steps))}, ["logit"], "Probe")
    assert twins_of(run)["task/hits[layer=1]"] == "other/logit"
