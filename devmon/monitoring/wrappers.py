"""The network inside what training put around it: parallel, compiled, checkpointed, or run under autocast."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from devmon.errors import InstrumentError

# Wrappers by the class that names them, and where each keeps what it wraps. They change how a module is run (on which
# devices, compiled, in which precision, with activations computed anew), and not the function of its weights.
INSIDE = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "ActivationWrapper": "_checkpoint_wrapped_module",  # torch's checkpoint_wrapper and offload_wrapper
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "DeepSpeedEngine": "module",
    "_FabricModule": "_forward_module",  # of Lightning's Fabric: the precision of its forward
}
PACKAGES = ("torch", "lightning", "lightning_fabric", "deepspeed")
# Modules whose functions wrap a forward (`__wrapped__`) to set its precision, or to compile it.
AROUND_FORWARD = ("torch.amp.autocast_mode", "accelerate.utils.operations", "torch._dynamo.external_utils")


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The network in what stands around it as a whole; its own submodules may still be wrapped."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def bare_copy(model: torch.nn.Module, memo: dict[int, Any]) -> torch.nn.Module:
    """A deep copy without wrappers, at whatever depth, and without the graphs that its tensors hang in.

    `memo` is that of `copy.deepcopy`. Raises InstrumentError where other processes hold parts of the weights, or where
    they are on the `meta` device.
    """
    refuse_absent(model)
    # Wrappers are replaced by what they wrap on the way, the innermost first.
    with _gathered(model), _WithoutGraph():
        for parameter in model.parameters():
            if hasattr(parameter, "full_tensor"):  # of FSDP 2
                whole = parameter.full_tensor().detach().clone()
                memo[id(parameter)] = torch.nn.Parameter(whole)
        model = unwrapped(model)
        for module in reversed(list(model.modules())):
            if (inner := _inside(module)) is not None:
                memo[id(module)] = copy.deepcopy(inner, memo)
            elif (kind := _unsharded(module)) is not None:
                memo[id(module)] = _copied_as(kind, module, memo)
        twin: torch.nn.Module = copy.deepcopy(model, memo)
    for module in twin.modules():
        vars(module).pop("_compiled_call_impl", None)  # of module.compile()
        _free_methods(module, memo)
    return twin


class _WithoutGraph(TorchFunctionMode):
    """Copies a tensor that hangs in a graph (a loss that the module kept) by its values; torch itself refuses."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = copied = tensor.detach().clone()
            return copied
        return func(*args, **(kwargs or {}))


def _inside(module: torch.nn.Module) -> torch.nn.Module | None:
    """What this module wraps; None where it is no wrapper."""
    for kind in type(module).__mro__:
        if kind.__name__ in INSIDE and kind.__module__.partition(".")[0] in PACKAGES:
            return getattr(module, INSIDE[kind.__name__])
    return None


# -- precision -------------------------------------------------------------------------------------------------------


def _free_methods(module: torch.nn.Module, memo: dict[int, Any]) -> None:
    """Take autocast and torch.compile off the methods of a copy: of Accelerate (`Trainer(bf16=True)`), of
    `torch.autocast(…)` as a decorator, of `torch.compile(module.forward)`.

    Whatever else was put in the place of a method is the user's own, and stays.
    """
    held = vars(module)
    if "_original_forward" in held and "forward" in held:  # where Accelerate puts it
        held["forward"] = held.pop("_original_forward")
    for name in ("forward", *(key for key, value in held.items() if key != "forward" and callable(value))):
        method: Any = getattr(module, name, None)
        bare = method
        while (inner := _under_wrapper(bare)) is not None:
            bare = inner
        if bare is method:
            continue
        if isinstance(method, MethodType) and not isinstance(bare, MethodType):
            bare = MethodType(bare, module)
        if isinstance(bare, MethodType) and id(bare.__self__) in memo:
            bare = MethodType(bare.__func__, memo[id(bare.__self__)])  # a method of the original becomes the copy's
        if isinstance(bare, MethodType) and getattr(type(module), name, None) is bare.__func__:
            held.pop(name, None)  # nothing but the class's own is left
        else:
            held[name] = bare


def _under_wrapper(method: Any) -> Any:
    """What a method under autocast, or of a compiler, calls; None where it is neither."""
    function = getattr(method, "__func__", method)
    if not isinstance(function, FunctionType):
        return getattr(function, "model_forward", None)  # accelerate's ConvertOutputsToFp32
    if hasattr(function, "_torchdynamo_orig_callable"):  # of torch.compile(module.forward)
        return function._torchdynamo_orig_callable
    return getattr(function, "__wrapped__", None) if function.__globals__["__name__"] in AROUND_FORWARD else None


# -- shards ----------------------------------------------------------------------------------------------------------


def refuse_absent(model: torch.nn.Module) -> None:
    """Raise InstrumentError where this process does not hold the weights."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        mesh = getattr(tensor, "device_mesh", None)
        if tensor.device.type == "meta":
            raise InstrumentError(
                f"{name} lies on the meta device, which holds no numbers: load the weights (or model.to_empty(...)) "
                "before measuring"
            )
        if mesh is not None and mesh.size() > 1:
            raise InstrumentError(_sharded(f"{name} is sharded over {mesh.size()} processes"))
        if getattr(tensor, "ds_numel", tensor.numel()) != tensor.numel():
            raise InstrumentError(_sharded(f"DeepSpeed's ZeRO 3 holds {name} in parts"))
    for module in model.modules():
        if _is_fsdp(module) and module.process_group.size() > 1:  # type: ignore[operator]
            raise InstrumentError(_sharded("FullyShardedDataParallel shards it over the processes"))


def _sharded(what: str) -> str:
    return (
        f"the weights are not whole in this process ({what}): use devmon.callbacks.Sidecar, save whole checkpoints and "
        "measure those afterwards with devmon measure, or train with DDP"
    )


def _is_fsdp(module: torch.nn.Module) -> bool:
    return any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__)


@contextmanager
def _gathered(model: torch.nn.Module) -> Iterator[None]:
    """Inside, parameters that FSDP keeps flat have their own names and shapes again."""
    with ExitStack() as stack:
        for module in _outermost(model):
            stack.enter_context(module.summon_full_params(module, writeback=False))  # type: ignore[operator]
        yield


def _outermost(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules of FSDP 1 that are in no other."""
    if _is_fsdp(module):
        yield module
    else:
        for child in module.children():
            yield from _outermost(child)


def _unsharded(module: torch.nn.Module) -> type | None:
    """The class that `fully_shard` (FSDP 2) found a module to be of; None where it did not touch it."""
    mro = type(module).__mro__
    sharded = any(kind.__name__ == "FSDPModule" for kind in mro)
    return next((kind for kind in mro[1:] if kind.__name__ != "FSDPModule"), None) if sharded else None


def _copied_as(kind: type, module: torch.nn.Module, memo: dict[int, Any]) -> torch.nn.Module:
    """A copy of that class with whole parameters, and without the hooks by which its shards are exchanged."""
    twin: torch.nn.Module = object.__new__(kind)
    memo[id(module)] = twin
    kept = {key: value for key, value in vars(module).items() if "_hooks" not in key and "composable" not in key}
    vars(twin).update(vars(torch.nn.Module()) | copy.deepcopy(kept, memo))
    return twin
