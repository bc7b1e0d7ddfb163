"""What ends training, and when: a misfit before the first batch, and afterwards nothing that an instrument does."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import xarray as xr

from devmon import InstrumentError, LoopMonitor, Snapshot, Trajectory, Watch, every, log_spaced, observe, presets
from devmon.callbacks import CheckpointSeries, Monitor, TrainerMonitor, checkpoints
from devmon.errors import DataError, DevmonError, StoreError
from devmon.instruments import LLC, Curvature
from devmon.sampling import regression_loss
from tests.support.lightning_toys import Net, Norm, train
from tests.support.loops import FailsAt, fit, messages, same, seeded, trainer
from tests.support.loops import train as train_plainly
from tests.support.models import VOCAB, random_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*", "ignore:.*dataloader.*")


@dataclass(frozen=True)
class Returns:
    """What `make` makes of the step."""

    make: Callable[[int], Any]

    def __call__(self, snapshot: Snapshot) -> Any:
        return self.make(snapshot.step)


# -- at the start ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["lightning", "plain", "trainer", "fabric"])
def test_every_watch_is_tried_before_the_first_batch_and_all_misfits_are_named(tmp_path: Path, loop: str) -> None:
    watches = [
        Watch("later", FailsAt((0,), InstrumentError), {8}),
        Watch("fits", Norm(), {8}),
        Watch("now", FailsAt((0,), DataError), every(1)),
        Watch("other", FailsAt((0,), RuntimeError), {8}),  # an error of the moment is no misfit
    ]
    batches: list[int] = []
    said = r"2 watches do not fit this model \(now: no luck at 0; later: no luck at 0\).*not in \('now', 'later'\)"
    with pytest.raises(InstrumentError, match=said):
        fit(loop, tmp_path / "run.zarr", watches, before=batches.append)
    assert not [step for step in batches if step > 0]
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert not [step for name in store for step in store.steps(name)]
    assert "fits" not in store, "a trial leaves nothing"


def test_what_was_measured_before_is_not_tried_again(tmp_path: Path) -> None:
    watches = [Watch("norm", Norm(), {0}), Watch("fails", FailsAt((2,), InstrumentError), {0, 5})]
    with LoopMonitor(tmp_path / "run.zarr", watches) as monitor:
        train_plainly(monitor, seeded(), range(1, 2))
    with LoopMonitor(tmp_path / "run.zarr", watches) as monitor:
        monitor.step(2, seeded())
    assert Trajectory(tmp_path / "run.zarr", "r").steps("fails") == [0]


# -- afterwards ------------------------------------------------------------------------------------------------------

LATE: dict[str, Any] = {
    "misfit": FailsAt((5,), InstrumentError),
    "data": FailsAt((5,), DataError),
    "store": FailsAt((5,), StoreError),
    "any": FailsAt((5,), ZeroDivisionError),
    "no dataset": Returns(lambda step: 3.0 if step == 5 else xr.Dataset({"x": 1.0})),
    "another form": Returns(lambda step: xr.Dataset({"x": ("head", np.zeros(3 if step == 5 else 2))})),
    "another variable": Returns(lambda step: xr.Dataset({"y" if step == 5 else "x": 1.0})),
    "its own step": Returns(lambda step: xr.Dataset({"x": 1.0}).expand_dims(step=[1] if step == 5 else [])
                            if step == 5 else xr.Dataset({"x": 1.0})),
    "not to be stored": Returns(lambda step: xr.Dataset({"x": ((), object() if step == 5 else 1.0)})),
    "complex": Returns(lambda step: xr.Dataset({"x": ((), 1j if step == 5 else 1.0)})),
}  # fmt: skip


@pytest.mark.parametrize("kind", LATE)
def test_nothing_that_shows_late_ends_training_unless_strict(tmp_path: Path, kind: str) -> None:
    watches = [Watch("late", LATE[kind], every(1)), Watch("norm", Norm(), every(1))]
    with (
        pytest.warns(UserWarning, match="late failed at step 5") as warned,
        LoopMonitor(tmp_path / "run.zarr", watches, densify=True, log=lambda values, step: None) as monitor,
    ):
        model = train_plainly(monitor, seeded())
    assert messages(warned) == ["late failed at step 5"]
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert store.steps("norm") == list(range(13))
    assert store.steps("late") == [step for step in range(13) if step != 5]
    assert list(store.failures("late")) == [5]
    assert same(model, train_plainly(None, seeded()))
    with pytest.raises(Exception) as caught:  # noqa: PT011
        train_plainly(LoopMonitor(tmp_path / "strict.zarr", watches, strict=True), seeded())
    assert not isinstance(caught.value, AssertionError)
    assert Trajectory(tmp_path / "strict.zarr", "r").steps("norm") == list(range(5))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_a_failure_of_each_instrument_and_no_more(tmp_path: Path, value: float) -> None:
    data = (torch.randn(20, 5), torch.randn(20, 3))
    watches = [
        Watch(
            "llc", LLC(data, regression_loss, nbeta=9.0, gamma=1.0, lr=1e-3, chains=2, draws=3, batch_size=9), every(1)
        ),
        Watch("curvature", Curvature(data, loss=regression_loss, top=2, probes=2), every(1)),
        Watch("norm", Norm(), every(1)),
    ]
    model = Net().net
    with LoopMonitor(tmp_path / "run.zarr", watches) as monitor:
        for step in range(4):
            with torch.no_grad():
                model[0].weight[0, 0] = value if step in (1, 2) else 1.0
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                monitor.step(step, model)
            said = [str(warning.message).partition(" (")[0] for warning in warned]
            assert said == (["llc failed at step 1", "curvature failed at step 1"] if step == 1 else [])
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert store.steps("norm") == [0, 1, 2, 3]
    for name in ("llc", "curvature"):
        assert store.steps(name) == [0, 3]
        assert list(store.failures(name)) == [1, 2]


def test_no_watch_of_the_presets_ends_a_sweep_over_weights_that_are_not_finite(tmp_path: Path) -> None:
    """The first checkpoint too: it says nothing of whether the model fits."""
    model = random_model(0, length=96).float()
    tokens = torch.randint(0, VOCAB, (16, 32), generator=torch.Generator().manual_seed(0))
    watches = presets.full(tokens, vocab_size=VOCAB, last=4)
    with torch.no_grad():
        next(model.parameters())[0, 0] = float("nan")
    store = Trajectory(tmp_path / "run.zarr")
    failures: dict[str, dict[int, str]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = observe(0, model, watches, store, strict=False, failures=failures)
    assert set(done) | set(failures) == {watch.name for watch in watches if 0 in watch.steps}


def test_graphs_that_a_module_keeps_do_not_end_training(tmp_path: Path) -> None:
    """As `self.outs.append(loss)` does, which Lightning's own guides recommended."""

    class Keeps(Net):
        def __init__(self) -> None:
            super().__init__()
            self.outs: list[Any] = []

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            self.outs.append({"loss": super().training_step(batch, index), "index": index})
            return self.outs[-1]["loss"]

    module = train([Monitor(tmp_path / "run.zarr", [Watch("norm", Norm(), every(2))])], make=Keeps)
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert store.steps("norm") == [0, 2, 4, 6, 8, 10, 12]
    assert not store.failures("norm")
    assert module.outs[-1]["loss"].grad_fn is not None
    assert same(module, train([], make=Keeps))


# -- steps -----------------------------------------------------------------------------------------------------------


class Two(Net):
    """A GAN's way: two optimizers, so that `global_step` moves by 2 a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], index: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.SGD(self.net[4].parameters(), 0.1)]


@pytest.mark.parametrize("densify", [False, True])
def test_a_step_that_is_passed_over_is_measured_at_the_next_and_the_run_says_so(tmp_path: Path, densify: bool) -> None:
    watches = [Watch("odd", Norm(), range(1, 40, 4)), Watch("all", Norm(2.0), every(1)), Watch("even", Norm(3.0), {4})]
    series = CheckpointSeries(tmp_path / "saved", {3, 8})
    train([Monitor(tmp_path / "run.zarr", watches, densify=densify), series], make=Two, steps=40)
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert store.steps("odd") == list(range(2, 41, 4))
    assert store.steps("all") == list(range(0, 41, 2))
    assert store.steps("even") == [4]
    assert store.attrs["meant"] == {"odd": {str(step + 1): step for step in range(1, 40, 4)}}
    assert "densified" not in store.attrs
    assert list(checkpoints(tmp_path / "saved")) == [4, 8]


def test_steps_passed_over_in_a_plain_loop_count_once_and_a_resumption_forgets_those_before(tmp_path: Path) -> None:
    model = seeded()
    watches = [Watch("norm", Norm(), every(3)), Watch("late", Norm(2.0), {5})]
    with LoopMonitor(tmp_path / "run.zarr", watches) as monitor:
        for step in (0, 10, 11, 12, 20):
            monitor.step(step, model)
    store = Trajectory(tmp_path / "run.zarr")
    assert store.steps("norm") == [0, 10, 12, 20]
    assert store.attrs["meant"] == {"norm": {"10": 9, "20": 18}, "late": {"10": 5}}
    with LoopMonitor(tmp_path / "run.zarr", watches) as monitor:
        monitor.step(12, model)  # due steps before 12 are no business of this training
        monitor.step(13, model)
    assert store.steps("norm") == [0, 10, 12]
    assert store.attrs["meant"] == {"norm": {"10": 9}, "late": {"10": 5}}


def test_monitors_travel_to_the_processes_of_ddp_spawn(tmp_path: Path) -> None:
    tokens = torch.randint(0, VOCAB, (16, 32))
    steps = every(3, start=1) | log_spaced(5, 100) | {7} | range(50, 60)
    watches = [Watch("norm", Norm(), steps), *presets.standard(tokens, vocab_size=VOCAB, last=100)]
    monitor = Monitor(tmp_path / "run.zarr", watches, model="net", max_overhead=0.5, densify=True, log=True)
    (copied, *_) = pickle.loads(pickle.dumps(monitor)).watches
    assert [s for s in range(200) if s in copied.steps] == [s for s in range(200) if s in steps]
    assert repr(copied.steps) == repr(steps)
    assert pickle.loads(pickle.dumps(CheckpointSeries(tmp_path, every(2, stop=8)))).steps.text == "every(2, stop=8)"


@pytest.mark.parametrize("loop", ["lightning", "trainer"])
def test_what_was_trained_with_is_copied_pickled_and_trained_with_again(tmp_path: Path, loop: str) -> None:
    monitor: Any = (Monitor if loop == "lightning" else TrainerMonitor)(
        tmp_path / "a.zarr", [Watch("norm", Norm(), every(4))]
    )
    if loop == "lightning":
        train([monitor], steps=5)
    else:
        trainer(tmp_path, [monitor], max_steps=5).train()
    assert monitor.loop.optimizer is None, "the next training has another"
    for twin in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert twin.trajectory.steps("norm") == [0, 4]
    if loop == "lightning":
        train([monitor], steps=9)
        assert monitor.trajectory.steps("norm") == [0, 4, 8]


def test_a_training_whose_steps_lightning_does_not_count_is_told(tmp_path: Path) -> None:
    class Manual(Net):
        own: Any = None

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[torch.Tensor], number: int) -> None:  # type: ignore[override]
            self.own = self.own or torch.optim.SGD(self.parameters(), 0.1)
            super().training_step(batch, number).backward()
            self.own.step()

    with pytest.warns(UserWarning, match="counts no step: global_step is 0 after 24 batches.*self.optimizers") as told:
        train([Monitor(tmp_path / "a.zarr", [Watch("norm", Norm(), every(1))])], make=Manual, steps=-1, max_epochs=2)
    assert sum("counts no step" in str(warning.message) for warning in told) == 1


def test_steps_are_whole_numbers_of_any_library(tmp_path: Path) -> None:
    model = seeded()
    with LoopMonitor(tmp_path / "run.zarr", [Watch("norm", Norm(), every(1))]) as monitor:
        for step in (torch.tensor(0), np.int64(1), torch.tensor([2])):
            monitor.step(step, model)  # type: ignore[arg-type]
        with pytest.raises(DevmonError, match=r"whole number of updates, got 2\.5"):
            monitor.step(2.5, model)  # type: ignore[arg-type]
    assert Trajectory(tmp_path / "run.zarr").steps("norm") == [0, 1, 2]


# -- a second training -----------------------------------------------------------------------------------------------


def test_a_second_fit_into_a_folder_does_not_keep_the_first_one_s_start(tmp_path: Path) -> None:
    first = train([CheckpointSeries(tmp_path, {0, 4, 12})])
    kept = {path.name: path.read_bytes() for path in checkpoints(tmp_path).values()}
    with pytest.warns(UserWarning, match=r"step-00000000\.ckpt is of another run.*superseded"):
        train([CheckpointSeries(tmp_path, {0, 4})], steps=6, seed=8)
    L.seed_everything(8, verbose=False)
    stored = torch.load(checkpoints(tmp_path)[0], weights_only=True)["state_dict"]
    assert all(torch.equal(stored[key], value) for key, value in Net().state_dict().items())
    assert {path.name: path.read_bytes() for path in (tmp_path / "superseded").iterdir()} == kept
    assert list(checkpoints(tmp_path)) == [0, 4]
    # a third: nothing that was set aside is lost, and one that resumes keeps its start
    with pytest.warns(UserWarning, match="another run"):
        train([CheckpointSeries(tmp_path, {0, 4})], steps=6, seed=9)
    assert len(list((tmp_path / "superseded").iterdir())) == 5
    start = checkpoints(tmp_path)[4].read_bytes()
    train([CheckpointSeries(tmp_path, {0, 4})], steps=7, seed=9, resume=checkpoints(tmp_path)[4])
    assert checkpoints(tmp_path)[4].read_bytes() == start
    assert first is not None


def test_a_fast_dev_run_tries_the_watches_and_writes_nothing(tmp_path: Path) -> None:
    run, saved = tmp_path / "run.zarr", tmp_path / "saved"
    seen: list[int] = []
    watches = [Watch("x", Returns(lambda step: seen.append(step) or xr.Dataset({"x": 1.0})), {7})]
    train([Monitor(run, watches), CheckpointSeries(saved, every(1))], fast_dev_run=True)
    assert seen == [0]
    assert not list(tmp_path.iterdir())
    with pytest.raises(InstrumentError, match="no luck"):
        train([Monitor(run, [Watch("x", FailsAt((0,), InstrumentError), {3})])], fast_dev_run=2)
    train([Monitor(run, [Watch("norm", Norm(), every(1))]), CheckpointSeries(saved, every(1))], steps=4)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    train([Monitor(run, watches), CheckpointSeries(saved, every(1))], fast_dev_run=True, seed=8)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
