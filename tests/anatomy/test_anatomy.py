"""Attention patterns, residual streams and logits against what models report themselves, and closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from devmon.anatomy import attention_patterns, find_blocks, logits, next_token, residual_stream, stack_heads
from devmon.anatomy.attention import _pattern
from devmon.errors import InstrumentError
from devmon.testing import Bigram, even

VOCAB, LENGTH, BATCH = 23, 12, 3
HUGGING_FACE = ["gpt2", "gpt_neox", "llama", "gemma2"]


def tokens(seed: int = 0, batch: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def hugging_face(kind: str) -> Any:
    """A tiny random model with three layers, default (sdpa) attention where it has it, and weights large enough to
    give patterns that differ from uniform."""
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
    configs = {
        "gpt2": lambda: transformers.GPT2Config(n_embd=16, n_layer=3, n_head=4, n_positions=32, vocab_size=VOCAB),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(vocab_size=VOCAB, **small),
        "llama": lambda: transformers.LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, **small),
        "gemma2": lambda: transformers.Gemma2Config(
            vocab_size=VOCAB, num_key_value_heads=2, head_dim=8, sliding_window=5, attn_logit_softcapping=2.0, **small
        ),
    }
    config = configs[kind]()
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(std=0.4)
    return model


class Attention(nn.Module):
    """One causal self-attention of 2 heads of size 4, computed in the given way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.project = nn.Linear(8, 24)
        self.builtin = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, state: Tensor) -> Tensor:
        batch, length, _ = state.shape
        query, key, value = self.project(state).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        banned = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (query @ key.transpose(-2, -1) / 2).masked_fill(banned, -math.inf)
        if self.way == "sdpa":
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        elif self.way == "F.softmax":
            mixed = F.softmax(scores, dim=-1) @ value
        elif self.way == "torch.softmax":
            mixed = torch.softmax(scores, -1) @ value
        elif self.way == "Tensor.softmax":
            mixed = scores.softmax(dim=3) @ value
        elif self.way == "hidden":
            mixed = (scores.exp() / scores.exp().sum(-1, keepdim=True)) @ value
        else:
            return self.builtin(state, state, state, attn_mask=banned, need_weights=self.way == "MHA weights")[0]
        return mixed.transpose(1, 2).reshape(batch, length, 8)

    def reference(self, state: Tensor) -> Tensor:
        """The pattern (batch, head, q, k), worked out apart."""
        weight, bias = (
            (self.builtin.in_proj_weight, self.builtin.in_proj_bias)
            if self.way.startswith("MHA")
            else (self.project.weight, self.project.bias)
        )
        query, key, _ = (state @ weight.T + bias).view(*state.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        pattern = torch.zeros(len(state), 2, state.shape[1], state.shape[1])
        for q in range(state.shape[1]):
            weights = ((query[:, :, q, None] * key[:, :, : q + 1]).sum(-1) / 2).exp()
            pattern[:, :, q, : q + 1] = weights / weights.sum(-1, keepdim=True)
        return pattern


class Small(nn.Module):
    def __init__(self, *ways: str, inplace: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed = nn.Embedding(VOCAB, 8)
        self.blocks = nn.ModuleList(Attention(way) for way in ways)
        self.unembed = nn.Linear(8, VOCAB)
        self.inplace = inplace
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.6
        self.eval()

    def forward(self, batch: Tensor) -> Tensor:
        state = self.embed(batch)
        for block in self.blocks:
            if self.inplace:
                state += block(state)
            else:
                state = state + block(state)
        return self.unembed(state)


WAYS = ["sdpa", "F.softmax", "torch.softmax", "Tensor.softmax", "MHA", "MHA weights"]


@pytest.mark.parametrize("way", WAYS)
def test_patterns_of_every_way_of_attending(way: str) -> None:
    model = Small(way, way)
    seen: list[Tensor] = []
    handles = [block.register_forward_hook(lambda m, args, out: seen.append(args[0])) for block in model.blocks]
    patterns = attention_patterns(model, tokens())
    for handle in handles:
        handle.remove()
    assert len(patterns) == 2, "one pattern per attention call, neither missed nor seen twice"
    for block, state, pattern in zip(model.blocks, seen, patterns, strict=True):
        assert isinstance(block, Attention)
        torch.testing.assert_close(pattern, block.reference(state).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_capturing_does_not_change_what_the_model_computes(way: str) -> None:
    model, outputs = Small(way, way), []
    plain = model(tokens())
    handle = model.register_forward_hook(lambda m, args, out: outputs.append(out))
    attention_patterns(model, tokens())
    handle.remove()
    if way.startswith("MHA"):  # the fast path off: the same function by another kernel
        torch.testing.assert_close(outputs[0], plain)
    else:
        assert torch.equal(outputs[0], plain)
    assert torch.backends.mha.get_fastpath_enabled()


def test_transformer_encoder_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(VOCAB, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    patterns = attention_patterns(model, tokens())
    assert [tuple(p.shape) for p in patterns] == [(BATCH, 2, LENGTH, LENGTH)] * 2
    for pattern in patterns:
        torch.testing.assert_close(pattern.sum(-1), torch.ones(BATCH, 2, LENGTH))
    assert len(residual_stream(model, tokens(), blocks="1.layers")) == 3


@pytest.mark.parametrize("case", ["plain", "causal", "bool", "float", "scale", "grouped", "empty row"])
def test_pattern_is_what_multiplies_the_values(case: str) -> None:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(2, 4, 6, 5, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2 if case == "grouped" else 4, 6, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 1, 6, 6, generator=generator) < 0.6
    mask[..., 0] = True
    if case == "empty row":
        mask[:, :, 3] = False
    options: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "bool": {"attn_mask": mask},
        "empty row": {"attn_mask": mask},
        "float": {"attn_mask": torch.randn(6, 6, generator=generator, dtype=torch.float64)},
        "scale": {"scale": 1.7},
        "grouped": {"is_causal": True, "enable_gqa": True},
    }
    chosen = options.get(case, {})
    identity = torch.eye(6, dtype=torch.float64).expand(2, key.shape[1], 6, 6)
    expected = F.scaled_dot_product_attention(query, key, identity, **chosen)
    torch.testing.assert_close(_pattern(query, key, identity, **chosen), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_hugging_face_patterns_and_stream(kind: str) -> None:
    model = hugging_face(kind)
    before = model.config._attn_implementation
    patterns = attention_patterns(model, tokens())
    stream = residual_stream(model, tokens())
    assert model.config._attn_implementation == before
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(tokens(), output_attentions=True, output_hidden_states=True)
    assert len(patterns) == len(expected.attentions) == 3
    for mine, theirs in zip(patterns, expected.attentions, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
        assert float((mine - theirs.mean()).abs().max()) > 0.3, "patterns too even to tell"
    assert len(stream) == len(expected.hidden_states) == 4
    for mine, theirs in zip(stream[:-1], expected.hidden_states[:-1], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    norm = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}.get(kind, "model.norm")
    with torch.no_grad():  # Hugging Face reports the last state after the final norm
        torch.testing.assert_close(
            model.get_submodule(norm)(stream[-1]), expected.hidden_states[-1], atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(logits(model, tokens()), expected.logits, atol=1e-4, rtol=1e-4)


def test_grouped_queries_seen_through_sdpa() -> None:
    """A wrapper without a config stays on sdpa: patterns are worked out from arguments, grouped heads included."""
    model = hugging_face("llama")
    wrapped = nn.ModuleDict({"inner": model})
    wrapped.forward = lambda batch: model(batch).logits
    assert model.config._attn_implementation == "sdpa"
    for mine, eager in zip(attention_patterns(wrapped, tokens()), attention_patterns(model, tokens()), strict=True):
        torch.testing.assert_close(mine, eager, atol=1e-6, rtol=1e-5)


def test_bfloat16_patterns_are_float32() -> None:
    pattern = attention_patterns(Small("sdpa").to(torch.bfloat16), tokens())[0]
    assert pattern.dtype == torch.float32
    torch.testing.assert_close(pattern.sum(-1), torch.ones(BATCH, 2, LENGTH), atol=1e-5, rtol=0)


@pytest.mark.parametrize("part", ["model", "block", "in place"])
def test_compiled_models_are_captured(part: str) -> None:
    model, plain = Small("sdpa", "sdpa"), Small("sdpa", "sdpa")
    target: nn.Module = model
    if part == "model":
        target = torch.compile(model, backend="eager")  # type: ignore[assignment]
    elif part == "block":
        model.blocks[0] = torch.compile(model.blocks[0], backend="eager")  # type: ignore[assignment]
    else:
        model.compile(backend="eager")
    with torch.no_grad():
        target(tokens())  # compiled before any hook is there
    for mine, theirs in zip(attention_patterns(target, tokens()), attention_patterns(plain, tokens()), strict=True):
        torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(residual_stream(target, tokens()), residual_stream(plain, tokens()), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.compiler.reset()


def test_no_pattern_is_an_error_that_names_instrument_and_model() -> None:
    with pytest.raises(
        InstrumentError, match=r"Induction needs attention patterns; Small shows none.*use F\.scaled"
    ) as e:
        attention_patterns(Small("hidden"), tokens(), "Induction")
    assert "\n" not in str(e.value)


def test_a_softmax_over_something_else_is_no_pattern() -> None:
    class Experts(Small):
        def forward(self, batch: Tensor) -> Tensor:
            state = super().forward(batch)
            torch.softmax(torch.zeros(BATCH, 2, LENGTH, LENGTH), dim=1)  # over heads
            torch.softmax(torch.zeros(BATCH, 2, LENGTH, LENGTH + 1), dim=-1)  # another length
            return state.softmax(-1)  # (batch, pos, vocab)

    assert len(attention_patterns(Experts("sdpa", "F.softmax"), tokens())) == 2


def test_stream_is_the_running_sum_even_where_blocks_write_in_place() -> None:
    def plain(model: Small) -> list[Tensor]:
        state = [model.embed(tokens())]
        for block in model.blocks:
            state.append(block(state[-1]))
        return [s.detach() for s in state]

    class Chain(Small):
        def forward(self, batch: Tensor) -> Tensor:
            state = self.embed(batch)
            for block in self.blocks:
                state = block(state)
                if self.inplace:
                    state.mul_(1.0).add_(0.0)
            after = state.clone()
            state.zero_()
            return self.unembed(after)

    for inplace in (False, True):
        model = Chain("sdpa", "F.softmax", inplace=inplace)
        for mine, theirs in zip(residual_stream(model, tokens()), plain(model), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_stream_hooks_are_removed_even_after_an_error() -> None:
    model = Small("sdpa", "sdpa")

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    residual_stream(model, tokens())
    assert hooks() == 0
    with pytest.raises(InstrumentError, match="cannot look up tokens"):
        residual_stream(model, tokens() + VOCAB)
    with pytest.raises(InstrumentError, match="cannot look up tokens"):
        residual_stream(model, tokens() + VOCAB, blocks="blocks")
    assert hooks() == 0


def test_blocks_are_the_largest_chain_of_equal_width() -> None:
    class Decoys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCAB, 8)
            self.small = nn.ModuleList([nn.Linear(8, 8)])
            self.h = nn.ModuleList([nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(2)])
            self.head = nn.Sequential(nn.Linear(8, 999), nn.Linear(999, VOCAB))
            self.unused = nn.ModuleList([nn.Linear(500, 500)])

        def forward(self, batch: Tensor) -> Tensor:
            state = self.small[0](self.embed(batch))
            for block in self.h:
                state = block(state)
            return self.head(state)

    model = Decoys()
    assert find_blocks(model, tokens()) == "h"
    assert len(residual_stream(model, tokens())) == 3
    assert len(residual_stream(model, tokens(), blocks="small")) == 2
    with pytest.raises(InstrumentError, match=r"has no module 'layers'.*blocks"):
        residual_stream(model, tokens(), blocks="layers")
    with pytest.raises(InstrumentError, match=r"'embed' of Decoys holds no modules"):
        residual_stream(model, tokens(), blocks="embed")
    with pytest.raises(InstrumentError, match=r"'unused' of Decoys ran \[0\] times"):
        residual_stream(model, tokens(), blocks="unused")
    with pytest.raises(InstrumentError, match=r"'head' of Decoys ran \[1, 1\] times"):
        residual_stream(model, tokens(), blocks="head")
    with pytest.raises(InstrumentError, match=r"Probe needs the residual stream; Bigram has no .*set blocks="):
        residual_stream(Bigram(torch.full((VOCAB, VOCAB), 1 / VOCAB)), tokens(), who="Probe")


def test_logits_of_every_kind_of_output() -> None:
    class Returns(nn.Module):
        def __init__(self, make: Any) -> None:
            super().__init__()
            self.inner, self.make = even(VOCAB, LENGTH), make

        def forward(self, batch: Tensor) -> Any:
            return self.make(self.inner(batch) + torch.arange(VOCAB))

    output = transformers.modeling_outputs.CausalLMOutput
    for make in (lambda x: x, lambda x: (x, None), lambda x: output(logits=x), lambda x: {"logits": x}):
        assert torch.equal(logits(Returns(make), tokens())[0, 0], torch.arange(VOCAB).double())
    with pytest.raises(InstrumentError, match=r"Gain needs logits.*\(3, 12\) places; Returns returned \(3, 1, 23\)"):
        logits(Returns(lambda x: x[:, -1:]), tokens(), "Gain")
    with pytest.raises(InstrumentError, match=r"Gain needs logits.*Returns returned BaseModelOutput"):
        logits(Returns(lambda x: transformers.modeling_outputs.BaseModelOutput(last_hidden_state=x)), tokens(), "Gain")


def test_next_token_is_scored_by_the_place_before() -> None:
    table = torch.full((3, 3), 0.1) + 0.7 * torch.eye(3).roll(1, 1)  # 0 -> 1 -> 2 -> 0
    nats, hits = next_token(Bigram(table), torch.tensor([[0, 1, 2, 2, 0]]))
    np.testing.assert_allclose(nats.numpy(), -np.log([[0.8, 0.8, 0.1, 0.8]]), rtol=1e-6)
    assert hits.tolist() == [[True, True, False, True]]
    with pytest.raises(InstrumentError, match="give tokens of this model's vocabulary"):
        next_token(nn.Sequential(nn.Embedding(9, 3)), torch.tensor([[0, 8]]), "Loss")


def test_layers_of_unequal_heads_are_filled_with_nan() -> None:
    stacked = stack_heads([np.array([1.0, 2.0]), np.array([3.0])])
    np.testing.assert_array_equal(stacked, [[1.0, 2.0], [3.0, np.nan]])


def test_models_of_one_length_and_models_that_see_ahead() -> None:
    class OneLength(nn.Module):
        def forward(self, given: Tensor) -> Tensor:
            assert given.shape[1] == LENGTH, "a causal mask of fixed size"
            return F.one_hot(given, VOCAB).double().cumsum(1)

    class Ahead(OneLength):
        def forward(self, given: Tensor) -> Tensor:
            return super().forward(given).flip(1)

    assert next_token(OneLength(), tokens())[0].shape == (BATCH, LENGTH - 1)
    with pytest.raises(InstrumentError, match="depends on later tokens"):
        next_token(Ahead(), tokens())
    next_token(Ahead(), tokens(), check=False)
    next_token(Ahead(), torch.zeros(2, LENGTH, dtype=torch.int64))  # one token alone: nothing to exchange


@pytest.mark.parametrize(("logit", "nats"), [(math.nan, math.nan), (-math.inf, math.log(VOCAB - 1))])
def test_the_loss_of_a_model_that_has_diverged_is_nan_and_logits_may_be_masked(logit: float, nats: float) -> None:
    class Flat(nn.Module):
        def forward(self, given: Tensor) -> Tensor:
            scores = torch.zeros(*given.shape, VOCAB)
            scores[..., 0] = logit
            return scores

    some = tokens()
    some[some == 0] = 1
    np.testing.assert_allclose(next_token(Flat(), some)[0].numpy(), nats, rtol=1e-6)
