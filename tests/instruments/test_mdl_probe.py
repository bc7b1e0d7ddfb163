"""MDLProbe on streams that hold a label, against scikit-learn, and its contract."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from devmon.anatomy import residual_stream
from devmon.data import random_tokens
from devmon.errors import DataError, InstrumentError
from devmon.instruments.mdl_probe import DRAWS, PORTIONS, MDLProbe, _auc
from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly, InstrumentContract, Readable

VOCAB, LENGTH = 40, 16


def random_model(seed: int, width: int = 12) -> AttentionOnly:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5

    heads = [[(draw(width, width), draw(width, width))] for _ in range(2)]
    return AttentionOnly(draw(VOCAB, width), draw(LENGTH, width), heads, draw(width, VOCAB))


def measure(instrument: MDLProbe, model: nn.Module) -> xr.Dataset:
    return instrument(Snapshot(0, model.eval()))


def test_a_readable_label_costs_next_to_nothing_after_the_first_block() -> None:
    """Layer 1 holds the label itself: a few labels buy all others. Layer 0 holds nothing of it."""
    label = torch.arange(64) % 4
    tokens = random_tokens(64, 200, LENGTH)
    found = measure(MDLProbe(tokens, label[tokens], portions=(0.05, 0.1, 0.2, 0.5, 1.0), penalty=0.01), Readable(label))
    assert float(found["extra_mdl"][1]) < 0.01
    np.testing.assert_allclose(found["mdl"][1], 0.05 * 2 + 0.95 * found["extra_mdl"][1], rtol=1e-9)
    assert float(found["compression"][1]) > 18
    np.testing.assert_allclose([found["accuracy"][1], found["auc"][1]], 1.0, rtol=1e-12)
    np.testing.assert_allclose(found["compression"][0], 1.0, atol=0.02)
    assert abs(float(found["auc"][0]) - 0.5) < 0.06
    assert float(found["selectivity"][1]) > 1
    early = measure(
        MDLProbe(tokens, label[tokens], portions=(0.005, 0.02, *PORTIONS[-5:]), penalty=0.01), Readable(label)
    )
    assert float(early["control_compression"][2]) > 4, "layer 2 holds the types: the control task is learned by heart"
    assert float(early["control_compression"][2]) < 0.5 * float(early["compression"][2]), "at a price"
    assert float(early["compression"][2]) > 25


def test_random_labels_do_not_compress() -> None:
    tokens = random_tokens(VOCAB, 200, LENGTH)
    labels = random_tokens(4, 200, LENGTH, 9)
    found = measure(MDLProbe(tokens, labels, penalty=30.0), random_model(0))
    np.testing.assert_allclose(found["compression"], 1.0, atol=0.03)
    np.testing.assert_allclose(found["prior_mdl"], 2.0, atol=0.02)
    np.testing.assert_allclose(found["auc"], 0.5, atol=0.05)
    assert (np.abs(found["accuracy"] - 0.25) < 4 * found["accuracy_se"] + 0.01).all()


def test_labels_of_unequal_frequency_compress_without_features() -> None:
    tokens = random_tokens(VOCAB, 200, LENGTH)
    labels = (random_tokens(10, 200, LENGTH, 9) == 0).long()
    found = measure(MDLProbe(tokens, labels, penalty=30.0), random_model(0))
    entropy = -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9))
    np.testing.assert_allclose(found["prior_mdl"], entropy, atol=0.04)
    np.testing.assert_allclose(found["mdl"], entropy, atol=0.06)


def _variance(cost: np.ndarray, task: Any) -> float:
    """Of the mean, by plain loops: sequences within their block."""
    whole = 0.0
    for block in range(task.block.max() + 1):
        own = task.block == block
        names = np.unique(task.sequence[own])
        beyond = [(cost[task.sequence == name] - cost[own].mean()).sum() for name in names]
        whole += sum(x**2 for x in beyond) * len(names) / (len(names) - 1)
    return whole / len(cost) ** 2


def test_against_scikit_learn() -> None:
    model = random_model(5)
    tokens = random_tokens(VOCAB, 24, LENGTH, 1)
    noise = random_tokens(10, 24, LENGTH, 2)
    labels = torch.where(noise < 7, tokens % 3, noise % 3) + 4
    labels[noise == 9] = -100
    instrument = MDLProbe(tokens, labels, portions=(0.1, 0.3, 1.0), penalty=2.0)
    found, task = measure(instrument, model), instrument._task()
    used = (labels != -100).numpy()
    assert task.block.max() == 2
    sequences = [len(np.unique(task.sequence[task.block == block])) for block in range(3)]
    assert sequences == [2, 5, 17]
    for layer, state in enumerate(residual_stream(model, tokens)):
        x = state.numpy()[used]
        x = np.column_stack([(x - x.mean(0)) / x.std(0), np.ones(len(x))])
        bits = []
        for y in (labels.numpy()[used] - 4, *task.control):
            cost = np.full(len(y), math.log2(3))
            for block in (1, 2):
                known, coming = task.block < block, task.block == block
                assert set(y[known]) == {0, 1, 2}
                probe = LogisticRegression(C=1 / 2.0, fit_intercept=False, tol=1e-8, max_iter=5000)
                chance = probe.fit(x[known], y[known]).predict_proba(x[coming])
                cost[coming] = -np.log2(chance[np.arange(len(chance)), y[coming]])
            bits.append(cost)
            if len(bits) == 1:
                variance = _variance(cost, task)
                np.testing.assert_allclose(found["mdl"][layer], cost.mean(), rtol=1e-5)
                np.testing.assert_allclose(found["mdl_se"][layer], variance**0.5, rtol=1e-4)
                np.testing.assert_allclose(found["compression"][layer], math.log2(3) / cost.mean(), rtol=1e-5)
                np.testing.assert_allclose(found["extra_mdl"][layer], cost[task.block > 0].mean(), rtol=1e-5)
                np.testing.assert_allclose(found["accuracy"][layer], (chance.argmax(1) == y[coming]).mean(), rtol=1e-9)
                areas = [roc_auc_score(y[coming] == k, chance[:, k]) for k in range(3)]
                np.testing.assert_allclose(found["auc"][layer], np.mean(areas), atol=1e-4)
        mine, control = bits[0], np.array(bits[1:])
        assert len(control) == DRAWS
        np.testing.assert_allclose(found["control_mdl"][layer], control.mean(), rtol=1e-5)
        np.testing.assert_allclose(found["selectivity"][layer], control.mean() - mine.mean(), atol=1e-5)
        variance = _variance(control.mean(0) - mine, task) + control.mean(1).var(ddof=1) / DRAWS
        np.testing.assert_allclose(found["selectivity_se"][layer], variance**0.5, rtol=1e-3)
    assert float(found["compression_se"][0]) > 0


def test_auc_against_its_definition_with_ties() -> None:
    generator = np.random.default_rng(0)
    chances, label = generator.integers(0, 4, (30, 3)).astype(float), generator.integers(0, 3, 30)
    areas = []
    for k in range(3):
        own, rest = chances[label == k, k], chances[label != k, k]
        areas.append(np.mean([(a > b) + (a == b) / 2 for a in own for b in rest]))
    np.testing.assert_allclose(_auc(chances, label), np.mean(areas), rtol=1e-12)
    assert math.isnan(_auc(chances, np.zeros(30, dtype=np.int64)))


def test_blocks_are_whole_sequences_in_random_order() -> None:
    tokens = random_tokens(VOCAB, 1000, 3)
    task = MDLProbe(tokens, tokens % 2)._task()
    first = [int(np.flatnonzero(task.block == block).min()) for block in range(11)]
    assert task.ends.tolist() == [round(1000 * portion) for portion in PORTIONS]
    assert first != sorted(first)
    for sequence in range(1000):
        assert len(set(task.block[task.sequence == sequence])) == 1
    assert [len(np.unique(task.sequence[task.block == b])) for b in (0, 1, 10)] == [1, 1, 500]
    assert not np.array_equal(task.block, MDLProbe(tokens, tokens % 2, seed=1)._task().block)
    few = MDLProbe(tokens[:12], tokens[:12] % 2)._task()
    assert few.ends.tolist() == [1, 2, 3, 6, 12], "equal cuts are one"


def test_a_class_that_comes_up_late_costs_bits_and_no_error() -> None:
    tokens = random_tokens(VOCAB, 40, LENGTH)
    instrument = MDLProbe(tokens, tokens % 2)
    late = (tokens % 2).clone()
    late[torch.tensor(instrument._task().sequence[instrument._task().block == 3][0]), 0] = 2
    found = measure(MDLProbe(tokens, late), random_model(1))
    assert np.isfinite(found["mdl"]).all()


def test_constant_features_say_nothing() -> None:
    """A label that stands in the last digits of a constant is rounding, and must not be read."""
    tokens = random_tokens(64, 60, LENGTH)
    model = Readable(torch.arange(64) % 4)
    model.embed.data[:] = 5 + 1e-12 * (torch.arange(64) % 4).double()[:, None]
    found = measure(MDLProbe(tokens, tokens % 4), model)
    np.testing.assert_allclose(found["mdl"][0], found["prior_mdl"], rtol=1e-3)
    assert float(found["compression"][1]) > 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"labels": torch.zeros(20, LENGTH, dtype=torch.int64)}, "two classes"),
        ({"labels": torch.full((20, LENGTH), -100)}, "two classes"),
        ({"labels": random_tokens(3, 20, 5)}, "of one shape"),
        ({"portions": (0.5, 0.2, 1.0)}, "increasing portions"),
        ({"portions": (0.5,)}, "end with 1"),
        ({"portions": (1.0,)}, "two blocks"),
        ({"penalty": 0.0}, "penalty > 0"),
    ],
)
def test_refusals(wrong: dict[str, Any], message: str) -> None:
    tokens = random_tokens(VOCAB, 20, LENGTH)
    with pytest.raises(DataError, match=message):
        MDLProbe(**{"tokens": tokens, "labels": tokens % 3, **wrong})
    with pytest.raises(InstrumentError, match=r"^MDLProbe needs the residual stream.*set blocks"):
        measure(MDLProbe(tokens, tokens % 3), nn.Embedding(VOCAB, 4))


class TestMDLProbe(InstrumentContract):
    def instrument(self) -> MDLProbe:
        tokens = random_tokens(VOCAB, 16, 8)
        return MDLProbe(tokens, tokens % 3, portions=(0.1, 0.3, 1.0))

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)
