"""Where a dictionary's training data come from: one batch a step, the same for the same step, in fixed memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from devmon.anatomy.anatomy import Anatomy
from devmon.anatomy.layout import Layout
from devmon.data.probe import minibatches, probe_tokens
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import derive_seed

MLP_IN = "mlp_in"  # what the MLP reads, the stream after its norm: a site of transcoders, beside those of `Anatomy`
BLOCK = 2**16  # places held at once, and shuffled: 151 MB at d = 576, and as much again while they are read


class Source(Protocol):
    """Batch number `step` as inputs (n, d) and targets (n, d_out), which may be one tensor.

    `places` is how many places there are before they come again; `batch` is n.
    """

    @property
    def places(self) -> float: ...
    @property
    def batch(self) -> int: ...
    def __call__(self, step: int, /) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Held:
    """Rows of tensors that are in memory, `x` (place, d) and targets `y`, anew in random order each time around."""

    x: Tensor
    y: Tensor | None = None
    batch: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or (self.y is not None and len(self.y) != len(self.x)) or self.batch < 1:
            raise DataError(
                f"Held: x is (place, d), y as long, batch at least 1; got {tuple(self.x.shape)}, "
                f"{None if self.y is None else tuple(self.y.shape)} and {self.batch}"
            )

    @property
    def places(self) -> float:
        return len(self.x)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        at = _positions(len(self.x), step * self.batch, self.batch, self.seed).to(self.x.device)
        x = self.x[at]
        return x, x if self.y is None else self.y[at]


@dataclass
class Streamed:
    """Activations of a model at a site, read as they are needed.

    `tokens` (sequence, pos) int64 are passed in blocks of about `block` places: whole sequences, drawn at random
    without repetition until all have come. Each block is shuffled, and dealt in batches. The first place of a sequence
    is left out, whose state is an outlier in most models. `read` and `target` are lists of sites, side by side in x
    (n, sites · d) and y: one of an autoencoder, one each of a transcoder ("mlp_in" and "mlp_out"), those of all layers
    of a cross-layer transcoder. Heads and their numbers are one dimension. Memory: two blocks, whatever the tokens.

    Raises InstrumentError for a site that the model lacks.
    """

    model: nn.Module
    tokens: Tensor
    read: list[tuple[str, int]]
    target: list[tuple[str, int]] | None = None
    batch: int = 4096
    seed: int = 0
    block: int = BLOCK
    layout: Layout | None = None
    batch_size: int = 32  # sequences of a pass
    who: str = "Streamed"
    _held: tuple[int, Tensor, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.tokens = probe_tokens(self.tokens, self.who)
        self.anatomy = Anatomy(self.model, self.layout, self.who)
        for site in (*self.read, *(self.target or [])):
            check_site(self.anatomy, site)
        by_sequence = self.tokens.shape[1] - 1
        sequences = min(len(self.tokens), max(1, round(max(self.block, self.batch) / by_sequence)))
        self._of_block = sequences
        self._steps = max(1, sequences * by_sequence // self.batch)
        self.batch = min(self.batch, sequences * by_sequence)

    @property
    def places(self) -> float:
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        number, within = divmod(step, self._steps)
        if self._held is None or self._held[0] != number:
            self._held = None  # let go of before the next is read
            rows = _positions(len(self.tokens), number * self._of_block, self._of_block, self.seed)
            self._held = (number, *self._read(rows, derive_seed(self.seed, "block", number)))
        _, x, y = self._held
        dealt = slice(within * self.batch, (within + 1) * self.batch)
        part = x[dealt]
        return part, part if y is x else y[dealt]

    def _read(self, rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        tokens = self.tokens[rows]
        x, y = site_activations(self.anatomy, tokens, self.read, self.target, self.batch_size)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
        mixed = x[order]
        return (mixed, mixed) if self.target is None else (mixed, y[order])


def site_activations(
    anatomy: Anatomy,
    tokens: Tensor,
    read: list[tuple[str, int]],
    target: list[tuple[str, int]] | None = None,
    batch_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Inputs (place, sites · d) and targets of a dictionary for tokens (batch, pos), first places left out.

    In float32, or the model's float64. Where `target` is None the targets are the inputs.
    """
    wanted = [*read, *(target or [])]
    needed = list(dict.fromkeys(_seen_at(anatomy, site) for site in wanted))
    parts: list[list[Tensor]] = []
    for rows in minibatches(len(tokens), batch_size):
        reads = anatomy.read_up_to(tokens[rows], needed)
        parts.append([flat(anatomy, site, reads[_seen_at(anatomy, site)])[:, 1:].flatten(0, 1) for site in wanted])
    by_site = [torch.cat(each) for each in zip(*parts, strict=True)]
    x = torch.cat(by_site[: len(read)], -1) if len(read) > 1 else by_site[0]
    if target is None:
        return x, x
    return x, torch.cat(by_site[len(read) :], -1) if len(target) > 1 else by_site[-1]


def flat(anatomy: Anatomy, site: tuple[str, int], value: Tensor) -> Tensor:
    """What was read at a site as (batch, pos, d): heads side by side, the stream through the norm of `mlp_in`."""
    value = value if value.dtype == torch.float64 else value.float()
    if site[0] == MLP_IN:
        norm = anatomy.norm_in(site[1], "mlp")
        weight = next(iter(anatomy.blocks[site[1]].parameters()), value)
        with torch.no_grad():
            normed = norm(value.to(weight.dtype))
        return normed if normed.dtype == torch.float64 else normed.float()
    return value.flatten(2) if value.ndim > 3 else value


def check_site(anatomy: Anatomy, site: Any) -> None:
    """Raises InstrumentError for what is no site of one layer whose values are vectors by place."""
    if not (isinstance(site, tuple) and len(site) == 2 and isinstance(site[0], str) and isinstance(site[1], int)):
        raise InstrumentError(f"{anatomy.who}: a site is a name and a layer, such as ('mlp_out', 0); got {site!r}")
    if site[0] == "pattern":
        raise InstrumentError(f"{anatomy.who}: a pattern is no vector by place: take 'z', 'attn_out' or the stream")
    anatomy.expand(_seen_at(anatomy, site))


def _seen_at(anatomy: Anatomy, site: tuple[str, int]) -> tuple[str, int]:
    name, layer = site
    if name != MLP_IN:
        return anatomy.expand(site)[0]
    if anatomy.layout.post_norm or not anatomy.has_mlp:
        raise InstrumentError(
            f"{anatomy.who}: {type(anatomy.model).__name__} has no stream whose norm its MLP reads: take an autoencoder"
        )
    return anatomy.expand(("resid_pre" if anatomy.parallel else "resid_mid", layer))[0]


def _positions(count: int, start: int, length: int, seed: int) -> Tensor:
    """Places `start` to `start + length` of endless random orders of `count` items, each all of them once."""
    taken, at = [], start
    while at < start + length:
        around, within = divmod(at, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, "around", around)))
        part = order[within : within + start + length - at]
        taken.append(part)
        at += len(part)
    return torch.cat(taken)
