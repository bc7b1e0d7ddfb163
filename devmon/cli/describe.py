"""What the instruments are, read from the classes: their fields, docstrings, and the variables that these list."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, dataclass, fields
from typing import Any

from devmon.errors import DataError

# the bullet of a returned variable, on one line: - `name` (dims), unit: meaning
BULLET = re.compile(
    r"- (?P<names>`[^`]+`(?:(?:,| and) `[^`]+`)*)(?: \((?P<dims>[^)]*)\))?(?:, (?P<unit>[^:]+))?: (?P<meaning>.+)"
)
NULL = re.compile(r"(?P<meaning>.*?)\s*Null: (?P<null>.+?)\.?")


@dataclass(frozen=True)
class Variable:
    """A variable that an instrument returns; `dims` is "" for a scalar, `null` what chance or a control would give."""

    name: str
    dims: str
    unit: str
    meaning: str
    null: str = ""


@dataclass(frozen=True)
class Description:
    """A docstring in three parts: the text above the returned variables, these, and the text below them."""

    above: str
    variables: tuple[Variable, ...]
    below: str


def instruments() -> dict[str, type]:
    """The instruments that devmon brings, by name."""
    from devmon import instruments as module

    return {name: getattr(module, name) for name in module.__all__}


def instrument(name: str) -> type:
    """The instrument of this name. Raises DataError for a name that no instrument has."""
    known = instruments()
    if name not in known:
        near = [other for other in known if name.lower() in other.lower()]
        hint = f"perhaps {', '.join(near)}" if near else f"those are {', '.join(known)}"
        raise DataError(f"there is no instrument {name!r}; {hint}")
    return known[name]


def summary(kind: type) -> str:
    """The first sentence of an instrument's docstring."""
    text = inspect.getdoc(kind) or ""
    return " ".join(text.split("\n\n")[0].split())


def signature(kind: Any) -> str:
    """How an instrument is imported, and its fields with their types and defaults, one a line."""
    lines = [f"from devmon.instruments import {kind.__name__}", ""]
    for entry in fields(kind):
        default = "required" if entry.default is MISSING else f"= {_shown(entry.default)}"
        lines.append(f"  {entry.name}: {entry.type}  {default}")
    return "\n".join(lines)


def description(doc: str) -> Description:
    """The parts of a docstring. A variable is a bullet that gives its dims, its unit or both.

    >>> print(description('''Heads.
    ...
    ... - `score` (layer, head), attention: mean over
    ...   queries. Null: `uniform`.
    ... - `batch_size`: this is a field.
    ... Raises DataError.''').variables)
    (Variable(name='score', dims='layer, head', unit='attention', meaning='mean over queries.', null='`uniform`'),)
    """
    above: list[str] = []
    below: list[str] = []
    variables: list[Variable] = []
    lines = doc.splitlines()
    while lines:
        # a bullet goes on over the lines that are indented under it
        entry = [lines.pop(0)]
        while entry[0].startswith("- ") and lines and lines[0].startswith("  "):
            entry.append(lines.pop(0))
        if held := _variables(" ".join(line.strip() for line in entry)):
            variables += held
        else:
            (below if variables else above).extend(entry)
    return Description("\n".join(above).strip(), tuple(variables), "\n".join(below).strip())


def _variables(bullet: str) -> list[Variable]:
    """The variables of a bullet (several names may share one); none where it is text of another kind."""
    match = BULLET.fullmatch(bullet)
    if match is None or (match["dims"] is None and match["unit"] is None):
        return []
    control = NULL.fullmatch(match["meaning"])
    meaning, null = (control["meaning"], control["null"]) if control else (match["meaning"], "")
    names = re.findall(r"`([^`]+)`", match["names"])
    return [Variable(name, match["dims"] or "", match["unit"] or "", meaning, null) for name in names]


def _shown(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)
