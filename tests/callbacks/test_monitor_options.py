"""What a `Monitor` logs, what it leaves out to save time, what it refuses at the start, and what a full disk does."""

from __future__ import annotations

import csv
import doctest
import errno
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import xarray as xr
from lightning.pytorch.loggers import CSVLogger, Logger

import devmon.monitoring.budget
from devmon import DevmonError, IdentityError, Snapshot, StoreError, Trajectory, Watch, every
from devmon.analysis import llc, series_of
from devmon.callbacks import CheckpointSeries, InductionMonitor, LLCMonitor, Monitor, latest
from devmon.monitoring.budget import Budget
from devmon.sampling import classification_loss
from tests.support.lightning_toys import Norm, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*", "ignore:.*dataloader.*")


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def said(told: pytest.WarningsRecorder) -> list[str]:
    """The beginnings of the monitor's own warnings."""
    found = [str(one.message).split(" (")[0] for one in told]
    return [text for text in found if any(words in text for words in ("failed at", "not logged", "not tidied"))]


# -- the logger mirror -------------------------------------------------------------------------------------------------


class Recorder(Logger):
    """Keeps what it is told; draws random numbers, as loggers do for their file names."""

    name = version = "recorder"

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.broken = broken

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        ours = {key: value for key, value in metrics.items() if key.startswith("devmon/")}
        if ours:
            torch.rand(1), np.random.rand()  # noqa: NPY002
            if self.broken:
                raise ConnectionError("no network")
            assert step is not None
            self.rows.append((step, ours))


@dataclass(frozen=True)
class Mixed:
    """Scalars, of which two are headlines, an array and a label."""

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        norm = float(Norm()(snapshot)["norm"])
        data = {"a": ((), norm), "b": ((), 3), "c": ((), 0.5), "heads": ("head", [0.1, 0.2]), "word": ((), "x")}
        return xr.Dataset(data, {"head": [0, 1]}, {"headline": ["a", "b", "heads", "word"]})


def llc_settings() -> dict[str, Any]:
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(3))
    return {"data": (x, (x[:, 0] > 0).long()), "loss": classification_loss, "nbeta": 20.0, "gamma": 50.0, "lr": 1e-3,
            "chains": 2, "draws": 12, "burn_in": 4, "batch_size": 20}  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 4])
def test_headline_scalars_reach_every_logger_once_at_the_optimizer_step(tmp_path: Path, accumulate: int) -> None:
    watches = [Watch("mixed", Mixed(), every(2)), Watch("norm", Norm(), {0, 3})]
    recorder, table = Recorder(), CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    options = {"accumulate": accumulate, "steps": 6}
    monitor = Monitor(tmp_path / "run.zarr", watches, log=True)
    watched = train([monitor], logger=[recorder, table], **options)
    assert same(watched, train([], **options))
    store = Trajectory(tmp_path / "run.zarr", "r")
    expected = [
        (step, {f"devmon/mixed/{v}": float(store["mixed"][v].sel(step=step)) for v in ("a", "b")})
        for step in (0, 2, 4, 6)
    ] + [(step, {"devmon/norm/norm": float(store["norm"]["norm"].sel(step=step))}) for step in (0, 3)]
    assert sorted(recorder.rows, key=str) == sorted(expected, key=str)
    table.save()
    with open(Path(table.log_dir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [
        (int(row["step"]), key, float(row[key]))
        for row in rows
        for key in row
        if key.startswith("devmon/") and row[key]
    ]
    assert sorted(found) == sorted((step, key, value) for step, values in expected for key, value in values.items())


def test_the_llc_is_logged_with_its_error_and_verdict(tmp_path: Path) -> None:
    recorder = Recorder()
    train([LLCMonitor(tmp_path / "run.zarr", steps={0, 4}, log=True, **llc_settings())], logger=recorder, steps=4)
    derived = llc(Trajectory(tmp_path / "run.zarr", "r")["llc"])
    for step, row in recorder.rows:
        at = derived.sel(step=step)
        expected = {"llc": float(at["llc"]), "se": float(at["se"]), "accepted": float(at["verdict"].item() == "ok")}
        assert row == {f"devmon/llc/{key}": pytest.approx(value, rel=1e-12) for key, value in expected.items()}
    assert [step for step, _ in recorder.rows] == [0, 4]


def test_nothing_is_logged_by_default_and_what_is_held_is_not_logged_again(tmp_path: Path) -> None:
    silent, first, second = Recorder(), Recorder(), Recorder()
    watches = [Watch("norm", Norm(), every(1))]
    train([Monitor(tmp_path / "silent.zarr", watches)], logger=silent)
    assert silent.rows == []
    saved = CheckpointSeries(tmp_path / "saved", {4})
    train([Monitor(tmp_path / "run.zarr", watches, log=True), saved], logger=first, steps=6)
    train(
        [Monitor(tmp_path / "run.zarr", watches, log=True)], logger=second, steps=8, resume=latest(tmp_path / "saved")
    )
    assert [step for step, _ in first.rows] == list(range(7))
    assert [step for step, _ in second.rows] == [5, 6, 7, 8]


def test_a_logger_that_fails_is_warned_of_once_and_ends_training_only_if_strict(tmp_path: Path) -> None:
    watches = [Watch("norm", Norm(), every(1))]
    good = Recorder()
    with pytest.warns(
        UserWarning, match=r"norm was measured at step 0 but not logged \(ConnectionError: no network"
    ) as told:
        module = train(
            [Monitor(tmp_path / "run.zarr", watches, log=True)],
            logger=[good, Recorder(broken=True)],
            log_every_n_steps=1,
        )
    assert said(told) == ["norm was measured at step 0 but not logged"]
    assert Trajectory(tmp_path / "run.zarr", "r").steps("norm") == list(range(13))
    assert len(good.rows) == 13
    assert same(module, train([]))
    with pytest.raises(ConnectionError):
        train(
            [Monitor(tmp_path / "strict.zarr", watches, log=True, strict=True)],
            logger=Recorder(broken=True),
            log_every_n_steps=1,
        )


def test_the_one_line_forms_hand_the_options_on(tmp_path: Path) -> None:
    monitor = InductionMonitor(
        tmp_path / "run.zarr", vocab_size=5, strict=True, log=True, max_overhead=0.2, model="net"
    )
    assert (monitor.strict, monitor.log_numbers, monitor.max_overhead, monitor.model) == (True, True, 0.2, "net")


# -- the budget --------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


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
    """An optimizer step takes a second."""

    def on_train_batch_start(self, *_: Any) -> None:
        CLOCK.now += 1.0


@pytest.fixture(autouse=True)
def midnight() -> None:
    CLOCK.now = 0.0


def run(path: Path, watches: list[Watch], share: float | None, *callbacks: L.Callback, steps: int = 60,
        resume: Any = None) -> Trajectory:  # fmt: skip
    train([Ticks(), Monitor(path, watches, max_overhead=share, clock=CLOCK), *callbacks], steps=steps, resume=resume)
    return Trajectory(path, "r")


def test_the_examples_of_the_budget_hold() -> None:
    assert doctest.testmod(devmon.monitoring.budget).attempted > 4
    assert doctest.testmod(devmon.monitoring.budget).failed == 0


def test_costly_observations_are_left_out_and_listed_while_the_cheap_one_goes_on(tmp_path: Path) -> None:
    store = run(
        tmp_path / "run.zarr", [Watch("costly", Costs(2.0), every(5)), Watch("cheap", Costs(0.01), every(1))], 0.1
    )
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
    made = dict.fromkeys(names, 0)
    for step in range(3000):
        clock.now += 1.0
        with budget.at_work():
            for name in budget.choose(names, step):
                clock.now += costs[names.index(name)]
                budget.measured(name)
                made[name] += 1
    total = sum(made[name] * cost for name, cost in zip(names, costs, strict=True))
    assert budget.spent == pytest.approx(total)
    assert total / clock.now <= share * 1.001, f"{total / clock.now:.3f} of the time for a share of {share}"
    assert total / clock.now >= min(0.9 * share, 0.99 * sum(costs) / (sum(costs) + 1)), "the budget was not used"
    assert all(made[name] + len(budget.skipped.get(name, [])) == 3000 for name in names)
    assert min(made.values()) > 1, f"a watch was silenced: {made}"


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


def test_costs_are_series_where_they_are_asked_for(tmp_path: Path) -> None:
    store = run(tmp_path / "run.zarr", [Watch("norm", Norm(), every(5))], None, steps=10)
    assert [series.name for series in series_of(store)] == ["norm/norm"]
    (cost,) = [series for series in series_of(store, costs=True) if series.name == "norm/seconds"]
    assert cost.units == "s"
    assert cost.steps.tolist() == [0, 5, 10]
    np.testing.assert_array_equal(cost.values, store["norm"]["seconds"])
    assert (cost.values > 0).all()


# -- what is refused at the start --------------------------------------------------------------------------------------


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"watches": [Watch("other", Norm(), {9}), Watch("norm", Norm(2.0), {9})]}, "scale: stored 1.0, now 2.0"),
        ({"seed": 8}, "holds 'norm' at step 0 for weights"),
    ],
    ids=["another configuration, due later", "another run"],
)
def test_what_does_not_belong_to_the_store_is_refused_before_anything_is_set_aside(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "run.zarr"
    train([Monitor(path, [Watch("norm", Norm(), every(1))])], steps=6)
    before = contents(path)
    watches = change.get("watches", [Watch("norm", Norm(), every(1))])
    with pytest.raises(IdentityError, match=message):
        train([Monitor(path, watches)], steps=6, seed=change.get("seed", 7))
    assert contents(path) == before


def test_another_configuration_is_refused_at_a_resumption_before_rows_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    train([Monitor(path, [Watch("norm", Norm(), every(1))]), CheckpointSeries(tmp_path / "saved", {4})], steps=6)
    before = contents(path)
    with pytest.raises(IdentityError, match="scale: stored 1.0, now 2.0"):
        train([Monitor(path, [Watch("norm", Norm(2.0), {8})])], steps=9, resume=latest(tmp_path / "saved"))
    assert contents(path) == before


# -- failures and a full disk ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FailsAt:
    steps: tuple[int, ...]

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        if snapshot.step in self.steps:
            raise RuntimeError(f"no luck at {snapshot.step}")
        return Norm()(snapshot)


def test_failures_are_warned_of_once_a_process_and_a_resumption_measures_again(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    saved = CheckpointSeries(tmp_path / "saved", {4})
    watches = [Watch("fails", FailsAt((2, 3, 5)), every(1)), Watch("fails-too", FailsAt((3,)), every(1))]
    with pytest.warns(UserWarning, match="failed at step") as told:
        train([Monitor(path, watches), saved], steps=6)
    assert said(told) == ["fails failed at step 2", "fails-too failed at step 3"]
    watches = [Watch("fails", FailsAt((2, 3, 5)), every(1)), Watch("fails-too", FailsAt((3,)), every(1))]
    with pytest.warns(UserWarning, match="fails failed at step 5") as told:
        train([Monitor(path, watches)], steps=8, resume=latest(tmp_path / "saved"))
    assert said(told) == ["fails failed at step 5"]
    store = Trajectory(path, "r")
    assert store.failures("fails") == {step: f"RuntimeError: no luck at {step}" for step in (2, 3, 5)}
    assert store.steps("fails") == [0, 1, 4, 6, 7, 8]
    assert store.steps("fails-too") == [0, 1, 2, 4, 5, 6, 7, 8]


class Disk(L.Callback):
    """Full from `full` on and free again from `free` on (optimizer steps done when the next one starts).

    Full means that the store's methods refuse; with `limit`, that the system lets this process write to no file.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, full: int = 2, free: int = 10**9, limit: bool = False) -> None:
        self.full, self.free, self.limit, self.refused = full, free, limit, 0
        self.allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.is_full = False
        for method in ("append", "fail", "record", "fold"):
            monkeypatch.setattr(Trajectory, method, self.refusing(getattr(Trajectory, method)))

    def refusing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if not self.is_full:
                return method(*args, **kwargs)
            self.refused += 1
            if self.limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, self.allowed[1]))
                try:
                    return method(*args, **kwargs)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, self.allowed)
            raise StoreError("cannot write (No space left on device)") from OSError(
                errno.ENOSPC, "No space left on device"
            )

        return refuse

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.is_full = self.full <= trainer.global_step < self.free


WATCHES = [Watch("norm", Norm(), every(1)), Watch("twice", Norm(2.0), every(2))]


@pytest.mark.parametrize("limit", [False, True])
def test_a_full_disk_is_warned_of_once_a_watch_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: bool
) -> None:
    disk = Disk(monkeypatch, full=3, free=7, limit=limit)
    with pytest.warns(UserWarning, match=r"cannot write.*(No space left on device|File too large)") as told:
        module = train([disk, Monitor(tmp_path / "run.zarr", WATCHES)])
    assert said(told) == ["norm failed at step 4", "twice failed at step 4"]
    assert disk.refused >= 6
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert store.steps("norm") == [0, 1, 2, 3, 8, 9, 10, 11, 12]
    assert store.steps("twice") == [0, 2, 8, 10, 12]
    assert sorted(store.failures("norm")) == [4, 5, 6, 7]  # written when that could be written again
    assert sorted(store.failures("twice")) == [4, 6]
    assert all("StoreError: cannot write" in reason for reason in store.failures("norm").values())
    assert same(module, train([]))


def test_a_disk_that_stays_full_leaves_what_was_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, full=3)
    with pytest.warns(UserWarning, match="No space left on device") as told:
        module = train([disk, Monitor(tmp_path / "run.zarr", WATCHES, max_overhead=0.9, clock=CLOCK)])
    norm, twice, end = said(told)
    assert (norm, twice) == ("norm failed at step 4", "twice failed at step 4")
    assert end.endswith("was not tidied up at the end")
    disk.is_full = False
    store = Trajectory(tmp_path / "run.zarr")
    assert store.steps("norm") == [0, 1, 2, 3]
    store.fold()
    assert store.steps("twice") == [0, 2]
    assert same(module, train([]))


def test_a_full_disk_ends_a_strict_training_and_the_committed_rows_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, full=3)
    with (
        pytest.warns(UserWarning, match="not tidied up"),
        pytest.raises(StoreError, match="cannot write"),
    ):
        train([disk, Monitor(tmp_path / "run.zarr", WATCHES, strict=True)])
    assert Trajectory(tmp_path / "run.zarr", "r").steps("norm") == [0, 1, 2, 3]


def test_an_exception_of_training_is_raised_as_it_is_although_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == 5:
                raise ValueError("the training's own")

    with pytest.warns(UserWarning, match="not tidied up"), pytest.raises(ValueError, match="the training's own"):
        train([Disk(monkeypatch, full=4), Monitor(tmp_path / "run.zarr", [Watch("norm", Norm(), {0, 2})]), Fails()])


def test_a_store_that_is_taken_away_does_not_end_training(tmp_path: Path) -> None:
    class TakenAway(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3 and (tmp_path / "run.zarr").is_dir():
                os.rename(tmp_path / "run.zarr", tmp_path / "elsewhere")
                (tmp_path / "run.zarr").write_text("")  # so that it is not made anew

    with pytest.warns(UserWarning, match="failed at step 4|not tidied") as told:
        module = train([TakenAway(), Monitor(tmp_path / "run.zarr", WATCHES)])
    assert said(told)[:2] == ["norm failed at step 4", "twice failed at step 4"]
    assert Trajectory(tmp_path / "elsewhere", "r").steps("norm") == [0, 1, 2, 3]
    assert same(module, train([]))


def test_a_store_that_is_refused_ends_training_also_where_failures_are_tolerated(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Grows:
        def __call__(self, snapshot: Snapshot) -> xr.Dataset:
            return xr.Dataset({"x": ("head", np.zeros(1 + snapshot.step))})

    with pytest.raises(IdentityError, match="'grows' at step 1 differs in form"):
        train([Monitor(tmp_path / "run.zarr", [Watch("grows", Grows(), every(1))])])
