"""`Detector`: the search of one series for jumps, bumps, turns and plateaus, each with its errors and its null."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from devmon.analysis.detection.curve import MANY, Curve
from devmon.analysis.detection.events import Event, Fit, Noise, Trend, part_of
from devmon.analysis.detection.jumps import JumpSearch, find_jumps, joined
from devmon.analysis.detection.null_model import Grid
from devmon.analysis.detection.plateaus import Plateau, find_plateaus
from devmon.analysis.detection.scan import Path, Scan
from devmon.analysis.detection.shapes import BRIEF, PULSE, Jump, with_shapes
from devmon.analysis.detection.turns import Turn, find_turns, is_flank
from devmon.analysis.series import Array, blocks, checked, floored, straightness
from devmon.errors import DataError

FEWEST = 8  # finite points below which nothing is said
MOST_CHECKPOINTS = 600  # more are averaged in blocks of neighbours
EXACT = 1e-10  # distance from a straight line, as a share of the range, that is rounding
FLANK = 0.0025  # p-value up to which a jump stands beside a turn of which it is the flank
SURE = 0.80  # share of the posterior in which a plateau is slow
SEARCHES = {"scan": ("jump", "bump"), "turn": ("turn",), "plateau": ("plateau",)}
PRICES = {"scan": 3.0, "turn": 8.0, "plateau": 12.0}  # what a p-value is multiplied by where all three are made
CALM = 0.125  # of these prices where the noise is plainly white
KINDS = tuple(kind for kinds in SEARCHES.values() for kind in kinds)


@dataclass(frozen=True)
class Ready:
    """A checked series: steps, values shifted by `offset` and divided by `scale`, errors or None, notes so far."""

    steps: Array
    unit: Array
    se: Array | None
    offset: float
    scale: float
    notes: tuple[str, ...]
    name: str


@dataclass(frozen=True)
class Detector:
    """Settings of the search. `alpha` is the false-alarm rate of one series, over all kinds; `level` that of the
    intervals.

    Jumps and bumps are sought by one search, turns by another and plateaus by a third. Every p-value is multiplied by
    the price of its search (a weighted Bonferroni correction), so that a series without events shows one with
    probability alpha at most; turns pay for the scan too, whose shapes imply them. The inverse prices add up to thirteen
    twenty-fourths: now and then a random walk looks like a smooth curve with little noise, and the rest of the budget pays for
    that (benchmarks/detection.py). Where there are MANY checkpoints and their noise is plainly white, which a random walk's
    is not, the prices are CALM times as high, and at least 1.
    `n_null` series are simulated per test; p-values below 1 / (n_null + 1) come from the tail of the simulated ones
    (`scan.tail_p`). At most `most` jumps and bumps are sought.
    """

    alpha: float = 0.05
    kinds: tuple[str, ...] = KINDS
    n_null: int = 199
    seed: int = 0
    level: float = 0.90
    most: int = 4

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - set(KINDS)
        if unknown or not self.kinds:
            raise DataError(f"kinds are chosen from {KINDS}, got {self.kinds}")
        for name in ("alpha", "level"):
            if not 0 < getattr(self, name) < 1:
                raise DataError(f"{name} lies between 0 and 1, got {getattr(self, name)}")
        if self.alpha * (self.n_null + 1) < 1:
            raise DataError(f"n_null={self.n_null} simulated nulls cannot show alpha={self.alpha}: raise n_null")

    @property
    def searches(self) -> tuple[str, ...]:
        return tuple(search for search, kinds in SEARCHES.items() if set(kinds) & set(self.kinds))

    def fit(self, steps: Any, values: Any, se: Any = None, *, name: str = "") -> Fit:
        """Search one series; NaN values are missing points. Raises DataError on malformed input (see series.py)."""
        return self.fit_all([(steps, values, se, name)])[0]

    def fit_all(self, series: Sequence[tuple[Any, Any, Any, str]]) -> list[Fit]:
        """Search many series (steps, values, se, name); what those measured at the same steps share is done once."""
        checked_series = [self._ready(*one) for one in series]
        fits = {i: one for i, one in enumerate(checked_series) if isinstance(one, Fit)}
        ready = {i: one for i, one in enumerate(checked_series) if isinstance(one, Ready)}
        alike: dict[bytes, list[int]] = {}
        for i, one in ready.items():
            if one.se is None:
                alike.setdefault(one.steps.tobytes(), []).append(i)
        for steps, which in alike.items():
            scan = _shared(steps, self.most, self.seed)
            units = np.stack([scan.grid.average(ready[i].unit) for i in which], axis=1)
            path = scan.path(units)
            for n, i in enumerate(which):
                fits[i] = self._fit(ready[i], scan, path.of(n))
        for i, one in ready.items():
            if one.se is not None:
                scan = _own(one.steps.tobytes(), one.se.tobytes(), self.most, self.seed)
                fits[i] = self._fit(one, scan, None)
        return [fits[i] for i in range(len(checked_series))]

    def _ready(self, steps: Any, values: Any, se: Any, name: str) -> Ready | Fit:
        t, y, s = checked(steps, values, se, name)
        settings = asdict(self)
        missing = np.size(values) - len(t)
        notes = [f"{missing} of {np.size(values)} points are NaN: skipped"] if missing else []
        if len(t) == 0 and np.size(values) > 0:
            return Fit("SAMPLER REJECTED", notes=("no finite value",), settings=settings, series=name)
        if len(t) < FEWEST:
            note = f"{len(t)} finite points, at least {FEWEST} are needed: measure more checkpoints"
            return Fit("UNRESOLVED", notes=(note, *notes), settings=settings, series=name)
        if len(t) > MOST_CHECKPOINTS:
            block = -(-len(t) // MOST_CHECKPOINTS)
            notes.append(f"{len(t)} checkpoints averaged in blocks of {block}")
            t, y, s = blocks(t, block), blocks(y, block), None if s is None else blocks(s, block)
        s = floored(s, notes)
        offset, scale = float(np.mean(y)), float(np.ptp(y))
        if scale <= 1e-12 * max(abs(offset), 1e-300):
            return _plain(t, y, (*notes, "all values are equal"), settings, name)
        unit = (y - offset) / scale
        if straightness(t, unit) < EXACT:
            return _plain(t, y, (*notes, "an exact straight line in log step"), settings, name)
        return Ready(t, unit, s, offset, scale, tuple(notes), name)

    def _fit(self, ready: Ready, scan: Scan, path: Path | None) -> Fit:
        notes, t = list(ready.notes), ready.steps
        search, curve, calm = self._search(scan, ready.unit, path)
        if (local := curve.noise_profile()) is not None:
            notes.append("the noise changes size over training: estimated from the residuals")
            search, curve, calm = self._search(_local(t, local, scan), ready.unit, None)
        grid = search.null.grid
        if search.null.spikes:
            where = ", ".join(f"{step:g}" for step in sorted(grid.step_of(grid.x[list(search.null.spikes)])))
            notes.append(f"left out as isolated spikes: steps {where}")
        p_values: dict[str, tuple[float, ...]] = {}
        found: list[tuple[Event, Array]] = []
        bumps: list[Event] = []
        if "scan" in self.searches:
            p_values["scan"] = tuple(self._adjusted(p, "scan", calm) for p in search.p_values) or (1.0,)
            brief = [jump for jump in search.jumps if jump.form == PULSE and jump.middle[1] <= BRIEF]
            found += [self._jump(jump, grid, ready, calm) for jump in joined(search.jumps)]
            found += [self._bump(jump, grid, ready, calm) for jump in brief]
            bumps = [event for event, _ in found if event.kind == "bump"]
        turns = []
        if set(self.searches) != {"scan"}:
            turns = [(turn, self._turn_p(turn, calm)) for turn in find_turns(curve, n_null=self.n_null)]
        if "turn" in self.searches:
            p_values["turn"] = tuple(p for _, p in turns) or (1.0,)
            told = [self._turn(turn, p, grid, ready) for turn, p in turns if p <= self.alpha]
            found += [(turn, draws) for turn, draws in told if not any(part_of(turn, bump) for bump in bumps)]
        if "plateau" in self.searches:
            sure, alpha = [turn for turn, p in turns if p <= self.alpha], self.alpha / self._price("plateau", calm)
            plateaus = find_plateaus(curve, sure, alpha=alpha, n_null=self.n_null)
            p_values["plateau"] = tuple(self._adjusted(one.p_value, "plateau", calm) for one in plateaus) or (1.0,)
            found += [self._plateau(plateau, grid, ready, calm) for plateau in plateaus if plateau.sure >= SURE]
        found = sorted(((e, d) for e, d in found if e.kind in self.kinds), key=lambda pair: pair[0].step)
        mean, low, high = (ready.offset + ready.scale * part for part in curve.band(grid.raw_x, self.level))
        theta = grid.thetas[curve.best]
        noise = Noise(ready.scale * curve.noise_sd, theta.rho * (1 - theta.white))
        events = tuple(event for event, _ in found)
        outcome = "EVENTS" if events else "NO EVENT"
        trend = Trend(t, mean, low, high)
        return Fit(outcome, events, trend, noise, p_values, tuple(notes), asdict(self), ready.name, tuple(found))

    def _search(self, scan: Scan, unit: Array, path: Path | None) -> tuple[JumpSearch, Curve, bool]:
        """The jumps, the curve with them, and whether the noise is plainly white."""
        points = scan.grid.average(unit)
        path = scan.path(points[:, None]) if path is None else path
        white = [theta.rho == 0 for theta in scan.grid.thetas]
        calm = len(points) >= MANY and float(path.weights[white, 0].sum()) >= 0.5
        alpha = self.alpha / self._price("scan", calm)
        search = find_jumps(scan, points, path, alpha=alpha, n_null=self.n_null, most=self.most)
        search = self._without_flanks(search, points, calm) if "turn" in self.searches else search
        return search, Curve(search.null, search.jumps, points, self.seed), calm

    def _without_flanks(self, search: JumpSearch, points: Array, calm: bool) -> JumpSearch:
        """The search without the jumps that are not sure and are the flanks of turns found without them."""
        sure = [jump.form == PULSE or self._adjusted(jump.p_value, "scan", calm) <= FLANK for jump in search.jumps]
        if all(sure):
            return search
        grid, spikes = search.null.grid, search.null.spikes
        kept = list(itertools.compress(search.jumps, sure))
        plain = Curve(with_shapes(grid, kept, spikes), kept, points, self.seed)
        turns = [turn for turn in find_turns(plain, n_null=self.n_null) if self._turn_p(turn, calm) <= self.alpha]
        flank = [any(is_flank(jump, turn, turns) for turn in turns) for jump in search.jumps]
        kept = [jump for jump, one, other in zip(search.jumps, sure, flank, strict=True) if one or not other]
        return JumpSearch(kept, search.p_values, with_shapes(grid, kept, spikes))

    def _price(self, search: str, calm: bool = False) -> float:
        paid = {"scan", *self.searches} if "turn" in self.searches else self.searches  # shapes imply turns
        made = sum(1 / PRICES[other] for other in paid) / sum(1 / price for price in PRICES.values())
        return max(PRICES[search] * made * (CALM if calm else 1.0), 1.0)

    def _adjusted(self, p: float, search: str, calm: bool = False) -> float:
        return min(p * self._price(search, calm), 1.0)

    def _turn_p(self, turn: Turn, calm: bool) -> float:
        """As sure as its prominence or the shapes that imply it, each at the price of its search."""
        return min(self._adjusted(turn.p_value, "turn", calm), self._adjusted(turn.implied, "scan", calm))

    def _event(self, kind: str, place: Array, size: Array, p: float, span: tuple[float, float] | None, vague: str,
               grid: Grid, ready: Ready) -> tuple[Event, Array]:  # fmt: skip
        """An event from draws of its place (on the time axis) and size, its adjusted p-value and the ends of its span (on
        the time axis)."""
        steps = grid.step_of(place)
        low, middle, high = self._quantiles(steps)
        small, typical, large = self._quantiles(ready.scale * size)
        ends = None if span is None else (float(grid.step_of(span[0])), float(grid.step_of(span[1])))
        width = None if ends is None else float(np.log10(ends[1] / max(ends[0], 1e-3 * ends[1])))
        start, end = (low, high) if ends is None else ends
        inside = int(np.sum((ready.steps >= start) & (ready.steps <= end)))
        note = "" if inside >= 3 else vague + _add(ready.steps, start, end)
        event = Event(
            kind, middle, (low, high), typical, (small, large), width, ends, p, None, inside >= 3, note,
            ready.name, _percentiles(steps),
        )  # fmt: skip
        return event, np.sort(steps)

    def _jump(self, jump: Jump, grid: Grid, ready: Ready, calm: bool) -> tuple[Event, Array]:
        (x, width), p = jump.middle, self._adjusted(jump.p_value, "scan", calm)
        span = x - width / 2, x + width / 2
        return self._event("jump", jump.centre, jump.size, p, span, "abruptness unresolved", grid, ready)

    def _bump(self, jump: Jump, grid: Grid, ready: Ready, calm: bool) -> tuple[Event, Array]:
        (x, width), p = jump.middle, self._adjusted(jump.p_value, "scan", calm)
        span = x - 0.4 * width, x + 0.4 * width  # the width of a pulse is 1.25 times its full width at half maximum
        return self._event("bump", jump.centre, jump.size, p, span, "width unresolved", grid, ready)

    def _turn(self, turn: Turn, p: float, grid: Grid, ready: Ready) -> tuple[Event, Array]:
        return self._event(
            "turn", turn.place, turn.size, p, None, "location between checkpoints unresolved", grid, ready
        )

    def _plateau(self, plateau: Plateau, grid: Grid, ready: Ready, calm: bool) -> tuple[Event, Array]:
        p = self._adjusted(plateau.p_value, "plateau", calm)
        return self._event("plateau", plateau.place, plateau.size, p, plateau.span, "length unresolved", grid, ready)

    def _quantiles(self, draws: Array) -> tuple[float, float, float]:
        tail = (1 - self.level) / 2
        low, middle, high = np.quantile(draws, [tail, 0.5, 1 - tail])
        return float(low), float(middle), float(high)


@lru_cache(maxsize=4)
def _shared(steps: bytes, most: int, seed: int) -> Scan:
    """The grid of covariances, its scan and simulated nulls, shared by all series at the same steps."""
    return Scan(Grid(np.frombuffer(steps)), most, seed)


@lru_cache(maxsize=2)
def _own(steps: bytes, se: bytes, most: int, seed: int) -> Scan:
    """The same where noise shaped like the standard errors of one series competes."""
    return Scan(Grid(np.frombuffer(steps), np.frombuffer(se)), most, seed, _shared(steps, most, seed))


def _local(steps: Array, sd: Array, flat: Scan) -> Scan:
    return Scan(Grid(steps, sd, flat=False), flat.depth, flat.seed, flat)


def _plain(t: Array, y: Array, notes: tuple[str, ...], settings: dict[str, Any], name: str) -> Fit:
    return Fit("NO EVENT", (), Trend(t, y, y, y), Noise(0.0, 0.0), {}, notes, settings, name)


def _add(t: Array, start: float, end: float) -> str:
    """Name up to three whole steps, evenly spaced in log step, between the checkpoints around start and end."""
    before = t[t <= start][-1] if np.any(t <= start) else t[0]
    after = t[t >= end][0] if np.any(t >= end) else t[-1]
    origin = float(t[t > 0][0])
    inner = np.geomspace(before + origin, after + origin, 5)[1:-1] - origin
    wanted = sorted({int(step) for step in np.round(inner)} - {int(step) for step in t})
    wanted = [step for step in wanted if before < step < after]
    if not wanted:
        return " (no step lies between the checkpoints)"
    return ": measure step" + ("s " if len(wanted) > 1 else " ") + ", ".join(map(str, wanted))


def _percentiles(steps: Array) -> tuple[float, ...]:
    return tuple(float(q) for q in np.quantile(steps, np.arange(1, 100) / 100))
