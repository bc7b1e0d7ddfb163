"""Made-up protein families, in which letters at pairs of places go together, and a masked model that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from devmon.recipes.common import batches
from devmon.recipes.models.sequence_model import numbered

NEAREST = 4  # places apart that two in contact are at least
PARTNER = 0.9  # probability that a place is the complement of its partner
MASKED = 0.15  # share of letters that are masked, as in BERT


@dataclass(frozen=True)
class ProteinFamilies:
    """Sequences of `length` letters after a token for their family; of each family `contacts` pairs of places touch.

    Letters are uniform, the second of a pair the complement of the first (letter k has `letters` - 1 - k) with
    probability .9. Tokens: families from 0, then letters, then the mask.
    """

    families: int = 6
    length: int = 24
    letters: int = 8
    contacts: int = 6
    seed: int = 0

    @property
    def vocab(self) -> int:
        return self.families + self.letters + 1

    @cached_property
    def pairs(self) -> Tensor:
        """Places (family, contact, 2) in contact, each in one pair, without the family's token."""
        generator = numbered(self.seed, "contacts")
        drawn: list[Tensor] = []
        while len(drawn) < self.families:
            places = torch.randperm(self.length, generator=generator)[: 2 * self.contacts].view(-1, 2).sort(1).values
            if int(places.diff(dim=1).min()) >= NEAREST:
                drawn.append(places)
        return torch.stack(drawn)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens (count, 1 + length), and the family of each (count,)."""
        family = torch.randint(self.families, (count,), generator=generator)
        letters = torch.randint(self.letters, (count, self.length), generator=generator)
        first, second = self.pairs[family].unbind(-1)  # (count, contact)
        partner = self.letters - 1 - letters.gather(1, first)
        kept = torch.rand(partner.shape, generator=generator) < PARTNER
        letters = letters.scatter(1, second, torch.where(kept, partner, letters.gather(1, second)))
        return torch.cat([family[:, None], self.families + letters], 1), family

    def masked(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens with 15% of letters masked, and what they were, -100 elsewhere."""
        hidden = torch.rand(tokens.shape, generator=generator) < MASKED
        hidden[:, 0] = False
        return tokens.masked_fill(hidden, self.vocab - 1), tokens.masked_fill(~hidden, -100)

    def touching(self, family: Tensor) -> Tensor:
        """Whether two places touch, (count, 1 + length, 1 + length) bool."""
        maps = torch.zeros(self.families, 1 + self.length, 1 + self.length, dtype=torch.bool)
        for number, pairs in enumerate(self.pairs + 1):
            maps[number, pairs[:, 0], pairs[:, 1]] = maps[number, pairs[:, 1], pairs[:, 0]] = True
        return maps[family]


class Block(nn.Module):
    """Attention in both directions, and an MLP four times as wide, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, pos, width)
        batch, pos, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, pos, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(z.transpose(1, 2).reshape(batch, pos, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class MaskedModel(nn.Module):
    """Tokens (batch, pos) to logits (batch, pos, vocab); initial weights of torch, learned positions."""

    def __init__(self, families: ProteinFamilies, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(families.vocab, width)
        self.position = nn.Embedding(1 + families.length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.unembed = nn.LayerNorm(width), nn.Linear(width, families.vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.norm(x))


class MaskedTraining(L.LightningModule):
    """AdamW on masked letters of new sequences in every batch."""

    def __init__(self, families: ProteinFamilies, batch: int, rate: float, seed: int) -> None:
        super().__init__()
        self.families, self.batch, self.rate, self.seed = families, batch, rate, seed
        self.net = MaskedModel(families)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-100)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.01)

    def train_dataloader(self) -> Any:
        return batches(self, self._draw)

    def _draw(self, step: int) -> tuple[Tensor, Tensor]:
        generator = numbered(self.seed, "batch", step)
        tokens, _ = self.families.draw(self.batch, generator)
        return self.families.masked(tokens, generator)
