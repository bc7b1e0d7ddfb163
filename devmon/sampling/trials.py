"""Short runs of a calibration, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Callable

import xarray as xr

from devmon.analysis.derive.llc import mean_and_error, scaled_excess

LEAST_VALLEY = 0.75


LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.8, 1.15


HEALTHY = ("ok", "not mixed")


Trial = tuple[xr.Dataset, xr.Dataset]  # traces and what is derived from them


Run = Callable[..., list[Trial]]  # of lr, gamma, steps a draw (and batch size): one trial a model


def _healthy(trials: list[Trial]) -> bool:
    return all(result["verdict"].item() in HEALTHY for _, result in trials)


def _settled(trials: list[Trial]) -> bool:
    """Whether the chains fill the directions they have, and stay where the loss rises as around w*."""
    return _healthy(trials) and all(
        LEAST_TEMPERATURE <= result["temperature"].item() <= MOST_TEMPERATURE
        and result["valley"].item() >= LEAST_VALLEY
        for _, result in trials
    )


def _error(trials: list[Trial]) -> float:
    """The largest relative error; it grows where the score of far weights is noise."""
    return max(abs(result["se"].item() / result["llc"].item()) for _, result in trials)


def _suspect(trial: Trial, tolerance: float) -> bool:
    """Whether gradient noise may have added more than the tolerance to λ̂. SGLD's own step-size heat along flat
    directions, a factor 1 / (1 − lr gamma / 4), does not: it spreads the chain where the loss does not change."""
    traces, result = trial
    attrs = traces.attrs
    expected = 1 / (1 - attrs["lr"] * attrs["gamma"] / 4) if attrs["kernel"] in ("sgld", "preconditioned") else 1.0
    heat = int(attrs["parameters"]) / 2 * (result["temperature"].item() - expected)
    return heat > tolerance * max(result["llc"].item() - heat, 0.0)


def _difference(one: Trial, other: Trial) -> tuple[float, float]:
    """How far two trials are apart and its error, over λ̂: they share noise and batches, which makes it small."""
    difference, error = _signed_difference(one, other)
    return abs(difference), error


def _signed_difference(one: Trial, other: Trial) -> tuple[float, float]:
    burn_in = int(one[0].attrs["burn_in"])
    excess = [scaled_excess(traces).values[:, burn_in:] for traces, _ in (one, other)]
    difference, error, _ = mean_and_error(excess[0] - excess[1], bool(one[0].attrs["shared_batches"]))
    scale = max(abs(other[1]["llc"].item()), 1e-300)
    return difference / scale, error / scale


def _same(one: Trial, other: Trial, tolerance: float) -> bool:
    difference, error = _difference(one, other)
    return difference <= max(tolerance, 1.645 * error)


def _undecided(one: Trial, other: Trial, tolerance: float) -> bool:
    """Whether the trials agree only because they are short."""
    difference, error = _difference(one, other)
    return tolerance / 2 < error and tolerance < difference + 1.645 * error and difference <= 1.645 * error


def _variates_pay(traces: xr.Dataset, tolerance: float) -> bool:
    """Whether the noise that control variates took away would have doubled the variance of the score, or heated the
    chain: E[linear²] = E‖w − w*‖² trace(noise) / parameters, if noise and displacement have no common direction."""
    kept = traces.isel(draw=slice(int(traces.attrs["burn_in"]), None))
    linear, excess = kept["linear"].values, scaled_excess(kept).values
    nbeta, lr, size = traces.attrs["nbeta"], traces.attrs["lr"], traces.attrs["parameters"]
    noise = size * (linear**2).mean() / max(float((kept["distance"].values ** 2).mean()), 1e-300)
    heat = lr * nbeta**2 * noise / 8
    return bool((nbeta * linear).var() > excess.var() or heat > 0.5 * tolerance * abs(excess.mean()))
