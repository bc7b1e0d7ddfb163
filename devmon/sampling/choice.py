"""Step size and localisation from the largest curvature alone: what a monitor can afford while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from devmon.analysis.derive.llc import llc
from devmon.analysis.derive.verdicts import accepted
from devmon.errors import InstrumentError
from devmon.sampling.center import Memo
from devmon.sampling.choosing.spectrum import largest_curvature
from devmon.sampling.constants import CHOICE_MARGIN, CHOICE_NOISE, CHOICE_RELAXATIONS, CHOICE_ROUNDS, CHOICE_TRIAL
from devmon.sampling.data import as_examples
from devmon.sampling.losses import Loss
from devmon.sampling.traces import Settings, sample


def choose(
    models: Sequence[nn.Module],
    loss: Loss,
    data: Any,
    start: Settings,
    *,
    seed: int = 0,
    later: bool = True,
    memo: Memo | None = None,
) -> tuple[Settings, str]:
    """`start` with nbeta, lr, gamma, kernel and control variates chosen to suit all of `models`, and the reasons.

    Nothing is searched for. lr is the inverse of the largest curvature of nbeta L + (gamma/2)‖w − w*‖² (a quarter of
    the largest stable step of BAOAB), that of L taken ten times as large where `later` weights are to be measured with
    it too. gamma is the least at which chains of this burn-in and this lr come to rest: BAOAB relaxes in 2 / (3 lr
    gamma) steps. So λ̂ is sound and equilibrated, and localised: for a smaller gamma, at more steps, there is
    `devmon.sampling.calibrate`. A short trial is made at each of the models; where minibatch noise may add more than a
    twentieth to λ̂, another with control variates. It costs the curvature (12 gradients of 512 examples or more) and at
    most as many gradients as an estimate. `memo` is that of `sample`, for a single model.
    Raises InstrumentError where a trial fails, as where w* is no minimum.
    """
    examples = as_examples(data)
    nbeta = start.nbeta_for(examples.n)
    curvature = nbeta * max(
        largest_curvature(model, loss, examples, start, seed=seed, rounds=CHOICE_ROUNDS) for model in models
    )
    # With a = margin · curvature: lr (a + gamma) = 1, and lr gamma what brings the chains to rest in their burn-in.
    rest = min(0.5, 2 * CHOICE_RELAXATIONS / (3 * max(1, start.burn_in * start.steps_per_draw)))
    gamma = rest / (1 - rest) * curvature * (CHOICE_MARGIN if later else 1.0)
    nbeta, lr, gamma = (float(f"{value:.4g}") for value in (nbeta, rest / gamma, gamma))
    given = nbeta if start.nbeta is None else start.nbeta
    settings = replace(start, sampler="baoab", nbeta=given, lr=lr, gamma=gamma)
    reasons = f"The largest curvature of nbeta L is {curvature:.3g}; gamma lets chains rest within their burn-in."
    trial: dict[str, Any] = {
        "chains": min(2, start.chains),
        "draws": min(CHOICE_TRIAL, start.draws),
        "examples": 0,
        "nbeta": nbeta,
    }
    # Both trials of a model begin where its estimate will.
    memos = [memo if memo is not None and len(models) == 1 else {} for _ in models]
    for variates in (start.control_variate, True):
        settings = replace(settings, control_variate=variates)
        of_trial = replace(settings, **trial)
        results = [
            llc(sample(model, loss, examples, of_trial, seed=seed, memo=each))
            for model, each in zip(models, memos, strict=True)
        ]
        if not any(result["noise_bias"] > CHOICE_NOISE * abs(result["llc"]) for result in results):
            break
        reasons += " Minibatch noise would add to λ̂: control variates."
    told = [
        f"λ̂ {result['llc'].item():.3g} ± {result['se'].item():.2g}, {result['verdict'].item()}" for result in results
    ]
    # A trial is too short to show that chains mix, and long enough to show that they leave w*.
    fine = [accepted(result["verdict"].item()) or result["verdict"].item() == "not mixed" for result in results]
    if not all(fine) or any(result["llc"] <= 0 for result in results):
        raise InstrumentError(
            f"lr and gamma cannot be chosen here: at lr {lr:.3g} and gamma {gamma:.3g} the estimate is "
            f"{'; '.join(told)}. w* is perhaps no minimum yet: later weights are tried, or give lr and gamma"
        )
    return settings, f"{reasons} There: {'; '.join(told)}."
