"""Composition: circuits whose value is known, products written out in full, the null by simulation, all families."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from devmon.anatomy import Anatomy, Layout
from devmon.errors import DataError, InstrumentError
from devmon.instruments.composition import Composition, _largest, _null, _rank
from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly, InstrumentContract, induction
from tests.anatomy.test_anatomy_sites import CONFIGS, HEADS, MASKED, VISION, family, inputs

CAUSAL = [name for name in CONFIGS if name not in MASKED and name not in VISION]
Head = tuple[Tensor, Tensor]


def measure(model: nn.Module, **more: Any) -> Any:
    return Composition(draws=64, **more)(Snapshot(0, model.eval()))


def model_of(heads: list[list[Head]]) -> AttentionOnly:
    width = len(heads[0][0][0])
    embed = torch.eye(width, dtype=torch.float64)
    return AttentionOnly(embed, embed, heads, embed)


def random_model(seed: int, layers: int = 3, heads: int = 2, width: int = 6) -> AttentionOnly:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(width, width, generator=generator, dtype=torch.float64)

    return model_of([[(draw(), draw()) for _ in range(heads)] for _ in range(layers)])


def unit(*places: int, width: int = 8) -> Tensor:
    """A (width, width) matrix with ones at pairs of places."""
    made = torch.zeros(width, width, dtype=torch.float64)
    made[places[::2], places[1::2]] = 1.0
    return made


def test_rank_one_heads_compose_fully_or_not_at_all() -> None:
    """Head 0.0 writes direction 1, head 0.1 direction 5; a later head reads direction 1 by keys, queries or values."""
    nothing = unit(6, 7)
    first = [(nothing, unit(0, 1)), (nothing, unit(0, 5))]
    for kind, head in {"K": (unit(3, 1), nothing), "Q": (unit(1, 3), nothing), "V": (nothing, unit(1, 3))}.items():
        found = measure(model_of([first, [head, (nothing, nothing)]]))["composition"]
        expected = np.zeros((3, 2, 2))  # kind, later head, earlier head
        expected["KQV".index(kind), 0, 0] = 1.0
        np.testing.assert_allclose(found[:, 1, :, 0], expected, atol=1e-12)


def test_the_induction_circuit_composes_through_its_keys_alone() -> None:
    """The previous-token head writes I from token to `before` (norm √n); the induction head's keys read s I from
    there and s/2 from the first place (norm s √(n + n/4)); their product is s I: K = 1 / √(1.25 n)."""
    vocab = 12
    found = measure(induction(vocab, 14), pair=((0, 1), (1, 0)))
    np.testing.assert_allclose(found["pair"], [1 / np.sqrt(1.25 * vocab), 0, 0], atol=1e-12)
    assert float(found["pair_rank"][0]) == 1
    assert float(found["max"][0]) == float(found["pair"][0])
    assert float(found["pair"][0]) > 1.5 * float(found["max_null"][0])
    assert int(np.isfinite(found["composition"][0]).sum()) == 1, "the other heads write or read nothing"
    assert np.isnan(found["pair"].sel(kind="Q")) or float(found["pair"].sel(kind="Q")) == 0


def slow(anatomy: Anatomy, kind: str, layer: int, head: int, layer_from: int, head_from: int) -> float:
    """The definition with matrices of (d, d)."""
    wrote = (anatomy.W_V(layer_from)[head_from] @ anatomy.W_O(layer_from)[head_from]).detach().double().numpy()
    w_qk = (anatomy.W_Q(layer)[head] @ anatomy.W_K(layer)[head].T).detach().double().numpy()
    w_ov = (anatomy.W_V(layer)[head] @ anatomy.W_O(layer)[head]).detach().double().numpy()
    read = {"K": w_qk.T, "Q": w_qk, "V": w_ov}[kind]
    return float(np.linalg.norm(wrote @ read) / np.linalg.norm(wrote) / np.linalg.norm(read))


@pytest.mark.parametrize("name", CAUSAL)
def test_every_family_by_full_products(name: str) -> None:
    model = family(name)
    found = measure(model)
    values, anatomy = found["composition"].values, Anatomy(model)  # which tries its layout: once for all heads
    for kind in range(3):
        for head in range(HEADS):
            for head_from in range(HEADS):
                expected = slow(anatomy, "KQV"[kind], 1, head, 0, head_from)
                np.testing.assert_allclose(values[kind, 1, head, 0, head_from], expected, rtol=1e-5)
    assert int(np.isfinite(values).sum()) == 3 * HEADS**2
    assert ((values[:, 1, :, 0] > 0) & (values[:, 1, :, 0] < 1)).all()


def test_the_scores_say_what_the_model_does() -> None:
    """Independent of the convention of products: K-composition with head a alone moves the keys when a's output is
    scaled, Q the queries, V the values; checked by running the model."""
    for kind, site in (("K", "k"), ("Q", "q"), ("V", "v")):
        model = family("gpt2").double()
        anatomy = Anatomy(model)
        # head 1.2 reads direction 3 through this one map only, head 0.1 writes nothing but direction 3
        block, out = model.transformer.h[1].attn, model.transformer.h[0].attn.c_proj
        columns = {"Q": 0, "K": 32, "V": 64}[kind] + 16
        block.c_attn.weight.data[:, columns : columns + 8] = 0
        block.c_attn.weight.data[3, columns] = 1.0
        out.weight.data[8:16] = 0
        out.weight.data[8:16, 3] = 1.0
        found = measure(model)["composition"][:, 1, 2, 0, 1]
        np.testing.assert_allclose(found.sel(kind=kind), 1.0, atol=1e-9)
        assert (found.drop_sel(kind=kind) < 0.6).all()
        _, before = anatomy.run(inputs("gpt2"), [(site, 1)])
        _, after = anatomy.run(
            inputs("gpt2"), [(site, 1)], {("z", 0): lambda z: z * (1 + (torch.arange(4) == 1)[:, None])}
        )
        assert (after[site, 1][:, :, 2] - before[site, 1][:, :, 2]).abs().max() > 1e-3


def test_ranks_scaling_and_summaries() -> None:
    model = random_model(0)
    found, values = measure(model), measure(model)["composition"].values
    for kind in range(3):
        there = values[kind][np.isfinite(values[kind])]
        assert len(there) == 3 * 4
        order = sorted(there, reverse=True)
        for value, rank in zip(values[kind].ravel(), found["rank"].values[kind].ravel(), strict=True):
            assert np.isnan(rank) if np.isnan(value) else order[int(rank) - 1] == value
        np.testing.assert_allclose([found["max"][kind], found["median"][kind]], [max(there), np.median(there)])
    for part in ("query", "out"):
        model.get_parameter(f"blocks.1.{part}.weight").data *= 7.0
    np.testing.assert_allclose(measure(model)["composition"], values, rtol=1e-10)
    np.testing.assert_array_equal(_rank(np.array([0.5, np.nan, 0.7, 0.5, 0.1])), [2.5, np.nan, 1, 2.5, 4])


def test_a_rotation_of_the_stream_changes_nothing() -> None:
    model, turned = random_model(1), random_model(1)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    for block in turned.blocks:
        for part in ("query", "key", "value"):
            getattr(block, part).weight.data = getattr(block, part).weight.data @ turn  # reads x turn
        block.out.weight.data = turn.T @ block.out.weight.data
    np.testing.assert_allclose(measure(turned)["composition"], measure(model)["composition"], rtol=1e-9)


def test_the_null_is_that_of_gaussian_factors() -> None:
    """Root mean square 1/√d for any singular values (a random rotation between two matrices), and full products."""
    generator = np.random.default_rng(0)
    for d, size in ((32, 8), (24, 24)):
        drawn = []
        for _ in range(600):
            v, k, q = generator.normal(size=(3, d, size))
            wrote, read = v @ generator.normal(size=(size, d)), k @ q.T
            drawn.append(np.linalg.norm(wrote @ read) / np.linalg.norm(wrote) / np.linalg.norm(read))
        mean, sd = _null(d, size, 1024, 0)
        assert mean.shape == sd.shape == (3,)
        np.testing.assert_allclose(mean, np.mean(drawn), atol=5 * np.std(drawn) / 600**0.5 + 5 * sd.max() / 32**0.5 / 8)
        np.testing.assert_allclose(sd, np.std(drawn), rtol=0.2)
        np.testing.assert_allclose(np.sqrt(mean**2 + sd**2), d**-0.5, rtol=0.02)
    assert _null(16, 4, 100, 0)[0].tolist() != _null(16, 4, 100, 1)[0].tolist()
    largest = [generator.normal(size=48).max() for _ in range(4000)]
    assert _largest(48) == pytest.approx(np.mean(largest), abs=0.05)


def test_random_heads_are_at_the_null() -> None:
    model = family("gpt2")
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    found = Composition()(Snapshot(0, model))
    for name in ("median", "max"):
        reference = found["null" if name == "median" else "max_null"]
        np.testing.assert_allclose(found[name], reference, atol=4 * float(found["null_sd"].max()))
    assert (found["max"] > found["null"]).all()


def test_what_it_refuses() -> None:
    with pytest.raises(DataError, match="layer_from before layer"):
        Composition(pair=((1, 0), (1, 1)))
    with pytest.raises(DataError, match="draws >= 4"):
        Composition(draws=3)
    with pytest.raises(InstrumentError, match=r"layers 0 to 1 of heads 0 to 3, pair is"):
        measure(family("gpt2"), pair=((0, 4), (1, 0)))
    with pytest.raises(InstrumentError, match="Composition needs a residual stream that is summed up; that of BertFor"):
        measure(family("bert"))
    with pytest.raises(InstrumentError, match="heads in two layers; AttentionOnly has one"):
        measure(random_model(0, layers=1))
    with pytest.raises(InstrumentError, match="Composition"):
        measure(nn.Linear(3, 3))
    assert Composition().cost().work == 0
    assert measure(family("esm"))["composition"].shape == (3, 2, 4, 2, 4), "no logits are needed"
    layout = Layout(blocks="blocks", query="key", key="query", value="value", out="out", heads="heads")
    swapped = measure(random_model(2), layout=layout)["composition"]
    np.testing.assert_allclose(swapped.sel(kind="K"), measure(random_model(2))["composition"].sel(kind="Q"))


class TestComposition(InstrumentContract):
    without_error = dict.fromkeys(("max", "pair"), "exact functions of the weights")

    def instrument(self) -> Composition:
        return Composition(pair=((0, 1), (1, 0)), draws=64)

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)
