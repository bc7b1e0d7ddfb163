"""Small language models in the manner of those that people train: what they do, in lines of our own."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, D, HEADS, LAYERS, PLACES = 29, 16, 4, 2, 32


def shaken(model: nn.Module) -> Any:
    """The model with weights that are far from their initialisation, so that no norm and no bias is trivial."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def heads_of(x: Tensor, count: int = HEADS) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions of (batch, head, pos, dim)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 10_000 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


# -- minGPT: separate maps, a written-out softmax, returns (logits, loss) ---------------------------------------------


class MinGPTAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value, self.proj = (nn.Linear(D, D) for _ in range(4))
        self.n_head = HEADS

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = (heads_of(part(x)) for part in (self.key, self.query, self.value))
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.shape[-1])
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        pattern = F.softmax(scores.masked_fill(later, -math.inf), dim=-1)
        return self.proj((pattern @ v).transpose(1, 2).reshape(x.shape))


class MinGPTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2, self.attn = nn.LayerNorm(D), nn.LayerNorm(D), MinGPTAttention()
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class MinGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(VOCAB, D), nn.Parameter(torch.zeros(1, PLACES, D))
        self.blocks = nn.Sequential(*(MinGPTBlock() for _ in range(LAYERS)))
        self.ln_f, self.head = nn.LayerNorm(D), nn.Linear(D, VOCAB, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.head(self.ln_f(self.blocks(self.tok_emb(idx) + self.pos_emb[:, : idx.shape[1]])))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


# -- nanoGPT: a fused map, and without targets the logits of the last place alone -------------------------------------


class NanoGPTAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.n_head, self.n_embd = HEADS, D

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(attend(*(heads_of(part) for part in self.c_attn(x).split(self.n_embd, 2))))


class NanoGPTMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.gelu, self.c_proj = nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class NanoGPTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = nn.LayerNorm(D), NanoGPTAttention(), nn.LayerNorm(D), NanoGPTMLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_head=HEADS, block_size=PLACES)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, D),
                "wpe": nn.Embedding(PLACES, D),
                "h": nn.ModuleList(NanoGPTBlock() for _ in range(LAYERS)),
                "ln_f": nn.LayerNorm(D),
            }
        )
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.transformer["wte"](idx) + self.transformer["wpe"](torch.arange(idx.shape[1]))
        for block in self.transformer["h"]:  # type: ignore[union-attr]
            x = block(x)
        x = self.transformer["ln_f"](x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# -- nanochat: norms that are functions, rotary, grouped keys, normed queries, a cap on the logits --------------------


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


class NanochatAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_q, self.c_proj = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.c_k, self.c_v = nn.Linear(D, D // 2, bias=False), nn.Linear(D, D // 2, bias=False)
        self.n_head, self.n_kv_head = HEADS, HEADS // 2

    def forward(self, x: Tensor) -> Tensor:
        q, k = norm(rotated(heads_of(self.c_q(x)))), norm(rotated(heads_of(self.c_k(x), self.n_kv_head)))
        return self.c_proj(attend(q, k, heads_of(self.c_v(x), self.n_kv_head)))


class NanochatMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class NanochatBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = NanochatAttention(), NanochatMLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(norm(x))
        return x + self.mlp(norm(x))


class Nanochat(nn.Module):
    def __init__(self, scaled: bool = False) -> None:
        super().__init__()
        blocks = nn.ModuleList(NanochatBlock() for _ in range(LAYERS))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(VOCAB, D), "h": blocks})
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        self.scaled = scaled  # as later versions do: each layer reads a mixture with the embedding

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        x = first = norm(self.transformer["wte"](idx))
        for block in self.transformer["h"]:  # type: ignore[union-attr]
            x = block(0.9 * x + 0.1 * first if self.scaled else x)
        logits = 15 * torch.tanh(self.lm_head(norm(x)) / 15)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# -- x-transformers: attention and MLP alternate in one list of [norm, block, residual], none of which is called whole -


class XAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.heads = HEADS

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(attend(*(heads_of(part(x), self.heads) for part in (self.to_q, self.to_k, self.to_v))))


class XFeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU())
        self.ff = nn.Sequential(first, nn.Dropout(0.1), nn.Linear(4 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x)


class XResidual(nn.Module):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return x + residual


class XLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        kinds = [kind for _ in range(LAYERS) for kind in (XAttention, XFeedForward)]
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.ModuleList([nn.LayerNorm(D)]), kind(), XResidual()]) for kind in kinds
        )
        self.final_norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        for norms, block, residual in self.layers:  # type: ignore[misc]
            x = residual(block(norms[0](x)), x)
        return self.final_norm(x)


class XTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_emb, self.attn_layers = nn.Embedding(VOCAB, D), XLayers()
        self.to_logits = nn.Linear(D, VOCAB, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_logits(self.attn_layers(self.token_emb(x)))


# -- litgpt: one map of queries, keys and values by group of heads, gated MLP, parallel or not ------------------------


class LitAttention(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups, self.size = groups, D // HEADS
        self.qkv, self.proj = nn.Linear(D, (HEADS + 2 * groups) * self.size), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        by_group = self.qkv(x).unflatten(-1, (self.groups, HEADS // self.groups + 2, self.size))
        q, k, v = by_group.split([HEADS // self.groups, 1, 1], -2)
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in (q, k, v))
        return self.proj(attend(rotated(q), rotated(k), v))


class LitMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc_1, self.fc_2, self.proj = nn.Linear(D, 2 * D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))


class LitBlock(nn.Module):
    def __init__(self, groups: int, parallel: bool) -> None:
        super().__init__()
        self.norm_1, self.attn, self.norm_2, self.mlp = nn.RMSNorm(D), LitAttention(groups), nn.RMSNorm(D), LitMLP()
        self.parallel = parallel

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel:
            return x + self.attn(self.norm_1(x)) + self.mlp(self.norm_2(x))
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class LitGPT(nn.Module):
    def __init__(self, groups: int = 2, parallel: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_head=HEADS, n_query_groups=groups)
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        blocks = nn.ModuleList(LitBlock(groups, parallel) for _ in range(LAYERS))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(VOCAB, D), "h": blocks, "ln_f": nn.RMSNorm(D)})

    def forward(self, idx: Tensor) -> Tensor:
        x = self.transformer["wte"](idx)
        for block in self.transformer["h"]:  # type: ignore[union-attr]
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


# -- torch's own layers: built-in attention, norms before or after ----------------------------------------------------


class TorchEncoder(nn.Module):
    """A language model of `nn.TransformerEncoder` with a causal mask; `flat`: logarithms of probabilities."""

    def __init__(self, norm_first: bool = True, flat: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCAB, D), nn.Embedding(PLACES, D)
        layer = nn.TransformerEncoderLayer(D, HEADS, 2 * D, 0.1, batch_first=batch_first, norm_first=norm_first)
        norm = nn.LayerNorm(D) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, LAYERS, norm, enable_nested_tensor=False)
        self.decoder, self.flat, self.batch_first = nn.Linear(D, VOCAB), flat, batch_first

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.embed(tokens) + self.places(torch.arange(tokens.shape[1]))
        x = self.encoder(x if self.batch_first else x.transpose(0, 1), mask=mask, is_causal=True)
        logits = self.decoder(x if self.batch_first else x.transpose(0, 1))
        return logits.log_softmax(-1).flatten(0, 1) if self.flat else logits


class LightningDemo(nn.Module):
    """In the manner of Lightning's demo: an encoder and a decoder of one text, which is given twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, D)
        self.transformer = nn.Transformer(D, 2, 1, 1, 2 * D, dropout=0.1, batch_first=True)
        self.decoder = nn.Linear(D, VOCAB)

    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        mask = torch.tril(torch.ones(inputs.shape[1], inputs.shape[1]) == 1)
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
        source, goal = self.embedding(inputs) * 4.0, self.embedding(target) * 4.0
        out = self.transformer(source, goal, src_mask=mask, memory_mask=mask, tgt_mask=mask)
        return F.log_softmax(self.decoder(out), dim=-1).view(-1, VOCAB)
