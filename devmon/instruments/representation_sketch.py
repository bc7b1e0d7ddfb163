"""Sketches of the residual stream, small enough to keep at every step: drift and CKA are derived from them later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from devmon.anatomy.passes import TOGETHER, Read, Seen, read
from devmon.cost import DRAWN, GPT2_SMALL, Cost, Shape, trials
from devmon.data import ByContent, clustered_groups, clustered_mean, places_of, probe_inputs
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.snapshot import Snapshot, derive_seed


@dataclass(frozen=True, eq=False)
class Sketch(ByContent):
    """States of every layer at fixed positions of `tokens` (batch, pos) int64, seen through `dims` random directions.

    A sketch is h P for the state h (d,) of an item. P (d, dims) is two independent halves of orthonormal columns times
    √(2 d / dims), drawn by `seed`, the same for all layers and all steps; where dims >= d, P is the identity and
    nothing is lost (the variable's attribute `halves` says which: 2 or 1). An item is one of `positions` of one
    sequence, the last of each quarter by default; the coordinates `sequence` and `pos` say which. Of inputs (batch, …)
    of floats, such as images, it is the mean state over the positions of one. Inner products survive on average
    (Johnson-Lindenstrauss), and so do products of two kernels if one is of the first half and one of the second. Layer
    0 is the input of the first block, l the output of block l; `blocks` is their path where it is not found;
    `layers=False` leaves the stream, and the need to find it, out. `outputs=True` adds the logits.

    - `sketch` (layer, item, feature), activation: float32, the states of the stream in random directions.
    - `spread` (layer), squared activation: mean squared distance of the whole states, not of the sketches, from their
      mean, per dimension: the scale that CKA does not see.
    - `spread_se` (layer), squared activation: its standard error over sequences.
    - `outputs` (item, output), nats: float32, the same of the logits, less their mean over the vocabulary, which no
      probability depends on; it is what essential dynamics follows (`devmon.analysis.derive.essential`).
    - `output_spread`, squared nats: as `spread`, of the logits less their mean.
    - `output_spread_se`, squared nats: its standard error over sequences.

    What follows: `devmon.analysis.derive.representation` (drift, CKA between steps and between layers, with errors and
    permutation p-values, which are the null of this instrument: it stores data, no score). A debiased CKA from 128 dims
    is that of the states on average, with a standard deviation of .01 to .05 over `seed` (d = 768, 256 items), most for
    a CKA near 0 of spectra that are flat; the accident is the same at all steps. One half against itself would be up to
    .06 too low. A row takes 4 · layers · items · dims bytes: 1.7 MB for 13 layers, 256 items, 128 dims.

    Cost: one forward pass of `tokens`; with `outputs` the logits of the items are held. Raises InstrumentError
    for a model whose blocks or logits are not found, DataError for positions that are not there.
    """

    tokens: Tensor
    positions: tuple[int, ...] | None = None
    dims: int = 128
    layers: bool = True
    outputs: bool = False
    blocks: str | None = None
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        tokens = probe_inputs(self.tokens, "Sketch")
        length = places_of(tokens)
        if self.outputs and tokens.is_floating_point():
            raise DataError("Sketch takes outputs of tokens alone: give tokens, or outputs=False")
        quarters = sorted({max(length * i // 4 - 1, 0) for i in (1, 2, 3, 4)})
        given = quarters if self.positions is None else [int(place) for place in self.positions]
        if not given or not all(-length <= place < length for place in given):
            raise DataError(f"Sketch: positions must be in the {length} of the tokens, got {self.positions}")
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "positions", tuple(sorted({place % length for place in given})))
        if self.dims < 2 or self.dims % 2 or len(tokens) < 2 or not (self.layers or self.outputs):
            raise DataError(
                f"Sketch needs an even dims >= 2, two sequences, and layers or outputs; got dims={self.dims}, "
                f"{len(tokens)} sequences, layers={self.layers}, outputs={self.outputs}"
            )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        places, count = list(self.positions or ()), len(self.tokens)
        rows = Rows(kind="sketch", headline=["spread"] * self.layers + ["output_spread"] * self.outputs)
        coords: dict[str, Any] = {"item": np.arange(count * len(places))}
        coords["sequence"] = ("item", np.repeat(np.arange(count), len(places)))
        coords["pos"] = ("item", np.tile(places, count))
        halves, label = {}, "mean squared distance from the mean, per dimension"
        read_parts = iter(read(snapshot, self))
        if self.layers:
            layers = list(zip(*next(read_parts), strict=True))  # of each minibatch the states, (item, d)
            wide = max(states[0].shape[1] for states in layers)
            sketches, spreads = zip(*(self._keep(states, "stream", wide) for states in layers), strict=True)
            dims, sketch = ("layer", "item", "feature"), np.stack(sketches)
            rows.put("sketch", dims, sketch, None, "residual stream in random directions", units="activation")
            spread, error = np.array([spread[:2] for spread in spreads]).T
            groups = np.stack([spread[2] for spread in spreads], 1)
            rows.put("spread", "layer", spread, error, label, units="squared activation", replicates=groups)
            coords |= {"layer": np.arange(len(sketch)), "feature": np.arange(sketch.shape[2])}
            halves["sketch"] = self._halves(wide)
        if self.outputs:
            scores = next(read_parts)
            vocab = scores[0].shape[1]
            sketch, (spread, error, groups) = self._keep(scores, "outputs", vocab)
            text = "logits less their mean, in random directions"
            rows.put("outputs", ("item", "output"), sketch, None, text, units="nats")
            rows.put("output_spread", (), spread, error, label, units="squared nats", replicates=groups)
            coords["output"] = np.arange(sketch.shape[1])
            halves["outputs"] = self._halves(vocab)
        dataset = rows.dataset(**coords)
        for name, number in halves.items():
            dataset[name].attrs["halves"] = number
        return dataset

    def reads(self) -> list[Read]:
        batch = min(self.batch_size, TOGETHER)
        states = Read(self, self.tokens, self._states, batch, stream=True, blocks=self.blocks)
        outputs = Read(self, self.tokens, self._predictions, batch, predicts="all")
        return [states] * self.layers + [outputs] * self.outputs

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        sequences, positions = len(self.tokens), places_of(self.tokens)
        items, whole = sequences * len(self.positions or ()), sequences * positions
        # orthonormal directions, in float64, and products with them
        each = 2 * self.dims**2 + DRAWN * self.dims + 2 * items * self.dims
        layers = (shape.layers + 1) * shape.d_model * self.layers
        before = trials(positions, 1 + self.layers, layout=not self.outputs)
        if not self.outputs:
            return Cost(sequences, positions=positions, unembedded=sequences, operations=each * layers, trials=before)
        work = each * (layers + shape.vocab)
        return Cost(
            sequences,
            positions=positions,
            softmaxes=whole,
            operations=work,
            trials=before,
            held=4 * items * shape.vocab,
        )

    def _states(self, seen: Seen) -> list[Tensor]:
        """The states of the items at each layer, (item, d)."""
        return [self._items(state) for state in seen.stream]

    def _predictions(self, seen: Seen) -> Tensor:
        """The log-probabilities of the items less their mean, which are the logits less theirs, (item, output)."""
        scores = self._items(seen.log_p)
        return (scores - scores.mean(1, keepdim=True, dtype=torch.float64)).to(scores)

    def _items(self, values: Tensor) -> Tensor:
        return values[:, list(self.positions or ())].flatten(0, 1)

    def _halves(self, width: int) -> int:
        """Independent halves of the directions; 1 where the whole state is kept."""
        return 2 if self.dims < width else 1

    def _keep(
        self, parts: Sequence[Tensor], what: str, wide: int
    ) -> tuple[np.ndarray, tuple[float, float, np.ndarray]]:
        """The sketch (item, feature) of states, by minibatch (item, d), and their spread, its standard error, and by
        group. Where layers differ in width, up to `wide`, the sketches of narrower ones end in zeros, which no product
        sees. In float64 a minibatch at a time: logits are many."""
        width, items = parts[0].shape[1], sum(map(len, parts))
        centre = torch.stack([part.sum(0, dtype=torch.float64) for part in parts]).sum(0) / items
        away = torch.cat([(part.double() - centre).square().mean(1) for part in parts])
        total = away.reshape(len(self.tokens), -1).sum(1).cpu().numpy()
        count = np.full(len(total), items // len(total))
        mean, se = clustered_mean(total, count)
        if self.dims >= wide:
            sketch = F.pad(torch.cat(list(parts)).float(), (0, wide - width))
        else:
            half = min(self.dims // 2, width)
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "Sketch", what))
            drawn = torch.randn(2, width, half, generator=generator, dtype=torch.float64)
            directions = [(torch.linalg.qr(each)[0] * (width / half) ** 0.5).to(parts[0].device) for each in drawn]
            sketch = torch.cat(
                [
                    torch.cat([F.pad(part.double() @ d, (0, self.dims // 2 - half)) for d in directions], 1).float()
                    for part in parts
                ]
            )
        return sketch.cpu().numpy(), (float(mean), float(se), clustered_groups(total, count))
