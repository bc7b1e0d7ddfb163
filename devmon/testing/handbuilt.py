"""Language models built by hand, in float64, in which the numbers of the instruments are known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from devmon.anatomy import Layout

Head = tuple[Tensor, Tensor]


class AttentionOnly(nn.Module):
    """A causal attention-only transformer without norms, whose heads are given as matrices.

    Head h of a layer is a pair (A, B) of (d, d) matrices: it attends with softmax over k of x_q A x_k and adds x_k B.
    `embed` is (vocab, d), `positions` (length, d), `heads` layer by layer, all with as many heads, `unembed`
    (d, vocab).
    """

    anatomy = Layout(
        blocks="blocks",
        query="query",
        key="key",
        value="value",
        out="out",
        heads="heads",
        embed="embed",
        unembed="unembed",
    )

    def __init__(self, embed: Tensor, positions: Tensor, heads: Sequence[Sequence[Head]], unembed: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(embed.clone(), freeze=False)
        self.positions = nn.Parameter(positions.clone())
        self.blocks = nn.ModuleList(_Heads(layer) for layer in heads)
        self.unembed = _linear(unembed)

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.embed(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            state = block(state)
        return self.unembed(state)


class _Heads(nn.Module):
    """Queries x A, keys and values x itself, outputs B: W_Q W_Kᵀ = A and W_V W_O = B."""

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__()
        self.heads = len(heads)
        eye = torch.eye(len(heads[0][0]), dtype=heads[0][0].dtype)
        self.query = _linear(torch.cat([attend for attend, _ in heads], 1))
        self.key, self.value = (_linear(eye.repeat(1, self.heads)) for _ in range(2))
        self.out = _linear(torch.cat([add for _, add in heads]))

    def forward(self, state: Tensor) -> Tensor:
        query, key, value = (
            part(state).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        z = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
        return state + self.out(z.transpose(1, 2).flatten(2))


def _linear(matrix: Tensor) -> nn.Linear:
    """x ↦ x matrix."""
    made = nn.Linear(matrix.shape[0], matrix.shape[1], bias=False, dtype=matrix.dtype)
    made.weight.data = matrix.T.contiguous().clone()
    return made


def induction(vocab_size: int, length: int, sharpness: float = 60.0, confidence: float = 20.0) -> AttentionOnly:
    """A complete induction circuit: head 1 of layer 0 attends to the previous token, head 0 of layer 1 to the match.

    The other two heads attend evenly and add nothing. Sequences must start with token 0 (`bos=0`) and hold it nowhere
    else: the induction head rests there while its token is new. Attention is exact up to length · exp(-sharpness / 2):
    prefix matching and previous token score 1, the loss is log(vocab_size) after a new token and
    log(1 + (vocab_size - 1) exp(-confidence)) in the second copy.
    """
    token, before, out, place, eye = _parts(vocab_size, length)
    previous, remember, match, copy = (torch.zeros_like(eye) for _ in range(4))
    previous[place, place] = sharpness * _back(length, 1)
    remember[token, before] = eye[token, token]
    match[token, before] = sharpness * eye[token, token]
    match[token, place.start] = sharpness / 2
    copy[token, out] = confidence * eye[token, token]
    copy[0] = 0
    heads = [[_idle(eye), (previous, remember)], [(match, copy), _idle(eye)]]
    return AttentionOnly(eye[token], eye[place], heads, eye[:, out])


def fixed_offset(vocab_size: int, length: int, offset: int, sharpness: float = 60.0) -> AttentionOnly:
    """One head that attends `offset` places back whatever stands there, and copies it: sharp, and blind to content."""
    token, _, out, place, eye = _parts(vocab_size, length)
    attend, copy = torch.zeros_like(eye), torch.zeros_like(eye)
    attend[place, place] = sharpness * _back(length, offset)
    copy[token, out] = 20.0 * eye[token, token]
    return AttentionOnly(eye[token], eye[place], [[(attend, copy)]], eye[:, out])


def even(vocab_size: int, length: int, layers: int = 2, heads: int = 3) -> AttentionOnly:
    """Every head spreads its attention evenly over the past and adds nothing; all logits are zero."""
    token, _, out, place, eye = _parts(vocab_size, length)
    return AttentionOnly(eye[token], eye[place], [[_idle(eye)] * heads] * layers, eye[:, out])


class Bigram(nn.Module):
    """Predicts the next token from the current one alone, with probabilities `table[current]`, (vocab, vocab).

    On text drawn from the same chain its loss is the chain's entropy rate, at every position.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(table.double().log())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits[tokens]


class Readable(nn.Module):
    """A residual stream of three layers that holds a label of each token type, `label` (vocab,) int64, in its own time.

    Layer 0 holds a sign that is balanced within each label (where it belongs to an even number of types), so linearly
    nothing about the label; block 1 writes the label, block 2 the identity of the token. A linear probe gets the
    majority at layer 0 and everything from layer 1 on; a control task, too, is read perfectly at layer 2.
    The stream is returned as the logits.
    """

    def __init__(self, label: Tensor) -> None:
        super().__init__()
        classes, vocab = int(label.max()) + 1, len(label)
        rank = (label[:, None] == label[None, :]).tril(-1).sum(1)  # how many types of this label came before
        table = torch.zeros(3, vocab, 1 + classes + vocab, dtype=torch.float64)
        table[0, :, 0] = 1 - 2 * (rank % 2)
        table[1, torch.arange(vocab), 1 + label] = 1
        table[2, :, 1 + classes :] = torch.eye(vocab)
        self.embed = nn.Parameter(table[0])
        self.blocks = nn.ModuleList(_Write(rows) for rows in table[1:])

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.embed[tokens]
        for block in self.blocks:
            state = block(state, tokens)
        return state


class _Write(nn.Module):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.clone())

    def forward(self, state: Tensor, tokens: Tensor) -> Tensor:
        return state + self.table[tokens]


def _parts(vocab_size: int, length: int) -> tuple[slice, slice, slice, slice, Tensor]:
    """Where a one-hot residual stream keeps the token, the token before, the output and the place; and its identity."""
    token, before, out = (slice(i * vocab_size, (i + 1) * vocab_size) for i in range(3))
    width = 3 * vocab_size + length
    return token, before, out, slice(3 * vocab_size, width), torch.eye(width, dtype=torch.float64)


def _back(length: int, offset: int) -> Tensor:
    """(length, length) with a one at (q, q - offset)."""
    return torch.diag(torch.ones(length - offset, dtype=torch.float64), -offset)


def _idle(eye: Tensor) -> Head:
    return torch.zeros_like(eye), torch.zeros_like(eye)
