"""Circuits: the edges that a task needs, ranked by gradients, and how faithful the circuit of the first k of them is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Layout
from devmon.anatomy.edges import Edges, Sent
from devmon.anatomy.patching import logit_difference
from devmon.cost import Cost
from devmon.data import ByContent, minibatches
from devmon.data.prompt_pairs import PromptPairs
from devmon.data.shares import NO_SIGNAL, share, signal
from devmon.errors import DataError
from devmon.snapshot import Snapshot, derive_seed

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the edges, as in MIB
ENOUGH = 0.8


@dataclass(frozen=True, eq=False)
class Circuit(ByContent):
    """How much of a logit difference the k highest-ranked edges of the model carry without the others.

    The graph is that of `devmon.anatomy.edges.Edges`: embedding, heads, MLPs; edges into queries, keys and values of
    heads, into MLPs and into the logits. `pairs` are clean and corrupt prompts (`devmon.data.prompt_pairs`); m is the
    mean logit of the answer minus that of the foil at the last place. Half of the pairs rank the edges, the other half
    measures the circuits, so that no circuit is judged by what chose it.

    Rank: the absolute value (`signed`: the value) of the integrated attribution of the edge s → r, EAP-IG (Hanna et al.
    2024, 2403.17806): mean over prompts of Σ_pos (s(clean) - s(corrupt)) · 1/n Σ_i ∂m/∂(input of r), the gradient taken
    where the embedding is corrupt + (i - ½)/n (clean - corrupt), i = 1 .. n, n = `steps`, in nats. Theirs takes i/n; the
    midpoints are closer to the integral. score(edge): of the `top` first; edge_id(edge): their numbers, which belong to
    the architecture and are those of `Edges.names`; `devmon.analysis.derive.circuit` compares them between steps.

    Circuit C_k: all edges but the first k carry what they carry for the corrupt prompt; each part computes on its own
    input, and sends on what it then has. k goes over `shares` of all edges, at least one. Over share:
    faithfulness F(k) = (m(C_k) - m(∅)) / (m(M) - m(∅)), m(M) of the clean prompt, m(∅) with every edge cut, which is the
    corrupt prompt (MIB, Mueller et al. 2504.13151): 1 for all edges; it can go over 1, and under 0; `_se` over prompts;
    faithfulness_random: the same for k random edges, the mean over `random` draws of `seed`, the null.
    area: the trapezoid area under F from 0 to 1 over the share of edges, F(0) = 0 (MIB's CPR); distance: the same under
    abs(1 - F) (MIB's CMD), 0 is perfect; area_random: of the random circuits. area has its `_se` over prompts.
    size: the smallest share measured with F >= .8 from there on up to all edges, not between those measured.
    signal = m(M) - m(∅) and m_clean, nats. All but these are NaN where the signal, of the measured half, is not above 3
    of its standard errors; size is a threshold, and jumps (read it beside area).

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
        shares = tuple(sorted({float(one) for one in self.shares} | {1.0}))
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
        sizes = [max(1, round(one * len(real))) for one in self.shares]

        sets = [[order[:size] for size in sizes[:-1]]]
        for draw in range(self.random):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "Circuit", "random", draw))
            shuffled = real[torch.randperm(len(real), generator=generator)]
            sets.append([shuffled[:size] for size in sizes[:-1]])
        clean, corrupt, inside = self._measure(edges, half, sets)
        whole = clean - corrupt
        mean, se, there = signal(whole)
        inside = np.concatenate([inside, np.broadcast_to(clean, (len(inside), 1, len(clean)))], 1)  # all edges: clean
        own = inside[0] - corrupt  # (share, prompt)
        nulls = inside[1:].mean(0) - corrupt

        dataset = xr.Dataset(
            coords={"share": np.array(self.shares), "edge": np.arange(self.top)},
            attrs={"headline": ["area", "signal"], "edges": len(real), "graph": edges.identity},
        )
        if not there:
            dataset.attrs["below_floor"] = "the signal is not above 3 of its standard errors: no faithfulness"

        def put(name: str, dims: tuple[str, ...], pair: tuple[object, object], long_name: str, **more: object) -> None:
            about = {"long_name": long_name, "units": "1", "nan": NO_SIGNAL, **more}
            dataset[name] = (dims, np.asarray(pair[0], np.float64), about)
            about = {"long_name": "standard error over prompts", "units": about["units"]}
            dataset[f"{name}_se"] = (dims, np.asarray(pair[1], np.float64), about)

        faithful, faithful_se = share(own.T, whole)
        put("faithfulness", ("share",), (faithful, faithful_se), "share of the logit difference in the circuit")
        put("faithfulness_random", ("share",), share(nulls.T, whole), "the same of random edges")
        widths = np.diff([0.0, *self.shares])

        def area(values: np.ndarray) -> np.ndarray:
            """Trapezoids over (share, ...) from nothing at 0."""
            start = np.concatenate([np.zeros_like(values[:1]), values])
            return np.tensordot(widths, (start[1:] + start[:-1]) / 2, 1)

        put("area", (), share(area(own), whole), "area under faithfulness", smallest_change=0.05)
        put("area_random", (), share(area(nulls), whole), "area under faithfulness of random edges")
        off = np.abs(1 - np.concatenate([[0.0], faithful]))
        about = {"long_name": "area under abs(1 - faithfulness)", "units": "1", "nan": NO_SIGNAL}
        dataset["distance"] = ((), float(np.dot(widths, (off[1:] + off[:-1]) / 2)), about)
        about = {"long_name": f"share of edges with faithfulness of at least {ENOUGH}", "units": "share"}
        dataset["size"] = ((), _size(self.shares, faithful), about | {"nan": NO_SIGNAL})
        about = {"long_name": "logit difference of clean minus corrupt prompts", "units": "nats"}
        dataset["signal"] = ((), mean, about | {"smallest_change": 0.2})
        dataset["signal_se"] = ((), se, {"long_name": "standard error over prompts", "units": "nats"})
        about = {"long_name": "logit difference of clean prompts", "units": "nats"}
        dataset["m_clean"] = ((), float(clean.mean()), about)
        first = order[: self.top]
        numbers, scores = np.full(self.top, -1), np.full(self.top, np.nan)
        numbers[: len(first)], scores[: len(first)] = first.numpy(), score.flatten()[first].numpy()
        about = {"long_name": "number of the edge, -1 where there are no more", "units": "1"}
        dataset["edge_id"] = ("edge", numbers, about)
        about = {"long_name": "integrated attribution of the edge", "units": "nats", "nan": "there are no more edges"}
        dataset["score"] = ("edge", scores, about)
        return dataset

    def _difference(self, output: Tensor, rows: slice) -> Tensor:
        return logit_difference(output, self.pairs.answer[rows], self.pairs.foil[rows], type(self).__name__)

    def _scores(self, edges: Edges, half: int) -> Tensor:
        """EAP-IG (sender, receiver) in float64, mean over the first `half` pairs."""
        total = torch.zeros(edges.exists.shape, dtype=torch.float64)
        for rows in minibatches(half, self.batch_size):
            (_, clean), (_, corrupt) = (edges.sent(one[rows]) for one in (self.pairs.clean, self.pairs.corrupt))
            carried = edges.differences(clean, corrupt)  # (batch, pos, sender, d)
            for step in range(self.steps):
                between = corrupt.embed + (step + 0.5) / self.steps * (clean.embed - corrupt.embed)
                slopes = edges.slopes(self.pairs.clean[rows], between, lambda out: self._difference(out, rows).sum())  # noqa: B023
                for group, slope in slopes.items():
                    found = torch.einsum("bpsd,bprd->sr", carried.double(), slope.double())
                    total[:, edges.groups[group]] += found.cpu() / (self.steps * half)
        return torch.where(edges.exists, total, 0.0)

    def _measure(self, edges: Edges, half: int, sets: list[list[Tensor]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logit differences (prompt,) of clean and corrupt prompts and (set, size, prompt) of circuits of these edges."""
        parts = list(self._measured(edges, half, sets))
        clean, corrupt, inside = (np.concatenate(part, -1) for part in zip(*parts, strict=True))
        return clean, corrupt, inside

    def _measured(self, edges: Edges, half: int, sets: list[list[Tensor]]) -> Iterator[tuple[np.ndarray, ...]]:
        for part in minibatches(len(self.pairs.clean) - half, self.batch_size):
            rows = slice(half + part.start, half + part.stop)
            clean, _ = edges.sent(self.pairs.clean[rows])
            empty, corrupt = edges.sent(self.pairs.corrupt[rows])
            inside = [[self._circuit(edges, rows, kept, corrupt) for kept in one] for one in sets]
            ends = (self._difference(output, rows).cpu().numpy() for output in (clean, empty))
            shape = (len(sets), len(self.shares) - 1, part.stop - part.start)
            yield (*ends, np.array(inside).reshape(shape))

    def _circuit(self, edges: Edges, rows: slice, kept: Tensor, corrupt: Sent) -> np.ndarray:
        cut = edges.exists.flatten().clone()
        cut[kept] = False
        output = edges.cut(self.pairs.clean[rows], cut.reshape(edges.exists.shape), corrupt)
        return self._difference(output, rows).cpu().numpy()


def _size(shares: tuple[float, ...], faithful: np.ndarray) -> float:
    """The first share from which on the faithfulness is at least `ENOUGH`; NaN for none."""
    enough = np.logical_and.accumulate(faithful[::-1] >= ENOUGH)[::-1]
    return shares[int(enough.argmax())] if enough.any() else float("nan")
