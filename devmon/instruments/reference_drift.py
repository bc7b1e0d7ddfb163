"""How far a model is from another of its form, such as the one that fine-tuning began with: outputs, losses, layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.anatomy import find_blocks, logits, residual_stream
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, clustered_mean, probe_tokens
from devmon.data.probe import minibatches
from devmon.data.rows import Rows
from devmon.errors import InstrumentError
from devmon.snapshot import Snapshot, weights_digest


@dataclass(frozen=True, eq=False)
class ReferenceDrift(ByContent):
    """A model against a `reference` of the same vocabulary and layers on fixed `tokens` (batch, pos) int64.

    The reference is copied when the instrument is made, and known by the digest of its weights. p is the model's
    distribution of the next token, r the reference's, h and h_r the residual stream before and after the layers.

    - `kl`, nats per token: mean over predicted tokens of KL(r ‖ p) = Σ r log (r / p). Null: 0.
    - `kl_se`, nats per token: its standard error over sequences.
    - `loss_change`, nats per token: mean of the loss minus the reference's. Null: 0.
    - `loss_change_se`, nats per token: its standard error over sequences, paired.
    - `loss_change_by_token` (sequence, pos), nats: the same of each token; `pos` is the token that is predicted.
    - `drift` (layer), 1: mean over places of |h − h_r| / |h_r|, layer 0 the embedding. Null: 0.
    - `drift_se` (layer), 1: its standard error over sequences.
    - `alignment` (layer), 1: mean over places of the cosine of h and h_r. Null: 1.
    - `alignment_se` (layer), 1: its standard error over sequences.

    Pitfalls: drift and alignment see a rotation or a scale that later layers undo; a similarity that does not is that
    of `Sketch`. The first place of many models has a state a hundred times as long as others, which hides what moves:
    it is left out. Cost: two forward passes for the outputs and two for the stream, and the reference in memory. Raises
    InstrumentError where the two differ in layers or vocabulary.
    """

    reference: nn.Module = field(metadata={"identity": "never"})
    tokens: Tensor
    blocks: str | None = None
    batch_size: int = 8
    digest: str = field(default="", init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "ReferenceDrift"))
        object.__setattr__(self, "reference", copy.deepcopy(self.reference).eval().requires_grad_(False))
        object.__setattr__(self, "digest", weights_digest(self.reference))

    def _content(self) -> tuple[object, ...]:  # of two copies of one reference, the digest tells that they are equal
        return tuple(value for value in super()._content() if not isinstance(value, nn.Module))

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        who = "ReferenceDrift"
        reference = self.reference.to(snapshot.device)
        path = self.blocks or find_blocks(snapshot.model, self.tokens[:1], who)
        own = self.blocks or find_blocks(reference, self.tokens[:1], who)
        kl, change, drift, alignment = [], [], [], []
        for rows in minibatches(len(self.tokens), self.batch_size):
            tokens = self.tokens[rows]
            # Outputs: a distribution of one minibatch at a time, as all of them may not fit.
            p, r = (self._log_probabilities(model, tokens, who) for model in (snapshot.model, reference))
            if p.shape != r.shape:
                raise InstrumentError(
                    f"{who} needs a reference of the same vocabulary: it has {r.shape[-1]}, the model {p.shape[-1]}"
                )
            kl.append((r.exp() * (r - p)).sum(-1).double().cpu())
            at = tokens[:, 1:, None].to(p.device)
            change.append((r.gather(-1, at) - p.gather(-1, at))[..., 0].double().cpu())
            del p, r

            # The stream: sums over the places of each sequence, at each layer.
            states = [residual_stream(snapshot.model, tokens, path, who), residual_stream(reference, tokens, own, who)]
            if len(states[0]) != len(states[1]) or states[0][0].shape != states[1][0].shape:
                raise InstrumentError(f"{who} needs a reference of the same layers: give blocks=..., or another one")
            moved, angle = [], []
            for h, other in zip(*states, strict=True):
                a, b = h[:, 1:].float(), other[:, 1:].float()
                moved.append(((a - b).norm(dim=-1) / b.norm(dim=-1)).sum(1))
                angle.append(torch.cosine_similarity(a, b, dim=-1).sum(1))
            drift.append(torch.stack(moved, 1).double().cpu())
            alignment.append(torch.stack(angle, 1).double().cpu())
        return self._rows(*(torch.cat(part).numpy() for part in (kl, change, drift, alignment)))

    def cost(self) -> Cost:
        return Cost(forwards=4 * len(self.tokens), positions=self.tokens.shape[1])

    def _log_probabilities(self, model: nn.Module, tokens: Tensor, who: str) -> Tensor:
        """(batch, pos - 1, vocab), in float32 at least."""
        scores = logits(model, tokens, who)[:, :-1]
        return (scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores).log_softmax(-1)

    def _rows(self, kl: np.ndarray, change: np.ndarray, drift: np.ndarray, alignment: np.ndarray) -> xr.Dataset:
        """The rows of KL and change (sequence, pos - 1), and of sums over places (sequence, layer)."""
        rows = Rows(headline=["kl", "loss_change"], reference=self.digest)
        each, unit = np.ones(len(kl)), "nats per token"
        for name, values, label in (
            ("kl", kl.mean(1), "KL from the reference to the model"),
            ("loss_change", change.mean(1), "loss minus that of the reference"),
        ):
            mean, se = clustered_mean(values, each)
            groups = clustered_groups(values, each)
            rows.put(name, (), float(mean), float(se), label, units=unit, replicates=groups)
        rows.put("loss_change_by_token", ("sequence", "pos"), change, None, "the same of each token", units="nats")
        places = np.full(len(kl), self.tokens.shape[1] - 1)
        for name, sums, label in (
            ("drift", drift, "distance from the reference's state over its length"),
            ("alignment", alignment, "cosine with the reference's state"),
        ):
            mean, se = clustered_mean(sums, places)
            rows.put(name, "layer", mean, se, label, units="1")
        pos = np.arange(1, self.tokens.shape[1])
        return rows.dataset(sequence=np.arange(len(kl)), pos=pos, layer=np.arange(drift.shape[1]))
