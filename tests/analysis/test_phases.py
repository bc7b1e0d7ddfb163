"""Type A and B against the published stage tables and closed forms; the crossing sample size against its equation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm
from scipy.stats import t as student

from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.results import Detection
from devmon.analysis.detection.search import detect
from devmon.analysis.series import Series
from devmon.analysis.transitions.clusters import transitions
from devmon.analysis.transitions.phases import (
    PhaseType,
    critical_n,
    crossing,
    phase_types,
    type_probabilities,
    types_between,
    types_of,
)
from devmon.analysis.transitions.stages import Stage
from devmon.errors import DataError

# linear regression transformer, Hoogland et al. 2402.02364: values at the ends of the stages LR1 ... LR5
ENDS = np.array([0, 1e3, 4e4, 126e3, 320e3, 500e3])
LLC = np.array([-0.7, 20.7, 169.3, 156.9, 112.8, 116.3])
MSE = np.array([4.45, 4.13, 1.90, 1.83, 1.78, 1.75])


def pairs(ends: np.ndarray) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def test_the_published_stages_have_their_published_types() -> None:
    loss = Series("loss", ENDS, MSE, np.full(6, 0.005))
    found = types_between(loss, Series("llc", ENDS, LLC, np.full(6, 0.5)), pairs(ENDS))
    assert [one.kind for one in found] == ["A", "A", "B", "B", "A"]
    assert [one.llc.value for one in found if one.llc] == pytest.approx([21.4, 148.6, -12.4, -44.1, 3.5])
    assert all(sum(one.probabilities.values()) == pytest.approx(1) for one in found)
    # a language model's stages LM1 ... LM5, by Δλ alone: a loss that falls throughout
    llc = np.cumsum([0, 26.4, 22.5, -1.57, 8.62, 1.77])
    steps = np.array([0, 900, 6.5e3, 8.5e3, 17e3, 50e3])
    falling = Series("loss", steps, np.linspace(6, 3, 6), np.full(6, 0.01))
    kinds = [one.kind for one in types_between(falling, Series("llc", steps, llc, np.full(6, 0.3)), pairs(steps))]
    assert kinds == ["A", "A", "B", "A", "A"]


@pytest.mark.parametrize("d_loss,d_llc,equal", [(-1.0, 2.0, 0.0), (0.0, -2.0, 0.3), (0.4, -1.0, 0.1), (1.0, 1.0, 0.5)])
def test_probabilities_are_those_of_draws(d_loss: float, d_llc: float, equal: float) -> None:
    rng = np.random.default_rng(3)
    loss, llc = d_loss + 0.7 * rng.standard_normal(200_000), d_llc + 1.5 * rng.standard_normal(200_000)
    p = type_probabilities(d_loss, 0.7, d_llc, 1.5, equal)
    assert p["A"] == pytest.approx(np.mean((loss < 0) & (llc > 0)), abs=0.005)
    assert p["B"] == pytest.approx(np.mean((loss <= equal) & (llc < 0)), abs=0.005)
    assert sum(p.values()) == pytest.approx(1)


def test_probabilities_in_closed_form() -> None:
    p = type_probabilities(-1.0, 1.0, 2.0, 1.0)
    assert p["A"] == pytest.approx(norm.cdf(1) * norm.cdf(2))
    assert type_probabilities(0, 0, -1, 0)["B"] == 1  # an equal loss is one of type B
    assert type_probabilities(0, 0, 1, 0)["neither"] == 1  # and none of type A
    assert type_probabilities(-1, 0, 0, 0)["neither"] == 1
    assert type_probabilities(0.1, 0, -1, 0, equal=0.05)["neither"] == 1
    with pytest.raises(DataError, match="llc_se"):
        type_probabilities(0, 1, 0, -1)


@pytest.mark.parametrize("d_loss,d_llc", [(-0.05, 3.5), (-0.007, 0.5), (0.001, -0.2), (-1.0, 3.0)])
def test_the_crossing_solves_its_equation(d_loss: float, d_llc: float) -> None:
    n = float(critical_n(d_loss, d_llc))
    assert n * d_loss == pytest.approx(-d_llc * np.log(n), rel=1e-10)
    assert n == pytest.approx(brentq(lambda x: x * d_loss + d_llc * np.log(x), np.e, 1e9), rel=1e-8)
    # beyond it the phase of lower loss wins
    assert (2 * n * d_loss + d_llc * np.log(2 * n) < 0) == (d_loss < 0)


def test_where_there_is_no_crossing() -> None:
    assert np.isnan(critical_n([-1.0, -1.0, 1.0, 0.0, -1.0], [-1.0, 2.7, 1.0, 1.0, 0.0])).all()
    assert float(critical_n(-1.0, 1.0001 * np.e)) == pytest.approx(np.e, rel=0.02)  # at r = e both branches meet
    # five- to six-gon of the toy model of superposition: levels .06874 and .04819 at λ 7 and 8.5
    assert float(critical_n(0.04819 - 0.06874, 8.5 - 7)) == pytest.approx(445.14, rel=1e-4)


def test_the_crossing_carries_the_errors() -> None:
    exact = crossing(-0.05, 0.0, 3.5, 0.0)
    assert exact.interval == pytest.approx((exact.n, exact.n))
    assert (exact.probability, exact.preferred) == (1.0, "after")
    # n depends on Δλ with slope dn/dΔλ = n log n / (Δλ (log n - 1)) by implicit differentiation
    n, se = exact.n, 0.05
    slope = n * np.log(n) / (3.5 * (np.log(n) - 1))
    wide = crossing(-0.05, 0.0, 3.5, se)
    assert (wide.interval[1] - wide.interval[0]) / 2 == pytest.approx(1.645 * slope * se, rel=0.03)
    doubtful = crossing(-0.05, 0.05, 3.5, 0.01)
    assert doubtful.probability == pytest.approx(norm.cdf(1), abs=0.01)
    none = crossing(-0.05, 0.0, -3.5, 0.0)
    assert np.isnan(none.n)
    assert (none.probability, none.preferred) == (0.0, "after")
    assert crossing(0.05, 0.0, -3.5, 0.0).preferred == "before"


def test_doubt_and_missing_errors_are_said() -> None:
    steps = np.arange(10.0)
    loss, llc = Series("loss", steps, -steps, np.full(10, 0.1)), Series("llc", steps, steps, np.full(10, 50.0))
    (one,) = types_between(loss, llc, [(0, 9)])
    assert one.kind == "unsettled"
    assert one.note.startswith("most likely A, with probability 0.5")
    (bare,) = types_between(loss, Series("llc", steps, steps), [(0, 9)])
    assert (bare.kind, bare.note) == ("unresolved", "λ lacks a standard error between steps 0 and 9")
    (helped,) = types_between(loss, Series("llc", steps, steps), [(0, 9)], noise=(None, 0.5))
    assert helped.kind == "A"
    assert helped.llc is not None
    assert helped.llc.se == pytest.approx(0.5 * np.sqrt(2))
    rejected = Series("llc", steps, steps, np.ones(10), rejected=steps > 0)
    (gone,) = types_between(loss, rejected, [(0, 9)])
    assert (gone.kind, gone.note) == ("unresolved", "λ lacks two accepted values between steps 0 and 9")
    with pytest.raises(DataError, match="at least 0, got -1"):
        types_between(loss, llc, [(0, 9)], equal=-1)


def run(sign: float) -> list[Series]:
    steps = np.unique(np.append(0, np.round(np.geomspace(1, 5000, 45))))
    rng = np.random.default_rng(8)
    up = 1 / (1 + (300 / np.maximum(steps, 0.1)) ** 12)
    return [
        Series("probe/loss", steps, 4 - 0.8 * up + 0.01 * rng.standard_normal(len(steps)), np.full(len(steps), 0.01)),
        Series("llc/llc", steps, 30 + sign * 20 * up + rng.standard_normal(len(steps))),
    ]


@pytest.mark.parametrize("sign,kind", [(1, "A"), (-1, "B")])
def test_a_transition_of_a_run(sign: float, kind: str) -> None:
    series = run(sign)
    detection = detect(series, Detector(n_null=59, kinds=("jump",)))
    (one,) = phase_types(series, detection)
    assert one.kind == kind
    assert one.start < 300 < one.end
    assert one.crossing is not None
    assert one.crossing.probability == (1.0 if kind == "A" else 0.0)
    low, high = one.crossing.interval
    if kind == "A":
        assert low < float(critical_n(-0.8, 20)) < high
    with pytest.raises(
        DataError, match=r"expected one series 'x', found 0: choose with loss=..., from probe/loss, llc"
    ):
        phase_types(series, detection, loss="x")
    with pytest.raises(DataError, match="found 2"):
        phase_types([*series, Series("b/llc", series[1].steps, series[1].values)], detection)


def test_the_types_of_the_stages_between_critical_points() -> None:
    """Shapes like the published stages of in-context regression: A, A, B, B, and an end in which little happens."""
    steps = np.unique(np.round(np.geomspace(100, 500_000, 100)))
    ends = np.log10([100, 1000, 40_000, 126_000, 320_000, 500_000])
    i = np.clip(np.searchsorted(ends, np.log10(steps), side="right") - 1, 0, 4)
    u = (np.log10(steps) - ends[i]) / (ends[i + 1] - ends[i])
    generator = np.random.default_rng(3)

    def curve(name: str, levels: list[float], sd: float) -> Series:
        level = np.array(levels)
        values = level[i] + (level[i + 1] - level[i]) * u * u * (3 - 2 * u) + sd * generator.standard_normal(len(steps))
        return Series(name, steps, values)

    llc = curve("llc/llc", [-0.7, 20.7, 169.3, 156.9, 112.8, 116.3], 0.1)
    loss = curve("probe/loss", [4.45, 4.13, 1.90, 1.83, 1.78, 1.75], 0.001)
    detection = detect(llc)
    ends_found = [change.step for change in transitions(detection, ("turn", "plateau"))]
    assert len(ends_found) == 4, ends_found
    both = replace(detection, fits={**detection.fits, **detect(loss).fits})
    types = phase_types([loss, llc], both, of="stage", kinds=("turn", "plateau"))
    assert [one.kind for one in types] == ["A", "A", "B", "B", "A"], types
    with pytest.raises(DataError, match="'transition' or 'stage'"):
        phase_types([loss, llc], both, of="event")


def across(llc: Series, loss: Series, start: int = 400, end: int = 700, *, kind: str = "transition") -> PhaseType:
    (told,) = types_of([Stage(kind, start, end, {})], loss, llc, Detection({}, (), 0, {}))
    return told


def paired(steps: np.ndarray, values: np.ndarray, sd: float, common: float) -> np.ndarray:
    """(8, n) replicates whose mean is `values`: each has a level of its own, common to all steps, and noise of sd."""
    rng = np.random.default_rng(5)
    away = common * rng.standard_normal((8, 1)) + sd * rng.standard_normal((8, len(steps)))
    return values + away - away.mean(0)


def test_the_change_across_a_transition_needs_values_on_both_sides_alone() -> None:
    steps = np.arange(0, 1001, 100)
    loss = Series("loss", steps, np.where(steps < 550, 3.0, 2.0), np.full(11, 0.01))
    values = np.where(steps < 550, 60.0, 50.0)
    inside = (steps >= 400) & (steps <= 800)  # all that the transition holds, and more, is rejected
    told = across(Series("llc", steps, values, np.ones(11), rejected=inside), loss)
    assert told.kind == "B"
    assert told.llc is not None
    assert (told.llc.value, told.llc.steps, told.llc.dof) == (-10, (300, 900), None)
    assert told.llc.se == pytest.approx(2**0.5)
    late = across(Series("llc", steps, values, np.ones(11), rejected=steps > 500), loss)
    assert (late.kind, late.note) == ("unresolved", "λ lacks accepted values on both sides of steps 400 and 700")
    within = across(Series("llc", steps, values, np.ones(11), rejected=inside), loss, kind="stage")
    assert within.note == "λ lacks two accepted values between steps 400 and 700"


def test_what_is_common_to_both_sides_drops_out_of_the_error() -> None:
    steps = np.arange(0, 1001, 100)
    loss = Series("loss", steps, np.where(steps < 550, 3.0, 2.0), np.full(11, 0.01))
    values = np.where(steps < 550, 60.0, 55.0)
    replicates = paired(steps, values, sd=1.0, common=30.0)
    bare = across(Series("llc", steps, values, np.full(11, 10.0)), loss)
    told = across(Series("llc", steps, values, np.full(11, 10.0), replicates=replicates), loss)
    assert (bare.kind, told.kind) == ("unsettled", "B")
    assert told.llc is not None
    contrast = replicates[:, 7] - replicates[:, 4]
    assert told.llc.se == pytest.approx(contrast.std(ddof=1) / 8**0.5)
    assert told.llc.dof == 7
    # of 8 replicates the tails are Student's
    near = np.where(steps < 550, 55.5, 55.0)
    doubtful = across(Series("llc", steps, near, None, replicates=replicates - values + near), loss)
    z = 0.5 / told.llc.se
    assert abs(student.cdf(z, 7) - norm.cdf(z)) > 0.005
    assert doubtful.probabilities["B"] == pytest.approx(student.cdf(z, 7), rel=1e-6)
    holed = np.where(steps == 700, np.nan, replicates)
    fallen_back = across(Series("llc", steps, values, np.full(11, 10.0), replicates=holed), loss)
    assert fallen_back.llc == bare.llc


def test_the_crossing_of_few_replicates_is_wider() -> None:
    known, few = crossing(-0.05, 0.005, 3.5, 0.2), crossing(-0.05, 0.005, 3.5, 0.2, dof=(3, 3))
    assert few.interval[1] - few.interval[0] > 1.2 * (known.interval[1] - known.interval[0])
