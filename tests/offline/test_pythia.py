"""The recipe of Pythia: its schedule, and the whole of it in small, from text to numbers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

from devmon import Trajectory
from devmon.checkpoints.series import Series
from devmon.offline.probe_text import read_probe
from devmon.recipes.pythia import COUNT, LAST, SETTINGS, VOCAB, schedule, shown
from tests.support.in_process import program

ROOT = Path(__file__).parents[2]


def test_the_checkpoints_are_pythias_in_small() -> None:
    assert schedule(143_000, 143) == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 144_000, 1000)]
    assert len(schedule(LAST, COUNT)) in range(150, 156)
    assert schedule(LAST, COUNT)[-1] == LAST


def test_the_recipe_in_small_shows_what_it_promises(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "recipes" / "pythia.py"), "--fast", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    run = Trajectory(tmp_path / "out" / "trajectory.zarr", "r")
    numbers = shown(run)
    assert abs(numbers["loss first"] - math.log(VOCAB)) < 0.3, numbers
    assert numbers["loss last"] < numbers["loss first"] - 0.5, numbers
    assert numbers["induction first"] < 0.1, numbers
    assert math.isfinite(numbers["llc last"]), numbers
    series = Series.open(tmp_path / "out" / "checkpoints")
    assert series.steps == schedule(LAST // 25, 8)
    assert set(run.steps("loss")) <= set(series.steps)
    assert run.steps("llc") == [0, LAST // 25]
    assert (run["llc"].attrs["fields"]["nbeta"], run["llc"].attrs["fields"]["gamma"]) == ("30", "300")
    assert [part.partition("=")[0] for part in SETTINGS[:4]] == ["nbeta", "gamma", "lr", "batch_size"]
    assert set(SETTINGS) == {"nbeta=30", "gamma=300", "lr=3e-5", "batch_size=32", "chains=4", "draws=100", "burn_in=0"}
    text = tmp_path / "out" / "text" / "held_out.txt"
    probe = read_probe(text, series.tokenizer(), 32, 64, 64)
    assert probe.tokens.shape == (32, 64)
    assert 2 < int(probe.tokens.max()) < VOCAB
    again = program("devmon.recipes.pythia", *command[2:])
    assert again.returncode == 0, again.stderr
    assert again.stdout.count(" 0 to measure") == 2, again.stdout
    assert again.stderr.count("loss 4.") == 0, "trained again"
    other = program("devmon.recipes.pythia", *command[2:], "--seed", "1")
    assert other.returncode == 1
    assert "holds another training" in other.stderr
