"""A sparse autoencoder of a site, trained anew at each checkpoint, or from one reference at all of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout
from devmon.cost import Cost
from devmon.data import ByContent, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.features.dictionary import Dictionary
from devmon.features.geometry import put_geometry
from devmon.features.quality import put_quality, quality
from devmon.features.sources import BLOCK, Streamed, site_activations
from devmon.features.training import Progress, Training, train
from devmon.snapshot import Snapshot

TRAINING = Training()


@dataclass(frozen=True, eq=False)
class SparseAutoencoder(ByContent):
    """Features of a site by a dictionary that is trained on each snapshot: Bricken et al. 2023; 2406.04093; 2412.06410.

    `training` says which dictionary and how; it sees `tokens` (sequence, pos), read as they are needed, and is scored
    on `held_out` (batch, pos), as DictionaryQuality is. First places are left out. All is a function of the weights and
    of `training.seed`. Without `start` the dictionary is a fresh one, whose latents have no order from step to step:
    match them by `decoder` (devmon.analysis.feature_matches). With a `start`, a dictionary of one step, every snapshot
    is trained from it (a star, not a chain: no snapshot knows another), so latent j is the same feature at all steps
    and `density` tells when it is there (devmon.analysis.feature_births).

    - `l0`, latents: latents that fire in a place.
    - `l0_se`, latents: its standard error.
    - `fvu`, share: Σ‖x − x̂‖² / Σ‖x − x̄‖². Null: `fvu_gaussian`.
    - `fvu_se`, share: its standard error.
    - `shrinkage`, 1: Σ‖x̂‖² / Σ⟨x, x̂⟩; below 1 the reconstruction is too short.
    - `shrinkage_se`, 1: its standard error.
    - `loss`, nats per token: the model's, of the tokens after the counted places.
    - `loss_se`, nats per token: its standard error.
    - `loss_spliced`, nats per token: with the reconstruction in the place of the site's values.
    - `loss_spliced_se`, nats per token: its standard error.
    - `kl`, nats: KL(model ‖ spliced), mean over places.
    - `kl_se`, nats: its standard error.
    - `loss_recovered_zero`, share: (CE_ablated − CE_spliced) / (CE_ablated − CE), zero ablation. NaN where ablation
      costs less than 3 standard errors.
    - `loss_recovered_zero_se`, share: its standard error.
    - `loss_recovered_mean`, share: the same of mean ablation.
    - `loss_recovered_mean_se`, share: its standard error.
    - `kl_score_zero`, share: (KL_ablated − KL_spliced) / KL_ablated, zero ablation.
    - `kl_score_zero_se`, share: its standard error.
    - `kl_score_mean`, share: the same of mean ablation.
    - `kl_score_mean_se`, share: its standard error.
    - `dead`, share: latents that fire in no place of `held_out`.
    - `dense`, share: latents that fire in more than 10% of places.
    - `description_length`, bits: what tells the latents of a place (2410.11179).
    - `fvu_gaussian`, share: FVU of Gaussian states of the same mean and covariance.
    - `l0_gaussian`, latents: L0 of those.
    - `density` (latent), share: places where it fires.
    - `density_se` (latent), share: its standard error.
    - `strength` (latent), activation: its mean there. NaN where it never fires.
    - `top_place` (latent, rank), place: sequence · length + position in `held_out` of its largest activations; -1 where
      there are fewer.
    - `top_activation` (latent, rank), activation: what it is there.
    - `fvu_train`, share: FVU of the last batch of training; far below `fvu`, the tokens were learnt by heart.
    - `decoder` (latent, dimension), 1: directions, of length 1, in float16.
    - `moved` (latent), cosine: to the same latent of `start`. NaN without one.
    - `dimensionality` (latent), dimensions: 1 / Σ_j ⟨d_i, d_j⟩² among the latents that fire (2209.10652).
    - `interference` (latent), 1: Σ_j P(j fires where i does) ⟨d_i, d_j⟩².
    - `antipodal`, share: latents with another at cosine below -.7.

    `progress` is called with the step of a training, all of them, and a record of loss, FVU, L0 and dead share.

    Pitfalls: a dictionary from another seed shares a third to two thirds of its features (2501.16615): births of single
    latents without `start` are births of this seed's. In a star the features that are gone by the reference's step have
    no latent: take a second one from an early step. Compare steps at equal L0. Cost: one pass of the tokens that
    training sees, 12 · d · latents operations each for the dictionary, and four of `held_out`. Raises DataError and
    InstrumentError as `devmon.features.train` and `Streamed` do.
    """

    tokens: Tensor
    held_out: Tensor
    site: tuple[str, int]
    training: Training = TRAINING
    start: Dictionary | None = None
    layout: Layout | None = None
    batch: int = 4096
    block: int = BLOCK
    batch_size: int = 32
    progress: Progress | None = field(default=None, metadata={"identity": "never"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "SparseAutoencoder", shortest=3))
        object.__setattr__(self, "held_out", probe_tokens(self.held_out, "SparseAutoencoder", "held_out", shortest=3))
        if self.training.form != "autoencoder" or self.training.parts != 1:
            raise DataError(
                f"SparseAutoencoder: training is of an autoencoder in one part, got {self.training.form!r} in "
                f"{self.training.parts}: Transcoder takes the others"
            )

    def cost(self) -> Cost:
        """The passes that training reads, blocks of it whole, and four of the held-out tokens."""
        length = self.tokens.shape[1]
        seen = -(-self.training.steps * self.batch // (length - 1))
        held = -(-4 * self.held_out.numel() // length)
        return Cost(forwards=seen + held, positions=length)

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        who = type(self).__name__
        source = Streamed(
            snapshot.model,
            self.tokens,
            [self.site],
            batch=self.batch,
            seed=self.training.seed,
            block=self.block,
            layout=self.layout,
            batch_size=self.batch_size,
            who=who,
        )
        start = None if self.start is None else self.start.to(source(0)[0])
        dictionary, history = train(self.training, source, start=start, progress=self.progress)
        assert isinstance(dictionary, Dictionary)
        found = quality(snapshot, dictionary, self.held_out, self.site, who, self.layout, self.batch_size)

        rows = Rows(headline=["fvu", "l0", "loss_recovered_zero"])
        put_quality(rows, found)
        rows.put("fvu_train", (), history[-1]["fvu"], None, "FVU of the last batch of training", units="share")
        decoder = dictionary.W_dec.half().cpu().numpy()
        rows.put("decoder", ("latent", "dimension"), decoder, None, "directions of the latents", units="1")
        moved = np.full(dictionary.latents, np.nan)
        if start is not None:
            moved = torch.cosine_similarity(dictionary.W_dec, start.W_dec, dim=1).double().cpu().numpy()
        label = "cosine to the latent that it was trained from"
        rows.put("moved", "latent", moved, None, label, units="cosine", nan="there is no start")
        anatomy = Anatomy.of(snapshot, self.layout, who)
        states, _ = site_activations(anatomy, self.held_out, [self.site], batch_size=self.batch_size)
        with torch.no_grad():
            put_geometry(rows, dictionary.W_dec, dictionary.encode(states) > 0)
        latents, ranks = found.top.shape
        dimensions = np.arange(dictionary.outputs)
        return rows.dataset(latent=np.arange(latents), rank=np.arange(ranks), dimension=dimensions)
