"""Components: what their masks hold, and traces that are those of one LLC each, on every family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from devmon.anatomy import Layout
from devmon.errors import InstrumentError
from devmon.sampling import Settings, next_token_loss, regression_loss, sample
from devmon.sampling.components.chains import Sweep, sweep
from devmon.sampling.components.masks import Component, components_of
from devmon.sampling.components.passes import AT_ONCE
from devmon.sampling.data import as_examples
from devmon.sampling.masks import as_mask
from tests.anatomy.test_anatomy_sites import CONFIGS, VISION, VOCAB, family

DATA = torch.randint(3, VOCAB, (12, 9), generator=torch.Generator().manual_seed(0))
SMALL = Settings(lr=1e-6, gamma=10.0, nbeta=30.0, chains=2, draws=3, burn_in=1, batch_size=3, steps_per_draw=2)


def parts(model: nn.Module, components: Any = ("heads", "mlps", "layers"), **options: Any) -> list[Component]:
    return components_of(model, components, as_examples(DATA), **options)[0]


def swept(model: nn.Module, components: Any, settings: Settings = SMALL, data: Any = DATA, loss: Any = next_token_loss,
          **options: Any) -> tuple[list[Component], Sweep]:  # fmt: skip
    examples = as_examples(data)
    found, blocks = components_of(model, components, examples)
    return found, sweep(model, loss, examples, found, blocks, settings, **options)


def assert_as_alone(model: nn.Module, found: list[Component], together: Sweep, settings: Settings = SMALL,
                    data: Any = DATA, loss: Any = next_token_loss, **options: Any) -> None:  # fmt: skip
    """Each component's traces are those of a run with its mask, to the rounding of float32."""
    for i, component in enumerate(found):
        alone = sample(model, loss, data, replace(settings, mask=component.mask), **options)
        np.testing.assert_allclose(together.baseline, alone["baseline"], rtol=1e-6)
        expected = {name: alone[name].values for name in ("distance", "slope", "linear") if name in alone}
        expected["excess"] = (alone["loss"] - alone["baseline"]).values
        for name, values in expected.items():
            scale = np.abs(values).max()
            assert scale > 0
            np.testing.assert_allclose(
                getattr(together, name)[i], values, rtol=0, atol=1e-3 * scale, err_msg=f"{component.name} {name}"
            )


# -- the same numbers as one at a time -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in VISION])
def test_every_family_in_one_sweep_is_each_component_alone(name: str) -> None:
    model = family(name)
    found, together = swept(model, ("heads", "mlps", "layers"))
    alone = [c.name for c, s in zip(found, together.shared, strict=True) if not s]
    routed = name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")  # a router that moves sends rows elsewhere
    assert not alone or (routed and all("layer" in name for name in alone)), alone
    some = [1, 4, 11, len(found) - 1]  # a head, an MLP, a layer, a random mask
    picked = Sweep(
        together.baseline, *(getattr(together, f)[some] for f in ("excess", "distance", "slope", "linear")), []
    )
    assert_as_alone(model, [found[i] for i in some], picked)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt_neox", {"control_variate": True}),
        ("gpt2", {"control_variate": True, "shared_batches": True}),
        ("llama", {"sampler": "baoab", "prior": 3.0}),
        ("gpt_neox", {"sampler": "preconditioned", "replacement": True}),
        ("gpt2", {"sampler": "sgnht", "control_variate": True}),
    ],
    ids=str,
)
def test_every_setting_in_one_sweep_is_each_component_alone(name: str, options: dict[str, Any]) -> None:
    model, settings = family(name), replace(SMALL, float64=True, **options)
    found, together = swept(model, ("heads", "mlps"), settings, seed=7)
    assert all(together.shared)
    some = [1, 9]
    picked = Sweep(
        together.baseline, *(getattr(together, f)[some] for f in ("excess", "distance", "slope", "linear")), []
    )
    assert_as_alone(model, [found[i] for i in some], picked, settings, seed=7)


def test_how_many_pass_at_once_and_which_chains_run_moves_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = family("gpt2"), replace(SMALL, float64=True, control_variate=True, chains=3, draws=2)
    masks = ("mlps", "layers")
    _, whole = swept(model, masks, settings)
    monkeypatch.setitem(AT_ONCE, "cpu", 1)  # one variant of three rows
    monkeypatch.setattr("devmon.sampling.components.chains.HELD", 1)
    _, one = swept(model, masks, settings)
    _, last = swept(model, masks, settings, chains=[2])
    for name in ("excess", "distance", "slope", "linear"):
        np.testing.assert_allclose(getattr(one, name), getattr(whole, name), rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(getattr(last, name)[:, 0], getattr(whole, name)[:, 2], rtol=1e-6, atol=1e-12)


# -- models that anatomy does not know -------------------------------------------------------------------------------


class Own(nn.Module):
    """Blocks in a list, with a bare parameter, a norm and a scale of their own, and a tied map at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.blocks = nn.ModuleList([OwnBlock() for _ in range(3)])
        self.out = nn.Linear(8, VOCAB, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class OwnBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.scale = nn.Parameter(torch.ones(8))
        self.mix = nn.Parameter(torch.randn(9, 9).tril() / 9)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(torch.tanh(self.up(self.norm(self.mix @ x))))


class Crossed(nn.Module):
    """A model whose second map sees the batch in another order: variants cannot lie side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)).flip(0)).flip(0)


def own() -> Own:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Own().eval()


def test_own_masks_of_an_unknown_model_share_passes_from_their_block_on() -> None:
    model = own()
    entries = torch.zeros(12, 8, dtype=torch.bool)
    entries[:3] = True
    masks = {
        "a block": "blocks.1.*",
        "a part of a map": {"blocks.2.up.weight": entries},
        "a bare parameter": "blocks.2.mix",
        "two blocks": ("blocks.1.down.weight", "blocks.2.down.weight"),
        "both ends": "embed.weight",
    }
    found, together = swept(model, masks)
    assert [(c.start, c.layer) for c in found[:5]] == [(1, 1), (2, 2), (2, 2), (1, -1), (-1, -1)]
    assert together.shared[:4] == [1] * 4
    assert_as_alone(model, found, together)


def test_a_model_that_cannot_be_run_side_by_side_is_run_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(12, 4, generator=generator), torch.randn(12, 2, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Crossed()
    found, together = swept(model, {"first": "first.*", "second": "second.*"}, data=data, loss=regression_loss)
    shared = dict(zip([c.name for c in found], together.shared, strict=True))
    assert shared["first"]  # maps before the order changes see what they should
    assert not shared["second"]
    assert_as_alone(model, found, together, data=data, loss=regression_loss)


def test_frozen_parameters_rest() -> None:
    model = family("gpt2")
    model.transformer.h[0].mlp.c_fc.requires_grad_(False)
    model.transformer.h[1].requires_grad_(False)
    found = {component.name: component for component in parts(model, {"mlp": "transformer.h.0.mlp.*"}, null=False)}
    assert found["mlp"].mask.names == ("transformer.h.0.mlp.c_proj.weight", "transformer.h.0.mlp.c_proj.bias")
    with pytest.raises(InstrumentError, match="frozen"):
        parts(model, ("mlps",))


# -- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "qwen2", "phi"])
def test_heads_mlps_and_layers_are_those_that_devinterp_names(name: str) -> None:
    model = family(name)
    for component in parts(model, null=False):
        try:
            other = as_mask(component.name, model)
        except InstrumentError:  # a family that it does not know
            continue
        assert other is not None
        shapes = [tuple(p.shape) for n, p in model.named_parameters()]
        names = [n for n, _ in model.named_parameters()]
        ours, theirs = (
            torch.cat([
                (m.entries.get(n, torch.ones(s)) if n in m.names else torch.zeros(s)).bool().flatten()
                for n, s in zip(names, shapes, strict=True)
            ])
            for m in (component.mask, other)
        )  # fmt: skip
        assert torch.equal(ours, theirs), component.name


def test_a_head_is_all_that_it_reads_and_writes_with() -> None:
    """Heads that do not meet, and together all weights of attention; a head set to 0 writes nothing."""
    for name in ("gpt2", "gpt_neox", "bloom", "opt"):
        model = family(name)
        heads = [c for c in parts(model, ("heads",), null=False) if c.layer == 0]
        assert len(heads) == 4
        for parameter in heads[0].mask.names:
            times = sum(c.mask.entries[parameter].int() for c in heads)
            assert (times == 1).all(), parameter


def test_random_masks_are_as_large_and_lie_where_they_say() -> None:
    model = family("gpt_neox")
    found = parts(model)
    by_name = {component.name: component for component in found}
    for component in found:
        if not component.null:
            continue
        null = by_name[component.null]
        assert null.size == component.size
        if "head" in component.name:
            assert set(null.mask.names) == set(component.mask.names)
            for name, entries in component.mask.entries.items():
                assert null.mask.entries[name].sum() == entries.sum()
                assert not torch.equal(null.mask.entries[name], entries)
    assert len({c.null for c in found if " head " in c.name}) == 2  # one a layer serves its heads
    assert by_name["layer 0"].null == by_name["layer 1"].null != ""
    again, other = parts(model), parts(model, seed=1)
    for a, b, c in zip(found, again, other, strict=True):
        assert all(torch.equal(a.mask.entries[n], b.mask.entries[n]) for n in a.mask.entries)
        assert not a.name.partition(" ")[2].startswith("random") or any(
            n not in c.mask.entries or not torch.equal(a.mask.entries[n], c.mask.entries[n]) for n in a.mask.entries
        )


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(InstrumentError, match="heads"):
        parts(family("gpt2"), ("attention",))
    with pytest.raises(InstrumentError, match="give components as masks"):
        parts(own())
    with pytest.raises(InstrumentError, match="selects no parameter"):
        parts(own(), {"wrong": "layers.*"})
    with pytest.raises(InstrumentError, match="does not have"):
        parts(own(), {"a": "blocks.0.*"}, layout=Layout(blocks="layers", out="o"))
