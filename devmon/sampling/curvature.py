"""The scales at w*: the largest curvature of the loss, and how far minibatch noise would bias λ̂."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from devmon.errors import InstrumentError
from devmon.sampling.constants import (
    CURVATURE_EXAMPLES,
    CURVATURE_WORK,
    DIFFERENCE_STEP,
    GRADIENT_CHUNK,
    NOISE_BATCHES,
    POWER_ROUNDS,
)
from devmon.sampling.data import Examples, as_examples
from devmon.sampling.flat import Flat, gradient_at_center
from devmon.sampling.losses import Loss
from devmon.sampling.masks import as_mask
from devmon.sampling.traces import Settings
from devmon.snapshot import derive_seed


def largest_curvature(
    model: nn.Module, loss: Loss, data: Any, settings: Settings, *, seed: int = 0, rounds: int = POWER_ROUNDS
) -> float:
    """The largest curvature of the mean loss at w*, by power iteration on differences of gradients.

    Of large data a part stands for all, at least 512 examples. Differences need no second derivative, which fused
    attention lacks. Raises InstrumentError where the curvature is 0 or not finite.
    """
    examples = as_examples(data)
    mask = as_mask(settings.mask, model)
    flat = Flat(model, loss, torch.float64, None if mask is None else mask.names)
    where = None if mask is None else mask.vector(flat.names, flat.shapes, flat.center)
    examples = examples.to(flat.center.device, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    size = max(CURVATURE_EXAMPLES, int(CURVATURE_WORK / (flat.center.numel() * examples.numel())))
    index = torch.randperm(examples.n, generator=generator)[:size].to(flat.center.device)
    # Power iteration within the mask: H v ≈ (∇L(w* + ε v) − ∇L(w* − ε v)) / 2ε with ‖v‖ = 1, and ‖H v‖ the estimate.
    direction = torch.randn(flat.center.shape, generator=generator, dtype=torch.float64).to(flat.center.device)
    curvature = 0.0
    for _ in range(rounds):
        if where is not None:
            direction = direction * where
        direction = direction / direction.norm().clamp(min=1e-300)
        step = DIFFERENCE_STEP * (1 + flat.center.norm() / math.sqrt(flat.center.numel()))
        ends = [_gradient(flat, examples, index, flat.center + sign * step * direction) for sign in (1, -1)]
        product = (ends[0] - ends[1]) / (2 * step)
        curvature = float(product.norm() if where is None else (product * where).norm())
        direction = product
    if not math.isfinite(curvature) or curvature == 0:
        raise InstrumentError(f"the loss has curvature {curvature} at w*: nothing sets a scale, give lr and gamma")
    return curvature


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
    size = min(settings.batch_size, -(-len(index) // batches))
    trace = gradient_at_center(flat, examples, index, size, size, where)[2] / settings.batch_size
    trace *= 1 - settings.batch_size / examples.n
    size = flat.numel if where is None else int(where.sum())
    return settings.lr_and_gamma[0] * settings.nbeta_for(examples.n) ** 2 * trace / 8 / (size / 2)


def _gradient(flat: Flat, examples: Examples, index: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The gradient (parameter,) at `position` of the mean loss over the examples `index`, a chunk at a time."""
    total, grad = torch.zeros_like(position), torch.zeros_like(position)
    flat.bind(position, grad)
    for part in index.split(GRADIENT_CHUNK):
        grad.zero_()
        flat.backward(examples.batch(part))
        total.add_(grad, alpha=len(part) / len(index))
    return total
