"""What the items of a set are called: the tokens before it, and the token itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from devmon.sampling.data import Examples, leaves
from devmon.snapshot import derive_seed

# Tokens before the one that is predicted, in a label. Moves the bytes of a row.
CONTEXT = 6


def label(examples: Examples, shape: tuple[int, ...], item: int, words: Sequence[str]) -> str:
    """ "… the cat ▸ sat": the last tokens before the item's and its own, by `words` or number; else "example 3"."""
    tokens = tokens_of(examples.tree)
    if len(shape) == 1 or tokens is None or tokens.shape[1] != shape[1] + 1:
        return f"example {item}" if len(shape) == 1 else f"example {item // shape[1]}, {item % shape[1]}"
    row, place = divmod(item, shape[1])
    ids = tokens[row, max(0, place + 1 - CONTEXT) : place + 2].tolist()
    names = [words[i] if i < len(words) else str(i) for i in ids]
    between = "" if words else " "
    return f"{between.join(names[:-1])} ▸ {names[-1]}"


def tokens_of(tree: Any) -> Tensor | None:
    """The tokens (example, pos) of a set, None where it has none."""
    return next((t for t in leaves(tree) if t.ndim == 2 and not t.is_floating_point()), None)


def chosen(sizes: Sequence[int], count: int) -> np.ndarray:
    """Which items of sets of these sizes are kept, at most `count`: (kept, 2) of set and item.

    As many of each set; what a small set leaves goes to the others. A function of the sizes alone, so that all
    checkpoints and runs keep the same.
    """
    rows: dict[int, np.ndarray] = {}
    for place, which in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i])):
        share = count // (len(sizes) - place)
        generator = torch.Generator().manual_seed(derive_seed(0, "items", which))
        items = torch.randperm(sizes[which], generator=generator)[:share].sort().values.numpy()
        rows[which] = np.stack([np.full(len(items), which), items], 1)
        count -= len(items)
    return np.concatenate([rows[which] for which in range(len(sizes))])


def evenly(examples: Examples, count: int) -> Tensor:
    """Numbers of at most `count` examples at equal distances: the same of each data of this length."""
    return torch.arange(examples.n)[:: max(1, examples.n // count)][:count]


def shuffled(examples: Examples, count: int) -> Examples | None:
    """The first `count` examples with their tokens in random order, the same of each; None without tokens."""
    tokens = tokens_of(examples.tree)
    if tokens is None or isinstance(examples.tree, dict) or count < 1:
        return None
    rows = tokens[:count]
    generator = torch.Generator().manual_seed(derive_seed(0, "shuffled"))
    order = torch.rand(rows.shape, generator=generator).argsort(1)
    return Examples(rows.cpu().gather(1, order), len(rows))
