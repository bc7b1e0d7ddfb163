"""Activation patching: which parts carry the difference between two prompts, and how real the patched states are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout
from devmon.anatomy.edges import Edges
from devmon.anatomy.patching import (
    SITE_KINDS,
    Index,
    Runs,
    SiteKind,
    Starts,
    attributed,
    attributed_reads,
    check_heads,
    largest,
    logit_difference,
    run_patched,
)
from devmon.cost import GPT2_SMALL, Cost, Shape
from devmon.data import ByContent, clustered_groups, minibatches
from devmon.data.prompt_pairs import PromptPairs
from devmon.data.rows import Rows
from devmon.data.shares import NO_SIGNAL, share, share_groups, signal
from devmon.errors import DataError
from devmon.snapshot import Snapshot

HeadPath = tuple[int, int, Literal["q", "k", "v"], int, int]


SHARE_LABELS = {
    "restored": "restored by {}, from the clean prompt",
    "broken": "broken by {}, from the corrupt prompt",
    "restored_resample": "restored by {}, from another clean prompt",
}
READS = {"q": "the head's queries", "k": "its keys", "v": "its values"}
REALISM = {"norm_ratio": "norm", "quantile": "Mahalanobis quantile among clean prompts"}


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
    saturated attention and norms. Those of a head's queries, keys and values go through its softmax itself, then to
    first order (AtP*, of the same paper): a head that attends elsewhere once its keys change has them at a slope of 0.
    They screen: of each kind only the `exact` sites with the largest attribution, of either sort, are patched at a
    step; others are NaN. `heads`, pairs (layer, head), are patched at every step: without gaps, and a maximum over them
    is one of the same heads all along. Shares are NaN where the signal is not above 3 standard errors; `_se` are over
    prompts.

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
    - `q_restored_attribution` (layer, head), share: restored by the head's queries, through the softmax, then to first
      order. Null: 0.
    - `q_restored_attribution_se` (layer, head), share: its standard error.
    - `q_broken_attribution` (layer, head), share: broken by them. Null: 0.
    - `q_broken_attribution_se` (layer, head), share: its standard error.
    - `k_restored_attribution` (layer, head), share: restored by the keys that the head sees. Null: 0.
    - `k_restored_attribution_se` (layer, head), share: its standard error.
    - `k_broken_attribution` (layer, head), share: broken by them. Null: 0.
    - `k_broken_attribution_se` (layer, head), share: its standard error.
    - `v_restored_attribution` (layer, head), share: restored by the values that the head reads. Null: 0.
    - `v_restored_attribution_se` (layer, head), share: its standard error.
    - `v_broken_attribution` (layer, head), share: broken by them. Null: 0.
    - `v_broken_attribution_se` (layer, head), share: its standard error.
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

    Cost: 3 passes of all prompts (1 without a signal), from the layer on where that gives the same, for each of `exact`
    sites of a kind and of `heads`, 1 for each path, 8 more and 2 back. Raises InstrumentError for models whose parts or
    `heads` are not known or whose vocabulary is too small, DataError for settings.
    """

    pairs: PromptPairs
    exact: int = 16
    paths: tuple[HeadPath, ...] = ()
    layout: Layout | None = None
    batch_size: int = 32
    heads: tuple[tuple[int, int], ...] = field(default=(), metadata={"identity": "if changed"})

    def __post_init__(self) -> None:
        if self.exact < 0 or len(self.pairs.clean) < 6:
            pairs = len(self.pairs.clean)
            raise DataError(f"ActivationPatching needs exact >= 0 and at least 6 pairs, got {self.exact} and {pairs}")
        if any(part not in ("q", "k", "v") for _, _, part, _, _ in self.paths):
            raise DataError(f'ActivationPatching needs paths (layer, head, "q", layer, head), got {self.paths}')

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        """Of a model with MLPs and a signal: without a signal a third of the patched passes is made."""
        (count, length), layers = self.pairs.clean.shape, shape.layers
        among = (layers * length, 0), (layers * shape.heads, len(self.heads)), (layers, 0)
        sites = sum(min(self.exact + given, most) for most, given in among)
        # a pass with a site patched starts at its layer: half of all layers and one half
        patched = 3 * sites * (layers + 1) / 2 / layers
        passes = 8 + (1 + len(self.paths) if self.paths else 0)
        return Cost(
            passes * count,
            2 * count,
            positions=length,
            unembedded=(passes + 4 + 3 * sites) * count,
            operations=patched * count * length * shape.weights + 6 * shape.patterns(count, length),
        )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        pairs = self.pairs
        anatomy = Anatomy.of(snapshot, self.layout, type(self).__name__)
        anatomy.need_causal(pairs.clean)
        kinds = {name: kind for name, kind in SITE_KINDS.items() if name != "mlp" or anatomy.has_mlp}
        check_heads(anatomy, self.heads)
        sites = [kind.site for kind in kinds.values()]
        runs, starts = Runs.of(anatomy, pairs, sites, self.batch_size), Starts(anatomy, pairs.clean)
        rows = Rows(headline=["signal", "z_restored"], error="standard error over prompts")
        self._put_unpatched(rows, anatomy, runs)

        # each kind of site: attribution screens all of them, patching measures the largest
        for name, kind in kinds.items():
            guesses = {
                effect: attributed(runs.clean, runs.corrupt, kind, slope) for effect, slope in runs.slopes.items()
            }
            chosen = largest(guesses, self.exact)
            chosen = list(dict.fromkeys([*(self.heads if name == "z" else ()), *chosen]))
            patched = self._patch(anatomy, kind, runs, chosen, starts)
            _put_kind(rows, name, kind, runs.whole, guesses, patched)
        for effect, slope in runs.slopes.items():
            # denoising puts clean queries, keys and values into the corrupt prompt, noising the other way round
            back, sign = (pairs.clean, runs.clean, runs.corrupt), -1
            if effect == "restored":
                back, sign = (pairs.corrupt, runs.corrupt, runs.clean), 1
            tokens, own, source = back
            for part, values in attributed_reads(anatomy, tokens, own, source, slope, self._batches()).items():
                mean, se = share(sign * values, runs.whole)
                label = f"share of the signal {SHARE_LABELS[effect].format(READS[part])}, through the softmax"
                name = f"{part}_{effect}_attribution"
                rows.put(name, ("layer", "head"), mean, se, label, units="share", nan=NO_SIGNAL, later=True)

        coords = {"layer": np.arange(anatomy.layers), "pos": np.arange(pairs.clean.shape[1])}
        coords["head"] = np.arange(anatomy.heads)
        if self.paths:
            mean, se = share(self._along_paths(snapshot, runs), runs.whole)
            label = "share of the signal restored along one path"
            rows.put("path_restored", "path", mean, se, label, units="share", nan=NO_SIGNAL)
            arrows = (f"{layer}.{head} → {part} {later}.{end}" for layer, head, part, later, end in self.paths)
            coords["path"] = np.array(list(arrows), dtype=object)
        return rows.dataset(**coords)

    def _put_unpatched(self, rows: Rows, anatomy: Anatomy, runs: Runs) -> None:
        mean, se, there = signal(runs.whole)
        if not there:
            rows.attrs["below_floor"] = "the signal is not above 3 of its standard errors: no shares of it"
        label = "logit difference of clean minus corrupt prompts"
        groups = clustered_groups(runs.whole, np.ones(len(runs.whole)))
        rows.put("signal", (), mean, se, label, units="nats", smallest_change=0.2, replicates=groups)
        for name, values in (("clean", runs.clean_end), ("corrupt", runs.corrupt_end)):
            rows.put(name, (), float(values.mean()), None, f"logit difference of {name} prompts", units="nats")
        last = [runs.corrupt["resid_post", layer][:, -1] for layer in range(anatomy.layers)]
        quantiles = np.array([runs.gauge(layer, state)[1] for layer, state in enumerate(last)])
        label = "Mahalanobis quantile of corrupt prompts among clean ones"
        rows.put("corrupt_quantile", "layer", quantiles, None, label, units="share")

    def _difference(self, output: Tensor, rows: slice = slice(None)) -> np.ndarray:
        answer, foil = self.pairs.answer[rows], self.pairs.foil[rows]
        return logit_difference(output, answer, foil, type(self).__name__).detach().cpu().numpy()

    def _batches(self) -> Iterator[slice]:
        return minibatches(len(self.pairs.clean), self.batch_size)

    def _patch(
        self, anatomy: Anatomy, kind: SiteKind, runs: Runs, chosen: list[tuple[int, ...]], starts: Starts
    ) -> dict[str, np.ndarray]:
        """Shares of the signal times the signal, (prompt, *site), and the realism of what restores, (*site); NaN for
        the sites that are not chosen."""
        # a share of no signal is NaN, so that nothing is patched for it but what the gauge asks
        shape, there = self._shape(anatomy, kind), signal(runs.whole)[2]
        effects = {name: np.full((len(runs.whole), *shape), np.nan) for name in SHARE_LABELS}
        realism = {name: np.full(shape, np.nan) for name in REALISM}
        for at in chosen:
            site, index = (kind.site, at[0]), kind.entries(at)
            every: Index = (slice(None), *at)
            own, other = runs.clean[site], runs.clean[site].roll(1, 0)  # of this prompt, and of the one before

            restored, state = self._run(starts, runs, "corrupt", site, index, own)
            effects["restored"][every] = restored - runs.corrupt_end
            realism["norm_ratio"][at], realism["quantile"][at] = runs.gauge(at[0], state)

            if not there:
                continue
            broken, _ = self._run(starts, runs, "clean", site, index, runs.corrupt[site])
            effects["broken"][every] = runs.clean_end - broken

            resampled, _ = self._run(starts, runs, "corrupt", site, index, other)
            effects["restored_resample"][every] = resampled - runs.corrupt_end
        return effects | realism

    def _shape(self, anatomy: Anatomy, kind: SiteKind) -> tuple[int, ...]:
        sizes = {"layer": anatomy.layers, "pos": self.pairs.clean.shape[1], "head": anatomy.heads}
        return tuple(sizes[dim] for dim in kind.dims)

    def _run(
        self, starts: Starts, runs: Runs, base: str, site: tuple[str, int], index: Index, source: Tensor
    ) -> tuple[np.ndarray, Tensor]:
        """LD (batch,), and the stream (batch, d) at the last position after a layer, with a site of it patched."""
        tokens, differences, states, layer = getattr(self.pairs, base), [], [], site[1]
        # the layers below give what they give without the patch
        before = getattr(runs, base)["resid_pre", layer]
        for rows in self._batches():
            with starts.at(layer, before[rows]):
                patch, after = (site, index, source[rows]), ("resid_post", layer)
                output, reads = run_patched(starts.anatomy, tokens[rows], [patch], [after], last=True)
            differences.append(self._difference(output, rows))
            states.append(reads[after][:, -1])
        return np.concatenate(differences), torch.cat(states)

    def _along_paths(self, snapshot: Snapshot, runs: Runs) -> np.ndarray:
        """What each path restores, (prompt, path): all that is read is of the corrupt prompt but for one edge."""
        edges = Edges(snapshot.model, self.layout, type(self).__name__)
        restored = np.zeros((len(runs.whole), len(self.paths)))
        for rows in self._batches():
            _, clean = edges.sent(self.pairs.clean[rows])
            for i, (layer, head, part, later, receiver) in enumerate(self.paths):
                cut = torch.zeros_like(edges.exists)
                cut[edges.place(f"head {layer}.{head}", f"{part} {later}.{receiver}")] = True
                output = edges.cut(self.pairs.corrupt[rows], cut, clean)
                restored[rows, i] = self._difference(output, rows) - runs.corrupt_end[rows]
        return restored


def _put_kind(
    rows: Rows,
    name: str,
    kind: SiteKind,
    whole: np.ndarray,
    guesses: dict[str, np.ndarray],
    patched: dict[str, np.ndarray],
) -> None:
    screened = f"{NO_SIGNAL}; NaN where attribution patching screened the site out"
    labels = {effect: f"share of the signal {text.format(kind.what)}" for effect, text in SHARE_LABELS.items()}
    for effect, label in labels.items():
        mean, se = share(patched[effect], whole)
        about: dict[str, Any] = {"nan": screened, "smallest_change": 0.1 if effect == "restored" else None}
        about["replicates"] = share_groups(patched[effect], whole)
        rows.put(f"{name}_{effect}", kind.dims, mean, se, label, units="share", **about)
    for effect, values in guesses.items():
        mean, se = share(values, whole)
        label = f"{labels[effect]}, to first order"
        rows.put(f"{name}_{effect}_attribution", kind.dims, mean, se, label, units="share", nan=NO_SIGNAL)
    for gauge, text in REALISM.items():
        label = f"{text} of the stream after the patch"
        rows.put(f"{name}_{gauge}", kind.dims, patched[gauge], None, label, units="1", nan="screened out")
