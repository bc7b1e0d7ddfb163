"""Probes of matches that are not repeats: mapped tokens, items of one category, brackets of one depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from devmon.errors import DataError


@dataclass(frozen=True, eq=False)
class MatchProbe:
    """Sequences in which some places tell what comes next, but only through a match, and controls of the same kind.

    tokens: (batch, pos) int64. Item by item (n,): `row` and `query`, the place from which the next token is predicted;
    `target`, the place that tells it; `right`, its class. `other` (n, k) are places that the target could as well have
    been, `wrong` (n, k) classes that could as well have come, both filled up with -1. `classes` (vocab,) is the class
    of every token, -1 for none. Items are sorted by row.
    """

    tokens: Tensor
    row: Tensor
    query: Tensor
    target: Tensor
    other: Tensor
    classes: Tensor
    right: Tensor
    wrong: Tensor


Item = tuple[int, int, int, list[int], int, list[int]]  # row, query, target, other, right, wrong


def mapped(
    mapping: Tensor,
    sequences: int = 64,
    length: int = 64,
    seed: int = 0,
    bos: int | None = None,
    exclude: Sequence[int] = (),
) -> MatchProbe:
    """Random tokens x_0 … x_{p-1}, then `mapping` (vocab,) of each: f(x_0) … f(x_{p-1}); -1 maps to nothing.

    From the query f(x_i) the target is the place of x_{i+1}, the next token f(x_{i+1}). Within a sequence no token
    stands twice, and each f(x) is the image of one token alone, so no match is one of identity.
    """
    image = mapping.tolist()
    pairs: list[tuple[int, int]] = []
    used, images = {*exclude, bos}, set[int]()
    for token, other in enumerate(image):
        clash = token in used or other in used or token == other or other < 0 or other in images
        onward = image[other] if 0 <= other < len(image) else -1
        if clash or any(b == onward for _, b in pairs):
            continue
        pairs.append((token, other))
        used |= {token, other}
        images |= {other, onward} - {-1}
    table = torch.tensor(pairs or [(0, 0)])
    generator = torch.Generator().manual_seed(seed)
    longest = _longest(length, bos)
    if len(pairs) < longest:
        raise DataError(
            f"FuzzyInduction needs {longest} pairs of a token and its image that share no token, for length {length}; "
            f"mapping has {len(pairs)}: give a mapping with more, or lower length"
        )
    drawn = torch.stack([torch.randperm(len(pairs), generator=generator)[:longest] for _ in range(sequences)])
    halves = table[drawn]  # (batch, longest, 2)
    return _paired(halves[..., 0], halves[..., 1], torch.arange(len(image)), length, generator, bos)


def categorised(
    category: Tensor,
    sequences: int = 64,
    length: int = 64,
    seed: int = 0,
    bos: int | None = None,
    exclude: Sequence[int] = (),
) -> MatchProbe:
    """Items of p different categories, then other items of the same categories in the same order.

    `category` (vocab,) is the category of each token, -1 for none. From the query, an item of the second list, the
    target is the place after the item of its category in the first; the class that comes is the next one's category.
    """
    members: dict[int, list[int]] = {}
    for token, kind in enumerate(category.tolist()):
        if kind >= 0 and token != bos and token not in exclude:
            members.setdefault(kind, []).append(token)
    usable = [tokens for tokens in members.values() if len(tokens) > 1]
    longest = _longest(length, bos)
    if len(usable) < longest:
        raise DataError(
            f"AbstractInduction needs {longest} categories of two tokens or more for length {length}; category has "
            f"{len(usable)}: give more categories, or lower length"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(sequences):
        kinds = torch.randperm(len(usable), generator=generator)[:longest].tolist()
        pick = [torch.randperm(len(usable[kind]), generator=generator)[:2].tolist() for kind in kinds]
        rows.append([[usable[kind][i] for i in two] for kind, two in zip(kinds, pick, strict=True)])
    halves = torch.tensor(rows)
    return _paired(halves[..., 0], halves[..., 1], category, length, generator, bos)


def nested(
    opening: Sequence[int],
    closing: Sequence[int],
    vocab_size: int,
    sequences: int = 64,
    length: int = 64,
    seed: int = 0,
    bos: int | None = None,
) -> MatchProbe:
    """Random balanced brackets, each pair of a random type; open or close with equal chance where both can be.

    From a query that closes a bracket and is followed by another closing one, the target is the bracket that this one
    closes: at the query's depth, and never the last that was opened. The class that comes is its type; types are
    independent of each other and of the depths, so no other token tells it. Controls are the other opening brackets.
    """
    start = 0 if bos is None else 1
    generator = torch.Generator().manual_seed(seed)
    classes = torch.full((vocab_size,), -1)
    classes[list(closing)] = torch.arange(len(closing))
    rows, items = [], []
    for row in range(sequences):
        open_places: list[int] = []
        openers: list[int] = []
        kinds: dict[int, int] = {}
        tokens = [] if bos is None else [bos]
        closes: dict[int, int] = {}
        before: dict[int, list[int]] = {}
        choice = torch.rand(length, generator=generator).tolist()
        kind = torch.randint(len(opening), (length,), generator=generator).tolist()
        end = start + (length - start) // 2 * 2
        for place in range(start, end):
            if not open_places or (len(open_places) < end - place and choice[place] < 0.5):
                open_places.append(place)
                openers.append(place)
                kinds[place] = kind[place]
                tokens.append(opening[kind[place]])
            else:
                closes[place] = open_places.pop()
                tokens.append(closing[kinds[closes[place]]])
            before[place] = list(openers)
        rows.append(tokens + tokens[-1:] * (length - end))
        for query in range(start, end - 1):
            if query in closes and query + 1 in closes:
                target = closes[query + 1]
                other = [place for place in before[query] if place != target]
                items.append((row, query, target, other, kinds[target], [kinds[place] for place in other]))
    return _probe(torch.tensor(rows), items, classes)


def nearest_tokens(embedding: Tensor, chunk: int = 1024) -> Tensor:
    """A token map to learn from a trained model and then to freeze: the other token of the highest cosine, (vocab,)."""
    unit = torch.nn.functional.normalize(embedding.detach().float(), dim=-1)
    found = []
    for start in range(0, len(unit), chunk):
        likeness = unit[start : start + chunk] @ unit.T
        rows = torch.arange(len(likeness))
        likeness[rows, start + rows] = -2.0
        found.append(likeness.argmax(-1))
    return torch.cat(found).cpu()


def _longest(length: int, bos: int | None) -> int:
    longest = (length - (0 if bos is None else 1)) // 2
    if longest < 4:
        raise DataError(f"a probe of two halves needs length >= 8, and one more with a bos, got {length}")
    return longest


def _paired(
    first: Tensor, second: Tensor, classes: Tensor, length: int, generator: torch.Generator, bos: int | None
) -> MatchProbe:
    """Two halves of p tokens, p random in every sequence from longest // 2 to longest; then what fills the length."""
    sequences, longest = first.shape
    start = 0 if bos is None else 1
    period = torch.randint(max(longest // 2, 3), longest + 1, (sequences,), generator=generator).tolist()
    rows, items = [], []
    for row, p in enumerate(period):
        both = first[row, :p].tolist() + second[row, :p].tolist()
        rows.append([bos] * start + [both[i % (2 * p)] for i in range(length - start)])
        kinds = classes[second[row, :p]].tolist()
        for i in range(p - 2):  # the last of them has one place left that could have come
            other = [start + j for j in range(p) if j not in (i, i + 1)]
            items.append((row, start + p + i, start + i + 1, other, kinds[i + 1], kinds[i + 2 :]))
    return _probe(torch.tensor(rows), items, classes)


def _probe(tokens: Tensor, items: list[Item], classes: Tensor) -> MatchProbe:
    if len(items) < len(tokens):
        raise DataError(f"a probe of matches found {len(items)} in {len(tokens)} sequences: raise length")
    row, query, target, other, right, wrong = zip(*items, strict=True)
    return MatchProbe(
        tokens,
        torch.tensor(row),
        torch.tensor(query),
        torch.tensor(target),
        _filled(other),
        classes,
        torch.tensor(right),
        _filled(wrong),
    )


def _filled(lists: Sequence[list[int]]) -> Tensor:
    width = max(map(len, lists))
    return torch.tensor([each + [-1] * (width - len(each)) for each in lists])
