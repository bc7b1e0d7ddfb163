"""Fuzzy, abstract and hierarchical induction: heads and losses that find a match where no token repeats.

The three definitions are our own. Each is `InductionHeads` and `RepeatGain` on another kind of match, every number
beside a control that is the same but for the match.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import layer_patterns, logits, stack_heads
from devmon.cost import Cost
from devmon.data import ByContent, best_fixed_offset, clustered_groups, clustered_mean, minibatches
from devmon.data.match_scores import attention_sums, loss_sums
from devmon.data.matches import MatchProbe, categorised, mapped, nested
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot

MIN_ATTENTION = (
    1e-6  # of a control, under which a ratio to it is NaN; attention to later places above it is no rounding
)


class _Matching(ByContent):
    """What the three share. A probe has queries, each with one place that tells what comes next (the target) and other
    places that could have been it (the controls)."""

    sequences: int
    length: int
    batch_size: int

    @cached_property
    def _probe(self) -> MatchProbe:
        raise NotImplementedError

    def cost(self) -> Cost:
        """Two passes: one for the patterns, one for the logits."""
        return Cost(forwards=2 * self.sequences, positions=self.length)

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        probe, who = self._probe, type(self).__name__
        attention, losses, layer = [], [], [0]
        for rows in minibatches(len(probe.tokens), self.batch_size):
            patterns = layer_patterns(snapshot.model, probe.tokens[rows], who)
            layer = list(patterns)
            if any(float(pattern.triu(1).amax()) > MIN_ATTENTION for pattern in patterns.values()):
                raise InstrumentError(
                    f"{who} needs a causal language model: {type(snapshot.model).__name__} attends to later places, "
                    "where it sees what it is to predict: leave this instrument out"
                )
            attention.append([attention_sums(pattern, probe, rows) for pattern in patterns.values()])
            losses.append(loss_sums(logits(snapshot.model, probe.tokens[rows], who), probe, rows, who))
        measured = _dataset(probe, list(zip(*attention, strict=True)), torch.cat(losses).numpy())
        return measured.assign_coords(layer=np.array(layer))


@dataclass(frozen=True, eq=False)
class FuzzyInduction(_Matching):
    """Induction through a token map: the second half of a sequence is `mapping` f of the first (our definition).

    The probe (`devmon.data.matches.mapped`) is x_0 … x_{p-1}, f(x_0) … f(x_{p-1}), p random in every sequence. From the
    query f(x_i) a fuzzy induction head attends to the target, the place of x_{i+1} after the preimage of the query; the
    next token is f(x_{i+1}). No token stands twice in a sequence, so nothing can be found by identity. `mapping`
    (vocab,) is given (upper to lower case, a language to another), or learnt once from a trained model and then frozen
    (`devmon.data.matches.nearest_tokens(embedding)`); -1 maps to nothing. All are means over queries.

    - `matching` (layer, head), attention: from the query to the target, in [0, 1]. Null: `random_place`,
      `fixed_offset`.
    - `matching_se` (layer, head), attention: its standard error over sequences.
    - `random_place` (layer, head), attention: the matched control, attention to another place of the first half, at
      random (the exact mean over them; the query's preimage itself is left out).
    - `random_place_se` (layer, head), attention: its standard error over sequences.
    - `ratio` (layer, head), ratio: matching / random_place, NaN where random_place is under 1e-6, as it is for a
      perfectly sharp head: read matching. Null: 1, a head blind to the match.
    - `ratio_se` (layer, head), ratio: its standard error over sequences.
    - `fixed_offset` (layer, head), attention: what the head's best fixed distance back gets of the same queries.
    - `offset_share`, share: the share of queries that the most frequent distance would hit.
    - `nll`, nats: of the right next token. Null: `nll_control`.
    - `nll_se`, nats: its standard error over sequences.
    - `nll_control`, nats: the mean of the f(x_j) that come later instead, j > i + 1.
    - `nll_control_se`, nats: its standard error over sequences.
    - `gain`, nats: nll_control - nll, how much likelier (log ratio) the right token is than a token that could as well
      have come; 0 for a model that knows the tokens of the first half, or f, or both, but not their order. Null: 0.
    - `gain_se`, nats: its standard error over sequences.

    Pitfalls: a map that training text does not follow has gain 0 in every model; a model may know f and use it in
    several heads, none of which attends to the target directly. Raises DataError for a mapping with too few pairs,
    InstrumentError for a model without attention patterns or logits, or one that attends to later places.
    """

    mapping: Tensor
    sequences: int = 64
    length: int = 64
    seed: int = 0
    bos: int | None = None
    exclude: tuple[int, ...] = ()
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "mapping", _table(self.mapping, "FuzzyInduction", "mapping"))
        if int(self.mapping.max()) >= len(self.mapping):
            raise DataError(
                f"FuzzyInduction needs mapping (vocab,) into 0..{len(self.mapping) - 1}, got {int(self.mapping.max())}"
            )
        assert self._probe

    @cached_property
    def _probe(self) -> MatchProbe:
        return mapped(self.mapping, self.sequences, self.length, self.seed, self.bos, self.exclude)


@dataclass(frozen=True, eq=False)
class AbstractInduction(_Matching):
    """Induction through categories: a list of items, then other items of the same categories in order (our definition).

    The probe (`devmon.data.matches.categorised`) is a list of p items, each of another category, then a list of p other
    items of the same categories in the same order, p random in every sequence. `category` (vocab,) is the category of
    every token (colours, animals, digits, …), -1 for none. From the query, an item of the second list, the target is
    the place after the item of the same category in the first; what comes next is *some* item of the target's category.
    No token stands twice in a sequence, so nothing can be found by identity, and the next token is known by category
    only. All are means over queries.

    - `matching` (layer, head), attention: from the query to the target, in [0, 1]. Null: `random_place`,
      `fixed_offset`.
    - `matching_se` (layer, head), attention: its standard error over sequences.
    - `random_place` (layer, head), attention: the matched control, attention to another place of the first list, at
      random (the exact mean over them; the item of the query's own category is left out).
    - `random_place_se` (layer, head), attention: its standard error over sequences.
    - `ratio` (layer, head), ratio: matching / random_place, NaN where random_place is under 1e-6, as it is for a
      perfectly sharp head: read matching. Null: 1, a head blind to the match.
    - `ratio_se` (layer, head), ratio: its standard error over sequences.
    - `fixed_offset` (layer, head), attention: what the head's best fixed distance back gets of the same queries.
    - `offset_share`, share: the share of queries that the most frequent distance would hit.
    - `nll`, nats: -log of the probability of the right category, summed over its tokens. Null: `nll_control`.
    - `nll_se`, nats: its standard error over sequences.
    - `nll_control`, nats: the mean of the same for the categories that come later instead.
    - `nll_control_se`, nats: its standard error over sequences.
    - `gain`, nats: nll_control - nll, how much likelier (log ratio) the right category is than a category that could as
      well have come; 0 for a model that knows the categories of the first list but not their order. Null: 0.
    - `gain_se`, nats: its standard error over sequences.

    Pitfall: categories of unequal size weigh by their size, in both losses alike on average.
    Raises DataError for too few categories, InstrumentError as FuzzyInduction.
    """

    category: Tensor
    sequences: int = 64
    length: int = 32
    seed: int = 0
    bos: int | None = None
    exclude: tuple[int, ...] = ()
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "category", _table(self.category, "AbstractInduction", "category"))
        assert self._probe

    @cached_property
    def _probe(self) -> MatchProbe:
        return categorised(self.category, self.sequences, self.length, self.seed, self.bos, self.exclude)


@dataclass(frozen=True, eq=False)
class HierarchicalInduction(_Matching):
    """Induction through depth: which bracket does the next one close (our definition).

    The probe (`devmon.data.matches.nested`) is random balanced brackets of several types, `opening` and `closing` being
    their tokens, type by type. Queries are closing brackets followed by another closing one; the target is the bracket
    that the latter closes, at the query's depth: never the last one opened, and its type is independent of all others,
    so neither the query's token nor the latest bracket tells it.
    All are means over queries.

    - `matching` (layer, head), attention: from the query to the target, in [0, 1]. Null: `random_place`,
      `fixed_offset`.
    - `matching_se` (layer, head), attention: its standard error over sequences.
    - `random_place` (layer, head), attention: the matched control, attention to another opening bracket before the
      query, at random (the exact mean over them).
    - `random_place_se` (layer, head), attention: its standard error over sequences.
    - `ratio` (layer, head), ratio: matching / random_place, NaN where random_place is under 1e-6, as it is for a
      perfectly sharp head: read matching. Null: 1, a head blind to the match.
    - `ratio_se` (layer, head), ratio: its standard error over sequences.
    - `fixed_offset` (layer, head), attention: what the head's best fixed distance back gets of the same queries.
    - `offset_share`, share: the share of queries that the most frequent distance would hit.
    - `nll`, nats: -log of the probability of the right closing bracket. Null: `nll_control`.
    - `nll_se`, nats: its standard error over sequences.
    - `nll_control`, nats: the mean over the types of the other opening brackets before the query, same types included.
    - `nll_control_se`, nats: its standard error over sequences.
    - `gain`, nats: nll_control - nll, how much likelier (log ratio) the right bracket is than those of other opening
      brackets; 0 for a model that goes by how often types were seen. Null: 0.
    - `gain_se`, nats: its standard error over sequences.

    Pitfalls: short pairs are frequent, so a head that looks a fixed distance back scores well: compare matching with
    fixed_offset, and see offset_share; the gain of a model that only knows short pairs is not 0 either. Balanced random
    brackets are unlike text.
    Raises DataError for fewer than two types or brackets used twice, InstrumentError as FuzzyInduction.
    """

    opening: tuple[int, ...]
    closing: tuple[int, ...]
    sequences: int = 64
    length: int = 64
    seed: int = 0
    bos: int | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("opening", "closing"):
            object.__setattr__(self, name, tuple(int(token) for token in getattr(self, name)))
        brackets = [*self.opening, *self.closing, *([] if self.bos is None else [self.bos])]
        if len(self.opening) != len(self.closing) or len(self.opening) < 2 or len(set(brackets)) < len(brackets):
            raise DataError(
                "HierarchicalInduction needs two types or more, opening=(…) and closing=(…) with one token each, none "
                f"twice, got {self.opening} and {self.closing}"
            )
        assert self._probe

    @cached_property
    def _probe(self) -> MatchProbe:
        vocab = max(*self.opening, *self.closing) + 1
        return nested(self.opening, self.closing, vocab, self.sequences, self.length, self.seed, self.bos)


def _table(values: Tensor, who: str, name: str) -> Tensor:
    table = torch.as_tensor(values)
    if table.ndim != 1 or table.is_floating_point() or table.dtype == torch.bool or not len(table):
        raise DataError(f"{who} needs {name} (vocab,) of integers, got {tuple(table.shape)} of {table.dtype}")
    return table.detach().to("cpu", torch.int64, copy=True).contiguous()


def _dataset(probe: MatchProbe, layers: list[tuple[tuple[Tensor, ...], ...]], losses: np.ndarray) -> xr.Dataset:
    """From `attention_sums` [layer][minibatch] and `loss_sums` (batch, 2)."""
    result = Rows(headline=["matching", "gain"])
    count = torch.bincount(probe.row, minlength=len(probe.tokens)).numpy()
    queries = torch.bincount(probe.query, minlength=probe.tokens.shape[1])
    dims, units = ("layer", "head"), "attention"

    # attention to the target beside two controls: a place that could have told as well, and a fixed distance back
    sums = [stack_heads([torch.cat([part[i] for part in layer]).numpy() for layer in layers]) for i in (0, 1)]
    fixed = stack_heads(
        [best_fixed_offset(torch.stack([part[2] for part in layer]).sum(0), queries).numpy() for layer in layers]
    )
    (matching, matching_se), (chance, chance_se) = (clustered_mean(each, count) for each in sums)
    label = "attention to the place that tells what comes"
    groups = clustered_groups(sums[0], count)
    result.put("matching", dims, matching, matching_se, label, units=units, smallest_change=0.05, replicates=groups)
    result.put("random_place", dims, chance, chance_se, "attention to a place that could have told it", units=units)

    # the error of the ratio is that of matching - ratio · chance, linearised: the two come from the same sequences
    seen = chance > MIN_ATTENTION
    ratio = np.where(seen, matching / np.where(seen, chance, 1.0), np.nan)
    spread = clustered_mean(sums[0] - np.nan_to_num(ratio) * sums[1], count)[1]
    ratio_se = np.where(seen, spread / np.where(seen, chance, 1.0), np.nan)
    label, silent = "attention to the target over that to a control", f"the control gets less than {MIN_ATTENTION:g}"
    result.put("ratio", dims, ratio, ratio_se, label, units="ratio", nan=f"NaN where {silent}")
    result.put("fixed_offset", dims, fixed, None, "best fixed offset for the same queries", units=units)
    distance = torch.bincount(probe.query - probe.target)
    label = "share of queries at the most frequent distance"
    result.put("offset_share", (), float(distance.max() / distance.sum()), None, label, units="share")

    right, control = losses.T
    for name, each, label, change in (
        ("nll", right, "loss of what comes next", None),
        ("nll_control", control, "loss of what could as well have come", None),
        ("gain", control - right, "log ratio of what comes to what could have come", 0.1),
    ):
        mean, se = clustered_mean(each, count)
        groups = clustered_groups(each, count)
        result.put(name, (), mean, se, label, units="nats", smallest_change=change, replicates=groups)
    return result.dataset(layer=np.arange(matching.shape[0]), head=np.arange(matching.shape[1]))
