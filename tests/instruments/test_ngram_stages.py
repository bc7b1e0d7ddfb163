"""NgramStages on chains whose frequencies are known, against a dictionary of counts, and its contract."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.data import clustered_mean, random_tokens
from devmon.errors import DataError, InstrumentError
from devmon.instruments.ngram_stages import NgramStages
from devmon.snapshot import Snapshot
from devmon.testing import Bigram, InstrumentContract

VOCAB = 7


def measure(instrument: NgramStages, model: nn.Module) -> xr.Dataset:
    return instrument(Snapshot(0, model.eval()))


def chain(table: Tensor, sequences: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(len(table), (sequences, 1), generator=generator)
    for _ in range(length - 1):
        text = torch.cat([text, torch.multinomial(table[text[:, -1]], 1, generator=generator)], 1)
    return text


def random_table(seed: int, vocab: int = VOCAB) -> Tensor:
    return torch.rand(vocab, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).pow(3) + 0.01


def text_of(seed: int, sequences: int = 6, length: int = 21) -> Tensor:
    return chain(random_table(0), sequences, length, seed)


class Slow:
    """p_n by dictionaries."""

    def __init__(self, corpus: Tensor, vocab: int, smoothing: float) -> None:
        self.counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        self.vocab, self.smoothing = vocab, smoothing
        for row in corpus.tolist():
            for n in range(1, 5):
                for t in range(n - 1, len(row)):
                    self.counts[tuple(row[t - n + 1 : t])][row[t]] += 1

    def __call__(self, context: tuple[int, ...] | None) -> np.ndarray:
        if context is None:
            return np.full(self.vocab, 1 / self.vocab)
        lower = self(context[1:] if context else None)
        counts = self.counts[context]
        count = np.array([counts[x] for x in range(self.vocab)], float)
        weight = count.sum() + self.smoothing
        return (count + self.smoothing * lower) / weight if weight else lower


class Longer(nn.Module):
    """Logits from the last two tokens and the place: not an n-gram model of the corpus."""

    def __init__(self, seed: int, vocab: int = VOCAB) -> None:
        super().__init__()
        draw = torch.randn(2, vocab, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.table = nn.Parameter(draw)

    def forward(self, tokens: Tensor) -> Tensor:
        before = torch.cat([tokens[:, :1], tokens[:, :-1]], 1)
        place = torch.arange(tokens.shape[1])[:, None] / 30
        return self.table[0, tokens] + self.table[1, before] * (1 + place)


@pytest.mark.parametrize("smoothing", [0.7, 25.0])
def test_every_number_by_brute_force(smoothing: float) -> None:
    corpus, tokens, model = text_of(1, 5, 40), text_of(2), Longer(0)
    found = measure(NgramStages(corpus, tokens, smoothing=smoothing, batch_size=4, common=0), model)
    slow = Slow(corpus, VOCAB, smoothing)
    with torch.no_grad():
        log = model(tokens).log_softmax(-1).numpy()
    rows = tokens.tolist()
    for order in (1, 2, 3, 4):
        cross, entropy, theirs, own = np.zeros((4, len(rows), 18))
        for b, row in enumerate(rows):
            for i, t in enumerate(range(3, 21)):
                p = slow(tuple(row[t - order + 1 : t]))
                np.testing.assert_allclose(p.sum(), 1)
                cross[b, i], entropy[b, i] = -(p * log[b, t - 1]).sum(), -(p * np.log(p)).sum()
                theirs[b, i], own[b, i] = -np.log(p[row[t]]), -log[b, t - 1, row[t]]
        expected = {
            "cross_entropy": cross.mean(), "entropy": entropy.mean(), "kl": cross.mean() - entropy.mean(),
            "ngram_loss": theirs.mean(), "loss_ratio": own.mean() / theirs.mean(),
            "cross_entropy_se": cross.mean(1).std(ddof=1) / math.sqrt(6),
            "kl_se": (cross - entropy).mean(1).std(ddof=1) / math.sqrt(6),
            "loss_ratio_se": clustered_mean(own.sum(1), theirs.sum(1))[1],
            "kl_reference": math.log(VOCAB) - entropy.mean(),
            "loss_ratio_reference": math.log(VOCAB) / theirs.mean(),
        }  # fmt: skip
        for name, value in expected.items():
            np.testing.assert_allclose(found[name].sel(order=order), value, rtol=1e-9, err_msg=f"{name} {order}")
    np.testing.assert_allclose(found["loss"], own.mean(), rtol=1e-10)
    assert float(found["kl"].min()) > 0.1


def test_a_bigram_model_is_at_its_own_chain() -> None:
    """Frequencies of the corpus as the model: KL 0 and loss ratio 1 at n = 2, and neither at other orders."""
    corpus, tokens = text_of(1, 40, 50), text_of(2)
    counts = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for row in corpus.tolist():
        for a, b in zip(row[:-1], row[1:], strict=True):
            counts[a, b] += 1
    assert (counts > 0).all()
    model = Bigram(counts / counts.sum(1, keepdim=True))
    found = measure(NgramStages(corpus, tokens, orders=(1, 2), smoothing=0.0, common=0), model)
    two, one = found.sel(order=2), found.sel(order=1)
    np.testing.assert_allclose([two["kl"], two["kl_se"], two["loss_ratio_se"]], 0.0, atol=1e-12)
    np.testing.assert_allclose(two["loss_ratio"], 1.0, rtol=1e-12)
    np.testing.assert_allclose(two["cross_entropy"], two["entropy"], rtol=1e-12)
    assert float(one["kl"]) > 0.1
    assert abs(float(one["loss_ratio"]) - 1) > 0.1


def test_deterministic_text_without_smoothing_and_with_forbidden_tokens() -> None:
    """The cycle 0 1 2 0 …: bigrams have no entropy, unigrams log 3; a model with chances of 0 elsewhere is exact."""
    text = (torch.arange(30) + torch.arange(3)[:, None]) % 3
    with np.errstate(divide="ignore"):
        model = Bigram(torch.eye(3).roll(1, 1))
    found = measure(NgramStages(text, text, orders=(2, 3), smoothing=0.0, common=0), model)
    for name in ("kl", "entropy", "ngram_loss", "loss"):
        np.testing.assert_allclose(found[name], 0.0, atol=1e-12)
    assert np.isnan(found["loss_ratio"]).all()
    even = measure(NgramStages(text, text, orders=(1,), smoothing=0.0, common=0), Bigram(torch.full((3, 3), 1 / 3)))
    np.testing.assert_allclose([even["entropy"][0], even["cross_entropy"][0]], math.log(3), rtol=1e-9)
    forbidden = measure(NgramStages(text, text, orders=(1,), common=0), model)
    assert np.isnan(forbidden["kl"][0])


def test_a_context_that_never_came_up_falls_back_to_the_shorter_one() -> None:
    corpus, tokens = torch.tensor([[0, 1, 0, 1, 2]]), torch.tensor([[2, 0], [2, 1]])  # 2 is never followed
    found = measure(NgramStages(corpus, tokens, orders=(1, 2), smoothing=0.0, common=0), Longer(0, 3))
    unigram = np.array([2, 2, 1]) / 5
    np.testing.assert_allclose(found["entropy"], -(unigram * np.log(unigram)).sum(), rtol=1e-12)
    np.testing.assert_allclose(found["ngram_loss"], -math.log(2 / 5), rtol=1e-12)
    np.testing.assert_allclose(found["kl"][0], found["kl"][1], rtol=1e-12)


def test_logits_beyond_the_vocabulary_take_their_share() -> None:
    model = Bigram(torch.full((9, 9), 1 / 9))
    found = measure(NgramStages(text_of(1), text_of(2), vocab_size=VOCAB, common=0), model)
    np.testing.assert_allclose(found["loss"], math.log(9), rtol=1e-9)
    np.testing.assert_allclose(found["cross_entropy"], math.log(9), rtol=1e-9)


def test_uniform_predictions_score_the_references() -> None:
    model = Bigram(torch.full((VOCAB, VOCAB), 1 / VOCAB))
    found = measure(NgramStages(text_of(1), text_of(2)), model)
    for name in ("kl", "loss_ratio"):
        np.testing.assert_allclose(found[name], found[f"{name}_reference"], rtol=1e-9)
    np.testing.assert_allclose(found["common_ratio"][1:], 1.0, rtol=1e-9)


def test_the_chain_itself_beats_what_was_counted_of_it_and_has_no_third_order() -> None:
    table = random_table(0)
    table = table / table.sum(1, keepdim=True)
    found = measure(NgramStages(chain(table, 60, 100, 1), chain(table, 60, 100, 2), common=0), Bigram(table))
    assert float(found["kl"].sel(order=2)) < 0.01 < 0.02 < float(found["kl"].sel(order=1))
    assert float(found["kl"].sel(order=4)) > 5 * float(found["kl"].sel(order=2)), "high orders guess from few counts"
    ratio, se = (float(found[name].sel(order=2)) for name in ("loss_ratio", "loss_ratio_se"))
    assert abs(ratio - 1) < 4 * se + 0.005


def test_common_ngrams() -> None:
    corpus = torch.tensor([[1, 2, 3, 1, 2, 3, 0, 0, 4]])
    tokens = torch.tensor([[4, 4, 0, 2, 1, 0, 3], [0, 1, 1, 3, 3, 3, 2]])
    instrument = NgramStages(corpus, tokens, vocab_size=5, orders=(2, 3), common=2)
    assert instrument._frequent[3].tolist()[0] == [1, 2, 3]
    assert sorted(instrument._frequent[2].tolist()) == [[1, 2], [2, 3]]
    model = Longer(1, 5)
    with torch.no_grad():
        log = model(torch.tensor([[1, 2], [2, 3], [4, 4], [0, 1]])).log_softmax(-1)[:, 0].numpy()
    often, held_out = [-log[0, 2], -log[1, 3]], [-log[2, 4], -log[3, 1]]
    found = measure(instrument, model)
    ratio = np.mean(held_out) / np.mean(often)
    np.testing.assert_allclose(found["common_ratio"].sel(order=2), ratio, rtol=1e-9)
    parts = [np.std(values, ddof=1) / math.sqrt(2) / np.mean(values) for values in (often, held_out)]
    np.testing.assert_allclose(found["common_ratio_se"].sel(order=2), ratio * np.hypot(*parts), rtol=1e-9)


def test_minibatches_and_the_order_of_sequences_do_not_matter() -> None:
    corpus, tokens = text_of(1), text_of(2)
    whole = measure(NgramStages(corpus, tokens, batch_size=99, common=0), Longer(0))
    xr.testing.assert_allclose(
        whole, measure(NgramStages(corpus, tokens, batch_size=1, common=0), Longer(0)), rtol=1e-10
    )
    turned = measure(NgramStages(corpus.flip(0), tokens.flip(0), common=0), Longer(0)).drop_dims("replicate")
    xr.testing.assert_allclose(whole.drop_dims("replicate"), turned, rtol=1e-10)
    flat = measure(NgramStages(corpus.flatten(), tokens, common=0), Longer(0))
    assert not np.allclose(flat["entropy"], whole["entropy"], rtol=1e-6), "n-grams do not cross rows"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"smoothing": 0.0, "tokens": torch.tensor([[0, 6, 6, 6, 6, 0]])}, "not in the corpus: give smoothing"),
        ({"smoothing": -1.0}, "smoothing and common >= 0"),
        ({"orders": ()}, "orders of at least 1"),
        ({"orders": (0, 2)}, "orders of at least 1"),
        ({"orders": (30,)}, "at least 30 positions"),
        ({"vocab_size": 3}, r"in 0 \.\. 2, got"),
        ({"corpus": torch.rand(4, 5)}, "NgramStages needs corpus"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    corpus = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 0]])
    with pytest.raises(DataError, match=message):
        NgramStages(**{"corpus": corpus, "tokens": text_of(2), **change})


def test_a_small_vocabulary_is_told() -> None:
    with pytest.raises(InstrumentError, match=r"^NgramStages needs logits of at least the 7 tokens.*Bigram has 5"):
        measure(NgramStages(text_of(1), text_of(2) % 5, vocab_size=7), Bigram(torch.full((5, 5), 0.2)))


class TestNgramStages(InstrumentContract):
    def instrument(self) -> NgramStages:
        return NgramStages(random_tokens(VOCAB, 4, 30, 1), random_tokens(VOCAB, 8, 20, 2))

    def model(self, seed: int) -> nn.Module:
        return Longer(seed)
