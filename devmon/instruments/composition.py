"""Composition: how much of what a head writes a head of a later layer reads, from the weights alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout
from devmon.anatomy.fit import exact_products
from devmon.anatomy.passes import Read
from devmon.cost import GPT2_SMALL, SWEEP, Cost, Shape, trials
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot, derive_seed

READS = ("K", "Q", "V")  # through which a later head can read an earlier one


@dataclass(frozen=True)
class Composition:
    """K-, Q- and V-composition of every pair of heads in different layers.

    With W_QK = W_Q W_Kᵀ and W_OV = W_V W_O (row vectors on the left), head a of an earlier and b of a later layer:
    K: ‖W_OV(a) W_QK(b)ᵀ‖ / (‖W_OV(a)‖ ‖W_QK(b)‖), what b's keys read of a's output; Q: ‖W_OV(a) W_QK(b)‖ / …, its
    queries; V: ‖W_OV(a) W_OV(b)‖ / …, its values; Frobenius norms, so in [0, 1] (Elhage et al. 2021, A Mathematical
    Framework for Transformer Circuits; the same as `all_composition_scores` of TransformerLens). The largest value two
    matrices of rank r with equal singular values can have is 1/√r: 1 is for rank one. All through products of size
    d_head, in float32 (float64 for weights in float64): to 1e-6 of 1.

    - `composition` (kind, layer, head, layer_from, head_from), 1: what (layer, head) reads of what
      (layer_from, head_from) wrote; NaN unless layer_from < layer, and where a matrix is zero. Null: `null`.
    - `rank` (kind, layer, head, layer_from, head_from), rank: 1 for the largest of its kind, ties get their mean.
    - `max` (kind), 1: the largest over the pairs, NaN without any. Null: `max_null`.
    - `median` (kind), 1: the median over the pairs, NaN without any. Null: `null`.
    - `null` (kind), 1: the mean for matrices with Gaussian factors of the same d and d_head, over about `draws`
      simulated pairs, fixed by `seed` (nothing but these sizes is the model's own).
    - `null_sd` (kind), 1: the standard deviation of these.
    - `max_null` (kind), 1: what the largest of as many such pairs comes to, null + null_sd · Φ⁻¹((n − .375) / (n +
      .25)) (Blom 1958).
    - `pair` (kind), 1: the composition of `pair` = ((layer_from, head_from), (layer, head)), say the previous-token
      head and the induction head, where it is given. Null: `null`.
    - `pair_rank` (kind), rank: its rank, where it is given.

    Whatever the singular values, independent random directions give √mean(composition²) = 1/√d: `null` is close to
    that. The excess is composition − null, and what matters is within a model: all values fall or rise together with
    the spectra of the heads. Exact functions of the weights: no standard errors. Pitfalls: gains of norms are *not*
    folded into the weights, nor are the norms that follow attention in some families; rotary positions and query-key
    norms between W_Q and W_Kᵀ are left out; heads of a group share W_K and W_V, so their pairs are not independent.
    Large values may come from a few directions that every head uses. Raises InstrumentError for fewer than two layers,
    streams that are normed after each addition, a `pair` that the model does not have; DataError for a pair of one
    layer or fewer than 4 draws.
    """

    pair: tuple[tuple[int, int], tuple[int, int]] | None = None
    draws: int = 1024
    seed: int = 0
    layout: Layout | None = None

    def __post_init__(self) -> None:
        if self.draws < 4:
            raise DataError(f"Composition needs draws >= 4, got {self.draws}")
        if self.pair is not None and not 0 <= self.pair[0][0] < self.pair[1][0]:
            raise DataError(
                "Composition needs pair = ((layer_from, head_from), (layer, head)) with layer_from before layer, "
                f"got {self.pair}"
            )

    def reads(self) -> list[Read]:
        return []  # weights alone

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        """A triangle of each factor of each head, and of each pair of layers the product of all their heads."""
        pairs = shape.layers * (shape.layers - 1) // 2
        d, wide = shape.d_model, shape.heads * shape.d_head
        triangles = shape.layers * 4 * 3 * d * wide * shape.d_head
        # most is held when the null is drawn: some 27 factors of its heads in float64
        held = 27 * 8 * math.ceil(math.sqrt(self.draws)) * d * shape.d_head
        return Cost(operations=triangles + pairs * 3 * wide**2 * (d + SWEEP), trials=trials(), held=held)

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        anatomy = Anatomy.of(snapshot, self.layout, type(self).__name__)
        self._refuse(anatomy)
        layers, heads = anatomy.layers, anatomy.heads
        values = np.full((3, layers, heads, layers, heads), np.nan)
        with torch.no_grad(), exact_products():
            weights = [_Heads.of(anatomy, layer) for layer in range(layers)]
            pairs = [(later, earlier) for later in range(1, layers) for earlier in range(later)]
            scores = torch.stack([_scores(weights[earlier], weights[later]) for later, earlier in pairs]).cpu().numpy()
        for (later, earlier), found in zip(pairs, scores, strict=True):
            values[:, later, :, earlier] = found
        measured = self._dataset(values, *_null(anatomy.d_model, anatomy.d_head, self.draws, self.seed))
        return measured.assign_attrs(anatomy.trust)

    def _refuse(self, anatomy: Anatomy) -> None:
        name = type(anatomy.model).__name__
        if anatomy.layout.post_norm:
            raise InstrumentError(
                f"Composition needs a residual stream that is summed up; that of {name} passes a norm after each "
                "addition: leave this instrument out"
            )
        if anatomy.layers < 2:
            raise InstrumentError(f"Composition needs heads in two layers; {name} has one: leave this instrument out")
        if self.pair is not None:
            largest = max(head for _, head in self.pair)
            if self.pair[1][0] >= anatomy.layers or not 0 <= largest < anatomy.heads:
                raise InstrumentError(
                    f"Composition: {name} has layers 0 to {anatomy.layers - 1} of heads 0 to {anatomy.heads - 1}, "
                    f"pair is {self.pair}"
                )

    def _dataset(self, values: np.ndarray, null: np.ndarray, null_sd: np.ndarray) -> xr.Dataset:
        layers, heads = values.shape[1:3]
        change = 0.02  # of the variables that are followed
        result = Rows(headline=["max"] if self.pair is None else ["pair", "max"])
        dims = ("kind", "layer", "head", "layer_from", "head_from")
        no_pair = "no earlier layer, or a matrix of the pair is zero"
        rank = np.stack([_rank(kind) for kind in values])
        result.put("composition", dims, values, None, "composition with an earlier head", units="1", nan=no_pair)
        result.put("rank", dims, rank, None, "rank of the pair, 1 is the largest", units="rank", nan=no_pair)

        # over all pairs, beside what the largest of as many independent draws comes to: with more pairs it is larger
        pairs = [kind[~np.isnan(kind)] for kind in values]
        largest = np.array([kind.max(initial=0) if len(kind) else np.nan for kind in pairs])
        median = np.array([np.median(kind) if len(kind) else np.nan for kind in pairs])
        max_null = null + null_sd * np.array([_largest(len(kind)) for kind in pairs])
        result.put("max", "kind", largest, None, "largest composition", units="1", smallest_change=change)
        for name, value, long_name in (
            ("median", median, "median composition"),
            ("null", null, "mean composition of Gaussian factors of the same shape"),
            ("null_sd", null_sd, "standard deviation of the composition of Gaussian factors"),
            ("max_null", max_null, "largest composition of as many pairs of Gaussian factors"),
        ):
            result.put(name, "kind", value, None, long_name, units="1")

        if self.pair is not None:
            (layer_from, head_from), (layer, head) = self.pair
            where = (slice(None), layer, head, layer_from, head_from)
            label = "composition of the pair"
            result.put("pair", "kind", values[where], None, label, units="1", smallest_change=change, nan=no_pair)
            result.put("pair_rank", "kind", rank[where], None, "rank of the pair", units="rank", nan=no_pair)
        by_layer, by_head = np.arange(layers), np.arange(heads)
        return result.dataset(
            kind=np.array(READS, dtype=object), layer=by_layer, head=by_head, layer_from=by_layer, head_from=by_head
        )


class _Heads:
    """Factors of the heads of one layer, each of Frobenius norm 1 or zero, with the norms of whole circuits: `wrote`
    (head, d_head, d) has those of W_OV, and `reads` (kind, head, d, d_head) those of what reads it."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
        q, k, v, o = (_over(factor, factor.abs().amax((1, 2))) for factor in (q, k, v, o))  # no square can be too small
        # ‖A B‖ = ‖R B‖ where A = Q R with orthonormal Q: a circuit (d, d) is as large as its factor through d_head, and
        # nothing is squared
        self.wrote = _unit(_root(v) @ o)
        pairs = ((k, q), (q, k), (v, o.mT))
        self.reads = torch.stack([_unit(left @ _root(right).mT) for left, right in pairs])
        self.wrote_nothing = (self.wrote == 0).flatten(1).all(1)
        self.read_nothing = (self.reads == 0).flatten(2).all(2)

    @classmethod
    def of(cls, anatomy: Anatomy, layer: int) -> _Heads:
        weights = (anatomy.W_Q(layer), anatomy.W_K(layer), anatomy.W_V(layer), anatomy.W_O(layer))
        double = weights[0].dtype == torch.float64
        return cls(*(weight.detach().to(torch.float64 if double else torch.float32) for weight in weights))


def _root(factor: Tensor) -> Tensor:
    """R (head, d_head, d_head) with RᵀR = AᵀA for A (head, d, d_head)."""
    return torch.linalg.qr(factor, mode="r").R


def _unit(factor: Tensor) -> Tensor:
    """Each (head, …) divided by its Frobenius norm; zeros stay."""
    return _over(factor, torch.linalg.matrix_norm(factor))


def _over(factor: Tensor, size: Tensor) -> Tensor:
    """Each (head, …) divided by its `size` (head,); zeros where that is zero or not finite."""
    size = size[:, None, None]
    return torch.where((size > 0) & size.isfinite(), factor / size, 0.0)


def _scores(earlier: _Heads, later: _Heads) -> Tensor:
    """‖wrote read‖ (kind, later head, earlier head), NaN where a circuit is zero."""
    heads, size, d = earlier.wrote.shape
    kinds, readers = later.reads.shape[:2]
    wrote, read = earlier.wrote.reshape(-1, d), later.reads.permute(2, 0, 1, 3).reshape(d, -1)
    product = (wrote @ read).view(heads, size, kinds, readers, -1)
    scores = torch.linalg.vector_norm(product, dim=(1, 4)).permute(1, 2, 0)
    return scores.masked_fill(earlier.wrote_nothing | later.read_nothing[..., None], torch.nan)


@lru_cache(maxsize=16)
def _null(d: int, d_head: int, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, each (kind,), over pairs of n earlier and n later Gaussian heads, n² >= draws."""
    heads = math.ceil(math.sqrt(draws))
    drawn = torch.Generator().manual_seed(derive_seed(seed, "Composition", d, d_head))

    def gaussian() -> Tensor:
        return torch.randn(heads, d, d_head, generator=drawn, dtype=torch.float64)

    earlier, later = (_Heads(gaussian(), gaussian(), gaussian(), gaussian().mT) for _ in range(2))
    scores = _scores(earlier, later).flatten(1)
    return scores.mean(1).numpy(), scores.std(1).numpy()


def _largest(count: int) -> float:
    """Where the largest of `count` standard normal numbers lies."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0 if count else math.nan


def _rank(values: np.ndarray) -> np.ndarray:
    """1 for the largest, equal values share the mean of their ranks, NaN stays."""
    there = ~np.isnan(values)
    rank = np.full(values.shape, np.nan)
    _, inverse, count = np.unique(-values[there], return_inverse=True, return_counts=True)
    rank[there] = (count.cumsum() - (count - 1) / 2)[inverse]
    return rank
