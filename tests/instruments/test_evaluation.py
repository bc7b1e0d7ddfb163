"""Evaluation on a model whose next token depends on the last alone, in closed form; and its contract."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from devmon import DataError
from devmon.instruments import Evaluation
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract

VOCAB = 6


class Bigram(torch.nn.Module):
    """Logits (batch, pos, VOCAB) by a table of the token before."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens]


class Words:
    """A token a letter, a to f; what follows a space is one token with it."""

    bos_token_id = 5

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": ["abcdef".index(letter) for letter in text.replace(" ", "")]}


def table(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(task: Evaluation, model: torch.nn.Module | None = None) -> xr.Dataset:
    return task(Snapshot(0, (model or Bigram(table())).eval()))


def spelt(logs: torch.Tensor, text: str) -> float:
    """log p of all letters but the first, each after the one before."""
    ids = ["abcdef".index(letter) for letter in text]
    return float(sum(logs[a, b] for a, b in zip(ids[:-1], ids[1:], strict=True)))


CHOICES: list[dict[str, Any]] = [
    {"context": "ab", "choices": [" c", " de", " acd"], "answer": 1},
    {"context": "f", "choices": [" bb", " a"], "answer": 0},
    {"context": "abcde", "choices": [" a", " f", " bcdea"], "answer": 2},
    {"context": "", "choices": ["b", "cd"], "answer": 0},
]
CLOZE: list[dict[str, Any]] = [
    {"context": "ab", "answer": "cd"}, {"context": "fff", "answer": "a"}, {"context": "c", "answer": "eda"},
]  # fmt: skip


def test_choices_are_scored_by_their_log_likelihood() -> None:
    logs = torch.log_softmax(table(), -1)
    found = measured(Evaluation.of_text(CHOICES, Words()))
    won: dict[str, list[float]] = {"accuracy": [], "accuracy_by_token": [], "accuracy_by_character": []}
    nats, shares = [], []
    for entry in CHOICES:
        last = entry["context"][-1:] or "f"  # nothing: the beginning of text
        texts = [choice.strip() for choice in entry["choices"]]
        scores = np.array([spelt(logs, last + text) for text in texts])
        sizes = np.array([len(text) for text in texts])
        for name, score in {"accuracy": scores, "accuracy_by_token": scores / sizes}.items():
            won[name].append(float(score.argmax() == entry["answer"]))
        won["accuracy_by_character"].append(won["accuracy_by_token"][-1])  # a token a letter
        nats.append(-scores[entry["answer"]])
        shares.append(math.log(np.exp(scores).sum()) - scores[entry["answer"]])
    assert won["accuracy"] != won["accuracy_by_token"]  # the normalisation matters here
    for name, values in (won | {"nats": nats, "choice_nats": shares}).items():
        assert float(found[name]) == pytest.approx(np.mean(values), rel=1e-6), name
        assert float(found[f"{name}_se"]) == pytest.approx(np.std(values, ddof=1) / math.sqrt(4), rel=1e-6), name
    assert float(found["chance"]) == pytest.approx((1 / 3 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert float(found["choice_chance"]) == pytest.approx(math.log(6) / 2)
    assert found.attrs["headline"] == ["accuracy", "choice_nats", "nats"]
    assert "exact" not in found


def test_a_model_that_knows_nothing_is_at_chance() -> None:
    """Choices of one length tie, and count in part; the share of the right answer is 1 / choices."""
    items = [{"context": "a", "choices": ["b", "c", "d"][: 2 + n % 2], "answer": n % 2} for n in range(6)]
    found = measured(Evaluation.of_text(items, Words()), Bigram(torch.zeros(VOCAB, VOCAB)))
    for name in ("accuracy", "accuracy_by_token", "accuracy_by_character"):
        assert float(found[name]) == pytest.approx(float(found["chance"]), rel=1e-6)
    assert float(found["choice_nats"]) == pytest.approx(float(found["choice_chance"]), rel=1e-5)
    assert float(found["nats"]) == pytest.approx(math.log(VOCAB), rel=1e-6)


def test_answers_that_fit_are_told_from_those_that_stand_elsewhere() -> None:
    """Cloze: the reference has the same answers after the next items' contexts."""
    logs = torch.log_softmax(table(), -1)
    found = measured(Evaluation.of_text(CLOZE, Words()))
    pairs = [(CLOZE[n]["context"], CLOZE[(n + 1) % 3]["context"], CLOZE[n]["answer"]) for n in range(3)]
    own = [-spelt(logs, context[-1] + answer) for context, _, answer in pairs]
    other = [-spelt(logs, context[-1] + answer) for _, context, answer in pairs]
    assert float(found["nats"]) == pytest.approx(np.mean(own), rel=1e-6)
    assert float(found["nats_reference"]) == pytest.approx(np.mean(other), rel=1e-6)
    assert float(found["nats_reference_se"]) == pytest.approx(np.std(other, ddof=1) / math.sqrt(3), rel=1e-6)
    after = table().argmax(-1)
    taught = [  # the model's own most likely answers, and one whose second letter is not
        {"context": "a", "answer": "abcdef"[after[0]]},
        {"context": "b", "answer": "abcdef"[after[1]] + "abcdef"[after[after[1]]]},
        {"context": "c", "answer": "abcdef"[after[2]] + "abcdef"[(after[after[2]] + 1) % VOCAB]},
    ]
    assert float(measured(Evaluation.of_text(taught, Words()))["exact"]) == pytest.approx(2 / 3)
    assert found.attrs["headline"] == ["exact", "nats"]


def test_padding_and_batches_do_not_matter() -> None:
    task = Evaluation.of_text(CHOICES, Words())
    wider = torch.cat([task.tokens, torch.full((len(task.tokens), 3), 2)], 1)
    other = Evaluation(wider, task.item, task.start, task.stop, task.right, task.characters, batch_size=3)
    xr.testing.assert_allclose(measured(task), measured(other), rtol=1e-12)
    assert task.cost().forwards == len(task.tokens)
    assert Evaluation.of_text(CLOZE, Words()).cost().forwards == 2 * len(CLOZE)


TASK = {"tokens": torch.zeros(4, 3, dtype=torch.int64), "item": [0, 0, 1, 1], "start": [1] * 4, "stop": [2] * 4}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"right": [True, True, False, True]}, "one of them right"),
        ({"item": [0, 1, 0, 1]}, "one item after another"),
        ({"item": [0, 0, 2, 2]}, "items 0, 1, 2"),
        ({"item": [0, 1, 1, 1], "right": [True, True, False, False]}, "not both: make two"),
        ({"start": [0, 1, 1, 1]}, "1 <= start < stop <= 3"),
        ({"stop": [1, 2, 2, 2]}, "1 <= start < stop <= 3"),
        ({"stop": [2, 2, 2, 4]}, "1 <= start < stop <= 3"),
        ({"start": [1, 1]}, r"start \(row,\) of the 4 rows"),
        ({"characters": [1, 0, 1, 1]}, "characters .* at least 1"),
        ({"item": [0, 0, 0, 0], "right": [True, False, False, False]}, "two items"),
    ],
)
def test_rows_that_are_no_task_are_refused(changed: dict[str, Any], said: str) -> None:
    given = TASK | {"right": [True, False, False, True]} | changed
    with pytest.raises(DataError, match=said):
        Evaluation(**{key: torch.as_tensor(value) for key, value in given.items()})


@pytest.mark.parametrize("item", [{"context": "a", "choices": ["b"], "answer": 1}, {"context": "a"}, {"choices": []}])
def test_texts_that_are_no_question_are_refused(item: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="item 1 is no question: expected context, choices"):
        Evaluation.of_text([CLOZE[0], item], Words())


class TestChoices(InstrumentContract):
    def instrument(self) -> Evaluation:
        return Evaluation.of_text(CHOICES, Words())

    def model(self, seed: int) -> torch.nn.Module:
        return Bigram(table(seed).float())


class TestCloze(TestChoices):
    def instrument(self) -> Evaluation:
        return Evaluation.of_text(CLOZE, Words())
