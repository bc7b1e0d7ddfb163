"""Small trainings whose checkpoints the instruments measure for the figures of their pages, a function each.

Every function returns the names that the examples of `examples.py` use, and the checkpoints, by step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from devmon.data import broken_repeats, symbol_tasks
from devmon.data.grammars import SMALL, Brackets, trees
from devmon.data.interchange import Interchanges
from devmon.data.markov import chains, transition_matrices
from devmon.data.negation import NegationLanguage
from devmon.data.regression import regression_examples
from devmon.features import BatchTopK, Dictionary, Largest, Training
from devmon.sampling import next_token_loss

Study = tuple[dict[str, Any], dict[int, nn.Module]]


def trained(model: nn.Module, batch: Callable[[int], Tensor], steps: tuple[int, ...], lr: float) -> dict[int, Any]:
    """Copies of a model at these steps of a training by Adam; `batch` gives the loss of a step."""
    torch.manual_seed(1)
    optimizer, kept = torch.optim.Adam(model.parameters(), lr), {}
    for step in range(max(steps) + 1):
        if step in steps:
            kept[step] = copy.deepcopy(model).eval()
        optimizer.zero_grad()
        batch(step).backward()
        optimizer.step()
    return kept


def gpt2(vocab: int, length: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab, n_positions=length, n_embd=32, n_layer=2, n_head=4, n_inner=64, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def language() -> Study:
    """Two layers of four heads on 32 tokens with a few usual successors each; in half of the texts the second half
    repeats the first."""
    vocab, length = 32, 24
    draw = torch.Generator().manual_seed(0)
    law = 0.9 * torch.rand(1, vocab, vocab, generator=draw).pow(12) + 0.002
    law = law / law.sum(-1, keepdim=True)

    def text(count: int) -> Tensor:
        tokens = chains(law.expand(count, -1, -1), length, draw)
        tokens[::2, length // 2 :] = tokens[::2, : length // 2]
        return tokens

    model = gpt2(vocab, length)
    steps = (0, 40, 120, 200, 300)
    models = trained(model, lambda _: next_token_loss(model, text(32)).mean(), steps, 3e-3)
    tokens = text(24)
    rows = torch.randn(64, 32, generator=draw)
    dictionary = Dictionary(rows.T.contiguous(), torch.zeros(64), rows / 32, torch.zeros(32), Largest(4))
    size = {"batch_size": 8}
    asked = text(32)
    names: dict[str, Any] = {
        "tokens": tokens,  # (24 texts, 24 places)
        "corpus": text(32),
        "vocab": vocab,
        "pairs": broken_repeats(vocab, 8, 12),
        "tasks": symbol_tasks(vocab, tasks=2, prompts=6, shots=3, symbols=5),
        "previous": tokens.roll(1, 1) % 4,  # a label of each place: of the token before
        "matching": torch.arange(vocab) // 2,
        "dictionary": dictionary,
        "uncentred": Dictionary(rows.T.contiguous(), torch.zeros(64), rows / 32, torch.zeros(32), centred=False),
        "directions": rows[:1],
        "settings": {"nbeta": 30.0, "gamma": 100.0, "lr": 2e-3, "chains": 2, "draws": 12, "burn_in": 6, **size},
        "parts": ("l0 attn", "l1 mlp"),
        "repeats": (torch.arange(length)[:, None] - torch.arange(length)).abs().eq(length // 2).expand(12, -1, -1),
        "fitted": torch.arange(12) < 6,
        "exchanged": Interchanges(asked, asked.roll(1, 0), asked[:, 0], asked.roll(1, 0)[:, 0]),
        "training": Training(BatchTopK(4), width=2, steps=40),
        "trained": models[300],
        "law": Chain(law[0]),
        "chained": chains(law.expand(24, -1, -1), length, draw),
        **questions(asked, asked.roll(1, 0)),
    }
    return names, models


@dataclass(frozen=True)
class Chain:
    """The exact law of texts in which each token depends on the one before."""

    law: Tensor

    @property
    def vocab_size(self) -> int:
        return len(self.law)

    def laws(self, tokens: Tensor) -> Tensor:
        return self.law.double()[tokens]


def questions(right: Tensor, wrong: Tensor) -> dict[str, Tensor]:
    """Two choices a text: its own last four tokens, or those of another one."""
    other = torch.cat([right[:, :-4], wrong[:, -4:]], 1)
    rows, count = torch.stack([right, other], 1).flatten(0, 1), len(right)
    start = torch.full((2 * count,), rows.shape[1] - 4)
    return {"choices": rows, "item": torch.arange(count).repeat_interleave(2), "start": start, "stop": start + 4,
            "right": torch.tensor([True, False]).repeat(count)}  # fmt: skip


def grammar() -> Study:
    """The same model on sentences of a grammar and on nested brackets, in turns."""
    brackets, draw = Brackets(2, 3), torch.Generator().manual_seed(0)
    model = gpt2(max(SMALL.vocab_size, brackets.vocab_size), 32)

    def loss(step: int) -> Tensor:
        tokens = SMALL.draw(16, 32, draw).tokens if step % 2 else brackets.draw(16, 32, draw)
        return next_token_loss(model, tokens).mean()

    models = trained(model, loss, (0, 30, 60, 100, 150), 5e-3)
    held = SMALL.draw(32, 32, draw)
    tree = trees(held)
    starts = [(row < 0).nonzero()[:2, 0].tolist() for row in held.ends[0]]
    names = {
        "brackets": brackets,
        "closing": brackets.draw(24, 32, draw),
        "tokens": held.tokens,
        "ends": held.ends,
        "lengths": torch.tensor([(after[0] if after else 32) - 1 for _, *after in starts]),  # of the first sentences
        "head": tree.head,
        "relation": tree.relation,
        "sentence": tree.sentence,
    }
    return names, models


def pairs() -> Study:
    """Two linear towers on noisy views of the same things, trained to tell which belong together."""
    draw = torch.Generator().manual_seed(0)
    things = torch.randn(64, 4, generator=draw)
    first, second = (things @ torch.randn(4, 8, generator=draw) for _ in range(2))
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(8, 16), nn.Linear(8, 16)])

    def encode(model: Any, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return model[0](first), model[1](second)

    def loss(step: int) -> Tensor:
        x, y = (F.normalize(part, dim=-1) for part in encode(model, first, second))
        return F.cross_entropy(10 * x @ y.T, torch.arange(64))

    return {"first": first, "second": second, "encode": encode}, trained(model, loss, (0, 10, 30, 60, 120), 1e-2)


def negation() -> Study:
    """The same model on a made-up language of classes, members and "not"."""
    language, draw = NegationLanguage(), torch.Generator().manual_seed(0)
    model = gpt2(language.vocab_size, 9)

    def loss(step: int) -> Tensor:
        return next_token_loss(model, language.draw(64, draw)).mean()

    models = trained(model, loss, (0, 50, 100, 150, 200), 5e-3)
    return {"prompts": language.prompts(48, draw)}, models


def sums() -> Study:
    """An MLP of two embedded numbers learns their sum modulo 23 from two thirds of the pairs."""
    p, draw = 23, torch.Generator().manual_seed(0)
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    train = torch.rand(p, p, generator=draw) < 0.67
    seen = pairs[train.flatten()]

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.hidden, self.unembed = nn.Embedding(p, 48), nn.Linear(48, 128), nn.Linear(128, p)

        def forward(self, pairs: Tensor) -> Tensor:
            return self.unembed(self.hidden(self.embed(pairs).sum(1)).relu())

    model = Sums()

    def loss(step: int) -> Tensor:
        decay = sum(parameter.square().sum() for parameter in model.parameters())
        return F.cross_entropy(model(seen), seen.sum(1) % p) + 1e-4 * decay

    return {"p": p, "train": train}, trained(model, loss, (0, 50, 150, 400, 800), 5e-3)


def classes() -> Study:
    """A classifier of five clouds in eight dimensions, trained to zero error."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 5
    inputs = 2 * torch.randn(5, 8, generator=draw)[labels] + torch.randn(200, 8, generator=draw)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 5))
    models = trained(model, lambda _: F.cross_entropy(model(inputs), labels), (0, 20, 60, 120, 300), 3e-3)
    return {"inputs": inputs, "labels": labels}, models


def markov() -> Study:
    """The transformer on chains of three states with a law of its own in each sequence (Edelman et al. 2024)."""
    model, draw = gpt2(3, 32), torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        return next_token_loss(model, chains(transition_matrices(16, 3, draw), 32, draw)).mean()

    models = trained(model, loss, (0, 20, 40, 80, 150), 5e-3)
    return {"tokens": chains(transition_matrices(64, 3, draw), 32, draw)}, models


class Regressor(nn.Module):
    """A transformer over x and y in turns that predicts each y from its x and the pairs before."""

    def __init__(self, dims: int, pairs: int) -> None:
        super().__init__()
        self.inner = gpt2(1, 2 * pairs).transformer
        self.read, self.write = nn.Linear(dims + 1, 32), nn.Linear(32, 1)

    def forward(self, rows: Tensor) -> Tensor:  # (batch, 2 pairs, dims + 1)
        return self.write(self.inner(inputs_embeds=self.read(rows)).last_hidden_state)[:, ::2, 0]


def regression() -> Study:
    """A transformer learns linear regression in two dimensions from the examples in its context."""
    dims, pairs, noise, draw = 2, 6, 0.1, torch.Generator().manual_seed(0)

    def examples(count: int) -> tuple[Tensor, Tensor, Tensor]:
        x, y = regression_examples(torch.randn(count, dims, generator=draw), pairs, noise, draw)
        places = [F.pad(x, (0, 1)), F.pad(y[..., None], (dims, 0))]
        return torch.stack(places, 2).flatten(1, 2), x, y

    model = Regressor(dims, pairs)

    def loss(step: int) -> Tensor:
        rows, _, y = examples(32)
        return (model(rows) - y).square().mean()

    models = trained(model, loss, (0, 20, 60, 120, 240), 5e-3)
    return dict(zip(("inputs", "x", "y"), examples(128), strict=True)) | {"noise": noise}, models
