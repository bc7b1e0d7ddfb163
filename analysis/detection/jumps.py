"""Jumps: rises and falls that smooth drift and autocorrelated noise do not explain, each located with its errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from devmon.analysis.detection.null_model import Whitened, normalised
from devmon.analysis.detection.scan import TIGHT, Path, Scan
from devmon.analysis.detection.shapes import (
    LOG,
    PULSE,
    RISE,
    SIDE,
    SKEWED,
    STEP,
    WIDTHS,
    Jump,
    Shapes,
    columns_of,
    shapes_of,
    with_shapes,
)
from devmon.analysis.detection.spikes import SPIKE, isolated, points_of_spikes
from devmon.analysis.series import Array

WIDEST = 1.2  # decades; slower changes are drift
LIKELY = 10  # covariances over which a location is averaged
FAR = 10.0  # covariances this much less likely than the best, with and without shapes, play no part in what is found
KEPT = 0.70  # share of a jump that drift leaves standing
UNKINKED = 0.5  # share of a pulse that neither drift nor a kink of it explains
SURE = 0.90  # share of the posterior in which a jump has the sign that it most likely has
STEEPER = 2.5  # a jump is at least this many times as steep as the curve beside it


@dataclass(frozen=True)
class JumpSearch:
    """The jumps and pulses found, the p-value of every test, and the model that holds them and the spikes left out."""

    jumps: list[Jump]
    p_values: list[float]
    null: Whitened


def find_jumps(scan: Scan, y: Array, first: Path, *, alpha: float, n_null: int, most: int) -> JumpSearch:
    """All jumps and pulses at once, then one at a time beside those found, until the next is not significant.

    `first` is the scan's path through y. A point, or a pair of neighbours, that leaves and comes back explains itself:
    where that is the better account, or what was found is no longer than that, or no jump is left to find, it is left out
    and the test is made again. A jump without a certain sign, wider than WIDEST or hardly steeper than its surroundings
    is none: its test counts with p = 1.
    """
    null, path, whole = scan.null, first, scan
    found: list[Jump] = []
    p_values: list[float] = []
    spikes: tuple[int, ...] = ()
    while True:
        p, gains = 1.0, np.array([-np.inf])
        spike, spike_gain = isolated(null, y)
        possible = len(scan.shapes.centre) > 0 and null.df >= 6 and len(found) < most
        if possible:
            gains, picks = path.gains[0], path.picks[0]
            if not spike_gain > max(SPIKE, gains[0]):
                p, count = scan.test(path, n_null)
        kept: list[Jump] = []
        if p <= alpha:
            if scan is whole:
                scan = whole.only(np.flatnonzero(path.behind[:, 0] > -FAR))
                null = with_shapes(scan.grid, [], spikes)
            start = [coarse(scan.shapes, int(j)) for j in picks[: min(count, most - len(found))]]
            kept = settle(scan, null, y, found, start, p, alpha=alpha, n_null=n_null)
            p = 1.0 if not kept else p
        room = len(spikes) < max(2, len(y) // 10)
        if kept and room and (brief := points_of_spikes(scan.grid, kept, found, y, spikes) - set(spikes)):
            spikes += tuple(sorted(brief))
        elif kept:
            found += kept
            p_values += [jump.p_value for jump in kept]
        elif spike_gain > SPIKE and room:
            spikes += spike
        else:
            return JumpSearch(found, [*p_values, p] if possible else p_values, null)
        scan = scan if found else whole
        null = with_shapes(scan.grid, found, spikes)
        if len(found) < most and null.df >= 6 and len(scan.shapes.centre):
            path = scan.path(y[:, None], null, shapes_of(found), 1 if found else scan.depth)


def settle(scan: Scan, null: Whitened, y: Array, found: list[Jump], new: list[Jump], p: float, *, alpha: float,
           n_null: int) -> list[Jump]:  # fmt: skip
    """Locate the new jumps, each beside all others; those that then fail their own test or are no event are dropped."""
    spikes = null.spikes
    while new:
        located: list[Jump] = []
        for i in range(len(new)):
            others = [*found, *located, *new[i + 1 :]]
            own, mine = null, p
            if len(new) > 1:
                own = with_shapes(scan.grid, others, spikes)
                if own.df < 6:
                    return []
                path = scan.path(y[:, None], own, shapes_of(others), 1)
                mine = max(p, scan.test(path, n_null)[0])
            located.append(locate(scan, own, shapes_of(others), y, mine))
        beside = with_shapes(scan.grid, [*found, *located], spikes)
        good = [
            jump.p_value <= alpha and is_event(beside, y, [*found, *located], len(found) + i)
            for i, jump in enumerate(located)
        ]
        if all(good):
            return located
        worst = max((i for i, fine in enumerate(good) if not fine), key=lambda i: located[i].p_value)
        new = [jump for i, jump in enumerate(located) if i != worst]
    return []


def coarse(shapes: Shapes, j: int) -> Jump:
    return Jump(shapes.centre[j : j + 1], shapes.width[j : j + 1], np.ones(1), int(shapes.form[j]), 1.0)


def is_event(null: Whitened, y: Array, jumps: list[Jump], which: int) -> bool:
    """Whether one of the jumps has a certain sign, is not undone by the drift beside it and, unless it is a pulse, is
    narrow and steep."""
    jump = jumps[which]
    if jump.sure < SURE:
        return False
    if jump.form != PULSE and jump.middle[1] > WIDEST:
        return False
    steep, kept = character(null, y, jumps, which)
    return kept >= (KEPT if jump.form != PULSE else UNKINKED) and steep >= STEEPER


def character(null: Whitened, y: Array, jumps: list[Jump], which: int) -> tuple[float, float]:
    """How steep a jump is, and how much of it the curve keeps; other jumps are taken away from the curve.

    Steepness is the slope of the fitted curve over the t10-t90 of the jump, as a multiple of the slope beside it in
    windows of the same width before and after, of which the steeper counts. An exact power law or a rise over two
    decades has curvature that no noise hides, but no place that is steeper than its surroundings.

    Kept is the change of the curve over t10-t90 as a share of the change of the shape alone: a large shape that drift
    undoes at once mends a bend of the drift. Of a pulse it is the height over the mean of its two feet, or the share of
    that height which no kink explains if that is less: a kink by which the slope beyond the feet changes is half its
    change times the distance of a foot below that mean.
    """
    grid = null.grid
    c, w = jumps[which].middle
    w = max(w, float(grid.gaps[np.clip(np.searchsorted(grid.x, c) - 1, 0, len(grid.gaps) - 1)]))
    pulse = jumps[which].form == PULSE
    apart = [-2.0, -1.0, 0.0, 1.0, 2.0] if pulse else [-1.5, -0.5, 0.5, 1.5]
    at = np.clip(c + w * np.array(apart), grid.x[0], grid.x[-1])
    columns, owner = columns_of(grid, shapes_of(jumps), at)
    columns[:, (owner >= 0) & (owner != which)] = 0
    smoother, _ = null.smoother(int(np.argmax(null.loglik(null.rss(y)))), at, columns)
    curve, shape = smoother @ y, shapes_of(jumps[which : which + 1]).height(at)[0] * np.median(jumps[which].size)
    length = np.diff(at)
    slope = np.diff(curve) / np.maximum(length, 1e-9)
    if pulse:
        height, whole = (h[2] - (h[1] + h[3]) / 2 for h in (curve, shape))
        kink = abs(slope[3] - slope[0]) * w / 2 if min(length[0], length[3]) > w / 4 else 0.0
        return np.inf, float(min(height / whole, 1 - kink / max(abs(height), 1e-12) if height * whole > 0 else 0.0))
    beside = [abs(slope[i]) for i in (0, 2) if length[i] > w / 4]
    steep = float(abs(slope[1]) / max(*beside, 1e-12, 1e-12)) if beside else np.inf
    return steep, float((curve[2] - curve[1]) / (shape[2] - shape[1]))


def joined(jumps: list[Jump]) -> list[Jump]:
    """The jumps without the pulses; neighbours of one sign whose spans touch, within half of the wider, are one
    transition of another shape."""
    result: list[Jump] = []
    for jump in sorted((jump for jump in jumps if jump.form != PULSE), key=lambda jump: jump.middle[0]):
        if result and result[-1].up == jump.up:
            a, b = result[-1], jump
            start = np.minimum(a.centre - a.width / 2, b.centre - b.width / 2)
            end = np.maximum(a.centre + a.width / 2, b.centre + b.width / 2)
            between = b.middle[0] - a.middle[0] - (a.middle[1] + b.middle[1]) / 2
            if between < max(a.middle[1], b.middle[1]) / 2:
                size = a.size + b.size
                share = np.clip(a.size / np.where(size == 0, 1, size), 0, 1)
                centre = share * a.centre + (1 - share) * b.centre
                result[-1] = Jump(centre, end - start, size, a.form, min(a.p_value, b.p_value))
                continue
        result.append(jump)
    return result


def locate(scan: Scan, null: Whitened, taken: Shapes, y: Array, p: float, draws: int = 4000) -> Jump:
    """Posterior draws of centre, width and size; flat priors on c and log w, the covariance integrated over its grid. A fall
    with an upward slope beside it is now and then nearly as good an account of a rise: draws of the rarer sign are left out.

    Two passes over an ever finer grid around the best candidates, so that the answer is not bound to the coarse one.
    """
    grid, with_jump = scan.grid, scan.loglik(y, null, taken)
    best = with_jump.max(0)
    forms = [PULSE] if scan.shapes.form[np.argmax(best)] == PULSE else [LOG, STEP]
    near = scan.shapes[(best > best.max() - 8) & np.isin(scan.shapes.form, forms)]
    pad = np.maximum(near.width / 2, np.median(grid.gaps)).max()
    low, high = near.centre.min() - pad, near.centre.max() + pad
    thetas = np.argsort(-with_jump.max(1), kind="stable")[:LIKELY]
    thetas = thetas[with_jump.max(1)[thetas] > with_jump.max() - 5]
    span = float(np.ptp(grid.x))
    narrow = min(0.005, float(grid.gaps.min()) / 2)
    wide = min(1.5 * (WIDTHS[-1] if forms == [PULSE] else RISE), span / 2)
    widths = np.geomspace(2 * narrow, wide, 16)
    for last in (False, True):
        low, high = max(low, grid.x[SIDE - 1]), min(high, grid.x[-SIDE])
        centres = np.linspace(low, high, 61 if last else 41)
        c, w, form = (a.ravel() for a in np.meshgrid(centres, widths, forms, indexing="ij"))
        inside = (c - w / 2 >= grid.x[0]) & (c + w / 2 <= grid.x[-1]) & ((w >= SKEWED / 2) | (form != STEP))
        shapes = Shapes(c, w, form)[inside]
        target = null.project[thetas] @ y
        dot, norm = np.empty((2, len(thetas), len(shapes.centre)))
        raw = shapes.template(grid)
        for i, theta in enumerate(thetas):
            white = null.project[theta] @ raw
            dot[i], norm[i] = target[i] @ white, np.maximum(np.square(white).sum(0), 1e-9)
        rss = np.square(target).sum(1)[:, None]
        left = np.maximum(rss - dot**2 / norm, TIGHT * rss)
        logs = -(null.df - 1) / 2 * np.log(left) - null.penalty[thetas][:, None]
        kept = shapes[logs.max(0) > logs.max() - 7]
        step, ratio = (high - low) / (len(centres) - 1), widths[1] / widths[0]
        if not last:
            low, high = kept.centre.min() - step, kept.centre.max() + step
            widths = np.geomspace(max(kept.width.min() / ratio, narrow), min(kept.width.max() * ratio, wide), 12)
    generator = np.random.default_rng([scan.seed, 0x10CA7E])
    row, j = np.unravel_index(generator.choice(logs.size, size=draws, p=normalised(logs.ravel())), logs.shape)
    spread = np.sqrt(left[row, j] / (null.df - 1) / norm[row, j])
    size = dot[row, j] / norm[row, j] + spread * generator.standard_t(null.df - 1, draws)
    centre = np.clip(shapes.centre[j] + step * (generator.random(draws) - 0.5), grid.x[0], grid.x[-1])
    width = shapes.width[j] * ratio ** (generator.random(draws) - 0.5)
    alike = np.flatnonzero((size > 0) == (np.median(size) > 0))
    chosen, sure = np.resize(alike, draws), len(alike) / draws
    return Jump(centre[chosen], width[chosen], size[chosen], int(np.bincount(shapes.form[j]).argmax()), p, sure)
