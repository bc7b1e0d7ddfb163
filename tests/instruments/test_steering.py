"""Steering: slopes that are known, behind a linear readout and a norm, and a plain implementation of all the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.data import broken_repeats, random_tokens
from devmon.data.prompt_pairs import PromptPairs
from devmon.errors import DataError, InstrumentError
from devmon.features import Dictionary
from devmon.instruments import Steering
from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly, InstrumentContract
from tests.anatomy.test_anatomy_sites import family

VOCAB, D, LENGTH = 30, 24, 9


def unit(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm(dim=-1, keepdim=True)


def linear(seed: int = 0, heads: float = 0.0) -> AttentionOnly:
    """A layer that adds `heads` times random maps of what it attends to, and a linear readout."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    generator = torch.Generator().manual_seed(seed)
    embed, positions, unembed = drawn(VOCAB, D), 0.3 * drawn(LENGTH, D), 0.3 * drawn(D, VOCAB)
    layers = [[(0.1 * heads * drawn(D, D), 0.2 * heads * drawn(D, D)) for _ in range(2)] for _ in range(2)]
    return AttentionOnly(embed, positions, layers, unembed)


class Normed(AttentionOnly):
    """The same with a LayerNorm before the readout."""

    anatomy = replace(AttentionOnly.anatomy, norm="norm")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.norm = nn.LayerNorm(D, elementwise_affine=False, dtype=torch.float64, eps=0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.embed(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            state = block(state)
        return self.unembed(self.norm(state))


PAIRS = broken_repeats(VOCAB, prompts=12, period=4, seed=3)
TEXT = random_tokens(VOCAB, 10, LENGTH - 1, seed=5)
LAST = ("resid_post", 1)


def steer(model: nn.Module, **changed: Any) -> xr.Dataset:
    settings: dict[str, Any] = {"pairs": PAIRS, "tokens": TEXT, "site": LAST, "directions": unit(2, D, seed=1)}
    return Steering(**settings | changed)(Snapshot(0, model))


def readouts(model: AttentionOnly) -> Tensor:
    """w of each prompt, (prompt, d)."""
    return (model.unembed.weight[PAIRS.answer] - model.unembed.weight[PAIRS.foil]).detach()


def test_behind_a_linear_readout_the_slope_is_the_product_and_nothing_bends() -> None:
    model, random = linear(), 60
    found = steer(model, directions=3 * unit(2, D, seed=1), random=random)
    products = readouts(model) @ unit(2, D, seed=1).T  # (prompt, direction)
    for strength in range(3):
        np.testing.assert_allclose(found["slope"][:, strength], products.mean(0), rtol=1e-9)
        np.testing.assert_allclose(found["slope_se"][:, strength], products.std(0) / len(products) ** 0.5, rtol=1e-9)
    np.testing.assert_allclose(found["curvature"], 0, atol=1e-9)
    expected = float(readouts(model).mean(0).norm()) * (2 / (np.pi * D)) ** 0.5
    np.testing.assert_allclose(found["slope_random"], expected, rtol=4 * (np.pi / 2 - 1) ** 0.5 / random**0.5)


def test_the_readout_itself_beats_all_random_directions() -> None:
    model = linear()
    w = readouts(model).mean(0)
    found = steer(model, directions=torch.stack([w, unit(D, seed=9)]), random=40)
    np.testing.assert_allclose(found["slope"][0], float(w.norm()), rtol=1e-9)
    assert float(found["slope_p"][0, 0]) == pytest.approx(1 / 41)
    share = float(((unit(20_000, D, seed=4) @ w).abs() >= (unit(D, seed=9) @ w).abs()).double().mean())
    assert float(found["slope_p"][1, 0]) == pytest.approx(share, abs=0.25)


def test_behind_a_norm_the_slope_is_divided_by_the_deviation_and_falls() -> None:
    """LayerNorm without gain: m(α) = ⟨w, x + αv - mean⟩ / sd(x + αv)."""
    plain = linear(2)
    none = torch.zeros(D, D, dtype=torch.float64)
    layers = [[(none, none)]] * 2
    model = Normed(2 * plain.embed.weight.data, plain.positions.data, layers, plain.unembed.weight.data.T)
    v, strengths = unit(1, D, seed=1), (0.01, 0.5, 16.0)
    found = steer(model, directions=v, strengths=strengths)
    x = (model.embed(PAIRS.clean) + model.positions[: PAIRS.clean.shape[1]])[:, -1].detach()
    w = readouts(model)

    def m(alpha: float) -> Tensor:
        moved = x + alpha * v
        centred = moved - moved.mean(1, keepdim=True)
        return (w * centred).sum(1) / centred.square().mean(1).sqrt()

    text = (model.embed(TEXT) + model.positions[: TEXT.shape[1]])[:, 1:].flatten(0, 1).detach()
    sigma = float((text @ v[0]).std(correction=0))
    assert float(found["sigma"][0]) == pytest.approx(sigma)
    for at, strength in enumerate(strengths):
        alpha = strength * sigma
        slope = (m(alpha) - m(-alpha)).mean() / (2 * alpha)
        bend = (m(alpha) - 2 * m(0.0) + m(-alpha)).mean() / alpha**2
        assert float(found["slope"][0, at]) == pytest.approx(float(slope), rel=1e-9)
        assert float(found["curvature"][0, at]) == pytest.approx(float(bend), rel=1e-6)
        ratio = np.mean([float((x + s * alpha * v)[6:].norm(dim=1).mean() / x[6:].norm(dim=1).mean()) for s in (1, -1)])
        assert float(found["norm_ratio"][0, at]) == pytest.approx(ratio, rel=1e-9)
    assert abs(float(found["slope"][0, 2])) < 0.5 * abs(float(found["slope"][0, 0]))  # 16σ against .01σ
    assert float(found["quantile"][0, 0]) == pytest.approx(0.5, abs=0.1)
    assert float(found["quantile"][0, 2]) == 1.0


def test_all_places_are_steered_and_other_text_moves_as_a_plain_forward_pass_says() -> None:
    model, v = linear(1, heads=1.0), unit(1, D, seed=8)
    found = steer(model, site=("resid_pre", 1), directions=v, strengths=(1.0,))
    alpha = float(found["sigma"][0])

    def run(tokens: Tensor, step: float) -> Tensor:
        state = model.embed(tokens) + model.positions[: tokens.shape[1]]
        return model.unembed(model.blocks[1](model.blocks[0](state) + step * v[0])).detach()

    def m(step: float) -> Tensor:
        last, at = run(PAIRS.clean, step)[:, -1], torch.arange(12)
        return last[at, PAIRS.answer] - last[at, PAIRS.foil]

    slopes = (m(alpha) - m(-alpha)) / (2 * alpha)
    np.testing.assert_allclose(found["slope"][0, 0], slopes.mean(), rtol=1e-9)
    assert abs(float(found["curvature"][0, 0])) > 1e-4  # attention bends
    plain = run(TEXT, 0).log_softmax(-1)
    apart = [(plain.exp() * (plain - run(TEXT, s * alpha).log_softmax(-1))).sum(-1).mean(1) for s in (1, -1)]
    by_sequence = torch.stack(apart).mean(0)
    np.testing.assert_allclose(found["kl"][0, 0], by_sequence.mean(), rtol=1e-8)
    np.testing.assert_allclose(found["kl_se"][0, 0], by_sequence.std() / len(TEXT) ** 0.5, rtol=1e-8)
    assert float(found["kl_random"][0]) > 0


def planted() -> Dictionary:
    """40 latents at biases that make them fire at rates from none to often; rows of any length."""
    rows = unit(40, D, seed=6) * torch.linspace(0.5, 3, 40, dtype=torch.float64)[:, None]
    encoder = rows / rows.norm(dim=1, keepdim=True)
    return Dictionary(encoder.T.contiguous(), -torch.linspace(-1, 5, 40).double(), rows, torch.zeros(D).double())


def test_latents_are_steered_along_their_decoder_against_others_that_fire_as_often() -> None:
    model, coder = linear(), planted()
    found = steer(model, directions=None, dictionary=coder, latents=(7, 3), random=5)
    np.testing.assert_array_equal(found["direction"], [7, 3])
    products = readouts(model) @ (coder.W_dec / coder.W_dec.norm(dim=1, keepdim=True)).T  # (prompt, latent)
    np.testing.assert_allclose(found["slope"][:, 0], products.mean(0)[[7, 3]], rtol=1e-9)
    x = (model.embed(TEXT) + model.positions[: TEXT.shape[1]])[:, 1:].flatten(0, 1).detach()
    rates = (coder.encode(x) > 0).double().mean(0)
    np.testing.assert_allclose(found["firing"], rates[[7, 3]])
    middle = float(rates[[7, 3]].log().mean())
    others = [i for i in range(40) if i not in (7, 3) and rates[i] > 0]
    nearest = sorted(others, key=lambda i: abs(float(rates[i].log()) - middle))[:5]
    np.testing.assert_allclose(found["slope_matched"], products.mean(0)[nearest].abs().mean(), rtol=1e-9)


def test_a_direction_that_no_text_moves_along_has_no_slope() -> None:
    model = linear()
    for table in (model.embed.weight, model.positions):
        table.data[:, 0] = 0.0
    found = steer(model, directions=torch.eye(D, dtype=torch.float64)[:1])
    assert float(found["sigma"][0]) == 0
    assert np.isnan(found["slope"]).all()
    assert np.isnan(found["kl"]).all()
    assert np.isnan(found["slope_p"]).all()


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"directions": None}, "either directions"),
        ({"dictionary": planted(), "latents": (1,)}, "either directions"),
        ({"directions": None, "dictionary": planted(), "latents": (40,)}, "0 to 39"),
        ({"directions": None, "dictionary": planted()}, "needs latents"),
        ({"directions": torch.zeros(1, D)}, "none of length 0"),
        ({"directions": torch.full((1, D), torch.nan)}, "finite floats"),
        ({"directions": torch.ones(D)}, r"\(direction, d\)"),
        ({"strengths": (0.0, 1.0)}, "strengths above 0"),
        ({"random": 1}, "random >= 2"),
        ({"pairs": PromptPairs(PAIRS.clean[:4], PAIRS.corrupt[:4], PAIRS.answer[:4], PAIRS.foil[:4])}, "6 prompts"),
    ],
)
def test_settings_that_make_no_sense(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        steer(linear(), **changed)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"directions": torch.ones(1, D + 1)}, f"is {D} wide, its directions are {D + 1}"),
        ({"site": ("resid_post", 2)}, "layers 0 to 1"),
        ({"site": ("mlp_out", 0)}, "no MLP"),
        ({"site": ("pattern", 0)}, "no vector by place"),
        ({"site": "resid_post"}, "a name and a layer"),
    ],
)
def test_a_site_that_the_model_lacks_or_of_another_width(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(InstrumentError, match=text):
        steer(linear(), **changed)


def test_heads_and_the_input_of_an_mlp() -> None:
    model = family("gpt2")
    pairs, text = broken_repeats(23, 6, 4), random_tokens(23, 4, 8)
    z = Steering(pairs, text, ("z", 0), torch.ones(1, 32), random=2)(Snapshot(0, model))
    assert np.isfinite(z["slope"]).all()
    with pytest.raises(InstrumentError, match="read, not written"):
        Steering(pairs, text, ("mlp_in", 0), torch.ones(1, 32), random=2)(Snapshot(0, model))


class TestSteering(InstrumentContract):
    def model(self, seed: int) -> nn.Module:
        return linear(seed, heads=1.0)

    def instrument(self) -> Steering:
        return Steering(PAIRS, TEXT, ("resid_pre", 1), unit(2, D), strengths=(1.0,), random=2)
