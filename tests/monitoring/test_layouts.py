"""A corrected layout is accepted and recorded: rows of the one before are kept apart, none is mixed, none is lost."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

from devmon import IdentityError, InstrumentError, LoopMonitor, Trajectory, Watch, every, observe
from devmon.anatomy import Layout
from devmon.instruments import Composition, HeadSpectra, WeightStatistics
from devmon.monitoring.fingerprint import identity
from devmon.monitoring.layouts import remedy
from devmon.offline.plan import Plan
from devmon.offline.study import Study
from tests.anatomy.families import family
from tests.anatomy.test_fit import RIGHT, Nano

HALVED = replace(RIGHT, heads=2)  # of a model of 4 heads: it goes unseen where the model cannot be tried
DRAWS = 8  # of the null, which is not looked at
CORRECTED = "its layout was corrected, so it begins anew"


SCRIPT = """
from tests.monitoring.test_layouts import *

def study():
    model = OneLength()
    model.anatomy = {}
    composition = Watch("composition", Composition(draws=DRAWS), every(1))
    return model, [composition, Watch("weights", WeightStatistics(), every(1))]
"""


class OneLength(Nano):
    """A model that runs on sequences of one length alone: nothing that is made up shows its heads."""

    count = 4

    def forward(self, tokens: Tensor) -> Tensor:
        assert tokens.shape[1] == 12
        return super().forward(tokens)


def train(run: Any, layout: Layout | None, steps: range, field: Layout | None = None, **fields: Any) -> None:
    """A training of fixed weights: `layout` is the model's own declaration, `field` that of the instrument."""
    model: Any = OneLength()
    if layout is not None:
        model.anatomy = layout
    watches = [
        Watch("composition", Composition(**{"draws": DRAWS, "layout": field} | fields), every(1)),
        Watch("weights", WeightStatistics(), every(1)),
    ]
    with LoopMonitor(run, watches) as monitor:
        for step in steps:
            monitor.step(step, model)


def heads(run: Any) -> dict[int, int]:
    """The number of heads in each row."""
    rows = Trajectory(run)["composition"]
    return dict.fromkeys(rows["step"].values.tolist(), rows.sizes["head"])


@pytest.mark.parametrize("by", ["class", "field", "class, then field"])
def test_rows_of_the_earlier_layout_are_an_earlier_attempt(tmp_path: Path, by: str) -> None:
    run = tmp_path / "run.zarr"
    before, after = ("field" if by == "field" else "class"), ("class" if by == "class" else "field")
    train(run, HALVED if before == "class" else None, range(3), HALVED if before == "field" else None)
    with pytest.warns(UserWarning, match=f"composition: {CORRECTED} at step 2; 3 rows of the earlier"):
        train(run, RIGHT if after == "class" else HALVED, range(2, 4), RIGHT if after == "field" else None)

    # The watch begins anew where training goes on; the others never end.
    left = Trajectory(run)
    assert heads(run) == {2: 4, 3: 4}
    assert left.steps("weights") == [0, 1, 2, 3]
    assert "heads=4" in left["composition"].attrs["model_layout"]
    assert "model_layout" not in left["weights"].attrs
    (rows,) = left.attempts().values()
    assert (rows["step"].values.tolist(), rows.sizes["head"]) == ([0, 1, 2], 2)
    assert "heads=2" in rows.attrs["model_layout"]
    (entry,) = left.attrs["attempts"]
    assert (entry["dropped"], entry["rows"]) == ("composition", {"composition": [0, 1, 2]})
    assert ["heads=2" in entry["layouts"][0], "heads=4" in entry["layouts"][1]] == [True, True]

    # Nothing is set aside twice, and the correction is what the run holds from now on.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(run, RIGHT if after == "class" else HALVED, range(3, 5), RIGHT if after == "field" else None)
    assert heads(run) == {2: 4, 3: 4, 4: 4}
    assert len(Trajectory(run).attempts()) == 1


def test_the_same_layout_in_another_place_is_no_correction(tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    train(run, RIGHT, range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(run, None, range(1, 3), RIGHT)  # declared by the instrument, not by the class
        train(run, replace(RIGHT, heads="count", cap="none"), range(2, 4))  # by the attribute that holds the number
    assert heads(run) == {0: 4, 1: 4, 2: 4, 3: 4}
    accepted = Trajectory(run)["composition"].attrs["accepted"]
    assert list(accepted) == [identity(Composition(draws=DRAWS, layout=RIGHT))["fingerprint"]]


def test_a_correction_comes_alone(tmp_path: Path) -> None:
    run = tmp_path / "run.zarr"
    train(run, HALVED, range(2))
    with pytest.raises(IdentityError, match="draws: stored 8, now 9"):
        train(run, RIGHT, range(1, 3), draws=9)
    with pytest.raises(IdentityError, match="draws: stored 8, now 9"):
        train(run, HALVED, range(1, 3), RIGHT, draws=9)
    other: Any = OneLength()
    other.anatomy = RIGHT
    other.head.weight.data.mul_(2)
    with pytest.raises(IdentityError, match="for weights"):  # of another run: its correction counts for nothing
        observe(1, other, [Watch("composition", Composition(draws=DRAWS), every(1))], Trajectory(run))
    assert heads(run) == {0: 2, 1: 2}


def test_a_correction_that_does_not_fit_takes_nothing_away(tmp_path: Path) -> None:
    run, model = tmp_path / "run.zarr", OneLength()
    train(run, HALVED, range(2))
    wrong: Any = Nano()  # it can be tried: what does not fit is refused before training
    wrong.load_state_dict(model.state_dict())
    wrong.anatomy = replace(RIGHT, heads=8)
    for steps in (every(1), every(2)):
        watch = Watch("composition", Composition(draws=DRAWS), steps)
        with pytest.raises(InstrumentError, match="patterns are of 4 heads, the layout says 8"):
            LoopMonitor(run, [watch]).step(1, wrong)
        assert heads(run) == {0: 2, 1: 2}
    assert Trajectory(run).attempts() == {}


def test_checkpoints_are_measured_again(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    for step in range(3):
        save_file(OneLength().state_dict(), tmp_path / "saved" / f"step{step}.safetensors")
    source, run = tmp_path / "script.py", tmp_path / "run.zarr"
    plan = Plan(str(tmp_path / "saved"), str(run), f"{source}:study")
    source.write_text(SCRIPT.format("HALVED"))
    Study(plan).measure()
    assert heads(run) == {0: 2, 1: 2, 2: 2}
    source.write_text(SCRIPT.format("RIGHT"))
    study = Study(plan)
    due = {step: [watch.name for watch in watches] for step, watches in study.missing().items()}
    assert due == {step: ["composition"] for step in range(3)}
    with pytest.warns(UserWarning, match=CORRECTED):
        study.measure()
    assert heads(run) == {0: 4, 1: 4, 2: 4}
    assert Study(plan).missing() == {}
    assert [rows["step"].values.tolist() for rows in Trajectory(run).attempts().values()] == [[0, 1, 2]]


@pytest.mark.parametrize("place", ["folder", "objects"])
def test_of_two_writers_the_first_sets_aside(tmp_path: Path, place: str) -> None:
    run = tmp_path / "run.zarr" if place == "folder" else f"memory://layouts-{tmp_path.name}"
    model: Any = OneLength()
    model.anatomy = HALVED
    watches = [Watch("composition", Composition(draws=DRAWS), every(1))]
    first = Trajectory(run)
    observe(0, model, watches, first)
    second = first if place == "objects" else Trajectory(run)
    assert second.holds("composition", 0)  # it has read what is about to go
    model.anatomy = RIGHT
    with pytest.warns(UserWarning, match=CORRECTED):
        observe(0, model, watches, first)
    observe(1, model, watches, second)
    assert second.steps("composition") == [0, 1]
    assert second["composition"].sizes["head"] == 4


def test_rows_of_which_no_layout_was_recorded_go_on(tmp_path: Path) -> None:
    run = Trajectory(tmp_path / "run.zarr")
    train(run, RIGHT, range(2))
    run._place.update(
        lambda attrs: {key: value for key, value in attrs.items() if key != "model_layout"}, "composition"
    )
    train(run, RIGHT, range(1, 3))
    assert heads(run.path) == {0: 4, 1: 4, 2: 4}
    assert "heads=4" in run["composition"].attrs["model_layout"]


@pytest.mark.parametrize("names", [("heads",), ("heads", "weights", "roles")])
def test_a_model_without_a_layout_is_refused_with_the_line_that_fits(tmp_path: Path, names: tuple[str, ...]) -> None:
    instruments = {"heads": Composition(draws=DRAWS), "weights": WeightStatistics(), "roles": HeadSpectra(sample=8)}
    watches = [Watch(name, instruments[name], every(1)) for name in names]
    model: Any = Nano()
    said = r"Nano has a layout that fits.*type\(model\)\.anatomy = "
    with (
        LoopMonitor(tmp_path / "refused.zarr", watches) as monitor,
        pytest.raises(InstrumentError, match=said) as refused,
    ):
        monitor.step(0, model)
    line = str(refused.value).rpartition("type(model).anatomy = ")[2].partition(")")[0] + ")"
    model.anatomy = eval(line, {"Layout": Layout})
    assert model.anatomy == RIGHT
    with LoopMonitor(tmp_path / "run.zarr", watches, strict=True) as monitor:
        monitor.step(0, model)
    run = Trajectory(tmp_path / "run.zarr")
    assert [run.steps(name) for name in names] == [[0]] * len(names)


def test_no_line_is_said_where_none_helps() -> None:
    nothing = "does not know where the parts are: anatomy = Layout(...)"
    assert remedy(family("granite"), [nothing]) == ""  # a stream that is multiplied
    assert remedy(family("jamba"), [nothing]) == ""  # a stack of other blocks too
    assert remedy(Nano(), ["needs logits"]) == ""  # another fault
    assert "Layout(" in remedy(Nano(), [nothing])
