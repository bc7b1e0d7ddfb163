"""The prequential code in closed form, from full and from thinned logs, and of a learner that is Bayes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from devmon.analysis.derive.code_length import prequential_code
from devmon.analysis.series import Series
from devmon.errors import DataError


def test_an_exponential_fall_in_closed_form() -> None:
    steps = np.arange(2000)
    loss = Series("loss", steps, 1.5 + 2.0 * 0.98**steps)
    code = prequential_code(loss, 64, entropy=1.5)
    learnt = 64 * 2.0 / 0.02  # the sum of the geometric series
    assert code.tokens == 64 * 2000
    np.testing.assert_allclose(code.length, 64 * 2000 * 1.5 + learnt, rtol=1e-9)
    np.testing.assert_allclose([code.taken_in, code.regret], learnt, rtol=1e-9)
    np.testing.assert_allclose(code.end_loss, 1.5, atol=1e-12)


def test_a_thinned_log_is_filled_in() -> None:
    steps = np.unique(np.r_[0, np.round(np.geomspace(1, 5000, 200))])
    whole = np.arange(5001)
    full, thin = (prequential_code(Series("loss", s, 1 + 3 / (1 + s / 50)), 10) for s in (whole, steps))
    np.testing.assert_allclose(thin.length, full.length, rtol=1e-3)
    assert thin.tokens == full.tokens == 50_010


def test_noise_is_in_the_error() -> None:
    rng, steps = np.random.default_rng(0), np.arange(1000)
    taken = [prequential_code(Series("loss", steps, 2 + rng.standard_normal(1000)), 1) for _ in range(200)]
    spread = np.std([code.taken_in for code in taken])
    np.testing.assert_allclose(np.mean([code.taken_in for code in taken]), 0, atol=4 * spread / math.sqrt(200))
    assert 0.8 < np.mean([code.taken_in_se for code in taken]) / spread < 1.25


def test_the_regret_of_counting_a_coin_in_closed_form() -> None:
    """Laplace's rule gives n tosses with k heads the probability 1 / ((n + 1) C(n, k)): the learner pays its log."""
    rng, n = np.random.default_rng(1), 4000
    for _ in range(5):
        tosses = rng.integers(0, 2, n)
        ones = np.cumsum(tosses) - tosses
        chance = (np.where(tosses == 1, ones, np.arange(n) - ones) + 1) / (np.arange(n) + 2)
        code = prequential_code(Series("loss", np.arange(n), -np.log(chance)), 1, entropy=math.log(2))
        heads = int(tosses.sum())
        ways = math.lgamma(n + 1) - math.lgamma(heads + 1) - math.lgamma(n - heads + 1)
        np.testing.assert_allclose(code.regret, math.log(n + 1) + ways - n * math.log(2), rtol=1e-7)


def test_refusals() -> None:
    with pytest.raises(DataError, match="20 logged losses"):
        prequential_code(Series("loss", np.arange(5), np.ones(5)), 64)
    with pytest.raises(DataError, match="tokens of a step above 0"):
        prequential_code(Series("loss", np.arange(50), np.ones(50)), 0)
