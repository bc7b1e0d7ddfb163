"""Sites: the places in a transformer that can be read and written, by name and layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# In the order of a forward pass: those of each layer, then those of the whole model. `Anatomy` says what each is.
SITES = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "neurons", "mlp_out", "resid_post")
ENDS = ("normed", "unembedded")

Site = str | tuple[str, int]  # of all layers, or of one
LayerSite = tuple[str, int]  # of one layer; 0 for ENDS
Write = Callable[[Tensor], Tensor] | Tensor  # the new value from the one that is there, or the new value


class Reads(dict[LayerSite, Tensor]):
    """What was read: `reads["z", 3]`, all layers stacked with `reads.stack("z")`, and `reads["normed", 0]`."""

    def stack(self, name: str) -> Tensor:
        """(layer, batch, pos, …)."""
        return torch.stack([self[key] for key in sorted(self) if key[0] == name])
