"""`max_overhead`: what a monitor leaves out to keep its share of the wall time, in every loop."""

from __future__ import annotations

import doctest
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import xarray as xr

import devmon.monitoring.budget
from devmon import DevmonError, LoopMonitor, Snapshot, Trajectory, Watch, every
from devmon.analysis import series_of
from devmon.callbacks import CheckpointSeries, Monitor, latest
from devmon.monitoring.budget import Budget
from tests.support.lightning_toys import Norm
from tests.support.lightning_toys import train as train_by_lightning
from tests.support.loops import LOOPS, fit, seeded, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*", "ignore:.*dataloader.*")


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self, step: int = 0) -> None:
        """An optimizer step takes a second."""
        self.now += 1.0


@dataclass(frozen=True)
class Costs:
    """An instrument that takes `seconds`, or fails after them."""

    seconds: float
    fails: bool = False

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        CLOCK.now += self.seconds
        if self.fails:
            raise RuntimeError("no luck")
        return Norm()(snapshot)


CLOCK = Clock()


class Ticks(L.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        CLOCK.tick()


@pytest.fixture(autouse=True)
def midnight() -> None:
    CLOCK.now = 0.0


def run(path: Path, watches: list[Watch], share: float | None, *callbacks: L.Callback, steps: int = 60,
        resume: Any = None) -> Trajectory:  # fmt: skip
    monitor = Monitor(path, watches, max_overhead=share, clock=CLOCK)
    train_by_lightning([Ticks(), monitor, *callbacks], steps=steps, resume=resume)
    return Trajectory(path, "r")


def test_the_examples_of_the_budget_hold() -> None:
    assert doctest.testmod(devmon.monitoring.budget).attempted > 4
    assert doctest.testmod(devmon.monitoring.budget).failed == 0


@pytest.mark.parametrize("loop", LOOPS)
def test_costly_observations_are_left_out_and_listed_while_the_cheap_one_goes_on(tmp_path: Path, loop: str) -> None:
    watches = [Watch("costly", Costs(2.0), every(5)), Watch("cheap", Costs(0.01), every(1))]
    fit(loop, tmp_path / "run.zarr", watches, steps=60, before=CLOCK.tick, max_overhead=0.1, clock=CLOCK)
    store = Trajectory(tmp_path / "run.zarr", "r")
    held, skipped = store.steps("costly"), store.attrs["skipped"]
    assert held[0] == 0
    assert sorted([*held, *skipped["costly"]]) == list(range(0, 61, 5))
    assert list(skipped) == ["costly"]
    assert store.steps("cheap") == list(range(61))
    # by hand: at step 40 the monitor took 2.4 of 42.4 s, and 4.4 <= 0.1 * 44.4; at 60 4.6 of 64.6 s: 6.6 <= 0.1 * 66.6
    assert held == [0, 40, 60]
    assert CLOCK.now == pytest.approx(60 + 3 * 2 + 61 * 0.01)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("costs", [(0.5,), (0.4, 0.4), (3.0, 0.02, 0.02), (0.3, 0.3, 0.3, 5.0)])
def test_the_share_is_kept_over_a_long_run(share: float, costs: tuple[float, ...]) -> None:
    names = [f"w{i}" for i in range(len(costs))]
    clock = Clock()
    budget = Budget(share, names, clock)
    counts = dict.fromkeys(names, 0)
    for step in range(3000):
        clock.tick()
        for name in budget.choose(step, names):
            clock.now += costs[names.index(name)]
            budget.measured(step, name)
            counts[name] += 1
        budget.after(step)
    total = sum(counts[name] * cost for name, cost in zip(names, costs, strict=True))
    assert budget.spent == pytest.approx(total)
    assert total / clock.now <= share * 1.001, f"{total / clock.now:.3f} of the time for a share of {share}"
    assert total / clock.now >= min(0.9 * share, 0.99 * sum(costs) / (sum(costs) + 1)), "the budget was not used"
    assert all(counts[name] + len(budget.skipped.get(name, [])) == 3000 for name in names)
    assert min(counts.values()) > 1, f"a watch was silenced: {counts}"


def test_a_first_observation_is_always_made_and_a_failing_one_counts(tmp_path: Path) -> None:
    watches = [Watch("late", Costs(50.0), {30, 31, 40}), Watch("fails", Costs(3.0, fails=True), every(10))]
    with pytest.warns(UserWarning, match="fails failed at step 0"):
        store = run(tmp_path / "run.zarr", watches, 0.05)
    assert store.steps("late") == [30]
    assert sorted(store.failures("fails")) == [0]
    assert store.attrs["skipped"] == {"late": [31, 40], "fails": [10, 20, 30, 40, 50, 60]}


def test_without_a_budget_nothing_is_left_out(tmp_path: Path) -> None:
    store = run(tmp_path / "run.zarr", [Watch("costly", Costs(2.0), every(5))], None)
    assert store.steps("costly") == list(range(0, 61, 5))
    assert "skipped" not in store.attrs
    for share in (0, -0.1, 1.5):
        with pytest.raises(DevmonError, match="max_overhead is a share of the wall time above 0 and up to 1, got"):
            Monitor(tmp_path / "other.zarr", [], max_overhead=share)


def test_what_was_left_out_is_listed_after_an_exception_and_not_doubled_by_a_resumption(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == 20:
                raise RuntimeError("power cut")

    watches, path = [Watch("costly", Costs(2.0), every(5))], tmp_path / "run.zarr"
    with pytest.raises(RuntimeError, match="power cut"):
        run(path, watches, 0.1, CheckpointSeries(tmp_path / "saved", {12}), Fails())
    assert Trajectory(path, "r").attrs["skipped"] == {"costly": [5, 10, 15, 20]}
    CLOCK.now = 0.0
    store = run(path, watches, 0.1, steps=25, resume=latest(tmp_path / "saved"))
    assert store.steps("costly") == [0, 15]  # the first one of the process that resumed
    assert store.attrs["skipped"] == {"costly": [5, 10, 20, 25]}


def test_a_resumption_without_a_budget_forgets_what_was_left_out_later(tmp_path: Path) -> None:
    watches, path = [Watch("costly", Costs(2.0), every(5))], tmp_path / "run.zarr"
    with LoopMonitor(path, watches, max_overhead=0.1, clock=CLOCK) as monitor:
        model = train(monitor, seeded(), range(1, 13), before=CLOCK.tick)
        kept = {key: value.clone() for key, value in model.state_dict().items()}
        train(monitor, model, range(13, 26), before=CLOCK.tick)
    assert Trajectory(path, "r").attrs["skipped"] == {"costly": [5, 10, 15, 20, 25]}
    model.load_state_dict(kept)
    with LoopMonitor(path, watches) as monitor:
        train(monitor, model, range(13, 26))
    store = Trajectory(path, "r")
    assert store.attrs["skipped"] == {"costly": [5, 10]}
    assert store.steps("costly") == [0, 15, 20, 25]


def test_costs_are_series_where_they_are_asked_for(tmp_path: Path) -> None:
    store = run(tmp_path / "run.zarr", [Watch("norm", Norm(), every(5))], None, steps=10)
    assert [series.name for series in series_of(store)] == ["norm/norm"]
    (cost,) = [series for series in series_of(store, costs=True) if series.name == "norm/seconds"]
    assert cost.units == "s"
    assert cost.steps.tolist() == [0, 5, 10]
    np.testing.assert_array_equal(cost.values, store["norm"]["seconds"])
    assert (cost.values > 0).all()
