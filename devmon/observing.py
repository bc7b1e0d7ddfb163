"""The one way a measurement is made, online and offline: instruments on a snapshot, rows to a trajectory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable

import torch
import xarray as xr

from devmon.distributed import ALONE, Ranks
from devmon.errors import DevmonError
from devmon.fingerprint import identity
from devmon.isolation import isolated, private_copy
from devmon.snapshot import Divisible, Instrument, Snapshot, derive_seed, weights_digest
from devmon.trajectory import Trajectory
from devmon.watch import Watch, unique_names


def observe(
    step: int,
    model: torch.nn.Module,
    watches: Iterable[Watch],
    trajectory: Trajectory | None,
    *,
    strict: bool = True,
    ranks: Ranks = ALONE,
) -> list[str]:
    """Measure every watch that is due at `step` and not yet in the trajectory; returns the names it appended.

    Each instrument gets its own copy of the model and a seed made of the run's seed and the watch's name, so its
    numbers do not depend on which other instruments ran, or when. Nothing of the caller's process or model changes.

    With `strict=False` an instrument that fails (other than by not fitting the model, or a refused store) is
    recorded with its reason, warned of once, and the others go on.

    With several `ranks` all of them call this with the same step and watches, and only rank 0 holds the `trajectory`
    (None elsewhere) and decides what is missing in it. Every rank measures its share of a `Divisible` instrument, at
    the weights of rank 0; the other instruments run on rank 0. What is raised is raised on every rank.

    Raises `InstrumentError` where an instrument does not fit the model, `IdentityError` where the trajectory holds
    another configuration or other weights for this step.
    """
    due = [watch for watch in unique_names(watches) if step in watch.steps]
    if not due:
        return []
    weights, seeds = ranks.first(_missing, step, model, due, trajectory)
    appended = []
    for watch in due:
        if watch.name not in seeds:
            continue
        started = time.perf_counter()
        try:
            dataset = _measure(watch.instrument, step, model, seeds[watch.name], ranks)
        except DevmonError:
            raise
        except Exception as error:
            if strict:
                raise
            ranks.first(_record_failure, watch.name, step, error, trajectory)
            continue
        ranks.first(_append, watch.name, step, dataset, weights, time.perf_counter() - started, trajectory)
        appended.append(watch.name)
    return appended


def _missing(
    step: int, model: torch.nn.Module, due: Iterable[Watch], trajectory: Trajectory | None
) -> tuple[str, dict[str, int]]:
    """The digest of the weights, and the seed of each watch that is not yet in the trajectory."""
    if trajectory is None:
        raise DevmonError("observe needs the trajectory on rank 0: give it there, and None on the other ranks")
    weights = weights_digest(model)
    seeds = {}
    for watch in due:
        trajectory.declare(watch.name, identity(watch.instrument))
        if not trajectory.holds(watch.name, step, weights=weights):
            seeds[watch.name] = derive_seed(trajectory.seed, watch.name)
    return weights, seeds


def _measure(instrument: Instrument, step: int, model: torch.nn.Module, seed: int, ranks: Ranks) -> xr.Dataset | None:
    """The dataset on rank 0, None on the others. What may fail on one rank only is done within a call of `ranks`."""

    def alone() -> xr.Dataset | None:
        with isolated():
            return instrument(Snapshot(step, private_copy(model), seed)) if ranks.rank == 0 else None

    if ranks.size == 1 or not isinstance(instrument, Divisible):
        return ranks.agree(alone)

    def part() -> xr.Dataset | None:
        with isolated():
            share = instrument.share(ranks.rank, ranks.size)
            return None if share is None else share(Snapshot(step, twin, seed))

    with isolated():
        twin = ranks.agree(private_copy, model)
    ranks.equalise(twin)
    parts = [found for found in ranks.gather(part) if found is not None]
    return ranks.agree(lambda: instrument.join(parts) if ranks.rank == 0 else None)


def _append(
    name: str, step: int, dataset: xr.Dataset | None, weights: str, seconds: float, trajectory: Trajectory | None
) -> None:
    assert trajectory is not None  # rank 0
    assert dataset is not None
    trajectory.append(name, step, dataset, weights=weights, seconds=seconds)


def _record_failure(name: str, step: int, error: Exception, trajectory: Trajectory | None) -> None:
    assert trajectory is not None  # rank 0
    reason = " ".join([f"{type(error).__name__}: {error}", *(f"({note})" for note in getattr(error, "__notes__", []))])
    if not trajectory.failures(name):
        warnings.warn(f"{name} failed at step {step} ({reason}); the others go on", stacklevel=6)  # observe's caller
    trajectory.fail(name, step, reason)
