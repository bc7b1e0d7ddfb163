"""Contacts in attention: which pairs of places touch, by a sparse regression on all heads, as in protein models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from devmon.anatomy.passes import TOGETHER, Read, Seen, read
from devmon.cost import GPT2_SMALL, Cost, Shape
from devmon.data import ByContent, clustered_groups, clustered_mean, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot

Array = NDArray[np.float64]

DESCENTS = 500  # steps of the fit at most; with standardised heads 100 to 200 are taken
STILL = 1e-7  # change of all weights at which it ends
LONG = 24  # places apart from which a contact is a long one (CASP, and 2021.12.15.422761)


@dataclass(frozen=True, eq=False)
class AttentionContacts(ByContent):
    """Precision of predicted contacts: Rao et al. 2020 (bioRxiv 2020.12.15.422761), with attention of all heads.

    `tokens` (sequence, pos), `contacts` (sequence, pos, pos) symmetric bool, `fitted` (sequence,) bool: those that the
    regression is fitted on; the others are judged. `group` (sequence,) is the protein or family of each, which must be
    on one side. The first `before` and last `after` places (special tokens) are left out. Of each pair at least
    `separation` apart the features are A + Aᵀ of every head, with average product correction unless `apc` is False
    (A - row sums · column sums / sum), standardised; the regression minimises C Σ log loss + ‖w‖₁. Precision is
    the share of contacts among the `top` best pairs of a sequence, by default as many as it has places. With `pool`
    attention is averaged over the sequences of a group first, whose contacts are the same: one map a family. `_se` are
    over groups, or over sequences where one group is judged.

    - `precision`, share: by the regression. Null: `chance`, and the untrained model, whose random attention already
      sees which letters go together (.22 in the made-up families).
    - `precision_se`, share: its standard error.
    - `precision_long`, share: of pairs 24 or more apart. NaN where there are none.
    - `precision_shuffled`, share: by a regression fitted to contacts of other pairs, dealt within each sequence.
    - `precision_head` (layer, head), share: by the A + Aᵀ of one head alone, without a fit. Null: `chance`.
    - `precision_head_se` (layer, head), share: its standard error.
    - `chance`, share: pairs that are contacts.
    - `heads_used`, heads: with a weight that is not 0.

    Cost: one pass, and a fit on all pairs of the fitted sequences. Raises DataError for data that do not fit,
    InstrumentError for a model that shows no attention patterns.
    """

    tokens: Tensor
    contacts: Tensor
    fitted: Tensor
    group: Tensor | None = None
    top: int | None = None
    separation: int = 6
    before: int = 1
    after: int = 0
    C: float = 0.15
    apc: bool = True
    pool: bool = False
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "AttentionContacts", shortest=3))
        count, length = self.tokens.shape
        contacts, fitted = (torch.as_tensor(each).cpu().bool().clone() for each in (self.contacts, self.fitted))
        group = torch.arange(count) if self.group is None else torch.as_tensor(self.group).cpu().long().clone()
        if contacts.shape != (count, length, length) or fitted.shape != (count,) or group.shape != (count,):
            raise DataError(
                f"AttentionContacts needs contacts ({count}, {length}, {length}), fitted and group ({count},), got "
                f"{tuple(contacts.shape)}, {tuple(fitted.shape)} and {tuple(group.shape)}"
            )
        if bool((contacts != contacts.mT).any()) or fitted.all() or not fitted.any():
            raise DataError("AttentionContacts needs symmetric contacts, and sequences of both kinds in fitted")
        if set(group[fitted].tolist()) & set(group[~fitted].tolist()):
            raise DataError("AttentionContacts needs each group on one side: fitted and judged share some")
        for name, value in (("contacts", contacts), ("fitted", fitted), ("group", group)):
            object.__setattr__(self, name, value)
        touching = self._touching
        if self.pool and any(bool((touching[group == g] != touching[group == g][:1]).any()) for g in group.unique()):
            raise DataError("AttentionContacts pools groups whose contacts are the same: give others, or pool=False")
        if not touching.shape[1] or len(np.unique(touching[self.fitted.numpy()])) < 2 or not touching.any(1).all():
            raise DataError(
                f"AttentionContacts needs a contact in every sequence among pairs {self.separation} places apart, and "
                "pairs that are none: lower separation"
            )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        assert self.group is not None
        [parts] = read(snapshot, self)
        layers = list(parts[0])
        by_layer = [torch.cat([part[n] for part in parts]).numpy() for n in layers]  # (sequence, head, pair)
        heads = [len(values[0]) for values in by_layer]
        features = np.concatenate(by_layer, 1).transpose(0, 2, 1)  # (sequence, pair, head)
        touching, fitted, group = self._touching, self.fitted.numpy(), self.group.numpy()
        if self.pool:  # one map of each group
            number, first, of = np.unique(group, return_index=True, return_inverse=True)
            features = np.stack([features[of == g].mean(0) for g in range(len(number))])
            touching, fitted, group = touching[first], fitted[first], number

        # the regression on all heads, and the same on contacts dealt to other pairs
        deal = np.random.default_rng(snapshot.generator("dealt").initial_seed() % 2**63)
        dealt = np.stack([deal.permutation(row) for row in touching])
        scores, used = self._scores(features, touching, fitted)
        shuffled, _ = self._scores(features, dealt, fitted)
        far = (self._pairs[1] - self._pairs[0]) >= LONG
        judged = touching[~fitted]

        rows = Rows(headline=["precision"], error="standard error over groups of sequences")
        hits = self._precision(scores, judged)
        mean, se, groups = _over_groups(hits, group[~fitted])
        label = "contacts among the pairs of the highest scores"
        rows.put("precision", (), mean, se, label, units="share", smallest_change=0.05, replicates=groups)
        some = far.any() and judged[:, far].any()
        long = self._precision(scores[:, far], judged[:, far]).mean() if some else np.nan
        rows.put(
            "precision_long", (), long, None, "the same of long ones", units="share", nan="no pair is so far apart"
        )
        other = float(self._precision(shuffled, judged).mean())
        rows.put("precision_shuffled", (), other, None, "fitted to contacts of other pairs", units="share")

        # each head by itself
        alone = self._precision(features[~fitted].transpose(2, 0, 1), judged).T  # (sequence, head)
        mean, se, _ = _over_groups(alone, group[~fitted])
        dims, most, at = ("layer", "head"), max(heads), np.cumsum([0, *heads])
        tables = []
        for values in (mean, se):
            table = np.full((len(layers), most), np.nan)
            for i, count in enumerate(heads):
                table[i, :count] = values[at[i] : at[i + 1]]
            tables.append(table)
        rows.put("precision_head", dims, tables[0], tables[1], "the same by one head", units="share")
        rows.put("chance", (), float(judged.mean()), None, "pairs that are contacts", units="share")
        rows.put("heads_used", (), used, None, "heads with a weight", units="heads")
        return rows.dataset(layer=np.array(layers), head=np.arange(most))

    def reads(self) -> list[Read]:
        return [Read(self, self.tokens, self._features, min(self.batch_size, TOGETHER), patterns=True)]

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        sequences, positions = self.tokens.shape
        work = shape.patterns(sequences, positions)
        return Cost(sequences, positions=positions, unembedded=sequences, operations=work)

    def _features(self, seen: Seen) -> dict[int, Tensor]:
        """By layer A + Aᵀ of the pairs, corrected, (sequence, head, pair) in float32."""
        found, (i, j) = {}, self._pairs
        inner = slice(self.before, seen.inputs.shape[1] - self.after)
        for layer, pattern in seen.patterns.items():
            both = pattern[..., inner, inner].double().cpu()
            both = both + both.mT
            if self.apc:
                row = both.sum(-1, keepdim=True)
                both = both - row * row.mT / row.sum(-2, keepdim=True)
            found[layer] = both[..., i, j].float()
        return found

    @property
    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers i < j of the places of the pairs, without the special ones."""
        i, j = np.triu_indices(self.tokens.shape[1] - self.before - self.after, self.separation)
        return i, j

    @property
    def _touching(self) -> np.ndarray:
        """Whether each pair is a contact, (sequence, pair)."""
        i, j = self._pairs
        return self.contacts.numpy()[:, i + self.before, j + self.before]

    def _scores(self, features: np.ndarray, touching: np.ndarray, fitted: np.ndarray) -> tuple[np.ndarray, int]:
        """Of the judged sequences (sequence, pair), by a regression on the fitted ones; and how many heads it uses."""
        x = features[fitted].reshape(-1, features.shape[2])
        if not np.isfinite(x).all():
            raise InstrumentError("AttentionContacts: attention that is not finite")
        centre, scale = x.mean(0), x.std(0)
        scale = np.where(scale > 0, scale, np.inf)
        weights = sparse_logistic((x - centre) / scale, touching[fitted].ravel(), self.C)
        return (features[~fitted] - centre) / scale @ weights, int((weights != 0).sum())

    def _precision(self, scores: np.ndarray, touching: np.ndarray) -> np.ndarray:
        """Share of contacts among the best pairs, (…, sequence), of scores (…, sequence, pair); ties by place."""
        length = self.tokens.shape[1] - self.before - self.after
        top = min(length if self.top is None else self.top, scores.shape[-1])
        best = np.argsort(-scores, axis=-1, kind="stable")[..., :top]
        return np.take_along_axis(np.broadcast_to(touching, scores.shape), best, -1).mean(-1)


def _over_groups(hits: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard error and replicates of values (sequence, …), whose groups are independent."""
    _, of = np.unique(group, return_inverse=True)
    of = np.arange(len(of)) if of.max() == 0 else of
    count = np.bincount(of).astype(float)
    total = np.zeros((len(count), *hits.shape[1:]))
    np.add.at(total, of, hits)
    mean, se = clustered_mean(total, count)
    return mean, se, clustered_groups(total, count)


def sparse_logistic(x: Array, label: NDArray[np.bool_], C: float) -> Array:
    """The weights (feature,) that minimise C Σ log(1 + exp(-y (⟨w, x⟩ + b))) + ‖w‖₁, y = ±1, by FISTA (2009)."""
    x = np.column_stack([x, np.ones(len(x))]).astype(np.float64)
    step = 4 / (C * np.linalg.eigvalsh(x.T @ x)[-1])
    w = ahead = np.zeros(x.shape[1])
    w[-1] = ahead[-1] = np.log(label.mean() / (1 - label.mean()))
    t = 1.0
    for _ in range(DESCENTS):
        slope = C * x.T @ (1 / (1 + np.exp(-x @ ahead)) - label)
        new = ahead - step * slope
        new[:-1] = np.sign(new[:-1]) * np.maximum(np.abs(new[:-1]) - step, 0)  # the last, b, has no penalty
        later = (1 + np.sqrt(1 + 4 * t * t)) / 2
        ahead = new + (t - 1) / later * (new - w)
        moved, w, t = float(np.abs(new - w).max()), new, later
        if moved < STILL:
            break
    return w[:-1]
