"""Attention that shows contacts, distances and two towers: heads and embeddings that are known, nulls, contracts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from devmon.errors import DataError, InstrumentError
from devmon.instruments.attention_contacts import AttentionContacts, sparse_logistic
from devmon.instruments.attention_distance import AttentionDistance, grid
from devmon.instruments.paired_embeddings import PairedEmbeddings
from devmon.recipes.models.proteins import MaskedModel, ProteinFamilies
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract

FAMILIES = ProteinFamilies()
TOKENS, FAMILY = FAMILIES.draw(60, torch.Generator().manual_seed(0))


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- contacts --------------------------------------------------------------------------------------------------------


class Partner(nn.Module):
    """One layer of two heads: the first looks at the partner of each place in its family, the second at random."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(FAMILIES.vocab, 8)
        self.maps = FAMILIES.touching(torch.arange(FAMILIES.families)).float()
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, tokens: Tensor) -> Tensor:
        noise = torch.randn(len(tokens), *self.maps.shape[1:], generator=rng(int(tokens.sum())))
        pattern = torch.stack([8 * self.maps[tokens[:, 0]], noise], 1).softmax(-1)
        return self.blocks[0](self.embed(tokens)) + 0 * pattern.sum()


def contacts(**settings: Any) -> AttentionContacts:
    chosen: dict[str, Any] = {"top": 6, "separation": 4} | settings
    return AttentionContacts(TOKENS, FAMILIES.touching(FAMILY), FAMILY < 3, FAMILY, **chosen)


@pytest.mark.parametrize("apc", [True, False])
def test_a_head_that_looks_at_its_partner_gives_every_contact(apc: bool) -> None:
    found = contacts(apc=apc)(Snapshot(0, Partner()))
    np.testing.assert_array_equal(found["precision"], 1)
    np.testing.assert_array_equal(found["precision_se"], 0)
    assert found["precision_head"].values[0, 0] == 1
    chance = float(found["chance"])
    assert chance == pytest.approx(6 / (20 * 21 / 2))
    assert abs(found["precision_head"].values[0, 1] - chance) < 0.03
    assert np.isnan(found["precision_long"])  # 24 letters have no pair 24 apart
    np.testing.assert_array_equal(contacts(apc=apc, pool=True)(Snapshot(0, Partner()))["precision"], 1)


def test_untrained_attention_is_little_above_chance() -> None:
    torch.manual_seed(0)
    found = contacts()(Snapshot(0, MaskedModel(FAMILIES).eval()))
    assert 0 < float(found["precision"]) < 0.4  # it sees which letters go together: .22
    assert float(found["precision_shuffled"]) < 0.4


def test_the_sparse_regression_is_the_minimum() -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((400, 6))
    label = generator.random(400) < 1 / (1 + np.exp(4 - 2 * x[:, 0] + x[:, 1]))
    weights = sparse_logistic(x, label, 0.2)
    assert (weights != 0).tolist() == [True, True, False, False, False, True]

    # at the minimum the slope is balanced by the penalty, and that of the intercept, which has none, is 0
    intercept = brentq(lambda b: float((1 / (1 + np.exp(-x @ weights - b)) - label).sum()), -20, 20)
    slope = 0.2 * x.T @ (1 / (1 + np.exp(-x @ weights - intercept)) - label)
    np.testing.assert_allclose(slope[weights != 0], -np.sign(weights[weights != 0]), atol=1e-3)
    assert (np.abs(slope[weights == 0]) < 1).all()
    plain = LogisticRegression(C=1e4).fit(x, label)  # where the penalty is nothing
    np.testing.assert_allclose(sparse_logistic(x, label, 1e4), plain.coef_[0], atol=1e-3)


def test_families_are_what_they_say() -> None:
    tokens, family = FAMILIES.draw(4000, rng(1))
    letters = tokens[:, 1:] - FAMILIES.families
    assert int(letters.min()) == 0
    assert int(letters.max()) == 7
    first, second = FAMILIES.pairs[family].unbind(-1)
    assert int((second - first).min()) >= 4
    together = (letters.gather(1, first) + letters.gather(1, second) == 7).double().mean()
    assert float(together) == pytest.approx(0.9 + 0.1 / 8, abs=0.01)
    masked, target = FAMILIES.masked(tokens, rng(2))
    hidden = masked == FAMILIES.vocab - 1
    np.testing.assert_array_equal(target[hidden], tokens[hidden])
    assert int((target != -100).sum()) == int(hidden.sum())
    assert float(hidden[:, 1:].double().mean()) == pytest.approx(0.15, abs=0.01)
    assert not hidden[:, 0].any()


def test_contacts_that_do_not_fit_are_refused() -> None:
    maps = FAMILIES.touching(FAMILY)
    for fitted, group, said in (
        (FAMILY < 3, FAMILY % 2, "each group on one side"),
        (FAMILY < 9, FAMILY, "both kinds"),
        (FAMILY[:5] < 3, FAMILY, "fitted and group"),
    ):
        with pytest.raises(DataError, match=said):
            AttentionContacts(TOKENS, maps, fitted, group)
    with pytest.raises(DataError, match="symmetric"):
        AttentionContacts(TOKENS, maps.triu(), FAMILY < 3, FAMILY)
    with pytest.raises(DataError, match="contacts are the same"):
        AttentionContacts(TOKENS, maps, FAMILY < 3, (FAMILY >= 3).long(), separation=4, pool=True)
    with pytest.raises(DataError, match="lower separation"):
        AttentionContacts(TOKENS, maps, FAMILY < 3, FAMILY, separation=23)


class TestAttentionContacts(InstrumentContract):
    def instrument(self) -> AttentionContacts:
        return contacts()

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return MaskedModel(FAMILIES, width=16, heads=2)


# -- distance --------------------------------------------------------------------------------------------------------


class Patches(nn.Module):
    """Images (batch, 1, 2, 3) as a class token and six patches; heads: itself, one to the right and round, even."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(1, 4), nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, images: Tensor) -> Tensor:
        x = F.pad(self.embed(images.flatten(1)[..., None]), (0, 0, 1, 0))
        right = torch.zeros(7, 7)
        right[torch.arange(7), [0, 2, 3, 1, 5, 6, 4]] = 1
        own = torch.stack([torch.eye(7), right, torch.full((7, 7), 1 / 7)])
        pattern = own.log().clamp_min(-90).expand(len(x), 3, 7, 7).softmax(-1)
        return self.blocks[0](pattern[:, 0] @ x)


def test_distances_of_known_heads_on_images() -> None:
    images = torch.randn(5, 1, 2, 3, generator=rng(0))
    found = AttentionDistance(images, grid(2, 3), batch_size=2)(Snapshot(0, Patches()))
    places = grid(2, 3)[1:].double()
    even = torch.cdist(places, places).mean()
    np.testing.assert_allclose(found["distance"][0], [0, 4 / 3, even], atol=1e-6)  # right, right, and back by two
    np.testing.assert_allclose(found["uniform"], even)
    np.testing.assert_allclose(found["distance_se"], 0, atol=1e-9)
    np.testing.assert_allclose(found["outside"][0], [0, 0, 1 / 7], atol=1e-6)


def test_positions_that_do_not_fit_are_refused() -> None:
    images = torch.randn(5, 1, 2, 3)
    with pytest.raises(DataError, match=r"grid\(rows, columns\)"):
        AttentionDistance(images)
    with pytest.raises(InstrumentError, match="attends over 7 places, positions has 6"):
        AttentionDistance(images, grid(2, 3, before=0))(Snapshot(0, Patches()))


class TestAttentionDistance(InstrumentContract):
    def instrument(self) -> AttentionDistance:
        return AttentionDistance(TOKENS[:6])

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return MaskedModel(FAMILIES, width=16, heads=2)


# -- two towers ------------------------------------------------------------------------------------------------------


class Towers(nn.Module):
    def __init__(self, seed: int = 0, first: int = 16, second: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two = nn.Linear(first, 8), nn.Linear(second, 8)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(first), self.two(second)


def as_they_are(model: nn.Module, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return first, second


def embedded(x: Tensor, y: Tensor) -> Any:
    return PairedEmbeddings(x, y, as_they_are)(Snapshot(0, nn.Linear(1, 1)))


def test_pairs_that_are_equal_and_pairs_that_are_opposite() -> None:
    x = F.normalize(torch.randn(400, 32, generator=rng(0), dtype=torch.float64), dim=-1)
    same = embedded(3 * x, x)
    for name, value in {"gap": 0, "alignment": 0, "cosine_paired": 1, "recall": 1}.items():
        np.testing.assert_allclose(same[name], value, atol=1e-12)
    np.testing.assert_allclose(same["alignment_unpaired"], 2, atol=0.02)
    np.testing.assert_allclose(same["uniformity_first"], same["uniformity_even"], atol=0.01)
    other = embedded(x, -x)
    np.testing.assert_allclose(other["alignment"], 4)
    assert float(other["recall"]) == 0


def test_each_number_by_its_definition() -> None:
    x, y = (F.normalize(torch.randn(17, 4, generator=rng(i), dtype=torch.float64), dim=-1) for i in (7, 8))
    found, n = embedded(x, y), range(17)
    apart = [(i, j) for i in n for j in n if i != j]
    expected = {
        "gap": (x.mean(0) - y.mean(0)).norm(),
        "alignment": np.mean([float((x[i] - y[i]).square().sum()) for i in n]),
        "alignment_unpaired": np.mean([float((x[i] - y[j]).square().sum()) for i, j in apart]),
        "uniformity_second": np.log(np.mean([np.exp(-2 * float((y[i] - y[j]).square().sum())) for i, j in apart])),
        "cosine_unpaired": np.mean([float(x[i] @ y[j]) for i, j in apart]),
        "cosine_within": np.mean([float(z[i] @ z[j]) for z in (x, y) for i, j in apart]),
        "recall": np.mean([int(torch.cdist(x[i : i + 1], y).argmin()) == i for i in n]),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, err_msg=name)


def test_two_orthogonal_cones() -> None:
    """x = (cos, sin u, 0), y = (0, …): the means are known, and so is the gap."""
    u, angle = F.normalize(torch.randn(300, 20, generator=rng(1), dtype=torch.float64), dim=-1), 0.5
    u = torch.cat([u, -u])  # their mean is 0
    ones, none = torch.ones(600, 1).double(), torch.zeros(600, 1).double()
    x = torch.cat([math.cos(angle) * ones, none, math.sin(angle) * u], 1)
    y = torch.cat([none, math.cos(angle) * ones, math.sin(angle) * u], 1)
    found = embedded(x, y)
    np.testing.assert_allclose(found["gap"], math.cos(angle) * math.sqrt(2), rtol=1e-9)
    np.testing.assert_allclose(found["cosine_paired"], math.sin(angle) ** 2, rtol=1e-9)
    np.testing.assert_allclose(found["alignment"], 2 * math.cos(angle) ** 2, rtol=1e-9)
    assert float(found["cosine_within"]) == pytest.approx(math.cos(angle) ** 2, abs=0.01)
    assert float(found["cosine_unpaired"]) == pytest.approx(0, abs=0.01)
    assert float(found["recall"]) == 1


def test_training_on_pairs_aligns_them_and_the_gap_of_the_start_falls() -> None:
    latent = torch.randn(512, 6, generator=rng(3))
    maps = torch.randn(2, 6, 16, generator=rng(4))
    first, second = (latent @ each + 0.1 * torch.randn(512, 16, generator=rng(5 + i)) for i, each in enumerate(maps))
    model, instrument = Towers(1, 16, 16), PairedEmbeddings(first[:128], second[:128])
    before = instrument(Snapshot(0, model))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(200):
        at = torch.randperm(384, generator=rng(step))[:64] + 128
        x, y = (F.normalize(each, dim=-1) for each in model(first[at], second[at]))
        scores = 10 * x @ y.T
        loss = F.cross_entropy(scores, torch.arange(64)) + F.cross_entropy(scores.T, torch.arange(64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = instrument(Snapshot(200, model))
    assert float(after["alignment"]) < 0.5 < 1.5 < float(before["alignment"])
    assert float(after["gap"]) < 0.5 * float(before["gap"])
    assert float(after["recall"]) > 0.5 > 0.05 > float(before["recall"])
    assert abs(float(before["cosine_paired"] - before["cosine_unpaired"])) < 0.1
    spread = 5 * float(after["gap_se"])
    assert 0 < spread < float(before["gap"] - after["gap"])


def test_what_are_no_pairs_is_refused() -> None:
    with pytest.raises(DataError, match="16 pairs"):
        PairedEmbeddings(torch.ones(5, 2), torch.ones(5, 2))
    with pytest.raises(InstrumentError, match="write one"):
        PairedEmbeddings(torch.ones(16, 2), torch.ones(16, 2), lambda model, x, y: x)(Snapshot(0, nn.Linear(1, 1)))


class TestPairedEmbeddings(InstrumentContract):
    def instrument(self) -> PairedEmbeddings:
        return PairedEmbeddings(torch.randn(32, 16, generator=rng(0)), torch.randn(32, 3, generator=rng(1)))

    def model(self, seed: int) -> nn.Module:
        return Towers(seed)
