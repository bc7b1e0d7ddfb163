"""False alarms, recall and interval coverage of the detector on simulated series with known truth.

    python benchmarks/detection.py --runs 200 --points 20 60 100 --out detection.json

Nulls: no jump of a decade or less and no turn is in the signal, however much the noise wiggles. The share of series
in which an event of a kind is reported must not exceed alpha by more than its own error.
Positives: one logistic rise (t10-t90 of a given width in decades) at a random place on top of noise of amplitude /
SNR, or one smooth maximum; reported are recall, the share of the true locations inside the 90% interval, and how many
events were reported beside the true one.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from devmon.analysis.detect import Detector
from devmon.analysis.smooth import Array

Rng = np.random.Generator


def grid(kind: str, points: int, last: float = 20_000) -> Array:
    """About `points` steps: log-spaced from 1 with step 0, or evenly spaced from 0."""
    if kind == "linear":
        return np.round(np.linspace(0, last, points))
    count = points
    while True:
        steps = np.unique(np.append(0, np.round(np.geomspace(1, last, count))))
        if len(steps) >= points:
            return steps
        count += 1


def ar1(rng: Rng, n: int, rho: float) -> Array:
    noise = rng.standard_normal(n)
    for i in range(1, n):
        noise[i] = rho * noise[i - 1] + np.sqrt(1 - rho**2) * noise[i]
    return noise


def white(rng: Rng, steps: Array) -> Array:
    return rng.standard_normal(len(steps))


def power_law(rng: Rng, steps: Array) -> Array:
    exponent, snr = rng.uniform(0.1, 1.0), 10 ** rng.uniform(0.5, 2.5)
    return (1 + steps / (steps[steps > 0][0] * 10)) ** -exponent * snr + white(rng, steps)


def wide_sigmoid(rng: Rng, steps: Array) -> Array:
    x, snr = np.log10(steps + steps[steps > 0][0]), 10 ** rng.uniform(0.5, 2.5)
    centre, width = rng.uniform(x[0], x[-1]), rng.uniform(2.0, 3.0)
    return snr / (1 + np.exp(-(x - centre) * 2 * np.log(9) / width)) + white(rng, steps)


def autocorrelated(rho: float) -> Callable[[Rng, Array], Array]:
    return lambda rng, steps: ar1(rng, len(steps), rho)


def random_walk(rng: Rng, steps: Array) -> Array:
    return np.cumsum(white(rng, steps))


def spikes(rng: Rng, steps: Array) -> Array:
    """Smooth decay with one to three outliers of 5 to 50 noise sd, each one or two checkpoints long."""
    y = power_law(rng, steps)
    for _ in range(rng.integers(1, 4)):
        at = rng.integers(1, len(y) - 2)
        y[at : at + rng.integers(1, 3)] += 10 ** rng.uniform(0.7, 1.7)
    return y


def straight(rng: Rng, steps: Array) -> Array:
    return 20 * np.log10(steps + steps[steps > 0][0]) + white(rng, steps)


def growing_noise(rng: Rng, steps: Array) -> Array:
    return white(rng, steps) * np.geomspace(1, 10 ** rng.uniform(-1, 1), len(steps))


def heavy_tails(rng: Rng, steps: Array) -> Array:
    return rng.standard_t(4, len(steps))


def bare_power_law(rng: Rng, steps: Array) -> Array:
    return (1 + steps / (steps[steps > 0][0] * 10)) ** -rng.uniform(0.1, 1.0)


def bare_wide_sigmoid(rng: Rng, steps: Array) -> Array:
    x = np.log10(steps + steps[steps > 0][0])
    return 1 / (1 + np.exp(-(x - rng.uniform(x[0], x[-1])) * 2 * np.log(9) / rng.uniform(2.0, 3.0)))


NULLS: dict[str, Callable[[Rng, Array], Array]] = {
    "white": white,
    "power law": power_law,
    "wide sigmoid": wide_sigmoid,
    "AR .5": autocorrelated(0.5),
    "AR .8": autocorrelated(0.8),
    "AR .95": autocorrelated(0.95),
    "random walk": random_walk,
    "spikes": spikes,
    "straight": straight,
    "growing noise": growing_noise,
    "t4 noise": heavy_tails,
    "bare power law": bare_power_law,
    "bare wide sigmoid": bare_wide_sigmoid,
    "constant": lambda rng, steps: np.full(len(steps), 0.3),
}


Rows = list[dict[str, Any]]


def false_alarms(detector: Detector, runs: int, points: int, kind: str, seed: int, names: list[str]) -> Rows:
    steps, rows = grid(kind, points), []
    for name in names:
        counts = dict.fromkeys(detector.kinds, 0)
        begun = time.perf_counter()
        for run in range(runs):
            rng = np.random.default_rng([seed, run, points])
            fit = detector.fit(steps, NULLS[name](rng, steps))
            for event in {event.kind for event in fit.events()}:
                counts[event] += 1
        rates = {what: count / runs for what, count in counts.items()}
        seconds = (time.perf_counter() - begun) / runs
        rows.append({"null": name, "grid": kind, "points": points, "runs": runs, **rates, "seconds": round(seconds, 3)})
        print(rows[-1], flush=True)
    return rows


def sigmoids(detector: Detector, runs: int, points: int, kind: str, seed: int) -> Rows:
    steps, rows = grid(kind, points), []
    origin = steps[steps > 0][0]
    x = np.log10(steps + origin)
    for width in (0.05, 0.2, 0.5, 1.0):
        for snr in (3, 10, 100):
            hits, covered, extra, sizes, turns = 0, 0, 0, 0, 0
            for run in range(runs):
                rng = np.random.default_rng([seed, run, points])
                centre = rng.uniform(x[0] + 0.2 * np.ptp(x), x[-1] - 0.2 * np.ptp(x))
                y = snr / (1 + np.exp(-np.clip((x - centre) * 2 * np.log(9) / width, -500, 500))) + white(rng, steps)
                events = detector.fit(steps, y).events()
                jumps = [event for event in events if event.kind == "jump"]
                turns += any(event.kind == "turn" for event in events)
                place = np.array([np.log10(event.step + origin) for event in jumps])
                mine = np.flatnonzero(np.abs(place - centre) < max(width / 2, 0.1))
                extra += len(jumps) > 1 or (len(jumps) == 1 and len(mine) == 0)
                if len(mine):
                    event = jumps[mine[np.argmin(np.abs(place[mine] - centre))]]
                    hits += 1
                    covered += bool(event.interval[0] <= 10**centre - origin <= event.interval[1])
                    sizes += event.size_interval[0] <= snr <= event.size_interval[1]
            row = {"width": width, "snr": snr, "grid": kind, "points": points, "runs": runs, "recall": hits / runs}
            row |= {"coverage": covered / max(hits, 1), "size coverage": sizes / max(hits, 1)}
            row |= {"false jumps": extra / runs, "false turns": turns / runs}
            rows.append(row)
            print(row, flush=True)
    return rows


def maxima(detector: Detector, runs: int, points: int, kind: str, seed: int) -> Rows:
    """A smooth maximum: a Gaussian bump of the given sd in decades."""
    steps, rows = grid(kind, points), []
    origin = steps[steps > 0][0]
    x = np.log10(steps + origin)
    for width in (0.2, 0.5, 1.0):
        for snr in (3, 10, 100):
            hits, covered, jumps = 0, 0, 0
            for run in range(runs):
                rng = np.random.default_rng([seed, run, points])
                centre = rng.uniform(x[0] + 0.3 * np.ptp(x), x[-1] - 0.3 * np.ptp(x))
                y = snr * np.exp(-0.5 * ((x - centre) / width) ** 2) + white(rng, steps)
                events = detector.fit(steps, y).events()
                jumps += any(event.kind == "jump" for event in events)
                tops = [event for event in events if event.kind == "turn" and event.size > 0]
                tops = [event for event in tops if abs(np.log10(event.step + origin) - centre) < max(width / 2, 0.1)]
                hits += bool(tops)
                covered += any(event.interval[0] <= 10**centre - origin <= event.interval[1] for event in tops)
            row = {"bump sd": width, "snr": snr, "grid": kind, "points": points, "runs": runs, "recall": hits / runs}
            rows.append(row | {"coverage": covered / max(hits, 1), "with jumps": jumps / runs})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--points", type=int, nargs="+", default=[20, 60, 100])
    parser.add_argument("--grids", nargs="+", choices=("log", "linear"), default=["log", "linear"])
    parts = ("nulls", "sigmoids", "maxima")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--nulls", nargs="+", choices=list(NULLS), default=list(NULLS))
    parser.add_argument("--n-null", type=int, default=199)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    detector = Detector(n_null=options.n_null)
    result: dict[str, Any] = {"machine": platform.platform(), "numpy": np.__version__, "alpha": detector.alpha}
    for part in options.parts:
        result[part] = []
        for kind in options.grids:
            for points in options.points:
                if part == "nulls":
                    rows = false_alarms(detector, options.runs, points, kind, options.seed, options.nulls)
                else:
                    run = sigmoids if part == "sigmoids" else maxima
                    rows = run(detector, options.runs, points, kind, options.seed)
                result[part] += rows
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
