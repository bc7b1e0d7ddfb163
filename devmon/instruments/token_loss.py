"""The loss of single tokens, kept one by one, so that it can be said when each was learned."""

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
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.snapshot import Snapshot, derive_seed


@dataclass(frozen=True, eq=False)
class TokenLoss(ByContent):
    """Next-token loss on fixed `tokens` (batch, pos), stored token by token.

    At most `most` of the predicted tokens are kept, the same at every step, drawn by `seed` evenly from all sequences:
    a row takes 4 · `most` bytes. The coordinates `sequence`, `pos` and `target` of `token` say where each stands and
    which it is. `devmon.analysis.token_learning` tells from the stored rows when each was learned (after Chang & Bergen
    2022, 2110.02406, of words).

    - `nats` (token), nats: loss of the token, float32. Null: `uniform`.
    - `loss`, nats per token: mean over the tokens kept. Null: `uniform`.
    - `loss_se`, nats per token: its standard error over sequences.
    - `uniform`, nats: log of the size of the vocabulary, the loss of an even guess; about that of an untrained model.

    Raises InstrumentError for a model without logits at every position or that sees the token it predicts, DataError
    for `most` below 1.
    """

    tokens: Tensor
    most: int = 4096
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "TokenLoss"))
        if self.most < 1:
            raise DataError(f"TokenLoss needs most >= 1 tokens to keep, got {self.most}")

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        need_causal(snapshot, self.tokens, "TokenLoss")
        [parts] = read(snapshot, self)
        nats = torch.cat([part for part, _ in parts]).numpy()
        sequence, place = (each.numpy() for each in self._kept.nonzero(as_tuple=True))

        # the mean, by whole sequences
        count = np.bincount(sequence, minlength=len(self.tokens))
        total = np.bincount(sequence, nats, minlength=len(self.tokens))
        mean, se = clustered_mean(total, count)
        rows, unit = Rows(headline=["loss"]), "nats per token"
        groups = clustered_groups(total, count)
        rows.put("loss", (), float(mean), float(se), "next-token loss", units=unit, replicates=groups)
        rows.put("nats", "token", nats.astype(np.float32), None, "next-token loss of each token", units="nats")
        rows.put("uniform", (), float(np.log(parts[0][1])), None, "loss of an even guess", units="nats")
        where = {"sequence": sequence, "pos": place + 1, "target": self.tokens[:, 1:][self._kept].numpy()}
        dataset = rows.dataset(token=np.arange(len(nats)))
        return dataset.assign_coords({name: ("token", values) for name, values in where.items()})

    def reads(self) -> list[Read]:
        return [Read(self, self.tokens, self._nats, self.batch_size, predicts="all")]

    def cost(self) -> Cost:
        sequences, positions = self.tokens.shape
        return Cost(sequences, positions=positions, softmaxes=sequences * positions)

    @cached_property
    def _kept(self) -> Tensor:
        """Which predicted tokens (batch, pos - 1) are kept."""
        places = self.tokens[:, 1:].numel()
        drawn = torch.randperm(places, generator=torch.Generator().manual_seed(derive_seed(self.seed, "TokenLoss")))
        kept = torch.zeros(places, dtype=torch.bool)
        kept[drawn[: self.most]] = True
        return kept.view(len(self.tokens), -1)

    def _nats(self, seen: Seen) -> tuple[Tensor, int]:
        return seen.nats[self._kept[seen.rows]], seen.log_p.shape[-1]
