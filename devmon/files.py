"""Files that are written whole or not at all, the lock of a run's writers, and what is said when neither can be."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from devmon.errors import StoreError

try:
    import fcntl
except ImportError:  # Windows: no lock, so one writer at a time
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A path beside `path`, for a file or folder that takes its place when the block ends: all of it or none.

    It is removed where the block raises. Raises StoreError where it cannot be written.
    """
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        os.replace(fresh, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(fresh) if fresh.is_dir() else fresh.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise StoreError(cannot_write(path, error)) from error
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path`: a kill or a power cut leaves the old file or the new one, which is then on the disk."""
    with aside(path) as fresh, open(fresh, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def refuse_existing(path: Path) -> None:
    """Raise StoreError where `path` is a folder or a link, which a new file or folder would take away."""
    if path.is_dir() or path.is_symlink():
        raise StoreError(f"{path} exists: give the name of a new file or folder")


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; waits for its holder, and the lock of a process that died is free."""
    try:
        file = open(path, "ab")  # noqa: SIM115
    except OSError as error:
        raise StoreError(cannot_write(path, error)) from error
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                raise StoreError(
                    f"cannot lock {path} ({reason(error)}): put the run on a file system with locks"
                ) from error
        yield


def is_file(path: Path) -> bool:
    """Whether `path` is a file; StoreError where that cannot be seen."""
    try:
        return path.is_file()
    except OSError as error:
        raise StoreError(f"cannot read {path} ({error.strerror}): give permission to read it") from error


def remove_empty(folder: Path) -> None:
    """Remove `folder` if nothing is in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def cannot_write(where: object, error: Exception) -> str:
    """What is said where the system refuses a write."""
    return (
        f"cannot write {where} ({reason(error)}): what is stored so far is intact; make room or give write permission, "
        "then run again"
    )


def reason(error: Exception) -> str:
    """The system's own words for an error."""
    return getattr(error, "strerror", None) or str(error)
