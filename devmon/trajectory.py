"""The trajectory: the Zarr store of one run, appended by step and read as xarray.

    run.zarr/                 a Zarr v3 group; its attributes are the run's provenance
      llc/                    one leaf group a watch with its own `step`: `xr.open_zarr("run.zarr", group="llc")`
      _units/llc/….npz        observations committed since the last fold, one immutable file each (`devmon.units`)
      _attempts/0/llc/        rows that a resumption superseded, kept as an earlier attempt

Every read joins the folded rows with the units; `fold()` moves the units into the groups. Needs no torch.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from devmon.errors import IdentityError, StoreError
from devmon.units import commit, plain, read_unit, unit_path, write_unit
from devmon.watch import NAME

SCHEMA = 1
VERSIONED = ("devmon", "torch", "lightning", "devinterp", "transformers", "zarr", "xarray", "numpy")


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
        if not (self.path / "zarr.json").is_file():
            self._create(mode, seed or 0, {**provenance, "settings": dict(settings or {})})
        attrs = self.attrs
        if "schema" not in attrs:
            raise StoreError(f"{self.path} is a Zarr group but no trajectory of devmon: give the path of a run's store")
        if attrs["schema"] > SCHEMA:
            raise StoreError(
                f"{self.path} has schema {attrs['schema']}, this devmon reads up to {SCHEMA}: install devmon "
                f">= {attrs['versions'].get('devmon', 'the version that wrote it')}"
            )
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

    # -- provenance --------------------------------------------------------------------------------------------------

    @property
    def attrs(self) -> dict[str, Any]:
        """The run's provenance: run_id, seed, created, schema, versions, platform and what the run added."""
        return _node(self.path)["attributes"]

    def record(self, **provenance: Any) -> None:
        """Add to the run's provenance (JSON-able values)."""
        _write_node(self.path, self.attrs | plain(provenance))

    # -- reading -----------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The watches, in alphabetical order."""
        return sorted(p.name for p in self.path.iterdir() if NAME.fullmatch(p.name) and (p / "zarr.json").is_file())

    def __getitem__(self, name: str) -> xr.Dataset:
        if name not in self.names():
            raise KeyError(f"{self.path} holds no watch {name!r}; it holds {', '.join(self.names()) or 'none'}")
        attrs = _node(self.path / name)["attributes"]
        units = [read_unit(path) for path in self._units(name)]  # before the folded rows: a fold in between loses none
        rows = [_row(dataset, header) for dataset, header in units if "failure" not in header]
        folded = self._folded(name)
        if folded is not None:
            held = set(folded["step"].values.tolist())
            rows = [folded, *(row for row in rows if int(row["step"][0]) not in held)]
        if not rows:
            return xr.Dataset(coords={"step": np.array([], dtype=np.int64)}, attrs=attrs)
        joined = rows[0] if len(rows) == 1 else xr.concat(
            rows, "step", data_vars="all", coords="minimal", compat="override", join="exact", combine_attrs="override"
        )  # fmt: skip
        return joined.sortby("step").assign_attrs(rows[0].attrs | attrs)

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def steps(self, name: str) -> list[int]:
        """The steps that the watch holds, in order."""
        held = {int(path.stem): path for path in self._units(name)}
        steps = {step for step, path in held.items() if "failure" not in read_unit(path)[1]}
        folded = self._folded(name, ["step"])
        return sorted(steps | set([] if folded is None else folded["step"].values.tolist()))

    def failures(self, name: str) -> dict[int, str]:
        """Steps at which the instrument failed, with the reason."""
        stored = {int(k): v for k, v in _node(self.path / name)["attributes"].get("failures", {}).items()}
        headers = (read_unit(path)[1] for path in self._units(name))
        return stored | {header["step"]: header["failure"] for header in headers if "failure" in header}

    def holds(self, name: str, step: int, *, weights: str | None = None) -> bool:
        """Whether the watch has a row at `step`; `IdentityError` where that row was measured on other weights."""
        path = unit_path(self.path / "_units" / name, step)
        stored: str | None = None
        if path.is_file():
            header = read_unit(path)[1]
            stored = None if "failure" in header else header["weights"]
        if stored is None:
            folded = self._folded(name, ["step", "weights"])
            if folded is None or step not in folded["step"].values:
                return False
            stored = str(folded["weights"].sel(step=step).item())
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
        if not NAME.fullmatch(name):
            raise StoreError(f"{name!r} cannot name a watch: use letters, digits, '_', '.' and '-'")
        if not (self.path / name / "zarr.json").is_file():
            _write_node(self.path / name, dict(identity))
            return
        stored = _node(self.path / name)["attributes"]
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
        if self.holds(name, step, weights=weights):
            return
        if "step" in dataset.variables or "step" in dataset.dims:
            raise StoreError(f"{name!r} returned a dataset with its own 'step': the trajectory adds that dimension")
        shape = _shape(dataset)
        stored = _node(self.path / name)["attributes"].get("shape")
        if stored is None:
            _write_node(self.path / name, _node(self.path / name)["attributes"] | {"shape": shape})
        elif stored != shape:
            differ = "; ".join(_differences(stored, shape))
            raise IdentityError(f"{name!r} at step {step} differs in form from its rows before ({differ})")
        path = unit_path(self.path / "_units" / name, step)
        write_unit(path, dataset, step=step, weights=weights, seconds=seconds)

    def fail(self, name: str, step: int, reason: str) -> None:
        """Record that the instrument failed at `step`; a later row at that step replaces the record."""
        write_unit(unit_path(self.path / "_units" / name, step), xr.Dataset(), step=step, failure=reason)

    def fold(self) -> None:
        """Move all units into the watches' Zarr groups, which plain xarray reads. Safe to be killed at any instant."""
        for name in self.names():
            paths = self._units(name)
            if paths:
                self._replace(name, self[name], self.failures(name))
                for path in paths:
                    path.unlink(missing_ok=True)
                (self.path / "_units" / name).rmdir()
        if (self.path / "_units").is_dir() and not any((self.path / "_units").iterdir()):
            (self.path / "_units").rmdir()

    def supersede(self, after: int) -> int:
        """Move the rows past step `after` aside, as an earlier attempt (training goes on from `after`).

        Returns how many rows were moved.
        """
        late = {name: [s for s in self.steps(name) if s > after] for name in self.names()}
        late = {name: steps for name, steps in late.items() if steps}
        if not late:
            return 0
        self.fold()
        attempt = len(self.attrs.get("attempts", []))
        for name, steps in late.items():
            dataset = self[name]
            _write_group(self.path / "_attempts" / str(attempt) / name, dataset.sel(step=steps))
            kept = {step: reason for step, reason in self.failures(name).items() if step <= after}
            self._replace(name, dataset.sel(step=dataset["step"] <= after), kept)
        self.record(attempts=[*self.attrs.get("attempts", []), {"after": after, "rows": late, "at": _now()}])
        return sum(map(len, late.values()))

    # -- private -----------------------------------------------------------------------------------------------------

    def _create(self, mode: str, seed: int, provenance: Mapping[str, Any]) -> None:
        if mode == "r":
            raise StoreError(
                f"there is no trajectory at {self.path}: give the path of a run's store (…/trajectory.zarr)"
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise StoreError(f"{self.path} exists and is no trajectory: give a new or empty path")
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
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot make {self.path} ({error.strerror or error}): give a path in a folder that can be written"
            ) from error
        _write_node(self.path, attrs)

    def _units(self, name: str) -> list[Path]:
        folder = self.path / "_units" / name
        return sorted(folder.glob("[0-9]*.npz")) if folder.is_dir() else []

    def _folded(self, name: str, only: list[str] | None = None) -> xr.Dataset | None:
        if not (self.path / name / "step").is_dir():
            return None
        try:
            with xr.open_dataset(self.path, group=name, engine="zarr", consolidated=False, chunks=None) as dataset:
                return (dataset if only is None else dataset[only]).load()
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(f"{self.path / name} cannot be read ({error}): restore it from a copy") from error

    def _replace(self, name: str, dataset: xr.Dataset, failures: Mapping[int, str]) -> None:
        """Put `dataset` in the place of the watch's group: written aside, then swapped (`_recover` ends a half swap)."""
        held = set(dataset["step"].values.tolist())
        kept = {str(step): reason for step, reason in failures.items() if step not in held}
        aside = self.path / "_units" / f"{name}.new"
        shutil.rmtree(aside, ignore_errors=True)
        if dataset.sizes["step"]:
            _write_group(aside, dataset.assign_attrs(failures=kept))
        else:
            _write_node(aside, dataset.attrs | {"failures": kept})
        old = self.path / "_units" / f"{name}.old"
        os.rename(self.path / name, old)
        os.rename(aside, self.path / name)
        shutil.rmtree(old)

    def _recover(self) -> None:
        for old in self.path.glob("_units/*.old"):
            target = self.path / old.stem
            if target.exists():
                shutil.rmtree(old)
            else:
                os.rename(old, target)

    def __repr__(self) -> str:
        rows = ", ".join(f"{name}: {len(self.steps(name))} steps" for name in self.names())
        return f"Trajectory({str(self.path)!r}: {rows or 'empty'})"


def _row(dataset: xr.Dataset, header: Mapping[str, Any]) -> xr.Dataset:
    row = dataset.expand_dims(step=np.array([header["step"]], dtype=np.int64))
    labels = {"weights": np.array([header["weights"]], dtype=object), "seconds": np.array([header["seconds"]])}
    return row.assign_coords({key: ("step", value) for key, value in labels.items()})


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


def _node(folder: Path) -> dict[str, Any]:
    path = folder / "zarr.json"
    try:
        node = json.loads(path.read_text())
        if node["zarr_format"] != 3 or node["node_type"] != "group":
            raise ValueError("it is no Zarr v3 group")
        node.setdefault("attributes", {})
        return node
    except (OSError, ValueError, KeyError, TypeError) as error:
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
