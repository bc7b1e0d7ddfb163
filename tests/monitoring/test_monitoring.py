"""Loops other than Lightning's: training is bit-identical with the monitor, and rows are those of the checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from devmon import DevmonError, IdentityError, InstrumentError, Trajectory, Watch, every, observe
from devmon.monitoring.loop import LoopMonitor
from tests.support.lightning_toys import Careless, Norm
from tests.support.loops import FailsAt, after, same, seeded, train, trainer

WATCHES = [Watch("careless", Careless(), every(1)), Watch("norm", Norm(), every(2))]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_plain_loop_is_bit_identical_with_the_monitor(tmp_path: Path, accumulate: int) -> None:
    alone, rest = train(None, seeded(), accumulate=accumulate), after()
    with LoopMonitor(tmp_path / "run.zarr", WATCHES) as monitor:
        watched, other = train(monitor, seeded(), accumulate=accumulate), after()
    assert same(alone, watched)
    assert rest == other
    assert watched.training
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert store.steps("careless") == list(range(13))
    assert store.steps("norm") == [0, 2, 4, 6, 8, 10, 12]
    last = Trajectory(tmp_path / "last.zarr")
    observe(12, alone, WATCHES, last)
    assert store["norm"]["norm"][-1] == last["norm"]["norm"][0]
    assert not list((tmp_path / "run.zarr" / "_units").rglob("*.rows")), "not folded"


def test_a_loop_that_resumes_supersedes_and_another_run_is_refused(tmp_path: Path) -> None:
    model = seeded()
    with LoopMonitor(tmp_path / "run.zarr", WATCHES) as monitor:
        train(monitor, model, range(1, 5))
        kept = {key: value.clone() for key, value in model.state_dict().items()}
        train(monitor, model, range(5, 8))
        with pytest.raises(DevmonError, match="steps only grow: got 6 after 7"):
            monitor.step(6, model)
    with pytest.raises(IdentityError, match="at step 4 for weights"):
        LoopMonitor(tmp_path / "run.zarr", WATCHES).step(4, model)
    assert Trajectory(tmp_path / "run.zarr", "r").steps("careless") == list(range(8))
    model.load_state_dict(kept)
    with LoopMonitor(tmp_path / "run.zarr", WATCHES) as monitor:
        train(monitor, model, range(5, 7))
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert store.steps("careless") == list(range(7))
    assert store.attrs["attempts"][0]["rows"] == {"careless": [5, 6, 7], "norm": [6]}


def test_what_fails_in_a_loop_is_recorded_or_ends_it(tmp_path: Path) -> None:
    watches = [Watch("fails", FailsAt((3,)), every(1)), Watch("norm", Norm(), every(1))]
    with (
        pytest.warns(UserWarning, match="fails failed at step 3"),
        LoopMonitor(tmp_path / "run.zarr", watches) as monitor,
    ):
        train(monitor, seeded())
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert (store.failures("fails"), len(store.steps("norm"))) == ({3: "RuntimeError: no luck at 3"}, 13)
    with pytest.raises(RuntimeError, match="no luck"):
        train(LoopMonitor(tmp_path / "strict.zarr", watches, strict=True), seeded())
    misfit = [Watch("fails", FailsAt((0,), InstrumentError), every(1))]
    with pytest.raises(InstrumentError, match="no luck"):
        train(LoopMonitor(tmp_path / "misfit.zarr", misfit), seeded())


# ---- the Trainer of transformers ----


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"bf16": True}], ids=str)
def test_a_trainer_of_transformers_is_bit_identical_with_the_monitor(tmp_path: Path, options: dict[str, Any]) -> None:
    from devmon.callbacks import TrainerMonitor

    results = []
    for callbacks in ([], [TrainerMonitor(tmp_path / "run.zarr", WATCHES)]):
        training = trainer(tmp_path / "out", callbacks, **options)
        training.train()
        results.append((training.model, after()))
    (alone, rest), (watched, other) = results
    assert same(alone, watched)
    assert rest == other
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert not store.failures("careless")
    assert store.steps("careless") == list(range(9))
    assert len(set(store["norm"]["norm"].values.tolist())) == 5


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_that_resumes_goes_on_in_the_same_run(tmp_path: Path) -> None:
    from devmon.callbacks import TrainerMonitor

    def callbacks() -> list[Any]:
        return [TrainerMonitor(tmp_path / "run.zarr", WATCHES)]

    trainer(tmp_path / "out", callbacks(), save_strategy="steps", save_steps=4, max_steps=6).train()
    trainer(tmp_path / "out", callbacks(), max_steps=8).train(
        resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4")
    )
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert store.steps("careless") == list(range(9))
    assert store.attrs["attempts"][0]["rows"] == {"careless": [5, 6], "norm": [6]}
    sharded = trainer(tmp_path / "out", callbacks())
    sharded.args.fsdp = ["full_shard"]
    with pytest.raises(DevmonError, match="shard the weights"):
        sharded.train()
