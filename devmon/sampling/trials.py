"""Short runs of a calibration at one choice of its settings, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from torch import nn

from devmon.analysis.derive.errors import mean_and_error
from devmon.analysis.derive.llc import llc, scaled_excess
from devmon.sampling.constants import (
    BIAS_SHARE,
    LONGEST_TRIAL,
    MAX_TRIAL_TEMPERATURE,
    MIN_ANHARMONICITY,
    MIN_TRIAL_TEMPERATURE,
    SAME_SIGMAS,
    TRIAL_BURN_IN,
    TRIAL_CHAINS,
    TRIAL_DRAWS,
)
from devmon.sampling.data import Examples
from devmon.sampling.losses import Loss
from devmon.sampling.traces import Settings, sample

RECORDED = ("llc", "se", "ess", "rhat", "temperature", "anharmonicity", "verdict")


@dataclass(frozen=True)
class Point:
    """What a calibration chooses, where trials are run; `batch_size` None is that of the settings it starts from."""

    lr: float
    gamma: float
    steps_per_draw: int
    control_variate: bool = True
    batch_size: int | None = None


@dataclass(frozen=True)
class Trial:
    """The traces of one model at one point, and what `devmon.analysis.llc` derives from them."""

    traces: xr.Dataset
    result: xr.Dataset


class Trials:
    """The trials of all models at the points asked for: each point is run once, and recorded when it is.

    `start` gives what a calibration does not choose, with `nbeta` a number. All models share noise and batches.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        loss: Loss,
        examples: Examples,
        start: Settings,
        *,
        seed: int = 0,
        tolerance: float = 0.02,
        max_steps: int = 3000,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.models, self.loss, self.examples, self.start, self.seed = models, loss, examples, start, seed
        self.tolerance, self.max_steps, self.progress = tolerance, max_steps, progress
        self.settings = replace(
            start,
            draws=TRIAL_DRAWS,
            burn_in=TRIAL_BURN_IN,
            chains=max(TRIAL_CHAINS, start.chains),
            examples=0,
            acceptance=False,
        )
        self.most_steps_per_draw = max(1, min(max_steps, LONGEST_TRIAL) // (TRIAL_DRAWS + TRIAL_BURN_IN))
        self._at: dict[Point, list[Trial]] = {}
        self._rows: list[dict[str, Any]] = []

    def at(self, point: Point) -> list[Trial]:
        """The trials at `point`, one a model."""
        if point not in self._at:
            self._at[point] = [self._run(point, number) for number in range(len(self.models))]
        return self._at[point]

    def table(self) -> xr.Dataset:
        """One row a trial, in the order they were run; those with another batch size are left out."""
        return xr.Dataset({name: ("trial", np.array([row[name] for row in self._rows])) for name in self._rows[0]})

    def _run(self, point: Point, number: int) -> Trial:
        if self.progress is not None:
            where = f"lr {point.lr:.2g}, gamma {point.gamma:.3g}"
            self.progress(f"{where}, checkpoint {number + 1} of {len(self.models)}")
        settings = replace(
            self.settings,
            lr=point.lr,
            gamma=point.gamma,
            steps_per_draw=point.steps_per_draw,
            control_variate=point.control_variate,
            batch_size=self.start.batch_size if point.batch_size is None else point.batch_size,
        )
        traces = sample(self.models[number], self.loss, self.examples, settings, seed=self.seed)
        trial = Trial(traces, llc(traces))
        if point.batch_size is None:
            row = {"model": number, "lr": point.lr, "gamma": point.gamma, "steps_per_draw": point.steps_per_draw}
            self._rows.append(row | {name: trial.result[name].item() for name in RECORDED})
        return trial


def healthy(trials: Sequence[Trial]) -> bool:
    """Whether no verdict says that the chains left w*; short trials need not have mixed."""
    return all(trial.result["verdict"].item() not in ("non-finite", "diverged", "negative") for trial in trials)


def settled(trials: Sequence[Trial]) -> bool:
    """Whether the chains fill the directions they have, and stay where the loss rises as around w*."""
    return healthy(trials) and all(
        MIN_TRIAL_TEMPERATURE <= trial.result["temperature"].item() <= MAX_TRIAL_TEMPERATURE
        and trial.result["anharmonicity"].item() >= MIN_ANHARMONICITY
        for trial in trials
    )


def relative_error(trials: Sequence[Trial]) -> float:
    """The largest se / λ̂; it grows where the score of weights far from w* is noise."""
    return max(abs(trial.result["se"].item() / trial.result["llc"].item()) for trial in trials)


def difference(trial: Trial, other: Trial) -> tuple[float, float]:
    """λ̂ of a trial minus that of another, and its error, over λ̂: noise and batches are shared, so it is small."""
    burn_in = int(trial.traces.attrs["burn_in"])
    excess, excess_of_other = (scaled_excess(t.traces).values[:, burn_in:] for t in (trial, other))
    mean, error, _ = mean_and_error(excess - excess_of_other, bool(trial.traces.attrs["shared_batches"]))
    scale = max(abs(other.result["llc"].item()), 1e-300)
    return mean / scale, error / scale


def differences(trials: Sequence[Trial], others: Sequence[Trial]) -> list[tuple[float, float]]:
    """Sizes of the differences and their errors, model by model."""
    pairs = [difference(trial, other) for trial, other in zip(trials, others, strict=True)]
    return [(abs(size), error) for size, error in pairs]


def same(trials: Sequence[Trial], others: Sequence[Trial], tolerance: float) -> bool:
    """Whether λ̂ differs for no model by more than the tolerance or what the error explains."""
    return all(size <= max(tolerance, SAME_SIGMAS * error) for size, error in differences(trials, others))


def undecided(trials: Sequence[Trial], others: Sequence[Trial], tolerance: float) -> bool:
    """Whether, for some model, the trials agree only because they are short."""
    return any(
        tolerance / 2 < error and tolerance < size + SAME_SIGMAS * error and size <= SAME_SIGMAS * error
        for size, error in differences(trials, others)
    )


def noise_suspected(trial: Trial, tolerance: float) -> bool:
    """Whether minibatch noise may have added more than the tolerance to λ̂: what the temperature exceeds by, over all
    parameters. SGLD's own step-size bias along flat directions, a factor 1 / (1 − lr gamma / 4) of the temperature,
    does not count: it spreads the chain where the loss does not change."""
    attrs, result = trial.traces.attrs, trial.result
    own = 1 / (1 - attrs["lr"] * attrs["gamma"] / 4) if attrs["kernel"] in ("sgld", "preconditioned") else 1.0
    added = int(attrs["parameters"]) / 2 * (result["temperature"].item() - own)
    return added > tolerance * max(result["llc"].item() - added, 0.0)


def variates_pay(trial: Trial, tolerance: float) -> bool:
    """Whether the noise that control variates took away would have doubled the variance of the score, or biased λ̂ by
    more than its share of the tolerance.

    E[linear²] = E‖w − w*‖² trace(noise) / parameters, if noise and displacement have no common direction; the bias is
    then lr nbeta² trace(noise) / 8 (`devmon.sampling.curvature.noise_bias`).
    """
    attrs = trial.traces.attrs
    kept = trial.traces.isel(draw=slice(int(attrs["burn_in"]), None))
    linear, excess = kept["linear"].values, scaled_excess(kept).values
    nbeta, lr, size = attrs["nbeta"], attrs["lr"], attrs["parameters"]
    noise = size * (linear**2).mean() / max(float((kept["distance"].values ** 2).mean()), 1e-300)
    bias = lr * nbeta**2 * noise / 8
    return bool((nbeta * linear).var() > excess.var() or bias > BIAS_SHARE * tolerance * abs(excess.mean()))
