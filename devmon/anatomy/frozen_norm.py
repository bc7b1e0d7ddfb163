"""A norm with its scale frozen: a linear map, so that what goes through it can be split into parts."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from devmon.errors import InstrumentError

FUNCTIONS: dict[str, Callable[..., Tensor]] = {"rms_norm": F.rms_norm, "layer_norm": F.layer_norm}
LARGE_INPUT = 1e3  # of a number that is tried: ε of a norm, at most 1e-5, is then 1e-11 of its square
MAX_MISMATCH = 1e-3  # of the answer: float32 gives 1e-6, the wrong kind an answer of order one


class FrozenNorm:
    """LayerNorm, RMSNorm or a plain scale, told apart by what they do: x ↦ gain · (x − mean?) / scale(x) + bias.

    `gain`, `bias` (d,); `centres` says whether the mean over d is taken off. None is the identity. What is learnt here
    holds for maps of this form only; `Anatomy.rebuild` and the closure of `ResidualAttribution` show where one is not.
    """

    def __init__(self, module: nn.Module | None, size: int, like: Tensor) -> None:
        self.module = module
        self.gain, self.bias = torch.ones(size).to(like), torch.zeros(size).to(like)
        self.centres = self.normalises = False
        if module is None:
            return

        # Half precision rounds as coarsely as MAX_MISMATCH, so a copy in float32 is tried.
        half = like.dtype in (torch.float16, torch.bfloat16)
        probed = copy.deepcopy(module).float() if half else module
        ones = torch.ones(size, device=like.device, dtype=torch.float32 if half else like.dtype)
        with torch.no_grad():
            # Of the zero vector the bias is left. Vectors of equal numbers tell the kinds apart: what takes the mean
            # off makes zero of them, what divides by a scale makes the same of a vector and of its double, and what
            # does neither doubles. They are large, so that the ε under the root does not count.
            bias = probed(0 * ones)
            once, twice = (probed(k * LARGE_INPUT * ones) - bias for k in (1, 2))
            self.centres = bool(once.abs().max() <= MAX_MISMATCH * (1 + bias.abs().max()))
            self.normalises = self.centres or bool((twice - once).abs().max() <= MAX_MISMATCH * once.abs().max())

            # The gain of a scale is its answer to ones; of a norm, its answer to a vector whose mean is zero already.
            gain = once / LARGE_INPUT
            if self.normalises:
                alternating = LARGE_INPUT * (1 - 2 * (torch.arange(size, device=like.device) % 2)) * ones
                flat = alternating - alternating.mean() if self.centres else alternating
                gain = (probed(alternating) - bias) * flat.square().mean().sqrt() / flat
        self.gain, self.bias = gain.to(like), bias.to(like)

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.module is None else self.module(x)

    def scale(self, x: Tensor) -> Tensor:
        """What (…, d) is divided by, (…, 1)."""
        if not self.normalises:
            return torch.ones_like(x[..., :1])
        # The answer without its bias is gain · x' / s: s by least squares over d, as some coordinates may have gain 0.
        weighted = self._centred(x) * self.gain
        answer = self(x) - self.bias
        return (weighted * weighted).sum(-1, keepdim=True) / (weighted * answer).sum(-1, keepdim=True)

    def linear(self, part: Tensor, scale: Tensor) -> Tensor:
        """A part of the input (…, d) through the norm whose scale is frozen at `scale` (…, 1); without the bias."""
        return part if self.module is None else self._centred(part) * self.gain / scale

    def pulled(self, direction: Tensor) -> Tensor:
        """The direction (…, d) in the input that reads the same: linear(x, scale) · u = x · pulled(u) / scale."""
        return direction if self.module is None else self._centred(direction * self.gain)

    def _centred(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centres else x


class FunctionalNorm(nn.Module):
    """A norm without weights that a model calls as a function: `name` is "rms_norm" or "layer_norm"."""

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in FUNCTIONS:
            raise InstrumentError(f"there is no functional norm F.{name}: those are F.{', F.'.join(FUNCTIONS)}")
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.name](x, (x.shape[-1],))
