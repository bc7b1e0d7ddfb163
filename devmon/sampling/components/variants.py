"""Many variants of a model in one pass, which begins at the first block in which they differ."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from devmon.errors import InstrumentError
from devmon.sampling.losses import Loss

# What was read in a pass at w*, all tensors (row · example, …): what entered a block, by the block, and what a module
# within a block returned, by the module: a tensor or a tuple led by one.
Kept = dict[nn.Module, Any]


class _Reached(Exception):
    """Ends a pass at the last block that is read."""


class Variants:
    """Per-example losses of variants of `model` that share all parameters but some of those from a block on.

    A pass at w* (`reading`) gives the state that enters that block, and what modules within it return that do not
    depend on what varies. A pass of variants (`losses`) begins there: earlier blocks hand their input on. Variants lie
    side by side in the batch, (variant · example, …). A module whose parameters vary maps each variant's part by its
    own weights, linear maps all at once; all other modules see a larger batch. `model` is a private copy in evaluation
    mode, whose parameters are frozen here; `blocks` are its blocks, none where they are not known.
    """

    def __init__(self, model: nn.Module, loss: Loss, blocks: Sequence[nn.Module]) -> None:
        self.model, self.loss, self.blocks = model.requires_grad_(False), loss, blocks
        self.whole = _WithLoss(model, loss)
        self._forms: dict[nn.Module, int] = {}  # blocks that return a tuple, and how long

    @contextmanager
    def reading(self, starts: Collection[int], resting: Collection[nn.Module]) -> Iterator[Kept]:
        """What enters the blocks `starts` and what the modules `resting` return, in the pass inside."""
        kept: Kept = {}

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept[module] = (args[0] if args else kwargs["hidden_states"]).detach()

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            kept[module] = output.detach() if isinstance(output, Tensor) else (output[0].detach(), *output[1:])

        def form(module: nn.Module, args: Any, output: Any) -> None:
            self._forms[module] = 0 if isinstance(output, Tensor) else len(output)

        with ExitStack() as stack:
            for start in starts:
                if start > 0:
                    handle: Any = self.blocks[start].register_forward_pre_hook(enter, with_kwargs=True)
                    stack.callback(handle.remove)
            for module in resting:
                stack.callback(module.register_forward_hook(leave).remove)
            for block in self.blocks[: max(starts, default=0)]:
                stack.callback(block.register_forward_hook(form).remove)
            yield kept

    @torch.no_grad()
    def read(self, batch: Any, starts: Collection[int], resting: Collection[nn.Module]) -> Kept:
        """What a pass at w* reads for `batch`; it ends behind the last of the blocks `starts`."""

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise _Reached

        with self.reading(starts, resting) as kept:
            handle = self.blocks[max(starts)].register_forward_hook(stop)
            try:
                self.loss(self.model, batch)
            except _Reached:
                pass
            finally:
                handle.remove()
        return kept

    def losses(self, values: Mapping[str, Tensor], batch: Any, start: int = -1, kept: Kept | None = None) -> Tensor:
        """(variant, example), within the graph of `values`, each (variant, *shape of the parameter).

        `batch` and `kept` hold the examples of all variants, variant by variant.
        """
        variants = len(next(iter(values.values())))
        with ExitStack() as stack:
            for module, known in (kept or {}).items():
                if start > 0 and module is self.blocks[start]:
                    stack.callback(module.register_forward_pre_hook(_given(known), with_kwargs=True).remove)
                    for block in self.blocks[:start]:
                        stack.enter_context(_replaced(block, _hands_on(self._forms.get(block, 0))))
                else:
                    stack.enter_context(_replaced(module, _returns(known)))
            for module, own in self._owners(values).items():
                stack.enter_context(_replaced(module, _varied(module, own, variants)))
            return self.loss(self.model, batch).view(variants, -1)

    def resting(self, values: Mapping[str, Tensor], batch: Any, start: int) -> list[nn.Module]:
        """The modules directly within block `start` that run once and do not depend on `values`: no gradient can come
        from them."""
        if start < 0:
            return []
        seen: dict[nn.Module, list[Any]] = {child: [] for child in self.blocks[start].children()}

        def note(module: nn.Module, args: Any, output: Any) -> None:
            seen[module].append(output if isinstance(output, tuple) else (output,))

        handles = [child.register_forward_hook(note) for child in seen]
        try:
            with torch.enable_grad():
                leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
                examples = self.losses(leaves, batch).numel()
        finally:
            for handle in handles:
                handle.remove()
        return [
            child
            for child, outputs in seen.items()
            if len(outputs) == 1
            and isinstance(outputs[0][0], Tensor)
            and len(outputs[0][0]) == examples
            and not any(isinstance(part, Tensor) and part.requires_grad for part in outputs[0])
            and all(part is None for part in outputs[0][1:])
        ]

    def plain(self, values: Mapping[str, Tensor], batch: Any) -> Tensor:
        """(example,): the losses of one variant by the model as it is, from `values` of the parameters' shapes."""
        return torch.func.functional_call(self.whole, {f"model.{n}": v for n, v in values.items()}, (batch,))

    def _owners(self, values: Mapping[str, Tensor]) -> dict[nn.Module, list[tuple[nn.Module, str, Tensor]]]:
        """The outermost modules that hold parameters of `values` themselves: for each, whose they are, and their names.

        A parameter that two modules share varies in both.
        """
        varying = {id(p): values[name] for name, p in self.model.named_parameters() if name in values}
        owners: dict[nn.Module, list[tuple[nn.Module, str, Tensor]]] = {}
        within: set[nn.Module] = set()
        for module in self.model.modules():  # outer modules first
            if module in within or not any(id(p) in varying for p in module.parameters(recurse=False)):
                continue
            inner = list(module.modules())
            within.update(inner)
            owners[module] = [
                (m, own, varying[id(p)])
                for m in inner
                for own, p in m.named_parameters(recurse=False)
                if id(p) in varying
            ]
        return owners


class _WithLoss(nn.Module):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module with another forward inside."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.forward = own


def _given(state: Tensor) -> Callable[..., Any]:
    """A hook that gives a block this state instead of what came."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((state, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": state})

    return hook


def _hands_on(form: int) -> Callable[..., Any]:
    """The forward of a block that is skipped, which returned a tensor (0) or a tuple of that length."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        state = args[0] if args else kwargs["hidden_states"]
        return (state, *[None] * (form - 1)) if form else state

    return forward


def _returns(known: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: known


def _varied(module: nn.Module, own: list[tuple[nn.Module, str, Tensor]], variants: int) -> Callable[..., Any]:
    """The forward of a module whose parameters `own` differ by variant."""
    if type(module) is nn.Linear or type(module).__name__ == "Conv1D":
        given = {name: values for _, name, values in own}
        return lambda x: _linear(module, x, given, variants)
    forward = module.forward

    def part(value: Any, variant: int) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) % variants:
            return tuple(part(v, variant) for v in value) if isinstance(value, tuple) else value
        return value.chunk(variants)[variant]

    def varied(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(x, Tensor) and x.ndim and len(x) % variants == 0 for x in (*args, *kwargs.values())):
            raise InstrumentError(f"{type(module).__name__} does not see the batch")
        outputs = []
        kept = [(holder, name, holder._parameters[name]) for holder, name, _ in own]
        try:
            for variant in range(variants):
                for holder, name, values in own:
                    holder._parameters[name] = values[variant]  # type: ignore[assignment]
                outputs.append(
                    forward(*(part(a, variant) for a in args), **{k: part(v, variant) for k, v in kwargs.items()})
                )
        finally:
            for holder, name, parameter in kept:
                holder._parameters[name] = parameter
        if isinstance(outputs[0], tuple):
            return (torch.cat([output[0] for output in outputs]), *outputs[0][1:])
        return torch.cat(outputs)

    return varied


def _linear(module: Any, x: Tensor, given: Mapping[str, Tensor], variants: int) -> Tensor:
    """All variants of a linear map in one batched product, x (variant · example, …, in)."""
    if len(x) % variants:
        raise InstrumentError("a linear map does not see the batch")
    weight, bias = given.get("weight", module.weight), given.get("bias", module.bias)
    if type(module) is nn.Linear:
        weight = weight.mT
    rows = x.reshape(variants, -1, x.shape[-1])
    mapped = rows @ weight if weight.ndim == 2 else torch.bmm(rows, weight)
    if bias is not None:
        mapped = mapped + (bias if bias.ndim == 1 else bias[:, None])
    return mapped.view(*x.shape[:-1], -1)
