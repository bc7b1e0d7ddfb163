"""`nn.MultiheadAttention` opened into modules computes what it computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from devmon.anatomy import Anatomy, anatomy_of
from devmon.anatomy.variants.builtin import Opened, Projection, can_open
from tests.anatomy.proposing import client_models as C

LENGTH = 6
GENERATOR = torch.Generator().manual_seed(0)
BANNED = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
ADDED = torch.randn(2 * C.HEADS, LENGTH, LENGTH, generator=GENERATOR, dtype=torch.float64)
PADDED = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"attn_mask": BANNED},
    "a bias for each head": {"attn_mask": ADDED},
    "padded": {"key_padding_mask": PADDED},
    "both": {"attn_mask": BANNED, "key_padding_mask": PADDED},
    "without weights": {"attn_mask": BANNED, "need_weights": False},
    "weights by head": {"attn_mask": BANNED, "average_attn_weights": False},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_it_computes_the_same(call: str, bias: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(C.D, C.HEADS, bias=bias, batch_first=batch_first).double().eval()
    C.shaken(attention)
    x = torch.randn(2, LENGTH, C.D, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    assert can_open(attention)
    expected = attention(x, x, x, **CALLS[call])
    opened = Opened({attention: Projection(attention)})
    found = attention(x, x, x, **CALLS[call])
    opened.remove()
    assert "forward" not in vars(attention)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_sequence_without_a_batch_and_one_that_attends_to_another() -> None:
    torch.manual_seed(0)
    attention = C.shaken(nn.MultiheadAttention(C.D, C.HEADS, batch_first=True).double())
    x, other = torch.randn(LENGTH, C.D).double(), torch.randn(2, 3, C.D).double()
    alone, cross = attention(x, x, x)[0], attention(x[None].repeat(2, 1, 1), other, other)[0]
    opened = Opened({attention: Projection(attention)})
    torch.testing.assert_close(attention(x, x, x)[0], alone)
    assert torch.equal(attention(x[None].repeat(2, 1, 1), other, other)[0], cross)
    opened.remove()


def test_what_cannot_be_opened_is_left_as_it_is() -> None:
    for options in ({"kdim": 4}, {"add_bias_kv": True}, {"add_zero_attn": True}):
        assert not can_open(nn.MultiheadAttention(C.D, C.HEADS, **options))


def test_sites_can_be_written_and_nothing_of_it_stays() -> None:
    """A head whose output is set to zero, against the model with that head's part of the output map at zero."""
    torch.manual_seed(0)
    model = C.shaken(C.TorchEncoder()).double()
    tokens = torch.randint(C.VOCAB, (2, LENGTH), generator=GENERATOR)
    before = model(tokens)
    anatomy = Anatomy(model, anatomy_of(model).layout)

    def silence(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[:, :, 1] = 0
        return z

    written, _ = anatomy.run(tokens, write={("z", 0): silence})
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.equal(model(tokens), before)
    size = C.D // C.HEADS
    model.encoder.layers[0].self_attn.out_proj.weight.data[:, size : 2 * size] = 0
    torch.testing.assert_close(written, model(tokens), rtol=1e-9, atol=1e-9)
    assert float((written - before).detach().abs().max()) > 0.1
