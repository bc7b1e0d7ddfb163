"""What is wrong in a series of checkpoints, by its files alone: nothing is downloaded or loaded.

Faults of public suites, found by their users by hand: one file under many steps, a format that was not written again,
a shard of another step, missing shards and checkpoints.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from devmon.checkpoints.inventory import SHARD, File, Listing, inventory
from devmon.checkpoints.series import Series

SAME_SIZE = 0.01  # share by which sizes of one model may differ: headers and alignment are far below
ASCENDING = 0.9  # share of neighbouring steps whose dates ascend, from which on an older one is worth a note
SHOWN = 8  # steps of one fault that are spelt out


@dataclass(frozen=True)
class Fault:
    """What is wrong with which steps. `kind`: twins, stale, shard, missing, extra, gap; with weights read, lineage."""

    kind: str
    steps: tuple[int, ...]
    words: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.words}"


@dataclass(frozen=True)
class Audit:
    """The `listings` of all steps, the `faults`, `notes` that are none, and the format to read at each step.

    `kinds` has the steps whose first format is stale: what to read there.
    """

    listings: dict[int, Listing]
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kinds: dict[int, str] = field(default_factory=dict)

    @property
    def twins(self) -> list[tuple[int, ...]]:
        """The groups of steps that have one set of files, whatever format is read."""
        return [fault.steps for fault in self.faults if fault.kind == "twins"]

    def record(self) -> dict[str, Any]:
        """All of it as JSON has it, by step."""
        files = {
            str(step): {file.name: {"bytes": file.size, "digest": file.digest} for file in listing.files}
            for step, listing in self.listings.items()
        }
        faults = [{"kind": fault.kind, "steps": [*fault.steps], "words": fault.words} for fault in self.faults]
        kinds = {str(step): kind for step, kind in self.kinds.items()}
        return {"faults": faults, "notes": self.notes, "read": kinds, "files": files}


def audit(series: Series, steps: Sequence[int] | None = None, tell: Callable[[int], None] = lambda step: None) -> Audit:
    """The faults of a series (of `steps` of it) that its files tell. One request to the hub a revision."""
    steps = series.steps if steps is None else sorted(steps)
    held = inventory(series, steps, tell)
    found = Audit(held)
    stages = series.stage

    # which format is the step's own, and which steps then still have one set of files
    chosen = _formats(held, found)
    for group in _equal({step: _digests(listing.of(chosen[step])) for step, listing in held.items() if step in chosen}):
        names = _few(file.name for file in held[group[0]].of(chosen[group[0]]))
        found.faults.append(
            Fault("twins", group, f"steps {_steps(group)} have one set of weights ({names}): one is not what it says")
        )

    # files that lack, are too many, or are of another step
    empty: dict[str, list[int]] = {}
    for step, listing in held.items():
        if not listing.files:
            empty.setdefault(listing.error, []).append(step)
    for error, lacking in empty.items():
        words = f"cannot be listed ({error})" if error else "have no weights"
        found.faults.append(Fault("missing", tuple(lacking), f"steps {_steps(lacking)} {words}"))
    _shards(held, chosen, found)

    # steps that lack: those that the suite is known to have, else between others, stage by stage
    suite = series.axis.suite
    if suite is not None and (lacking := sorted(set(suite.steps) - set(series.steps))):
        found.faults.append(Fault("gap", tuple(lacking), f"of the steps of {suite.name} {_steps(lacking)} lack"))
    elif suite is None or not suite.steps:
        for _, stage in itertools.groupby(series.steps, key=lambda step: stages[step]):
            for before, after, count in _gaps([*stage]):
                words = f"{count} step{'s' * (count > 1)} between {before} and {after}, where others are regular"
                found.faults.append(Fault("gap", (before, after), f"there is no checkpoint of {words}"))
    found.notes.extend(_odd(held, chosen))
    return found


def _formats(held: Mapping[int, Listing], found: Audit) -> dict[int, str]:
    """Of each step the format that is its own: the first, unless other steps have the same files of it and another
    format's differ. Those steps are a fault, `stale`."""
    kinds = sorted({kind for listing in held.values() for kind in listing.kinds})
    shared: dict[str, dict[int, tuple[int, ...]]] = {}
    for kind in kinds:
        groups = _equal({step: _digests(listing.of(kind)) for step, listing in held.items()})
        shared[kind] = {step: group for group in groups for step in group}
    chosen = {
        step: next((kind for kind in listing.kinds if step not in shared[kind]), listing.kinds[0])
        for step, listing in held.items()
        if listing.kinds
    }
    stale = {step: held[step].kinds[0] for step, kind in chosen.items() if kind != held[step].kinds[0]}
    for kind, group in sorted({(kind, shared[kind][step]) for step, kind in stale.items()}, key=lambda pair: pair[1]):
        own = [step for step in group if stale.get(step) == kind]
        other = chosen[own[0]]
        found.faults.append(
            Fault("stale", tuple(own), f"{_few(f.name for f in held[own[0]].of(kind))} is one file under steps "
                  f"{_steps(group)}, {_few(f.name for f in held[own[0]].of(other))} is not: the latter is read")
        )  # fmt: skip
        found.kinds.update(dict.fromkeys(own, other))
    return chosen


def _shards(held: Mapping[int, Listing], chosen: Mapping[int, str], found: Audit) -> None:
    """Missing and extra shards of each step, and shards that are those of another step."""
    parts: dict[str, dict[int, tuple[str, ...]]] = {}
    for step, kind in chosen.items():
        files = held[step].of(kind)
        named = [(match, file) for file in files if (match := SHARD.fullmatch(file.name))]
        counts = Counter(int(match["parts"]) for match, _ in named)
        for count in counts:
            there = {int(match["part"]) for match, _ in named if int(match["parts"]) == count}
            if lacking := sorted(set(range(1, count + 1)) - there):
                words = f"step {step} lacks shards {', '.join(map(str, lacking))} of {count}"
                found.faults.append(Fault("missing", (step,), words))
        whole = {f"{match['start']}{match['end']}" for match, _ in named}
        if len(counts) > 1 or any(file.name in whole for file in files):
            names = _few(file.name for file in files)
            found.faults.append(Fault("extra", (step,), f"step {step} has more files than one model: {names}"))
        if counts and not held[step].indexed:
            found.faults.append(Fault("missing", (step,), f"step {step} has shards without an index"))
        for _, file in named:
            parts.setdefault(file.name, {})[step] = (file.digest,) if file.digest else ()
    whole_twins = {step for group in found.twins for step in group}
    for name, digests in sorted(parts.items()):
        for group in _equal(digests):
            # a shard that never changes is frozen; where whole steps are equal, that is said already
            if len(group) < len(digests) and not whole_twins.issuperset(group):
                words = f"{name} is one file at steps {_steps(group)}: one of them has a shard of another step"
                found.faults.append(Fault("shard", group, words))


def _gaps(steps: list[int]) -> list[tuple[int, int, int]]:
    """Where steps lack: (before, after, how many).

    The steps after have a spacing that is among those before, and this is a multiple of it; or the steps before have
    one ratio, of which this is the square or the cube.
    """
    found = []
    for i, (before, after) in enumerate(itertools.pairwise(steps)):
        left, right = steps[max(0, i - 3) : i + 1], steps[i + 1 : i + 5]
        geometric = len(left) > 2 and left[-3] > 0 and left[-1] * left[-3] == left[-2] ** 2
        if geometric and before**2 == left[-2] * after:  # it goes on by the ratio of the steps before
            continue
        near, far = ([b - a for a, b in itertools.pairwise(side)] for side in (left, right))
        if far and (spacing := median(far)) in near and after - before > spacing:
            if (after - before) % spacing == 0:
                found.append((before, after, int((after - before) / spacing) - 1))
        elif geometric:
            ratio = left[-1] / left[-2]
            powers = [count for count in (2, 3) if before * ratio**count == after]
            found.extend((before, after, count - 1) for count in powers)
    return found


def _odd(held: Mapping[int, Listing], chosen: Mapping[int, str]) -> list[str]:
    """Steps whose files have another size than most, or are older than those of the steps before."""
    notes = []
    sizes = {step: sum(file.size for file in held[step].of(kind)) for step, kind in chosen.items()}
    usual = median(sizes.values()) if sizes else 0
    other = [step for step, size in sizes.items() if abs(size - usual) > SAME_SIZE * usual]
    if other and len(other) < len(sizes) / 2:
        notes.append(f"steps {_steps(other)} have another size than most ({sizes[other[0]]} bytes, most {usual:.0f})")
    dates = {
        step: max(written)
        for step, kind in chosen.items()
        if (written := [file.date for file in held[step].of(kind) if file.date is not None])
    }
    pairs = [(a, b, dates[a] <= dates[b]) for a, b in itertools.pairwise(sorted(dates))]
    if pairs and sum(up for *_, up in pairs) >= ASCENDING * len(pairs):
        older = [b for a, b, up in pairs if not up]
        if older:
            notes.append(f"the files of steps {_steps(older)} are older than those of the steps before them")
    return notes


def _digests(files: Sequence[File]) -> tuple[str, ...]:
    """What files are told by; nothing where any has no digest."""
    return tuple(sorted(file.digest for file in files)) if all(file.digest for file in files) else ()


def _equal(digests: Mapping[int, tuple[str, ...]]) -> list[tuple[int, ...]]:
    """The groups of steps with equal digests, in order of their first step."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for step in sorted(digests):
        if digests[step]:
            groups.setdefault(digests[step], []).append(step)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _steps(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:SHOWN]))
    return shown if len(steps) <= SHOWN else f"{shown}, … {steps[-1]} ({len(steps)} steps)"


def _few(names: Any) -> str:
    names = sorted(names)
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)} files)"
