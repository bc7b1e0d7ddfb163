"""Attribution graphs of prompts whose MLPs are transcoders: what reaches a logit from tokens, and what from errors."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from devmon.anatomy.anatomy import Anatomy
from devmon.anatomy.forward import forward, logits
from devmon.anatomy.frozen_norm import FrozenNorm
from devmon.features.dictionary import Dictionary
from devmon.features.sources import MLP_IN, check_site

LOGITS, MASS = 10, 0.95  # logits of a graph: at most so many, and no more than hold this probability (circuit-tracer)


class Replaced:
    """A model in which the MLPs of some layers are `transcoders`, by layer; their errors can be put back.

    Raises InstrumentError where the model has no stream whose norm its MLP reads.
    """

    def __init__(self, anatomy: Anatomy, transcoders: Mapping[int, Dictionary]) -> None:
        self.anatomy, self.transcoders = anatomy, dict(sorted(transcoders.items()))
        for layer in self.transcoders:
            check_site(anatomy, (MLP_IN, layer))
        anatomy.need_sum()
        self.stream = "resid_pre" if anatomy.parallel else "resid_mid"

    def norm(self, layer: int) -> FrozenNorm:
        """The norm that the MLP of a layer reads the stream through."""
        a = self.anatomy
        module = a.optional(layer, "mlp_norm")
        module = a.optional(layer, "attention_norm") if module is None and a.parallel else module
        return FrozenNorm(module, a.d_model, like=a.W_O(0))

    def without(self, tokens: Tensor, layers: Mapping[int, Any]) -> Tensor:
        """Logits where MLPs of `layers` are functions of what they read, (batch, pos, d), but at the first place."""
        a = self.anatomy
        holder: dict[str, Any] = {}

        def write(layer: int) -> Any:
            def put(value: Tensor) -> Tensor:
                read = a.norm_in(layer, "mlp")(holder["reads"][self.stream, layer])
                new = layers[layer](read).to(value)
                return torch.cat([value[:, :1], new[:, 1:]], 1)

            return put

        writes = {("mlp_out", layer): write(layer) for layer in layers}
        with torch.no_grad(), a.tapped([(self.stream, layer) for layer in layers], writes) as reads:
            holder["reads"] = reads
            return plain_logits(a, tokens)

    @torch.enable_grad()
    def graphs(self, prompts: Tensor, most: int) -> list[Graph]:
        """The graph of each prompt (batch, pos), with its `most` latents of largest first-order effect on the logits;
        the others are counted to the error of their layer and place."""
        run = _Frozen.of(self, prompts)
        last = run.unembedded[:, -1]
        chosen, weights = _likely(last)
        centred = last - last.mean(-1, keepdim=True)

        # which latents matter: one backward pass from the logits that are expected
        first = run.gradients((centred * weights).sum())
        effect = torch.stack([leaf * slope for leaf, slope in zip(run.latents, first.latents, strict=True)], 1)
        flat = effect.abs().flatten(1)  # (prompt, layer · pos · latent)
        count = min(most, int((flat > 0).sum(1).max()))
        taken = flat.topk(max(count, 1), dim=1).indices
        alive = flat.gather(1, taken) > 0

        strength = torch.stack(run.latents, 1).flatten(1).gather(1, taken).detach().double()

        # a backward pass for each latent and each logit, of all prompts at once
        pre = torch.stack(run.pre, 1).flatten(1)  # (prompt, layer · pos · latent)
        rows = [run.row(pre.gather(1, taken[:, k : k + 1])[alive[:, k]].sum(), taken) for k in range(taken.shape[1])]
        ends = [run.row(centred.gather(1, chosen[:, k : k + 1]).sum(), taken) for k in range(chosen.shape[1])]
        by_row = torch.stack([*rows, *ends], 1).double().cpu().numpy()  # (prompt, row, source)
        found = []
        for at in range(len(prompts)):
            mine, length, k = alive[at].cpu().numpy(), prompts.shape[1], taken.shape[1]
            columns = np.concatenate([np.ones(length, bool), mine, np.ones(by_row.shape[2] - length - k, bool)])
            likely = weights[at, chosen[at]].double().cpu().numpy()
            kept = np.concatenate([mine, likely > 0])
            where = np.stack(np.unravel_index(taken[at].cpu().numpy()[mine], effect.shape[1:]), 1)
            fired = strength[at][mine].cpu().numpy()
            found.append(Graph(by_row[at][kept][:, columns], where, length, likely[likely > 0], fired))
        return found


@dataclass(frozen=True)
class Graph:
    """Who adds what to whom at one prompt, with patterns and scales of norms as they are there, so that all is linear.

    `rows` (latent and then logit, token and then latent and then error); `latents` (latent, 3) by layer among those
    replaced, place and number; how strongly they `fired` (latent,); the number of `tokens`; the probabilities `weights`
    (logit,) of the logits.
    """

    rows: np.ndarray
    latents: np.ndarray
    tokens: int
    weights: np.ndarray
    fired: np.ndarray

    def scores(self) -> dict[str, float]:
        """`replacement`, `completeness` (circuit-tracer's, whose tokens and errors count as explained) and `of_latents`
        (latents and logits alone); the first two as "opaque_…" with all latents counted to the errors."""
        share = np.abs(self.rows)
        share = share / np.maximum(share.sum(1, keepdims=True), 1e-300)
        latents, tokens = len(self.latents), self.tokens
        to_tokens, to_latents, to_errors = np.split(share, [tokens, tokens + latents], axis=1)
        ends = slice(latents, None)
        missed = to_latents[ends].sum(1) + to_errors[ends].sum(1)
        opaque = _scores(self.weights, np.zeros(0), to_tokens[ends].sum(1), missed)

        # influence: what reaches a latent from the logits by paths of any length
        reach = self.weights @ to_latents[latents:]
        total = reach.copy()
        while reach.sum() > 1e-12 * max(self.weights.sum(), 1e-300):
            reach = reach @ to_latents[:latents]
            total += reach
        found = _scores(self.weights, total, to_tokens.sum(1), to_errors.sum(1))
        return found | {f"opaque_{name}": opaque[name] for name in ("replacement", "completeness")}


def _scores(weights: np.ndarray, influence: np.ndarray, tokens: np.ndarray, errors: np.ndarray) -> dict[str, float]:
    """From the probabilities (logit,), the influence (latent,) and the shares (latent and then logit,) of tokens and of
    errors in what reaches a node."""
    by_node = np.concatenate([influence, weights])
    from_tokens, from_errors = by_node @ tokens, by_node @ errors
    explained = by_node @ (1 - errors)
    both = from_tokens + from_errors
    return {
        "replacement": float(from_tokens / both) if both else float("nan"),
        "completeness": float((explained + both) / (by_node.sum() + both)) if by_node.sum() else float("nan"),
        "of_latents": float(explained / by_node.sum()) if by_node.sum() else float("nan"),
    }


@dataclass
class _Slopes:
    embed: Tensor
    latents: list[Tensor]
    errors: list[Tensor]


class _Frozen:
    """One pass of all prompts with patterns and scales of norms at rest: `pre` (batch, pos, m) of each layer are affine
    in the leaves `embed` (batch, pos, d), `latents` (batch, pos, m) and `errors` (batch, pos, d)."""

    def __init__(self) -> None:
        self.embed, self.unembedded = torch.zeros(()), torch.zeros(())
        self.latents: list[Tensor] = []
        self.errors: list[Tensor] = []
        self.pre: list[Tensor] = []

    @classmethod
    def of(cls, model: Replaced, prompts: Tensor) -> _Frozen:
        a, self = model.anatomy, cls()
        holder: dict[str, Any] = {}

        def begin(value: Tensor) -> Tensor:
            self.embed = value.detach().requires_grad_()
            return self.embed

        def write(layer: int) -> Any:
            coder, norm = model.transcoders[layer], model.norm(layer)

            def put(value: Tensor) -> Tensor:
                stream = holder["reads"][model.stream, layer]
                read = _linear(norm, stream)
                read = read if read.dtype == torch.float64 else read.float()
                own = coder.to(read)
                h = own.pre(read)
                f = own.activation(h).detach().requires_grad_()
                missed = (value.to(read) - own.decode(f, read)).detach().requires_grad_()
                self.pre.append(h)
                self.latents.append(f)
                self.errors.append(missed)
                return (own.decode(f, read) + missed).to(value.dtype)

            return put

        writes: dict[Any, Any] = {"pattern": Tensor.detach, ("resid_pre", 0): begin}
        writes |= {("mlp_out", layer): write(layer) for layer in model.transcoders}
        reads = [("unembedded", 0), *((model.stream, layer) for layer in model.transcoders)]
        with torch.enable_grad(), ExitStack() as stack:
            for module, norm in _norms(a):
                stack.callback(module.register_forward_hook(_at_rest(norm)).remove)
            holder["reads"] = stack.enter_context(a.tapped(reads, writes, grad=True))
            plain_logits(a, prompts, grad=True)
        self.unembedded = holder["reads"]["unembedded", 0]
        return self

    def gradients(self, target: Tensor) -> _Slopes:
        leaves = [self.embed, *self.latents, *self.errors]
        found = torch.autograd.grad(target, leaves, retain_graph=True, allow_unused=True)
        all_of_them = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
        count = len(self.latents)
        return _Slopes(all_of_them[0], all_of_them[1 : 1 + count], all_of_them[1 + count :])

    def row(self, target: Tensor, taken: Tensor) -> Tensor:
        """What each source adds to a target, (prompt, token, then taken latent, then error of layer and place)."""
        slopes = self.gradients(target)
        tokens = (self.embed * slopes.embed).sum(-1)  # (prompt, pos)
        latents = torch.stack([f * slope for f, slope in zip(self.latents, slopes.latents, strict=True)], 1)
        errors = torch.stack([(e * slope).sum(-1) for e, slope in zip(self.errors, slopes.errors, strict=True)], 1)
        own = latents.flatten(1).gather(1, taken)
        rest = latents.flatten(1).scatter(1, taken, 0.0).view(latents.shape).sum(-1)  # to the error of its place
        return torch.cat([tokens.to(own), own, (errors + rest).flatten(1)], 1).detach()


def plain_logits(anatomy: Anatomy, tokens: Tensor, *, grad: bool = False) -> Tensor:
    """The logits of a pass inside `Anatomy.tapped`."""
    return logits(anatomy.model, tokens, anatomy.who, output=forward(anatomy.model, tokens, anatomy.who, grad=grad))


def _norms(anatomy: Anatomy) -> list[tuple[nn.Module, FrozenNorm]]:
    """The norms that the stream meets on its way, but for those of the MLPs."""
    like = anatomy.W_O(0)
    modules = [
        anatomy.optional(layer, part) for layer in range(anatomy.layers) for part in ("attention_norm", "attention_end")
    ]
    modules.append(anatomy.optional(None, "norm"))
    known = {id(module): module for module in modules if module is not None}
    return [(module, FrozenNorm(module, anatomy.d_model, like=like)) for module in known.values()]


def _linear(norm: FrozenNorm, x: Tensor) -> Tensor:
    """What the norm makes of x, linear in it: its scale is at rest."""
    return norm.linear(x, norm.scale(x.detach()).detach()) + norm.bias if norm.module is not None else x


def _at_rest(norm: FrozenNorm) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        moved = _through(norm, args[0], output)
        return output.detach() + moved - moved.detach()

    return hook


def _through(norm: FrozenNorm, x: Tensor, output: Tensor) -> Tensor:
    """The linear part of the norm at x, its scale read off what it gave."""
    centred = x - x.mean(-1, keepdim=True) if norm.centres else x
    part = centred * norm.gain
    if not norm.normalises:
        return part
    with torch.no_grad():
        answer = output - norm.bias
        scale = (part * part).sum(-1, keepdim=True) / (part * answer).sum(-1, keepdim=True)
    return part / scale


def _likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tokens (prompt, ≤ LOGITS), and the probabilities (prompt, vocab) with those not in the graph 0."""
    p = logits.detach().float().softmax(-1).to(logits)
    values, chosen = p.topk(min(LOGITS, p.shape[-1]), dim=-1)
    needed = values.cumsum(-1) - values < MASS
    return chosen, torch.zeros_like(p).scatter(-1, chosen, torch.where(needed, values, 0.0))
