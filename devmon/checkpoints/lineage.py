"""Whether each checkpoint descends from the one before it: distances in weights, against those of its neighbours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from devmon.checkpoints.audit import Fault
from devmon.checkpoints.selection import select
from devmon.checkpoints.series import Series
from devmon.checkpoints.weights import State
from devmon.errors import DataError

# A checkpoint is outlying where it is so many times as far from both neighbours as these are from each other. Of steps
# on a straight way the ratio is below 1/2, of a random walk .7, of independent draws around one point 1; of trainings
# with Adam (demo, grokking; 8 to 94 checkpoints) at most .82.
OUTLYING = 1.5
# A step does not descend from the one before where they are so many times as far apart as the intervals beside it
# allow: their distances, times the ratio of steps where this interval is longer (as on a straight way, the most). In
# the same trainings at most 1.4.
BROKEN = 5.0


@dataclass(frozen=True)
class Lineage:
    """The `steps` that were read; `distance` (n - 1) ‖w' − w‖ between neighbours, `across` (n - 2) between the two
    neighbours of each inner step, `size` (n) ‖w‖; and the `faults`."""

    steps: list[int]
    distance: list[float]
    across: list[float]
    size: list[float]
    faults: list[Fault]


def lineage(series: Series, count: int, tell: Callable[[int], None] = lambda step: None) -> Lineage:
    """Read about `count` checkpoints, evenly in log(step), the first and the last among them, three at a time.

    Faults: `lineage` (an outlying step, one that does not descend from the one before), `twins` (equal weights),
    `missing` (a checkpoint that cannot be read) and `extra` (other tensors than the one before). Raises DataError for
    fewer than three.
    """
    steps = series.steps if count >= len(series.steps) else select(series.steps, f"log:{max(1, count - 1)}")
    if count < 3 or len(steps) < 3:
        raise DataError(f"lineage needs three checkpoints at least, got {min(count, len(steps))}: raise --weights")
    read: list[int] = []
    window: list[State] = []
    distance: list[float] = []
    across: list[float] = []
    size: list[float] = []
    faults: list[Fault] = []
    for step, checkpoint in series.stream(steps):
        tell(step)
        if isinstance(checkpoint, DataError):
            faults.append(Fault("missing", (step,), f"step {step} cannot be read: {checkpoint}"))
            continue
        state, previous = checkpoint.state, window[-1] if window else checkpoint.state
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in previous.items()}:
            faults.append(Fault("extra", (read[-1], step), f"step {step} has other tensors than step {read[-1]}"))
            continue
        size.append(_distance(state, None))
        if window:
            distance.append(_distance(state, window[-1]))
        if len(window) == 2:
            across.append(_distance(state, window[0]))
        window, read = [*window[-1:], state], [*read, step]
    return Lineage(read, distance, across, size, faults + judge(read, distance, across))


def judge(steps: Sequence[int], distance: Sequence[float], across: Sequence[float]) -> list[Fault]:
    """The faults that the distances tell (`OUTLYING`, `BROKEN`)."""
    faults = []
    outlying: set[int] = set()
    for i, (before, after) in enumerate(itertools.pairwise(distance)):
        step, between = steps[i + 1], across[i]
        if min(before, after) > OUTLYING * between:
            outlying.add(i + 1)
            times = "infinitely" if between == 0 else f"{min(before, after) / between:.1f} times"
            faults.append(
                Fault("lineage", (step,), f"step {step} is outlying: {times} as far from steps {steps[i]} and "
                      f"{steps[i + 2]} as these are from each other")
            )  # fmt: skip
    # intervals that end at an outlying step are its fault alone
    for i, apart in enumerate(distance):
        if apart == 0:
            words = f"steps {steps[i]} and {steps[i + 1]} have equal weights"
            faults.append(Fault("twins", (steps[i], steps[i + 1]), words))
        if {i, i + 1} & outlying:
            continue
        length = steps[i + 1] - steps[i]
        beside = [j for j in (i - 1, i + 1) if 0 <= j < len(distance) and not {j, j + 1} & outlying]
        allowed = [distance[j] * max(1.0, length / (steps[j + 1] - steps[j])) for j in beside]
        if allowed and max(allowed) > 0 and apart > BROKEN * max(allowed):
            faults.append(
                Fault("lineage", (steps[i + 1],), f"step {steps[i + 1]} does not descend from step {steps[i]}: they "
                      f"are {apart / max(allowed):.1f} times as far apart as the steps beside them allow")
            )  # fmt: skip
    return faults


def _distance(state: State, other: State | None) -> float:
    """‖w − w'‖ over all floating tensors, summed in float64; ‖w‖ without another."""
    total = 0.0
    for key, value in state.items():
        if value.is_floating_point():
            apart = value.float() if other is None else value.float() - other[key].float()
            total += float(torch.linalg.vector_norm(apart, dtype=torch.float64)) ** 2
    return math.sqrt(total)
