"""`devmon measure` on engines of others: Ray on a cluster of this machine, submitit's own executor of local jobs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from devmon import DevmonError, Trajectory
from devmon.offline.engines import ray as ray_engine
from devmon.offline.engines import slurm as slurm_engine
from devmon.offline.engines.processes import Ended
from devmon.offline.plan import Plan
from devmon.offline.study import Progress
from tests.support.in_process import program
from tests.support.offline_toys import PLAIN, rows, same

PINNED = (
    PLAIN
    + """
@dataclass(frozen=True)
class Pinned:
    def __call__(self, snapshot):
        import time
        time.sleep(0.3)  # long enough that both tasks have some
        return xr.Dataset({"gpu": ((), int(os.environ["CUDA_VISIBLE_DEVICES"]))})

def pinned():
    return model(), [Watch("pinned", Pinned(), every(1))]
"""
)


def command(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`devmon measure` in a process of its own: Ray leaves threads and warnings behind."""
    return subprocess.run(
        [sys.executable, "-m", "devmon.cli", "measure", *map(str, args)], capture_output=True, text=True, timeout=600,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **environment},
    )  # fmt: skip


def test_ray_loses_nothing_when_a_worker_is_killed_and_pins_gpus(plain: Path) -> None:
    script = plain / "script.py"
    script.write_text(PINNED.replace("GONE", str(plain / "gone")))
    (plain / "saved" / "step2.safetensors").write_bytes(b"")
    driver = plain / "driver.py"  # one cluster for both: it takes seconds to start
    driver.write_text("""
import sys
import ray
from devmon.cli.root import app
ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
common = ["measure", "saved", "--engine", "ray", "--workers", "2"]
def run(*args):
    print("code", app([*common, *args], standalone_mode=False), flush=True)
run("--into", "ray.zarr", "--source", "script.py:study", "--option", "num_gpus=0")
run("--into", "pinned.zarr", "--source", "script.py:pinned", "--steps", "4-")
from devmon.offline.engines.ray import measure
from devmon.offline.plan import Plan
try:
    measure(Plan("saved", "x.zarr", "script.py:pinned", engine="ray", options=("num_gpus=3",)).absolute(), [4])
except Exception as error:
    print("refused", error)
try:
    measure(Plan("saved", "x.zarr", "script.py:unfit", engine="ray").absolute(), [4, 6])
except Exception as error:
    print("ended", error)
""")
    ran = subprocess.run([sys.executable, "driver.py"], cwd=plain, capture_output=True, text=True, timeout=600,
                         env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"})  # fmt: skip
    told = ran.stdout + ran.stderr
    assert ran.returncode == 0, told
    assert (plain / "gone").exists(), "no worker was killed"
    assert "step 2 skipped" in told
    assert "rows measured, 1 checkpoints skipped: ray.zarr\ncode 1" in told, told
    assert "5 rows measured: pinned.zarr\ncode 0" in told, told
    assert "refused a task asks for num_gpus=3 and the whole Ray cluster has 2" in told, told
    assert "ended step 4: made for another model" in told, told
    alone = program(
        "devmon.cli", "measure", plain / "saved", "--source", f"{script}:study", "--into", plain / "one.zarr"
    )
    assert alone.returncode == 1, alone.stderr
    same(rows(plain / "one.zarr"), rows(plain / "ray.zarr"))
    found = Trajectory(plain / "pinned.zarr", "r")["pinned"]
    assert found["step"].values.tolist() == [4, 6, 8, 10, 12]
    assert set(found["gpu"].values.tolist()) == {0, 1}


def test_an_array_of_jobs_measures_the_whole_and_a_dead_job_is_told(plain: Path) -> None:
    (plain / "saved" / "step4.safetensors").write_bytes(b"")
    jobs = ("--engine", "slurm", "--workers", 2, "--option", "cluster=local", "--option", f"folder={plain / 'jobs'}")
    args = (plain / "saved", "--source", f"{plain / 'script.py'}:study", "--into")
    killed = command(*args, plain / "jobs.zarr", *jobs)
    assert killed.returncode == 1, killed.stderr
    assert "step 4 skipped" in killed.stderr
    assert "died (" in killed.stderr
    assert "its log: " in killed.stderr
    assert Trajectory(plain / "jobs.zarr", "r").steps("drawn") == [0, 2, 8, 12]  # jobs: 0, 4, 8, 12; 2, 6, 10
    again = command(*args, plain / "jobs.zarr", *jobs)
    assert "4 rows measured, 1 checkpoints skipped" in again.stdout, again.stdout + again.stderr
    assert program("devmon.cli", "measure", *args, plain / "one.zarr").returncode == 1
    same(rows(plain / "one.zarr"), rows(plain / "jobs.zarr"))


def test_a_job_that_is_ended_early_is_handed_in_again_as_it_was() -> None:
    plan = Plan("s", "r.zarr", "x.py:y")
    again = slurm_engine.Job().checkpoint(plan, [1, 2])
    assert isinstance(again.function, slurm_engine.Job)
    assert again.args == (plan, [1, 2])


def test_without_slurm_it_is_said_how_jobs_run_here(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    plan = Plan(str(plain / "saved"), str(plain / "run.zarr"), "x.py:y", engine="slurm")
    with pytest.raises(DevmonError, match="cannot be submitted.*--option cluster=local"):
        slurm_engine.measure(plan, [0])


@pytest.mark.parametrize(("module", "name", "extra"), [(ray_engine, "ray", "ray"), (slurm_engine, "submitit", "slurm")])
def test_an_engine_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DevmonError, match=rf'pip install "devmon\[{extra}\]"'):
        module.measure(Plan("s", "r.zarr", "x.py:y"), [0])


class Cluster:
    """What `_deal` needs of Ray: a task is done when it is waited for; those that hold step 9 die."""

    exceptions = SimpleNamespace(RayError=LookupError)

    def __init__(self) -> None:
        self.at_once, self.going = 0, 0

    def remote(self, plan: Plan, steps: list[int]) -> tuple[int, ...]:
        self.going += 1
        self.at_once = max(self.at_once, self.going)
        return tuple(steps)

    def wait(self, going: list[Any]) -> Any:
        return [going[0]], going[1:]

    def get(self, steps: tuple[int, ...]) -> Any:
        self.going -= 1
        if 9 in steps:
            raise LookupError("gone\nwith a long trace")
        return [Progress("measured", step, "norm") for step in steps], Ended()


@pytest.mark.parametrize(("workers", "size"), [(1, 4), (3, 3), (40, 1)])
def test_tasks_are_kept_going_and_one_that_died_for_good_is_told(workers: int, size: int) -> None:
    cluster, told = Cluster(), list[Progress]()
    steps = list(range(36))
    lost = ray_engine._deal(cluster, cluster, Plan("s", "r", "x", workers=workers), steps, told.append)
    assert cluster.at_once == min(workers, 36 // size)
    gone = list(range(9 // size * size, (9 // size + 1) * size))
    assert sorted(event.step for event in told) == [step for step in steps if step not in gone]
    assert lost == [f"the task of steps {', '.join(map(str, gone))} died (LookupError: gone)"]
