"""A model whose sampled parameters are views of memory that a chain brings, and whose gradients are handed on as they
come."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from devmon.errors import InstrumentError
from devmon.sampling.constants import BLOCK
from devmon.sampling.data import Examples
from devmon.sampling.losses import Loss, check_losses

# Takes the gradient (chain, size) of the parameter with that number, flattened, or of all parameters of a small model,
# number None. No gradient: the loss does not depend on it. What is given may be memory that others read, and is not to
# be overwritten.
Take = Callable[[int | None, Tensor | None], None]


class Flat:
    """A private evaluation-mode twin of a model for chains, which sees their positions as its parameters.

    The sampled parameters hold nothing until `hold` or `bind` gives them memory; w* stays where it is, in the model's
    own memory and precision, and nothing is written there. Tied parameters count once, unused ones have gradient zero.
    Frozen parameters (requires_grad False) rest; when all are frozen, as in a model made for inference, all are
    sampled. `names` restricts the choice further.

    `dtype` is that of positions and gradients; `autocast` that of the matrix products of a pass, None for `dtype`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        dtype: torch.dtype = torch.float32,
        names: Sequence[str] | None = None,
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.loss, self.dtype, self.autocast, self.whole = loss, dtype, autocast, names is None
        self._held: Sequence[Tensor] | None = None
        # The twin shares the memory of all parameters: deepcopy finds each of them copied already.
        shared = {id(p): nn.Parameter(_memory(p), p.requires_grad) for p in model.parameters()}
        self.model = copy.deepcopy(model, shared).eval()
        if not any(p.requires_grad for p in self.model.parameters()):
            self.model.requires_grad_(True)
        for name, parameter in self.model.named_parameters():
            if names is not None and name not in names:
                parameter.requires_grad_(False)
        chosen = {n: p for n, p in self.model.named_parameters() if p.requires_grad and p.numel()}
        if not chosen:
            raise InstrumentError("expected at least one parameter to sample, got none: choose a wider mask")
        self.names = list(chosen)
        self.parameters = list(chosen.values())
        self.shapes = [tuple(p.shape) for p in self.parameters]
        self.sizes = [p.numel() for p in self.parameters]
        self.device = self.parameters[0].device
        # What is sampled gives up its memory before the rest is converted, so that no copy of it is made.
        self.at_center = [p.detach().reshape(-1) for p in self.parameters]
        self.release()
        self.model.to(dtype)

    @property
    def numel(self) -> int:
        """How many parameters are sampled."""
        return sum(self.sizes)

    @property
    def small(self) -> bool:
        """Whether all parameters are one block: then their gradients are handed on together, which spares calls."""
        return self.numel <= BLOCK

    @cached_property
    def center(self) -> Tensor:
        """w* as one vector (parameter,) in `dtype`."""
        return torch.cat([values.to(self.dtype) for values in self.at_center])

    def start(self, chains: int) -> Tensor:
        """Positions (chain, parameter) at w*."""
        rows = torch.empty(chains, self.numel, dtype=self.dtype, device=self.device)
        for part, values in zip(rows.split(self.sizes, 1), self.at_center, strict=True):
            part.copy_(values)
        return rows

    def blocks(self, number: int | None) -> list[tuple[slice, slice]]:
        """Parameter `number` (None: all) in blocks: where each lies in a vector (parameter,), and where within it."""
        first, size = (0, self.numel) if number is None else (sum(self.sizes[:number]), self.sizes[number])
        cuts = [(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]
        return [(slice(first + start, first + stop), slice(start, stop)) for start, stop in cuts]

    def away(self, rows: Tensor, number: int | None, part: slice, within: slice) -> Tensor:
        """The distance from w* (chain, size) of positions `rows` in a block."""
        center = self.center if number is None else self.at_center[number]
        return rows[:, part] - center[within].to(self.dtype)

    def parts(self, stack: Tensor) -> list[Tensor]:
        """Views of a vector (..., parameter) with the shapes of the parameters, (..., *shape)."""
        parts = zip(stack.split(self.sizes, -1), self.shapes, strict=True)
        return [part.view(*stack.shape[:-1], *shape) for part, shape in parts]

    def hold(self, values: Sequence[Tensor]) -> None:
        """From now on the parameters are these tensors, each of its shape, and have no gradients."""
        if self._held is not values:
            self._held, self._bound = values, (0, 0)
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.data, parameter.grad = value, None

    def release(self) -> None:
        """From now on the parameters hold nothing, so that the memory they had can be used again."""
        self._held, self._bound = None, (0, 0)
        for parameter in self.parameters:
            parameter.data, parameter.grad = torch.empty(0, dtype=self.dtype, device=self.device), None

    def center_parts(self) -> list[Tensor]:
        """w* by parameter, each of its shape: the model's own memory where it has the dtype of the chains."""
        return [values.to(self.dtype).view(s) for values, s in zip(self.at_center, self.shapes, strict=True)]

    def bind(self, vector: Tensor, grad: Tensor) -> None:
        """From now on the parameters are views of `vector` and their gradients add to `grad`, both (parameter,)."""
        if self._bound != (where := (vector.data_ptr(), grad.data_ptr())):
            self.hold(self.parts(vector))
            self._bound = where
            for parameter, slope in zip(self.parameters, self.parts(grad), strict=True):
                parameter.grad = slope

    def losses(self, batch: Any) -> Tensor:
        """Per-example losses (batch,) at the held weights, outside the graph."""
        with torch.no_grad(), self.precision():
            return widened(self.loss(self.model, batch))

    def backward(self, batch: Any, size: int | None = None, of: int | None = None) -> Tensor:
        """Per-example losses (batch,) at the held weights; the gradient of their sum over `of` (None: of their mean) is
        added to that of the parameters. Raises InstrumentError for losses that are not (size,), where that is given."""
        with torch.enable_grad():
            with self.precision():
                losses = widened(self.loss(self.model, batch))
            if size is not None:
                check_losses(losses, size)
            (losses.sum() / (len(losses) if of is None else of)).backward()
        return losses.detach()

    def in_parts(self, read: Callable[[Tensor], Any], index: Tensor, micro: int, take: Take) -> Tensor:
        """Losses (k,) at the held weights of the examples `index` (k,), which `read` gives, `micro` of them in a pass.
        The gradient of their mean goes to `take`, each parameter's as soon as it is whole, and is dropped."""
        *parts, last = index.split(micro)
        losses = [self.backward(read(part), len(part), len(index)) for part in parts]
        if not self.small:
            return torch.cat([*losses, self._stream(read(last), take, len(last), len(index))])
        losses.append(self.backward(read(last), len(last), len(index)))
        take(None, self.joined([p.grad for p in self.parameters], 1))
        for parameter in self.parameters:
            parameter.grad = None
        return torch.cat(losses)

    def joined(self, gradients: Sequence[Tensor | None], chains: int) -> Tensor:
        """Gradients by parameter as one (chain, parameter)."""
        like, rows = self.parameters[0], []
        for gradient, size in zip(gradients, self.sizes, strict=True):
            rows.append(like.new_zeros(chains, size) if gradient is None else gradient.reshape(chains, -1))
        return torch.cat(rows, 1)

    def _stream(self, batch: Any, take: Take, size: int, of: int) -> Tensor:
        arrived = set()

        def arrive(number: int, parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            arrived.add(number)
            take(number, None if gradient is None else gradient.view(1, -1))

        hooks = [p.register_post_accumulate_grad_hook(partial(arrive, i)) for i, p in enumerate(self.parameters)]
        try:
            losses = self.backward(batch, size, of)
        finally:
            for hook in hooks:
                hook.remove()
        for number, parameter in enumerate(self.parameters):
            if number not in arrived:
                arrive(number, parameter)
        return losses

    def precision(self) -> AbstractContextManager[Any]:
        """Under which a pass runs forward; backward follows."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)


def _memory(parameter: Tensor) -> Tensor:
    return parameter.detach().clone() if parameter.is_inference() else parameter.detach()  # the former has no graph


def widened(losses: Tensor) -> Tensor:
    """Losses of half precision in float32, so that no sum of them is taken in half precision."""
    half = isinstance(losses, Tensor) and losses.dtype in (torch.bfloat16, torch.float16)
    return losses.float() if half else losses


def score_at_center(flat: Flat, examples: Examples, index: Tensor, batch_size: int) -> Tensor:
    """Losses at w* of the examples `index` (k,), as a float64 table (n,) with NaN elsewhere.

    Raises InstrumentError when the loss has another shape than (batch,) or is not finite at w*.
    """
    table = torch.full((examples.n,), torch.nan, dtype=torch.float64, device=index.device)
    flat.hold(flat.center_parts())
    for part in index.split(batch_size):
        losses = flat.losses(examples.batch(part))
        check_losses(losses, len(part))
        table[part] = losses.to(torch.float64)
    check_finite(table[index])
    return table


def check_finite(losses: Tensor) -> None:
    """Raises InstrumentError for losses at w* that are not finite."""
    bad = int((~torch.isfinite(losses)).sum())
    if bad:
        raise InstrumentError(
            f"the loss at w* is not finite for {bad} of {len(losses)} examples: the weights or the data hold NaN or "
            f"infinity, so there is nothing to sample around"
        )
