"""TreeStructure: spans that are truly independent, models that compose evenly, the masking against running alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from devmon.anatomy import Anatomy
from devmon.errors import DataError
from devmon.instruments import TreeStructure
from devmon.instruments.tree_structure import _best, _counted, _f1, _tree
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract
from devmon.testing.handbuilt import AttentionOnly
from tests.support.models import random_model

WORDS = torch.randint(1, 40, (8, 9), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([8, 8, 7, 6, 8, 5, 8, 4])


def within(spans: list[list[int]]) -> tuple[Tensor, AttentionOnly]:
    """Sentences whose tokens attend evenly to the tokens of their own span that came, and to nothing else: the stream
    holds the place's span, and a random vector of the token, which the head copies onto another part.

    Place 0 is a start token in a span of its own.
    """
    length = 1 + sum(map(len, spans))
    owner = torch.zeros(length, dtype=torch.long)
    for number, span in enumerate(spans):
        owner[torch.tensor(span)] = number + 1
    width, groups = 6, len(spans) + 1
    size = 2 * width + groups
    generator = torch.Generator().manual_seed(1)
    embed = torch.zeros(20, size, dtype=torch.float64)
    embed[:, :width] = torch.randn(20, width, generator=generator, dtype=torch.float64)
    place = torch.zeros(length, size, dtype=torch.float64)
    place[torch.arange(length), 2 * width + owner] = 1.0
    look, copy = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    look[2 * width :, 2 * width :] = 800.0 * torch.eye(groups, dtype=torch.float64)
    copy[:width, width : 2 * width] = 3 * torch.eye(width, dtype=torch.float64)
    unembed = torch.randn(size, 20, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 20, (5, length), generator=generator)
    return tokens, AttentionOnly(embed, place, [[(look, copy)]], unembed)


def test_spans_that_keep_to_themselves_are_found() -> None:
    """(1 2 3) (4 5) (6 7 8): a union of them is independent of the rest, and what crosses their borders is not."""
    spans = [[1, 2, 3], [4, 5], [6, 7, 8]]
    tokens, model = within(spans)
    ends = torch.zeros(1, 5, 9, dtype=torch.long)
    ends[..., [3, 5, 8]] = 1
    instrument = TreeStructure(tokens, torch.full((5,), 8), ends)
    found = instrument(Snapshot(0, model))
    scores = instrument._independence(Anatomy(model), 0)
    for first, last in ((0, 2), (3, 4), (5, 7), (0, 4), (3, 7), (0, 7)):
        np.testing.assert_allclose(scores[first, last], 1.0, atol=1e-12)
    assert scores[1, 3] < 0.999
    assert float(found["structure"]) > 0.05
    assert float(found["f1"]) > max(float(found[f"f1_{name}"]) for name in ("random", "left", "right"))


def test_attending_to_the_span_alone_is_running_the_span_alone() -> None:
    """Without positions the span alone, run as a sentence of its own, has the states that the mask makes."""
    model = random_model(3)
    with torch.no_grad():
        model.positions.zero_()
    instrument = TreeStructure(WORDS, LENGTHS, start=1)
    anatomy = Anatomy(model)
    scores, last = instrument._independence(anatomy, 0), ("resid_post", 1)
    plain = anatomy.run(WORDS[:1], [last])[1][last][0, 1:]
    for first, end in ((0, 4), (2, 5), (3, 3), (5, 7)):
        alone = anatomy.run(WORDS[:1, 1 + first : 2 + end], [last])[1][last][0].sum(0)
        expected = torch.cosine_similarity(alone, plain[first : end + 1].sum(0), dim=0)
        np.testing.assert_allclose(scores[first, end], expected.detach(), rtol=1e-9)


def test_what_stands_after_a_sentence_is_not_read() -> None:
    other = WORDS.clone()
    other[2, 8], other[5, 6:] = 7, 9
    one, two = (TreeStructure(tokens, LENGTHS)(Snapshot(0, random_model(0))) for tokens in (WORDS, other))
    assert float(one["structure"]) == float(two["structure"])
    assert np.isnan(one["f1"])


def test_trees_and_their_brackets_by_hand() -> None:
    none = np.zeros((4, 4))
    left, right = (_tree(none, split)[0] for split in (lambda s: len(s) - 1, lambda s: 0))
    assert left == {(0, 1), (0, 2)}
    assert right == {(2, 3), (1, 3)}
    assert _f1(left, frozenset({(0, 1), (2, 3)})) == 0.5
    scores = np.zeros((4, 4))
    scores[0, 1] = scores[2, 3] = 1.0
    spans, gains = _tree(scores, _best)
    assert spans == {(0, 1), (2, 3)}
    np.testing.assert_allclose(gains, [2 - 2 / 3])
    assert _counted({(0, 0), (0, 3), (1, 2)}, 4) == {(1, 2)}


def test_a_model_that_reads_no_context_has_no_tree() -> None:
    """A model whose heads read nothing has independence 1 everywhere: no split is better than another."""
    model: Any = random_model(0)
    with torch.no_grad():
        for block in model.blocks:
            block.out.weight.zero_()
    found = TreeStructure(WORDS, LENGTHS)(Snapshot(0, model))
    np.testing.assert_allclose(found["structure"], 0, atol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="three tokens"):
        TreeStructure(WORDS, LENGTHS.clamp_max(2))
    with pytest.raises(DataError, match="lie in their rows"):
        TreeStructure(WORDS, LENGTHS + 4)
    with pytest.raises(DataError, match="brackets over"):
        TreeStructure(WORDS, LENGTHS, torch.zeros(1, 3, 9))


class TestTreeStructure(InstrumentContract):
    def instrument(self) -> TreeStructure:
        ends = (torch.arange(9) % 3 == 0).long().expand(1, 8, 9)
        return TreeStructure(WORDS, LENGTHS, ends)

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)
