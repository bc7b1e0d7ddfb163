"""What a command line names: a model and its LLC instrument, a list of watches, and the checkpoints of a run."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from devmon.checkpoints.weights import fitting, load
from devmon.errors import DataError
from devmon.instruments import LLC
from devmon.monitoring.isolation import private_copy
from devmon.watch import Watch


def load_source(source: str) -> tuple[nn.Module | None, LLC]:
    """The model (untrained) and the instrument that `path/to/script.py:name` or `package.module:name` returns; no model
    (None) where it returns the instrument alone, for checkpoints that bring their architecture.

    `name` is a function without required arguments. A script is imported, so what it should not do then stands under
    `if __name__ == "__main__":`. Of a LightningModule the part is taken that a `Monitor` would measure.
    """
    match _called(source):
        case (nn.Module() as model, LLC() as instrument):
            return _network(model), instrument
        case LLC() as instrument:
            return None, instrument
        case other:
            got = ", ".join(type(part).__name__ for part in (other if isinstance(other, tuple) else [other]))
            raise DataError(
                f"{source} must return (model, LLC(data, loss, ...)), a torch module first, or the LLC alone; "
                f"got ({got})"
            )


def load_model(source: str) -> tuple[nn.Module, torch.Tensor | None]:
    """The model, and inputs for it or None, that `source` names: a model, a pair of both, or a function of such."""
    named = _called(source, or_value=True)
    if isinstance(named, type) and issubclass(named, nn.Module):
        try:
            named = named()
        except TypeError as error:
            raise DataError(
                f"{source} is a class that needs arguments ({error}): name a function that makes one"
            ) from None
    match named:
        case nn.Module() as model:
            return _network(model), None
        case (nn.Module() as model, torch.Tensor() as inputs):
            return _network(model), inputs
        case other:
            raise DataError(f"{source} must be, or return, a model or (model, inputs); got {type(other).__name__}")


def load_study(source: str) -> tuple[nn.Module | None, tuple[Watch, ...] | None]:
    """What is measured on a series of checkpoints: the model (untrained), the watches, or both.

    `source` names a model, a list of watches, a Monitor, a pair (model, watches), or a function that returns such.
    """
    named = _called(source, or_value=True)
    pair = isinstance(named, tuple) and len(named) == 2 and isinstance(named[0], nn.Module)
    model, watches = named if pair else (None, named)
    if isinstance(watches, nn.Module):
        model, watches = watches, None
    part, watches = getattr(watches, "model", None), getattr(watches, "watches", watches)
    fits = isinstance(watches, (list, tuple)) and watches and all(isinstance(watch, Watch) for watch in watches)
    if watches is not None and not fits:
        raise DataError(
            f"{source} must be, or return, a model, a list of Watch, a Monitor, or (model, watches); got "
            f"{type(named).__name__}"
        )
    return None if model is None else _network(model, part), None if watches is None else tuple(watches)


def _called(source: str, or_value: bool = False) -> Any:
    """What the function named by `source` returns; with `or_value` also a value that is no function."""
    where, _, name = source.rpartition(":")
    if not where or not name:
        raise DataError(f"expected path/to/script.py:name or package.module:name, got {source!r}")
    module = _script(Path(where)) if where.endswith(".py") else _module(where)
    function = getattr(module, name, None)
    if or_value and function is not None and not inspect.isfunction(function):
        return function
    if not callable(function):
        own = {key: f for key, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
        known = ", ".join(key for key in own if key[0] != "_")
        raise DataError(f"{where} has no function {name!r}; it has {known or 'none'}")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise DataError(f"{source} must be callable without arguments ({error}): give its arguments defaults") from None
    return function()


def late_and_middle(steps: Sequence[int], late: int | None = None, middle: int | None = None) -> list[int]:
    """The last step, and that in the middle by count of those from 1 to it; a single step where they are the same.

    >>> late_and_middle([0, 1, 2, 5, 10, 20]), late_and_middle([0, 1, 2, 5, 10, 20], middle=10), late_and_middle([0, 7])
    ([20, 5], [20, 10], [7])
    """
    for name, step in (("late", late), ("middle", middle)):
        if step is not None and step not in steps:
            raise DataError(f"there is no checkpoint of --{name} {step}; there are {', '.join(map(str, steps))}")
    trained = [step for step in steps if 0 < step <= (steps[-1] if late is None else late)]
    if not trained:
        raise DataError("there is no checkpoint past step 0, where the weights are no minimum: save later ones")
    late = trained[-1]
    middle = trained[(len(trained) - 1) // 2] if middle is None else middle
    if middle > late:
        raise DataError(f"--middle {middle} comes after the late checkpoint, {late}: give an earlier one")
    return [late] if middle == late else [late, middle]


def with_weights(model: nn.Module, path: Path, prefix: str | None = None) -> nn.Module:
    """A copy of `model`, in evaluation mode, with the weights of a Lightning checkpoint.

    Raises DataError where the file is none, or holds other weights (`devmon.checkpoints.weights.fitting`).
    """
    content = load(path)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise DataError(f"{path} has no 'state_dict': it is no checkpoint of Lightning")
    stored = {key: value for key, value in content["state_dict"].items() if isinstance(value, torch.Tensor)}
    twin = private_copy(model)
    twin.load_state_dict(fitting(twin, stored, path.name, prefix), strict=False)  # fitting is strict
    return twin


def _network(model: nn.Module, part: Any = None) -> nn.Module:
    """The part of a LightningModule that a `Monitor` would measure; another module stands for itself."""
    if "lightning" not in sys.modules:  # then it is none, and an import of seconds is spared
        return model
    from devmon.callbacks.network import network

    return network(cast(Any, model), part)


def _script(path: Path) -> ModuleType:
    """The script as a module of its own, told apart from other scripts of its name by where it lies.

    What stands behind the @ is left out of the identity of what it defines: a run goes on from another folder.
    """
    if not path.is_file():
        raise DataError(f"there is no script at {path}")
    place = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
    name = f"_source_{path.stem}@{place}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.path.insert(0, str(path.resolve().parent))  # as `python script.py` has it
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())  # as `python -m module` has it
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise DataError(
            f"there is no module {error.name!r} here: run this where it can be imported, or give the path of its file, "
            "path/to/script.py:name"
        ) from None
