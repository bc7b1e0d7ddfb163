"""The logit lens: what the unembedding reads off the residual stream before the last layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout, activations
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, clustered_mean, minibatches, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import InstrumentError
from devmon.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class LogitLens(ByContent):
    """Final norm and unembedding applied to the residual stream after each layer (nostalgebraist 2020; 2303.08112).

    `tokens` (batch, pos) are read at all positions but the last of each sequence, which has no next token. The
    coordinate `depth` counts the layers that have run: 0 is the embedding, L the whole model. All means are over
    positions, `_se` over sequences; p is the model's distribution of the next token, q the lens's. The direct effect of
    a head on a logit goes through its own `W_O`, a norm between attention and stream where there is one, the final norm
    with the scale it has, and the unembedding, before any cap; it is taken less its mean over all logits. Summed over
    heads, MLPs, biases and embedding it is the centred logit (Elhage et al. 2021). The nulls are predictions that do
    not read the context.

    - `kl` (depth), nats: KL(p ‖ q); 0 up to rounding at depth L, where the lens is the model. Null: `kl_constant`.
    - `kl_se` (depth), nats: its standard error.
    - `loss` (depth), nats per token: cross-entropy of q on the next token. Null: `loss_constant`.
    - `loss_se` (depth), nats per token: its standard error.
    - `agreement` (depth), share: positions where p and q have the same most likely token, the thresholded twin of kl.
      Null: `agreement_constant`.
    - `agreement_se` (depth), share: its standard error.
    - `prediction_depth`, layers: the depth from which on q keeps the model's most likely token (2303.08112, after
      Baldock et al., 2106.09647); 0 where the embedding has it already, at most L.
    - `prediction_depth_se`, layers: its standard error.
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
    post-norm), or in which the lens of the last layer is not the model.
    """

    tokens: Tensor
    layout: Layout | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "LogitLens"))

    def cost(self) -> Cost:
        """One pass of the model; its unembedding runs once more for each layer, which is not counted.

        With the 12 layers and 50,257 tokens of GPT-2 small all took the time of 8 passes on a CPU.
        """
        return Cost(forwards=len(self.tokens), positions=self.tokens.shape[1])

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        who = type(self).__name__
        anatomy = Anatomy(snapshot.model, self.layout, who)
        anatomy.need_sum()
        sites: tuple[str | tuple[str, int], ...] = (("resid_pre", 0), "resid_post", "z")
        output, reads = activations(snapshot, self.tokens, sites, who, self.layout, self.batch_size)
        if int(self.tokens.max()) >= output.shape[-1]:
            raise InstrumentError(
                f"{who}: the tokens go up to {int(self.tokens.max())} but {type(anatomy.model).__name__} has "
                f"{output.shape[-1]} logits: give tokens of this model's vocabulary"
            )
        stream = torch.stack([reads["resid_pre", 0], *reads.stack("resid_post")])[:, :, :-1]
        z, final = reads.stack("z")[:, :, :-1], output[:, :-1]
        with torch.no_grad():
            read, effects = [], []
            for rows in minibatches(len(self.tokens), self.batch_size):
                target = self.tokens[rows, 1:].to(output.device)
                read.append(_lens(anatomy, stream[:, rows], final[rows], target))
                effects.append(_direct(anatomy, stream[-1, rows], z[:, rows], target, self.tokens))
            constant = _constant(final, self.tokens, self.batch_size)
        sums = {name: np.concatenate([part[name] for part in read]) for name in read[0]}
        return _dataset(sums | constant, np.concatenate(effects), self.tokens.shape[1] - 1)


def _lens(anatomy: Anatomy, stream: Tensor, final: Tensor, target: Tensor) -> dict[str, np.ndarray]:
    """Sums over positions (batch, depth), and (batch,), of one minibatch; `stream` is (depth, batch, pos, d)."""
    log_p = _log_softmax(final)
    p, best, read = log_p.exp(), final.argmax(-1), []
    negentropy = torch.linalg.vecdot(p, log_p)
    for depth, state in enumerate(stream):
        scores = anatomy.capped(anatomy.unembedding(anatomy.final_norm(state)))
        off = float((scores - final).abs().max()) if depth == len(stream) - 1 else 0.0  # the last lens is the model
        if off > 0.02 * (1 + float(final.abs().max())):
            raise InstrumentError(
                f"{anatomy.who}: final norm and unembedding of the last layer's output are not the logits of "
                f"{type(anatomy.model).__name__} (off by {off:.3g}): declare its `norm`, `unembed` and `cap` in its "
                "layout"
            )
        log_q = _log_softmax(scores)
        kl = negentropy - torch.linalg.vecdot(p, log_q)
        read.append((kl, -log_q.gather(-1, target[..., None])[..., 0], scores.argmax(-1) == best))
    kl, loss, same = (torch.stack(each).double().cpu() for each in zip(*read, strict=True))  # (depth, batch, pos)
    late = 1 + torch.arange(len(same) - 1)[:, None, None]
    settled = (late * (1 - same[:-1])).amax(0)  # one more than the last depth that disagrees
    sums = {"kl": kl, "loss": loss, "agreement": same, "prediction_depth": settled}
    return {name: values.sum(-1).numpy().T for name, values in sums.items()}


def _direct(anatomy: Anatomy, last: Tensor, z: Tensor, target: Tensor, tokens: Tensor) -> np.ndarray:
    """Direct effects summed over positions, (batch, layer, head, 2): on the right token, and on a random one."""
    unembed, mean = anatomy.W_U.T, anatomy.W_U.mean(1)  # (vocab, d), (d,)
    often = torch.bincount(tokens[:, 1:].flatten(), minlength=len(unembed)).to(unembed)
    right, random = unembed[target] - mean, often / often.sum() @ unembed - mean
    norm, effects = anatomy.final_norm, []
    scale = norm.scale(last)[:, :, None]
    for layer, heads in enumerate(z):
        written = torch.einsum("bphe,hed->bphd", heads, anatomy.W_O(layer))
        end = anatomy.end_norm(layer, "attention")
        whole = end.scale(written.sum(2) + anatomy.bias(layer, "out"))[:, :, None]
        normed = norm.linear(end.linear(written, whole), scale)
        both = torch.einsum("bphd,bpd->bh", normed, right), torch.einsum("bphd,d->bh", normed, random)
        effects.append(torch.stack(both, -1))
    return torch.stack(effects, 1).double().cpu().numpy()


def _constant(final: Tensor, tokens: Tensor, batch_size: int) -> dict[str, np.ndarray]:
    """Sums over positions, by sequence, of what fixed distributions get; `final` (batch, pos, vocab)."""
    rows_of = list(minibatches(len(final), batch_size))
    by_sequence, negentropy = [], []
    for rows in rows_of:
        log_p = _log_softmax(final[rows])
        p = log_p.exp()
        by_sequence.append(p.sum(1))
        negentropy.append(torch.linalg.vecdot(p, log_p).sum(1).double())
    total = torch.cat(by_sequence).double()  # (sequence, vocab)
    mean = total.sum(0) / total.sum()
    best = torch.cat([final[rows].argmax(-1) for rows in rows_of])
    top = torch.bincount(best.flatten()).argmax()
    target = tokens[:, 1:]
    often = torch.bincount(target.flatten()).double() / target.numel()
    negative = torch.cat(negentropy)
    uniform = negative + target.shape[1] * float(np.log(final.shape[-1]))
    constant = negative - torch.xlogy(total, mean).sum(-1)
    return {
        "kl_uniform": uniform.cpu().numpy(),
        "kl_constant": constant.cpu().numpy(),
        "loss_constant": -often.log()[target].sum(1).numpy(),
        "agreement_constant": (best == top).sum(1).double().cpu().numpy(),
    }


def _log_softmax(scores: Tensor) -> Tensor:
    return F.log_softmax(scores if scores.dtype == torch.float64 else scores.float(), -1)


LABELS = {
    "kl": ("divergence of the lens from the model", "nats", 0.1),
    "loss": ("loss of the lens on the next token", "nats per token", 0.1),
    "agreement": ("share of places where lens and model prefer one token", "share", 0.02),
    "prediction_depth": ("layers until the lens keeps the model's token", "layers", 0.1),
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
        rows.put(name, dims, mean, se, label, units=units, smallest_change=change, replicates=groups)
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
