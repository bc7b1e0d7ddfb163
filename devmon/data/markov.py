"""Markov chains with a new or a drawn transition matrix in each sequence, and the predictors that know how they come.

Two kinds of data (Edelman et al. 2024, 2402.11004; Park et al. 2024, 2412.01003): a chain whose rows are drawn from
Dirichlet(1, …, 1) anew in each sequence, for which counting is Bayes, and a mixture of a fixed set of chains, for which
telling the chain is. The first token is uniform, so that it says nothing about the chain and both are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from devmon.errors import DataError


def transition_matrices(count: int, states: int, generator: torch.Generator) -> Tensor:
    """Matrices (count, state, state) in float64 whose rows are independent draws of Dirichlet(1, …, 1)."""
    waits = -(1 - torch.rand(count, states, states, generator=generator, dtype=torch.float64)).log()
    return waits / waits.sum(-1, keepdim=True)


def stationary(matrices: Tensor) -> Tensor:
    """The stationary laws (count, state) of matrices (count, state, state) of which none is reducible.

    States are taken out one by one, without a subtraction (Grassmann, Taksar & Heyman 1985): no solver of linear
    equations gives the same last digits at every call.
    """
    rest, states = matrices.clone(), matrices.shape[-1]
    for last in range(states - 1, 0, -1):
        rest[:, :last, last] /= rest[:, last, :last].sum(-1, keepdim=True)
        rest[:, :last, :last] += rest[:, :last, last, None] * rest[:, None, last, :last]
    law = torch.ones_like(rest[:, 0])
    for state in range(1, states):
        law[:, state] = (law[:, :state] * rest[:, :state, state]).sum(-1)
    return law / law.sum(-1, keepdim=True)


def chains(matrices: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Tokens (sequence, length) int64, one sequence a matrix, the first token uniform."""
    count, states, _ = matrices.shape
    steps = matrices.cumsum(-1)
    drawn = torch.rand(length, count, 1, generator=generator, dtype=torch.float64)
    tokens = (drawn[0] * states).long().clamp_max(states - 1)
    for chance in drawn[1:]:
        row = steps[torch.arange(count), tokens[:, -1]]  # (sequence, state)
        tokens = torch.cat([tokens, (row[:, :-1] < chance).sum(1, keepdim=True)], 1)
    return tokens


def counted(tokens: Tensor, states: int, order: int) -> Tensor:
    """(c(h x) + 1) / (c(h) + k), (batch, pos, state) in float64: the law of the next token x at each place.

    c counts in the sequence up to the place, h is its last `order` - 1 tokens: the uniform law for order 0, the
    unigram for 1, the bigram for 2, … The order 2 is the Bayes predictor of a chain with rows from Dirichlet(1, …, 1)
    and a uniform first token, order n of one whose next token hangs on n - 1.
    """
    if order == 0:
        return torch.full((*tokens.shape, states), 1 / states, dtype=torch.float64)
    batch, length = tokens.shape
    counts = torch.zeros(batch, states ** (order - 1), states, dtype=torch.float64)
    laws, every = torch.full((batch, length, states), 1 / states, dtype=torch.float64), torch.arange(batch)
    power = states ** torch.arange(order - 2, -1, -1)
    for place in range(length):
        # the token just seen is counted under the tokens before it, then the law is read for the context that it ends
        if place >= order - 1:
            before = (tokens[:, place - order + 1 : place] * power).sum(1)
            counts[every, before, tokens[:, place]] += 1
            seen = counts[every, (tokens[:, place - order + 2 : place + 1] * power).sum(1)]
            laws[:, place] = (seen + 1) / (seen.sum(-1, keepdim=True) + states)
    return laws


def retrieved(tokens: Tensor, matrices: Tensor, order: int) -> Tensor:
    """The law of the next token (batch, pos, state), float64, by telling which of the fixed matrices made the sequence.

    Order 2: Σ_n w_n P_n(x_t, ·), w_n ∝ Π P_n(x_i, x_{i+1}), the Bayes predictor of an even mixture of these chains with
    a uniform first token. Order 1: Σ_n w_n π_n, w_n ∝ Π π_n(x_i), with the stationary laws π_n in place of the rows.
    Raises DataError for a sequence that none of the chains can make.
    """
    if order == 2:
        steps = matrices.log()[:, tokens[:, :-1], tokens[:, 1:]]  # (chain, batch, pos - 1)
        evidence = torch.cat([torch.zeros_like(steps[..., :1]), steps.cumsum(-1)], -1)
        each = matrices[:, tokens]  # (chain, batch, pos, state)
    else:
        law = stationary(matrices)
        evidence = law.log()[:, tokens].cumsum(-1)
        each = law[:, None, None]
    if bool((evidence == -torch.inf).all(0).any()):
        raise DataError("a sequence holds a step that no given chain can make: give tokens of chains without zeros")
    return (evidence.softmax(0)[..., None] * each).sum(0)
