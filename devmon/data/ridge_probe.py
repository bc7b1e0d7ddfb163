"""The linear probe that instruments share: its split into halves, and ridge regression on one-hot labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from devmon.data.grammars import IGNORED
from devmon.errors import DataError
from devmon.snapshot import derive_seed


@dataclass(frozen=True)
class Labelled:
    """The labelled places (batch, pos); per labelled token the number of its class, its sequence, and whether it
    trains."""

    used: Tensor
    label: np.ndarray
    sequence: np.ndarray
    train: np.ndarray
    classes: int

    @property
    def majority(self) -> float:
        """Share of the most frequent training label among the test tokens."""
        most = np.bincount(self.label[self.train]).argmax()
        return float((self.label[~self.train] == most).mean())

    @property
    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """For each test token the number of its sequence among those, and how many tokens each has."""
        where = np.unique(self.sequence[~self.train], return_inverse=True)[1]
        return where, np.bincount(where)


def labelled(labels: Tensor, seed: int, who: str) -> Labelled:
    """Half of the sequences of `labels` (batch, pos), drawn by `seed`, train; DataError where no probe can be."""
    used = labels != IGNORED
    classes, label = np.unique(labels[used].numpy(), return_inverse=True)
    sequence = used.nonzero()[:, 0].numpy()
    order = torch.randperm(len(labels), generator=probe_generator(seed, "split")).numpy()
    train = np.isin(sequence, order[: len(order) // 2])
    held_out = len(np.unique(sequence[~train]))
    if len(classes) < 2 or held_out < 2 or len(np.unique(label[train])) < 2:
        raise DataError(
            f"{who} needs two classes in the training half and two labelled sequences in the other; got "
            f"{len(np.unique(label[train]))} of {len(classes)} classes in training and {held_out} sequences held "
            "out: give more labelled sequences"
        )
    return Labelled(used, label, sequence, train, len(classes))


def probe_generator(seed: int, what: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, "LinearProbe", what))


@dataclass(frozen=True)
class Ridge:
    """A linear map of states: scores (token, target) = (features - mean) / scale @ weights + base."""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    base: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return (features - self.mean) / self.scale @ self.weights + self.base


def ridge(features: np.ndarray, target: np.ndarray, penalty: float) -> Ridge:
    """The map from features (token, d) to targets (token, target) of training tokens, in closed form.

    Features are standardised; `penalty` times the number of tokens is added to the diagonal.
    """
    mean, most = features.mean(0), np.abs(features).max(initial=0.0)
    centred = features - mean
    scale = centred.std(0)
    scale = np.where(scale <= 1e-9 * most, np.inf, scale)  # what is the same everywhere, up to rounding, says nothing
    centred = centred / scale
    base = target.mean(0)
    gram = centred.T @ centred
    gram[np.diag_indices_from(gram)] += penalty * len(features)
    return Ridge(mean, scale, np.linalg.solve(gram, centred.T @ (target - base)), base)
