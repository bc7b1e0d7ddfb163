"""Per-example losses `loss(model, batch) -> (batch,)`: next token, classification, regression."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from devmon.anatomy.variants.outputs import answer
from devmon.errors import InstrumentError

Loss = Callable[[nn.Module, Any], Tensor]


def next_token_loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean negative log-likelihood of the tokens after the first, in nats per token, shape (batch,).

    `batch` is tokens (batch, pos), a tuple or list that starts with them, or a mapping with `input_ids` and perhaps
    `attention_mask`: then padded positions neither predict nor are predicted. Labels equal to the tokens are implied.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    tokens = batch["input_ids"] if isinstance(batch, Mapping) else batch if isinstance(batch, Tensor) else batch[0]
    logits = outputs(answer(model, tokens) if mask is None else model(input_ids=tokens, attention_mask=mask))
    # every position is scored, the last one against the ignored label: no copy of the logits
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(tokens.shape)
    if mask is None:
        return losses.sum(1) / (tokens.shape[1] - 1)
    seen = (mask[:, 1:] * mask[:, :-1]).to(losses.dtype)
    return (losses[:, :-1] * seen).sum(1) / seen.sum(1).clamp(min=1)


def classification_loss(model: nn.Module, batch: Any) -> Tensor:
    """Negative log-likelihood of the label in nats, shape (batch,), from logits (batch, classes).

    `batch` is (inputs, labels).
    """
    inputs, labels = batch
    return F.cross_entropy(outputs(model(inputs)), labels, reduction="none")


def regression_loss(model: nn.Module, batch: Any) -> Tensor:
    """Half the squared error, summed over outputs, shape (batch,): the negative log-likelihood under unit noise, up to
    a constant. `batch` is (inputs, targets)."""
    inputs, targets = batch
    return 0.5 * F.mse_loss(outputs(model(inputs)), targets, reduction="none").flatten(1).sum(1)


def outputs(result: Any) -> Tensor:
    """The logits or predictions of a model that returns them, a tuple that starts with them, or an output object."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping) and "logits" in result:
        return result["logits"]
    if isinstance(result, tuple | list):
        return outputs(result[0])
    if isinstance(getattr(result, "logits", None), Tensor):
        return result.logits
    raise TypeError(
        f"expected a tensor, a tuple that starts with one, or an output with `logits`, got {type(result).__name__}: "
        f"write loss(model, batch) -> (batch,) for this model"
    )


def check_losses(losses: Any, size: int) -> None:
    """Raises InstrumentError unless `losses` is a floating tensor of shape (size,)."""
    if not isinstance(losses, Tensor) or tuple(losses.shape) != (size,) or not losses.dtype.is_floating_point:
        got = f"{tuple(losses.shape)} {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
        raise InstrumentError(
            f"loss(model, batch) must return one loss per example, shape ({size},), got {got}: "
            f"use reduction='none' and average over everything but the batch"
        )
