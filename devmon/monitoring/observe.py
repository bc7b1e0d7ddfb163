"""The one way a measurement is made, online and offline: instruments on a snapshot, rows to a trajectory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr

from devmon.anatomy.passes.plan import Plan
from devmon.errors import DevmonError, IdentityError, InstrumentError
from devmon.monitoring.choices import chosen, confirm
from devmon.monitoring.fingerprint import identity
from devmon.monitoring.isolation import ChangedModelError, guarded, isolated, marks, private_copy
from devmon.monitoring.layouts import layout_of, remedy
from devmon.monitoring.ranks import SINGLE, Ranks
from devmon.monitoring.wrappers import refuse_absent
from devmon.snapshot import Choosing, Divisible, Instrument, Snapshot, Update, derive_seed, weights_digest
from devmon.store.trajectory import Trajectory
from devmon.watch import Watch, unique_names


def observe(
    step: int,
    model: torch.nn.Module,
    watches: Iterable[Watch],
    trajectory: Trajectory | None,
    *,
    strict: bool = True,
    ranks: Ranks = SINGLE,
    each: Callable[[str, xr.Dataset | None], None] | None = None,
    failures: dict[str, dict[int, str]] | None = None,
    begun: Container[str] = (),
    trials: Iterable[Watch] = (),
    update: Update | None = None,
) -> list[str]:
    """Measure every watch that is due at `step` and not yet in the trajectory; returns the names it appended.

    Each instrument gets its own copy of the model and a seed made of the run's seed and the watch's name, so its
    numbers do not depend on which other instruments ran, or when. Nothing of the caller's process or model changes.

    With `strict=False` an instrument that fails, or a row that cannot be written, is recorded with its reason where the
    store can still be written, warned of once, and the others go on. An instrument that does not fit the model (it
    raises a `DevmonError`) is refused, once all were tried, unless its watch is among `begun` (it was measured before)
    or the weights are not finite: then it failed as others do. `failures` (watch to step to reason) is added to, and a
    watch in it is not warned of again; without it, a watch of which the trajectory holds an earlier failure is not.

    `each(name, dataset)` is called after every watch that was measured, with its row, or None where it failed. `trials`
    are measured too, and nothing is kept of them: what does not fit is refused before it is due. `update` is what the
    optimizer did, for instruments that ask for it.

    With several `ranks` all of them call this with the same step and watches, and only rank 0 holds the `trajectory`
    (None elsewhere), decides what is missing in it and calls `each`. Every rank measures its share of a `Divisible`
    instrument, at the weights of rank 0; the other instruments run on rank 0. What is raised is raised on every rank.

    What an instrument leaves open (`devmon.snapshot.Choosing`) is chosen at the first step where it can be, and kept in
    `attrs["chosen"]`; until then its rows are left out, with the reason among the failures and without a warning.

    Raises `InstrumentError` where instruments do not fit the model (all of them named) or changed the caller's own, or
    its weights are not in this process; `IdentityError` where the trajectory holds another configuration or other
    weights for this step.
    """
    due = [watch for watch in unique_names(watches) if step in watch.steps]
    trials = list(trials)
    if not due and not trials:
        return []
    # Rank 0 says what is missing, so that all ranks measure the same. What the trajectory holds is not measured again.
    book = Book(trajectory, strict, each, failures, begun)
    ranks.agree(refuse_absent, model)
    weights, seeds = ranks.first(book.missing, step, model, due)
    trial_seeds = ranks.first(book.seeds, trials)
    # Watch by watch, each committed before the next is begun. `memo` holds what instruments of one step share: passes
    # that one of them needs are read by all.
    appended, misfits = [], dict[str, DevmonError]()
    measured = [watch.instrument for watch in (*(w for w in due if w.name in seeds), *trials)]
    memo: dict[Any, Any] = {"plan": Plan(measured)}
    for watch in due:
        if watch.name not in seeds:
            continue
        started = time.perf_counter()
        try:
            # What it leaves open is chosen by rank 0, once for the run; where that cannot be done yet there is no row.
            instrument, record = watch.instrument, None
            if isinstance(instrument, Choosing) and not instrument.settled:
                record = ranks.first(book.chosen, watch.name, instrument, step, model, seeds[watch.name], memo)
                if record is None:
                    continue
                instrument = instrument.settle(record)
            dataset = _measure(instrument, step, model, seeds[watch.name], ranks, memo, update)
            seconds, layout = time.perf_counter() - started, layout_of(instrument, model, memo)
            ranks.first(book.append, watch, step, dataset, weights, seconds, record, layout)
        except Exception as error:
            if strict or isinstance(error, ChangedModelError):
                raise
            if isinstance(error, DevmonError) and watch.name not in begun and not by_system(error) and _finite(model):
                misfits[watch.name] = error
            else:
                ranks.first(book.fail, watch.name, step, error)
        else:
            ranks.first(book.measured, watch.name, dataset)
            appended.append(watch.name)
    misfits |= attempt(step, model, trials, trial_seeds, ranks, memo, update) if trials else {}
    if misfits:
        raise refusal(misfits, model)
    return appended


def attempt(
    step: int,
    model: torch.nn.Module,
    watches: Iterable[Watch],
    seeds: Mapping[str, int],
    ranks: Ranks = SINGLE,
    memo: dict[Any, Any] | None = None,
    update: Update | None = None,
) -> dict[str, DevmonError]:
    """The watches whose instruments do not fit the model, with what they say. Nothing is stored; other errors, which
    may come of the moment, count for nothing."""
    memo, misfits = {} if memo is None else memo, {}
    for watch in watches:
        if isinstance(watch.instrument, Choosing) and not watch.instrument.settled:
            continue  # what it is to be is chosen at trained weights
        try:
            _measure(watch.instrument, step, model, seeds.get(watch.name, 0), ranks, memo, update)
        except ChangedModelError:
            raise
        except DevmonError as error:
            if _finite(model):
                misfits[watch.name] = error
        except Exception:
            continue
    return misfits


def refusal(misfits: Mapping[str, DevmonError], model: torch.nn.Module) -> DevmonError:
    """One error for all watches that do not fit the model, with the layout that it could declare."""
    with suppress(InstrumentError):  # a model that cannot be copied was refused for that
        if line := remedy(model, map(str, misfits.values())):
            last = list(misfits)[-1]
            misfits = {**misfits, last: InstrumentError(f"{misfits[last]}. {line}")}
    if len(misfits) == 1:
        return next(iter(misfits.values()))
    said = "; ".join(f"{name}: {error}" for name, error in misfits.items())
    left_out = ", ".join(map(repr, misfits))
    return InstrumentError(
        f"{len(misfits)} watches do not fit this model ({said}). The others do: leave these out, as in "
        f"[watch for watch in watches if watch.name not in ({left_out})]"
    )


def _finite(model: torch.nn.Module) -> bool:
    return all(bool(torch.isfinite(tensor.detach()).all()) for tensor in model.parameters())


def _measure(
    instrument: Instrument,
    step: int,
    model: torch.nn.Module,
    seed: int,
    ranks: Ranks,
    memo: dict[Any, Any],
    update: Update | None,
) -> xr.Dataset | None:
    """The dataset on rank 0, None on the others. What may fail on one rank only is done within a call of `ranks`."""

    def whole() -> xr.Dataset | None:
        if ranks.rank:
            return None
        with isolated(), guarded(model):
            # Who says what it reads leaves the model as it is: its copy serves the next of them.
            twin, reader = memo.pop("model", None), hasattr(instrument, "reads")
            twin = twin if reader and twin is not None else private_copy(model)
            before = marks(twin)
            measured = _dataset(instrument(Snapshot(step, twin, seed, memo, update)))
            if reader and marks(twin) == before:
                memo["model"] = twin
        return measured

    if ranks.size == 1 or not isinstance(instrument, Divisible):
        return ranks.agree(whole)

    def part() -> xr.Dataset | None:
        with isolated(), guarded(model):
            share = instrument.share(ranks.rank, ranks.size)
            return None if share is None else share(Snapshot(step, twin, seed, memo))

    with isolated():
        twin = ranks.agree(private_copy, model)
    ranks.equalise(twin)
    parts = [measured for measured in ranks.gather(part) if measured is not None]
    return ranks.agree(lambda: _dataset(instrument.join(parts)) if ranks.rank == 0 else None)


def _dataset(measured: object) -> xr.Dataset:
    """What an instrument returned, which is a dataset or no measurement."""
    if not isinstance(measured, xr.Dataset):
        raise InstrumentError(f"an instrument returns an xarray.Dataset, this one returned {type(measured).__name__}")
    return measured


@dataclass(frozen=True)
class Book:
    """What rank 0 does with its trajectory in one `observe`: every decision about a failing store is made here."""

    trajectory: Trajectory | None
    strict: bool
    each: Callable[[str, xr.Dataset | None], None] | None
    failures: dict[str, dict[int, str]] | None
    begun: Container[str] = ()

    def missing(self, step: int, model: torch.nn.Module, due: Iterable[Watch]) -> tuple[str, dict[str, int]]:
        """The digest of the weights, and the seed of each watch that is not yet in the trajectory."""
        if self.trajectory is None:
            raise DevmonError("observe needs the trajectory on rank 0: give it there, and None on the other ranks")
        weights = weights_digest(model)
        seeds = {}
        for watch in due:
            try:
                mine, layout = identity(watch.instrument), layout_of(watch.instrument, model)
                self.trajectory.redeclare(watch.name, mine)
                held = self.trajectory.holds(watch.name, step, weights=weights)
                held = held and not self.trajectory.corrects(watch.name, mine, layout)
            except Exception as error:
                if self.strict or not (by_system(error) or watch.name in self.begun):
                    raise
                self.fail(watch.name, step, error, record=False)  # it may hold a row there
                continue
            if not held:
                seeds[watch.name] = derive_seed(self.trajectory.seed, watch.name)
        return weights, seeds

    def chosen(
        self, name: str, instrument: Choosing, step: int, model: torch.nn.Module, seed: int, memo: dict[Any, Any]
    ) -> dict[str, Any] | None:
        """The record of what was chosen for this watch, or None where that cannot be done at these weights."""
        assert self.trajectory is not None
        try:
            return chosen(self.trajectory, name, instrument, step, model, seed, memo)
        except InstrumentError as error:
            self.fail(name, step, error, warn=False)
        return None

    def seeds(self, watches: Iterable[Watch]) -> dict[str, int]:
        assert self.trajectory is not None
        return {watch.name: derive_seed(self.trajectory.seed, watch.name) for watch in watches}

    def append(
        self,
        watch: Watch,
        step: int,
        dataset: xr.Dataset | None,
        weights: str,
        seconds: float,
        record: dict[str, Any] | None,
        layout: str | None,
    ) -> None:
        """Write the row; `record` is what was chosen for it, `layout` what the model was read by."""
        assert self.trajectory is not None
        assert dataset is not None
        name = watch.name
        if layout is not None and (moved := self.trajectory.correct(name, identity(watch.instrument), layout)):
            warnings.warn(
                f"{name}: its layout was corrected, so it begins anew at step {step}; {moved} rows of the earlier one "
                "are kept as an earlier attempt (Trajectory.attempts)",
                stacklevel=6,
            )
        self.trajectory.append(name, step, dataset, weights=weights, seconds=seconds)
        if record is not None:
            confirm(self.trajectory, name, step, record, dataset)

    def fail(self, name: str, step: int, error: Exception, record: bool = True, warn: bool = True) -> None:
        """Record that there is no row, and warn of it once."""
        assert self.trajectory is not None
        notes = (f"({note})" for note in getattr(error, "__notes__", []))
        reason = " ".join([f"{type(error).__name__}: {error}", *notes])
        earlier = None if self.failures is None else self.failures.get(name)
        with suppress(Exception):  # where not even that can be written, the warning has to do
            if self.failures is None:
                earlier = self.trajectory.failures(name)
            if record:
                self.trajectory.fail(name, step, reason)
        if warn and not earlier:
            warnings.warn(f"{name} failed at step {step} ({reason}); the others go on", stacklevel=6)
        if self.failures is not None:
            self.failures.setdefault(name, {})[step] = reason
        self.measured(name, None)

    def measured(self, name: str, dataset: xr.Dataset | None) -> None:
        if self.each is not None:
            self.each(name, dataset)


def by_system(error: Exception) -> bool:
    """Whether the operating system refused (a full disk, no permission), and not the trajectory."""
    return isinstance(error, OSError) or (isinstance(error.__cause__, OSError) and not isinstance(error, IdentityError))
