"""R̂ and ESS against those of arviz, on chains that mix, that do not, and that are odd."""

from __future__ import annotations

import numpy as np
import pytest
from arviz_stats.base import array_stats

from devmon.analysis.derive.mixing import ess_mean, rhat


def chains(kind: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    white = rng.standard_normal(shape)
    walk = white.copy()
    for i in range(1, shape[1]):
        walk[:, i] += {"slow": 0.95, "alternating": -0.7}.get(kind, 0.5) * walk[:, i - 1]
    return {"white": white, "apart": walk + 3 * np.arange(shape[0])[:, None], "ties": np.round(walk), "far": 1e4 + walk,
            "spread": white * (1 + np.arange(shape[0])[:, None])}.get(kind, walk)  # fmt: skip


@pytest.mark.parametrize("kind", ["white", "slow", "alternating", "apart", "ties", "far", "spread"])
@pytest.mark.parametrize("shape", [(4, 100), (2, 31), (3, 4), (5, 7), (1, 40), (2, 9)])
def test_numbers_are_those_of_arviz(kind: str, shape: tuple[int, int]) -> None:
    for seed in range(5):
        values = chains(kind, shape, seed)
        with np.errstate(all="ignore"):
            theirs = array_stats.ess(values, method="mean"), array_stats.rhat(values) if shape[0] > 1 else np.nan
            np.testing.assert_allclose((ess_mean(values), rhat(values)), theirs, rtol=1e-8)


def test_constant_chains_and_too_few_draws() -> None:
    assert ess_mean(np.ones((2, 10))) == 20
    assert np.isnan(ess_mean(np.ones((2, 3))))
    assert np.isnan(rhat(np.random.default_rng(0).random((2, 3))))
