"""The trajectory: the Zarr store of one run, appended by step and read as xarray.

    run.zarr/                 a Zarr v3 group; its attributes are the run's provenance
      llc/                    one leaf group a watch with its own `step`: `xr.open_zarr("run.zarr", group="llc")`
      _units/llc/….rows       rows committed since the last fold, one append-only file a writer (`devmon.units`)
      _attempts/0/llc/        rows that a resumption superseded, kept as an earlier attempt
      _swap/llc/old, new      a fold that is going on, or was killed
      .lock                   held by whoever writes; the system frees it when its holder dies

Every read joins the folded rows with the units; `fold()` moves the units into the groups. Any number of processes may
write and fold one trajectory; readers take no lock, and read again where a fold came in between. Needs no torch.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import xarray as xr
from zarr.errors import ZarrUserWarning

from devmon.errors import IdentityError, StoreError
from devmon.units import Units, cannot_write, commit, encode, exclusive, plain
from devmon.watch import NAME

SCHEMA = 1
VERSIONED = ("devmon", "torch", "lightning", "devinterp", "transformers", "zarr", "xarray", "numpy")
SPELLING = "use letters, digits, '_', '.' and '-', a letter or digit first"
T = TypeVar("T")


class Trajectory(Mapping[str, xr.Dataset]):
    """The measurements of one run: `trajectory["llc"]` is a dataset with a leading `step` dimension.

    `mode="a"` (the default) makes the store where there is none; `mode="r"` only reads. `seed` is the root seed of
    all measurements of the run (0 if not given) and `settings` the run's own configuration: both belong to its
    identity. Further keywords are kept as provenance.

    Raises `StoreError` where the path is no trajectory, is of a newer schema or cannot be written, `IdentityError`
    where `seed` or `settings` differ from the stored ones.
    """

    def __init__(self, path: str | os.PathLike[str], mode: Literal["a", "r"] = "a", *, seed: int | None = None,
                 settings: Mapping[str, Any] | None = None, **provenance: Any) -> None:  # fmt: skip
        self.path = Path(path)
        self._units: dict[str, Units] = {}
        self._held: dict[str, tuple[Any, dict[int, str]]] = {}
        self._layouts: dict[str, bytes] = {}  # checked to be of the stored form
        if not _is_file(self.path / "zarr.json"):
            self._create(mode, seed or 0, {**provenance, "settings": dict(settings or {})})
        attrs = self.attrs
        if "schema" not in attrs:
            raise StoreError(f"{self.path} is a Zarr group but no trajectory of devmon: give the path of a run's store")
        if not isinstance(attrs["schema"], int) or attrs["schema"] > SCHEMA:
            raise StoreError(
                f"{self.path} has schema {attrs['schema']}, this devmon reads up to {SCHEMA}: install devmon "
                f">= {(attrs.get('versions') or {}).get('devmon', 'the version that wrote it')}"
            )
        missing = [key for key in ("run_id", "seed", "created") if key not in attrs]
        if missing:
            raise StoreError(f"{self.path / 'zarr.json'} says no {' and no '.join(missing)}: restore it from a copy")
        differ = [] if seed in (None, attrs["seed"]) else [f"seed: stored {attrs['seed']}, now {seed}"]
        if settings is not None:
            differ += _differences(attrs.get("settings", {}), plain(dict(settings)))
        if differ:
            raise IdentityError(
                f"{self.path} holds a run of another configuration ({'; '.join(differ)}): use the same one, or give "
                "this run another path"
            )
        self.seed: int = attrs["seed"]
        if mode == "a":
            self._recover()

    def __getstate__(self) -> dict[str, Any]:  # to another process: the path, not what this one has read
        return {"path": self.path, "seed": self.seed, "_units": {}, "_held": {}, "_layouts": {}}

    # -- provenance --------------------------------------------------------------------------------------------------

    @property
    def attrs(self) -> dict[str, Any]:
        """The run's provenance: run_id, seed, created, schema, versions, platform and what the run added."""
        return _node(self.path)["attributes"]

    def record(self, **provenance: Any) -> None:
        """Add to the run's provenance (JSON-able values)."""
        with self._alone():
            _write_node(self.path, self.attrs | plain(provenance))

    # -- reading -----------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The watches, in alphabetical order."""
        try:
            found = {p.name for p in self.path.iterdir() if NAME.fullmatch(p.name) and _is_file(p / "zarr.json")}
            return sorted(found | {p.parent.name for p in self.path.glob("_swap/*/old") if _is_file(p / "zarr.json")})
        except OSError as error:
            raise StoreError(f"cannot list {self.path} ({error.strerror}): give permission to read it") from error

    def __getitem__(self, name: str) -> xr.Dataset:
        if name not in self.names():
            raise KeyError(f"{self.path} holds no watch {name!r}; it holds {', '.join(self.names()) or 'none'}")
        rows = self._of(name).read()  # before the folded rows: a fold in between loses none
        folded, attrs = self._steady(name, lambda: (self._folded(name), self._about(name)))
        if folded is not None:
            held = folded["step"].values
            news = [~np.isin(dataset["step"].values, held) for dataset in rows]
            rows = [folded, *(dataset.isel(step=new) for dataset, new in zip(rows, news, strict=True) if new.any())]
        if not rows:
            return xr.Dataset(coords={"step": np.array([], dtype=np.int64)}, attrs=attrs)
        joined = rows[0] if len(rows) == 1 else xr.concat(
            rows, "step", data_vars="all", coords="minimal", compat="override", join="exact", combine_attrs="override"
        )  # fmt: skip
        if (np.diff(joined["step"].values) < 0).any():
            joined = joined.sortby("step")
        return joined.assign_attrs(rows[0].attrs | attrs)

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def steps(self, name: str) -> list[int]:
        """The steps that the watch holds, in order."""
        return sorted(self._of(name).steps() | self._weights(name).keys())

    def failures(self, name: str) -> dict[int, str]:
        """Steps at which the instrument failed, with the reason."""
        found = self._of(name).failures()
        stored = self._steady(name, lambda: self._about(name)).get("failures", {})
        held = self._of(name).steps()
        return {step: why for step, why in ({int(k): v for k, v in stored.items()} | found).items() if step not in held}

    def holds(self, name: str, step: int, *, weights: str | None = None) -> bool:
        """Whether the watch has a row at `step`; `IdentityError` where that row was measured on other weights."""
        stored = self._of(name).weights(step)
        stored = self._weights(name).get(step) if stored is None else stored
        if stored is None:
            return False
        if weights is not None and stored != weights:
            raise IdentityError(
                f"{self.path} holds {name!r} at step {step} for weights {stored}, these are {weights}: another run. "
                "Give this run its own path, or resume from its own checkpoint"
            )
        return True

    # -- writing -----------------------------------------------------------------------------------------------------

    def declare(self, name: str, identity: Mapping[str, Any]) -> None:
        """Say who measures under `name` (see `devmon.fingerprint.identity`), before the first row.

        Raises `IdentityError` with the fields that differ where the store holds another configuration.
        """
        if not _nameable(name):
            raise StoreError(f"{name!r} cannot name a watch: {SPELLING}")
        if name not in self.names():
            with self._alone():
                if name not in self.names():
                    _write_node(self.path / name, dict(identity))
                    return
        stored = self._steady(name, lambda: self._about(name))
        if stored.get("fingerprint") == identity["fingerprint"]:
            return
        differ = _differences(stored.get("fields", {}), identity["fields"])
        if stored.get("instrument") != identity["instrument"]:
            differ.insert(0, f"instrument: stored {stored.get('instrument')}, now {identity['instrument']}")
        raise IdentityError(
            f"{self.path} holds {name!r} of another configuration ({'; '.join(differ)}): use the stored one, or give "
            "the watch another name or the run another path"
        )

    def append(self, name: str, step: int, dataset: xr.Dataset, *, weights: str, seconds: float = float("nan")) -> None:
        """Commit one row. A step that is held already with the same weights is left as it is.

        Raises `IdentityError` where variables, dimensions, labels or dtypes differ from the rows before.
        """
        if "step" in dataset.variables or "step" in dataset.dims:
            raise StoreError(f"{name!r} returned a dataset with its own 'step': the trajectory adds that dimension")
        layout, payload = encode(dataset)
        with self._alone():
            if self.holds(name, step, weights=weights):
                return
            if self._layouts.get(name) != layout:
                self._same_form(name, step, dataset)
                self._layouts[name] = layout
            self._of(name).append(step, layout, payload, weights=weights, seconds=seconds)

    def fail(self, name: str, step: int, reason: str) -> None:
        """Record that the instrument failed at `step`; a row at that step, held or to come, replaces the record."""
        with self._alone():
            self._of(name).refresh()
            self._about(name)
            self._of(name).append(step, failure=reason)

    def fold(self) -> None:
        """Move all units into the watches' Zarr groups, which plain xarray reads. Safe to be killed at any instant."""
        with self._alone():
            self._fold()

    def supersede(self, after: int) -> int:
        """Move the rows past step `after` aside, as an earlier attempt (training goes on from `after`).

        Returns how many rows were moved.
        """
        with self._alone():
            late = {name: [s for s in self.steps(name) if s > after] for name in self.names()}
            late = {name: steps for name, steps in late.items() if steps}
            if not late:
                return 0
            self._fold()
            attempts = [int(path.name) for path in self.path.glob("_attempts/*") if path.name.isdecimal()]
            attempt = str(max(attempts, default=-1) + 1)  # never one that a killed call began
            for name, steps in late.items():
                dataset = self[name]
                _write_group(self.path / "_attempts" / attempt / name, dataset.sel(step=steps))
                kept = {step: reason for step, reason in self.failures(name).items() if step <= after}
                self._replace(name, dataset.sel(step=dataset["step"] <= after), kept)
            entry = {"after": after, "rows": late, "at": _now(), "attempt": int(attempt)}
            _write_node(self.path, self.attrs | {"attempts": [*self.attrs.get("attempts", []), entry]})
        return sum(map(len, late.values()))

    # -- private -----------------------------------------------------------------------------------------------------

    def _create(self, mode: str, seed: int, provenance: Mapping[str, Any]) -> None:
        if mode == "r":
            raise StoreError(
                f"there is no trajectory at {self.path}: give the path of a run's store (…/trajectory.zarr)"
            )
        attrs = {
            "schema": SCHEMA,
            "run_id": uuid.uuid4().hex[:12],
            "seed": seed,
            "created": _now(),
            "versions": _versions(),
            "platform": platform.platform(),
            **plain(dict(provenance)),
        }
        try:
            if self.path.exists() and not self.path.is_dir():
                raise StoreError(f"{self.path} exists and is no trajectory: give a new or empty path")
            self.path.mkdir(parents=True, exist_ok=True)
            begun = (".lock", ".zarr.json.")  # by another process, at this moment
            foreign = [path for path in self.path.iterdir() if not path.name.startswith(begun)]
            if foreign and not _is_file(self.path / "zarr.json"):
                raise StoreError(f"{self.path} exists and is no trajectory: give a new or empty path")
        except OSError as error:
            raise StoreError(
                f"cannot make {self.path} ({error.strerror or error}): give a path in a folder that can be written"
            ) from error
        with self._alone():
            if not _is_file(self.path / "zarr.json"):  # else another process has made it meanwhile
                _write_node(self.path, attrs)

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        return exclusive(self.path / ".lock")

    def _of(self, name: str) -> Units:
        if name not in self._units:
            if not _nameable(name):
                raise StoreError(f"{name!r} cannot name a watch: {SPELLING}")
            self._units[name] = Units(self.path / "_units" / name)
        return self._units[name]

    def _group(self, name: str) -> Path:
        """The watch's group; between the two renames of a swap, the old one."""
        group, old = self.path / name, self.path / "_swap" / name / "old"
        return old if not _is_file(group / "zarr.json") and _is_file(old / "zarr.json") else group

    def _about(self, name: str) -> dict[str, Any]:
        group = self._group(name)
        if _version(group) is None and name not in self.names():
            raise StoreError(f"{self.path} holds no watch {name!r}: declare it first")
        attrs = _node(group)["attributes"]
        if "instrument" not in attrs:
            raise StoreError(
                f"{self.path / name} says no instrument, so devmon did not write it: move it out of the run"
            )
        return attrs

    def _steady(self, name: str, read: Callable[[], T]) -> T:
        """What `read` returns, read again where the group was replaced meanwhile."""
        for attempt in range(200):
            before = _version(self._group(name))
            try:
                found = read()
            except StoreError:
                if attempt > 1 and before is not None and before == _version(self._group(name)):
                    raise
                if attempt > 20 and before is None:
                    raise
            else:
                if before == _version(self._group(name)):
                    return found
            time.sleep(0.01)
        raise StoreError(f"{self.path / name} changes all the time: stop the other processes that fold this trajectory")

    def _weights(self, name: str) -> dict[int, str]:
        """The folded steps and their weights."""
        version = _version(self._group(name))
        if name not in self._held or version is None or self._held[name][0] != version:
            folded = self._steady(name, lambda: self._folded(name, ["step", "weights"]))
            pairs = (
                []
                if folded is None
                else zip(folded["step"].values.tolist(), folded["weights"].values.tolist(), strict=True)
            )
            self._held[name] = (version, dict(pairs))
        return self._held[name][1]

    def _folded(self, name: str, only: list[str] | None = None) -> xr.Dataset | None:
        group = self._group(name)
        try:
            if not (group / "step").is_dir():
                return None
            _node(group)
            with warnings.catch_warnings():  # of files that a fold is deleting: `_steady` reads again
                warnings.simplefilter("ignore", ZarrUserWarning)
                with xr.open_dataset(group, engine="zarr", consolidated=False, chunks=None) as dataset:
                    lost = [key for key in ("step", "weights") if key not in dataset.coords]
                    if lost:
                        raise KeyError(f"it holds no {' and no '.join(lost)}")
                    return (dataset if only is None else dataset[only]).load()
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise StoreError(f"{self.path / name} cannot be read ({error}): restore it from a copy") from error

    def _same_form(self, name: str, step: int, dataset: xr.Dataset) -> None:
        attrs, shape = self._about(name), _shape(dataset)
        stored = attrs.get("shape")
        if stored is None:
            _write_node(self.path / name, attrs | {"shape": shape})
        elif stored != shape:
            differ = "; ".join(_differences(stored, shape))
            raise IdentityError(f"{name!r} at step {step} differs in form from its rows before ({differ})")

    def _fold(self) -> None:
        for name in self.names():
            paths = self._of(name).paths()
            if paths:
                self._replace(name, self[name], self.failures(name))
                for path in paths:
                    path.unlink(missing_ok=True)
            _remove_empty(self.path / "_units" / name)
        _remove_empty(self.path / "_units")

    def _replace(self, name: str, dataset: xr.Dataset, failures: Mapping[int, str]) -> None:
        """Put `dataset` in the place of the watch's group: written aside, then swapped (`_recover` ends a half swap)."""
        held = set(dataset["step"].values.tolist())
        kept = {str(step): reason for step, reason in failures.items() if step not in held}
        swap = self.path / "_swap" / name
        new, old = swap / "new", swap / "old"
        try:
            shutil.rmtree(new, ignore_errors=True)
            if dataset.sizes["step"]:
                _write_group(new, dataset.assign_attrs(failures=kept))
            else:
                _write_node(new, dataset.attrs | {"failures": kept})
            os.rename(self.path / name, old)
            os.rename(new, self.path / name)
            shutil.rmtree(old)
        except OSError as error:
            raise StoreError(cannot_write(self.path / name, error)) from error
        _remove_empty(swap)
        _remove_empty(swap.parent)

    def _recover(self) -> None:
        """End the swaps that a kill left half done."""
        if not (self.path / "_swap").is_dir():
            return
        with self._alone():
            for old in self.path.glob("_swap/*/old"):
                target = self.path / old.parent.name
                if _is_file(target / "zarr.json"):
                    shutil.rmtree(old)
                else:
                    os.rename(old, target)
            shutil.rmtree(self.path / "_swap", ignore_errors=True)

    def __repr__(self) -> str:
        rows = ", ".join(f"{name}: {len(self.steps(name))} steps" for name in self.names())
        return f"Trajectory({str(self.path)!r}: {rows or 'empty'})"


def _shape(dataset: xr.Dataset) -> dict[str, str]:
    """The form of a row, as text: dimensions with sizes, dtype kind and size, labels."""
    form = {}
    for key, variable in dataset.variables.items():
        dtype = "text" if variable.dtype.kind in "OUST" else str(variable.dtype)
        dims = " ".join(f"{dim}={size}" for dim, size in variable.sizes.items())
        labels = f" {variable.values.tolist()}" if key in dataset.coords and variable.size <= 64 else ""
        form[str(key)] = f"{dtype} ({dims}){labels}"
    return form


def _differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = [*stored, *(key for key in now if key not in stored)]
    return [f"{k}: stored {stored.get(k)}, now {now.get(k)}" for k in keys if stored.get(k) != now.get(k)]


def _write_group(path: Path, dataset: xr.Dataset) -> None:
    dataset = dataset.assign_attrs(plain(dataset.attrs))
    chunks = {
        key: {"chunks": tuple(max(1, s) for s in variable.shape)} for key, variable in dataset.variables.items()
        if variable.ndim and variable.nbytes < 2**25 and variable.dtype.kind not in "OUST"
    }  # fmt: skip
    dataset.to_zarr(path, mode="w", zarr_format=3, consolidated=False, encoding=chunks)
    with ThreadPoolExecutor(16) as pool:  # on the disk before the units go; together, since each one waits
        list(pool.map(_flush, [file for file in path.rglob("*") if file.is_file()]))


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise StoreError(f"cannot read {path} ({error.strerror}): give permission to read it") from error


def _nameable(name: str) -> bool:
    return NAME.fullmatch(name) is not None and name != "zarr.json"


def _version(group: Path) -> tuple[int, int, int] | None:
    """What changes whenever the group or its attributes are replaced."""
    try:
        found = os.stat(group / "zarr.json")
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _node(folder: Path) -> dict[str, Any]:
    path = folder / "zarr.json"
    try:
        node = json.loads(path.read_text())
        if node["zarr_format"] != 3 or node["node_type"] != "group":
            raise ValueError("it is no Zarr v3 group")
        if not isinstance(node.setdefault("attributes", {}), dict):
            raise ValueError("its attributes are no mapping")
        return node
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read ({error}): give the path of a trajectory, or restore it") from error


def _write_node(folder: Path, attrs: Mapping[str, Any]) -> None:
    node = {"zarr_format": 3, "node_type": "group", "attributes": plain(dict(attrs))}
    commit(folder / "zarr.json", json.dumps(node, indent=1).encode())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
