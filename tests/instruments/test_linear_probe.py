"""LinearProbe on labels that a layer holds, against scikit-learn, and on images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from devmon.anatomy import residual_stream
from devmon.data import clustered_mean, random_tokens
from devmon.errors import DataError, InstrumentError
from devmon.instruments import LinearProbe
from devmon.testing import Readable
from tests.support.models import VOCAB, NoAttention, random_model, snapshot


def all_types(types: int, sequences: int, seed: int = 0) -> Tensor:
    """Sequences that hold every type once, in random order: training and test halves have equal frequencies."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(types, generator=generator) for _ in range(sequences)])


def test_label_is_read_from_the_layer_that_holds_it() -> None:
    label = torch.tensor([0] * 18 + [1] * 8 + [2] * 6)  # even numbers of types: the sign at layer 0 tells nothing
    tokens = all_types(32, 12)
    instrument = LinearProbe(tokens, label[tokens])
    found = instrument(snapshot(Readable(label)))
    majority = 18 / 32
    np.testing.assert_allclose(found["majority"], majority, rtol=1e-12)
    np.testing.assert_allclose(found["accuracy"], [majority, 1, 1], rtol=1e-12)
    np.testing.assert_allclose(found["r2"], [0, 1, 1], atol=1e-2)
    features = np.column_stack([np.eye(3)[label], 1 - 2 * (np.concatenate([np.arange(n) for n in (18, 8, 6)]) % 2)])
    shares = []
    for draw in instrument._task().control:
        control = np.zeros(32, dtype=int)
        control[tokens.numpy().ravel()] = draw
        guess = features @ np.linalg.lstsq(features, np.eye(3)[control], rcond=None)[0]  # all types are as frequent
        shares.append((guess.argmax(1) == control).mean())
    known = np.mean(shares)
    # with all types in every sequence the draw of labels is all the error there is
    expected = [np.std(shares, ddof=1) / len(shares) ** 0.5, 0]
    np.testing.assert_allclose(found["selectivity_se"][1:], expected, atol=1e-12)
    np.testing.assert_allclose(found["control_accuracy"][1], known, rtol=1e-12)
    np.testing.assert_allclose(found["selectivity"][1], 1 - known, rtol=1e-12)
    np.testing.assert_allclose(found["control_accuracy"][2], 1.0, rtol=1e-12)
    np.testing.assert_allclose(found["selectivity"], found["accuracy"] - found["control_accuracy"], rtol=1e-12)
    assert float(found["selectivity"][1]) > 0.2
    assert float(found["selectivity"][2]) == 0.0


def test_probe_against_scikit_learn() -> None:
    model = random_model(5)
    tokens, generator = random_tokens(VOCAB, 20, 24, 1), torch.Generator().manual_seed(9)
    labels = (tokens + torch.randint(2, tokens.shape, generator=generator)) % 4
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    instrument = LinearProbe(tokens, labels, penalty=0.01)
    found, task = instrument(snapshot(model)), instrument._task()
    train = np.zeros(20, bool)
    train[np.unique(task.of.sequence[task.of.train])] = True
    assert train.sum() == 10
    used = labels != -100
    controls = []
    for draw in task.control:
        controls.append(torch.full_like(labels, -100))
        controls[-1][used] = torch.tensor(draw)
    half = {part: used & torch.tensor(train == part)[:, None] for part in (True, False)}
    for layer, state in enumerate(residual_stream(model, tokens)):
        mean, sd = state[half[True]].mean(0), state[half[True]].std(0, correction=0)
        x = {part: ((state - mean) / sd)[where].numpy() for part, where in half.items()}
        by_chance = []
        for target in (labels, *controls):
            y = {part: F.one_hot(target[where], 4).double().numpy() for part, where in half.items()}
            guess = Ridge(alpha=0.01 * len(x[True])).fit(x[True], y[True]).predict(x[False])
            hits = guess.argmax(1) == y[False].argmax(1)
            if target is not labels:
                by_chance.append(hits.mean())
            else:
                np.testing.assert_allclose(found["accuracy"][layer], hits.mean(), rtol=1e-10)
                r2 = 1 - ((y[False] - guess) ** 2).sum() / ((y[False] - y[True].mean(0)) ** 2).sum()
                np.testing.assert_allclose(found["r2"][layer], r2, rtol=1e-8)
                by_sequence = half[False].nonzero()[:, 0].numpy()
                total, count = np.bincount(by_sequence, hits), np.bincount(by_sequence)
                np.testing.assert_allclose(found["accuracy_se"][layer], clustered_mean(total, count)[1], rtol=1e-8)
        np.testing.assert_allclose(found["control_accuracy"][layer], np.mean(by_chance), rtol=1e-10)
    assert float(found["accuracy"][0]) > float(found["majority"]) + 0.1


def test_sequences_do_not_leak_from_training_to_test() -> None:
    """Each sequence has its own token and its own label: known tokens tell all, held-out sequences nothing."""
    tokens = torch.arange(40)[:, None].expand(40, 6)
    label = torch.randint(2, (40,), generator=torch.Generator().manual_seed(0))
    found = LinearProbe(tokens, label[tokens])(snapshot(Readable(torch.zeros(40, dtype=torch.int64))))
    np.testing.assert_allclose(found["accuracy"][2], found["majority"], atol=1e-12)


def test_control_labels_belong_to_types_and_follow_the_label_frequencies() -> None:
    tokens = all_types(400, 6)
    labels = torch.where(tokens % 5 == 0, 9, 4)
    labels[0, :50] = -100
    for types in (None, tokens // 2):
        instrument = LinearProbe(tokens, labels, types)
        task = instrument._task()
        kinds = (tokens if types is None else types)[labels != -100].numpy()
        for draw in task.control:
            assert all(len(set(draw[kinds == kind])) == 1 for kind in range(kinds.max() + 1))
        assert len({tuple(draw) for draw in task.control}) == len(task.control) == 8
        assert 0.12 < task.control.mean() < 0.28, "a fifth of the labels are nines"
    assert not np.array_equal(task.control, replace(instrument, seed=1)._task().control)


def test_ignored_labels_and_constant_features_say_nothing() -> None:
    tokens = all_types(32, 12)
    labels = tokens % 2
    hidden = labels.clone()
    hidden[:, ::3] = -100
    model = Readable(torch.arange(32) % 2)
    found = LinearProbe(tokens, hidden)(snapshot(model))
    np.testing.assert_allclose(found["accuracy"][1:], 1.0, rtol=1e-12)
    assert np.isfinite(found["r2"]).all()


def test_linear_probe_refuses_what_it_cannot_train_on() -> None:
    tokens = all_types(8, 6)
    with pytest.raises(DataError, match="of one shape"):
        LinearProbe(tokens, tokens[:, :4])
    with pytest.raises(DataError, match="two classes in the training half"):
        LinearProbe(tokens, torch.zeros_like(tokens))
    with pytest.raises(DataError, match="two classes in the training half"):
        LinearProbe(tokens[:2], tokens[:2])
    with pytest.raises(DataError, match="penalty > 0"):
        LinearProbe(tokens, tokens, penalty=0.0)
    with pytest.raises(
        InstrumentError, match=r"^LinearProbe needs the residual stream; NoAttention has no .*set blocks"
    ):
        LinearProbe(tokens, tokens)(snapshot(NoAttention()))


class Brightness(nn.Module):
    """Blocks over images of 4 places: the first writes the mean brightness, the second its sign, into every place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), nn.Hardtanh(-1e-6, 1e-6)])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        state = images.flatten(2).transpose(1, 2).mean((1, 2), keepdim=True).expand(-1, 4, 2)
        for block in self.blocks:
            state = block(state)
        return state


def test_linear_probe_of_images_takes_the_mean_over_places() -> None:
    images = torch.randn(200, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = (images.mean((1, 2, 3)) > 0).long()
    found = LinearProbe(images, labels)(snapshot(Brightness()))
    assert float(found["accuracy"][2]) == 1.0
    assert float(found["r2"][2]) > 0.999 > 0.9 > float(found["r2"][1])
    assert abs(float(found["control_accuracy"][2]) - 0.5) < 0.15  # no type comes twice: nothing to memorise
    with pytest.raises(DataError, match=r"labels \(batch,\) for inputs"):
        LinearProbe(images, labels[:50])
