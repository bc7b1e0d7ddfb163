"""n-gram stages: how close a language model is to the unigram, bigram, trigram statistics of its corpus."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy.passes import Read, Seen, need_causal, read
from devmon.anatomy.vocabulary import CHUNK
from devmon.cost import Cost, trials
from devmon.data import ByContent, clustered_groups, clustered_mean, probe_tokens
from devmon.data.ngrams import Ngrams, codes, expected
from devmon.data.probe import REPLICATES
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class NgramStages(ByContent):
    """The model on held-out `tokens` (batch, pos), beside n-gram models fitted to `corpus`, for each n of `orders`.

    `corpus` is int64 (pos,) or (batch, pos); n-grams do not cross its rows. Counts c are taken once, at construction:
    p_n(x | h) = (c(h x) + a p_{n-1}(x | h')) / (c(h) + a), h the n - 1 tokens before, h' without the first, p_0 uniform
    over `vocab_size` (default: the largest token + 1), a = `smoothing` (MacKay & Peto 1995). With a = 0 these are the
    plain frequencies, and those of h' where h never came up. All numbers are over the same positions: those with
    max(orders) - 1 tokens before them in their sequence; `_se` are over sequences.

    - `cross_entropy` (order), nats per token: mean of -Σ_x p_n(x | h) log p(x | all tokens before), p the model's:
      Hoogland et al. 2024 (2402.02364, C.2.1) follow it for n = 2, where its minimum ended their first stage, .3 nats
      above its floor. Null: `entropy`.
    - `cross_entropy_se` (order), nats per token: its standard error.
    - `entropy` (order), nats per token: that floor, the mean entropy of p_n.
    - `entropy_se` (order), nats per token: its standard error.
    - `kl` (order), nats per token: cross_entropy - entropy, the mean of KL(p_n ‖ model): 0 where the model *is* the
      n-gram model and growing again once it knows more. Null: `kl_reference`.
    - `kl_se` (order), nats per token: its standard error.
    - `kl_reference` (order), nats per token: kl of uniform predictions, log vocab_size - entropy, near to that of a
      model at random initialisation.
    - `ngram_loss` (order), nats per token: loss of p_n on the same tokens.
    - `ngram_loss_se` (order), nats per token: its standard error.
    - `loss_ratio` (order), 1: loss of the model / ngram_loss; below 1 the model beats the n-gram model. Null:
      `loss_ratio_reference`.
    - `loss_ratio_se` (order), 1: its standard error.
    - `loss_ratio_reference` (order), 1: loss_ratio of uniform predictions, log vocab_size / ngram_loss.
    - `loss`, nats per token: the model's own.
    - `loss_se`, nats per token: its standard error.
    - `common_ratio` (order), 1: the n-gram score of Hoogland et al.: mean loss of the last token of held-out windows of
      n tokens / the same of the `common` most frequent n-grams of the corpus, each alone in the context: 1 for a model
      that has learned no n-grams, several times that later on. NaN for n = 1; left out for `common` = 0. Null: 1.
    - `common_ratio_se` (order), 1: its standard error.

    Pitfalls: the numbers belong to this corpus. High orders see most contexts once: there p_n is a guess, its kl large
    for every model. A corpus that holds the tokens themselves makes its n-gram models look better than they are. Cost:
    one forward pass of `tokens`, and short ones of 2 `common` n-grams an order. Raises DataError for tokens and
    settings that do not fit, InstrumentError for a model without logits (batch, pos, vocab) of at least `vocab_size`.
    """

    corpus: Tensor
    tokens: Tensor
    vocab_size: int | None = None
    orders: tuple[int, ...] = (1, 2, 3, 4)
    smoothing: float = 1.0
    common: int = 500
    batch_size: int = 32

    def __post_init__(self) -> None:
        corpus = torch.as_tensor(self.corpus)
        corpus = probe_tokens(corpus[None] if corpus.ndim == 1 else corpus, "NgramStages", "corpus")
        orders = tuple(sorted({int(order) for order in self.orders}))
        if not orders or orders[0] < 1:
            raise DataError(f"NgramStages needs orders of at least 1, got {self.orders}")
        tokens = probe_tokens(self.tokens, "NgramStages", shortest=max(orders[-1], 2))
        if corpus.shape[1] < orders[-1]:
            raise DataError(f"NgramStages needs a corpus with rows of at least {orders[-1]} tokens, got {corpus.shape}")
        largest, least = (int(f(corpus)) for f in (torch.max, torch.min))
        largest, least = max(largest, int(tokens.max())), min(least, int(tokens.min()))
        vocab_size = largest + 1 if self.vocab_size is None else int(self.vocab_size)
        if least < 0 or largest >= vocab_size:
            raise DataError(f"NgramStages: tokens must be in 0 .. {vocab_size - 1}, got {least} .. {largest}")
        if not (self.smoothing >= 0 and self.common >= 0):
            raise DataError(f"NgramStages needs smoothing and common >= 0, got {self.smoothing} and {self.common}")
        for name, value in (("corpus", corpus), ("tokens", tokens), ("orders", orders), ("vocab_size", vocab_size)):
            object.__setattr__(self, name, value)
        unseen = float(np.isinf(self._fit.nats).mean())
        if unseen:
            raise DataError(
                f"NgramStages: {unseen:.1%} of the n-grams of the held-out tokens are not in the corpus: "
                "give smoothing > 0"
            )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        orders = list(self.orders)
        if self._grams:
            need_causal(snapshot, self.tokens, type(self).__name__)
        parts, *grams = read(snapshot, self)

        # per position: the model's own loss, and its cross-entropy with each n-gram model
        own = _finite(np.concatenate([nats for nats, _ in parts]))  # (batch, pos)
        cross = _finite(np.concatenate([cross for _, cross in parts], axis=1)[orders])  # (order, batch, pos)
        nats, entropy = self._fit.nats[orders], self._fit.entropy[orders]

        has_common = bool(self._grams)
        headline = ["kl", "loss_ratio", *(["common_ratio"] if has_common else [])]
        rows, unit = Rows(headline, first_position=self._start), "nats per token"
        self._put_means(rows, own, cross, nats, entropy)
        loss, loss_se = clustered_mean(own.sum(1), np.full(len(own), own.shape[1]))
        rows.put("loss", (), float(loss), float(loss_se), "loss of the model", units=unit, error="standard error")

        if has_common:
            last = dict(zip(self._grams, map(_in_order, grams), strict=True))
            ratios, errors, by_group = zip(*(self._common(order, last.get(order)) for order in orders), strict=True)
            why, label = "there is no context for n = 1", "loss of held-out n-grams / loss of common n-grams"
            about: dict[str, Any] = {"units": "1", "smallest_change": 0.1, "nan": why, "error": "standard error"}
            about["replicates"] = np.stack(by_group, 1)
            rows.put("common_ratio", "order", np.array(ratios), np.array(errors), label, **about)
        return rows.dataset(order=np.array(self.orders))

    def _put_means(self, rows: Rows, own: np.ndarray, cross: np.ndarray, nats: np.ndarray, entropy: np.ndarray) -> None:
        """Means over positions of what was measured there, and what uniform predictions would get."""
        unit, each = "nats per token", np.full(len(own), own.shape[1])

        def put(name: str, totals: np.ndarray, label: str, change: float | None = None) -> np.ndarray:
            mean, se = np.array([clustered_mean(total, each) for total in totals]).T
            groups = clustered_groups(totals.T, each)
            rows.put(name, "order", mean, se, label, units=unit, smallest_change=change, replicates=groups)
            return mean

        put("kl", (cross - entropy).sum(2), "KL from the n-gram model to the model", 0.05)
        put("cross_entropy", cross.sum(2), "cross-entropy of the n-gram model and the model")
        floor = put("entropy", entropy.sum(2), "entropy of the n-gram model")
        theirs = put("ngram_loss", nats.sum(2), "loss of the n-gram model")
        ratio, se = np.array([clustered_mean(own.sum(1), total) for total in nats.sum(2)]).T
        label = "loss of the model / loss of the n-gram model"
        theirs_each = nats.sum(2).T  # (batch, order)
        groups = clustered_groups(np.broadcast_to(own.sum(1)[:, None], theirs_each.shape), theirs_each)
        rows.put("loss_ratio", "order", ratio, se, label, units="1", smallest_change=0.02, replicates=groups)

        uniform = float(np.log(self.vocab_size or 1))
        rows.put("kl_reference", "order", uniform - floor, None, "kl of uniform predictions", units=unit)
        most = uniform / np.where(theirs > 0, theirs, np.nan)
        rows.put("loss_ratio_reference", "order", most, None, "loss_ratio of uniform predictions", units="1")

    def reads(self) -> list[Read]:
        """The text, and for each order the contexts of its n-grams, each once, alone in its sequence."""
        text = Read(self, self.tokens, self._score, self.batch_size, predicts="all")
        return [text, *(self._contexts(order) for order in self._grams)]

    def cost(self) -> Cost:
        """The contexts of n-grams are short: together they count as many sequences as have their tokens."""
        sequences, positions = self.tokens.shape
        contexts = [self._distinct(order)[0] for order in self._grams]
        count = sum(map(len, contexts))
        forwards = sequences + sum(context.numel() for context in contexts) // positions
        unembedded = sequences * positions + count
        # the text's log-probabilities again, in float64, against the counts
        softmaxes = 2 * sequences * positions + count
        before = trials(positions, 3)
        return Cost(
            forwards, positions=positions, unembedded=unembedded, softmaxes=softmaxes, trials=before, held=2 * CHUNK
        )

    @property
    def _start(self) -> int:
        """The first position that is predicted: all orders have their whole context there, and the model has some."""
        return max(self.orders[-1] - 1, 1)

    def _score(self, seen: Seen) -> tuple[np.ndarray, np.ndarray]:
        """The model's loss (batch, pos) and Σ_x p_n(x) (-log p(x)) for n = 0 .. max(orders), (n, batch, pos)."""
        log_ps, vocab_size = seen.log_p.flatten(0, 1), self.vocab_size or 0
        if log_ps.shape[1] < vocab_size:
            raise InstrumentError(
                f"NgramStages needs logits of at least the {vocab_size} tokens of the corpus, "
                f"{type(seen.model).__name__} has {log_ps.shape[1]}: give tokens of this model's vocabulary"
            )
        # the places that are predicted, of the minibatch and of all the held-out tokens
        (batch, length), start = seen.inputs.shape, self._start
        here = torch.arange(batch * length).reshape(batch, length)[:, start - 1 : -1].flatten()
        of_all = torch.arange(self.tokens.shape[0] * (length - start)).reshape(-1, length - start)[seen.rows].flatten()
        own, cross = seen.nats[:, start - 1 :].numpy(), []
        for at in seen.chunks():
            inside = (here >= at.start) & (here < at.stop)
            nats = -log_ps[here[inside].to(log_ps.device), :vocab_size].double()  # in float64: sums over a vocabulary
            cross.append(self._cross(nats, of_all[inside].numpy()).cpu())
        return own, torch.cat(cross, 1).numpy().reshape(-1, batch, length - start)

    def _cross(self, nats: Tensor, places: np.ndarray) -> Tensor:
        """Σ_x p_n(x) nats(x) for n = 0 .. max(orders), (n, place), from nats (place, vocab)."""
        cross = [nats.mean(1)]
        # the same recursion over n as that of p_n itself: what was seen, and smoothing times the order below
        for table in self._fit.tables:
            row = table.row[places]
            seen = expected(nats, table, row)
            total = torch.as_tensor(table.total[row], dtype=torch.float64, device=nats.device)
            lower = self.smoothing * cross[-1] if self.smoothing else torch.zeros_like(seen)
            mixed = (seen + lower) / (total + self.smoothing)
            cross.append(torch.where(total + self.smoothing > 0, mixed, cross[-1]))
        return torch.stack(cross)

    def _common(self, order: int, nats: np.ndarray | None) -> tuple[float, float, np.ndarray]:
        """Loss of the last token of held-out windows over that of the most frequent n-grams, its error, and groups;
        `nats` (n-gram,) are the losses of both, the windows first."""
        if nats is None:
            return float("nan"), float("nan"), np.full(REPLICATES, np.nan)
        windows = len(self._windows(order))
        (top, top_se, top_groups), (base, base_se, base_groups) = _mean(nats[:windows]), _mean(nats[windows:])
        ratio = top / base if base > 0 else float("nan")
        se = ratio * float(np.hypot(top_se / top, base_se / base)) if top > 0 else float("nan")
        # to first order: what a group adds to the upper loss, less what one adds to the lower
        return ratio, se, ratio + ((top_groups - top) - ratio * (base_groups - base)) / (base or np.nan)

    @property
    def _grams(self) -> list[int]:
        """The orders of which n-grams are read alone."""
        return [order for order in self.orders if order > 1] if self.common else []

    def _windows(self, order: int) -> Tensor:
        """Held-out windows (n-gram, order): the first of each sequence, then the second."""
        windows = self.tokens[:, : self.tokens.shape[1] // order * order].reshape(len(self.tokens), -1, order)
        return windows.transpose(0, 1).flatten(0, 1)[: self.common]

    def _distinct(self, order: int) -> tuple[Tensor, Tensor, Tensor]:
        """The contexts (context, order - 1) of held-out and frequent n-grams, each once; for each n-gram the number of
        its context, and its last token."""
        grams = torch.cat([self._windows(order), self._frequent[order]])
        contexts, which = grams[:, :-1].unique(dim=0, return_inverse=True)
        return contexts, which, grams[:, -1]

    def _contexts(self, order: int) -> Read:
        contexts, which, last = self._distinct(order)

        def nats(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
            """Which n-grams these contexts belong to, and the loss of their last tokens."""
            here = (which >= seen.rows.start) & (which < seen.rows.stop)
            log_p = seen.log_p[:, 0]
            row, token = (index.to(log_p.device) for index in (which[here] - seen.rows.start, last[here]))
            return here.nonzero()[:, 0].numpy(), -log_p[row, token].double().cpu().numpy()

        return Read(self, contexts, nats, self.batch_size * max(self.tokens.shape[1] // order, 1), predicts="last")

    @cached_property
    def _frequent(self) -> dict[int, Tensor]:
        """For each order above 1 the `common` most frequent n-grams of the corpus, (n-gram, order)."""
        frequent = {}
        for order in (order for order in self.orders if order > 1):
            grams = self.corpus.unfold(1, order, 1).reshape(-1, order)
            code = codes(self.corpus.numpy(), self.tokens.numpy(), order, self.vocab_size or 0)[0].ravel()
            _, first, count = np.unique(code, return_index=True, return_counts=True)
            frequent[order] = grams[torch.as_tensor(first[np.argsort(-count, kind="stable")[: self.common]])]
        return frequent

    @cached_property
    def _fit(self) -> Ngrams:
        assert self.vocab_size is not None
        corpus, tokens = self.corpus.numpy(), self.tokens.numpy()
        return Ngrams.fit(corpus, tokens, self._start, self.orders[-1], self.vocab_size, self.smoothing)


def _in_order(parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The values of pairs (index, value), by index."""
    index, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    return values[np.argsort(index)]


def _finite(nats: np.ndarray) -> np.ndarray:
    return np.where(np.isinf(nats), np.nan, nats)


def _mean(values: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Mean, standard error, and the mean by groups, as many for few values as for many: those left over hold none."""
    mean, se = clustered_mean(values, np.ones(len(values)))
    empty = np.zeros(max(REPLICATES - len(values), 0))
    groups = clustered_groups(np.append(values, empty), np.append(np.ones(len(values)), empty))
    return float(mean), float(se), groups
