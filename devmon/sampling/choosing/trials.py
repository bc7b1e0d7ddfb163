"""Short runs of a calibration at one choice of its settings, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from torch import nn

from devmon.analysis.derive.errors import mean_and_error, paired_batches
from devmon.analysis.derive.llc import llc, scaled_excess
from devmon.sampling.center import Memo
from devmon.sampling.constants import (
    AT_REST,
    BUDGET,
    MIN_ANHARMONICITY,
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
    """What a calibration chooses, where trials are run; `batch_size` None is that of the settings it starts from.

    `lr` and `gamma` are rounded, so that two ways to a number are one point.
    """

    lr: float
    gamma: float
    steps_per_draw: int
    control_variate: bool = True
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "gamma"):
            object.__setattr__(self, name, float(f"{getattr(self, name):.6g}"))


@dataclass(frozen=True)
class Trial:
    """The traces of one model at one point, and what `devmon.analysis.llc` derives from them."""

    traces: xr.Dataset
    result: xr.Dataset


class Trials:
    """The trials of all models at the points asked for: each point is run once, and recorded when it is.

    `start` gives what a calibration does not choose, with `nbeta` a number. All models share noise and batches. A
    trial that the budget does not allow is not run: ask `affordable` first. `spent` and `budget` count examples'
    gradients.
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
        budget: float | None = None,
        spent: int = 0,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.models, self.loss, self.examples, self.start, self.seed = models, loss, examples, start, seed
        self.tolerance, self.progress = tolerance, progress
        self.settings = replace(
            start,
            draws=TRIAL_DRAWS,
            burn_in=TRIAL_BURN_IN,
            chains=max(TRIAL_CHAINS, start.chains),
            examples=0,
            acceptance=False,
        )
        # The steps a draw of the longest estimate, and those of a trial whose burn-in is as long as that one's.
        self.longest = max(1, max_steps // (start.draws + start.burn_in))
        self.most_steps_per_draw = max(1, start.burn_in * self.longest // TRIAL_BURN_IN)
        self.given, self.spent = budget, spent
        self.control_variate = start.control_variate  # of the estimate to come, and so what that costs
        self._at: dict[Point, list[Trial]] = {}
        self._rows: list[dict[str, Any]] = []
        self._memos: list[Memo] = [{} for _ in models]  # of what is the same at w* for all points

    @property
    def budget(self) -> float:
        if self.given is not None:
            return self.given
        return BUDGET * self.estimate_cost(self.longest, self.control_variate)

    def estimate_cost(self, steps_per_draw: int, control_variate: bool) -> int:
        """Examples' gradients of one estimate of so many steps a draw."""
        steps = (self.start.draws + self.start.burn_in) * steps_per_draw
        return self._cost(self.start.chains * steps * self.start.batch_size, control_variate)

    def paid(self, control_variate: bool) -> float:
        """The steps a draw with which an estimate costs as much as what is spent allows."""
        return self.spent / BUDGET / self.estimate_cost(1, control_variate)

    def affordable(self, *points: Point, share: float = 1.0) -> bool:
        """Whether what the trials at the points still cost is at most this share of what is left of the budget."""
        cost = sum(self._cost_at(point) for point in points if point not in self._at)
        return cost <= share * max(self.budget - self.spent, 0)

    def _cost_at(self, point: Point) -> int:
        steps = self.settings.chains * (TRIAL_DRAWS + TRIAL_BURN_IN) * point.steps_per_draw
        met = steps * (point.batch_size or self.start.batch_size)
        return len(self.models) * self._cost(met, point.control_variate)

    def _cost(self, met: int, control_variate: bool) -> int:
        """Of `met` examples, of their gradients at w* (one for all chains that share batches), and one over all."""
        if not control_variate:
            return met
        return met + (met // self.settings.chains if self.start.shared_batches else met) + self.examples.n

    def at(self, point: Point) -> list[Trial]:
        """The trials at `point`, one a model."""
        if point not in self._at:
            self.spent += self._cost_at(point)
            self._at[point] = [self._run(point, number) for number in range(len(self.models))]
        return self._at[point]

    def table(self) -> xr.Dataset:
        """One row a trial, in the order they were run; those with another batch size are left out."""
        return xr.Dataset({name: ("trial", np.array([row[name] for row in self._rows])) for name in self._rows[0]})

    def _run(self, point: Point, number: int) -> Trial:
        if self.progress is not None:
            where = f"lr {point.lr:.2g}, gamma {point.gamma:.3g}, checkpoint {number + 1} of {len(self.models)}"
            self.progress(f"{where}; with it {self.spent / self.budget:.0%} of the budget")
        settings = replace(
            self.settings,
            lr=point.lr,
            gamma=point.gamma,
            steps_per_draw=point.steps_per_draw,
            control_variate=point.control_variate,
            batch_size=self.start.batch_size if point.batch_size is None else point.batch_size,
        )
        memo = self._memos[number]
        traces = sample(self.models[number], self.loss, self.examples, settings, seed=self.seed, memo=memo)
        trial = Trial(traces, llc(traces))
        if point.batch_size is None:
            row = {"model": number, "lr": point.lr, "gamma": point.gamma, "steps_per_draw": point.steps_per_draw}
            self._rows.append(row | {name: trial.result[name].item() for name in RECORDED})
        return trial


def healthy(trials: Sequence[Trial]) -> bool:
    """Whether no verdict says that the chains left w*; short trials need not have mixed."""
    return all(trial.result["verdict"].item() not in ("non-finite", "diverged", "negative") for trial in trials)


def settled(trials: Sequence[Trial]) -> bool:
    """Whether the chains fill the directions they have, and stay where the loss rises as around w*, within the errors
    of both."""
    return healthy(trials) and all(
        abs(t.result["temperature"].item() - 1) <= max(AT_REST, t.result["temperature_se"].item())
        and t.result["anharmonicity"].item() + growth_error(t) >= MIN_ANHARMONICITY
        for t in trials
    )


def cold(trials: Sequence[Trial]) -> bool:
    """Whether some chains have not filled their flat directions yet, by more than the error."""
    return any(1 - t.result["temperature"].item() > max(AT_REST, t.result["temperature_se"].item()) for t in trials)


def heated(trials: Sequence[Trial]) -> float:
    """By how much minibatch noise or steps widen the law at least: what the temperature exceeds 1 and its error by."""
    return max(max(0.0, t.result["temperature"].item() - 1 - t.result["temperature_se"].item()) for t in trials)


def growth_error(trial: Trial) -> float:
    """The standard error of `anharmonicity`, a ratio of two means over the same draws."""
    burn_in, shared = int(trial.traces.attrs["burn_in"]), bool(trial.traces.attrs["shared_batches"])
    growth, value = trial.result["anharmonicity"].item(), trial.result["llc"].item()
    pull = float(trial.traces.attrs["nbeta"]) * trial.traces["slope"].values[:, burn_in:] / 2
    excess = scaled_excess(trial.traces).values[:, burn_in:]
    return mean_and_error(pull - growth * excess, shared)[1] / max(abs(value), 1e-300)


def relative_error(trials: Sequence[Trial]) -> float:
    """The largest se / λ̂."""
    return max(abs(trial.result["se"].item() / trial.result["llc"].item()) for trial in trials)


def covariance(trials: Sequence[Trial]) -> np.ndarray:
    """The covariance (trial, other) of λ̂ of trials of one model whose noise is common."""
    kept = [scaled_excess(t.traces).values[:, int(t.traces.attrs["burn_in"]) :] for t in trials]
    batches = paired_batches(np.stack(kept), bool(trials[0].traces.attrs["shared_batches"]))
    together = np.atleast_2d(np.cov(batches, rowvar=False)) / len(batches)
    # Each variance is what the trial itself says; batches give the correlations.
    errors = np.array([t.result["se"].item() for t in trials])
    own = np.sqrt(np.maximum(np.diag(together), 1e-300))
    return together * np.outer(errors / own, errors / own)


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
