"""Languages whose law of the next token is known exactly: level grammars and bounded brackets.

Both have `vocab_size`, `draw`, which packs sentences into rows, and `laws`, the exact next-token law of such rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from devmon.data.probe import probe_tokens
from devmon.errors import DataError

IGNORED = -100  # label of a place that has none, as the probes read it

Stack = tuple[tuple[int, int], ...]  # (level, symbol) still to be derived, the next one first


class Language(Protocol):
    """What `devmon.instruments.GrammarExcess` asks of a language."""

    @property
    def vocab_size(self) -> int: ...

    def laws(self, tokens: Tensor) -> Tensor: ...


class Sentences(NamedTuple):
    """Packed rows and what is known of each token.

    - `tokens` (batch, pos): terminals, and the start token before each sentence, which ends the one before.
    - `ancestors` (level, batch, pos): the symbol above the token at each level below the root; -100 at start tokens.
    - `ends` (level, batch, pos): 1 where the span of that ancestor ends, else 0; -100 at start tokens.
    """

    tokens: Tensor
    ancestors: Tensor
    ends: Tensor


@dataclass(frozen=True)
class LevelGrammar:
    """A context-free grammar whose symbols lie in levels: each derives symbols of the next level, the last terminals.

    `levels` are written from the root down, the symbols of a level apart by spaces, the rules of a symbol by "|", the
    symbols that a rule gives as digits: "102|120" is a root with two rules. All rules of a symbol are equally likely
    (cfg3 of Allen-Zhu & Li 2023, 2305.13673). Rows are sentences, each after a start token, which is the last of the
    vocabulary. Raises DataError where a rule gives a symbol that the next level does not have.
    """

    levels: tuple[str, ...]

    def __post_init__(self) -> None:
        sizes = [len(level) for level in self.rules[1:]]
        for depth, (level, size) in enumerate(zip(self.rules, sizes, strict=False)):
            if max(max(rule) for rules in level for rule in rules) >= size:
                raise DataError(f"level {depth} gives symbols that level {depth + 1} of {size} symbols does not have")
        if not self.rules or len(self.rules[0]) != 1:
            raise DataError(f"a level grammar needs levels that begin with one root, got {self.levels}")

    @cached_property
    def rules(self) -> list[list[list[tuple[int, ...]]]]:
        """By level and symbol, the right sides."""
        return [
            [[tuple(map(int, rule)) for rule in symbol.split("|")] for symbol in level.split()] for level in self.levels
        ]

    @cached_property
    def vocab_size(self) -> int:
        """The terminals and the start token."""
        return 2 + max(max(rule) for rules in self.rules[-1] for rule in rules)

    # -- in closed form ----------------------------------------------------------------------------------------------

    @cached_property
    def counts(self) -> list[list[float]]:
        """How often each symbol stands in a derivation, expected, by level; the terminals last."""
        counts = [[1.0]]
        for level in self.rules:
            below = defaultdict(float, {0: 0.0})
            for count, rules in zip(counts[-1], level, strict=False):
                for rule in rules:
                    for symbol in rule:
                        below[symbol] += count / len(rules)
            counts.append([below[symbol] for symbol in range(max(below) + 1)])
        return counts

    @property
    def length(self) -> float:
        """Tokens of a sentence, expected, the start token aside."""
        return sum(self.counts[-1])

    @property
    def derivation_entropy(self) -> float:
        """Entropy of a derivation in nats, Σ_A E[count A] ln(rules of A): that of the sentence and of its tree given
        the sentence, so no less than the sentence's own."""
        return sum(
            count * math.log(len(rules))
            for counts, level in zip(self.counts, self.rules, strict=False)
            for count, rules in zip(counts, level, strict=False)
        )

    # -- drawing -----------------------------------------------------------------------------------------------------

    def draw(self, count: int, length: int, generator: torch.Generator) -> Sentences:
        """`count` rows of `length` tokens: sentences until the row is full, the last one cut."""
        depth, start = len(self.rules), self.vocab_size - 1
        rows: list[list[tuple[int, ...]]] = []
        for _ in range(count):
            chances = _uniform(generator)
            row: list[list[int]] = []
            while len(row) < length:
                row.append([start, *[IGNORED] * (2 * depth - 2)])
                self._derive(0, 0, (), chances, row)
            rows.append([tuple(place) for place in row[:length]])
        each = torch.tensor(rows).permute(2, 0, 1)
        return Sentences(each[0].contiguous(), each[1:depth].contiguous(), each[depth:].contiguous())

    def _derive(self, level: int, symbol: int, above: tuple[int, ...], chances: Iterator[float], row: list) -> None:
        """Adds the tokens of a symbol to a row, each as [token, ancestors…, ends…]."""
        if level == len(self.rules):
            row.append([symbol, *above, *[0] * len(above)])
            return
        rules = self.rules[level][symbol]
        for below in rules[int(next(chances) * len(rules))]:
            inner = level + 1 < len(self.rules)
            self._derive(level + 1, below, (*above, below) if inner else above, chances, row)
            if inner:
                row[-1][len(self.rules) + level] = 1

    # -- the exact law -----------------------------------------------------------------------------------------------

    def laws(self, tokens: Tensor) -> Tensor:
        """The law of the next token given the row so far, (batch, pos, vocab) in float64, of rows as `draw` makes them.

        A weight for every stack of symbols that may still be to derive: the first of each is expanded to its terminal,
        equal (terminal, rest) are added up, and the token that came keeps its own. Raises DataError for a row that the
        grammar does not make, with its place.
        """
        rows = probe_tokens(tokens, "laws", shortest=1).tolist()
        return torch.tensor([self._laws(row, index) for index, row in enumerate(rows)], dtype=torch.float64)

    def _laws(self, row: list[int], index: int) -> list[list[float]]:
        start, laws = self.vocab_size - 1, []
        after: dict[int, dict[Stack, float]] = {start: {((0, 0),): 1.0}}
        for place, token in enumerate(row):
            stacks = after.get(token, {})
            whole = sum(stacks.values())
            if not whole:
                raise DataError(f"the grammar cannot make token {token} at place {place} of row {index}: {row[:place]}")
            after, law = defaultdict(lambda: defaultdict(float)), [0.0] * self.vocab_size
            for stack, weight in stacks.items():
                for terminal, rest, chance in self._first(stack[0]) if stack else [(start, ((0, 0),), 1.0)]:
                    after[terminal][rest + stack[1:]] += chance * weight / whole
                    law[terminal] += chance * weight / whole
            laws.append(law)
        return laws

    def _first(self, symbol: tuple[int, int]) -> list[tuple[int, Stack, float]]:
        """The first terminal of a symbol, what is left of it then, and how likely that is."""
        if symbol not in self._firsts:
            level, name = symbol
            if level == len(self.rules):
                self._firsts[symbol] = [(name, (), 1.0)]
            else:
                rules, found = self.rules[level][name], defaultdict[tuple[int, Stack], float](float)
                for rule in rules:
                    later = tuple((level + 1, below) for below in rule[1:])
                    for terminal, rest, chance in self._first((level + 1, rule[0])):
                        found[terminal, rest + later] += chance / len(rules)
                self._firsts[symbol] = [(terminal, rest, chance) for (terminal, rest), chance in found.items()]
        return self._firsts[symbol]

    @cached_property
    def _firsts(self) -> dict[tuple[int, int], list[tuple[int, Stack, float]]]:
        return {}


# The published grammar cfg3b: 22, 19 to 21, 16 to 18, 13 to 15, 10 to 12, 7 to 9, 1 to 3; each level from 0 on here.
CFG3B = LevelGrammar((
    "21|10",
    "012|120 102|01 20|021",
    "20|021 102|201 210|10",
    "12|21 102|012 210|120",
    "021|210 102|012 120|201",
    "20|012 21|201 210|10",
))  # fmt: skip
# Three levels and three terminals, 8.318 nats and 17.5 tokens a sentence: small enough to be learnt in a minute.
SMALL = LevelGrammar(("102|120", "201|021 10|21 102|210", "01|21 012|20 10|02"))


class Trees(NamedTuple):
    """What is known of each token of packed rows, all (batch, pos).

    - `head`: the place of the token that it depends on, in its row; -1 for the root of a sentence, start tokens and
      tokens of a sentence that the row cuts.
    - `relation`: the level below the root of the symbol that both are of, 0 for the sentence; -1 where there is no
      head.
    - `sentence`: the number of its sentence in the row; -1 for start tokens and sentences that are cut.
    """

    head: Tensor
    relation: Tensor
    sentence: Tensor

    def distances(self, row: int, sentence: int) -> Tensor:
        """(token, token): how many edges lie between two tokens of a sentence."""
        places = (self.sentence[row] == sentence).nonzero()[:, 0].tolist()
        above = {place: int(self.head[row, place]) for place in places}

        def way(place: int) -> list[int]:
            found = [place]
            while above[found[-1]] >= 0:
                found.append(above[found[-1]])
            return found

        ways = [way(place) for place in places]
        return torch.tensor([[len(set(one) ^ set(other)) for other in ways] for one in ways])


def trees(sentences: Sentences) -> Trees:
    """The dependencies of whole sentences as `LevelGrammar.draw` packs them: the first token of a symbol is its head.

    A token that begins no symbol depends on the first token of the lowest symbol that it is in; one that begins some
    depends on that of the lowest which it does not begin.
    """
    levels, rows, length = sentences.ends.shape
    head, relation, number = (torch.full((rows, length), -1) for _ in range(3))
    for row in range(rows):
        starts = (sentences.ends[0, row] < 0).nonzero()[:, 0].tolist()
        for index, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
            first = [start + 1] * levels  # of the symbol of each level that the token is in
            for place in range(start + 1, end):
                number[row, place] = index
                of = [start + 1, *first]  # the sentence, then the levels
                lowest = next((at for at in range(levels, -1, -1) if of[at] != place), None)
                if lowest is not None:
                    head[row, place], relation[row, place] = of[lowest], lowest
                for level in range(levels):
                    if sentences.ends[level, row, place] == 1:
                        first[level] = place + 1
    return Trees(head, relation, number)


@dataclass(frozen=True)
class Brackets:
    """Dyck-(kinds, deepest): brackets of `kinds` that close in order, at most `deepest` open at once.

    Between the bounds a bracket opens or closes with ½ each, its kind, where it opens, is uniform (Hewitt et al. 2020,
    2010.07515). Tokens 0 … kinds - 1 open, kind + kinds closes; rows are prefixes.
    """

    kinds: int
    deepest: int

    @property
    def vocab_size(self) -> int:
        return 2 * self.kinds

    def draw(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Tokens (count, length)."""
        rows = []
        for _ in range(count):
            row: list[int] = []
            open_: list[int] = []
            chances = _uniform(generator)
            while len(row) < length:
                up = not open_ or (len(open_) < self.deepest and next(chances) < 0.5)
                if up:
                    open_.append(int(next(chances) * self.kinds))
                row.append(open_[-1] if up else open_.pop() + self.kinds)
            rows.append(row)
        return torch.tensor(rows)

    def laws(self, tokens: Tensor) -> Tensor:
        """The law of the next token, (batch, pos, vocab) in float64. Raises DataError for rows that are no prefixes."""
        tokens = probe_tokens(tokens, "laws", shortest=1)
        laws = torch.zeros(*tokens.shape, self.vocab_size, dtype=torch.float64)
        for index, row in enumerate(tokens.tolist()):
            open_: list[int] = []
            for place, token in enumerate(row):
                if token < self.kinds:
                    open_.append(token)
                elif not open_ or open_.pop() != token - self.kinds:
                    raise DataError(f"row {index} closes at place {place} what is not open: {row[: place + 1]}")
                if len(open_) > self.deepest:
                    raise DataError(f"row {index} opens more than {self.deepest} at place {place}: {row[: place + 1]}")
                closing = 0.0 if not open_ else 1.0 if len(open_) == self.deepest else 0.5
                laws[index, place, : self.kinds] = (1 - closing) / self.kinds
                if open_:
                    laws[index, place, self.kinds + open_[-1]] = closing
        return laws


def _uniform(generator: torch.Generator, block: int = 64) -> Iterator[float]:
    while True:
        yield from torch.rand(block, generator=generator).tolist()
