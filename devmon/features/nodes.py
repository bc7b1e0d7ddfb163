"""Activations as latents and what they leave over: the nodes of feature circuits, put into forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from devmon.anatomy.anatomy import Anatomy
from devmon.anatomy.sites import SITES
from devmon.errors import InstrumentError
from devmon.features.dictionary import Dictionary
from devmon.features.sources import MLP_IN, check_site, flat

SiteOf = tuple[str, int]
Metric = Callable[[Tensor], Tensor]  # of logits (batch, pos, vocab), the sum over prompts of what is explained


@dataclass
class Split:
    """An activation x (batch, pos, d) as `latents` f (batch, pos, m) and `error` e = x - decode(f)."""

    latents: Tensor
    error: Tensor

    def __sub__(self, other: Split) -> Split:
        return Split(self.latents - other.latents, self.error - other.error)

    def toward(self, other: Split, share: float) -> Split:
        """The point at this share of the way to another."""
        return Split(
            self.latents + share * (other.latents - self.latents), self.error + share * (other.error - self.error)
        )


@dataclass
class Graph:
    """A forward pass whose every site begins anew: `inner` are its nodes as the sites before make them, `leaves` the
    same values from which the pass goes on, so that a gradient of an inner node, or of `metric`, with regard to a leaf
    is that of the paths that lead through no other site."""

    metric: Tensor
    inner: dict[SiteOf, Split] = field(default_factory=dict)
    leaves: dict[SiteOf, Split] = field(default_factory=dict)


class Nodes:
    """The latents of dictionaries at the sites of one model, and the errors that they leave.

    `sites` are in the order of a forward pass. Raises InstrumentError for a site that the model lacks or that cannot be
    written, and for a dictionary of another width, which `check` finds.
    """

    def __init__(self, anatomy: Anatomy, dictionaries: Mapping[SiteOf, Dictionary]) -> None:
        self.anatomy = anatomy
        for site in dictionaries:
            check_site(anatomy, site)
            if site[0] == MLP_IN:
                raise InstrumentError(
                    f"{anatomy.who}: 'mlp_in' can be read, not written: take 'resid_mid' or 'mlp_out'"
                )
        placed = {anatomy.expand(site)[0]: coder for site, coder in dictionaries.items()}
        self.coders = dict(sorted(placed.items(), key=lambda item: (item[0][1], SITES.index(item[0][0]))))

    @property
    def sites(self) -> list[SiteOf]:
        return list(self.coders)

    def split(self, site: SiteOf, value: Tensor) -> Split:
        """What a site holds, (batch, pos, …), as nodes."""
        x = flat(self.anatomy, site, value)
        coder = self.coders[site]
        if coder.inputs != x.shape[-1]:
            raise InstrumentError(
                f"{self.anatomy.who}: {site} of {type(self.anatomy.model).__name__} is {x.shape[-1]} wide, its "
                f"dictionary reads {coder.inputs}: give one that was trained on this site"
            )
        coder = coder.to(x)
        f = coder.encode(x)
        return Split(f, x - coder.decode(f))

    def joined(self, site: SiteOf, nodes: Split, value: Tensor) -> Tensor:
        """What a site holds, in the shape and precision of `value`, from its nodes."""
        coder = self.coders[site].to(nodes.error)
        return (coder.decode(nodes.latents) + nodes.error).to(value.dtype).reshape(value.shape)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> tuple[Tensor, dict[SiteOf, Split]]:
        """The logits of a plain forward pass, and its nodes."""
        output, reads = self.anatomy.run(tokens, self.sites)
        return output, {site: self.split(site, reads[site]) for site in self.sites}

    def slopes(self, tokens: Tensor, site: SiteOf, nodes: Split, metric: Metric) -> Split:
        """∂ metric / ∂ the nodes of one site, which holds these; all other sites are as the model makes them."""
        with torch.enable_grad():
            leaves = Split(*(each.detach().requires_grad_() for each in (nodes.latents, nodes.error)))
            write = {site: lambda value: self.joined(site, leaves, value)}
            output, _ = self.anatomy.run(tokens, write=write, grad=True)
            return Split(*torch.autograd.grad(metric(output), [leaves.latents, leaves.error]))

    def integrated(self, tokens: Tensor, site: SiteOf, start: Split, end: Split, metric: Metric, steps: int) -> Split:
        """Mean slope on the straight way from one set of nodes to another, at the midpoints of `steps` parts.

        The sum of (end - start) times it is metric(end) - metric(start), up to the error of the midpoint rule.
        """
        found = [self.slopes(tokens, site, start.toward(end, (i + 0.5) / steps), metric) for i in range(steps)]
        return Split(sum(each.latents for each in found) / steps, sum(each.error for each in found) / steps)  # type: ignore[arg-type]

    @torch.no_grad()
    def mixed(self, tokens: Tensor, keep: Mapping[SiteOf, Split], other: Mapping[SiteOf, Split]) -> Tensor:
        """Logits where nodes that `keep` marks (latents (m,), errors (pos, 1), both bool) are what the sites before
        make of them, and all others are those of `other` ((pos, m), (pos, d))."""

        def write(site: SiteOf) -> Callable[[Tensor], Tensor]:
            def put(value: Tensor) -> Tensor:
                own, kept, rest = self.split(site, value), keep[site], other[site]
                nodes = Split(
                    torch.where(kept.latents.to(value.device), own.latents, rest.latents),
                    torch.where(kept.error.to(value.device), own.error, rest.error),
                )
                return self.joined(site, nodes, value)

            return put

        return self.anatomy.run(tokens, write={site: write(site) for site in self.sites})[0]

    def graph(self, tokens: Tensor, metric: Metric) -> Graph:
        """A forward pass cut at every site, whose gradients are those of single edges."""
        graph = Graph(torch.zeros(()))

        def write(site: SiteOf) -> Callable[[Tensor], Tensor]:
            def put(value: Tensor) -> Tensor:
                own = self.split(site, value)
                leaves = Split(*(each.detach().requires_grad_() for each in (own.latents, own.error)))
                graph.inner[site], graph.leaves[site] = own, leaves
                return self.joined(site, leaves, value)

            return put

        with torch.enable_grad():
            output, _ = self.anatomy.run(tokens, write={site: write(site) for site in self.sites}, grad=True)
            graph.metric = metric(output)
        return graph


def basis(width: int, like: Tensor) -> Dictionary:
    """The coordinates of a space as latents, their positive and their negative parts: nothing is left over."""
    eye = torch.eye(width).to(like)
    both = torch.cat([eye, -eye])
    return Dictionary(both.T.contiguous(), both.new_zeros(2 * width), both, both.new_zeros(width))


def gradients(target: Tensor, leaves: Mapping[SiteOf, Split]) -> Iterator[tuple[SiteOf, Split | None]]:
    """∂ target / ∂ the leaves of each site; None where nothing of them reaches it."""
    flat_leaves = [each for nodes in leaves.values() for each in (nodes.latents, nodes.error)]
    found: tuple[Any, ...] = (None,) * len(flat_leaves)
    with suppress(RuntimeError):  # what no leaf reaches has no graph
        found = torch.autograd.grad(target, flat_leaves, retain_graph=True, allow_unused=True)
    for at, site in enumerate(leaves):
        latents, error = found[2 * at : 2 * at + 2]
        yield site, None if latents is None or error is None else Split(latents, error)
