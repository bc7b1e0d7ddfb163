"""The quality of a given dictionary at a site: what it costs the model, how sparse, how much of it is used."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Layout
from devmon.cost import Cost
from devmon.data import ByContent, clustered_mean, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.features.dictionary import Dictionary
from devmon.features.probing import FEW, Probe, absorption, sparse_probing, spurious_removal, targeted_perturbation
from devmon.features.quality import Quality, put_quality, quality
from devmon.snapshot import Snapshot

LEAST_PLACES = 8  # with a feature, and without: of fewer a probe of it says nothing


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

    With `features` (feature, batch, pos), where each of some features is that others imply, such as "begins with s"
    beside the words that do, the parents of a planted hierarchy (2409.14507):

    - `absorption` (feature), share: of the places with the feature, those where none of its own latents fires and
      another latent writes it. Its own are those of the best probe of few latents, its direction that of a probe of
      the states. Null: `absorption_shuffled`.
    - `absorption_se` (feature), share: its standard error over sequences.
    - `absorption_shuffled` (feature), share: that of as many places drawn anew.
    - `absorption_silent` (feature), share: of the places with the feature, those where none of its own latents fires.

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
    features: Tensor | None = field(default=None, metadata={"identity": "if changed"})

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

        if self.features is not None:
            there = torch.as_tensor(self.features).detach().cpu().bool()
            shape = tuple(there.shape)
            counts = there[..., 1:].flatten(1).sum(1) if there.ndim == 3 else torch.zeros(1)
            most = self.tokens[:, 1:].numel() - LEAST_PLACES
            if shape[1:] != tuple(self.tokens.shape) or not ((counts >= LEAST_PLACES) & (counts <= most)).all():
                raise DataError(
                    f"DictionaryQuality: features are (feature, *{tuple(self.tokens.shape)}) of places, each there, "
                    f"and not, in {LEAST_PLACES} or more past the first; got {shape}, there in {counts.tolist()[:8]}"
                )
            object.__setattr__(self, "features", there)

    def cost(self) -> Cost:
        """A pass as it is, one spliced and two ablated."""
        return Cost(forwards=4 * len(self.tokens), positions=self.tokens.shape[1])

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        who = type(self).__name__
        found = quality(snapshot, self.dictionary, self.tokens, self.site, who, self.layout, self.batch_size)
        rows = Rows(headline=["fvu", "l0", "loss_recovered_zero"])
        put_quality(rows, found)
        coords = {} if self.labels is None else self._probed(rows, found)
        if self.features is not None:
            coords["feature"] = self._absorbed(rows, found, self.features[..., 1:].numpy())
        latents, ranks = found.top.shape
        return rows.dataset(**coords, latent=np.arange(latents), rank=np.arange(ranks))

    def _absorbed(self, rows: Rows, found: Quality, there: np.ndarray) -> np.ndarray:
        """What becomes of each feature, from where it is (feature, sequence, place): their numbers."""
        f, x = (each.flatten(0, 1).double().cpu().numpy() for each in (found.f, found.x))
        W_dec, rng = self.dictionary.W_dec.double().cpu().numpy(), np.random.default_rng(0)
        columns: dict[str, list[float]] = {name: [] for name in ("own", "se", "shuffled", "silent")}
        for own in there:
            flat = own.ravel()
            told = absorption(f, x, W_dec, Probe(x, flat).direction, flat)
            # whole sequences go into the error
            absorbed = np.zeros(len(flat))
            absorbed[flat] = told["absorbed"].values
            mean, se = clustered_mean(absorbed.reshape(own.shape).sum(1), own.sum(1))
            drawn = rng.permutation(flat)
            null = absorption(f, x, W_dec, Probe(x, drawn).direction, drawn)
            for name, value in zip(columns, (mean, se, null["full"], told["silent"]), strict=True):
                columns[name].append(np.asarray(value).item())
        error, label = "standard error over sequences", "places of a feature that another latent writes"
        rows.put("absorption", "feature", columns["own"], columns["se"], label, error=error, units="share")
        rows.put(
            "absorption_shuffled", "feature", columns["shuffled"], None, f"{label}, places drawn anew", units="share"
        )
        label = "places of a feature where none of its own latents fires"
        rows.put("absorption_silent", "feature", columns["silent"], None, label, units="share")
        return np.arange(len(there))

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
