"""How one map holds queries, keys and values (`Layout.fused`): taken apart and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from devmon.errors import InstrumentError

AXES = tuple(" ".join(order) for order in permutations(("part", "head", "dim")))
PARTS, HEADS = "parts", "heads"  # "part head dim" and "head part dim", with grouped keys and values too
ORDERS = tuple(
    form if letters == "qkv" else f"{form}:{letters}"
    for form in (PARTS, HEADS, *(axes for axes in AXES if axes not in ("part head dim", "head part dim")))
    for letters in ("qkv", *(word for word in map("".join, permutations("qkv")) if word != "qkv"))
)
"""All ways that `Layout.fused` can say, the usual ones first."""


def spelled(fused: str) -> tuple[str, str]:
    """The form and the order of the letters of a `Layout.fused`. InstrumentError where it is none.

    >>> spelled("parts"), spelled("head dim part:kqv")
    (('parts', 'qkv'), ('head dim part', 'kqv'))
    """
    form, _, letters = fused.partition(":")
    letters = letters or "qkv"
    if form not in (PARTS, HEADS, *AXES) or sorted(letters) != ["k", "q", "v"]:
        raise InstrumentError(
            f"fused={fused!r} is no order: expected 'parts', 'heads' or three axes as in 'head dim part', and after a "
            "colon the order of queries, keys and values where it is not qkv, as in 'parts:kqv'"
        )
    return form, letters


def split(written: Tensor, fused: str, heads: int, kv_heads: int, size: int) -> list[Tensor]:
    """Queries, keys and values (…, head, dim) from what the fused map writes (…, all)."""
    form, letters = spelled(fused)
    counts = [heads if letter == "q" else kv_heads for letter in letters]
    if form == HEADS:
        grouped = written.unflatten(-1, (kv_heads, -1, size))
        found = [part.flatten(-3, -2) for part in grouped.split([count // kv_heads for count in counts], -2)]
    elif form == PARTS:
        found = [part.unflatten(-1, (-1, size)) for part in written.split([n * size for n in counts], -1)]
    else:
        axes, lengths = form.split(), _lengths(form, heads, kv_heads, size)
        spread = written.unflatten(-1, lengths)
        at = [axes.index(axis) - 3 for axis in ("part", "head", "dim")]
        found = list(spread.movedim(at, (-3, -2, -1)).unbind(-3))
    return [found[letters.index(letter)] for letter in "qkv"]


def join(parts: Sequence[Tensor], fused: str, heads: int, kv_heads: int, size: int) -> Tensor:
    """The inverse of `split`."""
    form, letters = spelled(fused)
    ordered = [parts["qkv".index(letter)] for letter in letters]
    if form == HEADS:
        return torch.cat([part.unflatten(-2, (kv_heads, -1)) for part in ordered], -2).flatten(-3)
    if form == PARTS:
        return torch.cat([part.flatten(-2) for part in ordered], -1)
    axes = form.split()
    _lengths(form, heads, kv_heads, size)
    at = [axes.index(axis) - 3 for axis in ("part", "head", "dim")]
    return torch.stack(ordered, -3).movedim((-3, -2, -1), at).flatten(-3)


def _lengths(form: str, heads: int, kv_heads: int, size: int) -> list[int]:
    if kv_heads != heads:
        raise InstrumentError(
            f"fused={form!r} has as many keys as queries, here are {heads} heads of queries and {kv_heads} of keys: "
            "use 'parts' or 'heads'"
        )
    return [{"part": 3, "head": heads, "dim": size}[axis] for axis in form.split()]
