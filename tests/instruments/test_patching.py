"""Activation patching: circuits where the share is known, linear readouts, a plain implementation, every family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from devmon.anatomy import Anatomy
from devmon.anatomy.patching import logit_difference, run_patched, slopes
from devmon.anatomy.realism import Gauge
from devmon.cost import Shape
from devmon.data.prompt_pairs import PromptPairs, broken_repeats
from devmon.errors import DataError, InstrumentError
from devmon.instruments.patching import ActivationPatching
from devmon.monitoring.fingerprint import identity
from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly, InstrumentContract, fixed_offset, induction
from tests.anatomy.test_anatomy_sites import CONFIGS, MASKED, VISION, VOCAB, family
from tests.support.models import random_model

CAUSAL = [name for name in CONFIGS if name not in (*MASKED, *VISION)]


def snapshot(model: nn.Module) -> Snapshot:
    return Snapshot(0, model.eval())


def telling(model: nn.Module, vocab: int, count: int = 8, length: int = 9) -> PromptPairs:
    """Prompts that differ in one token, with the answer and foil that tell them apart best: there is a signal."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(3, vocab, (count, length), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 4] = (clean[:, 4] - 3 + 7) % (vocab - 3) + 3
    anatomy = Anatomy(model)
    with torch.no_grad():
        gap = anatomy.run(clean)[0][:, -1] - anatomy.run(corrupt)[0][:, -1]
    return PromptPairs(clean, corrupt, gap.argmax(-1), gap.argmin(-1))


def test_the_circuit_restores_and_breaks_all_and_the_rest_nothing() -> None:
    pairs = broken_repeats(40, prompts=8, bos=0)  # x_j of the first copy stands at place 5
    paths = ((0, 1, "k", 1, 0), (0, 0, "k", 1, 0), (0, 1, "q", 1, 0), (0, 1, "v", 1, 0))
    found = ActivationPatching(pairs, exact=100, paths=paths)(snapshot(induction(40, 20)))  # type: ignore[arg-type]
    for name in ("restored", "broken"):
        np.testing.assert_allclose(found[f"z_{name}"], [[0, 1], [1, 0]], atol=1e-9)
        expected = np.zeros((2, 14))
        expected[0, 5] = expected[1, 6] = 1  # the token itself, then what the previous-token head wrote a place later
        np.testing.assert_allclose(found[f"resid_{name}"], expected, atol=1e-9)
        np.testing.assert_allclose(found[f"z_{name}_se"], 0, atol=1e-9)
    assert float(found["signal"]) == pytest.approx(20.0)
    assert (float(found["clean"]), float(found["corrupt"])) == (pytest.approx(20.0), pytest.approx(0.0, abs=1e-9))
    np.testing.assert_allclose(found["path_restored"], [1, 0, 0, 0], atol=1e-9)
    assert found["path"].values.tolist()[0] == "0.1 → k 1.0"
    assert abs(float(found["z_restored_resample"][1, 0])) < 0.3, "another prompt's copy says nothing of this answer"
    # behind saturated attention the slope is nothing; what the last head adds is read linearly
    np.testing.assert_allclose(found["z_restored_attribution"], [[0, 0], [1, 0]], atol=1e-6)
    np.testing.assert_allclose([found["z_norm_ratio"][1, 0], found["z_quantile"][1, 0]], [1.0, 0.5], atol=1e-9)
    assert "mlp_restored" not in found
    # through the softmax: it is the keys of the last head that tell, and no slope of its scores would show it
    for part, expected in (("q", 0), ("k", 1), ("v", 0)):
        for name in ("restored", "broken"):
            np.testing.assert_allclose(found[f"{part}_{name}_attribution"], [[0, 0], [expected, 0]], atol=1e-6)


def test_what_looks_at_places_alone_leaves_no_signal() -> None:
    pairs = broken_repeats(40, prompts=8)
    found = ActivationPatching(pairs)(snapshot(fixed_offset(40, 20, 7)))  # copies the right token, in both prompts
    assert float(found["clean"]) == pytest.approx(float(found["corrupt"])) == pytest.approx(20.0)
    assert np.isnan(found["z_restored"]).all()
    assert np.isnan(found["resid_broken_attribution"]).all()
    assert "not above 3" in found.attrs["below_floor"]


class Linear(nn.Module):
    """One layer whose head takes its values from all places evenly: logits are linear in every site but the tokens."""

    def __new__(cls, vocab: int = 12, length: int = 9, width: int = 6) -> Any:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        even = torch.zeros(width, width, dtype=torch.float64)
        heads = [[(even, draw(width, width)) for _ in range(3)] for _ in range(2)]
        return AttentionOnly(draw(vocab, width), draw(length, width), heads, draw(width, vocab))


def test_attribution_is_exact_where_the_readout_is_linear() -> None:
    model = Linear()
    found = ActivationPatching(telling(model, 12), exact=100)(snapshot(model))
    for kind in ("z", "resid"):
        assert np.abs(found[f"{kind}_restored"]).max() > 0.1
        for name in ("restored", "broken"):
            np.testing.assert_allclose(found[f"{kind}_{name}_attribution"], found[f"{kind}_{name}"], atol=1e-9)
        np.testing.assert_allclose(found[f"{kind}_restored"], found[f"{kind}_broken"], atol=1e-9)
    np.testing.assert_allclose(found["resid_restored"].sum("pos"), [1, 1], atol=1e-9)


def test_against_a_plain_implementation() -> None:
    """Heads of layer 1 and the stream before it, patched by hand in two lines each."""
    model = random_model(2)
    pairs = telling(model, 40, count=24)
    other_way = torch.arange(24) == 5  # one prompt that tells against the rest
    answer, foil = pairs.answer, pairs.foil
    pairs = replace(pairs, answer=torch.where(other_way, foil, answer), foil=torch.where(other_way, answer, foil))
    found = ActivationPatching(pairs, exact=100)(snapshot(model))

    def after(state: Tensor, block: nn.Module) -> Tensor:
        """What each head of a block adds, (head, batch, pos, d)."""
        width, added = state.shape[-1], []
        for h in range(3):
            part = slice(h * width, (h + 1) * width)
            scores = state @ block.query.weight.T[:, part] @ state.transpose(1, 2)
            scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
            added.append(scores.softmax(-1) @ state @ block.out.weight.T[part])
        return torch.stack(added)

    def ld(state: Tensor) -> Tensor:
        last = model.unembed(state)[:, -1]
        return (last * (F.one_hot(pairs.answer, 40) - F.one_hot(pairs.foil, 40))).sum(-1)

    with torch.no_grad():
        states = [model.embed(tokens) + model.positions[:9] for tokens in (pairs.clean, pairs.corrupt)]
        middle = [state + after(state, model.blocks[0]).sum(0) for state in states]
        heads = [after(state, model.blocks[1]) for state in middle]
        ends = [ld(m + h.sum(0)) for m, h in zip(middle, heads, strict=True)]
        signal = (ends[0] - ends[1]).mean()
        np.testing.assert_allclose(found["signal"], signal)
        for h in range(3):
            for name, source, into, sign in (("restored", 0, 1, 1), ("broken", 1, 0, -1)):
                patched = heads[into].clone()
                patched[h] = heads[source][h]
                change = sign * (ld(middle[into] + patched.sum(0)) - ends[into])
                np.testing.assert_allclose(found[f"z_{name}"][1, h], change.mean() / signal, atol=1e-9)
                rest = change - change.mean() / signal * (ends[0] - ends[1])
                se = rest.std() / np.sqrt(24) / signal
                np.testing.assert_allclose(found[f"z_{name}_se"][1, h], se, atol=1e-9)
        for pos in range(9):
            mixed = middle[1].clone()
            mixed[:, pos] = middle[0].roll(1, 0)[:, pos]
            change = ld(mixed + after(mixed, model.blocks[1]).sum(0)) - ends[1]
            np.testing.assert_allclose(found["resid_restored_resample"][1, pos], change.mean() / signal, atol=1e-9)
        # queries, keys and values of the last layer, one at a time: the readout is linear from there on
        block, width = model.blocks[1], middle[0].shape[-1]
        for name, into, source, sign in (("restored", 1, 0, 1), ("broken", 0, 1, -1)):
            for h in range(3):
                part = slice(h * width, (h + 1) * width)
                own, other = middle[into], middle[source]
                for which, (q, k, v) in {
                    "q": (other, own, own),
                    "k": (own, other, own),
                    "v": (own, own, other),
                }.items():
                    scores = q @ block.query.weight.T[:, part] @ k.transpose(1, 2)
                    scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
                    added = scores.softmax(-1) @ v @ block.out.weight.T[part]
                    change = sign * (ld(middle[into] + heads[into].sum(0) - heads[into][h] + added) - ends[into])
                    guess = found[f"{which}_{name}_attribution"][1, h]
                    np.testing.assert_allclose(guess, change.mean() / signal, atol=1e-9)
    for name, into in (("restored", 1), ("broken", 0)):  # the slope where the patch goes in
        leaf = middle[into].clone().requires_grad_()
        (slope,) = torch.autograd.grad(ld(leaf + after(leaf, model.blocks[1]).sum(0)).sum(), [leaf])
        guess = ((middle[0] - middle[1]) * slope).sum(-1).mean(0) / signal
        np.testing.assert_allclose(found[f"resid_{name}_attribution"][1], guess, atol=1e-9)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_family(name: str) -> None:
    """The prompts differ at place 4 alone: the stream there is all that it takes, and nothing before or beside it."""
    model = family(name)
    pairs = telling(model, VOCAB)
    found = ActivationPatching(pairs, exact=4, paths=((0, 1, "v", 1, 0),))(snapshot(model))
    assert float(found["signal"]) > 3 * float(found["signal_se"]) > 0
    for share in ("resid_restored", "resid_broken"):
        assert float(found[share][0, 4]) == pytest.approx(1.0, abs=1e-4)
        beside = found[share][0].drop_sel(pos=4).values
        np.testing.assert_allclose(beside[np.isfinite(beside)], 0.0, atol=1e-4)
    assert int(np.isfinite(found["z_restored"]).sum()) == 4
    assert int(np.isfinite(found["mlp_restored"]).sum()) == 2
    for part in "zqkv":
        assert np.isfinite(found[f"{part}_restored_attribution"]).all()
    assert np.isfinite(found["path_restored"]).all()
    patched = [found[n].values for n in found if str(n).endswith("_quantile")]
    assert all(((v >= 0) & (v <= 1) | np.isnan(v)).all() for v in patched)

    anatomy = Anatomy(model)
    plain, reads = anatomy.run(pairs.clean, ["z", "resid_pre"])
    own, _ = run_patched(anatomy, pairs.clean, [(("z", 1), (slice(None), slice(None), 2), reads["z", 1])])
    torch.testing.assert_close(own, plain, rtol=0, atol=1e-5)
    every, _ = run_patched(anatomy, pairs.corrupt, [(("resid_pre", 0), (...,), reads["resid_pre", 0])])
    torch.testing.assert_close(every, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "phi"])
def test_slopes_are_total_ones(name: str) -> None:
    """A small step at a site of layer 0 changes what the later sites hold: the slope counts that."""
    model = family(name).double()
    pairs, anatomy = telling(model, VOCAB), Anatomy(model)
    sites = [("resid_pre", 0), ("z", 0), ("mlp_out", 0), ("resid_pre", 1)]
    found = slopes(anatomy, pairs.clean, pairs.answer, pairs.foil, sites)
    _, reads = anatomy.run(pairs.clean, sites)
    for site in sites:
        direction = torch.randn(reads[site].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        ends = [
            logit_difference(
                run_patched(anatomy, pairs.clean, [(site, (...,), reads[site] + step * direction)])[0],
                pairs.answer,
                pairs.foil,
            )
            for step in (1e-4, -1e-4)
        ]
        torch.testing.assert_close(
            (found[site] * direction).sum(), (ends[0] - ends[1]).sum() / 2e-4, rtol=1e-3, atol=1e-3
        )


def test_screening_keeps_the_sites_with_the_largest_attribution() -> None:
    model = random_model(2)
    pairs = telling(model, 40)
    every, few = (ActivationPatching(pairs, exact=exact)(snapshot(model)) for exact in (100, 2))
    kept = np.isfinite(few["z_restored"].values)
    size = np.maximum(abs(every["z_restored_attribution"]), abs(every["z_broken_attribution"])).values
    assert kept.sum() == 2
    assert size[kept].min() > size[~kept].max()
    np.testing.assert_allclose(few["z_restored"].values[kept], every["z_restored"].values[kept])
    fixed = ActivationPatching(pairs, exact=0, heads=((1, 2), (0, 0)))
    found = fixed(snapshot(model))
    assert np.argwhere(np.isfinite(found["z_restored"].values)).tolist() == [[0, 0], [1, 2]], (
        "those named, at every step"
    )
    np.testing.assert_allclose(found["z_restored"][1, 2], every["z_restored"][1, 2])
    with pytest.raises(InstrumentError, match=r"heads=\(\(2, 0\),\) are not all in the 2 layers of 3 heads"):
        replace(fixed, heads=((2, 0),))(snapshot(model))
    none = ActivationPatching(pairs, exact=0)
    assert "heads" not in identity(none)["fields"], "what runs hold without it goes on"
    none = none(snapshot(model))
    assert np.isnan(none["resid_restored"]).all()
    assert np.isfinite(none["resid_restored_attribution"]).all()


def test_the_gauge_tells_states_off_the_clean_distribution() -> None:
    generator = np.random.default_rng(0)
    scale = np.array([5.0, 1.0, 0.1, 1.0])
    states = torch.tensor(generator.normal(3.0, 1.0, (400, 4)) * scale)
    gauge = Gauge.fit(states[None])
    ratio, quantile = gauge(0, states)
    assert ratio == pytest.approx(1.0)
    assert quantile == pytest.approx(0.5)
    fresh = torch.tensor(generator.normal(3.0, 1.0, (4000, 4)) * scale)
    assert 0.42 < gauge(0, fresh)[1] < 0.58
    shifted = states + torch.tensor([0.0, 0.0, 0.5, 0.0])  # small in length, five deviations along a quiet direction
    assert gauge(0, shifted)[0] < 1.02
    assert gauge(0, shifted)[1] > 0.95
    assert gauge(0, 3 * states)[0] == pytest.approx(3.0)


def test_what_cannot_be_measured_is_told() -> None:
    pairs = broken_repeats(40, prompts=8)
    with pytest.raises(DataError, match="at least 6 pairs"):
        ActivationPatching(broken_repeats(40, prompts=5))
    with pytest.raises(DataError, match="needs paths"):
        ActivationPatching(pairs, paths=((0, 1, "z", 1, 0),))  # type: ignore[arg-type]
    with pytest.raises(InstrumentError, match="there is no edge 'head 1.1' → 'k 0.0'"):
        ActivationPatching(pairs, paths=((1, 1, "k", 0, 0),))(snapshot(random_model(0)))
    small = PromptPairs(pairs.clean % 3, pairs.corrupt % 3, pairs.answer * 0, pairs.foil * 0 + 99)
    with pytest.raises(InstrumentError, match="go up to 99, the model has 40 logits"):
        ActivationPatching(small)(snapshot(random_model(0)))
    with pytest.raises(InstrumentError, match=r"^ActivationPatching does not know where"):
        ActivationPatching(pairs)(snapshot(nn.Linear(2, 2)))


@pytest.mark.parametrize("told", [True, False])
def test_the_cost_is_what_is_passed_from_the_layers_of_the_sites_on(told: bool) -> None:
    """All sites of all layers, with a signal, and without one, where a share of it is asked of no pass."""
    model, passed = family("gpt2"), 0
    anatomy = Anatomy(model)

    def count(module: nn.Module, args: tuple[Tensor]) -> None:
        nonlocal passed
        passed += args[0].shape[0] * args[0].shape[1] if len(args[0]) > 1 else 0  # trials are of one prompt

    pairs = telling(model, VOCAB)
    if not told:
        turned = torch.arange(len(pairs.clean)) % 2 == 0
        answer, foil = (torch.where(turned, *each) for each in ((pairs.answer, pairs.foil), (pairs.foil, pairs.answer)))
        pairs = replace(pairs, answer=answer, foil=foil)
    for layer in range(anatomy.layers):
        anatomy.module(layer, "out").register_forward_pre_hook(count)
    instrument = ActivationPatching(pairs, exact=100, heads=((0, 0),))
    found = instrument(snapshot(model))
    assert np.isfinite(found["z_restored"]).all() == told
    assert np.isfinite(found["z_norm_ratio"]).all()
    shape = Shape(layers=anatomy.layers, heads=anatomy.heads, d_model=anatomy.d_model, weights=1)
    cost = instrument.cost(shape)
    whole = cost.forwards * cost.positions
    patched = cost.operations - 6 * shape.patterns(*pairs.clean.shape)
    assert passed == round(anatomy.layers * (whole + patched / (1 if told else 3)))


PAIRS = telling(random_model(0), 40)


class TestActivationPatching(InstrumentContract):
    def model(self, seed: int) -> nn.Module:
        return random_model(seed)

    def instrument(self) -> ActivationPatching:
        return ActivationPatching(PAIRS, exact=2, paths=((0, 1, "k", 1, 0),))
