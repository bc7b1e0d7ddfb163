"""λ̂ of the components of a model over training, beside random masks of equal size, and which of them go together."""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy.special import chdtrc

from devmon.analysis.derive.errors import mean_and_error, pooled_errors
from devmon.analysis.derive.llc import llc
from devmon.analysis.derive.verdicts import accepted
from devmon.errors import DataError

# Curves of one group are all correlated by at least this much. Higher, and curves of one shape split by their noise.
ALIKE = 0.9
# A curve is flat where its errors alone would make it vary as much in more than this share of runs.
FLAT = 0.01
FROM_LLC = ("llc", "se", "low", "high", "temperature", "verdict")


def component_llc(dataset: xr.Dataset, *, burn_in: int | None = None) -> xr.Dataset:
    """λ̂ by component, from the traces of `devmon.instruments.RestrictedLLC`, with or without steps.

    Over (step, component), random masks included:

    - `llc`, `se`, `low`, `high`, `temperature`, `verdict`: as `devmon.analysis.llc` gives them for one mask
    - `change`, `change_se` (with steps): since the step before, paired
    - `above_null`, `above_null_se`: λ̂ minus that of the random mask of equal size. Chains, minibatches and steps are
      common to both, so the error is that of the difference. NaN where there is no such mask
    - `llc_replicates` (replicate, step, component), with steps: see `devmon.analysis.llc`

    and over (component): `parameters`, `layer`, `null` (place of its random mask; -1 for none), and with three steps

    - `group`: components whose curves over the steps go together, numbered from 0 by the layers they lie in; -1 for
      random masks, curves that do not vary by more than their errors (chi square at 1%), and with fewer than three
      accepted steps. Curves are standardised and clustered by complete linkage on 1 − r: in a group all pairs
      are correlated by at least 0.9. `varies_p`: the p-value of the chi square

    Raises DataError for a dataset that does not hold such traces.
    """
    missing = [name for name in ("excess", "baseline", "parameters", "null") if name not in dataset]
    if missing or "component" not in dataset.dims:
        raise DataError(
            f"expected the traces of a RestrictedLLC, got a dataset without {missing or 'a dimension component'}: give "
            "that of its watch"
        )
    # What is common to all rows of a watch is stored with each.
    about = {
        name: dataset[name].isel(step=-1, drop=True) if "step" in dataset[name].dims else dataset[name]
        for name in ("parameters", "layer", "null", "shared")
        if name in dataset
    }
    alone = [_of_one(dataset, i, int(about["parameters"].values[i])) for i in range(dataset.sizes["component"])]
    each = [llc(traces, burn_in=burn_in) for traces in alone]
    names = [name for name in (*FROM_LLC, "change", "change_se", "llc_replicates") if name in each[0]]
    columns = [xr.Dataset({name: estimate[name] for name in names}) for estimate in each]
    if "llc_replicates" in names:
        # Neighbouring batches of one chain are joined until all components have as many.
        fewest = min(column.sizes["replicate"] for column in columns)
        columns = [column.coarsen(replicate=column.sizes["replicate"] // fewest).mean() for column in columns]
    derived = xr.concat(columns, "component", combine_attrs="override", coords="minimal", compat="override")
    derived = derived.transpose("replicate", "step", "component", missing_dims="ignore")
    derived = derived.assign_coords(component=dataset["component"])
    derived = derived.assign(about).assign_attrs(dict(dataset.attrs) | {"burn_in": each[0].attrs["burn_in"]})
    skip = int(each[0].attrs["burn_in"])
    derived = derived.assign(_above(dataset, derived, skip))
    if "step" in derived.dims and derived.sizes["step"] >= 3:
        derived = derived.assign(_groups(derived))
    return derived


def groups_of(derived: xr.Dataset) -> dict[int, list[str]]:
    """The members of each `group`, components alone; -1 holds those of none."""
    if "group" not in derived:
        return {}
    random = set(derived["null"].values.tolist())
    members: dict[int, list[str]] = {}
    for i, (label, group) in enumerate(zip(derived["component"].values, derived["group"].values, strict=True)):
        if i not in random:
            members.setdefault(int(group), []).append(str(label))
    return dict(sorted(members.items()))


def is_component_llc(dataset: xr.Dataset) -> bool:
    """Whether a watch's dataset holds the traces of a RestrictedLLC."""
    return dataset.attrs.get("kind") == "llc by component"


def _of_one(dataset: xr.Dataset, i: int, parameters: int) -> xr.Dataset:
    """The traces of one component as those of an LLC."""
    one = dataset.isel(component=i, drop=True)
    baseline = one["baseline"].astype(np.float64)
    kept = {name: one[name].astype(np.float64) for name in ("distance", "slope", "linear") if name in one}
    traces = xr.Dataset({"loss": baseline + one["excess"], "baseline": baseline, **kept})
    return traces.assign_attrs(dict(dataset.attrs) | {"parameters": parameters})


def _above(dataset: xr.Dataset, derived: xr.Dataset, skip: int) -> dict[str, xr.DataArray]:
    """λ̂ minus that of the random mask, and the error of that difference from the paired draws."""
    scaled = dataset["excess"].astype(np.float64) - dataset.get("linear", 0)
    steps = "step" in dataset.dims
    draws = (scaled if steps else scaled.expand_dims("step")).transpose("step", "component", "chain", "draw")
    values = float(dataset.attrs["nbeta"]) * draws.values[..., skip:]
    shared, null = bool(dataset.attrs.get("shared_batches")), derived["null"].values
    mean, se = np.full((2, *values.shape[:2]), np.nan)
    for i in np.flatnonzero(null >= 0):
        difference = values[:, i] - values[:, null[i]]
        mean[:, i] = difference.mean((1, 2))
        if len(values) > 1:
            se[:, i] = pooled_errors(difference, shared)[0]
        else:
            se[0, i] = mean_and_error(difference[0], shared)[1]
    words = {"above_null": "LLC above that of a random mask", "above_null_se": "its standard error"}
    return {
        name: xr.DataArray(
            array if steps else array[0],
            dims=("step", "component") if steps else ("component",),
            attrs={"long_name": words[name], "units": "1"},
        )
        for name, array in (("above_null", mean), ("above_null_se", se))
    }


def _groups(derived: xr.Dataset) -> dict[str, xr.DataArray]:
    """Which components go together over the steps, and whether each varies at all."""
    values, se = (derived[name].transpose("component", "step").values for name in ("llc", "se"))
    good = accepted(derived["verdict"].transpose("component", "step").values) & np.isfinite(values) & (se > 0)
    random = np.isin(np.arange(len(values)), derived["null"].values[derived["null"].values >= 0])
    group, p = np.full(len(values), -1), np.full(len(values), np.nan)
    # Whether a curve varies: its deviations from a weighted mean, in its own errors.
    for i in range(len(values)):
        if good[i].sum() >= 3:
            y, weight = values[i, good[i]], se[i, good[i]] ** -2.0
            p[i] = chdtrc(good[i].sum() - 1, (weight * (y - np.average(y, weights=weight)) ** 2).sum())
    varies = np.flatnonzero((p < FLAT) & ~random)
    # Two curves are compared where both are accepted.
    apart = np.zeros((len(varies), len(varies)))
    for a, one in enumerate(varies):
        for b, other in enumerate(varies[:a]):
            both = good[one] & good[other]
            r = np.corrcoef(values[one, both], values[other, both])[0, 1] if both.sum() >= 3 else np.nan
            apart[a, b] = apart[b, a] = 1 - np.nan_to_num(r)
    if len(varies) > 1:
        from scipy.cluster.hierarchy import fcluster, linkage  # slow to import, and seldom needed
        from scipy.spatial.distance import squareform

        labels = fcluster(linkage(squareform(apart, checks=False), "complete"), 1 - ALIKE, "distance")
        group[varies] = np.unique(labels, return_inverse=True)[1]
    elif len(varies):
        group[varies] = 0
    # Numbered in the order in which their members stand.
    first = list(dict.fromkeys(label for label in group.tolist() if label >= 0))
    numbered = [first.index(label) if label >= 0 else -1 for label in group.tolist()]
    return {
        name: xr.DataArray(np.array(values), dims="component", attrs={"long_name": words, "units": "1"})
        for name, values, words in (
            ("group", numbered, "components that go together"),
            ("varies_p", p, "p that it does not vary"),
        )
    }
