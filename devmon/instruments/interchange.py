"""Causal abstraction: does a subspace of a site play the part of a variable of an algorithm (DAS)?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Layout
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, clustered_mean
from devmon.data.interchange import Interchanges
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.features.subspaces import Exchange, Search, orthonormal, row_space, split
from devmon.snapshot import Snapshot

CELL = ("site", "size")


@dataclass(frozen=True, eq=False)
class Interchange(ByContent):
    """Distributed alignment search (2303.02536): exchanged subspaces of a site, against an algorithm's counterfactuals.

    In the run on a base b the state h of a site becomes h_b + Q Qᵀ (h_s - h_b), h_s that of the source and Q (d, k)
    orthonormal; IIA is the share of outputs that are then what the algorithm says with its variable exchanged. Q is
    fitted to these outputs by Adam on half of `pairs` (drawn by the run's seed), the model as it is, and judged on the
    other half; `sizes` are the k. A site is the path of a module, whose output is exchanged, or ("resid_post", 1) as
    `Anatomy` names them; of states (batch, pos, d) the one at `place` is. Outputs are the largest of the logits (batch,
    class), or of those of the last place. `readers`, a path for each site or "", are linear maps M that read it. `_se`
    are over held-out pairs, of the Q found.

    - `iia` (site, size), share: outputs as the algorithm says. Null: `iia_random`, `iia_permuted`, the untrained model.
    - `iia_se` (site, size), share: its standard error.
    - `iia_changes` (site, size), share: the same of pairs whose label the exchange changes.
    - `iia_changes_se` (site, size), share: its standard error.
    - `iia_same` (site, size), share: of the other pairs.
    - `iia_same_se` (site, size), share: its standard error.
    - `difference` (site, size), logits: of the changed label minus the base's own, of pairs whose label changes. Null:
      `difference_random`. An untrained model says one class whatever is exchanged, and only this shows if it moves.
    - `difference_se` (site, size), logits: its standard error.
    - `difference_random` (site, size), logits: of random subspaces, mean.
    - `iia_random` (site, size), share: iia of `random` random Q, mean.
    - `iia_random_high` (site, size), share: the largest of them.
    - `iia_permuted` (site, size), share: fitted to and judged by the labels of other pairs.
    - `iia_rival` (site, size), share: fitted to and judged by the rival's labels. NaN without a rival.
    - `iia_rival_se` (site, size), share: its standard error.
    - `iia_row` (site, size), share: with the part of Q that the reader sees alone, made orthonormal. NaN without one.
    - `iia_null` (site, size), share: with the part of Q that it does not see, which is `iia_unpatched` where nothing
      else reads the site. NaN without a reader, or where it sees everything.
    - `row_share` (site, size), share: ‖P Q‖² / k, P the projection on what the reader sees. Null: rank / d.
    - `iia_whole` (site), share: with the whole state exchanged.
    - `iia_whole_se` (site), share: its standard error.
    - `iia_unpatched`, share: of the model as it is, judged by the counterfactual labels.
    - `accuracy`, share: bases whose own label it gives.
    - `accuracy_se`, share: its standard error.

    What it does not say: that the model computes this algorithm. Several algorithms and places fit one net
    (2502.20914): name a rival. Maps that bend fit any algorithm to any net (2507.08802), so Q is orthonormal and k
    fixed. Where `iia_row` falls to the null while `iia` stays, the exchange woke a path that the model does not use
    (2311.17030). Cost: a pass forward and back of `steps` · `batch` pairs for each site and size, twice, or three times
    with a rival; keep to few sites. Raises InstrumentError for a site or reader that the model lacks, DataError for
    settings.
    """

    pairs: Interchanges
    sites: tuple[str | tuple[str, int], ...]
    sizes: tuple[int, ...] = (1,)
    readers: tuple[str, ...] = ()
    place: int = -1
    steps: int = 600
    batch: int = 512
    rate: float = 1e-2
    random: int = 5
    layout: Layout | None = None
    batch_size: int = 1024

    def __post_init__(self) -> None:
        if not self.sites or not self.sizes or min(self.sizes) < 1 or min(self.steps, self.batch, self.random) < 1:
            raise DataError(
                f"Interchange needs sites, sizes from 1, and steps, batch and random of 1 at least, got {self.sites}, "
                f"{self.sizes}, {self.steps}, {self.batch} and {self.random}"
            )
        if self.readers and len(self.readers) != len(self.sites):
            raise DataError(
                f"Interchange needs a reader, or '', for each of its {len(self.sites)} sites, got {self.readers}"
            )

    def cost(self) -> Cost:
        count = len(self.pairs.base)
        judged, fits = count - count // 2, 2 if self.pairs.rival is None else 3
        by_site = count + judged
        read = sum(2 for reader in self.readers if reader) * judged
        by_cell = fits * (self.steps * self.batch + judged) + self.random * judged
        sites, cells = len(self.sites), len(self.sites) * len(self.sizes)
        forwards = judged + sites * by_site + cells * by_cell + read * len(self.sizes)
        back = cells * fits * self.steps * self.batch
        positions = 1 if self.pairs.base.is_floating_point() else self.pairs.base.shape[1]
        return Cost(forwards=forwards, backwards=back, positions=positions)

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        pairs, count = self.pairs, len(self.pairs.base)
        order = torch.randperm(count, generator=snapshot.generator("split"))
        fitted, judged = order[: count // 2].sort().values, order[count // 2 :].sort().values
        alone = self._exchange(snapshot, self.sites[0]).outputs(judged, None)
        if int(max(pairs.label.max(), pairs.counterfactual.max())) >= alone.shape[1]:
            raise InstrumentError(
                f"Interchange: labels go up to {int(max(pairs.label.max(), pairs.counterfactual.max()))}, "
                f"{type(snapshot.model).__name__} has {alone.shape[1]} outputs: give classes of this model"
            )

        # each site by itself: what its sources hold, and what the model says with it exchanged whole
        cells: list[list[dict[str, np.ndarray]]] = []
        wholes, shares = [], np.full((len(self.sites), len(self.sizes)), np.nan)
        for i, named in enumerate(self.sites):
            site = self._exchange(snapshot, named)
            source = site.states(pairs.source)
            wholes.append(_judged(site.outputs(judged, source), pairs.counterfactual[judged], pairs.label[judged]))
            reader = self._reader(snapshot, i, source)
            of_site = []
            for j, size in enumerate(self.sizes):
                values, subspace = self._cell(snapshot, site, size, source, reader, fitted, judged)
                of_site.append(values)
                if reader is not None:
                    shares[i, j] = float((reader @ subspace.double().cpu()).square().sum()) / size
            cells.append(of_site)

        # all of them as arrays (site, size, pair)
        names = {name for of_site in cells for values in of_site for name in values}
        nothing = np.full(len(judged), np.nan)
        found = {n: np.array([[values.get(n, nothing) for values in row] for row in cells]) for n in names}
        return self._rows(found, wholes, shares, alone, judged)

    def _cell(
        self,
        snapshot: Snapshot,
        site: Exchange,
        size: int,
        source: Tensor,
        reader: Tensor | None,
        fitted: Tensor,
        judged: Tensor,
    ) -> tuple[dict[str, np.ndarray], Tensor]:
        """The values of held-out pairs of one site and size, by name, and the subspace that was found."""
        width, pairs = source.shape[1], self.pairs
        if size > width:
            raise InstrumentError(
                f"Interchange: a subspace of {size} dimensions was asked for, {site.named!r} has {width}"
            )
        draw = snapshot.generator("directions", site.named, size)
        start, *random = (orthonormal(torch.randn(width, size, generator=draw)) for _ in range(1 + self.random))
        values: dict[str, np.ndarray] = {}

        def judge(name: str, subspace: Tensor, goal: Tensor) -> None:
            made = _judged(site.outputs(judged, source, subspace), goal[judged], pairs.label[judged])
            values.update({kind + name: each for kind, each in made.items()})

        # fitted to the algorithm, to labels of other pairs, and to the rival, from one start and on the same batches
        dealt = torch.randperm(len(pairs.base), generator=snapshot.generator("permuted"))
        search = Search(self.steps, self.batch, self.rate)
        goals = {"": pairs.counterfactual, "_permuted": pairs.counterfactual[dealt], "_rival": pairs.rival}
        subspaces = {}
        for name, goal in goals.items():
            if goal is not None:
                batches = snapshot.generator("batches", site.named, size)
                subspaces[name] = site.fit(search, source, start, goal, fitted, batches)
                judge(name, subspaces[name], goal)

        # what is read of it, what is not, and subspaces that nobody fitted
        if reader is not None:
            for name, part in zip(("_row", "_null"), split(subspaces[""], reader), strict=True):
                if part.shape[1]:
                    judge(name, part, pairs.counterfactual)
        for number, subspace in enumerate(random):
            judge(f"_random {number}", subspace, pairs.counterfactual)
        return values, subspaces[""]

    def _exchange(self, snapshot: Snapshot, named: str | tuple[str, int]) -> Exchange:
        return Exchange(snapshot, self.pairs.base, named, self.place, self.layout, self.batch_size, type(self).__name__)

    def _reader(self, snapshot: Snapshot, site: int, source: Tensor) -> Tensor | None:
        """What the reader of a site sees, (rank, d); None without one."""
        if not self.readers or not self.readers[site]:
            return None
        return row_space(snapshot.model, self.readers[site], source.shape[1], type(self).__name__)

    def _rows(
        self,
        found: dict[str, np.ndarray],
        wholes: list[dict[str, np.ndarray]],
        shares: np.ndarray,
        alone: Tensor,
        judged: Tensor,
    ) -> xr.Dataset:
        rows = Rows(headline=["iia", "difference"], error="standard error over held-out pairs")
        changes = (self.pairs.counterfactual != self.pairs.label)[judged].numpy()
        cells = (len(self.sites), len(self.sizes))
        nothing = np.full((*cells, len(judged)), np.nan)

        def put(name: str, values: np.ndarray, label: str, counted: np.ndarray, **about: Any) -> None:
            total, count = np.where(counted, values, 0.0), counted.astype(float)
            mean, se = clustered_mean(np.moveaxis(total, -1, 0), count)
            groups = clustered_groups(np.moveaxis(total, -1, 0), count)
            rows.put(name, about.pop("dims", CELL), mean, se, label, replicates=groups, **about)

        every = np.ones(len(judged), bool)
        hits = found["hit"]
        put("iia", hits, "outputs as the algorithm says", every, units="share", smallest_change=0.05)
        put("iia_changes", hits, "the same where the label changes", changes, units="share")
        put("iia_same", hits, "the same where it does not", ~changes, units="share")
        label = "changed label minus own, where it changes"
        put("difference", found["difference"], label, changes, units="logits", smallest_change=0.2)

        # nulls: random subspaces, labels of other pairs, another algorithm
        draws = [found[f"hit_random {number}"].mean(-1) for number in range(self.random)]
        moved = [found[f"difference_random {number}"][..., changes].mean(-1) for number in range(self.random)]
        moved = moved if changes.any() else [np.full(cells, np.nan)]
        rows.put("difference_random", CELL, np.mean(moved, 0), None, f"{label}, random subspaces", units="logits")
        rows.put("iia_random", CELL, np.mean(draws, 0), None, "random subspaces, mean", units="share")
        rows.put("iia_random_high", CELL, np.max(draws, 0), None, "random subspaces, largest", units="share")
        permuted = found["hit_permuted"].mean(-1)
        rows.put("iia_permuted", CELL, permuted, None, "fitted to labels of other pairs", units="share")
        rival = found.get("hit_rival", nothing)
        put("iia_rival", rival, "fitted to a rival algorithm", every, units="share", nan="no rival")

        # what the reader of the site sees of the subspace
        row, null = (found.get(f"hit_{part}", nothing).mean(-1) for part in ("row", "null"))
        rows.put("iia_row", CELL, row, None, "the part that is read alone", units="share", nan="no reader")
        rows.put("iia_null", CELL, null, None, "the part that is not read alone", units="share", nan="no such part")
        rows.put("row_share", CELL, shares, None, "share of the subspace that is read", units="share", nan="no reader")
        whole = np.stack([each["hit"] for each in wholes])
        put("iia_whole", whole, "the whole state exchanged", every, units="share", dims="site")
        as_is = (alone.argmax(1) == self.pairs.counterfactual[judged]).double().mean()
        rows.put("iia_unpatched", (), float(as_is), None, "the model as it is", units="share")
        right = (alone.argmax(1) == self.pairs.label[judged]).double().numpy()
        put("accuracy", right, "bases whose label the model gives", every, units="share", dims=())
        names = [each if isinstance(each, str) else " ".join(map(str, each)) for each in self.sites]
        return rows.dataset(site=np.array(names, dtype=object), size=np.array(self.sizes))


def _judged(outputs: Tensor, goal: Tensor, own: Tensor) -> dict[str, np.ndarray]:
    """Of each pair whether the output is the goal, and the goal's logit minus that of its own label."""
    pair = outputs.double().gather(1, torch.stack([goal, own], 1))
    return {
        "hit": (outputs.argmax(1) == goal).double().numpy(),
        "difference": (pair[:, 0] - pair[:, 1]).numpy(),
    }
