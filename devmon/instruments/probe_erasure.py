"""Whether a model uses what a linear probe reads: the loss once it is erased from the stream."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout, activations, next_token
from devmon.anatomy.sites import Site
from devmon.cost import GPT2_SMALL, Cost, Shape
from devmon.data import ByContent, clustered_groups, clustered_mean, minibatches, probe_tokens
from devmon.data.ridge_probe import Labelled, labelled, ridge
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.snapshot import Snapshot, derive_seed

RANDOM = 3  # subspaces of the null: their mean has the error of one over √3
FLOOR = 1e-6  # of the largest variance: directions below it have no whitening in float32 states


@dataclass(frozen=True, eq=False)
class ProbeErasure(ByContent):
    """Erases all that is linear of `labels` from the stream, layer by layer, and takes the loss of the next token.

    `tokens`, `labels` are (batch, pos) integers; labels of -100 are left alone. Half of the sequences, drawn by `seed`,
    say what to erase: x - W⁺ P W (x - mean) with W = Σ_xx^(-1/2) and P the projection onto the columns of W Σ_xz, the
    least change after which no linear probe beats a constant (LEACE, Belrose et al. 2023, 2306.03819). In the others
    the states of labelled places are changed after `layer` layers (0: the embedding), and the loss of the token after
    each is taken. The null erases random directions of the whitened states, as many, three times. `_se` are over test
    sequences.

    - `loss_change` (layer), nats per token: loss without the labels, minus loss. Null: `loss_change_random`.
    - `loss_change_se` (layer), nats per token: its standard error, paired.
    - `loss_change_random` (layer), nats per token: the same of random directions.
    - `loss_change_random_se` (layer), nats per token: its standard error.
    - `accuracy` (layer), share: of a probe fitted anew to the erased states of the first half, on the second. It should
      be `majority`: what is above was left, for the halves differ.
    - `accuracy_se` (layer), share: its standard error.
    - `removed` (layer), share: of the variance of the states that erasing takes. Null: `removed_random`.
    - `removed_random` (layer), share: the same of random directions.
    - `majority`, share: test accuracy of the most frequent training label.

    What is not linear in the states stays, and so does what earlier layers gave to other places: no change says that
    this layer's linear code is not needed at these places, not that the labels are not used. States may be unlike any
    the model knows: read it against the null. Cost: one pass of all, and four of half of them for each layer. Raises
    DataError for labels that no probe can be trained on, InstrumentError for a model whose stream cannot be written.
    """

    tokens: Tensor
    labels: Tensor
    layout: Layout | None = None
    seed: int = 0
    penalty: float = 1e-3
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("tokens", "labels"):
            object.__setattr__(self, name, probe_tokens(getattr(self, name), "ProbeErasure", name))
        if self.tokens.shape != self.labels.shape:
            raise DataError(
                f"ProbeErasure needs tokens and labels of one shape, got {tuple(self.tokens.shape)} and "
                f"{tuple(self.labels.shape)}"
            )
        if not self._asked.any():
            raise DataError("ProbeErasure needs labelled places with a next token in the half that is held out")

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        who = "ProbeErasure"
        anatomy = Anatomy.of(snapshot, self.layout, who)
        anatomy.need_sum()
        anatomy.need_causal(self.tokens)
        sites: list[tuple[str, int]] = [("resid_pre", 0), *(("resid_post", layer) for layer in range(anatomy.layers))]
        _, reads = activations(snapshot, self.tokens, sites, who, self.layout, self.batch_size)
        task, plain = self._task, self._loss(anatomy)
        target = np.eye(task.classes)[task.label[task.train]]
        where, count = task.held_out

        changes, removed, right = [], [], []
        for depth, site in enumerate(sites):
            states = reads[site].cpu()[task.used].double().numpy()  # (token, d)
            maps = self._erasers(states[task.train], target, depth)
            changes.append([self._loss(anatomy, site, *eraser) - plain for eraser in maps])
            removed.append([_taken(states[~task.train], *eraser) for eraser in maps])

            # a probe of the erased states of the first half says whether anything linear is left in the second
            mean, project = maps[0]
            left = states - (states - mean) @ project
            guess = ridge(left[task.train], target, self.penalty)(left[~task.train])
            right.append(np.bincount(where, guess.argmax(1) == task.label[~task.train]))
        return self._rows(np.array(changes), np.array(removed), np.stack(right, 1), count)

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        rest = len(self._rest) * (1 + (1 + shape.layers) * (1 + RANDOM))
        return Cost(len(self.tokens) + rest, positions=self.tokens.shape[1])

    @cached_property
    def _task(self) -> Labelled:
        return labelled(self.labels, self.seed, "ProbeErasure")

    @cached_property
    def _rest(self) -> Tensor:
        """The numbers of the sequences that are held out."""
        return torch.from_numpy(np.unique(self._task.sequence[~self._task.train]))

    @cached_property
    def _asked(self) -> Tensor:
        """Which places of those, (batch, pos - 1), are labelled and have a next token."""
        return self._task.used[self._rest, :-1]

    def _erasers(self, states: np.ndarray, target: np.ndarray, depth: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(mean, map) of states (token, d), such that x - (x - mean) map has nothing linear of the target; then those
        of as many random directions."""
        # whitening, and its inverse, on the directions in which the states vary
        mean = states.mean(0)
        centred = states - mean
        variance, axes = np.linalg.eigh(centred.T @ centred / len(states))
        kept = variance > FLOOR * variance.max(initial=0.0)
        scale, axes = np.sqrt(variance[kept]), axes[:, kept]
        cross = (axes / scale).T @ (centred.T @ (target - target.mean(0)) / len(states))  # (kept, class)
        left, sizes, _ = np.linalg.svd(cross, full_matrices=False)
        bases = [left[:, sizes > 1e-8 * max(float(sizes.max(initial=0.0)), 1e-300)]]
        rng = np.random.default_rng(derive_seed(self.seed, "ProbeErasure", depth))
        bases += [np.linalg.qr(rng.standard_normal(bases[0].shape))[0] for _ in range(RANDOM)]
        return [(mean, (axes / scale) @ basis @ basis.T @ (axes * scale).T) for basis in bases]

    def _loss(
        self,
        anatomy: Anatomy,
        site: Site | None = None,
        mean: np.ndarray | None = None,
        project: np.ndarray | None = None,
    ) -> np.ndarray:
        """Nats summed over the asked places of each held-out sequence, with the states of labelled ones changed."""
        sums = []
        for rows in minibatches(len(self._rest), self.batch_size):
            here, used = self._rest[rows], self._task.used[self._rest[rows]]
            write = {}
            if site is not None:

                def erase(value: Tensor, used: Tensor = used) -> Tensor:
                    centre, of = (torch.from_numpy(each).to(value) for each in (mean, project))
                    changed = value - (value - centre) @ of
                    return torch.where(used[..., None].to(value.device), changed, value)

                write = {site: erase}
            with anatomy.tapped((), write):
                nats = next_token(anatomy.model, self.tokens[here], "ProbeErasure", check=False)[0]
            sums.append((nats.cpu() * self._asked[rows]).sum(1))
        return torch.cat(sums).double().numpy()

    def _rows(self, changes: np.ndarray, removed: np.ndarray, right: np.ndarray, count: np.ndarray) -> xr.Dataset:
        """The rows of changes (layer, labels and random ones, sequence), shares removed, and right ones (sequence,
        layer)."""
        rows = Rows(["loss_change"], "standard error over test sequences")
        places = self._asked.sum(1).numpy()
        for name, values, label in (
            ("loss_change", changes[:, 0].T, "loss without the labels, minus loss"),
            ("loss_change_random", changes[:, 1:].mean(1).T, "loss without random directions, minus loss"),
        ):
            mean, se = clustered_mean(values, places)
            groups = clustered_groups(values, places)
            about = {"units": "nats per token", "smallest_change": 0.02, "replicates": groups}
            rows.put(name, "layer", mean, se, label, **about)  # type: ignore[arg-type]
        mean, se = clustered_mean(right, count)
        rows.put("accuracy", "layer", mean, se, "accuracy of a probe fitted to the erased states", units="share")
        label = "share of the variance that is erased"
        rows.put("removed", "layer", removed[:, 0], None, label, units="share")
        rows.put("removed_random", "layer", removed[:, 1:].mean(1), None, f"{label}, random directions", units="share")
        rows.put("majority", (), self._task.majority, None, "accuracy of the most frequent label", units="share")
        return rows.dataset(layer=np.arange(len(changes)))


def _taken(states: np.ndarray, mean: np.ndarray, project: np.ndarray) -> float:
    """The share of the variance of states (token, d) that erasing takes; 0 where there is none."""
    before = states.var(0).sum()
    return float(1 - (states - (states - mean) @ project).var(0).sum() / before) if before else 0.0
