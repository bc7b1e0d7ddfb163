"""Features of stored dictionaries over training: which latent of one step is which of another, and how surely."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from devmon.errors import DataError

Array = NDArray[np.float64]
SAME = 0.9  # cosine from which two directions are called one feature (2501.16615: .7; Sharkey et al. 2022: .9)


def matched(one: Array, other: Array) -> tuple[NDArray[np.int64], Array]:
    """The one-to-one matching of directions (m, d) with the largest sum of cosines (Hungarian algorithm).

    Returns the row of `other` for each row of `one`, -1 where it has none (fewer rows, or a row of length 0), and the
    cosines (m,), NaN there.
    """
    living = [np.flatnonzero(np.linalg.norm(each, axis=1) > 0) for each in (one, other)]
    unit = [each[at] / np.linalg.norm(each[at], axis=1, keepdims=True)
            for each, at in zip((one, other), living, strict=True)]  # fmt: skip
    overlap = unit[0] @ unit[1].T
    rows, columns = linear_sum_assignment(-overlap)
    partner, cosine = np.full(len(one), -1), np.full(len(one), np.nan)
    partner[living[0][rows]] = living[1][columns]
    cosine[living[0][rows]] = overlap[rows, columns]
    return partner, cosine


def best_cosine(one: Array, other: Array) -> Array:
    """(m,): the largest cosine of each direction of `one` with any of `other`; NaN for directions of length 0."""
    norms = [np.linalg.norm(each, axis=1, keepdims=True) for each in (one, other)]
    with np.errstate(invalid="ignore", divide="ignore"):
        overlap = (one / norms[0]) @ np.nan_to_num(other / norms[1]).T
    return np.asarray(overlap.max(1))


def feature_matches(dataset: xr.Dataset, twin: xr.Dataset | None = None) -> xr.Dataset:
    """How many features of each step are those of the step before, beside two seeds of one step.

    `dataset` is a watch of `SparseAutoencoder`, whose latents that fire count. `twin` is the same watch with another
    seed: features that two seeds of the *same* step do not share cannot be said to come or go from one step to the
    next. The result, for each step after the first (for `twin_…` each step), has

    - `cosine` (step), cosine: mean over matched pairs (Hungarian) with the step before
    - `same` (step), share: of this step's living latents, those whose pair has a cosine of .9 at least
    - `best` (step), cosine: mean over this step's latents of the best cosine with any of the step before, and
      `best_back` (step) the other way round: more than one latent may share a partner
    - `turnover` (step), share: 1 - same / twin_same, at least 0; NaN without a twin
    - `twin_cosine`, `twin_same`, `twin_best` (step): the same between the seeds: the null
    - `partner` (step, latent): the latent of the step before that each is matched with, -1 for none

    Raises DataError without two steps, and for a twin of other steps.
    """
    steps = dataset["step"].values
    if "decoder" not in dataset or len(steps) < 2:
        raise DataError("feature_matches needs a watch of SparseAutoencoder with two steps or more")
    if twin is not None and not np.array_equal(twin["step"].values, steps):
        raise DataError("feature_matches: the twin is measured at other steps; give the same watch of another seed")
    decoders = _living(dataset)
    found = {name: np.full(len(steps), np.nan) for name in ("cosine", "same", "best", "best_back")}
    partner = np.full((len(steps), dataset.sizes["latent"]), -1)
    for i in range(1, len(steps)):
        partner[i], cosine = matched(decoders[i], decoders[i - 1])
        for name, value in _summary(cosine, decoders[i], decoders[i - 1]).items():
            found[name][i] = value
        found["best_back"][i] = np.nanmean(best_cosine(decoders[i - 1], decoders[i]))

    # the null: two seeds at one step
    null = {f"twin_{name}": np.full(len(steps), np.nan) for name in ("cosine", "same", "best")}
    if twin is not None:
        for i, (mine, theirs) in enumerate(zip(decoders, _living(twin), strict=True)):
            for name, value in _summary(matched(mine, theirs)[1], mine, theirs).items():
                null[f"twin_{name}"][i] = value
    with np.errstate(invalid="ignore", divide="ignore"):
        turnover = np.maximum(0, 1 - found["same"] / null["twin_same"])
    variables = {name: ("step", values) for name, values in (found | null | {"turnover": turnover}).items()}
    return xr.Dataset(
        variables | {"partner": (("step", "latent"), partner)},
        coords={"step": steps, "latent": dataset["latent"].values},
    )


def _living(dataset: xr.Dataset) -> list[Array]:
    """The decoder (latent, dimension) of each step, 0 where a latent does not fire."""
    fires = (dataset["density"] > 0).transpose("step", "latent").values
    decoder = dataset["decoder"].transpose("step", "latent", "dimension").values.astype(np.float64)
    return [rows * alive[:, None] for rows, alive in zip(decoder, fires, strict=True)]


def _summary(cosine: Array, one: Array, other: Array) -> dict[str, float]:
    alive = np.linalg.norm(one, axis=1) > 0
    if not alive.any() or not np.linalg.norm(other, axis=1).any():
        return {}
    best = best_cosine(one[alive], other)
    return {
        "cosine": float(np.nanmean(cosine)),
        "same": float(np.sum(cosine[alive] >= SAME) / alive.sum()),
        "best": float(best.mean()),
    }


def lens_overlap(dataset: xr.Dataset) -> xr.DataArray:
    """The share of the top tokens of each latent (step, latent) that are those of the last step: of FeatureLens."""
    if "top_token" not in dataset:
        raise DataError("lens_overlap needs a watch of FeatureLens")
    top = dataset["top_token"].transpose("step", "latent", "rank").values
    shared = (top[:, :, :, None] == top[-1][None, :, None, :]).any(-1).mean(-1)
    coords = {"step": dataset["step"].values, "latent": dataset["latent"].values}
    return xr.DataArray(shared, coords, ("step", "latent"), attrs={"long_name": "shared top tokens", "units": "share"})
