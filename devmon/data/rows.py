"""The builder of what an instrument returns: every variable with its standard error and its labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

# The largest replicates of one variable, in numbers: 8 groups of 512 elements, 16 kB a step. More would weigh more than
# all else that a run keeps of an instrument; an array that large is followed by its largest element.
MAX_REPLICATES = 4096


class Rows:
    """The variables of one observation, put one by one, then made into a dataset.

    `headline` names the variables that are followed over training, `error` says what the standard errors are over, and
    `attrs`, which may be added to, are attributes of the dataset.

    >>> result = Rows(headline=["score"], error="standard error over prompts")
    >>> result.put("score", "layer", [0.5, 0.75], [0.1, 0.2], "share of right answers", units="share")
    >>> result.put("chance", (), 0.25, None, "share of a blind guess", units="share")
    >>> dataset = result.dataset(layer=[0, 1])
    >>> list(dataset.data_vars), dataset["score_se"].attrs
    (['score', 'score_se', 'chance'], {'long_name': 'standard error over prompts', 'units': 'share'})
    """

    def __init__(
        self, headline: Sequence[str] = (), error: str = "standard error over sequences", **attrs: object
    ) -> None:
        self.error = error
        self.headline = tuple(headline)
        self.attrs: dict[str, object] = {"headline": list(headline), **attrs}
        self._variables: dict[str, tuple[str | Sequence[str], ArrayLike, dict[str, object]]] = {}
        self._replicates: dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, object]]] = {}

    def put(
        self,
        name: str,
        dims: str | Sequence[str],
        value: ArrayLike,
        se: ArrayLike | None,
        long_name: str,
        *,
        units: str,
        smallest_change: float | None = None,
        nan: str | None = None,
        error: str | None = None,
        replicates: ArrayLike | None = None,
        later: bool = False,
    ) -> None:
        """Add `name` over `dims` and, where there is an `se`, its standard error as `name_se`.

        `smallest_change`, in `units`, is the least change of a headline that anybody would care about: alarms and the
        search for events leave smaller ones out. `nan` says when a value is NaN. `error` is the label of this standard
        error, where it differs from that of the others.

        `later` marks what a later version added: it is left out of runs whose first rows lack it.

        `replicates` (replicate, *dims) are the value on fixed groups of items (`devmon.data.clustered_groups`), kept as
        `name_replicates` in float32: how contrasts of them over steps differ is the error of that contrast. They are
        kept of headlines alone, from two groups on and up to `MAX_REPLICATES` numbers.
        """
        attrs: dict[str, object] = {"long_name": long_name, "units": units}
        if smallest_change is not None:
            attrs["smallest_change"] = smallest_change
        if nan is not None:
            attrs["nan"] = nan
        added: dict[str, object] = {"later": 1} if later else {}
        self._variables[name] = (dims, value, attrs | added)
        if se is not None:
            about_error: dict[str, object] = {"long_name": error or self.error, "units": units}
            self._variables[f"{name}_se"] = (dims, se, about_error | added)
        if replicates is not None and name in self.headline:
            with np.errstate(over="ignore"):
                groups = np.asarray(replicates, np.float32)
            if len(groups) > 1 and groups.size <= MAX_REPLICATES:
                by_group = ("replicate", *((dims,) if isinstance(dims, str) else dims))
                about: dict[str, object] = {"long_name": f"{long_name}, by group of items", "units": units}
                self._replicates[name] = (by_group, groups, about)

    def dataset(self, **coords: ArrayLike) -> xr.Dataset:
        """All that was put, over these coordinates.

        Of headlines over different numbers of items, under 8, only those with the most groups keep replicates.
        """
        most = max((len(groups) for _, groups, _ in self._replicates.values()), default=0)
        kept = {f"{name}_replicates": put for name, put in self._replicates.items() if len(put[1]) == most}
        if kept:
            coords["replicate"] = np.arange(most)
        return xr.Dataset(self._variables | kept, coords=coords, attrs=self.attrs)
