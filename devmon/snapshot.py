"""What an instrument sees: the weights at one training step, and nothing of the training around them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
import xarray as xr


@dataclass(frozen=True)
class Update:
    """One update of an optimizer, by the names of parameters: copies, to be read. Empty where none was made yet.

    - `gradients`: what the optimizer used; `before`, `after`: the weights around it
    - `second_moments`: Adam's after the update, and `adam`: (β₂, ε, number of updates); empty for other optimizers
    """

    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    after: dict[str, torch.Tensor] = field(default_factory=dict)
    second_moments: dict[str, torch.Tensor] = field(default_factory=dict)
    adam: dict[str, tuple[float, float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """The model at one step, handed to an instrument.

    `model` is a private copy in evaluation mode: an instrument may hook or perturb it, training never sees that.
    `seed` belongs to the run and the watch and not to the step, so the same random numbers serve every checkpoint.
    `memo` is common to the instruments of one observation: the passes that one of them reads (`devmon.anatomy.passes`)
    serve the others, as does what chains need of the loss at these weights (`devmon.sampling.center`). It holds values
    of the untouched model only, to be read and not written. `update` is the update that led to these weights, where a
    loop hands it over to instruments with `needs_update`; else None.
    """

    step: int
    model: torch.nn.Module
    seed: int = 0
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    update: Update | None = field(default=None, compare=False, repr=False)

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


@runtime_checkable
class Divisible(Instrument, Protocol):
    """An instrument whose work the ranks of a data-parallel training do together; others run on rank 0 alone.

    `join` of what the shares return is what the instrument itself returns, up to rounding, for any number of ranks:
    random numbers belong to what is drawn (`snapshot.generator("chain", 3)`), never to the rank. Every rank has the
    weights, the buffers and the seed of rank 0. Parts travel to all ranks, so they should be small: traces, sums.
    """

    def share(self, rank: int, ranks: int, /) -> Instrument | None:
        """The part of the work that `rank` of `ranks` does, from 0; None where nothing is left for it (not rank 0)."""

    def join(self, parts: list[xr.Dataset], /) -> xr.Dataset:
        """The whole from the parts, in order of rank, those of ranks that had nothing to do left out."""


@runtime_checkable
class Choosing(Instrument, Protocol):
    """An instrument with settings that are chosen at the weights, once for a run, unless it is `settled`.

    `choose` at some weights gives a record that JSON can hold, `settle` of that the instrument to measure with. The run
    keeps the record. InstrumentError from `choose` says that it cannot be made at these weights.
    """

    @property
    def settled(self) -> bool: ...

    def choose(self, models: Sequence[torch.nn.Module], seed: int, later: bool = True) -> dict[str, Any]: ...

    def settle(self, record: Mapping[str, Any], /) -> Instrument: ...


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
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # of FSDP 2
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()[:16]
