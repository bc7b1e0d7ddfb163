"""Compression: how spread the directions of the states are, and what they hold of the tokens before and after."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy.passes import TOGETHER, Read, Seen, read
from devmon.cost import Cost
from devmon.data import ByContent, jackknife, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.features.soft_entropy import assigned, entropy, information, temperature
from devmon.snapshot import Snapshot, derive_seed

GROUPS = 8  # of sequences, each left out in turn: as many as replicates, so that an error is known to a quarter
SURE = 3.0  # standard errors of `past` below which there is no ratio to it
IGNORED = -100


@dataclass(frozen=True, eq=False)
class SoftEntropy(ByContent):
    """Entropy of the directions of states, and their information on the n-gram before and after (2604.07569).

    A state z falls to n = `vectors` random unit vectors by p = softmax(W z/‖z‖ / ε), ε such that one direction says
    as much as a choice of n (`devmon.features.soft_entropy.temperature`); H = -Σ P ln P / ln n of the mean P, and
    I(X; Z) = H(Z) - mean of H(Z|x) over labels. X is the n-gram of `order` tokens of `tokens` (batch, pos) that ends at
    the place, or `labels` (batch, pos) with -100 where there is none; Y the `order` tokens after it. Of each label
    `per_label` places are drawn by `seed`, the same at every step; rarer ones are left out, and those past the `most`
    frequent. Numbers are means over five draws of W, shares of ln n. `_se` are a jackknife over groups of sequences.

    - `entropy` (layer), share: H of all states of X. Null: at initialisation; 1 is even in all directions.
    - `entropy_se` (layer), share: its standard error.
    - `entropy_point` (layer), share: mean H of one state: what is lost to ε alone.
    - `entropy_centred` (layer), share: H of z/‖z‖ less its mean: an offset common to all hides the rest.
    - `mean_norm` (layer), 1: length of the mean of z/‖z‖: near 1, `entropy` is that of the offset.
    - `past` (layer), share: I(X; Z) less the same with the labels shuffled over the places. Null: 0.
    - `past_se` (layer), share: its standard error.
    - `past_raw` (layer), share: I(X; Z) as it is.
    - `past_shuffled` (layer), share: of shuffled labels: bias of few places a label, .15 at 16, .05 at 64.
    - `past_most` (layer), share: entropy - entropy_point, which `past_raw` cannot pass whatever the labels.
    - `past_centred` (layer), share: past of z/‖z‖ less its mean.
    - `future` (layer), share: I(Y; Z) less that of shuffled labels. Null: 0.
    - `future_se` (layer), share: its standard error.
    - `future_raw` (layer), share: I(Y; Z) as it is.
    - `future_shuffled` (layer), share: of shuffled labels.
    - `future_centred` (layer), share: future of z/‖z‖ less its mean.
    - `optimality` (layer), 1: future / past. NaN where past is below 3 of its standard errors. Null: the untrained
      model, which forgets both alike (.8 in one of 135 million weights), so that a high ratio alone says nothing.
    - `optimality_se` (layer), 1: its standard error.

    What these are not: the mutual information of input and state of a deterministic net is infinite, or ln of the
    sample; `past` is that of a direction seen through a blur ε, at most `past_most` (.61 at d = 64), so states that are
    a function of the label do not have I = H(labels). Norms are not seen, and neither is what lies finer than ε. Levels
    depend on d and n: follow one model over steps. Layer 0 is the input of the first block. Cost: one pass of `tokens`.
    Raises DataError where fewer than two labels have `per_label` places, InstrumentError for a model without blocks.
    """

    tokens: Tensor
    labels: Tensor | None = None
    order: int = 1
    per_label: int = 64
    most: int = 64
    vectors: int = 100
    draws: int = 5
    blocks: str | None = None
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "SoftEntropy", shortest=3))
        if self.labels is not None:
            object.__setattr__(self, "labels", probe_tokens(self.labels, "SoftEntropy", "labels", shortest=3))
            if self.labels.shape != self.tokens.shape:
                raise DataError(
                    f"SoftEntropy needs labels of the shape of tokens {tuple(self.tokens.shape)}, got "
                    f"{tuple(self.labels.shape)}"
                )
        if not 1 <= self.order < self.tokens.shape[1] or min(self.per_label, self.vectors, self.most) < 2:
            raise DataError(
                f"SoftEntropy needs an order below {self.tokens.shape[1]}, and per_label, vectors and most of 2 at "
                f"least, got {self.order}, {self.per_label}, {self.vectors} and {self.most}"
            )
        if self.draws < 1:
            raise DataError(f"SoftEntropy needs draws of 1 at least, got {self.draws}")
        self._tasks  # noqa: B018 (labels that are too rare are told here)

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        [parts] = read(snapshot, self)
        layers = [torch.cat(states) for states in zip(*parts, strict=True)]  # (place, d) of the used places
        found = [self._layer(states) for states in layers]

        rows = Rows(headline=["past", "future", "entropy"], error="standard error, jackknife over groups of sequences")
        labels = {
            "entropy": "entropy of the directions of states",
            "past": "information on the tokens up to here, above shuffled",
            "future": "information on the tokens after, above shuffled",
            "optimality": "information on what follows over that on what was",
        }
        for name, label in labels.items():
            values, without = (np.array([each[name][i] for each in found]) for i in (0, 1))
            se, groups = jackknife(values, without.T)
            nan = "past is below 3 of its standard errors" if name == "optimality" else None
            unit, change = ("1", None) if name == "optimality" else ("share", 0.02)
            rows.put(name, "layer", values, se, label, units=unit, smallest_change=change, nan=nan, replicates=groups)
        plain = {
            "entropy_point": "entropy of one state",
            "entropy_centred": "entropy, the mean taken off",
            "past_raw": "information on the tokens up to here",
            "past_shuffled": "the same of shuffled labels",
            "past_most": "entropy less that of one state",
            "past_centred": "information above shuffled, the mean taken off",
            "future_raw": "information on the tokens after",
            "future_shuffled": "the same of shuffled labels",
            "future_centred": "information above shuffled, the mean taken off",
        }
        for name, label in plain.items():
            rows.put(name, "layer", np.array([each[name][0] for each in found]), None, label, units="share")
        length = np.array([each["mean_norm"][0] for each in found])
        rows.put("mean_norm", "layer", length, None, "length of the mean direction", units="1")
        return rows.dataset(layer=np.arange(len(found)))

    def reads(self) -> list[Read]:
        batch = min(self.batch_size, TOGETHER)
        return [Read(self, self.tokens, self._states, batch, stream=True, blocks=self.blocks)]

    def cost(self) -> Cost:
        return Cost(forwards=len(self.tokens), positions=self.tokens.shape[1], unembedded=len(self.tokens))

    def _states(self, seen: Seen) -> list[Tensor]:
        at = self._used[seen.rows]
        return [state[at.to(state.device)].cpu() for state in seen.stream]

    def _layer(self, states: Tensor) -> dict[str, tuple[float, np.ndarray]]:
        """Every number of a layer from the states (place, d) of the used places, and the same without each group."""
        states, found = states.double(), {}
        width, past, future = states.shape[1], *self._tasks
        if width < 2:
            raise DataError("SoftEntropy needs states of two dimensions at least: those of one have two directions")
        draw = torch.Generator().manual_seed(derive_seed(self.seed, "SoftEntropy", "vectors"))
        vectors = torch.randn(self.draws, self.vectors, width, generator=draw, dtype=torch.float64)
        vectors, epsilon = torch.nn.functional.normalize(vectors, dim=-1), temperature(width, self.vectors)

        # as they are, then with the mean direction taken off: a mean of states would be that of the few of a huge norm
        unit = torch.nn.functional.normalize(states, dim=-1)
        mean = unit[past.at].mean(0)
        for kind, values in (("", states), ("_centred", unit - mean)):
            shares = assigned(values, vectors, epsilon)
            for name, task in (("past", past), ("future", future)):
                of_task = shares[:, task.at]
                (h, raw), without = information(of_task, task.label, task.group, GROUPS)
                (_, null), null_without = information(of_task, task.shuffled, task.group, GROUPS)
                found[name + kind] = (raw - null, without[:, 1] - null_without[:, 1])
                if not kind:
                    found[f"{name}_raw"], found[f"{name}_shuffled"] = (raw, without), (null, without)
                if name == "past":
                    found[f"entropy{kind}"] = (h, without[:, 0])
                    point = float(entropy(of_task.numpy()).mean())
                    found |= {} if kind else {"entropy_point": (point, without), "past_most": (h - point, without)}

        # the ratio, where there is something to divide by; and how far all states lie to one side
        (top, tops), (below, belows) = found["future"], found["past"]
        sure = below > SURE * float(jackknife(below, belows)[0])
        ratio = (top / below, tops / belows) if sure else (np.nan, np.full(GROUPS, np.nan))
        return found | {"optimality": ratio, "mean_norm": (float(mean.norm()), belows)}

    @cached_property
    def _tasks(self) -> tuple[_Task, _Task]:
        """What is measured of the n-gram that ends at a place, and of that after it."""
        before = _ngrams(self.tokens, self.order) if self.labels is None else self.labels
        after = torch.full_like(self.tokens, IGNORED)
        after[:, : -self.order] = _ngrams(self.tokens, self.order)[:, self.order :]
        drawn = [self._drawn(before, "past"), self._drawn(after, "future")]
        used = torch.zeros(self.tokens.shape, dtype=torch.bool)
        for each in drawn:
            used[each[0]] = True
        row = torch.full(self.tokens.shape, -1, dtype=torch.int64)
        row[used] = torch.arange(int(used.sum()))  # of the used places, in order
        return _Task.of(*drawn[0], row, self.seed), _Task.of(*drawn[1], row, self.seed)

    @cached_property
    def _used(self) -> Tensor:
        """The places (batch, pos) whose states are kept."""
        used = torch.zeros(self.tokens.numel(), dtype=torch.bool)
        for task in self._tasks:
            used[task.place] = True
        return used.view(self.tokens.shape)

    def _drawn(self, labels: Tensor, what: str) -> tuple[tuple[Tensor, Tensor], np.ndarray]:
        """Where (batch and pos, each (place,)) and the number of the label there, `per_label` places of each."""
        known, count = labels[labels != IGNORED].unique(return_counts=True)
        order = count.argsort(descending=True, stable=True)[: self.most]
        chosen = known[order][count[order] >= self.per_label]
        if len(chosen) < 2:
            raise DataError(
                f"SoftEntropy needs two labels of {self.per_label} places at least, the most frequent of the {what} "
                f"have {count[order][:2].tolist()}: give more tokens, or a lower per_label (with more bias)"
            )
        draw = torch.Generator().manual_seed(derive_seed(self.seed, "SoftEntropy", what))
        places = []
        for label in chosen:
            at = (labels == label).nonzero()
            places.append(at[torch.randperm(len(at), generator=draw)[: self.per_label]])
        batch, pos = torch.cat(places).unbind(1)
        return (batch, pos), np.repeat(np.arange(len(chosen)), self.per_label)


class _Task(NamedTuple):
    """Points of a measure: their `place` in tokens.flatten(), `at` among the used ones, label, group of sequences."""

    place: Tensor
    at: Tensor
    label: np.ndarray
    shuffled: np.ndarray
    group: np.ndarray

    @classmethod
    def of(cls, where: tuple[Tensor, Tensor], label: np.ndarray, row: Tensor, seed: int) -> _Task:
        draw = torch.Generator().manual_seed(derive_seed(seed, "SoftEntropy", "shuffled"))
        sequences = np.unique(where[0].numpy(), return_inverse=True)[1]
        shuffled = label[torch.randperm(len(label), generator=draw).numpy()]
        return cls(where[0] * row.shape[1] + where[1], row[where], label, shuffled, sequences % GROUPS)


def _ngrams(tokens: Tensor, order: int) -> Tensor:
    """A number for the n-gram that ends at each place (batch, pos), -100 where it would begin before the sequence."""
    windows = tokens.unfold(1, order, 1)  # (batch, pos - order + 1, order)
    numbers = windows.flatten(0, 1).unique(dim=0, return_inverse=True)[1].view(windows.shape[:2])
    return torch.nn.functional.pad(numbers, (order - 1, 0), value=IGNORED)
