"""Spectra of heads: what tokens a head copies and matches, read off its weights between embedding and unembedding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout
from devmon.anatomy.circuits import (
    ROUNDING_SHARE,
    Factors,
    Grams,
    eigenvalue_sum,
    over,
    through,
    token_tables,
    trace,
)
from devmon.anatomy.fit import exact_products
from devmon.anatomy.passes import Read
from devmon.cost import DRAWN, GPT2_SMALL, SWEEP, Cost, Shape, eigenvalues, general_eigenvalues, trials
from devmon.data import clustered_mean, minibatches
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.snapshot import Snapshot, derive_seed

RIVALS = 2048  # tokens that a token's own entry must beat before it is compared with all: time, not numbers
SCORES = ("copying", "copying_singular", "matching", "matching_singular")
LABELS = {  # long name, units, smallest change, NaN where
    "copying": ("Re Σλ / Σ|λ| of the OV circuit", "1", 0.1, "the circuit is zero, or has no eigenvalues but zeros"),
    "copying_singular": ("Re Σλ / Σs of the OV circuit", "1", None, "the circuit is zero"),
    "matching": ("Re Σλ / Σ|λ| of the QK circuit", "1", 0.1, "the circuit is zero, or has no eigenvalues but zeros"),
    "matching_singular": ("Re Σλ / Σs of the QK circuit", "1", None, "the circuit is zero"),
    "ov_rank": ("effective rank of W_V W_O", "dimensions", None, "the circuit is zero"),
    "qk_rank": ("effective rank of W_Q W_Kᵀ", "dimensions", None, "the circuit is zero"),
    "copy_rate": ("share of tokens that the OV circuit copies first", "share", None, "the circuit is zero"),
    "copy_rate_se": ("standard error over tokens", "share", None, "the circuit is zero"),
    "copy_z": ("a token's own entry in its row of the OV circuit", "standard deviations", 0.5, "the circuit is zero"),
    "copy_z_se": ("standard error over tokens", "standard deviations", None, "the circuit is zero"),
    "positional_share": ("share of attention-score variance that places make", "share", None, "the circuit is zero"),
}


@dataclass(frozen=True)
class HeadSpectra:
    """Eigenvalues and singular values of the OV and QK circuits of every head: which tokens it copies and matches.

    OV = W_E W_V W_O W_U and QK = W_E W_Q W_Kᵀ W_Eᵀ, both (vocab, vocab) of rank d_head, with eigenvalues λ and singular
    values s (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits: "copying" from the eigenvalues of
    the full OV circuit). XY and YX have the same eigenvalues but for zeros, so all is computed at size d_head.

    - `copying` (layer, head), 1: Re Σλ / Σ|λ| of OV, in [−1, 1]: 1 where attending to any combination of tokens raises
      that same combination, −1 where it lowers it, about 0 for a random head. Null: `null`.
    - `copying_singular` (layer, head), 1: Re Σλ / Σs of OV, whose absolute value is never larger, 1 for a symmetric
      positive OV alone: the circuits are not normal, eigenvalues may say little of what they do to a vector. Null:
      `null`.
    - `matching` (layer, head), 1: Re Σλ / Σ|λ| of QK, 1 where a token attends to itself. Null: `null`.
    - `matching_singular` (layer, head), 1: Re Σλ / Σs of QK. Null: `null`.
    - `ov_rank` (layer, head), dimensions: (Σs)² / Σs² of W_V W_O, an effective rank from 1 to d_head.
    - `qk_rank` (layer, head), dimensions: the same of W_Q W_Kᵀ.
    - `copy_rate` (layer, head), share: of tokens t whose row t of OV is largest at t itself, over `sample` tokens drawn
      by `seed` (all of a smaller vocabulary); rows of zeros count as 0. Null: `copy_chance`.
    - `copy_rate_se` (layer, head), share: its standard error over tokens.
    - `copy_z` (layer, head), standard deviations: its continuous twin: the entry at t in standard deviations of its row
      above the row's mean, mean over tokens; rows of zeros count as 0. Null: 0.
    - `copy_z_se` (layer, head), standard deviations: its standard error over tokens.
    - `positional_share` (layer, head), share: P / (P + T), the share of the variance of attention scores over keys that
      their place makes, in models that add learned positions to their embeddings: 1 for a head that looks at places, 0
      for a head that looks at tokens. With a query q = (e + p) W_Q of a random token at a random place, P = E_q Var_j[q
      · p_j W_K] over places j < `length` and T = E_q Var_t[q · e_t W_K] over the sampled tokens. NaN for rotary and
      other positions, with the reason.
    - `null` (score), 1: the mean of the first four scores for 64 Gaussian heads of the same shape between this model's
      embedding and unembedding.
    - `null_sd` (score), 1: the standard deviation of these.
    - `copy_chance`, share: 1 / vocab.

    NaN where a circuit is zero, or Σ|λ| < 1e-6 Σs (eigenvalues that are zeros but for rounding).
    Pitfalls: weights as they are, with no gain of any norm, no bias, no rotation; a mean embedding shared by all tokens
    weighs as much as anything; for later layers the embedding is only part of what a head reads. What is exact has no
    standard error. Raises InstrumentError for a stream that is normed after each addition, an unembedding that does not
    read the stream or embeddings of another width (projected), and a `length` beyond the model's positions.
    """

    sample: int = 256
    length: int = 32
    seed: int = 0
    layout: Layout | None = None

    def __post_init__(self) -> None:
        if self.sample < 2 or self.length < 2:
            raise DataError(f"HeadSpectra needs sample >= 2 and length >= 2, got {self.sample} and {self.length}")

    def reads(self) -> list[Read]:
        return []  # weights alone

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        """Products over the vocabulary, and by head, all in float64, which counts twice; and eigenvalues by head."""
        d, d_head, heads = shape.d_model, shape.d_head, shape.layers * shape.heads
        # a symmetric product over tied tables; two, and one that is not, over others; what is largest of each
        tables = (1.25 if shape.tied else 4.5) * shape.vocab * d**2 + (1 if shape.tied else 2) * eigenvalues(d)
        # each factor through the tables and with each other, also those of the null
        each = 2 * d * d_head * (4 * d + 10 * d_head) + 18 * eigenvalues(d_head) + 2 * general_eigenvalues(d_head)
        # the tokens drawn against some of the vocabulary: those that may be copied, few, meet all of it
        rivals = min(RIVALS, shape.vocab)
        drawn = min(self.sample, shape.vocab)
        copies = rivals * d_head * (d + drawn) + drawn * (rivals * SWEEP + 4 * d * d_head)
        null = 4 * 64 * d * d_head * DRAWN
        # 2.5 times the heads of the null, in float64
        return Cost(
            operations=tables + null + (heads + 64) * each + heads * (copies + 2 * d**2 * d_head),
            trials=trials(),
            held=20 * 4 * 64 * d * d_head,
        )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        anatomy = Anatomy.of(snapshot, self.layout, type(self).__name__)
        with torch.no_grad(), exact_products():
            embed, unembed = token_tables(anatomy)
            vocab = len(embed)
            drawn = torch.randperm(vocab, generator=self._generator("tokens", vocab))[: self.sample].sort().values
            grams = Grams.of(snapshot, embed, unembed)
            covariances, reason = self._covariances(anatomy, drawn)
            copies = _Copies.of(embed, unembed, drawn)
            rows = [_layer(anatomy, layer, grams, covariances, copies) for layer in range(anatomy.layers)]
            null = self._null(anatomy, grams)
        return _dataset(rows, null, vocab, reason).assign_attrs(anatomy.trust)

    def _generator(self, *what: object) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, "HeadSpectra", *what))

    def _null(self, anatomy: Anatomy, grams: Grams) -> np.ndarray:
        """(score, 2): mean and standard deviation."""
        generator = self._generator("null", anatomy.d_model, anatomy.d_head)
        shape = (4, 64, anatomy.d_model, anatomy.d_head)
        q, k, v, o = torch.randn(shape, generator=generator, dtype=torch.float64).to(grams.embed)
        scores = _scores(Factors.of(q, k, v, o.mT, grams), grams)
        return np.array([[scores[name].mean(), scores[name].std(ddof=1)] for name in SCORES])

    def _covariances(self, anatomy: Anatomy, drawn: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor] | None, str]:
        """Second moment of e + p, covariances of e and of p, each (d, d); or None and why. Positions are found by what
        the same token is embedded as at other places."""
        same = drawn[:1].expand(1, self.length)
        mixed = drawn[torch.randint(len(drawn), (4, self.length), generator=self._generator("mixed"))]
        # e + p is a sum where a mixture of tokens is embedded as each at place 0, plus the shift of its place
        alone = torch.cat([_embedded(anatomy, drawn[rows, None])[:, 0] for rows in minibatches(len(drawn), 64)])
        place, mixture = _embedded(anatomy, same)[0], _embedded(anatomy, mixed)
        shift = place - place[0]
        expected = alone[torch.searchsorted(drawn, mixed).to(alone.device)] + shift
        size = alone.std()
        if float((mixture - expected).abs().max()) > 1e-2 * float(size):
            return None, "the embedding is no sum of a token's and a position's"
        if float(shift.abs().max()) <= 1e-4 * float(size):
            return None, "the embedding holds no positions (rotary, or none)"
        token, position = torch.cov(alone.T, correction=0), torch.cov(place.T, correction=0)
        mean = alone.mean(0) + shift.mean(0)
        return (token + position + torch.outer(mean, mean), token, position), ""


def _embedded(anatomy: Anatomy, tokens: Tensor) -> Tensor:
    """What tokens (batch, pos) are before the first layer, (batch, pos, d) in float64."""
    return anatomy.read_up_to(tokens, [("resid_pre", 0)])["resid_pre", 0].double()


def _layer(
    anatomy: Anatomy,
    layer: int,
    grams: Grams,
    covariances: tuple[Tensor, Tensor, Tensor] | None,
    copies: _Copies,
) -> dict[str, np.ndarray]:
    """The numbers (head,) of one layer."""
    weights = (anatomy.W_Q(layer), anatomy.W_K(layer), anatomy.W_V(layer), anatomy.W_O(layer))
    heads = Factors.of(*weights, grams)
    values = _scores(heads, grams)
    in_q, in_k, in_v, in_o = heads.own
    top_q, top_k, top_v, top_o = heads.tops
    for name, left, right, most in (("ov_rank", in_v, in_o, top_v * top_o), ("qk_rank", in_q, in_k, top_q * top_k)):
        s = _singular(left, right, most)
        values[name] = over(s.sum(1) ** 2, (s**2).sum(1))
    if covariances is None:
        values["positional_share"] = np.full(anatomy.heads, np.nan)
    else:
        q, k = heads.q, heads.k
        moment, token, position = (q.mT @ covariances[0] @ q, k.mT @ covariances[1] @ k, k.mT @ covariances[2] @ k)
        by_token, by_place = ((moment * part).sum((-2, -1)).cpu().numpy() for part in (token, position))
        most = trace(covariances[0]) * trace(covariances[1] + covariances[2]) * trace(in_q) * trace(in_k)
        both = by_token + by_place
        values["positional_share"] = over(by_place, np.where(both > ROUNDING_SHARE**2 * most.cpu().numpy(), both, 0.0))
    silent = np.isnan(values["copying_singular"])
    for name, value in copies(heads, weights[2], weights[3]).items():
        values[name] = np.where(silent, np.nan, value)
    return values


def _scores(heads: Factors, grams: Grams) -> dict[str, np.ndarray]:
    """The four scores (head,)."""
    scores, (in_embed, in_unembed) = {}, grams.reach
    top_q, top_k, top_v, top_o = heads.tops
    for name, cross, left, right, most in (
        ("copying", heads.copied, heads.reads, heads.writes, in_embed * top_v * top_o * in_unembed),
        ("matching", heads.matched, heads.asks, heads.shown, in_embed**2 * top_q * top_k),
    ):
        total = trace(cross).cpu().numpy()
        size = eigenvalue_sum(cross)
        singular = _singular(left, right, most).sum(1)
        scores[name] = over(total, np.where((singular > 0) & (size >= ROUNDING_SHARE * singular), size, 0.0))
        scores[f"{name}_singular"] = over(total, singular)
    return scores


def _singular(left: Tensor, right: Tensor, most: Tensor) -> np.ndarray:
    """Singular values (head, d_head) of A B from AᵀA and B Bᵀ, both (head, d_head, d_head); zeros where they are those
    of rounding, against `most` (head,), what their squares could be at most."""
    values, vectors = torch.linalg.eigh(left.cpu())
    root = vectors * values.clamp(min=0).sqrt()[:, None]  # left = root rootᵀ
    square = torch.linalg.eigvalsh(root.mT @ right.cpu() @ root)
    return torch.where(square > ROUNDING_SHARE**2 * most.cpu()[:, None], square, 0.0).sqrt().numpy()


@dataclass(frozen=True)
class _Copies:
    """What copy_rate and copy_z need of the vocabulary: the tokens `drawn`, their rows (token, d) of both tables, the
    table that is written to, its `rivals`, mean row and length."""

    drawn: Tensor
    reads: Tensor
    own: Tensor
    unembed: Tensor
    rivals: Tensor
    centre: Tensor
    vocab: int

    @classmethod
    def of(cls, embed: Tensor, unembed: Tensor, drawn: Tensor) -> _Copies:
        drawn, half = drawn.to(embed.device), embed.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if half else embed.dtype
        rivals = unembed[:: max(1, len(unembed) // RIVALS)].to(dtype)
        totals = [unembed[part].double().sum(0) for part in minibatches(len(unembed), RIVALS)]
        centre = torch.stack(totals).sum(0) / len(unembed)
        return cls(drawn, embed[drawn].to(dtype), unembed[drawn].to(dtype), unembed, rivals, centre, len(unembed))

    def __call__(self, heads: Factors, w_v: Tensor, w_o: Tensor) -> dict[str, np.ndarray]:
        """copy_rate and copy_z with their errors, (head,) each, of one layer.

        From the rows of the OV circuit of the tokens drawn. A row is compared with all of a large vocabulary only where
        its own entry beats those of a part of it.
        """
        v, o = w_v.detach().to(self.reads), w_o.detach().to(self.reads)
        # rows in the embedding's own precision find the few tokens that may be copied; only these are compared with all
        reads = torch.einsum("td,hde->hte", self.reads, v)
        own = torch.einsum("td,hed->hte", self.own, o)
        entry = (reads * own).sum(2)  # (head, token)
        rival = (reads @ through(self.rivals, o.mT).mT).amax(2)
        hit = self._first(reads, o, entry >= rival - 1e-3 * rival.abs())

        # mean and variance of a row from the moments of the unembedding: no row is ever built
        reads, mean = reads.double(), heads.o @ self.centre  # (head, d_head)
        above = (reads * (own.double() - mean[:, None])).sum(2)
        spread = heads.writes / self.vocab - mean[:, :, None] * mean[:, None]
        sd = ((reads @ spread) * reads).sum(2).clamp(min=0).sqrt()
        there = sd > ROUNDING_SHARE * sd.amax(1, keepdim=True)
        z = torch.where(there, above / sd, 0.0).cpu().numpy()
        hits, weight = (hit & there).cpu().numpy(), np.ones(z.shape[1])
        pairs = [[*clustered_mean(h, weight), *clustered_mean(each, weight)] for h, each in zip(hits, z, strict=True)]
        return dict(zip(("copy_rate", "copy_rate_se", "copy_z", "copy_z_se"), np.array(pairs).T, strict=True))

    def _first(self, reads: Tensor, o: Tensor, maybe: Tensor) -> Tensor:
        """Where, of the places `maybe` (head, token), a token's own entry is the largest of its row, with no tie."""
        hit, heads = torch.zeros_like(maybe), maybe.any(1).nonzero()[:, 0].tolist()
        unembed = self.unembed.to(o) if heads else self.unembed
        for head in heads:
            places = maybe[head].nonzero()[:, 0]
            # few rows go through the stream, many through the head's own map to the vocabulary (vocab, d_head)
            few = len(places) < o.shape[1]
            read, table = (reads[head] @ o[head], unembed) if few else (reads[head], unembed @ o[head].T)
            for rows in places.split(64):
                top = (read[rows] @ table.T).topk(2)
                hit[head, rows] = (top.indices[:, 0] == self.drawn[rows]) & (top.values[:, 0] > top.values[:, 1])
        return hit


def _dataset(rows: list[dict[str, np.ndarray]], null: np.ndarray, vocab: int, reason: str) -> xr.Dataset:
    result = Rows(headline=["copying", "matching", "copy_z"])
    for name, (long_name, units, change, nan) in LABELS.items():
        values = np.stack([row[name] for row in rows])
        nan = reason or nan if name == "positional_share" else nan
        result.put(name, ("layer", "head"), values, None, long_name, units=units, smallest_change=change, nan=nan)
    result.put("null", "score", null[:, 0], None, "mean score of Gaussian heads", units="1")
    result.put("null_sd", "score", null[:, 1], None, "standard deviation for Gaussian heads", units="1")
    result.put("copy_chance", (), 1 / vocab, None, "copy rate of a head blind to tokens", units="share")
    layer, head = np.arange(len(rows)), np.arange(len(rows[0]["copying"]))
    return result.dataset(layer=layer, head=head, score=np.array(SCORES, dtype=object))
