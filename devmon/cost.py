"""What an observation costs, before it is made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from devmon.errors import DevmonError
from devmon.watch import Watch, unique_names


@dataclass(frozen=True)
class Cost:
    """Passes of one observation: `forwards` and `backwards` count sequences, each of `positions` tokens (or patches).

    `copies` is what it holds at most beside the model, in float32 copies of the parameters, None where that is unknown:
    the activations of the examples that pass at once (`micro_batch` or `batch_size`) come on top.

    An instrument tells it with a method `cost() -> Cost`. A backward pass costs about two forward passes, so the work
    of one observation is (forwards + 2 backwards) · positions tokens; what several instruments of a step share
    (`devmon.anatomy.activations`) is counted for each.
    """

    forwards: int = 0
    backwards: int = 0
    positions: int = 0
    copies: float | None = None

    @property
    def work(self) -> int:
        """In tokens passed forward."""
        return (self.forwards + 2 * self.backwards) * self.positions

    def bytes(self, parameters: int) -> int | None:
        """The memory of `copies`, for a model of so many parameters."""
        return None if self.copies is None else int(4 * self.copies * parameters)


@dataclass(frozen=True)
class Estimate:
    """What a watch will cost up to the last step: `observations` times `cost` (None: the instrument gives none)."""

    name: str
    instrument: str
    observations: int
    cost: Cost | None

    @property
    def work(self) -> int | None:
        """In tokens passed forward, all observations together."""
        return None if self.cost is None else self.cost.work * self.observations


def estimates(watches: Iterable[Watch], last: int) -> list[Estimate]:
    """What each watch costs in a run of the steps 0 to `last`. Raises DevmonError for a `last` below 0."""
    if last < 0:
        raise DevmonError(f"the last step must be at least 0, got {last}")
    estimated = []
    for watch in unique_names(watches):
        observations = sum(1 for step in range(last + 1) if step in watch.steps)
        cost = getattr(watch.instrument, "cost", None)
        name = getattr(type(watch.instrument), "__name__", "")
        estimated.append(Estimate(watch.name, name, observations, cost() if callable(cost) else None))
    return estimated
