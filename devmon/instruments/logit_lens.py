"""The logit lens: what the unembedding reads off the residual stream before the last layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout
from devmon.anatomy.passes import Read, Seen, chunks, log_softmax, read
from devmon.anatomy.sites import Site
from devmon.anatomy.vocabulary import LOGITS, PRODUCT, few_enough, products
from devmon.cost import GPT2_SMALL, Cost, Shape, trials
from devmon.data import ByContent, clustered_groups, clustered_mean, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot

CHECKED = 8  # places at which the lens of the last layer is compared with the model


@dataclass(frozen=True, eq=False)
class LogitLens(ByContent):
    """Final norm and unembedding applied to the residual stream after each layer (nostalgebraist 2020; 2303.08112).

    `tokens` (batch, pos) are read at all positions but the last of each sequence, which has no next token; with
    `sequences`, the lens is applied to the first so many of them alone, while the pass is still that of all `tokens`,
    which other instruments share: each depth is a product with the whole vocabulary. The coordinate `depth` counts the
    layers that have run: 0 is the embedding, L the whole model. All means are over positions, `_se` over sequences; p
    is the model's distribution of the next token, q the lens's. The direct effect of a head on a logit goes through its
    own `W_O`, a norm between attention and stream where there is one, the final norm with the scale it has, and the
    unembedding, before any cap; it is taken less its mean over all logits. Summed over heads, MLPs, biases and
    embedding it is the centred logit (Elhage et al. 2021). The nulls are predictions that do not read the context.

    - `kl` (depth), nats: KL(p ‖ q); 0 up to rounding at depth L, where the lens is the model. Null: `kl_constant`.
    - `kl_se` (depth), nats: its standard error.
    - `loss` (depth), nats per token: cross-entropy of q on the next token. Null: `loss_constant`.
    - `loss_se` (depth), nats per token: its standard error.
    - `agreement` (depth), share: positions where p and q have the same most likely token, the thresholded twin of kl.
      Null: `agreement_constant`.
    - `agreement_se` (depth), share: its standard error.
    - `prediction_depth`, layers: the depth from which on q keeps the model's most likely token (2303.08112, after
      Baldock et al., 2106.09647); 0 where the embedding has it already, at most L. Null: `prediction_depth_shifted`.
    - `prediction_depth_se`, layers: its standard error.
    - `prediction_depth_shifted`, layers: the depth from which on q keeps the token that the model prefers one place
      earlier (at the first place, at the last): what frequent tokens settle without this context, at most L.
    - `prediction_depth_shifted_se`, layers: its standard error.
    - `kl_uniform`, nats: KL(p ‖ uniform).
    - `kl_uniform_se`, nats: its standard error.
    - `kl_constant`, nats: the least KL from p that one fixed distribution can have on these positions: that of the mean
      of p.
    - `kl_constant_se`, nats: its standard error.
    - `loss_constant`, nats per token: loss of the frequencies of the next tokens on these positions.
    - `loss_constant_se`, nats per token: its standard error.
    - `agreement_constant`, share: positions where p prefers the token that it prefers most often.
    - `agreement_constant_se`, share: its standard error.
    - `head_effect` (layer, head), logits: direct effect on the right next token. Null: `head_effect_unigram`.
    - `head_effect_se` (layer, head), logits: its standard error.
    - `head_effect_unigram` (layer, head), logits: direct effect on a random next token of the probe: a head that only
      raises frequent tokens has both alike.
    - `head_effect_unigram_se` (layer, head), logits: its standard error.

    Pitfalls: a lens that reads little may be a stream in other coordinates, not a stream without the information
    (TunedLens); early in training the lens means little at all; a direct effect is not a total effect. Raises
    InstrumentError for a model whose unembedding does not read the stream right after the final norm (encoders,
    post-norm), or in which the lens of the last layer is not the model; DataError for `sequences` that there are not.
    """

    tokens: Tensor
    layout: Layout | None = None
    batch_size: int = 32
    sequences: int | None = field(default=None, metadata={"identity": "if changed"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "LogitLens"))
        if self.sequences is not None and not 1 <= self.sequences <= len(self.tokens):
            raise DataError(
                f"LogitLens needs sequences from 1 to the {len(self.tokens)} of its tokens, got {self.sequences}"
            )

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        """One pass, and for each layer one more unembedding."""
        (sequences, positions), lensed = self.tokens.shape, len(self._lensed)
        depths = lensed * positions * shape.layers
        direct = 2 * depths * shape.d_model**2
        # of one block of places the logits at one depth, and the model's probabilities where they are few
        block = min(4 * PRODUCT * shape.vocab, LOGITS // 5, 4 * lensed * positions * shape.vocab)
        softmaxes = depths * (2 if few_enough(block) else 3) // 3 + (sequences + lensed) * positions
        whole = Cost(sequences, positions=positions, products=depths, softmaxes=softmaxes, operations=direct)
        return replace(whole, trials=trials(positions, 1), held=block * (2 if few_enough(block) else 1))

    def reads(self) -> list[Read]:
        sites: tuple[Site, ...] = (("resid_pre", 0), "resid_post", "z")
        return [Read(self, self.tokens, self._sums, self.batch_size, sites=sites, layout=self.layout, predicts="all")]

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        Anatomy.of(snapshot, self.layout, type(self).__name__).need_sum()
        [found] = read(snapshot, self)
        parts = [part for part in found if part is not None]
        whole = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
        constant = _constant(whole.pop("mean"), whole.pop("negentropy"), whole.pop("best"), self._lensed)
        sums = {name: values.numpy() for name, values in (whole | constant).items()}
        effects = sums.pop("effects")
        return _dataset(sums, effects, self.tokens.shape[1] - 1)

    @property
    def _lensed(self) -> Tensor:
        """The tokens that the lens is applied to."""
        return self.tokens[: self.sequences]

    def _sums(self, seen: Seen) -> dict[str, Tensor] | None:
        """Of one minibatch; None of one that has none of the sequences."""
        tokens = self._lensed[seen.rows]
        if not len(tokens):
            return None
        sites = [("resid_pre", 0), *(("resid_post", i) for i in range(seen.anatomy.layers))]
        states = [seen.sites[site][: len(tokens)] for site in sites]
        lens = _lens(seen, states, tokens)
        return lens | {"effects": _direct(seen, states[-1][:, :-1], tokens, self._lensed)}


def _lens(seen: Seen, stream: list[Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """Of the first `tokens` (batch, pos) of a minibatch, from their states (batch, pos, d) at each depth: sums over
    positions, (batch, depth) and (batch,), with the sums of the model's probabilities, "mean" (batch, vocab), and its
    tokens, "best" (batch, pos)."""
    (batch, length), last = tokens.shape, len(stream) - 1
    log_ps, preferred = seen.log_p[:batch].flatten(0, 1), seen.best[:batch]
    _refuse_other(seen, stream[-1].flatten(0, 1)[:CHECKED], log_ps[:CHECKED])
    # the last position of a sequence, which has no next token, is worked out too, and left out of the sums
    target, best = (values.flatten().to(log_ps.device) for values in (tokens.roll(-1, 1), preferred))
    before = F.pad(preferred[:, :-1].roll(1, 1), (0, 1)).flatten()  # what the model prefers at the place before
    kl, loss, same, other = torch.zeros(4, last + 1, batch * length, dtype=torch.float64, device=log_ps.device)
    negentropy = torch.zeros_like(kl[0])
    mean = torch.zeros(batch, log_ps.shape[1], dtype=log_ps.dtype, device=log_ps.device)

    # some places at a time, at every depth: no more than their logits are held
    for block in products(log_ps):
        model = log_ps[block].exp() if few_enough(log_ps[block].nbytes) else None  # else again at each depth
        for depth in range(last, -1, -1):  # at the last the lens is the model
            scores = log_ps[block] if depth == last else _unembedded(seen.anatomy, stream[depth].flatten(0, 1)[block])
            for at in chunks(scores):
                here = slice(block.start + at.start, block.start + at.stop)
                log_q = scores[at] if depth == last else log_softmax(scores[at])
                p = log_ps[here].exp() if model is None else model[at]
                along = torch.linalg.vecdot(p, log_q).double()
                if depth == last:
                    negentropy[here] = along
                    _add_by_sequence(mean, p, here.start, length)
                kl[depth, here] = negentropy[here] - along
                loss[depth, here] = -log_q.gather(-1, target[here, None])[:, 0].double()
                same[depth, here], other[depth, here] = _prefers(log_q, best[here]), _prefers(log_q, before[here])
            del scores  # before the next product

    # from places to sequences
    places = (-1, batch, length)
    kl, loss, same, other = (values.reshape(places)[..., :-1] for values in (kl, loss, same, other))
    late = 1 + torch.arange(last, device=same.device)[:, None, None]
    # one more than the last depth that disagrees with the token of this place, and with that of the place before
    settled, shifted = ((late * (1 - agrees[:-1])).amax(0) for agrees in (same, other))
    sums = {name: values.sum(-1).T for name, values in (("kl", kl), ("loss", loss), ("agreement", same))}
    sums |= {"prediction_depth": settled.sum(-1), "prediction_depth_shifted": shifted.sum(-1)}
    sums |= {"negentropy": negentropy.reshape(places)[0, :, :-1].sum(-1)}
    return sums | {"mean": mean, "best": preferred[:, :-1]}


def _add_by_sequence(total: Tensor, p: Tensor, start: int, length: int) -> None:
    """Raises the rows of `total` (sequence, vocab) by what places from `start` on have, but the last of each."""
    for sequence in range(start // length, (start + len(p) - 1) // length + 1):
        first, end = sequence * length - start, (sequence + 1) * length - 1 - start
        total[sequence] += p[max(first, 0) : max(end, 0)].sum(0)


def _prefers(log_q: Tensor, token: Tensor) -> Tensor:
    """Whether the first token with the largest log-probability (place, vocab) is this one, (place,)."""
    if log_q.device.type != "cpu":
        return (log_q.argmax(-1) == token).double()  # no slower there, and nothing waits for it
    top = log_q.gather(-1, token[:, None])[:, 0] == log_q.amax(-1)
    where = top.nonzero()[:, 0]  # of several as large, argmax takes the first; it takes much longer than amax here
    top[where] = log_q[where].argmax(-1) == token[where]
    return top.double()


def _unembedded(anatomy: Anatomy, state: Tensor) -> Tensor:
    return anatomy.capped(anatomy.unembedding(anatomy.final_norm(state)))


def _refuse_other(seen: Seen, state: Tensor, log_p: Tensor) -> None:
    """InstrumentError where the lens of the last layer's output (place, d) is not the model, (place, vocab)."""
    off = float((log_softmax(_unembedded(seen.anatomy, state)) - log_p).abs().max())
    if off > 0.02 * (1 + float(log_p.abs().max())):
        raise InstrumentError(
            f"{seen.anatomy.who}: final norm and unembedding of the last layer's output are not the logits of "
            f"{type(seen.model).__name__} (off by {off:.3g}): declare its `norm`, `unembed` and `cap` in its layout"
        )


def _direct(seen: Seen, last: Tensor, tokens: Tensor, probe: Tensor) -> Tensor:
    """Direct effects summed over positions, (batch, layer, head, 2): on the right token, and on a random one of the
    `probe`. `last` is the last layer's output (batch, pos, d) of `tokens` where there is a next token."""
    anatomy, norm = seen.anatomy, seen.anatomy.final_norm
    unembed, mean = anatomy.W_U.T, anatomy.W_U.mean(1)  # (vocab, d), (d,)
    often = torch.bincount(probe[:, 1:].flatten(), minlength=len(unembed)).to(unembed)
    target = tokens[:, 1:].to(unembed.device)
    # what a head writes is linear in the logits once the scales of the norms are frozen: directions are pulled back
    right, random = norm.pulled(unembed[target] - mean), norm.pulled(often / often.sum() @ unembed - mean)
    scale, effects = norm.scale(last), []
    for layer in range(anatomy.layers):
        z, w_o = seen.sites["z", layer][: len(tokens), :-1], anatomy.W_O(layer)
        end = anatomy.end_norm(layer, "attention")
        whole = scale
        if end.normalises:
            whole = scale * end.scale(torch.einsum("bphe,hed->bpd", z, w_o) + anatomy.bias(layer, "out"))
        z = z / whole[..., None]
        back = torch.einsum("bpd,hed->bphe", end.pulled(right), w_o)
        both = (z * back).sum((1, 3)), torch.einsum("bphe,he->bh", z, w_o @ end.pulled(random))
        effects.append(torch.stack(both, -1))
    return torch.stack(effects, 1).double()


def _constant(total: Tensor, negentropy: Tensor, best: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Sums over positions, by sequence, of what fixed distributions get: from the sums of the model's probabilities
    (sequence, vocab), its negative entropies (sequence,) and its preferred tokens (sequence, pos)."""
    total = total.double()
    mean = total.sum(0) / total.sum()
    top = torch.bincount(best.flatten()).argmax()
    target = tokens[:, 1:]
    often = torch.bincount(target.flatten()).double() / target.numel()
    return {
        "kl_uniform": negentropy + target.shape[1] * float(np.log(total.shape[1])),
        "kl_constant": negentropy - torch.xlogy(total, mean).sum(-1),
        "loss_constant": -often.log()[target].sum(1),
        "agreement_constant": (best == top).sum(1).double(),
    }


LABELS = {
    "kl": ("divergence of the lens from the model", "nats", 0.1),
    "loss": ("loss of the lens on the next token", "nats per token", 0.1),
    "agreement": ("share of places where lens and model prefer one token", "share", 0.02),
    "prediction_depth": ("layers until the lens keeps the model's token", "layers", 0.1),
    "prediction_depth_shifted": ("layers until the lens keeps the token preferred a place earlier", "layers", None),
    "kl_uniform": ("divergence of the uniform distribution from the model", "nats", None),
    "kl_constant": ("divergence of the model's mean prediction from the model", "nats", None),
    "loss_constant": ("loss of the next tokens' frequencies", "nats per token", None),
    "agreement_constant": ("share of the token that the model prefers most often", "share", None),
}


def _dataset(sums: dict[str, np.ndarray], effect: np.ndarray, places: int) -> xr.Dataset:
    count = np.full(len(effect), places)
    rows = Rows(headline=["kl", "prediction_depth", "head_effect"])
    for name, (label, units, change) in LABELS.items():
        mean, se = clustered_mean(sums[name], count)
        groups, dims = clustered_groups(sums[name], count), "depth" if mean.ndim else ()
        later = name == "prediction_depth_shifted"
        rows.put(name, dims, mean, se, label, units=units, smallest_change=change, replicates=groups, later=later)
    mean, se = clustered_mean(effect, count)
    groups = clustered_groups(effect, count)
    names = {
        "head_effect": ("direct effect on the right next token", 0.1),
        "head_effect_unigram": ("direct effect on a random next token", None),
    }
    for i, (name, (label, change)) in enumerate(names.items()):
        about: dict[str, Any] = {"smallest_change": change, "replicates": groups[..., i]}
        rows.put(name, ("layer", "head"), mean[..., i], se[..., i], label, units="logits", **about)
    depths, (layers, heads) = sums["kl"].shape[1], effect.shape[1:3]
    return rows.dataset(depth=np.arange(depths), layer=np.arange(layers), head=np.arange(heads))
