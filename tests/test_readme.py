from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from devmon import Trajectory

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_script_runs_as_printed(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "script.py").write_text(script)
    run = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    trajectory = Trajectory(tmp_path / "runs" / "mine" / "trajectory.zarr", "r")
    assert trajectory.names() == ["induction", "llc", "loss"]
    assert trajectory.steps("loss")[0] == 0
    assert trajectory.steps("loss")[-1] == 200
    added = script.split("# ---")[1].splitlines()[1:]
    assert sum(bool(line.strip()) for line in added) <= 10
