"""False alarms, F1 and coverage of the detector on series of known truth, beside what others would use.

    python benchmarks/detection.py --out benchmarks/detection.json          # everything, about an hour on two cores
    python benchmarks/detection.py --quick

- nulls: the share of series in which any event is reported (family-wise over kinds), over 20, 60 and 200 checkpoints,
  log-spaced and even. The nominal rate is 5%. Baselines run on fewer series.
- positives: one event a series, with white noise. An event counts as found within 10% of its log-step. F1 is that of
  all series of a family (jump, turn, plateau, bump); baselines at their usual settings, and those with a penalty also
  with the penalty raised until no null family has more than 6% false alarms ("held to 6%"). Coverage is that of the
  90% intervals, where SNR >= 3 and there are at least 60 checkpoints.
- coverage: the same intervals on more series, each with noise of its own, and of all events of the right kind, wherever
  they lie (within 10% of the step a wide interval can hardly miss).
- published: shapes and noise like two published learning-coefficient curves, whose slope has a corner or is smooth where it
  is zero; how many boundaries are found within 10% of the step, and how many events lie beside them.
- limit: how many jumps a likelihood ratio could find that knows that the noise of a jump is white, at 3% false alarms on
  white, AR(1) and other noise without drift.
- speed: seconds a series, and how the time grows with the number of checkpoints.
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
from detection_baselines import BASELINES, STRICTER, Baseline
from detection_families import FORMS, NULLS, POSITIVES, STAGES, grid, staged

from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.null_model import Grid
from devmon.analysis.detection.scan import Scan
from devmon.analysis.detection.search import detect
from devmon.analysis.detection.shapes import PULSE
from devmon.analysis.series import Array, Series

TOLERANCE = 0.10
POINTS = (20, 60, 200)
Found = list[tuple[float, tuple[float, float] | None, str]]  # step, interval, kind


def ours(steps: Array, many: Sequence[Array]) -> list[Found]:
    fits = Detector().fit_all([(steps, y, None, "") for y in many])
    return [[(event.step, event.interval, event.kind) for event in fit.events()] for fit in fits]


def theirs(baseline: Baseline, strict: float = 1.0) -> Callable[[Array, Sequence[Array]], list[Found]]:
    return lambda steps, many: [[(step, None, "") for step in baseline(steps, y, strict)] for y in many]


def nulls(runs: int, baseline_runs: int, seed: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    settings = [(kind, points) for kind in ("log", "linear") for points in POINTS]
    for name, family in NULLS.items():
        counts: dict[str, int] = {}
        alarms = total = 0
        by_points = dict.fromkeys(POINTS, 0.0)
        others = dict.fromkeys(BASELINES, 0)
        asked = 0
        for kind, points in settings:
            steps, each = grid(kind, points), -(-runs // len(settings))
            many = [family(np.random.default_rng([seed, i, points, kind == "log"]), steps) for i in range(each)]
            for found in ours(steps, many):
                alarms += bool(found)
                by_points[points] += bool(found) / (2 * each)
                for what in {event[2] for event in found}:
                    counts[what] = counts.get(what, 0) + 1
            total += each
            few = many[: -(-baseline_runs // len(settings))]
            asked += len(few)
            for other, baseline in BASELINES.items():
                others[other] += sum(bool(found) for found in theirs(baseline)(steps, few))
        rate = alarms / total
        rows[name] = {
            "runs": total, "any": rate, "se": float(np.sqrt(rate * (1 - rate) / total)),
            "kinds": {what: n / total for what, n in sorted(counts.items())},
            "by points": {str(points): round(share, 4) for points, share in by_points.items()},
            "baselines": {other: n / asked for other, n in others.items()},
        }  # fmt: skip
        print(
            f"{name:14s} {rate:.3f} ± {rows[name]['se']:.3f}  {rows[name]['kinds']} {rows[name]['by points']}",
            flush=True,
        )
        print(f"{'':14s} {rows[name]['baselines']}", flush=True)
    return rows


def held(runs: int, seed: int) -> dict[str, float | None]:
    """The least strictness (among powers of two) at which a baseline has at most 6% false alarms on every null."""
    series = [
        (steps, [family(np.random.default_rng([seed, 7, i]), steps) for i in range(runs)])
        for family in NULLS.values()
        for steps in (grid("log", 60),)
    ]
    found: dict[str, float | None] = {}
    for name, most in STRICTER.items():
        strict = 1.0
        while strict <= most and any(
            np.mean([bool(f) for f in theirs(BASELINES[name], strict)(steps, many)]) > 0.06 for steps, many in series
        ):
            strict *= 2 if most < 1e6 else 100
        found[name] = strict if strict <= most else None
    print("held to 6% at strictness", found, flush=True)
    return found


def positives(runs: int, strict: dict[str, float | None], seed: int) -> dict[str, Any]:
    searches = {"devmon": ours} | {name: theirs(baseline) for name, baseline in BASELINES.items()}
    searches |= {
        f"{name}, held to 6%": theirs(BASELINES[name], s) for name, s in strict.items() if s not in (None, 1.0)
    }
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
    for family, variants in POSITIVES.items():
        held: dict[int, list[bool]] = {points: [] for points in POINTS if points >= 60}
        for (number, (variant, make)), points in itertools.product(enumerate(variants.items()), held):
            if variant.endswith("SNR 1"):
                continue
            steps = grid("log", points)
            drawn = [make(np.random.default_rng([seed, 3, number, i, points]), steps) for i in range(runs)]
            for found, (_, truth) in zip(ours(steps, [y for y, _ in drawn]), drawn, strict=True):
                away = {abs(np.log(max(event[0], 0.5) / truth[0])): event[1] for event in found if event[2] == family}
                if away and (interval := away[min(away)]):
                    held[points].append(interval[0] <= truth[0] <= interval[1])
        rows[family] = {
            "all": round(float(np.mean([*itertools.chain(*held.values())])), 3),
            **{f"{points} points": round(float(np.mean(one)), 3) for points, one in held.items()},
            "intervals": sum(map(len, held.values())),
        }
        print(family, rows[family], flush=True)
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
                for found, (_, truth) in zip(search(steps, [y for y, _ in drawn]), drawn, strict=True):
                    hit = [any(abs(np.log(max(e[0], 1) / t)) < np.log1p(TOLERANCE) for e in found) for t in truth]
                    hits.append(np.mean(hit))
                    extra.append(len(found) - sum(hit))
                    all_found += all(hit)
                row[who] = {"boundaries found": round(float(np.mean(hits)), 3), "all found": all_found / runs,
                            "events too many": round(float(np.mean(extra)), 2)}  # fmt: skip
            rows[f"{name}, {form}, {len(steps)} points"] = row
            print(name, form, len(steps), row, flush=True)
    return rows


def limit(runs: int, seed: int) -> dict[str, Any]:
    noises = [name for name in NULLS if name[:5] in ("white", "AR(1)", "rando", "growi", "t4 no")]
    rows: dict[str, Any] = {}
    for points in (20, 60):
        scan = Scan(Grid(grid("log", points)), 1, 0)

        def seeded(i: int, points: int = points) -> np.random.Generator:
            return np.random.default_rng([seed, 9, i, points])

        nulls = [[ratio(scan, NULLS[name](seeded(i), scan.grid.steps)) for i in range(runs)] for name in noises]
        level = np.quantile(nulls, 0.97, axis=1).max()
        rows[f"{points} points"] = {
            variant: round(
                float(np.mean([ratio(scan, make(seeded(i), scan.grid.steps)[0]) > level for i in range(runs)])), 2
            )
            for variant, make in POSITIVES["jump"].items()
            if not variant.endswith("SNR 10")
        }
    print(rows, flush=True)
    return rows


def ratio(scan: Scan, y: Array) -> float:
    """Log likelihood ratio of a rise in white noise against drift and noise of any kind without one."""
    white = [k for k, t in enumerate(scan.grid.thetas) if (t.rho, t.amplitude, t.shape) == (0, 0, "flat")]
    nothing = scan.shapes[np.zeros(len(scan.shapes.centre), dtype=bool)]
    risen = scan.loglik(y, scan.null, nothing)[white] + scan.against
    return float(risen[:, scan.shapes.form != PULSE].max() - scan.null.loglik(scan.null.rss(y)).max())


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
    parser.add_argument("--parts", nargs="+", default=["nulls", "positives", "coverage", "published", "limit", "speed"])
    parser.add_argument("--null-runs", type=int, default=1002)
    parser.add_argument("--runs", type=int, default=15, help="series for each variant and number of checkpoints")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    null_runs, runs = (60, 4) if options.quick else (options.null_runs, options.runs)
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    result |= {"machine": platform.platform(), "numpy": np.__version__, "alpha": Detector().alpha}
    for part in options.parts:
        if part == "nulls":
            result[part] = nulls(null_runs, min(null_runs, 60), options.seed)
        if part == "positives":
            strict = held(8 if options.quick else 30, options.seed)
            result |= {"strictness held to 6%": strict, part: positives(runs, strict, options.seed)}
        if part == "coverage":
            result[part] = coverage(4 if options.quick else 25, options.seed)
        if part == "published":
            result[part] = published(4 if options.quick else 8, options.seed)
        if part == "limit":
            result[part] = limit(20 if options.quick else 200, options.seed)
        if part == "speed":
            result[part] = speed(3 if options.quick else 9, options.seed)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
