"""BracketClosing: 1 for the language, chance without memory, and between for a memory that is short."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from devmon.data.grammars import Brackets
from devmon.errors import DataError, InstrumentError
from devmon.instruments import BracketClosing
from devmon.snapshot import Snapshot
from devmon.testing import Bigram, InstrumentContract
from tests.instruments.test_grammar_excess import Law

LANGUAGE = Brackets(3, 4)
ROWS = LANGUAGE.draw(30, 40, torch.Generator().manual_seed(0))


class Remembers(nn.Module):
    """Gives the closer of the bracket that is open e^4 times the others, where it was opened fewer than `far` tokens
    back; else all alike. Rows that are none of the language get zeros, as the check of causality exchanges tokens."""

    def __init__(self, far: int) -> None:
        super().__init__()
        self.far, self.weight = far, nn.Parameter(torch.tensor(4.0))

    def forward(self, tokens: Tensor) -> Tensor:
        scores = torch.zeros(*tokens.shape, 6)
        for row, line in enumerate(tokens.tolist()):
            stack: list[tuple[int, int]] = []
            for place, token in enumerate(line):
                if token < 3:
                    stack.append((token, place))
                elif stack:
                    stack.pop()
                if stack and place + 1 - stack[-1][1] < self.far:
                    scores[row, place, 3 + stack[-1][0]] = self.weight
        return scores


def test_a_short_memory_closes_what_is_near() -> None:
    found = BracketClosing(ROWS, LANGUAGE, batch_size=7)(Snapshot(0, Remembers(4)))
    knows = np.exp(4) / (np.exp(4) + 2)
    np.testing.assert_allclose(found["closing_by_distance"][:2], knows, rtol=1e-6)
    np.testing.assert_allclose(found["closing_by_distance"][2:5], 1 / 3, rtol=1e-6)
    assert 1 / 3 < float(found["closing"]) < knows
    all_of_it = BracketClosing(ROWS, LANGUAGE)(Snapshot(0, Remembers(1000)))
    np.testing.assert_allclose(all_of_it["closing"], knows, rtol=1e-6)
    np.testing.assert_allclose(all_of_it["closing_se"], 0, atol=1e-9)


def test_the_language_itself_scores_1_and_no_memory_chance() -> None:
    found = BracketClosing(ROWS, LANGUAGE)(Snapshot(0, Law(LANGUAGE)))
    np.testing.assert_allclose(found["closing"], 1.0, rtol=1e-12)
    blind = BracketClosing(ROWS, LANGUAGE)(Snapshot(0, Bigram(torch.full((6, 6), 1 / 6))))
    np.testing.assert_allclose([blind["closing"], blind["chance"]], 1 / 3, rtol=1e-12)


def test_the_mean_is_over_places_with_an_open_bracket() -> None:
    """A bigram that knows the closer of a bracket just opened, and nothing else."""
    table = torch.full((6, 6), 1.0)
    table[torch.arange(3), torch.arange(3) + 3] = 2.0
    found = BracketClosing(ROWS, LANGUAGE)(Snapshot(0, Bigram(table / table.sum(1, keepdim=True))))
    scores = []
    for line in ROWS.tolist():
        stack: list[int] = []
        for token in line:
            stack = [*stack, token] if token < 3 else stack[:-1]
            if stack:
                scores.append(0.5 if token < 3 else 1 / 3)
    np.testing.assert_allclose(found["closing"], np.mean(scores), rtol=1e-9)


def test_what_is_no_bracket_is_refused() -> None:
    with pytest.raises(DataError, match="two kinds"):
        BracketClosing(Brackets(1, 3).draw(4, 10, torch.Generator()), Brackets(1, 3))
    with pytest.raises(DataError, match="row 0 closes"):
        BracketClosing(torch.full((2, 4), 4), LANGUAGE)
    with pytest.raises(InstrumentError, match="language.vocab_size"):
        BracketClosing(ROWS[:, :1].repeat(1, 3) % 3, LANGUAGE)(Snapshot(0, Bigram(torch.full((3, 3), 1 / 3))))


class TestBracketClosing(InstrumentContract):
    def instrument(self) -> BracketClosing:
        return BracketClosing(ROWS, LANGUAGE)

    def model(self, seed: int) -> nn.Module:
        return Bigram(torch.rand(6, 6, generator=torch.Generator().manual_seed(seed)) + 0.1)
