"""Stored traces: what decides them, and how they are made from a model, a loss and data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from devmon.errors import InstrumentError
from devmon.sampling.acceptance import Proposal
from devmon.sampling.center import Memo
from devmon.sampling.chains import run_chains
from devmon.sampling.constants import PRECISION_SHARE, PRECISION_STEPS
from devmon.sampling.data import Examples, as_examples, map_tree
from devmon.sampling.group import OnDraw, Traces
from devmon.sampling.kernels.baoab import BAOAB
from devmon.sampling.kernels.preconditioned import PreconditionedSGLD
from devmon.sampling.kernels.sampler import Sampler
from devmon.sampling.kernels.sgld import SGLD, check_settings
from devmon.sampling.kernels.sgnht import SGNHT
from devmon.sampling.ladder import lower_rungs, lr_of_rung, reach, with_rungs
from devmon.sampling.losses import Loss
from devmon.sampling.masks import as_mask
from devmon.sampling.schedule import Schedule
from devmon.snapshot import derive_seed

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "sgld": SGLD,
    "preconditioned": PreconditionedSGLD,
    "baoab": BAOAB,
    "sgnht": SGNHT,
}

# Variables that rows of earlier versions lack: a run that began without them goes on without them.
LATER = {"first_order", "prior_slope", "noise_bias"}

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything but model, loss, data and seed that decides the traces of one estimate.

    - `nbeta`: inverse temperature times sample size; None for n / log n with n examples. Several numbers are a ladder:
      λ̂ is that of the first, and chains of the same noise and batches run at the others too (`devmon.analysis.ladder`)
    - `gamma`: precision of the Gaussian around w*; `prior`: of one around 0. Both enter the exponent with a half
    - `lr`: variance of the noise of a step, which moves by lr/2 times the gradient of the log density. With neither lr
      nor gamma, and no kernel that brings them, both are still to be chosen; of one alone the other is 1e-4 or 300
    - `chains` independent chains of `burn_in + draws` draws of `steps_per_draw` steps on `batch_size` examples
    - `sampler`: a name of `SAMPLERS`, or a kernel that brings its own lr, nbeta, gamma and prior
    - `control_variate`: move by ∇L_B(w) − ∇L_B(w*) + ∇L(w*), about twice the cost of a step
    - `shared_batches`: all chains meet the same minibatches; `replacement`: drawn with replacement
    - `mask`: restricts what is sampled (`devmon.sampling.masks.as_mask`)
    - `examples`: trace the losses of so many single examples; `acceptance`: trace that of a Metropolis-adjusted step
    - `float64`: sample in double precision
    - `precision`: "bfloat16" for the matrix products of a pass, under chains in float32; what it moves is measured
    - `micro_batch`: examples of a pass, so many of a minibatch at a time; None for all. It changes cost, not numbers
    """

    nbeta: float | Sequence[float] | None = None
    gamma: float | None = None
    lr: float | None = None
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
    precision: str = field(default="float32", metadata={"identity": "if changed"})
    micro_batch: int | None = field(default=None, metadata={"identity": "never"})

    def __post_init__(self) -> None:
        # One of them alone, or a kernel, and the rest is what it always was: the identity of stored runs.
        if not (self.lr is None and self.gamma is None and isinstance(self.sampler, str)):
            object.__setattr__(self, "lr", 1e-4 if self.lr is None else self.lr)
            object.__setattr__(self, "gamma", 300.0 if self.gamma is None else self.gamma)

    @property
    def lr_and_gamma(self) -> tuple[float, float]:
        """`lr` and `gamma`. Raises InstrumentError where they are still to be chosen."""
        if self.lr is None or self.gamma is None:
            raise InstrumentError(
                "lr and gamma are not chosen: give them, or let `estimate_llc`, a monitor, `devmon measure` or "
                "`devmon calibrate` choose them"
            )
        return self.lr, self.gamma

    def nbeta_for(self, n: int) -> float:
        """`nbeta`, or n / log n (Watanabe 2013) where it is None; of a ladder the first."""
        if self.nbeta is None:
            return n / math.log(max(n, 2))
        return float(self.nbeta[0]) if isinstance(self.nbeta, Sequence) else self.nbeta

    @property
    def runs(self) -> int:
        """How many runs of chains begin at the weights: one a rung, and one for a trial where settings are open."""
        return (len(self.nbeta) if isinstance(self.nbeta, Sequence) else 1) + (self.lr is None)

    def of_gradient(self, n: int) -> int:
        """Examples, of n, whose gradient is taken at w*."""
        met = (self.draws + self.burn_in) * self.steps_per_draw * self.batch_size
        return n if self.control_variate else min(n, met)

    def copies(self) -> float:
        """Float32 copies of the sampled parameters that one chain at a time holds at most, beside the model and blocks.

        The position and what the kernel keeps, of all chains where these share a control variate; the gradient at w*,
        a control variate, a judged proposal; a gradient, of which a single pass holds no more than the largest tensors;
        the weights that passes in bfloat16 keep.
        """
        kernel = SAMPLERS.get(self.sampler) if isinstance(self.sampler, str) else self.sampler
        together = self.chains if self.control_variate and self.shared_batches else 1
        held = together * getattr(kernel, "copies", 1) + 2 + self.control_variate + self.acceptance
        return 2.0 * held if self.float64 else held + 0.5 * (self.precision == "bfloat16")

    def schedule(self, seed: int, **how: Any) -> Schedule:
        """What these settings say of how chains are run; `how` are its other fields."""
        return Schedule(
            draws=self.burn_in + self.draws,
            batch_size=self.batch_size,
            steps_per_draw=self.steps_per_draw,
            seed=seed,
            control_variate=self.control_variate,
            shared_batches=self.shared_batches,
            replacement=self.replacement,
            **how,
        )


def sample(
    model: nn.Module,
    loss: Loss,
    data: Any,
    settings: Settings,
    *,
    seed: int = 0,
    chains: Sequence[int] | None = None,
    stacked: bool | None = None,
    group: int | None = None,
    probe: OnDraw | None = None,
    mirrored: bool = False,
    memo: Memo | None = None,
) -> xr.Dataset:
    """The stored traces (chain, draw) of `settings`, burn-in included; see `devmon.instruments.LLC`.

    `chains` picks some of the chains (a rank's share); `stacked` and `group` choose how they are run, not the numbers.
    `probe(model, chain, draw)` sees the weights at the start of each draw. `mirrored` gives chains 2k and 2k + 1
    opposite noise: each has the law, and what is odd in w − w* cancels in their mean. In `memo` runs at the same
    weights leave what they found there for each other (`Snapshot.memo`). A kernel given as an object brings its own
    lr, nbeta, gamma and prior, which then stand in the attrs. Raises InstrumentError for settings that
    cannot be run and a loss that is not finite at w*.
    """
    examples = as_examples(data)
    nbetas = lower_rungs(settings.nbeta, settings.sampler)
    settings, kernel = with_kernel(replace(settings, nbeta=settings.nbeta_for(examples.n)), examples.n)
    lr, gamma = settings.lr_and_gamma
    schedule = settings.schedule(
        seed,
        mirrored=mirrored,
        proposal=Proposal(lr, settings.nbeta_for(examples.n), gamma, settings.prior) if settings.acceptance else None,
        stacked=stacked,
        group=group,
        micro_batch=settings.micro_batch,
    )
    numbers = list(range(settings.chains)) if chains is None else list(chains)
    dtype = torch.float64 if settings.float64 else torch.float32
    mask = as_mask(settings.mask, model)
    followed = Followed(examples, loss, settings, numbers, seed) if settings.examples else None
    on_draw = [call for call in (probe, followed) if call is not None]
    memo = {} if memo is None and nbetas else memo
    run = partial(run_chains, model, loss, examples, kernel, chains=numbers, dtype=dtype, mask=mask, memo=memo)
    low = None if settings.precision == "float32" else torch.bfloat16
    traces, sampled, noise = run(schedule=schedule, autocast=low, on_draw=on_draw)
    # On a quadratic (lr nbeta / 2)² Cov joins the noise lr of a step of SGLD, and λ̂ feels it where curvature ≫ gamma.
    heat = 0.0 if settings.control_variate else getattr(kernel, "noise_gain", 1.0)
    bias = heat * lr * settings.nbeta_for(examples.n) ** 2 * noise / 8
    # The attrs hold every setting that a later reader needs to repeat the traces; what only adds variables is seen in
    # the variables. Booleans become integers, which netCDF can hold. lr and gamma stay in front: the
    # order of attrs is part of the bytes of a stored row.
    attrs: dict[str, Any] = {"lr": lr, "gamma": gamma}
    attrs |= {field.name: getattr(settings, field.name) for field in fields(Settings)} | {"seed": seed}
    attrs |= {
        "kind": "llc",
        "nbeta": float(settings.nbeta_for(examples.n)),
        "n": examples.n,
        "parameters": sampled,
        "kernel": settings.sampler if isinstance(settings.sampler, str) else repr(settings.sampler),
        "mask": "" if mask is None else str(mask),
        "units": "the loss's own, mean per example; nbeta times it is without unit",
        "headline": ["llc"],
    }
    for name in ("sampler", "examples", "acceptance", "micro_batch", *(["precision"] if low is None else [])):
        del attrs[name]
    attrs = {name: int(value) if isinstance(value, bool) else value for name, value in attrs.items()}
    dataset = _dataset(traces, bias, settings, numbers, followed).assign_attrs(attrs)
    if low is not None:
        dataset["precision_shift"] = _precision_shift(run, schedule, low, dataset)
    if not nbetas:
        return dataset
    # The lower rungs: the same chains at other temperatures, as variables of their own beside those of the first.
    rungs = []
    for nbeta in nbetas:
        lr_below = lr_of_rung(lr, attrs["nbeta"], nbeta, gamma)
        rung = replace(settings, nbeta=nbeta, lr=lr_below, examples=0, acceptance=False)
        how: dict[str, Any] = {"stacked": stacked, "group": group, "memo": memo}
        rungs.append(sample(model, loss, examples, rung, seed=seed, chains=numbers, **how))
    return with_rungs(dataset, rungs, reach(model, loss, examples, settings, mask, seed=seed))


def _precision_shift(
    run: Callable[..., tuple[Traces, int, float]], schedule: Schedule, low: torch.dtype, dataset: xr.Dataset
) -> xr.DataArray:
    """λ̂ in `low` precision less λ̂ in the chains' own, (chain,), in a short trial of the same noise and minibatches.

    Warns where it is more than chance and than a share of the λ̂ of `dataset`.
    """
    draws = min(PRECISION_STEPS, schedule.draws * schedule.steps_per_draw)
    trial = replace(schedule, draws=draws, steps_per_draw=1, control_variate=False, proposal=None)
    excess = [
        (traces.loss - traces.baseline)[:, draws // 2 :].mean(1).numpy()
        for traces, *_ in (run(schedule=trial, autocast=autocast) for autocast in (low, None))
    ]
    nbeta, kept = dataset.attrs["nbeta"], dataset.isel(draw=slice(dataset.attrs["burn_in"], None))
    shift = nbeta * (excess[0] - excess[1])
    level = nbeta * abs(float((kept["loss"] - kept["baseline"]).mean()))
    error = shift.std(ddof=1) / math.sqrt(len(shift)) if len(shift) > 1 else 0.0
    if abs(shift.mean()) > max(2 * error, PRECISION_SHARE * level):
        warnings.warn(
            f"λ̂ moves by {shift.mean():.2g} ± {error:.1g} between {low} and float32 in a paired trial, of {level:.3g} "
            f"in all: use precision='float32'",
            stacklevel=3,
        )
    return xr.DataArray(shift, dims="chain", attrs={"long_name": "shift of λ̂ by the precision of passes", "units": "1"})


def with_kernel(settings: Settings, n: int) -> tuple[Settings, Sampler]:
    """The settings with what their kernel brings, and the kernel. Raises InstrumentError where they cannot be run."""
    kernel = settings.sampler
    if not isinstance(kernel, str):
        own = {name: getattr(kernel, name) for name in ("lr", "nbeta", "gamma", "prior") if hasattr(kernel, name)}
        settings = replace(settings, **own)
    (lr, gamma), nbeta = settings.lr_and_gamma, settings.nbeta_for(n)
    check_settings(lr, nbeta, gamma, settings.prior)
    for name, least in (("chains", 1), ("draws", 1), ("burn_in", 0), ("steps_per_draw", 1), ("examples", 0)):
        if (value := getattr(settings, name)) < least:
            raise InstrumentError(f"{name} must be at least {least}, got {value}")
    if settings.micro_batch is not None and settings.micro_batch < 1:
        raise InstrumentError(f"micro_batch must be at least 1 or None, got {settings.micro_batch}")
    if settings.precision not in PRECISIONS or (settings.float64 and settings.precision != "float32"):
        got = f"{settings.precision!r}" + (" with float64=True" if settings.float64 else "")
        raise InstrumentError(f"precision must be one of {PRECISIONS}, bfloat16 without float64, got {got}")
    if settings.examples > n:
        raise InstrumentError(f"examples must be at most the {n} of the data, got {settings.examples}")
    if isinstance(kernel, str):
        if kernel not in SAMPLERS:
            raise InstrumentError(f"sampler must be one of {sorted(SAMPLERS)} or a kernel, got {kernel!r}")
        kernel = SAMPLERS[kernel](lr=lr, nbeta=nbeta, gamma=gamma, prior=settings.prior)
    return settings, kernel


def _dataset(
    traces: Traces, bias: float, settings: Settings, chains: Sequence[int], followed: Followed | None
) -> xr.Dataset:
    names = {
        "loss": ("mean loss of the minibatch at w", "loss"),
        "baseline": ("mean loss of the same examples at w*", "loss"),
        "distance": ("root mean square distance from w*", "weight"),
        "slope": ("gradient at w times the displacement from w*", "loss"),
        "linear": ("first-order noise of the score", "loss"),
        "first_order": ("gradient at w* times the displacement from w*", "loss"),
        "prior_slope": ("position times the displacement from w*", "weight²"),
        "acceptance": ("acceptance of a Metropolis-adjusted step", "1"),
    }
    left_out = {
        "linear": not settings.control_variate,
        "prior_slope": not settings.prior,
        "acceptance": not settings.acceptance,
    }
    variables: dict[str, Any] = {
        name: (("chain", "draw"), getattr(traces, name).numpy(), {"long_name": text, "units": units})
        for name, (text, units) in names.items()
        if not left_out.get(name)
    }
    variables["noise_bias"] = ((), np.float64(bias), {"long_name": "the most that minibatch noise adds", "units": "1"})
    for name in sorted(LATER & variables.keys()):
        variables[name][2]["later"] = 1
    coords: dict[str, Any] = {"chain": np.array(chains), "draw": np.arange(settings.burn_in + settings.draws)}
    if followed is not None:
        words = {"long_name": "loss of single examples at the start of a draw", "units": "loss"}
        variables["example_loss"] = (("chain", "draw", "example"), followed.losses, words)
        coords["example"] = followed.index.numpy()
    return xr.Dataset(variables, coords)


class Followed:
    """Called at each draw: keeps the losses of `settings.examples` single examples, (chain, draw, example), float32.

    Which ones follows from the seed alone, so they are the same at every checkpoint.
    """

    def __init__(self, examples: Examples, loss: Loss, settings: Settings, chains: Sequence[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(derive_seed(seed, "examples"))
        self.index = torch.randperm(examples.n, generator=generator)[: settings.examples].sort().values
        self.examples, self.loss, self.size = examples, loss, settings.batch_size
        self.rows = {chain: row for row, chain in enumerate(chains)}
        shape = (len(chains), settings.burn_in + settings.draws, settings.examples)
        self.losses = np.full(shape, np.nan, np.float32)

    def __call__(self, model: nn.Module, chain: int, draw: int) -> None:
        like = next(model.parameters())
        losses = []
        for part in self.index.split(self.size):
            batch = map_tree(
                lambda t: t.to(like.device, like.dtype if t.is_floating_point() else None),
                self.examples.batch(part),
            )
            losses.append(self.loss(model, batch).float().cpu())
        self.losses[self.rows[chain], draw] = torch.cat(losses).numpy()
