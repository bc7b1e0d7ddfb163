"""`devmon calibrate`, in process on a linear regression: what it prints, draws, stores and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from devmon import DevmonError, IdentityError, Trajectory
from devmon.analysis import report as write_report
from devmon.analysis.derive.llc import llc
from devmon.cli.root import app
from devmon.instruments import LLC
from devmon.monitoring.fingerprint import identity
from devmon.offline.source import load_source, with_weights
from devmon.sampling import regression_loss
from devmon.snapshot import Snapshot
from tests.support.calibration_toys import answer, study
from tests.support.offline_toys import own_path

__all__ = ["own_path", "study"]  # fixtures


def calibrate(*args: object) -> Result:
    return CliRunner().invoke(app, ["calibrate", *map(str, args)])


def fail(*args: object) -> str:
    result = calibrate(*args)
    assert isinstance(result.exception, DevmonError), (result.exception, result.output)
    return str(result.exception)


@pytest.fixture(scope="module")
def done(study: Path) -> Result:
    out = study / "pictures" / "calibration.png"
    return calibrate(f"{study / 'script.py'}:made", study / "run", "--tolerance", 0.05, "-o", out)


@pytest.fixture
def copy(study: Path, done: Result, tmp_path: Path) -> Path:
    """A study of one's own, calibrated already."""
    return Path(shutil.copytree(study, tmp_path / "study"))


def stored(folder: Path) -> dict[str, Any]:
    text = (folder / "run" / "trajectory.zarr" / "zarr.json").read_text()

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    return json.loads(text, parse_constant=refuse)["attributes"]["calibration"]


def test_the_choice_is_printed_drawn_and_stored(study: Path, done: Result) -> None:
    assert done.exception is None, done.output
    kept = stored(study)
    assert kept["steps"] == {"late": 40, "middle": 20}  # of 10, 20, 30, 40: step 0 does not count
    assert (kept["tolerance"], kept["max_steps"], kept["source"]) == (0.05, 3000, "script.py:made")
    assert str(study) not in json.dumps(kept)
    assert set(kept["trials"]["model"]) == {0, 1}
    assert len({len(column) for column in kept["trials"].values()}) == 1
    assert kept["reasons"] in done.stdout.replace("\n", " ")
    for words in ("late 40", "middle 20", "verdict"):
        assert words in done.stdout
    assert "late checkpoint: step 40, middle checkpoint: step 20 (5 in the series)" in done.stderr
    assert (study / "pictures" / "calibration.png").read_bytes().startswith(b"\x89PNG")


def test_the_line_and_the_stored_settings_are_one_instrument_that_finds_lambda(study: Path, done: Result) -> None:
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("LLC("))
    model, start = load_source(f"{study / 'script.py'}:made")
    pasted = eval(line, {"LLC": LLC, "data": start.data, "loss": regression_loss})
    instrument = LLC(start.data, regression_loss, **stored(study)["settings"])
    assert identity(pasted) == identity(instrument)
    kept = ("nbeta", "chains", "draws", "burn_in", "batch_size", "sampler", "mask")
    assert [getattr(instrument, name) for name in kept] == [getattr(start, name) for name in kept]
    late = with_weights(model, study / "run" / "checkpoints" / "step-00000040.ckpt")
    found = llc(instrument(Snapshot(40, late)))
    x = start.data[0].double()
    stiff = 100 * torch.linalg.eigvalsh(x.T @ x / len(x))
    exact = float((stiff / (stiff + instrument.gamma)).sum() / 2)
    value, se = found["llc"].item(), found["se"].item()
    assert found["verdict"].item() == "ok"
    assert abs(value - exact) < 3 * se + 0.05 * exact, (value, se, exact)


def test_without_a_run_it_prints_and_says_that_nothing_is_stored(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch)
    shutil.move(copy / "run" / "trajectory.zarr", copy / "elsewhere.zarr")
    source = f"{copy / 'script.py'}:restricted"
    result = calibrate(source, copy / "run")
    assert result.exception is None
    assert "nothing is stored" in result.stderr
    assert "nbeta=66.75, gamma=10.0, lr=0.001, control_variate=False, steps_per_draw=3" in result.stdout
    assert "mask=mask" in result.stdout
    assert not (copy / "run" / "trajectory.zarr").exists()
    assert calibrate(source, copy / "run", "--into", copy / "elsewhere.zarr", "--force").exception is None
    settings = Trajectory(copy / "elsewhere.zarr", "r").attrs["calibration"]["settings"]
    assert "mask" not in settings
    assert "there is no trajectory" in fail(source, copy / "run", "--into", copy / "none.zarr")


def test_another_answer_is_shown_and_refused_unless_forced(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, lr=0.00212345)
    before = stored(copy)
    args = (f"{copy / 'script.py'}:made", copy / "run", "--tolerance", 0.05)
    result = calibrate(*args)
    assert isinstance(result.exception, IdentityError)
    assert "now 0.002123" in str(result.exception)
    assert "lr=0.002123" in result.stdout  # what was computed is not lost
    assert stored(copy) == before
    assert calibrate(*args, "--force").exception is None
    assert stored(copy)["settings"]["lr"] == 0.002123
    assert stored(copy)["trials"]["llc"][:2] == [None, 2.3]
    assert calibrate(*args).exception is None  # the same once more
    assert stored(copy)["reasons"] == "because"


@pytest.mark.parametrize(("name", "said"), [
    ("script.py", "expected path/to/script.py:name"),
    ("none.py:made", "there is no script at"),
    ("script.py:absent", "has no function 'absent'; it has data, instrument, made"),
    ("script.py:needy", "give its arguments defaults"),
    ("script.py:data", "a torch module first, or the LLC alone; got (Tensor, Tensor)"),
    ("script.py:reversed_pair", "got (LLC, Regression)"),
    ("script.py:kernel", "name the kernel"),
    ("script.py:wider", "net.weight has shape (1, 4) in step-00000040.ckpt, (1, 5) in Linear"),
    ("script.py:deeper", "its prefixes are 'net.', none fits"),
])  # fmt: skip
def test_a_source_that_does_not_fit_is_told_in_one_line(study: Path, name: str, said: str) -> None:
    assert said in fail(study / name, study / "run")


def test_a_picture_of_another_kind_is_refused(study: Path) -> None:
    assert "-o takes a .png" in fail(f"{study / 'script.py'}:made", study / "run", "-o", "picture.txt")


def test_the_report_has_reasons_figure_and_numbers(copy: Path, tmp_path: Path) -> None:
    run = Trajectory(copy / "run" / "trajectory.zarr", "r")
    text = write_report(run, tmp_path / "r.html", figures=tmp_path / "figures").read_text(encoding="utf-8")
    section = text[text.index('<section id="calibration">') : text.index('<section id="watches">')]
    assert run.attrs["calibration"]["reasons"].replace("'", "&#39;") in section
    assert "step 40 (late) and 20 (middle)" in section
    assert '<figure id="figure-calibration">' in section
    assert section.count("<tr") == 1 + len(run.attrs["calibration"]["trials"]["lr"])
    assert '<a href="#calibration">' in text
    assert (tmp_path / "figures" / "calibration.png").is_file()
    assert text.count(run.attrs["calibration"]["weights"][0]) == 0  # not once more among the provenance
