"""Recipes with exact answers (superposition, deep linear networks, in-context regression): formulas, then the runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from devmon import Trajectory
from devmon.recipes import deep_linear, in_context_regression, superposition, superposition_plateaus
from devmon.testing.exact import deep_linear as deep_linear_llc
from devmon.testing.superposition import plateau, plateau_at, plateaus, population_loss

PUBLISHED = {  # Chen et al. 2023 (2310.06301): sides -> length, bias, h
    4: (1, 0, 0),
    5: (1.17046, -0.28230, 0.23738),
    6: (1.32053, -0.61814, 0.86746),
    7: (1.44839, -0.96691, 1.74870),
    8: (1.55045, -1.29119, 2.77311),
}
LEVELS = {"4": 0.11111, "4+": 0.10417, "4++": 0.09722, "5": 0.06874, "5+": 0.06180, "6": 0.04819}  # of 6 features


def test_population_loss_is_the_integral() -> None:
    """Gauss-Legendre on each side of every kink, for weights of all signs and sizes, biases of 0 among them."""
    rng = np.random.default_rng(0)
    nodes, heights = np.polynomial.legendre.leggauss(4)
    for features in (3, 6):
        weight, bias = rng.standard_normal((2, features)), rng.standard_normal(features) * 0.4
        bias[0], weight[:, -1] = 0.0, 0.0
        total = 0.0
        for i in range(features):
            for j in range(features):
                g, b = weight[:, i] @ weight[:, j], bias[j]
                kink = np.clip(-b / g, 0, 1) if g else 0.0
                for low, high in ((0.0, kink), (kink, 1.0)):
                    u = low + (high - low) * (nodes + 1) / 2
                    error = (np.maximum(g * u + b, 0) - (i == j) * u) ** 2
                    total += (high - low) / 2 * (heights @ error)
        found = population_loss(torch.tensor(weight), torch.tensor(bias))
        np.testing.assert_allclose(float(found), total / features, rtol=1e-12)


@pytest.mark.parametrize("sides", PUBLISHED)
def test_published_polygons(sides: int) -> None:
    found = plateau(sides, 0, sides)
    h = 3 * sides * found.level
    np.testing.assert_allclose((found.length, found.bias, h), PUBLISHED[sides], atol=1e-5)
    weight, bias = found.point()
    np.testing.assert_allclose(float(population_loss(weight, bias)), found.level, atol=1e-12)


def test_published_levels_of_six_features() -> None:
    found = {one.name: one for one in plateaus(6)}
    assert list(found) == list(LEVELS)
    for name, level in LEVELS.items():
        np.testing.assert_allclose(found[name].level, level, atol=6e-6, err_msg=name)
        np.testing.assert_allclose(float(population_loss(*found[name].point())), found[name].level, atol=1e-12)


@pytest.mark.parametrize(
    "sides, positive, features", [(5, 0, 5), (5, 0, 6), (5, 1, 6), (6, 0, 6), (5, 2, 7), (7, 0, 8)]
)
def test_learning_coefficients_are_half_the_rank_where_the_rest_is_flat(
    sides: int, positive: int, features: int
) -> None:
    found = plateau(sides, positive, features)
    curvatures = found.curvatures()
    assert curvatures.min() > -1e-7, "a minimum"
    assert int((curvatures > 1e-4).sum()) == 2 * found.llc
    weight, bias = found.point()
    angle = torch.tensor(0.3, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    moved, shifted = turn @ weight, bias.clone()
    dead = slice(sides + positive, None)
    moved[:, dead] += 0.02 * torch.ones(2, features - sides - positive)
    shifted[dead] += 0.05
    np.testing.assert_allclose(float(population_loss(moved, shifted)), found.level, atol=1e-12)


def test_no_learning_coefficient_is_claimed_at_a_saddle_or_a_kink() -> None:
    """A dead feature that is on lowers the loss by growing beside seven sides; second differences differ at four."""
    saddle = plateau(7, 1, 9)
    assert saddle.curvatures().min() < -5e-5
    assert math.isnan(saddle.llc)
    weight, bias = plateau(4, 0, 4).point()
    curve = [float(population_loss(weight, bias + torch.eye(4, dtype=torch.float64)[0] * s)) for s in (-1e-3, 0, 1e-3)]
    assert math.isnan(plateau(4, 0, 4).llc)
    assert curve[2] - curve[1] > 1.5 * (curve[0] - curve[1]) > 0


def test_plateaus_are_named_under_noise_and_nothing_is_named_between_them() -> None:
    generator = torch.Generator().manual_seed(0)
    for one in plateaus(6):
        weight, bias = one.point()
        order = torch.randperm(6, generator=generator)
        weight = weight + 0.01 * torch.randn(2, 6, generator=generator)
        found = plateau_at(weight[:, order], (bias + 0.003 * torch.randn(6, generator=generator))[order])
        assert found == one, (one.name, found)
    start, end = plateau(4, 1, 6).point(), plateau(5, 0, 6).point()
    for share in (0.3, 0.5, 0.7):
        assert plateau_at(*(a + share * (b - a) for a, b in zip(start, end, strict=True))) is None
    with pytest.raises(ValueError, match="got 5 sides and 2 dead of 6 features"):
        plateau(5, 2, 6)


def test_the_crossing_of_two_polygons_solves_the_free_energies() -> None:
    crossings = superposition_plateaus.predicted_crossings()
    assert set(crossings) == {"5 → 5+", "5 → 6"}  # 5+ and 6 have one λ: the lower loss wins at every n
    for pair, n in crossings.items():
        before, after = (plateau(int(name[0]), name.count("+"), 6) for name in pair.split(" → "))
        energies = [n * one.level + one.llc * math.log(n) for one in (before, after)]
        np.testing.assert_allclose(*energies, rtol=1e-9)


# --- in-context regression ------------------------------------------------------------------------------------------


def test_ridge_is_the_posterior_mean_and_its_error_is_the_one_expected() -> None:
    """By hand for one sequence, and as the error of its predictions over many; K = 16 would give .93, not 1.75."""
    tokens, y = in_context_regression.sequences(40_000, torch.Generator().manual_seed(5))
    found = in_context_regression.ridge(tokens)
    x, noise = tokens[3, ::2, 1:].double().numpy(), in_context_regression.NOISE
    for k in (0, 1, 5):
        weight = np.linalg.inv(x[:k].T @ x[:k] / noise + np.eye(4)) @ x[:k].T @ y[3, :k].double().numpy() / noise
        np.testing.assert_allclose(found[3, k], x[k] @ weight, rtol=1e-6, atol=1e-9)
    errors = (found - y).square()
    se = errors.std(0) / len(errors) ** 0.5
    expected = torch.tensor(in_context_regression.ridge_errors())
    assert bool(((errors.mean(0) - expected).abs() < 4 * se).all()), (errors.mean(0), expected, se)
    assert abs(float(expected[0]) - in_context_regression.ZERO) < 1e-9
    np.testing.assert_allclose(float(expected.mean()), 1.658, atol=0.004)


def test_the_regressor_does_not_see_the_answer() -> None:
    torch.manual_seed(0)
    model = in_context_regression.Regressor().eval()
    assert sum(p.numel() for p in model.parameters()) == 51_712
    tokens, _ = in_context_regression.sequences(4, torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 7] += 1.0  # the fourth y
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4], after[:, 4])


def test_the_coefficient_at_an_error_lies_between_the_estimates_around_its_last_crossing() -> None:
    llc = {0: (5.0, 0.1, False), 150: (500.0, 0.1, True), 200: (105.0, 0.1, False)}
    losses = [4.0, 1.8, 1.9, 1.7]  # it falls below, comes back and falls again
    found = {"steps": [0, 50, 100, 200], "loss": losses, "llc": llc}
    value = in_context_regression._where(found, 1.90)
    assert value == pytest.approx(55.0)  # half-way from 5 to 105, without the rejected
    assert math.isnan(in_context_regression._where(found | {"loss": [4.0, 1.8, 1.9, 1.95]}, 1.90))


# --- deep linear networks -------------------------------------------------------------------------------------------


def test_levels_and_coefficients_of_the_stairs() -> None:
    target = torch.linalg.svdvals(deep_linear.task(3))
    np.testing.assert_allclose(target[:3], deep_linear.TARGET, rtol=1e-5)
    assert float(target[3:].max()) < 1e-5
    assert [round(deep_linear.level(rank), 4) for rank in range(4)] == [5.9062, 1.4062, 0.2812, 0]
    assert [deep_linear_llc(deep_linear.WIDTHS, rank) for rank in range(4)] == [(8, 1), (12, 1), (16, 1), (20, 1)]


def test_the_law_at_rank_zero_against_plain_importance_sampling_and_its_limit() -> None:
    """The outer matrices drawn from the prior itself, at an nbeta at which those weights still do; λ = 8 in the end."""
    rng, nbeta, gamma = np.random.default_rng(1), 3e3, 10.0
    s, t = (np.linalg.svd(rng.standard_normal((40_000, 8, 4)) / gamma**0.5, compute_uv=False) for _ in range(2))
    curvature = nbeta * np.einsum("ns,nt->nst", s**2, t**2)
    weight = np.prod(1 + curvature / gamma, axis=(1, 2)) ** -0.5
    each = (0.5 * curvature / (gamma + curvature)).sum((1, 2))
    mean = float(weight @ each / weight.sum())
    se = float(np.sqrt((weight**2) @ (each - mean) ** 2) / weight.sum())
    assert se < 0.15
    assert abs(deep_linear.law_at_rank_zero(nbeta, gamma) - mean) < 4 * se
    rising = [deep_linear.law_at_rank_zero(nbeta, gamma) for nbeta in (1e4, 1e5, 1e7, 1e9)]
    assert rising == sorted(rising)
    assert 7.95 < rising[-1] < 8


# --- the runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe", [superposition, deep_linear, in_context_regression], ids=lambda recipe: recipe.__name__
)
def test_fast_forms_meet_their_numbers(recipe: ModuleType, tmp_path: Path) -> None:
    done = CliRunner().invoke(recipe.app, ["--fast", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["checks"]) >= 7
    (page,) = [*tmp_path.glob("report.html"), *tmp_path.glob("*/report.html")]
    assert "<html" in page.read_text()
    run = Trajectory(page.parent / "trajectory.zarr", "r")
    assert "llc" in run.names()
