"""What the instruments are: texts made from the classes themselves."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Any

from devmon.errors import DataError


def instruments() -> dict[str, type]:
    """The instruments that devmon brings, by name."""
    from devmon import instruments as module

    return {name: getattr(module, name) for name in module.__all__}


def summary(kind: type) -> str:
    """The first sentence of an instrument's docstring."""
    text = inspect.getdoc(kind) or ""
    return " ".join(text.split("\n\n")[0].split())


def explain(name: str) -> str:
    """Everything that is written about an instrument: how it is called, its fields with their defaults, its docstring.

    Raises DataError for a name that no instrument has.
    """
    known = instruments()
    if name not in known:
        near = [other for other in known if name.lower() in other.lower()]
        raise DataError(f"there is no instrument {name!r}; " + (f"perhaps {', '.join(near)}" if near else
                        f"those are {', '.join(known)}"))  # fmt: skip
    kind = known[name]
    lines = [f"from devmon.instruments import {name}", ""]
    for field in fields(kind):
        default = "required" if field.default is MISSING else f"= {_shown(field.default)}"
        lines.append(f"  {field.name}: {field.type}  {default}")
    return "\n".join([*lines, "", inspect.getdoc(kind) or ""])


def _shown(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)
