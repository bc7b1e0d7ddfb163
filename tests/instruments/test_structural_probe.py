"""StructuralProbe on states whose distances are those of a tree, turned and hidden among others, and on none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.stats import spearmanr
from torch import Tensor, nn

from devmon.data.grammars import SMALL, trees
from devmon.errors import DataError
from devmon.instruments import StructuralProbe
from devmon.instruments.structural_probe import _scores, _spanning
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract
from devmon.testing.handbuilt import AttentionOnly
from tests.support.models import random_model

ABOVE = [-1, 0, 0, 1, 1, 2, 2, 3, 6]  # of nine nodes: the tree that all sentences have, in any order


def sentences(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, heads and sentences: each row a start token 9 and the nodes of the tree in an order of its own."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(9, generator=generator) for _ in range(count)])
    where = rows.argsort(1)  # the place of each node
    above = torch.tensor(ABOVE)
    head = torch.where(above[rows] < 0, -1, 1 + where.gather(1, above[rows].clamp_min(0)))
    pad = torch.full((count, 1), -1)
    return (
        torch.cat([torch.full((count, 1), 9), rows], 1),
        torch.cat([pad, head], 1),
        torch.cat([pad, torch.zeros_like(head)], 1),
    )


def embedded(tree: bool) -> AttentionOnly:
    """States of 24 dimensions, the first eight the edges between a node and the root, so that squared distances are
    those of the tree; the others of twice the size, at random; all turned. Without `tree`, all at random."""
    generator = torch.Generator().manual_seed(2)
    states = 2 * torch.randn(10, 24, generator=generator, dtype=torch.float64)
    for node in range(9):
        way, at = torch.zeros(8, dtype=torch.float64), node
        while ABOVE[at] >= 0:
            way[at - 1] = 1.0
            at = ABOVE[at]
        if tree:
            states[node, :8] = way
    if tree:
        states[:, 16:] = 0
    turn = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))[0]
    none = torch.zeros(24, 24, dtype=torch.float64)
    return AttentionOnly(states @ turn, torch.zeros(10, 24).double(), [[(none, none)]], torch.zeros(24, 10).double())


def test_a_tree_that_the_states_hold_is_found() -> None:
    instrument = StructuralProbe(*sentences(24), steps=400)
    found = instrument(Snapshot(0, embedded(True)))
    assert (found["uuas"] > 0.95).all(), found["uuas"].values
    assert (found["spearman"] > 0.9).all(), found["spearman"].values
    assert float(found["uuas_chain"]) < 0.5
    assert abs(float(found["spearman_chain"])) < 0.2


def test_the_least_spanning_tree_and_the_ranks_against_scipy() -> None:
    rng = np.random.default_rng(0)
    for n in (5, 9):
        points = rng.standard_normal((n, 3))
        d = ((points[:, None] - points) ** 2).sum(-1)
        own = {frozenset(edge) for edge in _spanning(d)}
        assert own == {frozenset(map(int, edge)) for edge in np.argwhere(minimum_spanning_tree(d).toarray())}
        true = rng.integers(1, 5, (n, n)).astype(float)
        true = np.maximum(true, true.T) * (1 - np.eye(n))
        right = sum(true[tuple(edge)] == 1 for edge in own)
        each = [spearmanr(np.delete(d[i], i), np.delete(true[i], i)).statistic for i in range(n)]
        np.testing.assert_allclose(_scores(d, true), [[right, n - 1], [np.nansum(each), n]], rtol=1e-9)


def test_the_chain_is_what_neighbours_are() -> None:
    """Sentences whose every token depends on the one before: the chain is the tree."""
    tokens = torch.randint(1, 9, (8, 7), generator=torch.Generator().manual_seed(0))
    head = (torch.arange(7) - 1).expand(8, 7)
    found = StructuralProbe(tokens, head, torch.zeros_like(head), steps=2)(Snapshot(0, embedded(False)))
    np.testing.assert_allclose([found["uuas_chain"], found["spearman_chain"]], 1.0)


def test_what_does_not_fit_is_refused() -> None:
    tokens, head, sentence = sentences(6)
    with pytest.raises(DataError, match="shape of tokens"):
        StructuralProbe(tokens, head[:, :4], sentence)
    with pytest.raises(DataError, match="five|5 tokens"):
        StructuralProbe(tokens[:, :4], head[:, :4], sentence[:, :4])
    with pytest.raises(DataError, match="rank"):
        StructuralProbe(tokens, head, sentence, rank=0)


class TestStructuralProbe(InstrumentContract):
    def instrument(self) -> StructuralProbe:
        drawn = SMALL.draw(16, 40, torch.Generator().manual_seed(0))
        known = trees(drawn)
        return StructuralProbe(drawn.tokens, known.head, known.sentence, rank=4, steps=10)

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)
