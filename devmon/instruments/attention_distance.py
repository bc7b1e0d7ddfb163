"""How far heads look: attention-weighted distance between places, in an image or along a text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import stack_heads
from devmon.anatomy.passes import TOGETHER, Read, Seen, read
from devmon.anatomy.sight import sees_ahead
from devmon.cost import GPT2_SMALL, Cost, Shape
from devmon.data import ByContent, clustered_groups, clustered_mean, probe_inputs
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot


def grid(rows: int, columns: int, before: int = 1) -> Tensor:
    """Positions (place, 2) of patches in reading order, in patches; `before` places such as a class token have none.

    >>> grid(1, 2).tolist()
    [[nan, nan], [0.0, 0.0], [0.0, 1.0]]
    """
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    return torch.cat([torch.full((before, 2), torch.nan), places])


@dataclass(frozen=True, eq=False)
class AttentionDistance(ByContent):
    """Mean distance that heads look over, on images (batch, …) or tokens (batch, pos): Dosovitskiy et al. 2010.11929.

    `positions` (place, k) are where the places are, such as `grid(14, 14)` of a vision transformer, by default their
    number; a place with NaN (a class token) neither looks nor is looked at, and the weights on the others are scaled
    to sum to 1. `_se` are over inputs.

    - `distance` (layer, head), places: Σ_j A_ij ‖pos_i - pos_j‖, mean over i. Null: `uniform`.
    - `distance_se` (layer, head), places: its standard error.
    - `uniform`, places: the same of attention spread evenly over what a place sees.
    - `outside` (layer, head), attention: weight on places without a position. Null: their share.

    Local and global heads stand beside each other in the lower layers of large image models; with little data there
    are none of the first. Cost: one pass. Raises DataError for positions that do not fit, InstrumentError for a model
    that shows no attention patterns or has other places.
    """

    inputs: Tensor
    positions: Tensor | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", probe_inputs(self.inputs, "AttentionDistance"))
        if self.positions is None and not self.inputs.is_floating_point():
            object.__setattr__(self, "positions", torch.arange(self.inputs.shape[1])[:, None].float())
        given = None if self.positions is None else torch.as_tensor(self.positions).detach().to("cpu", torch.float64)
        if given is None or given.ndim != 2 or int(given.isfinite().all(1).sum()) < 2:
            raise DataError(
                "AttentionDistance needs positions (place, k) of two places at least, such as grid(rows, columns), got "
                f"{None if given is None else tuple(given.shape)}"
            )
        object.__setattr__(self, "positions", given.contiguous())

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        [parts] = read(snapshot, self)
        layers, ahead = list(parts[0][0]), any(sees for _, sees in parts)
        each = np.ones(len(self.inputs))
        far, outside = (
            stack_heads([torch.cat([sums[n][i] for sums, _ in parts]).numpy() for n in layers]) for i in (0, 1)
        )
        rows = Rows(headline=["distance"], error="standard error over inputs")
        mean, se = clustered_mean(far, each)
        groups = clustered_groups(far, each)
        label = "attention-weighted distance"
        dims = ("layer", "head")
        rows.put("distance", dims, mean, se, label, units="places", smallest_change=0.5, replicates=groups)

        # attention spread evenly over what is seen: all places, or those up to one's own
        length = len(self._apart)
        even = torch.ones(1, 1, length, length, dtype=torch.float64)
        even = even if ahead else even.tril()
        nothing, _ = _looked(even / even.sum(-1, keepdim=True), self._apart)
        rows.put("uniform", (), float(nothing), None, f"{label}, uniform attention", units="places")
        rest = clustered_mean(outside, each)[0]
        rows.put("outside", dims, rest, None, "attention to places without a position", units="attention")
        return rows.dataset(layer=np.array(layers), head=np.arange(mean.shape[1]))

    def reads(self) -> list[Read]:
        return [Read(self, self.inputs, self._sums, min(self.batch_size, TOGETHER), patterns=True)]

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        sequences, positions = len(self.inputs), len(self._apart)
        work = shape.patterns(sequences, positions)
        return Cost(sequences, positions=positions, unembedded=sequences, operations=work)

    @property
    def _apart(self) -> Tensor:
        """Distances (place, place), NaN where one has no position."""
        assert self.positions is not None
        return torch.cdist(self.positions, self.positions)

    def _sums(self, seen: Seen) -> tuple[dict[int, tuple[Tensor, Tensor]], bool]:
        apart, found = self._apart, {}
        for layer, pattern in seen.patterns.items():
            if pattern.shape[-1] != len(apart):
                raise InstrumentError(
                    f"AttentionDistance: {type(seen.model).__name__} attends over {pattern.shape[-1]} places, "
                    f"positions has {len(apart)}: give one for each, NaN for class tokens (grid(rows, columns, before))"
                )
            found[layer] = _looked(pattern.double().cpu(), apart)
        return found, sees_ahead(seen.patterns)


def _looked(pattern: Tensor, apart: Tensor) -> tuple[Tensor, Tensor]:
    """Distance looked over, and weight on places without a position, (batch, head), of patterns (batch, head, q, k)."""
    there = ~apart.diagonal().isnan()
    inside = pattern[..., there, :][..., there]
    weight = inside.sum(-1)
    far = (inside * apart[there][:, there]).sum(-1) / weight
    return far.mean(-1), (1 - weight).clamp_min(0).mean(-1)
