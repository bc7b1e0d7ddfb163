"""The logger mirror: what is sent, to whom, once, in every loop; and what a broken logger does."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from lightning.pytorch.loggers import CSVLogger

from devmon import DevmonError, LoopMonitor, Snapshot, Trajectory, Watch, every
from devmon.analysis import llc
from devmon.analysis.derive.verdicts import accepted
from devmon.callbacks import CheckpointSeries, LLCMonitor, Monitor, TrainerMonitor, latest
from devmon.sampling import classification_loss
from tests.support.lightning_toys import Norm
from tests.support.lightning_toys import train as train_by_lightning
from tests.support.loops import LOOPS, Recorder, fit, messages, same, seeded, train, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*", "ignore:.*dataloader.*")


@dataclass(frozen=True)
class Mixed:
    """Scalars, of which two are headlines, an array and a label."""

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        norm = float(Norm()(snapshot)["norm"])
        data = {"a": ((), norm), "b": ((), 3), "c": ((), 0.5), "heads": ("head", [0.1, 0.2]), "word": ((), "x")}
        return xr.Dataset(data, {"head": [0, 1]}, {"headline": ["a", "b", "heads", "word"]})


WATCHES = [Watch("mixed", Mixed(), every(2)), Watch("norm", Norm(), {0, 3})]


def expected(run: Path) -> list[tuple[int, dict[str, float]]]:
    """What the rows of the run say should have been sent up to step 6."""
    store = Trajectory(run, "r")
    mixed = [
        (step, {f"devmon/mixed/{v}": float(store["mixed"][v].sel(step=step)) for v in ("a", "b")})
        for step in (0, 2, 4, 6)
    ]
    return mixed + [(step, {"devmon/norm/norm": float(store["norm"]["norm"].sel(step=step))}) for step in (0, 3)]


def llc_settings() -> dict[str, Any]:
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(3))
    return {"data": (x, (x[:, 0] > 0).long()), "loss": classification_loss, "nbeta": 20.0, "gamma": 50.0, "lr": 1e-3,
            "chains": 2, "draws": 12, "burn_in": 4, "batch_size": 20}  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS)
def test_headline_scalars_reach_the_loggers_of_every_loop_and_training_is_untouched(tmp_path: Path, loop: str) -> None:
    recorder = Recorder()
    watched = fit(loop, tmp_path / "run.zarr", WATCHES, steps=6, logger=recorder)
    assert sorted(recorder.rows, key=str) == sorted(expected(tmp_path / "run.zarr"), key=str)
    assert same(watched, fit(loop, None, [], steps=6))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_headline_scalars_reach_every_logger_once_at_the_optimizer_step(tmp_path: Path, accumulate: int) -> None:
    recorder, table = Recorder(), CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    options = {"accumulate": accumulate, "steps": 6}
    watched = train_by_lightning(
        [Monitor(tmp_path / "run.zarr", WATCHES, log=True)], logger=[recorder, table], **options
    )
    assert same(watched, train_by_lightning([], **options))
    rows = expected(tmp_path / "run.zarr")
    assert sorted(recorder.rows, key=str) == sorted(rows, key=str)
    table.save()
    with open(Path(table.log_dir) / "metrics.csv", newline="") as file:
        written = [
            (int(row["step"]), key, float(row[key]))
            for row in csv.DictReader(file)
            for key in row
            if key.startswith("devmon/") and row[key]
        ]
    assert sorted(written) == sorted((step, key, value) for step, values in rows for key, value in values.items())


class ByScalar:
    """A logger as TensorBoard's writer is."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        assert global_step is not None
        self.rows.append((tag, scalar_value, global_step))


class ByStep:
    """A logger as a run of Weights & Biases is. It could be called too, and must not be."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, int]] = []

    def log(self, data: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows += [(name, value, step) for name, value in data.items()]

    def __call__(self, *_: Any) -> None:
        raise AssertionError("the logger was called")


def test_a_plain_loop_logs_to_any_kind_of_logger_and_to_a_function(tmp_path: Path) -> None:
    rows: list[tuple[str, float, int]] = []

    def function(values: dict[str, float], step: int) -> None:
        rows.extend((name, value, step) for name, value in values.items())

    by_scalar, by_step = ByScalar(), ByStep()
    for name, log in {"function": function, "scalar": by_scalar, "step": by_step}.items():
        with LoopMonitor(tmp_path / name, [Watch("norm", Norm(), every(3))], log=log) as monitor:
            train(monitor, seeded())
    norms = Trajectory(tmp_path / "function", "r")["norm"]["norm"]
    assert rows == [("devmon/norm/norm", float(norms.sel(step=step)), step) for step in (0, 3, 6, 9, 12)]
    assert by_scalar.rows == by_step.rows == rows


@pytest.mark.parametrize("log", [True, "wandb", 3])
def test_what_is_no_logger_is_refused_before_training(tmp_path: Path, log: Any) -> None:
    with pytest.raises(DevmonError, match=rf"log is a logger .* or a function of \(values, step\), got {log!r}"):
        LoopMonitor(tmp_path / "run.zarr", [], log=log)
    assert not (tmp_path / "run.zarr").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_logs_its_own_numbers_as_without_the_monitor(tmp_path: Path) -> None:
    with pytest.raises(DevmonError, match=r"trainer\.add_callback\(TrainerMonitor\(\.\.\., log=trainer\)\)"):
        TrainerMonitor(tmp_path / "run.zarr", [], log=True)
    logged = []
    for watched in (False, True):
        training = trainer(tmp_path / "out", [], logging_strategy="steps", logging_steps=2)
        if watched:
            training.add_callback(
                TrainerMonitor(tmp_path / "run.zarr", [Watch("norm", Norm(), every(1))], log=training)
            )
        training.train()
        logged.append(training.state.log_history)
    own = [[(row["step"], row["loss"]) for row in history if "loss" in row] for history in logged]
    assert [step for step, _ in own[0]] == [2, 4, 6, 8]
    assert own[1] == own[0]
    assert [row["step"] for row in logged[1] if "devmon/norm/norm" in row] == list(range(9))


def test_the_llc_is_logged_with_its_error_and_verdict(tmp_path: Path) -> None:
    recorder = Recorder()
    monitor = LLCMonitor(tmp_path / "run.zarr", steps={0, 4}, log=True, **llc_settings())
    train_by_lightning([monitor], logger=recorder, steps=4)
    traces = Trajectory(tmp_path / "run.zarr", "r")["llc"]
    for step, row in recorder.rows:
        at = llc(traces.sel(step=step))  # alone: later steps are not known yet
        values = {"llc": float(at["llc"]), "se": float(at["se"]), "accepted": float(accepted(at["verdict"].item()))}
        assert row == {f"devmon/llc/{key}": pytest.approx(value, rel=1e-12) for key, value in values.items()}
    assert [step for step, _ in recorder.rows] == [0, 4]


def test_nothing_is_logged_by_default_and_what_is_held_is_not_logged_again(tmp_path: Path) -> None:
    silent, first, second = Recorder(), Recorder(), Recorder()
    watches = [Watch("norm", Norm(), every(1))]
    train_by_lightning([Monitor(tmp_path / "silent.zarr", watches)], logger=silent)
    assert silent.rows == []
    saved = CheckpointSeries(tmp_path / "saved", {4})
    train_by_lightning([Monitor(tmp_path / "run.zarr", watches, log=True), saved], logger=first, steps=6)
    again = Monitor(tmp_path / "run.zarr", watches, log=True)
    train_by_lightning([again], logger=second, steps=8, resume=latest(tmp_path / "saved"))
    assert [step for step, _ in first.rows] == list(range(7))
    assert [step for step, _ in second.rows] == [5, 6, 7, 8]


def test_a_logger_that_fails_is_warned_of_once_and_ends_training_only_if_strict(tmp_path: Path) -> None:
    watches = [Watch("norm", Norm(), every(1))]
    good, broken = Recorder(), Recorder(broken=True)
    text = r"norm was measured at step 0 but not logged \(ConnectionError: no network"
    monitor = Monitor(tmp_path / "run.zarr", watches, log=True)
    with pytest.warns(UserWarning, match=text) as warned:
        module = train_by_lightning([monitor], logger=[good, broken], log_every_n_steps=1)
    assert messages(warned) == ["norm was measured at step 0 but not logged"]
    assert Trajectory(tmp_path / "run.zarr", "r").steps("norm") == list(range(13))
    assert len(good.rows) == 13
    assert same(module, train_by_lightning([]))
    monitor = Monitor(tmp_path / "strict.zarr", watches, log=True, strict=True)
    with pytest.raises(ConnectionError):
        train_by_lightning([monitor], logger=broken, log_every_n_steps=1)
