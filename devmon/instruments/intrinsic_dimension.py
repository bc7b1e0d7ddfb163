"""Intrinsic dimension of the residual stream: how many directions its states fill, locally and as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from devmon.anatomy.passes import TOGETHER, Read, Seen, read
from devmon.cost import GPT2_SMALL, SWEEP, Cost, Shape, eigenvalues, trials
from devmon.data import ByContent, clustered_groups, places_of, probe_inputs
from devmon.data.probe import REPLICATES
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.snapshot import Snapshot, derive_seed

Array = NDArray[np.float64]

MIN_STATES = 20  # distinct states, below which no dimension is given: a cloud of n fills n - 1 directions at most
SAME = 8.0  # roundings of the stream's own dtype: states that near are a single state; smaller, and twonn sees rounding
FAR = 10.0  # median distances from the median state: states beyond it carry massive activations
BLUR = 1e-7  # of the size of the cloud, below which distances are rounding themselves
GROUPS = 10  # of the jackknife
LABELS = {
    "twonn": "dimension from the two nearest neighbours",
    "participation_ratio": "participation ratio of the covariance",
    "effective_rank": "effective rank (exp entropy of singular values)",
}


@dataclass(frozen=True, eq=False)
class IntrinsicDimension(ByContent):
    """Three dimensions of the cloud of residual-stream states at fixed places of `tokens` (batch, pos) int64.

    The items are the states at `positions` (None: all but the first, where language models keep activations that are
    a thousand times as large as others and say nothing of the text: Sun et al. 2024, 2402.17762) of every sequence, at
    most `limit` of them, drawn by `seed`; of inputs (batch, …) of floats, such as images, an item is the mean state
    over the places of one. Per layer (0 the input of the first block, l the output of block l; `blocks` is their path
    where it is not found):

    - `twonn` (layer), dimensions: how the number of neighbours grows with distance, from the two nearest only (Facco et
      al. 2017, doi:10.1038/s41598-017-11873-y): μ = r₂/r₁ of every item has P(μ > x) = x^-d where the density hardly
      changes within r₂. The largest `trim` of the μ are left out, d is the slope of -log(1 - i/n) on log μ₍ᵢ₎ through
      the origin. It follows curved sheets, which the other two do not. Null: `twonn_reference`.
    - `twonn_se` (layer), dimensions: its jackknife standard error over 10 groups of sequences, nearest neighbours found
      once: a fifth too small even with independent items, which share neighbours (measured on Gaussian clouds of 2 to 5
      dimensions, n = 300).
    - `participation_ratio` (layer), dimensions: (Σλ)² / Σλ² of the covariance's eigenvalues λ, the number of equally
      large directions that would spread the variance as evenly. Null: `participation_ratio_reference`.
    - `participation_ratio_se` (layer), dimensions: its jackknife standard error over groups of sequences.
    - `effective_rank` (layer), dimensions: exp of the entropy of σ / Σσ, σ = √λ the singular values (Roy & Vetterli
      2007, EUSIPCO), which counts small directions more; 1, as the participation ratio, for states along a line. Null:
      `effective_rank_reference`.
    - `effective_rank_se` (layer), dimensions: its jackknife standard error over groups of sequences.
    - `twonn_reference` (layer), dimensions: twonn of Gaussian items of the same number and the same eigenvalues λ:
      below it, the cloud is curved or clustered.
    - `participation_ratio_reference`, dimensions: of Gaussian items equally large in every direction of the stream
      (of the widest stage), that is the most that can be measured at this n.
    - `effective_rank_reference`, dimensions: the same for the effective rank.
    - `massive` (layer), 1: the number of states left out, for lying ten times as far from the median state as the
      median of all (massive activations sit on a few places beside the first). Null: 0.
    - `distinct` (layer), 1: the number of different states of the rest; without positional embeddings layer 0 has a
      single state for a token type. Equal states count once, in all three. Below 20 distinct states all are NaN: n
      items fill at most n - 1 directions.

    All three depend on n, and twonn falls far below a high true dimension, so compare at the same n, with the
    references. A single huge direction (a rogue dimension) takes the participation ratio to 1 and says
    little of the rest. Cost: one forward pass of `tokens`; eigenvalues of size min(n, d) eleven times and n² distances
    a layer. Raises InstrumentError for a model whose blocks are not found, DataError for settings that name no items.
    """

    tokens: Tensor
    positions: tuple[int, ...] | None = None
    limit: int = 1000
    trim: float = 0.1
    blocks: str | None = None
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        tokens = probe_inputs(self.tokens, "IntrinsicDimension")
        object.__setattr__(self, "tokens", tokens)
        if self.positions is not None:
            object.__setattr__(self, "positions", tuple(int(place) for place in self.positions))
            if not self.positions or not all(-places_of(tokens) <= p < places_of(tokens) for p in self.positions):
                raise DataError(
                    f"IntrinsicDimension: positions must be in the {places_of(tokens)} of the tokens, got "
                    f"{self.positions}"
                )
        if not (0 <= self.trim < 0.5 and self.limit >= MIN_STATES):
            raise DataError(
                f"IntrinsicDimension needs 0 <= trim < 0.5 and limit >= {MIN_STATES}, got {self.trim}, {self.limit}"
            )
        if len(tokens) < GROUPS or len(self._items()) < MIN_STATES:
            raise DataError(
                f"IntrinsicDimension needs {GROUPS} sequences and {MIN_STATES} items, got {len(tokens)} and "
                f"{len(self._items())}: give more tokens"
            )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        who = type(self).__name__
        items = self._items()
        [parts] = read(snapshot, self)
        layers = [torch.cat(states) for states in zip(*parts, strict=True)]
        group = items[:, 0].numpy() % GROUPS
        generator = np.random.default_rng(derive_seed(self.seed, who, "reference"))
        noise = generator.normal(size=(len(items), max(state.shape[1] for state in layers)))
        rows_of = [_layer(s.double().numpy(), torch.finfo(s.dtype).eps, group, self.trim, noise) for s in layers]
        flat = _linear(_eigenvalues(noise))
        columns = {name: np.array([row[name] for row in rows_of]) for name in rows_of[0]}
        result = Rows(list(LABELS), "jackknife standard error over groups of sequences", items=len(items))
        units, few = "dimensions", f"fewer than {MIN_STATES} distinct states"
        for name, label in LABELS.items():
            about: dict[str, Any] = {"smallest_change": 0.5, "nan": few, "replicates": columns[f"{name}_groups"].T}
            result.put(name, "layer", columns[name], columns[f"{name}_se"], label, units=units, **about)
        label = "twonn of Gaussian items, same spectrum"
        result.put("twonn_reference", "layer", columns["twonn_reference"], None, label, units=units)
        for name, value in zip(("participation_ratio", "effective_rank"), flat, strict=True):
            label = f"{name} of isotropic Gaussian items"
            result.put(f"{name}_reference", (), value, None, label, units=units)
        label = "number of states left out as massive"
        result.put("massive", "layer", columns["massive"], None, label, units="1", later=True)
        result.put("distinct", "layer", columns["distinct"], None, "number of distinct states", units="1")
        return result.dataset(layer=np.arange(len(layers)))

    def reads(self) -> list[Read]:
        batch = min(self.batch_size, TOGETHER)
        return [Read(self, self.tokens, self._states, batch, stream=True, blocks=self.blocks)]

    def _states(self, seen: Seen) -> list[Tensor]:
        """The states of the items of a minibatch at each layer, (item, d) on the CPU."""
        sequence, place = self._items().T
        here = (sequence >= seen.rows.start) & (sequence < seen.rows.stop)
        return [state[sequence[here] - seen.rows.start, place[here]].cpu() for state in seen.stream]

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        items, d = len(self._items()), shape.d_model
        sequences, positions = len(self.tokens), places_of(self.tokens)
        # distances of all pairs, twice, in float64, a dozen sweeps over them, and some over the states
        pairs = 2 * items**2 * d + 12 * SWEEP * items**2 + 20 * SWEEP * items * d
        # of all states and of those without each group: their products, once where they are more than d, eigenvalues
        spectra = (GROUPS + 1) * eigenvalues(min(d, items))
        spectra += 2 * items * d * (2 * d if items >= d else (GROUPS + 1) * items)
        work, before = (shape.layers + 1) * (pairs + spectra), trials(positions, 2)
        states = 4 * items * d * (shape.layers + 1)
        return Cost(sequences, positions=positions, unembedded=sequences, operations=work, trials=before, held=states)

    def _items(self) -> Tensor:
        """(item, 2): sequence and position, in order."""
        length = places_of(self.tokens)
        text = slice(1, None) if length > 1 else slice(None)
        places = torch.arange(length)[text if self.positions is None else list(self.positions)]
        pairs = torch.cartesian_prod(torch.arange(len(self.tokens)), places).reshape(-1, 2)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "IntrinsicDimension", "items"))
        return pairs[torch.randperm(len(pairs), generator=generator)[: self.limit].sort().values]


def _layer(states: Array, eps: float, group: NDArray[np.int64], trim: float, noise: Array) -> dict[str, Any]:
    """The numbers of one layer from its states (item, d), exact up to `eps` of their norm."""
    # massive activations: their few states would be nearly all of the variance
    away = np.sqrt(((states - np.median(states, 0)) ** 2).sum(1))
    usual = (away <= FAR * np.median(away)) | (np.median(away) == 0)
    states, group = states[usual], group[usual]
    rounding = SAME * eps * np.sqrt((states**2).sum(1).mean())
    states = states - states.mean(0)
    distances = _distances(states)
    # a state that equals an earlier state, up to rounding, would have a nearest neighbour at distance 0
    keep = ~np.tril(distances <= rounding + BLUR * np.sqrt((states**2).sum(1).mean()), -1).any(1)
    names = ("twonn", "participation_ratio", "effective_rank")
    values: dict[str, Any] = {"massive": float((~usual).sum()), "distinct": float(keep.sum())}
    values |= {f"{name}{end}": np.nan for name in names for end in ("", "_se")}
    values |= {f"{name}_groups": np.full(REPLICATES, np.nan) for name in names}
    if keep.sum() < MIN_STATES:
        return values | {"twonn_reference": np.nan}
    states, group = states[keep], group[keep]

    # neighbours are those of the whole cloud, the jackknife leaves out items, not neighbours
    ratio = _ratios(distances if keep.all() else distances[np.ix_(keep, keep)])
    eigenvalues = _eigenvalues(states)
    whole = np.array([_twonn(ratio, trim), *_linear(eigenvalues)])
    present = np.unique(group)
    left_out = [group != left for left in present]
    spectra = _eigenvalues_of(states, left_out)
    each = np.array(
        [[_twonn(ratio[rest], trim), *_linear(spectrum)] for rest, spectrum in zip(left_out, spectra, strict=True)]
    )
    se = np.sqrt((len(each) - 1) * each.var(0))
    # by groups of sequences: the jackknife's pseudo-values about the value; the same group at every step
    total, count = np.zeros((GROUPS, len(names))), np.zeros(GROUPS)
    total[present], count[present] = whole + (len(each) - 1) * (each.mean(0) - each), 1.0
    groups = clustered_groups(total, count)
    for i, name in enumerate(names):
        values |= {name: float(whole[i]), f"{name}_se": float(se[i]), f"{name}_groups": groups[:, i]}

    # what twonn would say of a Gaussian cloud with the same number of items and the same spectrum
    twin = noise[: len(states), : len(eigenvalues)] * np.sqrt(eigenvalues)
    return values | {"twonn_reference": _twonn(_ratios(_distances(twin)), trim)}


def _distances(states: Array) -> Array:
    """Distances of all pairs, (item, item), infinite on the diagonal."""
    # every sweep over all pairs takes as long as their products: none makes another array
    square = (states**2).sum(1)
    products = states @ states.T
    products *= -2
    products += square
    products += square[:, None]
    distances = np.sqrt(np.maximum(products, 0, out=products), out=products)
    np.fill_diagonal(distances, np.inf)
    return distances


def _ratios(distances: Array) -> Array:
    """Distance of the second neighbour over that of the first; `distances` are those of no one else afterwards."""
    item, nearest = np.arange(len(distances)), distances.argmin(1)
    first = distances[item, nearest]
    distances[item, nearest] = np.inf
    return np.asarray(distances.min(1) / first)


def _twonn(ratio: Array, trim: float) -> float:
    """The slope through the origin of -log(1 - i/n) on the i-th smallest log ratio, the largest `trim` left out."""
    log = np.sort(np.log(ratio))[: int(np.ceil(len(ratio) * (1 - trim)))]
    log = log[: len(ratio) - 1]  # 1 - i/n is 0 for the last
    height = -np.log1p(-np.arange(1, len(log) + 1) / len(ratio))
    return float(log @ height / (log @ log)) if log @ log > 0 else float("nan")


def _eigenvalues(states: Array) -> Array:
    """Eigenvalues of the covariance, min(n, d) of them, none negative."""
    centred = states - states.mean(0)
    gram = centred.T @ centred if centred.shape[1] <= len(centred) else centred @ centred.T
    return np.maximum(np.linalg.eigvalsh(gram / len(centred)), 0)


def _eigenvalues_of(states: Array, kept: list[NDArray[np.bool_]]) -> list[Array]:
    """`_eigenvalues` of several subsets of centred states, each of nearly all of them."""
    if states.shape[1] > len(states):
        return [_eigenvalues(states[rest]) for rest in kept]
    # what is left out is taken off the whole: its products are few
    gram, found = states.T @ states, []
    for rest in kept:
        gone, mean = states[~rest], states[rest].mean(0)
        left = (gram - gone.T @ gone) / rest.sum() - np.outer(mean, mean)
        found.append(np.maximum(np.linalg.eigvalsh(left), 0))
    return found


def _linear(eigenvalues: Array) -> tuple[float, float]:
    """Participation ratio and effective rank."""
    singular = np.sqrt(eigenvalues)
    share = singular[singular > 0] / singular.sum()
    return float(eigenvalues.sum() ** 2 / (eigenvalues**2).sum()), float(np.exp(-(share * np.log(share)).sum()))
