"""Negation: does "not" move the answers, by raising the complement or by lowering what is named, and who reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout, Reads
from devmon.anatomy.sites import Site
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, clustered_mean, minibatches
from devmon.data.negation import NegationPrompts
from devmon.data.rows import Rows
from devmon.data.shares import NO_SIGNAL, share
from devmon.errors import InstrumentError
from devmon.snapshot import Snapshot

QUERIES = ("last", "named", "later")  # who reads the negation: the last place, that of the class, all after it
SIGNAL = 3.0  # standard errors that construction + suppression must have for their index; fewer index noise


@dataclass(frozen=True, eq=False)
class Negation(ByContent):
    """Prompts "X that are not Y" beside "X that are indeed Y": what the negation does to the logits of the answers.

    With n, p, o the mean logit at the last place of the answers that are X and not Y (`complement`), that are Y
    (`members`) and that are neither (`other`), LD = n - p (Zhou et al. 2026, 2605.03052). By the lens at each depth
    (final norm and unembedding of the stream there; depth 0 is the embedding) the sensitivity is construction plus
    suppression, exactly.
    `query` is who is kept from the negation: the last place, the place of the class, or all places after the negation.
    `_se` are over items.

    - `sensitivity`, logits: LD(negated) - LD(plain). Null: `sensitivity_permuted`.
    - `sensitivity_se`, logits: its standard error.
    - `sensitivity_permuted`, logits: the same with the answers of the item half the list further on,
      so of another X where the list goes by X. Near 0 where the negation moves nothing but its own class.
    - `sensitivity_permuted_se`, logits: its standard error.
    - `sensitive`, share: items with a sensitivity above 0. Null: .5.
    - `sensitive_se`, share: its standard error.
    - `accuracy_negated`, share: items with LD(negated) > 0: the negation wins. Null: 1 - `accuracy_plain` for a model
      that does not read it.
    - `accuracy_negated_se`, share: its standard error.
    - `accuracy_plain`, share: items with LD(plain) < 0.
    - `accuracy_plain_se`, share: its standard error.
    - `construction` (depth), logits: (n - o)(negated) - (n - o)(plain), what the negation adds to the complement.
    - `construction_se` (depth), logits: its standard error.
    - `suppression` (depth), logits: -[(p - o)(negated) - (p - o)(plain)], what it takes off the class.
    - `suppression_se` (depth), logits: its standard error.
    - `index` (depth), 1: (construction - suppression) / (construction + suppression): 1 all construction, -1 all
      suppression. NaN unless both are positive and their sum is above three standard errors.
    - `lost` (query), share: share of the sensitivity that is gone when these places read key and value of the negation
      from the plain prompt. Null: 0 where they do not read it; 1 for all later places, exactly.
    - `lost_se` (query), share: its standard error.
    - `blocked` (query), logits: the sensitivity that is left when these places cannot attend to it in both prompts.
      Null: `sensitivity` where they do not read it; 0 for all later places, exactly.
    - `blocked_se` (query), logits: its standard error.

    A model can be sensitive and wrong: it moves the answers, and not far enough. Prefer `lost`: blocking also takes the
    plain word away, which the model reads. The index differs between seeds of one training: report it over seeds.
    Cost: 14 passes of the prompts. Raises InstrumentError for a model whose parts are not found.
    """

    prompts: NegationPrompts
    layout: Layout | None = None
    batch_size: int = 32

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        anatomy = Anatomy.of(snapshot, self.layout, "Negation")
        anatomy.need_sum()
        anatomy.need_causal(self.prompts.negated)
        parts = [self._part(anatomy, part) for part in minibatches(len(self.prompts.negated), self.batch_size)]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

        # the model itself is the lens at the last depth
        rows = Rows(headline=["sensitivity", "accuracy_negated"], error="standard error over items")
        negated, plain = found["negated"], found["plain"]  # (item, depth, answer set: n p o)
        own, twin = (each[:, -1, 0] - each[:, -1, 1] for each in (negated, plain))
        sensitivity, unit = own - twin, "logits"
        _put(rows, "sensitivity", (), sensitivity, "logit difference that the negation makes", unit, 0.2)
        _put(rows, "sensitivity_permuted", (), found["permuted"], "the same with another item's answers", unit)
        _put(rows, "sensitive", (), sensitivity > 0, "items that the negation moves to the complement", "share")
        _put(rows, "accuracy_negated", (), own > 0, "negated items with the complement ahead", "share", 0.05)
        _put(rows, "accuracy_plain", (), twin < 0, "plain items with the class ahead", "share")

        # what is raised and what is lowered, by depth
        moved = negated - plain
        built, pressed = moved[..., 0] - moved[..., 2], moved[..., 2] - moved[..., 1]
        _put(rows, "construction", "depth", built, "what the negation adds to the complement", unit)
        _put(rows, "suppression", "depth", pressed, "what the negation takes off the class", unit)
        rows.put("index", "depth", _index(built, pressed), None, "construction against suppression", units="1")

        # who reads the negation
        left, blocked = found["resampled"], found["blocked"]  # (item, query)
        lost, se = share(sensitivity[:, None] - left, sensitivity)
        rows.put("lost", "query", lost, se, "share of the sensitivity lost", units="share", nan=NO_SIGNAL)
        _put(rows, "blocked", "query", blocked, "sensitivity left where the negation is blocked", unit)
        return rows.dataset(depth=np.arange(negated.shape[1]), query=np.array(QUERIES, dtype=object))

    def cost(self) -> Cost:
        items, positions = self.prompts.negated.shape
        return Cost(forwards=items * (2 + 4 * len(QUERIES)), positions=positions)

    def _part(self, anatomy: Anatomy, part: slice) -> dict[str, np.ndarray]:
        """Mean logits of n, p, o by item and depth, (item, depth, 3), and the logit differences that are left."""
        mine = self.prompts
        tokens, twins = mine.negated[part], mine.plain[part]
        last, at = mine.last[part], mine.negation[part]
        every = torch.arange(len(tokens))
        sites: tuple[Site, ...] = (("resid_pre", 0), "resid_post", "k", "v")
        found, reads = {}, {}
        for name, these in (("negated", tokens), ("plain", twins)):
            _, reads[name] = anatomy.run(these, sites)
            stream = [reads[name]["resid_pre", 0], *(reads[name]["resid_post", i] for i in range(anatomy.layers))]
            states = torch.stack([state[every, last] for state in stream], 1)  # (item, depth, d)
            with torch.no_grad():
                scores = anatomy.capped(anatomy.unembedding(anatomy.final_norm(states)))
            found[name] = self._answers(scores, part)
            if name == "negated":
                shifted = self._answers(scores[:, -1:], part, shift=len(mine.negated) // 2)
            else:
                shifted = shifted - self._answers(scores[:, -1:], part, shift=len(mine.negated) // 2)
        found["permuted"] = shifted[:, 0, 0] - shifted[:, 0, 1]

        # each kind of reader in turn: key and value from the plain run, or no attention to the place at all
        places = torch.arange(tokens.shape[1])
        readers = (places == last[:, None], places == mine.named[part][:, None], places > at[:, None])
        resampled, blocked = [], []
        for reads_it in readers:
            write = _resample(anatomy, reads["plain"], reads_it, at)
            scores, _ = anatomy.run(torch.cat([tokens, tokens]), write=write)
            resampled.append(self._difference(scores[: len(tokens)], part) - _ahead(found["plain"]))
            block = {"pattern": _blocking(reads_it, at)}
            without = [self._difference(anatomy.run(these, write=block)[0], part) for these in (tokens, twins)]
            blocked.append(without[0] - without[1])
        return found | {"resampled": np.stack(resampled, 1), "blocked": np.stack(blocked, 1)}

    def _difference(self, scores: Tensor, part: slice) -> np.ndarray:
        """LD (item,) of logits (item, pos, vocab)."""
        at_last = scores[torch.arange(len(scores)), self.prompts.last[part]]
        return _ahead(self._answers(at_last[:, None], part))

    def _answers(self, scores: Tensor, part: slice, shift: int = 0) -> np.ndarray:
        """Mean logits of the three sets, (item, depth, 3), from logits (item, depth, vocab)."""
        means = []
        for name in ("complement", "members", "other"):
            answers = getattr(self.prompts, name).roll(-shift, 0)[part].to(scores.device)
            if int(answers.max()) >= scores.shape[-1]:
                raise InstrumentError(
                    f"Negation: the answers go up to {int(answers.max())} but the model has {scores.shape[-1]} logits: "
                    "make the prompts with this model's tokenizer"
                )
            there = (answers >= 0)[:, None]
            picked = scores.double().gather(-1, answers.clamp_min(0)[:, None].expand(-1, scores.shape[1], -1))
            means.append((picked * there).sum(-1) / there.sum(-1))
        return torch.stack(means, -1).detach().cpu().numpy()


def _ahead(answers: np.ndarray) -> np.ndarray:
    return answers[:, -1, 0] - answers[:, -1, 1]


def _index(built: np.ndarray, pressed: np.ndarray) -> np.ndarray:
    """(C - S) / (C + S) of means over items, (depth,)."""
    c, s = built.mean(0), pressed.mean(0)
    total, se = clustered_mean(built + pressed, np.ones(len(built)))
    known = (c > 0) & (s > 0) & (total > SIGNAL * se)
    return np.where(known, (c - s) / np.where(known, total, 1.0), np.nan)


def _resample(anatomy: Anatomy, plain: Reads, reads_it: Tensor, at: Tensor) -> dict[Any, Callable[[Tensor], Tensor]]:
    """Writes for a batch of the same prompts twice, after which both are the run in which the places of `reads_it`
    (item, pos) read key and value of the place `at` (item,) from the `plain` run.

    The second copy has them; what its heads read counts at those places, what those of the first read at all others,
    for both copies: so nothing else of the run is held back.
    """
    items = len(at)
    every = torch.arange(items)

    def moved(value: Tensor, source: Tensor) -> Tensor:
        value = value.clone()
        value[items + every, at] = source[every, at]
        return value

    def joined(z: Tensor) -> Tensor:
        mixed = torch.where(reads_it[:, :, None, None].to(z.device), z[items:], z[:items])
        return torch.cat([mixed, mixed])

    writes: dict[Any, Callable[[Tensor], Tensor]] = {"z": joined}
    for layer in range(anatomy.layers):
        for name in ("k", "v"):
            writes[name, layer] = partial(moved, source=plain[name, layer])
    return writes


def _blocking(reads_it: Tensor, at: Tensor) -> Callable[[Tensor], Tensor]:
    """A write of patterns (item, head, q, k): no weight from the places of `reads_it` on the place `at`."""
    places = torch.arange(reads_it.shape[1])
    cut = reads_it[:, None, :, None] & (places == at[:, None])[:, None, None]

    def write(pattern: Tensor) -> Tensor:
        kept = pattern.masked_fill(cut.to(pattern.device), 0.0)
        return kept / kept.sum(-1, keepdim=True)

    return write


def _put(
    rows: Rows, name: str, dims: Any, values: np.ndarray, label: str, units: str, change: float | None = None
) -> None:
    """A mean over items with its error, from values (item, …)."""
    values, each = np.asarray(values, np.float64), np.ones(len(values))
    mean, se = clustered_mean(values, each)
    groups = clustered_groups(values, each)
    rows.put(name, dims, mean, se, label, units=units, smallest_change=change, replicates=groups)
