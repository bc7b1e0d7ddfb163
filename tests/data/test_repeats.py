"""Repeated random tokens against their definition, and the means over what is measured on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from devmon.data import best_fixed_offset, clustered_mean, repeats
from devmon.errors import DataError


@pytest.mark.parametrize("bos", [None, 7])
def test_repeats_against_the_definition(bos: int | None) -> None:
    probe = repeats(30, sequences=40, length=33, seed=5, bos=bos, exclude=(3, 4))
    start = 0 if bos is None else 1
    content = 33 - start
    assert set(probe.period.tolist()) == set(range(content // 4, content // 2 + 1)), "both ends are drawn"
    kept, columns = 0, [getattr(probe, name).tolist() for name in ("tokens", "period", "copy", "query")]
    for row, period, copy, query in zip(*columns, strict=True):
        if bos is not None:
            assert row[0] == bos
            assert row.count(bos) == 1
        assert not {3, 4} & set(row)
        for q in range(start, 33):
            assert copy[q] == (q - start) // period
            assert q - start < period or row[q] == row[q - period]
            collisions = [j for j in range(q) if row[j] == row[q] and (q - j) % period]
            assert query[q] == (period <= q - start < 2 * period and not collisions), (q, period, row)
            kept += query[q]
    assert kept > 200
    assert bos is None or not probe.query[:, 0].any()


def test_repeats_are_a_function_of_the_seed() -> None:
    probe = repeats(1000, sequences=2, length=12, seed=3)
    assert probe.period.tolist() == [5, 3]
    assert probe.tokens.tolist() == [
        [737, 667, 360, 280, 840, 737, 667, 360, 280, 840, 737, 667],
        [981, 739, 514, 981, 739, 514, 981, 739, 514, 981, 739, 514],
    ]
    assert not torch.equal(repeats(1000, sequences=2, length=12, seed=4).tokens, probe.tokens)
    state = torch.get_rng_state()
    repeats(999, sequences=2, length=12, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_repeats_refuse_what_cannot_be_measured() -> None:
    with pytest.raises(DataError, match=r"free of collisions.*raise vocab_size"):
        repeats(3, sequences=8, length=64)
    with pytest.raises(DataError, match="at least 8 places"):
        repeats(30, sequences=8, length=7)
    with pytest.raises(DataError, match="two tokens to draw from"):
        repeats(4, exclude=(1, 2), bos=0)


def test_best_fixed_offset_by_brute_force() -> None:
    generator = np.random.default_rng(0)
    total, queries = generator.random((2, 9, 9)), generator.integers(0, 4, 9)
    expected = []
    for values in total:
        scores = {
            o: sum(values[q, q - o] for q in range(o, 9)) / queries[o:].sum()
            for o in range(9)
            if queries[o:].sum() >= queries.sum() / 2
        }
        assert 1 < len(scores) < 9
        expected.append(max(scores.values()))
    found = best_fixed_offset(torch.tensor(total), torch.tensor(queries))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_clustered_mean_is_the_mean_and_the_textbook_error() -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(1e4, 2.0, (9, 5))
    mean, se = clustered_mean(values.sum(1), np.full(9, 5))
    np.testing.assert_allclose([mean, se], [values.mean(), values.mean(1).std(ddof=1) / 3], rtol=1e-10)
    assert np.isnan(clustered_mean(np.ones((1, 2)), np.ones(1))[1]).all()
    assert np.isnan(clustered_mean(np.zeros((3, 2)), np.zeros(3))[0]).all()


def test_clustered_error_covers_where_sequences_differ_in_length_and_level() -> None:
    """The spread of the mean over 4000 worlds is what one world's standard error says, on average."""
    generator = np.random.default_rng(2)
    count = generator.integers(0, 20, (4000, 30))
    total = count * generator.normal(0, 1, count.shape) + np.sqrt(count) * generator.normal(0, 1, count.shape)
    means, errors = map(np.array, zip(*(clustered_mean(t, c) for t, c in zip(total, count, strict=True)), strict=True))
    ratio = np.sqrt((errors**2).mean()) / means.std()
    assert 0.93 < ratio < 1.05, ratio
