"""IntrinsicDimension of clouds whose dimension is known, its error over many clouds, and its contract."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.data import random_tokens
from devmon.errors import DataError, InstrumentError
from devmon.instruments.intrinsic_dimension import IntrinsicDimension, _eigenvalues, _layer, _linear, _twonn
from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly, InstrumentContract

WIDTH = 40


class Clouds(nn.Module):
    """A residual stream that is `tables[l][token]`, (token, width), at layer l; returned as the logits."""

    def __init__(self, *tables: Tensor) -> None:
        super().__init__()
        self.embed = nn.Parameter(tables[0].double())
        self.blocks = nn.ModuleList(
            _Add(after.double() - before.double()) for before, after in zip(tables[:-1], tables[1:], strict=True)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.embed[tokens]
        for block in self.blocks:
            state = block(state, tokens)
        return state


class _Add(nn.Module):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, state: Tensor, tokens: Tensor) -> Tensor:
        return state + self.table[tokens]


def isometry(dim: int, seed: int = 0) -> Tensor:
    draw = torch.randn(WIDTH, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(draw)[0].T


def gaussian(items: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(items, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def every_token(items: int) -> Tensor:
    return torch.arange(items).reshape(-1, 10 if items > 100 else 5)


def measure(*tables: Tensor, **settings: Any) -> xr.Dataset:
    return IntrinsicDimension(every_token(len(tables[0])), **settings)(Snapshot(0, Clouds(*tables).eval()))


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_embedded_gaussians_and_spheres_have_their_dimension(dim: int) -> None:
    cloud = gaussian(1000, dim)
    sphere = torch.nn.functional.normalize(gaussian(1000, dim + 1, 1), dim=1)
    offset = 1e4 * torch.ones(WIDTH, dtype=torch.float64)
    found = measure(cloud @ isometry(dim), offset + sphere @ isometry(dim + 1, 3))
    for layer in (0, 1):
        twonn, se = (float(found[name][layer]) for name in ("twonn", "twonn_se"))
        assert abs(twonn - dim) < 3 * se + 0.03 * dim, (twonn, se)
        assert 0 < se < 0.1 * dim
    for name in ("participation_ratio", "effective_rank"):
        for layer, true in ((0, dim), (1, dim + 1)):  # the sphere fills one direction more, seen as a whole
            np.testing.assert_allclose(found[name][layer], true, rtol=0.02)
    np.testing.assert_allclose(found["twonn_reference"][1], dim + 1, rtol=0.15)
    assert found["distinct"].values.tolist() == [900, 900]  # all but the first place of ten


def test_linear_dimensions_in_closed_form() -> None:
    """Items at ± e_i √(n/2) s_i: the covariance is diag(s²)."""
    sizes = np.array([3.0, 2.0, 1.0, 0.5])
    states = np.concatenate([np.diag(sizes), -np.diag(sizes)]) * 2
    eigenvalues = _eigenvalues(states)
    np.testing.assert_allclose(np.sort(eigenvalues), np.sort(sizes**2), rtol=1e-12)
    share = sizes / sizes.sum()
    expected = (sizes**2).sum() ** 2 / (sizes**4).sum(), math.exp(-(share * np.log(share)).sum())
    np.testing.assert_allclose(_linear(eigenvalues), expected, rtol=1e-12)
    wide = np.concatenate([states, np.zeros((8, 30))], axis=1)
    np.testing.assert_allclose(_linear(_eigenvalues(wide + 1e4)), expected, rtol=1e-6)


def test_twonn_of_exact_quantiles_is_exact() -> None:
    """Where μ₍ᵢ₎ = (1 - i/n)^(-1/d) the fit is perfect, whatever is trimmed."""
    for dim, trim in ((3.0, 0.1), (7.5, 0.0)):
        ratio = (1 - np.arange(1, 200) / 200) ** (-1 / dim)
        ratio = np.append(ratio, 1e6)  # the last has no height
        np.testing.assert_allclose(_twonn(np.random.default_rng(0).permutation(ratio), trim), dim, rtol=1e-10)
    far = np.sort(ratio)
    far[-20:] = 1e5
    np.testing.assert_allclose(_twonn(far, 0.1), 7.5, rtol=1e-10)


def test_twonn_against_a_slow_reference() -> None:
    table = gaussian(60, WIDTH, 5) * torch.linspace(0.1, 2, WIDTH)
    found = measure(table, table, positions=tuple(range(5)))
    points = table.numpy()
    ratios = []
    for i in range(60):
        distances = sorted(math.dist(points[i], points[j]) for j in range(60) if j != i)
        ratios.append(distances[1] / distances[0])
    x = np.log(np.sort(ratios))[:54]
    y = np.array([-math.log(1 - i / 60) for i in range(1, 55)])
    np.testing.assert_allclose(found["twonn"][0], (x * y).sum() / (x * x).sum(), rtol=1e-8)


def test_errors_are_those_of_many_clouds() -> None:
    generator = np.random.default_rng(3)
    group = np.arange(300) // 10 % 10
    noise = generator.normal(size=(300, 12))
    rows = [
        _layer(generator.normal(size=(300, 3)) @ generator.normal(size=(3, 12)), 0, group, 0.1, noise)
        for _ in range(150)
    ]
    ratio = np.sqrt(np.mean([row["twonn_se"] ** 2 for row in rows])) / np.std([row["twonn"] for row in rows])
    assert 0.7 < ratio < 1.2, ratio
    fixed = generator.normal(size=(4, 12))
    rows = [_layer(generator.normal(size=(300, 4)) @ fixed, 0, group, 0.1, noise) for _ in range(150)]
    for name in ("participation_ratio", "effective_rank"):
        ratio = np.sqrt(np.mean([row[f"{name}_se"] ** 2 for row in rows])) / np.std([row[name] for row in rows])
        assert 0.85 < ratio < 1.15, (name, ratio)


def test_a_curved_sheet_is_below_its_gaussian_twin() -> None:
    angle = torch.linspace(0, 12, 1000, dtype=torch.float64) + 0.01 * gaussian(1000, 1)[:, 0]
    curve = torch.stack([torch.cos(angle), torch.sin(angle), angle / 6, torch.cos(2 * angle)], 1) @ isometry(4)
    found = measure(curve, gaussian(1000, 4) @ isometry(4))
    assert float(found["twonn"][0]) < 1.3 < 3 < float(found["twonn_reference"][0])
    gap = float(found["twonn"][1] - found["twonn_reference"][1])
    assert abs(gap) < 5 * float(found["twonn_se"][1]), gap


def test_isometries_and_scale_do_not_matter() -> None:
    cloud = gaussian(200, WIDTH, 2) * torch.linspace(0.2, 2, WIDTH)
    found = measure(cloud, 7e3 * cloud @ isometry(WIDTH, 9) + 50)
    for name in ("twonn", "participation_ratio", "effective_rank", "twonn_se", "effective_rank_se"):
        np.testing.assert_allclose(found[name][0], found[name][1], rtol=1e-6)


def test_equal_states_count_once_and_few_are_nothing() -> None:
    cloud = gaussian(300, 3) @ isometry(3)
    again = torch.cat([cloud, cloud * (1 + 1e-9), cloud])
    every = tuple(range(10))
    once, thrice = measure(cloud, cloud, positions=every), measure(again, again, positions=every)
    assert thrice["distinct"].values.tolist() == [300, 300]
    for name in ("twonn", "participation_ratio"):
        np.testing.assert_allclose(thrice[name], once[name], rtol=1e-4)
    few = measure(cloud, cloud[torch.arange(300) % 19])
    assert np.isnan(few["twonn"][1])
    assert np.isnan(few["participation_ratio_se"][1])
    assert float(few["distinct"][1]) == 19
    assert "distinct" in few["twonn"].attrs["nan"]
    constant = measure(cloud, torch.ones(300, WIDTH))
    assert float(constant["distinct"][1]) == 1
    rounded = Clouds(torch.cat([cloud, cloud * (1 + 1e-7), cloud]) + 100, again).float()
    assert 200 < float(IntrinsicDimension(every_token(900))(Snapshot(0, rounded))["distinct"][0]) <= 300


def test_half_precision_and_massive_activations_change_nothing() -> None:
    """In bfloat16 roundings are as large as the distances of neighbours, the more so beside a large common mean."""
    cloud = gaussian(1000, 4) @ isometry(4)
    shift = -29.0 * isometry(1, 8)[0].bfloat16().float()
    tables = cloud.bfloat16().float(), cloud.bfloat16().float() + shift
    whole, half = (
        IntrinsicDimension(every_token(1000))(Snapshot(0, Clouds(*tables).to(dtype)))
        for dtype in (torch.float32, torch.bfloat16)
    )
    for name in ("twonn", "participation_ratio", "distinct"):
        np.testing.assert_allclose(half[name], whole[name], rtol=0.02, err_msg=name)
    assert abs(float(half["twonn"][1]) - 4) < 0.3
    # the first token of every sequence, and one other, lie a thousand times as far as the rest
    massive = cloud.clone()
    massive[torch.arange(1000) % 10 == 0] += 1000 * isometry(1, 8)
    massive[55] -= 1000 * isometry(1, 8)[0]
    found, plain = measure(cloud, massive), measure(cloud, cloud)
    assert found["massive"].values.tolist() == [0, 1]
    for name in ("twonn", "participation_ratio", "effective_rank"):
        np.testing.assert_allclose(found[name][1], plain[name][1], rtol=0.02, err_msg=name)


def test_items_are_the_places_named() -> None:
    table = gaussian(400, 3) @ isometry(3)
    other = table.clone()
    other[torch.arange(400) % 10 < 8] = 0
    tokens = every_token(400)
    where = IntrinsicDimension(tokens, positions=(8, -1))
    xr.testing.assert_identical(where(Snapshot(0, Clouds(table, table))), where(Snapshot(0, Clouds(other, other))))
    limited = IntrinsicDimension(tokens, limit=50)
    assert len(limited._items()) == 50
    assert not torch.equal(limited._items(), IntrinsicDimension(tokens, limit=50, seed=1)._items())
    parts = [
        IntrinsicDimension(tokens, limit=90, batch_size=size)(Snapshot(0, Clouds(table, table))) for size in (7, 99)
    ]
    xr.testing.assert_allclose(*parts, rtol=1e-10)


@pytest.mark.parametrize(
    "wrong", [{"positions": ()}, {"positions": (10,)}, {"trim": 0.5}, {"limit": 3}, {"tokens": random_tokens(9, 9, 10)}]
)
def test_refusals(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="IntrinsicDimension"):
        IntrinsicDimension(**{"tokens": every_token(200), **wrong})
    with pytest.raises(InstrumentError, match=r"^IntrinsicDimension needs the residual stream.*set blocks"):
        IntrinsicDimension(every_token(200))(Snapshot(0, nn.Embedding(200, 4)))


class TestIntrinsicDimension(InstrumentContract):
    def instrument(self) -> IntrinsicDimension:
        return IntrinsicDimension(random_tokens(30, 12, 10))

    def model(self, seed: int) -> nn.Module:
        draw = [gaussian(12, 12, 50 * seed + i) for i in range(4)]
        heads = [[(draw[0], draw[1])], [(draw[2], draw[3])]]
        return AttentionOnly(gaussian(30, 12, seed + 7), gaussian(10, 12, seed + 8), heads, gaussian(12, 30, seed))
