"""The options of `Monitor` on two ranks: rank 0 decides what is left out, logs, and meets the full disk; none waits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from devmon import Trajectory, Watch, every
from devmon.callbacks import Monitor
from tests.support.lightning_toys import Disk, Norm, train
from tests.support.loops import Recorder
from tests.support.two_ranks import Divided, after, raised, spawn_two


class SlowOnRankZero:
    """A clock that moves half a second at each look, on rank 0 only."""

    def __init__(self, rank: int) -> None:
        self.rank, self.now = rank, 0.0

    def __call__(self) -> float:
        self.now += 0.5 * (self.rank == 0)
        return self.now


def two_processes(rank: int, folder: Path) -> None:
    ddp: dict[str, Any] = {"strategy": "ddp", "devices": 2}
    watches = [Watch("norm", Norm(), every(1)), Watch("divided", Divided(Norm()), every(1))]
    results: dict[str, Any] = {"alone": after(train([], **ddp))}
    recorder = Recorder()
    monitor = Monitor(folder / "run.zarr", watches, log=True, max_overhead=0.6, clock=SlowOnRankZero(rank))
    results["watched"] = after(train([monitor], logger=recorder, **ddp))
    results["logged"] = [step for step, row in recorder.rows if "devmon/norm/norm" in row]
    with pytest.MonkeyPatch.context() as patch:
        disk = [Disk(patch, full=3, free=6)] if rank == 0 else []
        results["full disk"] = after(train([*disk, Monitor(folder / "full.zarr", watches)], **ddp))
        disk = [Disk(patch, full=3)] if rank == 0 else []
        results["strict"] = raised(lambda: train([*disk, Monitor(folder / "strict.zarr", watches, strict=True)], **ddp))
    (folder / f"{rank}.json").write_text(json.dumps(results))


def test_rank_zero_decides_for_both_and_none_waits(tmp_path: Path) -> None:
    spawn_two(two_processes, tmp_path)
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for results in (zero, one):
        assert results["watched"] == results["alone"]
        assert results["full disk"] == results["alone"]
        assert results["strict"].startswith("StoreError | cannot write")
    store = Trajectory(tmp_path / "run.zarr", "r")
    for name in ("norm", "divided"):
        steps, skipped = store.steps(name), store.attrs["skipped"].get(name, [])
        assert sorted([*steps, *skipped]) == list(range(13))
    assert store.attrs["skipped"], "nothing was left out: the test shows nothing"
    assert zero["logged"] == store.steps("norm")
    assert one["logged"] == []
    full = Trajectory(tmp_path / "full.zarr", "r")
    for name in ("norm", "divided"):
        assert sorted([*full.steps(name), *full.failures(name)]) == list(range(13))
        assert sorted(full.failures(name)) == [4, 5, 6]
