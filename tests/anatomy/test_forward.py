"""Logits of every kind of output, and the loss of the next token in closed form."""

from __future__ import annotations

import math
import warnings
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
from tests.anatomy.families import CONFIGS, ENCODERS, KINDS, MASKED, OTHERS, family
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


@pytest.mark.parametrize("name", [*MASKED, *ENCODERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoders_are_refused_before_they_are_trained(name: str, dtype: torch.dtype) -> None:
    """At its initialisation an encoder sees ahead by a thousandth of what it says: no rounding, but near it."""
    model = untrained(name).to(dtype)
    for length in (24, 2):
        given = torch.randint(3, 23, (4, length), generator=torch.Generator().manual_seed(0))
        with pytest.raises(InstrumentError, match="depends on later tokens"):
            next_token(model, given)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen3_next", "jamba", "bloom", "gpt_oss", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_models_pass_however_little_they_say(name: str, dtype: torch.dtype) -> None:
    given = torch.randint(3, 23, (4, 24), generator=torch.Generator().manual_seed(0))
    for model in (untrained(name), family(name)):
        with torch.no_grad():
            assert next_token(model.to(dtype), given)[0].isfinite().all()
            for parameter in model.parameters():
                parameter.mul_(0)
            next_token(model, given)
            model.get_output_embeddings().weight.fill_(float("nan"))
        next_token(model, given)  # a diverged training is no encoder


def untrained(name: str) -> Any:
    config = (CONFIGS | OTHERS)[name]()
    config.bos_token_id = config.eos_token_id = None
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return KINDS.get(name, transformers.AutoModelForCausalLM).from_config(config).eval()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear(8, 4), "same dtype|dtype"),  # numbers, given tokens
        (nn.Conv2d(3, 4, 2), "Input type|size|dimension"),  # images
        (nn.Sequential(nn.Embedding(VOCAB, 8), nn.Linear(16, 4)), "shapes cannot be multiplied"),
    ],
)
def test_a_model_of_other_inputs_is_refused_in_a_sentence(model: nn.Module, said: str) -> None:
    with pytest.raises(InstrumentError, match=f"Loss: .* does not run on one tensor .*({said}).*hand over a part"):
        forward(model, tokens(), "Loss")


def test_errors_of_memory_and_of_the_device_pass_as_they_are() -> None:
    class Fails(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            raise RuntimeError(self.said)

    model: Any = Fails()
    for model.said in ("CUDA out of memory. Tried to allocate 2 GiB, size 3", "CUBLAS_STATUS_EXECUTION_FAILED"):
        with pytest.raises(RuntimeError, match=model.said.split(".")[0]):
            forward(model, tokens(), "Loss")


def test_positions_beyond_the_trained_range_are_told() -> None:
    given = torch.randint(3, 23, (1, 40), generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="Loss: LlamaForCausalLM was made for 32 positions, these are 40"):
        next_token(family("llama"), given, "Loss")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next_token(family("llama"), given[:, :32], "Loss")
