"""The local learning coefficient, its error and its health, from stored sampling traces."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import xarray as xr

from devmon.analysis.derive.errors import Z, covariance, mean_and_error, paired_batches, pooled_errors
from devmon.analysis.derive.mixing import ess_mean, memory_of, rhat, rhat_limit
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


def llc(dataset: xr.Dataset, *, burn_in: int | None = None, without_first_order: bool = False) -> xr.Dataset:
    """λ̂ = nbeta · mean(loss − baseline − linear) over chains and the draws after burn-in, with its error and verdict.

    `dataset` holds `loss` and `baseline` over (chain, draw), perhaps with a leading step, as `devmon.instruments.LLC`
    stores them. `burn_in` draws are left out (default: what the attrs say). `without_first_order` takes the first-order
    part away: nbeta E[L(w) − L(w*) − ∇L(w*)·(w − w*)], what λ̂ would be if w* were a minimum. Per step the result has

    - `llc`, `se`, `low`, `high`, `dof`: the estimate and its 90% interval, a Student interval. `se` is the interval's
      half-width / 1.645, so that llc ± 1.645 se is that interval also where few draws make it wide. It comes from batch
      means, and with several steps from an autocorrelation time common to them (`pooled_errors`), as all errors here.
    - `llc_chain(chain)`; `ess` and `rhat` of the loss differences (rank-normalised split R̂, Vehtari et al. 2021)
    - `autocorrelation_time`: 1 + 2 Σ ρ in draws, within chains, with several steps one for all. `rhat_limit`: the R̂
      that sound chains of that memory exceed once in 500 times, at least 1.1
    - `negative_share`: share of draws scored below w*. `drift`: second half minus first half, over λ̂
    - `temperature`, `temperature_se`: the configurational temperature E[∇U·(w−w*)] / d of SGMCMC (Wenzel et al. 2020,
      2002.02405) with U = nbeta L + (gamma/2)‖w−w*‖² + (prior/2)‖w‖² and d parameters. It is 1 in the law that should
      be sampled (integrate by parts), above 1 where step size or minibatch noise widen the law, below 1 while flat
      directions still fill.
    - `anharmonicity`, `anharmonicity_se`: E[∇L·(w−w*)] / (2 E[L(w) − L(w*)]), each without its first-order part: 1
      where the loss is quadratic around w*, 2 where it is quartic, below 1 where the chain has left the basin of w*
    - `first_order`, `first_order_se`: nbeta ∇L(w*)·E[w − w*], the part of λ̂ that is there because w* is no minimum.
      Negative: the chains go downhill. It is still in `llc`, unless `without_first_order`
    - `noise_bias`: the most that minibatch noise adds to λ̂, to first order in lr: lr nbeta² tr Cov(∇L_B(w*)) / 8 for
      SGLD on a quadratic, (1 + c)/(1 − c) times that at momentum c, 0 with control variates. All of it where the noise
      is along directions of curvature ≫ gamma / nbeta
    - `acceptance`: mean Metropolis acceptance of a step of SGLD, where the traces hold it (0.57 is the optimum of MALA)
    - `fluctuation`, `fluctuation_se`: the singular fluctuation ν = ½ nbeta E_examples[Var_w(loss of the example)],
      where the traces hold `example_loss` (Watanabe 2010, 1004.2316; d/2 in a regular realisable model at nbeta = n, λ
      and ν of which give the gap between training and test loss). Its error is that between chains.
    - `wbic`: n E[L(w)], an estimate of the free energy where nbeta = n / log n (Watanabe 2013)
    - `verdict`: "ok", or what is wrong (`devmon.analysis.derive.verdicts.verdict` has the words)

    With steps there are also, from traces that are paired because noise and batches are common to all steps,

    - `llc_covariance` (step, other): the covariance of λ̂ over steps. The square of `se` is its diagonal, and the error
      of λ̂[i] − λ̂[j] is √(C_ii + C_jj − 2 C_ij), mostly far below that of two independent estimates (`covariance`)
    - `change`, `change_se`: λ̂ minus that of the step before, and its error, from that covariance
    - `llc_replicates` (replicate, step): λ̂ by batch of draws, the same batches at every step, whose mean is `llc`; how
      their contrasts over steps differ is the error of that contrast. See `paired_batches`.

    Raises DataError for traces without draws after burn-in, without the variables named, or without a first-order part
    that is to be taken away.
    """
    skip = _check(dataset, burn_in)
    single = "step" not in dataset.dims
    whole = dataset.expand_dims("step") if single else dataset
    if without_first_order:
        if "first_order" not in dataset:
            raise DataError("these traces hold no first_order, which version 0.1 did not measure: measure them again")
        whole = whole.assign_attrs(without_first_order=1)
    shared = bool(dataset.attrs.get("shared_batches"))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        traces = _quantities(whole)
        # A chain that met infinity in its burn-in has no law either: λ̂ is NaN, while the healthy ones keep their means.
        finite = np.isfinite(traces["excess"]).all((1, 2))
        kept = {name: values[:, :, skip:] for name, values in traces.items()}
        numbers = _levels(kept, finite, whole.attrs, shared) | _others(whole, kept["excess"], skip)
        numbers |= _mixing(kept["excess"], finite)
    numbers["verdict"] = np.array(
        [
            verdict({name: column[i] for name, column in numbers.items()}, kept["excess"][i], whole.isel(step=i))
            for i in range(len(finite))
        ],
        dtype=object,
    )
    derived = _dataset(numbers, whole, skip)
    return derived.isel(step=0) if single else _paired(derived, kept["excess"], shared)


@np.errstate(over="ignore", invalid="ignore")  # a chain that diverged
def _quantities(dataset: xr.Dataset) -> dict[str, np.ndarray]:
    """What is averaged, over (step, chain, draw): all in units of λ̂."""
    attrs, nbeta = dataset.attrs, float(dataset.attrs["nbeta"])

    def trace(values: xr.DataArray) -> np.ndarray:
        return values.transpose("step", "chain", "draw").values.astype(np.float64)

    found = {"excess": trace(scaled_excess(dataset))}
    if "first_order" in dataset:
        found["first_order"] = nbeta * trace(dataset["first_order"])
        if attrs.get("without_first_order"):
            found["excess"] = found["excess"] - found["first_order"]
    # Integration by parts: E[∇U·(w − w*)] is the number of parameters in the law, whatever the loss.
    if "slope" in dataset and "parameters" in attrs:
        found["pull"] = nbeta * trace(dataset["slope"])
        found["virial"] = found["pull"] + float(attrs["gamma"]) * trace(dataset["distance"]) ** 2
        if "prior_slope" in dataset:
            found["virial"] = found["virial"] + float(attrs["prior"]) * trace(dataset["prior_slope"])
    return found


def scaled_excess(dataset: xr.Dataset) -> xr.DataArray:
    """nbeta (loss − baseline − linear): unbiased for the local learning coefficient, draw by draw."""
    difference = dataset["loss"] - dataset["baseline"]
    if "linear" in dataset:
        difference = difference - dataset["linear"]
    return difference * float(dataset.attrs["nbeta"])


def _levels(kept: dict[str, np.ndarray], finite: np.ndarray, attrs: dict[str, Any], shared: bool) -> dict[str, Any]:
    """Means with their errors, (step,)."""

    def level(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        values = np.where(finite[:, None, None], values, np.nan)
        if len(values) == 1:
            return tuple(np.array([x]) for x in mean_and_error(values[0], shared))  # type: ignore[return-value]
        return values.mean((1, 2)), *pooled_errors(values, shared)

    value, se, dof = level(kept["excess"])
    found = {"llc": value, "se": se, "low": value - Z * se, "high": value + Z * se, "dof": dof}
    names = ("temperature", "anharmonicity", "pull", "first_order")
    found |= {name: np.full(len(finite), np.nan) for base in names for name in (base, f"{base}_se")}
    if "first_order" in kept:
        found["first_order"], found["first_order_se"], _ = level(kept["first_order"])
    if "pull" in kept:
        found["pull"], found["pull_se"], _ = level(kept["pull"])
        virial, virial_se, _ = level(kept["virial"])
        found["temperature"], found["temperature_se"] = (x / int(attrs["parameters"]) for x in (virial, virial_se))
        # The growth of the loss is a ratio of means: its error is that of what is left of one beside the other.
        above, below = kept["pull"], 2 * kept["excess"]
        if "first_order" in kept:
            above = above - kept["first_order"]
            below = below if attrs.get("without_first_order") else below - 2 * kept["first_order"]
        growth, scale = above.mean((1, 2)) / below.mean((1, 2)), np.abs(below.mean((1, 2)))
        found["anharmonicity"] = growth
        found["anharmonicity_se"] = level(above - growth[:, None, None] * below)[1] / scale
    return found


def _others(dataset: xr.Dataset, excess: np.ndarray, skip: int) -> dict[str, np.ndarray]:
    """What has no error of its own, (step,), and λ̂ of each chain."""
    half, value = excess.shape[2] // 2, excess.mean((1, 2))
    drift = (excess[:, :, half:].mean((1, 2)) - excess[:, :, :half].mean((1, 2))) / value
    nothing = np.full(len(excess), np.nan)
    loss = dataset["loss"].transpose("step", "chain", "draw").values[:, :, skip:]
    found = {
        "llc_chain": excess.mean(2),
        "drift": drift if half else nothing,
        "negative_share": (excess < 0).mean((1, 2)),
        "wbic": float(dataset.attrs.get("n", np.nan)) * loss.mean((1, 2)),
        "noise_bias": dataset["noise_bias"].values if "noise_bias" in dataset else nothing,
        "acceptance": nothing,
    }
    if "acceptance" in dataset:
        found["acceptance"] = dataset["acceptance"].isel(draw=slice(skip, None)).mean(("chain", "draw")).values
    both = [_fluctuation(dataset.isel(step=i), skip) for i in range(len(excess))]
    found["fluctuation"], found["fluctuation_se"] = np.array(both).T
    return found


def _mixing(excess: np.ndarray, finite: np.ndarray) -> dict[str, Any]:
    """Effective sizes and R̂, (step,); the chains' memory varies little along a run: all steps know it together."""
    memory = memory_of(excess[finite])
    found: dict[str, Any] = {name: np.full(len(excess), np.nan) for name in ("ess", "rhat", "rhat_limit")}
    found |= {"autocorrelation_time": np.full(len(excess), np.nan), "memory": np.full(len(excess), memory, object)}
    # Mixing is undefined for a handful of draws and for constants.
    for i, values in enumerate(excess):
        if finite[i] and values.shape[1] >= 4 and values.std() > 0:
            found["ess"][i], found["rhat"][i] = ess_mean(values), rhat(values)
            found["rhat_limit"][i], found["autocorrelation_time"][i] = rhat_limit(values.shape, memory), memory.time
    return found


def _paired(derived: xr.Dataset, excess: np.ndarray, shared: bool) -> xr.Dataset:
    """`derived` with what is known of changes: traces are paired over steps."""
    about = {"units": "1"}
    matrix = covariance(excess, shared)
    derived["llc_covariance"] = (("step", "other"), matrix, about | {"long_name": "covariance of the LLC over steps"})
    alone, with_next = np.diag(matrix), np.diag(matrix, -1)
    changes = {
        "change": np.diff(derived["llc"].values),
        "change_se": np.sqrt(np.maximum(alone[1:] + alone[:-1] - 2 * with_next, 0)),
    }
    for name, values in changes.items():
        words = {"long_name": f"{name} of the LLC since the step before"}
        derived[name] = ("step", np.concatenate([[np.nan], values]), about | words)
    batches = paired_batches(excess, shared)
    centred = batches - batches.mean(0) + derived["llc"].values
    words = {"long_name": "LLC by batch of draws, paired over steps"}
    derived["llc_replicates"] = (("replicate", "step"), centred, about | words)
    return derived.assign_coords(other=derived["step"].values)


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
    "anharmonicity_se": "standard error of the growth of the loss",
    "first_order": "first-order part of the LLC: w* is no minimum",
    "first_order_se": "standard error of the first-order part",
    "noise_bias": "the most that minibatch noise adds to the LLC",
    "negative_share": "share of draws below the loss at w*",
    "acceptance": "Metropolis acceptance of a step",
    "fluctuation": "singular fluctuation",
    "fluctuation_se": "standard error of the singular fluctuation",
    "wbic": "n times the mean loss of the draws",
}


def _dataset(numbers: dict[str, Any], dataset: xr.Dataset, skip: int) -> xr.Dataset:
    variables: dict[str, Any] = {
        name: ("step", np.asarray(numbers[name], dtype=np.float64), {"long_name": words, "units": "1"})
        for name, words in _WORDS.items()
    }
    by_chain = {"long_name": "LLC of each chain", "units": "1"}
    variables["llc_chain"] = (("step", "chain"), numbers["llc_chain"], by_chain)
    variables["verdict"] = ("step", numbers["verdict"], {"long_name": "health of the estimate", "units": ""})
    chain = dataset["chain"].values if "chain" in dataset.coords else np.arange(dataset.sizes["chain"])
    coords = {"chain": chain} | ({"step": dataset["step"].values} if "step" in dataset.coords else {})
    return Estimates(variables, coords, dict(dataset.attrs) | {"burn_in": skip, "headline": ["llc"]})


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
