"""The shapes that stand out from smooth drift: a rise (logistic in log step or in step) and a pulse that comes back; and
`Jump`, one of them located in a series."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from devmon.analysis.detection.null_model import Grid, Whitened
from devmon.analysis.series import Array

WIDTHS = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0, 1.6)  # on the time axis, beside the step that lies within one gap
RISE = 1.0  # no rise is tried that is wider
SKEWED = 0.2  # from this width on a logistic in step differs from one in log step
BRIEF = 0.75  # a pulse up to this width is a bump, a wider one a turn
NINETY = float(np.log(9.0))  # a logistic is at 90% here
PULSED = 1.0  # log odds against a pulse
SIDE = 3  # checkpoints needed before and after a centre, and within the half height of a pulse

LOG, STEP, PULSE = 0, 1, 2  # logistic in log step, logistic in step, the slope of a logistic in log step


@dataclass(frozen=True)
class Shapes:
    """Centres and widths on the time axis, and forms; the width is t10-t90 of a rise and 1.25 x FWHM of a pulse."""

    centre: Array
    width: Array
    form: NDArray[np.int64]

    def __getitem__(self, which: NDArray[np.bool_]) -> Shapes:
        return Shapes(self.centre[which], self.width[which], self.form[which])

    def at(self, x: Array) -> tuple[Array, Array, Array]:
        """(J, n) height at places x, and its changes with centre and with width, up to a factor: 0 to 1."""
        z, rise, slope = self._rise(x)
        pulse = (self.form == PULSE)[:, None]
        change = np.where(pulse, 4 * slope * (1 - 2 * rise), slope)
        return np.where(pulse, 4 * slope, rise), change, change * z

    def height(self, x: Array) -> Array:
        """(J, n) height at places x alone."""
        _, rise, slope = self._rise(x)
        return np.where((self.form == PULSE)[:, None], 4 * slope, rise)

    def _rise(self, x: Array) -> tuple[Array, Array, Array]:
        """(J, n) where each x lies on a logistic, the logistic there and its slope."""
        c, w = self.centre[:, None], np.maximum(self.width, 1e-12)[:, None]
        z = (x - c) * (2 * NINETY / w)
        if len(in_step := np.flatnonzero(self.form == STEP)):
            ratio = 10.0 ** w[in_step]
            apart = np.minimum(x - c[in_step], 50.0)
            z[in_step] = (10.0**apart - 1) * (NINETY * (ratio + 1) / (ratio - 1))
        np.clip(z, -500, 500, out=z)
        rise = 1 / (1 + np.exp(-z))
        return z, rise, rise * (1 - rise)

    def template(self, grid: Grid) -> Array:
        """(m, J) the shapes at the points of the model."""
        return grid.average(self.height(grid.raw_x)).T


def candidates(grid: Grid) -> Shapes:
    """Shapes worth trying: they lie within the data, with `SIDE` checkpoints beyond the centre."""
    x, gaps = grid.x, grid.gaps
    steps = ((x[1:] + x[:-1]) / 2)[SIDE - 1 : len(gaps) - SIDE + 1]
    rows = [(steps, 0.0, LOG)]
    for width in WIDTHS:
        c = np.arange(max(x[0] + width / 2, x[SIDE - 1]), min(x[-1] - width / 2, x[-SIDE]), width / 4)
        c = c[gaps[np.clip(np.searchsorted(x, c) - 1, 0, len(gaps) - 1)] < width / 2]
        if width <= RISE:
            rows.append((c, width, LOG))
        if SKEWED <= width <= RISE:
            rows.append((c, width, STEP))
        rows.append((c[within(grid, c, np.full(len(c), width)) >= SIDE], width, PULSE))
    return Shapes(
        np.concatenate([c for c, _, _ in rows]),
        np.concatenate([np.full(len(c), width) for c, width, _ in rows]),
        np.concatenate([np.full(len(c), form) for c, _, form in rows]),
    )


def odds_against(shapes: Shapes) -> Array:
    """(J,) log prior odds against each candidate, about 0 on the average: every form and width is as likely as another, and
    every centre of one, so that the many places of a narrow shape do not outvote the few of a wide one."""
    if not len(shapes.centre):
        return np.zeros(0)
    alike = np.stack([shapes.width, shapes.form], axis=1)
    _, which, count = np.unique(alike, axis=0, return_inverse=True, return_counts=True)
    return np.log(count[which.ravel()] * len(count) / len(shapes.centre)) + PULSED * (shapes.form == PULSE)


def within(grid: Grid, centre: Array, width: Array) -> NDArray[np.int64]:
    """Number of the model's points within the half height of a pulse."""
    half = 0.4 * width
    return np.searchsorted(grid.x, centre + half, side="right") - np.searchsorted(grid.x, centre - half)


def columns_of(grid: Grid, shapes: Shapes, at: Array) -> tuple[Array, NDArray[np.int64]]:
    """Fixed effects (g, p) at places `at`: drift, then each shape and its changes with place and width.

    Also which shape each column belongs to (-1: drift). Changes that no checkpoint can tell from nothing are left out.
    """
    columns, owner = [np.ones(len(at)), at - grid.x.mean()], [-1, -1]
    wide = Shapes(shapes.centre, np.maximum(shapes.width, min(0.02, float(np.median(grid.gaps)))), shapes.form)
    here, there = wide.at(grid.x), wide.at(at)
    for j in range(len(shapes.centre)):
        size = np.linalg.norm(here[0][j])
        for known, new in zip(here, there, strict=True):
            if np.linalg.norm(known[j]) > 0.02 * size:
                columns.append(new[j])
                owner.append(j)
    return np.stack(columns, axis=1), np.array(owner)


@dataclass(frozen=True)
class Jump:
    """A located jump or pulse: posterior draws of centre and width (on the time axis) and of the amplitude, of one sign;
    `sure` is the share of the posterior that has this sign."""

    centre: Array
    width: Array
    size: Array
    form: int
    p_value: float
    sure: float = 1.0

    @property
    def middle(self) -> tuple[float, float]:
        return float(np.median(self.centre)), float(np.median(self.width))

    @property
    def up(self) -> bool:
        return float(np.median(self.size)) > 0


def shapes_of(jumps: list[Jump]) -> Shapes:
    """The median shape of each jump."""
    centre, width = np.array([jump.middle for jump in jumps]).reshape(-1, 2).T
    return Shapes(centre, width, np.array([jump.form for jump in jumps], dtype=np.int64))


def with_shapes(grid: Grid, jumps: list[Jump], spikes: tuple[int, ...]) -> Whitened:
    """The model that holds these jumps and leaves the spikes out."""
    return Whitened(grid, columns_of(grid, shapes_of(jumps), grid.x)[0], spikes)
