"""A trajectory in a folder: what `devmon.store.trajectory` asks of a place (`devmon.store.objects` is the other).

Groups are replaced by two renames; whoever writes holds the lock, and readers read again where `version` changed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xarray as xr

from devmon.errors import StoreError
from devmon.files import cannot_write, commit, exclusive, is_file, reason, remove_empty
from devmon.store import groups
from devmon.store.units import FileUnits, Units
from devmon.watch import NAME

Change = Callable[[dict[str, Any]], dict[str, Any]]


class Disk:
    """The folder `path`."""

    locks = True  # one writer at a time: what is read within `alone` holds until its end

    def __init__(self, path: Path) -> None:
        self.path = path

    def made(self) -> bool:
        return is_file(self.path / "zarr.json")

    def begin(self) -> None:
        """Make the folder; refuse one that holds other things."""
        try:
            if self.path.exists() and not self.path.is_dir():
                raise StoreError(f"{self.path} exists and is no trajectory: give a new or empty path")
            self.path.mkdir(parents=True, exist_ok=True)
            begun = (".lock", ".zarr.json.")  # by another process, at this moment
            foreign = [path for path in self.path.iterdir() if not path.name.startswith(begun)]
            if foreign and not self.made():
                raise StoreError(f"{self.path} exists and is no trajectory: give a new or empty path")
        except OSError as error:
            raise StoreError(
                f"cannot make {self.path} ({reason(error)}): give a path in a folder that can be written"
            ) from error

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock."""
        return exclusive(self.path / ".lock")

    def attributes(self, name: str = "") -> dict[str, Any]:
        """Those of a watch's group, or of the run."""
        path = self._group(name) / "zarr.json"
        return groups.attributes(path, path.read_text)

    def update(self, change: Change, name: str = "") -> dict[str, Any]:
        """Change the attributes of a watch's group or of the run, {} where there is none; to be called within `alone`."""
        path = self.path / name / "zarr.json"
        old = self.attributes(name) if is_file(path) else {}
        new = change(old)
        if new != old:
            commit(path, groups.node(new))
        return new

    def names(self) -> list[str]:
        try:
            found = {p.name for p in self.path.iterdir() if NAME.fullmatch(p.name) and is_file(p / "zarr.json")}
            return sorted(found | {p.parent.name for p in self.path.glob("_swap/*/old") if is_file(p / "zarr.json")})
        except OSError as error:
            raise StoreError(f"cannot list {self.path} ({reason(error)}): give permission to read it") from error

    def version(self, name: str) -> tuple[int, ...] | None:
        """What changes whenever the group or its attributes are replaced."""
        try:
            found = os.stat(self._group(name) / "zarr.json")
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_mtime_ns

    def units(self, name: str) -> Units:
        return FileUnits(self.path / "_units" / name)

    def folded(self, name: str, only: list[str] | None = None) -> xr.Dataset | None:
        """The folded rows; None where there are none."""
        group = self._group(name)
        if self.version(name) is None or not self.attributes(name).get("folded", (group / "step").is_dir()):
            return None
        return groups.read(group, str(self.path / name), lambda key: os.path.isfile(group / key), only=only)

    def replace(self, name: str, rows: xr.Dataset, since: Any) -> bool:
        """Put `rows` in the place of the group: written aside, then swapped (`recover` ends a half swap)."""
        swap = self.path / "_swap" / name
        new, old = swap / "new", swap / "old"
        try:
            shutil.rmtree(new, ignore_errors=True)
            if rows.sizes["step"]:
                _write(new, rows)
            else:
                commit(new / "zarr.json", groups.node(rows.attrs))
            os.rename(self.path / name, old)
            os.rename(new, self.path / name)
            shutil.rmtree(old)
        except OSError as error:
            raise StoreError(cannot_write(self.path / name, error)) from error
        remove_empty(swap)
        remove_empty(swap.parent)
        return True

    def recover(self) -> None:
        """End the swaps that a kill left half done."""
        if not (self.path / "_swap").is_dir():
            return
        with self.alone():
            for old in self.path.glob("_swap/*/old"):
                target = self.path / old.parent.name
                if is_file(target / "zarr.json"):
                    shutil.rmtree(old)
                else:
                    os.rename(old, target)
            shutil.rmtree(self.path / "_swap", ignore_errors=True)

    def next_attempt(self) -> int:
        """A number that no attempt has, nor one that a killed call began."""
        found = [int(path.name) for path in self.path.glob("_attempts/*") if path.name.isdecimal()]
        return max(found, default=-1) + 1

    def set_aside(self, attempt: int, name: str, rows: xr.Dataset) -> None:
        _write(self.path / "_attempts" / str(attempt) / name, rows)

    def attempts(self) -> dict[str, xr.Dataset]:
        """The rows of earlier attempts, by group."""

        def read_one(name: str) -> xr.Dataset:
            group = self.path / name
            return groups.read(group, str(group), lambda key: os.path.isfile(group / key))

        names = sorted(
            path.parent.relative_to(self.path).as_posix() for path in self.path.glob("_attempts/*/*/zarr.json")
        )
        return groups.attempts(names, read_one, self.attributes())

    def _group(self, name: str) -> Path:
        """The watch's group; between the two renames of a swap, the old one."""
        group, old = self.path / name, self.path / "_swap" / name / "old"
        return old if name and not is_file(group / "zarr.json") and is_file(old / "zarr.json") else group


def _write(path: Path, rows: xr.Dataset) -> None:
    groups.write(path, rows)
    with ThreadPoolExecutor(16) as pool:  # on the disk before the units go; together, since each one waits
        list(pool.map(_flush, [file for file in path.rglob("*") if file.is_file()]))


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
