"""Exact laws of languages, against a sum over all derivations, closed forms and what is drawn."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from devmon.data.grammars import CFG3B, IGNORED, SMALL, Brackets, LevelGrammar
from devmon.errors import DataError

TINY = LevelGrammar(("01|10|00", "0|11 10|2", "01|10 0|1 12"))  # ambiguous: 01 is a 0 alone, or two 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def strings(grammar: LevelGrammar, level: int = 0, symbol: int = 0) -> dict[tuple[int, ...], float]:
    """Every string of a symbol with its probability, by writing out all derivations."""
    if level == len(grammar.rules):
        return {(symbol,): 1.0}
    found: dict[tuple[int, ...], float] = defaultdict(float)
    rules = grammar.rules[level][symbol]
    for rule in rules:
        parts = [strings(grammar, level + 1, below).items() for below in rule]
        for chosen in itertools.product(*parts):
            joined = tuple(token for string, _ in chosen for token in string)
            found[joined] += math.prod(chance for _, chance in chosen) / len(rules)
    return found


def test_the_filter_is_the_sum_over_all_derivations() -> None:
    every = strings(TINY)
    assert abs(sum(every.values()) - 1) < 1e-12
    start = TINY.vocab_size - 1
    for string in list(every)[::7]:
        row = [start, *string, start, *string[:3]]
        laws = TINY.laws(torch.tensor([row]))[0].numpy()
        for place in range(len(string) + 1):
            exact = np.zeros(TINY.vocab_size)
            for other, chance in every.items():
                if other[:place] == string[:place]:
                    exact[other[place] if len(other) > place else start] += chance
            np.testing.assert_allclose(laws[place], exact / exact.sum(), atol=1e-14)
        np.testing.assert_allclose(laws[len(string) + 1 :], laws[: len(row) - len(string) - 1], atol=1e-14)


def test_entropy_of_the_law_along_a_sentence_is_that_of_the_strings_and_below_that_of_derivations() -> None:
    """The chain rule; and what a derivation has more is the tree given the string."""
    every = strings(TINY)
    start, total = TINY.vocab_size - 1, 0.0
    for string, chance in every.items():
        law = TINY.laws(torch.tensor([[start, *string]]))[0]
        after = torch.tensor([*string, start])
        total -= chance * float(law[torch.arange(len(after)), after].log().sum())
    exact = -sum(chance * math.log(chance) for chance in every.values())
    np.testing.assert_allclose(total, exact, rtol=1e-12)
    assert exact < TINY.derivation_entropy - 0.01
    np.testing.assert_allclose(sum(len(s) * c for s, c in every.items()), TINY.length, rtol=1e-12)


def test_published_grammars_in_closed_form() -> None:
    np.testing.assert_allclose((CFG3B.derivation_entropy, CFG3B.length), (117.315, 275.625), atol=5e-4)
    np.testing.assert_allclose(CFG3B.derivation_entropy / (CFG3B.length + 1), 0.4241, atol=5e-5)
    np.testing.assert_allclose((SMALL.derivation_entropy, SMALL.length), (12 * math.log(2), 17.5), rtol=1e-12)


def test_rows_have_the_entropy_that_was_found() -> None:
    tokens = SMALL.draw(400, 64, generator()).tokens
    laws = SMALL.laws(tokens)[:, :-1]
    entropy = float(torch.special.entr(laws).sum(-1).mean())
    loss = float(-laws.gather(-1, tokens[:, 1:, None]).log().mean())
    np.testing.assert_allclose([entropy, loss], 0.463, atol=0.01)


def test_trees_of_what_is_drawn() -> None:
    drawn = SMALL.draw(60, 64, generator(1))
    start = SMALL.vocab_size - 1
    assert drawn.ancestors.shape == drawn.ends.shape == (2, 60, 64)
    assert bool(((drawn.tokens == start) == (drawn.ancestors[0] == IGNORED)).all())
    assert bool(((drawn.tokens == start) == (drawn.ends[1] == IGNORED)).all())
    starts = [0, *(1 + (drawn.tokens[:1, :] == start).nonzero()[:, 1])]
    assert starts[1] == 1  # each row begins with it
    for row in range(60):
        # spans of the lower level, read off the ends, are right sides of their symbol; and so are those above
        place, spans, above = 1, [], []
        for token, parent, upper, end, upper_end in zip(
            *(x[row].tolist() for x in (drawn.tokens, drawn.ancestors[1], drawn.ancestors[0], drawn.ends[1])),
            drawn.ends[0][row].tolist(),
            strict=True,
        ):
            if token == start:
                assert not spans, "a sentence ends with its last span"
                above = []
                continue
            spans.append(token)
            if end:
                assert tuple(spans) in SMALL.rules[2][parent]
                spans, above = [], [*above, parent]
            if upper_end:
                assert end
                assert tuple(above) in SMALL.rules[1][upper]
                above = []
        assert place


def test_what_a_language_cannot_make_is_told_with_its_place() -> None:
    start = SMALL.vocab_size - 1
    with pytest.raises(DataError, match=r"cannot make token 0 at place 0 of row 0"):
        SMALL.laws(torch.tensor([[0, 1]]))
    with pytest.raises(DataError, match=r"cannot make token 3 at place 2 of row 1"):
        SMALL.laws(torch.tensor([[start, 1, 0], [start, 1, start]]))
    with pytest.raises(DataError, match="level 0 gives symbols that level 1 of 2 symbols"):
        LevelGrammar(("02", "01 10"))
    with pytest.raises(DataError, match="begin with one root"):
        LevelGrammar(("01 10", "01 10"))


# --- brackets -------------------------------------------------------------------------------------------------------


def test_brackets_by_hand() -> None:
    laws = Brackets(2, 2).laws(torch.tensor([[0, 1, 3, 2]]))[0]
    np.testing.assert_allclose(laws, [[0.25, 0.25, 0.5, 0], [0, 0, 0, 1], [0.25, 0.25, 0.5, 0], [0.5, 0.5, 0, 0]])
    for row, message in (([0, 3], "closes at place 1"), ([2, 0], "closes at place 0"), ([0, 0, 0], "more than 2")):
        with pytest.raises(DataError, match=message):
            Brackets(2, 2).laws(torch.tensor([row]))


def test_brackets_that_are_drawn_follow_their_law() -> None:
    language = Brackets(3, 4)
    tokens = language.draw(3000, 20, generator())
    laws = language.laws(tokens)[:, :-1]
    came = torch.nn.functional.one_hot(tokens[:, 1:], 6).double()
    assert bool((laws.gather(-1, tokens[:, 1:, None]) > 0).all())
    np.testing.assert_allclose(came.mean((0, 1)), laws.mean((0, 1)), atol=0.01)
    deep = laws[..., :3].sum(-1) == 0  # at the deepest
    assert bool(deep.any())
    assert bool((tokens[:, 1:][deep] >= 3).all())
