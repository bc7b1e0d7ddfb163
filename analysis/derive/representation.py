"""Drift and similarity of representations, from the sketches that `devmon.instruments.Sketch` stores. Pure NumPy."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from devmon.errors import DataError

Array = NDArray[np.float64]
GROUPS = 10  # of the jackknife


def cka(x: Any, y: Any, *, debiased: bool = True) -> float:
    """Linear centred kernel alignment of two sets of states (item, feature) of the same items, in [-1, 1].

    HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) with K = x xᵀ, L = y yᵀ (Kornblith et al. 2019, 1905.00414): 1 where y is x
    moved, rotated and scaled, whatever the number of features; 0 for what has nothing to do with each other.
    `debiased` takes the unbiased estimator of HSIC (Song et al. 2012, JMLR 13, eq. 5), which can be a little negative;
    else the plain one, which goes to 1 for independent states once features are many more than items.
    NaN where all states of a set are one. Raises DataError for other shapes, and fewer than 4 items.
    """
    x, y = (_states(v, name) for v, name in ((x, "x"), (y, "y")))
    if len(x) != len(y):
        raise DataError(f"cka compares the same items, got {len(x)} and {len(y)}")
    k, lam = (_centred(_gram(v), debiased) for v in (x, y))
    return float(_ratio((k * lam).sum(), (k * k).sum(), (lam * lam).sum()))


def cka_test(x: Any, y: Any, *, sequence: Any = None, permutations: int = 500, seed: int = 0) -> tuple[float, float]:
    """Debiased CKA and its p-value: how often it is as large when the items of y are permuted, one counted extra.

    With `sequence` (item,) whole sequences change places, as many items in each: items of a sequence belong together,
    and what all sequences have in common at a place (positional embeddings) is then part of the null, not evidence.
    """
    x, y = _states(x, "x"), _states(y, "y")
    k, lam = (_centred(_gram(v), True) for v in (x, y))
    hsic = (k * lam).sum()
    null = [(k * lam[np.ix_(order, order)]).sum() for order in _orders(len(x), sequence, permutations, seed)]
    return cka(x, y), (1 + sum(value >= hsic for value in null)) / (1 + permutations)


def drift(dataset: xr.Dataset, *, variable: str = "sketch") -> xr.Dataset:
    """How far the representation of each step is from that of the last step, and from that of the step before.

    `dataset` holds `variable` over (step, item, feature) and perhaps layer, as a trajectory's watch of `Sketch` does.
    The result has

    - `drift` (step[, layer]): 1 - debiased CKA(this step, last step), 0 at the last
    - `change` (step[, layer]): 1 - debiased CKA(the step before, this step), NaN at the first
    - `drift_se`, `change_se`: a jackknife over 10 groups of sequences (of items where there is no coordinate
      `sequence`)

    CKA sees no rotation, and no scale: see `spread` for that. A drift that is 1 from the start means nothing is shared
    with the end, as between two random networks with untied inputs; two networks that embed the same tokens share that,
    so compare with step 0.
    Sketches of `dims` < d are compared half against half, which is right on average and noisy: their CKA may leave
    [-1, 1] a little, by the same accident of the random directions at all steps. NaN where such noise is all there is.
    Raises DataError without the variable, with fewer than two steps or too few items.
    """
    array, group = _array(dataset, variable)
    if array.sizes["step"] < 2:
        raise DataError(f"drift needs two steps, {variable!r} has {array.sizes['step']}")
    halves = _halves(array)
    columns = []
    for states in array.values.astype(np.float64):  # (step, item, feature)
        grams = np.array([[_gram(half) for half in np.split(layer, halves, axis=1)] for layer in states])
        left_out = [np.flatnonzero(group != label) for label in np.unique(group)]
        each = np.array([_drifts(grams[..., rest, :][..., rest]) for rest in left_out])
        columns.append([_drifts(grams), np.sqrt((len(each) - 1) * each.var(0))])
    drifts = np.array(columns)  # (layer, value or error, drift or change, step)
    result = xr.Dataset(
        coords={"step": array["step"], "layer": array["layer"]}, attrs={"headline": ["drift", "change"]}
    )
    names = {"drift": "1 - CKA with the last step", "change": "1 - CKA with the step before"}
    for i, (name, long_name) in enumerate(names.items()):
        for j, (key, text) in enumerate(((name, long_name), (f"{name}_se", "jackknife standard error"))):
            result[key] = (("step", "layer"), drifts[:, j, i].T, {"long_name": text, "units": "1"})
        result[name].attrs["smallest_change"] = 0.05
    return result if "layer" in dataset[variable].dims else result.isel(layer=0, drop=True)


def similarity(
    dataset: xr.Dataset,
    between: Literal["steps", "layers"] = "steps",
    *,
    variable: str = "sketch",
    permutations: int = 0,
    seed: int = 0,
) -> xr.Dataset:
    """Debiased CKA of all pairs of steps, or of layers. The result has

    - `cka` (layer, step, other_step) between steps, or (step, layer, other_layer) between layers
    - `p` of the same shape, with `permutations`: the share of permutations of the sequences (see `cka_test`), the
      observed order counted as one of them, whose CKA is as large. The smallest possible is 1 / (1 + permutations);
      they are not corrected for the number of pairs.

    The biased CKA, which many papers show, is larger the fewer the items.
    """
    if between not in ("steps", "layers"):
        raise DataError(f"similarity is between 'steps' or 'layers', got {between!r}")
    array, _ = _array(dataset, variable)
    if between == "layers":
        array = array.transpose("step", "layer", "item", ...)
    outer, inner = array.dims[:2]
    orders = _orders(array.sizes["item"], dataset.get("sequence"), permutations, seed)
    halves = _halves(array)
    values, shares = [], []
    for block in array.values.astype(np.float64):
        kernels = np.array([[_centred(_gram(h), True) for h in np.split(states, halves, axis=1)] for states in block])
        product = _products(kernels, kernels)
        size = np.diagonal(product)
        values.append(_ratio(product, size[:, None], size))
        exceeded = np.ones_like(product)
        for order in orders:
            exceeded += _products(kernels, kernels[..., order, :][..., order]) >= product
        shares.append(exceeded / (1 + permutations))
    dims = (outer, inner, f"other_{inner}")
    coords = {outer: array[outer].values, inner: array[inner].values, dims[2]: array[inner].values}
    result = xr.Dataset(coords=coords)
    result["cka"] = (dims, np.array(values), {"long_name": "debiased linear CKA", "units": "1"})
    if permutations:
        result["p"] = (dims, np.array(shares), {"long_name": "permutation p-value of the CKA", "units": "1"})
    return result


def _array(dataset: xr.Dataset, variable: str) -> tuple[xr.DataArray, NDArray[np.int64]]:
    """The sketches over (layer, step, item, feature), and the group of each item in the jackknife."""
    if variable not in dataset or "item" not in dataset[variable].dims:
        raise DataError(f"no {variable!r} over items in the dataset, it has {sorted(map(str, dataset.data_vars))}")
    array = dataset[variable]
    for dim in ("layer", "step"):
        if dim not in array.dims:
            array = array.expand_dims({dim: [0]})
    if array.ndim != 4 or array.sizes["item"] < 8:
        raise DataError(
            f"{variable!r} needs dimensions (step, item, feature), perhaps layer, and 8 items, got {dict(array.sizes)}"
        )
    items = dataset["sequence"].values if "sequence" in dataset.coords else np.arange(array.sizes["item"])
    return array.transpose("layer", "step", "item", ...), np.unique(items, return_inverse=True)[1] % GROUPS


def _states(values: Any, name: str) -> Array:
    states = np.asarray(values, dtype=np.float64)
    if states.ndim != 2 or len(states) < 4:
        raise DataError(f"{name} must be (item, feature) with 4 items at least, got shape {states.shape}")
    return states


def _gram(states: Array) -> Array:
    states = states - states.mean(0)  # changes no centred kernel, and large means cost no digits
    return states @ states.T


def _centred(gram: Array, debiased: bool) -> Array:
    """The kernel centred; so that, debiased, the inner product of two is n (n - 3) times the unbiased HSIC.

    With the diagonal set to 0, K_ij - K_i./(n-2) - K_.j/(n-2) + K../((n-1)(n-2)) off the diagonal, 0 on it (Székely &
    Rizzo 2014): that inner product is Song's formula, and a true one, so |CKA| <= 1.
    """
    if not debiased:
        return gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    n = len(gram)
    gram = gram.copy()
    np.fill_diagonal(gram, 0)
    rows = gram.sum(1)
    gram = gram - rows / (n - 2) - rows[:, None] / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(gram, 0)
    return gram


def _ratio(product: Any, size_x: Any, size_y: Any) -> Any:
    size = np.sqrt(np.maximum(size_x, 0) * np.maximum(size_y, 0))  # of halves it can come out negative
    return np.divide(product, size, out=np.full(np.shape(product), np.nan), where=size > 0)


def _halves(array: xr.DataArray) -> int:
    """2 where the features are two independent sketches of the same states, half of them each; else 1."""
    return int(array.attrs.get("halves", 1))


def _products(x: Array, y: Array) -> Array:
    """HSIC up to a factor of all pairs of two lists of kernels (set, half, item, item).

    Inner products of one half with the other half: within a half the same random directions stand on both sides, which
    adds (Σλ)² / dims to Σλ² and so lowers the CKA of everything but equal states.
    """
    a, b = (values.reshape(*values.shape[:2], -1) for values in (x, y))
    return (a[:, 0] @ b[:, -1].T + a[:, -1] @ b[:, 0].T) / 2


def _drifts(grams: Array) -> Array:
    """(2, step): 1 - CKA with the last, and with the one before, from the kernels (step, half, item, item)."""
    kernels = np.array([[_centred(gram, True) for gram in halves] for halves in grams])
    size = np.array([_products(kernel[None], kernel[None])[0, 0] for kernel in kernels])
    last = 1 - _ratio(_products(kernels, kernels[-1:])[:, 0], size, size[-1])
    pairs = zip(kernels[:-1], kernels[1:], strict=True)
    before = np.array([_products(kernel[None], after[None])[0, 0] for kernel, after in pairs])
    return np.array([last, np.append(np.nan, 1 - _ratio(before, size[1:], size[:-1]))])


def _orders(items: int, sequence: Any, permutations: int, seed: int) -> list[NDArray[np.int64]]:
    """Permutations of the items; of whole sequences where these are given."""
    generator = np.random.default_rng(seed)
    labels = np.arange(items) if sequence is None else np.asarray(sequence)
    names, count = np.unique(labels, return_counts=True)
    if len(set(count)) > 1:
        raise DataError(f"the permutation test needs as many items in each sequence, got {sorted(set(count))}")
    blocks = np.argsort(labels, kind="stable").reshape(len(names), -1)  # (sequence, item of it)
    orders = []
    for _ in range(permutations):
        order = np.empty(items, dtype=np.int64)
        order[blocks] = blocks[generator.permutation(len(names))]
        orders.append(order)
    return orders
