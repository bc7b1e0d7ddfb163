"""Whether function-vector heads were induction heads once, and when they turned: from stored scores. Pure NumPy."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import rankdata

from devmon.analysis.derive.learning.passages import last_passage
from devmon.errors import DataError

Array = NDArray[np.float64]
VARIABLES = ("prefix_matching", "logit_effect")


def head_succession(
    induction: xr.Dataset, vectors: xr.Dataset, *, share: float = 0.02, permutations: int = 999, seed: int = 0
) -> xr.Dataset:
    """How the heads of induction and those of function vectors go together over training (Yin & Steinhardt 2025,
    2502.14010: many of the latter were the former first).

    `induction` is a watch of `InductionHeads`, `vectors` one of `FunctionVectorHeads` of the same model; the steps that
    both have are compared. The final function-vector heads are the `share` of all heads (one at least) with the largest
    `logit_effect` at the last step; effects that attribution screened out, or that there are none of before the model
    has a task, count as 0. The null is heads permuted within their layers, so that what belongs to a layer is no
    evidence; every p counts the order that is there as one.

    - `correlation`, `correlation_p` (step), 1: rank correlation over heads of prefix matching and effect at the step,
      two-sided; NaN where all effects are 0
    - `overlap`, `overlap_null` (step), share: Jaccard overlap of the top heads of each kind, and its mean over the null
    - `layer`, `head` (rank): the final function-vector heads, the strongest first; `effect` (rank), nats
    - `peak`, `peak_step` (rank): their highest prefix matching, and its step; `end` (rank), that at the last step
    - `vector_step` (rank), step: at which the effect passed half of its last value for good; NaN where it is not
      above 0
    - `lead` (rank), decades of the step: log10 of (vector_step + 1) over (peak_step + 1); above 0: induction first
    - `mean_peak`, `mean_peak_null`, `mean_peak_p`: mean of `peak`, over the null, and the share of the null as high
    - `mean_lead`, `first`: mean of `lead`, and the share of these heads in which induction was first

    Raises DataError for other datasets, for models of different heads and for fewer than three common steps.
    """
    for name, dataset in zip(VARIABLES, (induction, vectors), strict=True):
        if name not in dataset or set(dataset[name].dims) != {"step", "layer", "head"}:
            raise DataError(
                f"head_succession needs `{name}` over (step, layer, head): give the watches of InductionHeads and of "
                f"FunctionVectorHeads, in this order; got {sorted(map(str, dataset.data_vars))}"
            )
    steps = np.intersect1d(induction["step"].values, vectors["step"].values)
    matching, effect = (
        dataset[name].sel(step=steps).transpose("step", "layer", "head").values.astype(np.float64)
        for name, dataset in zip(VARIABLES, (induction, vectors), strict=True)
    )
    if matching.shape != effect.shape or len(steps) < 3:
        raise DataError(
            f"head_succession compares the same heads at three steps or more, got {matching.shape} and {effect.shape}: "
            "measure both watches at the same steps"
        )
    matching, effect = np.nan_to_num(matching), np.nan_to_num(effect)
    layers, heads = matching.shape[1:]
    top = max(1, round(share * layers * heads))

    # the null: the columns of one kind, moved within layers, as numbers of heads
    rng = np.random.default_rng(seed)
    base = np.arange(layers * heads).reshape(layers, heads)
    orders = np.stack([base.ravel(), *(rng.permuted(base, axis=1).ravel() for _ in range(permutations))])
    flat, other = matching.reshape(len(steps), -1), effect.reshape(len(steps), -1)

    # at each step: do the same heads lead?
    ranks = [_standard(np.apply_along_axis(rankdata, 1, each)) for each in (flat, other)]
    correlation, p = np.full(len(steps), np.nan), np.full(len(steps), np.nan)
    overlap = np.full((len(steps), len(orders)), np.nan)
    for i in range(len(steps)):
        best = [np.isin(np.arange(flat.shape[1]), np.argsort(-each[i], kind="stable")[:top]) for each in (flat, other)]
        both = (best[0][orders] & best[1]).sum(1)
        overlap[i] = both / (2 * top - both)
        if np.isfinite(ranks[0][i]).all() and np.isfinite(ranks[1][i]).all():
            drawn = ranks[0][i][orders] @ ranks[1][i]
            correlation[i], p[i] = drawn[0], (np.abs(drawn) >= np.abs(drawn[0]) - 1e-12).mean()

    # the final function-vector heads, and what they were
    chosen = np.argsort(-other[-1], kind="stable")[:top]
    peaks = flat.max(0)
    mean_peak = peaks[orders[:, chosen]].mean(1)
    peak_step = steps[flat.argmax(0)][chosen].astype(float)
    passed = last_passage(steps, other[-1, chosen] / 2 - other[:, chosen])[0]
    vector_step = np.where(other[-1, chosen] > 0, passed, np.nan)
    lead = np.log10((vector_step + 1) / (peak_step + 1))
    by_rank = {"effect": other[-1, chosen], "peak": peaks[chosen], "peak_step": peak_step, "end": flat[-1, chosen]}
    by_rank |= {"vector_step": vector_step, "lead": lead}
    known = np.isfinite(lead)
    scalars = {
        "mean_peak": mean_peak[0],
        "mean_peak_null": mean_peak[1:].mean(),
        "mean_peak_p": (mean_peak >= mean_peak[0] - 1e-12).mean(),
        "mean_lead": lead[known].mean() if known.any() else np.nan,
        "first": (lead[known] > 0).mean() if known.any() else np.nan,
    }
    by_step = {"correlation": correlation, "correlation_p": p, "overlap": overlap[:, 0]}
    by_step["overlap_null"] = overlap[:, 1:].mean(1)
    where = {"layer": induction["layer"].values[chosen // heads], "head": induction["head"].values[chosen % heads]}
    return xr.Dataset(
        {name: ("step", values) for name, values in by_step.items()}
        | {name: ("rank", values) for name, values in (where | by_rank).items()}
        | {name: ((), float(value)) for name, value in scalars.items()},
        coords={"step": steps, "rank": np.arange(top)},
    )


def _standard(ranks: Array) -> Array:
    """Rows (step, head) of mean 0 and length 1; NaN where all are equal."""
    centred = ranks - ranks.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return centred / np.linalg.norm(centred, axis=1, keepdims=True)
