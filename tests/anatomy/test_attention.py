"""Attention patterns against what models report themselves, and closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from devmon.anatomy import attention_patterns, logits, residual_stream, stack_heads
from devmon.anatomy.attention import Patterns, _pattern
from devmon.errors import InstrumentError
from tests.support.attention_models import BATCH, LENGTH, VOCAB, Attention, Small, hugging_face, tokens

HUGGING_FACE = ["gpt2", "gpt_neox", "llama", "gemma2"]
WAYS = ["sdpa", "F.softmax", "torch.softmax", "Tensor.softmax", "MHA", "MHA weights"]


@pytest.mark.parametrize("way", WAYS)
def test_patterns_of_every_way_of_attending(way: str) -> None:
    model = Small(way, way)
    seen: list[Tensor] = []
    handles = [block.register_forward_hook(lambda m, args, out: seen.append(args[0])) for block in model.blocks]
    patterns = attention_patterns(model, tokens())
    for handle in handles:
        handle.remove()
    assert len(patterns) == 2, "one pattern per attention call, neither missed nor seen twice"
    for block, state, pattern in zip(model.blocks, seen, patterns, strict=True):
        assert isinstance(block, Attention)
        torch.testing.assert_close(pattern, block.reference(state).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_capturing_does_not_change_what_the_model_computes(way: str) -> None:
    model, outputs = Small(way, way), []
    plain = model(tokens())
    handle = model.register_forward_hook(lambda m, args, out: outputs.append(out))
    attention_patterns(model, tokens())
    handle.remove()
    if way.startswith("MHA"):  # the fast path off: the same function by another kernel
        torch.testing.assert_close(outputs[0], plain)
    else:
        assert torch.equal(outputs[0], plain)
    assert torch.backends.mha.get_fastpath_enabled()


def test_transformer_encoder_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(VOCAB, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    patterns = attention_patterns(model, tokens())
    assert [tuple(p.shape) for p in patterns] == [(BATCH, 2, LENGTH, LENGTH)] * 2
    for pattern in patterns:
        torch.testing.assert_close(pattern.sum(-1), torch.ones(BATCH, 2, LENGTH))
    assert len(residual_stream(model, tokens(), blocks="1.layers")) == 3


@pytest.mark.parametrize(
    "case", ["plain", "causal", "bool", "float", "scale", "grouped", "empty row", "empty float row"]
)
def test_pattern_is_what_multiplies_the_values(case: str) -> None:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(2, 4, 6, 5, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2 if case == "grouped" else 4, 6, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 1, 6, 6, generator=generator) < 0.6
    mask[..., 0] = True
    if case.startswith("empty"):
        mask[:, :, 3] = False
    options: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "bool": {"attn_mask": mask},
        "empty row": {"attn_mask": mask},
        "empty float row": {"attn_mask": torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)},
        "float": {"attn_mask": torch.randn(6, 6, generator=generator, dtype=torch.float64)},
        "scale": {"scale": 1.7},
        "grouped": {"is_causal": True, "enable_gqa": True},
    }
    chosen = options.get(case, {})
    identity = torch.eye(6, dtype=torch.float64).expand(2, key.shape[1], 6, 6)
    expected = F.scaled_dot_product_attention(query, key, identity, **chosen)
    torch.testing.assert_close(_pattern(query, key, identity, **chosen), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_hugging_face_patterns_and_stream(kind: str) -> None:
    model = hugging_face(kind)
    before = model.config._attn_implementation
    patterns = attention_patterns(model, tokens())
    stream = residual_stream(model, tokens())
    assert model.config._attn_implementation == before
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(tokens(), output_attentions=True, output_hidden_states=True)
    assert len(patterns) == len(expected.attentions) == 3
    for mine, theirs in zip(patterns, expected.attentions, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
        assert float((mine - theirs.mean()).abs().max()) > 0.3, "patterns too even to tell"
    assert len(stream) == len(expected.hidden_states) == 4
    for mine, theirs in zip(stream[:-1], expected.hidden_states[:-1], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    norm = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}.get(kind, "model.norm")
    with torch.no_grad():  # Hugging Face reports the last state after the final norm
        torch.testing.assert_close(
            model.get_submodule(norm)(stream[-1]), expected.hidden_states[-1], atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(logits(model, tokens()), expected.logits, atol=1e-4, rtol=1e-4)


def test_grouped_queries_seen_through_sdpa() -> None:
    """A wrapper without a config stays on sdpa: patterns are worked out from arguments, grouped heads included."""
    model = hugging_face("llama")
    wrapped = nn.ModuleDict({"inner": model})
    wrapped.forward = lambda batch: model(batch).logits
    assert model.config._attn_implementation == "sdpa"
    for mine, eager in zip(attention_patterns(wrapped, tokens()), attention_patterns(model, tokens()), strict=True):
        torch.testing.assert_close(mine, eager, atol=1e-6, rtol=1e-5)


def test_bfloat16_patterns_are_float32() -> None:
    pattern = attention_patterns(Small("sdpa").to(torch.bfloat16), tokens())[0]
    assert pattern.dtype == torch.float32
    torch.testing.assert_close(pattern.sum(-1), torch.ones(BATCH, 2, LENGTH), atol=1e-5, rtol=0)


@pytest.mark.parametrize("part", ["model", "block", "in place"])
def test_compiled_models_are_captured(part: str) -> None:
    model, plain = Small("sdpa", "sdpa"), Small("sdpa", "sdpa")
    target: nn.Module = model
    if part == "model":
        target = torch.compile(model, backend="eager")  # type: ignore[assignment]
    elif part == "block":
        model.blocks[0] = torch.compile(model.blocks[0], backend="eager")  # type: ignore[assignment]
    else:
        model.compile(backend="eager")
    with torch.no_grad():
        target(tokens())  # compiled before any hook is there
    for mine, theirs in zip(attention_patterns(target, tokens()), attention_patterns(plain, tokens()), strict=True):
        torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(residual_stream(target, tokens()), residual_stream(plain, tokens()), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.compiler.reset()


def test_no_pattern_is_an_error_that_names_instrument_and_model() -> None:
    with pytest.raises(
        InstrumentError, match=r"Induction needs attention patterns; Small shows none.*use F\.scaled"
    ) as e:
        attention_patterns(Small("hidden"), tokens(), "Induction")
    assert "\n" not in str(e.value)


def test_a_softmax_over_something_else_is_no_pattern() -> None:
    class Experts(Small):
        def forward(self, batch: Tensor) -> Tensor:
            state = super().forward(batch)
            torch.softmax(torch.zeros(BATCH, 2, LENGTH, LENGTH), dim=1)  # over heads
            torch.softmax(torch.zeros(BATCH, 2, LENGTH, LENGTH + 1), dim=-1)  # another length
            return state.softmax(-1)  # (batch, pos, vocab)

    assert len(attention_patterns(Experts("sdpa", "F.softmax"), tokens())) == 2


class Written(nn.Module):
    """Attention that is written out over (batch · head, pos, pos), `heads` of them, with a column for a sink."""

    def __init__(self, heads: int, sink: bool, causal: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.maps, self.heads = nn.Embedding(VOCAB, 8), nn.Linear(8, 24), heads
        self.sink, self.causal = nn.Parameter(torch.ones(heads)) if sink else None, causal
        self.blocks = nn.ModuleList([nn.Identity()])
        self.seen: Tensor

    def forward(self, batch: Tensor) -> Tensor:
        size = 8 // self.heads
        q, k, v = (
            part.unflatten(-1, (self.heads, size)).transpose(1, 2).flatten(0, 1)
            for part in self.maps(self.embed(batch)).chunk(3, -1)
        )
        scores = 3 * q @ k.transpose(1, 2)
        if self.causal:
            scores = scores + torch.full(scores.shape[1:], -torch.inf).triu(1)
        if self.sink is not None:
            column = self.sink.repeat(len(batch))[:, None, None].expand(-1, batch.shape[1], 1)
            scores = torch.cat([scores, column], -1)
        self.seen = scores.softmax(-1)[..., : batch.shape[1]]
        state = (self.seen @ v).unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)
        return self.blocks[0](state)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("sink", [False, True])
def test_patterns_of_three_dimensions_and_of_attention_with_a_sink(heads: int, sink: bool) -> None:
    model = Written(heads, sink)
    [pattern] = attention_patterns(model, tokens())
    torch.testing.assert_close(pattern, model.seen.detach().unflatten(0, (BATCH, heads)))
    assert bool((pattern.sum(-1) < 0.999).all()) == sink

    # What is put in its place is what is read, and what the sink gets stays.
    even = torch.full((BATCH, heads, LENGTH, LENGTH), 0.25)
    with Patterns.of(model, lambda seen: even.reshape(seen.shape)):
        model(tokens())
    torch.testing.assert_close(model.seen, even.flatten(0, 1))


def test_a_square_softmax_that_sees_ahead_is_no_pattern_without_a_dimension_of_heads() -> None:
    with pytest.raises(InstrumentError, match="shows none"):
        attention_patterns(Written(2, sink=False, causal=False), tokens())


def test_layers_of_unequal_heads_are_filled_with_nan() -> None:
    stacked = stack_heads([np.array([1.0, 2.0]), np.array([3.0])])
    np.testing.assert_array_equal(stacked, [[1.0, 2.0], [3.0, np.nan]])
