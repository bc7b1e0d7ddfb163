"""Transcoders in the place of MLPs: what the loss then is, and how much of some prompts their features explain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, clustered_mean, minibatches, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.features.dictionary import Dictionary
from devmon.features.graphs import Graph, Replaced
from devmon.features.sources import MLP_IN, site_activations
from devmon.snapshot import Snapshot, derive_seed

RIDGE = 1e-6  # of the mean square of a channel: the best linear map of fewer places than channels is not unique


@dataclass(frozen=True, eq=False)
class Transcoder(ByContent):
    """What transcoders in the place of MLPs cost in loss, and what their features explain of a set of prompts.

    `transcoders` are dictionaries by layer, {0: dictionary, …}, from what the MLP reads (the stream after its norm) to
    what it adds (Dunefsky et al. 2024, 2406.11944), all of as many latents. Half of the sequences of `tokens` (batch,
    pos) gives the mean and the linear map that they are compared with, the other half judges. First places are left
    out, and keep their MLP.

    - `fvu` (layer), share: Σ‖y - ŷ‖² / Σ‖y - ȳ‖². Null: 1 for the mean, `fvu_linear`.
    - `fvu_se` (layer), share: its standard error over sequences.
    - `fvu_linear` (layer), share: the same of the best linear map of the other half.
    - `l0` (layer), latents: that fire at a place, mean.
    - `loss_added` (layer), nats per token: loss of the next token with this MLP replaced, minus the model's. Null:
      `loss_added_mean`.
    - `loss_added_se` (layer), nats per token: its standard error over sequences.
    - `loss_added_mean` (layer), nats per token: with the MLP's mean in its place.
    - `loss_added_linear` (layer), nats per token: with the linear map in its place.
    - `replacement_loss`, nats per token: added with all of these layers replaced.
    - `replacement_loss_se`, nats per token: its standard error over sequences.

    Of each of the `prompts` (prompt, pos) a graph leads to the likeliest logits of the last place (at most ten, up to
    .95 of the probability, less the mean logit), from embeddings, latents, and errors y - ŷ by layer and place, with
    patterns and scales of norms at rest (Ameisen et al. 2025). What s adds to t is f_s d_s · ∂t/∂s; rows of absolute
    values sum to 1. The `most` latents of largest first-order effect are nodes, the others count as error.

    - `replacement`, share: of what reaches the logits from tokens and errors by paths of any length, that from tokens.
      Null: `replacement_opaque`.
    - `replacement_se`, share: its standard error over prompts.
    - `replacement_opaque`, share: the same with all latents counted as error.
    - `completeness`, share: of what enters nodes, weighted by their influence, that from no error; tokens and errors
      are nodes into which nothing enters. Null: `completeness_opaque`.
    - `completeness_se`, share: its standard error over prompts.
    - `completeness_opaque`, share: the same with all latents counted as error.
    - `of_latents`, share: `completeness` over latents and logits alone.
    - `of_latents_se`, share: its standard error over prompts.
    - `nodes`, latents: in a graph, mean.
    - `direct`, share: of what latents add to latents of later layers, in absolute values, that along the stream at
      their own place, past all heads and other transcoders; NaN with one layer.
    - `invariant`, share: R² of what latents add to latents at their place by the product of weights ⟨d_i, w_j⟩ alone,
      w behind its norm's gain; the rest is in how strongly they fire, and in heads. NaN with one layer. Null:
      `invariant_shuffled`.
    - `invariant_shuffled`, share: the same with the products dealt to other pairs.

    Graphs take attention as it is and do not explain it. Compare transcoders of equal L0 only; with an MLP's own ReLU
    neurons as latents nothing is missed. Cost: 2 + 3 · layers passes of half of `tokens`, two of all, and a pass back
    of the prompts for each of the `most` latents. Raises InstrumentError for a model whose stream is no sum or whose
    MLP reads none, and for another width, DataError for settings.
    """

    transcoders: Mapping[int, Dictionary] | tuple[tuple[int, Dictionary], ...]
    tokens: Tensor
    prompts: Tensor
    most: int = 256
    seed: int = 0
    layout: Layout | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        given = self.transcoders.items() if isinstance(self.transcoders, Mapping) else self.transcoders
        pairs = tuple(sorted(given, key=lambda item: item[0]))
        object.__setattr__(self, "transcoders", pairs)
        for name in ("tokens", "prompts"):
            object.__setattr__(self, name, probe_tokens(getattr(self, name), "Transcoder", name))
        wrong = [layer for layer, coder in pairs if not isinstance(coder, Dictionary) or coder.centred]
        widths = {coder.latents for _, coder in pairs}
        if not pairs or wrong or len(widths) > 1 or pairs[0][0] < 0:
            raise DataError(
                "Transcoder needs transcoders by layer from 0 (Dictionary(…, centred=False); across layers not), all "
                f"of as many latents; got {sorted(widths)} latents, none at {wrong}"
            )
        if len(self.tokens) < 4 or self.most < 1:
            raise DataError(
                f"Transcoder needs at least 4 sequences and most >= 1; got {len(self.tokens)} and {self.most}"
            )

    def cost(self) -> Cost:
        sequences, length = self.tokens.shape
        layers = len(self.transcoders)
        forwards = sequences + (sequences - sequences // 2) * (2 + 3 * layers)
        graphs = round(len(self.prompts) * self.prompts.shape[1] / length)
        return Cost(forwards=forwards + graphs, backwards=graphs * (self.most + 11) // 2, positions=length)

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        anatomy = Anatomy.of(snapshot, self.layout, type(self).__name__)
        replaced = Replaced(anatomy, dict(self.transcoders))
        anatomy.need_causal(self.tokens)
        rows = Rows(headline=["replacement_loss", "replacement"], error="standard error over sequences")
        self._put_losses(rows, anatomy, replaced)
        self._put_graphs(rows, replaced, replaced.graphs(self.prompts, self.most))
        return rows.dataset(layer=np.array(list(replaced.transcoders)))

    def _put_losses(self, rows: Rows, anatomy: Anatomy, replaced: Replaced) -> None:
        half = len(self.tokens) // 2
        judged = self.tokens[half:]
        instead: dict[str, dict[int, Callable[[Tensor], Tensor]]] = {"": {}, "_mean": {}, "_linear": {}}
        found: dict[str, list[Any]] = {name: [] for name in ("fvu", "fvu_se", "fvu_linear", "l0")}
        for layer, coder in replaced.transcoders.items():
            x, y = site_activations(anatomy, self.tokens, [(MLP_IN, layer)], [("mlp_out", layer)], self.batch_size)
            if (coder.inputs, coder.outputs) != (x.shape[1], y.shape[1]):
                raise InstrumentError(
                    f"Transcoder: the MLP of layer {layer} of {type(anatomy.model).__name__} reads {x.shape[1]} "
                    f"numbers and adds {y.shape[1]}, the transcoder {coder.inputs} and {coder.outputs}: give one of "
                    "this model"
                )
            # the first half fits the mean and a linear map, the second is what all three are judged on
            own, cut = coder.to(x), half * (self.tokens.shape[1] - 1)
            mean, linear = y[:cut].mean(0), _linear_map(x[:cut], y[:cut])
            instead["_mean"][layer] = partial(_constant, mean)
            instead["_linear"][layer] = linear
            instead[""][layer] = own
            x, y = x[cut:], y[cut:]
            f = own.encode(x)
            found["l0"].append(float((f > 0).double().sum(-1).mean()))
            spread = _by_sequence(y - y.mean(0), len(judged))
            value, se = clustered_mean(_by_sequence(y - own.decode(f, x), len(judged)), spread)
            found["fvu"].append(value)
            found["fvu_se"].append(se)
            found["fvu_linear"].append(clustered_mean(_by_sequence(y - linear(x), len(judged)), spread)[0])

        rows.put("fvu", "layer", found["fvu"], found["fvu_se"], "squared error over that of the mean", units="share")
        text = "the same of the best linear map"
        rows.put("fvu_linear", "layer", found["fvu_linear"], None, text, units="share")
        rows.put("l0", "layer", found["l0"], None, "latents that fire at a place", units="latents")

        # losses with the MLPs replaced, one at a time and all together
        plain = self._nats(replaced, judged, {})
        count = np.full(len(judged), judged.shape[1] - 1.0)
        unit = "nats per token"
        for name, text in (("", "its transcoder"), ("_mean", "its mean"), ("_linear", "a linear map")):
            added = np.stack([self._nats(replaced, judged, {at: way}) - plain for at, way in instead[name].items()], 1)
            value, se = clustered_mean(added, count)
            label = f"loss that an MLP replaced by {text} adds"
            rows.put(f"loss_added{name}", "layer", value, None if name else se, label, units=unit)
        together = self._nats(replaced, judged, instead[""]) - plain
        value, se = clustered_mean(together, count)
        groups = clustered_groups(together, count)
        label = "loss that all MLPs replaced by transcoders add"
        rows.put("replacement_loss", (), value, se, label, units=unit, smallest_change=0.05, replicates=groups)

    def _nats(self, replaced: Replaced, tokens: Tensor, layers: Mapping[int, Any]) -> np.ndarray:
        """The loss of the next token summed over places, (sequence,)."""
        total = []
        for rows in minibatches(len(tokens), self.batch_size):
            scores = replaced.without(tokens[rows], layers)[:, :-1]
            scores = scores if scores.dtype == torch.float64 else scores.float()
            target = tokens[rows, 1:].to(scores.device)
            nats = F.cross_entropy(scores.flatten(0, 1), target.flatten(), reduction="none")
            total.append(nats.double().view(target.shape).sum(1).cpu().numpy())
        return np.concatenate(total)

    def _put_graphs(self, rows: Rows, replaced: Replaced, graphs: list[Graph]) -> None:
        scores = [graph.scores() for graph in graphs]
        count = np.ones(len(graphs))
        for name, text in (
            ("replacement", "influence of tokens over that of tokens and errors"),
            ("completeness", "share of what enters nodes that is no error"),
            ("of_latents", "the same of latents and logits alone"),
        ):
            values = np.array([each[name] for each in scores])
            mean, se = clustered_mean(values, count)
            about: dict[str, Any] = {"units": "share", "error": "standard error over prompts"}
            if name == "replacement":
                about |= {"smallest_change": 0.05, "replicates": clustered_groups(values, count)}
            rows.put(name, (), mean, se, text, **about)
            if name != "of_latents":
                opaque = float(np.mean([each[f"opaque_{name}"] for each in scores]))
                rows.put(f"{name}_opaque", (), opaque, None, f"{text}, latents as errors", units="share")
        size = float(np.mean([len(graph.latents) for graph in graphs]))
        rows.put("nodes", (), size, None, "latents in a graph", units="latents")

        # what of the edges between latents is in the weights
        edges, direct, products = _between(replaced, self.prompts, graphs)
        none = "NaN without edges between latents at one place"
        straight = np.abs(direct).sum()
        whole = straight + np.abs(edges - direct).sum() + sum(_elsewhere(graph) for graph in graphs)
        share = straight / whole if straight else np.nan
        rows.put("direct", (), share, None, "share of edges that is along the stream", units="share", nan=none)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "Transcoder", "products"))
        dealt = products[torch.randperm(len(products), generator=generator).numpy()]
        for name, by, text in (
            ("invariant", products, "R² of edges between latents by weights alone"),
            ("invariant_shuffled", dealt, "the same with products of other pairs"),
        ):
            norm = (edges**2).sum() * (by**2).sum()
            rows.put(name, (), (edges @ by) ** 2 / norm if norm else np.nan, None, text, units="share", nan=none)


def _between(replaced: Replaced, prompts: Tensor, graphs: list[Graph]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all pairs of latents at one place, the later of a later layer: what the graph says that the earlier adds, what
    it adds along the stream, and ⟨d_i, w_j⟩ behind the gain of the norm, each (pair,)."""
    anatomy = replaced.anatomy
    layers = list(replaced.transcoders)
    sites = [(replaced.stream, layer) for layer in layers]
    _, reads = anatomy.run(prompts, sites)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [(np.zeros(0),) * 3]
    for later, layer in enumerate(layers):
        norm, state = replaced.norm(layer), reads[replaced.stream, layer]
        with torch.no_grad():
            scale = norm.scale(state)[..., 0].double().cpu().numpy()  # (prompt, pos)
        encoder = replaced.transcoders[layer].W_enc.to(state)
        for earlier in layers[:later]:
            decoder = replaced.transcoders[earlier].W_dec.to(state)
            with torch.no_grad():
                products = (norm.linear(decoder, torch.ones_like(decoder[:, :1])) @ encoder).double().cpu().numpy()
            for at, graph in enumerate(graphs):
                which, place, number = graph.latents.T
                receivers, senders = np.flatnonzero(which == later), np.flatnonzero(which == layers.index(earlier))
                r, s = np.meshgrid(receivers, senders, indexing="ij")
                r, s = r[same := place[r] == place[s]], s[same]
                product = products[number[s], number[r]]
                parts.append((graph.rows[r, graph.tokens + s], product * graph.fired[s] / scale[at, place[r]], product))
    edges, direct, whole = (np.concatenate(each) for each in zip(*parts, strict=True))
    return edges, direct, whole


def _elsewhere(graph: Graph) -> float:
    """Σ of absolute edges between latents at different places."""
    count, place = len(graph.latents), graph.latents[:, 1]
    between = np.abs(graph.rows[:count, graph.tokens : graph.tokens + count])
    return float(between[place[:, None] != place[None]].sum())


def _linear_map(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The affine map of least squares."""
    centre, mean = x.double().mean(0), y.double().mean(0)
    moved = x.double() - centre
    gram = moved.T @ moved
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, moved.T @ (y.double() - mean))
    return lambda new: ((new.double() - centre) @ weight + mean).to(new)


def _constant(mean: Tensor, x: Tensor) -> Tensor:
    return mean.to(x).expand(*x.shape[:-1], -1)


def _by_sequence(values: Tensor, sequences: int) -> np.ndarray:
    """Σ of squares of (place, d) by sequence, (sequence,)."""
    return values.double().square().sum(-1).view(sequences, -1).sum(1).cpu().numpy()
