"""Linear probes of the residual stream, with a control task that tells what the probe itself can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import stream
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, clustered_mean, places_of, probe_inputs, probe_tokens
from devmon.data.ridge_probe import Labelled, labelled, probe_generator, ridge
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.snapshot import Snapshot

# Draws of control labels: with one, its chance was missing in the error of the selectivity, which was 1.2 to 1.4 times
# too small; eight leave a third of it, and say how large it is.
DRAWS = 8


@dataclass(frozen=True, eq=False)
class LinearProbe(ByContent):
    """A linear classifier of `labels` at every layer of the residual stream, minus the same on a control task.

    `tokens`, `labels`, `types` are (batch, pos) integers; labels of -100 are ignored; `types` (the tokens by default)
    are what the control task labels. Or `tokens` are inputs of another kind, (batch, …) of floats such as images, with
    labels (batch,): then each input is one item, whose features are the mean of the state over its positions, and a
    type of its own unless `types` (batch,) are given. Half of the sequences, drawn by `seed`, train the probe, the
    others test it: no sequence is in both. The probe is ridge regression on one-hot labels in float64, in closed form:
    features standardised on the training part, an intercept, `penalty` times the number of training tokens added to the
    diagonal. In the control task every type has one random label for good, drawn from the labels' own frequencies
    (Hewitt & Liang 2019, 1909.03368), eight times over: its numbers are means over these draws. Layer 0 is the input of
    the first block, layer l the output of block l; `blocks` is the path of the blocks where they are not found. `_se`
    are over test sequences, and over the draws of labels.

    - `accuracy` (layer), share: test tokens whose label the probe gets right. Null: `majority`, `control_accuracy`.
    - `accuracy_se` (layer), share: its standard error.
    - `control_accuracy` (layer), share: the same in the control task, what the probe learns by heart.
    - `control_accuracy_se` (layer), share: its standard error.
    - `selectivity` (layer), share: accuracy - control_accuracy. Null: 0.
    - `selectivity_se` (layer), share: its standard error, paired by token.
    - `r2` (layer), share: held-out explained variance of the one-hot labels against their training means, the
      continuous twin of the accuracy.
    - `majority`, share: test accuracy of the most frequent training label.

    Raises InstrumentError for a model whose blocks are not found, DataError for labels no probe can be trained on.
    """

    tokens: Tensor
    labels: Tensor
    types: Tensor | None = None
    blocks: str | None = None
    seed: int = 0
    penalty: float = 1e-3
    batch_size: int = 64

    def __post_init__(self) -> None:
        whole = torch.as_tensor(self.tokens).is_floating_point()
        for name in ("labels", "types") if whole else ("tokens", "labels", "types"):
            if (given := getattr(self, name)) is not None:
                given = torch.as_tensor(given)[:, None] if whole and torch.as_tensor(given).ndim == 1 else given
                object.__setattr__(self, name, probe_tokens(given, "LinearProbe", name, shortest=1))
        if whole:
            object.__setattr__(self, "tokens", probe_inputs(self.tokens, "LinearProbe"))
        if whole and self.types is None:
            object.__setattr__(self, "types", torch.arange(len(self.tokens))[:, None])
        places = torch.empty(len(self.tokens), 1) if whole else self.tokens
        shapes = {tuple(t.shape) for t in (places, self.labels, self.types) if t is not None}
        if len(shapes) > 1:
            raise DataError(
                f"LinearProbe needs tokens, labels and types of one shape (batch, pos), or labels (batch,) for inputs "
                f"(batch, …) of floats, got {sorted(shapes)}"
            )
        if not self.penalty > 0:
            raise DataError(f"LinearProbe needs penalty > 0, got {self.penalty}")
        self._task()

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        who = type(self).__name__
        task = self._task()
        layers = stream(snapshot, self.tokens, self.blocks, who, self.batch_size)
        by_layer = [_probe(states[task.of.used].double().numpy(), task, self.penalty) for states in layers]
        rows = Rows(headline=["selectivity", "accuracy"], error="standard error over test sequences")
        labels = {
            "selectivity": "probe accuracy minus control accuracy",
            "accuracy": "held-out probe accuracy",
            "control_accuracy": "held-out accuracy on random labels per type",
        }
        for name, label in labels.items():
            mean, se = np.array([scores[name][:2] for scores in by_layer]).T
            groups = np.stack([scores[name][2] for scores in by_layer], 1)
            rows.put(name, "layer", mean, se, label, units="share", replicates=groups)
        r2 = np.array([scores["r2"][0] for scores in by_layer])
        rows.put("r2", "layer", r2, None, "held-out explained variance of one-hot labels", units="share")
        rows.put("majority", (), task.of.majority, None, "accuracy of the most frequent label", units="share")
        return rows.dataset(layer=np.arange(len(by_layer)))

    def cost(self) -> Cost:
        return Cost(forwards=len(self.tokens), positions=places_of(self.tokens))

    def _task(self) -> _Task:
        of = labelled(self.labels, self.seed, "LinearProbe")
        types = (self.tokens if self.types is None else self.types)[of.used].numpy()
        kinds, kind = np.unique(types, return_inverse=True)
        chosen = torch.randint(len(of.label), (DRAWS, len(kinds)), generator=probe_generator(self.seed, "control"))
        return _Task(of, of.label[chosen.numpy()][:, kind])  # one label per type, drawn as frequent as it is


@dataclass(frozen=True)
class _Task:
    """The labels, and the control labels (draw, token)."""

    of: Labelled
    control: np.ndarray


def _probe(features: np.ndarray, task: _Task, penalty: float) -> dict[str, tuple[Any, ...]]:
    """Scores of one layer from its features (token, d): (mean, standard error, by group) of the shares, and (r2,)."""
    # both tasks at once: they share the matrix that is solved
    of, train = task.of, task.of.train
    target = np.concatenate([np.eye(of.classes)[label] for label in (of.label, *task.control)], axis=1)
    fitted = ridge(features[train], target[train], penalty)

    # what the test part says
    truth, guess = target[~train], fitted(features[~train])
    right = np.stack([of.label, *task.control])[:, ~train]
    hits = right == guess.reshape(len(guess), -1, of.classes).argmax(2).T  # (1 + draw, test token)
    hit, control_hit = hits[0].astype(float), hits[1:].astype(float)
    own = slice(None, of.classes)
    r2 = 1 - ((truth - guess)[:, own] ** 2).sum() / ((truth - fitted.base)[:, own] ** 2).sum()
    where, count = of.held_out

    def over_sequences(values: np.ndarray, of_draws: float = 0.0) -> tuple[Any, ...]:
        total = np.bincount(where, values)
        mean, se = clustered_mean(total, count)
        return mean, np.hypot(se, of_draws), clustered_groups(total, count)

    of_draws = float(control_hit.mean(1).std(ddof=1)) / len(control_hit) ** 0.5
    return {
        "accuracy": over_sequences(hit),
        "control_accuracy": over_sequences(control_hit.mean(0), of_draws),
        "selectivity": over_sequences(hit - control_hit.mean(0), of_draws),
        "r2": (r2,),
    }
