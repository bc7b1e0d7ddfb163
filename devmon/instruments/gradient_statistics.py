"""The gradient of an update and the optimizer's state, as the loop hands them over, and the gradient's noise scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from devmon.cost import Cost
from devmon.data.rows import Rows
from devmon.errors import InstrumentError
from devmon.sampling.data import as_examples
from devmon.sampling.losses import Loss, next_token_loss
from devmon.snapshot import Snapshot, Update

Array = NDArray[np.float64]
MIN_BATCHES = 4  # small batches of the noise scale: its jackknife leaves out one at a time
# Of the gradient over the root of the second moments: 28 of 30 loss spikes of Wortsman et al. 2023 (2304.13013, 3.4)
# came 1 to 8 updates after it had passed this.
SPIKE_RMS = 2.3


@dataclass(frozen=True)
class GradientStatistics:
    """The gradient of an update, its size against the weights and the optimizer's state, and its noise.

    The loop hands over the gradients that its optimizer used (after accumulation, averaging over ranks and clipping),
    the weights before, and the second moments after: `Monitor` and `TrainerMonitor` by themselves, `LoopMonitor(...,
    optimizer=optimizer)` and `FabricMonitor` when told. `part` are the blocks of the model, and its other modules with
    parameters, by path. What an update alone has is NaN where none was made yet (step 0, or the first step after a
    resumption) and in measuring checkpoints; of an optimizer without second moments their variables are NaN.

    The noise scale is of `data`: `loss(model, batch) -> (batch,)` on the first examples, in small batches of
    `batch_size`, at the weights of the snapshot (McCandlish et al. 2018, 1812.06162, appendix A.1). With g_i the
    gradients of n small batches of b examples and G their mean, |G|² is estimated by (n |G|² − mean |g_i|²) / (n − 1),
    and tr Σ by b n (mean |g_i|² − |G|²) / (n − 1). Without data it is NaN.

    - `norm`, gradient: Euclidean norm of the gradient of the update.
    - `norm_by_part` (part), gradient: the same of the parameters of a part.
    - `update_ratio`, 1: norm of what the update changed over that of the weights before.
    - `update_ratio_by_part` (part), 1: the same of a part; NaN where its weights were 0.
    - `second_moment_share` (part), 1: (1 − β₂) Σg² / Σv, the share of Adam's second moments that this gradient made.
      Null: `second_moment_share_reference`.
    - `second_moment_share_reference`, 1: (1 − β₂) / (1 − β₂ᵗ) after t updates, of gradients that are as large as ever.
    - `rms` (part), 1: root of the mean of g² / max(v̂, ε²), v̂ the second moments without their bias: 1 for gradients
      as large as ever; a precursor of loss spikes above 2.3 (Wortsman et al. 2023, 2304.13013). Null: 1.
    - `largest_rms`, 1: the largest of them.
    - `noise_scale`, examples: tr Σ / |G|², the batch at which noise and gradient are equally large; NaN where |G|² is
      not told from 0.
    - `noise_scale_se`, examples: its standard error, a jackknife over small batches.
    - `noise_scale_by_part` (part), examples: of the gradient of a part.
    - `noise_scale_by_part_se` (part), examples: its standard error.
    - `gradient_square`, squared gradient: |G|² of the loss, without the part of it that is noise. Null: 0.
    - `gradient_square_se`, squared gradient: its standard error.

    The loop keeps a copy of weights, gradients and second moments from a due update to its measurement, and none at
    other steps. Raises InstrumentError where no loop hands updates over and there are no data, and for fewer than four
    small batches of data.
    """

    data: Any = None
    loss: Loss = next_token_loss
    batch_size: int = 8

    needs_update = True  # of the loop that measures

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        update = snapshot.update
        if update is None and self.data is None:
            raise InstrumentError(
                "GradientStatistics needs the optimizer of the training, LoopMonitor(..., optimizer=optimizer), or "
                "data for the noise scale, GradientStatistics(tokens): a checkpoint alone has no gradient"
            )
        parts = parts_of(snapshot.model)
        labels = list(parts)
        rows = Rows(["norm", "update_ratio", "largest_rms", "noise_scale"], "standard error over small batches")
        rows.attrs |= {"kind": "gradients", "spike_rms": SPIKE_RMS}
        _put_update(rows, Update() if update is None else update, parts)
        self._put_noise(rows, snapshot, parts)
        return rows.dataset(part=np.array(labels, dtype=object))

    def cost(self) -> Cost:
        """Two gradients of all data; two copies of the parameters, beside the three that the loop keeps."""
        if self.data is None:
            return Cost(copies=3)
        examples = as_examples(self.data)
        tokens = self.data if isinstance(self.data, Tensor) and self.data.ndim == 2 else None
        positions = 1 if tokens is None else tokens.shape[1]
        return Cost(forwards=2 * examples.n, backwards=2 * examples.n, positions=positions, copies=5)

    def _put_noise(self, rows: Rows, snapshot: Snapshot, parts: Mapping[str, list[str]]) -> None:
        nothing = np.full(len(parts), np.nan)
        scale = scale_se = square = square_se = np.nan
        by_part, by_part_se = nothing, nothing
        if self.data is not None:
            # Of each small batch and part |g|² and G · g, then both estimates and what leaving one batch out makes.
            squares, dots = self._gradients(snapshot, parts)
            whole = noise_scale(squares.sum(1, keepdims=True), dots.sum(1, keepdims=True), self.batch_size)
            scale, scale_se, square, square_se = (float(each[0]) for each in whole)
            by_part, by_part_se, _, _ = noise_scale(squares, dots, self.batch_size)
        told = "the gradient is not told from 0, or there are no data"
        rows.put("noise_scale", (), scale, scale_se, "noise scale of the gradient", units="examples", nan=told)
        rows.put(
            "noise_scale_by_part", "part", by_part, by_part_se, "noise scale of a part", units="examples", nan=told
        )
        rows.put(
            "gradient_square", (), square, square_se, "squared norm of the gradient without noise",
            units="squared gradient", nan="there are no data",
        )  # fmt: skip

    def _gradients(self, snapshot: Snapshot, parts: Mapping[str, list[str]]) -> tuple[Array, Array]:
        """(batch, part): |g_i|² of each small batch, and G · g_i with G their mean."""
        examples = as_examples(self.data).to(snapshot.device, next(snapshot.model.parameters()).dtype)
        count = examples.n // self.batch_size
        if count < MIN_BATCHES:
            raise InstrumentError(
                f"GradientStatistics needs {MIN_BATCHES} small batches of {self.batch_size} examples, got "
                f"{examples.n} examples: give more, or a smaller batch_size"
            )
        named = dict(snapshot.model.named_parameters())
        names = [name for group in parts.values() for name in group]
        before = [parameter.requires_grad for parameter in named.values()]
        for name in named:
            named[name].requires_grad_(name in names)

        def gradient(number: int) -> list[Tensor]:
            rows = torch.arange(number * self.batch_size, (number + 1) * self.batch_size, device=snapshot.device)
            with torch.enable_grad():
                loss = self.loss(snapshot.model, examples.batch(rows)).mean()
                found = torch.autograd.grad(loss, [named[name] for name in names], allow_unused=True)
            pairs = zip(names, found, strict=True)
            return [torch.zeros_like(named[name]) if g is None else g.detach() for name, g in pairs]

        # Two passes over the data instead of all gradients at once in memory.
        mean = [torch.zeros_like(named[name], dtype=torch.float32) for name in names]
        for number in range(count):
            for total, g in zip(mean, gradient(number), strict=True):
                total.add_(g, alpha=1 / count)
        squares, dots = (np.zeros((count, len(parts))) for _ in range(2))
        ends = np.cumsum([len(group) for group in parts.values()])[:-1]
        for number in range(count):
            found = gradient(number)
            own = [float((g.double() * g.double()).sum()) for g in found]
            with_mean = [float((g.double() * m.double()).sum()) for g, m in zip(found, mean, strict=True)]
            squares[number] = [part.sum() for part in np.split(np.array(own), ends)]
            dots[number] = [part.sum() for part in np.split(np.array(with_mean), ends)]
        for parameter, needed in zip(named.values(), before, strict=True):
            parameter.requires_grad_(needed)
        return squares, dots


def noise_scale(squares: Array, dots: Array, batch_size: int) -> tuple[Array, Array, Array, Array]:
    """Noise scale and |G|² (part,), each with its standard error, of |g_i|² and G · g_i (batch, part).

    Returns (noise scale, its error, |G|², its error), NaN for a scale where |G|² is not above 0.
    """
    n = len(squares)
    big = dots.mean(0)  # |G|² = mean of G · g_i

    def estimate(count: int, big: Array, small: Array) -> tuple[Array, Array]:
        square = (count * big - small) / (count - 1)
        trace = batch_size * count * (small - big) / (count - 1)
        return np.where(square > 0, trace / np.where(square > 0, square, 1), np.nan), square

    scale, square = estimate(n, big, squares.mean(0))
    # Without batch i: |n G − g_i|² / (n − 1)², and the mean of the others' squares.
    left_out = (n * n * big - 2 * n * dots + squares) / (n - 1) ** 2
    scales, values = estimate(n - 1, left_out, (n * squares.mean(0) - squares) / (n - 1))
    errors = [np.sqrt((n - 1) / n * ((each - each.mean(0)) ** 2).sum(0)) for each in (scales, values)]
    return scale, errors[0], square, errors[1]


def parts_of(model: nn.Module) -> dict[str, list[str]]:
    """The blocks of a model, and its other modules with parameters, each with the names of its parameters.

    >>> list(parts_of(nn.ModuleDict({"h": nn.ModuleList([nn.Linear(1, 1)]), "out": nn.Linear(1, 1)})))
    ['h.0', 'out']
    """
    parts: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        path = name.split(".")
        number = next((i for i, word in enumerate(path) if word.isdecimal()), None)
        label = ".".join(path[: number + 1] if number is not None else path[:-1] or path)
        parts.setdefault(label, []).append(name)
    return parts


def _put_update(rows: Rows, update: Update, parts: Mapping[str, list[str]]) -> None:
    """What the update alone tells, summed over the parameters of each part that had a gradient."""
    gradient, changed, weight, moment, ratio, size = (np.zeros(len(parts)) for _ in range(6))
    share_null = np.nan
    for index, names in enumerate(parts.values()):
        for name in names:
            g, v = update.gradients.get(name), update.second_moments.get(name)
            if g is None:
                continue
            g = g.double()
            gradient[index] += float(g.square().sum())
            if name in update.before:
                before = update.before[name].double()
                weight[index] += float(before.square().sum())
                changed[index] += float((update.after[name].double() - before).square().sum())
            if v is not None:
                beta, eps, count = update.adam[name]
                unbiased = v.double() / (1 - beta**count)
                moment[index] += float(v.double().sum()) / (1 - beta)
                ratio[index] += float((g.square() / unbiased.clamp(min=max(eps, 1e-30) ** 2)).sum())
                size[index] += g.numel()
                share_null = (1 - beta) / (1 - beta**count)

    # Root and ratio of what was summed; NaN where nothing was.
    made = bool(update.gradients)
    none = "no update was made yet, or none was handed over"
    with np.errstate(divide="ignore", invalid="ignore"):
        norm = np.sqrt(gradient) if made else gradient * np.nan
        relative = np.sqrt(changed / weight)
        total = float(np.sqrt(changed.sum() / weight.sum()))
        share, rms = gradient / moment, np.sqrt(ratio / size)
    share, rms, relative = (np.where(np.isfinite(each), each, np.nan) for each in (share, rms, relative))
    whole = float(np.sqrt(gradient.sum())) if made else np.nan
    largest = float(np.nanmax(rms)) if np.isfinite(rms).any() else np.nan
    rows.put("norm", (), whole, None, "norm of the gradient", units="gradient", nan=none)
    rows.put("norm_by_part", "part", norm, None, "norm of the gradient of a part", units="gradient", nan=none)
    rows.put("update_ratio", (), total, None, "norm of the update over that of the weights", units="1", nan=none)
    rows.put("update_ratio_by_part", "part", relative, None, "the same of a part", units="1", nan=none)
    no_moments = f"{none}, or the optimizer has no second moments"
    rows.put(
        "second_moment_share", "part", share, None, "share of the second moments that this gradient made", units="1",
        nan=no_moments,
    )  # fmt: skip
    rows.put(
        "second_moment_share_reference", (), share_null, None, "that share for gradients as large as ever", units="1",
        nan=no_moments,
    )  # fmt: skip
    rows.put("rms", "part", rms, None, "gradient over the root of the second moments", units="1", nan=no_moments)
    rows.put("largest_rms", (), largest, None, "the largest rms of a part", units="1", nan=no_moments)
