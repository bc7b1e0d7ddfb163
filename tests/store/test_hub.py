"""`devmon push` and `devmon pull`, through huggingface_hub itself, against a stand-in of the hub on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xarray as xr
from typer.testing import CliRunner

from devmon import StoreError, Trajectory
from devmon.cli.root import app
from devmon.store.hub import pull, push
from tests.support.hub import DatasetHub, Hub, serve
from tests.support.stored_run import STORED

__all__ = ["serve"]


@pytest.fixture
def hub(serve: Callable[[Hub], Hub], monkeypatch: pytest.MonkeyPatch) -> DatasetHub:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    held = DatasetHub()
    serve(held)
    return held


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Three watches of the stored run."""
    for name in ("loss", "induction", "patching"):
        for part in (name, f"_units/{name}"):
            shutil.copytree(STORED / part, tmp_path / "run.zarr" / part)
    shutil.copy(STORED / "zarr.json", tmp_path / "run.zarr" / "zarr.json")
    return tmp_path / "run.zarr"


def test_a_run_goes_up_with_its_card_and_comes_down_the_same(hub: DatasetHub, small: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["push", str(small), "lab/tiny", "--private"])
    assert said.exit_code == 0, said.output + str(said.exception)
    assert said.output.strip().endswith("/datasets/lab/tiny")
    files = hub.datasets["lab/tiny"]
    assert {"README.md", "report.html", "events.csv", "trajectory.zarr/zarr.json"} <= set(files)
    made = hub.made["lab/tiny"]
    assert made.get("visibility") == "private" or made.get("private")
    assert len(hub.commits) == 1

    # the card says what it is, in front matter, a sentence and a table
    card = files["README.md"].decode()
    assert card.startswith("---\npretty_name: ")
    assert "tags: [devmon" in card
    assert "| `loss` | ProbeLoss | 3 | 0 to 4 |" in card
    assert "devmon pull lab/tiny -o runs/tiny" in card
    assert "{" not in card.split("---\n")[2].split("## Where")[0]

    # what comes down is the run: every watch, every row, and xarray opens it
    said = CliRunner().invoke(app, ["pull", "lab/tiny", "-o", str(tmp_path / "got")])
    assert said.exit_code == 0, said.output + str(said.exception)
    before, after = Trajectory(small, "r"), Trajectory(tmp_path / "got" / "trajectory.zarr", "r")
    assert after.names() == before.names()
    assert after.attrs["run_id"] == before.attrs["run_id"]
    for name in before:
        xr.testing.assert_equal(after[name], before[name])
    assert xr.open_zarr(tmp_path / "got" / "trajectory.zarr", group="loss").sizes["step"] == 3


def test_a_second_push_replaces_the_copy_and_leaves_other_files(hub: DatasetHub, small: Path, tmp_path: Path) -> None:
    run = Trajectory(small)
    push(run, "lab/tiny", {"README.md": "one"})
    hub.datasets["lab/tiny"]["notes.txt"] = b"mine"
    run.drop("patching")
    push(run, "lab/tiny", {"README.md": "two"})
    files = hub.datasets["lab/tiny"]
    assert (files["README.md"], files["notes.txt"]) == (b"two", b"mine")
    assert not [name for name in files if name.startswith("trajectory.zarr/patching/")]
    assert "patching" not in Trajectory(pull("lab/tiny", tmp_path / "got"), "r").names()


def test_what_cannot_be_is_refused_with_the_next_move(hub: DatasetHub, small: Path, tmp_path: Path) -> None:
    run = Trajectory(small, "r")
    with pytest.raises(StoreError, match="named owner/name, got 'tiny'"):
        push(run, "tiny", {})
    with pytest.raises(StoreError, match=r"other/tiny cannot be written \(.*\): log in with `hf auth login`"):
        push(run, "other/tiny", {})
    with pytest.raises(StoreError, match=r"lab/none cannot be read .* give the owner/name of a dataset"):
        pull("lab/none", tmp_path / "got")
    hub.datasets["lab/other"] = {"data.csv": b"1"}
    with pytest.raises(StoreError, match="lab/other holds no run: there is no trajectory.zarr"):
        pull("lab/other", tmp_path / "got")
    (tmp_path / "there").mkdir()
    with pytest.raises(StoreError, match="exists"):
        pull("lab/other", tmp_path / "there")
    assert not (tmp_path / "got").exists()
