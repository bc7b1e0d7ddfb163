"""A small transformer for made-up languages, and its training on tokens drawn anew in every batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from devmon.anatomy import Layout
from devmon.recipes.common import batches
from devmon.snapshot import derive_seed


@dataclass(frozen=True)
class Shape:
    """Sizes of a `SequenceModel`; `relative` positions are a term q·r of the distance in the scores, else they are
    learned vectors added to the embedding."""

    vocab: int
    length: int
    width: int = 64
    heads: int = 4
    layers: int = 2
    mlp: bool = True
    relative: bool = True


class Block(nn.Module):
    """Attention, and an MLP four times as wide, each behind a norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        places = torch.zeros(self.heads, shape.length, width // self.heads)
        self.distance = nn.Parameter(places) if shape.relative else None
        self.norm_2 = nn.LayerNorm(width) if shape.mlp else None
        if shape.mlp:
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, pos, width)
        batch, pos, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, pos, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.distance is not None:
            back = (torch.arange(pos)[:, None] - torch.arange(pos)).to(x.device)  # (query, key)
            score = q @ self.distance[:, :pos].mT / math.sqrt(q.shape[-1])  # (batch, head, query, distance)
            score = score.gather(-1, back.clamp_min(0).expand(batch, self.heads, pos, pos))
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=score.masked_fill(back < 0, -math.inf))
        else:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(z.transpose(1, 2).reshape(batch, pos, width))
        return x if self.norm_2 is None else x + self.down(F.gelu(self.up(self.norm_2(x))))


class SequenceModel(nn.Module):
    """Tokens (batch, pos) to logits (batch, pos, vocab): a pre-norm transformer.

    Weights are from N(0, .02²), those of what attention writes divided by √(2 layers).
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab, shape.width)
        self.position = None if shape.relative else nn.Parameter(torch.zeros(shape.length, shape.width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.unembed = nn.Linear(shape.width, shape.vocab, bias=False)
        self.anatomy = Layout(
            blocks="blocks",
            qkv="qkv",
            out="out",
            heads="heads",
            attention_norm="norm_1",
            embed="embed",
            norm="norm",
            unembed="unembed",
            mlp_norm="norm_2" if shape.mlp else "",
            neurons="down" if shape.mlp else "",
        )
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                scale = math.sqrt(2 * shape.layers) if name.endswith("out.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x if self.position is None else x + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.norm(x))


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps, sequences of a batch, the highest learning rate, the steps it rises in, and whether it falls to
    a tenth along a cosine after that."""

    steps: int
    batch: int
    rate: float
    warm_up: int = 1
    cosine: bool = False

    def factor(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.warm_up)
        if not self.cosine:
            return rise
        done = min(1.0, max(0, step - self.warm_up) / max(1, self.steps - self.warm_up))
        return rise * (0.55 + 0.45 * math.cos(math.pi * done))


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Training(L.LightningModule):
    """AdamW (betas .9 and .95, no decay) on batches `draw(count, generator)`, another generator at every step."""

    def __init__(
        self,
        shape: Shape,
        schedule: Schedule,
        draw: Callable[[int, torch.Generator], Tensor],
        seed: int,
        loss: Callable[[nn.Module, Tensor], Tensor] = next_token_loss,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.schedule, self.draw, self.seed, self.loss = SequenceModel(shape), schedule, draw, seed, loss

    def training_step(self, tokens: Tensor, _: int) -> Tensor:
        return self.loss(self.net, tokens)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.schedule.rate, betas=(0.9, 0.95), weight_decay=0.0)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule.factor)
        return [optimizer], [{"scheduler": falling, "interval": "step"}]

    def train_dataloader(self) -> Any:
        return batches(self, lambda step: self.draw(self.schedule.batch, numbered(self.seed, "batch", step)))


def numbered(seed: int, *what: object) -> torch.Generator:
    """A generator of its own for what is drawn."""
    return torch.Generator().manual_seed(derive_seed(seed, *what))
