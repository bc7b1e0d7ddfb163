"""How losses and gradients of chains are had: one chain after the other, or all at once with their weights stacked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from devmon.sampling.data import Examples
from devmon.sampling.flat import Flat, Take, widened

Score = Callable[[Tensor, Take], Tensor]


class Evaluator(Protocol):
    """Binds weights to a function of the batches' indices; `micro` examples go through the model at once."""

    flat: Flat
    examples: Examples
    micro: int

    def bind(self, values: Sequence[Tensor]) -> Score:
        """`score(index, take)` at the parameters `values`, each (chain, *shape): losses (chain, batch) of the examples
        `index` (chain or 1, batch), gradients of each chain's mean loss handed to `take`. A leading 1 is a batch that
        all chains share."""
        ...


class Looped:
    """Evaluates one chain with the model's own kernels, fused attention included.

    Gradients are handed on while the backward pass runs, or after it where `whole` asks for it: then all of them are
    held at once, and weights may be read in ways that autograd does not see.
    """

    def __init__(self, flat: Flat, examples: Examples, micro: int, *, whole: bool = False) -> None:
        self.flat, self.examples, self.micro, self.whole = flat, examples, micro, whole

    def bind(self, values: Sequence[Tensor]) -> Score:
        own = [value[0] for value in values]
        read = self.examples.reader()

        def score(index: Tensor, take: Take) -> Tensor:
            self.flat.hold(own)
            if not self.whole:
                return self.flat.in_parts(read, index[0], self.micro, take)[None]
            gradients: dict[int | None, Tensor | None] = {}
            losses = self.flat.in_parts(read, index[0], self.micro, gradients.__setitem__)
            for number, gradient in gradients.items():
                take(number, gradient)
            return losses[None]

        return score


class Stacked:
    """Evaluates all chains at once: the forward pass is mapped over stacked parameters, the backward pass is plain.

    Attention is decomposed, because fused attention has no batching rule on the CPU and would run in a slow loop.
    """

    def __init__(self, flat: Flat, examples: Examples, micro: int) -> None:
        self.flat, self.examples, self.micro = flat, examples, micro
        # Where each sampled parameter is held; one that is tied is held in several places.
        number = {id(parameter): i for i, parameter in enumerate(flat.parameters)}
        self.places = [
            (module, name, number[id(parameter)])
            for module in flat.model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in number
        ]

    def bind(self, values: Sequence[Tensor]) -> Score:
        leaves = [value.detach().requires_grad_() for value in values]
        read = self.examples.reader()
        chains = len(values[0])

        def losses_of_chain(parameters: Sequence[Tensor], batch: Any) -> Tensor:
            held: Any
            try:
                for held, name, number in self.places:
                    held._parameters[name] = parameters[number]
                return widened(self.flat.loss(self.flat.model, batch))
            finally:
                for held, name, number in self.places:
                    held._parameters[name] = self.flat.parameters[number]

        def score(index: Tensor, take: Take) -> Tensor:
            shared = len(index) < chains
            losses: list[Tensor] = []
            totals: list[Tensor | None] = [None] * len(leaves)
            for part in index.split(self.micro, 1):
                batch = read(part[0] if shared else part)
                with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                    with self.flat.precision():
                        found = torch.vmap(losses_of_chain, in_dims=(0, None if shared else 0))(leaves, batch)
                    loss = found.sum() / index.shape[1]
                    gradients: list[Tensor | None] = [*torch.autograd.grad(loss, leaves, allow_unused=True)]
                losses.append(found.detach())
                for number, total in enumerate(totals):
                    gradient, gradients[number] = gradients[number], None
                    totals[number] = gradient if total is None or gradient is None else total + gradient
            if self.flat.small:
                take(None, self.flat.joined(totals, chains))
                return torch.cat(losses, 1)
            for number in range(len(leaves)):
                total, totals[number] = totals[number], None
                take(number, None if total is None else total.reshape(chains, -1))
            return torch.cat(losses, 1)

        return score

    def works(self) -> bool:
        """Whether the model and the loss can be mapped over stacked parameters without a slow fallback."""
        rows = self.flat.start(2)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*performance drop.*")
                score = self.bind(self.flat.parts(rows))
                score(torch.zeros(2, 1, dtype=torch.int64, device=rows.device), lambda number, gradient: None)
        except (RuntimeError, UserWarning):
            return False
        return True
