"""What a kernel is."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Sampler(Protocol):
    """A kernel: pure functions over stacked parameters that may use up the memory they are given.

    `noise_gain`, where a kernel has it, is how much more minibatch noise widens its law than that of SGLD at equal lr.
    `step` updates the position in place (the model's parameters are views of it) and returns the next state.
    """

    def init(self, position: Tensor, center: Tensor) -> Any: ...

    def step(self, state: Any, grad: Tensor, noise: Tensor, mask: Tensor | None = None) -> Any: ...
