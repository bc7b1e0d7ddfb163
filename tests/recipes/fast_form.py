"""The fast form of a recipe, run as a user runs it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tests.support.in_process import program


def check_fast_form(name: str, folder: Path) -> None:
    """It ends well, and its numbers lie within their intervals."""
    done = program(f"devmon.recipes.{name}", "--fast", "--out", folder / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "run" / "results.json").read_text())
    for one in found["checks"]:
        low, high = (-math.inf if one["low"] is None else one["low"], math.inf if one["high"] is None else one["high"])
        assert low <= one["value"] <= high, one
    assert len(found["checks"]) >= 5
