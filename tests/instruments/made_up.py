"""Made-up data for the tests of families: a language of uniform tokens, negated prompts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from devmon.data.negation import NegationPrompts
from tests.anatomy.families import VOCAB


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
