"""One forward pass of any language model: logits at every position, and the loss and hits of the next token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from devmon.errors import InstrumentError

SEES_AHEAD = 1e-2  # of the spread of the logits: what a later token may change by rounding


def original(model: nn.Module) -> nn.Module:
    """The module that `torch.compile(model)` wraps, or the model itself."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Runs compiled parts of the model as plain Python inside: hooks and captures do not fire in compiled code."""
    modules = list(model.modules())
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in modules):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def forward(model: nn.Module, inputs: Any, who: str, *, grad: bool = False) -> Any:
    """`model(inputs)`, uncompiled, on the model's device, without gradients unless asked; whatever it returns.

    `inputs` is what the model takes first, such as tokens (batch, pos) int64 or images, or a mapping of its keyword
    arguments, on any device. Raises InstrumentError where a token or a position is outside the model's tables.
    """
    # The first tensor's device is the model's: a model that is spread over several takes its inputs on the first.
    first = next((t for t in (*model.parameters(), *model.buffers())), None)
    device = None if first is None else first.device
    name = type(original(model)).__name__
    try:
        with torch.set_grad_enabled(grad), uncompiled(model):
            if isinstance(inputs, Mapping):
                return original(model)(**{key: value.to(device).contiguous() for key, value in inputs.items()})
            return original(model)(inputs.to(device).contiguous())  # some models take a view of their tokens
    except IndexError as error:
        if not isinstance(inputs, Tensor) or inputs.is_floating_point():
            raise
        raise InstrumentError(
            f"{who}: {name} cannot look up tokens 0..{int(inputs.max())} at {inputs.shape[1]} positions ({error}): "
            "lower vocab_size or length, or give tokens of this model"
        ) from error


def logits(model: nn.Module, tokens: Tensor, who: str = "logits", *, output: Any = None) -> Tensor:
    """Logits (batch, pos, vocab) of a model that returns them, an output that holds them, or a tuple led by either.

    `tokens` is (batch, pos) int64; `output` is what the model returned for them, if it has run. Raises
    InstrumentError where the output is none of these or lacks positions.
    """
    output = forward(model, tokens, who) if output is None else output
    # A tuple of logits first, an output that has them by name, or both.
    scores = output[0] if isinstance(output, (tuple, list)) and output else output
    scores = scores.get("logits") if isinstance(scores, Mapping) else getattr(scores, "logits", scores)
    name = type(original(model)).__name__
    if not isinstance(scores, Tensor):
        raise InstrumentError(
            f"{who} needs logits: a tensor, an output or mapping with `logits`, or a tuple led by them; "
            f"{name} returned {type(output).__name__}: wrap the model so that it returns (batch, pos, vocab)"
        )
    if scores.ndim != 3 or scores.shape[:2] != tokens.shape:
        raise InstrumentError(
            f"{who} needs logits (batch, pos, vocab) at all {tuple(tokens.shape)} places; {name} returned "
            f"{tuple(scores.shape)}: wrap the model so that it returns the logits of every position"
        )
    return scores


def next_token(
    model: nn.Module, tokens: Tensor, who: str = "next_token", *, check: bool = True
) -> tuple[Tensor, Tensor]:
    """Loss and hits of the next token: (nats, argmax is right), both (batch, pos - 1) on the CPU.

    Column i speaks of token i + 1 given tokens 0..i. Losses are computed in float32 at least, returned in float64.
    Raises InstrumentError for tokens outside the vocabulary, and for a model that sees the tokens it should predict
    (without `check`, as in a pass that writes states of these very tokens, that goes unseen).
    """
    if check:
        _check_causal(model, tokens, who)
    # Log-sum-exp over a vocabulary in half precision is off by more than a step of training changes the loss.
    scores = logits(model, tokens, who)[:, :-1]
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    target = tokens[:, 1:].to(scores.device)
    if int(target.max()) >= scores.shape[-1]:
        raise InstrumentError(
            f"{who}: the tokens go up to {int(target.max())} but {type(original(model)).__name__} has "
            f"{scores.shape[-1]} logits: give tokens of this model's vocabulary"
        )
    nats = F.cross_entropy(scores.flatten(0, 1), target.flatten(), reduction="none").reshape(target.shape)
    return nats.double().cpu(), (scores.argmax(-1) == target).cpu()


def _check_causal(model: nn.Module, tokens: Tensor, who: str) -> None:
    """A sequence, and the same with another last token: what a language model says before it must not change."""
    # The last token is exchanged for another of the batch: the model knows it, and the length stays, since some models
    # take one length alone.
    sequence = tokens[:1]
    changed = sequence.clone()
    others = tokens[tokens != sequence[0, -1]]
    if not len(others):
        return
    changed[0, -1] = others[0]
    before, after = (logits(model, given, who)[:, :-1].float() for given in (sequence, changed))

    # A hundredth of the spread of the logits: kernels of half precision round differently for other inputs, and a
    # model that sees ahead differs by about the spread itself.
    finite = before[before.isfinite()]  # none, where the training has diverged
    spread = float(finite.std()) if len(finite) > 1 else 0.0
    if not torch.allclose(before, after, rtol=SEES_AHEAD, atol=SEES_AHEAD * spread + 1e-6, equal_nan=True):
        raise InstrumentError(
            f"{who} needs a model that predicts each token from those before it; what {type(original(model)).__name__} "
            "says of a place depends on later tokens (an encoder, or a missing causal mask)"
        )
