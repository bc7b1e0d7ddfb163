"""Keeping training untouched: what an instrument may disturb is put back, and it only ever holds a copy of a model."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FunctionType
from typing import Any

import numpy as np
import torch

from devmon.errors import InstrumentError
from devmon.monitoring.wrappers import bare_copy, unwrapped

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
EVERYWHERE = [
    hooks
    for name, hooks in vars(torch.nn.modules.module).items()
    if name.startswith("_global_") and isinstance(hooks, dict)
]

COPY_REMEDY = (
    "Instruments work on a copy: hand the bare network over (Monitor(model='net') names an attribute), or save "
    "checkpoints with CheckpointSeries and measure them afterwards"
)


class ChangedModelError(InstrumentError):
    """An instrument changed the model that trains, which cannot be put back."""


@contextmanager
def isolated() -> Iterator[None]:
    """Put every process-wide switch back on leaving: the Python, NumPy, torch and accelerator random states, grad mode,
    default dtype and device, deterministic mode, matmul precision, anomaly detection, thread count, NumPy's error
    handling, hooks on all modules and matplotlib's backend; autocast is off inside."""
    # Reading an accelerator's state would start the accelerator: only where it runs already.
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    current = torch.cuda.current_device() if cuda is not None else None
    # Switches of torch, NumPy and matplotlib that an instrument may flip.
    grad, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    device, precision = torch.get_default_device(), _matmul_precision()
    anomaly = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    fastpath = torch.backends.mha.get_fastpath_enabled()
    errors, backend = np.geterr(), _backend()
    everywhere = [(hooks, dict(hooks)) for hooks in EVERYWHERE]
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        # What is dear to set (the number of threads, the backend), or refused in some states (the precision), is set
        # only where it was changed.
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
            torch.cuda.set_device(current)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if precision is not None and _matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
        torch.set_anomaly_enabled(*anomaly)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        torch.backends.mha.set_fastpath_enabled(fastpath)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        np.seterr(**errors)
        for hooks, before in everywhere:
            if hooks != before:
                hooks.clear()
                hooks.update(before)
        if backend is not None and _backend() != backend:
            sys.modules["matplotlib"].use(backend)


@contextmanager
def guarded(model: torch.nn.Module) -> Iterator[None]:
    """Raise `ChangedModelError` where parameters, buffers, gradients or modes of the model that trains were changed
    inside: it came into the instrument by another way than the snapshot, and cannot be put back."""
    before = marks(model)
    try:
        yield
    finally:
        changed = [name for name, mark in marks(model).items() if before.get(name, mark) != mark]
        if changed:
            raise ChangedModelError(
                f"the instrument changed the model that trains ({', '.join(changed[:3])}{', …' if changed[3:] else ''})"
                ": it must use snapshot.model only, and hold no reference to the trained module (give it a deep copy). "
                "Start this training again from its last checkpoint"
            )


def marks(model: torch.nn.Module) -> dict[str, object]:
    """For each tensor and module what a change in place moves (one through `tensor.data` does not)."""
    marks: dict[str, object] = {f"{name}.training": module.training for name, module in model.named_modules()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_inference():
            grad = tensor.grad if tensor.is_leaf else None
            marks[name] = tensor._version, tensor.requires_grad
            marks[f"{name}.grad"] = None if grad is None else (id(grad), grad._version)
    return marks


def private_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A deep copy in evaluation mode without gradients, without what stands around it (`monitoring.wrappers`: nothing
    of it is parallel, compiled or under autocast) and without the user's hooks (torch's own, such as those of
    `torch.nn.utils`, stay: they are part of the function).

    Raises `InstrumentError` where the copy would share functions with the original that reach the original's modules.
    """
    original, memo = unwrapped(model), dict[int, Any]()
    try:
        twin = bare_copy(model, memo)
    except InstrumentError:
        raise
    except Exception as error:
        raise InstrumentError(
            f"{_name(original)} cannot be copied ({type(error).__name__}: {error}). {COPY_REMEDY}"
        ) from error
    # What deepcopy leaves as it was: functions that reach the original, and the user's hooks.
    ours = {id(module) for module in original.modules()}
    for name, module in twin.named_modules():
        for key, value in vars(module).items():
            if any(id(held) in ours for held in _kept_by(value)):
                where = ".".join(part for part in (name, key) if part)
                raise InstrumentError(
                    f"{_name(original)} cannot be copied: {where} is a function that keeps a module of the model that "
                    f"trains, and a copy would run that one. {COPY_REMEDY}"
                )
        for kind in HOOKS:
            hooks = getattr(module, kind)
            for key in [k for k, hook in hooks.items() if not _is_torch(hook)]:
                del hooks[key]
    return twin.eval()


def _kept_by(function: object) -> Iterator[object]:
    """What a plain function, or a method made of one, holds in its closure: a deep copy shares it."""
    waiting, seen = [getattr(function, "__func__", function)], set()
    while waiting:
        inner = waiting.pop()
        if id(inner) in seen or not isinstance(inner, FunctionType):
            continue
        seen.add(id(inner))
        for cell in inner.__closure__ or ():
            with suppress(ValueError):  # an empty cell
                held = cell.cell_contents
                yield getattr(held, "__self__", held)
                waiting.append(getattr(held, "__func__", held))


def _name(model: torch.nn.Module) -> str:
    return type(model).__name__


def _matmul_precision() -> str | None:
    with suppress(RuntimeError):  # where it was set for each backend: then it has no single value
        return torch.get_float32_matmul_precision()
    return None


def _backend() -> str | None:
    """matplotlib's backend, if one was chosen."""
    matplotlib = sys.modules.get("matplotlib")
    chosen = None if matplotlib is None else dict.get(matplotlib.rcParams, "backend")
    return chosen if isinstance(chosen, str) else None  # before the first figure it is a sentinel


def _is_torch(hook: object) -> bool:
    owner = getattr(hook, "__func__", hook)
    return (getattr(owner, "__module__", None) or type(owner).__module__ or "").startswith("torch.")
