"""Series in which files are not what their names say, or hold what is not finite: named, and the sweep goes on."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

from devmon import InstrumentError, Snapshot, Trajectory, Watch, every
from devmon.analysis.detection.detector import Detector
from devmon.analysis.reports.findings import examine
from devmon.analysis.reports.prose.run_words import one_set_of_weights, weights_within
from devmon.analysis.reports.prose.story import tell
from devmon.analysis.run import same_weights
from devmon.cli.root import app
from devmon.instruments import Curvature
from devmon.sampling import regression_loss
from tests.support.checkpoints import save
from tests.support.lightning_toys import Net, Norm
from tests.support.offline_toys import measure, with_watches
from tests.support.synthetic import induction_run

QUICK = Detector(n_null=59, kinds=("jump",))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*")


def saved(folder: Path, steps: range) -> Path:
    for step in steps:
        torch.manual_seed(step)
        save(folder / f"step{step}.pt", Net().state_dict())
    return folder


def test_steps_with_one_set_of_weights_are_named_by_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "saved", range(8))
    for step in (2, 5):  # as a hub serves the final weights on other branches
        shutil.copy(folder / "step7.pt", folder / f"step{step}.pt")
    with_watches(monkeypatch, Net(), [Watch("norm", Norm(), every(1)), Watch("twice", Norm(2.0), every(2))])
    command = (folder, "--into", tmp_path / "run.zarr", "--source", "x.py:y")
    said = "steps 2, 5 and 7 have one set of weights"
    refused = measure(*command)
    assert "steps 2, 5, 7 of" in str(refused.exception)
    assert "leave them out by --steps, or measure and mark them with --allow-twins" in str(refused.exception)
    assert Trajectory(tmp_path / "run.zarr", "r").steps("norm") == []
    assert measure(*command, "--steps", "0,1,3,4,6,7").exit_code == 0  # none of them is another's
    command = (*command, "--allow-twins")
    result = measure(*command)
    assert result.exit_code == 0
    assert "twins: steps 2, 5, 7 have one set of weights" in result.output
    assert Trajectory(tmp_path / "run.zarr", "r").attrs["twins"] == [[2, 5, 7]]
    assert f"{said}: check the files of" in result.output
    assert said in measure(*command).output  # and again, where nothing is left to measure
    run = Trajectory(tmp_path / "run.zarr", "r")
    assert same_weights(run) == [[2, 5, 7]]
    for name in ("show", "detect"):
        shown = CliRunner().invoke(app, [name, str(tmp_path / "run.zarr")])
        assert said in shown.output.lower(), shown.output
    report = CliRunner().invoke(app, ["report", str(tmp_path / "run.zarr"), "-o", str(tmp_path / "report.md")])
    assert report.exit_code == 0, report.output
    assert f"S{said[1:]}" in (tmp_path / "report.md").read_text()


def test_a_run_whose_weights_all_differ_says_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_watches(monkeypatch, Net(), [Watch("norm", Norm(), every(1))])
    result = measure(saved(tmp_path / "s", range(3)), "--into", tmp_path / "run.zarr", "--source", "x.py:y")
    assert "set of weights" not in result.output
    assert "set of weights" not in CliRunner().invoke(app, ["show", str(tmp_path / "run.zarr")]).output


def test_a_transition_at_such_steps_says_so_and_one_elsewhere_does_not() -> None:
    run = induction_run()
    plain = tell(examine(run, QUICK))
    assert "set of weights" not in " ".join(plain.minor + plain.against)
    steps = run["loss"]["step"].values
    where = int(abs(steps - 650).argmin())
    for at, touched in ((where, True), (2, False)):
        for data in run.data.values():
            data["weights"][at + 1] = data["weights"].values[at]
        said = tell(examine(run, QUICK))
        words = f"steps {steps[at]} and {steps[at + 1]} have one set of weights"
        assert (f"But {words}: this change may be of the files" in " ".join(said.minor + said.against)) == touched
        assert any(words.capitalize() in line for line in said.against)
        run = induction_run()


def test_the_groups_that_touch_a_change() -> None:
    groups, measured = [[0, 1], [40, 90]], [0, 1, 10, 40, 60, 90, 200]
    assert weights_within(groups, 12, 30, measured) == one_set_of_weights([[40, 90]])  # the measured step beside it
    assert weights_within(groups, 100, 150, measured) == one_set_of_weights([[40, 90]])
    assert weights_within(groups, 1, 2, measured) == one_set_of_weights([[0, 1]])
    assert weights_within(groups, 300, 400, [*measured, 250]) == ""


@dataclass(frozen=True)
class Unfit:
    """Measures until the weights are not finite; with `never`, not at all."""

    never: bool = False

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        total = sum(float(parameter.detach().sum()) for parameter in snapshot.model.parameters())
        if self.never or total != total:
            raise InstrumentError("made for another model")
        return xr.Dataset({"x": ((), total)})


@pytest.mark.parametrize("first", [True, False])
def test_a_sweep_goes_on_after_weights_that_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    folder, bad = saved(tmp_path / "saved", range(5)), 0 if first else 2
    state = Net().state_dict()
    state["net.0.weight"][0, 0] = float("nan")
    save(folder / f"step{bad}.pt", state)
    data = (torch.randn(12, 5), torch.randn(12, 3))
    watches = [
        Watch("unfit", Unfit(), every(1)),
        Watch("curvature", Curvature(data, loss=regression_loss, top=1, probes=2), every(1)),
        Watch("norm", Norm(), every(1)),
    ]
    with_watches(monkeypatch, Net(), watches)
    result = measure(folder, "--into", tmp_path / "run.zarr", "--source", "x.py:y")
    assert result.exit_code == 1
    assert f"step {bad} unfit: failed (InstrumentError: made for another model)" in result.output, result.output
    run = Trajectory(tmp_path / "run.zarr", "r")
    assert run.steps("norm") == list(range(5))
    for name in ("unfit", "curvature"):
        assert run.steps(name) == [step for step in range(5) if step != bad]
        assert list(run.failures(name)) == [bad]


def test_a_misfit_ends_a_sweep_at_its_first_checkpoint_and_names_all_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watches = [Watch("a", Unfit(True), every(1)), Watch("norm", Norm(), every(1)), Watch("b", Unfit(True), every(1))]
    with_watches(monkeypatch, Net(), watches)
    result = measure(saved(tmp_path / "s", range(3)), "--into", tmp_path / "run.zarr", "--source", "x.py:y")
    assert "step 0: 2 watches do not fit this model (a: made for another model; b: made for another" in str(
        result.exception
    )
    assert Trajectory(tmp_path / "run.zarr", "r").steps("norm") == [0]
