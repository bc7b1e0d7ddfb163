"""The activations of a site on fixed tokens, kept: what a crosscoder over checkpoints is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout
from devmon.cost import Cost
from devmon.data import ByContent, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.features.sources import check_site, site_activations
from devmon.snapshot import Snapshot

MOST_BYTES = 2**28  # kept at a step, unless the instrument says otherwise


@dataclass(frozen=True, eq=False)
class SiteActivations(ByContent):
    """The states of one site at fixed places, in half precision: the data of `devmon.features.crosscode`.

    `tokens` (batch, pos) are the same at all steps, and so are the places: all but the first of each sequence. A step
    keeps batch · (pos − 1) · d · 2 bytes: 2e5 places of a width of 512 are 205 MB. What exceeds `most_bytes` is refused
    before anything is written. States are divided by `scale`, so that none leaves the range of float16.

    - `states` (place, dimension), activation: over `scale`, float16.
    - `scale`, activation: the largest absolute number, or 1 where that is less.
    - `norm`, activation: mean length of a state.
    - `norm_se`, activation: its standard error over sequences.

    Pitfalls: places of one sequence are not independent; take many short ones. Cost: one pass, and the disk. Raises
    InstrumentError for a site that the model lacks, DataError for more bytes than `most_bytes`.
    """

    tokens: Tensor
    site: tuple[str, int]
    most_bytes: int = MOST_BYTES
    layout: Layout | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "SiteActivations"))

    def cost(self) -> Cost:
        """One pass of the model."""
        return Cost(forwards=len(self.tokens), positions=self.tokens.shape[1])

    def kept_bytes(self, d: int) -> int:
        """What a step of a site of width d keeps."""
        return len(self.tokens) * (self.tokens.shape[1] - 1) * d * 2

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        who = type(self).__name__
        anatomy = Anatomy.of(snapshot, self.layout, who)
        check_site(anatomy, self.site)
        x, _ = site_activations(anatomy, self.tokens[:1], [self.site])
        if self.kept_bytes(x.shape[1]) > self.most_bytes:
            raise DataError(
                f"{who}: {len(self.tokens)} sequences of {self.tokens.shape[1]} tokens at a width of {x.shape[1]} are "
                f"{self.kept_bytes(x.shape[1]) / 1e6:.0f} MB a step, more than {self.most_bytes / 1e6:.0f}: give fewer "
                "tokens, or raise most_bytes"
            )
        x, _ = site_activations(anatomy, self.tokens, [self.site], batch_size=self.batch_size)
        scale = max(1.0, float(x.abs().max()))
        length = x.double().norm(dim=1).unflatten(0, (len(self.tokens), -1)).mean(1).cpu().numpy()
        se = float(length.std(ddof=1) / len(length) ** 0.5) if len(length) > 1 else float("nan")
        rows = Rows(headline=["norm"])
        states = (x / scale).half().cpu().numpy()
        rows.put("states", ("place", "dimension"), states, None, "states over their scale", units="activation")
        rows.put("scale", (), scale, None, "largest absolute number, or 1", units="activation")
        rows.put("norm", (), float(length.mean()), se, "mean length of a state", units="activation")
        return rows.dataset(place=np.arange(len(x)), dimension=np.arange(x.shape[1]))
