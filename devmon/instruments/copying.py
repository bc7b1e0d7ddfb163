"""Copying heads: whether what a head writes raises the token that it attends to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout
from devmon.anatomy.circuits import copying_eigenvalues
from devmon.anatomy.passes import Read, Seen, read
from devmon.anatomy.sites import Site
from devmon.cost import GPT2_SMALL, Cost, Shape, at_once, general_eigenvalues, trials
from devmon.data import ByContent, clustered_groups, clustered_mean, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot, derive_seed


@dataclass(frozen=True, eq=False)
class CopyingHeads(ByContent):
    """The share of what every head raises among the tokens of the sequence that goes to the token attended to.

    Olsson et al. 2022, 2209.11895, appendix "Head activation evaluators": 25 random tokens, the head's contribution
    through the unembedding, mean over the vocabulary taken off, rectified, "the ratio of the amount it raises the
    logits of the token being attended to, to that of all tokens in this sample", scaled to [−1, 1].

    For a query q that attends to place j with weight A[q, j], the head adds A[q, j] v_j W_O to the stream; through the
    final norm with its scale frozen (and a norm after attention, in families that have one) that changes the logit of
    token t by A[q, j] ℓ_qj(t). With ℓ⁺ = max(0, ℓ − mean over the vocabulary of ℓ), S the distinct tokens of the
    sequence and t_j the one at j: share = Σ_qj A[q, j] ℓ⁺_qj(t_j) / Σ_qj A[q, j] Σ_{t in S} ℓ⁺_qj(t).

    - `copying` (layer, head), score in [-1, 1]: 2 share − 1: 1 if only attended tokens are raised (an identity OV
      circuit), −1 if none is; NaN for a head that raises no token of any sequence. Null: `shuffled`, `uniform`.
    - `copying_se` (layer, head), score in [-1, 1]: its standard error over sequences (ratio of sums).
    - `shuffled` (layer, head), score in [-1, 1]: the same for the token at j + 1, which the head did not attend to for
      that: its own null.
    - `uniform`, score in [-1, 1]: the score of a head that raises all tokens of a sequence alike, 2 / |S| − 1, near −1
      as in the paper.
    - `rank` (layer, head), share: of the other tokens of the sequence, those that a place raises less than its own
      token, by attention: one candidate against another, which many small logits cannot swamp as they do
      the sum in `copying`. Null: 0.5.
    - `rank_se` (layer, head), share: its standard error over sequences.
    - `eigenvalue` (layer, head), 1: Re Σλ / Σ|λ| of the OV circuit between embedding and unembedding, `copying` of
      `HeadSpectra` (Elhage et al. 2021): what the head would copy of tokens themselves. NaN where the embedding is of
      another width. Null: `null` there, about 0.
    - `raised` (layer, head), logit: the denominator for a query: how much there is to share.

    The probe is `sequences` of `length` different tokens drawn by `seed` from `vocab_size` without `exclude` (the paper
    leaves out the most and the least common), or `tokens` (batch, pos). A `bos` token stands first and is neither a
    place nor a token of the sequence: heads that rest there would be judged by it. Pitfalls: taken source by source, so
    attention may be spread evenly; the paper weighs by the attention of the whole output, gives 0 to 0.5 as its range
    before scaling, and does not say more: values compare within one definition. The value uses the current unembedding,
    so it can move while the head does not. Raises InstrumentError for models that show no pattern, norm the stream
    after each addition, do not unembed it directly, or whose heads write something else than pattern times values;
    DataError unless exactly one probe is given.
    """

    vocab_size: int | None = None
    sequences: int = 32
    length: int = 25
    seed: int = 0
    bos: int | None = None
    exclude: tuple[int, ...] = ()
    tokens: Tensor | None = None
    batch_size: int = 32
    layout: Layout | None = None

    def __post_init__(self) -> None:
        if (self.vocab_size is None) == (self.tokens is None):
            raise DataError("CopyingHeads needs either vocab_size=... (random tokens) or tokens=... (batch, pos)")
        if self.tokens is not None:
            object.__setattr__(self, "tokens", probe_tokens(self.tokens, "CopyingHeads"))
        elif len(self._allowed) < self.length or self.length < 2 or self.sequences < 1:
            raise DataError(
                f"CopyingHeads needs sequences >= 1 and at least `length` different tokens, got {self.sequences} "
                f"sequences of {self.length} out of {len(self._allowed)} tokens: lower length"
            )

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        sequences, positions = self._probe.shape
        values = shape.layers * shape.heads * general_eigenvalues(shape.d_head)
        # by place: what a head's values say of every token of the sequence, in float64, and some ten sweeps over that
        heads = shape.layers * sequences * positions * (4 * shape.d_model**2 + 6 * positions * shape.d_model)
        patterns = 3 * shape.patterns(sequences, positions)
        tables = round((1.25 if shape.tied else 2) * shape.vocab * shape.d_model**2)
        through = 4 * shape.layers * shape.heads * shape.d_head * shape.d_model**2
        work, before = values + heads + patterns + tables + through, trials(positions, 1)
        # of one minibatch in float64: directions of its tokens, and what each place lifts, four of each at a time
        size = at_once(sequences, positions, self.batch_size, shape)
        held = 32 * size * positions * (shape.d_model + shape.heads * positions)
        return Cost(sequences, positions=positions, unembedded=sequences, operations=work, trials=before, held=held)

    def reads(self) -> list[Read]:
        sites: tuple[Site, ...] = ("v", "z", "pattern", ("resid_post", -1))
        return [Read(self, self._probe, self._sums, self.batch_size, sites=sites, layout=self.layout)]

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        anatomy = Anatomy.of(snapshot, self.layout, type(self).__name__)
        _refuse(anatomy, int(self._probe.max()))
        [parts] = read(snapshot, self)
        with torch.no_grad():
            eigenvalue = copying_eigenvalues(snapshot, anatomy)
        sums = [torch.cat(layer, 1).numpy() for layer in zip(*parts, strict=True)]  # each (5, batch, head)
        types = _first_places(self._probe[:, self._start :]).sum(1).numpy()
        return _dataset(sums, eigenvalue, types, self._probe.shape[1] - self._start)

    def _sums(self, seen: Seen) -> list[Tensor]:
        """`_layer` of every layer."""
        anatomy, content = seen.anatomy, seen.inputs[:, self._start :]
        unembed = anatomy.W_U.detach()
        toward = unembed[:, content.to(unembed.device)].double() - unembed.mean(1, dtype=torch.float64)[:, None, None]
        toward = anatomy.final_norm.pulled(toward.permute(1, 2, 0))  # (batch, pos, d)
        return [_layer(seen, layer, content.to(unembed.device), toward) for layer in range(anatomy.layers)]

    @property
    def _start(self) -> int:
        """The first place that counts: `bos` does not."""
        return 0 if self.bos is None else 1

    @cached_property
    def _allowed(self) -> list[int]:
        return sorted(set(range(self.vocab_size or 0)) - {*self.exclude, self.bos})

    @cached_property
    def _probe(self) -> Tensor:
        if self.tokens is not None:
            rows = self.tokens
        else:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "CopyingHeads"))
            allowed = torch.tensor(self._allowed)
            draws = [torch.randperm(len(allowed), generator=generator)[: self.length] for _ in range(self.sequences)]
            rows = allowed[torch.stack(draws)]
        return rows if self.bos is None else torch.cat([torch.full((len(rows), 1), self.bos), rows], 1)


def _first_places(tokens: Tensor) -> Tensor:
    """Marks the first place of each token, (batch, pos)."""
    return ~(tokens[:, :, None] == tokens[:, None, :]).tril(-1).any(-1)


def _layer(seen: Seen, layer: int, content: Tensor, toward: Tensor) -> Tensor:
    """(5, batch, head): raised of the attended tokens, of the tokens after them, of all tokens; tokens that those
    attended beat, and how many they met. `content` (batch, pos) are the tokens that count, `toward` (batch, pos, d) the
    direction in the final stream that raises each."""
    a, start = seen.anatomy, seen.inputs.shape[1] - content.shape[1]
    v, z, pattern = (seen.sites[site, layer] for site in ("v", "z", "pattern"))
    v = v.repeat_interleave(a.heads // v.shape[2], 2)
    v, z = v.double(), z.double()

    # the norms are linear once their scale is frozen: it is divided out of the attention, summed over queries
    end, dtype, w_o = a.end_norm(layer, "attention"), a.W_O(layer).dtype, a.W_O(layer).detach().double()
    scale = a.final_norm.scale(seen.sites["resid_post", a.layers - 1].to(dtype)).double()  # (batch, q, 1)
    if end.normalises:
        whole = torch.einsum("bqhe,hed->bqd", z, w_o) + a.bias(layer, "out")
        scale = scale * end.scale(whole.to(dtype)).double()
    weight = torch.einsum("bhqk,bq->bhk", pattern.double(), 1 / scale[:, :, 0])[:, :, start:]

    # how much the value at k raises the token at t, from the direction of t seen by the head
    back = torch.einsum("btd,hed->bhte", end.pulled(toward), w_o)
    lifted = torch.einsum("bkhe,bhte->bhkt", v[:, start:], back)
    types = _first_places(content)
    rivals = types[:, None] & (content[:, :, None] != content[:, None])  # (batch, k, t): the other tokens, once each
    beaten = (lifted.diagonal(0, 2, 3)[..., None] > lifted) & rivals[:, None]
    looks = weight * (lifted != 0).any(3)
    raised = lifted.clamp(min=0) * weight[..., None]
    sums = (
        raised.diagonal(0, 2, 3).sum(2),
        raised.roll(-1, 3).diagonal(0, 2, 3).sum(2),
        (raised * types[:, None, None]).sum((2, 3)),
        (looks * beaten.sum(3)).sum(2),
        (looks * rivals.sum(2)[:, None]).sum(2),
    )
    return torch.stack(sums).cpu()


def _refuse(anatomy: Anatomy, largest: int) -> None:
    name = type(anatomy.model).__name__
    anatomy.need_sum()
    if largest >= anatomy.W_U.shape[1]:
        raise InstrumentError(
            f"{anatomy.who}: the tokens go up to {largest} but {name} has {anatomy.W_U.shape[1]} logits: lower "
            "vocab_size, or give tokens of this model"
        )


def _dataset(sums: list[np.ndarray], eigenvalue: np.ndarray | None, types: np.ndarray, length: int) -> xr.Dataset:
    """From (5, batch, head) of each layer, `eigenvalue` (layer, head) and the distinct tokens of each sequence."""
    own, after, everything, beaten, met = np.stack(sums, 2)  # (batch, layer, head)
    shape = own.shape[1:]
    share, se, shuffled, rank, rank_se = (np.full(shape, np.nan) for _ in range(5))
    for place in np.ndindex(shape):
        here = (slice(None), *place)
        share[place], se[place] = clustered_mean(own[here], everything[here])
        rank[place], rank_se[place] = clustered_mean(beaten[here], met[here])
        shuffled[place] = clustered_mean(after[here], everything[here])[0]
    dims, result = ("layer", "head"), Rows(headline=["copying", "rank"])
    units, silent = "score in [-1, 1]", "the head raises no token of the probe"
    label = "share raised at the attended token, scaled"
    groups = 2 * clustered_groups(own, everything) - 1
    about: dict[str, Any] = {"smallest_change": 0.1, "nan": silent, "replicates": groups}
    result.put("copying", dims, 2 * share - 1, None, label, units=units, **about)
    result.put("copying_se", dims, 2 * se, None, result.error, units=units, nan=silent)
    label = "the same for the token after the attended one"
    result.put("shuffled", dims, 2 * shuffled - 1, None, label, units=units, nan=silent)
    uniform = 2 * np.mean(1 / types) - 1
    result.put("uniform", (), uniform, None, "score of raising all tokens alike", units=units, nan=silent)
    about = {"smallest_change": 0.05, "nan": "the head writes nothing at the places it looks at", "later": True}
    label = "share of other tokens raised less than the attended one"
    result.put("rank", dims, rank, rank_se, label, units="share", replicates=clustered_groups(beaten, met), **about)
    narrow = "the circuit is zero, or the embedding is no map from tokens to the stream"
    values = np.full(shape, np.nan) if eigenvalue is None else eigenvalue
    result.put("eigenvalue", dims, values, None, "Re Σλ / Σ|λ| of the OV circuit", units="1", nan=narrow, later=True)
    raised = everything.sum(0) / (len(own) * length)
    result.put("raised", dims, raised, None, "raised in all, for one query", units="logit")
    return result.dataset(layer=np.arange(shape[0]), head=np.arange(shape[1]))
