"""ModelCode: bits of Gaussian weights by theory, structure that permuting destroys, the coarsest grid that holds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from devmon.errors import DataError
from devmon.instruments.model_code import SPACINGS, ModelCode
from devmon.sampling.losses import regression_loss
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract

X = torch.randn(64, 40, generator=torch.Generator().manual_seed(0))


def linear(weight: Tensor) -> nn.Linear:
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model.weight.data = weight.clone()
    return model.eval()


def gaussian(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, 40, generator=torch.Generator().manual_seed(seed))


def distance_to_zero(model: nn.Module, batch: Any) -> Tensor:
    return 0 * batch[0][:, 0]


def test_bits_of_gaussian_weights_are_the_entropy_of_the_grid() -> None:
    weight = gaussian(2000)
    model, target = linear(weight), (X, X @ weight.T)
    found = ModelCode(target, regression_loss, (0.5, 50.0, 1e9))(Snapshot(0, model))
    for i in range(2):
        spacing = float(found["spacing"][i])
        assert spacing in SPACINGS
        cells = np.round(gaussian(20_000, 5).numpy() / spacing).ravel()
        share = np.unique(cells, return_counts=True)[1] / cells.size
        theory = -(share * np.log2(share)).sum()
        assert float(found["bits_per_weight"][i]) == pytest.approx(theory, rel=0.15)  # bzip2 is no ideal coder
        assert float(found["bits"][i]) == pytest.approx(float(found["bits_permuted"][i]), rel=0.01)  # no structure
        # rounding to a grid adds Δ²/12 a weight: the squared error that it makes is known
        rise = float(found["loss_coded"][i] - found["loss"])
        assert rise == pytest.approx(2000 * 40 * spacing**2 / 12 / 2, rel=0.2)
        assert rise <= (0.5, 50.0)[i] < 4.6 * rise  # and the next spacing, twice as wide, would lose four times that
    assert float(found["spacing"][2]) == SPACINGS[0]


def test_repeated_rows_are_coded_once_and_permuted_ones_are_not() -> None:
    found = ModelCode((X, X), distance_to_zero)(Snapshot(0, linear(gaussian(50).repeat(40, 1))))
    assert found["bits"].item() < 0.2 * found["bits_permuted"].item()
    zero = ModelCode((X, X), distance_to_zero)(Snapshot(0, linear(torch.zeros(2000, 40))))
    assert zero["bits"].item() < 1000


def test_a_grid_that_only_happens_to_hold_is_passed_over() -> None:
    """A weight of one value lies on the grid at spacings 1, ½, ¼ …, and is rounded to 0 at 4."""
    model, target = linear(torch.ones(3, 40)), (X, X @ torch.ones(3, 40).T)
    found = ModelCode(target, regression_loss, (0.0,))(Snapshot(0, model))
    assert found["spacing"].item() == 1
    np.testing.assert_allclose(found["loss_coded"], 0, atol=1e-9)

    class Trap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor([1.0, 7.0]))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        kept = (model.a[0] == 0) | ((model.a - torch.tensor([1.0, 7.0])).abs().max() < 0.1)  # type: ignore[operator,index]
        return (~kept).float() * torch.ones(len(batch))

    found = ModelCode(X, loss, (0.0,))(Snapshot(0, Trap()))
    assert found["spacing"].item() < 0.2  # not 4, at which the first is 0
    own = gaussian(3)

    def moved(model: nn.Module, batch: Tensor) -> Tensor:
        return (model.weight - own).abs().max().expand(len(batch))  # type: ignore[operator,union-attr]

    never = ModelCode(X, moved, (0.0,))(Snapshot(0, linear(own)))
    assert math.isnan(never["bits"].item())


def test_refusals() -> None:
    with pytest.raises(DataError, match="at least 0"):
        ModelCode(X, tolerance=(-1.0,))


class TestModelCode(InstrumentContract):
    without_error = {"bits": "a function of the weights"}  # noqa: RUF012

    def instrument(self) -> ModelCode:
        return ModelCode((X, X[:, :3]), regression_loss)

    def model(self, seed: int) -> nn.Module:
        return linear(gaussian(3, seed))
