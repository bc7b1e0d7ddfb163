"""One pass of any model, written down: which modules ran in which order, on what, and where attention happened."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from devmon.anatomy.attention import Patterns
from devmon.anatomy.fit import TOKENS
from devmon.anatomy.forward import original, uncompiled
from devmon.anatomy.layout import Adapter
from devmon.anatomy.taps import heads_of
from devmon.anatomy.variants.builtin import Opened, Projection, can_open
from devmon.errors import InstrumentError

BATCH = 2  # sequences that are tried: more than one, so that (batch · pos) is told from (batch, pos)
CLOSE = 1e-4  # of the largest number: the same sum made in another order is off by 1e-6, another tensor by tenths
LONGEST = 1024  # tokens of a sequence that is made up, where a model takes no shorter one
SIDE = 32  # pixels of an image that is made up


@dataclass
class Call:
    """A module that ran: `start` and `end` are places in the order of all starts, ends and attentions."""

    path: str
    module: nn.Module
    given: Tensor | None
    start: int
    alone: bool = True  # whether that is all it was given
    end: int = -1
    gave: Tensor | None = None


@dataclass
class Attention:
    """An attention pattern: when it was made, of how many heads, and within which modules."""

    at: int
    heads: int
    within: tuple[str, ...]


@dataclass
class Trace:
    """A pass of `model` on `inputs`: `output` is what it returned, `adapter` how logits are had of it ("" as they are).

    `adapter_text` is its source where it is a function. `model` is a copy in evaluation mode. Calls are in the order in
    which they began.
    """

    model: nn.Module
    inputs: Tensor
    output: Any = None
    adapter: str | Adapter = ""
    adapter_text: str = ""
    calls: list[Call] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)

    @property
    def tokens(self) -> bool:
        return self.inputs.ndim == 2 and not self.inputs.is_floating_point()

    @property
    def logits(self) -> Tensor | None:
        """The first tensor of the output."""
        return first_tensor(self.output)


def trace(model: nn.Module, inputs: Any = None) -> Trace:
    """Run a copy of the model once, on the first of `inputs` or on what is made up: tokens, numbers or images.

    Raises InstrumentError where the model cannot be copied, or runs on none of these.
    """
    try:
        twin = copy.deepcopy(original(model)).eval().requires_grad_(False)
    except Exception as error:
        raise InstrumentError(
            f"{type(original(model)).__name__} cannot be copied ({type(error).__name__}: {error}): hand over the bare "
            "network"
        ) from error
    said = ""
    for given in _inputs(twin, inputs):
        for run, text in _ways(given):
            traced = Trace(twin, given)
            try:
                _record(traced, run)
            except Exception as error:
                said = said or f"{type(error).__name__}: {error}"
                continue
            if text and traced.logits is not None:
                flat = traced.logits.ndim == 2 and len(traced.logits) == given.numel()
                traced.adapter = _twice_flat if flat else run
                traced.adapter_text = f"{text}.unflatten(0, tokens.shape)" if flat else text
            return traced
    raise InstrumentError(
        f"{type(twin).__name__} runs on nothing that was made up for it ({said or 'no input is known'}): give inputs, "
        "as in anatomy_of(model, tokens), or let script.py:model return (model, inputs)"
    )


def first_tensor(values: Any) -> Tensor | None:
    """The tensor itself, or the first one in what holds it."""
    if isinstance(values, Tensor):
        return values
    if isinstance(values, dict) or hasattr(values, "keys"):
        values = [values[key] for key in ("logits", *values.keys()) if key in values.keys()]  # noqa: SIM118
    items = values if isinstance(values, tuple | list) else ()
    return next((found for item in items if (found := first_tensor(item)) is not None), None)


def _inputs(model: nn.Module, inputs: Any) -> Iterator[Tensor]:
    """What to try: the first rows of the inputs; else tokens that all tables have; else what the first layer takes."""
    if isinstance(inputs, Tensor):
        is_tokens = inputs.ndim == 2 and not inputs.is_floating_point()
        yield inputs[:BATCH, :TOKENS] if is_tokens else inputs[:BATCH]
        yield inputs[:BATCH]
        return
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    if sizes:
        most = min(sizes)
        # Tables of few rows are of kinds of tokens, not of places; never as many places as sequences, so that the two
        # are told apart. Some models take one length alone: that of a table of positions.
        tables = {p.shape[-2] for p in model.parameters() if p.ndim in (2, 3) and TOKENS < p.shape[-2] <= LONGEST}
        places_known = min((size for size in sizes if size > BATCH + 1), default=TOKENS)
        for length in (min(TOKENS, places_known), BATCH + 1, *sorted(tables)):
            places = torch.arange(BATCH * length).view(BATCH, length)
            yield ((7 * places + 3) % most).to(device)
        return
    for module in model.modules():
        shape: tuple[int, ...] | None = None
        if isinstance(module, nn.Linear):
            shape = (BATCH, module.in_features)
        elif isinstance(module, nn.Conv2d):
            shape = (BATCH, module.in_channels, SIDE, SIDE)
        if shape is not None:
            yield torch.randn(shape, generator=generator).to(device)
            yield torch.randn(shape[0], TOKENS, *shape[1:], generator=generator).to(device)
            return


def _ways(inputs: Tensor) -> Iterator[tuple[Any, str]]:
    """How a model is called, and the line of the layout that says so: with its inputs, or with targets beside them."""
    yield (lambda model, x: model(x)), ""
    if inputs.ndim == 2 and not inputs.is_floating_point():
        yield (lambda model, x: model(x, x)), "lambda model, tokens: model(tokens, tokens)"


def _twice_flat(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = first_tensor(model(tokens, tokens))
    assert logits is not None
    return logits.unflatten(0, tokens.shape)


def _record(traced: Trace, run: Any) -> None:
    clock = 0
    active: list[Call] = []

    def enter(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal clock
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            given = first_tensor((*args, *kwargs.values()))
            call = Call(path, module, None if given is None else given.detach().clone(), clock, len(tensors) == 1)
            clock += 1
            active.append(call)
            traced.calls.append(call)

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal clock
        call = next(call for call in reversed(active) if call.module is module)
        active.remove(call)
        gave = first_tensor(output)
        call.end, call.gave = clock, None if gave is None else gave.detach().clone()
        clock += 1

    def meet(pattern: Tensor) -> None:
        nonlocal clock
        heads = heads_of(pattern, len(traced.inputs))
        traced.attentions.append(Attention(clock, heads, tuple(call.path for call in active)))
        clock += 1

    # Built-in attention runs through its projection, which goes by the path of the attention.
    opened: dict[nn.MultiheadAttention, Projection] = {}
    named = list(traced.model.named_modules())
    for _, module in named:
        if isinstance(module, nn.MultiheadAttention) and can_open(module):
            opened[module] = Projection(module)
    projections = [(path, opened[module]) for path, module in named if module in opened]
    with ExitStack() as stack, torch.no_grad(), uncompiled(traced.model):
        for path, module in (*named, *projections):
            stack.callback(module.register_forward_pre_hook(enter(path), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        if opened:
            stack.callback(Opened(opened).remove)
        stack.enter_context(Patterns.of(traced.model, meet))
        traced.output = run(traced.model, traced.inputs)


# -- what is asked of modules and tensors ------------------------------------------------------------------------------


def is_linear(module: nn.Module) -> bool:
    """Whether a module is by its form a linear map of the last dimension; the fit tells whether it is one."""
    sized = isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", getattr(module, "in_features", None)), int
    )
    return sized or type(module).__name__ == "Conv1D"


def is_table(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not is_linear(module)


def under(path: str, prefixes: list[str]) -> bool:
    return any(not prefix or path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes)


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are one up to rounding."""
    if one is None or other is None or one.shape != other.shape or one.is_floating_point() != other.is_floating_point():
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    return bool((one.float() - other.float()).abs().max() <= CLOSE * other.float().abs().max().clamp(min=1e-30))
