"""Attention sinks and massive activations: heads that rest on the first token, states of a norm out of scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import find_blocks, layer_patterns, residual_stream, stack_heads
from devmon.anatomy.sight import sees_ahead, uniform_attention
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, clustered_mean, minibatches, probe_tokens
from devmon.data.rows import Rows
from devmon.snapshot import Snapshot

HIGH = 5.0  # medians of its layer: norms above count as high; a Gaussian stream of 16 dimensions stays below 2


@dataclass(frozen=True, eq=False)
class AttentionSinks(ByContent):
    """When heads come to rest on the first token, and states of a huge norm appear, on `tokens` (batch, pos).

    Sinks: Xiao et al. 2023 (2309.17453); massive activations: Sun et al. 2024 (2402.17762); high-norm tokens of image
    models: Darcet et al. 2023 (2309.16588). Depth 0 is the input of the first block, depth l the output of block l;
    `blocks` is their path where they are not found. `_se` are over sequences.

    - `first` (layer, head), attention: mean weight on the first token of all later places. Null: `uniform`.
    - `first_se` (layer, head), attention: its standard error.
    - `uniform`, attention: the same of attention spread evenly over what a place sees.
    - `high_norm` (depth), share: places whose state has a norm above five times the median of its depth. Null: 0 at
      initialisation.
    - `high_norm_se` (depth), share: its standard error.
    - `largest` (depth), 1: largest norm in a sequence over the median of the depth, mean over sequences. Null: at
      initialisation, below 2.
    - `largest_se` (depth), 1: its standard error, the median held.
    - `largest_first` (depth), share: sequences whose largest norm is at the first token. Null: 1 / positions.
    - `largest_first_se` (depth), share: its standard error.

    A high norm at the first token and heads that rest there come together in language models; a high norm alone may be
    that of a rare token. Cost: two forward passes of `tokens`. Raises InstrumentError for a model that shows no
    attention patterns or whose blocks are not found.
    """

    tokens: Tensor
    blocks: str | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "AttentionSinks", shortest=3))

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        tokens, who, model = self.tokens, "AttentionSinks", snapshot.model
        path = self.blocks or find_blocks(model, tokens[:1], who)
        norms, parts, layers, ahead = [], [], [0], False
        for part in minibatches(len(tokens), self.batch_size):
            patterns = layer_patterns(model, tokens[part], who)
            layers, ahead = list(patterns), ahead or sees_ahead(patterns)
            parts.append([pattern[:, :, 1:, 0].double().mean(-1).cpu() for pattern in patterns.values()])
            states = residual_stream(model, tokens[part], path, who)
            norms.append(torch.stack([state.double().norm(dim=-1).cpu() for state in states], 1))

        # heads on the first token, (sequence, layer, head)
        rows, each = Rows(headline=["first", "high_norm", "largest"]), np.ones(len(tokens))
        first = stack_heads([torch.cat(sums).numpy() for sums in zip(*parts, strict=True)])
        mean, se = clustered_mean(first, each)
        about = {"units": "attention", "smallest_change": 0.05, "replicates": clustered_groups(first, each)}
        rows.put("first", ("layer", "head"), mean, se, "attention to the first token", **about)  # type: ignore[arg-type]
        even = uniform_attention(torch.arange(tokens.shape[1]) >= 1, ahead)
        rows.put("uniform", (), even, None, "the same of uniform attention", units="attention")

        # norms against the median of their depth, (sequence, depth, pos)
        norm = torch.cat(norms).numpy()
        ratio = norm / np.median(norm, axis=(0, 2), keepdims=True)
        for name, values, label, unit, change in (
            ("high_norm", (ratio > HIGH).mean(2), "places of a norm above five medians", "share", 0.005),
            ("largest", ratio.max(2), "largest norm over the median", "1", 1.0),
            ("largest_first", (ratio.argmax(2) == 0) * 1.0, "sequences with the largest norm first", "share", None),
        ):
            mean, se = clustered_mean(values, each)
            groups = clustered_groups(values, each)
            rows.put(name, "depth", mean, se, label, units=unit, smallest_change=change, replicates=groups)
        return rows.dataset(layer=np.array(layers), head=np.arange(first.shape[2]), depth=np.arange(norm.shape[1]))

    def cost(self) -> Cost:
        return Cost(forwards=2 * len(self.tokens), positions=self.tokens.shape[1])
