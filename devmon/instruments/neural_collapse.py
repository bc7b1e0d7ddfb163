"""Neural collapse: the last features of a classifier shrink to their class means, which become a simplex."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.anatomy import forward
from devmon.cost import Cost
from devmon.data import ByContent, minibatches, probe_inputs
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot

RANK = 1e-10  # of the largest eigenvalue between classes: below are directions that the means do not span
GROUPS = 10  # of the jackknife: each left out in turn, so that an error is known to a quarter of itself
LABELS = {  # long name, units, smallest change
    "nc1": ("spread within classes over that between them", "1", 0.05),
    "nc1_pairs": ("spread within two classes over their distance, mean over pairs", "1", None),
    "norm_spread": ("standard deviation of the norms of class means over their mean", "1", None),
    "weight_norm_spread": ("the same of the rows of the classifier", "1", None),
    "angle": ("mean distance of the cosines of class means from -1/(K - 1)", "1", None),
    "simplex": ("distance of the means' Gram matrix to that of a simplex", "1", 0.05),
    "duality": ("distance of the classifier from the class means", "1", 0.05),
    "nearest_mean": ("items whose class by the net is not that by the nearest mean", "share", None),
}


@dataclass(frozen=True, eq=False)
class NeuralCollapse(ByContent):
    """Papyan, Han & Donoho (2020): the features before the last linear map on training `inputs` with their `labels`.

    `inputs` (batch, …) are what the model takes, `labels` (batch,) integers 0 … K - 1, all of them there; `head` is the
    path of the last linear map (W, b), by default the last `nn.Linear` of the model, whose input h (batch, d) is read.
    With class means μ_c, μ_G their mean, M = μ_c - μ_G, G = M Mᵀ, Σ_W and Σ_B the covariances within and between. All
    are 0 for a perfect simplex. `_se` are a jackknife over ten groups of items.

    - `nc1`, 1: tr(Σ_W Σ_B⁺) / K, the pseudo-inverse over the K - 1 directions of the means. Null: at initialisation.
    - `nc1_se`, 1: its standard error.
    - `nc1_pairs`, 1: mean over pairs of classes of (σ²_c + σ²_c′) / (2 ‖μ_c - μ_c′‖²), its twin without an inverse.
    - `nc1_pairs_se`, 1: its standard error.
    - `norm_spread`, 1: standard deviation of ‖M_c‖ over its mean.
    - `norm_spread_se`, 1: its standard error.
    - `weight_norm_spread`, 1: standard deviation of ‖W_c‖ over its mean.
    - `weight_norm_spread_se`, 1: its standard error, 0: the weights are no sample.
    - `angle`, 1: mean |cos(M_c, M_c′) + 1 / (K - 1)| over pairs.
    - `angle_se`, 1: its standard error.
    - `simplex`, 1: ‖G / ‖G‖ - (I - 11ᵀ / K) / √(K - 1)‖, Frobenius norms. Null: at initialisation.
    - `simplex_se`, 1: its standard error.
    - `duality`, 1: ‖W / ‖W‖ - M / ‖M‖‖. Null: at initialisation, near √2.
    - `duality_se`, 1: its standard error.
    - `nearest_mean`, share: items whose class by the net is not that of the nearest class mean. Null: at
      initialisation, near 1 - 1/K.
    - `nearest_mean_se`, share: its standard error.

    Collapse is a matter of the training set, and of training on after its error is 0; without batch norm it can stay
    away (`nc1` .4 at a training accuracy of 1 on digits). Cost: one forward pass of `inputs`. Raises DataError for
    labels that do not fit, InstrumentError for a model without such a map.
    """

    inputs: Tensor
    labels: Tensor
    head: str | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", probe_inputs(self.inputs, "NeuralCollapse"))
        labels = torch.as_tensor(self.labels)
        known = labels.unique()
        if labels.shape != (len(self.inputs),) or labels.is_floating_point() or len(known) < 2:
            raise DataError(
                f"NeuralCollapse needs labels ({len(self.inputs)},) of two classes at least, got {tuple(labels.shape)} "
                f"of {labels.dtype}"
            )
        if known.tolist() != list(range(len(known))) or int(labels.bincount().min()) < 2 * GROUPS:
            raise DataError(
                f"NeuralCollapse needs classes 0 … K - 1 of {2 * GROUPS} items each at least, got classes "
                f"{known.tolist()} of {labels.bincount().tolist()} items"
            )
        object.__setattr__(self, "labels", labels.detach().to("cpu", torch.int64, copy=True))

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        head, held = self._head(snapshot.model), []
        handle = head.register_forward_pre_hook(lambda _, given: held.append(given[0].detach().double().cpu()))
        try:
            parts = minibatches(len(self.inputs), self.batch_size)
            outputs = [forward(snapshot.model, self.inputs[part], "NeuralCollapse") for part in parts]
        finally:
            handle.remove()
        features, classes = torch.cat(held).numpy(), len(self.labels.unique())
        weight = head.weight.detach().double().cpu().numpy()
        scores = torch.cat([output.detach().double().cpu() for output in outputs])
        if features.ndim != 2 or len(features) != len(self.labels) or weight.shape[0] != classes or scores.ndim != 2:
            raise InstrumentError(
                f"NeuralCollapse needs a last map of {classes} classes that reads one vector of each input; that of "
                f"{type(snapshot.model).__name__} reads {features.shape} and gives {weight.shape[0]}: name its `head`"
            )

        # items of a class take turns in the groups, so that each has as many of all classes
        labels, said = self.labels.numpy(), scores.argmax(1).numpy()
        turn = np.zeros(len(labels), int)
        for kind in range(classes):
            turn[labels == kind] = np.arange((labels == kind).sum()) % GROUPS
        whole = _measures(features, labels, weight, said)
        kept = [turn != group for group in range(GROUPS)]
        without = [_measures(features[at], labels[at], weight, said[at]) for at in kept]

        rows = Rows(headline=["nc1", "simplex", "duality"], error="standard error, jackknife over groups of items")
        for name, (label, units, change) in LABELS.items():
            left_out = np.array([each[name] for each in without])
            se = np.sqrt((GROUPS - 1) * left_out.var())
            rows.put(name, (), whole[name], se, label, units=units, smallest_change=change)
        return rows.dataset()

    def cost(self) -> Cost:
        return Cost(forwards=len(self.inputs), positions=1 if self.inputs.is_floating_point() else self.inputs.shape[1])

    def _head(self, model: nn.Module) -> nn.Linear:
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        name = self.head if self.head is not None else next(reversed(linear), "")
        if name not in linear:
            raise InstrumentError(
                f"NeuralCollapse needs a last linear map, {type(model).__name__} has none at {name!r}: name one as "
                f"`head`, of {', '.join(linear) or 'which there is none'}"
            )
        return linear[name]


def _measures(features: np.ndarray, labels: np.ndarray, weight: np.ndarray, said: np.ndarray) -> dict[str, float]:
    """All numbers from features (item, d), labels and the net's classes (item,), and the classifier (class, d)."""
    # means, and what is left of each item
    classes = len(weight)
    means = np.stack([features[labels == label].mean(0) for label in range(classes)])
    centred, rest = means - means.mean(0), features - means[labels]
    spread = np.array([(rest[labels == label] ** 2).sum(1).mean() for label in range(classes)])

    # tr(Σ_W Σ_B⁺) in the basis of the means: Σ_B = Mᵀ M / K has the eigenvalues of G / K
    _, size, axes = np.linalg.svd(centred, full_matrices=False)
    spanned = size**2 > RANK * size[0] ** 2
    spanned[classes - 1 :] = False
    inside = rest @ axes[spanned].T
    within = (inside**2).mean(0)
    gram = centred @ centred.T
    norms, pair = np.sqrt(gram.diagonal()), ~np.eye(classes, dtype=bool)
    apart = ((means[:, None] - means) ** 2).sum(-1)
    simplex = (np.eye(classes) - 1 / classes) / np.sqrt(classes - 1)
    near = ((features[:, None] - means) ** 2).sum(-1).argmin(1)
    weight_norms = np.linalg.norm(weight, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):  # means that are one point have no angles: NaN
        found = {
            "nc1": (within / (size[spanned] ** 2 / classes)).sum() / classes,
            "nc1_pairs": ((spread[:, None] + spread) / (2 * apart))[pair].mean(),
            "norm_spread": norms.std() / norms.mean(),
            "weight_norm_spread": weight_norms.std() / weight_norms.mean(),
            "angle": np.abs(gram / np.outer(norms, norms) + 1 / (classes - 1))[pair].mean(),
            "simplex": np.linalg.norm(gram / np.linalg.norm(gram) - simplex),
            "duality": np.linalg.norm(weight / np.linalg.norm(weight) - centred / np.linalg.norm(centred)),
            "nearest_mean": (near != said).mean(),
        }
    return {name: float(value) if np.isfinite(value) else float("nan") for name, value in found.items()}
