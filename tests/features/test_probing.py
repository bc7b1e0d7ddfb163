"""Labels and latents: planted classes, a spurious attribute, and the hierarchy in which a child absorbs its parent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from devmon.errors import DataError
from devmon.features import BatchTopK, Dictionary, Matryoshka, Training, train
from devmon.features.objectives import Objective
from devmon.features.probing import absorption, sparse_probing, spurious_removal, targeted_perturbation

RNG = np.random.default_rng(0)
ITEMS, CLASSES, LATENTS, D = 1800, 6, 30, 20
LABEL = RNG.integers(0, CLASSES, ITEMS)
W = np.linalg.qr(RNG.normal(size=(LATENTS, LATENTS)))[0][:, :D]
W = W / np.linalg.norm(W, axis=1, keepdims=True)


def planted() -> tuple[np.ndarray, np.ndarray]:
    """Latent c + 3 tells class c; all others are noise of the same size; a share of x is no latent's."""
    rng = np.random.default_rng(1)
    f = rng.exponential(size=(ITEMS, LATENTS)) * (rng.random((ITEMS, LATENTS)) < 0.2)
    f[:, 3:9] = (LABEL[:, None] == np.arange(CLASSES)) * (1 + rng.random((ITEMS, CLASSES)))
    return f, f @ W + 0.3 * rng.normal(size=(ITEMS, D))


def test_the_latent_of_a_class_is_a_probe_of_it() -> None:
    f, x = planted()
    found = sparse_probing(f, x, LABEL)
    assert found["best"][:, 0].values.tolist() == [3, 4, 5, 6, 7, 8]
    assert float(found["accuracy"].sel(few=1)) > 0.99
    assert float(found["accuracy_channels"].sel(few=1)) < 0.9
    assert float(found["accuracy_full"]) > 0.9
    majority = float(found["majority"])
    assert abs(float(found["accuracy_shuffled"].sel(few=1)) - majority) < 0.05
    assert 0.8 < majority < 0.87


def test_erasing_the_latents_of_a_class_hurts_its_own_probe() -> None:
    f, x = planted()
    found = targeted_perturbation(f, x, W, LABEL)
    at = found.sel(erased=2)
    assert float(at["own"]) > 0.1
    assert float(at["score"]) > 0.05 > abs(float(at["score_random"])), at
    assert found["erased"].values.tolist() == [2, 5, 10, 20]


def test_erasing_a_spurious_label_mends_the_probe() -> None:
    """The attribute is told by latents 7 and 8, the label by 3 and 4, both seen by a probe trained where they agree."""
    rng = np.random.default_rng(2)
    own, other = rng.integers(0, 2, (2, 2000))
    f = rng.exponential(size=(2000, LATENTS)) * (rng.random((2000, LATENTS)) < 0.2)
    f[:, 3], f[:, 4], f[:, 7], f[:, 8] = own * 0.6, (1 - own) * 0.6, other * 1.5, (1 - other) * 1.5
    x = f @ W + 0.25 * rng.normal(size=(2000, D))
    found = spurious_removal(f, x, W, own, other)
    assert float(found["biased"]) < float(found["clean"]) - 0.05
    assert float(found["score"].sel(erased=2)) > 0.15
    assert abs(float(found["score_random"].sel(erased=2))) < 0.1
    with pytest.raises(DataError, match="four combinations"):
        spurious_removal(f, x, W, own, own)


class Hierarchy:
    """A parent in 30% of places, a child in 30% of those, eight others in 10%: ten orthonormal directions."""

    places, batch = float("inf"), 512
    rows = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(0)))[0].T

    def present(self, step: int) -> Tensor:
        drawn = torch.rand(512, 10, generator=torch.Generator().manual_seed(step))
        there = drawn < torch.tensor([0.3, 0.3] + [0.1] * 8)
        there[:, 1] &= there[:, 0]
        return there

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        x = self.present(step).float() @ self.rows
        return x, x


@pytest.mark.parametrize(
    "objective, fires, cosines",
    [(BatchTopK(1.1), 0.0, (0.70, 0.71)), (Matryoshka(1.1, (1, 3, 6)), 1.0, (-0.25, 0.94))],
)
def test_a_child_absorbs_its_parent_where_that_is_sparser(
    objective: Objective, fires: float, cosines: tuple[float, float]
) -> None:
    source = Hierarchy()
    coder = train(Training(objective, width=1, steps=700, lr=2e-3), source).dictionary
    assert isinstance(coder, Dictionary)
    x, there = source(9999)[0], source.present(9999)
    unit = coder.W_dec @ source.rows.T  # (latent, feature)
    child = int(unit[:, 1].argmax())
    parent = int(unit[:, 0].argsort(descending=True)[0 if int(unit[:, 0].argmax()) != child else 1])
    f = coder.encode(x)
    both = there[:, 1]
    assert abs(float((f[both, parent] > 0).float().mean()) - fires) < 0.05
    np.testing.assert_allclose(unit[child, :2], cosines, atol=0.15)


def test_absorption_by_hand() -> None:
    """A parent in half of 4000 places; in 4% of them one of four children writes it instead, at a cosine of .6."""
    parent = np.arange(4000) < 2000
    child = np.where(parent & (np.arange(4000) % 25 == 0), np.arange(4000) // 25 % 4, -1)
    f = np.zeros((4000, 5))
    f[:, 0] = parent & (child < 0)
    f[np.arange(4000), child + 1] += (child >= 0) * 1.0
    rows = np.eye(6)[:5]
    rows[1:, 0], rows[1:, 1:5] = 0.6, 0.8 * np.eye(4)
    found = absorption(f, f @ rows, rows, np.eye(6)[0], parent)
    assert float(found["main"]) == 1
    np.testing.assert_allclose([found["full"], found["silent"]], 0.04)
    # a latent that writes the feature's opposite, or none of it, absorbs nothing
    for turned in (-0.6, 0.0):
        rows[1:, 0] = turned
        found = absorption(f, f @ rows, rows, np.eye(6)[0], parent)
        np.testing.assert_allclose([found["full"], found["silent"]], [0, 0.04])


def test_labels_that_cannot_be_probed_are_refused() -> None:
    f, x = planted()
    with pytest.raises(DataError, match="two labels of four items"):
        sparse_probing(f, x, np.zeros(ITEMS, int))
