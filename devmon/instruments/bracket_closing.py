"""Whether a model closes the bracket that is open, however far back it was opened."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy.passes import Read, Seen, need_causal, read
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, clustered_mean, probe_tokens
from devmon.data.grammars import Brackets
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot

DISTANCES = (1, 2, 4, 8, 16, 32)  # tokens since the opening bracket: each from here to below the next


@dataclass(frozen=True, eq=False)
class BracketClosing(ByContent):
    """The right closing bracket among all closing brackets, at every place of `tokens` (batch, pos) with one open.

    `language` is a `Brackets` of `devmon.data.grammars`, of two kinds or more. The score of a place is the probability
    of the closer of the bracket opened last, over that of all closers: it asks for the memory of which, not for when to
    close (Hewitt et al. 2020, 2010.07515). `_se` are over rows.

    - `closing`, share: mean over places. Null: `chance`.
    - `closing_se`, share: its standard error.
    - `closing_by_distance` (distance), share: the same where the open bracket stands this far back: `distance` is the
      least of 1, 2 to 3, 4 to 7, 8 to 15, 16 to 31, 32 or more tokens; NaN where there are no such places. Null:
      `chance`.
    - `closing_by_distance_se` (distance), share: its standard error.
    - `chance`, share: 1 / kinds, of a model that forgets which it was.

    Cost: one pass. Raises DataError for rows that are no prefixes of the language, or of one kind of brackets,
    InstrumentError for a model without logits of its vocabulary at every place.
    """

    tokens: Tensor
    language: Brackets
    batch_size: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "BracketClosing"))
        if self.language.kinds < 2:
            raise DataError("BracketClosing needs brackets of two kinds or more: of one there is nothing to remember")
        self.language.laws(self.tokens)  # refuses what is no prefix

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        need_causal(snapshot, self.tokens, "BracketClosing")
        [parts] = read(snapshot, self)
        score, back = torch.cat(parts).numpy(), self._open[1].numpy()
        rows = Rows(headline=["closing"], error="standard error over rows")
        bins = [(back >= low) & (back < high) for low, high in zip(DISTANCES, (*DISTANCES[1:], np.inf), strict=True)]
        for name, dims, places in (
            ("closing", (), (back > 0)[..., None]),
            ("closing_by_distance", "distance", np.stack(bins, -1)),
        ):
            total, count = (score[..., None] * places).sum(1), places.sum(1)
            each = [clustered_mean(total[:, i], count[:, i]) for i in range(total.shape[1])]
            mean, se = (np.array(part) if dims else part[0] for part in zip(*each, strict=True))
            groups = clustered_groups(total[:, 0], count[:, 0]) if not dims else None
            label = "right closer among all closers"
            rows.put(name, dims, mean, se, label, units="share", smallest_change=0.02, replicates=groups)
        rows.put("chance", (), 1 / self.language.kinds, None, "the same without memory", units="share")
        return rows.dataset(distance=np.array(DISTANCES))

    def reads(self) -> list[Read]:
        return [Read(self, self.tokens, self._score, self.batch_size, predicts="all")]

    def cost(self) -> Cost:
        sequences, positions = self.tokens.shape
        return Cost(sequences, positions=positions, softmaxes=sequences * positions)

    @cached_property
    def _open(self) -> tuple[Tensor, Tensor]:
        """The kind of the bracket that is open after each place (batch, pos), and how many tokens back the next place
        has it; 0 for none."""
        kind, back = torch.zeros_like(self.tokens), torch.zeros_like(self.tokens)
        for row, line in enumerate(self.tokens.tolist()):
            stack: list[tuple[int, int]] = []
            for place, token in enumerate(line):
                if token < self.language.kinds:
                    stack.append((token, place))
                else:
                    stack.pop()
                if stack:
                    kind[row, place], back[row, place] = stack[-1][0], place + 1 - stack[-1][1]
        return kind, back

    def _score(self, seen: Seen) -> Tensor:
        """(batch, pos) in float64; 0 where nothing is open."""
        kinds = self.language.kinds
        if seen.log_p.shape[-1] < 2 * kinds:
            raise InstrumentError(
                f"BracketClosing needs logits of {2 * kinds} tokens, {type(seen.model).__name__} has "
                f"{seen.log_p.shape[-1]}: train it with `language.vocab_size` tokens"
            )
        kind, back = (each[seen.rows] for each in self._open)
        closers = seen.log_p[..., kinds : 2 * kinds].double().log_softmax(-1).exp().cpu()
        return torch.where(back > 0, closers.gather(-1, kind[..., None])[..., 0], 0.0)
