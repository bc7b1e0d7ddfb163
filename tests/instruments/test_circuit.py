"""Circuits: one that is known, attribution that adds up, plain implementations of ranking and cutting, every family."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.analysis.derive.circuit import circuit_overlap
from devmon.anatomy.edges import Edges
from devmon.data.prompt_pairs import PromptPairs, broken_repeats
from devmon.errors import DataError, InstrumentError
from devmon.instruments.circuit import Circuit, _size
from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly, InstrumentContract, fixed_offset, induction
from tests.anatomy.test_anatomy_sites import VOCAB, family
from tests.anatomy.test_edges import CAUSAL
from tests.instruments.test_patching import Linear, telling
from tests.support.models import random_model


def snapshot(model: nn.Module) -> Snapshot:
    return Snapshot(0, model.eval())


def score_of(found: xr.Dataset, edges: Edges, sender: str, receiver: str) -> float:
    s, r = edges.place(sender, receiver)
    at = found["edge_id"].values.tolist().index(s * len(edges.receivers) + r)
    return float(found["score"][at])


def test_the_induction_circuit_is_found_and_is_all() -> None:
    """29 edges, of which three tell the clean from the corrupt prompt: F is 0 with two of them and 1 with three."""
    pairs = broken_repeats(40, prompts=12, bos=0)
    model = induction(40, 20)
    found = Circuit(pairs, steps=10, top=3, shares=(1 / 29, 2 / 29, 3 / 29, 10 / 29))(snapshot(model))
    assert found.attrs["edges"] == 29
    assert set(Edges(model).names(found["edge_id"].values.tolist())) == {
        "head 1.0 → logits",
        "embed → v 0.1",
        "head 0.1 → k 1.0",
    }
    np.testing.assert_allclose(found["faithfulness"], [0, 0, 1, 1, 1], atol=1e-9)
    np.testing.assert_allclose(found["area"], 1 - 2.5 / 29, atol=1e-9)
    np.testing.assert_allclose(found["distance"], 2.5 / 29, atol=1e-9)
    assert float(found["size"]) == pytest.approx(3 / 29)
    assert (float(found["signal"]), float(found["m_clean"])) == (pytest.approx(20.0), pytest.approx(20.0))
    assert float(found["area_random"]) < 0.6
    assert score_of(found, Edges(model), "head 1.0", "logits") == pytest.approx(20.0)


def test_the_size_is_where_the_faithfulness_stays_high() -> None:
    found = Circuit(telling(random_model(2), 40), shares=tuple(i / 20 for i in range(1, 21)))(snapshot(random_model(2)))
    curve = dict(zip(found["share"].values, found["faithfulness"].values, strict=True))
    assert curve[1.0] == pytest.approx(1.0)
    later = [share for share in curve if all(curve[other] >= 0.8 for other in curve if other >= share)]
    assert float(found["size"]) == min(later)
    assert _size((0.1, 0.2, 0.5, 1.0), np.array([0.9, 0.7, 0.8, 1.0])) == 0.5
    assert np.isnan(_size((0.5, 1.0), np.full(2, np.nan)))
    points = np.array([0.0, *curve]), np.array([0.0, *curve.values()])
    np.testing.assert_allclose(found["area"], np.trapezoid(points[1], points[0]))
    np.testing.assert_allclose(found["distance"], np.trapezoid(abs(1 - points[1]), points[0]))


@pytest.mark.parametrize("name", CAUSAL)
def test_every_family(name: str) -> None:
    model = family(name)
    pairs = telling(model, VOCAB, count=24)
    found = Circuit(pairs, steps=2, shares=(0.2,), random=1, top=4)(snapshot(model))
    assert float(found["faithfulness"][-1]) == 1.0
    assert float(found["faithfulness_se"][-1]) == pytest.approx(0.0, abs=1e-9)
    assert np.isfinite(found["area_se"])
    assert len(set(found["edge_id"].values.tolist())) == 4
    assert np.abs(found["score"].values).max() > 0.01


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "phi", "qwen2", "gemma2"])
def test_what_the_embedding_sends_adds_up_to_the_signal(name: str) -> None:
    """The slopes along the way from corrupt to clean embedding integrate to m(clean) - m(corrupt), over all edges."""
    model = family(name).double()
    pairs = telling(model, VOCAB, count=6)
    instrument, edges = Circuit(pairs, steps=32), Edges(model)
    total = float(instrument._scores(edges, 3).sum(0)[0].sum())
    (clean, _), (corrupt, _) = edges.sent(pairs.clean[:3]), edges.sent(pairs.corrupt[:3])
    rows = slice(0, 3)
    signal = float((instrument._difference(clean, rows) - instrument._difference(corrupt, rows)).mean())
    assert total == pytest.approx(signal, rel=0.02), (total, signal)


def test_scores_are_exact_where_all_is_linear() -> None:
    model = Linear()
    pairs = telling(model, 12)
    edges, instrument = Edges(model), Circuit(pairs, steps=1)
    score = instrument._scores(edges, 4).sum(0)
    _, corrupt = edges.sent(pairs.corrupt[:4])
    clean = instrument._difference(edges.sent(pairs.clean[:4])[0], slice(4))
    assert score.abs().max() > 0.1
    for s, r in edges.exists.nonzero().tolist():
        cut = torch.zeros_like(edges.exists)
        cut[s, r] = True
        effect = clean - instrument._difference(edges.cut(pairs.clean[:4], cut, corrupt), slice(4))
        np.testing.assert_allclose(score[s, r], effect.mean(), atol=1e-9)


def plain(model: AttentionOnly, tokens: Tensor, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and what each part sends, `inputs(receiver, sent so far)` making what a receiver reads."""
    sent = {"embed": model.embed(tokens) + model.positions[: tokens.shape[1]]}
    later = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    for layer, block in enumerate(model.blocks):
        new = {}
        for h in range(3):
            q, k, v = (inputs(f"{part} {layer}.{h}", sent) for part in "qkv")
            width = q.shape[-1]
            columns = slice(h * width, (h + 1) * width)
            scores = (q @ block.query.weight.T[:, columns] @ k.transpose(1, 2)).masked_fill(later, -torch.inf)
            new[f"head {layer}.{h}"] = scores.softmax(-1) @ v @ block.out.weight.T[columns]
        sent |= new
    return model.unembed(inputs("logits", sent)), sent


def difference(logits: Tensor, pairs: PromptPairs, rows: slice) -> Tensor:
    last, at = logits[:, -1], torch.arange(rows.stop - rows.start)
    return last[at, pairs.answer[rows]] - last[at, pairs.foil[rows]]


def test_the_ranking_against_a_plain_implementation() -> None:
    model = random_model(5)
    pairs = telling(model, 40)
    rows, steps = slice(0, 4), 3
    ends = {
        name: plain(model, tokens[rows], lambda receiver, sent: sum(sent.values()))[1]
        for name, tokens in (("clean", pairs.clean), ("corrupt", pairs.corrupt))
    }
    edges, found = Edges(model), {}
    for step in range(steps):
        alpha = (step + 0.5) / steps
        leaves: dict[str, Tensor] = {}

        def inputs(receiver: str, sent: dict[str, Tensor], alpha: float = alpha, leaves: Any = leaves) -> Tensor:
            start = (1 - alpha) * ends["corrupt"]["embed"] + alpha * ends["clean"]["embed"]
            leaves[receiver] = torch.zeros_like(start, requires_grad=True)
            return start + sum(value for name, value in sent.items() if name != "embed") + leaves[receiver]

        m = difference(plain(model, pairs.clean[rows], inputs)[0], pairs, rows).mean()
        slopes = dict(zip(leaves, torch.autograd.grad(m, list(leaves.values())), strict=True))
        for (sender, value), (receiver, slope) in itertools.product(ends["clean"].items(), slopes.items()):
            carried = ((value - ends["corrupt"][sender]) * slope).sum().item() / steps
            found[sender, receiver] = found.get((sender, receiver), 0.0) + carried
    score = Circuit(pairs, steps=steps)._scores(edges, 4).sum(0)
    assert score.abs().max() > 0.1
    for s, r in edges.exists.nonzero().tolist():
        np.testing.assert_allclose(score[s, r], found[edges.senders[s], edges.receivers[r]], atol=1e-9)
    assert float(score[~edges.exists].abs().max()) == 0.0
    for signed in (False, True):
        ranked = Circuit(pairs, steps=steps, top=20, signed=signed)(snapshot(model))
        best = (score if signed else score.abs()).flatten().argsort(descending=True)[:20]
        assert ranked["edge_id"].values.tolist() == best.tolist()
        np.testing.assert_allclose(ranked["score"], score.flatten()[best])
        assert signed == bool((ranked["score"] > 0).all())


def test_circuits_against_a_plain_implementation() -> None:
    """Each receiver sums the clean pass's own senders over kept edges and the corrupt prompt's over the others."""
    model = random_model(5)
    pairs = telling(model, 40)
    instrument, edges = Circuit(pairs, steps=3, shares=(0.1, 0.3, 0.6), top=100), Edges(model)
    found = instrument(snapshot(model))
    order, rows = found["edge_id"].values, slice(4, 8)
    order = order[order >= 0]
    n = int(edges.exists.sum())
    assert len(order) == n
    with torch.no_grad():
        every = lambda receiver, sent: sum(sent.values())  # noqa: E731
        clean, _ = plain(model, pairs.clean[rows], every)
        empty, corrupt = plain(model, pairs.corrupt[rows], every)
        ends = [difference(logits, pairs, rows).mean() for logits in (clean, empty)]
        for share, value in zip(found["share"].values, found["faithfulness"].values, strict=True):
            kept = {tuple(edges.names([int(e)])[0].split(" → ")) for e in order[: round(share * n)]}

            def mixed(receiver: str, sent: dict[str, Tensor], kept: Any = kept) -> Tensor:
                return sum(sent[s] if (s, receiver) in kept else corrupt[s] for s in sent)  # type: ignore[return-value]

            inside = difference(plain(model, pairs.clean[rows], mixed)[0], pairs, rows).mean()
            np.testing.assert_allclose(value, (inside - ends[1]) / (ends[0] - ends[1]), atol=1e-9)
            assert share == 1 or abs(value - 1) > 1e-3


def test_the_ranking_is_part_of_the_error_of_the_area() -> None:
    """Rankings without a group of prompts, by hand: their areas, less what the measuring prompts scatter."""
    model, generator = random_model(5), np.random.default_rng(0)
    instrument = Circuit(telling(model, 40), shares=(0.05, 0.2, 0.5))
    assert instrument._heavy == (0.05, 0.2, 0.5)
    np.testing.assert_allclose(instrument._weights, [0.1, 0.225, 0.4, 0.25])
    whole = 5 + generator.normal(size=40)
    own = generator.normal(size=(3, 40))
    shift = np.array([0.4, -0.2, 0.3, 0.1])
    others = own + shift[:, None, None] * whole  # the same for every prompt: no scatter
    area = shift * (0.1 + 0.225 + 0.4)
    moved = instrument._moved(others, own, whole)
    assert moved == pytest.approx(3 / 4 * ((area - area.mean()) ** 2).sum(), rel=1e-9)
    noise = own + 0.3 * generator.normal(size=(4, 3, 40))
    assert instrument._moved(noise, own, whole) < 0.1 * moved, "scatter of prompts is no ranking"
    found, given = instrument(snapshot(model)), Circuit(telling(model, 40), shares=(0.05, 0.2, 0.5))
    assert found.identical(given(snapshot(model)))


def test_no_signal_no_faithfulness() -> None:
    found = Circuit(broken_repeats(40, prompts=8), steps=1, shares=(0.5,))(snapshot(fixed_offset(40, 20, 7)))
    assert np.isnan([found[n] for n in ("area", "distance", "size", "area_random")]).all()
    assert np.isnan(found["faithfulness"]).all()
    assert "no faithfulness" in found.attrs["below_floor"]


def test_what_cannot_be_measured_is_told() -> None:
    pairs = broken_repeats(40, prompts=8)
    for wrong in ({"shares": (0.0, 0.5)}, {"shares": (2.0,)}, {"steps": 0}, {"random": 0}):
        with pytest.raises(DataError, match="Circuit needs"):
            Circuit(pairs, **wrong)
    with pytest.raises(DataError, match="6 pairs"):
        Circuit(broken_repeats(40, prompts=5))
    with pytest.raises(InstrumentError, match=r"^Circuit needs a residual stream that is the sum"):
        Circuit(pairs)(snapshot(family("bert")))


def test_the_cost_is_what_is_passed() -> None:
    model, passed = family("gpt2"), 0

    def count(module: nn.Module, args: tuple[Tensor]) -> None:
        nonlocal passed
        passed += args[0].numel()

    instrument = Circuit(telling(model, VOCAB), steps=2, shares=(0.1, 0.5), random=2)
    model.register_forward_pre_hook(count)
    instrument(snapshot(model))
    cost = instrument.cost()
    assert passed == cost.forwards * cost.positions
    assert cost.backwards == 2 * 4

    # without a signal there is nothing to be a share of, and no circuit is run
    pairs, turned = instrument.pairs, torch.arange(8) % 2 == 0
    answer, foil = (torch.where(turned, *each) for each in ((pairs.answer, pairs.foil), (pairs.foil, pairs.answer)))
    passed = 0
    found = replace(instrument, pairs=replace(pairs, answer=answer, foil=foil))(snapshot(model))
    assert np.isnan(found["faithfulness"]).all()
    assert np.isfinite(found["score"]).any()
    assert passed == (4 * (2 + 2) + 4 * 2) * cost.positions


def test_overlap_of_circuits_over_steps() -> None:
    numbers = np.array([[1, 2, 3, 4], [3, 2, 1, 9], [5, 6, 7, 8], [4, 3, 2, 1]])
    stored = xr.Dataset({"edge_id": (("step", "edge"), numbers)}, {"step": [0, 10, 20, 30]}, {"edges": 9})
    found = circuit_overlap(stored)
    np.testing.assert_allclose(np.diagonal(found["jaccard"]), 1)
    np.testing.assert_allclose(found["to_last"], [1, 3 / 5, 0, 1])
    np.testing.assert_allclose(found["to_next"], [3 / 5, 0, 0, np.nan])
    np.testing.assert_allclose(circuit_overlap(stored, 3)["jaccard"][0], [1, 1, 0, 2 / 4])
    sets = [set(one) for one in itertools.combinations(range(9), 4)]
    expected = np.mean([len(sets[0] & b) / len(sets[0] | b) for b in sets])
    assert float(found["chance"]) == pytest.approx(expected)
    assert np.isnan(circuit_overlap(stored.drop_attrs())["chance"])
    assert float(circuit_overlap(stored, 4, edges=9)["chance"]) == pytest.approx(expected)
    with pytest.raises(DataError, match="k must be 1 .. 4"):
        circuit_overlap(stored, 5)
    with pytest.raises(DataError, match="edge_id over"):
        circuit_overlap(stored.isel(step=0))
    few = stored.copy(data={"edge_id": np.where(numbers > 7, -1, numbers)})
    np.testing.assert_allclose(circuit_overlap(few)["jaccard"][0, 1], 3 / 4)


PAIRS = telling(random_model(0), 40)


class TestCircuit(InstrumentContract):
    def model(self, seed: int) -> nn.Module:
        return random_model(seed)

    def instrument(self) -> Circuit:
        return replace(Circuit(PAIRS, steps=2, random=1), shares=(0.1, 0.5))
