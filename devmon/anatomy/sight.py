"""What a place can attend to at all: everything before it, a window of it, or what comes after too."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# What configs of transformers call the number of places in a window, the query's own included.
WINDOWS = ("sliding_window", "window_size", "attention_window", "local_attention")


def sees_ahead(patterns: Mapping[int, Tensor]) -> bool:
    """Whether any pattern (batch, head, q, k) has weight on later places, as in an encoder."""
    return any(bool(pattern.triu(1).any()) for pattern in patterns.values())


def shortest_window(model: nn.Module, patterns: Mapping[int, Tensor]) -> int | None:
    """How far back, in places, the layer with the shortest window sees; None where every layer sees all of the past.

    A window shows as weight everywhere within a distance and none beyond it. Where heads are so sharp that weights
    within are 0 as well, the model's config has to say that there is one.
    """
    told = [w for m in model.modules() for name in WINDOWS if isinstance(w := _config(m, name), int)]
    found = [_window(pattern, max(told, default=0)) for pattern in patterns.values()]
    return min((window for window in found if window is not None), default=None)


def uniform_attention(queries: Tensor, ahead: bool) -> float:
    """The weight of attention spread evenly over what a query sees, mean over `queries` (q,), counts at each place."""
    places = torch.arange(1, len(queries) + 1, dtype=torch.float64)
    seen = torch.full_like(places, len(queries)) if ahead else places
    return float((queries.double() / seen).sum() / queries.sum())


def _window(pattern: Tensor, told: int) -> int | None:
    length = pattern.shape[-1]
    most, least = pattern.amax((0, 1)), pattern.amin((0, 1))
    place = torch.arange(length, device=pattern.device)
    back = place[:, None] - place
    reach = int(back[most > 0].max()) if bool((most > 0).any()) else 0
    dense = bool((least[(back >= 0) & (back <= reach)] > 0).all())
    if reach >= length - 1 or not (dense or 0 < reach + 1 <= told):
        return None
    return reach if dense else told - 1


def _config(module: nn.Module, name: str) -> object:
    return getattr(getattr(module, "config", None), name, None)
