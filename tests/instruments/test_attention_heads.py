"""InductionHeads and PreviousTokenHeads on heads built by hand, and by brute force."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from devmon.anatomy import attention_patterns
from devmon.data import random_tokens, repeats
from devmon.errors import DataError, InstrumentError
from devmon.instruments import InductionHeads, PreviousTokenHeads
from devmon.testing import even, fixed_offset, induction
from tests.support.models import LENGTH, VOCAB, NoAttention, random_model, snapshot


def test_induction_circuit_scores_one_where_it_should() -> None:
    found = InductionHeads(VOCAB, length=LENGTH, bos=0)(snapshot(induction(VOCAB, LENGTH)))
    uniform = float(found["uniform"])
    np.testing.assert_allclose(found["prefix_matching"], [[uniform, 0.0], [1.0, uniform]], atol=1e-9)
    assert found["fixed_offset"][0, 1] > 1 - 1e-9, "the previous-token head is a fixed offset"
    assert found["fixed_offset"][1, 0] < 0.4, "the induction head is not"
    assert float(found["duplicate_token"][1, 0]) < 1e-9
    assert float(found["prefix_matching_se"][1, 0]) < 1e-9


def test_even_attention_scores_exactly_its_share() -> None:
    probe = repeats(VOCAB, 64, 48, 0)
    expected = np.mean([1 / (q + 1) for _, q in probe.query.nonzero().tolist()])
    found = InductionHeads(VOCAB, length=48)(snapshot(even(VOCAB, 48, layers=2, heads=3)))
    assert dict(found.drop_dims("replicate").sizes) == {"layer": 2, "head": 3}
    for name in ("prefix_matching", "duplicate_token", "uniform"):
        np.testing.assert_allclose(found[name], expected, rtol=1e-12)
    previous = PreviousTokenHeads(VOCAB, length=48)(snapshot(even(VOCAB, 48)))
    for name in ("previous_token", "uniform"):
        np.testing.assert_allclose(previous[name], np.mean([1 / (i + 1) for i in range(2, 48)]), rtol=1e-12)


def test_sharp_but_blind_copier_is_not_induction() -> None:
    for offset in (12, 18, 23):
        found = InductionHeads(VOCAB, sequences=128, length=64)(snapshot(fixed_offset(VOCAB, 64, offset)))
        assert float(found["prefix_matching"][0, 0]) <= 0.1
        assert float(found["fixed_offset"][0, 0]) >= 0.99, "its sharp attention is there to be seen"


@pytest.mark.parametrize("bos", [None, 0])
def test_induction_scores_by_brute_force(bos: int | None) -> None:
    model, probe = random_model(0), repeats(VOCAB, 6, 48, 2, bos)
    found = InductionHeads(VOCAB, sequences=6, length=48, seed=2, bos=bos)(snapshot(model))
    queries = [(b, q, int(probe.period[b])) for b, q in probe.query.nonzero().tolist()]
    for layer, pattern in enumerate(attention_patterns(model, probe.tokens)):
        for head in range(3):
            prefix = [float(pattern[b, head, q, q - p + 1]) for b, q, p in queries]
            duplicate = [float(pattern[b, head, q, q - p]) for b, q, p in queries]
            np.testing.assert_allclose(found["prefix_matching"][layer, head], np.mean(prefix), rtol=1e-10)
            np.testing.assert_allclose(found["duplicate_token"][layer, head], np.mean(duplicate), rtol=1e-10)
            rates = []
            for offset in range(48):
                there = [float(pattern[b, head, q, q - offset]) for b, q, _ in queries if q >= offset]
                rates += [np.mean(there)] if len(there) >= len(queries) / 2 else []
            np.testing.assert_allclose(found["fixed_offset"][layer, head], max(rates), rtol=1e-10)


def test_heads_permute_with_the_weights() -> None:
    model, order = random_model(0), [2, 0, 1]
    moved = random_model(0)
    for name, parameter in moved.blocks.named_parameters():
        side = 1 if name.endswith("out.weight") else 0
        parameter.data = torch.cat([parameter.data.chunk(3, side)[head] for head in order], side)
    for instrument, name in (
        (InductionHeads(VOCAB, 16, 48), "prefix_matching"),
        (PreviousTokenHeads(VOCAB, 16, 48), "previous_token"),
    ):
        plain, permuted = instrument(snapshot(model))[name], instrument(snapshot(moved))[name]
        np.testing.assert_allclose(permuted, plain[:, order], rtol=1e-10)


def test_previous_token_head_scores_one_and_leaves_the_first_column_out() -> None:
    text = torch.cat([torch.zeros(5, 1, dtype=torch.int64), 1 + random_tokens(VOCAB - 1, 5, LENGTH - 1)], 1)
    found = PreviousTokenHeads(tokens=text)(snapshot(induction(VOCAB, LENGTH)))
    uniform = float(found["uniform"])
    assert float(found["previous_token"][0, 1]) > 1 - 1e-9
    np.testing.assert_allclose(found["previous_token"][0, 0], uniform, rtol=1e-9)
    assert float(found["previous_token"][1, 0]) < 0.1
    # a head that only ever attends to place 0 has A[1, 0] = 1 and owes that to the idle column
    sink = even(VOCAB, 16, 1, 1)
    sink.get_parameter("blocks.0.query.weight").data[-16] = 60.0
    assert float(PreviousTokenHeads(VOCAB, 8, 16)(snapshot(sink))["previous_token"][0, 0]) < 1e-9


def test_previous_token_probe_is_one_or_the_other() -> None:
    for wrong in ({}, {"vocab_size": 5, "tokens": random_tokens(5, 2, 9)}):
        with pytest.raises(DataError, match="either vocab_size"):
            PreviousTokenHeads(**wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="at least 3 positions"):
        PreviousTokenHeads(tokens=random_tokens(5, 2, 2))


@pytest.mark.parametrize("instrument", [InductionHeads(VOCAB), PreviousTokenHeads(VOCAB)])
def test_a_model_without_attention_is_told_so(instrument: Any) -> None:
    name = type(instrument).__name__
    with pytest.raises(InstrumentError, match=rf"^{name} needs attention patterns; NoAttention shows none") as error:
        instrument(snapshot(NoAttention()))
    assert "\n" not in str(error.value)
    with pytest.raises(InstrumentError, match=rf"^{name}: .*lower vocab_size or length"):
        replace(instrument, vocab_size=VOCAB + 60)(snapshot(NoAttention()))
