"""What the analysis asks of a run, and a run whose watches are read from the store once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import xarray as xr


class RunData(Protocol):
    """What reading a run needs: `devmon.Trajectory`, or anything with its three members."""

    @property
    def attrs(self) -> Mapping[str, Any]: ...
    def names(self) -> list[str]: ...
    def __getitem__(self, name: str, /) -> xr.Dataset: ...


class ReadOnce:
    """A run whose watches are read from the store once, when first asked for."""

    def __init__(self, run: RunData):
        self.attrs, self._run = run.attrs, run
        self._read: dict[str, xr.Dataset] = run._read if isinstance(run, ReadOnce) else {}
        self._names = run.names()

    def names(self) -> list[str]:
        return self._names

    def __getitem__(self, name: str, /) -> xr.Dataset:
        if name not in self._read:
            self._read[name] = self._run[name]
        return self._read[name]

    def failed(self, name: str) -> int | None:
        """How many measurements of a watch failed; None for a run that does not keep them."""
        failures = getattr(self._run, "failures", None)
        return None if failures is None else len(failures(name))


def same_weights(run: Any) -> list[list[int]]:
    """The steps that have one set of weights, where several do: in the order of the first of each group.

    Of two checkpoints of a training one is then not what its name says, or nothing was learned between them (a learning
    rate of 0). `run` is a trajectory or anything like it; rows without a digest tell nothing.
    """
    digests: dict[int, str] = {}
    for name in run.names():
        if hasattr(run, "weights"):
            digests |= run.weights(name)
        elif "weights" in (data := run[name]):
            digests |= dict(zip(data["step"].values.tolist(), data["weights"].values.tolist(), strict=True))
    groups: dict[str, list[int]] = {}
    for step in sorted(digests):
        groups.setdefault(digests[step], []).append(step)
    return [steps for steps in groups.values() if len(steps) > 1]


def has_rows(data: xr.Dataset) -> bool:
    """Whether anything of a watch was measured yet."""
    return data.sizes.get("step", 0) > 0
