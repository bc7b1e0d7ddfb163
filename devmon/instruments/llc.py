"""The local learning coefficient: how singular the loss is around the weights, by sampling near them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import xarray as xr

from devmon.sampling.estimate import Settings, sample
from devmon.sampling.losses import Loss, next_token_loss
from devmon.snapshot import Snapshot


@dataclass(frozen=True)
class LLC:
    """Loss traces from which λ̂ = nbeta · (E[L(w)] − L(w*)) is derived, w ~ exp(−nbeta L(w) − (gamma/2)‖w − w*‖²).

    L is the mean of `loss(model, batch) -> (batch,)` over the examples of `data`, w* the snapshot's weights. A step of
    SGLD is w ← w − (lr/2)(nbeta ∇L_B(w) + gamma (w − w*)) + N(0, lr), from w* in `chains` independent chains, in
    float32 whatever the model's precision. Lau et al. 2023 (2308.12108), with the same examples scored at w and at w*.

    `nbeta` None means n / log n for n examples. Each chain makes `burn_in + draws` draws of `steps_per_draw` steps.
    Noise and batches belong to the chain and the run's seed, so they are the same at every checkpoint and *changes* of
    λ̂ are sharper than its level. `control_variate` moves by ∇L_B(w) − ∇L_B(w*) + ∇L(w*): about twice the cost of a step
    (less with `shared_batches`), and the right law where label noise would heat the chain.

    Returns (chain, draw), burn-in included: `loss`, `baseline` (the same examples at w*), `distance` ‖w − w*‖, `slope`
    ∇L_B(w)·(w − w*), with control variates `linear`; settings in attrs. `devmon.analysis.llc` turns them into λ̂, its
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
    sampler: str = "sgld"
    control_variate: bool = False
    shared_batches: bool = False
    replacement: bool = False
    mask: Any = None
    float64: bool = False

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        settings = Settings(
            **{name: getattr(self, name) for name in Settings.__dataclass_fields__ if hasattr(self, name)},
            seed=snapshot.seed,
        )
        return sample(snapshot.model, self.loss, self.data, settings)
