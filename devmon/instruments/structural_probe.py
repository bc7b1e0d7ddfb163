"""Whether distances between the states of tokens are those between them in a tree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from scipy.stats import rankdata
from torch import Tensor

from devmon.anatomy import stream
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, clustered_mean, probe_tokens
from devmon.data.grammars import Trees
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.snapshot import Snapshot, derive_seed

SHORTEST = 5  # tokens of a sentence that is scored: in shorter ones most trees are alike
FLOOR = 1e-4  # of the largest variance: directions below it are noise, which a map of one variance would raise
RATE = 0.02  # of Adam: a quarter of it, with twice the steps, ends at the same scores to a hundredth


@dataclass(frozen=True, eq=False)
class StructuralProbe(ByContent):
    """A linear map after which squared distances of states are distances in the tree of the sentence.

    `tokens`, `head` and `sentence` (batch, pos) are as `devmon.data.grammars.trees` gives them: the place of what each
    token depends on, -1 for roots, and the number of its sentence, -1 for tokens of none. d(i, j) = ‖B (h_i - h_j)‖²
    with B of `rank` rows is fitted, by Adam on whitened states, to min Σ_s |s|⁻² Σ |d_tree - d| over half of the rows,
    drawn by `seed`, and scored on the sentences of five tokens or more of the others (Hewitt & Manning 2019,
    structural-probes). Layer 0 is the input of the first block. `_se` are over rows.

    - `uuas` (layer), share: edges of the true tree, undirected, that are in the least spanning tree of d. Null:
      `uuas_chain`, layer 0 and the untrained model.
    - `uuas_se` (layer), share: its standard error.
    - `spearman` (layer), 1: rank correlation of d and the distance in the tree, of each token to the others, mean over
      tokens. Null: `spearman_chain`.
    - `spearman_se` (layer), 1: its standard error.
    - `uuas_chain`, share: of trees that link each token with the next.
    - `spearman_chain`, 1: of the distance in tokens.

    What the tokens alone tell of the tree is read at layer 0: compare with it. Cost: one pass, and the fit. Raises
    DataError for shapes, or without such sentences in both halves; InstrumentError for a model whose blocks are not
    found.
    """

    tokens: Tensor
    head: Tensor
    sentence: Tensor
    rank: int = 16
    steps: int = 150
    blocks: str | None = None
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("tokens", "head", "sentence"):
            object.__setattr__(self, name, probe_tokens(getattr(self, name), "StructuralProbe", name))
            if getattr(self, name).shape != self.tokens.shape:
                raise DataError(
                    f"StructuralProbe needs {name} of the shape of tokens, {tuple(self.tokens.shape)}, got "
                    f"{tuple(getattr(self, name).shape)}"
                )
        if self.rank < 1 or self.steps < 1:
            raise DataError(f"StructuralProbe needs rank and steps of 1 or more, got {self.rank} and {self.steps}")
        train, test = self._halves
        if not train or len({one.row for one in test}) < 2:
            raise DataError(
                f"StructuralProbe needs sentences of {SHORTEST} tokens or more in half of the rows, and in two of the "
                f"others; got {len(train)} and {len(test)}: give more rows, or longer ones"
            )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        train, test = self._halves
        layers = stream(snapshot, self.tokens, self.blocks, "StructuralProbe", self.batch_size)
        at = {row: i for i, row in enumerate(sorted({one.row for one in test}))}
        found: dict[str, list[np.ndarray]] = {"uuas": [], "spearman": []}
        for states in layers:
            probe = self._fitted(states, train)
            sums = {name: np.zeros((len(at), 2)) for name in found}
            for one in test:
                mapped = states[one.row, one.places].double() @ probe
                d = torch.cdist(mapped, mapped).square().numpy()
                for name, value in zip(found, _scores(d, one.distance), strict=True):
                    sums[name][at[one.row]] += value
            for name, each in sums.items():
                found[name].append(each)

        rows = Rows(["uuas", "spearman"], "standard error over rows")
        for name, unit, label in (
            ("uuas", "share", "edges of the tree that the probe finds"),
            ("spearman", "1", "rank correlation of distances with those in the tree"),
        ):
            stacked = np.stack(found[name], 1)  # (row, layer, sum and count)
            total, count = stacked[..., 0], stacked[:, 0, 1]
            mean, se = clustered_mean(total, count)
            groups = clustered_groups(total, count)
            rows.put(name, "layer", mean, se, label, units=unit, smallest_change=0.02, replicates=groups)
            rows.put(f"{name}_chain", (), self._chain[name], None, f"{label}, of a chain", units=unit)
        return rows.dataset(layer=np.arange(len(layers)))

    def cost(self) -> Cost:
        return Cost(forwards=len(self.tokens), positions=self.tokens.shape[1])

    @cached_property
    def _halves(self) -> tuple[list[_Sentence], list[_Sentence]]:
        order = np.random.default_rng(derive_seed(self.seed, "StructuralProbe", "split")).permutation(len(self.tokens))
        of = Trees(self.head, torch.zeros_like(self.head), self.sentence)
        halves: tuple[list[_Sentence], list[_Sentence]] = ([], [])
        for half, rows in zip(halves, (order[: len(order) // 2], order[len(order) // 2 :]), strict=True):
            for row in sorted(rows.tolist()):
                for number in self.sentence[row].unique().tolist():
                    places = (self.sentence[row] == number).nonzero()[:, 0]
                    if number >= 0 and len(places) >= SHORTEST:
                        half.append(_Sentence(row, places, of.distances(row, number).double().numpy()))
        return halves

    @cached_property
    def _chain(self) -> dict[str, float]:
        totals = np.zeros((2, 2))
        for one in self._halves[1]:
            place = np.arange(len(one.places), dtype=float)
            totals += _scores(np.abs(place[:, None] - place), one.distance)
        return dict(zip(("uuas", "spearman"), totals[:, 0] / totals[:, 1], strict=True))

    def _fitted(self, states: Tensor, train: list[_Sentence]) -> Tensor:
        """The map (d, rank), for states as they are, in float64."""
        # all pairs of all sentences at once: their differences, of one variance along all directions that they have
        pairs = [np.triu_indices(len(one.places), 1) for one in train]
        each = [
            states[one.row, one.places[i]] - states[one.row, one.places[j]]
            for one, (i, j) in zip(train, pairs, strict=True)
        ]
        goal = [one.distance[i, j] for one, (i, j) in zip(train, pairs, strict=True)]
        weight = [np.full(len(i), 1 / len(one.places) ** 2) for one, (i, _) in zip(train, pairs, strict=True)]
        apart = torch.cat(each).double()
        target, share = (torch.from_numpy(np.concatenate(part)) for part in (goal, weight))
        variance, axes = torch.linalg.eigh(apart.T @ apart / len(apart))
        kept = variance > FLOOR * variance.max()
        whiten = axes[:, kept] / variance[kept].sqrt()
        apart = (apart @ whiten).float()
        target, share = target.float(), (share / share.sum()).float()

        generator = torch.Generator().manual_seed(derive_seed(self.seed, "StructuralProbe", "start"))
        start = torch.randn(apart.shape[1], self.rank, generator=generator) / apart.shape[1] ** 0.5
        with torch.inference_mode(False), torch.enable_grad():
            probe = (start / self.rank**0.5).requires_grad_(True)
            optimizer = torch.optim.Adam([probe], lr=RATE)
            apart, target, share = apart.clone(), target.clone(), share.clone()
            for _ in range(self.steps):
                loss = (share * ((apart @ probe).square().sum(1) - target).abs()).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return whiten @ probe.detach().double()


class _Sentence(NamedTuple):
    """Its row, the places (token,) of its tokens, and their distances (token, token) in its tree."""

    row: int
    places: Tensor
    distance: np.ndarray


def _scores(d: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(uuas and spearman, sum and count) of distances (token, token) of one sentence against those in its tree."""
    n = len(d)
    edges = _spanning(d)
    right = sum(true[i, j] == 1 for i, j in edges)
    others = ~np.eye(n, dtype=bool)
    ranks = [np.apply_along_axis(rankdata, 1, each[others].reshape(n, n - 1)) for each in (d, true)]
    centred = [each - each.mean(1, keepdims=True) for each in ranks]
    spread = np.linalg.norm(centred[0], axis=1) * np.linalg.norm(centred[1], axis=1)
    # a token as far from all others has no order: it counts as none
    together = np.where(spread > 0, (centred[0] * centred[1]).sum(1) / np.where(spread > 0, spread, 1.0), 0.0)
    return np.array([[right, n - 1], [together.sum(), n]], dtype=float)


def _spanning(d: np.ndarray) -> list[tuple[int, int]]:
    """The edges of the least spanning tree (Prim)."""
    least, source = d[0].copy(), np.zeros(len(d), dtype=int)
    inside = np.zeros(len(d), dtype=bool)
    inside[0] = True
    edges = []
    for _ in range(len(d) - 1):
        new = int(np.where(inside, np.inf, least).argmin())
        edges.append((int(source[new]), new))
        inside[new] = True
        nearer = d[new] < least
        least, source = np.where(nearer, d[new], least), np.where(nearer, new, source)
    return edges
