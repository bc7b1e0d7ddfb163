"""The four decisions of a calibration: step size, localisation, noise and length, each with its reason in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from devmon.errors import InstrumentError
from devmon.sampling.constants import (
    BIAS_SHARE,
    ERROR_GROWTH,
    GAMMA_FOR_LR,
    GAMMAS,
    LOWEST_LR,
    MOVE_AS_GOOD,
    MOVE_TOO_FAR,
    RATIO,
    STEP_SIZES,
    TRIAL_BURN_IN,
)
from devmon.sampling.trials import (
    Point,
    Trials,
    difference,
    differences,
    healthy,
    noise_suspected,
    relative_error,
    same,
    settled,
    undecided,
    variates_pay,
)


@dataclass(frozen=True)
class Choice:
    """Where the trials of a decision lead: a point, whether λ̂ is `flat` there, and the relative error that is left."""

    at: Point
    flat: bool = True
    error: float = 0.0


def step_size(trials: Trials, curvature: float) -> tuple[Choice, str]:
    """The largest lr at which the chains are healthy and a step √10 times smaller gives the same λ̂.

    `curvature` is the largest of nbeta L. Raises InstrumentError where no step size gives a finite and stable run.
    """
    gamma = GAMMA_FOR_LR * curvature
    top = 1 / (curvature + gamma)  # a quarter of the largest stable step

    def at(lr: float) -> Point:  # all trials are equally long in time lr · steps
        return Point(lr, gamma, min(math.ceil(top / lr), trials.most_steps_per_draw))

    # Downwards until two neighbours agree: then the larger has no step-size bias that matters.
    lr = top
    for _ in range(STEP_SIZES):
        larger, smaller = trials.at(at(lr)), trials.at(at(lr / RATIO))
        if healthy(larger) and same(larger, smaller, trials.tolerance):
            return Choice(at(lr)), f"lr {lr:.3g} gives the λ̂ of a step three times smaller."
        lr = lr / RATIO
    if healthy(trials.at(at(lr))):
        return Choice(at(lr), flat=False), f"lr {lr:.3g} is the smallest tried: no two step sizes agreed on λ̂."
    verdicts = ", ".join(sorted({trial.result["verdict"].item() for trial in trials.at(at(lr))}))
    raise InstrumentError(
        f"no step size from {top:.2g} down to {lr:.2g} ran healthily ({verdicts}): w* is perhaps no minimum; take a "
        f"later checkpoint or a smaller nbeta"
    )


def localisation(trials: Trials, at: Point, curvature: float) -> tuple[Choice, str]:
    """The gamma at which λ̂ moves least with gamma, its lr and the length of its trials.

    Large gammas hold curved directions back; under small ones the chains still spread along flat directions, to where
    the loss has another shape, and λ̂ would grow with their length. Flat where the move is within tolerance or error.
    """
    first_lr, tolerance = at.lr, trials.tolerance
    tried: list[Point] = []
    moves: list[float] = []
    flat: list[bool] = []
    for share in GAMMAS:
        at = _with_quieter_steps(trials, replace(at, gamma=share * curvature), tried, first_lr)
        # The chains have left the basin, or what they meet there is noise: smaller gammas only go farther.
        limit = ERROR_GROWTH * max(tolerance, relative_error(trials.at(tried[0]))) if tried else math.inf
        if not settled(trials.at(at)) or relative_error(trials.at(at)) > limit:
            break
        tried.append(at)
        if len(tried) == 1:
            continue
        # A move that hides behind the error is no plateau: both trials are lengthened until it shows, or may not be.
        while 2 * at.steps_per_draw <= trials.most_steps_per_draw and undecided(
            trials.at(tried[-2]), trials.at(tried[-1]), tolerance
        ):
            at = replace(at, steps_per_draw=2 * at.steps_per_draw)
            tried[-2:] = [replace(at, gamma=point.gamma) for point in tried[-2:]]
        pair = trials.at(tried[-2]), trials.at(tried[-1])
        moves.append(max(size for size, _ in differences(*pair)))
        flat.append(same(*pair, tolerance))
        if moves[-1] <= tolerance or moves[-1] > MOVE_TOO_FAR * min(moves):
            break
    if not moves:
        gamma = tried[0].gamma if tried else curvature
        return Choice(replace(at, gamma=gamma), False, 1 / (RATIO - 1)), f"gamma {gamma:.3g}: no two could be compared."
    # Of the two gammas of the chosen move the smaller: its error is about proportional to gamma, so what is left is the
    # rest of a geometric series; beyond it the error of weights too far away begins.
    least = next(k for k, move in enumerate(moves) if move <= MOVE_AS_GOOD * min(moves))
    gamma = tried[least + 1].gamma
    reason = f"gamma {gamma:.3g} " + (
        "lies on a plateau: three times more gives the same λ̂."
        if flat[least]
        else "is where λ̂ moved least with gamma, but no plateau: compare only estimates of the same gamma."
    )
    if at.lr < first_lr:
        reason += f" On the way there lr is reduced to {at.lr:.3g}, for the bias of minibatch noise."
    return Choice(replace(at, gamma=gamma), flat[least], moves[least] / (RATIO - 1)), reason


def _with_quieter_steps(trials: Trials, at: Point, tried: list[Point], first_lr: float) -> Point:
    """`at` with lr lowered for as long as minibatch noise may bias λ̂ there and a smaller step gives another one.

    The last point of `tried` follows, since gammas are compared at one lr.
    """
    while at.lr > LOWEST_LR * first_lr and any(noise_suspected(t, trials.tolerance) for t in trials.at(at)):
        longer = min(math.ceil(at.steps_per_draw * RATIO), trials.most_steps_per_draw)
        smaller = replace(at, lr=at.lr / RATIO, steps_per_draw=longer)
        if all(size <= trials.tolerance for size, _ in differences(trials.at(at), trials.at(smaller))):
            break
        at = smaller
        tried[-1:] = [replace(at, gamma=point.gamma) for point in tried[-1:]]
        for point in tried[-1:]:
            trials.at(point)
    return at


def noise(trials: Trials, at: Point) -> tuple[Choice, str]:
    """Whether control variates stay, and the lr at which the bias of minibatch noise is small beside the error to come.

    They stay where label noise would bias λ̂ by more than half the tolerance or double the variance of the score. What
    bias is then left is measured, and lr lowered until it is at most half of the tolerance, or of the error that
    `max_steps` allow.
    """
    start, tolerance = trials.start, trials.tolerance
    variates = any(variates_pay(trial, tolerance) for trial in trials.at(at))
    at = replace(at, control_variate=variates)
    bias = measured_noise_bias(trials, at)
    # The error of the longest run that is allowed, from that of the trials, whose draws are as good as its steps.
    longest = start.chains * start.draws * max(1, trials.max_steps // (start.draws + start.burn_in))
    spent = trials.settings.chains * trials.settings.draws * at.steps_per_draw
    error = relative_error(trials.at(at)) * math.sqrt(spent / longest)
    # With a step x times as large the bias is bias · x and the error of the longest run error / √x: the x that makes
    # their ratio the share is (share · error / bias)^(2/3).
    x = min(1.0, max(BIAS_SHARE * tolerance / bias, (BIAS_SHARE * error / bias) ** (2 / 3))) if bias else 1.0
    steps = min(math.ceil(at.steps_per_draw / x), trials.most_steps_per_draw)
    at = replace(at, lr=at.lr * x, steps_per_draw=steps)
    reason = "Control variates " + ("pay: label noise would bias λ̂ or drown the score." if variates else "do not pay.")
    if x < 1:
        reason += f" lr is lowered to {at.lr:.3g}, where minibatch noise biases λ̂ by {bias * x:.1%}."
    return Choice(at, error=bias * x), reason


def measured_noise_bias(trials: Trials, at: Point) -> float:
    """How much minibatch noise adds to λ̂, relative: it is proportional to the variance of a batch's mean and to lr.

    Trials with batches twice as large share the noise of the step, so the difference is known better than either.
    """
    size, n = trials.start.batch_size, trials.examples.n
    larger = min(2 * size, n)
    if larger == size:
        return 0.0
    # Var of a mean without replacement is proportional to 1/B − 1/n: from the difference of two B to that of B itself.
    scale = (1 / size - 1 / n) / (1 / size - 1 / larger)
    pairs = zip(trials.at(at), trials.at(replace(at, batch_size=larger)), strict=True)
    return max(0.0, scale * max(difference(*pair)[0] for pair in pairs))


def length(trials: Trials, at: Point) -> tuple[int, str]:
    """The number of steps a draw that brings the error to the tolerance after a burn-in as long as that of the trials,
    within `max_steps` a chain."""
    start, chosen = trials.start, trials.at(at)
    longest = max(1, trials.max_steps // (start.draws + start.burn_in))
    error = relative_error(chosen)
    spent = trials.settings.chains * trials.settings.draws * at.steps_per_draw
    wanted = spent * (error / trials.tolerance) ** 2 / start.chains if math.isfinite(error) else math.inf
    settle = TRIAL_BURN_IN * at.steps_per_draw / max(start.burn_in, 1)
    steps = max(1, math.ceil(min(max(wanted / start.draws, settle), longest)))
    reason = f"steps_per_draw {steps}."
    if not settled(chosen):
        reason += " The chains did not settle at any gamma tried: take a later checkpoint or a smaller nbeta."
    return steps, reason
