from __future__ import annotations

import random
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import xarray as xr

from devmon import (
    DevmonError,
    IdentityError,
    InstrumentError,
    Snapshot,
    StoreError,
    Trajectory,
    Watch,
    every,
    log_spaced,
)
from devmon.callbacks import CheckpointSeries, InductionMonitor, Monitor, checkpoints, latest
from tests.support.lightning_toys import Careless, Net, Norm, train
from tests.support.loops import FailsAt, same

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*", "ignore:.*dataloader.*")


def switches() -> tuple[object, ...]:
    return torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_final_weights_are_bit_identical_with_and_without_the_monitor(
    tmp_path: Path, accumulate: int, precision: str
) -> None:
    options = {"accumulate": accumulate, "precision": precision, "gradient_clip_val": 0.5}
    alone = train([], **options)
    after_alone = (random.random(), np.random.rand(), torch.rand(1))  # noqa: NPY002
    before = switches()
    watches = [Watch("careless", Careless(), every(1)), Watch("norm", Norm(), every(1))]
    watched = train(
        [Monitor(tmp_path / "run.zarr", watches), CheckpointSeries(tmp_path / "saved", every(3))], **options
    )
    assert same(alone, watched)
    assert (random.random(), np.random.rand(), torch.rand(1)) == after_alone  # noqa: NPY002
    assert switches() == before
    assert Trajectory(tmp_path / "run.zarr", "r").steps("careless") == list(range(13))


def test_alone_is_together_and_any_order_is_any_order(tmp_path: Path) -> None:
    runs = {}
    for name, order in {"alone": ["norm"], "together": ["careless", "norm"], "reversed": ["norm", "careless"]}.items():
        watches = {"norm": Watch("norm", Norm(), every(2)), "careless": Watch("careless", Careless(), every(2))}
        train([Monitor(tmp_path / name, [watches[key] for key in order])])
        runs[name] = Trajectory(tmp_path / name, "r")["norm"].drop_vars("seconds")
    xr.testing.assert_identical(runs["alone"], runs["together"])
    xr.testing.assert_identical(runs["alone"], runs["reversed"])


def test_steps_are_optimizer_steps_under_accumulation_and_step_0_is_the_initialisation(tmp_path: Path) -> None:
    train([Monitor(tmp_path / "run.zarr", [Watch("norm", Norm(), log_spaced(4, 6))])], steps=6, accumulate=4)
    dataset = Trajectory(tmp_path / "run.zarr", "r")["norm"]
    assert dataset["step"].values.tolist() == [0, 1, 2, 3, 6]
    L.seed_everything(7, verbose=False)
    fresh = float(Norm()(Snapshot(0, Net()))["norm"])
    assert float(dataset["norm"].sel(step=0)) == fresh
    assert len(set(dataset["norm"].values.tolist())) == 5


def test_checkpoints_are_saved_by_step_with_step_0_and_load_as_lightning_files(tmp_path: Path) -> None:
    module = train([CheckpointSeries(tmp_path, {0, 5, 12})])
    assert list(checkpoints(tmp_path)) == [0, 5, 12]
    last = torch.load(latest(tmp_path), weights_only=True)
    assert last["global_step"] == 12
    other = Net()
    other.load_state_dict(last["state_dict"])
    assert same(module, other)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_continues_the_series_without_double_or_stale_rows(tmp_path: Path, accumulate: int) -> None:
    def callbacks() -> list[L.Callback]:
        watches = [Watch("norm", Norm(), every(1))]
        return [Monitor(tmp_path / "run.zarr", watches), CheckpointSeries(tmp_path / "saved", every(4))]

    train(callbacks(), steps=7, accumulate=accumulate)
    first = Trajectory(tmp_path / "run.zarr", "r")["norm"]
    assert first["step"].values.tolist() == list(range(8))
    train(callbacks(), steps=10, accumulate=accumulate, resume=latest(tmp_path / "saved"))
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert store.steps("norm") == list(range(11))
    assert store.attrs["attempts"][0]["rows"] == {"norm": [5, 6, 7]}
    np.testing.assert_array_equal(store["norm"]["norm"][:5], first["norm"][:5])
    assert list(checkpoints(tmp_path / "saved")) == [0, 4, 8]


def test_an_exception_leaves_a_folded_store_with_all_rows(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == 5:
                raise RuntimeError("power cut")

    monitor = Monitor(tmp_path / "run.zarr", [Watch("norm", Norm(), every(1))])
    with pytest.raises(RuntimeError, match="power cut"):
        train([monitor, Fails()])
    with xr.open_zarr(tmp_path / "run.zarr", group="norm", consolidated=False, chunks=None) as dataset:
        assert dataset["step"].values.tolist() == list(range(6))


def test_a_failing_instrument_is_recorded_and_training_goes_on_unless_strict(tmp_path: Path) -> None:
    watches = [Watch("fails", FailsAt((3,)), every(1)), Watch("norm", Norm(), every(1))]
    with pytest.warns(UserWarning, match="fails failed at step 3"):
        module = train([Monitor(tmp_path / "run.zarr", watches)])
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert store.failures("fails") == {3: "RuntimeError: no luck at 3"}
    assert store.steps("norm") == list(range(13))
    assert same(module, train([]))
    with pytest.raises(RuntimeError, match="no luck"):
        train([Monitor(tmp_path / "strict.zarr", watches, strict=True)])
    with pytest.raises(InstrumentError, match="no luck"):  # a misfit ends it even where failures are tolerated
        train([Monitor(tmp_path / "misfit.zarr", [Watch("fails", FailsAt((0,), InstrumentError), every(1))])])


def test_another_run_on_the_same_store_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    watches = [Watch("norm", Norm(), every(1))]
    train([Monitor(tmp_path / "run.zarr", watches)])
    kept = Trajectory(tmp_path / "run.zarr", "r")["norm"]
    with pytest.raises(IdentityError, match="scale: stored 1.0, now 2.0"):
        train([Monitor(tmp_path / "run.zarr", [Watch("norm", Norm(2.0), every(1))])])
    assert set(kept["weights"].values.tolist()) >= set(Trajectory(tmp_path / "run.zarr", "r")["norm"]["weights"].values)


def test_the_measured_module_is_found_or_asked_for(tmp_path: Path) -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.other = torch.nn.Linear(2, 2)

        forward = L.LightningModule.forward

    from devmon.callbacks.network import network

    module = Two()
    with pytest.raises(DevmonError, match=r"has 2 submodules.*Monitor\(\.\.\., model='net'\)"):
        network(module)
    assert network(module, "net") is module.net
    assert network(module, lambda m: m.other) is module.other
    with pytest.raises(DevmonError, match="no submodule 'nett'; it has net, other"):
        network(module, "nett")


def test_an_unwritable_folder_is_named_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for callback in (
        Monitor(tmp_path / "file" / "run.zarr", []),
        CheckpointSeries(tmp_path / "file" / "saved", every(1)),
    ):
        with pytest.raises(StoreError, match="cannot"):
            train([callback])


def test_the_one_line_forms_hand_the_options_on(tmp_path: Path) -> None:
    options = {"strict": True, "log": print, "max_overhead": 0.2, "densify": True, "live": tmp_path / "report.html"}
    monitor = InductionMonitor(tmp_path / "run.zarr", vocab_size=5, steps={7}, model="net", **options)
    (watch,) = monitor.watches
    assert (watch.name, watch.steps, watch.instrument.vocab_size) == ("induction", {7}, 5)
    assert (monitor.model, monitor.loop.strict) == ("net", True)
    kinds = {type(companion).__name__ for companion in monitor.loop.companions}
    assert kinds == {"Failures", "Mirror", "Budget", "Densify", "PageUpdates", "Passed", "Rates"}
