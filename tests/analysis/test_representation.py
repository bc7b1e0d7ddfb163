"""Sketches, and the drift and similarity derived from them: closed forms, a slow reference, permutations, contract."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.analysis.derive.representation import cka, cka_test, drift, similarity
from devmon.anatomy import residual_stream
from devmon.data import random_tokens
from devmon.errors import DataError, InstrumentError
from devmon.instruments.representation_sketch import Sketch
from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly, InstrumentContract

VOCAB, LENGTH, WIDTH = 30, 12, 24


def random_model(seed: int) -> AttentionOnly:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.4

    heads = [[(draw(WIDTH, WIDTH), draw(WIDTH, WIDTH)) for _ in range(2)] for _ in range(2)]
    return AttentionOnly(draw(VOCAB, WIDTH), draw(LENGTH, WIDTH), heads, draw(WIDTH, VOCAB))


def between(one: nn.Module, two: nn.Module, share: float) -> nn.Module:
    """A model whose weights lie at `share` of the way from one to two."""
    mixed = random_model(0)
    for target, a, b in zip(mixed.parameters(), one.parameters(), two.parameters(), strict=True):
        target.data = (1 - share) * a.data + share * b.data
    return mixed


def measure(instrument: Sketch, model: nn.Module) -> xr.Dataset:
    return instrument(Snapshot(0, model.eval()))


TOKENS = random_tokens(VOCAB, 20, LENGTH)


# --- the sketch ---------------------------------------------------------------------------------------------------


def test_wide_sketches_are_the_states() -> None:
    model, places = random_model(0), [2, 5, 8, 11]
    found = measure(Sketch(TOKENS, dims=64, outputs=True, batch_size=7), model)
    assert found["sketch"].shape == (3, 80, WIDTH)
    for layer, state in enumerate(residual_stream(model, TOKENS)):
        states = state[:, places].flatten(0, 1).numpy()
        np.testing.assert_allclose(found["sketch"][layer], states, rtol=1e-6, atol=1e-6)
        away = ((states - states.mean(0)) ** 2).mean(1)
        np.testing.assert_allclose(found["spread"][layer], away.mean(), rtol=1e-10)
        se = away.reshape(20, 4).mean(1).std(ddof=1) / math.sqrt(20)
        np.testing.assert_allclose(found["spread_se"][layer], se, rtol=1e-10)
    with torch.no_grad():
        scores = model(TOKENS)[:, places].flatten(0, 1).numpy()
    np.testing.assert_allclose(found["outputs"], scores - scores.mean(1, keepdims=True), rtol=1e-6, atol=1e-6)
    assert found["sequence"].values.tolist() == [s for s in range(20) for _ in places]
    assert found["pos"].values.tolist() == places * 20
    assert found["sketch"].dtype == np.float32


def test_inner_products_and_products_of_kernels_survive_on_average() -> None:
    states = residual_stream(random_model(1), TOKENS)[2][:, [2, 5, 8, 11]].flatten(0, 1).numpy()[:12]
    true = states @ states.T
    grams = []
    for seed in range(400):
        sketch = measure(Sketch(TOKENS, dims=8, seed=seed), random_model(1))["sketch"][2].values[:12].astype(float)
        grams.append([half @ half.T for half in np.split(sketch, 2, axis=1)])
    first, second = np.array(grams).transpose(1, 0, 2, 3)
    for values in (first, second):
        z = (values.mean(0) - true) / (values.std(0) / math.sqrt(400))
        assert np.abs(z).max() < 5, np.abs(z).max()
    across, within = (first * second).sum((1, 2)), (first * first).sum((1, 2))
    z = (across.mean() - (true**2).sum()) / (across.std() / math.sqrt(400))
    assert abs(z) < 4, z
    assert within.mean() > 1.2 * (true**2).sum(), "one half alone would be too large"


def test_the_directions_are_the_same_at_every_step_and_layer() -> None:
    one = Sketch(TOKENS, dims=6)
    same = measure(one, random_model(0))
    np.testing.assert_array_equal(same["sketch"][0], measure(one, random_model(0))["sketch"][0])
    narrow = Sketch(TOKENS, dims=WIDTH - 2)
    model = random_model(2)
    for parameter in model.blocks.parameters():
        parameter.data.zero_()
    found = measure(narrow, model)["sketch"]
    np.testing.assert_allclose(found[0], found[2], rtol=1e-6)
    assert not np.allclose(same["sketch"], measure(Sketch(TOKENS, dims=6, seed=1), random_model(0))["sketch"])
    only = measure(Sketch(TOKENS, layers=False, outputs=True, dims=6), nn.Embedding(VOCAB, VOCAB))
    assert set(only.data_vars) == {"outputs", "output_spread", "output_spread_se", "output_spread_replicates"}


@pytest.mark.parametrize(
    "wrong",
    [{"positions": (LENGTH,)}, {"positions": ()}, {"dims": 0}, {"dims": 7}, {"tokens": TOKENS[:1]}, {"layers": False}],
)
def test_sketch_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="Sketch"):
        Sketch(**{"tokens": TOKENS, **wrong})
    with pytest.raises(InstrumentError, match=r"^Sketch needs the residual stream.*set blocks"):
        measure(Sketch(TOKENS), nn.Embedding(VOCAB, 4))


def test_positions_may_count_from_the_end() -> None:
    assert Sketch(TOKENS, positions=(-1, 3)).positions == (3, LENGTH - 1)
    assert Sketch(TOKENS[:, :2]).positions == (0, 1)


# --- CKA ----------------------------------------------------------------------------------------------------------


def song(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased HSIC of Song et al. 2012, eq. 5, as it is written there."""
    n, one = len(x), np.ones(len(x))
    k, lam = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(lam, 0)
    total = np.trace(k @ lam) + (one @ k @ one) * (one @ lam @ one) / ((n - 1) * (n - 2))
    return float((total - 2 / (n - 2) * one @ k @ lam @ one) / (n * (n - 3)))


@pytest.mark.parametrize("items", [4, 9, 40])
def test_debiased_cka_against_the_formula_of_the_paper(items: int) -> None:
    generator = np.random.default_rng(items)
    x, y = generator.normal(3, 1, (items, 5)), generator.normal(0, 1, (items, 8)) ** 3
    y[:, 0] += 3 * x[:, 0]
    np.testing.assert_allclose(cka(x, y), song(x, y) / math.sqrt(song(x, x) * song(y, y)), rtol=1e-9)
    xc, yc = x - x.mean(0), y - y.mean(0)
    plain = np.sum((xc.T @ yc) ** 2) / np.linalg.norm(xc.T @ xc) / np.linalg.norm(yc.T @ yc)
    np.testing.assert_allclose(cka(x, y, debiased=False), plain, rtol=1e-9)


def test_cka_sees_neither_rotation_nor_scale_nor_offset() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(30, 6)) * np.arange(1, 7)
    rotation = np.linalg.qr(generator.normal(size=(9, 9)))[0][:6]  # into more dimensions
    for moved in (x @ rotation, 1e-3 * x, x + 1e6, -5 * x @ rotation + 1e4):
        np.testing.assert_allclose([cka(x, moved), cka(x, moved, debiased=False)], 1.0, rtol=1e-6)
    assert cka(x, x @ np.diag([1, 1, 1, 1, 1, 0.0])) < 0.9
    assert math.isnan(cka(x, np.ones((30, 2))))


def test_independent_states_score_0_and_only_debiased() -> None:
    """Features ten times the items: the plain estimator says .9 of nothing."""
    generator = np.random.default_rng(1)
    rows = [
        (cka(x, y), cka(x, y, debiased=False)) for x, y in (generator.normal(size=(2, 50, 500)) for _ in range(200))
    ]
    unbiased, biased = np.array(rows).T
    z = unbiased.mean() / (unbiased.std() / math.sqrt(200))
    assert abs(z) < 3, z
    assert unbiased.std() < 0.03
    assert biased.min() > 0.85, biased.min()


def test_permutation_p_values_are_calibrated_and_strong() -> None:
    generator = np.random.default_rng(2)
    p = [cka_test(*generator.normal(size=(2, 24, 10)), permutations=99, seed=i)[1] for i in range(200)]
    assert 0.02 < np.mean(np.array(p) <= 0.1) < 0.18
    assert abs(np.mean(p) - 0.5) < 0.08
    x = generator.normal(size=(24, 10))
    value, small = cka_test(x, x + generator.normal(size=(24, 10)), permutations=199)
    assert small == 1 / 200
    np.testing.assert_allclose(value, cka(x, x), atol=0.9)


def test_whole_sequences_change_places() -> None:
    """Five items of a sequence share its state: single items would make a few sequences look like strong evidence."""
    generator = np.random.default_rng(3)
    sequence = np.repeat(np.arange(8), 5)
    by_item, by_sequence = [], []
    for seed in range(60):
        x, y = generator.normal(size=(2, 8, 4)).repeat(5, axis=1) + 0.1 * generator.normal(size=(2, 40, 4))
        by_item.append(cka_test(x, y, permutations=49, seed=seed)[1])
        by_sequence.append(cka_test(x, y, sequence=sequence, permutations=49, seed=seed)[1])
    assert np.mean(np.array(by_item) <= 0.05) > 0.3
    assert np.mean(np.array(by_sequence) <= 0.05) < 0.15
    with pytest.raises(DataError, match="as many items in each sequence"):
        cka_test(x, y, sequence=np.append(sequence[1:], 9))


# --- from a stored run --------------------------------------------------------------------------------------------


def stored(shares: list[float], **settings: Any) -> xr.Dataset:
    one, two = random_model(0), random_model(1)
    rows = [measure(Sketch(TOKENS, **settings), between(one, two, share)) for share in shares]
    return xr.concat(rows, xr.DataArray([100 * i for i in range(len(shares))], dims="step", name="step"))


def test_drift_of_a_walk_from_one_model_to_another() -> None:
    shares = [0.0, 0.25, 0.25, 0.5, 0.75, 1.0]
    dataset = stored(shares, outputs=True)
    found = drift(dataset)
    assert found["drift"].dims == ("step", "layer")
    for layer in range(3):
        states = dataset["sketch"].values[:, layer]
        np.testing.assert_allclose(found["drift"][:, layer], [1 - cka(s, states[-1]) for s in states], atol=1e-9)
        expected = [1 - cka(a, b) for a, b in zip(states[:-1], states[1:], strict=True)]
        np.testing.assert_allclose(found["change"][1:, layer], expected, atol=1e-9)
    assert np.isnan(found["change"][0]).all()
    np.testing.assert_allclose(found["drift"][-1], 0.0, atol=1e-9)
    np.testing.assert_allclose(found["change"].sel(step=200), 0.0, atol=1e-9)
    assert (found["drift"][0] > 0.5).all()
    assert (found["drift"].diff("step").sel(step=[100, 300, 400, 500]) < 0).all(), "it comes nearer with every step"
    assert (found["drift_se"][0] > 0.01).all()
    np.testing.assert_allclose(found["drift_se"][-1], 0.0, atol=1e-9)
    outputs = drift(dataset, variable="outputs")
    assert outputs["drift"].dims == ("step",)
    np.testing.assert_allclose(
        outputs["drift"][0], 1 - cka(dataset["outputs"][0].values, dataset["outputs"][-1].values), atol=1e-9
    )


def test_drift_error_covers() -> None:
    generator = np.random.default_rng(5)
    mixing = generator.normal(size=(6, 6))
    values, errors = [], []
    for _ in range(50):
        start, noise = generator.normal(size=(2, 30, 6)).repeat(4, axis=1)  # four equal items a sequence
        start = start + 0.1 * generator.normal(size=(120, 6))
        end = start @ mixing + 2 * noise
        dataset = xr.Dataset(
            {"sketch": (("step", "item", "feature"), np.stack([start, end]))},
            coords={"step": [0, 1], "sequence": ("item", np.arange(120) // 4)},
        )
        found = drift(dataset)
        values.append(float(found["drift"][0]))
        errors.append(float(found["drift_se"][0]))
    ratio = np.sqrt(np.mean(np.square(errors))) / np.std(values)
    assert 0.75 < ratio < 1.3, ratio


def test_similarity_of_all_pairs() -> None:
    dataset = stored([0.0, 0.5, 1.0])
    steps = similarity(dataset, permutations=19)
    layers = similarity(dataset, "layers", permutations=19)
    assert steps["cka"].dims == ("layer", "step", "other_step")
    assert layers["cka"].dims == ("step", "layer", "other_layer")
    states = dataset["sketch"].values
    for i in range(3):
        for j in range(3):
            np.testing.assert_allclose(steps["cka"][1, i, j], cka(states[i, 1], states[j, 1]), atol=1e-9)
            np.testing.assert_allclose(layers["cka"][1, i, j], cka(states[1, i], states[1, j]), atol=1e-9)
    np.testing.assert_allclose([steps["cka"][0, 2, 2], layers["cka"][0, 2, 2]], 1.0, rtol=1e-9)
    assert float(layers["p"][0, 0, 1]) == 1 / 20
    noise = xr.Dataset(
        {"sketch": (("step", "item", "feature"), np.random.default_rng(0).normal(size=(12, 40, 30)))},
        coords={"step": np.arange(12)},
    )
    p = similarity(noise, permutations=99)["p"].values[0][np.triu_indices(12, 1)]
    assert 0.3 < p.mean() < 0.7
    assert (p <= 0.05).mean() < 0.2


def test_sketches_keep_similarity_on_average() -> None:
    """Half against half has no bias; the whole sketch against itself would be lower by a tenth."""
    shares = [0.0, 0.6, 1.0]
    whole = similarity(stored(shares))["cka"].values
    found, naive = [], []
    for seed in range(40):
        dataset = stored(shares, dims=16, seed=seed)
        assert dataset["sketch"].attrs["halves"] == 2
        found.append(similarity(dataset)["cka"].values)
        dataset["sketch"].attrs["halves"] = 1
        naive.append(similarity(dataset)["cka"].values)
    np.testing.assert_allclose(np.array(found)[:, :, range(3), range(3)], 1.0, rtol=1e-9)
    off = ~np.eye(3, dtype=bool)
    bias = (np.mean(found, 0) - whole)[:, off]
    assert np.abs(bias).max() < 0.04, bias
    assert (np.mean(naive, 0) - whole)[:, off].min() < -0.08
    at = drift(stored(shares, dims=16, seed=3))["drift"].sel(step=0)
    np.testing.assert_allclose(at, 1 - np.array(found)[3, :, 0, 2], atol=1e-9)


def test_derivations_refuse() -> None:
    dataset = stored([0.0, 1.0])
    with pytest.raises(DataError, match="no 'other' over items.*spread"):
        drift(dataset, variable="other")
    with pytest.raises(DataError, match="two steps"):
        drift(dataset.isel(step=[0]))
    with pytest.raises(DataError, match="8 items"):
        similarity(dataset.isel(item=slice(4)))
    with pytest.raises(DataError, match="'steps' or 'layers'"):
        similarity(dataset, "heads")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="same items"):
        cka(np.ones((5, 2)), np.ones((6, 2)))
    with pytest.raises(DataError, match="4 items at least"):
        cka(np.ones((3, 2)), np.ones((3, 2)))


class Sketching(InstrumentContract):
    def model(self, seed: int) -> nn.Module:
        return random_model(seed)


class TestSketch(Sketching):
    def instrument(self) -> Sketch:
        return Sketch(TOKENS, dims=8)


class TestSketchOfOutputs(Sketching):
    def instrument(self) -> Sketch:
        return Sketch(TOKENS, dims=8, layers=False, outputs=True)
