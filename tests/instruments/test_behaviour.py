"""RepeatGain and ProbeLoss in closed form, by brute force and within their error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from devmon.data import random_tokens, repeats
from devmon.errors import DataError, InstrumentError
from devmon.instruments import ProbeLoss, RepeatGain
from devmon.testing import Bigram, even, fixed_offset, induction
from tests.support.models import LENGTH, VOCAB, random_model, snapshot


def test_repeat_gain_of_the_induction_circuit_in_closed_form() -> None:
    found = RepeatGain(VOCAB, length=LENGTH, bos=0)(snapshot(induction(VOCAB, LENGTH, confidence=8.0)))
    first, second = math.log(VOCAB), math.log1p((VOCAB - 1) * math.exp(-8.0))
    for name, expected in {"nll_first": first, "nll_second": second, "gain": first - second, "accuracy": 1.0}.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-9)
    assert float(found["accuracy_reference"]) < 0.4


def test_repeat_gain_of_models_that_do_not_copy() -> None:
    found = RepeatGain(VOCAB, length=48)(snapshot(even(VOCAB, 48)))
    assert (float(found["gain"]), float(found["gain_se"])) == (0.0, 0.0)
    blind = RepeatGain(VOCAB, sequences=128, length=48)(snapshot(fixed_offset(VOCAB, 48, 15)))
    assert 0 < float(blind["accuracy"]) <= float(blind["accuracy_reference"])


def test_repeat_gain_by_brute_force() -> None:
    model, probe = random_model(3), repeats(VOCAB, 12, 48, 1, 0)
    found = RepeatGain(VOCAB, sequences=12, length=48, seed=1, bos=0)(snapshot(model))
    with torch.no_grad():
        chances = model(probe.tokens).log_softmax(-1)
    first, second, hits, offsets = [], [], [], []
    for b, q in probe.query.nonzero().tolist():
        period = int(probe.period[b])
        if q + 1 >= 1 + 2 * period or q + 1 >= 48:  # the next token is in the third copy, or nowhere
            continue
        token = int(probe.tokens[b, q + 1])
        assert token == int(probe.tokens[b, q + 1 - period])
        first.append(-float(chances[b, q - period, token]))
        second.append(-float(chances[b, q, token]))
        hits.append(int(chances[b, q].argmax()) == token)
        offsets.append((b, q, token))
    for name, values in {"nll_first": first, "nll_second": second, "accuracy": hits}.items():
        np.testing.assert_allclose(found[name], np.array(values).mean(), rtol=1e-10)
    np.testing.assert_allclose(found["gain"], np.mean(first) - np.mean(second), rtol=1e-10)
    shares = [np.mean([t == token for _, _, token in offsets]) for t in range(VOCAB)]
    for o in range(48):
        there = [int(probe.tokens[b, q - o]) == token for b, q, token in offsets if q >= o]
        shares += [np.mean(there)] if len(there) >= len(offsets) / 2 else []
    np.testing.assert_allclose(found["accuracy_reference"], max(shares), rtol=1e-10)


def test_probe_loss_is_the_entropy_of_a_known_chain() -> None:
    """Two equally likely successors of every token: log 2 nats for every text, at every position."""
    generator = torch.Generator().manual_seed(0)
    table = torch.full((8, 8), 1e-300, dtype=torch.float64)
    for state in range(8):
        table[state, [(state + 1) % 8, (state + 3) % 8]] = 0.5
    steps = torch.tensor([1, 3])[torch.randint(2, (6, 64), generator=generator)]
    found = ProbeLoss(steps.cumsum(1) % 8)(snapshot(Bigram(table)))
    np.testing.assert_allclose(found["loss"], math.log(2), rtol=1e-12)
    np.testing.assert_allclose(found["loss_by_position"], math.log(2), rtol=1e-12)
    assert found["pos"].values.tolist() == list(range(1, 64))
    np.testing.assert_allclose([found["icl_score"], found["icl_score_se"], found["loss_se"]], 0.0, atol=1e-12)


def test_probe_loss_of_a_uniform_text_under_an_uneven_unigram() -> None:
    chances = torch.tensor([0.5, 0.25, 0.125, 0.125])
    entropy = 1.75 * math.log(2)  # of text in these very proportions
    text = torch.tensor([[3, 0, 0, 1, 0, 2, 0, 1, 3], [0, 3, 2, 1, 1, 0, 0, 0, 0]])
    found = ProbeLoss(text)(snapshot(Bigram(chances.expand(4, 4))))
    np.testing.assert_allclose(found["loss"], entropy, rtol=1e-7)


def test_probe_loss_of_a_sampled_chain_is_its_entropy_rate_within_its_error() -> None:
    table = torch.tensor([[0.8, 0.1, 0.1], [0.3, 0.4, 0.3], [0.05, 0.05, 0.9]], dtype=torch.float64)
    values, vectors = np.linalg.eig(table.numpy().T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary /= stationary.sum()
    rate = -(stationary[:, None] * table.numpy() * table.log().numpy()).sum()
    generator = torch.Generator().manual_seed(4)
    text = torch.multinomial(torch.tensor(stationary), 400, replacement=True, generator=generator)[:, None]
    for _ in range(63):
        text = torch.cat([text, torch.multinomial(table[text[:, -1]], 1, generator=generator)], 1)
    found = ProbeLoss(text)(snapshot(Bigram(table)))
    z = (float(found["loss"]) - rate) / float(found["loss_se"])
    assert abs(z) < 4, (float(found["loss"]), rate, z)
    assert 0 < float(found["loss_se"]) < 0.02
    assert abs(float(found["icl_score"])) < 4 * float(found["icl_score_se"])
    assert abs(float(ProbeLoss(text)(snapshot(Bigram(table.T / table.T.sum(1, keepdim=True))))["loss"]) - rate) > 0.02


class Growing(nn.Module):
    """Sure of the right next token of the cycle 0 1 2 0 …, with a logit of 0.01 for every token seen so far."""

    def forward(self, tokens: Tensor) -> Tensor:
        seen = torch.arange(1, tokens.shape[1] + 1, dtype=torch.float64)
        return 0.01 * seen[:, None] * F.one_hot((tokens + 1) % 3, 3)


def test_icl_score_and_its_positions_in_closed_form() -> None:
    def loss(pos: np.ndarray) -> np.ndarray:  # tokens seen before the one predicted
        return np.log1p(2 * np.exp(-0.01 * pos))

    text = (torch.arange(512) + torch.arange(3)[:, None]) % 3
    found = ProbeLoss(text)(snapshot(Growing()))
    np.testing.assert_allclose(found["loss_by_position"], loss(np.arange(1, 512)), rtol=1e-10)
    expected = loss(np.arange(492, 509)).mean() - loss(np.arange(42, 59)).mean()
    np.testing.assert_allclose(found["icl_score"], expected, rtol=1e-10)
    assert expected < 0, "negative where the model learns in context"
    given = ProbeLoss(text[:, :64], early=(1, 2), late=(60, 64))(snapshot(Growing()))
    np.testing.assert_allclose(given["icl_score"], loss(np.arange(60, 64)).mean() - loss(np.array([1]))[0], rtol=1e-10)
    short = ProbeLoss(text[:, :64])
    assert (short.early, short.late) == ((5, 8), (61, 64))
    assert (ProbeLoss(text[:, :4]).early, ProbeLoss(text[:, :4]).late) == ((1, 2), (3, 4))


def test_the_induction_circuit_learns_in_context() -> None:
    text = repeats(VOCAB, 32, LENGTH, 0, bos=0).tokens
    found = ProbeLoss(text)(snapshot(induction(VOCAB, LENGTH)))
    assert float(found["icl_score"]) < -5 * float(found["icl_score_se"]) < 0


def test_probe_loss_refuses_wrong_windows_and_tokens() -> None:
    text = random_tokens(5, 3, 20)
    for window in ((0, 4), (5, 5), (10, 21)):
        with pytest.raises(DataError, match="1 <= start < stop <= 20"):
            ProbeLoss(text, early=window)
    for wrong in (text[0], text.float(), text[:0], text[:, :2], text > 2):
        with pytest.raises(DataError, match="ProbeLoss needs tokens"):
            ProbeLoss(wrong)
    with pytest.raises(InstrumentError, match=r"^ProbeLoss needs logits"):
        ProbeLoss(text)(snapshot(nn.Flatten(0)))
