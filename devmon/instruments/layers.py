"""What each layer is for: the loss without it, where that effect lies, and which layers hold like states."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.analysis.derive.representation import similarity
from devmon.anatomy import Anatomy, Layout, activations, next_token
from devmon.anatomy.patching import Starts
from devmon.anatomy.sites import Site, Write
from devmon.cost import DRAWN, GPT2_SMALL, Cost, Shape
from devmon.data import ByContent, clustered_groups, clustered_mean, minibatches, probe_tokens
from devmon.data.rows import Rows
from devmon.data.shares import NO_SIGNAL, share, share_groups
from devmon.errors import DataError
from devmon.snapshot import Snapshot, derive_seed

PARTS = {"attention": ("attn_out",), "mlp": ("mlp_out",), "layer": ("attn_out", "mlp_out")}
JACKKNIFE = 16  # groups of sequences


@dataclass(frozen=True, eq=False)
class LayerRoles(ByContent):
    """The loss on `tokens` (batch, pos) when one layer writes nothing, and the likeness of the states of all layers.

    A part is dropped by replacing what it adds to the residual stream with zeros; its effect s is the loss without it
    minus the loss. The centre of a part is Σ_ℓ ℓ s_ℓ / Σ_ℓ s_ℓ, in layers from 0: layers without which the loss is
    lower count negative, so the centre can lie outside. Likeness is debiased linear CKA
    (`devmon.analysis.derive.representation.similarity`) of the states after `depth` layers, 0 the embedding, at up to
    `places` positions: the same positions of every sequence, never the first, where states differ in size. `_se` are
    over sequences, paired; of the CKA by the jackknife over groups of sequences.

    - `drop_attention` (layer), nats per token: loss without the layer's attention, minus loss. Null: `drop_random`.
    - `drop_attention_se` (layer), nats per token: its standard error.
    - `drop_mlp` (layer), nats per token: loss without the layer's MLP, minus loss; left out of models without MLPs.
      Null: `drop_random`.
    - `drop_mlp_se` (layer), nats per token: its standard error.
    - `drop_layer` (layer), nats per token: loss without both, minus loss. Null: `drop_random`.
    - `drop_layer_se` (layer), nats per token: its standard error.
    - `drop_random` (layer), nats per token: loss with a random vector added to the layer's output, as long as what the
      layer adds there, minus loss: a layer that does nothing special is missed less than that noise is felt.
    - `drop_random_se` (layer), nats per token: its standard error.
    - `centre_attention`, layers: the centre of `drop_attention`; NaN where Σ_ℓ s_ℓ is not above 3 of its standard
      errors. Null: `centre_uniform`.
    - `centre_attention_se`, layers: its standard error.
    - `centre_mlp`, layers: the centre of `drop_mlp`, NaN likewise. Null: `centre_uniform`.
    - `centre_mlp_se`, layers: its standard error.
    - `centre_layer`, layers: the centre of `drop_layer`, NaN likewise. Null: `centre_uniform`.
    - `centre_layer_se`, layers: its standard error.
    - `centre_uniform`, layers: the centre of equal layers, (L - 1) / 2.
    - `cka` (depth, depth_other), cosine: likeness of the states, in [-1, 1]; 1: the same up to rotation, shift and
      scale; about 0: unrelated, however many dimensions (the plain CKA goes to 1 there). NaN for states that are all
      alike.
    - `cka_se` (depth, depth_other), cosine: its standard error.
    - `cka_p` (depth, depth_other), probability: p-value over `permutations` exchanges of sequences: what two layers
      share by position alone counts as null.

    Pitfalls: zeros are not what later layers are used to, so a drop holds the shock as well as the part's work; an
    effect that other layers make up for (2307.15771) is not seen; linear CKA is dominated by the largest directions.
    Raises DataError for fewer than 4 sequences or too few positions, InstrumentError for encoders and post-norm models,
    which have no next token to lose or whose stream no layer can leave alone.
    """

    tokens: Tensor
    layout: Layout | None = None
    places: int = 256
    permutations: int = 99
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "LayerRoles"))
        sequences, each = self._items()
        left = sequences - -(-sequences // min(sequences, JACKKNIFE))  # without the largest group
        if sequences < 4 or left * each < 8 or self.permutations < 1:
            raise DataError(
                f"LayerRoles needs 4 sequences or more, with 8 places apart from any group of the jackknife, and one "
                f"permutation; got {len(self.tokens)} sequences of {self.tokens.shape[1]}, places={self.places}, "
                f"permutations={self.permutations}: give more tokens, or raise places"
            )

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        """One pass, and four a layer that start there, or at the next: half of a pass and its unembedding."""
        (sequences, positions), layers = self.tokens.shape, shape.layers
        places, passes = sequences * positions, 1 + 4 * layers
        # of L layers the passes run L, L - 1, … for a part, L - 1, L - 2, … for the layer and for the noise
        run = layers * (layers + 1) + layers * (layers - 1)
        drawn = layers * places * shape.d_model
        return Cost(
            sequences,
            positions=positions,
            products=passes * places,
            softmaxes=passes * places,
            operations=run / layers * places * shape.weights + DRAWN * drawn / 2,
        )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        who = type(self).__name__
        anatomy = Anatomy.of(snapshot, self.layout, who)
        anatomy.need_sum()
        sites: tuple[Site, ...] = (("resid_pre", 0), "resid_post")
        _, reads = activations(snapshot, self.tokens, sites, who, self.layout, self.batch_size)
        stream = torch.stack([reads["resid_pre", 0], *reads.stack("resid_post")])
        starts = Starts(anatomy, self.tokens)
        plain = self._loss(starts, anatomy.layers, stream[-1], {})
        parts = [part for part in PARTS if part != "mlp" or anatomy.has_mlp]
        effects: dict[str, list[np.ndarray]] = {part: [] for part in (*parts, "random")}
        silent = starts.works and self._silent(anatomy)
        for layer in range(anatomy.layers):
            before, after = stream[layer], stream[layer + 1]
            for part in parts:
                writes: dict[Site, Write] = {(site, layer): torch.zeros_like for site in self._written(anatomy, part)}
                # a layer that writes nothing hands on what it was given, so it need not run
                skipped = part == "layer" and silent
                dropped = self._loss(starts, layer + skipped, before, {} if skipped else writes)
                effects[part].append(dropped - plain)
            effects["random"].append(self._loss(starts, layer + 1, after, {}, before) - plain)
        drops = {part: np.stack(each, 1) for part, each in effects.items()}  # sums (sequence, layer)
        return _dataset(drops, plain, self.tokens.shape[1] - 1, *self._likeness(stream))

    def _written(self, anatomy: Anatomy, part: str) -> list[str]:
        return [site for site in PARTS[part] if site == "attn_out" or anatomy.has_mlp]

    def _silent(self, anatomy: Anatomy) -> bool:
        """Whether the stream leaves layers as it entered them, bit for bit, where their parts write nothing."""
        writes: dict[Site, Write] = dict.fromkeys(self._written(anatomy, "layer"), torch.zeros_like)
        _, reads = anatomy.run(self.tokens[:1], ["resid_pre", "resid_post"], writes, last=True)
        return all(
            torch.equal(reads["resid_pre", layer], reads["resid_post", layer]) for layer in range(anatomy.layers)
        )

    def _loss(
        self, starts: Starts, layer: int, state: Tensor, writes: dict[Site, Write], moved: Tensor | None = None
    ) -> np.ndarray:
        """Nats summed over places, (sequence,), of passes from `layer` on, which `state` enters, with some sites
        written, or with noise in that state as large as the step to it from the state `moved`."""
        nats, anatomy = [], starts.anatomy
        for rows in minibatches(len(self.tokens), self.batch_size):
            enters = state[rows]
            if moved is not None:
                noise = self._noise(moved[rows], enters, rows, layer - 1)
                enters, writes = enters + noise, {("resid_post", layer - 1): partial(torch.add, noise)}
                writes = {} if starts.works else writes
            with starts.at(layer, enters), anatomy.tapped((), writes):
                nats.append(next_token(anatomy.model, self.tokens[rows], type(self).__name__, check=False)[0].sum(1))
        return torch.cat(nats).numpy()

    def _noise(self, before: Tensor, after: Tensor, rows: slice, layer: int) -> Tensor:
        """Random directions, as long as what the layer adds at each place; drawn sequence by sequence."""
        drawn = []
        for sequence in range(rows.start, rows.stop):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "LayerRoles", layer, sequence))
            drawn.append(torch.randn(before.shape[1:], generator=generator))
        noise = torch.stack(drawn).to(before)
        return noise / noise.norm(dim=-1, keepdim=True) * (after - before).norm(dim=-1, keepdim=True)

    def _items(self) -> tuple[int, int]:
        """How many sequences are compared, at how many places each."""
        sequences = min(len(self.tokens), self.places)
        return sequences, min(max(self.places // max(sequences, 1), 1), self.tokens.shape[1] - 1)

    def _likeness(self, stream: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """CKA, its standard error and p-value, each (depth, depth)."""
        # the same positions of every sequence, never the first
        seed = derive_seed(self.seed, "LayerRoles", "places")
        sequences, each = self._items()
        chosen = np.sort(1 + np.random.default_rng(seed).permutation(self.tokens.shape[1] - 1)[:each])
        states = stream[:, :sequences, torch.from_numpy(chosen)].flatten(1, 2).double().cpu().numpy()
        sequence = np.repeat(np.arange(sequences), each)
        sketch = xr.Dataset(
            {"sketch": (("step", "layer", "item", "feature"), states[None])},
            coords={"step": [0], "layer": np.arange(len(states)), "sequence": ("item", sequence)},
        )
        alike = similarity(sketch, "layers", permutations=self.permutations, seed=seed).isel(step=0)

        # the jackknife leaves out groups of whole sequences, whose positions are not independent
        groups = np.array_split(np.arange(sequences), min(sequences, JACKKNIFE))
        kept = (sketch.isel(item=~np.isin(sequence, group)) for group in groups)
        without = np.stack([similarity(rest, "layers")["cka"].values[0] for rest in kept])
        return alike["cka"].values, np.sqrt((len(without) - 1) * without.var(0)), alike["p"].values


LABELS = {
    "drop_attention": "loss without the layer's attention, minus loss",
    "drop_mlp": "loss without the layer's MLP, minus loss",
    "drop_layer": "loss without the layer, minus loss",
    "drop_random": "loss with noise as large as what the layer adds, minus loss",
}


def _dataset(
    drops: dict[str, np.ndarray], plain: np.ndarray, places: int, cka: np.ndarray, cka_se: np.ndarray, p: np.ndarray
) -> xr.Dataset:
    layer, depth, count = np.arange(drops["layer"].shape[1]), np.arange(len(cka)), np.full(len(plain), places)
    rows = Rows(headline=["drop_layer", "centre_layer"])

    # what dropping a part costs, and which layer is at the centre of that
    for part, sums in drops.items():
        mean, se = clustered_mean(sums, count)
        name, change = f"drop_{part}", 0.05 if part == "layer" else None
        about: dict[str, Any] = {"units": "nats per token", "smallest_change": change}
        rows.put(name, "layer", mean, se, LABELS[name], **about, replicates=clustered_groups(sums, count))
        if part != "random":
            centre, se = share(sums @ layer, sums.sum(1))
            label, change = f"layer at the centre of what dropping {part} does", 0.25 if part == "layer" else None
            about = {"units": "layers", "nan": NO_SIGNAL, "smallest_change": change}
            about["replicates"] = share_groups(sums @ layer, sums.sum(1))
            rows.put(f"centre_{part}", (), float(centre), float(se), label, **about)
    rows.put("centre_uniform", (), (len(layer) - 1) / 2, None, "centre of equal layers", units="layers")

    # how alike the states of the layers are
    both, error = ("depth", "depth_other"), "standard error by the jackknife"
    rows.put("cka", both, cka, cka_se, "debiased linear CKA of the states", units="cosine", error=error)
    rows.put("cka_p", both, p, None, "p-value under exchange of sequences", units="probability")
    return rows.dataset(layer=layer, depth=depth, depth_other=depth)
