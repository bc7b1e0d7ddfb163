"""LayerRoles and debiased CKA: closed forms, slow references, relations, the families, and the contract."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from devmon.anatomy import residual_stream
from devmon.data import clustered_mean, random_tokens
from devmon.errors import DataError, InstrumentError
from devmon.instruments.layers import LayerRoles
from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly, InstrumentContract, even, induction
from tests.anatomy.test_anatomy_sites import CONFIGS, MASKED, VISION, family

VOCAB = 20
CAUSAL = [name for name in CONFIGS if name not in (*MASKED, *VISION)]


def measure(model: nn.Module, tokens: Tensor, **settings: Any) -> Any:
    return LayerRoles(tokens, **settings)(Snapshot(0, model.eval()))


def random_model(seed: int, layers: int = 2, vocab: int = VOCAB, length: int = 24, width: int = 12) -> AttentionOnly:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5

    heads = [[(draw(width, width), draw(width, width)) for _ in range(3)] for _ in range(layers)]
    return AttentionOnly(draw(vocab, width), draw(length, width), heads, draw(width, vocab))


def song(x: np.ndarray, y: np.ndarray) -> float:
    """Debiased CKA by Song's formula of the unbiased HSIC (2012, eq. 5), written out."""

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        one, n = np.ones(len(k)), len(k)
        a, b = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        rest = (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ a @ b @ one
        return (np.trace(a @ b) + rest) / (n * (n - 3))

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


def repeated(sequences: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    copies = torch.stack([1 + torch.randperm(VOCAB - 1, generator=generator)[:10] for _ in range(sequences)])
    return torch.cat([torch.zeros(sequences, 1, dtype=torch.int64), copies, copies], 1)


def test_the_induction_circuit_needs_both_its_layers() -> None:
    """Without either, nothing is written to the output: the loss of 9 in 20 places goes from almost 0 to log vocab."""
    found = measure(induction(VOCAB, 21), repeated(8))
    lost = 9 / 20 * (math.log(VOCAB) - math.log1p((VOCAB - 1) * math.exp(-20.0)))
    np.testing.assert_allclose(found["drop_layer"], lost, rtol=1e-9)
    np.testing.assert_allclose(found["drop_attention"], lost, rtol=1e-9)
    np.testing.assert_allclose([found["centre_layer"], found["centre_uniform"]], 0.5, rtol=1e-9)
    assert "drop_mlp" not in found


def test_the_centre_is_where_the_work_is_done() -> None:
    """The circuit after a layer that writes nothing, and before another."""
    model, tokens = induction(VOCAB, 21), random_tokens(VOCAB, 6, 21)
    nothing = copy.deepcopy(model.blocks[0])
    nothing.out.weight.data.zero_()
    model.blocks = nn.ModuleList([nothing, *model.blocks, copy.deepcopy(nothing), copy.deepcopy(nothing)])
    found = measure(model, repeated(8))
    np.testing.assert_allclose(found["drop_layer"][[0, 3, 4]], 0.0, atol=1e-12)
    np.testing.assert_allclose(found["drop_random"][[0, 3, 4]], 0.0, atol=1e-12)
    np.testing.assert_allclose([found["centre_layer"], found["centre_uniform"]], [1.5, 2.0], rtol=1e-9)
    idle = measure(even(VOCAB, 24), tokens)
    assert np.isnan(idle["centre_layer"])
    assert "3 of its standard errors" in idle["centre_layer"].attrs["nan"]
    np.testing.assert_allclose(idle["cka"], 1.0, rtol=1e-9)


def loss_of(model: Any, tokens: Tensor) -> np.ndarray:
    """(sequence, pos)."""
    with torch.no_grad():
        scores = model(tokens).logits[:, :-1]
    return (
        F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1).numpy()
    )


def test_drops_against_models_that_lack_the_part() -> None:
    tokens = torch.randint(3, 23, (6, 9), generator=torch.Generator().manual_seed(1))
    whole = loss_of(family("gpt2").double(), tokens)
    found = measure(family("gpt2").double(), tokens)
    effects: dict[str, list[np.ndarray]] = {"attention": [], "mlp": [], "layer": []}
    for layer in range(2):
        for part, each in effects.items():
            model = family("gpt2").double()
            block = model.transformer.h[layer]
            if part == "layer":
                model.transformer.h = nn.ModuleList(b for b in model.transformer.h if b is not block)
                model.config.use_cache = False
            else:
                for parameter in (block.attn if part == "attention" else block.mlp).c_proj.parameters():
                    parameter.data.zero_()
            each.append(loss_of(model, tokens) - whole)
    for part, each in effects.items():
        sums = np.stack([effect.sum(1) for effect in each], 1)
        mean, se = clustered_mean(sums, np.full(6, 8))
        np.testing.assert_allclose(found[f"drop_{part}"], mean, rtol=1e-9)
        np.testing.assert_allclose(found[f"drop_{part}_se"], se, rtol=1e-9)
        total, weighted = sums.sum(1), sums @ np.arange(2)
        if total.mean() > 3 * total.std(ddof=1) / math.sqrt(6):
            np.testing.assert_allclose(found[f"centre_{part}"], weighted.mean() / total.mean(), rtol=1e-9)
        else:
            assert np.isnan(found[f"centre_{part}"])


def test_noise_is_as_large_as_what_the_layer_adds() -> None:
    model, tokens = random_model(3), random_tokens(VOCAB, 5, 20)
    stream = residual_stream(model, tokens)
    instrument = LayerRoles(tokens)
    noise = instrument._noise(stream[1], stream[2], slice(0, 5), 1)
    np.testing.assert_allclose(noise.norm(dim=-1), (stream[2] - stream[1]).norm(dim=-1), rtol=1e-6)
    expected = instrument(Snapshot(0, model))["drop_random"]
    with torch.no_grad():
        scores = model.unembed(stream[2] + noise)[:, :-1], model.unembed(stream[2])[:, :-1]
    loss = [F.cross_entropy(s.flatten(0, 1), tokens[:, 1:].flatten()) for s in scores]
    np.testing.assert_allclose(expected[1], loss[0] - loss[1], rtol=1e-6)


def test_cka_of_the_states_and_its_error() -> None:
    model, tokens = random_model(4), random_tokens(VOCAB, 12, 20)
    found = measure(model, tokens, places=12 * 19)
    states = [state[:, 1:].reshape(12 * 19, -1).numpy() for state in residual_stream(model, tokens)]
    expected = [[song(x, y) for y in states] for x in states]
    np.testing.assert_allclose(found["cka"], expected, rtol=1e-9)
    assert 0 < float(found["cka"][0, 2]) < 0.99
    without = []
    for left in range(12):
        kept = [s.reshape(12, 19, -1)[[i for i in range(12) if i != left]].reshape(11 * 19, -1) for s in states]
        without.append([[song(x, y) for y in kept] for x in kept])
    se = np.sqrt(11 / 12 * ((np.array(without) - np.mean(without, 0)) ** 2).sum(0))
    np.testing.assert_allclose(found["cka_se"], se, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found["cka_p"][0, 1:], 1 / 100)
    few = measure(model, tokens, places=24)
    assert not np.allclose(few["cka"], found["cka"])


def test_layers_that_share_only_positions_are_unrelated() -> None:
    """And the p-value knows it; nor do many dimensions, a shift, a scale or an order of the axes deceive the CKA."""
    tokens, generator = random_tokens(VOCAB, 16, 20), torch.Generator().manual_seed(3)
    instrument = LayerRoles(tokens)
    place = 3 * torch.randn(20, 12, generator=generator, dtype=torch.float64)
    p = []
    for _ in range(8):
        states = torch.randn(2, 16, 20, 12, generator=generator, dtype=torch.float64) + place
        cka, _, value = instrument._likeness(states)
        assert cka[0, 1] > 0.3, "what the places share is there to be seen"
        p.append(value[0, 1])
    assert 0.2 < np.mean(p) < 0.8, p
    related = instrument._likeness(torch.stack([states[0], states[0] + states[1]]))
    assert related[2][0, 1] == 1 / 100
    wide = LayerRoles(tokens[:12], places=12 * 5)._likeness(torch.randn(2, 12, 20, 800, generator=generator))
    assert abs(wide[0][0, 1]) < 0.1, "debiased"
    turned = instrument._likeness(torch.stack([states[0], 1e4 - 3 * states[0].flip(-1)]))
    np.testing.assert_allclose(turned[0], 1.0, rtol=1e-9)
    np.testing.assert_allclose(turned[1], 0.0, atol=1e-9)


@pytest.mark.parametrize("name", CAUSAL)
def test_families(name: str) -> None:
    tokens = torch.randint(3, 23, (5, 9), generator=torch.Generator().manual_seed(1))
    found = measure(family(name), tokens, permutations=9)
    assert dict(found.drop_dims("replicate").sizes) == {"layer": 2, "depth": 3, "depth_other": 3}
    for part in ("attention", "mlp", "layer", "random"):
        assert np.isfinite(found[f"drop_{part}"]).all()
        assert (np.abs(found[f"drop_{part}"]) > 1e-4).all()


def test_minibatches_do_not_change_the_numbers() -> None:
    model, tokens = random_model(0), random_tokens(VOCAB, 7, 24)
    whole, parts = measure(model, tokens), measure(model, tokens, batch_size=3)
    for name in whole.data_vars:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-8, atol=1e-10)


def test_refusals() -> None:
    tokens = random_tokens(20, 6, 9)
    for given, wrong in ((tokens, {"places": 8}), (tokens, {"permutations": 0}), (tokens[:3], {}), (tokens[:, :2], {})):
        with pytest.raises(DataError, match="LayerRoles needs 4 sequences or more"):
            LayerRoles(given, **wrong)
    for name, message in (
        ("bert", "needs a residual stream"),
        ("esm", "needs a residual stream"),
        ("vit", "needs an unembedding"),
    ):
        with pytest.raises(InstrumentError, match=rf"^LayerRoles {message}"):
            measure(family(name), tokens)


class TestLayerRoles(InstrumentContract):
    def instrument(self) -> LayerRoles:
        return LayerRoles(random_tokens(VOCAB, 6, 24), permutations=19)

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)
