"""The local learning coefficient: how singular the loss is around the weights, by sampling near them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import xarray as xr

from devmon.cost import Cost
from devmon.sampling.chains import Sampler
from devmon.sampling.data import as_examples
from devmon.sampling.losses import Loss, next_token_loss
from devmon.sampling.traces import Settings, sample
from devmon.snapshot import Instrument, Snapshot


@dataclass(frozen=True)
class LLC:
    """Loss traces from which λ̂ = nbeta · (E[L(w)] − L(w*)) is derived, w ~ exp(−nbeta L(w) − (gamma/2)‖w − w*‖²).

    L is the mean of `loss(model, batch) -> (batch,)` over the examples of `data`, w* the snapshot's weights. A step of
    SGLD is w ← w − (lr/2)(nbeta ∇L_B(w) + gamma (w − w*)) + N(0, lr), from w* in `chains` independent chains, in
    float32 whatever the model's precision. Lau et al. 2023 (2308.12108), with the same examples scored at w and at w*.

    `nbeta` None means n / log n for n examples. Each chain makes `burn_in + draws` draws of `steps_per_draw` steps.
    Noise and batches belong to the chain and the run's seed, so they are the same at every checkpoint and *changes* of
    λ̂ are sharper than its level. `control_variate` moves by ∇L_B(w) − ∇L_B(w*) + ∇L(w*): about twice the cost of a step
    (less with `shared_batches`), and the right law where label noise would heat the chain. `prior` adds (prior/2)‖w‖²
    to the exponent. `mask` restricts what is sampled (`devmon.sampling.masks.as_mask`).

    Returns (chain, draw), burn-in included: `loss`, `baseline` (the same examples at w*), `distance` ‖w − w*‖, `slope`
    ∇L_B(w)·(w − w*), with control variates `linear`; settings in attrs. On request: `example_loss` (chain, draw,
    example) of `examples` single examples, a forward pass of them a draw; `acceptance` of a Metropolis-adjusted step
    of SGLD, a pass a draw. `devmon.analysis.llc` turns them into λ̂, its
    standard error and a verdict. Raises InstrumentError for settings that cannot be run and a loss that is not finite.
    """

    data: Any
    loss: Loss = next_token_loss
    nbeta: float | None = None
    gamma: float = 300.0
    lr: float = 1e-4
    chains: int = 4
    draws: int = 200
    burn_in: int = 100
    batch_size: int = 32
    steps_per_draw: int = 1
    sampler: str | Sampler = "sgld"
    control_variate: bool = False
    shared_batches: bool = False
    replacement: bool = False
    prior: float = 0.0
    mask: Any = None
    examples: int = 0
    acceptance: bool = False
    float64: bool = False

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        return self._traces(snapshot, range(self.chains))

    def share(self, rank: int, ranks: int) -> Instrument | None:
        """Chains rank, rank + ranks, …: a chain's noise and batches are its own, whoever runs it."""
        chains = range(rank, self.chains, ranks)
        return partial(self._traces, chains=chains) if chains or rank == 0 else None

    def join(self, parts: list[xr.Dataset]) -> xr.Dataset:
        """The traces of all chains, in order of their numbers."""
        joined = xr.concat(
            parts, "chain", data_vars="minimal", coords="minimal", compat="override", join="exact",
            combine_attrs="identical",
        )  # fmt: skip
        return joined.sortby("chain")

    def cost(self) -> Cost:
        """The passes of all chains, those at w* of control variates and of the baseline included."""
        examples = as_examples(self.data)
        steps = (self.draws + self.burn_in) * self.steps_per_draw
        met = steps * self.chains * self.batch_size
        at_center = met if not self.shared_batches else steps * self.batch_size
        whole = (examples.n, examples.n) if self.control_variate else (min(examples.n, met), 0)
        twice = at_center if self.control_variate else 0
        judged = (self.draws + self.burn_in) * self.chains * self.batch_size if self.acceptance else 0
        followed = (self.draws + self.burn_in) * self.chains * self.examples
        return Cost(
            forwards=met + twice + whole[0] + judged + followed,
            backwards=met + twice + whole[1] + judged,
            positions=examples.positions(),
        )

    def _traces(self, snapshot: Snapshot, chains: Sequence[int]) -> xr.Dataset:
        settings = Settings(
            **{name: getattr(self, name) for name in Settings.__dataclass_fields__ if hasattr(self, name)},
            seed=snapshot.seed,
        )
        return sample(snapshot.model, self.loss, self.data, settings, chains=chains)
