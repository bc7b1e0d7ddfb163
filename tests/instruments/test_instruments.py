"""The configuration of instruments on fixed probes, and their contract."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import xarray as xr
from torch import nn

from devmon.data import random_tokens
from devmon.errors import DataError
from devmon.instruments import InductionHeads, LinearProbe, PreviousTokenHeads, ProbeLoss, RepeatGain
from devmon.monitoring.fingerprint import identity
from devmon.testing import InstrumentContract
from tests.support.models import VOCAB, random_model, snapshot


@pytest.mark.parametrize(
    "instrument",
    [
        InductionHeads(VOCAB, 10, 48),
        PreviousTokenHeads(VOCAB, 10, 48),
        RepeatGain(VOCAB, 10, 48),
        ProbeLoss(random_tokens(VOCAB, 10, 48)),
        LinearProbe(random_tokens(VOCAB, 10, 48), random_tokens(VOCAB, 10, 48) % 3),
    ],
)
def test_minibatches_do_not_change_the_numbers(instrument: Any) -> None:
    whole = replace(instrument, batch_size=100)(snapshot(random_model(0)))
    parts = replace(instrument, batch_size=3)(snapshot(random_model(0)))
    xr.testing.assert_allclose(whole, parts, rtol=1e-10)
    with pytest.raises(DataError, match="batch_size"):
        replace(instrument, batch_size=0)(snapshot(random_model(0)))


def test_instruments_are_compared_hashed_pickled_and_fingerprinted_by_content() -> None:
    text = random_tokens(9, 6, 12)
    other = text.clone()
    other[2, 3] += 1
    for make in (ProbeLoss, lambda t: PreviousTokenHeads(tokens=t), lambda t: LinearProbe(t, t % 2, seed=1)):
        one, same, changed = make(text), make(text.clone()), make(other)
        assert one == same == pickle.loads(pickle.dumps(one))
        assert hash(one) == hash(same)
        assert one != changed
        assert identity(one)["fingerprint"] == identity(same)["fingerprint"] != identity(changed)["fingerprint"]
    text[0, 0] += 1
    assert one == same, "the probe is a copy of what was given"
    assert InductionHeads(9) == InductionHeads(9) != InductionHeads(9, seed=1)


class Attending(InstrumentContract):
    def model(self, seed: int) -> nn.Module:
        return random_model(seed)


class TestInductionHeads(Attending):
    def instrument(self) -> InductionHeads:
        return InductionHeads(VOCAB, sequences=8, length=48)


class TestPreviousTokenHeads(Attending):
    def instrument(self) -> PreviousTokenHeads:
        return PreviousTokenHeads(VOCAB, sequences=8, length=48)


class TestRepeatGain(Attending):
    def instrument(self) -> RepeatGain:
        return RepeatGain(VOCAB, sequences=8, length=48)


class TestProbeLoss(Attending):
    def instrument(self) -> ProbeLoss:
        return ProbeLoss(random_tokens(VOCAB, 8, 48))


class TestLinearProbe(Attending):
    def instrument(self) -> LinearProbe:
        tokens = random_tokens(VOCAB, 8, 48)
        return LinearProbe(tokens, tokens % 3)
