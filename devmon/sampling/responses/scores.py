"""The losses of single tokens or examples along a chain, each less what it is at w*."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from devmon.anatomy.variants.outputs import answer
from devmon.errors import InstrumentError
from devmon.sampling.center import Memo, content, known, named
from devmon.sampling.data import Examples, map_tree
from devmon.sampling.losses import outputs

ItemLoss = Callable[[nn.Module, Any], Tensor]


def next_token_losses(model: nn.Module, batch: Any) -> Tensor:
    """Negative log-likelihood of each token after the first, in nats, (batch, pos − 1); NaN where it is padding.

    `batch` has one of the forms of `devmon.sampling.next_token_loss`, which is the mean of these over a sequence.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    tokens = batch["input_ids"] if isinstance(batch, Mapping) else batch if isinstance(batch, Tensor) else batch[0]
    logits = outputs(answer(model, tokens) if mask is None else model(input_ids=tokens, attention_mask=mask))
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses if mask is None else losses.masked_fill((mask[:, 1:] * mask[:, :-1]) == 0, torch.nan)


@dataclass(frozen=True)
class Scored:
    """A set whose items are scored: `loss(model, batch)` gives (batch,) or (batch, pos), `size` examples a pass."""

    examples: Examples
    loss: ItemLoss
    size: int

    def at_center(self, model: nn.Module, memo: Memo | None) -> np.ndarray:
        """Those of a model at w*, which runs at the same weights leave in `memo` for each other."""
        if memo is None:
            return self(model)
        dtype = next(model.parameters()).dtype
        key = ("items", content(self.examples.tree), named(self.loss), self.size, str(dtype))
        return known(memo, key, lambda: self(model))

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> np.ndarray:
        """Losses (example,) or (example, pos), in the precision of the model."""
        like, parts = next(model.parameters()), []
        for part in torch.arange(self.examples.n).split(self.size):
            batch = map_tree(
                lambda t: t.to(like.device, like.dtype if t.is_floating_point() else None), self.examples.batch(part)
            )
            losses = self.loss(model, batch)
            if losses.ndim not in (1, 2) or len(losses) != len(part):
                raise InstrumentError(
                    f"expected losses of single items, ({len(part)},) or ({len(part)}, pos), got {tuple(losses.shape)}"
                )
            parts.append(losses.cpu().numpy())
        return np.concatenate(parts)


class Excess:
    """Called at each draw (`sample(..., probe=)`): keeps by how much each item's loss is above that at w*.

    `start[name]` are the losses at w*, (example,) or (example, pos), where draw 0 is: a chain begins there. Those that
    are NaN there (padding) are no items: `items[name]` are the numbers of the others in `start[name]` laid flat.
    `kept[name]` is (chain, draw after burn-in, item), float32.
    """

    def __init__(
        self,
        sets: Mapping[str, Scored],
        chains: Sequence[int],
        draws: int,
        burn_in: int,
        start: Mapping[str, np.ndarray] | None = None,
        memo: Memo | None = None,
    ) -> None:
        self.sets, self.draws, self.burn_in, self.memo = sets, draws, burn_in, memo
        self.rows = {chain: row for row, chain in enumerate(chains)}
        self.start: dict[str, np.ndarray] = dict(start or {})
        self.items = {name: np.flatnonzero(~np.isnan(losses)) for name, losses in self.start.items()}
        self.kept: dict[str, np.ndarray] = {}

    def __call__(self, model: nn.Module, chain: int, draw: int) -> None:
        if not self.start:
            self.start = {name: scored.at_center(model, self.memo) for name, scored in self.sets.items()}
            self.items = {name: np.flatnonzero(~np.isnan(losses)) for name, losses in self.start.items()}
        if draw < self.burn_in:
            return
        for name, scored in self.sets.items():
            # subtracted in the model's precision first: what is kept in float32 is small
            away = (scored(model) - self.start[name]).reshape(-1)[self.items[name]]
            if name not in self.kept:
                self.kept[name] = np.full((len(self.rows), self.draws, away.size), np.nan, np.float32)
            with np.errstate(over="ignore"):  # of a chain that diverges
                self.kept[name][self.rows[chain], draw - self.burn_in] = away
