"""The trajectory: the Zarr store of one run, appended by step and read as xarray.

    run.zarr/                 a Zarr v3 group; its attributes are the run's provenance
      llc/                    one leaf group a watch with its own `step`: `xr.open_zarr("run.zarr", group="llc")`
      _units/llc/….rows       rows committed since the last fold, one append-only file a writer (`devmon.store.units`)
      _attempts/0/llc/        rows that a resumption superseded, kept as an earlier attempt
      _swap/llc/old, new      a fold that is going on, or was killed
      .lock                   held by whoever writes; the system frees it when its holder dies

Every read joins the folded rows with the units; `fold()` moves the units into the groups. Any number of processes may
write and fold one trajectory; readers take no lock, and read again where a fold came in between. Here is what rows, watches
and attempts mean; `devmon.store.disk` and `devmon.store.objects` know how they lie in a folder or an object store. Needs no torch.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import xarray as xr

from devmon.errors import IdentityError, StoreError
from devmon.store.disk import Disk
from devmon.store.migrations import SCHEMA, migrate
from devmon.store.rows import encode, plain
from devmon.store.units import Units
from devmon.watch import NAME

if TYPE_CHECKING:
    from devmon.store.objects import Objects

VERSIONED = ("devmon", "torch", "lightning", "devinterp", "transformers", "zarr", "xarray", "numpy")
SPELLING = "use letters, digits, '_', '.' and '-', a letter or digit first"
PRIVATE = ("folded", "fold", "fold_number")  # attributes of a group that say how its rows lie
T = TypeVar("T")


class Trajectory(Mapping[str, xr.Dataset]):
    """The measurements of one run: `trajectory["llc"]` is a dataset with a leading `step` dimension.

    `path` is a folder; or an object store (`pip install "devmon[cloud]"`): a URL (`s3://bucket/run.zarr`, `gs://…`,
    `az://…`, `memory://name` for this process), or a store of obstore, alone or in `zarr.storage.ObjectStore`.

    `mode="a"` (the default) makes the store where there is none; `mode="r"` only reads. `seed` is the root seed of
    all measurements of the run (0 if not given) and `settings` the run's own configuration: both belong to its
    identity. Further keywords are kept as provenance.

    A store of an earlier schema is converted when it is opened with `mode="a"`. Raises `StoreError` where the path is no
    trajectory, is of a newer schema or cannot be written, `IdentityError` where `seed` or `settings` differ from the
    stored ones.
    """

    def __init__(self, path: str | os.PathLike[str] | Any, mode: Literal["a", "r"] = "a", *, seed: int | None = None,
                 settings: Mapping[str, Any] | None = None, **provenance: Any) -> None:  # fmt: skip
        self._place = place(path)
        self.path = self._place.path
        self._units: dict[str, Units] = {}
        self._held: dict[str, tuple[Any, dict[int, str]]] = {}
        self._layouts: dict[str, bytes] = {}  # checked to be of the stored form
        if not self._place.made():
            self._create(mode, seed or 0, {**provenance, "settings": dict(settings or {})})
        attrs = self.attrs
        if "schema" not in attrs:
            raise StoreError(f"{self.path} is a Zarr group but no trajectory of devmon: give the path of a run's store")
        if not isinstance(attrs["schema"], int) or not 1 <= attrs["schema"] <= SCHEMA:
            raise StoreError(
                f"{self.path} has schema {attrs['schema']}, this devmon reads 1 to {SCHEMA}: install devmon >= "
                f"{_written_by(attrs)}"
            )
        missing = [key for key in ("run_id", "seed", "created") if key not in attrs]
        if missing:
            raise StoreError(f"{self.path}/zarr.json says no {' and no '.join(missing)}: restore it from a copy")
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
            self._place.recover()
            if attrs["schema"] < SCHEMA:
                migrate(self)

    def __getstate__(self) -> dict[str, Any]:  # to another process: the place, not what this one has read
        fresh: dict[str, Any] = {"_units": {}, "_held": {}, "_layouts": {}}
        return {"path": self.path, "seed": self.seed, "_place": self._place, **fresh}

    # -- provenance --------------------------------------------------------------------------------------------------

    @property
    def attrs(self) -> dict[str, Any]:
        """The run's provenance: run_id, seed, created, schema, versions, platform and what the run added."""
        return self._place.attributes()

    def record(self, **provenance: Any) -> None:
        """Add to the run's provenance (JSON-able values)."""
        with self._place.alone():
            self._place.update(lambda attrs: attrs | plain(provenance))

    # -- reading -----------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The watches, in alphabetical order."""
        return self._place.names()

    def _repr_html_(self) -> str:
        from devmon.analysis.reports.notebook import trajectory_html

        return trajectory_html(self)

    def __getitem__(self, name: str) -> xr.Dataset:
        if name not in self.names():
            raise KeyError(f"{self.path} holds no watch {name!r}; it holds {', '.join(self.names()) or 'none'}")
        rows = self._of(name).read()  # before the folded rows: a fold in between loses none
        folded, attrs = self._steady(name, lambda: (self._place.folded(name), self._about(name)))
        attrs = {key: value for key, value in attrs.items() if key not in PRIVATE}
        if folded is not None:
            folded.attrs = attrs
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
        """Say who measures under `name` (see `devmon.monitoring.loop.fingerprint.identity`), before the first row.

        Raises `IdentityError` with the fields that differ where the store holds another configuration.
        """
        if not _nameable(name):
            raise StoreError(f"{name!r} cannot name a watch: {SPELLING}")
        if name not in self.names():
            with self._place.alone():
                self._place.update(lambda attrs: attrs or dict(identity), name)
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
        with self._place.alone():
            if self.holds(name, step, weights=weights):
                return
            if self._layouts.get(name) != layout:
                self._same_form(name, step, dataset)
                self._layouts[name] = layout
            self._of(name).append(step, layout, payload, weights=weights, seconds=seconds)
            if not self._place.locks:
                self._confirm(name, step, weights)

    def fail(self, name: str, step: int, reason: str) -> None:
        """Record that the instrument failed at `step`; a row at that step, held or to come, replaces the record."""
        with self._place.alone():
            self._of(name).refresh()
            self._about(name)
            self._of(name).append(step, failure=reason)

    def fold(self) -> None:
        """Move all units into the watches' Zarr groups, which plain xarray reads. Safe to be killed at any instant."""
        with self._place.alone():
            self._fold()

    def supersede(self, after: int) -> int:
        """Move the rows past step `after` aside, as an earlier attempt (training goes on from `after`).

        Returns how many rows were moved.
        """
        with self._place.alone():
            if not any(step > after for name in self.names() for step in self.steps(name)):
                return 0
            self._fold()  # so that no unit of a row that is moved stays
            attempt, moved = self._place.next_attempt(), {}

            def cut(name: str, rows: xr.Dataset) -> xr.Dataset:
                late = rows["step"].values > after
                if late.any():
                    self._place.set_aside(attempt, name, rows.isel(step=late))
                    moved[name] = rows["step"].values[late].tolist()
                return rows.isel(step=~late)

            for name in self.names():
                if any(step > after for step in self.steps(name)):
                    failures = {step: why for step, why in self.failures(name).items() if step <= after}
                    self._replace(name, cut, failures)
            entry = {"after": after, "rows": moved, "at": _now(), "attempt": attempt}
            self._place.update(lambda attrs: attrs | {"attempts": [*attrs.get("attempts", []), entry]})
        return sum(map(len, moved.values()))

    def attempts(self) -> dict[str, xr.Dataset]:
        """The rows that resumptions superseded, by group: `_attempts/0/llc`, …"""
        return self._place.attempts()

    # -- private -----------------------------------------------------------------------------------------------------

    def _create(self, mode: str, seed: int, provenance: Mapping[str, Any]) -> None:
        if mode == "r":
            raise StoreError(
                f"there is no trajectory at {self.path}: give the path of a run's store (…/trajectory.zarr)"
            )
        new = {
            "schema": SCHEMA,
            "run_id": uuid.uuid4().hex[:12],
            "seed": seed,
            "created": _now(),
            "versions": _versions(),
            "platform": platform.platform(),
            **plain(dict(provenance)),
        }
        self._place.begin()
        with self._place.alone():
            self._place.update(lambda attrs: attrs or new)  # another process may have made it meanwhile

    def _of(self, name: str) -> Units:
        if name not in self._units:
            if not _nameable(name):
                raise StoreError(f"{name!r} cannot name a watch: {SPELLING}")
            self._units[name] = self._place.units(name)
        return self._units[name]

    def _about(self, name: str) -> dict[str, Any]:
        if self._place.version(name) is None and name not in self.names():
            raise StoreError(f"{self.path} holds no watch {name!r}: declare it first")
        attrs = self._place.attributes(name)
        if "instrument" not in attrs:
            raise StoreError(
                f"{self.path}/{name} says no instrument, so devmon did not write it: move it out of the run"
            )
        return attrs

    def _steady(self, name: str, read: Callable[[], T]) -> T:
        """What `read` returns, read again where the group was replaced meanwhile."""
        for attempt in range(200):
            before = self._place.version(name)
            try:
                found = read()
            except StoreError:
                if attempt > 1 and before is not None and before == self._place.version(name):
                    raise
                if attempt > 20 and before is None:
                    raise
            else:
                if before == self._place.version(name):
                    return found
            time.sleep(0.01)
        raise StoreError(f"{self.path}/{name} changes all the time: stop the other processes that fold this trajectory")

    def _weights(self, name: str) -> dict[int, str]:
        """The folded steps and their weights."""
        version = self._place.version(name)
        if name not in self._held or version is None or self._held[name][0] != version:
            folded = self._steady(name, lambda: self._place.folded(name, ["step", "weights"]))
            pairs = (
                []
                if folded is None
                else zip(folded["step"].values.tolist(), folded["weights"].values.tolist(), strict=True)
            )
            self._held[name] = (version, dict(pairs))
        return self._held[name][1]

    def _same_form(self, name: str, step: int, dataset: xr.Dataset) -> None:
        shape = _shape(dataset)
        stored = self._about(name).get("shape")
        if stored is None:
            stored = self._place.update(lambda attrs: {"shape": shape} | attrs, name)["shape"]
        if stored != shape:
            differ = "; ".join(_differences(stored, shape))
            raise IdentityError(f"{name!r} at step {step} differs in form from its rows before ({differ})")

    def _confirm(self, name: str, step: int, weights: str) -> None:
        """Where writers hold no lock: another may have written this row, or folded it, since we looked."""
        units, folded = self._of(name), self._weights(name).get(step)
        if folded not in (None, weights):
            units.discard(step)
        self.holds(name, step, weights=weights)

    def _fold(self, every: bool = False) -> None:
        """Fold the watches that have units, or `every` one."""
        for name in self.names():
            if self._of(name).paths() or (every and self.steps(name)):
                self._replace(name, lambda _, rows: rows)
            self._of(name).remove([])

    def _replace(self, name: str, change: Callable[[str, xr.Dataset], xr.Dataset],
                 failures: Mapping[int, str] | None = None) -> None:  # fmt: skip
        """Put what `change` makes of the watch's rows, folded and not, in the place of its group and units."""
        for _ in range(100):
            since, paths = self._place.version(name), self._of(name).paths()
            rows, known = change(name, self[name]), self.failures(name) if failures is None else failures
            held = set(rows["step"].values.tolist())
            kept = {str(step): why for step, why in known.items() if step not in held}
            if self._place.replace(name, rows.assign_attrs(failures=kept), since):
                return self._of(name).remove(paths)
        raise StoreError(f"{self.path}/{name} changes all the time: stop the other processes that fold this trajectory")

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


def place(path: Any) -> Disk | Objects:
    """The folder, or the object store, that `path` names."""
    if isinstance(path, os.PathLike) or (isinstance(path, str) and "://" not in path):
        return Disk(Path(path))
    from devmon.store.objects import Objects  # needs obstore

    return Objects.at(path)


def _nameable(name: str) -> bool:
    return NAME.fullmatch(name) is not None and name != "zarr.json"


def _written_by(attrs: Mapping[str, Any]) -> str:
    """The devmon that wrote the schema of this run, as far as it says."""
    by = [entry.get("devmon") for entry in attrs.get("migrated") or [] if isinstance(entry, dict)]
    return str([(attrs.get("versions") or {}).get("devmon", "the version that wrote it"), *by][-1])


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
