"""Previous-token heads: attention to the place before."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import stack_heads
from devmon.anatomy.passes import Read, Seen, read
from devmon.anatomy.sight import sees_ahead, uniform_attention
from devmon.cost import GPT2_SMALL, Cost, Shape, trials
from devmon.data import ByContent, clustered_groups, clustered_mean, probe_tokens, random_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class PreviousTokenHeads(ByContent):
    """Mean attention A[i, i - 1] over i >= 2 of every head: the first column, where attention rests idle, is left out.

    The probe is either independent uniform tokens of `vocab_size`, or `tokens` (batch, pos) such as text.

    - `previous_token` (layer, head), attention: weight on the position before, in [0, 1]. Null: `uniform`.
    - `previous_token_se` (layer, head), attention: its standard error over sequences.
    - `uniform`, attention: the mean of 1 / (i + 1), the score of attention spread evenly over the past; of 1 / length
      in a model that attends to later places.

    `layer` is the index of the block. Raises InstrumentError for a model that shows no attention patterns, DataError
    unless exactly one probe is given.
    """

    vocab_size: int | None = None
    sequences: int = 64
    length: int = 64
    seed: int = 0
    tokens: Tensor | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        if (self.vocab_size is None) == (self.tokens is None):
            raise DataError("PreviousTokenHeads needs either vocab_size=... (random tokens) or tokens=... (batch, pos)")
        if self.tokens is not None:
            object.__setattr__(self, "tokens", probe_tokens(self.tokens, "PreviousTokenHeads", shortest=3))

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        tokens = self._probe
        [parts] = read(snapshot, self)
        layer, ahead = list(parts[0][0]), any(sees for _, sees in parts)
        layers = [torch.cat([sums[number] for sums, _ in parts]).numpy() for number in layer]
        count = np.full(len(tokens), tokens.shape[1] - 2)
        pairs = [clustered_mean(sums, count) for sums in layers]
        mean, se = stack_heads([m for m, _ in pairs]), stack_heads([s for _, s in pairs])
        uniform = uniform_attention(torch.arange(tokens.shape[1]) >= 2, ahead)
        rows, label = Rows(headline=["previous_token"]), "attention to the place before"
        groups = stack_heads([clustered_groups(sums, count) for sums in layers])
        about: dict[str, Any] = {"units": "attention", "smallest_change": 0.05, "replicates": groups}
        rows.put("previous_token", ("layer", "head"), mean, se, label, **about)
        rows.put("uniform", (), uniform, None, "previous-token score of uniform attention", units="attention")
        return rows.dataset(layer=np.array(layer), head=np.arange(mean.shape[1]))

    def reads(self) -> list[Read]:
        return [Read(self, self._probe, _sums, self.batch_size, patterns=True)]

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        sequences, positions = self._probe.shape
        work = shape.patterns(sequences, positions)
        return Cost(sequences, positions=positions, unembedded=sequences, operations=work, trials=trials(positions, 1))

    @cached_property
    def _probe(self) -> Tensor:
        if self.tokens is not None:
            return self.tokens
        assert self.vocab_size is not None
        drawn = random_tokens(self.vocab_size, self.sequences, self.length, self.seed)
        return probe_tokens(drawn, "PreviousTokenHeads", shortest=3)


def _sums(seen: Seen) -> tuple[dict[int, Tensor], bool]:
    """Sums over i >= 2 of A[i, i - 1], (batch, head) by layer, and whether any place sees a later one."""
    patterns = seen.patterns
    sums = {layer: a.diagonal(-1, -2, -1)[..., 1:].double().sum(-1).cpu() for layer, a in patterns.items()}
    return sums, sees_ahead(patterns)
