"""Dictionaries in use: autoencoders, transcoders and crosscoders, each a pure function of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from devmon.data.probe import ByContent
from devmon.errors import DataError


class Activation(Protocol):
    """f (…, m) from h (…, m), elementwise but for the k largest."""

    def __call__(self, h: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Relu:
    """max(h, 0)."""

    def __call__(self, h: Tensor) -> Tensor:
        return h.relu()


@dataclass(frozen=True)
class Largest:
    """max(h, 0) of the `k` largest of each row, 0 elsewhere (2406.04093)."""

    k: int

    def __call__(self, h: Tensor) -> Tensor:
        values, at = h.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(h).scatter(-1, at, values.relu())


@dataclass(frozen=True, eq=False)
class Jump(ByContent):
    """max(h, 0) where h > `threshold` (m,), 0 elsewhere (2407.14435)."""

    threshold: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        return h.relu() * (h > self.threshold)


@dataclass(frozen=True, eq=False)
class Gate(ByContent):
    """max(h · `gain` + `shift`, 0) where h > 0, 0 elsewhere, both (m,) (2404.16014)."""

    gain: Tensor
    shift: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        return (h * self.gain + self.shift).relu() * (h > 0)


@dataclass(frozen=True, eq=False)
class Dictionary(ByContent):
    """h = (x − b_dec) W_enc + b_enc, f = activation(h), ŷ = f W_dec + b_dec.

    `W_enc` (d, m), `b_enc` (m,), `W_dec` (m, d_out), whose row j is the direction of latent j, `b_dec` (d_out,). An
    autoencoder has d_out = d and its target is its input x. A transcoder is `centred=False`: h = x W_enc + b_enc, its
    target another site, and `W_skip` (d, d_out), where there is one, adds x W_skip. A crosscoder is an autoencoder of
    the activations of `parts` snapshots side by side, d = parts · d_model (Lindsey et al. 2024).

    Equal where all tensors are, so that an instrument can hold one as a field.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    activation: Activation = Relu()
    W_skip: Tensor | None = None
    centred: bool = True
    parts: int = 1

    def __post_init__(self) -> None:
        d, m = self.W_enc.shape
        out = self.W_dec.shape[-1]
        want = {"b_enc": (m,), "W_dec": (m, out), "b_dec": (out,), "W_skip": (d, out)}
        for name, shape in want.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise DataError(f"Dictionary: W_enc is {(d, m)}, so {name} is {shape}; got {tuple(tensor.shape)}")
        if (self.centred and d != out) or d % self.parts or out % self.parts:
            raise DataError(
                f"Dictionary: {d} inputs and {out} outputs in {self.parts} parts: an autoencoder has as many of both, "
                "a transcoder is centred=False, and parts are of one width"
            )
        if isinstance(self.activation, Largest) and not 1 <= self.activation.k <= m:
            raise DataError(f"Dictionary: k is 1 to the number of latents, {m}; got {self.activation.k}")

    @property
    def inputs(self) -> int:
        return self.W_enc.shape[0]

    @property
    def outputs(self) -> int:
        return self.W_dec.shape[1]

    @property
    def latents(self) -> int:
        return self.W_enc.shape[1]

    def pre(self, x: Tensor) -> Tensor:
        """h (…, m) of x (…, d)."""
        return (x - self.b_dec if self.centred else x) @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """f (…, m) of x (…, d)."""
        return self.activation(self.pre(x))

    def decode(self, f: Tensor, x: Tensor | None = None) -> Tensor:
        """ŷ (…, d_out) of f (…, m); a dictionary with a skip takes x (…, d) too."""
        y = f @ self.W_dec + self.b_dec
        if self.W_skip is None:
            return y
        if x is None:
            raise DataError("Dictionary.decode: W_skip reads the input: decode(f, x)")
        return y + x @ self.W_skip

    def __call__(self, x: Tensor) -> Tensor:
        """ŷ (…, d_out) of x (…, d)."""
        return self.decode(self.encode(x), x)

    def pre_of(self, x: Tensor, latents: Tensor) -> Tensor:
        """h of some latents, (…, latent)."""
        return (x - self.b_dec if self.centred else x) @ self.W_enc[:, latents] + self.b_enc[latents]

    def part_of(self, f: Tensor, latents: Tensor) -> Tensor:
        """What some latents add to ŷ, of their f (…, latent), without the bias."""
        return f @ self.W_dec[latents]

    def norms(self) -> Tensor:
        """(m,): ‖d_j‖, of a crosscoder Σ_t ‖d_j^t‖."""
        return self.W_dec.unflatten(1, (self.parts, -1)).norm(dim=-1).sum(-1)

    def to(self, like: Tensor) -> Dictionary:
        """The same on the device and in the precision of `like`."""
        moved = each_tensor(self, lambda each: each.to(like))
        return replace(moved, activation=per_latent(self.activation, lambda each: each.to(like)))

    def chosen(self, latents: Sequence[int] | Tensor) -> Dictionary:
        """The same with these latents alone, in this order."""
        at = torch.as_tensor(latents, device=self.W_enc.device)
        kept = per_latent(self.activation, lambda each: each[at])
        kept = Largest(min(kept.k, len(at))) if isinstance(kept, Largest) else kept
        return replace(self, W_enc=self.W_enc[:, at], b_enc=self.b_enc[at], W_dec=self.W_dec[at], activation=kept)


@dataclass(frozen=True, eq=False)
class CrossLayer(ByContent):
    """A cross-layer transcoder: latents of layer l′ read the MLP's input there and write the MLPs of all l ≥ l′.

    f^{l′} = activation(x^{l′} W_enc^{l′} + b_enc^{l′}), ŷ^l = Σ_{l′ ≤ l} f^{l′} W_dec^{l′→l} + b_dec^l (Ameisen et al.
    2025). `W_enc` (layer, d, m), `b_enc` (layer, m), `b_dec` (layer, d); `W_dec` (pair, m, d) holds the pairs (l′, l)
    row by row: (0, 0), (0, 1), …, (1, 1), …. Inputs, latents and outputs of all layers stand side by side:
    (…, layer · d), (…, layer · m), (…, layer · d).
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    activation: Activation = Relu()
    W_skip: None = None
    centred: bool = False

    def __post_init__(self) -> None:
        layers, d, m = self.W_enc.shape
        want = {"b_enc": (layers, m), "W_dec": (layers * (layers + 1) // 2, m, self.b_dec.shape[-1])}
        for name, shape in want.items():
            if tuple(getattr(self, name).shape) != shape:
                raise DataError(
                    f"CrossLayer: W_enc is {(layers, d, m)}, so {name} is {shape}; "
                    f"got {tuple(getattr(self, name).shape)}"
                )

    @property
    def parts(self) -> int:
        return len(self.W_enc)

    @property
    def inputs(self) -> int:
        return self.parts * self.W_enc.shape[1]

    @property
    def outputs(self) -> int:
        return self.b_dec.numel()

    @property
    def latents(self) -> int:
        return self.b_enc.numel()

    def pairs(self) -> list[tuple[int, int]]:
        """(l′, l) of the rows of `W_dec`."""
        return [(start, end) for start in range(self.parts) for end in range(start, self.parts)]

    def pre(self, x: Tensor) -> Tensor:
        by_layer = x.unflatten(-1, (self.parts, -1))
        return (torch.einsum("...ld,ldm->...lm", by_layer, self.W_enc) + self.b_enc).flatten(-2)

    def encode(self, x: Tensor) -> Tensor:
        return self.activation(self.pre(x))

    def decode(self, f: Tensor, x: Tensor | None = None) -> Tensor:
        by_layer = f.unflatten(-1, (self.parts, -1))
        outputs = [bias.expand(*f.shape[:-1], -1) for bias in self.b_dec]
        for (start, end), weight in zip(self.pairs(), self.W_dec, strict=True):
            outputs[end] = outputs[end] + by_layer[..., start, :] @ weight
        return torch.cat(outputs, -1)

    def __call__(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def pre_of(self, x: Tensor, latents: Tensor) -> Tensor:
        """h of some latents, (…, latent)."""
        return self.pre(x)[..., latents]

    def part_of(self, f: Tensor, latents: Tensor) -> Tensor:
        """What some latents add to ŷ, of their f (…, latent), without the biases."""
        whole = f.new_zeros(*f.shape[:-1], self.latents).index_copy(-1, latents, f)
        return self.decode(whole) - self.b_dec.flatten()

    def norms(self) -> Tensor:
        """(layer · m,): the length of what a latent writes to all layers, side by side."""
        squares = self.W_dec.square().sum(-1)  # (pair, m)
        starts = torch.tensor([start for start, _ in self.pairs()], device=squares.device)
        return squares.new_zeros(self.b_enc.shape).index_add(0, starts, squares).sqrt().flatten()


Coder = Dictionary | CrossLayer
LINEAR = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")


def tensors(coder: Coder) -> dict[str, Tensor]:
    """The tensors of a dictionary by name, its activation's apart."""
    return {name: each for name in LINEAR if (each := getattr(coder, name)) is not None}


C = TypeVar("C", Dictionary, CrossLayer, Coder)


def each_tensor(coder: C, change: Callable[[Tensor], Tensor]) -> C:
    """The dictionary with each of its tensors changed, its activation's apart."""
    changed: dict[str, Any] = {name: change(each) for name, each in tensors(coder).items()}
    return replace(coder, **changed)


def per_latent(activation: Activation, change: Callable[[Tensor], Tensor]) -> Activation:
    """The activation with each of its tensors (m,) changed."""
    held = {field.name: getattr(activation, field.name) for field in fields(activation)}  # type: ignore[arg-type]
    changed = {name: change(each) for name, each in held.items() if isinstance(each, Tensor)}
    return replace(activation, **changed) if changed else activation  # type: ignore[type-var]
