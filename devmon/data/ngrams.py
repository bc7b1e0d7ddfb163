"""n-gram models of a corpus, tabulated for the contexts of the texts that they are to predict."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.special import xlogy
from torch import Tensor


class Contexts(NamedTuple):
    """How often each token followed each of the contexts of the held-out positions ("places", numbered through).

    - `row` (place,): which context it has.
    - `place` (row,): a place that has the context.
    - `total` (row,): how many tokens followed it in the corpus.
    - `starts`, `ends` (row,): the distinct ones are token[starts[row] : ends[row]], in order.
    - `token`, `times` (entry,): each of them, and how often it followed.
    """

    row: np.ndarray
    place: np.ndarray
    total: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    token: np.ndarray
    times: np.ndarray


class Ngrams(NamedTuple):
    """The tables of orders 1, 2, …; for n = 0, 1, … the loss and the entropy of p_n, (n, batch, pos)."""

    tables: list[Contexts]
    nats: np.ndarray
    entropy: np.ndarray

    @classmethod
    def fit(
        cls, corpus: np.ndarray, tokens: np.ndarray, start: int, largest: int, vocab_size: int, smoothing: float
    ) -> Ngrams:
        """Of the rows of a corpus, for the held-out `tokens` (batch, pos) from position `start` on."""
        target = tokens[:, start:].ravel()
        tables = []
        for order in range(1, largest + 1):
            if order == 1:  # the empty context, the same everywhere
                known, wanted = np.zeros_like(corpus), np.zeros_like(target)
            else:
                ours, theirs = codes(corpus, tokens, order - 1, vocab_size)
                known, wanted = ours[:, :-1], theirs[:, start - order + 1 : -1].ravel()
            tables.append(_table(known.ravel(), corpus[:, order - 1 :].ravel(), wanted, vocab_size))
        shape = (len(tables) + 1, len(tokens), -1)
        nats, entropy = _fitted(tables, target, vocab_size, smoothing)
        return cls(tables, nats.reshape(shape), entropy.reshape(shape))


def codes(corpus: np.ndarray, tokens: np.ndarray, width: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """A number for the `width` tokens that end at each place from width - 1 on, equal where these tokens are."""
    numbers = corpus.astype(np.int64), tokens.astype(np.int64)
    for step in range(1, width):
        # numbered anew after every token: vocab_size ** width would overflow
        texts = zip(numbers, (corpus, tokens), strict=True)
        pairs = [code[:, :-1] * vocab_size + text[:, step:] for code, text in texts]
        joined = np.unique(np.concatenate([pair.ravel() for pair in pairs]), return_inverse=True)[1]
        cut = pairs[0].size
        numbers = joined[:cut].reshape(pairs[0].shape), joined[cut:].reshape(pairs[1].shape)
    return numbers


def _table(known: np.ndarray, following: np.ndarray, wanted: np.ndarray, vocab_size: int) -> Contexts:
    """What followed (`following`) the contexts `known` of the corpus, for those `wanted` at the held-out positions."""
    contexts, place, row = np.unique(wanted, return_index=True, return_inverse=True)
    at = np.searchsorted(contexts, known).clip(max=len(contexts) - 1)
    used = contexts[at] == known
    key, count = np.unique(at[used] * vocab_size + following[used], return_counts=True)
    of, token = key // vocab_size, key % vocab_size
    starts, ends = (np.searchsorted(of, np.arange(len(contexts)), side) for side in ("left", "right"))
    total = np.bincount(of, count, len(contexts))
    return Contexts(row, place, total, starts, ends, token, count)


def _fitted(
    tables: list[Contexts], target: np.ndarray, vocab_size: int, smoothing: float
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
    tables: list[Contexts], place: np.ndarray, token: np.ndarray, vocab_size: int, smoothing: float
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


def expected(nats: Tensor, table: Contexts, row: np.ndarray) -> Tensor:
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
