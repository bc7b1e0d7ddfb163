"""Distances to known solutions: 0 for a model that is the solution, the known numbers for one that is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.data.markov import chains, counted, retrieved, transition_matrices
from devmon.data.regression import pool_predictions, regression_examples, ridge_predictions
from devmon.errors import DataError, InstrumentError
from devmon.instruments.markov_references import MarkovReferences
from devmon.instruments.regression_references import RegressionReferences
from devmon.snapshot import Snapshot
from devmon.testing import Bigram, InstrumentContract

STATES = 3
FIXED = transition_matrices(4, STATES, torch.Generator().manual_seed(9))


class Says(nn.Module):
    """A model that is a function of its inputs."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.answer(inputs)


def text(sequences: int = 40, length: int = 20, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return chains(transition_matrices(sequences, STATES, generator), length, generator)


def mixture(sequences: int = 60, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return chains(FIXED[torch.randint(4, (sequences,), generator=generator)], 30, generator)


def measure(instrument: Any, model: nn.Module) -> xr.Dataset:
    return instrument(Snapshot(0, model.eval()))


LAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda tokens: counted(tokens, STATES, 0),
    "unigram": lambda tokens: counted(tokens, STATES, 1),
    "bigram": lambda tokens: counted(tokens, STATES, 2),
    "3-gram": lambda tokens: counted(tokens, STATES, 3),
    "unigram retrieval": lambda tokens: retrieved(tokens, FIXED, 1),
    "bigram retrieval": lambda tokens: retrieved(tokens, FIXED, 2),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_model_that_is_the_solution_has_distance_0(name: str) -> None:
    instrument = MarkovReferences(mixture(), STATES, (0, 1, 2, 3), FIXED, batch_size=7)
    found = measure(instrument, Says(lambda tokens: LAWS[name](tokens).log()))
    assert list(found["solution"].values) == list(LAWS)
    for key in ("distance", "regret"):
        np.testing.assert_allclose(found[key].sel(solution=name), 0, atol=1e-14)
        others = abs(found[key].drop_sel(solution=name))
        assert float(others.min()) > 1e-3, others
    np.testing.assert_allclose(found["loss"], found["solution_loss"].sel(solution=name), rtol=1e-12)


def test_uniform_predictions_have_the_distance_of_the_reference() -> None:
    found = measure(MarkovReferences(text(), STATES), Bigram(torch.full((STATES, STATES), 1 / 3)))
    np.testing.assert_allclose(found["distance"], found["distance_reference"], rtol=1e-7)
    np.testing.assert_allclose(found["loss"], math.log(3), rtol=1e-7)
    np.testing.assert_allclose(found["solution_loss"].sel(solution="uniform"), math.log(3), rtol=1e-12)


def test_the_distance_by_hand_and_the_places_that_are_scored() -> None:
    tokens, table = torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0.5, 0.25, 0.25]] * 3, dtype=torch.float64)
    found = measure(MarkovReferences(tokens, STATES, (1,), first=1), Bigram(table))
    # the laws after 0 1 and after 0 1 1
    laws = np.array([[2, 2, 1], [2, 3, 1]]) / [[5], [6]]
    np.testing.assert_allclose(found["distance"], [(laws * np.log(laws / table[:2].numpy())).sum(1).mean()], rtol=1e-9)
    np.testing.assert_allclose(found["loss"], math.log(4), rtol=1e-12)
    np.testing.assert_allclose(found["solution_loss"], [-(np.log(laws[0, 1]) + np.log(laws[1, 2])) / 2], rtol=1e-12)


def test_regret_against_the_bayes_predictor_is_the_distance_but_for_chance() -> None:
    """The data are drawn from the law, so that E[log law - log model] is the KL."""
    table = torch.tensor([[0.5, 0.3, 0.2]] * 3, dtype=torch.float64)
    found = measure(MarkovReferences(text(4000), STATES), Bigram(table)).sel(solution="bigram")
    assert abs(float(found["regret"] - found["distance"])) < 4 * float(found["regret_se"])
    wrong = measure(MarkovReferences(text(4000), STATES), Bigram(table)).sel(solution="unigram")
    assert abs(float(wrong["regret"] - wrong["distance"])) > 8 * float(wrong["regret_se"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": 2}, r"tokens in 0 \.\. 1, got 0 \.\. 2: raise states"),
        ({"orders": ()}, "orders of at least 0"),
        ({"orders": (-1,)}, "orders of at least 0"),
        ({"first": 19}, r"first in 0 \.\. 18"),
        ({"matrices": torch.ones(2, 3, 3)}, "rows that sum to 1"),
        ({"matrices": torch.eye(3)}, "matrices"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^MarkovReferences needs .*{message}"):
        MarkovReferences(**{"tokens": text(), "states": STATES, **change})


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InstrumentError, match="logits of 3 states, Bigram has 2"):
        measure(MarkovReferences(text() % 2, STATES), Bigram(torch.full((2, 2), 0.5)))
    ahead = Says(lambda tokens: nn.functional.one_hot(tokens.roll(-1, 1), STATES).double())
    with pytest.raises(InstrumentError, match="depends on later tokens"):
        measure(MarkovReferences(text(), STATES), ahead)


class TestMarkovReferences(InstrumentContract):
    def instrument(self) -> MarkovReferences:
        return MarkovReferences(mixture(), STATES, matrices=FIXED, first=2)

    def model(self, seed: int) -> nn.Module:
        return Bigram(transition_matrices(1, STATES, torch.Generator().manual_seed(seed))[0])


# --- regression -----------------------------------------------------------------------------------------------------

NOISE = 0.25


def examples(count: int = 64, pool: Tensor | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(count, 4, generator=generator) if pool is None else pool[torch.arange(count) % len(pool)]
    return regression_examples(weights, 8, NOISE, generator)


POOL = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))


def joined(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y[..., None]], -1)


SOLUTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "pool": lambda xy: pool_predictions(xy[..., :-1], xy[..., -1], NOISE, POOL),
    "ridge": lambda xy: ridge_predictions(xy[..., :-1], xy[..., -1], NOISE),
    "zero": lambda xy: 0 * xy[..., -1],
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_a_regressor_that_is_the_solution_has_distance_0(name: str) -> None:
    x, y = examples()
    found = measure(RegressionReferences(joined(x, y), x, y, NOISE, POOL, batch_size=9), Says(SOLUTIONS[name]))
    assert list(found["solution"].values) == list(SOLUTIONS)
    for key in ("distance", "regret"):
        np.testing.assert_allclose(found[key].sel(solution=name), 0, atol=1e-14)
        assert float(abs(found[key].drop_sel(solution=name)).min()) > 0.1
    assert abs(float(found["error"] - found["solution_error"].sel(solution=name))) < 1e-12


def test_the_distance_of_zero_and_of_a_constant() -> None:
    x, y = examples()
    found = measure(RegressionReferences(joined(x, y), x, y, NOISE), Says(lambda xy: 0 * xy[..., 0] + 2.0))
    assert list(found["solution"].values) == ["ridge", "zero"]
    np.testing.assert_allclose(found["distance"].sel(solution="zero"), 4.0 / 4, rtol=1e-12)  # a dim
    best = ridge_predictions(x, y, NOISE)
    np.testing.assert_allclose(found["distance"].sel(solution="ridge"), (2 - best).square().mean() / 4, rtol=1e-9)
    np.testing.assert_allclose(found["distance_reference"], [best.square().mean() / 4, 0], rtol=1e-9)


def test_on_its_pool_no_solution_has_less_error_than_the_posterior_over_it() -> None:
    x, y = examples(3000, POOL)
    found = measure(RegressionReferences(joined(x, y), x, y, NOISE, POOL), Says(SOLUTIONS["ridge"]))
    assert float(found["regret"].sel(solution="pool")) > 8 * float(found["regret_se"].sel(solution="pool"))
    new = measure(RegressionReferences(joined(*examples(3000)), *examples(3000), NOISE, POOL), Says(SOLUTIONS["pool"]))
    assert float(new["regret"].sel(solution="ridge")) > 8 * float(new["regret_se"].sel(solution="ridge"))


def test_regressions_that_do_not_fit_are_refused() -> None:
    x, y = examples()
    for change in ({"y": y[:, :-1]}, {"inputs": joined(x, y)[:-1]}, {"pool": POOL[:, :2]}):
        with pytest.raises(DataError, match="RegressionReferences needs as many inputs"):
            RegressionReferences(**{"inputs": joined(x, y), "x": x, "y": y, "noise": NOISE, **change})
    with pytest.raises(DataError, match="noise > 0"):
        RegressionReferences(joined(x, y), x, y, 0.0)
    with pytest.raises(InstrumentError, match=r"predictions \(64, 8\) of y, Says returned \(64, 8, 5\)"):
        measure(RegressionReferences(joined(x, y), x, y, NOISE), Says(lambda xy: xy))


class Linear(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(seed)))

    def forward(self, xy: Tensor) -> Tensor:
        return xy[..., :-1] @ self.weight


class TestRegressionReferences(InstrumentContract):
    def instrument(self) -> RegressionReferences:
        x, y = examples()
        return RegressionReferences(joined(x, y), x, y, NOISE, POOL)

    def model(self, seed: int) -> nn.Module:
        return Linear(seed)
