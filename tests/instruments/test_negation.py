"""Negation: exact sums, readers that are known, a model that is the language, and the made-up language itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

from devmon.anatomy import Anatomy, Layout
from devmon.data.negation import NegationLanguage, NegationPrompts
from devmon.errors import DataError
from devmon.instruments.negation import Negation
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract

LANGUAGE = NegationLanguage()
PROMPTS = LANGUAGE.prompts(24, torch.Generator().manual_seed(0))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads, self.norm = 2, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 8), nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(z.transpose(1, 2).flatten(2))
        return x + self.down(torch.tanh(self.up(self.mlp_norm(x))))


class Small(nn.Module):
    anatomy = Layout(
        blocks="blocks",
        qkv="qkv",
        out="out",
        heads="heads",
        attention_norm="norm",
        mlp_norm="mlp_norm",
        neurons="down",
        embed="embed",
        norm="norm",
        unembed="unembed",
    )

    def __init__(self, layers: int = 2, seed: int = 0, width: int = 16) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(LANGUAGE.vocab_size, width), nn.Embedding(9, width)
        self.blocks = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm, self.unembed = nn.LayerNorm(width), nn.Linear(width, LANGUAGE.vocab_size, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4, generator=generator)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.norm(x))


def measure(model: nn.Module, prompts: NegationPrompts = PROMPTS, **settings: Any) -> xr.Dataset:
    return Negation(prompts, **settings)(Snapshot(0, model.eval()))


def ahead(scores: Tensor, prompts: NegationPrompts = PROMPTS) -> Tensor:
    """LD at the last place, by loops."""
    found = []
    for item, row in enumerate(scores[:, 7]):
        n, p = (
            row[[a for a in each[item].tolist() if a >= 0]].mean() for each in (prompts.complement, prompts.members)
        )
        found.append(n - p)
    return torch.stack(found)


def test_construction_and_suppression_are_the_sensitivity_of_the_lens_at_each_depth() -> None:
    model = Small()
    found = measure(model)
    with torch.no_grad():
        own, twin = (ahead(model(tokens)) for tokens in (PROMPTS.negated, PROMPTS.plain))
        np.testing.assert_allclose(found["sensitivity"], (own - twin).mean(), rtol=1e-9)
        np.testing.assert_allclose(found["accuracy_negated"], (own > 0).double().mean())
        np.testing.assert_allclose(found["accuracy_plain"], (twin < 0).double().mean())
        np.testing.assert_allclose(found["sensitive"], (own > twin).double().mean())
        # the stream itself, without the layers from the depth on
        for depth in range(3):
            part = Small()
            part.blocks = part.blocks[:depth]
            each = ahead(part(PROMPTS.negated)) - ahead(part(PROMPTS.plain))
            total = found["construction"][depth] + found["suppression"][depth]
            np.testing.assert_allclose(total, each.mean(), rtol=1e-9, atol=1e-12)
        other = [model(tokens)[:, 7].roll(12, 0) for tokens in (PROMPTS.negated, PROMPTS.plain)]
        moved = ahead(other[0][:, None].expand(-1, 8, -1)) - ahead(other[1][:, None].expand(-1, 8, -1))
    np.testing.assert_allclose(found["sensitivity_permuted"], moved.mean(), rtol=1e-9)
    np.testing.assert_allclose(found["construction"][0], 0, atol=1e-12)  # the last token is the same


def test_kept_from_all_later_places_the_negation_does_nothing() -> None:
    part = Negation(PROMPTS)._part(Anatomy(Small(3).eval()), slice(3, 20))
    last = [part[name][:, -1] for name in ("negated", "plain")]
    assert np.abs((last[0] - last[1]) @ [1, -1, 0]).max() > 0.01
    for name in ("blocked", "resampled"):
        np.testing.assert_allclose(part[name][:, 2], 0, atol=1e-14)
        assert np.abs(part[name][:, :2]).max() > 0.005


def trained(steps: int = 250) -> Small:
    torch.manual_seed(0)
    model = Small(1, width=32).float()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    language = NegationLanguage(share=0.5)
    for step in range(steps):
        rows = language.draw(64, torch.Generator().manual_seed(step))
        F.cross_entropy(model(rows[:, :-1])[:, -1], rows[:, -1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_in_one_layer_only_the_last_place_can_read_it() -> None:
    """What the place of the class reads comes too late for the only attention there is."""
    found = measure(trained())
    assert float(found["sensitivity"]) > 3 * float(found["sensitivity_se"])
    assert abs(float(found["sensitivity_permuted"])) < 0.7 * float(found["sensitivity"])
    lost, left = found["lost"], found["blocked"]
    np.testing.assert_allclose(lost.sel(query=["last", "later"]), 1, atol=1e-5)
    np.testing.assert_allclose(lost.sel(query="named"), 0, atol=1e-5)
    np.testing.assert_allclose(left.sel(query=["last", "later"]), 0, atol=1e-5)
    np.testing.assert_allclose(left.sel(query="named"), found["sensitivity"], rtol=1e-5)


def test_reading_by_the_class_reaches_the_last_place_in_two_layers() -> None:
    """Key and value of one place, put in by hand for one query, layer by layer, in float64."""
    model = Small(2)
    negated, plain = PROMPTS.negated, PROMPTS.plain
    with torch.no_grad():
        place = torch.arange(8)
        position = model.position(place)
        streams = {name: model.embed(t) + position for name, t in (("own", negated), ("twin", plain))}
        mixed = streams["own"].clone()
        for block in model.blocks:
            parts = block.qkv(block.norm(mixed)).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in parts)
            other = block.qkv(block.norm(streams["twin"])).chunk(3, -1)
            k2, v2 = (t.unflatten(-1, (2, -1)).transpose(1, 2).clone() for t in other[1:])
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            k, v = k.clone(), v.clone()
            k[:, :, 2], v[:, :, 2] = k2[:, :, 2], v2[:, :, 2]
            z[:, :, 6] = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, 6]
            mixed = mixed + block.out(z.transpose(1, 2).flatten(2))
            mixed = mixed + block.down(torch.tanh(block.up(block.mlp_norm(mixed))))
            streams["twin"] = block(streams["twin"])
        left = ahead(model.unembed(model.norm(mixed))) - ahead(model(plain))
        whole = ahead(model(negated)) - ahead(model(plain))
    part = Negation(PROMPTS)._part(Anatomy(model.eval()), slice(0, len(negated)))
    np.testing.assert_allclose(part["resampled"][:, 1], left, rtol=1e-9)
    assert float((left - whole).abs().max()) > 1e-3


def test_a_language_with_its_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = LANGUAGE.draw(20_000, generator)
    marks = LANGUAGE.vocab_size - 4
    assert LANGUAGE.vocab_size == 54
    no = rows[:, 2] == marks + 2
    assert abs(float(no.double().mean()) - 0.15) < 0.01
    named, answer = rows[:, 6] - 32, rows[:, 8] // 4
    assert bool(((named == answer) == ~no).all())
    assert bool((named // 4 == answer // 4).all())
    assert bool((rows[:, 1] - 40 == named // 4).all())
    for which, size in ((no, 12), (~no, 4)):  # uniform on the answers of one class
        counts = np.bincount(rows[which & (named == 0), 8].numpy())
        counts = counts[counts > 0]
        assert len(counts) == size
        entropy = -(counts / counts.sum() @ np.log(counts / counts.sum()))
        np.testing.assert_allclose(entropy, math.log(size), atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plain": PROMPTS.negated}, "differ at one place"),
        ({"negation": PROMPTS.negation + 1}, "the place at which the two prompts differ"),
        ({"named": PROMPTS.negation}, "the negation before the place of the class"),
        ({"other": torch.full((24, 2), -1)}, "an answer at least"),
        ({"last": PROMPTS.last[:-1]}, "as many of all parts"),
    ],
)
def test_refusals(change: dict[str, Tensor], message: str) -> None:
    fields = {name: getattr(PROMPTS, name) for name in NegationPrompts.__dataclass_fields__}
    with pytest.raises(DataError, match=f"NegationPrompts needs .*{message}"):
        NegationPrompts(**(fields | change))


class TestNegation(InstrumentContract):
    def instrument(self) -> Negation:
        return Negation(PROMPTS)

    def model(self, seed: int) -> nn.Module:
        return Small(2, seed).float()
