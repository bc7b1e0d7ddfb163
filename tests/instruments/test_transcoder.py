"""Transcoders: an MLP's own neurons are exact, graphs are what weights and patterns say, losses are a plain pass's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

from devmon.anatomy import Anatomy, Layout
from devmon.data import random_tokens
from devmon.errors import DataError, InstrumentError
from devmon.features import Dictionary
from devmon.features.graphs import Graph, Replaced
from devmon.instruments import Transcoder
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract
from tests.anatomy.test_anatomy_sites import family

D, M, VOCAB, LENGTH = 8, 10, 14, 5


class Block(nn.Module):
    """Even attention of one head, and ReLU neurons, each behind a LayerNorm."""

    def __init__(self, drawn: Any) -> None:
        super().__init__()
        self.heads = 1
        self.before, self.between = (nn.LayerNorm(D, dtype=torch.float64) for _ in range(2))
        for norm in (self.before, self.between):
            norm.weight.data = 1 + 0.3 * drawn(D)
            norm.bias.data = 0.1 * drawn(D)
        self.query, self.key, self.value, self.out, self.up, self.down = (
            nn.Linear(*size, dtype=torch.float64) for size in [(D, D)] * 4 + [(D, M), (M, D)]
        )
        for linear in (self.value, self.out, self.up, self.down):
            linear.weight.data, linear.bias.data = 0.5 * drawn(*linear.weight.shape), 0.1 * drawn(len(linear.bias))
        for linear in (self.query, self.key):
            linear.weight.data, linear.bias.data = torch.zeros(D, D).double(), torch.zeros(D).double()

    def forward(self, x: Tensor) -> Tensor:
        read = self.before(x)
        q, k, v = (part(read)[:, None] for part in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])
        return x + self.down(self.up(self.between(x)).relu())


class Model(nn.Module):
    anatomy = Layout(
        blocks="blocks", query="query", key="key", value="value", out="out", heads="heads", neurons="down",
        attention_norm="before", mlp_norm="between", norm="norm", embed="embed", unembed="unembed",
    )  # fmt: skip

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.embed = nn.Embedding.from_pretrained(drawn(VOCAB, D), freeze=False)
        self.blocks = nn.ModuleList(Block(drawn) for _ in range(2))
        self.norm = nn.LayerNorm(D, dtype=torch.float64)
        self.norm.weight.data = 1 + 0.3 * drawn(D)
        self.unembed = nn.Linear(D, VOCAB, bias=False, dtype=torch.float64)
        self.unembed.weight.data = drawn(VOCAB, D)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.norm(x))


def neurons(of: Model) -> dict[int, Dictionary]:
    """The MLPs' own neurons as latents."""
    return {
        layer: Dictionary(
            block.up.weight.data.T.clone(), block.up.bias.data.clone(), block.down.weight.data.T.clone(),
            block.down.bias.data.clone(), centred=False,
        )
        for layer, block in enumerate(of.blocks)
    }  # fmt: skip


def worse(of: Model) -> dict[int, Dictionary]:
    """The same, with decoders that are off."""
    generator = torch.Generator().manual_seed(9)
    return {
        layer: replace(coder, W_dec=coder.W_dec + 0.3 * torch.randn(M, D, generator=generator, dtype=torch.float64))
        for layer, coder in neurons(of).items()
    }


TEXT, PROMPTS = random_tokens(VOCAB, 12, LENGTH, seed=1), random_tokens(VOCAB, 6, LENGTH, seed=2)


def measure(of: nn.Module, transcoders: Any, **changed: Any) -> xr.Dataset:
    return Transcoder(**{"transcoders": transcoders, "tokens": TEXT, "prompts": PROMPTS} | changed)(Snapshot(0, of))


def test_the_neurons_of_a_relu_mlp_miss_nothing() -> None:
    of = Model()
    found = measure(of, neurons(of))
    np.testing.assert_allclose(found["fvu"], 0, atol=1e-12)
    np.testing.assert_allclose(found["loss_added"], 0, atol=1e-12)
    np.testing.assert_allclose(found["replacement_loss"], 0, atol=1e-12)
    for name in ("replacement", "completeness", "of_latents"):
        assert float(found[name]) == pytest.approx(1.0, abs=1e-9)
    assert 0 < float(found["replacement_opaque"]) < 0.9
    assert 0 < float(found["completeness_opaque"]) < 1
    assert 0 < float(found["direct"]) < 1
    assert float(found["invariant"]) > 5 * float(found["invariant_shuffled"])


def streams(of: Model, tokens: Tensor) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {"pre": [], "mid": [], "mlp": []}
    x = of.embed(tokens)
    for block in of.blocks:
        found["pre"].append(x)
        even = torch.ones(tokens.shape[1], tokens.shape[1]).double().tril()
        even = even / even.sum(1, keepdim=True)
        x = x + block.out(even @ block.value(block.before(x)))
        found["mid"].append(x)
        found["mlp"].append(block.down(block.up(block.between(x)).relu()))
        x = x + found["mlp"][-1]
    return found | {"end": [x]}


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def sd(x: Tensor) -> Tensor:
    return (centred(x).square().mean(-1, keepdim=True) + 1e-5).sqrt()


def test_edges_are_what_weights_patterns_and_scales_say() -> None:
    """From latents of layer 0 to latents of layer 1, along the stream and through the head; from errors, tokens and
    latents to the logits."""
    of = Model(1)
    coders = worse(of)
    with torch.no_grad():
        graphs = Replaced(Anatomy(of), coders).graphs(PROMPTS, 500)
        for at, graph in enumerate(graphs):
            tokens = PROMPTS[at : at + 1]
            held = streams(of, tokens)
            x = [of.blocks[layer].between(held["mid"][layer])[0] for layer in (0, 1)]
            f = [coders[layer].encode(x[layer]) for layer in (0, 1)]
            assert len(graph.latents) == int((f[0] > 0).sum()) + int((f[1] > 0)[-1].sum())  # before the end none counts

            later = of.blocks[1]
            through = (later.out.weight @ later.value.weight).T  # of rows

            def sent(
                step: Tensor, place: int, to: int, held: Any = held, later: Any = later, through: Any = through
            ) -> Tensor:
                """What a step of the stream after layer 0 at a place is when layer 1 reads it at another."""
                scale = sd(held["pre"][1][0, place])
                moved = (centred(step) * later.before.weight / scale) @ through / (to + 1)
                return moved + (step if place == to else 0)

            where = {tuple(row): number for number, row in enumerate(graph.latents.tolist())}
            count = len(where)
            for (layer, to, j), row in where.items():
                if layer == 0:
                    continue
                w = coders[1].W_enc[:, j] * later.between.weight / sd(held["mid"][1][0, to])
                for (early, place, i), column in where.items():
                    expected = 0.0
                    if early == 0 and place <= to:
                        step = f[0][place, i] * coders[0].W_dec[i]
                        expected = float(centred(sent(step, place, to)) @ w)
                    assert graph.rows[row, LENGTH + column] == pytest.approx(expected, abs=1e-9)
                for place in range(LENGTH):
                    missed = held["mlp"][0][0, place] - f[0][place] @ coders[0].W_dec - coders[0].b_dec
                    expected = float(centred(sent(missed, place, to)) @ w) if place <= to else 0.0
                    assert graph.rows[row, LENGTH + count + place] == pytest.approx(expected, abs=1e-9)

            # the logits, less their mean, from the latents and errors of the last layer at the last place
            readout = of.unembed.weight - of.unembed.weight.mean(0)
            logits = of(tokens)[0, -1]
            likely = logits.argsort(descending=True)
            for k in range(len(graph.weights)):
                w = readout[likely[k]] * of.norm.weight / sd(held["end"][0][0, -1])
                for (layer, place, i), column in where.items():
                    if layer == 1:
                        expected = float(centred(f[1][place, i] * coders[1].W_dec[i]) @ w)
                        assert graph.rows[count + k, LENGTH + column] == pytest.approx(expected, abs=1e-9)
            np.testing.assert_allclose(graph.weights, logits.softmax(0)[likely[: len(graph.weights)]], rtol=1e-5)


def test_the_scores_of_a_graph_that_is_known() -> None:
    """Logit ← feature 2, error 1, token 1; feature ← token 3, error 1."""
    rows = np.array([[3.0, 0.0, -1.0], [1.0, 2.0, 1.0]])  # columns: token, feature, error
    found = Graph(rows, np.zeros((1, 3), int), 1, np.ones(1), np.ones(1)).scores()
    assert found["replacement"] == pytest.approx(0.625)
    assert found["completeness"] == pytest.approx(0.85)
    assert found["of_latents"] == pytest.approx(0.75)
    assert found["opaque_replacement"] == pytest.approx(0.25)
    assert found["opaque_completeness"] == pytest.approx((0.25 + 1) / 2)


def test_latents_beyond_the_most_are_errors() -> None:
    of = Model()
    scores = [measure(of, neurons(of), most=most) for most in (1, 10, 200)]
    values = [float(each["replacement"]) for each in scores]
    assert values[0] < values[1] < values[2] == pytest.approx(1.0)
    assert float(scores[0]["nodes"]) == 1
    assert float(scores[0]["replacement"]) > float(scores[0]["replacement_opaque"])


def test_losses_and_errors_are_those_of_a_plain_pass() -> None:
    of = Model(2)
    coders = worse(of)
    found = measure(of, coders)
    judged, fitted = TEXT[6:], TEXT[:6]

    def nats(change: dict[int, Any]) -> Tensor:
        x = of.embed(judged)
        for layer, block in enumerate(of.blocks):
            even = torch.ones(LENGTH, LENGTH).double().tril()
            x = x + block.out((even / even.sum(1, keepdim=True)) @ block.value(block.before(x)))
            read = block.between(x)
            y = block.down(block.up(read).relu())
            x = x + (torch.cat([y[:, :1], change[layer](read)[:, 1:]], 1) if layer in change else y)
        logits = of.unembed(of.norm(x))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), judged[:, 1:].flatten())

    with torch.no_grad():
        plain = nats({})
        assert float(found["replacement_loss"]) == pytest.approx(float(nats(coders) - plain), rel=1e-9)
        for layer in (0, 1):
            own, fit = (streams(of, tokens) for tokens in (judged, fitted))
            read = of.blocks[layer].between
            x, y = (each[:, 1:].flatten(0, 1) for each in (read(own["mid"][layer]), own["mlp"][layer]))
            x0, y0 = (each[:, 1:].flatten(0, 1) for each in (read(fit["mid"][layer]), fit["mlp"][layer]))
            spread = (y - y.mean(0)).square().sum()
            fvu = (y - coders[layer](x)).square().sum() / spread
            assert float(found["fvu"][layer]) == pytest.approx(float(fvu))
            assert float(found["l0"][layer]) == pytest.approx(
                float((coders[layer].encode(x) > 0).double().sum(1).mean())
            )
            ones = torch.ones(len(x0), 1).double()
            weight = torch.linalg.lstsq(torch.cat([x0, ones], 1), y0).solution
            linear = (y - torch.cat([x, torch.ones(len(x), 1)], 1) @ weight).square().sum() / spread
            assert float(found["fvu_linear"][layer]) == pytest.approx(float(linear), rel=1e-3)
            added = nats({layer: coders[layer]}) - plain
            assert float(found["loss_added"][layer]) == pytest.approx(float(added), rel=1e-9)
            mean = y0.mean(0)
            added = nats({layer: lambda read, mean=mean: mean.expand_as(read)}) - plain
            assert float(found["loss_added_mean"][layer]) == pytest.approx(float(added), rel=1e-9)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_rows_of_real_architectures_add_up(name: str) -> None:
    """What all sources add to a logit is what the logit is, but for what biases add: with another embedding the sum
    changes, and the same constant is left."""
    of = family(name).double()
    anatomy = Anatomy(of)
    generator = torch.Generator().manual_seed(0)
    width = {"W_enc": (32, 40), "b_enc": (40,), "W_dec": (40, 32), "b_dec": (32,)}
    drawn = {key: torch.randn(*size, generator=generator, dtype=torch.float64) for key, size in width.items()}
    drawn["b_dec"] *= 0
    coders = {layer: Dictionary(**drawn, centred=False) for layer in range(anatomy.layers)}
    tokens = 3 + random_tokens(20, 2, 6, seed=3)
    left = []
    for graph, logits in zip(Replaced(anatomy, coders).graphs(tokens, 50), of(tokens).logits.detach(), strict=True):
        last = logits[-1]
        if name == "gemma2":  # caps what the unembedding writes at ± 3
            last = 3 * torch.atanh(last / 3)
        own = float(last.max() - last.mean())
        left.append(own - graph.rows[len(graph.latents)].sum())
    if name == "gpt_neox":  # biases of norms and maps are nobody's
        assert max(map(abs, left)) < 0.5
    else:
        np.testing.assert_allclose(left, 0, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"transcoders": {}}, "by layer"),
        ({"transcoders": {0: replace(neurons(Model())[0], centred=True)}}, r"none at \[0\]"),
        ({"transcoders": {0: neurons(Model())[0], 1: neurons(Model())[1].chosen(range(4))}}, "as many latents"),
        ({"most": 0}, "most >= 1"),
        ({"tokens": TEXT[:3]}, "at least 4 sequences"),
    ],
)
def test_settings_that_make_no_sense(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        measure(Model(), **{"transcoders": neurons(Model())} | changed)


def test_a_layer_or_a_width_that_the_model_lacks() -> None:
    coder = neurons(Model())[0]
    with pytest.raises(InstrumentError, match="layers 0 to 1"):
        measure(Model(), {2: coder})
    wide = Dictionary(torch.ones(D + 1, M), torch.zeros(M), torch.ones(M, D), torch.zeros(D), centred=False)
    with pytest.raises(InstrumentError, match=f"reads {D} numbers and adds {D}, the transcoder {D + 1} and {D}"):
        measure(Model(), {0: wide})


WORSE = worse(Model())


class TestTranscoder(InstrumentContract):
    def model(self, seed: int) -> nn.Module:
        return Model(seed)

    def instrument(self) -> Transcoder:
        return Transcoder(WORSE, TEXT, PROMPTS, most=8)
