"""How the rows of a decoder share their space: superposition of features that were found, not assumed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from devmon.data.rows import Rows
from devmon.features.constants import ANTIPODAL, MOST_PAIRS


def dimensionality(W_dec: Tensor) -> Tensor:
    """D_i = 1 / Σ_j ⟨d̂_i, d̂_j⟩² of rows (m, d): the share of a dimension that a latent has to itself (2209.10652).

    1 of orthogonal rows, ½ of a pair of opposites, ⅖ of a pentagon; 0 of a row of length 0.

    >>> import torch
    >>> turns = torch.arange(5) * 2 * torch.pi / 5
    >>> dimensionality(torch.stack([turns.cos(), turns.sin()], 1)).round(decimals=3).tolist()
    [0.4, 0.4, 0.4, 0.4, 0.4]
    """
    rows = W_dec.double()
    norms = rows.norm(dim=1, keepdim=True)
    unit = torch.where(norms > 0, rows / norms.clamp(min=1e-300), 0.0)
    seen = ((unit @ (unit.T @ unit)) * unit).sum(1)
    return torch.where(seen > 0, 1 / seen.clamp(min=1e-300), 0.0)


def coactive_interference(W_dec: Tensor, fired: Tensor) -> Tensor:
    """Σ_{j≠i} P(j | i) ⟨d̂_i, d̂_j⟩² (m,): overlap with the latents that fire in the same places (place, m); NaN where
    latent i never fires."""
    active = fired.float()
    unit = W_dec / W_dec.norm(dim=1, keepdim=True).clamp(min=torch.finfo(W_dec.dtype).tiny)
    overlap = (unit @ unit.T).square()
    together = (active.T @ active).double() / active.sum(0).double()[:, None]
    return (together * overlap).sum(1) - together.diagonal() * overlap.diagonal()


def put_geometry(rows: Rows, W_dec: Tensor, fired: Tensor) -> None:
    """Of the latents (m, d) that fire in some place (place, m): dimensionality, interference, pairs of opposites."""
    alive = fired.any(0)
    every = np.full(len(W_dec), np.nan)
    own = every.copy()
    own[alive.cpu().numpy()] = dimensionality(W_dec[alive]).cpu().numpy()
    silent = "it never fires"
    label = "share of a dimension that the latent has to itself"
    rows.put("dimensionality", "latent", own, None, label, units="dimensions", nan=silent)
    few = int(alive.sum()) <= MOST_PAIRS
    shared, opposite = every.copy(), float("nan")
    if few and bool(alive.any()):
        living = W_dec[alive]
        shared[alive.cpu().numpy()] = coactive_interference(living, fired[:, alive]).cpu().numpy()
        unit = living / living.norm(dim=1, keepdim=True)
        opposite = float(((unit @ unit.T).amin(1) < ANTIPODAL).double().mean())
    many = f"{silent}, or more than {MOST_PAIRS} latents do"
    label = "squared overlap with latents that fire in the same places"
    rows.put("interference", "latent", shared, None, label, units="1", nan=many)
    label = f"latents with another at cosine below {ANTIPODAL}"
    rows.put("antipodal", (), opposite, None, label, units="share", nan=many)
