"""What the instruments are, and what a list of watches will cost: texts and tables made from the classes themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from typing import Any

from devmon.cost import Cost
from devmon.errors import DataError, DevmonError
from devmon.watch import Watch, unique_names


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


@dataclass(frozen=True)
class Estimate:
    """What one watch will cost up to the last step: `observations` times `cost` (None: the instrument does not tell)."""

    name: str
    instrument: str
    observations: int
    cost: Cost | None

    @property
    def work(self) -> int | None:
        """In tokens passed forward, all observations together."""
        return None if self.cost is None else self.cost.work * self.observations


def estimates(watches: Iterable[Watch], last: int) -> list[Estimate]:
    """What each watch costs in a run of the steps 0 to `last`. Raises DevmonError for a `last` below 0."""
    if last < 0:
        raise DevmonError(f"the last step must be at least 0, got {last}")
    found = []
    for watch in unique_names(watches):
        observations = sum(1 for step in range(last + 1) if step in watch.steps)
        tell = getattr(watch.instrument, "cost", None)
        name = getattr(type(watch.instrument), "__name__", "")
        found.append(Estimate(watch.name, name, observations, tell() if callable(tell) else None))
    return found


def _shown(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)
