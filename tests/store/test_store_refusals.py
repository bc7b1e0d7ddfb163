"""What a run does not take: names that lead elsewhere, rows and settings of another run, dtypes it cannot hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from devmon import IdentityError, StoreError, Trajectory
from tests.support.store import WHO, row


@pytest.mark.parametrize(
    "name", ["..", ".", "", "../other", "a/b", "/etc/x", "a\\b", "_units", "-x", "a b", "a\n", "zarr.json"]
)
def test_a_name_that_leads_elsewhere_is_refused(path: Path, name: str) -> None:
    store = Trajectory(path)
    before = sorted(p for p in path.parent.rglob("*"))
    for call in (
        lambda: store.declare(name, WHO),
        lambda: store.append(name, 1, row(), weights="w"),
        lambda: store.fail(name, 1, "no"),
    ):
        with pytest.raises(StoreError, match="cannot name a watch"):
            call()
    with pytest.raises(KeyError):
        _ = store[name]
    assert sorted(p for p in path.parent.rglob("*")) == before


def test_another_run_is_refused(path: Path) -> None:
    for words, said in [
        ({"seed": 4}, "seed: stored 3, now 4"),
        ({"settings": {"width": 9}}, "width: stored 64, now 9"),
    ]:
        with pytest.raises(IdentityError, match=said):
            Trajectory(path, **words)  # type: ignore[arg-type]
    store = Trajectory(path)
    for step in (5, 9):  # folded, and not
        with pytest.raises(IdentityError, match="another run"):
            store.append("hurt", step, row(), weights="of another run")
    with pytest.raises(StoreError, match="declare it first"):
        store.append("unknown", 1, row(), weights="w")


def test_dtypes_that_a_store_cannot_hold_are_refused(path: Path) -> None:
    odd = xr.Dataset({"total": ((), np.zeros((), dtype="V2"))})
    with pytest.raises(StoreError, match="cast it to float32"):
        Trajectory(path).append("hurt", 11, odd, weights="w")
