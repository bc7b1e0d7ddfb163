"""`layer` is the index of the block, whatever stands between the blocks that attend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from devmon.anatomy import attention_patterns, layer_patterns
from devmon.errors import InstrumentError
from devmon.instruments import InductionHeads, PreviousTokenHeads
from devmon.snapshot import Snapshot
from tests.anatomy.families import HEADS, VOCAB, family, inputs
from tests.support.attention_models import Attention

TOKENS = torch.randint(VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))


class Mix(nn.Module):
    """A block that moves along the positions and does not attend."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.mT)[..., :-2].mT


class Stack(nn.Module):
    def __init__(self, kinds: str, wrap: Any = nn.ModuleList) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.blocks = wrap([Mix() if kind == "c" else Attention("sdpa") for kind in kinds])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize(
    "kinds, layers", [("ccaa", [2, 3]), ("aa", [0, 1]), ("cac", [1]), ("acca", [0, 3]), ("a", [0]), ("cca", [2])]
)
def test_blocks_that_do_not_attend_count(kinds: str, layers: list[int]) -> None:
    model = Stack(kinds)
    patterns = layer_patterns(model, TOKENS)
    assert list(patterns) == layers
    assert all(
        torch.equal(one, each) for one, each in zip(attention_patterns(model, TOKENS), patterns.values(), strict=True)
    )
    found = PreviousTokenHeads(tokens=TOKENS)(Snapshot(0, model))
    assert found["layer"].values.tolist() == layers
    assert InductionHeads(VOCAB, 4, 16)(Snapshot(0, model))["layer"].values.tolist() == layers
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "name, layers",
    [
        ("qwen3_next", [3]),
        ("recurrent_gemma", [2]),
        ("jamba", [2]),
        ("minimax", [1, 3]),
        ("diffllama", [0, 1]),
        ("llama", [0, 1]),
        ("albert", [0, 1]),
        ("llava", [0, 1]),
    ],
)
def test_families_of_mixed_layers(name: str, layers: list[int]) -> None:
    model = family(name)
    patterns = layer_patterns(model, inputs(name))
    assert list(patterns) == layers
    assert all(pattern.shape == (2, HEADS, 9, 9) for pattern in patterns.values())
    if name == "jamba":
        kinds = [type(layer).__name__ for layer in model.model.layers]
        assert [i for i, kind in enumerate(kinds) if "Attention" in kind] == layers


class Head(nn.Module):
    """One head of a block of heads in a list, with its own maps and no dimension of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(8, 4, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).mT / 2
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(-1) @ self.value(x)


class Heads(nn.Module):
    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.heads, self.proj, self.in_place = nn.ModuleList([Head() for _ in range(3)]), nn.Linear(12, 8), in_place

    def forward(self, x: Tensor) -> Tensor:
        added = self.proj(torch.cat([head(x) for head in self.heads], -1))
        return x.add_(added) if self.in_place else x + added


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("even", [False, True])
def test_heads_in_a_list_are_of_one_layer(layers: int, in_place: bool, even: bool) -> None:
    model = Stack("a" * layers)
    model.blocks = nn.ModuleList([Heads(in_place) for _ in range(layers)])
    if even:  # all heads alike, as at an initialisation of zeros
        for block in model.blocks:
            for head in block.heads:
                nn.init.zeros_(head.query.weight)
    patterns = layer_patterns(model, TOKENS)
    assert {layer: pattern.shape for layer, pattern in patterns.items()} == dict.fromkeys(range(layers), (3, 3, 12, 12))
    if not in_place:
        first = model.blocks[0].heads[1]
        state = model.embed(TOKENS)
        scores = first.query(state) @ first.key(state).mT / 2
        scores = scores.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf)
        torch.testing.assert_close(patterns[0][:, 1], scores.softmax(-1).detach())


def test_one_block_of_heads_without_a_list_of_blocks() -> None:
    patterns = layer_patterns(nn.Sequential(nn.Embedding(VOCAB, 8), Heads()), TOKENS)
    assert [tuple(pattern.shape) for pattern in patterns.values()] == [(3, 3, 12, 12)]
    bare = Heads()
    bare.forward = lambda tokens: Heads.forward(bare, F.one_hot(tokens % 8, 8).float())  # type: ignore[method-assign]
    assert [tuple(pattern.shape) for pattern in layer_patterns(bare, TOKENS).values()] == [(3, 3, 12, 12)]


def test_blocks_that_do_nothing_are_no_heads() -> None:
    model = Stack("aaa")
    model.blocks.insert(1, nn.Identity())
    assert list(layer_patterns(model, TOKENS)) == [0, 2, 3]


def test_lists_in_lists_and_models_without_any() -> None:
    inner = Stack("ca")
    nested = nn.Sequential(inner.embed, nn.Sequential(*inner.blocks), nn.Sequential(Attention("F.softmax"), Mix()))
    assert list(layer_patterns(nested, TOKENS)) == [1, 2]  # the outer list alone holds both

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.one, self.two = nn.Embedding(VOCAB, 8), Attention("sdpa"), Attention("sdpa")

        def forward(self, tokens: Tensor) -> Tensor:
            return self.two(self.one(self.embed(tokens)))

    assert list(layer_patterns(Named(), TOKENS)) == [0, 1]


@pytest.mark.parametrize("name", ["bart", "mbart", "marian", "t5", "whisper"])
def test_encoder_decoders_are_refused_by_name(name: str) -> None:
    model = family(name)
    with pytest.raises(InstrumentError, match=r"PreviousTokenHeads: .* is an encoder–decoder.*decoder'"):
        PreviousTokenHeads(tokens=TOKENS)(Snapshot(0, model))


def test_one_stack_of_an_encoder_decoder_is_measured() -> None:
    model = family("bart")
    assert list(layer_patterns(model.model.encoder, TOKENS)) == [0, 1]
    assert list(layer_patterns(model.model.decoder, TOKENS)) == [0, 1]


def test_ones_own_encoder_decoder_is_refused() -> None:
    class Crossed(Attention):
        def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
            y = super().forward(x)
            return y + F.scaled_dot_product_attention(*(t[:, None] for t in (y, memory, memory)))[:, 0]

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCAB, 8)
            self.encoder = nn.ModuleList([Attention("sdpa"), Attention("sdpa")])
            self.decoder = nn.ModuleList([Crossed("sdpa"), Crossed("sdpa")])

        def forward(self, tokens: Tensor) -> Tensor:
            x = memory = self.embed(tokens)
            for block in self.encoder:
                memory = block(memory)
            for block in self.decoder:
                x = block(x, memory)
            return x

    with pytest.raises(InstrumentError, match=r"several stacks \(decoder, encoder\).*encoder–decoder"):
        layer_patterns(Own(), TOKENS)


def test_a_model_that_needs_more_than_tokens_is_told_in_a_line() -> None:
    with pytest.raises(InstrumentError, match=r"CLIPModel does not run on one tensor \(3, 12\) alone"):
        layer_patterns(family("clip, both towers"), TOKENS)
