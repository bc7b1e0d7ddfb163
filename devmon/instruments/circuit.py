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
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, minibatches
from devmon.data.prompt_pairs import PromptPairs
from devmon.data.rows import Rows
from devmon.data.shares import NO_SIGNAL, share, share_groups, signal
from devmon.errors import DataError
from devmon.snapshot import Snapshot, derive_seed

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the edges, as in MIB
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
    - `area_se`, 1: its standard error over prompts.
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
    `steps` help as far as the way there is not flat. Cost: `steps` passes forward and back for half of the pairs, and
    len(shares) · (1 + `random`) forward for the other, each somewhat dearer than a plain one.
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

    def cost(self) -> Cost:
        count, length = self.pairs.clean.shape
        half = count // 2
        circuits = (len(self.shares) - 1) * (1 + self.random)
        return Cost(
            forwards=half * (2 + self.steps) + (count - half) * (2 + circuits),
            backwards=half * self.steps,
            positions=length,
        )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        edges = Edges(snapshot.model, self.layout, type(self).__name__)
        half = len(self.pairs.clean) // 2
        score = self._scores(edges, half)
        real = edges.exists.flatten().nonzero()[:, 0]
        rank = score.flatten()[real]
        order = real[torch.argsort(rank if self.signed else rank.abs(), descending=True, stable=True)]
        clean, corrupt, inside = self._measure(edges, half, self._circuits(order, real))
        result = self._faithfulness(clean, corrupt, inside)
        result.attrs |= {"edges": len(real), "graph": edges.identity}

        # the first edges by name and score, filled up so that every step has the same shape
        first = order[: self.top]
        numbers, scores = np.full(self.top, -1), np.full(self.top, np.nan)
        numbers[: len(first)], scores[: len(first)] = first.numpy(), score.flatten()[first].numpy()
        result.put("edge_id", "edge", numbers, None, "number of the edge, -1 where there are no more", units="1")
        none = "there are no more edges"
        result.put("score", "edge", scores, None, "integrated attribution of the edge", units="nats", nan=none)
        return result.dataset(share=np.array(self.shares), edge=np.arange(self.top))

    def _circuits(self, order: Tensor, real: Tensor) -> list[list[Tensor]]:
        """The edges that stay, [set][share] without the share of all: first by rank, then by `random` shuffles."""
        orders = [order]
        for draw in range(self.random):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "Circuit", "random", draw))
            orders.append(real[torch.randperm(len(real), generator=generator)])
        sizes = [max(1, round(share * len(real))) for share in self.shares[:-1]]
        return [[each[:size] for size in sizes] for each in orders]

    def _faithfulness(self, clean: np.ndarray, corrupt: np.ndarray, inside: np.ndarray) -> Rows:
        """From the logit differences (prompt,) of both ends and (set, share, prompt) of the circuits."""
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
        for name, dims, (value, error), long_name, change in (
            ("faithfulness", "share", (faithful, faithful_se), "share of the logit difference in the circuit", None),
            ("faithfulness_random", "share", share(null.T, whole), "the same of random edges", None),
            ("area", (), share(self._area(own), whole), "area under faithfulness", 0.05),
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
        """EAP-IG (sender, receiver) in float64, mean over the first `half` pairs."""
        total = torch.zeros(edges.exists.shape, dtype=torch.float64)
        for rows in minibatches(half, self.batch_size):
            (_, clean), (_, corrupt) = (edges.sent(prompts[rows]) for prompts in (self.pairs.clean, self.pairs.corrupt))
            carried = edges.differences(clean, corrupt)  # (batch, pos, sender, d)
            for step in range(self.steps):
                between = corrupt.embed + (step + 0.5) / self.steps * (clean.embed - corrupt.embed)
                slopes = edges.slopes(self.pairs.clean[rows], between, partial(self._total, rows=rows))
                for group, slope in slopes.items():
                    product = torch.einsum("bpsd,bprd->sr", carried.double(), slope.double())
                    total[:, edges.groups[group]] += product.cpu() / (self.steps * half)
        return torch.where(edges.exists, total, 0.0)

    def _measure(self, edges: Edges, half: int, sets: list[list[Tensor]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logit differences (prompt,) of clean and corrupt prompts, and (set, size, prompt) of these circuits."""
        parts = list(self._measured(edges, half, sets))
        clean, corrupt, inside = (np.concatenate(part, -1) for part in zip(*parts, strict=True))
        return clean, corrupt, inside

    def _measured(self, edges: Edges, half: int, sets: list[list[Tensor]]) -> Iterator[tuple[np.ndarray, ...]]:
        for part in minibatches(len(self.pairs.clean) - half, self.batch_size):
            rows = slice(half + part.start, half + part.stop)
            clean, _ = edges.sent(self.pairs.clean[rows])
            empty, corrupt = edges.sent(self.pairs.corrupt[rows])
            inside = [[self._circuit(edges, rows, kept, corrupt) for kept in circuits] for circuits in sets]
            ends = (self._difference(output, rows).cpu().numpy() for output in (clean, empty))
            shape = (len(sets), len(self.shares) - 1, part.stop - part.start)
            yield (*ends, np.array(inside).reshape(shape))

    def _circuit(self, edges: Edges, rows: slice, kept: Tensor, corrupt: Sent) -> np.ndarray:
        cut = edges.exists.flatten().clone()
        cut[kept] = False
        output = edges.cut(self.pairs.clean[rows], cut.reshape(edges.exists.shape), corrupt)
        return self._difference(output, rows).cpu().numpy()


def _size(shares: tuple[float, ...], faithful: np.ndarray) -> float:
    """The first share from which on the faithfulness is at least `FAITHFUL`; NaN for none."""
    enough = np.logical_and.accumulate(faithful[::-1] >= FAITHFUL)[::-1]
    return shares[int(enough.argmax())] if enough.any() else float("nan")
