"""A linear probe fitted once, on a reference, and read on every other snapshot: does the code stay the same?"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import xarray as xr
from torch import Tensor, nn

from devmon.anatomy import stream
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, clustered_mean, probe_tokens
from devmon.data.ridge_probe import Labelled, Ridge, labelled, ridge
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot, weights_digest


@dataclass(frozen=True, eq=False)
class FrozenProbe(ByContent):
    """The probe of `LinearProbe` fitted on the states of a `reference`, read on those of each snapshot.

    `tokens`, `labels` are (batch, pos) integers, labels of -100 are ignored; halves, ridge and layers are those of
    `LinearProbe`. The reference, a model of the same layers, is copied when the instrument is made and known by the
    digest of its weights: the last checkpoint tells when the final code came to be, the first how long the first one
    lasts. `_se` are over test sequences.

    - `accuracy` (layer), share: held-out accuracy of the reference's probe. Null: `majority`; on the reference itself
      it is the probe's own.
    - `accuracy_se` (layer), share: its standard error.
    - `own` (layer), share: held-out accuracy of a probe fitted on this snapshot.
    - `own_se` (layer), share: its standard error.
    - `moved` (layer), share: own - accuracy: labels that are there, in another code. Null: 0.
    - `moved_se` (layer), share: its standard error, paired by token.
    - `majority`, share: test accuracy of the most frequent training label.

    A rotation that later layers follow moves the code as much as one that breaks them: this is no loss of the model.
    Cost: one pass of the tokens, and the first time one of the reference, which stays in memory. Raises InstrumentError
    for a model of other layers or whose blocks are not found, DataError for labels that no probe can be trained on.
    """

    reference: nn.Module = field(metadata={"identity": "never"})
    tokens: Tensor
    labels: Tensor
    blocks: str | None = None
    seed: int = 0
    penalty: float = 1e-3
    batch_size: int = 64
    digest: str = field(default="", init=False)

    def __post_init__(self) -> None:
        for name in ("tokens", "labels"):
            given = probe_tokens(getattr(self, name), "FrozenProbe", name, shortest=1)
            object.__setattr__(self, name, given)
        if self.tokens.shape != self.labels.shape:
            raise DataError(
                f"FrozenProbe needs tokens and labels of one shape, got {tuple(self.tokens.shape)} and "
                f"{tuple(self.labels.shape)}"
            )
        if not self.penalty > 0:
            raise DataError(f"FrozenProbe needs penalty > 0, got {self.penalty}")
        object.__setattr__(self, "reference", copy.deepcopy(self.reference).eval().requires_grad_(False))
        object.__setattr__(self, "digest", weights_digest(self.reference))
        labelled(self.labels, self.seed, "FrozenProbe")

    def _content(self) -> tuple[object, ...]:  # of two copies of one reference, the digest tells that they are equal
        return tuple(value for value in super()._content() if not isinstance(value, nn.Module))

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        task, features = self._task, self._features(snapshot)
        if [each.shape for each in features] != [(len(task.label), len(probe.mean)) for probe in self._probes]:
            raise InstrumentError(
                f"FrozenProbe needs a model of the reference's layers: it has {len(self._probes)} of "
                f"{len(self._probes[0].mean)} dimensions, {type(snapshot.model).__name__} {len(features)} of "
                f"{features[0].shape[1]}"
            )
        where, count = task.held_out
        hits: dict[str, list[np.ndarray]] = {"accuracy": [], "own": []}
        for states, frozen in zip(features, self._probes, strict=True):
            for name, probe in (("accuracy", frozen), ("own", self._fitted(states))):
                hit = probe(states[~task.train]).argmax(1) == task.label[~task.train]
                hits[name].append(np.bincount(where, hit))
        totals = {name: np.stack(each, 1) for name, each in hits.items()}  # (sequence, layer)
        totals["moved"] = totals["own"] - totals["accuracy"]

        rows = Rows(["accuracy", "moved"], "standard error over test sequences", reference=self.digest)
        labels = {
            "accuracy": "held-out accuracy of the reference's probe",
            "own": "held-out accuracy of a probe of its own",
            "moved": "accuracy of an own probe minus that of the reference's",
        }
        for name, label in labels.items():
            mean, se = clustered_mean(totals[name], count)
            groups = clustered_groups(totals[name], count)
            change = None if name == "own" else 0.02
            rows.put(name, "layer", mean, se, label, units="share", smallest_change=change, replicates=groups)
        rows.put("majority", (), task.majority, None, "accuracy of the most frequent label", units="share")
        return rows.dataset(layer=np.arange(len(features)))

    def cost(self) -> Cost:
        return Cost(forwards=len(self.tokens), positions=self.tokens.shape[1])

    @cached_property
    def _task(self) -> Labelled:
        return labelled(self.labels, self.seed, "FrozenProbe")

    @cached_property
    def _probes(self) -> list[Ridge]:
        """That of the reference, by layer."""
        return [self._fitted(states) for states in self._features(Snapshot(0, self.reference))]

    def _features(self, snapshot: Snapshot) -> list[np.ndarray]:
        """The states of the labelled tokens (token, d) in float64, by layer."""
        layers = stream(snapshot, self.tokens, self.blocks, "FrozenProbe", self.batch_size)
        return [states[self._task.used].double().numpy() for states in layers]

    def _fitted(self, states: np.ndarray) -> Ridge:
        task = self._task
        return ridge(states[task.train], np.eye(task.classes)[task.label[task.train]], self.penalty)
