"""`Detector`: the search of one series for what is there, and whether it is abrupt.

The steps, each a file: axis, noise, windows, chain, spline and measure, abrupt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import gammaincinv, ndtri, stdtrit

from devmon.analysis.derive.from_anything import accepted
from devmon.analysis.detection.axis import averaged, bins, counts, log_axis
from devmon.analysis.detection.chain import Chain
from devmon.analysis.detection.constants import EXACT, FEWEST, MANY, PHIS, RATIO, SMALLEST, SPAN, TAIL
from devmon.analysis.detection.events import Event, Fit, Noise, Trend, TrendLater
from devmon.analysis.detection.measure import Ruler
from devmon.analysis.detection.noise import before_divergence, correlation, of_replicates, spikes, without_rises
from devmon.analysis.detection.spline import Spline, trend
from devmon.analysis.detection.windows import Extremum, Order, Windows, p_value, windows_of
from devmon.analysis.series import Array, Series, checked, checked_replicates, floored
from devmon.errors import DataError


@dataclass(frozen=True)
class Detector:
    """Settings of the search. `alpha` is the false-alarm rate of one series, over all places, sizes and kinds, for
    "is it there" and again for "is it abrupt"; `level` that of the intervals. Of the events only `kinds` are
    reported. The null is simulated `n_null` times.
    """

    alpha: float = 0.05
    kinds: tuple[str, ...] = ("jump", "bump", "turn", "plateau")
    n_null: int = 299
    seed: int = 0
    level: float = 0.90

    def __post_init__(self) -> None:
        known = Detector.kinds  # the default: all
        if set(self.kinds) - set(known) or not self.kinds:
            raise DataError(f"kinds are chosen from {known}, got {self.kinds}")
        for name in ("alpha", "level"):
            if not 0 < getattr(self, name) < 1:
                raise DataError(f"{name} lies between 0 and 1, got {getattr(self, name)}")
        if self.alpha * (self.n_null + 1) < 1:
            raise DataError(f"n_null={self.n_null} simulated nulls cannot show alpha={self.alpha}: raise n_null")

    def fit(self, steps: Any, values: Any, se: Any = None, replicates: Any = None, *, name: str = "",
            smallest: float = 0.0) -> Fit:  # fmt: skip
        """Search one series; NaN values are missing points. `replicates` (R, n) is the same quantity on R groups of
        items or by R chains; nothing smaller than `smallest` is an event. Raises DataError on malformed input (see
        series.py)."""
        return self.fit_all([Series(name, steps, values, se, smallest=smallest, replicates=replicates)])[0]

    def fit_all(self, series: Sequence[Series]) -> list[Fit]:
        """Search many series; those measured at the same steps share their windows and nulls."""
        begun = [self._begin(one) for one in series]
        curve_noise([one for one in begun if isinstance(one, Search)])
        return [one.fit() if isinstance(one, Search) else one for one in begun]

    def _begin(self, series: Series) -> Fit | Search:
        """The search of a series; or what is said without one."""
        # what is missing, and what can be said without a search
        refused = 0 if series.rejected is None else int(np.sum(series.rejected))
        notes = [*series.notes, *([f"{refused} of {len(series.values)} points rejected"] if refused else [])]
        series, settings = accepted(series), asdict(self)
        t, y, se = checked(series.steps, series.values, series.se, series.name)
        replicates = checked_replicates(series, t, notes)
        total = np.size(series.values)
        if len(t) == 0 and total > 0:
            finite = np.isfinite(np.asarray(series.values, dtype=np.float64)).any()
            note = f"{total} of {total} points have no finite se" if finite else "no finite value"
            return Fit("SAMPLER REJECTED", notes=(note, *notes), settings=settings, series=series.name)
        if len(t) < total:
            notes.append(f"{total - len(t)} of {total} points are NaN: skipped")
            if not refused and ends_early(np.asarray(series.values, dtype=np.float64)):
                notes.append(f"no finite value after step {t[-1]:g}")
        # a run that diverges: beside its last values nothing else is seen
        if (end := before_divergence(y)) < len(y):
            notes.append(f"diverges from step {t[end]:g} on, to {y[-1]:.2g}: searched up to there")
            t, y, se = t[:end], y[:end], None if se is None else se[:end]
            replicates = None if replicates is None else replicates[:, :end]
        if len(t) < FEWEST:
            note = f"{len(t)} finite points, at least {FEWEST} are needed: measure more checkpoints"
            return Fit("UNRESOLVED", notes=(note, *notes), settings=settings, series=series.name)
        se = floored(se, notes)
        if np.ptp(y) <= 1e-12 * max(abs(float(np.mean(y))), 1e-300):
            flat, notes = Trend(t, y, y, y), [*notes, "all values are equal"]
            return Fit("NO EVENT", (), flat, Noise(0.0, 0.0), {}, tuple(notes), settings, series.name)
        # single outlying points are left out where nothing says that they are measured so
        if se is None and replicates is None and np.any(odd := spikes(y)):
            notes.append(f"left out as isolated spikes: steps {', '.join(f'{step:g}' for step in t[odd])}")
            t, y = t[~odd], y[~odd]
        return Search(self, series, t, y, se, replicates, notes)


def ends_early(values: Array) -> bool:
    """Whether values are missing at the end, more than two and more than ever in between."""
    there = np.flatnonzero(np.isfinite(values))
    gaps = np.diff(there, prepend=-1) - 1
    return len(values) - 1 - int(there[-1]) > max(2, int(gaps.max()))


class Search:
    """The search of one checked series, in units of its range."""

    def __init__(self, detector: Detector, series: Series, t: Array, y: Array, se: Array | None,
                 replicates: Array | None, notes: list[str]) -> None:  # fmt: skip
        self.detector, self.series, self.steps, self.notes = detector, series, t, notes
        starts = bins(t)
        axis, self.first = log_axis(t)
        self.points = counts(starts, len(t))
        self.x, values = averaged(axis, starts), averaged(y, starts)
        if len(starts) < len(t):
            notes.append(f"{len(t)} checkpoints averaged in {len(starts)} places of equal width in log step")
        self.scale, self.offset = float(np.ptp(values)), float(np.mean(values))
        self.values = (values - self.offset) / self.scale
        self.smallest = max(series.smallest / self.scale, SMALLEST)
        self.known = self.source = "estimated"
        self.phi, self.sd, self.wider = 0.0, np.ones(1), np.ones(1)
        self.windows: Windows = windows_of(self.x.tobytes(), self.points.tobytes())
        self.se = None if se is None else averaged(se, starts) / self.scale
        self.replicates = None if replicates is None else averaged(replicates, starts) / self.scale
        # rises between rests hide the noise: they are taken out where the likelihood pays for each of their changes
        self.rests, self.taken = without_rises(self.x, self.values)
        self.curve: tuple[float, Array] = (0.0, np.ones(1))  # correlation and sd (places,), see `curve_noise`

    def _weigh(self) -> None:
        """The noise, and every statistic beside it and its null."""
        if self.replicates is not None:
            self._measured(self.replicates)
        else:
            self._estimated(self.se)
        self.sd = np.maximum(self.sd, EXACT)
        self.statistics = self.windows.statistics(self.values[:, None], self.sd[:, None], self.phi)[:, 0] * self.wider
        self.null = self.windows.null(self.phi, self.known, self.detector.n_null, self.detector.seed)

    def _estimated(self, se: Array | None) -> None:
        """The noise from the curve itself, bounded by given errors."""
        self.phi, self.sd = self.curve
        if se is not None:
            self.known, self.source, excess = "bounded", "se", self.sd / se
            # none is lower than elsewhere, for se tells how the size of the noise goes over steps
            self.sd = self._bounded(se, np.maximum(excess, min(float(np.median(excess)), 1.0)), "their standard errors")

    def _bounded(self, measured: Array, excess: Array, what: str) -> Array:
        """Measured errors, exceeded by the scatter of the values (the training's own jitter, or structure) as far as
        the places bear it out: the errors weigh as much as SPAN places."""
        weight = len(self.x) / (len(self.x) + SPAN)
        if (typical := float(np.median(excess))) > RATIO:
            self.notes.append(f"the values scatter {typical:.1f} times as much as {what}: taken as noise")
        return measured * np.where(excess > 1, excess**weight, excess)

    def _measured(self, replicates: Array) -> None:
        """The noise from the replicates: their AR(1) model, for each window how far their spread departs from it, and
        the jitter that they have in common, from the curve. The spread of R contrasts has R - 1 degrees of freedom, and
        as many again are given to its median over windows of one size; a t quantile widens what these leave unsure."""
        windows, count = self.windows, len(replicates)
        k, sd = of_replicates(windows.noise, replicates)
        self.phi, self.known, self.source = PHIS[k], "measured", "replicates"
        sd = np.maximum(sd, EXACT)
        spread = (replicates - replicates.mean(0)).T / np.sqrt(count * (count - 1))
        found = np.sum(windows.statistics(spread, np.repeat(sd[:, None], count, axis=1), self.phi) ** 2, axis=1)
        usual = np.ones(len(found))
        for order, m in sorted(set(zip(windows.order.tolist(), windows.lengths.tolist(), strict=True))):
            mine = (windows.order == order) & (windows.lengths == m)
            usual[mine] = np.median(found[mine]) * (count - 1) / chi2_quantile(0.5, count - 1)
        free = 2 * (count - 1)
        widening = stdtrit(free, TAIL) / ndtri(TAIL)
        # a spread below what chance makes of so few is chance
        self.wider = 1 / (np.sqrt(np.maximum((found + usual) / 2, chi2_quantile(TAIL, free) / free)) * widening)
        # the same everywhere: where the curve changes fast, its scatter is no noise
        excess = np.full(len(sd), max(float(np.median(self.curve[1] / sd)), 1.0))
        self.sd = self._bounded(sd, excess, "their replicates tell")

    def fit(self) -> Fit:
        detector = self.detector
        self._weigh()
        # what surely alternates, and the curve between any two places
        threshold = float(np.quantile(self.null, 1 - detector.alpha))
        extrema = {order: self.windows.extrema(self.statistics, order, threshold) for order in Order}
        spline = self._curves()

        # what of it is large enough to name, and what is said of that
        chain = Chain(self.x, self.values, spline, [*extrema[Order.SLOPE], *extrema[Order.CHANGE]], self.smallest)
        ruler = Ruler(
            chain, self.sd, self.null, level=detector.level, alpha=detector.alpha, first=self.first, scale=self.scale,
            steps=self.steps, name=self.series.name,
        )  # fmt: skip
        found = tuple((event, draws) for event, draws in ruler.events() if event.kind in detector.kinds)
        events: tuple[Event, ...] = tuple(event for event, _ in found)
        # what else a fit says: the p-values of all tests, the noise, the smoothed curve
        noise = Noise(self.scale * float(np.median(self.sd)), self.phi, self.source)
        tests = {"turn": Order.SLOPE, "slope": Order.CHANGE}
        p_values = {name: self._p_values(order, extrema[order]) for name, order in tests.items()}
        return Fit(
            "EVENTS" if events else "NO EVENT", events, TrendLater(self._trend), noise, p_values,
            tuple(self.notes), asdict(detector), self.series.name, found, self.smallest * self.scale,
        )  # fmt: skip

    def _curves(self) -> Callable[[int, int, int, int], Spline]:
        """The curve from one place to another, on at least five and at most MANY places, each made once: of more, half
        lie evenly over all of it and half about what is looked at, between two places within."""
        splines: dict[bytes, Spline] = {}
        correlations = self.windows.correlations(self.phi)

        def spline(start: int, end: int, left: int, right: int) -> Spline:
            last = len(self.x) - 1
            short = max(0, 4 - (end - start))
            start, end = max(0, start - (short + 1) // 2), min(last, end + (short + 1) // 2)
            j = np.arange(start, end + 1)
            if len(j) > MANY:
                half = MANY // 2
                near = np.linspace(max(start, left - half // 4), min(end, right + half // 4), half)
                j = np.unique(np.round(np.append(np.linspace(start, end, half), near)).astype(int))
            if (key := j.tobytes()) not in splines:
                noise = correlations[j][:, j] * np.outer(self.sd[j], self.sd[j])
                splines[key] = Spline(self.x[j], self.values[j], noise, self.detector.seed)
            return splines[key]

        return spline

    def _trend(self) -> Trend:
        """The smoothed curve, in steps and units of the series."""
        back = trend(self.x, self.values, self.sd, self._curves(), self.detector.level)
        low, mean, high = (self.offset + self.scale * part for part in back)
        steps = np.clip(10.0**self.x - self.first, self.steps[0], self.steps[-1])
        return Trend(steps, mean, low, high)

    def _p_values(self, order: int, found: list[Extremum]) -> tuple[float, ...]:
        """The p-value of each extremum; where there is none, that of the level at which the first appears."""
        if found:
            return tuple(p_value(one.evidence, self.null) for one in found)
        low, high = 0, len(self.null) - 1
        both = self.windows.both_signs(self.statistics, order)
        while high - low > 1:  # the highest of the simulated nulls beyond which there still is an extremum
            middle = (low + high) // 2
            level = float(self.null[middle])
            inside = level < both and bool(self.windows.extrema(self.statistics, order, level))
            low, high = (middle, high) if inside else (low, middle)
        return (float(1 - low / len(self.null)),)


def chi2_quantile(share: float, free: int) -> float:
    """The quantile of chi squared, without scipy.stats, which takes longer to import than a small run to search."""
    return float(2 * gammaincinv(free / 2, share))


def curve_noise(searches: Sequence[Search]) -> None:
    """Correlation and sd (places,) of the noise of each, from its values alone, those on the same places together."""
    alike: dict[int, list[Search]] = {}
    for one in searches:
        alike.setdefault(-id(one) if one.taken else id(one.windows), []).append(one)
    for group in alike.values():
        first, model = group[0], group[0].windows.noise
        # where rises may be taken out, with and without them
        curves = [first.values, first.rests] if first.taken else [one.values for one in group]
        loglik, sd = model.fit(np.stack(curves, axis=1), alone=not first.taken)
        for i, one in enumerate(group):
            out = int(one.taken and loglik[:, -1].max() - one.taken * model.cost > loglik[:, 0].max())
            k, free = correlation(loglik[:, i + out]), len(one.values) - 2
            one.curve = PHIS[k], sd[k, :, i + out] * np.sqrt(free / max(free - out * one.taken, 1))
