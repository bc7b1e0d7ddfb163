"""Whether checkpoints descend from one another, by their weights: planted faults are found, trainings have none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from devmon import DataError
from devmon.checkpoints.lineage import judge, lineage
from devmon.checkpoints.series import Series
from devmon.cli.root import app
from tests.support.checkpoints import save

STEPS = [0, 1, 2, 4, 8, 16, 32, *range(40, 161, 8)]


def judged(steps: Sequence[int], points: torch.Tensor) -> list[tuple[str, tuple[int, ...]]]:
    """The faults of weights (step, weight) in float64."""
    near = (points[1:] - points[:-1]).norm(dim=1).tolist()
    across = (points[2:] - points[:-2]).norm(dim=1).tolist()
    return [(fault.kind, fault.steps) for fault in judge(steps, near, across)]


def test_walks_have_no_fault_and_points_off_them_do() -> None:
    draw = torch.Generator().manual_seed(0)
    steps = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256]
    times = torch.tensor(steps, dtype=torch.float64)[:, None]
    noise = torch.randn(257, 2000, generator=draw, dtype=torch.float64)
    walks = {
        "straight": times * torch.ones(1, 5, dtype=torch.float64),
        "random": noise.cumsum(0)[steps],
        "around a point": noise[steps],
        "slower": torch.log1p(times) * torch.ones(1, 5, dtype=torch.float64),
        "away and back": torch.cat([times / 256, (times / 256) ** 2], 1),
    }
    for name, walk in walks.items():
        assert judged(steps, walk) == [], name
    for step in (5, 7):
        moved = walks["random"].clone()
        moved[step] += 100 * torch.randn(2000, generator=draw, dtype=torch.float64)
        assert judged(steps, moved) == [("lineage", (steps[step],))]
    moved = walks["random"].clone()
    moved[0] = 100 * torch.randn(2000, generator=draw, dtype=torch.float64)  # another initialisation
    assert judged(steps, moved) == [("lineage", (1,))]
    moved = walks["random"].clone()
    moved[6:] += 3000  # another training from there on
    assert judged(steps, moved) == [("lineage", (steps[6],))]
    moved = walks["random"].clone()
    moved[5] = moved[4]
    assert judged(steps, moved) == [("twins", (8, 16))]


def trained(seed: int) -> dict[int, dict[str, torch.Tensor]]:
    """The weights of a small network at `STEPS` of a training with Adam."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    inputs, target = torch.randn(256, 8), torch.randn(8, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    held = {}
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            held[step] = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer.zero_grad()
        rows = torch.randint(256, (32,))
        ((model(inputs[rows]) - (inputs[rows] @ target).sin()) ** 2).mean().backward()
        optimizer.step()
    return held


def test_faults_of_a_real_training_are_found(tmp_path: Path) -> None:
    weights, other = trained(0), trained(1)
    planted: dict[str, tuple[dict[int, Any], list[tuple[str, tuple[int, ...]]]]] = {
        "clean": ({}, []),
        "of another training": ({64: other[64]}, [("lineage", (64,))]),
        "of the end": ({32: weights[160]}, [("lineage", (32,))]),
        "another beginning": ({0: other[0]}, [("lineage", (1,))]),
        "another end": ({160: other[160]}, [("lineage", (160,))]),
        "another from there on": ({s: other[s] for s in STEPS if s >= 80}, [("lineage", (80,))]),
        "once more": ({72: weights[64]}, [("twins", (64, 72))]),
        "another model": ({48: {"0.weight": torch.zeros(2, 2)}}, [("extra", (40, 48))]),
        "no model": ({48: {"epoch": 3}}, [("missing", (48,))]),
    }
    for name, (changed, told) in planted.items():
        folder = tmp_path / name
        for step, state in (weights | changed).items():
            save(folder / f"step-{step}.pt", state)
        read = lineage(Series.open(folder), 100)
        assert [(fault.kind, fault.steps) for fault in read.faults] == told, name
    few = lineage(Series.open(tmp_path / "clean"), 5)
    assert few.steps == [0, 1, 4, 32, 160]
    apart = {key: value - weights[1][key] for key, value in weights[4].items()}
    expected = sum(float((value.double() ** 2).sum()) for value in apart.values()) ** 0.5
    assert few.distance[1] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(DataError, match="three checkpoints at least, got 2: raise --weights"):
        lineage(Series.open(tmp_path / "clean"), 2)
    for name, code in (("clean", 0), ("another beginning", 1)):
        result = CliRunner().invoke(app, ["audit", str(tmp_path / name), "--weights", "100", "--json"])
        assert result.exit_code == code, result.output
        said = json.loads(result.output)
        assert [fault["steps"] for fault in said["faults"]] == [[1]] * code
        assert said["lineage"]["steps"] == STEPS
