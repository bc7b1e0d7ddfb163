"""Stored traces: what decides them, and how they are made from a model, a loss and data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from devmon.errors import InstrumentError
from devmon.sampling.acceptance import Proposal
from devmon.sampling.chains import Plan, Probe, Sampler, run_chains
from devmon.sampling.data import Examples, as_examples, map_tree
from devmon.sampling.kernels.baoab import BAOAB
from devmon.sampling.kernels.preconditioned import PreconditionedSGLD
from devmon.sampling.kernels.sgld import SGLD, check_settings
from devmon.sampling.kernels.sgnht import SGNHT
from devmon.sampling.losses import Loss
from devmon.sampling.masks import as_mask
from devmon.snapshot import derive_seed

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "sgld": SGLD,
    "preconditioned": PreconditionedSGLD,
    "baoab": BAOAB,
    "sgnht": SGNHT,
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the traces of one estimate; see `devmon.instruments.LLC` for the scales."""

    lr: float
    gamma: float
    nbeta: float | None = None
    chains: int = 4
    draws: int = 200
    burn_in: int = 100
    batch_size: int = 32
    steps_per_draw: int = 1
    sampler: str | Sampler = "sgld"
    control_variate: bool = False
    shared_batches: bool = False
    replacement: bool = False
    prior: float = 0.0
    mask: Any = None
    examples: int = 0
    acceptance: bool = False
    float64: bool = False
    seed: int = 0


def sample(
    model: nn.Module,
    loss: Loss,
    data: Any,
    settings: Settings,
    *,
    chains: Sequence[int] | None = None,
    stacked: bool | None = None,
    group: int | None = None,
    probe: Probe | None = None,
) -> xr.Dataset:
    """The stored traces (chain, draw) of `settings`, burn-in included; see `devmon.instruments.LLC`.

    `chains` picks some of the chains (a rank's share); `stacked` and `group` choose how they are run, not the numbers.
    `probe(model, chain, draw)` sees the weights at the start of each draw. A kernel given as an object brings its own
    lr, nbeta, gamma and prior, which then stand in the attrs.
    """
    examples = as_examples(data)
    kernel = settings.sampler
    if not isinstance(kernel, str):
        own = {name: getattr(kernel, name) for name in ("lr", "nbeta", "gamma", "prior") if hasattr(kernel, name)}
        settings = replace(settings, **own)
    nbeta = examples.n / math.log(max(examples.n, 2)) if settings.nbeta is None else settings.nbeta
    check_settings(settings.lr, nbeta, settings.gamma, settings.prior)
    for name, least in (("chains", 1), ("draws", 1), ("burn_in", 0), ("steps_per_draw", 1), ("examples", 0)):
        if (value := getattr(settings, name)) < least:
            raise InstrumentError(f"{name} must be at least {least}, got {value}")
    if settings.examples > examples.n:
        raise InstrumentError(f"examples must be at most the {examples.n} of the data, got {settings.examples}")
    if isinstance(kernel, str):
        if kernel not in SAMPLERS:
            raise InstrumentError(f"sampler must be one of {sorted(SAMPLERS)} or a kernel, got {kernel!r}")
        kernel = SAMPLERS[kernel](lr=settings.lr, nbeta=nbeta, gamma=settings.gamma, prior=settings.prior)
    plan = Plan(
        draws=settings.burn_in + settings.draws,
        batch_size=settings.batch_size,
        steps_per_draw=settings.steps_per_draw,
        seed=settings.seed,
        control_variate=settings.control_variate,
        shared_batches=settings.shared_batches,
        replacement=settings.replacement,
        proposal=Proposal(settings.lr, nbeta, settings.gamma, settings.prior) if settings.acceptance else None,
        stacked=stacked,
        group=group,
    )
    numbers = list(range(settings.chains)) if chains is None else list(chains)
    dtype = torch.float64 if settings.float64 else torch.float32
    mask = as_mask(settings.mask, model)
    followed = Followed(examples, loss, settings, numbers) if settings.examples else None
    probes = [p for p in (probe, followed) if p is not None]
    traces, sampled = run_chains(model, loss, examples, kernel, plan, numbers, dtype=dtype, mask=mask, probes=probes)
    names = {
        "loss": ("mean loss of the minibatch at w", "loss"),
        "baseline": ("mean loss of the same examples at w*", "loss"),
        "distance": ("root mean square distance from w*", "weight"),
        "slope": ("gradient at w times the displacement from w*", "loss"),
        "linear": ("first-order noise of the score", "loss"),
        "acceptance": ("acceptance of a Metropolis-adjusted step", "1"),
    }
    left_out = {"linear": not settings.control_variate, "acceptance": not settings.acceptance}
    variables: dict[str, Any] = {
        name: (("chain", "draw"), getattr(traces, name).numpy(), {"long_name": text, "units": units})
        for name, (text, units) in names.items()
        if not left_out.get(name)
    }
    coords: dict[str, Any] = {"chain": np.array(numbers), "draw": np.arange(plan.draws)}
    if followed is not None:
        words = {"long_name": "loss of single examples at the start of a draw", "units": "loss"}
        variables["example_loss"] = (("chain", "draw", "example"), followed.losses, words)
        coords["example"] = followed.index.numpy()
    attrs = asdict(settings) | {
        "kind": "llc",
        "nbeta": float(nbeta),
        "n": examples.n,
        "parameters": sampled,
        "kernel": settings.sampler if isinstance(settings.sampler, str) else repr(settings.sampler),
        "mask": "" if mask is None else str(mask),
        "units": "the loss's own, mean per example; nbeta times it is without unit",
        "headline": ["llc"],
    }
    for name in ("sampler", "examples", "acceptance"):
        del attrs[name]
    attrs = {name: int(value) if isinstance(value, bool) else value for name, value in attrs.items()}
    return xr.Dataset(variables, coords, attrs)


class Followed:
    """A probe that keeps the losses of `settings.examples` single examples, (chain, draw, example), float32.

    Which ones follows from the seed alone, so they are the same at every checkpoint.
    """

    def __init__(self, examples: Examples, loss: Loss, settings: Settings, chains: Sequence[int]) -> None:
        generator = torch.Generator().manual_seed(derive_seed(settings.seed, "examples"))
        self.index = torch.randperm(examples.n, generator=generator)[: settings.examples].sort().values
        self.examples, self.loss, self.size = examples, loss, settings.batch_size
        self.rows = {chain: row for row, chain in enumerate(chains)}
        shape = (len(chains), settings.burn_in + settings.draws, settings.examples)
        self.losses = np.full(shape, np.nan, np.float32)

    def __call__(self, model: nn.Module, chain: int, draw: int) -> None:
        like = next(model.parameters())
        found = []
        for part in self.index.split(self.size):
            batch = map_tree(
                lambda t: t.to(like.device, like.dtype if t.is_floating_point() else None),
                self.examples.batch(part),
            )
            found.append(self.loss(model, batch).float().cpu())
        self.losses[self.rows[chain], draw] = torch.cat(found).numpy()
