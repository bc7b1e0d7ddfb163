"""The verdict on an estimate of the LLC, and which verdicts leave a number that can be used."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from devmon.analysis.derive.errors import Z
from devmon.analysis.derive.mixing import chains_agree, drifts

# Independent draws of all chains together: so many know their own error to 1 / √(2 (8 − 1)) = 27%. Twice as many would
# refuse sound chains of 3 × 50 draws at an autocorrelation time of 8; half as many know their error to 41%.
MIN_INDEPENDENT = 8.0
MAX_TEMPERATURE = 2.0
# How far from 1 the temperature of chains at rest is, or its standard error where that is larger. In a quadratic loss λ̂
# is proportional to the width of the law, as the temperature is: beyond it λ̂ is more than 10% off, by chance or not.
AT_REST = 0.1
# E[∇L·δ] / 2 E[ΔL]: 1 where the loss is quadratic. Chains that left the basin of w* have fallen below it.
MIN_GROWTH = 0.75
# Of λ̂: a first-order part, and a bias by minibatch noise, from which the number is no level.
SHARE_THAT_MATTERS = 0.1
# Standard errors that a number must lie beyond a limit.
SIGMAS = 2.0

OK, FINITE_TIME, NO_MINIMUM, NOISY, LOCALISED = "ok", "finite-time", "not a minimum", "gradient noise", "localised"
# Numbers of their settings, not levels: a bound, or biased in a way that is alike at checkpoints of equal settings.
KEPT = (FINITE_TIME, NO_MINIMUM, NOISY, LOCALISED)


def accepted(verdicts: Any) -> np.ndarray:
    """Whether estimates can be used: "ok" as a level, those of `KEPT` for changes at equal settings."""
    return np.isin(np.asarray(verdicts).astype(str), [OK, *KEPT])


def verdict(numbers: dict[str, Any], excess: np.ndarray, data: xr.Dataset) -> str:
    """The verdict on one estimate from its numbers (of `devmon.analysis.llc`) and its draws (chain, draw), the first
    that holds. An estimate is rejected as

    - "non-finite": a chain met NaN or infinity; λ̂ is NaN
    - "diverged": distances still grow, the temperature is above 2, or λ̂ above the number of parameters
    - "negative": λ̂ or E[∇L·(w−w*)] is below 0 by more than its error; the chains found lower losses than w*
    - "left the basin": the loss grows less than .75 of a quadratic one, by more than its error: the chains are where
      the loss has another shape
    - "not mixed": R̂ above its limit or the chains' means apart, a drift common to them, fewer than 8 autocorrelation
      times of draws, or one chain

    and kept, as a number of its settings that is comparable between checkpoints of equal settings but no level, as

    - "finite-time": the temperature is not within .1 of 1, nor by its standard error, while the chains agree
    - "gradient noise": minibatch noise may add more than a tenth to λ̂: control variates, larger batches or a smaller lr
    - "not a minimum": more than a tenth of λ̂ is first-order, by more than its error

    `estimate_llc` makes "localised" of an "ok" whose calibration found no plateau in gamma: a lower bound, kept too.
    """
    memory, value = numbers["memory"], numbers["llc"]
    if not np.isfinite(value):
        return "non-finite"
    # What failed: the number says nothing of w*.
    if numbers["low"] > float(data.attrs.get("parameters", np.inf)) or _grows(data):
        return "diverged"
    if numbers["temperature"] > MAX_TEMPERATURE:
        return "diverged"
    if numbers["high"] < 0 or numbers["pull"] + SIGMAS * Z * numbers["pull_se"] < 0:
        return "negative"
    if numbers["anharmonicity"] + SIGMAS * numbers["anharmonicity_se"] < MIN_GROWTH:
        return "left the basin"
    # Whether the chains are at rest, and agree.
    if abs(numbers["temperature"] - 1) > max(AT_REST, numbers["temperature_se"]):
        # Chains on their way drift together and have forgotten nothing yet: they only have to agree with each other.
        common = excess.mean(0) - excess.mean()
        return FINITE_TIME if chains_agree(excess - common, memory) else "not mixed"
    enough = excess.size / memory.time >= MIN_INDEPENDENT
    if not (enough and chains_agree(excess, memory) and not drifts(excess, memory)):
        return "not mixed"
    # What the law is of: wider than asked for, or not around a minimum.
    if numbers["noise_bias"] > SHARE_THAT_MATTERS * abs(value):
        return NOISY
    first = abs(numbers["first_order"]) - SIGMAS * numbers["first_order_se"]
    if first > SHARE_THAT_MATTERS * abs(value) and not data.attrs.get("without_first_order"):
        return NO_MINIMUM
    return OK


def _grows(dataset: xr.Dataset) -> bool:
    """Whether a chain's last tenth lies wholly beyond three times the farthest of its sixth tenth."""
    if "distance" not in dataset:
        return False
    distance = dataset["distance"].transpose("chain", "draw").values
    tenth = max(1, distance.shape[1] // 10)
    middle = distance.shape[1] // 2
    early, late = distance[:, middle : middle + tenth].max(1), distance[:, -tenth:].min(1)
    return bool((late > 3 * early).any())
