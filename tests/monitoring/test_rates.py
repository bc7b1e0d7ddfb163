"""The learning rates that a monitor sees, and what a report makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from devmon import LoopMonitor, Trajectory, Watch, every
from devmon.analysis.transitions.schedule import kinks_of, schedule_of
from tests.support.lightning_toys import Norm

WARM, LAST = 20, 60


def trained(path: Path, steps: range, *, told: bool = True) -> Trajectory:
    """A warm-up to .1 at step 20, then a fall to 0 at step 60; measured every two steps."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rate = lambda step: step / WARM if step < WARM else (LAST - step) / (LAST - WARM)  # noqa: E731
    watches = [Watch("norm", Norm(), every(2))]
    with LoopMonitor(path, watches, optimizer=[optimizer] if told else None) as monitor:
        for step in steps:
            optimizer.param_groups[0]["lr"] = 0.1 * rate(step)
            monitor.step(step, model)
    return Trajectory(path, "r")


def test_the_end_of_a_warm_up_is_known_from_the_rates_that_were_seen(tmp_path: Path) -> None:
    run = trained(tmp_path / "run.zarr", range(LAST + 1))
    assert {int(step): rate for step, rate in run.attrs["rates"].items()} == pytest.approx(
        {step: 0.1 * (step / 20 if step < 20 else (60 - step) / 40) for step in range(0, 61, 2)}
    )
    schedule = schedule_of(run, [])
    assert schedule is not None
    assert not isinstance(schedule, list)
    assert [kink.step for kink in kinks_of(schedule)] == [WARM]


def test_rates_past_a_resumption_are_those_of_the_new_attempt(tmp_path: Path) -> None:
    trained(tmp_path / "run.zarr", range(LAST + 1))
    run = Trajectory(tmp_path / "run.zarr")
    with LoopMonitor(run, [Watch("norm", Norm(), every(2))]) as monitor:
        monitor.step(31, torch.nn.Linear(2, 1))
    assert sorted(map(int, run.attrs["rates"])) == list(range(0, 31, 2))


def test_without_an_optimizer_nothing_is_known(tmp_path: Path) -> None:
    run = trained(tmp_path / "run.zarr", range(LAST + 1), told=False)
    assert "rates" not in run.attrs
    assert schedule_of(run, []) is None


def test_an_optimizer_without_a_rate_trains_on(tmp_path: Path) -> None:
    """As Adafactor with a step of its own, whose rate is None."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with LoopMonitor(tmp_path / "run.zarr", [Watch("norm", Norm(), every(1))], optimizer=optimizer) as monitor:
        for step in range(3):
            monitor.step(step, model)
    run = Trajectory(tmp_path / "run.zarr", "r")
    assert run.steps("norm") == [0, 1, 2]
    assert "rates" not in run.attrs
