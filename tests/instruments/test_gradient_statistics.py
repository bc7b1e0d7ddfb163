"""`GradientStatistics`: numbers that are known, in every loop, and training that does not know of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from devmon import InstrumentError, LoopMonitor, Trajectory, Watch, every
from devmon.analysis.reports.prose.run_words import alarms
from devmon.instruments import GradientStatistics
from devmon.instruments.gradient_statistics import noise_scale, parts_of
from devmon.sampling import regression_loss
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract
from tests.support.loops import LOOPS, fit, same, seeded

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*", "ignore:.*dataloader.*")


def linear(weights: list[float]) -> nn.Linear:
    model = nn.Linear(len(weights), 1, bias=False).double()
    model.weight.data = torch.tensor([weights], dtype=torch.float64)
    return model


def points(n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, x @ torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64) + torch.randn(
        n, 1, generator=generator, dtype=torch.float64
    )


def by_example(model: nn.Linear, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The gradient (example, weight) of half the squared error."""
    x, y = data
    return (x @ model.weight.T - y).detach() * x


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_noise_scale_is_that_of_the_covariance_of_gradients(batch_size: int) -> None:
    model, data = linear([0.0, 0.0, 0.0]), points()
    row = GradientStatistics(data, regression_loss, batch_size)(Snapshot(0, model))
    g = by_example(model, data).numpy().reshape(-1, batch_size, 3).mean(1)
    n = len(g)
    trace = batch_size * ((g - g.mean(0)) ** 2).sum() / (n - 1)  # of one example, from the batches' covariance
    square = (g.mean(0) ** 2).sum() - trace / batch_size / n  # without what noise adds
    assert row["noise_scale"].item() == pytest.approx(trace / square, rel=1e-6)
    assert row["gradient_square"].item() == pytest.approx(square, rel=1e-6)

    # The jackknife, by hand.
    left = []
    for i in range(n):
        rest = np.delete(g, i, 0)
        t = batch_size * ((rest - rest.mean(0)) ** 2).sum() / (n - 2)
        left.append(t / ((rest.mean(0) ** 2).sum() - t / batch_size / (n - 1)))
    expected = np.sqrt((n - 1) / n * ((np.array(left) - np.mean(left)) ** 2).sum())
    assert row["noise_scale_se"].item() == pytest.approx(expected, rel=1e-6)


def test_the_noise_scale_does_not_depend_on_the_small_batch_and_is_none_at_a_minimum() -> None:
    model, data = linear([0.0, 0.0, 0.0]), points(4096)
    found = [GradientStatistics(data, regression_loss, size)(Snapshot(0, model)) for size in (4, 64)]
    low, high = (row["noise_scale"].item() for row in found)
    error = float(np.hypot(*(row["noise_scale_se"].item() for row in found)))
    assert abs(low - high) < 3 * error
    assert error < 0.2 * low
    squares, dots = np.array([[1.0], [1.0], [1.0], [1.0]]), np.array([[0.0], [0.0], [0.0], [0.0]])
    scale, _, square, _ = noise_scale(squares, dots, 1)  # |G|² below the noise: no scale
    assert np.isnan(scale[0])
    assert square[0] < 0


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_what_an_update_did_in_closed_form(kind: str, tmp_path: Path) -> None:
    model = linear([1.0, -2.0, 0.5])
    make = torch.optim.SGD if kind == "sgd" else torch.optim.Adam
    optimizer = make(model.parameters(), lr=0.01)
    data = points(8)
    grads, moved, start = [], [], []
    with LoopMonitor(
        tmp_path / "run.zarr", [Watch("g", GradientStatistics(), every(2))], optimizer=optimizer
    ) as monitor:
        monitor.step(0, model)
        for step in range(1, 5):
            optimizer.zero_grad()
            regression_loss(model, data).mean().backward()
            grads.append(model.weight.grad.clone())
            before = model.weight.detach().clone()
            optimizer.step()
            start.append(before)
            moved.append(model.weight.detach() - before)
            optimizer.zero_grad()
            monitor.step(step, model)
        assert optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    rows = Trajectory(tmp_path / "run.zarr", "r")["g"]
    assert rows["step"].values.tolist() == [0, 2, 4]
    assert np.isnan(rows["norm"].values[0])
    for at, index in ((1, 1), (2, 3)):
        assert rows["norm"].values[at] == pytest.approx(float(grads[index].norm()), rel=1e-12)
        assert rows["update_ratio"].values[at] == pytest.approx(
            float(moved[index].norm() / start[index].norm()), rel=1e-9
        )
    if kind == "sgd":
        np.testing.assert_allclose(
            rows["update_ratio"].values[1:], 0.01 * rows["norm"].values[1:] / [float(start[i].norm()) for i in (1, 3)]
        )
        assert rows["rms"].isnull().all()
        return
    second = torch.zeros_like(grads[0])
    for index, g in enumerate(grads):
        second = 0.999 * second + 0.001 * g**2
        if index % 2:
            at, count = (index + 1) // 2, index + 1
            assert rows["second_moment_share"].values[at, 0] == pytest.approx(
                float(0.001 * (g**2).sum() / second.sum()), rel=1e-6
            )
            assert rows["second_moment_share_reference"].values[at] == pytest.approx(0.001 / (1 - 0.999**count))
            rms = (g**2 / (second / (1 - 0.999**count))).mean().sqrt()
            assert rows["rms"].values[at, 0] == pytest.approx(float(rms), rel=1e-6)


@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_hands_its_updates_over_and_trains_as_without(loop: str, tmp_path: Path) -> None:
    watches = [Watch("g", GradientStatistics(), every(4))]
    options: dict[str, Any] = {}
    if loop in ("fabric", "plain"):  # they are told their optimizer; these helpers make it inside
        made: list[torch.optim.Optimizer] = []
        init = torch.optim.AdamW.__init__

        def keep(self: Any, *args: Any, **words: Any) -> None:
            init(self, *args, **words)
            made.append(self)

        options["optimizer"] = Late(made)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "__init__", keep)
            watched = fit(loop, tmp_path / "run.zarr", watches, **options)
    else:
        watched = fit(loop, tmp_path / "run.zarr", watches)
    assert same(watched, fit(loop, None, watches))
    rows = Trajectory(tmp_path / "run.zarr", "r")["g"]
    assert rows["step"].values.tolist() == [0, 4, 8, 12]
    assert np.isnan(rows["norm"].values[0])
    assert (rows["norm"].values[1:] > 0).all()
    assert (rows["update_ratio"].values[1:] > 0).all()
    assert len(rows["part"]) == (3 if loop != "lightning" else len(parts_of(watched)))


class Late(list):
    """The optimizers that are made while the loop runs."""

    def __init__(self, made: list[torch.optim.Optimizer]) -> None:
        super().__init__()
        self.made = made

    def __iter__(self) -> Any:
        return iter(self.made[-1:])


def test_a_precursor_of_a_spike_is_an_alarm(tmp_path: Path) -> None:
    model = linear([1.0, -2.0, 0.5])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    data = points(8)
    watches = [Watch("g", GradientStatistics(), every(1))]

    def train(monitor: LoopMonitor) -> None:
        monitor.step(0, model)
        for step in range(1, 45):
            optimizer.zero_grad()
            x, y = data
            regression_loss(model, (x, y + (200.0 if step == 41 else 0))).mean().backward()  # a batch that is odd
            optimizer.step()
            monitor.step(step, model)

    monitor = LoopMonitor(tmp_path / "run.zarr", watches, optimizer=optimizer)
    with pytest.warns(UserWarning, match=r"step 41: the gradient of weight is .* often a loss spike follows"):
        train(monitor)
    monitor.close()
    attrs = Trajectory(tmp_path / "run.zarr", "r").attrs
    assert attrs["precursors"][0]["step"] == 41
    assert "precursor of a loss spike at step 41: the gradient of weight is" in alarms(attrs)[0]


def test_without_an_optimizer_or_data_it_is_refused_before_training(tmp_path: Path) -> None:
    watches = [Watch("g", GradientStatistics(), every(1))]
    with (
        LoopMonitor(tmp_path / "run.zarr", watches) as monitor,
        pytest.raises(InstrumentError, match="optimizer=optim"),
    ):
        monitor.step(0, seeded())
    with pytest.raises(InstrumentError, match="needs 4 small batches of 8 examples, got 16"):
        GradientStatistics(points(16), regression_loss)(Snapshot(0, linear([0.0, 0.0, 0.0])))


class TestContract(InstrumentContract):
    without_error: ClassVar = {"norm": "of the update", "update_ratio": "of the update", "largest_rms": "of the update"}

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def instrument(self) -> GradientStatistics:
        return GradientStatistics(points(), regression_loss, 4)
