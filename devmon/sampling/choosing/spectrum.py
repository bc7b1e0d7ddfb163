"""How curved the loss is around w*: the spectrum of its Hessian, and what localisation and short chains leave of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from devmon.errors import InstrumentError
from devmon.sampling.constants import (
    CURVATURE_EXAMPLES,
    DENSE,
    DIFFERENCE_STEP,
    LANCZOS_STEPS,
    POWER_ROUNDS,
    PROBES,
    SCALE_ROUNDS,
    ZERO_CURVATURE,
)
from devmon.sampling.data import Examples, as_examples
from devmon.sampling.flat import Flat
from devmon.sampling.losses import Loss, check_losses
from devmon.sampling.masks import as_mask
from devmon.sampling.traces import Settings
from devmon.snapshot import derive_seed

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Spectrum:
    """The curvatures aⱼ = nbeta hⱼ of nbeta L at w* and how many directions have each.

    - `scales` (k,), `counts` (k,): aⱼ ≥ 0 and its number of directions; they sum to the parameters that move
    - `scale`: what sets lr and gamma: the largest curvature, at w* or as far from it as a Gaussian of that precision
      reaches, where the loss is not quadratic that near
    - `gradients`: examples whose gradient was taken
    """

    scales: NDArray[np.float64]
    counts: NDArray[np.float64]
    scale: float
    gradients: int = 0

    def llc(self, gamma: float = 0.0) -> float:
        """½ tr a (a + gamma)⁻¹: what λ̂ would be at `gamma` if the loss were quadratic; half the rank at 0."""
        curved = self.scales > 0
        a = self.scales[curved]
        return float(0.5 * (self.counts[curved] * a / (a + gamma)).sum())

    def filled(self, gamma: float, times: tuple[float, float]) -> tuple[float, float]:
        """λ̂ and the temperature of chains that start at w*, means over `times` (from, to), if the loss were quadratic.

        A direction relaxes as a Gaussian does: 1 − exp(−2 (a + gamma) t) of its variance is there at time t, in steps
        times `mobility`.
        """
        rate = 2 * (self.scales + gamma)
        start, end = times
        left = (np.exp(-rate * start) - np.exp(-rate * end)) / np.maximum(rate * (end - start), 1e-300)
        share = self.counts * (1 - left)
        return float(0.5 * (share * self.scales / (self.scales + gamma)).sum()), float(share.sum() / self.counts.sum())


def mobility(settings: Settings) -> float:
    """How far a force of one moves a chain in a step, per lr: ½ for SGLD, ½ (1 + c) / (1 − c) with momentum c."""
    kernel = settings.sampler
    momentum = getattr(kernel, "momentum", 0.5 if kernel in ("baoab", "sgnht") else 0.0)
    return 0.5 * (1 + momentum) / (1 - momentum)


def spectrum(
    model: nn.Module, loss: Loss, data: Any, settings: Settings, *, seed: int = 0, examples: int = CURVATURE_EXAMPLES
) -> Spectrum:
    """The spectrum of nbeta L at w*, from products with its Hessian on `examples` of the data.

    The products are differences of gradients in float64: fused attention has no second derivative. Few parameters are
    taken one by one, which is exact; of many, stochastic Lanczos quadrature gives the density (Ghorbani et al. 2019,
    1901.10159): the trace of a function of H to about √(2 / (probes · directions)). At a minimum what is negative is
    the noise of a part of the data, and as much of the positive side counts as flat. Raises InstrumentError where
    nothing has curvature, or it is not finite.
    """
    nbeta = settings.nbeta_for(as_examples(data).n)
    hessian, generator = _part_of(model, loss, data, settings, seed, examples)
    flat, where = hessian.flat, hessian.where

    # Few directions one by one; of many, what random vectors see of the density.
    free = torch.arange(len(flat.center)) if where is None else where.nonzero().flatten()
    if len(free) <= DENSE:
        units = torch.eye(len(flat.center), dtype=torch.float64, device=flat.center.device)[free]
        dense = torch.stack([hessian(unit)[free] for unit in units]).cpu().numpy()
        nodes, counts = np.linalg.eigvalsh((dense + dense.T) / 2), np.ones(len(free))
    else:
        parts = [_lanczos(hessian, generator, len(free)) for _ in range(PROBES)]
        nodes, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
        counts = counts / PROBES

    # Least and largest eigenvalue of the part of the data say what of the small ones is noise.
    scales = nbeta * nodes
    scale = _scale(hessian, nbeta, float(scales.max()), generator)
    floor = max(ZERO_CURVATURE * scale, -float(scales.min()))
    return Spectrum(np.where(scales > floor, scales, 0.0), counts, scale, hessian.gradients)


def largest_curvature(
    model: nn.Module, loss: Loss, data: Any, settings: Settings, *, seed: int = 0, rounds: int = 3 * POWER_ROUNDS
) -> float:
    """The largest curvature of the mean loss at w*, by power iteration: at less cost than that of a whole `spectrum`.

    Raises InstrumentError where it is 0 or not finite.
    """
    hessian, generator = _part_of(model, loss, data, settings, seed, CURVATURE_EXAMPLES // 4)
    direction, curvature = hessian.normal(generator), 0.0
    for _ in range(rounds):
        direction = hessian(direction / direction.norm().clamp(min=1e-300))
        curvature = float(direction.norm())
    if curvature == 0:
        raise InstrumentError("the loss has curvature 0 at w*: nothing sets a scale, give lr and gamma")
    return curvature


def _part_of(
    model: nn.Module, loss: Loss, data: Any, settings: Settings, seed: int, examples: int
) -> tuple[_Hessian, torch.Generator]:
    """Products with the Hessian on a random part of the data, and what is drawn next."""
    every = as_examples(data)
    mask = as_mask(settings.mask, model)
    flat = Flat(model, loss, torch.float64, None if mask is None else mask.names)
    where = None if mask is None else mask.vector(flat.names, flat.shapes, flat.center)
    generator = torch.Generator().manual_seed(derive_seed(seed, "curvature"))
    index = torch.randperm(every.n, generator=generator)[:examples]
    some = Examples(every.batch(index), len(index)).to(flat.center.device, torch.float64)
    flat.bind(flat.center, torch.zeros_like(flat.center))
    check_losses(flat.losses(some.batch(torch.arange(1, device=flat.center.device))), 1)
    return _Hessian(flat, some, settings.batch_size, where), generator


class _Hessian:
    """Products H v ≈ (∇L(w + ε v) − ∇L(w − ε v)) / 2ε of the mean loss over `examples`, within the mask, at w*."""

    def __init__(self, flat: Flat, examples: Examples, chunk: int, where: Tensor | None) -> None:
        self.flat, self.examples, self.chunk, self.where = flat, examples, chunk, where
        self.gradients = 0
        self.grad = torch.zeros_like(flat.center)

    def __call__(self, direction: Tensor, at: Tensor | None = None) -> Tensor:
        center = self.flat.center if at is None else at
        norm = direction.norm().clamp(min=1e-300)
        step = DIFFERENCE_STEP * (1 + self.flat.center.norm() / math.sqrt(len(center))) / norm
        ends = [self._gradient(center + sign * step * direction) for sign in (1, -1)]
        product = (ends[0] - ends[1]) / (2 * step)
        if at is None and not torch.isfinite(product).all():
            raise InstrumentError(
                "the curvature of the loss at w* is not finite: look for a norm, root or logarithm at 0"
            )
        return product if self.where is None else product * self.where

    def _gradient(self, position: Tensor) -> Tensor:
        """The gradient (parameter,) at `position` of the mean loss, a chunk of examples at a time."""
        total = torch.zeros_like(position)
        self.flat.bind(position, self.grad)
        for part in torch.arange(self.examples.n, device=position.device).split(self.chunk):
            self.grad.zero_()
            self.flat.backward(self.examples.batch(part))
            total.add_(self.grad, alpha=len(part) / self.examples.n)
        self.gradients += self.examples.n
        return total

    def normal(self, generator: torch.Generator) -> Tensor:
        """Standard normals (parameter,), 0 where a parameter rests."""
        draw = torch.randn(self.flat.center.shape, generator=generator, dtype=torch.float64).to(self.flat.center)
        return draw if self.where is None else draw * self.where


def _lanczos(hessian: _Hessian, generator: torch.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of a quadrature of the density of H as one random vector sees it; the weights sum to `size`.

    Three vectors are held: without reorthogonalising nodes repeat, and share their weight. Where H has no negative
    curvature the rule is Gauss and Radau's with a node at 0 (Golub 1973): what cannot be told from flat is flat.
    """
    vector = hessian.normal(generator)
    vector /= vector.norm()
    before, alphas, betas = torch.zeros_like(vector), [], [0.0]
    for _ in range(LANCZOS_STEPS):
        image = hessian(vector).sub_(before, alpha=betas[-1])
        alphas.append(float(image @ vector))
        image.sub_(vector, alpha=alphas[-1])
        betas.append(float(image.norm()))
        if betas[-1] <= ZERO_CURVATURE * max(map(abs, alphas)):
            break
        before, vector = vector, image / betas[-1]
    inner = betas[1 : len(alphas)]
    matrix = np.diag(alphas) + np.diag(inner, 1) + np.diag(inner, -1)
    if inner and np.linalg.eigvalsh(matrix)[0] > 0:
        last = np.zeros(len(inner))
        last[-1] = inner[-1] ** 2
        matrix[-1, -1] = np.linalg.solve(matrix[:-1, :-1], last)[-1]
    nodes, vectors = np.linalg.eigh(matrix)
    return nodes, size * vectors[0] ** 2


def _scale(hessian: _Hessian, nbeta: float, top: float, generator: torch.Generator) -> float:
    """The curvature s of nbeta L that a Gaussian of precision s around w* meets, at least that at w* itself, `top`.

    Where the loss is quadratic that far, it is `top`. At a singular point the curvature grows with the distance: then
    s = curvature(1 / √s), found by geometric means. Raises InstrumentError where nothing has curvature.
    """
    away, scale = hessian.normal(generator), max(top, 1.0)
    for _ in range(SCALE_ROUNDS):
        there = hessian.flat.center + away / math.sqrt(scale)
        direction, found = away, 0.0
        for _ in range(POWER_ROUNDS):
            direction = hessian(direction / direction.norm().clamp(min=1e-300), there)
            found = nbeta * float(direction.norm())
        before, scale = scale, max(top, math.sqrt(scale * found)) if math.isfinite(found) else 100 * scale
        if scale == 0:
            raise InstrumentError("the loss has curvature 0 around w*: nothing sets a scale, give lr and gamma")
        if 0.5 < scale / before < 2:
            break
    return scale
