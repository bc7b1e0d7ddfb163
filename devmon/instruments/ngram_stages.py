"""n-gram stages: how close a language model is to the unigram, bigram, trigram statistics of its corpus."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from scipy.special import xlogy
from torch import Tensor

from devmon.anatomy import logits, next_token
from devmon.cost import Cost
from devmon.data import ByContent, clustered_mean, minibatches, probe_tokens
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
        fit, start = self._fit, self._start
        parts = [self._score(snapshot.model, rows) for rows in minibatches(len(self.tokens), self.batch_size)]
        own = _finite(np.concatenate([nats for nats, _ in parts]))  # (batch, place)
        cross = _finite(
            np.concatenate([cross for _, cross in parts], axis=1)[list(self.orders)]
        )  # (order, batch, place)
        nats, entropy = fit.nats[list(self.orders)], fit.entropy[list(self.orders)]
        each = np.full(len(own), own.shape[1])
        loss, loss_se = clustered_mean(own.sum(1), each)
        uniform = float(np.log(self.vocab_size or 1))
        rows = {
            "kl": ((cross - entropy).sum(2), each, "KL from the n-gram model to the model", "nats per token"),
            "cross_entropy": (cross.sum(2), each, "cross-entropy of the n-gram model and the model", "nats per token"),
            "entropy": (entropy.sum(2), each, "entropy of the n-gram model", "nats per token"),
            "ngram_loss": (nats.sum(2), each, "loss of the n-gram model", "nats per token"),
            "loss_ratio": (own.sum(1), nats.sum(2), "loss of the model / loss of the n-gram model", "1"),
        }
        dataset = xr.Dataset(
            coords={"order": np.array(self.orders)},
            attrs={
                "headline": ["kl", "loss_ratio"] + (["common_ratio"] if self.common and self.orders[-1] > 1 else []),
                "first_position": start,
            },
        )
        for name, (total, count, long_name, units) in rows.items():
            pairs = [
                clustered_mean(total if total.ndim == 1 else total[i], count if count.ndim == 1 else count[i])
                for i in range(len(self.orders))
            ]
            mean, se = (np.array([float(pair[j]) for pair in pairs]) for j in (0, 1))
            dataset[name] = ("order", mean, {"long_name": long_name, "units": units})
            dataset[f"{name}_se"] = ("order", se, {"long_name": "standard error over sequences", "units": units})
        dataset["kl"].attrs["smallest_change"] = 0.05
        dataset["loss_ratio"].attrs["smallest_change"] = 0.02
        theirs = dataset["ngram_loss"].values
        references = {
            "kl_reference": (uniform - dataset["entropy"].values, "kl of uniform predictions", "nats per token"),
            "loss_ratio_reference": (
                uniform / np.where(theirs > 0, theirs, np.nan),
                "loss_ratio of uniform predictions",
                "1",
            ),
        }
        for name, (values, long_name, units) in references.items():
            dataset[name] = ("order", values, {"long_name": long_name, "units": units})
        dataset["loss"] = ((), float(loss), {"long_name": "loss of the model", "units": "nats per token"})
        dataset["loss_se"] = ((), float(loss_se), {"long_name": "standard error", "units": "nats per token"})
        if self.common and self.orders[-1] > 1:
            ratios = np.array([self._common(snapshot.model, order) for order in self.orders])
            about = {"long_name": "loss of held-out n-grams / loss of common n-grams", "units": "1"}
            dataset["common_ratio"] = ("order", ratios[:, 0], about | {"nan": "there is no context for n = 1"})
            dataset["common_ratio"].attrs["smallest_change"] = 0.1
            dataset["common_ratio_se"] = ("order", ratios[:, 1], {"long_name": "standard error", "units": "1"})
        return dataset

    def cost(self) -> Cost:
        """The n-grams, held-out and common, are short: together they count as many sequences as have their tokens."""
        orders = [order for order in self.orders if order > 1] if self.common else []
        grams = 2 * self.common * sum(orders) // self.tokens.shape[1]
        return Cost(forwards=len(self.tokens) + grams, positions=self.tokens.shape[1])

    @property
    def _start(self) -> int:
        """The first position that is predicted: all orders have their whole context there, and the model has some."""
        return max(self.orders[-1] - 1, 1)

    def _score(self, model: torch.nn.Module, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """The model's loss (batch, place) and Σ_x p_n(x) (-log p(x)) for n = 0 .. max(orders), (n, batch, place)."""
        scores = logits(model, self.tokens[rows], type(self).__name__)[:, self._start - 1 : -1]
        vocab_size, wide = self.vocab_size or 0, scores.shape[-1]
        if wide < vocab_size:
            raise InstrumentError(
                f"NgramStages needs logits of at least the {vocab_size} tokens of the corpus, "
                f"{type(model).__name__} has {wide}: give tokens of this model's vocabulary"
            )
        scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        nats = -scores.log_softmax(-1)[..., :vocab_size].flatten(0, 1).double()  # (place, vocab)
        shape = self.tokens[rows, self._start :].shape
        target = self.tokens[rows, self._start :].flatten().to(nats.device)
        own, cross = nats.gather(1, target[:, None])[:, 0], [nats.mean(1)]
        for table in self._fit.tables:
            row = table.row.reshape(len(self.tokens), -1)[rows].flatten()
            seen = _seen(nats, table, row)
            total = torch.as_tensor(table.total[row], dtype=torch.float64, device=nats.device)
            lower = self.smoothing * cross[-1] if self.smoothing else torch.zeros_like(seen)
            mixed = (seen + lower) / (total + self.smoothing)
            cross.append(torch.where(total + self.smoothing > 0, mixed, cross[-1]))
        return own.cpu().numpy().reshape(shape), torch.stack(cross).cpu().numpy().reshape(-1, *shape)

    def _common(self, model: torch.nn.Module, order: int) -> tuple[float, float]:
        """Loss of the last token of held-out windows over that of the most frequent n-grams, and its standard error."""
        if order == 1:
            return float("nan"), float("nan")
        windows = self.tokens[:, : self.tokens.shape[1] // order * order].reshape(len(self.tokens), -1, order)
        windows = windows.transpose(0, 1).flatten(0, 1)[: self.common]  # the first of each sequence, then the second
        held_out, often = (self._last(model, grams) for grams in (windows, self._frequent[order]))
        (top, top_se), (base, base_se) = (_mean(held_out), _mean(often))
        ratio = top / base if base > 0 else float("nan")
        return ratio, ratio * float(np.hypot(top_se / top, base_se / base)) if top > 0 else float("nan")

    def _last(self, model: torch.nn.Module, grams: Tensor) -> np.ndarray:
        return np.concatenate(
            [
                next_token(model, grams[rows], type(self).__name__)[0][:, -1].numpy()
                for rows in minibatches(len(grams), self.batch_size * max(self.tokens.shape[1] // grams.shape[1], 1))
            ]
        )

    @cached_property
    def _frequent(self) -> dict[int, Tensor]:
        """For each order above 1 the `common` most frequent n-grams of the corpus, (n-gram, order)."""
        found = {}
        for order in (order for order in self.orders if order > 1):
            grams = self.corpus.unfold(1, order, 1).reshape(-1, order)
            code = _codes(self.corpus.numpy(), self.tokens.numpy(), order, self.vocab_size or 0)[0].ravel()
            _, first, count = np.unique(code, return_index=True, return_counts=True)
            found[order] = grams[torch.as_tensor(first[np.argsort(-count, kind="stable")[: self.common]])]
        return found

    @cached_property
    def _fit(self) -> _Fit:
        corpus, tokens, vocab_size = self.corpus.numpy(), self.tokens.numpy(), self.vocab_size or 0
        target = tokens[:, self._start :].ravel()
        tables = []
        for order in range(1, self.orders[-1] + 1):
            if order == 1:
                known, wanted = np.zeros_like(corpus), np.zeros_like(target)
            else:
                codes = _codes(corpus, tokens, order - 1, vocab_size)
                known, wanted = codes[0][:, :-1], codes[1][:, self._start - order + 1 : -1].ravel()
            tables.append(_table(known.ravel(), corpus[:, order - 1 :].ravel(), wanted, vocab_size))
        shape = (len(tables) + 1, len(tokens), -1)
        nats, entropy = _fitted(tables, target, vocab_size, self.smoothing)
        return _Fit(tables, nats.reshape(shape), entropy.reshape(shape))


class _Table(NamedTuple):
    """How often each token followed each of the contexts of the held-out places.

    row (place,): which context; of context r: total[r] tokens followed it in the corpus, the distinct ones are
    token[starts[r] : ends[r]], in order, times[starts[r] : ends[r]] times; place[r] is a place where it stands.
    """

    row: np.ndarray
    place: np.ndarray
    total: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    token: np.ndarray
    times: np.ndarray


class _Fit(NamedTuple):
    """The tables of orders 1, 2, …; for n = 0, 1, … the loss and the entropy of p_n, (n, batch, place)."""

    tables: list[_Table]
    nats: np.ndarray
    entropy: np.ndarray


def _codes(corpus: np.ndarray, tokens: np.ndarray, width: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """A number for the `width` tokens that end at each place from width - 1 on, equal where these tokens are."""
    found = corpus.astype(np.int64), tokens.astype(np.int64)
    for step in range(1, width):
        pairs = [code[:, :-1] * vocab_size + text[:, step:] for code, text in zip(found, (corpus, tokens), strict=True)]
        joined = np.unique(np.concatenate([pair.ravel() for pair in pairs]), return_inverse=True)[1]
        cut = pairs[0].size
        found = joined[:cut].reshape(pairs[0].shape), joined[cut:].reshape(pairs[1].shape)
    return found


def _table(known: np.ndarray, following: np.ndarray, wanted: np.ndarray, vocab_size: int) -> _Table:
    contexts, place, row = np.unique(wanted, return_index=True, return_inverse=True)
    at = np.searchsorted(contexts, known).clip(max=len(contexts) - 1)
    used = contexts[at] == known
    key, count = np.unique(at[used] * vocab_size + following[used], return_counts=True)
    of, token = key // vocab_size, key % vocab_size
    starts, ends = (np.searchsorted(of, np.arange(len(contexts)), side) for side in ("left", "right"))
    total = np.bincount(of, count, len(contexts))
    return _Table(row, place, total, starts, ends, token, count)


def _fitted(
    tables: list[_Table], target: np.ndarray, vocab_size: int, smoothing: float
) -> tuple[np.ndarray, np.ndarray]:
    """Loss at the target and entropy of p_0, p_1, … at every place, (n, place)."""
    everywhere = np.arange(len(target))
    with np.errstate(divide="ignore"):  # no chance is an infinite loss, which is refused
        nats = [-np.log(_chance(tables[:n], everywhere, target, vocab_size, smoothing)) for n in range(len(tables) + 1)]
    entropy = [np.full(len(target), np.log(vocab_size))]
    for n, table in enumerate(tables):
        # what followed h has chances of its own; for all other x, p_n(x) is share * p_{n-1}(x)
        weight = table.total + smoothing
        share = np.divide(smoothing, weight, out=np.ones_like(weight), where=weight > 0)
        of = np.repeat(np.arange(len(table.total)), table.ends - table.starts)
        lower = share[of] * _chance(tables[:n], table.place[of], table.token, vocab_size, smoothing)
        upper = table.times / weight[of] + lower
        change = np.bincount(of, xlogy(lower, lower) - xlogy(upper, upper), len(share))
        rest = share * entropy[-1][table.place] - xlogy(share, share)
        entropy.append((rest + change)[table.row])
    return np.array(nats), np.array(entropy)


def _chance(
    tables: list[_Table], place: np.ndarray, token: np.ndarray, vocab_size: int, smoothing: float
) -> np.ndarray:
    """p_n(token | the context at place), n the number of tables, of pairs (place, token)."""
    chance = np.full(len(place), 1 / vocab_size)
    for table in tables:
        row = table.row[place]
        keys = np.repeat(np.arange(len(table.total)), table.ends - table.starts) * vocab_size + table.token
        at = np.searchsorted(keys, row * vocab_size + token).clip(max=max(len(keys) - 1, 0))
        count = np.where(keys[at] == row * vocab_size + token, table.times[at], 0) if len(keys) else 0
        weight = table.total[row] + smoothing
        chance = np.divide(count + smoothing * chance, weight, out=chance.copy(), where=weight > 0)
    return chance


def _seen(nats: Tensor, table: _Table, row: np.ndarray) -> Tensor:
    """Σ_x c(h x) nats(x) of every place, whose context is `row` of the table; (place,) from nats (place, vocab)."""
    if len(table.total) == 1:  # unigrams: one long list for all
        token, weight = (torch.as_tensor(values, device=nats.device) for values in (table.token, table.times))
        return nats[:, token] @ weight.double()
    count = table.ends[row] - table.starts[row]
    place = torch.as_tensor(np.repeat(np.arange(len(row)), count), device=nats.device)
    entry = np.repeat(table.starts[row] - np.cumsum(count) + count, count) + np.arange(count.sum())
    token, weight = (torch.as_tensor(values[entry], device=nats.device) for values in (table.token, table.times))
    lengths = torch.as_tensor(count, device=nats.device)  # index_add would sum in any order on a GPU
    return torch.segment_reduce(weight * nats[place, token], "sum", lengths=lengths, initial=0.0)


def _finite(nats: np.ndarray) -> np.ndarray:
    return np.where(np.isinf(nats), np.nan, nats)


def _mean(values: np.ndarray) -> tuple[float, float]:
    mean, se = clustered_mean(values, np.ones(len(values)))
    return float(mean), float(se)
