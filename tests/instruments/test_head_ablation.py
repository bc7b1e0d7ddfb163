"""Head ablation: circuits where the share is known, a plain implementation, the matched groups, every family."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from devmon.anatomy import Anatomy
from devmon.cost import Shape
from devmon.data import random_tokens, repeats
from devmon.data.shares import share, signal
from devmon.errors import DataError, InstrumentError
from devmon.instruments.head_ablation import HeadAblation, _variance
from devmon.snapshot import Snapshot, derive_seed
from devmon.testing import AttentionOnly, InstrumentContract, even, induction
from tests.anatomy.test_anatomy_sites import CONFIGS, MASKED, VISION, family
from tests.support.models import random_model

VOCAB, LENGTH = 40, 41
CAUSAL = [name for name in CONFIGS if name not in (*MASKED, *VISION)]


def snapshot(model: nn.Module) -> Snapshot:
    return Snapshot(0, model.eval())


def gain(logits: Tensor, probe: object, rows: slice) -> Tensor:
    """Σ over counted tokens of nats in the first copy minus nats in the second, (sequence,), token by token."""
    tokens, period, query = (getattr(probe, name)[rows] for name in ("tokens", "period", "query"))
    copy = probe.copy[rows]  # type: ignore[attr-defined]
    chances, sums = logits.log_softmax(-1), []
    for b in range(len(tokens)):
        p, total = int(period[b]), 0.0
        for q in range(tokens.shape[1] - 1):
            if query[b, q] and copy[b, q + 1] == 1:
                total += float(chances[b, q, tokens[b, q + 1]] - chances[b, q - p, tokens[b, q + 1]])
        sums.append(total)
    return torch.tensor(sums, dtype=torch.float64)


def test_the_induction_circuit_carries_all_of_the_gain_and_the_idle_heads_none() -> None:
    """Only head (1, 0) writes logits, so that without it they are its donor's, or the mean of the others."""
    model, probe, half = induction(VOCAB, LENGTH, confidence=8.0), repeats(VOCAB, 12, LENGTH, 0, 0), slice(6, 12)
    with torch.no_grad():
        logits = model(probe.tokens[half])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(derive_seed(0, "HeadAblation", "donors")))
    donor = torch.empty_like(order)
    donor[order] = order.roll(1)
    whole = gain(logits, probe, half).sum()
    for how, instead in (("resample", logits[donor]), ("mean", (logits.sum(0) - logits) / 5)):
        instrument = HeadAblation(VOCAB, 12, LENGTH, bos=0, heads=((0, 1), (1, 0)), how=how)  # type: ignore[arg-type]
        found = instrument(snapshot(model))
        np.testing.assert_allclose(found["gain_share"], 1 - gain(instead, probe, half).sum() / whole, rtol=1e-8)
        assert float(found["gain_share"]) > 0.95, (how, float(found["gain_share"]))
        np.testing.assert_allclose([found["gain_share_random"], found["delta_loss_random"]], 0.0, atol=1e-9)
        assert float(found["excess_loss"]) == pytest.approx(float(found["delta_loss"]), abs=1e-9)
        assert float(found["excess_loss"]) > 3 * float(found["excess_loss_se"]) > 0
        idle = replace(instrument, heads=((0, 0), (1, 1)))(snapshot(model))
        np.testing.assert_allclose([idle["gain_share"], idle["delta_loss"]], 0.0, atol=1e-9)
        assert float(idle["gain_share_random"]) == pytest.approx(float(found["gain_share"]))


def test_the_instrument_finds_the_induction_head_on_one_half_and_measures_on_the_other() -> None:
    found = HeadAblation(VOCAB, 16, LENGTH, bos=0)(snapshot(induction(VOCAB, LENGTH)))
    assert found["in_group"].values.tolist() == [[0, 0], [1, 0]]
    assert float(found["prefix_matching"][1, 0]) == pytest.approx(1.0, abs=1e-9)
    assert float(found["gain_share"]) > 0.95
    assert abs(float(found["gain_share_random"])) < 1e-9
    assert (int(found["size"]), int(found["size_random"])) == (1, 1)
    two = HeadAblation(VOCAB, 16, LENGTH, bos=0, top=2)(snapshot(induction(VOCAB, LENGTH)))
    assert two["in_group"].values.sum(1).tolist() == [1, 1], "one head of a layer is left to compare with"


def plain(model: AttentionOnly, tokens: Tensor, heads: set[tuple[int, int]], donor: Tensor | None) -> Tensor:
    """Logits with a loop over heads; those in `heads` write what they write for the donor, or the others' mean."""

    def writes(block: nn.Module, state: Tensor, head: int) -> Tensor:
        width, n = state.shape[-1], block.heads
        query = block.query.weight.T[:, head * width : (head + 1) * width]
        out = block.out.weight.T[head * width : (head + 1) * width]
        scores = state @ query @ state.transpose(1, 2)
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        assert n == 3
        return scores.masked_fill(later, -math.inf).softmax(-1) @ state @ out

    def start() -> Tensor:
        return model.embed(tokens) + model.positions[: tokens.shape[1]]

    with torch.no_grad():
        state, untouched = start(), start()
        for layer, block in enumerate(model.blocks):
            added, clean = torch.zeros_like(state), torch.zeros_like(state)
            for head in range(3):
                usual = writes(block, untouched, head)
                clean += usual
                if (layer, head) in heads:
                    added += (usual.sum(0) - usual) / (len(usual) - 1) if donor is None else usual[donor]
                else:
                    added += writes(block, state, head)
            state, untouched = state + added, untouched + clean
        return model.unembed(state)


@pytest.mark.parametrize("how", ["resample", "mean"])
def test_against_a_plain_implementation(how: str) -> None:
    model, probe = random_model(4), repeats(VOCAB, 12, 32, 2)
    group = ((0, 1), (1, 0))
    found = HeadAblation(VOCAB, 12, 32, seed=2, heads=group, how=how)(snapshot(model))  # type: ignore[arg-type]
    half = slice(6, 12)
    tokens = probe.tokens[half]
    order = torch.randperm(6, generator=torch.Generator().manual_seed(derive_seed(2, "HeadAblation", "donors")))
    donor = torch.empty_like(order)
    donor[order] = order.roll(1)

    def nats(heads: set[tuple[int, int]]) -> Tensor:
        scores = plain(model, tokens, heads, donor if how == "resample" else None)[:, :-1]
        return F.cross_entropy(scores.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)

    np.testing.assert_allclose(nats(set()), -_chances(model(tokens), tokens).mean(1).detach())
    own = (nats(set(group)) - nats(set())).numpy()
    others = [{(0, a), (1, b)} for a, b in itertools.product((0, 2), (1, 2))]
    random = np.mean([(nats(one) - nats(set())).numpy() for one in others], axis=0)
    np.testing.assert_allclose(found["delta_loss"], own.mean(), rtol=1e-9)
    np.testing.assert_allclose(found["delta_loss_random"], random.mean(), rtol=1e-9)
    np.testing.assert_allclose(found["excess_loss"], (own - random).mean(), rtol=1e-9)
    se = (own - random).std(ddof=1) / math.sqrt(6)  # all four groups are taken: no error of the draw
    np.testing.assert_allclose(found["excess_loss_se"], se, rtol=1e-9)
    each = [
        gain(plain(model, tokens, one, donor if how == "resample" else None), probe, half) for one in (set(), *others)
    ]
    assert int(np.isfinite(found["gain_share_by_group"]).sum()) in (0, 4)
    np.testing.assert_allclose(
        found["gain"], each[0].sum() / (probe.query[half, :-1] & (probe.copy[half, 1:] == 1)).sum()
    )


def _chances(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]


def test_the_loss_is_that_of_the_given_text() -> None:
    model, text = random_model(1), random_tokens(VOCAB, 5, 20, 3)
    found = HeadAblation(VOCAB, 8, 32, heads=((1, 1),), how="mean", tokens=text)(snapshot(model))
    usual, without = (-_chances(plain(model, text, heads, None), text).mean() for heads in (set(), {(1, 1)}))
    np.testing.assert_allclose(found["delta_loss"], without - usual, rtol=1e-9)


def test_matched_groups_are_distinct_and_of_the_same_layers_and_sizes() -> None:
    instrument = HeadAblation(VOCAB, groups=20)
    group = ((0, 2), (2, 0), (2, 5))

    def matched(group: Any, heads: int, found: Any = (), of: HeadAblation = instrument) -> Any:
        return of._matched(of._choices(group, heads, found))

    drawn, possible = matched(group, 8)
    assert possible == 7 * math.comb(6, 2)
    assert len(set(drawn)) == len(drawn) == 20
    for one in drawn:
        assert sorted(layer for layer, _ in one) == [0, 2, 2]
        assert len(set(one)) == 3
        assert not set(one) & set(group)
    assert matched(group, 8, of=replace(instrument, seed=1))[0] != drawn
    every, possible = matched(((1, 0), (1, 1)), 5)
    assert (sorted(every), possible) == ([((1, 2), (1, 3)), ((1, 2), (1, 4)), ((1, 3), (1, 4))], 3)
    assert matched(((1, 0), (1, 1), (1, 2)), 4) == ([], 0), "one head is no match for three"
    kept, possible = matched(((1, 0),), 5, found=((1, 0), (1, 2), (0, 3)))
    assert (sorted(kept), possible) == ([((1, 1),), ((1, 3),), ((1, 4),)], 3), "no head that was found is in a null"


def test_no_null_of_induction_heads() -> None:
    """With all heads above the threshold nothing is left to match the group with: the null is NaN and says why."""
    model = snapshot(random_model(4))
    found = HeadAblation(VOCAB, 8, 32, threshold=0.0, top=1)(model)
    assert (int(found["size"]), int(found["size_random"]), int(found["matched"].sum())) == (1, 0, 0)
    for name in ("delta_loss_random", "excess_loss", "gain_share_random"):
        assert np.isnan(found[name])
        assert "too few other heads" in found[name].attrs["nan"]
    assert np.isfinite(found["delta_loss"])
    usual = HeadAblation(VOCAB, 8, 32, top=1)(model)
    layer = usual["in_group"].values.sum(1).argmax()
    assert usual["matched"].values.tolist() == [
        [0, 0, 0] if at != layer else list(1 - usual["in_group"].values[at]) for at in (0, 1)
    ]


def test_the_error_of_the_draw_is_that_of_the_mean_over_groups() -> None:
    """Over all ways to draw 3 of 7 groups, it is on average the variance of the mean; nothing where all are drawn."""
    values = np.random.default_rng(0).normal(5.0, 2.0, 7)
    draws = [np.array(each) for each in itertools.combinations(values, 3)]
    variances = [_variance(each, 7) for each in draws]
    np.testing.assert_allclose(np.mean(variances), np.var([each.mean() for each in draws]), rtol=1e-10)
    assert _variance(values, 7) == 0.0
    assert _variance(values[:1], 1) == 0.0


def test_no_gain_no_share() -> None:
    found = HeadAblation(VOCAB, 8, LENGTH)(snapshot(even(VOCAB, LENGTH)))
    assert np.isnan([found["gain_share"], found["gain_share_random"]]).all()
    assert "within 3 standard errors" in found.attrs["below_floor"]
    assert (float(found["delta_loss"]), float(found["gain"])) == (0.0, 0.0)


def test_shares_and_their_error() -> None:
    generator = np.random.default_rng(0)
    whole = generator.normal(2.0, 1.0, (4000, 25))
    part = 0.7 * whole + generator.normal(0, 0.5, whole.shape)
    ratios, errors = map(np.array, zip(*(share(p, w) for p, w in zip(part, whole, strict=True)), strict=True))
    there = np.isfinite(ratios)
    assert there.mean() > 0.99
    assert abs(ratios[there].mean() - 0.7) < 0.01
    assert 0.9 < np.sqrt((errors[there] ** 2).mean()) / ratios[there].std() < 1.1
    assert not signal(np.array([1.0]))[2]
    assert not signal(-whole[0])[2]
    assert np.isnan(share(part[0], generator.normal(0, 1, 25))[0])
    assert signal(np.full(3, 0.5)) == (0.5, 0.0, True)


def test_what_cannot_be_measured_is_told() -> None:
    model = snapshot(random_model(0))
    with pytest.raises(InstrumentError, match=r"holds all 3 heads of layer 1: leave some out"):
        HeadAblation(VOCAB, 8, 32, heads=((1, 0), (1, 1), (1, 2)))(model)
    with pytest.raises(InstrumentError, match=r"are not all in the 2 layers of 3 heads"):
        HeadAblation(VOCAB, 8, 32, heads=((2, 0),))(model)
    with pytest.raises(InstrumentError, match=r"allows top <= 4, got 5"):
        HeadAblation(VOCAB, 8, 32, top=5)(model)
    with pytest.raises(InstrumentError, match=r"^HeadAblation does not know where the parts"):
        HeadAblation(VOCAB, 8, 32)(snapshot(nn.Linear(2, 2)))
    for wrong in (
        {"how": "zero"},
        {"groups": 0},
        {"sequences": 5},
        {"heads": ()},
        {"tokens": torch.zeros(2, 5).long()},
    ):
        with pytest.raises(DataError, match="^HeadAblation needs"):
            HeadAblation(VOCAB, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CAUSAL)
def test_every_family(name: str) -> None:
    found = HeadAblation(23, 6, 16, heads=((0, 1), (1, 2)), groups=2)(snapshot(family(name)))
    assert abs(float(found["delta_loss"])) > 1e-3
    assert np.isfinite(found["excess_loss_se"])
    chosen = HeadAblation(23, 6, 16, groups=1)(snapshot(family(name)))
    assert int(chosen["in_group"].sum()) >= 1


@pytest.mark.parametrize("layer", [0, 1])
def test_the_cost_is_what_is_passed_from_the_layer_of_the_group_on(layer: int) -> None:
    model, passed = random_model(0), 0
    anatomy = Anatomy(model)

    def count(module: nn.Module, args: tuple[Tensor]) -> None:
        nonlocal passed
        passed += args[0].shape[0] * args[0].shape[1] if len(args[0]) > 1 else 0  # trials are of one sequence

    for each in range(anatomy.layers):
        anatomy.module(each, "out").register_forward_pre_hook(count)
    for instrument in (
        HeadAblation(VOCAB, 8, 32, groups=2, heads=((layer, 0),)),
        HeadAblation(VOCAB, 8, 32, groups=2, heads=((layer, 0),), tokens=random_tokens(VOCAB, 4, 32)),
    ):
        passed = 0
        instrument(snapshot(model))
        cost = instrument.cost(Shape(layers=anatomy.layers, weights=1))
        assert passed == anatomy.layers * (cost.work + cost.operations)


class TestHeadAblation(InstrumentContract):
    def model(self, seed: int) -> nn.Module:
        return random_model(seed)

    def instrument(self) -> HeadAblation:
        return HeadAblation(VOCAB, sequences=8, length=32, groups=3, tokens=random_tokens(VOCAB, 4, 16))
