"""The residual stream of any chain of blocks, and how the blocks are found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from devmon.anatomy import find_blocks, residual_stream
from devmon.errors import InstrumentError
from devmon.testing import Bigram
from tests.support.attention_models import VOCAB, Small, tokens


def test_stream_is_the_running_sum_even_where_blocks_write_in_place() -> None:
    def plain(model: Small) -> list[Tensor]:
        state = [model.embed(tokens())]
        for block in model.blocks:
            state.append(block(state[-1]))
        return [s.detach() for s in state]

    class Chain(Small):
        def forward(self, batch: Tensor) -> Tensor:
            state = self.embed(batch)
            for block in self.blocks:
                state = block(state)
                if self.inplace:
                    state.mul_(1.0).add_(0.0)
            after = state.clone()
            state.zero_()
            return self.unembed(after)

    for inplace in (False, True):
        model = Chain("sdpa", "F.softmax", inplace=inplace)
        for mine, theirs in zip(residual_stream(model, tokens()), plain(model), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_stream_hooks_are_removed_even_after_an_error() -> None:
    model = Small("sdpa", "sdpa")

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    residual_stream(model, tokens())
    assert hooks() == 0
    with pytest.raises(InstrumentError, match="cannot look up tokens"):
        residual_stream(model, tokens() + VOCAB)
    with pytest.raises(InstrumentError, match="cannot look up tokens"):
        residual_stream(model, tokens() + VOCAB, blocks="blocks")
    assert hooks() == 0


def test_blocks_are_the_largest_chain_of_equal_width() -> None:
    class Decoys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCAB, 8)
            self.small = nn.ModuleList([nn.Linear(8, 8)])
            self.h = nn.ModuleList([nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(2)])
            self.head = nn.Sequential(nn.Linear(8, 999), nn.Linear(999, VOCAB))
            self.unused = nn.ModuleList([nn.Linear(500, 500)])

        def forward(self, batch: Tensor) -> Tensor:
            state = self.small[0](self.embed(batch))
            for block in self.h:
                state = block(state)
            return self.head(state)

    model = Decoys()
    assert find_blocks(model, tokens()) == "h"
    assert len(residual_stream(model, tokens())) == 3
    assert len(residual_stream(model, tokens(), blocks="small")) == 2
    with pytest.raises(InstrumentError, match=r"has no module 'layers'.*blocks"):
        residual_stream(model, tokens(), blocks="layers")
    with pytest.raises(InstrumentError, match=r"'embed' of Decoys holds no modules"):
        residual_stream(model, tokens(), blocks="embed")
    with pytest.raises(InstrumentError, match=r"'unused' of Decoys ran \[0\] times"):
        residual_stream(model, tokens(), blocks="unused")
    with pytest.raises(InstrumentError, match=r"'head' of Decoys ran \[1, 1\] times"):
        residual_stream(model, tokens(), blocks="head")
    with pytest.raises(InstrumentError, match=r"Probe needs the residual stream; Bigram has no .*set blocks="):
        residual_stream(Bigram(torch.full((VOCAB, VOCAB), 1 / VOCAB)), tokens(), who="Probe")
