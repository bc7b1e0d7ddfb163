"""Several processes write, fold and read one trajectory: every acknowledged row is there once, killed or not."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import store_kills
from devmon import IdentityError, Trajectory
from devmon.files import exclusive
from devmon.store.stored import StoredWatch

ROOT = Path(__file__).parents[2]
ROW = store_kills.row


def start(code: str, *words: object) -> subprocess.Popen[str]:
    head = "import sys; from benchmarks.store_kills import *; path = Path(sys.argv[1]); "
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, words)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    out = []
    for process in processes:
        said, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
        out.append(said)
    return out


def test_four_writers_with_folds_in_between_and_a_reader(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    writers = [start("write(path, int(sys.argv[2]), 4, 25, int(sys.argv[3]))", path, k, 3 + k) for k in range(4)]
    seen: set[int] = set()
    while any(writer.poll() is None for writer in writers):
        if (path / "row" / "zarr.json").is_file():
            dataset = Trajectory(path, "r")["row"]  # never half a fold, never fewer rows than before
            now = set(dataset["step"].values.tolist())
            assert now >= seen, sorted(seen - now)
            assert len(now) == dataset.sizes["step"]
            if now:
                assert (dataset["total"].values == dataset["step"].values).all()
            seen = now
    finish(*writers)
    for _ in range(2):
        store = Trajectory(path)
        dataset = store["row"]
        assert dataset["step"].values.tolist() == list(range(100))
        assert store.steps("row") == list(range(100))
        np.testing.assert_array_equal(dataset["score"].values, np.arange(5000.0) + np.arange(100.0)[:, None])
        assert dataset["weights"].values.tolist() == [f"w{step}" for step in range(100)]
        store.fold()
    assert sorted(p.name for p in path.iterdir()) == [".lock", "row", "zarr.json"]


def test_several_make_one_run_and_write_the_same_steps(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    code = "write(path, 0, 1, 12, 5); print(Trajectory(path).attrs['run_id'])"
    said = finish(*[start(code, path) for _ in range(3)])
    assert len({text.split()[-1] for text in said}) == 1, said
    store = Trajectory(path)
    assert store["row"]["step"].values.tolist() == list(range(12))
    with pytest.raises(IdentityError, match="step 3 for weights w3, these are x"):
        store.append("row", 3, ROW(3), weights="x")


def test_of_two_writers_with_other_weights_one_is_refused(tmp_path: Path) -> None:
    store = Trajectory(tmp_path / "run.zarr")
    store.declare("row", store_kills.WHO)
    other = Trajectory(store.path)
    assert not other.holds("row", 1)
    store.append("row", 1, ROW(1), weights="a")
    with pytest.raises(IdentityError, match="weights a, these are b"):
        other.append("row", 1, ROW(1), weights="b")
    store.fold()
    assert other.holds("row", 1, weights="a")
    with pytest.raises(IdentityError, match="weights a, these are b"):
        other.append("row", 1, ROW(1), weights="b")


def test_records_of_several_processes_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    Trajectory(path)
    code = "store = Trajectory(path)\nfor i in range(15): store.record(**{f'k{sys.argv[2]}_{i}': i})"
    finish(*[start(code, path, k) for k in range(3)])
    assert {f"k{k}_{i}" for k in range(3) for i in range(15)} <= Trajectory(path).attrs.keys()


def test_a_row_written_while_another_folds_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Trajectory(tmp_path / "run.zarr")
    store.declare("row", store_kills.WHO)
    store.append("row", 0, ROW(0), weights="w0")
    other: list[subprocess.Popen[str]] = []
    real = StoredWatch._replace

    def slow(*words: object) -> None:
        other.append(start("write(path, 1, 1, 1, 0)", store.path))
        time.sleep(1.0)
        assert other[0].poll() is None  # it waits
        real(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(StoredWatch, "_replace", slow)
    store.fold()
    finish(*other)
    assert store.steps("row") == [0, 1]


def test_a_reader_reads_again_where_a_fold_came_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other = (Trajectory(tmp_path / "run.zarr") for _ in range(2))
    store.declare("row", store_kills.WHO)
    _child(store, 0)
    store.fold()
    real, calls = store._place.folded, []

    def folded(*words: object) -> object:
        found = real(*words)  # type: ignore[arg-type]
        if not calls:
            _child(other, 1)
            other.fold()
        calls.append(found)
        return found

    monkeypatch.setattr(store._place, "folded", folded)
    assert store["row"]["step"].values.tolist() == [0, 1]
    assert len(calls) == 2


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    code = "from devmon.files import exclusive\nwith exclusive(path): print('held', flush=True); time.sleep(60)"
    holder = start(code, lock)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.communicate()
    with exclusive(lock):
        pass


def _child(store: Trajectory, step: int) -> None:
    store.append("row", step, ROW(step), weights=f"w{step}")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_trajectory_goes_to_other_processes(tmp_path: Path, method: str) -> None:
    store = Trajectory(tmp_path / "run.zarr", seed=5)
    store.declare("row", store_kills.WHO)
    _child(store, 0)
    if method == "spawn":
        twin = pickle.loads(pickle.dumps(store))
        assert (twin.seed, twin.steps("row")) == (5, [0])
        _child(twin, 1)
    else:
        child = os.fork()
        if child == 0:
            _child(store, 1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    _child(store, 2)
    assert store["row"]["step"].values.tolist() == [0, 1, 2]


def test_a_disk_that_is_full_in_the_middle_of_a_row_costs_that_row_alone(tmp_path: Path) -> None:
    code = """
import resource
from devmon.errors import StoreError
store = Trajectory(path); store.declare("row", WHO); store.append("row", 0, row(0), weights="w0")
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))  # room for one row and a half
try: store.append("row", 1, row(1), weights="w1")
except StoreError as error: print(error)
assert Trajectory(path).steps("row") == [0]
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
store.append("row", 1, row(1), weights="w1")
store.append("row", 2, row(2), weights="w2")
"""
    (said,) = finish(start(code, tmp_path / "run.zarr"))
    assert "what is stored so far is intact; make room" in said
    dataset = Trajectory(tmp_path / "run.zarr")["row"]
    assert dataset["step"].values.tolist() == dataset["total"].values.tolist() == [0, 1, 2]


def test_setting_aside_twice_never_writes_over_an_earlier_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Trajectory(tmp_path / "run.zarr")
    store.declare("row", store_kills.WHO)
    for step in (0, 10, 20):
        _child(store, step)
    with monkeypatch.context() as patch:
        patch.setattr("devmon.store.trajectory.now", lambda: 1 / 0)  # killed before the attempt is noted
        with pytest.raises(ZeroDivisionError):
            store.supersede(after=10)
    _child(store, 20)
    assert store.supersede(after=5) == 2
    assert {p.name for p in (store.path / "_attempts").iterdir()} == {"0", "1"}


def test_killed_writers_lose_no_acknowledged_row(tmp_path: Path) -> None:
    out = tmp_path / "kills.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/store_kills.py", "--kills", "3", "--writers", "1", "--json", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert all(phase["acknowledged"] for phase in found["phases"].values()), found
    assert found["phases"]["fold"]["in_a_fold"] == 1, found
    assert found["kills"] == 3, found
    assert found["lost"] == found["wrong"] == found["double"] == 0, found
