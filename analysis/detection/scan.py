"""The scan for shapes that stand out from smooth drift, and its simulated null distribution.

The alternative adds A · (a rise, or a pulse that comes back) to the model of `smooth`, over a grid of centres, widths
and forms (see `shapes`). Shapes are added greedily, since a staircase seen one step at a time looks like a
random walk; the statistic is the gain in restricted log likelihood after 1, 2, … shapes, maximised over shapes and
covariances.

Nulls are drawn from the model without the shapes and scanned the same way. Their covariances are drawn from the posterior
*beside the best shape*: where a shape is there, the noise is what the shape leaves; where none is, one shape hardly
changes what the noise looks like (a random walk less its largest rise is still one). The statistic does not depend on
scale or drift, so nulls are kept with the grid of steps and serve every series measured there, and also the later tests
beside shapes already found. Every shape has its prior odds (`shapes.odds_against`), and so has a second one (FURTHER).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from devmon.analysis.detection.null_model import Grid, Theta, Whitened, leading, normalised, shares
from devmon.analysis.detection.shapes import Shapes, candidates, odds_against
from devmon.analysis.series import Array

TIGHT = 1e-12  # residual sums of squares below this share are rounding
ENOUGH = 10  # simulation stops early at this many nulls as large as the data (Besag & Clifford 1991)
USUAL = 0.9  # a further shape counts by what it adds to the gain beyond this quantile of the nulls
LIKELY = 8  # covariances from which nulls are drawn
BEHIND = 6.0  # covariances this much less likely than the best for every null of a batch are not scanned for it
FURTHER = 1.0  # log odds against more than one shape
SPARE = 2.0  # shapes that add less than this to the case beyond chance are left to later tests
TAIL = 0.25  # share of the largest nulls to which an exponential tail is fitted
LEAST = 1e-4  # no p-value is below this
BLOCK = 16  # series scanned at once: always as many, so that a series alone gives the numbers it gives among others

Single = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Path:
    """Greedy gains (B, depth) after 1, 2, … shapes, the shapes picked (B, depth), the posterior of the covariance
    beside the first of them (theta, B), and how far behind the best each covariance stays at most, from none to all of
    the shapes (theta, B)."""

    gains: Array
    picks: Ints
    weights: Array
    behind: Array

    def of(self, i: int) -> Path:
        """That of one series."""
        one = slice(i, i + 1)
        return Path(self.gains[one], self.picks[one], self.weights[:, one], self.behind[:, one])


class Scan:
    """The search for shapes in series measured at the steps of `grid`, up to `depth` at once.

    A grid with noise of another shape takes its nulls from `flat`, the scan at the same steps with noise of constant
    size: once whitened, how much a shape gains by chance hardly depends on it.
    """

    def __init__(self, grid: Grid, depth: int, seed: int, flat: Scan | None = None) -> None:
        self.grid, self.depth, self.seed, self.flat = grid, depth, seed, flat
        self.null = Whitened(grid, grid.drift)
        self.shapes = candidates(grid)
        self.raw = self.shapes.template(grid)
        self.against = odds_against(self.shapes)
        self._streams: dict[int, tuple[np.random.Generator, Array]] = {}

    def near(self, others: Shapes) -> NDArray[np.bool_]:
        """(J, K) whether a shape is so close to another that it would mend the other's form."""
        apart = np.abs(np.subtract.outer(self.shapes.centre, others.centre))
        reach = 0.6 * np.add.outer(self.shapes.width, others.width) + 2 * float(np.median(self.grid.gaps))
        return np.asarray(apart <= reach)

    @cached_property
    def _free(self) -> Single:
        """(J, J) 1 where two shapes may both be added, 0 where they are too close."""
        return (~self.near(self.shapes)).astype(np.float32)

    @cached_property
    def _white(self) -> Single:
        """(theta, m, J) the whitened shapes, of unit norm. Single precision is ample."""
        white = np.empty((len(self.grid.thetas), *self.raw.shape), dtype=np.float32)
        raw = self.raw.astype(np.float32)
        for k, project in enumerate(self.null.project):
            np.matmul(project.astype(np.float32), raw, out=white[k])
            white[k] /= np.sqrt(np.maximum(np.square(white[k]).sum(0), 1e-9))
        return white

    def only(self, thetas: Ints) -> Scan:
        """The same search among some of the covariances."""
        scan = Scan(self.grid.only(thetas), self.depth, self.seed, self.flat or self)
        scan.__dict__["_white"] = self._white[thetas]
        scan.__dict__["_free"] = self._free
        return scan

    def path(self, ys: Array, null: Whitened | None = None, taken: Shapes | None = None, depth: int | None = None,
             thetas: Ints | None = None) -> Path:  # fmt: skip
        """Greedy search in each series of ys (m, B), beside the fixed effects of `null` and away from shapes `taken`;
        among some of the covariances if `thetas` names them."""
        null, depth = null or self.null, depth or self.depth
        which = slice(None) if thetas is None else thetas
        white, project, penalty = self._white[which], null.project[which], null.penalty[which, None]
        free = np.ones(white.shape[2], dtype=np.float32)
        if taken is not None and len(taken.centre):
            free[self.near(taken).any(1)] = 0
        beside = self._beside(null, which)
        count = ys.shape[1]
        if null is self.null:
            ys = np.concatenate([ys, ys[:, :1].repeat(-count % BLOCK, axis=1)], axis=1)
        parts = [
            _greedy(project @ ys[:, start : start + BLOCK], white, penalty, null.df / 2, self.against, free, self._free,
                    beside, depth)
            for start in range(0, count, BLOCK)
        ]  # fmt: skip
        gains, picks, weights, behind = (np.concatenate([part[i] for part in parts], axis=i // 2) for i in range(4))
        return Path(gains[:count], picks[:count], weights[:, :count], behind[:, :count])

    def _beside(self, null: Whitened, which: Ints | slice) -> Single | None:
        """(theta, m, p) orthonormal columns of the fixed effects that `null` has beyond the drift."""
        if null is self.null:
            return None
        extra = null.columns[:, self.null.columns.shape[1] :]
        return np.asarray(np.linalg.qr(self.null.project[which] @ extra)[0].astype(np.float32))

    def loglik(self, y: Array, null: Whitened, taken: Shapes) -> Array:
        """(theta, J) log likelihood of one series with each of the shapes that are not close to those taken, and their odds."""
        target = null.project @ y
        rss = np.square(target).sum(1)[:, None]
        score = np.square((target.astype(np.float32)[:, None] @ self._white)[:, 0])
        if (beside := self._beside(null, slice(None))) is not None:
            score /= np.maximum(1 - np.square(beside.transpose(0, 2, 1) @ self._white).sum(1), 0.05)
        if len(taken.centre):
            score[:, self.near(taken).any(1)] = 0
        return null.loglik(np.maximum(rss - score, TIGHT * rss)) - self.against

    def nulls(self, k: int, count: int) -> Array:
        """Gains (count, depth) of series drawn from covariance k; the stream of k is the same whoever asks."""
        if self.flat is not None:
            return self.flat.nulls(_index(self.flat.grid.thetas, self.grid.thetas[k]), count)
        generator, drawn = self._streams.get(k, (np.random.default_rng([self.seed, k]), np.empty((0, self.depth))))
        while len(drawn) < count:  # blocks of one size, so that what was asked before does not matter
            noise = generator.standard_normal((BLOCK, len(self.grid.x)))
            ys = np.linalg.solve(self.grid.inverse[k], noise.T)
            likely = self.null.loglik(np.square(self.null.project @ ys).sum(1))
            thetas = np.flatnonzero((likely - likely.max(0)).max(1) > -BEHIND)
            drawn = np.concatenate([drawn, self.path(ys, thetas=thetas).gains])
        self._streams[k] = generator, drawn
        return drawn[:count]

    def test(self, path: Path, n_null: int) -> tuple[float, int]:
        """P-value of one series by its path, and how few shapes make its case all but as good as any.

        The case is max over n of (gain after n shapes - its USUAL quantile over the nulls), less FURTHER where n > 1; p is
        `tail_p` of it.
        """
        gains, weights = path.gains[0], leading(path.weights[:, 0], LIKELY)
        for total in sorted({min(n_null, 49), n_null}):
            counts = shares(weights, total)
            drawn = [self.nulls(int(k), int(counts[k])) for k in np.flatnonzero(counts)]
            nulls = np.concatenate(drawn)[:, : len(gains)]
            usual = np.quantile(nulls, USUAL, axis=0) + FURTHER * (np.arange(nulls.shape[1]) > 0)
            cases, case = (nulls - usual).max(1), float((gains - usual).max())
            if np.sum(cases >= case) >= ENOUGH:
                break
        return tail_p(case, cases), int(np.argmax(gains - usual >= case - SPARE)) + 1


def _index(thetas: list[Theta], theta: Theta) -> int:
    """Where a covariance is in a list that has it, or has it with noise of constant size; where its smooth part would go
    through the points there, with the largest one that does not."""
    if theta in thetas:
        return thetas.index(theta)
    alike = [k for k, one in enumerate(thetas) if replace(one, amplitude=0.0, length=0.0) ==
             replace(theta, shape="flat", amplitude=0.0, length=0.0) and one.amplitude <= theta.amplitude]  # fmt: skip
    return max(alike, key=lambda k: (thetas[k].length == theta.length, thetas[k].amplitude))


def _greedy(target: Array, white: Single, penalty: Array, half: float, against: Array, free: Single, both: Single,
            beside: Single | None, depth: int) -> tuple[Array, Ints, Array, Array]:  # fmt: skip
    """`Scan.path` for one block: whitened series (theta, m, B), shapes (theta, m, J) with odds `against` (J,) of
    which those `free` (J,) may be picked and those in `both` (J, J) together."""
    count = target.shape[2]
    series = np.arange(count)
    rss = np.square(target).sum(1)  # (theta, B)
    floor = (1e-6 * rss).astype(np.float32)
    left = np.ascontiguousarray(target.transpose(0, 2, 1), dtype=np.float32)  # (theta, B, m)
    norm = np.ones((len(white), 1, white.shape[2]), dtype=np.float32)  # of each shape beside those taken
    basis: list[Single] = []
    if beside is not None:
        norm -= np.square(beside.transpose(0, 2, 1) @ white).sum(1, keepdims=True)
        basis += [beside[:, None, :, i] for i in range(beside.shape[2])]
    gains, picks = np.zeros((count, depth)), np.zeros((count, depth), dtype=np.int64)
    loglik = -half * np.log(rss) - penalty
    base, behind, weights = loglik.max(0), loglik - loglik.max(0), loglik
    allowed = np.broadcast_to(free, (count, len(free)))
    heavy, paid = np.exp(against / half).astype(np.float32), np.zeros(count)
    for n in range(depth):
        score = left @ white  # (theta, B, J)
        np.square(score, out=score)
        score *= allowed / np.maximum(norm, 0.05)
        np.maximum(rss.astype(np.float32)[:, :, None] - score, floor[:, :, None], out=score)
        score *= heavy  # so that the likelihood and the odds together are greatest where this is least
        chosen = score.argmin(2)
        lowered = np.take_along_axis(score, chosen[:, :, None], 2)[:, :, 0].astype(np.float64)
        loglik = -half * np.log(lowered) - penalty - paid
        behind = np.maximum(behind, loglik - loglik.max(0))
        if n == 0:
            weights = normalised(loglik)
        theta = loglik.argmax(0)
        pick = chosen[theta, series]
        paid += against[pick]
        gains[:, n] = np.maximum(loglik[theta, series] - base, gains[:, n - 1] if n else -np.inf)
        picks[:, n] = pick
        if n + 1 == depth:
            break
        allowed = allowed * both[pick]
        new = white[:, :, pick].transpose(0, 2, 1).copy()
        for old in basis:
            new -= old * (old * new).sum(2, keepdims=True)
        new /= np.maximum(np.linalg.norm(new, axis=2, keepdims=True), 1e-6)
        basis.append(new)
        along = (new * left).sum(2)
        left -= new * along[:, :, None]
        rss = np.maximum(rss - along.astype(np.float64) ** 2, floor)
        norm = norm - np.square(new @ white)
    return gains, picks, weights, behind


def tail_p(value: float, nulls: Array) -> float:
    """P(null >= value): the share (1 + #) / (1 + B) of the B nulls, or where fewer than ENOUGH are as large, an exponential
    tail through the largest quarter of them if that is less, but never below LEAST.

    The tails of these statistics are exponential (gains) or lighter (prominences), so the fit errs upwards; compare
    Knijnenburg et al. (2009), who fit a generalised Pareto tail.
    """
    larger, count = int(np.sum(nulls >= value)), len(nulls)
    p = (1 + larger) / (1 + count)
    if larger >= ENOUGH or count < 4 * ENOUGH:
        return p
    start = np.quantile(nulls, 1 - TAIL)
    top = nulls[nulls > start]
    if not len(top):
        return p
    scale = float(np.mean(top - start)) * (1 + 1 / np.sqrt(len(top)))
    return min(p, max(TAIL * float(np.exp(-max(value - start, 0.0) / max(scale, 1e-300))), LEAST))
