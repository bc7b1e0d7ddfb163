"""What a tokenizer tells of its vocabulary: which tokens are real, and pairs of words that a text model may know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from devmon.data.symbol_tasks import TaskPrompts
from devmon.errors import DataError

# Words of at least so many letters, the first so many of the vocabulary: tokens come in order of their frequency in the
# text that the tokenizer learnt from, so that these are common words. More words make tasks less alike.
LETTERS, WORDS = 3, 400
# Inflections that make a task: what follows the word. Each word and its form are single tokens of the vocabulary.
FORMS: dict[str, Callable[[str], str]] = {
    "capital": str.capitalize,
    "plural": lambda word: word + "s",
    "past": lambda word: word + "ed",
    "gerund": lambda word: word + "ing",
    "agent": lambda word: word + "er",
    "adverb": lambda word: word + "ly",
}


@dataclass(frozen=True)
class Vocabulary:
    """`size` tokens, of which `exclude` (special, padding, added or without text) stand in no random text; `bos` is
    the token that starts a text, `pad` the one that fills it up; None where there is none."""

    size: int
    bos: int | None
    pad: int | None
    exclude: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many tokens random text may hold."""
        return len(set(range(self.size)) - {*self.exclude, self.bos})


def vocabulary(tokenizer: Any) -> Vocabulary:
    """The vocabulary of a tokenizer of transformers, which may be smaller than the model's logits are many.

    Raises DataError for a tokenizer without `get_vocab`.
    """
    known = _known(tokenizer)
    size = max(known.values()) + 1
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {int(token) for token in (*getattr(tokenizer, "all_special_ids", ()), *added)}
    special |= set(range(size)) - set(known.values())
    bos = getattr(tokenizer, "bos_token_id", None)
    return Vocabulary(size, bos, getattr(tokenizer, "pad_token_id", None), tuple(sorted(special - {bos})))


def unpadded(tokens: Tensor, pad: int | None) -> Tensor:
    """The rows (batch, pos) cut to one length so that none holds `pad`, as many tokens as can be kept.

    Padding is taken off where it stands, at the start or at the end. Rows that are too short are left out. Raises
    DataError where less than half of the text would be left: pack the texts into full rows instead.

    >>> unpadded(torch.tensor([[5, 6, 7, 0], [5, 0, 0, 0], [0, 8, 9, 7]]), pad=0).tolist()
    [[5, 6, 7], [8, 9, 7]]
    """
    if pad is None or not bool((tokens == pad).any()):
        return tokens
    real = tokens != pad
    inner = (real.cumsum(1) > 0) & (real.flip(1).cumsum(1).flip(1) > 0)  # a pad token within the text is text
    count = inner.sum(1)
    length = max((int(n) for n in count.unique() if n > 1), key=lambda n: n * int((count >= n).sum()), default=0)
    kept = count >= length
    if not length or length * int(kept.sum()) < int(count.sum()) / 2:
        raise DataError(
            f"the rows of tokens hold padding ({pad}) and texts of very different lengths: join the texts and cut them "
            "into rows of one length"
        )
    start = inner.long().argmax(1)
    return tokens[kept].gather(1, start[kept, None] + torch.arange(length))


def case_map(tokenizer: Any) -> Tensor:
    """A token map (vocab,) of words to themselves with a capital letter, -1 for all else: a map that text follows."""
    mapping = torch.full((_size(tokenizer),), -1)
    for word, form in _pairs(tokenizer, FORMS["capital"]):
        mapping[word] = form
    return mapping


def word_tasks(tokenizer: Any, prompts: int = 32, shots: int = 5, seed: int = 0, bos: int | None = None) -> TaskPrompts:
    """Inflections of common words, shown by examples: `word: form`, one a line; a new word is asked for.

    The tasks are those of `FORMS` with enough words in the vocabulary, `prompts` for each. A model of text may know
    them by heart, so a prompt without the right examples can be made to do them (Todd et al. 2024, 2310.15213); in the
    shuffled prompt each word has the form of another. Raises DataError for a vocabulary with fewer than two tasks.
    """
    colon, line = (tokenizer.encode(text, add_special_tokens=False) for text in (":", "\n"))
    tasks = [pairs for make in FORMS.values() if len(pairs := _pairs(tokenizer, make)) >= 4 * shots]
    if len(tasks) < 2 or len(colon) != 1 or len(line) != 1:
        raise DataError(
            f"word_tasks needs two of {', '.join(FORMS)} with {4 * shots} words whose forms are single tokens, and "
            f"single tokens for a colon and a line break; this vocabulary has {len(tasks)} of them"
        )
    generator = torch.Generator().manual_seed(seed)
    start = [] if bos is None else [bos]
    right: list[list[int]] = []
    wrong: list[list[int]] = []
    answers: list[int] = []
    for pairs in tasks:
        for _ in range(prompts):
            drawn = [pairs[i] for i in torch.randperm(len(pairs), generator=generator)[: shots + 1].tolist()]
            turn = int(torch.randint(1, shots, (1,), generator=generator))
            forms = [form for _, form in drawn[:shots]]
            for labels, rows in ((forms, right), (forms[turn:] + forms[:turn], wrong)):
                shown = [[word, *colon, form, *line] for (word, _), form in zip(drawn, labels, strict=False)]
                rows.append([*start, *(token for one in shown for token in one), drawn[-1][0], *colon])
            answers.append(drawn[-1][1])
    task = torch.arange(len(tasks)).repeat_interleave(prompts)
    return TaskPrompts(torch.tensor(right), torch.tensor(wrong), torch.tensor(answers), task)


def _known(tokenizer: Any) -> dict[str, int]:
    if not callable(getattr(tokenizer, "get_vocab", None)):
        raise DataError(f"expected a tokenizer of transformers, with get_vocab(), got {type(tokenizer).__name__}")
    return dict(tokenizer.get_vocab())


def _size(tokenizer: Any) -> int:
    return max(_known(tokenizer).values()) + 1


def _pairs(tokenizer: Any, make: Callable[[str], str]) -> list[tuple[int, int]]:
    """Words that follow a space and their forms, as tokens, the most common words first."""
    spaced = {text[1:]: token for text, token in _known(tokenizer).items() if text[:1] in ("Ġ", "▁", " ")}
    words = [word for word in sorted(spaced, key=lambda w: spaced[w]) if word.isascii() and word.islower()]
    both = [(spaced[word], spaced[make(word)]) for word in words if len(word) >= LETTERS and make(word) in spaced]
    return both[:WORDS]
