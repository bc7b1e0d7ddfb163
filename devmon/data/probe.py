"""Fixed probe data inside an instrument: checked once, compared by content, walked in minibatches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from devmon.errors import DataError

# Groups of items that a headline is kept on. The spread of R groups knows an error to 1/sqrt(2 (R - 1)) of itself: 27%
# for 8, 18% for 16. A run grows by as many numbers a step. Once a run has begun its number is part of its form.
REPLICATES = 8


class ByContent:
    """Equality and hash of a `@dataclass(frozen=True, eq=False)` over its fields, tensors by their bytes."""

    def _content(self) -> tuple[object, ...]:
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return tuple(
            (tuple(v.shape), str(v.dtype), v.cpu().numpy().tobytes()) if isinstance(v, Tensor) else v for v in values
        )

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, ByContent) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash((type(self), self._content()))


def probe_tokens(tokens: Tensor, who: str, name: str = "tokens", shortest: int = 2) -> Tensor:
    """The tokens as a contiguous (batch, pos) int64 CPU tensor of their own; DataError where they cannot be that."""
    kind = torch.as_tensor(tokens)
    if kind.ndim != 2 or kind.is_floating_point() or kind.dtype == torch.bool or not kind.shape[0]:
        raise DataError(f"{who} needs {name} (batch, pos) of integers, got {tuple(kind.shape)} of {kind.dtype}")
    if kind.shape[1] < shortest:
        raise DataError(f"{who} needs {name} of at least {shortest} positions, got {kind.shape[1]}")
    return kind.detach().to("cpu", torch.int64, copy=True).contiguous()


def probe_inputs(inputs: Tensor, who: str) -> Tensor:
    """`probe_tokens`, or inputs of another kind, (batch, …) of floats such as images, as a CPU tensor of their own."""
    given = torch.as_tensor(inputs)
    if not given.is_floating_point():
        return probe_tokens(given, who, shortest=1)
    if given.ndim < 2 or not len(given) or not torch.isfinite(given).all():
        raise DataError(
            f"{who} needs inputs (batch, …) of finite floats, or tokens, got {tuple(given.shape)} of {given.dtype}"
        )
    return given.detach().to("cpu", copy=True).contiguous()


def places_of(inputs: Tensor) -> int:
    """The positions of tokens (batch, pos); 1 for other inputs, whose states are averaged over their places."""
    return 1 if inputs.is_floating_point() else inputs.shape[1]


def random_tokens(vocab_size: int, sequences: int, length: int, seed: int = 0) -> Tensor:
    """Independent uniform tokens (sequences, length) int64 from a generator of their own."""
    if min(vocab_size, sequences, length) < 1:
        raise DataError(
            f"random tokens need vocab_size, sequences, length >= 1, got {vocab_size}, {sequences}, {length}"
        )
    return torch.randint(vocab_size, (sequences, length), generator=torch.Generator().manual_seed(seed))


def minibatches(sequences: int, batch_size: int) -> Iterator[slice]:
    """Slices that cover `sequences` in order, at most `batch_size` at a time.

    >>> list(minibatches(5, 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}")
    for start in range(0, sequences, batch_size):
        yield slice(start, min(start + batch_size, sequences))


def clustered_mean(total: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over items that come in independent sequences, and its standard error.

    `total` (sequence, ...) holds each sequence's sum, `count` (sequence,) its number of items; returns arrays (...).
    mean m = Σ total / Σ count; se = sqrt(n / (n - 1) Σ (total - m count)²) / Σ count over the n sequences with items:
    the linearised ratio estimator (Cochran, Sampling Techniques, 6.3), which is sd/√n where all counts are equal.
    The standard error is NaN for fewer than two sequences.
    """
    total, count = np.asarray(total, np.float64), np.asarray(count, np.float64)
    used = count > 0
    total, count, n = total[used], count[used], int(used.sum())
    if n == 0:
        return np.full(total.shape[1:], np.nan), np.full(total.shape[1:], np.nan)
    mean = total.sum(0) / count.sum()
    spread = ((total - mean * count.reshape(-1, *[1] * (total.ndim - 1))) ** 2).sum(0)
    return mean, np.sqrt(spread * n / (n - 1)) / count.sum() if n > 1 else np.full(mean.shape, np.nan)


def clustered_groups(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The mean of `clustered_mean` on fixed groups of its sequences, (replicate, ...).

    `count` is (sequence,), or of the shape of `total` where elements have counts of their own. Sequence i belongs to
    group (i + ⌊i / R⌋) mod R at every step, R the least of `REPLICATES` and the number of sequences: each round is
    dealt from the next group on, so that sequences whose kinds take turns are in all groups.

    With S_r and C_r the sums of group r, and θ = S / C the mean over all, its value is θ + R (S_r - θ C_r) / C: the
    linearised ratio estimator by groups. Their mean is θ exactly, also where counts differ, and their standard
    deviation over √R estimates the standard error. A contrast of θ over steps has the error of the same contrast of the
    groups, in which what the sequences have in common at all steps cancels. All are NaN where no sequence has items.
    """
    total, count = np.asarray(total, np.float64), np.asarray(count, np.float64)
    number = min(REPLICATES, len(count))
    with np.errstate(invalid="ignore", divide="ignore"):  # no items, or a loss that is infinite: NaN
        mean = total.sum(0) / count.sum(0)
        rest = total - mean * count.reshape(*count.shape, *[1] * (total.ndim - count.ndim))
        groups = np.zeros((number, *mean.shape))
        item = np.arange(len(count))
        np.add.at(groups, (item + item // max(number, 1)) % max(number, 1), rest)
        return np.asarray(mean + number * groups / count.sum(0))
