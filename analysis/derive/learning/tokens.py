"""When each token of a probe was learned, from its stored losses. Pure NumPy."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from devmon.analysis.derive.learning.passages import last_passage
from devmon.errors import DataError

Array = NDArray[np.float64]
FEWEST = 5  # steps: with fewer the noise of a token cannot be told from its course
TAIL = 0.1  # of the rows: their mean is the loss at the end; more counts learning as noise, less counts noise
SURE = 3.0  # noises of a token that a change must exceed: with 4000 tokens about 5 of pure noise pass each way
GROUPS = 10  # of sequences, of the jackknife of the quantiles
QUANTILES = (0.1, 0.5, 0.9)


def token_learning(dataset: xr.Dataset, least: float = 0.5) -> xr.Dataset:
    """When each token was learned: the step at which its loss passed half of its fall for good.

    `dataset` is a watch of `TokenLoss`, its first row the model before it has learned (step 0, or a pretrained one).
    The fall of a token is its loss in the first row minus its mean in the last tenth of the rows. It is learned where
    the fall is above `least` nats and three times its own noise, by the scatter of its second differences; the step is
    that of the last passage of half of the fall, interpolated in log step (as the age of acquisition of Chang & Bergen
    2022, 2110.02406, without a fitted curve). Tokens whose loss *rises* by as much are the null: noise does either.

    - `kind` (token): "learned", "unlearned" or "flat"
    - `learned` (token), step: NaN for the others
    - `learned_low`, `learned_high` (token), step: the checkpoints about it, from before the first passage to after the
      last
    - `fall` (token), nats
    - `share`, `share_se` (step), share: of all tokens, those learned by this step, with its error over sequences
    - `lost` (step), share: of all tokens, those unlearned by this step: the null of `share`
    - `when` (quantile), step: the steps by which a tenth, half and nine tenths of the learned ones were; `when_low`,
      `when_high` their 90% intervals, by a jackknife over groups of sequences in log step. NaN without learned tokens

    A token that is learned in two stages counts by the half of both together. Raises DataError for another dataset and
    for fewer than five steps.
    """
    if "nats" not in dataset or set(dataset["nats"].dims) != {"step", "token"} or dataset.sizes["step"] < FEWEST:
        raise DataError(
            f"token_learning needs `nats` over (step, token) at {FEWEST} steps or more, as the watch of a TokenLoss "
            f"stores it; got {dict(dataset.sizes)}: give trajectory[watch]"
        )
    nats = dataset["nats"].transpose("step", "token").values.astype(np.float64)
    steps = dataset["step"].values

    # what fell, against the noise of each token: second differences leave a smooth course out
    tail = max(1, round(TAIL * len(steps)))
    fall = nats[0] - nats[-tail:].mean(0)
    noise = np.median(np.abs(np.diff(nats, 2, axis=0)), 0) / (0.6745 * np.sqrt(6))
    moved = np.abs(fall) > np.maximum(least, SURE * noise * np.sqrt(1 + 1 / tail))
    kind = np.where(moved, np.where(fall > 0, "learned", "unlearned"), "flat").astype(object)

    # the last passage of half-way, and the first
    ahead = np.sign(fall) * (nats - (nats[0] - fall / 2))  # above 0 before it
    passed, first, after = last_passage(steps, ahead)
    of = {name: np.where(kind == name, passed, np.nan) for name in ("learned", "unlearned")}
    known = kind == "learned"

    # the distribution over steps, of whole sequences
    sequence = dataset["sequence"].values if "sequence" in dataset.coords else np.arange(nats.shape[1])
    group = np.unique(sequence, return_inverse=True)[1]
    share, share_se = _shares(of["learned"], steps, group)
    lost, _ = _shares(of["unlearned"], steps, group)
    when, low, high = _quantiles(np.log10(of["learned"] + 1), group)

    about = {"learned": of["learned"], "fall": fall, "kind": kind}
    about |= {f"learned_{end}": np.where(known, steps[at], np.nan) for end, at in (("low", first), ("high", after))}
    result = xr.Dataset(
        {name: ("token", values) for name, values in about.items()}
        | {"share": ("step", share), "share_se": ("step", share_se), "lost": ("step", lost)}
        | {name: ("quantile", 10**at - 1) for name, at in (("when", when), ("when_low", low), ("when_high", high))},
        coords={"step": steps, "token": dataset["token"].values, "quantile": list(QUANTILES)},
    )
    return result.assign_coords(
        {name: ("token", dataset[name].values) for name in ("sequence", "pos", "target") if name in dataset.coords}
    )


def _shares(at: Array, steps: NDArray[np.int64], group: NDArray[np.int64]) -> tuple[Array, Array]:
    """The share of tokens whose step is not after each of `steps`, and its error over sequences (ratio estimator)."""
    by = at[None] <= steps[:, None]  # NaN never is
    count = np.bincount(group)
    total = np.stack([np.bincount(group, row) for row in by], 1)  # (sequence, step)
    mean, n = total.sum(0) / count.sum(), len(count)
    if n < 2:
        return mean, np.full(len(steps), np.nan)
    spread = ((total - mean * count[:, None]) ** 2).sum(0)
    return mean, np.sqrt(spread * n / (n - 1)) / count.sum()


def _quantiles(passed: Array, group: NDArray[np.int64]) -> tuple[Array, Array, Array]:
    """Quantiles of the log steps, and the ends of their 90% intervals, by leaving out groups of sequences."""
    known = np.isfinite(passed)
    if not known.any():
        return (np.full(len(QUANTILES), np.nan),) * 3
    whole = np.quantile(passed[known], QUANTILES)
    part = group % GROUPS
    without = [passed[known & (part != each)] for each in np.unique(part)]
    if len(without) < 2 or any(len(rest) == 0 for rest in without):
        return whole, np.full(len(whole), np.nan), np.full(len(whole), np.nan)
    each = np.stack([np.quantile(rest, QUANTILES) for rest in without])
    se = np.sqrt((len(each) - 1) * each.var(0))
    return whole, whole - 1.64 * se, whole + 1.64 * se
