"""A run in a folder: a `devmon.store.place.Place`, where each method is described.

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
import zarr

from devmon.errors import StoreError
from devmon.files import aside, cannot_write, exclusive, is_file, reason, refuse_existing, remove_empty, write_whole
from devmon.store import groups
from devmon.store.groups import Change
from devmon.store.units import FileUnits, Units
from devmon.watch import NAME

FLUSHES = 16  # files flushed at once: each waits for the disk, and a group has one file a chunk


class Disk:
    """The folder `path`."""

    locks = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        return is_file(self.path / "zarr.json")

    def create(self) -> None:
        try:
            if self.path.exists() and not self.path.is_dir():
                raise StoreError(f"{self.path} exists and is no trajectory: give a new or empty path")
            self.path.mkdir(parents=True, exist_ok=True)
            fresh = (".lock", ".zarr.json.")  # of another process, which creates the run at this moment
            foreign = [path for path in self.path.iterdir() if not path.name.startswith(fresh)]
            if foreign and not self.exists():
                raise StoreError(f"{self.path} exists and is no trajectory: give a new or empty path")
        except OSError as error:
            raise StoreError(
                f"cannot make {self.path} ({reason(error)}): give a path in a folder that can be written"
            ) from error

    def locked(self) -> contextlib.AbstractContextManager[None]:
        return exclusive(self.path / ".lock")

    def attributes(self, name: str = "") -> dict[str, Any]:
        path = self._group(name) / "zarr.json"
        return groups.attributes(path, path.read_text)

    def update(self, change: Change, name: str = "") -> dict[str, Any]:
        path = self.path / name / "zarr.json"
        old = self.attributes(name) if is_file(path) else {}
        new = change(old)
        if new != old:
            write_whole(path, groups.node(new))
        return new

    def names(self) -> list[str]:
        try:
            names = {p.name for p in self.path.iterdir() if NAME.fullmatch(p.name) and is_file(p / "zarr.json")}
            swapped = {p.parent.name for p in self.path.glob("_swap/*/old") if is_file(p / "zarr.json")}
            return sorted(names | swapped)
        except OSError as error:
            raise StoreError(f"cannot list {self.path} ({reason(error)}): give permission to read it") from error

    def version(self, name: str) -> tuple[int, ...] | None:
        try:
            file = os.stat(self._group(name) / "zarr.json")
        except OSError:
            return None
        return file.st_dev, file.st_ino, file.st_mtime_ns

    def units(self, name: str) -> Units:
        return FileUnits(self.path / "_units" / name)

    def folded(self, name: str, only: list[str] | None = None) -> xr.Dataset | None:
        group = self._group(name)
        if self.version(name) is None or not self.attributes(name).get("folded", (group / "step").is_dir()):
            return None
        return groups.read(group, str(self.path / name), lambda key: os.path.isfile(group / key), only=only)

    def replace(self, name: str, rows: xr.Dataset, since: Any) -> bool:
        """As `Place.replace`: written aside, then swapped by two renames (`recover` ends a half swap)."""
        swap = self.path / "_swap" / name
        new, old = swap / "new", swap / "old"
        try:
            shutil.rmtree(new, ignore_errors=True)
            if rows.sizes["step"]:
                _write(new, rows)
            else:
                write_whole(new / "zarr.json", groups.node(rows.attrs))
            os.rename(self.path / name, old)
            os.rename(new, self.path / name)
            shutil.rmtree(old)
        except OSError as error:
            raise StoreError(cannot_write(self.path / name, error)) from error
        remove_empty(swap)
        remove_empty(swap.parent)
        return True

    def remove(self, name: str) -> None:
        try:
            (self.path / name / "zarr.json").unlink()
        except OSError as error:
            raise StoreError(cannot_write(self.path / name, error)) from error
        remove_empty(self.path / name)

    def recover(self) -> None:
        if not (self.path / "_swap").is_dir():
            return
        with self.locked():
            for old in self.path.glob("_swap/*/old"):
                target = self.path / old.parent.name
                if is_file(target / "zarr.json"):
                    shutil.rmtree(old)
                else:
                    os.rename(old, target)
            shutil.rmtree(self.path / "_swap", ignore_errors=True)

    def next_attempt(self) -> int:
        numbers = [int(path.name) for path in self.path.glob("_attempts/*") if path.name.isdecimal()]
        return max(numbers, default=-1) + 1

    def set_aside(self, attempt: int, name: str, rows: xr.Dataset) -> None:
        _write(self.path / "_attempts" / str(attempt) / name, rows)

    def attempts(self) -> dict[str, xr.Dataset]:
        def read_one(name: str) -> xr.Dataset:
            group = self.path / name
            return groups.read(group, str(group), lambda key: os.path.isfile(group / key))

        names = sorted(
            path.parent.relative_to(self.path).as_posix() for path in self.path.glob("_attempts/*/*/zarr.json")
        )
        return groups.attempts(names, read_one, self.attributes())

    def write_copy(self, write: Callable[[Any], object], attrs: dict[str, Any]) -> None:
        refuse_existing(self.path)
        with aside(self.path) as folder:
            zarr.create_group(folder, zarr_format=3, attributes=attrs)
            write(folder)

    def _group(self, name: str) -> Path:
        """The watch's group; between the two renames of a swap, the old one."""
        group, old = self.path / name, self.path / "_swap" / name / "old"
        return old if name and not is_file(group / "zarr.json") and is_file(old / "zarr.json") else group


def _write(path: Path, rows: xr.Dataset) -> None:
    groups.write(path, rows)
    with ThreadPoolExecutor(FLUSHES) as pool:  # on the disk before the units go
        list(pool.map(_flush, [file for file in path.rglob("*") if file.is_file()]))


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
