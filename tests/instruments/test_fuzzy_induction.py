"""Fuzzy, abstract and hierarchical induction: hand-built circuits, slow references, controls, families, contracts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from devmon.anatomy import attention_patterns
from devmon.data import clustered_mean
from devmon.data.matches import categorised, mapped, nearest_tokens, nested
from devmon.errors import DataError, InstrumentError
from devmon.instruments.fuzzy_induction import AbstractInduction, FuzzyInduction, HierarchicalInduction
from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly, Bigram, InstrumentContract, even, fixed_offset, induction
from devmon.testing.handbuilt_tasks import BracketReader, relational_induction
from tests.anatomy.test_anatomy_sites import CONFIGS, MASKED, VISION, family

VOCAB, LENGTH = 41, 25
CAUSAL = [name for name in CONFIGS if name not in (*MASKED, *VISION)]
MAP = torch.tensor([0, *range(21, 41), *range(1, 21)])  # t and t + 20 are each other's image
CATEGORY = torch.tensor([-1, *(t % 13 for t in range(39)), -1])  # 13 categories of three tokens
OPENING, CLOSING = (3, 4, 5), (7, 8, 9)
FUZZY = FuzzyInduction(MAP, sequences=24, length=LENGTH, bos=0)
ABSTRACT = AbstractInduction(CATEGORY, sequences=24, length=LENGTH, bos=0)
NESTED = HierarchicalInduction(OPENING, CLOSING, sequences=24, length=LENGTH, bos=0)
ALL = [FUZZY, ABSTRACT, NESTED]


def measure(instrument: Any, model: nn.Module) -> Any:
    return instrument(Snapshot(0, model.eval()))


def random_model(seed: int, vocab: int = VOCAB, length: int = LENGTH, width: int = 12) -> AttentionOnly:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5

    heads = [[(draw(width, width), draw(width, width)) for _ in range(3)] for _ in range(2)]
    return AttentionOnly(draw(vocab, width), draw(length, width), heads, draw(width, vocab))


def one_hot_map(confidence: float = 1.0) -> Tensor:
    return confidence * torch.eye(VOCAB, dtype=torch.float64)[MAP]


# --- the probes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [None, 0])
def test_mapped_and_categorised_probes_against_their_definition(bos: int | None) -> None:
    start = 0 if bos is None else 1
    fuzzy, abstract = mapped(MAP, 30, LENGTH, 3, bos, (5,)), categorised(CATEGORY, 30, LENGTH, 3, bos, (5,))
    for probe, relation in ((fuzzy, MAP), (abstract, CATEGORY)):
        periods = set()
        image = relation.tolist()
        for row, query, target, other, right, wrong in zip(
            *(getattr(probe, n).tolist() for n in ("row", "query", "target", "other", "right", "wrong")), strict=True
        ):
            line = probe.tokens[row].tolist()
            p = query - target + 1
            periods.add(p)
            both = line[start : start + 2 * p]
            assert len(set(both)) == 2 * p, "no token stands twice"
            assert not {5, bos} & set(both)
            i = query - start - p
            assert 0 <= i <= p - 3
            if probe is fuzzy:
                assert line[query] == image[line[target - 1]]
                assert right == line[query + 1] == image[line[target]]
                assert [t for t in both if image[t] == line[query]] == [line[target - 1]]
            else:
                kinds = [image[t] for t in both[:p]]
                assert len(set(kinds)) == p
                assert kinds == [image[t] for t in both[p:]]
                assert right == image[line[query + 1]] == image[line[target]]
            assert [o for o in other if o >= 0] == [j for j in range(start, start + p) if j not in (target - 1, target)]
            assert [w for w in wrong if w >= 0] == [
                int(probe.classes[line[j]]) for j in range(query + 2, start + 2 * p)
            ]
        assert periods == set(range(6, 13)), periods


@pytest.mark.parametrize("first, last", [(20, 40), (40, 20)])
def test_a_map_whose_images_have_images_leaves_one_match(first: int, last: int) -> None:
    """f takes 20 … 39 to 40 … 59, which are images of other tokens as well."""
    parts = [range(first, first + 20), range(40, 60), [-1] * 20, range(last, last + 20)]
    chain = torch.tensor([image for part in parts for image in part])
    probe = mapped(chain, 40, 24, 0)
    for row, query, target in zip(probe.row.tolist(), probe.query.tolist(), probe.target.tolist(), strict=True):
        line = probe.tokens[row].tolist()
        matches = [j for j in range(query) if chain[line[j]] == line[query]]
        assert matches == [target - 1]


def test_nested_probe_against_its_definition() -> None:
    probe = nested(OPENING, CLOSING, 10, 40, 26, 1)
    found = set()
    for row, query, target, other, right in zip(
        *(getattr(probe, n).tolist() for n in ("row", "query", "target", "other", "right")), strict=True
    ):
        line = probe.tokens[row].tolist()
        assert line[query] in CLOSING
        assert line[query + 1] in CLOSING
        stack: list[int] = []
        for place, token in enumerate(line[: query + 1]):
            if token in OPENING:
                stack.append(place)
            else:
                assert CLOSING[OPENING.index(line[stack.pop()])] == token
        assert stack[-1] == target
        assert line[query + 1] == CLOSING[right] == CLOSING[OPENING.index(line[target])]
        openers = [place for place in range(query) if line[place] in OPENING]
        assert [o for o in other if o >= 0] == [o for o in openers if o != target]
        assert openers[-1] != target
        found.add((row, query))
    for row, line in enumerate(probe.tokens.tolist()):
        assert sum(1 if t in OPENING else -1 for t in line) == 0
        twice = [q for q in range(25) if line[q] in CLOSING and line[q + 1] in CLOSING]
        assert {(row, q) for q in twice} == {pair for pair in found if pair[0] == row}


def test_nearest_tokens_are_the_nearest() -> None:
    table = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    for token, other in enumerate(nearest_tokens(table, chunk=7).tolist()):
        cosines = [
            -2.0 if i == token else float(torch.cosine_similarity(table[token], table[i], dim=0)) for i in range(30)
        ]
        assert other == int(np.argmax(cosines))


# --- circuits with known answers ----------------------------------------------------------------------------------


def test_the_fuzzy_circuit_in_closed_form() -> None:
    model = relational_induction(one_hot_map().T, one_hot_map(8.0), LENGTH)
    found = measure(FUZZY, model)
    np.testing.assert_allclose(found["matching"][1, 0], 1.0, rtol=1e-9)
    np.testing.assert_allclose(found["gain"], 8.0, rtol=1e-9)
    np.testing.assert_allclose(found["nll"], math.log1p((VOCAB - 1) * math.exp(-8.0)), rtol=1e-9)
    assert np.isnan(found["ratio"][1, 0]), "its control gets nothing"
    assert "less than 1e-06" in found["ratio"].attrs["nan"]
    np.testing.assert_allclose(found["ratio"].values.ravel()[[0, 3]], 1.0, rtol=1e-9)
    assert float(found["fixed_offset"][1, 0]) < 0.5
    assert float(found["offset_share"]) < 0.4


def test_the_abstract_circuit_in_closed_form() -> None:
    same = (CATEGORY[:, None] == CATEGORY[None, :]) & (CATEGORY >= 0)
    found = measure(ABSTRACT, relational_induction(same, 8.0 * same, LENGTH))
    np.testing.assert_allclose(found["matching"][1, 0], 1.0, rtol=1e-9)
    np.testing.assert_allclose(found["gain"], 8.0, rtol=1e-9)
    np.testing.assert_allclose(found["nll"], math.log1p((VOCAB - 3) * math.exp(-8.0) / 3), rtol=1e-9)


def test_the_bracket_reader_by_hand() -> None:
    found = measure(NESTED, BracketReader(OPENING, CLOSING, 10))
    np.testing.assert_allclose(found["matching"], 1.0, rtol=1e-9)
    probe = NESTED._probe
    share = [
        np.mean([w != right for w in wrong if w >= 0])
        for right, wrong in zip(probe.right.tolist(), probe.wrong.tolist(), strict=True)
    ]
    np.testing.assert_allclose(found["gain"], 8.0 * np.mean(share), rtol=1e-9)
    np.testing.assert_allclose(found["nll"], math.log1p(9 * math.exp(-8.0)), rtol=1e-9)


@pytest.mark.parametrize("instrument", ALL)
def test_even_attention_and_flat_logits_score_their_nulls(instrument: Any) -> None:
    found = measure(instrument, even(VOCAB, LENGTH))
    np.testing.assert_allclose(found["ratio"], 1.0, rtol=1e-12)
    np.testing.assert_allclose(found["ratio_se"], 0.0, atol=1e-12)
    uniform = np.mean(1 / (1 + instrument._probe.query.numpy()))
    np.testing.assert_allclose(found["matching"], uniform, rtol=1e-12)
    assert abs(float(found["gain"])) < 1e-12


def test_what_knows_only_repeats_finds_none_of_the_three() -> None:
    exact = induction(VOCAB, LENGTH)
    for instrument in ALL[:2]:
        found = measure(instrument, exact)
        assert float(found["matching"][1, 0]) < 1e-9
        assert abs(float(found["gain"])) < 1e-9
    exact = measure(NESTED, exact)
    assert float(exact["matching"][1, 0]) < float(exact["fixed_offset"][1, 0]) + 1e-9
    blind = measure(FUZZY, fixed_offset(VOCAB, LENGTH, 8))
    assert float(blind["matching"][0, 0]) <= float(blind["offset_share"])
    assert float(blind["fixed_offset"][0, 0]) > 1 - 1e-9


class Set(nn.Module):
    """Raises the logit of the image of everything seen so far alike: it knows the map and the set, not the order."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(5.0, dtype=torch.float64))

    def forward(self, tokens: Tensor) -> Tensor:
        seen = torch.eye(VOCAB, dtype=torch.float64)[MAP[tokens]].cumsum(1)
        return self.strength * seen + 0 * even_attention(tokens)


def even_attention(tokens: Tensor) -> Tensor:
    q = torch.zeros(len(tokens), 1, tokens.shape[1], 1, dtype=torch.float64)
    return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)[:, 0]


def test_knowing_the_set_but_not_the_order_gains_nothing() -> None:
    found = measure(FUZZY, Set())
    assert float(found["nll"]) < math.log(VOCAB) - 0.3, "it predicts better than chance"
    np.testing.assert_allclose(found["gain"], 0.0, atol=1e-9)


def test_counting_bracket_types_gains_nothing() -> None:
    class Count(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            table = torch.zeros(10, 10, dtype=torch.float64)
            table[list(OPENING), list(CLOSING)] = 1.0
            return 0.5 * table[tokens].cumsum(1) + 0 * even_attention(tokens)

    instrument = HierarchicalInduction(OPENING, CLOSING, sequences=400, length=24)
    found = measure(instrument, Count())
    assert abs(float(found["gain"])) < 4 * float(found["gain_se"]) < 0.2, found["gain"].values


@pytest.mark.parametrize("instrument", ALL)
def test_by_brute_force(instrument: Any) -> None:
    model, probe = random_model(0), instrument._probe
    found = measure(instrument, model)
    with torch.no_grad():
        p = model(probe.tokens).softmax(-1)
    of_class = [(probe.classes == c).nonzero()[:, 0] for c in range(int(probe.classes.max()) + 1)]
    items = list(zip(*(getattr(probe, n).tolist() for n in ("row", "query", "target", "right")), strict=True))
    others = [[o for o in line if o >= 0] for line in probe.other.tolist()]
    wrongs = [[w for w in line if w >= 0] for line in probe.wrong.tolist()]

    def clustered(values: list[float]) -> tuple[float, float]:
        rows = [row for row, *_ in items]
        return clustered_mean(np.bincount(rows, values), np.bincount(rows))

    nll = [-math.log(p[r, q, of_class[c]].sum()) for r, q, _, c in items]
    control = [
        np.mean([-math.log(p[r, q, of_class[w]].sum()) for w in wrong])
        for (r, q, _, _), wrong in zip(items, wrongs, strict=True)
    ]
    gain = [b - a for a, b in zip(nll, control, strict=True)]
    for name, values in {"nll": nll, "nll_control": control, "gain": gain}.items():
        mean, se = clustered(values)
        np.testing.assert_allclose([found[name], found[f"{name}_se"]], [mean, se], rtol=1e-9)
    for layer, pattern in enumerate(attention_patterns(model, probe.tokens)):
        for head in range(3):
            there = [float(pattern[r, head, q, t]) for r, q, t, _ in items]
            elsewhere = [
                float(np.mean([pattern[r, head, q, o] for o in other]))
                for (r, q, _, _), other in zip(items, others, strict=True)
            ]
            for name, values in {"matching": there, "random_place": elsewhere}.items():
                mean, se = clustered(values)
                np.testing.assert_allclose(found[name][layer, head], mean, rtol=1e-9)
                np.testing.assert_allclose(found[f"{name}_se"][layer, head], se, rtol=1e-9)
            ratio = np.sum(there) / np.sum(elsewhere)
            np.testing.assert_allclose(found["ratio"][layer, head], ratio, rtol=1e-9)
            se = clustered([a - ratio * b for a, b in zip(there, elsewhere, strict=True)])[1] / np.mean(elsewhere)
            np.testing.assert_allclose(found["ratio_se"][layer, head], se, rtol=1e-7)
            rates = []
            for offset in range(LENGTH):
                seen = [float(pattern[r, head, q, q - offset]) for r, q, _, _ in items if q >= offset]
                rates += [np.mean(seen)] if 2 * len(seen) >= len(items) else []
            np.testing.assert_allclose(found["fixed_offset"][layer, head], max(rates), rtol=1e-9)
    distance = np.bincount([q - t for _, q, t, _ in items])
    np.testing.assert_allclose(found["offset_share"], distance.max() / len(items), rtol=1e-6)


@pytest.mark.parametrize("instrument", ALL)
def test_minibatches_do_not_change_the_numbers(instrument: Any) -> None:
    whole, parts = (measure(replace(instrument, batch_size=size), random_model(1)) for size in (100, 5))
    for name in whole.data_vars:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-9)


@pytest.mark.parametrize("name", CAUSAL)
def test_families(name: str) -> None:
    model = family(name)
    small: list[Callable[[], Any]] = [
        lambda: FuzzyInduction(torch.tensor([-1] * 3 + [*range(13, 23), *range(3, 13)]), 8, 18),
        lambda: AbstractInduction(torch.arange(23) % 9, 8, 18),
        lambda: HierarchicalInduction((3, 4), (5, 6), 8, 18),
    ]
    for make in small:
        found = measure(make(), model)
        assert dict(found.drop_dims("replicate").sizes) == {"layer": 2, "head": 4}
        for key in ("matching", "gain", "random_place"):
            assert np.isfinite(found[key]).all()
        assert (found["matching"] <= 1).all()


def test_refusals() -> None:
    with pytest.raises(DataError, match=r"needs 12 pairs of a token and its image .*mapping has 10"):
        FuzzyInduction(torch.tensor([*range(10, 20), *range(10)]), length=24)
    with pytest.raises(DataError, match=r"into 0..4, got 9"):
        FuzzyInduction(torch.tensor([1, 9, 3, 4, 0]))
    with pytest.raises(DataError, match="12 categories of two tokens or more for length 24; category has 5"):
        AbstractInduction(torch.arange(50) % 5, length=24)
    with pytest.raises(DataError, match="two halves needs length >= 8"):
        AbstractInduction(CATEGORY, length=7)
    for wrong in (((1,), (2,)), ((1, 2), (3,)), ((1, 2), (2, 3))):
        with pytest.raises(DataError, match="two types or more"):
            HierarchicalInduction(*wrong)
    with pytest.raises(DataError, match=r"needs mapping \(vocab,\) of integers"):
        FuzzyInduction(torch.rand(5))
    flat = Bigram(torch.full((VOCAB, VOCAB), 1 / VOCAB))
    for instrument in ALL:
        with pytest.raises(InstrumentError, match=rf"^{type(instrument).__name__} needs attention patterns"):
            measure(instrument, flat)
    with pytest.raises(InstrumentError, match=r"^AbstractInduction needs a causal language model: BertForMaskedLM"):
        measure(AbstractInduction(torch.arange(23) % 9, 8, 18), family("bert"))
    short = random_model(0)
    short.unembed.weight.data = short.unembed.weight.data[:8]
    with pytest.raises(InstrumentError, match=r"^FuzzyInduction: the probe's tokens go up to 40 but .* 8 logits"):
        measure(FUZZY, short)


class TestFuzzyInduction(InstrumentContract):
    def instrument(self) -> Any:
        return FuzzyInduction(MAP, sequences=8, length=LENGTH)

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)


class TestAbstractInduction(TestFuzzyInduction):
    def instrument(self) -> Any:
        return AbstractInduction(CATEGORY, sequences=8, length=LENGTH)


class TestHierarchicalInduction(TestFuzzyInduction):
    def instrument(self) -> Any:
        return HierarchicalInduction(OPENING, CLOSING, sequences=8, length=LENGTH)
