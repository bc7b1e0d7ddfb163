"""The passes of one group of reads: every minibatch passes once, is shown to each, and is forgotten."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from devmon.anatomy.anatomy import Anatomy
from devmon.anatomy.attention import Patterns, no_fast_path, shown_patterns
from devmon.anatomy.forward import forward, last_place
from devmon.anatomy.layout import Layout
from devmon.anatomy.passes.reads import Pass, Read, Seen
from devmon.anatomy.residual import find_blocks, shown_stream
from devmon.anatomy.sites import ENDS, Reads, Site
from devmon.anatomy.taps import Taps
from devmon.data.probe import minibatches
from devmon.errors import InstrumentError
from devmon.snapshot import Snapshot


def run(snapshot: Snapshot, reads: Sequence[Read], size: int) -> list[list[Any] | Exception]:
    """What each read made of each minibatch of `size` inputs, or why it could not; all have the same inputs.

    Raises what the passes raise.
    """
    group = _Group(snapshot, reads)
    made: list[list[Any] | Exception] = [[] for _ in reads]
    with torch.no_grad():
        # One minibatch at a time: it passes once, each read makes something small of it, and it is gone.
        for rows in minibatches(len(reads[0].inputs), size):
            shown = group.shown(rows)
            for i, parts in enumerate(made):
                if isinstance(parts, Exception):
                    continue
                try:
                    parts.append(reads[i].reduce(shown[i]))
                except Exception as error:  # it is that of one read: the others go on
                    made[i] = error
            del shown  # before the next pass
    return made


def in_half_precision(model: nn.Module) -> bool:
    return any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())


def full_precision(snapshot: Snapshot) -> nn.Module:
    """The snapshot's model, or a float32 copy of it, kept for the step, where it has weights in half precision."""
    if not in_half_precision(snapshot.model):
        return snapshot.model
    key = ("model", "float32")
    if key not in snapshot.memo:
        snapshot.memo[key] = copy.deepcopy(snapshot.model).float()
    return snapshot.memo[key]


class _Group:
    """The model that runs for a group, and where its reads are."""

    def __init__(self, snapshot: Snapshot, reads: Sequence[Read]) -> None:
        self.reads, self.inputs = reads, reads[0].inputs
        self.model = full_precision(snapshot) if any(read.stream for read in reads) else snapshot.model

        # Each layout is found once, each chain of blocks too.
        self.anatomies: dict[Layout | None, Anatomy] = {}
        for read in reads:
            if read.sites and read.layout not in self.anatomies:
                self.anatomies[read.layout] = Anatomy.of(snapshot, read.layout, read.who, self.model)
        self.sites = {
            layout: list(_sites(anatomy, [read for read in reads if read.layout == layout]))
            for layout, anatomy in self.anatomies.items()
        }
        self.paths: dict[str, str] = {}
        for read in reads:
            if read.stream:
                key = ("blocks", self.inputs.is_floating_point(), self.inputs.shape[1:])
                if not read.blocks and key not in snapshot.memo:
                    snapshot.memo[key] = find_blocks(self.model, self.inputs[:1], read.who)
                self.paths[read.blocks or ""] = read.blocks or snapshot.memo[key]

        # Where nobody asks for all predictions, the unembedding is given the last place alone.
        ends = any(site in ENDS or site[0] in ENDS for read in reads for site in read.sites)
        everywhere = ends or any(read.predicts == "all" for read in reads) or self.inputs.is_floating_point()
        self.unembedding = None if everywhere else self._find_unembedding(snapshot)

    def shown(self, rows: slice) -> list[Seen]:
        """One pass, as each read is shown it."""
        try:
            return self._pass(rows)
        except Exception:
            if self.unembedding is None:
                raise
        # What comes after the unembedding may want all places: then it has them.
        self.unembedding = None
        return self._pass(rows)

    def _pass(self, rows: slice) -> list[Seen]:
        inputs, taps = self.inputs[rows], dict[Layout | None, Taps]()
        who = self.reads[0].who
        patterns = None
        with ExitStack() as stack:
            # Kernels do not depend on what is read: patterns hold another one off, which rounds otherwise.
            stack.enter_context(no_fast_path())
            for layout, anatomy in self.anatomies.items():
                taps[layout] = stack.enter_context(anatomy.hooked(self.sites[layout]))

            def meet(pattern: Tensor) -> None:
                for each in taps.values():
                    each.pattern(pattern)

            if any(read.patterns for read in self.reads):
                patterns = stack.enter_context(shown_patterns(self.model, inputs, meet))
            elif any(read.meets_patterns for read in self.reads):
                stack.enter_context(Patterns.of(self.model, meet))
            streams = {
                key: stack.enter_context(shown_stream(self.model, inputs, path, who))
                for key, path in self.paths.items()
            }
            stack.enter_context(last_place(self.unembedding, tuple(inputs.shape)))
            output = forward(self.model, inputs, who)
        # What it gave is worked out when a read asks for it, and goes with the last of them.
        whole = Pass(self.model, rows, inputs, output, patterns, streams)
        return [
            Seen(read, taps[read.layout].reads if read.sites else Reads(), whole, self.anatomies.get(read.layout))
            for read in self.reads
        ]

    def _find_unembedding(self, snapshot: Snapshot) -> nn.Module | None:
        try:
            found = next(iter(self.anatomies.values()), None)
            return (found or Anatomy.of(snapshot, None, self.reads[0].who, self.model)).unembedding
        except InstrumentError:
            return None  # of a model that has none, or whose parts are not known


def _sites(anatomy: Anatomy, reads: Sequence[Read]) -> Iterator[Site]:
    """What reads ask for, of what there is."""
    for read in reads:
        yield from read.sites
        for site in read.optional:
            with suppress(InstrumentError):
                yield from anatomy.expand(site)
