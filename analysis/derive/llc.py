"""The local learning coefficient, its error and its health, from stored sampling traces."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import xarray as xr

from devmon.analysis.derive.errors import Z, mean_and_error, paired_batches, pooled_errors
from devmon.analysis.derive.mixing import Memory, ess_mean, memory_of, rhat, rhat_limit
from devmon.analysis.derive.verdicts import accepted, verdict
from devmon.analysis.table import Row, table_html, thinned
from devmon.analysis.wording import number
from devmon.errors import DataError


class Estimates(xr.Dataset):
    """The dataset that `llc` returns; a notebook shows the estimates and their health above xarray's own view."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        if not {"llc", "verdict"} <= set(self.data_vars):
            return str(super()._repr_html_())
        return _html(self) + str(super()._repr_html_())


def llc(dataset: xr.Dataset, *, burn_in: int | None = None) -> xr.Dataset:
    """λ̂ = nbeta · mean(loss − baseline − linear) over chains and the draws after burn-in, with its error and verdict.

    `dataset` holds `loss` and `baseline` over (chain, draw), perhaps with a leading step, as `devmon.instruments.LLC`
    stores them. `burn_in` draws are left out (default: what the attrs say). Per step the result has

    - `llc`, `se`, `low`, `high`, `dof`: the estimate and its 90% interval, a Student interval. `se` is the interval's
      half-width / 1.645, so that llc ± 1.645 se is that interval also where few draws make it wide. It comes from batch
      means, and with several steps from an autocorrelation time common to them (`pooled_errors`).
    - `llc_chain(chain)`; `ess` and `rhat` of the loss differences (rank-normalised split R̂, Vehtari et al. 2021)
    - `autocorrelation_time`: 1 + 2 Σ ρ in draws, within chains, with several steps one for all. `rhat_limit`: the R̂
      that sound chains of that memory exceed once in 500 times, at least 1.1
    - `negative_share`: share of draws scored below w*. `drift`: second half minus first half, over λ̂
    - `temperature`, `temperature_se`: the configurational temperature E[∇U·(w−w*)] / d of SGMCMC (Wenzel et al. 2020,
      2002.02405) with U = nbeta L + (gamma/2)‖w−w*‖², so (nbeta E[∇L·(w−w*)] + gamma E‖w−w*‖²) / parameters. It is 1
      in the law that should be sampled (integrate by parts), above 1 where step size or minibatch noise widen the law,
      below 1 while flat directions still fill.
    - `anharmonicity`: E[∇L·(w−w*)] / (2 E[L(w) − L(w*)]): 1 where the loss is quadratic around w*, 2 where it is
      quartic, below 1 where the chain has left the basin of w*
    - `acceptance`: mean Metropolis acceptance of a step of SGLD, where the traces hold it (0.57 is the optimum of MALA)
    - `fluctuation`, `fluctuation_se`: the singular fluctuation ν = ½ nbeta E_examples[Var_w(loss of the example)],
      where the traces hold `example_loss` (Watanabe 2010, 1004.2316; d/2 in a regular realisable model at nbeta = n, λ
      and ν of which give the gap between training and test loss). Its error is that between chains.
    - `wbic`: n E[L(w)], an estimate of the free energy where nbeta = n / log n (Watanabe 2013)
    - `verdict`, the first that holds: "non-finite" (a chain met NaN or infinity; λ̂ is NaN), "diverged" (distances still
      grow, temperature above 2, or λ̂ above the number of parameters), "negative" (λ̂ or E[∇L·(w−w*)] below 0 by more
      than its error: w* is no minimum), "finite-time" (the temperature is below .8 or above 1.1, and two standard
      errors from 1, while the chains agree),
      "not mixed" (R̂ above its limit or the chains' means apart, a drift common to them, fewer than 8 autocorrelation
      times of draws, or one chain), else "ok". A finite-time λ̂ is a number of its settings: never a level, but
      comparable between checkpoints of equal settings. It is not rejected.

    With steps there are also, from traces that are paired because noise and batches are common to all steps,

    - `change`, `change_se`: λ̂ minus that of the step before, and its error, mostly far below that of two independent
      estimates
    - `llc_replicates` (replicate, step): λ̂ by batch of draws, the same batches at every step, whose mean is `llc`; how
      their contrasts over steps differ is the error of that contrast. See `paired_batches`.

    Raises DataError for traces without draws after burn-in or without the variables named.
    """
    skip = _check(dataset, burn_in)
    if "step" not in dataset.dims:
        return _join([_row(dataset, skip)], dataset, skip).isel(step=0)
    excess = scaled_excess(dataset).transpose("step", "chain", "draw").values[:, :, skip:]
    shared = bool(dataset.attrs.get("shared_batches"))
    steps = range(dataset.sizes["step"])
    if len(steps) == 1:
        rows = [_row(dataset.isel(step=0), skip)]
    else:
        # The chains' memory varies little along a run, and all steps know it better than one.
        errors = zip(*pooled_errors(excess, shared), strict=True)
        memory = memory_of(excess[np.isfinite(excess).all((1, 2))])
        rows = [_row(dataset.isel(step=i), skip, memory, error) for i, error in zip(steps, errors, strict=True)]
    derived = _join(rows, dataset, skip).assign_coords(step=dataset["step"])
    difference = np.diff(excess, axis=0)
    changes = {"change": difference.mean((1, 2)), "change_se": pooled_errors(difference, shared)[0]}
    for name, values in changes.items():
        about = {"long_name": f"{name} of the LLC since the step before", "units": "1"}
        derived[name] = ("step", np.concatenate([[np.nan], np.where(np.isfinite(values), values, np.nan)]), about)
    batches = paired_batches(excess, shared)
    centred = batches - batches.mean(0) + derived["llc"].values
    about = {"long_name": "LLC by batch of draws, paired over steps", "units": "1"}
    derived["llc_replicates"] = (("replicate", "step"), centred, about)
    return derived


def scaled_excess(dataset: xr.Dataset) -> xr.DataArray:
    """nbeta (loss − baseline − linear): unbiased for the local learning coefficient, draw by draw."""
    difference = dataset["loss"] - dataset["baseline"]
    if "linear" in dataset:
        difference = difference - dataset["linear"]
    return difference * float(dataset.attrs["nbeta"])


def _row(
    dataset: xr.Dataset, skip: int, memory: Memory | None = None, error: tuple[float, float] | None = None
) -> dict[str, Any]:
    """All numbers of one estimate; `memory` and `error` (se, dof) are those pooled over the steps of a run."""
    attrs = dataset.attrs
    shared = bool(attrs.get("shared_batches"))
    excess = scaled_excess(dataset).transpose("chain", "draw").values
    kept = excess[:, skip:]
    # A chain that met infinity in its burn-in has no law either: λ̂ is NaN, while the healthy chains keep their means.
    finite = bool(np.isfinite(excess).all())
    value, se, dof = mean_and_error(kept, shared)
    if error is not None and finite:
        se, dof = error
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        chains = kept.mean(1)
        half = kept.shape[1] // 2
        drift = (kept[:, half:].mean() - kept[:, :half].mean()) / value if finite and half and value else np.nan
        row: dict[str, Any] = {"llc": value, "se": se, "low": value - Z * se, "high": value + Z * se, "dof": dof}
        row |= {
            "llc_chain": chains,
            "ess": np.nan,
            "rhat": np.nan,
            "rhat_limit": np.nan,
            "autocorrelation_time": np.nan,
            "drift": drift,
            "temperature": np.nan,
            "temperature_se": np.nan,
            "anharmonicity": np.nan,
        }
        row["negative_share"] = float((kept < 0).mean())
        row["wbic"] = float(attrs.get("n", np.nan)) * float(dataset["loss"].values[..., skip:].mean())
    row["acceptance"] = float(dataset["acceptance"].values[..., skip:].mean()) if "acceptance" in dataset else np.nan
    row["fluctuation"], row["fluctuation_se"] = _fluctuation(dataset, skip)
    pull = None
    # Mixing is undefined for a handful of draws and for constants.
    memory = memory_of(kept[None]) if memory is None and finite else memory
    if finite and memory is not None and kept.shape[1] >= 4 and kept.std() > 0:
        row["ess"], row["rhat"], row["rhat_limit"] = ess_mean(kept), rhat(kept), rhat_limit(kept.shape, memory)
        row["autocorrelation_time"] = memory.time
    # Integration by parts: E[∇U·(w − w*)] is the number of parameters in the law, whatever the loss. Its two terms say
    # how far flat directions (gamma) and curved ones (nbeta) are filled.
    if finite and "slope" in dataset and "parameters" in attrs:
        pull = float(attrs["nbeta"]) * dataset["slope"].transpose("chain", "draw").values[:, skip:]
        spread = float(attrs["gamma"]) * dataset["distance"].transpose("chain", "draw").values[:, skip:] ** 2
        virial, virial_se, _ = mean_and_error(pull + spread, shared)
        row["temperature"], row["temperature_se"] = (x / int(attrs["parameters"]) for x in (virial, virial_se))
        row["anharmonicity"] = float(pull.mean()) / (2 * value) if value else np.nan
    row["verdict"] = verdict(row, kept, pull, memory, dataset) if finite and memory is not None else "non-finite"
    return row


def _fluctuation(dataset: xr.Dataset, skip: int) -> tuple[float, float]:
    if "example_loss" not in dataset:
        return np.nan, np.nan
    losses = dataset["example_loss"].transpose("chain", "draw", "example").values[:, skip:].astype(np.float64)
    half = 0.5 * float(dataset.attrs["nbeta"])
    away = (losses - losses.mean((0, 1))) ** 2
    chains, draws, _ = losses.shape
    by_chain = half * away.mean((1, 2)) * chains * draws / max(chains * draws - 1, 1)
    se = by_chain.std(ddof=1) / np.sqrt(chains) if chains > 1 else np.nan
    return float(by_chain.mean()), float(se)


_WORDS = {
    "llc": "local learning coefficient",
    "se": "standard error (90% interval / 1.645)",
    "low": "lower end of the 90% interval",
    "high": "upper end of the 90% interval",
    "dof": "degrees of freedom of the error",
    "ess": "effective sample size",
    "rhat": "rank-normalised split R̂",
    "rhat_limit": "the R̂ that sound chains of this memory stay below",
    "autocorrelation_time": "draws that count as one",
    "drift": "second half minus first half, relative",
    "temperature": "configurational temperature",
    "temperature_se": "standard error of the configurational temperature",
    "anharmonicity": "growth of the loss over that of a quadratic one",
    "negative_share": "share of draws below the loss at w*",
    "acceptance": "Metropolis acceptance of a step",
    "fluctuation": "singular fluctuation",
    "fluctuation_se": "standard error of the singular fluctuation",
    "wbic": "n times the mean loss of the draws",
}


def _join(rows: list[dict[str, Any]], dataset: xr.Dataset, skip: int) -> xr.Dataset:
    variables: dict[str, Any] = {
        name: ("step", np.array([row[name] for row in rows], dtype=np.float64), {"long_name": words, "units": "1"})
        for name, words in _WORDS.items()
    }
    by_chain = np.array([row["llc_chain"] for row in rows], dtype=np.float64)
    variables["llc_chain"] = (("step", "chain"), by_chain, {"long_name": "LLC of each chain", "units": "1"})
    verdicts = np.array([row["verdict"] for row in rows], dtype=object)
    variables["verdict"] = ("step", verdicts, {"long_name": "health of the estimate", "units": ""})
    chain = dataset["chain"].values if "chain" in dataset.coords else np.arange(dataset.sizes["chain"])
    return Estimates(variables, {"chain": chain}, dict(dataset.attrs) | {"burn_in": skip, "headline": ["llc"]})


def _check(dataset: xr.Dataset, burn_in: int | None) -> int:
    missing = [name for name in ("loss", "baseline") if name not in dataset]
    if missing or not {"chain", "draw"} <= set(dataset.dims) or "nbeta" not in dataset.attrs:
        raise DataError(
            f"expected LLC traces: variables loss and baseline over (chain, draw) and attrs['nbeta']; got variables "
            f"{sorted(map(str, dataset.data_vars))} over {tuple(map(str, dataset.dims))}"
        )
    skip = int(dataset.attrs.get("burn_in", 0)) if burn_in is None else burn_in
    if not 0 <= skip < dataset.sizes["draw"]:
        raise DataError(f"burn_in must leave at least one of {dataset.sizes['draw']} draws, got {skip}")
    return skip


def _html(derived: xr.Dataset) -> str:
    """λ̂ with its error and health, one row a step; rejected estimates are grey."""
    names = {"llc": "LLC", "se": "standard error", "ess": "ESS", "rhat": "R̂"}
    shown = [name for name in names if name in derived and derived[name].dims in ((), ("step",))]
    verdicts = np.atleast_1d(derived["verdict"].values).astype(str)
    steps = (
        np.atleast_1d(derived["step"].values) if "step" in derived.coords else np.full(len(verdicts), "–", dtype=object)
    )
    columns = [np.atleast_1d(derived[name].values) for name in shown]
    rows = [
        Row([str(steps[i]), *(number(float(column[i]), 4) for column in columns), word], not accepted(word))
        for i, word in enumerate(verdicts)
    ]
    table = thinned(["step", *(names[name] for name in shown), "verdict"], rows)
    return f"<p><b>LLC</b>: {int(accepted(verdicts).sum())} of {len(verdicts)} estimates accepted</p>" + table_html(
        table
    )
