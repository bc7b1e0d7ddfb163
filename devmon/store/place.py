"""Where a run lies: what is asked of a folder (`devmon.store.disk`) and of an object store (`devmon.store.objects`).

Both hold the run's attributes, and for each watch a group of folded rows with its attributes, the units that wait for
the next fold, and the earlier attempts. A watch is named by its name; "" is the run itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import xarray as xr

from devmon.store.disk import Disk
from devmon.store.groups import Change
from devmon.store.units import Units


class Place(Protocol):
    """A place for one run. Each method raises StoreError where the place cannot be read or written."""

    @property
    def path(self) -> Path | str:
        """The place, as it is named to the user."""

    @property
    def locks(self) -> bool:
        """Whether `locked` keeps other writers out; else what was read may be old at once."""

    def exists(self) -> bool:
        """Whether a run was created here."""

    def create(self) -> None:
        """Make room for a run; StoreError where the place holds other things."""

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """A block in which no other process writes, where the place has locks. It cannot be entered twice."""

    def attributes(self, name: str = "") -> dict[str, Any]:
        """The attributes of a watch's group or of the run."""

    def update(self, change: Change, name: str = "") -> dict[str, Any]:
        """Replace attributes by what `change` makes of them ({} where there are none), and return the new ones.

        To be called within `locked`. Where another writer was first, `change` is called again with what that one wrote.
        """

    def names(self) -> list[str]:
        """The watches, in alphabetical order."""

    def version(self, name: str) -> Any:
        """What differs whenever the group or its attributes were replaced; None where there is no group."""

    def units(self, name: str) -> Units:
        """The rows of a watch since its last fold."""

    def folded(self, name: str, only: list[str] | None = None) -> xr.Dataset | None:
        """The folded rows of a watch, or the variables `only` of them; None where none are folded."""

    def replace(self, name: str, rows: xr.Dataset, since: Any) -> bool:
        """Put `rows` with their attributes in the place of a watch's group: a kill leaves the old group or the new one.

        False where the group is not of version `since` any more, which cannot be where the place has locks.
        """

    def remove(self, name: str) -> None:
        """Take out a watch that has no rows, by one deletion."""

    def recover(self) -> None:
        """Finish what a kill left half done."""

    def next_attempt(self) -> int:
        """A number that no earlier attempt has, nor one that a killed process began."""

    def set_aside(self, attempt: int, name: str, rows: xr.Dataset) -> None:
        """Keep rows of a watch as those of an earlier attempt."""

    def attempts(self) -> dict[str, xr.Dataset]:
        """The rows of earlier attempts, by group: `_attempts/0/llc`, …"""

    def write_copy(self, write: Callable[[Any], object], attrs: dict[str, Any]) -> None:
        """Make a run with these attributes of the groups that `write` puts into the Zarr store it is given.

        StoreError where the place holds something. The run can be opened only when all of it is written.
        """


def place(path: Any) -> Place:
    """The folder, or the object store, that `path` names."""
    if isinstance(path, os.PathLike) or (isinstance(path, str) and "://" not in path):
        return Disk(Path(path))
    from devmon.store.objects import Objects  # needs obstore

    return Objects.at(path)


def store_path(run: str | os.PathLike[str]) -> str:
    """The store of a run that is named by its folder (the one with `trajectory.zarr`) or by its store."""
    inner = Path(run) / "trajectory.zarr"
    return str(inner if inner.is_dir() else run)
