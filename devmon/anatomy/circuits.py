"""Circuits between embedding and unembedding: products of weights, what of a head copies, what parts add to a logit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from devmon.anatomy.anatomy import Anatomy
from devmon.anatomy.fit import exact_products
from devmon.anatomy.sites import Reads
from devmon.data.probe import minibatches
from devmon.errors import InstrumentError
from devmon.snapshot import Snapshot

# Σ|λ| / Σs under which eigenvalues are those of rounding; larger, and true but weak circuits are NaN
ROUNDING_SHARE = 1e-6
ROWS_AT_ONCE = 4096  # of a product, in the precision it is taken in: memory, not numbers
TILES = 4  # a symmetric product takes (TILES + 1) / (2 TILES) of the whole one; more tiles are smaller and slower


def token_tables(anatomy: Anatomy) -> tuple[Tensor, Tensor]:
    """W_E and W_Uᵀ, both (vocab, d)."""
    name = type(anatomy.model).__name__
    anatomy.need_sum()
    embed, unembed = anatomy.W_E.detach(), anatomy.W_U.detach().T
    if embed.shape[1] != anatomy.d_model or unembed.shape[1] != anatomy.d_model:
        raise InstrumentError(
            f"{anatomy.who} needs embeddings as wide as the stream, {anatomy.d_model}; those of {name} are "
            f"{tuple(embed.shape)} and {tuple(unembed.shape)}: leave this instrument out"
        )
    vocab = min(len(embed), len(unembed))
    return embed[:vocab], unembed[:vocab]


def gram(rows: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """rowsᵀ rows (n, n) of `rows` (many, n), in float64, from products in `dtype`.

    With float32 the error has a norm of about 2⁻²⁴ √(largest · mean eigenvalue): those below that are rounding.
    """
    size = rows.shape[1]
    total = torch.zeros(size, size, dtype=torch.float64, device=rows.device)
    cuts = [size * tile // TILES for tile in range(TILES + 1)]
    with exact_products():
        for part in minibatches(len(rows), ROWS_AT_ONCE):
            some = rows[part].to(dtype)
            for start, stop in zip(cuts, cuts[1:], strict=False):
                total[start:stop, start:] += some[:, start:stop].T @ some[:, start:]
    return total.triu() + total.triu(1).T


def over_rows(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right of (many, n) and (many, m), in float64."""
    parts = (left[part].double().T @ right[part].double() for part in minibatches(len(left), ROWS_AT_ONCE))
    return sum(parts, torch.zeros((), dtype=torch.float64, device=left.device))


def over_tokens(snapshot: Snapshot, left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right over the vocabulary, in float64, of two tables of the snapshot's model; computed once for all the
    instruments of a step."""
    place = tuple((table.data_ptr(), table.shape, table.stride(), table.dtype) for table in (left, right))
    key: tuple[Any, ...] = ("over tokens", *place)
    if key not in snapshot.memo:
        product = gram(left) if place[0] == place[1] else over_rows(left, right)
        snapshot.memo[key] = {"product": product, "left": left, "right": right}  # held, so that no other is put there
    return snapshot.memo[key]["product"]


def copying_eigenvalues(snapshot: Snapshot, anatomy: Anatomy) -> np.ndarray | None:
    """`copying` of `HeadSpectra` alone, (layer, head); None for embeddings that are not as wide as the stream."""
    try:
        embed, unembed = token_tables(anatomy)
    except InstrumentError:
        return None
    across, rows = over_tokens(snapshot, unembed, embed), []
    for layer in range(anatomy.layers):
        v, o = (weight.detach().double() for weight in (anatomy.W_V(layer), anatomy.W_O(layer)))
        written = o @ across
        cross = written @ v
        size = eigenvalue_sum(cross)
        most = (written.flatten(1).norm(dim=1) * v.flatten(1).norm(dim=1)).cpu().numpy()
        rows.append(over(trace(cross).cpu().numpy(), np.where(size >= ROUNDING_SHARE * most, size, 0.0)))
    return np.stack(rows)


def eigenvalue_sum(matrices: Tensor) -> np.ndarray:
    """Σ|λ| of square matrices (…, n, n)."""
    matrices = matrices.cpu()
    try:
        return torch.linalg.eigvals(matrices).abs().sum(-1).numpy()
    except torch.linalg.LinAlgError:  # repeated eigenvalues can defeat LAPACK: moved apart below rounding, they do not
        generator = torch.Generator().manual_seed(0)
        size = matrices.flatten(-2).norm(dim=-1)[..., None, None]
        apart = torch.randn(matrices.shape, generator=generator, dtype=matrices.dtype) * size * 1e-15
        return torch.linalg.eigvals(matrices + apart).abs().sum(-1).numpy()


def trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(0, -2, -1).sum(-1)


def over(value: np.ndarray, size: np.ndarray) -> np.ndarray:
    return np.divide(value, size, out=np.full(value.shape, np.nan), where=size > 0)


@dataclass(frozen=True)
class Grams:
    """W_Eᵀ W_E, W_U W_Uᵀ and W_U W_E, each (d, d) in float64; one tensor where the embeddings are tied."""

    embed: Tensor
    unembed: Tensor
    across: Tensor

    @property
    def tied(self) -> bool:
        return self.across is self.embed

    @cached_property
    def reach(self) -> tuple[float, float]:
        """‖W_E‖₂², ‖W_U‖₂²."""
        embed = largest_eigenvalue(self.embed).item()
        return embed, embed if self.tied else largest_eigenvalue(self.unembed).item()

    @classmethod
    def of(cls, snapshot: Snapshot, embed: Tensor, unembed: Tensor) -> Grams:
        pairs = ((embed, embed), (unembed, unembed), (unembed, embed))
        return cls(*(over_tokens(snapshot, left, right) for left, right in pairs))


@dataclass(frozen=True)
class Factors:
    """The heads of one layer in float64, q, k, v (head, d, d_head) and o (head, d_head, d), and how large the circuits
    through them are (head, d_head, d_head): `reads` vᵀ W_Eᵀ W_E v, `writes` o W_U W_Uᵀ oᵀ, `copied` o W_U W_E v, `asks`
    qᵀ W_Eᵀ W_E q, `shown` kᵀ W_Eᵀ W_E k, `matched` kᵀ W_Eᵀ W_E q; `tops` (q, k, v, o; head) are ‖ ‖₂² of each."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    reads: Tensor
    writes: Tensor
    copied: Tensor
    asks: Tensor
    shown: Tensor
    matched: Tensor
    own: Tensor
    tops: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, o: Tensor, grams: Grams) -> Factors:
        q, k, v, o = (factor.detach().double() for factor in (q, k, v, o))
        # each factor goes through a matrix of size d once, and all heads of a layer together
        embedded_q, embedded_k, embedded_v = (through(grams.embed, factor) for factor in (q, k, v))
        across = embedded_v if grams.tied else through(grams.across, v)
        unembedded = through(grams.unembed, o.mT)
        own = torch.stack([q.mT @ q, k.mT @ k, v.mT @ v, o @ o.mT])
        return cls(
            *(q, k, v, o),
            reads=v.mT @ embedded_v,
            writes=o @ unembedded,
            copied=o @ across,
            asks=q.mT @ embedded_q,
            shown=k.mT @ embedded_k,
            matched=k.mT @ embedded_q,
            own=own,
            tops=largest_eigenvalue(own),
        )


def through(matrix: Tensor, factor: Tensor) -> Tensor:
    """matrix factor (head, d, d_head) for a factor of this shape, in one product."""
    return (matrix @ factor.transpose(0, 1).flatten(1)).unflatten(1, (len(factor), -1)).transpose(0, 1)


def largest_eigenvalue(gram: Tensor) -> Tensor:
    """The largest eigenvalue of symmetric matrices."""
    return torch.linalg.eigvalsh(gram)[..., -1]


class Contributions:
    """What each part adds to the final stream at the measured places, `parts` (prompt, component, d) in float64."""

    def __init__(self, anatomy: Anatomy, reads: Reads) -> None:
        self.anatomy = anatomy
        self.names = ["embedding"]
        parts = [reads["resid_pre", 0][:, None]]
        with torch.no_grad():
            for layer in range(anatomy.layers):
                # attention, split by heads: what stands after it is linear once its scale is frozen
                heads = torch.einsum("nhe,hed->nhd", reads["z", layer], anatomy.W_O(layer).double())
                bias = anatomy.bias(layer, "out").double().expand(len(heads), -1)
                end = anatomy.end_norm(layer, "attention")
                scale = end.scale((heads.sum(1) + bias).to(anatomy.W_O(layer).dtype)).double()  # (prompt, 1)
                parts.append(end.linear(heads, scale[:, None]))
                parts.append((end.linear(bias, scale) + end.bias)[:, None])
                self.names += [f"head {layer}.{head}" for head in range(anatomy.heads)] + [f"attention bias {layer}"]
                if anatomy.has_mlp:
                    parts.append(reads["mlp_out", layer][:, None])
                    self.names.append(f"mlp {layer}")
            # the final norm, its scale frozen at that of the whole stream
            stream = reads["resid_post", anatomy.layers - 1]
            scale = anatomy.final_norm.scale(stream.to(anatomy.W_O(0).dtype)).double()
            self.parts = anatomy.final_norm.linear(torch.cat(parts, 1), scale[:, None])
        self.names.append("bias")

    def attribution(self, answers: Tensor, foils: Tensor) -> np.ndarray:
        """(prompt, component), the last one the biases after the stream."""
        with torch.no_grad():
            unembed = self.anatomy.W_U
            answers, foils = answers.to(unembed.device), foils.to(unembed.device)
            toward = (unembed[:, answers].double() - unembed[:, foils].double()).T  # (prompt, d)
            bias = getattr(self.anatomy.unembedding, "bias", None)
            rest = toward @ self.anatomy.final_norm.bias.double()
            rest = rest if bias is None else rest + bias[answers] - bias[foils]
            split = torch.einsum("ncd,nd->nc", self.parts, toward)
            return torch.cat([split, rest[:, None]], 1).cpu().numpy()
