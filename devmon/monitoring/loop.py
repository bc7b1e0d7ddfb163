"""`LoopMonitor`: what `devmon.callbacks.Monitor` is for Lightning, for a training loop of one's own. Needs no Lightning."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from types import TracebackType

import torch

from devmon.errors import DevmonError, StoreError
from devmon.monitoring.fingerprint import identity
from devmon.monitoring.observe import observe
from devmon.monitoring.ranks import ALONE, Ranks
from devmon.snapshot import weights_digest
from devmon.store.trajectory import Trajectory
from devmon.watch import Watch, unique_names


class LoopMonitor:
    """Measure the model of a plain loop and keep everything in one trajectory:

        with LoopMonitor("runs/my-run.zarr", watches) as monitor:
            monitor.step(0, model)
            for step, batch in enumerate(data, 1):
                ...  # one update of the optimizer
                monitor.step(step, model)

    `step` counts the updates made; 0 is the model before the first. A step that was seen is passed over, so it may be
    called for every micro-batch. The first call says where training starts or resumes: rows past it are set aside as an
    earlier attempt, once configuration and weights are found to be those stored. Training is not touched: instruments
    work on a copy, and random states and switches are put back.

    An instrument that fails, or a row that cannot be written, is warned of once a watch, recorded, and training goes on;
    `strict` lets it end training. An instrument that does not fit the model, and another run's trajectory, are refused.
    Of several processes with the same weights, one has a monitor; or all have, with the same `ranks`, and measure
    together (`devmon.callbacks.FabricMonitor`).
    """

    def __init__(self, trajectory: str | os.PathLike[str] | Trajectory, watches: Iterable[Watch], *,
                 strict: bool = False, ranks: Ranks = ALONE) -> None:  # fmt: skip
        def opened() -> Trajectory | None:
            if ranks.rank:
                return None
            return trajectory if isinstance(trajectory, Trajectory) else Trajectory(trajectory)

        self._ranks = ranks
        self.trajectory = ranks.agree(opened)
        self.watches = unique_names(watches)
        self.strict = strict
        self._failures: dict[str, dict[int, str]] = {}
        self._seen: int | None = None

    def step(self, step: int, model: torch.nn.Module) -> None:
        """Measure what is due at `step`. Raises DevmonError for a step before the last one."""
        if step == self._seen:
            return
        if step < (self._seen or 0):
            raise DevmonError(f"steps only grow: got {step} after {self._seen or 0}. Count the optimizer's updates from 0, "
                              "and make another LoopMonitor for another training")  # fmt: skip
        if self._seen is None:
            self._ranks.first(
                lambda: resume(self.trajectory, self.watches, step, model) if self.trajectory is not None else None
            )
        self._seen = step
        observe(
            step, model, self.watches, self.trajectory, strict=self.strict, ranks=self._ranks, failures=self._failures
        )

    def close(self) -> None:
        """Fold the rows. Without it, or where it cannot be done, nothing is lost: unfolded rows are read all the same."""
        if self.trajectory is None:
            return
        try:
            self.trajectory.fold()
        except (StoreError, OSError) as error:
            warnings.warn(
                f"{self.trajectory.path} was not tidied up at the end ({error}); no row in it is lost", stacklevel=2
            )

    def __enter__(self) -> LoopMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def resume(trajectory: Trajectory, watches: Iterable[Watch], step: int, model: torch.nn.Module) -> None:
    """Refuse another configuration or another run first, then set aside what training on from `step` supersedes."""
    known = [watch for watch in watches if watch.name in trajectory]
    for watch in known:
        trajectory.declare(watch.name, identity(watch.instrument))
    held = [watch.name for watch in known if trajectory.holds(watch.name, step)]
    weights = weights_digest(model) if held else ""
    for name in held:
        trajectory.holds(name, step, weights=weights)
    trajectory.supersede(after=step)
