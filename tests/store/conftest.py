from __future__ import annotations

from pathlib import Path

import pytest

from devmon import Trajectory
from tests.support.store import WHO, row


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run with two watches: `fine` is never touched, `hurt` has folded rows 0, 5 and units 7, 9."""
    store = Trajectory(tmp_path / "run.zarr", seed=3, settings={"width": 64}, title="a run")
    for name in ("fine", "hurt"):
        store.declare(name, WHO)
        for step in (0, 5):
            store.append(name, step, row(step), weights=f"w{step}")
    store.fold()
    for name in ("fine", "hurt"):
        for step in (7, 9):
            store.append(name, step, row(step), weights=f"w{step}")
    return store.path
