"""Whether a model composes spans as a tree would: how little a span's states depend on what is around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, clustered_mean, minibatches, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError
from devmon.snapshot import Snapshot, derive_seed

RANDOM = 20  # trees of random splits a sentence: their mean is known to a fifth of one's spread
Spans = frozenset[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class TreeStructure(ByContent):
    """How much more a sentence's spans are independent of their context when it is split as a tree of the model's own.

    `tokens` (sentence, pos) hold one sentence each, from place `start` on, of `lengths` (sentence,) tokens; what is
    before is a start token, what is after is not read. With v the sum of the last layer's states over a span, and v'
    the same where the tokens of the span attend to the span alone, its independence is cos(v, v') (Murty et al. 2023,
    2211.01288). From the whole sentence down each span is split at the place where the independence of the two parts
    together is largest. `brackets` (level, sentence, pos), 1 where a span of a level ends and 0 elsewhere, are the true
    ones. `_se` are over sentences.

    - `structure`, 1: independence of the two parts at the best split less its mean over all splits, mean over spans of
      three tokens or more (the tree projection score). Null: 0 where nothing reads its context, and the untrained
      model, for a best one is above the mean by choice alone.
    - `structure_se`, 1: its standard error.
    - `f1`, share: of the brackets of that tree and the true ones (unlabelled, of two tokens or more, the whole sentence
      left out), mean over sentences. Null: `f1_random` and the two others; NaN without `brackets`.
    - `f1_se`, share: its standard error.
    - `f1_random`, share: that of trees with random splits.
    - `f1_left`, share: that of the tree that branches to the left, ((a b) c) d.
    - `f1_right`, share: that of the tree that branches to the right.

    In a model that predicts from the left, spans at the start of a sentence have no context but the start token, which
    favours left branches. Cost: for each sentence one pass for each of its tokens,
    and one. Raises DataError for shapes, InstrumentError for a model that sees later tokens or whose attention cannot
    be written.
    """

    tokens: Tensor
    lengths: Tensor
    brackets: Tensor | None = None
    start: int = 1
    layout: Layout | None = None
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "TreeStructure", shortest=3))
        for name, shape in (("lengths", self.tokens.shape[:1]), ("brackets", self.tokens.shape)):
            if (given := getattr(self, name)) is not None:
                given = torch.as_tensor(given).detach().to("cpu", torch.int64, copy=True).contiguous()
                if given.shape[-len(shape) :] != shape:
                    raise DataError(f"TreeStructure needs {name} over {tuple(shape)}, got {tuple(given.shape)}")
                object.__setattr__(self, name, given)
        if not self.start >= 0 or not bool(
            (self.lengths >= 3).all() and (self.lengths + self.start <= self.tokens.shape[1]).all()
        ):
            raise DataError(
                f"TreeStructure needs sentences of three tokens or more that lie in their rows of "
                f"{self.tokens.shape[1]} from place {self.start} on, got lengths {self.lengths.unique().tolist()}"
            )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        anatomy = Anatomy.of(snapshot, self.layout, "TreeStructure")
        anatomy.need_causal(self.tokens)
        found: dict[str, list[float]] = {"structure": [], "f1": []}
        for index in range(len(self.tokens)):
            scores = self._independence(anatomy, index)
            spans, gains = _tree(scores, _best)
            found["structure"].append(float(np.mean(gains)))
            found["f1"].append(_f1(spans, self._true[index]))

        rows, each = Rows(["structure", "f1"], "standard error over sentences"), np.ones(len(self.tokens))
        for name, label, unit, change in (
            ("structure", "independence of the best split above the mean split", "1", 0.01),
            ("f1", "brackets of the model's tree against the true ones", "share", 0.02),
        ):
            values = np.array(found[name])
            mean, se = clustered_mean(values, each)
            about = {"units": unit, "smallest_change": change, "replicates": clustered_groups(values, each)}
            rows.put(name, (), float(mean), float(se), label, **about)  # type: ignore[arg-type]
        for name, value in self._baselines.items():
            rows.put(name, (), value, None, f"the same of {name.removeprefix('f1_')} splits", units="share")
        return rows.dataset()

    def cost(self) -> Cost:
        passes = int(self.lengths.sum()) + len(self.tokens)
        return Cost(passes, positions=self.tokens.shape[1])

    @cached_property
    def _true(self) -> list[Spans | None]:
        """The true spans (first, last) of each sentence."""
        if self.brackets is None:
            return [None] * len(self.tokens)
        found = []
        for index, length in enumerate(self.lengths.tolist()):
            spans = set()
            for level in self.brackets[:, index, self.start : self.start + length]:
                ends = np.flatnonzero(level.numpy() == 1)
                spans |= set(zip(np.r_[0, ends[:-1] + 1].tolist(), ends.tolist(), strict=True)) if len(ends) else set()
            found.append(_counted(spans, length))
        return list(found)

    @cached_property
    def _baselines(self) -> dict[str, float]:
        splits: dict[str, Callable[[np.ndarray], int]] = {"left": lambda s: len(s) - 1, "right": lambda s: 0}
        values: dict[str, list[float]] = {"f1_random": [], "f1_left": [], "f1_right": []}
        for index, length in enumerate(self.lengths.tolist()):
            none = np.zeros((length, length))
            rng = np.random.default_rng(derive_seed(self.seed, "TreeStructure", "random", index))
            for name, split in splits.items():
                values[f"f1_{name}"].append(_f1(_tree(none, split)[0], self._true[index]))
            trees = [_tree(none, partial(_any, rng))[0] for _ in range(RANDOM)]
            values["f1_random"].append(float(np.mean([_f1(tree, self._true[index]) for tree in trees])))
        return {name: float(np.mean(each)) for name, each in values.items()}

    def _independence(self, anatomy: Anatomy, index: int) -> np.ndarray:
        """cos(v, v') of each span, (first, last); NaN where last is before first."""
        length, last = int(self.lengths[index]), ("resid_post", anatomy.layers - 1)
        tokens = self.tokens[index : index + 1, : self.start + length]
        plain = anatomy.run(tokens, [last])[1][last][0, self.start :].double().cpu()

        # no later token is read, so one pass from each first token on has the spans of all last ones
        alone = []
        for part in minibatches(length, self.batch_size):
            firsts = torch.arange(length)[part] + self.start
            batch = tokens.expand(len(firsts), -1)
            with anatomy.tapped([last], {"pattern": _from(firsts)}) as reads:
                anatomy.model(batch.to(next(anatomy.model.parameters()).device))
            alone.append(reads[last][:, self.start :].double().cpu())
        inner = torch.cat(alone)  # (first, pos, d)
        found = np.full((length, length), np.nan)
        for first in range(length):
            own, within = plain[first:].cumsum(0), inner[first, first:].cumsum(0)
            found[first, first:] = torch.cosine_similarity(own, within, dim=-1, eps=1e-30).numpy()
        return found


def _from(firsts: Tensor) -> Callable[[Tensor], Tensor]:
    """A write of patterns (batch, head, query, key): queries from `firsts` (batch,) on attend to keys from there on."""

    def write(pattern: Tensor) -> Tensor:
        place = torch.arange(pattern.shape[-1], device=pattern.device)
        first = firsts.to(pattern.device)[:, None, None, None]
        before = (place[:, None] >= first) & (place < first)
        kept = pattern.masked_fill(before, 0.0)
        total = kept.sum(-1, keepdim=True)
        itself = torch.eye(len(place), device=pattern.device, dtype=pattern.dtype).expand_as(kept)
        return torch.where(total > 0, kept / total.clamp_min(1e-38), itself)  # all weight was outside: on itself

    return write


def _any(rng: np.random.Generator, scores: np.ndarray) -> int:
    return int(rng.integers(len(scores)))


def _best(scores: np.ndarray) -> int:
    return int(scores.argmax())


def _tree(scores: np.ndarray, choose: Callable[[np.ndarray], int]) -> tuple[Spans, list[float]]:
    """The spans of the tree whose splits are chosen by their scores, and how far each is above the mean split."""
    spans, gains, waiting = set(), [], [(0, len(scores) - 1)]
    while waiting:
        first, last = waiting.pop()
        spans.add((first, last))
        if last == first:
            continue
        at = np.arange(first, last)
        both = scores[first, at] + scores[at + 1, last]
        split = choose(both)
        if last - first > 1:
            gains.append(float(both[split] - both.mean()))
        waiting += [(first, first + split), (first + split + 1, last)]
    return _counted(spans, len(scores)), gains


def _counted(spans: set[tuple[int, int]], length: int) -> Spans:
    """Those of two tokens or more that are not the whole."""
    return frozenset((first, last) for first, last in spans if 0 < last - first < length - 1)


def _f1(spans: Spans, true: Spans | None) -> float:
    if not true:
        return float("nan")
    return 2 * len(spans & true) / (len(spans) + len(true))
