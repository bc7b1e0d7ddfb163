"""Training maps: the latent states that the runs of one configuration pass through, and the paths between them.

Hu et al. (2023), Latent state models of training dynamics, arXiv:2308.09543: a hidden Markov model over several
measured series of many runs. Here the number of states is chosen by the likelihood of runs left out, and fewer than
five runs give no map.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binomtest

from devmon.analysis.runs import hmm
from devmon.analysis.runs.compare import NOT_ENOUGH, median_interval
from devmon.analysis.series import Array, Series, checked
from devmon.errors import DataError

MIN_RUNS = 5  # runs of which a map is made; with fewer, leaving one out says nothing
FOLDS = 10  # at most; with more runs, groups of them are left out together
FORMS = ("levels", "differences")
CERTAIN = 0.9  # posterior probability of a state that counts as certain

Path = NDArray[np.int64]


@dataclass(frozen=True)
class MapState:
    """A latent state: where it lies (`mean` and `sd` of each series in its own units) and when runs enter it.

    `entry` maps each run that visits it to the first step of its path there; `step` is their median, `interval` the
    order statistics that hold the median of all such runs with probability `coverage`.
    """

    index: int
    mean: Mapping[str, float]
    sd: Mapping[str, float]
    entry: Mapping[str, float]
    step: float
    interval: tuple[float, float]
    coverage: float


@dataclass(frozen=True)
class Edge:
    """A passage between two states: the runs that take it, their share with its exact 90% interval, and how often."""

    origin: int
    target: int
    runs: tuple[str, ...]
    share: float
    interval: tuple[float, float]
    times: int


@dataclass(frozen=True)
class Order:
    """A number of states: log likelihood per observation of runs left out (mean over runs) and the standard error of
    its difference to the best number, run by run."""

    states: int
    held_out: float
    behind_se: float


@dataclass(frozen=True)
class TrainingMap:
    """The states that runs pass through, in the order of their median entry.

    - `outcome`: "MAP", "ONE STATE" (no map explains runs left out better) or "not enough runs"
    - `paths`: each run's likeliest state at each of `steps`; `certain`: the share of them whose state has a posterior
      probability of at least CERTAIN
    - `edges`: the moves between states; `orders`: how well each number of states explains runs left out
    - `detours`: the states that only some of the runs visit
    """

    outcome: str
    steps: Array
    states: tuple[MapState, ...]
    edges: tuple[Edge, ...]
    paths: Mapping[str, Path]
    certain: float
    orders: tuple[Order, ...]
    series: tuple[str, ...]
    settings: Mapping[str, Any]
    note: str

    @property
    def detours(self) -> tuple[int, ...]:
        return tuple(state.index for state in self.states if len(state.entry) < len(self.paths))

    def to_frame(self) -> pd.DataFrame:
        """One row an edge of the graph."""
        columns = ["origin", "target", "runs", "of", "share", "low", "high", "times"]
        rows = [(e.origin, e.target, len(e.runs), len(self.paths), e.share, *e.interval, e.times) for e in self.edges]
        return pd.DataFrame(rows, columns=columns)


def training_map(
    runs: Mapping[str, Sequence[Series]],
    series: Sequence[str],
    *,
    form: str = "levels",
    most_states: int = 6,
    restarts: int = 8,
    seed: int = 0,
) -> TrainingMap:
    """The map of runs over the named series, taken at the steps that all runs share.

    `form` is "levels" or "differences" (between neighbouring steps). Each series is put in standard units over all runs
    and steps; rejected and missing points have no say. Of 1 to `most_states` states the fewest are taken whose
    likelihood on runs left out is within one standard error of the best (the rule of Breiman et al. 1984).
    """
    settings = {"form": form, "most_states": most_states, "restarts": restarts, "seed": seed}
    if form not in FORMS:
        raise DataError(f"form is one of {', '.join(FORMS)}, got {form!r}")
    if not series or most_states < 1 or restarts < 1:
        raise DataError(
            f"a map needs a series, a state and a start at least, got {list(series)}, {most_states}, {restarts}"
        )
    if len(runs) < MIN_RUNS:
        note = f"{len(runs)} runs, a map needs at least {MIN_RUNS}"
        return TrainingMap(NOT_ENOUGH, np.empty(0), (), (), {}, float("nan"), (), tuple(series), settings, note)
    # the runs as one array in standard units; a series that never moves would have none
    steps, values = _cube(runs, series)
    if form == "differences":
        steps, values = steps[1:], np.diff(values, axis=1)
    if empty := [name for i, name in enumerate(series) if not np.isfinite(values[:, :, i]).any()]:
        raise DataError(f"{', '.join(empty)} never has a value at a step that all runs share: leave out")
    centre, scale = np.nanmean(values, axis=(0, 1)), np.nanstd(values, axis=(0, 1))
    flat = [name for name, size, mean in zip(series, scale, centre, strict=True) if not size > 1e-12 * abs(mean)]
    if flat:
        raise DataError(f"{', '.join(flat)} never change{'s' if len(flat) == 1 else ''} in any run: leave out")
    y = (values - centre) / scale
    # the fewest states that explain runs left out about as well as the best, then one fit to all runs
    orders = choose_order(y, most_states, restarts=restarts, seed=seed)
    states = _fewest(orders)
    chains, _ = hmm.fit(y, states, restarts=2 * restarts, seed=seed)
    chain, names = chains[0], list(runs)
    chain, paths = in_order(chain, hmm.viterbi(chain, y), steps)
    certain = float((hmm.posterior(chain, y).max(-1) >= CERTAIN).mean())
    # states by the median step of their entry, with what they mean in the units of the series
    described = [
        _state(k, chain, dict(zip(names, paths, strict=True)), steps, series, centre, scale) for k in range(states)
    ]
    note = "" if states < most_states else f"the largest number of states tried ({most_states}): raise most_states"
    by_run = dict(zip(names, paths, strict=True))
    outcome = "MAP" if states > 1 else "ONE STATE"
    return TrainingMap(
        outcome, steps, tuple(described), _edges(by_run), by_run, certain, orders, tuple(series), settings, note
    )


def choose_order(y: Array, most: int, *, restarts: int = 8, seed: int = 0) -> tuple[Order, ...]:
    """Held-out log likelihood per observation of 1 to `most` states, each run (or group of runs) left out once."""
    runs = len(y)
    group = np.arange(runs) % min(runs, FOLDS)
    used = (group[None, :] != np.unique(group)[:, None]).astype(np.float64)
    count = np.maximum(np.isfinite(y).sum((1, 2)), 1)
    scores = []
    for states in range(1, most + 1):
        chains, _ = hmm.fit(y, states, used=used, restarts=restarts, seed=seed)
        scores.append(hmm.log_likelihood(chains, y)[group, np.arange(runs)] / count)
    held = np.array(scores)  # (order, run)
    behind = held[held.mean(1).argmax()] - held
    errors = behind.std(1, ddof=1) / np.sqrt(runs)
    return tuple(Order(k + 1, float(held[k].mean()), float(errors[k])) for k in range(most))


def in_order(chain: hmm.Chain, paths: Path, steps: Array) -> tuple[hmm.Chain, Path]:
    """A model and its paths, states numbered by the median, over the runs that visit them, of their first step."""
    order = np.argsort([_entry(paths, steps, k) for k in range(len(chain.start))], kind="stable")
    return chain.ordered(order), np.argsort(order)[paths]


def _fewest(orders: Sequence[Order]) -> int:
    best = max(order.held_out for order in orders)
    return next(order.states for order in orders if best - order.held_out <= order.behind_se)


def _cube(runs: Mapping[str, Sequence[Series]], series: Sequence[str]) -> tuple[Array, Array]:
    """Steps (T,) that all series of all runs share, and the values (R, T, D) there, NaN where missing or rejected."""
    measured: list[list[dict[float, float]]] = []
    for run, members in runs.items():
        by_name = {each.name: each for each in members}
        missing = [name for name in series if name not in by_name]
        if missing:
            raise DataError(f"run {run!r} has no series {', '.join(missing)}; it has {', '.join(by_name) or 'none'}")
        measured.append([_points(by_name[name]) for name in series])
    shared = sorted(set.intersection(*(set(points) for row in measured for points in row)))
    if len(shared) < 8:
        raise DataError(
            f"a map needs at least 8 steps that all series of all runs share, got {len(shared)}: measure them alike"
        )
    values = np.array([[[points[step] for points in row] for step in shared] for row in measured])
    return np.array(shared), values


def _points(series: Series) -> dict[float, float]:
    values = np.array(series.values, dtype=np.float64)
    if series.rejected is not None:
        values[np.asarray(series.rejected, dtype=bool)] = np.nan
    steps = np.asarray(series.steps, dtype=np.float64)
    checked(steps, values, name=series.name)
    return dict(zip(steps.tolist(), values.tolist(), strict=True))


def _entry(paths: Path, steps: Array, state: int) -> float:
    """Median over the runs that visit a state of the step at which they first do; infinite where none does."""
    visits = (paths == state).any(1)
    return float(np.median(steps[(paths[visits] == state).argmax(1)])) if visits.any() else np.inf


def _state(
    k: int,
    chain: hmm.Chain,
    paths: Mapping[str, Path],
    steps: Array,
    series: Sequence[str],
    centre: Array,
    scale: Array,
) -> MapState:
    entry = {run: float(steps[(path == k).argmax()]) for run, path in paths.items() if (path == k).any()}
    step, interval, coverage = median_interval(np.array(list(entry.values())))
    mean = dict(zip(series, (centre + scale * chain.mean[k]).tolist(), strict=True))
    sd = dict(zip(series, (scale * chain.sd[k]).tolist(), strict=True))
    return MapState(k, mean, sd, entry, step, interval, coverage)


def _edges(paths: Mapping[str, Path]) -> tuple[Edge, ...]:
    taken = {
        run: Counter((int(a), int(b)) for a, b in zip(path[:-1], path[1:], strict=True) if a != b)
        for run, path in paths.items()
    }
    edges = []
    for a, b in sorted({edge for counts in taken.values() for edge in counts}):
        runs = tuple(run for run, counts in taken.items() if counts[a, b])
        test = binomtest(len(runs), len(paths))
        ci = test.proportion_ci(0.90, method="exact")
        times = sum(counts[a, b] for counts in taken.values())
        edges.append(Edge(a, b, runs, len(runs) / len(paths), (float(ci.low), float(ci.high)), times))
    return tuple(edges)
