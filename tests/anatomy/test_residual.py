"""The residual stream of any chain of blocks, and how the blocks are found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from devmon.anatomy import find_blocks, residual_stream
from devmon.errors import InstrumentError
from devmon.instruments import Sketch
from devmon.presets import vision
from devmon.snapshot import Snapshot
from devmon.testing import Bigram
from devmon.testing.contract import headlines
from tests.anatomy.families import family, inputs
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


@pytest.mark.parametrize(
    "name, paths, widths",
    [
        ("resnet", "encoder.stages", [16, 16, 32, 64]),
        ("resnet, narrow", "encoder.stages", [4, 4, 4, 8]),
        ("convnext", "encoder.stages", [8, 8, 16, 32]),
        ("swin", "encoder.layers", [16, 32, 32]),
        ("vit", "layers", [32, 32, 32]),
    ],
)
def test_all_stages_of_images_are_read(name: str, paths: str, widths: list[int]) -> None:
    model, given = family(name), inputs(name)
    assert find_blocks(model, given) == paths
    assert [state.shape[-1] for state in residual_stream(model, given)] == widths


def test_stages_of_several_lists_are_read_as_they_run() -> None:
    pyramid = family("pvt")
    widths = [state.shape[-1] for state in residual_stream(pyramid, inputs("pvt"))]
    assert widths == sorted(widths)
    assert set(widths) == {3, 8, 16, 24, 32}

    class Named(nn.Module):
        """Stages under names of their own, as in torchvision."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
            self.layer2, self.layer1 = (nn.Sequential(self.block(a, b), self.block(b, b)) for a, b in ((6, 8), (4, 6)))
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 49, 5))

        def block(self, width: int, to: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(width, to, 3, padding=1), nn.ReLU())

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.layer2(self.layer1(self.stem(images))))

    images = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    model = Named()
    assert find_blocks(model, images) == "layer2, layer1"
    stream = residual_stream(model, images)
    assert [state.shape[-1] for state in stream] == [4, 6, 6, 8, 8]
    torch.testing.assert_close(stream[0], model.stem(images).flatten(2).mT)
    assert [state.shape[-1] for state in residual_stream(model, images, "layer1")] == [4, 6, 6]


@pytest.mark.parametrize("name", ["resnet", "resnet, narrow", "convnext", "pvt", "swin", "beit"])
def test_the_vision_preset_runs_on_all_stages(name: str) -> None:
    images = torch.cat([inputs(name, seed) for seed in range(12)])
    model = family(name)
    depth = len(residual_stream(model, images[:1]))
    for watch in vision(images, torch.arange(len(images)) % 2, last=10):
        found = watch.instrument(Snapshot(0, model))
        assert all(np.isfinite(found[key].values).all() for key in headlines(found)), watch.name
        assert watch.name == "weights" or found.sizes["layer"] == depth


def test_sketches_of_stages_keep_inner_products_on_average() -> None:
    """Stages of other widths than the widest: in all of their directions exactly, in fewer on average."""
    images = torch.cat([inputs("resnet", seed) for seed in range(12)])
    model = family("resnet")
    states = [state.mean(1).double() for state in residual_stream(model, images)]
    whole = Sketch(images, dims=128)(Snapshot(0, model))["sketch"].values
    for state, kept in zip(states, whole, strict=True):
        np.testing.assert_allclose(kept @ kept.T, state @ state.T, rtol=1e-4, atol=1e-5)
    few = Sketch(images, dims=48)(Snapshot(0, model))["sketch"].values.astype(np.float64)  # 24 a half, of 16 to 64
    for state, kept in zip(states, few, strict=True):
        exact = (state @ state.T).numpy()
        for half in (kept[:, :24], kept[:, 24:]):
            loss = np.linalg.norm(half @ half.T - exact) / np.linalg.norm(exact)
            assert loss < (1e-6 if state.shape[1] <= 24 else 0.8)
