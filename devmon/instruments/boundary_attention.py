"""Whether heads look from the end of one span to the end of another, beyond what distance alone makes them do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import stack_heads
from devmon.anatomy.passes import Read, Seen, read
from devmon.cost import GPT2_SMALL, Cost, Shape
from devmon.data import ByContent, clustered_groups, clustered_mean, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.snapshot import Snapshot, derive_seed

APART = 3  # ends counted back: the nearest earlier one, the one before it, …
SHUFFLES = 4  # of the spans in their sentence: the null has the error of one over 2


@dataclass(frozen=True, eq=False)
class BoundaryAttention(ByContent):
    """Attention from the ends of spans to earlier ends of spans, less the mean attention over the same distance.

    `tokens` (batch, pos) and `ends` (level, batch, pos) are those of `devmon.data.grammars.Sentences`: 1 where a span
    of the level ends, 0 elsewhere, -100 at the tokens that part sentences, which are left out. B = A[i, j] - the mean
    of A at the distance i - j, over all pairs of a sentence, of each head (after Allen-Zhu & Li 2023, 2305.13673).
    The null shuffles the spans of each level within their sentence: ends elsewhere, the same lengths. `_se` are over
    rows, the mean by distance held.

    - `boundary` (layer, head), attention: mean of B from every end to the nearest earlier end, over levels and pairs of
      levels. Null: `boundary_shuffled`.
    - `boundary_se` (layer, head), attention: its standard error.
    - `boundary_shuffled` (layer, head), attention: the same with the spans shuffled, mean of four times.
    - `boundary_shuffled_se` (layer, head), attention: its standard error.
    - `by_level` (level, level_to, apart, layer, head), attention: mean of B from ends of one level to ends of another,
      the nearest earlier one (1), the one before (2), and before that (3); NaN where there are none.
    - `by_level_se` (level, level_to, apart, layer, head), attention: its standard error.

    An end of a level is an end of every level below it. Cost: one pass. Raises DataError for ends that do not fit the
    tokens, InstrumentError for a model that shows no attention patterns.
    """

    tokens: Tensor
    ends: Tensor
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "BoundaryAttention"))
        ends = torch.as_tensor(self.ends).detach().to("cpu", torch.int64, copy=True).contiguous()
        if ends.ndim != 3 or ends.shape[1:] != self.tokens.shape or not (ends == 1).any():
            raise DataError(
                f"BoundaryAttention needs ends (level, batch, pos) over tokens {tuple(self.tokens.shape)}, 1 where a "
                f"span ends; got {tuple(ends.shape)}"
            )
        object.__setattr__(self, "ends", ends)

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        [parts] = read(snapshot, self)
        layer, levels, cells = list(parts[0]), len(self.ends), len(self.ends) ** 2 * APART
        found: dict[str, list[np.ndarray]] = {"boundary": [], "shuffled": [], "by_level": []}
        for number in layer:
            # the mean at each distance, of all rows, then what is above it
            every = sum(part[number][0] for part in parts) / self._distances[:, None]  # (distance, head)
            above = []
            for i, pairs in enumerate(self._pairs):
                sums = np.concatenate([part[number][1 + i] for part in parts])  # (row, cell, head)
                above.append(sums - np.einsum("rcd,dh->rch", pairs.distances, every))
            found["by_level"].append(above[0])
            near = np.arange(cells) % APART == 0
            found["boundary"].append(above[0][:, near].sum(1))
            found["shuffled"].append(sum(each[:, near].sum(1) for each in above[1:]))

        rows, unit = Rows(["boundary"], "standard error over rows"), "attention"
        counts = [pairs.distances.sum(2) for pairs in self._pairs]  # (row, cell)
        near = np.arange(cells) % APART == 0
        label = "attention between ends above that over the distance"
        for name, key, count in (
            ("boundary", "boundary", counts[0][:, near].sum(1)),
            ("boundary_shuffled", "shuffled", sum(each[:, near].sum(1) for each in counts[1:])),
        ):
            pairs_ = [clustered_mean(sums, count) for sums in found[key]]
            mean, se = (stack_heads(each) for each in zip(*pairs_, strict=True))
            groups = stack_heads([clustered_groups(sums, count) for sums in found[key]])
            about: dict[str, Any] = {"units": unit, "smallest_change": 0.02, "replicates": groups}
            rows.put(name, ("layer", "head"), mean, se, label if key == name else f"{label}, spans shuffled", **about)
        each = [
            [clustered_mean(sums[:, cell], counts[0][:, cell]) for sums in found["by_level"]] for cell in range(cells)
        ]
        mean, se = (
            np.stack([stack_heads([of[i] for of in by_layer]) for by_layer in each]).reshape(
                levels, levels, APART, len(layer), -1
            )
            for i in (0, 1)
        )
        dims = ("level", "level_to", "apart", "layer", "head")
        rows.put("by_level", dims, mean, se, f"{label}, by levels", units=unit)
        level = np.arange(1, levels + 1)
        where = {"level": level, "level_to": level, "apart": np.arange(1, APART + 1)}
        return rows.dataset(layer=np.array(layer), head=np.arange(mean.shape[-1]), **where)

    def reads(self) -> list[Read]:
        return [Read(self, self.tokens, self._sums, self.batch_size, patterns=True)]

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        sequences, positions = self.tokens.shape
        work = shape.patterns(sequences, positions)
        return Cost(sequences, positions=positions, unembedded=sequences, operations=work)

    @cached_property
    def _sentence(self) -> np.ndarray:
        """(batch, pos): the number of the sentence in its row, -1 at the tokens between."""
        parting = (self.ends[0] < 0).numpy()
        return np.where(parting, -1, parting.cumsum(1))

    @cached_property
    def _pairs(self) -> list[_Pairs]:
        """The pairs of ends, then those of the spans shuffled."""
        rng = np.random.default_rng(derive_seed(self.seed, "BoundaryAttention"))
        whole = (self.ends == 1).numpy()
        return [_pairs(ends, self._sentence) for ends in (whole, *(self._shuffled(rng) for _ in range(SHUFFLES)))]

    def _shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """Ends (level, batch, pos) of the same spans in another order, level by level."""
        moved = np.zeros(self.ends.shape, bool)
        for level, row in np.ndindex(*self.ends.shape[:2]):
            for sentence in np.unique(self._sentence[row][self._sentence[row] >= 0]):
                places = np.flatnonzero(self._sentence[row] == sentence)
                at = np.flatnonzero(self.ends[level, row].numpy()[places] == 1)
                lengths = np.diff(np.r_[-1, at])
                moved[level, row, places[rng.permutation(lengths).cumsum() - 1]] = True
        return moved

    @cached_property
    def _distances(self) -> np.ndarray:
        """How many pairs of a sentence are at each distance, 1 where there are none, (distance,)."""
        far = range(1, self.tokens.shape[1])
        return np.array([1, *(max(1, _together(self._sentence, distance).sum()) for distance in far)])

    def _sums(self, seen: Seen) -> dict[int, list[np.ndarray]]:
        """By layer: attention summed at each distance, (distance, head), and over each of the sets of pairs, (row,
        cell, head)."""
        length, cells = self.tokens.shape[1], len(self.ends) ** 2 * APART
        start = seen.rows.start or 0
        result = {}
        for layer, pattern in seen.patterns.items():
            weights = pattern.double().cpu().numpy()
            rows, heads = weights.shape[:2]
            every = np.zeros((length, heads))
            for distance in range(1, length):
                both = _together(self._sentence[start : start + rows], distance)
                along = np.diagonal(weights, -distance, 2, 3)  # (row, head, query)
                every[distance] = (along * both[:, None]).sum((0, 2))
            sums: list[np.ndarray] = [every]
            for pairs in self._pairs:
                here = (pairs.row >= start) & (pairs.row < start + rows)
                row = pairs.row[here] - start
                total = np.zeros((rows, cells, heads))
                np.add.at(total, (row, pairs.cell[here]), weights[row, :, pairs.query[here], pairs.key[here]])
                sums.append(total)
            result[layer] = sums
        return result


class _Pairs(NamedTuple):
    """Pairs of places: row, query, key and cell (level, level_to, apart), and their counts (row, cell, distance)."""

    row: np.ndarray
    query: np.ndarray
    key: np.ndarray
    cell: np.ndarray
    distances: np.ndarray


def _pairs(ends: np.ndarray, sentence: np.ndarray) -> _Pairs:
    levels, rows, length = ends.shape
    found: list[tuple[Any, ...]] = []
    for level, other, of in np.ndindex(levels, levels, rows):
        for end in np.flatnonzero(ends[level, of]):
            before = np.flatnonzero(ends[other, of, :end] & (sentence[of, :end] == sentence[of, end]))
            near = before[::-1][:APART]
            found += [(of, end, start, (level * levels + other) * APART + apart) for apart, start in enumerate(near)]
    row, query, key, cell = np.array(found, dtype=int).reshape(-1, 4).T
    counts = np.zeros((rows, levels * levels * APART, length))
    np.add.at(counts, (row, cell, query - key), 1)
    return _Pairs(row, query, key, cell, counts)


def _together(sentence: np.ndarray, distance: int) -> np.ndarray:
    """Which queries (row, pos - distance) have a key this far back in their sentence."""
    late, early = sentence[:, distance:], sentence[:, :-distance]
    return (late == early) & (late >= 0)
