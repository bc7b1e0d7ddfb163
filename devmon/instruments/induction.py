"""Induction heads: attention to the token after the previous occurrence of the current token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import stack_heads
from devmon.anatomy.passes import Read, Seen, read, read_one
from devmon.anatomy.sight import sees_ahead, shortest_window, uniform_attention
from devmon.cost import GPT2_SMALL, Cost, Shape, trials
from devmon.data import best_fixed_offset, clustered_groups, clustered_mean
from devmon.data.repeats import OnRepeats, RepeatProbe, repeats
from devmon.data.rows import Rows
from devmon.errors import InstrumentError
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
    - `uniform`, attention: the mean of 1 / (q + 1), the score of attention spread evenly over the past; of 1 / `length`
      in a model that attends to later places.

    `layer` is the index of the block. Where a layer's window is shorter than the way to the last match, the sequences
    are shortened until it is not, and the attribute `length` says so. Raises InstrumentError for a model that shows no
    attention patterns or sees too little of the past, DataError for a probe that cannot be drawn.
    """

    batch_size: int = 32

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        [parts] = read(snapshot, self)
        probe, window = self._repeats, parts[0].window
        if window is not None and int(probe.period.max()) - 1 > window:
            probe = self._shorter(window, type(snapshot.model).__name__)
            parts = read_one(snapshot, self._of(probe))
        layer, ahead = list(parts[0].layers), any(part.ahead for part in parts)

        # whole sequences go into the errors, whatever minibatch they came in
        layers = [[part.layers[number] for part in parts] for number in layer]  # minibatch, (prefix, duplicate, offset)
        count = probe.query.sum(1).numpy()
        queries = probe.query.sum(0).double()
        totals = [torch.cat([part[0] for part in each]) for each in layers]
        prefix, prefix_se = _by_head(totals, count)
        groups = stack_heads([clustered_groups(total.numpy(), count) for total in totals])
        duplicate, duplicate_se = _by_head([torch.cat([part[1] for part in each]) for each in layers], count)
        offset = stack_heads([best_fixed_offset(sum(part[2] for part in each), queries).numpy() for each in layers])
        uniform = uniform_attention(queries, ahead)

        dims, units, result = ("layer", "head"), "attention", Rows(headline=["prefix_matching"])
        label = "attention to the place after the last match"
        about: dict[str, Any] = {"units": units, "smallest_change": 0.05, "replicates": groups}
        result.put("prefix_matching", dims, prefix, prefix_se, label, **about)
        label = "attention to the last match itself"
        result.put("duplicate_token", dims, duplicate, duplicate_se, label, units=units)
        result.put("fixed_offset", dims, offset, None, "best fixed offset for the same queries", units=units)
        result.put("uniform", (), uniform, None, "prefix matching of uniform attention", units=units)
        dataset = result.dataset(layer=np.array(layer), head=np.arange(prefix.shape[1]))
        shorter = probe.tokens.shape[1]
        if shorter < self.length:
            dataset.attrs["length"] = f"{shorter}, not {self.length}: a layer sees no further than a shorter period"
        return dataset

    def reads(self) -> list[Read]:
        return [self._of(self._repeats)]

    def _of(self, probe: RepeatProbe) -> Read:
        def reduce(seen: Seen) -> _Part:
            period, query, patterns = probe.period[seen.rows], probe.query[seen.rows], seen.patterns
            first = {layer: pattern[:1] for layer, pattern in patterns.items()}
            return _Part(
                {layer: _sums(pattern, period, query) for layer, pattern in patterns.items()},
                shortest_window(seen.model, first),
                sees_ahead(patterns),
            )

        return Read(self, probe.tokens, reduce, self.batch_size, patterns=True)

    def _shorter(self, window: int, name: str) -> RepeatProbe:
        """The probe, with periods short enough that the last match lies in every layer's window."""
        start = 0 if self.bos is None else 1
        length = 2 * (window + 1) + start  # the longest period is half of what follows bos, its match one place less
        if length - start < 8:
            raise InstrumentError(
                f"{type(self).__name__}: a layer of {name} sees {window} places back, too few for any repeat of random "
                "tokens: leave this instrument out"
            )
        return repeats(self.vocab_size, self.sequences, length, self.seed, self.bos, self.exclude)

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        work = shape.patterns(self.sequences, self.length)
        before = trials(self.length, 1)
        return Cost(self.sequences, positions=self.length, unembedded=self.sequences, operations=work, trials=before)


class _Part(NamedTuple):
    """Of one minibatch: `_sums` by layer, how far the first sequence shows that places see, whether any sees ahead."""

    layers: dict[int, tuple[Tensor, Tensor, Tensor]]
    window: int | None
    ahead: bool


def _sums(pattern: Tensor, period: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Over the queries of one minibatch: prefix and duplicate attention (batch, head), and all of it (head, q, k)."""
    asks = query[:, None, :, None].to(pattern.device)
    back = (torch.arange(pattern.shape[-1]) - period[:, None]).clamp(min=0).to(pattern.device)  # (batch, q): q - p
    ahead, itself = ((back + shift)[:, None, :, None].expand(*pattern.shape[:3], 1) for shift in (1, 0))
    at_places = ((pattern.gather(-1, place) * asks).sum((-2, -1), dtype=torch.float64) for place in (ahead, itself))
    prefix, duplicate, everywhere = (*at_places, (pattern * asks).sum(0, dtype=torch.float64))
    return prefix.cpu(), duplicate.cpu(), everywhere.cpu()


def _by_head(layers: list[Tensor], count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over queries and standard error (layer, head) from per-sequence sums (batch, head) of each layer."""
    pairs = [clustered_mean(sums.numpy(), count) for sums in layers]
    return stack_heads([mean for mean, _ in pairs]), stack_heads([se for _, se in pairs])
