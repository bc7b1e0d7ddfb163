"""Simulated series of which it is known whether they hold an event, of what kind and where.

Every family is a function of a generator and the steps, and returns values in units of the noise's standard deviation
(where there is noise) and the true places of its events, in steps.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.interpolate import BPoly

from devmon.analysis.series import Array

Rng = np.random.Generator
Null = Callable[[Rng, Array], Array]
Positive = Callable[[Rng, Array], tuple[Array, list[float]]]


def grid(kind: str, points: int, last: float = 20_000) -> Array:
    """About `points` steps: log-spaced from 1 with step 0, or evenly spaced from 0."""
    if kind == "linear":
        return np.round(np.linspace(0, last, points))
    count = points
    while len(steps := np.unique(np.append(0, np.round(np.geomspace(1, last, count))))) < points:
        count += 1
    return steps


def log_of(steps: Array) -> Array:
    return np.log10(steps + steps[steps > 0][0])


def ar1(rng: Rng, n: int, rho: float) -> Array:
    noise = rng.standard_normal(n)
    for i in range(1, n):
        noise[i] = rho * noise[i - 1] + np.sqrt(1 - rho**2) * noise[i]
    return noise


def rise(x: Array, centre: float, width: float) -> Array:
    """A logistic in log step with t10-t90 of `width` decades."""
    return 1 / (1 + np.exp(-np.clip((x - centre) * 2 * np.log(9) / width, -500, 500)))


# nulls: smooth drift, correlated noise, and what schedules and accidents do to a curve


def power_law(rng: Rng, steps: Array) -> Array:
    exponent, snr = rng.uniform(0.1, 1.0), 10 ** rng.uniform(0.5, 2.5)
    return (1 + steps / (steps[steps > 0][0] * 10)) ** -exponent * snr + rng.standard_normal(len(steps))


def wide_sigmoid(rng: Rng, steps: Array) -> Array:
    x, snr = log_of(steps), 10 ** rng.uniform(0.5, 2.5)
    return snr * rise(x, rng.uniform(x[0], x[-1]), rng.uniform(2.0, 3.0)) + rng.standard_normal(len(steps))


def schedule_kink(rng: Rng, steps: Array) -> Array:
    """A curve whose slope changes by up to a factor of ten at one step, as where a warm-up ends or a decay begins."""
    x, snr = log_of(steps), 10 ** rng.uniform(0.5, 2.5)
    before, after = 10 ** rng.uniform(-0.5, 0.5, 2)
    at = rng.uniform(x[0] + 0.2 * np.ptp(x), x[-1] - 0.2 * np.ptp(x))
    return snr * (before * (x - x[0]) + (after - before) * np.maximum(x - at, 0)) + rng.standard_normal(len(x))


def spikes(rng: Rng, steps: Array) -> Array:
    """Smooth decay with one to three outliers of 5 to 50 noise sd, each one or two checkpoints long, apart from each
    other."""
    y = power_law(rng, steps)
    for at in 1 + 5 * rng.choice((len(y) - 3) // 5, rng.integers(1, 4), replace=False) + rng.integers(0, 2):
        y[at : at + rng.integers(1, 3)] += 10 ** rng.uniform(0.7, 1.7)
    return y


def growing_noise(rng: Rng, steps: Array) -> Array:
    return rng.standard_normal(len(steps)) * np.geomspace(1, 10 ** rng.uniform(-1, 1), len(steps))


def noisy_walk(rng: Rng, steps: Array) -> Array:
    """A random walk whose steps are a tenth to three times the white noise upon it."""
    walk = np.cumsum(rng.standard_normal(len(steps))) * 10 ** rng.uniform(-1, 0.5)
    return walk + rng.standard_normal(len(steps))


NULLS: dict[str, Null] = {
    "power law": power_law,
    "wide sigmoid": wide_sigmoid,
    "white noise": lambda rng, steps: ar1(rng, len(steps), 0.0),
    "AR(1) .5": lambda rng, steps: ar1(rng, len(steps), 0.5),
    "AR(1) .8": lambda rng, steps: ar1(rng, len(steps), 0.8),
    "AR(1) .95": lambda rng, steps: ar1(rng, len(steps), 0.95),
    "random walk": lambda rng, steps: np.cumsum(rng.standard_normal(len(steps))),
    "noisy walk": noisy_walk,
    "schedule kink": schedule_kink,
    "spikes": spikes,
    "growing noise": growing_noise,
    "t4 noise": lambda rng, steps: rng.standard_t(4, len(steps)),
}


# positives: one event each, white noise of sd 1, the event's size `snr`


def jump(width: float, snr: float) -> Positive:
    def family(rng: Rng, steps: Array) -> tuple[Array, list[float]]:
        x = log_of(steps)
        centre = rng.uniform(x[0] + 0.2 * np.ptp(x), x[-1] - 0.2 * np.ptp(x))
        return snr * rise(x, centre, width) + rng.standard_normal(len(x)), _steps(x, steps, centre)

    return family


def turn(width: float, snr: float) -> Positive:
    """A smooth maximum: a Gaussian of sd `width` decades."""

    def family(rng: Rng, steps: Array) -> tuple[Array, list[float]]:
        x = log_of(steps)
        centre = rng.uniform(x[0] + 0.3 * np.ptp(x), x[-1] - 0.3 * np.ptp(x))
        return snr * np.exp(-0.5 * ((x - centre) / width) ** 2) + rng.standard_normal(len(x)), _steps(x, steps, centre)

    return family


def plateau(width: float, snr: float) -> Positive:
    """A steady rise that comes to rest for about `width` decades; `snr` is the rise that is missed there."""

    def family(rng: Rng, steps: Array) -> tuple[Array, list[float]]:
        x = log_of(steps)
        centre = rng.uniform(x[0] + 0.35 * np.ptp(x), x[-1] - 0.35 * np.ptp(x))
        sd = width / np.sqrt(2 * np.pi)  # the dip of the slope has the area of a dip to 0 over `width`
        fine = np.linspace(x[0], x[-1], 2000)
        slope = snr / width * (1 - np.exp(-0.5 * ((fine - centre) / sd) ** 2))
        curve = np.append(0, np.cumsum((slope[1:] + slope[:-1]) / 2 * np.diff(fine)))
        return np.interp(x, fine, curve) + rng.standard_normal(len(x)), _steps(x, steps, centre)

    return family


def bump(width: float, snr: float) -> Positive:
    """A decaying loss that rises and falls: a Gaussian of full width at half maximum `width` decades."""

    def family(rng: Rng, steps: Array) -> tuple[Array, list[float]]:
        x = log_of(steps)
        centre = rng.uniform(x[0] + 0.3 * np.ptp(x), x[-1] - 0.3 * np.ptp(x))
        decay = 20 * (1 + steps / (steps[steps > 0][0] * 10)) ** -0.4
        top = snr * np.exp(-4 * np.log(2) * ((x - centre) / width) ** 2)
        return decay + top + rng.standard_normal(len(x)), _steps(x, steps, centre)

    return family


POSITIVES: dict[str, dict[str, Positive]] = {
    "jump": {f"width {w}, SNR {s}": jump(w, s) for w in (0.05, 0.2, 0.5, 1.0) for s in (1, 3, 10)},
    "turn": {f"sd {w}, SNR {s}": turn(w, s) for w in (0.3, 0.5, 1.0) for s in (1, 3, 10)},
    "plateau": {f"width {w}, SNR {s}": plateau(w, s) for w in (0.5, 1.0) for s in (1, 3, 10)},
    "bump": {f"width {w}, SNR {s}": bump(w, s) for w in (0.2, 0.4) for s in (1, 3, 10)},
}


# shapes like published learning coefficients (Hoogland et al. 2024, arXiv:2402.02364, table of stages)

STAGES = {
    "language model": ([100, 900, 6500, 8500, 17_000, 50_000], [0, 26.4, 48.9, 47.33, 55.95, 57.72]),
    "in-context regression": (
        [100, 1000, 40_000, 126_000, 320_000, 500_000],
        [-0.7, 20.7, 169.3, 156.9, 112.8, 116.3],
    ),
}


FORMS = (
    "corner",
    "smooth",
)  # of the slope where it is zero and keeps its sign: a corner (cubics), or smooth (quintics)


def staged(
    name: str, steps: Array, rng: Rng, form: str = "corner", sd: float = 0.1, rho: float = 0.8
) -> tuple[Array, list[float]]:
    """A curve that comes to rest at each boundary, with AR(1) noise: estimates with one seed and the same batches at
    all checkpoints differ by about 0.1 from one to the next."""
    boundaries, values = STAGES[name]
    curve = at_rest(np.log10(boundaries), np.asarray(values, dtype=float), form == "smooth")
    x = np.log10(np.clip(steps, boundaries[0], boundaries[-1]))
    return curve(x) + sd * ar1(rng, len(steps), rho), [float(b) for b in boundaries[1:-1]]


def at_rest(x: Array, values: Array, smooth: bool) -> BPoly:
    """The curve through `values` at places `x` with slope 0 there: cubic between them, or if `smooth` quintic, with no
    curvature where the cubics' has two signs and else the lesser of the two."""
    if not smooth:
        return BPoly.from_derivatives(x, [[v, 0.0] for v in values])
    bend = 6 * np.diff(values) / np.diff(x) ** 2  # curvature of a cubic at its start; at its end the negative
    after, before = np.append(bend, -bend[-1]), np.append(bend[0], -bend)
    bends = np.where(after * before > 0, np.sign(after) * np.minimum(abs(after), abs(before)), 0.0)
    return BPoly.from_derivatives(x, [[v, 0.0, b] for v, b in zip(values, bends, strict=True)])


def _steps(x: Array, steps: Array, centre: float) -> list[float]:
    return [float(10**centre - steps[steps > 0][0])]


# smooth curves without an event, and shapes of range 1 of which the place of the event is known exactly


def replicated(rng: Rng, curve: Array, count: int, rho: float) -> Array:
    """(count, points) the curve on groups of items: each with a level of its own and AR(1) noise, whose mean has sd
    1."""
    noise = np.stack([ar1(rng, len(curve), rho) for _ in range(count)]) * np.sqrt(count)
    return curve + noise + 3 * rng.standard_normal((count, 1))


def _power(rng: Rng, steps: Array) -> Array:
    return (1 + steps / (steps[steps > 0][0] * 10)) ** -rng.uniform(0.1, 1.0) * 10 ** rng.uniform(0.5, 2.5)


def _decay(rng: Rng, steps: Array) -> Array:
    x = log_of(steps)
    return np.exp(-rng.uniform(0.2, 1.0) * (x - x[0])) * 10 ** rng.uniform(0.5, 2.5)


SMOOTH: dict[str, Null] = {"power law": _power, "smooth decay": _decay, "constant": lambda rng, steps: 0 * steps}


Shape = Callable[[Rng, Array], tuple[Array, float]]


def _placed(form: Callable[[Array], Array], margin: float) -> Shape:
    """A form of x - centre, its centre anywhere but within a share `margin` of the axis from its ends."""

    def shape(rng: Rng, steps: Array) -> tuple[Array, float]:
        x = log_of(steps)
        centre = rng.uniform(x[0] + margin * np.ptp(x), x[-1] - margin * np.ptp(x))
        return form(x - centre), _steps(x, steps, centre)[0]

    return shape


SHAPES: dict[str, list[Shape]] = {
    "jump": [_placed(lambda u, w=w: rise(u, 0.0, w), 0.25) for w in (0.1, 0.3, 0.6)],  # type: ignore[misc]
    "turn": [_placed(lambda u, w=w: np.exp(-0.5 * (u / w) ** 2), 0.3) for w in (0.4, 0.8)],  # type: ignore[misc]
    "plateau": [_placed(lambda u, w=w: np.tanh(u / w) ** 3 + 0.3 * u, 0.35) for w in (0.5, 0.8)],  # type: ignore[misc]
    "bump": [_placed(lambda u, w=w: np.exp(-4 * np.log(2) * (u / w) ** 2), 0.3) for w in (0.2, 0.4)],  # type: ignore[misc]
}
