"""Who measured: the class and the configuration of an instrument, as text and as a digest. Needs no torch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from devmon.monitoring.code import callables, code_digest


def identity(instrument: Any) -> dict[str, Any]:
    """The JSON-able identity of an instrument: `instrument` (class), `fields` (name to short text; arrays by shape and
    SHA-256), `fingerprint` (16 hex digits over both) and `doc` (first paragraph of the docstring).

    A change in a field, one element of probe data included, changes the fingerprint. `code` has the digests of the
    functions and classes among them that devmon does not bring, by name: they tell one that was moved to another module
    from another one (`devmon.store.same`), and are not in the fingerprint.
    """
    if getattr(type(instrument), "stands_for_of", False):  # the same numbers made another way: an `InParts`
        instrument = instrument.of
    kind = instrument if inspect.isfunction(instrument) or inspect.isclass(instrument) else type(instrument)
    name = f"{_module(kind)}.{kind.__qualname__}"
    fields = {key: describe(value) for key, value in _fields(instrument).items()}
    text = json.dumps([name, fields], sort_keys=True)
    doc = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
    return {
        "instrument": name,
        "fields": fields,
        "fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16],
        "code": {
            describe(each): code_digest(each, describe)
            for each in callables([kind, instrument, list(_fields(instrument).values())])
            if not _module(each).startswith("devmon.")
        },
        "doc": doc,
    }


def describe(value: Any) -> str:
    """Text that is equal exactly when the configuration is: arrays hashed, functions by name, no addresses."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        dtype = str(value.dtype)
        return _array(value.float().numpy() if dtype == "torch.bfloat16" else value.numpy(), dtype)
    if isinstance(value, np.ndarray):
        return _array(value, str(value.dtype))
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{describe(k)}: {describe(v)}" for k, v in value.items())) + "}"
    if isinstance(value, range):
        return repr(value)
    if isinstance(value, Set):
        return "{" + ", ".join(sorted(describe(item) for item in value)) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(describe(item) for item in value) + "]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = ", ".join(f"{key}={describe(item)}" for key, item in _fields(value).items())
        return f"{type(value).__name__}({parts})"
    if isinstance(value, functools.partial):
        given = [describe(value.func), *map(describe, value.args)]
        return f"functools.partial({', '.join([*given, *(f'{k}={describe(v)}' for k, v in value.keywords.items())])})"
    if callable(value):
        code = getattr(value, "__code__", None)
        name = f"{_module(value)}.{getattr(value, '__qualname__', type(value).__qualname__)}"
        if code is not None and "<lambda>" in name:
            return f"{name}:{hashlib.sha256(code.co_code + repr(code.co_consts).encode()).hexdigest()[:8]}"
        return name
    return f"{_module(type(value))}.{type(value).__qualname__}"


def _module(value: Any) -> str:
    """The module that something was defined in; of a script (`offline.source`) its stem alone, wherever it lies."""
    return str(getattr(value, "__module__", "")).partition("@")[0]


def _array(array: np.ndarray, dtype: str) -> str:
    array = np.ascontiguousarray(array)
    return f"{dtype}{list(array.shape)} sha256:{hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def _counts(field: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a field is part of the identity: by its `metadata["identity"]` not "never" (it changes cost, not
    numbers), and "if changed" only away from its default (it came after runs were stored without it)."""
    when = field.metadata.get("identity", "always")
    return when == "always" or (when == "if changed" and getattr(value, field.name) != field.default)


def _fields(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if _counts(f, value)}
    return {key: item for key, item in getattr(value, "__dict__", {}).items() if not key.startswith("_")}
