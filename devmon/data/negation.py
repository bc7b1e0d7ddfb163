"""Prompts that name a class and negate it, each beside its plain twin: a made-up language, and English ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from devmon.data.probe import ByContent, probe_tokens
from devmon.errors import DataError

NONE = -1  # fills up sets of answers


@dataclass(frozen=True, eq=False)
class NegationPrompts(ByContent):
    """Prompts "an X that is not a Y" and the same without the negation, place by place.

    - `negated`, `plain` (item, pos): the tokens; they differ at the place `negation` (item,) alone.
    - `last` (item,): the place that the answer is read at; what stands after it is not read.
    - `named` (item,): the place of Y, its last token.
    - `complement`, `members`, `other` (item, answer): answers that are X and not Y, that are Y, and that are neither;
      -1 fills up.

    Raises DataError where these do not fit.
    """

    negated: Tensor
    plain: Tensor
    last: Tensor
    negation: Tensor
    named: Tensor
    complement: Tensor
    members: Tensor
    other: Tensor

    def __post_init__(self) -> None:
        for name in ("negated", "plain", "complement", "members", "other"):
            object.__setattr__(self, name, probe_tokens(getattr(self, name), "NegationPrompts", name, shortest=1))
        for name in ("last", "negation", "named"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name)).to("cpu", torch.int64, copy=True))
        items = len(self.negated)
        unlike = self.negated != self.plain if self.negated.shape == self.plain.shape else torch.ones(items, 1).bool()
        sizes = {len(getattr(self, name)) for name in self.__dataclass_fields__}
        if sizes != {items} or not bool((unlike.sum(1) == 1).all()) or items < 2:
            raise DataError(
                "NegationPrompts needs two items at least, as many of all parts, whose prompts differ at one place; "
                f"got parts of {sorted(sizes)} and {unlike.sum(1).unique().tolist()} places"
            )
        if not bool((unlike.int().argmax(1) == self.negation).all()):
            raise DataError("NegationPrompts needs as negation the place at which the two prompts differ")
        if not bool(((self.negation < self.named) & (self.named <= self.last)).all()):
            raise DataError("NegationPrompts needs the negation before the place of the class, and that not after last")
        if any(bool((getattr(self, name) < 0).all(1).any()) for name in ("complement", "members", "other")):
            raise DataError("NegationPrompts needs an answer at least in every set of every item")


@dataclass(frozen=True)
class NegationLanguage:
    """Sentences BOS X IS|NOT f f f Y SEP member: the member is one of Y after IS, one of X outside Y after NOT, each
    equally likely; f are fillers. `supers` X have `classes` Y each, these `size` members each.

    Tokens: members first, by class; then the classes, the X, the fillers, and BOS, IS, NOT, SEP. The loss that is left
    is ln `size` after IS and ln((`classes` - 1) `size`) after NOT.
    """

    supers: int = 2
    classes: int = 4
    size: int = 4
    fillers: int = 8
    share: float = 0.15  # of sentences with NOT

    length = 9

    @property
    def vocab_size(self) -> int:
        return self._marks + 4

    @property
    def _names(self) -> int:
        return self.supers * self.classes * self.size

    @property
    def _marks(self) -> int:
        return self._names + self.supers * self.classes + self.supers + self.fillers

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Sentences (count, 9) with their answers."""
        negated = torch.rand(count, generator=generator) < self.share
        rows, named = self._prompts(count, negated, generator)
        members, complement, _ = self._answers(named)
        pick = torch.rand(count, 1, generator=generator)
        answer = torch.where(
            negated[:, None],
            complement.gather(1, (pick * complement.shape[1]).long()),
            members.gather(1, (pick * members.shape[1]).long()),
        )
        return torch.cat([rows, answer], 1)

    def prompts(self, count: int, generator: torch.Generator) -> NegationPrompts:
        """`count` prompts of both kinds with the same fillers."""
        no = torch.ones(count).bool()
        negated, named = self._prompts(count, no, generator)
        plain = negated.clone()
        plain[:, 2] = self._marks + 1
        members, complement, other = self._answers(named)
        last, negation, place = (torch.full((count,), at) for at in (7, 2, 6))
        return NegationPrompts(negated, plain, last, negation, place, complement, members, other)

    def _prompts(self, count: int, negated: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sentences up to SEP, and their classes."""
        named = torch.randint(self.supers * self.classes, (count,), generator=generator)
        fillers = torch.randint(self._marks - self.fillers, self._marks, (count, 3), generator=generator)
        x = self._names + self.supers * self.classes + named // self.classes
        is_or_not = self._marks + 1 + negated.long()
        begin, end = torch.full((count,), self._marks), torch.full((count,), self._marks + 3)
        columns = [begin, x, is_or_not, *fillers.T, self._names + named, end]
        return torch.stack(columns, 1), named

    def _answers(self, named: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Members, complement and members of other X of each class."""
        every = torch.arange(self._names)
        kind, x = every // self.size, every // (self.size * self.classes)
        own = kind == named[:, None]
        under = x == (named // self.classes)[:, None]
        return tuple(torch.stack([every[row] for row in rows]) for rows in (own, under & ~own, ~under))  # type: ignore[return-value]


ENGLISH: dict[str, dict[str, str]] = {
    "animals": {
        "birds": "sparrow eagle owl crow pigeon",
        "fish": "salmon shark tuna trout cod",
        "insects": "ant bee fly moth wasp",
        "mammals": "dog cat horse cow lion",
    },
    "foods": {
        "fruits": "apple banana orange grape lemon",
        "vegetables": "carrot onion potato spinach broccoli",
        "meats": "beef pork chicken lamb ham",
        "drinks": "water milk coffee tea juice",
    },
    "vehicles": {
        "boats": "ship canoe ferry yacht raft",
        "aircraft": "plane helicopter jet glider rocket",
        "cars": "sedan taxi jeep truck van",
    },
    "professions": {
        "doctors": "surgeon dentist nurse physician psychiatrist",
        "artists": "painter singer actor dancer sculptor",
        "scientists": "physicist chemist biologist astronomer geologist",
    },
}
TEMPLATE = "Here is a list of {x} that are {mark} {y}:"


def english_negation(
    tokenizer: Any, template: str = TEMPLATE, mark: str = "not", twin: str = "indeed"
) -> NegationPrompts:
    """English prompts for a tokenizer of transformers, the negation beside its `twin` of as many tokens.

    Answers are the first tokens of words after a space, up to five of each set; `other` are of another X. Items whose
    prompts differ at more than one place, or whose sets overlap in a token, are left out. Raises DataError where fewer
    than two are left.
    """

    def encoded(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def answers(words: list[str]) -> list[int]:
        return list(dict.fromkeys(encoded(f" {word}")[0] for word in words))

    start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    supers, rows = list(ENGLISH), []
    for number, (x, classes) in enumerate(ENGLISH.items()):
        others = [word for words in ENGLISH[supers[(number + 1) % len(supers)]].values() for word in words.split()[:2]]
        for y, words in classes.items():
            outside = [word for name, more in classes.items() if name != y for word in more.split()[:2]]
            no, yes = (encoded(template.format(x=x, y=y, mark=word)) for word in (mark, twin))
            head = len(encoded(template[: template.index("{y}") + 3].format(x=x, y=y, mark=mark))) - 1
            sets = [answers(which) for which in (outside, words.split(), others)]
            apart = len({token for one in sets for token in one}) == sum(map(len, sets))
            unlike = [i for i, (a, b) in enumerate(zip(no, yes, strict=False)) if a != b]
            if len(no) == len(yes) and len(unlike) == 1 and apart:
                shift = len(start)
                rows.append((start + no, start + yes, len(no) - 1 + shift, unlike[0] + shift, head + shift, *sets))
    if len(rows) < 2:
        raise DataError(f"{mark!r} and {twin!r} are not of as many tokens of this tokenizer: give another twin")
    parts = list(zip(*rows, strict=True))
    fills = (start or [0], start or [0], None, None, None, [NONE], [NONE], [NONE])
    return NegationPrompts(*(_stacked(part, fill) for part, fill in zip(parts, fills, strict=True)))


def _stacked(part: tuple[Any, ...], fill: list[int] | None) -> Tensor:
    if fill is None:
        return torch.tensor(part)
    longest = max(map(len, part))
    return torch.tensor([[*row, *fill * (longest - len(row))] for row in part])
