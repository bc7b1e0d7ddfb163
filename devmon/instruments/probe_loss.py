"""Loss on fixed tokens, and how much it falls along the sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from torch import Tensor

from devmon.anatomy.passes import Read, Seen, need_causal, read
from devmon.cost import Cost, trials
from devmon.data import ByContent, clustered_groups, clustered_mean, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class ProbeLoss(ByContent):
    """Next-token loss on fixed `tokens` (batch, pos) int64, in nats per token, and the in-context-learning score.

    The coordinate `pos` is the index of the token predicted, 1 .. length - 1: how many tokens came before it. `early`
    and `late` are half-open ranges of `pos`; by default positions 50/512 and 500/512 of the length, and length // 64
    more on either side to average over.

    - `loss`, nats per token: mean over all predicted tokens.
    - `loss_se`, nats per token: its standard error over sequences.
    - `loss_by_position` (pos), nats per token: mean over sequences.
    - `loss_by_position_se` (pos), nats per token: its standard error over sequences.
    - `icl_score`, nats per token: mean loss at the positions of `late` minus mean loss at those of `early`: negative
      where the model learns in context (Olsson et al. 2022, 2209.11895: the 500th minus the 50th of 512). Null: 0.
    - `icl_score_se`, nats per token: its standard error over sequences, paired.

    Pitfalls: a sequence should be one document: positions count from its start. Raises InstrumentError for a model
    without logits at every position, DataError for ranges outside 1 .. length.
    """

    tokens: Tensor
    early: tuple[int, int] | None = None
    late: tuple[int, int] | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        tokens = probe_tokens(self.tokens, "ProbeLoss", shortest=4)
        object.__setattr__(self, "tokens", tokens)
        for name, share in (("early", 50 / 512), ("late", 500 / 512)):
            window = getattr(self, name) or _window(share, tokens.shape[1])
            if not 1 <= window[0] < window[1] <= tokens.shape[1]:
                raise DataError(
                    f"ProbeLoss: {name}=(start, stop) must satisfy 1 <= start < stop <= {tokens.shape[1]}, the "
                    f"positions predicted, got {window}"
                )
            object.__setattr__(self, name, (int(window[0]), int(window[1])))

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        need_causal(snapshot, self.tokens, type(self).__name__)
        [parts] = read(snapshot, self)
        nats = np.concatenate(parts)  # (batch, pos - 1): column i predicts position i + 1
        assert self.early is not None
        assert self.late is not None
        late, early = (nats[:, start - 1 : stop - 1].mean(1) for start, stop in (self.late, self.early))
        each, unit = np.ones(len(nats)), "nats per token"
        loss, loss_se = clustered_mean(nats.mean(1), each)
        by_group = clustered_groups(nats.mean(1), each)
        score, score_se = clustered_mean(late - early, each)
        window = f"loss at positions {self.late} minus loss at {self.early}"
        rows = Rows(headline=["loss", "icl_score"])
        rows.put("loss", (), float(loss), float(loss_se), "next-token loss", units=unit, replicates=by_group)
        curve = clustered_mean(nats, each)
        rows.put("loss_by_position", "pos", *curve, "next-token loss by position", units=unit)
        label, by_group = f"in-context learning: {window}", clustered_groups(late - early, each)
        rows.put("icl_score", (), float(score), float(score_se), label, units=unit, replicates=by_group)
        return rows.dataset(pos=np.arange(1, nats.shape[1] + 1))

    def reads(self) -> list[Read]:
        return [Read(self, self.tokens, _nats, self.batch_size, predicts="all")]

    def cost(self) -> Cost:
        sequences, positions = self.tokens.shape
        before = trials(positions, 3, layout=False)
        return Cost(sequences, positions=positions, softmaxes=sequences * positions, trials=before)


def _nats(seen: Seen) -> np.ndarray:
    return seen.nats.numpy()


def _window(share: float, length: int) -> tuple[int, int]:
    """The half-open range of positions around `share` of the length, inside 1 .. length - 1."""
    centre, half = min(max(round(share * length), 1), length - 1), length // 64
    return max(centre - half, 1), min(centre + half + 1, length)
