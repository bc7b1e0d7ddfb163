"""Pairs of inputs for interchange interventions, with what an algorithm says when one of its variables is exchanged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from devmon.data.probe import ByContent, probe_inputs
from devmon.errors import DataError

WIDTH = 4  # numbers of a vector of hierarchical equality, as in 2303.02536


@dataclass(frozen=True, eq=False)
class Interchanges(ByContent):
    """Inputs `base` and `source` (pair, …), and what an algorithm says of them, as classes or tokens (pair,) int64.

    `label` is its output on the base, `counterfactual` its output on the base when one of its variables has the value
    of the source, `rival` the same of another algorithm, where one is held against it.

    Raises DataError for shapes that do not fit, or fewer than 8 pairs.
    """

    base: Tensor
    source: Tensor
    label: Tensor
    counterfactual: Tensor
    rival: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("base", "source"):
            object.__setattr__(self, name, probe_inputs(getattr(self, name), f"Interchanges.{name}"))
        if self.base.shape != self.source.shape or len(self.base) < 8:
            raise DataError(
                f"Interchanges needs base and source of one shape (pair, …), 8 pairs at least, got "
                f"{tuple(self.base.shape)} and {tuple(self.source.shape)}"
            )
        for name in ("label", "counterfactual", "rival"):
            given = getattr(self, name)
            if name == "rival" and given is None:
                continue
            given = torch.as_tensor(given)
            if given.shape != (len(self.base),) or given.is_floating_point() or int(given.min()) < 0:
                raise DataError(
                    f"Interchanges needs {name} (pair,) of classes from 0, one for each of the {len(self.base)} pairs, "
                    f"got {tuple(given.shape)} of {given.dtype}"
                )
            object.__setattr__(self, name, given.detach().to("cpu", torch.int64, copy=True))


def equality_items(count: int, generator: torch.Generator, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Inputs (count, 4 · width) of hierarchical equality and whether a = b and c = d, (count, 2) bool.

    Four vectors a, b, c, d with entries uniform in [-.5, .5]; b is a, and d is c, with probability ½ each. The task is
    whether the two answers are the same, [a = b] = [c = d] (Geiger et al. 2023, 2303.02536).
    """
    vectors = torch.rand(count, 4, width, generator=generator) - 0.5
    equal = torch.rand(count, 2, generator=generator) < 0.5
    for second, same in ((1, equal[:, 0]), (3, equal[:, 1])):
        vectors[same, second] = vectors[same, second - 1]
    return vectors.flatten(1), equal


def hierarchical_equality(pairs: int, seed: int = 0, width: int = WIDTH) -> Interchanges:
    """Pairs of `equality_items`, with v = [a = b] exchanged: 1 where [a = b] of the source is [c = d] of the base.

    The rival exchanges the vector a itself: its a is another than the base's b, so that it says [c = d] = false.

    >>> made = hierarchical_equality(10_000)
    >>> share = float((made.counterfactual != made.label).double().mean())
    >>> abs(share - 0.5) < 0.02  # by four standard errors
    True
    """
    generator = torch.Generator().manual_seed(seed)
    (base, own), (source, other) = (equality_items(pairs, generator, width) for _ in range(2))
    label, counterfactual = own[:, 0] == own[:, 1], other[:, 0] == own[:, 1]
    return Interchanges(base, source, label.long(), counterfactual.long(), (~own[:, 1]).long())
