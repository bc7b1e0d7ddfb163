"""Head ablation: what a group of attention heads does for the loss, beside matched random groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout, activations, next_token
from devmon.anatomy.patching import Starts, check_heads
from devmon.anatomy.sites import Site, Write
from devmon.cost import GPT2_SMALL, Cost, Shape
from devmon.data import ByContent, RepeatProbe, clustered_groups, clustered_mean, minibatches, probe_tokens
from devmon.data.repeats import OnRepeats
from devmon.data.rows import Rows
from devmon.data.shares import NO_SIGNAL, share, share_groups, signal
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot, derive_seed

Heads = tuple[tuple[int, int], ...]
NO_MATCH = "a layer has too few other heads for a matched random group"


@dataclass(frozen=True, eq=False)
class HeadAblation(ByContent, OnRepeats):
    """The loss and the repeat gain without a group of heads, minus the same without matched random groups of heads.

    Ablated is z, what a head writes before W_O, at every place: `how="resample"` puts there what the same head has in
    another sequence of the probe, at the same place (as in causal scrubbing, Chan et al. 2022); `how="mean"` its mean
    over the other sequences, at that place. Both stay near what the rest of the model is used to, which zeros do not.

    The group is `heads`, pairs (layer, head), or, without it, the heads whose prefix matching (`InductionHeads`) is at
    least `threshold`, or the best head where there are none, or the `top` best; one head of a layer is always left
    out. It is chosen anew on every snapshot: one half of the repeat probe (`devmon.data.repeats`) chooses, the other
    half measures. A matched random group has as many heads in each layer, none of them of the group, nor, where the
    instrument chooses, one whose prefix matching is at least `threshold`; `groups` of them are drawn without repetition
    by `seed`, or all are taken where there are no more. Where a layer has too few such heads there is no matched group,
    and all that compares with one is NaN.

    - `prefix_matching` (layer, head), attention: what chose the group, in [0, 1]; where the instrument chooses.
    - `in_group` (layer, head), 1: 1 for the heads of the group.
    - `size`, 1: the heads in the group.
    - `size_random`, 1: the heads in a random group, as many, or 0 where no group matches.
    - `matched` (layer, head), 1: 1 for the heads that random groups are drawn from.
    - `delta_loss`, nats per token: loss without the group - loss, on `tokens` (batch, pos) such as text, or on the
      probe. Null: `delta_loss_random`.
    - `delta_loss_se`, nats per token: its standard error over sequences.
    - `delta_loss_random`, nats per token: the same, mean over random groups.
    - `delta_loss_random_se`, nats per token: its standard error over sequences and over the draw of groups.
    - `excess_loss`, nats per token: delta_loss - delta_loss_random, 0 for heads like all others. Null: 0.
    - `excess_loss_se`, nats per token: its standard error over sequences and over the draw of groups.
    - `gain`, nats per token: the loss of the first copy minus that of the second (`RepeatGain`), with all heads.
    - `gain_se`, nats per token: its standard error over sequences.
    - `gain_lost`, nats per token: gain - gain without the group.
    - `gain_lost_se`, nats per token: its standard error over sequences.
    - `gain_share`, share: gain_lost / gain. 0: the repeats are predicted as well as before; 1: the second copy no
      better than the first; above 1, as resampling can do: worse, for the heads now copy from elsewhere. NaN where the
      gain is within 3 standard errors of 0. Null: `gain_share_random`.
    - `gain_share_se`, share: its standard error over sequences.
    - `gain_share_random`, share: the same, mean over random groups.
    - `gain_share_random_se`, share: its standard error over sequences and over the draw of groups.
    - `gain_share_by_group` (group), share: each of the random groups, NaN where there are fewer.

    A head whose loss others make up for (self-repair, McGrath et al. 2307.15771) shows less than it does. A group
    chosen by attention may hold heads that attend and do nothing. A group chosen by threshold grows with training:
    changes of `size` make steps in the rest; `top` or `heads` keep it fixed. Cost: a pass of the probe, and
    1 + `groups` of half of it from the lowest layer of the group on. Raises InstrumentError for heads that the model
    lacks, for a group that takes all heads of a layer, and for models without attention patterns or a known layout,
    DataError for settings that cannot be used.
    """

    heads: Heads | None = None
    threshold: float = 0.3
    top: int | None = None
    groups: int = 20
    how: Literal["resample", "mean"] = "resample"
    tokens: Tensor | None = None
    layout: Layout | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.how not in ("resample", "mean"):
            raise DataError(f'HeadAblation needs how="resample" or how="mean", got {self.how!r}')
        if min(self.groups, 1 if self.top is None else self.top) < 1 or self.sequences < 6:
            raise DataError(
                f"HeadAblation needs groups and top of at least 1 and 6 sequences, got {self.groups}, {self.top} and "
                f"{self.sequences}"
            )
        if self.heads is not None:
            heads = tuple(sorted({(int(layer), int(head)) for layer, head in self.heads}))
            if not heads:
                raise DataError("HeadAblation needs at least one pair (layer, head) in heads, or heads=None")
            object.__setattr__(self, "heads", heads)
        if self.tokens is not None:
            tokens = probe_tokens(self.tokens, "HeadAblation")
            if len(tokens) < 3:
                raise DataError(f"HeadAblation needs at least 3 sequences of tokens, got {len(tokens)}")
            object.__setattr__(self, "tokens", tokens)

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        """A pass of the half that chooses and one of the other, which starts at the first layer of the group for each
        ablation: in the middle, where the group is not known, and where random groups are as many as asked for."""
        half, layers = self.sequences // 2, shape.layers
        start = (layers - 1) / 2 if self.heads is None else self.heads[0][0]
        places = (self.sequences - half) * self.length + (0 if self.tokens is None else self.tokens.numel())
        runs = (1 + self.groups) * places
        return Cost(
            half * (self.heads is None) + math.ceil(places / self.length),
            positions=self.length,
            products=runs + places,
            softmaxes=runs + places,
            operations=(1 - start / layers) * runs * shape.weights,
        )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        who, probe, half = type(self).__name__, self._repeats, self.sequences // 2
        anatomy = Anatomy.of(snapshot, self.layout, who)
        anatomy.need_causal(self._repeats.tokens)
        result = Rows(headline=["gain_share", "excess_loss"], error="standard error", how=self.how)

        # the half that chooses the group does not measure it: the best of many heads is better by chance where it won
        group, found = self._group(result, anatomy, probe, slice(half))
        choices = self._choices(group, anatomy.heads, found)
        matched, possible = self._matched(choices)
        result.put("size", (), len(group), None, "heads in the group", units="1")
        result.put("size_random", (), len(group) if matched else 0, None, "heads in a random group", units="1")
        pool = np.zeros((anatomy.layers, anatomy.heads), np.int64)
        for layer, others, _ in choices:
            pool[layer, others] = 1
        result.put("matched", ("layer", "head"), pool, None, "1 for the heads of random groups", units="1", later=True)

        # the model as it is first, then without the group, then without each random group
        runs, measured = [(), group, *matched], slice(half, self.sequences)
        nats = self._losses(snapshot, probe.tokens[measured], runs)  # (run, batch, pos - 1)
        gains, counts = _gains(nats, probe, measured)
        if self.tokens is not None:
            nats = self._losses(snapshot, self.tokens, runs)
        _put_losses(result, nats, possible)
        self._put_gains(result, gains, counts, possible)
        return result.dataset(
            layer=np.arange(anatomy.layers), head=np.arange(anatomy.heads), group=np.arange(self.groups)
        )

    def _group(self, result: Rows, anatomy: Anatomy, probe: RepeatProbe, rows: slice) -> tuple[Heads, Heads]:
        """The heads to ablate, those given or those whose prefix matching on these sequences is highest, and all that
        reach the threshold, of which no random group is made."""
        dims = ("layer", "head")
        found: Heads = ()
        if self.heads is None:
            matching = prefix_matching(anatomy, probe, rows, self.batch_size)
            label = "attention to the place after the last match, on the choosing half"
            result.put("prefix_matching", dims, matching, None, label, units="attention")
            group = _highest(matching, self.threshold, self.top, anatomy.who)
            found = tuple((int(layer), int(head)) for layer, head in np.argwhere(matching >= self.threshold))
        else:
            group = self.heads
            check_heads(anatomy, group)
        chosen = np.zeros((anatomy.layers, anatomy.heads), np.int64)
        chosen[tuple(np.array(group).T)] = 1
        result.put("in_group", dims, chosen, None, "1 for the heads of the group", units="1")
        return group, found

    def _put_gains(self, result: Rows, gains: np.ndarray, counts: np.ndarray, possible: int) -> None:
        """From sums (run, sequence) of the repeat gain, and the tokens (sequence,) they are over."""
        whole, lost = gains[0], gains[0] - gains[1:]
        units = "nats per token"
        result.put("gain", (), *_mean(whole, counts), "repeat gain with all heads", units=units)
        result.put("gain_lost", (), *_mean(lost[0], counts), "repeat gain lost with the group", units=units)

        # shares of the gain; that of random groups also has the error of having drawn these groups and not others
        of_groups = np.array([share(each, whole)[0] for each in lost[1:]])
        mean = se = np.array(np.nan)
        if possible:
            mean, se = share(whole - gains[2:].mean(0), whole)
            se = np.sqrt(se**2 + _variance(of_groups, possible))
        label = "share of the gain that the group carries"
        own = share(lost[0], whole)
        about: dict[str, Any] = {"nan": NO_SIGNAL, "smallest_change": 0.1, "replicates": share_groups(lost[0], whole)}
        result.put("gain_share", (), *own, label, units="share", **about)
        label = "the same, mean over matched random groups"
        result.put("gain_share_random", (), mean, se, label, units="share", nan=f"{NO_SIGNAL}, or {NO_MATCH}")

        padded = np.full(self.groups, np.nan)
        padded[: len(of_groups)] = of_groups
        label = "share of the gain that a random group carries"
        fewer = f"{NO_SIGNAL}; NaN beyond the number of possible groups"
        result.put("gain_share_by_group", "group", padded, None, label, units="share", nan=fewer)
        if not signal(whole)[2]:
            result.attrs["below_floor"] = "the gain is within 3 standard errors of 0: no shares of it"

    def _choices(self, group: Heads, heads: int, found: Heads) -> list[tuple[int, list[int], int]]:
        """For each layer of the group: the heads that a random group may have there, and how many it has."""
        choices = []
        for layer in dict(group):
            own, rest = [h for at, h in group if at == layer], {h for at, h in found if at == layer}
            if len(own) == heads:
                raise InstrumentError(
                    f"HeadAblation: the group holds all {heads} heads of layer {layer}: leave some out to compare with"
                )
            choices.append((layer, [h for h in range(heads) if h not in {*own, *rest}], len(own)))
        return choices

    def _matched(self, choices: list[tuple[int, list[int], int]]) -> tuple[list[Heads], int]:
        """The random groups, and how many there could be."""
        possible = math.prod(math.comb(len(others), size) for _, others, size in choices)
        if not possible:
            return [], 0

        # all groups where there are no more than asked for, else different ones at random
        if possible <= self.groups:
            sets = itertools.product(*(itertools.combinations(others, size) for _, others, size in choices))
            return [
                tuple((layer, h) for (layer, _, _), hs in zip(choices, each, strict=True) for h in hs) for each in sets
            ], possible
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "HeadAblation", "groups"))
        drawn: dict[Heads, None] = {}
        while len(drawn) < self.groups:
            picks = [
                (layer, others[i])
                for layer, others, size in choices
                for i in sorted(torch.randperm(len(others), generator=generator)[:size].tolist())
            ]
            drawn[tuple(picks)] = None
        return list(drawn), possible

    def _losses(self, snapshot: Snapshot, tokens: Tensor, groups: Sequence[Heads]) -> np.ndarray:
        """Nats (group, batch, pos - 1) of the next token, with each group of heads ablated."""
        who = type(self).__name__
        layers = sorted({layer for group in groups for layer, _ in group})
        starts = Starts(anatomy := Anatomy.of(snapshot, self.layout, who), tokens)
        # before any head is swapped: the heads, and the streams that enter the first of their layers and leave the last
        end = ("resid_post", anatomy.layers - 1)
        sites: list[Site] = [*(("z", layer) for layer in layers), ("resid_pre", layers[0]), end]
        _, reads = activations(snapshot, tokens, sites, who, self.layout, self.batch_size)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "HeadAblation", "donors"))
        order = torch.randperm(len(tokens), generator=generator)
        donor = torch.empty_like(order)
        donor[order] = order.roll(1)  # one cycle through all sequences: none is its own donor
        stand_in = {}
        for layer in layers:
            z = reads["z", layer]
            stand_in[layer] = z[donor] if self.how == "resample" else (z.sum(0) - z) / (len(z) - 1)
        enters = {True: (layers[0], reads["resid_pre", layers[0]]), False: (anatomy.layers, reads[end])}
        return np.stack([self._run(starts, tokens, group, stand_in, *enters[bool(group)]) for group in groups])

    def _run(
        self, starts: Starts, tokens: Tensor, group: Heads, stand_in: dict[int, Tensor], start: int, state: Tensor
    ) -> np.ndarray:
        """Nats (batch, pos - 1), in passes from the layer `start` on, which `state` enters."""
        nats, anatomy = [], starts.anatomy
        for rows in minibatches(len(tokens), self.batch_size):
            write: dict[Site, Write] = {}
            for layer in {layer for layer, _ in group}:
                write["z", layer] = _swap(stand_in[layer][rows], [head for at, head in group if at == layer])
            with starts.at(start, state[rows]), anatomy.tapped([], write):
                nats.append(next_token(anatomy.model, tokens[rows], anatomy.who, check=False)[0])
        return torch.cat(nats).numpy()


def prefix_matching(anatomy: Anatomy, probe: RepeatProbe, rows: slice, batch_size: int) -> np.ndarray:
    """Mean attention (layer, head) from the queries of these sequences to the place after the last match."""
    total: Tensor | float = 0.0
    start, stop, _ = rows.indices(len(probe.tokens))
    for part in minibatches(stop - start, batch_size):
        here = slice(start + part.start, start + part.stop)
        _, reads = anatomy.run(probe.tokens[here], ["pattern"])
        query, period = probe.query[here], probe.period[here]
        ahead = (torch.arange(query.shape[1]) - period[:, None]).clamp(min=0) + 1  # (batch, q)
        for_all = ahead[:, None, :, None].expand(-1, anatomy.heads, -1, 1)
        seen = [reads["pattern", layer].cpu().double().gather(-1, for_all)[..., 0] for layer in range(anatomy.layers)]
        total = total + torch.stack([(weight * query[:, None]).sum((0, 2)) for weight in seen])
    assert isinstance(total, Tensor)
    return (total / probe.query[rows].sum()).numpy()


def _highest(score: np.ndarray, threshold: float, top: int | None, who: str) -> Heads:
    """The heads with the highest scores, all but one of a layer at most."""
    layers, heads = score.shape
    if (1 if top is None else top) > layers * (heads - 1):
        raise InstrumentError(
            f"{who} leaves a head in every layer to compare with: this model of {layers} layers of {heads} heads "
            f"allows top <= {layers * (heads - 1)}, got {top or 1}"
        )
    chosen: list[tuple[int, int]] = []
    for index in np.argsort(-score.ravel(), kind="stable"):
        layer, head = divmod(int(index), heads)
        wanted = len(chosen) < top if top is not None else not chosen or score[layer, head] >= threshold
        if wanted and sum(at == layer for at, _ in chosen) < heads - 1:
            chosen.append((layer, head))
    return tuple(sorted(chosen))


def _swap(other: Tensor, heads: list[int]) -> Callable[[Tensor], Tensor]:
    def write(value: Tensor) -> Tensor:
        new = value.clone()
        new[:, :, heads] = other[:, :, heads].to(value)
        return new

    return write


def _gains(nats: np.ndarray, probe: RepeatProbe, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Sums (run, sequence) of loss in the first copy minus loss in the second, and the tokens they are over."""
    query, copy, period = probe.query[rows], probe.copy[rows], probe.period[rows]
    counted = (query[:, :-1] & (copy[:, 1:] == 1)).numpy()
    before = (torch.arange(nats.shape[2]) - period[:, None]).clamp(min=0).numpy()
    first = np.take_along_axis(nats, np.broadcast_to(before, nats.shape), axis=2)
    return ((first - nats) * counted).sum(2), counted.sum(1)


def _put_losses(result: Rows, nats: np.ndarray, possible: int) -> None:
    """From nats (run, batch, pos - 1): as it is, without the group, without each random group out of `possible`."""
    losses, tokens = nats.sum(2), np.full(nats.shape[1], nats.shape[2])
    own, random = losses[1] - losses[0], np.full(len(tokens), np.nan)
    if possible:
        random = (losses[2:] - losses[0]).mean(0)
    of_draw = _variance((losses[2:] - losses[0]).sum(1) / tokens.sum(), possible)
    units, label = "nats per token", "loss without the group minus loss"
    result.put("delta_loss", (), *_mean(own, tokens), label, units=units)
    random_mean, label = _mean(random, tokens, of_draw), "the same, mean over matched random groups"
    result.put("delta_loss_random", (), *random_mean, label, units=units, nan=f"NaN where {NO_MATCH}")
    excess, label = _mean(own - random, tokens, of_draw), "loss without the group minus loss without a random group"
    groups = clustered_groups(own - random, tokens)
    result.put(
        "excess_loss",
        (),
        *excess,
        label,
        units=units,
        smallest_change=0.05,
        replicates=groups,
        nan=f"NaN where {NO_MATCH}",
    )


def _variance(each: np.ndarray, possible: int) -> float:
    """Variance of the mean over groups drawn without repetition out of all possible ones, from the draw alone."""
    return float(each.var(ddof=1)) / len(each) * (1 - len(each) / possible) if len(each) > 1 else 0.0


def _mean(total: np.ndarray, count: np.ndarray, more: float = 0.0) -> tuple[float, float]:
    mean, se = clustered_mean(total, count)
    return float(mean), float(np.sqrt(se**2 + more))
