"""Whether single heads point from a token to the one that it depends on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr
from torch import Tensor

from devmon.anatomy.passes import Read, Seen, read
from devmon.cost import GPT2_SMALL, Cost, Shape
from devmon.data import ByContent, clustered_groups, clustered_mean, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.snapshot import Snapshot, derive_seed

OFFSETS = (-3, -2, -1, 1, 2)  # of the baseline: always the token so many places on, as Voita et al. 2019 compare with
ROUTES = 2  # attention from the token, and to it


@dataclass(frozen=True, eq=False)
class AttachmentHeads(ByContent):
    """How often the strongest attention of a head links a token with the one that it depends on, by relation.

    `tokens` (batch, pos); `head` (batch, pos) is the place of the token that each depends on, -1 for none; `relation`
    (batch, pos) its kind; `sentence` (batch, pos) the number of the sentence, -1 for special tokens: all as
    `devmon.data.grammars.trees` makes them. The guess of a head is the place of the largest attention from the token,
    or to it, in its sentence, itself left out. For each relation of `fewest` cases at least the head and the
    direction are chosen on half of the rows, drawn by `seed`, and scored on the other (Chen et al. 2023, 2309.07311,
    choose and score on the same), and so is the baseline's offset. `_se` are over rows.

    - `attachment`, share: of all tokens with a relation, those whose chosen head is right (UAS). Null: `offset`.
    - `attachment_se`, share: its standard error.
    - `offset`, share: the same of the best fixed offset of each relation, from 3 before to 2 after.
    - `offset_se`, share: its standard error.
    - `by_relation` (relation), share: `attachment` of each. Null: `offset_by_relation`.
    - `by_relation_se` (relation), share: its standard error.
    - `offset_by_relation` (relation), share: `offset` of each.
    - `attention` (relation), attention: mean weight of the chosen head between a token and the right one, the twin that
      no largest weight enters.
    - `attention_se` (relation), attention: its standard error.
    - `layer_chosen` (relation), 1: the layer of the head chosen.
    - `head_chosen` (relation), 1: its number in the layer.
    - `to_dependent` (relation), 1: 1 where its attention is to the dependent, 0 where from it.

    Cost: one pass. Raises DataError for shapes, or without a relation of `fewest` cases in both halves, InstrumentError
    for a model that shows no attention patterns.
    """

    tokens: Tensor
    head: Tensor
    relation: Tensor
    sentence: Tensor
    fewest: int = 100
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("tokens", "head", "relation", "sentence"):
            object.__setattr__(self, name, probe_tokens(getattr(self, name), "AttachmentHeads", name))
            if getattr(self, name).shape != self.tokens.shape:
                raise DataError(
                    f"AttachmentHeads needs {name} of the shape of tokens, {tuple(self.tokens.shape)}, got "
                    f"{tuple(getattr(self, name).shape)}"
                )
        if not len(self._kinds):
            raise DataError(
                f"AttachmentHeads needs a relation with {self.fewest} cases, and some in either half of the rows: give "
                "more rows, or a lower `fewest`"
            )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        [parts] = read(snapshot, self)
        kinds, count = len(self._kinds), self._counts  # (row, relation)
        choices = [(layer, head, route) for layer, head in parts[0][0] for route in range(ROUTES)]
        hits, weights = (np.concatenate([part[i] for part in parts]) for i in (1, 2))  # (row, relation, choice)
        offsets = self._offset_hits

        # chosen on one half, scored on the other
        train, test = self._halves
        best, offset = (each[train].sum(0).argmax(1) for each in (hits, offsets))
        at = np.arange(kinds)
        own, other, weight = hits[:, at, best][test], offsets[:, at, offset][test], weights[:, at, best][test]
        held, all_ = count[test], count[test].sum(1)
        rows = Rows(["attachment"], "standard error over rows")
        for name, values, label in (
            ("attachment", own, "tokens whose head of attention finds what they depend on"),
            ("offset", other, "the same of the best fixed offset"),
        ):
            mean, se = clustered_mean(values.sum(1), all_)
            groups = clustered_groups(values.sum(1), all_)
            rows.put(name, (), float(mean), float(se), label, units="share", smallest_change=0.02, replicates=groups)

        def by_relation(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            pairs = [clustered_mean(values[:, i], held[:, i]) for i in range(kinds)]
            return np.array([mean for mean, _ in pairs]), np.array([se for _, se in pairs])

        label = "tokens of a relation whose head of attention finds what they depend on"
        rows.put("by_relation", "relation", *by_relation(own), label, units="share")
        label = "the same of the best fixed offset"
        rows.put("offset_by_relation", "relation", by_relation(other)[0], None, label, units="share")
        label = "weight of the chosen head on what the token depends on"
        rows.put("attention", "relation", *by_relation(weight), label, units="attention")
        chosen = np.array([choices[i] for i in best], dtype=float).T
        for name, value in zip(("layer_chosen", "head_chosen", "to_dependent"), chosen, strict=True):
            rows.put(name, "relation", value, None, f"{name.replace('_', ' ')} of the head", units="1")
        return rows.dataset(relation=self._kinds)

    def reads(self) -> list[Read]:
        return [Read(self, self.tokens, self._sums, self.batch_size, patterns=True)]

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        sequences, positions = self.tokens.shape
        work = shape.patterns(sequences, positions)
        return Cost(sequences, positions=positions, unembedded=sequences, operations=work)

    @cached_property
    def _halves(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng(derive_seed(self.seed, "AttachmentHeads")).permutation(len(self.tokens))
        return np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])

    @cached_property
    def _kinds(self) -> np.ndarray:
        """The relations that are scored."""
        there = ((self.head >= 0) & (self.relation >= 0)).numpy()
        relation = np.where(there, self.relation.numpy(), -1)
        kinds = np.unique(relation[relation >= 0])
        enough = [(relation == kind).sum() >= self.fewest for kind in kinds]
        both = [all((relation[half] == kind).any() for half in self._halves) for kind in kinds]
        return kinds[np.array(enough, bool) & np.array(both, bool)]

    @cached_property
    def _cases(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Row, place, place of the head and number of the relation of each case."""
        known = (self.head >= 0).numpy() & np.isin(self.relation.numpy(), self._kinds)
        row, place = known.nonzero()
        return (
            row,
            place,
            self.head.numpy()[row, place],
            np.searchsorted(self._kinds, self.relation.numpy()[row, place]),
        )

    @cached_property
    def _counts(self) -> np.ndarray:
        """(row, relation)."""
        row, _, _, kind = self._cases
        return self._by_row(row, kind, np.ones((len(row), 1)), len(self.tokens))[..., 0]

    @cached_property
    def _offset_hits(self) -> np.ndarray:
        """(row, relation, offset): the cases that a fixed offset gets right."""
        row, place, head, kind = self._cases
        return self._by_row(row, kind, head[:, None] - place[:, None] == np.array(OFFSETS), len(self.tokens))

    def _by_row(self, row: np.ndarray, kind: np.ndarray, values: np.ndarray, rows: int) -> np.ndarray:
        total = np.zeros((rows, len(self._kinds), values.shape[1]))
        np.add.at(total, (row, kind), values)
        return total

    def _sums(self, seen: Seen) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
        """The heads as (layer, head), and over the cases of each row and relation how often each head and direction is
        right, and its weight on the right place, (row, relation, choice)."""
        start, rows = seen.rows.start or 0, len(seen.inputs)
        here = (self._cases[0] >= start) & (self._cases[0] < start + rows)
        row, place, head, kind = (each[here] for each in self._cases)
        row = row - start
        sentence = self.sentence[seen.rows].numpy()
        allowed = sentence[row] == sentence[row, place][:, None]  # (case, pos)
        allowed[np.arange(len(row)), place] = False
        hits, weights, names = [], [], []
        for layer, pattern in seen.patterns.items():
            both = pattern.double().cpu().numpy()
            for number in range(both.shape[1]):
                names.append((layer, number))
                for route in (both[row, number, place], both[row, number, :, place]):  # (case, pos)
                    guess = np.where(allowed, route, -1.0).argmax(1)
                    hits.append(guess == head)
                    weights.append(route[np.arange(len(row)), head])
        of_hits, of_weights = (self._by_row(row, kind, np.stack(each, 1), rows) for each in (hits, weights))
        return names, of_hits, of_weights
