"""Predictors of Markov chains and of regression in a context, against Bayes' rule worked out another way."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from devmon.data.laws import divergence, log_probabilities
from devmon.data.markov import chains, counted, retrieved, stationary, transition_matrices
from devmon.data.regression import pool_predictions, regression_examples, ridge_predictions
from devmon.errors import DataError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def evidence(tokens: tuple[int, ...], states: int) -> float:
    """Log probability of a chain with rows from Dirichlet(1), by Gamma functions: a product over rows."""
    total, pairs = -math.log(states), Counter(itertools.pairwise(tokens))
    for row in range(states):
        seen = [pairs[row, to] for to in range(states)]
        total += math.lgamma(states) - math.lgamma(states + sum(seen)) + sum(math.lgamma(n + 1) for n in seen)
    return total


@pytest.mark.parametrize("states", [2, 3, 5])
def test_the_bigram_is_the_ratio_of_evidences(states: int) -> None:
    tokens = torch.randint(states, (4, 12), generator=generator())
    laws = counted(tokens, states, 2)
    for row, sequence in enumerate(tokens.tolist()):
        for t in range(12):
            seen = tuple(sequence[: t + 1])
            exact = [math.exp(evidence((*seen, x), states) - evidence(seen, states)) for x in range(states)]
            np.testing.assert_allclose(laws[row, t], exact, rtol=1e-10)


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
def test_counting_against_a_dictionary(order: int) -> None:
    states, tokens = 3, torch.randint(3, (5, 20), generator=generator(1))
    laws = counted(tokens, states, order)
    for row, sequence in enumerate(tokens.tolist()):
        for t in range(20):
            seen, width = sequence[: t + 1], max(order - 1, 0)
            context = tuple(seen[len(seen) - width :]) if width <= len(seen) else None
            pairs = [(tuple(seen[i : i + width]), seen[i + width]) for i in range(len(seen) - width)]
            count = np.array([sum(pair == (context, x) for pair in pairs) if order else 0 for x in range(states)])
            np.testing.assert_allclose(laws[row, t], (count + 1) / (count.sum() + states), rtol=1e-12)


def test_retrieval_is_bayes_over_the_chains() -> None:
    matrices = transition_matrices(4, 3, generator(2))
    tokens = chains(matrices[[0, 2, 3]], 9, generator(3))
    law, tied = retrieved(tokens, matrices, 2), retrieved(tokens, matrices, 1)
    pi = stationary(matrices)
    for row, sequence in enumerate(tokens.tolist()):
        for t in range(9):
            joint, alone = [], []
            for n in range(4):
                steps = [float(matrices[n, a, b]) for a, b in itertools.pairwise(sequence[: t + 1])]
                joint.append(math.prod(steps))
                alone.append(math.prod(float(pi[n, a]) for a in sequence[: t + 1]))
            exact = sum(w * matrices[n, sequence[t]] for n, w in enumerate(joint)) / sum(joint)
            np.testing.assert_allclose(law[row, t], exact, rtol=1e-10)
            np.testing.assert_allclose(
                tied[row, t], sum(w * pi[n] for n, w in enumerate(alone)) / sum(alone), rtol=1e-9
            )


def test_a_step_that_no_chain_makes_is_told() -> None:
    turning = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    assert chains(turning.expand(3, 2, 2), 6, generator()).diff(dim=1).abs().min() == 1
    with pytest.raises(DataError, match="no given chain can make"):
        retrieved(torch.tensor([[0, 1, 1, 0]]), turning, 2)


def test_what_is_drawn_has_the_law_it_is_said_to_have() -> None:
    matrices = transition_matrices(20_000, 3, generator(4))
    np.testing.assert_allclose(matrices.sum(-1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(matrices.mean((0, 1)), 1 / 3, atol=0.005)
    np.testing.assert_allclose(matrices.var((0, 1)), 2 / 36, atol=0.002)  # of Dirichlet(1, 1, 1)
    pi = stationary(matrices[:50])
    np.testing.assert_allclose((pi[:, None] @ matrices[:50])[:, 0], pi, atol=1e-9)
    tokens = chains(matrices[:1].expand(50_000, 3, 3), 3, generator(5))
    np.testing.assert_allclose(np.bincount(tokens[:, 0]) / 50_000, 1 / 3, atol=0.01)
    for row in range(3):
        after = np.bincount(tokens[tokens[:, 1] == row, 2], minlength=3)
        np.testing.assert_allclose(after / after.sum(), matrices[0, row], atol=0.02)


def test_the_losses_of_chains_of_three_states() -> None:
    """Uniform 1.099, unigram 1.010, bigram .905, the chain itself .819 over 64 tokens, at 512 stationary chains."""
    matrices = transition_matrices(6000, 3, generator(6))
    tokens = chains(matrices, 64, generator(7))
    after = tokens[:, 1:, None]
    losses = [-counted(tokens, 3, n)[:, :-1].gather(-1, after).log().mean() for n in (0, 1, 2)]
    itself = -matrices[torch.arange(6000)[:, None], tokens[:, :-1]].gather(-1, after).log().mean()
    np.testing.assert_allclose([*losses, itself], [1.0986, 1.010, 0.905, 0.819], atol=0.01)


def test_divergence_counts_what_is_lost_to_unknown_tokens_and_lets_the_impossible_be() -> None:
    law = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    scores = torch.tensor([[0.25, 0.25, 0.0, 0.5]], dtype=torch.float64).log()
    np.testing.assert_allclose(divergence(law, log_probabilities(scores)), math.log(2), rtol=1e-12)
    assert divergence(law, log_probabilities(law.log())) == 0
    assert np.isnan(divergence(law, log_probabilities(torch.tensor([[1.0, 0.0, 0.0]]).log())))[0]


# --- regression -----------------------------------------------------------------------------------------------------


def test_a_pool_that_is_the_prior_itself_gives_ridge_regression() -> None:
    """Of 400 000 tasks from N(0, 1), near the truth; and exactly the mean of the pool before any example."""
    draw = generator(0)
    pool = torch.randn(400_000, 2, generator=draw, dtype=torch.float64)
    x, y = regression_examples(torch.randn(6, 2, generator=draw), 4, 1.0, draw)
    found = pool_predictions(x, y, 1.0, pool)
    np.testing.assert_allclose(found[:, 0], x[:, 0].double() @ pool.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found, ridge_predictions(x, y, 1.0), atol=0.03)


def test_the_posterior_over_a_pool_by_hand() -> None:
    pool = torch.tensor([[1.0], [-1.0]])
    x, y = torch.tensor([[[1.0], [2.0], [1.0]]]), torch.tensor([[0.5, 1.0, 9.0]])
    # log odds of the two tasks: (y + x)² - (y - x)² = 4 x y over 2 noise, summed over the examples before
    odds = np.array([0.0, 4 * 0.5, 4 * 0.5 + 4 * 2.0]) / (2 * 0.25)
    np.testing.assert_allclose(pool_predictions(x, y, 0.25, pool)[0], np.tanh(odds / 2) * [1, 2, 1], rtol=1e-9)


def test_errors_of_ridge_and_zero_on_new_tasks() -> None:
    """Of zero D + noise; of ridge noise + E tr (1 + XᵀX / noise)⁻¹, 1.93 at D 4, K 8, noise .25."""
    draw = generator(1)
    x, y = regression_examples(torch.randn(60_000, 4, generator=draw), 8, 0.25, draw)
    np.testing.assert_allclose(y.square().mean(), 4.25, atol=0.05)
    gram = (x[..., None] * x[..., None, :]).double().cumsum(1) - x[..., None] * x[..., None, :]
    left = torch.linalg.inv(torch.eye(4) + gram / 0.25).diagonal(dim1=-2, dim2=-1).sum(-1)
    errors = (ridge_predictions(x, y, 0.25) - y).square().mean(0)
    np.testing.assert_allclose(errors, 0.25 + left.mean(0), atol=0.06)
    np.testing.assert_allclose(errors.mean(), 1.93, atol=0.02)
