"""Windows and encoders: what attention could have looked at is the null of what it did look at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from devmon.anatomy import layer_patterns
from devmon.anatomy.sight import sees_ahead, shortest_window
from devmon.errors import InstrumentError
from devmon.instruments import InductionHeads, PreviousTokenHeads
from devmon.snapshot import Snapshot
from devmon.testing import induction
from tests.anatomy.families import VOCAB, T, family

TOKENS = torch.randint(3, VOCAB, (3, 24), generator=torch.Generator().manual_seed(0))


class Windowed(nn.Module):
    """Uniform attention over the last `window` places, by a mask of one's own; over all places for None."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window, self.embed = window, nn.Embedding(VOCAB, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        back = torch.arange(tokens.shape[1])[:, None] - torch.arange(tokens.shape[1])
        seen = back > -1000 if self.window is None else (back >= 0) & (back < self.window)
        return F.scaled_dot_product_attention(*(t[:, None] for t in (0 * x, x, x)), attn_mask=seen)[:, 0]


@pytest.mark.parametrize("window", [1, 4, 7, 23])
def test_a_window_is_seen_in_the_patterns(window: int) -> None:
    model = Windowed(window)
    assert shortest_window(model, layer_patterns(model, TOKENS)) == window - 1
    assert not sees_ahead(layer_patterns(model, TOKENS))


def test_what_is_no_window() -> None:
    for model in (Windowed(24), Windowed(None), family("gpt2"), family("bert"), induction(VOCAB, 24)):
        assert shortest_window(model, layer_patterns(model, TOKENS)) is None
    assert sees_ahead(layer_patterns(Windowed(None), TOKENS))
    assert sees_ahead(layer_patterns(family("bert"), TOKENS))


@pytest.mark.parametrize("name, window", [("mistral", 3), ("gemma2", 3), ("gemma3", 3)])
def test_windows_of_families_however_sharp(name: str, window: int) -> None:
    model = family(name)
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            module.scaling *= 1e4
    assert shortest_window(model, layer_patterns(model, TOKENS[:1])) == window


def test_uniform_attention_scores_its_null() -> None:
    """Prefix matching and previous token of attention that is uniform over what it sees are `uniform`."""
    for model in (Windowed(24), Windowed(None)):
        found = PreviousTokenHeads(tokens=TOKENS)(Snapshot(0, model))
        np.testing.assert_allclose(found["previous_token"], found["uniform"])
        found = InductionHeads(VOCAB, 8, 24)(Snapshot(0, model))
        np.testing.assert_allclose(found["prefix_matching"], found["uniform"])
    np.testing.assert_allclose(found["uniform"], 1 / 24)


def test_the_period_is_shortened_to_the_window() -> None:
    instrument = InductionHeads(VOCAB, 16, 64)
    found = instrument(Snapshot(0, Windowed(8)))
    assert found.attrs["length"].startswith("16, not 64")
    assert found["prefix_matching"] > 1 / 8 - 1e-6  # every match lies in the window
    assert "length" not in instrument(Snapshot(0, Windowed(64))).attrs
    with pytest.raises(InstrumentError, match="sees 2 places back, too few for any repeat"):
        instrument(Snapshot(0, Windowed(3)))
    with_bos = InductionHeads(VOCAB, 16, 64, bos=0)(Snapshot(0, Windowed(8)))
    assert with_bos.attrs["length"].startswith("17")


def test_a_windowed_induction_head_is_found() -> None:
    config = T.MistralConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=VOCAB, max_position_embeddings=128, sliding_window=6, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    found = InductionHeads(VOCAB, 16, 64)(Snapshot(0, T.MistralForCausalLM(config).eval()))
    assert found.attrs["length"].startswith("12, not 64")
    np.testing.assert_allclose(found["prefix_matching"], 1 / 6, atol=0.08)  # near uniform, and never 0
