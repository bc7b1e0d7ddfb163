"""False alarms, F1, coverage and speed of the detector on series of known truth, beside what others would use.

    python benchmarks/detection.py --out benchmarks/detection.json          # everything, some twenty minutes on one
    core python benchmarks/detection.py --quick
    python benchmarks/detection.py --parts there --null-runs 100

- there: the share of series without an event in which one is said to be there: power law, exponential decay in log
step and a
  constant, each with white noise, AR .5 and AR .8, on 20, 60 and 200 checkpoints, with 8 replicates and without.
  Nominal 5%.
- abrupt: the share of series of every null family, random walks too, that have an abrupt event, log-spaced and even;
the
  share with any event beside it (a random walk has maxima, so there that is no false alarm).
- positives: one event a series, with white noise. An event counts as found within 10% of its log-step. F1 is that of
all series
  of a family; baselines at their usual settings.
- coverage: of the 90% intervals, against the place of the noise-free curve, with 8 replicates.
- published: shapes and noise like two published learning-coefficient curves.
- alarms: runs of three series without an abrupt event, followed from the start: the share with an alarm.
- speed: seconds a series.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detection_baselines import BASELINES, Baseline
from detection_families import FORMS, NULLS, POSITIVES, SHAPES, SMOOTH, STAGES, ar1, grid, replicated, staged

from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.search import detect
from devmon.analysis.series import Array, Series
from devmon.analysis.transitions.alarms import Looks, provisional

TOLERANCE = 0.10
POINTS = (20, 60, 200)
Found = list[tuple[float, tuple[float, float] | None, str]]  # step, interval, kind


def ours(steps: Array, many: Sequence[Array]) -> list[Found]:
    fits = Detector().fit_all([Series("", steps, y) for y in many])
    return [[(event.step, event.interval, event.kind) for event in fit.events()] for fit in fits]


def theirs(baseline: Baseline, strict: float = 1.0) -> Callable[[Array, Sequence[Array]], list[Found]]:
    return lambda steps, many: [[(step, None, "") for step in baseline(steps, y, strict)] for y in many]


def there(runs: int, seed: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for (name, curve), rho, replicates in itertools.product(SMOOTH.items(), (0.0, 0.5, 0.8), (0, 8)):
        row: dict[str, float] = {}
        for points in POINTS:
            steps, alarms = grid("log", points), 0
            for i in range(runs):
                rng = np.random.default_rng([seed, 1, i, points])
                y = curve(rng, steps)
                values = replicated(rng, y, replicates, rho) if replicates else y + ar1(rng, len(steps), rho)
                given = values if replicates else None
                alarms += bool(
                    Detector().fit(steps, values.mean(0) if replicates else values, replicates=given).events()
                )
            row[f"{points} points"] = round(alarms / runs, 3)
        rows[f"{name}, AR {rho:g}, {f'{replicates} replicates' if replicates else 'no replicates'}"] = row
        print(name, rho, replicates, row, flush=True)
    return rows


def abrupt(runs: int, baseline_runs: int, seed: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    settings = [(kind, points) for kind in ("log", "linear") for points in POINTS]
    for name, family in NULLS.items():
        alarms = any_event = asked = 0
        others = dict.fromkeys(BASELINES, 0)
        each = -(-runs // len(settings))
        for kind, points in settings:
            steps = grid(kind, points)
            many = [family(np.random.default_rng([seed, i, points, kind == "log"]), steps) for i in range(each)]
            for y in many:
                events = Detector().fit(steps, y).events()
                alarms += any(event.abrupt for event in events)
                any_event += bool(events)
            few = many[: -(-baseline_runs // len(settings))] if baseline_runs else []
            asked += len(few)
            for other, baseline in BASELINES.items() if few else ():
                others[other] += sum(bool(found) for found in theirs(baseline)(steps, few))
        total = each * len(settings)
        rate = alarms / total
        rows[name] = {
            "runs": total, "abrupt": round(rate, 4), "se": round(float(np.sqrt(rate * (1 - rate) / total)), 4),
            "any event": round(any_event / total, 4),
            "baselines": {other: round(n / asked, 3) for other, n in others.items()} if asked else {},
        }  # fmt: skip
        print(name, rows[name], flush=True)
    return rows


def positives(runs: int, seed: int) -> dict[str, Any]:
    searches = {"devmon": ours} | {name: theirs(baseline) for name, baseline in BASELINES.items()}
    table: dict[str, Any] = {}
    for family, variants in POSITIVES.items():
        scores = {name: np.zeros(3) for name in searches}  # hits, misses, false
        covered: list[bool] = []
        right_kind: list[bool] = []
        cells: dict[str, Any] = {}
        for variant, make in variants.items():
            for points in POINTS:
                steps = grid("log", points)
                drawn = [make(np.random.default_rng([seed, i, points]), steps) for i in range(runs)]
                for name, search in searches.items():
                    mine = np.zeros(3)
                    for found, (_, truth) in zip(search(steps, [y for y, _ in drawn]), drawn, strict=True):
                        close = [event for event in found if near(event[0], truth[0])]
                        mine += (bool(close), not close, len(found) - bool(close))
                        if name == "devmon" and close:
                            best = min(close, key=lambda event: abs(np.log(event[0] / truth[0])))
                            right_kind.append(best[2] == family)
                            if points >= 60 and not variant.endswith("SNR 1"):
                                assert best[1] is not None
                                covered.append(best[1][0] <= truth[0] <= best[1][1])
                    scores[name] += mine
                    if name == "devmon":
                        cells[f"{variant}, {points} points"] = round(float(mine[0]) / runs, 3)
        f1 = {name: float(2 * s[0] / max(2 * s[0] + s[1] + s[2], 1)) for name, s in scores.items()}
        table[family] = {
            "F1": {name: round(value, 3) for name, value in f1.items()},
            "coverage of 90% intervals": round(float(np.mean(covered)), 3), "intervals": len(covered),
            "kind right": round(float(np.mean(right_kind)), 3), "recall of devmon": cells,
        }  # fmt: skip
        print(family, {k: v for k, v in table[family].items() if k != "recall of devmon"}, flush=True)
    return table


def coverage(runs: int, seed: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for family, shapes in SHAPES.items():
        held: list[bool] = []
        asked = 0
        for (number, shape), points, snr in itertools.product(enumerate(shapes), (60, 200), (5, 10, 30)):
            steps = grid("log", points)
            for i in range(runs):
                rng = np.random.default_rng([seed, 3, number, i, points, snr])
                curve, truth = shape(rng, steps)
                values = replicated(rng, snr * curve, 8, 0.0)
                events = Detector().fit(steps, values.mean(0), replicates=values).events()
                asked += 1
                same = [event for event in events if event.kind in (family, "turn" if family == "bump" else family)]
                if same:
                    best = min(same, key=lambda event: abs(np.log((event.step + 1) / (truth + 1))))
                    held.append(best.interval[0] <= truth <= best.interval[1])
        rows[family] = {"coverage": round(float(np.mean(held)), 3), "intervals": len(held), "series": asked}
        print(family, rows[family], flush=True)
    return rows


def alarms(runs: int, seed: int) -> dict[str, Any]:
    steps, looks, count = grid("log", 60), Looks(), 0
    for i in range(runs):
        rng = np.random.default_rng([seed, 6, i])
        noises = ar1(rng, len(steps), 0.0), ar1(rng, len(steps), 0.6), np.cumsum(rng.standard_normal(len(steps)))
        found = provisional([Series(str(k), steps, y) for k, y in enumerate(noises)], looks=looks)
        count += bool(found.alarms)
    rows = {"runs": runs, "share of runs with an alarm": round(count / runs, 4), "nominal": 0.05}
    print(rows, flush=True)
    return rows


def published(
    runs: int, seed: int, points: Sequence[int] = (40, 60, 100, 200), others: Sequence[str] = tuple(BASELINES)
) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, (boundaries, _) in STAGES.items():
        for form, count in itertools.product(FORMS, points):
            steps = np.unique(np.round(np.geomspace(100, boundaries[-1], count)))
            drawn = [staged(name, steps, np.random.default_rng([seed, i]), form) for i in range(runs)]
            row: dict[str, Any] = {}
            for who, search in {"devmon": ours, **{b: theirs(BASELINES[b]) for b in others}}.items():
                hits, extra, all_found = [], [], 0
                for events, (_, truth) in zip(search(steps, [y for y, _ in drawn]), drawn, strict=True):
                    found = [event for event in events if event[2] in ("", "turn", "plateau")]  # what ends a stage
                    hit = [any(abs(np.log(max(e[0], 1) / t)) < np.log1p(TOLERANCE) for e in found) for t in truth]
                    hits.append(np.mean(hit))
                    extra.append(len(found) - sum(hit))
                    all_found += all(hit)
                row[who] = {"boundaries found": round(float(np.mean(hits)), 3), "all found": all_found / runs,
                            "events too many": round(float(np.mean(extra)), 2)}  # fmt: skip
            rows[f"{name}, {form}, {len(steps)} points"] = row
            print(name, form, len(steps), row, flush=True)
    return rows


def speed(rounds: int, seed: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for points in (60, 200, 1000, 5000):
        rng = np.random.default_rng([seed, points])
        steps = (
            np.unique(np.round(np.geomspace(1, 10**6, 2 * points)))[:points]
            if points < 1000
            else np.arange(points) * 100.0
        )
        flat = [rng.standard_normal(len(steps)) for _ in range(rounds)]
        risen = [y + 10 * (np.arange(len(steps)) > 0.6 * len(steps)) for y in flat]
        begun = time.perf_counter()
        Detector().fit(steps, flat[0] + 1e-3 * rng.standard_normal(len(steps)))
        first = time.perf_counter() - begun
        row = {"first series at these steps": round(first, 3)}
        for what, many in (("without event", flat), ("with a jump", risen)):
            each = []
            for y in many:
                begun = time.perf_counter()
                Detector().fit(steps, y)
                each.append(time.perf_counter() - begun)
            row[what] = round(float(np.median(each)), 4)
        rows[f"{len(steps)} points"] = row
        print(len(steps), row, flush=True)
    steps = grid("log", 200)
    rng = np.random.default_rng([seed, 8])
    many = [
        Series(str(i), steps, rng.standard_normal(len(steps)) + (i % 4 == 0) * 10 * (steps > 300)) for i in range(200)
    ]
    begun = time.perf_counter()
    detect(many)
    rows["1000 series of 200 points, a quarter with a jump"] = round(5 * (time.perf_counter() - begun), 1)
    print(rows, flush=True)
    return rows


def near(step: float, truth: float) -> bool:
    return abs(np.log10(max(step, 0.5) / truth)) <= TOLERANCE * np.log10(truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["there", "abrupt", "positives", "coverage", "published", "alarms", "speed"]
    parser.add_argument("--parts", nargs="+", default=names, choices=names)
    parser.add_argument("--null-runs", type=int, default=60, help="series of each null family and setting of it")
    parser.add_argument("--runs", type=int, default=8, help="series for each variant and number of checkpoints")
    parser.add_argument("--baseline-runs", type=int, default=12)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    null_runs, runs = (10, 2) if options.quick else (options.null_runs, options.runs)
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    result |= {"machine": platform.platform(), "numpy": np.__version__, "alpha": Detector().alpha}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "there": lambda: there(null_runs, options.seed),
        "abrupt": lambda: abrupt(6 * null_runs, options.baseline_runs, options.seed),
        "positives": lambda: positives(runs, options.seed),
        "coverage": lambda: coverage(runs, options.seed),
        "published": lambda: published(runs, options.seed),
        "alarms": lambda: alarms(4 * runs, options.seed),
        "speed": lambda: speed(3 if options.quick else 9, options.seed),
    }
    for part in options.parts:
        result[part] = parts[part]()
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
