"""How far a model is from the language itself, where the law of the next token is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import logits
from devmon.anatomy.forward import check_causal
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, clustered_mean, minibatches, probe_tokens
from devmon.data.grammars import Language
from devmon.data.laws import divergence, log_probabilities
from devmon.data.rows import Rows
from devmon.errors import InstrumentError
from devmon.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class GrammarExcess(ByContent):
    """What a model loses against the exact law of a `language` on its `tokens` (batch, pos), and breaks of its rules.

    `language` is a `LevelGrammar` of `devmon.data.grammars` (sentences packed into rows, as `draw` makes them), its
    `Brackets`, or anything with `vocab_size` and `laws(tokens)`, the law of the next token given the row so far. That
    of a level grammar is worked out by a filter over the stacks of symbols that may still be to derive, which is equal
    to summing over all derivations. Laws are made once, at construction. All places but the last are scored; `_se` are
    over rows.

    - `excess`, nats per token: mean KL(law ‖ model), the loss that could be avoided; 0 for the language itself. Null:
      `excess_reference`.
    - `excess_se`, nats per token: its standard error.
    - `excess_reference`, nats per token: the excess of uniform predictions, near that of a random initialisation.
    - `impossible`, share: mean probability that the model gives to tokens that cannot come. Null:
      `impossible_reference`.
    - `impossible_se`, share: its standard error.
    - `impossible_reference`, share: the same of uniform predictions.
    - `entropy`, nats per token: mean entropy of the law, the least loss that there is.
    - `loss`, nats per token: the model's own. Null: `entropy`.
    - `loss_se`, nats per token: its standard error.

    `excess` needs no sampling of text and has no noise of the tokens that came: it is the expected loss minus the
    entropy, place by place. Cost: one forward pass of `tokens`. Raises DataError for tokens that the language cannot
    make, InstrumentError for a model without logits of its vocabulary at every place.
    """

    tokens: Tensor
    language: Language
    batch_size: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "GrammarExcess"))
        self._laws  # noqa: B018 (what the language cannot make is refused here)

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        check_causal(snapshot.model, self.tokens, "GrammarExcess")
        parts = [self._score(snapshot, part) for part in minibatches(len(self.tokens), self.batch_size)]
        excess, impossible, loss = (np.concatenate(part) for part in zip(*parts, strict=True))

        rows, nat = Rows(headline=["excess", "impossible"]), "nats per token"
        each = np.full(len(loss), loss.shape[1])
        for name, values, label, unit, change in (
            ("excess", excess, "KL from the exact law to the model", nat, 0.005),
            ("impossible", impossible, "probability of tokens that cannot come", "share", 0.005),
            ("loss", loss, "loss of the model", nat, None),
        ):
            total = values.sum(1)
            mean, se = clustered_mean(total, each)
            groups = clustered_groups(total, each)
            rows.put(name, (), float(mean), float(se), label, units=unit, smallest_change=change, replicates=groups)

        # what uniform predictions would get, and what no model can go below
        laws = self._laws
        even = divergence(laws, torch.full_like(laws, 1 / laws.shape[-1]).log()).mean()
        rows.put("excess_reference", (), float(even), None, "KL from the exact law to uniform", units=nat)
        blind = float((laws == 0).double().mean())
        rows.put("impossible_reference", (), blind, None, "impossible mass of uniform predictions", units="share")
        entropy = float(torch.special.entr(laws).sum(-1).mean())
        rows.put("entropy", (), entropy, None, "entropy of the exact law", units=nat)
        return rows.dataset()

    def cost(self) -> Cost:
        return Cost(forwards=len(self.tokens), positions=self.tokens.shape[1])

    @cached_property
    def _laws(self) -> Tensor:
        return self.language.laws(self.tokens)[:, :-1]

    def _score(self, snapshot: Snapshot, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Excess, impossible mass and loss at each place, (batch, pos)."""
        tokens, laws = self.tokens[part], self._laws[part]
        scores = logits(snapshot.model, tokens, "GrammarExcess")[:, :-1]
        if scores.shape[-1] < laws.shape[-1]:
            raise InstrumentError(
                f"GrammarExcess needs logits of the {laws.shape[-1]} tokens of the language, "
                f"{type(snapshot.model).__name__} has {scores.shape[-1]}: train it with `language.vocab_size` tokens"
            )
        # tokens beyond the language's cannot come either
        log = log_probabilities(scores)
        possible = torch.nn.functional.pad(laws > 0, (0, log.shape[-1] - laws.shape[-1]))
        impossible = log.exp().masked_fill(possible, 0.0).sum(-1).numpy()
        loss = -log.gather(-1, tokens[:, 1:, None])[..., 0].numpy()
        return divergence(laws, log), impossible, np.where(np.isinf(loss), np.nan, loss)
