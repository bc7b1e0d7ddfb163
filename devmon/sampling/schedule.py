"""What a chain does at each step: which minibatch it meets, and which noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from devmon.sampling.acceptance import Proposal
from devmon.sampling.constants import NOISE_BLOCK
from devmon.sampling.data import draw_batches
from devmon.snapshot import derive_seed


@dataclass(frozen=True)
class Schedule:
    """How the chains are run. `stacked` and `group` (chains held at once; None: chosen) change cost, not numbers.

    `mirrored`: chains 2k and 2k + 1 have opposite noise.
    Where a group does not fit into the accelerator's memory it is halved, and its chains start again.
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
        control variates, otherwise as many as one chain meets at most."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "gradient"))
        most = n if self.control_variate else self.draws * self.steps_per_draw * self.batch_size
        return torch.randperm(n, generator=generator)[:most]

    def normals(self, what: str, chains: Sequence[int], like: Tensor) -> Iterator[Tensor]:
        """Standard normals (chain, parameter), step after step; each chain has its own stream."""
        own = [chain - chain % 2 for chain in chains] if self.mirrored else chains
        generators = [torch.Generator(like.device).manual_seed(derive_seed(self.seed, what, chain)) for chain in own]
        block = like.new_empty(len(chains), max(1, NOISE_BLOCK // like.shape[1]), like.shape[1])
        while True:
            for part, generator in zip(block, generators, strict=True):
                part.normal_(generator=generator)
            if self.mirrored:
                block[[i for i, chain in enumerate(chains) if chain % 2]] *= -1
            yield from block.unbind(1)
