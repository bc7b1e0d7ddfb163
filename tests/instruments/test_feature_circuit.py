"""Feature circuits: one that is known, integrals and edges that add up, a plain implementation, bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.anatomy import Anatomy
from devmon.data.prompt_pairs import PromptPairs
from devmon.errors import DataError, InstrumentError
from devmon.features import Dictionary
from devmon.features.nodes import Nodes, Split, basis
from devmon.instruments import FeatureCircuit
from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly, InstrumentContract

D, VOCAB, LENGTH, M = 12, 20, 4, 30
SITES = (("attn_out", 0), ("resid_post", 1))


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(seed: int = 0, attend: float = 0.0, like: type[AttentionOnly] = AttentionOnly) -> AttentionOnly:
    """Two layers of two heads; evenly attending, and so linear, where `attend` is 0."""
    layers = [
        [(attend * drawn(D, D, seed=seed + 10 * a + b), 0.3 * drawn(D, D, seed=seed + 50 + 10 * a + b)) for b in (0, 1)]
        for a in (0, 1)
    ]
    return like(drawn(VOCAB, D, seed=seed + 7), drawn(LENGTH, D, seed=seed + 8), layers, drawn(D, VOCAB, seed=seed + 9))


def dictionary(seed: int, m: int = M) -> Dictionary:
    rows = drawn(m, D, seed=seed)
    rows = rows / rows.norm(dim=1, keepdim=True)
    return Dictionary(rows.T.contiguous(), 0.2 * drawn(m, seed=seed + 1), 0.4 * rows, 0.1 * drawn(D, seed=seed + 2))


def telling(of: nn.Module, count: int = 24) -> PromptPairs:
    """Pairs whose answer is the token that the clean prompt raises most against the corrupt one."""
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = (torch.randint(VOCAB, (count, LENGTH), generator=generator) for _ in range(2))
    with torch.no_grad():
        moved = (of(clean) - of(corrupt))[:, -1]
    return PromptPairs(clean, corrupt, moved.argmax(-1), moved.argmin(-1))


LINEAR = model()
PAIRS = telling(LINEAR)
TWO = {site: dictionary(20 + at) for at, site in enumerate(SITES)}


def circuit(of: nn.Module, **changed: Any) -> xr.Dataset:
    settings: dict[str, Any] = {"pairs": PAIRS, "dictionaries": TWO, "steps": 2, "random": 1}
    return FeatureCircuit(**settings | changed)(Snapshot(0, of))


class Saturating(AttentionOnly):
    """tanh(3 x) before the readout."""

    anatomy = replace(AttentionOnly.anatomy, norm="norm")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.norm = Tanh()

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.embed(tokens)
        for block in self.blocks:
            state = block(state)
        return self.unembed(self.norm(state))


class Tanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (3 * x).tanh()


def test_midpoints_of_the_way_integrate_what_a_single_slope_misses() -> None:
    """m = tanh(3a) from a = 0 to 1: .9951 by ten midpoints, .846 from 0 by tenths (i/N), .030 by the slope at 1."""
    none = torch.zeros(2, 2, dtype=torch.float64)
    table = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    of = Saturating(table, torch.zeros(1, 2, dtype=torch.float64), [[(none, none)]], torch.eye(2, dtype=torch.float64))
    site = ("resid_post", 0)
    nodes = Nodes(Anatomy(of), {site: basis(2, table)})
    clean, corrupt = torch.tensor([[1]]), torch.tensor([[0]])
    (_, there), (_, start) = nodes.read(clean), nodes.read(corrupt)

    def metric(output: Tensor) -> Tensor:
        return output[:, -1, 0].sum()

    def effect(slope: Split) -> float:
        return float(((there[site] - start[site]).latents * slope.latents).sum())

    integrated = [
        effect(nodes.integrated(clean, site, start[site], there[site], metric, steps)) for steps in (1, 10, 100)
    ]
    assert integrated[1] == pytest.approx(0.9951, abs=2e-4)
    assert integrated[2] == pytest.approx(np.tanh(3), abs=1e-6)
    assert effect(nodes.slopes(clean, site, there[site], metric)) == pytest.approx(0.030, abs=5e-4)
    tenths = [effect(nodes.slopes(clean, site, there[site].toward(start[site], i / 10), metric)) for i in range(10)]
    assert np.mean(tenths) == pytest.approx(0.846, abs=1e-3)


def test_scores_of_a_site_add_up_to_what_its_corrupt_values_take() -> None:
    for attend, steps, tolerance in ((0.0, 1, 1e-9), (0.15, 40, 5e-3)):
        of = model(3, attend)
        pairs = telling(of)
        found = circuit(of, pairs=pairs, steps=steps)
        anatomy, half = Anatomy(of), slice(0, 12)
        at = torch.arange(12)
        _, held = anatomy.run(pairs.corrupt[half], SITES)
        for number, site in enumerate(SITES):
            ends = [anatomy.run(pairs.clean[half], write=write)[0][:, -1] for write in ({}, {site: held[site]})]
            m = [end[at, pairs.answer[half]] - end[at, pairs.foil[half]] for end in ends]
            lost = float((m[0] - m[1]).mean())
            assert abs(lost) > 0.5
            assert float(found["total"][number]) == pytest.approx(lost, rel=tolerance), site


def test_edges_of_a_node_add_up_to_its_score_where_all_is_linear() -> None:
    """All that a node of the first site does goes through the second, by latents and errors, or to the logits."""
    everything = 2 * (M + LENGTH)
    found = circuit(LINEAR, steps=1, top=everything)
    edge, score = found["edge"].values, found["score"].values
    first, last = found["node_site"].values == 0, found["node_site"].values == 1
    assert first.sum() == last.sum() == M + LENGTH
    assert np.abs(edge[first][:, :-1]).max() > 0.01
    np.testing.assert_allclose(edge[first].sum(1), score[first], atol=1e-9)
    np.testing.assert_allclose(edge[last][:, -1], score[last], atol=1e-9)  # the last site reaches the logits alone
    np.testing.assert_allclose(edge[first][:, -1], 0, atol=1e-9)  # the stream after it holds all
    np.testing.assert_allclose(edge[last][:, :-1], 0, atol=1e-12)
    np.testing.assert_allclose(edge[first][:, np.append(first, False)], 0, atol=1e-12)


def test_a_branch_beside_the_second_site_goes_straight_to_the_logits() -> None:
    """Of what head outputs of layer 0 do, the second site (head outputs of layer 1) carries a part, the stream the
    rest; both are closed forms here: even attention, linear maps."""
    sites = {("attn_out", 0): dictionary(20), ("attn_out", 1): dictionary(21)}
    found = circuit(LINEAR, dictionaries=sites, steps=1, top=2 * (M + LENGTH))
    first = found["node_site"].values == 0
    edge, score = found["edge"].values, found["score"].values
    np.testing.assert_allclose(edge[first].sum(1), score[first], atol=1e-9)
    assert np.abs(edge[first][:, -1]).max() > 0.01
    _, held = Anatomy(LINEAR).run(PAIRS.clean[:12], [("attn_out", 0)])
    _, other = Anatomy(LINEAR).run(PAIRS.corrupt[:12], [("attn_out", 0)])
    moved = sites["attn_out", 0].encode(held["attn_out", 0]) - sites["attn_out", 0].encode(other["attn_out", 0])
    w = (LINEAR.unembed.weight[PAIRS.answer[:12]] - LINEAR.unembed.weight[PAIRS.foil[:12]]).detach()
    direct = (moved[:, -1] * (w @ sites["attn_out", 0].W_dec.T)).mean(0)  # the last place alone is read
    for row in np.flatnonzero(first & (found["node_latent"].values >= 0)):
        assert edge[row, -1] == pytest.approx(float(direct[int(found["node_latent"][row])]), abs=1e-9)


def known() -> tuple[AttentionOnly, PromptPairs, dict[Any, Dictionary]]:
    """Token t adds feature t of an orthonormal basis; the answer reads features 0 and 1 and nothing else."""
    none = torch.zeros(D, D, dtype=torch.float64)
    unembed = torch.zeros(D, VOCAB, dtype=torch.float64)
    unembed[0, 0], unembed[1, 0] = 3.0, 2.0
    table = torch.eye(VOCAB, D, dtype=torch.float64)
    table[:, 0] = torch.linspace(1, 2, VOCAB) * (torch.arange(VOCAB) < 10)
    table[:, 1] = 1.0 * (torch.arange(VOCAB) < 10)
    table[:10, 2:] = table[10:, 2:] = 0.0
    table[:, 2:] += 0.5 * drawn(VOCAB, D - 2, seed=1).abs()
    of = AttentionOnly(table, torch.zeros(2, D, dtype=torch.float64), [[(none, none)]], unembed)
    tokens = torch.arange(10).repeat(2)[:, None]
    first = torch.full_like(tokens, 19)
    clean, corrupt = torch.cat([first, tokens], 1), torch.cat([first, tokens + 10], 1)
    pairs = PromptPairs(clean, corrupt, torch.zeros(20, dtype=torch.int64), torch.ones(20, dtype=torch.int64))
    eye = torch.eye(D, dtype=torch.float64)
    none = torch.zeros(D, dtype=torch.float64)
    return of, pairs, {("resid_post", 0): Dictionary(eye, none, eye, none)}


def test_a_circuit_that_is_known() -> None:
    of, pairs, dictionaries = known()
    found = circuit(of, pairs=pairs, dictionaries=dictionaries, counts=(1, 2, 5), random=20, top=14)
    assert found["node_latent"].values[:2].tolist() == [0, 1]
    np.testing.assert_allclose(found["score"][:2], [3 * float(of.embed.weight.detach()[:10, 0].mean()), 2.0])
    np.testing.assert_allclose(found["score"][2:], 0, atol=1e-12)
    signal = 3 * float(of.embed.weight.detach()[:10, 0].mean()) + 2
    np.testing.assert_allclose(found["signal"], signal)
    for errors in ("ranked", "kept", "removed"):  # nothing is left over, so errors do not matter
        np.testing.assert_allclose(found["faithfulness"].sel(errors=errors), [1 - 2 / signal, 1, 1], atol=1e-9)
    np.testing.assert_allclose(found["completeness"], [2 / signal, 0, 0], atol=1e-9)
    np.testing.assert_allclose(found["faithfulness_basis"], [1 - 2 / signal, 1, 1], atol=1e-9)
    np.testing.assert_allclose(found["area"], (3 - 2 / signal) / 3)
    assert float(found["area_random"]) < 0.6
    np.testing.assert_allclose(found["error_share"], 0, atol=1e-12)
    assert int((found["node_site"] == -1).sum()) == 0
    assert circuit(of, pairs=pairs, dictionaries=dictionaries, top=20)["node_site"].values[-1] == -1


def test_what_is_kept_and_what_is_not_as_a_plain_forward_pass_says() -> None:
    """Circuits of k nodes: layer by layer by hand, means taken over the corrupt prompts that ranked, place by place."""
    of = model(5, 0.15)
    pairs = telling(of)
    counts = (3, 20)
    found = circuit(of, pairs=pairs, counts=counts, top=2 * (M + LENGTH))

    def run(tokens: Tensor, change: Any) -> Tensor:
        state = of.embed(tokens) + of.positions[: tokens.shape[1]]
        state = state + change(0, of.blocks[0](state) - state)
        return of.unembed(change(1, of.blocks[1](state))).detach()

    held: list[list[Tensor]] = [[], []]
    coders = list(TWO.values())

    def note(at: int, x: Tensor) -> Tensor:
        held[at].append(x)
        return x

    run(pairs.corrupt[:12], note)
    means = []
    for coder, (x,) in zip(coders, held, strict=True):
        f = coder.encode(x)
        means.append((f.mean(0), (x - coder.decode(f)).mean(0)))

    def m(kept: set[tuple[int, int, int]]) -> Tensor:
        def mix(at: int, x: Tensor) -> Tensor:
            f = coders[at].encode(x)
            e = x - coders[at].decode(f)
            for latent in range(M):
                if (at, latent, -1) not in kept:
                    f[..., latent] = means[at][0][:, latent]
            for place in range(LENGTH):
                if (at, -1, place) not in kept:
                    e[:, place] = means[at][1][place]
            return coders[at].decode(f) + e

        last, at = run(pairs.clean[12:], mix)[:, -1], torch.arange(12)
        return last[at, pairs.answer[12:]] - last[at, pairs.foil[12:]]

    with torch.no_grad():
        triples = zip(*(found[name].values.tolist() for name in ("node_site", "node_latent", "node_pos")), strict=True)
        nodes = list(triples)
        latents, errors = ([n for n in nodes if (n[1] >= 0) == kind] for kind in (True, False))
        empty, whole = m(set()), m(set(nodes)).mean()
        np.testing.assert_allclose(found["m_clean"], whole)
        for at, k in enumerate(counts):
            sets = {"ranked": nodes[:k], "kept": latents[:k] + errors, "removed": latents[:k]}
            for kind, kept in sets.items():
                expected = float((m(set(kept)) - empty).mean() / (whole - empty.mean()))
                assert float(found["faithfulness"].sel(errors=kind)[at]) == pytest.approx(expected, rel=1e-8), (k, kind)
            expected = float((m(set(nodes[k:])) - empty).mean() / (whole - empty.mean()))
            assert float(found["completeness"][at]) == pytest.approx(expected, rel=1e-8)


def test_without_a_signal_there_is_no_share() -> None:
    found = circuit(LINEAR, pairs=replace(PAIRS, clean=PAIRS.corrupt))
    assert np.isnan(found["area"])
    assert "below_floor" in found.attrs
    assert np.isfinite(found["signal"])


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"dictionaries": {}}, "one dictionary a site"),
        ({"dictionaries": (*TWO.items(), *TWO.items())}, "one dictionary a site"),
        ({"dictionaries": {("resid_post", 0): replace(dictionary(1), centred=False)}}, "no autoencoders at"),
        ({"counts": ()}, "counts of at least 1"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        circuit(LINEAR, **changed)


@pytest.mark.parametrize(
    ("site", "text"),
    [(("mlp_in", 0), "MLP"), (("resid_post", 2), "layers 0 to 1"), (("pattern", 0), "no vector by place")],
)
def test_sites_that_the_model_lacks(site: Any, text: str) -> None:
    with pytest.raises(InstrumentError, match=text):
        circuit(LINEAR, dictionaries={site: dictionary(1)})


def test_a_dictionary_of_another_width() -> None:
    other = basis(D + 1, torch.zeros(1, dtype=torch.float64))
    with pytest.raises(InstrumentError, match=f"is {D} wide, its dictionary reads {D + 1}"):
        circuit(LINEAR, dictionaries={("resid_post", 0): other})


class TestFeatureCircuit(InstrumentContract):
    def model(self, seed: int) -> nn.Module:
        return model(seed, 0.1)

    def instrument(self) -> FeatureCircuit:
        return FeatureCircuit(PAIRS, TWO, steps=2, counts=(2, 10), random=1, top=4)
