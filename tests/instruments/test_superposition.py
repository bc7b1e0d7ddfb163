"""Superposition and Polysemanticity against hand-built spaces, slow references, and their contract."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis
from torch import Tensor, nn

from devmon.errors import DataError, InstrumentError
from devmon.instruments import Polysemanticity, Superposition
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract
from devmon.testing.superposition import plateau


def features(rows: Tensor, **options: bool) -> nn.Linear:
    model = nn.Linear(rows.shape[1], rows.shape[0], bias=False).double()
    model.weight.data = rows.double()
    return model


def sharing(rows: Tensor):
    return Superposition("weight")(Snapshot(0, features(rows)))


def test_orthogonal_features_share_nothing() -> None:
    rows = 3 * torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))[0]
    found = sharing(rows)
    np.testing.assert_allclose(found["dimensionality"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["mean_interference"], 0, atol=1e-6)
    np.testing.assert_allclose([found["features_per_dimension"], found["directions"]], [9, 5], rtol=1e-6)


@pytest.mark.parametrize("sides, expected", [(4, 0.5), (5, 0.4), (6, 1 / 3), (8, 0.25)])
def test_a_polygon_gives_each_side_its_share_of_the_plane(sides: int, expected: float) -> None:
    """k equal vectors at equal angles: Σⱼ cos² = k/2, so D = 2/k; dead features have none."""
    one = plateau(sides, 0, sides + 1)
    found = sharing(one.point()[0].T)
    np.testing.assert_allclose(found["dimensionality"], [expected] * sides + [0], atol=1e-12)
    np.testing.assert_allclose(found["features_per_dimension"], sides * one.length**2 / 2)
    np.testing.assert_allclose(found["mean_interference"], sides / 2 - 1)
    np.testing.assert_allclose(found["mean_dimensionality"], expected * sides / (sides + 1))


def test_headlines_are_free_of_the_scale_of_the_weights() -> None:
    rows = torch.randn(7, 4, generator=torch.Generator().manual_seed(2))
    one, scaled = sharing(rows), sharing(5 * rows)
    for name in one.attrs["headline"]:
        np.testing.assert_allclose(scaled[name], one[name], rtol=1e-6, err_msg=name)


def test_against_the_definition_and_its_null() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(200, 12, generator=generator, dtype=torch.float64) * torch.rand(
        200, 1, generator=generator, dtype=torch.float64
    )
    found, w = sharing(rows), rows.numpy()
    unit = w / np.linalg.norm(w, axis=1, keepdims=True)
    squares = (unit @ w.T) ** 2
    np.testing.assert_allclose(found["dimensionality"], (w**2).sum(1) / squares.sum(1))
    np.testing.assert_allclose(found["interference"], squares.sum(1) - np.diag(squares))
    gram = (w @ w.T) ** 2
    np.testing.assert_allclose(found["mean_interference"], (gram.sum() - np.trace(gram)) / np.trace(gram))
    singular = np.linalg.svd(w, compute_uv=False) ** 2
    np.testing.assert_allclose(found["directions"], singular.sum() ** 2 / (singular**2).sum())
    np.testing.assert_allclose(found["mean_interference"], found["mean_interference_reference"], rtol=0.1)
    np.testing.assert_allclose(found["mean_dimensionality"], found["mean_dimensionality_reference"], rtol=0.1)


def test_rotation_and_scale() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    one, other = sharing(rows), sharing(1e-6 * rows @ turn)
    for name in ("dimensionality", "mean_interference", "directions", "mean_dimensionality_reference"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-9, err_msg=name)


def test_columns_and_the_names_of_what_is_there() -> None:
    rows = torch.randn(7, 3, generator=torch.Generator().manual_seed(3))
    found = Superposition("weight", columns=True)(Snapshot(0, features(rows.T)))
    np.testing.assert_allclose(found["dimensionality"], sharing(rows)["dimensionality"])
    with pytest.raises(InstrumentError, match=r"Linear has no matrix 'hidden': its matrices are weight"):
        Superposition("hidden")(Snapshot(0, features(rows)))
    with pytest.raises(DataError, match="name it"):
        Superposition(columns=True)


def test_zero_and_infinite_weights_are_nan() -> None:
    for rows in (torch.zeros(3, 2), torch.full((3, 2), math.inf)):
        found = sharing(rows)
        assert np.isnan(found["mean_dimensionality"])
        assert np.isnan(found["features_per_dimension"])


# --- polysemanticity ------------------------------------------------------------------------------------------------


def items(each: int = 40) -> tuple[Tensor, Tensor]:
    """One-hot inputs of five kinds with sizes from 0 to 1, and their kind."""
    kind = torch.arange(5).repeat(each)
    size = torch.rand(5 * each, 1, generator=torch.Generator().manual_seed(4))
    return nn.functional.one_hot(kind, 5) * size, kind


def meanings(weight: Tensor, top: int = 20):
    inputs, kind = items()
    return Polysemanticity(inputs, kind, module="0", top=top)(Snapshot(0, nn.Sequential(features(weight)).float()))


def test_one_neuron_a_label_is_pure_and_one_for_two_labels_is_half() -> None:
    found = meanings(torch.eye(5))
    np.testing.assert_allclose(found["purity"], 1)
    np.testing.assert_allclose(found["entropy"], 0, atol=1e-12)
    assert float(found["mean_purity_reference"]) < 0.45
    two = torch.zeros(1, 5)
    two[0, :2] = 1
    mixed = meanings(two)
    share = mixed["purity"].item()
    assert 0.5 <= share < 0.75
    np.testing.assert_allclose(mixed["entropy"], -share * np.log(share) - (1 - share) * np.log(1 - share))


def test_against_a_loop_and_a_rotation() -> None:
    inputs, kind = items()
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(5))
    found = meanings(weight)
    states = (inputs @ weight.T).numpy().astype(np.float64)
    for neuron in range(3):
        best = kind.numpy()[np.argsort(-states[:, neuron], kind="stable")[:20]]
        share = np.bincount(best) / 20
        np.testing.assert_allclose(found["purity"][0, neuron], share.max())
        np.testing.assert_allclose(found["entropy"][0, neuron], -(share[share > 0] * np.log(share[share > 0])).sum())
        np.testing.assert_allclose(found["kurtosis"][0, neuron], kurtosis(states[:, neuron]), rtol=1e-4)
    half = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
    turn = torch.block_diag(half, half, torch.ones(1, 1))
    assert float(meanings(turn)["mean_purity"]) < 0.9
    np.testing.assert_allclose(sharing(turn.T)["dimensionality"], 1, rtol=1e-5)  # not superposition


def test_the_references_are_hypergeometric() -> None:
    """Two labels of 100 items each: the top 20 of a random order hold a majority of 11.76 on average."""
    inputs = torch.randn(200, 2, generator=torch.Generator().manual_seed(7))
    found = Polysemanticity(inputs, torch.arange(200) % 2, module="0", top=20)(
        Snapshot(0, nn.Sequential(features(torch.eye(2))).float())
    )
    ways = np.array([math.comb(100, k) * math.comb(100, 20 - k) for k in range(21)], dtype=float)
    expected = (ways / ways.sum() * np.maximum(np.arange(21), 20 - np.arange(21))).sum() / 20
    np.testing.assert_allclose(found["mean_purity_reference"], expected, atol=4 * 0.065 / math.sqrt(200))


def test_errors_are_those_of_fresh_items() -> None:
    """Heavy tails: the kurtosis of a neuron hangs on its rarest items, which an error over neurons does not see."""
    weight = torch.eye(12) + 0.1 * torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    model = Snapshot(0, nn.Sequential(features(weight[:4])).float())
    found = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        inputs = torch.tensor(generator.laplace(size=(300, 12)), dtype=torch.float32)
        kind = inputs[:, :4].argmax(1)
        found.append(Polysemanticity(inputs, kind, module="0", top=16)(model))
    for name in ("mean_entropy", "mean_purity", "mean_kurtosis"):
        true = np.std([row[name] for row in found], ddof=1)
        reported = np.mean([row[f"{name}_se"] ** 2 for row in found]) ** 0.5
        assert 0.75 < reported / true < 1.6, (name, reported, true)
    # without a group the ranking, the label counts and the moments are those of the items that are left
    some, fewer = (Polysemanticity(inputs, kind, module="0", top=top) for top in (16, 14))
    states, label, group = inputs[None].double().numpy(), kind.numpy(), np.arange(300) % 8
    without = some._scores(states, label, group)[1]
    left = fewer._scores(states[:, group != 3], label[group != 3], group[group != 3])[0]
    for name, values in left.items():
        np.testing.assert_allclose(without[name][3], values, rtol=1e-9)


def test_dead_neurons_are_left_out() -> None:
    weight = torch.eye(5)
    weight[3] = 0
    found = meanings(weight)
    assert np.isnan(found["purity"].values[0]).tolist() == [False, False, False, True, False]
    assert float(found["mean_purity"]) == 1


def test_images_are_averaged_over_their_places() -> None:
    images = torch.randn(30, 2, 4, 4, generator=torch.Generator().manual_seed(8))
    conv = nn.Conv2d(2, 3, 1)

    class Places(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return conv(x).flatten(2).mT  # (batch, place, neuron)

    found = Polysemanticity(images, torch.arange(30) % 2, module="0", top=5)(Snapshot(0, nn.Sequential(Places())))
    states = conv(images).flatten(2).mean(2).detach().double().numpy()
    np.testing.assert_allclose(found["kurtosis"][0], kurtosis(states), rtol=1e-4)


def test_what_cannot_be_measured_is_said() -> None:
    inputs, kind = items()
    with pytest.raises(DataError, match=r"a label for each of \(200, 1\) items, got \(199, 1\)"):
        Polysemanticity(inputs, kind[:-1])
    with pytest.raises(DataError, match="got 1 labels, top 32"):
        Polysemanticity(inputs, kind * 0)
    with pytest.raises(InstrumentError, match="has no module 'hidden': it has 0"):
        Polysemanticity(inputs, kind, module="hidden")(Snapshot(0, nn.Sequential(features(torch.eye(5))).float()))
    twice = nn.Sequential(one := features(torch.eye(5)).float(), one)
    with pytest.raises(InstrumentError, match="a module that runs once"):
        Polysemanticity(inputs, kind, module="0")(Snapshot(0, twice))


def toy(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 5))


class TestSuperposition(InstrumentContract):
    without_error = dict.fromkeys(
        ("mean_dimensionality", "mean_interference", "directions"),
        "exact functions of the weights",
    )

    def instrument(self) -> Superposition:
        return Superposition("0.weight", columns=True)

    def model(self, seed: int) -> nn.Module:
        return toy(seed)


class TestPolysemanticity(InstrumentContract):
    def instrument(self) -> Polysemanticity:
        return Polysemanticity(*items(), module="1", top=10)

    def model(self, seed: int) -> nn.Module:
        return toy(seed)
