"""The decisions of a calibration: step size, noise, localisation and length, each with its reason in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from devmon.errors import InstrumentError
from devmon.sampling.choosing.extrapolation import Fit, fit
from devmon.sampling.choosing.plan import Plan
from devmon.sampling.choosing.trials import (
    Point,
    Trials,
    cold,
    covariance,
    difference,
    healthy,
    heated,
    relative_error,
    same,
    settled,
)
from devmon.sampling.constants import (
    BIAS_SHARE,
    FIRST_GAMMA,
    FLAT_WITHIN,
    HEATED,
    NOISE_SHARE,
    RATIO,
    RELAXED,
    REPLANS,
    SAME_SIGMAS,
    STEP_SIZES,
    TRIAL_BURN_IN,
)


@dataclass(frozen=True)
class Local:
    """Where the search for gamma ended.

    - `at`: the point; `missing`: the share of λ̂ that is missing there, as far as the spectrum and the fits can tell
    - `moving`: whether λ̂ still grows as gamma falls by more than the spectrum explains, or nothing could tell
    - `fits`: λ̂(gamma), one a model; none where a single gamma could be tried
    """

    at: Point
    missing: float
    moving: bool
    fits: tuple[Fit, ...]

    @property
    def flat(self) -> bool:
        return not self.moving and self.missing <= FLAT_WITHIN


def variates(trials: Trials, plan: Plan, noise: Sequence[float]) -> tuple[bool, str]:
    """Whether control variates pay: where label noise would bias λ̂ by more than half the tolerance at the largest lr,
    or double the variance of the score at the gamma to come.

    `noise` (model,) is nbeta² tr Cov(∇L_B(w*)). The bias is lr / 8 of it for SGLD, more by the memory of a momentum;
    the score's variance is E‖w − w*‖² / d of it, and λ̂ itself where the loss is quadratic.
    """
    lr, gamma = plan.best(plan.top_lr, 0.0)
    pay = False
    for spectrum, trace in zip(plan.spectra, noise, strict=True):
        value = max(spectrum.llc(gamma), 0.5)
        distance = float((spectrum.counts / (spectrum.scales + gamma)).sum())
        pay |= trace * distance / float(spectrum.counts.sum()) > value
        pay |= 2 * plan.pace * lr * trace / 8 > BIAS_SHARE * trials.tolerance * value
    return pay, "Control variates " + ("pay: label noise would bias λ̂ or drown the score." if pay else "do not pay.")


def step_size(trials: Trials, plan: Plan, control_variate: bool) -> tuple[Point, bool, str]:
    """The largest lr at which the chains are healthy and a step √10 times smaller gives the same λ̂, at the first gamma;
    and whether there is one. Raises InstrumentError where no step size gives a finite and stable run."""
    gamma, lr = FIRST_GAMMA * plan.scale, plan.top_lr

    def steps(lr: float) -> int:  # long enough for every direction to relax
        return math.ceil(RELAXED / (plan.pace * lr * gamma) / TRIAL_BURN_IN)

    def at(lr: float) -> Point:
        return Point(lr, gamma, min(steps(lr), trials.most_steps_per_draw), control_variate)

    # Downwards until two neighbours agree: then the larger has no step-size bias that matters.
    for _ in range(STEP_SIZES):
        if not trials.affordable(at(lr)):
            break
        larger, smaller = trials.at(at(lr)), at(lr / RATIO)
        if healthy(larger):
            if steps(lr / RATIO) > trials.most_steps_per_draw or not trials.affordable(smaller):
                return at(lr), True, f"lr {lr:.3g} runs healthily; smaller steps would take longer than allowed."
            if same(larger, trials.at(smaller), trials.tolerance):
                return at(lr), True, f"lr {lr:.3g} gives the λ̂ of a step three times smaller."
        lr = lr / RATIO
    if trials.affordable(at(lr)) and healthy(trials.at(at(lr))):
        return at(lr), False, f"lr {lr:.3g} is the smallest tried: no two step sizes agreed on λ̂."
    raise InstrumentError(
        f"no step size from {plan.top_lr:.2g} down to {lr:.2g} ran healthily within the budget: w* is perhaps no "
        f"minimum; take a later checkpoint, a smaller nbeta or a larger budget"
    )


def noise(trials: Trials, plan: Plan, at: Point) -> tuple[Point, float, float, str]:
    """lr where the bias of minibatch noise and what localisation takes away are smallest together, with the gamma that
    this lr reaches; and that bias, relative."""
    bias = measured_noise_bias(trials, at)
    lr, gamma = plan.best(at.lr, bias)
    if not trials.affordable(replace(at, lr=lr)):
        lr = at.lr
    left = bias * lr / at.lr
    reason = f"Minibatch noise biases λ̂ by {left:.1%}" + (f" at the lowered lr {lr:.3g}." if lr < 0.99 * at.lr else ".")
    return replace(at, lr=lr), gamma, left, reason


def measured_noise_bias(trials: Trials, at: Point) -> float:
    """How much minibatch noise adds to λ̂, relative: it is proportional to the variance of a batch's mean and to lr.

    Trials with batches twice as large share the noise of the step, so the difference is known better than either. Where
    they would take too much of the budget, it is what the temperature exceeds 1 by. A bias that hides in its error is
    taken as half of that. 0 where a batch is all data.
    """
    size, n = trials.start.batch_size, trials.examples.n
    twice = min(2 * size, n)
    larger = replace(at, batch_size=twice)
    if twice == size:
        return 0.0
    if not trials.affordable(larger, share=NOISE_SHARE):
        read = [(t.result["temperature"].item() - 1, t.result["temperature_se"].item()) for t in trials.at(at)]
        return max(max(excess, error / 2) for excess, error in read)
    # Var of a mean without replacement is proportional to 1/B − 1/n: from the difference of two B to that of B itself.
    scale = (1 / size - 1 / n) / (1 / size - 1 / twice)
    pairs = zip(trials.at(at), trials.at(larger), strict=True)
    return scale * max(max(size, error / 2) for size, error in (difference(*pair) for pair in pairs))


def localisation(trials: Trials, plan: Plan, at: Point, target: float) -> tuple[Local, str]:
    """The smallest gamma down to `target` at which the chains fill their flat directions and the loss still rises as
    around w*, both within their errors; farther down where λ̂ moves by more than the spectrum explains.

    Large gammas hold curved directions back; under small ones the chains spread to where the loss has another shape.
    """
    tried, end = _search(trials, plan, at, target)
    # Where the first gamma is too small already, a larger one holds the chains nearer.
    if not tried:
        near = replace(at, gamma=plan.scale, lr=min(at.lr, 1 / (2 * plan.scale)))
        return Local(near, 1.0, True, ()), f"gamma {near.gamma:.3g} holds the chains near w*: {end}."

    # λ̂(gamma) of each model through its trials, of those at one gamma the last.
    chosen = tried[-1]
    tried = sorted({p.gamma: p for p in tried if p.gamma >= chosen.gamma}.values(), key=lambda p: -p.gamma)
    fits: tuple[Fit, ...] = ()
    if len(tried) > 1:
        runs = [[trials.at(p)[number] for p in tried] for number in range(len(trials.models))]
        fits = tuple(
            fit([p.gamma for p in tried], np.array([t.result["llc"].item() for t in run]), covariance(run), each.llc)
            for run, each in zip(runs, plan.spectra, strict=True)
        )
    # The trials speak where the Hessian is silent: there the upper end of their limit counts, elsewhere the lower one.
    silent = min(each.llc() for each in plan.spectra) < 0.5 * max((f.value[1] for f in fits), default=1e-300)
    lacking = [f.missing(f.high if silent else f.low) for f in fits]
    missing = max([plan.of_estimate(chosen.lr, chosen.gamma, trials.longest)[0], *lacking])
    moving = _grows(trials, plan, *tried[-2:]) if fits else silent
    local = Local(chosen, missing, moving, fits)
    if local.flat:
        return local, f"gamma {chosen.gamma:.3g}: λ̂ is flat there, {missing:.1%} of it is missing."
    reason = f"gamma {chosen.gamma:.3g} localises: λ̂ is a number at this gamma and a lower bound of its limit"
    return local, f"{reason}{', ' + end if end else ''}. Compare only estimates of the same gamma."


def _search(trials: Trials, plan: Plan, at: Point, target: float) -> tuple[list[Point], str]:
    """The points on the way down at which the chains are at rest near w*, and what ended the way before its target.

    A trial is as long as its slowest direction needs, within what an estimate and the budget allow.
    """

    def point(gamma: float) -> Point:
        return replace(at, gamma=gamma, steps_per_draw=plan.steps_per_draw(at.lr, gamma))

    # From the first gamma to the target by decades at most: large moves are no reason to stop.
    stable, again = at, REPLANS
    ahead = [point(gamma) for gamma in plan.between(FIRST_GAMMA * plan.scale, target)]
    tried: list[Point] = []
    while ahead:
        here = ahead.pop(0)
        if not trials.affordable(here):
            return tried or [stable], "the budget ends"
        found = trials.at(here)
        longer = replace(here, steps_per_draw=min(4 * here.steps_per_draw, trials.most_steps_per_draw))
        if healthy(found) and heated(found) > HEATED and again:
            # Minibatch noise grows with the distance from w*: lr and gamma are planned anew with what is seen of it.
            lr, gamma = plan.best(at.lr, heated(found), here.gamma)
            at, again = replace(at, lr=lr), again - 1
            ahead = [point(g) for g in (plan.between(here.gamma, gamma) if gamma < here.gamma else [gamma])]
        elif settled(found):
            tried.append(here)
            # Beyond the target for as long as λ̂ grows in a way that the Hessian does not know, which two trials show.
            unknown = len(tried) == 1 or _grows(trials, plan, *tried[-2:])
            if not ahead and unknown and again == REPLANS and plan.fills(at.lr, here.gamma / RATIO):
                ahead = [point(here.gamma / RATIO)]
        elif healthy(found) and cold(found) and longer != here:
            ahead = [longer, *ahead]
        elif tried and tried[-1].gamma / here.gamma > 1.5 * RATIO:
            ahead = [point(math.sqrt(tried[-1].gamma * here.gamma))]
        else:
            return tried, "below it the chains leave the basin of w* or do not come to rest"
    return tried, ""


def _grows(trials: Trials, plan: Plan, larger: Point, smaller: Point) -> bool:
    """Whether λ̂ grew for some model from the larger gamma to the smaller by more than its spectrum, the tolerance and
    the error explain."""
    for spectrum, *pair in zip(plan.spectra, trials.at(smaller), trials.at(larger), strict=True):
        growth, error = difference(pair[0], pair[1])  # over λ̂ at the larger gamma
        whole = spectrum.llc(larger.gamma)
        explained = spectrum.llc(smaller.gamma) / whole - 1 if whole else 0.0
        if growth - explained > max(trials.tolerance * (1 + explained), SAME_SIGMAS * error):
            return True
    return False


def length(trials: Trials, at: Point) -> tuple[int, str]:
    """The number of steps a draw that brings the error to the tolerance after a burn-in as long as that of the trials,
    and no fewer than make the estimate as long as its calibration's cost allows, within `max_steps` a chain."""
    start = trials.start
    chosen = trials.at(at) if trials.affordable(at) else None
    error = relative_error(chosen) if chosen else math.inf
    spent = trials.settings.chains * trials.settings.draws * at.steps_per_draw
    wanted = spent * (error / trials.tolerance) ** 2 / start.chains if math.isfinite(error) else math.inf
    settle = TRIAL_BURN_IN * at.steps_per_draw / max(start.burn_in, 1)
    paid = trials.paid(at.control_variate)
    steps = max(1, math.ceil(min(max(wanted / start.draws, settle, paid), trials.longest)))
    reason = f"steps_per_draw {steps}."
    if chosen and not settled(chosen):
        reason += " The chains did not settle at any gamma tried: take a later checkpoint or a smaller nbeta."
    return steps, reason
