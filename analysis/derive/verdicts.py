"""The verdict on an estimate of the LLC, and which verdicts leave a number that can be used."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from devmon.analysis.derive.errors import Z, mean_and_error
from devmon.analysis.derive.mixing import Memory, chains_agree, drifts

# Independent draws of all chains together: so many know their own error to 1 / √(2 (8 − 1)) = 27%. Twice as many would
# refuse sound chains of 3 × 50 draws at an autocorrelation time of 8; half as many know their error to 41%.
MIN_INDEPENDENT = 8.0
MAX_TEMPERATURE = 2.0
# Temperatures at which the chains have come to rest. In a quadratic loss λ̂ is proportional to the width of the law, as
# the temperature is: above 1.1 it is more than 10% too large. Below 1 the flat directions of a singular model, which λ̂
# hardly feels, fill last: 26 was estimated as 25.8 ± .6 at .83. A calibration's trials count from .8 too.
MIN_TEMPERATURE_AT_REST, MAX_TEMPERATURE_AT_REST = 0.8, 1.1
FINITE_TIME = "finite-time"


def accepted(verdicts: Any) -> np.ndarray:
    """Whether estimates can be used: "ok", and "finite-time" as a number of its settings."""
    return np.isin(np.asarray(verdicts).astype(str), ["ok", FINITE_TIME])


def verdict(row: dict[str, Any], excess: np.ndarray, pull: np.ndarray | None, memory: Memory, data: xr.Dataset) -> str:
    """The verdict on one estimate with the numbers of `row`, from its draws (chain, draw): `pull` is nbeta ∇L·(w−w*).

    What failed comes first: see `devmon.analysis.llc` for the words.
    """
    shared = bool(data.attrs.get("shared_batches"))
    if row["low"] > float(data.attrs.get("parameters", np.inf)) or row["temperature"] > MAX_TEMPERATURE or _grows(data):
        return "diverged"
    if pull is not None:
        mean, se, _ = mean_and_error(pull, shared)
        if mean + 2 * Z * se < 0:
            return "negative"
    if row["high"] < 0:
        return "negative"
    error = 2 * row["temperature_se"]
    low, high = min(MIN_TEMPERATURE_AT_REST, 1 - error), max(MAX_TEMPERATURE_AT_REST, 1 + error)
    if row["temperature"] < low or row["temperature"] > high:
        # Chains on their way drift together and have forgotten nothing yet: they only have to agree with each other.
        common = excess.mean(0) - excess.mean()
        return FINITE_TIME if chains_agree(excess - common, memory) else "not mixed"
    enough = excess.size / memory.time >= MIN_INDEPENDENT
    return "ok" if enough and chains_agree(excess, memory) and not drifts(excess, memory) else "not mixed"


def _grows(dataset: xr.Dataset) -> bool:
    """Whether a chain's last tenth lies wholly beyond three times the farthest of its sixth tenth."""
    if "distance" not in dataset:
        return False
    distance = dataset["distance"].transpose("chain", "draw").values
    tenth = max(1, distance.shape[1] // 10)
    middle = distance.shape[1] // 2
    early, late = distance[:, middle : middle + tenth].max(1), distance[:, -tenth:].min(1)
    return bool((late > 3 * early).any())
