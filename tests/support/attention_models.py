"""Small models whose attention is computed in every way there is, with the pattern worked out apart."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

VOCAB, LENGTH, BATCH = 23, 12, 3


def tokens(seed: int = 0, batch: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def hugging_face(kind: str) -> Any:
    """A tiny random model with three layers, default (sdpa) attention where it has it, and weights large enough to
    give patterns that differ from uniform."""
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
    configs = {
        "gpt2": lambda: transformers.GPT2Config(n_embd=16, n_layer=3, n_head=4, n_positions=32, vocab_size=VOCAB),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(vocab_size=VOCAB, **small),
        "llama": lambda: transformers.LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, **small),
        "gemma2": lambda: transformers.Gemma2Config(
            vocab_size=VOCAB, num_key_value_heads=2, head_dim=8, sliding_window=5, attn_logit_softcapping=2.0, **small
        ),
    }
    config = configs[kind]()
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(std=0.4)
    return model


class Attention(nn.Module):
    """One causal self-attention of 2 heads of size 4, computed in the given way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.project = nn.Linear(8, 24)
        self.builtin = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, state: Tensor) -> Tensor:
        batch, length, _ = state.shape
        query, key, value = self.project(state).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        banned = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (query @ key.transpose(-2, -1) / 2).masked_fill(banned, -math.inf)
        if self.way == "sdpa":
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        elif self.way == "F.softmax":
            mixed = F.softmax(scores, dim=-1) @ value
        elif self.way == "torch.softmax":
            mixed = torch.softmax(scores, -1) @ value
        elif self.way == "Tensor.softmax":
            mixed = scores.softmax(dim=3) @ value
        elif self.way == "hidden":
            mixed = (scores.exp() / scores.exp().sum(-1, keepdim=True)) @ value
        else:
            return self.builtin(state, state, state, attn_mask=banned, need_weights=self.way == "MHA weights")[0]
        return mixed.transpose(1, 2).reshape(batch, length, 8)

    def reference(self, state: Tensor) -> Tensor:
        """The pattern (batch, head, q, k), worked out apart."""
        weight, bias = (
            (self.builtin.in_proj_weight, self.builtin.in_proj_bias)
            if self.way.startswith("MHA")
            else (self.project.weight, self.project.bias)
        )
        query, key, _ = (state @ weight.T + bias).view(*state.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        pattern = torch.zeros(len(state), 2, state.shape[1], state.shape[1])
        for q in range(state.shape[1]):
            weights = ((query[:, :, q, None] * key[:, :, : q + 1]).sum(-1) / 2).exp()
            pattern[:, :, q, : q + 1] = weights / weights.sum(-1, keepdim=True)
        return pattern


class Small(nn.Module):
    def __init__(self, *ways: str, inplace: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed = nn.Embedding(VOCAB, 8)
        self.blocks = nn.ModuleList(Attention(way) for way in ways)
        self.unembed = nn.Linear(8, VOCAB)
        self.inplace = inplace
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.6
        self.eval()

    def forward(self, batch: Tensor) -> Tensor:
        state = self.embed(batch)
        for block in self.blocks:
            if self.inplace:
                state += block(state)
            else:
                state = state + block(state)
        return self.unembed(state)
