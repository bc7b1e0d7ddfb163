"""Induction heads: attention to the token after the previous occurrence of the current token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import attention_patterns, stack_heads
from devmon.cost import Cost
from devmon.data import best_fixed_offset, clustered_groups, clustered_mean, minibatches
from devmon.data.repeats import OnRepeats
from devmon.data.rows import Rows
from devmon.snapshot import Snapshot


@dataclass(frozen=True)
class InductionHeads(OnRepeats):
    """Prefix matching of every attention head on random tokens repeated with a random period per sequence.

    Queries are the places q of the second copy without accidental collisions (`devmon.data.repeats`), p the period of
    the sequence, A the attention pattern (Olsson et al. 2022, 2209.11895); all are means over queries, in [0, 1].

    - `prefix_matching` (layer, head), attention: A[q, q - p + 1]. Null: `fixed_offset`, `uniform`.
    - `prefix_matching_se` (layer, head), attention: its standard error over sequences.
    - `duplicate_token` (layer, head), attention: A[q, q - p].
    - `duplicate_token_se` (layer, head), attention: its standard error over sequences.
    - `fixed_offset` (layer, head), attention: max over o of the mean of A[q, q - o], what the head's best fixed offset
      gets of the same queries; a head whose prefix matching is no higher looks at positions, not at content.
    - `uniform`, attention: the mean of 1 / (q + 1), the score of attention spread evenly over the past.

    Raises InstrumentError for a model that shows no attention patterns, DataError for a probe that cannot be drawn.
    """

    batch_size: int = 32

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        probe = self._repeats
        parts = [
            [
                _sums(pattern, probe.period[rows], probe.query[rows])
                for pattern in attention_patterns(snapshot.model, probe.tokens[rows], type(self).__name__)
            ]
            for rows in minibatches(self.sequences, self.batch_size)
        ]

        # whole sequences go into the errors, whatever minibatch they came in
        layers = list(zip(*parts, strict=True))  # layer, minibatch, (prefix, duplicate, offset)
        count = probe.query.sum(1).numpy()
        queries = probe.query.sum(0).double()
        totals = [torch.cat([part[0] for part in layer]) for layer in layers]
        prefix, prefix_se = _by_head(totals, count)
        groups = stack_heads([clustered_groups(total.numpy(), count) for total in totals])
        duplicate, duplicate_se = _by_head([torch.cat([part[1] for part in layer]) for layer in layers], count)
        offset = stack_heads([best_fixed_offset(sum(part[2] for part in layer), queries).numpy() for layer in layers])
        uniform = float((queries / torch.arange(1, self.length + 1)).sum() / queries.sum())

        dims, units, result = ("layer", "head"), "attention", Rows(headline=["prefix_matching"])
        label = "attention to the place after the last match"
        about: dict[str, Any] = {"units": units, "smallest_change": 0.05, "replicates": groups}
        result.put("prefix_matching", dims, prefix, prefix_se, label, **about)
        label = "attention to the last match itself"
        result.put("duplicate_token", dims, duplicate, duplicate_se, label, units=units)
        result.put("fixed_offset", dims, offset, None, "best fixed offset for the same queries", units=units)
        result.put("uniform", (), uniform, None, "prefix matching of uniform attention", units=units)
        return result.dataset(layer=np.arange(prefix.shape[0]), head=np.arange(prefix.shape[1]))

    def cost(self) -> Cost:
        return Cost(forwards=self.sequences, positions=self.length)


def _sums(pattern: Tensor, period: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Over the queries of one minibatch: prefix and duplicate attention (batch, head), and all of it (head, q, k)."""
    pattern = pattern.cpu().double() * query[:, None, :, None]
    back = (torch.arange(pattern.shape[-1]) - period[:, None]).clamp(min=0)  # (batch, q): q - p
    ahead, itself = ((back + shift)[:, None, :, None].expand(*pattern.shape[:3], 1) for shift in (1, 0))
    return pattern.gather(-1, ahead).sum((-2, -1)), pattern.gather(-1, itself).sum((-2, -1)), pattern.sum(0)


def _by_head(layers: list[Tensor], count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over queries and standard error (layer, head) from per-sequence sums (batch, head) of each layer."""
    pairs = [clustered_mean(sums.numpy(), count) for sums in layers]
    return stack_heads([mean for mean, _ in pairs]), stack_heads([se for _, se in pairs])
