"""Made-up data for the tests of families: a language of uniform tokens, prompts in pairs, random dictionaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from devmon.data import broken_repeats, symbol_tasks
from devmon.data.interchange import Interchanges
from devmon.data.negation import NegationPrompts
from devmon.features import Dictionary, Largest
from tests.anatomy.families import VOCAB, D


@dataclass(frozen=True)
class AnyToken:
    """The language of independent uniform tokens, all but three of the vocabulary."""

    vocab_size: int = VOCAB

    def laws(self, tokens: Tensor) -> Tensor:
        law = torch.cat([torch.zeros(3), torch.ones(VOCAB - 3)]).double() / (VOCAB - 3)
        return law.expand(*tokens.shape, VOCAB)


def negated(x: Tensor) -> NegationPrompts:
    """Prompts of eight random tokens whose third differs."""
    plain, at = x[:6, :8].clone(), torch.full((6,), 2)
    plain[:, 2] = (plain[:, 2] - 2) % (VOCAB - 3) + 3
    return NegationPrompts(x[:6, :8], plain, at + 5, at, at + 3, x[:6, 8:10], x[:6, 10:12], x[:6, 12:14])


def pairs() -> Any:
    return broken_repeats(VOCAB, 8, 4, exclude=(0, 1, 2))


def coder(centred: bool) -> Dictionary:
    """A random dictionary of 40 latents for states of D numbers."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, D, generator=generator)
    return Dictionary(rows.T.contiguous(), torch.zeros(40), 0.02 * rows, torch.zeros(D), centred=centred)


def choices(x: Tensor) -> tuple[Tensor, ...]:
    """A task of two choices an item, the last two tokens of each sequence, the first of them right."""
    row = torch.arange(len(x))
    end = torch.full((len(x),), x.shape[1])
    return x, row // 2, end - 2, end, row % 2 == 0


def tasks() -> Any:
    return symbol_tasks(VOCAB, tasks=2, prompts=4, shots=3, symbols=5, exclude=(0, 1, 2))


def exchanges(x: Tensor) -> Interchanges:
    """Pairs of sequences whose labels are any tokens."""
    return Interchanges(x, x.roll(1, 0), x[:, 0], x[:, 1])


def touching(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences in which the second and the fourth place touch, and which of them are fitted."""
    contacts = torch.zeros(len(x), x.shape[1], x.shape[1], dtype=torch.bool)
    contacts[:, 1, 3] = contacts[:, 3, 1] = True
    return x, contacts, torch.arange(len(x)) % 2 == 0


def features() -> Dictionary:
    drawn = torch.randn(D, 2 * D, generator=torch.Generator().manual_seed(0))
    return Dictionary(drawn, torch.zeros(2 * D), drawn.T / D, torch.zeros(D), Largest(4))
