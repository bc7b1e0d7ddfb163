"""What a chain does at each step: which minibatch it meets, and which noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from devmon.sampling.acceptance import Proposal
from devmon.sampling.constants import BLOCK, NOISE_BLOCK
from devmon.sampling.data import draw_batches
from devmon.sampling.kernels.sampler import Normals
from devmon.snapshot import derive_seed


@dataclass(frozen=True)
class Schedule:
    """How the chains are run. `stacked`, `group` (chains held at once) and `micro_batch` (examples of a pass), None:
    chosen, change cost, not numbers. Where memory ends they are lowered, and the chains concerned start again.

    `mirrored`: chains 2k and 2k + 1 have opposite noise.
    """

    draws: int
    batch_size: int
    steps_per_draw: int = 1
    seed: int = 0
    control_variate: bool = False
    shared_batches: bool = False
    replacement: bool = False
    mirrored: bool = False
    proposal: Proposal | None = None
    stacked: bool | None = None
    group: int | None = None
    micro_batch: int | None = None

    def streams(self, chains: Sequence[int]) -> Sequence[int | None]:
        """Whose minibatches are drawn: each chain its own, or None for those that all share."""
        return [None] if self.shared_batches else chains

    def batches(self, stream: int | None, n: int) -> Tensor:
        """The indices that a chain (None: every chain) meets, (step, batch): a function of the seed and the chain."""
        what = ("batches",) if stream is None else ("batches", stream)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, *what))
        steps = self.draws * self.steps_per_draw
        return draw_batches(n, self.batch_size, steps, generator, replacement=self.replacement)

    def for_gradient(self, n: int) -> Tensor:
        """The examples of the gradient at w*, in an order that makes every part of them a minibatch: all of them for
        control variates, otherwise as many as one chain meets at most. The same whatever the seed: runs share it."""
        generator = torch.Generator().manual_seed(derive_seed(0, "gradient"))
        most = n if self.control_variate else self.draws * self.steps_per_draw * self.batch_size
        return torch.randperm(n, generator=generator)[:most]

    def normals(self, what: str, chains: Sequence[int], like: Tensor) -> Normals:
        """Standard normals for positions like `like` (chain, parameter), step after step, and each step's in blocks
        (chain, part) that share memory: each chain has its own stream."""
        own = [chain - chain % 2 for chain in chains] if self.mirrored else chains
        generators = [torch.Generator(like.device).manual_seed(derive_seed(self.seed, what, chain)) for chain in own]
        mirror = [self.mirrored and chain % 2 == 1 for chain in chains]
        size = like.shape[1]
        # A small model: many steps in one call.
        if size <= NOISE_BLOCK:
            block = like.new_empty(len(chains), NOISE_BLOCK // size, size)
            while True:
                for part, generator, mirrored in zip(block, generators, mirror, strict=True):
                    _fill(part, generator, mirrored)
                yield from (iter([(slice(0, size), noise)]) for noise in block.unbind(1))
        # A large one: a step in many calls. On the CPU normals come in sixteens, and the last sixteen of a call are
        # made anew where the call is no multiple: so the rest, if shorter, joins the block before it.
        cuts = [*range(0, max(size - 15, 1), BLOCK), size]
        block = like.new_empty(len(chains), max(stop - start for start, stop in zip(cuts, cuts[1:], strict=False)))

        def blocks() -> Iterator[tuple[slice, Tensor]]:
            for start, stop in zip(cuts, cuts[1:], strict=False):
                noise = block[:, : stop - start]
                for row, generator, mirrored in zip(noise, generators, mirror, strict=True):
                    _fill(row, generator, mirrored)
                yield slice(start, stop), noise

        while True:
            yield blocks()


def _fill(values: Tensor, generator: torch.Generator, mirrored: bool) -> None:
    """Fresh normals, or their opposites."""
    values.normal_(generator=generator)
    if mirrored:
        values.neg_()
