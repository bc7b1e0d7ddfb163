"""AttentionSinks on attention and norms that are known."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from devmon.anatomy import attention_patterns
from devmon.instruments.attention_sinks import AttentionSinks
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract, even
from tests.support.models import LENGTH, VOCAB, random_model

TOKENS = torch.randint(VOCAB, (10, LENGTH), generator=torch.Generator().manual_seed(0))


class Massive(nn.Module):
    """Unit vectors, to which the first block adds 40 times itself at the first place; heads rest there by half."""

    class Block(nn.Module):
        def __init__(self, size: float) -> None:
            super().__init__()
            self.size = nn.Parameter(torch.tensor(size))

        def forward(self, x: Tensor) -> Tensor:
            length = x.shape[1]
            scores = torch.zeros(len(x), 1, length, length)
            scores[..., 0] = torch.arange(length).clamp_min(1).float().log()  # as much as all the others together
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            pattern = scores.softmax(-1)
            first = torch.zeros_like(x)
            first[:, 0] = self.size * x[:, 0]
            return x + first + 0.0 * (pattern[:, 0] @ x)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.embed.weight.data = nn.functional.normalize(self.embed.weight.data, dim=-1)
        self.blocks = nn.ModuleList([Massive.Block(40.0), Massive.Block(0.0)])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x @ self.embed.weight.T


def test_a_massive_state_and_heads_that_rest_on_it() -> None:
    found = AttentionSinks(TOKENS, batch_size=3)(Snapshot(0, Massive().eval()))
    np.testing.assert_allclose(found["high_norm"], [0, 1 / LENGTH, 1 / LENGTH], rtol=1e-6)
    np.testing.assert_allclose(found["largest"], [1, 41, 41], rtol=1e-5)
    np.testing.assert_allclose(found["largest_first"][1:], 1)
    np.testing.assert_allclose(found["first"], 0.5, rtol=1e-5)
    np.testing.assert_allclose(found["first_se"], 0, atol=1e-9)


def test_even_attention_has_no_sink() -> None:
    found = AttentionSinks(TOKENS)(Snapshot(0, even(VOCAB, LENGTH)))
    np.testing.assert_allclose(found["first"], np.mean([1 / (i + 1) for i in range(1, LENGTH)]), rtol=1e-6)
    np.testing.assert_allclose(found["first"].values.flat[0], found["uniform"], rtol=1e-6)


def test_by_hand_on_a_random_model() -> None:
    model = random_model(0)
    found = AttentionSinks(TOKENS, batch_size=4)(Snapshot(0, model))
    for layer, pattern in enumerate(attention_patterns(model, TOKENS)):
        np.testing.assert_allclose(found["first"][layer], pattern[:, :, 1:, 0].mean((0, 2)), rtol=1e-5)
    assert float(found["high_norm"].max()) == 0
    assert float(found["largest"].max()) < 3


class TestAttentionSinks(InstrumentContract):
    def instrument(self) -> AttentionSinks:
        return AttentionSinks(TOKENS)

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)
