"""Heads and grammar: attention between the ends of spans, and from tokens to what they depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from devmon.anatomy import attention_patterns
from devmon.data.grammars import SMALL, Sentences, trees
from devmon.errors import DataError
from devmon.instruments import AttachmentHeads, BoundaryAttention
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract
from devmon.testing.handbuilt import fixed_offset
from tests.support.models import random_model

DRAWN = SMALL.draw(24, 40, torch.Generator().manual_seed(0))
TREES = trees(DRAWN)


def test_the_tree_of_a_sentence_by_hand() -> None:
    """start (a b) (c d e) start: the spans of one level end at b and at e; the last sentence is cut."""
    ends = torch.tensor([[[-100, 0, 1, 0, 0, 1, -100, 0]]])
    found = trees(Sentences(torch.tensor([[3, 0, 1, 2, 0, 1, 3, 0]]), torch.zeros_like(ends), ends))
    assert found.head[0].tolist() == [-1, -1, 1, 1, 3, 3, -1, -1]
    assert found.relation[0].tolist() == [-1, -1, 1, 0, 1, 1, -1, -1]
    assert found.sentence[0].tolist() == [-1, 0, 0, 0, 0, 0, -1, -1]
    assert found.distances(0, 0).tolist() == [
        [0, 1, 1, 2, 2],
        [1, 0, 2, 3, 3],
        [1, 2, 0, 1, 1],
        [2, 3, 1, 0, 2],
        [2, 3, 1, 2, 0],
    ]


def test_trees_of_a_grammar_have_one_root_a_sentence_and_as_many_spans_as_it() -> None:
    whole = TREES.sentence >= 0
    places = torch.arange(40).expand_as(whole)
    assert (TREES.head[whole] < places[whole]).all(), "the first token of a symbol is its head"
    roots = (whole & (TREES.head < 0)).sum()
    assert roots == sum(len(row[row >= 0].unique()) for row in TREES.sentence)
    for level in (0, 1):  # each span but the first of its parent hangs on another by its first token
        spans = (whole & (DRAWN.ends[level] == 1)).sum()
        above = roots if level == 0 else (whole & (DRAWN.ends[0] == 1)).sum()
        assert (TREES.relation == level).sum() == spans - above


def by_hand(tokens: Tensor, ends: Tensor, model: nn.Module) -> np.ndarray:
    """`by_level` in loops, (level, level_to, apart, layer, head)."""
    patterns = [pattern.double().numpy() for pattern in attention_patterns(model, tokens)]
    sentence = (ends[0] < 0).numpy().cumsum(1)
    inside = (ends[0] >= 0).numpy()
    heads = patterns[0].shape[1]
    found = np.zeros((len(ends), len(ends), 3, len(patterns), heads))
    for layer, pattern in enumerate(patterns):
        for head in range(heads):
            at: dict[int, list[float]] = {}
            for row in range(len(tokens)):
                for i in range(tokens.shape[1]):
                    for j in range(i):
                        if inside[row, i] and inside[row, j] and sentence[row, i] == sentence[row, j]:
                            at.setdefault(i - j, []).append(pattern[row, head, i, j])
            mean = {distance: np.mean(values) for distance, values in at.items()}
            for one in range(len(ends)):
                for other in range(len(ends)):
                    cells: list[list[float]] = [[], [], []]
                    for row in range(len(tokens)):
                        for i in range(tokens.shape[1]):
                            if ends[one, row, i] == 1:
                                same = sentence[row] == sentence[row, i]
                                before = [j for j in range(i) if ends[other, row, j] == 1 and same[j]][::-1]
                                for apart, j in enumerate(before[:3]):
                                    cells[apart].append(pattern[row, head, i, j] - mean[i - j])
                    found[one, other, :, layer, head] = [np.mean(cell) if cell else np.nan for cell in cells]
    return found


def test_boundary_attention_in_loops() -> None:
    model, tokens, ends = random_model(0), DRAWN.tokens[:6, :24], DRAWN.ends[:, :6, :24]
    found = BoundaryAttention(tokens, ends, batch_size=4)(Snapshot(0, model))
    np.testing.assert_allclose(found["by_level"], by_hand(tokens, ends, model), rtol=1e-9, atol=1e-12)


def test_attention_by_distance_alone_is_none_between_ends() -> None:
    """The head looks one place back, whatever stands there; a sentence begins after a token that is left out."""
    model = fixed_offset(4, 40, 1)
    found = BoundaryAttention(DRAWN.tokens, DRAWN.ends)(Snapshot(0, model))
    for name in ("boundary", "boundary_shuffled", "by_level"):
        np.testing.assert_allclose(found[name].fillna(0), 0, atol=1e-9)


def test_a_head_that_looks_from_end_to_end_is_seen_and_not_with_the_spans_shuffled() -> None:
    """Tokens that say themselves where a span ends: 1 at ends, 0 inside, 3 between sentences."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 6, (20, 12))
    rows = [np.concatenate([[3], *(np.r_[np.zeros(n - 1), 1] for n in row)])[:24] for row in lengths]
    tokens = torch.tensor(np.array([np.pad(row, (0, 24 - len(row)), constant_values=3) for row in rows]).astype(int))
    ends = torch.where(tokens == 3, -100, (tokens == 1).long())[None]
    found = BoundaryAttention(tokens, ends)(Snapshot(0, Pointer()))
    assert float(found["boundary"][0, 0]) > 0.3
    assert float(found["boundary_shuffled"][0, 0]) < 0.1
    assert float(found["by_level"][0, 0, 0, 0, 0]) > 0.3 > float(found["by_level"][0, 0, 1, 0, 0])


class Pointer(nn.Module):
    """One head: places of token 1 look at the nearest token 1 before them with most of their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(4, 8), nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        back = torch.arange(length)[:, None] - torch.arange(length)
        ones = tokens == 1
        both = (ones[:, :, None] & ones[:, None] & (back > 0)).double()
        score = (both * (8.0 - 2.0 * back)).masked_fill(back < 0, -torch.inf)
        pattern = score[:, None].softmax(-1).float()
        x = self.embed(tokens)
        return (x + self.blocks[0](pattern[:, 0] @ x)) @ self.embed.weight.T


def test_a_previous_token_head_links_both_ways() -> None:
    """Relation 0 hangs on the token before, 1 on the token after: the second is found by attention to the token."""
    place = torch.arange(20).expand(12, 20)
    relation = place % 3
    head = torch.where(relation == 0, place - 1, torch.where(relation == 1, place + 1, -1))
    head = head.masked_fill((head < 1) | (head > 18), -1)
    tokens = torch.randint(1, 6, head.shape, generator=torch.Generator().manual_seed(0))
    instrument = AttachmentHeads(tokens, head, relation, torch.zeros_like(head), fewest=20)
    found = instrument(Snapshot(0, fixed_offset(6, 20, 1)))
    np.testing.assert_allclose([found["attachment"], found["offset"]], 1.0)
    np.testing.assert_allclose(found["attention"], 1.0, atol=1e-9)
    assert found["relation"].values.tolist() == [0, 1]
    assert found["to_dependent"].values.tolist() == [0, 1]


def test_heads_that_know_nothing_score_no_better_than_one_of_them_by_chance() -> None:
    """What is chosen on the same cases as it is scored on would be above the mean of all heads by selection."""
    rng, scores, offsets = torch.Generator().manual_seed(1), [], []
    for seed in range(4):
        head = torch.randint(0, 30, (20, 30), generator=rng)
        head = head.masked_fill(head == torch.arange(30), 0)
        relation = torch.randint(0, 3, head.shape, generator=rng)
        tokens = torch.randint(1, 30, head.shape, generator=rng)
        found = AttachmentHeads(tokens, head, relation, torch.zeros_like(head))(Snapshot(0, random_model(seed)))
        scores.append(float(found["attachment"]))
        offsets.append(float(found["offset"]))
    assert 0.015 < np.mean(scores) < 0.052, "1 / 30"
    assert 0.015 < np.mean(offsets) < 0.052


def test_attachment_in_loops() -> None:
    model, sentence = random_model(3), TREES.sentence
    instrument = AttachmentHeads(DRAWN.tokens, TREES.head, TREES.relation, sentence, batch_size=7)
    found = instrument(Snapshot(0, model))
    patterns = [pattern.numpy() for pattern in attention_patterns(model, DRAWN.tokens)]
    layer, head, route = (int(found[name].values[-1]) for name in ("layer_chosen", "head_chosen", "to_dependent"))
    kind, right, weight = int(found["relation"].values[-1]), [], []
    for row in instrument._halves[1]:
        for i in np.flatnonzero((TREES.relation[row] == kind) & (TREES.head[row] >= 0)):
            a = patterns[layer][row, head]
            inside = [j for j in range(40) if sentence[row, j] == sentence[row, i] and j != i]
            values = [a[j, i] if route else a[i, j] for j in inside]
            gold = int(TREES.head[row, i])
            right.append(inside[int(np.argmax(values))] == gold)
            weight.append(a[gold, i] if route else a[i, gold])
    np.testing.assert_allclose(found["by_relation"][-1], np.mean(right), rtol=1e-9)
    np.testing.assert_allclose(found["attention"][-1], np.mean(weight), rtol=1e-9)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="level, batch, pos"):
        BoundaryAttention(DRAWN.tokens, DRAWN.ends[0])
    with pytest.raises(DataError, match="fewest"):
        AttachmentHeads(DRAWN.tokens, TREES.head, TREES.relation, TREES.sentence, fewest=10_000)
    with pytest.raises(DataError, match="shape of tokens"):
        AttachmentHeads(DRAWN.tokens, TREES.head[:3], TREES.relation, TREES.sentence)


class TestBoundaryAttention(InstrumentContract):
    def instrument(self) -> BoundaryAttention:
        return BoundaryAttention(DRAWN.tokens[:10, :24], DRAWN.ends[:, :10, :24])

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)


class TestAttachmentHeads(InstrumentContract):
    def instrument(self) -> AttachmentHeads:
        return AttachmentHeads(DRAWN.tokens, TREES.head, TREES.relation, TREES.sentence)

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)
