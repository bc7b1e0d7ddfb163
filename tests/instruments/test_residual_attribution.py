"""Direct logit attribution: models whose parts are known, a plain second computation, all families, the contract."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from devmon.anatomy import Layout
from devmon.data import random_tokens, repeats
from devmon.errors import DataError, InstrumentError
from devmon.instruments.residual_attribution import ResidualAttribution
from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly, InstrumentContract, even, fixed_offset, induction
from tests.anatomy.test_anatomy_sites import CONFIGS, HEADS, LENGTH, MASKED, VISION, VOCAB, family

CAUSAL = [name for name in CONFIGS if name not in MASKED and name not in VISION]


def snapshot(model: nn.Module) -> Snapshot:
    return Snapshot(0, model.eval())


def by_name(found: Any, name: str) -> dict[str, float]:
    return dict(zip(found["component"].values.tolist(), found[name].values.tolist(), strict=True))


def small(**more: Any) -> ResidualAttribution:
    tokens = random_tokens(VOCAB - 3, 6, LENGTH, seed=1) + 3
    answers = random_tokens(VOCAB, 6, 1, seed=2)[:, 0]
    return ResidualAttribution(tokens, answers, (answers + 5) % VOCAB, **more)


def random_model(seed: int, layers: int = 2, width: int = 12) -> AttentionOnly:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5

    heads = [[(draw(width, width), draw(width, width)) for _ in range(4)] for _ in range(layers)]
    return AttentionOnly(draw(VOCAB, width), draw(16, width), heads, draw(width, VOCAB))


def test_a_copiers_whole_difference_comes_from_its_head() -> None:
    tokens = random_tokens(30, 8, 16, seed=3)
    answers = tokens[:, 9 - 4]
    instrument = ResidualAttribution(tokens, answers, (answers + 7) % 30, torch.full((8,), 9))
    found = instrument(snapshot(fixed_offset(30, 16, offset=4)))
    parts = by_name(found, "attribution")
    assert parts.pop("head 0.0") == pytest.approx(20.0, rel=1e-9)
    assert set(parts) == {"embedding", "attention bias 0", "bias"}
    assert max(map(abs, parts.values())) < 1e-9
    for name, expected in {"logit_difference": 20.0, "top_share": 1.0, "participation": 1.0, "closure": 0.0}.items():
        np.testing.assert_allclose(found[name], expected, atol=1e-9)
    assert abs(by_name(found, "attribution_null")["head 0.0"]) < 10, "it copies this prompt's token, not another's"


def test_the_induction_heads_logits_depend_on_a_head_that_writes_none() -> None:
    instrument = ResidualAttribution.repeated(40, prompts=24, length=41, bos=0, ablation_prompts=24)
    found = instrument(snapshot(induction(40, 41)))
    direct, effect = by_name(found, "attribution"), by_name(found, "effect")
    np.testing.assert_allclose(found["logit_difference"], 20.0, rtol=1e-9)
    assert direct["head 1.0"] == pytest.approx(20.0, rel=1e-9)
    assert abs(direct["head 0.1"]) < 1e-9
    assert effect["head 1.0"] > 15, "its mean over prompts copies nothing in particular"
    assert effect["head 0.1"] > 15, "without the previous-token head there is no match"
    assert effect["head 0.0"] == effect["head 1.1"] == 0
    assert np.isnan(effect["embedding"])
    # two of four heads have an effect, one of them a contribution: corr² of (0, 0, 1, 0) and about (0, 1, 1, 0)
    assert float(found["linearity"]) == pytest.approx(1 / 3, abs=0.05)


def test_equal_parts_share_equally() -> None:
    """Two heads that copy the same place with equal strength: top share 1/2, participation 2."""
    one = fixed_offset(30, 16, offset=4)
    head = (one.blocks[0].query.weight.T.detach(), one.blocks[0].out.weight.T.detach())
    eye = torch.eye(106, dtype=torch.float64)
    twice = AttentionOnly(eye[:30], eye[90:], [[head], [head]], eye[:, 60:90])
    tokens = random_tokens(30, 8, 16, seed=3)
    found = ResidualAttribution(tokens, tokens[:, -5], (tokens[:, -5] + 1) % 30)(snapshot(twice))
    np.testing.assert_allclose(found["logit_difference"], 40.0, rtol=1e-9)
    np.testing.assert_allclose([found["top_share"], found["participation"]], [0.5, 2.0], rtol=1e-9)
    np.testing.assert_allclose([found["top_share_se"], found["participation_se"]], 0, atol=1e-7)


def test_one_linear_layer_has_the_effect_of_its_contribution() -> None:
    """Without norms and later layers: effect = (z W_O − mean of z W_O) · u, head by head; here from plain matrices."""
    model, instrument = random_model(0, layers=1), small(ablation_prompts=6)
    found = instrument(snapshot(model))
    embed, block = model.embed.weight, model.blocks[0]
    state = embed[instrument.tokens] + model.positions[:LENGTH]
    toward = (model.unembed.weight[instrument.answers] - model.unembed.weight[instrument.foils]).detach()
    for head in range(4):
        attend = block.query.weight.T[:, head * 12 : (head + 1) * 12]
        scores = torch.einsum("bqd,de,bke->bqk", state, attend, state)
        pattern = scores.masked_fill(~torch.ones(LENGTH, LENGTH).tril().bool(), -torch.inf).softmax(-1)
        added = (pattern @ state @ block.out.weight.T[head * 12 : (head + 1) * 12])[:, -1].detach()
        direct = (added * toward).sum(1)
        drop = ((added - added.mean(0)) * toward).sum(1)
        assert by_name(found, "attribution")[f"head 0.{head}"] == pytest.approx(float(direct.mean()), rel=1e-9)
        assert by_name(found, "effect")[f"head 0.{head}"] == pytest.approx(float(drop.mean()), rel=1e-9)
        error = direct.numpy().std(ddof=1) / 6**0.5
        assert by_name(found, "attribution_se")[f"head 0.{head}"] == pytest.approx(error, rel=1e-9)


@torch.no_grad()
def test_gpt2_by_a_plain_second_computation() -> None:
    """Head by head from the inputs of c_proj, the final LayerNorm written out."""
    model, instrument = family("gpt2").double(), small(positions=torch.tensor([1, 8, 3, 5, 8, 2]))
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: inputs.update({name: args[0], name + ">": out}))
        for name, module in model.named_modules()
        if name.endswith(("attn.c_proj", "mlp.c_proj", "drop", "ln_f"))
    ]
    logits = model(instrument.tokens).logits
    for hook in hooks:
        hook.remove()
    norm = model.transformer.ln_f
    rows = {name: [] for name in ("embedding", "head 0.2", "head 1.3", "attention bias 1", "mlp 0", "bias")}
    for i in range(6):
        p, answer, foil = (int(t[i]) for t in (instrument.positions, instrument.answers, instrument.foils))  # type: ignore[index]
        stream = inputs["transformer.ln_f"][i, p]
        sd = (stream.var(unbiased=False) + norm.eps).sqrt()
        toward = model.lm_head.weight[answer] - model.lm_head.weight[foil]

        def read(part: Tensor, sd: Tensor = sd, toward: Tensor = toward) -> float:
            return float((part - part.mean()) / sd * norm.weight @ toward)

        rows["embedding"].append(read(inputs["transformer.drop>"][i, p]))
        rows["mlp 0"].append(read(inputs["transformer.h.0.mlp.c_proj>"][i, p]))
        rows["attention bias 1"].append(read(model.transformer.h[1].attn.c_proj.bias))
        for layer, head in ((0, 2), (1, 3)):
            some = slice(8 * head, 8 * head + 8)
            z = inputs[f"transformer.h.{layer}.attn.c_proj"][i, p, some]
            rows[f"head {layer}.{head}"].append(read(z @ model.transformer.h[layer].attn.c_proj.weight[some]))
        rows["bias"].append(float(norm.bias @ toward))
    found = instrument(snapshot(model))
    for name, values in rows.items():
        assert by_name(found, "attribution")[name] == pytest.approx(np.mean(values), rel=1e-5), name
        assert by_name(found, "attribution_se")[name] == pytest.approx(np.std(values, ddof=1) / 6**0.5, rel=1e-5)
    where = torch.arange(6), instrument.positions
    difference = logits[*where, instrument.answers] - logits[*where, instrument.foils]
    np.testing.assert_allclose(found["logit_difference"], float(difference.mean()), rtol=1e-9)


@torch.no_grad()
def test_a_norm_between_heads_and_stream_is_frozen() -> None:
    """Gemma 2: head h adds gain · z W_O / rms(what all heads write) to the stream."""
    model, instrument = family("gemma2"), small()
    block = model.model.layers[1]
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: inputs.update({name: args[0]}))
        for name, module in (("z", block.self_attn.o_proj), ("norm", model.model.norm))
    ]
    model(instrument.tokens)
    for hook in hooks:
        hook.remove()
    values = []
    for i in range(6):
        z, stream = inputs["z"][i, -1], inputs["norm"][i, -1]
        every = block.self_attn.o_proj.weight @ z
        own = block.self_attn.o_proj.weight[:, 12:24] @ z[12:24]
        end, last = block.post_attention_layernorm, model.model.norm
        added = own * (1 + end.weight) / (every.square().mean() + end.eps).sqrt()
        read = added * (1 + last.weight) / (stream.square().mean() + last.eps).sqrt()
        toward = model.lm_head.weight[instrument.answers[i]] - model.lm_head.weight[instrument.foils[i]]
        values.append(float(read @ toward))
    found = instrument(snapshot(model))
    assert by_name(found, "attribution")["head 1.1"] == pytest.approx(np.mean(values), rel=1e-4)


class Ended(nn.Module):
    """One layer whose attention passes a LayerNorm with bias before it is added, and whose output map has a bias."""

    anatomy = Layout(
        blocks="blocks", qkv="qkv", out="out", heads=2, attention_end="end", embed="embed", unembed="unembed"
    )

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unembed, block = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB), nn.Module()
        block.qkv, block.out, block.end = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        block.forward = lambda x, b=block: x + b.end(b.out(attended(b.qkv(x))))  # type: ignore[method-assign]
        self.blocks = nn.ModuleList([block])
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.blocks[0](self.embed(tokens)))


def attended(qkv: Tensor) -> Tensor:
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in qkv.chunk(3, -1))
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_biases_before_and_in_an_end_norm() -> None:
    model, instrument = Ended(), small()
    found = by_name(instrument(snapshot(model)), "attribution")
    block = model.blocks[0]
    whole = block.out(attended(block.qkv(model.embed(instrument.tokens))))[:, -1]
    sd = (whole.var(-1, unbiased=False, keepdim=True) + block.end.eps).sqrt()
    bias = (block.out.bias - block.out.bias.mean()) / sd * block.end.weight + block.end.bias
    toward = model.unembed.weight[instrument.answers] - model.unembed.weight[instrument.foils]
    assert found["attention bias 0"] == pytest.approx(float((bias * toward).sum(1).mean()), rel=1e-6)
    last = model.unembed.bias[instrument.answers] - model.unembed.bias[instrument.foils]
    assert found["bias"] == pytest.approx(float(last.mean()), rel=1e-9)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_parts_sum_up_in_every_family(name: str) -> None:
    model = family(name)
    instrument = small(ablation_prompts=3 if name in ("gpt2", "gemma2", "phi") else 0)
    found = instrument(snapshot(model))
    assert float(found["closure"]) < 1e-4
    parts = by_name(found, "attribution")
    np.testing.assert_allclose(sum(parts.values()), float(found["logit_difference"]), atol=1e-4)
    assert len(parts) == 1 + 2 * (HEADS + 2) + 1
    cap = getattr(model.config, "final_logit_softcapping", None)
    with torch.no_grad():
        logits = model(instrument.tokens).logits[:, -1].double()
    logits = logits if cap is None else cap * torch.atanh(logits / cap)
    expected = logits.gather(1, instrument.answers[:, None]) - logits.gather(1, instrument.foils[:, None])
    np.testing.assert_allclose(found["logit_difference"], float(expected.mean()), rtol=2e-3)
    assert 0 < float(found["top_share"]) < 1 < float(found["participation"]) < len(parts)
    if "linearity" in found:
        assert 0 <= float(found["linearity"]) <= 1
        assert int(np.isfinite(found["effect"]).sum()) == 2 * HEADS + 2


@pytest.mark.parametrize("name", ["bert", "esm", "vit"])
def test_models_without_a_summed_up_stream_or_logits_are_refused(name: str) -> None:
    with pytest.raises(
        InstrumentError, match="ResidualAttribution needs a(n unembedding| residual stream that is summ)"
    ):
        small()(snapshot(family(name)))


def test_a_part_that_the_layout_misses_is_told() -> None:
    class More(AttentionOnly):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) + self.embed(tokens) @ torch.ones(12, VOCAB).cumsum(1).double()

    model = random_model(0)
    model.__class__ = More
    with pytest.raises(InstrumentError, match="norm and unembedding of its last stream are not its logits"):
        small()(snapshot(model))


def test_repeated_asks_for_the_token_that_followed() -> None:
    instrument = ResidualAttribution.repeated(30, prompts=40, length=33, seed=5, bos=7, exclude=(3, 4))
    probe = repeats(30, 40, 33, 5, 7, (3, 4))
    assert len(instrument.tokens) > 35
    assert len(set(instrument.positions.tolist())) > 5  # type: ignore[union-attr]
    rows = {tuple(row): i for i, row in enumerate(probe.tokens.tolist())}
    columns = (instrument.tokens, instrument.answers, instrument.foils, instrument.positions)
    for row, answer, foil, place in zip(*(c.tolist() for c in columns), strict=True):  # type: ignore[union-attr]
        i = rows[tuple(row)]
        assert bool(probe.query[i, place])
        assert bool(probe.query[i, place + 1])
        assert row[place + 1] == answer == row[place + 1 - int(probe.period[i])]
        assert foil != answer
        assert foil not in (3, 4, 7)
    assert len(set(instrument.foils.tolist())) > 15
    assert instrument == ResidualAttribution.repeated(30, prompts=40, length=33, seed=5, bos=7, exclude=(3, 4))
    assert instrument != ResidualAttribution.repeated(30, prompts=40, length=33, seed=6, bos=7, exclude=(3, 4))
    assert instrument == pickle.loads(pickle.dumps(instrument))
    assert instrument.cost().work == 33 * len(instrument.tokens)


def test_minibatches_and_positions_from_the_end() -> None:
    model = random_model(1)
    whole, parts = small(batch_size=100)(snapshot(model)), small(batch_size=2)(snapshot(model))
    last = small(positions=torch.full((6,), -1))(snapshot(model))
    for name in whole.data_vars:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-8, atol=1e-12)
        np.testing.assert_array_equal(last[name], whole[name])


def test_half_precision_closes_as_well_as_it_can() -> None:
    model = family("llama")
    whole, half = (small(ablation_prompts=0)(snapshot(m)) for m in (model, family("llama").bfloat16()))
    assert 1e-4 < float(half["closure"]) < 0.05
    np.testing.assert_allclose(half["attribution"], whole["attribution"], atol=0.05)


def test_a_silent_model_has_no_shares() -> None:
    found = small()(snapshot(even(VOCAB, 16)))
    assert float(found["logit_difference"]) == 0
    for name in ("top_share", "participation", "linearity"):
        assert np.isnan(found[name])
        assert found[name].attrs["nan"]


def test_what_it_refuses() -> None:
    tokens, one = random_tokens(9, 4, 5), torch.arange(4)
    with pytest.raises(DataError, match=r"answers \(4,\)"):
        ResidualAttribution(tokens, one[:3], one + 1)
    with pytest.raises(DataError, match="foil other than"):
        ResidualAttribution(tokens, one, one)
    with pytest.raises(DataError, match="within prompts of 5"):
        ResidualAttribution(tokens, one, one + 1, torch.full((4,), 5))
    with pytest.raises(DataError, match="at least 3, got 2"):
        ResidualAttribution(tokens, one, one + 1, ablation_prompts=2)
    with pytest.raises(InstrumentError, match=f"up to {VOCAB} but AttentionOnly has {VOCAB} logits"):
        ResidualAttribution(tokens, one, one + VOCAB - 3)(snapshot(random_model(0)))


class TestResidualAttribution(InstrumentContract):
    def instrument(self) -> ResidualAttribution:
        return small()

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)


class TestRepeatedOnGPT2(InstrumentContract):
    def instrument(self) -> ResidualAttribution:
        return ResidualAttribution.repeated(VOCAB, prompts=8, length=16)

    def model(self, seed: int) -> nn.Module:
        return family("gpt2", seed)
