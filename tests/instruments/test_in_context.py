"""InContextLearning and FewShot on models that use near, far or no context, in closed form; and their contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

from devmon.data import random_tokens
from devmon.errors import DataError, InstrumentError
from devmon.instruments.few_shot import FewShot
from devmon.instruments.in_context import InContextLearning
from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly, Bigram, InstrumentContract, induction

VOCAB = 40


def measure(instrument: Callable[[Snapshot], xr.Dataset], model: nn.Module) -> xr.Dataset:
    return instrument(Snapshot(0, model.eval()))


def random_model(seed: int, vocab: int = VOCAB, length: int = 64, width: int = 10) -> AttentionOnly:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5

    heads = [[(draw(width, width), draw(width, width)) for _ in range(2)] for _ in range(2)]
    return AttentionOnly(draw(vocab, width), draw(length, width), heads, draw(width, vocab))


class Recall(nn.Module):
    """Expects the token `back` places before the one to be predicted to come again, with a logit of `sure`."""

    def __init__(self, back: int, sure: float = 4.0) -> None:
        super().__init__()
        self.back, self.sure = back, nn.Parameter(torch.tensor(sure, dtype=torch.float64))

    def forward(self, tokens: Tensor) -> Tensor:
        there = F.one_hot(tokens.roll(self.back - 1, 1), VOCAB) * self.sure
        return there * (torch.arange(tokens.shape[1]) >= self.back - 1)[:, None]


class Growing(nn.Module):
    """A logit of .01 for the right next token of the cycle 0 1 2 0 … for every token seen so far."""

    def forward(self, tokens: Tensor) -> Tensor:
        seen = torch.arange(1, tokens.shape[1] + 1, dtype=torch.float64)
        return 0.01 * seen[:, None] * F.one_hot((tokens + 1) % 3, 3)


# --- in-context learning ------------------------------------------------------------------------------------------


def test_score_and_curve_of_a_model_that_knows_the_place_only() -> None:
    def loss(position: np.ndarray | int) -> np.ndarray:
        return np.log1p(2 * np.exp(-0.01 * np.asarray(position)))

    text = (torch.arange(600) + torch.arange(3)[:, None]) % 3
    found = measure(InContextLearning(text, points=5), Growing())
    expected = loss(np.arange(491, 510)).mean() - loss(np.arange(41, 60)).mean()
    np.testing.assert_allclose([found["icl_score"], found["icl_score_reference"]], expected, rtol=1e-10)
    assert expected < 0, "negative where the loss falls"
    np.testing.assert_allclose([found["far_context"], found["far_context_se"]], 0.0, atol=1e-12)
    starts = [1, 4, 13, 46, 167]  # 600 ** (i / 5)
    assert found["position"].values.tolist() == starts
    each = [loss(np.arange(a, b)).mean() for a, b in zip(starts, [*starts[1:], 600], strict=True)]
    np.testing.assert_allclose(found["loss_by_position"], each, rtol=1e-10)
    exact = measure(InContextLearning(text, width=0), Growing())
    np.testing.assert_allclose(exact["icl_score"], loss(500) - loss(50), rtol=1e-10)


@pytest.mark.parametrize(("back", "far"), [(40, True), (23, True), (20, False), (3, False)])
def test_far_context_is_told_from_near(back: int, far: bool) -> None:
    """Text of period `back`; everything further than `early` = 20 tokens back is another row's in the reference."""
    text = random_tokens(VOCAB - 1, 8, back, 3).repeat(1, 100 // back + 1)[:, :100]
    text[:, :] = (text + torch.arange(8)[:, None]) % VOCAB
    found = measure(InContextLearning(text, early=20, late=70, width=1), Recall(back))
    right = math.log1p((VOCAB - 1) * math.exp(-4.0))
    before = np.mean([right if position >= back else math.log(VOCAB) for position in (19, 20, 21)])
    np.testing.assert_allclose(found["icl_score"], right - before, atol=1e-10)
    if not far:
        np.testing.assert_allclose(found["far_context"], 0.0, atol=1e-12)
        return
    columns = [slice(position - back, position - back + 1) for position in (69, 70, 71)]
    same = np.mean([(text[:, c] == text.roll(-1, 0)[:, c]).double().mean() for c in columns])
    assert same < 0.2
    np.testing.assert_allclose(found["far_context"], -4.0 * (1 - same), rtol=1e-10)
    np.testing.assert_allclose(found["icl_score_reference"], found["icl_score"] - found["far_context"], rtol=1e-10)


def test_windows_by_brute_force() -> None:
    text = random_tokens(VOCAB, 7, 64)
    found = measure(InContextLearning(text, early=9, late=50, width=2), random_model(0))

    def nats(tokens: Tensor) -> np.ndarray:
        with torch.no_grad():
            log = random_model(0)(tokens)[:, :-1].log_softmax(-1)
        return -log.gather(2, tokens[:, 1:, None])[..., 0].numpy()

    other = text.clone()
    other[:, :39] = text[[1, 2, 3, 4, 5, 6, 0], :39]  # 48 - 9
    own, foreign = nats(text), nats(other)
    early, late, near = own[:, 6:11].mean(1), own[:, 47:52].mean(1), foreign[:, 47:52].mean(1)
    for name, each in {
        "icl_score": late - early,
        "icl_score_reference": near - early,
        "far_context": late - near,
    }.items():
        np.testing.assert_allclose(found[name], each.mean(), rtol=1e-10)
        np.testing.assert_allclose(found[f"{name}_se"], each.std(ddof=1) / math.sqrt(7), rtol=1e-10)
    np.testing.assert_allclose(found["loss_by_position"][-1], own[:, found["position"].values[-1] - 1 :].mean())


def test_defaults_follow_the_length() -> None:
    for length, places in {64: (6, 62, 1), 512: (50, 500, 8), 2048: (50, 500, 32), 4: (1, 3, 0)}.items():
        instrument = InContextLearning(random_tokens(VOCAB, 2, length))
        assert (instrument.early, instrument.late, instrument.width) == places


@pytest.mark.parametrize(
    "wrong",
    [{"early": 0}, {"late": 64}, {"early": 30, "late": 30}, {"width": -1}, {"points": 1}, {"late": 8, "width": 4}],
)
def test_in_context_learning_refuses_wrong_positions(wrong: dict[str, int]) -> None:
    with pytest.raises(DataError, match="InContextLearning"):
        InContextLearning(random_tokens(VOCAB, 4, 64), **wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="two sequences"):
        InContextLearning(random_tokens(VOCAB, 1, 64))
    with pytest.raises(InstrumentError, match="^InContextLearning needs logits"):
        measure(InContextLearning(random_tokens(VOCAB, 4, 64)), nn.Flatten(0))


# --- few shots ----------------------------------------------------------------------------------------------------


def test_the_induction_circuit_reads_random_maps_in_closed_form() -> None:
    found = measure(FewShot(VOCAB, shots=(2, 5, 8), bos=0), induction(VOCAB, 24, confidence=6.0))
    right = math.log1p((VOCAB - 1) * math.exp(-6.0))
    expected = {
        "loss": right, "loss_reference": 6 + right, "score": right - math.log(VOCAB), "map_gain": 6.0,
        "score_reference": 6 + right - math.log(VOCAB), "accuracy": 1.0, "accuracy_reference": 0.0,
    }  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-8, atol=1e-8, err_msg=name)
    np.testing.assert_allclose(found["loss_zero"], math.log(VOCAB), rtol=1e-9)
    assert expected["score"] < 0 < expected["map_gain"]


def test_random_maps_against_their_definition() -> None:
    instrument = FewShot(VOCAB, shots=(1, 4, 9), prompts=300, bos=3, exclude=(5, 6))
    queries, places = [], []
    for k in (1, 4, 9):
        examples = instrument._examples(k)
        assert examples.shape == (300, k + 1, 2)
        prompt = instrument._prompt(examples)
        assert (prompt[:, 0] == 3).all()
        assert prompt.shape == (300, 2 * k + 3)
        for row, whole in zip(examples.tolist(), prompt[:, 1:].tolist(), strict=True):
            shown, query = row[:-1], row[-1]
            assert not {3, 5, 6} & set(whole)
            assert shown.count(query) == 1
            assert len({token for pair in shown for token in pair}) == 2 * k, "all tokens differ"
            places += [(k, shown.index(query))]
        queries.append(examples[:, -1])
    assert torch.equal(queries[0], queries[1])
    assert torch.equal(queries[1], queries[2])
    share = np.bincount([place for k, place in places if k == 9], minlength=9) / 300
    assert share.max() < 0.2, "the place of the answer is random"
    assert len({tuple(query) for query in queries[0].tolist()}) > 150


def test_a_model_that_repeats_the_last_answer_gains_nothing_from_the_map() -> None:
    found = measure(FewShot(VOCAB, shots=(1, 2, 8), prompts=200), Recall(2))
    assert float(found["map_gain"].sel(shots=1)) > 3, "with one example the last answer is the right one"
    assert float(found["accuracy"].sel(shots=1)) == 1
    late = found.sel(shots=8)
    assert float(late["accuracy"]) < 0.3
    assert abs(float(late["map_gain"])) < 4 * float(late["map_gain_se"])


def test_given_pairs_by_brute_force() -> None:
    pairs = random_tokens(VOCAB, 5, 4 * 3, 2).reshape(5, 4, 3)
    instrument = FewShot(pairs=pairs, shots=(1, 3), bos=1)
    found = measure(instrument, random_model(2))

    def nats(tokens: list[list[int]]) -> np.ndarray:
        with torch.no_grad():
            log = random_model(2)(torch.tensor(tokens))[:, -2].log_softmax(-1).numpy()
        return np.array([-row[tokens[i][-1]] for i, row in enumerate(log)])

    zero = nats([[1, *p[3]] for p in pairs.tolist()])
    three = nats([[1, *p[0], *p[1], *p[2], *p[3]] for p in pairs.tolist()])
    blind = nats([[1, *p[0][:2], p[1][2], *p[1][:2], p[2][2], *p[2][:2], p[0][2], *p[3]] for p in pairs.tolist()])
    one_blind = nats(
        [[1, *p[2][:2], q[2][2], *p[3]] for p, q in zip(pairs.tolist(), pairs.roll(-1, 0).tolist(), strict=True)]
    )
    for name, each in {
        "loss": three,
        "score": three - zero,
        "map_gain": blind - three,
        "score_reference": blind - zero,
    }.items():
        np.testing.assert_allclose(found[name].sel(shots=3), each.mean(), rtol=1e-10, err_msg=name)
        np.testing.assert_allclose(found[f"{name}_se"].sel(shots=3), each.std(ddof=1) / math.sqrt(5), rtol=1e-10)
    np.testing.assert_allclose(found["loss_reference"].sel(shots=1), one_blind.mean(), rtol=1e-10)
    np.testing.assert_allclose(found["loss_zero"], zero.mean(), rtol=1e-10)


def test_a_model_without_context_gains_nothing() -> None:
    table = torch.rand(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
    found = measure(FewShot(VOCAB), Bigram(table / table.sum(1, keepdim=True)))
    for name in ("score", "score_reference", "map_gain", "score_se"):
        np.testing.assert_allclose(found[name], 0.0, atol=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        {}, {"vocab_size": 40, "pairs": torch.zeros(4, 9, 2, dtype=torch.int64)}, {"vocab_size": 15},
        {"vocab_size": 40, "shots": (0, 2)}, {"vocab_size": 40, "shots": ()}, {"vocab_size": 40, "prompts": 1},
        {"pairs": torch.zeros(4, 8, 2, dtype=torch.int64)}, {"pairs": torch.zeros(4, 9, 1, dtype=torch.int64)},
        {"pairs": torch.zeros(4, 9, 2)},
    ],
)  # fmt: skip
def test_few_shot_refuses_what_it_cannot_draw(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="FewShot needs"):
        FewShot(**wrong)


class Attending(InstrumentContract):
    def model(self, seed: int) -> nn.Module:
        return random_model(seed)


class TestInContextLearning(Attending):
    def instrument(self) -> InContextLearning:
        return InContextLearning(random_tokens(VOCAB, 8, 48))


class TestFewShot(Attending):
    def instrument(self) -> FewShot:
        return FewShot(VOCAB, shots=(1, 4))


class TestFewShotPairs(Attending):
    def instrument(self) -> FewShot:
        return FewShot(pairs=random_tokens(VOCAB, 8, 4 * 3).reshape(8, 4, 3), shots=(1, 3))
