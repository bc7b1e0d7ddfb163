"""WeightStatistics against closed forms, NumPy's SVD, scaling, and its contract."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from devmon.errors import InstrumentError
from devmon.instruments.weight_statistics import MATRIX, SQUARE, WeightStatistics
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract


def measure(model: nn.Module):
    return WeightStatistics()(Snapshot(0, model))


def random_model(seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 5), nn.Conv2d(3, 4, 2)).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


class Tied(nn.Module):
    def __init__(self, weight: Tensor, tie: bool = True) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Embedding(*weight.shape), nn.Linear(*weight.shape[::-1], bias=False)
        self.embed.weight = nn.Parameter(weight)
        self.unembed.weight = self.embed.weight if tie else nn.Parameter(weight.clone())


def test_every_statistic_against_numpy() -> None:
    model = random_model(3)
    found = measure(model)
    assert found["parameter"].values.tolist() == ["0.weight", "2.weight", "3.weight"]
    for name in found["parameter"].values:
        matrix = model.get_parameter(name).detach().numpy()
        matrix = matrix.reshape(len(matrix), -1)
        singular = np.linalg.svd(matrix, compute_uv=False)
        row = found.sel(parameter=name)
        expected = {
            "l1": np.abs(matrix).sum(), "l2": np.linalg.norm(matrix), "spectral": singular.max(),
            "code_sparsity": np.abs(matrix).sum() / np.linalg.norm(matrix), "sv_mean": singular.mean(),
            "sv_variance": ((singular - singular.mean()) ** 2).mean(),
        }  # fmt: skip
        for key, value in expected.items():
            np.testing.assert_allclose(row[key], value, rtol=1e-10, err_msg=f"{name} {key}")
        if matrix.shape[0] == matrix.shape[1]:
            np.testing.assert_allclose(row["trace"], np.trace(matrix), rtol=1e-10)
            np.testing.assert_allclose(row["computational_sparsity"], np.trace(matrix) / singular.max(), rtol=1e-10)
        else:
            assert np.isnan(row["trace"])
            assert np.isnan(row["computational_sparsity"])
    conv = found.sel(parameter="3.weight")
    np.testing.assert_allclose(conv["spectral_reference"], conv["l2"] * (2 + math.sqrt(12)) / math.sqrt(48), rtol=1e-10)
    flat = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
    np.testing.assert_allclose(found["model_l1"], np.abs(flat).sum(), rtol=1e-12)
    np.testing.assert_allclose(found["model_l2"], np.linalg.norm(flat), rtol=1e-12)
    np.testing.assert_allclose(found["density"], np.abs(flat).sum() / np.linalg.norm(flat) / np.sqrt(flat.size))
    np.testing.assert_allclose(found["mean_sv_variance"], found["sv_variance"].mean(), rtol=1e-12)
    for kind, dims in (("weight", (2, 3, 4)), ("vector", (1,))):
        entries = np.concatenate([p.detach().numpy().ravel() for p in model.parameters() if p.ndim in dims])
        np.testing.assert_allclose(found["mean"].sel(kind=kind), entries.mean(), rtol=1e-10)
        np.testing.assert_allclose(found["variance"].sel(kind=kind), entries.var(), rtol=1e-10)


def test_ends_of_the_code_sparsity() -> None:
    one, even = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
    one.weight.data.zero_()[2, 3] = -5
    even.weight.data.fill_(0.25)
    assert float(measure(one)["code_sparsity"][0]) == 1
    np.testing.assert_allclose(measure(even)["code_sparsity"], math.sqrt(32), rtol=1e-12)
    np.testing.assert_allclose(measure(even)["density"], 1, rtol=1e-12)


def test_an_orthogonal_matrix_has_equal_singular_values() -> None:
    model = nn.Linear(30, 30, bias=False).double()
    nn.init.orthogonal_(model.weight, gain=3.0)
    found = measure(model)
    np.testing.assert_allclose([found["spectral"][0], found["sv_mean"][0]], 3.0, rtol=1e-7)
    np.testing.assert_allclose(found["sv_variance"], 0.0, atol=1e-12)


def test_a_gaussian_matrix_scores_its_references() -> None:
    model = nn.Linear(400, 300, bias=False)
    nn.init.normal_(model.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    found = measure(model)
    for name in ("code_sparsity", "spectral"):
        np.testing.assert_allclose(found[name], found[f"{name}_reference"], rtol=0.02)
    np.testing.assert_allclose(found["density"], found["density_reference"], rtol=0.01)
    low_rank = nn.Linear(400, 300, bias=False)
    low_rank.weight.data = torch.outer(torch.ones(300), torch.ones(400))
    assert float(measure(low_rank)["spectral"][0] / measure(low_rank)["spectral_reference"][0]) > 9


def test_tied_parameters_count_once() -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    tied, free = measure(Tied(weight)), measure(Tied(weight, tie=False))
    assert tied["parameter"].values.tolist() == ["embed.weight"]
    np.testing.assert_allclose(free["model_l2"], math.sqrt(2) * tied["model_l2"], rtol=1e-10)


@pytest.mark.parametrize("factor", [-1e-30, 3e3, 1e30])
def test_scaling(factor: float) -> None:
    model, scaled = random_model(0), random_model(0)
    for parameter in scaled.parameters():
        parameter.data *= factor
    plain, found = measure(model), measure(scaled)
    for name, (_, units) in MATRIX.items():
        power = {"1": 0, "weight": 1, "squared weight": 2}[units]
        sign = np.sign(factor) if name in SQUARE else 1
        np.testing.assert_allclose(found[name], sign * plain[name] * abs(factor) ** power, rtol=1e-9)


def test_non_finite_and_zero_matrices_are_nan_alone() -> None:
    model = random_model(0)
    model.get_parameter("2.weight").data[1, 1] = math.inf
    model.get_parameter("0.weight").data.zero_()
    found = measure(model)
    assert np.isnan([found[name].sel(parameter="2.weight") for name in MATRIX]).all()
    assert np.isnan(found["density"])
    assert float(found["l2"].sel(parameter="0.weight")) == 0
    assert np.isnan(found["code_sparsity"].sel(parameter="0.weight"))
    assert np.isfinite(found["l2"].sel(parameter="3.weight"))


def test_a_model_without_matrices_is_told_so() -> None:
    with pytest.raises(InstrumentError, match=r"^WeightStatistics needs parameters of two or more.*LayerNorm has none"):
        measure(nn.LayerNorm(3))


def test_half_precision_and_compiled_names() -> None:
    half = measure(random_model(0).bfloat16())
    full = measure(random_model(0))
    np.testing.assert_allclose(half["spectral"], full["spectral"], rtol=1e-2)
    wrapped = nn.ModuleDict({"_orig_mod": random_model(0)})
    assert measure(wrapped)["parameter"].values.tolist() == full["parameter"].values.tolist()


class Experts(nn.Module):
    """Four experts in one parameter, as transformers keeps them, a position table of one, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(4, 6, 5, generator=generator, dtype=torch.float64))
        self.places = nn.Parameter(torch.randn(1, 3, 2, generator=generator, dtype=torch.float64))
        self.conv = nn.Conv1d(3, 4, 2).double()


def test_experts_are_matrices_of_their_own() -> None:
    model = Experts()
    found = measure(model)
    assert found["parameter"].values.tolist() == [*(f"up[{i}]" for i in range(4)), "places", "conv.weight"]
    for i, expert in enumerate(model.up.detach().numpy()):
        np.testing.assert_allclose(
            found["spectral"].sel(parameter=f"up[{i}]"), np.linalg.svd(expert, compute_uv=False).max()
        )
    np.testing.assert_allclose(found["l2"].sel(parameter="places"), model.places.detach().norm())
    whole = torch.cat([p.detach().flatten() for p in model.parameters()])
    np.testing.assert_allclose(found["model_l2"], whole.norm())
    twin = Experts()
    twin.up = nn.Parameter(torch.eye(5, dtype=torch.float64).expand(9, 5, 5).clone())
    np.testing.assert_allclose(measure(twin)["spectral"][:9], 1)  # flattened together it would be 3


def test_weights_are_those_that_are_used() -> None:
    plain = nn.Sequential(nn.Linear(5, 4), nn.Conv1d(2, 3, 2)).double()
    used = copy.deepcopy(plain)
    torch.nn.utils.parametrizations.weight_norm(used[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(used[1])
    for found in (measure(used), measure(nn.ModuleDict({"a": used}))):
        expected = measure(plain)
        names = [name.removeprefix("a.") for name in found["parameter"].values]
        assert sorted(names) == sorted(expected["parameter"].values)
        for name in ("l1", "spectral", "sv_variance"):
            np.testing.assert_allclose(np.sort(found[name]), np.sort(expected[name]))
        np.testing.assert_allclose(found["model_l2"], expected["model_l2"])
    with torch.no_grad():
        used[1].weight_g.mul_(3)  # the tensor of the last pass is stale
    np.testing.assert_allclose(
        measure(used)["spectral"].sel(parameter="1.weight"), 3 * expected["spectral"].sel(parameter="1.weight")
    )
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InstrumentError, match="weight of Linear are packed"):
        measure(packed)


class TestWeightStatistics(InstrumentContract):
    without_error = dict.fromkeys(("density", "model_l2", "mean_spectral"), "exact functions of the weights")

    def instrument(self) -> WeightStatistics:
        return WeightStatistics()

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)
