"""From a model, a loss and data to stored traces, and to λ̂."""

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
from devmon.sampling.chains import Plan, Probe, Proposal, Sampler, run_chains
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


def estimate_llc(
    model: nn.Module,
    loss: Loss,
    data: Any,
    *,
    nbeta: float | None = None,
    gamma: float | None = None,
    lr: float | None = None,
    chains: int = 4,
    draws: int = 200,
    burn_in: int | None = None,
    batch_size: int | None = None,
    steps_per_draw: int | None = None,
    sampler: str | Sampler = "baoab",
    control_variate: bool | None = None,
    shared_batches: bool = False,
    prior: float = 0.0,
    mask: Any = None,
    examples: int = 0,
    acceptance: bool = False,
    float64: bool = False,
    seed: int = 0,
) -> xr.Dataset:
    """λ̂ = nbeta (E[L(w)] − L(w*)) around the model's weights w*, with its error and verdict, and the traces.

    The scales. `loss(model, batch) -> (batch,)` gives one loss an example, and L is their *mean* over the data, never
    a sum. Twice the loss is twice nbeta: λ does not change, but how near λ̂ comes to it does, so with squared errors
    say whether you halve them (`regression_loss` does: unit noise). The law is exp(−nbeta L(w) − (gamma/2)‖w − w*‖²):
    `nbeta` is one number, inverse temperature times sample size, None for n / log n with n examples; `gamma` is the
    precision of the localising Gaussian, with its half. `lr` is the variance of the noise of one step, which moves by
    lr/2 times the gradient of the log density (`devmon.sampling.kernels.sgld`); the other kernels read it so too. `None` for
    `lr` or `gamma` calibrates both (`devmon.sampling.calibrate`), and chooses `control_variate` and `steps_per_draw`
    where these are None. With both given, `control_variate` None means: where the gradient noise at w* would heat λ̂ by
    more than 1%.

    `draws` are kept after `burn_in` (None: half of `draws`) in each of `chains` chains. `data` is a tensor, a tuple or
    mapping of tensors, a list of batches, a DataLoader or a dataset; `loss` gets batches of the form the data has. The
    model is not touched. `mask` restricts what is sampled (`devmon.sampling.masks.as_mask`).

    Returns `llc`, `se`, `low`, `high`, `ess`, `rhat`, `temperature`, `verdict` … (`devmon.analysis.llc`) and the traces
    over (chain, draw), burn-in included. After a calibration `attrs["calibration"]` holds its reasons and
    `attrs["systematic"]` the relative error that the settings leave; `low` and `high` then contain it beside `se`.

    >>> import torch
    >>> from devmon.sampling import regression_loss
    >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    >>> model = torch.nn.Linear(3, 1, bias=False)
    >>> result = estimate_llc(model, regression_loss, (x, model(x).detach()), lr=0.005, gamma=1.0, draws=300)
    >>> 1.2 < float(result["llc"]) < 1.8, result["verdict"].item()  # λ = 3/2
    (True, 'ok')
    """
    from devmon.analysis.derive.llc import Z, llc
    from devmon.sampling.calibration import calibrate, noise_heats

    data = as_examples(data)
    settings = Settings(
        lr=lr if lr is not None else 0.0,
        gamma=gamma if gamma is not None else 0.0,
        nbeta=nbeta,
        chains=chains,
        draws=draws,
        burn_in=draws // 2 if burn_in is None else burn_in,
        batch_size=min(64, data.n) if batch_size is None else batch_size,
        steps_per_draw=steps_per_draw or 1,
        sampler=sampler,
        control_variate=bool(control_variate),
        shared_batches=shared_batches,
        prior=prior,
        mask=mask,
        examples=examples,
        acceptance=acceptance,
        float64=float64,
        seed=seed,
    )
    reasons, systematic = "", 0.0
    if lr is None or gamma is None:
        found = calibrate(model, loss, data, settings)
        reasons, systematic = found.reasons, found.systematic
        given: dict[str, Any] = {
            "lr": lr,
            "gamma": gamma,
            "control_variate": control_variate,
            "steps_per_draw": steps_per_draw,
        }
        settings = replace(found.settings, **{name: value for name, value in given.items() if value is not None})
    elif control_variate is None:
        settings = replace(settings, control_variate=noise_heats(model, loss, data, settings))
    traces = sample(model, loss, data, settings)
    result = llc(traces)
    attrs = result.attrs
    if reasons:
        attrs = attrs | {"calibration": reasons, "systematic": systematic}
        half = Z * np.hypot(result["se"], systematic * abs(result["llc"]))
        result["low"], result["high"] = result["llc"] - half, result["llc"] + half
    return xr.merge([result, traces], combine_attrs="drop").assign_attrs(attrs)
