"""Companions of a monitor: when each hook is called and what it decides; and that all loops take the same options."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xarray as xr

from devmon import DevmonError, LoopMonitor, Snapshot, Trajectory, Watch, every
from devmon.callbacks.one_watch import OPTIONS
from devmon.monitoring.companion import Companion
from devmon.monitoring.loop import MonitorOptions
from tests.support.lightning_toys import Norm
from tests.support.loops import LOOPS, FailsAt, Toy, fit, seeded

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*", "ignore:.*dataloader.*")


class Diary(Companion):
    """Writes down what it is asked and told."""

    def __init__(self, name: str, lines: list[str]) -> None:
        self.name, self.lines = name, lines

    def begin(self, step: int) -> None:
        self.lines.append(f"{self.name}: begin {step}")

    def choose(self, step: int, names: list[str]) -> list[str]:
        self.lines.append(f"{self.name}: choose {step} {','.join(names)}")
        return names

    def measured(self, step: int, name: str, dataset: xr.Dataset | None) -> None:
        self.lines.append(f"{self.name}: measured {step} {name} {dataset is not None}")

    def after(self, step: int) -> None:
        self.lines.append(f"{self.name}: after {step}")

    def record(self) -> None:
        assert self.monitor.trajectory is not None
        folded = not list((Path(str(self.monitor.path)) / "_units").rglob("*.rows"))
        self.lines.append(f"{self.name}: record, folded {folded}")

    def close(self) -> None:
        folded = not list((Path(str(self.monitor.path)) / "_units").rglob("*.rows"))
        self.lines.append(f"{self.name}: close, folded {folded}")


def test_the_hooks_are_called_in_order_and_the_first_companion_is_the_outermost(tmp_path: Path) -> None:
    lines: list[str] = []
    watches = [Watch("norm", Norm(), {3, 5}), Watch("fails", FailsAt((3,)), {3})]
    monitor = LoopMonitor(tmp_path / "run.zarr", watches, companions=[Diary("a", lines), Diary("b", lines)])
    with monitor:
        monitor.step(2, seeded())
        with pytest.warns(UserWarning, match="fails failed at step 3"):
            monitor.step(3, seeded())
        monitor.step(3, seeded())
        monitor.step(4, seeded())
    assert lines == [
        "a: begin 2", "b: begin 2", "a: choose 3 norm,fails", "b: choose 3 norm,fails",
        "a: measured 3 norm True", "b: measured 3 norm True", "a: measured 3 fails False", "b: measured 3 fails False",
        "b: after 3", "a: after 3",
        "a: record, folded False", "b: record, folded False", "a: close, folded True", "b: close, folded True",
    ]  # fmt: skip


def test_a_companion_adds_what_is_due_and_the_next_one_may_leave_it_out(tmp_path: Path) -> None:
    class Adds(Companion):
        def due(self, step: int, watches: list[Watch]) -> list[Watch]:
            return [*watches, *(replace(watch, steps={step}) for watch in self.monitor.watches if step % 2)]

    class LeavesOut(Companion):
        def choose(self, step: int, names: list[str]) -> list[str]:
            return [] if step == 3 else names

    companions = [Adds(), LeavesOut()]
    with LoopMonitor(tmp_path / "run.zarr", [Watch("norm", Norm(), {0, 4})], companions=companions) as monitor:
        for step in range(7):
            monitor.step(step, seeded())
    assert Trajectory(tmp_path / "run.zarr", "r").steps("norm") == [0, 1, 4, 5]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("model", ["net.0", lambda module: module.net[0]], ids=["by name", "by function"])
def test_a_part_of_the_model_is_measured_in_every_loop(tmp_path: Path, loop: str, model: Any) -> None:
    trained = fit(loop, tmp_path / "run.zarr", [Watch("norm", Norm(), every(4))], model=model)
    assert isinstance(trained.net[0], type(Toy().net[0]))
    last = float(Trajectory(tmp_path / "run.zarr", "r")["norm"]["norm"].sel(step=12))
    assert last == float(Norm()(Snapshot(12, trained.net[0]))["norm"])


def test_a_part_that_is_not_there_is_refused_at_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(DevmonError, match="Toy has no submodule 'nett'; it has net"):
        LoopMonitor(tmp_path / "run.zarr", [], model="nett").step(0, seeded())


def test_the_shells_hand_on_all_options_of_the_monitor() -> None:
    keywords = {
        name
        for name, p in inspect.signature(LoopMonitor).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert set(MonitorOptions.__annotations__) == keywords - {"model", "log", "ranks"}
    assert keywords - {"ranks"} == OPTIONS
