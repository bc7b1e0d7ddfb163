"""NeuralCollapse: 0 on an exact simplex, by definition on features that are not, its contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.datasets import load_digits
from torch import Tensor, nn

from devmon.errors import DataError, InstrumentError
from devmon.instruments.neural_collapse import NeuralCollapse
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract

K, D = 4, 7
LABELS = torch.arange(200) % K


class Head(nn.Module):
    """The inputs are the features."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.last = nn.Linear(weight.shape[1], weight.shape[0]).to(weight.dtype)
        self.last.weight.data, self.last.bias.data = weight.clone(), torch.zeros(len(weight), dtype=weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)


def corners(scale: float = 1.0, seed: int = 0) -> Tensor:
    """A simplex (K, D) in a random position, with an offset of all."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q[:K]
    return scale * (torch.eye(K, dtype=torch.float64) - 1 / K) @ turn


def measure(features: Tensor, weight: Tensor, labels: Tensor = LABELS) -> xr.Dataset:
    return NeuralCollapse(features, labels)(Snapshot(0, Head(weight).eval()))


def test_an_exact_simplex_has_collapsed_wherever_it_lies() -> None:
    simplex = corners()
    offset = 5 * torch.randn(D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    offset -= torch.linalg.pinv(simplex) @ (simplex @ offset)  # which would favour some classes
    found = measure((simplex + offset)[LABELS], 3 * simplex)
    for name in ("nc1", "nc1_pairs", "norm_spread", "weight_norm_spread", "angle", "simplex", "duality"):
        np.testing.assert_allclose(found[name], 0, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(found[f"{name}_se"], 0, atol=1e-7, err_msg=name)
    assert float(found["nearest_mean"]) == 0


def noisy(sd: float) -> Tensor:
    noise = torch.randn(len(LABELS), D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return corners()[LABELS] * torch.tensor([1.0, 2.0, 1.0, 0.5])[LABELS, None] + sd * noise


def test_each_number_by_its_definition() -> None:
    weight = torch.randn(K, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    features = noisy(0.3)
    found = measure(features, weight)
    h, y, w = features.numpy(), LABELS.numpy(), weight.numpy()
    means = np.array([h[y == c].mean(0) for c in range(K)])
    m = means - means.mean(0)
    within = sum(np.outer(a - means[c], a - means[c]) for a, c in zip(h, y, strict=True)) / len(h)
    between = m.T @ m / K
    np.testing.assert_allclose(found["nc1"], np.trace(within @ np.linalg.pinv(between, rcond=1e-8)) / K, rtol=1e-8)
    cos = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for i, a in enumerate(m) for j, b in enumerate(m) if i != j]
    np.testing.assert_allclose(found["angle"], np.mean(np.abs(np.array(cos) + 1 / 3)), rtol=1e-9)
    var = [np.mean(np.sum((h[y == c] - means[c]) ** 2, 1)) for c in range(K)]
    pairs = [(var[i] + var[j]) / 2 / np.sum((means[i] - means[j]) ** 2) for i in range(K) for j in range(K) if i != j]
    np.testing.assert_allclose(found["nc1_pairs"], np.mean(pairs), rtol=1e-9)
    np.testing.assert_allclose(found["duality"], np.linalg.norm(w / np.linalg.norm(w) - m / np.linalg.norm(m)))
    near = np.argmin([[np.sum((a - b) ** 2) for b in means] for a in h], 1)
    np.testing.assert_allclose(found["nearest_mean"], np.mean(near != np.argmax(h @ w.T, 1)))
    norms = np.linalg.norm(m, axis=1)
    np.testing.assert_allclose(found["norm_spread"], norms.std() / norms.mean(), rtol=1e-9)


def test_the_jackknife_is_the_spread_over_new_samples() -> None:
    values, errors = [], []
    for seed in range(60):
        noise = torch.randn(len(LABELS), D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = measure(corners()[LABELS] + 0.3 * noise, corners())
        values.append(float(found["nc1"]))
        errors.append(float(found["nc1_se"]))
    assert 0.7 < np.mean(errors) / np.std(values) < 1.4


def trained(norm: bool, steps: int = 400) -> tuple[xr.Dataset, xr.Dataset, float]:
    """Digits, 100 a class, four layers of 128: untrained, trained, and the accuracy."""
    images, classes = load_digits(return_X_y=True)
    labels = torch.tensor(classes)
    chosen = torch.cat([(labels == c).nonzero()[:100, 0] for c in range(10)])
    x, y = torch.tensor(images, dtype=torch.float32)[chosen] / 16, labels[chosen]
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width in (64, 128, 128, 128):
        layers += [nn.Linear(width, 128), *([nn.BatchNorm1d(128)] if norm else []), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(128, 10))
    instrument = NeuralCollapse(x, y)
    before = instrument(Snapshot(0, net.eval()))
    optimizer = torch.optim.SGD(net.train().parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        at = torch.randint(len(x), (128,))
        nn.functional.cross_entropy(net(x[at]), y[at]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    accuracy = float((net.eval()(x).argmax(1) == y).double().mean())
    return before, instrument(Snapshot(steps, net)), accuracy


def test_digits_collapse_with_batch_norm_and_not_without() -> None:
    before, after, accuracy = trained(True)
    assert accuracy == 1
    assert float(before["nc1"]) > 1
    assert float(before["nearest_mean"]) > 0.7
    assert float(after["nc1"]) < 0.08, after["nc1"]
    assert float(after["simplex"]) < 0.4 < 0.5 < float(before["simplex"])
    assert float(after["duality"]) < 0.6 < 1.2 < float(before["duality"])
    assert float(after["nearest_mean"]) == 0
    _, plain, accuracy = trained(False)
    assert accuracy > 0.97
    assert float(plain["nc1"]) > 0.25
    assert float(plain["simplex"]) > 0.6


def test_refusals() -> None:
    features, weight = noisy(0.1), corners()
    with pytest.raises(DataError, match="two classes at least"):
        NeuralCollapse(features, torch.zeros(200).long())
    with pytest.raises(DataError, match=r"classes 0 … K - 1"):
        NeuralCollapse(features, LABELS + 1)
    with pytest.raises(InstrumentError, match="gives 3: name its `head`"):
        measure(features, weight[:3])
    with pytest.raises(InstrumentError, match="none at 'first'"):
        NeuralCollapse(features, LABELS, head="first")(Snapshot(0, Head(weight)))


class TestNeuralCollapse(InstrumentContract):
    def instrument(self) -> NeuralCollapse:
        return NeuralCollapse(noisy(0.2).float(), LABELS)

    def model(self, seed: int) -> nn.Module:
        return Head(torch.randn(K, D, generator=torch.Generator().manual_seed(seed)))
