"""Sites: the places in a transformer that can be read and written, by name and layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SITES = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "neurons", "mlp_out", "resid_post")
ENDS = ("normed", "unembedded")

Site = str | tuple[str, int]
Write = Callable[[Tensor], Tensor] | Tensor


class Reads(dict[tuple[str, int], Tensor]):
    """What was read: `reads["z", 3]`, all layers stacked with `reads.stack("z")`, and `reads["normed", 0]`."""

    def stack(self, name: str) -> Tensor:
        """(layer, batch, pos, …)."""
        return torch.stack([self[key] for key in sorted(self) if key[0] == name])
