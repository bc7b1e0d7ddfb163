"""Circuits between embedding and unembedding: products over the vocabulary, and what of a head's eigenvalues copies."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from devmon.anatomy.anatomy import Anatomy
from devmon.data.probe import minibatches
from devmon.errors import InstrumentError

# Σ|λ| / Σs under which eigenvalues are those of rounding; larger, and true but weak circuits are NaN
ROUNDING_SHARE = 1e-6
TOKENS_AT_ONCE = 4096  # of a product over the vocabulary in float64: memory, not numbers


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
    half = embed.dtype in (torch.float16, torch.bfloat16)
    return (embed[:vocab].float(), unembed[:vocab].float()) if half else (embed[:vocab], unembed[:vocab])


def over_tokens(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right over the vocabulary, in float64."""
    parts = (left[rows].double().T @ right[rows].double() for rows in minibatches(len(left), TOKENS_AT_ONCE))
    return sum(parts, torch.zeros((), dtype=torch.float64, device=left.device))


def copying_eigenvalues(anatomy: Anatomy) -> np.ndarray | None:
    """`copying` of `HeadSpectra` alone, (layer, head); None for embeddings that are not as wide as the stream."""
    try:
        embed, unembed = token_tables(anatomy)
    except InstrumentError:
        return None
    across, rows = over_tokens(unembed, embed), []
    for layer in range(anatomy.layers):
        v, o = (weight.detach().double() for weight in (anatomy.W_V(layer), anatomy.W_O(layer)))
        cross = o @ across @ v
        size = eigenvalue_sum(cross)
        most = ((o @ across).flatten(1).norm(dim=1) * v.flatten(1).norm(dim=1)).cpu().numpy()
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
