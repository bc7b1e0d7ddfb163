"""How far minibatch noise at w* would bias λ̂."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from devmon.sampling.center import measure
from devmon.sampling.constants import NOISE_BATCHES
from devmon.sampling.data import as_examples
from devmon.sampling.flat import Flat
from devmon.sampling.losses import Loss, check_losses
from devmon.sampling.masks import as_mask
from devmon.sampling.traces import Settings
from devmon.snapshot import derive_seed


def noise_bias(
    model: nn.Module, loss: Loss, data: Any, settings: Settings, *, seed: int = 0, batches: int = NOISE_BATCHES
) -> float:
    """How much the minibatch noise at w* would add to λ̂ at these settings without control variates, over d/2.

    lr nbeta² tr Cov(∇L_B(w*)) / 8 (SGLD on a quadratic: (lr nbeta / 2)² Cov joins the noise lr of a step), here over
    half of the d parameters sampled, the most that λ can be: what traces hold beside λ̂ itself is `noise_bias` of
    `devmon.analysis.llc`. Costs `batches` gradients; 0 where a batch is all data.
    Raises InstrumentError for a loss of another shape than (batch,).
    """
    examples = as_examples(data)
    if settings.batch_size >= examples.n:
        return 0.0
    mask = as_mask(settings.mask, model)
    flat = Flat(model, loss, torch.float64 if settings.float64 else torch.float32, None if mask is None else mask.names)
    where = None if mask is None else mask.vector(flat.names, flat.shapes, flat.at_center[0])
    examples = examples.to(flat.device, flat.dtype)
    # The spread of the gradients of disjoint parts, as many examples as the batches have together; a batch of distinct
    # examples spreads less by the share of the data that it holds.
    generator = torch.Generator().manual_seed(derive_seed(seed, "gradient noise"))
    index = torch.randperm(examples.n, generator=generator)[: batches * settings.batch_size].to(flat.device)
    # A loss of another shape is told by a whole batch: one of few examples may happen to fit.
    flat.hold(flat.center_parts())
    first = index[: settings.batch_size]
    check_losses(flat.losses(examples.batch(first)), len(first))
    size = min(settings.batch_size, -(-len(index) // batches))
    trace = measure(flat, examples, index, size, size, where).spread() / settings.batch_size
    trace *= 1 - settings.batch_size / examples.n
    size = flat.numel if where is None else int(where.sum())
    return settings.lr_and_gamma[0] * settings.nbeta_for(examples.n) ** 2 * trace / 8 / (size / 2)
