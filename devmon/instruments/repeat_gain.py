"""Repeat gain: how much better tokens are predicted the second time they come by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy.passes import Read, Seen, need_causal, read
from devmon.cost import Cost, trials
from devmon.data import best_fixed_offset, clustered_groups, clustered_mean
from devmon.data.repeats import OnRepeats
from devmon.data.rows import Rows
from devmon.snapshot import Snapshot


@dataclass(frozen=True)
class RepeatGain(OnRepeats):
    """The drop of loss from the first copy of random tokens to the second, at a random period per sequence.

    The same tokens are compared in both copies: where a query q of the second copy (`devmon.data.repeats`) has its next
    token q + 1 in the second copy too, that token counts, and its first occurrence q + 1 - p. So the first token of a
    copy never counts, nor one that follows an accidental collision. All are means over these tokens.

    - `gain`, nats per token: nll_first - nll_second, positive where the model copies; at most about the log of the
      number of tokens drawn from for a calibrated model. Null: 0.
    - `gain_se`, nats per token: its standard error over sequences, paired by token.
    - `nll_first`, nats per token: loss in the first copy.
    - `nll_first_se`, nats per token: its standard error over sequences.
    - `nll_second`, nats per token: loss in the second copy.
    - `nll_second_se`, nats per token: its standard error over sequences.
    - `accuracy`, share: tokens of the second copy that get the highest logit (the thresholded twin of nll_second).
      Null: `accuracy_reference`.
    - `accuracy_se`, share: its standard error over sequences.
    - `accuracy_reference`, share: the best that one fixed offset back, or one fixed token, gets on them without reading
      content.

    Raises InstrumentError for a model without logits at every position, DataError for a probe that cannot be drawn.
    """

    batch_size: int = 32

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        probe = self._repeats
        need_causal(snapshot, probe.tokens, type(self).__name__)
        [parts] = read(snapshot, self)
        nats, hits = (torch.cat(column) for column in zip(*parts, strict=True))  # column q predicts token q + 1
        counted = probe.query[:, :-1] & (probe.copy[:, 1:] == 1)
        # the loss of the same token one period before
        first = nats.gather(1, (torch.arange(self.length - 1) - probe.period[:, None]).clamp(min=0))
        values = {
            "gain": (first - nats, "loss of the first copy minus loss of the second", "nats per token", 0.1),
            "nll_first": (first, "loss in the first copy", "nats per token", None),
            "nll_second": (nats, "loss in the second copy", "nats per token", None),
            "accuracy": (hits, "share of the second copy predicted right", "share", None),
        }
        rows = Rows(headline=["gain"])
        for name, (each, label, units, change) in values.items():
            total, count = (each * counted).sum(1).numpy(), counted.sum(1).numpy()
            mean, se = clustered_mean(total, count)
            groups = clustered_groups(total, count)
            rows.put(name, (), float(mean), float(se), label, units=units, smallest_change=change, replicates=groups)
        blind = _content_blind(probe.tokens, counted)
        rows.put("accuracy_reference", (), blind, None, "accuracy of the best fixed offset or token", units="share")
        return rows.dataset()

    def reads(self) -> list[Read]:
        return [Read(self, self._repeats.tokens, _predictions, self.batch_size, predicts="all")]

    def cost(self) -> Cost:
        places, before = self.sequences * self.length, trials(self.length, 3, layout=False)
        return Cost(self.sequences, positions=self.length, softmaxes=places, trials=before)


def _predictions(seen: Seen) -> tuple[Tensor, Tensor]:
    """Loss and hits of the next token, (batch, pos - 1) each."""
    return seen.nats, seen.best[:, :-1].cpu() == seen.inputs[:, 1:]


def _content_blind(tokens: Tensor, counted: Tensor) -> float:
    """The best share of the counted next tokens that a fixed offset back or one fixed token predicts."""
    same = (tokens[:, 1:, None] == tokens[:, None, :-1]) & counted[:, :, None]  # (batch, q, k): token q + 1 is token k
    copied = best_fixed_offset(same.double().sum(0), counted.sum(0))
    constant = torch.bincount(tokens[:, 1:][counted]).max() / counted.sum()
    return float(torch.maximum(copied, constant.double()))
