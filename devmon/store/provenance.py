"""What a run says of itself in its attributes: written when it is created, and held against who opens it again."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import uuid
from collections.abc import Mapping
from typing import Any

from devmon.errors import IdentityError, StoreError
from devmon.store.migrations import SCHEMA
from devmon.store.rows import plain
from devmon.store.stored import differences

VERSIONED = ("devmon", "torch", "lightning", "devinterp", "transformers", "zarr", "xarray", "numpy")


def new_run(seed: int, settings: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a run that begins now."""
    return {
        "schema": SCHEMA,
        "run_id": uuid.uuid4().hex[:12],
        "seed": seed,
        "created": now(),
        "versions": _versions(),
        "platform": platform.platform(),
        **plain({**provenance, "settings": dict(settings)}),
    }


def refuse_another(
    path: object, attrs: Mapping[str, Any], seed: int | None, settings: Mapping[str, Any] | None
) -> None:
    """Raise StoreError where these are no attributes of a run that can be read, IdentityError where of another run."""
    if "schema" not in attrs:
        raise StoreError(f"{path} is a Zarr group but no trajectory of devmon: give the path of a run's store")
    if not isinstance(attrs["schema"], int) or not 1 <= attrs["schema"] <= SCHEMA:
        raise StoreError(
            f"{path} has schema {attrs['schema']}, this devmon reads 1 to {SCHEMA}: install devmon >= "
            f"{_written_by(attrs)}"
        )
    missing = [key for key in ("run_id", "seed", "created") if key not in attrs]
    if missing:
        raise StoreError(f"{path}/zarr.json says no {' and no '.join(missing)}: restore it from a copy")
    differ = [] if seed in (None, attrs["seed"]) else [f"seed: stored {attrs['seed']}, now {seed}"]
    if settings is not None:
        differ += differences(attrs.get("settings", {}), plain(dict(settings)))
    if differ:
        raise IdentityError(
            f"{path} holds a run of another configuration ({'; '.join(differ)}): use the same one, or give this run "
            "another path"
        )


def now() -> str:
    """The time of day, in UTC, as ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _written_by(attrs: Mapping[str, Any]) -> str:
    """The devmon that wrote the schema of this run, as far as it says."""
    by = [entry.get("devmon") for entry in attrs.get("migrated") or [] if isinstance(entry, dict)]
    return str([(attrs.get("versions") or {}).get("devmon", "the version that wrote it"), *by][-1])


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
