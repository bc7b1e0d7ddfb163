"""Crosscoders over snapshots: planted lengths, snapshots of other scales, and a null in which nothing is shared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from devmon.errors import DataError, InstrumentError
from devmon.features import BatchTopK, ReLU, Training, crosscode, unembeddings
from devmon.instruments import SiteActivations
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract
from devmon.testing.planted import Planted, directions
from tests.anatomy.families import VOCAB
from tests.instruments.test_instruments_families import TEXT, model_of
from tests.support.models import random_model

# 54 features of which 20 stay, 10 grow by .3, .6, 1, 16 are born in the second or third snapshot, 8 die.
D, STEPS = 24, [0, 100, 1000]
GAIN = torch.tensor([[1.0, 1, 1]] * 20 + [[0.3, 0.6, 1]] * 10 + [[0, 1, 1]] * 8 + [[0, 0, 1]] * 8 + [[1, 1, 0]] * 8)
TRUE = directions(54, D, seed=1)
SIDES = torch.cat([TRUE * GAIN[:, t : t + 1] for t in range(3)], 1)
SOURCE = Planted(SIDES, 3 / 54, batch=512, seed=3)
TRAINING = Training(BatchTopK(3), width=4.5, steps=700, lr=4e-3)


def states(scales: tuple[float, ...] = (1.0, 1.0, 1.0), batches: int = 240) -> list[torch.Tensor]:
    x = torch.cat([SOURCE(step)[0] for step in range(batches)])
    return [scale * part for scale, part in zip(scales, x.split(D, 1), strict=True)]


@pytest.fixture(scope="module")
def planted() -> tuple[np.ndarray, object]:
    """`relative` (snapshot, feature) of the latent that is each true feature, and the table."""
    coder, table = crosscode(states(), STEPS, TRAINING, batch=512)
    alive = np.flatnonzero(np.isfinite(table["relative"].values).all(0) & (table["density"].values > 5e-3))
    rows = coder.W_dec[torch.tensor(alive)].unflatten(1, (3, -1))
    longest = rows[torch.arange(len(rows)), rows.norm(dim=-1).argmax(1)]
    cosine = (TRUE / TRUE.norm(dim=1, keepdim=True)) @ (longest / longest.norm(dim=1, keepdim=True)).T
    return alive[cosine.argmax(1).numpy()], table


def test_planted_lengths_and_births(planted: tuple[np.ndarray, object]) -> None:
    latent, table = planted
    relative = table["relative"].values[:, latent].T  # type: ignore[index]
    growing = relative[20:30].mean(0)
    np.testing.assert_allclose(growing, [0.3, 0.6, 1], atol=0.03, err_msg=str(growing))
    np.testing.assert_allclose(relative[:20].mean(0), 1, atol=0.03)
    born = table["born"].values[latent]  # type: ignore[index]
    died = table["died"].values[latent]  # type: ignore[index]
    assert (born[30:38] == 100).all()
    assert (born[38:46] == 1000).all()
    assert (died[46:] == 100).all()
    assert (born[:30] == 0).all()
    assert (died[:46] == 1000).all()
    # scaling by what is left of each snapshot agrees with the lengths where nothing shrank them
    scaled = table["scaled"].values[:, latent].T  # type: ignore[index]
    np.testing.assert_allclose(scaled[20:30].mean(0), [0.3, 0.6, 1], atol=0.05)


def test_l1_shrinks_a_weak_presence_and_the_check_says_so() -> None:
    coder, table = crosscode(states(batches=60), STEPS, Training(ReLU(2.0), width=4.5, steps=500), batch=512)
    alive = np.flatnonzero(table["density"].values > 5e-3)
    rows = coder.W_dec[torch.tensor(alive), 2 * D :]
    cosine = (TRUE[20:30] @ (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-9)).T).argmax(1).numpy()
    at = alive[cosine]
    relative, scaled = (float(table[name].values[0, at].mean()) for name in ("relative", "scaled"))
    assert relative < 0.2, relative
    assert scaled > relative


def test_snapshots_of_another_scale_keep_their_own() -> None:
    """One snapshot twice, the second five times as large: lengths are 1 to 5; alone, equal."""
    x = states(batches=30)[0]
    for scale in (1.0, 5.0):
        _, table = crosscode([x, scale * x], [0, 1], Training(BatchTopK(3), width=3, steps=150), batch=512)
        norm = table["norm"].values[:, table["density"].values > 0]
        np.testing.assert_allclose(norm[1] / norm[0], scale, rtol=0.02)


def test_shuffled_places_share_nothing() -> None:
    x = states(batches=60)[2]
    mixed = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    _, table = crosscode([x, mixed], [0, 1], Training(BatchTopK(6), width=6, steps=400), batch=512)
    least = table["relative"].values[:, table["density"].values > 5e-3].min(0)
    assert np.median(least) < 0.2, np.median(least)


def test_rows_of_unembeddings_are_places() -> None:
    rows = unembeddings([model_of("gpt2"), model_of("llama")])
    assert torch.equal(rows[0], model_of("gpt2").lm_head.weight.detach())  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("wrong", [[torch.zeros(9, 3)], [torch.zeros(9, 3), torch.zeros(8, 3)], [torch.zeros(9)] * 2])
def test_snapshots_of_other_places_are_refused(wrong: list[torch.Tensor]) -> None:
    with pytest.raises(DataError, match="the same places"):
        crosscode(wrong, list(range(len(wrong))), TRAINING)


def test_what_is_kept_is_told_before() -> None:
    given = SiteActivations(TEXT, ("resid_post", 1), most_bytes=10_000)
    assert given.kept_bytes(32) == 12 * 23 * 32 * 2
    with pytest.raises(DataError, match="give fewer tokens, or raise most_bytes"):
        given(Snapshot(0, model_of("gpt2")))
    with pytest.raises(InstrumentError, match="layers 0 to 1"):
        SiteActivations(TEXT, ("z", 5))(Snapshot(0, model_of("gpt2")))


def test_what_is_kept_are_the_states() -> None:
    model = model_of("gpt2")
    with torch.no_grad():
        states = model(TEXT, output_hidden_states=True).hidden_states[1][:, 1:].flatten(0, 1)
    found = SiteActivations(TEXT, ("resid_post", 0))(Snapshot(0, model))
    scale = float(found["scale"])
    assert found["states"].dtype == np.float16
    np.testing.assert_allclose(found["states"].values.astype(float) * scale, states, atol=1e-3 * scale)


class TestSiteActivations(InstrumentContract):
    def instrument(self) -> SiteActivations:
        return SiteActivations(TEXT[:6], ("resid_post", 0))

    def model(self, seed: int) -> nn.Module:
        return random_model(seed, VOCAB, 24)
