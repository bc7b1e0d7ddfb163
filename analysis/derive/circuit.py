"""How much circuits of different steps have in common, from the edges that are stored."""

from __future__ import annotations

import numpy as np
import xarray as xr

from devmon.errors import DataError


def circuit_overlap(dataset: xr.Dataset, k: int | None = None, edges: int | None = None) -> xr.Dataset:
    """Jaccard overlap |A ∩ B| / |A ∪ B| of the `k` highest-ranked edges at each two steps.

    `dataset` is what `devmon.instruments.Circuit` stores: `edge_id` (step, edge) in order of rank, -1 where there are
    no more; `k` is at most the number stored (default: all of them), `edges` the number of edges of the graph (default:
    what the attrs say). The result has, as shares of 1,

    - `jaccard` (step, other_step): 1 for the same set, whatever the order
    - `to_last` (step): with the last step; `to_next` (step): with the step after, NaN at the last
    - `chance`: the expected overlap of two random sets of this size, the null; NaN where the number of edges is not
      known

    A high overlap says that the same edges are used, not that they do the same. Raises DataError without steps or
    edges, or for a `k` that was not stored.
    """
    if "edge_id" not in dataset or set(dataset["edge_id"].dims) != {"step", "edge"} or not dataset.sizes["step"]:
        raise DataError("circuit_overlap needs edge_id over (step, edge), as the watch of a Circuit stores it")
    numbers = dataset["edge_id"].transpose("step", "edge").values
    k = numbers.shape[1] if k is None else k
    if not 1 <= k <= numbers.shape[1]:
        raise DataError(f"circuit_overlap: k must be 1 .. {numbers.shape[1]}, the edges that are stored; got {k}")
    sets = [set(row[row >= 0].tolist()) for row in numbers[:, :k].astype(int)]
    overlap = np.array([[_jaccard(a, b) for b in sets] for a in sets])
    steps = dataset["step"].values
    after = np.append(np.diagonal(overlap, 1), np.nan)
    total = dataset.attrs.get("edges") if edges is None else edges
    chance = np.nan if total is None else _chance(min(k, int(total)), int(total))
    about = {"units": "share"}
    return xr.Dataset(
        {
            "jaccard": (("step", "other_step"), overlap, about | {"long_name": "overlap of circuits at two steps"}),
            "to_last": ("step", overlap[:, -1], about | {"long_name": "overlap with the circuit of the last step"}),
            "to_next": ("step", after, about | {"long_name": "overlap with the circuit of the next step"}),
            "chance": ((), float(chance), about | {"long_name": "expected overlap of random circuits"}),
        },
        coords={"step": steps, "other_step": steps},
        attrs={"k": k},
    )


def _jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b) if a | b else float("nan")


def _chance(k: int, total: int) -> float:
    """E[h / (2k - h)] for h common elements of two random sets of k out of `total`."""
    from scipy.stats import hypergeom  # takes longer to import than all else that a report needs of scipy

    common = np.arange(k + 1)
    return float((hypergeom.pmf(common, total, k, k) * common / (2 * k - common)).sum())
