"""The checkpoints of a folder, by step, without Lightning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from devmon.checkpoints.folder import checkpoints, latest


def test_a_series_is_listed_in_order_of_steps_and_other_files_are_passed_over(tmp_path: Path) -> None:
    assert (checkpoints(tmp_path), latest(tmp_path)) == ({}, None)
    for name in (
        "step-00000100.ckpt",
        "step-00000020.ckpt",
        "step-3.ckpt",
        "step-5.ckpt.tmp",
        "step-x.ckpt",
        "last.ckpt",
    ):
        (tmp_path / name).touch()
    assert list(checkpoints(tmp_path).items()) == [
        (3, tmp_path / "step-3.ckpt"),
        (20, tmp_path / "step-00000020.ckpt"),
        (100, tmp_path / "step-00000100.ckpt"),
    ]
    assert latest(tmp_path) == tmp_path / "step-00000100.ckpt"


def test_measuring_afterwards_lists_them_without_lightning(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000007.ckpt").touch()
    code = (
        "import sys; import devmon.offline.source; from devmon.checkpoints.series import Series; "
        f"print(Series.open({str(tmp_path)!r}).steps, 'lightning' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[7] False"
