"""A suite measured by its name and data alone: λ̂ settings, stale files passed over, and what the run keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from devmon import DataError, Trajectory
from devmon.instruments import LLC
from devmon.offline.plan import Plan
from devmon.offline.study import Study
from tests.anatomy.test_anatomy_sites import family
from tests.support.hub import Hub, commit
from tests.support.offline_toys import measure, text_of


def repository(folder: Path, tokenizer: str, steps: list[str]) -> Path:
    """Models in both formats; a tokenizer in each revision."""
    for seed, name in enumerate(steps):
        model = family("gpt_neox", seed)
        model.save_pretrained(folder / name)
        torch.save(model.state_dict(), folder / name / "pytorch_model.bin")
        for file in Path(tokenizer).iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(text_of(range(20_000)))
    return tmp_path / "text.txt"


def test_a_suite_needs_its_name_and_data(
    tmp_path: Path, serve: Callable[[Hub], Hub], tokenizer: str, text: Path
) -> None:
    steps = ["step0", "step1", "step2", "step143000"]
    folder = repository(tmp_path / "repository", tokenizer, steps)
    stale = (folder / "step143000" / "model.safetensors").read_bytes()
    for name in ("step1", "step2"):  # the last model's conversion, served on other branches
        (folder / name / "model.safetensors").write_bytes(stale)
    serve(Hub(folder, ["main", *steps], repositories=["EleutherAI/pythia-14m"]))
    run = tmp_path / "run.zarr"
    size = ("--sequences", 12, "--length", 16)
    told = measure("EleutherAI/pythia-14m", "--into", run, "--data", text, *size, "--dry-run")
    assert told.exit_code == 0, told.output
    assert "published for this model: nbeta=30 batch_size=32 chains=4 draws=100 gamma=300 lr=0.001" in told.output
    assert "left out: main (no step as Pythia writes it)" in told.output
    assert "stale: model.safetensors is one file under steps 1, 2, 143000" in told.output
    assert not run.exists()

    # the watches of the standard preset, with the LLC of the suite
    plan = Plan("EleutherAI/pythia-14m", str(run), tokens=str(text), sequences=12, length=16)
    watches = {watch.name: watch.instrument for watch in Study(plan, read_only=True).watches}
    llc = watches["llc"]
    assert isinstance(llc, LLC)
    assert (llc.nbeta, llc.gamma, llc.lr, llc.batch_size, llc.chains, llc.draws) == (30, 300, 1e-3, 32, 4, 100)
    assert {"loss", "induction", "lens"} <= watches.keys()

    # measured on the files that are each step's own, which the run keeps
    result = measure("EleutherAI/pythia-14m", "--into", run, "--data", text, *size, "--llc", "none", "--watch", "loss")
    assert result.exit_code == 0, result.output
    assert "one set of weights" not in result.output
    trajectory = Trajectory(run, "r")
    assert trajectory.steps("loss") == [0, 1, 2, 143_000]
    assert len(set(trajectory.weights("loss").values())) == 4
    assert trajectory.attrs["formats"] == {"1": "bin", "2": "bin", "143000": "bin"}
    for step in (0, 1):
        file = "pytorch_model.bin" if step else "model.safetensors"
        kept = trajectory.attrs["checkpoints"][str(step)]
        assert kept["commit"] == commit(f"step{step}")
        assert kept["files"] == {file: hashlib.sha256((folder / f"step{step}" / file).read_bytes()).hexdigest()}
        assert kept["name"] == f"EleutherAI/pythia-14m@step{step}"
    assert trajectory.attrs["series"]["unit"] == "steps"


def test_settings_of_other_sizes_and_of_ones_own(
    tmp_path: Path, serve: Callable[[Hub], Hub], tokenizer: str, text: Path
) -> None:
    folder = repository(tmp_path / "repository", tokenizer, ["step0", "step1"])
    serve(Hub(folder, ["step0", "step1"], repositories=["EleutherAI/pythia-70m"]))

    def settings(*llc: str, series: str = "EleutherAI/pythia-70m") -> dict[str, object]:
        plan = Plan(series, str(tmp_path / "run.zarr"), tokens=str(text), sequences=12, length=16, llc=llc)
        return Study(plan, read_only=True).settings

    assert settings() == {"nbeta": 30, "batch_size": 32, "chains": 4, "draws": 100}  # lr and gamma are chosen
    assert settings("nbeta=20") == {"nbeta": 20}
    assert settings("none") == {}
    assert settings(series=str(folder)) == {}


def test_stages_lie_on_one_axis_of_the_run_which_stays(tmp_path: Path, language: Path) -> None:
    names = ["stage1-step10-tokens1B", "stage1-step20-tokens2B", "stage2-step10-tokens3B"]
    for seed, name in enumerate(names):
        family("gpt_neox", seed).save_pretrained(tmp_path / "saved" / name)
    run, rest = tmp_path / "run.zarr", ("--preset", "economy", "--data", language / "tokens.pt", "--watch", "loss")
    result = measure(tmp_path / "saved", "--into", run, *rest)
    assert result.exit_code == 0, result.output
    assert "stage2 counts anew: its steps begin at 20" in result.output
    trajectory = Trajectory(run, "r")
    assert trajectory.steps("loss") == [10, 20, 30]
    kept = trajectory.attrs["checkpoints"]
    assert [(kept[step]["stage"], kept[step]["tokens"]) for step in ("20", "30")] == [
        ("stage1", 2 * 10**9), ("stage2", 3 * 10**9),
    ]  # fmt: skip
    assert trajectory.attrs["series"]["offsets"] == {"stage1": 0, "stage2": 20}

    # another end of stage1 would give the rows of stage2 other steps
    family("gpt_neox", 5).save_pretrained(tmp_path / "saved" / "stage1-step25-tokens3B")
    again = measure(tmp_path / "saved", "--into", run, *rest)
    assert isinstance(again.exception, DataError)
    assert "has stage2 begin at 20, this series at 25" in str(again.exception)
    alone = measure(tmp_path / "saved", "--into", tmp_path / "two.zarr", "--stage", "stage2", *rest)
    assert alone.exit_code == 0, alone.output
    assert Trajectory(tmp_path / "two.zarr", "r").steps("loss") == [10]
