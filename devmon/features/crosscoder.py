"""Crosscoders over checkpoints: one dictionary of all snapshots, whose lengths say when a feature is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.anatomy.anatomy import Anatomy
from devmon.errors import DataError
from devmon.features.dictionary import Dictionary
from devmon.features.sources import Held
from devmon.features.training import Progress, Training, train
from devmon.snapshot import derive_seed

THERE = 0.1  # share of its largest length from which a latent is in a snapshot (Lindsey et al. 2024)


class Crosscoded(NamedTuple):
    """The dictionary of all snapshots side by side, and what `lengths` tells of it."""

    dictionary: Dictionary
    table: xr.Dataset


def crosscode(
    states: Sequence[Tensor],
    steps: Sequence[int],
    training: Training,
    *,
    batch: int = 4096,
    seed: int = 0,
    file: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Crosscoded:
    """Train a crosscoder of the same places in every snapshot, and tell when each latent is there (Lindsey 2024).

    `states` are (place, d) for each of `steps`, such as those of `SiteActivations`; a fifth of the places is held out.
    Take `BatchTopK`: with L1 a weak presence shrinks to none (2504.02922). The snapshots' own scales are undone, so
    that lengths of two snapshots compare: a feature that stays the same keeps its length while others come. Memory: all
    states in float32, 4 · snapshots · places · d bytes. Raises DataError for fewer than two snapshots or other shapes.
    """
    shapes = {tuple(each.shape) for each in states}
    if len(states) < 2 or len(states) != len(steps) or len(shapes) != 1 or states[0].ndim != 2:
        raise DataError(
            f"crosscode needs the same places (place, d) of two snapshots or more; got {len(states)} for {len(steps)} "
            f"steps, of shapes {sorted(shapes)}"
        )
    x = torch.cat([each.float() for each in states], 1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(derive_seed(seed, "held out")))
    held, used = x[order[: len(x) // 5]], x[order[len(x) // 5 :]]
    source = Held(used, batch=min(batch, len(used)), seed=seed)
    dictionary, _ = train(replace(training, parts=len(states)), source, file=file, progress=progress)
    assert isinstance(dictionary, Dictionary)
    return Crosscoded(dictionary, lengths(dictionary, held, steps))


def lengths(dictionary: Dictionary, x: Tensor, steps: Sequence[int]) -> xr.Dataset:
    """What a crosscoder says of each latent and snapshot, with x (place, snapshot · d) to check it on.

    - `norm` (step, latent): ‖d_j^t‖; `relative` the same over the largest of the latent; NaN where it never fires
    - `scaled` (step, latent): β_t over its largest, β_t = Σ f⟨r_t, d⟩ / (‖d‖² Σ f²), r_t = x_t less all other latents,
      d the direction of the longest snapshot (latent scaling, 2504.02922): a check on `relative`, which a penalty may
      have shrunk
    - `turned` (step, latent), cosine: of d_j^t to that of the last snapshot
    - `born`, `died` (latent), step: the first and the last snapshot in which `relative` is .1 or more
    - `density` (latent), share of places; `fvu` (step), share, of each snapshot
    """
    parts = dictionary.parts
    with torch.no_grad():
        f = dictionary.encode(x)
        rest = (x - dictionary.decode(f)).unflatten(1, (parts, -1))
        rows = dictionary.W_dec.unflatten(1, (parts, -1))  # (latent, snapshot, d)
        norm = rows.norm(dim=-1)
        alive = (f > 0).any(0)
        most, at = norm.max(1)
        direction = rows[torch.arange(len(rows)), at]

        # Σ f⟨x_t − others, d⟩ = Σ f⟨rest_t, d⟩ + Σ f² ⟨d_j^t, d⟩, all latents at once
        squares = f.square().sum(0)
        beta = torch.stack([
            (f.T @ rest[:, t] * direction).sum(1) + squares * (rows[:, t] * direction).sum(1) for t in range(parts)
        ])  # fmt: skip
        beta = beta / (direction.square().sum(1) * squares)
        centred = x.unflatten(1, (parts, -1))
        centred = centred - centred.mean(0)
        fvu = rest.square().sum((0, 2)) / centred.square().sum((0, 2))
        turned = torch.cosine_similarity(rows, rows[:, -1:], dim=-1).T
        relative = (norm / most[:, None]).T
    shown = {
        "norm": norm.T,
        "relative": relative,
        "scaled": beta / beta.amax(0),
        "turned": turned,
    }
    silent = ~alive.cpu().numpy()
    arrays = {name: each.double().cpu().numpy() for name, each in shown.items()}
    for each in arrays.values():
        each[:, silent] = np.nan
    there = np.nan_to_num(arrays["relative"]) >= THERE
    index = np.asarray(steps, dtype=np.float64)
    born = np.where(silent, np.nan, index[there.argmax(0)])
    died = np.where(silent, np.nan, index[len(index) - 1 - there[::-1].argmax(0)])
    return xr.Dataset(
        {name: (("step", "latent"), each) for name, each in arrays.items()}
        | {
            "born": ("latent", born),
            "died": ("latent", died),
            "density": ("latent", (f > 0).double().mean(0).cpu().numpy()),
            "fvu": ("step", fvu.double().cpu().numpy()),
        },
        coords={"step": list(steps), "latent": np.arange(dictionary.latents)},
    )


def unembeddings(models: Sequence[nn.Module]) -> list[Tensor]:
    """The rows of each model's unembedding (vocab, d): places for a crosscoder that needs no forward pass."""
    return [Anatomy(model, who="unembeddings").W_U.detach().T.float() for model in models]
