"""Small models of random weights, in float64, and their snapshots."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly

VOCAB, LENGTH = 40, 41


def snapshot(model: nn.Module) -> Snapshot:
    return Snapshot(0, model.eval())


def random_model(seed: int, vocab: int = VOCAB, length: int = 48, width: int = 12) -> AttentionOnly:
    """Two layers of three heads with random weights, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5

    heads = [[(draw(width, width), draw(width, width)) for _ in range(3)] for _ in range(2)]
    return AttentionOnly(draw(vocab, width), draw(length, width), heads, draw(width, vocab))


class NoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.embed(tokens))


def tiny_neox(seed: int, vocab: int = 19) -> nn.Module:
    """A random GPT-NeoX of two layers of two heads, width 16, for up to 16 tokens."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return GPTNeoXForCausalLM(config).eval()
