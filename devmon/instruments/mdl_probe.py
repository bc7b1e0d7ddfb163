"""Description length of labels given the residual stream: how much data a probe needs, not only how well it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from torch import Tensor

from devmon.anatomy import stream
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.snapshot import Snapshot, derive_seed

Array = NDArray[np.float64]

PORTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)  # of Voita & Titov
GROUPS = 10  # of the jackknife of the AUC
# Draws of control labels, whose chance is the larger part of the error of `selectivity`: with one draw it was unseen,
# and the reported error .6 of the true one. More draws cost a probe a block each and narrow it.
DRAWS = 4

NO_AREA = "no class of the last block has items of its own and of others there"
LABELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "compression": ("uniform code length / description length", "1", {"smallest_change": 0.1}),
    "selectivity": ("control description length minus description length", "bits per label", {"smallest_change": 0.05}),
    "mdl": ("description length of the labels", "bits per label", {}),
    "extra_mdl": ("description length after the first block", "bits per label", {}),
    "control_mdl": ("description length of random labels per type", "bits per label", {}),
    "control_compression": ("compression of random labels per type", "1", {}),
    "accuracy": ("accuracy in the last block", "share", {}),
    "auc": ("mean area under the curve in the last block", "share", {"nan": NO_AREA}),
}


@dataclass(frozen=True, eq=False)
class MDLProbe(ByContent):
    """Online code of `labels` given every layer of the residual stream, beside a control task (Voita & Titov 2020).

    `tokens`, `labels`, `types` are (batch, pos) integers; labels of -100 are ignored; `types` (the tokens by default)
    are what the control task labels. The sequences come in an order drawn by `seed` and are cut where `portions` of
    them end (2003.12298, footnote 4), whole sequences, as many blocks as there are different cuts. The labels of the
    first block cost log₂ K bits each, K classes; those of each later block -log₂ p under a linear probe trained on all
    blocks before it. The probe is softmax regression with a Gaussian prior, minimising Σ nats + (penalty / 2) ‖W‖² over
    weights and intercepts, on features standardised over all items (both ends of the code have them). Code length
    measures effort, which accuracy does not: a probe that learns labels by heart gets the control task right in the
    end, and pays for it on the way. In the control task every type has one random label for good, drawn from the
    labels' own frequencies (Hewitt & Liang 2019, 1909.03368); control numbers are means over 4 draws.

    Layer 0 is the input of the first block, layer l the output of block l; `blocks` is the path of the blocks where
    they are not found. `_se` are over sequences, within the blocks (what early items cost more than late ones is no
    chance; a block of one sequence adds nothing), and over the draws of control labels. That a hard sequence makes
    those after it cheaper is not in them: they are up to a quarter too large (docs/errors.md).

    - `mdl` (layer), bits per label: description length of the labels, the first block included. Null: `prior_mdl`,
      `control_mdl`.
    - `mdl_se` (layer), bits per label: its standard error.
    - `extra_mdl` (layer), bits per label: the same after the first block, without its cost.
    - `extra_mdl_se` (layer), bits per label: its standard error.
    - `compression` (layer), 1: log₂ K / mdl: 1 for random labels, far above it for labels that few examples explain.
      Null: `control_compression`.
    - `compression_se` (layer), 1: its standard error, to first order.
    - `control_mdl` (layer), bits per label: description length in the control task.
    - `control_mdl_se` (layer), bits per label: its standard error.
    - `control_compression` (layer), 1: log₂ K / control_mdl.
    - `control_compression_se` (layer), 1: its standard error, to first order.
    - `selectivity` (layer), bits per label: control_mdl - mdl. Null: 0.
    - `selectivity_se` (layer), bits per label: its standard error, paired by item, and over draws of control labels.
    - `accuracy` (layer), share: labels of the last block that the last probe gets right.
    - `accuracy_se` (layer), share: its standard error.
    - `auc` (layer), share: mean over classes, where both they and others are in the last block, of the chance that an
      item of the class gets a higher p than one of another; 0.5 knows nothing. Null: 0.5.
    - `auc_se` (layer), share: its standard error, by the jackknife over 10 groups of sequences.
    - `prior_mdl`, bits per label: the same code with no features, which learns the frequencies of the labels and
      nothing else: labels of unequal frequency compress without any probe.
    - `prior_mdl_se`, bits per label: its standard error.

    Pitfalls: mdl depends on the number of items, the portions and the penalty: compare at the same ones. Cost: one
    forward pass of `tokens`; 5 probes a block and layer, each some tens of passes over its items on the CPU: two to
    three minutes for 13 layers of 768 dimensions and 2000 items. Raises InstrumentError for a model whose blocks are
    not found, DataError for labels or portions that make no code.
    """

    tokens: Tensor
    labels: Tensor
    types: Tensor | None = None
    blocks: str | None = None
    portions: tuple[float, ...] = PORTIONS
    penalty: float = 1.0
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("tokens", "labels", "types"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, probe_tokens(getattr(self, name), "MDLProbe", name, shortest=1))
        shapes = {tuple(t.shape) for t in (self.tokens, self.labels, self.types) if t is not None}
        if len(shapes) > 1:
            raise DataError(f"MDLProbe needs tokens, labels and types of one shape (batch, pos), got {sorted(shapes)}")
        portions = tuple(float(portion) for portion in self.portions)
        if not portions or list(portions) != sorted(set(portions)) or portions[0] <= 0 or portions[-1] != 1:
            raise DataError(f"MDLProbe needs increasing portions in (0, 1] that end with 1, got {self.portions}")
        if not self.penalty > 0:
            raise DataError(f"MDLProbe needs penalty > 0, got {self.penalty}")
        object.__setattr__(self, "portions", portions)
        task = self._task()
        if task.classes < 2 or len(task.ends) < 2 or len(np.unique(task.sequence[task.block == task.last])) < 2:
            raise DataError(
                f"MDLProbe needs two classes, two blocks and two labelled sequences in the last; got {task.classes} "
                f"classes and {len(task.ends)} blocks: give more labelled sequences"
            )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        who = type(self).__name__
        task = self._task()
        used = self.labels != -100
        layers = stream(snapshot, self.tokens, self.blocks, who, self.batch_size)
        by_layer = [self._layer(states[used].double().numpy(), task) for states in layers]
        prior, prior_se, _ = _bits(_code(np.zeros((len(task.label), 0)), task.label, task, self.penalty)[0], task)
        sizes = {"classes": task.classes, "items": len(task.label), "block_items": np.bincount(task.block).tolist()}
        rows = Rows(headline=["compression", "selectivity"], **sizes)
        for name, (label, units, more) in LABELS.items():
            mean, se = np.array([scores[name][:2] for scores in by_layer]).T
            groups = None if name == "auc" else np.stack([scores[name][2] for scores in by_layer], 1)
            rows.put(name, "layer", mean, se, label, units=units, replicates=groups, **more)
        rows.put("prior_mdl", (), prior, prior_se, "description length without features", units="bits per label")
        return rows.dataset(layer=np.arange(len(by_layer)))

    def _layer(self, features: Array, task: _Task) -> dict[str, tuple[Any, ...]]:
        centred = features - features.mean(0)
        scale = centred.std(0)
        constant = scale <= 1e-9 * np.abs(features).max(initial=0.0)  # up to rounding
        centred = centred / np.where(constant, np.inf, scale)  # what is the same everywhere says nothing
        cost, last = _code(centred, task.label, task, self.penalty)
        of_draws = np.stack([_code(centred, control, task, self.penalty)[0] for control in task.control])
        control_cost = of_draws.mean(0)
        chance = float(of_draws.mean(1).std(ddof=1)) / np.log(2) / DRAWS**0.5
        uniform = float(np.log2(task.classes))
        mdl, control = _bits(cost, task), _bits(control_cost, task, chance=chance)
        end = task.block == task.last
        hit = last.argmax(1) == task.label[end]
        return {
            "mdl": mdl,
            "control_mdl": control,
            "selectivity": _bits(control_cost - cost, task, chance=chance),
            "compression": _compression(*mdl, uniform),
            "control_compression": _compression(*control, uniform),
            "extra_mdl": _bits(cost, task, task.block > 0),
            "accuracy": _bits(hit * np.log(2), task, end),
            "auc": _area(last, task.label[end], task.sequence[end]),
        }

    def cost(self) -> Cost:
        return Cost(forwards=len(self.tokens), positions=self.tokens.shape[1])

    def _task(self) -> _Task:
        used = self.labels != -100
        # what is labelled, and in which sequence it lies
        classes, label = np.unique(self.labels[used].numpy(), return_inverse=True)
        sequence = used.nonzero()[:, 0].numpy()
        labelled = np.unique(sequence)

        # sequences in a random order, cut where the portions end; cuts that coincide are one
        order = torch.randperm(len(labelled), generator=_generator(self.seed, "order")).numpy()
        ends = np.unique(np.maximum(np.round(np.array(self.portions) * len(labelled)), 1)).astype(int)
        block_of = np.empty(len(labelled), dtype=np.int64)
        block_of[order] = np.searchsorted(ends, np.arange(len(labelled)), side="right")

        # the control tasks: one label per type, drawn as frequent as it is
        types = (self.tokens if self.types is None else self.types)[used].numpy()
        kinds, kind = np.unique(types, return_inverse=True)
        control = label[None]
        if len(label):
            drawn = torch.randint(len(label), (DRAWS, len(kinds)), generator=_generator(self.seed, "control")).numpy()
            control = label[drawn][:, kind]
        block = block_of[np.searchsorted(labelled, sequence)]
        return _Task(label, control, sequence, block, ends, len(classes))


class _Task(NamedTuple):
    """Per labelled item its label, control labels (draw, item), sequence and block; where blocks end, in sequences;
    the classes."""

    label: NDArray[np.int64]
    control: NDArray[np.int64]
    sequence: NDArray[np.int64]
    block: NDArray[np.int64]
    ends: NDArray[np.int64]
    classes: int

    @property
    def last(self) -> int:
        return len(self.ends) - 1


def _generator(seed: int, what: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, "MDLProbe", what))


def _code(features: Array, label: NDArray[np.int64], task: _Task, penalty: float) -> tuple[Array, Array]:
    """Nats that each label costs, (item,), and log p of the items of the last block, (item, class)."""
    inputs = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    cost = np.full(len(label), np.log(task.classes))
    weights = np.zeros((inputs.shape[1], task.classes))
    chances = np.empty((0, task.classes))
    for block in range(1, task.last + 1):
        known, coming = task.block < block, task.block == block
        weights = _fit(inputs[known], label[known], weights, penalty)
        chances = log_softmax(inputs[coming] @ weights, axis=1)
        cost[coming] = -chances[np.arange(len(chances)), label[coming]]
    return cost, chances


def _fit(inputs: Array, label: NDArray[np.int64], start: Array, penalty: float) -> Array:
    """The weights (feature, class) with the least Σ nats + (penalty / 2) ‖W‖², from where the last fit ended."""
    from scipy.optimize import minimize

    target = np.eye(start.shape[1])[label]

    def objective(flat: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, Array]:
        weights = flat.reshape(start.shape)
        scores = inputs @ weights
        value = -(log_softmax(scores, axis=1) * target).sum() + penalty / 2 * (flat @ flat)
        return float(value), (inputs.T @ (softmax(scores, axis=1) - target) + penalty * weights).ravel()

    least = minimize(
        objective, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 500, "ftol": 1e-12, "gtol": 1e-5}
    )
    return least.x.reshape(start.shape)


def _bits(
    nats: Array, task: _Task, where: NDArray[np.bool_] | None = None, chance: float = 0.0
) -> tuple[float, float, Array]:
    """Mean over items in bits, its standard error over sequences within blocks, with that of a `chance` beside, and the
    mean by groups of sequences."""
    kept = np.ones(len(task.label), dtype=bool) if where is None else where
    values = (nats if len(nats) == kept.sum() else nats[kept]) / np.log(2)
    _, first, sequence = np.unique(task.sequence[kept], return_index=True, return_inverse=True)
    total, count, block = np.bincount(sequence, values), np.bincount(sequence), task.block[kept][first]

    # what a sequence costs beyond the mean of its own block
    by_block, items = np.bincount(block, total), np.bincount(block, count)
    size = np.bincount(block)[block]
    beyond = total - count * (by_block / np.maximum(items, 1))[block]
    variance = (beyond**2 * size / np.maximum(size - 1, 1)).sum() / count.sum() ** 2
    mean = values.mean()
    return float(mean), float(np.sqrt(variance + chance**2)), clustered_groups(mean * count + beyond, count)


def _compression(bits: float, se: float, groups: Array, uniform: float) -> tuple[float, float, Array]:
    """Bits of a uniform code over those of a description, its error and groups to first order."""
    slope = uniform / bits**2
    return uniform / bits, slope * se, uniform / bits - slope * (groups - bits)


def _area(chances: Array, label: NDArray[np.int64], sequence: NDArray[np.int64]) -> tuple[float, float]:
    """Mean one-against-the-rest AUC over classes, ties counted half, and its jackknife error over sequences."""
    group = np.unique(sequence, return_inverse=True)[1] % GROUPS
    whole = _auc(chances, label)
    each = [_auc(chances[group != left_out], label[group != left_out]) for left_out in np.unique(group)]
    if np.isnan([whole, *each]).any():
        return whole, float("nan")
    return whole, float(np.sqrt((len(each) - 1) * np.var(each)))


def _auc(chances: Array, label: NDArray[np.int64]) -> float:
    from scipy.stats import rankdata

    areas = []
    for kind in np.unique(label):
        own = label == kind
        n, rest = int(own.sum()), int((~own).sum())
        if rest:
            rank = rankdata(chances[:, kind])[own].sum()
            areas.append((rank - n * (n + 1) / 2) / (n * rest))
    return float(np.mean(areas)) if areas else float("nan")
