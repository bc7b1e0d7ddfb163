"""The residual stream of any model made of a chain of blocks, through hooks on the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from devmon.anatomy.forward import forward, original
from devmon.anatomy.layout import Layout, lacks
from devmon.anatomy.variants.outputs import declared
from devmon.errors import InstrumentError


def residual_stream(
    model: nn.Module, tokens: Tensor, blocks: str | None = None, who: str = "residual_stream"
) -> list[Tensor]:
    """The input of the first block, then the output of each block: block count + 1 tensors (batch, pos, d).

    `tokens` is (batch, pos) int64, or other inputs (batch, …) such as images, where pos is whatever number of places
    the blocks have; feature maps (batch, d, height, width) are seen as places (batch, height · width, d), states
    (batch, d) as one place, and the blocks of such models may differ in width. `blocks` is the path of the container of
    blocks, such as "transformer.h", or of several, "layer1, layer2", whose blocks are taken as they run; without it
    `find_blocks` looks for it. The tensors are copies, so a block that writes in place cannot change them; the hooks
    are removed in every case. Raises InstrumentError where a block does not run once or returns another shape.
    """
    path = find_blocks(model, tokens[:1], who) if blocks is None else blocks
    with shown_stream(model, tokens, path, who) as seen:
        forward(original(model), tokens, who)
    return seen(who)


@contextmanager
def shown_stream(model: nn.Module, tokens: Tensor, path: str, who: str) -> Iterator[Callable[[str], list[Tensor]]]:
    """Sees the stream of a forward pass of `tokens` inside; what it yields tells it as `residual_stream` does."""
    model = original(model)
    enters, leaves = _layers(model, path, who)
    shape = _expected(tokens)

    # The input of the block that runs first and every block's output, copied: a later block may write into them.
    stream: list[Tensor] = []
    calls = [0] * len(enters)

    def enter(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[index] += 1
            if sum(calls) == 1 and (state := _state((*args, *kwargs.values()), shape)) is not None:
                stream.append(state.detach().clone())

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if (state := _state(output, shape)) is not None:
            stream.append(state.detach().clone())

    def whole(who: str) -> list[Tensor]:
        # One state a block, each as wide as the others: else the "blocks" are no chain, or a block ran twice or not.
        widths = {state.shape[-1] for state in stream}
        free = shape[1] is None
        if len(stream) != len(enters) + 1 or not (free or len(widths) == 1):
            shapes = [tuple(state.shape) for state in stream]
            raise InstrumentError(
                f"{who} needs blocks that each run once and take and return (batch, pos, d); the {len(enters)} "
                f"modules in {path!r} of {type(model).__name__} ran {calls} times and gave {shapes}: "
                'set blocks="path.to.blocks"'
            )
        return stream

    handles = [module.register_forward_pre_hook(enter(i), with_kwargs=True) for i, module in enumerate(enters)]
    handles += [module.register_forward_hook(leave) for module in leaves]
    try:
        yield whole
    finally:
        for handle in handles:
            handle.remove()


def find_blocks(model: nn.Module, tokens: Tensor, who: str = "find_blocks") -> str:
    """The path of the largest nn.ModuleList or nn.Sequential, by parameters, whose modules all return (batch, pos, d).

    Of images, the paths of all stages, "layer1, layer2": the outermost lists of modules that are made of others and
    return states or feature maps, which may differ in width. Where a declared layout says that a layer is several
    modules, its list. Tries one forward pass of `tokens` (batch, pos). Raises InstrumentError, naming the field
    `blocks`, for none.
    """
    model = original(model)
    if (own := _declared(model)) is not None:
        return own[0]
    shape = _expected(tokens)

    # One pass tells which modules return states, and how wide.
    widths: dict[nn.Module, set[int | None]] = {}

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        state = _state(output, shape)
        widths.setdefault(module, set()).add(None if state is None else state.shape[-1])

    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }
    handles = [child.register_forward_hook(leave) for child in {c for m in lists.values() for c in m.children()}]
    try:
        forward(model, tokens, who)
    finally:
        for handle in handles:
            handle.remove()

    # Images pass stages of different widths: a network of one list of them, or of several.
    if shape[1] is None:
        whole = [path for path, m in lists.items() if all(_is_stage(child, widths) for child in m.children())]
        outer = [path for path in whole if not any(_within(path, other) for other in whole)]
        if outer:
            return ", ".join(outer)

    # Of the lists whose modules all return states of one width, the largest: an MLP of two layers is such a list too.
    # A network of numbers may have no other list than one whose widths differ.
    sizes: dict[str, int] = {}
    for most in (1, len(widths) if shape[1] is None and tokens.ndim == 2 else 1):
        for path, module in lists.items():
            seen = set[int | None]().union(*(widths.get(child, {None}) for child in module.children()))
            if len(seen) <= most and None not in seen and not sizes.get(path):
                sizes[path] = sum(p.numel() for p in module.parameters())
        if sizes:
            break
    if not sizes:
        raise InstrumentError(
            f"{who} needs the residual stream; {type(model).__name__} has no nn.ModuleList or nn.Sequential whose "
            'modules all return (batch, pos, d): set blocks="path.to.blocks"'
        )
    return max(sizes, key=lambda path: sizes[path])


def _is_stage(module: nn.Module, widths: dict[nn.Module, set[int | None]]) -> bool:
    """Whether a module is made of others, and what it returned was a state."""
    return any(True for _ in module.children()) and None not in widths.get(module, {None})


def _within(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))


def _declared(model: nn.Module) -> tuple[str, list[nn.Module], Layout] | None:
    """The path of the list, and the layers, of a declared layout whose layers are not modules that are called; else
    None: what is called is found without."""
    layout = declared(model)
    if layout is None or not (layout.together > 1 or layout.enter or layout.leave):
        return None
    for path, module in model.named_modules():
        if not lacks(module, (layout.blocks,)):
            return ".".join(part for part in (path, layout.blocks) if part), layout.layers(module), layout
    return None


def _layers(model: nn.Module, path: str, who: str) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules by which the stream enters the blocks at `path`, and those by which it leaves them."""
    own = _declared(model)
    if own is not None and own[0] == path:
        ends = [own[2].ends(layer) for layer in own[1]]
        return [enter for enter, _ in ends], [leave for _, leave in ends]
    children = _children(model, path, who)
    return children, children


def _children(model: nn.Module, path: str, who: str) -> list[nn.Module]:
    try:
        lists = [model.get_submodule(part.strip()) for part in path.split(",")]
        children = [child for each in lists for child in each.children()]
    except AttributeError as error:
        raise InstrumentError(
            f"{who}: {type(model).__name__} has no module {path!r} ({error}): set blocks=..."
        ) from error
    if not children:
        raise InstrumentError(f"{who}: {path!r} of {type(model).__name__} holds no modules: set blocks=... to the list")
    return children


def _expected(inputs: Tensor) -> tuple[int, int | None]:
    """The batch and the places that states must have; None where the inputs do not say how many places there are."""
    is_tokens = inputs.ndim == 2 and not inputs.is_floating_point()
    return inputs.shape[0], inputs.shape[1] if is_tokens else None


def _state(values: Any, shape: tuple[int, int | None]) -> Tensor | None:
    """The tensor, or the first tensor of the tuple, as (batch, pos, d); None if it cannot be that."""
    items = values if isinstance(values, (tuple, list)) else (values,)
    first = next((item for item in items if isinstance(item, torch.Tensor)), None)
    if first is None or first.shape[:1] != shape[:1]:
        return None
    if shape[1] is None and first.ndim == 4:
        return first.flatten(2).transpose(1, 2)
    if shape[1] is None and first.ndim == 2 and first.is_floating_point():
        return first[:, None]
    return first if first.ndim == 3 and shape[1] in (None, first.shape[1]) else None
