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
from devmon.data import (
    ByContent,
    jackknife,
    minibatches,
    places_of,
    probe_inputs,
    probe_tokens,
)
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot, derive_seed

DRAWS = 200  # random sets of items behind the references
GROUPS = 8  # of sequences, of the jackknife: errors are known to 27% of themselves, and cost as many counts of the top
Array = NDArray[np.float64]
LABELS = {
    "entropy": ("entropy of the labels of the top items", "nats"),
    "purity": ("share of the most frequent label among the top items", "share"),
    "kurtosis": ("excess kurtosis of the activation", "1"),
}


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
    - `mean_entropy_se`, nats: its standard error, for these neurons, by the jackknife over 8 groups of sequences; up to
      half too large where labels do not come in clusters and `top` is small.
    - `mean_entropy_reference`, nats: of `top` items drawn at random.
    - `mean_purity`, share: mean over neurons. Null: `mean_purity_reference`.
    - `mean_purity_se`, share: its standard error, likewise.
    - `mean_purity_reference`, share: of `top` items drawn at random.
    - `mean_kurtosis`, 1: mean over neurons. Null: 0, a Gaussian's.
    - `mean_kurtosis_se`, 1: its standard error, likewise.

    Pitfalls: it is not superposition (two measured things): a rotation of the space changes it and leaves
    `Superposition` alone. It sees the meanings that the labels have, and a label with fewer than `top` items cannot be
    pure. Cost: one forward pass of the inputs. Raises DataError for labels of another
    shape, of one kind, or fewer than `top`; InstrumentError for a model whose neurons, or `module`, are not found.
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
        moving = np.ptp(states, axis=1) > 1e-6 * np.abs(states).max(axis=1)  # above rounding
        sequence = np.unique(used.nonzero()[:, 0].numpy(), return_inverse=True)[1]
        values, without = self._scores(states, label, sequence % GROUPS)

        # the null: as many items drawn at random
        generator = np.random.default_rng(derive_seed(self.seed, type(self).__name__))
        chance = np.array([generator.permutation(label)[: self.top] for _ in range(DRAWS)])
        entropy_null, purity_null = _labels(chance)

        rows = Rows(headline=["mean_entropy", "mean_purity", "mean_kurtosis"], items=len(label))
        rows.error = "standard error over sequences, by the jackknife"
        for name, (text, units) in LABELS.items():
            nothing = "the neuron is equal on all items"
            each = np.where(moving, values[name], np.nan)
            rows.put(name, ("layer", "neuron"), each, None, text, units=units, nan=nothing)
            mean, *parts = (float(v[moving].mean()) if moving.any() else np.nan for v in (each, *without[name]))
            se, groups = jackknife(mean, np.array(parts))
            rows.put(f"mean_{name}", (), mean, se, f"{text}, mean over neurons", units=units, replicates=groups)
        for name, null in (("entropy", entropy_null), ("purity", purity_null)):
            drawn = f"{name} of items drawn at random"
            rows.put(f"mean_{name}_reference", (), float(null.mean()), None, drawn, units=LABELS[name][1])
        return rows.dataset(layer=np.arange(moving.shape[0]), neuron=np.arange(moving.shape[1]))

    def _scores(
        self, states: Array, label: NDArray[np.int64], group: NDArray[np.int64]
    ) -> tuple[dict[str, Array], dict[str, list[Array]]]:
        """Of `states` (layer, item, neuron): values (layer, neuron), and the same without each group of items."""
        # items by rank, as far as `top` of them are left without any group
        most = self.top + int(np.bincount(group).max())
        order = np.argsort(-states, axis=1, kind="stable")[:, :most]
        entropy, purity = _labels(label[order[:, : self.top]].swapaxes(1, 2))

        # sums of powers by group, from which the kurtosis of all others follows
        away, present = states - states.mean(1, keepdims=True), np.unique(group)
        powers = np.stack([[(away[:, group == g] ** k).sum(1) for k in range(5)] for g in present])
        whole = powers.sum(0)
        values = {"entropy": entropy, "purity": purity, "kurtosis": _kurtosis(whole)}

        # Of fewer items as many fewer are the top: with the next ones in place of those left out, chance would count
        # twice, in what goes and in what comes.
        fewer = max(round(self.top * (1 - 1 / len(present))), 1)
        without: dict[str, list[Array]] = {name: [] for name in values}
        for g, own in zip(present, powers, strict=True):
            first = np.argsort(group[order] == g, axis=1, kind="stable")[:, :fewer]  # the first that are left
            entropy, purity = _labels(label[np.take_along_axis(order, first, 1)].swapaxes(1, 2))
            for name, value in (("entropy", entropy), ("purity", purity), ("kurtosis", _kurtosis(whole - own))):
                without[name].append(value)
        return values, without

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


def _kurtosis(powers: Array) -> Array:
    """Excess kurtosis from sums (power 0 to 4, …) about any centre near the mean."""
    n, one, two, three, four = powers
    mean, square, cube, fourth = one / n, two / n, three / n, four / n
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = square - mean**2
        return np.asarray((fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4) / variance**2 - 3)


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
