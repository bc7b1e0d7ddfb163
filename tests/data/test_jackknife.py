"""Errors by leaving out and by drawing again, against closed forms and the spread over fresh data."""

from __future__ import annotations

import math

import numpy as np

from devmon.data import jackknife
from devmon.data.jackknife import bootstrap_of_sizes, jackknife_of_mean


def test_the_jackknife_of_a_mean_and_of_a_smooth_function() -> None:
    values = np.random.default_rng(0).normal(3.0, 0.5, (400, 2))
    sd = values.std(0, ddof=1) / 20
    by_group = np.array([values[sum(divmod(np.arange(400), 8)) % 8 == group].mean(0) for group in range(8)])
    mean, se, groups = jackknife_of_mean(lambda m: float(m[0]), values)
    np.testing.assert_allclose(groups, by_group[:, 0], rtol=1e-10)
    np.testing.assert_allclose([mean, se], [values[:, 0].mean(), sd[0]], rtol=1e-10)
    product, se, groups = jackknife_of_mean(lambda m: float(m[0] * m[1]), values)
    slope = values.mean(0)[::-1]  # the delta method
    covariance = np.cov(values.T) / 400
    np.testing.assert_allclose([product, groups.mean()], slope.prod(), rtol=1e-12)
    linearised = product + (by_group - values.mean(0)) @ slope
    np.testing.assert_allclose(groups, linearised, rtol=1e-3)
    np.testing.assert_allclose(se, np.sqrt(slope @ covariance @ slope), rtol=5e-3)
    assert math.isnan(jackknife_of_mean(lambda m: float(m[0]), values[:1])[1])


def test_groups_of_unequal_items_know_the_error_of_their_mean() -> None:
    """Over fresh data: 24 items in 12 groups of 2, the ratio of sums."""
    draws = np.random.default_rng(1).normal(2.0, 1.0, (400, 12, 2))
    total, count = draws.sum(2), 2.0
    without = (total.sum(1, keepdims=True) - total) / (count * 11)
    se, groups = jackknife(total.sum(1) / 24, without.T)
    true = (total.sum(1) / 24).std(ddof=1)
    np.testing.assert_allclose(np.sqrt((se**2).mean()) / true, 1.0, atol=0.1)
    np.testing.assert_allclose(groups.mean(0), total.sum(1) / 24, rtol=1e-12)
    assert np.isnan(jackknife(1.0, np.ones((1, 3)))[0]).all()


def test_parts_that_say_nothing_do_not_swell_the_error_of_a_participation() -> None:
    """Two parts of mean 1 and eight of mean 0: the slope at noise folded at 0 is steeper than what it does."""
    generator = np.random.default_rng(2)
    mean = np.array([1.0, 1.0, *[0.0] * 8])
    of = lambda m: float(np.abs(m).sum() ** 2 / (m**2).sum())  # noqa: E731
    found = [
        (*bootstrap_of_sizes(of, values)[:2], jackknife_of_mean(of, values)[1])
        for values in generator.normal(mean, 0.5, (150, 40, 10))
    ]
    value, se, slope = np.array(found).T
    true = value.std(ddof=1)
    assert np.sqrt((slope**2).mean()) > 1.3 * true, "the jackknife"
    np.testing.assert_allclose(np.sqrt((se**2).mean()) / true, 1.05, atol=0.15)
