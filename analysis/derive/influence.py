"""Which training examples a transition came from, by their losses and influence on its two sides."""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy.special import ndtr

from devmon.errors import DataError


def transition_data(dataset: xr.Dataset, before: int, after: int, queries: str | None = None) -> xr.Dataset:
    """The kept examples in order of how surely their influence on the queries changes between two steps, (example,).

    `dataset` is the watch of `devmon.instruments.BayesianInfluence`; `before` and `after` are measured steps on the two
    sides of an event, `queries` a set of them (default: all). Influence below 0 lowers the queries' loss.

    - `loss_change`, loss: the example's own loss, after minus before
    - `influence_before`, `influence_after`, 1: its influence on the mean query
    - `influence_change`, `influence_change_se`, 1: after minus before, with an error that takes the two steps as
      independent and the queries as one: chains share their noise between steps, so it is too large rather than too
      small
    - `p`, 1: two-sided, of no change of influence, times the number of examples

    Raises DataError for steps that were not measured and an unknown set.
    """
    if "influence" not in dataset or "step" not in dataset["influence"].dims:
        raise DataError("transition_data needs influence over (step, query, example), as BayesianInfluence stores it")
    missing = [step for step in (before, after) if step not in dataset["step"].values]
    if missing or (queries is not None and queries not in dataset["set_of"].values):
        raise DataError(
            f"expected two measured steps and a set of queries, got {before}, {after} and {queries!r}: there are steps "
            f"{dataset['step'].values.tolist()} and sets {sorted(set(dataset['set_of'].values))}"
        )
    chosen = dataset if queries is None else dataset.isel(query=np.flatnonzero(dataset["set_of"].values == queries))
    sides = [chosen.sel(step=step) for step in (before, after)]
    influence, error = (
        [side[name].astype(np.float64).mean("query").values for side in sides] for name in ("influence", "influence_se")
    )
    change, se = influence[1] - influence[0], np.hypot(*error)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.minimum(1.0, len(change) * 2 * ndtr(-np.abs(change) / se))
    columns = {
        "loss_change": (sides[1]["example_loss"].values - sides[0]["example_loss"].values, "loss"),
        "influence_before": (influence[0], "1"),
        "influence_after": (influence[1], "1"),
        "influence_change": (change, "1"),
        "influence_change_se": (se, "1"),
        "p": (p, "1"),
    }
    size = np.abs(change) / se
    order = np.argsort(-np.where(np.isfinite(size), size, -1.0), kind="stable")
    return xr.Dataset(
        {
            name: (
                "example",
                values.astype(np.float64)[order],
                {"long_name": name.replace("_", " "), "units": unit},
            )
            for name, (values, unit) in columns.items()
        },
        coords={name: dataset[name][order] for name in ("example", "example_label") if name in dataset.coords},
        attrs={"before": int(before), "after": int(after)},
    )
