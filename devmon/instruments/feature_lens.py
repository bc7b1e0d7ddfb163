"""The logit lens of latents: which tokens the directions of a dictionary write to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups
from devmon.data.rows import Rows
from devmon.errors import InstrumentError
from devmon.features.constants import TOP_TOKENS
from devmon.features.dictionary import Dictionary
from devmon.snapshot import Snapshot, derive_seed

DIRECTIONS = 256  # random ones, of the null
CHUNK = 256  # directions at once


@dataclass(frozen=True, eq=False)
class FeatureLens(ByContent):
    """What each direction of a dictionary adds to the logits: (d_j ⊙ γ) W_U less its mean (2312.06681).

    `dictionary` is of a `site` that the stream is made of: its own, or "z", whose directions go through `W_O`. γ is the
    gain of the final norm, whose scale is left out: what counts is the shape over the vocabulary. Skewness and kurtosis
    are those of the logits of one direction; a direction of a few tokens has a large kurtosis (a Gaussian one 3). The
    null are 256 random directions through the same W_U. Errors are over latents.

    - `kurtosis` (latent), 1: mean z⁴ over the vocabulary. Null: `kurtosis_reference`.
    - `skewness` (latent), 1: mean z³; above 0 where it promotes few tokens, below where it suppresses few. Null:
      `skewness_reference`.
    - `top_token` (latent, rank), token: the tokens that it promotes most.
    - `top_logit` (latent, rank), 1: what it adds there, over its standard deviation.
    - `mean_kurtosis`, 1: mean over latents. Null: `kurtosis_reference`.
    - `mean_kurtosis_se`, 1: its standard error.
    - `above`, share: latents whose kurtosis is above that of 99% of random directions. Null: .01.
    - `above_se`, share: its standard error.
    - `kurtosis_reference`, 1: mean over random directions.
    - `skewness_reference`, 1: standard deviation of the skewness of random directions.

    Pitfalls: a direct effect is not a total one; directions of early layers speak to later layers first. Cost: no pass;
    one product of the dictionary with the unembedding. Raises InstrumentError for a model whose unembedding does not
    read the stream, and for a dictionary of another width.
    """

    dictionary: Dictionary
    site: tuple[str, int]
    layout: Layout | None = None

    def cost(self) -> Cost:
        """No passes: a product of weights."""
        return Cost()

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        who = type(self).__name__
        anatomy = Anatomy.of(snapshot, self.layout, who)
        anatomy.need_sum()
        anatomy.expand(self.site)
        unembed = anatomy.W_U.detach()
        directions = self.dictionary.W_dec.to(unembed)
        if self.site[0] == "z":
            out = anatomy.W_O(self.site[1]).detach().flatten(0, 1)  # (head · d_head, d)
            directions = directions @ out if directions.shape[1] == len(out) else directions
        if directions.shape[1] != anatomy.d_model:
            raise InstrumentError(
                f"{who}: directions of {self.site} are {directions.shape[1]} wide, the stream of "
                f"{type(anatomy.model).__name__} is {anatomy.d_model}: give a dictionary of the stream, of 'z' or of "
                "what a layer adds"
            )

        # The lens of each latent, and of random directions
        gain = anatomy.final_norm.gain
        generator = torch.Generator().manual_seed(derive_seed(0, who))
        random = torch.randn(DIRECTIONS, anatomy.d_model, generator=generator).to(unembed)
        skewness, kurtosis, top, top_logit = _lens(directions * gain, unembed)
        null_skewness, null_kurtosis, _, _ = _lens(random * gain, unembed)

        rows = Rows(headline=["mean_kurtosis", "above"], error="standard error over latents")
        rows.put("kurtosis", "latent", kurtosis, None, "kurtosis of the logits of the direction", units="1")
        rows.put("skewness", "latent", skewness, None, "skewness of the logits of the direction", units="1")
        rows.put("top_token", ("latent", "rank"), top, None, "tokens that it promotes most", units="token")
        label = "what it adds there, over its standard deviation"
        rows.put("top_logit", ("latent", "rank"), top_logit, None, label, units="1")
        above = (kurtosis > np.quantile(null_kurtosis, 0.99)).astype(float)
        means = {
            "mean_kurtosis": (kurtosis, "kurtosis, mean over latents", "1", 1.0),
            "above": (above, "latents of more kurtosis than 99% of random directions", "share", 0.05),
        }
        for name, (values, label, units, change) in means.items():
            se = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
            groups = clustered_groups(values, np.ones(len(values)))
            rows.put(name, (), values.mean(), se, label, units=units, smallest_change=change, replicates=groups)
        rows.put("kurtosis_reference", (), null_kurtosis.mean(), None, "kurtosis of random directions", units="1")
        label = "spread of the skewness of random directions"
        rows.put("skewness_reference", (), null_skewness.std(), None, label, units="1")
        return rows.dataset(latent=np.arange(len(kurtosis)), rank=np.arange(top.shape[1]))


def _lens(directions: Tensor, unembed: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Skewness and kurtosis (row,) of what directions (row, d) write to the vocabulary, and top tokens (row, rank)."""
    parts = []
    for chunk in directions.split(CHUNK):
        logits = (chunk @ unembed).double()
        z = logits - logits.mean(1, keepdim=True)
        z = z / z.square().mean(1, keepdim=True).sqrt().clamp(min=1e-300)
        value, token = z.topk(min(TOP_TOKENS, z.shape[1]), dim=1)
        parts.append((z.pow(3).mean(1), z.pow(4).mean(1), token, value))
    skewness, kurtosis, token, value = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return skewness, kurtosis, token, value
