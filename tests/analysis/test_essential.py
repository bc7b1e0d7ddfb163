"""Essential dynamics: circles and lines in closed form, random walks as the theory has them, planted cusps found."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import xarray as xr
from sklearn.decomposition import PCA

from devmon.analysis.derive.essential import _dimension, essential_dynamics
from devmon.errors import DataError


def walk(seed: int, count: int = 80, dimension: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dimension)).cumsum(0)


def embedded(curve: np.ndarray, dimension: int = 30, seed: int = 0) -> np.ndarray:
    frame = np.linalg.qr(np.random.default_rng(seed).normal(size=(dimension, curve.shape[1])))[0]
    return curve @ frame.T + 7


def test_components_are_those_of_pca() -> None:
    values = walk(0, 40, 25).reshape(40, 5, 5)
    found = essential_dynamics(values, components=4, smoothing=0, walks=0)
    pca = PCA(4).fit(values.reshape(40, 25))
    scores = pca.transform(values.reshape(40, 25))
    np.testing.assert_allclose(found["raw_pc"], scores * np.sign(scores[-1]), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(found["explained"], pca.explained_variance_ratio_, rtol=1e-8)
    np.testing.assert_array_equal(found["pc"], found["raw_pc"])
    assert np.isnan(found["turning_p"]).all()
    assert not found["cusp"].any()


def test_a_circle_has_its_radius_centre_and_speed() -> None:
    steps = np.array([0, 1, 2, 4, 5, 8, 9, 10, 12, 14, 16, 17, 20, 22, 23, 24], float)
    angle = 2 * math.pi * np.arange(16) / 16  # points spread evenly keep both components equal
    curve = 3.0 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    found = essential_dynamics(embedded(curve), steps, smoothing=0, walks=0, components=2)
    np.testing.assert_allclose(found["radius"][1:-1], 3.0, rtol=1e-9)
    np.testing.assert_allclose(found["centre"][1:-1], 0.0, atol=1e-9)
    chord = 2 * 3.0 * math.sin(2 * math.pi / 16)
    np.testing.assert_allclose(found["speed"][1:-1], chord / (steps[2:] - steps[:-2]), rtol=1e-9)
    np.testing.assert_allclose(found["turning"][1:-1], 2 * math.pi / 16, rtol=1e-9)
    assert np.isnan(found["radius"][[0, -1]]).all()


def test_a_straight_line_has_no_circle() -> None:
    found = essential_dynamics(np.outer(np.arange(12.0) ** 2, np.ones(3)), smoothing=0, walks=20)
    np.testing.assert_allclose(found["explained"][0], 1.0)
    assert np.isinf(found["radius"][1:-1]).all()
    assert np.isnan(found["centre"]).all()
    np.testing.assert_allclose(found["turning"][1:-1], 0.0, atol=1e-12)
    assert np.isnan(found["cosine_p"][1:]).all()
    assert not found["cusp"].any()


def test_the_cusp_of_a_semicubical_parabola() -> None:
    """(t², t³): the radius at t is |t| (4 + 9 t²)^1.5 / 6, and it turns straight back at 0."""
    t = np.linspace(-1, 1, 201)
    curve = np.stack([t**2, t**3], axis=1)
    found = essential_dynamics(embedded(curve), smoothing=0, walks=0, components=2)
    radius = np.abs(t) * (4 + 9 * t**2) ** 1.5 / 6
    np.testing.assert_allclose(found["radius"][20:80], radius[20:80], rtol=5e-3)
    assert int(np.nanargmax(found["turning"])) == 100
    assert float(found["turning"].max()) > 3.1
    assert float(found["radius"][100]) < 0.01


def test_random_walks_draw_the_cosines_of_the_theory() -> None:
    rows = [essential_dynamics(walk(seed, 100, 2000), walks=0) for seed in range(10)]
    explained = np.mean([row["explained"] for row in rows], 0)
    np.testing.assert_allclose(explained, 6 / (math.pi * np.arange(1, 4)) ** 2, rtol=0.05)
    assert (np.mean([row["cosine"] for row in rows], 0) > 0.95).all()


def test_walks_are_nothing_special() -> None:
    """p-values of 40 walks against the walks simulated for each are spread out, and cusps are rare."""
    rows = [essential_dynamics(walk(seed, 60, 50), walks=60, seed=seed) for seed in range(40)]
    for name in ("explained_p", "cosine_p"):
        p = np.array([float(row[name][0]) for row in rows])
        assert 0.3 < p.mean() < 0.7, (name, p.mean())
        assert (p <= 0.1).mean() <= 0.25, (name, p)
    false = np.mean([bool(row["cusp"].any()) for row in rows])
    assert false <= 0.125, false


def test_a_path_that_swings_on_a_line_is_no_walk() -> None:
    time = np.linspace(0, 1, 60)
    line = embedded(np.sin(6 * math.pi * time)[:, None], 100)
    values = line + np.random.default_rng(1).normal(0, 0.005, (60, 100)).cumsum(0)
    found = essential_dynamics(values, walks=99)
    assert float(found["explained_p"][0]) == 0.01
    assert float(found["cosine_p"][0]) <= 0.03
    assert float(found["explained"][0]) > 0.9 > float(found["explained_reference"][0])
    assert float(found["cosine"][0]) < 0.3 < 0.7 < float(found["cosine_reference"][0])


def bent(seed: int, at: int = 40, count: int = 80) -> np.ndarray:
    """A path that turns back at `at` and leaves in a new direction, with small random moves in 200 dimensions."""
    generator = np.random.default_rng(seed)
    time = np.arange(count, dtype=float)
    out = np.where(time < at, time, 2 * at - time)
    new = np.where(time < at, 0, 0.5 * (time - at))
    return embedded(np.stack([out, new], axis=1), 200) + generator.normal(0, 0.05, (count, 200)).cumsum(0)


def test_a_planted_cusp_is_found_where_it_is() -> None:
    for seed in range(5):
        found = essential_dynamics(bent(seed), walks=100, seed=seed)
        cusps = found["step"].values[found["cusp"].values]
        assert len(cusps) == 1, cusps
        assert abs(cusps[0] - 40) <= 2, cusps
        assert float(found["turning_p"].min()) <= 0.02
        assert float(found["turning_p"].sel(step=20)) > 0.5


@pytest.mark.parametrize("dimension", [3, 20, 150])
def test_dimension_is_that_of_the_random_part_of_the_moves(dimension: int) -> None:
    generator = np.random.default_rng(dimension)
    moves = embedded(generator.normal(size=(200, dimension)), 400, 1) - 7
    for drift in (0.0, 3.0):
        found = _dimension(moves + drift)
        assert 0.85 < found / dimension < 1.15, found


def test_stored_outputs_with_named_dimensions_and_rotations() -> None:
    values = walk(3, 30, 24).reshape(30, 6, 4)
    array = xr.DataArray(values, dims=("step", "item", "output"), coords={"step": np.arange(30) * 10})
    found = essential_dynamics(array, walks=10)
    assert found["step"].values.tolist() == list(range(0, 300, 10))
    xr.testing.assert_identical(found, essential_dynamics(array.transpose("item", "output", "step"), walks=10))
    rotated = essential_dynamics(embedded(values.reshape(30, 24)), np.arange(30) * 10, walks=10)
    for name in ("pc", "explained", "radius", "speed", "turning", "turning_p"):
        np.testing.assert_allclose(found[name], rotated[name], rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        (walk(0)[:7], {}, "8 values"),
        (walk(0), {"steps": np.zeros(80)}, "increasing steps"),
        (walk(0), {"steps": np.arange(5)}, "increasing steps"),
        (np.full((9, 2), np.nan), {}, "not at step 0"),
        (np.ones((9, 2)), {}, "path that moves"),
        (walk(0), {"components": 80}, "1 <= components < 80"),
        (walk(0), {"smoothing": -1}, "smoothing >= 0"),
        (xr.DataArray(np.ones((9, 2)), dims=("a", "b")), {}, "over step"),
    ],
)
def test_refusals(values: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        essential_dynamics(values, **settings)
