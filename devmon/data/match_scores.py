"""What attention patterns and logits say at the items of a `MatchProbe`, summed over the items of each sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from devmon.data.matches import MatchProbe
from devmon.errors import InstrumentError


def _items(probe: MatchProbe, rows: slice) -> tuple[slice, Tensor]:
    """The items of these rows, and each one's row counted from the first of them."""
    items = slice(*torch.searchsorted(probe.row, torch.tensor([rows.start, rows.stop])).tolist())
    return items, probe.row[items] - rows.start


def attention_sums(pattern: Tensor, probe: MatchProbe, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the items of each row, to the target and to a random control (batch, head), and all (head, q, k)."""
    items, row = _items(probe, rows)
    pattern = pattern.cpu().double()
    seen = pattern[row, :, probe.query[items]]  # (n, head, k)

    # the control is an average over the places that could as well have been the target, not a draw of a single place
    other = probe.other[items][:, None].expand(-1, seen.shape[1], -1)
    there = other >= 0
    to_target = seen.gather(-1, probe.target[items][:, None, None].expand(-1, seen.shape[1], 1))[..., 0]
    to_other = (seen.gather(-1, other.clamp(min=0)) * there).sum(-1) / there.sum(-1)

    # by sequence, for their errors; and all attention of the queries, for the best fixed offset
    empty = torch.zeros(len(pattern), seen.shape[1], dtype=torch.float64)
    asked = torch.zeros(pattern.shape[0], pattern.shape[-1], dtype=torch.float64)
    asked[row, probe.query[items]] = 1.0
    everything = torch.einsum("bhqk,bq->hqk", pattern, asked)
    return empty.index_add(0, row, to_target), empty.index_add(0, row, to_other), everything


def loss_sums(scores: Tensor, probe: MatchProbe, rows: slice, who: str) -> Tensor:
    """Sums over the items of each row of the nats of the right class and of a control, (batch, 2)."""
    items, row = _items(probe, rows)
    if scores.shape[-1] < len(probe.classes):
        raise InstrumentError(
            f"{who}: the probe's tokens go up to {len(probe.classes) - 1} but the model has {scores.shape[-1]} logits: "
            "give a table of this model's vocabulary"
        )
    chances = scores[row.to(scores.device), probe.query[items].to(scores.device)].double().log_softmax(-1).cpu()

    # -log of the probability of each class, a log-sum-exp over its tokens; tokens of no class make up the last one
    kinds = probe.classes.clamp(min=0) + (probe.classes < 0) * (int(probe.classes.max()) + 1)
    index = kinds.expand(len(chances), -1)
    most = chances.new_full((len(chances), int(kinds.max()) + 1), -torch.inf)
    own = chances[:, : len(kinds)]
    most = most.scatter_reduce(1, index, own, "amax")
    top = most.nan_to_num(neginf=0.0)
    total = torch.zeros_like(most).scatter_add(1, index, (own - top.gather(1, index)).exp())
    nats = -(total.log() + top)  # (n, class)

    # the control is the mean over the classes that could as well have come
    wrong = probe.wrong[items]
    there = wrong >= 0
    control = (nats.gather(1, wrong.clamp(min=0)) * there).sum(1) / there.sum(1)
    each = torch.stack([nats.gather(1, probe.right[items][:, None])[:, 0], control], 1)
    return torch.zeros(rows.stop - rows.start, 2, dtype=torch.float64).index_add(0, row, each)
