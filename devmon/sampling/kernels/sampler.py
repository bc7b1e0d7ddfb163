"""What a kernel is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

from torch import Tensor

Normals = Iterator[
    Iterator[tuple[slice, Tensor]]
]  # step after step, block after block of the parameters: (chain, part)


class Sampler(Protocol):
    """A kernel whose step needs no gradient and no noise of all parameters at once.

    Positions are (chain, parameter), and the model's parameters are views of them. A step is `pull` for the gradient of
    every parameter, as it comes from the backward pass and in any order, then `turn` once, then `push` for the noise of
    every block. `part` says which parameters they are: the other tensors are (chain, part).

    `noise_gain`, where a kernel has it, is how much more minibatch noise widens its law than that of SGLD at equal lr.
    `copies` tells how many numbers a parameter the kernel keeps for a chain, its position counted.
    """

    copies: ClassVar[int]

    def init(self, position: Tensor, mask: Tensor | None) -> Any:
        """The state at `position`, which the steps overwrite. Where `mask` (parameter,) is False a parameter rests."""
        ...

    def pull(self, state: Any, part: slice, away: Tensor, grad: Tensor) -> None:
        """Move by the gradient of the mean loss, `grad`, and the distance from w*, `away`; both stay as they are."""
        ...

    def turn(self, state: Any) -> None:
        """What depends on all parameters, between their gradients and their noise."""
        ...

    def push(self, state: Any, part: slice, noise: Tensor) -> None:
        """Move by standard normals, which are used up."""
        ...


def force(kernel: Any, position: Tensor, away: Tensor, grad: Tensor) -> Tensor:
    """F = nbeta ∇L_B + gamma (w − w*) + prior w, for a kernel that has these three, in memory of its own."""
    drift = (grad * kernel.nbeta).add_(away, alpha=kernel.gamma)
    return drift.add_(position, alpha=kernel.prior) if kernel.prior else drift


def masked(values: Tensor, mask: Tensor | None, part: slice) -> Tensor:
    """`values` (chain, part), set to 0 in place where a parameter rests."""
    return values if mask is None else values.mul_(mask[part])
