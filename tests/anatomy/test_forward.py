"""Logits of every kind of output, and the loss of the next token in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from devmon.anatomy import logits, next_token
from devmon.anatomy.forward import forward
from devmon.errors import InstrumentError
from devmon.testing import Bigram, even
from tests.support.attention_models import BATCH, LENGTH, VOCAB, tokens


def test_logits_of_every_kind_of_output() -> None:
    class Returns(nn.Module):
        def __init__(self, make: Any) -> None:
            super().__init__()
            self.inner, self.make = even(VOCAB, LENGTH), make

        def forward(self, batch: Tensor) -> Any:
            return self.make(self.inner(batch) + torch.arange(VOCAB))

    output = transformers.modeling_outputs.CausalLMOutput
    for make in (lambda x: x, lambda x: (x, None), lambda x: output(logits=x), lambda x: {"logits": x}):
        assert torch.equal(logits(Returns(make), tokens())[0, 0], torch.arange(VOCAB).double())
    with pytest.raises(InstrumentError, match=r"Gain needs logits.*\(3, 12\) places; Returns returned \(3, 1, 23\)"):
        logits(Returns(lambda x: x[:, -1:]), tokens(), "Gain")
    with pytest.raises(InstrumentError, match=r"Gain needs logits.*Returns returned BaseModelOutput"):
        logits(Returns(lambda x: transformers.modeling_outputs.BaseModelOutput(last_hidden_state=x)), tokens(), "Gain")


def test_next_token_is_scored_by_the_place_before() -> None:
    table = torch.full((3, 3), 0.1) + 0.7 * torch.eye(3).roll(1, 1)  # 0 -> 1 -> 2 -> 0
    nats, hits = next_token(Bigram(table), torch.tensor([[0, 1, 2, 2, 0]]))
    np.testing.assert_allclose(nats.numpy(), -np.log([[0.8, 0.8, 0.1, 0.8]]), rtol=1e-6)
    assert hits.tolist() == [[True, True, False, True]]
    with pytest.raises(InstrumentError, match="give tokens of this model's vocabulary"):
        next_token(nn.Sequential(nn.Embedding(9, 3)), torch.tensor([[0, 8]]), "Loss")


def test_models_of_one_length_and_models_that_see_ahead() -> None:
    class OneLength(nn.Module):
        def forward(self, given: Tensor) -> Tensor:
            assert given.shape[1] == LENGTH, "a causal mask of fixed size"
            return F.one_hot(given, VOCAB).double().cumsum(1)

    class Ahead(OneLength):
        def forward(self, given: Tensor) -> Tensor:
            return super().forward(given).flip(1)

    assert next_token(OneLength(), tokens())[0].shape == (BATCH, LENGTH - 1)
    with pytest.raises(InstrumentError, match="depends on later tokens"):
        next_token(Ahead(), tokens())
    next_token(Ahead(), tokens(), check=False)
    next_token(Ahead(), torch.zeros(2, LENGTH, dtype=torch.int64))  # one token alone: nothing to exchange


@pytest.mark.parametrize(("logit", "nats"), [(math.nan, math.nan), (-math.inf, math.log(VOCAB - 1))])
def test_the_loss_of_a_model_that_has_diverged_is_nan_and_logits_may_be_masked(logit: float, nats: float) -> None:
    class Flat(nn.Module):
        def forward(self, given: Tensor) -> Tensor:
            scores = torch.zeros(*given.shape, VOCAB)
            scores[..., 0] = logit
            return scores

    some = tokens()
    some[some == 0] = 1
    np.testing.assert_allclose(next_token(Flat(), some)[0].numpy(), nats, rtol=1e-6)


def test_tokens_reach_the_model_in_one_piece() -> None:
    """Some models take a view of them, as nanoGPT does of its targets."""

    class Views(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens.view(-1)

    tokens = torch.arange(6).reshape(2, 3).T
    assert forward(Views(), tokens, "test").tolist() == [0, 3, 1, 4, 2, 5]
    assert forward(Views(), {"tokens": tokens[:, :1]}, "test").tolist() == [0, 1, 2]
