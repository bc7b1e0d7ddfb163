"""Circuits: the edges that a task needs, ranked by gradients, and how faithful the first k of them are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Layout
from devmon.anatomy.edges import Edges, Sent
from devmon.anatomy.patching import logit_difference
from devmon.cost import GPT2_SMALL, SWEEP, Cost, Shape
from devmon.data import ByContent, clustered_groups, minibatches
from devmon.data.prompt_pairs import PromptPairs
from devmon.data.rows import Rows
from devmon.data.shares import NO_SIGNAL, share, share_groups, signal
from devmon.errors import DataError
from devmon.snapshot import Snapshot, derive_seed

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the edges, as in MIB
# The error of `area` from the ranking is a jackknife that leaves out each of RANKINGS groups of the ranking prompts, at
# the shares that carry at least WEIGHT of the area. More groups know it better, and cost circuits for each such share.
RANKINGS, WEIGHT = 4, 0.05
FAITHFUL = 0.8  # faithfulness from which on a circuit counts as the model's: `size` falls as it is lowered


@dataclass(frozen=True, eq=False)
class Circuit(ByContent):
    """How much of a logit difference the k highest-ranked edges of the model carry without the others.

    The graph is that of `devmon.anatomy.edges.Edges`: embedding, heads, MLPs; edges into queries, keys and values of
    heads, into MLPs and into the logits. `pairs` are clean and corrupt prompts (`devmon.data.prompt_pairs`); m is the
    mean logit of the answer minus that of the foil at the last place. Half of the pairs rank the edges, the other half
    measures the circuits, so that no circuit is judged by what chose it.

    Rank: the absolute value (`signed`: the value) of the integrated attribution of the edge s → r, EAP-IG (Hanna et al.
    2024, 2403.17806): mean over prompts of Σ_pos (s(clean) - s(corrupt)) · 1/n Σ_i ∂m/∂(input of r), the gradient taken
    where the embedding is corrupt + (i - ½)/n (clean - corrupt), i = 1 .. n, n = `steps`, in nats. Theirs takes i/n;
    the midpoints are closer to the integral.

    Circuit C_k: all edges but the first k carry what they carry for the corrupt prompt; each part computes on its own
    input, and sends on what it then has. Faithfulness F(k) = (m(C_k) - m(∅)) / (m(M) - m(∅)), m(M) of the clean prompt,
    m(∅) with every edge cut, which is the corrupt prompt (MIB, Mueller et al. 2504.13151).

    - `faithfulness` (share), 1: F(k), k this share of all edges (at least one edge); 1 for all edges; it can go over 1,
      and under 0. Null: `faithfulness_random`.
    - `faithfulness_se` (share), 1: its standard error over prompts.
    - `faithfulness_random` (share), 1: the same for k random edges, the mean over `random` draws of `seed`.
    - `faithfulness_random_se` (share), 1: its standard error over prompts.
    - `area`, 1: the trapezoid area under F from 0 to 1 over the share of edges, F(0) = 0 (MIB's CPR). Null:
      `area_random`.
    - `area_se`, 1: its standard error over prompts, those that rank the edges included (a jackknife over 4 groups of
      them, at the shares that carry the area; errors of `faithfulness` are for the ranking given).
    - `area_random`, 1: the same for the random circuits.
    - `area_random_se`, 1: its standard error over prompts.
    - `distance`, 1: the area under abs(1 - F) (MIB's CMD), 0 is perfect.
    - `size`, share: the smallest share measured with F >= .8 from there on up to all edges, not between those measured;
      a threshold, which jumps: read it beside `area`.
    - `signal`, nats: m(M) - m(∅). All above are NaN where that of the measured half is not above 3 of its standard
      errors.
    - `signal_se`, nats: its standard error over prompts.
    - `m_clean`, nats: m(M).
    - `edge_id` (edge), 1: the numbers of the `top` first edges, those of `Edges.names`, which belong to the
      architecture; `devmon.analysis.derive.circuit` compares them between steps.
    - `score` (edge), nats: their integrated attribution.

    An edge that matters only together with others gets no attribution where the gradient is flat (saturated attention);
    `steps` help as far as the way there is not flat. Cost: `steps` passes forward and back for half of the pairs, and,
    where there is a signal, len(shares) · (1 + `random`) + 12 forward for the other, each nearly twice a plain one.
    Raises InstrumentError for models whose residual stream is not a sum of known parts, DataError for settings.
    """

    pairs: PromptPairs
    steps: int = 5
    shares: tuple[float, ...] = SHARES
    top: int = 50
    random: int = 3
    signed: bool = False
    seed: int = 0
    layout: Layout | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        shares = tuple(sorted({float(share) for share in self.shares} | {1.0}))
        if not shares[0] > 0 or shares[-1] > 1:
            raise DataError(f"Circuit needs shares of the edges above 0 and up to 1, got {self.shares}")
        object.__setattr__(self, "shares", shares)
        if min(self.steps, self.top, self.random) < 1 or len(self.pairs.clean) < 6:
            raise DataError(
                f"Circuit needs steps, top and random of at least 1 and 6 pairs, got {self.steps}, {self.top}, "
                f"{self.random} and {len(self.pairs.clean)}"
            )

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        """With a signal: without one no circuit is run, and what ranks the edges is left."""
        count, length = self.pairs.clean.shape
        half = count // 2
        circuits = (len(self.shares) - 1) * (1 + self.random) + len(self._heavy) * RANKINGS
        # every head has streams of its own: added up from those below, normalised, read
        streams = 3 * shape.heads * shape.d_model * SWEEP * (2 + shape.layers / 2) * shape.layers
        own = 3 * half * self.steps + (count - half) * circuits
        return Cost(
            forwards=half * (2 + self.steps) + (count - half) * (2 + circuits),
            backwards=half * self.steps,
            positions=length,
            operations=own * length * streams,
        )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        edges = Edges(snapshot.model, self.layout, type(self).__name__)
        half = len(self.pairs.clean) // 2
        by_group = self._scores(edges, half)
        score = by_group.sum(0)
        real = edges.exists.flatten().nonzero()[:, 0]
        order = self._order(score, real)

        # circuits of this ranking and of random ones, and of rankings without a group of prompts, for their error
        orders = [order, *self._shuffled(real)]
        others = [self._order(score - group, real) for group in by_group]
        sets = [self._first(each, self._shares) for each in orders] + [
            self._first(each, self._heavy) for each in others
        ]
        clean, corrupt, inside = self._measure(edges, half, sets)
        whole, count = clean - corrupt, len(orders)
        own = np.array(inside[:count])
        moved = self._moved(np.array(inside[count:]), own[0], whole)
        result = self._faithfulness(clean, corrupt, own, moved)
        result.attrs |= {"edges": len(real), "graph": edges.identity}

        # the first edges by name and score, filled up so that every step has the same shape
        first = order[: self.top]
        numbers, scores = np.full(self.top, -1), np.full(self.top, np.nan)
        numbers[: len(first)], scores[: len(first)] = first.numpy(), score.flatten()[first].numpy()
        result.put("edge_id", "edge", numbers, None, "number of the edge, -1 where there are no more", units="1")
        none = "there are no more edges"
        result.put("score", "edge", scores, None, "integrated attribution of the edge", units="nats", nan=none)
        return result.dataset(share=np.array(self.shares), edge=np.arange(self.top))

    @property
    def _shares(self) -> tuple[float, ...]:
        """Without that of all edges, whose circuit is the model."""
        return self.shares[:-1]

    @property
    def _heavy(self) -> tuple[float, ...]:
        """Of them those whose faithfulness carries at least `WEIGHT` of the area."""
        return tuple(np.array(self._shares)[self._weights[:-1] >= WEIGHT].tolist())

    @property
    def _weights(self) -> np.ndarray:
        """Of the faithfulness at each share in the area: trapezoids from 0 on."""
        gaps = np.diff([0.0, *self.shares])
        return (gaps + np.append(gaps[1:], 0.0)) / 2

    def _order(self, score: Tensor, real: Tensor) -> Tensor:
        rank = score.flatten()[real]
        return real[torch.argsort(rank if self.signed else rank.abs(), descending=True, stable=True)]

    def _shuffled(self, real: Tensor) -> Iterator[Tensor]:
        for draw in range(self.random):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "Circuit", "random", draw))
            yield real[torch.randperm(len(real), generator=generator)]

    def _first(self, order: Tensor, shares: tuple[float, ...]) -> list[Tensor]:
        """The edges that stay, for each share."""
        return [order[: max(1, round(share * len(order)))] for share in shares]

    def _moved(self, others: np.ndarray, own: np.ndarray, whole: np.ndarray) -> float:
        """Variance of the area from the prompts that rank: `others` (group, heavy share, prompt) are the circuits of
        rankings without a group, `own` (share, prompt) those of all."""
        heavy = np.isin(self._shares, self._heavy)
        if not heavy.any() or not signal(whole)[2]:
            return 0.0
        parts = np.einsum("gsp,s->pg", others - own[heavy], self._weights[:-1][heavy])  # (prompt, group)
        change, error = share(parts - parts.mean(1, keepdims=True), whole)
        # the prompts that measure scatter the changes too, which their own error has already
        return max(0.0, (1 - 1 / len(others)) * float((change**2 - error**2).sum()))

    def _faithfulness(self, clean: np.ndarray, corrupt: np.ndarray, inside: np.ndarray, moved: float) -> Rows:
        """From the logit differences (prompt,) of both ends and (set, share, prompt) of the circuits, and the variance
        of the area from the ranking."""
        result = Rows(headline=["area", "signal"], error="standard error over prompts")
        whole = clean - corrupt
        mean, se, there = signal(whole)
        if not there:
            result.attrs["below_floor"] = "the signal is not above 3 of its standard errors: no faithfulness"
        # with all edges a circuit is the model itself, so it need not be run
        inside = np.concatenate([inside, np.broadcast_to(clean, (len(inside), 1, len(clean)))], 1)
        own, null = inside[0] - corrupt, inside[1:].mean(0) - corrupt  # (share, prompt)

        # every share is a ratio of sums over prompts, so that prompts of little signal weigh little
        faithful, faithful_se = share(own.T, whole)
        off = np.abs(1 - np.concatenate([[0.0], faithful]))
        area, area_se = share(self._area(own), whole)
        area_se = np.sqrt(area_se**2 + moved)
        for name, dims, (value, error), long_name, change in (
            ("faithfulness", "share", (faithful, faithful_se), "share of the logit difference in the circuit", None),
            ("faithfulness_random", "share", share(null.T, whole), "the same of random edges", None),
            ("area", (), (area, area_se), "area under faithfulness", 0.05),
            ("area_random", (), share(self._area(null), whole), "area under faithfulness of random edges", None),
            ("distance", (), (self._trapezoids(off), None), "area under abs(1 - faithfulness)", None),
        ):
            about: dict[str, Any] = {"smallest_change": change, "nan": NO_SIGNAL}
            if name == "area":
                about["replicates"] = share_groups(self._area(own), whole)
            result.put(name, dims, value, error, long_name, units="1", **about)
        long_name = f"share of edges with faithfulness of at least {FAITHFUL}"
        result.put("size", (), _size(self.shares, faithful), None, long_name, units="share", nan=NO_SIGNAL)

        long_name = "logit difference of clean minus corrupt prompts"
        groups = clustered_groups(whole, np.ones(len(whole)))
        result.put("signal", (), mean, se, long_name, units="nats", smallest_change=0.2, replicates=groups)
        result.put("m_clean", (), float(clean.mean()), None, "logit difference of clean prompts", units="nats")
        return result

    def _area(self, values: np.ndarray) -> np.ndarray:
        """The area under (share, prompt), which starts from nothing at no edges."""
        return self._trapezoids(np.concatenate([np.zeros_like(values[:1]), values]))

    def _trapezoids(self, values: np.ndarray) -> np.ndarray:
        """The area under (1 + share, ...), the first at no edges."""
        return np.tensordot(np.diff([0.0, *self.shares]), (values[1:] + values[:-1]) / 2, 1)

    def _difference(self, output: Tensor, rows: slice) -> Tensor:
        return logit_difference(output, self.pairs.answer[rows], self.pairs.foil[rows], type(self).__name__)

    def _total(self, output: Tensor, rows: slice) -> Tensor:
        return self._difference(output, rows).sum()

    def _scores(self, edges: Edges, half: int) -> Tensor:
        """EAP-IG (group, sender, receiver) in float64 by groups of the first `half` pairs; their sum is the mean."""
        count = min(RANKINGS, half)
        total = torch.zeros((count, *edges.exists.shape), dtype=torch.float64)
        for rows in minibatches(half, self.batch_size):
            (_, clean), (_, corrupt) = (edges.sent(prompts[rows]) for prompts in (self.pairs.clean, self.pairs.corrupt))
            carried = edges.differences(clean, corrupt)  # (batch, pos, sender, d)
            for step in range(self.steps):
                between = corrupt.embed + (step + 0.5) / self.steps * (clean.embed - corrupt.embed)
                slopes = edges.slopes(self.pairs.clean[rows], between, partial(self._total, rows=rows))
                for group, slope in slopes.items():
                    for part in range(count):
                        mine = slice((part - rows.start) % count, None, count)
                        product = torch.einsum("bpsd,bprd->sr", carried[mine].double(), slope[mine].double())
                        total[part, :, edges.groups[group]] += product.cpu() / (self.steps * half)
        return torch.where(edges.exists, total, 0.0)

    def _measure(
        self, edges: Edges, half: int, sets: list[list[Tensor]]
    ) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Logit differences (prompt,) of clean and corrupt prompts, and (size, prompt) of each set of circuits: NaN
        where there is no signal to be a share of."""
        parts = [
            slice(half + part.start, half + part.stop)
            for part in minibatches(len(self.pairs.clean) - half, self.batch_size)
        ]
        ends, sent = [], list[Sent]()
        for rows in parts:
            whole, _ = edges.sent(self.pairs.clean[rows])
            empty, carried = edges.sent(self.pairs.corrupt[rows])
            ends.append([self._difference(output, rows).cpu().numpy() for output in (whole, empty)])
            sent.append(carried)
        clean, corrupt = np.concatenate(ends, -1)
        if not signal(clean - corrupt)[2]:
            return clean, corrupt, [np.full((len(circuits), len(clean)), np.nan) for circuits in sets]

        # every circuit of a minibatch, beside what its corrupt prompts send
        inside = [
            np.array([self._circuit(edges, rows, kept, carried) for circuits in sets for kept in circuits])
            for rows, carried in zip(parts, sent, strict=True)
        ]
        cuts = np.cumsum([len(circuits) for circuits in sets])[:-1]
        return clean, corrupt, np.split(np.concatenate(inside, -1), cuts)

    def _circuit(self, edges: Edges, rows: slice, kept: Tensor, corrupt: Sent) -> np.ndarray:
        cut = edges.exists.flatten().clone()
        cut[kept] = False
        output = edges.cut(self.pairs.clean[rows], cut.reshape(edges.exists.shape), corrupt)
        return self._difference(output, rows).cpu().numpy()


def _size(shares: tuple[float, ...], faithful: np.ndarray) -> float:
    """The first share from which on the faithfulness is at least `FAITHFUL`; NaN for none."""
    enough = np.logical_and.accumulate(faithful[::-1] >= FAITHFUL)[::-1]
    return shares[int(enough.argmax())] if enough.any() else float("nan")
