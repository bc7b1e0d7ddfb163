"""`calibrate_series`: which checkpoints are taken, what the run may hold, and what is refused before sampling."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from devmon import DataError, DevmonError, IdentityError, InstrumentError, Trajectory
from devmon.offline.calibrate import calibrate_series
from devmon.sampling import regression_loss
from devmon.snapshot import weights_digest
from tests.support.calibration_toys import SCRIPT, WEIGHTS, answer, study

__all__ = ["study"]  # a fixture


@pytest.fixture
def copy(study: Path, tmp_path: Path) -> Path:
    """A study of one's own."""
    return Path(shutil.copytree(study, tmp_path / "study"))


def stored(folder: Path) -> dict[str, Any] | None:
    return Trajectory(folder / "run" / "trajectory.zarr", "r").attrs.get("calibration")


def test_the_weights_are_those_of_the_steps_late_first(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch)
    given: tuple[tuple[dict[str, int], list[int]], ...] = (
        ({}, [40, 20]),
        ({"late": 30}, [30, 20]),
        ({"late": 20}, [20, 10]),
        ({"middle": 0}, [40, 0]),
    )
    for options, steps in given:
        found = calibrate_series(f"{copy / 'script.py'}:made", copy / "run" / "checkpoints", force=True, **options)
        models, loss, _, start, limits = asked.pop()
        assert [model.weight.flatten().tolist() for model in models] == [pytest.approx(WEIGHTS[step]) for step in steps]
        assert not models[0].training
        assert loss is regression_loss
        assert callable(limits.pop("progress"))
        assert (start.sampler, start.batch_size, start.chains) == ("baoab", 64, 2)
        assert limits == {"tolerance": 0.02, "max_steps": 3000, "budget": None}
        found.store(force=True)
        held = stored(copy)
        assert held is not None
        assert list(held["steps"].values()) == steps
        assert held["weights"] == [weights_digest(model) for model in models]


def test_a_single_checkpoint_past_step_0_serves_alone(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch)
    for step in (10, 20, 30):
        (copy / "run" / "checkpoints" / f"step-{step:08d}.ckpt").unlink()
    found = calibrate_series(f"{copy / 'script.py'}:made", copy / "run")
    assert len(asked[0][0]) == 1
    assert found.record["steps"] == {"late": 40}


def test_nothing_is_written_before_it_is_stored_nor_without_a_run(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch)
    heard: list[str] = []
    found = calibrate_series(f"{copy / 'script.py'}:made", copy / "run", progress=heard.append)
    assert heard[0].startswith("late checkpoint: step 40, middle checkpoint: step 20 (5 in the series)")
    assert stored(copy) is None
    found.store()
    assert stored(copy) == found.record
    shutil.rmtree(copy / "run" / "trajectory.zarr")
    found = calibrate_series(f"{copy / 'script.py'}:made", copy / "run")
    with pytest.raises(DevmonError, match="no run lies beside the checkpoints"):
        found.store()
    assert not (copy / "run" / "trajectory.zarr").exists()


def test_a_module_on_the_path_is_a_source_too(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch)
    monkeypatch.chdir(copy)
    (copy / "my_study.py").write_text(SCRIPT)
    calibrate_series("my_study:bare", "run")
    assert asked[0][0][0].weight.flatten().tolist() == WEIGHTS[40]
    del sys.modules["my_study"]


def test_another_question_is_refused_before_anything_is_computed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch)
    source, run = f"{copy / 'script.py'}:made", copy / "run"
    calibrate_series(source, run, tolerance=0.05).store()
    asked.clear()
    before = stored(copy)
    with pytest.raises(IdentityError, match="tolerance: stored 0.05, now 0.1.*--force") as refused:
        calibrate_series(source, run, tolerance=0.1, middle=10)
    assert "steps: stored {'late': 40, 'middle': 20}, now {'late': 40, 'middle': 10}" in str(refused.value)
    script = (copy / "script.py").read_text()
    (copy / "script.py").write_text(script.replace("batch_size=64", "batch_size=32"))
    with pytest.raises(IdentityError, match="batch_size: stored 64, now 32"):
        calibrate_series(source, run, tolerance=0.05)
    (copy / "script.py").write_text(script.replace("arange(4.0)", "arange(1.0, 5)"))
    with pytest.raises(IdentityError, match="data: stored"):
        calibrate_series(source, run, tolerance=0.05)
    assert asked == []
    assert stored(copy) == before


def test_a_missing_module_is_told_and_what_a_module_lacks_is_not_hidden(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="there is no module 'no_such'"):
        calibrate_series("no_such.thing:made", copy / "run")
    (copy / "broken_study.py").write_text("import no_such_dependency")
    monkeypatch.chdir(copy)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        calibrate_series("broken_study:made", copy / "run")


def test_steps_and_folders_that_are_not_there(study: Path, tmp_path: Path) -> None:
    def refused(folder: Path, **options: int) -> str:
        with pytest.raises(DevmonError) as caught:
            calibrate_series(f"{study / 'script.py'}:made", folder, **options)  # type: ignore[arg-type]
        return str(caught.value)

    run = study / "run"
    assert refused(run, late=41) == "there is no checkpoint of --late 41; there are 0, 10, 20, 30, 40"
    assert "there is no checkpoint of --middle 5" in refused(run, middle=5)
    assert "comes after the late checkpoint" in refused(run, late=20, middle=30)
    assert "holds a step (it has nothing)" in refused(tmp_path)
    shutil.copy(run / "checkpoints" / "step-00000000.ckpt", tmp_path)
    assert "no checkpoint past step 0" in refused(tmp_path)


def test_a_calibration_that_fails_names_the_steps_and_how_to_take_others(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise InstrumentError("no step size ran healthily")

    monkeypatch.setattr("devmon.offline.calibrate.calibrate", fails)
    steps = r"late checkpoint: step 40, middle checkpoint: step 0; --late and --middle give others"
    with pytest.raises(InstrumentError, match=rf"^no step size ran healthily \({steps}\)"):
        calibrate_series(f"{study / 'script.py'}:made", study / "run", middle=0)


def test_checkpoints_of_any_loop_and_those_that_bring_their_model(
    language: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of transformers' Trainer with an LLC alone; state dicts under names that a pattern reads."""
    asked = answer(monkeypatch)
    script = tmp_path / "alone.py"
    script.write_text(
        "from devmon.instruments import LLC\nimport torch\n\ndef llc():\n    return LLC(torch.ones(8, 4).long())\n"
    )
    found = calibrate_series(f"{script}:llc", language / "hf")
    (models, *_) = asked.pop()
    assert found.record["steps"] == {"late": 1000, "middle": 100}
    expected = transformers.AutoModelForCausalLM.from_pretrained(language / "hf" / "checkpoint-1000", dtype="float32")
    assert weights_digest(models[0]) == weights_digest(expected)
    assert found.beside == language / "trajectory.zarr"

    folder = tmp_path / "plain"
    folder.mkdir()
    for step, weights in WEIGHTS.items():
        torch.save({"weight": torch.tensor([weights])}, folder / f"w_{step}_x.pt")
    found = calibrate_series(f"{copy / 'script.py'}:bare", folder, pattern=r"w_(\d+)_x")
    assert asked.pop()[0][0].weight.flatten().tolist() == pytest.approx(WEIGHTS[40])
    with pytest.raises(DataError, match=r"bring no config.json: let .*alone.py:llc return \(model, LLC"):
        calibrate_series(f"{script}:llc", folder, pattern=r"w_(\d+)_x")
