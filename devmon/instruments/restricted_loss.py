"""Restricted and excluded loss: what a model of addition modulo p computes with a few frequencies, and without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from devmon.anatomy import forward
from devmon.cost import Cost
from devmon.data import ByContent, minibatches
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.sampling.losses import outputs
from devmon.snapshot import Snapshot, derive_seed

LABELS = {
    "train_loss": "loss of the trained pairs",
    "test_loss": "loss of all other pairs",
    "restricted_loss": "loss of all pairs by the key frequencies alone",
    "restricted_loss_random": "the same by random frequencies",
    "excluded_loss": "loss of the trained pairs without the key frequencies",
    "excluded_loss_random": "the same without random frequencies",
}


@dataclass(frozen=True, eq=False)
class RestrictedLoss(ByContent):
    """Loss of a + b mod p with the logits' key frequencies alone, and without them: progress that the loss hides.

    The logits L(a, b) of all p² pairs, in float64, are projected on cos(2πk(a + b)/p) and sin(2πk(a + b)/p), the terms
    of the trigonometric solution (Nanda et al. 2023, 2301.05217). `train` (p, p) bool says which pairs are trained on,
    p odd. The model takes pairs (batch, 2) of integers, or (batch, 3) with `equals` as the third, and returns logits
    (batch, ≥ p), or (batch, pos, ≥ p), of which the last position counts. Key frequencies are `frequencies`, or,
    without them, those of the snapshot whose power is at least `threshold`; none at random weights, so restricted_loss
    starts at log p. Random frequencies are `draws` sets of as many others (as many as there are, where those are
    fewer). All pairs are measured, so there is no standard error.

    - `train_loss`, nats: mean loss of the trained pairs. Null: log p.
    - `test_loss`, nats: mean loss of all other pairs. Null: log p.
    - `train_accuracy`, share: right answers among the trained pairs.
    - `test_accuracy`, share: right answers among all other pairs.
    - `restricted_loss`, nats: loss over *all* pairs of the mean logits plus the projections on the key frequencies.
      Null: `restricted_loss_random`.
    - `restricted_loss_random`, nats: the same with random frequencies, averaged over the draws: near log p where the
      key frequencies are special.
    - `excluded_loss`, nats: loss over the *trained* pairs without the projections, all key frequencies taken out at
      once. Null: `excluded_loss_random`.
    - `excluded_loss_random`, nats: the same without random frequencies, averaged over the draws: near train_loss where
      the key frequencies are special.
    - `power` (frequency), share: of the variance of the logits over pairs along a frequency 1 .. (p - 1)/2, the mean
      over outputs taken off; NaN for logits that do not depend on the pair. Null: `power_reference`.
    - `power_reference`, share: 2 / (p² - 1), that of white noise.
    - `key` (frequency), 1: 1 for key frequencies, 0 for others.
    - `keys`, 1: how many key frequencies there are.
    - `key_power`, share: their power together.

    Pitfalls: which frequencies are key only the end of training tells: give those when checkpoints are measured
    afterwards, as in the paper, and no change of the set makes a step in the curves. Cost: p² pairs forward. Raises
    DataError for a mask or frequencies that cannot be used, InstrumentError for a model that does not take pairs or has
    fewer than p logits.
    """

    train: Tensor
    frequencies: tuple[int, ...] | None = None
    threshold: float = 0.02
    equals: int | None = None
    draws: int = 8
    seed: int = 0
    batch_size: int = 4096

    def __post_init__(self) -> None:
        train = torch.as_tensor(self.train)
        p = len(train) if train.ndim else 0
        if train.dtype != torch.bool or tuple(train.shape) != (p, p) or p < 3 or p % 2 == 0:
            got = f"{tuple(train.shape)} of {train.dtype}"
            raise DataError(f"RestrictedLoss needs train (p, p) of bool with p odd, got {got}")
        if bool(train.all()) or not bool(train.any()):
            raise DataError("RestrictedLoss needs pairs that are trained on and pairs that are not: train is all one")
        object.__setattr__(self, "train", train.detach().to("cpu", copy=True).contiguous())
        if self.frequencies is not None:
            given = tuple(sorted({int(k) for k in self.frequencies}))
            if not given or not 1 <= given[0] <= given[-1] <= p // 2:
                raise DataError(f"RestrictedLoss needs frequencies in 1 .. {p // 2} for p={p}, got {self.frequencies}")
            object.__setattr__(self, "frequencies", given)
        if not 0 < self.threshold < 1 or self.draws < 1:
            raise DataError(
                f"RestrictedLoss needs 0 < threshold < 1 and draws >= 1, got {self.threshold}, {self.draws}"
            )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        p = len(self.train)
        logits = self._logits(snapshot, p)  # (a, b, output)
        by_sum = _by_sum(logits)  # (sum, output): what is projected depends on a + b alone
        waves = np.fft.rfft(by_sum, axis=0)  # (frequency, output)

        # the power of each frequency, and the key ones
        varied = logits - logits.mean(-1, keepdim=True)
        total = float((varied - varied.mean((0, 1))).square().sum())
        strength = 2 * np.square(np.abs(waves - waves.mean(1, keepdims=True))).sum(1)[1:]
        power = strength / total if total > 0 else np.full(p // 2, np.nan)
        key = self.frequencies or tuple((1 + np.flatnonzero(power >= self.threshold)).tolist())
        random = list(self._random([k for k in range(1, p // 2 + 1) if k not in key], len(key)))

        # losses, and their thresholded twins
        rows = Rows(headline=["train_loss", "test_loss", "restricted_loss", "excluded_loss"])
        sums = (torch.arange(p)[:, None] + torch.arange(p)) % p
        for name, value in self._losses(logits, sums, by_sum, waves, key, random).items():
            rows.put(name, (), value, None, LABELS[name], units="nats", smallest_change=0.05)
        right = logits.argmax(-1) == sums
        for name, mask in (("train", self.train), ("test", ~self.train)):
            share = float(right[mask].double().mean())
            rows.put(f"{name}_accuracy", (), share, None, f"share of right answers, {name}", units="share")

        # the spectrum, for a reader who wants another set of key frequencies
        of_keys, nothing = np.isin(np.arange(1, p // 2 + 1), key), "logits that do not depend on the pair"
        label = "share of the logits' variance along a frequency"
        rows.put("power", "frequency", power, None, label, units="share", nan=nothing)
        rows.put("power_reference", (), 2 / (p * p - 1), None, "power in white noise", units="share")
        rows.put("key", "frequency", of_keys.astype(np.int64), None, "1 for key frequencies", units="1")
        rows.put("keys", (), len(key), None, "number of key frequencies", units="1")
        key_power = float(power[of_keys].sum())
        rows.put("key_power", (), key_power, None, "power of the key frequencies", units="share")
        dataset = rows.dataset(frequency=np.arange(1, p // 2 + 1))
        for name in ("train", "test"):
            dataset[f"{name}_accuracy"].attrs["continuous_twin"] = f"{name}_loss"
        return dataset

    def _losses(
        self,
        logits: Tensor,
        sums: Tensor,
        by_sum: np.ndarray,
        waves: np.ndarray,
        key: Sequence[int],
        random: list[list[int]],
    ) -> dict[str, float]:
        """Loss by the whole logits, by the key frequencies alone and without them, and the same of random ones."""
        p, trained, answers = len(sums), self.train, sums[self.train]
        mean = torch.from_numpy(by_sum.mean(0))

        # what is left of a function of a + b on some frequencies
        def part(frequencies: Sequence[int]) -> Tensor:  # (sum, output)
            kept = np.zeros_like(waves)
            kept[list(frequencies)] = waves[list(frequencies)]
            return torch.from_numpy(np.fft.irfft(kept, n=p, axis=0))

        # over all pairs by way of the sums: each sum has as many pairs
        def restricted(frequencies: Sequence[int]) -> float:
            return float(F.cross_entropy(mean + part(frequencies), torch.arange(p)))

        # over the trained pairs: a table of them answers without any frequency
        def excluded(frequencies: Sequence[int]) -> float:
            return float(F.cross_entropy(logits[trained] - part(frequencies)[answers], answers))

        return {
            "train_loss": float(F.cross_entropy(logits[trained], answers)),
            "test_loss": float(F.cross_entropy(logits[~trained], sums[~trained])),
            "restricted_loss": restricted(key),
            "restricted_loss_random": float(np.mean([restricted(drawn) for drawn in random])),
            "excluded_loss": excluded(key),
            "excluded_loss_random": float(np.mean([excluded(drawn) for drawn in random])),
        }

    def cost(self) -> Cost:
        return Cost(forwards=len(self.train) ** 2, positions=2 + (self.equals is not None))

    def _logits(self, snapshot: Snapshot, p: int) -> Tensor:
        """(a, b, output) in float64, the outputs 0 .. p - 1."""
        pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
        if self.equals is not None:
            pairs = F.pad(pairs, (0, 1), value=self.equals)
        who, name = type(self).__name__, type(snapshot.model).__name__
        parts = []
        for rows in minibatches(len(pairs), self.batch_size):
            given = outputs(forward(snapshot.model, pairs[rows], who))
            given = given[:, -1] if given.ndim == 3 else given
            if given.ndim != 2 or len(given) != len(pairs[rows]) or given.shape[1] < p:
                raise InstrumentError(
                    f"{who} needs logits (batch, {p} or more), or (batch, pos, {p} or more), of pairs "
                    f"{tuple(pairs[rows].shape)}; {name} returned {tuple(given.shape)}: give the mask `train` of this "
                    "model's p, and `equals` if it reads one"
                )
            parts.append(given[:, :p].double().cpu())
        return torch.cat(parts).view(p, p, p)

    def _random(self, other: Sequence[int], size: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "RestrictedLoss"))
        for _ in range(self.draws):
            yield [other[i] for i in torch.randperm(len(other), generator=generator)[:size]]


def _by_sum(logits: Tensor) -> np.ndarray:
    """(sum, output): the mean over the p pairs of each sum."""
    p = len(logits)
    b = (torch.arange(p)[:, None] - torch.arange(p)) % p  # b[sum, a]
    return np.asarray(logits[torch.arange(p), b].mean(1))
