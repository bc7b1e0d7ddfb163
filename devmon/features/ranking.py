"""The nodes of a feature circuit by what they carry from corrupt to clean prompts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from devmon.features.nodes import Metric, Nodes, SiteOf, Split


class Batch(NamedTuple):
    """Clean and corrupt prompts (batch, pos), and what is explained of their logits, summed over them."""

    clean: Tensor
    corrupt: Tensor
    metric: Metric


class Ranked(NamedTuple):
    """All nodes in one list, the latents of each site and then its errors by place.

    `score` (node,) in nats a prompt, `rank` their order by its absolute value, `is_error` and `living` (node,)
    bool, the latter false for latents that never fire; `sizes` of the parts, and the `means` over corrupt prompts,
    (pos, m) and (pos, d) by site.
    """

    score: np.ndarray
    rank: np.ndarray
    is_error: np.ndarray
    living: np.ndarray
    sizes: list[int]
    means: dict[SiteOf, Split]

    def kept(self, first: np.ndarray, errors: bool | None = None, rest: bool = False) -> dict[SiteOf, Split]:
        """What `Nodes.mixed` keeps: these nodes, or all the `rest`; all errors or none of them, where that is given."""
        kept = np.zeros(len(self.score), dtype=bool)
        kept[first] = True
        kept = ~kept if rest else kept
        if errors is not None:
            kept[self.is_error] = errors
        parts = torch.from_numpy(kept).split(self.sizes)
        return {site: Split(parts[2 * at], parts[2 * at + 1][:, None]) for at, site in enumerate(self.means)}

    def place(self, number: int) -> tuple[int, int, int]:
        """Site, latent and place of a node by its number; -1 for what it has not."""
        ends = np.cumsum(self.sizes)
        part = int(np.searchsorted(ends, number, side="right"))
        within = number - int(ends[part]) + self.sizes[part]
        return part // 2, -1 if part % 2 else within, within if part % 2 else -1

    def by_part(self) -> list[np.ndarray]:
        """The scores of each site's latents, then of its errors."""
        return np.split(self.score, np.cumsum(self.sizes)[:-1])


def ranked(nodes: Nodes, batches: Iterable[Batch], steps: int) -> Ranked:
    """The nodes by Σ_pos (clean - corrupt) · the slope averaged on the way between, mean over prompts."""
    scores: dict[SiteOf, list[Tensor]] = {site: [] for site in nodes.sites}
    totals: dict[SiteOf, list[Tensor]] = {site: [] for site in nodes.sites}
    fired: dict[SiteOf, list[Tensor]] = {site: [] for site in nodes.sites}
    prompts = 0
    for batch in batches:
        (_, clean), (_, corrupt) = nodes.read(batch.clean), nodes.read(batch.corrupt)
        prompts += len(batch.clean)
        for site in nodes.sites:
            slope = nodes.integrated(batch.clean, site, corrupt[site], clean[site], batch.metric, steps)
            moved = clean[site] - corrupt[site]
            latents = (moved.latents.double() * slope.latents.double()).sum((0, 1))  # (m,)
            errors = (moved.error.double() * slope.error.double()).sum((0, 2))  # (pos,)
            scores[site].append(torch.cat([latents, errors]))
            held = torch.cat([corrupt[site].latents, corrupt[site].error], -1).double()
            totals[site].append(held.sum(0))
            alive = ((clean[site].latents > 0) | (corrupt[site].latents > 0)).flatten(0, 1).any(0)
            fired[site].append(torch.cat([alive, alive.new_ones(len(errors))]))

    # one list of all nodes, and what takes their place
    by_site = {site: torch.stack(each).sum(0) / prompts for site, each in scores.items()}
    score = torch.cat(list(by_site.values())).cpu().numpy()
    living = torch.cat([torch.stack(each).any(0) for each in fired.values()]).cpu().numpy()
    widths = [nodes.coders[site].latents for site in nodes.sites]
    sizes = [size for width, each in zip(widths, by_site.values(), strict=True) for size in (width, len(each) - width)]
    is_error = np.repeat(np.arange(len(sizes)) % 2 == 1, sizes)
    means = {
        site: Split(
            *(torch.stack(each).sum(0) / prompts).to(slope.latents).split([width, each[0].shape[1] - width], -1)
        )
        for width, (site, each) in zip(widths, totals.items(), strict=True)
    }
    return Ranked(score, np.argsort(-np.abs(score), kind="stable"), is_error, living, sizes, means)
