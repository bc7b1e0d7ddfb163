"""SoftEntropy: the exact temperature, what exact clusters and shuffled labels give, a model that is its labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import gammaln
from torch import Tensor, nn

from devmon.errors import DataError
from devmon.features.soft_entropy import _log_bessel, _ratio, assigned, entropy, information, temperature
from devmon.instruments.soft_entropy import SoftEntropy
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract
from tests.support.models import random_model

POINTS, EIGHT = 4096, np.arange(4096) % 8


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape: int) -> Tensor:
    return nn.functional.normalize(drawn(9, *shape), dim=-1)


def shares(states: Tensor, vectors: int = 100) -> Tensor:
    d = states.shape[1]
    return assigned(states, unit(5, vectors, d), temperature(d, vectors))


@pytest.mark.parametrize("d", [3, 4, 16, 64])
def test_a_direction_says_as_much_as_a_choice_of_n(d: int) -> None:
    """KL(vMF ‖ uniform) by quadrature over the angle to the mean, whose density on the sphere is known."""
    kappa = 1 / temperature(d, 100)

    def weight(angle: float, tilt: float) -> float:
        return math.exp(tilt * (math.cos(angle) - 1) + (d - 2) * math.log(max(math.sin(angle), 1e-300)))

    whole, flat = (quad(weight, 0, math.pi, args=(tilt,), limit=200)[0] for tilt in (kappa, 0.0))
    cosine = quad(lambda a: weight(a, kappa) * math.cos(a), 0, math.pi, limit=200)[0] / whole
    assert kappa * (cosine - 1) - math.log(whole / flat) == pytest.approx(math.log(100), rel=1e-6)


def test_temperatures_and_their_large_dimensions() -> None:
    exact = [temperature(d, 100) for d in (4, 16, 64)]
    np.testing.assert_allclose(exact, [0.0201, 0.0540, 0.0371], atol=6e-5)
    assert temperature(768, 100) == pytest.approx(0.0118, abs=5e-5)
    assert temperature(4096, 100) == pytest.approx(1 / math.sqrt(2 * 4096 * math.log(100)), rel=0.01)
    for nu, x in ((61.0, 5.0), (61.0, 40.0), (127.0, 90.0)):  # the series Σ (x/2)^(2k+ν) / (k! Γ(k+ν+1))
        k = np.arange(400.0)
        terms = (2 * k + nu) * math.log(x / 2) - gammaln(k + 1) - gammaln(k + nu + 1)
        next_terms = (2 * k + nu + 1) * math.log(x / 2) - gammaln(k + 1) - gammaln(k + nu + 2)
        both = [float(np.logaddexp.reduce(each)) for each in (terms, next_terms)]
        assert _log_bessel(nu, x) == pytest.approx(both[0], abs=1e-8)
        assert _ratio(nu, x) == pytest.approx(math.exp(both[1] - both[0]), rel=1e-10)


def test_one_point_exact_clusters_and_offsets() -> None:
    states = drawn(0, POINTS, 64)
    point = float(entropy(shares(states).numpy()).mean())
    assert point == pytest.approx(0.39, abs=0.03)
    for clusters, most in ((10, 0.40), (100, 0.58), (500, 0.61)):
        label = np.arange(POINTS) % clusters
        (h, found), _ = information(shares(drawn(1, clusters, 64)[label]), label, EIGHT, 8)
        assert found == pytest.approx(most, abs=0.03)
        assert found == pytest.approx(h - point, abs=0.02)  # the bound, which is far from ln K / ln n
    for offset, expected in ((0.0, 0.999), (1.0, 0.74), (5.0, 0.40)):
        means = [
            information(shares(states[:1024] + offset * 8 * away), EIGHT[:1024], EIGHT[:1024], 8)[0][0]
            for away in nn.functional.normalize(drawn(7, 6, 1, 64), dim=-1)
        ]
        assert np.mean(means) == pytest.approx(expected, abs=0.09), offset


def test_shuffled_labels_are_bias_that_points_a_label_pay_off() -> None:
    p = shares(drawn(0, POINTS, 64))
    for points, expected in ((1, 0.61), (2, 0.47), (4, 0.35), (8, 0.24), (16, 0.15), (64, 0.05), (256, 0.013)):
        label = np.arange(POINTS) // points
        assert information(p, label, EIGHT, 8)[0][1] == pytest.approx(expected, abs=0.02), points


def test_information_by_its_definition_and_without_a_group() -> None:
    p, label, group = shares(drawn(2, 60, 5), 7), np.arange(60) ** 2 % 7 % 4, np.arange(60) % 3
    whole, without = information(p, label, group, 3)

    def by_hand(kept: np.ndarray) -> list[float]:
        found = []
        for draw in p.numpy():
            means = np.array([draw[kept & (label == x)].mean(0) for x in np.unique(label)])
            h = [-(m * np.log(m)).sum() / math.log(7) for m in (means.mean(0), *means)]
            found.append([h[0], h[0] - np.mean(h[1:])])
        return list(np.mean(found, 0))

    np.testing.assert_allclose(whole, by_hand(np.ones(60, bool)), rtol=1e-10)
    np.testing.assert_allclose(without, [by_hand(group != g) for g in range(3)], rtol=1e-10)


class Told(nn.Module):
    """The stream after block 0 is the token's own vector, after block 1 that of the next token, after block 2 noise."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64).double()
        self.embed.weight.data = drawn(seed, 10, 64)
        self.blocks = nn.ModuleList([nn.Identity(), Ahead(), Noise()])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x @ self.embed.weight.T


class Ahead(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.roll(-1, 1)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return drawn(4, *x.shape)


TOKENS = torch.randint(10, (64, 40), generator=torch.Generator().manual_seed(0))


def test_a_model_that_is_its_labels_has_all_of_one_and_none_of_the_other() -> None:
    found = SoftEntropy(TOKENS)(Snapshot(0, Told()))
    past, future, most = (found[name].values for name in ("past", "future", "past_most"))
    np.testing.assert_allclose(
        found["past_raw"][:2], most[:2], atol=1e-9
    )  # a state is its token: all that there can be
    np.testing.assert_allclose(past[:2], most[:2] - found["past_shuffled"][:2], atol=1e-9)
    assert (past[:2] > 0.3).all()
    assert future[2] > 0.3
    for value, se in (
        (past[2], found["past_se"][2]),
        (future[0], found["future_se"][0]),
        (past[3], found["past_se"][3]),
    ):
        assert abs(value) < 4 * max(float(se), 0.005), (value, se)
    assert found["optimality"].isnull().values.tolist()[2:] == [True, True]  # nothing of the past to divide by
    assert float(found["optimality"][0]) == pytest.approx(0, abs=0.05)
    assert (found["past_shuffled"] < 0.06).all()


def test_an_offset_hides_what_the_centred_twin_shows() -> None:
    class Offset(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 40 * unit(1, 1, 64)[0, 0]

    model = Told()
    model.blocks = nn.ModuleList([nn.Identity(), Offset()])
    found = SoftEntropy(TOKENS)(Snapshot(0, model))
    assert float(found["mean_norm"][2]) > 0.9 > 0.5 > float(found["mean_norm"][1])
    assert float(found["past"][2]) < 0.5 * float(found["past"][1])
    np.testing.assert_allclose(found["past_centred"][2], found["past_centred"][1], atol=0.02)


def test_longer_n_grams_and_refusals() -> None:
    few = torch.randint(3, (64, 40), generator=torch.Generator().manual_seed(0))
    instrument = SoftEntropy(few, order=2)
    past, future = instrument._tasks
    flat = few.flatten()
    for task, shift in ((past, 0), (future, 2)):
        grams = {
            (int(flat[at + shift - 1]), int(flat[at + shift]), int(x))
            for at, x in zip(task.place, task.label, strict=True)
        }
        assert len(grams) == 9 == len({gram[:2] for gram in grams})  # one label is one bigram
        assert np.bincount(task.label).tolist() == [64] * 9
    with pytest.raises(DataError, match="two labels of 64 places"):
        SoftEntropy(torch.arange(600).view(10, 60))
    with pytest.raises(DataError, match="labels of the shape"):
        SoftEntropy(few, few[:, :-1])
    with pytest.raises(DataError, match="order below 40"):
        SoftEntropy(few, order=40)


class TestSoftEntropy(InstrumentContract):
    def instrument(self) -> SoftEntropy:
        return SoftEntropy(TOKENS, per_label=16, vectors=20, draws=2)

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)
