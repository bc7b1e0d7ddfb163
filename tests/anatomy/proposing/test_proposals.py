"""`anatomy_of`: the layouts of models that nobody declared, found by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn
from typer.testing import CliRunner

from devmon import DataError, Snapshot
from devmon.anatomy import Anatomy, Layout, anatomy_of, next_token
from devmon.anatomy.proposing.propose import spell
from devmon.anatomy.variants.fused import ORDERS
from devmon.cli.root import app
from devmon.errors import InstrumentError
from devmon.instruments import LinearProbe
from devmon.sampling import next_token_loss
from tests.anatomy.proposing import client_models as C

TOKENS = torch.randint(C.VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
CLIENTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "minGPT": (C.MinGPT, {"query": "attn.query", "key": "attn.key", "value": "attn.value", "neurons": "mlp.2"}),
    "nanoGPT": (C.NanoGPT, {"qkv": "attn.c_attn", "fused": "parts", "logits": "last", "unembed": "lm_head"}),
    "nanochat": (C.Nanochat, {"attention_norm": "F.rms_norm", "norm": "F.rms_norm", "cap": 15.0, "key": "attn.c_k"}),
    "x-transformers": (C.XTransformer, {"together": 2, "enter": "0.0.0", "leave": "1.2", "neurons": "1.1.ff.2"}),
    "litgpt": (C.LitGPT, {"fused": "heads", "parallel": False, "heads": "config.n_head"}),
    "litgpt, parallel": (
        lambda: C.LitGPT(4, parallel=True),
        {"fused": "heads", "parallel": True, "mlp_norm": "norm_2"},
    ),
    "litgpt, one key": (lambda: C.LitGPT(1), {"qkv": "attn.qkv"}),
    "nn.TransformerEncoder": (
        C.TorchEncoder,
        {"qkv": "self_attn", "out": "self_attn.out_proj", "norm": "encoder.norm"},
    ),
    "norms after": (lambda: C.TorchEncoder(norm_first=False), {"post_norm": True, "attention_end": "norm1"}),
    "places first": (lambda: C.TorchEncoder(batch_first=False), {"batch_first": False, "mlp_norm": "norm2"}),
    "flat": (lambda: C.TorchEncoder(flat=True), {"logits": "flat"}),
}


def made(client: str) -> Any:
    torch.manual_seed(0)
    return C.shaken(CLIENTS[client][0]())


@pytest.mark.parametrize("client", CLIENTS)
def test_a_layout_is_proposed_that_puts_the_model_together(client: str) -> None:
    model = made(client).double()
    proposal = anatomy_of(model)
    assert proposal.layout is not None, proposal
    assert proposal.source == "proposed"
    found = {name: getattr(proposal.layout, name) for name in CLIENTS[client][1]}
    assert found == CLIENTS[client][1]
    assert proposal.unplaced == ()

    # The line is what one writes, and the class then knows its parts.
    model.anatomy = eval(proposal.line.removeprefix("anatomy = "), {"Layout": Layout})
    anatomy = Anatomy(model)
    whole, rebuilt = anatomy.rebuild(TOKENS)
    shift = whole - rebuilt if proposal.layout.direct and not proposal.layout.post_norm else torch.zeros(1)
    if proposal.layout.logits == "flat":  # logarithms of probabilities are logits up to a number for each place
        shift = shift - shift.mean(-1, keepdim=True)
    assert float(shift.abs().max()) < 1e-9
    assert anatomy_of(model).source == "declared"


@pytest.mark.parametrize("client", CLIENTS)
def test_what_the_sites_hold_is_what_the_modules_of_the_model_are_given(client: str) -> None:
    """The heads' outputs by pattern and values, from weights alone, against what the output map was given."""
    model = made(client).double()
    layout = anatomy_of(model).layout
    assert layout is not None
    anatomy = Anatomy(model, layout)
    _, reads = anatomy.run(TOKENS, ["resid_pre", "pattern", "z", "attn_out"])
    for layer in range(anatomy.layers):
        normed = anatomy.norm_in(layer, "attention")(reads["resid_pre", layer])
        z = torch.zeros_like(reads["z", layer])
        for head in range(anatomy.heads):
            bias = anatomy.bias_in(layer, 2)
            value = normed @ anatomy.W_V(layer)[head]
            value = value if bias is None else value + bias[head * len(bias) // anatomy.heads]
            z[:, :, head] = reads["pattern", layer][:, head] @ value
        torch.testing.assert_close(z, reads["z", layer], rtol=1e-9, atol=1e-9)


class Ordered(nn.Module):
    """One layer whose fused map is laid out as `order` says, in code of its own."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.heads = order, C.HEADS
        self.embed, self.head = nn.Embedding(C.VOCAB, C.D), nn.Linear(C.D, C.VOCAB)
        self.layers = nn.ModuleList([nn.ModuleDict({"fused": nn.Linear(C.D, 3 * C.D), "out": nn.Linear(C.D, C.D)})])
        self.layers[0].forward = self.layer  # type: ignore[method-assign, assignment]

    def layer(self, x: Tensor) -> Tensor:
        form, _, letters = self.order.partition(":")
        letters = letters or "qkv"
        usual = {"parts": "part head dim", "heads": "head part dim"}
        axes = usual.get(form, form).split()
        length = {"part": 3, "head": C.HEADS, "dim": C.D // C.HEADS}
        index = torch.arange(3 * C.D).reshape([length[axis] for axis in axes])
        index = index.permute([axes.index(axis) for axis in ("part", "head", "dim")])
        fused = self.layers[0]["fused"](x)  # type: ignore[index, operator]
        q, k, v = (fused[..., index[letters.index(letter)].flatten()] for letter in "qkv")
        z = C.attend(*(C.heads_of(part) for part in (q, k, v)))
        return x + self.layers[0]["out"](z)  # type: ignore[index, operator]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers[0](self.embed(tokens)))


@pytest.mark.parametrize("order", ORDERS[::3])
def test_a_fused_map_in_any_order(order: str) -> None:
    torch.manual_seed(0)
    proposal = anatomy_of(C.shaken(Ordered(order)))
    assert proposal.layout is not None, proposal
    assert proposal.layout.fused == order
    wrong = ORDERS[(ORDERS.index(order) + 1) % len(ORDERS)]
    with pytest.raises(InstrumentError, match=r"one that does: anatomy = Layout\(.*out=\"out\", qkv=\"fused\""):
        Anatomy(C.shaken(Ordered(order)), replace(proposal.layout, fused=wrong))


def test_a_wrong_declaration_is_refused_with_the_whole_line_that_fits() -> None:
    model = made("minGPT")
    right = anatomy_of(model).layout
    assert right is not None
    model.anatomy = replace(right, heads=2)
    with pytest.raises(
        InstrumentError, match=r"patterns are of 4 heads.*one that does: anatomy = Layout\(blocks=\"blocks\""
    ):
        anatomy_of(model)
    with pytest.raises(InstrumentError, match=r"heads=4.*one that does: .*heads=\"attn.n_head\"\)"):
        Anatomy(model)
    with pytest.raises(InstrumentError, match="fused='parts:qq' is no order"):
        Anatomy(made("nanoGPT"), replace(anatomy_of(made("nanoGPT")).layout or right, fused="parts:qq"))


def test_a_stream_that_is_mixed_between_layers_has_no_layout_and_it_is_said_why() -> None:
    torch.manual_seed(0)
    proposal = anatomy_of(C.shaken(C.Nanochat(scaled=True)))
    assert proposal.layout is None
    assert any("layer 1 does not read what layer 0 gives" in why for _, why in proposal.refused), proposal
    assert "attn.c_q" in proposal.block


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(C.D, C.D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(nn.functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


@pytest.mark.parametrize("kind", ["megatron-bert", "openai-gpt", "xglm"])
def test_families_without_a_layout(kind: str) -> None:
    """A table of two kinds of tokens, blocks that return lists, and attention of (batch · head, pos, pos)."""
    small = {"vocab_size": 23, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    configs: dict[str, Callable[[], Any]] = {
        "megatron-bert": lambda: T.MegatronBertConfig(**sizes, **small),
        "openai-gpt": lambda: T.OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=23),
        "xglm": lambda: T.XGLMConfig(
            d_model=32, num_layers=2, attention_heads=4, ffn_dim=48, vocab_size=23, scale_embedding=False
        ),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = C.shaken(T.AutoModelForCausalLM.from_config(configs[kind]()))
    layout = anatomy_of(model).layout
    assert layout is not None
    assert layout.batch_first
    assert layout.post_norm == (kind == "openai-gpt")
    whole, rebuilt = Anatomy(model, layout).rebuild(TOKENS % 23)
    torch.testing.assert_close(whole, rebuilt, atol=1e-4, rtol=1e-4)


def test_a_stack_with_convolutions_between() -> None:
    torch.manual_seed(0)
    model = made("litgpt")
    model.transformer["h"] = nn.ModuleList([Conv(), C.LitBlock(2, False), Conv(), Conv(), C.LitBlock(2, False), Conv()])
    C.shaken(model)
    layout = anatomy_of(model).layout
    assert layout is not None
    assert layout.hybrid
    anatomy = Anatomy(model, layout)
    assert anatomy.layers == 2
    _, reads = anatomy.run(TOKENS, ["resid_pre", "resid_post"])
    torch.testing.assert_close(model.transformer["h"][4](reads["resid_pre", 1]), reads["resid_post", 1])
    with pytest.raises(InstrumentError, match="passes blocks of another kind"):
        anatomy.need_sum()


def test_a_classifier_of_numbers_has_blocks_and_no_layout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    proposal = anatomy_of(model)
    assert (proposal.layout, proposal.blocks) == (None, "")

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    wrapped = Wrapped()
    assert anatomy_of(wrapped).blocks == "net"
    x = torch.randn(60, 5)
    row = LinearProbe(x, (x[:, 0] > 0).long(), blocks="net")(Snapshot(0, wrapped))
    assert row.sizes["layer"] == 6  # the input and five modules


def test_logits_are_those_of_the_model_that_returns_them_at_every_place() -> None:
    for client, whole in (
        ("nanoGPT", lambda model: model(TOKENS, TOKENS)[0]),
        ("flat", lambda model: model(TOKENS).view(*TOKENS.shape, -1)),
    ):
        model = made(client)
        scores = whole(model)[:, :-1].log_softmax(-1)
        expected = -scores.gather(-1, TOKENS[:, 1:, None])[..., 0].double()
        model.anatomy = anatomy_of(model).layout
        nats, _ = next_token(model, TOKENS)
        torch.testing.assert_close(nats, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(next_token_loss(model, TOKENS).double(), expected.mean(1), rtol=1e-5, atol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused() -> None:
    model = made("nanoGPT")
    right = anatomy_of(model).layout
    assert right is not None
    for layout, told in (
        (replace(right, norm="transformer.h.0.ln_1"), "are not what it says of the last place"),
        (replace(right, logits="flat"), r"returned \(1, 1, 29\) for \(1, 12\) tokens"),
        (replace(right, logits="all"), "logits='all' is no adapter"),
    ):
        model.anatomy = layout
        with pytest.raises(InstrumentError, match=told):
            next_token(model, TOKENS)
    model.anatomy = replace(right, logits=lambda model, tokens: model(tokens, tokens))
    torch.testing.assert_close(next_token(model, TOKENS)[0][0, 0], next_token(model, TOKENS[:1, :2])[0][0, 0])


def test_two_stacks_are_told_with_the_line_for_their_logits() -> None:
    torch.manual_seed(0)
    model = C.shaken(C.LightningDemo())
    proposal = anatomy_of(model)
    assert "no one list of layers holds all attention" in proposal.note
    model.anatomy = eval(proposal.line.removeprefix("anatomy = "), {"Layout": Layout})
    expected = -model(TOKENS, TOKENS).view(3, 12, -1)[:, :-1].gather(-1, TOKENS[:, 1:, None])[..., 0].double()
    torch.testing.assert_close(next_token(model, TOKENS)[0], expected, rtol=1e-5, atol=1e-5)


def test_the_command(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "from tests.anatomy.proposing.client_models import MinGPT, Nanochat\nimport torch\n"
        "def model():\n    torch.manual_seed(0)\n    return MinGPT()\n"
        "def mixed():\n    return Nanochat(scaled=True)\n"
    )
    shown = CliRunner().invoke(app, ["anatomy", f"{script}:model"])
    assert shown.exit_code == 0, shown.output
    assert 'anatomy = Layout(blocks="blocks", out="attn.proj"' in shown.output
    assert CliRunner().invoke(app, ["anatomy", f"{script}:MinGPT"]).exit_code == 0
    assert CliRunner().invoke(app, ["anatomy", f"{script}:mixed"]).exit_code == 1
    failed = CliRunner().invoke(app, ["anatomy", f"{script}:torch"])
    assert isinstance(failed.exception, DataError)


def test_a_model_of_one_length_and_one_whose_unembedding_is_no_module() -> None:
    class OneLength(C.MinGPT):
        def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
            assert idx.shape[1] == C.PLACES
            return super().forward(idx)

    class Tied(C.MinGPT):
        def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
            states = self.blocks(self.tok_emb(idx) + self.pos_emb[:, : idx.shape[1]])
            return nn.functional.linear(self.ln_f(states), self.tok_emb.weight)

    torch.manual_seed(0)
    assert anatomy_of(C.shaken(OneLength())).layout == anatomy_of(made("minGPT")).layout
    proposal = anatomy_of(C.shaken(Tied()))
    assert proposal.layout is not None
    assert (proposal.layout.unembed, proposal.layout.neurons) == ("", "mlp.2")
    assert "its unembedding is no module" in str(proposal)


def test_a_model_that_runs_on_nothing_that_is_made_up() -> None:
    class Odd(nn.Module):
        def forward(self, a: Tensor, b: str) -> Tensor:
            return a

    with pytest.raises(InstrumentError, match="Odd runs on nothing that was made up for it"):
        anatomy_of(Odd())


def test_the_line_leaves_out_what_is_the_default() -> None:
    assert spell(Layout(blocks="h", out="o", heads=2)) == 'Layout(blocks="h", out="o", heads=2)'
