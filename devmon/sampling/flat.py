"""A model whose sampled parameters are one vector, evaluated chain by chain or with the chains stacked."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from devmon.errors import InstrumentError
from devmon.sampling.data import Examples
from devmon.sampling.losses import Loss, check_losses

Score = Callable[[Tensor], Tensor]


class Flat:
    """A private evaluation-mode copy of a model whose sampled parameters are views of one vector.

    Gradients accumulate into a second vector of the same layout, so a kernel sees plain tensors however many
    parameters there are. Tied parameters count once, unused ones have gradient zero. Frozen parameters
    (requires_grad False) rest; when all are frozen, as in a model made for inference, all are sampled.
    `names` restricts the choice further.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, dtype: torch.dtype = torch.float32, names: Sequence[str] | None = None
    ) -> None:
        self.model = copy.deepcopy(model).to(dtype).eval()
        self.loss = loss
        if not any(p.requires_grad for p in self.model.parameters()):
            self.model.requires_grad_(True)
        for name, parameter in self.model.named_parameters():
            parameter.grad = None
            if names is not None and name not in names:
                parameter.requires_grad_(False)
        chosen = {n: p for n, p in self.model.named_parameters() if p.requires_grad and p.numel()}
        if not chosen:
            raise InstrumentError("expected at least one parameter to sample, got none: choose a wider mask")
        self.names = list(chosen)
        self.parameters = list(chosen.values())
        self.shapes = [tuple(p.shape) for p in self.parameters]
        self.sizes = [p.numel() for p in self.parameters]
        self._bound = (0, 0)
        self.center = torch.cat([p.detach().reshape(-1) for p in self.parameters])

    def bind(self, vector: Tensor, grad: Tensor) -> None:
        """From now on the parameters are views of `vector` and their gradients add to `grad`, both (parameter,)."""
        if self._bound == (where := (vector.data_ptr(), grad.data_ptr())):
            return
        self._bound = where
        for parameter, value, slope in zip(self.parameters, self.parts(vector), self.parts(grad), strict=True):
            parameter.data, parameter.grad = value, slope

    def parts(self, stack: Tensor) -> list[Tensor]:
        """Views of a vector (..., parameter) with the shapes of the parameters, (..., *shape)."""
        parts = zip(stack.split(self.sizes, -1), self.shapes, strict=True)
        return [part.view(*stack.shape[:-1], *shape) for part, shape in parts]

    def losses(self, batch: Any) -> Tensor:
        """Per-example losses (batch,) at the bound weights, outside the graph."""
        with torch.no_grad():
            return self.loss(self.model, batch)

    def backward(self, batch: Any) -> Tensor:
        """Per-example losses (batch,) at the bound weights; the gradient of their mean is added where bound."""
        with torch.enable_grad():
            losses = self.loss(self.model, batch)
            losses.mean().backward()
        return losses.detach()


class Evaluator(Protocol):
    """Binds positions (chain, parameter) and memory for gradients to a function of the batches' indices."""

    flat: Flat
    examples: Examples

    def bind(self, rows: Tensor, grads: Tensor) -> Score:
        """`score(index)`: losses (chain, batch) of the examples `index` (chain or 1, batch), gradients left in
        `grads`. A leading 1 is a batch that all chains share."""
        ...


class Looped:
    """Evaluates one chain after the other, with the model's own kernels (fused attention included)."""

    def __init__(self, flat: Flat, examples: Examples) -> None:
        self.flat, self.examples = flat, examples

    def bind(self, rows: Tensor, grads: Tensor) -> Score:
        read = self.examples.reader()

        def score(index: Tensor) -> Tensor:
            grads.zero_()
            losses = []
            for chain in range(len(rows)):
                if chain == 0 or len(index) > 1:
                    batch = read(index[chain])
                self.flat.bind(rows[chain], grads[chain])
                losses.append(self.flat.backward(batch))
            return torch.stack(losses)

        return score


class Stacked:
    """Evaluates all chains at once: the forward pass is mapped over stacked parameters, the backward pass is plain.

    Attention is decomposed, because fused attention has no batching rule on the CPU and would run in a slow loop.
    """

    def __init__(self, flat: Flat, examples: Examples) -> None:
        self.flat, self.examples = flat, examples
        self.whole = _WithLoss(flat.model, flat.loss)

    def bind(self, rows: Tensor, grads: Tensor) -> Score:
        leaves = [leaf.requires_grad_() for leaf in self.flat.parts(rows.detach())]
        targets = self.flat.parts(grads)
        names = [f"model.{name}" for name in self.flat.names]
        read = self.examples.reader()

        def losses_of_chain(parameters: Sequence[Tensor], batch: Any) -> Tensor:
            return torch.func.functional_call(self.whole, dict(zip(names, parameters, strict=True)), (batch,))

        def score(index: Tensor) -> Tensor:
            shared = len(index) < len(rows)
            batch = read(index[0] if shared else index)
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                losses = torch.vmap(losses_of_chain, in_dims=(0, None if shared else 0))(leaves, batch)
                gradients = torch.autograd.grad(losses.mean(1).sum(), leaves, allow_unused=True)
            for target, gradient in zip(targets, gradients, strict=True):
                target.zero_() if gradient is None else target.copy_(gradient)
            return losses.detach()

        return score

    def works(self) -> bool:
        """Whether the model and the loss can be mapped over stacked parameters without a slow fallback."""
        rows = self.flat.center.expand(2, -1).clone()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*performance drop.*")
                self.bind(rows, torch.zeros_like(rows))(torch.zeros(2, 1, dtype=torch.int64, device=rows.device))
        except (RuntimeError, UserWarning):
            return False
        return True


class _WithLoss(nn.Module):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


@torch.no_grad()
def score_at_center(flat: Flat, examples: Examples, index: Tensor, batch_size: int) -> Tensor:
    """Losses at w* of the examples `index` (k,), as a float64 table (n,) with NaN elsewhere.

    Raises InstrumentError when the loss has another shape than (batch,) or is not finite at w*.
    """
    table = torch.full((examples.n,), torch.nan, dtype=torch.float64, device=index.device)
    flat.bind(flat.center, torch.zeros_like(flat.center))
    for part in index.split(batch_size):
        losses = flat.losses(examples.batch(part))
        check_losses(losses, len(part))
        table[part] = losses.to(torch.float64)
    _check_finite(table[index])
    return table


def gradient_at_center(
    flat: Flat, examples: Examples, index: Tensor, batch_size: int, where: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """Losses at w* of the examples `index` (k,) as a float64 table (n,) with NaN elsewhere, the gradient (parameter,)
    of their mean, and the trace of the covariance of single examples' gradients; both are 0 where `where` is.

    The parts that the pass is made in are disjoint minibatches: how they spread is the noise of a minibatch.
    Raises InstrumentError when the loss has another shape than (batch,) or is not finite at w*.
    """
    total, part_grad = torch.zeros_like(flat.center, dtype=torch.float64), torch.zeros_like(flat.center)
    table = torch.full((examples.n,), torch.nan, dtype=torch.float64, device=index.device)
    flat.bind(flat.center, part_grad)
    # Σ |b| |g_b − g|² over parts b has the mean (parts − 1) trace(Cov) of the examples.
    squares = 0.0
    parts = index.split(min(batch_size, max(1, len(index) // 2)))
    check_losses(flat.losses(examples.batch(parts[0])), len(parts[0]))
    for part in parts:
        part_grad.zero_()
        losses = flat.backward(examples.batch(part))
        table[part] = losses.to(torch.float64)
        if where is not None:
            part_grad.mul_(where)
        total.add_(part_grad, alpha=len(part) / len(index))
        squares += len(part) * float(torch.linalg.vector_norm(part_grad, dtype=torch.float64)) ** 2
    _check_finite(table[index])
    spread = squares - len(index) * float(torch.linalg.vecdot(total, total))
    return table, total.to(flat.center.dtype), max(0.0, spread) / max(len(parts) - 1, 1)


def _check_finite(losses: Tensor) -> None:
    bad = int((~torch.isfinite(losses)).sum())
    if bad:
        raise InstrumentError(
            f"the loss at w* is not finite for {bad} of {len(losses)} examples: the weights or the data hold NaN or "
            f"infinity, so there is nothing to sample around"
        )
