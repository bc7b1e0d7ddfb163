"""A study in several processes: the same rows, whoever dies, and who gets which GPU and thread."""

from __future__ import annotations

import multiprocessing.forkserver
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from devmon import DevmonError, InstrumentError, Trajectory
from devmon.offline.engines import forkserver
from devmon.offline.engines import processes as workers
from devmon.offline.plan import Plan
from devmon.offline.study import Study
from tests.support.offline_toys import (
    measure,
    rows,
    same,
)


def test_two_workers_write_what_one_does_though_one_is_killed_and_the_rest_done_later(plain: Path) -> None:
    (plain / "saved" / "step2.safetensors").write_bytes(b"")
    command = (plain / "saved", "--source", f"{plain / 'script.py'}:study", "--into")
    killed = measure(*command, plain / "two.zarr", "--workers", 2)
    assert killed.exit_code == 1
    for said in (
        "step 2 skipped",
        "step2.safetensors cannot be read",
        "died (exit code -9): give the command",
    ):
        assert said in killed.output
    two = Trajectory(plain / "two.zarr", "r")
    lost = {0, 4, 6, 8, 10, 12} - set(two.steps("drawn"))  # what the dead one had begun, or read ahead
    assert 6 in lost
    assert len(lost) <= 2
    again = measure(*command, plain / "two.zarr")
    assert (again.exit_code, "1 checkpoints skipped" in again.output) == (1, True), again.output
    alone = measure(*command, plain / "one.zarr")
    assert (alone.exit_code, "12 rows measured, 1 checkpoints skipped" in alone.output) == (1, True), alone.output
    assert Trajectory(plain / "one.zarr", "r").failures("drawn") == two.failures("drawn")
    same(rows(plain / "one.zarr"), rows(two.path))


def test_shards_do_the_whole_between_them(plain: Path) -> None:
    (plain / "gone").touch()
    command = (plain / "saved", "--source", f"{plain / 'script.py'}:study", "--into")
    told = [measure(*command, plain / "shards.zarr", "--shard", part).output for part in ("1/2", "2/2")]
    assert ["4 to measure" in told[0], "3 to measure" in told[1]] == [True, True], told
    assert measure(*command, plain / "one.zarr").exit_code == 0
    same(rows(plain / "one.zarr"), rows(plain / "shards.zarr"))


def test_what_ends_one_worker_is_raised(plain: Path) -> None:
    plan = Plan(str(plain / "saved"), str(plain / "run.zarr"), f"{plain / 'script.py'}:unfit", workers=2)
    with pytest.raises(DevmonError, match="step [024]: made for another model"):
        workers.measure(plan, [0, 2, 4])
    with pytest.raises(InstrumentError, match="step 0: made for another model"):
        Study(plan).measure()


def test_each_worker_has_a_gpu_of_those_that_are_visible(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str | None] = []

    class Process:
        """A process that ends at once."""

        exitcode = 0

        def __init__(self, target: Any, args: tuple[Any, ...], daemon: bool) -> None:
            self.args = args

        def start(self) -> None:
            started.append(self.args[1])
            self.args[2].send(workers.Ended())

        def join(self) -> None: ...

        def is_alive(self) -> bool:
            return False

    plan = Plan(str(plain / "saved"), str(plain / "run.zarr"), "x.py:y", workers=3)
    monkeypatch.setattr(forkserver.start(plan), "Process", Process)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5")
    assert workers.measure(plan, range(5)) == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    workers.measure(plan, [7, 8])  # two processes are enough
    workers.measure(replace(plan, device="cpu"), [7])
    assert started == ["4", "GPU-5", "4", "0", "1", None]


def test_the_server_of_the_workers_imports_while_the_command_does(plain: Path) -> None:
    """Were torch there before it is begun, the two would import one after the other."""
    code = f"""
import sys
from devmon.offline.engines import forkserver
from devmon.cli.root import app
def start(plan):
    print("begun", [name for name in ("torch", "xarray", "devmon.offline.study") if name in sys.modules])
    raise SystemExit
forkserver.start = start
args = ["--source", "{plain / "script.py"}:study", "--into", "run.zarr", "--workers", "2"]
app(["measure", {str(plain / "saved")!r}, *args])
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=plain, capture_output=True, text=True)
    assert ran.stdout == "begun []\n", ran.stderr


def test_an_interrupt_is_for_the_command_and_not_for_the_server_of_the_workers(plain: Path) -> None:
    """Both are of the terminal's group: the server would print where it was among its imports."""
    forkserver.start(Plan(str(plain / "saved"), str(plain / "run.zarr"), "x.py:y", workers=2))
    pid = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]

    def blocked(process: object) -> bool:
        status = Path(f"/proc/{process}/status").read_text()
        return bool(int(status.partition("SigBlk:")[2].split()[0], 16) >> (signal.SIGINT - 1) & 1)

    assert blocked(pid)
    assert not blocked("self")


def test_a_step_is_taken_when_the_one_before_is_begun(plain: Path) -> None:
    (plain / "gone").touch()
    log: list[Any] = []

    def dealt() -> Any:
        for step in (8, 4, 0):
            log.append(step)
            yield step

    plan = Plan(str(plain / "saved"), str(plain / "run.zarr"), f"{plain / 'script.py'}:study", watch=("drawn",))
    Study(plan).measure(dealt(), lambda event: log.append(f"measured {event.step}"))
    assert log == [8, 4, "measured 8", 0, "measured 4", "measured 0"]


def test_threads_are_those_of_numpy_too(plain: Path) -> None:
    from threadpoolctl import threadpool_info, threadpool_limits

    def blas() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    with threadpool_limits(2):
        assert blas() == {2}
        Study(Plan(str(plain / "saved"), str(plain / "run.zarr"), f"{plain / 'script.py'}:study", threads=1))
        assert blas() == {1}
