"""Choosing step size, localisation and control variates where λ̂ is flat and the chains are healthy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from devmon.analysis.derive.llc import llc, mean_and_error, scaled_excess
from devmon.errors import InstrumentError
from devmon.sampling.data import Examples, as_examples, draw_batches
from devmon.sampling.estimate import Settings, sample
from devmon.sampling.flat import Flat
from devmon.sampling.losses import Loss, check_losses
from devmon.sampling.masks import as_mask
from devmon.snapshot import derive_seed

RATIO = 10**0.5  # between the step sizes and the gammas that are compared
GAMMAS = tuple(1 / RATIO**k for k in range(1, 8))  # over the largest curvature of nbeta L
GAMMA_FOR_LR = 0.1
LEAST_VALLEY = 0.75
LONGEST_TRIAL = 2000  # steps a chain
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.8, 1.15

HEALTHY = ("ok", "not mixed")

Trial = tuple[xr.Dataset, xr.Dataset]  # traces and what is derived from them
Run = Callable[..., list[Trial]]  # of lr, gamma, steps a draw (and batch size): one trial a model


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


def largest_curvature(model: nn.Module, loss: Loss, data: Any, settings: Settings, *, rounds: int = 12) -> float:
    """The largest curvature of the mean loss at w*, by power iteration on differences of gradients.

    Of large data a part stands for all, at least 512 examples. Differences need no second derivative, which fused
    attention lacks.
    """
    examples = as_examples(data)
    mask = as_mask(settings.mask, model)
    flat = Flat(model, loss, torch.float64, None if mask is None else mask.names)
    where = None if mask is None else mask.vector(flat.names, flat.shapes, flat.center)
    examples = examples.to(flat.center.device, torch.float64)
    generator = torch.Generator().manual_seed(settings.seed)
    size = max(512, int(1e8 / (flat.center.numel() * examples.numel())))
    index = torch.randperm(examples.n, generator=generator)[:size].to(flat.center.device)
    direction = torch.randn(flat.center.shape, generator=generator, dtype=torch.float64).to(flat.center.device)
    curvature = 0.0
    for _ in range(rounds):
        if where is not None:
            direction = direction * where
        direction = direction / direction.norm().clamp(min=1e-300)
        step = 1e-4 * (1 + flat.center.norm() / math.sqrt(flat.center.numel()))
        ends = [_gradient(flat, examples, index, flat.center + sign * step * direction) for sign in (1, -1)]
        product = (ends[0] - ends[1]) / (2 * step)
        curvature = float(product.norm() if where is None else (product * where).norm())
        direction = product
    if not math.isfinite(curvature) or curvature == 0:
        raise InstrumentError(f"the loss has curvature {curvature} at w*: nothing sets a scale, give lr and gamma")
    return curvature


def noise_heats(model: nn.Module, loss: Loss, data: Any, settings: Settings, *, batches: int = 8) -> bool:
    """Whether the gradient noise at w* alone would add more than 1% to λ̂: then control variates pay.

    Minibatches add lr nbeta² tr Cov(∇L_B(w*)) / 8 to λ̂ (SGLD on a quadratic: (lr nbeta / 2)² Cov to the noise of a step),
    here over half of the parameters, the most that λ can be. Costs `batches` gradients.
    """
    examples = as_examples(data)
    if settings.batch_size >= examples.n:
        return False
    mask = as_mask(settings.mask, model)
    flat = Flat(model, loss, torch.float64 if settings.float64 else torch.float32, None if mask is None else mask.names)
    where = None if mask is None else mask.vector(flat.names, flat.shapes, flat.center)
    examples = examples.to(flat.center.device, flat.center.dtype)
    generator = torch.Generator().manual_seed(derive_seed(settings.seed, "gradient noise"))
    rows = draw_batches(examples.n, settings.batch_size, batches, generator).to(flat.center.device)
    flat.bind(flat.center, torch.zeros_like(flat.center))
    check_losses(flat.losses(examples.batch(rows[0])), len(rows[0]))
    grads = torch.stack([_gradient(flat, examples, row, flat.center) for row in rows])
    grads = grads if where is None else grads * where
    trace = float(grads.var(0).sum())
    size = flat.center.numel() if where is None else int(where.sum())
    nbeta = examples.n / math.log(max(examples.n, 2)) if settings.nbeta is None else settings.nbeta
    return settings.lr * nbeta**2 * trace / 8 > 0.01 * size / 2


def _gradient(flat: Flat, examples: Examples, index: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    total, grad = torch.zeros_like(position), torch.zeros_like(position)
    flat.bind(position, grad)
    for part in index.split(256):
        grad.zero_()
        flat.backward(examples.batch(part))
        total.add_(grad, alpha=len(part) / len(index))
    return total


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
