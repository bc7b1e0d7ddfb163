"""Distance to the known ways of predicting a Markov chain from its own sequence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import logits
from devmon.anatomy.forward import check_causal
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, clustered_mean, minibatches, probe_tokens
from devmon.data.laws import divergence, log_probabilities, nats
from devmon.data.markov import counted, retrieved
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class MarkovReferences(ByContent):
    """How far the model is from each known predictor of a Markov chain, on `tokens` (batch, pos) in 0 .. `states` - 1.

    The solutions are those of `orders`: uniform (0), unigram (1), bigram (2), 3-gram, …, which count in the sequence
    itself, (c(h x) + 1) / (c(h) + k) (Edelman et al. 2024, 2402.11004). The bigram is the Bayes predictor of chains
    with rows from Dirichlet(1) anew in each sequence and a uniform first token (`devmon.data.markov`). Given the fixed
    chains of a mixture, `matrices` (chain, state, state), there are two more (Park et al. 2024, 2412.01003): bigram
    retrieval, Bayes where a sequence is of one of these chains, and unigram retrieval; the counting ones are called
    inference there. Places from `first` on are scored, the last token's aside. `_se` are over sequences.

    - `distance` (solution), nats per token: mean KL(solution ‖ model); 0 for a model that is the solution. Null:
      `distance_reference`.
    - `distance_se` (solution), nats per token: its standard error.
    - `distance_reference` (solution), nats per token: the distance of uniform predictions, near that of a model at
      random initialisation.
    - `regret` (solution), nats per token: loss of the model minus loss of the solution, on the same tokens. Null: 0 for
      the solution itself; of the Bayes predictor it is not below 0 but for chance.
    - `regret_se` (solution), nats per token: its standard error, paired by sequence.
    - `solution_loss` (solution), nats per token: the loss of the solution.
    - `loss`, nats per token: the model's own.
    - `loss_se`, nats per token: its standard error.

    A solution that is Bayes for nothing, as the unigram on chains, need not be reached: look for its minimum. Two
    solutions can agree on the data given (retrieval and inference, with many chains): no distance tells them apart
    then, tokens of chains that are not in the mixture do. Cost: one forward pass of `tokens`. Raises DataError for
    tokens outside the states, InstrumentError for a model without logits of all states at every place.
    """

    tokens: Tensor
    states: int
    orders: tuple[int, ...] = (0, 1, 2)
    matrices: Tensor | None = None
    first: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        tokens = probe_tokens(self.tokens, "MarkovReferences")
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "orders", tuple(sorted({int(order) for order in self.orders})))
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.states:
            raise DataError(
                f"MarkovReferences needs tokens in 0 .. {self.states - 1}, got {int(tokens.min())} .. "
                f"{int(tokens.max())}: raise states"
            )
        if not self.orders or self.orders[0] < 0:
            raise DataError(f"MarkovReferences needs orders of at least 0, got {self.orders}")
        if not 0 <= self.first < tokens.shape[1] - 1:
            raise DataError(
                f"MarkovReferences needs first in 0 .. {tokens.shape[1] - 2}, the places that have a next token, got "
                f"{self.first}"
            )
        if self.matrices is not None:
            matrices = torch.as_tensor(self.matrices).detach().cpu().double()
            square = matrices.ndim == 3 and matrices.shape[1:] == (self.states, self.states)
            if not square or bool((matrices < 0).any()) or bool(((matrices.sum(-1) - 1).abs() > 1e-6).any()):
                raise DataError(
                    f"MarkovReferences needs matrices (chain, {self.states}, {self.states}) with rows that sum to 1, "
                    f"got {tuple(matrices.shape)}"
                )
            object.__setattr__(self, "matrices", matrices)
        self._laws  # noqa: B018 (what cannot be made is refused here)

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        check_causal(snapshot.model, self.tokens, "MarkovReferences")
        # by solution and place: KL from the solution, and the model's loss on the token that came
        parts = [self._score(snapshot, part) for part in minibatches(len(self.tokens), self.batch_size)]
        kl, own = (np.concatenate(part, axis) for part, axis in zip(zip(*parts, strict=True), (1, 0), strict=True))
        laws, after = self._laws, self.tokens[:, self.first + 1 :]
        theirs = np.stack([nats(law, after) for law in laws.values()])  # (solution, batch, pos)

        each = np.full(len(after), after.shape[1])
        rows, unit = Rows(headline=["distance", "regret"], first=self.first), "nats per token"
        for name, values, label in (
            ("distance", kl, "KL from the solution to the model"),
            ("regret", own - theirs, "loss of the model minus loss of the solution"),
        ):
            total = values.sum(2).T  # (batch, solution)
            mean, se = clustered_mean(total, each)
            about: dict[str, Any] = {"units": unit, "smallest_change": 0.01}
            rows.put(name, "solution", mean, se, label, replicates=clustered_groups(total, each), **about)
        uniform = torch.full((self.states,), 1 / self.states, dtype=torch.float64).log()
        even = [divergence(law, uniform.expand_as(law)).mean() for law in laws.values()]
        rows.put("distance_reference", "solution", even, None, "KL from the solution to uniform", units=unit)
        rows.put("solution_loss", "solution", theirs.mean((1, 2)), None, "loss of the solution", units=unit)
        loss, se = clustered_mean(own.sum(1), each)
        rows.put("loss", (), loss, se, "loss of the model", units=unit)
        return rows.dataset(solution=np.array(list(laws), dtype=object))

    def cost(self) -> Cost:
        return Cost(forwards=len(self.tokens), positions=self.tokens.shape[1])

    @cached_property
    def _laws(self) -> dict[str, Tensor]:
        """The law of the next token at the places scored, (batch, pos, state), by solution."""
        names = {0: "uniform", 1: "unigram", 2: "bigram"}
        laws = {names.get(n, f"{n}-gram"): counted(self.tokens, self.states, n) for n in self.orders}
        if self.matrices is not None:
            laws |= {f"{names[n]} retrieval": retrieved(self.tokens, self.matrices, n) for n in (1, 2)}
        return {name: law[:, self.first : -1] for name, law in laws.items()}

    def _score(self, snapshot: Snapshot, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """KL (solution, batch, pos) and the model's loss (batch, pos)."""
        tokens = self.tokens[part]
        scores = logits(snapshot.model, tokens, "MarkovReferences")[:, self.first : -1]
        if scores.shape[-1] < self.states:
            raise InstrumentError(
                f"MarkovReferences needs logits of {self.states} states, {type(snapshot.model).__name__} has "
                f"{scores.shape[-1]}: give tokens of this model's vocabulary"
            )
        log = log_probabilities(scores)
        kl = np.stack([divergence(law[part], log) for law in self._laws.values()])
        own = -log.gather(-1, tokens[:, self.first + 1 :, None])[..., 0].numpy()
        return kl, np.where(np.isinf(own), np.nan, own)
