"""A training of which the births of features are known, and what a star of dictionaries finds of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr

from devmon.analysis import feature_births
from devmon.features import BatchTopK, Dictionary, train
from devmon.features import Training as DictionaryTraining
from devmon.testing.planted import Planted, best_cosines, directions


def planted_run(steps: int) -> dict[str, Any]:
    """A star over 20 checkpoints of 32 old features and 16 that begin at a known one; what `feature_births` says."""
    d, old, new = 32, 32, 16
    rows = directions(old + new, d, seed=7)
    begins = np.array([0] * old + [4 + 12 * i // new for i in range(new)])  # index of the first checkpoint with it
    moments = [0, *(int(x) for x in np.geomspace(10, 3000, 19))]
    training = DictionaryTraining(BatchTopK(3), width=3, steps=steps, lr=2e-3)

    def source(at: int, seed: int) -> Planted:
        return Planted(rows * torch.tensor(begins <= at)[:, None], 3 / len(rows), batch=512, seed=seed)

    reference = train(training, source(len(moments) - 1, 1)).dictionary
    assert isinstance(reference, Dictionary)
    latent = _latents_of(rows, reference.W_dec)
    shorter = replace(training, steps=steps // 15)
    density, error = [], []
    for at in range(len(moments)):
        star = train(shorter, source(at, 1), start=reference).dictionary
        fires = torch.stack([(star.encode(source(at, 2)(i)[0]) > 0).float().mean(0) for i in range(40)]).double()
        density.append(fires.mean(0).numpy())
        error.append((fires.std(0) / 40**0.5).numpy())
    dataset = xr.Dataset(
        {"density": (("step", "latent"), np.array(density)), "density_se": (("step", "latent"), np.array(error))},
        coords={"step": moments, "latent": np.arange(reference.latents)},
    )
    births = feature_births(dataset)
    born = births["born"].values[latent]
    truth = [(moments[begin - 1], moments[begin]) for begin in begins[old:]]
    low, high = (births[f"born_{end}"].values[latent[old:]] for end in ("low", "high"))
    inside = [a <= right and left <= b for (left, right), a, b in zip(truth, low, high, strict=True)]
    return {
        "found": int(np.isfinite(born[old:]).sum()),
        "inside": int(np.sum(inside)),
        "false": int(np.isfinite(born[:old]).sum()),
        "cosine": float(best_cosines(reference.W_dec, rows).mean()),
    }


def _latents_of(rows: torch.Tensor, decoder: torch.Tensor) -> np.ndarray:
    unit = decoder / decoder.norm(dim=1, keepdim=True).clamp(min=1e-9)
    return np.asarray((rows @ unit.T).argmax(1).numpy())
