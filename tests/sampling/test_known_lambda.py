"""The closed forms themselves, against one another and against slow computations that share nothing with them."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from devmon.testing import exact


def test_reduced_rank_deep_linear_and_strata_agree_on_all_small_shapes():
    for m, h, n in itertools.product(range(1, 7), repeat=3):
        for rank in range(min(m, h, n) + 1):
            known = exact.reduced_rank(m, h, n, rank)
            assert known == exact.deep_linear([m, h, n], rank), (m, h, n, rank)
            assert known[0] == exact.deep_linear_strata([m, h, n], rank)[0], (m, h, n, rank)


def test_deep_linear_equals_half_the_least_codimension_on_random_nets():
    rng = np.random.default_rng(0)
    for _ in range(300):
        widths = rng.integers(1, 10, rng.integers(2, 8)).tolist()
        rank = int(rng.integers(0, min(widths) + 1))
        assert exact.deep_linear(widths, rank)[0] == exact.deep_linear_strata(widths, rank)[0], (widths, rank)


@pytest.mark.parametrize(
    "known, value, multiplicity",
    [
        (exact.reduced_rank(8, 6, 8, 3), 26, 2),
        (exact.reduced_rank(5, 3, 5, 0), 6.5, 2),
        (exact.reduced_rank(3, 8, 4, 0), 6, 1),
        (exact.deep_linear([8, 8], 5), 32, 1),
        (exact.normal_crossing([1, 1, 1]), 0.5, 3),
        (exact.normal_crossing([0, 2]), 0.25, 1),
        (exact.even_powers([1, 2, 3]), 1 / 2 + 1 / 4 + 1 / 6, 1),
        (exact.tanh_network(2), 2 / 3, 1),
        (exact.tanh_network(4), 1, 2),
        (exact.regular(7), 3.5, 1),
    ],
)
def test_published_values(known, value, multiplicity):
    assert (float(known[0]), known[1]) == (pytest.approx(value), multiplicity)


def test_one_hidden_unit_is_a_normal_crossing():
    assert exact.deep_linear([1, 1, 1], 0) == exact.normal_crossing([1, 1]) == exact.tanh_network(1)
    assert exact.deep_linear([1, 1, 1, 1], 0) == exact.normal_crossing([1, 1, 1]) == (Fraction(1, 2), 3)


@pytest.mark.parametrize("spread", [1.0, 2.0])
def test_deep_linear_point_lies_on_the_cheapest_stratum(spread):
    """The rank of the product's derivative is the codimension: 2λ independent directions change the product."""
    rng = np.random.default_rng(1)
    for widths, rank in [([8, 6, 8], 3), ([4, 9, 8, 8, 9, 5], 0), ([6, 6, 6, 6], 2), ([5, 7], 3)]:
        weights = exact.deep_linear_point(widths, rank, rng, spread=spread)
        values = np.concatenate([np.linalg.svd(w, compute_uv=False) for w in weights])
        values = values[values > 1e-9]
        assert 1 / spread - 1e-9 <= values.min() <= values.max() <= spread + 1e-9
        assert (values.std() > 0.1) == (spread > 1)
        ranks, blocks = [], []
        for k in range(len(weights)):
            before = np.linalg.multi_dot([np.eye(widths[k]), *weights[:k][::-1], np.eye(widths[0])])
            after = np.linalg.multi_dot([np.eye(widths[-1]), *weights[k + 1 :][::-1], np.eye(widths[k + 1])])
            blocks.append(np.kron(after, before.T))
            ranks.append(np.linalg.matrix_rank(weights[k] @ before, tol=1e-9))
        assert ranks[-1] == rank
        assert tuple(ranks) == exact.deep_linear_strata(widths, rank)[1]
        assert np.linalg.matrix_rank(np.hstack(blocks), tol=1e-9) == 2 * exact.deep_linear(widths, rank)[0]


def test_tanh_network_by_volume():
    """One unit: the volume of {(a tanh(b x))² < ε} over the square shrinks like √ε log(1/ε): λ = 1/2, θ = 2."""
    a = np.linspace(0, 1, 4001)[1:]
    areas = []
    for eps in (1e-6, 1e-8):
        # K = E[(a tanh(b x))²] / 2 over x ~ U[-1, 1]; the largest b below the level, by bisection, for each a
        nodes, heights = np.polynomial.legendre.leggauss(20)
        low, high = np.zeros_like(a), np.ones_like(a)
        for _ in range(50):
            middle = (low + high) / 2
            k = 0.25 * (heights * (a[:, None] * np.tanh(middle[:, None] * nodes)) ** 2).sum(1)
            low, high = np.where(k < eps, middle, low), np.where(k < eps, high, middle)
        areas.append(low.mean())
    slope = np.log(areas[0] / areas[1]) / np.log(100)
    expected = 0.5 - 1 / np.log(1e7 / 6)  # √ε (log 1/ε + c): the multiplicity's share of the slope
    assert slope == pytest.approx(expected, abs=0.03), (slope, expected)


def test_gibbs_integrals_match_each_other():
    assert exact.gibbs_one(lambda w: 0.5 * 3 * w**2, 100, 2) == pytest.approx(
        exact.gibbs_quadratic([3], 100, 2), rel=1e-6
    )
    assert exact.gibbs_one(lambda w: w**4, 1e6, 1e-2) == pytest.approx(0.25, rel=2e-3)
    both = exact.gibbs_two(lambda x, y: x**2 + 2 * y**2, 50, 1)
    assert both == pytest.approx(exact.gibbs_quadratic([2, 4], 50, 1), rel=1e-5)


def test_three_crossing_weights_by_importance_sampling():
    nbeta, gamma = 1000.0, 10.0
    w = np.random.default_rng(0).standard_normal((2_000_000, 3)) / gamma**0.5
    energy = nbeta * w.prod(1) ** 2
    expected = (energy * np.exp(-energy)).mean() / np.exp(-energy).mean()
    assert exact.gibbs_crossing_three(nbeta, gamma) == pytest.approx(expected, rel=0.005)


def test_sgld_law_is_the_gibbs_law_for_small_steps_and_unstable_for_large():
    h = [2.0, 0.5]
    assert exact.sgld_quadratic(h, 50, 1, 1e-9) == pytest.approx(exact.gibbs_quadratic(h, 50, 1))
    assert exact.sgld_quadratic(h, 50, 1, 0.01) > exact.gibbs_quadratic(h, 50, 1)
    with pytest.raises(ValueError, match="stable"):
        exact.sgld_quadratic(h, 50, 1, 0.04)
