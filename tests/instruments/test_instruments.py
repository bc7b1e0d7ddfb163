"""The instruments on models built by hand, where the number is known; against slow references; and their contract."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from devmon.anatomy import attention_patterns, residual_stream
from devmon.data import best_fixed_offset, clustered_mean, random_tokens, repeats
from devmon.errors import DataError, InstrumentError
from devmon.instruments import InductionHeads, LinearProbe, PreviousTokenHeads, ProbeLoss, RepeatGain
from devmon.monitoring.fingerprint import identity
from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly, Bigram, InstrumentContract, Readable, even, fixed_offset, induction

VOCAB, LENGTH = 40, 41


def snapshot(model: nn.Module) -> Snapshot:
    return Snapshot(0, model.eval())


def random_model(seed: int, vocab: int = VOCAB, length: int = 48, width: int = 12) -> AttentionOnly:
    """Two layers of three heads with random weights, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5

    heads = [[(draw(width, width), draw(width, width)) for _ in range(3)] for _ in range(2)]
    return AttentionOnly(draw(vocab, width), draw(length, width), heads, draw(width, vocab))


class NoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.embed(tokens))


# --- the repeat probe ---------------------------------------------------------------------------------------------


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


# --- attention heads ----------------------------------------------------------------------------------------------


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
    assert dict(found.sizes) == {"layer": 2, "head": 3}
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


# --- behaviour ----------------------------------------------------------------------------------------------------


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


# --- representations ----------------------------------------------------------------------------------------------


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
    control = np.zeros(32, dtype=int)
    control[tokens.numpy().ravel()] = instrument._task().control
    features = np.column_stack([np.eye(3)[label], 1 - 2 * (np.concatenate([np.arange(n) for n in (18, 8, 6)]) % 2)])
    guess = features @ np.linalg.lstsq(features, np.eye(3)[control], rcond=None)[0]  # over types: all are as frequent
    known = (guess.argmax(1) == control).mean()
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
    train[np.unique(task.sequence[task.train])] = True
    assert train.sum() == 10
    used = labels != -100
    control = torch.full_like(labels, -100)
    control[used] = torch.tensor(task.control)
    half = {part: used & torch.tensor(train == part)[:, None] for part in (True, False)}
    for layer, state in enumerate(residual_stream(model, tokens)):
        mean, sd = state[half[True]].mean(0), state[half[True]].std(0, correction=0)
        x = {part: ((state - mean) / sd)[where].numpy() for part, where in half.items()}
        for name, target in (("accuracy", labels), ("control_accuracy", control)):
            y = {part: F.one_hot(target[where], 4).double().numpy() for part, where in half.items()}
            guess = Ridge(alpha=0.01 * len(x[True])).fit(x[True], y[True]).predict(x[False])
            hits = guess.argmax(1) == y[False].argmax(1)
            np.testing.assert_allclose(found[name][layer], hits.mean(), rtol=1e-10)
            if name == "accuracy":
                r2 = 1 - ((y[False] - guess) ** 2).sum() / ((y[False] - y[True].mean(0)) ** 2).sum()
                np.testing.assert_allclose(found["r2"][layer], r2, rtol=1e-8)
                by_sequence = half[False].nonzero()[:, 0].numpy()
                total, count = np.bincount(by_sequence, hits), np.bincount(by_sequence)
                np.testing.assert_allclose(found["accuracy_se"][layer], clustered_mean(total, count)[1], rtol=1e-8)
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
        assert all(len(set(task.control[kinds == kind])) == 1 for kind in range(kinds.max() + 1))
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


# --- configuration and contract -----------------------------------------------------------------------------------


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
