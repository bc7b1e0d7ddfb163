"""Superposition: how many features share how many dimensions, and how much they interfere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy
from devmon.anatomy.circuits import over_tokens
from devmon.anatomy.fit import exact_products
from devmon.cost import Cost
from devmon.data import minibatches
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot

MAX_FEATURES = 4096  # features of which each is stored


@dataclass(frozen=True)
class Superposition:
    """How features share the dimensions of a space: Elhage et al. 2022 (2209.10652), with W (feature, dimension).

    `parameter` names the matrix of the features' directions, one a row, or one a column with `columns` (the weight of
    an embedding `nn.Linear(features, dims)`). Without it W is the unembedding of a model whose parts are known: one row
    a token, a *proxy*, as the features of a real model are not known. Wᵢ are the rows, ŵᵢ their directions. A reference
    is the same number with (ŵᵢ·Wⱼ)² for i ≠ j at ‖Wⱼ‖² / dimensions, its mean over directions drawn at random. What is
    by feature is left out for more than MAX_FEATURES features. All are functions of the weights in float64 (to 1e-6 for
    more features): there is no standard error. NaN where a weight is not finite or all are 0.

    - `norm` (feature), weight: ‖Wᵢ‖.
    - `dimensionality` (feature), dimensions: Dᵢ = ‖Wᵢ‖² / Σⱼ (ŵᵢ·Wⱼ)², the share of a dimension that a feature has to
      itself: 1 alone, ½ in an antipodal pair, 0 for a feature of no length. Null: `dimensionality_reference`.
    - `dimensionality_reference` (feature), dimensions: among random directions.
    - `interference` (feature), squared weight: Σ_{j≠i} (ŵᵢ·Wⱼ)². Null: `interference_reference`.
    - `interference_reference` (feature), squared weight: among random directions.
    - `features_per_dimension`, features: ‖W‖²_F / dimensions, 1 for an orthonormal basis; it grows with the scale of W
      squared, so it counts features only where those that are there have length 1, and is no headline.
    - `mean_dimensionality`, dimensions: mean over the features. Null: `mean_dimensionality_reference`.
    - `mean_dimensionality_reference`, dimensions: among random directions.
    - `mean_interference`, 1: Σ_{i≠j} (Wᵢ·Wⱼ)² / Σᵢ ‖Wᵢ‖⁴, 0 for orthogonal features; below its reference it is
      superposition that is arranged. Null: `mean_interference_reference`.
    - `mean_interference_reference`, 1: among random directions.
    - `directions`, dimensions: the participation ratio (Σσ²)² / Σσ⁴ of W's singular values.

    Pitfalls: directions of features depend on the basis only up to rotation, and all numbers but norms are free of
    scale, save features_per_dimension. Cost: no pass; products (dimension, dimension), so a vocabulary of any size will
    do. Raises InstrumentError where the parameter, or the unembedding, is not found.

    >>> import torch
    >>> from devmon.snapshot import Snapshot
    >>> model = torch.nn.Linear(2, 4, bias=False)  # two antipodal pairs in two dimensions
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    >>> measured = Superposition("weight")(Snapshot(0, model))
    >>> measured["dimensionality"].values.tolist(), measured["features_per_dimension"].item()
    ([0.5, 0.5, 0.5, 0.5], 2.0)
    """

    parameter: str | None = None
    columns: bool = False

    def __post_init__(self) -> None:
        if self.columns and self.parameter is None:
            raise DataError(
                "Superposition: columns=True is of a parameter: name it, or leave both out for the unembedding"
            )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        weight = self._weight(snapshot)  # (feature, dimension)
        features, dims = weight.shape
        low, high = weight.aminmax()
        if bool(low.isfinite() & high.isfinite() & ((low != 0) | (high != 0))):
            gram = over_tokens(snapshot, weight, weight)
            squares = (gram**2).sum().item()
            square, seen = _overlaps(weight, gram)
        else:
            squares, square, seen = np.nan, np.full(features, np.nan), np.full(features, np.nan)
        total, interference = square.sum(), np.maximum(seen - square, 0.0)

        # the null: other features at directions drawn at random
        expected = (total - square) / dims
        own = np.divide(square, seen, out=np.zeros_like(square), where=seen != 0)
        chance = np.divide(square, square + expected, out=np.zeros_like(square), where=square != 0)
        by_feature = {
            "norm": (np.sqrt(square), "length of the feature", "weight"),
            "dimensionality": (own, "share of a dimension that the feature has to itself", "dimensions"),
            "dimensionality_reference": (chance, "dimensionality among random directions", "dimensions"),
            "interference": (interference, "squared overlap with all other features", "squared weight"),
            "interference_reference": (expected, "interference among random directions", "squared weight"),
        }
        whole = {
            "features_per_dimension": (total / dims, "‖W‖² / dimensions", "features"),
            "mean_dimensionality": (own.mean(), "dimensionality, mean over features", "dimensions"),
            "mean_dimensionality_reference": (chance.mean(), "among random directions", "dimensions"),
            "mean_interference": (_weighted(interference, square), "interference over squared length", "1"),
            "mean_interference_reference": (_weighted(expected, square), "among random directions", "1"),
            "directions": (total**2 / squares if total else np.nan, "participation ratio of W", "dimensions"),
        }
        headline = ["mean_dimensionality", "mean_interference", "directions"]
        rows, stored = Rows(headline, proxy=int(self.parameter is None)), features <= MAX_FEATURES
        for name, (array, label, units) in by_feature.items() if stored else ():
            rows.put(name, "feature", array, None, label, units=units)
        for name, (value, label, units) in whole.items():
            rows.put(name, (), float(value), None, label, units=units)
        return rows.dataset(**({"feature": np.arange(features)} if stored else {}))

    def cost(self) -> Cost:
        """No passes: a product of the weights."""
        return Cost()

    def _weight(self, snapshot: Snapshot) -> Tensor:
        if self.parameter is None:
            weight = Anatomy(snapshot.model, who=type(self).__name__).W_U.T
        else:
            named = {n.replace("_orig_mod.", ""): p for n, p in snapshot.model.named_parameters()}
            known = [name for name, p in named.items() if p.ndim == 2]
            if self.parameter not in known:
                raise InstrumentError(
                    f"Superposition: {type(snapshot.model).__name__} has no matrix {self.parameter!r}: its matrices "
                    f"are {', '.join(known) or 'none'}"
                )
            weight = named[self.parameter].T if self.columns else named[self.parameter]
        return weight.detach()


def _overlaps(weight: Tensor, gram: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """‖Wᵢ‖² and Σⱼ (ŵᵢ·Wⱼ)², both (feature,), by way of WᵀW (dimension, dimension): a vocabulary has too many features
    for W Wᵀ. Where those are more than are stored, products are in float32: they overlap by far more than it rounds."""
    single = len(weight) > MAX_FEATURES and weight.dtype != torch.float64
    gram = gram.float() if single else gram
    found = []
    with exact_products():
        for rows in minibatches(len(weight), MAX_FEATURES):
            part = weight[rows].to(gram)
            square = part.square().sum(1, keepdim=True)
            alive = torch.where(square > 0, part / square.sqrt(), 0.0)
            found.append(torch.stack([square[:, 0], ((alive @ gram) * alive).sum(1)]))
    square, seen = torch.cat(found, 1).double().cpu().numpy()
    return square, seen


def _weighted(values: np.ndarray, square: np.ndarray) -> float:
    """Σᵢ ‖Wᵢ‖² valuesᵢ / Σᵢ ‖Wᵢ‖⁴, where `values` are sums of (ŵᵢ·Wⱼ)²."""
    return float(square @ values / (square @ square))
