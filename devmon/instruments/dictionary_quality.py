"""The quality of a given dictionary at a site: what it costs the model, how sparse, how much of it is used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Layout
from devmon.cost import Cost
from devmon.data import ByContent, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.features.dictionary import Dictionary
from devmon.features.probing import FEW, sparse_probing, spurious_removal, targeted_perturbation
from devmon.features.quality import Quality, put_quality, quality
from devmon.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class DictionaryQuality(ByContent):
    """How well one dictionary describes a site of each checkpoint (2406.04093; SAEBench, 2503.09532).

    `dictionary` is an autoencoder of `site`, such as ("mlp_out", 3), trained at some step or read from a file
    (`devmon.features.load_dictionary`); `tokens` (batch, pos) are held out. First places are left out, whose state is
    an outlier: they are neither counted nor replaced. Errors are over sequences. "Spliced" is the model with the
    reconstruction in the place of the site's values, zero and mean ablation the model with 0 or their mean there.

    - `l0`, latents: latents that fire in a place.
    - `l0_se`, latents: its standard error.
    - `fvu`, share: Σ‖x − x̂‖² / Σ‖x − x̄‖², x̄ the mean over all places; 1 for the mean, 0 for x itself. Null:
      `fvu_gaussian`.
    - `fvu_se`, share: its standard error.
    - `shrinkage`, 1: Σ‖x̂‖² / Σ⟨x, x̂⟩; below 1 the reconstruction is too short.
    - `shrinkage_se`, 1: its standard error.
    - `loss`, nats per token: the model's, of the tokens after the counted places.
    - `loss_se`, nats per token: its standard error.
    - `loss_spliced`, nats per token: that of the spliced model.
    - `loss_spliced_se`, nats per token: its standard error.
    - `kl`, nats: KL(model ‖ spliced), mean over places.
    - `kl_se`, nats: its standard error.
    - `loss_recovered_zero`, share: (CE_ablated − CE_spliced) / (CE_ablated − CE), zero ablation, as SAELens and
      SAEBench have it. NaN where ablation costs less than 3 standard errors.
    - `loss_recovered_zero_se`, share: its standard error.
    - `loss_recovered_mean`, share: the same of mean ablation.
    - `loss_recovered_mean_se`, share: its standard error.
    - `kl_score_zero`, share: (KL_ablated − KL_spliced) / KL_ablated, zero ablation.
    - `kl_score_zero_se`, share: its standard error.
    - `kl_score_mean`, share: the same of mean ablation.
    - `kl_score_mean_se`, share: its standard error.
    - `dead`, share: latents that fire in no place.
    - `dense`, share: latents that fire in more than 10% of places.
    - `description_length`, bits: Σ_j H₂(p_j) + p_j H(bins of f_j), of the coarsest bins that move 1% of the variance at
      most (2410.11179).
    - `fvu_gaussian`, share: FVU of Gaussian states of the same mean and covariance.
    - `l0_gaussian`, latents: L0 of those.
    - `density` (latent), share: places where it fires.
    - `density_se` (latent), share: its standard error.
    - `strength` (latent), activation: its mean there. NaN where it never fires.
    - `top_place` (latent, rank), place: sequence · length + position in `tokens` of its largest activations; -1 where
      there are fewer.
    - `top_activation` (latent, rank), activation: what it is there.

    With `labels` (batch,) of the sequences, of two classes or more, and `spurious` (batch,), a second binary label:

    - `probe` (few), share: accuracy of probes of 1, 2 and 5 latents, mean over classes (2503.09532). Nulls:
      `probe_channels`, `probe_shuffled`.
    - `probe_se` (few), share: its standard error over test sequences.
    - `probe_channels` (few), share: that of as many coordinates of the site.
    - `probe_shuffled` (few), share: that of the latents for labels drawn anew.
    - `probe_full`, share: that of all coordinates of the site: the ceiling.
    - `perturbation` (erased), share: drop of the probe of a class where its latents are erased, less that of the others
      (TPP). Null: `perturbation_random`.
    - `perturbation_random` (erased), share: where random living latents are.
    - `removal` (erased), share: how much of what a probe lost by learning `spurious` comes back where the latents of
      that are erased (SCR). Null: `removal_random`.
    - `removal_random` (erased), share: where random living latents are.

    Pitfalls: compare FVU at equal L0 alone. A dictionary of a later step is worse before, for features that are not
    there yet and for directions that moved: SparseAutoencoder with `start` tells the two apart. Cost: four passes of
    the model. Raises InstrumentError for a site that the model lacks, or of another width than the dictionary.
    """

    tokens: Tensor
    dictionary: Dictionary
    site: tuple[str, int]
    labels: Tensor | None = None
    spurious: Tensor | None = None
    layout: Layout | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "DictionaryQuality", shortest=3))
        for name in ("labels", "spurious"):
            given = getattr(self, name)
            if given is not None:
                labels = torch.as_tensor(given).detach().cpu()
                if tuple(labels.shape) != (len(self.tokens),) or labels.is_floating_point():
                    raise DataError(
                        f"DictionaryQuality: {name} are integers, one for each of {len(self.tokens)} sequences; got "
                        f"{tuple(labels.shape)} of {labels.dtype}"
                    )
                object.__setattr__(self, name, labels.clone())
        if self.spurious is not None and (self.labels is None or len(self.labels.unique()) != 2):
            raise DataError("DictionaryQuality: spurious goes with labels of two classes: give those too")

    def cost(self) -> Cost:
        """A pass as it is, one spliced and two ablated."""
        return Cost(forwards=4 * len(self.tokens), positions=self.tokens.shape[1])

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        who = type(self).__name__
        found = quality(snapshot, self.dictionary, self.tokens, self.site, who, self.layout, self.batch_size)
        rows = Rows(headline=["fvu", "l0", "loss_recovered_zero"])
        put_quality(rows, found)
        coords = {} if self.labels is None else self._probed(rows, found)
        latents, ranks = found.top.shape
        return rows.dataset(**coords, latent=np.arange(latents), rank=np.arange(ranks))

    def _probed(self, rows: Rows, found: Quality) -> dict[str, np.ndarray]:
        """What labels say of the latents, from means over the places of a sequence."""
        assert self.labels is not None
        f, x, label = found.mean_f, found.mean_state, self.labels.numpy()
        W_dec = self.dictionary.W_dec.double().cpu().numpy()
        probes = sparse_probing(f, x, label)
        unit, error = "share", "standard error over test sequences"
        values = {name: probes[name].values for name in map(str, probes.data_vars)}
        label_of_probe = "accuracy of few latents"
        rows.put("probe", "few", values["accuracy"], values["accuracy_se"], label_of_probe, error=error, units=unit)
        for name, text in (("channels", "as many coordinates"), ("shuffled", "few latents for labels drawn anew")):
            rows.put(f"probe_{name}", "few", values[f"accuracy_{name}"], None, f"accuracy of {text}", units=unit)
        rows.put("probe_full", (), float(probes["accuracy_full"]), None, "accuracy of all coordinates", units="share")
        erased = [("perturbation", "targeted perturbation", targeted_perturbation(f, x, W_dec, label))]
        if self.spurious is not None:
            mended = spurious_removal(f, x, W_dec, label, self.spurious.numpy())
            erased.append(("removal", "removal of the spurious label", mended))
        for name, text, scores in erased:
            rows.put(name, "erased", scores["score"].values, None, text, units="share")
            label_of_null = f"{text} by random latents"
            rows.put(f"{name}_random", "erased", scores["score_random"].values, None, label_of_null, units="share")
        return {"few": np.array(FEW), "erased": erased[0][2]["erased"].values}
