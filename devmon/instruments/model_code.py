"""Model code: the fewest bits that say the weights, rounded as coarsely as the loss allows."""

from __future__ import annotations

import bz2
import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.cost import Cost
from devmon.data import minibatches
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.sampling.data import Examples, as_examples
from devmon.sampling.losses import Loss, next_token_loss
from devmon.snapshot import Snapshot

# Grid spacings, in root mean squares of each tensor, coarsest first: at 4 nearly all of a Gaussian is 0, at 2⁻⁹ a
# weight takes 11 bits. A finer ladder would know the bits of a weight better than to ±½.
SPACINGS = tuple(4 / 2**step for step in range(12))
HEADER = 32  # bits for the spacing of each tensor


@dataclass(frozen=True)
class ModelCode:
    """Length of a code of the weights that keeps the loss within a `tolerance`: DeMoss et al. 2024 (2412.09810).

    Each parameter is rounded to multiples of a spacing, which is a number of twelve times its root mean square, the
    same number for all; the coarsest is taken at which the mean `loss(model, batch)` over `data` (as of an LLC) has
    risen by `tolerance` at most, and all finer ones too. The whole numbers are compressed by bzip2, 32 bits a tensor
    added. Simplified from the paper, which also cuts the rank of matrices. Published: up while a net memorises, down
    when it groks.

    - `bits` (tolerance), bits: length of the code. Null: `bits_permuted`. NaN where even the finest loses more.
    - `bits_permuted` (tolerance), bits: of the same whole numbers in random order within each parameter: what their
      values cost without their places. Structure makes `bits` smaller than this.
    - `bits_per_weight` (tolerance), bits per weight: bits over the number of parameters.
    - `spacing` (tolerance), 1: the multiple of the root mean square.
    - `loss_coded` (tolerance), nats: loss of the rounded model.
    - `loss_coded_se` (tolerance), nats: its standard error over examples.
    - `loss`, nats: of the model as it is.
    - `loss_se`, nats: its standard error over examples.

    What it is not: the Kolmogorov complexity, nor a bound on what the net could be said with: a general compressor sees
    no symmetry, and a spacing is known to a factor of 2, so `bits` moves in steps of about one bit a weight and follows
    the widths of the loss's basin as much as the function. A function of weights and data: no error of `bits`. Cost: 13
    passes of `data`, and a copy of the model. Raises DataError for a tolerance below 0, InstrumentError for a loss that
    is not finite.
    """

    data: Any
    loss: Loss = next_token_loss
    tolerance: tuple[float, ...] = (0.05,)
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not self.tolerance or min(self.tolerance) < 0:
            raise DataError(f"ModelCode needs a tolerance of at least 0 nats, got {self.tolerance}")

    def cost(self) -> Cost:
        examples = as_examples(self.data)
        passes = (1 + len(SPACINGS)) * examples.n
        return Cost(forwards=passes, positions=examples.positions(), copies=1.0)

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        model = copy.deepcopy(snapshot.model)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        examples = as_examples(self.data).to(snapshot.device, dtype)
        weights = [(p, p.detach().clone()) for p in model.parameters() if p.numel()]
        as_is = self._losses(model, examples)
        if not np.isfinite(as_is).all():
            raise InstrumentError(f"ModelCode: the loss of {type(model).__name__} is not finite on the data given")

        # the loss at every spacing, coarsest first
        coded = []
        for spacing in SPACINGS:
            with torch.no_grad():
                for p, own in weights:
                    step = _step(own, spacing)
                    p.copy_(((own.double() / step).round() * step).to(own.dtype) if step else own)
            coded.append(self._losses(model, examples))
        rise = np.array([losses.mean() for losses in coded]) - as_is.mean()

        # of each tolerance the coarsest that keeps to it, as do all finer ones
        size = sum(own.numel() for _, own in weights)
        bits, mixed, chosen, left = (np.full(len(self.tolerance), np.nan) for _ in range(4))
        left_se = left.copy()
        for i, tolerance in enumerate(self.tolerance):
            kept = np.flatnonzero(np.cumprod((rise <= tolerance)[::-1])[::-1])
            if len(kept):
                chosen[i] = SPACINGS[kept[0]]
                draw = snapshot.generator("permuted")
                bits[i], mixed[i] = _bits([own for _, own in weights], float(chosen[i]), draw)
                left[i], left_se[i] = _mean(coded[kept[0]])

        rows, dim = Rows(headline=["bits"], error="standard error over examples"), "tolerance"
        nan = "even the finest spacing loses more"
        rows.put("bits", dim, bits, None, "length of the code of the weights", units="bits", nan=nan)
        rows.put("bits_permuted", dim, mixed, None, "the same, places permuted", units="bits", nan=nan)
        rows.put("bits_per_weight", dim, bits / size, None, "bits of a weight", units="bits per weight", nan=nan)
        label = "spacing in root mean squares of a parameter"
        rows.put("spacing", dim, chosen, None, label, units="1", nan=nan)
        rows.put("loss_coded", dim, left, left_se, "loss of the rounded model", units="nats", nan=nan)
        rows.put("loss", (), *_mean(as_is), "loss of the model", units="nats")
        return rows.dataset(tolerance=np.array(self.tolerance, float))

    def _losses(self, model: nn.Module, examples: Examples) -> np.ndarray:
        """Of each example, (n,)."""
        read, every = examples.reader(), torch.arange(examples.n)
        with torch.no_grad():
            parts = [self.loss(model, read(every[at])) for at in minibatches(examples.n, self.batch_size)]
        return torch.cat(parts).double().cpu().numpy()


def _mean(losses: np.ndarray) -> tuple[float, float]:
    n = len(losses)
    return float(losses.mean()), float(losses.std(ddof=1) / n**0.5) if n > 1 else float("nan")


def _step(weight: Tensor, spacing: float) -> float:
    """The distance of two grid points; 0 for a parameter that is 0, which needs none."""
    return spacing * float(weight.double().square().mean().sqrt())


def _bits(weights: list[Tensor], spacing: float, draw: torch.Generator) -> tuple[float, float]:
    """Bits of the rounded weights, and of the same in random order within each parameter."""
    whole, mixed = [], []
    for weight in weights:
        step = _step(weight, spacing)
        numbers = (weight.double() / step).round().flatten().cpu().to(torch.int32) if step else weight.flatten().cpu()
        numbers = numbers.to(torch.int32)
        whole.append(numbers)
        mixed.append(numbers[torch.randperm(len(numbers), generator=draw)])
    return _packed(whole) + HEADER * len(weights), _packed(mixed) + HEADER * len(weights)


def _packed(numbers: list[Tensor]) -> float:
    """Bits of the compressed numbers, in as few bytes each as hold them."""
    every = torch.cat(numbers).numpy()
    most = int(np.abs(every).max(initial=0))
    kind = np.int8 if most < 2**7 else np.int16 if most < 2**15 else np.int32
    planes = every.astype(kind).view(np.uint8).reshape(len(every), -1).T  # bytes of one significance together
    return 8.0 * len(bz2.compress(np.ascontiguousarray(planes).tobytes()))
