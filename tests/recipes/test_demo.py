"""The demo and the command line, end to end on a short run: what a newcomer types, and what goes wrong for one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xarray as xr

from devmon import Trajectory
from devmon.callbacks import checkpoints
from tests.support.in_process import program

SHORT = ["--steps", "24", "--draws", "4", "--text"]


def devmon(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return program("devmon.cli", *args, cwd=cwd)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "own.txt"
    path.write_text("".join(f"line {i}: the {i % 7} quick foxes jump over {i * i} dogs\n" for i in range(4000)))
    return path


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "short"
    done = devmon("demo", *SHORT, text, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "step 24/24" in done.stderr
    return out


def test_the_demo_writes_store_checkpoints_report_and_figures(run: Path, text: Path) -> None:
    store = Trajectory(run / "trajectory.zarr", "r")
    assert store.names() == ["in_context", "induction", "llc", "loss", "previous_token", "probe", "repeats"]
    for name in store:
        assert store.steps(name)[0] == 0
        assert store.steps(name)[-1] == 24
    assert 0 in checkpoints(run / "checkpoints")
    assert (run / "report.html").stat().st_size < 1_500_000
    assert (run / "figures" / "overview.png").read_bytes().startswith(b"\x89PNG")
    assert "own.txt" in store.attrs["data"]
    assert str(text.parent) not in json.dumps(store.attrs)


def test_show_detect_and_report_read_the_run(run: Path, tmp_path: Path) -> None:
    shown = devmon("show", run)
    assert shown.returncode == 0, shown.stderr
    assert "InductionHeads" in shown.stdout
    assert "previous_token" in shown.stdout
    found = devmon("detect", run, "--series", "induction", "--json", "--nulls", 19)
    assert found.returncode == 0, found.stderr
    assert list(json.loads(found.stdout)["series"]) == ["induction/prefix_matching max"]
    written = devmon("report", run / "trajectory.zarr", "-o", tmp_path / "page.html")
    assert written.returncode == 0, written.stderr
    assert "<html" in (tmp_path / "page.html").read_text()


def test_an_interrupted_run_continues_to_the_same_numbers(run: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "devmon.cli", "demo", *SHORT, str(text), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not {8, 9} & set(checkpoints(out / "checkpoints")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert 0 < len(Trajectory(out / "trajectory.zarr", "r").steps("loss")) < 25
    assert devmon(*command[3:]).returncode == 0
    left_alone, resumed = Trajectory(run / "trajectory.zarr", "r"), Trajectory(out / "trajectory.zarr", "r")
    for name in left_alone:
        xr.testing.assert_identical(
            left_alone[name].drop_vars("seconds").drop_attrs(), resumed[name].drop_vars("seconds").drop_attrs()
        )


@pytest.mark.parametrize("args, said", [
    (["--text", "missing.txt"], "there is no text at missing.txt"),
    (["--text", "empty.txt"], "empty.txt holds 0 characters"),
    (["--text", "own.txt", "--out", "file/run"], "cannot make"),
])  # fmt: skip
def test_bad_input_is_one_line_with_a_remedy(args: list[str], said: str, tmp_path: Path, text: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "own.txt").write_text(text.read_text())
    failed = devmon("demo", *args, cwd=tmp_path)
    assert failed.returncode == 1
    assert said in failed.stderr.splitlines()[-1]
    assert "give" in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr


def test_a_run_of_another_configuration_is_refused_and_kept(run: Path, text: Path) -> None:
    before = Trajectory(run / "trajectory.zarr", "r")["loss"]
    failed = devmon("demo", *SHORT, text, "--out", run, "--no-repeats", "--seed", "5")
    assert failed.returncode == 1
    assert "seed: stored 0, now 5; repeats: stored True, now False" in failed.stderr.splitlines()[-1]
    xr.testing.assert_identical(before, Trajectory(run / "trajectory.zarr", "r")["loss"])


@pytest.mark.parametrize("command", [["show"], ["detect"], ["report"]])
def test_a_missing_run_is_one_line(command: list[str], tmp_path: Path) -> None:
    failed = devmon(*command, tmp_path / "nothing", cwd=tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: there is no trajectory at")
    assert len(failed.stderr.splitlines()) == 1


def test_help_teaches() -> None:
    for args in (["--help"], ["demo", "--help"], ["detect", "--help"]):
        helped = devmon(*args)
        assert helped.returncode == 0
        assert "devmon" in helped.stdout
    assert "devmon report RUN" in devmon("--help").stdout
    assert "--no-repeats" in devmon("demo", "--help").stdout
