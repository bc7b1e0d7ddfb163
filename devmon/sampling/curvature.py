"""How far minibatch noise at w* would bias λ̂."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from devmon.sampling.constants import NOISE_BATCHES
from devmon.sampling.data import Examples, as_examples, draw_batches
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
    where = None if mask is None else mask.vector(flat.names, flat.shapes, flat.center)
    examples = examples.to(flat.center.device, flat.center.dtype)
    # The spread of minibatch gradients at w*, in the entries that move.
    generator = torch.Generator().manual_seed(derive_seed(seed, "gradient noise"))
    rows = draw_batches(examples.n, settings.batch_size, batches, generator).to(flat.center.device)
    flat.bind(flat.center, torch.zeros_like(flat.center))
    check_losses(flat.losses(examples.batch(rows[0])), len(rows[0]))
    grads = torch.stack([_gradient(flat, examples, row) for row in rows])
    grads = grads if where is None else grads * where
    trace = float(grads.var(0).sum())
    size = flat.center.numel() if where is None else int(where.sum())
    return settings.lr * settings.nbeta_for(examples.n) ** 2 * trace / 8 / (size / 2)


def _gradient(flat: Flat, examples: Examples, row: torch.Tensor) -> torch.Tensor:
    """The gradient (parameter,) at w* of the mean loss over the examples `row`."""
    grad = torch.zeros_like(flat.center)
    flat.bind(flat.center, grad)
    flat.backward(examples.batch(row))
    return grad
