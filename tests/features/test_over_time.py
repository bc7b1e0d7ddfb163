"""Features over training: matchings against enumeration, planted births, and nulls in which nothing happens."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import xarray as xr

from devmon.analysis import feature_births, feature_matches, lens_overlap
from devmon.analysis.derive.features import best_cosine, matched
from devmon.errors import DataError

RNG = np.random.default_rng(0)
STEPS = np.unique(np.geomspace(1, 3000, 24).astype(int))


def watch(density: np.ndarray, places: int = 20_000, seed: int = 0) -> xr.Dataset:
    """Densities (step, latent) as they are counted on so many independent places."""
    rng = np.random.default_rng(seed)
    counted = rng.binomial(places, density) / places
    se = np.sqrt(counted * (1 - counted) / places)
    latent = np.arange(density.shape[1])
    variables = {"density": (("step", "latent"), counted), "density_se": (("step", "latent"), se)}
    return xr.Dataset(variables, coords={"step": STEPS, "latent": latent})


def rising(at: float, high: float = 0.05, low: float = 0.0) -> np.ndarray:
    return low + (high - low) / (1 + (at / STEPS) ** 12.0)


def test_matching_is_the_best_of_all_permutations() -> None:
    one, other = RNG.normal(size=(2, 6, 4))
    partner, cosine = matched(one, other)
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (one, other)]
    overlap = unit[0] @ unit[1].T
    best = max(permutations(range(6)), key=lambda order: sum(overlap[i, j] for i, j in enumerate(order)))
    assert partner.tolist() == list(best)
    np.testing.assert_allclose(cosine, overlap[range(6), best])
    np.testing.assert_allclose(best_cosine(one, other), overlap.max(1))


def test_directions_of_no_length_have_no_partner() -> None:
    one = np.eye(4)
    other = np.eye(4)[[2, 0, 1, 3]] * 5.0
    other[3] = 0
    partner, cosine = matched(one, other)
    assert partner.tolist() == [1, 2, 0, -1]
    np.testing.assert_allclose(cosine, [1, 1, 1, np.nan])


def dictionaries(seed: int, turned: float) -> xr.Dataset:
    """12 features of which each step exchanges two, in a random order, seen with an error of their direction."""
    rng = np.random.default_rng(seed)
    truth = np.random.default_rng(9).normal(size=(20, 30))
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    decoder = []
    for step in range(4):
        rows = truth[2 * step : 2 * step + 12]
        noisy = rows + turned * rng.normal(size=rows.shape) / np.sqrt(30)
        decoder.append((noisy / np.linalg.norm(noisy, axis=1, keepdims=True))[rng.permutation(12)])
    return xr.Dataset(
        {
            "decoder": (("step", "latent", "dimension"), np.array(decoder).astype(np.float16)),
            "density": (("step", "latent"), np.full((4, 12), 0.1)),
        },
        coords={"step": [0, 10, 20, 30], "latent": np.arange(12), "dimension": np.arange(30)},
    )


def test_turnover_is_what_two_seeds_of_a_step_do_share() -> None:
    found = feature_matches(dictionaries(0, 0.05), dictionaries(1, 0.05))
    np.testing.assert_allclose(found["same"][1:], 10 / 12)
    np.testing.assert_allclose(found["twin_same"], 1)
    np.testing.assert_allclose(found["turnover"][1:], 1 / 6)
    assert bool(np.isnan(found["same"][0]))
    # where seeds share little, little can be said of steps: no turnover beside that of the null
    blurred = feature_matches(dictionaries(0, 0.36), dictionaries(1, 0.36))
    assert float(blurred["twin_same"].mean()) < 0.8
    assert float(blurred["same"].mean()) < 0.65
    assert abs(float(blurred["turnover"][1:].mean()) - 1 / 6) < 0.15
    assert feature_matches(dictionaries(0, 0.05))["turnover"].isnull().all()


def test_a_matching_needs_steps_and_a_twin_of_the_same() -> None:
    with pytest.raises(DataError, match="two steps or more"):
        feature_matches(dictionaries(0, 0.1).isel(step=[0]))
    with pytest.raises(DataError, match="other steps"):
        feature_matches(dictionaries(0, 0.1), dictionaries(1, 0.1).isel(step=[0, 1]))


def test_planted_births_and_deaths_are_found_inside_their_intervals() -> None:
    """16 of 48 are born, 4 die, 2 do both; the rest is there throughout, drifts by a third, or never fires."""
    births = np.geomspace(30, 1200, 18)
    columns = [rising(at) for at in births[:16]]
    columns += [0.04 - rising(at, 0.04) for at in births[4:16:3]]
    columns += [rising(40) * (1 - rising(900, 1.0)) for _ in range(2)]
    columns += [np.full(len(STEPS), 0.03)] * 14 + [rising(200, 0.04, 0.03)] * 8 + [np.full(len(STEPS), 1e-5)] * 4
    found = feature_births(watch(np.array(columns).T))
    kinds = found["kind"].values.tolist()
    assert kinds[:16] == ["born"] * 16, kinds[:16]
    assert kinds[16:20] == ["died"] * 4, kinds[16:20]
    assert kinds[20:22] == ["born and died"] * 2, kinds[20:22]
    assert kinds[22:44] == ["there"] * 22, kinds[22:44]
    assert kinds[44:] == ["silent"] * 4
    inside = (found["born_low"][:16] <= births[:16]) & (births[:16] <= found["born_high"][:16])
    assert bool(inside.all()), (births[:16], found["born_low"][:16].values, found["born_high"][:16].values)
    assert found["born"][22:].isnull().all()
    assert float(found["born_q"][:16].max()) <= 0.05


def test_latents_that_fire_at_random_are_not_born() -> None:
    """Rare latents whose counts fall below a tenth of their largest by chance."""
    for seed in range(3):
        found = feature_births(watch(np.full((len(STEPS), 60), 5e-4), places=3000, seed=seed))
        assert not np.isin(found["kind"], ["born", "died", "born and died"]).any()


def test_dictionaries_without_an_order_are_refused() -> None:
    given = watch(np.full((len(STEPS), 3), 0.1))
    anew = given.assign(moved=(("step", "latent"), np.full((len(STEPS), 3), np.nan)))
    with pytest.raises(DataError, match="give SparseAutoencoder a `start`"):
        feature_births(anew)
    assert feature_births(given.assign(moved=anew["moved"].fillna(1.0)))["kind"].values.tolist() == ["there"] * 3
    with pytest.raises(DataError, match="needs densities"):
        feature_births(given.drop_vars("density"))


def test_overlap_of_top_tokens() -> None:
    top = np.array([[[1, 2, 3, 4]], [[4, 3, 9, 8]], [[9, 4, 3, 7]]])
    given = xr.Dataset({"top_token": (("step", "latent", "rank"), top)}, coords={"step": [0, 1, 2], "latent": [0]})
    np.testing.assert_allclose(lens_overlap(given)[:, 0], [0.5, 0.75, 1])
