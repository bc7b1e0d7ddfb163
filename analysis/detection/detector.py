"""`Detector`: the search of one series for what is there, and whether it is abrupt.

The steps, each a file: axis, noise, windows, chain, spline and measure, abrupt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import chi2, norm
from scipy.stats import t as student

from devmon.analysis.derive.from_anything import accepted
from devmon.analysis.detection.axis import averaged, bins, counts, log_axis
from devmon.analysis.detection.chain import Chain
from devmon.analysis.detection.constants import EXACT, FEWEST, PHIS, RATIO, SMALLEST, SPAN, TAIL
from devmon.analysis.detection.events import Event, Fit, Noise, Trend
from devmon.analysis.detection.measure import Ruler
from devmon.analysis.detection.noise import correlation, covariance, of_replicates, spikes, without_rises
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
        return self._fit(Series(name, steps, values, se, smallest=smallest, replicates=replicates))

    def fit_all(self, series: Sequence[Series]) -> list[Fit]:
        """Search many series; those measured at the same steps share their windows and nulls."""
        return [self._fit(one) for one in series]

    def _fit(self, series: Series) -> Fit:
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
        return Search(self, series, t, y, se, replicates, notes).fit()


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
        if replicates is not None:
            self._measured(averaged(replicates, starts) / self.scale)
        else:
            self._estimated(None if se is None else averaged(se, starts) / self.scale)
        self.sd = np.maximum(self.sd, EXACT)
        self.statistics = self.windows.statistics(self.values[:, None], self.sd[:, None], self.phi)[:, 0] * self.wider
        self.null = self.windows.null(self.phi, self.known, detector.n_null, detector.seed)

    def _estimated(self, se: Array | None) -> None:
        """The noise from the curve itself, bounded by given errors."""
        self.phi, self.sd = self._of_the_curve()
        if se is not None:
            self.known, self.source, excess = "bounded", "se", self.sd / se
            # none is lower than elsewhere, for se tells how the size of the noise goes over steps
            self.sd = self._bounded(se, np.maximum(excess, min(float(np.median(excess)), 1.0)), "their standard errors")

    def _of_the_curve(self) -> tuple[float, Array]:
        """Correlation and sd (places,) of the noise, from the values alone."""
        # rises between rests hide these: they are taken out where the likelihood pays for each of their changes
        rests, taken = without_rises(self.x, self.values)
        loglik, sd = self.windows.noise.fit(np.stack([self.values, rests], axis=1)[:, : 1 + (taken > 0)])
        which = int(loglik[:, -1].max() - taken * self.windows.noise.cost > loglik[:, 0].max())
        k, free = correlation(loglik[:, which]), len(rests) - 2
        return PHIS[k], sd[k, :, which] * np.sqrt(free / max(free - which * taken, 1))

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
            usual[mine] = np.median(found[mine]) * (count - 1) / chi2.median(count - 1)
        free = 2 * (count - 1)
        widening = student.isf(TAIL, free) / norm.isf(TAIL)
        # a spread below what chance makes of so few is chance
        self.wider = 1 / (np.sqrt(np.maximum((found + usual) / 2, chi2.ppf(TAIL, free) / free)) * widening)
        # the same everywhere: where the curve changes fast, its scatter is no noise
        excess = np.full(len(sd), max(float(np.median(self._of_the_curve()[1] / sd)), 1.0))
        self.sd = self._bounded(sd, excess, "their replicates tell")

    def fit(self) -> Fit:
        detector = self.detector
        # what surely alternates, and the curve between any two places
        threshold = float(np.quantile(self.null, 1 - detector.alpha))
        extrema = {order: self.windows.extrema(self.statistics, order, threshold) for order in Order}
        splines: dict[tuple[int, int], Spline] = {}
        correlations = covariance(self.points, self.phi)

        def spline(start: int, end: int) -> Spline:
            """The curve from one place to another, on at least five and at most 120 places."""
            last = len(self.x) - 1
            short = max(0, 4 - (end - start))
            start, end = max(0, start - (short + 1) // 2), min(last, end + (short + 1) // 2)
            if (start, end) not in splines:
                j = np.unique(np.round(np.linspace(start, end, min(end - start + 1, 120))).astype(int))
                noise = correlations[np.ix_(j, j)] * np.outer(self.sd[j], self.sd[j])
                splines[start, end] = Spline(self.x[j], self.values[j], noise, detector.seed)
            return splines[start, end]

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
        back = trend(self.x, self.values, self.sd, spline, detector.level)
        low, mean, high = (self.offset + self.scale * part for part in back)
        steps = np.clip(10.0**self.x - self.first, self.steps[0], self.steps[-1])
        tests = {"turn": Order.SLOPE, "slope": Order.CHANGE}
        p_values = {name: self._p_values(order, extrema[order]) for name, order in tests.items()}
        return Fit(
            "EVENTS" if events else "NO EVENT", events, Trend(steps, mean, low, high), noise, p_values,
            tuple(self.notes), asdict(detector), self.series.name, found, self.smallest * self.scale,
        )  # fmt: skip

    def _p_values(self, order: int, found: list[Extremum]) -> tuple[float, ...]:
        """The p-value of each extremum; where there is none, that of the level at which the first appears."""
        if found:
            return tuple(p_value(one.evidence, self.null) for one in found)
        low, high = 0, len(self.null) - 1
        while high - low > 1:  # the highest of the simulated nulls beyond which there still is an extremum
            middle = (low + high) // 2
            inside = bool(self.windows.extrema(self.statistics, order, float(self.null[middle])))
            low, high = (middle, high) if inside else (low, middle)
        return (float(1 - low / len(self.null)),)
