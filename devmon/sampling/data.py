"""Data as indexed examples: whatever form it comes in, a batch leaves in that form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from devmon.errors import DataError
from devmon.sampling.constants import SPARE_SIGMAS

Tree = Any  # a tensor, or tuples, lists and mappings of such


@dataclass(frozen=True)
class Examples:
    """`n` examples in memory: every tensor of `tree` has the example as its leading dimension.

    Batches are where the examples are and of their dtype, or of the dtype and on the device of `cast`.
    """

    tree: Tree
    n: int
    cast: tuple[torch.device, torch.dtype] | None = None

    def batch(self, index: Tensor) -> Tree:
        """The examples at `index` (any shape), as a tree of tensors of shape (*index.shape, ...)."""
        flat = index.flatten()
        return self._cast(map_tree(lambda t: t.index_select(0, flat.to(t.device)).unflatten(0, index.shape), self.tree))

    def reader(self) -> Callable[[Tensor], Tree]:
        """`batch`, but into memory that the next call with as many indices overwrites: no page is touched anew."""
        kept: dict[int, list[Tensor]] = {}

        def read(index: Tensor) -> Tree:
            flat = index.flatten()
            if len(flat) not in kept:
                kept[len(flat)] = [t.new_empty((len(flat), *t.shape[1:])) for t in leaves(self.tree)]
            buffers = iter(kept[len(flat)])
            found = map_tree(
                lambda t: torch.index_select(t, 0, flat.to(t.device), out=next(buffers)).unflatten(0, index.shape),
                self.tree,
            )
            return self._cast(found)

        return read

    def to(self, device: torch.device, dtype: torch.dtype, most: float = math.inf) -> Examples:
        """The same examples on `device`, floating-point tensors as `dtype`; of more than `most` bytes, only batches."""
        held = Examples(self.tree, self.n, (device, dtype))
        return held if self.nbytes() > most else Examples(held._cast(self.tree), self.n)

    def _cast(self, tree: Tree) -> Tree:
        if self.cast is None:
            return tree
        device, dtype = self.cast
        return map_tree(lambda t: t.to(device, dtype if t.is_floating_point() else None), tree)

    def nbytes(self) -> int:
        """Bytes of all examples."""
        return sum(t.nbytes for t in leaves(self.tree))

    def positions(self) -> int:
        """Tokens of one example: the second dimension of the first tensor of integers that has one, else 1."""
        return next((t.shape[1] for t in leaves(self.tree) if t.ndim > 1 and not t.is_floating_point()), 1)

    def numel(self) -> int:
        """Elements of one example, all tensors together."""
        return sum(math.prod(t.shape[1:]) for t in leaves(self.tree))


def as_examples(data: Any) -> Examples:
    """Indexed examples from a tensor (n, ...), a tuple or mapping of such, a list of batches, a DataLoader, a dataset
    of examples, or a Hugging Face dataset of equally long columns.

    A loader and a list are read once, and the batches they give are joined along their first dimension: the loss
    meets batches in the form that they had. Raises DataError for data that is empty, ragged or of another form.
    """
    tree = _tree(data)
    sizes = {len(t) if t.dim() else 0 for t in leaves(tree)}
    if len(sizes) != 1 or 0 in sizes:
        got = "no tensor" if not sizes else f"leading dimensions {sorted(sizes)}"
        raise DataError(f"expected at least one example and equally long tensors, got {got}: give data of one length")
    return Examples(tree, sizes.pop())


def draw_batches(n: int, size: int, count: int, generator: torch.Generator, *, replacement: bool = False) -> Tensor:
    """`count` independent batches of `size` indices below `n`, shape (count, size), int64.

    Examples within a batch are distinct unless `replacement`, so that `size == n` is the full batch. Batches never
    depend on each other: an epoch's leftovers, met by weights that the rest of it moved, would bias the score.
    """
    if replacement:
        return torch.randint(n, (count, size), generator=generator)
    if size == n:
        return torch.arange(n).expand(count, n)
    if 3 * size >= n:
        return torch.stack([torch.randperm(n, generator=generator)[:size] for _ in range(count)])
    # The first `size` different numbers of a list drawn with replacement that is long enough. `needed` numbers hold
    # that many different ones in the mean: n (1 − exp(−needed / n)) = size.
    needed = -n * math.log1p(-size / n)
    length = math.ceil(needed + SPARE_SIGMAS * math.sqrt(needed - size) + SPARE_SIGMAS)
    numbers = torch.randint(n, (count, length), generator=generator).numpy()
    # Sorted by number, then by place in the list, which lies in the low bits, all but the first of equal neighbours are
    # repeats.
    bits = (length - 1).bit_length()
    kind: type[np.integer[Any]] = np.int32 if n << bits <= 2**31 else np.int64
    order = (numbers.astype(kind) << bits) | np.arange(length, dtype=kind)
    order.sort(axis=1)
    value, later = order >> bits, order[:, 1:]
    rows, columns = np.nonzero(value[:, 1:] == value[:, :-1])
    first = np.ones((count, length), dtype=bool)
    first[rows, later[rows, columns] & ((1 << bits) - 1)] = False
    chosen = first & (np.cumsum(first, axis=1, dtype=np.int32) <= size)
    # Lists that were too short after all are replaced by a permutation; any `size` numbers stand in for it until then.
    short = np.flatnonzero(chosen.sum(1) < size)
    chosen[short] = np.arange(length) < size
    batches = torch.from_numpy(numbers[chosen].reshape(count, size))
    for row in short.tolist():
        batches[row] = torch.randperm(n, generator=generator)[:size]
    return batches


def map_tree(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """The tree with `function` applied to each tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tree(function, value) for key, value in tree.items()}
    return type(tree)(map_tree(function, value) for value in tree)


def leaves(tree: Tree) -> list[Tensor]:
    """The tensors of a tree in order."""
    tensors: list[Tensor] = []
    map_tree(tensors.append, tree)
    return tensors


def _tree(data: Any) -> Tree:
    if isinstance(data, Examples):
        return data.tree
    if isinstance(data, Tensor):
        return data
    if isinstance(data, tuple):
        return tuple(_tree(part) for part in data)
    if isinstance(data, Mapping):
        return {key: _tree(value) for key, value in data.items()}
    if isinstance(data, DataLoader):
        return _joined(list(data), "the DataLoader")
    if isinstance(data, list):
        return _joined(data, "the list of batches")
    if hasattr(data, "with_format") and hasattr(data, "column_names"):
        columns = data.with_format("torch")[:]
        ragged = [name for name, value in columns.items() if not isinstance(value, Tensor)]
        if ragged:
            raise DataError(f"columns {ragged} are no tensors of one shape: pad, chunk or remove them first")
        return dict(columns)
    if isinstance(data, Sequence) or (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        if len(data) == 0:
            raise DataError("expected at least one example, got an empty dataset")
        return default_collate([data[i] for i in range(len(data))])
    raise DataError(
        f"expected a tensor, a tuple or mapping of tensors, a list of batches, a DataLoader or a dataset with "
        f"__len__ and __getitem__, got {type(data).__name__}"
    )


def _joined(batches: list[Any], what: str) -> Tree:
    if not batches:
        raise DataError(f"expected at least one batch, got none from {what}")
    rows = [leaves(batch) for batch in batches if _is_batch(batch)]
    if len(rows) < len(batches) or len({len(row) for row in rows}) != 1:
        raise DataError(f"expected batches of tensors, all of one form, from {what}")
    try:
        columns = iter([torch.cat(column) for column in zip(*rows, strict=True)])
    except RuntimeError as error:
        raise DataError(f"the batches of {what} differ in more than their length: {error}") from error
    return map_tree(lambda _: next(columns), batches[0])


def _is_batch(batch: Any) -> bool:
    if isinstance(batch, Tensor):
        return batch.dim() > 0
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else None
    return parts is not None and len(parts) > 0 and all(_is_batch(part) for part in parts)
