"""Type A or Type B: how loss and learning coefficient λ change over a transition, and the sample size at which it pays.

Type A: the loss falls and λ rises (fit is bought with complexity). Type B: λ falls while the loss falls or stays equal
(Hoogland et al. 2024, arXiv:2402.02364). In the Bayesian picture the free energy of a phase is n ℓ + λ log n to leading
order (Watanabe 2009), so the phase after the transition is preferred from the n on at which

    n Δℓ = -Δλ log n                                           (Chen et al. 2023, arXiv:2310.06301)

with ℓ the mean loss per sample (n counts tokens where the loss is per token, provided λ was measured so). Δℓ and Δλ
must have opposite signs, and n / log n = -Δλ / Δℓ has a solution only from e on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import lambertw, ndtr, stdtr

from devmon.analysis.detection.results import Detection
from devmon.analysis.series import Array, Series
from devmon.analysis.transitions.stages import Change, Stage, change_across, change_over, stages
from devmon.errors import DataError

SETTLED = 0.9  # probability from which a type is named
EQUAL = 0.01  # share of the loss's range over the run that counts as no change, where the loss names no other
CROSSING_DRAWS = 20_000  # of both changes, for the crossing's median and interval: two digits
Freedom = tuple[int | None, int | None]  # degrees of freedom of the errors of loss and λ


@dataclass(frozen=True)
class Crossing:
    """The sample size n at which both phases are as good: median and interval over the errors of the changes.

    `probability` is that of there being a crossing at all; the numbers are given that there is one, NaN where it is 0.
    Beyond n the phase `preferred` ("after" or "before" the transition) has the lower free energy.
    """

    n: float
    interval: tuple[float, float]
    probability: float
    preferred: str


@dataclass(frozen=True)
class PhaseType:
    """Type of the change between steps `start` and `end`: "A", "B", "neither", "unsettled" or "unresolved".

    `probabilities` of A, B and neither sum to 1; the type is named from SETTLED on. It is "unresolved" where a change
    or its error is not known (`note` says which). `equal` is the rise of the loss up to which it counts as equal, in
    its units.
    """

    start: float
    end: float
    kind: str
    probabilities: dict[str, float]
    loss: Change | None
    llc: Change | None
    equal: float
    crossing: Crossing | None
    note: str


def phase_types(
    series: Sequence[Series],
    detection: Detection,
    *,
    loss: str | None = None,
    llc: str | None = None,
    equal: float | None = None,
    of: str = "transition",
    kinds: Collection[str] = ("jump",),
) -> list[PhaseType]:
    """The type of every transition of a run (`stages`, with these `kinds` of events), in order, or of every stage
    between them (`of="stage"`, as in the published tables). `loss` and `llc` name the series to compare.

    Without names they are the only series called `…/loss` and `…/llc`. A series without standard errors has that of the
    noise which the detector found in it.
    """
    compared = _pick(series, loss, "loss"), _pick(series, llc, "llc")
    if of not in ("transition", "stage"):
        raise DataError(f"of is 'transition' or 'stage', got {of!r}")
    parts = [part for part in stages(series, detection, kinds) if part.kind == of]
    return types_of(parts, *compared, detection, equal=equal)


def types_of(
    parts: Sequence[Stage], loss: Series, llc: Series, detection: Detection, *, equal: float | None = None
) -> list[PhaseType]:
    """The type of the change over each of these parts of a run; a series without errors has that of its own noise.

    Of a transition the changes are across it: from the last accepted value before it to the first after it, wherever
    these are. Of a stage they are within it.
    """
    fits = [detection.fits.get(series.name) for series in (loss, llc)]
    sd = [None if fit is None or fit.noise is None else fit.noise.sd for fit in fits]
    ways = [change_across if part.kind == "transition" else change_over for part in parts]
    equal, noise = _equal(loss, equal), (sd[0], sd[1])
    return [_type(loss, llc, part.start, part.end, equal, noise, way) for part, way in zip(parts, ways, strict=True)]


def types_between(
    loss: Series,
    llc: Series,
    boundaries: Sequence[tuple[float, float]],
    *,
    equal: float | None = None,
    noise: tuple[float | None, float | None] = (None, None),
) -> list[PhaseType]:
    """The type of the change between each pair of steps: last minus first accepted value within it.

    The error of a change is that of its replicates' changes where the series has replicates, else of two independent
    errors.
    `equal` defaults to the loss's smallest change of interest, else to EQUAL times its range; `noise` (loss, λ) stands
    in for standard errors that a series lacks.
    """
    equal = _equal(loss, equal)
    return [_type(loss, llc, start, end, equal, noise, change_over) for start, end in boundaries]


def type_probabilities(
    d_loss: float, loss_se: float, d_llc: float, llc_se: float, equal: float = 0.0, dof: Freedom = (None, None)
) -> dict[str, float]:
    """Probabilities of A (Δloss < 0, Δλ > 0), B (Δloss <= equal, Δλ < 0) and neither, for independent errors.

    Errors are normal, or Student's with `dof` (loss, λ) degrees of freedom where these are given.
    """
    for se, what in ((loss_se, "loss_se"), (llc_se, "llc_se")):
        if not se >= 0:
            raise DataError(f"{what} is a standard error, at least 0, got {se}")
    a = (1 - _at_most(0.0, -d_loss, loss_se, dof[0])) * (1 - _at_most(0.0, d_llc, llc_se, dof[1]))
    b = _at_most(equal, d_loss, loss_se, dof[0]) * (1 - _at_most(0.0, -d_llc, llc_se, dof[1]))
    return {"A": a, "B": b, "neither": max(1 - a - b, 0.0)}


def critical_n(d_loss: Array | float, d_llc: Array | float) -> Array:
    """The larger n > e that solves n Δℓ = -Δλ log n; NaN where the changes have one sign or no n solves it.

    With r = -Δλ/Δℓ: n = -r W₋₁(-1/r), W₋₁ the lower branch of Lambert's function (Corless et al. 1996).

    >>> n = float(critical_n(-0.05, 3.5))
    >>> round(n, 1), bool(abs(-0.05 * n + 3.5 * np.log(n)) < 1e-9)
    (423.4, True)
    """
    d_loss, d_llc = np.broadcast_arrays(np.asarray(d_loss, dtype=np.float64), np.asarray(d_llc, dtype=np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(d_loss == 0, np.nan, -d_llc / d_loss)
        solvable = ratio > np.e
        safe = np.where(solvable, ratio, 3.0)
        n = -safe * lambertw(-1 / safe, -1).real
    return np.where(solvable, n, np.nan)


def crossing(
    d_loss: float,
    loss_se: float,
    d_llc: float,
    llc_se: float,
    *,
    level: float = 0.90,
    seed: int = 0,
    dof: Freedom = (None, None),
) -> Crossing:
    """`critical_n` with the errors of both changes, by CROSSING_DRAWS independent draws of each: normal, or Student's
    with `dof` (loss, λ) degrees of freedom where these are given."""
    generator = np.random.default_rng([seed, 0xC2])
    errors = [
        generator.standard_normal(CROSSING_DRAWS) if few is None else generator.standard_t(few, CROSSING_DRAWS)
        for few in dof
    ]
    loss = d_loss + loss_se * errors[0]
    n = critical_n(loss, d_llc + llc_se * errors[1])
    exists = np.isfinite(n)
    preferred = "after" if np.mean(loss[exists] < 0 if exists.any() else loss < 0) >= 0.5 else "before"
    if not exists.any():
        return Crossing(float("nan"), (float("nan"), float("nan")), 0.0, preferred)
    tail = (1 - level) / 2
    low, middle, high = (float(q) for q in np.quantile(n[exists], [tail, 0.5, 1 - tail]))
    return Crossing(middle, (low, high), float(exists.mean()), preferred)


def _equal(loss: Series, equal: float | None) -> float:
    """The change of the loss that counts as none: given, or its smallest one of interest, or EQUAL of its range."""
    values = np.asarray(loss.values, dtype=np.float64)
    finite = values[np.isfinite(values)]
    if equal is None:
        equal = loss.smallest or (EQUAL * float(np.ptp(finite)) if len(finite) else 0.0)
    if not equal >= 0:
        raise DataError(f"equal is a change of the loss that counts as none, at least 0, got {equal}")
    return equal


def _type(
    loss: Series,
    llc: Series,
    start: float,
    end: float,
    equal: float,
    noise: tuple[float | None, float | None],
    way: Callable[[Series, float, float], Change | None],
) -> PhaseType:
    """The type between two steps, by changes taken in this way; `noise` is for a change without an error."""
    d_loss, d_llc = (_with_error(way(s, start, end), sd) for s, sd in zip((loss, llc), noise, strict=True))
    if d_loss is None or d_loss.se is None or d_llc is None or d_llc.se is None:
        change, what = (d_loss, "loss") if d_loss is None or d_loss.se is None else (d_llc, "λ")
        values = "accepted values on both sides of" if way is change_across else "two accepted values between"
        lacks = values if change is None else "a standard error between"
        note = f"{what} lacks {lacks} steps {start:g} and {end:g}"
        return PhaseType(start, end, "unresolved", {}, d_loss, d_llc, equal, None, note)
    dof = d_loss.dof, d_llc.dof
    p = type_probabilities(d_loss.value, d_loss.se, d_llc.value, d_llc.se, equal, dof)
    best = max(p, key=lambda kind: p[kind])
    kind = best if p[best] >= SETTLED else "unsettled"
    n = crossing(d_loss.value, d_loss.se, d_llc.value, d_llc.se, dof=dof)
    note = "" if kind != "unsettled" else f"most likely {best}, with probability {p[best]:.2f}"
    return PhaseType(start, end, kind, p, d_loss, d_llc, equal, n, note)


def _at_most(bound: float, mean: float, sd: float, dof: int | None) -> float:
    """P(a normal, or a Student variable, is at most the bound); without an error, whether the mean is."""
    if not sd > 0:
        return float(mean <= bound)
    z = (bound - mean) / sd
    return float(ndtr(z) if dof is None else stdtr(dof, z))


def _with_error(change: Change | None, sd: float | None) -> Change | None:
    if change is None or change.se is not None or sd is None:
        return change
    return Change(change.value, float(np.sqrt(2) * sd), change.steps)


def _pick(series: Sequence[Series], name: str | None, what: str) -> Series:
    if name is None:
        matching = [s for s in series if s.name == what or s.name.endswith(f"/{what}")]
    else:
        matching = [s for s in series if s.name == name]
    if len(matching) != 1:
        known = ", ".join(s.name for s in matching or series)
        asked = f"called …/{what}" if name is None else f"{name!r}"
        raise DataError(f"expected one series {asked}, found {len(matching)}: choose with {what}=..., from {known}")
    return matching[0]
