"""In-context learning: how much lower the loss is late in a text than early, and how much of that is far context."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import predictions
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, clustered_mean, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.snapshot import Snapshot

EARLY, LATE, LONG_TEXT = 50, 500, 512  # tokens, of Olsson et al.: the positions compared, in texts of this length


@dataclass(frozen=True, eq=False)
class InContextLearning(ByContent):
    """Late loss minus early loss on fixed `tokens` (batch, pos) int64, in nats per token; the loss over log position.

    Positions count the tokens before the one predicted, 1 .. length - 1. `early` and `late` are the positions compared,
    by default 50 and 500 (Olsson et al. 2022, 2209.11895), or these shares of 512 where the text is shorter; each is an
    average over the `width` positions on either side, by default length // 64, as far as they exist.

    - `icl_score`, nats per token: late minus early, paired by sequence: *negative* where the model learns in context,
      about 0 for a model that does not. Null: `icl_score_reference`.
    - `icl_score_se`, nats per token: its standard error over sequences.
    - `icl_score_reference`, nats per token: the same where all but the last `early` tokens before each late window come
      from another sequence (the next row, the last row taking the first): what position and near context alone give,
      with no far context to use; text itself may be easier or harder later on.
    - `icl_score_reference_se`, nats per token: its standard error over sequences.
    - `far_context`, nats per token: icl_score - icl_score_reference, negative where far context helps. Null: 0.
    - `far_context_se`, nats per token: its standard error over sequences.
    - `loss_by_position` (position), nats per token: mean loss of the positions from `position` up to the next of the
      coordinate, about `points` stretches of equal length in log position.
    - `loss_by_position_se` (position), nats per token: its standard error over sequences.

    A sequence should be one document: positions count from its start. far_context pairs a row with its neighbour's
    beginning, so its error takes the rows for independent; a corpus whose neighbours belong together (cuts of one
    document) hides far context: shuffle them first. Equal sequences make the reference the score itself.
    Cost: two forward passes of `tokens`. See ProbeLoss for the loss at every position.
    Raises DataError for fewer than two sequences and positions that are not 1 <= early < late < length, InstrumentError
    for a model without logits at every position.
    """

    tokens: Tensor
    early: int | None = None
    late: int | None = None
    width: int | None = None
    points: int = 16
    batch_size: int = 32

    def __post_init__(self) -> None:
        tokens = probe_tokens(self.tokens, "InContextLearning", shortest=4)
        length = tokens.shape[1]
        share = min(length / LONG_TEXT, 1.0)
        early = max(round(EARLY * share), 1) if self.early is None else int(self.early)
        late = min(round(LATE * share), length - 1) if self.late is None else int(self.late)
        width = length // 64 if self.width is None else int(self.width)
        if not (1 <= early < late < length and width >= 0 and self.points >= 2 and len(tokens) >= 2):
            raise DataError(
                "InContextLearning needs two sequences, 1 <= early < late < length, width >= 0 and points >= 2; got "
                f"{len(tokens)} sequences of length {length}, early={early}, late={late}, width={width}, "
                f"points={self.points}"
            )
        for name, value in (("tokens", tokens), ("early", early), ("late", late), ("width", width)):
            object.__setattr__(self, name, value)
        if self._cut < 1:
            raise DataError(
                f"InContextLearning: the late window starts at {self._window(late).start}, no further than "
                f"early={early} from the start, so there is no far context to take away: raise late, or lower "
                "early or width"
            )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        assert self.early is not None
        assert self.late is not None
        nats = self._losses(snapshot, self.tokens)
        foreign = torch.cat([self.tokens.roll(-1, 0)[:, : self._cut], self.tokens[:, self._cut :]], 1)
        early, late = (nats[:, self._window(place)].mean(1) for place in (self.early, self.late))
        near = self._losses(snapshot, foreign)[:, self._window(self.late)].mean(1)

        # stretches of equal length in log position; each starts where its coordinate says
        starts = np.unique(np.geomspace(1, nats.shape[1] + 1, self.points + 1).round().astype(int))[:-1]
        ends = np.append(starts[1:], nats.shape[1] + 1)
        curve = np.stack([nats[:, a - 1 : b - 1].mean(1) for a, b in zip(starts, ends, strict=True)], axis=1)
        far = f"> {self._near} tokens back"
        result = Rows(headline=["icl_score", "far_context"], width=self.width, far=far)
        for name, values, long_name, change in (
            ("icl_score", late - early, f"loss at position {self.late} minus loss at {self.early}", 0.05),
            ("icl_score_reference", near - early, "the same without far context", None),
            ("far_context", late - near, "late loss minus late loss without far context", 0.05),
            ("loss_by_position", curve, "next-token loss from here to the next position", None),
        ):
            each, unit = np.ones(len(nats)), "nats per token"
            (mean, se), groups = clustered_mean(values, each), clustered_groups(values, each)
            dims = ("position",) if values.ndim > 1 else ()
            result.put(name, dims, mean, se, long_name, units=unit, smallest_change=change, replicates=groups)
        return result.dataset(position=starts)

    def cost(self) -> Cost:
        return Cost(forwards=2 * len(self.tokens), positions=self.tokens.shape[1])

    def _window(self, place: int) -> slice:
        """Columns of the losses around a position: column i is position i + 1."""
        width = self.width or 0
        return slice(max(place - width, 1) - 1, min(place + width + 1, self.tokens.shape[1]) - 1)

    @property
    def _near(self) -> int:
        return self.early or 0

    @property
    def _cut(self) -> int:
        """How many tokens at the start of a sequence lie further than `early` before the whole late window."""
        return self._window(self.late or 0).start + 1 - self._near

    def _losses(self, snapshot: Snapshot, tokens: Tensor) -> np.ndarray:
        return predictions(snapshot, tokens, type(self).__name__, self.batch_size)[0].numpy()  # (batch, pos - 1)
