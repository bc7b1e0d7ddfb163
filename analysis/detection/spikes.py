"""Spikes: one or two checkpoints that leave and come back, told from pulses that last."""

from __future__ import annotations

import itertools

import numpy as np

from devmon.analysis.detection.null_model import Grid, Whitened
from devmon.analysis.detection.scan import TIGHT
from devmon.analysis.detection.shapes import PULSE, SIDE, Jump, Shapes, with_shapes, within
from devmon.analysis.series import Array

SPIKE = 12.0  # gain in log likelihood (about 5 sd) from which a point is left out as a spike
FLARED = 4.0  # log likelihood by which a pulse over fewer than SIDE points explains more than two free points


def isolated(null: Whitened, y: Array) -> tuple[tuple[int, ...], float]:
    """The point, or pair of neighbours, whose own free value raises the log likelihood most, and by how much."""
    rss = null.rss(y)[:, None]
    base = null.loglik(rss).max()
    gains = [null.loglik(np.maximum(rss - less, TIGHT * rss)).max(0) - base for less in lowered(null, y)]
    i, j = (int(np.argmax(gain)) for gain in gains)
    return ((i,), float(gains[0][i])) if gains[1][j] < gains[0][i] + SPIKE else ((j, j + 1), float(gains[1][j]))


def lowered(null: Whitened, y: Array) -> tuple[Array, Array]:
    """(theta, m) and (theta, m - 1) by how much free values of a point, and of a pair of neighbours, lower the residual sum
    of squares: (P y)_i² / P_ii for point i, with P = Aᵀ A."""
    pull = np.stack([project.T @ (project @ y) for project in null.project])
    own, cross = null.leverage
    a, b, det = pull[:, :-1], pull[:, 1:], own[:, :-1] * own[:, 1:] - cross**2
    one = np.where(own > 1e-9, pull**2 / np.maximum(own, 1e-9), 0)
    two = (own[:, 1:] * a**2 - 2 * cross * a * b + own[:, :-1] * b**2) / np.maximum(det, 1e-9)
    return one, np.where(det > 1e-6 * own[:, :-1] * own[:, 1:], two, 0)


def points_of_spikes(grid: Grid, jumps: list[Jump], found: list[Jump], y: Array, spikes: tuple[int, ...]) -> set[int]:
    """The points of new pulses that are fewer than SIDE points long and have no flanks, or that lie between a jump and its
    undoing."""
    x, points = grid.x, set[int]()
    for jump in (jump for jump in jumps if jump.form == PULSE):
        centre, width = jump.middle
        if within(grid, np.array([centre]), np.array([width]))[0] >= SIDE:
            continue
        others = [*found, *(other for other in jumps if other is not jump)]
        if not flared(with_shapes(grid, others, spikes), y, jump):
            after = int(np.clip(np.searchsorted(x, centre), 1, len(x) - 1))
            points |= {after - 1, after} | set(np.flatnonzero(np.abs(x - centre) <= 0.4 * width).tolist())
    steps = sorted((jump for jump in jumps if jump.form != PULSE), key=lambda jump: jump.middle[0])
    for a, b in itertools.pairwise(steps):
        between = np.flatnonzero((x > a.middle[0]) & (x < b.middle[0]))
        if a.up != b.up and len(between) < SIDE:
            points |= set(between.tolist())
    return points


def flared(null: Whitened, y: Array, pulse: Jump) -> bool:
    """Whether a pulse explains plainly more than the best two neighbours around its centre would with free values of their
    own: further points lie on its flanks."""
    some = slice(None, None, 40)
    tried = Shapes(pulse.centre[some], pulse.width[some], np.full(len(pulse.centre[some]), PULSE))
    white, rss = null.project @ tried.template(null.grid), null.rss(y)[:, None]
    along = ((null.project @ y)[:, None] @ white)[:, 0]
    score = np.square(along) / np.maximum(np.square(white).sum(1), 1e-9)
    with_pulse = null.loglik(np.maximum(rss - score, TIGHT * rss)).max()
    last = int(np.clip(np.searchsorted(null.grid.x, pulse.middle[0]), 2, len(y) - 2))
    with_pair = null.loglik(np.maximum(rss - lowered(null, y)[1], TIGHT * rss))[:, last - 2 : last + 1].max()
    return bool(with_pulse > with_pair + FLARED)
