"""No layout is trusted: each is tried on the model, and a wrong one is refused with the line to change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from torch import Tensor, nn

from devmon import IdentityError, Trajectory, Watch, observe
from devmon.anatomy import Anatomy, Layout
from devmon.errors import InstrumentError
from devmon.instruments import Composition
from devmon.snapshot import Snapshot
from tests.anatomy.families import VOCAB, D, family

HEADS = 4


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attend, self.back = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.attend(self.ln_1(x)).chunk(3, -1))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.scale * self.back(z)
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class Nano(nn.Module):
    """A language model of one's own, in the manner of nanoGPT."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.h = nn.Embedding(VOCAB, D), nn.ModuleList([Block(scale), Block(scale)])
        self.ln_f, self.head = nn.LayerNorm(D), nn.Linear(D, VOCAB)
        for parameter in self.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


RIGHT = Layout(
    blocks="h",
    qkv="attend",
    out="back",
    neurons="down",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    embed="wte",
    norm="ln_f",
    unembed="head",
    heads=HEADS,
)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "too few heads": ({"heads": 2}, r"patterns are of 4 heads, the layout says 2.*heads=4"),
    "too many heads": ({"heads": 8}, r"patterns are of 4 heads, the layout says 8.*heads=4"),
    "another order": ({"fused": "heads"}, r"in layer 0 what its heads read is not pattern · v.*fused='parts'"),
    "no final norm": ({"norm": ""}, r"norm and unembedding of its last stream are not its logits.*norm=''"),
    "another final norm": ({"norm": "h.1.ln_1"}, r"are not its logits.*norm='h.1.ln_1'"),
    "no norm on the way in": ({"attention_norm": ""}, r"in layer 0 q is not W · norm\(stream\).*attention_norm=''"),
    "the MLP's norm": ({"attention_norm": "ln_2"}, r"in layer 0 q is not.*attention_norm='ln_2'"),
    "no MLP": ({"neurons": "", "mlp_norm": ""}, r"write does not add up to its output.*neurons"),
    "parallel": ({"parallel": True}, r"what enters the MLP is not the stream before attention.*parallel=True"),
    "a norm at the end": ({"attention_end": "ln_1"}, r"write does not add up"),
    "norms after": ({"post_norm": True, "attention_end": "ln_1"}, r"write does not add up"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_declaration_is_refused_with_the_line_to_change(wrong: str, dtype: torch.dtype) -> None:
    fields, told = WRONG[wrong]
    model = Nano().to(dtype)
    assert Anatomy(model, RIGHT).tried
    with pytest.raises(InstrumentError, match=told):
        Composition(layout=replace(RIGHT, **fields))(Snapshot(0, model))


def test_a_declaration_of_the_class_is_tried_too_and_its_correction_is_measured() -> None:
    model: Any = Nano()
    model.anatomy = replace(RIGHT, heads=2)
    with pytest.raises(InstrumentError, match="Composition: the layout of Nano does not give.*heads=4"):
        Composition()(Snapshot(0, model))
    model.anatomy = RIGHT
    assert Composition()(Snapshot(0, model))["composition"].shape == (3, 2, 4, 2, 4)


def test_a_refused_layout_does_not_stand_in_the_way_of_its_correction(tmp_path: Path) -> None:
    run, model = Trajectory(tmp_path / "run.zarr", "a"), Nano()
    for layout in (replace(RIGHT, heads=2), replace(RIGHT, fused="heads")):
        with pytest.raises(InstrumentError, match="does not give what the model computes"):
            observe(0, model, [Watch("composition", Composition(layout=layout), range(9))], run)
    assert observe(0, model, [Watch("composition", Composition(layout=RIGHT), range(9))], run) == ["composition"]
    with pytest.raises(IdentityError, match="draws"):  # a correction of the layout changes nothing else
        observe(1, model, [Watch("composition", Composition(draws=8, layout=replace(RIGHT, cap="")), range(9))], run)


def test_queries_and_keys_that_are_exchanged() -> None:
    class Apart(Block):
        def __init__(self, scale: float) -> None:
            super().__init__(scale)
            self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
            del self.attend
            self.attend = lambda x: torch.cat([self.q(x), self.k(x), self.v(x)], -1)

    model = Nano()
    torch.manual_seed(1)
    model.h = nn.ModuleList([Apart(1.0), Apart(1.0)])
    apart = replace(RIGHT, qkv="", query="q", key="k", value="v")
    assert Anatomy(model, apart).tried
    for fields, told in (
        ({"query": "k", "key": "q"}, "another query at one place changes what other places attend to"),
        ({"value": "k", "key": "v"}, "is not pattern · v"),
    ):
        with pytest.raises(InstrumentError, match=told):
            Anatomy(model, replace(apart, **fields))


def test_a_sum_with_a_multiplier_has_no_layout() -> None:
    with pytest.raises(InstrumentError, match=r"write does not add up.*off by.*multiplied"):
        Anatomy(Nano(scale=0.5), RIGHT)


def test_training_that_has_diverged_is_no_fault_of_the_layout() -> None:
    model = Nano()
    model.h[1].down.weight.data.fill_(float("nan"))
    assert Anatomy(model, RIGHT).tried


def test_a_model_of_one_length_is_tried_when_it_is_read() -> None:
    class OneLength(Nano):
        def forward(self, tokens: Tensor) -> Tensor:
            assert tokens.shape[1] == 12
            return super().forward(tokens)

    tokens = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    anatomy = Anatomy(OneLength(), replace(RIGHT, heads=2))
    assert not anatomy.tried
    assert "not tried" in Composition(layout=replace(RIGHT, heads=2))(Snapshot(0, OneLength())).attrs["layout"]
    with pytest.raises(InstrumentError, match="heads=4"):
        anatomy.run(tokens)
    with pytest.raises(InstrumentError, match="heads=4"):
        Anatomy(OneLength(), replace(RIGHT, heads=2), inputs=tokens)
    assert Anatomy(OneLength(), RIGHT, inputs=tokens).tried


def test_a_trial_leaves_nothing_behind_and_is_no_pass_of_the_model() -> None:
    model, passes = Nano(), []
    handle = model.register_forward_pre_hook(lambda module, args: passes.append(args))
    before = torch.get_float32_matmul_precision()
    Anatomy(model, RIGHT)
    handle.remove()
    assert not passes
    assert torch.get_float32_matmul_precision() == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


REFUSED = {
    "bloom, stream from the norm": "write does not add up",
    "beit": "write does not add up",
    "diffllama": "what its heads read is not pattern · v",
    "granite": "put together they do not give its logits",
    "bart": "is an encoder–decoder.*'model.encoder' or 'model.decoder'",
    "mbart": "is an encoder–decoder",
    "t5": "is an encoder–decoder.*'encoder' or 'decoder'",
    "marian": "is an encoder–decoder",
    "whisper": "is an encoder–decoder",
    "clip, both towers": r"holds several transformers \(text_model, vision_model\)",
    "qwen3_next": "does not know where the parts",
    "recurrent_gemma": "does not know where the parts",
    "jamba": "does not know where the parts",
    "minimax": "does not know where the parts",
}


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_no_layout_describes_are_refused(name: str) -> None:
    with pytest.raises(InstrumentError, match=REFUSED[name]):
        Composition()(Snapshot(0, family(name)))


def test_places_are_not_taken_for_sequences() -> None:
    with pytest.raises(InstrumentError, match=r"its stream is \(8, 1, 32\) of \(1, 8\) tokens.*batch_first=True"):
        Anatomy(Nano(), replace(RIGHT, batch_first=False))


def test_a_stream_of_several_is_refused() -> None:
    class Several(Block):
        def forward(self, x: Tensor) -> Tensor:  # (stream, batch, pos, d), of which the first is read
            return x + (super().forward(x[0]) - x[0])

    class Many(Nano):
        def __init__(self) -> None:
            super().__init__()
            self.h = nn.ModuleList([Several(1.0), Several(1.0)])

        def forward(self, tokens: Tensor) -> Tensor:
            x = torch.stack([self.wte(tokens), 2 * self.wte(tokens)])
            for block in self.h:
                x = block(x)
            return self.head(self.ln_f(x.mean(0)))

    with pytest.raises(InstrumentError, match=r"its stream is \(2, 1, 8, 32\).*several streams have no layout"):
        Anatomy(Many(), RIGHT)


def test_of_two_towers_the_one_that_writes_the_logits_is_read() -> None:
    model = family("llava")
    anatomy = Anatomy(model)
    assert anatomy.body is model.model.language_model
    text = T.LlamaForCausalLM(model.config.text_config)
    text.model.load_state_dict(model.model.language_model.state_dict())
    found, alone = (Composition(draws=16)(Snapshot(0, each))["composition"] for each in (model, text.eval()))
    torch.testing.assert_close(torch.tensor(found.values), torch.tensor(alone.values), equal_nan=True)


def test_of_two_equal_models_in_one_module_the_one_that_runs_is_read() -> None:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.average, self.net = family("llama", 1), family("llama", 0)

        def forward(self, tokens: Tensor) -> Any:
            return self.net(tokens)

    model = Averaged()
    assert Anatomy(model).body is model.net.model


def test_falcon_by_group_is_split_into_its_heads() -> None:
    """Falcon 40B fuses by key-value head: two queries, a key, a value; kin of it all at once."""
    for name, kv_heads in (("falcon", 1), ("falcon, by group", 2), ("falcon, in sequence", 1), ("gpt_bigcode", 1)):
        anatomy = Anatomy(family(name))
        assert (anatomy.heads, anatomy.kv_heads) == (HEADS, kv_heads)
        assert anatomy.parallel == (name in ("falcon", "falcon, by group"))
    assert Anatomy(family("gpt_bigcode, by head")).kv_heads == HEADS
