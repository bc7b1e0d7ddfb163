"""By which layout an instrument reads a model: part of what its numbers mean, and in no field of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from devmon.anatomy.forward import original
from devmon.anatomy.layout import Layout
from devmon.anatomy.parts import Parts
from devmon.anatomy.proposing.propose import fitting
from devmon.anatomy.variants.outputs import declared
from devmon.monitoring.fingerprint import describe
from devmon.monitoring.isolation import isolated, private_copy


def remedy(model: nn.Module, said: Iterable[str]) -> str:
    """The line that gives a model its parts, where what was `said` of it lacks them and it has a layout; "" else."""
    if declared(model) is not None or not any("Layout(" in text for text in said):
        return ""
    with isolated():
        line = fitting(private_copy(model))
    name = type(original(model)).__name__
    return f"{name} has a layout that fits, before the monitor: type(model).anatomy = {line}" if line else ""


def layout_of(instrument: Any, model: nn.Module | None, memo: Mapping[Any, Any] | None = None) -> str | None:
    """The layout as text, for an instrument that has a field `layout`: the one that was found to fit (`memo` of the
    snapshot that it measured), else the one that it or the model declares; None where neither is known. Numbers stand
    in it for the attributes of the model that hold them."""
    if getattr(type(instrument), "stands_for_of", False):  # an `InParts`
        instrument = instrument.of
    if model is None or not hasattr(instrument, "layout"):
        return None
    found = (memo or {}).get(("anatomy", instrument.layout))
    layout = found[0] if found is not None else instrument.layout or declared(model)
    if not isinstance(layout, Layout) or not (layout.blocks or layout.out):  # not its adapter of logits alone
        return None
    with suppress(Exception):  # one that does not fit is refused where it is used
        layout = Parts(model, layout, "layout_of").resolved
    return describe(layout)
