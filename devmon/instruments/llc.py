"""The local learning coefficient: how singular the loss is around the weights, by sampling near them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xarray as xr
from torch import nn

from devmon.cost import Cost
from devmon.sampling.by_chain import ByChain
from devmon.sampling.center import Memo, Sampled
from devmon.sampling.choice import choose
from devmon.sampling.constants import PRECISION_STEPS
from devmon.sampling.data import as_examples
from devmon.sampling.losses import Loss, next_token_loss
from devmon.sampling.traces import Settings, sample
from devmon.snapshot import Snapshot


@dataclass(frozen=True)
class _SampledOn:
    """The fields before the settings. Their order is part of the identity of an instrument that holds an LLC."""

    data: Any
    loss: Loss = next_token_loss


@dataclass(frozen=True)
class LLC(ByChain, Sampled, Settings, _SampledOn):
    """Loss traces from which λ̂ = nbeta · (E[L(w)] − L(w*)) is derived, w ~ exp(−nbeta L(w) − (gamma/2)‖w − w*‖²).

    L is the mean of `loss(model, batch) -> (batch,)` over the examples of `data`, w* the snapshot's weights. A step of
    SGLD is w ← w − (lr/2)(nbeta ∇L_B(w) + gamma (w − w*)) + N(0, lr), from w* in `chains` independent chains, in
    float32 whatever the model's precision (`precision` is that of a pass). Lau et al. 2023 (2308.12108), with the same
    examples scored at w and at w*.

    Without `lr` and `gamma` a monitor chooses them at the first weights where a trial is accepted and keeps them for
    the run (`devmon.sampling.choice`). `nbeta` None means n / log n for n examples; several numbers are a ladder
    (`devmon.analysis.ladder`), of which the first is that of λ̂. Each chain makes `burn_in + draws` draws of
    `steps_per_draw` steps. Noise and batches belong to the chain and the run's seed, so they are the same at every
    checkpoint and *changes* of λ̂ are sharper than its level. `control_variate` moves by ∇L_B(w) − ∇L_B(w*) + ∇L(w*):
    about twice the cost of a step (less with `shared_batches`), and the right law where label noise would widen it.
    `prior` adds (prior/2)‖w‖² to the exponent. `mask` restricts what is sampled (`devmon.sampling.masks.as_mask`). All
    settings are keywords, and those of `devmon.sampling.Settings`.

    Returns traces, burn-in included, the means over the steps of a draw; settings in attrs:

    - `loss` (chain, draw), loss: mean loss at w of the minibatch.
    - `baseline` (chain, draw), loss: mean loss at w* of the same examples.
    - `distance` (chain, draw), weight: root mean square of ‖w − w*‖.
    - `slope` (chain, draw), loss: ∇L_B(w)·(w − w*), with the gradient that moved the chain.
    - `linear` (chain, draw), loss: with `control_variate`, (∇L_B(w*) − ∇L(w*))·(w − w*), the first-order noise of the
      score, to be subtracted. Null: 0 in the mean.
    - `first_order` (chain, draw), loss: ∇L(w*)·(w − w*), with the gradient over the data, or over as many examples as
      one chain meets where these are fewer. Null: 0 in the mean where w* is a minimum.
    - `noise_bias`, 1: the most that minibatch noise adds to λ̂, from its spread at w*; 0 with `control_variate`.
    - `example_loss` (chain, draw, example), loss: with `examples`, the losses of so many single examples at the start
      of a draw; a forward pass of them a draw.
    - `acceptance` (chain, draw), 1: with `acceptance`, that of a Metropolis-adjusted step of SGLD; a pass a draw.
    - `precision_shift` (chain), 1: with `precision` "bfloat16", λ̂ in it less λ̂ in float32 in a trial of 20 steps of
      equal noise and minibatches. Null: 0 in the mean.

    With a ladder, the same at its further nbetas (coordinate `rung`), under the same noise and batches:

    - `ladder_loss` (rung, chain, draw), loss: as `loss`.
    - `ladder_baseline` (rung, chain, draw), loss: as `baseline`.
    - `ladder_distance` (rung, chain, draw), weight: as `distance`.
    - `ladder_slope` (rung, chain, draw), loss: as `slope`.
    - `ladder_linear` (rung, chain, draw), loss: as `linear`.
    - `ladder_first_order` (rung, chain, draw), loss: as `first_order`.
    - `ladder_lr` (rung), 1: the step size, in proportion to 1 / nbeta.
    - `ladder_reach`, loss: mean of L(w) − L(w*) under N(w*, 1/gamma), the localising Gaussian alone.
    - `ladder_reach_beyond`, loss: its part beyond the second order.

    With `prior` there is `prior_slope` (chain, draw) too, weight²: w·(w − w*), for the temperature.
    `devmon.analysis.llc` turns them into λ̂, its standard error and a verdict. Raises InstrumentError for settings that
    cannot be run and a loss that is not finite.
    """

    @property
    def settled(self) -> bool:
        """Whether there is nothing left to choose."""
        return self.lr is not None

    def choose(
        self, models: Sequence[nn.Module], seed: int, later: bool = True, memo: Memo | None = None
    ) -> dict[str, Any]:
        """What a run keeps of a choice made at these weights, in values that JSON can hold: settings and reasons.

        `memo` is that of `sample`, for a single model. Raises InstrumentError where it cannot be made there.
        """
        # Of few examples all are a minibatch: nobody who leaves the settings open asked for more.
        examples = as_examples(self.data).n
        start = self if self.batch_size <= examples else replace(self, batch_size=examples)
        settings, reasons = choose(models, self.loss, self.data, start, seed=seed, later=later, memo=memo)
        names = ("nbeta", "lr", "gamma", "sampler", "control_variate", *(("batch_size",) if start is not self else ()))
        return {"settings": {name: getattr(settings, name) for name in names}, "reasons": reasons}

    def settle(self, record: Mapping[str, Any]) -> LLC:
        """This LLC with the settings of such a record."""
        return replace(self, **record["settings"])

    def cost(self) -> Cost:
        """The passes of all chains, those at w* of control variates, of the baseline and of the trial of the precision
        included, and the memory of one chain. The gradient at w* and its losses are shared with other watches that
        sample around the same weights (`at_center`)."""
        examples = as_examples(self.data)
        steps = (self.draws + self.burn_in) * self.steps_per_draw
        met = steps * self.chains * self.batch_size
        at_center = met if not self.shared_batches else steps * self.batch_size
        # The gradient at w*, which all rungs share, and the baselines of what else the chains meet.
        whole = self.of_gradient(examples.n)
        seen = min(examples.n, max(met, whole)) - whole
        twice = at_center if self.control_variate else 0
        judged = (self.draws + self.burn_in) * self.chains * self.batch_size if self.acceptance else 0
        if self.precision != "float32":  # two short trials, and the gradients at w* of both
            trial = 2 * min(PRECISION_STEPS, steps) * self.batch_size
            met, whole = met + trial * self.chains, whole + trial
        followed = (self.draws + self.burn_in) * self.chains * self.examples
        rungs = len(self.nbeta) if isinstance(self.nbeta, Sequence) else 1
        return Cost(
            forwards=rungs * (met + twice + seen) + whole + judged + followed,
            backwards=rungs * (met + twice) + whole + judged,
            positions=examples.positions(),
            copies=self.copies(),
        )

    def _traces(self, snapshot: Snapshot, chains: Sequence[int]) -> xr.Dataset:
        whole = self
        if not self.settled:  # called by itself: for these weights alone
            whole = self.settle(self.choose([snapshot.model], snapshot.seed, later=False, memo=snapshot.memo))
        how: dict[str, Any] = {"seed": snapshot.seed, "chains": chains, "memo": snapshot.memo}
        return sample(snapshot.model, self.loss, self.data, whole, **how)
