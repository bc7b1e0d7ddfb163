"""Events across runs and across series: shift nulls and sign tests in closed form, then planted runs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import binom

from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.events import Event, Fit, Trend
from devmon.analysis.detection.results import Detection
from devmon.analysis.runs.compare import compare_runs, median_interval, sign_test
from devmon.analysis.series import Series
from devmon.analysis.transitions.agreement import agreement, log_extent, most_covered, shifted
from devmon.errors import DataError

STEPS = np.unique(np.append(0, np.round(np.geomspace(1, 20_000, 60))))
X = np.log10(STEPS + 1)
QUICK = Detector(n_null=59, kinds=("jump",))


# closed forms and slow references


def test_two_intervals_meet_as_often_as_their_lengths_say() -> None:
    null = shifted([[(0.3, 0.8)], [(2.0, 2.2)]], 0, 4, shifts=40_000, seed=0)
    assert np.mean(null == 2) == pytest.approx(0.7 / 4, abs=0.006)  # (a + b) / L
    assert set(null) == {1, 2}
    assert (shifted([[(0, 4)], [(1, 1.1)]], 0, 4, shifts=50, seed=0) == 2).all()


def test_shifts_against_a_slow_reference() -> None:
    tracks = [[(0.1, 0.5), (1.2, 1.3)], [(0.4, 0.9)], [(2.0, 2.9), (0.0, 0.2)], [(1.5, 1.7)]]
    first, length = 0.0, 3.0
    null = shifted(tracks, first, first + length, shifts=200, seed=5)
    turns = np.random.default_rng([5, 0xA9]).uniform(0, length, (200, 4))
    for turn, expected in zip(turns, null, strict=True):
        most = 0
        starts = [(low + by) % length + 1e-9 for track, by in zip(tracks, turn, strict=True) for low, _ in track]
        for place in [*np.linspace(0, length, 301), *starts]:
            count = 0
            for track, by in zip(tracks, turn, strict=True):
                count += any((place - low - by) % length <= high - low for low, high in track)
            most = max(most, count)
        assert most == expected


def test_the_most_covered_place() -> None:
    tracks = [[(0.0, 1.0), (3.0, 3.4)], [(0.9, 1.5)], [(3.1, 3.2), (0.95, 2.0)], []]
    place, members = most_covered(tracks)
    assert place == pytest.approx(0.975)
    assert members == {0: 0, 1: 0, 2: 1}
    for order in itertools.permutations(range(4)):  # whatever the order of the tracks
        again, found = most_covered([tracks[i] for i in order])
        assert again == place
        assert {order[i]: j for i, j in found.items()} == members
    assert most_covered([[], []])[1] == {}
    assert most_covered([[(0, 1), (1.2, 1.3)]]) == (1.25, {0: 1})  # the narrowest common part


def test_the_median_and_its_interval() -> None:
    assert median_interval(np.array([1.0])) == (1.0, (1.0, 1.0), 0.0)
    middle, interval, coverage = median_interval(np.arange(10.0))
    assert (middle, interval) == (4.5, (1.0, 8.0))
    assert coverage == pytest.approx(1 - 22 / 1024)
    rng = np.random.default_rng(2)
    hits = [low <= 0 <= high for low, high in (median_interval(rng.standard_normal(8))[1] for _ in range(4000))]
    assert np.mean(hits) == pytest.approx(median_interval(np.arange(8.0))[2], abs=0.02)


@pytest.mark.parametrize(
    "lags,outcome,p",
    [
        ([1, 2, 3, 4, 5, 6], "a first", 2 / 64),
        ([-1, -2, -3, -4, -5, -6, 0], "b first", 2 / 64),
        ([1, 2, 3, 4, 5], "not enough runs", 2 / 32),
        ([1, 2, 3, 4, 5, -1, -2, -3], "no order", None),
        ([0, 0, 0], "not enough runs", 1.0),
        ([], "not enough runs", 1.0),
    ],
)
def test_sign_test(lags: list[float], outcome: str, p: float | None) -> None:
    test = sign_test({str(i): float(lag) for i, lag in enumerate(lags)})
    assert test.outcome == outcome
    expected = min(1.0, 2 * float(binom.cdf(3, 8, 0.5))) if p is None else p
    assert test.p_value == pytest.approx(expected)
    assert test.a_first + test.b_first + test.ties == len(lags)
    assert test.lag == pytest.approx(np.median(lags), nan_ok=True) if lags else np.isnan(test.lag)


def test_sign_test_needs_numbers() -> None:
    with pytest.raises(DataError, match="lags must be finite"):
        sign_test({"0": float("nan")})


# detections made by hand


def detection(**places: list[float] | str) -> Detection:
    """Jumps at these places in log step (negative: falls), each a tenth of a decade wide."""
    fits, events = {}, []
    for name, content in places.items():
        mine = []
        for x in [] if isinstance(content, str) else content:
            low, step, high = (float(10 ** (abs(x) + d) - 1) for d in (-0.05, 0, 0.05))
            mine.append(
                Event("jump", step, (low, high), float(np.sign(x)), (0, 2), None, None, 0.005, 0.01, True, "", name)
            )
        outcome = content if isinstance(content, str) else "EVENTS" if mine else "NO EVENT"
        fits[name] = Fit(outcome, tuple(mine), Trend(STEPS, X, X, X), series=name)
        events += mine
    return Detection(fits, tuple(events), 10, {})


def test_matching_takes_one_event_of_each_run() -> None:
    runs = {
        "0": detection(a=[2.0, 3.0], b=[2.5]),
        "1": detection(a=[2.15, 2.02], b=[-2.5]),
        "2": detection(a=[1.95], b="UNRESOLVED"),
    }
    comparison = compare_runs(runs)
    first, *rest = comparison.matched
    assert (first.series, first.kind, first.sign, first.of) == ("a", "jump", 1, 3)
    assert {run: round(float(np.log10(e.step + 1)), 2) for run, e in first.events.items()} == {
        "0": 2.0, "1": 2.02, "2": 1.95}  # fmt: skip
    assert first.step == pytest.approx(99)
    assert first.spread == pytest.approx(np.std([2.0, 2.02, 1.95], ddof=1))
    assert first.coverage == pytest.approx(0.75)  # three runs: 1 - 2/8
    singles = {(m.series, m.sign, *m.events): m for m in rest}
    assert set(singles) == {("a", 1, "0"), ("a", 1, "1"), ("b", 1, "0"), ("b", -1, "1")}
    assert all(m.note == "found in one run only" and m.q_value is None for m in rest)
    assert singles["b", 1, "0"].of == 2  # the third run could not tell
    frame = comparison.to_frame()
    assert frame["found"].tolist() == [3, 1, 1, 1, 1]
    # the order of the runs changes nothing
    other = compare_runs(dict(reversed(runs.items())))
    assert [(m.series, m.step, set(m.events)) for m in other.matched] == [
        (m.series, m.step, set(m.events)) for m in comparison.matched
    ]


def test_how_far_apart_events_may_be() -> None:
    runs = {"0": detection(a=[2.0]), "1": detection(a=[2.28])}  # extents .18 decades apart
    assert [len(m.events) for m in compare_runs(runs).matched] == [2]
    assert [len(m.events) for m in compare_runs(runs, within=0.05).matched] == [1, 1]
    with pytest.raises(DataError, match="within"):
        compare_runs(runs, within=-1)
    assert compare_runs({"0": detection(a=[2.0])}).outcome == "not enough runs"
    assert compare_runs({"0": detection(a=[]), "1": detection(a=[])}).outcome == "NO EVENT"


def test_p_values_of_matches_by_chance() -> None:
    rng = np.random.default_rng(6)
    p_values = []
    for _ in range(150):
        runs = {str(i): detection(a=[rng.uniform(0.2, 4.1)]) for i in range(5)}
        p_values.append(compare_runs(runs, shifts=199).matched[0].p_value)
    small = int(np.sum(np.array(p_values) <= 0.1))
    assert small <= 25, small  # more than 25 of 150 at 10% has probability .005
    agreed = compare_runs({str(i): detection(a=[2 + 0.01 * i]) for i in range(5)})
    assert agreed.matched[0].p_value <= 0.005


def test_lead_and_lag_over_runs() -> None:
    runs = {
        str(i): detection(a=[2 + 0.02 * i, 3.5] if i == 0 else [2 + 0.02 * i], b=[2.1 + 0.02 * i]) for i in range(6)
    }
    comparison = compare_runs(runs)
    test = comparison.lead_lag("a", "b")
    assert (test.outcome, test.a_first, test.p_value) == ("a first", 6, 2 / 64)
    assert test.lag == pytest.approx(np.median([10 ** (2.1 + 0.02 * i) - 10 ** (2 + 0.02 * i) for i in range(6)]))
    assert comparison.lead_lag("b", "a").outcome == "b first"
    with pytest.raises(DataError, match="no run has a jump of series 'c'; jumps were found in a, b"):
        comparison.lead_lag("a", "c")


def test_agreement_of_series_within_a_run() -> None:
    ends = float(STEPS[0]), float(STEPS[-1])
    together = agreement(detection(a=[2.0], b=[-2.02, 3.9], c=[2.04], d=[1.0]), *ends)
    assert together is not None
    assert together.series == ("a", "b", "c")
    assert together.of == 4
    assert together.p_value < 0.02
    assert 1 < together.expected < 2.2
    apart = agreement(detection(a=[1.0], b=[2.0], c=[3.0]), *ends)
    assert apart is not None
    assert apart.p_value == 1
    assert agreement(detection(a=[1.0], b=[]), *ends) is None
    with pytest.raises(DataError, match="length above 0"):
        agreement(detection(a=[1.0], b=[2.0]), 5, 5)


def test_log_extent() -> None:
    assert log_extent((9, 99), 0.5) == pytest.approx((0.5, 2.5))
    assert log_extent((-3, 0)) == (0, 0)


# planted runs


def test_transitions_that_differ_in_step_are_matched_where_their_mean_has_none_so_steep() -> None:
    rng = np.random.default_rng(9)
    places = 2.4 + 0.06 * rng.standard_normal(5)
    runs = {}
    for i, place in enumerate(places):
        rise = 1 / (1 + np.exp(-np.clip((X - place) * 2 * np.log(9) / 0.1, -60, 60)))
        score = 10 * rise + 0.5 * rng.standard_normal(len(X))
        flat = rng.standard_normal(len(X))
        runs[f"seed {i}"] = [Series("score", STEPS, score), Series("flat", STEPS, flat)]
    comparison = compare_runs(runs, QUICK)
    first, *rest = comparison.matched
    assert (first.series, len(first.events), first.of) == ("score", 5, 5), comparison.to_frame()
    np.testing.assert_allclose([np.log10(e.step + 1) for e in first.events.values()], places, atol=0.05)
    assert first.spread == pytest.approx(np.std(places, ddof=1), abs=0.03)
    assert first.q_value is not None
    assert first.q_value < 0.05
    assert len(rest) <= 1, comparison.to_frame()
