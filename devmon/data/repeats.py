"""Random tokens repeated with a period of its own in every sequence: the probe of induction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from devmon.errors import DataError


@dataclass(frozen=True, eq=False)
class RepeatProbe:
    """Repeated random tokens and where their repeats can be measured.

    tokens: (batch, pos) int64; period: (batch,) int64; copy: (batch, pos) int64, which copy a place belongs to, from 0
    (-1 at a `bos`); query: (batch, pos) bool, the places of the *second* copy whose token stands at no earlier place
    but the one a period back. From the third copy on the place to attend to is not unique (an ideal induction head
    divides its attention among the earlier copies), so those places are left out.
    For a query q the earlier occurrence is q - period; an induction head attends to q - period + 1.
    """

    tokens: Tensor
    period: Tensor
    copy: Tensor
    query: Tensor


def repeats(
    vocab_size: int,
    sequences: int = 64,
    length: int = 64,
    seed: int = 0,
    bos: int | None = None,
    exclude: Sequence[int] = (),
) -> RepeatProbe:
    """Draws `sequences` rows of uniform tokens, each repeated with its own period until `length` is full.

    The period is uniform over n // 4 .. n // 2, both included, n = length less one where a `bos` token stands first.
    Tokens are drawn from 0 .. vocab_size - 1 without `bos` and `exclude`. The seed determines all, on every platform.
    Raises DataError where the length is under 8 or hardly any place is free of accidental collisions. The answer is
    cached: do not write into it.

    >>> probe = repeats(1000, sequences=1, length=8, seed=1)
    >>> probe.tokens.tolist(), probe.period.tolist(), probe.query.nonzero()[:, 1].tolist()
    ([[139, 124, 368, 139, 124, 368, 139, 124]], [3], [3, 4, 5])
    """
    return _repeats(vocab_size, sequences, length, seed, bos, tuple(exclude))


@lru_cache(maxsize=16)
def _repeats(
    vocab_size: int, sequences: int, length: int, seed: int, bos: int | None, exclude: tuple[int, ...]
) -> RepeatProbe:
    start = 0 if bos is None else 1
    allowed = torch.tensor(sorted(set(range(vocab_size)) - {*exclude, bos}))
    if sequences < 1 or length - start < 8 or len(allowed) < 2:
        raise DataError(
            "repeats needs sequences >= 1, at least 8 places (without bos) and two tokens to draw from, "
            f"got sequences={sequences}, length={length}, bos={bos}, {len(allowed)} tokens"
        )
    generator = torch.Generator().manual_seed(seed)
    longest = (length - start) // 2
    period = torch.randint((length - start) // 4, longest + 1, (sequences,), generator=generator)
    base = allowed[torch.randint(len(allowed), (sequences, longest), generator=generator)]
    place = torch.arange(length) - start
    tokens = base.gather(1, place.clamp(min=0) % period[:, None])
    if bos is not None:
        tokens[:, 0] = bos
    copy = place.div(period[:, None], rounding_mode="floor")
    same = (tokens[:, :, None] == tokens[:, None, :]).tril(-1).sum(-1)  # (batch, pos): equal tokens earlier on
    query = (copy == 1) & (same == 1)
    if int(query.sum()) < sequences:
        raise DataError(
            f"repeats found {int(query.sum())} places free of collisions in {sequences} sequences of {length}: "
            f"raise vocab_size (now {vocab_size}) or shorten length"
        )
    return RepeatProbe(tokens, period, copy, query)


@dataclass(frozen=True)
class OnRepeats:
    """The fields of instruments that read repeated random tokens (`repeats`), to be inherited before their own."""

    vocab_size: int
    sequences: int = 64
    length: int = 64
    seed: int = 0
    bos: int | None = None
    exclude: tuple[int, ...] = ()

    @property
    def _repeats(self) -> RepeatProbe:
        return repeats(self.vocab_size, self.sequences, self.length, self.seed, self.bos, self.exclude)


def best_fixed_offset(total: Tensor, queries: Tensor, first: int = 0) -> Tensor:
    """The best score of one fixed offset for all queries, which looks at positions and never at content.

    `total` (..., q, k) holds sums over sequences of what query q scores at place k, `queries` (q,) the number of
    queries at q. Returns (...): the maximum over offsets o >= `first` of Σ_q total[q, q - o] / Σ_{q >= o} queries[q],
    over the offsets that exist for at least half of the queries.
    """
    rates = []
    for offset in range(first, len(queries)):
        count = queries[offset:].sum()
        if 2 * count < queries.sum():
            break
        rates.append(total.diagonal(-offset, -2, -1).sum(-1) / count)
    return torch.stack(rates).amax(0)
