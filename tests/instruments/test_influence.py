"""Bayesian influence: closed forms, devinterp's numbers on the same chains, shuffling, and what a row holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from devmon.errors import InstrumentError
from devmon.instruments.influence import PAIR_BYTES, BayesianInfluence
from devmon.sampling import Settings
from devmon.sampling.devinterp_tree import sample_tree
from devmon.sampling.responses.covariances import influences, unpaired
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract
from tests.support.models import tiny_neox
from tests.support.sampling_toys import WELL, Well, items, well_loss

NBETA, GAMMA = 60.0, 5.0


def expected(queries: Any, examples: Any) -> np.ndarray:
    """−nβ² (xᵀ Σ y + ½ tr(A Σ B Σ)) of the harmonic law, (query, example)."""
    variance = 1 / (NBETA * WELL + GAMMA)
    (a, x, _), (b, y, _) = ((part.numpy() for part in of) for of in (queries, examples))
    return np.asarray(-(NBETA**2) * ((x * variance) @ y.T + 0.5 * (a * variance) @ (b * variance).T))


def centred(n: int, seed: int) -> Any:
    """Items whose mean is the data: no slope, the curvature of the well."""
    curvature, slope, cubic = items(n, slope=1.0, seed=seed)
    return curvature / curvature.mean(0) * torch.from_numpy(WELL), slope - slope.mean(0), cubic


def test_influence_of_a_harmonic_well_is_the_classical_one_and_half_a_trace() -> None:
    data, queries = centred(16, 0), items(5, slope=1.0, seed=1)
    given: dict[str, Any] = {"lr": 0.008, "chains": 8, "draws": 600, "burn_in": 50, "batch_size": 16, "float64": True}
    found = BayesianInfluence(data, {"a": queries}, well_loss, nbeta=NBETA, gamma=GAMMA, sampler="baoab", **given)(
        Snapshot(0, Well(), seed=2)
    )
    truth = expected(queries, data)
    z = (found["influence"].astype(float) - truth) / found["influence_se"].astype(float)
    assert float(np.abs(z).max()) < 4.5, z
    assert 0.4 < float(np.sqrt((z**2).mean())) < 1.6, z
    sizes = [np.sqrt(-np.diagonal(expected(of, of))) for of in (queries, data)]
    np.testing.assert_allclose(found["correlation"], -truth / np.outer(*sizes), atol=0.12)
    mean = (float(found["mean"][0]) - truth.mean()) / float(found["mean_se"][0])
    assert abs(mean) < 3.5
    # half of the pairs share nothing: shuffled, the correlations are those of nothing
    assert float(found["spread_shuffled"][0]) < 0.25 * float(found["spread"][0])
    assert float(found["accepted"]) == 1


def test_classical_influence_is_the_limit() -> None:
    """−nβ gᵀH⁻¹g without curvature of its own, from exact draws."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(4, 4000, 4)) / np.sqrt(NBETA * WELL)
    x, y = rng.normal(size=(3, 4)), rng.normal(size=(6, 4))
    found, correlation = influences(w @ y.T, w @ x.T, NBETA)
    truth = -NBETA * (x / WELL) @ y.T
    assert np.abs((found.value.reshape(3, 6) - truth) / found.se.reshape(3, 6)).max() < 4
    assert np.abs(correlation).max() <= 1
    null, by_chance = influences(unpaired(w @ y.T), w @ x.T, NBETA)
    assert np.sqrt((by_chance**2).mean()) < 0.02
    assert np.abs(null.value / null.se).max() < 4


@pytest.mark.parametrize("by", ["sequence", "token"])
def test_devinterp_has_the_same_numbers_on_the_same_chains(by: Any) -> None:
    from devinterp.slt.bif import compute_bif

    model = tiny_neox(0)
    data, queries = tokens(6, 2), tokens(3, 3)
    settings = {"nbeta": 20.0, "gamma": 10.0, "lr": 1e-3, "chains": 2, "draws": 32, "burn_in": 3, "batch_size": 4}
    found = BayesianInfluence(data, {"q": queries}, by=by, examples=6, **settings)(Snapshot(0, model, seed=4))
    tree = sample_tree(model, data, {"data": data, "q": queries}, Settings(**settings), seed=4)
    for covariance in (True, False):
        given: dict[str, Any] = {"compute_covariance": covariance, "device": "cpu", "correlation_method": by}
        theirs = compute_bif(tree, **given, batch_index_range_1=range(6, 9), batch_index_range_2=range(6))["influences"]
        theirs = theirs.values if by == "sequence" else theirs.values.transpose(0, 2, 1, 3).reshape(15, 30)
        # their covariance is over N − 1
        own = -found["influence"] * (64 / 63) / 400 if covariance else found["correlation"]
        np.testing.assert_allclose(own.astype(float), theirs, rtol=2e-3, atol=1e-3 * np.abs(theirs).max())
    losses = [tree[f"loss_{name}"].values.astype(float) for name in ("data", "q")]
    flat = [each.mean(3) if by == "sequence" else each.reshape(2, 32, -1) for each in losses]
    ours, correlation = influences(*flat, 20.0)
    np.testing.assert_allclose(correlation, theirs, rtol=1e-5, atol=1e-5)
    assert ours.value.size == theirs.size


# -- what a row holds ------------------------------------------------------------------------------------------------


def tokens(n: int, seed: int) -> torch.Tensor:
    return torch.randint(19, (n, 6), generator=torch.Generator().manual_seed(seed))


def of_tokens(**changes: Any) -> BayesianInfluence:
    given: dict[str, Any] = {
        "data": tokens(12, 2),
        "queries": {"a": tokens(5, 3), "b": tokens(2, 5)},
        "nbeta": 20.0,
        "gamma": 10.0,
        "lr": 1e-3,
        "chains": 4,
        "draws": 16,
        "burn_in": 3,
        "batch_size": 8,
    }
    return BayesianInfluence(**(given | changes))


@pytest.mark.parametrize("by", ["sequence", "token"])
@pytest.mark.parametrize("budget", [2 * PAIR_BYTES, 31 * PAIR_BYTES + 1, 65536])
def test_pairs_fit_into_the_budget(by: str, budget: int) -> None:
    found = of_tokens(by=by, budget=budget)(Snapshot(0, tiny_neox(0)))
    assert sum(found[name].nbytes for name in ("influence", "influence_se", "correlation")) <= budget
    assert found["influence"].dtype == np.float16
    assert set(found["set_of"].values) == {"a", "b"}
    if budget == 65536:
        assert found.sizes["query"] == (7 if by == "sequence" else 35)
        assert found.sizes["example"] == (12 if by == "sequence" else 60)
        np.testing.assert_allclose(found["example_loss"], losses(by, tokens(12, 2)), rtol=1e-5)
    two = of_tokens(by=by, budget=budget)(Snapshot(1, tiny_neox(1)))
    xr.testing.assert_equal(two.coords.to_dataset(), found.coords.to_dataset())


def losses(by: str, of: torch.Tensor) -> np.ndarray:
    from devmon.sampling.devinterp_tree import token_losses

    each = token_losses(tiny_neox(0), of)
    return each.mean(1) if by == "sequence" else each.ravel()


def test_padding_is_no_item() -> None:
    mask = torch.ones(5, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    padded = {"input_ids": tokens(5, 3), "attention_mask": mask}
    found = of_tokens(
        by="token", data={"input_ids": tokens(12, 2), "attention_mask": torch.ones(12, 6).long()}, queries={"a": padded}
    )(Snapshot(0, tiny_neox(0)))
    assert found.sizes["query"] == 25 - 2
    assert found["influence"].notnull().all()
    assert str(found["query_label"].values[8]).endswith(f"▸ {int(tokens(5, 3)[2, 1])}")


@pytest.mark.parametrize(
    "changes, match",
    [({"queries": {}}, "queries"), ({"by": "word"}, "word"), ({"budget": 3}, "budget"), ({"examples": 0}, "examples")],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InstrumentError, match=match):
        of_tokens(**changes)


def test_a_chain_that_diverges_is_nan() -> None:
    found = of_tokens(lr=50.0, gamma=0.0, draws=60)(Snapshot(0, tiny_neox(0)))
    assert float(found["accepted"]) == 0
    assert not np.isinf(found["influence"].astype(float)).any()


class TestContract(InstrumentContract):
    def instrument(self) -> BayesianInfluence:
        return of_tokens()

    def model(self, seed: int) -> torch.nn.Module:
        return tiny_neox(seed)
