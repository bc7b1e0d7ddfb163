"""Births and deaths of features: when each latent of a star of dictionaries begins and ceases to fire."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from devmon.analysis.detection.detector import Detector
from devmon.analysis.detection.events import Event
from devmon.analysis.detection.search import detect
from devmon.analysis.series import Series
from devmon.errors import DataError

ABSENT = 0.1  # share of its largest density below which a latent is not there
FEWEST_FIRING = 1e-3  # density that a latent has to reach once: below, its curve is counts of single places
JITTER = 0.02  # of the largest density: no density is known better, as dictionaries of one step differ by so much
COLUMNS = ("low", "high", "p", "q")


def feature_births(dataset: xr.Dataset, detector: Detector | None = None) -> xr.Dataset:
    """When each latent is born and dies, with an interval, by the detector of events.

    `dataset` is a watch whose latent j is one feature at all steps: SparseAutoencoder with a `start`, or
    DictionaryQuality. A latent is searched for a birth where its `density` was once below a tenth of its largest,
    before that, and for a death where it is so after; its largest has to be one in a thousand places. The search takes
    the density with its errors, a fiftieth of the largest at least (`Detector`, jumps alone), and corrects for the
    number of latents (Benjamini–Hochberg). A birth is the sure rise of largest size, if it crosses half of the largest
    density; a death the same of a fall. The result has

    - `present` (step, latent), share: density over its largest
    - `born` (latent), step: NaN where it was there from the start, or never, or where no rise is sure
    - `born_low`, `born_high` (latent), step: the interval of the rise: its place and its span
    - `born_p`, `born_q` (latent): that there is one, in its series, and among all
    - `died`, `died_low`, …: the same of deaths
    - `kind` (latent): "there", "born", "died", "born and died", "silent" (never above one in a thousand) or "unsure"
      (it comes or goes, and no event is sure)

    Raises DataError for other data, and for a watch of dictionaries that were trained anew at each step, whose latents
    have no order (`feature_matches` tells of those).
    """
    if "density" not in dataset or "latent" not in dataset["density"].dims:
        raise DataError("feature_births needs densities of latents: a watch of SparseAutoencoder or DictionaryQuality")
    if "moved" in dataset and bool(dataset["moved"].isnull().all()):
        raise DataError(
            "feature_births: these dictionaries were trained anew at each step, so latents have no order: give "
            "SparseAutoencoder a `start`, or match them (feature_matches)"
        )
    steps = dataset["step"].values
    density = dataset["density"].transpose("step", "latent").values.astype(np.float64)
    errors = dataset["density_se"].transpose("step", "latent").values.astype(np.float64)
    most = np.nanmax(density, 0, initial=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        present = density / most
    comes, goes = _edges(present)
    heard = most >= FEWEST_FIRING

    # Only what comes or goes is searched: latents that are there all along have no birth to be wrong about.
    searched = np.flatnonzero(heard & (comes | goes))
    detector = replace(detector or Detector(), kinds=("jump",))
    floored = [np.maximum(errors[:, j], JITTER * most[j]) for j in searched]
    series = [Series(str(j), steps, density[:, j], se) for j, se in zip(searched, floored, strict=True)]
    events = detect(series, detector).events if series else ()
    found = {name: _largest(events, density, comes if sign > 0 else goes, sign) for name, sign in SIGNS.items()}

    kind = np.where(heard, np.where(comes | goes, "unsure", "there"), "silent").astype(object)
    born, died = (np.isfinite(found[name]["step"]) for name in SIGNS)
    kind[born], kind[died], kind[born & died] = "born", "died", "born and died"
    variables: dict[str, tuple[object, object]] = {"present": (("step", "latent"), present), "kind": ("latent", kind)}
    for name, columns in found.items():
        variables |= {name if key == "step" else f"{name}_{key}": ("latent", v) for key, v in columns.items()}
    return xr.Dataset(variables, coords={"step": steps, "latent": dataset["latent"].values})


SIGNS = {"born": 1, "died": -1}


def _edges(present: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which latents (latent,) are absent at a step before their largest density, and which at one after it."""
    peak = np.nan_to_num(present).argmax(0)
    at = np.arange(len(present))[:, None]
    absent = present < ABSENT
    return (absent & (at < peak)).any(0), (absent & (at > peak)).any(0)


def _largest(
    events: tuple[Event, ...], density: NDArray[np.float64], eligible: NDArray[np.bool_], sign: int
) -> dict[str, NDArray[np.float64]]:
    """The sure jump of this sign of each latent that is the largest, if it is above half of the largest density."""
    columns = {name: np.full(density.shape[1], np.nan) for name in ("step", *COLUMNS)}
    size = np.zeros(density.shape[1])
    for event in events:
        j = int(event.series)
        big = sign * event.size > max(0.5 * np.nanmax(density[:, j]), size[j])
        if event.sure and eligible[j] and big:
            size[j] = sign * event.size
            low, high = event.extent
            values = (event.step, low, high, event.p_value, np.nan if event.q_value is None else event.q_value)
            for name, value in zip(columns, values, strict=True):
                columns[name][j] = value
    return columns
