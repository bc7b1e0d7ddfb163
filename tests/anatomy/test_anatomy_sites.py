"""The contract of the anatomy: every family rebuilt from its parts, read without a trace, written where asked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from devmon.anatomy import Anatomy, FrozenNorm, Layout, residual_stream
from devmon.anatomy.sites import SITES
from devmon.errors import InstrumentError
from devmon.recipes.language_model import AttentionOnly
from devmon.testing import induction
from tests.anatomy.families import CONFIGS, GROUPED, HEADS, LENGTH, MASKED, VISION, VOCAB, D, T, family, inputs


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parts_rebuild_the_output(name: str) -> None:
    model = family(name)
    output, rebuilt = Anatomy(model).rebuild(inputs(name))
    assert output.abs().max() > 1  # a comparison of zeros would say nothing
    torch.testing.assert_close(rebuilt, output, rtol=0, atol=1e-4)
    if name not in VISION and name not in MASKED:
        torch.testing.assert_close(output, model(inputs(name)).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_reading_and_writing_back_change_nothing(name: str) -> None:
    model, given = family(name), inputs(name)
    anatomy = Anatomy(model)
    plain, _ = anatomy.run(given)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    for site in SITES:
        if site == "resid_mid" and (anatomy.parallel or anatomy.layout.post_norm):
            continue
        if site == "neurons" and not anatomy.layout.neurons:  # of experts
            continue
        output, reads = anatomy.run(given, [site])
        assert torch.equal(output, plain)
        heads = {"q": HEADS, "z": HEADS, "k": anatomy.kv_heads, "v": anatomy.kv_heads}
        if site in heads:
            assert reads[site, 1].shape == (2, plain.shape[1], heads[site], anatomy.d_head)
        again, _ = anatomy.run(given, [], dict(reads))
        torch.testing.assert_close(again, plain, rtol=0, atol=1e-5)
        shifted, _ = anatomy.run(given, [], {site: lambda value: value.roll(1, -1)})
        assert (shifted - plain).abs().max() > 1e-3, f"writing {site} had no effect"
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2", "olmo2", "opt", "bert"])
def test_gradients_at_sites_are_those_of_small_changes(name: str) -> None:
    model, given = family(name).double(), inputs(name)
    anatomy = Anatomy(model)
    for site in ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "neurons", "mlp_out"):
        with torch.enable_grad():
            output, reads = anatomy.run(given, [(site, 1)], grad=True)
            (slope,) = torch.autograd.grad(output.square().sum(), [reads[site, 1]])
        direction = torch.randn(slope.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        ends = []
        for step in (1e-3 * direction, -1e-3 * direction):  # RMSNorms of transformers round to float32
            output, _ = anatomy.run(given, [], {(site, 1): reads[site, 1].detach() + step})
            ends.append(output.square().sum())
        torch.testing.assert_close((slope * direction).sum(), (ends[0] - ends[1]) / 2e-3, rtol=0.01, atol=0.01)


def test_training_gradients_are_what_they_were() -> None:
    model, given = family("llama"), inputs("llama")

    def slopes() -> list[Tensor]:
        model.zero_grad()
        model(given).logits.square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = slopes()
    with Anatomy(model).tapped(["z", "pattern", "neurons"]):
        read = slopes()
    assert all(torch.equal(one, other) for one, other in zip(plain, read, strict=True))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "phi3", "qwen2"])
def test_weights_by_head_make_the_queries_keys_and_values(name: str) -> None:
    anatomy = Anatomy(family(name))
    _, reads = anatomy.run(inputs(name), ["resid_pre", "q", "k", "v"])
    stream = anatomy.norm_in(1, "attention")(reads["resid_pre", 1])
    biased = 0
    for which, (site, weight) in enumerate(zip("qkv", (anatomy.W_Q(1), anatomy.W_K(1), anatomy.W_V(1)), strict=True)):
        expected = torch.einsum("bpd,hde->bphe", stream, weight)
        value, bias = reads[site, 1], anatomy.bias_in(1, which)
        group = HEADS // value.shape[2]
        if bias is not None:
            biased += int(bias.abs().max() > 0.01)
            expected = expected + bias.repeat_interleave(group, 0)
        torch.testing.assert_close(value.repeat_interleave(group, 2), expected, rtol=0, atol=1e-4)
    assert biased == (3 if name in ("gpt2", "gpt_neox", "qwen2") else 0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_a_frozen_norm_is_linear_and_exact(name: str) -> None:
    anatomy = Anatomy(family(name).double())
    norm, x = anatomy.final_norm, torch.randn(5, D, dtype=torch.float64)
    scale = norm.scale(x)
    torch.testing.assert_close(norm.linear(x, scale) + norm.bias, norm(x), rtol=1e-6, atol=1e-6)
    parts = torch.randn(3, 5, D, dtype=torch.float64)
    whole = norm.linear(parts.sum(0), scale)
    torch.testing.assert_close(sum(norm.linear(part, scale) for part in parts), whole)
    assert norm.centres == (name == "gpt2")


def test_a_scale_is_no_norm() -> None:
    module = nn.Module()
    module.forward = lambda x: x * torch.arange(4.0)  # type: ignore[method-assign]
    norm = FrozenNorm(module, 4, torch.zeros(1))
    assert not norm.normalises
    torch.testing.assert_close(
        norm.linear(torch.ones(2, 4), norm.scale(torch.ones(2, 4))), torch.arange(4.0).expand(2, 4)
    )


def test_the_demo_and_the_hand_built_models_declare_themselves() -> None:
    for model, vocab in ((AttentionOnly(VOCAB), VOCAB), (induction(12, 16), 12)):
        given = torch.randint(1, vocab, (2, 8), generator=torch.Generator().manual_seed(0))
        output, rebuilt = Anatomy(model).rebuild(given)
        torch.testing.assert_close(rebuilt, output, rtol=0, atol=1e-4)
    wrapped = nn.Module()
    wrapped.inner = AttentionOnly(VOCAB)  # as in a LightningModule
    wrapped.forward = wrapped.inner.forward  # type: ignore[assignment]
    assert Anatomy(wrapped).d_model == 64


class Own(nn.Module):
    """Names that no family uses."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.tower = nn.Embedding(VOCAB, 8), nn.ModuleList([OwnLayer()])
        self.read = nn.Linear(8, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for layer in self.tower:
            x = layer(x)
        return self.read(x)


class OwnLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.all, self.back, self.idle = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.all(x).chunk(3, -1))
        return x + self.back(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


OWN = Layout(blocks="tower", qkv="all", out="back", heads=2, embed="table", unembed="read")


@pytest.mark.parametrize("name", [*VISION, *MASKED])
def test_the_stream_of_encoders(name: str) -> None:
    model, given = family(name), inputs(name)
    stream = residual_stream(model, given)
    _, reads = Anatomy(model).run(given, ["resid_pre", "resid_post"])
    torch.testing.assert_close(stream, [reads["resid_pre", 0], reads["resid_post", 0], reads["resid_post", 1]])


def test_feature_maps_are_places() -> None:
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3))
    model, given = nn.Sequential(convolutions, nn.Flatten()), torch.randn(2, 3, 9, 9)
    stream = residual_stream(model, given, "0")
    assert [tuple(state.shape) for state in stream] == [(2, 81, 3), (2, 49, 4), (2, 25, 8)]
    torch.testing.assert_close(stream[1][1, 8], convolutions[0](given)[1, :, 1, 1])  # place 8 is row 1, column 1
    with pytest.raises(InstrumentError, match="blocks"):
        residual_stream(model, given)


def test_an_own_module_by_a_short_declaration() -> None:
    model, given = Own(), torch.randint(VOCAB, (2, 5))
    with pytest.raises(InstrumentError, match=r"Own are: give its class an attribute\s+anatomy = Layout"):
        Anatomy(model)
    output, rebuilt = Anatomy(model, OWN).rebuild(given)
    torch.testing.assert_close(rebuilt, output)
    with pytest.raises(InstrumentError, match="names 'nowhere', which Own does not have"):
        Anatomy(model, Layout(blocks="tower", qkv="nowhere", out="back", heads=2))
    with pytest.raises(InstrumentError, match="no multiple of 3 heads"):
        Anatomy(model, Layout(blocks="tower", qkv="all", out="back", heads=3))
    anatomy = Anatomy(model, OWN, who="Lens")
    with pytest.raises(InstrumentError, match="Lens: 'zz' is no site"):
        anatomy.run(given, ["zz"])
    with pytest.raises(InstrumentError, match="layers 0 to 0"):
        anatomy.run(given, [("z", 1)])
    with pytest.raises(InstrumentError, match="no MLP"):
        anatomy.run(given, ["neurons"])
    with pytest.raises(InstrumentError, match=r"'z' of layer 0 is \(2, 5, 2, 4\), what is written there is \(5,\)"):
        anatomy.run(given, [], {"z": lambda value: torch.zeros(5)})


def test_known_names_put_together_in_another_way_are_refused() -> None:
    config = T.GraniteConfig(**GROUPED, residual_multiplier=0.5)  # Llama's names, another sum
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
    with pytest.raises(InstrumentError, match="put together they do not give its logits"):
        Anatomy(model)


def test_a_site_that_is_never_reached_is_told() -> None:
    asleep = Layout(blocks="tower", qkv="all", out="idle", heads=2)
    with pytest.raises(InstrumentError, match=r"nothing was seen at 'z' of layer 0 of Own.*'idle'"):
        Anatomy(Own(), asleep).run(torch.randint(VOCAB, (2, 5)), ["z"])


def test_compiled_modules_are_read_and_hooks_leave_after_an_error() -> None:
    model = Own()
    compiled = torch.compile(model, backend="eager")
    _, reads = Anatomy(compiled, OWN).run(torch.randint(VOCAB, (2, 5)), ["z"])
    assert reads["z", 0].shape == (2, 5, 2, 4)
    with pytest.raises(InstrumentError, match="cannot look up"):
        Anatomy(model, OWN).run(torch.full((1, 5), VOCAB), ["z"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_pattern_of_a_grouped_model_is_written_where_asked_alone() -> None:
    anatomy, given = Anatomy(family("llama")), inputs("llama")
    _, before = anatomy.run(given, ["z"])

    def first_place(pattern: Tensor) -> Tensor:
        pattern = pattern.clone()
        pattern[:, 3] = F.one_hot(torch.zeros(LENGTH, dtype=torch.int64), LENGTH).to(pattern)
        return pattern

    _, after = anatomy.run(given, ["z", "v"], {("pattern", 1): first_place})
    torch.testing.assert_close(after["z", 0], before["z", 0])
    torch.testing.assert_close(after["z", 1][:, :, :3], before["z", 1][:, :, :3], rtol=0, atol=1e-6)
    value = after["v", 1][:, :1, 1].expand(-1, LENGTH, -1)  # head 3 reads value head 1
    torch.testing.assert_close(after["z", 1][:, :, 3], value)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_half_precision_norms_are_told_apart(name: str) -> None:
    norm = Anatomy(family(name).to(torch.bfloat16)).final_norm
    assert norm.normalises
    assert norm.centres == (name == "gpt2")
    assert norm.gain.dtype == torch.bfloat16
