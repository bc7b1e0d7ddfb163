"""Two networks that add modulo p: one hidden layer, and the transformer of Nanda et al. 2023 (arXiv:2301.05217)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class OneHiddenLayer(torch.nn.Module):
    """Pairs (batch, 2) to logits (batch, p): one embedding for both numbers, a layer of GELU."""

    def __init__(self, p: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(p, width)
        self.left, self.right = (torch.nn.Linear(width, hidden) for _ in range(2))
        self.unembed = torch.nn.Linear(hidden, p, bias=False)

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        first, second = self.embed(pairs).unbind(1)
        return self.unembed(F.gelu(self.left(first) + self.right(second)))


class OneLayerTransformer(torch.nn.Module):
    """Tokens a, b, = (batch, 3) to logits (batch, 3, p), as published: no LayerNorm, weights N(0, 1 / d)."""

    def __init__(self, p: int, width: int, hidden: int, heads: int = 4) -> None:
        super().__init__()
        d, self.heads = width, heads
        self.embed, self.pos = torch.nn.Embedding(p + 1, d), torch.nn.Embedding(3, d)
        self.qkv, self.out = torch.nn.Linear(d, 3 * d, bias=False), torch.nn.Linear(d, d, bias=False)
        self.up, self.down = torch.nn.Linear(d, hidden), torch.nn.Linear(hidden, d)
        self.unembed = torch.nn.Linear(d, p, bias=False)
        for name, weight in self.named_parameters():
            torch.nn.init.zeros_(weight) if "bias" in name else torch.nn.init.normal_(weight, std=d**-0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.pos.weight
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (batch, head, pos, size)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(z.transpose(1, 2).flatten(2))
        return self.unembed(x + self.down(self.up(x).relu()))
