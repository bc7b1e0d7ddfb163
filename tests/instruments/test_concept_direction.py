"""Reading vectors: a planted concept, a plain area under the curve, what centring would lose, steps compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.optimize import minimize
from torch import nn

from devmon.analysis import direction_cosine
from devmon.errors import DataError, InstrumentError
from devmon.instruments import ConceptDirection
from devmon.instruments.concept_direction import ESTIMATORS, PENALTY, _auc, _fit, _logistic
from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly, InstrumentContract

D, PAIRS = 32, 40
TOKENS = torch.arange(2 * PAIRS).reshape(2, PAIRS, 1)  # token k with the concept, token PAIRS + k without
POSITIVE, NEGATIVE = (torch.cat([torch.zeros_like(side), side], 1) for side in TOKENS)


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def concept() -> np.ndarray:
    v = normal(D, seed=0)
    return v / np.linalg.norm(v)


def states(size: float, seed: int = 1, noise: float = 0.2) -> np.ndarray:
    """(2, pair, d): what pairs have in common, plus `size` of the concept in the first, plus noise."""
    common = normal(PAIRS, D, seed=seed)
    found = np.stack([common, common]) + noise * normal(2, PAIRS, D, seed=seed + 100)
    found[0] += size * concept()
    return found


def model(size: float = 2.0, seed: int = 1) -> AttentionOnly:
    """A model whose states are the rows of its embedding, in both layers."""
    none = torch.zeros(D, D, dtype=torch.float64)
    embed = torch.from_numpy(states(size, seed).reshape(-1, D))
    unembed = torch.from_numpy(normal(D, len(embed), seed=3))
    return AttentionOnly(embed, torch.zeros(2, D, dtype=torch.float64), [[(none, none)]] * 2, unembed)


def read(of: nn.Module, **changed: Any) -> xr.Dataset:
    return ConceptDirection(**{"positive": POSITIVE, "negative": NEGATIVE} | changed)(Snapshot(0, of))


def test_a_planted_concept_is_read_by_all_three_where_centred_components_lose_it() -> None:
    found = read(model(4.0))
    cosines = found["direction"].values @ concept()  # (estimator, layer)
    assert (cosines > 0.99).all(), cosines
    assert (found["auc"] == 1.0).all()
    assert (found["cosine_halves"] > 0.98).all()
    assert float(found["auc_shuffled"].mean()) == pytest.approx(0.5, abs=0.2)

    # What other tools take by default: the first principal component of the centred differences.
    both = states(4.0)
    differences = both[0] - both[1]
    first = np.linalg.svd(differences - differences.mean(0))[2][0]
    assert abs(first @ concept()) < 0.3


def test_the_directions_are_those_of_the_formulas() -> None:
    """From the training half alone, in the plain space of states, where the instrument works in their span."""
    found = read(model(0.5))
    both = states(0.5)
    order = torch.randperm(PAIRS, generator=ConceptDirection(POSITIVE, NEGATIVE)._generator("split")).numpy()
    used, judged = order[: PAIRS // 2], order[PAIRS // 2 :]
    differences = both[0, used] - both[1, used]
    mean = differences.mean(0)
    svd = np.linalg.svd(differences)[2][0]
    svd *= np.sign(np.sign(differences @ svd).sum())
    scaled = differences / np.sqrt((differences**2).sum(1).mean())

    def loss(w: np.ndarray) -> float:
        return float(np.log1p(np.exp(-scaled @ w)).mean() + PENALTY / 2 * w @ w)

    logistic = minimize(loss, np.zeros(D), tol=1e-12).x
    for name, expected, atol in (("mean", mean, 1e-6), ("svd", svd, 1e-6), ("logistic", logistic, 1e-4)):
        own = found["direction"].sel(estimator=name, layer=1).values
        np.testing.assert_allclose(own, expected / np.linalg.norm(expected), atol=atol)
        positive, negative = both[0, judged] @ expected, both[1, judged] @ expected
        pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
        assert float(found["auc"].sel(estimator=name, layer=1)) == pytest.approx(np.mean(pairs), abs=0.01)
    np.testing.assert_allclose(found["length"][0], np.linalg.norm(mean) / np.linalg.norm(both[:, used], axis=-1).mean())
    np.testing.assert_allclose(found["cosine_random"], (2 / np.pi / D) ** 0.5)


def test_the_area_by_pair_has_its_mean_and_a_spread_that_is_its_error() -> None:
    scores = np.array([[1.0, 0.0], [2.0, 2.0], [0.0, 3.0]])
    assert _auc(scores).mean() == pytest.approx((1 + 0 + 0 + 1 + 0.5 + 0 + 0.5 + 0 + 0) / 9)
    areas, errors = [], []
    for seed in range(400):
        drawn = normal(30, 2, seed=seed) + np.array([1.0, 0.0]) + 2 * normal(30, 1, seed=seed + 1000)
        areas.append(_auc(drawn).mean())
        errors.append(_auc(drawn).std(ddof=1) / 30**0.5)
    assert np.mean(errors) == pytest.approx(np.std(areas), rel=0.12), (np.mean(errors), np.std(areas))


def test_without_a_concept_nothing_is_read() -> None:
    found = [read(model(0.0, seed), shuffles=40) for seed in range(2, 6)]
    areas = np.array([each["auc"].sel(layer=1).values for each in found])
    assert abs(areas.mean() - 0.5) < 0.1, areas
    high = np.array([each["auc_shuffled_high"].sel(layer=1).values for each in found])
    assert (areas > high).mean() < 0.4


def test_pairs_that_are_all_turned_round_turn_the_direction() -> None:
    differences = normal(20, 6, seed=0) + 1.0
    straight, turned = (_fit(differences, sign * np.ones((1, 20))) for sign in (1, -1))
    np.testing.assert_allclose(straight, -turned, atol=1e-9)
    assert straight.shape == (len(ESTIMATORS), 1, 6)
    apart = np.array([[3.0, 0.0], [4.0, 0.0]])
    assert np.isfinite(_logistic(100 * apart)).all()  # separable: the penalty holds it


def test_states_that_are_all_the_same_give_no_direction() -> None:
    flat = model()
    flat.embed.weight.data[:] = 1.0
    found = read(flat)
    assert np.isnan(found["auc"]).all()
    assert np.isnan(found["direction"]).all()


def test_the_way_of_a_direction_over_steps() -> None:
    rows = [read(model(size, seed=2)) for size in (0.0, 0.5, 4.0)]
    stored = xr.concat([row.expand_dims(step=[at]) for at, row in zip((0, 10, 100), rows, strict=True)], "step")
    found = direction_cosine(stored)
    directions = stored["direction"].values
    np.testing.assert_allclose(found["cosine"][:, 0, 1], directions[:, 0, 1] @ directions[-1, 0, 1], rtol=1e-5)
    np.testing.assert_allclose(found["cosine_before"][2, 1, 0], directions[2, 1, 0] @ directions[1, 1, 0], rtol=1e-5)
    assert np.isnan(found["cosine_before"][0]).all()
    assert float(found["cosine"][0, 0, 1]) < float(found["cosine"][1, 0, 1]) < float(found["cosine"][2, 0, 1])
    np.testing.assert_allclose(direction_cosine(stored, to=0)["cosine"][0], 1.0)
    with pytest.raises(DataError, match="step 7 was not measured"):
        direction_cosine(stored, to=7)
    with pytest.raises(DataError, match="as the watch of a ConceptDirection"):
        direction_cosine(rows[0])


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"negative": NEGATIVE[:9]}, "of one shape"),
        ({"positive": POSITIVE[:7], "negative": NEGATIVE[:7]}, "at least 8 pairs"),
        ({"shuffles": 1}, "two shuffles"),
        ({"site": "pattern"}, "a site of vectors"),
    ],
)
def test_settings_that_make_no_sense(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        read(model(), **changed)


def test_a_site_that_is_not_there_and_states_that_are_no_numbers() -> None:
    with pytest.raises(InstrumentError, match="is no site"):
        read(model(), site="stream")
    broken = model()
    broken.embed.weight.data[3, 0] = torch.nan
    with pytest.raises(InstrumentError, match="not finite"):
        read(broken)


class TestConceptDirection(InstrumentContract):
    def model(self, seed: int) -> nn.Module:
        return model(0.5, seed + 1)

    def instrument(self) -> ConceptDirection:
        return ConceptDirection(POSITIVE, NEGATIVE, shuffles=4)
