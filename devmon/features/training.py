"""Training a dictionary: one loop for every kind, from a source of activations, resumable and reproducible."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from devmon.errors import DataError
from devmon.features.constants import CLIP, DEAD_AFTER, DECAY, KEEP, MOST_RATE, RATE, RATE_LATENTS, START_NORM, WARM_UP
from devmon.features.dictionary import Coder, CrossLayer, Dictionary, Gate, Jump, each_tensor, tensors
from devmon.features.objectives import JumpReLU, Now, Objective, TopK
from devmon.features.scaling import mean_norm_scale, rescaled, spread, unit_rows, with_latents
from devmon.features.sources import Source
from devmon.files import write_whole
from devmon.snapshot import derive_seed

Form = Literal["autoencoder", "transcoder", "skip transcoder", "cross-layer transcoder"]
Progress = Callable[[int, int, dict[str, float]], None]
RECORDS = 100  # of a training, evenly spaced


@dataclass(frozen=True)
class Training:
    """How a dictionary is trained: all that its numbers depend on, beside the source of activations.

    - `objective`: what is minimised (`devmon.features.objectives`)
    - `width`: latents over the width of the site, 1 or more, mostly 4 to 256; of a crosscoder and a cross-layer
      transcoder over that of one part
    - `steps` of Adam on batches of the source; `lr` None: 2e-4 at 16,384 latents, as 1 / √latents, 2e-3 at most
    - `form`: an autoencoder of one site; a transcoder from one to another, with a linear map beside it or not; a
      transcoder across layers
    - `parts`: snapshots of a crosscoder, layers of a cross-layer transcoder
    - `dead_after`: share of the steps without firing from which a latent counts as dead

    >>> import torch
    >>> from devmon.features import Held, TopK, Training, train
    >>> x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    >>> trained = train(Training(TopK(2), width=4, steps=20), Held(x, batch=100))
    >>> trained.dictionary.encode(x).shape, int((trained.dictionary.encode(x) > 0).sum(1).max())
    (torch.Size([500, 32]), 2)
    """

    objective: Objective = TopK()  # noqa: RUF009 (frozen)
    width: float = 4
    steps: int = 2000
    lr: float | None = None
    seed: int = 0
    form: Form = "autoencoder"
    parts: int = 1
    dead_after: float = DEAD_AFTER

    def __post_init__(self) -> None:
        if self.width < 1:
            raise DataError(f"Training: a dictionary is at least as wide as its site, width >= 1; got {self.width}")
        if self.steps < 1 or not 0 < self.dead_after <= 1 or self.parts < 1:
            raise DataError(
                f"Training: steps >= 1, 0 < dead_after <= 1 and parts >= 1; got {self.steps}, {self.dead_after} and "
                f"{self.parts}"
            )


class Trained(NamedTuple):
    """`history` has records of step, loss, squared error a place over that of the mean (`fvu`), `l0`, `dead` share."""

    dictionary: Coder
    history: list[dict[str, float]]


def train(
    training: Training,
    source: Source,
    *,
    start: Coder | None = None,
    file: str | os.PathLike[str] | None = None,
    save_every: int = 500,
    progress: Progress | None = None,
) -> Trained:
    """The dictionary in use, in units of the activations, its decoder's rows of length 1.

    `start` is a dictionary in use to go on from, in the place of a random one. With a `file` the state is kept every
    `save_every` steps, and a training of the same settings goes on from there: the result is the same. `progress` is
    called with the step, all steps and the latest record.

    Activations are scaled to mean norm √d in training, each part by its own scale, and all is scaled back at the end: a
    crosscoder of two equal snapshots has equal norms, however their training scaled them. Raises DataError for
    activations that are not finite or all equal, fewer of them than latents, `k` above the latents, and a start of
    other widths.
    """
    state = State(training, source, start)
    kept = None if file is None else Path(file)
    if kept is not None and kept.exists():
        state.load(kept)
    for step in range(state.step, training.steps):
        x, y = source(step)
        record = state.advance(x, y)
        if progress is not None and record is not None:
            progress(step + 1, training.steps, record)
        if kept is not None and (step + 1) % save_every == 0 and step + 1 < training.steps:
            state.save(kept)
    return Trained(state.finished(), state.history)


class State:
    """Everything between two steps of a training."""

    def __init__(self, training: Training, source: Source, start: Coder | None = None) -> None:
        self.training, self.step, self.history = training, 0, list[dict[str, float]]()
        x, y = source(0)
        _check(x, y)
        parts = training.parts
        self.inputs = mean_norm_scale(x, parts)
        self.outputs = self.inputs if y is x else mean_norm_scale(y, parts)
        scaled = self._scaled(x, y)

        # A fresh dictionary begins in scaled units; one in use is brought there.
        coder = begin(training, *scaled) if start is None else self._brought(start, scaled)
        if source.places < coder.latents:
            raise DataError(
                f"train: {coder.latents} latents need at least as many places, got {source.places:.0f}: give more "
                "tokens, or a smaller width"
            )
        k = getattr(training.objective, "k", 1)
        if not 1 <= k <= coder.latents:
            raise DataError(f"train: k is 1 to the number of latents, {coder.latents}; got {k}")
        flat = coder.b_enc.detach().flatten()
        extra = training.objective.extra(torch.zeros_like(flat))
        if start is not None:
            extra |= _extra_of(coder, extra)
        self.coder = each_tensor(coder, lambda each: each.clone().requires_grad_())
        self.extra = {name: each.clone().requires_grad_() for name, each in extra.items()}
        self.silent = torch.zeros_like(flat, dtype=torch.int64)  # steps since a latent fired
        self.least = flat.new_full((), float("nan"))

        rate = min(MOST_RATE, RATE * (RATE_LATENTS / coder.latents) ** 0.5) if training.lr is None else training.lr
        beta = 0.0 if isinstance(training.objective, JumpReLU) else 0.9
        self.adam = torch.optim.Adam(self.leaves(), lr=rate, betas=(beta, 0.999), fused=flat.dtype != torch.float16)
        self.rate = rate

    def leaves(self) -> list[Tensor]:
        return [*tensors(self.coder).values(), *self.extra.values()]

    def advance(self, x: Tensor, y: Tensor) -> dict[str, float] | None:
        """One step; a record of it where one is due."""
        _check(x, y)
        x, y = self._scaled(x, y)
        steps, share = self.training.steps, (self.step + 1) / self.training.steps
        dead = self.silent > max(1, round(self.training.dead_after * steps))
        now = Now(share, min(1.0, share / WARM_UP), dead)

        # The gradient, by way of what the objective lets through
        outcome = self.training.objective.loss(self.coder, self.extra, x, y, now)
        self.adam.zero_grad()
        outcome.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.leaves(), CLIP)
        for group in self.adam.param_groups:
            group["lr"] = self.rate * min(1.0, (1 - share + 1 / steps) / DECAY)
        self.adam.step()

        # What is kept of the step: who fired, and the least score
        with torch.no_grad():
            self.silent = torch.where(outcome.fires > 0, 0, self.silent + 1)
            if outcome.least is not None:
                self.least = torch.where(
                    self.least.isnan(), outcome.least, KEEP * self.least + (1 - KEEP) * outcome.least
                )
        self.step += 1
        if self.step % max(1, steps // RECORDS) and self.step < steps:
            return None
        record = {
            "step": float(self.step),
            "loss": outcome.loss.item(),
            "fvu": outcome.error.item() / float((y - y.mean(0)).square().sum(-1).mean()),
            "l0": float(outcome.fires.sum()) / len(x),
            "dead": float(dead.double().mean()),
        }
        self.history.append(record)
        return record

    @torch.no_grad()
    def finished(self) -> Coder:
        """The dictionary in use: scores become activations, scales are undone, rows of the decoder have length 1."""
        coder = each_tensor(self.coder, lambda each: each.detach().clone())
        norms = coder.norms()
        extra = {name: each.detach().clone() for name, each in self.extra.items()}
        activation = self.training.objective.activation(extra, self.least.nan_to_num(0).expand_as(norms).clone())
        if isinstance(activation, Gate):  # its shift is in units of h, which all others compare as scores
            activation = replace(activation, shift=activation.shift * norms)
        coder = replace(unit_rows(coder), activation=activation)
        coder = rescaled(coder, self.inputs, self.outputs)
        mean = coder.norms()[norms > 0].mean() if bool((norms > 0).any()) else norms.new_ones(())
        return with_latents(coder, mean.expand_as(norms))

    def save(self, file: Path) -> None:
        """The state as one file, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(self._state(), buffer)
        write_whole(file, buffer.getvalue())

    def load(self, file: Path) -> None:
        """Go on from a file. Raises DataError where it is of another training."""
        held = torch.load(file, weights_only=True, map_location=self.silent.device)
        if held["training"] != repr(self.training):
            raise DataError(
                f"{file} holds a training of other settings, {held['training']}; expected {self.training!r}: "
                "give another file, or remove it"
            )
        with torch.no_grad():
            for leaf, value in zip(self.leaves(), held["leaves"], strict=True):
                leaf.copy_(value)
        self.adam.load_state_dict(held["adam"])
        self.silent, self.least = held["silent"], held["least"]
        self.inputs, self.outputs = held["inputs"], held["outputs"]
        self.step, self.history = held["step"], held["history"]

    def _state(self) -> dict[str, Any]:
        leaves = [leaf.detach() for leaf in self.leaves()]
        kept = {"leaves": leaves, "adam": self.adam.state_dict(), "silent": self.silent, "least": self.least}
        scales = {"inputs": self.inputs, "outputs": self.outputs, "step": self.step, "history": self.history}
        return {"training": repr(self.training), **kept, **scales}

    def _scaled(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        scaled = x * spread(self.inputs, x.shape[-1])
        return scaled, scaled if y is x else y * spread(self.outputs, y.shape[-1])

    def _brought(self, start: Coder, scaled: tuple[Tensor, Tensor]) -> Coder:
        x, y = scaled
        if (start.inputs, start.outputs, start.parts) != (x.shape[1], y.shape[1], self.training.parts):
            raise DataError(
                f"train: the start reads {start.inputs} and writes {start.outputs} numbers in {start.parts} parts, the "
                f"activations are {x.shape[1]} and {y.shape[1]} in {self.training.parts}: give one of this site"
            )
        return rescaled(start, 1 / self.inputs, 1 / self.outputs)


def begin(training: Training, x: Tensor, y: Tensor) -> Coder:
    """A random dictionary for scaled activations x (n, d) and targets y: rows of the decoder of length 1 at random
    directions, the encoder their transpose, biases of the mean. Crosscoders begin with the same rows in all parts."""
    generator = torch.Generator().manual_seed(derive_seed(training.seed, "dictionary"))
    parts, d, out = training.parts, x.shape[1] // training.parts, y.shape[1] // training.parts
    latents = round(training.width * d)

    def rows(count: int, width: int) -> Tensor:
        drawn = torch.randn(count, width, generator=generator, dtype=torch.float64)
        return (START_NORM * drawn / drawn.norm(dim=-1, keepdim=True)).to(x)

    if training.form == "autoencoder":
        if y is not x:
            raise DataError("train: an autoencoder's targets are its inputs: give no target, or form='transcoder'")
        decoder = rows(latents, d).repeat(1, parts)
        return Dictionary(decoder.T, x.new_zeros(latents), decoder, y.mean(0), parts=parts)
    if training.form == "cross-layer transcoder":
        encoder = torch.stack([rows(latents, d).T for _ in range(parts)])
        pairs = parts * (parts + 1) // 2
        decoder = torch.stack([rows(latents, out) for _ in range(pairs)])
        centre = torch.einsum("ld,ldm->lm", x.mean(0).view(parts, d), encoder)
        return CrossLayer(encoder.contiguous(), -centre, decoder, y.mean(0).view(parts, out).clone())
    encoder = rows(latents, d).T
    skip = x.new_zeros(d, out) if training.form == "skip transcoder" else None
    return Dictionary(encoder, -x.mean(0) @ encoder, rows(latents, out), y.mean(0), W_skip=skip, centred=False)


def _extra_of(coder: Coder, extra: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an objective from the activation of a dictionary to go on from, where it has them."""
    activation = coder.activation
    if isinstance(activation, Jump) and "threshold" in extra:
        return {"threshold": activation.threshold * coder.norms()}
    if isinstance(activation, Gate) and "log_gain" in extra:
        return {"log_gain": activation.gain.log(), "shift": activation.shift.clone()}
    return {}


def _check(x: Tensor, y: Tensor) -> None:
    for name, each in (("activations", x), ("targets", y)):
        if each.ndim != 2 or not each.is_floating_point() or not bool(torch.isfinite(each).all()):
            raise DataError(
                f"train: {name} are finite floats (place, d); got {tuple(each.shape)} of {each.dtype}, "
                f"{int((~torch.isfinite(each)).sum())} not finite: leave out the places or the step where they are not"
            )
        if y is x:
            return
