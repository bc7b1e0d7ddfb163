"""The tuned lens: what an affine map can and cannot recover, a slow reference, the families, and its contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from devmon.data import clustered_mean, random_tokens, repeats
from devmon.errors import DataError, InstrumentError
from devmon.instruments.tuned_lens import TunedLens
from devmon.snapshot import Snapshot, derive_seed
from devmon.testing import AttentionOnly, InstrumentContract, induction
from tests.anatomy.test_anatomy_sites import CONFIGS, MASKED, VISION, family

VOCAB = 12
CAUSAL = [name for name in CONFIGS if name not in (*MASKED, *VISION)]


def measure(model: nn.Module, tokens: Tensor, **settings: Any) -> Any:
    return TunedLens(tokens, **settings)(Snapshot(0, model.eval()))


def random_model(seed: int, vocab: int = VOCAB, length: int = 12, width: int = 6) -> AttentionOnly:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    heads = [[(draw(width, width), draw(width, width)) for _ in range(2)] for _ in range(2)]
    return AttentionOnly(draw(vocab, width), draw(length, width), heads, draw(width, vocab))


def own_place(seed: int, width: int = 20) -> AttentionOnly:
    """Every layer is a linear map of the state at its own place: an affine lens can know all that comes."""
    model = random_model(seed, width=width)
    rest = width - 12
    model.positions.data[:] = torch.eye(12, width, dtype=torch.float64)
    model.embed.weight.data[:, :12] = 0
    for block in model.blocks:
        look = torch.zeros(width, width, dtype=torch.float64)
        look[:12, :12] = 200 * torch.eye(12)
        block.query.weight.data = look.repeat(2, 1)
        block.out.weight.data[:12] = 0
        block.out.weight.data[:, :12] = 0
        block.out.weight.data[:, width : width + 12] = 0
        block.out.weight.data /= rest**0.5
    model.unembed.weight.data[:, :12] = 0
    return model


def halves(tokens: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(derive_seed(seed, "TunedLens")))
    return order[: len(tokens) // 2].sort().values, order[len(tokens) // 2 :].sort().values


def test_what_is_an_affine_map_away_is_read() -> None:
    tokens = random_tokens(VOCAB, 24, 12)
    found = measure(own_place(0), tokens, penalty=1e-9, steps=40)
    assert (found["kl_raw"][:2] > 0.3).all()
    np.testing.assert_allclose(found["kl"], 0.0, atol=1e-3)
    assert (found["kl_constant"] > 0.3).all()
    rigid = measure(own_place(0), tokens, penalty=1e9)
    assert (np.abs(rigid["kl"] - rigid["kl_raw"])[:2] <= 0.5 * rigid["kl_raw"][:2]).all(), "the bias alone may learn"


def test_what_is_not_there_is_not_read() -> None:
    """Before its last layer the induction circuit holds at a place no trace of what followed there before."""
    tokens = repeats(VOCAB, 60, 25, 1, bos=0).tokens
    found = measure(induction(VOCAB, 25, confidence=6.0), tokens)
    null = float(found["kl_constant"])
    assert null > 0.5
    assert (found["kl"][:2] > 0.7 * null).all(), found["kl"].values
    assert (found["kl_train"] <= found["kl_train_raw"] + 1e-12).all()
    np.testing.assert_allclose(found["kl"][-1], 0.0, atol=1e-12)
    np.testing.assert_allclose(found["agreement"][-1], 1.0)


def test_against_scipy_and_a_plain_loss() -> None:
    """Without a norm the loss is convex in the map: both optimisers find the same minimum."""
    model, tokens = random_model(1), random_tokens(VOCAB, 10, 12, 3)
    found = measure(model, tokens, penalty=0.1, steps=300)
    train, test = halves(tokens)
    with torch.no_grad():
        states = [model.embed(tokens) + model.positions]
        for block in model.blocks:
            states.append(block(states[-1]))
        p = model(tokens)[:, :-1].softmax(-1)
    unembed = model.unembed.weight.detach().T

    def kl(state: Tensor, truth: Tensor) -> Tensor:
        q = (state @ unembed).softmax(-1)
        return (truth * (truth / q).log()).sum(-1)

    for depth in (0, 1):
        h = states[depth][:, :-1]
        centre = h[train].mean((0, 1))
        spread = (h[train] - centre).square().mean().sqrt()
        last = states[2][train, :-1]
        scale = (last - last.mean((0, 1))).square().mean().sqrt()

        def lens(theta: Tensor, h=h, centre=centre, spread=spread, scale=scale) -> Tensor:
            return h + scale * ((h - centre) / spread @ theta[:36].view(6, 6) + theta[36:])

        def value(flat: np.ndarray, lens=lens) -> tuple[float, np.ndarray]:
            theta = torch.tensor(flat, requires_grad=True)
            loss = kl(lens(theta)[train], p[train]).mean() + 0.1 * theta[:36].square().sum()
            loss.backward()
            return loss.item(), theta.grad.numpy()

        theta = torch.tensor(minimize(value, np.zeros(42), jac=True, method="BFGS", options={"gtol": 1e-9}).x)
        each = kl(lens(theta), p)
        np.testing.assert_allclose(found["kl_train"][depth], each[train].mean(), rtol=1e-3)
        mean, se = clustered_mean(each[test].sum(1).numpy(), np.full(5, 11))
        np.testing.assert_allclose(found["kl"][depth], mean, rtol=1e-2)
        np.testing.assert_allclose(found["kl_se"][depth], se, rtol=1e-2)
        q = (lens(theta) @ unembed).softmax(-1)[test]
        loss = -q.gather(-1, tokens[test, 1:, None]).log().mean()
        np.testing.assert_allclose(found["loss"][depth], loss, rtol=1e-2)
        np.testing.assert_allclose(found["kl_raw"][depth], kl(h, p)[test].mean(), rtol=1e-9)
        np.testing.assert_allclose(found["kl_train_raw"][depth], kl(h, p)[train].mean(), rtol=1e-9)
        assert float(found["kl_train"][depth]) < 0.8 * float(found["kl_train_raw"][depth])
    constant = p[train].mean((0, 1))
    np.testing.assert_allclose(found["kl_constant"], (p[test] * (p[test] / constant).log()).sum(-1).mean(), rtol=1e-9)


def test_the_test_half_is_not_trained_on() -> None:
    tokens = random_tokens(VOCAB, 8, 12)
    train, test = halves(tokens)
    other = tokens.clone()
    other[test] = random_tokens(VOCAB, 4, 12, seed=9)
    one, two = measure(random_model(0), tokens), measure(random_model(0), other)
    np.testing.assert_array_equal(one["kl_train"], two["kl_train"])
    assert not np.allclose(one["kl"][:2], two["kl"][:2])
    assert set(train.tolist()) | set(test.tolist()) == set(range(8))
    learnt = measure(random_model(0), tokens, penalty=0.0, steps=60)
    assert (learnt["kl_train"][:2] < learnt["kl"][:2]).all(), "few places are learnt by heart, and it shows"


@pytest.mark.parametrize("name", CAUSAL)
def test_families(name: str) -> None:
    tokens = torch.randint(3, 23, (6, 9), generator=torch.Generator().manual_seed(1))
    found = measure(family(name), tokens, steps=4)
    assert dict(found.drop_dims("replicate").sizes) == {"depth": 3}
    assert (found["kl_train"] <= found["kl_train_raw"]).all()
    assert float(found["kl_train"][0]) < 0.9 * float(found["kl_train_raw"][0])
    np.testing.assert_allclose([found["kl"][-1], found["kl_raw"][-1]], 0.0, atol=1e-5)
    assert np.isfinite(found["kl"]).all()


def test_minibatches_do_not_change_the_numbers() -> None:
    model, tokens = random_model(0), random_tokens(VOCAB, 9, 12)
    whole, parts = measure(model, tokens, steps=5), measure(model, tokens, steps=5, batch_size=2)
    for name in whole.data_vars:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-6, atol=1e-9)


def test_refusals() -> None:
    tokens = random_tokens(20, 6, 9)
    with pytest.raises(DataError, match="four sequences"):
        TunedLens(tokens[:3])
    for wrong in ({"steps": 0}, {"penalty": -1.0}, {"penalty": float("nan")}):
        with pytest.raises(DataError, match="steps >= 1 and penalty >= 0"):
            TunedLens(tokens, **wrong)  # type: ignore[arg-type]
    for name in ("bert", "esm", "vit"):
        with pytest.raises(
            InstrumentError, match=r"^TunedLens needs (an unembedding|a residual stream that is summed up)"
        ):
            measure(family(name), tokens)
    model = random_model(0)
    model.unembed.weight.data = model.unembed.weight.data[:8]
    with pytest.raises(InstrumentError, match=r"^TunedLens: the tokens go up to 11 but AttentionOnly has 8 logits"):
        measure(model, random_tokens(VOCAB, 6, 12))


class TestTunedLens(InstrumentContract):
    def instrument(self) -> TunedLens:
        return TunedLens(random_tokens(VOCAB, 6, 12), steps=5)

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)
