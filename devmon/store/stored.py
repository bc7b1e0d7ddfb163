"""One watch of a run: rows of one form, folded into a Zarr group or waiting in units for the next fold."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import xarray as xr

from devmon.errors import IdentityError, StoreError
from devmon.store.place import Place
from devmon.store.rows import encode
from devmon.store.same import another_layout, said_otherwise
from devmon.store.units import Units
from devmon.watch import NAME

SPELLING = "use letters, digits, '_', '.' and '-', a letter or digit first"
PRIVATE = ("folded", "fold", "fold_number")  # attributes of a group that say how its rows lie
LAYOUT = "model_layout"  # the attribute that says by which layout the model was read (`devmon.anatomy.Layout`)
CODE = "code"  # the attribute that tells functions that were moved, which is no part of the rows
LABELS_IN_FORM = 64  # longer coordinates are compared by size and dtype alone; changing it refuses what is stored
JOIN: dict[str, Any] = {  # of rows of one form: what has no `step` is the same in all, and sizes may not differ
    "data_vars": "all",
    "coords": "minimal",
    "compat": "override",
    "join": "exact",
    "combine_attrs": "override",
}
PAUSE = 0.01  # seconds between two looks at a group that another process is replacing
LOOKS = 200  # until a group that always changes is given up: two seconds, and a fold's two renames take microseconds
LOOKS_AT_DAMAGE = 2  # an error on a group that did not change meanwhile is damage, once it was seen so often
LOOKS_AT_NOTHING = 20  # and the same for a group that is gone: 0.2 seconds, longer than it is gone in a fold
OVERTAKEN = 100  # times that other folds may be first, in a place without locks
T = TypeVar("T")


class StoredWatch:
    """The watch `name` of the run at `place`. StoreError where `name` cannot name a watch.

    Reading joins the folded rows with the units and needs no lock.
    """

    def __init__(self, place: Place, name: str, units: Units | None = None) -> None:
        if NAME.fullmatch(name) is None or name == "zarr.json":
            raise StoreError(f"{name!r} cannot name a watch: {SPELLING}")
        self.place = place
        self.name = name
        self.units = place.units(name) if units is None else units
        self._folded: tuple[Any, dict[int, str]] = (None, {})  # a version of the group, its steps and their weights
        self._layout = b""  # of the last row that was seen to be of the stored form
        self._stored_form: dict[str, str] | None = None  # once there is a first row it stays

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self) -> xr.Dataset:
        """All rows by ascending `step`, with the attributes of the watch."""
        # The units come first: rows that a fold moves in between are then read twice, and never missed.
        rows = self.units.read()
        folded, attrs = self._retry_until_stable(lambda: (self.place.folded(self.name), self.attributes()))
        attrs = {key: value for key, value in attrs.items() if key not in (*PRIVATE, CODE)}
        if folded is not None:
            folded.attrs = attrs
            held = folded["step"].values
            news = [~np.isin(dataset["step"].values, held) for dataset in rows]
            rows = [folded, *(dataset.isel(step=new) for dataset, new in zip(rows, news, strict=True) if new.any())]
        if not rows:
            return xr.Dataset(coords={"step": np.array([], dtype=np.int64)}, attrs=attrs)
        # One dataset a layout, and a layout may differ in attributes alone: the first one's are taken.
        joined = rows[0]
        if len(rows) > 1:
            joined = xr.concat(rows, "step", **JOIN)
        if (np.diff(joined["step"].values) < 0).any():
            joined = joined.sortby("step")
        return joined.assign_attrs(rows[0].attrs | attrs)

    def attributes(self) -> dict[str, Any]:
        """Those of the watch's group; StoreError where it is not declared."""
        if self.place.version(self.name) is None and self.name not in self.place.names():
            raise StoreError(f"{self.place.path} holds no watch {self.name!r}: declare it first")
        attrs = self.place.attributes(self.name)
        if "instrument" not in attrs:
            raise StoreError(f"{self._path} says no instrument, so devmon did not write it: move it out of the run")
        return attrs

    def steps(self) -> list[int]:
        """The steps with a row, in order."""
        return sorted(self.units.steps() | self._folded_weights().keys())

    def weights(self) -> dict[int, str]:
        """The digest of the weights that each row was measured on."""
        waiting = {step: self.units.weights(step) for step in self.units.steps()}
        return self._folded_weights() | {step: digest for step, digest in waiting.items() if digest is not None}

    def failures(self) -> dict[int, str]:
        """Steps at which the instrument failed and that have no row, with the reason."""
        waiting = self.units.failures()
        folded = self._retry_until_stable(self.attributes).get("failures", {})
        held = self.units.steps()
        failures = {int(step): why for step, why in folded.items()} | waiting
        return {step: why for step, why in failures.items() if step not in held}

    def holds(self, step: int, weights: str | None = None) -> bool:
        """Whether there is a row at `step`; IdentityError where that row was measured on other weights."""
        stored = self.units.weights(step)
        stored = self._folded_weights().get(step) if stored is None else stored
        if stored is None:
            return False
        if weights is not None and stored != weights:
            raise IdentityError(
                f"{self.place.path} holds {self.name!r} at step {step} for weights {stored}, these are {weights}: "
                "another run. Give this run its own path, or resume from its own checkpoint"
            )
        return True

    # -- one row, under the lock -------------------------------------------------------------------------------------

    def declare(self, identity: Mapping[str, Any]) -> None:
        """Say who measures; IdentityError, with what differs, where that is another instrument or configuration.

        One that says the same in other words (`devmon.store.same`) is accepted, and recorded as `accepted`; one of
        another layout alone is accepted too, and `corrects` what is stored.
        """
        if self.name not in self.place.names():
            with self.place.locked():
                self.place.update(lambda attrs: attrs or dict(identity), self.name)
        stored = self._retry_until_stable(self.attributes)
        if stored.get("fingerprint") == identity["fingerprint"]:
            return
        if (same := said_otherwise(stored, identity)) is not None:
            if stored.get("accepted", {}).get(identity["fingerprint"]) != same:
                with self.place.locked():
                    self._accept(identity, same)
            return
        if another_layout(stored, identity) is not None:
            return  # rows of either layout stay apart: `corrects`
        differ = differences(stored.get("fields", {}), identity["fields"])
        if stored.get("instrument") != identity["instrument"]:
            differ.insert(0, f"instrument: stored {stored.get('instrument')}, now {identity['instrument']}")
        raise IdentityError(
            f"{self.place.path} holds {self.name!r} of another configuration ({'; '.join(differ)}): use the stored "
            "one, give the watch another name or the run another path, or set its rows aside: devmon fix "
            f"{self.place.path} --drop {self.name}"
        )

    def redeclare(self, identity: Mapping[str, Any]) -> None:
        """As `declare`, but a declaration under which nothing was measured, as one that was refused, gives way."""
        if self.name in self.place.names() and not self.steps():
            with self.place.locked():
                self.place.update(lambda attrs: dict(identity), self.name)
        self.declare(identity)

    def corrects(self, identity: Mapping[str, Any], layout: str | None) -> list[str | None] | None:
        """The layouts of the rows that there are and of those to come (None: the model's family), where they differ.

        `layout` is the one that the model is read by; None where that is not known before it is measured.
        """
        if self.name not in self.place.names():
            return None
        stored = self._retry_until_stable(self.attributes)
        fields = another_layout(stored, identity)
        if fields is not None and identity["fingerprint"] in stored.get("accepted", {}):
            fields = None
        before = stored.get(LAYOUT) or (None if fields is None else fields[0])
        if layout is None:
            return fields
        return [before, layout] if before != layout and (before is not None or fields is not None) else None

    def read_by(self, identity: Mapping[str, Any], layout: str) -> None:
        """Keep the layout of the first row, to be called within the lock; where the declaration of a later one says the
        same layout in another place, that too."""
        stored = self.attributes()
        if stored.get(LAYOUT) is None:
            self.place.update(lambda attrs: attrs | {LAYOUT: layout}, self.name)
        if (fields := another_layout(stored, identity)) is not None:
            self._accept(identity, {"layout": fields})

    def append(self, step: int, dataset: xr.Dataset, weights: str, seconds: float) -> None:
        """Commit one row, unless `step` has one of the same weights. IdentityError where its form or weights differ.

        Replicates are left out where the rows before have none: a run of an earlier version goes on as it began.
        """
        dataset = self._as_before(dataset)
        layout, payload = encode(dataset)  # before the lock: of a large row this is the longest part
        with self.place.locked():
            if self.holds(step, weights):
                return
            if self._layout != layout:
                self._refuse_another_form(step, dataset)
                self._layout = layout
            self.units.append(step, layout, payload, weights=weights, seconds=seconds)
            if not self.place.locks:
                self._confirm(step, weights)

    def fail(self, step: int, reason: str) -> None:
        """Record that the instrument failed at `step`."""
        with self.place.locked():
            self.units.refresh()
            self.attributes()
            self.units.append(step, failure=reason)

    # -- all rows, to be called within the lock ----------------------------------------------------------------------

    def fold(self, every: bool = False) -> None:
        """Move the units into the group; `every` group with rows is written again, units or not."""
        if self.units.paths() or (every and self.steps()):
            self._replace(lambda rows: rows)
        self.units.remove([])

    def supersede(self, after: int, attempt: int) -> list[int]:
        """Move the rows past step `after` to an earlier attempt, and forget the failures there; return the steps moved.

        To be called after `fold`, so that no unit of a row that is moved stays.
        """
        moved: list[int] = []

        def cut(rows: xr.Dataset) -> xr.Dataset:
            late = rows["step"].values > after
            if late.any():
                self.place.set_aside(attempt, self.name, rows.isel(step=late))
                moved[:] = rows["step"].values[late].tolist()
            return rows.isel(step=~late)

        if any(step > after for step in self.steps()):
            self._replace(cut, {step: why for step, why in self.failures().items() if step <= after})
        return moved

    # -- private -----------------------------------------------------------------------------------------------------

    def _accept(self, identity: Mapping[str, Any], same: Mapping[str, Any]) -> None:
        """The declaration stays that of the first row; what else was accepted for it is kept beside it."""
        accepted = {identity["fingerprint"]: dict(same)}
        self.place.update(lambda attrs: attrs | {"accepted": attrs.get("accepted", {}) | accepted}, self.name)

    @property
    def _path(self) -> str:
        return f"{self.place.path}/{self.name}"

    @property
    def _always_changes(self) -> StoreError:
        return StoreError(f"{self._path} changes all the time: stop the other processes that fold this trajectory")

    def _retry_until_stable(self, read: Callable[[], T]) -> T:
        """What `read` returns, read again where the group was replaced meanwhile."""
        for look in range(LOOKS):
            before = self.place.version(self.name)
            try:
                value = read()
            except StoreError:
                if look >= LOOKS_AT_DAMAGE and before is not None and before == self.place.version(self.name):
                    raise
                if look > LOOKS_AT_NOTHING and before is None:
                    raise
            else:
                if before == self.place.version(self.name):
                    return value
            time.sleep(PAUSE)
        raise self._always_changes

    def _folded_weights(self) -> dict[int, str]:
        """The folded steps and their weights, read again where the group was replaced since."""
        version = self.place.version(self.name)
        if version is None or self._folded[0] != version:
            rows = self._retry_until_stable(lambda: self.place.folded(self.name, ["step", "weights"]))
            steps, weights = ([], []) if rows is None else (rows[key].values.tolist() for key in ("step", "weights"))
            self._folded = (version, dict(zip(steps, weights, strict=True)))
        return self._folded[1]

    def _as_before(self, dataset: xr.Dataset) -> xr.Dataset:
        """Without what the rows before lack: replicates, and variables that a later version added (`later`)."""
        new = [name for name, v in dataset.variables.items() if "replicate" in v.dims or v.attrs.get("later")]
        if not new:
            return dataset
        if self._stored_form is None:
            self._stored_form = self.attributes().get("shape")
        stored = self._stored_form or {}
        return dataset.drop_vars([name for name in new if stored and name not in stored])

    def _refuse_another_form(self, step: int, dataset: xr.Dataset) -> None:
        """Keep the form of the first row, and hold the later ones to it."""
        form = _form(dataset)
        stored = self.attributes().get("shape")
        if stored is None:
            stored = self.place.update(lambda attrs: {"shape": form} | attrs, self.name)["shape"]
        if stored != form:
            differ = "; ".join(differences(stored, form))
            raise IdentityError(f"{self.name!r} at step {step} differs in form from its rows before ({differ})")

    def _confirm(self, step: int, weights: str) -> None:
        """Where writers hold no lock: another may have written this row, or folded it, since we looked."""
        if self._folded_weights().get(step) not in (None, weights):
            self.units.discard(step)
        self.holds(step, weights)

    def _replace(self, change: Callable[[xr.Dataset], xr.Dataset], failures: Mapping[int, str] | None = None) -> None:
        """Put what `change` makes of the rows, folded and not, in the place of the group and its units."""
        for _ in range(OVERTAKEN):
            # What is removed at the end is what was there before the rows were read: units that came later stay.
            since, paths = self.place.version(self.name), self.units.paths()
            rows, known = change(self.read()), self.failures() if failures is None else failures
            held = set(rows["step"].values.tolist())
            kept = {str(step): why for step, why in known.items() if step not in held}
            code = {CODE: self.attributes()[CODE]} if CODE in self.attributes() else {}
            if self.place.replace(self.name, rows.assign_attrs(failures=kept, **code), since):
                return self.units.remove(paths)
        raise self._always_changes


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ, with both values, in words."""
    keys = [*stored, *(key for key in now if key not in stored)]
    return [f"{k}: stored {stored.get(k)}, now {now.get(k)}" for k in keys if stored.get(k) != now.get(k)]


def _form(dataset: xr.Dataset) -> dict[str, str]:
    """What all rows of a watch have in common, as text: dimensions with sizes, dtypes, labels."""
    form = {}
    for key, variable in dataset.variables.items():
        dtype = "text" if variable.dtype.kind in "OUST" else str(variable.dtype)
        dims = " ".join(f"{dim}={size}" for dim, size in variable.sizes.items())
        labelled = key in dataset.coords and variable.size <= LABELS_IN_FORM
        form[str(key)] = f"{dtype} ({dims})" + (f" {variable.values.tolist()}" if labelled else "")
    return form
