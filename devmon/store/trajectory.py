"""The trajectory: the Zarr store of one run, appended by step and read as xarray.

    run.zarr/                 a Zarr v3 group; its attributes are the run's provenance
      llc/                    one leaf group a watch with its own `step`: `xr.open_zarr("run.zarr", group="llc")`
      _units/llc/….rows       rows committed since the last fold, one append-only file a writer (`devmon.store.units`)
      _attempts/0/llc/        rows that a resumption superseded, kept as an earlier attempt
      _swap/llc/old, new      a fold that is going on, or was killed
      .lock                   held by whoever writes; the system frees it when its holder dies

Every read joins the folded rows with the units; `fold()` moves the units into the groups. Any number of processes may
write and fold one trajectory; readers take no lock, and read again where a fold came in between. `StoredWatch` is one
watch of it; `devmon.store.place` says what both ask of a folder or an object store. Needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import xarray as xr

from devmon.errors import StoreError
from devmon.store.migrations import SCHEMA, migrate
from devmon.store.place import place
from devmon.store.provenance import new_run, now, refuse_another
from devmon.store.rows import plain
from devmon.store.stored import StoredWatch

# Attributes of a run that a monitor keeps by watch: what was chosen for it, left out, added or measured late.
OF_WATCHES = ("chosen", "choosing", "skipped", "densified", "meant")


class Trajectory(Mapping[str, xr.Dataset]):
    """The measurements of one run: `trajectory["llc"]` is a dataset with a leading `step` dimension.

    `path` is a folder; or an object store (`pip install "devmon[cloud]"`): a URL (`s3://bucket/run.zarr`, `gs://…`,
    `az://…`, `memory://name` for this process), or a store of obstore, alone or in `zarr.storage.ObjectStore`.

    `mode="a"` (the default) makes the store where there is none; `mode="r"` only reads. `seed` is the root seed of
    all measurements of the run (0 if not given) and `settings` the run's own configuration: both belong to its
    identity. Further keywords are kept as provenance.

    A store of an earlier schema is converted when it is opened with `mode="a"`. Raises `StoreError` where the path is
    no trajectory, is of a newer schema or cannot be written, `IdentityError` where `seed` or `settings` differ from the
    stored ones.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Any,
        mode: Literal["a", "r"] = "a",
        *,
        seed: int | None = None,
        settings: Mapping[str, Any] | None = None,
        **provenance: Any,
    ) -> None:
        self._place = place(path)
        self.path: Any = self._place.path  # a Path, or how an object store is named
        self._watches: dict[str, StoredWatch] = {}
        if not self._place.exists():
            if mode == "r":
                raise StoreError(
                    f"there is no trajectory at {self.path}: give the path of a run's store (…/trajectory.zarr)"
                )
            self._create(new_run(seed or 0, settings or {}, provenance))
        attrs = self.attrs
        refuse_another(self.path, attrs, seed, settings)
        self.seed: int = attrs["seed"]
        if mode == "a":
            self._place.recover()
            if attrs["schema"] < SCHEMA:
                migrate(self._place)

    def __getstate__(self) -> dict[str, Any]:  # to another process: the place, not what this one has read
        return {"path": self.path, "seed": self.seed, "_place": self._place, "_watches": {}}

    # -- provenance --------------------------------------------------------------------------------------------------

    @property
    def attrs(self) -> dict[str, Any]:
        """The run's provenance: run_id, seed, created, schema, versions, platform and what the run added."""
        return self._place.attributes()

    def record(self, **provenance: Any) -> None:
        """Add to the run's provenance (JSON-able values)."""
        with self._place.locked():
            self._place.update(lambda attrs: attrs | plain(provenance))

    def note(self, key: str, name: str, value: Any) -> None:
        """Put one entry into a mapping of the run's provenance, whatever other processes put there meanwhile."""
        with self._place.locked():
            self._place.update(lambda attrs: attrs | {key: attrs.get(key, {}) | {name: plain(value)}})

    # -- reading -----------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The watches, in alphabetical order."""
        return self._place.names()

    def __getitem__(self, name: str) -> xr.Dataset:
        if name not in self.names():
            raise KeyError(f"{self.path} holds no watch {name!r}; it holds {', '.join(self.names()) or 'none'}")
        return self._watch(name).read()

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def steps(self, name: str) -> list[int]:
        """The steps that the watch holds, in order."""
        return self._watch(name).steps()

    def weights(self, name: str) -> dict[int, str]:
        """Step to the digest of the weights that the row was measured on (`devmon.snapshot.weights_digest`)."""
        return self._watch(name).weights()

    def failures(self, name: str) -> dict[int, str]:
        """Steps at which the instrument failed, with the reason."""
        return self._watch(name).failures()

    def holds(self, name: str, step: int, *, weights: str | None = None) -> bool:
        """Whether the watch has a row at `step`; `IdentityError` where that row was measured on other weights."""
        return self._watch(name).holds(step, weights)

    def attempts(self) -> dict[str, xr.Dataset]:
        """The rows that resumptions superseded, by group: `_attempts/0/llc`, …"""
        return self._place.attempts()

    # -- writing -----------------------------------------------------------------------------------------------------

    def declare(self, name: str, identity: Mapping[str, Any]) -> None:
        """Say who measures under `name` (see `devmon.monitoring.fingerprint.identity`), before the first row.

        Raises `IdentityError` with the fields that differ where the store holds another configuration.
        """
        self._watch(name).declare(identity)

    def redeclare(self, name: str, identity: Mapping[str, Any]) -> None:
        """As `declare`, but a configuration under which nothing was measured, as one that was refused, gives way."""
        self._watch(name).redeclare(identity)

    def corrects(self, name: str, identity: Mapping[str, Any], layout: str | None) -> bool:
        """Whether rows of this declaration, of a model that is read by `layout` (text; None: not known yet), are of
        another layout than those that the watch holds: the first of them sets those aside (`correct`)."""
        return self._watch(name).corrects(identity, layout) is not None

    def correct(self, name: str, identity: Mapping[str, Any], layout: str) -> int:
        """Say by which layout the row to come is read. What the watch holds of another one is set aside as an earlier
        attempt, which names both layouts, and the watch begins anew; returns how many rows that were."""
        moved = 0
        with self._place.locked():
            # Looked at within the lock: of several processes that measure, the first sets aside, the others find it so.
            if (layouts := self._watch(name).corrects(identity, layout)) is not None:
                moved = self._set_aside(name, layouts=layouts)
                self._place.update(lambda _: dict(identity), name)
            self._watch(name).read_by(identity, layout)
        return moved

    def append(self, name: str, step: int, dataset: xr.Dataset, *, weights: str, seconds: float = float("nan")) -> None:
        """Commit one row. A step that is held already with the same weights is left as it is.

        Raises `IdentityError` where variables, dimensions, labels or dtypes differ from the rows before.
        """
        if "step" in dataset.variables or "step" in dataset.dims:
            raise StoreError(
                f"{name!r} returned a dataset with its own 'step', a dimension that the trajectory adds: rename it, or "
                "leave it out"
            )
        self._watch(name).append(step, dataset, weights, seconds)

    def fail(self, name: str, step: int, reason: str) -> None:
        """Record that the instrument failed at `step`; a row at that step, held or to come, replaces the record."""
        self._watch(name).fail(step, reason)

    def fold(self) -> None:
        """Move all units into the watches' Zarr groups, which plain xarray reads. Safe to be killed at any instant."""
        with self._place.locked():
            for name in self.names():
                self._watch(name).fold()

    def supersede(self, after: int) -> int:
        """Move the rows past step `after` aside, as an earlier attempt (training goes on from `after`).

        Returns how many rows were moved.
        """
        with self._place.locked():
            watches = [self._watch(name) for name in self.names()]
            if not any(step > after for watch in watches for step in watch.steps()):
                return 0
            for watch in watches:
                watch.fold()
            attempt = self._place.next_attempt()
            moved = {watch.name: watch.supersede(after, attempt) for watch in watches}
            # The attempt counts once it is noted: of one that is killed before, the rows are still in the run.
            entry = {
                "after": after,
                "rows": {name: steps for name, steps in moved.items() if steps},
                "at": now(),
                "attempt": attempt,
            }
            self._place.update(lambda attrs: attrs | {"attempts": [*attrs.get("attempts", []), entry]})
        return sum(map(len, moved.values()))

    def drop(self, name: str) -> int:
        """Take the watch out of the run, with what was noted of it: its rows are kept as an earlier attempt.

        Another instrument may then measure under its name. Returns how many rows were moved. Raises KeyError for a
        watch that the run does not hold. Safe to be killed at any instant: called again, it does the rest.
        """
        with self._place.locked():
            if name not in self.names():
                raise KeyError(f"{self.path} holds no watch {name!r}; it holds {', '.join(self.names()) or 'none'}")
            return self._set_aside(name)

    # -- private -----------------------------------------------------------------------------------------------------

    def _create(self, attrs: dict[str, Any]) -> None:
        self._place.create()
        with self._place.locked():
            self._place.update(lambda stored: stored or attrs)  # another process may have made it meanwhile

    def _set_aside(self, name: str, **why: Any) -> int:
        """The work of `drop`, within the lock; `why` is noted with the attempt."""
        watch = self._watch(name)
        watch.fold()
        attempt = self._place.next_attempt()
        moved = watch.supersede(-1, attempt)
        entry = {"after": None, "dropped": name, "rows": {name: moved}, "at": now(), "attempt": attempt} | why

        # Noted once the rows lie there, and before the empty watch goes: a kill between leaves no row unnamed.
        def noted(attrs: dict[str, Any]) -> dict[str, Any]:
            kept = {key: {k: v for k, v in attrs[key].items() if k != name} for key in OF_WATCHES if key in attrs}
            return attrs | kept | ({"attempts": [*attrs.get("attempts", []), entry]} if moved else {})

        self._place.update(noted)
        self._place.remove(name)
        self._watches.pop(name)
        return len(moved)

    def _watch(self, name: str) -> StoredWatch:
        if name not in self._watches:
            self._watches[name] = StoredWatch(self._place, name)
        return self._watches[name]

    def __repr__(self) -> str:
        rows = ", ".join(f"{name}: {len(self.steps(name))} steps" for name in self.names())
        return f"Trajectory({str(self.path)!r}: {rows or 'empty'})"

    def _repr_html_(self) -> str:
        from devmon.analysis.reports.notebook import trajectory_html

        return trajectory_html(self)
