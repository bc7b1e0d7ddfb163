"""A ladder of temperatures: what the chains at further nbeta need, and how their traces lie beside the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr
from torch import nn

from devmon.errors import InstrumentError
from devmon.sampling.constants import REACH_DRAWS
from devmon.sampling.data import Examples
from devmon.sampling.flat import Flat
from devmon.sampling.losses import Loss
from devmon.sampling.masks import Mask
from devmon.snapshot import derive_seed

if TYPE_CHECKING:
    from devmon.sampling.traces import Settings


def lower_rungs(nbeta: float | Sequence[float] | None, sampler: Any) -> list[float]:
    """The nbetas of a ladder after the first; none where `nbeta` is one number or None.

    Raises InstrumentError for fewer than two, for repeated ones, and for a kernel that brings its own nbeta.
    """
    if not isinstance(nbeta, Sequence):
        return []
    rungs = [float(value) for value in nbeta]
    if len(rungs) < 2 or len(set(rungs)) < len(rungs) or not all(0 < value < math.inf for value in rungs):
        raise InstrumentError(f"a ladder needs at least two different positive nbetas, got {rungs}")
    if not isinstance(sampler, str):
        raise InstrumentError(
            f"a ladder sets nbeta and lr of each rung, but the kernel {sampler!r} brings its own: name it as a string"
        )
    return rungs[1:]


def lr_of_rung(lr: float, top: float, nbeta: float, gamma: float) -> float:
    """The step size at another nbeta: lr · nbeta as at `top`, so that curved directions relax in as many steps and the
    same noise moves them alike; no larger than 1 / gamma (or lr), where flat directions would begin to overshoot."""
    return min(lr * top / nbeta, max(lr, 1 / gamma) if gamma > 0 else math.inf)


def reach(
    model: nn.Module, loss: Loss, examples: Examples, settings: Settings, mask: Mask | None, *, seed: int
) -> tuple[float, float]:
    """E[L(w) − L(w*)] with w ~ N(w*, 1/gamma), the law without data, and its part beyond the second order.

    From a minibatch and 8 draws, each at its whole and half its distance s: with a s² + b s⁴ the part b is
    (4/3)(L(δ) − 4 L(δ/2)). It is the scale inside the logarithm of a multiplicity (`devmon.analysis.ladder`).
    """
    dtype = torch.float64 if settings.float64 else torch.float32
    flat = Flat(model, loss, dtype, None if mask is None else mask.names)
    center = flat.center
    where = None if mask is None else mask.vector(flat.names, flat.shapes, center)
    generator = torch.Generator(center.device).manual_seed(derive_seed(seed, "reach"))
    index = torch.arange(min(settings.batch_size, examples.n), device=center.device)
    batch = examples.to(center.device, dtype).batch(index)

    def mean_loss(position: torch.Tensor) -> float:
        flat.bind(position, torch.zeros_like(center))
        return float(flat.losses(batch).double().mean())

    at_center, far, half = mean_loss(center), 0.0, 0.0
    for _ in range(REACH_DRAWS):
        away = torch.randn(center.shape, generator=generator, device=center.device, dtype=dtype)
        away = away / math.sqrt(settings.lr_and_gamma[1])
        away = away if where is None else away * where
        far += (mean_loss(center + away) - at_center) / REACH_DRAWS
        half += (mean_loss(center + away / 2) - at_center) / REACH_DRAWS
    return far, 4 / 3 * (far - 4 * half)


def with_rungs(dataset: xr.Dataset, rungs: Sequence[xr.Dataset], reached: tuple[float, float]) -> xr.Dataset:
    """`dataset` with the traces of the further rungs as `ladder_loss` … over (rung, chain, draw); `rung` is nbeta."""
    names = [name for name in dataset.data_vars if dataset[name].dims == ("chain", "draw") and name in rungs[0]]
    coordinate = xr.Variable("rung", [rung.attrs["nbeta"] for rung in rungs], {"long_name": "nbeta"})
    variables: dict[str, Any] = {
        f"ladder_{name}": xr.concat([rung[name] for rung in rungs], coordinate, coords="minimal", compat="override")
        for name in names
    }
    variables["ladder_lr"] = ("rung", [rung.attrs["lr"] for rung in rungs], {"long_name": "lr", "units": "1"})
    for name, value in zip(("ladder_reach", "ladder_reach_beyond"), reached, strict=True):
        variables[name] = ((), value, {"long_name": "rise of the loss under the localising Gaussian", "units": "loss"})
    return dataset.assign(variables)
