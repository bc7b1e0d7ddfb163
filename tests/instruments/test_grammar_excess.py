"""GrammarExcess: 0 for the language itself, closed forms for models that know less, its contract."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.data.grammars import SMALL, Brackets
from devmon.errors import DataError, InstrumentError
from devmon.instruments.grammar_excess import GrammarExcess
from devmon.snapshot import Snapshot
from devmon.testing import Bigram, InstrumentContract

ROWS = SMALL.draw(24, 40, torch.Generator().manual_seed(0)).tokens


class Law(nn.Module):
    """The language itself, mixed with uniform predictions over `wide` tokens by a share; zeros after what the language
    cannot make, as the check of causality exchanges tokens."""

    def __init__(self, language: Any, share: float = 0.0, wide: int = 0) -> None:
        super().__init__()
        self.language, self.share, self.wide = language, share, max(wide, language.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.stack([self._row(row) for row in tokens])

    def _row(self, row: Tensor) -> Tensor:
        logits = torch.zeros(len(row), self.wide, dtype=torch.float64)
        for length in range(len(row), 0, -1):
            try:
                law = self.language.laws(row[None, :length])[0]
            except DataError:
                continue
            law = nn.functional.pad(law, (0, self.wide - law.shape[-1]))
            logits[:length] = ((1 - self.share) * law + self.share / self.wide).log()
            break
        return logits


def measure(instrument: GrammarExcess, model: nn.Module) -> xr.Dataset:
    return instrument(Snapshot(0, model.eval()))


@pytest.mark.parametrize("language", [SMALL, Brackets(2, 3)], ids=["grammar", "brackets"])
def test_the_language_itself_has_excess_0(language: Any) -> None:
    drawn = language.draw(16, 30, torch.Generator().manual_seed(1))
    tokens = drawn if isinstance(drawn, Tensor) and drawn.ndim == 2 else drawn.tokens
    found = measure(GrammarExcess(tokens, language, batch_size=5), Law(language))
    np.testing.assert_allclose([found["excess"], found["impossible"]], 0, atol=1e-15)
    laws = language.laws(tokens)[:, :-1]
    np.testing.assert_allclose(found["loss"], -laws.gather(-1, tokens[:, 1:, None]).log().mean(), rtol=1e-12)
    np.testing.assert_allclose(found["entropy"], torch.special.entr(laws).sum(-1).mean(), rtol=1e-12)


@pytest.mark.parametrize("share, wide", [(0.1, 0), (0.5, 0), (0.3, 9)])
def test_mixed_with_uniform_predictions(share: float, wide: int) -> None:
    found = measure(GrammarExcess(ROWS, SMALL), Law(SMALL, share, wide))
    laws = SMALL.laws(ROWS)[:, :-1].numpy()
    model = (1 - share) * laws + share / max(wide, 4)
    there = laws > 0
    excess = np.where(there, laws * np.log(np.where(there, laws, 1) / model), 0).sum(-1).mean()
    np.testing.assert_allclose(found["excess"], excess, rtol=1e-9)
    lost = share * (1 - there.sum(-1) / max(wide, 4))  # what goes to the others, those unknown to the language too
    np.testing.assert_allclose(found["impossible"], lost.mean(), rtol=1e-9)


def test_uniform_predictions_score_the_references() -> None:
    found = measure(GrammarExcess(ROWS, SMALL), Bigram(torch.full((4, 4), 0.25, dtype=torch.float64)))
    np.testing.assert_allclose(found["excess"], found["excess_reference"], rtol=1e-12)
    np.testing.assert_allclose(found["impossible"], found["impossible_reference"], rtol=1e-12)
    np.testing.assert_allclose(found["excess"] + found["entropy"], math.log(4), rtol=1e-12)


def test_refusals() -> None:
    with pytest.raises(DataError, match="cannot make token"):
        GrammarExcess(ROWS.flip(1), SMALL)
    with pytest.raises(InstrumentError, match="logits of the 4 tokens of the language, Narrow has 3"):
        measure(GrammarExcess(ROWS, SMALL), Narrow())


class Narrow(Bigram):
    def __init__(self) -> None:
        super().__init__(torch.full((4, 4), 0.25, dtype=torch.float64))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)[..., :3]


class TestGrammarExcess(InstrumentContract):
    def instrument(self) -> GrammarExcess:
        return GrammarExcess(ROWS, SMALL)

    def model(self, seed: int) -> nn.Module:
        return Bigram(torch.rand(4, 4, generator=torch.Generator().manual_seed(seed)) + 0.01)
