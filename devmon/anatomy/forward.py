"""One forward pass of any language model: logits at every position, and the loss and hits of the next token."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from devmon.anatomy.layout import Layout
from devmon.anatomy.variants.outputs import answer
from devmon.anatomy.vocabulary import chunks, log_softmax
from devmon.errors import InstrumentError

POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "block_size")  # in configs, first there
# What torch says of inputs that are not what a module takes. Errors of the device and its memory pass as they are.
OTHER_SHAPE = ("dtype", "Input type", "size", "shape", "dimension", "channels", "not implemented for", "scalar type")
SEES_AHEAD = 1e-5  # of the change that later tokens make at their own places: 0 where kernels are the same, 1e-7 where
# experts see other batches, 1e-3 and more in encoders at their initialisation


def original(model: nn.Module) -> nn.Module:
    """The module that `torch.compile(model)` wraps, or the model itself."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def refuse_two_stacks(model: nn.Module, who: str) -> None:
    """Raises InstrumentError for an encoder–decoder of transformers: what is its `layer`, or its next token?"""
    for path, module in model.named_modules():
        if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            continue
        if {"encoder", "decoder"} <= dict(module.named_children()).keys():
            where = ".".join(part for part in (path, "encoder") if part)
            raise InstrumentError(
                f"{who}: {type(model).__name__} is an encoder–decoder, whose layers are those of two stacks: "
                f"hand over one of them ({where!r} or {where[:-7] + 'decoder'!r}; Monitor(model=...) takes such a path)"
            )


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Runs compiled parts of the model as plain Python inside: hooks and captures do not fire in compiled code."""
    modules = list(model.modules())
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in modules):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def forward(model: nn.Module, inputs: Any, who: str, *, grad: bool = False, layout: Layout | None = None) -> Any:
    """`model(inputs)`, uncompiled, on the model's device, without gradients unless asked; whatever it returns, or
    logits (batch, pos, vocab) where a layout (its own, or `layout`) says how they are had.

    `inputs` is what the model takes first, such as tokens (batch, pos) int64 or images, or a mapping of its keyword
    arguments, on any device. Raises InstrumentError where a token or a position is outside the model's tables.
    """
    # The first tensor's device is the model's: a model that is spread over several takes its inputs on the first.
    first = next((t for t in (*model.parameters(), *model.buffers())), None)
    device = None if first is None else first.device
    name = type(original(model)).__name__
    refuse_two_stacks(original(model), who)
    _warn_beyond(original(model), inputs, who)
    try:
        with torch.set_grad_enabled(grad), uncompiled(model):
            if isinstance(inputs, Mapping):
                return original(model)(**{key: value.to(device).contiguous() for key, value in inputs.items()})
            given = inputs.to(device).contiguous()  # some models take a view of their tokens
            return answer(original(model), given, layout)
    except IndexError as error:
        if not isinstance(inputs, Tensor) or inputs.is_floating_point():
            raise
        raise InstrumentError(
            f"{who}: {name} cannot look up tokens 0..{int(inputs.max())} at {inputs.shape[1]} positions ({error}): "
            "lower vocab_size or length, or give tokens of this model"
        ) from error
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        said, of_torch = str(error), isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)
        if of_torch and ("memory" in said or not any(word in said for word in OTHER_SHAPE)):
            raise
        given = "its keyword arguments" if isinstance(inputs, Mapping) else f"one tensor {tuple(inputs.shape)}"
        raise InstrumentError(
            f"{who}: {name} does not run on {given} alone ({type(error).__name__}: {error}): hand over a part of it "
            "that does (Monitor(model=...) takes its path), or wrap it in a module whose forward does"
        ) from error


def unwatched(model: nn.Module, inputs: Tensor, layout: Layout | None = None) -> Any:
    """The forward pass past the hooks of who watches the whole model: a trial is none of its passes."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), inputs.device)
    with torch.no_grad(), uncompiled(model):
        bare = original(model)
        hooks = bare._forward_hooks, bare._forward_pre_hooks
        bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()
        try:
            return answer(bare, inputs.to(device).contiguous(), layout)
        finally:
            bare._forward_hooks, bare._forward_pre_hooks = hooks


def _warn_beyond(model: nn.Module, inputs: Any, who: str) -> None:
    """A warning where the config says that the model was made for fewer positions: rotary ones raise no error."""
    config = getattr(model, "config", None)
    told = [n for name in POSITIONS if isinstance(n := getattr(config, name, None), int)]
    if told and isinstance(inputs, Tensor) and inputs.ndim == 2 and inputs.shape[1] > told[0] > 0:
        warnings.warn(
            f"{who}: {type(model).__name__} was made for {told[0]} positions, these are {inputs.shape[1]}: beyond them "
            "it does what nothing trained it to do; shorten the tokens",
            stacklevel=3,
        )


def scores_in(output: Any) -> Any:
    """The logits in what a model returned: a tuple of them first, an output that has them by name, or both."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first.get("logits") if isinstance(first, Mapping) else getattr(first, "logits", first)


def logits(model: nn.Module, tokens: Tensor, who: str = "logits", *, output: Any = None) -> Tensor:
    """Logits (batch, pos, vocab) of a model that returns them, an output that holds them, or a tuple led by either.

    `tokens` is (batch, pos) int64; `output` is what the model returned for them, if it has run. Raises
    InstrumentError where the output is none of these or lacks positions.
    """
    output = forward(model, tokens, who) if output is None else output
    scores = scores_in(output)
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
        check_causal(model, tokens, who)
    scores = logits(model, tokens, who)
    target = tokens.roll(-1, 1).flatten().to(scores.device)
    if int(tokens[:, 1:].max()) >= scores.shape[-1]:
        raise InstrumentError(
            f"{who}: the tokens go up to {int(tokens[:, 1:].max())} but {type(original(model)).__name__} has "
            f"{scores.shape[-1]} logits: give tokens of this model's vocabulary"
        )
    # A few places at a time: no copy of all logits. The last place of a sequence is left out in the end.
    flat = scores.flatten(0, 1)
    nats = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
    hits = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    for at in chunks(flat):
        goal = target[at].clamp(max=flat.shape[1] - 1)
        nats[at] = -log_softmax(flat[at]).gather(-1, goal[:, None])[:, 0].double()
        hits[at] = flat[at].argmax(-1) == goal
    return nats.reshape(tokens.shape)[:, :-1].cpu(), hits.reshape(tokens.shape)[:, :-1].cpu()


def check_causal(model: nn.Module, tokens: Tensor, who: str, watched: bool = True) -> None:
    """A sequence, and the same with other tokens in its second half: what a language model says before that must not
    change, whatever it changes after."""
    # Tokens are exchanged for others of the batch, which the model knows; the length stays, as some models take one.
    known = tokens.unique()
    if len(known) < 2:
        return
    half, changed = tokens.shape[1] // 2, tokens[:1].clone()
    changed[0, half:] = known[(torch.searchsorted(known, changed[0, half:]) + 1) % len(known)]
    before, after = _moved(model, tokens[:1], changed, half, who, watched)

    # Half precision rounds as coarsely as an untrained encoder looks ahead: what moved is asked again in float32.
    if before and any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        before, after = _moved(copy.deepcopy(original(model)).float(), tokens[:1], changed, half, who, watched)
    if before > SEES_AHEAD * after:
        raise InstrumentError(
            f"{who} needs a model that predicts each token from those before it; what {type(original(model)).__name__} "
            "says of a place depends on later tokens (an encoder, or a missing causal mask)"
        )


def _moved(model: nn.Module, one: Tensor, other: Tensor, half: int, who: str, watched: bool) -> tuple[float, float]:
    """The largest change of a logit before the place `half`, and from there on; what is not finite does not count."""
    ran = (logits(model, x, who, output=None if watched else unwatched(model, x)).double() for x in (other, one))
    change = (next(ran) - next(ran)).abs().nan_to_num(0, 0, 0)
    return float(change[:, :half].max()), float(change[:, half:].max())


@contextmanager
def last_place(unembedding: nn.Module | None, shape: tuple[int, ...]) -> Iterator[None]:
    """The unembedding is given the states of the last place alone inside, where it is given those of all places."""

    def narrow(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        state = args[0]
        return (state[:, -1:], *args[1:]) if state.ndim == 3 and state.shape[:2] == shape[:2] else None

    handle = None if unembedding is None else unembedding.register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
