"""What dictionaries are trained on: reconstruction and one of six ways to make latents sparse.

Every objective speaks of scores s = h‖d‖, what a latent would add to the target: the decoder's rows have any length.
Errors ‖e‖² are summed over the outputs and averaged over places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from devmon.errors import DataError
from devmon.features.constants import (
    AUXILIARY,
    DECAY,
    JUMP_START,
    JUMP_WIDTH,
    L1_PER_ROOT_WIDTH,
    PULL,
    REVIVAL,
    TANH_SLOPE,
)
from devmon.features.dictionary import Activation, Coder, Dictionary, Gate, Jump, Largest, Relu
from devmon.features.sparse import Chosen, activations_at, decoded, k_of_all, k_of_each


class Now(NamedTuple):
    """Where training stands: share of all steps, share of the penalty, and the dead latents (m,)."""

    share: float
    warm: float
    dead: Tensor


class Outcome(NamedTuple):
    """The loss of a batch, in how many places each latent fires (m,), the squared error a place, and the least score
    that was let through, where that is one of all places."""

    loss: Tensor
    fires: Tensor
    error: Tensor
    least: Tensor | None = None


class Objective(Protocol):
    """`extra` are tensors that are trained beside the dictionary's, of latents in number; `activation` makes of them,
    and of the mean least score, that of the dictionary in use, whose decoder has rows of length 1."""

    def extra(self, like: Tensor) -> dict[str, Tensor]: ...
    def loss(self, coder: Coder, extra: dict[str, Tensor], x: Tensor, y: Tensor, now: Now) -> Outcome: ...
    def activation(self, extra: dict[str, Tensor], least: Tensor) -> Activation: ...


@dataclass(frozen=True)
class _Plain:
    def extra(self, like: Tensor) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class ReLU(_Plain):
    """‖e‖² + λ Σ f_j‖d_j‖ (Bricken et al. 2023; Anthropic, April 2024); λ is `l1`, or .18 √d without it."""

    l1: float | None = None

    def loss(self, coder: Coder, extra: dict[str, Tensor], x: Tensor, y: Tensor, now: Now) -> Outcome:
        f = coder.pre(x).relu()
        error = (y - coder.decode(f, x)).square().sum(-1).mean()
        penalty = (f @ coder.norms()).mean()
        return Outcome(error + now.warm * strength(self.l1, coder) * penalty, (f > 0).sum(0), error)

    def activation(self, extra: dict[str, Tensor], least: Tensor) -> Activation:
        return Relu()


@dataclass(frozen=True)
class TopK(_Plain):
    """‖e‖² of the `k` latents of largest score in each place, and the error that dead latents explain (2406.04093)."""

    k: int = 32

    def loss(self, coder: Coder, extra: dict[str, Tensor], x: Tensor, y: Tensor, now: Now) -> Outcome:
        return _largest(coder, x, y, now, lambda scores: k_of_each(scores, self.k))[0]

    def activation(self, extra: dict[str, Tensor], least: Tensor) -> Activation:
        return Largest(self.k)


@dataclass(frozen=True)
class BatchTopK(_Plain):
    """As `TopK`, of the k · n latents of largest score in a batch of n places (2412.06410).

    In use a latent fires where its score exceeds one threshold, the mean of the least score that training let through.
    """

    k: float = 32

    def loss(self, coder: Coder, extra: dict[str, Tensor], x: Tensor, y: Tensor, now: Now) -> Outcome:
        return _largest(coder, x, y, now, lambda scores: k_of_all(scores.relu(), self.k))[0]

    def activation(self, extra: dict[str, Tensor], least: Tensor) -> Activation:
        return Jump(least)


@dataclass(frozen=True)
class Matryoshka(_Plain):
    """`BatchTopK` whose first latents have to do alone: Σ ‖e‖² over nested `prefixes` of the latents (2503.17547).

    The last prefix is all latents, and may be left out.
    """

    k: float = 32
    prefixes: tuple[int, ...] = ()

    def loss(self, coder: Coder, extra: dict[str, Tensor], x: Tensor, y: Tensor, now: Now) -> Outcome:
        if not isinstance(coder, Dictionary):
            raise DataError("Matryoshka: prefixes are of latents of one site; take another objective for many layers")
        outcome, values, chosen = _largest(coder, x, y, now, lambda scores: k_of_all(scores.relu(), self.k))
        total = outcome.loss
        for end in self.prefixes:
            if end < coder.latents:
                part = decoded(coder, values * (chosen.latents < end), chosen, x)
                total = total + (y - part).square().sum(-1).mean()
        return outcome._replace(loss=total)

    def activation(self, extra: dict[str, Tensor], least: Tensor) -> Activation:
        return Jump(least)


@dataclass(frozen=True)
class JumpReLU:
    """‖e‖² and thresholds θ_j that are learnt (2407.14435), with rectangular kernels for their gradients.

    With `target`, the penalty is `strength` · (L0 / target − 1)². Without, it is that of Anthropic (January 2025),
    strength · Σ tanh(4 s_j) over the firing, warmed up over all steps, and 3e-6 Σ relu(θ − s) over dead latents. Both
    have `revival` besides, which neither source has: without it half of the latents of the planted dictionary are dead.
    """

    target: float | None = None
    strength: float = 1.0

    def extra(self, like: Tensor) -> dict[str, Tensor]:
        return {"threshold": torch.full_like(like, JUMP_START[self.target is not None])}

    def loss(self, coder: Coder, extra: dict[str, Tensor], x: Tensor, y: Tensor, now: Now) -> Outcome:
        norms = coder.norms()
        scores = coder.pre(x) * norms
        theta, width = extra["threshold"].clamp(min=0), JUMP_WIDTH[self.target is not None]
        passed = _Jump.apply(scores, theta, width)
        f = passed / norms.clamp(min=torch.finfo(x.dtype).tiny)
        e = y - coder.decode(f, x)
        error = e.square().sum(-1).mean()
        if self.target is not None:
            count = _Step.apply(scores, theta, width).sum(-1).mean()
            penalty = now.warm * self.strength * (count / self.target - 1).square()
        else:
            penalty = now.share * self.strength * torch.tanh(TANH_SLOPE * passed).sum(-1).mean()
            penalty = penalty + REVIVAL * ((theta - scores).relu() * now.dead).sum(-1).mean()
        return Outcome(error + penalty + revival(coder, x, e, now, theta), (f > 0).sum(0), error)

    def activation(self, extra: dict[str, Tensor], least: Tensor) -> Activation:
        return Jump(extra["threshold"].clamp(min=0))


@dataclass(frozen=True)
class Gated:
    """Which latents fire and how much is learnt apart: f = 1[h > 0] relu(h e^r + shift) (2404.16014).

    ‖e‖² + λ Σ relu(h_j)‖d_j‖ + ‖y − decode(relu(h))‖², the decoder held there; λ is `l1`, or .18 √d without it.
    """

    l1: float | None = None

    def extra(self, like: Tensor) -> dict[str, Tensor]:
        return {"log_gain": torch.zeros_like(like), "shift": torch.zeros_like(like)}

    def loss(self, coder: Coder, extra: dict[str, Tensor], x: Tensor, y: Tensor, now: Now) -> Outcome:
        h = coder.pre(x)
        f = (h * extra["log_gain"].exp() + extra["shift"]).relu() * (h > 0)
        error = (y - coder.decode(f, x)).square().sum(-1).mean()
        held = replace(coder, W_dec=coder.W_dec.detach(), b_dec=coder.b_dec.detach())
        opened = h.relu()
        gate = (y - held.decode(opened, x)).square().sum(-1).mean()
        penalty = (opened @ coder.norms().detach()).mean()  # else the decoder shrinks, and the gain makes up for it
        return Outcome(error + gate + now.warm * strength(self.l1, coder) * penalty, (f > 0).sum(0), error)

    def activation(self, extra: dict[str, Tensor], least: Tensor) -> Activation:
        return Gate(extra["log_gain"].exp(), extra["shift"])


def strength(l1: float | None, coder: Coder) -> float:
    """λ: what is asked for, or what grows with √d as the ratio of ‖e‖² and Σ f does."""
    return L1_PER_ROOT_WIDTH * (coder.outputs / coder.parts) ** 0.5 if l1 is None else l1


def revival(coder: Coder, x: Tensor, e: Tensor, now: Now, least: Tensor) -> Tensor:
    """What gives dead latents a gradient, for inputs x (n, d), the error e (n, d_out) and the least score that fires,
    () of all, (n, 1) of each place or (m,) of each latent.

    First they learn what is left: ‖ê − e‖² · min(dead / (d/2), 1), ê decoded without bias from the d/2 dead latents of
    largest h, e held (2406.04093 App. A.2, SAELens). While the learning rate falls, a pull to the least score,
    .1 Σ_dead relu(least − s) (as Anthropic, January 2025, all along), lets those fire that found nothing.
    """
    at = now.dead.nonzero()[:, 0]
    if not len(at):
        return e.new_zeros(())
    h = coder.pre_of(x, at)  # (n, dead)
    if now.share > 1 - DECAY:
        least = least[at] if least.ndim == 1 else least
        return PULL * (least - h * coder.norms().detach()[at]).relu().sum(-1).mean()
    most = max(1, coder.outputs // coder.parts // 2)
    values, chosen = h.topk(min(most, len(at)), dim=-1, sorted=False)
    explained = coder.part_of(torch.zeros_like(h).scatter(-1, chosen, values), at)
    return AUXILIARY * min(len(at) / most, 1.0) * (explained - e.detach()).square().sum(-1).mean()


def _largest(
    coder: Coder, x: Tensor, y: Tensor, now: Now, choose: Callable[[Tensor], tuple[Chosen, Tensor]]
) -> tuple[Outcome, Tensor, Chosen]:
    """The loss of the latents that are chosen by their scores (n, m), their activations (pair,), and which they are."""
    with torch.no_grad():
        h = coder.pre(x)
        chosen, least = choose(h * coder.norms())
    if isinstance(coder, Dictionary):
        values = activations_at(coder, x, h, chosen)
        e = y - decoded(coder, values, chosen, x)
    else:
        values = coder.pre(x).relu()[chosen.places, chosen.latents]
        f = torch.zeros_like(h).index_put((chosen.places, chosen.latents), values)
        e = y - coder.decode(f, x)
    error = e.square().sum(-1).mean()
    fires = torch.bincount(chosen.latents[values > 0], minlength=coder.latents)
    loss = error + revival(coder, x, e, now, least)
    return Outcome(loss, fires, error, least if least.ndim == 0 else None), values, chosen


class _Jump(torch.autograd.Function):
    """s · 1[s > θ]; to θ goes −θ/ε where abs(s − θ) < ε/2."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(scores, theta)
        ctx.width = width
        return scores * (scores > theta)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        scores, theta = ctx.saved_tensors
        near = (scores - theta).abs() < ctx.width / 2
        to_theta = (-theta / ctx.width * near * gradients[0]).sum(0)
        return gradients[0] * (scores > theta), to_theta, None


class _Step(torch.autograd.Function):
    """1[s > θ]; to θ goes −1/ε where abs(s − θ) < ε/2, to s nothing."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(scores, theta)
        ctx.width = width
        return (scores > theta).to(scores)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        scores, theta = ctx.saved_tensors
        near = (scores - theta).abs() < ctx.width / 2
        return None, (-1 / ctx.width * near * gradients[0]).sum(0), None
