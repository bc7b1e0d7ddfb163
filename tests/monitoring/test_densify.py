"""`Monitor(densify=True)`: denser while an alarm is up, recorded as such, and nothing else changes."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

from devmon import LoopMonitor, Snapshot, StoreError, Trajectory, Watch, every, log_spaced
from devmon.analysis import series_of
from devmon.callbacks import CheckpointSeries, Monitor, checkpoints
from devmon.cli.root import app
from tests.support.lightning_toys import Disk, Norm, train
from tests.support.loops import Recorder, fit, same, seeded
from tests.support.loops import train as train_plain
from tests.support.two_ranks import after, spawn_two

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*", "ignore:.*dataloader.*")
LAST = 150
ENOUGH = 90  # the alarm is up
SCHEDULE = log_spaced(52, LAST)
SCHEDULED = [step for step in range(LAST + 1) if step in SCHEDULE]


@dataclass(frozen=True)
class Rises:
    """A score that jumps near step 50, with noise that only the step decides."""

    at: float = 50.0

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        noise = 0.01 * np.random.default_rng([3, snapshot.step]).standard_normal()
        return xr.Dataset({"score": ((), float(snapshot.step >= self.at) + noise)})


def watches(at: float = 50.0) -> list[Watch]:
    return [Watch("rises", Rises(at), SCHEDULE), Watch("norm", Norm(), {0, 40, LAST})]


def weights(module: torch.nn.Module) -> list[Any]:
    return [value.tolist() for value in module.state_dict().values()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained with checkpoints before and behind the monitor; the final weights are compared in place."""
    folder = tmp_path_factory.mktemp("densify")
    series = [CheckpointSeries(folder / name, {60, 65, 70}) for name in ("before", "behind")]
    monitor = Monitor(folder / "run.zarr", watches(), densify=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watched = train([series[0], monitor, series[1]], steps=LAST)
        assert weights(watched) == weights(train([], steps=LAST))
    return folder


def test_points_are_added_while_the_alarm_is_up_and_the_record_tells_them(run: Path) -> None:
    store = Trajectory(run / "run.zarr", "r")
    (alarm,) = [alarm for alarm in store.attrs["alarms"] if alarm["series"] == "rises/score"]
    assert alarm["kind"] == "jump"
    assert 45 <= alarm["step"] <= 55
    assert alarm["status"] == "settled"
    added = store.attrs["densified"]
    assert added["rises"], "nothing was added: the test shows nothing"
    assert all(alarm["raised_at"] < step <= alarm["ended_at"] for steps in added.values() for step in steps)
    assert store.steps("rises") == sorted([*SCHEDULED, *added["rises"]])
    assert store.steps("norm") == sorted([0, 40, LAST, *added["norm"]])
    for name in added:
        steps = np.array(store.steps(name))
        assert all(step >= 1.05 * steps[steps < step][-1] for step in added[name])
    up = list(range(alarm["raised_at"] + 1, alarm["ended_at"]))
    norm = np.array(store.steps("norm"))
    assert all(any(norm[norm <= step] > step / 1.05 - 1) for step in up), "the gaps are at most 5%"
    (scheduled,) = [series for series in series_of(store, scheduled_only=True) if series.name == "rises/score"]
    assert scheduled.steps.tolist() == SCHEDULED
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["show", str(run / "run.zarr")]).output
    assert f"alarm at step {alarm['raised_at']} of a jump of rises/score" in shown
    assert f"measured only because an alarm was up: norm at {len(added['norm'])} steps" in shown


def test_checkpoints_are_saved_at_the_added_steps_on_either_side_of_the_monitor(run: Path) -> None:
    added = Trajectory(run / "run.zarr", "r").attrs["densified"]
    wanted = sorted({60, 65, 70, *added["rises"], *added["norm"]})
    assert list(checkpoints(run / "before")) == wanted
    assert list(checkpoints(run / "behind")) == wanted


@pytest.mark.parametrize("stopped", [70, 80])
def test_a_resumption_goes_on_as_if_it_had_never_stopped(run: Path, tmp_path: Path, stopped: int) -> None:
    whole = Trajectory(run / "run.zarr", "r")
    (alarm,) = whole.attrs["alarms"]
    assert 70 < alarm["raised_at"] < 80 < alarm["ended_at"], "one stop before the alarm, one while it is up"
    train([Monitor(tmp_path / "run.zarr", watches(), densify=True)], steps=stopped + 10)
    resume = run / "behind" / f"step-{stopped:08d}.ckpt"
    train([Monitor(tmp_path / "run.zarr", watches(), densify=True)], steps=LAST, resume=resume)
    again = Trajectory(tmp_path / "run.zarr", "r")
    for key in ("alarms", "densified"):
        assert again.attrs[key] == whole.attrs[key]
    assert again.steps("norm") == whole.steps("norm")
    assert again.steps("rises") == whole.steps("rises")


def test_without_an_alarm_and_without_the_option_the_schedule_is_kept(tmp_path: Path) -> None:
    train([Monitor(tmp_path / "flat.zarr", watches(1e9), densify=True)], steps=60)
    flat = Trajectory(tmp_path / "flat.zarr", "r")
    assert flat.steps("rises") == [step for step in SCHEDULED if step <= 60]
    assert "densified" not in flat.attrs
    assert "alarms" not in flat.attrs
    train([Monitor(tmp_path / "run.zarr", watches(), densify=True)], steps=60)
    train([Monitor(tmp_path / "off.zarr", watches())], steps=60)
    off = Trajectory(tmp_path / "off.zarr", "r")
    assert off.steps("rises") == flat.steps("rises")
    for name in ("rises", "norm"):  # the schedule is no part of who measures
        assert off[name].attrs["fingerprint"] == Trajectory(tmp_path / "run.zarr", "r")[name].attrs["fingerprint"]


@pytest.mark.parametrize("loop", ["fabric", "trainer", "plain"])
def test_every_loop_adds_the_points_that_lightning_adds(run: Path, tmp_path: Path, loop: str) -> None:
    # Only what the steps decide is watched, so that all loops see the same numbers and raise the same alarm.
    rises = [watches()[0], Watch("later", Rises(1e9), {0, 40, LAST})]
    watched = fit(loop, tmp_path / "run.zarr", rises, steps=LAST, densify=True)
    assert same(watched, fit(loop, None, [], steps=LAST))
    store, lightning = Trajectory(tmp_path / "run.zarr", "r"), Trajectory(run / "run.zarr", "r")
    assert store.attrs["alarms"] == lightning.attrs["alarms"]
    assert store.attrs["densified"]["rises"] == lightning.attrs["densified"]["rises"]
    assert store.attrs["densified"]["later"] == lightning.attrs["densified"]["norm"]
    assert store.steps("rises") == lightning.steps("rises")


def test_what_the_budget_leaves_out_is_not_added_again_at_once(tmp_path: Path) -> None:
    monitor = LoopMonitor(tmp_path / "run.zarr", [Watch("norm", Norm(), {0, 100})], densify=True)
    densify = monitor.densify
    assert densify is not None
    densify.up, densify.last = True, {"norm": 100}
    assert [step for step in range(101, 130) if densify.due(step, [])] == [105, 111, 117, 123]  # asked, not measured


def test_points_are_recorded_before_they_are_measured_and_left_out_where_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(step: int, strict: bool = False) -> list[str]:
        watches = [Watch("norm", Norm(), {0}), Watch("twice", Norm(2.0), {step})]
        monitor = LoopMonitor(tmp_path / "run.zarr", watches, densify=True, strict=strict)
        assert monitor.densify is not None
        return monitor.densify.choose(step, ["norm", "twice"])

    assert choose(130) == ["norm", "twice"]
    assert Trajectory(tmp_path / "run.zarr", "r").attrs["densified"] == {"norm": [130]}
    Disk(monkeypatch, full=0).at(0)
    with pytest.warns(UserWarning, match=r"no alarms are raised \(cannot write"):
        assert choose(140) == ["twice"]  # due by schedule
    with pytest.raises(StoreError, match="cannot write"):
        choose(140, strict=True)


def test_a_resumption_forgets_the_added_points_that_it_sets_aside(tmp_path: Path) -> None:
    watches = [Watch("norm", Norm(), every(1))]
    with LoopMonitor(tmp_path / "run.zarr", watches) as monitor:
        model = train_plain(monitor, seeded(), range(1, 4))
        kept = {key: value.clone() for key, value in model.state_dict().items()}
        train_plain(monitor, model, range(4, 8))
    Trajectory(tmp_path / "run.zarr").record(densified={"norm": [2, 6]})
    model.load_state_dict(kept)
    with LoopMonitor(tmp_path / "run.zarr", watches) as monitor:  # without the option too: 6 is a scheduled step now
        train_plain(monitor, model, range(4, 8))
    assert Trajectory(tmp_path / "run.zarr", "r").attrs["densified"] == {"norm": [2]}


def two_processes(rank: int, folder: Path) -> None:
    callbacks: list[L.Callback] = [
        Monitor(folder / "run.zarr", watches(), densify=True),
        CheckpointSeries(folder / "saved", {0}),
    ]
    results = {"watched": after(train(callbacks, steps=ENOUGH, strategy="ddp", devices=2))}
    results["alone"] = after(train([], steps=ENOUGH, strategy="ddp", devices=2))
    (folder / f"{rank}.json").write_text(json.dumps(results))


def test_two_ranks_add_the_points_that_one_adds(run: Path, tmp_path: Path) -> None:
    spawn_two(two_processes, tmp_path)
    for rank in range(2):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert results["watched"] == results["alone"]
    one, two = Trajectory(run / "run.zarr", "r"), Trajectory(tmp_path / "run.zarr", "r")
    assert two.attrs["densified"]["rises"] == [s for s in one.attrs["densified"]["rises"] if s <= ENOUGH] != []
    assert two.steps("rises") == [step for step in one.steps("rises") if step <= ENOUGH]
    assert list(checkpoints(tmp_path / "saved")) == [0, *sorted(set().union(*two.attrs["densified"].values()))]


class Board(Recorder):
    """A logger whose `experiment` takes words, as those of Weights & Biases (`alert`) and TensorBoard (`add_text`)."""

    def __init__(self, taker: str) -> None:
        super().__init__()
        self.told: list[str] = []
        takers: dict[str, Any] = {
            "alert": lambda title, text: self.told.append(f"{title} | {text}"),
            "add_text": lambda name, text, step: self.told.append(f"{name} {step} | {text}"),
        }
        self.experiment = SimpleNamespace(**{taker: takers[taker]})


@pytest.mark.parametrize("taker", ["alert", "add_text"])
def test_an_alarm_reaches_the_logger_once_in_words_and_as_a_number(tmp_path: Path, taker: str) -> None:
    path, board = tmp_path / "run.zarr", Board(taker)
    fit("lightning", path, watches(), steps=LAST, logger=board, densify=True)
    (alarm,) = Trajectory(path, "r").attrs["alarms"]
    raised = [text for text in board.told if "(provisional)" in text]
    assert len(raised) == 1
    assert f"rises/score has a jump at step {alarm['step']:.0f}" in raised[0]
    assert f"step {alarm['raised_at']}" in raised[0]
    ended = [text for text in board.told if text not in raised]
    assert len(ended) == (alarm["status"] != "up")
    numbers = [(step, row["devmon/alarms"]) for step, row in board.rows if "devmon/alarms" in row]
    assert numbers[0] == (alarm["raised_at"], 1.0)
    assert len(numbers) == len(board.told)


def test_a_run_that_goes_on_does_not_tell_its_alarms_again(tmp_path: Path) -> None:
    path, sent = tmp_path / "run.zarr", Board("alert")
    model = torch.nn.Linear(2, 1)
    for first, last in ((0, ENOUGH), (ENOUGH, ENOUGH + 10)):
        with LoopMonitor(path, watches(), densify=True, log=sent) as monitor:
            for step in range(first, last + 1):
                monitor.step(step, model)
    assert sum("(provisional)" in text for text in sent.told) == 1
