"""TokenLoss against the loss of known tables, and when its tokens were learned in courses that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from devmon.analysis import plots
from devmon.analysis.derive.learning.tokens import token_learning
from devmon.analysis.reports.drawing import Page
from devmon.analysis.reports.token_figures import token_blocks
from devmon.errors import DataError
from devmon.instruments import ProbeLoss, TokenLoss
from devmon.snapshot import Snapshot
from devmon.testing import Bigram, InstrumentContract
from tests.support.models import LENGTH, VOCAB, random_model

TOKENS = torch.randint(VOCAB, (10, LENGTH), generator=torch.Generator().manual_seed(0))


def test_the_loss_of_each_token_is_that_of_the_table() -> None:
    table = torch.rand(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    table = table / table.sum(1, keepdim=True)
    found = TokenLoss(TOKENS, batch_size=3)(Snapshot(0, Bigram(table)))
    sequence, pos, target = (found[name].values for name in ("sequence", "pos", "target"))
    assert (target == TOKENS.numpy()[sequence, pos]).all()
    before = TOKENS.numpy()[sequence, pos - 1]
    np.testing.assert_allclose(found["nats"], -np.log(table.numpy()[before, target]), rtol=1e-6)
    assert found.sizes["token"] == 10 * (LENGTH - 1)
    whole = ProbeLoss(TOKENS)(Snapshot(0, Bigram(table)))
    for name in ("loss", "loss_se"):
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-9)
    np.testing.assert_allclose(found["uniform"], math.log(VOCAB))


def test_a_budget_keeps_the_same_tokens_at_every_step() -> None:
    few = TokenLoss(TOKENS, most=30)
    one, two = (few(Snapshot(step, random_model(step))) for step in (0, 1))
    assert one["nats"].nbytes == 4 * 30
    for name in ("sequence", "pos", "target"):
        np.testing.assert_array_equal(one[name], two[name])
    every = TokenLoss(TOKENS)(Snapshot(0, random_model(0)))
    at = every["sequence"].values * LENGTH + every["pos"].values
    kept = one["sequence"].values * LENGTH + one["pos"].values
    assert len(set(kept)) == 30
    np.testing.assert_array_equal(one["nats"], every["nats"].values[np.searchsorted(at, kept)])
    assert len(set(one["sequence"].values)) > 5, "drawn from all sequences"
    np.testing.assert_allclose(one["loss"], one["nats"].mean(), rtol=1e-6)


def test_what_is_no_budget_is_refused() -> None:
    with pytest.raises(DataError, match="most >= 1"):
        TokenLoss(TOKENS, most=0)


class TestTokenLoss(InstrumentContract):
    def instrument(self) -> TokenLoss:
        return TokenLoss(TOKENS, most=50)

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)


STEPS = np.unique(np.r_[0, np.round(np.geomspace(1, 1000, 61))]).astype(int)
TIME = np.log10(STEPS + 1)


def stored(nats: np.ndarray, steps: np.ndarray = STEPS, per_sequence: int = 8) -> xr.Dataset:
    """A watch of these losses (step, token)."""
    token = np.arange(nats.shape[1])
    return xr.Dataset(
        {"nats": (("step", "token"), nats.astype(np.float32))},
        coords={"step": steps, "token": token, "sequence": ("token", token // per_sequence)},
    )


def ramps(middle: np.ndarray, fall: np.ndarray, width: float = 0.5) -> np.ndarray:
    """Losses from 4 nats that fall in a straight line of log step, half-way at `middle` decades."""
    return 4 - fall * np.clip((TIME[:, None] - middle) / width + 0.5, 0, 1)


def test_straight_falls_are_learned_at_their_middle() -> None:
    middle, fall = np.linspace(0.6, 2.4, 40), np.linspace(1, 3, 40)
    found = token_learning(stored(ramps(middle, fall)))
    assert set(found["kind"].values) == {"learned"}
    np.testing.assert_allclose(np.log10(found["learned"] + 1), middle, atol=2e-3)
    np.testing.assert_allclose(found["fall"], fall, rtol=1e-6)
    assert (found["learned_low"] <= found["learned"]).all()
    assert (found["learned"] <= found["learned_high"]).all()
    expected = (middle[None] <= TIME[:, None]).mean(1)
    np.testing.assert_allclose(found["share"], expected, atol=1 / 40 + 1e-9)
    np.testing.assert_allclose(np.log10(found["when"] + 1), np.quantile(middle, [0.1, 0.5, 0.9]), atol=3e-3)


def test_the_last_passage_counts_and_the_first_widens_the_bracket() -> None:
    """A loss that dips below half-way at steps of 10 and comes back is learned when it falls for good."""
    nats = ramps(np.full(8, 2.0), np.full(8, 2.0))
    dip = np.flatnonzero((STEPS > 8) & (STEPS < 14))
    nats[dip] = 2.5
    found = token_learning(stored(nats))
    np.testing.assert_allclose(np.log10(found["learned"] + 1), 2.0, atol=2e-3)
    assert (found["learned_low"] == STEPS[dip[0] - 1]).all()
    assert (found["learned_high"] >= 99).all()


def test_what_rises_is_unlearned_and_what_stays_is_flat() -> None:
    nats = np.concatenate([ramps(np.full(8, 1.5), np.full(8, size)) for size in (2.0, -2.0, 0.3)], 1)
    found = token_learning(stored(nats))
    assert found["kind"].values.tolist() == ["learned"] * 8 + ["unlearned"] * 8 + ["flat"] * 8
    assert np.isnan(found["learned"][8:]).all()
    for name in ("share", "lost"):
        np.testing.assert_allclose(found[name], (TIME >= 1.5) / 3, atol=1e-9)
    assert token_learning(stored(nats), least=0.2)["kind"].values.tolist()[16:] == ["learned"] * 8


@pytest.mark.parametrize("size", [0.5, 3.0])
def test_noise_is_learned_as_seldom_as_it_is_unlearned(size: float) -> None:
    """Independent noise of either size, also above the least fall, passes in under 2% of tokens, either way."""
    rng = np.random.default_rng(0)
    found = token_learning(stored(4 + size * rng.standard_normal((len(STEPS), 4000))))
    for word in ("learned", "unlearned"):
        assert (found["kind"].values == word).mean() < 0.02
    assert float(found["share"][-1]) < 0.02


def test_errors_are_of_sequences() -> None:
    """Tokens of a sequence that fall together are worth one: the error of the share and the interval of the half."""
    rng = np.random.default_rng(1)
    middle = np.repeat(rng.uniform(0.8, 2.2, 60), 8)
    found = token_learning(stored(ramps(middle, np.full(480, 2.0), 0.2)))
    at = int(np.abs(TIME - 1.5).argmin())
    share = float(found["share"][at])
    np.testing.assert_allclose(found["share_se"][at], np.sqrt(share * (1 - share) / 59), rtol=1e-6)
    low, high = (np.log10(found[f"when_{end}"].values[1] + 1) for end in ("low", "high"))
    assert 0.12 < high - low < 0.9, "1.64 · 2 · .5 · 1.4 / √60 = .30 in decades"
    assert low < 1.5 < high


def test_too_few_steps_and_other_data_are_refused() -> None:
    with pytest.raises(DataError, match="5 steps or more"):
        token_learning(stored(np.ones((4, 8)), STEPS[:4]))
    with pytest.raises(DataError, match="TokenLoss"):
        token_learning(xr.Dataset({"loss": ("step", np.ones(9))}))


def test_the_figure_and_the_report_say_when() -> None:
    data = stored(ramps(np.linspace(1, 2, 80), np.full(80, 2.0)))
    _, ax = plots.plot_token_learning(token_learning(data))
    line = next(line for line in ax.get_lines() if line.get_label() == "learned by this step")
    np.testing.assert_allclose(line.get_ydata()[-1], 1.0)
    bars = sum(bar.get_height() for bar in ax.patches[:24])
    np.testing.assert_allclose(bars, 1.0)
    words, figure = token_blocks(Page(None), "tokens", data)
    assert "Of 80 tokens 100% are learned; 0% get as much worse" in words.text
    assert "Half of these are by step 31" in words.text
    assert figure.data is not None
    flat = token_blocks(Page(None), "tokens", stored(np.ones((9, 8)), STEPS[:9]))[0]
    assert "0% are learned" in flat.text
