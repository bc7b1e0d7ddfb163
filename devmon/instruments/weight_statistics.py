"""Weight statistics: norms, spectra and sparsity of every weight matrix, the inputs of hidden-Markov training maps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.anatomy.circuits import gram
from devmon.anatomy.passes import Read
from devmon.cost import GPT2_SMALL, OVERHEAD, SWEEP, Cost, Shape, eigenvalues
from devmon.data.rows import Rows
from devmon.errors import InstrumentError
from devmon.snapshot import Snapshot

MATRIX = {
    "l1": ("sum of absolute weights", "weight"),
    "l2": ("root of the sum of squared weights", "weight"),
    "code_sparsity": ("l1 / l2", "1"),
    "spectral": ("largest singular value", "weight"),
    "sv_mean": ("mean singular value", "weight"),
    "sv_variance": ("variance of the singular values", "squared weight"),
    "trace": ("sum of the diagonal", "weight"),
    "computational_sparsity": ("trace / largest singular value", "1"),
}
SQUARE = ("trace", "computational_sparsity")
MEANS = {
    "mean_spectral": ("spectral", "largest singular value", "weight"),
    "mean_sv": ("sv_mean", "mean singular value", "weight"),
    "mean_sv_variance": ("sv_variance", "variance of the singular values", "squared weight"),
}

# Of singular values from a product in float32. The norm of its error over 2⁻²⁴ √(largest · mean eigenvalue) was at most
# 10 (Gaussian, orthogonal, low rank, power laws); larger sends more matrices to float64.
ROUNDING = 16 * 2**-24
UNRESOLVED = 1e-4  # share of their sum that may lie where the product cannot tell them from zero
SAFE_PEAKS = 1e-12, 1e12  # largest entries whose squares neither vanish nor overflow in float32
PART = 2**18  # entries that are summed at once in float64: 2 MiB, which stays in a cache; moves time alone
SAMPLE = 2**16  # entries that bracket the median: moves time alone


@dataclass(frozen=True)
class WeightStatistics:
    """What the weights look like without any data: Hu et al. 2023 (2308.09543), whose hidden Markov models read this.

    A matrix is a parameter of two dimensions, or the kernels of a convolution, flattened to (first, all others). One of
    more dimensions, such as the experts of a mixture (expert, out, in) or the heads of a layer, is a stack of matrices,
    "experts.up[0]", "experts.up[1]", …; leading dimensions of one have no index. A weight that a parametrization or
    `weight_norm` makes of other parameters is read as it is used, under its own name, in their place. A parameter that
    is used twice (tied embeddings) counts once, under its first name. The dimension `parameter` are the names of the
    matrices; `kind` is weight (all matrices) or vector (biases and gains of norms). Singular values are the min(rows,
    columns) of a matrix. A reference is the value of a Gaussian matrix of the same shape and l2. All are exact
    functions of the weights: there is no standard error. Sums are in float64; singular values by way of products in
    float32, `spectral` to 1e-6 of itself and `sv_mean` to 1e-4 (mostly 1e-6; low rank, where that cannot be known, goes
    through float64, as weights in float64 do). All numbers of a matrix with entries that are not finite are NaN.

    - `l1` (parameter), weight: Σ|w|.
    - `l2` (parameter), weight: (Σw²)^½.
    - `code_sparsity` (parameter), 1: l1 / l2, from 1 (one weight carries all) to √size (all are equally large), so
      *small* is sparse. Null: `code_sparsity_reference`.
    - `code_sparsity_reference` (parameter), 1: √(2 size / π).
    - `spectral` (parameter), weight: largest singular value. Null: `spectral_reference`.
    - `spectral_reference` (parameter), weight: l2 (√rows + √columns) / √size, the edge of the Marchenko-Pastur law,
      reached from below.
    - `sv_mean` (parameter), weight: mean singular value.
    - `sv_variance` (parameter), squared weight: population variance of the singular values.
    - `trace` (parameter), weight: of square matrices, NaN for others.
    - `computational_sparsity` (parameter), 1: trace / spectral of square matrices, NaN for others.
    - `mean` (kind), weight: mean of all entries together, NaN where the model has none of the kind.
    - `variance` (kind), squared weight: their population variance.
    - `median` (kind), weight: their median.
    - `model_l1`, weight: l1 of all parameters as one vector.
    - `model_l2`, weight: l2 of all parameters as one vector.
    - `model_code_sparsity`, 1: model_l1 / model_l2.
    - `density`, 1: model_l1 / (model_l2 √size), in (0, 1]. Null: `density_reference`.
    - `density_reference`, 1: √(2/π) = 0.798, of Gaussian parameters.
    - `mean_spectral`, weight: spectral, plain average over the matrices.
    - `mean_sv`, weight: sv_mean, plain average over the matrices.
    - `mean_sv_variance`, squared weight: sv_variance, plain average over the matrices.

    Pitfalls: singular values below 1e-8 of the largest are rounding. Norms depend on the units of the parametrisation:
    weight decay, or a scale that a later norm undoes, moves them with no change of function (`density` is free of it).
    The authors average over the matrices of a kind and divide the variance by n - 1. Adapters (LoRA) are matrices of
    their own, beside the frozen one. Cost: no forward pass, one product and eigenvalues of size min(rows, columns) a
    matrix. Raises InstrumentError for a model without matrices, and for weights that are packed whole numbers
    (quantised).

    >>> import torch
    >>> from devmon.snapshot import Snapshot
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
    >>> measured = WeightStatistics()(Snapshot(0, model))
    >>> [measured[name].item() for name in ("l1", "l2", "code_sparsity", "spectral", "sv_mean", "sv_variance", "trace")]
    [7.0, 5.0, 1.4, 4.0, 3.5, 0.25, -1.0]
    """

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        named = _weights(snapshot.model)
        matrices = dict(pair for name, p, kernel in named if p.ndim >= 2 for pair in _matrices(name, p, kernel))
        if not matrices:
            raise InstrumentError(
                f"WeightStatistics needs parameters of two or more dimensions; {type(snapshot.model).__name__} has "
                "none: leave it out for this model"
            )
        rows = Rows(headline=["density", "model_l2", "mean_spectral"])
        # sums over a parameter serve the matrix that it is, and all of them together
        moments = [_moments(p) for _, p, _ in named]
        known = {_place(p): sums for (_, p, _), sums in zip(named, moments, strict=True)}
        of_matrix = [_matrix(p.reshape(len(p), -1), known.get(_place(p))) for p in matrices.values()]
        values = {name: np.array([row[name] for row in of_matrix]) for name in MATRIX}
        for name, (label, units) in MATRIX.items():
            nothing = "defined for square matrices only" if name in SQUARE else None
            rows.put(name, "parameter", values[name], None, label, units=units, nan=nothing)

        # Gaussian matrices of the same shape and l2
        size = np.array([p.numel() for p in matrices.values()])
        sides = np.array([math.sqrt(p.shape[0]) + math.sqrt(p.numel() / p.shape[0]) for p in matrices.values()])
        gaussian = {"code_sparsity": np.sqrt(2 * size / np.pi), "spectral": values["l2"] * sides / np.sqrt(size)}
        for name, reference in gaussian.items():
            label = f"{name} of a Gaussian matrix of this shape and l2"
            rows.put(f"{name}_reference", "parameter", reference, None, label, units=MATRIX[name][1])

        for name, (source, label, units) in MEANS.items():
            rows.put(name, (), float(np.mean(values[source])), None, f"{label}, mean over matrices", units=units)
        _put_whole(rows, [p for _, p, _ in named], moments)
        kinds = np.array(["weight", "vector"], dtype=object)
        return rows.dataset(parameter=np.array(list(matrices), dtype=object), kind=kinds)

    def reads(self) -> list[Read]:
        return []  # weights alone

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        """No passes: a Gram matrix of each matrix, and its eigenvalues."""
        d, numbers = shape.d_model, shape.weights + shape.readout * (1 if shape.tied else 2)
        # of each matrix a Gram matrix of its smaller side, five eighths of a product, and its eigenvalues
        products = numbers * d * 5 // 8
        # sums over all entries in float64: absolute values, squares, distances from the mean, the median
        sweeps = 5 * SWEEP * numbers
        work = OVERHEAD + products + sweeps + (4 * shape.layers + 2) * eigenvalues(d)
        # marks of the entries of the largest matrix, for its median; two Gram matrices; a part in float64
        held = 3 * max(shape.readout, 4 * d**2) + 16 * d**2 + 8 * PART
        return Cost(operations=work, held=held)


def _weights(model: nn.Module) -> list[tuple[str, Tensor, bool]]:
    """The weights as they are used, each with its name and whether it is the kernels of a convolution, each once."""
    found: list[tuple[str, Tensor, bool]] = []
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        if (at := f".{name}".find(".parametrizations.")) >= 0:
            # The tensor that a parametrization makes stands for the parameters that it makes it of.
            path, last = name[: max(at - 1, 0)], name[at:].split(".")[1]
            owner, name = model.get_submodule(path), ".".join(part for part in (path, last) if part)
            used = getattr(owner, last)
        elif (hook := _norm_of(owner, last)) is not None:
            hook(owner, ())
            name, used = name.removesuffix("_g").removesuffix("_v"), getattr(owner, hook.name)
        else:
            used = parameter
        if used.numel() and name not in {each for each, _, _ in found}:
            kernel = isinstance(owner, nn.modules.conv._ConvNd) or used.ndim > 3
            found.append((name.replace("_orig_mod.", ""), used.detach(), kernel))
    packed = [name for name, used, _ in found if not used.is_floating_point()]
    if packed:
        raise InstrumentError(
            f"WeightStatistics needs weights that are numbers; {', '.join(packed[:2])} of {type(model).__name__} are "
            "packed (quantised): measure the model before it is quantised, or leave this instrument out"
        )
    return found


def _norm_of(owner: nn.Module, name: str) -> Any:
    """The hook of `torch.nn.utils.weight_norm` that makes a weight of the parameter `name`."""
    hooks: list[Any] = [
        h for h in owner._forward_pre_hooks.values() if type(h).__module__ == "torch.nn.utils.weight_norm"
    ]
    return next((h for h in hooks if name in (f"{h.name}_g", f"{h.name}_v")), None)


def _matrices(name: str, weight: Tensor, kernel: bool) -> list[tuple[str, Tensor]]:
    """The matrices of a weight, with their names: one, or as many as its leading dimensions say."""
    if weight.ndim == 2 or kernel:
        return [(name, weight)]
    stack = weight.reshape(-1, *weight.shape[-2:])
    return [(name, stack[0])] if len(stack) == 1 else [(f"{name}[{i}]", each) for i, each in enumerate(stack)]


def _place(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight.numel(), weight.is_contiguous()


def _matrix(weight: Tensor, moments: np.ndarray | None = None) -> dict[str, float]:
    """The statistics of a matrix (rows, columns), from its `_moments` where they are known."""
    if not math.isfinite(peak := _peak(weight)):
        return dict.fromkeys(MATRIX, math.nan)
    *_, l1, squares = map(float, _moments(weight) if moments is None else moments)
    l2, singular = math.sqrt(squares), _singular_values(weight, peak)
    spectral, square = float(singular[-1]), weight.shape[0] == weight.shape[1]
    trace = float(weight.diagonal().double().sum()) if square else math.nan
    return {
        "l1": l1,
        "l2": l2,
        "code_sparsity": l1 / l2 if l2 else math.nan,
        "spectral": spectral,
        "sv_mean": float(singular.mean()),
        "sv_variance": float(singular.var()),
        "trace": trace,
        "computational_sparsity": trace / spectral if spectral else math.nan,
    }


def _singular_values(weight: Tensor, peak: float) -> np.ndarray:
    """All of them, the largest last; `peak` is the largest absolute entry."""
    tall = weight if weight.shape[0] > weight.shape[1] else weight.T
    if weight.dtype != torch.float64 and SAFE_PEAKS[0] < peak < SAFE_PEAKS[1]:
        squares = torch.linalg.eigvalsh(gram(tall, torch.float32)).clamp(min=0).cpu().numpy()
        # A product in float32 cannot tell small singular values from zero. Where these could add to the sum of all (low
        # rank, a few large ones) it is made in float64, which tells them down to 1e-8 of the largest.
        floor, singular = ROUNDING * math.sqrt(squares[-1] * squares.mean()), np.sqrt(squares)
        if (squares < 4 * floor).sum() * math.sqrt(floor) <= UNRESOLVED * singular.sum():
            return singular
    return torch.linalg.eigvalsh(gram(tall)).clamp(min=0).sqrt().cpu().numpy()


def _peak(values: Tensor) -> float:
    """The largest absolute entry, which is not finite if one is not."""
    return float(torch.stack(values.aminmax()).abs().amax())


def _moments(values: Tensor) -> np.ndarray:
    """Of entries in float64: their number, mean, the sum of squared distances from it, of absolute values, of squares.

    A part at a time, which stays in the cache."""
    parts, sizes = [], []
    for part in values.reshape(-1).split(PART):
        wide = part.double()
        mean = wide.mean()
        sums = mean, (wide - mean).square().sum(), wide.abs().sum(), wide.square().sum()
        parts.append(torch.stack(sums))
        sizes.append(len(part))
    return _joined(np.c_[sizes, torch.stack(parts).cpu().numpy()])


def _joined(parts: np.ndarray) -> np.ndarray:
    """The moments (5,) of all entries from those of parts, (part, 5): Chan, Golub and LeVeque 1979."""
    size, mean, spread, l1, squares = parts.T
    with np.errstate(invalid="ignore", over="ignore"):
        whole = size @ mean / size.sum()
        away = size @ (mean - whole) ** 2
        return np.array([size.sum(), whole, spread.sum() + away, l1.sum(), squares.sum()])


def _put_whole(rows: Rows, parameters: list[Tensor], moments: list[np.ndarray]) -> None:
    """The statistics of all parameters as one vector, and of the entries of matrices and of vectors."""
    size, _, _, l1, squares = map(float, _joined(np.array(moments)))
    l2, finite = math.sqrt(squares), math.isfinite(l1) and math.isfinite(squares)
    whole = {
        "model_l1": (l1, "sum of absolute parameters", "weight"),
        "model_l2": (l2, "root of the sum of squared parameters", "weight"),
        "model_code_sparsity": (l1 / l2 if l2 else math.nan, "l1 / l2 of all parameters", "1"),
        "density": (l1 / l2 / math.sqrt(size) if l2 else math.nan, "l1 / (l2 √size) of all parameters", "1"),
        "density_reference": (math.sqrt(2 / math.pi), "density of Gaussian parameters", "1"),
    }
    for name, (value, label, units) in whole.items():
        change = 0.01 if name == "density" else None
        rows.put(name, (), value if finite else math.nan, None, label, units=units, smallest_change=change)

    # the entries of matrices, and of vectors
    entries = []
    for matrices in (True, False):
        kind = [i for i, p in enumerate(parameters) if (p.ndim >= 2) == matrices]
        size, mean, spread, *_ = _joined(np.array([moments[i] for i in kind])) if kind else np.full(5, np.nan)
        there = math.isfinite(spread)
        entries.append([mean, spread / size, _median([parameters[i] for i in kind])] if there else [math.nan] * 3)
    nothing = "the model has no parameter of this kind"
    kinds = zip(
        ("mean", "variance", "median"), np.transpose(entries), ("weight", "squared weight", "weight"), strict=True
    )
    for name, values, units in kinds:
        rows.put(name, "kind", values, None, f"{name} of the entries", units=units, nan=nothing)


def _median(parameters: list[Tensor]) -> float:
    """The lower median of all entries, selected among the few between two values that a sample says lie around it."""
    count = sum(p.numel() for p in parameters)
    sample = torch.cat([p.reshape(-1)[:: max(1, count // SAMPLE)] for p in parameters]).sort().values
    margin = 4 * math.ceil(math.sqrt(len(sample)))
    middle = (len(sample) - 1) // 2
    low, high = sample[max(middle - margin, 0)], sample[min(middle + margin, len(sample) - 1)]
    below = sum(int((p < low).sum()) for p in parameters)
    between = torch.cat([p[(p >= low) & (p <= high)] for p in parameters])
    rank = (count - 1) // 2 - below
    if not 0 <= rank < len(between):
        rank, between = (count - 1) // 2, torch.cat([p.reshape(-1) for p in parameters])
    return float(between.kthvalue(rank + 1).values)
