"""`LoopMonitor`: the one monitor, of a plain loop, and of every trainer through a shell in `devmon.callbacks`."""

from __future__ import annotations

import operator
import os
import time
import warnings
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, TypedDict

import torch
import xarray as xr

from devmon.errors import DevmonError
from devmon.monitoring.budget import Budget
from devmon.monitoring.choices import forget_after
from devmon.monitoring.companion import Companion
from devmon.monitoring.densify import Densify
from devmon.monitoring.failures import Failures
from devmon.monitoring.fingerprint import identity
from devmon.monitoring.layouts import layout_of
from devmon.monitoring.long_observations import LongObservations
from devmon.monitoring.mirror import Mirror
from devmon.monitoring.observe import attempt, observe, refusal
from devmon.monitoring.page_updates import PageUpdates
from devmon.monitoring.passed import Passed
from devmon.monitoring.ranks import SINGLE, Ranks
from devmon.monitoring.unclosed import fold_at_end
from devmon.monitoring.updates import Rates, Updates
from devmon.snapshot import Update, weights_digest
from devmon.store.trajectory import Trajectory
from devmon.watch import Watch, unique_names

Part = str | Callable[[Any], torch.nn.Module] | None


class MonitorOptions(TypedDict, total=False):
    """The options of `LoopMonitor` that its shells hand on."""

    strict: bool
    max_overhead: float | None
    densify: bool
    live: str | os.PathLike[str] | None
    clock: Callable[[], float]
    companions: Iterable[Companion]
    optimizer: Any


class LoopMonitor:
    """Measure the model of a plain loop and keep everything in one trajectory:

        with LoopMonitor("runs/my-run.zarr", watches) as monitor:
            monitor.step(0, model)
            for step, batch in enumerate(data, 1):
                ...  # one update of the optimizer
                monitor.step(step, model)

    `step` counts the updates made; 0 is the model before the first. A step that was seen is passed over, so it may be
    called for every micro-batch; what was due at a step that is never given is measured at the next one (`Passed`). The
    first call says where training starts or resumes: rows past it are set aside as an earlier attempt, once
    configuration and weights are found to be those stored. Training is not touched: instruments work on a copy (not
    compiled, not under autocast), and random states and switches are put back.

    - `trajectory`: the path of the run's store, or an open `Trajectory`.
    - `watches`: what is measured, and at which optimizer steps.
    - `model`: the part that instruments see: the name of a submodule (`"net"`), or a function of the model.
    - `strict`: let any failure end training. By default an instrument that fails, or a row that cannot be written
      (a full disk, a lost mount), is warned of once a watch, recorded with its reason in `Trajectory.failures` (as soon
      as that can be written again), and training goes on without that row. Refused at the first call, before training:
      a store that cannot be opened or holds another run, and instruments that do not fit the model. Every watch is
      tried then, those that are due later too (and nothing is kept of them): what is not refused there only fails.
      An instrument that changed the model that trains ends training whenever it does.
    - `log`: send the headline numbers of each observation on too, as `devmon/<watch>/<variable>` at the optimizer step:
      a logger (Lightning's, TensorBoard's, Weights & Biases') or a function of (values, step). See `Mirror`.
    - `max_overhead`: the share of the wall time, such as 0.1, that the monitor may take. Due observations that would
      exceed it are left out and listed in the trajectory's `attrs["skipped"]` (when training ends, also by an
      exception). Step 0 and the first observation of each watch are always made; `Budget` has the rule. `clock` tells
      the seconds.
    - `densify`: look for events while training goes on, and measure every watch more often while an alarm is up (see
      `Densify`). A look takes about as long as `devmon.analysis.detect` of the run's scalars and maxima; each of those
      is looked at 24 times at most.
    - `live`: an .html file that is made again while training goes on, by a process of its own (`LivePage`); open it in
      a browser and it loads itself again. Its events and alarms are provisional. When training ends, the last is made.
    - `optimizer`: the optimizer of the loop, or several, for its learning rates, which say whether an event is the
      schedule's, and for instruments that look at its updates (`GradientStatistics`); `Monitor` and `TrainerMonitor`
      know it. Copies of weights, gradients and second moments are kept from a due update to its measurement.
    - `companions`: your own (see `Companion`), beside those that the options stand for.
    - `ranks`: of several processes with the same weights, one has a monitor; or all have, with the same `ranks`, and
      measure together (`devmon.callbacks.FabricMonitor`). None: `open` tells them later, before the first step.
    """

    def __init__(
        self,
        trajectory: str | os.PathLike[str] | Trajectory,
        watches: Iterable[Watch],
        *,
        model: Part = None,
        strict: bool = False,
        log: Any = None,
        max_overhead: float | None = None,
        densify: bool = False,
        live: str | os.PathLike[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        companions: Iterable[Companion] = (),
        optimizer: Any = None,
        ranks: Ranks | None = SINGLE,
    ) -> None:
        self.path = trajectory.path if isinstance(trajectory, Trajectory) else trajectory
        self.watches = unique_names(watches)
        self.model = model
        self.strict = strict
        self.densify = Densify() if densify else None
        self.trajectory: Trajectory | None = None  # on rank 0, once it is open
        self.ranks = SINGLE
        self._given = trajectory
        self._failures = Failures()
        self._seen: int | None = None
        self._begun: set[str] = set()

        # The page is the outermost: it is made after each step when the alarms of that step are in the trajectory, of
        # which the logger hears too. The budget stands before all that takes time, so as to count it.
        options = [
            None if live is None else PageUpdates(live),
            self._failures,
            Passed(),
            LongObservations(clock)
            if max_overhead is None
            else Budget(max_overhead, [watch.name for watch in self.watches], clock),
            None if log is None or log is False else Mirror(log),
            self.densify,
            Rates(),
            Updates() if any(getattr(watch.instrument, "needs_update", False) for watch in self.watches) else None,
        ]
        self.optimizer = optimizer
        self.companions = (*(companion for companion in options if companion is not None), *companions)
        for companion in self.companions:
            companion.monitor = self
        if ranks is not None:
            self.open(ranks)

    def open(self, ranks: Ranks = SINGLE) -> None:
        """Open the trajectory on rank 0, for a training that begins with the next `step`. Every rank does."""
        self.ranks, self._seen, self._begun = ranks, None, set()
        self.trajectory = ranks.agree(self._opened)
        if self.trajectory is not None:
            self._take_back = fold_at_end(self.trajectory)

    def step(self, step: int, model: torch.nn.Module) -> None:
        """Measure what is due at `step`. Raises DevmonError for a step before the last one, and for no whole number."""
        try:
            step = operator.index(step)  # of NumPy or torch too
        except TypeError:
            raise DevmonError(f"a step is a whole number of updates, got {step!r}: give int(step)") from None
        if step == self._seen:
            return
        if step < (self._seen or 0):
            raise DevmonError(
                f"steps only grow: got {step} after {self._seen or 0}. Count the optimizer's updates from 0, and make "
                "another LoopMonitor for another training"
            )
        first = self._seen is None
        if first:
            self.ranks.agree(self._resume, step, model)
            for companion in self.companions:
                companion.begin(step)
            if self.updates is not None and self.trajectory is not None:
                self.updates.attach(self.optimizer, self.network(model))
        self._seen = step
        due = self._due(step)
        trials = self._untried(due, self.network(model)) if first else []
        if due or trials:
            self._measure(step, self.network(model), due, trials)
        self._begun = {watch.name for watch in self.watches}
        if self.updates is not None:
            self.updates.passed()

    @property
    def last(self) -> int | None:
        """The last step that was given."""
        return self._seen

    @property
    def updates(self) -> Updates | None:
        """What hands the optimizer's updates over, where an instrument asks for them."""
        return next((companion for companion in self.companions if isinstance(companion, Updates)), None)

    def attempt(self, model: torch.nn.Module) -> None:
        """Try every watch on the model and keep nothing, for a training of which nothing is kept. Raises
        `InstrumentError` where some do not fit."""
        if misfits := attempt(0, self.network(model), self.watches, {}, update=Update()):
            raise refusal(misfits, self.network(model))

    def network(self, model: torch.nn.Module) -> torch.nn.Module:
        """What instruments see of the model that `step` is given."""
        return part(model, self.model)

    def close(self, *, raising: bool = True) -> None:
        """Write what is still to be written, and fold. Without it rows are folded when the monitor goes or the process
        ends; where it cannot be done (a kill), no row is lost: unfolded rows are read all the same. What goes wrong is
        warned of; with `strict` it is raised, unless `raising` is False (something else ended training, and is to be
        raised)."""
        if self.trajectory is None:
            return
        self._take_back()
        try:
            for companion in self.companions:
                companion.record()
            self.trajectory.fold()
        except Exception as error:
            if raising and self.strict:
                raise
            warnings.warn(f"{self.path} was not tidied up at the end ({error}); no row in it is lost", stacklevel=2)
        finally:
            for companion in self.companions:
                companion.close()

    def __enter__(self) -> LoopMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(raising=error is None)

    def _opened(self) -> Trajectory | None:
        if self.ranks.rank:
            return None
        return self._given if isinstance(self._given, Trajectory) else Trajectory(self._given)

    def _resume(self, step: int, model: torch.nn.Module) -> None:
        network = self.network(model)  # on every rank: one that has no such part tells the others
        if self.trajectory is not None:
            resume(self.trajectory, self.watches, step, network)

    def _due(self, step: int) -> list[Watch]:
        due = [watch for watch in self.watches if step in watch.steps]
        for companion in self.companions:
            due = companion.due(step, due)
        return due

    def _untried(self, due: list[Watch], network: torch.nn.Module) -> list[Watch]:
        """The watches that are not due, and of which the trajectory has no row either."""
        held = self.ranks.first(self._with_rows, network)
        return [watch for watch in self.watches if watch.name not in held | {other.name for other in due}]

    def _measure(self, step: int, network: torch.nn.Module, due: list[Watch], trials: list[Watch]) -> None:
        def measured(name: str, dataset: xr.Dataset | None) -> None:
            for companion in self.companions:
                companion.measured(step, name, dataset)

        chosen = self.ranks.first(self._chosen, step, [watch.name for watch in due]) if due else []
        observe(
            step,
            network,
            [watch for watch in due if watch.name in chosen],
            self.trajectory,
            strict=self.strict,
            ranks=self.ranks,
            each=measured,
            failures=self._failures.reasons,
            begun=self._begun,
            trials=trials,
            update=None if self.updates is None else self.updates.update,
        )
        for companion in reversed(self.companions) if due else ():
            companion.after(step)

    def _with_rows(self, network: torch.nn.Module) -> set[str]:
        assert self.trajectory is not None
        known, run = [watch for watch in self.watches if watch.name in self.trajectory], self.trajectory
        return {
            watch.name
            for watch in known
            if run.steps(watch.name)
            and not run.corrects(watch.name, identity(watch.instrument), layout_of(watch.instrument, network))
        }

    def _chosen(self, step: int, names: list[str]) -> list[str]:
        for companion in self.companions:
            names = companion.choose(step, names)
        return names


def part(module: torch.nn.Module, which: Part) -> torch.nn.Module:
    """The submodule of that name, what a function makes of the module, or (None) the module itself."""
    if which is None:
        return module
    if not isinstance(which, str):
        return which(module)
    try:
        return module.get_submodule(which)
    except AttributeError:
        names = ", ".join(name for name, _ in module.named_children())
        raise DevmonError(f"{type(module).__name__} has no submodule {which!r}; it has {names}") from None


def resume(trajectory: Trajectory, watches: Iterable[Watch], step: int, model: torch.nn.Module) -> None:
    """Refuse another configuration or another run first, then set aside what training on from `step` supersedes."""
    known = [watch for watch in watches if watch.name in trajectory]
    for watch in known:
        trajectory.redeclare(watch.name, identity(watch.instrument))
    held = [watch.name for watch in known if trajectory.holds(watch.name, step)]
    weights = weights_digest(model) if held else ""
    for name in held:
        trajectory.holds(name, step, weights=weights)
    trajectory.supersede(after=step)
    forget_after(trajectory, step)
    # The lists of single steps are cut as the rows are: steps left out, and steps that only an alarm made due.
    for key in ("skipped", "densified"):
        listed = trajectory.attrs.get(key, {})
        kept = {name: [s for s in steps if s <= step] for name, steps in listed.items()}
        if kept != listed:
            trajectory.record(**{key: kept})
    rates = trajectory.attrs.get("rates", {})
    if (before := {at: rate for at, rate in rates.items() if int(at) <= step}) != rates:
        trajectory.record(rates=before)
