"""What Curvature refuses, what it leaves open, and its contract."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from devmon.errors import DataError, InstrumentError
from devmon.instruments import Curvature, curvature
from devmon.sampling import classification_loss, next_token_loss
from devmon.testing import InstrumentContract
from tests.instruments.test_curvature import UNEVEN, Attending, Bowl, labelled, measure, mlp, precise, rotated


def test_unresolved_eigenvalues_are_nan_and_the_trace_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvature, "RESTARTS", 1)
    matrix = rotated(np.linspace(0.0, 1.0, 300))
    found = measure(precise(UNEVEN, tolerance=1e-12), Bowl(matrix))
    lost = ["eigenvalue", "eigenvalue_error", "least", "least_error", "effective_rank", "effective_rank_se"]
    for name in lost:
        assert np.isnan(found[name]).all(), name
    assert abs(float(found["trace"]) - 150) < 4 * float(found["trace_se"]) < 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top": 0}, "top must be at least 1, got 0"),
        ({"top": 96}, "top must be from 1 to the 95 parameters, got 96"),
        ({"probes": 1}, "probes must be at least 2, got 1"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"tolerance": 0.0}, "tolerance, relative to the norm of the Hessian, must be in (0, 1): 0.0"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"mask": "nothing"}, "selects no parameter"),
        ({"loss": lambda model, batch: model(batch[0]).sum()}, "one loss per example"),
        ({"loss": torch.no_grad()(classification_loss)}, "through autograd: look for no_grad"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InstrumentError) as error:
        measure(replace(precise(labelled(), classification_loss), **settings), mlp(0))
    assert message in str(error.value)


def test_no_data_is_refused() -> None:
    with pytest.raises(DataError, match="at least one example"):
        measure(precise(torch.zeros(0, 4)), mlp(0))


@pytest.mark.parametrize("size", [5, 80])
def test_what_is_not_finite_is_refused(size: int) -> None:
    model, x = nn.Linear(size, 1, bias=False).double(), torch.ones(4, size, dtype=torch.float64)
    with pytest.raises(InstrumentError, match="loss at w. is not finite for 1 of 4"):
        measure(precise(x * torch.tensor([[1], [1], [np.inf], [1]]), lambda model, x: model(x)[:, 0] ** 2), model)
    nn.init.zeros_(model.weight)  # |0|^1.5 has a slope, 0, but no curvature
    with pytest.raises(InstrumentError, match=r"second derivatives of the loss at w\* are not finite"):
        measure(precise(x, lambda model, x: model(x)[:, 0].abs() ** 1.5), model)


def test_an_operation_without_second_derivative_is_named() -> None:
    tokens = torch.randint(9, (10, 6), generator=torch.Generator().manual_seed(0))

    def fused(model: nn.Module, batch: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return next_token_loss(model, batch)

    with pytest.raises(InstrumentError, match=r"operation of Attending has none: .*attention.*plain"):
        measure(Curvature(tokens, loss=fused), Attending())

    def own(model: nn.Module, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("something of the user's own")
        return model(x)[:, 0]

    with pytest.raises(RuntimeError, match="user's own"):
        measure(Curvature(torch.ones(3, 4), loss=own), nn.Linear(4, 1))


class Kernel(torch.autograd.Function):
    """tanh with a backward pass that autograd does not see into, as custom kernels have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return (slope / ctx.saved_tensors[0].cosh() ** 2).detach()


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Kernel.apply(x)


@pytest.mark.parametrize("mask", [None, ["0.weight", "3.bias"]])
def test_a_kernel_that_is_silent_about_its_second_derivative_is_found(mask: list[str] | None) -> None:
    model = mlp(0)
    model[1] = Custom()
    with pytest.raises(InstrumentError, match="second derivatives are not symmetric"):
        measure(precise(labelled(), classification_loss, mask=mask), model)


# --- contract -----------------------------------------------------------------------------------------------------


class TestCurvature(InstrumentContract):
    without_error = dict.fromkeys(
        ("eigenvalue", "least"), "no sampling: `_error` is a bound, the residual, and no standard error"
    )

    def instrument(self) -> Curvature:
        return Curvature(labelled(), loss=classification_loss, top=2, probes=4, tolerance=1e-2)

    def model(self, seed: int) -> nn.Module:
        return mlp(seed, torch.float32)


class TestCurvatureOfFewParameters(TestCurvature):
    def instrument(self) -> Curvature:
        return Curvature(labelled(), loss=classification_loss, mask="0.*")
