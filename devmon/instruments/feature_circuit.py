"""Sparse feature circuits: the latents of dictionaries, and what they leave over, that an answer needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout
from devmon.anatomy.patching import logit_difference
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, minibatches
from devmon.data.prompt_pairs import PromptPairs
from devmon.data.rows import Rows
from devmon.data.shares import NO_SIGNAL, share, share_groups, signal
from devmon.errors import DataError
from devmon.features.dictionary import Dictionary
from devmon.features.nodes import Nodes, SiteOf, basis, gradients
from devmon.features.ranking import Batch, Ranked, ranked
from devmon.snapshot import Snapshot, derive_seed

COUNTS = (1, 2, 5, 10, 20, 50, 100, 200)  # nodes, evenly spaced in their logarithm
ERRORS = ("ranked", "kept", "removed")


@dataclass(frozen=True, eq=False)
class FeatureCircuit(ByContent):
    """How much of a logit difference the k highest-ranked features of a model carry without the others.

    Sparse feature circuits (Marks et al. 2024, 2403.19647). `dictionaries` are autoencoders by site, {("mlp_out", 0):
    dictionary, …}; nodes are their latents f, each at all places, and what they leave over, e = x - decode(f), one node
    for each site and place. m is the logit of the answer minus that of the foil at the last place of `pairs`. Half of
    the pairs ranks the nodes, the other half measures the circuits.

    Rank: the absolute value of (f(clean) - f(corrupt)) · ∂m/∂f, the slope averaged over the midpoints of `steps` parts
    of the way from the corrupt to the clean nodes of one site, all other sites left to the model; of an error
    ⟨e(clean) - e(corrupt), ∂m/∂e⟩; mean over prompts, sum over places, in nats.

    Circuit C: its nodes are what the model makes of them on the clean prompt, all others their mean over the corrupt
    prompts that ranked, place by place. Faithfulness F = (m(C) - m(∅)) / (m(M) - m(∅)), M with all nodes, which is the
    model, and ∅ with none.

    - `faithfulness` (errors, count), 1: F of the first nodes; errors "ranked" among them, or latents alone are counted
      and all errors "kept", or "removed". Null: `faithfulness_random`.
    - `faithfulness_se` (errors, count), 1: its standard error over prompts.
    - `faithfulness_random` (count), 1: of as many nodes drawn from the errors and the latents that fire, mean of
      `random` draws of `seed`.
    - `faithfulness_random_se` (count), 1: its standard error over prompts.
    - `faithfulness_basis` (count), 1: of as many coordinates of the sites, ranked alike, in the place of latents.
    - `faithfulness_basis_se` (count), 1: its standard error over prompts.
    - `completeness` (count), 1: F of all nodes but the first; 0 where nothing is missed. Null: 1.
    - `completeness_se` (count), 1: its standard error over prompts.
    - `area`, 1: mean over `counts` of F, errors ranked. Null: `area_random`.
    - `area_se`, 1: its standard error over prompts.
    - `area_random`, 1: the same of the random nodes.
    - `area_random_se`, 1: its standard error over prompts.
    - `signal`, nats: m(M) - m(∅). All above are NaN where that is not above 3 of its standard errors.
    - `signal_se`, nats: its standard error over prompts.
    - `m_clean`, nats: m of the clean prompts.
    - `total` (site), nats: sum of the site's scores, which is what m loses where the site alone holds its corrupt
      values, up to the error of the midpoint rule.
    - `error_share` (site), share: of the sum of absolute scores of a site, that of its errors.
    - `score` (node), nats: of the `top` first nodes.
    - `node_site` (node), 1: their site, by its place among those of `site`; -1 where there are no more nodes.
    - `node_latent` (node), 1: the latent; -1 for an error.
    - `node_pos` (node), 1: the place of an error; -1 for a latent.
    - `edge` (node, to), nats: what the node's difference adds to m by way of another, -1 of `to` being the logits
      themselves, through no third site: (∂m/∂to) (∂to/∂node) (node(clean) - node(corrupt)), ∂m/∂to averaged as above.

    Before the first site all is the model's own: a circuit of late sites gets what is there for free. Circuits of other
    dictionaries are compared at equal counts only. Cost: `steps` passes forward and back a site for half of the pairs,
    twice that with the basis and again for the edges; for the other half 1 + counts · (5 + random) passes.
    `devmon.analysis.plots.feature_circuit` draws it. Raises InstrumentError for a site that the model lacks and a
    dictionary of another width, DataError for settings.
    """

    pairs: PromptPairs
    dictionaries: Mapping[SiteOf, Dictionary] | tuple[tuple[SiteOf, Dictionary], ...]
    steps: int = 10
    counts: tuple[int, ...] = COUNTS
    random: int = 3
    top: int = 30
    seed: int = 0
    layout: Layout | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        given = self.dictionaries.items() if isinstance(self.dictionaries, Mapping) else self.dictionaries
        pairs = tuple(given)
        object.__setattr__(self, "dictionaries", pairs)
        wrong = [site for site, coder in pairs if not (coder.centred and coder.parts == 1)]
        if not pairs or len({site for site, _ in pairs}) < len(pairs) or wrong:
            raise DataError(
                "FeatureCircuit needs one dictionary a site, each an autoencoder of that site; got "
                f"{[site for site, _ in pairs]}, no autoencoders at {wrong}"
            )
        if len(self.pairs.clean) < 4 or min(self.steps, self.random, self.top, *self.counts, 1) < 1 or not self.counts:
            raise DataError(
                "FeatureCircuit needs at least 4 pairs, and steps, random, top and counts of at least 1; got "
                f"{len(self.pairs.clean)} pairs, {self.steps}, {self.random}, {self.top} and {self.counts}"
            )

    def cost(self) -> Cost:
        count, length = self.pairs.clean.shape
        half, sites, sizes = count // 2, len(self.dictionaries), len(self.counts)
        slopes = half * (3 * self.steps * sites + 1)
        edges = 2 * half * sites * self.top // 4  # a backward pass of a part of the model, for each node
        measured = (count - half) * (2 + sizes * (5 + self.random))
        return Cost(forwards=4 * half + slopes + measured, backwards=slopes + edges, positions=length)

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        anatomy = Anatomy.of(snapshot, self.layout, type(self).__name__)
        nodes = Nodes(anatomy, dict(self.dictionaries))
        anatomy.need_causal(self.pairs.clean)
        half = len(self.pairs.clean) // 2
        order = self._ranked(nodes, half)

        # circuits: the order of all nodes, of latents alone, random ones, and of the coordinates of the same sites
        measured = [slice(half + part.start, half + part.stop) for part in self._batches(len(self.pairs.clean) - half)]
        plain = [self._difference(anatomy.run(self.pairs.clean[rows])[0], rows) for rows in measured]
        draws = [self._drawn(order, draw) for draw in range(self.random)]
        latents = order.rank[~order.is_error[order.rank]]
        empty, own = self._measured(nodes, order, half, [(order.rank, None, False), (latents, True, False),
                                                          (latents, False, False), (order.rank, None, True),
                                                          *((each, None, False) for each in draws)])  # fmt: skip
        coordinates = Nodes(anatomy, {site: basis(coder.inputs, coder.W_enc) for site, coder in nodes.coders.items()})
        of_basis = self._ranked(coordinates, half)
        basis_ends = self._measured(coordinates, of_basis, half, [(of_basis.rank, None, False)])

        rows = Rows(headline=["area", "signal"], error="standard error over prompts")
        self._put_curves(rows, np.concatenate(plain), empty, own, *basis_ends)
        self._put_nodes(rows, nodes, order, half)
        names = np.array([f"{name} {layer}" for name, layer in nodes.sites], dtype=object)
        return rows.dataset(
            errors=np.array(ERRORS, dtype=object),
            count=np.array(self.counts),
            site=names,
            node=np.arange(self.top),
            to=np.append(np.arange(self.top), -1),
        )

    def _batches(self, count: int) -> Iterator[slice]:
        return minibatches(count, self.batch_size)

    def _difference(self, output: Tensor, rows: slice) -> np.ndarray:
        answer, foil = self.pairs.answer[rows], self.pairs.foil[rows]
        return logit_difference(output, answer, foil, type(self).__name__).detach().cpu().numpy()

    def _metric(self, output: Tensor, rows: slice) -> Tensor:
        return logit_difference(output, self.pairs.answer[rows], self.pairs.foil[rows], type(self).__name__).sum()

    def _ranked(self, nodes: Nodes, half: int) -> Ranked:
        """The nodes of the first half of the pairs by their score."""
        batches = (
            Batch(self.pairs.clean[rows], self.pairs.corrupt[rows], partial(self._metric, rows=rows))
            for rows in self._batches(half)
        )
        return ranked(nodes, batches, self.steps)

    def _drawn(self, order: Ranked, draw: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "FeatureCircuit", "random", draw))
        alive = np.flatnonzero(order.living)
        return alive[torch.randperm(len(alive), generator=generator).numpy()]

    def _measured(
        self, nodes: Nodes, order: Ranked, half: int, orders: list[tuple[np.ndarray, bool | None, bool]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """m (prompt,) of the second half with no node, and (order, count, prompt) with the first nodes of each order:
        (order, what all errors are, or None where they are counted, whether all but the first are taken)."""
        sets = [order.kept(np.array([], dtype=int))]
        sets += [order.kept(first[:count], errors, rest) for first, errors, rest in orders for count in self.counts]
        found: list[list[np.ndarray]] = [[] for _ in sets]
        for part in self._batches(len(self.pairs.clean) - half):
            rows = slice(half + part.start, half + part.stop)
            for at, keep in enumerate(sets):
                output = nodes.mixed(self.pairs.clean[rows], keep, order.means)
                found[at].append(self._difference(output, rows))
        whole = np.stack([np.concatenate(each) for each in found])
        return whole[0], whole[1:].reshape(len(orders), len(self.counts), -1)

    def _put_curves(
        self,
        rows: Rows,
        clean: np.ndarray,
        empty: np.ndarray,
        own: np.ndarray,
        empty_basis: np.ndarray,
        coordinates: np.ndarray,
    ) -> None:
        """From m (prompt,) of the model and of no nodes, and (order, count, prompt) of circuits."""
        whole = clean - empty
        mean, se, there = signal(whole)
        if not there:
            rows.attrs["below_floor"] = "the signal is not above 3 of its standard errors: no faithfulness"
        inside = own - empty  # (order, count, prompt)
        null = inside[4:].mean(0)
        of_basis = coordinates[0] - empty_basis
        about: dict[str, Any] = {"units": "1", "nan": NO_SIGNAL}
        text = "share of the logit difference in the first nodes"
        for name, dims, (value, error), label in (
            ("faithfulness", ("errors", "count"), share(np.moveaxis(inside[:3], -1, 0), whole), text),
            ("faithfulness_random", "count", share(null.T, whole), f"{text}, random"),
            ("faithfulness_basis", "count", share(of_basis.T, clean - empty_basis), f"{text}, coordinates"),
            ("completeness", "count", share(inside[3].T, whole), "share of the logit difference in all other nodes"),
            ("area_random", (), share(null.mean(0), whole), "mean faithfulness of random nodes over counts"),
        ):
            rows.put(name, dims, value, error, label, **about)
        areas = inside[0].mean(0)
        value, error = share(areas, whole)
        groups = share_groups(areas, whole)
        label = "mean faithfulness over counts of nodes"
        rows.put("area", (), value, error, label, smallest_change=0.05, replicates=groups, **about)
        groups = clustered_groups(whole, np.ones(len(whole)))
        label = "logit difference of the model minus that of no nodes"
        rows.put("signal", (), mean, se, label, units="nats", smallest_change=0.2, replicates=groups)
        rows.put("m_clean", (), float(clean.mean()), None, "logit difference of clean prompts", units="nats")

    def _put_nodes(self, rows: Rows, nodes: Nodes, order: Ranked, half: int) -> None:
        total = np.array([part.sum() for part in order.by_part()]).reshape(-1, 2).sum(1)
        parts = np.array([np.abs(part).sum() for part in order.by_part()]).reshape(-1, 2)
        rows.put("total", "site", total, None, "sum of the scores of a site", units="nats")
        with np.errstate(invalid="ignore"):
            of_errors = parts[:, 1] / parts.sum(1)
        rows.put(
            "error_share",
            "site",
            of_errors,
            None,
            "of absolute scores, those of errors",
            units="share",
            nan="no scores",
        )

        # the first nodes, filled up so that every step has the same shape
        first = order.rank[: self.top]
        at = [order.place(int(number)) for number in first]
        for column, (name, label) in enumerate(
            (("node_site", "site of the node"), ("node_latent", "its latent"), ("node_pos", "place of an error"))
        ):
            filled = np.full(self.top, -1)
            filled[: len(at)] = [each[column] for each in at]
            rows.put(name, "node", filled, None, f"{label}, -1 where there is none", units="1")
        scores, edges = np.full(self.top, np.nan), np.full((self.top, self.top + 1), np.nan)
        scores[: len(first)] = order.score[first]
        found = self._edges(nodes, at, half)
        edges[: len(first), : len(first)], edges[: len(first), -1] = found[:, :-1], found[:, -1]
        none = "there are no more nodes"
        rows.put("score", "node", scores, None, "integrated attribution of the node", units="nats", nan=none)
        rows.put("edge", ("node", "to"), edges, None, "what a node adds by way of another", units="nats", nan=none)

    def _edges(self, nodes: Nodes, at: list[tuple[int, int, int]], half: int) -> np.ndarray:
        """(node, node and the logits), over the pairs that order."""
        edges = np.zeros((len(at), len(at) + 1))
        sites = nodes.sites
        for rows in self._batches(half):
            metric = partial(self._metric, rows=rows)
            (_, clean), (_, corrupt) = (nodes.read(prompts[rows]) for prompts in (self.pairs.clean, self.pairs.corrupt))
            graph = nodes.graph(self.pairs.clean[rows], metric)
            slopes = {}
            for site in {sites[number] for number, _, _ in at}:
                slopes[site] = nodes.integrated(
                    self.pairs.clean[rows], site, corrupt[site], clean[site], metric, self.steps
                )

            # one backward pass for each receiver, to all senders before it
            targets: list[Tensor] = []
            for number, latent, pos in at:
                inner, slope = graph.inner[sites[number]], slopes[sites[number]]
                if latent >= 0:
                    targets.append((inner.latents[..., latent] * slope.latents[..., latent]).sum())
                else:
                    targets.append((inner.error[:, pos] * slope.error[:, pos]).sum())
            for column, target in enumerate([*targets, graph.metric]):
                found = dict(gradients(target, graph.leaves))
                for row, (number, latent, pos) in enumerate(at):
                    site = sites[number]
                    by = found[site]
                    if by is None or (column < len(at) and at[column][0] <= number):
                        continue
                    moved = clean[site] - corrupt[site]
                    if latent >= 0:
                        product = moved.latents[..., latent].double() * by.latents[..., latent].double()
                    else:
                        product = moved.error[:, pos].double() * by.error[:, pos].double()
                    edges[row, column] += float(product.sum()) / half
        return edges
