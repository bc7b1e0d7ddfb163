"""The builder of what an instrument returns: every variable with its standard error and its labels."""

from __future__ import annotations

from collections.abc import Sequence

import xarray as xr
from numpy.typing import ArrayLike


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
        self.attrs: dict[str, object] = {"headline": list(headline), **attrs}
        self._variables: dict[str, tuple[str | Sequence[str], ArrayLike, dict[str, object]]] = {}

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
    ) -> None:
        """Add `name` over `dims` and, where there is an `se`, its standard error as `name_se`.

        `smallest_change`, in `units`, is the least change of a headline that anybody would care about: alarms and the
        search for events leave smaller ones out. `nan` says when a value is NaN. `error` is the label of this standard
        error, where it differs from that of the others.
        """
        attrs: dict[str, object] = {"long_name": long_name, "units": units}
        if smallest_change is not None:
            attrs["smallest_change"] = smallest_change
        if nan is not None:
            attrs["nan"] = nan
        self._variables[name] = (dims, value, attrs)
        if se is not None:
            self._variables[f"{name}_se"] = (dims, se, {"long_name": error or self.error, "units": units})

    def dataset(self, **coords: ArrayLike) -> xr.Dataset:
        """All that was put, over these coordinates."""
        return xr.Dataset(self._variables, coords=coords, attrs=self.attrs)
