"""Polysemanticity: of how many kinds the inputs are that drive one neuron most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from devmon.anatomy import activations, forward
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, minibatches, places_of, probe_inputs, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot, derive_seed

DRAWS = 200  # random sets of items behind the references
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Polysemanticity(ByContent):
    """How pure the labels of the items are on which a neuron is largest: one neuron, one meaning, or several.

    `inputs` are tokens (batch, pos) with `labels` (batch, pos), one item a position, those of -100 ignored; or inputs
    of another kind, (batch, …) of floats, with labels (batch,), one item each, of which a neuron's activation is the
    mean over its positions. Neurons are those of the MLPs of a model whose parts are known; or the last dimension of
    the output of `module`, the path of any submodule, as the one layer 0. The `top` items of a neuron are those on
    which it is largest (of equals the first).

    - `entropy` (layer, neuron), nats: of the labels of the top items, from 0 (one label) to log(number of labels). NaN
      where the neuron is equal on all items.
    - `purity` (layer, neuron), share: of the most frequent label among the top items, NaN likewise.
    - `kurtosis` (layer, neuron), 1: excess kurtosis of the activation over all items, large where it is seldom far from
      its mean, NaN likewise.
    - `mean_entropy`, nats: mean over the neurons that are not NaN. Null: `mean_entropy_reference`.
    - `mean_entropy_se`, nats: its standard error over neurons.
    - `mean_entropy_reference`, nats: of `top` items drawn at random.
    - `mean_purity`, share: mean over neurons. Null: `mean_purity_reference`.
    - `mean_purity_se`, share: its standard error over neurons.
    - `mean_purity_reference`, share: of `top` items drawn at random.
    - `mean_kurtosis`, 1: mean over neurons. Null: 0, a Gaussian's.
    - `mean_kurtosis_se`, 1: its standard error over neurons.

    Pitfalls: it is not superposition (two measured things): a rotation of the space changes it and leaves
    `Superposition` alone. It sees the meanings that the labels have, and a label with fewer than `top` items cannot be
    pure. Cost: one forward pass of the inputs. Raises DataError for labels of another shape, of one kind, or fewer than
    `top`; InstrumentError for a model whose neurons, or `module`, are not found.
    """

    inputs: Tensor
    labels: Tensor
    module: str | None = None
    top: int = 32
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        who = type(self).__name__
        object.__setattr__(self, "inputs", probe_inputs(self.inputs, who))
        labels = torch.as_tensor(self.labels)
        labels = probe_tokens(labels[:, None] if labels.ndim == 1 else labels, who, "labels", shortest=1)
        object.__setattr__(self, "labels", labels)
        shape = (len(self.inputs), places_of(self.inputs))
        if tuple(labels.shape) != shape:
            raise DataError(f"{who} needs a label for each of {shape} items, got {tuple(labels.shape)}")
        used = labels[labels != -100]
        if len(used.unique()) < 2 or not 2 <= self.top <= len(used):
            raise DataError(
                f"{who} needs two labels and 2 <= top <= {len(used)}, the labelled items; got {len(used.unique())} "
                f"labels, top {self.top}"
            )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        used = self.labels != -100
        states = self._neurons(snapshot)[:, used].double().cpu().numpy()  # (layer, item, neuron)
        label = self.labels[used].numpy()

        # the labels of the items on which a neuron is largest, and how heavy the tails of its activation are
        order = np.argsort(-states, axis=1, kind="stable")[:, : self.top]  # (layer, top, neuron)
        entropy, purity = _labels(label[order].swapaxes(1, 2))
        away = states - states.mean(1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            kurtosis = (away**4).mean(1) / (away**2).mean(1) ** 2 - 3
        moving = np.ptp(states, axis=1) > 1e-6 * np.abs(states).max(axis=1)  # above rounding

        # the null: as many items drawn at random
        generator = np.random.default_rng(derive_seed(self.seed, type(self).__name__))
        chance = np.array([generator.permutation(label)[: self.top] for _ in range(DRAWS)])
        entropy_null, purity_null = _labels(chance)

        rows = Rows(headline=["mean_entropy", "mean_purity", "mean_kurtosis"], items=len(label))
        _put(rows, "entropy", entropy, entropy_null, moving, "entropy of the labels of the top items", "nats")
        _put(
            rows, "purity", purity, purity_null, moving, "share of the most frequent label among the top items", "share"
        )
        _put(rows, "kurtosis", kurtosis, None, moving, "excess kurtosis of the activation", "1")
        return rows.dataset(layer=np.arange(moving.shape[0]), neuron=np.arange(moving.shape[1]))

    def cost(self) -> Cost:
        return Cost(forwards=len(self.inputs), positions=places_of(self.inputs))

    def _neurons(self, snapshot: Snapshot) -> Tensor:
        """(layer, batch, pos, neuron); pos is 1 for inputs that are no tokens."""
        who = type(self).__name__
        if self.module is None:
            reads = activations(snapshot, self.inputs, ["neurons"], who, batch_size=self.batch_size)[1]
            states = reads.stack("neurons")
        else:
            states = _outputs(snapshot.model, self.module, self.inputs, self.batch_size, who)[None]
        if self.inputs.is_floating_point():
            return states.flatten(2, -2).mean(2, keepdim=True) if states.ndim > 3 else states[:, :, None]
        return states


def _put(
    rows: Rows, name: str, values: Array, null: Array | None, moving: NDArray[np.bool_], label: str, units: str
) -> None:
    """Values (layer, neuron) of the neurons that move, their mean, and its null (draw,)."""
    each = np.where(moving, values, np.nan)
    nothing = "the neuron is equal on all items"
    rows.put(name, ("layer", "neuron"), each, None, label, units=units, nan=nothing)
    alive = each[moving]
    n = len(alive)
    mean = float(alive.mean()) if n else np.nan
    se = float(alive.std(ddof=1) / np.sqrt(n)) if n > 1 else np.nan
    over = "standard error over neurons"
    groups = clustered_groups(np.where(moving, values, 0).ravel(), moving.ravel())
    label_of_mean = f"{label}, mean over neurons"
    rows.put(f"mean_{name}", (), mean, se, label_of_mean, units=units, error=over, replicates=groups)
    if null is not None:
        drawn = f"{name} of items drawn at random"
        rows.put(f"mean_{name}_reference", (), float(null.mean()), None, drawn, units=units)


def _outputs(model: nn.Module, path: str, inputs: Tensor, batch_size: int, who: str) -> Tensor:
    """What the submodule returns, (batch, …, neuron), for all inputs."""
    known = dict(model.named_modules())
    if path not in known:
        raise InstrumentError(
            f"{who}: {type(model).__name__} has no module {path!r}: it has {', '.join(filter(None, known))}"
        )
    kept: list[Tensor] = []
    handle = known[path].register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        parts = list(minibatches(len(inputs), batch_size))
        for part in parts:
            forward(model, inputs[part], who)
    finally:
        handle.remove()
    shapes = [tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__ for output in kept]
    good = len(kept) == len(parts) and all(isinstance(output, Tensor) and output.ndim > 1 for output in kept)
    if not good or sum(map(len, kept)) != len(inputs):
        raise InstrumentError(
            f"{who} needs a module that runs once and returns (batch, …, neuron); {path!r} gave {shapes[:4]}"
        )
    return torch.cat([output.detach().clone() for output in kept])


def _labels(labels: NDArray[np.int64]) -> tuple[Array, Array]:
    """Entropy in nats and largest share of the labels (…, item), shapes (…)."""
    share = (labels[..., :, None] == labels[..., None, :]).mean(-1)  # of each item's own label
    return -np.log(share).mean(-1), share.max(-1)
