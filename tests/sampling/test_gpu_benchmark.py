"""benchmarks/gpu.py runs in its small form on the CPU; what a part that fails leaves to the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu


@pytest.mark.filterwarnings("ignore:λ̂ moves by")  # in bfloat16, of models that are too small for it
@pytest.mark.parametrize("part", ["step70", "chains", "preset"])
def test_every_part_gives_numbers(part: str) -> None:
    found = gpu.PARTS[part][1](gpu.Bench(small=True))
    json.loads(json.dumps(found))
    numbers = {
        "step70": lambda: found["bfloat16"]["plain_ms"],
        "chains": lambda: found["steps_over_those_of_one_chain"],
        "preset": lambda: found["forward_backward_passes"],
    }
    assert numbers[part]() > 0, found


def test_budgets_leave_time_for_all() -> None:
    assert sum(budget for budget, _ in gpu.PARTS.values()) <= 480


def test_a_slow_part_and_one_that_fails_take_nothing_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = (0.1, gpu.PARTS["chains"][1])
    monkeypatch.setattr(gpu, "PARTS", gpu.PARTS | {"chains": slow})
    monkeypatch.setattr(gpu, "machine", lambda small: {"device": "cpu"})
    ran: list[Any] = []
    kept = gpu.run

    def run(part: str, small: bool) -> dict[str, Any]:
        ran.append(part)
        return kept(part, small) if part == "chains" else {"seconds": 1.0}

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--json", str(tmp_path / "x.json")])
    gpu.main()
    found = json.loads((tmp_path / "x.json").read_text())
    assert ran == [*gpu.PARTS], "the others ran"
    assert found["chains"] == {"failed": "not done within 0.1 s"}
    assert found["calibration"] == {"seconds": 1.0}
