"""Choosing step size, localisation and control variates where λ̂ is flat and the chains are healthy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import xarray as xr
from torch import nn

from devmon.analysis.derive.llc import llc
from devmon.errors import InstrumentError
from devmon.sampling.curvature import largest_curvature
from devmon.sampling.data import as_examples
from devmon.sampling.losses import Loss
from devmon.sampling.traces import Settings, sample
from devmon.sampling.trials import (
    Run,
    Trial,
    _difference,
    _error,
    _healthy,
    _same,
    _settled,
    _signed_difference,
    _suspect,
    _undecided,
    _variates_pay,
)

RATIO = 10**0.5  # between the step sizes and the gammas that are compared
GAMMAS = tuple(1 / RATIO**k for k in range(1, 8))  # over the largest curvature of nbeta L
GAMMA_FOR_LR = 0.1
LONGEST_TRIAL = 2000  # steps a chain


@dataclass(frozen=True)
class Calibration:
    """The settings chosen for a whole trajectory, the trials behind them, and the reasons in words.

    `trials` has one row a trial: `lr`, `gamma`, `steps_per_draw`, `model` (0 is the first model given), `llc`, `se`,
    `ess`, `rhat`, `temperature`, `valley`, `verdict`. `flat` says whether a plateau was found; where none is, λ̂ depends
    on gamma and belongs beside it. `systematic` is the relative error of λ̂ that these settings leave: the heat of
    gradient noise at this lr, and what still moves with gamma. It is common to all checkpoints.
    """

    settings: Settings
    trials: xr.Dataset
    reasons: str
    flat: bool
    systematic: float


def calibrate(
    models: nn.Module | Sequence[nn.Module],
    loss: Loss,
    data: Any,
    start: Settings | None = None,
    *,
    tolerance: float = 0.02,
    max_steps: int = 3000,
    progress: Callable[[str], None] | None = None,
) -> Calibration:
    """Settings that suit all of `models` (a late checkpoint first, then a middle one), chosen by short trials.

    The largest curvature of nbeta L at w* sets the scale. lr: from one over it downwards by √10 until the chains are
    healthy and the next smaller step gives the same λ̂, within `tolerance` or error, in the same time lr · steps. gamma:
    from a third of that curvature downwards by √10, in trials that are lengthened while their error hides a move, for as
    long as the chains fill their flat directions (temperature from 0.8 to 1.15) and the loss still rises as in a valley
    (`valley` of `devmon.analysis.llc` at least 0.75), lr falling on where gradient noise heats them. The choice is the
    first at which λ̂ moved least; `flat` says whether that is a plateau, a move within `tolerance` or error. Control
    variates stay where gradient noise would heat by more than half the tolerance or would double the variance of the
    score. What heat is left is measured with batches twice as large and the same noise, and lr, to which it is
    proportional, is lowered until it is at most half of `tolerance`, or of the error that `max_steps` allow. The number of steps a draw is what brings
    the error to `tolerance` after a burn-in as long as that of the trials, within `max_steps` a chain. All else, nbeta
    and kernel included, is taken from `start`. `progress` hears of each trial.

    Raises InstrumentError where no step size gives a finite and stable run.
    """
    models = [models] if isinstance(models, nn.Module) else list(models)
    start = start or Settings(lr=0.0, gamma=0.0, sampler="baoab")
    examples = as_examples(data)
    nbeta = examples.n / math.log(max(examples.n, 2)) if start.nbeta is None else start.nbeta
    trial = replace(
        start,
        nbeta=nbeta,
        draws=100,
        burn_in=100,
        steps_per_draw=1,
        control_variate=True,
        chains=max(4, start.chains),
        examples=0,
        acceptance=False,
    )
    stiff = nbeta * max(largest_curvature(model, loss, examples, start) for model in models)
    rows: list[dict[str, Any]] = []

    @cache
    def tried(lr: float, gamma: float, steps: int, batch_size: int, variates: bool) -> list[Trial]:
        trials = []
        for number, model in enumerate(models):
            if progress is not None:
                progress(f"lr {lr:.2g}, gamma {gamma:.3g}, checkpoint {number + 1} of {len(models)}")
            changed = replace(trial, lr=lr, gamma=gamma, steps_per_draw=steps, batch_size=batch_size)
            traces = sample(model, loss, examples, replace(changed, control_variate=variates))
            trials.append((traces, llc(traces)))
            if batch_size == start.batch_size:
                names = ("llc", "se", "ess", "rhat", "temperature", "valley", "verdict")
                found = {name: trials[-1][1][name].item() for name in names}
                rows.append({"model": number, "lr": lr, "gamma": gamma, "steps_per_draw": steps} | found)
        return trials

    def run(lr: float, gamma: float, steps: int, batch_size: int = 0, variates: bool = True) -> list[Trial]:
        return tried(lr, gamma, steps, batch_size or start.batch_size, variates)

    most = max(1, min(max_steps, LONGEST_TRIAL) // (trial.draws + trial.burn_in))
    lr, steps, agreed = _step_size(run, stiff, tolerance, most)
    lr, gamma, steps, plateau, moved = _localisation(run, lr, stiff, tolerance, steps, most)
    variates = any(_variates_pay(traces, tolerance) for traces, _ in run(lr, gamma, steps))
    heat = _heat(run, (lr, gamma, steps), variates, start.batch_size, examples.n)
    longest = start.chains * start.draws * max(1, max_steps // (start.draws + start.burn_in))
    error = _error(run(lr, gamma, steps, variates=variates)) * math.sqrt(trial.chains * trial.draws * steps / longest)
    # a step x times as large heats by heat · x, and the longest run has the error error / √x
    x = min(1.0, max(tolerance / (2 * heat), (error / (2 * heat)) ** (2 / 3))) if heat else 1.0
    lr, steps, heat = lr * x, min(math.ceil(steps / x), most), heat * x
    chosen = run(lr, gamma, steps, variates=variates)
    systematic = math.hypot(heat, moved / (RATIO - 1))  # the error is about proportional to gamma
    error = _error(chosen)
    spent = trial.chains * trial.draws * int(chosen[0][0].attrs["steps_per_draw"])
    wanted = spent * (error / tolerance) ** 2 / start.chains if math.isfinite(error) else math.inf
    draws = start.draws + start.burn_in
    settle = trial.burn_in * steps / max(start.burn_in, 1)  # burn-in as long as that of the trials
    per_draw = int(np.clip(math.ceil(max(wanted / start.draws, settle)), 1, max(1, max_steps // draws)))
    settings = replace(start, nbeta=nbeta, lr=lr, gamma=gamma, control_variate=variates, steps_per_draw=per_draw)
    reasons = (
        f"nbeta {nbeta:.4g}; the largest curvature of nbeta L is {stiff:.3g}. lr {lr:.3g} gives the λ̂ of a step three times "
        f"smaller" + ("" if agreed else ", but no two step sizes tried agreed on λ̂")
        + f". gamma {gamma:.3g} "
        + ("lies on a plateau: three times more gives the same λ̂." if plateau else "is where λ̂ moved least with gamma, "
        "but no plateau: compare only estimates of the same gamma.")
        + f" Control variates {'pay: label noise would heat the chain or drown the score' if variates else 'do not pay'}."
        + f" {per_draw} steps a draw. Beside its own error λ̂ is uncertain by {systematic:.1%}, from lr and gamma."
        + ("" if _settled(chosen) else " The chains did not settle at any gamma tried: take a later checkpoint or a smaller nbeta.")
    )  # fmt: skip
    trials = xr.Dataset({name: ("trial", np.array([row[name] for row in rows])) for name in rows[0]})
    trials.attrs = {"kind": "calibration", "reasons": reasons, "lr": lr, "gamma": gamma, "nbeta": float(nbeta)}
    return Calibration(settings, trials, reasons, agreed and plateau, systematic)


def _step_size(run: Run, stiff: float, tolerance: float, most: int) -> tuple[float, int, bool]:
    """The step size, the steps a draw that its chains need, and whether λ̂ agreed with that of a smaller one."""
    gamma = GAMMA_FOR_LR * stiff
    top = 1 / (stiff + gamma)

    def tried(lr: float) -> tuple[list[Trial], int]:
        steps = min(math.ceil(top / lr), most)  # all trials are equally long in time lr · steps
        return run(lr, gamma, steps), steps

    lr, (trials, steps) = top, tried(top)
    for _ in range(6):
        smaller, longer = tried(lr / RATIO)
        if _healthy(trials) and all(_same(*pair, tolerance) for pair in zip(trials, smaller, strict=True)):
            return lr, steps, True
        lr, trials, steps = lr / RATIO, smaller, longer
    if _healthy(trials):
        return lr, steps, False
    verdicts = ", ".join(sorted({result["verdict"].item() for _, result in trials}))
    raise InstrumentError(
        f"no step size from {top:.2g} down to {lr:.2g} ran healthily ({verdicts}): w* is perhaps no minimum; take a "
        f"later checkpoint or a smaller nbeta"
    )


def _heat(run: Run, where: tuple[float, float, int], variates: bool, size: int, n: int) -> float:
    """How much gradient noise adds to λ̂, relative: it is proportional to the variance of a batch's mean and to lr.

    Trials with batches twice as large share the noise of the step, so the difference is known better than either.
    """
    larger = min(2 * size, n)
    if larger == size:
        return 0.0
    scale = (1 / size - 1 / n) / (1 / size - 1 / larger)
    pairs = zip(run(*where, size, variates), run(*where, larger, variates), strict=True)
    return max(0.0, scale * max(_signed_difference(*pair)[0] for pair in pairs))


def _localisation(
    run: Run, first_lr: float, stiff: float, tolerance: float, steps: int, most: int
) -> tuple[float, float, int, bool, float]:
    """lr, gamma, the steps a draw of their trials, whether gamma lies on a plateau, and how far λ̂ moved to get there.

    Large gammas hold curved directions back; under small ones the chains still spread along flat directions, to where
    the loss has another shape, and λ̂ would grow with their length.
    """
    lr = first_lr
    tried: list[tuple[float, list[Trial]]] = []
    moves: list[float] = []
    flat: list[bool] = []
    for share in GAMMAS:
        trials = run(lr, share * stiff, steps)
        while lr > 0.1 * first_lr and any(_suspect(trial, tolerance) for trial in trials):
            longer = min(math.ceil(steps * RATIO), most)
            smaller = run(lr / RATIO, share * stiff, longer)
            if all(_difference(*pair)[0] <= tolerance for pair in zip(trials, smaller, strict=True)):
                break
            lr, steps, trials = lr / RATIO, longer, smaller  # gradients are noisier farther out
            tried[-1:] = [(gamma, run(lr, gamma, steps)) for gamma, _ in tried[-1:]]
        if not _settled(trials) or (tried and _error(trials) > 2.5 * max(tolerance, _error(tried[0][1]))):
            break
        tried.append((share * stiff, trials))
        if len(tried) == 1:
            continue
        pairs = list(zip(tried[-2][1], tried[-1][1], strict=True))
        while 2 * steps <= most and any(_undecided(*pair, tolerance) for pair in pairs):
            steps *= 2
            tried[-2:] = [(gamma, run(lr, gamma, steps)) for gamma, _ in tried[-2:]]
            pairs = list(zip(tried[-2][1], tried[-1][1], strict=True))
        moves.append(max(_difference(*pair)[0] for pair in pairs))
        flat.append(all(_same(*pair, tolerance) for pair in pairs))
        if moves[-1] <= tolerance or moves[-1] > 1.5 * min(moves):
            break
    if not moves:
        return lr, (tried[0][0] if tried else stiff), steps, False, 1.0  # nothing to compare with
    least = next(k for k, move in enumerate(moves) if move <= 1.25 * min(moves))
    gamma = tried[least + 1][0]  # the smaller of the two: beyond it the other error begins
    return lr, gamma, steps, flat[least], moves[least]
