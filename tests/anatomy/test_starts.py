"""Passes that start at a layer: the same numbers as whole passes, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from devmon.anatomy import Anatomy, Layout
from devmon.anatomy.patching import Starts, run_patched
from devmon.instruments.head_ablation import HeadAblation
from devmon.instruments.layers import LayerRoles
from devmon.snapshot import Snapshot
from tests.anatomy.families import family

TOKENS = torch.randint(20, (6, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_a_patch_above_gives_the_same_bits_and_no_layer_below_runs(name: str) -> None:
    anatomy = Anatomy(family(name))
    starts = Starts(anatomy, TOKENS)
    assert starts.works
    _, own = anatomy.run(TOKENS, ["resid_pre", "z"])
    layer, ran = anatomy.layers - 1, []
    patch = (("z", layer), (slice(None), slice(None), 1), own["z", layer].roll(1, 0))
    whole, whole_reads = run_patched(anatomy, TOKENS, [patch], [("resid_post", layer)], last=True)
    out = anatomy.module(0, "out")
    handle = out.register_forward_hook(lambda *_: ran.append(0))
    with starts.at(layer, own["resid_pre", layer]):
        found, reads = run_patched(anatomy, TOKENS, [patch], [("resid_post", layer)], last=True)
    assert not ran
    assert torch.equal(found[:, -1], whole[:, -1])
    assert torch.equal(reads["resid_post", layer], whole_reads["resid_post", layer])
    # what stood in for the layers is gone
    anatomy.run(TOKENS)
    handle.remove()
    assert ran
    assert all("forward" not in vars(block) for block in anatomy.blocks)


class Keeps(nn.Module):
    """Two blocks, of which the second adds what the first kept of its last pass, not what it returned."""

    anatomy = Layout(blocks="blocks", query="q", key="k", value="v", out="o", heads=2, embed="embed", unembed="unembed")

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.unembed = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.keeps = keeps

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks[0](self.embed(tokens))
        x = self.blocks[1](x)
        return self.unembed(x + self.blocks[0].kept if self.keeps else x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        self.kept = self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.kept


def test_a_model_whose_layers_keep_what_later_ones_read_is_run_whole() -> None:
    layout = Layout(blocks="blocks", query="q", key="k", value="v", out="o", heads=2, embed="embed", direct=False)
    assert Starts(Anatomy(Keeps(False)), TOKENS).works
    assert not Starts(Anatomy(Keeps(True), layout), TOKENS).works


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize(
    "instrument",
    [
        LayerRoles(TOKENS, places=24, permutations=1),
        HeadAblation(20, 6, 9, heads=((1, 0),), groups=2, how="mean", tokens=TOKENS),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_an_instrument_finds_is_the_same_where_no_pass_may_start_at_a_layer(
    name: str, instrument: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = instrument(Snapshot(0, family(name)))
    monkeypatch.setattr(Starts, "_try", lambda self, tokens: False)
    assert found.equals(instrument(Snapshot(0, family(name))))
