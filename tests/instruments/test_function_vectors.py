"""Function-vector heads: a head that carries the task in closed form, a plain implementation, every family."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from devmon.anatomy import Anatomy
from devmon.data.symbol_tasks import TaskPrompts, symbol_tasks
from devmon.errors import DataError, InstrumentError
from devmon.instruments.function_vectors import FunctionVectorHeads
from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly, InstrumentContract, even
from tests.anatomy.test_anatomy_sites import VOCAB, family
from tests.anatomy.test_edges import CAUSAL
from tests.support.models import random_model


def snapshot(model: nn.Module) -> Snapshot:
    return Snapshot(0, model.eval())


def telling(model: nn.Module, vocab: int, count: int = 12) -> TaskPrompts:
    """Prompts of two tasks with the answers that their examples help most, so that there is a gain."""
    made = symbol_tasks(vocab, tasks=2, prompts=count, shots=3, symbols=6, query="shown")
    anatomy = Anatomy(model)
    with torch.no_grad():
        gap = (anatomy.run(made.prompts)[0] - anatomy.run(made.shuffled)[0])[:, -1]
    return TaskPrompts(made.prompts, made.shuffled, gap.argmax(-1), made.task)


def carrier(strength: float = 6.0) -> AttentionOnly:
    """Tokens 0 and 1 tell the task, 2 and 3 are its answers: head (0, 1) adds, to the logit of the answer of a task,
    `strength` times the share of its token in the past. Head (1, 0) attends and writes what leaves logits alone."""
    eye = torch.eye(8, dtype=torch.float64)
    zero, write, aside = torch.zeros_like(eye), torch.zeros_like(eye), torch.zeros_like(eye)
    write[0, 4], write[1, 5] = strength, strength
    aside[2, 6] = 3.0
    heads = [[(zero, zero), (zero, write)], [(zero, aside), (zero, zero)]]
    unembed = torch.zeros(8, 4, dtype=torch.float64)
    unembed[4, 2] = unembed[5, 3] = 1.0
    return AttentionOnly(eye[:4], torch.zeros(8, 8, dtype=torch.float64), heads, unembed)


def shown(count: int = 10) -> TaskPrompts:
    """Eight tokens, 4 to 6 of which are those of the task; shuffled, 2 of each."""
    generator = torch.Generator().manual_seed(0)
    rows, blind, answers, tasks = [], [], [], []
    for task in (0, 1):
        for i in range(count):
            n = 4 + i % 3
            row = torch.tensor([task] * n + [2] * (8 - n))
            rows.append(row[torch.randperm(8, generator=generator)])
            blind.append(torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])[torch.randperm(8, generator=generator)])
            answers.append(2 + task)
            tasks.append(task)
    return TaskPrompts(torch.stack(rows), torch.stack(blind), torch.tensor(answers), torch.tensor(tasks))


def test_the_head_that_carries_the_task_in_closed_form() -> None:
    tasks = shown()
    found = FunctionVectorHeads(tasks)(snapshot(carrier()))
    made = [4 + i % 3 for i in range(5)]  # of the first five prompts of each task
    share = np.mean(made) / 8
    logit = 6.0 * (share - 2 / 8)  # the other answer loses 6 · 2/8; a quarter of both leaves the centred logit
    expected = np.zeros((2, 2))
    expected[0, 1] = logit - (logit - 6.0 * 2 / 8) / 4
    np.testing.assert_allclose(found["logit_effect"], expected, atol=1e-9)
    np.testing.assert_allclose(found["logit_attribution"], expected, atol=1e-9)
    np.testing.assert_allclose(found["logit_effect_null"], 0, atol=1e-9)

    def p(one: float, other: float) -> float:
        return float(np.exp(one) / (np.exp(one) + np.exp(other) + 2))

    change = p(6 * share, 0) - p(1.5, 1.5)
    np.testing.assert_allclose(found["p_effect"], [[0, change], [0, 0]], atol=1e-9)
    np.testing.assert_allclose([found["p_effect_se"][0, 1], found["logit_effect_se"][0, 1]], 0, atol=1e-9)
    gains = [np.log(p(6 * (4 + i % 3) / 8, 0) / p(1.5, 1.5)) for i in range(5, 10)]
    np.testing.assert_allclose(found["gain"], np.mean(gains))


def test_against_a_plain_implementation() -> None:
    """Heads of the last layer add to the logits: their mean, less what they had, through the unembedding."""
    model = random_model(3)
    tasks = telling(model, 40)
    found = FunctionVectorHeads(tasks, exact=6)(snapshot(model))
    later = torch.ones(tasks.prompts.shape[1], tasks.prompts.shape[1], dtype=torch.bool).triu(1)

    def added(state: Tensor, block: nn.Module) -> Tensor:
        width, each = state.shape[-1], []
        for h in range(3):
            part = slice(h * width, (h + 1) * width)
            scores = (state @ block.query.weight.T[:, part] @ state.transpose(1, 2)).masked_fill(later, -torch.inf)
            each.append(scores.softmax(-1) @ state @ block.out.weight.T[part])
        return torch.stack(each)

    with torch.no_grad():
        ends = []
        for tokens in (tasks.prompts, tasks.shuffled):
            state = model.embed(tokens) + model.positions[: tokens.shape[1]]
            state = state + added(state, model.blocks[0]).sum(0)
            own = added(state, model.blocks[1])
            ends.append((own[:, :, -1], (state + own.sum(0))[:, -1]))
        half = 6
        for h in range(3):
            moves, nulls = [], []
            for i in [*range(half, 12), *range(12 + half, 24)]:
                first = slice(0, half) if i < 12 else slice(12, 12 + half)
                for source, into in ((0, moves), (1, nulls)):
                    mean = ends[source][0][h, first].mean(0)
                    old = ends[1][1][i] @ model.unembed.weight.T
                    new = (ends[1][1][i] - ends[1][0][h, i] + mean) @ model.unembed.weight.T
                    a = tasks.answer[i]
                    p = new.softmax(-1)[a] - old.softmax(-1)[a]
                    into.append((float(p), float(new[a] - new.mean() - old[a] + old.mean())))
            for name, values in (("", moves), ("_null", nulls)):
                p, logit = np.array(values).T
                np.testing.assert_allclose(found[f"p_effect{name}"][1, h], p.mean(), atol=1e-10)
                np.testing.assert_allclose(found[f"logit_effect{name}"][1, h], logit.mean(), atol=1e-10)
                np.testing.assert_allclose(found[f"p_effect{name}_se"][1, h], p.std(ddof=1) / np.sqrt(12), atol=1e-10)
    np.testing.assert_allclose(found["logit_attribution"][1], found["logit_effect"][1], atol=1e-9)  # linear from there
    with torch.no_grad():  # a head of layer 0 at the last place alone: what layer 1 reads elsewhere stays
        for h in range(3):
            start = [
                model.embed(tokens) + model.positions[: tokens.shape[1]] for tokens in (tasks.prompts, tasks.shuffled)
            ]
            writes = [added(state, model.blocks[0]) for state in start]
            moved = writes[1].clone()
            for task in (slice(0, 12), slice(12, 24)):
                moved[h, task, -1] = writes[0][h, task.start : task.start + half, -1].mean(0)
            logits = []
            for write in (writes[1], moved):
                state = start[1] + write.sum(0)
                logits.append(model.unembed(state + added(state, model.blocks[1]).sum(0))[:, -1])
            change = (logits[1] - logits[0]) - (logits[1] - logits[0]).mean(1, keepdim=True)
            each = change.gather(1, tasks.answer[:, None])[[*range(half, 12), *range(12 + half, 24)], 0]
            np.testing.assert_allclose(found["logit_effect"][0, h], each.mean(), atol=1e-10)
    assert not np.allclose(found["logit_attribution"][0], found["logit_effect"][0], atol=1e-3)


def test_screening_keeps_the_heads_with_the_largest_attribution() -> None:
    model = random_model(1)
    signs = set()
    for exact in range(1, 6):
        found = FunctionVectorHeads(telling(model, 40), exact=exact)(snapshot(model))
        kept, size = np.isfinite(found["p_effect"].values), found["logit_attribution"].values
        assert kept.sum() == exact
        assert np.abs(size[kept]).min() > np.abs(size[~kept]).max()
        signs |= set(np.sign(size[kept]))
    assert signs == {-1.0, 1.0}


@pytest.mark.parametrize("name", CAUSAL)
def test_every_family(name: str) -> None:
    model = family(name)
    found = FunctionVectorHeads(telling(model, VOCAB), exact=3)(snapshot(model))
    assert float(found["gain"]) > 3 * float(found["gain_se"])
    assert int(np.isfinite(found["logit_effect"]).sum()) == 3
    assert np.isfinite(found["logit_attribution"]).all()
    assert np.nanmax(np.abs(found["logit_effect"])) > 1e-3


def test_no_gain_no_effect() -> None:
    found = FunctionVectorHeads(symbol_tasks(40, prompts=8))(snapshot(even(40, 25)))
    assert (float(found["gain"]), float(found["gain_se"])) == (0.0, 0.0)
    assert all(np.isnan(found[name]).all() for name in ("p_effect", "logit_effect", "logit_attribution"))
    assert "examples do not help" in found.attrs["below_floor"]


@pytest.mark.parametrize("query", ["new", "shown"])
def test_symbol_tasks(query: Any) -> None:
    made = symbol_tasks(50, tasks=3, prompts=40, shots=4, symbols=6, query=query, seed=3, bos=7, exclude=(0,))
    maps: dict[int, dict[int, int]] = {0: {}, 1: {}, 2: {}}
    seen: set[int] = set()
    for row, other, answer, task in zip(
        made.prompts.tolist(), made.shuffled.tolist(), made.answer.tolist(), made.task.tolist(), strict=True
    ):
        assert row[0] == other[0] == 7
        shots, labels = row[1:-2:4], row[3:-2:4]
        assert other[1:-2:4] == shots
        assert (len({*row[2::4]}), len({*row[4::4]})) == (1, 1)
        seen |= {*row, answer}
        assert row[-2:] == other[-2:]
        assert sorted(other[3:-2:4]) == sorted(labels)
        assert all(a != b for a, b in zip(other[3:-2:4], labels, strict=True))
        for x, y in [*zip(shots, labels, strict=True), (row[-2], answer)]:
            assert maps[task].setdefault(x, y) == y
        assert len(set(shots)) == 4
        assert (row[-2] in shots) == (query == "shown")
    assert all(sorted(m) == sorted(maps[0]) and len({*m.values()} - {*m}) == 6 for m in maps.values())
    assert maps[0] != maps[1]
    assert 0 not in seen
    assert len(seen - {7}) == 14
    assert max(seen) > 25, "symbols are drawn from all tokens: the first of a vocabulary are special"
    bare = symbol_tasks(50, tasks=1, prompts=40, shots=4, symbols=6, query=query, seed=3, plain=True)
    assert bare.prompts.shape == (40, 9)
    for row, answer in zip(bare.prompts.tolist(), bare.answer.tolist(), strict=True):
        assert query == "new" or row[row.index(row[-1]) + 1] == answer
    assert made == symbol_tasks(50, tasks=3, prompts=40, shots=4, symbols=6, query=query, seed=3, bos=7, exclude=(0,))


def test_what_cannot_be_measured_is_told() -> None:
    for wrong in ({"symbols": 30}, {"shots": 8}, {"shots": 1}, {"tasks": 0}):
        with pytest.raises(DataError, match="symbol_tasks needs"):
            symbol_tasks(40, **wrong)  # type: ignore[arg-type]
    made = symbol_tasks(40, prompts=4)
    for broken in (
        (made.prompts, made.shuffled[:, 1:], made.answer, made.task),
        (made.prompts, made.shuffled, made.answer[1:], made.task),
        (made.prompts, made.shuffled, made.answer, torch.arange(16)),
    ):
        with pytest.raises(DataError, match="TaskPrompts needs"):
            TaskPrompts(*broken)
    with pytest.raises(DataError, match="exact >= 0"):
        FunctionVectorHeads(made, exact=-1)
    large = TaskPrompts(made.prompts, made.shuffled, made.answer + 90, made.task)
    with pytest.raises(InstrumentError, match="answers go up to 1.., AttentionOnly has 40 logits"):
        FunctionVectorHeads(large)(snapshot(even(40, 25)))


def test_the_cost_is_what_is_passed() -> None:
    model, passed = family("gpt2"), 0

    def count(module: nn.Module, args: tuple[Tensor]) -> None:
        nonlocal passed
        passed += args[0].numel()

    instrument = FunctionVectorHeads(telling(model, VOCAB), exact=2)
    model.register_forward_pre_hook(count)
    instrument(snapshot(model))
    assert passed == instrument.cost().forwards * instrument.cost().positions


TASKS = telling(random_model(0), 40)


class TestFunctionVectorHeads(InstrumentContract):
    def model(self, seed: int) -> nn.Module:
        return random_model(seed)

    def instrument(self) -> FunctionVectorHeads:
        return FunctionVectorHeads(TASKS, exact=2)
