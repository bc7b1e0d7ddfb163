"""What an instrument sees: the weights at one training step, and nothing of the training around them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
import xarray as xr


@dataclass(frozen=True)
class Snapshot:
    """The model at one step, handed to an instrument.

    `model` is a private copy in evaluation mode: an instrument may hook or perturb it, training never sees that.
    `seed` belongs to the run and the watch and not to the step, so the same random numbers serve every checkpoint.
    """

    step: int
    model: torch.nn.Module
    seed: int = 0

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter (or buffer) lies; the CPU for a model without any."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            return tensor.device
        return torch.device("cpu")

    def generator(self, *what: object, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator indexed by what is drawn, e.g. `snapshot.generator("chain", 3)`, never by who draws it."""
        return torch.Generator(device).manual_seed(derive_seed(self.seed, *what))


class Instrument(Protocol):
    """A pure function of the weights. Ours are frozen dataclasses: the fields are the whole configuration.

    The dataset has named dimensions and the same variables at every step. `x_se` is the standard error of `x`.
    `attrs["headline"]` lists the variables that are followed as series (default: every scalar without `_se`). A
    variable's attribute `smallest_change` is the smallest change of interest: events below it are noted, not reported.
    """

    def __call__(self, snapshot: Snapshot, /) -> xr.Dataset: ...


def derive_seed(seed: int, *what: object) -> int:
    """A 63-bit seed for `what` under `seed`: independent of order of calls, process and platform."""
    text = "/".join([str(seed), *(str(part) for part in what)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def weights_digest(model: torch.nn.Module) -> str:
    """Sixteen hex digits of SHA-256 over the state dict's shapes, dtypes and bytes, in its order (names left out,
    so that a checkpoint read into another wrapper is the same model)."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        if isinstance(tensor, torch.Tensor):
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()[:16]
