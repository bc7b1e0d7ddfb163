"""Whether λ̂ is at its limit: its estimates at several nbeta, the WBIC slope, and the multiplicity where it shows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import stdtrit

from devmon.analysis.derive.errors import LEVEL, Z, paired_batches
from devmon.analysis.derive.llc import llc, scaled_excess
from devmon.analysis.derive.verdicts import accepted
from devmon.errors import DataError

# λ̂ is at its limit where a tenfold nbeta moves it by no more than this share, at the far end of the 90% interval.
FLAT_PER_DECADE = 0.10

# The law of K = h (w1 w2)² under the localising Gaussian has Z ∝ e^x K₀(x), x = gamma² / 8 nbeta h, so that
# λ̂ = ½ − 1 / A with A = log(nbeta h / gamma²) + 4 log 2 − γ_Euler, and E[K] is h / gamma² under the Gaussian alone.
SHIFT = 4 * math.log(2) - 0.57721566
# Below this A the next term, 1 / A², is a quarter of the first.
LEAST_LOG = 4.0
# A multiplicity is told where its 90% interval lies within this of a whole number.
WHOLE = 1 / 3

OVER_RUNGS = ("llc", "se", "low", "high", "temperature", "anharmonicity", "verdict")


def ladder(dataset: xr.Dataset) -> xr.Dataset:
    """λ̂ over the rungs of a ladder of nbeta, from traces sampled with several (`nbeta=[…]`), a leading step allowed.

    All rungs share noise and batches, so that their differences are known far better than each. Returned:

    - `llc`, `se`, `low`, `high`, `temperature`, `anharmonicity`, `verdict` (nbeta): as from `llc`, rung by rung. The
      rest is from the rungs that are accepted; NaN where there are fewer than two.
    - `wbic_slope`, `wbic_slope_se`, `wbic_slope_low`, `wbic_slope_high`: λ as the slope of E[L] in the temperature
      1 / nbeta (Watanabe 2013: E[n L] = n L₀ + λ / β), by least squares of λ̂ on λ + offset · nbeta. It needs no loss
      at w*.
    - `offset`, `offset_se`, loss: the loss at the bottom of the valley minus that at w*. Null: 0; below 0 w* is no
      minimum, and λ̂ at this nbeta is too low by nbeta times it.
    - `trend`, `trend_se`: change of λ̂ in an e-fold nbeta. Null: 0.
    - `limit`: "at its limit" where tenfold nbeta moves λ̂ by at most 10% (of λ̂, with the trend's 90% interval);
      "rising": λ̂ is a lower bound, since gamma holds curved directions back, or the approach is logarithmic;
      "falling": w* is no minimum, or the chains at small nbeta meet another shape of the loss; else "not told".
    - `multiplicity`: θ of F = λ log n − (θ − 1) log log n, where it is told, else NaN. λ̂ rises by
      (θ − 1)(1 / A − 1 / (A + r)) over nbeta ratios of e^r, with A the logarithm of nbeta times the loss within reach
      of the localising Gaussian. θ above 1 is told only where the loss grows faster than a quadratic one.

    Raises DataError for traces without a ladder.
    """
    if "ladder_loss" not in dataset:
        raise DataError(
            "expected LLC traces of several nbeta, got those of one: sample with nbeta=[2000, 1000, 500], the first of "
            "which is that of λ̂"
        )
    if "step" not in dataset.dims:
        return _one(dataset)
    rows = [_one(dataset.isel(step=i)) for i in range(dataset.sizes["step"])]
    return xr.concat(rows, "step", combine_attrs="override").assign_coords(step=dataset["step"])


def _one(dataset: xr.Dataset) -> xr.Dataset:
    rungs = sorted(_rungs(dataset), key=lambda rung: float(rung.attrs["nbeta"]))
    nbeta = np.array([float(rung.attrs["nbeta"]) for rung in rungs])
    estimates = [llc(rung) for rung in rungs]
    over: dict[str, Any] = {
        name: ("nbeta", np.array([each[name].item() for each in estimates]), dict(estimates[0][name].attrs))
        for name in OVER_RUNGS
    }
    skip = int(estimates[0].attrs["burn_in"])
    good = accepted(over["verdict"][1])
    numbers = dict.fromkeys(_WORDS, np.nan)
    limit = "not told"
    if good.sum() >= 2:
        excess = np.stack([scaled_excess(rung).transpose("chain", "draw").values[:, skip:] for rung in rungs])
        shared = bool(dataset.attrs.get("shared_batches"))
        batches = paired_batches(excess[good], shared)
        numbers, limit = _fits(nbeta[good], batches)
        top = np.flatnonzero(good)[-1]
        beyond = float((over["anharmonicity"][1][top] - 1) * over["llc"][1][top])
        numbers["multiplicity"] = _multiplicity(nbeta[good], batches, dataset, beyond)
    about: dict[str, Any] = {
        name: ((), numbers[name], {"long_name": text, "units": units}) for name, (text, units) in _WORDS.items()
    }
    about["limit"] = ((), np.array(limit, dtype=object), {"long_name": "whether λ̂ is at its limit", "units": ""})
    return xr.Dataset(over | about, {"nbeta": nbeta}, dict(dataset.attrs))


_WORDS = {
    "wbic_slope": ("local learning coefficient, by the slope of E[L] in 1 / nbeta", "1"),
    "wbic_slope_se": ("standard error of wbic_slope (90% interval / 1.645)", "1"),
    "wbic_slope_low": ("lower end of the 90% interval of wbic_slope", "1"),
    "wbic_slope_high": ("upper end of the 90% interval of wbic_slope", "1"),
    "offset": ("loss at the bottom of the valley minus that at w*", "loss"),
    "offset_se": ("standard error of offset", "loss"),
    "trend": ("change of the LLC in an e-fold nbeta", "1"),
    "trend_se": ("standard error of trend", "1"),
    "multiplicity": ("multiplicity, NaN where it is not told", "1"),
}


def _rungs(dataset: xr.Dataset) -> list[xr.Dataset]:
    """The traces of each rung, as a dataset that `llc` reads: the first, then the further ones."""
    traces = {str(name): array for name, array in dataset.data_vars.items() if {"chain", "draw"} <= set(array.dims)}
    first = {name: array for name, array in traces.items() if "rung" not in array.dims}
    rungs = [xr.Dataset(first, attrs=dataset.attrs)]
    for i, nbeta in enumerate(dataset["rung"].values):
        own = {name.removeprefix("ladder_"): traces[name].isel(rung=i, drop=True) for name in set(traces) - set(first)}
        rungs.append(xr.Dataset(own, attrs=dataset.attrs | {"nbeta": float(nbeta)}))
    return rungs


def _contrast(batches: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The mean of batches (batch, rung) times weights (rung,), and its error as a Student interval over 1.645."""
    values = batches @ weights
    if len(values) < 2:
        return float(values.mean()), np.nan
    widen = stdtrit(len(values) - 1, 0.5 + LEVEL / 2) / Z
    return float(values.mean()), float(widen * values.std(ddof=1) / math.sqrt(len(values)))


def _fits(nbeta: np.ndarray, batches: np.ndarray) -> tuple[dict[str, float], str]:
    """Least squares of λ̂ on nbeta (the WBIC slope) and on its logarithm (the trend), and the word on the limit."""
    ones = np.ones_like(nbeta)
    of_slope, of_offset = np.linalg.pinv(np.stack([ones, nbeta / nbeta.max()], 1))
    of_trend = np.linalg.pinv(np.stack([ones, np.log(nbeta)], 1))[1]
    (slope, slope_se), (offset, offset_se) = _contrast(batches, of_slope), _contrast(batches, of_offset)
    trend, trend_se = _contrast(batches, of_trend)
    numbers = {"wbic_slope": slope, "wbic_slope_se": slope_se, "wbic_slope_low": slope - Z * slope_se}
    numbers |= {"wbic_slope_high": slope + Z * slope_se, "trend": trend, "trend_se": trend_se}
    numbers |= {"offset": offset / nbeta.max(), "offset_se": offset_se / nbeta.max()}
    allowed = FLAT_PER_DECADE * abs(float(batches.mean())) / math.log(10)
    if abs(trend) + Z * trend_se <= allowed:
        return numbers, "at its limit"
    if abs(trend) > Z * trend_se:
        return numbers, "rising" if trend > 0 else "falling"
    return numbers, "not told"


def _multiplicity(nbeta: np.ndarray, batches: np.ndarray, dataset: xr.Dataset, beyond: float) -> float:
    """θ, or NaN where more than one is possible. `beyond` is ½ nbeta E[∇L·δ] − λ̂ at the largest nbeta: 0 in a quadratic
    loss, where a rise of λ̂ is directions that gamma holds back."""
    ends = np.zeros(len(nbeta))
    ends[0], ends[-1] = -1, 1
    rise, error = _contrast(batches, ends)
    reached, reached_beyond = float(dataset["ladder_reach"]), float(dataset["ladder_reach_beyond"])

    def more(reach: float) -> tuple[float, float]:  # θ − 1, with the ends of its interval
        lowest = math.log(nbeta[0] * reach) + SHIFT if 0 < reach < math.inf else -math.inf
        if not lowest >= LEAST_LOG:
            return -math.inf, math.inf
        ratio = math.log(nbeta[-1] / nbeta[0])
        scale = lowest * (lowest + ratio) / ratio
        return (rise - Z * error) * scale, (rise + Z * error) * scale

    # The whole rise of the loss is at least that of the singular directions: θ of 2 would show more clearly than this.
    low, high = more(reached)
    if low >= -WHOLE and high <= WHOLE:
        return 1.0
    # A multiplicity needs a loss beyond the second order: for products of squares `beyond` is at least ½ λ̂ of theirs.
    low, high = more(reached_beyond)
    whole = round((low + high) / 2) if math.isfinite(low + high) else 0
    told = whole >= 1 and whole - WHOLE <= low and high <= whole + WHOLE and beyond >= 0.25
    return 1.0 + whole if told else np.nan
