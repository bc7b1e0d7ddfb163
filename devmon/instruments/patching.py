"""Activation patching: which parts carry the difference between two prompts, and how real the patched states are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout, Reads, activations
from devmon.anatomy.edges import Edges
from devmon.anatomy.patching import Index, logit_difference, run_patched, slopes
from devmon.cost import Cost
from devmon.data import ByContent, minibatches
from devmon.data.prompt_pairs import PromptPairs
from devmon.data.shares import NO_SIGNAL, share, signal
from devmon.errors import DataError
from devmon.snapshot import Snapshot

Path = tuple[int, int, Literal["q", "k", "v"], int, int]
KINDS = {
    "resid": (("layer", "pos"), "the stream before the layer, at the place"),
    "z": (("layer", "head"), "the head, at all places"),
    "mlp": (("layer",), "the MLP, at all places"),
}
SITE = {"resid": "resid_pre", "z": "z", "mlp": "mlp_out"}


@dataclass(frozen=True, eq=False)
class ActivationPatching(ByContent):
    """How much of a logit difference one site restores, or breaks, when it holds what it holds for another prompt.

    `pairs` are clean and corrupt prompts with an answer and a foil (`devmon.data.prompt_pairs`); LD is the logit of the
    answer minus that of the foil at the last position, signal = mean LD(clean) - mean LD(corrupt), all in nats. Sites
    are resid (layer, pos): the stream before the layer at one position; z (layer, head): what a head writes, at all
    positions; mlp (layer): what an MLP adds, at all positions (not for models without). Of each site

        restored = (LD(corrupt, site from clean) - LD(corrupt)) / signal                                  denoising
        broken = (LD(clean) - LD(clean, site from corrupt)) / signal                                      noising

    restored is 1 if the site is all it takes; broken is 1 if nothing else can make up for it (one minus R =
    (LD_patched - LD_corrupt) / (LD_clean - LD_corrupt) of Heimersheim & Nanda 2404.15255; Zhang & Nanda 2309.16042):
    where parts are redundant little breaks and much restores, where they are in series much breaks. Their null is
    restored_resample, the clean state of *another* prompt: what a state of no particular content does. The attributions
    are Σ (clean - corrupt) · slope of LD at the corrupt, or the clean prompt, over signal: attribution patching (Nanda
    2023; Kramár et al. 2403.00745), the first order of the two, exact where LD is linear in the site and poor behind
    saturated attention and norms. They screen: of each kind only the `exact` sites with the largest attribution, of
    either sort, are patched; others are NaN. Shares are NaN where the signal is not above 3 of its standard errors;
    `_se` are over prompts.

    `paths` are (layer, head, "q" | "k" | "v", layer, head), from a head to the queries, keys or values of a later head
    (with grouped attention keys and values are counted by their own heads): path patching (Wang et al. 2211.00593),
    directly, not through MLPs between.

    Realism gauge, for the restoring patches: the stream after the patched layer at the last position is compared with
    that of clean prompts, by its norm and by the mean share of clean prompts that are nearer to the clean mean in
    Mahalanobis distance (Ledoit-Wolf correlations from half of the prompts, all compared are of the other half): .5 for
    states like clean ones, near 1 for states off their distribution. It is rough with fewer prompts than dimensions.

    - `signal`, nats: mean LD(clean) - mean LD(corrupt). Null: 0.
    - `signal_se`, nats: its standard error.
    - `clean`, nats: mean LD of the clean prompts.
    - `corrupt`, nats: mean LD of the corrupt prompts.
    - `corrupt_quantile` (layer), share: mean Mahalanobis quantile of unpatched corrupt prompts among clean ones. Null:
      0.5.
    - `resid_restored` (layer, pos), share: restored by the stream before the layer at one position. Null:
      `resid_restored_resample`.
    - `resid_restored_se` (layer, pos), share: its standard error.
    - `resid_broken` (layer, pos), share: broken by the stream before the layer at one position. Null: 0.
    - `resid_broken_se` (layer, pos), share: its standard error.
    - `resid_restored_resample` (layer, pos), share: restored by the stream before the layer at one position, from
      another clean prompt.
    - `resid_restored_resample_se` (layer, pos), share: its standard error.
    - `resid_restored_attribution` (layer, pos), share: resid_restored to first order, of every site.
    - `resid_restored_attribution_se` (layer, pos), share: its standard error.
    - `resid_broken_attribution` (layer, pos), share: resid_broken to first order, of every site.
    - `resid_broken_attribution_se` (layer, pos), share: its standard error.
    - `resid_norm_ratio` (layer, pos), 1: mean norm of the stream after the restoring patch, over that of clean prompts.
      Null: 1.
    - `resid_quantile` (layer, pos), 1: its mean Mahalanobis quantile among clean prompts. Null: 0.5.
    - `z_restored` (layer, head), share: restored by what a head writes. Null: `z_restored_resample`.
    - `z_restored_se` (layer, head), share: its standard error.
    - `z_broken` (layer, head), share: broken by what a head writes. Null: 0.
    - `z_broken_se` (layer, head), share: its standard error.
    - `z_restored_resample` (layer, head), share: restored by what a head writes, from another clean prompt.
    - `z_restored_resample_se` (layer, head), share: its standard error.
    - `z_restored_attribution` (layer, head), share: z_restored to first order, of every site.
    - `z_restored_attribution_se` (layer, head), share: its standard error.
    - `z_broken_attribution` (layer, head), share: z_broken to first order, of every site.
    - `z_broken_attribution_se` (layer, head), share: its standard error.
    - `z_norm_ratio` (layer, head), 1: mean norm of the stream after the restoring patch, over that of clean prompts.
      Null: 1.
    - `z_quantile` (layer, head), 1: its mean Mahalanobis quantile among clean prompts. Null: 0.5.
    - `mlp_restored` (layer), share: restored by what an MLP adds. Null: `mlp_restored_resample`.
    - `mlp_restored_se` (layer), share: its standard error.
    - `mlp_broken` (layer), share: broken by what an MLP adds. Null: 0.
    - `mlp_broken_se` (layer), share: its standard error.
    - `mlp_restored_resample` (layer), share: restored by what an MLP adds, from another clean prompt.
    - `mlp_restored_resample_se` (layer), share: its standard error.
    - `mlp_restored_attribution` (layer), share: mlp_restored to first order, of every site.
    - `mlp_restored_attribution_se` (layer), share: its standard error.
    - `mlp_broken_attribution` (layer), share: mlp_broken to first order, of every site.
    - `mlp_broken_attribution_se` (layer), share: its standard error.
    - `mlp_norm_ratio` (layer), 1: mean norm of the stream after the restoring patch, over that of clean prompts. Null:
      1.
    - `mlp_quantile` (layer), 1: its mean Mahalanobis quantile among clean prompts. Null: 0.5.
    - `path_restored` (path), share: restored where that one input alone receives what the head says for the clean
      prompt. Null: 0.
    - `path_restored_se` (path), share: its standard error.

    Cost: at most 3 passes of all prompts for each of `exact` sites of a kind, 1 for each path, 5 more, 2 of them back.
    Raises InstrumentError for models whose parts are not known or whose vocabulary is too small, DataError for
    settings.
    """

    pairs: PromptPairs
    exact: int = 16
    paths: tuple[Path, ...] = ()
    layout: Layout | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.exact < 0 or len(self.pairs.clean) < 6:
            raise DataError(
                f"ActivationPatching needs exact >= 0 and at least 6 pairs, got {self.exact} and {len(self.pairs.clean)}"
            )
        if any(part not in ("q", "k", "v") for _, _, part, _, _ in self.paths):
            raise DataError(f'ActivationPatching needs paths (layer, head, "q", layer, head), got {self.paths}')

    def cost(self) -> Cost:
        count, length = self.pairs.clean.shape
        passes = 4 + 9 * self.exact + (1 + len(self.paths) if self.paths else 0)
        return Cost(forwards=passes * count, backwards=2 * count, positions=length)

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        who, pairs = type(self).__name__, self.pairs
        anatomy = Anatomy(snapshot.model, self.layout, who)
        kinds = [kind for kind in KINDS if kind != "mlp" or anatomy.layout.neurons]
        sites = [*(SITE[kind] for kind in kinds), "resid_post"]
        (clean_output, clean), (corrupt_output, corrupt) = (
            activations(snapshot, tokens, sites, who, self.layout, self.batch_size)
            for tokens in (pairs.clean, pairs.corrupt)
        )
        ends = [self._difference(output) for output in (clean_output, corrupt_output)]
        whole = ends[0] - ends[1]
        mean, se, there = signal(whole)
        dataset = xr.Dataset(
            coords={
                "layer": np.arange(anatomy.layers),
                "pos": np.arange(pairs.clean.shape[1]),
                "head": np.arange(anatomy.heads),
            },
            attrs={"headline": ["signal", "z_restored"]},
        )
        if not there:
            dataset.attrs["below_floor"] = "the signal is not above 3 of its standard errors: no shares of it"
        about = {
            "units": "nats",
            "long_name": "logit difference of clean minus corrupt prompts",
            "smallest_change": 0.2,
        }
        dataset["signal"] = ((), mean, about)
        dataset["signal_se"] = ((), se, {"units": "nats", "long_name": "standard error over prompts"})
        for name, values in (("clean", ends[0]), ("corrupt", ends[1])):
            about = {"units": "nats", "long_name": f"logit difference of {name} prompts"}
            dataset[name] = ((), float(values.mean()), about)
        gauge = _Gauge.fit(clean)
        quantiles = [gauge(layer, corrupt["resid_post", layer][:, -1])[1] for layer in range(anatomy.layers)]
        about = {"units": "share", "long_name": "Mahalanobis quantile of corrupt prompts among clean ones"}
        dataset["corrupt_quantile"] = ("layer", np.array(quantiles), about)
        steep = [
            self._slopes(anatomy, tokens, [SITE[kind] for kind in kinds]) for tokens in (pairs.corrupt, pairs.clean)
        ]
        for kind in kinds:
            self._patch(dataset, kind, anatomy, clean, corrupt, ends, steep, gauge)
        if self.paths:
            self._follow(dataset, snapshot, ends)
        return dataset

    def _difference(self, output: Tensor, rows: slice = slice(None)) -> np.ndarray:
        answer, foil = self.pairs.answer[rows], self.pairs.foil[rows]
        return logit_difference(output, answer, foil, type(self).__name__).detach().cpu().numpy()

    def _rows(self) -> Iterator[slice]:
        return minibatches(len(self.pairs.clean), self.batch_size)

    def _slopes(self, anatomy: Anatomy, tokens: Tensor, sites: list[str]) -> dict[tuple[str, int], Tensor]:
        parts = [
            slopes(anatomy, tokens[rows], self.pairs.answer[rows], self.pairs.foil[rows], sites)
            for rows in self._rows()
        ]
        return {site: torch.cat([part[site] for part in parts]) for site in parts[0]}

    def _patch(
        self,
        dataset: xr.Dataset,
        kind: str,
        anatomy: Anatomy,
        clean: Reads,
        corrupt: Reads,
        ends: list[np.ndarray],
        steep: list[dict[tuple[str, int], Tensor]],
        gauge: _Gauge,
    ) -> None:
        """Adds the variables of one kind of site."""
        pairs, whole = self.pairs, ends[0] - ends[1]
        dims, what = KINDS[kind]
        shape = tuple(dataset.sizes[dim] for dim in dims)

        def attributed(slope: dict[tuple[str, int], Tensor]) -> np.ndarray:
            """Σ (clean - corrupt) · slope, (batch, *shape)."""
            layers = []
            for layer in range(anatomy.layers):
                site = (SITE[kind], layer)
                product = ((clean[site] - corrupt[site]).double() * slope[site].double()).sum(-1)
                layers.append(product if kind == "resid" else product.sum(1))  # (batch, pos), (batch, head) or (batch,)
            return torch.stack(layers, 1).cpu().numpy()

        guesses = {"restored": attributed(steep[0]), "broken": attributed(steep[1])}
        size = np.maximum(*(np.abs(values.mean(0)) for values in guesses.values()))
        chosen = [np.unravel_index(i, shape) for i in np.argsort(-size.ravel(), kind="stable")[: self.exact]]
        found = {name: np.full((len(whole), *shape), np.nan) for name in ("restored", "broken", "restored_resample")}
        real = {name: np.full(shape, np.nan) for name in ("norm_ratio", "quantile")}
        for at in chosen:
            site = (SITE[kind], int(at[0]))
            index: Index = (slice(None), int(at[1])) if kind == "resid" else (...,)
            index = (slice(None), slice(None), int(at[1])) if kind == "z" else index
            after = ("resid_post", int(at[0]))
            one, state = self._run(anatomy, pairs.corrupt, site, index, clean[site], after)
            found["restored"][(slice(None), *at)] = one - ends[1]
            real["norm_ratio"][at], real["quantile"][at] = gauge(int(at[0]), state)
            found["broken"][(slice(None), *at)] = (
                ends[0] - self._run(anatomy, pairs.clean, site, index, corrupt[site], after)[0]
            )
            found["restored_resample"][(slice(None), *at)] = (
                self._run(anatomy, pairs.corrupt, site, index, clean[site].roll(1, 0), after)[0] - ends[1]
            )
        screened = f"{NO_SIGNAL}; NaN where attribution patching screened the site out"
        names = {
            "restored": f"share of the signal restored by {what}, from the clean prompt",
            "broken": f"share of the signal broken by {what}, from the corrupt prompt",
            "restored_resample": f"share of the signal restored by {what}, from another clean prompt",
        }
        for name, long_name in names.items():
            mean, se = share(found[name], whole)
            about = {"long_name": long_name, "units": "share", "nan": screened}
            dataset[f"{kind}_{name}"] = (dims, mean, about | ({"smallest_change": 0.1} if name == "restored" else {}))
            dataset[f"{kind}_{name}_se"] = (dims, se, {"long_name": "standard error over prompts", "units": "share"})
        for name, values in guesses.items():
            mean, se = share(values, whole)
            about = {"long_name": f"{names[name]}, to first order", "units": "share", "nan": NO_SIGNAL}
            dataset[f"{kind}_{name}_attribution"] = (dims, mean, about)
            about = {"long_name": "standard error over prompts", "units": "share"}
            dataset[f"{kind}_{name}_attribution_se"] = (dims, se, about)
        for name, long_name in (("norm_ratio", "norm"), ("quantile", "Mahalanobis quantile among clean prompts")):
            about = {"long_name": f"{long_name} of the stream after the patch", "units": "1", "nan": "screened out"}
            dataset[f"{kind}_{name}"] = (dims, real[name], about)

    def _run(
        self,
        anatomy: Anatomy,
        tokens: Tensor,
        site: tuple[str, int],
        index: Index,
        source: Tensor,
        after: tuple[str, int],
    ) -> tuple[np.ndarray, Tensor]:
        """LD (batch,), and the stream (batch, d) at the last place after a layer, with the site patched."""
        differences, states = [], []
        for rows in self._rows():
            output, reads = run_patched(anatomy, tokens[rows], [(site, index, source[rows])], [after])
            differences.append(self._difference(output, rows))
            states.append(reads[after][:, -1])
        return np.concatenate(differences), torch.cat(states)

    def _follow(self, dataset: xr.Dataset, snapshot: Snapshot, ends: list[np.ndarray]) -> None:
        """Adds the paths: all that is read is of the corrupt prompt but for one edge."""
        edges = Edges(snapshot.model, self.layout, type(self).__name__)
        found = np.zeros((len(ends[0]), len(self.paths)))
        for rows in self._rows():
            _, clean = edges.sent(self.pairs.clean[rows])
            for i, (layer, head, part, later, receiver) in enumerate(self.paths):
                cut = torch.zeros_like(edges.exists)
                cut[edges.place(f"head {layer}.{head}", f"{part} {later}.{receiver}")] = True
                output = edges.cut(self.pairs.corrupt[rows], cut, clean)
                found[rows, i] = self._difference(output, rows) - ends[1][rows]
        mean, se = share(found, ends[0] - ends[1])
        names = [f"{layer}.{head} → {part} {later}.{receiver}" for layer, head, part, later, receiver in self.paths]
        dataset.coords["path"] = np.array(names, dtype=object)
        about = {"long_name": "share of the signal restored along one path", "units": "share", "nan": NO_SIGNAL}
        dataset["path_restored"] = ("path", mean, about)
        dataset["path_restored_se"] = ("path", se, {"long_name": "standard error over prompts", "units": "share"})


@dataclass(frozen=True)
class _Gauge:
    """Where states (batch, d) at the last place stand among those of clean prompts, layer by layer."""

    centre: list[np.ndarray]
    whiten: list[np.ndarray]
    norm: list[float]
    distance: list[np.ndarray]

    @classmethod
    def fit(cls, clean: Reads) -> _Gauge:
        from sklearn.covariance import ledoit_wolf  # an import of a third of a second, for this alone

        gauge = cls([], [], [], [])
        for state in clean.stack("resid_post")[:, :, -1].double().cpu().numpy():
            half = len(state) // 2
            gauge.centre.append(state[:half].mean(0))
            spread = state[:half].std(0)
            inverse = 1 / np.where(
                spread > 1e-9 * max(spread.max(), 1e-300), spread, np.inf
            )  # 0 where all are the same
            values, vectors = np.linalg.eigh(ledoit_wolf((state[:half] - gauge.centre[-1]) * inverse)[0])
            keep = values > 1e-12 * max(values[-1], 1e-300)
            gauge.whiten.append(inverse[:, None] * vectors[:, keep] / np.sqrt(values[keep]))
            gauge.norm.append(float(np.linalg.norm(state[half:], axis=1).mean()))
            gauge.distance.append(gauge._distance(len(gauge.norm) - 1, state[half:]))
        return gauge

    def __call__(self, layer: int, state: Tensor) -> tuple[float, float]:
        """Norm ratio and quantile of the second half; equal distances count half."""
        own = state.double().cpu().numpy()[len(state) // 2 :]
        found, clean = self._distance(layer, own)[:, None], self.distance[layer]
        close = np.isclose(found, clean, rtol=1e-6, atol=1e-12)
        nearer = np.where(close, 0.5, (clean < found).astype(float)).mean()
        norm = self.norm[layer]
        return float(np.linalg.norm(own, axis=1).mean() / norm) if norm else float("nan"), float(nearer)

    def _distance(self, layer: int, state: np.ndarray) -> np.ndarray:
        return np.linalg.norm((state - self.centre[layer]) @ self.whiten[layer], axis=1)
