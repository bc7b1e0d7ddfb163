from __future__ import annotations

import contextlib
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from devmon import Trajectory, Watch, observe
from tests.anatomy.test_anatomy_sites import VOCAB, family

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_script_runs_as_printed(tmp_path: Path) -> None:
    script, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "script.py").write_text(script)
    run = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # again in the same folder: the data are the same, so the run is taken up
    with contextlib.chdir(tmp_path), warnings.catch_warnings(action="ignore"):
        runpy.run_path("script.py", run_name="__main__")
    trajectory = Trajectory(tmp_path / "runs" / "mine" / "trajectory.zarr", "r")
    assert trajectory.names() == ["induction", "llc", "loss"]
    assert trajectory.steps("loss")[0] == 0
    assert trajectory.steps("loss")[-1] == 200
    added = script.split("# ---")[1].splitlines()[1:]
    assert sum(bool(line.strip()) for line in added) <= 10


def test_the_own_instrument_runs_as_printed(tmp_path: Path) -> None:
    _, code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) <= 20
    names: dict[str, Any] = {"__name__": "own"}
    exec(code, names)
    tokens = torch.randint(VOCAB, (4, 9), generator=torch.Generator().manual_seed(0))
    model = family("opt")  # with ReLU
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.bias[:12] = -1e3
    trajectory = Trajectory(tmp_path / "run.zarr")
    observe(0, model, [Watch("dead", names["DeadNeurons"](tokens), range(9))], trajectory)
    dead = trajectory["dead"]["dead"].sel(step=0).values
    assert dead[1] >= 12 / 48 > dead[0]
